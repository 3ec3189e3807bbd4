#ifndef GRAMMAR_JSON_TEXT_H
#define GRAMMAR_JSON_TEXT_H

#include "engine/grammar/char_set.h"
#include "engine/grammar/nfa.h"

/* The parts of JSON texts as graphs.
 *
 * Space.  JSON allows any amount of it, and a model that has nothing to say writes it for ever.  So
 * between tokens there may be nothing, one space, or one line feed with at most JSON_MAX_INDENT
 * spaces behind; there is none before a comma or colon, before the value or behind it.
 *
 * Strings hold no NUL: many who read them could not.
 *
 * Numbers have at most JSON_MAX_DIGITS digits before and behind the point, and an exponent of at
 * most two: readers turn all of these into finite numbers. */

enum { JSON_MAX_INDENT = 40, JSON_MAX_DIGITS = 18 };

/* The rules that several parts share; the graph has them once. */
struct json_rules { uint32_t space, value, object, character; };

struct json_rules json_rules_add(struct nfa *g);

nfa_at json_text_space(struct nfa *g, const struct json_rules *r, nfa_at next);
/* One member of a class of code points, as it is spelled in a string. */
nfa_at json_text_characters(struct nfa *g, const struct char_set *set, nfa_at next);
/* min <= max characters and both quotes; JSON_ANY_LENGTH: no limit. */
enum { JSON_ANY_LENGTH = -1 };
nfa_at json_text_string(struct nfa *g, const struct json_rules *r, int min, int max, nfa_at next);
/* Exactly this string, with its quotes. */
nfa_at json_text_literal(struct nfa *g, const char *utf8, nfa_at next);
nfa_at json_text_number(struct nfa *g, nfa_at next);

/* Numbers between two integers of at most JSON_MAX_DIGITS digits, written without an exponent.
 * Only of numbers that need not be integers: the bounds themselves are out. */
struct json_bounds {
    int64_t min, max;
    bool integer, above_min, below_max;
};
nfa_at json_text_bounded(struct nfa *g, const struct json_bounds *b, nfa_at next);

#endif
