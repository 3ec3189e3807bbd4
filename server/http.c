#include "server/http_parts.h"

#include "engine/base/clock.h"
#include "engine/base/invariant.h"
#include "engine/base/log.h"
#include "engine/base/mem.h"
#include "server/listen.h"

#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    /* libmicrohttpd's memory for one connection's head.  Four times what
     * request_head.h accepts, so that nearly every oversized head is refused
     * by us, in JSON; past it the library answers with HTML of its own. */
    CONNECTION_MEMORY_BYTES = 64 * 1024,
    MAX_RUNS = 8
};

/* ---- the daemon inside the loop */

static void on_timer(uv_timer_t *timer);

/* Connections that have work make the timeout 0.  A timer of 0 ms re-armed in
 * its own callback starves the loop, so after a few rounds it becomes 1 ms. */
static void run_daemon(struct http_server *s)
{
    MHD_UNSIGNED_LONG_LONG ms = 0;

    for (int i = 0; i < MAX_RUNS && ms == 0; i++) {
        s->running = true;
        s->has_room = false;
        MHD_run(s->daemon);
        s->running = false;
        if (s->has_room) {
            ms = 0;
        } else if (MHD_get_timeout(s->daemon, &ms) != MHD_YES) {
            uv_timer_stop(&s->timer);
            return;
        }
    }
    uv_timer_start(&s->timer, on_timer, ms ? ms : 1, 0);
}

static void on_timer(uv_timer_t *timer)
{
    run_daemon(timer->data);
}

static void on_poll(uv_poll_t *poll, int status, int events)
{
    (void)status, (void)events;
    run_daemon(poll->data);
}

/* Without a thread of its own the library has no way to wake up.  Inside
 * MHD_run the timeout of 0 that follows does it. */
void http_wake(struct http_server *s)
{
    if (!s->running)
        uv_timer_start(&s->timer, on_timer, 0, 0);
}

/* ---- connections and their time limits */

static void connection_open(struct http_server *s, struct MHD_Connection *connection,
                            void **socket_context)
{
    struct http_connection *c = mem_calloc(1, sizeof *c);

    c->fd = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
    c->since_ns = clock_now_ns();
    c->next = s->connections;
    if (c->next)
        c->next->prev = c;
    s->connections = c;
    *socket_context = c;
}

static void connection_close(struct http_server *s, struct http_connection *c)
{
    if (c->prev)
        c->prev->next = c->next;
    else
        s->connections = c->next;
    if (c->next)
        c->next->prev = c->prev;
    mem_free(c);
    s->has_room = true;
}

static void on_connection(void *cls, struct MHD_Connection *connection, void **socket_context,
                          enum MHD_ConnectionNotificationCode what)
{
    if (what == MHD_CONNECTION_NOTIFY_STARTED)
        connection_open(cls, connection, socket_context);
    else
        connection_close(cls, *socket_context);
}

/* The library sees the end of the input and closes; what has been sent
 * arrives. */
static void connection_cut(struct http_connection *c)
{
    c->cut = true;
    shutdown(c->fd, SHUT_RDWR);
}

/* The library's own time limit counts from the last byte, so one byte a
 * minute would hold a connection for ever. */
void http_sweep(struct http_server *s, uint64_t now_ns)
{
    uint64_t idle_ns = (uint64_t)s->cfg.idle_timeout_s * 1000000000u;

    for (struct http_connection *c = s->connections; c; c = c->next) {
        struct http_exchange *x = c->exchange;
        if (c->cut)
            continue;
        if (!x) {
            if (now_ns > c->since_ns + idle_ns)
                connection_cut(c);
        } else if (x->receiving && now_ns > x->deadline_ns) {
            if (!x->told)
                http_tell(x, 408, "The request body took longer to arrive than this server "
                          "waits.");
            connection_cut(c);
        }
    }
}

/* ---- the server */

/* Paths are matched raw: decoding would let %00 cut them short. */
static size_t keep_escapes(void *cls, struct MHD_Connection *c, char *s)
{
    (void)cls, (void)c;
    return strlen(s);
}

static void log_library(void *cls, const char *fmt, va_list ap)
{
    char text[256];

    (void)cls;
    vsnprintf(text, sizeof text, fmt, ap);
    text[strcspn(text, "\r\n")] = '\0';
    log_debug("mhd", "%s", text);
}

void http_maybe_free(struct http_server *s)
{
    if (!s->stopping || s->open_handles || s->n_exchanges)
        return;
    ASSERT(!s->connections && s->bodies_bytes == 0);
    mem_free(s);
}

static void on_handle_closed(uv_handle_t *handle)
{
    struct http_server *s = handle->data;

    s->open_handles--;
    http_maybe_free(s);
}

static struct MHD_Daemon *start_daemon(struct http_server *s, int fd)
{
    return MHD_start_daemon(
        MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, s->port, NULL, NULL,
        http_on_access, s, MHD_OPTION_EXTERNAL_LOGGER, log_library, NULL,
        MHD_OPTION_LISTEN_SOCKET, (MHD_socket)fd,
        MHD_OPTION_NOTIFY_COMPLETED, http_on_completed, s,
        MHD_OPTION_NOTIFY_CONNECTION, on_connection, s,
        MHD_OPTION_UNESCAPE_CALLBACK, keep_escapes, NULL,
        MHD_OPTION_CONNECTION_LIMIT, (unsigned)s->cfg.max_connections,
        MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)s->cfg.idle_timeout_s,
        MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)CONNECTION_MEMORY_BYTES,
        MHD_OPTION_END);
}

enum status http_create(struct http_server **out, uv_loop_t *loop, const struct http_config *cfg,
                        const struct http_handler *handler, struct error *err)
{
    struct http_server *s;
    int fd = -1;
    uint16_t port = 0;

    *out = NULL;
    TRY(listen_open(&fd, &port, cfg->host, cfg->port, err));
    s = mem_calloc(1, sizeof *s);
    s->cfg = *cfg;
    s->cfg.host = NULL;
    s->handler = *handler;
    s->loop = loop;
    s->port = port;
    s->daemon = start_daemon(s, fd);
    if (!s->daemon) {
        close(fd);
        mem_free(s);
        return error_set(err, ST_IO, "libmicrohttpd does not start");
    }
    int epoll_fd = MHD_get_daemon_info(s->daemon, MHD_DAEMON_INFO_EPOLL_FD)->epoll_fd;
    ASSERT(uv_poll_init(loop, &s->poll, epoll_fd) == 0);
    ASSERT(uv_timer_init(loop, &s->timer) == 0);
    s->open_handles = 2;
    s->poll.data = s->timer.data = s;
    uv_poll_start(&s->poll, UV_READABLE, on_poll);
    *out = s;
    return ST_OK;
}

uint16_t http_port(const struct http_server *s)
{
    return s->port;
}

int http_n_answering(const struct http_server *s)
{
    int n = 0;

    for (const struct http_exchange *x = s->exchanges; x; x = x->next)
        n += x->state >= X_WAIT && x->state < X_CLOSED && !x->receiving;
    return n;
}

void http_quiesce(struct http_server *s)
{
    if (s->quiesced)
        return;
    s->quiesced = true;
    MHD_socket fd = MHD_quiesce_daemon(s->daemon);
    if (fd != MHD_INVALID_SOCKET)
        close(fd);
}

void http_destroy(struct http_server *s)
{
    if (!s)
        return;
    http_quiesce(s);
    /* Stopping with a suspended connection is undefined: wake all of them,
     * and let the library run so that they see they are gone. */
    for (struct http_exchange *x = s->exchanges; x; x = x->next)
        if (x->connection)
            http_drop(x);
    s->running = true;
    for (int i = 0; i < MAX_RUNS; i++)
        MHD_run(s->daemon);
    s->stopping = true;
    uv_close((uv_handle_t *)&s->poll, on_handle_closed);
    uv_close((uv_handle_t *)&s->timer, on_handle_closed);
    MHD_stop_daemon(s->daemon);
    s->daemon = NULL;
}
