#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/closeness.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <math.h>
#include <string.h>

/* The operations of latent attention one after the other, as a layer calls them, on one
 * sequence: absorbed attention must be the plain one, whose keys and values are expanded here;
 * and two levels that keep everything must be the dense one. */
enum { NOPE = 24, VALUE = 40, MAX_DIM = 576, TOKENS = 200 };

struct layer {
    struct kv_shape shape;
    int heads, rope, rows, max_blocks;
    bool interleaved;
    float *u, *v;                /* [heads, NOPE, L], [heads, VALUE, L] */
    float *query;                /* [rows, heads, NOPE + rope] */
    float *kv;                   /* [rows, L + rope] */
    float *cos_sin;              /* [rows, rope] */
    int32_t *positions, *blocks; /* [rows] */
    int32_t *table;              /* [max_blocks] */
    bf16 *pool;
    uint8_t *index;
    float *q, *mixed, *out;      /* [rows, heads] of L + rope, of L and of VALUE */
    float scale;
};

static float *floats(struct test_random *r, size_t n, float scale)
{
    float *x = mem_alloc(n * sizeof *x);

    random_floats(r, x, n, scale);
    return x;
}

static struct layer *make_layer(int kind, int rows, uint64_t seed)
{
    struct layer *l = mem_calloc(1, sizeof *l);
    struct test_random r = test_random(seed);
    struct latent_shape of = latent_shapes[kind % N_LATENT_SHAPES];
    int latent = latent_dim_of(of.head_dim);
    size_t n = (size_t)rows, heads = (size_t)of.heads;

    l->shape = (struct kv_shape){
        .kv_heads = 1, .head_dim = of.head_dim, .latent_dim = latent,
        .filter = kind / N_LATENT_SHAPES % 2 ? FILTER_BOUNDS : FILTER_COARSE,
        .index = INDEX_ROTATED };
    l->interleaved = kind / N_LATENT_SHAPES % 2 == 0;
    l->heads = of.heads;
    l->rope = of.head_dim - latent;
    l->rows = rows;
    l->max_blocks = (rows + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    l->scale = 1 / sqrtf((float)(NOPE + l->rope));
    l->u = floats(&r, heads * NOPE * (size_t)latent, 0.3f);
    l->v = floats(&r, heads * VALUE * (size_t)latent, 0.3f);
    l->query = floats(&r, n * heads * (size_t)(NOPE + l->rope), 1);
    l->kv = floats(&r, n * (size_t)of.head_dim, 1);
    l->cos_sin = mem_alloc(n * (size_t)l->rope * sizeof *l->cos_sin);
    l->positions = mem_alloc(n * sizeof *l->positions);
    l->blocks = mem_alloc(n * sizeof *l->blocks);
    l->table = mem_alloc((size_t)l->max_blocks * sizeof *l->table);
    random_order(&r, l->table, l->max_blocks);
    for (int row = 0; row < rows; row++) {
        l->positions[row] = row;
        l->blocks[row] = l->table[row / BLOCK_TOKENS];
        for (int i = 0; i < l->rope / 2; i++) {
            double angle = row * pow(10000, -2.0 * i / l->rope);
            l->cos_sin[row * l->rope + i] = (float)cos(angle);
            l->cos_sin[row * l->rope + l->rope / 2 + i] = (float)sin(angle);
        }
    }
    l->pool = mem_calloc((size_t)l->max_blocks, kv_block_bytes(&l->shape));
    l->index = mem_calloc((size_t)l->max_blocks, index_block_bytes(&l->shape));
    l->q = mem_calloc(n * heads * (size_t)of.head_dim, sizeof *l->q);
    l->mixed = mem_calloc(n * heads * (size_t)latent, sizeof *l->mixed);
    l->out = mem_calloc(n * heads * VALUE, sizeof *l->out);
    return l;
}

static void free_layer(struct layer *l)
{
    void *all[] = { l->u, l->v, l->query, l->kv, l->cos_sin, l->positions, l->blocks, l->table,
                    l->pool, l->index, l->q, l->mixed, l->out, l };

    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        mem_free(all[i]);
}

/* ---- as a layer does it */

static void absorb_and_store(struct backend *be, struct stream *s, struct layer *l)
{
    int latent = l->shape.latent_dim, width = NOPE + l->rope;
    float ones[MAX_DIM];

    for (int i = 0; i < latent; i++)
        ones[i] = 1;
    backend_ops(be)->linear_heads(s, &(struct linear_heads_args){
        .out = l->q, .x = l->query, .weight = l->u, .weight_type = DTYPE_F32, .turned = true,
        .rows = l->rows, .heads = l->heads, .in_dim = NOPE, .out_dim = latent,
        .out_stride = l->heads * l->shape.head_dim, .out_head_stride = l->shape.head_dim,
        .x_stride = l->heads * width, .x_head_stride = width,
        .weight_stride = (size_t)(NOPE * latent) });
    backend_ops(be)->latent_store(s, &(struct latent_store_args){
        .q = l->q, .q_rope = l->query + NOPE, .q_rope_stride = l->heads * width,
        .q_rope_head_stride = width, .kv = l->kv, .kv_stride = l->shape.head_dim,
        .norm = ones, .norm_type = DTYPE_F32, .cos_sin = l->cos_sin, .positions = l->positions,
        .kv_block = l->blocks, .index_block = l->blocks, .pool = l->pool, .index = l->index,
        .shape = l->shape, .rows = l->rows, .heads = l->heads,
        .interleaved = l->interleaved, .eps = 1e-6f });
}

static void attend(struct backend *be, struct stream *s, struct layer *l)
{
    static const int32_t zero;
    const int32_t rows = l->rows;
    size_t bytes = backend_ops(be)->attend_dense_scratch(&l->shape, 1, l->heads, l->max_blocks);
    void *scratch = bytes ? mem_alloc(bytes) : NULL;

    backend_ops(be)->attend_dense(s, &(struct attend_dense_args){
        .out = l->mixed, .q = l->q, .q_stride = l->heads * l->shape.head_dim, .kv = l->pool,
        .table = l->table, .first_row = &zero, .n_rows = &rows, .n_tokens = &rows,
        .scratch = scratch, .shape = l->shape, .seqs = 1, .heads = l->heads,
        .max_blocks = l->max_blocks, .max_n_rows = rows, .max_n_tokens = rows,
        .scale = l->scale });
    mem_free(scratch);
}

static void apply_values(struct backend *be, struct stream *s, struct layer *l)
{
    int latent = l->shape.latent_dim;

    backend_ops(be)->linear_heads(s, &(struct linear_heads_args){
        .out = l->out, .x = l->mixed, .weight = l->v, .weight_type = DTYPE_F32,
        .rows = l->rows, .heads = l->heads, .in_dim = latent, .out_dim = VALUE,
        .out_stride = l->heads * VALUE, .out_head_stride = VALUE,
        .x_stride = l->heads * latent, .x_head_stride = latent,
        .weight_stride = (size_t)(VALUE * latent) });
}

/* The last row alone over all tokens, in two levels; out [heads, L]. */
static void attend_two_level(struct backend *be, struct stream *s, struct layer *l, float *out,
                             int keep_blocks, int keep_tokens)
{
    const struct backend_ops *ops = backend_ops(be);
    const int32_t n_tokens = l->rows;
    int width = l->heads * l->shape.head_dim;
    void *scratch = mem_alloc(ops->attend_two_level_scratch(&l->shape, 1, l->heads,
                                                            l->max_blocks, keep_blocks,
                                                            keep_tokens));

    ops->attend_two_level(s, &(struct attend_two_level_args){
        .out = out, .q = l->q + (l->rows - 1) * width, .q_stride = width, .kv = l->pool,
        .index = l->index, .kv_table = l->table, .index_table = l->table,
        .n_tokens = &n_tokens, .scratch = scratch, .shape = l->shape, .seqs = 1,
        .heads = l->heads, .max_blocks = l->max_blocks, .keep_blocks = keep_blocks,
        .keep_tokens = keep_tokens, .sink_tokens = 1, .recent_tokens = 1,
        .max_n_tokens = n_tokens, .scale = l->scale });
    ck_assert_int_eq(stream_sync(s, NULL), ST_OK);
    mem_free(scratch);
}

/* ---- plain attention */

static const bf16 *row_of(const struct layer *l, int position)
{
    size_t block = (size_t)l->table[position / BLOCK_TOKENS];

    return l->pool + (block * BLOCK_TOKENS + (size_t)(position % BLOCK_TOKENS)) *
                         kv_row_dim(&l->shape);
}

/* out [n] = matrix [n, L] times the latent part of a row. */
static void expand(const struct layer *l, const float *matrix, int n, const bf16 *row, double *out)
{
    for (int i = 0; i < n; i++) {
        out[i] = 0;
        for (int d = 0; d < l->shape.latent_dim; d++)
            out[i] += (double)matrix[i * l->shape.latent_dim + d] * (double)bf16_value(row[d]);
    }
}

static void turn(const struct layer *l, int row, const float *x, double *out)
{
    int half = l->rope / 2;
    const float *cosine = l->cos_sin + row * l->rope, *sine = cosine + half;

    for (int i = 0; i < half; i++) {
        int a = l->interleaved ? 2 * i : i, b = l->interleaved ? 2 * i + 1 : i + half;
        out[a] = (double)x[a] * (double)cosine[i] - (double)x[b] * (double)sine[i];
        out[b] = (double)x[b] * (double)cosine[i] + (double)x[a] * (double)sine[i];
    }
}

/* Head `head` of one row over positions 0..row, with a key and a value of its own for each. */
static void attend_plainly(const struct layer *l, int row, int head, float *out)
{
    const float *query = l->query + (row * l->heads + head) * (NOPE + l->rope);
    const float *u = l->u + head * NOPE * l->shape.latent_dim;
    const float *v = l->v + head * VALUE * l->shape.latent_dim;
    double q[MAX_DIM], score[TOKENS], sum = 0, most = -INFINITY, total[VALUE] = { 0 };

    turn(l, row, query + NOPE, q);
    for (int i = 0; i <= row; i++) {
        const bf16 *token = row_of(l, i);
        double key[NOPE];
        expand(l, u, NOPE, token, key);
        score[i] = 0;
        for (int d = 0; d < NOPE; d++)
            score[i] += (double)query[d] * key[d];
        for (int d = 0; d < l->rope; d++)
            score[i] += q[d] * (double)bf16_value(token[l->shape.latent_dim + d]);
        score[i] *= (double)l->scale;
        most = fmax(most, score[i]);
    }
    for (int i = 0; i <= row; i++) {
        double value[VALUE], weight = exp(score[i] - most);
        expand(l, v, VALUE, row_of(l, i), value);
        sum += weight;
        for (int d = 0; d < VALUE; d++)
            total[d] += weight * value[d];
    }
    for (int d = 0; d < VALUE; d++)
        out[d] = (float)(total[d] / sum);
}

/* ---- tests */

START_TEST(absorbed_is_plain)
{
    static const int looked_at[] = { 0, 1, 63, 64, TOKENS - 1 };
    struct layer *l = make_layer(_i, TOKENS, 1 + (uint64_t)_i);
    float want[VALUE];

    for (int i = 0; i < TEST_ALL_ISAS; i++) {
        struct backend *be = test_backend(test_all_isas[i]);
        if (!be)
            continue;
        struct stream *s = stream_create(be);
        absorb_and_store(be, s, l);
        attend(be, s, l);
        apply_values(be, s, l);
        ck_assert_int_eq(stream_sync(s, NULL), ST_OK);
        for (size_t k = 0; k < sizeof looked_at / sizeof looked_at[0]; k++)
            for (int head = 0; head < l->heads; head++) {
                int row = looked_at[k];
                attend_plainly(l, row, head, want);
                ck_assert_msg(row_close("absorbed", l->out + (row * l->heads + head) * VALUE,
                                        want, VALUE, 1e-4),
                              "%s, row %d, head %d", test_all_isas[i], row, head);
            }
        stream_destroy(s);
    }
    free_layer(l);
}
END_TEST

START_TEST(keeping_everything_is_dense)
{
    struct layer *l = make_layer(_i, TOKENS, 50 + (uint64_t)_i);
    size_t latent = (size_t)l->shape.latent_dim, heads = (size_t)l->heads;
    float *got = mem_alloc(heads * latent * sizeof *got);

    for (int i = 0; i < TEST_ALL_ISAS; i++) {
        struct backend *be = test_backend(test_all_isas[i]);
        if (!be)
            continue;
        struct stream *s = stream_create(be);
        absorb_and_store(be, s, l);
        attend(be, s, l);
        attend_two_level(be, s, l, got, l->max_blocks, TOKENS);
        ck_assert(rows_close("two levels", got, l->mixed + (TOKENS - 1) * heads * latent, heads,
                             latent, latent, 1e-5));
        stream_destroy(s);
    }
    mem_free(got);
    free_layer(l);
}
END_TEST

/* A token whose row looks like what a query asks for is found among thousands, and then is all
 * that the query's head sees: what is stored in the index and what looks into it agree about
 * the parts and their rotation. */
START_TEST(a_needle_is_found)
{
    enum { LONG = 3000, NEEDLE = 1234 };
    struct backend *be = test_backend("auto");
    struct layer *l = make_layer(_i, LONG, 90 + (uint64_t)_i);
    struct stream *s = stream_create(be);
    int latent = l->shape.latent_dim, dim = l->shape.head_dim;
    const bf16 *needle = row_of(l, NEEDLE);
    float *got = mem_alloc((size_t)(l->heads * latent) * sizeof *got), want[MAX_DIM];
    float *q = l->q + (LONG - 1) * l->heads * dim;

    absorb_and_store(be, s, l);
    for (int head = 0; head < l->heads; head++)
        for (int d = 0; d < dim; d++)
            q[head * dim + d] = head == 0 ? bf16_value(needle[d]) : 0;
    l->scale = 8;
    attend_two_level(be, s, l, got, 4, 20);
    for (int d = 0; d < latent; d++)
        want[d] = bf16_value(needle[d]);
    ck_assert(row_close("needle", got, want, (size_t)latent, 1e-3));
    stream_destroy(s);
    mem_free(got);
    free_layer(l);
}
END_TEST

TCase *latent_case(void)
{
    TCase *c = tcase_create("latent");

    tcase_set_timeout(c, 60);
    tcase_add_loop_test(c, absorbed_is_plain, 0, 2 * N_LATENT_SHAPES);
    tcase_add_loop_test(c, keeping_everything_is_dense, 0, 2 * N_LATENT_SHAPES);
    tcase_add_loop_test(c, a_needle_is_found, 0, N_LATENT_SHAPES);
    return c;
}
