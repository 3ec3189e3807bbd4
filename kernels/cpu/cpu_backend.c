#include "kernels/cpu/cpu.h"

#include "engine/base/host_limits.h"
#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "kernels/cpu/index.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/scratch.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

/* Beyond this many threads the option is a mistake. */
enum { MAX_THREADS = 1024 };

/* Work is done when it is queued, so an event only has to carry the order between
 * threads: what was written before the record is seen after the wait. */
struct event {
    struct backend *be;          /* first, see backend_open.h */
    _Atomic uint64_t records;
};

static bool can_rotate(int dim, int most)
{
    return dim >= 16 && dim <= most && (dim & (dim - 1)) == 0;
}

static bool supports_latent(const struct kv_shape *kv, struct error *why)
{
    int latent = kv->latent_dim, rope = kv->head_dim - latent;

    if (kv->kv_heads != 1)
        error_set(why, ST_UNSUPPORTED, "%d KV heads: latent attention has one", kv->kv_heads);
    else if (kv->index != INDEX_ROTATED)
        error_set(why, ST_UNSUPPORTED, "latent attention has the rotated token index alone");
    else if (!can_rotate(latent, MOST_PART_DIM) || !can_rotate(rope, MOST_PART_DIM))
        error_set(why, ST_UNSUPPORTED, "latent keys of %d and %d channels: the CPU back end does "
                  "powers of two from 16 to %d", latent, rope, (int)MOST_PART_DIM);
    else
        return true;
    return false;
}

static bool cpu_supports(const struct shape_query *q, struct error *why)
{
    const struct kv_shape *kv = &q->kv;

    if (q->dim < 1 || q->mlp_dim < 1 || q->vocab < 1 || q->heads < 1 || kv->kv_heads < 1)
        error_set(why, ST_UNSUPPORTED, "a model dimension is not positive");
    else if (q->heads % kv->kv_heads)
        error_set(why, ST_UNSUPPORTED, "%d query heads do not divide among %d KV heads",
                  q->heads, kv->kv_heads);
    else if (q->n_experts > MOST_EXPERTS || q->n_chosen > MOST_CHOSEN)
        error_set(why, ST_UNSUPPORTED,
                  "%d of %d experts for each token: the CPU back end does up to %d of %d",
                  q->n_chosen, q->n_experts, MOST_CHOSEN, MOST_EXPERTS);
    else if (kv->latent_dim)
        return supports_latent(kv, why);
    else if (!can_rotate(kv->head_dim, 256))
        error_set(why, ST_UNSUPPORTED,
                  "head dimension %d: the CPU back end does powers of two from 16 to 256",
                  kv->head_dim);
    else if (kv->filter == FILTER_MEANS && kv->index != INDEX_ROTATED)
        error_set(why, ST_UNSUPPORTED, "filter means needs token-index rotated");
    else if (kv->index == INDEX_CHANNELS && kv->head_dim < INDEX_CHANNELS_KEPT)
        error_set(why, ST_UNSUPPORTED, "head dimension %d has fewer than %d channels to keep",
                  kv->head_dim, INDEX_CHANNELS_KEPT);
    else
        return true;
    return false;
}

static const struct backend_ops cpu_ops = {
    .supports = cpu_supports,
    .embed = cpu_embed,
    .add_norm = cpu_add_norm,
    .linear = cpu_linear,
    .logits = cpu_logits,
    .rope_table = cpu_rope_table,
    .rope_store = cpu_rope_store,
    .linear_heads = cpu_linear_heads,
    .latent_store = cpu_latent_store,
    .attend_dense = cpu_attend_dense,
    .block_filter = cpu_block_filter,
    .token_select = cpu_token_select,
    .attend_selected = cpu_attend_selected,
    .attend_two_level = cpu_attend_two_level,
    .silu_mul = cpu_silu_mul,
    .linear_gated = cpu_linear_gated,
    .route = cpu_route,
    .experts = cpu_experts,
    .sample = cpu_sample,
    .block_filter_scratch = cpu_block_filter_scratch,
    .token_select_scratch = cpu_token_select_scratch,
    .attend_dense_scratch = cpu_attend_dense_scratch,
    .attend_two_level_scratch = cpu_attend_two_level_scratch,
    .experts_scratch = cpu_experts_scratch,
};

static void close_cpu(struct backend *be)
{
    int n = workers_count(be->workers);

    workers_destroy(be->workers);
    scratch_destroy(be->scratch, n);
    mem_free(be);
}

static const struct device_info *info_of(const struct backend *be)
{
    return &be->info;
}

static const struct backend_ops *ops_of(const struct backend *be)
{
    return &be->ops;
}

static size_t memory_of(struct backend *be)
{
    return be->info.mem_bytes;
}

/* Both kinds are plain memory.  Large ones begin on a huge page. */
static enum status alloc_buffer(struct backend *be, struct buffer *out, enum memory_kind kind,
                                size_t bytes)
{
    void *base = mem_map(bytes, bytes >= 2u << 20 ? 2u << 20 : 4096);

    (void)be;
    if (!base)
        return ST_NODEVMEM;
    *out = (struct buffer){ .base = base, .bytes = bytes, .kind = kind };
    return ST_OK;
}

static void free_buffer(struct backend *be, struct buffer *buf)
{
    (void)be;
    mem_unmap(buf->base, buf->bytes);
}

/* All of the process's memory is the device's. */
static enum status register_host(struct backend *be, void *base, size_t bytes, struct error *err)
{
    (void)be;
    (void)base;
    (void)bytes;
    (void)err;
    return ST_OK;
}

static void unregister_host(struct backend *be, void *base)
{
    (void)be;
    (void)base;
}

static struct stream *create_stream(struct backend *be)
{
    struct stream *s = mem_calloc(1, sizeof *s);

    s->be = be;
    s->failed = ST_OK;
    return s;
}

static void destroy_stream(struct stream *s)
{
    mem_free(s);
}

/* Nothing is ever under way: to wait for a failure and to ask for one are the same. */
static enum status failure_of(struct stream *s, struct error *err)
{
    if (s->failed != ST_OK)
        return error_set(err, s->failed, "the CPU stream failed: %s", status_name(s->failed));
    return ST_OK;
}

static void copy(struct stream *s, void *dst, const void *src, size_t bytes)
{
    if (s->failed == ST_OK)
        memmove(dst, src, bytes);
}

static void copy_pieces(struct stream *s, void *dst, size_t dst_stride, const void *src,
                        size_t src_stride, size_t bytes, size_t n)
{
    for (size_t i = 0; i < n; i++)
        copy(s, (char *)dst + i * dst_stride, (const char *)src + i * src_stride, bytes);
}

static void fill(struct stream *s, void *dst, uint8_t value, size_t bytes)
{
    if (s->failed == ST_OK)
        memset(dst, value, bytes);
}

static struct event *create_event(struct backend *be)
{
    struct event *ev = mem_calloc(1, sizeof *ev);

    ev->be = be;
    return ev;
}

static void destroy_event(struct event *ev)
{
    mem_free(ev);
}

static void record_event(struct event *ev, struct stream *s)
{
    (void)s;
    atomic_fetch_add_explicit(&ev->records, 1, memory_order_release);
}

static void wait_event(struct stream *s, struct event *ev)
{
    (void)s;
    (void)atomic_load_explicit(&ev->records, memory_order_acquire);
}

static bool done_event(const struct event *ev)
{
    (void)atomic_load_explicit(&ev->records, memory_order_acquire);
    return true;
}

static const struct device_calls cpu_calls = {
    .close = close_cpu,
    .info = info_of,
    .ops = ops_of,
    .memory_free = memory_of,
    .buffer_alloc = alloc_buffer,
    .buffer_free = free_buffer,
    .host_register = register_host,
    .host_unregister = unregister_host,
    .stream_create = create_stream,
    .stream_destroy = destroy_stream,
    .stream_sync = failure_of,
    .stream_failure = failure_of,
    .stream_copy = copy,
    .stream_copy_pieces = copy_pieces,
    .stream_fill = fill,
    .event_create = create_event,
    .event_destroy = destroy_event,
    .event_record = record_event,
    .event_wait = wait_event,
    .event_done = done_event,
};

enum status cpu_backend_open(struct backend **out, const struct backend_options *options,
                             struct error *err)
{
    int threads = options ? options->threads : 0;
    enum cpu_isa isa;

    TRY(isa_choose(&isa, options ? options->isa : NULL, err));
    if (threads < 0 || threads > MAX_THREADS)
        return error_set(err, ST_INVALID, "%d threads: the CPU back end takes 1 to %d, or 0",
                         threads, MAX_THREADS);
    if (threads == 0)
        threads = host_core_limit();
    if (threads > MAX_THREADS)
        threads = MAX_THREADS;

    struct backend *be = mem_calloc(1, sizeof *be);
    be->calls = &cpu_calls;
    be->ops = cpu_ops;
    be->isa = isa;
    be->workers = workers_create(threads);
    be->scratch = scratch_create(threads);
    snprintf(be->info.name, sizeof be->info.name, "cpu: %d %s, %s", threads,
             threads == 1 ? "thread" : "threads", isa_name(isa));
    be->info.mem_bytes = host_memory_limit();
    be->info.host_visible = true;
    be->info.act = DTYPE_F32;
    be->info.crossover_tokens = 4096;  /* docs/PERFORMANCE.md */
    *out = be;
    return ST_OK;
}
