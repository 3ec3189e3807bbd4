#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/closeness.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <math.h>

static const int dims[] = { 1, 7, 8, 9, 15, 16, 17, 100, 1536, 2049, 4500 };
enum { N_DIMS = sizeof dims / sizeof dims[0], MAX_DIM = 4500, ROWS = 3, GAP = 5 };

/* gate and up lie side by side in one matrix, as the forward pass has them. */
static void run(struct backend *be, const float *both, float *out, int dim)
{
    struct stream *s = stream_create(be);
    struct silu_mul_args a = { .out = out, .gate = both, .up = both + dim, .rows = ROWS,
                               .dim = dim, .in_stride = 2 * dim + GAP };

    backend_ops(be)->silu_mul(s, &a);
    stream_destroy(s);
}

START_TEST(scalar_is_right)
{
    enum { DIM = 2000 };
    static float both[ROWS * (2 * DIM + GAP)], out[ROWS * DIM], want[ROWS * DIM];
    struct test_random r = test_random(1);

    random_floats(&r, both, sizeof both / sizeof both[0], 4);
    run(test_backend("scalar"), both, out, DIM);
    for (int t = 0; t < ROWS; t++)
        for (int i = 0; i < DIM; i++) {
            double g = (double)both[t * (2 * DIM + GAP) + i];
            double u = (double)both[t * (2 * DIM + GAP) + DIM + i];
            want[t * DIM + i] = (float)(g / (1 + exp(-g)) * u);
        }
    ck_assert(rows_close("silu", out, want, ROWS, DIM, DIM, 5e-7));
}
END_TEST

START_TEST(vectors_equal_scalar)
{
    struct backend *be = test_backend(test_isa(_i % TEST_N_ISAS));
    const int dim = dims[_i / TEST_N_ISAS];
    size_t n = (size_t)ROWS * (2 * (size_t)dim + GAP);
    struct test_random r = test_random((uint64_t)dim);

    if (!be)
        return;
    float *both = mem_alloc(n * sizeof *both);
    float *got = mem_calloc((size_t)ROWS * (size_t)dim + 1, sizeof *got);
    float *want = mem_calloc((size_t)ROWS * (size_t)dim + 1, sizeof *want);
    random_floats(&r, both, n, 4);
    run(be, both, got, dim);
    run(test_backend("scalar"), both, want, dim);
    ck_assert(rows_close("silu", got, want, ROWS, (size_t)dim, (size_t)dim, 1e-6));
    ck_assert_float_eq(got[ROWS * dim], 0);
    mem_free(both);
    mem_free(got);
    mem_free(want);
}
END_TEST

/* Each element by itself over the range of float: relative error, limits, NaN. */
START_TEST(every_magnitude)
{
    static const float gates[] = { 0, -0.0f, 1e-30f, -1e-30f, 0.5f, -0.5f, 20, -20, 80, -80,
                                   -86, -87.5f, -88, -88.7f, 88.7f, 1e4f, 3e38f };
    enum { N = sizeof gates / sizeof gates[0] };
    static const char *const isas[] = { "scalar", "avx2", "avx512" };
    struct backend *be = test_backend(isas[_i]);
    float both[ROWS * (2 * N + GAP)], out[ROWS * N];

    if (!be)
        return;
    for (int t = 0; t < ROWS; t++)
        for (int i = 0; i < 2 * N + GAP; i++)
            both[t * (2 * N + GAP) + i] = i < N ? gates[i] : 1;
    both[2 * N + GAP] = NAN;
    both[2 * N + GAP + 1] = -3e38f;
    run(be, both, out, N);
    for (int i = 0; i < N; i++) {
        double g = (double)gates[i], want = g / (1 + exp(-g));
        ck_assert_double_eq_tol((double)out[i], want, 1e-6 * fabs(want) + 1e-36);
    }
    ck_assert(isnan(out[N]));
    ck_assert_float_eq_tol(out[N + 1], 0, 1e-30f);
    ck_assert_float_eq(out[N + 2], out[2]);
}
END_TEST

/* linear_gated is two products and this. */
START_TEST(gated_product_is_its_parts)
{
    enum { IN = 96, DIM = 200 };
    static float x[ROWS * IN], both[ROWS * 2 * DIM], want[ROWS * DIM], out[ROWS * DIM];
    static float weight[2][DIM * IN], scratch[ROWS * 2 * DIM];
    struct backend *be = test_backend("auto");
    const struct backend_ops *ops = backend_ops(be);
    struct stream *s = stream_create(be);
    struct test_random r = test_random(2);

    random_floats(&r, x, sizeof x / sizeof x[0], 1);
    random_floats(&r, weight[0], 2 * DIM * IN, 0.5f);
    for (int i = 0; i < 2; i++)
        ops->linear(s, &(struct linear_args){
            .out = both + i * DIM, .x = x, .weight = weight[i], .weight_type = DTYPE_F32,
            .rows = ROWS, .in_dim = IN, .out_dim = DIM, .out_stride = 2 * DIM });
    ops->silu_mul(s, &(struct silu_mul_args){ .out = want, .gate = both, .up = both + DIM,
                                              .rows = ROWS, .dim = DIM, .in_stride = 2 * DIM });
    ops->linear_gated(s, &(struct linear_gated_args){
        .out = out, .x = x, .gate = weight[0], .up = weight[1], .weight_type = DTYPE_F32,
        .scratch = scratch, .rows = ROWS, .in_dim = IN, .dim = DIM });
    stream_destroy(s);
    ck_assert_mem_eq(out, want, sizeof out);
}
END_TEST

TCase *silu_mul_case(void)
{
    TCase *c = tcase_create("silu_mul");

    tcase_add_test(c, scalar_is_right);
    tcase_add_loop_test(c, vectors_equal_scalar, 0, N_DIMS * TEST_N_ISAS);
    tcase_add_loop_test(c, every_magnitude, 0, 3);
    tcase_add_test(c, gated_product_is_its_parts);
    return c;
}
