#ifndef STEP_H
#define STEP_H

#include "engine/kv/kv_pool.h"
#include "engine/model/model.h"
#include "engine/run/scheduler.h"

#include <stdint.h>

/* One step: plan in, tokens out.
 *
 *   pack     slices into the model's batch, sparse rows first
 *   run      model_step
 *   absorb   seal blocks, append tokens, look for the end of each sequence
 *
 * Nothing is allocated.  Engine thread. */

/* Whose places the tables of one sequence of the batch hold, from earlier steps. */
struct packed_table {
    uint64_t order, version;     /* sequence's; kv_pool_version() */
    uint32_t n_drops, n;         /* sequence's; leading blocks */
    bool with_host;              /* its host slots too */
};

struct selection_dump;
struct token_trie;

struct step_context {
    struct model *model;
    const struct token_trie *trie;   /* of the tokens that grammars choose from */
    struct stream *stream;
    struct kv_pool *pool;
    const struct select_plan *select;
    const int32_t *eos;
    int n_eos;
    uint32_t max_blocks;         /* width of the batch's tables */
    bool only_held;              /* K and V that are not held are read out of the host tier, once
                                    they are there */
    struct packed_table *packed; /* [max_seqs], zeroed at first */
    struct selection_dump *dump; /* of the sparse steps, or NULL */
};

struct step_counts {
    uint64_t prompt_tokens;      /* computed prompt rows */
    uint64_t output_tokens;
    uint64_t sparse_rows, dense_rows;  /* decode rows */
};

/* Grow the planned sequences, pack and run.  ST_DEVICE is final. */
enum status step_run(const struct step_context *cx, struct step_plan *plan,
                     struct error *err) MUST_USE;

/* Before its blocks are dropped: gives back what a sequence took in step_run. */
void step_release(const struct step_context *cx, struct sequence *q);

/* After step_run, for each slice in turn: take the results in.  Returns true
 * when the sequence is finished: req->finish and its companions are set. *counts grows. */
bool step_absorb(const struct step_context *cx, const struct step_slice *slice,
                 struct step_counts *counts, uint64_t now_ns);

#endif
