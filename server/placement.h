#ifndef SERVER_PLACEMENT_H
#define SERVER_PLACEMENT_H

#include <stdint.h>

/* Which of several engines a prompt had best go to.
 *
 * The rule.  What a prompt costs on an engine, in prompt tokens to be computed until it has its
 * first token of output, is
 *
 *     load + tokens of the prompt - those of them that the engine is believed to have cached
 *     load = prompt tokens that were given to it and are not computed yet
 *            + PLACEMENT_CHOICE_TOKENS for each choice that it has
 *
 * and the cheapest gets it; of equals the one that was given something the longest ago.  So the
 * engine that knows the beginning of a prompt is preferred until its load exceeds that of the least
 * loaded by more than the move would have to compute again, and no other margin is needed.
 *
 * What is believed.  Each engine's prefix cache is its own, and only its thread may look into it.
 * Kept here is which engines were given a text that begins with certain blocks: a hash of all
 * tokens up to a block's end and of the request's salt, so that no key finds out by placement what
 * another has asked.  The number of such entries is bounded, and the least recently used makes
 * room.  An engine may have lost a block meanwhile, or decoded it in a way that no prompt is
 * computed in (engine/select/select.h, provenance): a wrong belief costs time and nothing else.
 *
 * No clock, no device: the same calls give the same answers.  With one engine nothing is kept and
 * nothing costs anything.  Loop thread only. */

enum {
    PLACEMENT_MAX_ENGINES = 16,
    PLACEMENT_WAYS = 8,
    PLACEMENT_CHOICE_TOKENS = 64     /* guessed: a choice takes a row of each step, and room */
};

struct placement;

/* Tokens in two parts, of which the second may be empty. */
struct placement_text {
    const int32_t *prompt, *output;
    uint32_t n_prompt, n_output;
    uint64_t salt;
};

struct placement_order {
    uint32_t engines[PLACEMENT_MAX_ENGINES];    /* cheapest first */
    uint32_t cached[PLACEMENT_MAX_ENGINES];     /* tokens, by engine */
};

/* 1 to PLACEMENT_MAX_ENGINES engines, with blocks of block_tokens; n_entries, a power of two of at
 * least PLACEMENT_WAYS, blocks are remembered, each in 16 bytes.  With 0 entries nothing is
 * believed to be cached, and loads alone decide. */
struct placement *placement_create(uint32_t n_engines, uint32_t block_tokens, uint32_t n_entries);
void placement_destroy(struct placement *p);          /* NULL is fine */

void placement_rank(const struct placement *p, struct placement_order *out,
                    const struct placement_text *prompt);

/* An engine was given choices of one prompt, of which tokens have to be computed. */
void placement_add(struct placement *p, uint32_t engine, uint32_t n_choices, uint32_t tokens);
void placement_computed(struct placement *p, uint32_t engine, uint32_t tokens);
void placement_ended(struct placement *p, uint32_t engine);       /* a choice */
/* It has, or will have, this text in its cache. */
void placement_learn(struct placement *p, uint32_t engine, const struct placement_text *text);

uint64_t placement_load(const struct placement *p, uint32_t engine);

#endif
