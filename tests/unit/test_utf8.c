#include "engine/base/utf8.h"

#include <check.h>
#include <stdint.h>
#include <string.h>

/* Table 3-7 of the Unicode standard, row by row: the reference. */
struct row {
    int length;
    unsigned char low[4], high[4];
};
static const struct row rows[] = {
    { 1, { 0x00 }, { 0x7F } },
    { 2, { 0xC2, 0x80 }, { 0xDF, 0xBF } },
    { 3, { 0xE0, 0xA0, 0x80 }, { 0xE0, 0xBF, 0xBF } },
    { 3, { 0xE1, 0x80, 0x80 }, { 0xEC, 0xBF, 0xBF } },
    { 3, { 0xED, 0x80, 0x80 }, { 0xED, 0x9F, 0xBF } },
    { 3, { 0xEE, 0x80, 0x80 }, { 0xEF, 0xBF, 0xBF } },
    { 4, { 0xF0, 0x90, 0x80, 0x80 }, { 0xF0, 0xBF, 0xBF, 0xBF } },
    { 4, { 0xF1, 0x80, 0x80, 0x80 }, { 0xF3, 0xBF, 0xBF, 0xBF } },
    { 4, { 0xF4, 0x80, 0x80, 0x80 }, { 0xF4, 0x8F, 0xBF, 0xBF } },
};

static int classify_by_table(const unsigned char *s, int n)
{
    for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
        int k = 0;
        while (k < rows[r].length && k < n && s[k] >= rows[r].low[k] && s[k] <= rows[r].high[k])
            k++;
        if (k == rows[r].length)
            return k;
        if (k == n)
            return 0;
        if (k > 0)
            return -k;   /* no two rows share a first byte */
    }
    return -1;
}

/* Bytes at which a table of UTF-8 can change its mind. */
static const unsigned char edges[] = {
    0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0,
    0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFE, 0xFF,
};
enum { N_EDGES = sizeof edges };

START_TEST(classify_agrees_with_the_table)
{
    unsigned char s[4];

    for (int a = 0; a < 256; a++)
        for (int b = 0; b < 256; b++) {
            s[0] = (unsigned char)a;
            s[1] = (unsigned char)b;
            for (int n = 1; n <= 2; n++)
                if (utf8_classify((char *)s, (size_t)n) != classify_by_table(s, n))
                    ck_abort_msg("%02x %02x, %d bytes", s[0], s[1], n);
        }
    for (int i = 0; i < N_EDGES * N_EDGES * N_EDGES * N_EDGES; i++) {
        int rest = i;
        for (int k = 0; k < 4; k++, rest /= N_EDGES)
            s[k] = edges[rest % N_EDGES];
        for (int n = 3; n <= 4; n++)
            if (utf8_classify((char *)s, (size_t)n) != classify_by_table(s, n))
                ck_abort_msg("%02x %02x %02x %02x, %d bytes", s[0], s[1], s[2], s[3], n);
    }
}
END_TEST

START_TEST(every_character_is_valid_and_no_prefix_of_it)
{
    for (uint32_t c = 0x80; c < 0x110000; c++) {
        unsigned char s[4];
        size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
        for (size_t k = n - 1, rest = c; k > 0; k--, rest >>= 6)
            s[k] = (unsigned char)(0x80 | (rest & 0x3F));
        s[0] = (unsigned char)(n == 2   ? 0xC0 | c >> 6
                               : n == 3 ? 0xE0 | c >> 12
                                        : 0xF0 | c >> 18);
        bool surrogate = c >= 0xD800 && c < 0xE000;
        if (utf8_is_valid((char *)s, n) == surrogate)
            ck_abort_msg("U+%04X", (unsigned)c);
        if (!surrogate)
            for (size_t k = 1; k < n; k++)
                if (utf8_classify((char *)s, k) != 0)
                    ck_abort_msg("%zu bytes of U+%04X", k, (unsigned)c);
    }
}
END_TEST

/* The first bad byte at every place around the steps of the fast path. */
START_TEST(prefix_ends_at_the_first_bad_byte)
{
    char s[100];

    for (size_t n = 0; n < sizeof s; n++)
        for (size_t bad = 0; bad < n; bad++) {
            memset(s, 'x', sizeof s);
            ck_assert(utf8_is_valid(s, n));
            s[bad] = '\xFF';
            ck_assert_uint_eq(utf8_valid_prefix(s, n), bad);
            s[bad] = '\xC3';   /* starts a character that x does not continue */
            ck_assert_uint_eq(utf8_valid_prefix(s, n), bad);
            if (bad + 1 < n) {
                s[bad + 1] = '\xA9';
                ck_assert_uint_eq(utf8_valid_prefix(s, n), n);
                ck_assert_uint_eq(utf8_valid_prefix(s, bad + 1), bad);
            }
        }
}
END_TEST

TCase *utf8_case(void)
{
    TCase *tc = tcase_create("utf8");

    tcase_add_test(tc, classify_agrees_with_the_table);
    tcase_add_test(tc, every_character_is_valid_and_no_prefix_of_it);
    tcase_add_test(tc, prefix_ends_at_the_first_bad_byte);
    return tc;
}
