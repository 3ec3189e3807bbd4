#include "kernels/backend_open.h"

#include "engine/base/invariant.h"

#include <stdlib.h>
#include <string.h>

/* The opaque functions of backend.h: each finds the calls of the back end its
 * object belongs to, through the first members that backend_open.h prescribes. */

enum { PAGE_BYTES = 4096 };      /* the smallest there is */

static const struct device_calls *calls_of(const struct backend *be)
{
    return *(const struct device_calls *const *)(const void *)be;
}

static struct backend *owner_of(const void *stream_or_event)
{
    return *(struct backend *const *)stream_or_event;
}

/* "N" of "cuda:N", or -1. */
static int device_number(const char *digits)
{
    char *end;

    if (digits[0] < '0' || digits[0] > '9')
        return -1;
    long n = strtol(digits, &end, 10);
    return *end || n > 1023 ? -1 : (int)n;
}

enum status backend_open(struct backend **out, const char *name,
                         const struct backend_options *options, struct error *err)
{
    *out = NULL;
    if (strcmp(name, "cpu") == 0)
        return cpu_backend_open(out, options, err);
    if (strcmp(name, "auto") == 0) {
#ifdef WITH_CUDA
        if (cuda_device_present())
            return cuda_backend_open(out, 0, err);
#endif
        return cpu_backend_open(out, options, err);
    }
    if (strncmp(name, "cuda:", 5) == 0) {
        int device = device_number(name + 5);
        if (device < 0)
            return error_set(err, ST_INVALID, "'%s' names no device: write cuda:0", name);
#ifdef WITH_CUDA
        return cuda_backend_open(out, device, err);
#else
        return error_set(err, ST_UNSUPPORTED,
                         "device cuda:%d: this program was built without CUDA", device);
#endif
    }
    return error_set(err, ST_INVALID, "no device is called '%s': write auto, cpu or cuda:N", name);
}

enum status backend_count_gpus(int *out, struct error *err)
{
    *out = 0;
#ifdef WITH_CUDA
    TRY(cuda_count_devices(out, err));
    return *out > 0 ? ST_OK : error_set(err, ST_UNSUPPORTED, "this machine has no GPU");
#else
    return error_set(err, ST_UNSUPPORTED, "this program was built without CUDA");
#endif
}

void backend_close(struct backend *be)
{
    if (be)
        calls_of(be)->close(be);
}

const struct device_info *backend_info(const struct backend *be)
{
    return calls_of(be)->info(be);
}

const struct backend_ops *backend_ops(const struct backend *be)
{
    return calls_of(be)->ops(be);
}

size_t backend_memory_free(struct backend *be)
{
    return calls_of(be)->memory_free(be);
}

enum status buffer_alloc(struct backend *be, struct buffer *out, enum memory_kind kind,
                         size_t bytes)
{
    *out = (struct buffer){ .base = NULL, .bytes = 0, .kind = kind };
    if (bytes == 0)
        return ST_OK;
    return calls_of(be)->buffer_alloc(be, out, kind, bytes);
}

void buffer_free(struct backend *be, struct buffer *buf)
{
    if (buf->base)
        calls_of(be)->buffer_free(be, buf);
    buf->base = NULL;
    buf->bytes = 0;
}

enum status host_register(struct backend *be, void *base, size_t bytes, struct error *err)
{
    ASSERT(bytes > 0 && bytes % PAGE_BYTES == 0 && (uintptr_t)base % PAGE_BYTES == 0);
    return calls_of(be)->host_register(be, base, bytes, err);
}

void host_unregister(struct backend *be, void *base)
{
    calls_of(be)->host_unregister(be, base);
}

struct stream *stream_create(struct backend *be)
{
    return calls_of(be)->stream_create(be);
}

void stream_destroy(struct stream *s)
{
    if (s)
        calls_of(owner_of(s))->stream_destroy(s);
}

enum status stream_sync(struct stream *s, struct error *err)
{
    return calls_of(owner_of(s))->stream_sync(s, err);
}

enum status stream_failure(struct stream *s, struct error *err)
{
    return calls_of(owner_of(s))->stream_failure(s, err);
}

void stream_copy(struct stream *s, void *dst, const void *src, size_t bytes)
{
    if (bytes)
        calls_of(owner_of(s))->stream_copy(s, dst, src, bytes);
}

void stream_copy_pieces(struct stream *s, void *dst, size_t dst_stride, const void *src,
                        size_t src_stride, size_t bytes, size_t n)
{
    if (dst_stride == bytes && src_stride == bytes)
        stream_copy(s, dst, src, bytes * n);
    else if (bytes && n)
        calls_of(owner_of(s))->stream_copy_pieces(s, dst, dst_stride, src, src_stride, bytes, n);
}

void stream_fill(struct stream *s, void *dst, uint8_t value, size_t bytes)
{
    if (bytes)
        calls_of(owner_of(s))->stream_fill(s, dst, value, bytes);
}

struct event *event_create(struct backend *be)
{
    return calls_of(be)->event_create(be);
}

void event_destroy(struct event *ev)
{
    if (ev)
        calls_of(owner_of(ev))->event_destroy(ev);
}

void event_record(struct event *ev, struct stream *s)
{
    ASSERT(owner_of(ev) == owner_of(s));
    calls_of(owner_of(s))->event_record(ev, s);
}

void event_wait(struct stream *s, struct event *ev)
{
    ASSERT(owner_of(ev) == owner_of(s));
    calls_of(owner_of(s))->event_wait(s, ev);
}

bool event_done(const struct event *ev)
{
    return calls_of(owner_of(ev))->event_done(ev);
}

void graph_begin(struct stream *s)
{
    ASSERT(backend_info(owner_of(s))->graphs);
    calls_of(owner_of(s))->graph_begin(s);
}

struct graph *graph_end(struct stream *s)
{
    return calls_of(owner_of(s))->graph_end(s);
}

void graph_launch(struct stream *s, struct graph *g)
{
    ASSERT(owner_of(g) == owner_of(s));
    calls_of(owner_of(s))->graph_launch(s, g);
}

void graph_destroy(struct graph *g)
{
    if (g)
        calls_of(owner_of(g))->graph_destroy(g);
}
