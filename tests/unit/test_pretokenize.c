#include "engine/base/strbuf.h"
#include "engine/model/nfc.h"
#include "engine/model/pretokenize.h"

#include <check.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SPLITTER(kind) ((struct pretokenizer){ { kind }, 1 })

/* The words of text, with a bar after each. */
static char *words_of(const struct pretokenizer *pre, const char *text, char *out)
{
    struct words w;
    const char *word;
    size_t n, at = 0;

    words_init(&w, pre, text, strlen(text));
    while ((n = words_next(&w, &word)) > 0) {
        memcpy(out + at, word, n);
        at += n;
        out[at++] = '|';
    }
    out[at] = '\0';
    return out;
}

static const struct golden {
    const char *text, *qwen, *llama, *gpt2;
} goldens[] = {
    { "Hello  world\n\n  foo", "Hello| | world|\n\n| | foo|", NULL,
      "Hello| | world|\n\n | foo|" },
    { "I'LL don't we'Ve", "I|'LL| don|'t| we|'Ve|", NULL, "I|'|LL| don|'t| we|'|Ve|" },
    { "12345 67", "1|2|3|4|5| |6|7|", "123|45| |67|", "12345| 67|" },
    { "a.b(c)\r\n\tx", "a|.b|(c|)\r\n|\tx|", NULL, "a|.|b|(|c|)|\r\n|\t|x|" },
    { "  \n \n  y", "  \n \n| | y|", NULL, "  \n \n | y|" },
    { " 你好，世界！ok", " 你好|，世界|！ok|", NULL, " 你好|，|世界|！|ok|" },
    { "x=1;\n\n\n", "x|=|1|;\n\n\n|", NULL, "x|=|1|;|\n\n\n|" },
    { "\u00a0hi \u3000there  ", "\u00a0hi| |\u3000there|  |", NULL,
      "\u00a0|hi| |\u3000|there|  |" },
    { "e\u0301a", "e|\u0301a|", NULL, "e|\u0301|a|" },
    { "...\n...", "...\n|...|", NULL, "...|\n|...|" },
    { "tab\t\tend  ", "tab|\t|\tend|  |", NULL, "tab|\t|\t|end|  |" },
    { "_foo_bar$9", "_foo|_bar|$|9|", NULL, "_|foo|_|bar|$|9|" },
    { "'\u017f s", "'\u017f| s|", NULL, "'|\u017f| s|" },
    { "🙂🙂 a", "🙂🙂| a|", NULL, "🙂🙂| a|" },
    /* White space that is and is not white space. */
    { "a\xc2\x85\u2028" "b", "a|\xc2\x85|\u2028" "b|", NULL, "a|\xc2\x85|\u2028|b|" },
    { "\u180e\u200b\x1c", "\u180e\u200b\x1c|", NULL, "\u180e\u200b\x1c|" },
    /* Numbers that are not digits, and letters of Unicode 16. */
    { "²½Ⅷ①", "²|½|Ⅷ|①|", "²½Ⅷ|①|", "²½Ⅷ①|" },
    { "a\U000105C0\U00010D40", "a\U000105C0|\U00010D40|", NULL, "a\U000105C0|\U00010D40|" },
    { "'s't're've'm'll'd", "'s|'t|'re|'ve|'m|'ll|'d|", NULL, "'s|'t|'re|'ve|'m|'ll|'d|" },
    { "'r 'l '", "'r| '|l| '|", NULL, "'|r| '|l| '|" },
};

START_TEST(golden_splits)
{
    const struct golden *g = &goldens[_i];
    struct pretokenizer qwen = SPLITTER(SPLIT_QWEN), llama = SPLITTER(SPLIT_LLAMA3);
    struct pretokenizer gpt2 = SPLITTER(SPLIT_GPT2);
    char out[256];

    ck_assert_str_eq(words_of(&qwen, g->text, out), g->qwen);
    ck_assert_str_eq(words_of(&llama, g->text, out), g->llama ? g->llama : g->qwen);
    ck_assert_str_eq(words_of(&gpt2, g->text, out), g->gpt2);
}
END_TEST

START_TEST(digits_nest)
{
    struct pretokenizer digits = SPLITTER(SPLIT_DIGITS);
    struct pretokenizer smol = { { SPLIT_DIGITS, SPLIT_GPT2 }, 2 };
    struct pretokenizer none = { { 0 }, 0 };
    char out[256];

    ck_assert_str_eq(words_of(&digits, "it is 12 o'clock", out), "it is |1|2| o'clock|");
    ck_assert_str_eq(words_of(&smol, "it is 12 o'clock", out), "it| is| |1|2| o|'|clock|");
    ck_assert_str_eq(words_of(&smol, "7²\U00011DE0", out), "7|²|\U00011DE0|");
    ck_assert_str_eq(words_of(&none, "it is 12", out), "it is 12|");
    ck_assert_str_eq(words_of(&none, "", out), "");
}
END_TEST

START_TEST(patterns_are_found_by_equality)
{
    enum splitter kind;

    ck_assert(splitter_find(&kind, "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
                            "\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"
                            "\\s+(?!\\S)|\\s+"));
    ck_assert_int_eq(kind, SPLIT_LLAMA3);
    ck_assert(!splitter_find(&kind, ""));
    ck_assert(!splitter_find(&kind, "\\s+"));
}
END_TEST

/* Text from pieces that matter to the splitters, some of which change under
 * normalization. */
static size_t random_text(char *out, int n_parts)
{
    static const char *const parts[] = {
        "a", "the", "Word", " ", " ", " ", "\n", "\r\n", "\t", "  ", "1", "23", "'s", "'LL",
        "'", ".", "--", "é", "e\u0301", "\u0301", "\u0958", "世界", "\u00a0", "\u3000", "🙂",
        "ſ", "½", "。", "，", "カ\u3099", "カ", "и\u0306", "й", "한", "\u1112\u1161", "\u11ab",
    };
    size_t n = 0;

    while (n_parts--) {
        const char *part = parts[(size_t)rand() % (sizeof parts / sizeof parts[0])];
        memcpy(out + n, part, strlen(part));
        n += strlen(part);
    }
    return n;
}

static const struct pretokenizer nestings[] = {
    { { SPLIT_QWEN }, 1 }, { { SPLIT_LLAMA3 }, 1 }, { { SPLIT_GPT2 }, 1 },
    { { SPLIT_DIGITS, SPLIT_GPT2 }, 2 }, { { SPLIT_LLAMA3, SPLIT_DIGITS, SPLIT_GPT2 }, 3 },
};

static void append_words(const struct pretokenizer *pre, struct strbuf *out, const char *s,
                         size_t n)
{
    struct strbuf normal = { 0 };
    struct words w;
    const char *word;

    nfc_append(&normal, s, n);
    words_init(&w, pre, normal.data, normal.n);
    while ((n = words_next(&w, &word)) > 0) {
        strbuf_add(out, word, n);
        strbuf_puts(out, "|");
    }
    strbuf_fini(&normal);
}

START_TEST(a_cut_does_not_show)
{
    const struct pretokenizer *pre = &nestings[_i];
    int n_cuts = 0;
    char text[256];

    srand(1);
    for (int round = 0; round < 5000; round++) {
        size_t n = random_text(text, 1 + rand() % 20);
        size_t cut = pretokenize_cut(pre, text, n, (size_t)rand() % (n + 1));
        struct strbuf whole = { 0 }, parts = { 0 };
        n_cuts += cut < n;
        append_words(pre, &whole, text, n);
        append_words(pre, &parts, text, cut);
        append_words(pre, &parts, text + cut, n - cut);
        if (cut > n || strcmp(whole.data, parts.data) != 0)
            ck_abort_msg("cut at %zu: %s is not %s", cut, parts.data, whole.data);
        strbuf_fini(&whole);
        strbuf_fini(&parts);
    }
    ck_assert_int_gt(n_cuts, 100);
}
END_TEST

START_TEST(no_cut_without_a_pattern)
{
    struct pretokenizer none = { { 0 }, 0 }, digits = SPLITTER(SPLIT_DIGITS);

    ck_assert_uint_eq(pretokenize_cut(&none, "ab cd", 5, 1), 5);
    ck_assert_uint_eq(pretokenize_cut(&digits, "ab cd", 5, 1), 5);
}
END_TEST

static const char *const normal_forms[][2] = {
    { "plain", "plain" },
    { "e\u0301", "é" },
    { "a\u0301\u0323", "ạ\u0301" },
    { "\u212b\u2126", "Å\u03a9" },
    { "\u1112\u1161\u11ab", "\ud55c" },
    { "\uac00\u11a8", "\uac01" },
    { "\uff21\u00b2\ufb01", "\uff21\u00b2\ufb01" },
    { "\u0958", "\u0915\u093c" },
    { "\u0344x", "\u0308\u0301x" },
    { "\u0f73\u0f73", "\u0f71\u0f71\u0f72\u0f72" },
    { "\uf900\U0002f800", "\u8c48\u4e3d" },
    { "\u09c7\u09be", "\u09cb" },
    /* A mark of class 0 to the tables that matter, though not to newer ones. */
    { "a\U0001e4ec\u0323", "a\U0001e4ec\u0323" },
};

START_TEST(normal_form)
{
    struct strbuf out = { 0 };
    const char *s = normal_forms[_i][0], *want = normal_forms[_i][1];

    strbuf_puts(&out, "<");
    nfc_append(&out, s, strlen(s));
    ck_assert_str_eq(out.data + 1, want);
    if (strcmp(s, want) != 0)
        ck_assert(!nfc_is_quick(s, strlen(s)));
    strbuf_clear(&out);
    nfc_append(&out, want, strlen(want));
    ck_assert_str_eq(out.data, want);
    strbuf_fini(&out);
}
END_TEST

/* A hundred thousand marks in the wrong order: sorting them must not be quadratic. */
START_TEST(long_runs_of_marks)
{
    enum { N = 50000 };
    struct strbuf in = { 0 }, out = { 0 };

    strbuf_puts(&in, "x");
    for (int i = 0; i < N; i++)
        strbuf_puts(&in, "\u0315\u0327");   /* classes 232 and 202 */
    nfc_append(&out, in.data, in.n);
    ck_assert_uint_eq(out.n, in.n);
    ck_assert_mem_eq(out.data + 1, "\u0327\u0327", 4);
    ck_assert_mem_eq(out.data + 1 + 2 * N - 2, "\u0327\u0315", 4);
    strbuf_fini(&in);
    strbuf_fini(&out);
}
END_TEST

TCase *pretokenize_case(void)
{
    TCase *tc = tcase_create("pretokenize");

    tcase_add_loop_test(tc, golden_splits, 0, sizeof goldens / sizeof goldens[0]);
    tcase_add_test(tc, digits_nest);
    tcase_add_test(tc, patterns_are_found_by_equality);
    tcase_add_loop_test(tc, a_cut_does_not_show, 0, sizeof nestings / sizeof nestings[0]);
    tcase_add_test(tc, no_cut_without_a_pattern);
    tcase_add_loop_test(tc, normal_form, 0, sizeof normal_forms / sizeof normal_forms[0]);
    tcase_add_test(tc, long_runs_of_marks);
    return tc;
}
