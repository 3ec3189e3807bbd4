#ifndef GRAMMAR_RAW_TEXT_H
#define GRAMMAR_RAW_TEXT_H

#include "engine/grammar/char_set.h"
#include "engine/grammar/nfa.h"

/* Strings that are written as they are, without quotes, up to a marker: the first one ends them, so
 * they hold none.  They are UTF-8 without NUL.
 *
 * Where nothing is said of a string it may be any other text.  Where characters are counted it has
 * no "</", and where they are of a class no '<': the position within the marker would have to be
 * followed beside the count or the expression, which makes graphs many times as large. */

enum { RAW_MAX_MARKER = 16, RAW_ANY_LENGTH = -1 };

/* The rules that strings before one marker share: what may come behind k bytes of it. */
struct raw_rules {
    const char *marker;          /* borrowed */
    int n;                       /* bytes of it */
    uint32_t other[RAW_MAX_MARKER];      /* [k] a character but '<' and the marker's next one */
};

/* A marker begins with "</", and has no second '<'. */
struct raw_rules raw_rules_add(struct nfa *g, const char *marker);

/* min <= max characters, then next, which is to begin with the marker; RAW_ANY_LENGTH: no limit. */
nfa_at raw_text_string(struct nfa *g, const struct raw_rules *r, int min, int max, nfa_at next);
/* One member of a class of code points but '<' and NUL. */
nfa_at raw_text_characters(struct nfa *g, const struct char_set *set, nfa_at next);
/* One or more characters but '<' and NUL. */
nfa_at raw_text_name(struct nfa *g, nfa_at next);

#endif
