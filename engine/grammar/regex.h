#ifndef GRAMMAR_REGEX_H
#define GRAMMAR_REGEX_H

#include "engine/grammar/nfa.h"

/* Regular expressions over Unicode text, a subset of what Python, ECMAScript and others share.
 *
 *   abc  .  [a-z_]  [^"]         characters; . is any but a line feed
 *   \d \w \s \D \W \S            of ASCII: [0-9] [0-9A-Za-z_] [ \t\n\r\f\v], and all others
 *   \n \t \r \f \v \0 \xHH \uHHHH \u{H...} and \ before punctuation
 *   (x) (?:x) (?P<name>x) (?<name>x)   groups; nothing is captured
 *   x|y  x?  x*  x+  x{m} x{m,} x{m,n}  with m, n <= REGEX_MAX_REPEAT
 *   x??  x*?  x+?  x{m,n}?       the same texts as without the question mark
 *   ^ at the very beginning and $ at the very end, where they say what holds anyway
 *
 * The whole text has to match.  Refused by name: back references, look-around, word boundaries,
 * anchors elsewhere, possessive and atomic groups, inline flags, \p{...}, classes in classes. */

enum {
    REGEX_MAX_BYTES = 32 << 10,
    REGEX_MAX_REPEAT = 1000,
    REGEX_MAX_NESTING = 50,
};

enum regex_where {
    REGEX_WHOLE_TEXT,            /* the text itself, which it matches as a whole */
    REGEX_JSON_STRING,           /* what a JSON string means, as it is spelled between its quotes;
                                    as JSON Schema has it, a match anywhere in it suffices */
    REGEX_RAW_STRING,            /* the same, written as it is (raw_text.h) */
};

/* A text of the expression, then next.  The sentence begins behind the name of whatever the
 * expression is the value of. */
enum status regex_emit(struct nfa *g, const char *pattern, size_t n, enum regex_where where,
                       nfa_at next, nfa_at *start, struct error *err) MUST_USE;

#endif
