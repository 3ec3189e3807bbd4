#ifndef TESTS_SUPPORT_MODEL_RUNNER_H
#define TESTS_SUPPORT_MODEL_RUNNER_H

#include "engine/kv/hot_sets.h"
#include "engine/kv/kv_pool.h"
#include "engine/model/model.h"

#include <stdbool.h>

/* A model with a pool, stepped by hand: what the engine does for a request,
 * without the engine.  Failures are test failures. */

struct runner {
    struct model *model;
    struct stream *stream;
    struct kv_pool *pool;
    struct select_plan plan;
    struct model_limits limits;
    struct backend *backend;
    struct kv_shape shape;
    struct buffer tier;          /* pinned; with hot sets, as the next */
    struct hot_sets *hot;
};

struct runner_options {
    const char *dir;             /* model folder */
    struct backend *backend;     /* NULL: the CPU's */
    const char *isa;             /* of test_backend(); NULL is auto */
    struct select_config select; /* filter 0, index 0, ...: use select_default() */
    const int16_t *channels;     /* for INDEX_CHANNELS */
    int max_rows, max_seqs, max_logit_rows, max_tokens; /* max_tokens: of one sequence */
    int hot_sets;                /* 0: no host tier either, else one with room for all blocks */
    int rows_per_head;
};

/* A context and its blocks. */
struct test_seq {
    kv_block *blocks;
    bool *held;                  /* [n_blocks] whether a block must stay on the device */
    int n_blocks, n_tokens, n_sealed;
    int set;                     /* of hot rows, or -1 */
    int lagged_slot;             /* with lagged selection, from the first sparse row on; else -1 */
};

/* What one sequence does in a step: n tokens appended.  want results of the
 * last `want` rows, each with the runner's 20 largest logprobs. */
struct test_work {
    struct test_seq *seq;
    const int32_t *ids;
    int n, want;
    bool sparse;                 /* n must be 1 */
    struct sample_result *result;/* [want] */
};

void runner_open(struct runner *r, const struct runner_options *o);
void runner_close(struct runner *r);

void seq_init(struct runner *r, struct test_seq *seq, int max_tokens);
void seq_fini(struct runner *r, struct test_seq *seq);

/* One step.  Sparse works come first; a dense one of which some blocks are off the device comes
 * last and is streamed. */
void runner_step(struct runner *r, struct test_work *works, int n_works);

/* Append n tokens of one sequence in chunks; the result of the last row. */
struct sample_result runner_feed(struct runner *r, struct test_seq *seq, const int32_t *ids,
                                 int n, int chunk);

/* Append one token, sparse or dense. */
struct sample_result runner_decode(struct runner *r, struct test_seq *seq, int32_t id,
                                   bool sparse);

/* ---- off the device, with hot sets; between steps */

/* False when all sets are in use. */
bool seq_acquire_set(struct runner *r, struct test_seq *seq);
/* Everything must be on the device again. */
void seq_release_set(struct runner *r, struct test_seq *seq);

/* Blocks that are full, and so may leave the device. */
int seq_full_blocks(const struct test_seq *seq);
/* A full block has a copy on the host and need not be on the device any more; it wants a set. */
void seq_let_go(struct runner *r, struct test_seq *seq, int block);
/* It is there again, and stays. */
void seq_fetch(struct runner *r, struct test_seq *seq, int block);
/* What need not be on the device leaves it; where its K and V were there is NaN. */
void runner_reclaim(struct runner *r);

/* The prompt of n tokens that scripts/make_references.py uses. */
void test_prompt(int32_t *ids, int n);

/* The largest difference of logprobs over the ids that both lists have; 1000
 * when the most likely ids of one are far from the other's list. */
double logprob_difference(const struct sample_result *a, const struct sample_result *b);

bool results_identical(const struct sample_result *a, const struct sample_result *b);

/* Of all weight files in the folder; as weights_sum of make_references.py. */
uint64_t folder_weights_sum(const char *dir);

#endif
