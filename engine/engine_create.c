#include "engine/engine_parts.h"

#include "engine/base/clock.h"
#include "engine/base/host_limits.h"
#include "engine/base/invariant.h"
#include "engine/base/log.h"
#include "engine/base/mem.h"
#include "engine/grammar/token_trie.h"
#include "kernels/backend.h"

#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum {
    LOGIT_BYTES = 64 << 20,            /* scoring a prompt may use that much for its logits */
    STREAM_TOKENS = 2048,              /* a step that streams hides its copies behind as many */
    HOT_ROWS_LEAST = 4, HOT_ROWS_GROWN = 16, /* by default, times the tokens kept */
    MAX_PATH_BYTES = 4096
};

static void wake_engine(void *arg)
{
    struct engine *e = arg;
    uint64_t one = 1;
    ssize_t n = write(e->wake_fd, &one, sizeof one);

    (void)n;                           /* a full counter wakes as well */
}

static enum status path_join(char out[MAX_PATH_BYTES], const char *dir, const char *file,
                             struct error *err)
{
    int n = snprintf(out, MAX_PATH_BYTES, "%s/%s", dir, file);

    return n < MAX_PATH_BYTES ? ST_OK : error_set(err, ST_INVALID, "%s: the path is too long", dir);
}

static enum status check_offload(const struct engine_config *cfg, struct error *err)
{
    if (!cfg->host_kv_bytes && cfg->offload == OFFLOAD_ALWAYS)
        return error_set(err, ST_INVALID, "offload always needs a host tier: set host-kv-bytes");
    if (cfg->hot_rows > HOT_MOST_ROWS)
        return error_set(err, ST_INVALID, "hot-rows is %u; %d is the most", cfg->hot_rows,
                         HOT_MOST_ROWS);
    return ST_OK;
}

static enum status check_config(const struct engine_config *cfg, struct error *err)
{
    if (cfg->max_running < 1 || cfg->max_running > 4096)
        return error_set(err, ST_INVALID, "max-running is %u; 1 to 4096 can be",
                         cfg->max_running);
    if (cfg->step_tokens < cfg->max_running + ENGINE_MIN_PREFILL_TOKENS)
        return error_set(err, ST_INVALID,
                         "step-tokens is %u; with max-running %u it must be at least %u",
                         cfg->step_tokens, cfg->max_running,
                         cfg->max_running + ENGINE_MIN_PREFILL_TOKENS);
    return check_offload(cfg, err);
}

/* This engine's part of the threads of the CPU back end; alone it leaves a 0 to that. */
static int threads_of(const struct engine_config *cfg)
{
    if (cfg->sharers < 2)
        return cfg->threads;
    int part = (cfg->threads ? cfg->threads : host_core_limit()) / (int)cfg->sharers;
    return part < 1 ? 1 : part;
}

static enum status open_device(struct engine *e, const struct engine_config *cfg,
                               struct error *err)
{
    struct backend_options options = { .threads = threads_of(cfg), .isa = cfg->isa };
    char path[MAX_PATH_BYTES];

    TRY(backend_open(&e->be, cfg->backend, &options, err));
    TRY(model_open(&e->model, e->be, cfg->model_dir, cfg->progress, err));
    TRY(path_join(path, cfg->model_dir, "tokenizer.json", err));
    TRY(tokenizer_open(&e->tok, path, err));
    if (tokenizer_n_ids(e->tok) > model_config(e->model)->vocab)
        return error_set(err, ST_INVALID,
                         "%s: the tokenizer has %d ids but the model only %d rows for them",
                         cfg->model_dir, tokenizer_n_ids(e->tok), model_config(e->model)->vocab);
    e->trie = token_trie_create(e->tok);
    return ST_OK;
}

/* Full attention reads all K and V, so with a dense layer nobody can leave the device. */
static enum status check_always(const struct engine_config *cfg, const struct select_plan *plan,
                                struct error *err)
{
    for (int i = 0; cfg->offload == OFFLOAD_ALWAYS && i < plan->n_layers; i++)
        if (plan->layer[i].dense)
            return error_set(err, ST_INVALID,
                             "offload always: layer-exceptions makes layer %d dense, and a layer "
                             "with full attention keeps everybody on the device", i);
    return ST_OK;
}

static enum status plan_selection(struct engine *e, const struct engine_config *cfg,
                                  const struct kv_shape *shape, struct error *err)
{
    int layers = model_config(e->model)->layers;
    struct select_config select = cfg->select;
    char path[MAX_PATH_BYTES];

    if (select.crossover_tokens == 0)
        select.crossover_tokens = backend_info(e->be)->crossover_tokens;
    if (select.index == INDEX_CHANNELS && !shape->latent_dim) {   /* else the plan refuses */
        e->channels = mem_calloc((size_t)layers * (size_t)shape->kv_heads *
                                 INDEX_CHANNELS_KEPT, sizeof *e->channels);
        TRY(path_join(path, cfg->model_dir, "asynctlsd-channels.json", err));
        if (select_channels_read(e->channels, path, layers, shape, err) != ST_OK)
            return error_set(err, ST_INVALID,
                             "%s cannot be used; token-index channels needs it: run "
                             "asynctlsd --calibrate TEXTFILE once for this model", path);
    }
    TRY(select_plan_init(&e->select, &select, shape, layers, e->channels, err));
    return check_always(cfg, &e->select, err);
}

/* The longest context: what the model and the pool allow, or what was asked
 * for if they allow it. */
static enum status resolve_length(struct engine *e, const struct engine_config *cfg,
                                  const struct kv_pool_config *pool, struct error *err)
{
    const struct model_config *m = model_config(e->model);
    uint32_t of_model = (uint32_t)m->max_position;
    uint64_t of_pool = (uint64_t)(pool->staged_blocks ? pool->host_blocks : pool->blocks) *
                       BLOCK_TOKENS;

    if (m->sliding_window > 0 && (uint32_t)m->sliding_window < of_model)
        of_model = (uint32_t)m->sliding_window;
    if (cfg->max_model_len > of_model)
        return error_set(err, ST_INVALID, "max-model-len is %u; the model's %s is %u",
                         cfg->max_model_len,
                         m->sliding_window ? "sliding window, which contexts may not pass,"
                                           : "limit", of_model);
    if (cfg->max_model_len > of_pool)
        return error_set(err, ST_INVALID,
                         "max-model-len is %u; the %s holds %llu tokens: raise %s",
                         cfg->max_model_len, pool->staged_blocks ? "host tier" : "KV pool",
                         (unsigned long long)of_pool,
                         pool->staged_blocks ? "host-kv-bytes" : "kv-cache-bytes");
    e->max_model_len = cfg->max_model_len ? cfg->max_model_len
                       : of_pool < of_model ? (uint32_t)of_pool : of_model;
    return ST_OK;
}

static uint32_t logit_rows(const struct engine_config *cfg, int vocab)
{
    uint64_t rows = LOGIT_BYTES / (4u * (uint64_t)vocab);

    if (rows > cfg->step_tokens)
        rows = cfg->step_tokens;
    if (rows < cfg->max_running + ENGINE_MIN_PREFILL_TOKENS)
        rows = cfg->max_running + ENGINE_MIN_PREFILL_TOKENS;
    return (uint32_t)rows;
}

/* Each step of a streamed prompt brings all that is not on the device across the bus, so it takes
 * many tokens at a time where no other sequence has to wait for that; but what it computes must fit
 * half of the pool, since the step before is on its way to the host meanwhile. */
static uint32_t alone_tokens(const struct engine_config *cfg, const struct kv_pool_config *pool)
{
    uint32_t half = pool->blocks / 2, room = half > 2 ? (half - 2) * BLOCK_TOKENS : 0;
    uint32_t tokens = room < STREAM_TOKENS ? room : STREAM_TOKENS;

    return pool->staged_blocks && tokens > cfg->step_tokens ? tokens : cfg->step_tokens;
}

static struct model_limits step_limits(const struct engine_config *cfg, uint32_t logit_rows,
                                       uint32_t max_model_len)
{
    return (struct model_limits){
        .max_rows = (int)cfg->step_tokens, .max_seqs = (int)cfg->max_running,
        .max_logit_rows = (int)logit_rows,
        .max_blocks = (int)((max_model_len + BLOCK_TOKENS - 1) / BLOCK_TOKENS),
    };
}

static void log_memory(const struct engine *e, const struct kv_pool_config *pool,
                       size_t scratch_bytes, const struct hot_sets_config *sets)
{
    const struct device_info *info = backend_info(e->be);
    size_t kv = (size_t)pool->layers * kv_block_bytes(&pool->shape);
    size_t index = (size_t)pool->layers * index_block_bytes(&pool->shape);

    log_info("engine", "device   %s, %zu MB of memory", info->name, info->mem_bytes >> 20);
    log_info("engine", "weights  %zu MB", model_weight_bytes(e->model) >> 20);
    log_info("engine", "scratch  %zu MB", scratch_bytes >> 20);
    log_info("engine", "KV pool  %zu MB: %u blocks, %llu tokens, index included",
             (pool->blocks * kv + pool->index_blocks * index) >> 20, pool->blocks,
             (unsigned long long)pool->blocks * BLOCK_TOKENS);
    if (pool->host_blocks)
        log_info("engine", "host tier %zu MB: %u blocks, %llu tokens; index of %u blocks more and "
                 "%zu MB of hot rows on the device, %d sets of %d a head",
                 (pool->host_blocks * (kv + index)) >> 20, pool->host_blocks,
                 (unsigned long long)pool->host_blocks * BLOCK_TOKENS,
                 pool->index_blocks - pool->blocks,
                 sets->sets ? hot_sets_bytes(sets) >> 20 : 0, sets->sets, sets->rows_per_head);
    log_info("engine", "contexts up to %u tokens, sparse beyond %d", e->max_model_len,
             e->select.config.crossover_tokens);
}

/* What the KV pool may take.  On a GPU scratch comes out of the same share; how much that
 * is depends, a little, on the longest context and so on the pool, for which the model's
 * limit stands here. */
static enum status pool_bytes(const struct engine *e, const struct engine_config *cfg,
                              uint64_t *out, struct error *err)
{
    const struct device_info *info = backend_info(e->be);
    const struct model_config *m = model_config(e->model);

    *out = cfg->kv_bytes ? cfg->kv_bytes : info->mem_bytes / 4 / (cfg->sharers ? cfg->sharers : 1);
    if (cfg->kv_bytes || info->host_visible)
        return ST_OK;
    uint32_t longest = cfg->max_model_len ? cfg->max_model_len : (uint32_t)m->max_position;
    struct model_limits limits = step_limits(cfg, logit_rows(cfg, m->vocab), longest);
    if (cfg->host_kv_bytes && cfg->max_model_len && limits.max_rows < STREAM_TOKENS)
        limits.max_rows = STREAM_TOKENS;         /* it may stream */
    uint64_t share = info->mem_bytes / 1000 * cfg->gpu_memory_thousandths;
    uint64_t used = info->mem_bytes - backend_memory_free(e->be);
    uint64_t scratch = model_scratch_bytes(e->model, &limits, &e->select);
    if (share < used + scratch)
        return error_set(err, ST_NODEVMEM,
                         "%s: gpu-memory-fraction allows %llu MB; %llu MB are in use, weights "
                         "included, and scratch takes %llu MB", info->name,
                         (unsigned long long)share >> 20, (unsigned long long)used >> 20,
                         (unsigned long long)scratch >> 20);
    *out = share - used - scratch;
    return ST_OK;
}

/* How the memory of the pool is divided: kv slots, and with a host tier the index of blocks whose K
 * and V are not on the device, and hot rows.  max_blocks: of the longest context. */
struct division {
    struct kv_pool_config pool;
    struct hot_sets_config sets;     /* sets 0: none */
    uint64_t aside;                  /* bytes that are not kv slots with their index */
};

static uint32_t at_most(uint64_t n, uint64_t most)
{
    return (uint32_t)(n < most ? n : most);
}

/* As many sets as were asked for, or as longest contexts fit the host tier, but no more than take,
 * with the index of such contexts, half of the device's bytes. */
static int count_sets(const struct engine_config *cfg, const struct division *d, uint64_t bytes)
{
    struct hot_sets_config one = d->sets;
    uint64_t index = (uint64_t)d->pool.layers * index_block_bytes(&d->pool.shape);
    uint64_t longest = (uint64_t)one.max_blocks, n = d->pool.host_blocks / longest;

    one.sets = 1;
    uint64_t affordable = bytes / 2 / (hot_sets_bytes(&one) + longest * index);
    n = cfg->offload_sequences ? cfg->offload_sequences : n < affordable ? n : affordable;
    return (int)at_most(n ? n : 1, cfg->max_running);
}

/* Blocks of contexts with a set, whose index is on the device. */
static uint32_t away_index_blocks(const struct division *d)
{
    return at_most((uint64_t)d->sets.sets * (uint64_t)d->sets.max_blocks, d->pool.host_blocks);
}

/* Device memory of the sets, with so many rows a head, and of that index. */
static uint64_t aside_bytes(const struct division *d, int rows)
{
    struct hot_sets_config sets = d->sets;
    uint64_t index = (uint64_t)d->pool.layers * index_block_bytes(&d->pool.shape);

    sets.rows_per_head = rows;
    return hot_sets_bytes(&sets) + away_index_blocks(d) * index;
}

/* More hot rows find more (docs/PERFORMANCE.md): as many as leave half of the memory to the pool,
 * and room in it for the longest context where there was.  A context that has to stream needs
 * the memory itself. */
static uint32_t grow_hot_rows(const struct engine_config *cfg, const struct division *d,
                              uint32_t kept, uint64_t bytes)
{
    uint64_t longest = (uint64_t)d->sets.max_blocks *
                       kv_pool_bytes_per_block(&d->pool.shape, d->pool.layers);
    uint64_t least = bytes / 2, rows = (uint64_t)d->sets.rows_per_head;
    uint64_t most = at_most(HOT_ROWS_GROWN * (uint64_t)kept, HOT_MOST_ROWS);
    bool fits = aside_bytes(d, (int)rows) + longest <= bytes;

    if (cfg->max_model_len && !fits)
        return (uint32_t)rows;
    if (fits && least < longest)
        least = longest;
    for (uint64_t more = rows + kept; more <= most; more += kept) {
        if (aside_bytes(d, (int)more) + least > bytes)
            break;
        rows = more;
    }
    return (uint32_t)rows;
}

static enum status plan_sets(const struct engine *e, const struct engine_config *cfg,
                             uint32_t max_blocks, uint64_t bytes, struct division *d,
                             struct error *err)
{
    uint32_t kept = (uint32_t)e->select.max_keep_tokens;
    uint32_t rows = cfg->hot_rows ? cfg->hot_rows : HOT_ROWS_LEAST * kept;

    if (kept > HOT_MOST_ROWS)
        return error_set(err, ST_INVALID, "a host tier works with up to %d kept tokens, not %u",
                         HOT_MOST_ROWS, kept);
    if (rows < kept)
        return error_set(err, ST_INVALID, "hot-rows is %u; a step reads up to %u", rows, kept);
    d->sets = (struct hot_sets_config){
        .layers = d->pool.layers, .shape = d->pool.shape, .max_blocks = (int)max_blocks,
        .rows_per_head = (int)at_most(rows, HOT_MOST_ROWS),
    };
    d->sets.sets = count_sets(cfg, d, bytes);
    if (!cfg->hot_rows)
        d->sets.rows_per_head = (int)grow_hot_rows(cfg, d, kept, bytes);
    return ST_OK;
}

/* Blocks of the longest context: as was asked for, or else what the pool could hold at most. */
static uint32_t longest_blocks(const struct engine *e, const struct engine_config *cfg,
                               uint64_t of_pool)
{
    uint64_t tokens = cfg->max_model_len ? cfg->max_model_len
                                         : (uint64_t)model_config(e->model)->max_position;
    uint64_t blocks = (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;

    return at_most(blocks, cfg->max_model_len ? UINT32_MAX : of_pool);
}

/* What sequences that are not all on the device need there: hot rows, their index and, where the
 * longest is asked for and longer than the pool, two buffers for it to pass through.  bytes: of the
 * device; block: of K, V and index. */
static enum status set_aside(const struct engine *e, const struct engine_config *cfg,
                             uint64_t bytes, size_t block, struct division *d, struct error *err)
{
    const struct kv_pool_config *pool = &d->pool;
    uint32_t longest = longest_blocks(e, cfg, bytes / block + 1);

    if (!select_is_everywhere(&e->select)) {
        log_info("engine", "a layer is dense: no sequence can leave the device, and the host tier "
                 "is a prefix cache alone");
        return ST_OK;
    }
    TRY(plan_sets(e, cfg, longest, bytes, d, err));
    d->pool.index_blocks = away_index_blocks(d);
    d->aside = aside_bytes(d, d->sets.rows_per_head);
    if (cfg->max_model_len == 0 || d->aside + (uint64_t)longest * block <= bytes)
        return ST_OK;
    d->pool.staged_blocks = longest;
    d->aside += 2 * (uint64_t)longest * kv_block_bytes(&pool->shape);
    return ST_OK;
}

/* bytes: of the device, for all of it. */
static enum status divide(const struct engine *e, const struct engine_config *cfg,
                          const struct kv_shape *shape, uint64_t bytes, struct division *d,
                          struct error *err)
{
    int layers = model_config(e->model)->layers;
    size_t block = kv_pool_bytes_per_block(shape, layers);

    *d = (struct division){ .pool = { .layers = layers, .shape = *shape,
                                      .prefix_cache = cfg->prefix_cache } };
    d->pool.host_blocks = at_most(cfg->host_kv_bytes / block, INT32_MAX / 4);
    if (cfg->host_kv_bytes && !d->pool.host_blocks)
        return error_set(err, ST_INVALID, "host-kv-bytes is %llu; one block of 64 tokens takes %zu",
                         (unsigned long long)cfg->host_kv_bytes, block);
    if (d->pool.host_blocks)
        TRY(set_aside(e, cfg, bytes, block, d, err));
    d->pool.blocks = d->aside < bytes ? at_most((bytes - d->aside) / block, INT32_MAX / 4) : 0;
    d->pool.index_blocks += d->pool.blocks;
    /* Of what streams, a step is computed while the one before is on its way to the host. */
    uint32_t least = d->pool.staged_blocks ? 2 * (cfg->step_tokens / BLOCK_TOKENS + 2) : 1;
    if (d->pool.blocks >= least)
        return ST_OK;
    return error_set(err, ST_INVALID,
                     "%s %llu bytes for the KV pool; it needs %u blocks of %zu, and %llu for what "
                     "%d sequences off the device need on it",
                     cfg->kv_bytes ? "kv-cache-bytes gives" : "there are",
                     (unsigned long long)bytes, least, block, (unsigned long long)d->aside,
                     d->sets.sets);
}

static enum status open_tier(struct engine *e, const struct engine_config *cfg, struct division *d,
                             struct error *err)
{
    struct residency_context *r = &e->residency;
    struct host_tier_config tier = {
        .pool = e->pool, .blocks = d->pool.blocks, .host_blocks = d->pool.host_blocks,
        .layers = d->pool.layers, .shape = d->pool.shape, .wake = wake_engine, .arg = e,
        .before_copy = cfg->before_copy, .before_copy_arg = cfg->before_copy_arg,
    };

    *r = (struct residency_context){ .pool = e->pool, .stream = e->stream,
                                     .always = cfg->offload == OFFLOAD_ALWAYS };
    if (!d->pool.host_blocks)
        return ST_OK;
    TRY(host_tier_create(&r->tier, e->be, &tier, err));
    if (!d->sets.sets)
        return ST_OK;
    d->sets.host = host_tier_base(r->tier);
    d->sets.host_stride = host_tier_stride(r->tier);
    TRY(hot_sets_create(&r->sets, e->be, &d->sets, err));
    model_use_hot_sets(e->model, r->sets);
    return ST_OK;
}

static enum status carve_memory(struct engine *e, const struct engine_config *cfg,
                                const struct kv_shape *shape, struct error *err)
{
    const struct model_config *m = model_config(e->model);
    uint64_t kv_bytes = 0;
    struct division d;

    TRY(pool_bytes(e, cfg, &kv_bytes, err));
    TRY(divide(e, cfg, shape, kv_bytes, &d, err));
    TRY(resolve_length(e, cfg, &d.pool, err));
    d.sets.max_blocks = (int)((e->max_model_len + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
    e->step_tokens = cfg->step_tokens;
    e->max_logit_rows = logit_rows(cfg, m->vocab);
    struct model_limits limits = step_limits(cfg, e->max_logit_rows, e->max_model_len);
    limits.staged_blocks = (int)d.pool.staged_blocks;
    e->alone_tokens = alone_tokens(cfg, &d.pool);
    limits.max_rows = (int)e->alone_tokens;
    TRY(kv_pool_create(&e->pool, e->be, &d.pool, err));
    TRY(open_tier(e, cfg, &d, err));
    if (cfg->check_invariants)
        kv_pool_poison(e->pool, e->residency.tier ? host_tier_base(e->residency.tier) : NULL);
    size_t scratch_bytes = model_scratch_bytes(e->model, &limits, &e->select);
    TRY(model_prepare(e->model, &limits, &e->select, err));
    e->step = (struct step_context){
        .model = e->model, .trie = e->trie, .stream = e->stream, .pool = e->pool,
        .select = &e->select,
        .eos = m->eos, .n_eos = m->n_eos, .max_blocks = (uint32_t)limits.max_blocks,
        .only_held = cfg->offload == OFFLOAD_ALWAYS,
        .packed = mem_calloc(cfg->max_running, sizeof *e->step.packed), .dump = e->step.dump,
    };
    if (e->step.dump)
        selection_dump_use(e->step.dump, e->pool, e->residency.sets);
    log_memory(e, &d.pool, scratch_bytes, &d.sets);
    return ST_OK;
}

static enum status open_dump(struct engine *e, const struct engine_config *cfg, struct error *err)
{
    if (!cfg->selection_dump)
        return ST_OK;
    return selection_dump_open(&e->step.dump, e->model, &(struct selection_dump_config){
        .path = cfg->selection_dump, .max_bytes = cfg->selection_dump_bytes,
        .nth_layer = cfg->selection_dump_nth_layer, .max_seqs = (int)cfg->max_running,
        .plan = &e->select, .be = e->be, .stream = e->stream }, err);
}

/* At least one request, or a share would be none. */
static void make_shares(struct engine *e, const struct engine_config *cfg)
{
    uint64_t requests = (uint64_t)cfg->max_waiting * cfg->share_thousandths / 1000;

    e->n_shares = cfg->n_shares;
    e->shares = mem_calloc(e->n_shares, sizeof *e->shares);
    for (uint32_t i = 0; i < e->n_shares; i++) {
        e->shares[i].max_requests = requests ? (uint32_t)requests : 1;
        e->shares[i].max_tokens = cfg->max_waiting_tokens / 1000 * cfg->share_thousandths +
                                  cfg->max_waiting_tokens % 1000 * cfg->share_thousandths / 1000;
    }
}

static enum status engine_load(struct engine *e, const struct engine_config *cfg,
                               struct error *err)
{
    TRY(check_config(cfg, err));
    TRY(open_device(e, cfg, err));
    struct kv_shape shape = model_kv_shape(e->model, &cfg->select);
    TRY(plan_selection(e, cfg, &shape, err));
    e->stream = stream_create(e->be);
    TRY(open_dump(e, cfg, err));
    TRY(carve_memory(e, cfg, &shape, err));
    e->scheduler = scheduler_create(cfg->max_running);
    e->waiting.max_requests = cfg->max_waiting;
    e->waiting.max_tokens = cfg->max_waiting_tokens;
    e->published.max_rows = cfg->max_running;
    e->published.rows = mem_calloc(cfg->max_running, SEQUENCE_WORDS * sizeof(uint64_t));
    make_shares(e, cfg);
    e->check_invariants = cfg->check_invariants;
    return ST_OK;
}

enum status engine_create(struct engine **out, const struct engine_config *cfg,
                          struct mailbox *to_loop, struct error *err)
{
    struct engine *e = mem_calloc(1, sizeof *e);
    char name[16];

    *out = NULL;
    e->to_loop = to_loop;
    e->wake_fd = eventfd(0, EFD_CLOEXEC);
    ASSERT(e->wake_fd >= 0);
    e->inbox = mailbox_create(wake_engine, e);
    enum status st = engine_load(e, cfg, err);
    if (st == ST_OK) {                 /* whoever sees the engine sees its sizes */
        e->stats.last_step_ns = clock_now_ns();
        engine_publish(e);
    }
    if (st == ST_OK && pthread_create(&e->thread, NULL, engine_thread, e) != 0)
        st = error_set(err, ST_NOMEM, "the engine's thread does not start");
    if (st != ST_OK) {
        engine_destroy(e);
        return st;
    }
    e->started = true;
    snprintf(name, sizeof name, "engine %u", cfg->number);
    pthread_setname_np(e->thread, name);
    *out = e;
    return ST_OK;
}

void engine_stop(struct engine *e)
{
    if (!e->started)
        return;
    atomic_store(&e->draining, true);
    atomic_store(&e->stopping, true);
    wake_engine(e);
    pthread_join(e->thread, NULL);
    e->started = false;
}

void engine_destroy(struct engine *e)
{
    if (!e)
        return;
    engine_stop(e);
    scheduler_destroy(e->scheduler);
    host_tier_destroy(e->residency.tier);
    kv_pool_destroy(e->pool);
    token_trie_destroy(e->trie);
    tokenizer_close(e->tok);
    if (e->stream)
        stream_destroy(e->stream);
    model_close(e->model);
    hot_sets_destroy(e->residency.sets);
    selection_dump_close(e->step.dump);
    backend_close(e->be);
    mailbox_destroy(e->inbox);
    mem_free(e->channels);
    mem_free(e->shares);
    mem_free(e->published.rows);
    mem_free(e->step.packed);
    close(e->wake_fd);
    mem_free(e);
}

enum status engine_count_gpus(int *out, struct error *err)
{
    return backend_count_gpus(out, err);
}

const struct model_config *engine_model(const struct engine *e)
{
    return model_config(e->model);
}

uint32_t engine_max_model_len(const struct engine *e)
{
    return e->max_model_len;
}

const char *engine_device_name(const struct engine *e)
{
    return backend_info(e->be)->name;
}

const struct tokenizer *engine_tokenizer(const struct engine *e)
{
    return e->tok;
}
