#ifndef TESTS_SUPPORT_ENGINE_HISTORY_H
#define TESTS_SUPPORT_ENGINE_HISTORY_H

#include "tests/support/engine_fixture.h"

#include <stdbool.h>
#include <stdint.h>

/* A number of random requests, played against an engine with room for all of them and no host
 * tier, and then against others, whose answers must be the same.  The seed says what is asked for;
 * when it is sent, cancelled or put back depends on threads.  All that is free is NaN meanwhile.
 *
 * On the CPU an answer is the same to the last bit whatever happens.  On a GPU it is (ops.h,
 * Independence) if whatever is computed in products of more than 16 rows is so in products of as
 * many rows in each run, and a dense slice of one row in none of them.  With prompts_first:
 *
 *  1. Each prompt is computed once, alone: from what the prompts before it left in the cache on, in
 *     steps of step_tokens rows and a rest, the same in every engine.  One that streams may take
 *     longer steps; it gets so small a pool that it does not (alone_tokens() in engine_create.c).
 *  2. Then all requests are sent.  There is room for all that they ever store, so a prompt is found
 *     but for its last 2 to 4 tokens, which are one slice.  Everything after it is sparse, and so a
 *     row for itself, also when it is computed a second time.  4 sequences have no more than 16
 *     rows.
 *
 * Without, the steps of an engine on a GPU have other rows in each run.  What is compared then is
 * the first token's logprob, which no choice of tokens has a part in, and that nothing is NaN. */

enum { HISTORY_REQUESTS = 15, HISTORY_MAX_OUTPUT = 210, HISTORY_FIRST_RUNNING = 4 };

struct engine_history {
    const char *dir, *backend;       /* NULL: the bundled model, the CPU */
    uint64_t seed;
    enum selection selection;
    uint32_t scale;                  /* of the pools in struct history_kind */
    uint32_t max_prompt, max_len;    /* tokens */
    uint32_t keep_blocks, keep_tokens;
    int n_texts;                     /* that prompts are taken from; every second is noise */
    bool prompts_first;
    uint32_t step_tokens;            /* with prompts_first */
    double tolerance;                /* of the first token's logprob; 0: all bits */
};

/* Prompts up to 430 times scale, outputs up to 210 tokens, on the CPU. */
struct engine_history small_history(uint64_t seed, uint32_t scale, enum selection selection);

/* What can happen to them. */
enum { OFFLOADS = 1, RETURNS = 2, LOADS = 4, PREEMPTIONS = 8, MISSES = 16 };

/* An engine to play against.  Blocks are times scale; small_history() has contexts up to 10. */
struct history_kind {
    const char *name;
    uint32_t blocks;
    uint32_t host_blocks;            /* 0: room for all that is stored */
    enum offload_policy offload;
    uint32_t sequences, hot_rows;
    bool no_prefix_cache, cancels;
    int delay_us;                    /* the most a copy is held up */
    uint32_t step_tokens;            /* times scale, without prompts_first; 0: as small_config() */
    int must;                        /* happen, however the threads of a CPU run */
};

struct engine_config history_config(const struct engine_history *h, const struct history_kind *k);
struct request *history_request(const struct engine_history *h, int i);

/* Play it against engines of all sorts, small_history() or alike.  What happened. */
int history_play_mixed(const struct engine_history *h);
/* With prompts_first, against engines whose pools hold several of the longest contexts, one, or a
 * small part of one. */
void history_play_long(const struct engine_history *h);

/* For engine_config.before_copy: half of the copies are held up, at random. */
struct copy_delay {
    uint64_t random;                 /* on the copy thread alone */
    int most_us;
};
bool copy_delay(void *delay, uint64_t number);

/* Until the tier of the engine that runs has so many: what is stored before is lost to it. */
void wait_for_host_memory(uint32_t blocks);

void pause_us(int us);

#endif
