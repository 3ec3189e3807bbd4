#include "server/metrics.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/run/request.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

#define PREFIX "asynctlsd:"

enum { MAX_BUCKETS = 24, MAX_HTTP = 256, MAX_ROUTES = 32 };

static const double ttft_bounds[] = { 0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,
                                      0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
                                      640, 2560 };
static const double itl_bounds[] = { 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15,
                                     0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80 };
static const double request_bounds[] = { 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10,
                                         15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
                                         7680 };
static const double token_bounds[] = { 1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4,
                                       2e4, 5e4, 1e5, 2e5, 5e5, 1e6 };
static const double n_bounds[] = { 1, 2, 5, 10, 20 };

struct histogram {
    const double *bounds;
    int n_bounds;
    uint64_t counts[MAX_BUCKETS + 1];          /* the last is +Inf's own */
    double sum;
};

/* name, bounds, what it measures */
#define HISTOGRAMS(X)                                                                         \
    X(time_to_first_token_seconds, ttft_bounds, "Arrival of a request to its first token.")   \
    X(inter_token_latency_seconds, itl_bounds, "Time between tokens of one choice.")          \
    X(e2e_request_latency_seconds, request_bounds, "Arrival of a request to its last token.") \
    X(request_queue_time_seconds, request_bounds, "Time in the waiting room.")                \
    X(request_inference_time_seconds, request_bounds, "Admission to the last token.")         \
    X(request_prefill_time_seconds, request_bounds, "Admission to the first token.")          \
    X(request_decode_time_seconds, request_bounds, "First token to the last.")                \
    X(request_time_per_output_token_seconds, itl_bounds,                                      \
      "Decode time by the tokens after the first, of a choice.")                              \
    X(request_prompt_tokens, token_bounds, "Prompt tokens of a choice.")                      \
    X(request_generation_tokens, token_bounds, "Output tokens of a choice.")                  \
    X(request_params_n, n_bounds, "n of a request.")                                          \
    X(request_params_max_tokens, token_bounds, "max_tokens of a request.")                    \
    X(request_num_preemptions, n_bounds, "Preemptions of a choice.")

enum histogram_id {
#define X(name, bounds, help) H_##name,
    HISTOGRAMS(X)
#undef X
    N_HISTOGRAMS
};

struct http_count {
    const char *route;
    int code;
    uint64_t n;
};

struct http_route {
    const char *route;
    struct histogram duration;
};

struct metrics {
    struct histogram histograms[FLEET_MAX_ENGINES][N_HISTOGRAMS];
    struct http_route routes[MAX_ROUTES];
    int n_routes;
    struct http_count http[MAX_HTTP];
    int n_http;
};

struct metrics *metrics_create(void)
{
    struct metrics *m = mem_calloc(1, sizeof *m);

    for (int i = 0; i < FLEET_MAX_ENGINES; i++) {
        struct histogram *h = m->histograms[i];
#define X(name, list, help)                                                          \
    _Static_assert(sizeof list / sizeof list[0] <= MAX_BUCKETS, "too many buckets"); \
    h[H_##name].bounds = list;                                                       \
    h[H_##name].n_bounds = (int)(sizeof list / sizeof list[0]);
        HISTOGRAMS(X)
#undef X
    }
    return m;
}

void metrics_destroy(struct metrics *m)
{
    mem_free(m);
}

static void histogram_add(struct histogram *h, double value, uint64_t times)
{
    int i = 0;

    while (i < h->n_bounds && value > h->bounds[i])
        i++;
    h->counts[i] += times;
    h->sum += value * (double)times;
}

static void observe_interval(struct histogram *h, uint64_t from, uint64_t to)
{
    if (from && to)
        histogram_add(h, to > from ? (double)(to - from) / 1e9 : 0, 1);
}

static struct histogram *duration_of(struct metrics *m, const char *route)
{
    int i = 0;

    while (i < m->n_routes && strcmp(m->routes[i].route, route) != 0)
        i++;
    if (i == m->n_routes) {
        ASSERT(m->n_routes < MAX_ROUTES);
        m->routes[m->n_routes++] = (struct http_route){
            route, { .bounds = request_bounds,
                     .n_bounds = (int)(sizeof request_bounds / sizeof request_bounds[0]) } };
    }
    return &m->routes[i].duration;
}

void metrics_count_http(struct metrics *m, const char *route, int code, double seconds)
{
    histogram_add(duration_of(m, route), seconds, 1);
    for (int i = 0; i < m->n_http; i++)
        if (m->http[i].code == code && strcmp(m->http[i].route, route) == 0) {
            m->http[i].n++;
            return;
        }
    ASSERT(m->n_http < MAX_HTTP);   /* routes and codes are both our own, and few */
    m->http[m->n_http++] = (struct http_count){ route, code, 1 };
}

void metrics_note_first_token(struct metrics *m, uint32_t engine, uint64_t arrival_ns,
                              uint64_t now_ns)
{
    observe_interval(&m->histograms[engine][H_time_to_first_token_seconds], arrival_ns, now_ns);
}

void metrics_note_tokens(struct metrics *m, uint32_t engine, uint32_t tokens,
                         uint64_t interval_ns)
{
    if (tokens)
        histogram_add(&m->histograms[engine][H_inter_token_latency_seconds],
                      (double)interval_ns / 1e9 / tokens, tokens);
}

void metrics_note_params(struct metrics *m, uint32_t engine, uint32_t n, uint32_t max_tokens)
{
    histogram_add(&m->histograms[engine][H_request_params_n], n, 1);
    histogram_add(&m->histograms[engine][H_request_params_max_tokens], max_tokens, 1);
}

void metrics_note_done(struct metrics *m, const struct request *r, uint64_t submitted_ns)
{
    struct histogram *h = m->histograms[r->engine];
    uint32_t n_output = atomic_load(&r->n_output);

    observe_interval(&h[H_request_queue_time_seconds], submitted_ns, r->admitted_ns);
    observe_interval(&h[H_request_prefill_time_seconds], r->admitted_ns, r->first_token_ns);
    if (r->finish != FINISH_STOP && r->finish != FINISH_LENGTH)
        return;
    observe_interval(&h[H_e2e_request_latency_seconds], r->arrival_ns, r->last_token_ns);
    observe_interval(&h[H_request_inference_time_seconds], r->admitted_ns, r->last_token_ns);
    observe_interval(&h[H_request_decode_time_seconds], r->first_token_ns, r->last_token_ns);
    histogram_add(&h[H_request_prompt_tokens], r->n_prompt, 1);
    histogram_add(&h[H_request_generation_tokens], n_output, 1);
    if (n_output > 1)
        histogram_add(&h[H_request_time_per_output_token_seconds],
                      (double)(r->last_token_ns - r->first_token_ns) / 1e9 / (n_output - 1), 1);
    histogram_add(&h[H_request_num_preemptions], r->n_preempted, 1);
}

/* ---- printing */

enum { MAX_VALUES = 32 };

struct printer {
    struct strbuf *out;
    struct strbuf common;                      /* model_name="..." */
    struct strbuf labels[FLEET_MAX_ENGINES];   /* the same with engine="..." */
    const struct metrics_view *view;
};

/* A sample that every engine has. */
struct value {
    const char *name, *type, *help;
    double value;
};

static void print_head(struct printer *p, const char *name, const char *type, const char *help)
{
    strbuf_printf(p->out, "# HELP " PREFIX "%s %s\n# TYPE " PREFIX "%s %s\n", name, help, name,
                  type);
}

static void print_one(struct printer *p, const char *name, const char *type, const char *help,
                      double value)
{
    print_head(p, name, type, help);
    strbuf_printf(p->out, PREFIX "%s{%s} %.17g\n", name, p->common.data, value);
}

/* The samples of one histogram; more: further labels, each after a comma. */
static void print_buckets(struct printer *p, const char *name, const char *labels,
                          const char *more, const struct histogram *h)
{
    uint64_t n = 0;

    for (int i = 0; i < h->n_bounds; i++) {
        n += h->counts[i];
        strbuf_printf(p->out, PREFIX "%s_bucket{%s%s,le=\"%g\"} %llu\n", name, labels, more,
                      h->bounds[i], (unsigned long long)n);
    }
    n += h->counts[h->n_bounds];
    strbuf_printf(p->out, PREFIX "%s_bucket{%s%s,le=\"+Inf\"} %llu\n", name, labels, more,
                  (unsigned long long)n);
    strbuf_printf(p->out, PREFIX "%s_sum{%s%s} %.17g\n" PREFIX "%s_count{%s%s} %llu\n", name,
                  labels, more, h->sum, name, labels, more, (unsigned long long)n);
}

static void print_histogram(struct printer *p, const struct metrics *m, enum histogram_id id,
                            const char *name, const char *help)
{
    print_head(p, name, "histogram", help);
    for (uint32_t i = 0; i < p->view->n_engines; i++)
        print_buckets(p, name, p->labels[i].data, "", &m->histograms[i][id]);
}

static void print_durations(struct printer *p, const struct metrics *m)
{
    char more[64];

    print_head(p, "http_request_duration_seconds", "histogram",
               "End of an exchange's headers to the end of its answer.");
    for (int i = 0; i < m->n_routes; i++) {
        snprintf(more, sizeof more, ",route=\"%s\"", m->routes[i].route);
        print_buckets(p, "http_request_duration_seconds", p->common.data, more,
                      &m->routes[i].duration);
    }
}

/* An engine's own count of its steps by size. */
static void print_step_sizes(struct printer *p)
{
    double bounds[STEP_SIZES];
    _Static_assert((int)STEP_SIZES <= (int)MAX_BUCKETS, "too many buckets");

    print_head(p, "iteration_tokens_total", "histogram", "Tokens computed in a step.");
    for (uint32_t engine = 0; engine < p->view->n_engines; engine++) {
        const struct engine_stats *s = &p->view->stats[engine];
        struct histogram h = { .bounds = bounds, .n_bounds = STEP_SIZES,
                               .sum = (double)s->step_rows };
        for (int i = 0; i < STEP_SIZES; i++) {
            bounds[i] = (double)(UINT64_C(1) << i);
            h.counts[i] = s->step_sizes[i];
        }
        print_buckets(p, "iteration_tokens_total", p->labels[engine].data, "", &h);
    }
}

static void print_finished(struct printer *p)
{
    static const struct { enum finish finish; const char *label; } reasons[] = {
        { FINISH_STOP, "stop" }, { FINISH_LENGTH, "length" },
        { FINISH_CANCELLED, "abort" }, { FINISH_ERROR, "error" },
    };

    print_head(p, "request_success_total", "counter", "Finished choices by reason.");
    for (uint32_t e = 0; e < p->view->n_engines; e++)
        for (size_t i = 0; i < sizeof reasons / sizeof reasons[0]; i++)
            strbuf_printf(p->out, PREFIX "request_success_total{%s,finished_reason=\"%s\"} %llu\n",
                          p->labels[e].data, reasons[i].label,
                          (unsigned long long)p->view->stats[e].finished[reasons[i].finish]);
}

/* Rows of K and V that offloaded sequences read, by layer. */
static void print_hot_rows(struct printer *p)
{
    static const struct { const char *name, *help; size_t offset; } rows[] = {
        { "hot_row_hits_total", "Rows of offloaded sequences found among their hot rows.",
          offsetof(struct hot_counts, hits) },
        { "hot_row_misses_total", "Rows of offloaded sequences fetched from the host tier.",
          offsetof(struct hot_counts, misses) },
        { "hot_row_resident_total", "Rows of offloaded sequences still in the KV pool.",
          offsetof(struct hot_counts, resident) },
    };
    const struct metrics_view *v = p->view;

    print_head(p, "hot_row_stall_seconds_total", "counter",
               "Time that attention waited for rows of the host tier.");
    for (uint32_t e = 0; e < v->n_engines; e++)
        for (int layer = 0; layer < v->layers; layer++)
            strbuf_printf(p->out, PREFIX "hot_row_stall_seconds_total{%s,layer=\"%d\"} %.9f\n",
                          p->labels[e].data, layer,
                          (double)v->stats[e].hot[layer].stalled_ns / 1e9);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        print_head(p, rows[i].name, "counter", rows[i].help);
        for (uint32_t e = 0; e < v->n_engines; e++)
            for (int layer = 0; layer < v->layers; layer++)
                strbuf_printf(p->out, PREFIX "%s{%s,layer=\"%d\"} %llu\n", rows[i].name,
                              p->labels[e].data, layer,
                              (unsigned long long)*(const uint64_t *)(const void *)
                                  ((const char *)&v->stats[e].hot[layer] + rows[i].offset));
    }
}

static int host_tier_values(struct value out[MAX_VALUES], const struct engine_stats *s)
{
    const struct value values[] = {
        { "host_kv_blocks", "gauge", "Blocks of 64 tokens in the host tier.", s->host_blocks },
        { "host_kv_blocks_used", "gauge", "Those of them with blocks of running choices.",
          s->host_blocks_used },
        { "host_kv_blocks_cached", "gauge", "Those of them kept for reuse.",
          s->host_blocks_cached },
        { "kv_offload_cpu_cache_usage_perc", "gauge",
          "Share of the host tier with blocks of running choices; 1 is all of it.",
          s->host_blocks_used / (double)(s->host_blocks ? s->host_blocks : 1) },
        { "num_requests_offloaded", "gauge", "Running choices that decode out of the host tier.",
          s->offloaded },
        { "num_requests_streamed", "gauge", "Running choices too long for the KV pool.",
          s->streamed },
        { "num_requests_loading", "gauge", "Running choices that wait for blocks to be loaded.",
          s->loading },
        { "offloads_total", "counter", "Choices that left the device.", (double)s->n_offloads },
        { "offload_returns_total", "counter", "Choices that came back.", (double)s->n_returns },
        { "kv_offload_store_bytes_total", "counter",
          "Bytes copied from the device to the host tier.", (double)s->bytes_stored },
        { "kv_offload_load_bytes_total", "counter",
          "Bytes of blocks copied from the host tier to the device.", (double)s->bytes_loaded },
        { "host_kv_load_wait_seconds_total", "counter",
          "Time from asking for a block to its arrival, of all blocks.",
          (double)s->load_wait_ns / 1e9 },
    };
    _Static_assert(sizeof values / sizeof values[0] <= MAX_VALUES, "too many values");

    memcpy(out, values, sizeof values);
    return (int)(sizeof values / sizeof values[0]);
}

static int engine_values(struct value out[MAX_VALUES], const struct engine_stats *s)
{
    double blocks = s->kv_blocks ? s->kv_blocks : 1;
    const struct value values[] = {
        { "num_requests_running", "gauge", "Choices in the batch.", s->running },
        { "num_requests_waiting", "gauge", "Choices in the waiting room.", s->waiting },
        { "waiting_tokens", "gauge", "Prompt tokens in the waiting room.",
          (double)s->waiting_tokens },
        { "kv_cache_usage_perc", "gauge", "Share of the KV pool in use; 1 is all of it.",
          s->kv_blocks_pinned / blocks },
        { "kv_cache_cached_perc", "gauge", "Share of the KV pool kept for reuse.",
          s->kv_blocks_cached / blocks },
        { "kv_cache_blocks", "gauge", "Blocks of 64 tokens in the KV pool.", s->kv_blocks },
        { "prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache.",
          (double)s->prefix_queries },
        { "prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache.",
          (double)s->prefix_hits },
        { "prompt_tokens_total", "counter", "Prompt tokens, computed or found in the cache.",
          (double)(s->prompt_tokens + s->prompt_tokens_cached) },
        { "prompt_tokens_cached_total", "counter", "Those of them that were not computed.",
          (double)s->prompt_tokens_cached },
        { "generation_tokens_total", "counter", "Output tokens.", (double)s->output_tokens },
        { "num_preemptions_total", "counter", "Choices put back into the waiting room.",
          (double)s->preemptions },
        { "recomputed_tokens_total", "counter", "Tokens computed again after a preemption.",
          (double)s->recomputed_tokens },
        { "decode_rows_sparse_total", "counter", "Decoded rows with two-level attention.",
          (double)s->sparse_rows },
        { "decode_rows_dense_total", "counter", "Decoded rows with full attention.",
          (double)s->dense_rows },
        { "steps_total", "counter", "Steps of the engine.", (double)s->steps },
        { "step_seconds_total", "counter", "Time spent in steps.", (double)s->step_ns / 1e9 },
        { "step_host_seconds_total", "counter",
          "Time from step to step not spent waiting for the device.",
          (double)s->step_host_ns / 1e9 },
    };
    _Static_assert(sizeof values / sizeof values[0] <= MAX_VALUES, "too many values");

    memcpy(out, values, sizeof values);
    return (int)(sizeof values / sizeof values[0]);
}

/* Sample by sample, each of all engines. */
static void print_values(struct printer *p,
                         int (*make)(struct value out[MAX_VALUES], const struct engine_stats *s))
{
    struct value values[FLEET_MAX_ENGINES][MAX_VALUES];
    int n = 0;

    for (uint32_t e = 0; e < p->view->n_engines; e++)
        n = make(values[e], &p->view->stats[e]);
    for (int i = 0; i < n; i++) {
        print_head(p, values[0][i].name, values[0][i].type, values[0][i].help);
        for (uint32_t e = 0; e < p->view->n_engines; e++)
            strbuf_printf(p->out, PREFIX "%s{%s} %.17g\n", values[e][i].name, p->labels[e].data,
                          values[e][i].value);
    }
}

/* Constants that others look up by these names to know how full num_gpu_blocks can be. */
static void print_cache_config(struct printer *p)
{
    const struct metrics_view *v = p->view;

    print_head(p, "cache_config_info", "gauge", "Always 1; the labels tell.");
    for (uint32_t e = 0; e < v->n_engines; e++)
        strbuf_printf(p->out, PREFIX "cache_config_info{%s,block_size=\"%u\","
                      "num_gpu_blocks=\"%u\",enable_prefix_caching=\"%s\"} 1\n",
                      p->labels[e].data, v->stats[e].kv_block_tokens, v->stats[e].kv_blocks,
                      v->prefix_cache ? "True" : "False");
}

static void add_label_value(struct strbuf *out, const char *s)
{
    for (; *s; s++) {
        if (*s == '\\' || *s == '"')
            strbuf_add(out, "\\", 1);
        if (*s == '\n')
            strbuf_puts(out, "\\n");
        else
            strbuf_add(out, s, 1);
    }
}

/* Of each engine's device; before there are any, without one. */
static void print_build_info(struct printer *p)
{
    const struct metrics_view *v = p->view;

    print_head(p, "build_info", "gauge", "Always 1; the labels tell.");
    for (uint32_t e = 0; e < v->n_engines || (e == 0 && v->n_engines == 0); e++) {
        strbuf_printf(p->out, PREFIX "build_info{%s,version=\"%s\",device=\"",
                      v->n_engines ? p->labels[e].data : p->common.data, v->version);
        add_label_value(p->out, v->n_engines ? v->devices[e] : "none");
        strbuf_puts(p->out, "\"} 1\n");
    }
}

static void print_engines(struct printer *p, const struct metrics *m)
{
    print_values(p, engine_values);
    print_finished(p);
    print_step_sizes(p);
    print_cache_config(p);
    if (p->view->stats[0].host_tier) {     /* all have one or none */
        print_values(p, host_tier_values);
        print_hot_rows(p);
    }
#define X(name, list, help) print_histogram(p, m, H_##name, #name, help);
    HISTOGRAMS(X)
#undef X
}

static void make_labels(struct printer *p)
{
    strbuf_puts(&p->common, "model_name=\"");
    add_label_value(&p->common, p->view->model_name);
    strbuf_puts(&p->common, "\"");
    for (uint32_t e = 0; e < p->view->n_engines; e++)
        strbuf_printf(&p->labels[e], "%s,engine=\"%u\"", p->common.data, e);
}

void metrics_print(const struct metrics *m, struct strbuf *out, const struct metrics_view *v)
{
    struct printer p = { .out = out, .view = v };

    make_labels(&p);
    if (v->n_engines)
        print_engines(&p, m);
    print_one(&p, "requests_open", "gauge", "Completions whose answer is not finished.",
              v->streams);
    print_one(&p, "requests_parsing", "gauge", "Bodies that are being parsed and tokenised.",
              v->parsing);
    print_build_info(&p);
    print_durations(&p, m);
    print_head(&p, "http_requests_total", "counter", "HTTP exchanges; code 0: no answer given.");
    for (int i = 0; i < m->n_http; i++)
        strbuf_printf(out, PREFIX "http_requests_total{%s,route=\"%s\",code=\"%d\"} %llu\n",
                      p.common.data, m->http[i].route, m->http[i].code,
                      (unsigned long long)m->http[i].n);
    strbuf_fini(&p.common);
    for (uint32_t e = 0; e < v->n_engines; e++)
        strbuf_fini(&p.labels[e]);
}
