#ifndef RESIDENCY_H
#define RESIDENCY_H

#include "engine/kv/host_tier.h"
#include "engine/kv/hot_sets.h"
#include "engine/run/sequence.h"

#include <stdbool.h>
#include <stdint.h>

/* Sequences between the device and the host tier: how one gets from each enum residency to the
 * next.  When, is the scheduler's to say.
 *
 *                 start        arrived
 *   (attached) --------> LOADING -------> ON_DEVICE <------+ arrived
 *        |  start                             | offload    |
 *        +------> LOADING_INDEX ------> OFFLOADED ----> RETURNING
 *                              arrived      ^     return   |
 *                                           +--------------+ offload
 *
 * A sequence that is too long for the pool is STREAMED (or LOADING_INDEX before) as long as it has
 * dense rows to compute, and OFFLOADED from then on.
 *
 * Leaving costs nothing: blocks are stored as they fill, so to be OFFLOADED is to hold no more what
 * is sealed.  The pool then gives the kv slots away as it needs them, and not before; what has not
 * been stored keeps its own.
 *
 * With tier NULL every sequence stays ON_DEVICE.  Engine thread, between steps. */

struct residency_context {
    struct kv_pool *pool;
    struct host_tier *tier;      /* NULL: none */
    struct hot_sets *sets;       /* NULL: no sequence can be OFFLOADED */
    struct stream *stream;       /* of the steps */
    bool always;                 /* OFFLOADED as soon as can be, and read out of the tier even where
                                    K and V are still on the device: to measure and to test */
    uint64_t n_offloads, n_returns;
};

/* ON_DEVICE or RETURNING to OFFLOADED.  False, and nothing happens, where that cannot be or would
 * free nothing. */
bool residency_offload(struct residency_context *r, struct sequence *q);

/* Of one that is attached and not admitted yet: be admitted without K and V, as STREAMED, OFFLOADED
 * or LOADING_INDEX.  It has a set then, which residency_end() gives back, and holds nothing that is
 * sealed: the pool may have more to give.  False where it cannot be for now. */
bool residency_leave_early(struct residency_context *r, struct sequence *q);

/* OFFLOADED to RETURNING; the pool has room for all of it. */
void residency_return(struct residency_context *r, struct sequence *q);

/* What was just admitted and is not ON_DEVICE: start to load what it lacks, and to store what it
 * has found on the device alone, since that may be in its own way. */
void residency_start(struct residency_context *r, struct sequence *q);

/* After host_tier_collect(): first the former for all sequences, then the latter.  Take hold of
 * what has arrived, and go on to the next residency when that is all; start loading what is not
 * there and not on its way. */
void residency_hold_arrived(struct residency_context *r, struct sequence *q);
void residency_load_rest(struct residency_context *r, struct sequence *q);

/* After a step: store what is sealed. */
void residency_store(struct residency_context *r, struct sequence *q);

/* Before its blocks are dropped. */
void residency_end(struct residency_context *r, struct sequence *q);

#endif
