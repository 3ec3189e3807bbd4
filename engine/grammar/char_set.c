#include "engine/grammar/char_set.h"

#include "engine/base/mem.h"

#include <stdlib.h>

enum { FIRST_SURROGATE = 0xD800, LAST_SURROGATE = 0xDFFF };

void char_set_add(struct char_set *s, uint32_t lo, uint32_t hi)
{
    if (s->n == s->capacity) {
        s->capacity = s->capacity ? 2 * s->capacity : 8;
        s->ranges = mem_realloc(s->ranges, s->capacity, sizeof *s->ranges);
    }
    s->ranges[s->n++] = (struct char_range){ lo, hi };
}

void char_set_add_all(struct char_set *s, const struct char_set *other)
{
    for (uint32_t i = 0; i < other->n; i++)
        char_set_add(s, other->ranges[i].lo, other->ranges[i].hi);
}

void char_set_fini(struct char_set *s)
{
    mem_free(s->ranges);
    *s = (struct char_set){ 0 };
}

static int compare_ranges(const void *a, const void *b)
{
    const struct char_range *x = a, *y = b;

    return (x->lo > y->lo) - (x->lo < y->lo);
}

static void join(struct char_set *s)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < s->n; i++) {
        struct char_range r = s->ranges[i];
        if (n > 0 && r.lo <= s->ranges[n - 1].hi + 1) {
            if (r.hi > s->ranges[n - 1].hi)
                s->ranges[n - 1].hi = r.hi;
        } else {
            s->ranges[n++] = r;
        }
    }
    s->n = n;
}

void char_set_clip(const struct char_set *s, uint32_t lo, uint32_t hi, struct char_set *out)
{
    for (uint32_t i = 0; i < s->n; i++) {
        struct char_range r = s->ranges[i];
        if (r.lo < lo)
            r.lo = lo;
        if (r.hi > hi)
            r.hi = hi;
        if (r.lo <= r.hi)
            char_set_add(out, r.lo, r.hi);
    }
}

void char_set_normalise(struct char_set *s)
{
    struct char_set out = { 0 };

    if (s->n > 1)
        qsort(s->ranges, s->n, sizeof *s->ranges, compare_ranges);
    join(s);
    char_set_clip(s, 0, FIRST_SURROGATE - 1, &out);
    char_set_clip(s, LAST_SURROGATE + 1, MAX_CODE_POINT, &out);
    char_set_fini(s);
    *s = out;
}

void char_set_invert(struct char_set *s)
{
    struct char_set out = { 0 };
    uint32_t from = 0;

    for (uint32_t i = 0; i < s->n; i++) {
        if (s->ranges[i].lo > from)
            char_set_add(&out, from, s->ranges[i].lo - 1);
        from = s->ranges[i].hi + 1;
    }
    if (from <= MAX_CODE_POINT)
        char_set_add(&out, from, MAX_CODE_POINT);
    char_set_fini(s);
    *s = out;
    char_set_normalise(s);
}

bool char_set_has(const struct char_set *s, uint32_t c)
{
    for (uint32_t i = 0; i < s->n; i++)
        if (c >= s->ranges[i].lo && c <= s->ranges[i].hi)
            return true;
    return false;
}

/* ---- UTF-8 */

static int encode(uint32_t c, unsigned char out[4])
{
    if (c < 0x80) {
        out[0] = (unsigned char)c;
        return 1;
    }
    int n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, c >>= 6)
        out[i] = (unsigned char)(0x80 | (c & 0x3F));
    out[0] = (unsigned char)(0xF00 >> n | c);
    return n;
}

/* Code points whose encodings have the same length and run, byte by byte, through all
 * combinations of lo's to hi's. */
static nfa_at emit_block(struct nfa *g, uint32_t lo, uint32_t hi, nfa_at next)
{
    unsigned char a[4], b[4];
    int n = encode(lo, a);

    encode(hi, b);
    for (int i = n - 1; i >= 0; i--)
        next = nfa_range(g, a[i], b[i], next);
    return next;
}

/* The end of the longest block that begins with lo: as many whole trailing bytes as lo is
 * aligned to, or part of the lowest. */
static uint32_t block_end(uint32_t lo, uint32_t hi)
{
    static const uint32_t ends[] = { 0x7F, 0x7FF, 0xFFFF, MAX_CODE_POINT };
    uint32_t size = 1;

    for (int i = 0; i < 4; i++)
        if (lo <= ends[i]) {
            hi = hi < ends[i] ? hi : ends[i];
            break;
        }
    if (lo < 0x80)
        return hi;
    while ((lo & (64 * size - 1)) == 0 && hi - lo >= 64 * size - 1 && size < 1 << 18)
        size *= 64;
    /* Blocks of that size until the byte before the trailing ones wraps. */
    uint32_t wrap = lo | (64 * size - 1);
    if (hi > wrap)
        return wrap;
    return lo + (hi - lo + 1) / size * size - 1;
}

/* Single bytes of all ranges are one node. */
nfa_at char_set_emit(struct nfa *g, const struct char_set *s, nfa_at next)
{
    struct byte_set ascii = { { 0 } };
    nfa_at all = NFA_NOTHING;

    for (uint32_t i = 0; i < s->n; i++) {
        for (uint32_t lo = s->ranges[i].lo, end; lo <= s->ranges[i].hi; lo = end + 1) {
            end = block_end(lo, s->ranges[i].hi);
            if (lo < 0x80)
                byte_set_add(&ascii, lo, end);
            else
                all = nfa_either(g, emit_block(g, lo, end, next), all);
        }
    }
    return nfa_either(g, nfa_set(g, &ascii, next), all);
}
