#ifndef KV_POOL_H
#define KV_POOL_H

#include "engine/base/status.h"
#include "kernels/layout.h"

#include <stdbool.h>
#include <stdint.h>

struct backend;

/* Device memory for keys, values and their index, cut once into equal blocks.
 *
 * A block holds BLOCK_TOKENS consecutive tokens of one sequence, in every
 * layer: block b of layer l lies at kv_pool_kv(pool, l) + b * block bytes, its
 * index likewise.  A sequence grows in all layers at once, so one id and one
 * table serve them all.  Nothing is allocated after kv_pool_create().
 *
 * A block is in exactly one state:
 *
 *   FREE     on the free list, contents meaningless
 *   PINNED   in use by one or more sequences or copies
 *   CACHED   unpinned but sealed and findable; least recently used reclaimed first
 *
 *        take               seal + last unpin
 *   FREE ----> PINNED ----------------------> CACHED
 *     ^          | last unpin, not sealed        | find (pins again)
 *     +----------+<------------------------------+ reclaimed by take
 *
 * Names.  A sealed block is found by what it contains: its parent (the block
 * before it, itself named so), its tokens, and its provenance.  A find compares
 * the tokens themselves, all the way up, so two texts never share a block
 * because their hashes collide.  Provenance says how the keys and values came
 * about: K and V of a token decoded with sparse attention differ a little from
 * those of the same token prefilled, and may only be reused by a sequence that
 * would have computed them in the same way.  0 is dense; everything else is
 * the caller's.  salt separates users who must not see each other's timing.
 *
 * Rules:
 *
 *  1. Pin before touching.  An unpinned block may be given away by the next
 *     kv_pool_take().
 *  2. Only an unsealed block may be written, and only by the sequence that
 *     took it.  Sealing is one-way: a full block gets its name and becomes
 *     immutable, which is what makes sharing safe without copying.
 *  3. Finding a block implies that its parents were found: a chain is searched
 *     from its start, and a block whose parent was reclaimed is never found again
 *     (reclaiming takes the leaves of a chain before their parents).
 *  4. free + cached + pinned == blocks.  kv_pool_check() verifies it.
 *
 * Engine thread only. */

typedef uint32_t kv_block;
#define KV_BLOCK_NONE UINT32_MAX

struct kv_pool_config {
    uint32_t blocks;
    int layers;
    struct kv_shape shape;
    bool prefix_cache;       /* false: nothing is ever found, sealed blocks go FREE */
};

struct kv_pool_counts {
    uint32_t blocks, free, cached, pinned;
    uint64_t n_taken, n_reclaimed, n_sealed, n_duplicates; /* since create */
};

/* What names a block; see above.  parent is KV_BLOCK_NONE for the first. */
struct block_name {
    kv_block parent;
    const int32_t *tokens;   /* [BLOCK_TOKENS] */
    uint64_t provenance;
    uint64_t salt;           /* only counts in first blocks: children inherit it */
};

struct kv_pool;

/* Bytes of device memory that one block costs, all layers, index included. */
size_t kv_pool_bytes_per_block(const struct kv_shape *shape, int layers);

enum status kv_pool_create(struct kv_pool **out, struct backend *be,
                           const struct kv_pool_config *cfg, struct error *err) MUST_USE;
void kv_pool_destroy(struct kv_pool *pool); /* ASSERTs that nothing is pinned; NULL is fine */

/* Take n blocks, pinned once each, or none at all and ST_BUSY.  Reclaims
 * CACHED blocks when the free list is short. */
enum status kv_pool_take(struct kv_pool *pool, uint32_t n, kv_block *out) MUST_USE;

void kv_pool_pin(struct kv_pool *pool, kv_block b);
void kv_pool_unpin(struct kv_pool *pool, kv_block b);

/* Declare the block full and immutable.  Returns the block that carries the
 * name from now on: b itself, or an equal one that was there before, pinned
 * in b's stead (b is unpinned): the caller replaces b in its table. */
kv_block kv_pool_seal(struct kv_pool *pool, kv_block b, const struct block_name *name);

/* Look up a sealed block and pin it.  KV_BLOCK_NONE when there is none. */
kv_block kv_pool_find(struct kv_pool *pool, const struct block_name *name);

bf16 *kv_pool_kv(const struct kv_pool *pool, int layer);
uint8_t *kv_pool_index(const struct kv_pool *pool, int layer);
struct kv_pool_counts kv_pool_counts(const struct kv_pool *pool);
void kv_pool_check(const struct kv_pool *pool);   /* O(blocks) */

/* Tests: overwrite every FREE block with NaN patterns whenever it becomes
 * free, so that a read of stale memory shows.  Host-visible back ends only. */
void kv_pool_poison(struct kv_pool *pool, bool on);

#endif
