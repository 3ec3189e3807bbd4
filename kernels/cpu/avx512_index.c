#include "kernels/cpu/index.h"

#include "kernels/cpu/index_body.h"

#include <immintrin.h>

enum { LANES = 16, GROUPS = BLOCK_TOKENS / LANES };

/* turn_words() for 4 words a token: 4 x 4 words trade places within quarters, then quarters
 * are put in order. */
static void turn_quads(uint32_t *out, const uint8_t *codes)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11,
                                            15);
    for (int g = 0; g < GROUPS; g++) {
        const uint8_t *from = codes + g * LANES * 16;
        __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 64);
        __m512i c = _mm512_loadu_si512(from + 128), d = _mm512_loadu_si512(from + 192);
        __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
        __m512i ef = _mm512_unpackhi_epi32(a, b), gh = _mm512_unpackhi_epi32(c, d);
        __m512i word[4] = { _mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd),
                            _mm512_unpacklo_epi64(ef, gh), _mm512_unpackhi_epi64(ef, gh) };
        for (int w = 0; w < 4; w++)
            _mm512_storeu_si512(out + w * BLOCK_TOKENS + g * LANES,
                                _mm512_permutexvar_epi32(order, word[w]));
    }
}

/* A table of 16 floats is a register, and a permutation looks 16 tokens up at once; it
 * reads only the low four bits of a lane. */
static void look_up_words(float *best, const uint32_t *words, int n_words,
                          const float *tables, int queries)
{
    for (int q = 0; q < queries; q++) {
        const float *table = tables + q * n_words * 8 * 16;
        __m512 sum[GROUPS];
        for (int g = 0; g < GROUPS; g++)
            sum[g] = _mm512_setzero_ps();
        for (int w = 0; w < n_words; w++) {
            __m512i code[GROUPS];
            for (int g = 0; g < GROUPS; g++)
                code[g] = _mm512_loadu_si512(words + w * BLOCK_TOKENS + g * LANES);
            for (int nibble = 0; nibble < 8; nibble++, table += 16) {
                __m512 entries = _mm512_loadu_ps(table);
                for (int g = 0; g < GROUPS; g++) {
                    __m512 value = _mm512_permutexvar_ps(code[g], entries);
                    sum[g] = _mm512_add_ps(sum[g], value);
                    code[g] = _mm512_srli_epi32(code[g], 4);
                }
            }
        }
        for (int g = 0; g < GROUPS; g++) {
            if (q > 0)
                sum[g] = _mm512_max_ps(sum[g], _mm512_loadu_ps(best + g * LANES));
            _mm512_storeu_ps(best + g * LANES, sum[g]);
        }
    }
}

static void avx512_look_up(float *best, const struct index_codes *codes, const float *tables,
                           int queries)
{
    uint32_t words[MOST_CODE_WORDS * BLOCK_TOKENS];

    if (codes->bytes % 4) {
        scalar_look_up(best, codes, tables, queries);
        return;
    }
    if (codes->bytes == 16)
        for (int p = 0; p < codes->parts; p++)
            turn_quads(words + 4 * p * BLOCK_TOKENS, codes->part[p]);
    else
        turn_words(words, codes);
    look_up_words(best, words, codes->parts * codes->bytes / 4, tables, queries);
}

static void dot_codes(int32_t *sum, const uint32_t *codes,
                      const int8_t (*n)[SCORE_QUERIES][4], int quads)
{
    __m512i acc[SCORE_QUERIES][GROUPS];

#pragma GCC unroll 4
    for (int q = 0; q < SCORE_QUERIES; q++)
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; g++)
            acc[q][g] = _mm512_setzero_si512();
    for (int i = 0; i < quads; i++) {
        __m512i code[GROUPS];
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; g++)
            code[g] = _mm512_loadu_si512(codes + i * BLOCK_TOKENS + g * LANES);
#pragma GCC unroll 4
        for (int q = 0; q < SCORE_QUERIES; q++) {
            int32_t four;
            memcpy(&four, n[i][q], sizeof four);
            __m512i query = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; g++)
                acc[q][g] = _mm512_dpbusd_epi32(acc[q][g], code[g], query);
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < SCORE_QUERIES; q++)
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; g++)
            _mm512_storeu_si512(sum + q * BLOCK_TOKENS + g * LANES, acc[q][g]);
}

#include "kernels/cpu/latent_scores_body.h"

const struct index_leaf avx512_index_leaf = {
    .norm = leaf_norm,
    .turn = leaf_turn,
    .turn_pairs = leaf_turn_pairs,
    .add_key = leaf_add_key,
    .add_means = leaf_add_means,
    .rotate = leaf_rotate,
    .bound = leaf_bound,
    .scale_scores = leaf_scale_scores,
    .look_up = avx512_look_up,
    .round_query = leaf_round_query,
    .score_latent = leaf_score_latent,
};
