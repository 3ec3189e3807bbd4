#include "engine/grammar/schema_ref.h"

#include "engine/grammar/grammar.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_POINTER_BYTES = 1000,
    MAX_SCHEMAS = 4,             /* of which each stands for the next; it is searched for */
};

/* The next name of a pointer, with its escapes undone; *at moves behind it. */
static bool take_name(const char **at, char out[MAX_POINTER_BYTES])
{
    size_t n = 0;

    for (++*at; **at && **at != '/'; ++*at) {
        char c = **at;
        if (c == '~') {
            ++*at;
            if (**at != '0' && **at != '1')
                return false;
            c = **at == '0' ? '~' : '/';
        }
        out[n++] = c;
    }
    out[n] = '\0';
    return true;
}

static const cJSON *child_of(const cJSON *parent, const char *name)
{
    char *end;

    if (!cJSON_IsArray(parent))
        return cJSON_GetObjectItemCaseSensitive(parent, name);
    long i = strtol(name, &end, 10);
    return *name && !*end && i >= 0 && i <= INT32_MAX ? cJSON_GetArrayItem(parent, (int)i) : NULL;
}

const char *schema_ref_find(const cJSON *root, const cJSON *ref, const cJSON **out)
{
    const char *at = cJSON_IsString(ref) ? ref->valuestring : "";
    char name[MAX_POINTER_BYTES];

    if (at[0] != '#' || (at[1] && at[1] != '/'))
        return "does not point into the schema itself, as in \"#/$defs/x\"";
    if (strlen(at) >= MAX_POINTER_BYTES || strchr(at, '%'))
        return "is too long or has an escape with '%'";
    *out = root;
    for (at++; *at && *out;)
        *out = take_name(&at, name) ? child_of(*out, name) : NULL;
    return cJSON_IsObject(*out) || cJSON_IsBool(*out) ? NULL : "points to no schema";
}

bool grammar_schema_is_string(const cJSON *root, const cJSON *schema)
{
    static const char *const lists[] = { "anyOf", "oneOf", "allOf" };
    const cJSON *at = NULL, *to = schema;

    for (int n = 0; to && n < MAX_SCHEMAS; n++) {
        at = to;
        to = NULL;
        const cJSON *ref = cJSON_GetObjectItemCaseSensitive(at, "$ref");
        if (ref && schema_ref_find(root, ref, &to) != NULL)
            return false;
        for (size_t i = 0; !ref && i < sizeof lists / sizeof lists[0]; i++) {
            const cJSON *list = cJSON_GetObjectItemCaseSensitive(at, lists[i]);
            if (list && list->child && !list->child->next)
                to = list->child;
        }
    }
    if (to)
        return false;
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(at, "type");
    const cJSON *only = cJSON_IsArray(type) && type->child && !type->child->next ? type->child
                                                                                 : type;
    if (type)
        return cJSON_IsString(only) && strcmp(only->valuestring, "string") == 0;
    const cJSON *values = cJSON_GetObjectItemCaseSensitive(at, "enum");
    const cJSON *v = cJSON_IsArray(values) ? values->child : NULL;
    if (!v)
        return cJSON_IsString(cJSON_GetObjectItemCaseSensitive(at, "const"));
    while (v && cJSON_IsString(v))
        v = v->next;
    return !v;
}
