#ifndef SCHEDULER_H
#define SCHEDULER_H

#include "engine/run/sequence.h"

#include <stdbool.h>
#include <stdint.h>

/* Decides which sequences advance in the next step, and by how much.
 *
 * Pure: no device, no clock, no locks, no allocation after create.  The same
 * calls give the same plans, so policy is tested with tables and histories.
 *
 * Order of claims on a step:
 *   1. every decoding sequence gets its row, oldest first;
 *   2. sequences in prefill get the rest of the token budget, oldest first, cut
 *      at block boundaries unless the slice is the last;
 *   3. waiting sequences are admitted, oldest first, while the pool can hold
 *      all their known tokens and one more block beside what the running ones
 *      still need for theirs.  The next one is never passed over for a smaller one.
 *
 * When blocks are short, for a running sequence or to admit one, the longest one that only
 * needs sparse rows any more goes to the host tier, if there is one, and the next.  What then still
 * lacks is made room for as ever: the youngest running sequence is put
 * back to waiting, but nobody where blocks enough are being copied and then free: who lacks them
 * waits for that.  Youngest, because it has the least to lose; and since the
 * pool holds at least one context of the greatest length, the oldest always
 * progresses: nothing livelocks.
 *
 * Members of a group share their prompt: while one prefills it the others wait,
 * without holding up those behind them, and then find its blocks. */

struct scheduler;

struct step_budget {
    uint32_t tokens;             /* rows of the step */
    uint32_t logit_rows;
    uint32_t blocks;             /* that the pool can give: free and reclaimable */
    uint32_t clearing;           /* that it can give besides when copies under way have ended */
    /* Drop the blocks of a sequence that is preempted, and see what the pool can give
     * then.  (Blocks shared with others stay, so nobody can know before.) */
    void (*drop)(struct step_budget *b, struct sequence *seq);
    /* Or NULL.  Let K and V of a sequence leave the device, whose slices this changes nothing
     * about, and see what the pool can give then.  False where it cannot be. */
    bool (*offload)(struct step_budget *b, struct sequence *seq);
    void *arg;
};

struct step_slice {
    struct sequence *seq;
    uint32_t n_tokens;           /* from seq->n_computed on */
    int first_result;            /* of its logit rows in the batch; step.c's */
};

struct step_plan {
    struct step_slice *slices;   /* the scheduler's storage, valid until the next plan */
    uint32_t n_slices;
    uint32_t n_preempted;
    bool waits;                  /* somebody lacks blocks and waits for copies to end */
    struct step_budget left;     /* of tokens and logit rows; blocks as the pool has them */
    uint32_t planned_blocks;     /* that the slices will take */
};

struct scheduler *scheduler_create(uint32_t max_running);
void scheduler_destroy(struct scheduler *sc);    /* must be empty; NULL is fine */

/* To the waiting ones, by order. */
void scheduler_add(struct scheduler *sc, struct sequence *seq);
/* Finished or cancelled, running or waiting. */
void scheduler_remove(struct scheduler *sc, struct sequence *seq);

/* Claims 1 and 2.  A preempted sequence is waiting when this returns, without
 * blocks. */
struct step_plan *scheduler_plan(struct scheduler *sc, const struct step_budget *budget);

/* Sequences that wait for their blocks to be loaded have no slice.
 *
 * Claim 3, one at a time: the sequence to try next, or NULL.  The caller
 * attaches it to the prefix cache, sees anew what the pool can give, and asks
 * scheduler_admit(); on false it drops its blocks and stops for this step. */
struct sequence *scheduler_next(const struct scheduler *sc, const struct step_plan *plan);
bool scheduler_admit(struct scheduler *sc, struct step_plan *plan, struct sequence *seq);

/* Put the youngest running sequence back to waiting, as a preemption does. */
void scheduler_put_back(struct scheduler *sc, struct step_plan *plan);

/* Blocks that nobody running or planned will want before long. */
uint32_t scheduler_spare_blocks(const struct scheduler *sc, const struct step_plan *plan);

/* Every sequence, to look for cancellations: i from 0 until NULL. */
struct sequence *scheduler_at(const struct scheduler *sc, uint32_t i);

/* The running ones: this, its younger, and so on until NULL. */
struct sequence *scheduler_oldest(const struct scheduler *sc);
uint32_t scheduler_running(const struct scheduler *sc);
uint32_t scheduler_waiting(const struct scheduler *sc);
void scheduler_check(const struct scheduler *sc);

#endif
