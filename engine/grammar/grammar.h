#ifndef GRAMMAR_H
#define GRAMMAR_H

#include "engine/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct cJSON;
struct token_trie;               /* token_trie.h */

/* What a text may look like, and which tokens keep it so.
 *
 *   compile    a regular expression, a list of choices or a JSON schema becomes a graph (nfa.h);
 *              regex.h and json_schema.h say what is understood
 *   matcher    follows one text through it, token by token
 *   mask       the tokens whose bytes can come next, out of a walk of the automaton (automaton.h)
 *              over the tree of all tokens
 *
 * A grammar is shared by all texts that follow it, and by all requests that ask for the same, with
 * what was found out while serving them: states and masks are kept, within bounds.  It has a lock,
 * which is held for the time of a call.  A matcher belongs to one thread at a time.
 *
 * Sound, not complete: a text that ends where may_end says so is valid, and every prefix of it is
 * the prefix of a valid text.  Some valid texts are never written; the headers say which. */

struct grammar;

/* What a chat model may write around the text: thoughts in front of it, which follow nothing but
 * end with their marker, and calls instead of it.  How that is spelled is the caller's. */

enum grammar_thoughts {
    GRAMMAR_NO_THOUGHTS,
    GRAMMAR_MAY_THINK,           /* the output begins with thoughts or with what comes after them */
    GRAMMAR_THINKING,            /* it begins inside of them */
};

struct grammar_call {
    const char *head, *tail;     /* around the arguments */
    const struct cJSON *schema;  /* of the arguments, or NULL: any object */
    bool refused;                /* written: the sentence is about this schema */
};

/* Arguments that are no JSON object: key, a name, key_end, value, its value, value_end, for each of
 * them.  What can only be a string (grammar_schema_is_string()) is written as it is, up to the
 * first value_end, and everything else as JSON.  Where a call has no schema, or one of an object of
 * which nothing is said, names and values are any text (raw_text.h). */
struct grammar_pairs { const char *key, *key_end, *value, *value_end; };

/* Markers begin with '<', have no second one and more than two bytes. */
struct grammar_turn {
    enum grammar_thoughts thoughts;
    const char *think, *think_end;
    const char *never;           /* a marker that thoughts do not contain, or NULL; its second byte
                                    is not think_end's */
    struct grammar_call *calls;
    size_t n_calls;
    const struct grammar_pairs *pairs;   /* or NULL: arguments are JSON */
    const char *between;         /* what separates two calls, or NULL: there is one at most */
};

/* turn may be NULL: there is the text alone.
 *
 * The sentence in err goes on behind the name of the field: "has a look-ahead at byte 3, ...". */
enum status grammar_compile_regex(struct grammar **out, const char *pattern, size_t n,
                                  const struct grammar_turn *turn, struct error *err) MUST_USE;
enum status grammar_compile_choice(struct grammar **out, const char *const *choices, size_t n,
                                   const struct grammar_turn *turn, struct error *err) MUST_USE;
enum status grammar_compile_schema(struct grammar **out, const struct cJSON *schema,
                                   const struct grammar_turn *turn, struct error *err) MUST_USE;
/* Any JSON object. */
enum status grammar_compile_json_object(struct grammar **out, const struct grammar_turn *turn,
                                        struct error *err) MUST_USE;
/* No text: a call at least. */
enum status grammar_compile_calls(struct grammar **out, const struct grammar_turn *turn,
                                  struct error *err) MUST_USE;

/* Whether everything that is valid under a property's schema is a string: its type says so, or all
 * of its values are strings; also behind a $ref into root or where one alternative is all, up to
 * three times. */
bool grammar_schema_is_string(const struct cJSON *root, const struct cJSON *schema);

struct grammar *grammar_acquire(struct grammar *g);
void grammar_release(struct grammar *g);         /* the last one frees it; NULL is fine */

struct grammar_matcher {
    struct grammar *grammar;
    struct grammar_matcher *older, *younger;     /* the grammar's list */
    uint32_t state;
};

/* At the beginning of a text.  The grammar outlives the matcher. */
void grammar_matcher_init(struct grammar_matcher *m, struct grammar *g);
void grammar_matcher_fini(struct grammar_matcher *m);    /* a zeroed one is fine */

/* False, and nothing changes, where these bytes cannot come next. */
bool grammar_matcher_advance(struct grammar_matcher *m, const char *bytes, size_t n);
bool grammar_matcher_may_end(const struct grammar_matcher *m);
/* It may end, and nothing may follow. */
bool grammar_matcher_is_complete(const struct grammar_matcher *m);

/* Bit i of mask says whether token i may come next; n_words of 32, bits that are no token's are 0.
 * *n_allowed counts them.  The trie is of the same vocabulary in every call.  ST_NOMEM where the
 * grammar has more states here than there is room for. */
enum status grammar_matcher_mask(struct grammar_matcher *m, const struct token_trie *trie,
                                 uint32_t *mask, size_t n_words, uint32_t *n_allowed) MUST_USE;

/* Masks made and found since compiling, for tests and measurements. */
struct grammar_counts { uint64_t made, found; };
struct grammar_counts grammar_counts(const struct grammar *g);

#endif
