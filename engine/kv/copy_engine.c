#include "engine/kv/copy_engine.h"

#include "engine/base/clock.h"
#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/kv/host_memory.h"
#include "kernels/backend.h"

#include <pthread.h>

/* Between two looks at what is under way.  A block of some megabytes takes a tenth of a
 * millisecond and more, and COPIES_IN_FLIGHT of them keep the link busy meanwhile. */
enum { PAUSE_NS = 30000 };

enum { N_KINDS = 2 };            /* copy_kind */

/* Waiting jobs, oldest first. */
struct line {
    struct copy_job *first, **end;
};

/* One direction: a stream, and what is under way on it, oldest first. */
struct lane {
    struct stream *stream;
    struct copy_job *jobs[COPIES_IN_FLIGHT];
    struct event *arrived[COPIES_IN_FLIGHT];
    unsigned n_begun, n_ended;   /* job i is at i % COPIES_IN_FLIGHT */
};

struct copy_engine {
    /* set before the thread starts, then read-only */
    struct copy_engine_config cfg;
    size_t kv_bytes, index_bytes;        /* of a block in one layer */
    size_t kv_stride, index_stride;      /* on the device, from layer to layer */
    size_t slot_bytes;                   /* of the host tier */
    pthread_t thread;
    bool started;
    /* copy thread */
    struct lane lanes[N_KINDS];
    uint64_t n_jobs;
    bool failed;
    /* both, under the lock */
    pthread_mutex_t lock;
    pthread_cond_t posted;
    struct line waiting[2][N_KINDS];     /* [urgent] */
    bool stop;
    struct copy_counts counts;
    struct error failure;                /* code ST_OK: none */
};

/* ---- lines; under the lock */

static void line_init(struct line *l)
{
    l->first = NULL;
    l->end = &l->first;
}

static void line_append(struct line *l, struct copy_job *job)
{
    job->next = NULL;
    *l->end = job;
    l->end = &job->next;
}

static struct copy_job *line_take_first(struct line *l)
{
    struct copy_job *job = l->first;

    l->first = job->next;
    if (!l->first)
        l->end = &l->first;
    return job;
}

static bool nothing_waits(const struct copy_engine *c)
{
    return !c->waiting[0][COPY_STORE].first && !c->waiting[0][COPY_LOAD].first &&
           !c->waiting[1][COPY_STORE].first && !c->waiting[1][COPY_LOAD].first;
}

static unsigned under_way(const struct lane *l)
{
    return l->n_begun - l->n_ended;
}

static bool nothing_under_way(const struct copy_engine *c)
{
    return under_way(&c->lanes[COPY_STORE]) == 0 && under_way(&c->lanes[COPY_LOAD]) == 0;
}

/* The job to begin next, or NULL: the oldest whose stream has room, urgent ones first. */
static struct copy_job *take_next(struct copy_engine *c)
{
    for (int urgent = 1; urgent >= 0; urgent--) {
        struct line *oldest = NULL;
        for (int kind = 0; kind < N_KINDS; kind++) {
            struct line *l = &c->waiting[urgent][kind];
            if (l->first && under_way(&c->lanes[kind]) < COPIES_IN_FLIGHT &&
                (!oldest || l->first->posted_ns < oldest->first->posted_ns))
                oldest = l;
        }
        if (oldest)
            return line_take_first(oldest);
    }
    return NULL;
}

/* ---- copies */

static void move(struct stream *s, enum copy_kind kind, char *device, char *host, size_t bytes)
{
    if (kind == COPY_STORE)
        stream_copy(s, host, device, bytes);
    else
        stream_copy(s, device, host, bytes);
}

static size_t left_in_piece(const struct copy_engine *c, const char *host)
{
    return host_memory_left_in_piece((size_t)(host - (const char *)c->cfg.host));
}

/* All layers of one part of a block: stride bytes apart on the device, neighbours on the host.
 * A copy may not go from one piece of host memory into the next, see host_register(). */
static void move_layers(struct copy_engine *c, enum copy_kind kind, char *device, size_t stride,
                        char *host, size_t bytes)
{
    struct stream *s = c->lanes[kind].stream;
    const size_t layers = (size_t)c->cfg.layers;

    if (layers * bytes > left_in_piece(c, host)) {
        for (size_t i = 0; i < layers; i++, device += stride, host += bytes) {
            size_t n = left_in_piece(c, host) < bytes ? left_in_piece(c, host) : bytes;
            move(s, kind, device, host, n);
            move(s, kind, device + n, host + n, bytes - n);
        }
    } else if (kind == COPY_STORE) {
        stream_copy_pieces(s, host, bytes, device, stride, bytes, layers);
    } else {
        stream_copy_pieces(s, device, stride, host, bytes, bytes, layers);
    }
}

static size_t bytes_of(const struct copy_engine *c, const struct copy_job *job)
{
    return (size_t)c->cfg.layers * ((job->place.kv >= 0 ? c->kv_bytes : 0) +
                                    (job->place.index >= 0 ? c->index_bytes : 0));
}

static void queue_copies(struct copy_engine *c, const struct copy_job *job)
{
    const size_t kv = (size_t)job->place.kv, index = (size_t)job->place.index;
    char *host = (char *)c->cfg.host + (size_t)job->place.host * c->slot_bytes;

    if (job->place.kv >= 0)
        move_layers(c, job->kind, (char *)kv_pool_kv(c->cfg.pool, 0) + kv * c->kv_bytes,
                    c->kv_stride, host, c->kv_bytes);
    if (job->place.index >= 0)
        move_layers(c, job->kind,
                    (char *)kv_pool_index(c->cfg.pool, 0) + index * c->index_bytes,
                    c->index_stride, host + (size_t)c->cfg.layers * c->kv_bytes,
                    c->index_bytes);
}

/* ---- the copy thread */

/* From here on no job arrives.  What a failed stream had begun may still be moving, whatever
 * its events say: it must have ended before the first job is given back. */
static void fail(struct copy_engine *c, const struct error *why)
{
    c->failed = true;
    for (int kind = 0; kind < N_KINDS; kind++)
        if (stream_sync(c->lanes[kind].stream, NULL) != ST_OK)
            continue;            /* what it says is known */
    pthread_mutex_lock(&c->lock);
    c->failure = *why;
    pthread_mutex_unlock(&c->lock);
}

/* The job is the poster's again, and no more ours. */
static void give_back(struct copy_engine *c, struct copy_job *job)
{
    size_t bytes = bytes_of(c, job);

    job->ended_ns = clock_now_ns();
    pthread_mutex_lock(&c->lock);
    struct copy_counts *n = &c->counts;
    if (!job->arrived) {
        n->failed++;
    } else if (job->kind == COPY_STORE) {
        n->stores++;
        n->bytes_stored += bytes;
    } else {
        n->loads++;
        n->bytes_loaded += bytes;
        n->load_wait_ns += job->ended_ns - job->posted_ns;
    }
    pthread_mutex_unlock(&c->lock);
    mailbox_post(c->cfg.done, &job->node);
}

/* Give back what has ended on a stream; whether anything has.  Events of a failed stream are
 * done, so what it had under way is not waited for in vain. */
static bool reap(struct copy_engine *c, struct lane *l)
{
    bool any = false;

    while (under_way(l) > 0 && event_done(l->arrived[l->n_ended % COPIES_IN_FLIGHT])) {
        struct copy_job *job = l->jobs[l->n_ended++ % COPIES_IN_FLIGHT];
        struct error err;
        if (!c->failed && stream_failure(l->stream, &err) != ST_OK)
            fail(c, &err);
        job->arrived = !c->failed;
        give_back(c, job);
        any = true;
    }
    return any;
}

static void begin(struct copy_engine *c, struct copy_job *job)
{
    struct lane *l = &c->lanes[job->kind];
    const uint64_t number = c->n_jobs++;

    job->began_ns = clock_now_ns();
    if (!c->failed && c->cfg.before && !c->cfg.before(c->cfg.before_arg, number)) {
        struct error err;
        (void)error_set(&err, ST_DEVICE, "copy %llu was made to fail",
                        (unsigned long long)number);
        fail(c, &err);
    }
    if (c->failed) {             /* what was begun before has ended, and comes back before */
        (void)reap(c, &c->lanes[COPY_STORE]);
        (void)reap(c, &c->lanes[COPY_LOAD]);
        give_back(c, job);
        return;
    }
    unsigned at = l->n_begun++ % COPIES_IN_FLIGHT;
    l->jobs[at] = job;
    queue_copies(c, job);
    event_record(l->arrived[at], l->stream);
}

static void *copy_thread(void *arg)
{
    const struct timespec pause = { 0, PAUSE_NS };
    struct copy_engine *c = arg;

    pthread_setname_np(pthread_self(), "copy");
    for (;;) {
        pthread_mutex_lock(&c->lock);
        while (!c->stop && nothing_waits(c) && nothing_under_way(c))
            pthread_cond_wait(&c->posted, &c->lock);
        bool stop = c->stop;
        struct copy_job *job = stop ? NULL : take_next(c);
        pthread_mutex_unlock(&c->lock);
        if (stop && nothing_under_way(c))
            return NULL;
        if (job)
            begin(c, job);
        bool stored = reap(c, &c->lanes[COPY_STORE]), loaded = reap(c, &c->lanes[COPY_LOAD]);
        if (!job && !stored && !loaded)
            nanosleep(&pause, NULL);
    }
}

/* ---- the engine thread */

void copy_engine_post(struct copy_engine *c, struct copy_job *job)
{
    ASSERT(job->kind == COPY_STORE || job->kind == COPY_LOAD);
    ASSERT(job->place.host >= 0);
    job->arrived = false;
    job->posted_ns = clock_now_ns();
    job->began_ns = job->ended_ns = 0;
    pthread_mutex_lock(&c->lock);
    line_append(&c->waiting[job->urgent][job->kind], job);
    pthread_cond_signal(&c->posted);
    pthread_mutex_unlock(&c->lock);
}

/* ---- any thread */

/* Locking changes nothing that a caller sees. */
static pthread_mutex_t *lock_of(const struct copy_engine *c)
{
    return (pthread_mutex_t *)&c->lock;
}

struct copy_counts copy_engine_counts(const struct copy_engine *c)
{
    pthread_mutex_lock(lock_of(c));
    struct copy_counts counts = c->counts;
    pthread_mutex_unlock(lock_of(c));
    return counts;
}

enum status copy_engine_failure(const struct copy_engine *c, struct error *err)
{
    pthread_mutex_lock(lock_of(c));
    struct error failure = c->failure;
    pthread_mutex_unlock(lock_of(c));
    if (failure.code != ST_OK && err)
        *err = failure;
    return failure.code;
}

/* ---- life */

/* Layers of the device's pools are equally far apart: their copies are rows of one. */
static void measure(struct copy_engine *c)
{
    const struct kv_pool *pool = c->cfg.pool;
    char *kv = (char *)kv_pool_kv(pool, 0), *index = (char *)kv_pool_index(pool, 0);

    c->kv_bytes = kv_block_bytes(&c->cfg.shape);
    c->index_bytes = index_block_bytes(&c->cfg.shape);
    c->slot_bytes = (size_t)c->cfg.layers * (c->kv_bytes + c->index_bytes);
    c->kv_stride = c->kv_bytes;
    c->index_stride = c->index_bytes;
    if (c->cfg.layers > 1) {
        c->kv_stride = (size_t)((char *)kv_pool_kv(pool, 1) - kv);
        c->index_stride = (size_t)((char *)kv_pool_index(pool, 1) - index);
    }
    for (int i = 0; i < c->cfg.layers; i++) {
        ASSERT((char *)kv_pool_kv(pool, i) == kv + (size_t)i * c->kv_stride);
        ASSERT((char *)kv_pool_index(pool, i) == index + (size_t)i * c->index_stride);
    }
}

enum status copy_engine_create(struct copy_engine **out, struct backend *be,
                               const struct copy_engine_config *cfg, struct error *err)
{
    struct copy_engine *c = mem_calloc(1, sizeof *c);
    enum status st = ST_OK;

    *out = NULL;
    ASSERT(cfg->layers > 0);
    c->cfg = *cfg;
    measure(c);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->posted, NULL);
    for (int kind = 0; kind < N_KINDS; kind++) {
        line_init(&c->waiting[0][kind]);
        line_init(&c->waiting[1][kind]);
        c->lanes[kind].stream = stream_create(be);
        for (int i = 0; i < COPIES_IN_FLIGHT; i++)
            c->lanes[kind].arrived[i] = event_create(be);
        if (st == ST_OK)
            st = stream_sync(c->lanes[kind].stream, err);
    }
    if (st == ST_OK && pthread_create(&c->thread, NULL, copy_thread, c) != 0)
        st = error_set(err, ST_NOMEM, "no thread could be started for copies");
    c->started = st == ST_OK;
    if (st != ST_OK) {
        copy_engine_destroy(c);
        return st;
    }
    *out = c;
    return ST_OK;
}

/* What waits when there is no copy thread any more. */
static void give_back_waiting(struct copy_engine *c)
{
    for (int urgent = 0; urgent < 2; urgent++)
        for (int kind = 0; kind < N_KINDS; kind++)
            while (c->waiting[urgent][kind].first)
                give_back(c, line_take_first(&c->waiting[urgent][kind]));
}

void copy_engine_destroy(struct copy_engine *c)
{
    if (!c)
        return;
    if (c->started) {
        pthread_mutex_lock(&c->lock);
        c->stop = true;
        pthread_cond_signal(&c->posted);
        pthread_mutex_unlock(&c->lock);
        pthread_join(c->thread, NULL);
        give_back_waiting(c);
    }
    for (int kind = 0; kind < N_KINDS; kind++) {
        for (int i = 0; i < COPIES_IN_FLIGHT; i++)
            event_destroy(c->lanes[kind].arrived[i]);
        stream_destroy(c->lanes[kind].stream);
    }
    pthread_cond_destroy(&c->posted);
    pthread_mutex_destroy(&c->lock);
    mem_free(c);
}
