#include "server/api_parse.h"
#include "server/openapi.h"
#include "server/reply.h"
#include "server/routes.h"

#include <check.h>
#include <stdio.h>
#include <string.h>

/* server/openapi.json against the tables that it describes. */

static cJSON *document;

static void parse_document(void)
{
    document = cJSON_Parse(openapi_text());
    ck_assert_ptr_nonnull(document);
}

static void drop_document(void)
{
    cJSON_Delete(document);
}

static const cJSON *get(const cJSON *object, const char *key)
{
    return cJSON_GetObjectItemCaseSensitive(object, key);
}

static bool has_type(const cJSON *schema, const char *want)
{
    const cJSON *type = get(schema, "type"), *v;

    cJSON_ArrayForEach(v, type)
        if (strcmp(v->valuestring, want) == 0)
            return true;
    return cJSON_IsString(type) && strcmp(type->valuestring, want) == 0;
}

/* ---- routes */

static const cJSON *find_path(const struct route_facts *r)
{
    const cJSON *path, *paths = get(document, "paths");
    size_t n = strlen(r->path);

    if (!r->prefix)
        return get(paths, r->path);
    cJSON_ArrayForEach(path, paths)
        if (strncmp(path->string, r->path, n) == 0 && path->string[n] == '{')
            return path;
    return NULL;
}

START_TEST(every_route_and_no_other)
{
    struct route_facts r;
    int n = 0;

    for (; routes_facts((size_t)n, &r); n++) {
        const cJSON *path = find_path(&r);
        ck_assert_msg(path, "%s is not described", r.path);
        ck_assert_msg(cJSON_GetArraySize(path) == 1, "%s has one method", r.path);
        const cJSON *operation = get(path, r.post ? "post" : "get");
        ck_assert_msg(operation, "%s has another method", r.path);
        const cJSON *security = get(operation, "security");
        ck_assert_msg(r.is_public == (security && !security->child), "the key of %s", r.path);
    }
    ck_assert_int_gt(n, 0);
    ck_assert_int_eq(cJSON_GetArraySize(get(document, "paths")), n);
    ck_assert_int_gt(cJSON_GetArraySize(get(document, "security")), 0);
}
END_TEST

/* ---- fields */

static const struct {
    enum api_endpoint endpoint;
    const char *path, *schema;
} bodies[] = {
    { API_TEXT, "/v1/completions", "CompletionRequest" },
    { API_CHAT, "/v1/chat/completions", "ChatRequest" },
    { API_TOKENIZE, "/tokenize", "TokenizeRequest" },
    { API_DETOKENIZE, "/detokenize", "DetokenizeRequest" },
};
enum { N_BODIES = sizeof bodies / sizeof bodies[0] };

static void check_bounds(const struct api_field *f, const cJSON *schema, bool chat)
{
    const cJSON *min = get(schema, f->above_min ? "exclusiveMinimum" : "minimum");
    const cJSON *max = get(schema, "maximum");
    /* A chat without output is refused once both names of the limit are read. */
    bool output = chat && (strcmp(f->name, "max_tokens") == 0 ||
                           strcmp(f->name, "max_completion_tokens") == 0);

    ck_assert_msg(cJSON_IsNumber(min) && min->valuedouble == (output ? 1 : f->min),
                  "the minimum of %s", f->name);
    ck_assert_msg(cJSON_IsNumber(max) && max->valuedouble == f->max, "the maximum of %s", f->name);
}

static bool fits_kind(const struct api_field *f, const cJSON *schema)
{
    const cJSON *target = get(schema, "$ref");

    switch (f->kind) {
    case FIELD_INT:
    case FIELD_SEED:    return has_type(schema, "integer");
    case FIELD_NUMBER:  return has_type(schema, "number");
    case FIELD_BOOL:    return has_type(schema, "boolean");
    case FIELD_STRING:  return has_type(schema, "string") || get(schema, "enum");
    case FIELD_IGNORED: return target && strstr(target->valuestring, "/Ignored");
    case FIELD_ANY:     return true;
    }
    return false;
}

START_TEST(every_field_and_no_other)
{
    enum api_endpoint endpoint = bodies[_i].endpoint;
    const cJSON *schema = get(get(get(document, "components"), "schemas"), bodies[_i].schema);
    const cJSON *properties = get(schema, "properties");
    const struct api_field *fields;
    size_t n_fields;
    int n = 0;

    fields = api_field_table(&n_fields);
    for (size_t i = 0; i < n_fields; i++) {
        const struct api_field *f = &fields[i];
        if (!api_field_is_of(f, endpoint))
            continue;
        const cJSON *property = get(properties, f->name);
        ck_assert_msg(property, "%s of %s is not described", f->name, bodies[_i].path);
        ck_assert_msg(fits_kind(f, property), "the type of %s", f->name);
        if (f->kind == FIELD_INT || f->kind == FIELD_NUMBER)
            check_bounds(f, property, endpoint == API_CHAT);
        n++;
    }
    ck_assert_int_gt(n, 0);
    ck_assert_int_eq(cJSON_GetArraySize(properties), n);
    ck_assert(cJSON_IsFalse(get(schema, "additionalProperties")));
}
END_TEST

START_TEST(bodies_are_those_schemas)
{
    const cJSON *post = get(get(get(document, "paths"), bodies[_i].path), "post");
    const cJSON *content = get(get(post, "requestBody"), "content");
    const cJSON *target = get(get(get(content, "application/json"), "schema"), "$ref");
    char want[64];

    ck_assert(cJSON_IsString(target));
    snprintf(want, sizeof want, "#/components/schemas/%s", bodies[_i].schema);
    ck_assert_str_eq(target->valuestring, want);
}
END_TEST

/* ---- errors */

static bool has_value(const cJSON *schema, const char *want)
{
    const cJSON *v, *list = get(schema, "enum");

    cJSON_ArrayForEach(v, list)
        if (want ? cJSON_IsString(v) && strcmp(v->valuestring, want) == 0 : cJSON_IsNull(v))
            return true;
    return false;
}

START_TEST(every_refusal)
{
    const cJSON *schema = get(get(get(document, "components"), "schemas"), "Error");
    const cJSON *members = get(get(get(schema, "properties"), "error"), "properties");
    struct api_error err;

    for (int why = REFUSE_LOADING; why <= REFUSE_STRUCTURE; why++) {
        refusal_error(&err, why, NULL);
        ck_assert_msg(has_value(get(members, "type"), err.type), "the type of: %s", err.message);
        ck_assert_msg(has_value(get(members, "code"), err.code), "the code of: %s", err.message);
    }
}
END_TEST

TCase *openapi_case(void)
{
    TCase *tc = tcase_create("openapi");

    tcase_add_checked_fixture(tc, parse_document, drop_document);
    tcase_add_test(tc, every_route_and_no_other);
    tcase_add_loop_test(tc, every_field_and_no_other, 0, N_BODIES);
    tcase_add_loop_test(tc, bodies_are_those_schemas, 0, N_BODIES);
    tcase_add_test(tc, every_refusal);
    return tc;
}
