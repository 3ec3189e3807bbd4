#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/closeness.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <math.h>
#include <string.h>

static const int dims[] = { 1, 7, 8, 15, 16, 17, 64, 100, 576, 577 };
enum { N_DIMS = sizeof dims / sizeof dims[0], MAX_DIM = 577, ROWS = 11 };

struct rows {
    float x[ROWS * MAX_DIM], delta[ROWS * MAX_DIM], out[ROWS * MAX_DIM];
    float weight[MAX_DIM];
    bf16 half_weight[MAX_DIM];
};

static struct rows *make_rows(uint64_t seed)
{
    struct rows *d = mem_calloc(1, sizeof *d);
    struct test_random r = test_random(seed);

    random_floats(&r, d->x, ROWS * MAX_DIM, 2);
    random_floats(&r, d->delta, ROWS * MAX_DIM, 1);
    random_floats(&r, d->weight, MAX_DIM, 1);
    random_bf16s(&r, d->half_weight, MAX_DIM, 1);
    return d;
}

static void run(struct backend *be, struct rows *d, int dim, bool add, bool half)
{
    struct stream *s = stream_create(be);
    struct add_norm_args a = {
        .out = d->out,
        .x = d->x,
        .delta = add ? d->delta : NULL,
        .weight = half ? (void *)d->half_weight : (void *)d->weight,
        .weight_type = half ? DTYPE_BF16 : DTYPE_F32,
        .rows = ROWS,
        .dim = dim,
        .eps = 1e-5f,
    };

    backend_ops(be)->add_norm(s, &a);
    stream_destroy(s);
}

/* The scalar leaf against the formula in double precision. */
START_TEST(scalar_is_right)
{
    const int dim = dims[_i];
    struct rows *d = make_rows(1), *was = make_rows(1);

    run(test_backend("scalar"), d, dim, true, false);
    for (int r = 0; r < ROWS; r++) {
        double square = 0, x[MAX_DIM];
        float want[MAX_DIM];
        for (int i = 0; i < dim; i++) {
            x[i] = (double)was->x[r * dim + i] + (double)was->delta[r * dim + i];
            square += x[i] * x[i];
        }
        for (int i = 0; i < dim; i++)
            want[i] = (float)(x[i] / sqrt(square / dim + 1e-5) * (double)was->weight[i]);
        ck_assert(row_close("norm", d->out + r * dim, want, (size_t)dim, 2e-6));
    }
    mem_free(d);
    mem_free(was);
}
END_TEST

START_TEST(vectors_equal_scalar)
{
    struct backend *be = test_backend(test_isa(_i % TEST_N_ISAS));
    const int dim = dims[_i / TEST_N_ISAS];

    for (int k = 0; be && k < 4; k++) {
        struct rows *got = make_rows(2), *want = make_rows(2);
        run(test_backend("scalar"), want, dim, k & 1, k & 2);
        run(be, got, dim, k & 1, k & 2);
        ck_assert(rows_close("norm", got->out, want->out, ROWS, (size_t)dim, (size_t)dim, 1e-5));
        ck_assert(floats_identical("x", got->x, want->x, ROWS * MAX_DIM));
        mem_free(got);
        mem_free(want);
    }
}
END_TEST

/* rows_of gathers, in any order, the very bits of the whole batch; x stays. */
START_TEST(gathers_rows)
{
    static const int32_t rows_of[] = { 10, 3, 3, 0 };
    static const char *const isas[] = { "scalar", "avx2", "avx512" };
    struct backend *be = test_backend(isas[_i]);
    const int dim = 100;

    if (!be)
        return;
    struct rows *all = make_rows(4), *some = make_rows(4);
    struct stream *s = stream_create(be);
    struct add_norm_args a = { .out = some->out, .x = some->x, .rows_of = rows_of,
                               .weight = some->weight, .weight_type = DTYPE_F32, .rows = 4,
                               .dim = dim, .eps = 1e-5f };
    run(be, all, dim, false, false);
    backend_ops(be)->add_norm(s, &a);
    for (int r = 0; r < 4; r++)
        ck_assert(floats_identical("gathered", some->out + r * dim,
                                   all->out + rows_of[r] * dim, (size_t)dim));
    ck_assert(floats_identical("x", some->x, all->x, ROWS * MAX_DIM));
    ck_assert_float_eq(some->out[4 * dim], 0);
    stream_destroy(s);
    mem_free(all);
    mem_free(some);
}
END_TEST

/* Rows that lie apart, as the first part of wider ones do, with and without delta: what is
 * between them stays, and out is as it is of rows that are neighbours. */
START_TEST(rows_may_lie_apart)
{
    static const char *const isas[] = { "scalar", "avx2", "avx512" };
    struct backend *be = test_backend(isas[_i % 3]);
    const int dim = 100, stride = MAX_DIM;
    const bool add = _i / 3;

    if (!be)
        return;
    struct rows *apart = make_rows(6), *close = make_rows(6), *was = make_rows(6);
    struct stream *s = stream_create(be);
    for (int r = 0; r < ROWS; r++) {
        memcpy(close->x + r * dim, was->x + r * stride, (size_t)dim * sizeof(float));
        memcpy(close->delta + r * dim, was->delta + r * stride, (size_t)dim * sizeof(float));
    }
    run(be, close, dim, add, false);
    backend_ops(be)->add_norm(s, &(struct add_norm_args){
        .out = apart->out, .x = apart->x, .x_stride = stride,
        .delta = add ? apart->delta : NULL, .weight = apart->weight,
        .weight_type = DTYPE_F32, .rows = ROWS, .dim = dim, .eps = 1e-5f });
    ck_assert(floats_identical("apart", apart->out, close->out, (size_t)(ROWS * dim)));
    for (int r = 0; r < ROWS; r++) {
        ck_assert(floats_identical("x", apart->x + r * stride, close->x + r * dim, (size_t)dim));
        ck_assert(floats_identical("between", apart->x + r * stride + dim,
                                   was->x + r * stride + dim, (size_t)(stride - dim)));
    }
    stream_destroy(s);
    mem_free(apart);
    mem_free(close);
    mem_free(was);
}
END_TEST

/* A row of zeros gives zeros, not NaN: eps keeps the root away from 0. */
START_TEST(zero_rows_stay_zero)
{
    static const char *const isas[] = { "scalar", "avx2", "avx512" };
    struct backend *be = test_backend(isas[_i]);

    if (!be)
        return;
    struct rows *d = make_rows(5);
    memset(d->x, 0, sizeof d->x);
    run(be, d, 64, false, true);
    for (int i = 0; i < ROWS * 64; i++)
        ck_assert_float_eq(d->out[i], 0);
    mem_free(d);
}
END_TEST

TCase *norm_case(void)
{
    TCase *c = tcase_create("norm");

    tcase_add_loop_test(c, scalar_is_right, 0, N_DIMS);
    tcase_add_loop_test(c, vectors_equal_scalar, 0, N_DIMS * TEST_N_ISAS);
    tcase_add_loop_test(c, gathers_rows, 0, 3);
    tcase_add_loop_test(c, rows_may_lie_apart, 0, 6);
    tcase_add_loop_test(c, zero_rows_stay_zero, 0, 3);
    return c;
}
