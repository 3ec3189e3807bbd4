#ifndef KERNELS_BACKEND_H
#define KERNELS_BACKEND_H

#include "engine/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The device boundary.
 *
 * Two implementations live behind this header: kernels/cpu, plain C that
 * defines what every operation means, and kernels/cuda, which must agree with
 * it within the tolerance written beside each operation in ops.h.  Nothing
 * above this line knows which one is running; nothing below it knows what a
 * model, a sequence or a request is.
 *
 * Three nouns:
 *   backend  one device, opened once, used from any thread
 *   buffer   device memory, or pinned host memory
 *   stream   an ordered queue of work, used from one thread
 *
 * Errors stick.  Operations return nothing.  The first failure on a stream is
 * remembered, what is queued after it is skipped, and stream_sync() reports
 * it, so a forward pass reads as a straight list of operations.  A device
 * failure is final: the engine fails its requests and the process exits.
 *
 * The CPU back end executes each operation before the call returns, on a
 * fixed pool of workers shared by the streams of the back end; only one
 * stream of a CPU back end may compute at a time.  Copies and fills are done by
 * the thread that queues them, on streams of its own beside one that computes. */

struct backend;
struct stream;
struct event;

enum memory_kind { MEM_DEVICE, MEM_PINNED };

struct buffer {
    void *base;        /* device address, or host address when MEM_PINNED */
    size_t bytes;
    enum memory_kind kind;
};

/* Storage types of tensors. */
enum dtype { DTYPE_F32, DTYPE_BF16 };

static inline size_t dtype_bytes(enum dtype t)
{
    return t == DTYPE_F32 ? 4 : 2;
}

struct device_info {
    char name[96];     /* "cpu: 2 threads, avx512-bf16" */
    size_t mem_bytes;  /* memory of the device; of the host (or its cgroup) on the CPU */
    int sm_count;      /* 0 on the CPU back end */
    bool host_visible; /* device memory can be read by the host: true on the CPU */
    bool graphs;       /* whether steps can be recorded, see below */
    int crossover_tokens; /* from this context length on two-level attention is no slower than
                             full attention, whatever the batch: measured, docs/PERFORMANCE.md */
    enum dtype act;    /* type of every activation, "act *" in ops.h: F32 on the CPU */
};

struct backend_options {
    int threads;       /* CPU: workers, the caller included; 0: one a core */
    const char *isa;   /* CPU: "auto", "scalar", "avx2", "avx512"; NULL is auto.  Asking for
                          what the processor lacks is refused. */
};

struct backend_ops;    /* kernels/ops.h: one required entry per operation */

/* name is "cpu", "cuda:N", or "auto": cuda:0 where the build has CUDA and the machine a
 * driver with a GPU, else cpu; what is wrong with that GPU is an error.  options may be
 * NULL.  *out is the caller's until backend_close(). */
enum status backend_open(struct backend **out, const char *name,
                         const struct backend_options *options, struct error *err) MUST_USE;
void backend_close(struct backend *be);             /* NULL is fine */
/* How many devices cuda:N names, at least 1; or why there are none. */
enum status backend_count_gpus(int *out, struct error *err) MUST_USE;
const struct device_info *backend_info(const struct backend *be);
const struct backend_ops *backend_ops(const struct backend *be);

/* Device memory that is free now; all of it on the CPU. */
size_t backend_memory_free(struct backend *be);

/* Zeroed, aligned to 256 bytes or better.  ST_NODEVMEM when there is none. */
enum status buffer_alloc(struct backend *be, struct buffer *out,
                         enum memory_kind kind, size_t bytes) MUST_USE;
void buffer_free(struct backend *be, struct buffer *buf);   /* an empty one is fine */

/* Pin host memory of the caller's, whole pages: from then on the device reads and writes it at the
 * same address, and copies do not wait for the host.  A copy, with all of its pieces, lies within
 * what one call registered: two neighbours are not one to it.  ST_NOMEM when the system refuses,
 * ST_UNSUPPORTED when the device cannot use the address.  The CPU back end has nothing to do. */
enum status host_register(struct backend *be, void *base, size_t bytes, struct error *err) MUST_USE;
void host_unregister(struct backend *be, void *base);

struct stream *stream_create(struct backend *be);
void stream_destroy(struct stream *s);

/* Wait for everything queued so far and report the first failure. */
enum status stream_sync(struct stream *s, struct error *err) MUST_USE;
/* The first failure known so far, without waiting. */
enum status stream_failure(struct stream *s, struct error *err) MUST_USE;

/* Ordering between streams.  Waiting never blocks the calling thread. */
struct event *event_create(struct backend *be);
void event_destroy(struct event *ev);
void event_record(struct event *ev, struct stream *s);
void event_wait(struct stream *s, struct event *ev);
bool event_done(const struct event *ev);

/* Queue a copy between any two addresses the back end knows. */
void stream_copy(struct stream *s, void *dst, const void *src, size_t bytes);
/* The same of n pieces of equal size, dst_stride and src_stride bytes from piece to piece. */
void stream_copy_pieces(struct stream *s, void *dst, size_t dst_stride, const void *src,
                        size_t src_stride, size_t bytes, size_t n);
/* Queue the setting of bytes to a value. */
void stream_fill(struct stream *s, void *dst, uint8_t value, size_t bytes);

/* Recording.  Between graph_begin() and graph_end() operations and copies are not
 * executed but remembered, with their arguments as they are: addresses, counts and what
 * the host knows of maxima.  What they read at those addresses is read at each launch.
 * Nothing else may be called on the stream meanwhile.  Where info.graphs is false none
 * of these may be called.  graph_end() returns NULL when recording failed, and the
 * stream then has the error. */
struct graph;
void graph_begin(struct stream *s);
struct graph *graph_end(struct stream *s);
void graph_launch(struct stream *s, struct graph *g);
void graph_destroy(struct graph *g);                 /* NULL is fine */

#ifdef __cplusplus
}
#endif
#endif
