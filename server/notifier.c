#include "server/notifier.h"

#include "engine/base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static const char *find_variable(char **env, const char *name)
{
    size_t n = strlen(name);

    for (; *env; env++)
        if (strncmp(*env, name, n) == 0 && (*env)[n] == '=')
            return *env + n + 1;
    return NULL;
}

static bool parse_number(const char *s, uint64_t *out)
{
    uint64_t n = 0;

    if (!*s)
        return false;
    for (; *s; s++) {
        if (*s < '0' || *s > '9' || n > UINT64_MAX / 100000)
            return false;
        n = n * 10 + (uint64_t)(*s - '0');
    }
    *out = n;
    return true;
}

/* A path, or with an @ in front a name in the abstract name space. */
static enum status connect_to(int *fd, const char *where, struct error *err)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    size_t n = strlen(where);

    if (n < 2 || n >= sizeof a.sun_path || (where[0] != '/' && where[0] != '@'))
        return error_set(err, ST_INVALID, "NOTIFY_SOCKET is '%.120s': neither the path of a socket "
                         "nor @ with an abstract name", where);
    memcpy(a.sun_path, where, n);
    if (where[0] == '@')
        a.sun_path[0] = '\0';
    *fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (*fd < 0 || connect(*fd, (const struct sockaddr *)(const void *)&a,
                           (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n)) < 0)
        return error_set(err, ST_IO, "cannot reach NOTIFY_SOCKET %s: %s", where, strerror(errno));
    return ST_OK;
}

/* The interval may be meant for another process of the same service. */
static enum status read_watchdog(uint64_t *interval_ns, char **env, struct error *err)
{
    const char *usec = find_variable(env, "WATCHDOG_USEC");
    const char *pid = find_variable(env, "WATCHDOG_PID");
    uint64_t n_usec, n_pid;

    if (!usec)
        return ST_OK;
    if (!parse_number(usec, &n_usec) || n_usec == 0)
        return error_set(err, ST_INVALID, "WATCHDOG_USEC is '%.40s', not a number of microseconds",
                         usec);
    if (pid && !parse_number(pid, &n_pid))
        return error_set(err, ST_INVALID, "WATCHDOG_PID is '%.40s', not a number", pid);
    if (!pid || n_pid == (uint64_t)getpid())
        *interval_ns = n_usec * 1000;
    return ST_OK;
}

enum status notifier_open(struct notifier *out, char **env, struct error *err)
{
    const char *where = find_variable(env, "NOTIFY_SOCKET");
    enum status status;

    *out = (struct notifier){ .fd = -1 };
    if (!where)
        return ST_OK;
    status = connect_to(&out->fd, where, err);
    if (status == ST_OK)
        status = read_watchdog(&out->watchdog_ns, env, err);
    if (status != ST_OK)
        notifier_close(out);
    return status;
}

void notifier_close(struct notifier *n)
{
    if (n->fd >= 0)
        close(n->fd);
    *n = (struct notifier){ .fd = -1 };
}

/* False: there was no room for it.  A manager that is gone is told nothing more. */
static bool deliver(struct notifier *n, const char *text)
{
    if (n->fd < 0 || send(n->fd, text, strlen(text), MSG_NOSIGNAL) >= 0)
        return true;
    if (errno == EAGAIN || errno == ENOBUFS || errno == EINTR)
        return false;
    if (!n->complained)
        log_warn("notify", "the service manager cannot be told: %s", strerror(errno));
    n->complained = true;
    return true;
}

void notifier_retry(struct notifier *n)
{
    if (n->state[0] && deliver(n, n->state))
        n->state[0] = '\0';
}

void notifier_set_state(struct notifier *n, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(n->state, sizeof n->state, fmt, ap);
    va_end(ap);
    notifier_retry(n);
}

void notifier_feed(struct notifier *n, const char *status)
{
    char text[NOTIFIER_STATE_BYTES];

    snprintf(text, sizeof text, "WATCHDOG=1\nSTATUS=%s", status);
    (void)deliver(n, text);
}
