#ifndef TESTS_SUPPORT_GPU_BENCH_H
#define TESTS_SUPPORT_GPU_BENCH_H

#include "kernels/backend.h"
#include "kernels/layout.h"
#include "kernels/ops.h"

#include <stdbool.h>
#include <stddef.h>

/* What the GPU benchmarks share.  Failures end the process with a line. */

bool gpu_bench_open(void);              /* false, and a line, where there is no GPU */
struct backend *gpu_bench_backend(void);
struct stream *gpu_bench_stream(void);
const struct backend_ops *gpu_bench_ops(void);

/* Device memory until gpu_bench_forget(). */
void *gpu_bench_zero(size_t bytes);
void *gpu_bench_copy(const void *host, size_t bytes);
void *gpu_bench_random_bf16(size_t n);  /* normal, variance 1 */
/* Index records with random planes and scales between 1 and 2. */
void *gpu_bench_random_index(size_t bytes, const struct kv_shape *shape);
void gpu_bench_forget(void);

/* The same into memory that is there. */
void gpu_bench_fill_bf16(void *device, size_t n);
void gpu_bench_fill_index(void *device, size_t bytes, const struct kv_shape *shape);

/* Record what fn queues as a graph; the median time of a replay in microseconds. */
double gpu_bench_graph(void (*fn)(void *arg), void *arg);

#endif
