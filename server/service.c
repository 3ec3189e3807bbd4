#include "server/service.h"

#include "engine/base/clock.h"
#include "engine/base/invariant.h"
#include "engine/base/log.h"
#include "engine/base/mem.h"
#include "server/chat_format.h"
#include "server/grammar_cache.h"
#include "server/key_limits.h"
#include "server/listen.h"
#include "server/metrics.h"
#include "server/reply.h"
#include "server/routes.h"
#include "server/stream.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    TICK_MS = 100,
    /* For answers on their way after the last request has been cancelled. */
    LEAVE_NS = 1000000000,
    SPARE_DESCRIPTORS = 64
};

/* What a supervisor sees: 3 asks for a restart, 1 does not get better by one.
 * An end without a drain is not a success either. */
enum { EXIT_CONFIG = 1, EXIT_UNDRAINED = 1, EXIT_DEVICE = 3 };

/* ---- progress */

static uint32_t n_engines(const struct service *sv)
{
    return sv->fleet ? fleet_n_engines(sv->fleet) : 0;
}

/* Movement is noticed when somebody looks: at every tick and for /health. */
static void look(struct service *sv, uint32_t engine, struct engine_stats *stats, uint64_t now_ns)
{
    struct engine_watch *w = &sv->watches[engine];

    engine_stats(fleet_engine(sv->fleet, engine), stats);
    if (stats->busy && stats->steps == w->seen_steps)
        return;
    w->seen_steps = stats->steps;
    w->progress_ns = now_ns;
    w->shrug = false;
}

/* When it has been looked. */
static bool overdue(const struct service *sv, uint32_t engine, uint64_t now_ns)
{
    uint64_t limit_ns = sv->cfg->stall_timeout_ms * 1000000u;

    return limit_ns && now_ns - sv->watches[engine].progress_ns > limit_ns;
}

bool service_engine_stalled(struct service *sv, uint32_t engine)
{
    uint64_t now_ns = clock_now_ns();
    struct engine_stats stats;

    look(sv, engine, &stats, now_ns);
    return overdue(sv, engine, now_ns);
}

bool service_stalled(struct service *sv)
{
    for (uint32_t i = 0; i < n_engines(sv); i++)
        if (service_engine_stalled(sv, i))
            return true;
    return false;
}

bool service_device_failed(const struct service *sv)
{
    struct engine_stats stats;

    for (uint32_t i = 0; i < n_engines(sv); i++) {
        engine_stats(fleet_engine(sv->fleet, i), &stats);
        if (stats.failed)
            return true;
    }
    return false;
}

static void note_progress(struct service *sv, uint64_t now_ns)
{
    struct engine_stats stats;
    bool failed = false;

    for (uint32_t i = 0; i < n_engines(sv); i++) {
        struct engine_watch *w = &sv->watches[i];
        look(sv, i, &stats, now_ns);
        failed |= stats.failed;
        if (!overdue(sv, i, now_ns) || w->shrug)
            continue;
        w->shrug = true;
        log_error("service", "engine %u: no step for %.0f s with %u running and %u waiting "
                  "requests", i, (double)(now_ns - w->progress_ns) / 1e9, stats.running,
                  stats.waiting);
    }
    if (failed)
        service_fail(sv, "the device failed");
}

static void log_summary(struct service *sv, uint64_t now_ns)
{
    const uint64_t interval_ns = 10000000000u;
    double seconds = (double)(now_ns - sv->summary_ns) / 1e9;
    struct engine_stats s;

    if (!sv->fleet || now_ns - sv->summary_ns < interval_ns)
        return;
    for (uint32_t i = 0; i < n_engines(sv); i++) {
        struct engine_watch *w = &sv->watches[i];
        engine_stats(fleet_engine(sv->fleet, i), &s);
        if (s.output_tokens != w->summary_tokens || s.running + s.waiting > 0)
            log_info("service", "engine %u: %u running, %u waiting, %.1f output tokens/s, KV pool "
                     "%.1f %% used, %.1f %% cached", i, s.running, s.waiting,
                     (double)(s.output_tokens - w->summary_tokens) / seconds,
                     100.0 * s.kv_blocks_pinned / (s.kv_blocks ? s.kv_blocks : 1),
                     100.0 * s.kv_blocks_cached / (s.kv_blocks ? s.kv_blocks : 1));
        w->summary_tokens = s.output_tokens;
    }
    sv->summary_ns = now_ns;
}

/* Every engine has moved since the watchdog was fed: while there is work for it by steps, else by
 * turns of its loop. */
static bool all_moved(const struct service *sv, const struct engine_stats *stats)
{
    for (uint32_t i = 0; i < n_engines(sv); i++) {
        const struct engine_watch *w = &sv->watches[i];
        if (stats[i].busy ? stats[i].steps == w->watched_steps
                          : stats[i].turns == w->watched_turns)
            return false;
    }
    return true;
}

static void feed(struct service *sv, const struct engine_stats *stats)
{
    uint32_t running = 0, waiting = 0;
    char line[80];

    for (uint32_t i = 0; i < n_engines(sv); i++) {
        sv->watches[i].watched_steps = stats[i].steps;
        sv->watches[i].watched_turns = stats[i].turns;
        running += stats[i].running;
        waiting += stats[i].waiting;
    }
    snprintf(line, sizeof line, "%u running, %u waiting%s", running, waiting,
             sv->state == SERVICE_READY ? "" : "; stopping");
    notifier_feed(&sv->notifier, line);
}

/* A watchdog that a timer fed would watch the timer.  The turns that feed it are asked for here. */
static void feed_watchdog(struct service *sv, uint64_t now_ns)
{
    const unsigned looks = 4;        /* in one interval */

    if (!sv->fleet || !sv->notifier.watchdog_ns ||
        now_ns - sv->watched_ns < sv->notifier.watchdog_ns / looks)
        return;
    struct engine_stats *stats = fleet_stats(sv->fleet);
    if (all_moved(sv, stats))
        feed(sv, stats);
    mem_free(stats);
    sv->watched_ns = now_ns;
    fleet_poke(sv->fleet);
}

/* ---- leaving */

static void leave(struct service *sv, enum refusal why)
{
    struct api_error err;

    refusal_error(&err, why, NULL);
    sv->state = SERVICE_LEAVING;
    sv->deadline_ns = clock_now_ns() + LEAVE_NS;
    stream_fail_all(sv, &err);
}

void service_note_end(struct service *sv)
{
    if (sv->http && sv->state >= SERVICE_DRAINING && !sv->n_streams && !sv->loading &&
        !http_n_answering(sv->http))
        uv_stop(&sv->loop);
}

void service_fail(struct service *sv, const char *why)
{
    if (sv->state == SERVICE_FAILED || sv->exit_code == EXIT_DEVICE)
        return;
    log_error("service", "%s; ending with exit code %d", why, EXIT_DEVICE);
    sv->exit_code = EXIT_DEVICE;
    sv->state = SERVICE_FAILED;
    /* The engine that failed sends its requests home by itself; this is for those it cannot
     * reach any more, and for the other engines'. */
    sv->deadline_ns = clock_now_ns() + LEAVE_NS;
    notifier_set_state(&sv->notifier, "STOPPING=1\nSTATUS=%s", why);
}

static void drain(struct service *sv)
{
    log_info("service", "draining: %d completions open, %.0f s at most", sv->n_streams,
             (double)sv->cfg->drain_timeout_ms / 1e3);
    notifier_set_state(&sv->notifier, "STOPPING=1\nSTATUS=draining: %d completions open",
                       sv->n_streams);
    sv->state = SERVICE_DRAINING;
    sv->deadline_ns = clock_now_ns() + sv->cfg->drain_timeout_ms * 1000000u;
    http_quiesce(sv->http);
    if (sv->fleet)
        fleet_drain(sv->fleet);
    service_note_end(sv);
}

static void on_signal(uv_signal_t *handle, int number)
{
    struct service *sv = handle->data;

    if (sv->state >= SERVICE_DRAINING) {
        log_warn("service", "second signal (%d): ending at once", number);
        _exit(sv->exit_code ? sv->exit_code : EXIT_UNDRAINED);
    }
    drain(sv);
}

static void on_tick(uv_timer_t *timer)
{
    struct service *sv = timer->data;
    uint64_t now_ns = clock_now_ns();

    note_progress(sv, now_ns);
    feed_watchdog(sv, now_ns);
    notifier_retry(&sv->notifier);
    log_summary(sv, now_ns);
    http_sweep(sv->http, now_ns);
    stream_tick(sv, now_ns);
    if (sv->state < SERVICE_DRAINING)
        return;
    service_note_end(sv);
    if (now_ns < sv->deadline_ns)
        return;
    if (sv->state == SERVICE_LEAVING && !sv->loading)
        uv_stop(&sv->loop);
    else if (sv->state == SERVICE_DRAINING || sv->state == SERVICE_FAILED)
        leave(sv, sv->state == SERVICE_FAILED ? REFUSE_FAILED : REFUSE_DRAINING);
}

/* ---- mail */

static void take_mail(struct service *sv)
{
    struct mail_node *next;

    for (struct mail_node *node = mailbox_drain(sv->mailbox); node; node = next) {
        next = node->next;
        stream_take_message(sv, (struct message *)node);
    }
    stream_send_pending(sv);
}

static void on_wake(uv_async_t *wake)
{
    take_mail(wake->data);
}

static void wake_loop(void *arg)
{
    uv_async_send(&((struct service *)arg)->wake);
}

/* ---- loading */

static void on_load(uv_work_t *work)
{
    struct service *sv = work->data;
    struct engine_config cfg = sv->cfg->engine;

    cfg.progress = &sv->load_progress;
    if (fleet_create(&sv->loaded, &cfg, &sv->cfg->backends, sv->mailbox, &sv->load_error) != ST_OK)
        sv->loaded = NULL;
    else if (chat_format_find(&sv->loaded_chat, sv->cfg->chat_format, cfg.model_dir,
                              engine_tokenizer(fleet_engine(sv->loaded, 0)),
                              &sv->no_chat) != ST_OK)
        sv->loaded_chat = CHAT_NONE;
}

/* A model without chat is no failure: most likely it was never meant to.  Clients are not
 * told of files. */
static void take_chat_format(struct service *sv)
{
    sv->api.chat = sv->loaded_chat;
    sv->api.no_chat = sv->no_chat.code == ST_UNSUPPORTED
                          ? sv->no_chat.text
                          : "its folder's chat template cannot be read";
    if (sv->api.chat != CHAT_NONE)
        log_info("service", "chat format %s", chat_format_facts(sv->api.chat)->name);
    else if (sv->cfg->chat_format == CHAT_NONE)
        log_info("service", "no chat: chat-format is none");
    else
        log_warn("service", "no chat with this model: %s (chat-format)", sv->no_chat.text);
}

static void announce(struct service *sv)
{
    const char *host = sv->cfg->host, *name = sv->api.model_names[0];
    bool brackets = strchr(host, ':') != NULL;
    struct strbuf json_name = { 0 }, devices = { 0 };
    char url[300];

    snprintf(url, sizeof url, "http://%s%s%s:%u", brackets ? "[" : "", host, brackets ? "]" : "",
             http_port(sv->http));
    fleet_write_devices(&devices, sv->fleet);
    log_info("service", "ready: %s serves %s on %s, contexts of up to %u tokens", url, name,
             devices.data, sv->api.limits.max_model_len);
    api_write_string(&json_name, name, strlen(name));
    notifier_set_state(&sv->notifier, "READY=1\nSTATUS=%.80s serves %.120s", url, name);
    printf("ready: %s\n\n"
           "curl -N %s/v1/completions -H 'Content-Type: application/json' \\%s\n"
           "  -d '{\"model\": %s, \"prompt\": \"It was a dark and stormy night\", "
           "\"max_tokens\": 64, \"stream\": true}'\n", url, url,
           sv->cfg->api_keys.n ? "\n  -H \"Authorization: Bearer $KEY\" \\" : "", json_name.data);
    fflush(stdout);
    strbuf_fini(&json_name);
    strbuf_fini(&devices);
}

static void on_loaded(uv_work_t *work, int status)
{
    struct service *sv = work->data;

    ASSERT(status == 0);
    sv->loading = false;
    sv->fleet = sv->loaded;
    if (!sv->fleet) {
        log_error("service", "cannot serve %s: %s", sv->cfg->engine.model_dir,
                  sv->load_error.text);
        sv->exit_code = EXIT_CONFIG;
        sv->state = SERVICE_LEAVING;
        service_note_end(sv);
        return;
    }
    /* The same model in all of them. */
    sv->api.tokenizer = engine_tokenizer(fleet_engine(sv->fleet, 0));
    sv->api.model = engine_model(fleet_engine(sv->fleet, 0));
    sv->api.limits.max_model_len = fleet_max_model_len(sv->fleet);
    if (sv->state != SERVICE_LOADING) {
        service_note_end(sv);
        return;
    }
    sv->state = SERVICE_READY;
    for (uint32_t i = 0; i < n_engines(sv); i++)
        sv->watches[i].progress_ns = clock_now_ns();
    take_chat_format(sv);
    announce(sv);
}

/* ---- start and end */

static enum status start_http(struct service *sv, struct error *err)
{
    const struct config *cfg = sv->cfg;
    const struct http_handler handler = routes_handler(sv);
    /* A connection that waits for the engine takes two descriptors. */
    uint32_t descriptors = listen_raise_descriptors();
    uint32_t most = descriptors > SPARE_DESCRIPTORS ? (descriptors - SPARE_DESCRIPTORS) / 2 : 1;
    struct http_config http = {
        .host = cfg->host, .port = (uint16_t)cfg->port,
        .max_body_bytes = cfg->max_body_bytes, .max_bodies_bytes = cfg->max_bodies_bytes,
        .max_connections = cfg->max_connections < most ? cfg->max_connections : most,
        .idle_timeout_s = (uint32_t)((cfg->idle_timeout_ms + 999) / 1000),
        .body_timeout_s = (uint32_t)((cfg->body_timeout_ms + 999) / 1000),
    };

    if (http.max_connections < cfg->max_connections)
        log_warn("http", "%u descriptors allow %u connections, not %u", descriptors,
                 http.max_connections, cfg->max_connections);
    TRY(http_create(&sv->http, &sv->loop, &http, &handler, err));
    log_info("http", "listening on %s port %u", cfg->host, http_port(sv->http));
    return ST_OK;
}

static void start_handles(struct service *sv)
{
    ASSERT(uv_loop_init(&sv->loop) == 0);
    ASSERT(uv_async_init(&sv->loop, &sv->wake, on_wake) == 0);
    ASSERT(uv_timer_init(&sv->loop, &sv->tick) == 0);
    ASSERT(uv_signal_init(&sv->loop, &sv->sigterm) == 0);
    ASSERT(uv_signal_init(&sv->loop, &sv->sigint) == 0);
    sv->wake.data = sv->tick.data = sv->sigterm.data = sv->sigint.data = sv;
    uv_timer_start(&sv->tick, on_tick, TICK_MS, TICK_MS);
    uv_signal_start(&sv->sigterm, on_signal, SIGTERM);
    uv_signal_start(&sv->sigint, on_signal, SIGINT);
    sv->mailbox = mailbox_create(wake_loop, sv);
}

/* Backwards: bodies with the pool, connections, the engines.  Their last mail is read with the
 * tokenizer of one of them. */
static void stop(struct service *sv)
{
    if (sv->state < SERVICE_DRAINING)
        sv->state = SERVICE_LEAVING;
    while (sv->n_parsing > 0)
        uv_run(&sv->loop, UV_RUN_ONCE);
    http_destroy(sv->http);
    sv->http = NULL;
    if (sv->fleet)
        fleet_stop(sv->fleet);
    take_mail(sv);
    ASSERT(sv->n_streams == 0);
    fleet_destroy(sv->fleet);
    uv_close((uv_handle_t *)&sv->wake, NULL);
    uv_close((uv_handle_t *)&sv->tick, NULL);
    uv_close((uv_handle_t *)&sv->sigterm, NULL);
    uv_close((uv_handle_t *)&sv->sigint, NULL);
    while (uv_run(&sv->loop, UV_RUN_DEFAULT) != 0)
        continue;
    ASSERT(uv_loop_close(&sv->loop) == 0);
    mailbox_destroy(sv->mailbox);
    metrics_destroy(sv->metrics);
    grammar_cache_destroy(sv->api.grammars);
    key_limits_destroy(sv->key_limits);
}

int service_run(const struct config *cfg, char **env)
{
    struct service *sv = mem_calloc(1, sizeof *sv);
    struct error err;

    pthread_setname_np(pthread_self(), "loop");
    signal(SIGPIPE, SIG_IGN);
    sv->cfg = cfg;
    sv->created = (int64_t)time(NULL);
    sv->metrics = metrics_create();
    sv->key_limits = key_limits_create((uint32_t)cfg->api_keys.n, cfg->key_requests_per_minute,
                                       cfg->cache_per_key);
    sv->api = (struct api_context){ .model_names = (const char *const *)cfg->model_names.items,
                                    .n_model_names = cfg->model_names.n, .limits = cfg->limits };
    sv->api.grammars = grammar_cache_create();
    start_handles(sv);
    sv->summary_ns = clock_now_ns();
    if (notifier_open(&sv->notifier, env, &err) != ST_OK || start_http(sv, &err) != ST_OK) {
        log_error("service", "%s", err.text);
        sv->exit_code = EXIT_CONFIG;
    } else {
        notifier_set_state(&sv->notifier, "STATUS=loading %.200s", cfg->engine.model_dir);
        sv->loading = true;
        sv->load.data = sv;
        ASSERT(uv_queue_work(&sv->loop, &sv->load, on_load, on_loaded) == 0);
        uv_run(&sv->loop, UV_RUN_DEFAULT);
    }
    stop(sv);
    int code = sv->exit_code;
    notifier_close(&sv->notifier);
    log_info("service", "ended with exit code %d", code);
    mem_free(sv);
    return code;
}
