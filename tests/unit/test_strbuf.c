/* engine/base/strbuf.h: growth and formatting at every border. */

#include "engine/base/strbuf.h"

#include <check.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

START_TEST(starts_empty_and_ends_empty)
{
    struct strbuf b = { 0 };

    ck_assert_ptr_null(b.data);
    strbuf_clear(&b);                    /* of nothing */
    ck_assert_ptr_null(b.data);
    strbuf_add(&b, "", 0);
    ck_assert_str_eq(b.data, "");
    strbuf_puts(&b, "text");
    char *data = b.data;
    strbuf_clear(&b);
    ck_assert(b.n == 0 && b.data == data && b.data[0] == '\0');
    strbuf_fini(&b);
    ck_assert(!b.data && b.n == 0 && b.capacity == 0);
    strbuf_fini(&b);
}
END_TEST

START_TEST(holds_any_bytes)
{
    struct strbuf b = { 0 };

    strbuf_add(&b, "a\0b", 3);
    strbuf_add(&b, NULL, 0);
    strbuf_add(&b, "c\xff", 2);
    ck_assert_uint_eq(b.n, 5);
    ck_assert_int_eq(memcmp(b.data, "a\0b" "c\xff", 6), 0);
    strbuf_fini(&b);
}
END_TEST

/* Text formatted through the small buffer and past it, from every fill. */
START_TEST(formats_every_length)
{
    static char want[2000];

    for (int before = 0; before < 140; before += 23)
        for (int n = 0; n < 600; n++) {
            struct strbuf b = { 0 };
            for (int i = 0; i < before; i++)
                strbuf_puts(&b, "-");
            strbuf_printf(&b, "%*d|%s", n, 7, "end");
            snprintf(want, sizeof want, "%.*s%*d|%s", before,
                     "------------------------------------------------------------------------"
                     "--------------------------------------------------------------------", n,
                     7, "end");
            ck_assert_str_eq(b.data, want);
            ck_assert(b.n == strlen(want) && b.capacity > b.n);
            strbuf_fini(&b);
        }
}
END_TEST

START_TEST(room_is_there)
{
    for (size_t n = 0; n < 3000; n = n * 3 / 2 + 1) {
        struct strbuf b = { 0 };
        strbuf_puts(&b, "head ");
        char *at = strbuf_room(&b, n);
        ck_assert(at == b.data + 5 && b.n == 5 && b.capacity >= 5 + n + 1);
        memset(at, 'x', n);
        b.n += n;
        strbuf_puts(&b, "!");
        ck_assert(b.n == 6 + n && b.data[5 + n] == '!' && b.data[6 + n] == '\0');
        ck_assert_int_eq(memcmp(b.data, "head ", 5), 0);
        strbuf_fini(&b);
    }
}
END_TEST

/* Growth is geometric: a megabyte by single bytes moves a few dozen times. */
START_TEST(grows_geometrically)
{
    struct strbuf b = { 0 };
    size_t moves = 0, capacity = 0;

    for (int i = 0; i < 1 << 20; i++) {
        strbuf_add(&b, "0123456789" + i % 10, 1);
        moves += b.capacity != capacity;
        capacity = b.capacity;
    }
    ck_assert_uint_lt(moves, 40);
    ck_assert_uint_eq(strlen(b.data), 1 << 20);
    for (int i = 0; i < 1 << 20; i++)
        if (b.data[i] != '0' + i % 10)
            ck_abort_msg("byte %d is %c", i, b.data[i]);
    strbuf_fini(&b);
}
END_TEST

START_TEST(nothing_formatted_adds_nothing)
{
    struct strbuf b = { 0 };

    strbuf_puts(&b, "x");
    strbuf_printf(&b, "%s", "");
    ck_assert_str_eq(b.data, "x");
    strbuf_fini(&b);
}
END_TEST

/* A length that wraps is a bug of the caller, not a small buffer. */
START_TEST(impossible_room_aborts)
{
    struct strbuf b = { 0 };

    strbuf_puts(&b, "x");
    strbuf_room(&b, (size_t)-1);
}
END_TEST

TCase *strbuf_case(void)
{
    TCase *tc = tcase_create("strbuf");

    tcase_add_test(tc, starts_empty_and_ends_empty);
    tcase_add_test(tc, holds_any_bytes);
    tcase_add_test(tc, formats_every_length);
    tcase_add_test(tc, room_is_there);
    tcase_add_test(tc, grows_geometrically);
    tcase_add_test(tc, nothing_formatted_adds_nothing);
    tcase_add_test_raise_signal(tc, impossible_room_aborts, SIGABRT);
    return tc;
}
