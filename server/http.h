#ifndef SERVER_HTTP_H
#define SERVER_HTTP_H

#include "engine/base/status.h"
#include "engine/base/strbuf.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <uv.h>

/* HTTP/1.1 on the loop thread: libmicrohttpd driven by libuv.
 *
 * An exchange is one request and its answer.
 *
 *     HEAD --> BODY --> WAIT --> READY --> SENDING --> closed
 *                        |                    |
 *                        +--- peer is gone ---+
 *
 *   HEAD     the handler may refuse; otherwise the body is collected
 *   BODY     collected up to max_body_bytes; a longer one is answered with 413,
 *            one that takes longer than body_timeout_s with 408
 *   WAIT     the handler has the whole request and works; the connection is
 *            suspended, so the true status is still open
 *   READY    http_reply or http_stream_begin was called
 *   SENDING  libmicrohttpd sends; a stream with nothing to send is suspended
 *
 * Rules:
 *   1. Everything here runs on the loop thread.
 *   2. Each exchange gets exactly one reply or stream, from head(), body() or
 *      later, unless the transport refuses it by itself, and exactly one
 *      closed(), after which its pointer is dead.
 *   3. A peer that goes away is noticed in every phase, also while suspended,
 *      by a watch on a duplicate of its socket; closed() follows at once.
 *   4. A peer that only stops sending (half-close) looks the same as one that
 *      has gone until something is written to it.  half_closed() decides:
 *      write and go on, or http_drop(). */

struct http_server;
struct http_exchange;

struct http_config {
    const char *host;              /* name or address */
    uint16_t port;                 /* 0: any free one, see http_port() */
    size_t max_body_bytes;
    size_t max_bodies_bytes;       /* of all exchanges together */
    uint32_t max_connections;
    uint32_t idle_timeout_s;       /* from one answer to the end of the next head, and
                                      while sending without progress */
    uint32_t body_timeout_s;       /* a body as a whole */
};

struct http_handler {
    void *arg;
    void (*head)(void *arg, struct http_exchange *x);
    void (*body)(void *arg, struct http_exchange *x);
    /* Everything written to the stream has been taken; more may be written from here. */
    void (*drained)(void *arg, struct http_exchange *x);
    void (*half_closed)(void *arg, struct http_exchange *x);
    /* whole: the answer was handed to the peer's socket to its end. */
    void (*closed)(void *arg, struct http_exchange *x, bool whole);
    /* Fill out with the JSON body of an error that the transport itself found. */
    void (*error_body)(void *arg, struct strbuf *out, int status, const char *message);
};

/* cfg and handler are copied. */
enum status http_create(struct http_server **out, uv_loop_t *loop, const struct http_config *cfg,
                        const struct http_handler *handler, struct error *err) MUST_USE;
uint16_t http_port(const struct http_server *s);

/* Enforce the time limits; to be called every now and then. */
void http_sweep(struct http_server *s, uint64_t now_ns);

/* Exchanges between the end of their body and closed(). */
int http_n_answering(const struct http_server *s);

/* Accept no more connections; open ones close after their current answer. */
void http_quiesce(struct http_server *s);

/* Drop every exchange and connection.  The memory is freed by the loop, once
 * the handles are closed; s is dead for the caller. */
void http_destroy(struct http_server *s);    /* NULL is fine */

/* The request. */
const char *http_method(const struct http_exchange *x);
const char *http_path(const struct http_exchange *x);      /* raw, without the query */
const char *http_header(struct http_exchange *x, const char *name); /* NULL: absent */
const char *http_request_id(const struct http_exchange *x);
uint64_t http_arrival_ns(const struct http_exchange *x);
int http_status(const struct http_exchange *x);            /* 0 before there is an answer */

/* Move the collected body out, in body() or later.  Its bytes count against
 * max_bodies_bytes until they are given back. */
struct strbuf http_take_body(struct http_exchange *x);
void http_give_body(struct http_server *s, struct strbuf *body);

/* Whatever the handler wants to find again; NULL at first. */
void http_set_owner(struct http_exchange *x, void *owner);
void *http_owner(const struct http_exchange *x);

/* A header of the answer, before http_reply or http_stream_begin; both are
 * copied.  At most eight. */
void http_add_header(struct http_exchange *x, const char *name, const char *value);

/* Takes the contents of body. */
void http_reply(struct http_exchange *x, int status, const char *content_type,
                struct strbuf *body);

/* An answer of server-sent events with status 200. */
void http_stream_begin(struct http_exchange *x);
void http_stream_write(struct http_exchange *x, const char *data, size_t n);
void http_stream_end(struct http_exchange *x);
size_t http_stream_pending_bytes(const struct http_exchange *x);

/* True when the peer's socket is dead for sure; asks the kernel. */
bool http_peer_is_dead(const struct http_exchange *x);

/* Cut the connection; closed() follows, not from inside this call. */
void http_drop(struct http_exchange *x);

#endif
