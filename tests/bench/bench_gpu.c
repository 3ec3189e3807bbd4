/* The operations that a step on the GPU consists of, each in a graph, at the shapes of
 * Qwen3-8B: products of few and many rows, attention of a decode step and of a prompt; attention
 * of a prompt at GLM-4.7-Flash's; and the experts of Qwen3-30B-A3B.
 *
 *   bench-gpu [memory] [decode] [prefill] [latent] [products] [experts]      all without any
 *
 * Weights and pools are used by turns, so that none is in the cache from the time before.
 * scripts/bench_torch.py measures PyTorch at the same shapes. */

#include "engine/base/mem.h"
#include "kernels/ops.h"
#include "tests/bench/memory_rate.h"
#include "tests/support/gpu_bench.h"
#include "tests/support/random_data.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { LAYERS = 8 };

/* ---- products */

struct products {
    struct linear_args args;
    size_t weight;               /* elements */
    int copies;
};

static void queue_products(void *arg)
{
    struct products *p = arg;

    for (int i = 0; i < p->copies; i++) {
        struct linear_args a = p->args;
        a.weight = (const bf16 *)a.weight + (size_t)i * p->weight;
        gpu_bench_ops()->linear(gpu_bench_stream(), &a);
    }
}

static void measure_product(const char *name, int in_dim, int out_dim, int rows)
{
    struct products p = { .weight = (size_t)in_dim * (size_t)out_dim };

    p.copies = (int)(400e6 / (double)(2 * p.weight)) + 1;
    p.args = (struct linear_args){
        .out = gpu_bench_zero((size_t)rows * (size_t)out_dim * sizeof(bf16)),
        .x = gpu_bench_random_bf16((size_t)rows * (size_t)in_dim),
        .weight = gpu_bench_random_bf16((size_t)p.copies * p.weight),
        .weight_type = DTYPE_BF16, .rows = rows, .in_dim = in_dim, .out_dim = out_dim,
        .out_stride = out_dim,
    };
    double us = gpu_bench_graph(queue_products, &p) / p.copies;
    printf("  %-8s %6d x %5d %6d %9.1f %8.0f %8.1f\n", name, out_dim, in_dim, rows, us,
           (double)(2 * p.weight) / us * 1e-3, 2 * (double)p.weight * rows / us * 1e-6);
    fflush(stdout);
    gpu_bench_forget();
}

static void measure_products(void)
{
    static const struct { const char *name; int in, out; } shapes[] = {
        { "qkv", 4096, 6144 }, { "o", 4096, 4096 }, { "gate/up", 4096, 24576 },
        { "down", 12288, 4096 }, { "head", 4096, 151936 },
    };
    static const int rows[] = { 1, 4, 8, 16, 32, 64, 2048 };

    printf("products                     rows        us     GB/s  TFLOP/s\n");
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        for (size_t j = 0; j < sizeof rows / sizeof rows[0]; j++)
            if (rows[j] <= 64 || shapes[i].out < 100000)
                measure_product(shapes[i].name, shapes[i].in, shapes[i].out, rows[j]);
}

/* ---- experts */

enum { EXPERTS = 128, CHOSEN = 8, EXPERT_DIM = 768, MODEL_DIM = 2048, EXPERT_LAYERS = 4,
       EXPERT_ELEMENTS = EXPERT_DIM * MODEL_DIM };

struct mixture {
    struct route_args route;
    struct experts_args args;
    const void *const *tables;   /* [EXPERT_LAYERS, 3, EXPERTS] */
};

static void queue_routes(void *arg)
{
    const struct mixture *m = arg;

    for (int layer = 0; layer < EXPERT_LAYERS; layer++)
        gpu_bench_ops()->route(gpu_bench_stream(), &m->route);
}

static void queue_experts(void *arg)
{
    const struct mixture *m = arg;

    for (int layer = 0; layer < EXPERT_LAYERS; layer++) {
        struct experts_args a = m->args;
        const void *const *tables = m->tables + layer * 3 * EXPERTS;
        a.matrices = (struct expert_weights){ tables, tables + EXPERTS, tables + 2 * EXPERTS,
                                              DTYPE_BF16 };
        gpu_bench_ops()->experts(gpu_bench_stream(), &a);
    }
}

static void *expert_tables(void)
{
    static const void *tables[EXPERT_LAYERS * 3 * EXPERTS];
    const bf16 *weights =
        gpu_bench_random_bf16((size_t)EXPERT_LAYERS * 3 * EXPERTS * EXPERT_ELEMENTS);

    for (size_t i = 0; i < EXPERT_LAYERS * 3 * EXPERTS; i++)
        tables[i] = weights + i * EXPERT_ELEMENTS;
    return gpu_bench_copy(tables, sizeof tables);
}

/* Different experts for each row, at random; the number of those that any row has. */
static int random_experts(int32_t *out, int rows)
{
    static bool used[EXPERTS];
    struct test_random r = test_random(5);
    int n = 0;

    memset(used, 0, sizeof used);
    for (int row = 0; row < rows; row++) {
        bool of_row[EXPERTS] = { false };
        for (int i = 0; i < CHOSEN; i++) {
            int e = random_below(&r, EXPERTS);
            while (of_row[e])
                e = (e + 1) % EXPERTS;
            of_row[e] = true;
            n += !used[e];
            used[e] = true;
            out[row * CHOSEN + i] = e;
        }
    }
    return n;
}

static void measure_mixture(int rows)
{
    const struct experts_shape shape = { rows, MODEL_DIM, EXPERT_DIM, EXPERTS, CHOSEN };
    size_t n = (size_t)rows * MODEL_DIM, pairs = (size_t)rows * CHOSEN;
    int32_t *experts = mem_alloc(pairs * sizeof *experts);
    int touched = random_experts(experts, rows);
    struct mixture m = { .tables = expert_tables() };

    m.args = (struct experts_args){
        .out = gpu_bench_zero(n * sizeof(bf16)), .x = gpu_bench_random_bf16(n),
        .experts = gpu_bench_copy(experts, pairs * sizeof *experts),
        .weights = gpu_bench_zero(pairs * sizeof(float)),
        .scratch = gpu_bench_zero(gpu_bench_ops()->experts_scratch(&shape)), .rows = rows,
        .dim = MODEL_DIM, .expert_dim = EXPERT_DIM, .n_experts = EXPERTS, .n_chosen = CHOSEN };
    m.route = (struct route_args){
        .experts = gpu_bench_zero(pairs * sizeof *experts),
        .weights = gpu_bench_zero(pairs * sizeof(float)),
        .scores = gpu_bench_zero((size_t)rows * EXPERTS * sizeof(float)), .x = m.args.x,
        .router = gpu_bench_random_bf16((size_t)EXPERTS * MODEL_DIM),
        .router_type = DTYPE_BF16, .renormalise = true, .scale = 1, .rows = rows,
        .dim = MODEL_DIM, .n_experts = EXPERTS, .n_chosen = CHOSEN };
    double route = gpu_bench_graph(queue_routes, &m) / EXPERT_LAYERS;
    double us = gpu_bench_graph(queue_experts, &m) / EXPERT_LAYERS;
    printf("%8d %8d %9.1f %9.1f %8.0f %8.1f\n", rows, touched, route, us,
           touched * 3.0 * EXPERT_ELEMENTS * sizeof(bf16) / us * 1e-3,
           (double)pairs * 6.0 * EXPERT_ELEMENTS / us * 1e-6);
    fflush(stdout);
    mem_free(experts);
    gpu_bench_forget();
}

static void measure_experts(void)
{
    static const int rows[] = { 1, 2, 4, 8, 16, 17, 32, 64, 128, 512, 1024, 2048 };

    printf("a layer of 128 experts, 8 a row\n    rows  touched  route us        us     GB/s"
           "  TFLOP/s\n");
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        measure_mixture(rows[i]);
}

/* ---- attention */

struct attention {
    struct attend_dense_args args;
    size_t layer_kv;
    int layers;
};

static void queue_attention(void *arg)
{
    struct attention *b = arg;

    for (int layer = 0; layer < b->layers; layer++) {
        struct attend_dense_args a = b->args;
        a.kv = (const bf16 *)(const void *)((const char *)a.kv + (size_t)layer * b->layer_kv);
        gpu_bench_ops()->attend_dense(gpu_bench_stream(), &a);
    }
}

/* Microseconds a layer: the last `rows` rows of each context. */
static double measure_attention(const struct kv_shape *shape, int heads, int seqs, int n_tokens,
                                int rows, int layers)
{
    int blocks = (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS, dim = shape->head_dim;
    size_t act = (size_t)(seqs * rows) * (size_t)(heads * dim);
    int32_t *table = mem_alloc((size_t)(seqs * blocks) * sizeof *table);
    int32_t *ints = mem_alloc((size_t)(3 * seqs) * sizeof *ints);
    struct attention b = { .layers = layers };

    for (int i = 0; i < seqs * blocks; i++)
        table[i] = (int32_t)((int64_t)i * 7919 % (seqs * blocks)); /* a prime: scattered */
    for (int i = 0; i < seqs; i++) {
        ints[i] = i * rows;
        ints[seqs + i] = rows;
        ints[2 * seqs + i] = n_tokens;
    }
    const int32_t *at = gpu_bench_copy(ints, (size_t)(3 * seqs) * sizeof *ints);
    b.layer_kv = (size_t)(seqs * blocks) * kv_block_bytes(shape);
    b.args = (struct attend_dense_args){
        .out = gpu_bench_zero(act * sizeof(bf16)), .q = gpu_bench_random_bf16(act),
        .q_stride = heads * dim,
        .kv = gpu_bench_random_bf16((size_t)layers * b.layer_kv / sizeof(bf16)),
        .table = gpu_bench_copy(table, (size_t)(seqs * blocks) * sizeof *table),
        .first_row = at, .n_rows = at + seqs, .n_tokens = at + 2 * seqs,
        .scratch = gpu_bench_zero(gpu_bench_ops()->attend_dense_scratch(shape, seqs, heads,
                                                                        blocks)),
        .shape = *shape, .seqs = seqs, .heads = heads, .max_blocks = blocks,
        .max_n_rows = rows, .max_n_tokens = n_tokens, .only_last_is_new = rows == 1,
        .scale = 1 / sqrtf((float)dim),
    };
    double us = gpu_bench_graph(queue_attention, &b) / layers;
    gpu_bench_forget();
    mem_free(table);
    mem_free(ints);
    return us;
}

static void measure_decode(const struct kv_shape *shape, int heads)
{
    static const int batches[] = { 1, 4, 8 };
    static const int lengths[] = { 256, 1024, 2048, 4096, 8192, 16384, 32768, 49152, 98304,
                                   131072 };

    printf("full attention, one row a sequence, one layer\n  tokens  batch        us     GB/s\n");
    for (size_t i = 0; i < sizeof batches / sizeof batches[0]; i++)
        for (size_t j = 0; j < sizeof lengths / sizeof lengths[0]; j++) {
            double bytes = (double)batches[i] * lengths[j] * (double)kv_block_bytes(shape) / 64;
            double us = measure_attention(shape, heads, batches[i], lengths[j], 1, LAYERS);
            printf("%8d %6d %9.1f %8.0f\n", lengths[j], batches[i], us, bytes / us * 1e-3);
            fflush(stdout);
        }
}

/* The products that are counted are those of keys and of values, in the absorbed form where rows
 * are latent. */
static void measure_prefill(const struct kv_shape *shape, int heads)
{
    static const struct { int tokens, rows; } chunks[] = {
        { 2048, 2048 }, { 8192, 8192 }, { 8192, 2048 }, { 16384, 2048 }, { 32768, 2048 },
        { 65536, 2048 }, { 98304, 2048 }, { 98304, 1024 }, { 98304, 512 },
    };

    int values = shape->latent_dim ? shape->latent_dim : shape->head_dim;

    printf("full attention of a chunk of rows at the end of a context, one layer, %d heads of %d\n"
           "  tokens   rows        us  TFLOP/s\n", heads, shape->head_dim);
    for (size_t j = 0; j < sizeof chunks / sizeof chunks[0]; j++) {
        int tokens = chunks[j].tokens, rows = chunks[j].rows;
        double pairs = (double)rows * (tokens - rows / 2.0);
        double us = measure_attention(shape, heads, 1, tokens, rows, 2);
        printf("%8d %6d %9.1f %8.1f\n", tokens, rows, us,
               2 * pairs * heads * (shape->head_dim + values) / us * 1e-6);
        fflush(stdout);
    }
}

static bool wanted(int argc, char **argv, const char *section)
{
    bool found = argc == 1;

    for (int i = 1; i < argc; i++)
        found = found || strcmp(argv[i], section) == 0;
    return found;
}

int main(int argc, char **argv)
{
    const int heads = 32;
    const struct kv_shape shape = { .kv_heads = 8, .head_dim = 128, .filter = FILTER_COARSE,
                                    .index = INDEX_ROTATED };
    const struct kv_shape latent = { .kv_heads = 1, .head_dim = 576, .latent_dim = 512,
                                     .filter = FILTER_COARSE, .index = INDEX_ROTATED };

    if (!gpu_bench_open())
        return 1;
    printf("memory is read at %.0f GB/s\n", memory_rate());
    if (wanted(argc, argv, "decode"))
        measure_decode(&shape, heads);
    if (wanted(argc, argv, "prefill"))
        measure_prefill(&shape, heads);
    if (wanted(argc, argv, "latent"))
        measure_prefill(&latent, 20);
    if (wanted(argc, argv, "products"))
        measure_products();
    if (wanted(argc, argv, "experts"))
        measure_experts();
    return 0;
}
