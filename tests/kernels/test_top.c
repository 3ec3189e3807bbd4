#include "kernels/cpu/top.h"

#include "tests/support/random_data.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The exact choice of the largest, against sorting. */
enum { UNWRITTEN = -77 };

struct ranked { uint32_t key; int32_t at; };

static int by_rank(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;

    if (x->key != y->key)
        return x->key > y->key ? -1 : 1;
    return x->at < y->at ? -1 : 1;
}

static int by_value(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;

    return x < y ? -1 : x > y;
}

/* Keys that differ in some digits only: all, the lowest bits, the highest, or few. */
static uint32_t random_key(struct test_random *r, int kind)
{
    uint32_t key = (uint32_t)random_u64(r);

    switch (kind) {
    case 0:
        return key;
    case 1:
        return 0x80000000u | (key & 7);
    case 2:
        return key & 0xe0000000u;
    case 3:
        return key % 5 ? key % 3 << 21 | (key >> 8) % 3 << 10 | (key >> 16) % 2 : TOP_FORCED;
    case 4:
        return key % 2 ? 0 : TOP_FORCED;
    default:
        return 77;
    }
}

START_TEST(top_is_what_sorting_says)
{
    enum { MOST = 3000, ROUNDS = 60 };
    struct test_random r = test_random(700 + _i);
    uint32_t keys[MOST];
    int32_t got[MOST + 10], want[MOST];
    struct ranked ranked[MOST];

    for (int round = 0; round < ROUNDS; round++) {
        int n = round % 2 ? random_below(&r, MOST + 1) : random_below(&r, 20);
        int keep = round % 5 == 0 ? n + round % 4 : random_below(&r, n + 1);
        int most = keep < n ? keep : n;
        for (int i = 0; i < n; i++) {
            keys[i] = random_key(&r, _i);
            ranked[i] = (struct ranked){ keys[i], i };
        }
        qsort(ranked, (size_t)n, sizeof *ranked, by_rank);
        for (int i = 0; i < most; i++)
            want[i] = ranked[i].at;
        qsort(want, (size_t)most, sizeof *want, by_value);
        for (int i = 0; i < MOST + 10; i++)
            got[i] = UNWRITTEN;
        ck_assert_int_eq(choose_top(got, keys, n, keep), most);
        ck_assert_msg(memcmp(got, want, (size_t)most * sizeof *got) == 0, "%d of %d", keep, n);
        ck_assert_int_eq(got[most], UNWRITTEN);
    }
}
END_TEST

START_TEST(keys_have_the_order_of_scores)
{
    static const float ascending[] = { -INFINITY, -3e38f, -2, -1.0000001f, -1, -1e-45f, 0,
                                       1e-45f, 1e-38f, 1, 1.0000001f, 3e38f, INFINITY };
    enum { N = sizeof ascending / sizeof ascending[0] };

    for (int i = 1; i < N; i++)
        ck_assert_uint_lt(top_key(ascending[i - 1]), top_key(ascending[i]));
    ck_assert_uint_lt(top_key(INFINITY), TOP_FORCED);
    ck_assert_uint_eq(top_key(-0.0f), top_key(0.0f));
}
END_TEST

TCase *top_case(void)
{
    TCase *c = tcase_create("top");

    tcase_add_loop_test(c, top_is_what_sorting_says, 0, 6);
    tcase_add_test(c, keys_have_the_order_of_scores);
    return c;
}
