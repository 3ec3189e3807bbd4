#include "engine/grammar/json_text.h"

#include "engine/base/invariant.h"

#include <stdio.h>
#include <string.h>

/* ---- space */

nfa_at json_text_space(struct nfa *g, const struct json_rules *r, nfa_at next)
{
    return nfa_call(g, r->space, next);
}

static nfa_at space_rule(struct nfa *g)
{
    nfa_at indent = NFA_RETURN;

    for (int i = 0; i < JSON_MAX_INDENT; i++)
        indent = nfa_either(g, nfa_text(g, " ", indent), NFA_RETURN);
    return nfa_either(g, NFA_RETURN, nfa_either(g, nfa_text(g, " ", NFA_RETURN),
                                                nfa_text(g, "\n", indent)));
}

/* ---- strings */

static void add_range(struct byte_set *s, char lo, char hi)
{
    byte_set_add(s, (unsigned char)lo, (unsigned char)hi);
}

static nfa_at hex_digits(struct nfa *g, int n, nfa_at next)
{
    struct byte_set hex = { { 0 } };

    add_range(&hex, '0', '9');
    add_range(&hex, 'A', 'F');
    add_range(&hex, 'a', 'f');
    while (n-- > 0)
        next = nfa_set(g, &hex, next);
    return next;
}

/* n of them, not all 0. */
static nfa_at hex_but_zero(struct nfa *g, int n, nfa_at next)
{
    struct byte_set hex = { { 0 } };
    nfa_at all = NFA_NOTHING;

    add_range(&hex, '1', '9');
    add_range(&hex, 'A', 'F');
    add_range(&hex, 'a', 'f');
    for (int i = 0; i < n; i++)
        all = nfa_either(g, nfa_set(g, &hex, hex_digits(g, i, next)), nfa_text(g, "0", all));
    return all;
}

/* \uD8.. to \uDF..: only as a pair is it a character. */
static nfa_at surrogate(struct nfa *g, const char *third, nfa_at next)
{
    struct byte_set d = { { 0 } }, set = { { 0 } };

    add_range(&d, 'D', 'D');
    add_range(&d, 'd', 'd');
    for (const char *c = third; *c; c++)
        add_range(&set, *c, *c);
    next = nfa_set(g, &d, nfa_set(g, &set, hex_digits(g, 2, next)));
    return nfa_text(g, "\\u", next);
}

static nfa_at escape(struct nfa *g, nfa_at next)
{
    struct byte_set simple = { { 0 } }, other = { { 0 } }, d = { { 0 } };

    for (const char *c = "\"\\/bfnrt"; *c; c++)
        add_range(&simple, *c, *c);
    add_range(&other, '1', '9');
    add_range(&other, 'A', 'C');
    add_range(&other, 'E', 'F');
    add_range(&other, 'a', 'c');
    add_range(&other, 'e', 'f');
    add_range(&d, 'D', 'D');
    add_range(&d, 'd', 'd');
    nfa_at plain = nfa_either(g, nfa_set(g, &other, hex_digits(g, 3, next)),
                              nfa_text(g, "0", hex_but_zero(g, 3, next)));
    nfa_at below = nfa_set(g, &d, nfa_range(g, '0', '7', hex_digits(g, 2, next)));
    nfa_at pair = surrogate(g, "89ABab", surrogate(g, "CDEFcdef", next));
    nfa_at unicode = nfa_text(g, "u", nfa_either(g, plain, below));
    nfa_at one = nfa_text(g, "\\", nfa_either(g, nfa_set(g, &simple, next), unicode));
    return nfa_either(g, one, pair);
}

static void add_plain(struct char_set *s)
{
    char_set_add(s, ' ', '!');
    char_set_add(s, '#', '[');
    char_set_add(s, ']', MAX_CODE_POINT);
    char_set_normalise(s);
}

static nfa_at any_character(struct nfa *g, nfa_at next)
{
    struct char_set plain = { 0 };

    add_plain(&plain);
    next = nfa_either(g, char_set_emit(g, &plain, next), escape(g, next));
    char_set_fini(&plain);
    return next;
}

/* A character that must not stand there as it is. */
static nfa_at escaped(struct nfa *g, uint32_t c, nfa_at next)
{
    static const char short_of[] = "\"\\\b\f\n\r\t", letters[] = "\"\\bfnrt";
    const char *at = strchr(short_of, (int)c);
    char text[8];

    if (at)
        snprintf(text, sizeof text, "\\%c", letters[at - short_of]);
    else
        snprintf(text, sizeof text, "\\u%04x", c);
    return nfa_text(g, text, next);
}

nfa_at json_text_characters(struct nfa *g, const struct char_set *set, nfa_at next)
{
    struct char_set plain = { 0 };
    nfa_at all = NFA_NOTHING;

    char_set_clip(set, ' ', '!', &plain);
    char_set_clip(set, '#', '[', &plain);
    char_set_clip(set, ']', MAX_CODE_POINT, &plain);
    all = char_set_emit(g, &plain, next);
    for (uint32_t c = 1; c <= '\\'; c++)
        if ((c < ' ' || c == '"' || c == '\\') && char_set_has(set, c))
            all = nfa_either(g, escaped(g, c, next), all);
    char_set_fini(&plain);
    return all;
}

nfa_at json_text_string(struct nfa *g, const struct json_rules *r, int min, int max, nfa_at next)
{
    nfa_at end = nfa_text(g, "\"", next), at = end;

    if (max == JSON_ANY_LENGTH) {
        at = nfa_reserve(g);
        nfa_split(g, at, any_character(g, at), end);
        max = min;
    }
    /* Of counted ones each is a call: as a copy it would take thirty nodes. */
    for (int i = min; i < max && !g->too_large; i++)
        at = nfa_either(g, nfa_call(g, r->character, at), end);
    for (int i = 0; i < min && !g->too_large; i++)
        at = nfa_call(g, r->character, at);
    return nfa_text(g, "\"", at);
}

nfa_at json_text_literal(struct nfa *g, const char *utf8, nfa_at next)
{
    next = nfa_text(g, "\"", next);
    for (size_t n = strlen(utf8); n-- > 0;) {
        unsigned char c = (unsigned char)utf8[n];
        next = c < ' ' || c == '"' || c == '\\' ? escaped(g, c, next)
                                                 : nfa_bytes(g, utf8 + n, 1, next);
    }
    return nfa_text(g, "\"", next);
}

/* ---- numbers */

/* min to max digits. */
static nfa_at digits(struct nfa *g, int min, int max, nfa_at next)
{
    nfa_at at = next;

    for (int i = min; i < max; i++)
        at = nfa_either(g, nfa_range(g, '0', '9', at), next);
    for (int i = 0; i < min; i++)
        at = nfa_range(g, '0', '9', at);
    return at;
}

static nfa_at minus_or_not(struct nfa *g, nfa_at next)
{
    return nfa_either(g, nfa_text(g, "-", next), next);
}

static nfa_at unsigned_integer(struct nfa *g, nfa_at next)
{
    return nfa_either(g, nfa_text(g, "0", next),
                      nfa_range(g, '1', '9', digits(g, 0, JSON_MAX_DIGITS - 1, next)));
}

static nfa_at fraction_or_not(struct nfa *g, nfa_at next)
{
    return nfa_either(g, next, nfa_text(g, ".", digits(g, 1, JSON_MAX_DIGITS, next)));
}

nfa_at json_text_number(struct nfa *g, nfa_at next)
{
    struct byte_set e = { { 0 } }, sign = { { 0 } };

    add_range(&e, 'E', 'E');
    add_range(&e, 'e', 'e');
    add_range(&sign, '+', '+');
    add_range(&sign, '-', '-');
    nfa_at power = digits(g, 1, 2, next);
    nfa_at exponent = nfa_set(g, &e, nfa_either(g, nfa_set(g, &sign, power), power));
    return minus_or_not(g, unsigned_integer(g, fraction_or_not(g, nfa_either(g, next, exponent))));
}

/* The n digits of a number from lo to hi, which have as many. */
static nfa_at same_length(struct nfa *g, const char *lo, const char *hi, int n, nfa_at next)
{
    char low[JSON_MAX_DIGITS + 1], high[JSON_MAX_DIGITS + 1];
    nfa_at all = NFA_NOTHING;

    if (n == 0)
        return next;
    memset(low, '0', sizeof low);
    memset(high, '9', sizeof high);
    if (memcmp(lo, low, (size_t)n) == 0 && memcmp(hi, high, (size_t)n) == 0)
        return digits(g, n, n, next);
    if (*lo == *hi)
        return nfa_bytes(g, lo, 1, same_length(g, lo + 1, hi + 1, n - 1, next));
    all = nfa_bytes(g, lo, 1, same_length(g, lo + 1, high, n - 1, next));
    all = nfa_either(g, nfa_bytes(g, hi, 1, same_length(g, low, hi + 1, n - 1, next)), all);
    if (*hi - *lo >= 2)
        all = nfa_either(g, nfa_range(g, (unsigned char)*lo + 1u, (unsigned char)*hi - 1u,
                                      digits(g, n - 1, n - 1, next)), all);
    return all;
}

/* 0 <= lo; none if hi < lo. */
static nfa_at between(struct nfa *g, int64_t lo, int64_t hi, nfa_at next)
{
    nfa_at all = NFA_NOTHING;
    char low[24], high[24];
    int64_t from = 1;            /* the least number of n digits, but for 0 */

    if (lo == 0 && hi >= 0)
        all = nfa_text(g, "0", next);
    for (int n = 1; n <= JSON_MAX_DIGITS; n++, from *= 10) {
        int64_t a = lo > from ? lo : from, b = hi < from * 10 - 1 ? hi : from * 10 - 1;
        if (a > b)
            continue;
        snprintf(low, sizeof low, "%lld", (long long)a);
        snprintf(high, sizeof high, "%lld", (long long)b);
        all = nfa_either(g, same_length(g, low, high, n, next), all);
    }
    return all;
}

/* From lo >= 0 to hi, with a fraction or not. */
static nfa_at with_fraction(struct nfa *g, int64_t lo, bool above, int64_t hi, bool below,
                            nfa_at next)
{
    nfa_at zeros = nfa_either(g, next, nfa_text(g, ".0", next));
    nfa_at more = NFA_NOTHING, all;

    if (hi < lo)
        return NFA_NOTHING;
    if (lo == hi)
        return above || below ? NFA_NOTHING : between(g, lo, lo, zeros);
    for (int i = JSON_MAX_DIGITS - 1; i >= 0; i--) {     /* a fraction that is not 0 */
        nfa_at rest = digits(g, 0, JSON_MAX_DIGITS - 1 - i, next);
        more = nfa_either(g, nfa_range(g, '1', '9', rest), nfa_text(g, "0", more));
    }
    more = nfa_text(g, ".", more);
    all = above ? between(g, lo, lo, more) : between(g, lo, lo, fraction_or_not(g, next));
    all = nfa_either(g, between(g, lo + 1, hi - 1, fraction_or_not(g, next)), all);
    return below ? all : nfa_either(g, between(g, hi, hi, zeros), all);
}

/* The part below zero is the part above, mirrored; -0 is left out. */
nfa_at json_text_bounded(struct nfa *g, const struct json_bounds *b, nfa_at next)
{
    int64_t low = b->max < 0 ? -b->max : 0, high = -b->min;
    int64_t from = b->min > 0 ? b->min : 0;
    nfa_at positive, negative = NFA_NOTHING;

    if (b->integer) {
        positive = between(g, from, b->max, next);
        negative = between(g, low > 0 ? low : 1, high, next);
    } else {
        positive = with_fraction(g, from, b->above_min && b->min >= 0, b->max, b->below_max, next);
        if (b->min < 0)
            negative = with_fraction(g, low, low == 0 || b->below_max, high, b->above_min, next);
    }
    return nfa_either(g, positive, nfa_text(g, "-", negative));
}

/* ---- any value */

/* open, then nothing or parts with commas between, then close. */
static nfa_at bracketed(struct nfa *g, const struct json_rules *r, const char *open,
                        const char *close, nfa_at (*part)(struct nfa *, const struct json_rules *,
                                                          nfa_at), nfa_at next)
{
    nfa_at end = nfa_text(g, close, next), loop = nfa_reserve(g);
    nfa_at parts = part(g, r, loop);

    nfa_split(g, loop, nfa_text(g, ",", json_text_space(g, r, parts)), json_text_space(g, r, end));
    return nfa_text(g, open, nfa_either(g, json_text_space(g, r, parts),
                                        json_text_space(g, r, end)));
}

static nfa_at any_element(struct nfa *g, const struct json_rules *r, nfa_at next)
{
    return nfa_call(g, r->value, next);
}

static nfa_at any_member(struct nfa *g, const struct json_rules *r, nfa_at next)
{
    nfa_at value = json_text_space(g, r, nfa_call(g, r->value, next));

    return json_text_string(g, r, 0, JSON_ANY_LENGTH, nfa_text(g, ":", value));
}

struct json_rules json_rules_add(struct nfa *g)
{
    struct json_rules r = { nfa_add_rule(g), nfa_add_rule(g), nfa_add_rule(g), nfa_add_rule(g) };
    nfa_at value = json_text_string(g, &r, 0, JSON_ANY_LENGTH, NFA_RETURN);

    nfa_set_rule(g, r.space, space_rule(g));
    nfa_set_rule(g, r.character, any_character(g, NFA_RETURN));
    nfa_set_rule(g, r.object, bracketed(g, &r, "{", "}", any_member, NFA_RETURN));
    value = nfa_either(g, g->rules[r.object], value);
    value = nfa_either(g, bracketed(g, &r, "[", "]", any_element, NFA_RETURN), value);
    value = nfa_either(g, json_text_number(g, NFA_RETURN), value);
    value = nfa_either(g, nfa_text(g, "true", NFA_RETURN), value);
    value = nfa_either(g, nfa_text(g, "false", NFA_RETURN), value);
    nfa_set_rule(g, r.value, nfa_either(g, nfa_text(g, "null", NFA_RETURN), value));
    return r;
}
