#ifndef KV_POOL_PARTS_H
#define KV_POOL_PARTS_H

#include "engine/kv/block_names.h"
#include "engine/kv/kv_pool.h"
#include "kernels/backend.h"

/* The inside of kv_pool.h, for kv_pool.c and kv_pool_check.c.
 *
 * A block is an entry.  It exists while it has a slot anywhere, and then it has
 * a kv or a host slot, so blocks + host_blocks entries are enough.
 *
 * Whose slots may be wanted is on a list, least recently used first:
 *
 *   CACHED        unpinned, kv slot; goes without harm: it has a copy on the host, or no children
 *   CACHED_INNER  unpinned, kv slot, but children would be lost with it: they are on the
 *                 host or being copied, else they would have gone before it
 *   OFFLOADABLE   pinned, kv slot without holds, copy on the host
 *   CLEARING      unpinned, kv slot, being copied; afterwards as the first two, or free
 *   CLEARING_PINNED  pinned, kv slot without holds, on its way to the host; then OFFLOADABLE
 *   HOST          unpinned, host slot; goes without harm: it has a kv slot as well, or no children
 *   HOST_INNER    unpinned, host slot alone, children
 *
 * The first five exclude each other, and so do the last two.  A block that is being copied is
 * on none but the two of CLEARING, which nobody takes from: they are there to be counted.  Where a
 * block belongs follows from what it is (device_list, host_list); whoever changes a block relists
 * it. */

#define NONE KV_BLOCK_NONE

enum place { AT_KV, AT_INDEX, AT_HOST, PLACES };
enum side { ON_DEVICE, ON_HOST, SIDES };
enum list_id { LIST_NONE, LIST_CACHED, LIST_CACHED_INNER, LIST_OFFLOADABLE, LIST_CLEARING,
               LIST_CLEARING_PINNED, LIST_HOST, LIST_HOST_INNER, LISTS };

struct link {
    kv_block prev, next;
};

/* A cache line each: tables are made from these in every step.  The names are elsewhere. */
struct entry {
    uint32_t pins, holds;
    uint32_t slot[PLACES];         /* NONE where it has none */
    uint32_t n_children;           /* blocks whose name has this one as parent */
    struct link link[SIDES];
    uint8_t list[SIDES];           /* enum list_id */
    uint8_t coming;                /* bit for each place that a transfer writes to */
    bool sealed;
};

struct list {
    kv_block first, last;
    uint32_t n;
};

/* Of one place, or ids: which are free.  The last is given out next. */
struct slots {
    uint32_t n, n_free;
    uint32_t *free;
};

struct kv_pool {
    struct backend *be;
    struct kv_pool_config cfg;     /* index_blocks resolved */
    struct buffer kv, index;
    size_t kv_layer_bytes, index_layer_bytes;
    struct entry *entries;         /* [ids.n] */
    struct block_names names;
    struct slots ids, slots[PLACES];
    struct list lists[LISTS];      /* that of LIST_NONE is not kept */
    uint64_t version;
    struct kv_pool_counts totals;  /* the counters since create */
    struct stream *poison;         /* that writes NaN, or NULL */
    char *host;                    /* with poison; or NULL */
};

/* Readable there: it has a slot and nothing is on its way into it. */
static inline bool is_at(const struct entry *e, enum place at)
{
    return e->slot[at] != NONE && !(e->coming >> at & 1);
}

static inline enum list_id device_list(const struct entry *e)
{
    bool on_host = e->slot[AT_HOST] != NONE;

    if (e->slot[AT_KV] == NONE || e->holds || !e->sealed)
        return LIST_NONE;
    if (e->coming && e->pins)
        return e->coming == 1u << AT_HOST ? LIST_CLEARING_PINNED : LIST_NONE;
    if (e->coming)
        return LIST_CLEARING;
    if (e->pins)
        return on_host ? LIST_OFFLOADABLE : LIST_NONE;
    return on_host || e->n_children == 0 ? LIST_CACHED : LIST_CACHED_INNER;
}

static inline enum list_id host_list(const struct entry *e)
{
    if (e->slot[AT_HOST] == NONE || e->coming || e->pins)
        return LIST_NONE;
    return e->slot[AT_KV] != NONE || e->n_children == 0 ? LIST_HOST : LIST_HOST_INNER;
}

/* kv_pool_check.c: overwrite a slot with NaN. */
void kv_pool_fill_nan(struct kv_pool *p, enum place at, uint32_t slot);

#endif
