/* How close the CPU back end comes to what the machine can do.
 *
 *   bench-cpu [threads] [isa]
 *
 * Ceilings: the rate at which all threads together read memory, and oneDNN's float32
 * matrix product.  Against them: the weights read by a decode step of a 135M-class
 * model in bf16, and the products of its prefill.  Every figure is the best of
 * several runs, since other work on the machine only ever takes time away. */

#include "engine/base/clock.h"
#include "engine/base/mem.h"
#include "kernels/cpu/cpu.h"

#include <dnnl.h>
#include <emmintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 30, DIM = 576, MLP = 1536, KV_DIM = 192, VOCAB = 49152 };

struct shape { const char *name; int out_dim, in_dim; };

static const struct shape layer[] = {
    { "q", DIM, DIM },     { "k", KV_DIM, DIM }, { "v", KV_DIM, DIM }, { "o", DIM, DIM },
    { "gate", MLP, DIM }, { "up", MLP, DIM },   { "down", DIM, MLP },
};
enum { N_LINEARS = sizeof layer / sizeof layer[0] };

struct bench {
    struct backend *be;
    struct stream *stream;
    const struct backend_ops *ops;
    char *weights;
    size_t weight_bytes;
    float *x, *out;
    int max_rows;
};

static void *map(size_t bytes)
{
    void *p = mem_map(bytes, 2u << 20);

    if (!p) {
        fprintf(stderr, "bench-cpu: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return p;
}

/* ---- read bandwidth */

enum { READ_PIECE = 1 << 20 };

struct reading { const char *base; uint64_t *sums; };

/* Four chains of whole lines: far more than memory can deliver. */
static void read_piece(void *arg, int task, int worker)
{
    const struct reading *r = arg;
    const __m128i *p = (const void *)(r->base + (size_t)task * READ_PIECE);
    __m128i a = _mm_setzero_si128(), b = a, c = a, d = a;

    for (size_t i = 0; i < READ_PIECE / sizeof *p; i += 4) {
        _mm_prefetch((const char *)(p + i) + 2048, _MM_HINT_T0);
        a = _mm_add_epi64(a, _mm_loadu_si128(p + i));
        b = _mm_add_epi64(b, _mm_loadu_si128(p + i + 1));
        c = _mm_add_epi64(c, _mm_loadu_si128(p + i + 2));
        d = _mm_add_epi64(d, _mm_loadu_si128(p + i + 3));
    }
    a = _mm_add_epi64(_mm_add_epi64(a, b), _mm_add_epi64(c, d));
    r->sums[worker * 8] += (uint64_t)_mm_cvtsi128_si64(a);
}

/* Bytes a second over the memory of the weights, best of n_runs. */
static double read_bandwidth(const struct bench *b, int n_runs)
{
    int n_tasks = (int)(b->weight_bytes / READ_PIECE);
    struct reading r = {
        .base = b->weights,
        .sums = mem_calloc((size_t)workers_count(b->be->workers) * 8, sizeof(uint64_t)),
    };
    double best = 0;

    for (int run = 0; run < n_runs; run++) {
        uint64_t start = clock_now_ns();
        workers_run(b->be->workers, n_tasks, read_piece, &r);
        double rate = (double)n_tasks * READ_PIECE * 1e9 / (double)(clock_now_ns() - start);
        if (rate > best)
            best = rate;
    }
    mem_free(r.sums);
    return best;
}

/* ---- decode */

static const char *run_linear(const struct bench *b, const struct shape *shape,
                              const char *weight, int rows)
{
    struct linear_args a = {
        .out = b->out,
        .x = b->x,
        .weight = weight,
        .weight_type = DTYPE_BF16,
        .rows = rows,
        .in_dim = shape->in_dim,
        .out_dim = shape->out_dim,
        .out_stride = shape->out_dim,
    };

    b->ops->linear(b->stream, &a);
    return weight + (size_t)shape->out_dim * (size_t)shape->in_dim * 2;
}

static size_t step_bytes(void)
{
    size_t layer_weights = 0;

    for (int i = 0; i < N_LINEARS; i++)
        layer_weights += (size_t)layer[i].out_dim * (size_t)layer[i].in_dim;
    return 2 * (LAYERS * layer_weights + (size_t)VOCAB * DIM);
}

/* Seconds of all products of one step of `rows` sequences, best of n_runs. */
static double decode_step(const struct bench *b, int rows, int n_runs)
{
    double best = 1e9;

    for (int run = 0; run < n_runs; run++) {
        const char *weight = b->weights;
        uint64_t start = clock_now_ns();
        for (int l = 0; l < LAYERS; l++)
            for (int i = 0; i < N_LINEARS; i++)
                weight = run_linear(b, &layer[i], weight, rows);
        struct logits_args a = {
            .out = b->out,
            .x = b->x,
            .weight = weight,
            .weight_type = DTYPE_BF16,
            .rows = rows,
            .dim = DIM,
            .vocab = VOCAB,
        };
        b->ops->logits(b->stream, &a);
        double seconds = (double)(clock_now_ns() - start) * 1e-9;
        if (seconds < best)
            best = seconds;
    }
    return best;
}

/* ---- prefill */

static const int prefill_rows[] = { 8, 16, 32, 64, 128, 512, 2048 };
static const struct shape prefill_shapes[] = {
    { "qo", DIM, DIM },  { "kv", KV_DIM, DIM }, { "gate/up", MLP, DIM }, { "down", DIM, MLP },
    { "4k", 4096, 4096 },
};
enum {
    N_ROWS = sizeof prefill_rows / sizeof prefill_rows[0],
    N_SHAPES = sizeof prefill_shapes / sizeof prefill_shapes[0],
};

static double gflops(const struct shape *s, int rows, double seconds)
{
    return 2e-9 * rows * s->out_dim * s->in_dim / seconds;
}

static int runs_for(const struct shape *s, int rows)
{
    double gflop = 2e-9 * rows * s->out_dim * s->in_dim;
    int n = (int)(20 / gflop);

    return n < 3 ? 3 : n > 200 ? 200 : n;
}

static double own_product(const struct bench *b, const struct shape *s, int rows)
{
    double best = 1e9;

    for (int run = runs_for(s, rows); run > 0; run--) {
        uint64_t start = clock_now_ns();
        run_linear(b, s, b->weights, rows);
        double seconds = (double)(clock_now_ns() - start) * 1e-9;
        if (seconds < best)
            best = seconds;
    }
    return best;
}

/* The same product by oneDNN, weights already widened to float. */
static double dnnl_product(const struct bench *b, const struct shape *s, const float *weight,
                           int rows)
{
    double best = 1e9;

    for (int run = runs_for(s, rows); run > 0; run--) {
        uint64_t start = clock_now_ns();
        dnnl_status_t status = dnnl_sgemm('N', 'T', rows, s->out_dim, s->in_dim, 1, b->x,
                                          s->in_dim, weight, s->in_dim, 0, b->out, s->out_dim);
        double seconds = (double)(clock_now_ns() - start) * 1e-9;
        if (status != dnnl_success) {
            fprintf(stderr, "bench-cpu: dnnl_sgemm failed: %d\n", (int)status);
            exit(1);
        }
        if (seconds < best)
            best = seconds;
    }
    return best;
}

static void bench_prefill(const struct bench *b)
{
    double own[N_SHAPES][N_ROWS];
    float *wide = map((size_t)4096 * 4096 * sizeof *wide);

    /* Own figures first: oneDNN's threads spin for a while when they have nothing to do. */
    for (int i = 0; i < N_SHAPES; i++)
        for (int j = 0; j < N_ROWS; j++)
            own[i][j] = own_product(b, &prefill_shapes[i], prefill_rows[j]);
    for (size_t i = 0; i < (size_t)4096 * 4096; i++)
        wide[i] = bf16_to_float(((const bf16 *)b->weights)[i]);

    printf("\nproducts, GFLOP/s        rows   asynctlsd   oneDNN f32   share\n");
    for (int i = 0; i < N_SHAPES; i++) {
        const struct shape *s = &prefill_shapes[i];
        for (int j = 0; j < N_ROWS; j++) {
            double other = dnnl_product(b, s, wide, prefill_rows[j]);
            printf("  %-8s %5d x %-5d %5d %11.0f %12.0f %6.0f %%\n", s->name, s->out_dim,
                   s->in_dim, prefill_rows[j], gflops(s, prefill_rows[j], own[i][j]),
                   gflops(s, prefill_rows[j], other), 100 * other / own[i][j]);
        }
    }
    mem_unmap(wide, (size_t)4096 * 4096 * sizeof *wide);
}

/* ---- */

static void print_processor(const struct bench *b)
{
    char line[256];
    FILE *f = fopen("/proc/cpuinfo", "re");

    while (f && fgets(line, sizeof line, f)) {
        char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && colon) {
            printf("processor   %s", colon + 2);
            break;
        }
    }
    if (f)
        fclose(f);
    printf("back end    %s\n", backend_info(b->be)->name);
}

static void bench_open(struct bench *b, int threads, const char *isa)
{
    struct backend_options options = { .threads = threads, .isa = isa };
    struct error err;

    if (backend_open(&b->be, "cpu", &options, &err) != ST_OK) {
        fprintf(stderr, "bench-cpu: %s\n", err.text);
        exit(1);
    }
    b->stream = stream_create(b->be);
    b->ops = backend_ops(b->be);
    b->max_rows = 2048;
    b->weight_bytes = step_bytes();
    b->weights = map(b->weight_bytes);
    b->x = map((size_t)b->max_rows * 4096 * sizeof *b->x);
    b->out = map((size_t)b->max_rows * 4096 * sizeof *b->out);
    uint32_t state = 1;
    for (size_t i = 0; i < b->weight_bytes / 2; i++) {
        state = state * 1664525u + 1013904223u;
        ((bf16 *)b->weights)[i] = (bf16)(0x3c00 + (state >> 16 & 0x80ff));
    }
    for (size_t i = 0; i < (size_t)b->max_rows * 4096; i++)
        b->x[i] = (float)(int)(i % 17) - 8;
}

int main(int argc, char **argv)
{
    static const int decode_rows[] = { 1, 2, 4, 8 };
    struct bench b = { 0 };

    bench_open(&b, argc > 1 ? (int)strtol(argv[1], NULL, 10) : 0, argc > 2 ? argv[2] : NULL);
    print_processor(&b);
    double bandwidth = read_bandwidth(&b, 20);
    printf("reading     %.1f GB/s with all threads\n", bandwidth * 1e-9);
    printf("\ndecode, 135M parameters in bf16, %.0f MB a step\n",
           (double)b.weight_bytes * 1e-6);
    for (size_t i = 0; i < sizeof decode_rows / sizeof decode_rows[0]; i++) {
        double seconds = decode_step(&b, decode_rows[i], 20);
        double rate = (double)b.weight_bytes / seconds;
        printf("  batch %d   %6.2f ms a step, %5.1f GB/s, %3.0f %% of reading\n",
               decode_rows[i], seconds * 1e3, rate * 1e-9, 100 * rate / bandwidth);
    }
    bench_prefill(&b);
    mem_unmap(b.x, (size_t)b.max_rows * 4096 * sizeof *b.x);
    mem_unmap(b.out, (size_t)b.max_rows * 4096 * sizeof *b.out);
    mem_unmap(b.weights, b.weight_bytes);
    stream_destroy(b.stream);
    backend_close(b.be);
    return 0;
}
