#include "tests/support/token_store.h"

#include "engine/base/mem.h"

void store_random_tokens(struct backend *be, struct stream *s, const struct token_store *t,
                         struct test_random *r)
{
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
