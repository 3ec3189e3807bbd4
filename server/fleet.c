#include "server/fleet.h"

#include "engine/base/host_limits.h"
#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/run/request.h"
#include "server/config_value.h"
#include "server/devices.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

/* 67 million tokens, in 16 MB: of GLM-4.7-Flash, whose K and V are small, 3.6 TB. */
enum { REMEMBERED_BLOCKS = 1 << 20 };

struct fleet {
    uint32_t n;
    struct engine *engines[FLEET_MAX_ENGINES];
    struct placement *placement;
};

/* ---- loading */

struct loader {
    pthread_t thread;
    struct engine_config cfg;
    struct mailbox *to_loop;
    struct engine *engine;
    enum status st;
    struct error err;
};

static void *load(void *arg)
{
    struct loader *l = arg;
    char name[16];

    snprintf(name, sizeof name, "load %u", l->cfg.number);
    pthread_setname_np(pthread_self(), name);
    l->st = engine_create(&l->engine, &l->cfg, l->to_loop, &l->err);
    return NULL;
}

/* Each engine looks at what is available for itself, at the same time as the others. */
static enum status check_host_memory(const struct engine_config *cfg, uint32_t n,
                                     struct error *err)
{
    uint64_t all = cfg->host_kv_bytes * n, available = host_memory_available();

    if (n == 1 || all <= available)
        return ST_OK;
    return error_set(err, ST_NOMEM, "host-kv-bytes is %llu MB for each of %u engines, %llu MB in "
                     "all: this machine, or its container, has %llu MB of memory available",
                     (unsigned long long)cfg->host_kv_bytes >> 20, n,
                     (unsigned long long)all >> 20, (unsigned long long)available >> 20);
}

static enum status load_all(struct fleet *f, struct loader *loaders,
                            const struct config_list *devices, struct error *err)
{
    enum status st = ST_OK;
    uint32_t n_started = 0;

    while (n_started < f->n && st == ST_OK) {
        struct loader *l = &loaders[n_started];
        if (pthread_create(&l->thread, NULL, load, l) != 0)
            st = error_set(err, ST_NOMEM, "no thread could be started to load engine %u",
                           n_started);
        else
            n_started++;
    }
    for (uint32_t i = 0; i < n_started; i++) {
        const struct loader *l = &loaders[i];
        pthread_join(l->thread, NULL);
        f->engines[i] = l->engine;
        if (l->st == ST_OK || st != ST_OK)
            continue;
        st = l->st;
        if (f->n > 1)
            error_set(err, st, "engine %u (%s): %s", i, devices->items[i], l->err.text);
        else
            *err = l->err;
    }
    return st;
}

static enum status create_engines(struct fleet *f, const struct engine_config *cfg,
                                  const struct config_list *devices, struct mailbox *to_loop,
                                  struct error *err)
{
    const bool on_cpu = strcmp(devices->items[0], "cpu") == 0;

    f->n = (uint32_t)devices->n;
    if (f->n > 1 && cfg->selection_dump)
        return error_set(err, ST_INVALID, "selection-dump writes what one engine selects: backend "
                         "lists %u devices", f->n);
    TRY(check_host_memory(cfg, f->n, err));
    struct loader *loaders = mem_calloc(f->n, sizeof *loaders);
    for (uint32_t i = 0; i < f->n; i++) {
        loaders[i].cfg = *cfg;
        loaders[i].cfg.backend = devices->items[i];
        loaders[i].cfg.number = i;
        loaders[i].cfg.sharers = on_cpu ? f->n : 1;
        loaders[i].to_loop = to_loop;
    }
    enum status st = load_all(f, loaders, devices, err);
    mem_free(loaders);
    return st;
}

static void create_placement(struct fleet *f, bool prefix_cache)
{
    struct engine_stats stats;

    engine_stats(f->engines[0], &stats);
    f->placement = placement_create(f->n, stats.kv_block_tokens,
                                    prefix_cache ? REMEMBERED_BLOCKS : 0);
}

enum status fleet_create(struct fleet **out, const struct engine_config *cfg,
                         const struct config_list *backends, struct mailbox *to_loop,
                         struct error *err)
{
    struct fleet *f = mem_calloc(1, sizeof *f);
    struct config_list devices = { 0 };
    enum status st = devices_expand(&devices, backends, err);

    *out = NULL;
    if (st == ST_OK)
        st = create_engines(f, cfg, &devices, to_loop, err);
    config_list_fini(&devices);
    if (st != ST_OK) {
        fleet_destroy(f);
        return st;
    }
    create_placement(f, cfg->prefix_cache);
    *out = f;
    return ST_OK;
}

void fleet_stop(struct fleet *f)
{
    for (uint32_t i = 0; i < f->n; i++)
        engine_stop(f->engines[i]);
}

void fleet_destroy(struct fleet *f)
{
    if (!f)
        return;
    for (uint32_t i = 0; i < f->n; i++)
        engine_destroy(f->engines[i]);
    placement_destroy(f->placement);
    mem_free(f);
}

/* ---- all of them */

uint32_t fleet_n_engines(const struct fleet *f)
{
    return f->n;
}

struct engine *fleet_engine(const struct fleet *f, uint32_t i)
{
    ASSERT(i < f->n);
    return f->engines[i];
}

uint32_t fleet_max_model_len(const struct fleet *f)
{
    uint32_t least = UINT32_MAX;

    for (uint32_t i = 0; i < f->n; i++) {
        uint32_t tokens = engine_max_model_len(f->engines[i]);
        least = tokens < least ? tokens : least;
    }
    return least;
}

void fleet_write_devices(struct strbuf *out, const struct fleet *f)
{
    for (uint32_t i = 0; i < f->n; i++) {
        strbuf_puts(out, i ? "; " : "");
        strbuf_puts(out, engine_device_name(f->engines[i]));
    }
}

struct engine_stats *fleet_stats(const struct fleet *f)
{
    struct engine_stats *stats = mem_calloc(f->n, sizeof *stats);

    for (uint32_t i = 0; i < f->n; i++)
        engine_stats(f->engines[i], &stats[i]);
    return stats;
}

void fleet_drain(struct fleet *f)
{
    for (uint32_t i = 0; i < f->n; i++)
        engine_drain(f->engines[i]);
}

void fleet_poke(struct fleet *f)
{
    for (uint32_t i = 0; i < f->n; i++)
        engine_poke(f->engines[i]);
}

/* ---- requests */

static struct placement_text text_of(const struct request *r)
{
    return (struct placement_text){ .prompt = r->prompt, .n_prompt = r->n_prompt,
                                    .salt = r->cache_salt };
}

static void note_placed(struct fleet *f, struct request *const *reqs, uint32_t n, uint32_t engine,
                        uint32_t cached)
{
    const struct placement_text text = text_of(reqs[0]);

    /* One of them computes the prompt for all. */
    reqs[0]->load_tokens = text.n_prompt - cached;
    for (uint32_t i = 0; i < n; i++)
        reqs[i]->engine = engine;
    placement_add(f->placement, engine, n, reqs[0]->load_tokens);
    placement_learn(f->placement, engine, &text);
}

enum status fleet_submit(struct fleet *f, struct request *const *reqs, uint32_t n)
{
    const struct placement_text text = text_of(reqs[0]);
    struct placement_order order;
    enum status first = ST_OK;

    placement_rank(f->placement, &order, &text);
    for (uint32_t i = 0; i < f->n; i++) {
        uint32_t engine = order.engines[i];
        enum status st = engine_submit(f->engines[engine], reqs, n);
        if (st == ST_OK) {
            note_placed(f, reqs, n, engine, order.cached[engine]);
            return ST_OK;
        }
        if (st != ST_BUSY && st != ST_QUOTA)
            return st;
        first = i ? first : st;
    }
    return first;
}

void fleet_cancel(struct fleet *f, struct request *req)
{
    engine_cancel(fleet_engine(f, req->engine), req);
}

void fleet_note_output(struct fleet *f, struct request *req)
{
    placement_computed(f->placement, req->engine, req->load_tokens);
    req->load_tokens = 0;
}

void fleet_note_done(struct fleet *f, struct request *req)
{
    struct placement_text text = text_of(req);

    fleet_note_output(f, req);
    placement_ended(f->placement, req->engine);
    if (req->finish != FINISH_STOP && req->finish != FINISH_LENGTH)
        return;
    text.output = req->output;
    text.n_output = atomic_load_explicit(&req->n_output, memory_order_acquire);
    placement_learn(f->placement, req->engine, &text);
}
