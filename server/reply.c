#include "server/reply.h"

#include <stdio.h>
#include <string.h>

static const char invalid[] = "invalid_request_error", server_error[] = "server_error";

static const struct row {
    int http;
    const char *type, *code, *message;
} rows[] = {
    [REFUSE_LOADING] = { 503, server_error, "loading", "The model is being loaded." },
    [REFUSE_DRAINING] = { 503, server_error, "shutting_down", "The server is shutting down." },
    [REFUSE_FAILED] = { 500, server_error, "engine_failed",
                        "The device failed and the server is about to restart." },
    [REFUSE_STALLED] = { 503, server_error, "engine_stalled",
                         "The engine has work but makes no progress." },
    [REFUSE_QUEUE_FULL] = { 429, "rate_limit_error", "rate_limit_exceeded",
                            "The waiting room is full; try again later." },
    [REFUSE_SHARE] = { 429, "rate_limit_error", "key_queue_full",
                       "This key's share of the waiting room is full; try again later." },
    [REFUSE_RATE] = { 429, "rate_limit_error", "rate_limit_exceeded",
                      "This key has made all its requests for now; see Retry-After." },
    [REFUSE_KEY] = { 401, "authentication_error", "invalid_api_key",
                     "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'." },
    [REFUSE_ORIGIN] = { 403, "permission_error", "origin_not_allowed",
                        "Pages of this origin may not use the server (allowed-origins)." },
    [REFUSE_ROUTE] = { 404, "not_found_error", "not_found", "There is nothing at this path." },
    [REFUSE_METHOD] = { 405, invalid, "method_not_allowed",
                        "This path does not take this method; see the Allow header." },
    [REFUSE_MODEL] = { 404, "not_found_error", "model_not_found",
                       "The model does not exist; GET /v1/models lists those that do." },
    [REFUSE_MEDIA_TYPE] = { 415, invalid, "unsupported_media_type",
                            "The body must be JSON (Content-Type: application/json)." },
    [REFUSE_STRUCTURE] = { 400, invalid, NULL, "The structure cannot be followed any further." },
    [REFUSE_ENGINE] = { 500, server_error, "engine_error", "The engine could not finish." },
};

void refusal_error(struct api_error *err, enum refusal why, const char *message)
{
    const struct row *row = &rows[why];

    *err = (struct api_error){ .http = row->http, .type = row->type, .code = row->code };
    snprintf(err->message, sizeof err->message, "%s", message ? message : row->message);
}

void reply_api_error(struct http_exchange *x, const struct api_error *err)
{
    struct strbuf body = { 0 };

    uint32_t usual_s = err->http == 429 ? 2 : err->http == 503 ? 5 : 0;
    char seconds[16];

    if (usual_s) {
        snprintf(seconds, sizeof seconds, "%u", err->retry_after_s ? err->retry_after_s : usual_s);
        http_add_header(x, "Retry-After", seconds);
    }
    /* Clients repeat what fails with 5xx; after a device failure that would
     * run everything three times. */
    if (err->http == 500)
        http_add_header(x, "x-should-retry", "false");
    if (err->http == 401)
        http_add_header(x, "WWW-Authenticate", "Bearer");
    api_write_error(&body, err);
    http_reply(x, err->http, "application/json", &body);
}

void reply_refusal(struct http_exchange *x, enum refusal why)
{
    struct api_error err;

    refusal_error(&err, why, NULL);
    reply_api_error(x, &err);
}

void reply_transport_error(void *arg, struct strbuf *out, int status, const char *message)
{
    struct api_error err = { .http = status, .type = status >= 500 ? server_error : invalid };

    (void)arg;
    snprintf(err.message, sizeof err.message, "%s", message);
    api_write_error(out, &err);
}
