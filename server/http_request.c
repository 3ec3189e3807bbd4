#include "server/http_parts.h"

#include "engine/base/clock.h"
#include "engine/base/invariant.h"
#include "engine/base/log.h"
#include "engine/base/mem.h"

#include <string.h>
#include <sys/socket.h>

/* How long a client that was answered early may go on sending.  Closing with
 * its bytes unread would reset the connection, and the reset may overtake the
 * answer. */
static const uint64_t linger_ns = 3000000000u;

static struct http_connection *connection_of(struct MHD_Connection *connection)
{
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);

    return info->socket_context;
}

static const char *reason_of(int status)
{
    return status == 408 ? "Request Timeout" : status == 413 ? "Content Too Large"
                                                             : "Service Unavailable";
}

/* While a body arrives libmicrohttpd takes no response, but nothing of ours
 * is on its way either, so the answer is written past it.  What still comes is
 * forgotten, then the connection is closed. */
void http_tell(struct http_exchange *x, int status, const char *message)
{
    struct strbuf body = { 0 }, answer = { 0 };

    ASSERT(x->receiving && !x->told);
    x->server->handler.error_body(x->server->handler.arg, &body, status, message);
    strbuf_printf(&answer,
                  "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n"
                  "Connection: close\r\nx-request-id: %s\r\n%s\r\n",
                  status, reason_of(status), body.n, x->request_id,
                  status == 503 ? "Retry-After: 5\r\n" : "");
    strbuf_add(&answer, body.data, body.n);
    /* A peer that does not read loses the message: nobody waits for it. */
    if (send(connection_of(x->connection)->fd, answer.data, answer.n,
             MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        log_debug("http", "%s: refusal not delivered", x->request_id);
    x->status = status;
    x->told = x->refused = true;
    x->deadline_ns = clock_now_ns() + linger_ns;
    http_give_body(x->server, &x->body);
    strbuf_fini(&body);
    strbuf_fini(&answer);
}

/* The library's limit of silence; 0: none. */
static void limit_silence(struct http_exchange *x, uint32_t seconds)
{
    MHD_set_connection_option(x->connection, MHD_CONNECTION_OPTION_TIMEOUT, (unsigned)seconds);
}

/* ---- the head */

static enum MHD_Result note_header(void *cls, enum MHD_ValueKind kind, const char *name,
                                   const char *value)
{
    (void)kind;
    request_head_note(cls, name, value);
    return MHD_YES;
}

/* Refuse and close; nothing after this head can be trusted to be a body. */
static enum MHD_Result refuse_head(struct http_exchange *x, int status, const char *why)
{
    x->receiving = false;
    x->close_after = true;
    exchange_reply_error(x, status, why);
    return exchange_queue_response(x);
}

/* A head folded over two lines loses or renames a header inside the library.
 * Was it the one that frames the body, the body would be read as the next
 * request: a head that should have one and frames none ends the connection. */
static bool lacks_framing(const struct http_exchange *x, const struct request_head *head)
{
    bool bodiless = strcmp(x->method, "GET") == 0 || strcmp(x->method, "HEAD") == 0 ||
                    strcmp(x->method, "OPTIONS") == 0;

    return !bodiless && !head->n_lengths && !head->n_codings;
}

static enum MHD_Result begin_exchange(struct http_exchange *x, const char *version)
{
    static const char too_large[] = "The request body is larger than this server accepts.";
    struct http_server *s = x->server;
    struct request_head head = { 0 };
    const char *why;

    MHD_get_connection_values(x->connection, MHD_HEADER_KIND, note_header, &head);
    int status = request_head_check(&head, x->path, version, &why);
    if (status)
        return refuse_head(x, status, why);
    x->close_after = lacks_framing(x, &head);
    bool too_long = head.content_length > s->cfg.max_body_bytes;
    /* Who asks first has sent no body and will not if it is told so now. */
    if (too_long && head.expects)
        return refuse_head(x, 413, too_large);
    x->receiving = true;
    if (head.chunked || head.content_length > 0)
        limit_silence(x, 0);    /* http_sweep() answers before it cuts */
    x->deadline_ns = x->arrival_ns + (uint64_t)s->cfg.body_timeout_s * 1000000000u;
    if (too_long) {
        http_tell(x, 413, too_large);
        return MHD_YES;
    }
    s->handler.head(s->handler.arg, x);
    if (x->state == X_HEAD) {
        x->state = X_BODY;
        return MHD_YES;
    }
    x->refused = true;
    if (!head.expects)
        return MHD_YES;
    x->receiving = false;
    limit_silence(x, s->cfg.idle_timeout_s);
    return exchange_queue_response(x);
}

/* ---- the body */

static void collect(struct http_exchange *x, const char *data, size_t n)
{
    struct http_server *s = x->server;

    if (x->told)
        return;
    if (n > s->cfg.max_body_bytes - x->received_bytes) {
        http_tell(x, 413, "The request body is larger than this server accepts.");
        return;
    }
    x->received_bytes += n;
    if (x->refused)
        return;
    if (n > s->cfg.max_bodies_bytes - s->bodies_bytes) {
        http_tell(x, 503, "The server is receiving too many large requests; try later.");
        return;
    }
    strbuf_add(&x->body, data, n);
    s->bodies_bytes += n;
}

enum MHD_Result http_on_access(void *cls, struct MHD_Connection *connection, const char *url,
                               const char *method, const char *version,
                               const char *upload_data, size_t *upload_data_size,
                               void **con_cls)
{
    struct http_server *s = cls;
    struct http_exchange *x = *con_cls;

    if (!x) {
        x = *con_cls = exchange_create(s, connection, url, method);
        connection_of(connection)->exchange = x;
        return begin_exchange(x, version);
    }
    if (x->gone)
        return MHD_NO;
    if (*upload_data_size > 0) {
        collect(x, upload_data, *upload_data_size);
        *upload_data_size = 0;
        return MHD_YES;
    }
    if (x->receiving)
        limit_silence(x, s->cfg.idle_timeout_s);
    x->receiving = false;
    if (x->told)
        return MHD_NO;    /* answered and received to the end: close */
    if (x->state == X_BODY) {
        x->state = X_WAIT;
        s->handler.body(s->handler.arg, x);
    }
    if (x->gone)
        return MHD_NO;
    if (x->state == X_READY)
        return exchange_queue_response(x);
    ASSERT(x->state == X_WAIT);
    /* A connection that is suspended in the round in which its request was
     * read is read from again when it resumes, and a client that has stopped
     * sending would then count as gone.  The next round comes at once. */
    if (x->settled)
        exchange_suspend(x);
    x->settled = true;
    return MHD_YES;
}

void http_on_completed(void *cls, struct MHD_Connection *connection, void **con_cls,
                       enum MHD_RequestTerminationCode code)
{
    struct http_server *s = cls;
    struct http_exchange *x = *con_cls;
    struct http_connection *c = connection_of(connection);

    *con_cls = NULL;
    if (!x)
        return;
    ASSERT(!x->suspended);
    c->exchange = NULL;
    c->since_ns = clock_now_ns();
    x->state = X_CLOSED;
    s->handler.closed(s->handler.arg, x, x->told || code == MHD_REQUEST_TERMINATED_COMPLETED_OK);
    if (x->response) {
        MHD_destroy_response(x->response);
        x->response = NULL;
    }
    x->connection = NULL;
    exchange_unwatch(x);
    exchange_release(x);
}
