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

/* Rows of some sequences, stored in blocks that lie scattered in pools full of a pattern.
 * Afterwards every byte of the pools is accounted for. */
enum {
    N_SEQS = 5,
    MAX_DIM = 576,
    GAP = 5,                     /* floats behind the rows and heads of what is read */
    PATTERN = 0xa5,
    SPARE_BLOCKS = 3,
    NO_ROW = -1,
    KEPT = 77,                   /* in the latent part of q, which stays */
};

static const int lengths[N_SEQS] = { 1, 64, 65, 200, 131 };
static const double eps = 1e-5;

struct story {
    struct kv_shape shape;
    int heads, rope, rows, pool_blocks;
    bool interleaved;
    float *kv, *q_rope, *cos_sin; /* [rows] of kv_stride, q_stride and rope */
    int32_t *positions, *kv_block, *index_block; /* [rows] */
    float norm[MAX_DIM];
    bf16 half_norm[MAX_DIM];
    bool half;
};

struct stored {
    bf16 *pool;
    uint8_t *index;
    float *q;                    /* [rows, heads, head_dim] */
};

static int kv_stride(const struct story *s)
{
    return s->shape.head_dim + GAP;
}

static int q_head_stride(const struct story *s)
{
    return s->rope + GAP;
}

static int q_stride(const struct story *s)
{
    return s->heads * q_head_stride(s) + GAP;
}

static int first_row(int seq)
{
    int row = 0;

    for (int i = 0; i < seq; i++)
        row += lengths[i];
    return row;
}

static void place_rows(struct story *s, struct test_random *r)
{
    int32_t *pool = mem_alloc((size_t)s->pool_blocks * sizeof *pool);
    int32_t *index = mem_alloc((size_t)s->pool_blocks * sizeof *index);
    int used = 0;

    random_order(r, pool, s->pool_blocks);
    random_order(r, index, s->pool_blocks);
    for (int seq = 0; seq < N_SEQS; seq++)
        for (int p = 0; p < lengths[seq]; p++) {
            int row = first_row(seq) + p;
            used += p % BLOCK_TOKENS == 0;
            s->positions[row] = p;
            s->kv_block[row] = pool[used - 1];
            s->index_block[row] = index[used - 1];
        }
    mem_free(pool);
    mem_free(index);
}

/* The shape of latent_shapes[kind % N_LATENT_SHAPES]; further bits: bounds, interleaved. */
static struct story *make_story(int kind, uint64_t seed)
{
    struct story *s = mem_calloc(1, sizeof *s);
    struct test_random r = test_random(seed);
    struct latent_shape of = latent_shapes[kind % N_LATENT_SHAPES];
    int head_dim = of.head_dim;

    kind /= N_LATENT_SHAPES;
    s->shape = (struct kv_shape){
        .kv_heads = 1, .head_dim = head_dim, .latent_dim = latent_dim_of(head_dim),
        .filter = kind & 1 ? FILTER_BOUNDS : FILTER_COARSE, .index = INDEX_ROTATED };
    s->interleaved = kind & 2;
    s->heads = of.heads;
    s->rope = head_dim - s->shape.latent_dim;
    s->rows = first_row(N_SEQS);
    s->half = seed % 2;
    s->pool_blocks = SPARE_BLOCKS;
    for (int i = 0; i < N_SEQS; i++)
        s->pool_blocks += (lengths[i] + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    s->kv = mem_alloc((size_t)(s->rows * kv_stride(s)) * sizeof *s->kv);
    s->q_rope = mem_alloc((size_t)(s->rows * q_stride(s)) * sizeof *s->q_rope);
    s->cos_sin = mem_alloc((size_t)(s->rows * s->rope) * sizeof *s->cos_sin);
    s->positions = mem_alloc((size_t)s->rows * sizeof *s->positions);
    s->kv_block = mem_alloc((size_t)s->rows * sizeof *s->kv_block);
    s->index_block = mem_alloc((size_t)s->rows * sizeof *s->index_block);
    random_floats(&r, s->kv, (size_t)(s->rows * kv_stride(s)), 2);
    random_floats(&r, s->q_rope, (size_t)(s->rows * q_stride(s)), 2);
    for (int i = 0; i < s->rows * s->rope; i++) {
        double angle = (double)random_uniform(&r) * 4;
        s->cos_sin[i] = (float)(i % s->rope < s->rope / 2 ? cos(angle) : sin(angle));
    }
    for (int i = 0; i < s->shape.latent_dim; i++) {
        s->half_norm[i] = nearest_bf16(1 + random_uniform(&r) / 2);
        s->norm[i] = s->half ? bf16_value(s->half_norm[i]) : 1 + random_uniform(&r) / 2;
    }
    place_rows(s, &r);
    return s;
}

static void free_story(struct story *s)
{
    mem_free(s->kv);
    mem_free(s->q_rope);
    mem_free(s->cos_sin);
    mem_free(s->positions);
    mem_free(s->kv_block);
    mem_free(s->index_block);
    mem_free(s);
}

static size_t pool_bytes(const struct story *s)
{
    return (size_t)s->pool_blocks * kv_block_bytes(&s->shape);
}

static size_t index_bytes(const struct story *s)
{
    return (size_t)s->pool_blocks * index_block_bytes(&s->shape);
}

static size_t q_width(const struct story *s)
{
    return (size_t)(s->heads * s->shape.head_dim);
}

static struct stored make_stored(const struct story *s)
{
    struct stored d = {
        .pool = mem_alloc(pool_bytes(s)),
        .index = mem_alloc(index_bytes(s)),
        .q = mem_alloc((size_t)s->rows * q_width(s) * sizeof(float)),
    };

    memset(d.pool, PATTERN, pool_bytes(s));
    memset(d.index, PATTERN, index_bytes(s));
    for (size_t i = 0; i < (size_t)s->rows * q_width(s); i++)
        d.q[i] = KEPT;
    return d;
}

static void free_stored(struct stored *d)
{
    mem_free(d->pool);
    mem_free(d->index);
    mem_free(d->q);
}

static void assert_same(const struct story *s, const struct stored *got,
                        const struct stored *want, const char *what)
{
    if (memcmp(got->pool, want->pool, pool_bytes(s)) != 0)
        ck_abort_msg("%s: rows differ", what);
    if (memcmp(got->index, want->index, index_bytes(s)) != 0)
        ck_abort_msg("%s: the index differs", what);
    ck_assert(floats_identical(what, got->q, want->q, (size_t)s->rows * q_width(s)));
}

/* ---- the operation */

/* Rows of a story, NO_ROW for padding, [n, width] each; padding is NaN. */
static float *gather(const float *from, const int *picked, int n, size_t width)
{
    float *to = mem_alloc((size_t)n * width * sizeof *to);

    for (int i = 0; i < n; i++)
        for (size_t d = 0; d < width; d++)
            to[(size_t)i * width + d] =
                picked[i] == NO_ROW ? NAN : from[(size_t)picked[i] * width + d];
    return to;
}

static int32_t *gather_ints(const int32_t *from, const int *picked, int n, int32_t padding)
{
    int32_t *to = mem_alloc((size_t)n * sizeof *to);

    for (int i = 0; i < n; i++)
        to[i] = picked[i] == NO_ROW ? padding : from[picked[i]];
    return to;
}

static void store_rows(struct backend *be, const struct story *s, const int *picked, int n,
                       struct stored *d)
{
    struct stream *stream = stream_create(be);
    float *kv = gather(s->kv, picked, n, (size_t)kv_stride(s));
    float *q_rope = gather(s->q_rope, picked, n, (size_t)q_stride(s));
    float *cos_sin = gather(s->cos_sin, picked, n, (size_t)s->rope);
    float *q = gather(d->q, picked, n, q_width(s));
    int32_t *positions = gather_ints(s->positions, picked, n, 0);
    int32_t *kv_block = gather_ints(s->kv_block, picked, n, -1);
    int32_t *index_block = gather_ints(s->index_block, picked, n, -1);

    backend_ops(be)->latent_store(stream, &(struct latent_store_args){
        .q = q, .q_rope = q_rope, .q_rope_stride = q_stride(s),
        .q_rope_head_stride = q_head_stride(s), .kv = kv, .kv_stride = kv_stride(s),
        .norm = s->half ? (const void *)s->half_norm : s->norm,
        .norm_type = s->half ? DTYPE_BF16 : DTYPE_F32, .cos_sin = cos_sin,
        .positions = positions, .kv_block = kv_block, .index_block = index_block,
        .pool = d->pool, .index = d->index, .shape = s->shape, .rows = n, .heads = s->heads,
        .interleaved = s->interleaved, .eps = (float)eps });
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    for (int i = 0; i < n; i++)
        if (picked[i] != NO_ROW)
            memcpy(d->q + (size_t)picked[i] * q_width(s), q + (size_t)i * q_width(s),
                   q_width(s) * sizeof *q);
    void *all[] = { kv, q_rope, cos_sin, q, positions, kv_block, index_block };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        mem_free(all[i]);
}

/* Steps in which every sequence has up to `chunk` rows and then padding, until all rows are
 * stored. */
static struct stored store_in_chunks(struct backend *be, const struct story *s, int chunk,
                                     int padding)
{
    struct stored d = make_stored(s);
    int *picked = mem_alloc((size_t)(s->rows + N_SEQS * padding) * sizeof *picked);
    int left = s->rows;

    for (int step = 0; left > 0; step++) {
        int n = 0;
        for (int seq = 0; seq < N_SEQS; seq++) {
            for (int p = step * chunk; p < (step + 1) * chunk && p < lengths[seq]; p++, left--)
                picked[n++] = first_row(seq) + p;
            for (int i = 0; i < padding; i++)
                picked[n++] = NO_ROW;
        }
        store_rows(be, s, picked, n, &d);
    }
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
    int latent = s->shape.latent_dim;
    double want[MAX_DIM];
    float rounded[MAX_DIM];

    for (int i = 0; i < s->rows * s->heads; i++) {
        const float *q = got->q + (size_t)i * (size_t)s->shape.head_dim;
        turn_slowly(s, i / s->heads, s->q_rope + i / s->heads * q_stride(s) +
                                         i % s->heads * q_head_stride(s), want);
        for (int d = 0; d < s->rope; d++)
            rounded[d] = (float)want[d];
        for (int d = 0; d < latent; d++)
            if (q[d] != KEPT)
                ck_abort_msg("head %d: its latent part was written", i);
        if (!row_close("q", q + latent, rounded, (size_t)s->rope, 1e-5))
            ck_abort_msg("row %d, head %d", i / s->heads, i % s->heads);
    }
}

/* A stored row must lie between the roundings of the two ends of the tolerance. */
static void check_row(const struct story *s, int row, const bf16 *got)
{
    const float *x = s->kv + row * kv_stride(s);
    int latent = s->shape.latent_dim;
    double want[MAX_DIM], square = 0, most = 0;

    for (int i = 0; i < latent; i++)
        square += (double)x[i] * (double)x[i];
    for (int i = 0; i < latent; i++)
        want[i] = (double)x[i] / sqrt(square / latent + eps) * (double)s->norm[i];
    turn_slowly(s, row, x + latent, want + latent);
    for (int i = 0; i < s->shape.head_dim; i++)
        most = fmax(most, fabs(want[i]));
    for (int i = 0; i < s->shape.head_dim; i++) {
        float low = bf16_value(nearest_bf16((float)(want[i] - 1e-5 * most)));
        float high = bf16_value(nearest_bf16((float)(want[i] + 1e-5 * most)));
        if (!(bf16_value(got[i]) >= low && bf16_value(got[i]) <= high))
            ck_abort_msg("row %d, channel %d: %g, not %g", row, i, (double)bf16_value(got[i]),
                         want[i]);
    }
}

static void index_row(const struct story *s, uint8_t *record, const bf16 *key, int token)
{
    const struct index_layout l = index_layout(&s->shape);
    int latent = s->shape.latent_dim, at = token * s->shape.head_dim / 8;
    uint8_t *scale = record + l.scale + 4 * token;
    float x[MAX_DIM];

    for (int i = 0; i < s->shape.head_dim; i++)
        x[i] = bf16_value(key[i]);
    widen_record(record, &s->shape, key, token);
    index_part(scale, record + l.sign + at, record + l.large + at, x, latent);
    index_part(scale + 2, record + l.sign + at + latent / 8, record + l.large + at + latent / 8,
               x + latent, s->rope);
}

/* Rows are checked and taken over; all else of the pools is made here. */
static void check_stored(const struct story *s, const struct stored *got)
{
    struct stored want = make_stored(s);
    size_t row_dim = (size_t)s->shape.head_dim;

    for (int row = 0; row < s->rows; row++) {
        int token = s->positions[row] % BLOCK_TOKENS;
        size_t at = ((size_t)s->kv_block[row] * BLOCK_TOKENS + (size_t)token) * row_dim;
        check_row(s, row, got->pool + at);
        memcpy(want.pool + at, got->pool + at, row_dim * sizeof(bf16));
        index_row(s, want.index + (size_t)s->index_block[row] * index_block_bytes(&s->shape),
                  want.pool + at, token);
    }
    check_queries(s, got);
    if (memcmp(got->pool, want.pool, pool_bytes(s)) != 0)
        ck_abort_msg("bytes of the pool that were nobody's");
    for (size_t i = 0; i < index_bytes(s); i++)
        if (got->index[i] != want.index[i])
            ck_abort_msg("byte %zu of record %zu is %02x, not %02x",
                         i % index_block_bytes(&s->shape), i / index_block_bytes(&s->shape),
                         got->index[i], want.index[i]);
    free_stored(&want);
}

/* ---- tests */

enum { N_KINDS = 4 * N_LATENT_SHAPES, ALL = 1000 };

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
        assert_same(s, &other, &scalar, test_isa(i));
        free_stored(&other);
    }
    free_stored(&scalar);
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
            assert_same(s, &got, &want, "chunks");
            free_stored(&got);
        }
        backend_close(be);
    }
    free_stored(&want);
    free_story(s);
}
END_TEST

/* Zeros in one part or both, and magnitudes from the smallest to where squares nearly
 * overflow: each part has its own scale. */
START_TEST(magnitudes)
{
    struct story *s = make_story(_i, 70);
    struct test_random r = test_random(71);
    int latent = s->shape.latent_dim;

    for (int row = 0; row < s->rows; row++) {
        float *x = s->kv + row * kv_stride(s);
        float factor = powf(10, (float)(random_below(&r, 58) - 41));
        for (int i = 0; i < s->shape.head_dim; i++) {
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
        free_stored(&got);
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
