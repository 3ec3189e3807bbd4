#include "tests/support/token_store.h"

#include "engine/base/mem.h"

struct kv_shape test_kv_shape(int kv_heads, int head_dim, int kind)
{
    return (struct kv_shape){ .kv_heads = kv_heads, .head_dim = head_dim,
                              .latent_dim = head_dim == LATENT_ROW ? LATENT_ROW - 64 : 0,
                              .filter = kind & 1 ? FILTER_BOUNDS : FILTER_COARSE,
                              .index = kind & 2 ? INDEX_CHANNELS : INDEX_ROTATED };
}

static void store_latent_rows(struct backend *be, struct stream *s, const struct token_store *t,
                              struct test_random *r)
{
    const int dim = t->shape.head_dim, latent = t->shape.latent_dim, rope = dim - latent;
    const int n = t->n, q_dim = t->heads * dim;
    float *kv = mem_alloc((size_t)(n * dim) * sizeof *kv);
    float *q = mem_calloc((size_t)(n * q_dim), sizeof *q);
    float *norm = mem_alloc((size_t)latent * sizeof *norm);
    float *cos_sin = mem_alloc((size_t)(n * rope) * sizeof *cos_sin);
    int32_t *positions = mem_alloc((size_t)n * sizeof *positions);
    int32_t *blocks = mem_alloc((size_t)n * sizeof *blocks);

    random_floats(r, kv, (size_t)(n * dim), 1);
    for (int i = 0; i < latent; i++)
        norm[i] = 1;
    for (int i = 0; i < n; i++) {
        positions[i] = t->from + i;
        blocks[i] = t->table[positions[i] / BLOCK_TOKENS];
        for (int d = 0; d < rope; d++)
            cos_sin[i * rope + d] = d < rope / 2;
    }
    backend_ops(be)->latent_store(s, &(struct latent_store_args){
        .q = q, .q_rope = q, .q_rope_stride = q_dim, .q_rope_head_stride = dim, .kv = kv,
        .kv_stride = dim, .norm = norm, .norm_type = DTYPE_F32, .cos_sin = cos_sin,
        .positions = positions, .kv_block = blocks, .index_block = blocks, .pool = t->kv,
        .index = t->index, .shape = t->shape, .rows = n, .heads = t->heads, .eps = 1e-6f });
    mem_free(kv);
    mem_free(q);
    mem_free(norm);
    mem_free(cos_sin);
    mem_free(positions);
    mem_free(blocks);
}

void store_random_tokens(struct backend *be, struct stream *s, const struct token_store *t,
                         struct test_random *r)
{
    if (t->shape.latent_dim) {
        store_latent_rows(be, s, t, r);
        return;
    }
    int n = t->n, dim = t->shape.head_dim, kv_dim = t->shape.kv_heads * dim, q_dim = t->heads * dim;
    float *k = mem_alloc((size_t)(n * kv_dim) * sizeof *k);
    float *v = mem_alloc((size_t)(n * kv_dim) * sizeof *v);
    float *q = mem_calloc((size_t)(n * q_dim), sizeof *q);
    float *cos_sin = mem_alloc((size_t)(n * dim) * sizeof *cos_sin);
    int32_t *positions = mem_alloc((size_t)n * sizeof *positions);
    int32_t *blocks = mem_alloc((size_t)n * sizeof *blocks);

    random_floats(r, k, (size_t)(n * kv_dim), 1);
    random_floats(r, v, (size_t)(n * kv_dim), 1);
    for (int i = 0; i < n; i++) {
        positions[i] = t->from + i;
        blocks[i] = t->table[positions[i] / BLOCK_TOKENS];
        for (int d = 0; d < dim; d++)
            cos_sin[i * dim + d] = d < dim / 2;
    }
    backend_ops(be)->rope_store(s, &(struct rope_store_args){
        .q = q, .k = k, .v = v, .qkv_stride_q = q_dim, .qkv_stride_k = kv_dim,
        .qkv_stride_v = kv_dim, .cos_sin = cos_sin, .positions = positions,
        .kv_block = blocks, .index_block = blocks, .kv = t->kv, .index = t->index,
        .channels = t->channels, .shape = t->shape, .rows = n, .heads = t->heads,
        .eps = 1e-6f });
    mem_free(k);
    mem_free(v);
    mem_free(q);
    mem_free(cos_sin);
    mem_free(positions);
    mem_free(blocks);
}
