#include "engine/kv/kv_pool.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "kernels/backend.h"

#define XXH_INLINE_ALL
#include <string.h>
#include <xxhash.h>

/* Every block has one entry.  Entries are on at most one list:
 *
 *   free     FREE blocks
 *   leaves   CACHED blocks without a sealed child, least recently used first
 *
 * A CACHED block with sealed children is on neither: it is reached again when
 * its last child is reclaimed.  So reclaiming always takes a leaf, a chain
 * dies from its end, and a sealed block's parent is always sealed: parents
 * can be compared by id. */

#define NONE KV_BLOCK_NONE

struct entry {
    uint32_t pins;
    bool sealed;
    kv_block parent;               /* sealed: the block before, or NONE */
    uint32_t n_children;           /* sealed blocks whose parent this is */
    kv_block prev, next;           /* in a list */
    kv_block chain;                /* next in the hash bucket */
    uint64_t provenance, salt, hash;
    int32_t tokens[BLOCK_TOKENS];
};

struct list {
    kv_block first, last;
    uint32_t n;
};

struct kv_pool {
    struct backend *be;
    struct kv_pool_config cfg;
    struct buffer kv, index;
    size_t kv_layer_bytes, index_layer_bytes;
    struct entry *entries;
    kv_block *buckets;
    uint32_t bucket_mask;
    struct list free, leaves;
    uint32_t n_pinned;
    bool poison;
    struct kv_pool_counts totals;  /* the counters since create */
};

static void list_append(struct kv_pool *p, struct list *l, kv_block b)
{
    struct entry *e = &p->entries[b];

    e->prev = l->last;
    e->next = NONE;
    if (l->last != NONE)
        p->entries[l->last].next = b;
    else
        l->first = b;
    l->last = b;
    l->n++;
}

static void list_prepend(struct kv_pool *p, struct list *l, kv_block b)
{
    struct entry *e = &p->entries[b];

    e->prev = NONE;
    e->next = l->first;
    if (l->first != NONE)
        p->entries[l->first].prev = b;
    else
        l->last = b;
    l->first = b;
    l->n++;
}

static void list_remove(struct kv_pool *p, struct list *l, kv_block b)
{
    struct entry *e = &p->entries[b];

    if (e->prev != NONE)
        p->entries[e->prev].next = e->next;
    else
        l->first = e->next;
    if (e->next != NONE)
        p->entries[e->next].prev = e->prev;
    else
        l->last = e->prev;
    e->prev = e->next = NONE;
    l->n--;
}

/* ---- names */

static uint64_t hash_name(const struct block_name *name)
{
    struct {
        uint64_t parent, provenance, salt;
    } head = { name->parent, name->provenance, name->parent == NONE ? name->salt : 0 };
    uint64_t seed = XXH3_64bits(&head, sizeof head);

    return XXH3_64bits_withSeed(name->tokens, BLOCK_TOKENS * sizeof *name->tokens, seed);
}

static bool has_name(const struct entry *e, const struct block_name *name, uint64_t hash)
{
    return e->hash == hash && e->parent == name->parent && e->provenance == name->provenance &&
           (name->parent != NONE || e->salt == name->salt) &&
           memcmp(e->tokens, name->tokens, sizeof e->tokens) == 0;
}

static kv_block lookup(const struct kv_pool *p, const struct block_name *name, uint64_t hash)
{
    kv_block b = p->buckets[hash & p->bucket_mask];

    while (b != NONE && !has_name(&p->entries[b], name, hash))
        b = p->entries[b].chain;
    return b;
}

static void unlist(struct kv_pool *p, kv_block b)
{
    kv_block *at = &p->buckets[p->entries[b].hash & p->bucket_mask];

    while (*at != b)
        at = &p->entries[*at].chain;
    *at = p->entries[b].chain;
    p->entries[b].chain = NONE;
}

/* ---- states */

static void fill_nan(struct kv_pool *p, kv_block b)
{
    size_t kv = kv_block_bytes(&p->cfg.shape), index = index_block_bytes(&p->cfg.shape);

    for (int layer = 0; layer < p->cfg.layers; layer++) {
        memset((char *)kv_pool_kv(p, layer) + b * kv, 0xff, kv);
        memset(kv_pool_index(p, layer) + b * index, 0xff, index);
    }
}

static void make_free(struct kv_pool *p, kv_block b)
{
    if (p->poison)
        fill_nan(p, b);
    list_append(p, &p->free, b);
}

/* An unpinned sealed block; a leaf if nothing hangs on it. */
static void make_cached(struct kv_pool *p, kv_block b)
{
    if (p->entries[b].n_children == 0)
        list_append(p, &p->leaves, b);
}

static void forget(struct kv_pool *p, kv_block b)
{
    struct entry *e = &p->entries[b];

    unlist(p, b);
    e->sealed = false;
    if (e->parent != NONE) {
        struct entry *parent = &p->entries[e->parent];
        ASSERT(parent->sealed && parent->n_children > 0);
        /* In front: it was last used when its child was, so the oldest chain
         * is eaten up from its end before the next is touched. */
        if (--parent->n_children == 0 && parent->pins == 0)
            list_prepend(p, &p->leaves, e->parent);
    }
    e->parent = NONE;
}

void kv_pool_pin(struct kv_pool *p, kv_block b)
{
    ASSERT(b < p->cfg.blocks);
    struct entry *e = &p->entries[b];

    if (e->pins++ == 0) {
        ASSERT(e->sealed);
        if (e->n_children == 0)
            list_remove(p, &p->leaves, b);
        p->n_pinned++;
    }
}

void kv_pool_unpin(struct kv_pool *p, kv_block b)
{
    ASSERT(b < p->cfg.blocks);
    struct entry *e = &p->entries[b];

    ASSERT(e->pins > 0);
    if (--e->pins > 0)
        return;
    p->n_pinned--;
    if (e->sealed)
        make_cached(p, b);
    else
        make_free(p, b);
}

enum status kv_pool_take(struct kv_pool *p, uint32_t n, kv_block *out)
{
    if (n > p->cfg.blocks - p->n_pinned)
        return ST_BUSY;
    for (uint32_t i = 0; i < n; i++) {
        kv_block b = p->free.first;
        if (b != NONE)
            list_remove(p, &p->free, b);
        else {
            b = p->leaves.first;
            ASSERT(b != NONE);
            list_remove(p, &p->leaves, b);
            forget(p, b);
            p->totals.n_reclaimed++;
            if (p->poison)
                fill_nan(p, b);
        }
        p->entries[b].pins = 1;
        p->n_pinned++;
        out[i] = b;
    }
    p->totals.n_taken += n;
    return ST_OK;
}

kv_block kv_pool_find(struct kv_pool *p, const struct block_name *name)
{
    kv_block b = lookup(p, name, hash_name(name));

    if (b != NONE)
        kv_pool_pin(p, b);
    return b;
}

kv_block kv_pool_seal(struct kv_pool *p, kv_block b, const struct block_name *name)
{
    ASSERT(b < p->cfg.blocks);
    struct entry *e = &p->entries[b];

    ASSERT(e->pins == 1 && !e->sealed && name->parent != b);
    if (!p->cfg.prefix_cache)
        return b;
    ASSERT(name->parent == NONE || p->entries[name->parent].sealed);
    uint64_t hash = hash_name(name);
    kv_block twin = lookup(p, name, hash);
    if (twin != NONE) {
        kv_pool_pin(p, twin);
        kv_pool_unpin(p, b);
        p->totals.n_duplicates++;
        return twin;
    }
    e->sealed = true;
    e->parent = name->parent;
    e->provenance = name->provenance;
    e->salt = name->salt;
    e->hash = hash;
    memcpy(e->tokens, name->tokens, sizeof e->tokens);
    e->chain = p->buckets[hash & p->bucket_mask];
    p->buckets[hash & p->bucket_mask] = b;
    if (e->parent != NONE)
        p->entries[e->parent].n_children++;
    p->totals.n_sealed++;
    return b;
}

/* ---- life */

size_t kv_pool_bytes_per_block(const struct kv_shape *shape, int layers)
{
    return (size_t)layers * (kv_block_bytes(shape) + index_block_bytes(shape));
}

enum status kv_pool_create(struct kv_pool **out, struct backend *be,
                           const struct kv_pool_config *cfg, struct error *err)
{
    struct kv_pool *p = mem_calloc(1, sizeof *p);
    uint32_t n_buckets = 16;

    *out = NULL;
    ASSERT(cfg->blocks > 0 && cfg->blocks < NONE / 2 && cfg->layers > 0);
    p->be = be;
    p->cfg = *cfg;
    p->kv_layer_bytes = cfg->blocks * kv_block_bytes(&cfg->shape);
    p->index_layer_bytes = cfg->blocks * index_block_bytes(&cfg->shape);
    size_t kv_bytes = p->kv_layer_bytes * (size_t)cfg->layers;
    size_t index_bytes = p->index_layer_bytes * (size_t)cfg->layers;
    enum status st = buffer_alloc(be, &p->kv, MEM_DEVICE, kv_bytes);
    if (st == ST_OK)
        st = buffer_alloc(be, &p->index, MEM_DEVICE, index_bytes);
    if (st != ST_OK) {
        kv_pool_destroy(p);
        return error_set(err, st, "the KV pool of %u blocks needs %zu MB and its index %zu MB, "
                         "more than the device has", cfg->blocks, kv_bytes >> 20,
                         index_bytes >> 20);
    }
    while (n_buckets < cfg->blocks * 2u)
        n_buckets *= 2;
    p->bucket_mask = n_buckets - 1;
    p->buckets = mem_alloc(n_buckets * sizeof *p->buckets);
    memset(p->buckets, 0xff, n_buckets * sizeof *p->buckets);
    p->entries = mem_calloc(cfg->blocks, sizeof *p->entries);
    p->free = p->leaves = (struct list){ NONE, NONE, 0 };
    for (kv_block b = 0; b < cfg->blocks; b++) {
        p->entries[b].parent = p->entries[b].chain = NONE;
        list_append(p, &p->free, b);
    }
    *out = p;
    return ST_OK;
}

void kv_pool_destroy(struct kv_pool *p)
{
    if (!p)
        return;
    ASSERT(p->n_pinned == 0);
    buffer_free(p->be, &p->kv);
    buffer_free(p->be, &p->index);
    mem_free(p->buckets);
    mem_free(p->entries);
    mem_free(p);
}

void kv_pool_poison(struct kv_pool *p, bool on, void *host)
{
    (void)host;
    ASSERT(!on || backend_info(p->be)->host_visible);
    p->poison = on;
    if (on)
        for (kv_block b = p->free.first; b != NONE; b = p->entries[b].next)
            fill_nan(p, b);
}

bf16 *kv_pool_kv(const struct kv_pool *p, int layer)
{
    return (bf16 *)((char *)p->kv.base + (size_t)layer * p->kv_layer_bytes);
}

uint8_t *kv_pool_index(const struct kv_pool *p, int layer)
{
    return (uint8_t *)p->index.base + (size_t)layer * p->index_layer_bytes;
}

struct kv_pool_counts kv_pool_counts(const struct kv_pool *p)
{
    struct kv_pool_counts c = p->totals;

    c.blocks = p->cfg.blocks;
    c.free = p->free.n;
    c.pinned = p->n_pinned;
    c.cached = c.blocks - c.free - c.pinned;
    return c;
}

static void check_list(const struct kv_pool *p, const struct list *l, uint8_t *mark, uint8_t as)
{
    kv_block before = NONE;
    uint32_t n = 0;

    for (kv_block b = l->first; b != NONE; before = b, b = p->entries[b].next, n++) {
        ASSERT(b < p->cfg.blocks && mark[b] == 0 && p->entries[b].prev == before);
        mark[b] = as;
    }
    ASSERT(l->last == before && l->n == n);
}

void kv_pool_check(const struct kv_pool *p)
{
    enum { ON_FREE = 1, ON_LEAVES = 2 };
    uint8_t *mark = mem_calloc(p->cfg.blocks, 1);
    uint32_t *children = mem_calloc(p->cfg.blocks, sizeof *children);
    uint32_t pinned = 0, sealed = 0, listed = 0;

    check_list(p, &p->free, mark, ON_FREE);
    check_list(p, &p->leaves, mark, ON_LEAVES);
    for (kv_block b = 0; b < p->cfg.blocks; b++) {
        const struct entry *e = &p->entries[b];
        pinned += e->pins > 0;
        sealed += e->sealed;
        ASSERT((mark[b] == ON_FREE) == (e->pins == 0 && !e->sealed));
        ASSERT((mark[b] == ON_LEAVES) == (e->pins == 0 && e->sealed && e->n_children == 0));
        if (!e->sealed || e->parent == NONE)
            continue;
        ASSERT(p->entries[e->parent].sealed);
        ASSERT(e->pins == 0 || p->entries[e->parent].pins > 0);
        children[e->parent]++;
    }
    for (kv_block b = 0; b < p->cfg.blocks; b++)
        ASSERT(children[b] == p->entries[b].n_children);
    for (uint32_t i = 0; i <= p->bucket_mask; i++)
        for (kv_block b = p->buckets[i]; b != NONE; b = p->entries[b].chain, listed++)
            ASSERT(p->entries[b].sealed && (p->entries[b].hash & p->bucket_mask) == i);
    ASSERT(pinned == p->n_pinned && sealed == listed);
    mem_free(children);
    mem_free(mark);
}
