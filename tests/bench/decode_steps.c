#include "tests/bench/decode_steps.h"

#include "engine/base/clock.h"
#include "tests/support/gpu_bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_ROWS = 1024, MAX_LOGIT_ROWS = 2 * DECODE_MAX_SEQS, SPARE_BYTES = 512 << 20 };

void bench_check(enum status st, const struct error *err)
{
    if (st == ST_OK)
        return;
    fprintf(stderr, "benchmark: %s\n", err->text);
    exit(1);
}

int decode_blocks(int n_tokens)
{
    return (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

uint32_t decode_pool_blocks(const struct decodes *d)
{
    return (uint32_t)(d->batch * decode_blocks(d->n_tokens)) + 2 + DECODE_MAX_SEQS;
}

/* ---- what the steps work on */

void decode_open(struct decode_bench *b, const char *dir)
{
    struct select_config select = select_default();
    struct error err;

    bench_check(model_open(&b->model, gpu_bench_backend(), dir, NULL, &err), &err);
    const struct model_config *g = model_config(b->model);
    b->shape = model_kv_shape(b->model, &select);
    bench_check(select_plan_init(&b->plan, &select, &b->shape, g->layers, NULL, &err), &err);
    b->limits = (struct model_limits){
        .max_rows = MAX_ROWS, .max_seqs = DECODE_MAX_SEQS, .max_logit_rows = MAX_LOGIT_ROWS,
        .max_blocks = decode_blocks(g->max_position),
    };
}

void decode_prepare(struct decode_bench *b)
{
    struct error err;

    bench_check(model_prepare(b->model, &b->limits, &b->plan, &err), &err);
}

static void size_pool(struct decode_bench *b, uint32_t wanted, bool whole_index)
{
    size_t layers = (size_t)model_config(b->model)->layers;
    size_t kv = layers * kv_block_bytes(&b->shape), index = layers * index_block_bytes(&b->shape);
    size_t aside = SPARE_BYTES + (whole_index ? wanted * index : 0);
    size_t free_bytes = backend_memory_free(gpu_bench_backend()), fits = 0;

    if (free_bytes > aside)
        fits = (free_bytes - aside) / (whole_index ? kv : kv + index);
    b->blocks = fits < wanted ? (uint32_t)fits : wanted;
    b->index_blocks = whole_index ? wanted : b->blocks;
}

/* All layers get the same index, which no two of their blocks share. */
void decode_open_pool(struct decode_bench *b, uint32_t wanted, bool whole_index)
{
    int layers = model_config(b->model)->layers;
    struct error err;

    size_pool(b, wanted, whole_index);
    if (b->blocks == 0)
        return;
    struct kv_pool_config cfg = { .blocks = b->blocks, .index_blocks = b->index_blocks,
                                  .layers = layers, .shape = b->shape };
    bench_check(kv_pool_create(&b->pool, gpu_bench_backend(), &cfg, &err), &err);
    size_t index_bytes = b->index_blocks * index_block_bytes(&b->shape);
    gpu_bench_fill_index(kv_pool_index(b->pool, 0), index_bytes, &b->shape);
    for (int layer = 0; layer < layers; layer++) {
        gpu_bench_fill_bf16(kv_pool_kv(b->pool, layer),
                            b->blocks * kv_block_bytes(&b->shape) / sizeof(bf16));
        if (layer > 0)
            stream_copy(gpu_bench_stream(), kv_pool_index(b->pool, layer),
                        kv_pool_index(b->pool, 0), index_bytes);
    }
    bench_check(stream_sync(gpu_bench_stream(), &err), &err);
}

void decode_close(struct decode_bench *b)
{
    kv_pool_destroy(b->pool);
    model_close(b->model);
}

uint32_t decode_scatter(uint32_t slots, const struct decodes *d, int seq, int block)
{
    uint64_t number = (uint64_t)seq * (uint64_t)decode_blocks(d->n_tokens) + (uint64_t)block;
    uint32_t prime = 7919;

    if (slots % prime == 0 && slots > 1)
        slots--;
    return (uint32_t)(number * prime % slots);
}

/* The block that is written to is a context's own; the others lie scattered. */
static int32_t place(uint32_t slots, const struct decodes *d, int seq, int block)
{
    if (block == decode_blocks(d->n_tokens) - 1)
        return seq;
    return (int32_t)(DECODE_MAX_SEQS + decode_scatter(slots - DECODE_MAX_SEQS, d, seq, block));
}

bool decode_shares_blocks(const struct decode_bench *b, const struct decodes *d)
{
    return (uint32_t)(d->batch * (decode_blocks(d->n_tokens) - 1)) >= b->blocks - DECODE_MAX_SEQS;
}

const char *decode_refusal(const struct decode_bench *b, const struct decodes *d)
{
    if (b->blocks <= DECODE_MAX_SEQS)
        return "no memory for the pool";
    if (d->n_tokens > model_config(b->model)->max_position)
        return "longer than the model's contexts";
    return NULL;
}

/* ---- steps */

static void pack(struct decode_bench *b, const struct decodes *d, bool sparse)
{
    struct model_batch *batch = model_batch(b->model);
    size_t width = (size_t)b->limits.max_blocks;

    batch->rows = batch->seqs = batch->logit_rows = d->batch;
    batch->sparse_seqs = sparse ? d->batch : 0;
    for (int s = 0; s < d->batch; s++) {
        int32_t *kv = batch->kv_table + (size_t)s * width;
        int32_t *index = batch->index_table + (size_t)s * width;
        for (int i = 0; i < decode_blocks(d->n_tokens); i++) {
            kv[i] = place(b->blocks, d, s, i);
            index[i] = place(b->index_blocks, d, s, i);
        }
        batch->ids[s] = 1000 + s;
        batch->positions[s] = d->n_tokens - 1;
        batch->kv_block[s] = batch->index_block[s] = s;
        batch->first_row[s] = batch->rows_of[s] = s;
        batch->n_rows[s] = 1;
        batch->n_tokens[s] = d->n_tokens;
        if (batch->hot_set)
            batch->hot_set[s] = -1;
        batch->sample[s] = (struct sample_params){
            .temperature = 1, .top_p = 1, .repetition = 1, .seed = (uint64_t)s, .target = -1,
            .n_top = -1 };
    }
}

void decode_step(struct decode_bench *b, const struct decode_work *w)
{
    struct error err;

    pack(b, &w->d, w->sparse);
    if (w->change)
        w->change(w->arg, model_batch(b->model));
    bench_check(model_step(b->model, gpu_bench_stream(), b->pool, &err), &err);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return x < y ? -1 : x > y;
}

struct decode_timing decode_measure(struct decode_bench *b, const struct decode_work *w)
{
    double ms[DECODE_STEPS], host_ms[DECODE_STEPS];

    for (int i = -DECODE_WARM_UP; i < DECODE_STEPS; i++) {
        if (w->before)
            w->before(w->arg);
        uint64_t from = clock_now_ns(), waited = model_waited_ns(b->model);
        decode_step(b, w);
        if (i < 0)
            continue;
        ms[i] = (double)(clock_now_ns() - from) * 1e-6;
        host_ms[i] = ms[i] - (double)(model_waited_ns(b->model) - waited) * 1e-6;
    }
    qsort(ms, DECODE_STEPS, sizeof ms[0], by_value);
    qsort(host_ms, DECODE_STEPS, sizeof host_ms[0], by_value);
    return (struct decode_timing){ ms[DECODE_STEPS / 2], host_ms[DECODE_STEPS / 2] };
}

/* ---- bytes */

/* A row of the embedding is read for each token, all of it only by the logits when tied. */
double decode_weight_bytes(const struct decode_bench *b, int batch)
{
    const struct model_config *g = model_config(b->model);
    const struct moe_config *m = &g->moe;
    double embed = g->tied ? 0 : (double)g->vocab * g->hidden * sizeof(bf16), unread = 0;

    if (m->layers > 0)
        unread = m->experts * pow(1 - (double)m->chosen / m->experts, batch);
    return (double)model_weight_bytes(b->model) - embed
           - unread * m->layers * 3.0 * m->expert_mlp * g->hidden * sizeof(bf16);
}

/* Of a context in a layer: its rows; or the filter's sign plane and scales, the second plane
 * of the blocks it keeps and the rows of the tokens selected. */
double decode_context_bytes(const struct decode_bench *b, const struct decodes *d, bool sparse)
{
    const struct select_config *c = &b->plan.config;
    double heads = b->shape.kv_heads, dim = b->shape.head_dim, n = d->n_tokens;
    double blocks = decode_blocks(d->n_tokens), tokens = n < c->keep_tokens ? n : c->keep_tokens;
    double kept = blocks < c->keep_blocks ? blocks : c->keep_blocks;
    double row = (double)kv_row_dim(&b->shape) * sizeof(bf16), scales = 2 * index_parts(&b->shape);
    double layer = n * row;

    if (sparse)
        layer = n * (dim / 8 + scales) + kept * BLOCK_TOKENS * dim / 8 + tokens * row;
    return d->batch * model_config(b->model)->layers * heads * layer;
}

double decode_floor_ms(const struct decode_bench *b, const struct decodes *d, bool sparse,
                       double gb_per_s)
{
    double bytes = decode_weight_bytes(b, d->batch) + decode_context_bytes(b, d, sparse);

    return bytes / gb_per_s * 1e-6;
}
