#include "server/routes.h"

#include "engine/base/clock.h"
#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "server/access.h"
#include "server/debug_state.h"
#include "server/key_limits.h"
#include "server/metrics.h"
#include "server/openapi.h"
#include "server/page.h"
#include "server/reply.h"
#include "server/request_log.h"
#include "server/service.h"
#include "server/stream.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

enum {
    ROUTE_GET = 1, ROUTE_POST = 2, ROUTE_PUBLIC = 4, ROUTE_PREFIX = 8, ROUTE_ENGINE = 16,
    ROUTE_PROBE = 32,                /* asked every few seconds by machines */
    ROUTE_KEYED = 64                 /* not there where there are no API keys */
};

struct route {
    const char *path;
    unsigned flags;
    void (*answer)(struct service *sv, struct http_exchange *x);
};

/* ---- answers */

static void reply_json(struct http_exchange *x, const char *text)
{
    struct strbuf body = { 0 };

    strbuf_puts(&body, text);
    http_reply(x, 200, "application/json", &body);
}

static void answer_health(struct service *sv, struct http_exchange *x)
{
    struct api_error err;

    if (sv->state == SERVICE_FAILED || service_device_failed(sv)) {
        refusal_error(&err, REFUSE_FAILED, NULL);
        err.http = 503;
        reply_api_error(x, &err);
    } else if (service_stalled(sv)) {
        reply_refusal(x, REFUSE_STALLED);
    } else {
        reply_json(x, "{\"status\":\"ok\"}");
    }
}

/* Says how far the weights are, once that is known; the CPU back end copies none. */
static void reply_loading(struct service *sv, struct http_exchange *x)
{
    uint64_t total = atomic_load(&sv->load_progress.total_bytes);
    uint64_t done = atomic_load(&sv->load_progress.done_bytes);
    struct api_error err;
    char message[128];

    snprintf(message, sizeof message,
             "The model is being loaded: %llu of %llu MB of weights are on the device.",
             (unsigned long long)done >> 20, (unsigned long long)total >> 20);
    refusal_error(&err, REFUSE_LOADING, total ? message : NULL);
    reply_api_error(x, &err);
}

static void answer_ready(struct service *sv, struct http_exchange *x)
{
    switch (sv->state) {
    case SERVICE_READY:   reply_json(x, "{\"status\":\"ready\"}"); break;
    case SERVICE_LOADING: reply_loading(sv, x); break;
    default:              reply_refusal(x, REFUSE_DRAINING); break;
    }
}

static void answer_version(struct service *sv, struct http_exchange *x)
{
    struct strbuf body = { 0 };

    (void)sv;
    strbuf_printf(&body, "{\"version\":\"%s\"}", config_version());
    http_reply(x, 200, "application/json", &body);
}

static void answer_metrics(struct service *sv, struct http_exchange *x)
{
    const struct fleet *f = sv->fleet;
    struct engine_stats *stats = f ? fleet_stats(f) : NULL;
    const char *devices[FLEET_MAX_ENGINES];
    const struct metrics_view view = {
        .model_name = sv->api.model_names[0], .parsing = (uint32_t)sv->n_parsing,
        .streams = sv->n_streams, .version = config_version(), .devices = devices,
        .n_engines = f ? fleet_n_engines(f) : 0, .stats = stats,
        .layers = f ? engine_model(fleet_engine(f, 0))->layers : 0,
        .prefix_cache = sv->cfg->engine.prefix_cache,
    };
    struct strbuf body = { 0 };

    for (uint32_t i = 0; i < view.n_engines; i++)
        devices[i] = engine_device_name(fleet_engine(f, i));
    metrics_print(sv->metrics, &body, &view);
    mem_free(stats);
    http_reply(x, 200, "text/plain; version=0.0.4; charset=utf-8", &body);
}

static void answer_debug_state(struct service *sv, struct http_exchange *x)
{
    struct strbuf body = { 0 };

    debug_state_write(&body, sv);
    http_reply(x, 200, "application/json", &body);
}

static void answer_models(struct service *sv, struct http_exchange *x)
{
    struct strbuf body = { 0 };

    api_write_models(&body, sv->api.model_names, sv->api.n_model_names, sv->created,
                     sv->api.limits.max_model_len, false);
    http_reply(x, 200, "application/json", &body);
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0'
         : c >= 'a' && c <= 'f' ? c - 'a' + 10
         : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* Is the percent-encoded text the name?  Malformed escapes are nobody's name. */
static bool decodes_to(const char *encoded, const char *name)
{
    for (; *encoded; name++) {
        int c = (unsigned char)*encoded++;
        if (c == '%') {
            int high = hex_digit(encoded[0]);
            int low = high < 0 ? -1 : hex_digit(encoded[1]);
            if (low < 0)
                return false;
            c = high * 16 + low;
            encoded += 2;
        }
        if (c == 0 || c != (unsigned char)*name)
            return false;
    }
    return *name == '\0';
}

static void answer_model(struct service *sv, struct http_exchange *x)
{
    const char *wanted = http_path(x) + strlen("/v1/models/");
    struct strbuf body = { 0 };

    for (int i = 0; i < sv->api.n_model_names; i++) {
        if (!decodes_to(wanted, sv->api.model_names[i]))
            continue;
        api_write_models(&body, &sv->api.model_names[i], 1, sv->created,
                         sv->api.limits.max_model_len, true);
        http_reply(x, 200, "application/json", &body);
        return;
    }
    reply_refusal(x, REFUSE_MODEL);
}

static void answer_text(struct service *sv, struct http_exchange *x)
{
    stream_start(sv, x, STREAM_TEXT);
}

static void answer_chat(struct service *sv, struct http_exchange *x)
{
    stream_start(sv, x, STREAM_CHAT);
}

static void answer_tokenize(struct service *sv, struct http_exchange *x)
{
    stream_start(sv, x, STREAM_TOKENIZE);
}

static void answer_detokenize(struct service *sv, struct http_exchange *x)
{
    stream_start(sv, x, STREAM_DETOKENIZE);
}

static void answer_page(struct service *sv, struct http_exchange *x)
{
    (void)sv;
    page_reply(x);
}

static void answer_openapi(struct service *sv, struct http_exchange *x)
{
    (void)sv;
    reply_json(x, openapi_text());
}

static const struct route routes[] = {
    { "/", ROUTE_GET | ROUTE_PUBLIC, answer_page },
    { "/v1/completions", ROUTE_POST | ROUTE_ENGINE, answer_text },
    { "/v1/chat/completions", ROUTE_POST | ROUTE_ENGINE, answer_chat },
    { "/tokenize", ROUTE_POST | ROUTE_ENGINE, answer_tokenize },
    { "/detokenize", ROUTE_POST | ROUTE_ENGINE, answer_detokenize },
    { "/v1/models", ROUTE_GET | ROUTE_ENGINE, answer_models },
    { "/v1/models/", ROUTE_GET | ROUTE_ENGINE | ROUTE_PREFIX, answer_model },
    { "/health", ROUTE_GET | ROUTE_PUBLIC | ROUTE_PROBE, answer_health },
    { "/ready", ROUTE_GET | ROUTE_PUBLIC | ROUTE_PROBE, answer_ready },
    { "/version", ROUTE_GET, answer_version },
    { "/openapi.json", ROUTE_GET, answer_openapi },
    { "/metrics", ROUTE_GET | ROUTE_PROBE, answer_metrics },
    { "/debug/state", ROUTE_GET | ROUTE_KEYED, answer_debug_state },
};

enum { N_ROUTES = sizeof routes / sizeof routes[0] };

bool routes_facts(size_t i, struct route_facts *out)
{
    if (i >= N_ROUTES)
        return false;
    *out = (struct route_facts){ .path = routes[i].path,
                                 .post = routes[i].flags & ROUTE_POST,
                                 .prefix = routes[i].flags & ROUTE_PREFIX,
                                 .is_public = routes[i].flags & ROUTE_PUBLIC };
    return true;
}

static const struct route *find_route(const struct service *sv, const char *path)
{
    unsigned absent = sv->cfg->api_keys.n == 0 ? ROUTE_KEYED : 0;

    for (size_t i = 0; i < N_ROUTES; i++) {
        const struct route *r = &routes[i];
        size_t n = strlen(r->path);
        if (r->flags & absent)
            continue;
        if ((r->flags & ROUTE_PREFIX) ? strncmp(path, r->path, n) == 0 && path[n]
                                      : strcmp(path, r->path) == 0)
            return r;
    }
    return NULL;
}

/* ---- the head */

static bool method_fits(const struct route *r, const char *method)
{
    if (r->flags & ROUTE_POST)
        return strcmp(method, "POST") == 0;
    return strcmp(method, "GET") == 0 || strcmp(method, "HEAD") == 0;
}

static bool is_public(const struct service *sv, const struct route *r)
{
    return r && ((r->flags & ROUTE_PUBLIC) ||
                 (sv->cfg->metrics_public && r->answer == answer_metrics));
}

/* curl -d says form when nobody tells it otherwise; the body decides then. */
static bool media_type_fits(const char *type)
{
    static const char *const fits[] = { "application/json", "application/x-www-form-urlencoded" };

    if (!type)
        return true;
    for (size_t i = 0; i < sizeof fits / sizeof fits[0]; i++) {
        size_t n = strlen(fits[i]);
        if (strncasecmp(type, fits[i], n) == 0 && strchr("; \t", type[n]))
            return true;
    }
    return false;
}

/* Header names with commas and blanks, and nothing that could end a line. */
static bool is_name_list(const char *s)
{
    static const char fits[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_, ";

    return *s && strspn(s, fits) == strlen(s);
}

/* What a browser needs to hear before it lets an allowed page read answers. */
static void add_cors(struct http_exchange *x, const char *origin)
{
    http_add_header(x, "Access-Control-Allow-Origin", origin);
    http_add_header(x, "Access-Control-Expose-Headers", "x-request-id, Retry-After");
    http_add_header(x, "Vary", "Origin");
}

/* The origin is allowed, so it may send what it likes: client libraries add
 * headers of their own. */
static void answer_preflight(struct http_exchange *x)
{
    const char *wanted = http_header(x, "Access-Control-Request-Headers");
    struct strbuf nothing = { 0 };

    http_add_header(x, "Access-Control-Allow-Methods", "GET, POST, OPTIONS");
    http_add_header(x, "Access-Control-Allow-Headers",
                    wanted && is_name_list(wanted) ? wanted : "Authorization, Content-Type");
    http_add_header(x, "Access-Control-Max-Age", "600");
    http_reply(x, 204, "text/plain", &nothing);
}

static bool refuse_by_state(struct service *sv, struct http_exchange *x)
{
    switch (sv->state) {
    case SERVICE_READY:   return false;
    case SERVICE_LOADING: reply_refusal(x, REFUSE_LOADING); return true;
    case SERVICE_FAILED:  reply_refusal(x, REFUSE_FAILED); return true;
    default:              reply_refusal(x, REFUSE_DRAINING); return true;
    }
}

/* Before the body, which then need not be sent. */
static void refuse_by_rate(struct service *sv, struct http_exchange *x, uint32_t key)
{
    struct api_error err;
    uint32_t wait_s = key_limits_take_request(sv->key_limits, key, clock_now_ns());

    if (!wait_s)
        return;
    refusal_error(&err, REFUSE_RATE, NULL);
    err.retry_after_s = wait_s;
    reply_api_error(x, &err);
}

static void on_head(void *arg, struct http_exchange *x)
{
    struct service *sv = arg;
    const struct route *r = find_route(sv, http_path(x));
    const char *method = http_method(x), *origin = http_header(x, "Origin");
    uint32_t key;

    if (access_is_own_page(&sv->cfg->api_keys, origin, http_header(x, "Host")))
        origin = NULL;
    if (!access_origin_ok(&sv->cfg->allowed_origins, origin)) {
        reply_refusal(x, REFUSE_ORIGIN);
        return;
    }
    if (origin)
        add_cors(x, origin);
    if (origin && strcmp(method, "OPTIONS") == 0 &&
        http_header(x, "Access-Control-Request-Method")) {
        answer_preflight(x);
        return;
    }
    if (!access_key_ok(&sv->cfg->api_keys, http_header(x, "Authorization"), &key) &&
        !is_public(sv, r)) {
        reply_refusal(x, REFUSE_KEY);
        return;
    }
    if (!r) {
        reply_refusal(x, REFUSE_ROUTE);
    } else if (!method_fits(r, method)) {
        http_add_header(x, "Allow", (r->flags & ROUTE_POST) ? "POST" : "GET, HEAD");
        reply_refusal(x, REFUSE_METHOD);
    } else if ((r->flags & ROUTE_POST) && !media_type_fits(http_header(x, "Content-Type"))) {
        reply_refusal(x, REFUSE_MEDIA_TYPE);
    } else if ((r->flags & ROUTE_ENGINE) && !refuse_by_state(sv, x)) {
        if (r->flags & ROUTE_POST)
            refuse_by_rate(sv, x, key);
    }
}

static void on_body(void *arg, struct http_exchange *x)
{
    struct service *sv = arg;
    const struct route *r = find_route(sv, http_path(x));

    ASSERT(r);
    /* The state may have changed while the body came in. */
    if ((r->flags & ROUTE_ENGINE) && refuse_by_state(sv, x))
        return;
    r->answer(sv, x);
}

static void on_drained(void *arg, struct http_exchange *x)
{
    (void)arg;
    if (http_owner(x))
        stream_drained(http_owner(x));
}

static void on_half_closed(void *arg, struct http_exchange *x)
{
    (void)arg;
    if (http_owner(x))
        stream_half_closed(http_owner(x));
}

static void on_closed(void *arg, struct http_exchange *x, bool whole)
{
    struct service *sv = arg;
    const struct route *r = find_route(sv, http_path(x));

    metrics_count_http(sv->metrics, r ? r->path : "none", http_status(x),
                       (double)(clock_now_ns() - http_arrival_ns(x)) / 1e9);
    if (http_owner(x))
        stream_closed(http_owner(x), whole);
    else
        request_log(&(struct request_record){
            .id = http_request_id(x), .method = http_method(x), .path = r ? r->path : "none",
            .status = http_status(x), .disconnected = !whole, .arrival_ns = http_arrival_ns(x),
            .probe = r && (r->flags & ROUTE_PROBE) });
    service_note_end(sv);
}

struct http_handler routes_handler(struct service *sv)
{
    return (struct http_handler){
        .arg = sv, .head = on_head, .body = on_body, .drained = on_drained,
        .half_closed = on_half_closed, .closed = on_closed,
        .error_body = reply_transport_error,
    };
}
