#include "engine/base/strbuf.h"
#include "server/chat_output.h"
#include "server/json_scan.h"

#include <check.h>
#include <stdio.h>
#include <string.h>

/* An output is written down part by part: R[thoughts] C[text] 0:name( arguments ).  Every row
 * is read whole, byte by byte and in pieces of every length: the parts are the same. */

static const char *const weather_strings[] = { "city" };
static const struct chat_tool tools[] = {
    { .name = "get_weather", .strings = weather_strings, .n_strings = 1 },
    { .name = "f" },
};

enum kind {
    THINK,
    THINK_TOOLS,
    OPEN,
    OPEN_TOOLS,
    QUIET,
    QUIET_TOOLS,
    GLM,
    GLM_QUIET,
    LLAMA,
    PLAIN,
    ONE_CALL,
    N_KINDS
};
static const struct chat_output_config configs[N_KINDS] = {
    [THINK] = { .format = CHAT_QWEN3, .may_think = true },
    [THINK_TOOLS] = { .format = CHAT_QWEN3, .may_think = true, .tools = tools, .n_tools = 2 },
    [OPEN] = { .format = CHAT_QWEN3_THINKING, .may_think = true, .open_thoughts = true },
    [OPEN_TOOLS] = { .format = CHAT_QWEN3_THINKING,
                     .may_think = true,
                     .open_thoughts = true,
                     .tools = tools,
                     .n_tools = 2 },
    [QUIET] = { .format = CHAT_QWEN25 },
    [QUIET_TOOLS] = { .format = CHAT_QWEN25, .tools = tools, .n_tools = 2 },
    [GLM] = { .format = CHAT_GLM47,
              .may_think = true,
              .open_thoughts = true,
              .tools = tools,
              .n_tools = 2 },
    [GLM_QUIET] = { .format = CHAT_GLM47, .tools = tools, .n_tools = 2 },
    [LLAMA] = { .format = CHAT_LLAMA31, .tools = tools, .n_tools = 2 },
    [PLAIN] = { .format = CHAT_PLAIN },
    [ONE_CALL] = { .format = CHAT_QWEN3_INSTRUCT,
                   .tools = tools,
                   .n_tools = 2,
                   .one_call = true },
};

#define CALL "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>"
#define PARIS                                                                                  \
    "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Pa}ris\\\"\","       \
    " \"l\": [{}]}}\n</tool_call>"
#define GLM_CALL(pairs) "<tool_call>get_weather" pairs "</tool_call>"
#define PAIR(k, v) "<arg_key>" k "</arg_key><arg_value>" v "</arg_value>"

static const struct {
    enum kind kind;
    const char *text, *want;
} rows[] = {
    /* thoughts */
    { THINK, "", "" },
    { THINK, "Hello", "C[Hello]" },
    { THINK, " \n Hello\n", "C[ \n Hello\n]" },
    { THINK, "<thin", "C[<thin]" },
    { THINK, "<think>\nhmm\n</think>\n\nHello!", "R[hmm]C[Hello!]" },
    { THINK, "<think>\n\n</think>\n\nHi", "C[Hi]" },
    { THINK, "\n<think>a\n\nb</think>c\n", "R[a\n\nb]C[c\n]" },
    { THINK, "<think>\ncut off\n", "R[cut off\n]" },
    { THINK, "<think>\ncut off</thi", "R[cut off</thi]" },
    { THINK, "<think>a</think><think>b</think>", "R[a]C[<think>b</think>]" },
    { THINK, "no <think>thoughts</think>", "C[no <think>thoughts</think>]" },
    { THINK, "<think>a" CALL "b</think>c", "R[a" CALL "b]C[c]" },
    { OPEN, "hmm\n</think>\n\nHello", "R[hmm]C[Hello]" },
    { OPEN, "<think>\nhmm</think>Hello", "R[hmm]C[Hello]" },
    { OPEN, "hmm", "R[hmm]" },
    { OPEN, "</think>Hello", "C[Hello]" },
    { QUIET, "<think>a</think>b", "C[<think>a</think>b]" },
    { QUIET, "a\n\n", "C[a\n\n]" },
    { PLAIN, " \n Hello \n", "C[Hello \n]" },
    /* calls */
    { QUIET, CALL, "C[" CALL "]" },
    { QUIET_TOOLS, CALL, "0:f({\"a\": 1})" },
    { QUIET_TOOLS, "Let me see.\n" CALL "\n" PARIS "\n",
      "C[Let me see.]0:f({\"a\": 1})1:get_weather({\"city\": \"Pa}ris\\\"\", \"l\": [{}]})" },
    { QUIET_TOOLS, CALL "\n\nDone.\n", "0:f({\"a\": 1})C[Done.\n]" },
    { QUIET_TOOLS, "a < b <tool> <tool_cal", "C[a < b <tool> <tool_cal]" },
    { THINK_TOOLS, "<think>\nI call\n</think>\n\n" CALL, "R[I call]0:f({\"a\": 1})" },
    { THINK_TOOLS, "<think>\nI call\n" CALL, "R[I call]0:f({\"a\": 1})" },
    { OPEN_TOOLS, "I call\n" CALL "x", "R[I call]0:f({\"a\": 1})C[x]" },
    { QUIET_TOOLS, "<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>", "0:f({})" },
    { QUIET_TOOLS,
      "<tool_call>{\"name\":\"other\",\"arguments\":{\"s\":\"</tool_call>\"}}"
      "</tool_call>",
      "0:other({\"s\":\"</tool_call>\"})" },
    /* in another order, in a string, without arguments */
    { QUIET_TOOLS, "<tool_call>{\"arguments\": {\"a\" : [1]}, \"name\": \"f\"}</tool_call>",
      "0:f({\"a\" : [1]})" },
    { QUIET_TOOLS, "<tool_call>{\"name\":\"f\",\"arguments\":\"{\\\"a\\\":1}\"}</tool_call>",
      "0:f({\"a\":1})" },
    { QUIET_TOOLS, "<tool_call>\n{\"name\": \"f\"}\n</tool_call>", "0:f({})" },
    { QUIET_TOOLS, "<tool_call>{\"name\":\"\\u0066\",\"arguments\":{}}</tool_call>",
      "0:f({})" },
    { QUIET_TOOLS, "<tool_call>{\"name\":\"f\",\"arguments\":null}", "0:f({})" },
    /* broken or cut off */
    { QUIET_TOOLS, "<tool_call>f(1)</tool_call> ok", "C[<tool_call>f(1)</tool_call> ok]" },
    { QUIET_TOOLS, "<tool_call>{oops}</tool_call> ok", "C[<tool_call>{oops}</tool_call> ok]" },
    { QUIET_TOOLS, "<tool_call>{oops}", "C[<tool_call>{oops}]" },
    { QUIET_TOOLS, "<tool_call>{\"name\": 1}</tool_call>",
      "C[<tool_call>{\"name\": 1}</tool_call>]" },
    { QUIET_TOOLS, "<tool_call>[]</tool_call>" CALL,
      "C[<tool_call>[]</tool_call>]0:f({\"a\": 1})" },
    { QUIET_TOOLS, "<tool_call>\n{\"name\": \"get_w", "C[<tool_call>\n{\"name\": \"get_w]" },
    { QUIET_TOOLS, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"x",
      "0:f({\"a\": \"x)" },
    { QUIET_TOOLS, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}",
      "0:f({\"a\": 1})" },
    { QUIET_TOOLS, "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":1}}</tool_c",
      "0:f({\"a\":1})" },
    { QUIET_TOOLS, "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":1}} junk</tool_call>",
      "0:f({\"a\":1})C[junk</tool_call>]" },
    { QUIET_TOOLS, "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":</tool_call>x",
      "0:f({\"a\":)C[x]" },
    { ONE_CALL, "a" CALL "\n" PARIS "b", "C[a]0:f({\"a\": 1})C[b]" },
    /* GLM */
    { GLM, "hmm</think>Hello", "R[hmm]C[Hello]" },
    { GLM, "hmm" GLM_CALL(PAIR("city", "Paris") PAIR("days", "2")),
      "R[hmm]0:get_weather({\"city\": \"Paris\", \"days\": 2})" },
    { GLM_QUIET, GLM_CALL(""), "0:get_weather({})" },
    { GLM_QUIET,
      "Yes.\n<tool_call> get_weather\n<arg_key>city</arg_key>\n<arg_value>12</arg_value>\n"
      "</tool_call>\n" GLM_CALL(PAIR("q", "[1, {\"a\": null}]")),
      "C[Yes.]0:get_weather({\"city\": \"12\"})1:get_weather({\"q\": [1, {\"a\": null}]})" },
    { GLM_QUIET, GLM_CALL(PAIR("text", "a \"b\"\n<c> \xC3\xA9") PAIR("n", "1.50")),
      "0:get_weather({\"text\": \"a \\\"b\\\"\\n<c> \xC3\xA9\", \"n\": 1.50})" },
    /* a marker in a string of JSON ends no value, but everywhere else the first one does */
    { GLM_QUIET, GLM_CALL(PAIR("q", "[\"\\\"</arg_value>\", {\"<b>\": 1}]") PAIR("n", "2")),
      "0:get_weather({\"q\": [\"\\\"</arg_value>\", {\"<b>\": 1}], \"n\": 2})" },
    { GLM_QUIET, GLM_CALL(PAIR("city", "[\"a") PAIR("q", " \"</arg_value>\" ")),
      "0:get_weather({\"city\": \"[\\\"a\", \"q\":  \"</arg_value>\" })" },
    { GLM_QUIET, GLM_CALL(PAIR("q", "\"a")) "b", "0:get_weather({\"q\": \"\\\"a\"})C[b]" },
    { GLM_QUIET, GLM_CALL(PAIR("q", "[\"a") PAIR("n", "b\"")),
      "0:get_weather({\"q\": \"[\\\"a\", \"n\": \"b\\\"\"})" },
    { GLM_QUIET, GLM_CALL(PAIR("q", "5\" <b>") PAIR("n", "{<b>: \"")),
      "0:get_weather({\"q\": \"5\\\" <b>\", \"n\": \"{<b>: \\\"\"})" },
    { GLM_QUIET, "<tool_call>f" PAIR("q", "[\"a") "<arg_key>",
      "0:f({\"q\": \"[\\\"a\"})C[<arg_key>]" },
    { GLM_QUIET, "<tool_call></tool_call>", "C[<tool_call></tool_call>]" },
    { GLM_QUIET, "<tool_call>is a marker", "C[<tool_call>is a marker]" },
    { GLM_QUIET, "<tool_call>f<b>", "C[<tool_call>f<b>]" },
    { GLM_QUIET, "<tool_call>f", "C[<tool_call>f]" },
    { GLM_QUIET, "<tool_call>f" PAIR("a", "1") "<arg_key>b</arg_key><arg_va",
      "0:f({\"a\": 1})C[<arg_key>b</arg_key><arg_va]" },
    { GLM_QUIET, "<tool_call>f" PAIR("a", "1") " what?</tool_call>",
      "0:f({\"a\": 1})C[what?</tool_call>]" },
    /* Llama */
    { LLAMA, "Hello {\"name\": 1}", "C[Hello {\"name\": 1}]" },
    { LLAMA, "\n{\"name\": \"f\", \"parameters\": {\"a\": \"}\"}}\n", "0:f({\"a\": \"}\"})" },
    { LLAMA, "{\"name\": \"f\", \"parameters\": {}} and more", "0:f({})C[and more]" },
    { LLAMA, "{\"name\": \"f\", \"parameters\": {}}</to", "0:f({})C[</to]" },
    { LLAMA, "{\"answer\": 42}", "C[{\"answer\": 42}]" },
    { LLAMA, " {\"nam", "C[ {\"nam]" },
    { LLAMA, " \n ", "C[ \n ]" },
};

static void write_delta(struct strbuf *out, const struct chat_delta *d, int *open,
                        uint32_t *call)
{
    static const char *const begin[] = { "R[", "C[", "", "" };
    static const char *const end[] = { "]", "]", ")", ")" };
    bool goes_on = *open == (int)d->part && d->part != CHAT_CALL;

    ck_assert_uint_gt(d->n, 0);
    if (d->part == CHAT_ARGUMENTS) {
        ck_assert_int_ge(*open, CHAT_CALL);
        ck_assert_uint_eq(d->call, *call);
        goes_on = true;
    }
    if (!goes_on) {
        strbuf_puts(out, *open >= 0 ? end[*open] : "");
        strbuf_puts(out, begin[d->part]);
    }
    *call = d->call;
    if (d->part == CHAT_CALL)
        strbuf_printf(out, "%u:%.*s(", d->call, (int)d->n, d->s);
    else
        strbuf_add(out, d->s, d->n);
    *open = (int)d->part;
}

/* The text comes in steps of `step` bytes, in memory of its exact size. */
static void read_in_steps(struct strbuf *out, const struct chat_output_config *cfg,
                          const char *text, size_t step)
{
    static const char *const end[] = { "]", "]", ")", ")" };
    size_t n = strlen(text), at = 0;
    struct chat_output o;
    struct chat_delta d;
    uint32_t call = 0;
    int open = -1;

    strbuf_clear(out);
    strbuf_puts(out, "");
    chat_output_init(&o, cfg);
    do {
        at = at + step < n ? at + step : n;
        while (chat_output_next(&o, text, at, at == n, &d))
            write_delta(out, &d, &open, &call);
    } while (at < n);
    ck_assert(!chat_output_next(&o, text, n, true, &d));
    strbuf_puts(out, open >= 0 ? end[open] : "");
    chat_output_fini(&o);
}

START_TEST(parts_do_not_depend_on_the_steps)
{
    struct strbuf got = { 0 };

    for (size_t step = strlen(rows[_i].text); step > 0; step--) {
        read_in_steps(&got, &configs[rows[_i].kind], rows[_i].text, step);
        if (strcmp(got.data, rows[_i].want) != 0)
            ck_abort_msg("%s\nin steps of %zu\n--- got\n%s\n--- want\n%s", rows[_i].text, step,
                         got.data, rows[_i].want);
    }
    strbuf_fini(&got);
}
END_TEST

/* Text goes out at once but for what may be a marker. */
START_TEST(only_what_may_be_a_marker_waits)
{
    struct chat_output o;
    struct chat_delta d;
    const char *text = "abc\n<tool_calls";

    chat_output_init(&o, &configs[QUIET_TOOLS]);
    ck_assert(chat_output_next(&o, text, 3, false, &d));
    ck_assert_uint_eq(d.n, 3);
    for (size_t n = 4; n < 15; n++)
        ck_assert(!chat_output_next(&o, text, n, false, &d));
    chat_output_fini(&o);

    chat_output_init(&o, &configs[QUIET_TOOLS]);
    text = "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"b c";
    size_t n = strlen(text);
    ck_assert(chat_output_next(&o, text, n, false, &d));
    ck_assert_int_eq(d.part, CHAT_CALL);
    ck_assert(chat_output_next(&o, text, n, false, &d));
    ck_assert_int_eq(d.part, CHAT_ARGUMENTS);
    ck_assert_int_eq(memcmp(d.s, "{\"a\": \"b c", d.n), 0);
    chat_output_fini(&o);

    /* A quote in a text that is no JSON hides no end. */
    chat_output_init(&o, &configs[GLM_QUIET]);
    text = "<tool_call>f" PAIR("a", "5\"");
    n = strlen(text);
    ck_assert(chat_output_next(&o, text, n, false, &d));
    ck_assert(chat_output_next(&o, text, n, false, &d));
    ck_assert_int_eq(d.part, CHAT_ARGUMENTS);
    ck_assert_int_eq(memcmp(d.s, "{\"a\": \"5\\\"\"", d.n), 0);
    chat_output_fini(&o);

    /* Line ends may wait, but not for ever. */
    char lines[300];
    size_t given = 0;
    memset(lines, '\n', sizeof lines);
    chat_output_init(&o, &configs[QUIET_TOOLS]);
    for (n = 1; n <= sizeof lines; n++)
        while (chat_output_next(&o, lines, n, false, &d))
            given += d.n;
    ck_assert_uint_ge(given, sizeof lines - 100);
    chat_output_fini(&o);
}
END_TEST

/* As JSON where all arguments can be sent back, with the object that is put around it. */
START_TEST(values_nest_so_deep)
{
    struct strbuf text = { 0 }, got = { 0 };
    struct json_scan scan;

    for (int deep = JSON_MAX_DEPTH - 2; deep <= JSON_MAX_DEPTH + 1; deep++) {
        strbuf_clear(&text);
        strbuf_puts(&text, "<tool_call>f<arg_key>a</arg_key><arg_value>");
        for (int i = 0; i < deep; i++)
            strbuf_puts(&text, "[");
        for (int i = 0; i < deep; i++)
            strbuf_puts(&text, "]");
        strbuf_puts(&text, "</arg_value></tool_call>");
        read_in_steps(&got, &configs[GLM_QUIET], text.data, text.n);
        const char *start = strstr(got.data, "{\"a\": ");
        ck_assert_ptr_nonnull(start);
        ck_assert_int_eq(start[6], deep < JSON_MAX_DEPTH ? '[' : '"');
        ck_assert_int_eq(json_scan(&scan, start, strlen(start) - 1, 1000, NULL), ST_OK);
    }
    strbuf_fini(&text);
    strbuf_fini(&got);
}
END_TEST

START_TEST(thoughts_have_an_end)
{
    struct chat_output o;
    struct chat_delta d;
    const char *text = "<think>ab</think>\n\ncd";

    chat_output_init(&o, &configs[THINK]);
    while (chat_output_next(&o, text, 9, false, &d))
        continue;
    ck_assert(o.thought);
    ck_assert_uint_eq(o.thoughts_end, 9);
    while (chat_output_next(&o, text, strlen(text), true, &d))
        continue;
    ck_assert_uint_eq(o.thoughts_end, 17);
    chat_output_fini(&o);
}
END_TEST

/* Random pieces of syntax: nothing crashes, nothing but separators is lost, and the steps
 * never matter. */
START_TEST(random_outputs)
{
    static const char *const pieces[] = { "<think>",
                                          "</think>",
                                          "<tool_call>",
                                          "</tool_call>",
                                          "{\"name\": \"f\", ",
                                          "\"arguments\"",
                                          ": ",
                                          "{",
                                          "}",
                                          "\"",
                                          "\\",
                                          "\n",
                                          " ",
                                          "a",
                                          "<",
                                          "<arg_key>",
                                          "</arg_key>",
                                          "<arg_value>",
                                          "<tool_call>f<arg_key>a</arg_key><arg_value>[\"",
                                          "</arg_value>",
                                          "[",
                                          "]",
                                          "f",
                                          "{\"name\": \"f\", \"arguments\": {\"a\": 1}}",
                                          "\xC3\xA9",
                                          "{\"name\": \"f\", \"parameters\": {" };
    uint64_t state = 1234;
    struct strbuf text = { 0 }, whole = { 0 }, steps = { 0 };

    for (int round = 0; round < 20000; round++) {
        strbuf_clear(&text);
        strbuf_puts(&text, "");
        for (int k = 0; k < 12; k++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            strbuf_puts(&text, pieces[(state >> 33) % (sizeof pieces / sizeof pieces[0])]);
        }
        const struct chat_output_config *cfg = &configs[(state >> 20) % N_KINDS];
        read_in_steps(&whole, cfg, text.data, text.n);
        read_in_steps(&steps, cfg, text.data, 1 + (state >> 40) % 5);
        if (strcmp(whole.data, steps.data) != 0)
            ck_abort_msg("format %d\n%s\n--- whole\n%s\n--- in steps\n%s", cfg->format,
                         text.data, whole.data, steps.data);
    }
    strbuf_fini(&text);
    strbuf_fini(&whole);
    strbuf_fini(&steps);
}
END_TEST

TCase *chat_output_case(void);
TCase *chat_output_case(void)
{
    TCase *tc = tcase_create("chat_output");

    tcase_add_loop_test(tc, parts_do_not_depend_on_the_steps, 0, sizeof rows / sizeof rows[0]);
    tcase_add_test(tc, only_what_may_be_a_marker_waits);
    tcase_add_test(tc, values_nest_so_deep);
    tcase_add_test(tc, thoughts_have_an_end);
    tcase_add_test(tc, random_outputs);
    return tc;
}
