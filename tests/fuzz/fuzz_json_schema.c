/* JSON schemas.  What the scan of bodies lets through is refused with a sentence, or gives a
 * grammar whose texts are JSON as far as they go: a walk that the input steers ends in a valid
 * one.  The same of a call with such arguments that are written as pairs, once it has been read. */

#include "engine/base/invariant.h"
#include "engine/base/status.h"
#include "engine/base/strbuf.h"
#include "engine/grammar/grammar.h"
#include "server/chat_output.h"
#include "server/json_scan.h"

#include <cjson/cJSON.h>
#include <stdint.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_VALUES = 500, MAX_STEPS = 400, STEERED = 60 };

static const char near_json[] = "}]\",:0ntfab.-", near_quote[] = "\"}],:0ntfab.-";

/* Of the bytes that fit, first the one that is wished for, then those that bring an end near. */
static bool step(struct grammar_matcher *m, struct strbuf *text, int wish, const char *near)
{
    char byte = (char)wish;

    bool went = wish >= 0 && grammar_matcher_advance(m, &byte, 1);
    for (size_t i = 0; near[i] && !went; i++) {
        byte = near[i];
        went = grammar_matcher_advance(m, &byte, 1);
    }
    for (int b = 0; b < 256 && !went; b++) {
        byte = (char)b;
        went = grammar_matcher_advance(m, &byte, 1);
    }
    if (went)
        strbuf_add(text, &byte, 1);
    return went;
}

static void walk(struct grammar *g, const uint8_t *data, size_t size)
{
    struct grammar_matcher m;
    struct strbuf text = { 0 };
    struct json_scan scan;
    struct error err;

    grammar_matcher_init(&m, g);
    for (size_t i = 0; i < MAX_STEPS && !grammar_matcher_is_complete(&m); i++) {
        bool over = i >= STEERED && grammar_matcher_may_end(&m);
        if (over || !step(&m, &text, i < STEERED ? data[(7 * i) % size] : -1, near_json))
            break;
    }
    strbuf_add(&text, "", 1);
    if (grammar_matcher_may_end(&m))
        ASSERT(json_scan(&scan, text.data, text.n - 1, 10000, &err) == ST_OK);
    grammar_matcher_fini(&m);
    strbuf_fini(&text);
}

/* ---- calls */

/* What goes on with the marker that ends a value, as far as the text has it. */
static int towards_end(const struct strbuf *text)
{
    static const char end[] = CHAT_ARG_VALUE_END;
    size_t k = sizeof end - 2;

    while (k > 0 && (text->n < k || memcmp(text->data + text->n - k, end, k) != 0))
        k--;
    return end[k];
}

/* The arguments are JSON, and there is nothing but the call. */
static void read_call(const struct chat_tool *tool, const struct strbuf *text)
{
    const struct chat_output_config cfg = { .format = CHAT_GLM47, .tools = tool, .n_tools = 1 };
    struct strbuf arguments = { 0 };
    struct chat_output o;
    struct chat_delta d;

    chat_output_init(&o, &cfg);
    while (chat_output_next(&o, text->data, text->n, true, &d)) {
        ASSERT(d.part == CHAT_CALL || d.part == CHAT_ARGUMENTS);
        if (d.part == CHAT_ARGUMENTS)
            strbuf_add(&arguments, d.s, d.n);
    }
    ASSERT(o.n_calls == 1 && o.tool == tool);
    cJSON *root = cJSON_ParseWithLength(arguments.data, arguments.n);
    ASSERT(cJSON_IsObject(root));
    cJSON_Delete(root);
    chat_output_fini(&o);
    strbuf_fini(&arguments);
}

/* Ends are looked for in turn: of a text, of a string, of what is around it. */
static void walk_call(struct grammar *g, const struct chat_tool *tool, const uint8_t *data,
                      size_t size)
{
    struct grammar_matcher m;
    struct strbuf text = { 0 };

    grammar_matcher_init(&m, g);
    for (size_t i = 0; i < MAX_STEPS && !grammar_matcher_is_complete(&m); i++) {
        int wish = i < STEERED        ? data[(7 * i) % size]
                   : i / 16 % 3 == 0 ? towards_end(&text)
                                      : -1;
        ASSERT(step(&m, &text, wish, i / 16 % 3 == 1 ? near_quote : near_json));
    }
    if (grammar_matcher_is_complete(&m))
        read_call(tool, &text);
    grammar_matcher_fini(&m);
    strbuf_fini(&text);
}

static void try_call(const cJSON *schema, const uint8_t *data, size_t size)
{
    const struct chat_call_syntax *syntax = chat_format_facts(CHAT_GLM47)->calls;
    struct grammar_call call = { .head = CHAT_TOOL_CALL "f", .tail = syntax->tail,
                                 .schema = schema };
    const struct grammar_turn turn = { .calls = &call, .n_calls = 1, .pairs = syntax->pairs };
    const cJSON *properties = cJSON_GetObjectItemCaseSensitive(schema, "properties");
    const char *strings[MAX_VALUES];
    struct chat_tool tool = { .name = "f", .strings = strings };
    struct grammar *g = NULL;
    struct error err = { .text = "" };

    for (const cJSON *v = properties ? properties->child : NULL; v; v = v->next)
        if (v->string && grammar_schema_is_string(schema, v))
            strings[tool.n_strings++] = v->string;
    if (grammar_compile_calls(&g, &turn, &err) == ST_OK)
        walk_call(g, &tool, data, size);
    else
        ASSERT(!g && err.code == ST_INVALID && strlen(err.text) > 0);
    grammar_release(g);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct grammar *g = NULL;
    struct error err = { .text = "" };
    struct json_scan scan;

    if (json_scan(&scan, (const char *)data, size, MAX_VALUES, NULL) != ST_OK)
        return 0;
    cJSON *schema = cJSON_ParseWithLength((const char *)data, size);
    ASSERT(schema);
    if (grammar_compile_schema(&g, schema, NULL, &err) == ST_OK)
        walk(g, data, size);
    else
        ASSERT(!g && err.code == ST_INVALID && strlen(err.text) > 0);
    grammar_release(g);
    try_call(schema, data, size);
    cJSON_Delete(schema);
    return 0;
}
