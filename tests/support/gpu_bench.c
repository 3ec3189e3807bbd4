#include "tests/support/gpu_bench.h"

#include "engine/base/clock.h"
#include "engine/base/mem.h"
#include "tests/support/random_data.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_BUFFERS = 128, CHUNK_BYTES = 64 << 20, RUNS = 31, REPLAYS = 10 };

static struct {
    struct backend *be;
    struct stream *stream;
    struct buffer staging, buffers[MAX_BUFFERS];
    int n;
} gpu;

static void check(enum status st, const char *what)
{
    if (st == ST_OK)
        return;
    fprintf(stderr, "benchmark: %s: %s\n", what, status_name(st));
    exit(1);
}

static void sync(void)
{
    struct error err = { 0 };

    if (stream_sync(gpu.stream, &err) != ST_OK) {
        fprintf(stderr, "benchmark: %s\n", err.text);
        exit(1);
    }
}

bool gpu_bench_open(void)
{
    struct error err = { 0 };

    if (backend_open(&gpu.be, "cuda:0", NULL, &err) != ST_OK) {
        fprintf(stderr, "benchmark: %s\n", err.text);
        return false;
    }
    gpu.stream = stream_create(gpu.be);
    check(buffer_alloc(gpu.be, &gpu.staging, MEM_PINNED, CHUNK_BYTES), "pinned memory");
    printf("%s\n", backend_info(gpu.be)->name);
    return true;
}

struct backend *gpu_bench_backend(void)
{
    return gpu.be;
}

struct stream *gpu_bench_stream(void)
{
    return gpu.stream;
}

const struct backend_ops *gpu_bench_ops(void)
{
    return backend_ops(gpu.be);
}

void *gpu_bench_zero(size_t bytes)
{
    if (gpu.n == MAX_BUFFERS) {
        fprintf(stderr, "benchmark: too many buffers\n");
        exit(1);
    }
    check(buffer_alloc(gpu.be, &gpu.buffers[gpu.n], MEM_DEVICE, bytes ? bytes : 1),
          "device memory");
    return gpu.buffers[gpu.n++].base;
}

void *gpu_bench_copy(const void *host, size_t bytes)
{
    char *device = gpu_bench_zero(bytes);

    for (size_t at = 0; at < bytes; at += CHUNK_BYTES) {
        size_t n = bytes - at < CHUNK_BYTES ? bytes - at : CHUNK_BYTES;
        memcpy(gpu.staging.base, (const char *)host + at, n);
        stream_copy(gpu.stream, device + at, gpu.staging.base, n);
        sync();
    }
    return device;
}

/* Repetitions of one chunk. */
void gpu_bench_fill_bf16(void *device, size_t n)
{
    static bool filled;
    static bf16 *source;
    size_t bytes = n * sizeof *source, most = CHUNK_BYTES;
    struct test_random r = test_random(1);

    if (!filled) {
        source = mem_alloc(CHUNK_BYTES);
        random_bf16s(&r, source, CHUNK_BYTES / sizeof *source, 1);
        filled = true;
    }
    memcpy(gpu.staging.base, source, CHUNK_BYTES);
    for (size_t at = 0; at < bytes; at += most)
        stream_copy(gpu.stream, (char *)device + at, gpu.staging.base,
                    bytes - at < most ? bytes - at : most);
    sync();
}

void *gpu_bench_random_bf16(size_t n)
{
    void *device = gpu_bench_zero(n * sizeof(bf16));

    gpu_bench_fill_bf16(device, n);
    return device;
}

/* n scales of about one. */
static void put_scales(uint8_t *to, int n, struct test_random *r)
{
    for (int i = 0; i < n; i++) {
        bf16 scale = (bf16)(0x3f80 | (random_u64(r) & 0x7f));
        memcpy(to + 2 * i, &scale, sizeof scale);
    }
}

/* Fresh for all of the memory: where records repeat, scores are equal, which is slow to
 * choose from and does not happen to keys. */
void gpu_bench_fill_index(void *device, size_t bytes, const struct kv_shape *shape)
{
    struct index_layout l = index_layout(shape);
    struct test_random r = test_random(2);
    size_t most = CHUNK_BYTES / (size_t)l.record_bytes * (size_t)l.record_bytes;
    uint8_t *out = gpu.staging.base;

    for (size_t from = 0; from < bytes; from += most) {
        size_t n = bytes - from < most ? bytes - from : most;
        for (size_t i = 0; i < n / 8; i++) {
            uint64_t v = random_u64(&r);
            memcpy(out + 8 * i, &v, sizeof v);
        }
        for (size_t at = 0; at < n; at += (size_t)l.record_bytes) {
            put_scales(out + at + l.scale, BLOCK_TOKENS * index_parts(shape), &r);
            if (l.mean_scale >= 0)
                put_scales(out + at + l.mean_scale, BLOCK_MEANS * index_parts(shape), &r);
        }
        stream_copy(gpu.stream, (uint8_t *)device + from, out, n);
        sync();
    }
}

void *gpu_bench_random_index(size_t bytes, const struct kv_shape *shape)
{
    void *device = gpu_bench_zero(bytes);

    gpu_bench_fill_index(device, bytes, shape);
    return device;
}

void gpu_bench_forget(void)
{
    sync();
    while (gpu.n > 0)
        buffer_free(gpu.be, &gpu.buffers[--gpu.n]);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return x < y ? -1 : x > y;
}

double gpu_bench_graph(void (*fn)(void *arg), void *arg)
{
    double us[RUNS];

    fn(arg);                     /* loads modules, finds plans */
    sync();
    graph_begin(gpu.stream);
    fn(arg);
    struct graph *g = graph_end(gpu.stream);
    if (!g)
        sync();
    for (int run = 0; run < RUNS; run++) {
        graph_launch(gpu.stream, g);
        sync();
        uint64_t start = clock_now_ns();
        for (int i = 0; i < REPLAYS; i++)
            graph_launch(gpu.stream, g);
        sync();
        us[run] = (double)(clock_now_ns() - start) * 1e-3 / REPLAYS;
    }
    graph_destroy(g);
    qsort(us, RUNS, sizeof us[0], by_value);
    return us[RUNS / 2];
}
