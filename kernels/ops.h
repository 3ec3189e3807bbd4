#ifndef KERNELS_OPS_H
#define KERNELS_OPS_H

#include "kernels/backend.h"
#include "kernels/experts.h"
#include "kernels/hot_rows.h"
#include "kernels/lagged_blocks.h"
#include "kernels/latent.h"
#include "kernels/layout.h"
#include "kernels/sampling.h"
#include "kernels/two_levels.h"

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
    int x_stride;               /* elements from row to row of x; 0: M, and so it is with delta */
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

/* In attention of latent rows (layout.h) a head's part of out is latent_dim wide, not D.
 *
 * Softmax attention over the whole context, causal, over paged K and V.
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
    int latent_widths[3];                    /* of what linear_heads and add_norm take besides: rank
                                                of queries, their part without rope, values; or 0 */
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
    void (*linear_heads)(struct stream *s, const struct linear_heads_args *a);
    void (*latent_store)(struct stream *s, const struct latent_store_args *a);
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
