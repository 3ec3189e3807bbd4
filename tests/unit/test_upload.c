/* engine/model/upload.h: everything arrives, and its progress is counted. */

#include "engine/base/mem.h"
#include "engine/base/progress.h"
#include "engine/model/upload.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <pthread.h>
#include <string.h>

/* Less than a piece of the readers, several of them, and one that ends in the middle. */
static const size_t sizes[] = { 1, 8 << 20, 3, (24 << 20) + 5, (8 << 20) - 1 };
enum { N = sizeof sizes / sizeof sizes[0] };

struct watch {
    struct progress progress;
    _Atomic bool stop;
    bool went_back, overran;
};

static void *watch_progress(void *arg)
{
    struct watch *w = arg;
    uint64_t last = 0;

    while (!atomic_load(&w->stop)) {
        uint64_t done = atomic_load(&w->progress.done_bytes);
        uint64_t total = atomic_load(&w->progress.total_bytes);
        w->went_back = w->went_back || done < last;
        w->overran = w->overran || done > total;
        last = done;
    }
    return NULL;
}

static uint64_t fill(struct upload list[N])
{
    struct test_random r = test_random(5);
    uint64_t total = 0;

    for (size_t i = 0; i < N; i++) {
        uint8_t *from = mem_calloc(sizes[i], 1);
        for (size_t at = 0; at < sizes[i]; at += 997)
            from[at] = (uint8_t)random_u64(&r);
        list[i] = (struct upload){ from, mem_calloc(sizes[i], 1), sizes[i] };
        total += sizes[i];
    }
    return total;
}

static void check_and_free(struct upload list[N])
{
    for (size_t i = 0; i < N; i++) {
        ck_assert_mem_eq(list[i].to, list[i].from, sizes[i]);
        mem_free((void *)list[i].from);
        mem_free(list[i].to);
    }
}

START_TEST(arrives_and_is_counted)
{
    struct watch w = { 0 };
    struct upload list[N];
    struct error err = { 0 };
    pthread_t watcher;
    uint64_t total = fill(list);

    ck_assert_int_eq(pthread_create(&watcher, NULL, watch_progress, &w), 0);
    ck_assert_int_eq(upload_all(test_backend("auto"), list, N, &w.progress, &err), ST_OK);
    atomic_store(&w.stop, true);
    pthread_join(watcher, NULL);
    ck_assert(!w.went_back && !w.overran);
    ck_assert_uint_eq(atomic_load(&w.progress.done_bytes), total);
    ck_assert_uint_eq(atomic_load(&w.progress.total_bytes), total);
    /* Of several it is the sum. */
    ck_assert_int_eq(upload_all(test_backend("auto"), list, N, &w.progress, &err), ST_OK);
    ck_assert_uint_eq(atomic_load(&w.progress.done_bytes), 2 * total);
    ck_assert_uint_eq(atomic_load(&w.progress.total_bytes), 2 * total);
    check_and_free(list);
}
END_TEST

START_TEST(needs_nobody_who_watches)
{
    struct progress progress = { 0 };
    struct upload list[N];

    fill(list);
    ck_assert_int_eq(upload_all(test_backend("auto"), list, N, NULL, NULL), ST_OK);
    ck_assert_int_eq(upload_all(test_backend("auto"), list, 0, &progress, NULL), ST_OK);
    ck_assert_uint_eq(atomic_load(&progress.total_bytes), 0);
    check_and_free(list);
}
END_TEST

TCase *upload_case(void)
{
    TCase *tc = tcase_create("upload");

    tcase_add_test(tc, arrives_and_is_counted);
    tcase_add_test(tc, needs_nobody_who_watches);
    return tc;
}
