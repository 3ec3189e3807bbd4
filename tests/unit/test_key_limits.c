/* server/key_limits.h and the keys of server/access.h. */

#include "server/access.h"
#include "server/key_limits.h"

#include <check.h>

static const uint64_t second_ns = 1000000000u;

START_TEST(keys_have_numbers)
{
    static char *items[] = { "alpha", "beta", "beta2" };
    static const struct { const char *header; uint32_t key; } cases[] = {
        { "Bearer alpha", 1 }, { "bearer  beta ", 2 }, { "Bearer beta2", 3 }, { "Bearer bet", 0 },
        { "Bearer alphaa", 0 }, { "Bearer ", 0 }, { "Basic alpha", 0 }, { NULL, 0 },
    };
    const struct config_list three = { items, 3 }, none = { NULL, 0 };

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint32_t key = 99;
        ck_assert_int_eq(access_key_ok(&three, cases[i].header, &key), cases[i].key > 0);
        ck_assert_uint_eq(key, cases[i].key);
        ck_assert(access_key_ok(&none, cases[i].header, &key));
        ck_assert_uint_eq(key, 0);
    }
}
END_TEST

START_TEST(a_minutes_worth_at_once_and_no_more)
{
    struct key_limits *l = key_limits_create(2, 30, true);
    uint64_t now = 5 * second_ns;

    for (int i = 0; i < 30; i++)
        ck_assert_uint_eq(key_limits_take_request(l, 1, now), 0);
    ck_assert_uint_eq(key_limits_take_request(l, 1, now), 2);
    ck_assert_uint_eq(key_limits_take_request(l, 1, now + second_ns / 2), 2);
    ck_assert_uint_eq(key_limits_take_request(l, 1, now + second_ns + 1), 1);
    ck_assert_uint_eq(key_limits_take_request(l, 2, now), 0);    /* the other has its own */
    ck_assert_uint_eq(key_limits_take_request(l, 1, now + 2 * second_ns), 0);
    ck_assert_uint_eq(key_limits_take_request(l, 1, now + 2 * second_ns), 2);
    key_limits_destroy(l);
}
END_TEST

/* Whoever waits as long as he is told is let in, and over a long time as often as is allowed. */
START_TEST(waiting_as_told)
{
    struct key_limits *l = key_limits_create(1, (uint32_t)_i, true);
    uint64_t now = second_ns, end = now + 600 * second_ns;
    uint32_t taken = 0;

    while (now < end) {
        uint32_t wait_s = key_limits_take_request(l, 1, now);
        taken += wait_s == 0;
        ck_assert_uint_le(wait_s, 60);
        now += wait_s ? wait_s * second_ns : 1000;
        if (wait_s && now < end) {
            ck_assert_uint_eq(key_limits_take_request(l, 1, now), 0);
            taken++;
        }
    }
    ck_assert_uint_le(taken, 11 * (uint32_t)_i);
    ck_assert_uint_ge(taken, 10 * (uint32_t)_i);
    key_limits_destroy(l);
}
END_TEST

START_TEST(no_limit)
{
    struct key_limits *none = key_limits_create(1, 0, true), *open = key_limits_create(0, 0, true);

    for (int i = 0; i < 1000; i++) {
        ck_assert_uint_eq(key_limits_take_request(none, 1, 1), 0);
        ck_assert_uint_eq(key_limits_take_request(open, 0, 1), 0);
    }
    key_limits_destroy(none);
    key_limits_destroy(open);
}
END_TEST

START_TEST(salts)
{
    struct key_limits *l = key_limits_create(2, 0, true), *again = key_limits_create(2, 0, true);
    struct key_limits *shared = key_limits_create(2, 0, false);

    for (uint64_t asked = 0; asked < 3; asked++) {
        uint64_t one = key_limits_salt(l, 1, asked);
        ck_assert_uint_eq(key_limits_salt(l, 1, asked), one);
        ck_assert_uint_ne(key_limits_salt(l, 2, asked), one);
        ck_assert_uint_ne(key_limits_salt(l, 1, asked + 1), one);
        ck_assert_uint_ne(key_limits_salt(again, 1, asked), one);   /* another process */
        ck_assert_uint_eq(key_limits_salt(l, 0, asked), asked);
        ck_assert_uint_eq(key_limits_salt(shared, 2, asked), asked);
    }
    key_limits_destroy(l);
    key_limits_destroy(again);
    key_limits_destroy(shared);
}
END_TEST

TCase *key_limits_case(void)
{
    TCase *tc = tcase_create("key_limits");

    tcase_add_test(tc, keys_have_numbers);
    tcase_add_test(tc, a_minutes_worth_at_once_and_no_more);
    tcase_add_loop_test(tc, waiting_as_told, 1, 100);
    tcase_add_test(tc, no_limit);
    tcase_add_test(tc, salts);
    return tc;
}
