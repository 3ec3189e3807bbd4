/* Whole decode steps of a model on the GPU, as the engine runs them: forward pass and
 * sampling by model_step(), replayed, with the one wait.
 *
 *   bench-gpu-step DIR [batch:context ...]       1:1024 and 8:98304 without any
 *
 * Nothing is prefilled: the pool holds random keys, values and index records, and every
 * step appends the same token at the same place.  Limits are the server's defaults.  Where
 * the pool cannot hold all contexts of a line they share blocks, each in an order of its
 * own, and the line says so: bytes are still read as often and from as many places, unless
 * two contexts happen to read a block within a moment of each other.
 *
 * The floor is the time of the bytes at the memory's rate: weights once, and K and V of the
 * contexts, or what the two levels read of index, K and V. */

#include "engine/base/clock.h"
#include "engine/base/mem.h"
#include "engine/kv/kv_pool.h"
#include "engine/model/model.h"
#include "tests/bench/memory_rate.h"
#include "tests/support/gpu_bench.h"

#include <stdio.h>
#include <stdlib.h>

enum { MAX_CASES = 16, MAX_SEQS = 64, MAX_ROWS = 1024, MAX_LOGIT_ROWS = 2 * MAX_SEQS,
       WARM_UP = 5, STEPS = 61, SPARE_BYTES = 512 << 20 };

struct decodes {
    int batch, n_tokens;
};

struct bench {
    struct model *model;
    struct kv_pool *pool;
    struct select_plan plan;
    struct model_limits limits;
    struct kv_shape shape;
    uint32_t blocks;             /* in the pool; the first MAX_SEQS hold contexts' ends */
    double gb_per_s;
};

struct timing {
    double ms, host_ms;          /* a step; of it not waiting for the device */
};

static void check(enum status st, const struct error *err)
{
    if (st == ST_OK)
        return;
    fprintf(stderr, "benchmark: %s\n", err->text);
    exit(1);
}

static int blocks_of(int tokens)
{
    return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

static bool parse_case(const char *text, struct decodes *out)
{
    char end;

    return sscanf(text, "%d:%d%c", &out->batch, &out->n_tokens, &end) == 2
           && out->batch >= 1 && out->batch <= MAX_SEQS && out->n_tokens >= 1;
}

/* ---- what the steps work on */

static void open_model(struct bench *b, const char *dir)
{
    struct select_config select = select_default();
    struct error err;

    check(model_open(&b->model, gpu_bench_backend(), dir, NULL, &err), &err);
    const struct model_config *g = model_config(b->model);
    b->shape = model_kv_shape(b->model, &select);
    check(select_plan_init(&b->plan, &select, &b->shape, g->layers, NULL, &err), &err);
    b->limits = (struct model_limits){
        .max_rows = MAX_ROWS, .max_seqs = MAX_SEQS, .max_logit_rows = MAX_LOGIT_ROWS,
        .max_blocks = blocks_of(g->max_position),
    };
    check(model_prepare(b->model, &b->limits, &b->plan, &err), &err);
}

/* All layers get the same index, which no two of their blocks share. */
static void open_pool(struct bench *b, uint32_t wanted)
{
    int layers = model_config(b->model)->layers;
    size_t free_bytes = backend_memory_free(gpu_bench_backend());
    size_t fits = free_bytes > SPARE_BYTES
        ? (free_bytes - SPARE_BYTES) / kv_pool_bytes_per_block(&b->shape, layers) : 0;
    struct error err;

    b->blocks = fits < wanted ? (uint32_t)fits : wanted;
    struct kv_pool_config cfg = { .blocks = b->blocks, .layers = layers, .shape = b->shape };
    check(kv_pool_create(&b->pool, gpu_bench_backend(), &cfg, &err), &err);
    size_t index_bytes = b->blocks * index_block_bytes(&b->shape);
    gpu_bench_fill_index(kv_pool_index(b->pool, 0), index_bytes, &b->shape);
    for (int layer = 0; layer < layers; layer++) {
        gpu_bench_fill_bf16(kv_pool_kv(b->pool, layer),
                            b->blocks * kv_block_bytes(&b->shape) / sizeof(bf16));
        if (layer > 0)
            stream_copy(gpu_bench_stream(), kv_pool_index(b->pool, layer),
                        kv_pool_index(b->pool, 0), index_bytes);
    }
    check(stream_sync(gpu_bench_stream(), &err), &err);
}

/* The block that is written to is a context's own; the others lie scattered. */
static int32_t place(const struct bench *b, const struct decodes *d, int s, int block)
{
    int own = blocks_of(d->n_tokens);
    uint32_t rest = b->blocks - MAX_SEQS, prime = 7919;

    if (block == own - 1)
        return s;
    if (rest % prime == 0)
        rest--;
    return (int32_t)(MAX_SEQS + ((uint64_t)s * (uint64_t)own + (uint64_t)block) * prime % rest);
}

static bool shares_blocks(const struct bench *b, const struct decodes *d)
{
    return (uint32_t)(d->batch * (blocks_of(d->n_tokens) - 1)) >= b->blocks - MAX_SEQS;
}

static void pack(struct bench *b, const struct decodes *d, bool sparse)
{
    struct model_batch *batch = model_batch(b->model);
    size_t width = (size_t)b->limits.max_blocks;

    batch->rows = batch->seqs = batch->logit_rows = d->batch;
    batch->sparse_seqs = sparse ? d->batch : 0;
    for (int s = 0; s < d->batch; s++) {
        int32_t *kv = batch->kv_table + (size_t)s * width;
        int32_t *index = batch->index_table + (size_t)s * width;
        for (int i = 0; i < blocks_of(d->n_tokens); i++)
            kv[i] = index[i] = place(b, d, s, i);
        batch->ids[s] = 1000 + s;
        batch->positions[s] = d->n_tokens - 1;
        batch->kv_block[s] = batch->index_block[s] = s;
        batch->first_row[s] = batch->rows_of[s] = s;
        batch->n_rows[s] = 1;
        batch->n_tokens[s] = d->n_tokens;
        batch->sample[s] = (struct sample_params){
            .temperature = 1, .top_p = 1, .repetition = 1, .seed = (uint64_t)s, .target = -1,
            .n_top = -1 };
    }
}

/* ---- measuring */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return x < y ? -1 : x > y;
}

static struct timing measure(struct bench *b, const struct decodes *d, bool sparse)
{
    double ms[STEPS], host_ms[STEPS];
    struct error err;

    for (int i = -WARM_UP; i < STEPS; i++) {
        uint64_t from = clock_now_ns(), waited = model_waited_ns(b->model);
        pack(b, d, sparse);
        check(model_step(b->model, gpu_bench_stream(), b->pool, &err), &err);
        if (i < 0)
            continue;
        ms[i] = (double)(clock_now_ns() - from) * 1e-6;
        host_ms[i] = ms[i] - (double)(model_waited_ns(b->model) - waited) * 1e-6;
    }
    qsort(ms, STEPS, sizeof ms[0], by_value);
    qsort(host_ms, STEPS, sizeof host_ms[0], by_value);
    return (struct timing){ ms[STEPS / 2], host_ms[STEPS / 2] };
}

/* A row of the embedding is read for each token, all of it only by the logits when tied. */
static double weight_bytes(const struct bench *b)
{
    const struct model_config *g = model_config(b->model);
    double embed = g->tied ? 0 : (double)g->vocab * g->hidden * sizeof(bf16);

    return (double)model_weight_bytes(b->model) - embed;
}

/* Of a context in a layer: K and V; or the filter's sign plane and scales, the second plane
 * of the blocks it keeps and the tokens selected. */
static double context_bytes(const struct bench *b, int n_tokens, bool sparse)
{
    const struct select_config *c = &b->plan.config;
    double heads = b->shape.kv_heads, dim = b->shape.head_dim;
    double blocks = blocks_of(n_tokens) < c->keep_blocks ? blocks_of(n_tokens) : c->keep_blocks;
    double tokens = n_tokens < c->keep_tokens ? n_tokens : c->keep_tokens;

    if (!sparse)
        return n_tokens * heads * dim * 4;
    return heads * (n_tokens * (dim / 8 + 2) + blocks * BLOCK_TOKENS * dim / 8 + tokens * dim * 4);
}

static double floor_ms(const struct bench *b, const struct decodes *d, bool sparse)
{
    double bytes = weight_bytes(b) + (double)d->batch * model_config(b->model)->layers
                                     * context_bytes(b, d->n_tokens, sparse);

    return bytes / b->gb_per_s * 1e-6;
}

static void report(struct bench *b, const struct decodes *d)
{
    if (d->n_tokens > model_config(b->model)->max_position || b->blocks <= MAX_SEQS) {
        printf("%6d %8d  %s\n", d->batch, d->n_tokens, b->blocks <= MAX_SEQS
               ? "no memory for the pool" : "longer than the model's contexts");
        return;
    }
    struct timing sparse = measure(b, d, true), full = measure(b, d, false);
    printf("%6d %8d %8.3f %8.3f %8.3f %9.3f %8.3f %8.3f%s\n", d->batch, d->n_tokens,
           sparse.ms, floor_ms(b, d, true), sparse.host_ms, full.ms, floor_ms(b, d, false),
           full.host_ms, shares_blocks(b, d) ? "  contexts share blocks: the pool is too small"
                                             : "");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    struct decodes cases[MAX_CASES] = { { 1, 1024 }, { 8, 98304 } };
    int n = argc > 2 ? argc - 2 : 2;
    uint32_t wanted = 0;
    struct bench b = { 0 };

    bool usable = argc > 1 && n <= MAX_CASES;
    for (int i = 0; i < argc - 2 && usable; i++)
        usable = parse_case(argv[i + 2], &cases[i]);
    if (!usable) {
        fprintf(stderr, "usage: bench-gpu-step DIR [batch:context ...], batches up to %d\n",
                MAX_SEQS);
        return 1;
    }
    if (!gpu_bench_open())
        return 1;
    b.gb_per_s = memory_rate();
    open_model(&b, argv[1]);
    for (int i = 0; i < n; i++) {
        uint32_t blocks = (uint32_t)(cases[i].batch * blocks_of(cases[i].n_tokens)) + 2 + MAX_SEQS;
        wanted = blocks > wanted ? blocks : wanted;
    }
    open_pool(&b, wanted);
    printf("memory is read at %.0f GB/s; %.2f GB of weights a step; the pool holds %llu tokens\n"
           "                 sparse                       full\n"
           " batch   tokens       ms    floor     host        ms    floor     host\n",
           b.gb_per_s, weight_bytes(&b) * 1e-9, (unsigned long long)b.blocks * BLOCK_TOKENS);
    for (int i = 0; i < n; i++)
        report(&b, &cases[i]);
    kv_pool_destroy(b.pool);
    model_close(b.model);
    return 0;
}
