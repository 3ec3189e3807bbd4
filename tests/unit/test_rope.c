/* engine/model/rope.h against the published formulas, evaluated here in double.  The
 * product rounds to float in the reference's order, so the two agree to a few units in
 * the last place; golden bits are in test_model_config.c. */

#include "engine/model/rope.h"

#include <check.h>
#include <math.h>

enum { MAX_DIM = 256 };

static const int dims[] = { 2, 16, 64, 96, 128, 256 };
static const double thetas[] = { 10000, 100000, 500000, 1e6, 1e7 };
enum { N_DIMS = sizeof dims / sizeof *dims, N_THETAS = sizeof thetas / sizeof *thetas };

#define PI 3.141592653589793

static double plain(double theta, int i, int dim)
{
    return pow(theta, -2.0 * i / dim);
}

/* powf of theta 1e7 with an exponent rounded to float: ln(theta) * 2^-25 of the value. */
static void close_to(float got, double want, int i)
{
    ck_assert_msg(fabs((double)got - want) <= 1.2e-6 * fabs(want), "i %d: %.9g, not %.9g", i,
                  (double)got, want);
}

START_TEST(default_and_linear)
{
    float freq[MAX_DIM / 2], factor;

    for (int d = 0; d < N_DIMS; d++)
        for (int t = 0; t < N_THETAS; t++) {
            struct rope_params p = { .kind = ROPE_DEFAULT, .theta = thetas[t] };
            rope_frequencies(freq, &factor, &p, dims[d]);
            ck_assert(freq[0] == 1 && factor == 1);
            for (int i = 0; i < dims[d] / 2; i++)
                close_to(freq[i], plain(thetas[t], i, dims[d]), i);
            p.kind = ROPE_LINEAR;
            p.factor = 3;
            rope_frequencies(freq, &factor, &p, dims[d]);
            ck_assert(factor == 1);
            for (int i = 0; i < dims[d] / 2; i++)
                close_to(freq[i], plain(thetas[t], i, dims[d]) / 3, i);
        }
}
END_TEST

/* ---- llama3 */

static double llama3(double f, const struct rope_params *p)
{
    double wave = 2 * PI / f;
    double low = p->original / p->low_freq_factor, high = p->original / p->high_freq_factor;

    if (wave < high)
        return f;
    if (wave > low)
        return f / p->factor;
    double s = (p->original / wave - p->low_freq_factor)
               / (p->high_freq_factor - p->low_freq_factor);
    return (1 - s) * f / p->factor + s * f;
}

START_TEST(llama3_scaling)
{
    static const double factors[] = { 1, 8, 32 }, originals[] = { 1024, 8192 };
    float freq[MAX_DIM / 2], factor;
    int kept = 0, blended = 0, stretched = 0;

    for (int d = 0; d < N_DIMS; d++)
        for (int k = 0; k < 6; k++) {
            struct rope_params p = {
                .kind = ROPE_LLAMA3, .theta = 5e5, .factor = factors[k % 3],
                .original = originals[k / 3], .low_freq_factor = 1, .high_freq_factor = 4,
            };
            rope_frequencies(freq, &factor, &p, dims[d]);
            ck_assert(factor == 1);
            for (int i = 0; i < dims[d] / 2; i++) {
                double f = plain(5e5, i, dims[d]), want = llama3(f, &p);
                /* The blend subtracts; where f is near the lower border the float of
                 * original / wave - low has lost digits. */
                ck_assert_double_eq_tol((double)freq[i], want, 2e-6 * f);
                kept += want == f;
                stretched += want == f / p.factor;
                blended += want != f && want != f / p.factor;
            }
        }
    ck_assert(kept > 50 && blended > 10 && stretched > 50);
}
END_TEST

/* ---- yarn */

static double clamp(double x, double low, double high)
{
    return x < low ? low : x > high ? high : x;
}

static double yarn(int i, int dim, const struct rope_params *p)
{
    double ends[2], rotations[2] = { p->beta_fast, p->beta_slow };

    for (int e = 0; e < 2; e++)
        ends[e] = dim * log(p->original / (2 * PI * rotations[e])) / (2 * log(p->theta));
    if (p->truncate) {
        ends[0] = floor(ends[0]);
        ends[1] = ceil(ends[1]);
    }
    ends[0] = ends[0] < 0 ? 0 : ends[0];
    ends[1] = ends[1] > dim - 1 ? dim - 1 : ends[1];
    if (ends[0] == ends[1])
        ends[1] += 0.001;
    double ramp = clamp((i - ends[0]) / (ends[1] - ends[0]), 0, 1), f = plain(p->theta, i, dim);
    return f * (1 - ramp) + f / p->factor * ramp;
}

START_TEST(yarn_scaling)
{
    static const double originals[] = { 40, 2048, 32768, 1 << 20 };
    float freq[MAX_DIM / 2], factor;

    for (int d = 0; d < N_DIMS; d++)
        for (int t = 0; t < N_THETAS; t++)
            for (int k = 0; k < 8; k++) {
                struct rope_params p = {
                    .kind = ROPE_YARN, .theta = thetas[t], .factor = 1 + 1.5 * k,
                    .original = originals[k % 4], .beta_fast = 32, .beta_slow = 1,
                    .truncate = k < 4,
                };
                rope_frequencies(freq, &factor, &p, dims[d]);
                close_to(factor, k == 0 ? 1 : 0.1 * log(p.factor) + 1, -1);
                for (int i = 0; i < dims[d] / 2; i++)
                    ck_assert_double_eq_tol((double)freq[i], yarn(i, dims[d], &p),
                                            2e-6 * plain(p.theta, i, dims[d]));
            }
}
END_TEST

/* q.k is multiplied by the square of the factor, whose sources have an order. */
START_TEST(yarn_factor)
{
    struct rope_params p = { .kind = ROPE_YARN, .theta = 1e6, .factor = 4, .original = 32768,
                             .beta_fast = 32, .beta_slow = 1, .truncate = true };
    float freq[64], factor;

    rope_frequencies(freq, &factor, &p, 128);
    close_to(factor, 1.138629436111989, -1);
    p.mscale = 0.7;
    rope_frequencies(freq, &factor, &p, 128);
    close_to(factor, 1.138629436111989, -1);             /* one of the two is not enough */
    p.mscale_all_dim = 0.5;
    rope_frequencies(freq, &factor, &p, 128);
    close_to(factor, (0.07 * log(4) + 1) / (0.05 * log(4) + 1), -1);
    p.attention_factor = 0.9;
    rope_frequencies(freq, &factor, &p, 128);
    close_to(factor, 0.9, -1);
    p = (struct rope_params){ .kind = ROPE_YARN, .theta = 1e6, .factor = 1, .original = 32768,
                              .beta_fast = 32, .beta_slow = 1, .mscale = 5, .mscale_all_dim = 1 };
    rope_frequencies(freq, &factor, &p, 128);
    ck_assert(factor == 1);                              /* nothing is stretched */
}
END_TEST

/* A hostile config must not make a frequency that is not a number. */
START_TEST(extreme_parameters_stay_finite)
{
    static const double extremes[] = { 1e-3, 1, 3, 1e3, 1e6 };
    static const double originals[] = { 1, 2, 1 << 24 };
    float freq[MAX_DIM / 2], factor;

    for (int kind = ROPE_DEFAULT; kind <= ROPE_YARN; kind++)
        for (int n = 0; n < 5 * 5 * 3 * 2; n++) {
            double x = extremes[n % 5], y = extremes[n / 5 % 5];
            struct rope_params p = {
                .kind = (enum rope_kind)kind, .theta = n / 75 ? 1e12 : 2,
                .factor = x < 1 ? 1 : x, .original = originals[n / 25 % 3],
                .low_freq_factor = x, .high_freq_factor = x + y,
                .beta_slow = x, .beta_fast = x + y, .truncate = n % 2 == 0,
            };
            for (int d = 0; d < N_DIMS; d++) {
                rope_frequencies(freq, &factor, &p, dims[d]);
                ck_assert(isfinite(factor) && factor >= 1);
                for (int i = 0; i < dims[d] / 2; i++)
                    ck_assert_msg(isfinite(freq[i]) && freq[i] > 0 && freq[i] <= 1,
                                  "kind %d, case %d, i %d: %g", kind, n, i, (double)freq[i]);
            }
        }
}
END_TEST

TCase *rope_case(void)
{
    TCase *tc = tcase_create("rope");

    tcase_add_test(tc, default_and_linear);
    tcase_add_test(tc, llama3_scaling);
    tcase_add_test(tc, yarn_scaling);
    tcase_add_test(tc, yarn_factor);
    tcase_add_test(tc, extreme_parameters_stay_finite);
    return tc;
}
