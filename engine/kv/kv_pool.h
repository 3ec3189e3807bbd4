#ifndef KV_POOL_H
#define KV_POOL_H

#include "engine/base/status.h"
#include "kernels/layout.h"

#include <stdbool.h>
#include <stdint.h>

struct backend;

/* Keys, values and their index, in equal blocks, on the device and in host memory.
 *
 * A block holds BLOCK_TOKENS consecutive tokens of one sequence, in every layer.  It is
 * a name and a count of users; what it contains lies in up to three places, each cut once
 * into equal slots:
 *
 *   kv      device: K and V     slot s of layer l at kv_pool_kv(pool, l) + s * block bytes
 *   index   device: the index   likewise at kv_pool_index(pool, l)
 *   host    host tier: K, V and index of all layers, slot s at byte s * kv_pool_host_bytes()
 *           of the tier: [layer] K and V, then [layer] index
 *
 * The pool keeps the books; it moves nothing itself.  Without a host tier (host_blocks 0) a
 * block always has a kv and an index slot.
 *
 *   pins    users: sequences that have it in their table.  A pinned block keeps its index
 *           slot, if it has one, and never ceases to exist.
 *   holds   users, of those with a pin, that need K and V on the device: they keep the kv slot.
 *           A block without holds and with a copy on the host may lose its kv slot whenever one is
 *           wanted, by kv_pool_take() or kv_pool_load_begin().
 *   copies  transfers under way, at most one for each block; meanwhile it keeps everything.
 *
 * Where a block can be:
 *
 *   RESIDENT   kv and index slot, perhaps a host slot
 *   OFFLOADED  index and host slot, no kv slot: readable through the host tier
 *   STORED     host slot alone: to be loaded before it is of use
 *
 * Without pins a block with a name stays findable, RESIDENT or STORED (an index slot without K
 * and V is given up with the last pin), until its slots are wanted: the least recently used first.
 * A block that is unpinned and has no name is gone; if it is being copied, when that ends.
 *
 * Names.  A sealed block is found by what it contains: its parent (the block
 * before it, itself named so), its tokens, and its provenance.  No two blocks have the same name:
 * see kv_pool_seal() for those that have none, duplicates among them, and neither have the blocks
 * that follow such a one.  Without a prefix cache no block has a name.  A find compares
 * the tokens themselves, all the way up, so two texts never share a block
 * because their hashes collide.  Provenance says how the keys and values came
 * about: K and V of a token decoded with sparse attention differ a little from
 * those of the same token prefilled, and may only be reused by a sequence that
 * would have computed them in the same way.  0 is dense; everything else is
 * the caller's.  salt separates users who must not see each other's timing.
 *
 * Rules:
 *
 *  1. Pin before touching; hold before reading K and V on the device beyond the next
 *     kv_pool_take() or kv_pool_load_begin().
 *  2. Only an unsealed block may be written, and only by the sequence that
 *     took it.  Sealing is one-way: a full block gets its name and becomes
 *     immutable, which is what makes sharing and copying safe.
 *  3. Finding a block implies that its parents were found: a chain is searched
 *     from its start, and a block whose parent is gone is never found again.  So the leaves of a
 *     chain go before their parents.  Where only a parent has what is wanted, its children being
 *     elsewhere or copied, it goes all the same; they stay until their own turn comes.
 *  4. A slot that a transfer reads or writes is given to nobody else until it has ended.
 *  5. In each place free + used == slots.  kv_pool_check() verifies these.
 *
 * Engine thread only. */

typedef uint32_t kv_block;
#define KV_BLOCK_NONE UINT32_MAX

struct kv_pool_config {
    uint32_t blocks;         /* kv slots */
    uint32_t index_blocks;   /* index slots, >= blocks; 0: as many.  What exceeds blocks is what
                                can be OFFLOADED while all of the kv slots are in use. */
    uint32_t host_blocks;    /* the most host slots there will be; 0: no host tier */
    uint32_t staged_blocks;  /* of each of the two buffers of kv_pool_staged(); 0: none */
    int layers;
    struct kv_shape shape;
    bool prefix_cache;       /* false: no block has a name, so what is unpinned is gone */
};

/* Of kv slots: free; cached, that kv_pool_take() may have; and pinned, the rest: held, being
 * copied, or without a copy on the host.  free + cached + pinned == blocks.  Of host slots, as
 * many as exist: likewise, cached are those that kv_pool_store_begin() may have. */
struct kv_pool_counts {
    uint32_t blocks, free, cached, pinned;
    uint32_t index_blocks, index_free;
    uint32_t host_blocks, host_free, host_cached;
    /* Since create.  Reclaimed are kv slots that some block had to give up. */
    uint64_t n_taken, n_reclaimed, n_sealed, n_duplicates;
    uint64_t n_stored, n_loaded;         /* transfers that arrived */
};

/* What names a block; see above.  parent is KV_BLOCK_NONE for the first. */
struct block_name {
    kv_block parent;
    const int32_t *tokens;   /* [BLOCK_TOKENS] */
    uint64_t provenance;
    uint64_t salt;           /* only counts in first blocks: children inherit it */
};

/* Slots with readable contents, -1 where there are none. */
struct block_place {
    int32_t kv, index, host;
};

struct kv_pool;

/* Bytes of device memory that one block costs, all layers, index included. */
size_t kv_pool_bytes_per_block(const struct kv_shape *shape, int layers);
/* Bytes of a slot of the host tier. */
size_t kv_pool_host_bytes(const struct kv_shape *shape, int layers);

enum status kv_pool_create(struct kv_pool **out, struct backend *be,
                           const struct kv_pool_config *cfg, struct error *err) MUST_USE;
void kv_pool_destroy(struct kv_pool *pool); /* ASSERTs that nothing is pinned or copied; NULL
                                               is fine */

/* Host slots [0, n) exist now; n only grows, up to host_blocks. */
void kv_pool_host_ready(struct kv_pool *pool, uint32_t n);

/* Take n blocks with a kv and an index slot each, pinned and held once, or none at all and
 * ST_BUSY.  Takes kv slots from unpinned blocks, least recently used first, and only then from
 * pinned ones without holds; index slots only from unpinned blocks. */
enum status kv_pool_take(struct kv_pool *pool, uint32_t n, kv_block *out) MUST_USE;
/* How many kv_pool_take() would give now. */
uint32_t kv_pool_available(const struct kv_pool *pool);
/* How many more it would give if the transfers that are under way had arrived. */
uint32_t kv_pool_clearing(const struct kv_pool *pool);

/* What is not pinned yet must have a name.  Whoever holds a block releases it before unpinning. */
void kv_pool_pin(struct kv_pool *pool, kv_block b);
void kv_pool_unpin(struct kv_pool *pool, kv_block b);
/* Holding wants a pin and a readable kv slot. */
void kv_pool_hold(struct kv_pool *pool, kv_block b);
void kv_pool_release(struct kv_pool *pool, kv_block b);

/* Declare the block full and immutable.  Returns the block to go on with: b itself, or an equal one
 * that has the name already, pinned and held in b's stead (b is released and unpinned): the
 * caller replaces b in its table.  If the equal one is not RESIDENT it takes over b's kv slot, and
 * b's index slot if it has none.  Only while it is being loaded it cannot: then b stays, without a
 * name.  b has one pin, and the parent in its name is sealed and pinned.  name NULL: nobody is to
 * find it, nor what follows it. */
kv_block kv_pool_seal(struct kv_pool *pool, kv_block b, const struct block_name *name);

/* Look up a sealed block and pin it, wherever it is.  KV_BLOCK_NONE when there is none.  The parent
 * in the name is pinned. */
kv_block kv_pool_find(struct kv_pool *pool, const struct block_name *name);

struct block_place kv_pool_place(const struct kv_pool *pool, kv_block b);
/* Grows whenever a place of a pinned block changes: tables made before are stale.  What
 * kv_pool_take() gives is not in them and does not count. */
uint64_t kv_pool_version(const struct kv_pool *pool);

/* ---- transfers
 *
 * begin reserves the slots and marks the block; the caller moves the bytes and then calls end,
 * with whether they arrived; if not, the slots are given back.  Begin returns false, and nothing
 * happens, where the block is being copied already, there is nothing to move, or no slot can be
 * had.  Pins and holds come and go meanwhile as at any time. */

/* Device to host, of a sealed RESIDENT block without a host slot.  *place: where from and to.
 * Takes the host slot of an unpinned block, least recently used first, when none is free. */
bool kv_pool_store_begin(struct kv_pool *pool, kv_block b, struct block_place *place);
void kv_pool_store_end(struct kv_pool *pool, kv_block b, bool arrived);

/* Host to device, of a pinned block with a host slot.  What is there already is not moved
 * (-1 in *place); with_kv false loads the index alone.  Slots come from where kv_pool_take() has
 * them.  The caller may hold it once K and V have arrived: until the next kv_pool_take() or
 * kv_pool_load_begin() they stay. */
bool kv_pool_load_begin(struct kv_pool *pool, kv_block b, bool with_kv, struct block_place *place);
void kv_pool_load_end(struct kv_pool *pool, kv_block b, bool arrived);

bf16 *kv_pool_kv(const struct kv_pool *pool, int layer);
uint8_t *kv_pool_index(const struct kv_pool *pool, int layer);

/* Two buffers behind the kv slots, for the blocks of one layer each that pass through the device
 * (model.h, streamed).  Tables name block i of a buffer by an id of its own in each layer. */
bf16 *kv_pool_staged(const struct kv_pool *pool, int buffer);
int32_t kv_pool_staged_id(const struct kv_pool *pool, int layer, int buffer, int i);

struct kv_pool_counts kv_pool_counts(const struct kv_pool *pool);
void kv_pool_check(const struct kv_pool *pool);   /* O(blocks) */

/* Tests: from now on, while nothing is taken yet, overwrite every free slot, and the destination of
 * every transfer when it begins, with NaN patterns, so that a read of stale memory shows.  host is
 * the tier's memory, or NULL.  Waits for the device whenever a slot becomes free. */
void kv_pool_poison(struct kv_pool *pool, void *host);

#endif
