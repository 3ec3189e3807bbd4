#include "kernels/cpu/elementwise.h"

#include "kernels/cpu/avx2_math.h"
#include "kernels/cpu/linear.h"

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

INLINE __m256 silu_mul(__m256 gate, __m256 up)
{
    __m256 e = avx2_exp(_mm256_sub_ps(_mm256_setzero_ps(), gate));

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
