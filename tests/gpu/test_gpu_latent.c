/* What latent attention has of its own, on the GPU against the CPU back end: products for each
 * head, rows and their index, and full attention.  Both levels of the selection are with those of
 * other shapes in test_gpu_two_level.c, test_gpu_hot_rows.c and test_gpu_lagged.c. */

#include "engine/base/mem.h"
#include "kernels/cpu/cpu.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/gpu_compare.h"
#include "tests/support/gpu_fixture.h"
#include "tests/support/index_reference.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/token_store.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { LATENT = 512, ROPE = LATENT_ROW - LATENT, MAX_SEQS = 12 };

static const struct backend_ops *cpu_ops(void)
{
    return backend_ops(test_backend("auto"));
}

/* ---- products for each head */

struct heads_setup { int rows, heads, in_dim, out_dim, gap; bool turned; enum dtype type; };

/* Heads lie in x and out as q and attention have them: with gaps behind each head and row. */
static void compare_heads(const struct heads_setup *s, uint64_t seed)
{
    struct test_random r = test_random(seed);
    const int x_head = s->in_dim + s->gap, x_row = s->heads * x_head + s->gap;
    const int out_head = s->out_dim + s->gap, out_row = s->heads * out_head + s->gap;
    const size_t stride = (size_t)(s->in_dim * s->out_dim + 2 * s->gap);
    const size_t n_x = (size_t)(s->rows * x_row), n_out = (size_t)(s->rows * out_row);
    const size_t n_w = (size_t)s->heads * stride;
    float *x = random_acts(&r, n_x, 1), *want = mem_calloc(n_out, sizeof *want);
    void *w = random_weights(&r, n_w, s->type, 1 / sqrtf((float)s->in_dim));
    bf16 *got = mem_alloc(n_out * sizeof *got);
    struct stream *stream = stream_create(test_backend("auto"));
    struct linear_heads_args a = {
        .out = want, .x = x, .weight = w, .weight_type = s->type, .turned = s->turned,
        .rows = s->rows, .heads = s->heads, .in_dim = s->in_dim, .out_dim = s->out_dim,
        .out_stride = out_row, .out_head_stride = out_head, .x_stride = x_row,
        .x_head_stride = x_head, .weight_stride = stride };
    char text[160];

    cpu_ops()->linear_heads(stream, &a);
    stream_destroy(stream);
    void *device = gpu_put(NULL, n_out * sizeof *got);
    a.out = device;
    a.x = gpu_put_act(x, n_x);
    a.weight = gpu_put_weights(w, n_w, s->type, 1);
    gpu_ops()->linear_heads(gpu_stream(), &a);
    gpu_get(got, device, n_out * sizeof *got);
    float *wide = widened(got, n_out);
    snprintf(text, sizeof text, "%d rows, %d heads, %d to %d%s", s->rows, s->heads, s->in_dim,
             s->out_dim, s->turned ? ", turned" : "");
    for (int row = 0; row < s->rows; row++)
        for (int head = 0; head < s->heads; head++) {
            size_t at = (size_t)(row * out_row + head * out_head);
            assert_rows_near(text, &(struct row_pair){
                .got = wide + at, .want = want + at, .rows = 1, .dim = (size_t)s->out_dim,
                .tolerance = 1e-5 * sqrt(s->in_dim) + ACT_ROUNDING });
            assert_unwritten(text, got + at + s->out_dim, (size_t)s->gap * sizeof *got);
        }
    mem_free(x);
    mem_free(w);
    mem_free(want);
    mem_free(got);
    mem_free(wide);
    gpu_forget();
}

START_TEST(products_equal_cpu)
{
    static const int rows[] = { 1, 2, 8, 15, 16, 17, 64, 65, 200 };
    static const int dims[][2] = { { 192, 512 }, { 512, 256 }, { 32, 512 }, { 512, 32 },
                                   { 40, 72 }, { 8, 8 }, { 200, 136 } };

    if (!gpu_backend())
        return;
    for (size_t i = 0; i < sizeof dims / sizeof dims[0]; i++)
        for (int turned = 0; turned < 2; turned++)
            compare_heads(&(struct heads_setup){
                .rows = rows[_i], .heads = i % 2 ? 5 : 20, .in_dim = dims[i][0],
                .out_dim = dims[i][1], .gap = i % 3 ? 8 : 0, .turned = turned,
                .type = i == 4 ? DTYPE_F32 : DTYPE_BF16 }, 1 + (uint64_t)_i);
}
END_TEST

/* ---- rows and their index */

/* kind: as of test_kv_shape().  chunk: rows of a call to the GPU. */
struct store_setup { int rows, heads, from, kind, chunk; bool interleaved; };

struct store {
    struct store_setup s;
    struct kv_shape shape;
    int n_blocks;
    size_t pool_bytes, index_bytes, n_q, n_kv;
    float *q, *kv, *norm, *cos_sin, *cpu_q;
    bf16 *pool, *gpu_pool, *gpu_q;
    uint8_t *index, *gpu_index;
    int32_t *positions, *blocks;
};

static void make_store(struct store *t, const struct store_setup *s, uint64_t seed)
{
    struct test_random r = test_random(seed);

    memset(t, 0, sizeof *t);
    t->s = *s;
    t->shape = test_kv_shape(1, LATENT_ROW, s->kind);
    t->n_blocks = (s->from + s->rows) / BLOCK_TOKENS + 2;
    t->pool_bytes = (size_t)t->n_blocks * kv_block_bytes(&t->shape);
    t->index_bytes = (size_t)t->n_blocks * index_block_bytes(&t->shape);
    t->n_q = (size_t)(s->rows * s->heads * LATENT_ROW);
    t->n_kv = (size_t)(s->rows * (LATENT_ROW + 16));
    t->q = random_acts(&r, t->n_q, 1);
    t->cpu_q = mem_alloc(t->n_q * sizeof *t->cpu_q);
    memcpy(t->cpu_q, t->q, t->n_q * sizeof *t->q);
    t->kv = random_acts(&r, t->n_kv, 3);
    t->norm = random_acts(&r, LATENT, 1);
    t->cos_sin = mem_alloc((size_t)(s->rows * ROPE) * sizeof *t->cos_sin);
    t->positions = mem_alloc((size_t)s->rows * sizeof *t->positions);
    t->blocks = mem_alloc((size_t)s->rows * sizeof *t->blocks);
    t->pool = memset(mem_alloc(t->pool_bytes), 0xff, t->pool_bytes);
    t->gpu_pool = mem_alloc(t->pool_bytes);
    t->index = memset(mem_alloc(t->index_bytes), 0xff, t->index_bytes);
    t->gpu_index = mem_alloc(t->index_bytes);
    t->gpu_q = mem_alloc(t->n_q * sizeof *t->gpu_q);
    for (int i = 0; i < s->rows; i++) {
        t->positions[i] = s->from + i;
        /* Some rows at the end are padding; blocks go backwards. */
        bool padding = i >= s->rows - s->rows / 5;
        t->blocks[i] = padding ? -1 : t->n_blocks - 1 - t->positions[i] / BLOCK_TOKENS;
        for (int d = 0; d < ROPE / 2; d++) {
            float angle = (float)t->positions[i] * powf(1e4f, -(float)d / (ROPE / 2));
            t->cos_sin[i * ROPE + d] = cosf(angle);
            t->cos_sin[i * ROPE + ROPE / 2 + d] = sinf(angle);
        }
    }
}

static void free_store(struct store *t)
{
    void *all[] = { t->q, t->kv, t->norm, t->cos_sin, t->cpu_q, t->pool, t->gpu_pool, t->gpu_q,
                    t->index, t->gpu_index, t->positions, t->blocks };

    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        mem_free(all[i]);
    gpu_forget();
}

static struct latent_store_args store_arguments(const struct store *t)
{
    return (struct latent_store_args){
        .q_rope_stride = t->s.heads * LATENT_ROW, .q_rope_head_stride = LATENT_ROW,
        .kv_stride = LATENT_ROW + 16, .norm_type = DTYPE_F32, .shape = t->shape,
        .rows = t->s.rows, .heads = t->s.heads, .interleaved = t->s.interleaved, .eps = 1e-5f };
}

static void store_on_cpu(struct store *t)
{
    struct stream *stream = stream_create(test_backend("auto"));
    struct latent_store_args a = store_arguments(t);

    a.q = t->cpu_q;
    a.q_rope = t->q;             /* the first ROPE values of each head serve as its rope part */
    a.kv = t->kv;
    a.norm = t->norm;
    a.cos_sin = t->cos_sin;
    a.positions = t->positions;
    a.kv_block = a.index_block = t->blocks;
    a.pool = t->pool;
    a.index = t->index;
    cpu_ops()->latent_store(stream, &a);
    stream_destroy(stream);
}

static void store_on_gpu(struct store *t)
{
    struct latent_store_args a = store_arguments(t);
    size_t ints = (size_t)t->s.rows * sizeof(int32_t);
    bf16 *pool = memset(t->gpu_pool, 0xff, t->pool_bytes);

    a.q = gpu_put_act(t->q, t->n_q);
    a.q_rope = gpu_put_act(t->q, t->n_q);
    a.kv = gpu_put_act(t->kv, t->n_kv);
    a.norm = gpu_put(t->norm, LATENT * sizeof *t->norm);
    a.cos_sin = gpu_put(t->cos_sin, (size_t)(t->s.rows * ROPE) * sizeof *t->cos_sin);
    a.positions = gpu_put(t->positions, ints);
    a.kv_block = a.index_block = gpu_put(t->blocks, ints);
    a.pool = gpu_put(pool, t->pool_bytes);
    a.index = gpu_put(NULL, t->index_bytes);
    for (int row = 0; row < t->s.rows; row += t->s.chunk) {
        struct latent_store_args part = a;
        size_t at = (size_t)row, q_row = (size_t)(t->s.heads * LATENT_ROW);
        part.rows = t->s.rows - row < t->s.chunk ? t->s.rows - row : t->s.chunk;
        part.q = (bf16 *)a.q + at * q_row;
        part.q_rope = (const bf16 *)a.q_rope + at * q_row;
        part.kv = (const bf16 *)a.kv + at * (size_t)a.kv_stride;
        part.cos_sin += at * ROPE;
        part.positions += at;
        part.kv_block += at;
        part.index_block += at;
        gpu_ops()->latent_store(gpu_stream(), &part);
    }
    gpu_get(t->gpu_pool, a.pool, t->pool_bytes);
    gpu_get(t->gpu_index, a.index, t->index_bytes);
    gpu_get(t->gpu_q, a.q, t->n_q * sizeof *t->gpu_q);
}

/* Where both have stored the same row its index is the same to the bit. */
static void check_index(const struct store *t)
{
    const struct index_layout l = index_layout(&t->shape);
    const size_t record = index_block_bytes(&t->shape), block = kv_block_bytes(&t->shape);
    int n_same = 0, n_rows = 0;

    for (int i = 0; i < t->s.rows; i++) {
        int token = t->positions[i] % BLOCK_TOKENS;
        if (t->blocks[i] < 0)
            continue;
        size_t at = (size_t)t->blocks[i];
        const bf16 *cpu = t->pool + at * block / 2 + token * LATENT_ROW;
        const bf16 *gpu = t->gpu_pool + at * block / 2 + token * LATENT_ROW;
        n_rows++;
        if (memcmp(cpu, gpu, LATENT_ROW * sizeof *cpu) != 0)
            continue;            /* a value that was rounded the other way */
        n_same++;
        const uint8_t *want = t->index + at * record, *got = t->gpu_index + at * record;
        ck_assert_mem_eq(got + l.scale + 4 * token, want + l.scale + 4 * token, 4);
        ck_assert_mem_eq(got + l.sign + LATENT_ROW / 8 * token,
                         want + l.sign + LATENT_ROW / 8 * token, LATENT_ROW / 8);
        ck_assert_mem_eq(got + l.large + LATENT_ROW / 8 * token,
                         want + l.large + LATENT_ROW / 8 * token, LATENT_ROW / 8);
    }
    printf("latent store: %d of %d rows are the same to the bit\n", n_same, n_rows);
    ck_assert_int_ge(n_same * 4, n_rows);
}

/* Of full blocks the means are those of the rows stored, to the bit; how many blocks. */
static int check_means(const struct store *t)
{
    const struct index_layout l = index_layout(&t->shape);
    const size_t record = index_block_bytes(&t->shape), block = kv_block_bytes(&t->shape);
    uint8_t *want = mem_alloc(record);
    int n = 0;

    for (int first = 0; first + BLOCK_TOKENS <= t->s.rows; first++) {
        if (t->positions[first] % BLOCK_TOKENS != 0 || t->blocks[first + BLOCK_TOKENS - 1] < 0)
            continue;
        size_t at = (size_t)t->blocks[first];
        add_record_means(want, &t->shape, t->gpu_pool + at * block / 2, LATENT_ROW);
        ck_assert_mem_eq(t->gpu_index + at * record + l.mean_scale, want + l.mean_scale,
                         (size_t)(l.scale - l.mean_scale));
        n++;
    }
    mem_free(want);
    return n;
}

/* Of blocks that were begun at their first token the bounds are those of the rows stored. */
static void check_bounds(const struct store *t)
{
    const struct index_layout l = index_layout(&t->shape);

    for (int first = 0; first < t->s.rows; first++) {
        if (t->positions[first] % BLOCK_TOKENS != 0 || t->blocks[first] < 0)
            continue;
        const bf16 *rows = t->gpu_pool + (size_t)t->blocks[first] * kv_block_bytes(&t->shape) / 2;
        const uint8_t *record = t->gpu_index + (size_t)t->blocks[first] *
                                                   index_block_bytes(&t->shape);
        for (int d = 0; d < LATENT_ROW; d++) {
            float low = INFINITY, high = -INFINITY;
            for (int i = 0; i < BLOCK_TOKENS && first + i < t->s.rows && t->blocks[first + i] >= 0;
                 i++) {
                float x = bf16_to_float(rows[i * LATENT_ROW + d]);
                low = x < low ? x : low;
                high = x > high ? x : high;
            }
            ck_assert(bf16_to_float(((const bf16 *)(record + l.lo))[d]) == low);
            ck_assert(bf16_to_float(((const bf16 *)(record + l.hi))[d]) == high);
        }
    }
}

static void compare_store(const struct store_setup *s, uint64_t seed)
{
    struct store t;

    make_store(&t, s, seed);
    store_on_cpu(&t);
    store_on_gpu(&t);
    float *q = widened(t.gpu_q, t.n_q);
    assert_rows_near("queries", &(struct row_pair){
        .got = q, .want = t.cpu_q, .rows = (size_t)(s->rows * s->heads), .dim = LATENT_ROW,
        .tolerance = 1e-5 + ACT_ROUNDING });
    for (int i = 0; i < s->rows; i++) {
        if (t.blocks[i] < 0)
            continue;
        size_t at = ((size_t)t.blocks[i] * BLOCK_TOKENS +
                     (size_t)(t.positions[i] % BLOCK_TOKENS)) * LATENT_ROW;
        float *got = widened(t.gpu_pool + at, LATENT_ROW), *want = widened(t.pool + at, LATENT_ROW);
        assert_rows_near("rows", &(struct row_pair){
            .got = got, .want = want, .rows = 1, .dim = LATENT_ROW,
            .tolerance = 1e-5 + ACT_ROUNDING });
        mem_free(got);
        mem_free(want);
    }
    check_index(&t);
    if (t.shape.filter == FILTER_BOUNDS)
        check_bounds(&t);
    if (t.shape.filter == FILTER_MEANS)
        ck_assert_int_ge(check_means(&t), s->rows / 100);
    mem_free(q);
    free_store(&t);
}

START_TEST(rows_equal_cpu)
{
    static const int rows[] = { 1, 3, 64, 130, 300 };
    static const int kinds[][2] = { { 0, 300 }, { 1, 300 }, { 0, 300 }, { 1, 300 },
                                    { TEST_MEANS, 300 }, { TEST_MEANS, 13 }, { TEST_MEANS, 64 } };

    if (!gpu_backend())
        return;
    for (int i = 0; i < (int)(sizeof kinds / sizeof kinds[0]); i++)
        compare_store(&(struct store_setup){
            .rows = rows[_i], .heads = i % 2 ? 5 : 20, .from = i == 3 || i == 6 ? 40 : 64 * i,
            .kind = kinds[i][0], .chunk = kinds[i][1], .interleaved = i < 2 || i == 5 },
            20 + (uint64_t)_i);
}
END_TEST

/* ---- full attention */

struct dense_setup {
    int heads, seqs;
    int32_t n_tokens[MAX_SEQS], n_rows[MAX_SEQS];
    float scale;
};

struct dense {
    struct dense_setup s;
    struct kv_shape shape;
    int rows, max_blocks, n_blocks, most_rows, most_tokens;
    size_t n_q, n_out, kv_bytes, index_bytes;
    int32_t first_row[MAX_SEQS], *table;
    float *q, *want;
    bf16 *kv, *got;
    uint8_t *index;
};

static void make_dense(struct dense *t, const struct dense_setup *s, uint64_t seed)
{
    struct test_random r = test_random(seed);
    struct stream *stream = stream_create(test_backend("auto"));
    int used = 0;

    memset(t, 0, sizeof *t);
    t->s = *s;
    t->shape = test_kv_shape(1, LATENT_ROW, 0);
    for (int i = 0; i < s->seqs; i++) {
        int blocks = (s->n_tokens[i] + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        t->first_row[i] = t->rows;
        t->rows += s->n_rows[i] + 1; /* one that is nobody's */
        t->n_blocks += blocks;
        t->max_blocks = blocks + 2 > t->max_blocks ? blocks + 2 : t->max_blocks;
        t->most_rows = s->n_rows[i] > t->most_rows ? s->n_rows[i] : t->most_rows;
        t->most_tokens = s->n_tokens[i] > t->most_tokens ? s->n_tokens[i] : t->most_tokens;
    }
    t->n_q = (size_t)(t->rows * s->heads * LATENT_ROW);
    t->n_out = (size_t)(t->rows * s->heads * LATENT);
    t->kv_bytes = (size_t)t->n_blocks * kv_block_bytes(&t->shape);
    t->index_bytes = (size_t)t->n_blocks * index_block_bytes(&t->shape);
    t->q = random_acts(&r, t->n_q, 1);
    t->want = mem_calloc(t->n_out, sizeof *t->want);
    t->got = mem_alloc(t->n_out * sizeof *t->got);
    t->kv = memset(mem_alloc(t->kv_bytes), 0xff, t->kv_bytes);
    t->index = mem_alloc(t->index_bytes);
    t->table = mem_alloc((size_t)(s->seqs * t->max_blocks) * sizeof *t->table);
    int32_t *ids = mem_alloc((size_t)t->n_blocks * sizeof *ids);
    random_order(&r, ids, t->n_blocks);
    for (int i = 0; i < s->seqs; i++) {
        int blocks = (s->n_tokens[i] + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        for (int b = 0; b < t->max_blocks; b++)
            t->table[i * t->max_blocks + b] = b < blocks ? ids[used++] : -1;
        if (blocks > 0)
            store_random_tokens(test_backend("auto"), stream, &(struct token_store){
                .kv = t->kv, .index = t->index, .table = t->table + i * t->max_blocks,
                .shape = t->shape, .heads = s->heads, .n = s->n_tokens[i] }, &r);
    }
    stream_destroy(stream);
    mem_free(ids);
}

static void free_dense(struct dense *t)
{
    void *all[] = { t->q, t->want, t->kv, t->got, t->index, t->table };

    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        mem_free(all[i]);
    gpu_forget();
}

static struct attend_dense_args dense_arguments(const struct dense *t)
{
    return (struct attend_dense_args){
        .q_stride = t->s.heads * LATENT_ROW, .shape = t->shape, .seqs = t->s.seqs,
        .heads = t->s.heads, .max_blocks = t->max_blocks, .max_n_rows = t->most_rows,
        .max_n_tokens = t->most_tokens, .scale = t->s.scale };
}

static void dense_on_cpu(struct dense *t)
{
    struct stream *stream = stream_create(test_backend("auto"));
    struct attend_dense_args a = dense_arguments(t);

    a.out = t->want;
    a.q = t->q;
    a.kv = t->kv;
    a.table = t->table;
    a.first_row = t->first_row;
    a.n_rows = t->s.n_rows;
    a.n_tokens = t->s.n_tokens;
    a.scratch = mem_alloc(cpu_ops()->attend_dense_scratch(&t->shape, a.seqs, a.heads,
                                                          t->max_blocks) + 64);
    cpu_ops()->attend_dense(stream, &a);
    stream_destroy(stream);
    mem_free(a.scratch);
}

/* out: [rows, heads * LATENT] of sequences [from, from + n). */
static void dense_on_gpu(const struct dense *t, int from, int n, bf16 *out)
{
    struct attend_dense_args a = dense_arguments(t);
    size_t ints = (size_t)n * sizeof(int32_t);
    void *device = gpu_put(NULL, t->n_out * sizeof *out);

    a.seqs = n;
    a.out = device;
    a.q = gpu_put_act(t->q, t->n_q);
    a.kv = gpu_put(t->kv, t->kv_bytes);
    a.table = gpu_put(t->table + from * t->max_blocks,
                      (size_t)(n * t->max_blocks) * sizeof *t->table);
    a.first_row = gpu_put(t->first_row + from, ints);
    a.n_rows = gpu_put(t->s.n_rows + from, ints);
    a.n_tokens = gpu_put(t->s.n_tokens + from, ints);
    a.scratch = gpu_put(NULL, gpu_ops()->attend_dense_scratch(&t->shape, n, t->s.heads,
                                                              t->max_blocks));
    gpu_ops()->attend_dense(gpu_stream(), &a);
    gpu_get(out, device, t->n_out * sizeof *out);
}

/* Against the CPU, and each sequence alone to the bit. */
static void compare_dense(const struct dense_setup *s, const char *name, uint64_t seed)
{
    struct dense t;
    size_t row = (size_t)(s->heads * LATENT);
    char text[120];

    make_dense(&t, s, seed);
    dense_on_cpu(&t);
    dense_on_gpu(&t, 0, s->seqs, t.got);
    float *wide = widened(t.got, t.n_out);
    bf16 *alone = mem_alloc(t.n_out * sizeof *alone);
    for (int i = 0; i < s->seqs; i++) {
        size_t at = (size_t)t.first_row[i] * row, n = (size_t)s->n_rows[i];
        snprintf(text, sizeof text, "%s: %d heads, %d rows of %d tokens", name, s->heads,
                 s->n_rows[i], s->n_tokens[i]);
        assert_unwritten(text, t.got + at + n * row, row * sizeof *t.got);
        if (s->n_tokens[i] == 0)
            continue;
        assert_rows_near(text, &(struct row_pair){
            .got = wide + at, .want = t.want + at, .rows = n * (size_t)s->heads, .dim = LATENT,
            .tolerance = 1e-4 + 2 * ACT_ROUNDING });
        dense_on_gpu(&t, i, 1, alone);
        assert_same_bits(text, alone + at, t.got + at, n, row);
    }
    mem_free(wide);
    mem_free(alone);
    free_dense(&t);
}

static const int head_counts[] = { 1, 5, 8, 20, 24 };

START_TEST(decode_equals_cpu)
{
    static const int32_t lengths[][MAX_SEQS] = {
        { 1, 2, 31, 32, 33, 63, 64, 65, 0, 255, 256, 257 },
        { 0, 500, 1000, 511, 512, 513, 4096, 4097, 0, 3, 7000, 1 },
    };

    if (!gpu_backend())
        return;
    for (int i = 0; i < 4; i++) {
        struct dense_setup s = { .heads = head_counts[_i], .seqs = MAX_SEQS,
                                 .scale = i / 2 ? 0.25f : 1 / 16.0f };
        memcpy(s.n_tokens, lengths[i % 2], sizeof s.n_tokens);
        for (int k = 0; k < MAX_SEQS; k++)
            s.n_rows[k] = 1;
        compare_dense(&s, "decode", 40 + (uint64_t)(4 * _i + i));
    }
    if (head_counts[_i] == 20)
        compare_dense(&(struct dense_setup){ .heads = 20, .seqs = 2, .n_tokens = { 40001, 25000 },
                                             .n_rows = { 1, 1 }, .scale = 1 / 16.0f }, "decode",
                      39);
}
END_TEST

START_TEST(prefill_equals_cpu)
{
    if (!gpu_backend())
        return;
    struct dense_setup s = {
        .heads = head_counts[_i], .seqs = 9, .scale = 1 / 16.0f,
        .n_rows = { 1, 2, 3, 4, 17, 64, 65, 100, 1 },
        .n_tokens = { 100, 2, 67, 900, 17, 64, 165, 612, 0 } };
    compare_dense(&s, "prefill", 60 + (uint64_t)_i);
    s.scale = 0.25f;
    compare_dense(&s, "prefill", 70 + (uint64_t)_i);
}
END_TEST

/* Rows in chunks of two rows and more, each behind those before, to the bit what they are together:
 * `alone` gets the same rows again. */
static void attend_in_chunks(const struct dense *t, int chunk, bf16 *alone)
{
    struct dense part = *t;
    size_t row = (size_t)(t->s.heads * LATENT);

    part.s.seqs = 1;
    for (int from = 0; from < t->s.n_rows[0]; from += chunk) {
        bf16 *out = mem_alloc(t->n_out * sizeof *out);
        int n = t->s.n_rows[0] - from < chunk ? t->s.n_rows[0] - from : chunk;
        part.first_row[0] = from;
        part.s.n_rows[0] = n;
        part.s.n_tokens[0] = t->s.n_tokens[0] - t->s.n_rows[0] + from + n;
        part.most_rows = n;
        dense_on_gpu(&part, 0, 1, out);
        memcpy(alone + (size_t)from * row, out + (size_t)from * row, (size_t)n * row * sizeof *out);
        mem_free(out);
    }
}

/* More tasks of 64 rows of a head than a GPU has multiprocessors, beside a sequence of another
 * length. */
START_TEST(chunks_change_nothing)
{
    static const int chunks[] = { 31, 150 };
    struct dense_setup s = { .heads = 20, .seqs = 2, .scale = 1 / 16.0f,
                             .n_rows = { 430, 33 }, .n_tokens = { 500, 1501 } };
    struct dense t;

    if (!gpu_backend())
        return;
    compare_dense(&s, "many tasks", 80);
    for (size_t i = 0; i < sizeof chunks / sizeof chunks[0]; i++) {
        make_dense(&t, &s, 80);
        dense_on_gpu(&t, 0, 2, t.got);
        bf16 *alone = mem_alloc(t.n_out * sizeof *alone);
        attend_in_chunks(&t, chunks[i], alone);
        assert_same_bits("chunks", alone, t.got, (size_t)s.n_rows[0],
                         (size_t)(s.heads * LATENT));
        mem_free(alone);
        free_dense(&t);
    }
}
END_TEST

TCase *gpu_latent_case(void)
{
    TCase *c = tcase_create("gpu_latent");

    tcase_set_timeout(c, 240);
    tcase_add_checked_fixture(c, gpu_clean, NULL);
    tcase_add_loop_test(c, products_equal_cpu, 0, 9);
    tcase_add_loop_test(c, rows_equal_cpu, 0, 5);
    tcase_add_loop_test(c, decode_equals_cpu, 0, 5);
    tcase_add_loop_test(c, prefill_equals_cpu, 0, 5);
    tcase_add_test(c, chunks_change_nothing);
    return c;
}
