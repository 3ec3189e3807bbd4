/* linear and logits on the GPU against the CPU back end. */

#include "engine/base/mem.h"
#include "kernels/cpu/cpu.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/gpu_compare.h"
#include "tests/support/gpu_fixture.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static const int row_counts[] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65,
                                  100, 300 };
enum {
    N_ROW_COUNTS = sizeof row_counts / sizeof row_counts[0],
    MAX_ROWS = 300,
    SPARE_ROWS = 2,              /* of out, behind the last row */
    INDEPENDENT_ROWS = 16,
};

struct setup {
    int in_dim, out_dim;
    int gap;                     /* of out_stride, above out_dim */
    enum dtype type;
    bool bias;
    int skip;                    /* of gpu_put_weights() */
};

struct problem {
    struct setup s;
    float *x, *want;             /* [MAX_ROWS, in_dim], [MAX_ROWS, out_dim] */
    void *weight, *bias;
    const void *gpu_x, *gpu_weight, *gpu_bias;
};

static size_t stride_of(const struct setup *s)
{
    return (size_t)(s->out_dim + s->gap);
}

static void describe(char *text, size_t n, const char *name, const struct setup *s, int rows)
{
    snprintf(text, n, "%s: %d rows of %d, %d outputs, stride %zu, %s weights%s, skip %d", name,
             rows, s->in_dim, s->out_dim, stride_of(s), s->type == DTYPE_F32 ? "f32" : "bf16",
             s->bias ? " with bias" : "", s->skip);
}

static void make_problem(struct problem *p, const struct setup *s, uint64_t seed)
{
    struct test_random r = test_random(seed);
    size_t n_w = (size_t)s->in_dim * (size_t)s->out_dim, n_x = (size_t)MAX_ROWS * s->in_dim;

    memset(p, 0, sizeof *p);
    p->s = *s;
    p->x = random_acts(&r, n_x, 1);
    p->weight = random_weights(&r, n_w, s->type, 0.1f);
    p->gpu_x = gpu_put_act(p->x, n_x);
    p->gpu_weight = gpu_put_weights(p->weight, n_w, s->type, s->skip);
    if (s->bias) {
        p->bias = random_weights(&r, (size_t)s->out_dim, s->type, 1);
        p->gpu_bias = gpu_put_weights(p->bias, (size_t)s->out_dim, s->type, s->skip);
    }
}

static void free_problem(struct problem *p)
{
    mem_free(p->x);
    mem_free(p->want);
    mem_free(p->weight);
    mem_free(p->bias);
    gpu_forget();
}

/* All rows: on the CPU a row's result is the same in any batch. */
static void run_cpu(struct problem *p)
{
    struct backend *be = test_backend("auto");
    struct stream *stream = stream_create(be);

    p->want = mem_alloc((size_t)MAX_ROWS * (size_t)p->s.out_dim * sizeof *p->want);
    backend_ops(be)->linear(stream, &(struct linear_args){
        .out = p->want, .x = p->x, .weight = p->weight, .bias = p->bias,
        .weight_type = p->s.type, .rows = MAX_ROWS, .in_dim = p->s.in_dim,
        .out_dim = p->s.out_dim, .out_stride = p->s.out_dim });
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
}

/* The rows from `from` on: [rows + SPARE_ROWS, stride], the caller frees. */
static bf16 *run_linear(const struct problem *p, int from, int rows)
{
    size_t n = (size_t)(rows + SPARE_ROWS) * stride_of(&p->s);
    bf16 *device = gpu_put(NULL, n * sizeof *device), *out = mem_alloc(n * sizeof *out);

    gpu_ops()->linear(gpu_stream(), &(struct linear_args){
        .out = device, .x = (const bf16 *)p->gpu_x + (size_t)from * (size_t)p->s.in_dim,
        .weight = p->gpu_weight, .bias = p->gpu_bias, .weight_type = p->s.type, .rows = rows,
        .in_dim = p->s.in_dim, .out_dim = p->s.out_dim, .out_stride = (int)stride_of(&p->s) });
    gpu_get(out, device, n * sizeof *out);
    return out;
}

/* [rows + SPARE_ROWS, out_dim], the caller frees. */
static float *run_logits(const struct problem *p, int from, int rows)
{
    size_t n = (size_t)(rows + SPARE_ROWS) * (size_t)p->s.out_dim;
    float *device = gpu_put(NULL, n * sizeof *device), *out = mem_alloc(n * sizeof *out);

    gpu_ops()->logits(gpu_stream(), &(struct logits_args){
        .out = device, .x = (const bf16 *)p->gpu_x + (size_t)from * (size_t)p->s.in_dim,
        .weight = p->gpu_weight, .weight_type = p->s.type, .rows = rows, .dim = p->s.in_dim,
        .vocab = p->s.out_dim });
    gpu_get(out, device, n * sizeof *out);
    return out;
}

static void check_linear(const struct problem *p, int rows)
{
    char shape[160];
    size_t stride = stride_of(&p->s), n = (size_t)(rows + SPARE_ROWS) * stride;
    bf16 *out = run_linear(p, 0, rows);
    float *got = mem_alloc(n * sizeof *got);

    describe(shape, sizeof shape, "linear", &p->s, rows);
    for (size_t i = 0; i < n; i++)
        got[i] = bf16_to_float(out[i]);
    assert_rows_near(shape, &(struct row_pair){
        .got = got, .want = p->want, .rows = (size_t)rows, .dim = (size_t)p->s.out_dim,
        .got_stride = stride, .tolerance = 1e-5 * sqrt(p->s.in_dim) + ACT_ROUNDING });
    assert_gaps_unwritten(shape, out, &(struct gaps){
        .element_bytes = sizeof *out, .rows = (size_t)rows, .dim = (size_t)p->s.out_dim,
        .stride = stride, .total = n });
    mem_free(got);
    mem_free(out);
}

static void check_logits(const struct problem *p, int rows)
{
    char shape[160];
    size_t dim = (size_t)p->s.out_dim, n = (size_t)(rows + SPARE_ROWS) * dim;
    float *got = run_logits(p, 0, rows);

    describe(shape, sizeof shape, "logits", &p->s, rows);
    assert_rows_near(shape, &(struct row_pair){
        .got = got, .want = p->want, .rows = (size_t)rows, .dim = dim,
        .tolerance = 1e-5 * sqrt(p->s.in_dim) });
    assert_gaps_unwritten(shape, got, &(struct gaps){
        .element_bytes = sizeof *got, .rows = (size_t)rows, .dim = dim, .stride = dim,
        .total = n });
    mem_free(got);
}

/* logits has no bias: only where the setup has none. */
static void check_all_rows(const struct setup *s, uint64_t seed, bool logits)
{
    struct problem p;

    make_problem(&p, s, seed);
    run_cpu(&p);
    for (int i = 0; i < N_ROW_COUNTS; i++) {
        if (logits)
            check_logits(&p, row_counts[i]);
        else
            check_linear(&p, row_counts[i]);
    }
    free_problem(&p);
}

static const struct setup bf16_setups[] = {
    { 8, 8, 0, DTYPE_BF16, false, 0 },       { 8, 4096, 8, DTYPE_BF16, true, 0 },
    { 64, 24, 8, DTYPE_BF16, false, 0 },     { 64, 1000, 0, DTYPE_BF16, true, 0 },
    { 72, 16, 120, DTYPE_BF16, true, 0 },    { 72, 130, 6, DTYPE_BF16, false, 0 },
    { 800, 130, 0, DTYPE_BF16, true, 0 },    { 800, 1000, 24, DTYPE_BF16, false, 0 },
    { 576, 576, 384, DTYPE_BF16, true, 0 },  { 576, 8, 0, DTYPE_BF16, false, 0 },
    { 1536, 576, 0, DTYPE_BF16, false, 0 },  { 1536, 16, 8, DTYPE_BF16, true, 0 },
    { 4096, 24, 0, DTYPE_BF16, false, 0 },   { 4096, 1000, 8, DTYPE_BF16, true, 0 },
    { 4096, 4096, 64, DTYPE_BF16, false, 0 }, { 576, 4096, 0, DTYPE_BF16, true, 0 },
    { 2048, 1344, 0, DTYPE_BF16, false, 0 }, { 800, 2001, 7, DTYPE_BF16, true, 0 },
};
enum { N_BF16_SETUPS = sizeof bf16_setups / sizeof bf16_setups[0] };

static const struct setup f32_setups[] = {
    { 8, 24, 0, DTYPE_F32, true, 0 },    { 64, 130, 6, DTYPE_F32, false, 0 },
    { 576, 576, 8, DTYPE_F32, true, 0 }, { 800, 16, 0, DTYPE_F32, false, 0 },
    { 1536, 1000, 0, DTYPE_F32, true, 0 }, { 4096, 576, 8, DTYPE_F32, false, 0 },
};
enum { N_F32_SETUPS = sizeof f32_setups / sizeof f32_setups[0] };

/* Weights aligned no better than promised, and rows of out not at all. */
static const struct setup odd_setups[] = {
    { 64, 130, 0, DTYPE_BF16, true, 1 },  { 576, 576, 8, DTYPE_BF16, false, 1 },
    { 1536, 24, 0, DTYPE_BF16, true, 3 }, { 576, 130, 6, DTYPE_F32, true, 1 },
    { 72, 1000, 1, DTYPE_BF16, true, 0 }, { 576, 131, 0, DTYPE_BF16, false, 0 },
    { 800, 7, 2, DTYPE_BF16, true, 1 },   { 64, 1, 0, DTYPE_F32, true, 1 },
};
enum { N_ODD_SETUPS = sizeof odd_setups / sizeof odd_setups[0] };

START_TEST(bf16_linear_equals_cpu)
{
    if (gpu_backend())
        check_all_rows(&bf16_setups[_i], 1 + (uint64_t)_i, false);
}
END_TEST

START_TEST(f32_linear_equals_cpu)
{
    if (gpu_backend())
        check_all_rows(&f32_setups[_i], 30 + (uint64_t)_i, false);
}
END_TEST

START_TEST(odd_addresses_equal_cpu)
{
    if (gpu_backend())
        check_all_rows(&odd_setups[_i], 50 + (uint64_t)_i, false);
}
END_TEST

static const struct setup logits_setups[] = {
    { 8, 8, 0, DTYPE_BF16, false, 0 },     { 64, 1000, 0, DTYPE_BF16, false, 0 },
    { 72, 130, 0, DTYPE_BF16, false, 0 },  { 576, 4096, 0, DTYPE_BF16, false, 0 },
    { 576, 131, 0, DTYPE_BF16, false, 1 }, { 1536, 24, 0, DTYPE_BF16, false, 0 },
    { 4096, 1000, 0, DTYPE_BF16, false, 0 }, { 800, 576, 0, DTYPE_F32, false, 0 },
    { 64, 130, 0, DTYPE_F32, false, 1 },
};
enum { N_LOGITS_SETUPS = sizeof logits_setups / sizeof logits_setups[0] };

START_TEST(logits_equal_cpu)
{
    if (gpu_backend())
        check_all_rows(&logits_setups[_i], 70 + (uint64_t)_i, true);
}
END_TEST

/* ---- to the bit */

static const struct setup bit_setups[] = {
    { 8, 8, 0, DTYPE_BF16, true, 0 },       { 64, 130, 0, DTYPE_BF16, false, 0 },
    { 576, 576, 0, DTYPE_BF16, true, 0 },   { 1536, 576, 0, DTYPE_BF16, false, 0 },
    { 800, 24, 0, DTYPE_BF16, true, 0 },    { 4096, 1000, 0, DTYPE_BF16, true, 0 },
    { 4096, 4096, 0, DTYPE_BF16, false, 0 }, { 576, 576, 0, DTYPE_F32, true, 0 },
    { 1536, 130, 0, DTYPE_F32, false, 1 },  { 576, 1000, 0, DTYPE_BF16, true, 1 },
    { 2048, 1344, 0, DTYPE_BF16, false, 0 },
};
enum { N_BIT_SETUPS = sizeof bit_setups / sizeof bit_setups[0] };

/* The bits of [rows, out_dim] results, of either operation, as if they were bf16: two
 * columns for each float. */
static bf16 *bits_of(const struct problem *p, int from, int rows, bool logits)
{
    return logits ? (bf16 *)run_logits(p, from, rows) : run_linear(p, from, rows);
}

/* Rows of every count up to INDEPENDENT_ROWS, and each row alone, against all of them in
 * one call. */
static void check_independence(const struct setup *s, uint64_t seed, bool logits)
{
    struct problem p;
    char shape[160], text[200];
    size_t dim = (size_t)s->out_dim * (logits ? 2 : 1);

    make_problem(&p, s, seed);
    bf16 *all = bits_of(&p, 0, INDEPENDENT_ROWS, logits);
    for (int rows = 1; rows < INDEPENDENT_ROWS; rows++) {
        bf16 *some = bits_of(&p, 0, rows, logits);
        describe(shape, sizeof shape, logits ? "logits" : "linear", s, rows);
        snprintf(text, sizeof text, "%s, against %d rows", shape, INDEPENDENT_ROWS);
        assert_same_bits(text, some, all, (size_t)rows, dim);
        mem_free(some);
    }
    for (int row = 0; row < INDEPENDENT_ROWS; row++) {
        bf16 *alone = bits_of(&p, row, 1, logits);
        describe(shape, sizeof shape, logits ? "logits" : "linear", s, 1);
        snprintf(text, sizeof text, "%s: row %d alone", shape, row);
        assert_same_bits(text, alone, all + (size_t)row * dim, 1, dim);
        mem_free(alone);
    }
    mem_free(all);
    free_problem(&p);
}

START_TEST(linear_rows_are_independent)
{
    if (gpu_backend())
        check_independence(&bit_setups[_i], 90 + (uint64_t)_i, false);
}
END_TEST

START_TEST(logits_rows_are_independent)
{
    if (gpu_backend())
        check_independence(&logits_setups[_i], 110 + (uint64_t)_i, true);
}
END_TEST

static void check_repeats(const struct setup *s, uint64_t seed, bool logits)
{
    static const int rows[] = { 1, 5, 16, 33, 100, 300 };
    struct problem p;
    char shape[160];
    size_t dim = (size_t)s->out_dim * (logits ? 2 : 1);

    make_problem(&p, s, seed);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        bf16 *first = bits_of(&p, 0, rows[i], logits);
        describe(shape, sizeof shape, logits ? "logits again" : "linear again", s, rows[i]);
        for (int again = 0; again < 4; again++) {
            bf16 *next = bits_of(&p, 0, rows[i], logits);
            assert_same_bits(shape, next, first, (size_t)rows[i], dim);
            mem_free(next);
        }
        mem_free(first);
    }
    free_problem(&p);
}

START_TEST(runs_repeat)
{
    if (gpu_backend())
        check_repeats(&bit_setups[_i], 130 + (uint64_t)_i, false);
}
END_TEST

START_TEST(logits_repeat)
{
    if (gpu_backend())
        check_repeats(&logits_setups[_i], 150 + (uint64_t)_i, true);
}
END_TEST

/* A row of NaN stays so and spoils no other. */
START_TEST(nan_rows_spoil_no_other)
{
    static const struct setup s = { 576, 576, 0, DTYPE_BF16, true, 0 };
    static const int counts[] = { 2, 9, 32, 100 };
    struct problem p;

    if (!gpu_backend())
        return;
    make_problem(&p, &s, 170);
    run_cpu(&p);
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        int rows = counts[i], broken = rows / 2;
        size_t n = (size_t)rows * 576;
        float *x = mem_alloc(n * sizeof *x), *got = mem_alloc(n * sizeof *got);
        char shape[160];
        memcpy(x, p.x, n * sizeof *x);
        for (int k = 0; k < 576; k++)
            x[broken * 576 + k] = NAN;
        const void *all = p.gpu_x;
        p.gpu_x = gpu_put_act(x, n);
        bf16 *out = run_linear(&p, 0, rows);
        p.gpu_x = all;
        for (size_t k = 0; k < n; k++)
            got[k] = bf16_to_float(out[k]);
        describe(shape, sizeof shape, "linear with a row of NaN", &s, rows);
        for (int row = 0; row < rows; row++) {
            for (int k = 0; k < 576 && row == broken; k++)
                if (!isnan(got[row * 576 + k]))
                    ck_abort_msg("%s: row %d, column %d is %g", shape, row, k,
                                 (double)got[row * 576 + k]);
            if (row != broken)
                assert_rows_near(shape, &(struct row_pair){
                    .got = got + row * 576, .want = p.want + row * 576, .rows = 1, .dim = 576,
                    .tolerance = 1e-5 * 24 + ACT_ROUNDING });
        }
        mem_free(out);
        mem_free(got);
        mem_free(x);
    }
    free_problem(&p);
}
END_TEST

/* The gated product in one kernel, or in parts, is its parts: two products and silu_mul. */
START_TEST(gated_is_its_parts)
{
    static const struct { int in_dim, dim; enum dtype type; } shapes[] = {
        { 8, 8, DTYPE_BF16 },      { 64, 24, DTYPE_BF16 },      { 576, 1536, DTYPE_BF16 },
        { 1024, 3072, DTYPE_BF16 }, { 4096, 12288, DTYPE_BF16 }, { 800, 136, DTYPE_F32 },
    };
    static const int rows[] = { 1, 2, 7, 8, 9, 16, 33 };
    const size_t in = (size_t)shapes[_i].in_dim, dim = (size_t)shapes[_i].dim;
    struct test_random r = test_random(170 + (uint64_t)_i);
    const void *w[2];

    if (!gpu_backend())
        return;
    float *x = random_acts(&r, 33 * in, 1);
    const void *gpu_x = gpu_put_act(x, 33 * in);
    for (int i = 0; i < 2; i++) {
        void *weights = random_weights(&r, in * dim, shapes[_i].type, 0.1f);
        w[i] = gpu_put_weights(weights, in * dim, shapes[_i].type, 0);
        mem_free(weights);
    }
    bf16 *both = gpu_put(NULL, 33 * 2 * dim * sizeof *both);
    bf16 *scratch = gpu_put(NULL, 33 * 2 * dim * sizeof *scratch);
    bf16 *out[2] = { gpu_put(NULL, 33 * dim * sizeof *both), gpu_put(NULL, 33 * dim * 2) };
    bf16 *got = mem_alloc(33 * dim * sizeof *got), *want = mem_alloc(33 * dim * sizeof *want);
    for (size_t k = 0; k < sizeof rows / sizeof rows[0]; k++) {
        char text[100];
        for (int i = 0; i < 2; i++)
            gpu_ops()->linear(gpu_stream(), &(struct linear_args){
                .out = both + (size_t)i * dim, .x = gpu_x, .weight = w[i],
                .weight_type = shapes[_i].type, .rows = rows[k], .in_dim = (int)in,
                .out_dim = (int)dim, .out_stride = 2 * (int)dim });
        gpu_ops()->silu_mul(gpu_stream(), &(struct silu_mul_args){
            .out = out[0], .gate = both, .up = both + dim, .rows = rows[k], .dim = (int)dim,
            .in_stride = 2 * (int)dim });
        gpu_ops()->linear_gated(gpu_stream(), &(struct linear_gated_args){
            .out = out[1], .x = gpu_x, .gate = w[0], .up = w[1], .weight_type = shapes[_i].type,
            .scratch = scratch, .rows = rows[k], .in_dim = (int)in, .dim = (int)dim });
        gpu_get(want, out[0], (size_t)rows[k] * dim * sizeof *want);
        gpu_get(got, out[1], (size_t)rows[k] * dim * sizeof *got);
        snprintf(text, sizeof text, "gated, %d rows of %zu, %zu outputs", rows[k], in, dim);
        assert_same_bits(text, got, want, (size_t)rows[k], dim);
    }
    mem_free(got);
    mem_free(want);
    mem_free(x);
    gpu_forget();
}
END_TEST

TCase *gpu_linear_case(void)
{
    TCase *c = tcase_create("gpu_linear");

    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, gpu_clean, NULL);
    tcase_add_loop_test(c, bf16_linear_equals_cpu, 0, N_BF16_SETUPS);
    tcase_add_loop_test(c, f32_linear_equals_cpu, 0, N_F32_SETUPS);
    tcase_add_loop_test(c, odd_addresses_equal_cpu, 0, N_ODD_SETUPS);
    tcase_add_loop_test(c, logits_equal_cpu, 0, N_LOGITS_SETUPS);
    tcase_add_loop_test(c, linear_rows_are_independent, 0, N_BIT_SETUPS);
    tcase_add_loop_test(c, logits_rows_are_independent, 0, N_LOGITS_SETUPS);
    tcase_add_loop_test(c, runs_repeat, 0, N_BIT_SETUPS);
    tcase_add_loop_test(c, gated_is_its_parts, 0, 6);
    tcase_add_loop_test(c, logits_repeat, 0, N_LOGITS_SETUPS);
    tcase_add_test(c, nan_rows_spoil_no_other);
    return c;
}
