#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/kv/kv_pool.h"
#include "engine/model/model_parts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Choosing index channels.  A channel's share of the scores is about the size
 * of the query there times the size of the key, so each KV head keeps the
 * channels with the largest mean |q| * mean |k|; the query heads that share a
 * KV head are averaged. */

enum { CHUNK_ROWS = 256 };

struct calibration {
    struct model *m;
    struct stream *s;
    struct buffer pinned;        /* for what the host cannot see */
    double *q, *k;               /* [layers][kv_heads][head_dim]  sums of magnitudes */
    enum status failed;
};

/* Device memory as the host can read it, until the next call. */
static const void *host_view(struct calibration *c, const void *device, size_t bytes)
{
    if (backend_info(c->m->be)->host_visible)
        return device;
    ASSERT(bytes <= c->pinned.bytes);
    stream_copy(c->s, c->pinned.base, device, bytes);
    if (c->failed == ST_OK)
        c->failed = stream_sync(c->s, NULL);
    return c->pinned.base;
}

static float bf16_value(bf16 v)
{
    uint32_t bits = (uint32_t)v << 16;
    float f;

    memcpy(&f, &bits, sizeof f);
    return f;
}

static float act_value(const void *act, enum dtype type, size_t i)
{
    return type == DTYPE_F32 ? ((const float *)act)[i] : bf16_value(((const bf16 *)act)[i]);
}

static void observe_queries(void *arg, int layer, const struct model_batch *batch,
                            const void *q, int q_stride)
{
    struct calibration *c = arg;
    const struct model_config *g = &c->m->config;
    const enum dtype act = backend_info(c->m->be)->act;
    const int group = g->heads / g->kv_heads;
    size_t stride = (size_t)q_stride;

    q = host_view(c, q, (size_t)batch->rows * stride * dtype_bytes(act));
    for (int row = 0; row < batch->rows; row++)
        for (int head = 0; head < g->heads; head++) {
            double *sum = c->q + (size_t)(layer * g->kv_heads + head / group)
                                 * (size_t)g->head_dim;
            size_t at = (size_t)row * stride + (size_t)(head * g->head_dim);
            for (int d = 0; d < g->head_dim; d++)
                sum[d] += fabs((double)act_value(q, act, at + (size_t)d));
        }
}

/* The keys of one layer, as they are stored. */
static void sum_keys(struct calibration *c, const struct kv_pool *pool, int layer,
                     const kv_block *blocks, uint32_t n_tokens)
{
    const struct model_config *g = &c->m->config;
    const struct select_config cfg = c->m->plan.config;
    const struct kv_shape shape = model_kv_shape(c->m, &cfg);
    const size_t block_bytes = kv_block_bytes(&shape), head_dim = (size_t)g->head_dim;
    const char *base = (const char *)kv_pool_kv(pool, layer);

    for (uint32_t first = 0; first < n_tokens; first += BLOCK_TOKENS) {
        size_t slot = (size_t)kv_pool_place(pool, blocks[first / BLOCK_TOKENS]).kv;
        const bf16 *kv = host_view(c, base + slot * block_bytes, block_bytes);
        uint32_t left = n_tokens - first, n = left < BLOCK_TOKENS ? left : BLOCK_TOKENS;
        for (int head = 0; head < g->kv_heads; head++) {
            double *sum = c->k + (size_t)(layer * g->kv_heads + head) * head_dim;
            const bf16 *keys = kv + (size_t)head * BLOCK_TOKENS * 2 * head_dim;
            for (uint32_t t = 0; t < n; t++)
                for (size_t d = 0; d < head_dim; d++)
                    sum[d] += fabs((double)bf16_value(keys[t * 2 * head_dim + d]));
        }
    }
}

/* Prefill all tokens, dense; nothing is sampled. */
static enum status prefill(struct calibration *c, struct kv_pool *pool, const kv_block *blocks,
                           const int32_t *ids, uint32_t n_ids, struct error *err)
{
    struct model_batch *b = model_batch(c->m);
    uint32_t n_blocks = (n_ids + BLOCK_TOKENS - 1) / BLOCK_TOKENS;

    for (uint32_t i = 0; i < n_blocks; i++) {
        struct block_place place = kv_pool_place(pool, blocks[i]);
        b->kv_table[i] = place.kv;
        b->index_table[i] = place.index;
    }
    for (uint32_t at = 0; at < n_ids; at += CHUNK_ROWS) {
        uint32_t n = n_ids - at < CHUNK_ROWS ? n_ids - at : CHUNK_ROWS;
        b->rows = (int)n;
        b->seqs = 1;
        b->sparse_seqs = b->logit_rows = 0;
        b->first_row[0] = 0;
        b->n_rows[0] = (int32_t)n;
        b->n_tokens[0] = (int32_t)(at + n);
        for (uint32_t r = 0; r < n; r++) {
            b->ids[r] = ids[at + r];
            b->positions[r] = (int32_t)(at + r);
            b->kv_block[r] = b->kv_table[(at + r) / BLOCK_TOKENS];
            b->index_block[r] = b->index_table[(at + r) / BLOCK_TOKENS];
        }
        TRY(model_step(c->m, c->s, pool, err));
    }
    for (int layer = 0; layer < c->m->config.layers; layer++)
        sum_keys(c, pool, layer, blocks, n_ids);
    if (c->failed != ST_OK)
        return error_set(err, c->failed, "calibration: the device failed");
    return ST_OK;
}

/* ---- choosing */

struct channel { double score; int number; };

static int by_score(const void *a, const void *b)
{
    const struct channel *x = a, *y = b;

    if (x->score != y->score)
        return x->score > y->score ? -1 : 1;
    return x->number - y->number;
}

static int by_number(const void *a, const void *b)
{
    return *(const int16_t *)a - *(const int16_t *)b;
}

static void choose(const struct calibration *c, int16_t *out)
{
    const struct model_config *g = &c->m->config;
    struct channel channels[MODEL_MAX_HEAD_DIM];

    for (int head = 0; head < g->layers * g->kv_heads; head++) {
        int16_t *kept = out + (size_t)head * INDEX_CHANNELS_KEPT;
        for (int d = 0; d < g->head_dim; d++) {
            size_t at = (size_t)head * (size_t)g->head_dim + (size_t)d;
            channels[d] = (struct channel){ c->q[at] * c->k[at], d };
        }
        qsort(channels, (size_t)g->head_dim, sizeof *channels, by_score);
        for (int i = 0; i < INDEX_CHANNELS_KEPT; i++)
            kept[i] = (int16_t)channels[i].number;
        qsort(kept, INDEX_CHANNELS_KEPT, sizeof *kept, by_number);
    }
}

/* ---- a model, a pool and a stream for one prefill */

/* All layers dense.  The index has to have some format; the channels of this
 * one are not read. */
static struct select_plan dense_plan(const struct model_config *g, const int16_t *channels)
{
    struct select_plan plan = { .config = select_default(), .n_layers = g->layers };

    plan.config.filter = FILTER_COARSE;
    plan.config.index = INDEX_CHANNELS;
    plan.config.layers = NULL;
    plan.channels = channels;
    plan.max_keep_blocks = plan.max_keep_tokens = 1;
    for (int l = 0; l < g->layers; l++)
        plan.layer[l] = (struct select_layer){ .dense = true, .keep_blocks = 1,
                                               .keep_tokens = 1 };
    plan.fingerprint = 1;
    return plan;
}

static enum status with_pool(struct calibration *c, const int32_t *ids, uint32_t n_ids,
                             struct error *err)
{
    const struct model_config *g = &c->m->config;
    uint32_t n_blocks = (n_ids + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    kv_block *blocks = mem_calloc(n_blocks, sizeof *blocks);
    struct kv_pool *pool = NULL;
    const struct kv_pool_config cfg = {
        .blocks = n_blocks,
        .layers = g->layers,
        .shape = model_kv_shape(c->m, &c->m->plan.config),
    };

    enum status st = kv_pool_create(&pool, c->m->be, &cfg, err);
    if (st == ST_OK) {
        st = kv_pool_take(pool, n_blocks, blocks);
        ASSERT(st == ST_OK);     /* a pool of its own has them all free */
        st = prefill(c, pool, blocks, ids, n_ids, err);
        for (uint32_t i = 0; i < n_blocks; i++) {
            kv_pool_release(pool, blocks[i]);
            kv_pool_unpin(pool, blocks[i]);
        }
    }
    kv_pool_destroy(pool);
    mem_free(blocks);
    return st;
}

static enum status prepare(struct calibration *c, uint32_t n_ids, struct error *err)
{
    const struct model_config *g = &c->m->config;
    const struct model_limits limits = {
        .max_rows = CHUNK_ROWS, .max_seqs = 1, .max_logit_rows = 1,
        .max_blocks = (int)((n_ids + BLOCK_TOKENS - 1) / BLOCK_TOKENS),
    };
    size_t heads = (size_t)(g->layers * g->kv_heads);
    size_t row = (size_t)((g->heads + 2 * g->kv_heads) * g->head_dim);  /* q, k and v */
    int16_t *channels = mem_calloc(heads * INDEX_CHANNELS_KEPT, sizeof *channels);

    for (size_t i = 0; i < heads * INDEX_CHANNELS_KEPT; i++)
        channels[i] = (int16_t)(i % INDEX_CHANNELS_KEPT);
    struct select_plan plan = dense_plan(g, channels);
    enum status st = model_prepare(c->m, &limits, &plan, err);
    mem_free(channels);
    TRY(st);
    struct kv_shape shape = model_kv_shape(c->m, &plan.config);
    size_t rows_bytes = CHUNK_ROWS * row * dtype_bytes(backend_info(c->m->be)->act);
    size_t block = kv_block_bytes(&shape);
    if (!backend_info(c->m->be)->host_visible
        && buffer_alloc(c->m->be, &c->pinned, MEM_PINNED,
                        rows_bytes > block ? rows_bytes : block) != ST_OK)
        return error_set(err, ST_NODEVMEM, "calibration: no memory to copy from the device");
    return ST_OK;
}

static enum status check_ids(const struct model_config *g, const int32_t *ids, uint32_t n_ids,
                             struct error *err)
{
    if (g->head_dim < INDEX_CHANNELS_KEPT)
        return error_set(err, ST_UNSUPPORTED, "calibration: heads of %d channels have no %d to "
                         "keep", g->head_dim, INDEX_CHANNELS_KEPT);
    int limit = g->sliding_window && g->sliding_window < g->max_position ? g->sliding_window
                                                                         : g->max_position;
    if (n_ids == 0 || n_ids > (uint32_t)limit)
        return error_set(err, ST_INVALID, "calibration: %u tokens; the model takes 1 to %d",
                         n_ids, limit);
    for (uint32_t i = 0; i < n_ids; i++)
        if (ids[i] < 0 || ids[i] >= g->vocab)
            return error_set(err, ST_INVALID, "calibration: token id %d is not below %d",
                             ids[i], g->vocab);
    return ST_OK;
}

enum status model_calibrate(struct model *m, const int32_t *ids, uint32_t n_ids,
                            int16_t *out, struct error *err)
{
    const struct model_config *g = &m->config;
    size_t sums = (size_t)(g->layers * g->kv_heads) * (size_t)g->head_dim;
    struct calibration c = { .m = m };

    ASSERT(!m->prepared && !g->latent.dim);
    TRY(check_ids(g, ids, n_ids, err));
    c.q = mem_calloc(sums, sizeof *c.q);
    c.k = mem_calloc(sums, sizeof *c.k);
    enum status st = prepare(&c, n_ids, err);
    if (st == ST_OK) {
        c.s = stream_create(m->be);
        model_observe(m, observe_queries, &c);
        st = with_pool(&c, ids, n_ids, err);
        model_observe(m, NULL, NULL);
        stream_destroy(c.s);
    }
    if (st == ST_OK)
        choose(&c, out);
    buffer_free(m->be, &c.pinned);
    mem_free(c.q);
    mem_free(c.k);
    return st;
}
