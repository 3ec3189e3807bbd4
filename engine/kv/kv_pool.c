#include "engine/kv/kv_pool_parts.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"

#include <string.h>

/* ---- slots */

/* Slots up to n exist; of those that are free the lowest is given out first. */
static void slots_grow(struct slots *s, uint32_t n)
{
    for (uint32_t slot = n; slot > s->n; slot--)
        s->free[s->n_free++] = slot - 1;
    s->n = n;
}

static void slots_init(struct slots *s, uint32_t most, uint32_t n)
{
    s->free = mem_calloc(most, sizeof *s->free);
    slots_grow(s, n);
}

static void take_slot(struct kv_pool *p, kv_block b, enum place at)
{
    struct slots *s = &p->slots[at];

    ASSERT(s->n_free > 0 && p->entries[b].slot[at] == NONE);
    p->entries[b].slot[at] = s->free[--s->n_free];
}

/* Poison here is enough: whatever is taken or written to by a transfer was free before. */
static void give_slot(struct kv_pool *p, kv_block b, enum place at)
{
    struct slots *s = &p->slots[at];
    uint32_t slot = p->entries[b].slot[at];

    ASSERT(slot != NONE);
    if (p->poison)
        kv_pool_fill_nan(p, at, slot);
    s->free[s->n_free++] = slot;
    p->entries[b].slot[at] = NONE;
}

static void move_slot(struct entry *to, struct entry *from, enum place at)
{
    ASSERT(to->slot[at] == NONE && from->slot[at] != NONE);
    to->slot[at] = from->slot[at];
    from->slot[at] = NONE;
}

/* ---- lists */

static void list_insert(struct kv_pool *p, enum list_id id, enum side side, kv_block b, bool front)
{
    struct list *l = &p->lists[id];
    kv_block prev = front ? NONE : l->last, next = front ? l->first : NONE;

    p->entries[b].link[side] = (struct link){ prev, next };
    if (prev != NONE)
        p->entries[prev].link[side].next = b;
    else
        l->first = b;
    if (next != NONE)
        p->entries[next].link[side].prev = b;
    else
        l->last = b;
    l->n++;
}

static void list_remove(struct kv_pool *p, enum list_id id, enum side side, kv_block b)
{
    struct list *l = &p->lists[id];
    struct link at = p->entries[b].link[side];

    if (at.prev != NONE)
        p->entries[at.prev].link[side].next = at.next;
    else
        l->first = at.next;
    if (at.next != NONE)
        p->entries[at.next].link[side].prev = at.prev;
    else
        l->last = at.prev;
    l->n--;
}

static void relist_side(struct kv_pool *p, kv_block b, enum side side, enum list_id to, bool front)
{
    struct entry *e = &p->entries[b];

    if (e->list[side] == to)
        return;
    if (e->list[side] != LIST_NONE)
        list_remove(p, (enum list_id)e->list[side], side, b);
    if (to != LIST_NONE)
        list_insert(p, to, side, b, front);
    e->list[side] = (uint8_t)to;
}

/* Put a block where it belongs, at the end unless told otherwise; it keeps its turn where
 * it is already. */
static void relist(struct kv_pool *p, kv_block b, bool front)
{
    const struct entry *e = &p->entries[b];

    relist_side(p, b, ON_DEVICE, device_list(e), front);
    relist_side(p, b, ON_HOST, host_list(e), front);
}

/* ---- blocks come and go */

static void give_name(struct kv_pool *p, kv_block b, const struct block_name *name)
{
    block_names_give(&p->names, b, name);
    if (name->parent != NONE) {
        p->entries[name->parent].n_children++;
        relist(p, name->parent, false);
    }
}

static void remove_name(struct kv_pool *p, kv_block b)
{
    kv_block parent = block_names_parent(&p->names, b);

    block_names_remove(&p->names, b);
    p->entries[b].n_children = 0;   /* none of them knows it any more */
    if (parent == NONE)
        return;
    ASSERT(p->entries[parent].n_children > 0);
    /* In front: it was last used when its child was, so the oldest chain is eaten up
     * from its end before the next is touched. */
    if (--p->entries[parent].n_children == 0)
        relist(p, parent, true);
}

static void discard(struct kv_pool *p, kv_block b)
{
    struct entry *e = &p->entries[b];

    ASSERT(e->pins == 0 && e->holds == 0 && !e->coming);
    if (block_names_has(&p->names, b))
        remove_name(p, b);
    for (int at = 0; at < PLACES; at++)
        if (e->slot[at] != NONE)
            give_slot(p, b, (enum place)at);
    relist(p, b, false);
    e->sealed = false;
    p->ids.free[p->ids.n_free++] = b;
}

/* A user, a transfer or a slot has left this block: what reason is there for the rest of it? */
static void settle(struct kv_pool *p, kv_block b)
{
    const struct entry *e = &p->entries[b];

    if (e->pins == 0 && !e->coming) {
        if (!block_names_has(&p->names, b)) {
            discard(p, b);
            return;
        }
        if (e->slot[AT_KV] == NONE && e->slot[AT_INDEX] != NONE)
            give_slot(p, b, AT_INDEX);
    }
    relist(p, b, false);
}

/* ---- room */

static uint32_t n_unpinned(const struct kv_pool *p)
{
    return p->lists[LIST_CACHED].n + p->lists[LIST_CACHED_INNER].n;
}

/* An unpinned block with K and V has an index as well and gives both. */
static uint32_t kv_obtainable(const struct kv_pool *p)
{
    return p->slots[AT_KV].n_free + n_unpinned(p) + p->lists[LIST_OFFLOADABLE].n;
}

static uint32_t index_obtainable(const struct kv_pool *p)
{
    return p->slots[AT_INDEX].n_free + n_unpinned(p);
}

static void reclaim_kv(struct kv_pool *p)
{
    kv_block b = p->lists[LIST_CACHED].first;

    if (b == NONE)
        b = p->lists[LIST_CACHED_INNER].first;
    if (b == NONE)
        b = p->lists[LIST_OFFLOADABLE].first;
    ASSERT(b != NONE);
    p->totals.n_reclaimed++;
    if (p->entries[b].slot[AT_HOST] == NONE) {
        discard(p, b);
        return;
    }
    give_slot(p, b, AT_KV);
    p->version += p->entries[b].pins > 0;
    settle(p, b);
}

/* Make so many slots free, or change nothing. */
static bool make_room(struct kv_pool *p, uint32_t n_kv, uint32_t n_index)
{
    if (n_kv > kv_obtainable(p) || n_index > index_obtainable(p))
        return false;
    while (p->slots[AT_KV].n_free < n_kv || p->slots[AT_INDEX].n_free < n_index)
        reclaim_kv(p);
    return true;
}

static bool make_host_room(struct kv_pool *p)
{
    kv_block b = p->lists[LIST_HOST].first;

    if (p->slots[AT_HOST].n_free > 0)
        return true;
    if (b == NONE)
        b = p->lists[LIST_HOST_INNER].first;
    if (b == NONE)
        return false;
    if (p->entries[b].slot[AT_KV] == NONE)
        discard(p, b);
    else {
        give_slot(p, b, AT_HOST);
        relist(p, b, false);
    }
    return true;
}

uint32_t kv_pool_available(const struct kv_pool *p)
{
    uint32_t kv = kv_obtainable(p), index = index_obtainable(p);

    return kv < index ? kv : index;
}

uint32_t kv_pool_clearing(const struct kv_pool *p)
{
    uint32_t unpinned = p->lists[LIST_CLEARING].n;
    uint32_t kv = kv_obtainable(p) + unpinned + p->lists[LIST_CLEARING_PINNED].n;
    uint32_t index = index_obtainable(p) + unpinned;

    return (kv < index ? kv : index) - kv_pool_available(p);
}

enum status kv_pool_take(struct kv_pool *p, uint32_t n, kv_block *out)
{
    if (!make_room(p, n, n))
        return ST_BUSY;
    for (uint32_t i = 0; i < n; i++) {
        kv_block b = out[i] = p->ids.free[--p->ids.n_free];
        p->entries[b].pins = p->entries[b].holds = 1;
        take_slot(p, b, AT_KV);
        take_slot(p, b, AT_INDEX);
    }
    p->totals.n_taken += n;
    return ST_OK;
}

/* ---- users */

void kv_pool_pin(struct kv_pool *p, kv_block b)
{
    ASSERT(b < p->ids.n);
    ASSERT(p->entries[b].pins > 0 || block_names_has(&p->names, b));
    p->entries[b].pins++;
    relist(p, b, false);
}

void kv_pool_unpin(struct kv_pool *p, kv_block b)
{
    ASSERT(b < p->ids.n && p->entries[b].pins > p->entries[b].holds);
    p->entries[b].pins--;
    settle(p, b);
}

void kv_pool_hold(struct kv_pool *p, kv_block b)
{
    ASSERT(b < p->ids.n && p->entries[b].holds < p->entries[b].pins);
    ASSERT(is_at(&p->entries[b], AT_KV));
    p->entries[b].holds++;
    relist(p, b, false);
}

void kv_pool_release(struct kv_pool *p, kv_block b)
{
    ASSERT(b < p->ids.n && p->entries[b].holds > 0);
    p->entries[b].holds--;
    relist(p, b, false);
}

/* ---- names */

kv_block kv_pool_find(struct kv_pool *p, const struct block_name *name)
{
    ASSERT(name->parent == NONE ||
           (name->parent < p->ids.n && p->entries[name->parent].pins > 0));
    kv_block b = block_names_find(&p->names, name);

    if (b != NONE)
        kv_pool_pin(p, b);
    return b;
}

/* The users of b go on with its equal, which takes what K, V and index it lacks. */
static kv_block replace(struct kv_pool *p, kv_block b, kv_block twin)
{
    struct entry *e = &p->entries[b], *t = &p->entries[twin];

    if (t->slot[AT_KV] == NONE) {
        move_slot(t, e, AT_KV);
        if (t->slot[AT_INDEX] == NONE)
            move_slot(t, e, AT_INDEX);
        p->version++;
    }
    t->pins += e->pins;
    t->holds += e->holds;
    relist(p, twin, false);
    e->pins = e->holds = 0;
    settle(p, b);
    return twin;
}

kv_block kv_pool_seal(struct kv_pool *p, kv_block b, const struct block_name *name)
{
    ASSERT(b < p->ids.n);
    struct entry *e = &p->entries[b];
    kv_block twin = NONE;

    ASSERT(e->pins == 1 && !e->sealed);
    ASSERT(!name || name->parent == NONE ||
           (name->parent < p->ids.n && name->parent != b && p->entries[name->parent].sealed));
    bool nameable = name && p->cfg.prefix_cache &&
                    (name->parent == NONE || block_names_has(&p->names, name->parent));
    if (nameable)
        twin = block_names_find(&p->names, name);
    if (twin != NONE) {
        const struct entry *t = &p->entries[twin];
        p->totals.n_duplicates++;
        if (is_at(t, AT_KV) || !t->coming)
            return replace(p, b, twin);
    }
    e->sealed = true;
    p->totals.n_sealed++;
    if (nameable && twin == NONE)
        give_name(p, b, name);
    relist(p, b, false);
    return b;
}

/* ---- places */

static int32_t slot_if(const struct entry *e, enum place at, bool wanted)
{
    return wanted && e->slot[at] != NONE ? (int32_t)e->slot[at] : -1;
}

struct block_place kv_pool_place(const struct kv_pool *p, kv_block b)
{
    ASSERT(b < p->ids.n);
    const struct entry *e = &p->entries[b];

    return (struct block_place){
        .kv = slot_if(e, AT_KV, is_at(e, AT_KV)),
        .index = slot_if(e, AT_INDEX, is_at(e, AT_INDEX)),
        .host = slot_if(e, AT_HOST, is_at(e, AT_HOST)),
    };
}

uint64_t kv_pool_version(const struct kv_pool *p)
{
    return p->version;
}

/* ---- transfers */

bool kv_pool_store_begin(struct kv_pool *p, kv_block b, struct block_place *place)
{
    ASSERT(b < p->ids.n && p->entries[b].sealed);
    struct entry *e = &p->entries[b];

    if (e->coming)
        return false;
    ASSERT(e->slot[AT_KV] != NONE && e->slot[AT_HOST] == NONE);
    if (!make_host_room(p))
        return false;
    take_slot(p, b, AT_HOST);
    e->coming = 1u << AT_HOST;
    relist(p, b, false);
    *place = (struct block_place){ (int32_t)e->slot[AT_KV], (int32_t)e->slot[AT_INDEX],
                                   (int32_t)e->slot[AT_HOST] };
    return true;
}

bool kv_pool_load_begin(struct kv_pool *p, kv_block b, bool with_kv, struct block_place *place)
{
    ASSERT(b < p->ids.n && p->entries[b].pins > 0);
    struct entry *e = &p->entries[b];

    if (e->coming)
        return false;
    ASSERT(e->slot[AT_HOST] != NONE);
    bool kv = with_kv && e->slot[AT_KV] == NONE, index = e->slot[AT_INDEX] == NONE;
    if ((!kv && !index) || !make_room(p, kv, index))
        return false;
    if (kv)
        take_slot(p, b, AT_KV);
    if (index)
        take_slot(p, b, AT_INDEX);
    e->coming = (uint8_t)(kv << AT_KV | index << AT_INDEX);
    relist(p, b, false);
    *place = (struct block_place){ slot_if(e, AT_KV, kv), slot_if(e, AT_INDEX, index),
                                   (int32_t)e->slot[AT_HOST] };
    return true;
}

static void end_copy(struct kv_pool *p, kv_block b, bool arrived)
{
    struct entry *e = &p->entries[b];

    for (int at = 0; at < PLACES && !arrived; at++)
        if (e->coming >> at & 1)
            give_slot(p, b, (enum place)at);
    e->coming = 0;
    p->version += arrived && e->pins > 0;
    settle(p, b);
}

void kv_pool_store_end(struct kv_pool *p, kv_block b, bool arrived)
{
    ASSERT(b < p->ids.n && p->entries[b].coming == 1u << AT_HOST);
    p->totals.n_stored += arrived;
    end_copy(p, b, arrived);
}

void kv_pool_load_end(struct kv_pool *p, kv_block b, bool arrived)
{
    ASSERT(b < p->ids.n && p->entries[b].coming);
    ASSERT(p->entries[b].coming != 1u << AT_HOST);
    p->totals.n_loaded += arrived;
    end_copy(p, b, arrived);
}

/* ---- life */

size_t kv_pool_bytes_per_block(const struct kv_shape *shape, int layers)
{
    return (size_t)layers * (kv_block_bytes(shape) + index_block_bytes(shape));
}

size_t kv_pool_host_bytes(const struct kv_shape *shape, int layers)
{
    return kv_pool_bytes_per_block(shape, layers);
}

static void init_books(struct kv_pool *p)
{
    const struct kv_pool_config *cfg = &p->cfg;
    uint32_t n = cfg->blocks + cfg->host_blocks;

    slots_init(&p->ids, n, n);
    slots_init(&p->slots[AT_KV], cfg->blocks, cfg->blocks);
    slots_init(&p->slots[AT_INDEX], cfg->index_blocks, cfg->index_blocks);
    slots_init(&p->slots[AT_HOST], cfg->host_blocks, 0);
    block_names_init(&p->names, n);
    for (int id = 0; id < LISTS; id++)
        p->lists[id] = (struct list){ NONE, NONE, 0 };
    p->entries = mem_calloc(n, sizeof *p->entries);
    for (kv_block b = 0; b < n; b++)
        for (int at = 0; at < PLACES; at++)
            p->entries[b].slot[at] = NONE;
}

enum status kv_pool_create(struct kv_pool **out, struct backend *be,
                           const struct kv_pool_config *cfg, struct error *err)
{
    struct kv_pool *p = mem_calloc(1, sizeof *p);
    size_t layers = (size_t)cfg->layers;

    *out = NULL;
    ASSERT(cfg->blocks > 0 && cfg->blocks < NONE / 4 && cfg->layers > 0);
    ASSERT(cfg->host_blocks < NONE / 4 && cfg->index_blocks < NONE / 4);
    ASSERT(cfg->index_blocks == 0 || cfg->index_blocks >= cfg->blocks);
    p->be = be;
    p->cfg = *cfg;
    if (p->cfg.index_blocks == 0)
        p->cfg.index_blocks = cfg->blocks;
    p->kv_layer_bytes = cfg->blocks * kv_block_bytes(&cfg->shape);
    p->index_layer_bytes = p->cfg.index_blocks * index_block_bytes(&cfg->shape);
    size_t staged = 2 * cfg->staged_blocks * kv_block_bytes(&cfg->shape);
    enum status st = buffer_alloc(be, &p->kv, MEM_DEVICE, p->kv_layer_bytes * layers + staged);
    if (st == ST_OK)
        st = buffer_alloc(be, &p->index, MEM_DEVICE, p->index_layer_bytes * layers);
    if (st != ST_OK) {
        size_t kv_mb = p->kv_layer_bytes * layers >> 20;
        size_t index_mb = p->index_layer_bytes * layers >> 20;
        kv_pool_destroy(p);
        return error_set(err, st, "the KV pool of %u blocks needs %zu MB and its index %zu MB, "
                         "more than the device has", cfg->blocks, kv_mb, index_mb);
    }
    init_books(p);
    *out = p;
    return ST_OK;
}

void kv_pool_destroy(struct kv_pool *p)
{
    if (!p)
        return;
    for (kv_block b = 0; b < p->ids.n; b++)
        ASSERT(p->entries[b].pins == 0 && !p->entries[b].coming);
    if (p->poison)
        stream_destroy(p->poison);
    buffer_free(p->be, &p->kv);
    buffer_free(p->be, &p->index);
    for (int at = 0; at < PLACES; at++)
        mem_free(p->slots[at].free);
    mem_free(p->ids.free);
    block_names_fini(&p->names);
    mem_free(p->entries);
    mem_free(p);
}

void kv_pool_host_ready(struct kv_pool *p, uint32_t n)
{
    struct slots *s = &p->slots[AT_HOST];
    uint32_t before = s->n;

    ASSERT(n >= before && n <= p->cfg.host_blocks);
    slots_grow(s, n);
    for (uint32_t slot = before; slot < n && p->poison; slot++)
        kv_pool_fill_nan(p, AT_HOST, slot);
}

bf16 *kv_pool_kv(const struct kv_pool *p, int layer)
{
    return (bf16 *)((char *)p->kv.base + (size_t)layer * p->kv_layer_bytes);
}

bf16 *kv_pool_staged(const struct kv_pool *p, int buffer)
{
    return (bf16 *)((char *)kv_pool_kv(p, p->cfg.layers) +
                    (size_t)buffer * p->cfg.staged_blocks * kv_block_bytes(&p->cfg.shape));
}

int32_t kv_pool_staged_id(const struct kv_pool *p, int layer, int buffer, int i)
{
    int64_t id = (int64_t)(p->cfg.layers - layer) * p->cfg.blocks +
                 (int64_t)buffer * p->cfg.staged_blocks + i;

    ASSERT(id <= INT32_MAX);
    return (int32_t)id;
}

uint8_t *kv_pool_index(const struct kv_pool *p, int layer)
{
    return (uint8_t *)p->index.base + (size_t)layer * p->index_layer_bytes;
}

struct kv_pool_counts kv_pool_counts(const struct kv_pool *p)
{
    struct kv_pool_counts c = p->totals;

    c.blocks = p->cfg.blocks;
    c.free = p->slots[AT_KV].n_free;
    c.cached = n_unpinned(p) + p->lists[LIST_OFFLOADABLE].n;
    c.pinned = c.blocks - c.free - c.cached;
    c.index_blocks = p->cfg.index_blocks;
    c.index_free = p->slots[AT_INDEX].n_free;
    c.host_blocks = p->slots[AT_HOST].n;
    c.host_free = p->slots[AT_HOST].n_free;
    c.host_cached = p->lists[LIST_HOST].n + p->lists[LIST_HOST_INNER].n;
    return c;
}
