#include "engine/kv/kv_pool_parts.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"

#include <string.h>

/* ---- poison */

/* Before a slot is given to anybody: whoever writes there does it on a stream of its own. */
static void wait_for_fills(struct kv_pool *p)
{
    if (stream_sync(p->poison, NULL) != ST_OK)
        return;                  /* the device is lost, and those who use it learn it as well */
}

void kv_pool_fill_nan(struct kv_pool *p, enum place at, uint32_t slot)
{
    size_t kv = kv_block_bytes(&p->cfg.shape), index = index_block_bytes(&p->cfg.shape);
    size_t host = kv_pool_host_bytes(&p->cfg.shape, p->cfg.layers);

    if (at == AT_HOST) {
        if (p->host)
            memset(p->host + slot * host, 0xff, host);
        return;
    }
    for (int layer = 0; layer < p->cfg.layers; layer++) {
        if (at == AT_KV)
            stream_fill(p->poison, (char *)kv_pool_kv(p, layer) + slot * kv, 0xff, kv);
        else
            stream_fill(p->poison, kv_pool_index(p, layer) + slot * index, 0xff, index);
    }
    wait_for_fills(p);
}

void kv_pool_poison(struct kv_pool *p, void *host)
{
    ASSERT(!p->poison && p->ids.n_free == p->ids.n);
    p->poison = stream_create(p->be);
    p->host = host;
    stream_fill(p->poison, p->kv.base, 0xff, p->kv.bytes);
    stream_fill(p->poison, p->index.base, 0xff, p->index.bytes);
    wait_for_fills(p);
    for (uint32_t slot = 0; slot < p->slots[AT_HOST].n; slot++)
        kv_pool_fill_nan(p, AT_HOST, slot);
}

/* ---- invariants */

/* Every slot is free once or belongs to one block. */
static void check_slots(const struct kv_pool *p, int at, uint8_t *mark)
{
    const struct slots *s = &p->slots[at];
    uint32_t used = 0;

    memset(mark, 0, s->n);
    for (uint32_t i = 0; i < s->n_free; i++) {
        ASSERT(s->free[i] < s->n && !mark[s->free[i]]);
        mark[s->free[i]] = 1;
    }
    for (kv_block b = 0; b < p->ids.n; b++) {
        uint32_t slot = p->entries[b].slot[at];
        if (slot == NONE)
            continue;
        ASSERT(slot < s->n && !mark[slot]);
        mark[slot] = 1;
        used++;
    }
    ASSERT(s->n_free + used == s->n);
}

static void check_list(const struct kv_pool *p, int id)
{
    enum side side = id >= LIST_HOST ? ON_HOST : ON_DEVICE;
    const struct list *l = &p->lists[id];
    kv_block before = NONE;
    uint32_t n = 0, members = 0;

    for (kv_block b = l->first; b != NONE; before = b, b = p->entries[b].link[side].next) {
        ASSERT(b < p->ids.n && p->entries[b].list[side] == id);
        ASSERT(p->entries[b].link[side].prev == before);
        ASSERT(++n <= l->n);                 /* or it runs in a circle */
    }
    ASSERT(l->last == before && l->n == n);
    for (kv_block b = 0; b < p->ids.n; b++)
        members += p->entries[b].list[side] == id;
    ASSERT(members == n);
}

static void check_free_entry(const struct kv_pool *p, kv_block b)
{
    const struct entry *e = &p->entries[b];

    ASSERT(e->pins == 0 && e->holds == 0 && !e->sealed && !e->coming && e->n_children == 0);
    ASSERT(!block_names_has(&p->names, b));
}

static void check_entry(const struct kv_pool *p, kv_block b)
{
    const struct entry *e = &p->entries[b];
    bool named = block_names_has(&p->names, b);

    ASSERT(e->holds <= e->pins && (e->holds == 0 || is_at(e, AT_KV)));
    ASSERT(is_at(e, AT_KV) || is_at(e, AT_HOST));
    ASSERT(e->slot[AT_KV] == NONE || e->slot[AT_INDEX] != NONE);
    ASSERT(!is_at(e, AT_KV) || is_at(e, AT_INDEX));
    for (int at = 0; at < PLACES; at++)
        ASSERT(!(e->coming >> at & 1) || e->slot[at] != NONE);
    if (e->coming)
        ASSERT(e->coming == 1u << AT_HOST ? is_at(e, AT_KV) : is_at(e, AT_HOST));
    if (!e->sealed)
        ASSERT(e->pins > 0 && !named && !e->coming && e->slot[AT_HOST] == NONE);
    if (e->pins == 0 && !e->coming)
        ASSERT(named && (e->slot[AT_KV] != NONE || e->slot[AT_INDEX] == NONE));
    ASSERT(!named || (e->sealed && p->cfg.prefix_cache));
    ASSERT(named || e->n_children == 0);
}

static void check_children(const struct kv_pool *p)
{
    uint32_t *children = mem_calloc(p->ids.n, sizeof *children);

    for (kv_block b = 0; b < p->ids.n; b++) {
        kv_block parent = block_names_has(&p->names, b) ? block_names_parent(&p->names, b) : NONE;
        if (parent != NONE)
            children[parent]++;
    }
    for (kv_block b = 0; b < p->ids.n; b++)
        ASSERT(children[b] == p->entries[b].n_children);
    mem_free(children);
}

void kv_pool_check(const struct kv_pool *p)
{
    uint8_t *mark = mem_calloc((size_t)p->ids.n + p->cfg.index_blocks, 1);

    for (int at = 0; at < PLACES; at++)
        check_slots(p, at, mark);
    memset(mark, 0, p->ids.n);
    for (uint32_t i = 0; i < p->ids.n_free; i++) {
        ASSERT(p->ids.free[i] < p->ids.n && !mark[p->ids.free[i]]);
        mark[p->ids.free[i]] = 1;
    }
    for (kv_block b = 0; b < p->ids.n; b++) {
        const struct entry *e = &p->entries[b];
        bool exists = e->slot[AT_KV] != NONE || e->slot[AT_INDEX] != NONE ||
                      e->slot[AT_HOST] != NONE;
        ASSERT(mark[b] == !exists);
        if (exists)
            check_entry(p, b);
        else
            check_free_entry(p, b);
        ASSERT(e->list[ON_DEVICE] == device_list(e) && e->list[ON_HOST] == host_list(e));
    }
    for (int id = LIST_NONE + 1; id < LISTS; id++)
        check_list(p, id);
    check_children(p);
    block_names_check(&p->names);
    mem_free(mark);
}
