#include "server/http.h"

#include "engine/base/clock.h"
#include "engine/base/invariant.h"
#include "engine/base/log.h"
#include "engine/base/mem.h"
#include "server/listen.h"
#include "server/request_head.h"

#include <fcntl.h>
#include <microhttpd.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    /* libmicrohttpd's memory for one connection's head.  Four times what
     * request_head.h accepts, so that nearly every oversized head is refused
     * by us, in JSON; past it the library answers with HTML of its own. */
    CONNECTION_MEMORY_BYTES = 64 * 1024,
    /* A refused request's body up to this size is read and forgotten, which
     * keeps the connection usable; a longer one is cut off. */
    SMALL_BODY_BYTES = 64 * 1024,
    MAX_RUNS = 8,
    MAX_HEADERS = 8
};

enum exchange_state { X_HEAD, X_BODY, X_WAIT, X_READY, X_SENDING, X_CLOSED };

struct http_exchange {
    struct http_server *server;
    struct http_exchange *prev, *next;
    struct MHD_Connection *connection;     /* NULL once completed */
    enum exchange_state state;
    bool suspended, gone, refused, streaming, ended, close_after;
    char method[16];
    char *path;
    char request_id[REQUEST_ID_BYTES];
    uint64_t arrival_ns;
    struct strbuf body;
    void *owner;

    int status;
    struct { char *name, *value; } headers[MAX_HEADERS];
    int n_headers;
    struct MHD_Response *response;         /* between READY and SENDING */
    struct strbuf out;                     /* of a stream, from out_taken on */
    size_t out_taken;

    int watch_fd;                          /* -1: none */
    bool watch_open;                       /* the handle exists and is not closed yet */
    uv_poll_t watch;
};

struct http_server {
    struct http_config cfg;
    struct http_handler handler;
    struct MHD_Daemon *daemon;
    uv_loop_t *loop;
    uv_poll_t poll;
    uv_timer_t timer;
    int open_handles;
    uint16_t port;
    bool running, quiesced, stopping;
    size_t bodies_bytes;
    struct http_exchange *exchanges;
    int n_exchanges;
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
        MHD_run(s->daemon);
        s->running = false;
        if (MHD_get_timeout(s->daemon, &ms) != MHD_YES) {
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

/* ---- suspending */

static void resume(struct http_exchange *x)
{
    if (!x->suspended)
        return;
    x->suspended = false;
    MHD_resume_connection(x->connection);
    /* Without a thread of its own the library has no way to wake up for this.
     * Inside MHD_run the timeout of 0 that follows does it. */
    if (!x->server->running)
        uv_timer_start(&x->server->timer, on_timer, 0, 0);
}

static void on_watch_closed(uv_handle_t *handle);

static void exchange_release(struct http_exchange *x)
{
    struct http_server *s = x->server;

    if (x->connection || x->watch_open)
        return;
    ASSERT(!x->response);
    if (x->prev)
        x->prev->next = x->next;
    else
        s->exchanges = x->next;
    if (x->next)
        x->next->prev = x->prev;
    s->n_exchanges--;
    for (int i = 0; i < x->n_headers; i++) {
        mem_free(x->headers[i].name);
        mem_free(x->headers[i].value);
    }
    http_give_body(s, &x->body);
    strbuf_fini(&x->out);
    mem_free(x->path);
    mem_free(x);
    if (s->stopping && !s->open_handles && !s->n_exchanges)
        mem_free(s);
}

static void on_watch_closed(uv_handle_t *handle)
{
    struct http_exchange *x = handle->data;

    close(x->watch_fd);
    x->watch_fd = -1;
    x->watch_open = false;
    exchange_release(x);
}

static void watch_stop(struct http_exchange *x)
{
    if (x->watch_open && !uv_is_closing((uv_handle_t *)&x->watch))
        uv_close((uv_handle_t *)&x->watch, on_watch_closed);
}

bool http_peer_is_dead(const struct http_exchange *x)
{
    struct pollfd p = { .fd = x->watch_fd, .events = POLLIN };

    return x->gone ||
           (x->watch_fd >= 0 && poll(&p, 1, 0) > 0 && (p.revents & (POLLHUP | POLLERR)));
}

void http_drop(struct http_exchange *x)
{
    x->gone = true;
    resume(x);
}

/* The event is level-triggered and would fire for ever, so it is watched once. */
static void on_watch(uv_poll_t *watch, int status, int events)
{
    struct http_exchange *x = watch->data;

    (void)events;
    uv_poll_stop(watch);
    if (!x->connection || x->gone)
        return;
    if (status < 0 || http_peer_is_dead(x))
        http_drop(x);
    else if (x->state == X_WAIT || x->streaming)
        x->server->handler.half_closed(x->server->handler.arg, x);
}

/* A suspended connection notices nothing, and libmicrohttpd has the socket in
 * an epoll set of its own; hence the duplicate. */
static void watch_start(struct http_exchange *x)
{
    const union MHD_ConnectionInfo *info;

    if (x->watch_fd >= 0 || x->watch_open)
        return;
    info = MHD_get_connection_info(x->connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    ASSERT(info);
    x->watch_fd = fcntl(info->connect_fd, F_DUPFD_CLOEXEC, 0);
    if (x->watch_fd < 0) {
        log_warn("http", "%s: no descriptor left to watch the client", x->request_id);
        return;
    }
    if (uv_poll_init(x->server->loop, &x->watch, x->watch_fd) != 0) {
        close(x->watch_fd);
        x->watch_fd = -1;
        return;
    }
    x->watch.data = x;
    x->watch_open = true;
    uv_poll_start(&x->watch, UV_DISCONNECT, on_watch);
}

static void suspend(struct http_exchange *x)
{
    ASSERT(!x->suspended && !x->gone);
    watch_start(x);
    x->suspended = true;
    MHD_suspend_connection(x->connection);
}

/* ---- answers */

static ssize_t read_stream(void *cls, uint64_t pos, char *buf, size_t max)
{
    struct http_exchange *x = cls;
    struct http_server *s = x->server;

    (void)pos;
    if (!x->gone && !x->ended && x->out_taken == x->out.n)
        s->handler.drained(s->handler.arg, x);
    if (x->gone)
        return MHD_CONTENT_READER_END_WITH_ERROR;
    size_t n = x->out.n - x->out_taken;
    if (n > 0) {
        n = n < max ? n : max;
        memcpy(buf, x->out.data + x->out_taken, n);
        x->out_taken += n;
        if (x->out_taken == x->out.n) {
            strbuf_clear(&x->out);
            x->out_taken = 0;
        }
        return (ssize_t)n;
    }
    if (x->ended)
        return MHD_CONTENT_READER_END_OF_STREAM;
    suspend(x);
    return 0;
}

static void add_headers(struct http_exchange *x, const char *content_type)
{
    MHD_add_response_header(x->response, "Content-Type", content_type);
    MHD_add_response_header(x->response, "x-request-id", x->request_id);
    for (int i = 0; i < x->n_headers; i++)
        MHD_add_response_header(x->response, x->headers[i].name, x->headers[i].value);
    if (x->close_after || x->server->quiesced)
        MHD_add_response_header(x->response, "Connection", "close");
}

static void make_ready(struct http_exchange *x, int status, const char *content_type)
{
    ASSERT(x->response && x->state <= X_WAIT);
    x->status = status;
    add_headers(x, content_type);
    if (x->state == X_WAIT)
        resume(x);
    x->state = X_READY;
}

void http_reply(struct http_exchange *x, int status, const char *content_type,
                struct strbuf *body)
{
    ASSERT(!x->response && x->connection);
    if (body->data)
        x->response = MHD_create_response_from_buffer_with_free_callback(body->n, body->data,
                                                                         mem_free);
    else
        x->response = MHD_create_response_from_buffer(0, NULL, MHD_RESPMEM_PERSISTENT);
    *body = (struct strbuf){ 0 };
    make_ready(x, status, content_type);
}

void http_stream_begin(struct http_exchange *x)
{
    ASSERT(!x->response && x->connection);
    x->streaming = true;
    x->response = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 16 * 1024, read_stream, x,
                                                    NULL);
    http_add_header(x, "Cache-Control", "no-cache");
    http_add_header(x, "X-Accel-Buffering", "no");
    make_ready(x, 200, "text/event-stream; charset=utf-8");
}

void http_stream_write(struct http_exchange *x, const char *data, size_t n)
{
    ASSERT(x->streaming && !x->ended);
    strbuf_add(&x->out, data, n);
    resume(x);
}

void http_stream_end(struct http_exchange *x)
{
    ASSERT(x->streaming && !x->ended);
    x->ended = true;
    resume(x);
}

size_t http_stream_pending_bytes(const struct http_exchange *x)
{
    return x->out.n - x->out_taken;
}

void http_add_header(struct http_exchange *x, const char *name, const char *value)
{
    ASSERT(x->n_headers < MAX_HEADERS);
    x->headers[x->n_headers].name = mem_strdup(name);
    x->headers[x->n_headers].value = mem_strdup(value);
    x->n_headers++;
}

static void reply_error(struct http_exchange *x, int status, const char *message)
{
    struct strbuf body = { 0 };

    x->server->handler.error_body(x->server->handler.arg, &body, status, message);
    http_reply(x, status, "application/json", &body);
}

static enum MHD_Result queue_response(struct http_exchange *x)
{
    ASSERT(x->state == X_READY && x->response);
    x->state = X_SENDING;
    enum MHD_Result ok = MHD_queue_response(x->connection, (unsigned)x->status, x->response);
    MHD_destroy_response(x->response);
    x->response = NULL;
    return ok;
}

/* While a body arrives libmicrohttpd takes no response, but nothing of ours
 * is on its way either, so the answer is written past it and the connection
 * closed.  A peer that reads gets a proper error instead of a reset. */
static enum MHD_Result refuse_mid_body(struct http_exchange *x, int status, const char *reason,
                                       const char *message)
{
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(x->connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    struct strbuf body = { 0 }, answer = { 0 };

    x->server->handler.error_body(x->server->handler.arg, &body, status, message);
    strbuf_printf(&answer,
                  "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n"
                  "Connection: close\r\nx-request-id: %s\r\n%s\r\n",
                  status, reason, body.n, x->request_id,
                  status == 503 ? "Retry-After: 5\r\n" : "");
    strbuf_add(&answer, body.data, body.n);
    /* A peer that does not read loses the message: nobody waits for it. */
    if (send(info->connect_fd, answer.data, answer.n, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        log_debug("http", "%s: refusal not delivered", x->request_id);
    x->status = status;
    x->gone = true;
    strbuf_fini(&body);
    strbuf_fini(&answer);
    return MHD_NO;
}

/* ---- requests */

static struct http_exchange *exchange_create(struct http_server *s, struct MHD_Connection *c,
                                             const char *url, const char *method)
{
    struct http_exchange *x = mem_calloc(1, sizeof *x);
    size_t n = strlen(method);

    x->server = s;
    x->connection = c;
    x->watch_fd = -1;
    x->arrival_ns = clock_now_ns();
    x->path = mem_strdup(url);
    memcpy(x->method, method, n < sizeof x->method ? n : sizeof x->method - 1);
    request_id_choose(x->request_id, MHD_lookup_connection_value(c, MHD_HEADER_KIND,
                                                                 "x-request-id"));
    x->next = s->exchanges;
    if (x->next)
        x->next->prev = x;
    s->exchanges = x;
    s->n_exchanges++;
    return x;
}

static enum MHD_Result note_header(void *cls, enum MHD_ValueKind kind, const char *name,
                                   const char *value)
{
    (void)kind;
    request_head_note(cls, name, value);
    return MHD_YES;
}

static enum MHD_Result begin_exchange(struct http_exchange *x, const char *version)
{
    struct http_server *s = x->server;
    struct request_head head = { 0 };
    const char *why;

    MHD_get_connection_values(x->connection, MHD_HEADER_KIND, note_header, &head);
    int status = request_head_check(&head, x->path, version, &why);
    if (!status && head.content_length > s->cfg.max_body_bytes) {
        status = 413;
        why = "The request body is larger than this server accepts.";
    }
    if (status) {
        x->close_after = true;
        reply_error(x, status, why);
        return queue_response(x);
    }
    s->handler.head(s->handler.arg, x);
    if (x->state == X_HEAD) {
        x->state = X_BODY;
        return MHD_YES;
    }
    x->refused = true;
    if (head.chunked || head.content_length > SMALL_BODY_BYTES)
        return queue_response(x);
    return MHD_YES;
}

static enum MHD_Result collect(struct http_exchange *x, const char *data, size_t n)
{
    struct http_server *s = x->server;

    if (x->refused)
        return MHD_YES;
    if (n > s->cfg.max_body_bytes - x->body.n)
        return refuse_mid_body(x, 413, "Content Too Large",
                               "The request body is larger than this server accepts.");
    if (n > s->cfg.max_bodies_bytes - s->bodies_bytes)
        return refuse_mid_body(x, 503, "Service Unavailable",
                               "The server is receiving too many large requests; try later.");
    if (clock_now_ns() - x->arrival_ns > (uint64_t)s->cfg.body_timeout_s * 1000000000u) {
        log_info("http", "%s: body not complete after %u s", x->request_id,
                 s->cfg.body_timeout_s);
        x->gone = true;
        return MHD_NO;
    }
    strbuf_add(&x->body, data, n);
    s->bodies_bytes += n;
    return MHD_YES;
}

static enum MHD_Result on_access(void *cls, struct MHD_Connection *connection, const char *url,
                                 const char *method, const char *version,
                                 const char *upload_data, size_t *upload_data_size,
                                 void **con_cls)
{
    struct http_server *s = cls;
    struct http_exchange *x = *con_cls;

    if (!x) {
        x = *con_cls = exchange_create(s, connection, url, method);
        return begin_exchange(x, version);
    }
    if (x->gone)
        return MHD_NO;
    if (*upload_data_size > 0) {
        size_t n = *upload_data_size;
        *upload_data_size = 0;
        return collect(x, upload_data, n);
    }
    if (x->state == X_BODY) {
        x->state = X_WAIT;
        s->handler.body(s->handler.arg, x);
    }
    if (x->gone)
        return MHD_NO;
    if (x->state == X_READY)
        return queue_response(x);
    ASSERT(x->state == X_WAIT);
    suspend(x);
    return MHD_YES;
}

static void on_completed(void *cls, struct MHD_Connection *connection, void **con_cls,
                         enum MHD_RequestTerminationCode code)
{
    struct http_server *s = cls;
    struct http_exchange *x = *con_cls;

    (void)connection;
    *con_cls = NULL;
    if (!x)
        return;
    ASSERT(!x->suspended);
    x->state = X_CLOSED;
    s->handler.closed(s->handler.arg, x, code == MHD_REQUEST_TERMINATED_COMPLETED_OK);
    if (x->response) {
        MHD_destroy_response(x->response);
        x->response = NULL;
    }
    x->connection = NULL;
    watch_stop(x);
    exchange_release(x);
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
    log_debug("mhd", "%s", text);
}

static void on_handle_closed(uv_handle_t *handle)
{
    struct http_server *s = handle->data;

    s->open_handles--;
    if (s->stopping && !s->open_handles && !s->n_exchanges)
        mem_free(s);
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
    s->daemon = MHD_start_daemon(
        MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, port, NULL, NULL,
        on_access, s, MHD_OPTION_EXTERNAL_LOGGER, log_library, NULL,
        MHD_OPTION_LISTEN_SOCKET, (MHD_socket)fd,
        MHD_OPTION_NOTIFY_COMPLETED, on_completed, s,
        MHD_OPTION_UNESCAPE_CALLBACK, keep_escapes, NULL,
        MHD_OPTION_CONNECTION_LIMIT, (unsigned)cfg->max_connections,
        MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)cfg->idle_timeout_s,
        MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)CONNECTION_MEMORY_BYTES,
        MHD_OPTION_END);
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

/* ---- small accessors */

int http_n_answering(const struct http_server *s)
{
    int n = 0;

    for (const struct http_exchange *x = s->exchanges; x; x = x->next)
        n += x->state >= X_WAIT && x->state < X_CLOSED;
    return n;
}

const char *http_method(const struct http_exchange *x)
{
    return x->method;
}

const char *http_path(const struct http_exchange *x)
{
    return x->path;
}

const char *http_header(struct http_exchange *x, const char *name)
{
    return MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, name);
}

const char *http_request_id(const struct http_exchange *x)
{
    return x->request_id;
}

uint64_t http_arrival_ns(const struct http_exchange *x)
{
    return x->arrival_ns;
}

int http_status(const struct http_exchange *x)
{
    return x->status;
}

struct strbuf http_take_body(struct http_exchange *x)
{
    struct strbuf body = x->body;

    x->body = (struct strbuf){ 0 };
    return body;
}

void http_give_body(struct http_server *s, struct strbuf *body)
{
    ASSERT(s->bodies_bytes >= body->n);
    s->bodies_bytes -= body->n;
    strbuf_fini(body);
}

void http_set_owner(struct http_exchange *x, void *owner)
{
    x->owner = owner;
}

void *http_owner(const struct http_exchange *x)
{
    return x->owner;
}
