#ifndef KERNELS_EXPERTS_H
#define KERNELS_EXPERTS_H

#include "kernels/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The two operations of a mixture of experts; ops.h has the conventions.  E experts, k of them
 * chosen for a row, M the model dimension, I the width of an expert.
 *
 * A shared expert is no part of them: it is a dense MLP of all rows, which linear_gated and linear
 * do best, and `add` takes its output into the same sum.
 *
 * Padding.  A row without experts (-1) costs nothing: in a replayed step rows that are nobody's
 * would have weights read for them. */

enum { MOST_EXPERTS = 512, MOST_CHOSEN = 16 };

enum router_score {
    ROUTER_SOFTMAX,              /* of all E products; Qwen3-MoE */
    ROUTER_SIGMOID,              /* of each product; GLM-4 */
};

/* scores = x W^T in float.  With softmax the experts chosen are the k with the largest scores and
 * s = softmax(scores); with sigmoid s = 1 / (1 + exp(-scores)) and they are the k with the largest
 * s + bias.  Equal ones: the lower number; a NaN is less than all.  They are written largest
 * first.
 *
 * weights = s of the chosen, divided by their sum + 1e-20 (added in the order of the chosen) with
 * `renormalise`, times scale.
 *                                          tolerance: scores 1e-5 * sqrt(M); experts exact and
 *                                          weights 1e-5 given equal scores */
struct route_args {
    int32_t *experts;            /* [T, k]; -1 for all of a padded row */
    float *weights;              /* [T, k]; 0 likewise */
    float *scores;               /* [T, E]; of a padded row as of others */
    const void *x;               /* act [T, M] */
    const void *router;          /* [E, M] of router_type */
    const float *bias;           /* [E], or NULL: zeros.  Only with sigmoid */
    const int32_t *kv_block;     /* [T] as of rope_store, -1: a padded row; or NULL: none is */
    enum dtype router_type;
    enum router_score score;
    bool renormalise;
    float scale;
    int rows, dim, n_experts, n_chosen;
};

/* Where the matrices of a layer's experts lie: entry e of each table is expert e's.  Tables,
 * because files scatter a layer's experts over their shards, and where weights stay in the mapped
 * file no stride leads from one to the next; a device that has copied them, one behind the other,
 * finds the same pointers before it knows which experts it needs, so they cost no time there.
 * All matrices of a layer are of one type. */
struct expert_weights {
    const void *const *gate, *const *up;  /* [E] device: of [I, M] */
    const void *const *down;              /* [E] device: of [M, I] */
    enum dtype type;
};

/* out[t] = add[t] + sum over i of weights[t, i] * (W_down h_i),  h_i = silu(x_t W_gate^T) *
 * (x_t W_up^T) with the matrices of expert experts[t, i], which are different for different i;
 * what is -1 is left out.  The sum is made in float, in the order: add, i = 0, 1, ... k - 1.
 *
 * A device rounds h_i to act and, for more than 16 rows, also W_down h_i.  Independence is as for
 * other products.                          tolerance: linear's of I, of the largest magnitude of
 *                                          any term of the row; for act = bf16 twice the
 *                                          rounding, each of as much */
struct experts_args {
    void *out;                   /* act [T, M]; may be add */
    const void *x;               /* act [T, M] */
    const void *add;             /* act [T, M], or NULL: zeros */
    const int32_t *experts;      /* [T, k] of route */
    const float *weights;        /* [T, k] */
    struct expert_weights matrices;
    void *scratch;               /* ops->experts_scratch() bytes */
    int rows, dim, expert_dim, n_experts, n_chosen; /* T, M, I, E, k */
};

/* For experts_scratch(): the largest call. */
struct experts_shape {
    int max_rows, dim, expert_dim, n_experts, n_chosen;
};

#ifdef __cplusplus
}
#endif
#endif
