#include "kernels/cpu/elementwise.h"

#include "kernels/cpu/linear.h"

#include <immintrin.h>
#include <string.h>

enum { LANES = 8 };

#define INLINE static inline __attribute__((always_inline))

/* Rows that are not whole vectors end in a copy padded with zeros. */
INLINE __m256 load_tail(const float *x, int n)
{
    float part[LANES] = { 0 };

    memcpy(part, x, (size_t)n * sizeof part[0]);
    return _mm256_loadu_ps(part);
}

INLINE void store_tail(float *out, __m256 v, int n)
{
    float part[LANES];

    _mm256_storeu_ps(part, v);
    memcpy(out, part, (size_t)n * sizeof part[0]);
}

INLINE float sum_lanes(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));

    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

static float avx2_add_square(float *x, const float *delta, int n)
{
    __m256 sum = _mm256_setzero_ps();
    int i = 0;

    for (; i + LANES <= n; i += LANES) {
        __m256 v = _mm256_loadu_ps(x + i);
        if (delta) {
            v = _mm256_add_ps(v, _mm256_loadu_ps(delta + i));
            _mm256_storeu_ps(x + i, v);
        }
        sum = _mm256_fmadd_ps(v, v, sum);
    }
    if (i < n) {
        __m256 v = load_tail(x + i, n - i);
        if (delta) {
            v = _mm256_add_ps(v, load_tail(delta + i, n - i));
            store_tail(x + i, v, n - i);
        }
        sum = _mm256_fmadd_ps(v, v, sum);
    }
    return sum_lanes(sum);
}

static void avx2_scale(float *out, const float *x, float factor, const void *weight,
                       enum dtype weight_type, int n)
{
    __m256 by = _mm256_set1_ps(factor);
    int i = 0;

    for (; i + LANES <= n; i += LANES) {
        __m256 w;
        if (weight_type == DTYPE_F32) {
            w = _mm256_loadu_ps((const float *)weight + i);
        } else {
            const bf16 *halves = (const bf16 *)weight + i;
            __m128i v = _mm_loadu_si128((const __m128i_u *)(const void *)halves);
            w = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
        }
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), by), w));
    }
    for (; i < n; i++)
        out[i] = x[i] * factor * weight_at(weight, weight_type, (size_t)i);
}

/* 2^n for whole n in [-126, 127]. */
INLINE __m256 power_of_two(__m256i n)
{
    __m256i exponent = _mm256_add_epi32(n, _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

/* The method of avx512_elementwise.c.  2^n is multiplied in two halves, because n
 * itself may lie outside the range of an exponent. */
INLINE __m256 exponential(__m256 x)
{
    x = _mm256_min_ps(_mm256_set1_ps(90), _mm256_max_ps(_mm256_set1_ps(-110), x));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
    __m256 p = _mm256_set1_ps(1.0f / 5040);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(p, power_of_two(half)),
                         power_of_two(_mm256_sub_epi32(whole, half)));
}

INLINE __m256 silu_mul(__m256 gate, __m256 up)
{
    __m256 e = exponential(_mm256_sub_ps(_mm256_setzero_ps(), gate));

    return _mm256_mul_ps(_mm256_div_ps(gate, _mm256_add_ps(_mm256_set1_ps(1), e)), up);
}

static void avx2_silu_mul(float *out, const float *gate, const float *up, int n)
{
    int i = 0;

    for (; i + LANES <= n; i += LANES)
        _mm256_storeu_ps(out + i, silu_mul(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i)));
    if (i < n)
        store_tail(out + i, silu_mul(load_tail(gate + i, n - i), load_tail(up + i, n - i)),
                   n - i);
}

const struct row_leaf avx2_row_leaf = {
    .add_square = avx2_add_square,
    .scale = avx2_scale,
    .silu_mul = avx2_silu_mul,
};
