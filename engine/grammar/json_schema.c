#include "engine/grammar/json_schema.h"

#include "engine/base/mem.h"
#include "engine/base/utf8.h"
#include "engine/grammar/automaton.h"
#include "engine/grammar/grammar.h"
#include "engine/grammar/json_text.h"
#include "engine/grammar/raw_text.h"
#include "engine/grammar/regex.h"
#include "engine/grammar/schema_ref.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Each schema is a rule of its own, filled in turn: one that is met in another gets its number and
 * waits.  What a $ref points to gets one number for all.
 *
 * Of arguments written as pairs, strings are raw (raw_text.h); what is inside of a value is JSON.
 * A schema may be needed in both forms, each a rule of its own. */

enum { QUOTED_BYTES = 60 };
static const double exact_double = 9007199254740992.0;   /* 2^53 */
static const int64_t widest = 999999999999999999;        /* JSON_MAX_DIGITS nines */

enum type { STRING, INTEGER, NUMBER, BOOLEAN, NULL_TYPE, OBJECT, ARRAY, N_TYPES };

static const char *const type_names[N_TYPES] = {
    "string", "integer", "number", "boolean", "null", "object", "array",
};

/* A schema's members. */
struct keys {
    const cJSON *type, *values, *constant, *any_of, *one_of, *all_of, *ref;
    const cJSON *min_length, *max_length, *pattern, *format;
    const cJSON *minimum, *maximum, *above, *below;
    const cJSON *items, *min_items, *max_items;
    const cJSON *properties, *required, *additional;
};

enum group { ANNOTATION, TYPE, WHOLE, OF_STRING, OF_NUMBER, OF_ARRAY, OF_OBJECT, N_GROUPS };

#define AT(member) offsetof(struct keys, member)

static const struct key { const char *name; enum group group; size_t at; } known[] = {
    { "type", TYPE, AT(type) }, { "enum", WHOLE, AT(values) }, { "const", WHOLE, AT(constant) },
    { "anyOf", WHOLE, AT(any_of) }, { "oneOf", WHOLE, AT(one_of) },
    { "allOf", WHOLE, AT(all_of) }, { "$ref", WHOLE, AT(ref) },
    { "minLength", OF_STRING, AT(min_length) }, { "maxLength", OF_STRING, AT(max_length) },
    { "pattern", OF_STRING, AT(pattern) }, { "format", OF_STRING, AT(format) },
    { "minimum", OF_NUMBER, AT(minimum) }, { "maximum", OF_NUMBER, AT(maximum) },
    { "exclusiveMinimum", OF_NUMBER, AT(above) }, { "exclusiveMaximum", OF_NUMBER, AT(below) },
    { "items", OF_ARRAY, AT(items) }, { "minItems", OF_ARRAY, AT(min_items) },
    { "maxItems", OF_ARRAY, AT(max_items) },
    { "properties", OF_OBJECT, AT(properties) }, { "required", OF_OBJECT, AT(required) },
    { "additionalProperties", OF_OBJECT, AT(additional) },
    { "title", ANNOTATION, 0 }, { "description", ANNOTATION, 0 }, { "default", ANNOTATION, 0 },
    { "examples", ANNOTATION, 0 }, { "deprecated", ANNOTATION, 0 }, { "readOnly", ANNOTATION, 0 },
    { "writeOnly", ANNOTATION, 0 }, { "$comment", ANNOTATION, 0 }, { "$schema", ANNOTATION, 0 },
    { "$id", ANNOTATION, 0 }, { "$defs", ANNOTATION, 0 }, { "definitions", ANNOTATION, 0 },
};

struct pending { const cJSON *schema; uint32_t rule; bool raw; };

struct schema {
    struct nfa *graph;
    struct json_rules json;
    const cJSON *root;
    struct pending *pending;     /* all schemas that were met; those from `done` on wait */
    size_t n_pending, done, capacity;
    struct pending *targets;     /* of references */
    size_t n_targets, target_capacity;
    size_t *places;              /* that patterns may still take, all together */
    const cJSON *at;             /* the one that is being filled in, */
    bool raw;                    /* in this form */
    const struct raw_rules *raw_rules;   /* if any is */
    struct error *err;
};

/* ---- refusing */

static int quoted(const char *s)
{
    return (int)utf8_valid_prefix(s, strnlen(s, QUOTED_BYTES));
}

/* What a sentence is about: the name under which the schema stands, if it has one. */
struct place { char text[QUOTED_BYTES + 8]; };

static struct place place_of(const struct schema *s)
{
    const char *name = s->at->string;
    struct place place = { "" };

    if (name && s->at != s->root)
        snprintf(place.text, sizeof place.text, " in '%.*s'", quoted(name), name);
    return place;
}

static enum status refuse(struct schema *s, const char *key, const char *problem)
{
    return error_set(s->err, ST_INVALID, "has a '%.*s'%s that %s", quoted(key), key,
                     place_of(s).text, problem);
}

static enum status refuse_pair(struct schema *s, const char *key, const char *other)
{
    return error_set(s->err, ST_INVALID, "has '%s' together with '%s'%s, which is not supported",
                     key, other, place_of(s).text);
}

static enum status refuse_marker(struct schema *s, const char *key, const char *what,
                                 const char *marker)
{
    return error_set(s->err, ST_INVALID, "has a '%s'%s with a %s that contains %s, which ends it "
                     "in the calls of this model", key, place_of(s).text, what, marker);
}

/* ---- rules */

static uint32_t rule_of(struct schema *s, const cJSON *schema, bool raw)
{
    if (s->n_pending == s->capacity) {
        s->capacity = s->capacity ? 2 * s->capacity : 64;
        s->pending = mem_realloc(s->pending, s->capacity, sizeof *s->pending);
    }
    uint32_t rule = nfa_add_rule(s->graph);
    s->pending[s->n_pending++] = (struct pending){ schema, rule, raw };
    return rule;
}

static nfa_at call_schema(struct schema *s, const cJSON *schema, nfa_at next)
{
    return nfa_call(s->graph, rule_of(s, schema, false), next);
}

/* ---- references */

static enum status emit_ref(struct schema *s, const cJSON *ref, nfa_at *out)
{
    const cJSON *target = NULL;
    const char *problem = schema_ref_find(s->root, ref, &target);

    if (problem)
        return refuse(s, "$ref", problem);
    for (size_t i = 0; i < s->n_targets; i++)
        if (s->targets[i].schema == target && s->targets[i].raw == s->raw) {
            *out = nfa_call(s->graph, s->targets[i].rule, NFA_RETURN);
            return ST_OK;
        }
    if (s->n_targets == s->target_capacity) {
        s->target_capacity = s->target_capacity ? 2 * s->target_capacity : 16;
        s->targets = mem_realloc(s->targets, s->target_capacity, sizeof *s->targets);
    }
    uint32_t rule = rule_of(s, target, s->raw);
    s->targets[s->n_targets++] = (struct pending){ target, rule, s->raw };
    *out = nfa_call(s->graph, rule, NFA_RETURN);
    return ST_OK;
}

/* ---- alternatives */

static enum status emit_any_of(struct schema *s, const cJSON *list, nfa_at *out)
{
    if (!cJSON_IsArray(list) || !list->child)
        return refuse(s, list->string, "is not a list of schemas");
    if (list == cJSON_GetObjectItemCaseSensitive(s->at, "allOf") && list->child->next)
        return refuse(s, "allOf", "has more than one schema, which is not supported");
    for (const cJSON *v = list->child; v; v = v->next)
        *out = nfa_either(s->graph, nfa_call(s->graph, rule_of(s, v, s->raw), NFA_RETURN), *out);
    return ST_OK;
}

static bool is_integer(const cJSON *v)
{
    return cJSON_IsNumber(v) && floor(v->valuedouble) == v->valuedouble;
}

/* Digits that give the number back. */
static void print_number(char *out, size_t size, double v)
{
    if (floor(v) == v) {
        snprintf(out, size, "%.0f", v);
        return;
    }
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(out, size, "%.*g", digits, v);
        if (strtod(out, NULL) == v)
            return;
    }
}

static enum status emit_literal(struct schema *s, const cJSON *v, const char *key, nfa_at *out)
{
    char number[40];

    *out = NFA_NOTHING;
    if (cJSON_IsString(v) && s->raw) {
        if (strstr(v->valuestring, s->raw_rules->marker))
            return refuse_marker(s, key, "string", s->raw_rules->marker);
        *out = nfa_text(s->graph, v->valuestring, NFA_RETURN);
        return ST_OK;
    }
    if (cJSON_IsString(v)) {
        *out = json_text_literal(s->graph, v->valuestring, NFA_RETURN);
        return ST_OK;
    }
    if (cJSON_IsNumber(v)) {
        if (fabs(v->valuedouble) > exact_double)
            return refuse(s, key, "has a number beyond 2^53");
        print_number(number, sizeof number, v->valuedouble);
        *out = nfa_text(s->graph, number, NFA_RETURN);
        return ST_OK;
    }
    if (!cJSON_IsBool(v) && !cJSON_IsNull(v))
        return refuse(s, key, "has a list or an object, which is not supported");
    *out = nfa_text(s->graph, cJSON_IsNull(v) ? "null" : cJSON_IsTrue(v) ? "true" : "false",
                    NFA_RETURN);
    return ST_OK;
}

static bool has_type(const cJSON *v, const bool types[N_TYPES])
{
    return (types[STRING] && cJSON_IsString(v)) || (types[NUMBER] && cJSON_IsNumber(v)) ||
           (types[INTEGER] && is_integer(v)) || (types[BOOLEAN] && cJSON_IsBool(v)) ||
           (types[NULL_TYPE] && cJSON_IsNull(v));
}

/* A list of values or one; of those of the types. */
static enum status emit_values(struct schema *s, const cJSON *first, const char *key, bool one,
                               const bool types[N_TYPES], nfa_at *out)
{
    for (const cJSON *v = first; v; v = one ? NULL : v->next) {
        nfa_at value;
        TRY(emit_literal(s, v, key, &value));
        if (has_type(v, types))
            *out = nfa_either(s->graph, value, *out);
    }
    return ST_OK;
}

/* ---- strings */

static const struct { const char *name, *pattern; } formats[] = {
    { "date", "^[12][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|"
              "[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))$" },
    { "time", "^([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?"
              "(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$" },
    { "date-time", "^[12][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|"
                   "[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))T([01][0-9]|2[0-3]):[0-5][0-9]:"
                   "[0-5][0-9](\\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$" },
    { "uuid", "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$" },
    { "ipv4", "^((25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])\\.){3}"
              "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])$" },
    { "email", "^[A-Za-z0-9_+-]+(\\.[A-Za-z0-9_+-]+)*@([A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
               "\\.)+[A-Za-z]{2,20}$" },
};

/* Alone, so that one that takes too many states is refused before anybody walks through it. */
static enum status check_pattern(struct schema *s, const char *pattern, enum regex_where where)
{
    enum status st;
    struct nfa own;
    nfa_at at;

    nfa_init(&own);
    st = regex_emit(&own, pattern, strlen(pattern), where, NFA_RETURN, &at, s->err);
    nfa_set_rule(&own, 0, at);
    if (st == ST_OK)
        st = nfa_finish(&own, s->err);
    if (st == ST_OK) {
        struct automaton *a = automaton_create(&own);
        st = automaton_explore(a, s->places, s->err);
        automaton_destroy(a);
    }
    nfa_fini(&own);
    return st;
}

static enum status emit_pattern(struct schema *s, const char *pattern, nfa_at *out)
{
    struct error why = { 0 }, *err = s->err;
    enum regex_where where = s->raw ? REGEX_RAW_STRING : REGEX_JSON_STRING;
    const char *quote = s->raw ? "" : "\"";
    nfa_at end = nfa_text(s->graph, quote, NFA_RETURN), at = NFA_NOTHING;

    s->err = &why;
    enum status st = check_pattern(s, pattern, where);
    if (st == ST_OK)
        st = regex_emit(s->graph, pattern, strlen(pattern), where, end, &at, &why);
    s->err = err;
    if (st != ST_OK)
        return refuse(s, "pattern", why.text);
    *out = nfa_text(s->graph, quote, at);
    return ST_OK;
}

/* A count; absent: what *out is. */
static enum status read_count(struct schema *s, const cJSON *v, int *out)
{
    if (!v)
        return ST_OK;
    if (!is_integer(v) || v->valuedouble < 0)
        return refuse(s, v->string, "is not a whole number");
    *out = v->valuedouble > SCHEMA_MAX_COUNT ? SCHEMA_MAX_COUNT + 1 : (int)v->valuedouble;
    return ST_OK;
}

/* Both bounds of a count; *max is -1 where there is none. */
static enum status read_counts(struct schema *s, const cJSON *least, const cJSON *most, int *min,
                               int *max)
{
    *min = 0;
    *max = -1;
    TRY(read_count(s, least, min));
    TRY(read_count(s, most, max));
    if (*min > SCHEMA_MAX_COUNT)
        return refuse(s, least->string, "is more than 4096");
    if (*max > SCHEMA_MAX_COUNT)
        *max = SCHEMA_MAX_COUNT;
    return ST_OK;
}

static enum status emit_string(struct schema *s, const struct keys *k, nfa_at *out)
{
    int min, max;

    TRY(read_counts(s, k->min_length, k->max_length, &min, &max));
    const cJSON *length = k->min_length ? k->min_length : k->max_length;
    if (length && (k->pattern || k->format))
        return refuse_pair(s, length->string, k->pattern ? "pattern" : "format");
    if (k->pattern && k->format)
        return refuse_pair(s, "pattern", "format");
    if (k->pattern)
        return cJSON_IsString(k->pattern) ? emit_pattern(s, k->pattern->valuestring, out)
                                          : refuse(s, "pattern", "is not a string");
    for (size_t i = 0; k->format && i < sizeof formats / sizeof formats[0]; i++)
        if (cJSON_IsString(k->format) && strcmp(k->format->valuestring, formats[i].name) == 0)
            return emit_pattern(s, formats[i].pattern, out);
    if (k->format)
        return refuse(s, "format", "is none of date, time, date-time, uuid, ipv4 and email");
    if (max >= 0 && min > max)
        return ST_OK;
    *out = s->raw ? raw_text_string(s->graph, s->raw_rules, min, max < 0 ? RAW_ANY_LENGTH : max,
                                    NFA_RETURN)
                  : json_text_string(s->graph, &s->json, min, max < 0 ? JSON_ANY_LENGTH : max,
                                     NFA_RETURN);
    return ST_OK;
}

/* ---- numbers */

static enum status check_bound(struct schema *s, const cJSON *v, bool integer)
{
    if (!v)
        return ST_OK;
    if (!cJSON_IsNumber(v) || fabs(v->valuedouble) > exact_double)
        return refuse(s, v->string, "is not a number between -2^53 and 2^53");
    if (!integer && !is_integer(v))
        return refuse(s, v->string, "is not an integer; other bounds are not supported");
    return ST_OK;
}

static void bound_below(struct json_bounds *b, const cJSON *v, bool exclusive)
{
    if (!v)
        return;
    int64_t at = (int64_t)ceil(v->valuedouble);
    bool above = exclusive && is_integer(v);
    if (b->integer && above)
        at++;
    if (at < b->min)
        return;
    b->above_min = !b->integer && (above || (at == b->min && b->above_min));
    b->min = at;
}

static void bound_above(struct json_bounds *b, const cJSON *v, bool exclusive)
{
    if (!v)
        return;
    int64_t at = (int64_t)floor(v->valuedouble);
    bool below = exclusive && is_integer(v);
    if (b->integer && below)
        at--;
    if (at > b->max)
        return;
    b->below_max = !b->integer && (below || (at == b->max && b->below_max));
    b->max = at;
}

static enum status emit_number(struct schema *s, const struct keys *k, bool integer, nfa_at *out)
{
    struct json_bounds b = { .min = -widest, .max = widest, .integer = integer };

    TRY(check_bound(s, k->minimum, integer));
    TRY(check_bound(s, k->maximum, integer));
    TRY(check_bound(s, k->above, integer));
    TRY(check_bound(s, k->below, integer));
    bound_below(&b, k->minimum, false);
    bound_below(&b, k->above, true);
    bound_above(&b, k->maximum, false);
    bound_above(&b, k->below, true);
    bool bounded = k->minimum || k->maximum || k->above || k->below;
    *out = integer || bounded ? json_text_bounded(s->graph, &b, NFA_RETURN)
                              : json_text_number(s->graph, NFA_RETURN);
    return ST_OK;
}

/* ---- arrays */

static nfa_at element(struct schema *s, uint32_t rule, bool first, nfa_at next)
{
    nfa_at at = json_text_space(s->graph, &s->json, nfa_call(s->graph, rule, next));

    return first ? at : nfa_text(s->graph, ",", at);
}

static enum status emit_array(struct schema *s, const struct keys *k, nfa_at *out)
{
    struct nfa *g = s->graph;
    nfa_at close = json_text_space(g, &s->json, nfa_text(g, "]", NFA_RETURN)), at = close;
    int min, max, from;

    TRY(read_counts(s, k->min_items, k->max_items, &min, &max));
    if (k->items && !cJSON_IsObject(k->items) && !cJSON_IsBool(k->items))
        return refuse(s, "items", "is not a schema");
    if (max >= 0 && max < min)
        return ST_OK;
    uint32_t rule = k->items ? rule_of(s, k->items, false) : s->json.value;
    if (max < 0) {               /* the last of the counted ones is followed by any number */
        at = nfa_reserve(g);
        nfa_split(g, at, element(s, rule, false, at), close);
        from = min > 1 ? min : 1;
    } else {
        from = max;
    }
    for (int i = from - 1; i >= 1; i--) {
        at = element(s, rule, false, at);
        if (i >= min)
            at = nfa_either(g, at, close);
    }
    at = max == 0 ? close : element(s, rule, true, at);
    if (min == 0)
        at = nfa_either(g, at, close);
    *out = nfa_text(g, "[", at);
    return ST_OK;
}

/* ---- objects */

static bool is_required(const cJSON *required, const char *name)
{
    if (!required)
        return false;
    for (const cJSON *v = required->child; v; v = v->next)
        if (strcmp(v->valuestring, name) == 0)
            return true;
    return false;
}

static enum status check_object(struct schema *s, const struct keys *k)
{
    int n = 0;

    if (k->properties && !cJSON_IsObject(k->properties))
        return refuse(s, "properties", "is not an object");
    for (const cJSON *p = k->properties ? k->properties->child : NULL; p; p = p->next) {
        if (++n > SCHEMA_MAX_PROPERTIES)
            return refuse(s, "properties", "has more than 1000 members");
        for (const cJSON *q = p->next; q; q = q->next)
            if (strcmp(p->string, q->string) == 0)
                return refuse(s, "properties", "has a member twice");
    }
    if (k->additional && !cJSON_IsObject(k->additional) && !cJSON_IsBool(k->additional))
        return refuse(s, "additionalProperties", "is not a schema");
    if (k->required && !cJSON_IsArray(k->required))
        return refuse(s, "required", "is not a list");
    for (const cJSON *v = k->required ? k->required->child : NULL; v; v = v->next)
        if (!cJSON_IsString(v) ||
            !cJSON_GetObjectItemCaseSensitive(k->properties, v->valuestring))
            return refuse(s, "required", "names what is not among the properties");
    return ST_OK;
}

/* Members of any name, all under one schema. */
static nfa_at emit_map(struct schema *s, const cJSON *additional)
{
    struct nfa *g = s->graph;
    nfa_at close = json_text_space(g, &s->json, nfa_text(g, "}", NFA_RETURN));
    nfa_at loop = nfa_reserve(g);

    if (cJSON_IsFalse(additional))
        return nfa_text(g, "{", close);
    uint32_t rule = additional ? rule_of(s, additional, false) : s->json.value;
    nfa_at value = json_text_space(g, &s->json, nfa_call(g, rule, loop));
    nfa_at key = json_text_string(g, &s->json, 0, JSON_ANY_LENGTH, nfa_text(g, ":", value));
    nfa_at member = json_text_space(g, &s->json, key);
    nfa_split(g, loop, nfa_text(g, ",", member), close);
    return nfa_text(g, "{", nfa_either(g, member, close));
}

static enum status emit_object(struct schema *s, const struct keys *k, nfa_at *out)
{
    struct nfa *g = s->graph;

    TRY(check_object(s, k));
    const cJSON *last = k->properties ? k->properties->child : NULL;
    if (!last) {
        *out = emit_map(s, k->additional);
        return ST_OK;
    }
    /* What follows where nothing is written yet, and where something is. */
    nfa_at first = json_text_space(g, &s->json, nfa_text(g, "}", NFA_RETURN)), later = first;
    for (last = last->prev;; last = last->prev) {        /* the first one's prev is the last */
        nfa_at value = json_text_space(g, &s->json, call_schema(s, last, later));
        nfa_at member = json_text_literal(g, last->string, nfa_text(g, ":", value));
        member = json_text_space(g, &s->json, member);
        bool may_lack = !is_required(k->required, last->string);
        first = nfa_either(g, member, may_lack ? first : NFA_NOTHING);
        later = nfa_either(g, nfa_text(g, ",", member), may_lack ? later : NFA_NOTHING);
        if (last == k->properties->child)
            break;
    }
    *out = nfa_text(g, "{", first);
    return ST_OK;
}

/* ---- one schema */

static enum status read_keys(struct schema *s, struct keys *k, const cJSON *in[N_GROUPS])
{
    for (const cJSON *v = s->at->child; v; v = v->next) {
        const struct key *key = known, *end = known + sizeof known / sizeof known[0];
        while (key < end && strcmp(key->name, v->string) != 0)
            key++;
        if (key == end)
            return refuse(s, v->string, "is not supported");
        if (key->group == ANNOTATION)
            continue;
        const cJSON **at = (const cJSON **)(void *)((char *)k + key->at);
        if (*at)
            return refuse(s, v->string, "is there twice");
        *at = v;
        if (key->group == WHOLE && in[WHOLE])
            return refuse_pair(s, in[WHOLE]->string, v->string);
        in[key->group] = v;
    }
    for (int group = TYPE; group < N_GROUPS && in[WHOLE]; group++) {
        bool goes = group == WHOLE || (group == TYPE && (k->values || k->constant));
        if (in[group] && !goes)
            return refuse_pair(s, in[WHOLE]->string, in[group]->string);
    }
    return ST_OK;
}

static enum status add_type(struct schema *s, const cJSON *v, bool types[N_TYPES])
{
    for (int t = 0; t < N_TYPES; t++)
        if (cJSON_IsString(v) && strcmp(v->valuestring, type_names[t]) == 0) {
            types[t] = true;
            return ST_OK;
        }
    return refuse(s, "type", "is none of string, integer, number, boolean, null, object and array");
}

/* Without a type those that the other keys are about; all, if there are none. */
static enum status read_types(struct schema *s, const struct keys *k,
                              const cJSON *const in[N_GROUPS], bool types[N_TYPES])
{
    if (cJSON_IsArray(k->type)) {
        for (const cJSON *v = k->type->child; v; v = v->next)
            TRY(add_type(s, v, types));
    } else if (k->type) {
        TRY(add_type(s, k->type, types));
    } else {
        bool any = !in[OF_STRING] && !in[OF_NUMBER] && !in[OF_ARRAY] && !in[OF_OBJECT];
        types[STRING] = any || in[OF_STRING];
        types[NUMBER] = any || in[OF_NUMBER];
        types[ARRAY] = any || in[OF_ARRAY];
        types[OBJECT] = any || in[OF_OBJECT];
        types[BOOLEAN] = types[NULL_TYPE] = types[INTEGER] = any;
    }
    static const struct { enum group group; enum type type; } of[] = {
        { OF_STRING, STRING }, { OF_ARRAY, ARRAY }, { OF_OBJECT, OBJECT },
    };
    for (size_t i = 0; i < sizeof of / sizeof of[0]; i++)
        if (in[of[i].group] && !types[of[i].type])
            return refuse(s, in[of[i].group]->string, "does not go with its type");
    if (in[OF_NUMBER] && !types[INTEGER] && !types[NUMBER])
        return refuse(s, in[OF_NUMBER]->string, "does not go with its type");
    return ST_OK;
}

static enum status emit_type(struct schema *s, const struct keys *k, enum type type, nfa_at *out)
{
    *out = NFA_NOTHING;
    switch (type) {
    case STRING:    return emit_string(s, k, out);
    case INTEGER:   return emit_number(s, k, true, out);
    case NUMBER:    return emit_number(s, k, false, out);
    case OBJECT:    return emit_object(s, k, out);
    case ARRAY:     return emit_array(s, k, out);
    case NULL_TYPE: *out = nfa_text(s->graph, "null", NFA_RETURN); return ST_OK;
    case BOOLEAN:
        *out = nfa_either(s->graph, nfa_text(s->graph, "true", NFA_RETURN),
                          nfa_text(s->graph, "false", NFA_RETURN));
        return ST_OK;
    default:        return ST_OK;
    }
}

static enum status emit_whole(struct schema *s, const struct keys *k, const bool types[N_TYPES],
                              nfa_at *out)
{
    if (k->ref)
        return emit_ref(s, k->ref, out);
    if (k->constant)
        return emit_values(s, k->constant, "const", true, types, out);
    if (k->values)
        return cJSON_IsArray(k->values)
                   ? emit_values(s, k->values->child, "enum", false, types, out)
                   : refuse(s, "enum", "is not a list");
    return emit_any_of(s, k->any_of ? k->any_of : k->one_of ? k->one_of : k->all_of, out);
}

static enum status refuse_no_schema(struct schema *s)
{
    return error_set(s->err, ST_INVALID, "has something%s that is no schema: one is an object, "
                     "true or false", place_of(s).text);
}

static enum status emit_schema(struct schema *s, nfa_at *out)
{
    struct keys k = { 0 };
    const cJSON *in[N_GROUPS] = { NULL };
    bool types[N_TYPES] = { false };

    *out = NFA_NOTHING;
    if (cJSON_IsFalse(s->at))
        return ST_OK;
    if (!cJSON_IsTrue(s->at) && !cJSON_IsObject(s->at))
        return refuse_no_schema(s);
    TRY(read_keys(s, &k, in));
    if (!in[TYPE] && !in[WHOLE] && !in[OF_STRING] && !in[OF_NUMBER] && !in[OF_ARRAY] &&
        !in[OF_OBJECT]) {
        *out = nfa_call(s->graph, s->json.value, NFA_RETURN);
        return ST_OK;
    }
    TRY(read_types(s, &k, in, types));
    if (in[WHOLE])
        return emit_whole(s, &k, types, out);
    types[INTEGER] = types[INTEGER] && !types[NUMBER];   /* every integer is a number */
    for (int t = 0; t < N_TYPES; t++) {
        nfa_at one;
        if (!types[t])
            continue;
        TRY(emit_type(s, &k, (enum type)t, &one));
        *out = nfa_either(s->graph, one, *out);
    }
    return ST_OK;
}

static enum status emit_pending(struct schema *s)
{
    while (s->done < s->n_pending && !s->graph->too_large) {
        struct pending p = s->pending[s->done++];
        nfa_at at;
        s->at = p.schema;
        s->raw = p.raw;
        TRY(emit_schema(s, &at));
        if (!s->graph->too_large)
            nfa_set_rule(s->graph, p.rule, at);
    }
    return ST_OK;
}

static enum status finish(struct schema *s, enum status st)
{
    if (st == ST_OK)
        st = emit_pending(s);
    mem_free(s->pending);
    mem_free(s->targets);
    return st;
}

enum status json_schema_emit(struct nfa *g, const cJSON *schema, nfa_at next, nfa_at *start,
                             size_t *places, struct error *err)
{
    struct schema s = { .graph = g, .json = json_rules_add(g), .root = schema, .err = err,
                        .places = places };

    *start = call_schema(&s, schema, next);
    return finish(&s, ST_OK);
}

nfa_at json_object_emit(struct nfa *g, nfa_at next)
{
    struct json_rules r = json_rules_add(g);

    return nfa_call(g, r.object, next);
}

/* ---- arguments written as pairs */

/* One of them, as its schema wants it. */
static nfa_at pair(struct schema *s, const struct grammar_pairs *p, const char *name,
                   const cJSON *value, nfa_at next)
{
    struct nfa *g = s->graph;
    bool raw = grammar_schema_is_string(s->root, value);
    nfa_at at = nfa_call(g, rule_of(s, value, raw), nfa_text(g, p->value_end, next));

    at = nfa_text(g, p->key_end, nfa_text(g, p->value, at));
    return nfa_text(g, p->key, nfa_text(g, name, at));
}

static enum status emit_named_pairs(struct schema *s, const struct grammar_pairs *p,
                                    const struct keys *k, nfa_at *out)
{
    const cJSON *v = k->properties->child->prev;         /* the last */

    for (*out = NFA_RETURN;; v = v->prev) {
        if (strstr(v->string, p->key_end))
            return refuse_marker(s, "properties", "name", p->key_end);
        nfa_at here = pair(s, p, v->string, v, *out);
        *out = nfa_either(s->graph, here, is_required(k->required, v->string) ? NFA_NOTHING : *out);
        if (v == k->properties->child)
            return ST_OK;
    }
}

/* Pairs of any name.  Nobody knows which of them are strings, so where their values follow a schema
 * all are JSON. */
static nfa_at emit_other_pairs(struct schema *s, const struct grammar_pairs *p,
                               const cJSON *additional)
{
    struct nfa *g = s->graph;
    nfa_at loop = nfa_reserve(g), end = nfa_text(g, p->value_end, loop), value;

    if (cJSON_IsObject(additional))
        value = nfa_call(g, rule_of(s, additional, false), end);
    else
        value = raw_text_string(g, s->raw_rules, 0, RAW_ANY_LENGTH, end);
    nfa_at name = raw_text_name(g, nfa_text(g, p->key_end, nfa_text(g, p->value, value)));
    nfa_split(g, loop, nfa_text(g, p->key, name), NFA_RETURN);
    return loop;
}

static enum status emit_arguments(struct schema *s, const struct grammar_pairs *p, nfa_at *out)
{
    const cJSON *in[N_GROUPS] = { NULL };
    bool types[N_TYPES] = { false };
    struct keys k = { 0 };

    if (s->root) {
        if (!cJSON_IsObject(s->root))
            return refuse_no_schema(s);
        TRY(read_keys(s, &k, in));
        TRY(read_types(s, &k, in, types));
        if (in[WHOLE])
            return refuse(s, in[WHOLE]->string, "is not supported of arguments that are not JSON");
        for (int t = 0; t < N_TYPES; t++)
            if (types[t] != (t == OBJECT))
                return refuse(s, "type", "is not \"object\"");
        TRY(check_object(s, &k));
    }
    if (k.properties && k.properties->child)
        return emit_named_pairs(s, p, &k, out);
    *out = cJSON_IsFalse(k.additional) ? NFA_RETURN : emit_other_pairs(s, p, k.additional);
    return ST_OK;
}

/* A rule of its own: with the object that is put around a value it is then no deeper than those who
 * read it back take (json_scan.h). */
enum status json_schema_emit_pairs(struct nfa *g, const cJSON *schema,
                                   const struct grammar_pairs *pairs, nfa_at next, nfa_at *start,
                                   size_t *places, struct error *err)
{
    const struct raw_rules raw = raw_rules_add(g, pairs->value_end);
    struct schema s = { .graph = g, .json = json_rules_add(g), .root = schema, .at = schema,
                        .err = err, .places = places, .raw_rules = &raw };
    uint32_t rule = nfa_add_rule(g);
    nfa_at arguments = NFA_NOTHING;

    enum status st = emit_arguments(&s, pairs, &arguments);
    nfa_set_rule(g, rule, arguments);
    *start = nfa_call(g, rule, next);
    return finish(&s, st);
}
