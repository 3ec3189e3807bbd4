#ifndef KERNELS_OPS_H
#define KERNELS_OPS_H

#include "kernels/backend.h"
#include "kernels/experts.h"
#include "kernels/hot_rows.h"
#include "kernels/lagged_blocks.h"
#include "kernels/layout.h"
#include "kernels/sampling.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Operations and their arguments.
 *
 * One struct per operation, filled by name, passed by const pointer.  Shapes
 * are beside the pointers, row-major.  T rows (query tokens) in the batch, S
 * sequences, H query heads, G key/value heads (G divides H, query head h uses
 * KV head h / (H/G)), D head dimension, M model dimension, I the MLP's, V the
 * vocabulary.
 *
 * Types.  "act" is the back end's activation type (device_info.act): float on
 * the CPU, bf16 on CUDA; sums are float.  Weights are as stored in the model
 * file, BF16 or F32, row-major [out, in]; the CPU asks for no alignment beyond that of
 * the element.  On CUDA whatever holds activations or weights begins at a multiple of 16
 * bytes, and row lengths and strides are multiples of 8 elements (but for out_dim and
 * out_stride).  Every pointer is device memory unless it says host.  Scales are positive.
 *
 * Independence.  What an operation writes for one row or sequence does not
 * depend, not even in the last bit, on the other rows and sequences of the
 * call, nor on how many there are: batch mix and chunk size must not change an
 * answer.  The CPU back end keeps this exactly; CUDA everywhere but in two places.
 * Products of more than 16 rows may round differently with the number of rows.  And
 * attend_dense has a kernel for sequences with one row in the call and another for those
 * with more: how a row is rounded depends on which of the two its sequence is, and on
 * nothing else of how a context is cut into calls.
 *
 * Tolerances are relative to the largest magnitude of the scalar CPU result's
 * row (in attention a row is one head's), for act = float; for act = bf16 add one bf16
 * rounding (2^-8), and in attention two: the weights of the values are rounded as well.
 *
 * Padding.  A step may be replayed at a fixed size (backend.h, graphs), so a row may
 * have kv_block -1: nothing is stored for it; and a sequence n_tokens 0: what it
 * would get is left undefined.
 *
 * Every entry of backend_ops is required.  What a back end cannot do it
 * refuses once, at load, through supports(). */

/* out[t] = table[ids[t]]                                 tolerance: exact */
struct embed_args {
    void *out;                  /* act [T, M] */
    const void *table;          /* [V, M] */
    const int32_t *ids;         /* [T] in [0, V) */
    enum dtype table_type;
    int rows, dim;
};

/* x += delta (skipped when delta is NULL); out = x * rsqrt(mean(x^2) + eps) *
 * weight.  With rows_of, row r of out is made of row rows_of[r] of x, and
 * delta must be NULL: the final norm needs only the rows that are sampled.
 *                                                        tolerance: 1e-5 */
struct add_norm_args {
    void *out;                  /* act [T, M] */
    void *x;                    /* act [T, M]  residual stream, updated */
    const void *delta;          /* act [T, M] or NULL */
    const int32_t *rows_of;     /* [T] or NULL */
    const void *weight;         /* [M] */
    enum dtype weight_type;
    int rows, dim;
    float eps;
};

/* out = x W^T + bias                                      tolerance: 1e-5 * sqrt(in) */
struct linear_args {
    void *out;                  /* act [T, out_dim] with row stride out_stride */
    const void *x;              /* act [T, in_dim] */
    const void *weight;         /* [out_dim, in_dim] */
    const void *bias;           /* [out_dim] of weight_type, or NULL */
    enum dtype weight_type;
    int rows, in_dim, out_dim;
    int out_stride;             /* elements, >= out_dim */
};
/* linear without bias into floats, whatever act is.       tolerance: as linear */
struct logits_args {
    float *out;                 /* [R, V] */
    const void *x;              /* act [R, M] */
    const void *weight;         /* [V, M] */
    enum dtype weight_type;
    int rows, dim, vocab;
};
/* cos and sin of fl32(position) * inv_freq[i], the product rounded to float as
 * the reference implementation does, times factor (YaRN's attention factor,
 * else 1).                                                tolerance: 2 float ulp */
struct rope_table_args {
    float *cos_sin;             /* [T, D]: D/2 cosines, then D/2 sines */
    const int32_t *positions;   /* [T] */
    const float *inv_freq;      /* [D/2] */
    float factor;
    int rows, head_dim;
};

/* For every row: normalise each head of q and k (Qwen3; q_norm NULL skips
 * both), rotate them (half-split pairs: x[i] with x[i + D/2]), write q back, round k and v
 * to bf16 and store them in their block, and update the block's index.
 *
 * Rows of one block are neighbours in ascending position, a block is written from its
 * first token on, and the row at position p % BLOCK_TOKENS == 0 starts the
 * block's index afresh.                                   tolerance: q, k 1e-5; index exact
 *                                                         given equal stored keys */
struct rope_store_args {
    void *q;                    /* act [T, H*D], in and out */
    const void *k, *v;          /* act [T, G*D] */
    int qkv_stride_q, qkv_stride_k, qkv_stride_v; /* elements from row to row */
    const void *q_norm, *k_norm;/* [D] of norm_type, or NULL */
    enum dtype norm_type;
    const float *cos_sin;       /* [T, D] of rope_table */
    const int32_t *positions;   /* [T] */
    const int32_t *kv_block;    /* [T] block of the row in kv; -1: padding */
    const int32_t *index_block; /* [T] block of the row in index */
    bf16 *kv;                   /* this layer's pool, see layout.h */
    uint8_t *index;             /* this layer's index pool */
    const int16_t *channels;    /* [G, INDEX_CHANNELS_KEPT] for INDEX_CHANNELS, else NULL */
    struct kv_shape shape;
    int rows, heads;
    float eps;
};

/* Softmax attention over the whole context, causal, over paged K and V.
 * Sequence s has rows first_row[s] .. first_row[s] + n_rows[s] - 1, the last
 * of them at position n_tokens[s] - 1; a row at position p sees 0..p, and all
 * of these are stored already.  scores are q.k * scale.
 *                                                         tolerance: 1e-4 */
struct attend_dense_args {
    void *out;                  /* act [T, H*D] */
    const void *q;              /* act [T, H*D] */
    int q_stride;               /* elements from row to row of q */
    const bf16 *kv;
    const int32_t *table;       /* [S, max_blocks] block ids */
    const int32_t *first_row;   /* [S] */
    const int32_t *n_rows;      /* [S], >= 1 */
    const int32_t *n_tokens;    /* [S] */
    void *scratch;              /* ops->attend_dense_scratch() bytes */
    struct kv_shape shape;
    int seqs, heads, max_blocks;
    int max_n_rows, max_n_tokens; /* host's knowledge of the largest entries */
    bool only_last_is_new;      /* host's knowledge: of a sequence with one row all K and V but the
                                   last token's lie there since before this pass; may be false */
    float scale;
};

/* First level of sparse decode: score every block of a context, keep the best
 * keep_blocks for each KV head.  One query row a sequence, row s for sequence s.
 *
 * Score of a block, the maximum over the query heads of the KV head:
 *   FILTER_BOUNDS  sum_d max(q[d] * lo[d], q[d] * hi[d])
 *   FILTER_COARSE  the maximum over its tokens of the coarse product:
 *     INDEX_ROTATED   scale * sum_d (sign[d] ? x[d] : -x[d]),  x = R q
 *     INDEX_CHANNELS  scale2 * sum_i q[c[i]] * (code[i] - 1.5)
 *
 * Always kept: the blocks of the first sink_tokens and of the last
 * recent_tokens positions; then by score, equal scores keep the earlier block.
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

/* block_filter, token_select and attend_selected in one: what lies between them goes
 * nowhere.  With `hot`, a chosen row whose block has no slot in kv_table comes out of hot_rows.h's
 * sets; the result is the same to the last bit as though it were in kv.  With `lagged` tokens are
 * chosen among the blocks of lagged_blocks.h, and this call's go there.
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
};

/* out = silu(gate) * up, silu(x) = x / (1 + exp(-x)).     tolerance: 1e-5 */
struct silu_mul_args {
    void *out;                  /* act [T, I] */
    const void *gate, *up;      /* act [T, I] with row stride in_stride */
    int rows, dim, in_stride;
};

/* out = silu(x Wg^T) * (x Wu^T), with both products rounded to act: to the bit two linear without
 * bias and then silu_mul.                                 tolerance: as these */
struct linear_gated_args {
    void *out;                  /* act [T, I] */
    const void *x;              /* act [T, in_dim] */
    const void *gate, *up;      /* [I, in_dim] */
    enum dtype weight_type;
    void *scratch;              /* act [T, 2 I] */
    int rows, in_dim, dim;
};

struct shape_query {
    int dim, mlp_dim, heads, vocab;
    int n_experts, n_chosen, expert_dim;     /* all 0: no layer has experts */
    struct kv_shape kv;
};

struct backend_ops {
    bool (*supports)(const struct shape_query *q, struct error *why);

    void (*embed)(struct stream *s, const struct embed_args *a);
    void (*add_norm)(struct stream *s, const struct add_norm_args *a);
    void (*linear)(struct stream *s, const struct linear_args *a);
    void (*logits)(struct stream *s, const struct logits_args *a);
    void (*rope_table)(struct stream *s, const struct rope_table_args *a);
    void (*rope_store)(struct stream *s, const struct rope_store_args *a);
    void (*attend_dense)(struct stream *s, const struct attend_dense_args *a);
    void (*block_filter)(struct stream *s, const struct block_filter_args *a);
    void (*token_select)(struct stream *s, const struct token_select_args *a);
    void (*attend_selected)(struct stream *s, const struct attend_selected_args *a);
    void (*attend_two_level)(struct stream *s, const struct attend_two_level_args *a);
    void (*silu_mul)(struct stream *s, const struct silu_mul_args *a);
    void (*linear_gated)(struct stream *s, const struct linear_gated_args *a);
    void (*route)(struct stream *s, const struct route_args *a);
    void (*experts)(struct stream *s, const struct experts_args *a);
    void (*sample)(struct stream *s, const struct sample_args *a);

    /* Scratch sizes for the largest call; the same functions lay it out. */
    size_t (*block_filter_scratch)(const struct kv_shape *shape, int max_seqs, int heads,
                                   int max_blocks);
    size_t (*token_select_scratch)(const struct kv_shape *shape, int max_seqs, int heads,
                                   int keep_blocks);
    size_t (*attend_dense_scratch)(const struct kv_shape *shape, int max_seqs, int heads,
                                   int max_blocks);
    size_t (*attend_two_level_scratch)(const struct kv_shape *shape, int max_seqs, int heads,
                                       int max_blocks, int keep_blocks, int keep_tokens);
    size_t (*experts_scratch)(const struct experts_shape *shape);
};

#ifdef __cplusplus
}
#endif
#endif
