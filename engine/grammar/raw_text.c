#include "engine/grammar/raw_text.h"

#include "engine/base/invariant.h"

#include <string.h>

/* Bytes of the marker that are looked for where characters are counted. */
enum { COUNTED = 2 };

static nfa_at beyond_ascii(struct nfa *g, nfa_at next)
{
    struct char_set set = { 0 };

    char_set_add(&set, 0x80, MAX_CODE_POINT);
    char_set_normalise(&set);
    next = char_set_emit(g, &set, next);
    char_set_fini(&set);
    return next;
}

/* Any character but NUL, '<' and c; beyond: where those start that are not of ASCII. */
static nfa_at any_but(struct nfa *g, char c, nfa_at beyond, nfa_at next)
{
    struct byte_set set = { { 0 } };

    for (unsigned byte = 1; byte < 0x80; byte++)
        if (byte != '<' && byte != (unsigned char)c)
            byte_set_add(&set, byte, byte);
    return nfa_either(g, nfa_set(g, &set, next), beyond);
}

struct raw_rules raw_rules_add(struct nfa *g, const char *marker)
{
    struct raw_rules r = { .marker = marker, .n = (int)strlen(marker) };
    nfa_at beyond = beyond_ascii(g, NFA_RETURN);

    ASSERT(r.n > COUNTED && r.n <= RAW_MAX_MARKER);
    ASSERT(marker[1] == '/' && strrchr(marker, '<') == marker);
    for (int k = 0; k < r.n; k++) {
        r.other[k] = nfa_add_rule(g);
        nfa_set_rule(g, r.other[k], any_but(g, marker[k], beyond, NFA_RETURN));
    }
    return r;
}

/* One more character behind k bytes of the marker; at[i]: what follows behind i of them.  The last
 * of the first n bytes does not come. */
static nfa_at one_more(struct nfa *g, const struct raw_rules *r, int k, int n, const nfa_at *at)
{
    nfa_at opened = nfa_range(g, '<', '<', at[1]), other = nfa_call(g, r->other[k], at[0]);
    unsigned char c = (unsigned char)r->marker[k];

    if (k > 0 && k + 1 < n)
        other = nfa_either(g, nfa_range(g, c, c, at[k + 1]), other);
    return nfa_either(g, opened, other);
}

nfa_at raw_text_string(struct nfa *g, const struct raw_rules *r, int min, int max, nfa_at next)
{
    nfa_at at[RAW_MAX_MARKER], more[COUNTED];

    for (int k = 0; k < r->n; k++)
        at[k] = max == RAW_ANY_LENGTH ? nfa_reserve(g) : next;
    for (int k = 0; k < r->n && max == RAW_ANY_LENGTH; k++)
        nfa_split(g, at[k], one_more(g, r, k, r->n, at), next);
    if (max == RAW_ANY_LENGTH)
        max = min;
    for (int i = max; i > 0 && !g->too_large; i--) {
        for (int k = 0; k < COUNTED; k++) {
            more[k] = one_more(g, r, k, COUNTED, at);
            if (i > min)
                more[k] = nfa_either(g, more[k], next);
        }
        memcpy(at, more, sizeof more);
    }
    return at[0];
}

nfa_at raw_text_characters(struct nfa *g, const struct char_set *set, nfa_at next)
{
    struct char_set plain = { 0 };

    char_set_clip(set, 1, '<' - 1, &plain);
    char_set_clip(set, '<' + 1, MAX_CODE_POINT, &plain);
    next = char_set_emit(g, &plain, next);
    char_set_fini(&plain);
    return next;
}

nfa_at raw_text_name(struct nfa *g, nfa_at next)
{
    nfa_at loop = nfa_reserve(g), start = any_but(g, '<', beyond_ascii(g, loop), loop);

    nfa_split(g, loop, start, next);
    return start;
}
