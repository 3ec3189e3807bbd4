#include "kernels/cpu/attend.h"

#include "kernels/cpu/avx2_math.h"

#include <math.h>

enum { LANES = 8, TOKEN_VECS = 2, PAIR_VECS = 1 };

typedef __m256 vec;
typedef __m256i ivec;

#define vec_zero()      _mm256_setzero_ps()
#define vec_set(x)      _mm256_set1_ps(x)
#define vec_load(p)     _mm256_loadu_ps(p)
#define vec_store(p, x) _mm256_storeu_ps(p, x)
#define vec_mul(a, b)   _mm256_mul_ps(a, b)
#define vec_add(a, b)   _mm256_add_ps(a, b)
#define vec_sub(a, b)   _mm256_sub_ps(a, b)
#define vec_max(a, b)   _mm256_max_ps(a, b)
#define vec_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define vec_exp(x)      avx2_exp(x)
#define pair_load(p)    _mm256_loadu_si256((const __m256i_u *)(const void *)(p))
#define pair_even(x)    _mm256_castsi256_ps(_mm256_slli_epi32(x, 16))
#define pair_odd(x) \
    _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000)))

static inline float vec_top(vec x)
{
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));

    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}

static inline float vec_total(vec x)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));

    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

static inline vec vec_below(vec x, int n)
{
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);

    return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, _mm256_castsi256_ps(below));
}

/* Words of 8 rows into 8 vectors, one for each word. */
static inline void transpose_tile(uint32_t *keys, const bf16 *const *row, int word)
{
    __m256i a[8], b[8];

    for (int i = 0; i < 8; i++)
        a[i] = pair_load(row[i] + 2 * word);
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    /* a[4g + c] holds word 4h + c of rows 4g..4g + 3 in its half h. */
    for (int c = 0; c < 4; c++) {
        __m256i_u *low = (__m256i_u *)(void *)(keys + (word + c) * BLOCK_TOKENS);
        __m256i_u *high = (__m256i_u *)(void *)(keys + (word + c + 4) * BLOCK_TOKENS);
        _mm256_storeu_si256(low, _mm256_permute2x128_si256(a[c], a[4 + c], 0x20));
        _mm256_storeu_si256(high, _mm256_permute2x128_si256(a[c], a[4 + c], 0x31));
    }
}

static void transpose_keys(uint32_t *keys, const bf16 *const *row, int head_dim)
{
    for (int token = 0; token < BLOCK_TOKENS; token += 8)
        for (int word = 0; word < head_dim / 2; word += 8)
            transpose_tile(keys + token, row + token, word);
}

#include "kernels/cpu/attend_vector.h"

const struct attend_leaf avx2_attend_leaf = {
    .take = vector_take,
    .finish = vector_finish,
};
