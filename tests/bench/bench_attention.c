/* Attention of the CPU back end, one layer, at growing contexts: a chunk of prefill,
 * and one token decoded with full and with two-level attention.
 *
 *   bench-attention [heads] [kv_heads] [head_dim] [isa]
 *
 * Best of several runs.  Two-level: 64 blocks, then 1,024 tokens, as configured at
 * first. */

#include "engine/base/clock.h"
#include "engine/base/mem.h"
#include "kernels/ops.h"
#include "tests/support/random_data.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum {
    CHUNK = 512,
    KEEP_BLOCKS = 64,
    KEEP_TOKENS = 1024,
    SINKS = 4,
    RECENT = 64,
    MAX_TOKENS = 128 << 10,
    MAX_BLOCKS = MAX_TOKENS / BLOCK_TOKENS,
};

struct bench {
    struct backend *be;
    struct stream *stream;
    const struct backend_ops *ops;
    struct kv_shape shape;
    int heads;
    float *q, *out, *k, *cos_sin;
    bf16 *kv;
    uint8_t *index;
    int32_t *table, *positions, *kept, *chosen, *n_kept, *n_chosen;
    void *scratch;
};

static void *map(size_t bytes)
{
    void *p = mem_map(bytes, 2u << 20);

    if (!p) {
        fprintf(stderr, "bench-attention: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return p;
}

static void fill_pool(struct bench *b)
{
    struct test_random r = test_random(1);
    int dim = b->shape.head_dim;

    for (int i = 0; i < CHUNK * dim; i++)
        b->cos_sin[i] = i % dim < dim / 2 ? 1 : 0; /* no rotation */
    for (int from = 0; from < MAX_TOKENS; from += CHUNK) {
        random_floats(&r, b->k, (size_t)(CHUNK * b->shape.kv_heads * dim), 1);
        for (int i = 0; i < CHUNK; i++) {
            b->positions[i] = from + i;
            b->table[MAX_BLOCKS + i] = (from + i) / BLOCK_TOKENS;
        }
        b->ops->rope_store(b->stream, &(struct rope_store_args){
            .q = b->out, .k = b->k, .v = b->k, .qkv_stride_q = b->heads * dim,
            .qkv_stride_k = b->shape.kv_heads * dim, .qkv_stride_v = b->shape.kv_heads * dim,
            .cos_sin = b->cos_sin, .positions = b->positions, .kv_block = b->table + MAX_BLOCKS,
            .index_block = b->table + MAX_BLOCKS, .kv = b->kv, .index = b->index,
            .shape = b->shape, .rows = CHUNK, .heads = b->heads, .eps = 1e-6f });
    }
}

static void dense(struct bench *b, int n_tokens, int rows)
{
    int32_t first = 0;

    b->ops->attend_dense(b->stream, &(struct attend_dense_args){
        .out = b->out, .q = b->q, .q_stride = b->heads * b->shape.head_dim, .kv = b->kv,
        .table = b->table, .first_row = &first, .n_rows = &rows, .n_tokens = &n_tokens,
        .shape = b->shape, .seqs = 1, .heads = b->heads, .max_blocks = MAX_BLOCKS,
        .max_n_rows = rows, .max_n_tokens = n_tokens,
        .scale = 1 / sqrtf((float)b->shape.head_dim) });
}

static void filter(struct bench *b, int n_tokens)
{
    b->ops->block_filter(b->stream, &(struct block_filter_args){
        .kept = b->kept, .n_kept = b->n_kept, .q = b->q,
        .q_stride = b->heads * b->shape.head_dim, .index = b->index, .table = b->table,
        .n_tokens = &n_tokens, .scratch = b->scratch, .shape = b->shape, .seqs = 1,
        .heads = b->heads, .max_blocks = MAX_BLOCKS, .keep_blocks = KEEP_BLOCKS,
        .sink_tokens = SINKS, .recent_tokens = RECENT, .max_n_tokens = n_tokens });
}

static void choose(struct bench *b, int n_tokens)
{
    b->ops->token_select(b->stream, &(struct token_select_args){
        .chosen = b->chosen, .n_chosen = b->n_chosen, .kept = b->kept, .n_kept = b->n_kept,
        .q = b->q, .q_stride = b->heads * b->shape.head_dim, .index = b->index,
        .table = b->table, .n_tokens = &n_tokens, .scratch = b->scratch, .shape = b->shape,
        .seqs = 1, .heads = b->heads, .max_blocks = MAX_BLOCKS, .keep_blocks = KEEP_BLOCKS,
        .keep_tokens = KEEP_TOKENS, .sink_tokens = SINKS, .recent_tokens = RECENT });
}

static void selected(struct bench *b, int n_tokens)
{
    (void)n_tokens;
    b->ops->attend_selected(b->stream, &(struct attend_selected_args){
        .out = b->out, .q = b->q, .q_stride = b->heads * b->shape.head_dim, .kv = b->kv,
        .table = b->table, .chosen = b->chosen, .n_chosen = b->n_chosen, .shape = b->shape,
        .seqs = 1, .heads = b->heads, .max_blocks = MAX_BLOCKS, .keep_tokens = KEEP_TOKENS,
        .scale = 1 / sqrtf((float)b->shape.head_dim) });
}

static void dense_token(struct bench *b, int n_tokens)
{
    dense(b, n_tokens, 1);
}

static void dense_chunk(struct bench *b, int n_tokens)
{
    dense(b, n_tokens, CHUNK);
}

static double microseconds(struct bench *b, void (*fn)(struct bench *, int), int n_tokens,
                           int runs)
{
    double best = 1e12;

    for (int i = 0; i < runs; i++) {
        uint64_t start = clock_now_ns();
        fn(b, n_tokens);
        double us = (double)(clock_now_ns() - start) * 1e-3;
        best = us < best ? us : best;
    }
    return best;
}

static void measure(struct bench *b, int n_tokens)
{
    double chunk = microseconds(b, dense_chunk, n_tokens, 3);
    double pairs = (double)CHUNK * n_tokens - 0.5 * CHUNK * (CHUNK - 1);
    double full = microseconds(b, dense_token, n_tokens, 20);
    double level1 = microseconds(b, filter, n_tokens, 20);
    double level2 = microseconds(b, choose, n_tokens, 20);
    double sparse = microseconds(b, selected, n_tokens, 20);
    double bytes = 4.0 * n_tokens * b->shape.kv_heads * b->shape.head_dim;

    printf("%8d %10.1f %8.0f %10.0f %8.1f %8.0f %8.0f %8.0f %8.0f %7.1f\n", n_tokens,
           chunk * 1e-3, 4 * pairs * b->heads * b->shape.head_dim / chunk * 1e-3, full,
           bytes / full * 1e-3, level1, level2, sparse, level1 + level2 + sparse,
           full / (level1 + level2 + sparse));
}

static void open_bench(struct bench *b, const char *isa)
{
    struct backend_options options = { .isa = isa };
    struct error err;
    size_t dim = (size_t)b->shape.head_dim, heads = (size_t)b->heads;

    if (backend_open(&b->be, "cpu", &options, &err) != ST_OK) {
        fprintf(stderr, "bench-attention: %s\n", err.text);
        exit(1);
    }
    b->stream = stream_create(b->be);
    b->ops = backend_ops(b->be);
    struct shape_query query = { .dim = 1, .mlp_dim = 1, .heads = b->heads, .vocab = 1,
                                 .kv = b->shape };
    if (!b->ops->supports(&query, &err)) {
        fprintf(stderr, "bench-attention: %s\n", err.text);
        exit(1);
    }
    b->q = map(CHUNK * heads * dim * sizeof *b->q);
    b->out = map(CHUNK * heads * dim * sizeof *b->out);
    b->k = map(CHUNK * heads * dim * sizeof *b->k);
    b->cos_sin = map(CHUNK * dim * sizeof *b->cos_sin);
    b->kv = map(MAX_BLOCKS * kv_block_bytes(&b->shape));
    b->index = map(MAX_BLOCKS * index_block_bytes(&b->shape));
    b->table = map((MAX_BLOCKS + CHUNK) * sizeof *b->table);
    b->positions = map(CHUNK * sizeof *b->positions);
    b->kept = map(heads * KEEP_BLOCKS * sizeof *b->kept);
    b->chosen = map(heads * KEEP_TOKENS * sizeof *b->chosen);
    b->n_kept = map(heads * sizeof *b->n_kept);
    b->n_chosen = map(heads * sizeof *b->n_chosen);
    size_t first = b->ops->block_filter_scratch(&b->shape, 1, b->heads, MAX_BLOCKS);
    size_t second = b->ops->token_select_scratch(&b->shape, 1, b->heads, KEEP_BLOCKS);
    b->scratch = map(first > second ? first : second);
    for (int i = 0; i < MAX_BLOCKS; i++)
        b->table[i] = i;
    fill_pool(b);
    struct test_random r = test_random(2);
    random_floats(&r, b->q, CHUNK * heads * dim, 1);
}

/* Mapped memory goes with the process. */
int main(int argc, char **argv)
{
    struct bench b = { .heads = argc > 1 ? (int)strtol(argv[1], NULL, 10) : 32 };

    b.shape = (struct kv_shape){
        .kv_heads = argc > 2 ? (int)strtol(argv[2], NULL, 10) : 8,
        .head_dim = argc > 3 ? (int)strtol(argv[3], NULL, 10) : 128,
        .filter = FILTER_COARSE,
        .index = INDEX_ROTATED,
    };
    if (b.heads < 1 || b.shape.kv_heads < 1 || b.shape.head_dim < 1) {
        fprintf(stderr, "usage: bench-attention [heads] [kv_heads] [head_dim] [isa]\n");
        return 2;
    }
    open_bench(&b, argc > 4 ? argv[4] : NULL);
    printf("\nattention, one layer, %d heads on %d of %d, %s\n", b.heads, b.shape.kv_heads,
           b.shape.head_dim, backend_info(b.be)->name);
    printf("         chunk of %d rows     full, 1 token     two levels, 1 token, us\n"
           "  tokens         ms  GFLOP/s         us     GB/s   blocks   tokens   attend      sum"
           "  faster\n", CHUNK);
    for (int n = 4096; n <= MAX_TOKENS; n *= 2)
        measure(&b, n);
    stream_destroy(b.stream);
    backend_close(b.be);
    return 0;
}
