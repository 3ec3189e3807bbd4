/* Every thread sums 16-byte words, eight loads under way at a time, the threads of the
 * grid side by side; a grid of one wave, so that no block waits for another to end. */

#include "tests/bench/memory_rate.h"

#include <cuda_runtime.h>
#include <stdlib.h>

enum { THREADS = 512, BLOCKS_PER_SM = 4, LOADS = 8, RUNS = 15 };

static __global__ void read_kernel(const uint4 *from, size_t n, unsigned *out)
{
    size_t threads = (size_t)gridDim.x * THREADS;
    size_t at = (size_t)blockIdx.x * THREADS + threadIdx.x;
    unsigned sum = 0;

    for (; at + (LOADS - 1) * threads < n; at += LOADS * threads) {
        uint4 v[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            v[i] = __ldcs(from + at + i * threads);
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            sum += v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    if (sum == 1)                /* or the loads would be left out */
        *out = sum;
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;

    return x < y ? -1 : x > y;
}

static float median_ms(const void *from, size_t bytes, unsigned *out, int blocks)
{
    cudaEvent_t start, end;
    float ms[RUNS];

    if (cudaEventCreate(&start) != cudaSuccess || cudaEventCreate(&end) != cudaSuccess)
        return 0;
    for (int run = 0; run < RUNS; run++) {
        cudaEventRecord(start, cudaStreamPerThread);
        read_kernel<<<blocks, THREADS, 0, cudaStreamPerThread>>>(
            (const uint4 *)from, bytes / sizeof(uint4), out);
        cudaEventRecord(end, cudaStreamPerThread);
        if (cudaEventSynchronize(end) != cudaSuccess
            || cudaEventElapsedTime(&ms[run], start, end) != cudaSuccess)
            return 0;
    }
    cudaEventDestroy(start);
    cudaEventDestroy(end);
    qsort(ms, RUNS, sizeof ms[0], by_value);
    return ms[RUNS / 2];
}

extern "C" double memory_rate(void)
{
    size_t bytes = (size_t)4 << 30, free_bytes = 0, total = 0;
    int device = 0, sms = 0;
    void *memory = NULL;

    if (cudaGetDevice(&device) != cudaSuccess || cudaMemGetInfo(&free_bytes, &total) != cudaSuccess
        || cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
        return 0;
    if (bytes > free_bytes / 2)
        bytes = free_bytes / 2;
    if (cudaMalloc(&memory, bytes) != cudaSuccess || cudaMemset(memory, 0, bytes) != cudaSuccess
        || cudaDeviceSynchronize() != cudaSuccess)
        return 0;
    float ms = median_ms(memory, bytes, (unsigned *)memory, sms * BLOCKS_PER_SM);
    cudaFree(memory);
    return ms > 0 ? (double)bytes / ms * 1e-6 : 0;
}
