/* engine/base/mem.h: checked sizes, mapped regions, the ban inside a step, arenas. */

#include "engine/base/mem.h"

#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

static bool all_zero(const unsigned char *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (p[i])
            return false;
    return true;
}

START_TEST(blocks_grow_and_shrink)
{
    unsigned char *p = mem_calloc(1000, 3);

    ck_assert(all_zero(p, 3000));
    memset(p, 7, 3000);
    p = mem_realloc(p, 50000, 2);
    ck_assert(p[0] == 7 && p[2999] == 7);
    p = mem_realloc(p, 10, 1);
    ck_assert(p[9] == 7);
    mem_free(p);
    mem_free(NULL);
    p = mem_realloc(NULL, 4, 4);
    mem_free(p);
}
END_TEST

START_TEST(nothing_is_something)
{
    void *p[4] = { mem_alloc(0), mem_calloc(0, 8), mem_calloc(8, 0), mem_realloc(NULL, 0, 8) };

    for (int i = 0; i < 4; i++) {
        ck_assert_ptr_nonnull(p[i]);
        mem_free(p[i]);
    }
}
END_TEST

START_TEST(strings)
{
    char *a = mem_strdup("a string"), *b = mem_strndup("a string", 3), *c = mem_strndup("", 0);
    char *d = mem_strndup("x\0y", 3);

    ck_assert_str_eq(a, "a string");
    ck_assert_str_eq(b, "a s");
    ck_assert_str_eq(c, "");
    ck_assert_int_eq(memcmp(d, "x\0y", 4), 0);
    mem_free(a);
    mem_free(b);
    mem_free(c);
    mem_free(d);
}
END_TEST

/* Products that wrap to something small must not be served as that. */
START_TEST(calloc_of_too_much_aborts)
{
    mem_free(mem_calloc(SIZE_MAX / 2 + 1, 2));
}
END_TEST

START_TEST(realloc_of_too_much_aborts)
{
    mem_free(mem_realloc(NULL, (size_t)1 << 33, (size_t)1 << 31));
}
END_TEST

START_TEST(strndup_of_everything_aborts)
{
    mem_free(mem_strndup("x", SIZE_MAX));
}
END_TEST

/* ---- the ban */

START_TEST(forbidden_thread_aborts)
{
    mem_forbid(1);
    mem_free(mem_alloc(1));
}
END_TEST

static void *allocate(void *arg)
{
    (void)arg;
    return mem_alloc(8);
}

START_TEST(forbidden_is_one_thread_until_allowed)
{
    pthread_t thread;
    void *p, *before = mem_alloc(1);

    mem_forbid(1);
    ck_assert_int_eq(pthread_create(&thread, NULL, allocate, NULL), 0);
    ck_assert_int_eq(pthread_join(thread, &p), 0);
    mem_free(before);                    /* giving back is no allocation */
    mem_free(p);
    mem_forbid(0);
    mem_free(mem_alloc(1));
}
END_TEST

/* ---- regions */

START_TEST(regions_are_aligned_zero_and_whole)
{
    static const size_t sizes[] = { 1, 4095, 4096, 4097, 100000, (2u << 20) + 1 };

    for (size_t align = 1; align <= 2u << 20; align *= 2)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            unsigned char *p = mem_map(sizes[i], align);
            ck_assert_ptr_nonnull(p);
            ck_assert_uint_eq((uintptr_t)p % align, 0);
            ck_assert(p[0] == 0 && p[sizes[i] / 2] == 0 && p[sizes[i] - 1] == 0);
            memset(p, 1, sizes[i]);
            mem_unmap(p, sizes[i]);
        }
    mem_unmap(NULL, 100);
}
END_TEST

START_TEST(unmapped_is_gone)
{
    unsigned char resident[3], *p = mem_map(3 * 4096 - 5, 2u << 20);

    ck_assert_int_eq(mincore(p, 3 * 4096, resident), 0);
    mem_unmap(p, 3 * 4096 - 5);
    for (size_t i = 0; i < 3; i++)
        ck_assert(mincore(p + i * 4096, 4096, resident) == -1 && errno == ENOMEM);
}
END_TEST

START_TEST(regions_that_cannot_be)
{
    for (size_t align = 4096; align <= 2u << 20; align *= 512) {
        ck_assert_ptr_null(mem_map(0, align));
        ck_assert_ptr_null(mem_map(SIZE_MAX, align));
        ck_assert_ptr_null(mem_map(SIZE_MAX - 4096, align));
        ck_assert_ptr_null(mem_map(SIZE_MAX - (2u << 20), align));
        ck_assert_ptr_null(mem_map((size_t)1 << 62, align));
    }
}
END_TEST

START_TEST(odd_alignment_aborts)
{
    mem_unmap(mem_map(4096, 48), 4096);
}
END_TEST

/* ---- arenas */

START_TEST(arena_blocks_are_apart_aligned_and_zero)
{
    enum { N = 500 };
    struct arena *a = arena_create(1 << 22);
    unsigned char *blocks[N];
    size_t sizes[N], before = 0;

    ck_assert_uint_eq(arena_used_bytes(a), 0);
    for (size_t i = 0; i < N; i++) {
        sizes[i] = i * 7919 % 6000 + 1;
        blocks[i] = arena_alloc(a, sizes[i]);
        ck_assert(blocks[i] && (uintptr_t)blocks[i] % 16 == 0 && all_zero(blocks[i], sizes[i]));
        memset(blocks[i], (int)(i % 255 + 1), sizes[i]);
        ck_assert_uint_ge(arena_used_bytes(a), before + sizes[i]);
        before = arena_used_bytes(a);
    }
    for (size_t i = 0; i < N; i++)
        for (size_t k = 0; k < sizes[i]; k++)
            ck_assert_int_eq(blocks[i][k], (int)(i % 255 + 1));
    arena_destroy(a);
    arena_destroy(NULL);
}
END_TEST

START_TEST(arena_has_a_limit)
{
    struct arena *a = arena_create(1000);

    ck_assert_ptr_null(arena_alloc(a, 1001));
    ck_assert_ptr_null(arena_alloc(a, SIZE_MAX));
    ck_assert_uint_eq(arena_used_bytes(a), 0);
    ck_assert_ptr_nonnull(arena_alloc(a, 496));
    ck_assert_ptr_null(arena_alloc(a, 505));
    ck_assert_ptr_nonnull(arena_alloc(a, 504));
    ck_assert_ptr_null(arena_alloc(a, 1));
    arena_destroy(a);
    a = arena_create(0);
    ck_assert_ptr_null(arena_alloc(a, 1));
    arena_destroy(a);
}
END_TEST

/* Rounding a size up must not wrap, however high the limit. */
START_TEST(arena_without_a_limit_still_refuses_the_impossible)
{
    struct arena *a = arena_create(SIZE_MAX);

    ck_assert_ptr_null(arena_alloc(a, SIZE_MAX));
    ck_assert_ptr_null(arena_alloc(a, SIZE_MAX - 14));
    ck_assert_ptr_null(arena_strndup(a, "x", SIZE_MAX));
    ck_assert_ptr_null(arena_strndup(a, "x", SIZE_MAX - 1));
    ck_assert_ptr_nonnull(arena_alloc(a, 100));
    arena_destroy(a);
}
END_TEST

START_TEST(arena_strings)
{
    struct arena *a = arena_create(64);
    char *s = arena_strndup(a, "some text", 4), *empty = arena_strndup(a, "", 0);

    ck_assert_str_eq(s, "some");
    ck_assert_str_eq(empty, "");
    ck_assert_ptr_ne(s, empty);
    ck_assert_ptr_null(arena_strndup(a, "0123456789012345678901234567890123456789", 40));
    arena_destroy(a);
}
END_TEST

TCase *mem_case(void)
{
    TCase *tc = tcase_create("mem");

    tcase_add_test(tc, blocks_grow_and_shrink);
    tcase_add_test(tc, nothing_is_something);
    tcase_add_test(tc, strings);
    tcase_add_test_raise_signal(tc, calloc_of_too_much_aborts, SIGABRT);
    tcase_add_test_raise_signal(tc, realloc_of_too_much_aborts, SIGABRT);
    tcase_add_test_raise_signal(tc, strndup_of_everything_aborts, SIGABRT);
    tcase_add_test_raise_signal(tc, forbidden_thread_aborts, SIGABRT);
    tcase_add_test(tc, forbidden_is_one_thread_until_allowed);
    tcase_add_test(tc, regions_are_aligned_zero_and_whole);
    tcase_add_test(tc, unmapped_is_gone);
    tcase_add_test(tc, regions_that_cannot_be);
    tcase_add_test_raise_signal(tc, odd_alignment_aborts, SIGABRT);
    tcase_add_test(tc, arena_blocks_are_apart_aligned_and_zero);
    tcase_add_test(tc, arena_has_a_limit);
    tcase_add_test(tc, arena_without_a_limit_still_refuses_the_impossible);
    tcase_add_test(tc, arena_strings);
    return tc;
}
