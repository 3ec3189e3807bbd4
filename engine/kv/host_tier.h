#ifndef HOST_TIER_H
#define HOST_TIER_H

#include "engine/kv/copy_engine.h"
#include "engine/kv/kv_pool.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct backend;

/* The host tier of a pool at work: its memory, the copy engine, and a job for each block.
 *
 * Blocks are stored as they are sealed and loaded when they are wanted; both are under way until
 * host_tier_collect() has seen them end.  The pool keeps the books (kv_pool.h, transfers).
 *
 * The engine's steps are over when it stores or loads, so a transfer needs no event: what it
 * reads is written, and nobody reads what it writes.
 *
 * Engine thread, but for what says otherwise. */

struct host_tier;

struct host_tier_config {
    struct kv_pool *pool;        /* created with host_blocks; outlives the tier */
    uint32_t blocks, host_blocks; /* as the pool's */
    int layers;
    struct kv_shape shape;
    void (*wake)(void *arg);     /* any thread: host_tier_collect() has something to do */
    void *arg;
    bool (*before_copy)(void *arg, uint64_t number); /* tests: copy_engine.h */
    void *before_copy_arg;
};

enum status host_tier_create(struct host_tier **out, struct backend *be,
                             const struct host_tier_config *cfg, struct error *err) MUST_USE;
/* Ends what is under way.  NULL is fine. */
void host_tier_destroy(struct host_tier *t);

void *host_tier_base(const struct host_tier *t);
/* Bytes from slot to slot. */
size_t host_tier_stride(const struct host_tier *t);

/* Start to store a sealed block, unless there is a copy.  False where it cannot be for now. */
bool host_tier_store(struct host_tier *t, kv_block b);
/* Start to load a pinned block that has a copy, with or without K and V; urgent before others.
 * False where it cannot be for now, or is being copied already. */
bool host_tier_load(struct host_tier *t, kv_block b, bool with_kv, bool urgent);

/* Take in what has ended: the pool knows then.  How many transfers that was. */
uint32_t host_tier_collect(struct host_tier *t);
uint32_t host_tier_under_way(const struct host_tier *t);
/* Its memory is still being pinned; wake() is called when there is more, and at the end. */
bool host_tier_grows(const struct host_tier *t);

/* Other than ST_OK once a copy has failed: the device is lost. */
enum status host_tier_failure(const struct host_tier *t, struct error *err);
struct copy_counts host_tier_counts(const struct host_tier *t);

#endif
