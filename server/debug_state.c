#include "server/debug_state.h"

#include "engine/base/clock.h"
#include "engine/base/mem.h"
#include "server/service.h"
#include "server/stream.h"

#include <stdlib.h>
#include <string.h>

static const char *state_name(enum service_state state)
{
    switch (state) {
    case SERVICE_LOADING:  return "loading";
    case SERVICE_READY:    return "ready";
    case SERVICE_DRAINING: return "draining";
    case SERVICE_FAILED:   return "failed";
    case SERVICE_LEAVING:  return "leaving";
    }
    return "leaving";
}

static void write_pools(struct strbuf *out, const struct engine_stats *s)
{
    strbuf_printf(out, ",\"kv_pool\":{\"block_tokens\":%u,\"blocks\":%u,\"used\":%u,\"cached\":%u}",
                  s->kv_block_tokens, s->kv_blocks, s->kv_blocks_pinned, s->kv_blocks_cached);
    if (s->host_tier)
        strbuf_printf(out, ",\"host_tier\":{\"blocks\":%u,\"used\":%u,\"cached\":%u,"
                      "\"offloaded\":%u,\"streamed\":%u,\"loading\":%u}", s->host_blocks,
                      s->host_blocks_used, s->host_blocks_cached, s->offloaded, s->streamed,
                      s->loading);
    else
        strbuf_puts(out, ",\"host_tier\":null");
}

static void write_engine(struct strbuf *out, struct service *sv, uint32_t i,
                         const struct engine_stats *s)
{
    const char *device = engine_device_name(fleet_engine(sv->fleet, i));
    const struct engine_config *cfg = &sv->cfg->engine;
    uint64_t now_ns = clock_now_ns();

    strbuf_printf(out, "%s{\"engine\":%u,\"device\":", i ? "," : "", i);
    api_write_string(out, device, strlen(device));
    strbuf_printf(out, ",\"steps\":%llu,\"last_step_ms_ago\":%.1f,\"busy\":%s,\"stalled\":%s,"
                  "\"running\":%u,\"max_running\":%u,\"waiting\":%u,\"max_waiting\":%u,"
                  "\"waiting_tokens\":%llu,\"max_waiting_tokens\":%llu,\"preemptions\":%llu",
                  (unsigned long long)s->steps,
                  now_ns > s->last_step_ns ? (double)(now_ns - s->last_step_ns) / 1e6 : 0.0,
                  s->busy ? "true" : "false", service_engine_stalled(sv, i) ? "true" : "false",
                  s->running, cfg->max_running, s->waiting, cfg->max_waiting,
                  (unsigned long long)s->waiting_tokens,
                  (unsigned long long)cfg->max_waiting_tokens,
                  (unsigned long long)s->preemptions);
    write_pools(out, s);
    strbuf_puts(out, "}");
}

static int by_id(const void *a, const void *b)
{
    const struct engine_sequence *x = a, *y = b;

    return (x->id > y->id) - (x->id < y->id);
}

/* What runs in any engine, by id; *n of them, the caller frees. */
static struct engine_sequence *list_running(const struct service *sv, uint32_t *n)
{
    uint32_t n_engines = sv->fleet ? fleet_n_engines(sv->fleet) : 0;
    struct engine_sequence *list = mem_calloc((size_t)n_engines * sv->cfg->engine.max_running,
                                              sizeof *list);

    *n = 0;
    for (uint32_t i = 0; i < n_engines; i++)
        *n += engine_sequences(fleet_engine(sv->fleet, i), list + *n);
    qsort(list, *n, sizeof *list, by_id);
    return list;
}

static void write_engines(struct strbuf *out, struct service *sv)
{
    uint32_t n_engines = sv->fleet ? fleet_n_engines(sv->fleet) : 0;
    struct engine_stats stats;

    strbuf_puts(out, ",\"engines\":[");
    for (uint32_t i = 0; i < n_engines; i++) {
        engine_stats(fleet_engine(sv->fleet, i), &stats);
        write_engine(out, sv, i, &stats);
    }
    strbuf_puts(out, "]");
}

void debug_state_write(struct strbuf *out, struct service *sv)
{
    const char *model = sv->api.model_names[0];
    uint32_t n_running;
    struct engine_sequence *running = list_running(sv, &n_running);

    strbuf_printf(out, "{\"state\":\"%s\",\"version\":\"%s\",\"model\":", state_name(sv->state),
                  config_version());
    api_write_string(out, model, strlen(model));
    write_engines(out, sv);
    strbuf_puts(out, ",\"requests\":");
    stream_write_states(out, sv, running, n_running);
    strbuf_puts(out, "}");
    mem_free(running);
}
