#include "tests/support/token_store.h"

#include "engine/base/mem.h"
#include "tests/support/kernel_reference.h"

const int test_kinds[TEST_KINDS] = { 0, 1, 2, 3, TEST_MEANS };
const int test_rotated_kinds[TEST_ROTATED_KINDS] = { 0, 1, TEST_MEANS };

struct kv_shape test_kv_shape(int kv_heads, int head_dim, int kind)
{
    bool latent = kind & 4 || head_dim == LATENT_ROW;

    return (struct kv_shape){ .kv_heads = kv_heads, .head_dim = head_dim,
                              .latent_dim = latent ? latent_dim_of(head_dim) : 0,
                              .filter = kind & TEST_MEANS ? FILTER_MEANS
                                        : kind & 1 ? FILTER_BOUNDS : FILTER_COARSE,
                              .index = kind & 2 ? INDEX_CHANNELS : INDEX_ROTATED };
}

/* What both operations need of n rows. */
struct rows {
    float *x;                    /* [n, width] random */
    float *q;                    /* [n, heads * head_dim] zeros */
    float *cos_sin;              /* [n, rotated]: angles of 0 */
    int32_t *positions, *blocks; /* [n] */
};

static struct rows make_rows(const struct token_store *t, int width, int rotated,
                             struct test_random *r)
{
    size_t n = (size_t)t->n;
    struct rows m = {
        .x = mem_alloc(n * (size_t)width * sizeof *m.x),
        .q = mem_calloc(n * (size_t)(t->heads * t->shape.head_dim), sizeof *m.q),
        .cos_sin = mem_alloc(n * (size_t)rotated * sizeof *m.cos_sin),
        .positions = mem_alloc(n * sizeof *m.positions),
        .blocks = mem_alloc(n * sizeof *m.blocks),
    };

    random_floats(r, m.x, n * (size_t)width, 1);
    for (int i = 0; i < t->n; i++) {
        m.positions[i] = t->from + i;
        m.blocks[i] = t->table[m.positions[i] / BLOCK_TOKENS];
        for (int d = 0; d < rotated; d++)
            m.cos_sin[i * rotated + d] = d < rotated / 2;
    }
    return m;
}

static void free_rows(struct rows *m)
{
    mem_free(m->x);
    mem_free(m->q);
    mem_free(m->cos_sin);
    mem_free(m->positions);
    mem_free(m->blocks);
}

static void store_latent(struct backend *be, struct stream *s, const struct token_store *t,
                         struct test_random *r)
{
    int dim = t->shape.head_dim, latent = t->shape.latent_dim;
    struct rows m = make_rows(t, dim, dim - latent, r);
    float *ones = mem_alloc((size_t)latent * sizeof *ones);

    for (int i = 0; i < latent; i++)
        ones[i] = 1;
    backend_ops(be)->latent_store(s, &(struct latent_store_args){
        .q = m.q, .q_rope = m.x, .q_rope_stride = dim, .q_rope_head_stride = 0, .kv = m.x,
        .kv_stride = dim, .norm = ones, .norm_type = DTYPE_F32, .cos_sin = m.cos_sin,
        .positions = m.positions, .kv_block = m.blocks, .index_block = m.blocks, .pool = t->kv,
        .index = t->index, .shape = t->shape, .rows = t->n, .heads = t->heads,
        .interleaved = true, .eps = 1e-6f });
    mem_free(ones);
    free_rows(&m);
}

void store_random_tokens(struct backend *be, struct stream *s, const struct token_store *t,
                         struct test_random *r)
{
    int kv_dim = t->shape.kv_heads * t->shape.head_dim;

    if (t->shape.latent_dim) {
        store_latent(be, s, t, r);
        return;
    }
    struct rows m = make_rows(t, 2 * kv_dim, t->shape.head_dim, r);
    backend_ops(be)->rope_store(s, &(struct rope_store_args){
        .q = m.q, .k = m.x, .v = m.x + kv_dim, .qkv_stride_q = t->heads * t->shape.head_dim,
        .qkv_stride_k = 2 * kv_dim, .qkv_stride_v = 2 * kv_dim, .cos_sin = m.cos_sin,
        .positions = m.positions, .kv_block = m.blocks, .index_block = m.blocks, .kv = t->kv,
        .index = t->index, .channels = t->channels, .shape = t->shape, .rows = t->n,
        .heads = t->heads, .eps = 1e-6f });
    free_rows(&m);
}
