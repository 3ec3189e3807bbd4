#include "kernels/ops.h"

#include "tests/support/backend_fixture.h"

#include <check.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Angles at long positions, where the rounding of the product to float decides: theta
 * is the base, values are those of the published models' tables. */
struct golden {
    uint32_t inv_freq;           /* bits of the float */
    int32_t position;
    double cosine, sine;
};

static const struct golden goldens[] = {
    { 0x3f800000, 1000, 0.5623791, 0.8268795 },      /* theta 1e6, dimension 128 */
    { 0x3f800000, 131071, -0.8179835, -0.5752417 },
    { 0x3f4e4bad, 1000, -0.0237063, 0.9997190 },
    { 0x3f4e4bad, 131071, -0.5900050, 0.8073996 },   /* exact angle: cosine -0.5855692 */
    { 0x3f263de0, 1000, -0.5994148, 0.8004385 },
    { 0x3f263de0, 131071, -0.9976752, 0.0681483 },
    { 0x3d0186e3, 1000, 0.9786824, 0.2053794 },
    { 0x3d0186e3, 131071, -0.4815346, -0.8764271 },
    { 0x3a83126f, 1000, 0.5403023, 0.8414710 },
    { 0x3a83126f, 131071, 0.6403117, -0.7681152 },
    { 0x35a68e4c, 1000, 0.9999992, 0.0012409 },
    { 0x35a68e4c, 131071, 0.9868015, 0.1619347 },
    { 0x3f470165, 1000, -0.1781740, -0.9839990 },    /* theta 1e7, dimension 128 */
    { 0x3f470165, 131071, -0.2994107, 0.9541243 },
    { 0x340a2036, 131071, 0.9998579, 0.0168601 },
    { 0x3f492c28, 1000, 0.9081914, 0.4185550 },      /* theta 5e6, dimension 128 */
    { 0x3f492c28, 131071, 0.7429676, -0.6693274 },
    { 0x3ed7e89b, 1000, 0.7497666, 0.6617024 },      /* theta 1e6, dimension 64 */
    { 0x3ed7e89b, 131071, 0.5423593, -0.8401466 },
    { 0x35ceaf79, 131071, 0.9796994, 0.2004720 },
    { 0x3f32a506, 1000, 0.9222261, 0.3866509 },      /* theta 1e5, dimension 64 */
};
enum { N_GOLDENS = sizeof goldens / sizeof goldens[0] };

static void run(const int32_t *positions, int rows, const float *inv_freq, int head_dim,
                float factor, float *out)
{
    struct backend *be = test_backend("auto");
    struct stream *s = stream_create(be);
    struct rope_table_args a = { .cos_sin = out, .positions = positions, .inv_freq = inv_freq,
                                 .factor = factor, .rows = rows, .head_dim = head_dim };

    backend_ops(be)->rope_table(s, &a);
    stream_destroy(s);
}

START_TEST(golden_values)
{
    const struct golden *g = &goldens[_i];
    float inv_freq, out[2];

    memcpy(&inv_freq, &g->inv_freq, sizeof inv_freq);
    run(&g->position, 1, &inv_freq, 2, 1, out);
    ck_assert_double_eq_tol((double)out[0], g->cosine, 1.5e-7);
    ck_assert_double_eq_tol((double)out[1], g->sine, 1.5e-7);
}
END_TEST

static float ulp_of(double v)
{
    float f = fabsf((float)v);
    return nextafterf(f, INFINITY) - f;
}

/* Every entry within two units in the last place of the function of the rounded
 * angle, over whole tables with a factor. */
START_TEST(two_ulp)
{
    enum { ROWS = 37, DIM = 64 };
    static float out[ROWS * DIM];
    const float factor = 1.1386294f;
    int32_t positions[ROWS];
    float inv_freq[DIM / 2];

    for (int i = 0; i < DIM / 2; i++)
        inv_freq[i] = powf(1e6f, -2.0f * (float)i / DIM);
    for (int t = 0; t < ROWS; t++)
        positions[t] = t * t * 191;
    run(positions, ROWS, inv_freq, DIM, factor, out);
    for (int t = 0; t < ROWS; t++)
        for (int i = 0; i < DIM / 2; i++) {
            volatile float angle = (float)positions[t] * inv_freq[i];
            double c = cos((double)angle) * (double)factor;
            double s = sin((double)angle) * (double)factor;
            ck_assert_double_le(fabs((double)out[t * DIM + i] - c), 2 * (double)ulp_of(c));
            ck_assert_double_le(fabs((double)out[t * DIM + DIM / 2 + i] - s),
                                2 * (double)ulp_of(s));
        }
}
END_TEST

TCase *rope_table_case(void)
{
    TCase *c = tcase_create("rope_table");

    tcase_add_loop_test(c, golden_values, 0, N_GOLDENS);
    tcase_add_test(c, two_ulp);
    return c;
}
