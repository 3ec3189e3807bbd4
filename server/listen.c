#include "server/listen.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BACKLOG = 511 };

static struct addrinfo *resolve(const char *host, uint16_t port, int *why)
{
    struct addrinfo hints = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM,
                              .ai_flags = AI_PASSIVE | AI_NUMERICSERV };
    struct addrinfo *list = NULL;
    char service[8];

    snprintf(service, sizeof service, "%u", port);
    *why = getaddrinfo(host, service, &hints, &list);
    return *why == 0 ? list : NULL;
}

static int open_one(const struct addrinfo *a)
{
    const int on = 1, off = 0;
    int fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    if (fd < 0)
        return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (a->ai_family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(fd, a->ai_addr, a->ai_addrlen) == 0 && listen(fd, BACKLOG) == 0)
        return fd;
    int saved = errno;
    close(fd);
    errno = saved;
    return -1;
}

static uint16_t port_of(int fd)
{
    struct sockaddr_storage ss = { 0 };
    socklen_t n = sizeof ss;

    if (getsockname(fd, (struct sockaddr *)&ss, &n) != 0)
        return 0;
    return ntohs(ss.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&ss)->sin6_port
                                          : ((struct sockaddr_in *)&ss)->sin_port);
}

enum status listen_open(int *fd, uint16_t *bound_port, const char *host, uint16_t port,
                        struct error *err)
{
    int why;
    struct addrinfo *list = resolve(host, port, &why);

    *fd = -1;
    if (!list)
        return error_set(err, ST_INVALID, "host %s: %s", host, gai_strerror(why));
    for (struct addrinfo *a = list; a && *fd < 0; a = a->ai_next)
        *fd = open_one(a);
    int saved = errno;
    freeaddrinfo(list);
    if (*fd < 0)
        return error_set(err, ST_IO, "cannot listen on %s port %u: %s", host, port,
                         strerror(saved));
    *bound_port = port_of(*fd);
    return ST_OK;
}

bool listen_is_loopback(const char *host)
{
    int why;
    struct addrinfo *list = resolve(host, 0, &why);
    bool all = list != NULL;

    for (struct addrinfo *a = list; a; a = a->ai_next) {
        if (a->ai_family == AF_INET) {
            const struct sockaddr_in *in = (const void *)a->ai_addr;
            all = all && ntohl(in->sin_addr.s_addr) >> 24 == 127;
        } else if (a->ai_family == AF_INET6) {
            const struct sockaddr_in6 *in6 = (const void *)a->ai_addr;
            all = all && IN6_IS_ADDR_LOOPBACK(&in6->sin6_addr);
        }
    }
    if (list)
        freeaddrinfo(list);
    return all;
}

uint32_t listen_raise_descriptors(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return 1024;
    limit.rlim_cur = limit.rlim_max;
    /* Refused for a privileged maximum only; the old value then stays. */
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0 && getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return 1024;
    return limit.rlim_cur > UINT32_MAX ? UINT32_MAX : (uint32_t)limit.rlim_cur;
}
