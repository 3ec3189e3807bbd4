#include "kernels/cpu/index.h"

#include "kernels/cpu/index_body.h"

void scalar_look_up(float *best, const struct index_codes *codes, const float *tables,
                    int queries)
{
    int bytes = codes->bytes;

    for (int t = 0; t < BLOCK_TOKENS; t++)
        for (int q = 0; q < queries; q++) {
            const float *table = tables + q * codes->parts * bytes * 32;
            float sum = 0;
            for (int p = 0; p < codes->parts; p++)
                for (int b = 0; b < bytes; b++, table += 32) {
                    uint8_t byte = codes->part[p][t * bytes + b];
                    sum += table[byte & 15];
                    sum += table[16 + (byte >> 4)];
                }
            if (q == 0 || sum > best[t])
                best[t] = sum;
        }
}

static void dot_codes(int32_t *sum, const uint32_t *codes,
                      const int8_t (*n)[SCORE_QUERIES][4], int quads)
{
    for (int q = 0; q < SCORE_QUERIES; q++)
        for (int t = 0; t < BLOCK_TOKENS; t++) {
            int32_t s = 0;
            for (int i = 0; i < quads; i++)
                for (int b = 0; b < 4; b++)
                    s += (int32_t)(codes[i * BLOCK_TOKENS + t] >> 8 * b & 255) * n[i][q][b];
            sum[q * BLOCK_TOKENS + t] = s;
        }
}

#include "kernels/cpu/latent_scores_body.h"

const struct index_leaf scalar_index_leaf = {
    .norm = leaf_norm,
    .turn = leaf_turn,
    .turn_pairs = leaf_turn_pairs,
    .add_key = leaf_add_key,
    .add_means = leaf_add_means,
    .rotate = leaf_rotate,
    .bound = leaf_bound,
    .scale_scores = leaf_scale_scores,
    .look_up = scalar_look_up,
    .round_query = leaf_round_query,
    .score_latent = leaf_score_latent,
};
