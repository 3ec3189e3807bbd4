#include "server/api_parse.h"

#include "engine/base/strbuf.h"
#include "engine/grammar/grammar.h"
#include "server/grammar_cache.h"

#include <string.h>

/* Structured output: which of the fields asks for it, for what, and the grammar of that.
 *
 *   response_format     {"type": "text" | "json_object" | "json_schema", "json_schema": {...}}
 *   guided_json, guided_regex, guided_choice
 *   structured_outputs  {"json": ...} or {"regex": ...}, {"choice": ...}, {"json_object": true}
 *   tool_choice         "required" or a function: calls, whatever else is asked for */

enum wanted_kind { WANT_NOTHING, WANT_SCHEMA, WANT_REGEX, WANT_CHOICE, WANT_JSON_OBJECT,
                   WANT_CALLS };

struct wanted {
    const char *field;           /* whose text it is */
    const struct api_value *from;
    enum wanted_kind kind;
    const cJSON *value;
};

static bool is(const cJSON *v, const char *name)
{
    return strcmp(v->string, name) == 0;
}

static enum status refuse_member(struct api_parse *p, const char *field, const cJSON *v)
{
    return api_refuse(p, field, "'%s' has '%.*s', which is not supported by this server.", field,
                      api_quotable_bytes(v->string), v->string);
}

static enum status want(struct api_parse *p, struct wanted *w, enum wanted_kind kind,
                        const cJSON *value)
{
    if (w->kind != WANT_NOTHING)
        return api_refuse(p, w->field, "'%s' asks for more than one structure.", w->field);
    w->kind = kind;
    w->value = value;
    return ST_OK;
}

/* ---- response_format */

/* {"name", "description", "schema", "strict"}; what is strict anyway may be asked for or not. */
static enum status read_json_schema(struct api_parse *p, struct wanted *w, const cJSON *object)
{
    if (!cJSON_IsObject(object))
        return api_refuse(p, w->field, "'response_format.json_schema' must be an object.");
    for (const cJSON *v = object->child; v; v = v->next) {
        if (is(v, "schema") && !cJSON_IsNull(v))
            TRY(want(p, w, WANT_SCHEMA, v));
        else if ((is(v, "name") || is(v, "description")) && !cJSON_IsString(v) && !cJSON_IsNull(v))
            return api_refuse(p, w->field, "'response_format.json_schema.%s' must be a string.",
                              v->string);
        else if (is(v, "strict") && !cJSON_IsBool(v) && !cJSON_IsNull(v))
            return api_refuse(p, w->field,
                              "'response_format.json_schema.strict' must be true or false.");
        else if (!is(v, "schema") && !is(v, "name") && !is(v, "description") && !is(v, "strict"))
            return refuse_member(p, "response_format.json_schema", v);
    }
    if (w->kind == WANT_NOTHING)
        return api_refuse(p, w->field, "'response_format.json_schema' must have a 'schema'.");
    return ST_OK;
}

static enum status read_response_format(struct api_parse *p, struct wanted *w)
{
    const cJSON *format = w->from->tree, *type = NULL, *schema = NULL;

    if (!cJSON_IsObject(format))
        return api_refuse(p, w->field, "'response_format' must be an object.");
    for (const cJSON *v = format->child; v; v = v->next) {
        const cJSON **at = is(v, "type") ? &type : is(v, "json_schema") ? &schema : NULL;
        if (!at && !cJSON_IsNull(v))
            return refuse_member(p, w->field, v);
        if (at && *at)
            return api_refuse(p, w->field, "'response_format' has '%s' twice.", v->string);
        if (at)
            *at = v;
    }
    const char *name = cJSON_IsString(type) ? type->valuestring : "";
    if (strcmp(name, "json_schema") == 0)
        return read_json_schema(p, w, schema);
    if (schema && !cJSON_IsNull(schema))
        return api_refuse(p, w->field, "'response_format' has a 'json_schema', which goes with "
                          "the type \"json_schema\" alone.");
    if (strcmp(name, "json_object") == 0)
        return want(p, w, WANT_JSON_OBJECT, format);
    if (strcmp(name, "text") == 0)
        return ST_OK;
    return api_refuse(p, w->field, "'response_format.type' must be \"text\", \"json_object\" or "
                      "\"json_schema\".");
}

/* ---- structured_outputs */

static enum status read_structured_outputs(struct api_parse *p, struct wanted *w)
{
    static const struct { const char *name; enum wanted_kind kind; } kinds[] = {
        { "json", WANT_SCHEMA }, { "regex", WANT_REGEX }, { "choice", WANT_CHOICE },
    };

    if (!cJSON_IsObject(w->from->tree))
        return api_refuse(p, w->field, "'structured_outputs' must be an object.");
    for (const cJSON *v = w->from->tree->child; v; v = v->next) {
        enum wanted_kind kind = WANT_NOTHING;
        if (cJSON_IsNull(v) || (cJSON_IsFalse(v) && !is(v, "json")))
            continue;
        for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
            if (is(v, kinds[i].name))
                kind = kinds[i].kind;
        if (is(v, "json_object") && cJSON_IsTrue(v))
            kind = WANT_JSON_OBJECT;
        if (kind == WANT_NOTHING)
            return refuse_member(p, w->field, v);
        TRY(want(p, w, kind, v));
    }
    if (w->kind == WANT_NOTHING)
        return api_refuse(p, w->field, "'structured_outputs' must have 'json', 'regex', 'choice' "
                          "or 'json_object'.");
    return ST_OK;
}

/* ---- compiling */

static enum status compile_choice(struct api_parse *p, const struct wanted *w,
                                  const struct grammar_turn *turn, struct grammar **out,
                                  struct error *err)
{
    const cJSON *list = w->value;
    size_t n = 0;
    void *memory;

    if (!cJSON_IsArray(list) || !list->child)
        return error_set(err, ST_INVALID, "must be a list of strings");
    TRY(api_alloc(p, &memory, (size_t)cJSON_GetArraySize(list), sizeof(char *)));
    const char **choices = memory;
    for (const cJSON *v = list->child; v; v = v->next) {
        if (!cJSON_IsString(v))
            return error_set(err, ST_INVALID, "must be a list of strings");
        choices[n++] = v->valuestring;
    }
    return grammar_compile_choice(out, choices, n, turn, err);
}

/* A schema, or the text of one. */
static enum status compile_schema(struct api_parse *p, const struct wanted *w,
                                  const struct grammar_turn *turn, struct grammar **out,
                                  struct error *err)
{
    const char *text = w->value->valuestring;
    struct json_scan scan;

    if (!cJSON_IsString(w->value))
        return grammar_compile_schema(out, w->value, turn, err);
    if (json_scan(&scan, text, strlen(text), p->cx->limits.max_json_values, NULL) != ST_OK)
        return error_set(err, ST_INVALID, "must be a JSON schema or a string with one");
    cJSON *schema = cJSON_Parse(text);
    enum status st = schema ? grammar_compile_schema(out, schema, turn, err)
                            : error_set(err, ST_INVALID, "must be a JSON schema or a string "
                                        "with one");
    cJSON_Delete(schema);
    return st;
}

static enum status compile(struct api_parse *p, const struct wanted *w,
                           const struct grammar_turn *turn, struct grammar **out,
                           struct error *err)
{
    switch (w->kind) {
    case WANT_SCHEMA:
        return compile_schema(p, w, turn, out, err);
    case WANT_REGEX:
        if (!cJSON_IsString(w->value))
            return error_set(err, ST_INVALID, "must be a string");
        return grammar_compile_regex(out, w->value->valuestring, strlen(w->value->valuestring),
                                     turn, err);
    case WANT_CHOICE:
        return compile_choice(p, w, turn, out, err);
    case WANT_CALLS:
        return grammar_compile_calls(out, turn, err);
    default:
        return grammar_compile_json_object(out, turn, err);
    }
}

/* All that the grammar follows from but the field: JSON values, which end by themselves. */
static void write_key(const struct api_parse *p, const struct wanted *w,
                      const struct grammar_turn *turn, struct strbuf *key)
{
    const struct api_value *tools = &p->fields.tools;

    strbuf_printf(key, "%d %d %s\n", turn ? (int)turn->thoughts : -1, turn && turn->between,
                  p->only_tool ? p->only_tool : "");
    if (turn && turn->n_calls > 0)
        strbuf_add(key, tools->text, tools->text_bytes);
    strbuf_add(key, w->from->text, w->from->text_bytes);
}

static enum status get_grammar(struct api_parse *p, const struct wanted *w,
                               const struct api_turn *around)
{
    const struct grammar_turn *turn = around ? &around->grammar : NULL;
    struct grammar_cache *cache = p->cx->grammars;
    struct strbuf key = { 0 };
    struct error err = { 0 };
    enum status st = ST_OK;

    write_key(p, w, turn, &key);
    if (cache)
        p->out->grammar = grammar_cache_find(cache, w->field, key.data, key.n);
    if (!p->out->grammar) {
        st = compile(p, w, turn, &p->out->grammar, &err);
        if (st == ST_OK && cache)
            grammar_cache_add(cache, w->field, key.data, key.n, p->out->grammar);
        if (st != ST_OK && err.text[0])          /* else refused already */
            st = api_refuse_turn(p, around, w->field, &err);
    }
    strbuf_fini(&key);
    p->out->template.grammar = p->out->grammar;
    return st;
}

/* ---- all of it */

static enum status read_wanted(struct api_parse *p, struct wanted *out)
{
    const struct api_fields *f = &p->fields;
    struct wanted all[] = {
        { "response_format", &f->response_format, WANT_NOTHING, NULL },
        { "structured_outputs", &f->structured_outputs, WANT_NOTHING, NULL },
        { "guided_json", &f->guided_json, WANT_SCHEMA, f->guided_json.tree },
        { "guided_regex", &f->guided_regex, WANT_REGEX, f->guided_regex.tree },
        { "guided_choice", &f->guided_choice, WANT_CHOICE, f->guided_choice.tree },
    };

    *out = (struct wanted){ 0 };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        struct wanted *w = &all[i];
        if (!w->from->tree)
            continue;
        if (w->from == &f->response_format)
            TRY(read_response_format(p, w));
        else if (w->from == &f->structured_outputs)
            TRY(read_structured_outputs(p, w));
        if (w->kind == WANT_NOTHING)
            continue;
        if (out->kind != WANT_NOTHING)
            return api_refuse(p, w->field, "'%s' and '%s' cannot be used together.", out->field,
                              w->field);
        *out = *w;
    }
    if (p->must_call)
        *out = (struct wanted){ "tool_choice", &f->tool_choice, WANT_CALLS, NULL };
    return ST_OK;
}

enum status api_read_guided(struct api_parse *p)
{
    struct api_turn turn = { 0 };
    struct wanted wanted;

    TRY(read_wanted(p, &wanted));
    if (wanted.kind == WANT_NOTHING)
        return ST_OK;
    if (p->endpoint != API_CHAT)
        return get_grammar(p, &wanted, NULL);
    enum status st = api_read_turn(p, &turn);
    if (st == ST_OK)
        st = get_grammar(p, &wanted, &turn);
    api_turn_fini(&turn);
    return st;
}

bool api_mentions_guided(const char *body, size_t n)
{
    static const char *const names[] = { "guided_", "response_format", "structured_outputs",
                                         "tool_choice" };

    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (memmem(body, n, names[i], strlen(names[i])))
            return true;
    return false;
}
