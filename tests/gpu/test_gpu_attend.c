/* attend_dense and attend_selected on the GPU against the CPU back end, over the same
 * pool: blocks lie scattered, and what no sequence has stored is NaN. */

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
    MAX_SEQS = 24,
    Q_GAP = 16,                  /* elements between the rows of q */
    SCRATCH_GUARD = 4096,        /* bytes behind scratch that nobody may write */
};

/* Of ops.h: sums are float and the result is rounded once.  Probabilities rounded to bf16
 * before they meet V go up to 5e-3, as a program that did so on these inputs showed. */
static const double attend_tolerance = 1e-4 + 2 * ACT_ROUNDING;

struct setup {
    int kv_heads, group, head_dim, seqs;
    float sharpness;             /* of scale, times 1 / sqrt(head_dim) */
    int32_t n_tokens[MAX_SEQS], n_rows[MAX_SEQS]; /* n_tokens 0: padding, with one row */
};

/* Rows of sequences in any order, a row that is nobody's after each. */
struct problem {
    struct setup s;
    struct kv_shape shape;
    int heads, rows, max_blocks, q_stride;
    float scale;
    float *q;                    /* [rows, q_stride] */
    bf16 *kv;
    int32_t *table;              /* [seqs, max_blocks], -1 where there is no block */
    int32_t first_row[MAX_SEQS];
    size_t kv_bytes, out_floats; /* out: [rows, heads * head_dim] */
    float *want;                 /* the CPU's out */
    int keep;                    /* of attend_selected */
    int32_t *chosen, *n_chosen;  /* [seqs, kv_heads, keep], [seqs, kv_heads] */
    const bf16 *gpu_q, *gpu_kv;
};

static size_t row_dim(const struct problem *p)
{
    return (size_t)(p->heads * p->shape.head_dim);
}

/* [K: head_dim | V: head_dim] */
static bf16 *token_at(const struct problem *p, int seq, int kv_head, int position)
{
    size_t block = (size_t)p->table[seq * p->max_blocks + position / BLOCK_TOKENS];
    size_t head = block * (size_t)p->shape.kv_heads + (size_t)kv_head;
    size_t token = head * BLOCK_TOKENS + (size_t)(position % BLOCK_TOKENS);

    return p->kv + token * 2 * (size_t)p->shape.head_dim;
}

static void place_sequences(struct problem *p, struct test_random *r, int n_ids)
{
    int32_t *ids = mem_alloc((size_t)n_ids * sizeof *ids), order[MAX_SEQS];
    int used = 0;

    random_order(r, ids, n_ids);
    random_order(r, order, p->s.seqs);
    for (int i = 0; i < p->s.seqs; i++) {
        p->first_row[order[i]] = p->rows;
        p->rows += p->s.n_rows[order[i]] + 1;
    }
    for (int seq = 0; seq < p->s.seqs; seq++)
        for (int b = 0; b < p->max_blocks; b++)
            p->table[seq * p->max_blocks + b] =
                b < blocks_of(p->s.n_tokens[seq]) ? ids[used++] : -1;
    mem_free(ids);
}

static void fill_pool(struct problem *p, struct test_random *r)
{
    size_t token = 2 * (size_t)p->shape.head_dim;

    memset(p->kv, 0xff, p->kv_bytes);
    for (int seq = 0; seq < p->s.seqs; seq++)
        for (int g = 0; g < p->shape.kv_heads; g++)
            for (int b = 0; b < blocks_of(p->s.n_tokens[seq]); b++) {
                int left = p->s.n_tokens[seq] - b * BLOCK_TOKENS;
                size_t n = token * (size_t)(left < BLOCK_TOKENS ? left : BLOCK_TOKENS);
                bf16 *x = random_weights(r, n, DTYPE_BF16, 1);
                memcpy(token_at(p, seq, g, b * BLOCK_TOKENS), x, n * sizeof *x);
                mem_free(x);
            }
}

/* NaN in the rows of q that are nobody's, and between rows. */
static void make_queries(struct problem *p, struct test_random *r)
{
    size_t dim = row_dim(p);

    p->q_stride = (int)dim + Q_GAP;
    p->q = mem_alloc((size_t)p->rows * (size_t)p->q_stride * sizeof *p->q);
    for (int i = 0; i < p->rows * p->q_stride; i++)
        p->q[i] = NAN;
    for (int seq = 0; seq < p->s.seqs; seq++)
        for (int i = 0; i < p->s.n_rows[seq]; i++) {
            float *row = random_acts(r, dim, 1);
            memcpy(p->q + (p->first_row[seq] + i) * p->q_stride, row, dim * sizeof *row);
            mem_free(row);
        }
}

static struct problem *make_problem(const struct setup *s, uint64_t seed)
{
    struct problem *p = mem_calloc(1, sizeof *p);
    struct test_random r = test_random(seed);
    int n_blocks = 1;

    p->s = *s;
    p->shape = (struct kv_shape){ .kv_heads = s->kv_heads, .head_dim = s->head_dim };
    p->heads = s->kv_heads * s->group;
    p->scale = s->sharpness / sqrtf((float)s->head_dim);
    for (int i = 0; i < s->seqs; i++) {
        n_blocks += blocks_of(s->n_tokens[i]);
        if (p->max_blocks < blocks_of(s->n_tokens[i]) + 3)
            p->max_blocks = blocks_of(s->n_tokens[i]) + 3;
    }
    p->table = mem_alloc((size_t)(s->seqs * p->max_blocks) * sizeof *p->table);
    place_sequences(p, &r, n_blocks);
    p->kv_bytes = (size_t)n_blocks * kv_block_bytes(&p->shape);
    p->kv = mem_alloc(p->kv_bytes);
    fill_pool(p, &r);
    make_queries(p, &r);
    p->out_floats = (size_t)p->rows * row_dim(p);
    p->gpu_q = gpu_put_act(p->q, (size_t)p->rows * (size_t)p->q_stride);
    p->gpu_kv = gpu_put(p->kv, p->kv_bytes);
    return p;
}

static void free_problem(struct problem *p)
{
    gpu_forget();
    mem_free(p->q);
    mem_free(p->kv);
    mem_free(p->table);
    mem_free(p->want);
    mem_free(p->chosen);
    mem_free(p->n_chosen);
    mem_free(p);
}

/* ---- dense */

/* What the host knows of a call. */
struct maxima { int n_rows, n_tokens; bool only_last_is_new; };

static struct maxima exact_maxima(const struct problem *p)
{
    struct maxima m = { 1, 1, false };

    for (int i = 0; i < p->s.seqs; i++) {
        m.n_rows = p->s.n_rows[i] > m.n_rows ? p->s.n_rows[i] : m.n_rows;
        m.n_tokens = p->s.n_tokens[i] > m.n_tokens ? p->s.n_tokens[i] : m.n_tokens;
    }
    return m;
}

static struct attend_dense_args dense_arguments(const struct problem *p, struct maxima m)
{
    return (struct attend_dense_args){
        .q_stride = p->q_stride, .shape = p->shape, .seqs = p->s.seqs, .heads = p->heads,
        .max_blocks = p->max_blocks, .max_n_rows = m.n_rows, .max_n_tokens = m.n_tokens,
        .only_last_is_new = m.only_last_is_new, .scale = p->scale };
}

static size_t scratch_of(const struct backend_ops *ops, const struct problem *p, int seqs)
{
    return ops->attend_dense_scratch(&p->shape, seqs, p->heads, p->max_blocks);
}

/* Scratch on the GPU, of either operation, with the guard behind it. */
static char *put_scratch(const struct problem *p, int seqs)
{
    return gpu_put(NULL, scratch_of(gpu_ops(), p, seqs) + SCRATCH_GUARD);
}

static void check_guard(const struct problem *p, int seqs, const char *scratch)
{
    char *guard = mem_alloc(SCRATCH_GUARD);

    gpu_get(guard, scratch + scratch_of(gpu_ops(), p, seqs), SCRATCH_GUARD);
    assert_unwritten("attention, behind scratch", guard, SCRATCH_GUARD);
    mem_free(guard);
}

static void dense_on_cpu(struct problem *p)
{
    const struct backend_ops *ops = backend_ops(test_backend("auto"));
    struct stream *stream = stream_create(test_backend("auto"));
    struct attend_dense_args a = dense_arguments(p, exact_maxima(p));

    p->want = mem_calloc(p->out_floats, sizeof *p->want);
    a.out = p->want;
    a.q = p->q;
    a.kv = p->kv;
    a.table = p->table;
    a.first_row = p->first_row;
    a.n_rows = p->s.n_rows;
    a.n_tokens = p->s.n_tokens;
    a.scratch = mem_alloc(scratch_of(ops, p, a.seqs) + 64);
    ops->attend_dense(stream, &a);
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    mem_free(a.scratch);
}

static void *put_ints(const int32_t *ints, int n)
{
    return gpu_put(ints, (size_t)n * sizeof *ints);
}

/* All of out as bits, the caller frees.  picked lists the n sequences of the call; NULL:
 * all of them. */
static bf16 *dense_on_gpu(const struct problem *p, struct maxima m, const int *picked, int n)
{
    struct attend_dense_args a = dense_arguments(p, m);
    int32_t *table = mem_alloc((size_t)(MAX_SEQS * p->max_blocks) * sizeof *table);
    int32_t first_row[MAX_SEQS], n_rows[MAX_SEQS], n_tokens[MAX_SEQS];
    bf16 *out = mem_alloc(p->out_floats * sizeof *out), *device;

    a.seqs = picked ? n : p->s.seqs;
    for (int i = 0; i < a.seqs; i++) {
        int seq = picked ? picked[i] : i;
        memcpy(table + i * p->max_blocks, p->table + seq * p->max_blocks,
               (size_t)p->max_blocks * sizeof *table);
        first_row[i] = p->first_row[seq];
        n_rows[i] = p->s.n_rows[seq];
        n_tokens[i] = p->s.n_tokens[seq];
    }
    char *scratch = put_scratch(p, a.seqs);
    a.scratch = scratch;
    a.out = device = gpu_put(NULL, p->out_floats * sizeof *device);
    a.q = p->gpu_q;
    a.kv = p->gpu_kv;
    a.table = put_ints(table, a.seqs * p->max_blocks);
    a.first_row = put_ints(first_row, a.seqs);
    a.n_rows = put_ints(n_rows, a.seqs);
    a.n_tokens = put_ints(n_tokens, a.seqs);
    gpu_ops()->attend_dense(gpu_stream(), &a);
    gpu_get(out, device, p->out_floats * sizeof *out);
    check_guard(p, a.seqs, scratch);
    mem_free(table);
    return out;
}

/* Each head of a row by itself, as the CPU's tests do: one that sees few positions has
 * larger results than the others. */
static void compare_row(const struct problem *p, const char *shape, const bf16 *got,
                        const float *want, double tolerance)
{
    size_t dim = (size_t)p->shape.head_dim;
    float *wide = widened(got, row_dim(p));
    char text[320];

    for (int head = 0; head < p->heads; head++) {
        snprintf(text, sizeof text, "%s, query head %d", shape, head);
        assert_rows_near(text, &(struct row_pair){
            .got = wide + (size_t)head * dim, .want = want + (size_t)head * dim, .rows = 1,
            .dim = dim, .tolerance = tolerance });
    }
    mem_free(wide);
}

static void describe(char *text, size_t n, const struct problem *p, const char *name, int seq,
                     int row)
{
    snprintf(text, n, "%s: heads %d on %d of %d, sharpness %g, sequence %d of %d: row %d of %d "
             "of %d tokens", name, p->heads, p->shape.kv_heads, p->shape.head_dim,
             (double)p->s.sharpness, seq, p->s.seqs, row, p->s.n_rows[seq], p->s.n_tokens[seq]);
}

/* Rows of out that are nobody's must be unwritten. */
static void check_nobodys_rows(const struct problem *p, const bf16 *out)
{
    char text[100];

    for (int row = 0; row < p->rows; row++) {
        bool owned = false;
        for (int seq = 0; seq < p->s.seqs; seq++)
            owned = owned || (row >= p->first_row[seq] &&
                              row < p->first_row[seq] + p->s.n_rows[seq]);
        snprintf(text, sizeof text, "attend_dense: row %d of %d, of no sequence", row, p->rows);
        if (!owned)
            assert_unwritten(text, out + (size_t)row * row_dim(p), row_dim(p) * sizeof *out);
    }
}

static void check_dense(const struct problem *p, const char *name, struct maxima m)
{
    bf16 *out = dense_on_gpu(p, m, NULL, 0);
    char text[240], call[80];

    snprintf(call, sizeof call, "%s (maxima %d rows, %d tokens)", name, m.n_rows, m.n_tokens);
    for (int seq = 0; seq < p->s.seqs; seq++)
        for (int i = 0; i < p->s.n_rows[seq] && p->s.n_tokens[seq] > 0; i++) {
            size_t at = (size_t)(p->first_row[seq] + i) * row_dim(p);
            describe(text, sizeof text, p, call, seq, i);
            compare_row(p, text, out + at, p->want + at, attend_tolerance);
        }
    check_nobodys_rows(p, out);
    mem_free(out);
}

/* With maxima that are exact, and such as a step of fixed size has. */
static void compare_dense(const char *name, const struct setup *s, uint64_t seed)
{
    struct problem *p = make_problem(s, seed);
    struct maxima m = exact_maxima(p);

    dense_on_cpu(p);
    check_dense(p, name, m);
    check_dense(p, name, (struct maxima){ m.n_rows, p->max_blocks * BLOCK_TOKENS, true });
    if (m.n_rows > 1)
        check_dense(p, name, (struct maxima){ m.n_rows * 2 + 60, m.n_tokens + 1, false });
    free_problem(p);
}

static const int groups[] = { 1, 2, 3, 4, 5, 7, 8, 16 };
enum { N_GROUPS = sizeof groups / sizeof groups[0], N_ROUNDS = N_GROUPS * 2 };

static struct setup setup_of(int group, int head_dim, float sharpness)
{
    return (struct setup){ .kv_heads = group == 16 ? 1 : 2, .group = group,
                           .head_dim = head_dim, .sharpness = sharpness };
}

/* Groups and head dimensions; sharpness by turns, and the other way round at another. */
static struct setup round_setup(int round, int other)
{
    return setup_of(groups[round / 2], round % 2 ? 128 : 64,
                    (round / 2 + round + other) % 2 ? 4 : 1);
}

static void add(struct setup *s, int n_tokens, int n_rows)
{
    ck_assert_int_lt(s->seqs, MAX_SEQS);
    s->n_tokens[s->seqs] = n_tokens;
    s->n_rows[s->seqs++] = n_rows;
}

static const int decode_lengths[] = { 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 500, 1000,
                                      4095, 4096, 4097, 5000, 9000 };
enum { N_DECODE = sizeof decode_lengths / sizeof decode_lengths[0] };

/* All lengths in one call, with padding at the ends and between. */
START_TEST(decode_equals_cpu)
{
    if (!gpu_backend())
        return;
    for (int other = 0; other < 2; other++) {
        struct setup s = round_setup(_i, other);
        for (int i = 0; i < N_DECODE; i++) {
            if (i % 6 == 0)
                add(&s, 0, 1);
            add(&s, decode_lengths[other ? N_DECODE - 1 - i : i], 1);
        }
        add(&s, 0, 1);
        compare_dense("decode", &s, 1 + (uint64_t)(_i * 2 + other));
    }
}
END_TEST

/* Each length alone: a call of one sequence. */
START_TEST(decode_alone_equals_cpu)
{
    if (!gpu_backend())
        return;
    for (int i = 0; i < N_DECODE; i++) {
        struct setup s = round_setup((_i * 5 + i) % N_ROUNDS, i / 2);
        add(&s, decode_lengths[i], 1);
        compare_dense("decode alone", &s, 50 + (uint64_t)(_i * N_DECODE + i));
    }
}
END_TEST

START_TEST(long_context_equals_cpu)
{
    if (!gpu_backend())
        return;
    struct setup s = setup_of(_i ? 7 : 4, 128, _i ? 4 : 1);
    add(&s, 70001, 1);
    add(&s, 0, 1);
    add(&s, 33, 1);
    compare_dense("decode", &s, 90 + (uint64_t)_i);
}
END_TEST

static const int chunk_rows[] = { 1, 2, 16, 17, 63, 64, 65, 127, 128, 129, 200 };
static const int prefixes[] = { 0, 64, 100, 1, 640, 37, 0, 191, 704, 63, 257 };
enum { N_CHUNKS = sizeof chunk_rows / sizeof chunk_rows[0] };

/* Every number of rows in one call; the prefixes go round. */
START_TEST(prefill_equals_cpu)
{
    if (!gpu_backend())
        return;
    for (int other = 0; other < 2; other++) {
        struct setup s = round_setup(_i, other);
        for (int i = 0; i < N_CHUNKS; i++)
            add(&s, prefixes[(i + _i + 4 * other) % N_CHUNKS] + chunk_rows[i], chunk_rows[i]);
        compare_dense("prefill", &s, 100 + (uint64_t)(_i * 2 + other));
    }
}
END_TEST

/* Each number of rows alone, without and with a prefix. */
START_TEST(prefill_alone_equals_cpu)
{
    if (!gpu_backend())
        return;
    for (int i = 0; i < 2 * N_CHUNKS; i++) {
        int rows = chunk_rows[i / 2];
        struct setup s = round_setup((_i * 5 + i) % N_ROUNDS, i / 4);
        add(&s, rows + (i % 2 ? 450 + 41 * i : 0), rows);
        compare_dense("prefill alone", &s, 150 + (uint64_t)(_i * 2 * N_CHUNKS + i));
    }
}
END_TEST

START_TEST(prefill_after_long_prefix)
{
    static const int rows[] = { 128, 33, 200 };

    if (!gpu_backend())
        return;
    struct setup s = setup_of(_i ? 3 : 4, 128, _i ? 4 : 1);
    add(&s, 8000 + rows[_i], rows[_i]);
    add(&s, 150, 150);
    compare_dense("prefill", &s, 190 + (uint64_t)_i);
}
END_TEST

/* Prefill, decode and padding in one call; their rows lie in any order. */
START_TEST(mixed_equals_cpu)
{
    if (!gpu_backend())
        return;
    for (int other = 0; other < 2; other++) {
        struct test_random r = test_random(200 + (uint64_t)(_i * 2 + other));
        struct setup s = round_setup(_i, other);
        for (int i = 0; i < 14; i++) {
            int kind = random_below(&r, 5), rows = chunk_rows[random_below(&r, N_CHUNKS)];
            if (kind == 0)
                add(&s, 0, 1);
            else if (kind < 3)
                add(&s, decode_lengths[random_below(&r, N_DECODE)], 1);
            else
                add(&s, rows + random_below(&r, 2) * random_below(&r, 500), rows);
        }
        add(&s, 1300, 1);
        add(&s, 165, 100);
        compare_dense("mixed", &s, 250 + (uint64_t)(_i * 2 + other));
    }
}
END_TEST

START_TEST(padding_alone)
{
    if (!gpu_backend())
        return;
    struct setup s = setup_of(4, 128, 1);
    add(&s, 0, 1);
    add(&s, 0, 1);
    compare_dense("padding", &s, 290);
}
END_TEST

/* Scores of one and of opposite signs, far apart: no overflow, and the largest alone
 * counts; a first block that is far below the rest, and one far above it. */
START_TEST(hard_scores)
{
    if (!gpu_backend())
        return;
    struct setup s = setup_of(4, 128, _i % 2 ? 100 : 30);
    add(&s, 1000, 1);
    add(&s, 300, 200);
    add(&s, 5000, 1);
    struct problem *p = make_problem(&s, 300 + (uint64_t)_i);
    for (int g = 0; g < 2; g++)
        for (int position = 0; position < BLOCK_TOKENS; position++)
            for (int d = 0; d < 128; d++) {
                bf16 *k = token_at(p, 0, g, position) + d;
                *k = float_to_bf16(bf16_to_float(*k) * (_i / 2 ? 0.01f : 8));
            }
    p->gpu_kv = gpu_put(p->kv, p->kv_bytes);
    dense_on_cpu(p);
    check_dense(p, "hard scores", exact_maxima(p));
    free_problem(p);
}
END_TEST

/* ---- independence */

static void same_rows(const struct problem *p, const char *name, int seq, const bf16 *got,
                      const bf16 *want)
{
    char text[240];
    size_t at = (size_t)p->first_row[seq] * row_dim(p);

    describe(text, sizeof text, p, name, seq, 0);
    assert_same_bits(text, got + at, want + at, (size_t)p->s.n_rows[seq], row_dim(p));
}

/* The first row of a sequence, within a tolerance. */
static void near_row(const struct problem *p, const char *name, int seq, const bf16 *got,
                     const bf16 *want, double tolerance)
{
    size_t at = (size_t)p->first_row[seq] * row_dim(p);
    float *wide = widened(want + at, row_dim(p));
    char text[240];

    describe(text, sizeof text, p, name, seq, 0);
    compare_row(p, text, got + at, wide, tolerance);
    mem_free(wide);
}

/* Decode rows with others, alone, in another order, in parts, and with other max_n_tokens. */
START_TEST(decode_is_independent)
{
    static const int reversed[] = { 9, 8, 7, 6, 5, 4, 3, 2, 1, 0 }, some[] = { 6, 1, 4 };

    if (!gpu_backend())
        return;
    struct setup s = round_setup(_i, 0);
    for (int i = 0; i < 9; i++)
        add(&s, i == 3 ? 0 : decode_lengths[17 - 2 * i], 1);
    add(&s, 2500, 1);
    struct problem *p = make_problem(&s, 400 + (uint64_t)_i);
    struct maxima m = exact_maxima(p);
    bf16 *all = dense_on_gpu(p, m, NULL, 0);
    for (int larger = 0; larger < 3; larger++) {
        struct maxima most = { 1, m.n_tokens + larger * 70, false };
        bf16 *again = dense_on_gpu(p, most, NULL, 0);
        bf16 *back = dense_on_gpu(p, most, reversed, 10);
        bf16 *part = dense_on_gpu(p, most, some, 3);
        for (int seq = 0; seq < s.seqs; seq++) {
            struct maxima own = { 1, s.n_tokens[seq] + larger * 70, true };
            if (s.n_tokens[seq] == 0)
                continue;
            bf16 *alone = dense_on_gpu(p, own, &seq, 1);
            same_rows(p, "decode again", seq, again, all);
            same_rows(p, "decode reversed", seq, back, all);
            same_rows(p, "decode alone", seq, alone, all);
            if (seq == 6 || seq == 1 || seq == 4)
                same_rows(p, "decode of three", seq, part, all);
            mem_free(alone);
        }
        mem_free(again);
        mem_free(back);
        mem_free(part);
    }
    mem_free(all);
    free_problem(p);
}
END_TEST

/* Decode rows beside rows of prefill are those of decode alone; and rows of prefill are
 * the same whoever else is there. */
START_TEST(mixed_is_independent)
{
    static const int decode[] = { 1, 3, 4 };

    if (!gpu_backend())
        return;
    struct setup s = round_setup(_i, 1);
    add(&s, 300, 200);
    add(&s, 4097, 1);
    add(&s, 70, 17);
    add(&s, 129, 1);
    add(&s, 1000, 1);
    add(&s, 0, 1);
    struct problem *p = make_problem(&s, 450 + (uint64_t)_i);
    bf16 *all = dense_on_gpu(p, exact_maxima(p), NULL, 0);
    bf16 *three = dense_on_gpu(p, (struct maxima){ 1, 4097, true }, decode, 3);
    for (int i = 0; i < 3; i++)
        same_rows(p, "decode without prefill", decode[i], three, all);
    for (int seq = 0; seq < 5; seq++) {
        struct maxima own = { s.n_rows[seq], s.n_tokens[seq], false };
        bf16 *alone = dense_on_gpu(p, own, &seq, 1);
        same_rows(p, "alone", seq, alone, all);
        mem_free(alone);
    }
    mem_free(all);
    mem_free(three);
    free_problem(p);
}
END_TEST

/* A chunk in two pieces: the same rows bit for bit, but where a piece is one row, which is
 * decode's and rounded as there. */
START_TEST(pieces_do_not_change_a_bit)
{
    static const int cuts[] = { 1, 2, 17, 64, 100, 198, 199 };
    struct setup s = round_setup(_i, 0);

    if (!gpu_backend())
        return;
    add(&s, 500, 200);
    struct problem *p = make_problem(&s, 480 + (uint64_t)_i);
    bf16 *all = dense_on_gpu(p, exact_maxima(p), NULL, 0);
    for (size_t i = 0; i < 2 * sizeof cuts / sizeof cuts[0]; i++) {
        int from = i % 2 ? cuts[i / 2] : 0, n = i % 2 ? 200 - from : cuts[i / 2];
        struct problem piece = *p;
        piece.first_row[0] += from;
        piece.s.n_rows[0] = n;
        piece.s.n_tokens[0] = 300 + from + n;
        bf16 *out = dense_on_gpu(&piece, exact_maxima(&piece), NULL, 0);
        if (n > 1)
            same_rows(&piece, "a piece of 200 rows", 0, out, all);
        else
            near_row(&piece, "a piece of 200 rows", 0, out, all, attend_tolerance);
        mem_free(out);
    }
    mem_free(all);
    free_problem(p);
}
END_TEST

/* ---- selected */

/* Without addresses. */
static struct attend_selected_args selected_arguments(const struct problem *p, int seqs)
{
    return (struct attend_selected_args){
        .q_stride = p->q_stride, .shape = p->shape, .seqs = seqs, .heads = p->heads,
        .max_blocks = p->max_blocks, .keep_tokens = p->keep, .scale = p->scale };
}

/* Row s of q and out is that of sequence s, so first_row is not used here. */
static void selected_on_cpu(struct problem *p)
{
    const struct backend_ops *ops = backend_ops(test_backend("auto"));
    struct stream *stream = stream_create(test_backend("auto"));
    struct attend_selected_args a = selected_arguments(p, p->s.seqs);

    p->want = mem_calloc(p->out_floats, sizeof *p->want);
    a.out = p->want;
    a.q = p->q;
    a.kv = p->kv;
    a.table = p->table;
    a.chosen = p->chosen;
    a.n_chosen = p->n_chosen;
    a.scratch = mem_alloc(scratch_of(ops, p, a.seqs) + 64);
    ops->attend_selected(stream, &a);
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    mem_free(a.scratch);
}

/* Sequences from..from + seqs - 1; all of out, [rows, heads * head_dim], of which the rows
 * from 0 on are theirs.  The caller frees. */
static bf16 *selected_on_gpu(const struct problem *p, int from, int seqs)
{
    struct attend_selected_args a = selected_arguments(p, seqs);
    int g = p->shape.kv_heads;
    bf16 *out = mem_alloc(p->out_floats * sizeof *out);
    bf16 *device = gpu_put(NULL, p->out_floats * sizeof *device);
    char *scratch = put_scratch(p, seqs);

    a.out = device;
    a.q = p->gpu_q + from * p->q_stride;
    a.kv = p->gpu_kv;
    a.table = put_ints(p->table + from * p->max_blocks, seqs * p->max_blocks);
    a.chosen = put_ints(p->chosen + from * g * p->keep, seqs * g * p->keep);
    a.n_chosen = put_ints(p->n_chosen + from * g, seqs * g);
    a.scratch = scratch;
    gpu_ops()->attend_selected(gpu_stream(), &a);
    gpu_get(out, device, p->out_floats * sizeof *out);
    check_guard(p, seqs, scratch);
    return out;
}

/* Up to keep positions of each KV head: all that fit, one, some. */
static void choose(struct problem *p, int keep, struct test_random *r)
{
    int lists = p->s.seqs * p->shape.kv_heads;

    p->keep = keep;
    p->chosen = mem_alloc((size_t)(lists * keep) * sizeof *p->chosen);
    p->n_chosen = mem_alloc((size_t)lists * sizeof *p->n_chosen);
    for (int list = 0; list < lists; list++) {
        int n = p->s.n_tokens[list / p->shape.kv_heads], most = keep < n ? keep : n;
        int kind = (list + list / 3) % 3;
        int want = kind == 0 ? most : kind == 1 ? 1 : 1 + random_below(r, most + 1);
        int32_t *out = p->chosen + list * keep;
        p->n_chosen[list] = want = want < most ? want : most;
        for (int position = 0, left = want; position < n && left > 0; position++)
            if (random_below(r, n - position) < left) {
                *out++ = position;
                left--;
            }
        for (int i = want; i < keep; i++)
            *out++ = -1;
    }
}

/* Whatever a KV head has not chosen becomes NaN. */
static void spoil_the_rest(struct problem *p)
{
    size_t bytes = 2 * (size_t)p->shape.head_dim * sizeof(bf16);

    for (int list = 0; list < p->s.seqs * p->shape.kv_heads; list++) {
        int seq = list / p->shape.kv_heads, at = 0;
        const int32_t *chosen = p->chosen + list * p->keep;
        for (int position = 0; position < p->s.n_tokens[seq]; position++)
            if (at < p->n_chosen[list] && chosen[at] == position)
                at++;
            else
                memset(token_at(p, seq, list % p->shape.kv_heads, position), 0xff, bytes);
    }
    p->gpu_kv = gpu_put(p->kv, p->kv_bytes);
}

/* make_problem() with queries in rows 0..seqs - 1; those behind them are nobody's. */
static struct problem *make_selected(const struct setup *s, uint64_t seed)
{
    struct test_random r = test_random(seed + 1000);
    struct problem *p = make_problem(s, seed);

    mem_free(p->q);
    p->q = random_acts(&r, (size_t)p->rows * (size_t)p->q_stride, 1);
    for (int row = 0; row < p->rows; row++)
        for (int i = (int)row_dim(p); i < p->q_stride; i++)
            p->q[row * p->q_stride + i] = NAN;
    p->gpu_q = gpu_put_act(p->q, (size_t)p->rows * (size_t)p->q_stride);
    for (int seq = 0; seq < s->seqs; seq++)
        p->first_row[seq] = seq;
    return p;
}

static void check_selected(const struct problem *p)
{
    bf16 *out = selected_on_gpu(p, 0, p->s.seqs);
    size_t written = (size_t)p->s.seqs * row_dim(p);
    char text[240], name[60];

    snprintf(name, sizeof name, "selected, keep %d", p->keep);
    for (int seq = 0; seq < p->s.seqs; seq++) {
        size_t at = (size_t)seq * row_dim(p);
        describe(text, sizeof text, p, name, seq, 0);
        if (p->s.n_tokens[seq] > 0)
            compare_row(p, text, out + at, p->want + at, attend_tolerance);
    }
    assert_unwritten("attend_selected, behind the last sequence", out + written,
                     (p->out_floats - written) * sizeof *out);
    mem_free(out);
}

static void compare_selected(const struct setup *s, int keep, uint64_t seed)
{
    struct test_random r = test_random(seed);
    struct problem *p = make_selected(s, seed);

    choose(p, keep, &r);
    spoil_the_rest(p);
    selected_on_cpu(p);
    check_selected(p);
    free_problem(p);
}

static const int keeps[] = { 16, 100, 1024 };
enum { N_KEEPS = sizeof keeps / sizeof keeps[0] };

static struct setup selected_setup(int round, int other)
{
    static const int lengths[] = { 3000, 1, 64, 0, 65, 1100, 17, 2049, 130, 9000, 0, 500 };
    struct setup s = round_setup(round, other);

    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++)
        add(&s, lengths[i], 1);
    return s;
}

START_TEST(selected_equals_cpu)
{
    if (!gpu_backend())
        return;
    for (int i = 0; i < N_KEEPS; i++) {
        struct setup s = selected_setup(_i, i);
        compare_selected(&s, keeps[i], 500 + (uint64_t)(_i * N_KEEPS + i));
    }
}
END_TEST

/* One sequence, of each keep: as decode has it most of the time. */
START_TEST(selected_alone_equals_cpu)
{
    if (!gpu_backend())
        return;
    for (int i = 0; i < N_KEEPS; i++) {
        struct setup s = round_setup(_i, i);
        add(&s, 2000 + 700 * i, 1);
        compare_selected(&s, keeps[i], 560 + (uint64_t)(_i * N_KEEPS + i));
    }
}
END_TEST

START_TEST(selected_is_independent)
{
    if (!gpu_backend())
        return;
    for (int i = 0; i < N_KEEPS; i++) {
        struct setup s = selected_setup(_i, i);
        struct test_random r = test_random(600 + (uint64_t)(_i * N_KEEPS + i));
        struct problem *p = make_selected(&s, 600 + (uint64_t)(_i * N_KEEPS + i));
        char text[240];
        choose(p, keeps[i], &r);
        bf16 *all = selected_on_gpu(p, 0, s.seqs), *again = selected_on_gpu(p, 0, s.seqs);
        for (int seq = 0; seq < s.seqs; seq++) {
            if (s.n_tokens[seq] == 0)
                continue;
            bf16 *alone = selected_on_gpu(p, seq, 1);
            const bf16 *want = all + (size_t)seq * row_dim(p);
            describe(text, sizeof text, p, "selected again, then alone", seq, 0);
            assert_same_bits(text, again + (size_t)seq * row_dim(p), want, 1, row_dim(p));
            assert_same_bits(text, alone, want, 1, row_dim(p));
            mem_free(alone);
        }
        mem_free(all);
        mem_free(again);
        free_problem(p);
    }
}
END_TEST

/* With every position chosen both operations mean the same; both results are rounded. */
START_TEST(all_chosen_is_dense)
{
    static const int lengths[] = { 1, 64, 1025, 0, 700, 2049, 129 };

    if (!gpu_backend())
        return;
    struct setup s = round_setup(_i, 0);
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++)
        add(&s, lengths[i], 1);
    struct problem *p = make_selected(&s, 650 + (uint64_t)_i);
    int lists = s.seqs * s.kv_heads;
    p->keep = 2100;
    p->chosen = mem_alloc((size_t)(lists * p->keep) * sizeof *p->chosen);
    p->n_chosen = mem_alloc((size_t)lists * sizeof *p->n_chosen);
    for (int list = 0; list < lists; list++) {
        p->n_chosen[list] = s.n_tokens[list / s.kv_heads];
        for (int i = 0; i < p->keep; i++)
            p->chosen[list * p->keep + i] = i < p->n_chosen[list] ? i : -1;
    }
    bf16 *dense = dense_on_gpu(p, exact_maxima(p), NULL, 0);
    bf16 *selected = selected_on_gpu(p, 0, s.seqs);
    for (int seq = 0; seq < s.seqs; seq++)
        if (s.n_tokens[seq] > 0)
            near_row(p, "all selected", seq, selected, dense, 1e-3 + 2 * ACT_ROUNDING);
    mem_free(dense);
    mem_free(selected);
    free_problem(p);
}
END_TEST

TCase *gpu_attend_case(void)
{
    TCase *c = tcase_create("gpu_attend");

    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, gpu_clean, NULL);
    tcase_add_loop_test(c, decode_equals_cpu, 0, N_ROUNDS);
    tcase_add_loop_test(c, decode_alone_equals_cpu, 0, 3);
    tcase_add_loop_test(c, long_context_equals_cpu, 0, 2);
    tcase_add_loop_test(c, prefill_equals_cpu, 0, N_ROUNDS);
    tcase_add_loop_test(c, prefill_alone_equals_cpu, 0, 3);
    tcase_add_loop_test(c, prefill_after_long_prefix, 0, 3);
    tcase_add_loop_test(c, mixed_equals_cpu, 0, N_ROUNDS);
    tcase_add_test(c, padding_alone);
    tcase_add_loop_test(c, hard_scores, 0, 4);
    tcase_add_loop_test(c, decode_is_independent, 0, N_ROUNDS);
    tcase_add_loop_test(c, mixed_is_independent, 0, N_ROUNDS);
    tcase_add_loop_test(c, pieces_do_not_change_a_bit, 0, N_ROUNDS);
    tcase_add_loop_test(c, selected_equals_cpu, 0, N_ROUNDS);
    tcase_add_loop_test(c, selected_alone_equals_cpu, 0, N_ROUNDS);
    tcase_add_loop_test(c, selected_is_independent, 0, N_ROUNDS);
    tcase_add_loop_test(c, all_chosen_is_dense, 0, N_ROUNDS);
    return c;
}
