#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/closeness.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <math.h>
#include <string.h>

/* Sequences in a pool of scattered blocks.  What no sequence has stored is garbage: huge
 * numbers and NaN, one of which is enough to spoil a row that reads it. */
enum {
    MAX_SEQS = 12,
    MAX_DIM = 576,
    Q_GAP = 5,                   /* floats between the rows of q */
    UNWRITTEN = -77,             /* in rows of out that belong to no sequence */
};

struct setup {
    int kv_heads, group, head_dim, seqs;
    int32_t n_tokens[MAX_SEQS], n_rows[MAX_SEQS];
    int shared;                  /* blocks that a context repeats; 0: each has its own */
    int latent_dim;              /* of latent rows, whose kv_heads is 1 */
};

struct problem {
    struct setup s;
    struct kv_shape shape;
    int heads, rows, max_blocks;
    size_t out_floats;
    float *q, *out;              /* [rows, q_stride], [rows, heads * head_dim] */
    bf16 *kv;
    int32_t *table, first_row[MAX_SEQS];
    float scale;
    int keep;                    /* of attend_selected */
    int32_t *chosen, *n_chosen;  /* [seqs, kv_heads, keep], [seqs, kv_heads] */
};

static int q_stride(const struct problem *p)
{
    return p->heads * p->shape.head_dim + Q_GAP;
}

/* The row of a token. */
static bf16 *token_at(const struct problem *p, int seq, int kv_head, int position)
{
    size_t block = (size_t)p->table[seq * p->max_blocks + position / BLOCK_TOKENS];
    size_t head = block * (size_t)p->shape.kv_heads + (size_t)kv_head;
    size_t token = head * BLOCK_TOKENS + (size_t)(position % BLOCK_TOKENS);

    return p->kv + token * kv_row_dim(&p->shape);
}

/* Where the value begins in a row. */
static int value_at(const struct problem *p)
{
    return p->shape.latent_dim ? 0 : p->shape.head_dim;
}

/* Alternately 1.7e38 and NaN, both signs. */
static void spoil(bf16 *at, size_t n)
{
    static const bf16 garbage[4] = { 0x7f00, 0x7fc0, 0xff00, 0xffff };

    for (size_t i = 0; i < n; i++)
        at[i] = garbage[i % 4];
}

static void fill_pool(struct problem *p, struct test_random *r)
{
    size_t row = kv_row_dim(&p->shape);

    for (int seq = 0; seq < p->s.seqs; seq++)
        for (int position = 0; position < p->s.n_tokens[seq]; position++)
            for (int g = 0; g < p->shape.kv_heads; g++) {
                if (p->s.shared && position / BLOCK_TOKENS >= p->s.shared)
                    return;
                random_bf16s(r, token_at(p, seq, g, position), row, 1);
            }
}

static void place_sequences(struct problem *p, struct test_random *r, int32_t *ids, int n_ids)
{
    int used = 0;

    random_order(r, ids, n_ids);
    for (int seq = 0; seq < p->s.seqs; seq++) {
        p->first_row[seq] = p->rows + 1;
        p->rows += p->s.n_rows[seq] + 1;
        for (int b = 0; b < p->max_blocks; b++)
            p->table[seq * p->max_blocks + b] =
                b >= blocks_of(p->s.n_tokens[seq]) ? -1
                : p->s.shared                      ? ids[b % p->s.shared]
                                                   : ids[used++];
    }
    p->rows++;
}

static struct problem *make_problem(const struct setup *s, uint64_t seed)
{
    struct problem *p = mem_calloc(1, sizeof *p);
    struct test_random r = test_random(seed);
    int n_blocks = 1;

    p->s = *s;
    p->shape = (struct kv_shape){ .kv_heads = s->kv_heads, .head_dim = s->head_dim,
                                  .latent_dim = s->latent_dim };
    p->heads = s->kv_heads * s->group;
    p->scale = 1 / sqrtf((float)s->head_dim);
    for (int i = 0; i < s->seqs; i++) {
        n_blocks += blocks_of(s->n_tokens[i]);
        if (p->max_blocks < blocks_of(s->n_tokens[i]) + 1)
            p->max_blocks = blocks_of(s->n_tokens[i]) + 1;
    }
    p->table = mem_alloc((size_t)(s->seqs * p->max_blocks) * sizeof *p->table);
    int32_t *ids = mem_alloc((size_t)n_blocks * sizeof *ids);
    place_sequences(p, &r, ids, n_blocks);
    mem_free(ids);
    size_t pool = (size_t)n_blocks * kv_block_bytes(&p->shape);
    p->kv = mem_alloc(pool);
    spoil(p->kv, pool / sizeof *p->kv);
    fill_pool(p, &r);
    p->q = mem_alloc((size_t)(p->rows * q_stride(p)) * sizeof *p->q);
    random_floats(&r, p->q, (size_t)(p->rows * q_stride(p)), 1);
    p->out_floats = (size_t)p->rows * (size_t)(p->heads * kv_value_dim(&p->shape));
    p->out = mem_alloc(p->out_floats * sizeof *p->out);
    return p;
}

static void free_problem(struct problem *p)
{
    mem_free(p->q);
    mem_free(p->out);
    mem_free(p->kv);
    mem_free(p->table);
    mem_free(p->chosen);
    mem_free(p->n_chosen);
    mem_free(p);
}

static float *out_at(const struct problem *p, float *out, int row, int head)
{
    return out + (size_t)(row * p->heads + head) * (size_t)kv_value_dim(&p->shape);
}

/* ---- the operations */

static void clear(struct problem *p)
{
    for (size_t i = 0; i < p->out_floats; i++)
        p->out[i] = UNWRITTEN;
}

/* With other rows and lengths than the problem's own. */
static void run_rows(struct backend *be, struct problem *p, const int32_t *first_row,
                     const int32_t *n_rows, const int32_t *n_tokens)
{
    struct stream *stream = stream_create(be);
    struct attend_dense_args a = {
        .out = p->out,
        .q = p->q,
        .q_stride = q_stride(p),
        .kv = p->kv,
        .table = p->table,
        .first_row = first_row,
        .n_rows = n_rows,
        .n_tokens = n_tokens,
        .shape = p->shape,
        .seqs = p->s.seqs,
        .heads = p->heads,
        .max_blocks = p->max_blocks,
        .scale = p->scale,
    };

    for (int i = 0; i < p->s.seqs; i++) {
        a.max_n_rows = n_rows[i] > a.max_n_rows ? n_rows[i] : a.max_n_rows;
        a.max_n_tokens = n_tokens[i] > a.max_n_tokens ? n_tokens[i] : a.max_n_tokens;
    }
    size_t bytes = backend_ops(be)->attend_dense_scratch(&p->shape, a.seqs, a.heads,
                                                         a.max_blocks);
    a.scratch = bytes ? mem_alloc(bytes) : NULL;
    backend_ops(be)->attend_dense(stream, &a);
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    mem_free(a.scratch);
}

static void run_dense(struct backend *be, struct problem *p)
{
    clear(p);
    run_rows(be, p, p->first_row, p->s.n_rows, p->s.n_tokens);
}

/* Row s of q and out is that of sequence s. */
static void run_selected(struct backend *be, struct problem *p)
{
    struct stream *stream = stream_create(be);

    clear(p);
    backend_ops(be)->attend_selected(stream, &(struct attend_selected_args){
        .out = p->out,
        .q = p->q,
        .q_stride = q_stride(p),
        .kv = p->kv,
        .table = p->table,
        .chosen = p->chosen,
        .n_chosen = p->n_chosen,
        .shape = p->shape,
        .seqs = p->s.seqs,
        .heads = p->heads,
        .max_blocks = p->max_blocks,
        .keep_tokens = p->keep,
        .scale = p->scale });
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
}

/* ---- the reference */

/* One row and query head over n positions of a sequence: those listed, or 0..n - 1. */
static void attend_slowly(const struct problem *p, int seq, int row, int head,
                          const int32_t *listed, int n, double *out)
{
    const float *q = p->q + row * q_stride(p) + head * p->shape.head_dim;
    int dim = p->shape.head_dim, values = kv_value_dim(&p->shape), kv_head = head / p->s.group;
    double *score = mem_alloc((size_t)n * sizeof *score), most = -INFINITY, sum = 0;

    for (int d = 0; d < values; d++)
        out[d] = 0;
    for (int i = 0; i < n; i++) {
        const bf16 *k = token_at(p, seq, kv_head, listed ? listed[i] : i);
        score[i] = 0;
        for (int d = 0; d < dim; d++)
            score[i] += (double)q[d] * (double)bf16_value(k[d]);
        score[i] *= (double)p->scale;
        most = fmax(most, score[i]);
    }
    for (int i = 0; i < n; i++) {
        const bf16 *v = token_at(p, seq, kv_head, listed ? listed[i] : i) + value_at(p);
        double weight = exp(score[i] - most);
        sum += weight;
        for (int d = 0; d < values; d++)
            out[d] += weight * (double)bf16_value(v[d]);
    }
    for (int d = 0; d < values; d++)
        out[d] /= sum;
    mem_free(score);
}

/* Some rows of each sequence, because the reference is slow: the first, the last, and
 * two between them. */
enum { LOOKED_AT = 4 };

static int row_to_look_at(int n_rows, int i)
{
    static const int hundredths[LOOKED_AT] = { 0, 37, 71, 100 };

    return (n_rows - 1) * hundredths[i] / 100;
}

/* What the rows looked at should be, [seqs, LOOKED_AT, heads, width of a value]. */
static float *make_wanted(const struct problem *p)
{
    size_t dim = (size_t)kv_value_dim(&p->shape);
    size_t n = (size_t)(p->s.seqs * LOOKED_AT * p->heads) * dim;
    float *wanted = mem_calloc(n, sizeof *wanted), *at = wanted;
    double out[MAX_DIM];

    for (int seq = 0; seq < p->s.seqs; seq++)
        for (int i = 0; i < LOOKED_AT; i++)
            for (int head = 0; head < p->heads; head++, at += dim) {
                int n_rows = p->s.n_rows[seq], row = row_to_look_at(n_rows, i);
                int sees = p->s.n_tokens[seq] - n_rows + row + 1;
                if (p->s.n_tokens[seq] == 0 || (i > 0 && row == row_to_look_at(n_rows, i - 1)))
                    continue;
                attend_slowly(p, seq, p->first_row[seq] + row, head, NULL, sees, out);
                for (size_t d = 0; d < dim; d++)
                    at[d] = (float)out[d];
            }
    return wanted;
}

static void check_wanted(const struct problem *p, const float *wanted, const char *isa)
{
    size_t dim = (size_t)kv_value_dim(&p->shape);

    for (int seq = 0; seq < p->s.seqs; seq++)
        for (int i = 0; i < LOOKED_AT; i++)
            for (int head = 0; head < p->heads; head++, wanted += dim) {
                int n_rows = p->s.n_rows[seq], row = row_to_look_at(n_rows, i);
                if (p->s.n_tokens[seq] == 0 || (i > 0 && row == row_to_look_at(n_rows, i - 1)))
                    continue;
                const float *got = out_at(p, p->out, p->first_row[seq] + row, head);
                if (!row_close("attend_dense", got, wanted, dim, 1e-4))
                    ck_abort_msg("%s, %d query heads a KV head of %zu: row %d of %d of %d "
                                 "tokens, head %d", isa, p->s.group, dim, row, n_rows,
                                 p->s.n_tokens[seq], head);
            }
}

/* Rows of out between the sequences are nobody's, and there are no others. */
static void check_ownership(const struct problem *p)
{
    size_t width = (size_t)(p->heads * kv_value_dim(&p->shape));
    int seq = 0;

    for (int row = 0; row < p->rows; row++) {
        const float *out = p->out + (size_t)row * width;
        while (seq < p->s.seqs && row >= p->first_row[seq] + p->s.n_rows[seq])
            seq++;
        bool owned = seq < p->s.seqs && row >= p->first_row[seq];
        if (owned && p->s.n_tokens[seq] == 0)
            continue; /* padding: anything */
        for (size_t i = 0; i < width; i++)
            if (owned != (out[i] != UNWRITTEN) || !isfinite(out[i]))
                ck_abort_msg("row %d, element %zu is %g", row, i, (double)out[i]);
    }
}

/* ---- dense */

/* Every length with some number of rows, for growing shapes.  n_rows goes round, so that
 * each length meets several counts. */
static const struct { int kv_heads, group, head_dim, most_rows, latent_dim; } shapes[] = {
    { 1, 1, 16, 200, 0 }, { 2, 3, 16, 64, 0 }, { 3, 1, 32, 200, 0 }, { 1, 8, 32, 64, 0 },
    { 2, 2, 64, 200, 0 }, { 1, 7, 64, 64, 0 }, { 2, 5, 64, 13, 0 }, { 4, 1, 64, 64, 0 },
    { 1, 3, 128, 200, 0 }, { 2, 8, 128, 2, 0 }, { 2, 1, 128, 13, 0 }, { 1, 7, 256, 13, 0 },
    { 2, 2, 256, 13, 0 }, { 1, 100, 16, 2, 0 }, { 1, 1, 256, 64, 0 },
    { 1, 20, 576, 2, 512 }, { 1, 5, 160, 64, 128 }, { 1, 1, 80, 200, 64 },
    { 1, 20, 64, 13, 32 }, { 1, 3, 32, 64, 16 },
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

static struct setup every_length(int round)
{
    static const int32_t lengths[] = { 1, 63, 64, 65, 127, 1023, 1024, 1025, 3000 };
    static const int32_t rows[] = { 1, 2, 13, 64, 200 };
    struct setup s = { .kv_heads = shapes[round].kv_heads, .group = shapes[round].group,
                       .head_dim = shapes[round].head_dim,
                       .latent_dim = shapes[round].latent_dim, .seqs = 9 };

    for (int i = 0; i < s.seqs; i++) {
        s.n_tokens[i] = lengths[i];
        s.n_rows[i] = rows[(i + round) % 5];
        if (s.n_rows[i] > shapes[round].most_rows)
            s.n_rows[i] = shapes[round].most_rows;
        if (s.n_rows[i] > s.n_tokens[i])
            s.n_rows[i] = s.n_tokens[i];
    }
    return s;
}

START_TEST(dense_is_right)
{
    struct setup s = every_length(_i);
    struct problem *p = make_problem(&s, 1 + _i);
    float *wanted = make_wanted(p);

    for (int i = 0; i < TEST_ALL_ISAS; i++) {
        struct backend *be = test_backend(test_all_isas[i]);
        if (!be)
            continue;
        run_dense(be, p);
        check_wanted(p, wanted, test_all_isas[i]);
        check_ownership(p);
    }
    mem_free(wanted);
    free_problem(p);
}
END_TEST

/* The rows of sequence 0, all of them in one call and in pieces, alone and with the
 * other sequences, give the same bits whoever computes them. */
static void compare_pieces(struct backend *be, struct problem *p, const float *want, int piece,
                           bool alone, const char *what)
{
    size_t width = (size_t)(p->heads * kv_value_dim(&p->shape));
    int total = p->s.n_rows[0], before = p->s.n_tokens[0] - total, seqs = p->s.seqs;
    int32_t first[MAX_SEQS], rows[MAX_SEQS], tokens[MAX_SEQS];

    clear(p);
    memcpy(first, p->first_row, sizeof first);
    memcpy(rows, p->s.n_rows, sizeof rows);
    memcpy(tokens, p->s.n_tokens, sizeof tokens);
    if (alone)
        p->s.seqs = 1;
    for (int from = 0; from < total; from += piece) {
        first[0] = p->first_row[0] + from;
        rows[0] = piece < total - from ? piece : total - from;
        tokens[0] = before + from + rows[0];
        run_rows(be, p, first, rows, tokens);
    }
    p->s.seqs = seqs;
    ck_assert_msg(floats_identical(what, p->out + (size_t)p->first_row[0] * width, want,
                                   (size_t)total * width),
                  "pieces of %d rows, %s", piece, alone ? "alone" : "in company");
}

static float *copy_rows(const struct problem *p)
{
    size_t width = (size_t)(p->heads * kv_value_dim(&p->shape));
    size_t n = (size_t)p->s.n_rows[0] * width;
    float *rows = mem_alloc(n * sizeof *rows);

    memcpy(rows, p->out + (size_t)p->first_row[0] * width, n * sizeof *rows);
    return rows;
}

/* Rows that cross the end of a split, and of a block, in company of a short sequence, of
 * padding and of a longer one. */
static const struct setup mixes[] = {
    { 2, 3, 64, 4, { 1100, 70, 0, 2100 }, { 150, 13, 1, 2 }, 0, 0 },
    { 1, 1, 32, 4, { 2060, 1, 0, 1500 }, { 40, 1, 1, 7 }, 0, 0 },
    { 1, 8, 16, 4, { 1030, 900, 0, 3000 }, { 70, 64, 1, 1 }, 0, 0 },
    { 1, 5, 128, 4, { 1026, 64, 0, 1025 }, { 14, 9, 1, 2 }, 0, 0 },
    { 1, 20, 160, 4, { 1100, 70, 0, 2100 }, { 80, 13, 1, 1 }, 0, 128 },
};
enum { N_MIXES = sizeof mixes / sizeof mixes[0] };

START_TEST(pieces_do_not_change_a_bit)
{
    static const int pieces[] = { 1, 7, 13, 64 };
    struct backend *be = test_backend(test_all_isas[_i % TEST_ALL_ISAS]);

    if (!be)
        return;
    struct problem *p = make_problem(&mixes[_i / TEST_ALL_ISAS], 20);
    run_dense(be, p);
    float *want = copy_rows(p);
    compare_pieces(be, p, want, 1000, true, "pieces");
    for (int i = 0; i < 4; i++)
        compare_pieces(be, p, want, pieces[i], true, "pieces");
    compare_pieces(be, p, want, 64, false, "pieces");
    compare_pieces(be, p, want, 9, false, "pieces");
    mem_free(want);
    free_problem(p);
}
END_TEST

/* From one thread, which never cuts a list, to eight, which cut all that are long. */
START_TEST(threads_do_not_change_a_bit)
{
    static const int threads[] = { 2, 3, 4, 8 };
    const char *isa = test_all_isas[_i % TEST_ALL_ISAS];
    struct backend *one = open_with_threads(isa, 1);

    if (!one)
        return;
    struct problem *p = make_problem(&mixes[_i / TEST_ALL_ISAS], 30);
    run_dense(one, p);
    float *want = copy_rows(p), *all = mem_alloc(p->out_floats * sizeof *all);
    memcpy(all, p->out, p->out_floats * sizeof *all);
    for (size_t i = 0; i < sizeof threads / sizeof threads[0]; i++) {
        struct backend *be = open_with_threads(isa, threads[i]);
        run_dense(be, p);
        ck_assert(floats_identical("threads", p->out, all, p->out_floats));
        compare_pieces(be, p, want, 13, true, "threads");
        compare_pieces(be, p, want, 50, false, "threads");
        backend_close(be);
    }
    mem_free(want);
    mem_free(all);
    free_problem(p);
    backend_close(one);
}
END_TEST

/* One row of a long context on many threads: as many splits as there are, and a back end
 * whose workers have kept scratch of another size. */
START_TEST(one_long_row)
{
    static const struct { int group, latent_dim; } keys[] = { { 1, 0 }, { 2, 0 }, { 20, 32 } };
    const struct setup s = { .kv_heads = 1, .group = keys[_i].group, .head_dim = 64, .seqs = 1,
                             .n_tokens = { 20001 }, .n_rows = { 1 },
                             .latent_dim = keys[_i].latent_dim };
    struct problem *p = make_problem(&s, 35);
    struct backend *be = open_with_threads("auto", 8), *one = open_with_threads("auto", 1);
    float *wanted = make_wanted(p), *all = mem_alloc(p->out_floats * sizeof *all);

    run_dense(one, p);
    memcpy(all, p->out, p->out_floats * sizeof *all);
    for (int i = 0; i < 20; i++) {
        run_dense(be, p);
        ck_assert(floats_identical("threads", p->out, all, p->out_floats));
        check_wanted(p, wanted, "auto");
    }
    mem_free(wanted);
    mem_free(all);
    free_problem(p);
    backend_close(be);
    backend_close(one);
}
END_TEST

/* A context of a million tokens that repeats a few blocks: 1,024 splits. */
START_TEST(a_million_tokens)
{
    const struct setup s = { .kv_heads = 1, .group = 2, .head_dim = 16, .seqs = 1,
                             .n_tokens = { 1 << 20 }, .n_rows = { 3 }, .shared = 7 };
    struct problem *p = make_problem(&s, 36);
    struct backend *be = open_with_threads("auto", 8), *one = open_with_threads("auto", 1);
    float *wanted = make_wanted(p), *all = mem_alloc(p->out_floats * sizeof *all);

    run_dense(one, p);
    check_wanted(p, wanted, "auto");
    memcpy(all, p->out, p->out_floats * sizeof *all);
    run_dense(be, p);
    ck_assert(floats_identical("threads", p->out, all, p->out_floats));
    mem_free(wanted);
    mem_free(all);
    free_problem(p);
    backend_close(be);
    backend_close(one);
}
END_TEST

/* Sequences of padding alone are no work and no harm. */
START_TEST(padding_alone)
{
    const struct setup s = { .kv_heads = 2, .group = 2, .head_dim = 32, .seqs = 3,
                             .n_rows = { 1, 1, 1 } };
    struct problem *p = make_problem(&s, 37);

    run_dense(test_backend("auto"), p);
    check_ownership(p);
    free_problem(p);
}
END_TEST

/* ---- scores that are hard on a softmax */

enum { EQUAL, HUGE_SCORES, RISING, FALLING, TINY_VALUES, N_HARD };

static void make_hard(struct problem *p, int kind)
{
    int dim = p->shape.head_dim, n = p->s.n_tokens[0];
    struct test_random r = test_random(40);

    for (int position = 0; position < n; position++)
        for (int g = 0; g < p->shape.kv_heads; g++) {
            bf16 *k = token_at(p, 0, g, position), *v = k + dim;
            if (kind == EQUAL)
                memcpy(k, token_at(p, 0, g, 0), (size_t)dim * sizeof *k);
            if (kind == HUGE_SCORES)
                random_bf16s(&r, k, (size_t)dim, 1e6f);
            for (int d = 0; d < dim && (kind == RISING || kind == FALLING); d++)
                k[d] = nearest_bf16(d ? 0 : (float)(kind == RISING ? position : -position));
            for (int d = 0; d < dim && kind == TINY_VALUES; d++)
                v[d] = nearest_bf16(1e-36f * random_normal(&r));
        }
    for (int i = 0; i < p->rows * q_stride(p); i++)
        if (kind == RISING || kind == FALLING)
            p->q[i] = 0.3f + fabsf(p->q[i]);
}

START_TEST(hard_scores)
{
    const struct setup s = { .kv_heads = 2, .group = 3, .head_dim = 64, .seqs = 1,
                             .n_tokens = { 2500 }, .n_rows = { 30 } };

    for (int kind = 0; kind < N_HARD; kind++) {
        struct backend *be = test_backend(test_all_isas[_i]);
        if (!be)
            return;
        struct problem *p = make_problem(&s, 41);
        make_hard(p, kind);
        float *wanted = make_wanted(p);
        run_dense(be, p);
        check_wanted(p, wanted, test_all_isas[_i]);
        check_ownership(p);
        mem_free(wanted);
        free_problem(p);
    }
}
END_TEST

/* ---- chosen positions */

/* Random ascending choices of every size: 1, keep, and between.  All positions when the
 * context is no longer than that. */
static void choose(struct problem *p, int keep, struct test_random *r)
{
    int lists = p->s.seqs * p->shape.kv_heads;

    p->keep = keep;
    p->chosen = mem_alloc((size_t)(lists * keep) * sizeof *p->chosen);
    p->n_chosen = mem_alloc((size_t)lists * sizeof *p->n_chosen);
    for (int list = 0; list < lists; list++) {
        int n = p->s.n_tokens[list / p->shape.kv_heads], most = keep < n ? keep : n;
        int want = list % 3 == 0 ? most : list % 3 == 1 ? 1 : 1 + random_below(r, most + 1);
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

/* Whatever a KV head has not chosen becomes garbage. */
static void spoil_the_rest(struct problem *p)
{
    for (int list = 0; list < p->s.seqs * p->shape.kv_heads; list++) {
        int seq = list / p->shape.kv_heads, g = list % p->shape.kv_heads, at = 0;
        const int32_t *chosen = p->chosen + list * p->keep;
        for (int position = 0; position < p->s.n_tokens[seq]; position++)
            if (at < p->n_chosen[list] && chosen[at] == position)
                at++;
            else
                spoil(token_at(p, seq, g, position), kv_row_dim(&p->shape));
        ck_assert_int_eq(at, p->n_chosen[list]);
    }
}

static float *wanted_of_chosen(const struct problem *p)
{
    size_t dim = (size_t)kv_value_dim(&p->shape);
    float *wanted = mem_calloc((size_t)(p->s.seqs * p->heads) * dim, sizeof *wanted);
    double out[MAX_DIM];

    for (int i = 0; i < p->s.seqs * p->heads; i++) {
        int seq = i / p->heads, head = i % p->heads;
        int list = seq * p->shape.kv_heads + head / p->s.group;
        if (p->n_chosen[list] == 0)
            continue;
        attend_slowly(p, seq, seq, head, p->chosen + list * p->keep, p->n_chosen[list], out);
        for (size_t d = 0; d < dim; d++)
            wanted[(size_t)i * dim + d] = (float)out[d];
    }
    return wanted;
}

static void check_chosen(const struct problem *p, const float *wanted, const char *isa)
{
    size_t dim = (size_t)kv_value_dim(&p->shape), written = (size_t)(p->s.seqs * p->heads) * dim;

    for (int i = 0; i < p->s.seqs * p->heads; i++)
        if (p->s.n_tokens[i / p->heads] > 0 &&
            !row_close("attend_selected", p->out + (size_t)i * dim, wanted + (size_t)i * dim,
                       dim, 1e-4))
            ck_abort_msg("%s, %d query heads a KV head of %zu: sequence %d, head %d", isa,
                         p->s.group, dim, i / p->heads, i % p->heads);
    for (size_t i = written; i < p->out_floats; i++)
        if (p->out[i] != UNWRITTEN)
            ck_abort_msg("element %zu behind the last sequence was written", i);
}

START_TEST(selected_is_right)
{
    static const int keeps[] = { 64, 65, 300, 1, 1500, 1024, 1025, 2200 };
    struct setup s = { .kv_heads = shapes[_i].kv_heads, .group = shapes[_i].group,
                       .head_dim = shapes[_i].head_dim,
                       .latent_dim = shapes[_i].latent_dim, .seqs = 7,
                       .n_tokens = { 3000, 1, 64, 0, 65, 1100, 2049 },
                       .n_rows = { 1, 1, 1, 1, 1, 1, 1 } };
    struct test_random r = test_random(50 + _i);
    struct problem *p = make_problem(&s, 50 + _i);

    choose(p, keeps[_i % 8], &r);
    spoil_the_rest(p);
    float *wanted = wanted_of_chosen(p);
    for (int i = 0; i < TEST_ALL_ISAS; i++) {
        struct backend *be = test_backend(test_all_isas[i]);
        if (!be)
            continue;
        run_selected(be, p);
        check_chosen(p, wanted, test_all_isas[i]);
    }
    mem_free(wanted);
    free_problem(p);
}
END_TEST

/* Alone, in company, and whoever computes: the same bits. */
START_TEST(selected_is_independent)
{
    static const int threads[] = { 1, 2, 3, 4, 8 };
    const char *isa = test_all_isas[_i / 2];
    bool latent = _i % 2;        /* with as many heads as are divided among workers */
    const struct setup s = { .kv_heads = latent ? 1 : 2, .group = latent ? 19 : 3,
                             .head_dim = 64, .seqs = 4, .latent_dim = latent ? 32 : 0,
                             .n_tokens = { 2500, 90, 0, 1400 }, .n_rows = { 1, 1, 1, 1 } };
    struct test_random r = test_random(60);
    struct backend *be = test_backend(isa);

    if (!be)
        return;
    struct problem *p = make_problem(&s, 60);
    size_t row = (size_t)(p->heads * kv_value_dim(&p->shape));
    float *want = mem_alloc(p->out_floats * sizeof *want);
    choose(p, latent ? 700 : 2100, &r);
    run_selected(be, p);
    memcpy(want, p->out, p->out_floats * sizeof *want);
    for (size_t i = 0; i < sizeof threads / sizeof threads[0]; i++) {
        struct backend *other = open_with_threads(isa, threads[i]);
        p->s.seqs = 4;
        run_selected(other, p);
        for (int seq = 0; seq < 4; seq++)
            ck_assert(seq == 2 || floats_identical("threads", p->out + (size_t)seq * row,
                                                   want + (size_t)seq * row, row));
        p->s.seqs = 1;
        run_selected(other, p);
        ck_assert(floats_identical("alone", p->out, want, row));
        backend_close(other);
    }
    mem_free(want);
    free_problem(p);
}
END_TEST

/* With every position chosen both operations mean the same. */
START_TEST(all_chosen_is_dense)
{
    struct backend *be = test_backend(test_all_isas[_i]);
    const struct setup s = { .kv_heads = 2, .group = 4, .head_dim = 128, .seqs = 5,
                             .n_tokens = { 1, 64, 1025, 700, 2049 },
                             .n_rows = { 1, 1, 1, 1, 1 } };

    if (!be)
        return;
    struct problem *p = make_problem(&s, 70);
    size_t row = (size_t)(p->heads * s.head_dim);
    for (int seq = 0; seq < s.seqs; seq++)
        p->first_row[seq] = seq;
    run_dense(be, p);
    float *want = mem_alloc(p->out_floats * sizeof *want);
    memcpy(want, p->out, p->out_floats * sizeof *want);
    p->keep = 2100;
    p->chosen = mem_alloc((size_t)(s.seqs * 2 * p->keep) * sizeof *p->chosen);
    p->n_chosen = mem_alloc((size_t)(s.seqs * 2) * sizeof *p->n_chosen);
    for (int list = 0; list < s.seqs * 2; list++) {
        p->n_chosen[list] = s.n_tokens[list / 2];
        for (int i = 0; i < p->keep; i++)
            p->chosen[list * p->keep + i] = i < p->n_chosen[list] ? i : -1;
    }
    run_selected(be, p);
    ck_assert(rows_close("selected", p->out, want, (size_t)s.seqs, row, row, 1e-5));
    mem_free(want);
    free_problem(p);
}
END_TEST

TCase *attend_case(void)
{
    TCase *c = tcase_create("attend");

    tcase_set_timeout(c, 120);
    tcase_add_loop_test(c, dense_is_right, 0, N_SHAPES);
    tcase_add_loop_test(c, pieces_do_not_change_a_bit, 0, TEST_ALL_ISAS * N_MIXES);
    tcase_add_loop_test(c, threads_do_not_change_a_bit, 0, TEST_ALL_ISAS * N_MIXES);
    tcase_add_loop_test(c, one_long_row, 0, 3);
    tcase_add_test(c, a_million_tokens);
    tcase_add_test(c, padding_alone);
    tcase_add_loop_test(c, hard_scores, 0, TEST_ALL_ISAS);
    tcase_add_loop_test(c, selected_is_right, 0, N_SHAPES);
    tcase_add_loop_test(c, selected_is_independent, 0, 2 * TEST_ALL_ISAS);
    tcase_add_loop_test(c, all_chosen_is_dense, 0, TEST_ALL_ISAS);
    return c;
}
