#include "kernels/cpu/elementwise.h"

#include <immintrin.h>

enum { LANES = 16 };

#define INLINE static inline __attribute__((always_inline))

/* The next up to LANES of n elements from i on. */
INLINE __mmask16 lanes_from(int i, int n)
{
    return n - i >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << (n - i)) - 1);
}

static float avx512_add_square(float *x, const float *delta, int n)
{
    __m512 sum = _mm512_setzero_ps();

    for (int i = 0; i < n; i += LANES) {
        __mmask16 mask = lanes_from(i, n);
        __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
        if (delta) {
            v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, delta + i));
            _mm512_mask_storeu_ps(x + i, mask, v);
        }
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

static void avx512_scale(float *out, const float *x, float factor, const void *weight,
                         enum dtype weight_type, int n)
{
    __m512 by = _mm512_set1_ps(factor);

    for (int i = 0; i < n; i += LANES) {
        __mmask16 mask = lanes_from(i, n);
        __m512 w;
        if (weight_type == DTYPE_F32) {
            w = _mm512_maskz_loadu_ps(mask, (const float *)weight + i);
        } else {
            __m256i halves = _mm256_maskz_loadu_epi16(mask, (const bf16 *)weight + i);
            w = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
        }
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), by);
        _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(v, w));
    }
}

/* e^x = 2^n e^r with r = x - n ln 2 in two parts, |r| <= 0.347: the Taylor polynomial
 * of degree 7 is off by r^8 / 8!, 5e-9.  Arguments beyond the range of float are cut
 * where the result is already infinite or zero; the order of operands lets NaN by. */
INLINE __m512 exponential(__m512 x)
{
    x = _mm512_min_ps(_mm512_set1_ps(90), _mm512_max_ps(_mm512_set1_ps(-110), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    return _mm512_scalef_ps(p, n);
}

static void avx512_silu_mul(float *out, const float *gate, const float *up, int n)
{
    __m512 one = _mm512_set1_ps(1), zero = _mm512_setzero_ps();

    for (int i = 0; i < n; i += LANES) {
        __mmask16 mask = lanes_from(i, n);
        __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
        __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(zero, g)));
        __m512 v = _mm512_mul_ps(_mm512_div_ps(g, below), _mm512_maskz_loadu_ps(mask, up + i));
        _mm512_mask_storeu_ps(out + i, mask, v);
    }
}

const struct row_leaf avx512_row_leaf = {
    .add_square = avx512_add_square,
    .scale = avx512_scale,
    .silu_mul = avx512_silu_mul,
};
