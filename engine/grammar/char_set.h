#ifndef GRAMMAR_CHAR_SET_H
#define GRAMMAR_CHAR_SET_H

#include "engine/grammar/nfa.h"

/* Sets of code points, and what of them stands in a text as UTF-8. */

enum { MAX_CODE_POINT = 0x10FFFF };

struct char_range { uint32_t lo, hi; };

/* Zero-initialise; char_set_fini frees.  Sorted and disjoint after char_set_normalise(). */
struct char_set {
    struct char_range *ranges;
    uint32_t n, capacity;
};

void char_set_add(struct char_set *s, uint32_t lo, uint32_t hi);
void char_set_add_all(struct char_set *s, const struct char_set *other);
void char_set_fini(struct char_set *s);

/* In order, joined, without surrogates. */
void char_set_normalise(struct char_set *s);
/* Everything else; normalised before and after. */
void char_set_invert(struct char_set *s);
/* The part within [lo, hi] of a normalised set, added to out. */
void char_set_clip(const struct char_set *s, uint32_t lo, uint32_t hi, struct char_set *out);
bool char_set_has(const struct char_set *s, uint32_t c);

/* Any one character of a normalised set, then next. */
nfa_at char_set_emit(struct nfa *g, const struct char_set *s, nfa_at next);

#endif
