#include "kernels/cpu/cpu.h"

#include "engine/base/clock.h"
#include "engine/base/mem.h"

#include <check.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <time.h>

enum { MAX_TASKS = 4096 };

struct tally {
    _Atomic int runs[MAX_TASKS];
    int n_workers;
    _Atomic int bad_workers;
    int plain[MAX_TASKS];        /* written by tasks, read after the region: no atomics */
    int value;
};

static void count_task(void *arg, int task, int worker)
{
    struct tally *t = arg;

    atomic_fetch_add(&t->runs[task], 1);
    if (worker < 0 || worker >= t->n_workers)
        atomic_fetch_add(&t->bad_workers, 1);
    t->plain[task] = t->value + task;
}

/* Regions of many sizes, one after the other: each task once, results visible. */
START_TEST(every_task_runs_once)
{
    static const int sizes[] = { 0, 1, 2, 3, 7, 64, 1000, MAX_TASKS };
    int n = _i + 1;
    struct workers *w = workers_create(n);
    struct tally *t = mem_calloc(1, sizeof *t);

    ck_assert_int_eq(workers_count(w), n);
    t->n_workers = n;
    for (int round = 0; round < 40; round++) {
        int n_tasks = sizes[round % 8];
        for (int i = 0; i < MAX_TASKS; i++)
            atomic_store(&t->runs[i], 0);
        t->value = round * 10000;
        workers_run(w, n_tasks, count_task, t);
        for (int i = 0; i < MAX_TASKS; i++)
            ck_assert_int_eq(atomic_load(&t->runs[i]), i < n_tasks);
        for (int i = 0; i < n_tasks; i++)
            ck_assert_int_eq(t->plain[i], t->value + i);
    }
    ck_assert_int_eq(atomic_load(&t->bad_workers), 0);
    mem_free(t);
    workers_destroy(w);
}
END_TEST

static void add_task(void *arg, int task, int worker)
{
    int *sums = arg;

    (void)worker;
    sums[task] += task + 1;
}

/* Very short regions in a row: a helper that arrives late must not take a task of the
 * next region with the job of the last one. */
START_TEST(short_regions_do_not_mix)
{
    enum { REGIONS = 20000 };
    struct workers *w = workers_create(4);
    int a[3] = { 0 }, b[5] = { 0 };

    for (int i = 0; i < REGIONS; i++) {
        workers_run(w, 3, add_task, a);
        workers_run(w, 5, add_task, b);
    }
    for (int i = 0; i < 3; i++)
        ck_assert_int_eq(a[i], REGIONS * (i + 1));
    for (int i = 0; i < 5; i++)
        ck_assert_int_eq(b[i], REGIONS * (i + 1));
    workers_destroy(w);
}
END_TEST

static void pause_ms(long ms)
{
    struct timespec t = { .tv_nsec = ms * 1000000 };

    nanosleep(&t, NULL);
}

/* Tasks that outlast every spin, between pauses in which the helpers fall asleep. */
static void slow_task(void *arg, int task, int worker)
{
    pause_ms(task == 0 ? 3 : 1);
    count_task(arg, task, worker);
}

START_TEST(sleepers_wake)
{
    struct workers *w = workers_create(3);
    struct tally *t = mem_calloc(1, sizeof *t);

    t->n_workers = 3;
    for (int round = 0; round < 10; round++) {
        pause_ms(2);
        workers_run(w, 6, slow_task, t);
    }
    for (int i = 0; i < 6; i++)
        ck_assert_int_eq(atomic_load(&t->runs[i]), 10);
    mem_free(t);
    workers_destroy(w);
}
END_TEST

static double cpu_seconds(void)
{
    struct rusage u;

    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

START_TEST(idle_costs_nothing)
{
    struct workers *w = workers_create(4);
    struct tally *t = mem_calloc(1, sizeof *t);

    t->n_workers = 4;
    workers_run(w, 100, count_task, t);
    pause_ms(20);
    double before = cpu_seconds();
    pause_ms(200);
    ck_assert_double_lt(cpu_seconds() - before, 0.02);
    mem_free(t);
    workers_destroy(w);
}
END_TEST

START_TEST(unused_pool_ends)
{
    workers_destroy(NULL);
    for (int n = 1; n < 6; n++)
        workers_destroy(workers_create(n));
}
END_TEST

TCase *workers_case(void)
{
    TCase *c = tcase_create("workers");

    tcase_set_timeout(c, 60);
    tcase_add_loop_test(c, every_task_runs_once, 0, 5);
    tcase_add_test(c, short_regions_do_not_mix);
    tcase_add_test(c, sleepers_wake);
    tcase_add_test(c, idle_costs_nothing);
    tcase_add_test(c, unused_pool_ends);
    return c;
}
