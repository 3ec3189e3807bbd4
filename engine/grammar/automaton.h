#ifndef GRAMMAR_AUTOMATON_H
#define GRAMMAR_AUTOMATON_H

#include "engine/grammar/nfa.h"

/* A graph (nfa.h) made deterministic while it is walked.
 *
 * A state is a set of places where one may be; a place is a BYTES node and the stack of what is to
 * be returned to.  Stacks are kept once, as lists from the top down that share their ends, so equal
 * sets of places are the same state and a state has a number.  Where a byte leads is found out
 * when it is first asked for, and remembered: a walk is then a table look-up a byte.
 *
 * Bounds.  Beyond AUTOMATON_MAX_DEPTH nested calls, or as many places at a time as
 * AUTOMATON_MAX_PLACES, a byte counts as not allowed: what is allowed stays valid.  So a JSON text
 * has at most 64 containers in each other, with a blank in the innermost, which is a call as well:
 * as many as the server reads (json_scan.h).  Memory is bounded too: past `soft` bytes
 * automaton_trim() forgets all states but those given to it; past the hard limit automaton_next()
 * says so.
 *
 * Not thread-safe. */

enum {
    AUTOMATON_MAX_DEPTH = 65,
    AUTOMATON_MAX_PLACES = 2048,
    AUTOMATON_SOFT_BYTES = 8 << 20,
    AUTOMATON_HARD_BYTES = 64 << 20,
};

typedef uint32_t automaton_state;

/* AUTOMATON_FULL: too many states; the walk cannot go on. */
enum { AUTOMATON_DEAD = 0, AUTOMATON_START = 1, AUTOMATON_FULL = -1, AUTOMATON_UNKNOWN = -2 };

struct automaton;

/* The graph is finished; borrowed. */
struct automaton *automaton_create(const struct nfa *g);
void automaton_destroy(struct automaton *a);

/* Where the byte leads: a state, AUTOMATON_DEAD or AUTOMATON_FULL. */
int32_t automaton_next(struct automaton *a, automaton_state from, unsigned char byte);

/* The table itself, for walks over a hundred thousand tokens: valid until a call that may make
 * states.  Where it says AUTOMATON_UNKNOWN, automaton_next() finds out. */
struct automaton_table {
    const int32_t *next;         /* [states, n_classes] */
    const uint8_t *byte_class;
    uint32_t n_classes;
};
struct automaton_table automaton_table(const struct automaton *a);

static inline int32_t automaton_look(const struct automaton_table *t, automaton_state from,
                                     unsigned char byte)
{
    return t->next[(size_t)from * t->n_classes + t->byte_class[byte]];
}

/* The kinds (byte_kind.h) of which every byte leads from s to s.  May make states. */
uint8_t automaton_loops(struct automaton *a, automaton_state s);

/* Make all states, so that whoever walks later finds them.  Refuses a graph with more than
 * AUTOMATON_MAX_EXPLORED, or with more places in them than *places, which a caller with several
 * graphs passes on from one to the next: what is left of AUTOMATON_EXPLORED_PLACES, some tenths
 * of a second. */
enum { AUTOMATON_MAX_EXPLORED = 20000, AUTOMATON_EXPLORED_PLACES = 200000 };
enum status automaton_explore(struct automaton *a, size_t *places, struct error *err) MUST_USE;

/* The text may end here; some byte is allowed here. */
bool automaton_may_end(const struct automaton *a, automaton_state s);
bool automaton_goes_on(const struct automaton *a, automaton_state s);

uint32_t automaton_n_states(const struct automaton *a);      /* numbers below are states */
size_t automaton_bytes(const struct automaton *a);

/* Forget all states.  Those in list, of n, are made again and their numbers replaced. */
void automaton_trim(struct automaton *a, automaton_state *list, size_t n);

#endif
