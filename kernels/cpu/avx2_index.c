#include "kernels/cpu/index.h"

#include "kernels/cpu/index_body.h"

#include <immintrin.h>

enum { LANES = 8, GROUPS = 4, TOKENS = LANES * GROUPS };

/* A table of 16 floats is two registers: both are looked up, bit 3 says which counts. */
static void look_up_tokens(float *best, const uint32_t *words, int n_words,
                           const float *table, bool first)
{
    __m256 sum[GROUPS];

    for (int g = 0; g < GROUPS; g++)
        sum[g] = _mm256_setzero_ps();
    for (int w = 0; w < n_words; w++) {
        __m256i code[GROUPS];
        for (int g = 0; g < GROUPS; g++)
            code[g] = _mm256_loadu_si256(
                (const __m256i_u *)(const void *)(words + w * BLOCK_TOKENS + g * LANES));
        for (int nibble = 0; nibble < 8; nibble++, table += 16) {
            __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
            for (int g = 0; g < GROUPS; g++) {
                __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code[g], 28));
                __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code[g]),
                                                _mm256_permutevar8x32_ps(high, code[g]), upper);
                sum[g] = _mm256_add_ps(sum[g], value);
                code[g] = _mm256_srli_epi32(code[g], 4);
            }
        }
    }
    for (int g = 0; g < GROUPS; g++) {
        if (!first)
            sum[g] = _mm256_max_ps(sum[g], _mm256_loadu_ps(best + g * LANES));
        _mm256_storeu_ps(best + g * LANES, sum[g]);
    }
}

static void avx2_look_up(float *best, const struct index_codes *codes, const float *tables,
                         int queries)
{
    uint32_t words[MOST_CODE_WORDS * BLOCK_TOKENS];
    int n_words = codes->parts * codes->bytes / 4;

    if (codes->bytes % 4) {
        scalar_look_up(best, codes, tables, queries);
        return;
    }
    turn_words(words, codes);
    for (int q = 0; q < queries; q++)
        for (int t = 0; t < BLOCK_TOKENS; t += TOKENS)
            look_up_tokens(best + t, words + t, n_words, tables + q * n_words * 128, q == 0);
}

/* Two products of 3 by 127 fit 16 bits, so nothing saturates before the widening. */
static void dot_codes(int32_t *sum, const uint32_t *codes,
                      const int8_t (*n)[SCORE_QUERIES][4], int quads)
{
    const __m256i ones = _mm256_set1_epi16(1);

    for (int t = 0; t < BLOCK_TOKENS; t += 2 * LANES) {
        __m256i acc[SCORE_QUERIES][2];
#pragma GCC unroll 4
        for (int q = 0; q < SCORE_QUERIES; q++)
            acc[q][0] = acc[q][1] = _mm256_setzero_si256();
        for (int i = 0; i < quads; i++) {
            const __m256i_u *at = (const __m256i_u *)(const void *)(codes + i * BLOCK_TOKENS + t);
            __m256i code[2] = { _mm256_loadu_si256(at), _mm256_loadu_si256(at + 1) };
#pragma GCC unroll 4
            for (int q = 0; q < SCORE_QUERIES; q++) {
                int32_t four;
                memcpy(&four, n[i][q], sizeof four);
                __m256i query = _mm256_set1_epi32(four);
#pragma GCC unroll 4
                for (int g = 0; g < 2; g++) {
                    __m256i pairs = _mm256_maddubs_epi16(code[g], query);
                    acc[q][g] = _mm256_add_epi32(acc[q][g], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < SCORE_QUERIES; q++)
#pragma GCC unroll 4
            for (int g = 0; g < 2; g++)
                _mm256_storeu_si256((__m256i_u *)(void *)(sum + q * BLOCK_TOKENS + t + g * LANES),
                                    acc[q][g]);
    }
}

#include "kernels/cpu/latent_scores_body.h"

const struct index_leaf avx2_index_leaf = {
    .norm = leaf_norm,
    .turn = leaf_turn,
    .turn_pairs = leaf_turn_pairs,
    .add_key = leaf_add_key,
    .add_means = leaf_add_means,
    .rotate = leaf_rotate,
    .bound = leaf_bound,
    .scale_scores = leaf_scale_scores,
    .look_up = avx2_look_up,
    .round_query = leaf_round_query,
    .score_latent = leaf_score_latent,
};
