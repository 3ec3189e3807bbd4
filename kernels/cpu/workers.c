#include "kernels/cpu/cpu.h"

#include "engine/base/clock.h"
#include "engine/base/invariant.h"
#include "engine/base/mem.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A decode step is some three hundred regions of tens of microseconds each, so what
 * counts is the time from "go" to the first task and from the last task to "done".
 *
 * A region is described by the job fields and by one word, claim = (region << 32 |
 * next task).  A thread takes a task by compare-and-swap on claim.  It reads the job
 * fields before the swap; the caller closes claim (a next task beyond any count)
 * before it replaces them and opens it afterwards with another region number.  So a
 * swap that succeeds proves that the fields belong to the region in the word.
 * Nobody waits for a thread that got no task: one that oversleeps a region costs that
 * region nothing.
 *
 * Idle threads watch claim for SPIN_NS and then sleep on a futex, as does the caller
 * once there are no tasks left to take but some are not finished.  Both lengths are
 * guesses on the safe side of measured gaps: regions of a step follow each other
 * within 10 us, waking a sleeper costs 50 us on a virtual machine. */
enum { SPIN_NS = 100 * 1000, PAUSES_A_LOOK = 16 };

struct worker {
    struct workers *pool;
    pthread_t thread;
    int index;
};

struct workers {
    int n;
    struct worker *helpers;      /* [n - 1], indices 1..n - 1; the caller is 0 */

    /* The job: written by the caller between regions, read by all. */
    void (*_Atomic fn)(void *arg, int task, int worker);
    void *_Atomic arg;
    _Atomic uint32_t n_tasks;

    /* Each on a cache line of its own: every task writes claim and done. */
    _Alignas(64) _Atomic uint64_t claim;
    _Alignas(64) _Atomic uint32_t done;          /* finished tasks; futex of the caller */
    _Atomic uint32_t caller_sleeps;
    _Alignas(64) _Atomic uint32_t epoch;         /* bumped with each region; futex of helpers */
    _Atomic uint32_t sleepers;
    _Atomic bool stop, running;
};

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int count)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

/* Wait a little for *word to differ from value; whether it does. */
static bool spin_until_changed(_Atomic uint32_t *word, uint32_t value)
{
    uint64_t deadline = clock_now_ns() + SPIN_NS;

    do {
        for (int i = 0; i < PAUSES_A_LOOK; i++) {
            if (atomic_load_explicit(word, memory_order_acquire) != value)
                return true;
            __builtin_ia32_pause();
        }
    } while (clock_now_ns() < deadline);
    return false;
}

/* Take and run tasks until the region has none left. */
static void run_tasks(struct workers *w, int worker)
{
    uint64_t claim = atomic_load_explicit(&w->claim, memory_order_acquire);

    for (;;) {
        uint32_t n_tasks = atomic_load_explicit(&w->n_tasks, memory_order_acquire);
        void (*fn)(void *, int, int) = atomic_load_explicit(&w->fn, memory_order_acquire);
        void *arg = atomic_load_explicit(&w->arg, memory_order_acquire);

        if ((uint32_t)claim >= n_tasks)
            return;
        if (!atomic_compare_exchange_weak_explicit(&w->claim, &claim, claim + 1,
                                                   memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        fn(arg, (int)(uint32_t)claim, worker);
        uint32_t finished = atomic_fetch_add(&w->done, 1) + 1;
        if (finished == n_tasks && atomic_load(&w->caller_sleeps))
            futex_wake(&w->done, 1);
        claim = atomic_load_explicit(&w->claim, memory_order_acquire);
    }
}

static void *helper_main(void *arg)
{
    struct worker *self = arg;
    struct workers *w = self->pool;
    uint32_t seen = 0;

    while (!atomic_load(&w->stop)) {
        if (!spin_until_changed(&w->epoch, seen)) {
            atomic_fetch_add(&w->sleepers, 1);
            while (atomic_load(&w->epoch) == seen)
                futex_wait(&w->epoch, seen);
            atomic_fetch_sub(&w->sleepers, 1);
        }
        seen = atomic_load_explicit(&w->epoch, memory_order_acquire);
        run_tasks(w, self->index);
    }
    return NULL;
}

/* Helpers take no signals: those belong to the threads that handle them. */
static void start_helper(struct worker *helper)
{
    char name[16];
    sigset_t all, before;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&helper->thread, NULL, helper_main, helper);
    ASSERT(!failed);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    snprintf(name, sizeof name, "worker %d", helper->index);
    pthread_setname_np(helper->thread, name);
}

struct workers *workers_create(int n)
{
    ASSERT(n >= 1);
    struct workers *w = mem_map(sizeof *w, 64);

    ASSERT(w);
    w->n = n;
    w->helpers = mem_calloc((size_t)n, sizeof *w->helpers);
    for (int i = 0; i < n - 1; i++) {
        w->helpers[i].pool = w;
        w->helpers[i].index = i + 1;
        start_helper(&w->helpers[i]);
    }
    return w;
}

void workers_destroy(struct workers *w)
{
    if (!w)
        return;
    ASSERT(!atomic_load(&w->running));
    atomic_store(&w->stop, true);
    atomic_fetch_add(&w->epoch, 1);
    futex_wake(&w->epoch, w->n);
    for (int i = 0; i < w->n - 1; i++)
        pthread_join(w->helpers[i].thread, NULL);
    mem_free(w->helpers);
    mem_unmap(w, sizeof *w);
}

int workers_count(const struct workers *w)
{
    return w->n;
}

static void wait_for_done(struct workers *w, uint32_t n_tasks)
{
    for (;;) {
        uint32_t done = atomic_load_explicit(&w->done, memory_order_acquire);
        if (done == n_tasks)
            return;
        if (spin_until_changed(&w->done, done))
            continue;
        atomic_store(&w->caller_sleeps, 1);
        while ((done = atomic_load(&w->done)) != n_tasks)
            futex_wait(&w->done, done);
        atomic_store(&w->caller_sleeps, 0);
    }
}

/* Acquire loads in run_tasks() pair with these releases: who has seen a field of the
 * next region fails to swap the claim of the last one. */
static void post_region(struct workers *w, uint32_t n_tasks,
                        void (*fn)(void *arg, int task, int worker), void *arg)
{
    uint64_t region = (atomic_load_explicit(&w->claim, memory_order_relaxed) >> 32) + 1;

    atomic_store_explicit(&w->claim, region << 32 | UINT32_MAX, memory_order_release);
    atomic_store_explicit(&w->done, 0, memory_order_release);
    atomic_store_explicit(&w->fn, fn, memory_order_release);
    atomic_store_explicit(&w->arg, arg, memory_order_release);
    atomic_store_explicit(&w->n_tasks, n_tasks, memory_order_release);
    atomic_store_explicit(&w->claim, (region + 1) << 32, memory_order_release);
    atomic_fetch_add(&w->epoch, 1);
}

void workers_run(struct workers *w, int n_tasks, void (*fn)(void *arg, int task, int worker),
                 void *arg)
{
    if (n_tasks <= 0)
        return;
    bool nested = atomic_exchange_explicit(&w->running, true, memory_order_acquire);
    ASSERT(!nested);
    if (w->n == 1 || n_tasks == 1) {
        for (int task = 0; task < n_tasks; task++)
            fn(arg, task, 0);
    } else {
        post_region(w, (uint32_t)n_tasks, fn, arg);
        if (atomic_load(&w->sleepers))
            futex_wake(&w->epoch, n_tasks - 1 < w->n - 1 ? n_tasks - 1 : w->n - 1);
        run_tasks(w, 0);
        wait_for_done(w, (uint32_t)n_tasks);
    }
    atomic_store_explicit(&w->running, false, memory_order_release);
}
