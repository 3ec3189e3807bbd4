#include "kernels/cpu/index.h"

#include "kernels/cpu/index_body.h"

static float sum_nibbles(const uint8_t *codes, int bytes, const float *tables)
{
    float sum = 0;

    for (int b = 0; b < bytes; b++) {
        sum += tables[32 * b + (codes[b] & 15)];
        sum += tables[32 * b + 16 + (codes[b] >> 4)];
    }
    return sum;
}

void scalar_look_up(float *best, const uint8_t *codes, int bytes, const float *tables,
                    int queries)
{
    for (int t = 0; t < BLOCK_TOKENS; t++)
        for (int q = 0; q < queries; q++) {
            float sum = sum_nibbles(codes + t * bytes, bytes, tables + q * bytes * 32);
            if (q == 0 || sum > best[t])
                best[t] = sum;
        }
}

const struct index_leaf scalar_index_leaf = {
    .place = leaf_place,
    .add_key = leaf_add_key,
    .rotate = leaf_rotate,
    .bound = leaf_bound,
    .look_up = scalar_look_up,
};
