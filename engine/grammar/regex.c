#include "engine/grammar/regex.h"

#include "engine/base/mem.h"
#include "engine/base/utf8.h"
#include "engine/grammar/json_text.h"
#include "engine/grammar/raw_text.h"

#include <string.h>

/* Parsed into a tree by recursive descent, no deeper than REGEX_MAX_NESTING groups, and from that
 * emitted from its end to its beginning. */

enum tree_kind { CHARACTERS, SEQUENCE, CHOICE, REPEAT };

struct tree {
    enum tree_kind kind;
    struct char_set set;         /* CHARACTERS */
    int min, max;                /* REPEAT; max -1: no limit */
    struct tree *first, *last;   /* parts */
    struct tree *before;         /* its left neighbour */
    struct tree *made_before;    /* in the parser's list of all */
};

struct parser {
    const char *text, *at, *end;
    int nesting;
    struct tree *trees;
    struct nfa *graph;
    enum regex_where where;
    struct error *err;
};

static struct tree *make(struct parser *p, enum tree_kind kind)
{
    struct tree *t = mem_calloc(1, sizeof *t);

    t->kind = kind;
    t->made_before = p->trees;
    p->trees = t;
    return t;
}

static void add_part(struct tree *t, struct tree *part)
{
    part->before = t->last;
    t->last = part;
    if (!t->first)
        t->first = part;
}

static enum status refuse(struct parser *p, const char *what)
{
    return error_set(p->err, ST_INVALID, "has %s at byte %zu", what,
                     (size_t)(p->at - p->text));
}

static enum status unsupported(struct parser *p, const char *what)
{
    return error_set(p->err, ST_INVALID, "has %s at byte %zu, which is not supported", what,
                     (size_t)(p->at - p->text));
}

static bool next_is(const struct parser *p, const char *s)
{
    size_t n = strlen(s);

    return (size_t)(p->end - p->at) >= n && memcmp(p->at, s, n) == 0;
}

static bool skip(struct parser *p, const char *s)
{
    bool there = next_is(p, s);

    if (there)
        p->at += strlen(s);
    return there;
}

/* The text is valid UTF-8. */
static uint32_t take_character(struct parser *p)
{
    unsigned char c = (unsigned char)*p->at++;

    if (c < 0x80)
        return c;
    int more = c >= 0xF0 ? 3 : c >= 0xE0 ? 2 : 1;
    uint32_t value = c & (0x3Fu >> more);
    while (more-- > 0)
        value = value << 6 | ((unsigned char)*p->at++ & 0x3F);
    return value;
}

/* ---- escapes */

static void add_digits(struct char_set *s)
{
    char_set_add(s, '0', '9');
}

static void add_word(struct char_set *s)
{
    add_digits(s);
    char_set_add(s, 'A', 'Z');
    char_set_add(s, 'a', 'z');
    char_set_add(s, '_', '_');
}

static void add_space(struct char_set *s)
{
    char_set_add(s, '\t', '\r');
    char_set_add(s, ' ', ' ');
}

/* The letters of \d and the like; false if c is none. */
static bool add_named(struct char_set *out, char c)
{
    struct char_set s = { 0 };
    char lower = (char)(c | 0x20);

    if (lower == 'd')
        add_digits(&s);
    else if (lower == 'w')
        add_word(&s);
    else if (lower == 's')
        add_space(&s);
    else
        return false;
    char_set_normalise(&s);
    if (c != lower)
        char_set_invert(&s);
    char_set_add_all(out, &s);
    char_set_fini(&s);
    return true;
}

static int hex_value(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c = (char)(c | 0x20);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* least to most digits. */
static enum status read_hex(struct parser *p, int least, int most, uint32_t *out)
{
    int n = 0;

    *out = 0;
    for (; n < most && p->at < p->end && hex_value(*p->at) >= 0; n++)
        *out = *out * 16 + (uint32_t)hex_value(*p->at++);
    if (n < least)
        return refuse(p, "too few hexadecimal digits");
    if (*out > MAX_CODE_POINT || (*out >= 0xD800 && *out <= 0xDFFF))
        return refuse(p, "a number that is no character");
    return ST_OK;
}

static enum status read_unicode(struct parser *p, uint32_t *out)
{
    if (!skip(p, "{"))
        return read_hex(p, 4, 4, out);
    TRY(read_hex(p, 1, 6, out));
    return skip(p, "}") ? ST_OK : refuse(p, "an escape without its closing brace");
}

/* Behind the backslash: a single character. */
static enum status read_escape(struct parser *p, uint32_t *out)
{
    static const char letters[] = "ntrfv0", values[] = "\n\t\r\f\v";
    char c = *p->at;
    const char *letter = strchr(letters, c);

    if (c >= '1' && c <= '9')
        return unsupported(p, "a back reference");
    if (c == 'k')
        return unsupported(p, "a named back reference");
    if (c == 'b' || c == 'B')
        return unsupported(p, "a word boundary");
    if (c == 'A' || c == 'Z' || c == 'z' || c == 'G')
        return unsupported(p, "an anchor");
    if (c == 'p' || c == 'P')
        return unsupported(p, "a Unicode property");
    if (c == '0' && p->end - p->at > 1 && p->at[1] >= '0' && p->at[1] <= '9')
        return unsupported(p, "an octal number");
    if (c && letter) {
        p->at++;
        *out = (unsigned char)values[letter - letters];
        return ST_OK;
    }
    if (skip(p, "x"))
        return read_hex(p, 2, 2, out);
    if (skip(p, "u"))
        return read_unicode(p, out);
    if ((unsigned char)c >= 0x80 || (c >= '0' && c <= '9') ||
        ((c | 0x20) >= 'a' && (c | 0x20) <= 'z'))
        return unsupported(p, "an escape of a letter without a meaning");
    p->at++;
    *out = (unsigned char)c;
    return ST_OK;
}

/* ---- classes */

/* One end of a range, or all of \d and the like: then *single is false. */
static enum status read_class_item(struct parser *p, struct char_set *set, uint32_t *c,
                                   bool *single)
{
    *single = true;
    if (next_is(p, "[:") || next_is(p, "[.") || next_is(p, "[="))
        return unsupported(p, "a named class");
    if (!skip(p, "\\")) {
        *c = take_character(p);
        return ST_OK;
    }
    if (p->at == p->end)
        return refuse(p, "a backslash at its end");
    if (add_named(set, *p->at)) {
        p->at++;
        *single = false;
        return ST_OK;
    }
    if (skip(p, "b")) {          /* in a class everybody's \b is a backspace */
        *c = '\b';
        return ST_OK;
    }
    return read_escape(p, c);
}

static enum status read_class_items(struct parser *p, struct char_set *set)
{
    for (bool first = true; !next_is(p, "]") || first; first = false) {
        uint32_t lo, hi;
        bool single;
        if (p->at == p->end)
            return refuse(p, "a class without its closing bracket");
        if (first && next_is(p, "]"))
            return unsupported(p, "an empty class, or a bracket that is not escaped in one");
        TRY(read_class_item(p, set, &lo, &single));
        bool range = next_is(p, "-") && p->end - p->at > 1 && p->at[1] != ']';
        if (!single && range)
            return refuse(p, "a range that begins with a class");
        if (!range) {
            if (single)
                char_set_add(set, lo, lo);
            continue;
        }
        p->at++;
        TRY(read_class_item(p, set, &hi, &single));
        if (!single || hi < lo)
            return refuse(p, "a range whose end is no later character");
        char_set_add(set, lo, hi);
    }
    return ST_OK;
}

static enum status read_class(struct parser *p, struct tree **out)
{
    struct tree *t = *out = make(p, CHARACTERS);
    bool inverted = skip(p, "^");

    TRY(read_class_items(p, &t->set));
    p->at++;
    char_set_normalise(&t->set);
    if (inverted)
        char_set_invert(&t->set);
    return ST_OK;
}

/* ---- the rest */

static enum status read_choice(struct parser *p, struct tree **out);

static enum status read_group_name(struct parser *p)
{
    const char *name = p->at;

    while (p->at < p->end && (*p->at == '_' || (*p->at >= '0' && *p->at <= '9') ||
                              ((*p->at | 0x20) >= 'a' && (*p->at | 0x20) <= 'z')))
        p->at++;
    if (p->at == name || !skip(p, ">"))
        return refuse(p, "a group without a proper name");
    return ST_OK;
}

/* Behind the opening parenthesis. */
static enum status read_group(struct parser *p, struct tree **out)
{
    if (next_is(p, "?=") || next_is(p, "?!"))
        return unsupported(p, "a look-ahead");
    if (next_is(p, "?<=") || next_is(p, "?<!"))
        return unsupported(p, "a look-behind");
    if (next_is(p, "?>"))
        return unsupported(p, "an atomic group");
    if (next_is(p, "?P="))
        return unsupported(p, "a named back reference");
    if (next_is(p, "?("))
        return unsupported(p, "a condition");
    if (skip(p, "?P<") || skip(p, "?<"))
        TRY(read_group_name(p));
    else if (!skip(p, "?:") && next_is(p, "?"))
        return unsupported(p, "an inline flag or comment");
    if (++p->nesting > REGEX_MAX_NESTING)
        return error_set(p->err, ST_INVALID, "has groups nested more than %d deep",
                         REGEX_MAX_NESTING);
    TRY(read_choice(p, out));
    p->nesting--;
    return skip(p, ")") ? ST_OK : refuse(p, "a group without its closing parenthesis");
}

static enum status read_atom(struct parser *p, struct tree **out)
{
    uint32_t c;

    if (skip(p, "("))
        return read_group(p, out);
    if (skip(p, "["))
        return read_class(p, out);
    if (strchr("?*+", *p->at) && *p->at)
        return refuse(p, "nothing to repeat");
    if (*p->at == '{')
        return refuse(p, "a brace that begins no repeat; write \\{ for the character");
    if (*p->at == '^' || *p->at == '$')
        return unsupported(p, "an anchor that is not at an end of the whole pattern");
    struct tree *t = *out = make(p, CHARACTERS);
    if (skip(p, ".")) {
        char_set_add(&t->set, '\n', '\n');
        char_set_invert(&t->set);
        return ST_OK;
    }
    if (skip(p, "\\")) {
        if (p->at == p->end)
            return refuse(p, "a backslash at its end");
        if (add_named(&t->set, *p->at)) {
            p->at++;
            char_set_normalise(&t->set);
            return ST_OK;
        }
        TRY(read_escape(p, &c));
    } else {
        c = take_character(p);
    }
    char_set_add(&t->set, c, c);
    return ST_OK;
}

/* A number of at most REGEX_MAX_REPEAT; -1 if there are no digits. */
static enum status read_count(struct parser *p, int *out)
{
    *out = -1;
    while (p->at < p->end && *p->at >= '0' && *p->at <= '9') {
        *out = (*out < 0 ? 0 : *out) * 10 + (*p->at++ - '0');
        if (*out > REGEX_MAX_REPEAT)
            return error_set(p->err, ST_INVALID, "repeats more than %d times",
                             REGEX_MAX_REPEAT);
    }
    return ST_OK;
}

static enum status read_counts(struct parser *p, int *min, int *max)
{
    TRY(read_count(p, min));
    *max = *min;
    if (skip(p, ",")) {
        TRY(read_count(p, max));
        if (*min < 0 && *max < 0)
            return refuse(p, "a repeat without numbers");
        if (*min < 0)
            *min = 0;
    }
    if (*min < 0 || !skip(p, "}"))
        return refuse(p, "a brace that begins no repeat; write \\{ for the character");
    if (*max >= 0 && *max < *min)
        return refuse(p, "a repeat whose numbers are in the wrong order");
    return ST_OK;
}

static enum status read_repeats(struct parser *p, struct tree **out)
{
    int min = 0, max = -1;

    TRY(read_atom(p, out));
    if (skip(p, "?"))
        max = 1;
    else if (skip(p, "+"))
        min = 1;
    else if (skip(p, "{"))
        TRY(read_counts(p, &min, &max));
    else if (!skip(p, "*"))
        return ST_OK;
    if (next_is(p, "+"))
        return unsupported(p, "a possessive repeat");
    skip(p, "?");
    if (p->at < p->end && strchr("?*+{", *p->at) && *p->at)
        return refuse(p, "a repeat of a repeat");
    struct tree *t = make(p, REPEAT);
    t->min = min;
    t->max = max;
    add_part(t, *out);
    *out = t;
    return ST_OK;
}

static enum status read_sequence(struct parser *p, struct tree **out)
{
    struct tree *sequence = *out = make(p, SEQUENCE), *part;

    while (p->at < p->end && *p->at != '|' && *p->at != ')') {
        TRY(read_repeats(p, &part));
        add_part(sequence, part);
    }
    return ST_OK;
}

static enum status read_choice(struct parser *p, struct tree **out)
{
    struct tree *choice = *out = make(p, CHOICE), *part;

    do {
        TRY(read_sequence(p, &part));
        add_part(choice, part);
    } while (skip(p, "|"));
    return ST_OK;
}

/* ---- emitting */

static nfa_at emit(struct parser *p, const struct tree *t, nfa_at next);

static nfa_at emit_characters(struct parser *p, const struct char_set *set, nfa_at next)
{
    switch (p->where) {
    case REGEX_WHOLE_TEXT:  return char_set_emit(p->graph, set, next);
    case REGEX_JSON_STRING: return json_text_characters(p->graph, set, next);
    case REGEX_RAW_STRING:  return raw_text_characters(p->graph, set, next);
    }
    return NFA_NOTHING;
}

/* Where a part may be left out, what follows it may come at once. */
static nfa_at emit_repeat(struct parser *p, const struct tree *t, nfa_at next)
{
    struct nfa *g = p->graph;
    nfa_at at = next, before;

    if (t->max < 0) {
        at = nfa_reserve(g);
        nfa_split(g, at, emit(p, t->first, at), next);
    }
    /* What adds nothing once adds nothing again: repeats of the empty text end there. */
    for (int i = t->min; i < t->max; i++) {
        before = at;
        at = nfa_either(g, emit(p, t->first, at), next);
        if (at == before || g->too_large)
            break;
    }
    for (int i = 0; i < t->min; i++) {
        before = at;
        at = emit(p, t->first, at);
        if (at == before || g->too_large)
            break;
    }
    return at;
}

static nfa_at emit(struct parser *p, const struct tree *t, nfa_at next)
{
    nfa_at all = NFA_NOTHING;

    switch (t->kind) {
    case CHARACTERS:
        return emit_characters(p, &t->set, next);
    case SEQUENCE:
        for (const struct tree *part = t->last; part; part = part->before)
            next = emit(p, part, next);
        return next;
    case CHOICE:
        for (const struct tree *part = t->last; part; part = part->before)
            all = nfa_either(p->graph, emit(p, part, next), all);
        return all;
    case REPEAT:
        return emit_repeat(p, t, next);
    }
    return NFA_NOTHING;
}

/* Any number of any characters, then next. */
static nfa_at anything(struct parser *p, nfa_at next)
{
    struct char_set all = { 0 };
    nfa_at loop = nfa_reserve(p->graph);

    char_set_invert(&all);
    nfa_split(p->graph, loop, emit_characters(p, &all, loop), next);
    char_set_fini(&all);
    return loop;
}

static bool ends_with_anchor(const struct parser *p)
{
    const char *dollar = p->end - 1, *at = dollar;

    if (p->at == p->end || *dollar != '$')
        return false;
    while (at > p->at && at[-1] == '\\')
        at--;
    return (dollar - at) % 2 == 0;
}

/* Whether | stands outside of all groups: there ^ and $ belong to one side alone. */
static bool is_choice(const struct tree *t)
{
    return t->kind == CHOICE && t->first != t->last;
}

static enum status read_whole(struct parser *p, nfa_at next, nfa_at *start)
{
    bool from_start = skip(p, "^"), to_end = ends_with_anchor(p);
    struct tree *t;

    if (to_end)
        p->end--;
    TRY(read_choice(p, &t));
    if (p->at < p->end)
        return refuse(p, "a closing parenthesis without a group");
    if (is_choice(t) && (from_start || to_end))
        return error_set(p->err, ST_INVALID, "has an anchor on one side of '|' alone, which is not "
                         "supported; put the choice in a group");
    bool anywhere = p->where != REGEX_WHOLE_TEXT;
    if (anywhere && !to_end)
        next = anything(p, next);
    *start = emit(p, t, next);
    if (anywhere && !from_start)
        *start = anything(p, *start);
    return ST_OK;
}

enum status regex_emit(struct nfa *g, const char *pattern, size_t n, enum regex_where where,
                       nfa_at next, nfa_at *start, struct error *err)
{
    struct parser p = { .text = pattern, .at = pattern, .end = pattern + n, .graph = g,
                        .where = where, .err = err };

    *start = NFA_NOTHING;
    if (n > REGEX_MAX_BYTES)
        return error_set(err, ST_INVALID, "is longer than %d bytes", REGEX_MAX_BYTES);
    if (!utf8_is_valid(pattern, n))
        return error_set(err, ST_INVALID, "is not valid UTF-8");
    enum status st = read_whole(&p, next, start);
    for (struct tree *t = p.trees, *before; t; t = before) {
        before = t->made_before;
        char_set_fini(&t->set);
        mem_free(t);
    }
    return st;
}
