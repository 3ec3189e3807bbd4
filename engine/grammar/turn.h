#ifndef GRAMMAR_TURN_H
#define GRAMMAR_TURN_H

#include "engine/grammar/grammar.h"
#include "engine/grammar/nfa.h"

/* What a chat model writes around a structured text (grammar.h), as a graph:
 *
 *   <think> any text </think>  up to TURN_MAX_LINES line ends  call, call, ... or the text
 *
 * The thoughts end at the first of their end markers, as they do for whoever reads the output. */

enum { TURN_MAX_LINES = 2 };

/* The whole of it; text is where the text alone begins, NFA_NOTHING: there are only calls.  A call
 * whose schema is refused is marked.  places: see json_schema.h. */
enum status turn_emit(struct nfa *g, const struct grammar_turn *turn, nfa_at text, nfa_at *start,
                      size_t *places, struct error *err) MUST_USE;

#endif
