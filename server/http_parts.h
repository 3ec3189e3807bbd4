#ifndef SERVER_HTTP_PARTS_H
#define SERVER_HTTP_PARTS_H

#include "server/http.h"
#include "server/request_head.h"

#include <microhttpd.h>

/* What the files behind http.h share; nobody else includes it.
 *
 *     http.c           the daemon inside the loop, connections, time limits
 *     http_request.c   from a head to a whole body or its refusal
 *     http_exchange.c  suspending, watching the peer, answers */

enum { HTTP_MAX_HEADERS = 8 };

enum exchange_state { X_HEAD, X_BODY, X_WAIT, X_READY, X_SENDING, X_CLOSED };

/* A TCP connection; exchanges follow each other on it. */
struct http_connection {
    struct http_connection *prev, *next;
    struct http_exchange *exchange;        /* NULL between two */
    int fd;                                /* libmicrohttpd's */
    uint64_t since_ns;                     /* opened, or the last exchange ended */
    bool cut;                              /* shut down by us, not seen by the library yet */
};

struct http_exchange {
    struct http_server *server;
    struct http_exchange *prev, *next;
    struct MHD_Connection *connection;     /* NULL once completed */
    enum exchange_state state;
    bool receiving;                        /* the body is not complete */
    bool refused;                          /* what arrives of it is forgotten */
    bool told;                             /* the answer went past the library */
    bool settled;                          /* a round has passed since the request was read */
    bool suspended, gone, streaming, ended, close_after;
    char method[16];
    char *path;
    char request_id[REQUEST_ID_BYTES];
    uint64_t arrival_ns, deadline_ns;      /* of the body; of lingering once told */
    size_t received_bytes;
    struct strbuf body;
    void *owner;

    int status;
    struct { char *name, *value; } headers[HTTP_MAX_HEADERS];
    int n_headers;
    struct MHD_Response *response;         /* from READY to SENDING */
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
    bool running;                          /* inside MHD_run */
    bool has_room;                         /* a connection ended: at the limit the library
                                              listens again only in its next run */
    bool quiesced, stopping;
    size_t bodies_bytes;
    struct http_exchange *exchanges;
    int n_exchanges;
    struct http_connection *connections;
};

/* http.c: have the library look at its connections soon. */
void http_wake(struct http_server *s);
/* Free s if it is stopping and nothing of it is left. */
void http_maybe_free(struct http_server *s);

/* http_request.c: the callbacks of libmicrohttpd. */
enum MHD_Result http_on_access(void *cls, struct MHD_Connection *connection, const char *url,
                               const char *method, const char *version,
                               const char *upload_data, size_t *upload_data_size,
                               void **con_cls);
void http_on_completed(void *cls, struct MHD_Connection *connection, void **con_cls,
                       enum MHD_RequestTerminationCode code);
/* Answer while the body still comes in. */
void http_tell(struct http_exchange *x, int status, const char *message);

/* http_exchange.c */
struct http_exchange *exchange_create(struct http_server *s, struct MHD_Connection *c,
                                      const char *url, const char *method);
/* When neither the library nor the loop knows it any more; else later. */
void exchange_release(struct http_exchange *x);
void exchange_suspend(struct http_exchange *x);
void exchange_unwatch(struct http_exchange *x);
void exchange_reply_error(struct http_exchange *x, int status, const char *message);
enum MHD_Result exchange_queue_response(struct http_exchange *x);

#endif
