#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/kv/kv_pool.h"
#include "engine/model/model_parts.h"

#include <string.h>

/* Steps of decodes, recorded once and replayed.
 *
 * Queueing a step's few hundred operations takes the host longer than the device needs for
 * a small model, so a step that is one row of every sequence is recorded as a graph.  A
 * graph has its sizes in it, and so there is one for each class of steps: the number of
 * rows, rounded up; whether sparse and dense sequences are among them, and whether a sparse
 * one has a set of hot rows; how long the dense ones are at most, rounded up.  Rows that are
 * too many are padding: nothing is stored for them and their sequences are empty.  In a class
 * with both kinds every sequence is known to both attentions, and empty to one of them.
 *
 * The integers of a step are copied by the graph, from the place they had when it was
 * recorded.  The block tables are long and change little, so they stay on the device and
 * what changed is copied before. */

enum { MAX_CLASSES = 256, FIRST_LENGTH = 1024, LENGTH_FACTOR = 8, ALIGN_BYTES = 256 };

/* STEP is a list of one. */
enum { IDS, POSITIONS, KV_BLOCK, INDEX_BLOCK, N_TOKENS, SPARSE_N_TOKENS, DENSE_N_TOKENS, HOT_SET,
       LAGGED_SLOT, STEP, LISTS };
enum { KV_TABLE, INDEX_TABLE, HOST_TABLE, TABLES };

struct graph_class {
    int rows, most_dense_tokens; /* 0: no dense sequence */
    bool sparse, has_sets;
    bool queued_before;          /* once unrecorded, for the back end to load what it needs */
    struct graph *graph;
};

struct replay {
    struct buffer host, device;
    int32_t *lists, *device_lists;   /* [LISTS, max_seqs] */
    int32_t *tables;             /* [TABLES, max_seqs, max_blocks] as on the device; without hot
                                    sets one less */
    struct step_arrays arrays;   /* device */
    const struct kv_pool *pool;  /* that of the first step: its addresses are in the graphs */
    int n_classes;
    struct graph_class classes[MAX_CLASSES];
};

static size_t table_ints(const struct model_limits *l)
{
    return (size_t)l->max_seqs * (size_t)l->max_blocks;
}

static size_t n_tables(const struct model *m)
{
    return m->hot ? TABLES : HOST_TABLE;
}

/* The constants: sequence s has the one row s. */
static enum status upload_rows(struct model *m, int32_t *first_row, int32_t *n_rows,
                               struct error *err)
{
    int n = m->limits.max_seqs;
    int32_t *rows = mem_alloc((size_t)(2 * n) * sizeof *rows);

    for (int i = 0; i < n; i++) {
        rows[i] = i;
        rows[n + i] = 1;
    }
    enum status st = model_upload(m, first_row, rows, (size_t)n * sizeof *rows, err);
    if (st == ST_OK)
        st = model_upload(m, n_rows, rows + n, (size_t)n * sizeof *rows, err);
    mem_free(rows);
    return st;
}

enum status replay_create(struct model *m, struct error *err)
{
    const struct model_limits *l = &m->limits;
    size_t seqs = (size_t)l->max_seqs, tables = table_ints(l), lists = LISTS * seqs;
    size_t bytes = (lists + 2 * seqs + n_tables(m) * tables) * sizeof(int32_t);

    if (!backend_info(m->be)->graphs)
        return ST_OK;
    struct replay *r = m->replay = mem_calloc(1, sizeof *r);
    r->tables = mem_calloc(n_tables(m) * tables, sizeof *r->tables);
    if (buffer_alloc(m->be, &r->host, MEM_PINNED, lists * sizeof(int32_t)) != ST_OK
        || buffer_alloc(m->be, &r->device, MEM_DEVICE, bytes) != ST_OK)
        return error_set(err, ST_NODEVMEM, "no memory for %zu bytes of block tables", bytes);
    int32_t *d = r->device.base, *t = d + lists + 2 * seqs;
    r->lists = r->host.base;
    r->device_lists = d;
    r->arrays = (struct step_arrays){
        .ids = d + IDS * seqs, .positions = d + POSITIONS * seqs,
        .kv_block = d + KV_BLOCK * seqs, .index_block = d + INDEX_BLOCK * seqs,
        .n_tokens = d + N_TOKENS * seqs,
        .first_row = d + lists, .n_rows = d + lists + seqs,
        .kv_table = t + KV_TABLE * tables, .index_table = t + INDEX_TABLE * tables,
        .host_table = m->hot ? t + HOST_TABLE * tables : NULL,
        .hot_set = d + HOT_SET * seqs, .lagged_slot = d + LAGGED_SLOT * seqs,
        .step = (uint32_t *)(d + STEP * seqs),
    };
    return upload_rows(m, r->arrays.first_row, r->arrays.n_rows, err);
}

void replay_destroy(struct model *m)
{
    struct replay *r = m->replay;

    if (!r)
        return;
    for (int i = 0; i < r->n_classes; i++)
        graph_destroy(r->classes[i].graph);
    buffer_free(m->be, &r->host);
    buffer_free(m->be, &r->device);
    mem_free(r->tables);
    mem_free(r);
}

/* ---- classes */

/* Rows of the class for n: at most an eighth more. */
static int round_rows(int n, int most)
{
    int unit = 1;

    while (n > 8 * unit)
        unit *= 2;
    int rows = (n + unit - 1) / unit * unit;
    return rows < most ? rows : most;
}

static int round_length(int n, int most)
{
    int length = FIRST_LENGTH;

    while (length < n && length < most)
        length *= LENGTH_FACTOR;
    return length < most ? length : most;
}

/* NULL when there are too many. */
static struct graph_class *find_class(struct model *m)
{
    const struct model_batch *b = &m->batch;
    struct replay *r = m->replay;
    int longest = 0;

    for (int s = b->sparse_seqs; s < b->seqs; s++)
        longest = b->n_tokens[s] > longest ? b->n_tokens[s] : longest;
    struct graph_class wanted = {
        .rows = round_rows(b->rows, m->limits.max_seqs),
        .most_dense_tokens =
            longest ? round_length(longest, m->limits.max_blocks * BLOCK_TOKENS) : 0,
        .sparse = b->sparse_seqs > 0, .has_sets = forward_has_sets(m),
    };
    for (int i = 0; i < r->n_classes; i++) {
        struct graph_class *c = &r->classes[i];
        if (c->rows == wanted.rows && c->most_dense_tokens == wanted.most_dense_tokens
            && c->sparse == wanted.sparse && c->has_sets == wanted.has_sets)
            return c;
    }
    if (r->n_classes == MAX_CLASSES)
        return NULL;
    r->classes[r->n_classes] = wanted;
    return &r->classes[r->n_classes++];
}

/* ---- the step */

static void fill_lists(struct model *m, int rows)
{
    const struct model_batch *b = &m->batch;
    size_t seqs = (size_t)m->limits.max_seqs;
    int32_t *l = m->replay->lists;

    for (int i = 0; i < rows; i++) {
        bool there = i < b->rows, sparse = i < b->sparse_seqs;
        int32_t n = there ? b->n_tokens[i] : 0;
        l[IDS * seqs + (size_t)i] = there ? b->ids[i] : 0;
        l[POSITIONS * seqs + (size_t)i] = there ? b->positions[i] : 0;
        l[KV_BLOCK * seqs + (size_t)i] = there ? b->kv_block[i] : -1;
        l[INDEX_BLOCK * seqs + (size_t)i] = there ? b->index_block[i] : -1;
        l[N_TOKENS * seqs + (size_t)i] = n;
        l[SPARSE_N_TOKENS * seqs + (size_t)i] = sparse ? n : 0;
        l[DENSE_N_TOKENS * seqs + (size_t)i] = sparse ? 0 : n;
        l[HOT_SET * seqs + (size_t)i] = there && m->hot ? b->hot_set[i] : -1;
        l[LAGGED_SLOT * seqs + (size_t)i] = there && m->lagged ? b->lagged_slot[i] : -1;
    }
    l[STEP * seqs] = (int32_t)m->step;
}

/* Copy what differs from the device's table of sequence i. */
static void update_table(struct model *m, struct stream *s, int i, int table, int32_t *device,
                         const int32_t *wanted)
{
    size_t at = (size_t)i * (size_t)m->limits.max_blocks, first = 0;
    size_t n = (size_t)(m->batch.n_tokens[i] + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    int32_t *known = m->replay->tables + (size_t)table * table_ints(&m->limits) + at;

    device += at;
    wanted += at;
    while (first < n && known[first] == wanted[first])
        first++;
    if (first == n)
        return;
    memcpy(known + first, wanted + first, (n - first) * sizeof *known);
    stream_copy(s, device + first, wanted + first, (n - first) * sizeof *known);
}

static void update_tables(struct model *m, struct stream *s)
{
    const struct model_batch *b = &m->batch;
    const struct step_arrays *d = &m->replay->arrays;

    for (int i = 0; i < b->seqs; i++) {
        update_table(m, s, i, KV_TABLE, d->kv_table, b->kv_table);
        update_table(m, s, i, INDEX_TABLE, d->index_table, b->index_table);
        if (m->hot && b->hot_set[i] >= 0)
            update_table(m, s, i, HOST_TABLE, d->host_table, b->host_table);
    }
}

static struct dense_rows all_rows(const struct replay *r, const struct graph_class *c,
                                  const int32_t *n_tokens, int most_tokens)
{
    return (struct dense_rows){
        .first_row = r->arrays.first_row, .n_rows = r->arrays.n_rows, .n_tokens = n_tokens,
        .seqs = most_tokens ? c->rows : 0, .most_rows = 1, .most_tokens = most_tokens,
    };
}

static void queue_class(struct model *m, struct stream *s, struct kv_pool *pool,
                        const struct graph_class *c)
{
    const struct replay *r = m->replay;
    size_t seqs = (size_t)m->limits.max_seqs;
    int longest = m->limits.max_blocks * BLOCK_TOKENS;
    struct pass p = forward_pass(m, s, pool, &r->arrays);

    p.rows = p.logit_rows = c->rows;
    p.decodes = true;
    p.has_sets = c->has_sets;
    p.sparse_seqs = c->sparse ? c->rows : 0;
    p.most_sparse_tokens = longest;
    p.sparse_n_tokens = r->device_lists + SPARSE_N_TOKENS * seqs;
    for (int last = 0; last < 2; last++) {
        p.dense[last][true] = all_rows(r, c, r->device_lists + DENSE_N_TOKENS * seqs,
                                       c->most_dense_tokens);
        /* A layer that does not select sees the sparse sequences too. */
        p.dense[last][false] = all_rows(r, c, r->arrays.n_tokens,
                                        c->sparse ? longest : c->most_dense_tokens);
    }
    stream_copy(s, r->device_lists, r->lists, LISTS * seqs * sizeof(int32_t));
    forward_queue(&p);
}

static bool is_decodes(const struct model_batch *b)
{
    return b->rows == b->seqs && forward_wants_all_rows(b);
}

bool replay_batch(struct model *m, struct stream *s, struct kv_pool *pool)
{
    const struct model_batch *b = &m->batch;
    struct replay *r = m->replay;

    if (!r || m->observer || m->watcher || !is_decodes(b) || b->n_staged > 0)
        return false;
    if (!r->pool)
        r->pool = pool;
    ASSERT(r->pool == pool);
    struct graph_class *c = find_class(m);
    if (!c)
        return false;
    fill_lists(m, c->rows);
    update_tables(m, s);
    if (!c->queued_before) {
        queue_class(m, s, pool, c);
        c->queued_before = true;
        return true;
    }
    if (!c->graph) {
        graph_begin(s);
        queue_class(m, s, pool, c);
        c->graph = graph_end(s);
    }
    if (c->graph)                /* else the stream has the error */
        graph_launch(s, c->graph);
    return true;
}
