#include "engine/kv/hot_sets.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"

#include <stdbool.h>

/* A layer's part of the device memory, all sets. */
struct layer_parts {
    bf16 *rows;
    uint16_t *row_of;
    int32_t *position;
    uint32_t *used;
    int32_t *hand;
};

struct hot_sets {
    struct backend *be;
    struct hot_sets_config cfg;
    struct buffer device;
    struct buffer fetched;       /* pinned: the counters as they were last fetched */
    struct layer_parts *layers;  /* [layers] */
    uint64_t *counts;            /* device [layers, HOT_COUNTS], then stalls [layers] */
    struct hot_counts *counted;  /* [layers] */
    uint64_t *last_stall;        /* [layers] as it was when it was last added */
    bool *taken;                 /* [sets] */
    int n_free;
};

static size_t counts_bytes(const struct hot_sets_config *cfg)
{
    return (size_t)cfg->layers * (HOT_COUNTS + 1) * sizeof(uint64_t);
}

/* ---- carving.  With a NULL base the same code measures. */

/* A set's positions in a layer are one stretch, so emptying it takes one fill a layer. */
static struct layer_parts carve_layer(const struct hot_sets_config *cfg, char *base, size_t *at)
{
    size_t heads = (size_t)cfg->sets * (size_t)cfg->shape.kv_heads;
    size_t rows = heads * (size_t)cfg->rows_per_head;
    size_t positions = heads * (size_t)cfg->max_blocks * BLOCK_TOKENS;
    struct layer_parts l;

    l.rows = mem_carve(base, at, rows * kv_row_dim(&cfg->shape), sizeof *l.rows);
    l.row_of = mem_carve(base, at, positions, sizeof *l.row_of);
    l.position = mem_carve(base, at, rows, sizeof *l.position);
    l.used = mem_carve(base, at, rows, sizeof *l.used);
    l.hand = mem_carve(base, at, heads, sizeof *l.hand);
    return l;
}

/* layers and counts may be NULL. */
static size_t carve_all(const struct hot_sets_config *cfg, char *base,
                        struct layer_parts *layers, uint64_t **counts)
{
    size_t at = 0;
    uint64_t *c = mem_carve(base, &at, counts_bytes(cfg), 1);

    if (counts)
        *counts = c;
    for (int i = 0; i < cfg->layers; i++) {
        struct layer_parts l = carve_layer(cfg, base, &at);
        if (layers)
            layers[i] = l;
    }
    return at;
}

size_t hot_sets_bytes(const struct hot_sets_config *cfg)
{
    return carve_all(cfg, NULL, NULL, NULL);
}

/* ---- life */

static enum status allocate(struct hot_sets *h)
{
    TRY(buffer_alloc(h->be, &h->device, MEM_DEVICE, hot_sets_bytes(&h->cfg)));
    return buffer_alloc(h->be, &h->fetched, MEM_PINNED, counts_bytes(&h->cfg));
}

enum status hot_sets_create(struct hot_sets **out, struct backend *be,
                            const struct hot_sets_config *cfg, struct error *err)
{
    struct hot_sets *h = mem_calloc(1, sizeof *h);

    *out = NULL;
    ASSERT(cfg->sets > 0 && cfg->layers > 0 && cfg->max_blocks > 0);
    ASSERT(cfg->rows_per_head > 0 && cfg->rows_per_head <= HOT_MOST_ROWS);
    ASSERT((uintptr_t)cfg->host % 16 == 0 && cfg->host_stride % 16 == 0);
    h->be = be;
    h->cfg = *cfg;
    enum status st = allocate(h);
    if (st != ST_OK) {
        hot_sets_destroy(h);
        return error_set(err, st, "%d sets of hot rows need %zu MB, more than the device has",
                         cfg->sets, hot_sets_bytes(cfg) >> 20);
    }
    h->layers = mem_calloc((size_t)cfg->layers, sizeof *h->layers);
    h->counted = mem_calloc((size_t)cfg->layers, sizeof *h->counted);
    h->last_stall = mem_calloc((size_t)cfg->layers, sizeof *h->last_stall);
    h->taken = mem_calloc((size_t)cfg->sets, sizeof *h->taken);
    h->n_free = cfg->sets;
    carve_all(cfg, h->device.base, h->layers, &h->counts);
    *out = h;
    return ST_OK;
}

void hot_sets_destroy(struct hot_sets *h)
{
    if (!h)
        return;
    ASSERT(!h->taken || h->n_free == h->cfg.sets);
    buffer_free(h->be, &h->device);
    buffer_free(h->be, &h->fetched);
    mem_free(h->layers);
    mem_free(h->counted);
    mem_free(h->last_stall);
    mem_free(h->taken);
    mem_free(h);
}

const struct hot_sets_config *hot_sets_config(const struct hot_sets *h)
{
    return &h->cfg;
}

/* ---- sets */

static void empty_set(const struct hot_sets *h, int set, struct stream *s)
{
    size_t rows = (size_t)h->cfg.shape.kv_heads * (size_t)h->cfg.rows_per_head;

    for (int layer = 0; layer < h->cfg.layers; layer++) {
        int32_t *position = h->layers[layer].position + (size_t)set * rows;
        stream_fill(s, position, 0xff, rows * sizeof *position);     /* -1 */
    }
}

int hot_sets_acquire(struct hot_sets *h, struct stream *s)
{
    int set = 0;

    if (h->n_free == 0)
        return -1;
    while (h->taken[set])
        set++;
    h->taken[set] = true;
    h->n_free--;
    empty_set(h, set, s);
    return set;
}

void hot_sets_release(struct hot_sets *h, int set)
{
    ASSERT(set >= 0 && set < h->cfg.sets && h->taken[set]);
    h->taken[set] = false;
    h->n_free++;
}

int hot_sets_free(const struct hot_sets *h)
{
    return h->n_free;
}

struct hot_rows hot_sets_layer(const struct hot_sets *h, int layer)
{
    const struct hot_sets_config *cfg = &h->cfg;

    ASSERT(layer >= 0 && layer < cfg->layers);
    const struct layer_parts *l = &h->layers[layer];
    size_t in_slot = (size_t)layer * kv_block_bytes(&cfg->shape);
    return (struct hot_rows){
        .host = (const bf16 *)(const void *)((const char *)cfg->host + in_slot),
        .host_stride = cfg->host_stride, .rows = l->rows, .row_of = l->row_of,
        .position = l->position, .used = l->used, .hand = l->hand,
        .counts = h->counts + layer * HOT_COUNTS,
        .stall = h->counts + cfg->layers * HOT_COUNTS + layer,
        .rows_per_head = cfg->rows_per_head,
    };
}

/* ---- counters */

void hot_sets_fetch_counts(struct hot_sets *h, struct stream *s)
{
    stream_copy(s, h->fetched.base, h->counts, counts_bytes(&h->cfg));
}

void hot_sets_take_counts(struct hot_sets *h)
{
    const uint64_t *counts = h->fetched.base, *stalls = counts + h->cfg.layers * HOT_COUNTS;

    for (int layer = 0; layer < h->cfg.layers; layer++) {
        const uint64_t *c = counts + layer * HOT_COUNTS;
        struct hot_counts *to = &h->counted[layer];
        to->hits = c[HOT_HITS];
        to->misses = c[HOT_MISSES];
        to->resident = c[HOT_RESIDENT];
        if (stalls[layer] != h->last_stall[layer])   /* of another step: it has its number */
            to->stalled_ns += (uint32_t)stalls[layer];
        h->last_stall[layer] = stalls[layer];
    }
}

struct hot_counts hot_sets_counts(const struct hot_sets *h, int layer)
{
    ASSERT(layer >= 0 && layer < h->cfg.layers);
    return h->counted[layer];
}
