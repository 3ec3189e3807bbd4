#include "server/http_parts.h"

#include "engine/base/clock.h"
#include "engine/base/invariant.h"
#include "engine/base/log.h"
#include "engine/base/mem.h"

#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

/* ---- life */

struct http_exchange *exchange_create(struct http_server *s, struct MHD_Connection *c,
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

void exchange_release(struct http_exchange *x)
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
    http_maybe_free(s);
}

/* ---- watching the peer */

static void on_watch_closed(uv_handle_t *handle)
{
    struct http_exchange *x = handle->data;

    close(x->watch_fd);
    x->watch_fd = -1;
    x->watch_open = false;
    exchange_release(x);
}

void exchange_unwatch(struct http_exchange *x)
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

static void resume(struct http_exchange *x)
{
    if (!x->suspended)
        return;
    x->suspended = false;
    MHD_resume_connection(x->connection);
    http_wake(x->server);
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

void exchange_suspend(struct http_exchange *x)
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
    exchange_suspend(x);
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
    ASSERT(x->n_headers < HTTP_MAX_HEADERS);
    x->headers[x->n_headers].name = mem_strdup(name);
    x->headers[x->n_headers].value = mem_strdup(value);
    x->n_headers++;
}

void exchange_reply_error(struct http_exchange *x, int status, const char *message)
{
    struct strbuf body = { 0 };

    x->server->handler.error_body(x->server->handler.arg, &body, status, message);
    http_reply(x, status, "application/json", &body);
}

enum MHD_Result exchange_queue_response(struct http_exchange *x)
{
    ASSERT(x->state == X_READY && x->response);
    x->state = X_SENDING;
    enum MHD_Result ok = MHD_queue_response(x->connection, (unsigned)x->status, x->response);
    MHD_destroy_response(x->response);
    x->response = NULL;
    return ok;
}

/* ---- small accessors */

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
