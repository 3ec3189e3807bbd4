/* engine/grammar/json_schema.h: tables of texts that are valid or not and of schemas that are
 * refused; random texts of random schemas, judged by a validator that knows no grammar.  The same
 * of calls whose arguments are pairs, which the parser of outputs reads. */

#include "engine/grammar/json_schema.h"

#include "engine/base/strbuf.h"
#include "engine/grammar/automaton.h"
#include "engine/grammar/grammar.h"
#include "engine/grammar/token_trie.h"
#include "engine/model/tokenizer.h"
#include "server/chat_output.h"
#include "server/json_scan.h"
#include "tests/support/byte_tokenizer.h"
#include "tests/support/random_data.h"

#include <cjson/cJSON.h>
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static enum status compile(struct grammar **out, const char *schema, struct error *err)
{
    cJSON *tree = cJSON_Parse(schema);

    ck_assert_msg(tree != NULL, "not JSON: %s", schema);
    enum status st = grammar_compile_schema(out, tree, NULL, err);
    cJSON_Delete(tree);
    return st;
}

static bool allows(struct grammar *g, const char *text)
{
    struct grammar_matcher m;

    grammar_matcher_init(&m, g);
    bool whole = grammar_matcher_advance(&m, text, strlen(text)) && grammar_matcher_may_end(&m);
    grammar_matcher_fini(&m);
    return whole;
}

/* ---- tables */

#define LIST "{\"$defs\":{\"n\":{\"type\":\"object\",\"properties\":{\"v\":{\"type\":" \
             "\"integer\"},\"next\":{\"anyOf\":[{\"$ref\":\"#/$defs/n\"},{\"type\":\"null\"}]}}," \
             "\"required\":[\"v\",\"next\"]}},\"$ref\":\"#/$defs/n\"}"
#define PAIR "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"boolean\"}," \
             "\"b\":{\"const\":1}},\"required\":[\"b\"],\"additionalProperties\":false," \
             "\"title\":\"x\"}"

static const struct { const char *schema, *text; bool valid; } texts[] = {
    { "{}", "[1,{\"a\":null},\"x\",-1.5e3,true]", true }, { "true", "0", true },
    { "{}", " 1", false }, { "{}", "1 ", false }, { "{}", "01", false }, { "{}", "[1,]", false },
    { "{}", "[1,  2]", false }, { "{}", "[\n    1,\n    2\n]", true }, { "{}", "[1\n\n]", false },
    { "{}", "{\"a\": 1, \"b\": [ ]}", true }, { "{}", "{\"a\" : 1}", false },
    { "{\"type\":\"string\"}", "\"a\\n\\u00e9\\ud83d\\ude00 \xC3\xA9\"", true },
    { "{\"type\":\"string\"}", "\"\\ud83d\"", false },
    { "{\"type\":\"string\"}", "\"\\ude00\"", false },
    { "{\"type\":\"string\"}", "\"\\u0000\"", false },
    { "{\"type\":\"string\"}", "\"\\u0001\\u0010\\u0100\\u1000\"", true },
    { "{\"type\":\"string\"}", "\"\n\"", false }, { "{\"type\":\"string\"}", "\"\xC3\"", false },
    { "{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}", "\"\xC3\xA9\\ud83d\\ude00\"", true },
    { "{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}", "\"a\"", false },
    { "{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}", "\"abcd\"", false },
    { "{\"pattern\":\"b+\"}", "\"abba\"", true }, { "{\"pattern\":\"b+\"}", "\"aa\"", false },
    { "{\"pattern\":\"^b+$\"}", "\"bb\"", true }, { "{\"pattern\":\"^b+$\"}", "\"abb\"", false },
    { "{\"pattern\":\"^[^a]$\"}", "\"\\\"\"", true },
    { "{\"pattern\":\"^[^a]$\"}", "\"\\n\"", true },
    { "{\"pattern\":\"^[^a]$\"}", "\"\\u0000\"", false },
    { "{\"pattern\":\"^.$\"}", "\"\\n\"", false },
    { "{\"pattern\":\"^\\\\\\\\$\"}", "\"\\\\\"", true },
    { "{\"format\":\"date\"}", "\"2024-02-28\"", true },
    { "{\"format\":\"date\"}", "\"2024-04-31\"", false },
    { "{\"format\":\"date-time\"}", "\"2024-12-31T23:59:59.5+01:00\"", true },
    { "{\"format\":\"uuid\"}", "\"123e4567-e89b-12d3-a456-426614174000\"", true },
    { "{\"format\":\"ipv4\"}", "\"192.168.0.255\"", true },
    { "{\"format\":\"ipv4\"}", "\"192.168.0.256\"", false },
    { "{\"format\":\"email\"}", "\"a.b@c-d.org\"", true },
    { "{\"type\":\"integer\"}", "-120", true }, { "{\"type\":\"integer\"}", "1.0", false },
    { "{\"type\":\"integer\"}", "-0", false }, { "{\"type\":\"number\"}", "-0.5e+10", true },
    { "{\"type\":\"integer\",\"minimum\":-12,\"maximum\":345}", "-12", true },
    { "{\"type\":\"integer\",\"minimum\":-12,\"maximum\":345}", "-13", false },
    { "{\"type\":\"integer\",\"minimum\":-12,\"maximum\":345}", "346", false },
    { "{\"type\":\"integer\",\"exclusiveMinimum\":2.5,\"exclusiveMaximum\":4}", "3", true },
    { "{\"type\":\"integer\",\"exclusiveMinimum\":2.5,\"exclusiveMaximum\":4}", "4", false },
    { "{\"type\":\"number\",\"exclusiveMinimum\":0}", "0.001", true },
    { "{\"type\":\"number\",\"exclusiveMinimum\":0}", "0.0", false },
    { "{\"type\":\"number\",\"minimum\":-1,\"maximum\":1}", "-1.0", true },
    { "{\"type\":\"number\",\"minimum\":-1,\"maximum\":1}", "-1.1", false },
    { "{\"type\":\"number\",\"minimum\":-1,\"maximum\":1}", "-0.9", true },
    { "{\"type\":[\"string\",\"null\"]}", "null", true },
    { "{\"type\":[\"string\",\"null\"]}", "1", false },
    { "{\"enum\":[\"a\",1,0.1,null,true]}", "0.1", true },
    { "{\"enum\":[\"a\",1]}", "\"b\"", false },
    { "{\"type\":\"string\",\"enum\":[\"a\",1]}", "1", false },
    { "{\"const\":\"\\\"\"}", "\"\\\"\"", true },
    { "{\"oneOf\":[{\"type\":\"null\"},{\"type\":\"boolean\"}]}", "false", true },
    { "{\"allOf\":[{\"type\":\"null\"}]}", "null", true },
    { "{\"type\":\"array\",\"items\":{\"type\":\"null\"},\"minItems\":1,\"maxItems\":2}",
      "[]", false },
    { "{\"type\":\"array\",\"items\":{\"type\":\"null\"},\"minItems\":1,\"maxItems\":2}",
      "[null,null]",
      true },
    { "{\"type\":\"array\",\"items\":{\"type\":\"null\"},\"maxItems\":2}",
      "[null,null,null]", false },
    { "{\"type\":\"array\",\"minItems\":2}", "[1]", false },
    { "{\"type\":\"array\",\"minItems\":2}", "[1,2,3]", true },
    { "{\"type\":\"array\",\"items\":false}", "[]", true },
    { PAIR, "{\"a\":true,\"b\":1}", true }, { PAIR, "{\"b\":1}", true },
    { PAIR, "{\"a\":true}", false },
    { PAIR, "{\"b\":1,\"a\":true}", false }, { PAIR, "{,\"b\":1}", false },
    { "{\"type\":\"object\",\"additionalProperties\":{\"type\":\"integer\"}}",
      "{\"x\":1,\"y\":2}", true },
    { "{\"type\":\"object\",\"additionalProperties\":{\"type\":\"integer\"}}",
      "{\"x\":\"1\"}", false },
    { "{\"type\":\"object\",\"additionalProperties\":false}", "{}", true },
    { "{\"properties\":{\"a~/b\":{\"type\":\"null\"},\"c\":{\"$ref\":\"#/properties/a~0~1b\"}}}",
      "{\"a~/b\":null,\"c\":null}", true },
    { LIST, "{\"v\":1,\"next\":{\"v\":2,\"next\":null}}", true }, { LIST, "{\"v\":1}", false },
    { "{\"anyOf\":[{\"$ref\":\"#\"},{\"type\":\"null\"}]}", "null", true },
};

START_TEST(what_is_valid)
{
    struct grammar *g = NULL;
    struct error err = { .text = "" };

    ck_assert_msg(compile(&g, texts[_i].schema, &err) == ST_OK, "%s %s", texts[_i].schema,
                  err.text);
    ck_assert_msg(allows(g, texts[_i].text) == texts[_i].valid, "%s: %s", texts[_i].schema,
                  texts[_i].text);
    grammar_release(g);
}
END_TEST

static const struct { const char *schema, *sentence; } refused[] = {
    { "{\"patternProperties\":{}}", "'patternProperties' that is not supported" },
    { "{\"properties\":{\"x\":{\"not\":{}}}}", "'not' in 'x'" },
    { "{\"uniqueItems\":true}", "uniqueItems" },
    { "{\"multipleOf\":2}", "multipleOf" }, { "{\"prefixItems\":[]}", "prefixItems" },
    { "{\"type\":\"strnig\"}", "is none of" },
    { "{\"type\":\"integer\",\"minLength\":1}", "its type" },
    { "{\"type\":\"string\",\"type\":\"null\"}", "there twice" },
    { "{\"anyOf\":[{}],\"type\":\"string\"}", "'anyOf' together with 'type'" },
    { "{\"anyOf\":[]}", "list of schemas" }, { "{\"allOf\":[{},{}]}", "more than one schema" },
    { "{\"$ref\":\"#/$defs/x\"}", "points to no schema" },
    { "{\"$ref\":\"http://x\"}", "into the schema" },
    { "{\"$ref\":\"#\"}", "no text" }, { "false", "no text" }, { "{\"enum\":[]}", "no text" },
    { "{\"type\":\"integer\",\"minimum\":2,\"maximum\":1}", "no text" },
    { "{\"type\":\"number\",\"minimum\":0.5}", "not an integer" },
    { "{\"type\":\"integer\",\"minimum\":1e300}", "2^53" }, { "{\"enum\":[1e300]}", "2^53" },
    { "{\"enum\":[[1]]}", "list or an object" }, { "{\"minLength\":-1}", "whole number" },
    { "{\"minLength\":1.5}", "whole number" }, { "{\"minItems\":5000}", "4096" },
    { "{\"pattern\":\"(?=a)\"}", "'pattern' that has a look-ahead" },
    { "{\"pattern\":1}", "string" },
    { "{\"pattern\":\"a\",\"maxLength\":3}", "'maxLength' together with 'pattern'" },
    { "{\"format\":\"hostname\"}", "is none of date" }, { "{\"required\":[\"x\"]}", "names what" },
    { "{\"properties\":{\"x\":1}}", "no schema" }, { "{\"properties\":[]}", "not an object" },
    { "{\"items\":[{}]}", "not a schema" }, { "[]", "no schema" },
    { "{\"pattern\":\"(a|b)*a(a|b){18}\"}", "too complex" },
};

START_TEST(what_is_refused)
{
    struct grammar *g = NULL;
    struct error err = { .text = "" };

    ck_assert_int_eq(compile(&g, refused[_i].schema, &err), ST_INVALID);
    ck_assert_msg(strstr(err.text, refused[_i].sentence), "%s: %s", refused[_i].schema, err.text);
}
END_TEST

/* As deep as documented, and a bracket more is no token any more. */
START_TEST(depth_has_an_end)
{
    struct grammar_matcher m;
    struct grammar *g = NULL;
    struct error err;
    int deep = 0;

    ck_assert_int_eq(compile(&g, "{}", &err), ST_OK);
    grammar_matcher_init(&m, g);
    while (grammar_matcher_advance(&m, "[", 1))
        ck_assert_int_lt(++deep, 1000);
    ck_assert_int_ge(deep, 64);
    ck_assert(grammar_matcher_advance(&m, "1", 1));
    while (deep-- > 0)
        ck_assert(grammar_matcher_advance(&m, "]", 1));
    ck_assert(grammar_matcher_is_complete(&m));
    grammar_matcher_fini(&m);
    grammar_release(g);
}
END_TEST

/* ---- random schemas */

static void random_schema(struct test_random *r, struct strbuf *out, int depth);

static void random_integer(struct test_random *r, struct strbuf *out)
{
    int lo = random_below(r, 400) - 200;
    static const char *const types[] = { "integer", "number" };

    strbuf_printf(out, "{\"type\":\"%s\",\"%s\":%d,\"%s\":%d}", types[random_below(r, 2)],
                  random_below(r, 2) ? "minimum" : "exclusiveMinimum", lo,
                  random_below(r, 2) ? "maximum" : "exclusiveMaximum",
                  lo + 2 + random_below(r, 300));
}

static void random_object(struct test_random *r, struct strbuf *out, int depth)
{
    int n = 1 + random_below(r, 3), required = random_below(r, 8);

    strbuf_puts(out, "{\"type\":\"object\",\"properties\":{");
    for (int i = 0; i < n; i++) {
        strbuf_printf(out, "%s\"%c\\\"\":", i ? "," : "", 'p' + i);
        random_schema(r, out, depth - 1);
    }
    strbuf_puts(out, "},\"required\":[");
    for (int i = 0, first = 1; i < n; i++)
        if (required >> i & 1) {
            strbuf_printf(out, "%s\"%c\\\"\"", first ? "" : ",", 'p' + i);
            first = 0;
        }
    strbuf_puts(out, "]}");
}

static void random_schema(struct test_random *r, struct strbuf *out, int depth)
{
    int least = random_below(r, 3);

    switch (random_below(r, depth > 0 ? 9 : 5)) {
    case 0: strbuf_puts(out, "{\"type\":[\"null\",\"boolean\"]}"); break;
    case 1: random_integer(r, out); break;
    case 2: strbuf_printf(out, "{\"type\":\"string\",\"minLength\":%d,\"maxLength\":%d}", least,
                          least + random_below(r, 4)); break;
    case 3: strbuf_puts(out, "{\"enum\":[\"a\",-0.25,7,null,\"b\\n\"]}"); break;
    case 4: strbuf_puts(out, "{\"$ref\":\"#/$defs/tree\"}"); break;
    case 5: random_object(r, out, depth); break;
    case 6:
        strbuf_printf(out, "{\"type\":\"array\",\"minItems\":%d,\"maxItems\":%d,\"items\":", least,
                      least + random_below(r, 3));
        random_schema(r, out, depth - 1);
        strbuf_puts(out, "}");
        break;
    case 7:
        strbuf_puts(out, "{\"anyOf\":[");
        random_schema(r, out, depth - 1);
        strbuf_puts(out, ",");
        random_schema(r, out, depth - 1);
        strbuf_puts(out, "]}");
        break;
    default:
        strbuf_puts(out, "{\"type\":\"object\",\"additionalProperties\":");
        random_schema(r, out, depth - 1);
        strbuf_puts(out, "}");
        break;
    }
}

/* ---- the judge */

static const cJSON *member(const cJSON *schema, const char *name)
{
    return cJSON_GetObjectItemCaseSensitive(schema, name);
}

static double number_of(const cJSON *schema, const char *name, double otherwise)
{
    return member(schema, name) ? member(schema, name)->valuedouble : otherwise;
}

static bool is_of_type(const cJSON *v, const char *type)
{
    return (strcmp(type, "string") == 0 && cJSON_IsString(v)) ||
           (strcmp(type, "integer") == 0 && cJSON_IsNumber(v) &&
            floor(v->valuedouble) == v->valuedouble) ||
           (strcmp(type, "number") == 0 && cJSON_IsNumber(v)) ||
           (strcmp(type, "boolean") == 0 && cJSON_IsBool(v)) ||
           (strcmp(type, "null") == 0 && cJSON_IsNull(v)) ||
           (strcmp(type, "object") == 0 && cJSON_IsObject(v)) ||
           (strcmp(type, "array") == 0 && cJSON_IsArray(v));
}

static bool has_type(const cJSON *schema, const cJSON *v)
{
    const cJSON *type = member(schema, "type");

    if (!cJSON_IsArray(type))
        return !type || is_of_type(v, type->valuestring);
    for (const cJSON *t = type->child; t; t = t->next)
        if (is_of_type(v, t->valuestring))
            return true;
    return false;
}

static int characters(const char *s)
{
    int n = 0;

    for (; *s; s++)
        n += (*s & 0xC0) != 0x80;
    return n;
}

static bool is_valid(const cJSON *root, const cJSON *schema, const cJSON *v);

static bool is_among(const cJSON *list, const cJSON *v)
{
    for (const cJSON *e = list->child; e; e = e->next)
        if (cJSON_Compare(e, v, true))
            return true;
    return false;
}

static bool members_are_valid(const cJSON *root, const cJSON *schema, const cJSON *v)
{
    const cJSON *properties = member(schema, "properties"), *required = member(schema, "required");

    if (!properties && !member(schema, "additionalProperties"))
        return true;
    for (const cJSON *m = v->child; m; m = m->next) {
        const cJSON *of = properties ? member(properties, m->string)
                                     : member(schema, "additionalProperties");
        if (!of || !is_valid(root, of, m))
            return false;
    }
    for (const cJSON *name = required ? required->child : NULL; name; name = name->next)
        if (!member(v, name->valuestring))
            return false;
    return true;
}

static bool is_valid(const cJSON *root, const cJSON *schema, const cJSON *v)
{
    const cJSON *any = member(schema, "anyOf");
    int n = cJSON_GetArraySize(v);

    if (member(schema, "$ref"))
        return is_valid(root, member(member(root, "$defs"),
                                     strrchr(member(schema, "$ref")->valuestring, '/') + 1), v);
    for (const cJSON *s = any ? any->child : NULL; s; s = s->next)
        if (is_valid(root, s, v))
            return true;
    if (any || !has_type(schema, v))
        return false;
    if (member(schema, "enum"))
        return is_among(member(schema, "enum"), v);
    if (cJSON_IsNumber(v))
        return v->valuedouble >= number_of(schema, "minimum", -INFINITY) &&
               v->valuedouble <= number_of(schema, "maximum", INFINITY) &&
               v->valuedouble > number_of(schema, "exclusiveMinimum", -INFINITY) &&
               v->valuedouble < number_of(schema, "exclusiveMaximum", INFINITY);
    if (cJSON_IsString(v))
        return characters(v->valuestring) >= number_of(schema, "minLength", 0) &&
               characters(v->valuestring) <= number_of(schema, "maxLength", INFINITY);
    if (cJSON_IsObject(v))
        return members_are_valid(root, schema, v);
    if (!cJSON_IsArray(v))
        return true;
    for (const cJSON *e = v->child; e; e = e->next)
        if (!is_valid(root, member(schema, "items"), e))
            return false;
    return n >= number_of(schema, "minItems", 0) && n <= number_of(schema, "maxItems", INFINITY);
}

/* ---- walks */

/* A random allowed token; with `ending` one of the bytes that bring an end near, if allowed. */
static int choose(struct test_random *r, const uint32_t *mask, uint32_t n, bool ending)
{
    static const char near[] = "}]\",:0ntfab.";

    for (int i = 0; ending && near[i]; i++) {
        int c = near[random_below(r, (int)sizeof near - 1)];
        if (mask[c / 32] >> c % 32 & 1)
            return c;
    }
    int skip = random_below(r, (int)n), id = 0;
    while (!(mask[id / 32] >> id % 32 & 1) || skip-- > 0)
        id++;
    return id;
}

/* Every prefix has somewhere to go, and where it ends it is a text. */
static bool random_text(struct test_random *r, struct grammar *g, const struct token_trie *trie,
                        struct strbuf *out)
{
    struct grammar_matcher m;
    enum { WORDS = (BYTE_IDS + 31) / 32 };
    uint32_t mask[WORDS], n;

    strbuf_clear(out);
    grammar_matcher_init(&m, g);
    while (!grammar_matcher_is_complete(&m) &&
           !(out->n > 40 && grammar_matcher_may_end(&m)) && out->n < 4000) {
        ck_assert_int_eq(grammar_matcher_mask(&m, trie, mask, WORDS, &n), ST_OK);
        ck_assert_msg(n > 0 || grammar_matcher_may_end(&m), "stuck after %.*s", (int)out->n,
                      out->data);
        if (n == 0)
            break;
        char byte = (char)choose(r, mask, n, out->n > 20 && random_below(r, 20) > 0);
        ck_assert(grammar_matcher_advance(&m, &byte, 1));
        strbuf_add(out, &byte, 1);
    }
    bool whole = grammar_matcher_may_end(&m);
    grammar_matcher_fini(&m);
    strbuf_add(out, "", 1);
    return whole;
}

START_TEST(random_texts_are_valid)
{
    struct test_random r = test_random(9000 + (uint64_t)_i);
    struct tokenizer *t = byte_tokenizer_open(false);
    struct token_trie *trie = token_trie_create(t);
    struct strbuf schema = { 0 }, text = { 0 };
    struct grammar *g = NULL;
    struct error err = { .text = "" };
    struct json_scan scan;
    int n_whole = 0;

    strbuf_puts(&schema, "{\"$defs\":{\"tree\":{\"type\":\"object\",\"properties\":{\"x\":{"
                "\"type\":\"array\",\"maxItems\":2,"
                "\"items\":{\"$ref\":\"#/$defs/tree\"}}}}},\"anyOf\":[");
    random_schema(&r, &schema, 3);
    strbuf_puts(&schema, "]}");
    cJSON *tree = cJSON_ParseWithLength(schema.data, schema.n);
    ck_assert_msg(grammar_compile_schema(&g, tree, NULL, &err) == ST_OK, "%s", err.text);
    for (int i = 0; i < 30; i++) {
        if (!random_text(&r, g, trie, &text))
            continue;
        ck_assert_msg(json_scan(&scan, text.data, text.n - 1, 10000, &err) == ST_OK, "%s: %s",
                      err.text, text.data);
        cJSON *v = cJSON_Parse(text.data);
        ck_assert_msg(v && is_valid(tree, tree, v), "%.*s\n%s", (int)schema.n, schema.data,
                      text.data);
        cJSON_Delete(v);
        n_whole++;
    }
    ck_assert_int_gt(n_whole, 10);
    cJSON_Delete(tree);
    grammar_release(g);
    strbuf_fini(&schema);
    strbuf_fini(&text);
    token_trie_destroy(trie);
    tokenizer_close(t);
}
END_TEST

/* ---- calls of a function f whose arguments are pairs */

#define END "</arg_value>"
#define P(name, value) "<arg_key>" name "</arg_key><arg_value>" value END
#define OBJECT(properties) "{\"type\":\"object\",\"properties\":{" properties "}}"
#define TRIP "{\"type\":\"object\",\"properties\":{\"city\":{\"type\":\"string\"},\"days\":{" \
             "\"type\":\"integer\",\"minimum\":1,\"maximum\":3},\"unit\":{\"enum\":[\"C\"," \
             "\"F\"]}},\"required\":[\"city\"]}"
#define SHORT OBJECT("\"s\":{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}")
#define OF_LONG OBJECT("\"s\":{\"type\":\"string\",\"minLength\":2}")
#define OF_PATTERN OBJECT("\"s\":{\"type\":\"string\",\"pattern\":\"^[^a]+$\"}")
#define OR_NULL OBJECT("\"s\":{\"anyOf\":[{\"type\":\"string\"},{\"type\":\"null\"}]}")
#define OF_REF "{\"$defs\":{\"k\":{\"type\":\"string\",\"enum\":[\"a<\",\"1\",2]}},\"type\":" \
               "\"object\",\"properties\":{\"k\":{\"allOf\":[{\"$ref\":\"#/$defs/k\"}]},\"l\":{" \
               "\"type\":\"array\",\"items\":{\"$ref\":\"#/$defs/k\"}},\"o\":{\"$ref\":\"#\"}}}"
#define OTHERS(schema) "{\"type\":\"object\",\"additionalProperties\":" schema "}"

/* schema: NULL, the function says nothing of its arguments. */
static enum status compile_call(struct grammar **out, const cJSON *schema, struct error *err)
{
    const struct chat_call_syntax *syntax = chat_format_facts(CHAT_GLM47)->calls;
    struct grammar_call call = { .head = "<tool_call>f", .tail = syntax->tail, .schema = schema };
    struct grammar_turn turn = { .calls = &call, .n_calls = 1, .pairs = syntax->pairs };

    return grammar_compile_calls(out, &turn, err);
}

static const struct { const char *schema, *pairs; bool valid; } calls[] = {
    { TRIP, P("city", "Paris"), true }, { TRIP, "", false }, { TRIP, P("days", "2"), false },
    { TRIP, P("city", "") P("days", "2") P("unit", "C"), true },
    { TRIP, P("city", "a") P("unit", "C"), true }, { TRIP, P("city", "a") P("unit", "K"), false },
    { TRIP, P("city", "a") P("unit", "\"C\""), false },
    { TRIP, P("city", "a") P("days", "4"), false }, { TRIP, P("city", "a") P("days", ""), false },
    { TRIP, P("days", "2") P("city", "a"), false }, { TRIP, P("city", "a") P("city", "a"), false },
    { TRIP, P("city", "a") "\n" P("days", "2"), false }, { TRIP, P("city", "a\n") "\n", false },
    { TRIP, P("city", " \"a\"\n<b></b>{[\xC3\xA9\t\\ "), true },
    { TRIP, P("city", "</arg_value"), true }, { TRIP, P("city", "<</arg_</arg_value<"), true },
    { TRIP, P("city", END), false }, { TRIP, P("city", "a" END "b"), false },
    { TRIP, P("city", "\xC3"), false }, { TRIP, P("city", "<tool_call></tool_call>"), true },
    { SHORT, P("s", "ab"), true }, { SHORT, P("s", "\xC3\xA9<b"), true },
    { SHORT, P("s", "a"), false }, { SHORT, P("s", "abcd"), false }, { SHORT, P("s", "<<"), true },
    { SHORT, P("s", "</a"), false },
    { OF_LONG, P("s", "a"), false }, { OF_LONG, P("s", "ab</b><"), true },
    { OF_LONG, P("s", "a<"), true }, { OF_LONG, P("s", "a<" END), false },
    { OF_PATTERN, P("s", "\n\""), true }, { OF_PATTERN, P("s", "ba"), false },
    { OF_PATTERN, P("s", "b<"), false },
    { OBJECT("\"s\":{\"type\":\"string\",\"format\":\"date\"}"), P("s", "2024-02-28"), true },
    { OBJECT("\"s\":{\"type\":\"string\",\"format\":\"date\"}"), P("s", "2024-02-30"), false },
    { OR_NULL, P("s", "\"a\""), true }, { OR_NULL, P("s", "null"), true },
    { OR_NULL, P("s", "a"), false }, { OR_NULL, P("s", "\"" END "\""), true },
    { OF_REF, P("k", "a<"), true }, { OF_REF, P("k", "1"), true }, { OF_REF, P("k", "2"), false },
    { OF_REF, P("l", "[\"1\", \"a<\"]"), true }, { OF_REF, P("l", "[1]"), false },
    { OF_REF, P("o", "{\"k\": \"1\", \"o\": {}}"), true }, { OF_REF, P("o", "{\"k\":1}"), false },
    { NULL, "", true }, { NULL, P("a", "b </b> \"{") P("a", "1"), true },
    { NULL, P("", "1"), false }, { NULL, P("a", END), false },
    { NULL, P("<b", "1"), false }, { OBJECT(""), P("a", "[1"), true },
    { OTHERS("false"), "", true }, { OTHERS("false"), P("a", "1"), false },
    { OTHERS("{\"type\":\"integer\"}"), P("a", "1"), true },
    { OTHERS("{\"type\":\"integer\"}"), P("a", "x"), false },
    { OTHERS("{\"type\":\"string\"}"), P("a", "\"1\"") P("b", "\"" END "\""), true },
    { OTHERS("{\"type\":\"string\"}"), P("a", "1"), false },
    { OBJECT("\"a\\\"<\":{}"), P("a\"<", "{\"b\": [0.5]}"), true },
    { OBJECT("\"a\":{}"), P("a", "x"), false },
};

static cJSON *parse_schema(const char *schema)
{
    cJSON *tree = schema ? cJSON_Parse(schema) : NULL;

    ck_assert_msg(tree || !schema, "not JSON: %s", schema);
    return tree;
}

START_TEST(what_a_call_may_be)
{
    struct grammar *g = NULL;
    struct error err = { .text = "" };
    struct strbuf text = { 0 };
    cJSON *schema = parse_schema(calls[_i].schema);

    ck_assert_msg(compile_call(&g, schema, &err) == ST_OK, "%s", err.text);
    strbuf_printf(&text, "<tool_call>f%s</tool_call>", calls[_i].pairs);
    ck_assert_msg(allows(g, text.data) == calls[_i].valid, "%s\n%s", calls[_i].schema, text.data);
    grammar_release(g);
    cJSON_Delete(schema);
    strbuf_fini(&text);
}
END_TEST

static const struct { const char *schema, *sentence; } refused_calls[] = {
    { OBJECT("\"k\":{\"enum\":[\"a\",\"a" END "\"]}"),
      "has a 'enum' in 'k' with a string that contains </arg_value>" },
    { OBJECT("\"k\":{\"const\":\"" END "\"}"), "has a 'const' in 'k' with a string" },
    { OBJECT("\"a</arg_key>\":{}"), "has a 'properties' with a name that contains </arg_key>" },
    { OBJECT("\"k\":{\"type\":\"string\",\"pattern\":\"a<b\"}"),
      "'pattern' in 'k' that allows no" },
    { OBJECT("\"k\":{\"not\":{}}"), "'not' in 'k' that is not supported" },
    { OBJECT("\"k\":{\"$ref\":\"#/x\"}"), "points to no schema" },
    { "{\"type\":\"object\",\"enum\":[1]}", "has a 'enum' that is not supported of arguments" },
    { "{\"oneOf\":[{\"type\":\"object\"}]}", "has a 'oneOf' that is not supported of arguments" },
    { "{\"type\":[\"object\",\"null\"]}", "has a 'type' that is not \"object\"" },
    { "{\"type\":\"object\",\"patternProperties\":{}}", "'patternProperties' that is not" },
    { "{\"type\":\"object\",\"required\":[\"x\"]}", "names what is not" },
    { "{\"type\":\"object\",\"properties\":{\"a\":false},\"required\":[\"a\"]}", "no text" },
    { "[\"a\"]", "that is no schema" }, { "3", "that is no schema" },
    { "true", "that is no schema" },
};

START_TEST(what_calls_are_refused)
{
    struct grammar *g = NULL;
    struct error err = { .text = "" };
    cJSON *schema = parse_schema(refused_calls[_i].schema);

    ck_assert_int_eq(compile_call(&g, schema, &err), ST_INVALID);
    ck_assert_msg(strstr(err.text, refused_calls[_i].sentence), "%s", err.text);
    cJSON_Delete(schema);
}
END_TEST

/* A call of f as the server reads it; its arguments, which are JSON. */
static cJSON *read_call(const cJSON *schema, const char *text)
{
    const char *strings[8];
    struct chat_tool tool = { .name = "f", .strings = strings };
    struct chat_output_config cfg = { .format = CHAT_GLM47, .tools = &tool, .n_tools = 1 };
    const cJSON *properties = member(schema, "properties");
    struct strbuf arguments = { 0 };
    struct chat_output o;
    struct chat_delta d;
    int n_names = 0;

    for (const cJSON *v = properties ? properties->child : NULL; v; v = v->next)
        if (grammar_schema_is_string(schema, v))
            strings[tool.n_strings++] = v->string;
    chat_output_init(&o, &cfg);
    while (chat_output_next(&o, text, strlen(text), true, &d)) {
        ck_assert_msg(d.part == CHAT_CALL || d.part == CHAT_ARGUMENTS, "%s", text);
        n_names += d.part == CHAT_CALL;
        if (d.part == CHAT_ARGUMENTS)
            strbuf_add(&arguments, d.s, d.n);
    }
    ck_assert_int_eq(n_names, 1);
    ck_assert_str_eq(o.name.data ? o.tool->name : "", "f");
    cJSON *v = cJSON_ParseWithLength(arguments.data, arguments.n);
    ck_assert_msg(v != NULL, "%s\n%s", text, arguments.data);
    chat_output_fini(&o);
    strbuf_fini(&arguments);
    return v;
}

/* What may be written so deep is not too deep for its reader, who would take it for a string, nor
 * for the server when it is sent back with an object around it. */
START_TEST(values_of_pairs_nest_so_deep)
{
    struct grammar_matcher m;
    struct grammar *g = NULL;
    struct error err;
    struct strbuf text = { 0 };
    cJSON *schema = parse_schema(OBJECT("\"a\":{}"));
    int deep = 0;

    ck_assert_int_eq(compile_call(&g, schema, &err), ST_OK);
    strbuf_puts(&text, "<tool_call>f<arg_key>a</arg_key><arg_value>");
    grammar_matcher_init(&m, g);
    ck_assert(grammar_matcher_advance(&m, text.data, text.n));
    for (; grammar_matcher_advance(&m, "[", 1); deep++)
        strbuf_puts(&text, "[");
    ck_assert_int_eq(deep, JSON_MAX_DEPTH - 1);
    for (int i = 0; i < deep; i++) {
        ck_assert(grammar_matcher_advance(&m, "]", 1));
        strbuf_puts(&text, "]");
    }
    ck_assert(grammar_matcher_advance(&m, END "</tool_call>", strlen(END "</tool_call>")));
    ck_assert(grammar_matcher_is_complete(&m));
    strbuf_puts(&text, END "</tool_call>");
    cJSON *v = read_call(schema, text.data);
    ck_assert(cJSON_IsArray(member(v, "a")));
    cJSON_Delete(v);
    grammar_matcher_fini(&m);
    grammar_release(g);
    cJSON_Delete(schema);
    strbuf_fini(&text);
}
END_TEST

/* The members of a random object, and behind them strings of each kind. */
static void random_arguments(struct test_random *r, struct strbuf *out)
{
    static const char *const kinds[] = {
        "{\"type\":\"string\"}", "{\"type\":\"string\",\"minLength\":2}",
        "{\"type\":\"string\",\"minLength\":1,\"maxLength\":4}",
        "{\"enum\":[\"1\",\"null\",\"<\"]}",
        "{\"$ref\":\"#/$defs/kind\"}", "{\"type\":[\"string\",\"null\"]}", "{}",
    };
    struct strbuf object = { 0 };

    strbuf_puts(out, "{\"$defs\":{\"tree\":{\"type\":\"object\",\"properties\":{\"x\":{"
                "\"type\":\"array\",\"maxItems\":2,\"items\":{\"$ref\":\"#/$defs/tree\"}}}},"
                "\"kind\":{\"type\":\"string\",\"enum\":[\"</arg\",\"\\\"\"]}},"
                "\"type\":\"object\",\"properties\":{");
    for (int i = 0, n = 1 + random_below(r, 3); i < n; i++)
        strbuf_printf(out, "\"s%d\":%s,", i,
                      kinds[random_below(r, (int)(sizeof kinds / sizeof kinds[0]))]);
    random_object(r, &object, 2);
    strbuf_puts(out, object.data + strlen("{\"type\":\"object\",\"properties\":{"));
    strbuf_fini(&object);
}

/* The byte that goes on with the marker which the text ends with a part of; outside, its first. */
static int towards_end(const struct strbuf *text)
{
    size_t k = strlen(END) - 1;

    while (k > 0 && (text->n < k || memcmp(text->data + text->n - k, END, k) != 0))
        k--;
    return END[k];
}

static void random_call(struct test_random *r, struct grammar *g, const struct token_trie *trie,
                        struct strbuf *out)
{
    enum { WORDS = (BYTE_IDS + 31) / 32 };
    struct grammar_matcher m;
    uint32_t mask[WORDS], n;

    strbuf_clear(out);
    grammar_matcher_init(&m, g);
    while (!grammar_matcher_is_complete(&m)) {
        ck_assert_int_eq(grammar_matcher_mask(&m, trie, mask, WORDS, &n), ST_OK);
        ck_assert_msg(n > 0 && out->n < 20000, "stuck after %.*s", (int)out->n, out->data);
        int byte = towards_end(out);
        bool wanted = random_below(r, byte == '<' ? 6 : 24) > (byte == '<' ? 3 : 0);
        if (!wanted || !(mask[byte / 32] >> byte % 32 & 1))
            byte = choose(r, mask, n, random_below(r, 4) > 0);
        ck_assert(grammar_matcher_advance(&m, &(char){ (char)byte }, 1));
        strbuf_add(out, &(char){ (char)byte }, 1);
    }
    grammar_matcher_fini(&m);
    strbuf_add(out, "", 1);
}

START_TEST(random_calls_are_valid)
{
    struct test_random r = test_random(77000 + (uint64_t)_i);
    struct tokenizer *t = byte_tokenizer_open(false);
    struct token_trie *trie = token_trie_create(t);
    struct strbuf source = { 0 }, text = { 0 };
    struct grammar *g = NULL;
    struct error err = { .text = "" };

    random_arguments(&r, &source);
    cJSON *schema = parse_schema(source.data);
    ck_assert_msg(compile_call(&g, schema, &err) == ST_OK, "%s\n%s", err.text, source.data);
    for (int i = 0; i < 30; i++) {
        random_call(&r, g, trie, &text);
        cJSON *v = read_call(schema, text.data);
        ck_assert_msg(is_valid(schema, schema, v), "%s\n%s", source.data, text.data);
        cJSON_Delete(v);
    }
    cJSON_Delete(schema);
    grammar_release(g);
    strbuf_fini(&source);
    strbuf_fini(&text);
    token_trie_destroy(trie);
    tokenizer_close(t);
}
END_TEST

TCase *json_schema_case(void);
TCase *json_schema_case(void)
{
    TCase *tc = tcase_create("json_schema");

    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, what_is_valid, 0, sizeof texts / sizeof texts[0]);
    tcase_add_loop_test(tc, what_is_refused, 0, sizeof refused / sizeof refused[0]);
    tcase_add_test(tc, depth_has_an_end);
    tcase_add_loop_test(tc, random_texts_are_valid, 0, 60);
    tcase_add_loop_test(tc, what_a_call_may_be, 0, sizeof calls / sizeof calls[0]);
    tcase_add_loop_test(tc, what_calls_are_refused, 0,
                        sizeof refused_calls / sizeof refused_calls[0]);
    tcase_add_test(tc, values_of_pairs_nest_so_deep);
    tcase_add_loop_test(tc, random_calls_are_valid, 0, 60);
    return tc;
}
