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

static void write_engine(struct strbuf *out, struct service *sv, const struct engine_stats *s)
{
    const struct engine_config *cfg = &sv->cfg->engine;
    uint64_t now_ns = clock_now_ns();

    strbuf_printf(out, ",\"engine\":{\"steps\":%llu,\"last_step_ms_ago\":%.1f,\"busy\":%s,"
                  "\"stalled\":%s,\"running\":%u,\"max_running\":%u,\"waiting\":%u,"
                  "\"max_waiting\":%u,\"waiting_tokens\":%llu,\"max_waiting_tokens\":%llu,"
                  "\"preemptions\":%llu}",
                  (unsigned long long)s->steps,
                  now_ns > s->last_step_ns ? (double)(now_ns - s->last_step_ns) / 1e6 : 0.0,
                  s->busy ? "true" : "false", service_stalled(sv) ? "true" : "false", s->running,
                  cfg->max_running, s->waiting, cfg->max_waiting,
                  (unsigned long long)s->waiting_tokens,
                  (unsigned long long)cfg->max_waiting_tokens,
                  (unsigned long long)s->preemptions);
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

static int by_id(const void *a, const void *b)
{
    const struct engine_sequence *x = a, *y = b;

    return (x->id > y->id) - (x->id < y->id);
}

void debug_state_write(struct strbuf *out, struct service *sv)
{
    const char *model = sv->api.model_names[0];
    const char *device = sv->engine ? engine_device_name(sv->engine) : "none";
    struct engine_sequence *running = NULL;
    struct engine_stats stats;
    uint32_t n_running = 0;

    strbuf_printf(out, "{\"state\":\"%s\",\"version\":\"%s\",\"model\":", state_name(sv->state),
                  config_version());
    api_write_string(out, model, strlen(model));
    strbuf_puts(out, ",\"device\":");
    api_write_string(out, device, strlen(device));
    if (sv->engine) {
        engine_stats(sv->engine, &stats);
        write_engine(out, sv, &stats);
        running = mem_calloc(sv->cfg->engine.max_running, sizeof *running);
        n_running = engine_sequences(sv->engine, running);
        qsort(running, n_running, sizeof *running, by_id);
    } else {
        strbuf_puts(out, ",\"engine\":null,\"kv_pool\":null,\"host_tier\":null");
    }
    strbuf_puts(out, ",\"requests\":");
    stream_write_states(out, sv, running, n_running);
    strbuf_puts(out, "}");
    mem_free(running);
}
