#include "tests/emulator/cudart.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Streams and events that were destroyed stay, marked, to be recognised. */

struct operation {
    void (*run)(const void *args);
    void *args;                  /* owned */
    const char *call;
};

/* What a capture records, and what graphs launch. */
struct CUgraph_st {
    struct operation *operations;
    size_t n, room;
    int users;                   /* the graph itself and those made executable of it */
};

struct CUgraphExec_st {
    cudaGraph_t graph;
};

struct CUstream_st {
    struct CUstream_st *next;
    bool destroyed;
    cudaGraph_t capture;         /* being recorded, or NULL */
    const char *capture_failed;  /* the call that did it, or NULL */
    pthread_t captured_by;
};

struct CUevent_st {
    struct CUevent_st *next;
    bool destroyed;
    bool captured;               /* its last record belongs to a graph */
    uint64_t recorded_ns;        /* 0: never */
};

static cudaStream_t streams;
static cudaEvent_t events;
/* The streams without a name: NULL and cudaStreamLegacy. */
static struct CUstream_st legacy;

static cudaStream_t stream_of(cudaStream_t s, const char *call)
{
    if (!s || s == cudaStreamLegacy)
        return &legacy;
    if (s == cudaStreamPerThread)
        cudart_die(call, "cudaStreamPerThread is not emulated");
    for (cudaStream_t at = streams; at; at = at->next)
        if (at == s) {
            if (s->destroyed)
                cudart_die(call, "stream %p was destroyed", (void *)s);
            return s;
        }
    cudart_die(call, "%p is no stream", (void *)s);
}

static cudaEvent_t event_of(cudaEvent_t ev, const char *call)
{
    for (cudaEvent_t at = events; at; at = at->next)
        if (at == ev) {
            if (ev->destroyed)
                cudart_die(call, "event %p was destroyed", (void *)ev);
            return ev;
        }
    cudart_die(call, "%p is no event", (void *)ev);
}

/* ---- captures */

static void fail_capture(cudaStream_t s, const char *call)
{
    if (!s->capture_failed)
        s->capture_failed = call;
}

cudaError_t cudart_refuse_in_capture(const char *call)
{
    bool found = false;

    for (cudaStream_t s = streams; s; s = s->next)
        if (s->capture && pthread_equal(s->captured_by, pthread_self())) {
            fail_capture(s, call);
            found = true;
        }
    if (!found)
        return cudaSuccess;
    return cudart_refuse(cudaErrorStreamCaptureUnsupported, call,
                         "not permitted while this thread captures");
}

static void record(cudaGraph_t g, const struct operation *o)
{
    if (g->n == g->room) {
        g->room = g->room ? 2 * g->room : 64;
        g->operations = realloc(g->operations, g->room * sizeof *g->operations);
        if (!g->operations)
            cudart_die(o->call, "no memory for a graph of %zu operations", g->room);
    }
    g->operations[g->n++] = *o;
}

cudaError_t cudart_queue(cudaStream_t stream, const char *call, void (*run)(const void *args),
                         const void *args, size_t bytes)
{
    cudaStream_t s = stream_of(stream, call);

    if (s->capture_failed)
        return cudart_error(cudaErrorStreamCaptureInvalidated);
    if (!s->capture) {
        if (s == &legacy && cudart_refuse_in_capture(call) != cudaSuccess)
            return cudaErrorStreamCaptureUnsupported;
        run(args);
        return cudaSuccess;
    }
    struct operation o = { run, cudart_new(bytes), call };
    memcpy(o.args, args, bytes);
    record(s->capture, &o);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    static const char call[] = "cudaStreamBeginCapture";
    cudaStream_t s;
    cudaError_t e = cudaSuccess;

    if (mode != cudaStreamCaptureModeThreadLocal)
        cudart_die(call, "mode %d is not emulated", (int)mode);
    cudart_lock();
    s = stream_of(stream, call);
    if (s == &legacy) {
        e = cudart_refuse(cudaErrorStreamCaptureUnsupported, call, "of the legacy stream");
    } else if (s->capture) {
        e = cudart_refuse(cudaErrorIllegalState, call, "the stream captures already");
    } else {
        s->capture = cudart_new(sizeof *s->capture);
        s->capture->users = 1;
        s->captured_by = pthread_self();
    }
    cudart_unlock();
    return e;
}

static void release_graph(cudaGraph_t g)
{
    if (--g->users > 0)
        return;
    for (size_t i = 0; i < g->n; i++)
        free(g->operations[i].args);
    free(g->operations);
    free(g);
}

static cudaError_t end_capture(cudaStream_t s, cudaGraph_t *out, const char *call)
{
    cudaError_t e = cudaSuccess;

    if (!s->capture)
        return cudart_refuse(cudaErrorIllegalState, call, "the stream does not capture");
    if (!pthread_equal(s->captured_by, pthread_self()))
        return cudart_refuse(cudaErrorStreamCaptureWrongThread, call,
                             "another thread began the capture");
    if (s->capture_failed) {
        e = cudart_refuse(cudaErrorStreamCaptureInvalidated, call, "%s made the capture invalid",
                          s->capture_failed);
        release_graph(s->capture);
    } else {
        *out = s->capture;
    }
    s->capture = NULL;
    s->capture_failed = NULL;
    return e;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out)
{
    static const char call[] = "cudaStreamEndCapture";
    cudaError_t e;

    *out = NULL;
    cudart_lock();
    e = end_capture(stream_of(stream, call), out, call);
    cudart_unlock();
    return e;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph,
                                 unsigned long long flags)
{
    if (flags != 0)
        cudart_die("cudaGraphInstantiate", "flags %#llx are not emulated", flags);
    cudart_lock();
    *out = cudart_new(sizeof **out);
    (*out)->graph = graph;
    graph->users++;
    cudart_unlock();
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    cudart_lock();
    release_graph(graph);
    cudart_unlock();
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    cudart_lock();
    release_graph(exec->graph);
    free(exec);
    cudart_unlock();
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    static const char call[] = "cudaGraphLaunch";
    const struct CUgraph_st *g = exec->graph;
    cudaStream_t s;

    cudart_lock();
    s = stream_of(stream, call);
    if (s->capture)
        cudart_die(call, "a graph inside of a graph is not emulated");
    for (size_t i = 0; i < g->n; i++)
        g->operations[i].run(g->operations[i].args);
    cudart_unlock();
    return cudaSuccess;
}

/* ---- streams */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags)
{
    /* A stream that waits for the legacy one would need all of these to be told apart. */
    if (flags != cudaStreamNonBlocking)
        cudart_die("cudaStreamCreateWithFlags", "flags %#x are not emulated", flags);
    cudart_lock();
    *out = cudart_new(sizeof **out);
    (*out)->next = streams;
    streams = *out;
    cudart_unlock();
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    static const char call[] = "cudaStreamDestroy";
    cudaStream_t s;

    cudart_lock();
    s = stream_of(stream, call);
    if (s == &legacy)
        cudart_die(call, "of the legacy stream");
    if (s->capture)
        cudart_die(call, "the stream still captures");
    s->destroyed = true;
    cudart_unlock();
    return cudaSuccess;
}

/* Everything has been done when it was queued. */
static cudaError_t wait_for_stream(cudaStream_t stream, const char *call)
{
    cudaStream_t s;
    cudaError_t e = cudaSuccess;

    cudart_lock();
    s = stream_of(stream, call);
    if (s->capture) {
        fail_capture(s, call);
        e = cudart_refuse(cudaErrorStreamCaptureUnsupported, call, "the stream captures");
    } else {
        e = cudart_refuse_in_capture(call);
    }
    cudart_unlock();
    return e;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    return wait_for_stream(stream, "cudaStreamSynchronize");
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    return wait_for_stream(stream, "cudaStreamQuery");
}

/* ---- events */

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags)
{
    if (flags & ~(unsigned)(cudaEventDisableTiming | cudaEventBlockingSync))
        cudart_die("cudaEventCreateWithFlags", "flags %#x are not emulated", flags);
    cudart_lock();
    *out = cudart_new(sizeof **out);
    (*out)->next = events;
    events = *out;
    cudart_unlock();
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    cudart_lock();
    event_of(event, "cudaEventDestroy")->destroyed = true;
    cudart_unlock();
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    static const char call[] = "cudaEventRecord";
    cudaEvent_t ev;
    cudaStream_t s;
    cudaError_t e = cudaSuccess;

    cudart_lock();
    ev = event_of(event, call);
    s = stream_of(stream, call);
    if (s->capture_failed) {
        e = cudart_error(cudaErrorStreamCaptureInvalidated);
    } else {
        ev->captured = s->capture != NULL;
        ev->recorded_ns = now_ns();
    }
    cudart_unlock();
    return e;
}

/* Streams that join another's capture by waiting for an event of it are not emulated. */
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    static const char call[] = "cudaStreamWaitEvent";
    cudaStream_t s;
    cudaEvent_t ev;
    cudaError_t e = cudaSuccess;

    if (flags != cudaEventWaitDefault)
        cudart_die(call, "flags %#x are not emulated", flags);
    cudart_lock();
    s = stream_of(stream, call);
    ev = event_of(event, call);
    if (ev->captured)
        cudart_die(call, "for an event that a capture recorded: not emulated");
    if (s->capture && ev->recorded_ns) {
        fail_capture(s, call);
        e = cudart_refuse(cudaErrorStreamCaptureIsolation, call,
                          "a capture waits for what is outside of it");
    }
    cudart_unlock();
    return e;
}

static cudaError_t wait_for_event(cudaEvent_t event, const char *call)
{
    cudaEvent_t ev;
    cudaError_t e;

    cudart_lock();
    ev = event_of(event, call);
    e = cudart_refuse_in_capture(call);
    if (e == cudaSuccess && ev->captured)
        e = cudart_refuse(cudaErrorCapturedEvent, call, "a capture recorded the event");
    cudart_unlock();
    return e;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    return wait_for_event(event, "cudaEventQuery");
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    return wait_for_event(event, "cudaEventSynchronize");
}

/* ---- copies */

/* n pieces; the strides do not count where there is one. */
struct copy {
    void *dst;
    const void *src;
    size_t dst_stride, src_stride, bytes, n;
    const char *call;
};

static size_t span(size_t stride, size_t bytes, size_t n)
{
    return bytes && n ? (n - 1) * stride + bytes : 0;
}

/* Whether the direction is what the memory says. */
static bool is_direction(enum cudaMemcpyKind kind, enum place dst, enum place src)
{
    bool to_device = dst == PLACE_DEVICE, from_device = src == PLACE_DEVICE;

    switch (kind) {
    case cudaMemcpyDefault:        return true;
    case cudaMemcpyHostToHost:     return !to_device && !from_device;
    case cudaMemcpyHostToDevice:   return to_device && !from_device;
    case cudaMemcpyDeviceToHost:   return !to_device && from_device;
    case cudaMemcpyDeviceToDevice: return to_device && from_device;
    }
    return false;
}

static cudaError_t check_copy(const struct copy *c, enum cudaMemcpyKind kind)
{
    size_t to_bytes = span(c->dst_stride, c->bytes, c->n);
    size_t from_bytes = span(c->src_stride, c->bytes, c->n);
    const char *to = c->dst, *from = c->src;
    enum place dst, src;

    if (!cudart_find_memory(&dst, c->call, c->dst, to_bytes) ||
        !cudart_find_memory(&src, c->call, c->src, from_bytes))
        return cudart_error(cudaErrorInvalidValue);
    if (to_bytes && !is_direction(kind, dst, src))
        return cudart_refuse(cudaErrorInvalidValue, c->call, "%p to %p is not of kind %d", c->src,
                             c->dst, (int)kind);
    if (c->n == 1 && to < from + from_bytes && from < to + to_bytes)
        return cudart_refuse(cudaErrorInvalidValue, c->call, "%zu bytes at %p overlap those at %p",
                             c->bytes, c->src, c->dst);
    return cudaSuccess;
}

/* The memory of a graph may have been freed since it was recorded. */
static void run_copy(const void *args)
{
    const struct copy *c = args;

    if (check_copy(c, cudaMemcpyDefault) != cudaSuccess)
        cudart_die(c->call, "of a graph that outlived its memory");
    for (size_t i = 0; i < c->n; i++)
        memcpy((char *)c->dst + i * c->dst_stride, (const char *)c->src + i * c->src_stride,
               c->bytes);
}

static cudaError_t queue_copy(const struct copy *c, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    cudaError_t e;

    cudart_lock();
    e = check_copy(c, kind);
    if (e == cudaSuccess && c->bytes && c->n)
        e = cudart_queue(stream, c->call, run_copy, c, sizeof *c);
    cudart_unlock();
    return e;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    const struct copy c = { dst, src, bytes, bytes, bytes, 1, "cudaMemcpyAsync" };

    return queue_copy(&c, kind, stream);
}

cudaError_t cudaMemcpy2DAsync(void *dst, size_t dst_pitch, const void *src, size_t src_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t stream)
{
    const struct copy c = { dst, src, dst_pitch, src_pitch, width, height, "cudaMemcpy2DAsync" };

    if (width > dst_pitch || width > src_pitch || dst_pitch > 0x7fffffff || src_pitch > 0x7fffffff)
        return cudart_refuse(cudaErrorInvalidPitchValue, c.call,
                             "pitches of %zu and %zu for rows of %zu bytes", dst_pitch, src_pitch,
                             width);
    return queue_copy(&c, kind, stream);
}

struct fill {
    void *dst;
    size_t bytes;
    int value;
};

static void run_fill(const void *args)
{
    const struct fill *f = args;

    cudart_check_memory("cudaMemsetAsync", f->dst, f->bytes);
    memset(f->dst, f->value, f->bytes);
}

static cudaError_t queue_fill(const char *call, void *dst, int value, size_t bytes,
                              cudaStream_t stream)
{
    const struct fill f = { dst, bytes, value };
    enum place place;
    cudaError_t e;

    cudart_lock();
    if (!cudart_find_memory(&place, call, dst, bytes) || (bytes && place == PLACE_UNKNOWN))
        e = cudart_refuse(cudaErrorInvalidValue, call, "%p is not memory of the device", dst);
    else
        e = cudart_queue(stream, call, run_fill, &f, sizeof f);
    cudart_unlock();
    return e;
}

cudaError_t cudaMemsetAsync(void *dst, int value, size_t bytes, cudaStream_t stream)
{
    return queue_fill("cudaMemsetAsync", dst, value, bytes, stream);
}

cudaError_t cudaMemset(void *dst, int value, size_t bytes)
{
    return queue_fill("cudaMemset", dst, value, bytes, NULL);
}
