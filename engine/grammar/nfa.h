#ifndef GRAMMAR_NFA_H
#define GRAMMAR_NFA_H

#include "engine/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The texts a grammar allows, as a graph over bytes with calls.
 *
 *   BYTES set, next     one byte of the set, then next
 *   SPLIT a, b          either
 *   CALL rule, next     a text of the rule, then next
 *   RETURN              the end of a rule; of rule 0, the end of the text
 *   NOTHING             no text at all
 *
 * Without calls it is an ordinary nondeterministic automaton.  Calls make recursion possible and
 * keep what is used in many places from being copied.
 *
 * A graph is built from its ends to its beginning: every function takes what follows and returns
 * where to start.  Equal BYTES nodes are one node, so what ends alike shares its end.  Only loops
 * need a place before its contents are known: nfa_reserve(), then nfa_split().
 *
 * Errors are sticky.  Beyond a limit every function returns NFA_NOTHING, and nfa_finish() says what
 * is wrong. */

typedef uint32_t nfa_at;

enum { NFA_NOTHING = 0, NFA_RETURN = 1 };
enum { NFA_MAX_NODES = 200000, NFA_MAX_RULES = 20000, NFA_MAX_SETS = 8192 };
/* Calls of nfa_set(): what makes no new nodes takes time as well. */
enum { NFA_MAX_WORK = 4000000 };

enum nfa_kind { NFA_IS_NOTHING, NFA_IS_RETURN, NFA_IS_BYTES, NFA_IS_SPLIT, NFA_IS_CALL };

struct byte_set { uint64_t word[4]; };

static inline bool byte_set_has(const struct byte_set *s, unsigned byte)
{
    return s->word[byte >> 6] >> (byte & 63) & 1;
}

static inline void byte_set_add(struct byte_set *s, unsigned lo, unsigned hi)
{
    for (unsigned b = lo; b <= hi; b++)
        s->word[b >> 6] |= UINT64_C(1) << (b & 63);
}

struct nfa_node {
    uint32_t kind;               /* enum nfa_kind */
    uint32_t a;                  /* BYTES: its set; SPLIT: one way; CALL: the rule */
    nfa_at b;                    /* what follows; SPLIT: the other way */
};

struct nfa {
    struct nfa_node *nodes;
    struct byte_set *sets;
    nfa_at *rules;               /* where each begins */
    uint32_t n_nodes, n_sets, n_rules;
    /* After nfa_finish(). */
    uint8_t byte_class[256];     /* bytes of one class are in the same sets */
    uint8_t class_byte[256];     /* one of each */
    uint32_t n_classes;
    /* While it is built. */
    uint32_t capacity, rule_capacity, set_capacity, work;
    uint16_t *set_slots;         /* [2 * NFA_MAX_SETS] sets by content; index + 1 */
    uint32_t *by_content;        /* BYTES nodes, a hash table; its size is a power of two */
    size_t table_size;
    bool too_large;
};

void nfa_init(struct nfa *g);    /* with rule 0, which begins with NFA_NOTHING */
void nfa_fini(struct nfa *g);

nfa_at nfa_set(struct nfa *g, const struct byte_set *set, nfa_at next);
nfa_at nfa_range(struct nfa *g, unsigned lo, unsigned hi, nfa_at next);
nfa_at nfa_bytes(struct nfa *g, const char *bytes, size_t n, nfa_at next);  /* one after another */
nfa_at nfa_text(struct nfa *g, const char *text, nfa_at next);              /* up to its NUL */
nfa_at nfa_either(struct nfa *g, nfa_at a, nfa_at b);
nfa_at nfa_call(struct nfa *g, uint32_t rule, nfa_at next);

nfa_at nfa_reserve(struct nfa *g);
void nfa_split(struct nfa *g, nfa_at reserved, nfa_at a, nfa_at b);

uint32_t nfa_add_rule(struct nfa *g);
void nfa_set_rule(struct nfa *g, uint32_t rule, nfa_at start);

/* Everything from which no end can be reached becomes NFA_NOTHING, so that whoever walks the graph
 * and still is somewhere can get to an end.  Refuses a graph that is too large or has no text. */
enum status nfa_finish(struct nfa *g, struct error *err) MUST_USE;

#endif
