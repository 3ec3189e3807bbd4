#include "server/json_dump.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "server/json_scan.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NUMBER_BYTES = JSON_MAX_NUMBER_BYTES + 16 };

/* The containers around a node, outermost first. */
struct parents {
    const cJSON *nodes[JSON_MAX_DEPTH + 1];
    int n;
};

static void enter(struct parents *p, const cJSON *node)
{
    ASSERT(p->n <= JSON_MAX_DEPTH);
    p->nodes[p->n++] = node;
}

/* ---- numbers */

/* The shortest digits that read back as the same double, placed as Python's repr does. */
static void spell_float(char out[NUMBER_BYTES], double v)
{
    char digits[32];
    int n = 0, exponent;

    if (isinf(v)) {
        snprintf(out, NUMBER_BYTES, "%sInfinity", v < 0 ? "-" : "");
        return;
    }
    do
        snprintf(digits, sizeof digits, "%.*e", n++, v);
    while (n < 17 && strtod(digits, NULL) != v);
    const char *sign = digits[0] == '-' ? "-" : "";
    char *d = digits + (digits[0] == '-');
    exponent = (int)strtol(strchr(d, 'e') + 1, NULL, 10);
    if (n > 1)
        memmove(d + 1, d + 2, (size_t)n - 1); /* the point goes */
    d[n] = '\0';
    if (exponent < -4 || exponent >= 16)
        snprintf(out, NUMBER_BYTES, "%s%c%s%se%c%02d", sign, d[0], n > 1 ? "." : "", d + 1,
                 exponent < 0 ? '-' : '+', abs(exponent));
    else if (exponent < 0)
        snprintf(out, NUMBER_BYTES, "%s0.%.*s%s", sign, -exponent - 1, "000", d);
    else if (exponent >= n - 1)
        snprintf(out, NUMBER_BYTES, "%s%s%.*s.0", sign, d, exponent - n + 1,
                 "0000000000000000");
    else
        snprintf(out, NUMBER_BYTES, "%s%.*s.%s", sign, exponent + 1, d, d + exponent + 1);
}

static void spell_number(char out[NUMBER_BYTES], const char *s, size_t n)
{
    snprintf(out, NUMBER_BYTES, "%.*s", (int)n, s);
    if (strpbrk(out, ".eE"))
        spell_float(out, strtod(out, NULL));
    else if (strcmp(out, "-0") == 0)
        memcpy(out, "0", 2);
}

/* The next number at or behind *at, outside of strings.  There is one. */
static void next_number(const char **at, const char **start)
{
    const char *s = *at;

    while (*s != '-' && (*s < '0' || *s > '9')) {
        if (*s++ != '"')
            continue;
        for (; *s != '"'; s++)
            s += *s == '\\';
        s++;
    }
    *start = s;
    *at = s + strspn(s, "+-.0123456789eE");
}

static void keep_spelling(cJSON *node, const char *s, size_t n)
{
    char spelling[NUMBER_BYTES];

    spell_number(spelling, s, n);
    size_t bytes = strlen(spelling) + 1;
    node->valuestring = cJSON_malloc(bytes);
    ASSERT(node->valuestring);
    memcpy(node->valuestring, spelling, bytes);
    node->type = (node->type & ~0xFF) | cJSON_Raw;
}

/* ---- keys */

static int key_order(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static enum status check_keys(const cJSON *object, struct error *err)
{
    size_t n = 0, i = 0;
    enum status status = ST_OK;

    for (const cJSON *v = object->child; v; v = v->next)
        n++;
    if (n < 2)
        return ST_OK;
    const char **keys = mem_calloc(n, sizeof *keys);
    for (const cJSON *v = object->child; v; v = v->next)
        keys[i++] = v->string;
    qsort(keys, n, sizeof *keys, key_order);
    for (i = 1; i < n && status == ST_OK; i++)
        if (strcmp(keys[i], keys[i - 1]) == 0)
            status =
                error_set(err, ST_INVALID, "has the key '%.60s' twice in an object.", keys[i]);
    mem_free(keys);
    return status;
}

enum status json_dump_prepare(cJSON *root, const char *text, size_t n, struct error *err)
{
    struct parents parents = { .n = 0 };
    const char *end = text + n, *start;

    for (cJSON *node = root; node;) {
        if (cJSON_IsObject(node))
            TRY(check_keys(node, err));
        if (cJSON_IsNumber(node)) {
            next_number(&text, &start);
            ASSERT(text <= end);
            keep_spelling(node, start, (size_t)(text - start));
        }
        if (node->child) {
            enter(&parents, node);
            node = node->child;
            continue;
        }
        while (parents.n > 0 && !node->next)
            node = (cJSON *)parents.nodes[--parents.n];
        node = parents.n > 0 ? node->next : NULL;
    }
    return ST_OK;
}

/* ---- printing */

void json_dump_string(struct strbuf *out, const char *s, size_t n)
{
    static const char names[] = "\b\t\n\f\r\"\\", letters[] = "btnfr\"\\";
    size_t run = 0; /* s[run..i) is copied as it is */

    strbuf_puts(out, "\"");
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c >= 0x20 && c != '"' && c != '\\')
            continue;
        strbuf_add(out, s + run, i - run);
        run = i + 1;
        const char *name = c ? strchr(names, c) : NULL;
        if (name)
            strbuf_printf(out, "\\%c", letters[name - names]);
        else
            strbuf_printf(out, "\\u%04x", c);
    }
    strbuf_add(out, s + run, n - run);
    strbuf_puts(out, "\"");
}

static void print_string(struct strbuf *out, const char *s)
{
    json_dump_string(out, s, strlen(s));
}

static void print_open(struct strbuf *out, const cJSON *node)
{
    bool array = cJSON_IsArray(node);

    if (array || cJSON_IsObject(node))
        strbuf_puts(out, node->child ? (array ? "[" : "{") : (array ? "[]" : "{}"));
    else if (cJSON_IsString(node))
        print_string(out, node->valuestring);
    else if (cJSON_IsRaw(node))
        strbuf_puts(out, node->valuestring);
    else
        strbuf_puts(out, cJSON_IsNull(node) ? "null" : cJSON_IsTrue(node) ? "true" : "false");
}

static void print_line(struct strbuf *out, int indent, int depth)
{
    if (indent)
        strbuf_printf(out, "\n%*s", indent * depth, "");
}

void json_dump(struct strbuf *out, const cJSON *root, int indent)
{
    struct parents parents = { .n = 0 };

    for (const cJSON *node = root;;) {
        if (parents.n > 0 && cJSON_IsObject(parents.nodes[parents.n - 1])) {
            print_string(out, node->string);
            strbuf_puts(out, ": ");
        }
        print_open(out, node);
        if (node->child) {
            enter(&parents, node);
            print_line(out, indent, parents.n);
            node = node->child;
            continue;
        }
        while (parents.n > 0 && !node->next) {
            node = parents.nodes[--parents.n];
            print_line(out, indent, parents.n);
            strbuf_puts(out, cJSON_IsArray(node) ? "]" : "}");
        }
        if (parents.n == 0)
            return;
        strbuf_puts(out, indent ? "," : ", ");
        print_line(out, indent, parents.n);
        node = node->next;
    }
}
