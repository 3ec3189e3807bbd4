/* rope_store on the GPU against the CPU back end.
 *
 * Sequences are stored in several calls, the same on both, into pools that are 0xff
 * before.  Queries, keys and values are compared with the CPU's; the index with the one
 * that the CPU makes of the very keys that the GPU stored. */

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

enum {
    N_SEQS = 6,
    MAX_STEPS = 32,
    MAX_DIM = 128,
    SPARE_BLOCKS = 3,
    PADDING = 3,                 /* rows of padding in a call */
    DECODE_STEPS = 8,
    NO_ROW = -1,
};

/* What prefill stores; DECODE_STEPS tokens follow, one a step, so that decode begins at
 * the start, in the middle and at the end of blocks. */
static const int prefilled[N_SEQS] = { 0, 58, 64, 130, 61, 250 };

struct setup {
    struct kv_shape shape;
    int group;
    int norm;                    /* 0: none, 1: bf16 weights, 2: f32 weights */
    bool joined;                 /* q, k, v of a row are neighbours, as in the forward pass */
    int chunk[N_SEQS];           /* rows of each sequence in a step of prefill */
};

/* Where q, k and v of n rows lie in one buffer: elements. */
struct place {
    size_t q, k, v, total;
    int q_stride, k_stride, v_stride;
};

struct story {
    struct setup s;
    int heads, rows, pool_blocks, q_dim, kv_dim;
    float *q, *k, *v;            /* [rows, q_dim], [rows, kv_dim] twice */
    float *cos_sin;              /* [rows, head_dim] */
    int32_t *positions, *kv_block, *index_block; /* [rows] */
    int16_t *channels;           /* or NULL */
    void *q_norm, *k_norm;       /* or NULL */
    size_t kv_bytes, index_bytes;
    char shape[160];
};

/* Results of one back end, host memory.  act of the GPU is widened. */
struct stored {
    bf16 *kv;
    uint8_t *index;
    float *q;                    /* [rows, q_dim] */
};

/* The same on the GPU. */
struct device {
    bf16 *kv;
    uint8_t *index;
    const int16_t *channels;
    const void *q_norm, *k_norm;
};

static int length_of(int seq)
{
    return prefilled[seq] + DECODE_STEPS;
}

static int first_row(int seq)
{
    int row = 0;

    for (int i = 0; i < seq; i++)
        row += length_of(i);
    return row;
}

static void *int32s(int n)
{
    return mem_alloc((size_t)n * sizeof(int32_t));
}

/* kv and index have ids of their own. */
static void place_rows(struct story *t, struct test_random *r)
{
    int32_t *kv_ids = int32s(t->pool_blocks), *index_ids = int32s(t->pool_blocks);
    int used = 0;

    random_order(r, kv_ids, t->pool_blocks);
    random_order(r, index_ids, t->pool_blocks);
    for (int seq = 0; seq < N_SEQS; seq++) {
        for (int p = 0; p < length_of(seq); p++) {
            int row = first_row(seq) + p;
            t->positions[row] = p;
            t->kv_block[row] = kv_ids[used + p / BLOCK_TOKENS];
            t->index_block[row] = index_ids[used + p / BLOCK_TOKENS];
        }
        used += blocks_of(length_of(seq));
    }
    mem_free(kv_ids);
    mem_free(index_ids);
}

static void make_parameters(struct story *t, struct test_random *r)
{
    const struct setup *s = &t->s;
    int dim = s->shape.head_dim;

    t->cos_sin = mem_alloc((size_t)(t->rows * dim) * sizeof(float));
    for (int row = 0; row < t->rows; row++)
        for (int i = 0; i < dim / 2; i++) {
            double angle = (double)random_uniform(r) * 4;
            t->cos_sin[row * dim + i] = (float)cos(angle);
            t->cos_sin[row * dim + dim / 2 + i] = (float)sin(angle);
        }
    if (s->norm) {
        enum dtype type = s->norm == 1 ? DTYPE_BF16 : DTYPE_F32;
        t->q_norm = random_weights(r, (size_t)dim, type, 1);
        t->k_norm = random_weights(r, (size_t)dim, type, 1);
    }
    if (s->shape.index == INDEX_CHANNELS) {
        t->channels = mem_alloc((size_t)s->shape.kv_heads * INDEX_CHANNELS_KEPT *
                                sizeof *t->channels);
        random_channels(r, t->channels, &s->shape);
    }
}

static struct story *make_story(const struct setup *s, uint64_t seed)
{
    static const char *const norms[] = { "no", "bf16", "f32" };
    static const char *const filters[] = { "bounds", "coarse", "means" };
    struct story *t = mem_calloc(1, sizeof *t);
    struct test_random r = test_random(seed);

    t->s = *s;
    t->heads = s->shape.kv_heads * s->group;
    t->rows = first_row(N_SEQS);
    t->q_dim = t->heads * s->shape.head_dim;
    t->kv_dim = s->shape.kv_heads * s->shape.head_dim;
    t->pool_blocks = SPARE_BLOCKS;
    for (int i = 0; i < N_SEQS; i++)
        t->pool_blocks += blocks_of(length_of(i));
    t->kv_bytes = (size_t)t->pool_blocks * kv_block_bytes(&s->shape);
    t->index_bytes = (size_t)t->pool_blocks * index_block_bytes(&s->shape);
    t->q = random_acts(&r, (size_t)t->rows * (size_t)t->q_dim, 2);
    t->k = random_acts(&r, (size_t)t->rows * (size_t)t->kv_dim, 2);
    t->v = random_acts(&r, (size_t)t->rows * (size_t)t->kv_dim, 2);
    t->positions = int32s(t->rows);
    t->kv_block = int32s(t->rows);
    t->index_block = int32s(t->rows);
    place_rows(t, &r);
    make_parameters(t, &r);
    snprintf(t->shape, sizeof t->shape, "rope_store: heads %d on %d of %d, %s, %s, %s norm, %s",
             t->heads, s->shape.kv_heads, s->shape.head_dim,
             filters[s->shape.filter],
             s->shape.index == INDEX_ROTATED ? "rotated" : "channels", norms[s->norm],
             s->joined ? "joined" : "apart");
    return t;
}

static void free_story(struct story *t)
{
    mem_free(t->q);
    mem_free(t->k);
    mem_free(t->v);
    mem_free(t->cos_sin);
    mem_free(t->positions);
    mem_free(t->kv_block);
    mem_free(t->index_block);
    mem_free(t->channels);
    mem_free(t->q_norm);
    mem_free(t->k_norm);
    mem_free(t);
}

static struct stored make_stored(const struct story *t)
{
    struct stored d = {
        .kv = mem_alloc(t->kv_bytes),
        .index = mem_alloc(t->index_bytes),
        .q = mem_calloc((size_t)t->rows * (size_t)t->q_dim, sizeof(float)),
    };

    memset(d.kv, 0xff, t->kv_bytes);
    memset(d.index, 0xff, t->index_bytes);
    return d;
}

static void free_stored(struct stored *d)
{
    mem_free(d->kv);
    mem_free(d->index);
    mem_free(d->q);
}

/* ---- one call */

static struct place place_of(const struct story *t, int n)
{
    struct place p = { .q_stride = t->q_dim + 8, .k_stride = t->kv_dim + 16,
                       .v_stride = t->kv_dim + 24 };

    if (t->s.joined) {
        p.q_stride = p.k_stride = p.v_stride = t->q_dim + 2 * t->kv_dim + 8;
        p.k = (size_t)t->q_dim;
        p.v = p.k + (size_t)t->kv_dim;
        p.total = (size_t)n * (size_t)p.q_stride;
        return p;
    }
    p.k = (size_t)n * (size_t)p.q_stride;
    p.v = p.k + (size_t)n * (size_t)p.k_stride;
    p.total = p.v + (size_t)n * (size_t)p.v_stride;
    return p;
}

/* Rows picked out of the story, NO_ROW for padding.  What is not copied here, between the
 * rows and in the rows of padding, is NaN. */
struct batch {
    const int *picked;
    int n;
    struct place at;
    float *x;                    /* q, k and v */
    bf16 *bits;                  /* the same for the GPU; 0xffff for NaN */
    float *cos_sin;
    int32_t *positions, *kv_block, *index_block;
};

static void put_row(struct batch *b, size_t at, const float *from, int n)
{
    memcpy(b->x + at, from, (size_t)n * sizeof *b->x);
    for (int i = 0; i < n; i++)
        b->bits[at + (size_t)i] = float_to_bf16(from[i]);
}

static struct batch gather(const struct story *t, const int *picked, int n)
{
    int dim = t->s.shape.head_dim;
    struct batch b = { .picked = picked, .n = n, .at = place_of(t, n) };

    b.x = mem_alloc(b.at.total * sizeof *b.x);
    b.bits = mem_alloc(b.at.total * sizeof *b.bits);
    b.cos_sin = mem_alloc((size_t)(n * dim) * sizeof *b.cos_sin);
    b.positions = int32s(n);
    b.kv_block = int32s(n);
    b.index_block = int32s(n);
    memset(b.x, 0xff, b.at.total * sizeof *b.x);
    memset(b.bits, 0xff, b.at.total * sizeof *b.bits);
    memset(b.cos_sin, 0xff, (size_t)(n * dim) * sizeof *b.cos_sin);
    for (int i = 0; i < n; i++) {
        int row = picked[i];
        b.positions[i] = 0;
        b.kv_block[i] = b.index_block[i] = -1;
        if (row == NO_ROW)
            continue;
        put_row(&b, b.at.q + (size_t)i * (size_t)b.at.q_stride, t->q + row * t->q_dim,
                t->q_dim);
        put_row(&b, b.at.k + (size_t)i * (size_t)b.at.k_stride, t->k + row * t->kv_dim,
                t->kv_dim);
        put_row(&b, b.at.v + (size_t)i * (size_t)b.at.v_stride, t->v + row * t->kv_dim,
                t->kv_dim);
        memcpy(b.cos_sin + i * dim, t->cos_sin + row * dim, (size_t)dim * sizeof *b.cos_sin);
        b.positions[i] = t->positions[row];
        b.kv_block[i] = t->kv_block[row];
        b.index_block[i] = t->index_block[row];
    }
    return b;
}

static void free_batch(struct batch *b)
{
    mem_free(b->x);
    mem_free(b->bits);
    mem_free(b->cos_sin);
    mem_free(b->positions);
    mem_free(b->kv_block);
    mem_free(b->index_block);
}

/* Without addresses. */
static struct rope_store_args arguments(const struct story *t, const struct batch *b)
{
    return (struct rope_store_args){
        .qkv_stride_q = b->at.q_stride, .qkv_stride_k = b->at.k_stride,
        .qkv_stride_v = b->at.v_stride, .norm_type = t->s.norm == 2 ? DTYPE_F32 : DTYPE_BF16,
        .shape = t->s.shape, .rows = b->n, .heads = t->heads, .eps = 1e-6f };
}

static void run_cpu(const struct story *t, const struct batch *b, struct stored *d)
{
    struct stream *stream = stream_create(test_backend("auto"));
    struct rope_store_args a = arguments(t, b);

    a.q = b->x + b->at.q;
    a.k = b->x + b->at.k;
    a.v = b->x + b->at.v;
    a.q_norm = t->q_norm;
    a.k_norm = t->k_norm;
    a.cos_sin = b->cos_sin;
    a.positions = b->positions;
    a.kv_block = b->kv_block;
    a.index_block = b->index_block;
    a.kv = d->kv;
    a.index = d->index;
    a.channels = t->channels;
    backend_ops(test_backend("auto"))->rope_store(stream, &a);
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    for (int i = 0; i < b->n; i++)
        if (b->picked[i] != NO_ROW)
            memcpy(d->q + b->picked[i] * t->q_dim, b->x + b->at.q + i * b->at.q_stride,
                   (size_t)t->q_dim * sizeof *d->q);
}

/* Queries of the batch go to their rows of d; of all else in the buffer no bit may have
 * changed, except queries of padding. */
static void take_queries(const struct story *t, struct batch *b, const bf16 *got,
                         struct stored *d)
{
    for (int i = 0; i < b->n; i++) {
        size_t at = b->at.q + (size_t)i * (size_t)b->at.q_stride;
        for (int k = 0; k < t->q_dim; k++) {
            if (b->picked[i] != NO_ROW)
                d->q[b->picked[i] * t->q_dim + k] = bf16_to_float(got[at + (size_t)k]);
            b->bits[at + (size_t)k] = got[at + (size_t)k];
        }
    }
    for (size_t i = 0; i < b->at.total; i++)
        if (got[i] != b->bits[i])
            ck_abort_msg("%s: %d rows: element %zu of q, k and v, which is not of q, was %04x "
                         "and is %04x", t->shape, b->n, i, b->bits[i], got[i]);
}

static void run_gpu(const struct story *t, struct batch *b, const struct device *gpu,
                    struct stored *d)
{
    size_t n = (size_t)b->n, bytes = b->at.total * sizeof *b->bits;
    struct rope_store_args a = arguments(t, b);
    bf16 *x = gpu_put(b->bits, bytes), *got = mem_alloc(bytes);

    a.q = x + b->at.q;
    a.k = x + b->at.k;
    a.v = x + b->at.v;
    a.q_norm = gpu->q_norm;
    a.k_norm = gpu->k_norm;
    a.cos_sin = gpu_put(b->cos_sin, n * (size_t)t->s.shape.head_dim * sizeof *b->cos_sin);
    a.positions = gpu_put(b->positions, n * sizeof *b->positions);
    a.kv_block = gpu_put(b->kv_block, n * sizeof *b->kv_block);
    a.index_block = gpu_put(b->index_block, n * sizeof *b->index_block);
    a.kv = gpu->kv;
    a.index = gpu->index;
    a.channels = gpu->channels;
    gpu_ops()->rope_store(gpu_stream(), &a);
    gpu_get(got, x, bytes);
    take_queries(t, b, got, d);
    mem_free(got);
}

/* ---- all calls */

/* The rows of one call: up to chunk[seq] of each sequence, as far as limit[seq], from
 * next[seq] on, with padding between them.  0 where there are none. */
static int plan_step(const int *limit, const int *chunk, int *next, int *picked)
{
    int n = 0, rows = 0;

    for (int seq = 0; seq < N_SEQS; seq++) {
        for (int i = 0; i < chunk[seq] && next[seq] < limit[seq]; i++) {
            picked[n++] = first_row(seq) + next[seq]++;
            rows++;
        }
        for (int i = 0; seq % 2 && i < PADDING; i++)
            picked[n++] = NO_ROW;
    }
    return rows ? n : 0;
}

static struct device put_device(const struct story *t)
{
    int dim = t->s.shape.head_dim;
    enum dtype type = t->s.norm == 2 ? DTYPE_F32 : DTYPE_BF16;
    struct device gpu = { .kv = gpu_put(NULL, t->kv_bytes),
                          .index = gpu_put(NULL, t->index_bytes) };

    if (t->channels)
        gpu.channels = gpu_put(t->channels, (size_t)t->s.shape.kv_heads * INDEX_CHANNELS_KEPT *
                                                sizeof *t->channels);
    if (t->q_norm) {
        gpu.q_norm = gpu_put_weights(t->q_norm, (size_t)dim, type, t->s.joined);
        gpu.k_norm = gpu_put_weights(t->k_norm, (size_t)dim, type, t->s.joined);
    }
    return gpu;
}

/* Store everything on both: what is prefilled in chunks, what is left one by one. */
static void store_all(const struct story *t, struct stored *cpu, struct stored *gpu)
{
    static const int one[N_SEQS] = { 1, 1, 1, 1, 1, 1 };
    int *picked = mem_alloc((size_t)(t->rows + N_SEQS * PADDING) * sizeof *picked);
    int next[N_SEQS] = { 0 }, all[N_SEQS], steps = 0;
    struct device device = put_device(t);

    for (int seq = 0; seq < N_SEQS; seq++)
        all[seq] = length_of(seq);
    for (;;) {
        int n = plan_step(prefilled, t->s.chunk, next, picked);
        if (n == 0)
            n = plan_step(all, one, next, picked);
        if (n == 0)
            break;
        ck_assert_int_le(++steps, MAX_STEPS);
        struct batch b = gather(t, picked, n);
        run_gpu(t, &b, &device, gpu);
        run_cpu(t, &b, cpu);
        free_batch(&b);
    }
    gpu_get(gpu->kv, device.kv, t->kv_bytes);
    gpu_get(gpu->index, device.index, t->index_bytes);
    gpu_forget();
    mem_free(picked);
}

/* ---- comparing */

/* Elements in kv of a row's token: K, then V. */
static size_t token_at(const struct story *t, int row, int kv_head)
{
    size_t token = (size_t)(t->positions[row] % BLOCK_TOKENS);
    size_t head = (size_t)t->kv_block[row] * (size_t)t->s.shape.kv_heads + (size_t)kv_head;

    return (head * BLOCK_TOKENS + token) * 2 * (size_t)t->s.shape.head_dim;
}

/* Bytes in index of the record of a row's block. */
static size_t record_at(const struct story *t, int row, int kv_head)
{
    size_t bytes = (size_t)index_layout(&t->s.shape).record_bytes;
    size_t head = (size_t)t->index_block[row] * (size_t)t->s.shape.kv_heads + (size_t)kv_head;

    return head * bytes;
}

static void describe(char *text, size_t n, const struct story *t, const char *what, int row,
                     int head)
{
    snprintf(text, n, "%s: %s of token %d (position %d), head %d", t->shape, what, row,
             t->positions[row], head);
}

static void compare_queries(const struct story *t, const struct stored *gpu,
                            const struct stored *cpu)
{
    size_t dim = (size_t)t->s.shape.head_dim;
    char text[240];

    for (int row = 0; row < t->rows; row++)
        for (int head = 0; head < t->heads; head++) {
            size_t at = ((size_t)row * (size_t)t->heads + (size_t)head) * dim;
            describe(text, sizeof text, t, "q", row, head);
            assert_rows_near(text, &(struct row_pair){
                .got = gpu->q + at, .want = cpu->q + at, .rows = 1, .dim = dim,
                .tolerance = 1e-5 + ACT_ROUNDING });
        }
}

/* Keys before they are rounded, [rows, kv_dim], the caller frees: the CPU stores none of
 * them, but takes them for queries. */
static float *unrounded_keys(const struct story *t)
{
    struct stream *stream = stream_create(test_backend("auto"));
    size_t n = (size_t)t->rows * (size_t)t->kv_dim;
    float *keys = mem_alloc(n * sizeof *keys);
    int32_t *none = int32s(t->rows);

    memcpy(keys, t->k, n * sizeof *keys);
    for (int i = 0; i < t->rows; i++)
        none[i] = -1;
    backend_ops(test_backend("auto"))->rope_store(stream, &(struct rope_store_args){
        .q = keys, .k = t->k, .v = t->v, .qkv_stride_q = t->kv_dim, .qkv_stride_k = t->kv_dim,
        .qkv_stride_v = t->kv_dim, .q_norm = t->k_norm, .k_norm = t->k_norm,
        .norm_type = t->s.norm == 2 ? DTYPE_F32 : DTYPE_BF16, .cos_sin = t->cos_sin,
        .positions = t->positions, .kv_block = none, .index_block = none,
        .channels = t->channels, .shape = t->s.shape, .rows = t->rows,
        .heads = t->s.shape.kv_heads, .eps = 1e-6f });
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    mem_free(none);
    return keys;
}

/* Values are act already, so that they are stored as they are. */
static void compare_keys_and_values(const struct story *t, const struct stored *gpu,
                                    const struct stored *cpu)
{
    size_t dim = (size_t)t->s.shape.head_dim;
    float got[MAX_DIM], *keys = unrounded_keys(t);
    char text[240];

    for (int row = 0; row < t->rows; row++)
        for (int head = 0; head < t->s.shape.kv_heads; head++) {
            size_t at = token_at(t, row, head);
            for (size_t i = 0; i < dim; i++)
                got[i] = bf16_to_float(gpu->kv[at + i]);
            describe(text, sizeof text, t, "K", row, head);
            assert_rows_near(text, &(struct row_pair){
                .got = got, .want = keys + row * t->kv_dim + head * (int)dim, .rows = 1,
                .dim = dim, .tolerance = 1e-5 + ACT_ROUNDING });
            describe(text, sizeof text, t, "V", row, head);
            assert_same_bits(text, gpu->kv + at + dim, cpu->kv + at + dim, 1, dim);
        }
    mem_free(keys);
}

/* Whatever the CPU left as it was, the GPU must leave so too. */
static void compare_untouched(const struct story *t, const struct stored *gpu,
                              const struct stored *cpu)
{
    size_t block = kv_block_bytes(&t->s.shape) / sizeof *gpu->kv;
    size_t record = index_block_bytes(&t->s.shape);
    char text[240];

    for (size_t i = 0; i < t->kv_bytes / sizeof *gpu->kv; i++)
        if (cpu->kv[i] == 0xffff && gpu->kv[i] != 0xffff)
            ck_abort_msg("%s: element %zu of block %zu of kv is %04x but belongs to no token",
                         t->shape, i % block, i / block, gpu->kv[i]);
    for (int b = 0; b < t->pool_blocks; b++) {
        bool named = false;
        for (int row = 0; row < t->rows; row++)
            named = named || t->index_block[row] == b;
        if (named)
            continue;
        snprintf(text, sizeof text, "%s: index of block %d that no row names", t->shape, b);
        assert_unwritten(text, gpu->index + (size_t)b * record, record);
    }
}

/* The index of the keys as the GPU stored them: stored once more by the CPU, without norm
 * and rotation. */
static uint8_t *index_of_keys(const struct story *t, const struct stored *gpu)
{
    int dim = t->s.shape.head_dim;
    struct stream *stream = stream_create(test_backend("auto"));
    float *q = mem_calloc((size_t)t->rows * (size_t)t->q_dim, sizeof *q);
    float *k = mem_alloc((size_t)t->rows * (size_t)t->kv_dim * sizeof *k);
    float *cos_sin = mem_alloc((size_t)(t->rows * dim) * sizeof *cos_sin);
    bf16 *kv = mem_alloc(t->kv_bytes);
    uint8_t *index = mem_alloc(t->index_bytes);

    memset(index, 0xff, t->index_bytes);
    for (int row = 0; row < t->rows; row++) {
        for (int i = 0; i < t->kv_dim; i++)
            k[row * t->kv_dim + i] =
                bf16_to_float(gpu->kv[token_at(t, row, i / dim) + (size_t)(i % dim)]);
        for (int d = 0; d < dim; d++)
            cos_sin[row * dim + d] = d < dim / 2;
    }
    backend_ops(test_backend("auto"))->rope_store(stream, &(struct rope_store_args){
        .q = q, .k = k, .v = k, .qkv_stride_q = t->q_dim, .qkv_stride_k = t->kv_dim,
        .qkv_stride_v = t->kv_dim, .cos_sin = cos_sin, .positions = t->positions,
        .kv_block = t->kv_block, .index_block = t->index_block, .kv = kv, .index = index,
        .channels = t->channels, .shape = t->s.shape, .rows = t->rows, .heads = t->heads,
        .eps = 1e-6f });
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    for (int row = 0; row < t->rows; row++)
        for (int head = 0; head < t->s.shape.kv_heads; head++) {
            size_t at = token_at(t, row, head);
            assert_same_bits("keys stored once more", kv + at, gpu->kv + at, 1, (size_t)dim);
        }
    mem_free(q);
    mem_free(k);
    mem_free(cos_sin);
    mem_free(kv);
    return index;
}

struct part {
    const char *name;
    int at, bytes;               /* in the record; at -1: absent */
};

/* Whether all tokens of a row's block are stored. */
static bool in_full_block(const struct story *t, int row)
{
    int last = row - t->positions[row] % BLOCK_TOKENS + BLOCK_TOKENS - 1;

    return last < t->rows && t->index_block[last] == t->index_block[row];
}

static void compare_parts(const struct story *t, const uint8_t *got, const uint8_t *want,
                          int row, int head)
{
    enum { KEPT = INDEX_CHANNELS_KEPT, N_PARTS = 11 };
    const struct index_layout l = index_layout(&t->s.shape);
    int dim = t->s.shape.head_dim, token = t->positions[row] % BLOCK_TOKENS;
    int mean = token / MEAN_TOKENS;
    bool has_means = l.mean_scale >= 0 && in_full_block(t, row);
    const struct part parts[N_PARTS] = {
        { "lo", l.lo, 2 * dim },
        { "hi", l.hi, 2 * dim },
        { "mean_scale", has_means ? l.mean_scale + 2 * mean : -1, 2 },
        { "mean_sign", has_means ? l.mean_sign + mean * dim / 8 : -1, dim / 8 },
        { "sign", l.sign < 0 ? -1 : l.sign + token * dim / 8, dim / 8 },
        { "large", l.large < 0 ? -1 : l.large + token * dim / 8, dim / 8 },
        { "scale", l.scale < 0 ? -1 : l.scale + 2 * token, 2 },
        { "coarse", l.coarse < 0 ? -1 : l.coarse + token * KEPT / 4, KEPT / 4 },
        { "fine", l.fine < 0 ? -1 : l.fine + token * KEPT / 2, KEPT / 2 },
        { "scale2", l.scale2 < 0 ? -1 : l.scale2 + 2 * token, 2 },
        { "scale4", l.scale4 < 0 ? -1 : l.scale4 + 2 * token, 2 },
    };

    for (int p = 0; p < N_PARTS; p++)
        for (int i = 0; parts[p].at >= 0 && i < parts[p].bytes; i++) {
            int at = parts[p].at + i;
            if (got[at] != want[at])
                ck_abort_msg("%s: token %d (position %d), KV head %d: byte %d of %s is %02x, "
                             "not %02x", t->shape, row, t->positions[row], head, i,
                             parts[p].name, got[at], want[at]);
        }
}

static void compare_index(const struct story *t, const struct stored *gpu)
{
    uint8_t *want = index_of_keys(t, gpu);

    for (int row = 0; row < t->rows; row++)
        for (int head = 0; head < t->s.shape.kv_heads; head++) {
            size_t at = record_at(t, row, head);
            compare_parts(t, gpu->index + at, want + at, row, head);
        }
    mem_free(want);
}

static void compare(const struct setup *s, uint64_t seed)
{
    struct story *t = make_story(s, seed);
    struct stored cpu = make_stored(t), gpu = make_stored(t);

    store_all(t, &cpu, &gpu);
    compare_queries(t, &gpu, &cpu);
    compare_keys_and_values(t, &gpu, &cpu);
    compare_untouched(t, &gpu, &cpu);
    compare_index(t, &gpu);
    free_stored(&cpu);
    free_stored(&gpu);
    free_story(t);
}

/* ---- tests */

static const int chunkings[][N_SEQS] = {
    { 300, 300, 300, 300, 300, 300 }, { 17, 17, 17, 17, 17, 17 }, { 64, 64, 64, 64, 64, 64 },
    { 65, 65, 65, 65, 65, 65 },       { 1, 13, 64, 100, 5, 40 },  { 63, 30, 63, 63, 7, 63 },
    { 1, 58, 30, 33, 50, 90 },
};
enum { N_CHUNKINGS = 7, MEANS = 4, N_KINDS = 5 };

static struct setup setup_of(int kv_heads, int group, int head_dim, int kind, int round)
{
    struct setup s = {
        .shape = { .kv_heads = kv_heads, .head_dim = head_dim,
                   .filter = kind == MEANS ? FILTER_MEANS
                             : kind & 1 ? FILTER_BOUNDS : FILTER_COARSE,
                   .index = kind & 2 ? INDEX_CHANNELS : INDEX_ROTATED },
        .group = group, .norm = round % 3, .joined = round / 3 % 2 == 0,
    };

    memcpy(s.chunk, chunkings[round % 2 ? 6 : 0], sizeof s.chunk);
    return s;
}

static const struct { int kv_heads, group; } head_counts[] = {
    { 1, 1 }, { 2, 1 }, { 8, 1 }, { 1, 3 }, { 2, 3 }, { 8, 3 }, { 1, 4 }, { 2, 4 },
    { 8, 4 }, { 1, 7 }, { 2, 7 }, { 1, 8 }, { 2, 8 }, { 8, 8 },
};
enum { N_HEAD_COUNTS = sizeof head_counts / sizeof head_counts[0] };

START_TEST(shapes_equal_cpu)
{
    int kind = _i % N_KINDS, heads = _i / N_KINDS;

    if (!gpu_backend())
        return;
    for (int dim = 64; dim <= 128; dim *= 2) {
        struct setup s = setup_of(head_counts[heads].kv_heads, head_counts[heads].group, dim,
                                  kind, heads + kind + dim / 128);
        compare(&s, 1 + (uint64_t)_i);
    }
}
END_TEST

START_TEST(chunks_equal_cpu)
{
    int kind = _i % N_KINDS, chunking = _i / N_KINDS;

    if (!gpu_backend())
        return;
    for (int dim = 64; dim <= 128; dim *= 2)
        for (int round = 0; round < 6; round += dim == 64 ? 1 : 4) {
            struct setup s = setup_of(2, 3, dim, kind, round);
            memcpy(s.chunk, chunkings[chunking], sizeof s.chunk);
            compare(&s, 100 + (uint64_t)_i);
        }
}
END_TEST

/* Calls of nothing but padding change nothing. */
START_TEST(padding_stores_nothing)
{
    static const int picked[] = { NO_ROW, NO_ROW, NO_ROW, NO_ROW, NO_ROW };
    struct setup s = setup_of(2, 4, 128, _i, 1);

    if (!gpu_backend())
        return;
    for (int n = 1; n <= 5; n += 4) {
        struct story *t = make_story(&s, 200);
        struct stored gpu = make_stored(t);
        struct device device = put_device(t);
        struct batch b = gather(t, picked, n);
        run_gpu(t, &b, &device, &gpu);
        gpu_get(gpu.kv, device.kv, t->kv_bytes);
        gpu_get(gpu.index, device.index, t->index_bytes);
        assert_unwritten("kv, by padding", gpu.kv, t->kv_bytes);
        assert_unwritten("index, by padding", gpu.index, t->index_bytes);
        gpu_forget();
        free_batch(&b);
        free_stored(&gpu);
        free_story(t);
    }
}
END_TEST

/* The same tokens in other chunks: the same bytes, queries and all. */
START_TEST(chunks_do_not_change_a_bit)
{
    struct setup s = setup_of(2, 4, 128, _i, 1);
    struct stored first = { 0 };

    if (!gpu_backend())
        return;
    for (int c = 0; c < N_CHUNKINGS; c++) {
        memcpy(s.chunk, chunkings[c], sizeof s.chunk);
        struct story *t = make_story(&s, 300);
        struct stored cpu = make_stored(t), gpu = make_stored(t);
        store_all(t, &cpu, &gpu);
        free_stored(&cpu);
        if (c == 0) {
            first = gpu;
            free_story(t);
            continue;
        }
        ck_assert_msg(memcmp(gpu.kv, first.kv, t->kv_bytes) == 0, "%s: kv, chunks %d",
                      t->shape, c);
        ck_assert_msg(memcmp(gpu.q, first.q,
                             (size_t)t->rows * (size_t)t->q_dim * sizeof *gpu.q) == 0,
                      "%s: q, chunks %d", t->shape, c);
        for (int row = 0; row < t->rows; row++)
            for (int head = 0; head < s.shape.kv_heads; head++) {
                size_t at = record_at(t, row, head);
                compare_parts(t, gpu.index + at, first.index + at, row, head);
            }
        free_stored(&gpu);
        free_story(t);
    }
    free_stored(&first);
}
END_TEST

/* Zero keys have scales and codes of 0; keys of one channel, and very small and large
 * ones, meet the borders of the codes. */
START_TEST(magnitudes_equal_cpu)
{
    if (!gpu_backend())
        return;
    for (int dim = 64; dim <= 128; dim *= 2) {
        struct setup s = setup_of(2, 1, dim, _i, 0);
        struct story *t = make_story(&s, 400);
        struct test_random r = test_random(401);
        struct stored cpu = make_stored(t), gpu = make_stored(t);
        for (int i = 0; i < t->rows * dim; i++)
            t->cos_sin[i] = i % dim < dim / 2;
        for (int row = 0; row < t->rows; row++) {
            float *k = t->k + row * t->kv_dim;
            float factor = powf(10, (float)(random_below(&r, 36) - 18));
            for (int i = 0; i < t->kv_dim; i++) {
                if (row % 4 == 0)
                    k[i] = 0;
                else if (row % 4 == 1)
                    k[i] = i % dim == row % dim ? factor : 0;
                else
                    k[i] *= row % 4 == 2 ? factor : powf(10, (float)random_below(&r, 10) - 5);
            }
        }
        round_to_bf16(t->k, (size_t)t->rows * (size_t)t->kv_dim);
        store_all(t, &cpu, &gpu);
        compare_keys_and_values(t, &gpu, &cpu);
        compare_index(t, &gpu);
        free_stored(&cpu);
        free_stored(&gpu);
        free_story(t);
    }
}
END_TEST

TCase *gpu_rope_store_case(void)
{
    TCase *c = tcase_create("gpu_rope_store");

    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, gpu_clean, NULL);
    tcase_add_loop_test(c, shapes_equal_cpu, 0, N_HEAD_COUNTS * N_KINDS);
    tcase_add_loop_test(c, chunks_equal_cpu, 0, N_CHUNKINGS * N_KINDS);
    tcase_add_loop_test(c, padding_stores_nothing, 0, N_KINDS);
    tcase_add_loop_test(c, chunks_do_not_change_a_bit, 0, N_KINDS);
    tcase_add_loop_test(c, magnitudes_equal_cpu, 0, N_KINDS);
    return c;
}
