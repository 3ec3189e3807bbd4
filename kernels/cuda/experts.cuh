#ifndef KERNELS_CUDA_EXPERTS_CUH
#define KERNELS_CUDA_EXPERTS_CUH

#include "kernels/cuda/cuda.cuh"

/* Memory of the experts operation.  A pair is a row and one of its experts: number row * k + i. */

enum { FEW_EXPERT_ROWS = 16 };   /* for which the weights of an expert are streamed once */

/* Sorted pairs [first, first + n) of one expert. */
struct expert_tile {
    int expert, first, n;
};

struct experts_memory {
    __nv_bfloat16 *mid;          /* [pairs, I]; sorted where there are tiles */
    __nv_bfloat16 *terms;        /* [pairs, M]  W_down h of a pair */
    int *order;                  /* [pairs] sorted by expert, then by number */
    struct expert_tile *tiles;   /* [experts_most_tiles()] */
    int *n_tiles;
    size_t bytes;
};

/* Rows of a tile for so many pairs: as few as waste less than half of the work on average, and no
 * more than tensor cores like. */
static inline int experts_tile_rows(int pairs, int n_experts)
{
    int average = pairs / n_experts;

    return average > 64 ? 128 : average > 24 ? 64 : 32;
}

/* Each expert that has pairs may have one tile that is not full. */
static inline int experts_most_tiles(int pairs, int n_experts, int tile_rows)
{
    return pairs / tile_rows + (n_experts < pairs ? n_experts : pairs);
}

struct experts_memory experts_memory_of(void *base, const struct experts_shape *shape);

#endif
