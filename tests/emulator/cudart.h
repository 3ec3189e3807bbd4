#ifndef TESTS_EMULATOR_CUDART_H
#define TESTS_EMULATOR_CUDART_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

/* What the files of the emulated CUDA runtime share.  The runtime is linked in place of libcudart
 * and has the calls that the back end makes, no more:
 *
 *   cudart.c         the device, errors, the lock
 *   cudart_memory.c  memory, and which ranges are what
 *   cudart_stream.c  streams, events, copies, and graphs
 *   cudart_launch.c  modules, kernels and their launches
 *   fatbin.c         where the PTX is in what nvcc embeds
 *   cublaslt.c       matrix products
 *
 * 1. All work is done when it is queued, by the thread that queues it, under one lock; a stream
 *    that captures records it instead.  So a missing wait is not found here.
 * 2. A call that CUDA answers with an error has that error; in most cases a sentence on stderr
 *    says why.  What CUDA leaves undefined (a stream that was destroyed, memory that was freed)
 *    and what is not emulated ends the process with a sentence that names the call.
 * 3. EMULATED_CC (90, 89, 86 or 80; 90 if not set) is the compute capability, EMULATED_SMS (132)
 *    the number of multiprocessors. */

struct device_limits {
    int cc, n_sms;
    size_t shared_sm_bytes;      /* of a multiprocessor, all its blocks together */
    size_t shared_block_bytes;   /* most that a block can be given */
};

const struct device_limits *device_limits(void);

/* One lock for everything; not recursive. */
void cudart_lock(void);
void cudart_unlock(void);

/* The calling thread's last error is e, unless e is cudaSuccess.  Returns e. */
cudaError_t cudart_error(cudaError_t e);
/* The same with a sentence on stderr, before which the call's name stands. */
cudaError_t cudart_refuse(cudaError_t e, const char *call, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
_Noreturn void cudart_die(const char *call, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* Zeroed; for free(). */
void *cudart_new(size_t bytes);

/* ---- everything below is called with the lock held */

/* Whether the calling thread captures.  Then calls that wait or allocate are not permitted, and
 * end the captures: what this returns is not cudaSuccess. */
cudaError_t cudart_refuse_in_capture(const char *call);

/* Let run(args) happen in the stream's order: now, or in the graph that the stream captures, whose
 * launches call it with a copy of args. */
cudaError_t cudart_queue(cudaStream_t stream, const char *call, void (*run)(const void *args),
                         const void *args, size_t bytes);

/* Where memory is.  UNKNOWN: in no allocation, for a copy pageable host memory. */
enum place { PLACE_UNKNOWN, PLACE_DEVICE, PLACE_PINNED };

/* False, with a sentence on stderr, where [p, p + bytes) is not in one piece of memory: part of
 * it was not allocated, or is another allocation's. */
bool cudart_find_memory(enum place *out, const char *call, const void *p, size_t bytes);
/* Ends the process if kernels may not touch the range. */
void cudart_check_memory(const char *call, const void *p, size_t bytes);

/* ---- fatbin.c */

/* The PTX for the newest device that is no newer than cc, which stays owned by the fat binary, or
 * NULL; *n: its bytes.  wrapper: of the section .nvFatBinSegment. */
const char *fatbin_ptx(const void *wrapper, int cc, size_t *n);

/* What a kernel's launch bounds say. */
struct launch_bounds {
    int max_threads;             /* of a block, 0: not said */
    int min_blocks;              /* that a multiprocessor has room for, 0: not said */
};

struct launch_bounds fatbin_launch_bounds(const char *ptx, size_t n, const char *kernel);

#endif
