#include "kernels/cpu/index.h"

#include "engine/base/invariant.h"
#include "kernels/cpu/linear.h"

#include <string.h>

/* Cut as rope_store is: query rows in any order, keys in pieces of rows that begin where a
 * block begins. */
enum { QUERY_ROWS = 16, KEY_ROWS = 64 };

struct latent_store {
    struct latent_store_args args;
    const struct index_leaf *leaf;
    void (*turn)(float *x, const float *cos_sin, int n);
    struct index_layout layout;
    int latent, rope, query_tasks;
};

static void place_queries(const struct latent_store *l, int from, int to)
{
    const struct latent_store_args *a = &l->args;
    size_t head_dim = (size_t)a->shape.head_dim, rope = (size_t)l->rope;

    for (int row = from; row < to; row++) {
        const float *cos_sin = a->cos_sin + (size_t)row * rope;
        const float *x = (const float *)a->q_rope + (size_t)row * (size_t)a->q_rope_stride;
        float *q = (float *)a->q + (size_t)row * (size_t)a->heads * head_dim + l->latent;
        for (int h = 0; h < a->heads; h++, q += head_dim, x += a->q_rope_head_stride) {
            memcpy(q, x, rope * sizeof *q);
            l->turn(q, cos_sin, l->rope);
        }
    }
}

static void store_row(const struct latent_store *l, int row, const float *norm)
{
    const struct latent_store_args *a = &l->args;
    int head_dim = a->shape.head_dim, token = a->positions[row] % BLOCK_TOKENS;
    size_t block = (size_t)a->kv_block[row] * (kv_block_bytes(&a->shape) / sizeof(bf16));
    bf16 *out = a->pool + block + (size_t)token * kv_row_dim(&a->shape);
    float key[MOST_HEAD_DIM];

    memcpy(key, (const float *)a->kv + (size_t)row * (size_t)a->kv_stride,
           (size_t)head_dim * sizeof *key);
    l->leaf->norm(key, norm, l->latent, a->eps);
    l->turn(key + l->latent, a->cos_sin + (size_t)row * (size_t)l->rope, l->rope);
    for (int i = 0; i < head_dim; i++)
        out[i] = float_to_bf16(key[i]);
    struct index_record record = {
        .base = a->index + (size_t)a->index_block[row] * index_block_bytes(&a->shape),
        .layout = l->layout,
        .kind = INDEX_ROTATED,
        .head_dim = head_dim,
        .latent_dim = l->latent,
    };
    l->leaf->add_key(&record, out, token);
    finish_block(l->leaf, &record, a->pool + block, kv_row_dim(&a->shape), token);
}

static void latent_task(void *arg, int task, int worker)
{
    const struct latent_store *l = arg;
    const struct latent_store_args *a = &l->args;
    float norm[MOST_PART_DIM];

    (void)worker;
    if (task < l->query_tasks) {
        int from = task * QUERY_ROWS;
        place_queries(l, from, from + QUERY_ROWS < a->rows ? from + QUERY_ROWS : a->rows);
        return;
    }
    int from = (task - l->query_tasks) * KEY_ROWS;
    int end = run_start(a->index_block, a->rows, from + KEY_ROWS);
    weights_in(norm, a->norm, a->norm_type, l->latent);
    for (int row = run_start(a->index_block, a->rows, from); row < end; row++)
        if (a->kv_block[row] >= 0)
            store_row(l, row, norm);
}

void cpu_latent_store(struct stream *s, const struct latent_store_args *a)
{
    const struct index_leaf *leaf = index_leaf_of(s);
    struct latent_store l = {
        .args = *a,
        .leaf = leaf,
        .turn = a->interleaved ? leaf->turn_pairs : leaf->turn,
        .layout = index_layout(&a->shape),
        .latent = a->shape.latent_dim,
        .rope = a->shape.head_dim - a->shape.latent_dim,
        .query_tasks = (a->rows + QUERY_ROWS - 1) / QUERY_ROWS,
    };

    if (s->failed != ST_OK || a->rows <= 0)
        return;
    ASSERT(l.latent > 0 && l.latent <= MOST_PART_DIM && l.rope > 0 && l.rope <= MOST_PART_DIM);
    ASSERT(a->shape.kv_heads == 1 && a->shape.index == INDEX_ROTATED && a->norm);
    workers_run(s->be->workers, l.query_tasks + (a->rows + KEY_ROWS - 1) / KEY_ROWS,
                latent_task, &l);
}
