/* engine/run/stop.h: matches across pieces, cut points, and a naive search as
 * the judge. */

#include "engine/run/stop.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct stop_matcher m;

static int32_t push(const char *piece, uint64_t *cut)
{
    memcpy(stop_matcher_room(&m, strlen(piece)), piece, strlen(piece));
    return stop_matcher_push(&m, strlen(piece), cut);
}

START_TEST(match_spans_pieces)
{
    static const char *const stops[] = { "END", "stop" };
    uint64_t cut = 0;

    stop_matcher_init(&m, stops, 2, false);
    ck_assert_int_eq(push("the E", &cut), -1);
    ck_assert_int_eq(push("N", &cut), -1);
    ck_assert_int_eq(push("D of it", &cut), 0);
    ck_assert_uint_eq(cut, 4);
    stop_matcher_fini(&m);
}
END_TEST

START_TEST(included_stop_ends_the_text)
{
    static const char *const stops[] = { "\n\n" };
    uint64_t cut = 0;

    stop_matcher_init(&m, stops, 1, true);
    ck_assert_int_eq(push("a\n", &cut), -1);
    ck_assert_int_eq(push("\nb", &cut), 0);
    ck_assert_uint_eq(cut, 3);
    stop_matcher_fini(&m);
}
END_TEST

START_TEST(the_first_to_start_wins_then_the_first_listed)
{
    static const char *const stops[] = { "cd", "bcd", "bc" };
    uint64_t cut = 0;

    stop_matcher_init(&m, stops, 3, false);
    ck_assert_int_eq(push("abcd", &cut), 1);
    ck_assert_uint_eq(cut, 1);
    stop_matcher_fini(&m);
}
END_TEST

START_TEST(forgotten_text_does_not_match)
{
    static const char *const stops[] = { "ab" };
    uint64_t cut = 0;

    stop_matcher_init(&m, stops, 1, false);
    ck_assert_int_eq(push("a", &cut), -1);
    stop_matcher_forget(&m);
    ck_assert_int_eq(push("b", &cut), -1);
    ck_assert_int_eq(push("ab", &cut), 0);
    ck_assert_uint_eq(cut, 2);
    stop_matcher_fini(&m);
}
END_TEST

/* Random texts over two letters, random pieces: the first piece at whose end a
 * naive search of everything so far finds a match must be the one that reports
 * it, with the same cut. */
START_TEST(agrees_with_a_naive_search)
{
    char text[400], stop[3][6];
    const char *stops[3] = { stop[0], stop[1], stop[2] };

    srandom((unsigned)_i);
    int n_stops = 1 + (int)(random() % 3);
    for (int i = 0; i < n_stops; i++) {
        int length = 1 + (int)(random() % 5);
        for (int k = 0; k < length; k++)
            stop[i][k] = "ab"[random() % 2];
        stop[i][length] = '\0';
    }
    stop_matcher_init(&m, stops, (uint32_t)n_stops, false);
    size_t n = 0;
    for (;;) {
        char piece[12];
        size_t length = (size_t)(random() % 8);
        for (size_t k = 0; k < length; k++)
            piece[k] = "abc"[random() % 3];
        piece[length] = '\0';
        memcpy(text + n, piece, length + 1);
        n += length;

        const char *first = NULL;
        for (int i = 0; i < n_stops; i++) {
            const char *at = strstr(text, stops[i]);
            if (at && (!first || at < first))
                first = at;
        }
        uint64_t cut = UINT64_MAX;
        int32_t found = push(piece, &cut);
        ck_assert_msg((found >= 0) == (first != NULL), "seed %d, text %s", _i, text);
        if (first) {
            ck_assert_uint_eq(cut, (uint64_t)(first - text));
            break;
        }
        if (n > 350)
            break;
    }
    stop_matcher_fini(&m);
}
END_TEST

TCase *stop_case(void)
{
    TCase *tc = tcase_create("stop");

    tcase_add_test(tc, match_spans_pieces);
    tcase_add_test(tc, included_stop_ends_the_text);
    tcase_add_test(tc, the_first_to_start_wins_then_the_first_listed);
    tcase_add_test(tc, forgotten_text_does_not_match);
    tcase_add_loop_test(tc, agrees_with_a_naive_search, 0, 200);
    return tc;
}
