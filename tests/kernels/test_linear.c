#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/closeness.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static const int in_dims[] = { 1, 3, 15, 16, 17, 63, 64, 100, 576, 577 };
static const int row_counts[] = { 1, 2, 3, 5, 6, 7, 13, 64, 65 };
enum {
    N_IN = sizeof in_dims / sizeof in_dims[0],
    N_ROWS = sizeof row_counts / sizeof row_counts[0],
    MAX_IN = 577,
    MAX_OUT = 130,
    MAX_ROWS = 65,
    STRIDE = 137,                /* of out: wider than any row */
};

/* One product with weights that begin one element after an aligned address. */
struct problem {
    float *x, *got, *want;
    char *weight, *bias;
    enum dtype type;
};

static void make_problem(struct problem *p, enum dtype type, uint64_t seed)
{
    struct test_random r = test_random(seed);
    size_t e = dtype_bytes(type), n_w = (size_t)MAX_IN * MAX_OUT;

    p->type = type;
    p->x = mem_alloc((size_t)MAX_ROWS * MAX_IN * sizeof(float));
    p->got = mem_alloc((size_t)MAX_ROWS * STRIDE * sizeof(float));
    p->want = mem_alloc((size_t)MAX_ROWS * STRIDE * sizeof(float));
    p->weight = (char *)mem_alloc((n_w + 1) * e) + e;
    p->bias = (char *)mem_alloc((MAX_OUT + 1) * e) + e;
    random_floats(&r, p->x, (size_t)MAX_ROWS * MAX_IN, 1);
    if (type == DTYPE_F32) {
        random_floats(&r, (float *)(void *)p->weight, n_w, 0.1f);
        random_floats(&r, (float *)(void *)p->bias, MAX_OUT, 1);
    } else {
        random_bf16s(&r, (bf16 *)(void *)p->weight, n_w, 0.1f);
        random_bf16s(&r, (bf16 *)(void *)p->bias, MAX_OUT, 1);
    }
}

static void free_problem(struct problem *p)
{
    size_t e = dtype_bytes(p->type);

    mem_free(p->x);
    mem_free(p->got);
    mem_free(p->want);
    mem_free(p->weight - e);
    mem_free(p->bias - e);
}

static void run(struct backend *be, const struct problem *p, float *out, int rows, int in_dim,
                int out_dim, bool bias)
{
    struct stream *s = stream_create(be);
    struct linear_args a = {
        .out = out,
        .x = p->x,
        .weight = p->weight,
        .bias = bias ? p->bias : NULL,
        .weight_type = p->type,
        .rows = rows,
        .in_dim = in_dim,
        .out_dim = out_dim,
        .out_stride = STRIDE,
    };

    for (size_t i = 0; i < (size_t)MAX_ROWS * STRIDE; i++)
        out[i] = -77;
    backend_ops(be)->linear(s, &a);
    ck_assert_int_eq(stream_sync(s, NULL), ST_OK);
    stream_destroy(s);
}

/* What no output may touch: the gap after each row and the rows after the last. */
static void assert_untouched(const float *out, int rows, int out_dim)
{
    for (int r = 0; r < MAX_ROWS; r++)
        for (int o = r < rows ? out_dim : 0; o < STRIDE; o++)
            if (out[r * STRIDE + o] != -77)
                ck_abort_msg("row %d, element %d was written", r, o);
}

/* The scalar leaf against sums in double precision. */
START_TEST(scalar_is_right)
{
    struct problem p;
    const int dim = in_dims[_i], rows = 5, outs = 9;

    make_problem(&p, DTYPE_BF16, 7);
    run(test_backend("scalar"), &p, p.got, rows, dim, outs, true);
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outs; o++) {
            double sum = 0;
            for (int k = 0; k < dim; k++) {
                uint32_t u = (uint32_t)((bf16 *)(void *)p.weight)[o * dim + k] << 16;
                float w;
                memcpy(&w, &u, sizeof w);
                sum += (double)w * (double)p.x[r * dim + k];
            }
            uint32_t u = (uint32_t)((bf16 *)(void *)p.bias)[o] << 16;
            float bias;
            memcpy(&bias, &u, sizeof bias);
            p.want[r * STRIDE + o] = (float)(sum + (double)bias);
        }
    ck_assert(rows_close("scalar", p.got, p.want, rows, outs, STRIDE, 1e-6 * sqrt(dim)));
    free_problem(&p);
}
END_TEST

/* Check writes to a file for each assertion, so loops over elements abort instead.
 *
 * A row's tolerance is that of MAX_OUT outputs: the largest of one or two may be close
 * to 0 by chance. */
static void row_scales(float *scale, const struct problem *p, int rows, int in_dim)
{
    run(test_backend("scalar"), p, p->want, rows, in_dim, MAX_OUT, true);
    for (int r = 0; r < rows; r++) {
        scale[r] = 0;
        for (int o = 0; o < MAX_OUT; o++)
            scale[r] = fmaxf(scale[r], fabsf(p->want[r * STRIDE + o]));
    }
}

static void assert_rows_close(const struct problem *p, const float *scale, int rows,
                              int in_dim, int outs)
{
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outs; o++) {
            float got = p->got[r * STRIDE + o], want = p->want[r * STRIDE + o];
            if (!(fabsf(got - want) <= 1e-5f * sqrtf((float)in_dim) * scale[r]))
                ck_abort_msg("%d rows of %d, %d outputs: row %d, output %d is %g, not %g",
                             rows, in_dim, outs, r, o, (double)got, (double)want);
        }
}

static void compare_shapes(struct backend *be, const struct problem *p, int in_dim)
{
    float scale[MAX_ROWS];

    for (int j = 0; j < N_ROWS; j++) {
        int rows = row_counts[j];
        row_scales(scale, p, rows, in_dim);
        for (int outs = 1; outs <= MAX_OUT; outs += outs < 20 ? 1 : 11) {
            bool bias = outs % 2;
            run(test_backend("scalar"), p, p->want, rows, in_dim, outs, bias);
            run(be, p, p->got, rows, in_dim, outs, bias);
            assert_rows_close(p, scale, rows, in_dim, outs);
            assert_untouched(p->got, rows, outs);
        }
    }
}

START_TEST(vectors_equal_scalar)
{
    struct backend *be = test_backend(test_isa(_i % TEST_N_ISAS));
    struct problem p;

    for (int type = 0; be && type < 2; type++) {
        make_problem(&p, type ? DTYPE_BF16 : DTYPE_F32, (uint64_t)_i);
        compare_shapes(be, &p, in_dims[_i / TEST_N_ISAS]);
        free_problem(&p);
    }
}
END_TEST

/* Each row of a batch, bit for bit, as it comes out alone; any number of rows. */
static void rows_are_independent(struct backend *be, int dim)
{
    const int outs = 27;
    struct problem p;
    struct stream *s = stream_create(be);
    float alone[27];

    make_problem(&p, dim % 2 ? DTYPE_F32 : DTYPE_BF16, 3);
    for (int rows = 2; rows <= MAX_ROWS; rows++) {
        run(be, &p, p.got, rows, dim, outs, true);
        for (int r = 0; r < rows; r++) {
            struct linear_args a = {
                .out = alone,
                .x = p.x + (size_t)r * (size_t)dim,
                .weight = p.weight,
                .bias = p.bias,
                .weight_type = p.type,
                .rows = 1,
                .in_dim = dim,
                .out_dim = outs,
                .out_stride = outs,
            };
            backend_ops(be)->linear(s, &a);
            ck_assert_msg(floats_identical("alone", p.got + r * STRIDE, alone, (size_t)outs),
                          "row %d of %d, %d inputs", r, rows, dim);
        }
    }
    stream_destroy(s);
    free_problem(&p);
}

START_TEST(batches_do_not_change_a_bit)
{
    static const char *const isas[] = { "scalar", "avx2", "avx512" };
    struct backend *be = test_backend(isas[_i]);

    if (!be)
        return;
    rows_are_independent(be, 17);
    rows_are_independent(be, 64);
    rows_are_independent(be, 100);
    rows_are_independent(be, 577);
}
END_TEST

/* Threads and the cut into tasks change nothing either: 1 thread against 5, with rows
 * enough for several tasks of rows. */
START_TEST(threads_do_not_change_a_bit)
{
    enum { ROWS = 700, DIM = 577, OUTS = 50 };
    struct backend_options one = { .threads = 1 }, five = { .threads = 5 };
    struct test_random r = test_random(11);
    float *x = mem_alloc((size_t)ROWS * DIM * sizeof *x), *out[2];
    bf16 *weight = mem_alloc((size_t)OUTS * DIM * sizeof *weight);

    random_floats(&r, x, (size_t)ROWS * DIM, 1);
    random_bf16s(&r, weight, (size_t)OUTS * DIM, 1);
    for (int i = 0; i < 2; i++) {
        struct backend *be;
        out[i] = mem_alloc((size_t)ROWS * OUTS * sizeof(float));
        ck_assert_int_eq(backend_open(&be, "cpu", i ? &five : &one, NULL), ST_OK);
        struct stream *s = stream_create(be);
        struct logits_args a = { .out = out[i], .x = x, .weight = weight, .rows = ROWS,
                                 .weight_type = DTYPE_BF16, .dim = DIM, .vocab = OUTS };
        backend_ops(be)->logits(s, &a);
        stream_destroy(s);
        backend_close(be);
    }
    ck_assert(floats_identical("threads", out[1], out[0], (size_t)ROWS * OUTS));
    mem_free(x);
    mem_free(weight);
    mem_free(out[0]);
    mem_free(out[1]);
}
END_TEST

/* logits is linear without bias. */
START_TEST(logits_equal_linear)
{
    struct backend *be = test_backend("auto");
    struct stream *s = stream_create(be);
    struct problem p;

    make_problem(&p, DTYPE_BF16, 5);
    for (int rows = 1; rows < 9; rows++) {
        struct logits_args a = { .out = p.want, .x = p.x, .weight = p.weight,
                                 .weight_type = p.type, .rows = rows, .dim = 65, .vocab = 99 };
        run(be, &p, p.got, rows, 65, 99, false);
        backend_ops(be)->logits(s, &a);
        for (int r = 0; r < rows; r++)
            ck_assert(floats_identical("logits", p.want + r * 99, p.got + r * STRIDE, 99));
    }
    stream_destroy(s);
    free_problem(&p);
}
END_TEST

TCase *linear_case(void)
{
    TCase *c = tcase_create("linear");

    tcase_set_timeout(c, 60);
    tcase_add_loop_test(c, scalar_is_right, 0, N_IN);
    tcase_add_loop_test(c, vectors_equal_scalar, 0, N_IN * TEST_N_ISAS);
    tcase_add_loop_test(c, batches_do_not_change_a_bit, 0, 3);
    tcase_add_test(c, threads_do_not_change_a_bit);
    tcase_add_test(c, logits_equal_linear);
    return c;
}
