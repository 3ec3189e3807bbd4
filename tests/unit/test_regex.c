/* engine/grammar/regex.h: random expressions against a matcher that works on what they were made
 * from, tables of what matches and what is refused, characters against their encodings. */

#include "engine/grammar/regex.h"

#include "engine/base/strbuf.h"
#include "engine/grammar/grammar.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <stdio.h>
#include <string.h>

static struct grammar *compile(const char *pattern)
{
    struct grammar *g = NULL;
    struct error err = { .text = "" };
    enum status st = grammar_compile_regex(&g, pattern, strlen(pattern), NULL, &err);

    ck_assert_msg(st == ST_OK, "/%s/ %s", pattern, err.text);
    return g;
}

/* 1 matches, 0 is a beginning, -1 is not. */
static int match(struct grammar *g, const char *text, size_t n)
{
    struct grammar_matcher m;

    grammar_matcher_init(&m, g);
    int result = grammar_matcher_advance(&m, text, n) ? grammar_matcher_may_end(&m) : -1;
    grammar_matcher_fini(&m);
    return result;
}

/* ---- tables */

static const struct { const char *pattern, *text; int result; } matches[] = {
    { "abc", "abc", 1 }, { "abc", "ab", 0 }, { "abc", "abd", -1 }, { "abc", "abcd", -1 },
    { "^(a|b)$", "b", 1 }, { "a\\$", "a$", 1 }, { "\\^a", "^a", 1 },
    { "a.c", "a\xC3\xA9" "c", 1 }, { "a.c", "a\xC3", 0 }, { "a.c", "a\nc", -1 },
    { "a.c", "a\xC3" "c", -1 }, { ".", "\xF4\x8F\xBF\xBF", 1 }, { ".", "\xED\xA0", -1 },
    { ".", "\xF4\x90", -1 }, { ".", "\xC0", -1 }, { ".", "\xE0\x80", -1 },
    { "[^x]+", "a\n\xE2\x82\xAC", 1 }, { "[^x]+", "ax", -1 },
    { "[a-c\\d_-]*", "b7-_", 1 }, { "[a-c]", "d", -1 }, { "[\\]\\-]", "]", 1 },
    { "[\xC3\xA0-\xC3\xBF]", "\xC3\xA9", 1 }, { "[\xC3\xA0-\xC3\xBF]", "\xC3\x9F", -1 },
    { "\\d+\\w\\s", "12z ", 1 }, { "\\d", "\xD9\xA1", -1 }, { "\\D", "\xD9\xA1", 1 },
    { "\\x41\\u00e9\\u{1F600}", "A\xC3\xA9\xF0\x9F\x98\x80", 1 }, { "\\0\\t", "\\", -1 },
    { "a{2}", "aa", 1 }, { "a{2}", "aaa", -1 }, { "a{2,}", "aaaaa", 1 }, { "a{,2}", "aa", 1 },
    { "a{1,3}b", "aaab", 1 }, { "a{1,3}b", "aaaab", -1 }, { "a{0}b", "b", 1 },
    { "(ab|a)(c|bcd)", "abcd", 1 }, { "(?:a|b)*?c", "abbac", 1 }, { "(?P<x>a)(?<y>b)", "ab", 1 },
    { "(a*)*b", "aab", 1 }, { "((a?)*)+", "aaa", 1 }, { "(|a)b", "b", 1 }, { "}]", "}]", 1 },
    { "(-?(0|[1-9]\\d{0,3}))", "-120", 1 }, { "(-?(0|[1-9]\\d{0,3}))", "01", -1 },
};

START_TEST(what_matches)
{
    const char *text = matches[_i].text;

    struct grammar *g = compile(matches[_i].pattern);
    int got = match(g, text, strlen(text));
    ck_assert_msg(got == matches[_i].result, "/%s/ of \"%s\": %d", matches[_i].pattern, text, got);
    grammar_release(g);
}
END_TEST

static const struct { const char *pattern, *sentence; } refused[] = {
    { "(?=a)b", "look-ahead" }, { "(?!a)b", "look-ahead" }, { "(?<=a)b", "look-behind" },
    { "(?<!a)b", "look-behind" }, { "(a)\\1", "back reference" },
    { "(?P<x>a)(?P=x)", "named back" },
    { "\\k<x>", "named back" }, { "a\\b", "word boundary" }, { "\\Aa", "anchor" },
    { "a^b", "anchor" }, { "a$b", "anchor" }, { "^a|b", "anchor" }, { "(?i)a", "inline flag" },
    { "(?>a)", "atomic" }, { "a*+", "possessive" }, { "a**", "repeat of a repeat" },
    { "\\p{L}", "Unicode property" }, { "[[:alpha:]]", "named class" }, { "[]a]", "empty class" },
    { "[a", "closing bracket" }, { "(a", "closing parenthesis" }, { "a)", "without a group" },
    { "*a", "nothing to repeat" }, { "a{x}", "brace" }, { "a{3,2}", "wrong order" },
    { "a{1001}", "more than 1000" }, { "a\\", "at its end" }, { "[z-a]", "no later" },
    { "[\\d-z]", "begins with a class" }, { "\\q", "without a meaning" },
    { "\\xZ1", "hexadecimal" },
    { "\\uD800", "no character" }, { "\\u{110000}", "no character" }, { "", "empty text" },
    { "[^\\d\\D]", "no text" }, { "a[^\\s\\S]", "no text" }, { "\xFF", "UTF-8" },
    { "(a{1000}){1000}", "too large" }, { "((((){1000}){1000}){1000}){1000}", "empty text" },
    { "(a|b)*a(a|b){18}", "too complex" }, { "\\012", "octal" }, { "(?(1)a)", "condition" },
};

START_TEST(what_is_refused)
{
    const char *pattern = refused[_i].pattern;
    struct grammar *g = NULL;
    struct error err = { .text = "" };

    ck_assert_int_eq(grammar_compile_regex(&g, pattern, strlen(pattern), NULL, &err), ST_INVALID);
    ck_assert_msg(strstr(err.text, refused[_i].sentence), "/%s/ %s", pattern, err.text);
    ck_assert_ptr_null(g);
}
END_TEST

START_TEST(groups_nest_so_deep)
{
    struct grammar *g = NULL;
    struct error err;
    char pattern[2 * REGEX_MAX_NESTING + 4];

    for (int deep = REGEX_MAX_NESTING; deep <= REGEX_MAX_NESTING + 1; deep++) {
        size_t n = 0;
        for (int i = 0; i < deep; i++)
            pattern[n++] = '(';
        pattern[n++] = 'a';
        for (int i = 0; i < deep; i++)
            pattern[n++] = ')';
        enum status st = grammar_compile_regex(&g, pattern, n, NULL, &err);
        ck_assert_int_eq(st, deep > REGEX_MAX_NESTING ? ST_INVALID : ST_OK);
    }
    grammar_release(g);
}
END_TEST

/* ---- expressions from trees */

enum { MAX_TEXT = 6, MAX_TREES = 40 };
enum tree_kind { ONE, NOT_ONE, ANY, SEQUENCE, CHOICE, REPEAT };

struct tree {
    enum tree_kind kind;
    uint32_t character;
    int min, max;
    const struct tree *a, *b;
};

static const uint32_t alphabet[] = { 'a', 'b', 0xE9, 0x20AC, '\n' };
static const char *const spelled[] = { "a", "b", "\xC3\xA9", "\xE2\x82\xAC", "\n" };
enum { N_ALPHABET = 5 };

static struct tree trees[MAX_TREES];
static int n_trees;

static const struct tree *random_tree(struct test_random *r, int depth)
{
    struct tree *t = &trees[n_trees++];

    *t = (struct tree){ .character = (uint32_t)random_below(r, N_ALPHABET) };
    t->kind = (enum tree_kind)random_below(r, depth > 0 ? 6 : 3);
    if (t->kind >= SEQUENCE)
        t->a = random_tree(r, depth - 1);
    if (t->kind == SEQUENCE || t->kind == CHOICE)
        t->b = random_tree(r, depth - 1);
    t->min = random_below(r, 3);
    t->max = random_below(r, 2) ? -1 : t->min + random_below(r, 3);
    return t;
}

static void print(struct strbuf *out, const struct tree *t)
{
    switch (t->kind) {
    case ONE:     strbuf_puts(out, spelled[t->character]); break;
    case NOT_ONE: strbuf_printf(out, "[^%s]", spelled[t->character]); break;
    case ANY:     strbuf_puts(out, "."); break;
    case SEQUENCE:
        print(out, t->a);
        print(out, t->b);
        break;
    case CHOICE:
        strbuf_puts(out, "(");
        print(out, t->a);
        strbuf_puts(out, "|");
        print(out, t->b);
        strbuf_puts(out, ")");
        break;
    case REPEAT:
        strbuf_puts(out, "(?:");
        print(out, t->a);
        if (t->max < 0)
            strbuf_printf(out, "){%d,}", t->min);
        else
            strbuf_printf(out, "){%d,%d}", t->min, t->max);
        break;
    }
}

/* Where a match may end that begins at one of the positions; sets of positions as bits. */
static unsigned ends(const struct tree *t, const int *text, int n, unsigned from)
{
    unsigned out = 0, all = 0;

    switch (t->kind) {
    case SEQUENCE: return ends(t->b, text, n, ends(t->a, text, n, from));
    case CHOICE:   return ends(t->a, text, n, from) | ends(t->b, text, n, from);
    case REPEAT:
        for (int i = 0; i < t->min; i++)
            from = ends(t->a, text, n, from);
        all = from;
        for (int i = t->min; t->max < 0 ? i < t->min + MAX_TEXT + 1 : i < t->max; i++)
            all |= from = ends(t->a, text, n, from);
        return all;
    default:
        for (int i = 0; i < n; i++) {
            bool same = text[i] == (int)t->character;
            bool takes = t->kind == ANY ? alphabet[text[i]] != '\n' : same == (t->kind == ONE);
            out |= from >> i & 1 && takes ? 2u << i : 0;
        }
        return out;
    }
}

static void check_texts(struct test_random *r, struct grammar *g, const struct tree *t,
                        const char *pattern)
{
    for (int i = 0; i < 60; i++) {
        int text[MAX_TEXT], n = random_below(r, MAX_TEXT + 1);
        char bytes[4 * MAX_TEXT + 1] = "";
        for (int k = 0; k < n; k++) {
            text[k] = random_below(r, N_ALPHABET);
            strncat(bytes, spelled[text[k]], 4);
        }
        bool want = ends(t, text, n, 1) >> n & 1;
        int got = match(g, bytes, strlen(bytes));
        ck_assert_msg((got == 1) == want, "/%s/ of \"%s\": %d, not %d", pattern, bytes, got, want);
        for (size_t k = 0; want && k < strlen(bytes); k++)
            ck_assert_msg(match(g, bytes, k) >= 0, "/%s/: %zu bytes of \"%s\"", pattern, k, bytes);
    }
}

START_TEST(random_expressions)
{
    struct test_random r = test_random(7000 + (uint64_t)_i);
    int n_checked = 0;

    for (int i = 0; i < 100; i++) {
        struct strbuf pattern = { 0 };
        struct grammar *g = NULL;
        struct error err;
        n_trees = 0;
        const struct tree *t = random_tree(&r, 3);
        print(&pattern, t);
        strbuf_add(&pattern, "", 1);
        if (grammar_compile_regex(&g, pattern.data, pattern.n - 1, NULL, &err) == ST_OK) {
            check_texts(&r, g, t, pattern.data);
            n_checked++;
        } else {                             /* a{0} and the like */
            ck_assert_msg(strstr(err.text, "empty text"), "/%s/ %s", pattern.data, err.text);
        }
        grammar_release(g);
        strbuf_fini(&pattern);
    }
    ck_assert_int_gt(n_checked, 80);
}
END_TEST

/* ---- characters */

static size_t encode(uint32_t c, char out[4])
{
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (char)(0xC0 | c >> 6);
        out[1] = (char)(0x80 | (c & 63));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (char)(0xE0 | c >> 12);
        out[1] = (char)(0x80 | (c >> 6 & 63));
        out[2] = (char)(0x80 | (c & 63));
        return 3;
    }
    out[0] = (char)(0xF0 | c >> 18);
    out[1] = (char)(0x80 | (c >> 12 & 63));
    out[2] = (char)(0x80 | (c >> 6 & 63));
    out[3] = (char)(0x80 | (c & 63));
    return 4;
}

static uint32_t random_character(struct test_random *r)
{
    static const uint32_t below[] = { 0x80, 0x800, 0x10000, 0x110000 };

    return (uint32_t)random_below(r, (int)below[random_below(r, 4)]);
}

START_TEST(ranges_of_characters)
{
    struct test_random r = test_random(8000 + (uint64_t)_i);
    uint32_t lo = random_character(&r), hi = random_character(&r);
    char pattern[60], bytes[4];

    if (lo > hi) {
        uint32_t swap = lo;
        lo = hi;
        hi = swap;
    }
    if ((lo >= 0xD800 && lo <= 0xDFFF) || (hi >= 0xD800 && hi <= 0xDFFF))
        return;
    snprintf(pattern, sizeof pattern, "[\\u{%x}-\\u{%x}]", lo, hi);
    struct grammar *g = compile(pattern);
    for (int i = 0; i < 4000; i++) {
        uint32_t c = i < 8 ? (i < 4 ? lo + (uint32_t)i - 2 : hi + (uint32_t)i - 6)
                           : random_character(&r);
        if (c > 0x10FFFF)
            continue;
        bool want = c >= lo && c <= hi && !(c >= 0xD800 && c <= 0xDFFF);
        int got = match(g, bytes, encode(c, bytes));
        ck_assert_msg((got == 1) == want, "%s of U+%04X: %d", pattern, c, got);
    }
    grammar_release(g);
}
END_TEST

TCase *regex_case(void);
TCase *regex_case(void)
{
    TCase *tc = tcase_create("regex");

    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, what_matches, 0, sizeof matches / sizeof matches[0]);
    tcase_add_loop_test(tc, what_is_refused, 0, sizeof refused / sizeof refused[0]);
    tcase_add_test(tc, groups_nest_so_deep);
    tcase_add_loop_test(tc, random_expressions, 0, 20);
    tcase_add_loop_test(tc, ranges_of_characters, 0, 40);
    return tc;
}
