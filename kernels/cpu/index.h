#ifndef KERNELS_CPU_INDEX_H
#define KERNELS_CPU_INDEX_H

#include "kernels/cpu/cpu.h"

/* Leaves of the operations that write and read the index (layout.h); private to
 * kernels/cpu.  All of them give the same bits: they do the same operations in the same
 * order, only more of them at a time. */

enum {
    MOST_PART_DIM = 512,         /* of what is rotated by itself or normed */
    MOST_HEAD_DIM = 2 * MOST_PART_DIM,
    SCORE_QUERIES = 4,           /* whose sums over a block of latent keys stay in registers */
};

/* Where the keys of one KV head of one block go. */
struct index_record {
    uint8_t *base;
    struct index_layout layout;
    enum index_kind kind;
    const int16_t *channels;     /* [INDEX_CHANNELS_KEPT] for INDEX_CHANNELS */
    int head_dim, latent_dim;
};

/* Codes of a block's tokens: first the `bytes` of part 0, then those of part 1.  Nibble
 * 2i is the low one of byte i. */
struct index_codes {
    const uint8_t *part[2];      /* [BLOCK_TOKENS, bytes] */
    int parts, bytes;
};

/* Up to SCORE_QUERIES queries of latent keys, rounded to 8 bits (latent.h). */
struct latent_queries {
    float unit[2][SCORE_QUERIES];        /* u_i */
    int32_t total[2][SCORE_QUERIES];     /* sum of n_i */
    int8_t n[MOST_HEAD_DIM / 4][SCORE_QUERIES][4]; /* channels 4i..4i + 3 of each query */
};

/* A block of latent keys in the index, and how much of it counts. */
struct latent_codes {
    const bf16 *scale;           /* [BLOCK_TOKENS, 2] */
    const uint8_t *sign, *large; /* [BLOCK_TOKENS, head_dim / 8]; large NULL: filter */
    int latent_dim, head_dim;
    uint32_t *work;              /* [head_dim / 4, BLOCK_TOKENS] the leaf's */
};

/* Widths n are powers of two from 16 to MOST_PART_DIM. */
struct index_leaf {
    /* x = x * rsqrt(mean(x^2) + eps) * weight */
    void (*norm)(float *x, const float *weight, int n, float eps);
    /* Rotate by the position: pairs x[i] and x[i + n/2], or x[2i] and x[2i + 1]. */
    void (*turn)(float *x, const float *cos_sin, int n);
    void (*turn_pairs)(float *x, const float *cos_sin, int n);
    /* Index the key of token `token` of the block, as stored. */
    void (*add_key)(const struct index_record *r, const bf16 *key, int token);
    /* The means of a full block: its keys, `stride` elements from one to the next. */
    void (*add_means)(const struct index_record *r, const bf16 *keys, size_t stride);
    /* out = R x */
    void (*rotate)(float *out, const float *x, int n);
    /* sum of max(q * lo, q * hi) */
    float (*bound)(const float *q, const bf16 *lo, const bf16 *hi, int n);
    /* best[t] = the maximum over queries of the sum over nibbles j, in their order, of
     * tables[query][j][nibble j of the code of t].  best [BLOCK_TOKENS], tables
     * [queries, nibbles, 16]. */
    void (*look_up)(float *best, const struct index_codes *codes, const float *tables,
                    int queries);
    /* score[t] *= scale[t]; the largest of the first n. */
    float (*scale_scores)(float *score, const bf16 *scale, int n);
    /* Channels from..from + n - 1, which are part `part`, of query i, rotated in x. */
    void (*round_query)(struct latent_queries *to, int i, const float *x, int from, int n,
                        int part);
    /* best[t] = the maximum of the scores of t over the queries, SCORE_QUERIES of them
     * in a tile. */
    void (*score_latent)(float *best, const struct latent_codes *codes,
                         const struct latent_queries *tiles, int queries);
};

void scalar_look_up(float *best, const struct index_codes *codes, const float *tables,
                    int queries);

extern const struct index_leaf scalar_index_leaf, avx2_index_leaf, avx512_index_leaf;

/* What is made of a block when the key of token `token` has been stored in it, at `keys`. */
static inline void finish_block(const struct index_leaf *leaf, const struct index_record *r,
                                const bf16 *keys, size_t stride, int token)
{
    if (r->layout.mean_sign >= 0 && token == BLOCK_TOKENS - 1)
        leaf->add_means(r, keys, stride);
}

/* The first row from `row` on that begins a run of rows of one block: where work on rows
 * that update its record may be cut. */
static inline int run_start(const int32_t *index_block, int rows, int row)
{
    if (row >= rows)
        return rows;
    while (row > 0 && row < rows && index_block[row] == index_block[row - 1])
        row++;
    return row;
}

static inline const struct index_leaf *index_leaf_of(const struct stream *s)
{
    return s->be->isa == ISA_AVX512 ? &avx512_index_leaf
           : s->be->isa == ISA_AVX2 ? &avx2_index_leaf
                                    : &scalar_index_leaf;
}

#endif
