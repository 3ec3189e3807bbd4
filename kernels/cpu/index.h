#ifndef KERNELS_CPU_INDEX_H
#define KERNELS_CPU_INDEX_H

#include "kernels/cpu/cpu.h"

/* Leaves of the operations that write and read the index (layout.h); private to
 * kernels/cpu.  All of them give the same bits: they do the same operations in the same
 * order, only more of them at a time. */

enum { MOST_HEAD_DIM = 256 };

/* Where the keys of one KV head of one block go. */
struct index_record {
    uint8_t *base;
    struct index_layout layout;
    enum index_kind kind;
    const int16_t *channels;     /* [INDEX_CHANNELS_KEPT] for INDEX_CHANNELS */
    int head_dim;
};

/* Codes of a block's tokens: first the `bytes` of part 0, then those of part 1.  Nibble
 * 2i is the low one of byte i. */
struct index_codes {
    const uint8_t *part[2];      /* [BLOCK_TOKENS, bytes] */
    int parts, bytes;
};

struct index_leaf {
    /* One head of q or k: normalised (norm may be NULL), then rotated by its position. */
    void (*place)(float *x, const float *norm, const float *cos_sin, int head_dim, float eps);
    /* Index the key of token `token` of the block, as stored. */
    void (*add_key)(const struct index_record *r, const bf16 *key, int token);
    /* out = R x */
    void (*rotate)(float *out, const float *x, int head_dim);
    /* sum of max(q * lo, q * hi) */
    float (*bound)(const float *q, const bf16 *lo, const bf16 *hi, int head_dim);
    /* best[t] = the maximum over queries of the sum over nibbles j, in their order, of
     * tables[query][j][nibble j of the code of t].  best [BLOCK_TOKENS], tables
     * [queries, nibbles, 16]. */
    void (*look_up)(float *best, const struct index_codes *codes, const float *tables,
                    int queries);
    /* score[t] *= scale[t]; the largest of the first n. */
    float (*scale_scores)(float *score, const bf16 *scale, int n);
};

void scalar_look_up(float *best, const struct index_codes *codes, const float *tables,
                    int queries);

extern const struct index_leaf scalar_index_leaf, avx2_index_leaf, avx512_index_leaf;

static inline const struct index_leaf *index_leaf_of(const struct stream *s)
{
    return s->be->isa == ISA_AVX512 ? &avx512_index_leaf
           : s->be->isa == ISA_AVX2 ? &avx2_index_leaf
                                    : &scalar_index_leaf;
}

#endif
