#ifndef KERNELS_CUDA_KEYS_CUH
#define KERNELS_CUDA_KEYS_CUH

#include "kernels/cuda/cuda.cuh"

/* Scores as unsigned keys of the same order, and the border of the largest by narrowing an
 * interval of keys by two bits a round: slow, and right whatever the keys are.  select.cuh
 * has the way that is usually taken. */

namespace sel {

enum { FORCED_KEY = -1 };        /* as unsigned: above every score */

enum { BINS = 256, LANE_BINS = BINS / WARP, BIN_KEYS = 256, MAX_WARPS = 16,
       BINADE = 1 << 23, BINADES = 4 * BINADE };

static const unsigned POSITIVE = 0x81000000u; /* keys of normal positive floats are above */

/* Per-block memory of the functions below. */
struct __align__(16) counts {
    int bins[BINS + 4];          /* and one for what is below all */
    int warp[2][MAX_WARPS][3];   /* two sets by turns save a barrier a round */
    unsigned low[MAX_WARPS], high[MAX_WARPS], border, largest;
    int chosen[MAX_WARPS];
    int n_bin, equal;
    unsigned bin_keys[BIN_KEYS];
};

/* How many of keys[0..n) are >= each border; for all threads. */
static __device__ __forceinline__ void count_above(const unsigned *keys, int n,
                                                   const unsigned border[3], int total[3],
                                                   counts *c, int turn)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    int own[3] = { 0, 0, 0 };

    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        unsigned key = keys[i];
        own[0] += key >= border[0];
        own[1] += key >= border[1];
        own[2] += key >= border[2];
    }
    for (int j = 0; j < 3; j++) {
        own[j] = __reduce_add_sync(0xffffffffu, own[j]);
        if (lane == 0)
            c->warp[turn][warp][j] = own[j];
    }
    __syncthreads();
    for (int j = 0; j < 3; j++) {
        int part = lane < n_warps ? c->warp[turn][lane][j] : 0;
        total[j] = __reduce_add_sync(0xffffffffu, part);
    }
}

/* As border_by_bins() of select.cuh, without bins. */
static __device__ __noinline__ unsigned narrow_border(const unsigned *keys, int n, int keep,
                                                      int *equal, counts *c)
{
    unsigned low = 0, size = 1u << 30; /* the border is in [low, low + 4 size) */
    int above = 0;                     /* keys >= low + 4 size */

    for (int round = 0;; round++, size >>= 2) {
        unsigned border[3] = { low + size, low + 2 * size, low + 3 * size };
        int total[3];
        count_above(keys, n, border, total, c, round & 1);
        int j = total[2] >= keep ? 3 : total[1] >= keep ? 2 : total[0] >= keep ? 1 : 0;
        if (j < 3)
            above = total[j];
        if (j > 0) {
            low = border[j - 1];
            if (total[j - 1] == keep) {
                *equal = n;
                return low;
            }
        }
        if (size == 1) {
            *equal = keep - above;
            return low;
        }
    }
}

}
#endif
