#include "tests/support/lazy_device.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "kernels/backend_open.h"

#include <sched.h>
#include <stdatomic.h>
#include <string.h>

/* Of one stream; more are done early. */
enum { MOST_STEPS = 256 };

enum step_kind { STEP_COPY, STEP_FILL, STEP_RECORD, STEP_WAIT };

struct step {
    enum step_kind kind;
    void *dst;
    const void *src;
    size_t dst_stride, src_stride, bytes, n;
    uint8_t value;
    struct event *ev;
    uint64_t record;             /* of the event: this one, or the one to wait for */
};

struct backend {
    const struct device_calls *calls;
    struct device_info info;
    uint64_t seed, fail_at;
    const char *fence;
    int refuse;
    const char *held;
    size_t held_bytes;
    atomic_bool holds;           /* copies into held */
    _Atomic uint64_t n_steps, n_streams;
    atomic_int n_registers, registered;
    atomic_bool failed;          /* the device, and so all of its streams */
};

struct stream {
    struct backend *be;
    uint64_t random;
    struct step steps[MOST_STEPS];
    unsigned n_queued, n_done;
};

struct event {
    struct backend *be;
    struct stream *stream;       /* of the last record */
    _Atomic uint64_t recorded, happened;
};

static unsigned draw(struct stream *s, unsigned n)
{
    s->random = s->random * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(s->random >> 33) % n;
}

/* All that a copy spans, gaps between its pieces included. */
static void assert_beside_fence(const struct backend *be, const void *from, size_t bytes)
{
    const char *at = from;

    ASSERT(!be->fence || at >= be->fence || at + bytes <= be->fence);
}

static bool is_held(const struct backend *be, const struct step *t)
{
    const char *to = t->dst;

    return t->kind == STEP_COPY && atomic_load(&be->holds) && to >= be->held &&
           to < be->held + be->held_bytes;
}

/* False where it has to wait. */
static bool run_step(struct stream *s, const struct step *t)
{
    if (is_held(s->be, t))
        return false;
    if (t->kind == STEP_WAIT && atomic_load(&t->ev->happened) < t->record)
        return false;
    if (atomic_fetch_add(&s->be->n_steps, 1) + 1 == s->be->fail_at)
        atomic_store(&s->be->failed, true);
    if (t->kind == STEP_RECORD)
        atomic_store(&t->ev->happened, t->record);
    if (atomic_load(&s->be->failed))
        return true;
    if (t->kind == STEP_COPY)
        for (size_t i = 0; i < t->n; i++)
            memcpy((char *)t->dst + i * t->dst_stride,
                   (const char *)t->src + i * t->src_stride, t->bytes);
    if (t->kind == STEP_FILL)
        memset(t->dst, t->value, t->bytes);
    return true;
}

static void run_some(struct stream *s, unsigned most)
{
    for (; most > 0 && s->n_done != s->n_queued; most--, s->n_done++)
        if (!run_step(s, &s->steps[s->n_done % MOST_STEPS]))
            return;
}

static void queue(struct stream *s, const struct step *t)
{
    while (s->n_queued - s->n_done == MOST_STEPS)
        run_some(s, 1);
    if (!atomic_load(&s->be->failed))
        s->steps[s->n_queued++ % MOST_STEPS] = *t;
}

static void lazy_close(struct backend *be)
{
    mem_free(be);
}

static const struct device_info *lazy_info(const struct backend *be)
{
    return &be->info;
}

static enum status lazy_buffer_alloc(struct backend *be, struct buffer *out, enum memory_kind kind,
                                     size_t bytes)
{
    void *base = mem_map(bytes, 4096);

    (void)be;
    *out = (struct buffer){ .base = base, .bytes = bytes, .kind = kind };
    return base ? ST_OK : ST_NODEVMEM;
}

static void lazy_buffer_free(struct backend *be, struct buffer *buf)
{
    (void)be;
    mem_unmap(buf->base, buf->bytes);
}

static enum status lazy_host_register(struct backend *be, void *base, size_t bytes,
                                      struct error *err)
{
    (void)base;
    if (atomic_fetch_add(&be->n_registers, 1) + 1 == be->refuse)
        return error_set(err, ST_NOMEM, "%zu bytes refused by the test", bytes);
    atomic_fetch_add(&be->registered, 1);
    return ST_OK;
}

static void lazy_host_unregister(struct backend *be, void *base)
{
    (void)base;
    atomic_fetch_sub(&be->registered, 1);
}

static struct stream *lazy_stream_create(struct backend *be)
{
    struct stream *s = mem_calloc(1, sizeof *s);

    s->be = be;
    s->random = be->seed + atomic_fetch_add(&be->n_streams, 1) * 7919;
    return s;
}

static void lazy_stream_destroy(struct stream *s)
{
    ASSERT(s->n_done == s->n_queued || atomic_load(&s->be->failed));
    mem_free(s);
}

static enum status lazy_stream_failure(struct stream *s, struct error *err)
{
    if (!atomic_load(&s->be->failed))
        return ST_OK;
    return error_set(err, ST_DEVICE, "the lazy device failed");
}

static enum status lazy_stream_sync(struct stream *s, struct error *err)
{
    for (; s->n_done != s->n_queued; sched_yield())
        run_some(s, MOST_STEPS);
    return lazy_stream_failure(s, err);
}

static void lazy_copy_pieces(struct stream *s, void *dst, size_t dst_stride, const void *src,
                             size_t src_stride, size_t bytes, size_t n)
{
    if (n > 0) {
        assert_beside_fence(s->be, dst, (n - 1) * dst_stride + bytes);
        assert_beside_fence(s->be, src, (n - 1) * src_stride + bytes);
    }
    queue(s, &(struct step){ .kind = STEP_COPY, .dst = dst, .src = src, .bytes = bytes, .n = n,
                             .dst_stride = dst_stride, .src_stride = src_stride });
}

static void lazy_copy(struct stream *s, void *dst, const void *src, size_t bytes)
{
    lazy_copy_pieces(s, dst, 0, src, 0, bytes, 1);
}

static void lazy_fill(struct stream *s, void *dst, uint8_t value, size_t bytes)
{
    queue(s, &(struct step){ .kind = STEP_FILL, .dst = dst, .value = value, .bytes = bytes });
}

static struct event *lazy_event_create(struct backend *be)
{
    struct event *ev = mem_calloc(1, sizeof *ev);

    ev->be = be;
    return ev;
}

static void lazy_event_destroy(struct event *ev)
{
    mem_free(ev);
}

static void lazy_event_record(struct event *ev, struct stream *s)
{
    if (atomic_load(&s->be->failed))
        return;
    ev->stream = s;
    queue(s, &(struct step){ .kind = STEP_RECORD, .ev = ev,
                             .record = atomic_fetch_add(&ev->recorded, 1) + 1 });
}

static void lazy_event_wait(struct stream *s, struct event *ev)
{
    queue(s, &(struct step){ .kind = STEP_WAIT, .ev = ev, .record = atomic_load(&ev->recorded) });
}

static bool lazy_event_done(const struct event *ev)
{
    if (atomic_load(&ev->happened) < atomic_load(&ev->recorded))
        run_some(ev->stream, draw(ev->stream, 4));
    return atomic_load(&ev->happened) >= atomic_load(&ev->recorded);
}

static const struct device_calls lazy_calls = {
    .close = lazy_close,
    .info = lazy_info,
    .buffer_alloc = lazy_buffer_alloc,
    .buffer_free = lazy_buffer_free,
    .host_register = lazy_host_register,
    .host_unregister = lazy_host_unregister,
    .stream_create = lazy_stream_create,
    .stream_destroy = lazy_stream_destroy,
    .stream_sync = lazy_stream_sync,
    .stream_failure = lazy_stream_failure,
    .stream_copy = lazy_copy,
    .stream_copy_pieces = lazy_copy_pieces,
    .stream_fill = lazy_fill,
    .event_create = lazy_event_create,
    .event_destroy = lazy_event_destroy,
    .event_record = lazy_event_record,
    .event_wait = lazy_event_wait,
    .event_done = lazy_event_done,
};

struct backend *lazy_device_open(uint64_t seed)
{
    struct backend *be = mem_calloc(1, sizeof *be);

    be->calls = &lazy_calls;
    be->seed = seed;
    return be;
}

void lazy_device_fail_at(struct backend *be, uint64_t step)
{
    be->fail_at = step;
}

void lazy_device_hold(struct backend *be, void *base, size_t bytes)
{
    be->held = base;
    be->held_bytes = bytes;
    atomic_store(&be->holds, true);
}

void lazy_device_release(struct backend *be)
{
    atomic_store(&be->holds, false);
}

void lazy_device_fence(struct backend *be, const void *address)
{
    be->fence = address;
}

void lazy_device_refuse(struct backend *be, int call)
{
    be->refuse = call;
}

int lazy_device_registered(const struct backend *be)
{
    return atomic_load(&be->registered);
}
