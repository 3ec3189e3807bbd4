#ifndef KERNELS_CUDA_LAG_CUH
#define KERNELS_CUDA_LAG_CUH

#include "kernels/cuda/cuda.cuh"

/* Blocks kept one step late (lagged_blocks.h), between the two levels. */

/* With the three operations: from what block_filter kept to what token_select chooses from. */
struct lag_lists {
    const int32_t *kept, *n_kept;   /* [S, G, keep_blocks], [S, G] of block_filter */
    int32_t *from, *n_from;         /* likewise, for token_select */
};
void queue_lag_lists(struct stream *s, const struct attend_two_level_args *a,
                     const struct lag_lists &lists);

/* With the fused kernels: rewrites the filter's keys [S, G, max_blocks], where the stored list
 * counts, so that the best keep_blocks of them are what is to be chosen from.  kept is work space
 * [S, G, keep_blocks]. */
void queue_lag_keys(struct stream *s, const struct attend_two_level_args *a, unsigned *keys,
                    int32_t *kept);

#endif
