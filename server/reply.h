#ifndef SERVER_REPLY_H
#define SERVER_REPLY_H

#include "server/api.h"
#include "server/http.h"

/* Answers in OpenAI's error shape, one table of the errors that are not about
 * the body's fields. */

enum refusal {
    REFUSE_LOADING, REFUSE_DRAINING, REFUSE_FAILED, REFUSE_STALLED, REFUSE_QUEUE_FULL,
    REFUSE_SHARE, REFUSE_RATE, REFUSE_KEY, REFUSE_ORIGIN, REFUSE_ROUTE, REFUSE_METHOD,
    REFUSE_MODEL, REFUSE_MEDIA_TYPE, REFUSE_ENGINE, REFUSE_STRUCTURE
};

/* Fill err with the row; message may be NULL for the row's own. */
void refusal_error(struct api_error *err, enum refusal why, const char *message);

/* Send err, with Retry-After and x-should-retry where its status wants them. */
void reply_api_error(struct http_exchange *x, const struct api_error *err);
void reply_refusal(struct http_exchange *x, enum refusal why);

/* For http_handler.error_body. */
void reply_transport_error(void *arg, struct strbuf *out, int status, const char *message);

#endif
