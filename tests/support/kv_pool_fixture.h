#ifndef KV_POOL_FIXTURE_H
#define KV_POOL_FIXTURE_H

#include "engine/kv/kv_pool.h"

/* A small pool on the CPU back end, as several tests need it.  What it returns without a
 * comment is checked to have succeeded. */

enum { POOL_LAYERS = 2 };

extern struct kv_pool *pool;
extern char *pool_host;          /* host tier of the pool that is open; NULL without one */

/* Fills in layers and shape; zeroes the host tier, of which ready slots are usable. */
void pool_open(struct kv_pool_config cfg, uint32_t ready);
void pool_close(void);           /* checks before */

const int32_t *pool_tokens(int text);                /* valid until the next call */
struct block_name pool_name(kv_block parent, int text, uint64_t provenance);

kv_block pool_take(void);
kv_block pool_seal(kv_block b, kv_block parent, int text);
kv_block pool_new(kv_block parent, int text);        /* take and seal */
kv_block pool_find(kv_block parent, int text);       /* or KV_BLOCK_NONE */
void pool_give(kv_block b);                          /* release and unpin */

/* Transfers with their bytes, from begin to end; begin must succeed. */
void pool_store(kv_block b);
void pool_load(kv_block b, bool with_kv);
void pool_move(bool to_host, const struct block_place *place, int layer);

/* Bytes of a block in a slot, one layer. */
size_t pool_kv_bytes(void);
size_t pool_index_bytes(void);
char *pool_kv_at(int layer, int32_t slot);
char *pool_index_at(int layer, int32_t slot);
char *pool_host_kv_at(int layer, int32_t slot);
char *pool_host_index_at(int layer, int32_t slot);

/* Write a pattern where the block is on the device, or ask whether all of it is
 * wherever the block is readable. */
void pool_write(const struct block_place *place, uint32_t pattern);
bool pool_reads(const struct block_place *place, uint32_t pattern);
/* Whether all of these slots are poisoned. */
bool pool_is_poisoned(const struct block_place *place);

#endif
