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

/* One head of q or k: normalised (norm may be NULL), then rotated by its position. */
static void place(const struct rope_store *r, float *x, const float *norm, int row)
{
    int head_dim = r->args.shape.head_dim;

    if (norm)
        r->leaf->norm(x, norm, head_dim, r->args.eps);
    r->leaf->turn(x, r->args.cos_sin + (size_t)row * (size_t)head_dim, head_dim);
}

static void place_queries(const struct rope_store *r, int from, int to)
{
    const struct rope_store_args *a = &r->args;
    int head_dim = a->shape.head_dim;
    float store[MOST_PART_DIM];
    const float *norm = weights_in(store, a->q_norm, a->norm_type, head_dim);

    for (int row = from; row < to; row++) {
        float *q = (float *)a->q + (size_t)row * (size_t)a->qkv_stride_q;
        for (int h = 0; h < a->heads; h++)
            place(r, q + h * head_dim, norm, row);
    }
}

static void store_row(const struct rope_store *r, int row, int kv_head, const float *norm)
{
    const struct rope_store_args *a = &r->args;
    int head_dim = a->shape.head_dim, token = a->positions[row] % BLOCK_TOKENS;
    const float *k = (const float *)a->k + (size_t)row * (size_t)a->qkv_stride_k;
    const float *v = (const float *)a->v + (size_t)row * (size_t)a->qkv_stride_v;
    size_t block = (size_t)a->kv_block[row] * (kv_block_bytes(&a->shape) / sizeof(bf16));
    size_t in_block = (size_t)(kv_head * BLOCK_TOKENS + token) * kv_row_dim(&a->shape);
    bf16 *out = a->kv + block + in_block;
    float key[MOST_PART_DIM];

    for (int i = 0; i < head_dim; i++)
        key[i] = k[kv_head * head_dim + i];
    place(r, key, norm, row);
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
    finish_block(r->leaf, &record, out - (size_t)token * kv_row_dim(&a->shape),
                 kv_row_dim(&a->shape), token);
}

static void rope_task(void *arg, int task, int worker)
{
    const struct rope_store *r = arg;
    const struct rope_store_args *a = &r->args;
    float store[MOST_PART_DIM];

    (void)worker;
    if (task < r->query_tasks) {
        int from = task * QUERY_ROWS;
        place_queries(r, from, from + QUERY_ROWS < a->rows ? from + QUERY_ROWS : a->rows);
        return;
    }
    task -= r->query_tasks;
    int from = task % r->key_pieces * KEY_ROWS, kv_head = task / r->key_pieces;
    int end = run_start(a->index_block, a->rows, from + KEY_ROWS);
    const float *norm = weights_in(store, a->k_norm, a->norm_type, a->shape.head_dim);
    for (int row = run_start(a->index_block, a->rows, from); row < end; row++)
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
    ASSERT(a->shape.head_dim <= MOST_PART_DIM && a->shape.latent_dim == 0);
    ASSERT(a->shape.index != INDEX_CHANNELS || a->channels);
    workers_run(s->be->workers, r.query_tasks + a->shape.kv_heads * r.key_pieces, rope_task,
                &r);
}
