/* attend_dense of long chunks on the GPU: more rows and heads than there are thread blocks
 * at once, against the CPU back end, and the same to the bit in pieces of any size.
 *
 * Blocks lie scattered, and what nobody has stored is NaN. */

#include "engine/base/mem.h"
#include "kernels/cpu/cpu.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/gpu_compare.h"
#include "tests/support/gpu_fixture.h"
#include "tests/support/kernel_reference.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { KV_HEADS = 2, ROWS = 1500, ROUNDS = 6 };

static const double tolerance = 1e-4 + 2 * ACT_ROUNDING;

/* One sequence: `prefix` tokens, then ROWS rows. */
struct chunk {
    struct kv_shape shape;
    int heads, prefix, n_blocks;
    float scale;
    float *q;                    /* [ROWS, heads, head_dim] */
    bf16 *kv;
    size_t kv_bytes;
    int32_t *table;              /* [n_blocks] */
    const bf16 *gpu_q, *gpu_kv;
    const int32_t *gpu_table;
};

static size_t row_dim(const struct chunk *c)
{
    return (size_t)(c->heads * c->shape.head_dim);
}

static void fill_pool(struct chunk *c, struct test_random *r)
{
    size_t token = 2 * (size_t)c->shape.head_dim;

    memset(c->kv, 0xff, c->kv_bytes);
    for (int i = 0; i < c->n_blocks; i++)
        for (int g = 0; g < KV_HEADS; g++) {
            int left = c->prefix + ROWS - i * BLOCK_TOKENS;
            size_t n = token * (size_t)(left < BLOCK_TOKENS ? left : BLOCK_TOKENS);
            bf16 *x = random_weights(r, n, DTYPE_BF16, 1);
            memcpy(c->kv + (size_t)(c->table[i] * KV_HEADS + g) * BLOCK_TOKENS * token, x,
                   n * sizeof *x);
            mem_free(x);
        }
}

static struct chunk *make_chunk(int head_dim, int group, int prefix, float sharpness,
                                uint64_t seed)
{
    struct chunk *c = mem_calloc(1, sizeof *c);
    struct test_random r = test_random(seed);

    c->shape = (struct kv_shape){ .kv_heads = KV_HEADS, .head_dim = head_dim };
    c->heads = KV_HEADS * group;
    c->prefix = prefix;
    c->n_blocks = (prefix + ROWS + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    c->scale = sharpness / sqrtf((float)head_dim);
    c->table = mem_alloc((size_t)c->n_blocks * sizeof *c->table);
    random_order(&r, c->table, c->n_blocks);
    c->kv_bytes = (size_t)c->n_blocks * kv_block_bytes(&c->shape);
    c->kv = mem_alloc(c->kv_bytes);
    fill_pool(c, &r);
    c->q = random_acts(&r, ROWS * row_dim(c), 1);
    c->gpu_q = gpu_put_act(c->q, ROWS * row_dim(c));
    c->gpu_kv = gpu_put(c->kv, c->kv_bytes);
    c->gpu_table = gpu_put(c->table, (size_t)c->n_blocks * sizeof *c->table);
    return c;
}

static void free_chunk(struct chunk *c)
{
    gpu_forget();
    mem_free(c->q);
    mem_free(c->kv);
    mem_free(c->table);
    mem_free(c);
}

/* Rows from `first` on, without addresses. */
static struct attend_dense_args arguments(const struct chunk *c, int first, int n)
{
    return (struct attend_dense_args){
        .q_stride = (int)row_dim(c), .shape = c->shape, .seqs = 1, .heads = c->heads,
        .max_blocks = c->n_blocks, .max_n_rows = n, .max_n_tokens = c->prefix + first + n,
        .scale = c->scale };
}

static size_t scratch_of(const struct backend_ops *ops, const struct chunk *c)
{
    return ops->attend_dense_scratch(&c->shape, 1, c->heads, c->n_blocks);
}

static float *on_cpu(const struct chunk *c)
{
    const struct backend_ops *ops = backend_ops(test_backend("auto"));
    struct stream *stream = stream_create(test_backend("auto"));
    struct attend_dense_args a = arguments(c, 0, ROWS);
    const int32_t first = 0, n_rows = ROWS, n_tokens = c->prefix + ROWS;
    float *out = mem_alloc(ROWS * row_dim(c) * sizeof *out);

    a.out = out;
    a.q = c->q;
    a.kv = c->kv;
    a.table = c->table;
    a.first_row = &first;
    a.n_rows = &n_rows;
    a.n_tokens = &n_tokens;
    a.scratch = mem_alloc(scratch_of(ops, c) + 64);
    ops->attend_dense(stream, &a);
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    mem_free(a.scratch);
    return out;
}

/* n rows from `first` on into their place in out, which has all rows. */
static void on_gpu(const struct chunk *c, bf16 *out, int first, int n)
{
    struct attend_dense_args a = arguments(c, first, n);
    const int32_t ints[] = { first, n, c->prefix + first + n };
    const int32_t *at = gpu_put(ints, sizeof ints);
    bf16 *device = gpu_put(NULL, ROWS * row_dim(c) * sizeof *device);
    bf16 *all = mem_alloc(ROWS * row_dim(c) * sizeof *all);
    size_t from = (size_t)first * row_dim(c), to = (size_t)(first + n) * row_dim(c);

    a.out = device;
    a.q = c->gpu_q;
    a.kv = c->gpu_kv;
    a.table = c->gpu_table;
    a.first_row = at;
    a.n_rows = at + 1;
    a.n_tokens = at + 2;
    a.scratch = gpu_put(NULL, scratch_of(gpu_ops(), c) + 64);
    gpu_ops()->attend_dense(gpu_stream(), &a);
    gpu_get(all, device, ROWS * row_dim(c) * sizeof *all);
    assert_unwritten("rows before a piece", all, from * sizeof *all);
    assert_unwritten("rows after a piece", all + to, (ROWS * row_dim(c) - to) * sizeof *all);
    memcpy(out + from, all + from, (to - from) * sizeof *all);
    mem_free(all);
}

static struct chunk *round_chunk(int round)
{
    static const int prefixes[ROUNDS] = { 0, 64, 100, 1, 1220, 36 };
    static const int groups[ROUNDS] = { 8, 7, 16, 9, 8, 8 };

    return make_chunk(round % 2 ? 64 : 128, groups[round], prefixes[round], round % 3 ? 1 : 4,
                      700 + (uint64_t)round);
}

START_TEST(long_chunk_equals_cpu)
{
    if (!gpu_backend())
        return;
    struct chunk *c = round_chunk(_i);
    size_t n = ROWS * row_dim(c);
    bf16 *got = mem_alloc(n * sizeof *got);
    float *want = on_cpu(c), *wide = mem_alloc(n * sizeof *wide);
    char text[120];

    on_gpu(c, got, 0, ROWS);
    for (size_t i = 0; i < n; i++)
        wide[i] = bf16_to_float(got[i]);
    snprintf(text, sizeof text, "%d rows after %d, %d heads of %d (a row is a row's head)", ROWS,
             c->prefix, c->heads, c->shape.head_dim);
    assert_rows_near(text, &(struct row_pair){
        .got = wide, .want = want, .rows = (size_t)(ROWS * c->heads),
        .dim = (size_t)c->shape.head_dim, .tolerance = tolerance });
    mem_free(got);
    mem_free(want);
    mem_free(wide);
    free_chunk(c);
}
END_TEST

/* Pieces of at least two rows, some of them short. */
START_TEST(long_chunk_in_pieces)
{
    static const int short_ones[] = { 2, 3, 16, 63, 64, 65, 127, 128, 129 };

    if (!gpu_backend())
        return;
    struct chunk *c = round_chunk(_i);
    struct test_random r = test_random(800 + (uint64_t)_i);
    bf16 *whole = mem_alloc(ROWS * row_dim(c) * sizeof *whole);
    bf16 *pieces = mem_alloc(ROWS * row_dim(c) * sizeof *pieces);
    char text[120];

    on_gpu(c, whole, 0, ROWS);
    for (int at = 0, n; at < ROWS; at += n) {
        n = random_below(&r, 2) ? short_ones[random_below(&r, 9)] : 2 + random_below(&r, 600);
        if (at + n > ROWS - 2)
            n = ROWS - at;
        on_gpu(c, pieces, at, n);
        snprintf(text, sizeof text, "rows %d to %d after %d, %d heads of %d", at, at + n,
                 c->prefix, c->heads, c->shape.head_dim);
        assert_same_bits(text, pieces + (size_t)at * row_dim(c), whole + (size_t)at * row_dim(c),
                         (size_t)n, row_dim(c));
    }
    mem_free(whole);
    mem_free(pieces);
    free_chunk(c);
}
END_TEST

TCase *gpu_prefill_case(void)
{
    TCase *c = tcase_create("gpu_prefill");

    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, gpu_clean, NULL);
    tcase_add_loop_test(c, long_chunk_equals_cpu, 0, ROUNDS);
    tcase_add_loop_test(c, long_chunk_in_pieces, 0, ROUNDS);
    return c;
}
