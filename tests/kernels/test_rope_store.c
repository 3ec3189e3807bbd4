#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/closeness.h"
#include "tests/support/index_reference.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <math.h>
#include <string.h>

/* Sequences whose rows are stored in blocks that lie scattered in two pools full of a
 * pattern.  Afterwards every byte of the pools is accounted for. */
enum {
    N_SEQS = 5,
    MAX_DIM = 256,
    GAP = 5,                     /* floats between the rows of joined */
    PATTERN = 0xa5,
    SPARE_BLOCKS = 3,
    NO_ROW = -1,
};

static const int lengths[N_SEQS] = { 1, 64, 65, 200, 131 };
static const double eps = 1e-6;

struct story {
    struct kv_shape shape;
    int heads, rows, stride, pool_blocks;
    float *joined;               /* [rows, stride]: q, k, v of a row, then the gap */
    float *cos_sin;              /* [rows, head_dim] */
    int32_t *positions, *kv_block, *index_block; /* [rows] */
    int16_t *channels;
    enum dtype norm_type;
    bool norm;
    float q_norm[MAX_DIM], k_norm[MAX_DIM];
    bf16 q_norm_half[MAX_DIM], k_norm_half[MAX_DIM];
};

struct stored {
    bf16 *kv;
    uint8_t *index;
    float *q;                    /* [rows, heads * head_dim] */
};

static int first_row(int seq)
{
    int row = 0;

    for (int i = 0; i < seq; i++)
        row += lengths[i];
    return row;
}

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

static void place_rows(struct story *s, struct test_random *r)
{
    int32_t *kv_ids = mem_alloc((size_t)s->pool_blocks * sizeof *kv_ids);
    int32_t *index_ids = mem_alloc((size_t)s->pool_blocks * sizeof *index_ids);
    int used = 0;

    random_order(r, kv_ids, s->pool_blocks);
    random_order(r, index_ids, s->pool_blocks);
    for (int seq = 0; seq < N_SEQS; seq++) {
        for (int p = 0; p < lengths[seq]; p++) {
            int row = first_row(seq) + p;
            s->positions[row] = p;
            s->kv_block[row] = kv_ids[used + p / BLOCK_TOKENS];
            s->index_block[row] = index_ids[used + p / BLOCK_TOKENS];
        }
        used += blocks_of(lengths[seq]);
    }
    mem_free(kv_ids);
    mem_free(index_ids);
}

static struct story *make_story(struct kv_shape shape, int heads, uint64_t seed)
{
    struct story *s = mem_calloc(1, sizeof *s);
    struct test_random r = test_random(seed);
    int dim = shape.head_dim;

    s->shape = shape;
    s->heads = heads;
    s->rows = first_row(N_SEQS);
    s->stride = (heads + 2 * shape.kv_heads) * dim + GAP;
    s->pool_blocks = SPARE_BLOCKS;
    for (int i = 0; i < N_SEQS; i++)
        s->pool_blocks += blocks_of(lengths[i]);
    s->joined = mem_alloc((size_t)(s->rows * s->stride) * sizeof(float));
    s->cos_sin = mem_alloc((size_t)(s->rows * dim) * sizeof(float));
    s->positions = mem_alloc((size_t)s->rows * sizeof(int32_t));
    s->kv_block = mem_alloc((size_t)s->rows * sizeof(int32_t));
    s->index_block = mem_alloc((size_t)s->rows * sizeof(int32_t));
    s->norm = seed % 3 > 0;
    s->norm_type = seed % 3 == 1 ? DTYPE_BF16 : DTYPE_F32;
    make_norms(s, &r);
    random_floats(&r, s->joined, (size_t)(s->rows * s->stride), 2);
    for (int i = 0; i < s->rows * dim; i++) {
        double angle = (double)random_uniform(&r) * 4;
        s->cos_sin[i] = (float)(i % dim < dim / 2 ? cos(angle) : sin(angle));
    }
    if (shape.index == INDEX_CHANNELS) {
        s->channels = mem_alloc((size_t)shape.kv_heads * INDEX_CHANNELS_KEPT * sizeof(int16_t));
        random_channels(&r, s->channels, &shape);
    }
    place_rows(s, &r);
    return s;
}

static void free_story(struct story *s)
{
    mem_free(s->joined);
    mem_free(s->cos_sin);
    mem_free(s->positions);
    mem_free(s->kv_block);
    mem_free(s->index_block);
    mem_free(s->channels);
    mem_free(s);
}

/* cos 1 and sin 0: rows are stored as they are. */
static void do_not_rotate(struct story *s)
{
    int dim = s->shape.head_dim;

    for (int i = 0; i < s->rows * dim; i++)
        s->cos_sin[i] = i % dim < dim / 2;
}

static size_t kv_bytes(const struct story *s)
{
    return (size_t)s->pool_blocks * kv_block_bytes(&s->shape);
}

static size_t index_bytes(const struct story *s)
{
    return (size_t)s->pool_blocks * index_block_bytes(&s->shape);
}

static struct stored make_stored(const struct story *s)
{
    struct stored d = {
        .kv = mem_alloc(kv_bytes(s)),
        .index = mem_alloc(index_bytes(s)),
        .q = mem_calloc((size_t)(s->rows * s->heads * s->shape.head_dim), sizeof(float)),
    };

    memset(d.kv, PATTERN, kv_bytes(s));
    memset(d.index, PATTERN, index_bytes(s));
    return d;
}

static void free_stored(struct stored *d)
{
    mem_free(d->kv);
    mem_free(d->index);
    mem_free(d->q);
}

static void assert_same(const struct story *s, const struct stored *got,
                        const struct stored *want, const char *what)
{
    if (memcmp(got->kv, want->kv, kv_bytes(s)) != 0)
        ck_abort_msg("%s: keys or values differ", what);
    if (memcmp(got->index, want->index, index_bytes(s)) != 0)
        ck_abort_msg("%s: the index differs", what);
    ck_assert(floats_identical(what, got->q, want->q,
                               (size_t)(s->rows * s->heads * s->shape.head_dim)));
}

/* ---- the operation */

struct batch {
    float *joined, *cos_sin;
    int32_t *positions, *kv_block, *index_block;
};

/* Rows of the story, NO_ROW for padding, into a batch. */
static struct batch gather(const struct story *s, const int *picked, int n)
{
    size_t width = (size_t)s->stride, dim = (size_t)s->shape.head_dim;
    struct batch b = {
        .joined = mem_calloc((size_t)n * width, sizeof(float)),
        .cos_sin = mem_calloc((size_t)n * dim, sizeof(float)),
        .positions = mem_calloc((size_t)n, sizeof(int32_t)),
        .kv_block = mem_alloc((size_t)n * sizeof(int32_t)),
        .index_block = mem_alloc((size_t)n * sizeof(int32_t)),
    };

    for (int i = 0; i < n; i++) {
        size_t row = (size_t)picked[i];
        b.kv_block[i] = b.index_block[i] = -1;
        if (picked[i] == NO_ROW)
            continue;
        memcpy(b.joined + (size_t)i * width, s->joined + row * width, width * sizeof(float));
        memcpy(b.cos_sin + (size_t)i * dim, s->cos_sin + row * dim, dim * sizeof(float));
        b.positions[i] = s->positions[row];
        b.kv_block[i] = s->kv_block[row];
        b.index_block[i] = s->index_block[row];
    }
    return b;
}

/* Queries go to their rows of d; keys, values and the gap must be as they were. */
static void scatter(const struct story *s, const struct batch *b, const int *picked, int n,
                    struct stored *d)
{
    size_t width = (size_t)s->stride, q_dim = (size_t)(s->heads * s->shape.head_dim);

    for (int i = 0; i < n; i++) {
        const float *row = b->joined + (size_t)i * width;
        if (picked[i] == NO_ROW)
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
    struct batch b = gather(s, picked, n);
    bool half = s->norm_type == DTYPE_BF16;
    int dim = s->shape.head_dim;

    backend_ops(be)->rope_store(stream, &(struct rope_store_args){
        .q = b.joined,
        .k = b.joined + s->heads * dim,
        .v = b.joined + (s->heads + s->shape.kv_heads) * dim,
        .qkv_stride_q = s->stride,
        .qkv_stride_k = s->stride,
        .qkv_stride_v = s->stride,
        .q_norm = !s->norm ? NULL : half ? (const void *)s->q_norm_half : s->q_norm,
        .k_norm = !s->norm ? NULL : half ? (const void *)s->k_norm_half : s->k_norm,
        .norm_type = s->norm_type,
        .cos_sin = b.cos_sin,
        .positions = b.positions,
        .kv_block = b.kv_block,
        .index_block = b.index_block,
        .kv = d->kv,
        .index = d->index,
        .channels = s->channels,
        .shape = s->shape,
        .rows = n,
        .heads = s->heads,
        .eps = (float)eps });
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    scatter(s, &b, picked, n, d);
    mem_free(b.joined);
    mem_free(b.cos_sin);
    mem_free(b.positions);
    mem_free(b.kv_block);
    mem_free(b.index_block);
}

/* Steps in which every sequence has up to chunk[seq] rows, until all rows are stored;
 * with padding after each sequence's rows. */
static struct stored store_in_chunks(struct backend *be, const struct story *s,
                                     const int chunk[N_SEQS], int padding)
{
    struct stored d = make_stored(s);
    int *picked = mem_alloc((size_t)(s->rows + N_SEQS * padding) * sizeof *picked);
    int next[N_SEQS] = { 0 };

    for (;;) {
        int n = 0;
        bool any = false;
        for (int seq = 0; seq < N_SEQS; seq++) {
            for (int i = 0; i < chunk[seq] && next[seq] < lengths[seq]; i++) {
                picked[n++] = first_row(seq) + next[seq]++;
                any = true;
            }
            for (int i = 0; i < padding; i++)
                picked[n++] = NO_ROW;
        }
        if (!any)
            break;
        store_rows(be, s, picked, n, &d);
    }
    mem_free(picked);
    return d;
}

static struct stored store_at_once(struct backend *be, const struct story *s)
{
    static const int all[N_SEQS] = { 1000, 1000, 1000, 1000, 1000 };

    return store_in_chunks(be, s, all, 0);
}

/* ---- the reference */

/* Head number `head` of row `row` of [q heads | k heads], normalised and rotated. */
static void place_slowly(const struct story *s, int row, int head, double *out)
{
    int dim = s->shape.head_dim, half = dim / 2;
    const float *x = s->joined + row * s->stride + head * dim;
    const float *cosine = s->cos_sin + row * dim, *sine = cosine + half;
    const float *weight = head < s->heads ? s->q_norm : s->k_norm;
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
    int dim = s->shape.head_dim;
    double want[MAX_DIM];
    float rounded[MAX_DIM];

    for (int row = 0; row < s->rows; row++)
        for (int head = 0; head < s->heads; head++) {
            place_slowly(s, row, head, want);
            for (int i = 0; i < dim; i++)
                rounded[i] = (float)want[i];
            if (!row_close("q", got->q + (row * s->heads + head) * dim, rounded, (size_t)dim,
                           1e-5))
                ck_abort_msg("row %d, query head %d of %d channels", row, head, dim);
        }
}

/* A stored key must lie between the roundings of the two ends of the tolerance. */
static void check_key(const struct story *s, int row, int kv_head, const bf16 *got)
{
    double want[MAX_DIM], most = 0;

    place_slowly(s, row, s->heads + kv_head, want);
    for (int i = 0; i < s->shape.head_dim; i++)
        most = fmax(most, fabs(want[i]));
    for (int i = 0; i < s->shape.head_dim; i++) {
        float low = bf16_value(nearest_bf16((float)(want[i] - 1e-5 * most)));
        float high = bf16_value(nearest_bf16((float)(want[i] + 1e-5 * most)));
        if (!(bf16_value(got[i]) >= low && bf16_value(got[i]) <= high))
            ck_abort_msg("row %d, KV head %d, channel %d: key %g, not %g", row, kv_head, i,
                         (double)bf16_value(got[i]), want[i]);
    }
}

static bf16 *token_at(const struct story *s, bf16 *kv, int row, int kv_head)
{
    size_t dim = (size_t)s->shape.head_dim, token = (size_t)(s->positions[row] % BLOCK_TOKENS);
    size_t head = (size_t)s->kv_block[row] * (size_t)s->shape.kv_heads + (size_t)kv_head;

    return kv + (head * BLOCK_TOKENS + token) * 2 * dim;
}

static uint8_t *record_at(const struct story *s, uint8_t *index, int row, int kv_head)
{
    size_t bytes = (size_t)index_layout(&s->shape).record_bytes;

    return index +
           ((size_t)s->index_block[row] * (size_t)s->shape.kv_heads + (size_t)kv_head) * bytes;
}

static void index_channels(const struct story *s, uint8_t *record, const int16_t *channels,
                           const float *key, int token)
{
    enum { KEPT = INDEX_CHANNELS_KEPT };
    const struct index_layout l = index_layout(&s->shape);
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
    const struct index_layout l = index_layout(&s->shape);
    int dim = s->shape.head_dim;
    float x[MAX_DIM];

    for (int i = 0; i < dim; i++)
        x[i] = bf16_value(key[i]);
    widen_record(record, &s->shape, key, token);
    if (s->shape.index == INDEX_ROTATED)
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
    int dim = s->shape.head_dim;

    for (int row = from; row < to; row++)
        for (int g = 0; g < s->shape.kv_heads; g++) {
            const float *v = s->joined + row * s->stride +
                             (s->heads + s->shape.kv_heads + g) * dim;
            bf16 *token = token_at(s, want->kv, row, g);
            memcpy(token, token_at(s, got->kv, row, g), (size_t)dim * sizeof *token);
            check_key(s, row, g, token);
            for (int i = 0; i < dim; i++)
                token[dim + i] = nearest_bf16(v[i]);
            index_token(s, record_at(s, want->index, row, g), g, token,
                        s->positions[row] % BLOCK_TOKENS);
        }
}

static void assert_pools(const struct story *s, const struct stored *got,
                         const struct stored *want)
{
    if (memcmp(got->kv, want->kv, kv_bytes(s)) != 0)
        ck_abort_msg("head dimension %d: values, or bytes that were nobody's",
                     s->shape.head_dim);
    for (size_t i = 0; i < index_bytes(s); i++)
        if (got->index[i] != want->index[i])
            ck_abort_msg("head dimension %d, filter %d, index %d: byte %zu of record %zu is "
                         "%02x, not %02x", s->shape.head_dim, s->shape.filter, s->shape.index,
                         i % (size_t)index_layout(&s->shape).record_bytes,
                         i / (size_t)index_layout(&s->shape).record_bytes, got->index[i],
                         want->index[i]);
}

static void check_stored(const struct story *s, const struct stored *got)
{
    struct stored want = make_stored(s);

    expect_rows(s, got, &want, 0, s->rows);
    assert_pools(s, got, &want);
    check_queries(s, got);
    free_stored(&want);
}

/* ---- tests */

static const int head_dims[] = { 16, 32, 64, 128, 256 };
enum { N_DIMS = sizeof head_dims / sizeof head_dims[0], N_KINDS = 4 };

static struct kv_shape shape_of(int kv_heads, int head_dim, int kind)
{
    return (struct kv_shape){
        .kv_heads = kv_heads,
        .head_dim = head_dim,
        .filter = kind & 1 ? FILTER_BOUNDS : FILTER_COARSE,
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
        assert_same(s, &other, &scalar, test_isa(i));
        free_stored(&other);
    }
    free_stored(&scalar);
    free_story(s);
}
END_TEST

/* However the rows come, in whatever company and padding, the same bytes. */
START_TEST(chunks_do_not_change_a_bit)
{
    static const int chunkings[][N_SEQS] = {
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
            assert_same(s, &pieces, &all, "chunks");
        free_stored(&pieces);
    }
    free_stored(&all);
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
        assert_same(s, &got, &want, "threads");
        free_stored(&got);
        backend_close(be);
    }
    free_stored(&want);
    free_story(s);
}
END_TEST

/* Sequence 3 first, then sequence 4, shorter and with smaller keys, in its blocks: what
 * is indexed is sequence 4 alone as far as it goes, and the rest stays. */
START_TEST(reused_blocks_start_afresh)
{
    struct backend *be = test_backend(test_all_isas[_i % TEST_ALL_ISAS]);
    const int kind = _i / TEST_ALL_ISAS;
    int picked[200], second = first_row(3), third = first_row(4);

    if (!be)
        return;
    struct story *s = make_story(shape_of(2, 64, kind), 2, 60);
    for (int p = 0; p < lengths[4]; p++) {
        s->kv_block[third + p] = s->kv_block[second + p];
        s->index_block[third + p] = s->index_block[second + p];
        for (int i = 0; i < s->stride; i++)
            s->joined[(third + p) * s->stride + i] *= 0.01f;
    }
    struct stored got = make_stored(s), want = make_stored(s);
    for (int i = 0; i < lengths[3]; i++)
        picked[i] = second + i;
    store_rows(be, s, picked, lengths[3], &got);
    expect_rows(s, &got, &want, second, second + lengths[3]);
    assert_pools(s, &got, &want);
    for (int i = 0; i < lengths[4]; i++)
        picked[i] = third + i;
    store_rows(be, s, picked, 40, &got);
    store_rows(be, s, picked + 40, lengths[4] - 40, &got);
    expect_rows(s, &got, &want, third, third + lengths[4]);
    assert_pools(s, &got, &want);
    free_stored(&got);
    free_stored(&want);
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
    for (int row = 0; row < s->rows; row++) {
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
        free_stored(&got);
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
    for (int i = 0; i < s->rows * s->stride; i++)
        if (i % 3 == 0)
            s->joined[i] = special[i / 3 % N];
    struct stored got = store_at_once(be, s);
    for (int row = 0; row < s->rows; row++)
        for (int g = 0; g < 2; g++) {
            const float *k = s->joined + row * s->stride + (2 + g) * 32, *v = k + 2 * 32;
            const bf16 *token = token_at(s, got.kv, row, g);
            for (int i = 0; i < 32; i++)
                if (token[i] != nearest_bf16(k[i]) || token[32 + i] != nearest_bf16(v[i]))
                    ck_abort_msg("row %d: %a and %a became %04x and %04x", row, (double)k[i],
                                 (double)v[i], token[i], token[32 + i]);
        }
    free_stored(&got);
    free_story(s);
}
END_TEST

/* What is not a number stays so, and infinities stay. */
START_TEST(broken_values_stay_broken)
{
    struct backend *be = test_backend(test_all_isas[_i]);
    int row = first_row(2);

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
    free_stored(&got);
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
