#ifndef KERNELS_TWO_LEVELS_H
#define KERNELS_TWO_LEVELS_H

#include "kernels/hot_rows.h"
#include "kernels/lagged_blocks.h"
#include "kernels/layout.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The two levels of sparse decode attention, one by one and in one; ops.h has the conventions.
 * Of latent rows (layout.h) scores of the rotated index are those of latent.h, and a head's part
 * of out is latent_dim wide, not D. */

/* First level of sparse decode: score every block of a context, keep the best
 * keep_blocks for each KV head.  One query row a sequence, row s for sequence s.
 *
 * Score of a block, the maximum over the query heads of the KV head:
 *   FILTER_BOUNDS  sum_d max(q[d] * lo[d], q[d] * hi[d])
 *   FILTER_COARSE  the maximum over its tokens of the coarse product:
 *     INDEX_ROTATED   scale * sum_d (sign[d] ? x[d] : -x[d]),  x = R q
 *     INDEX_CHANNELS  scale2 * sum_i q[c[i]] * (code[i] - 1.5)
 *   FILTER_MEANS   as INDEX_ROTATED's, the maximum over the block's means
 *
 * Always kept: the blocks of the first sink_tokens and of the last
 * recent_tokens positions, and with FILTER_MEANS one that is not full; then by
 * score, equal scores keep the earlier block.
 * Fewer blocks than keep_blocks: all are kept.
 *
 * Where more blocks must be kept than keep_blocks, the earlier ones of them are.
 *
 * Result: ascending block numbers (positions / BLOCK_TOKENS), padded with -1.
 *                                    tolerance: exact ids given equal scores;
 *                                    scores 1e-4 */
struct block_filter_args {
    int32_t *kept;              /* [S, G, keep_blocks] */
    int32_t *n_kept;            /* [S, G] */
    const void *q;              /* act [S, H*D] after rope */
    int q_stride;
    const uint8_t *index;
    const int32_t *table;       /* [S, max_blocks] block ids in index */
    const int32_t *n_tokens;    /* [S] */
    const int16_t *channels;    /* as in rope_store */
    void *scratch;              /* ops->block_filter_scratch() bytes */
    struct kv_shape shape;
    int seqs, heads, max_blocks;
    int keep_blocks, sink_tokens, recent_tokens;
    int max_n_tokens;
};

/* Second level: among the tokens of the kept blocks choose keep_tokens, the
 * ones with the largest estimated products; query heads of a KV head vote by
 * maximum.
 *   INDEX_ROTATED   scale * sum_d x[d] * (sign ? 1 : -1) * (large ? 1.5 : 0.5)
 *   INDEX_CHANNELS  scale4 * sum_i q[c[i]] * (code[i] - 8)
 *
 * Always chosen: positions below sink_tokens and the last recent_tokens; then
 * by score, equal scores choose the earlier position.  Choosing is exact given
 * the scores.  Fewer candidates than keep_tokens: all are chosen; more that must be
 * chosen: the earlier ones of them.
 *
 * Result: ascending positions, padded with -1: ascending because attention
 * then reads memory in order and a run is repeatable.
 *                                    tolerance: exact ids given equal scores;
 *                                    scores 1e-4 */
struct token_select_args {
    int32_t *chosen;            /* [S, G, keep_tokens] positions */
    int32_t *n_chosen;          /* [S, G] */
    const int32_t *kept;        /* [S, G, keep_blocks] of block_filter */
    const int32_t *n_kept;      /* [S, G] */
    const void *q;              /* act [S, H*D] */
    int q_stride;
    const uint8_t *index;
    const int32_t *table;       /* [S, max_blocks] block ids in index */
    const int32_t *n_tokens;    /* [S] */
    const int16_t *channels;
    void *scratch;              /* ops->token_select_scratch() bytes */
    struct kv_shape shape;
    int seqs, heads, max_blocks;
    int keep_blocks, keep_tokens, sink_tokens, recent_tokens;
};

/* Softmax attention of row s over the chosen positions of each KV head, full
 * precision K and V.  With every position chosen it equals attend_dense within
 * 1e-3.                                                   tolerance: 1e-4 */
struct attend_selected_args {
    void *out;                  /* act [S, H*D] */
    const void *q;              /* act [S, H*D] */
    int q_stride;
    const bf16 *kv;
    const int32_t *table;       /* [S, max_blocks] block ids in kv */
    const int32_t *chosen;      /* [S, G, keep_tokens] */
    const int32_t *n_chosen;    /* [S, G] */
    void *scratch;              /* ops->attend_dense_scratch() bytes */
    struct kv_shape shape;
    int seqs, heads, max_blocks, keep_tokens;
    float scale;
};

/* What lies between the operations, device memory: for whoever looks into a step. */
struct selected_lists {
    int32_t *kept, *n_kept;     /* [S, G, keep_blocks], [S, G] the blocks that tokens were chosen
                                   among, ascending */
    int32_t *chosen, *n_chosen; /* [S, G, keep_tokens], [S, G] */
};

/* block_filter, token_select and attend_selected in one: what lies between them goes
 * nowhere, or with `lists` there, and then a back end runs the three one after the other even
 * where it has them fused.  With `hot`, a chosen row whose block has no slot in kv_table comes out
 * of hot_rows.h's sets; the result is the same to the last bit as though it were in kv.  With
 * `lagged` tokens are chosen among the blocks of lagged_blocks.h, and this call's go there.
 *                                                        tolerance: as the three */
struct attend_two_level_args {
    void *out;                  /* act [S, H*D] */
    const void *q;              /* act [S, H*D] after rope */
    int q_stride;
    const bf16 *kv;
    const uint8_t *index;
    const int32_t *kv_table;    /* [S, max_blocks] block ids in kv; -1 only with hot */
    const int32_t *index_table; /* [S, max_blocks] block ids in index */
    const int32_t *n_tokens;    /* [S] */
    const int16_t *channels;
    void *scratch;              /* ops->attend_two_level_scratch() bytes */
    struct kv_shape shape;
    int seqs, heads, max_blocks;
    int keep_blocks, keep_tokens, sink_tokens, recent_tokens;
    int max_n_tokens;
    float scale;
    const struct hot_rows *hot; /* host; NULL: every block has a slot in kv */
    const struct lagged_blocks *lagged; /* host; NULL: tokens of what block_filter keeps */
    const struct selected_lists *lists; /* host; NULL: nobody wants them */
};

#ifdef __cplusplus
}
#endif
#endif
