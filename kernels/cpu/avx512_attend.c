#include "kernels/cpu/attend.h"

#include "kernels/cpu/avx512_math.h"

#include <math.h>

enum { LANES = 16, TOKEN_VECS = 4, PAIR_VECS = 2 };

typedef __m512 vec;
typedef __m512i ivec;

#define vec_zero()      _mm512_setzero_ps()
#define vec_set(x)      _mm512_set1_ps(x)
#define vec_load(p)     _mm512_loadu_ps(p)
#define vec_store(p, x) _mm512_storeu_ps(p, x)
#define vec_mul(a, b)   _mm512_mul_ps(a, b)
#define vec_add(a, b)   _mm512_add_ps(a, b)
#define vec_sub(a, b)   _mm512_sub_ps(a, b)
#define vec_max(a, b)   _mm512_max_ps(a, b)
#define vec_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define vec_top(x)      _mm512_reduce_max_ps(x)
#define vec_total(x)    _mm512_reduce_add_ps(x)
#define vec_exp(x)      avx512_exp(x)
#define pair_load(p)    _mm512_loadu_si512(p)
#define pair_even(x)    _mm512_castsi512_ps(_mm512_slli_epi32(x, 16))
#define pair_odd(x) \
    _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)))

static inline vec vec_below(vec x, int n)
{
    unsigned lanes = n >= LANES ? 0xffffu : n <= 0 ? 0 : (1u << n) - 1;

    return _mm512_mask_blend_ps((__mmask16)lanes, _mm512_set1_ps(-INFINITY), x);
}

/* Words of 16 rows into 16 vectors, one for each word: words trade places in pairs,
 * then pairs in fours, then fours across the vector twice. */
static inline void transpose_tile(uint32_t *keys, const bf16 *const *row, int word)
{
    __m512i a[16], b[16];

    for (int i = 0; i < 16; i++)
        a[i] = _mm512_loadu_si512(row[i] + 2 * word);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    /* a[4g + c] holds word 4q + c of rows 4g..4g + 3 in its quarter q. */
    for (int c = 0; c < 4; c++) {
        __m512i low01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44);
        __m512i low23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
        __m512i high01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
        __m512i high23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
        uint32_t *out = keys + (word + c) * BLOCK_TOKENS;
        _mm512_storeu_si512(out, _mm512_shuffle_i32x4(low01, low23, 0x88));
        _mm512_storeu_si512(out + 4 * BLOCK_TOKENS, _mm512_shuffle_i32x4(low01, low23, 0xdd));
        _mm512_storeu_si512(out + 8 * BLOCK_TOKENS,
                            _mm512_shuffle_i32x4(high01, high23, 0x88));
        _mm512_storeu_si512(out + 12 * BLOCK_TOKENS,
                            _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}

static void transpose_keys(uint32_t *keys, const bf16 *const *row, int head_dim)
{
    for (int token = 0; token < BLOCK_TOKENS; token += 16)
        for (int word = 0; word < head_dim / 2; word += 16)
            transpose_tile(keys + token, row + token, word);
}

#include "kernels/cpu/attend_vector.h"

const struct attend_leaf avx512_attend_leaf = {
    .take = vector_take,
    .finish = vector_finish,
};
