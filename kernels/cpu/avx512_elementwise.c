#include "kernels/cpu/elementwise.h"

#include "kernels/cpu/avx512_math.h"

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

static void avx512_silu_mul(float *out, const float *gate, const float *up, int n)
{
    __m512 one = _mm512_set1_ps(1), zero = _mm512_setzero_ps();

    for (int i = 0; i < n; i += LANES) {
        __mmask16 mask = lanes_from(i, n);
        __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
        __m512 below = _mm512_add_ps(one, avx512_exp(_mm512_sub_ps(zero, g)));
        __m512 v = _mm512_mul_ps(_mm512_div_ps(g, below), _mm512_maskz_loadu_ps(mask, up + i));
        _mm512_mask_storeu_ps(out + i, mask, v);
    }
}

const struct row_leaf avx512_row_leaf = {
    .add_square = avx512_add_square,
    .scale = avx512_scale,
    .silu_mul = avx512_silu_mul,
};
