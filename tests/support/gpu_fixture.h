#ifndef TESTS_SUPPORT_GPU_FIXTURE_H
#define TESTS_SUPPORT_GPU_FIXTURE_H

#include "kernels/backend.h"
#include "kernels/layout.h"
#include "kernels/ops.h"

#include <stddef.h>

/* The first GPU for tests that hold it against the CPU back end.  Everything here is
 * made at the first call and kept until the process ends. */

/* NULL where there is no GPU, or the build has no CUDA back end; says so once. */
struct backend *gpu_backend(void);
struct stream *gpu_stream(void);
const struct backend_ops *gpu_ops(void);

/* Device memory with a copy of the bytes; with none (NULL) filled with 0xff, NaN in
 * every float type, so that what is not written shows.  Freed by gpu_forget(). */
void *gpu_put(const void *host, size_t bytes);

/* The same into memory that is there. */
void gpu_refill(void *device, const void *host, size_t bytes);

/* Wait for the stream and copy from the device.  Fails the test on a device error. */
void gpu_get(void *host, const void *device, size_t bytes);

/* Free what gpu_put() gave; at the end of a test. */
void gpu_forget(void);

/* act is bf16 on the GPU: floats to it, and what it holds as floats. */
void *gpu_put_act(const float *host, size_t n);
void gpu_refill_act(void *device, const float *host, size_t n);
void gpu_get_act(float *host, const void *device, size_t n);

/* Round to bf16 and back, so that CPU and GPU start from the same numbers. */
void round_to_bf16(float *x, size_t n);

#endif
