#include "engine/kv/host_memory.h"

#include "engine/base/host_limits.h"
#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "kernels/backend.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

enum {
    PAGE_BYTES = 4096,           /* the smallest there is */
    HUGE_BYTES = 2 << 20,
    TOUCH_BYTES = 8 << 20,       /* by one thread at a time, between two looks at stop */
    MOST_TOUCHERS = 16           /* guessed: by then zeroing is as fast as the memory */
};

static const size_t piece_bytes = (size_t)HOST_MEMORY_PIECE_MB << 20;

struct host_memory {
    /* set before the thread starts, then read-only */
    struct backend *be;
    void *reserved;
    size_t reserved_bytes;
    char *base;                  /* in reserved, on a huge page */
    size_t bytes;                /* asked for */
    size_t mapped_bytes;         /* the same in whole huge pages */
    void (*ready)(void *arg);
    void *arg;
    pthread_t thread;
    bool started;
    /* background thread; destroy once that has ended */
    size_t registered_bytes;
    /* both */
    _Atomic size_t ready_bytes;
    atomic_bool stop;
    atomic_bool failed;          /* set behind failure, which is then read-only */
    struct error failure;
};

/* ---- touching */

struct touching {
    const struct host_memory *m;
    char *base;
    size_t bytes;
    _Atomic size_t next;
};

/* A page is zeroed by the thread that writes to it first. */
static void *touch(void *arg)
{
    struct touching *t = arg;

    while (!atomic_load_explicit(&t->m->stop, memory_order_relaxed)) {
        size_t at = atomic_fetch_add_explicit(&t->next, TOUCH_BYTES, memory_order_relaxed);
        if (at >= t->bytes)
            break;
        size_t n = t->bytes - at < TOUCH_BYTES ? t->bytes - at : TOUCH_BYTES;
        for (size_t i = 0; i < n; i += PAGE_BYTES)
            *(volatile char *)(t->base + at + i) = 0;
    }
    return NULL;
}

/* With fewer threads where the system gives no more: this one does what the others do not. */
static void touch_all(const struct host_memory *m, char *base, size_t bytes)
{
    struct touching t = { .m = m, .base = base, .bytes = bytes };
    pthread_t helpers[MOST_TOUCHERS - 1];
    int n = 0, most = host_core_limit() - 1;

    while (n < most && n < MOST_TOUCHERS - 1 && !pthread_create(&helpers[n], NULL, touch, &t))
        n++;
    touch(&t);
    while (n > 0)
        pthread_join(helpers[--n], NULL);
}

/* ---- growth */

static bool stopping(const struct host_memory *m)
{
    return atomic_load_explicit(&m->stop, memory_order_relaxed);
}

/* Asked again for each piece: who writes to memory that is not there is killed, not told. */
static enum status check_available(size_t bytes, const char *what, struct error *err)
{
    size_t available = host_memory_available();

    if (bytes <= available)
        return ST_OK;
    return error_set(err, ST_NOMEM, "%s of %zu MB: this machine, or its container, has %zu MB of "
                     "memory available", what, bytes >> 20, available >> 20);
}

/* Whether pinning counts against RLIMIT_MEMLOCK is the driver's affair: NVIDIA's for Linux pins
 * without counting, and a low limit is then none.  So a little more than the limit is tried.  A
 * limit of more than a piece is not: if it counts, the piece that meets it ends the growth. */
static enum status check_lock_limit(struct backend *be, size_t bytes, struct error *err)
{
    struct rlimit limit;

    if (backend_info(be)->host_visible || getrlimit(RLIMIT_MEMLOCK, &limit) != 0 ||
        limit.rlim_cur >= bytes || limit.rlim_cur >= piece_bytes)
        return ST_OK;
    size_t tried = ((size_t)limit.rlim_cur / HUGE_BYTES + 1) * HUGE_BYTES;
    void *p = mem_map(tried, HUGE_BYTES);
    enum status st = p ? host_register(be, p, tried, err) : ST_NOMEM;
    if (st == ST_OK)
        host_unregister(be, p);
    mem_unmap(p, tried);
    if (st != ST_NOMEM)
        return st;
    return error_set(err, st, "a host tier of %zu MB cannot be pinned: this process is limited to "
                     "%zu KB of locked memory; raise that with LimitMEMLOCK=infinity in a "
                     "systemd unit, or docker run --ulimit memlock=-1", bytes >> 20,
                     (size_t)limit.rlim_cur >> 10);
}

static enum status add_piece(struct host_memory *m, size_t at, size_t bytes, struct error *err)
{
    char *piece = m->base + at;

    TRY(check_available(bytes, "the next piece of the host tier", err));
    if (mprotect(piece, bytes, PROT_READ | PROT_WRITE) != 0)
        return error_set(err, ST_NOMEM, "%zu MB more of host memory: %s", bytes >> 20,
                         strerror(errno));
    (void)madvise(piece, bytes, MADV_HUGEPAGE); /* without, it is only slower */
    touch_all(m, piece, bytes);
    if (stopping(m))
        return ST_CANCELLED;
    TRY(host_register(m->be, piece, bytes, err));
    m->registered_bytes = at + bytes;
    return ST_OK;
}

static void *grow(void *arg)
{
    struct host_memory *m = arg;

    pthread_setname_np(pthread_self(), "pin");
    for (size_t at = 0; at < m->mapped_bytes; at = m->registered_bytes) {
        size_t left = m->mapped_bytes - at;
        enum status st = add_piece(m, at, left < piece_bytes ? left : piece_bytes, &m->failure);
        if (stopping(m))
            break;
        if (st == ST_OK)
            atomic_store_explicit(&m->ready_bytes,
                                  m->registered_bytes < m->bytes ? m->registered_bytes : m->bytes,
                                  memory_order_release);
        else
            atomic_store_explicit(&m->failed, true, memory_order_release);
        if (m->ready)
            m->ready(m->arg);
        if (st != ST_OK)
            break;
    }
    return NULL;
}

/* ---- life */

enum status host_memory_create(struct host_memory **out, struct backend *be, size_t bytes,
                               void (*ready)(void *arg), void *arg, struct error *err)
{
    *out = NULL;
    ASSERT(bytes > 0);
    TRY(check_available(bytes, "a host tier", err));
    TRY(check_lock_limit(be, bytes, err));
    struct host_memory *m = mem_calloc(1, sizeof *m);
    m->be = be;
    m->bytes = bytes;
    m->mapped_bytes = (bytes + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
    m->reserved_bytes = m->mapped_bytes + HUGE_BYTES;
    m->ready = ready;
    m->arg = arg;
    m->reserved = mmap(NULL, m->reserved_bytes, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m->reserved == MAP_FAILED) {
        m->reserved = NULL;
        enum status st = error_set(err, ST_NOMEM, "%zu MB of addresses for the host tier: %s",
                                   bytes >> 20, strerror(errno));
        host_memory_destroy(m);
        return st;
    }
    m->base = (char *)(((uintptr_t)m->reserved + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES);
    m->started = pthread_create(&m->thread, NULL, grow, m) == 0;
    if (!m->started) {
        host_memory_destroy(m);
        return error_set(err, ST_NOMEM, "no thread could be started for the host tier");
    }
    *out = m;
    return ST_OK;
}

void host_memory_destroy(struct host_memory *m)
{
    if (!m)
        return;
    if (m->started) {
        atomic_store(&m->stop, true);
        pthread_join(m->thread, NULL);
    }
    for (size_t at = 0; at < m->registered_bytes; at += piece_bytes)
        host_unregister(m->be, m->base + at);
    if (m->reserved)
        munmap(m->reserved, m->reserved_bytes);
    mem_free(m);
}

void *host_memory_base(const struct host_memory *m)
{
    return m->base;
}

size_t host_memory_ready_bytes(const struct host_memory *m)
{
    return atomic_load_explicit(&m->ready_bytes, memory_order_acquire);
}

enum status host_memory_failure(const struct host_memory *m, struct error *err)
{
    if (!atomic_load_explicit(&m->failed, memory_order_acquire))
        return ST_OK;
    if (err)
        *err = m->failure;
    return m->failure.code;
}
