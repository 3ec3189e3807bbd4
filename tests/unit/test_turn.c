/* engine/grammar/turn.h: thoughts, calls and structured texts, as tables and against a search for
 * the markers in random texts. */

#include "engine/grammar/grammar.h"
#include "tests/support/random_data.h"

#include <cjson/cJSON.h>
#include <check.h>
#include <string.h>

#define CALL(x) "<call>f(" x ")</call>"

enum { WITH_TEXT = 1, WITH_CALLS = 2, SEVERAL = 4 };

/* The text is yes or no; f takes {"a": true or false}, g any object. */
static enum status try_compile(struct grammar **out, enum grammar_thoughts thoughts, unsigned what,
                               const char *schema, bool *refused, struct error *err)
{
    static const char *const choices[] = { "yes", "no" };
    cJSON *tree = cJSON_Parse(schema);
    struct grammar_call calls[] = { { .head = "<call>f(", .tail = ")</call>", .schema = tree },
                                    { .head = "<call>g(", .tail = ")</call>" } };
    struct grammar_turn turn = {
        .thoughts = thoughts, .think = "<think>", .think_end = "</think>",
        .never = what & WITH_CALLS ? "<call>" : NULL,
        .calls = calls, .n_calls = what & WITH_CALLS ? 2 : 0,
        .between = what & SEVERAL ? "\n" : NULL,
    };
    enum status st = what & WITH_TEXT ? grammar_compile_choice(out, choices, 2, &turn, err)
                                      : grammar_compile_calls(out, &turn, err);

    *refused = calls[0].refused;
    cJSON_Delete(tree);
    return st;
}

static struct grammar *compile(enum grammar_thoughts thoughts, unsigned what)
{
    struct grammar *g = NULL;
    struct error err = { .text = "" };
    bool refused;

    ck_assert_msg(try_compile(&g, thoughts, what, "{\"type\":\"object\",\"properties\":{\"a\":"
                              "{\"type\":\"boolean\"}}}", &refused, &err) == ST_OK, "%s", err.text);
    ck_assert(!refused);
    return g;
}

/* 2: nothing may follow; 1: may end; 0: a beginning; -1: neither. */
static int match(struct grammar *g, const char *text, size_t n)
{
    struct grammar_matcher m;
    int result = -1;

    grammar_matcher_init(&m, g);
    if (grammar_matcher_advance(&m, text, n))
        result = grammar_matcher_is_complete(&m) ? 2 : grammar_matcher_may_end(&m);
    grammar_matcher_fini(&m);
    return result;
}

static const struct {
    enum grammar_thoughts thoughts;
    unsigned what;
    const char *text;
    int result;
} rows[] = {
    { GRAMMAR_NO_THOUGHTS, WITH_TEXT, "yes", 2 },
    { GRAMMAR_NO_THOUGHTS, WITH_TEXT, "<", -1 },
    { GRAMMAR_NO_THOUGHTS, WITH_TEXT, "\n", -1 },
    { GRAMMAR_MAY_THINK, WITH_TEXT, "no", 2 },
    { GRAMMAR_MAY_THINK, WITH_TEXT, "\nno", -1 },
    { GRAMMAR_MAY_THINK, WITH_TEXT, "<think>", 0 },
    { GRAMMAR_MAY_THINK, WITH_TEXT, "<thinker", -1 },
    { GRAMMAR_MAY_THINK, WITH_TEXT, "<think></think>no", 2 },
    { GRAMMAR_MAY_THINK, WITH_TEXT, "<think>\nHm, \xC3\xA9\xFF?\n</think>\n\nyes", 2 },
    { GRAMMAR_MAY_THINK, WITH_TEXT, "<think>a < b <</thin</think>\nyes", 2 },
    { GRAMMAR_MAY_THINK, WITH_TEXT, "<think><think></think>yes", 2 },
    { GRAMMAR_MAY_THINK, WITH_TEXT, "<think>yes", 0 },
    { GRAMMAR_MAY_THINK, WITH_TEXT, "<think></think>\n\n\n", -1 },
    { GRAMMAR_MAY_THINK, WITH_TEXT, "<think></think></think>", -1 },
    { GRAMMAR_THINKING, WITH_TEXT, "yes", 0 },
    { GRAMMAR_THINKING, WITH_TEXT, "</think>yes", 2 },
    { GRAMMAR_THINKING, WITH_TEXT, "<call></think>yes", 2 },
    { GRAMMAR_NO_THOUGHTS, WITH_CALLS, CALL("{}"), 2 },
    { GRAMMAR_NO_THOUGHTS, WITH_CALLS, CALL("{\"a\": true}"), 2 },
    { GRAMMAR_NO_THOUGHTS, WITH_CALLS, CALL("{\"b\""), -1 },
    { GRAMMAR_NO_THOUGHTS, WITH_CALLS, "<call>g({\"b\": [1]})</call>", 2 },
    { GRAMMAR_NO_THOUGHTS, WITH_CALLS, CALL("{}") "\n", -1 },
    { GRAMMAR_NO_THOUGHTS, WITH_CALLS, "yes", -1 },
    { GRAMMAR_NO_THOUGHTS, WITH_CALLS | SEVERAL, "", 0 },
    { GRAMMAR_NO_THOUGHTS, WITH_CALLS | SEVERAL, CALL("{}"), 1 },
    { GRAMMAR_NO_THOUGHTS, WITH_CALLS | SEVERAL, CALL("{}") "\n" CALL("{}"), 1 },
    { GRAMMAR_NO_THOUGHTS, WITH_CALLS | SEVERAL, CALL("{}") CALL("{}"), -1 },
    { GRAMMAR_NO_THOUGHTS, WITH_CALLS | WITH_TEXT, "yes", 2 },
    { GRAMMAR_NO_THOUGHTS, WITH_CALLS | WITH_TEXT, CALL("{}"), 2 },
    { GRAMMAR_NO_THOUGHTS, WITH_CALLS | WITH_TEXT | SEVERAL, "yes\n", -1 },
    { GRAMMAR_MAY_THINK, WITH_CALLS | WITH_TEXT, "<think>1</think>\n\n" CALL("{}"), 2 },
    { GRAMMAR_MAY_THINK, WITH_CALLS, CALL("{}"), 2 },
    { GRAMMAR_THINKING, WITH_CALLS, "a <call", 0 },
    { GRAMMAR_THINKING, WITH_CALLS, "a <call>", -1 },
    { GRAMMAR_THINKING, WITH_CALLS, "<ca<call</think>" CALL("{}"), 2 },
};

START_TEST(what_a_turn_may_be)
{
    struct grammar *g = compile(rows[_i].thoughts, rows[_i].what);
    const char *text = rows[_i].text;

    int got = match(g, text, strlen(text));
    ck_assert_msg(got == rows[_i].result, "%s: %d", text, got);
    grammar_release(g);
}
END_TEST

/* What match() should say of a text that ends in "no", by searching for the markers. */
static int search(const char *text)
{
    const char *end = strstr(text, "</think>"), *call = strstr(text, "<call>");

    if (call && (!end || call < end))
        return -1;
    if (!end)
        return 0;
    end += strlen("</think>");
    for (int i = 0; i < 2; i++)
        end += *end == '\n';
    return strcmp(end, "no") == 0 ? 2 : -1;
}

START_TEST(thoughts_end_at_their_first_marker)
{
    static const char *const pieces[] = { "<", "/", "</", "</think", "</think>", ">", "think>",
                                          "<call", "<call>", "a", "\xE2\x82", "\n" };
    enum { N_PIECES = sizeof pieces / sizeof pieces[0] };
    struct test_random r = test_random((uint64_t)_i);
    struct grammar *g = compile(GRAMMAR_THINKING, WITH_TEXT | WITH_CALLS);
    int seen[4] = { 0 };

    for (int round = 0; round < 5000; round++) {
        char text[200] = "";
        for (uint64_t i = random_below(&r, 8); i > 0; i--)
            strcat(text, pieces[random_below(&r, N_PIECES)]);
        strcat(text, "no");
        int got = match(g, text, strlen(text)), want = search(text);
        ck_assert_msg(got == want, "%s: %d, not %d", text, got, want);
        seen[1 + want]++;
    }
    ck_assert(seen[0] > 100 && seen[1] > 100 && seen[3] > 100);
    grammar_release(g);
}
END_TEST

START_TEST(a_refused_schema_says_whose_it_is)
{
    struct grammar *g = NULL;
    struct error err;
    bool refused;

    ck_assert_int_eq(try_compile(&g, GRAMMAR_NO_THOUGHTS, WITH_CALLS | WITH_TEXT, "{\"not\":{}}",
                                 &refused, &err), ST_INVALID);
    ck_assert(refused && !g);
    ck_assert_msg(strstr(err.text, "'not'"), "%s", err.text);
}
END_TEST

/* What alone would be refused is refused with thoughts in front of it as well. */
START_TEST(an_expression_is_judged_by_itself)
{
    static const char *const bad[] = { "", "(a|b)*a(a|b){18}", "a[^\\s\\S]" };
    const struct grammar_turn turn = { .thoughts = GRAMMAR_MAY_THINK, .think = "<think>",
                                       .think_end = "</think>" };
    struct grammar *g = NULL;
    struct error err;

    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        ck_assert_int_eq(grammar_compile_regex(&g, bad[i], strlen(bad[i]), &turn, &err),
                         ST_INVALID);
    ck_assert_int_eq(grammar_compile_regex(&g, "a+", 2, &turn, &err), ST_OK);
    ck_assert_int_eq(match(g, "<think>b</think>\naa", 19), 1);
    grammar_release(g);
}
END_TEST

/* As deep as a structure by itself: 64 values, of which the innermost is a string. */
START_TEST(arguments_nest_so_deep)
{
    struct grammar *g = compile(GRAMMAR_THINKING, WITH_CALLS | SEVERAL);
    struct grammar_matcher m;
    static const char head[] = "</think><call>g({\"a\":";
    enum { ARRAYS = 62 };

    grammar_matcher_init(&m, g);
    ck_assert(grammar_matcher_advance(&m, head, sizeof head - 1));
    for (int i = 0; i < ARRAYS; i++)
        ck_assert_msg(grammar_matcher_advance(&m, "[\n ", 3), "%d", i);
    ck_assert(grammar_matcher_advance(&m, "\"a\"", 3));
    for (int i = 0; i < ARRAYS; i++)
        ck_assert(grammar_matcher_advance(&m, "\n]", 2));
    ck_assert(grammar_matcher_advance(&m, "})</call>", 9));
    ck_assert(grammar_matcher_may_end(&m));
    grammar_matcher_fini(&m);
    grammar_release(g);
}
END_TEST

/* Nor is what has no value inside deeper, whatever stands around the call: the server has to read
 * it when it is sent back. */
START_TEST(arguments_nest_no_deeper)
{
    static const char *const heads[] = {
        [GRAMMAR_NO_THOUGHTS] = "<call>g({\"a\":", [GRAMMAR_MAY_THINK] = "<call>g({\"a\":",
        [GRAMMAR_THINKING] = "</think><call>g({\"a\":",
    };
    struct grammar *g = compile((enum grammar_thoughts)_i, WITH_CALLS | SEVERAL);
    struct grammar_matcher m;
    int deep = 1;

    grammar_matcher_init(&m, g);
    ck_assert(grammar_matcher_advance(&m, heads[_i], strlen(heads[_i])));
    for (; grammar_matcher_advance(&m, "[", 1); deep++)
        continue;
    ck_assert_int_eq(deep, 64);
    grammar_matcher_fini(&m);
    grammar_release(g);
}
END_TEST

TCase *turn_case(void);
TCase *turn_case(void)
{
    TCase *tc = tcase_create("turn");

    tcase_add_loop_test(tc, what_a_turn_may_be, 0, sizeof rows / sizeof rows[0]);
    tcase_add_loop_test(tc, thoughts_end_at_their_first_marker, 0, 4);
    tcase_add_test(tc, a_refused_schema_says_whose_it_is);
    tcase_add_test(tc, an_expression_is_judged_by_itself);
    tcase_add_test(tc, arguments_nest_so_deep);
    tcase_add_loop_test(tc, arguments_nest_no_deeper, 0, 3);
    return tc;
}
