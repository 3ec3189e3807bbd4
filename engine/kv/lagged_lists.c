#include "engine/kv/lagged_lists.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "kernels/backend.h"

struct lagged_lists {
    int slots, kv_heads, n_layers;
    struct lagged_blocks *layers;    /* [n_layers] */
    bool *taken;                     /* [slots] */
    int n_free;
};

/* ---- carving.  With a NULL base the same code measures. */

/* layers may be NULL. */
static size_t carve_all(const struct select_plan *plan, int slots, int kv_heads, char *base,
                        struct lagged_blocks *layers)
{
    size_t lists = (size_t)slots * (size_t)kv_heads, at = 0;

    for (int i = 0; i < plan->n_layers; i++) {
        struct lagged_blocks l = { 0 };
        if (plan->layer[i].dense)
            continue;
        l.kept = mem_carve(base, &at, lists * (size_t)plan->layer[i].keep_blocks, sizeof *l.kept);
        l.n_kept = mem_carve(base, &at, lists, sizeof *l.n_kept);
        l.n_tokens = mem_carve(base, &at, lists, sizeof *l.n_tokens);
        if (layers)
            layers[i] = l;
    }
    return at;
}

size_t lagged_lists_bytes(const struct select_plan *plan, int slots, int kv_heads)
{
    return carve_all(plan, slots, kv_heads, NULL, NULL);
}

/* ---- life */

struct lagged_lists *lagged_lists_create(void *base, const struct select_plan *plan, int slots,
                                         int kv_heads)
{
    struct lagged_lists *l = mem_calloc(1, sizeof *l);

    ASSERT(slots > 0 && kv_heads > 0);
    l->slots = l->n_free = slots;
    l->kv_heads = kv_heads;
    l->n_layers = plan->n_layers;
    l->layers = mem_calloc((size_t)plan->n_layers, sizeof *l->layers);
    l->taken = mem_calloc((size_t)slots, sizeof *l->taken);
    carve_all(plan, slots, kv_heads, base, l->layers);
    return l;
}

void lagged_lists_destroy(struct lagged_lists *l)
{
    if (!l)
        return;
    ASSERT(l->n_free == l->slots);
    mem_free(l->layers);
    mem_free(l->taken);
    mem_free(l);
}

/* ---- slots */

int lagged_lists_acquire(struct lagged_lists *l, struct stream *s)
{
    size_t heads = (size_t)l->kv_heads;
    int slot = 0;

    ASSERT(l->n_free > 0);
    while (l->taken[slot])
        slot++;
    l->taken[slot] = true;
    l->n_free--;
    for (int i = 0; i < l->n_layers; i++)
        if (l->layers[i].n_tokens)                               /* -1 */
            stream_fill(s, l->layers[i].n_tokens + (size_t)slot * heads, 0xff,
                        heads * sizeof(int32_t));
    return slot;
}

void lagged_lists_release(struct lagged_lists *l, int slot)
{
    ASSERT(slot >= 0 && slot < l->slots && l->taken[slot]);
    l->taken[slot] = false;
    l->n_free++;
}

int lagged_lists_free(const struct lagged_lists *l)
{
    return l->n_free;
}

struct lagged_blocks lagged_lists_layer(const struct lagged_lists *l, int layer)
{
    ASSERT(layer >= 0 && layer < l->n_layers && l->layers[layer].kept);
    return l->layers[layer];
}
