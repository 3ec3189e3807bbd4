#include "kernels/cpu/index.h"

#include "engine/base/invariant.h"
#include "kernels/cpu/linear.h"

/* Query rows go in any order.  Keys go KV head by KV head in pieces of rows that begin
 * where a block begins, because the rows of a block update the same record. */
enum { QUERY_ROWS = 16, KEY_ROWS = 64 };

struct rope_store {
    struct rope_store_args args;
    const struct index_leaf *leaf;
    struct index_layout layout;
    int query_tasks, key_pieces;
};

/* The norm's weights as floats in store, or NULL. */
static const float *norm_weights(float *store, const void *weight, enum dtype type, int n)
{
    if (!weight)
        return NULL;
    for (int i = 0; i < n; i++)
        store[i] = weight_at(weight, type, (size_t)i);
    return store;
}

static void place_queries(const struct rope_store *r, int from, int to)
{
    const struct rope_store_args *a = &r->args;
    int head_dim = a->shape.head_dim;
    float store[MOST_HEAD_DIM];
    const float *norm = norm_weights(store, a->q_norm, a->norm_type, head_dim);

    for (int row = from; row < to; row++) {
        const float *cos_sin = a->cos_sin + (size_t)row * (size_t)head_dim;
        float *q = (float *)a->q + (size_t)row * (size_t)a->qkv_stride_q;
        for (int h = 0; h < a->heads; h++)
            r->leaf->place(q + h * head_dim, norm, cos_sin, head_dim, a->eps);
    }
}

static void store_row(const struct rope_store *r, int row, int kv_head, const float *norm)
{
    const struct rope_store_args *a = &r->args;
    int head_dim = a->shape.head_dim, token = a->positions[row] % BLOCK_TOKENS;
    const float *k = (const float *)a->k + (size_t)row * (size_t)a->qkv_stride_k;
    const float *v = (const float *)a->v + (size_t)row * (size_t)a->qkv_stride_v;
    size_t block = (size_t)a->kv_block[row] * (kv_block_bytes(&a->shape) / sizeof(bf16));
    size_t place = (size_t)(kv_head * BLOCK_TOKENS + token) * 2 * (size_t)head_dim;
    bf16 *out = a->kv + block + place;
    float key[MOST_HEAD_DIM];

    for (int i = 0; i < head_dim; i++)
        key[i] = k[kv_head * head_dim + i];
    r->leaf->place(key, norm, a->cos_sin + (size_t)row * (size_t)head_dim, head_dim, a->eps);
    for (int i = 0; i < head_dim; i++) {
        out[i] = float_to_bf16(key[i]);
        out[head_dim + i] = float_to_bf16(v[kv_head * head_dim + i]);
    }
    struct index_record record = {
        .base = a->index + (size_t)a->index_block[row] * index_block_bytes(&a->shape) +
                (size_t)kv_head * (size_t)r->layout.record_bytes,
        .layout = r->layout,
        .kind = a->shape.index,
        .channels = a->channels ? a->channels + kv_head * INDEX_CHANNELS_KEPT : NULL,
        .head_dim = head_dim,
    };
    r->leaf->add_key(&record, out, token);
}

/* The first row from `row` on that begins a run of one block. */
static int run_start(const struct rope_store_args *a, int row)
{
    if (row >= a->rows)
        return a->rows;
    while (row > 0 && row < a->rows && a->index_block[row] == a->index_block[row - 1])
        row++;
    return row;
}

static void rope_task(void *arg, int task, int worker)
{
    const struct rope_store *r = arg;
    const struct rope_store_args *a = &r->args;
    float store[MOST_HEAD_DIM];

    (void)worker;
    if (task < r->query_tasks) {
        int from = task * QUERY_ROWS;
        place_queries(r, from, from + QUERY_ROWS < a->rows ? from + QUERY_ROWS : a->rows);
        return;
    }
    task -= r->query_tasks;
    int from = task % r->key_pieces * KEY_ROWS, kv_head = task / r->key_pieces;
    int end = run_start(a, from + KEY_ROWS);
    const float *norm = norm_weights(store, a->k_norm, a->norm_type, a->shape.head_dim);
    for (int row = run_start(a, from); row < end; row++)
        if (a->kv_block[row] >= 0)
            store_row(r, row, kv_head, norm);
}

void cpu_rope_store(struct stream *s, const struct rope_store_args *a)
{
    struct rope_store r = {
        .args = *a,
        .leaf = index_leaf_of(s),
        .layout = index_layout(&a->shape),
        .query_tasks = (a->rows + QUERY_ROWS - 1) / QUERY_ROWS,
        .key_pieces = (a->rows + KEY_ROWS - 1) / KEY_ROWS,
    };

    if (s->failed != ST_OK || a->rows <= 0)
        return;
    ASSERT(a->shape.head_dim <= MOST_HEAD_DIM);
    ASSERT(a->shape.index != INDEX_CHANNELS || a->channels);
    workers_run(s->be->workers, r.query_tasks + a->shape.kv_heads * r.key_pieces, rope_task,
                &r);
}
