/* Two-level attention of one layer on the GPU over context length and batch, in a graph,
 * beside our own full attention and the time that reading all of K and V takes at the memory's
 * rate.
 *
 *   bench-gpu-two-level [heads] [kv_heads] [head_dim] [exact|lagged] [coarse|means] [tokens]
 *                       [batch] [keep_blocks]
 *
 * A head_dim of 576 is that of latent attention: 20 1 576 has the shape of GLM-4.7-Flash.  tokens
 * and batch: this line of the table alone, for a profiler; 0 is all.
 *
 * Several copies of the pool are used by turns where one would fit the cache.  Lagged, the calls of
 * a graph are steps of the same contexts, each a token longer, and all but the first choose among
 * the blocks of the call before. */

#include "engine/base/mem.h"
#include "kernels/ops.h"
#include "tests/bench/memory_rate.h"
#include "tests/support/gpu_bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KEEP_BLOCKS = 64 /* unless said */, KEEP_TOKENS = 1024, SINKS = 4, RECENT = 64, LAYERS = 8 };

struct bench {
    struct kv_shape shape;
    int heads, seqs, n_tokens, keep_blocks;
    struct attend_two_level_args args;
    struct attend_dense_args full;
    bool lags;
    struct lagged_blocks lagged;
    size_t layer_kv, layer_index;
    double gb_per_s;             /* of the memory */
};

/* One call a layer, each with a pool of its own. */
static void queue_layers(void *arg)
{
    struct bench *b = arg;

    for (int layer = 0; layer < LAYERS; layer++) {
        struct attend_two_level_args a = b->args;
        a.kv = (const bf16 *)(const void *)((const char *)a.kv + (size_t)layer * b->layer_kv);
        a.index += (size_t)layer * b->layer_index;
        a.n_tokens += layer * b->seqs;
        gpu_bench_ops()->attend_two_level(gpu_bench_stream(), &a);
    }
}

static void queue_full_layers(void *arg)
{
    struct bench *b = arg;

    for (int layer = 0; layer < LAYERS; layer++) {
        struct attend_dense_args a = b->full;
        a.kv = (const bf16 *)(const void *)((const char *)a.kv + (size_t)layer * b->layer_kv);
        gpu_bench_ops()->attend_dense(gpu_bench_stream(), &a);
    }
}

/* The same contexts, a row each. */
static double measure_full(struct bench *b)
{
    const struct attend_two_level_args *a = &b->args;
    int32_t *row = mem_alloc((size_t)b->seqs * sizeof *row);
    int32_t *one = mem_alloc((size_t)b->seqs * sizeof *one);

    for (int i = 0; i < b->seqs; i++) {
        row[i] = i;
        one[i] = 1;
    }
    b->full = (struct attend_dense_args){
        .out = a->out, .q = a->q, .q_stride = a->q_stride, .kv = a->kv, .table = a->kv_table,
        .first_row = gpu_bench_copy(row, (size_t)b->seqs * sizeof *row),
        .n_rows = gpu_bench_copy(one, (size_t)b->seqs * sizeof *one), .n_tokens = a->n_tokens,
        .scratch = gpu_bench_zero(gpu_bench_ops()->attend_dense_scratch(
            &b->shape, b->seqs, b->heads, a->max_blocks)),
        .shape = b->shape, .seqs = b->seqs, .heads = b->heads, .max_blocks = a->max_blocks,
        .max_n_rows = 1, .max_n_tokens = b->n_tokens, .only_last_is_new = true,
        .scale = a->scale };
    mem_free(row);
    mem_free(one);
    return gpu_bench_graph(queue_full_layers, b) / LAYERS;
}

static struct lagged_blocks empty_lists(const struct bench *b)
{
    size_t n = (size_t)(b->seqs * b->shape.kv_heads) * sizeof(int32_t);
    int32_t *slot = mem_alloc((size_t)b->seqs * sizeof *slot);

    for (int i = 0; i < b->seqs; i++)
        slot[i] = i;
    /* Of contexts of no tokens, which is as good as none. */
    struct lagged_blocks l = { .kept = gpu_bench_zero(n * (size_t)b->keep_blocks),
                               .n_kept = gpu_bench_zero(n), .n_tokens = gpu_bench_zero(n),
                               .slot = gpu_bench_copy(slot, (size_t)b->seqs * sizeof *slot) };
    mem_free(slot);
    return l;
}

static void measure(struct bench *b)
{
    int blocks = (b->n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS, dim = b->shape.head_dim;
    size_t rows = (size_t)(b->seqs * b->heads * dim);
    int32_t *table = mem_alloc((size_t)(b->seqs * blocks) * sizeof *table);
    int32_t *n_tokens = mem_alloc((size_t)(LAYERS * b->seqs) * sizeof *n_tokens);

    for (int i = 0; i < b->seqs * blocks; i++)
        table[i] = (int32_t)((int64_t)i * 7919 % (b->seqs * blocks)); /* a prime: scattered */
    for (int i = 0; i < LAYERS * b->seqs; i++)
        n_tokens[i] = b->n_tokens - (b->lags ? LAYERS - 1 - i / b->seqs : 0);
    b->layer_kv = (size_t)(b->seqs * blocks) * kv_block_bytes(&b->shape);
    b->layer_index = (size_t)(b->seqs * blocks) * index_block_bytes(&b->shape);
    b->args = (struct attend_two_level_args){
        .out = gpu_bench_zero(rows * sizeof(bf16)),
        .q = gpu_bench_random_bf16(rows),
        .q_stride = b->heads * dim,
        .kv = gpu_bench_random_bf16(LAYERS * b->layer_kv / sizeof(bf16)),
        .index = gpu_bench_random_index(LAYERS * b->layer_index, &b->shape),
        .kv_table = gpu_bench_copy(table, (size_t)(b->seqs * blocks) * sizeof *table),
        .n_tokens = gpu_bench_copy(n_tokens, (size_t)(LAYERS * b->seqs) * sizeof *n_tokens),
        .shape = b->shape, .seqs = b->seqs, .heads = b->heads, .max_blocks = blocks,
        .keep_blocks = b->keep_blocks, .keep_tokens = KEEP_TOKENS, .sink_tokens = SINKS,
        .recent_tokens = RECENT, .max_n_tokens = b->n_tokens,
        .scale = 1 / sqrtf((float)dim),
    };
    b->args.index_table = b->args.kv_table;
    if (b->lags) {
        b->lagged = empty_lists(b);
        b->args.lagged = &b->lagged;
    }
    b->args.scratch = gpu_bench_zero(gpu_bench_ops()->attend_two_level_scratch(
        &b->shape, b->seqs, b->heads, blocks, b->keep_blocks, KEEP_TOKENS));
    double us = gpu_bench_graph(queue_layers, b) / LAYERS;
    double floor_us = (double)b->layer_kv / b->gb_per_s * 1e-3, full_us = measure_full(b);
    printf("%8d %6d %10.1f %12.1f %8.1f %10.1f %8.1f %8.0f\n", b->n_tokens, b->seqs, us, floor_us,
           floor_us / us, full_us, full_us / us, 100 * floor_us / full_us);
    fflush(stdout);
    gpu_bench_forget();
    mem_free(table);
    mem_free(n_tokens);
}

int main(int argc, char **argv)
{
    static const int batches[] = { 1, 4, 8 };
    static const int lengths[] = { 1024, 2048, 4096, 8192, 16384, 32768, 49152, 98304, 131072 };
    bool means = argc > 5 && strcmp(argv[5], "means") == 0;
    int only_tokens = argc > 6 ? (int)strtol(argv[6], NULL, 10) : 0;
    int only_batch = argc > 7 ? (int)strtol(argv[7], NULL, 10) : 0;
    struct bench b = { .heads = argc > 1 ? (int)strtol(argv[1], NULL, 10) : 32,
                       .lags = argc > 4 && strcmp(argv[4], "lagged") == 0,
                       .keep_blocks = argc > 8 ? (int)strtol(argv[8], NULL, 10) : KEEP_BLOCKS };

    b.shape = (struct kv_shape){
        .kv_heads = argc > 2 ? (int)strtol(argv[2], NULL, 10) : 8,
        .head_dim = argc > 3 ? (int)strtol(argv[3], NULL, 10) : 128,
        .filter = means ? FILTER_MEANS : FILTER_COARSE,
        .index = INDEX_ROTATED,
    };
    if (b.shape.head_dim == 576)
        b.shape.latent_dim = 512;
    if (!gpu_bench_open())
        return 1;
    b.gb_per_s = memory_rate();
    printf("two-level attention%s%s, %d blocks, one layer, %d heads on %d of %d, us; \"all\" is "
           "reading all of K and V at %.0f GB/s\n"
           "  tokens  batch  two-level          all   faster       full   faster  full reads, %%\n",
           b.lags ? ", lagged" : "", means ? ", filter means" : "", b.keep_blocks, b.heads,
           b.shape.kv_heads, b.shape.head_dim, b.gb_per_s);
    for (size_t i = 0; i < sizeof batches / sizeof batches[0]; i++)
        for (size_t j = 0; j < sizeof lengths / sizeof lengths[0]; j++) {
            b.seqs = batches[i];
            b.n_tokens = lengths[j];
            if ((!only_tokens || b.n_tokens == only_tokens) &&
                (!only_batch || b.seqs == only_batch))
                measure(&b);
        }
    return 0;
}
