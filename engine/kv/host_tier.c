#include "engine/kv/host_tier.h"

#include "engine/base/invariant.h"
#include "engine/base/log.h"
#include "engine/base/mem.h"
#include "engine/kv/host_memory.h"

struct host_tier {
    struct host_tier_config cfg;
    size_t stride;
    struct host_memory *memory;
    struct mailbox *done;
    struct copy_engine *copies;
    struct copy_job *jobs;           /* [blocks + host_blocks] by block */
    uint32_t under_way;
    bool complained;                 /* of memory that could not be had */
};

/* On the thread that pins memory: there is more. */
static void memory_grew(void *arg)
{
    struct host_tier *t = arg;

    t->cfg.wake(t->cfg.arg);
}

enum status host_tier_create(struct host_tier **out, struct backend *be,
                             const struct host_tier_config *cfg, struct error *err)
{
    struct host_tier *t = mem_calloc(1, sizeof *t);

    *out = NULL;
    ASSERT(cfg->host_blocks > 0);
    t->cfg = *cfg;
    t->stride = kv_pool_host_bytes(&cfg->shape, cfg->layers);
    t->jobs = mem_calloc((size_t)cfg->blocks + cfg->host_blocks, sizeof *t->jobs);
    t->done = mailbox_create(cfg->wake, cfg->arg);
    enum status st = host_memory_create(&t->memory, be, cfg->host_blocks * t->stride,
                                        memory_grew, t, err);
    if (st == ST_OK) {
        struct copy_engine_config copies = {
            .pool = cfg->pool, .host = host_memory_base(t->memory), .layers = cfg->layers,
            .shape = cfg->shape, .done = t->done, .before = cfg->before_copy,
            .before_arg = cfg->before_copy_arg,
        };
        st = copy_engine_create(&t->copies, be, &copies, err);
    }
    if (st != ST_OK) {
        host_tier_destroy(t);
        return st;
    }
    *out = t;
    return ST_OK;
}

void host_tier_destroy(struct host_tier *t)
{
    if (!t)
        return;
    if (t->copies) {
        copy_engine_destroy(t->copies);  /* whatever was under way is in the mailbox now */
        host_tier_collect(t);
    }
    ASSERT(t->under_way == 0);
    host_memory_destroy(t->memory);
    mailbox_destroy(t->done);
    mem_free(t->jobs);
    mem_free(t);
}

void *host_tier_base(const struct host_tier *t)
{
    return host_memory_base(t->memory);
}

size_t host_tier_stride(const struct host_tier *t)
{
    return t->stride;
}

static void post(struct host_tier *t, kv_block b, enum copy_kind kind, bool urgent,
                 struct block_place place)
{
    struct copy_job *job = &t->jobs[b];

    *job = (struct copy_job){ .kind = kind, .urgent = urgent, .block = b, .place = place };
    t->under_way++;
    copy_engine_post(t->copies, job);
}

bool host_tier_store(struct host_tier *t, kv_block b)
{
    struct block_place place = kv_pool_place(t->cfg.pool, b);

    if (place.host >= 0)
        return true;
    if (place.kv < 0 || !kv_pool_store_begin(t->cfg.pool, b, &place))
        return false;
    post(t, b, COPY_STORE, false, place);
    return true;
}

bool host_tier_load(struct host_tier *t, kv_block b, bool with_kv, bool urgent)
{
    struct block_place place;

    if (!kv_pool_load_begin(t->cfg.pool, b, with_kv, &place))
        return false;
    post(t, b, COPY_LOAD, urgent, place);
    return true;
}

static void see_memory(struct host_tier *t)
{
    struct error err;

    kv_pool_host_ready(t->cfg.pool,
                       (uint32_t)(host_memory_ready_bytes(t->memory) / t->stride));
    if (!t->complained && host_memory_failure(t->memory, &err) != ST_OK) {
        t->complained = true;
        log_error("host tier", "%s; going on with %zu MB", err.text,
                  host_memory_ready_bytes(t->memory) >> 20);
    }
}

uint32_t host_tier_collect(struct host_tier *t)
{
    uint32_t n = 0;

    see_memory(t);
    for (struct mail_node *node = mailbox_drain(t->done), *next; node; node = next, n++) {
        const struct copy_job *job = (struct copy_job *)node;
        next = node->next;
        if (job->kind == COPY_STORE)
            kv_pool_store_end(t->cfg.pool, job->block, job->arrived);
        else
            kv_pool_load_end(t->cfg.pool, job->block, job->arrived);
    }
    ASSERT(n <= t->under_way);
    t->under_way -= n;
    return n;
}

uint32_t host_tier_under_way(const struct host_tier *t)
{
    return t->under_way;
}

bool host_tier_grows(const struct host_tier *t)
{
    size_t wanted = t->cfg.host_blocks * t->stride;

    return host_memory_ready_bytes(t->memory) < wanted &&
           host_memory_failure(t->memory, NULL) == ST_OK;
}

enum status host_tier_failure(const struct host_tier *t, struct error *err)
{
    return copy_engine_failure(t->copies, err);
}

struct copy_counts host_tier_counts(const struct host_tier *t)
{
    return copy_engine_counts(t->copies);
}
