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
    MAX_DIM = 256,
    GAP = 5,                     /* floats between the rows of joined */
};

static const double eps = 1e-6;

struct story {
    struct store_fixture f;
    int stride;
    float *joined;               /* [rows, stride]: q, k, v of a row, then the gap */
    float *cos_sin;              /* [rows, head_dim] */
    int16_t *channels;
    enum dtype norm_type;
    bool norm;
    float q_norm[MAX_DIM], k_norm[MAX_DIM];
    bf16 q_norm_half[MAX_DIM], k_norm_half[MAX_DIM];
};

static void make_norms(struct story *s, struct test_random *r)
{
    for (int i = 0; i < MAX_DIM; i++) {
        s->q_norm[i] = 1 + random_uniform(r) / 2;
        s->k_norm[i] = 1 + random_uniform(r) / 2;
        s->q_norm_half[i] = nearest_bf16(s->q_norm[i]);
        s->k_norm_half[i] = nearest_bf16(s->k_norm[i]);
        if (s->norm_type == DTYPE_BF16) {
            s->q_norm[i] = bf16_value(s->q_norm_half[i]);
            s->k_norm[i] = bf16_value(s->k_norm_half[i]);
        }
    }
}

static struct story *make_story(struct kv_shape shape, int heads, uint64_t seed)
{
    struct story *s = mem_calloc(1, sizeof *s);
    struct test_random r = test_random(seed);

    store_init(&s->f, &shape, heads);
    s->stride = (heads + 2 * shape.kv_heads) * shape.head_dim + GAP;
    s->joined = mem_alloc((size_t)(s->f.rows * s->stride) * sizeof(float));
    s->norm = seed % 3 > 0;
    s->norm_type = seed % 3 == 1 ? DTYPE_BF16 : DTYPE_F32;
    make_norms(s, &r);
    random_floats(&r, s->joined, (size_t)(s->f.rows * s->stride), 2);
    s->cos_sin = store_angles(&s->f, shape.head_dim, &r);
    if (shape.index == INDEX_CHANNELS) {
        s->channels = mem_alloc((size_t)shape.kv_heads * INDEX_CHANNELS_KEPT * sizeof(int16_t));
        random_channels(&r, s->channels, &shape);
    }
    store_place_rows(&s->f, &r);
    return s;
}

static void free_story(struct story *s)
{
    mem_free(s->joined);
    mem_free(s->cos_sin);
    mem_free(s->channels);
    store_fini(&s->f);
    mem_free(s);
}

/* cos 1 and sin 0: rows are stored as they are. */
static void do_not_rotate(struct story *s)
{
    int dim = s->f.shape.head_dim;

    for (int i = 0; i < s->f.rows * dim; i++)
        s->cos_sin[i] = i % dim < dim / 2;
}

/* ---- the operation */

/* Queries go to their rows of d; keys, values and the gap must be as they were. */
static void scatter(const struct story *s, const float *joined, const int *picked, int n,
                    struct stored *d)
{
    size_t width = (size_t)s->stride, q_dim = store_q_width(&s->f);

    for (int i = 0; i < n; i++) {
        const float *row = joined + (size_t)i * width;
        if (picked[i] == STORE_NO_ROW)
            continue;
        const float *was = s->joined + (size_t)picked[i] * width;
        memcpy(d->q + (size_t)picked[i] * q_dim, row, q_dim * sizeof(float));
        if (memcmp(row + q_dim, was + q_dim, (width - q_dim) * sizeof(float)) != 0)
            ck_abort_msg("row %d: more than q was changed", picked[i]);
    }
}

static void store_rows(struct backend *be, const struct story *s, const int *picked, int n,
                       struct stored *d)
{
    struct stream *stream = stream_create(be);
    float *joined = store_gather(s->joined, picked, n, (size_t)s->stride);
    float *cos_sin = store_gather(s->cos_sin, picked, n, (size_t)s->f.shape.head_dim);
    int32_t *positions = store_gather_ints(s->f.positions, picked, n, 0);
    int32_t *kv_block = store_gather_ints(s->f.kv_block, picked, n, -1);
    int32_t *index_block = store_gather_ints(s->f.index_block, picked, n, -1);
    bool half = s->norm_type == DTYPE_BF16;
    int dim = s->f.shape.head_dim;

    backend_ops(be)->rope_store(stream, &(struct rope_store_args){
        .q = joined,
        .k = joined + s->f.heads * dim,
        .v = joined + (s->f.heads + s->f.shape.kv_heads) * dim,
        .qkv_stride_q = s->stride,
        .qkv_stride_k = s->stride,
        .qkv_stride_v = s->stride,
        .q_norm = !s->norm ? NULL : half ? (const void *)s->q_norm_half : s->q_norm,
        .k_norm = !s->norm ? NULL : half ? (const void *)s->k_norm_half : s->k_norm,
        .norm_type = s->norm_type,
        .cos_sin = cos_sin,
        .positions = positions,
        .kv_block = kv_block,
        .index_block = index_block,
        .kv = d->kv,
        .index = d->index,
        .channels = s->channels,
        .shape = s->f.shape,
        .rows = n,
        .heads = s->f.heads,
        .eps = (float)eps });
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    scatter(s, joined, picked, n, d);
    mem_free(joined);
    mem_free(cos_sin);
    mem_free(positions);
    mem_free(kv_block);
    mem_free(index_block);
}

/* Steps in which every sequence has up to chunk[seq] rows, until all rows are stored;
 * with padding after each sequence's rows. */
static struct stored store_in_chunks(struct backend *be, const struct story *s,
                                     const int chunk[STORE_SEQS], int padding)
{
    struct stored d = store_new(&s->f, 0);
    int *picked = mem_alloc((size_t)(s->f.rows + STORE_SEQS * padding) * sizeof *picked);
    int next[STORE_SEQS] = { 0 }, n;

    while ((n = store_pick(picked, next, chunk, padding)) > 0)
        store_rows(be, s, picked, n, &d);
    mem_free(picked);
    return d;
}

static struct stored store_at_once(struct backend *be, const struct story *s)
{
    static const int all[STORE_SEQS] = { 1000, 1000, 1000, 1000, 1000 };

    return store_in_chunks(be, s, all, 0);
}

/* ---- the reference */

/* Head number `head` of row `row` of [q heads | k heads], normalised and rotated. */
static void place_slowly(const struct story *s, int row, int head, double *out)
{
    int dim = s->f.shape.head_dim, half = dim / 2;
    const float *x = s->joined + row * s->stride + head * dim;
    const float *cosine = s->cos_sin + row * dim, *sine = cosine + half;
    const float *weight = head < s->f.heads ? s->q_norm : s->k_norm;
    double y[MAX_DIM], square = 0;

    for (int i = 0; i < dim; i++)
        square += (double)x[i] * (double)x[i];
    for (int i = 0; i < dim; i++)
        y[i] = s->norm ? (double)x[i] / sqrt(square / dim + eps) * (double)weight[i]
                       : (double)x[i];
    for (int i = 0; i < half; i++) {
        out[i] = y[i] * (double)cosine[i] - y[i + half] * (double)sine[i];
        out[i + half] = y[i + half] * (double)cosine[i] + y[i] * (double)sine[i];
    }
}

static void check_queries(const struct story *s, const struct stored *got)
{
    int dim = s->f.shape.head_dim;
    double want[MAX_DIM];
    float rounded[MAX_DIM];

    for (int row = 0; row < s->f.rows; row++)
        for (int head = 0; head < s->f.heads; head++) {
            place_slowly(s, row, head, want);
            for (int i = 0; i < dim; i++)
                rounded[i] = (float)want[i];
            if (!row_close("q", got->q + (row * s->f.heads + head) * dim, rounded, (size_t)dim,
                           1e-5))
                ck_abort_msg("row %d, query head %d of %d channels", row, head, dim);
        }
}

static void check_key(const struct story *s, int row, int kv_head, const bf16 *got)
{
    double want[MAX_DIM];

    place_slowly(s, row, s->f.heads + kv_head, want);
    int i = store_channel_off(got, want, s->f.shape.head_dim);
    if (i >= 0)
        ck_abort_msg("row %d, KV head %d, channel %d: key %g, not %g", row, kv_head, i,
                     (double)bf16_value(got[i]), want[i]);
}

static bf16 *token_at(const struct story *s, bf16 *kv, int row, int kv_head)
{
    size_t dim = (size_t)s->f.shape.head_dim, token = (size_t)(s->f.positions[row] % BLOCK_TOKENS);
    size_t head = (size_t)s->f.kv_block[row] * (size_t)s->f.shape.kv_heads + (size_t)kv_head;

    return kv + (head * BLOCK_TOKENS + token) * 2 * dim;
}

static uint8_t *record_at(const struct story *s, uint8_t *index, int row, int kv_head)
{
    size_t bytes = (size_t)index_layout(&s->f.shape).record_bytes;

    return index +
           ((size_t)s->f.index_block[row] * (size_t)s->f.shape.kv_heads + (size_t)kv_head) * bytes;
}

static void index_channels(const struct story *s, uint8_t *record, const int16_t *channels,
                           const float *key, int token)
{
    enum { KEPT = INDEX_CHANNELS_KEPT };
    const struct index_layout l = index_layout(&s->f.shape);
    uint8_t *coarse = record + l.coarse + token * KEPT / 4;
    uint8_t *fine = record + l.fine + token * KEPT / 2;
    float x[KEPT], most = 0;

    for (int i = 0; i < KEPT; i++) {
        x[i] = key[channels[i]];
        most = fmaxf(most, fabsf(x[i]));
    }
    put_bf16(record + l.scale2 + 2 * token, 0.996f * rms_exactly(x, KEPT));
    put_bf16(record + l.scale4 + 2 * token, most / 7);
    float scale2 = get_bf16(record + l.scale2 + 2 * token);
    float scale4 = get_bf16(record + l.scale4 + 2 * token);
    memset(coarse, 0, KEPT / 4);
    memset(fine, 0, KEPT / 2);
    for (int i = 0; i < KEPT && scale2 != 0; i++)
        set_bits(coarse, 2 * i, x[i] < -scale2 ? 0 : x[i] < 0 ? 1 : x[i] < scale2 ? 2 : 3);
    for (int i = 0; i < KEPT && scale4 != 0; i++)
        set_bits(fine, 4 * i,
                 (unsigned)fmin(fmax(8 + rint((double)(x[i] / scale4)), 1), 15));
}

/* The record of one row's token, given its key as stored and what the record holds. */
static void index_token(const struct story *s, uint8_t *record, int kv_head, const bf16 *key,
                        int token)
{
    const struct index_layout l = index_layout(&s->f.shape);
    int dim = s->f.shape.head_dim;
    float x[MAX_DIM];

    for (int i = 0; i < dim; i++)
        x[i] = bf16_value(key[i]);
    widen_record(record, &s->f.shape, key, token);
    if (s->f.shape.index == INDEX_ROTATED)
        index_part(record + l.scale + 2 * token, record + l.sign + token * dim / 8,
                   record + l.large + token * dim / 8, x, dim);
    else
        index_channels(s, record, s->channels + kv_head * INDEX_CHANNELS_KEPT, x, token);
}

/* The pools as they must be after rows from..to - 1 were stored in what `want` is: keys
 * are checked and taken over, all else is made here. */
static void expect_rows(const struct story *s, const struct stored *got, struct stored *want,
                        int from, int to)
{
    int dim = s->f.shape.head_dim;

    for (int row = from; row < to; row++)
        for (int g = 0; g < s->f.shape.kv_heads; g++) {
            const float *v = s->joined + row * s->stride +
                             (s->f.heads + s->f.shape.kv_heads + g) * dim;
            bf16 *token = token_at(s, want->kv, row, g);
            memcpy(token, token_at(s, got->kv, row, g), (size_t)dim * sizeof *token);
            check_key(s, row, g, token);
            for (int i = 0; i < dim; i++)
                token[dim + i] = nearest_bf16(v[i]);
            int number = s->f.positions[row] % BLOCK_TOKENS;
            index_token(s, record_at(s, want->index, row, g), g, token, number);
            if (number == BLOCK_TOKENS - 1)
                add_record_means(record_at(s, want->index, row, g), &s->f.shape,
                                 token - number * 2 * dim, (size_t)(2 * dim));
        }
}

static void check_stored(const struct story *s, const struct stored *got)
{
    struct stored want = store_new(&s->f, 0);

    expect_rows(s, got, &want, 0, s->f.rows);
    store_assert_pools(&s->f, got, &want);
    check_queries(s, got);
    store_free(&want);
}

/* ---- tests */

static const int head_dims[] = { 16, 32, 64, 128, 256 };
enum { N_DIMS = sizeof head_dims / sizeof head_dims[0], MEANS = 4, N_KINDS = 5 };

static struct kv_shape shape_of(int kv_heads, int head_dim, int kind)
{
    return (struct kv_shape){
        .kv_heads = kv_heads,
        .head_dim = head_dim,
        .filter = kind == MEANS ? FILTER_MEANS : kind & 1 ? FILTER_BOUNDS : FILTER_COARSE,
        .index = kind & 2 && head_dim >= INDEX_CHANNELS_KEPT ? INDEX_CHANNELS : INDEX_ROTATED,
    };
}

/* Every shape against the reference, and every instruction set to the bit. */
START_TEST(rows_are_where_they_belong)
{
    const int dim = head_dims[_i / N_KINDS], kind = _i % N_KINDS;
    struct story *s = make_story(shape_of(1 + _i % 3, dim, kind), 3 * (1 + _i % 3), 10 + _i);
    struct stored scalar = store_at_once(test_backend("scalar"), s);

    check_stored(s, &scalar);
    for (int i = 0; i < TEST_N_ISAS; i++) {
        struct backend *be = test_backend(test_isa(i));
        if (!be)
            continue;
        struct stored other = store_at_once(be, s);
        store_assert_same(&s->f, &other, &scalar, test_isa(i));
        store_free(&other);
    }
    store_free(&scalar);
    free_story(s);
}
END_TEST

/* However the rows come, in whatever company and padding, the same bytes. */
START_TEST(chunks_do_not_change_a_bit)
{
    static const int chunkings[][STORE_SEQS] = {
        { 1, 1, 1, 1, 1 },       { 63, 63, 63, 63, 63 },  { 64, 64, 64, 64, 64 },
        { 65, 65, 65, 65, 65 },  { 1, 13, 64, 200, 5 },   { 1, 64, 1, 65, 127 },
        { 0, 0, 0, 99, 0 },
    };
    enum { N = sizeof chunkings / sizeof chunkings[0] };
    struct backend *be = test_backend(test_all_isas[_i % TEST_ALL_ISAS]);
    const int kind = _i / TEST_ALL_ISAS;

    if (!be)
        return;
    struct story *s = make_story(shape_of(2, kind == 3 ? 128 : 32, kind), 4, 40 + kind);
    struct stored all = store_at_once(be, s);
    for (int c = 0; c < N; c++) {
        struct stored pieces = store_in_chunks(be, s, chunkings[c], c % 2 * 70);
        if (chunkings[c][0] > 0)
            store_assert_same(&s->f, &pieces, &all, "chunks");
        store_free(&pieces);
    }
    store_free(&all);
    free_story(s);
}
END_TEST

START_TEST(threads_do_not_change_a_bit)
{
    static const int threads[] = { 1, 2, 3, 8 };
    struct story *s = make_story(shape_of(3, 64, _i), 6, 50);
    struct stored want = store_at_once(test_backend("auto"), s);

    for (size_t i = 0; i < sizeof threads / sizeof threads[0]; i++) {
        struct backend *be = open_with_threads("auto", threads[i]);
        struct stored got = store_at_once(be, s);
        store_assert_same(&s->f, &got, &want, "threads");
        store_free(&got);
        backend_close(be);
    }
    store_free(&want);
    free_story(s);
}
END_TEST

/* Sequence 3 first, then sequence 4, shorter and with smaller keys, in its blocks: what
 * is indexed is sequence 4 alone as far as it goes, and the rest stays. */
START_TEST(reused_blocks_start_afresh)
{
    struct backend *be = test_backend(test_all_isas[_i % TEST_ALL_ISAS]);
    const int kind = _i / TEST_ALL_ISAS;
    int picked[200], second = store_first_row(3), third = store_first_row(4);

    if (!be)
        return;
    struct story *s = make_story(shape_of(2, 64, kind), 2, 60);
    for (int p = 0; p < store_lengths[4]; p++) {
        s->f.kv_block[third + p] = s->f.kv_block[second + p];
        s->f.index_block[third + p] = s->f.index_block[second + p];
        for (int i = 0; i < s->stride; i++)
            s->joined[(third + p) * s->stride + i] *= 0.01f;
    }
    struct stored got = store_new(&s->f, 0), want = store_new(&s->f, 0);
    for (int i = 0; i < store_lengths[3]; i++)
        picked[i] = second + i;
    store_rows(be, s, picked, store_lengths[3], &got);
    expect_rows(s, &got, &want, second, second + store_lengths[3]);
    store_assert_pools(&s->f, &got, &want);
    for (int i = 0; i < store_lengths[4]; i++)
        picked[i] = third + i;
    store_rows(be, s, picked, 40, &got);
    store_rows(be, s, picked + 40, store_lengths[4] - 40, &got);
    expect_rows(s, &got, &want, third, third + store_lengths[4]);
    store_assert_pools(&s->f, &got, &want);
    store_free(&got);
    store_free(&want);
    free_story(s);
}
END_TEST

/* Keys of zeros, and of magnitudes from below the smallest scale to where squares nearly
 * overflow, alone and within a row. */
START_TEST(magnitudes)
{
    const int dim = head_dims[_i / N_KINDS], kind = _i % N_KINDS;
    struct story *s = make_story(shape_of(2, dim, kind), 2, 72);
    struct test_random r = test_random(70 + _i);

    s->norm = false;
    do_not_rotate(s);
    for (int row = 0; row < s->f.rows; row++) {
        float *x = s->joined + row * s->stride;
        float factor = powf(10, (float)(random_below(&r, 58) - 41));
        if (row % 8 == 2) /* the scale is a few of the smallest steps, so levels overflow */
            factor = 1e-40f * (2 + random_uniform(&r));
        for (int i = 0; i < s->stride; i++) {
            if (row % 4 == 0)
                x[i] = 0;
            else if (row % 4 == 1)
                x[i] = i % dim == row % dim ? factor : 0; /* one channel */
            else
                x[i] *= row % 4 == 2 ? factor : powf(10, (float)random_below(&r, 20) - 10);
        }
    }
    for (int i = 0; i < TEST_ALL_ISAS; i++) {
        struct backend *be = test_backend(test_all_isas[i]);
        if (!be)
            continue;
        struct stored got = store_at_once(be, s);
        check_stored(s, &got);
        store_free(&got);
    }
    free_story(s);
}
END_TEST

/* Without norm and rotation keys are rounded as values are: exactly. */
START_TEST(rounding_is_exact)
{
    static const float special[] = {
        0x1.01p0f, 0x1.03p0f, 0x1.010002p0f, 0x1.00fffep0f, -0x1.01p0f, -0x1.03p0f,
        0x1.fffffep127f, 0x1.fep127f, 0x1.fefffep127f, 0x1.ffp127f, 0x1p-149f, 0x1p-133f,
        0x1.8p-133f, 0x1.000002p-134f, 0x1p-134f, 0x1.fffffep-127f,
    };
    enum { N = sizeof special / sizeof special[0] };
    struct backend *be = test_backend(test_all_isas[_i]);

    if (!be)
        return;
    struct story *s = make_story(shape_of(2, 32, 0), 2, 80);
    s->norm = false;
    do_not_rotate(s);
    for (int i = 0; i < s->f.rows * s->stride; i++)
        if (i % 3 == 0)
            s->joined[i] = special[i / 3 % N];
    struct stored got = store_at_once(be, s);
    for (int row = 0; row < s->f.rows; row++)
        for (int g = 0; g < 2; g++) {
            const float *k = s->joined + row * s->stride + (2 + g) * 32, *v = k + 2 * 32;
            const bf16 *token = token_at(s, got.kv, row, g);
            for (int i = 0; i < 32; i++)
                if (token[i] != nearest_bf16(k[i]) || token[32 + i] != nearest_bf16(v[i]))
                    ck_abort_msg("row %d: %a and %a became %04x and %04x", row, (double)k[i],
                                 (double)v[i], token[i], token[32 + i]);
        }
    store_free(&got);
    free_story(s);
}
END_TEST

/* What is not a number stays so, and infinities stay. */
START_TEST(broken_values_stay_broken)
{
    struct backend *be = test_backend(test_all_isas[_i]);
    int row = store_first_row(2);

    if (!be)
        return;
    struct story *s = make_story(shape_of(1, 16, 1), 1, 90);
    float *v = s->joined + row * s->stride + 2 * 16;
    const uint32_t narrow_nan = 0x7f800001; /* would become infinite if cut */
    v[0] = NAN;
    v[1] = INFINITY;
    v[2] = -INFINITY;
    memcpy(&v[3], &narrow_nan, sizeof v[3]);
    struct stored got = store_at_once(be, s);
    const bf16 *value = token_at(s, got.kv, row, 0) + 16;
    ck_assert(isnan(bf16_value(value[0])) && isnan(bf16_value(value[3])));
    ck_assert(bf16_value(value[1]) == INFINITY && bf16_value(value[2]) == -INFINITY);
    store_free(&got);
    free_story(s);
}
END_TEST

TCase *rope_store_case(void)
{
    TCase *c = tcase_create("rope_store");

    tcase_set_timeout(c, 60);
    tcase_add_loop_test(c, rows_are_where_they_belong, 0, N_DIMS * N_KINDS);
    tcase_add_loop_test(c, chunks_do_not_change_a_bit, 0, TEST_ALL_ISAS * N_KINDS);
    tcase_add_loop_test(c, threads_do_not_change_a_bit, 0, N_KINDS);
    tcase_add_loop_test(c, reused_blocks_start_afresh, 0, TEST_ALL_ISAS * N_KINDS);
    tcase_add_loop_test(c, magnitudes, 0, N_DIMS * N_KINDS);
    tcase_add_loop_test(c, rounding_is_exact, 0, TEST_ALL_ISAS);
    tcase_add_loop_test(c, broken_values_stay_broken, 0, TEST_ALL_ISAS);
    return c;
}
