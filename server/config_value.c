#include "server/config_value.h"

#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"
#include "server/config.h"

#include <stdio.h>
#include <string.h>

enum { MAX_VALUE_BYTES = 4096 };

_Static_assert(sizeof(size_t) == sizeof(uint64_t), "sizes share the type of 64-bit options");
_Static_assert(sizeof(enum log_level) == sizeof(int), "choices are stored as int");

struct unit {
    const char *name;
    uint64_t factor;
};

static const struct unit no_units[] = { { "", 1 }, { NULL, 0 } };
static const struct unit byte_units[] = {
    { "tb", 1ull << 40 },
    { "gb", 1ull << 30 },
    { "mb", 1ull << 20 },
    { "kb", 1ull << 10 },
    { "", 1 },
    { NULL, 0 },
};
static const struct unit time_units[] = {
    { "s", 1000 },
    { "ms", 1 },
    { "m", 60000 },
    { NULL, 0 },
};

static const struct unit *units_of(const struct option *o)
{
    return o->type == OPTION_BYTES ? byte_units : o->type == OPTION_MS ? time_units : no_units;
}

/* Decimal digits and one of the units.  Zero needs no unit. */
static bool number_parse(uint64_t *out, const char *text, const struct unit *units)
{
    uint64_t value = 0;
    const char *at = text;

    for (; *at >= '0' && *at <= '9'; at++)
        if (__builtin_mul_overflow(value, 10u, &value) ||
            __builtin_add_overflow(value, (uint64_t)(*at - '0'), &value))
            return false;
    if (at == text)
        return false;
    *out = 0;
    if (value == 0 && *at == '\0')
        return true;
    for (const struct unit *u = units; u->name; u++)
        if (strcmp(at, u->name) == 0)
            return !__builtin_mul_overflow(value, u->factor, out);
    return false;
}

/* "0.9" or "1" in thousandths. */
static bool share_parse(uint64_t *out, const char *text)
{
    uint64_t unit = 100;

    if ((text[0] != '0' && text[0] != '1') || (text[1] && text[1] != '.') ||
        (text[1] && (text[2] == '\0' || strlen(text) > 5)))
        return false;
    *out = (uint64_t)(text[0] - '0') * 1000;
    for (const char *digit = text + 2; text[1] && *digit; digit++, unit /= 10) {
        if (*digit < '0' || *digit > '9')
            return false;
        *out += (uint64_t)(*digit - '0') * unit;
    }
    return true;
}

static void share_print(struct strbuf *out, uint64_t thousandths)
{
    char text[16];
    int n = snprintf(text, sizeof text, "%u.%03u", (unsigned)(thousandths / 1000 % 10),
                     (unsigned)(thousandths % 1000));

    while (text[n - 1] == '0' && n > 3)
        n--;
    strbuf_add(out, text, (size_t)n);
}

/* The first unit of the list that divides it. */
static void number_print(struct strbuf *out, uint64_t value, const struct unit *units)
{
    const struct unit *u = units;

    while (u[1].name && (value == 0 || value % u->factor != 0))
        u++;
    strbuf_printf(out, "%llu%s", (unsigned long long)(value / u->factor), value ? u->name : "");
}

static void value_print(struct strbuf *out, const struct option *o, uint64_t value)
{
    if (o->type == OPTION_SHARE)
        share_print(out, value);
    else
        number_print(out, value, units_of(o));
}

static const char *example_of(enum option_type type)
{
    switch (type) {
    case OPTION_BYTES:
        return "a size such as 16gb, 512mb or 4096";
    case OPTION_MS:
        return "a time such as 30s, 500ms or 5m";
    case OPTION_SHARE:
        return "a share such as 0.9";
    default:
        return "a whole number";
    }
}

static enum status number_set(const struct option *o, void *at, const char *text,
                              const char *place, struct error *err)
{
    struct strbuf low = { 0 }, high = { 0 };
    enum status status = ST_OK;
    uint64_t v;

    bool ok = o->type == OPTION_SHARE ? share_parse(&v, text)
                                      : number_parse(&v, text, units_of(o));
    if (!ok)
        return error_set(err, ST_INVALID, "%s: %s is '%.80s', which is not %s", place, o->key,
                         text, example_of(o->type));
    if (v < o->min || v > o->max) {
        value_print(&low, o, o->min);
        value_print(&high, o, o->max);
        status = error_set(err, ST_INVALID, "%s: %s is '%.80s', which is not between %s and %s",
                           place, o->key, text, low.data, high.data);
        strbuf_fini(&low);
        strbuf_fini(&high);
    } else if (o->type == OPTION_U32 || o->type == OPTION_SHARE) {
        *(uint32_t *)at = (uint32_t)v;
    } else if (o->type == OPTION_INT) {
        *(int *)at = (int)v;
    } else {
        *(uint64_t *)at = v;
    }
    return status;
}

/* The number of text among "one|two|three", or -1. */
static int choice_find(const char *choices, const char *text)
{
    size_t n = strlen(text);
    int index = 0;

    for (const char *at = choices;; index++) {
        size_t length = strcspn(at, "|");
        if (length == n && memcmp(at, text, n) == 0)
            return index;
        if (at[length] == '\0')
            return -1;
        at += length + 1;
    }
}

static void choice_print(struct strbuf *out, const char *choices, int index)
{
    const char *at = choices;

    for (; index > 0; index--)
        at += strcspn(at, "|") + 1;
    strbuf_add(out, at, strcspn(at, "|"));
}

static enum status word_check(const struct option *o, const char *text, const char *place,
                              struct error *err)
{
    if (choice_find(o->choices, text) >= 0)
        return ST_OK;
    return error_set(err, ST_INVALID, "%s: %s is '%.80s', which is not one of %s", place,
                     o->key, text, o->choices);
}

/* Keys travel in a header and are compared as they are: no spaces, no controls. */
static bool secret_is_sound(const char *item, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (item[i] <= ' ' || item[i] > '~')
            return false;
    return n > 0;
}

void config_list_add(struct config_list *list, const char *item, size_t n)
{
    list->items = mem_realloc(list->items, (size_t)list->n + 1, sizeof *list->items);
    list->items[list->n++] = mem_strndup(item, n);
}

void config_list_fini(struct config_list *list)
{
    for (int i = 0; i < list->n; i++)
        mem_free(list->items[i]);
    mem_free(list->items);
    *list = (struct config_list){ 0 };
}

static enum status list_set(const struct option *o, struct config_list *at, const char *text,
                            const char *place, struct error *err)
{
    struct config_list list = { 0 };
    const char *item = text;

    while (strcmp(text, "none") != 0) {
        size_t length = strcspn(item, ","), start = strspn(item, " \t"), end = length;
        while (end > start && (item[end - 1] == ' ' || item[end - 1] == '\t'))
            end--;
        if (end <= start || (o->secret && !secret_is_sound(item + start, end - start))) {
            config_list_fini(&list);
            return error_set(err, ST_INVALID, "%s: %s has an entry that is %s", place, o->key,
                             end <= start ? "empty" : "not made of printable characters");
        }
        config_list_add(&list, item + start, end - start);
        if (item[length] == '\0')
            break;
        item += length + 1;
    }
    config_list_fini(at);
    *at = list;
    return ST_OK;
}

static enum status text_set(const struct option *o, char **at, const char *text,
                            const char *place, struct error *err)
{
    if (o->type == OPTION_WORD)
        TRY(word_check(o, text, place, err));
    mem_free(*at);
    *at = o->type == OPTION_TEXT && strcmp(text, "none") == 0 ? NULL : mem_strdup(text);
    return ST_OK;
}

static enum status bool_set(const struct option *o, bool *at, const char *text,
                            const char *place, struct error *err)
{
    bool yes = strcmp(text, "yes") == 0;

    if (!yes && strcmp(text, "no") != 0)
        return error_set(err, ST_INVALID, "%s: %s is '%.80s', which is neither yes nor no",
                         place, o->key, text);
    *at = yes;
    return ST_OK;
}

static enum status text_check(const struct option *o, const char *text, const char *place,
                              struct error *err)
{
    size_t n = strlen(text);

    if (n == 0)
        return error_set(err, ST_INVALID, "%s: %s has no value", place, o->key);
    if (n > MAX_VALUE_BYTES)
        return error_set(err, ST_INVALID, "%s: the value of %s is longer than %d bytes", place,
                         o->key, MAX_VALUE_BYTES);
    if (!utf8_is_valid(text, n))
        return error_set(err, ST_INVALID, "%s: the value of %s is not valid UTF-8", place,
                         o->key);
    for (size_t i = 0; i < n; i++)
        if (((unsigned char)text[i] < ' ' && text[i] != '\t') || text[i] == 0x7f)
            return error_set(err, ST_INVALID, "%s: the value of %s has a control character",
                             place, o->key);
    return ST_OK;
}

enum status option_set(const struct option *o, void *base, const char *text, const char *place,
                       struct error *err)
{
    void *at = (char *)base + o->offset;

    TRY(text_check(o, text, place, err));
    switch (o->type) {
    case OPTION_U32:
    case OPTION_INT:
    case OPTION_U64:
    case OPTION_BYTES:
    case OPTION_MS:
    case OPTION_SHARE:
        return number_set(o, at, text, place, err);
    case OPTION_BOOL:
        return bool_set(o, at, text, place, err);
    case OPTION_CHOICE:
        TRY(word_check(o, text, place, err));
        *(int *)at = choice_find(o->choices, text);
        return ST_OK;
    case OPTION_WORD:
    case OPTION_TEXT:
        return text_set(o, at, text, place, err);
    case OPTION_LIST:
        return list_set(o, at, text, place, err);
    }
    return ST_INVALID;
}

static void list_print(struct strbuf *out, const struct config_list *list)
{
    for (int i = 0; i < list->n; i++) {
        strbuf_puts(out, i ? "," : "");
        strbuf_puts(out, list->items[i]);
    }
    if (list->n == 0)
        strbuf_puts(out, "none");
}

void option_print(const struct option *o, const void *base, struct strbuf *out)
{
    const void *at = (const char *)base + o->offset;
    const char *text;

    if (o->secret)
        return;
    switch (o->type) {
    case OPTION_U32:
    case OPTION_SHARE:
        value_print(out, o, *(const uint32_t *)at);
        break;
    case OPTION_INT:
        number_print(out, (uint64_t) * (const int *)at, no_units);
        break;
    case OPTION_U64:
    case OPTION_BYTES:
    case OPTION_MS:
        number_print(out, *(const uint64_t *)at, units_of(o));
        break;
    case OPTION_BOOL:
        strbuf_puts(out, *(const bool *)at ? "yes" : "no");
        break;
    case OPTION_CHOICE:
        choice_print(out, o->choices, *(const int *)at);
        break;
    case OPTION_WORD:
    case OPTION_TEXT:
        text = *(const char *const *)at;
        strbuf_puts(out, text ? text : "none");
        break;
    case OPTION_LIST:
        list_print(out, at);
        break;
    }
}

void option_fini(const struct option *o, void *base)
{
    void *at = (char *)base + o->offset;

    if (o->type == OPTION_WORD || o->type == OPTION_TEXT) {
        mem_free(*(char **)at);
        *(char **)at = NULL;
    } else if (o->type == OPTION_LIST) {
        config_list_fini(at);
    }
}
