#ifndef KERNELS_LATENT_H
#define KERNELS_LATENT_H

#include "kernels/layout.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Multi-head latent attention (MLA) in its absorbed form; ops.h has the conventions.
 *
 * A token leaves one row for all heads: c, the normed latent (L values), and a key r of P values,
 * rotated by position.  With the matrices U_h [N, L] and V_h [D, L] of head h, and its query
 * n_h (N values) and p_h (P values, rotated), the plain form has keys U_h c | r and values V_h c.
 * Since n_h.(U_h c) = (U_h^T n_h).c, and V_h comes out of the sum over tokens, it is the same to
 * attend with the queries U_h^T n_h | p_h to the rows themselves, whose first L values are the
 * values, and to apply V_h to the result: attention of H query heads on one KV head of head_dim
 * L + P and latent_dim L (layout.h).  linear_heads makes both products, latent_store the rest, and
 * attend_dense and attend_two_level take the shape as any other, with out act [T, H*L].
 *
 * Scores of the rotated index (block_filter_args and token_select_args in two_levels.h) are made of
 * queries of 8 bits, because a latent key has many channels.  Of part i (latent, rope) with
 * x_i = R_i q_i, channels d counted in the part:
 *   u_i = max |x_i| / 127,  n_i[d] = g m, g = 2^(d % 4), m = x_i[d] * (127 / max |x_i|) / g rounded
 *                           to even and kept within 127 / g  (0 where the max is 0)
 *   filter     sum over i of  (scale_i * u_i) * sum_d n_i[d] * (sign[d] ? 1 : -1)
 *   selection  the same with                            (sign ? 1 : -1) * (large ? 1.5 : 0.5)
 * x_i is rotated in layout.h's fixed arithmetic and every operation above is rounded once, so the
 * integers are the same on every back end.  Multiples of g, because then a GPU multiplies the bits
 * of a key where they lie in their word, m by the bit's value; the error that this adds, 4 % of a
 * query's values as they usually are, is next to nothing beside that of keys of one or two bits. */

/* A product of its own for each head: out[t, h] = W_h x[t, h], or W_h^T x[t, h] with turned.
 *                                                         tolerance: as linear */
struct linear_heads_args {
    void *out;                   /* act [T, H, out_dim] */
    const void *x;               /* act [T, H, in_dim] */
    const void *weight;          /* W_0; W_h is weight_stride elements behind W_(h-1).  [out_dim,
                                    in_dim], turned [in_dim, out_dim] */
    enum dtype weight_type;
    bool turned;
    int rows, heads, in_dim, out_dim;
    int out_stride, out_head_stride; /* elements from row to row and from head to head */
    int x_stride, x_head_stride;
    size_t weight_stride;
};

/* For every row: normalise the latent part of kv (as add_norm does), rotate the rope part of kv
 * and of each head's query, round the row of kv to bf16 and store it in its block, and update the
 * block's index, as rope_store does.  What a query's rope part is rotated to goes behind its
 * latent part, which is there already (linear_heads).
 *
 * interleaved: the pairs are x[2i] and x[2i + 1], and stay there; else x[i] and x[i + P/2].
 *                                                         tolerance: q, rows 1e-5; index exact
 *                                                         given equal stored rows */
struct latent_store_args {
    void *q;                     /* act [T, H, L + P]; out: [.., L ..] */
    const void *q_rope;          /* act [T, H, P] */
    int q_rope_stride, q_rope_head_stride;  /* elements */
    const void *kv;              /* act [T, L + P] */
    int kv_stride;
    const void *norm;            /* [L] of norm_type */
    enum dtype norm_type;
    const float *cos_sin;        /* [T, P] of rope_table */
    const int32_t *positions;    /* [T] */
    const int32_t *kv_block;     /* [T] block of the row in pool; -1: padding */
    const int32_t *index_block;  /* [T] block of the row in index */
    bf16 *pool;                  /* this layer's pool, see layout.h */
    uint8_t *index;              /* this layer's index pool */
    struct kv_shape shape;       /* latent_dim L, head_dim L + P */
    int rows, heads;
    bool interleaved;
    float eps;
};

#ifdef __cplusplus
}
#endif
#endif
