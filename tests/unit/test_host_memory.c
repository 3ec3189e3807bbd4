/* engine/kv/host_memory.h: growth piece by piece, refusals, the end in the middle of growth. */

#include "engine/kv/host_memory.h"

#include "engine/base/clock.h"
#include "engine/base/host_limits.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/lazy_device.h"

#include <check.h>
#include <semaphore.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

static const size_t piece = (size_t)HOST_MEMORY_PIECE_MB << 20;
static const size_t tail = (3u << 20) + 5;

static void ring(void *bell)
{
    sem_post(bell);
}

static bool too_little(size_t bytes)
{
    if (host_memory_available() >= 2 * bytes)
        return false;
    printf("skip: a test of the host tier wants %zu MB of memory\n", bytes >> 20);
    return true;
}

START_TEST(what_is_available_is_less_than_there_is)
{
    size_t available = host_memory_available();

    ck_assert_uint_gt(available, 0);
    ck_assert_uint_le(available, host_memory_limit());
}
END_TEST

START_TEST(one_byte)
{
    struct host_memory *m;
    sem_t bell;

    sem_init(&bell, 0, 0);
    ck_assert_int_eq(host_memory_create(&m, test_backend("scalar"), 1, ring, &bell, NULL), ST_OK);
    sem_wait(&bell);
    ck_assert_uint_eq(host_memory_ready_bytes(m), 1);
    ck_assert_int_eq(host_memory_failure(m, NULL), ST_OK);
    *(char *)host_memory_base(m) = 1;
    host_memory_destroy(m);
    host_memory_destroy(NULL);
    sem_destroy(&bell);
}
END_TEST

/* The first piece is of use as soon as it is there, and stays where it is. */
START_TEST(grows_by_pieces)
{
    struct backend *be = lazy_device_open(1);
    struct host_memory *m;
    struct error err;
    sem_t bell;

    if (too_little(piece + tail))
        return;
    sem_init(&bell, 0, 0);
    ck_assert_msg(host_memory_create(&m, be, piece + tail, ring, &bell, &err) == ST_OK, "%s",
                  err.text);
    unsigned char *base = host_memory_base(m);
    ck_assert_uint_eq((uintptr_t)base % (2u << 20), 0);
    sem_wait(&bell);
    ck_assert_uint_ge(host_memory_ready_bytes(m), piece);
    ck_assert(base[0] == 0 && base[piece / 2] == 0 && base[piece - 1] == 0);
    memset(base + piece - 4096, 1, 4096);
    sem_wait(&bell);
    ck_assert_uint_eq(host_memory_ready_bytes(m), piece + tail);
    ck_assert_int_eq(host_memory_failure(m, &err), ST_OK);
    ck_assert(base[piece] == 0 && memcmp(base + piece, base + piece + 1, tail - 1) == 0);
    memset(base + piece, 2, tail);
    ck_assert_int_eq(base[piece - 1], 1);
    ck_assert_int_eq(lazy_device_registered(be), 2);
    host_memory_destroy(m);
    ck_assert_int_eq(lazy_device_registered(be), 0);
    backend_close(be);
    sem_destroy(&bell);
}
END_TEST

/* The registration that is the first piece's: where the limit on locked memory is low, one is
 * tried before. */
static int first_piece(void)
{
    struct rlimit limit;

    ck_assert_int_eq(getrlimit(RLIMIT_MEMLOCK, &limit), 0);
    return limit.rlim_cur >= tail ? 1 : 2;
}

START_TEST(a_piece_that_is_refused_ends_the_growth)
{
    struct backend *be = lazy_device_open(1);
    struct host_memory *m;
    struct error err = { 0 };
    sem_t bell;

    sem_init(&bell, 0, 0);
    lazy_device_refuse(be, first_piece());
    ck_assert_int_eq(host_memory_create(&m, be, tail, ring, &bell, NULL), ST_OK);
    sem_wait(&bell);
    ck_assert_uint_eq(host_memory_ready_bytes(m), 0);
    ck_assert_int_eq(host_memory_failure(m, &err), ST_NOMEM);
    ck_assert_ptr_nonnull(strstr(err.text, "refused by the test"));
    ck_assert_int_eq(host_memory_failure(m, NULL), ST_NOMEM);
    host_memory_destroy(m);
    ck_assert_int_eq(lazy_device_registered(be), 0);
    backend_close(be);
    sem_destroy(&bell);
}
END_TEST

START_TEST(what_the_machine_has_not_is_refused)
{
    struct host_memory *m = (struct host_memory *)&m;
    struct error err = { 0 };
    const size_t wanted[] = { host_memory_limit() + 1, SIZE_MAX };

    for (int i = 0; i < 2; i++) {
        enum status st = host_memory_create(&m, test_backend("scalar"), wanted[i], NULL, NULL,
                                            &err);
        ck_assert_int_eq(st, ST_NOMEM);
        ck_assert_ptr_null(m);
        ck_assert_msg(strstr(err.text, "memory available") != NULL, "%s", err.text);
    }
}
END_TEST

/* What the device refuses to pin beyond the limit is known before anything grows; a limit that
 * does not hold is none. */
START_TEST(the_limit_on_locked_memory_is_tried)
{
    const struct rlimit limit = { 8192, 8192 };
    struct backend *be = lazy_device_open(1);
    struct host_memory *m = (struct host_memory *)&m;
    struct error err = { 0 };
    sem_t bell;

    ck_assert_int_eq(setrlimit(RLIMIT_MEMLOCK, &limit), 0);
    lazy_device_refuse(be, 1);
    ck_assert_int_eq(host_memory_create(&m, be, tail, NULL, NULL, &err), ST_NOMEM);
    ck_assert_ptr_null(m);
    ck_assert_msg(strstr(err.text, "limited to 8 KB") && strstr(err.text, "LimitMEMLOCK") &&
                      strstr(err.text, "memlock=-1"), "%s", err.text);
    lazy_device_refuse(be, 0);
    sem_init(&bell, 0, 0);
    ck_assert_int_eq(host_memory_create(&m, be, tail, ring, &bell, NULL), ST_OK);
    sem_wait(&bell);
    ck_assert_uint_eq(host_memory_ready_bytes(m), tail);
    ck_assert_int_eq(lazy_device_registered(be), 1);
    host_memory_destroy(m);
    backend_close(be);
    sem_destroy(&bell);
}
END_TEST

/* Touching eight pieces takes seconds; their end is not waited for. */
START_TEST(ends_in_the_middle_of_growth)
{
    struct backend *be = lazy_device_open(1);
    const struct timespec moment = { 0, _i * 5000000 };
    struct host_memory *m;

    if (too_little(8 * piece))
        return;
    ck_assert_int_eq(host_memory_create(&m, be, 8 * piece, NULL, NULL, NULL), ST_OK);
    nanosleep(&moment, NULL);
    uint64_t began = clock_now_ns();
    host_memory_destroy(m);
    ck_assert_uint_lt(clock_now_ns() - began, 2000000000u);
    ck_assert_int_eq(lazy_device_registered(be), 0);
    backend_close(be);
}
END_TEST

TCase *host_memory_case(void)
{
    TCase *tc = tcase_create("host_memory");

    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, what_is_available_is_less_than_there_is);
    tcase_add_test(tc, one_byte);
    tcase_add_test(tc, grows_by_pieces);
    tcase_add_test(tc, a_piece_that_is_refused_ends_the_growth);
    tcase_add_test(tc, what_the_machine_has_not_is_refused);
    tcase_add_test(tc, the_limit_on_locked_memory_is_tried);
    tcase_add_loop_test(tc, ends_in_the_middle_of_growth, 0, 4);
    return tc;
}
