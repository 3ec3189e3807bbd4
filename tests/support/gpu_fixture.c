#include "tests/support/gpu_fixture.h"

#include "engine/base/mem.h"
#include "kernels/cpu/cpu.h"

#include <check.h>
#include <stdio.h>
#include <string.h>

enum { MAX_BUFFERS = 256 };

static struct {
    bool tried;
    struct backend *be;
    struct stream *stream;
    struct buffer buffers[MAX_BUFFERS];
    int n;
} gpu;

struct backend *gpu_backend(void)
{
    struct error err = { 0 };

    if (gpu.tried)
        return gpu.be;
    gpu.tried = true;
    if (backend_open(&gpu.be, "cuda:0", NULL, &err) != ST_OK) {
        printf("skip: GPU tests (%s)\n", err.text);
        return NULL;
    }
    gpu.stream = stream_create(gpu.be);
    printf("GPU tests on %s\n", backend_info(gpu.be)->name);
    return gpu.be;
}

struct stream *gpu_stream(void)
{
    return gpu.stream;
}

const struct backend_ops *gpu_ops(void)
{
    return backend_ops(gpu.be);
}

static void sync(void)
{
    struct error err = { 0 };

    if (stream_sync(gpu.stream, &err) != ST_OK)
        ck_abort_msg("%s", err.text);
}

void gpu_refill(void *device, const void *host, size_t bytes)
{
    struct buffer staging;

    ck_assert_int_eq(buffer_alloc(gpu.be, &staging, MEM_PINNED, bytes), ST_OK);
    if (host)
        memcpy(staging.base, host, bytes);
    else
        memset(staging.base, 0xff, bytes);
    stream_copy(gpu.stream, device, staging.base, bytes);
    sync();
    buffer_free(gpu.be, &staging);
}

void *gpu_put(const void *host, size_t bytes)
{
    ck_assert_int_lt(gpu.n, MAX_BUFFERS);
    struct buffer *b = &gpu.buffers[gpu.n++];
    ck_assert_int_eq(buffer_alloc(gpu.be, b, MEM_DEVICE, bytes), ST_OK);
    gpu_refill(b->base, host, bytes);
    return b->base;
}

void gpu_get(void *host, const void *device, size_t bytes)
{
    struct buffer staging;

    ck_assert_int_eq(buffer_alloc(gpu.be, &staging, MEM_PINNED, bytes), ST_OK);
    stream_copy(gpu.stream, staging.base, device, bytes);
    sync();
    memcpy(host, staging.base, bytes);
    buffer_free(gpu.be, &staging);
}

void gpu_forget(void)
{
    sync();
    while (gpu.n > 0)
        buffer_free(gpu.be, &gpu.buffers[--gpu.n]);
}

void gpu_refill_act(void *device, const float *host, size_t n)
{
    bf16 *rounded = mem_alloc(n * sizeof *rounded);

    for (size_t i = 0; i < n; i++)
        rounded[i] = float_to_bf16(host[i]);
    gpu_refill(device, rounded, n * sizeof *rounded);
    mem_free(rounded);
}

void *gpu_put_act(const float *host, size_t n)
{
    void *device = gpu_put(NULL, n * sizeof(bf16));

    gpu_refill_act(device, host, n);
    return device;
}

void gpu_get_act(float *host, const void *device, size_t n)
{
    bf16 *rounded = mem_alloc(n * sizeof *rounded);

    gpu_get(rounded, device, n * sizeof *rounded);
    for (size_t i = 0; i < n; i++)
        host[i] = bf16_to_float(rounded[i]);
    mem_free(rounded);
}

void round_to_bf16(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = bf16_to_float(float_to_bf16(x[i]));
}
