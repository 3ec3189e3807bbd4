#ifndef KERNELS_CPU_ATTEND_H
#define KERNELS_CPU_ATTEND_H

#include "kernels/cpu/cpu.h"

/* Softmax attention of the CPU back end; private to kernels/cpu.
 *
 * A query, one head of one row, reads a list of tokens: its context from the start, or
 * the positions chosen for it.  The list is cut into splits of SPLIT_TOKENS, a split
 * into blocks of BLOCK_TOKENS.  Within a split the softmax is computed online, block by
 * block: with m the largest score so far, sum = sum of e^(score - m) and acc = sum of
 * e^(score - m) v, both multiplied by e^(m - m') when a block raises m to m'.  Splits
 * are joined in their order by the same rule.  (Milakov and Gimelshein 2018, "Online
 * normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention".)
 *
 * Every cut is a place in the list and every sum belongs to one query, so a query gives
 * the same bits alone and among others, whoever computes its splits. */

enum { SPLIT_TOKENS = 1024 };

/* What a split leaves behind, for n queries. */
struct attend_state {
    float *max;                  /* [n] largest score, -inf before the first token */
    float *sum;                  /* [n] */
    float *acc;                  /* [n, value_dim], channels in the leaf's own order */
};

/* Queries of one KV head that walk over the same list. */
struct attend_tile {
    int n, head_dim;             /* of the keys */
    int value_dim, value_at;     /* of the values, and where they begin in a row */
    float *q;                    /* [n, head_dim], times the scale of the scores */
    int32_t *see;                /* [n] how many tokens of the list each sees */
    struct attend_state state;
    float *work;                 /* [ATTEND_WORK_BLOCKS, BLOCK_TOKENS], the leaf's */
    uint32_t *keys;              /* [head_dim / 2, BLOCK_TOKENS], the leaf's */
};

/* Queries that a leaf works on at a time: as many as the registers hold. */
enum { ATTEND_QUERIES = 6 };

/* Up to BLOCK_TOKENS tokens of the list, from number `first` on. */
struct attend_block {
    const bf16 *row[BLOCK_TOKENS]; /* layout.h; past n: as the last */
    int first, n;                /* n >= 1 */
};

struct attend_leaf {
    /* Take the block into the state of every query. */
    void (*take)(struct attend_tile *t, const struct attend_block *b);
    /* out = acc * factor, in the order of the channels */
    void (*finish)(float *out, const float *acc, float factor, int value_dim);
};

/* attend_selected() of tokens whose rows are at given addresses: rows [S, G, keep_tokens] in
 * place of kv and table, or NULL. */
void cpu_attend_rows(struct stream *s, const struct attend_selected_args *args,
                     const bf16 *const *rows);

extern const struct attend_leaf scalar_attend_leaf;
extern const struct attend_leaf avx2_attend_leaf;   /* widths a multiple of 16 */
extern const struct attend_leaf avx512_attend_leaf; /* widths a multiple of 32 */

#endif
