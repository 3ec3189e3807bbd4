/* The CUDA back end's device, memory, streams and events.
 *
 * Errors of the device are final: a CUDA context does not recover.  What can
 * fail for reasons outside the program (no driver, no GPU, no memory) is
 * reported where it is asked for; everything later sticks to the stream.
 *
 * A thread has a current device, at first the first one.  Whatever is called here makes it that of
 * the object: a call that needs no current device would still give the first GPU a context, and
 * take memory of it, though only others are in use. */

#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/latent.cuh"

#include "engine/base/mem.h"

#include <stdio.h>
#include <string.h>

/* Compute capability of the oldest code in the binary. */
enum { OLDEST_MAJOR = 8 };

static enum status set_device(const struct backend *be)
{
    return cudaSetDevice(be->device) == cudaSuccess ? ST_OK : ST_DEVICE;
}

static void device_close(struct backend *be)
{
    mem_free(be);
}

static const struct device_info *device_info_of(const struct backend *be)
{
    return &be->info;
}

static size_t device_memory_free(struct backend *be)
{
    size_t free_bytes = 0, total = 0;

    if (set_device(be) != ST_OK || cudaMemGetInfo(&free_bytes, &total) != cudaSuccess)
        return 0;
    return free_bytes;
}

static const struct backend_ops *device_ops(const struct backend *be)
{
    return &be->ops;
}

static enum status device_buffer_alloc(struct backend *be, struct buffer *out,
                                       enum memory_kind kind, size_t bytes)
{
    cudaError_t e;

    TRY(set_device(be));
    if (kind == MEM_DEVICE) {
        e = cudaMalloc(&out->base, bytes);
        if (e == cudaSuccess)
            e = cudaMemset(out->base, 0, bytes);
        if (e == cudaSuccess)    /* our streams do not wait for this one */
            e = cudaStreamSynchronize(cudaStreamLegacy);
    } else {
        e = cudaHostAlloc(&out->base, bytes, cudaHostAllocDefault);
        if (e == cudaSuccess)
            memset(out->base, 0, bytes);
    }
    if (e != cudaSuccess) {
        /* Memory that is not there is an answer, not a broken context. */
        cudaGetLastError();
        out->base = NULL;
        return e == cudaErrorMemoryAllocation ? ST_NODEVMEM : ST_DEVICE;
    }
    out->bytes = bytes;
    return ST_OK;
}

static void device_buffer_free(struct backend *be, struct buffer *buf)
{
    cudaSetDevice(be->device);
    if (buf->kind == MEM_DEVICE)
        cudaFree(buf->base);
    else
        cudaFreeHost(buf->base);
}

/* Where host and device have one address space, the host's address is the device's too. */
static enum status device_host_register(struct backend *be, void *base, size_t bytes,
                                        struct error *err)
{
    void *seen = NULL;
    cudaError_t e = cudaSetDevice(be->device);

    if (e == cudaSuccess)
        e = cudaHostRegister(base, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (e != cudaSuccess) {
        cudaGetLastError();      /* an answer, not a broken context */
        return error_set(err, e == cudaErrorNotSupported ? ST_UNSUPPORTED : ST_NOMEM,
                         "%zu MB of host memory cannot be pinned for %s: %s", bytes >> 20,
                         be->info.name, cudaGetErrorString(e));
    }
    e = cudaHostGetDevicePointer(&seen, base, 0);
    if (e == cudaSuccess && seen == base)
        return ST_OK;
    cudaGetLastError();
    cudaHostUnregister(base);
    return error_set(err, ST_UNSUPPORTED,
                     "%s cannot use host memory at the address that the host uses",
                     be->info.name);
}

static void device_host_unregister(struct backend *be, void *base)
{
    cudaSetDevice(be->device);
    cudaHostUnregister(base);
}

static struct stream *device_stream_create(struct backend *be)
{
    struct stream *s = (struct stream *)mem_calloc(1, sizeof *s);

    s->be = be;
    s->failed = cudaSetDevice(be->device);
    if (s->failed == cudaSuccess)
        s->failed = cudaStreamCreateWithFlags(&s->cu, cudaStreamNonBlocking);
    if (s->failed == cudaSuccess)
        s->failed = linear_plans_create(&s->plans);
    if (s->failed == cudaSuccess)
        s->failed = cudaMalloc(&s->arrived, MOST_ARRIVED * sizeof *s->arrived);
    if (s->failed == cudaSuccess)
        s->failed = cudaMemsetAsync(s->arrived, 0, MOST_ARRIVED * sizeof *s->arrived, s->cu);
    if (!stream_enter(s))
        s->failed_op = "stream_create";
    s->sampler = sampler_create();
    return s;
}

static void device_stream_destroy(struct stream *s)
{
    cudaSetDevice(s->be->device);
    if (s->cu)
        cudaStreamDestroy(s->cu);
    cudaFree(s->arrived);
    sampler_destroy(s->sampler);
    linear_plans_destroy(s->plans);
    mem_free(s);
}

static enum status failure_of(const struct stream *s, struct error *err)
{
    if (s->failed == cudaSuccess)
        return ST_OK;
    return error_set(err, ST_DEVICE, "%s failed on %s: %s", s->failed_op, s->be->info.name,
                     cudaGetErrorString(s->failed));
}

static enum status device_stream_sync(struct stream *s, struct error *err)
{
    cudaSetDevice(s->be->device);
    stream_check(s, cudaStreamSynchronize(s->cu), "stream_sync");
    return failure_of(s, err);
}

static enum status device_stream_failure(struct stream *s, struct error *err)
{
    cudaError_t e = stream_enter(s) ? cudaStreamQuery(s->cu) : cudaSuccess;

    if (e != cudaErrorNotReady)
        stream_check(s, e, "stream_failure");
    return failure_of(s, err);
}

static void device_stream_copy(struct stream *s, void *dst, const void *src, size_t bytes)
{
    if (!stream_enter(s))
        return;
    stream_check(s, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, s->cu), "stream_copy");
}

static void device_stream_copy_pieces(struct stream *s, void *dst, size_t dst_stride,
                                      const void *src, size_t src_stride, size_t bytes, size_t n)
{
    const size_t most = s->be->most_pitch;

    if (!stream_enter(s))
        return;
    /* What is no pitch: pieces too far apart, or that overlap. */
    if (dst_stride > most || src_stride > most || dst_stride < bytes || src_stride < bytes) {
        for (size_t i = 0; i < n; i++)
            device_stream_copy(s, (char *)dst + i * dst_stride,
                               (const char *)src + i * src_stride, bytes);
        return;
    }
    stream_check(s, cudaMemcpy2DAsync(dst, dst_stride, src, src_stride, bytes, n,
                                      cudaMemcpyDefault, s->cu), "stream_copy_pieces");
}

static void device_stream_fill(struct stream *s, void *dst, uint8_t value, size_t bytes)
{
    if (stream_enter(s))
        stream_check(s, cudaMemsetAsync(dst, value, bytes, s->cu), "stream_fill");
}

static struct event *device_event_create(struct backend *be)
{
    struct event *ev = (struct event *)mem_calloc(1, sizeof *ev);

    ev->be = be;
    if (set_device(be) != ST_OK ||
        cudaEventCreateWithFlags(&ev->cu, cudaEventDisableTiming) != cudaSuccess)
        ev->cu = NULL;
    return ev;
}

static void device_event_destroy(struct event *ev)
{
    cudaSetDevice(ev->be->device);
    if (ev->cu)
        cudaEventDestroy(ev->cu);
    mem_free(ev);
}

static void device_event_record(struct event *ev, struct stream *s)
{
    if (!stream_enter(s))
        return;
    stream_check(s, ev->cu ? cudaEventRecord(ev->cu, s->cu) : cudaErrorInvalidResourceHandle,
                 "event_record");
}

static void device_event_wait(struct stream *s, struct event *ev)
{
    if (!stream_enter(s))
        return;
    stream_check(s, ev->cu ? cudaStreamWaitEvent(s->cu, ev->cu, 0)
                           : cudaErrorInvalidResourceHandle, "event_wait");
}

/* A failed device has finished all it ever will. */
static bool device_event_done(const struct event *ev)
{
    cudaSetDevice(ev->be->device);
    return !ev->cu || cudaEventQuery(ev->cu) != cudaErrorNotReady;
}

/* ---- graphs */

static void device_graph_begin(struct stream *s)
{
    if (stream_enter(s))
        stream_check(s, cudaStreamBeginCapture(s->cu, cudaStreamCaptureModeThreadLocal),
                     "graph_begin");
}

static struct graph *device_graph_end(struct stream *s)
{
    cudaGraph_t recorded = NULL;
    cudaGraphExec_t cu = NULL;

    /* A capture that failed must be ended too. */
    cudaError_t e = cudaStreamEndCapture(s->cu, &recorded);
    if (e == cudaSuccess && s->failed == cudaSuccess)
        e = cudaGraphInstantiate(&cu, recorded, 0);
    stream_check(s, e, "graph_end");
    if (recorded)
        cudaGraphDestroy(recorded);
    if (!cu)
        return NULL;
    struct graph *g = (struct graph *)mem_calloc(1, sizeof *g);
    g->be = s->be;
    g->cu = cu;
    return g;
}

static void device_graph_launch(struct stream *s, struct graph *g)
{
    if (stream_enter(s))
        stream_check(s, cudaGraphLaunch(g->cu, s->cu), "graph_launch");
}

static void device_graph_destroy(struct graph *g)
{
    cudaSetDevice(g->be->device);
    cudaGraphExecDestroy(g->cu);
    mem_free(g);
}

static bool supports_width(const struct shape_query *q, struct error *why)
{
    if (q->dim % 8 || q->mlp_dim % 8) {
        error_set(why, ST_UNSUPPORTED,
                  "hidden size %d, MLP size %d: the CUDA back end needs multiples of 8", q->dim,
                  q->mlp_dim);
        return false;
    }
    if (q->dim > MOST_ROW || q->mlp_dim > MOST_ROW) {
        error_set(why, ST_UNSUPPORTED,
                  "hidden size %d, MLP size %d: the CUDA back end takes up to %d", q->dim,
                  q->mlp_dim, MOST_ROW);
        return false;
    }
    if (q->n_experts > MOST_EXPERTS || q->n_chosen > MOST_CHOSEN || q->expert_dim % 8 ||
        q->expert_dim > MOST_ROW) {
        error_set(why, ST_UNSUPPORTED,
                  "%d of %d experts of width %d for each token: the CUDA back end takes up to %d "
                  "of %d, and widths that are multiples of 8 up to %d", q->n_chosen, q->n_experts,
                  q->expert_dim, (int)MOST_CHOSEN, (int)MOST_EXPERTS, (int)MOST_ROW);
        return false;
    }
    return true;
}

static bool supports_latent(const struct shape_query *q, struct error *why)
{
    const struct kv_shape *kv = &q->kv;

    for (int width : q->latent_widths)
        if (width % 8 || width > MOST_ROW) {
            error_set(why, ST_UNSUPPORTED, "latent attention with queries of rank %d, of %d values "
                      "without rope, and values of %d: the CUDA back end takes multiples of 8",
                      q->latent_widths[0], q->latent_widths[1], q->latent_widths[2]);
            return false;
        }
    if (q->latent_widths[1] > latent::L) { /* linear_heads has all of a head in shared memory */
        error_set(why, ST_UNSUPPORTED, "queries of %d values without rope: the CUDA back end takes "
                  "up to %d", q->latent_widths[1], (int)latent::L);
        return false;
    }
    if (kv->latent_dim == latent::L && kv->head_dim == latent::D &&
        q->heads <= latent::MOST_HEADS)
        return true;
    error_set(why, ST_UNSUPPORTED, "latent attention of %d heads to rows of %d + %d values: the "
              "CUDA back end takes up to %d heads and rows of %d + %d", q->heads, kv->latent_dim,
              kv->head_dim - kv->latent_dim, (int)latent::MOST_HEADS, (int)latent::L,
              (int)latent::P);
    return false;
}

static bool device_supports(const struct shape_query *q, struct error *why)
{
    const struct kv_shape *kv = &q->kv;

    if (kv->filter == FILTER_MEANS && kv->index != INDEX_ROTATED) {
        error_set(why, ST_UNSUPPORTED, "filter means needs token-index rotated");
        return false;
    }
    if (kv->latent_dim)
        return supports_latent(q, why) && supports_width(q, why);
    if (kv->head_dim != 64 && kv->head_dim != 128) {
        error_set(why, ST_UNSUPPORTED, "head_dim %d: the CUDA back end has 64 and 128",
                  kv->head_dim);
        return false;
    }
    if (q->heads / kv->kv_heads > 16) {
        error_set(why, ST_UNSUPPORTED,
                  "%d query heads for each KV head: the CUDA back end takes up to 16",
                  q->heads / kv->kv_heads);
        return false;
    }
    if (kv->kv_heads > MOST_KV_HEADS) {
        error_set(why, ST_UNSUPPORTED, "%d KV heads: the CUDA back end takes up to %d",
                  kv->kv_heads, (int)MOST_KV_HEADS);
        return false;
    }
    return supports_width(q, why);
}

/* Of latent attention a thread block has the rows of some tokens, of 1,152 bytes, and the sums of
 * all heads. */
enum { LATENT_SHARED = 160 * 1024 };

static bool small_device_supports(const struct shape_query *q, struct error *why)
{
    if (!q->kv.latent_dim)
        return device_supports(q, why);
    error_set(why, ST_UNSUPPORTED, "latent attention needs %d KB of shared memory for a thread "
              "block, which this GPU does not have (compute capabilities 8.0 and 9.0 have)",
              LATENT_SHARED / 1024);
    return false;
}

/* Has an image wherever the rest has. */
static __global__ void probe()
{
}

/* Code is for the compute capabilities that were built for (CUDA_ARCHS in the Makefile). */
static enum status check_image(const struct backend *be, struct error *err)
{
    cudaFuncAttributes found;
    cudaError_t e = cudaFuncGetAttributes(&found, probe);

    if (e == cudaErrorNoKernelImageForDevice)
        return error_set(err, ST_UNSUPPORTED, "%s: this program has no code for it, see CUDA_ARCHS "
                         "in the Makefile", be->info.name);
    return e == cudaSuccess ? ST_OK
                            : error_set(err, ST_DEVICE, "%s cannot be used: %s", be->info.name,
                                        cudaGetErrorString(e));
}

static const struct device_calls calls = {
    device_close, device_info_of, device_ops,
    device_memory_free, device_buffer_alloc, device_buffer_free,
    device_host_register, device_host_unregister,
    device_stream_create, device_stream_destroy, device_stream_sync, device_stream_failure,
    device_stream_copy, device_stream_copy_pieces, device_stream_fill,
    device_event_create, device_event_destroy, device_event_record, device_event_wait,
    device_event_done, device_graph_begin, device_graph_end, device_graph_launch,
    device_graph_destroy,
};

static enum status describe(struct backend *be, struct error *err)
{
    cudaDeviceProp prop;
    cudaError_t e = cudaGetDeviceProperties(&prop, be->device);

    if (e != cudaSuccess)
        return error_set(err, ST_DEVICE, "cuda:%d: %s", be->device, cudaGetErrorString(e));
    if (prop.major < OLDEST_MAJOR)
        return error_set(err, ST_UNSUPPORTED,
                         "cuda:%d is a %s of compute capability %d.%d; %d.0 is the least",
                         be->device, prop.name, prop.major, prop.minor, OLDEST_MAJOR);
    snprintf(be->info.name, sizeof be->info.name, "cuda:%d: %.60s", be->device, prop.name);
    be->info.mem_bytes = prop.totalGlobalMem;
    be->most_pitch = prop.memPitch;
    be->most_shared = prop.sharedMemPerBlockOptin;
    be->info.sm_count = prop.multiProcessorCount;
    be->info.host_visible = false;
    be->hopper = prop.major == 9;
    be->info.graphs = true;
    /* Measured on an H100: one sequence of 32 heads on 8 of 128 is as fast either way at
     * 8,400 tokens, more sequences earlier.  Without the kernels for Hopper a guess. */
    be->info.crossover_tokens = be->hopper ? 8192 : 16384;
    be->info.act = DTYPE_BF16;
    return ST_OK;
}

/* Where no driver is, its version is 0. */
extern "C" bool cuda_device_present(void)
{
    int version = 0, n = 0;

    if (cudaDriverGetVersion(&version) == cudaSuccess && version == 0)
        return false;
    cudaError_t e = cudaGetDeviceCount(&n);
    return e != cudaErrorNoDevice && (e != cudaSuccess || n > 0);
}

extern "C" enum status cuda_count_devices(int *out, struct error *err)
{
    cudaError_t e = cudaGetDeviceCount(out);

    return e == cudaSuccess ? ST_OK : error_set(err, ST_UNSUPPORTED, "%s", cudaGetErrorString(e));
}

extern "C" enum status cuda_backend_open(struct backend **out, int device, struct error *err)
{
    int n_devices = 0;
    cudaError_t e = cudaGetDeviceCount(&n_devices);
    enum status st;

    *out = NULL;
    if (e != cudaSuccess)
        return error_set(err, ST_UNSUPPORTED, "cuda:%d: %s", device, cudaGetErrorString(e));
    if (device >= n_devices)
        return error_set(err, ST_UNSUPPORTED, "cuda:%d: this machine has %d GPU%s", device,
                         n_devices, n_devices == 1 ? "" : "s");
    struct backend *be = (struct backend *)mem_calloc(1, sizeof *be);
    be->calls = &calls;
    be->device = device;
    st = describe(be, err);
    if (st == ST_OK && set_device(be) != ST_OK)
        st = error_set(err, ST_DEVICE, "cuda:%d cannot be used: %s", device,
                       cudaGetErrorString(cudaGetLastError()));
    if (st == ST_OK)
        st = check_image(be, err);
    if (st != ST_OK) {
        device_close(be);
        return st;
    }
    be->ops.supports = be->most_shared < LATENT_SHARED ? small_device_supports : device_supports;
    be->ops.embed = cuda_embed;
    be->ops.add_norm = cuda_add_norm;
    be->ops.linear = cuda_linear;
    be->ops.logits = cuda_logits;
    be->ops.rope_table = cuda_rope_table;
    be->ops.rope_store = cuda_rope_store;
    be->ops.linear_heads = cuda_linear_heads;
    be->ops.latent_store = cuda_latent_store;
    be->ops.attend_dense = cuda_attend_dense;
    be->ops.block_filter = cuda_block_filter;
    be->ops.token_select = cuda_token_select;
    be->ops.attend_selected = cuda_attend_selected;
    be->ops.attend_two_level = cuda_attend_two_level;
    be->ops.silu_mul = cuda_silu_mul;
    be->ops.linear_gated = cuda_linear_gated;
    be->ops.route = cuda_route;
    be->ops.experts = cuda_experts;
    be->ops.sample = cuda_sample;
    be->ops.block_filter_scratch = cuda_block_filter_scratch;
    be->ops.token_select_scratch = cuda_token_select_scratch;
    be->ops.attend_dense_scratch = cuda_attend_dense_scratch;
    be->ops.attend_two_level_scratch = cuda_attend_two_level_scratch;
    be->ops.experts_scratch = cuda_experts_scratch;
    *out = be;
    return ST_OK;
}
