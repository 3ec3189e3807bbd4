#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/closeness.h"
#include "tests/support/index_reference.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/store_fixture.h"

#include <check.h>
#include <math.h>
#include <string.h>

enum {
    MAX_DIM = 576,
    GAP = 5,                     /* floats behind the rows and heads of what is read */
    KEPT = 77,                   /* in the latent part of q, which stays */
};

static const double eps = 1e-5;

struct story {
    struct store_fixture f;
    int rope;
    bool interleaved;
    float *kv, *q_rope, *cos_sin; /* [rows] of kv_stride, q_stride and rope */
    float norm[MAX_DIM];
    bf16 half_norm[MAX_DIM];
    bool half;
};

static int kv_stride(const struct story *s)
{
    return s->f.shape.head_dim + GAP;
}

static int q_head_stride(const struct story *s)
{
    return s->rope + GAP;
}

static int q_stride(const struct story *s)
{
    return s->f.heads * q_head_stride(s) + GAP;
}

static const enum filter_kind filters[] = { FILTER_COARSE, FILTER_BOUNDS, FILTER_MEANS };
enum { N_FILTERS = sizeof filters / sizeof filters[0] };

/* The shape of latent_shapes[kind % N_LATENT_SHAPES]; what is left chooses the filter, and whether
 * pairs are interleaved. */
static struct story *make_story(int kind, uint64_t seed)
{
    struct story *s = mem_calloc(1, sizeof *s);
    struct test_random r = test_random(seed);
    struct latent_shape of = latent_shapes[kind % N_LATENT_SHAPES];

    kind /= N_LATENT_SHAPES;
    store_init(&s->f, &(struct kv_shape){
        .kv_heads = 1, .head_dim = of.head_dim, .latent_dim = latent_dim_of(of.head_dim),
        .filter = filters[kind % N_FILTERS], .index = INDEX_ROTATED }, of.heads);
    s->interleaved = kind / N_FILTERS;
    s->rope = of.head_dim - s->f.shape.latent_dim;
    s->half = seed % 2;
    s->kv = mem_alloc((size_t)(s->f.rows * kv_stride(s)) * sizeof *s->kv);
    s->q_rope = mem_alloc((size_t)(s->f.rows * q_stride(s)) * sizeof *s->q_rope);
    random_floats(&r, s->kv, (size_t)(s->f.rows * kv_stride(s)), 2);
    random_floats(&r, s->q_rope, (size_t)(s->f.rows * q_stride(s)), 2);
    s->cos_sin = store_angles(&s->f, s->rope, &r);
    for (int i = 0; i < s->f.shape.latent_dim; i++) {
        s->half_norm[i] = nearest_bf16(1 + random_uniform(&r) / 2);
        s->norm[i] = s->half ? bf16_value(s->half_norm[i]) : 1 + random_uniform(&r) / 2;
    }
    store_place_rows(&s->f, &r);
    return s;
}

static void free_story(struct story *s)
{
    mem_free(s->kv);
    mem_free(s->q_rope);
    mem_free(s->cos_sin);
    store_fini(&s->f);
    mem_free(s);
}

/* ---- the operation */

static void store_rows(struct backend *be, const struct story *s, const int *picked, int n,
                       struct stored *d)
{
    struct stream *stream = stream_create(be);
    size_t q_width = store_q_width(&s->f);
    float *kv = store_gather(s->kv, picked, n, (size_t)kv_stride(s));
    float *q_rope = store_gather(s->q_rope, picked, n, (size_t)q_stride(s));
    float *cos_sin = store_gather(s->cos_sin, picked, n, (size_t)s->rope);
    float *q = store_gather(d->q, picked, n, q_width);
    int32_t *positions = store_gather_ints(s->f.positions, picked, n, 0);
    int32_t *kv_block = store_gather_ints(s->f.kv_block, picked, n, -1);
    int32_t *index_block = store_gather_ints(s->f.index_block, picked, n, -1);

    backend_ops(be)->latent_store(stream, &(struct latent_store_args){
        .q = q, .q_rope = q_rope, .q_rope_stride = q_stride(s),
        .q_rope_head_stride = q_head_stride(s), .kv = kv, .kv_stride = kv_stride(s),
        .norm = s->half ? (const void *)s->half_norm : s->norm,
        .norm_type = s->half ? DTYPE_BF16 : DTYPE_F32, .cos_sin = cos_sin,
        .positions = positions, .kv_block = kv_block, .index_block = index_block,
        .pool = d->kv, .index = d->index, .shape = s->f.shape, .rows = n, .heads = s->f.heads,
        .interleaved = s->interleaved, .eps = (float)eps });
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    for (int i = 0; i < n; i++)
        if (picked[i] != STORE_NO_ROW)
            memcpy(d->q + (size_t)picked[i] * q_width, q + (size_t)i * q_width,
                   q_width * sizeof *q);
    void *all[] = { kv, q_rope, cos_sin, q, positions, kv_block, index_block };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        mem_free(all[i]);
}

/* Steps in which every sequence has up to `chunk` rows and then padding, until all rows are
 * stored. */
static struct stored store_in_chunks(struct backend *be, const struct story *s, int chunk,
                                     int padding)
{
    struct stored d = store_new(&s->f, KEPT);
    int *picked = mem_alloc((size_t)(s->f.rows + STORE_SEQS * padding) * sizeof *picked);
    int chunks[STORE_SEQS], next[STORE_SEQS] = { 0 }, n;

    for (int seq = 0; seq < STORE_SEQS; seq++)
        chunks[seq] = chunk;
    while ((n = store_pick(picked, next, chunks, padding)) > 0)
        store_rows(be, s, picked, n, &d);
    mem_free(picked);
    return d;
}

/* ---- the reference */

static void turn_slowly(const struct story *s, int row, const float *x, double *out)
{
    const float *cosine = s->cos_sin + row * s->rope, *sine = cosine + s->rope / 2;

    for (int i = 0; i < s->rope / 2; i++) {
        int a = s->interleaved ? 2 * i : i, b = s->interleaved ? 2 * i + 1 : i + s->rope / 2;
        out[a] = (double)x[a] * (double)cosine[i] - (double)x[b] * (double)sine[i];
        out[b] = (double)x[b] * (double)cosine[i] + (double)x[a] * (double)sine[i];
    }
}

static void check_queries(const struct story *s, const struct stored *got)
{
    int latent = s->f.shape.latent_dim;
    double want[MAX_DIM];
    float rounded[MAX_DIM];

    for (int i = 0; i < s->f.rows * s->f.heads; i++) {
        const float *q = got->q + (size_t)i * (size_t)s->f.shape.head_dim;
        turn_slowly(s, i / s->f.heads, s->q_rope + i / s->f.heads * q_stride(s) +
                                           i % s->f.heads * q_head_stride(s), want);
        for (int d = 0; d < s->rope; d++)
            rounded[d] = (float)want[d];
        for (int d = 0; d < latent; d++)
            if (q[d] != KEPT)
                ck_abort_msg("head %d: its latent part was written", i);
        if (!row_close("q", q + latent, rounded, (size_t)s->rope, 1e-5))
            ck_abort_msg("row %d, head %d", i / s->f.heads, i % s->f.heads);
    }
}

static void check_row(const struct story *s, int row, const bf16 *got)
{
    const float *x = s->kv + row * kv_stride(s);
    int latent = s->f.shape.latent_dim;
    double want[MAX_DIM], square = 0;

    for (int i = 0; i < latent; i++)
        square += (double)x[i] * (double)x[i];
    for (int i = 0; i < latent; i++)
        want[i] = (double)x[i] / sqrt(square / latent + eps) * (double)s->norm[i];
    turn_slowly(s, row, x + latent, want + latent);
    int off = store_channel_off(got, want, s->f.shape.head_dim);
    if (off >= 0)
        ck_abort_msg("row %d, channel %d: %g, not %g", row, off, (double)bf16_value(got[off]),
                     want[off]);
}

static void index_row(const struct story *s, uint8_t *record, const bf16 *key, int token)
{
    const struct index_layout l = index_layout(&s->f.shape);
    int latent = s->f.shape.latent_dim, at = token * s->f.shape.head_dim / 8;
    uint8_t *scale = record + l.scale + 4 * token;
    float x[MAX_DIM];

    for (int i = 0; i < s->f.shape.head_dim; i++)
        x[i] = bf16_value(key[i]);
    widen_record(record, &s->f.shape, key, token);
    index_part(scale, record + l.sign + at, record + l.large + at, x, latent);
    index_part(scale + 2, record + l.sign + at + latent / 8, record + l.large + at + latent / 8,
               x + latent, s->rope);
}

/* Rows are checked and taken over; all else of the pools is made here. */
static void check_stored(const struct story *s, const struct stored *got)
{
    struct stored want = store_new(&s->f, KEPT);
    size_t row_dim = (size_t)s->f.shape.head_dim;

    for (int row = 0; row < s->f.rows; row++) {
        int token = s->f.positions[row] % BLOCK_TOKENS;
        size_t at = ((size_t)s->f.kv_block[row] * BLOCK_TOKENS + (size_t)token) * row_dim;
        check_row(s, row, got->kv + at);
        memcpy(want.kv + at, got->kv + at, row_dim * sizeof(bf16));
        index_row(s, want.index + (size_t)s->f.index_block[row] * index_block_bytes(&s->f.shape),
                  want.kv + at, token);
        if (token == BLOCK_TOKENS - 1)
            add_record_means(want.index + (size_t)s->f.index_block[row] *
                                              index_block_bytes(&s->f.shape),
                             &s->f.shape, want.kv + at - (size_t)token * row_dim, row_dim);
    }
    check_queries(s, got);
    store_assert_pools(&s->f, got, &want);
    store_free(&want);
}

/* ---- tests */

enum { N_KINDS = 2 * N_FILTERS * N_LATENT_SHAPES, ALL = 1000 };

/* Every shape against the reference, and every instruction set to the bit. */
START_TEST(rows_are_where_they_belong)
{
    struct story *s = make_story(_i, 10 + (uint64_t)_i);
    struct stored scalar = store_in_chunks(test_backend("scalar"), s, ALL, 0);

    check_stored(s, &scalar);
    for (int i = 0; i < TEST_N_ISAS; i++) {
        struct backend *be = test_backend(test_isa(i));
        if (!be)
            continue;
        struct stored other = store_in_chunks(be, s, ALL, 0);
        store_assert_same(&s->f, &other, &scalar, test_isa(i));
        store_free(&other);
    }
    store_free(&scalar);
    free_story(s);
}
END_TEST

/* However the rows come, in whatever company and padding and by how many threads. */
START_TEST(chunks_and_threads_do_not_change_a_bit)
{
    static const int chunks[] = { 1, 13, 63, 64, 65, ALL };
    static const int threads[] = { 1, 2, 3, 8 };
    struct story *s = make_story(_i, 40);
    struct stored want = store_in_chunks(test_backend("auto"), s, ALL, 0);

    for (int t = 0; t < 4; t++) {
        struct backend *be = open_with_threads("auto", threads[t]);
        for (int c = 0; c < 6; c++) {
            struct stored got = store_in_chunks(be, s, chunks[c], (c + t) % 2 * 70);
            store_assert_same(&s->f, &got, &want, "chunks");
            store_free(&got);
        }
        backend_close(be);
    }
    store_free(&want);
    free_story(s);
}
END_TEST

/* Zeros in one part or both, and magnitudes from the smallest to where squares nearly
 * overflow: each part has its own scale. */
START_TEST(magnitudes)
{
    struct story *s = make_story(_i, 70);
    struct test_random r = test_random(71);
    int latent = s->f.shape.latent_dim;

    for (int row = 0; row < s->f.rows; row++) {
        float *x = s->kv + row * kv_stride(s);
        float factor = powf(10, (float)(random_below(&r, 58) - 41));
        for (int i = 0; i < s->f.shape.head_dim; i++) {
            bool rope = i >= latent;
            if (row % 4 == 0 ? !rope : row % 4 == 1 ? rope : row % 8 == 3)
                x[i] = 0;
            else if (row % 4 == 2 || rope)
                x[i] *= factor;
        }
    }
    for (int i = 0; i < TEST_ALL_ISAS; i++) {
        struct backend *be = test_backend(test_all_isas[i]);
        if (!be)
            continue;
        struct stored got = store_in_chunks(be, s, ALL, 0);
        check_stored(s, &got);
        store_free(&got);
    }
    free_story(s);
}
END_TEST

TCase *latent_store_case(void)
{
    TCase *c = tcase_create("latent_store");

    tcase_set_timeout(c, 60);
    tcase_add_loop_test(c, rows_are_where_they_belong, 0, N_KINDS);
    tcase_add_loop_test(c, chunks_and_threads_do_not_change_a_bit, 0, N_LATENT_SHAPES);
    tcase_add_loop_test(c, magnitudes, 0, N_KINDS);
    return c;
}
