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

const struct index_leaf scalar_index_leaf = {
    .place = leaf_place,
    .add_key = leaf_add_key,
    .rotate = leaf_rotate,
    .bound = leaf_bound,
    .scale_scores = leaf_scale_scores,
    .look_up = scalar_look_up,
};
