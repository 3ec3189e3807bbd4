#ifndef BLOCK_NAMES_H
#define BLOCK_NAMES_H

#include "engine/kv/kv_pool.h"

/* The names of blocks (kv_pool.h): which block comes after that one with these tokens?
 *
 * A block has one name or none.  Every name that is given gets a number of its own, never used
 * again, and a child knows its parent by that number.  So nothing has to be done about the
 * children of a block that loses its name: they are not found any more, and whatever is
 * called by the same id next is not taken for their parent.
 *
 * Engine thread only. */

struct block_names {
    struct name *names;          /* [n_blocks] */
    uint32_t n_blocks;
    kv_block *buckets;
    uint32_t bucket_mask;
    uint64_t n_given;
};

void block_names_init(struct block_names *t, uint32_t n_blocks);
void block_names_fini(struct block_names *t);          /* a zeroed one is fine */

bool block_names_has(const struct block_names *t, kv_block b);
/* KV_BLOCK_NONE where there is none, or the parent has no name. */
kv_block block_names_find(const struct block_names *t, const struct block_name *name);
/* b has none; the parent has one, and no block has this one. */
void block_names_give(struct block_names *t, kv_block b, const struct block_name *name);
void block_names_remove(struct block_names *t, kv_block b);
/* Of a block with a name: KV_BLOCK_NONE for a first one, and when the parent lost its name. */
kv_block block_names_parent(const struct block_names *t, kv_block b);

void block_names_check(const struct block_names *t);   /* O(blocks) */

#endif
