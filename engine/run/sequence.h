#ifndef SEQUENCE_H
#define SEQUENCE_H

#include "engine/grammar/grammar.h"
#include "engine/kv/kv_pool.h"
#include "engine/model/tokenizer.h"
#include "engine/run/request.h"
#include "engine/run/stop.h"
#include "engine/select/select.h"

#include <stdbool.h>
#include <stdint.h>

/* A request while the engine works on it.
 *
 *   tokens   prompt ........ output ....
 *            [0, n_prompt)   [n_prompt, n_tokens)    known
 *            [0, n_computed)                         K and V are in the blocks
 *
 * A step computes a slice [n_computed, n_computed + n).  If that reaches
 * n_tokens, the last row's logits give the next token.  So prefill, decode and
 * the replay after a preemption are one thing: there are known tokens without
 * K and V.  A slice is dense throughout or a single sparse row.
 *
 * Blocks are sealed as they fill and shared through the pool.  All in the table are pinned;
 * held are those that must keep their K and V on the device (kv_pool.h).  The engine
 * thread alone touches a sequence. */

struct token_trie;               /* engine/grammar/token_trie.h */

enum sequence_state { SEQ_WAITING, SEQ_RUNNING };

/* Where K and V of a sequence are; residency.h moves it from one to the next. */
enum residency {
    ON_DEVICE,                   /* all blocks held: steps of any kind */
    LOADING,                     /* on their way to the device; no steps before they are there */
    LOADING_INDEX,               /* only the index is; then OFFLOADED or STREAMED */
    STREAMED,                    /* what is sealed is not held: dense steps, model.h */
    OFFLOADED,                   /* what is sealed is not held: sparse steps, with a hot set */
    RETURNING,                   /* OFFLOADED, and loading to become ON_DEVICE */
};

struct sequence {
    struct request *req;
    /* The scheduler's. */
    enum sequence_state state;
    uint64_t order;              /* of arrival; decides who goes first and who yields */
    uint64_t group;
    uint32_t n_prompt, n_tokens, n_computed, n_blocks;
    uint32_t sparse_from;        /* first sparse position; UINT32_MAX: none */
    bool scoring;                /* wants logits of every prompt row */
    bool too_long;               /* the pool cannot hold all of it: never ON_DEVICE */
    bool was_admitted;           /* left the waiting room once */
    struct sequence *older, *younger; /* neighbours in the scheduler's list */

    int32_t *tokens;             /* [n_prompt + max_tokens] */
    kv_block *table;             /* [max_blocks] */
    bool *held;                  /* [max_blocks] */
    uint32_t max_blocks, n_sealed, n_scored;
    uint32_t n_drops;            /* while it stays, the first n_sealed entries of the table do */
    uint32_t n_held;             /* blocks; n_blocks when ON_DEVICE */
    uint32_t n_stored;           /* blocks that the host tier has been asked to store */
    uint32_t n_dumped;           /* tokens whose K and V selection_dump.h has */
    enum residency residency;
    int hot_set;                 /* STREAMED, OFFLOADED and RETURNING; else -1 */
    int lagged_slot;             /* from its first sparse step on, with lagged selection; else -1 */

    struct detokenizer detok;
    struct stop_matcher stops;
    struct token_count *counts;  /* with penalties, else NULL */
    int32_t *count_of;           /* [vocab] index + 1 in counts */
    uint32_t n_counts;
    int32_t *banned;             /* with min_tokens, else NULL */
    uint32_t n_banned;

    /* With a grammar; what follows the tokens, whatever is computed of them.  Else zeroed. */
    struct grammar_matcher grammar;
    uint32_t *allowed;           /* [(vocab + 31) / 32] which tokens can come next */
    size_t allowed_words;
    enum status mask_status;     /* of the last sequence_make_mask() */
};

/* vocab: rows of the model's head.  eos: the model's. */
struct sequence *sequence_create(struct request *req, const struct tokenizer *tok,
                                 const struct select_plan *plan, uint64_t order, int vocab,
                                 const int32_t *eos, int n_eos);
/* Its blocks must have been dropped.  NULL is fine. */
void sequence_destroy(struct sequence *q);

/* Tokens that the next slice may have at most, by kind alone; 0: nothing left
 * to compute. */
uint32_t sequence_next_tokens(const struct sequence *q);
/* The next slice is a single row that competes with decodes, not with prefill. */
bool sequence_is_decoding(const struct sequence *q);
/* Blocks that it lacks to hold its first n tokens. */
uint32_t sequence_lacks_blocks(const struct sequence *q, uint32_t n);

/* All that is left to compute is sparse rows: K and V need not be on the device. */
bool sequence_is_sparse_only(const struct sequence *q);
/* It takes part in steps. */
bool sequence_is_ready(const struct sequence *q);
/* Blocks whose K and V it waits for. */
uint32_t sequence_wants_blocks(const struct sequence *q);
/* Blocks that it lacks to go on as far as is known, and one more; of what only passes through the
 * pool, a part. */
uint32_t sequence_will_lack_blocks(const struct sequence *q);

/* Before admission: pin what the prefix cache has, and hold what of it is on the device; then it is
 * ON_DEVICE or, where some is not, LOADING, and loads are to be started when it is admitted.  At
 * least one known token is left to compute.  The sequence has no blocks before. */
void sequence_attach(struct sequence *q, struct kv_pool *pool, const struct select_plan *plan);
/* Release and unpin all blocks: nothing is computed any more. */
void sequence_drop_blocks(struct sequence *q, struct kv_pool *pool);
/* Hold block i, whose K and V are there, or let it go. */
void sequence_hold(struct sequence *q, struct kv_pool *pool, uint32_t i);
void sequence_release(struct sequence *q, struct kv_pool *pool, uint32_t i);
/* Take blocks to hold its first n tokens; the pool has them, the plan said so. */
void sequence_grow(struct sequence *q, struct kv_pool *pool, uint32_t n);
/* n more tokens are computed: seal what is full. */
void sequence_advance(struct sequence *q, struct kv_pool *pool, const struct select_plan *plan,
                      uint32_t n);

/* Append a sampled token to tokens, counts and the request's output arrays
 * (not published).  Room is the caller's to know: n_output < max_tokens. */
void sequence_append(struct sequence *q, const struct sample_result *r);

/* What the sampler is to do for the next token. */
void sequence_sample_params(const struct sequence *q, struct sample_params *out);
/* Find out which tokens can come next; sequence_sample_params() points to them, and they may be
 * made later.  After it q->mask_status is ST_OK, ST_NOMEM where the grammar takes too much room,
 * or ST_INVALID where no token is left. */
void sequence_make_mask(struct sequence *q, const struct token_trie *trie, const int32_t *eos,
                        int n_eos);
/* What it is to do for the prompt row at this position (scoring). */
void sequence_score_params(const struct sequence *q, uint32_t position,
                           struct sample_params *out);
void sequence_store_score(struct sequence *q, uint32_t position, const struct sample_result *r);

#endif
