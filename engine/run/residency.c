#include "engine/run/residency.h"

#include "engine/base/invariant.h"

static bool is_whole(const struct sequence *q)
{
    return q->residency == ON_DEVICE || q->residency == RETURNING;
}

/* It has a hot set or can get one. */
static bool can_have_set(const struct residency_context *r, const struct sequence *q)
{
    return r->sets && (q->hot_set >= 0 || hot_sets_free(r->sets) > 0);
}

static void get_set(struct residency_context *r, struct sequence *q)
{
    if (q->hot_set < 0)
        q->hot_set = hot_sets_acquire(r->sets, r->stream);
    ASSERT(q->hot_set >= 0);
}

static void give_set(struct residency_context *r, struct sequence *q)
{
    if (q->hot_set >= 0)
        hot_sets_release(r->sets, q->hot_set);
    q->hot_set = -1;
}

/* From the start: what the pool gives away first is what was written first. */
static void release_sealed(struct residency_context *r, struct sequence *q)
{
    for (uint32_t i = 0; i < q->n_sealed; i++)
        if (q->held[i])
            sequence_release(q, r->pool, i);
}

static bool has_copies(const struct residency_context *r, const struct sequence *q)
{
    for (uint32_t i = 0; i < q->n_sealed; i++)
        if (q->held[i] && kv_pool_place(r->pool, q->table[i]).host >= 0)
            return true;
    return false;
}

bool residency_offload(struct residency_context *r, struct sequence *q)
{
    if (!is_whole(q) || !sequence_is_sparse_only(q) || !can_have_set(r, q) || !has_copies(r, q))
        return false;
    get_set(r, q);
    release_sealed(r, q);
    q->residency = OFFLOADED;
    r->n_offloads++;
    return true;
}

void residency_return(struct residency_context *r, struct sequence *q)
{
    ASSERT(q->residency == OFFLOADED);
    q->residency = RETURNING;
    residency_hold_arrived(r, q);
    residency_load_rest(r, q);
}

static void hold_all(struct residency_context *r, struct sequence *q)
{
    for (uint32_t i = 0; i < q->n_blocks; i++)
        if (!q->held[i] && kv_pool_place(r->pool, q->table[i]).kv >= 0)
            sequence_hold(q, r->pool, i);
    if (q->n_held < q->n_blocks)
        return;
    if (q->residency == RETURNING)
        r->n_returns++;
    q->residency = ON_DEVICE;
    give_set(r, q);
}

static bool has_index(const struct residency_context *r, const struct sequence *q)
{
    for (uint32_t i = 0; i < q->n_blocks; i++)
        if (kv_pool_place(r->pool, q->table[i]).index < 0)
            return false;
    return true;
}

static enum residency off_device(const struct sequence *q)
{
    return sequence_is_sparse_only(q) ? OFFLOADED : STREAMED;
}

bool residency_leave_early(struct residency_context *r, struct sequence *q)
{
    if (!can_have_set(r, q))
        return false;
    get_set(r, q);
    release_sealed(r, q);
    q->residency = has_index(r, q) ? off_device(q) : LOADING_INDEX;
    return true;
}

void residency_hold_arrived(struct residency_context *r, struct sequence *q)
{
    if (q->residency == LOADING || q->residency == RETURNING)
        hold_all(r, q);
    else if (q->residency == LOADING_INDEX && has_index(r, q))
        q->residency = off_device(q);
}

void residency_load_rest(struct residency_context *r, struct sequence *q)
{
    bool with_kv = q->residency != LOADING_INDEX, urgent = q->residency != RETURNING;

    if (q->residency == ON_DEVICE || q->residency == OFFLOADED || q->residency == STREAMED)
        return;
    for (uint32_t i = 0; i < q->n_blocks; i++) {
        struct block_place place = kv_pool_place(r->pool, q->table[i]);
        if (with_kv ? !q->held[i] && place.kv < 0 : place.index < 0)
            host_tier_load(r->tier, q->table[i], with_kv, urgent);
    }
}

void residency_store(struct residency_context *r, struct sequence *q)
{
    if (!r->tier)
        return;
    while (q->n_stored < q->n_sealed && host_tier_store(r->tier, q->table[q->n_stored]))
        q->n_stored++;
    if (q->residency == STREAMED || q->residency == OFFLOADED) {
        q->residency = off_device(q);
        release_sealed(r, q);
    } else if (r->always && q->residency == ON_DEVICE) {
        residency_offload(r, q);
    }
}

void residency_start(struct residency_context *r, struct sequence *q)
{
    residency_store(r, q);
    residency_load_rest(r, q);
}

void residency_end(struct residency_context *r, struct sequence *q)
{
    give_set(r, q);
}
