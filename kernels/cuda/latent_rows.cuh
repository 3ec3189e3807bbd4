#ifndef KERNELS_CUDA_LATENT_ROWS_CUH
#define KERNELS_CUDA_LATENT_ROWS_CUH

#include "kernels/cuda/latent.cuh"
#include "kernels/cuda/mma.cuh"

/* Tiles of latent rows on their way to shared memory. */

namespace latent {

enum {
    WARPS = 8,
    THREADS = WARPS * WARP,
    TILE = 32,                   /* tokens: a lane each */
    ROW_BYTES = 2 * D,
    PIECES = ROW_BYTES / 16,     /* of 16 bytes a row */
    TILE_BYTES = TILE * ROW_BYTES,
};

/* In a tile piece p of row i lies at p ^ i % 8: equal pieces of rows in different banks, and no
 * line of 128 bytes torn. */
static __device__ __forceinline__ unsigned piece_at(int row, int piece)
{
    return (unsigned)(row * ROW_BYTES + (piece ^ (row & 7)) * 16);
}

/* Start copying a tile: row i is at row(i), for i below n; others become zeros.  A warp copies
 * whole rows. */
template <typename F>
static __device__ __forceinline__ void start_tile(unsigned tile, int n, const F &row)
{
    enum { WHOLE = PIECES / WARP, REST = PIECES % WARP };
    int lane = threadIdx.x % WARP, first = threadIdx.x / WARP;

    if (n > 0)
#pragma unroll
        for (int k = 0; k < TILE / WARPS; k++) {
            int r = first + k * WARPS;
            const __nv_bfloat16 *from = row(min(r, n - 1)) + lane * 8;
            unsigned to = tile + piece_at(r, lane);
#pragma unroll
            for (int i = 0; i < WHOLE; i++)
                copy_16(to + i * WARP * 16, from + i * WARP * 8, r < n);
            if (lane < REST)
                copy_16(to + WHOLE * WARP * 16, from + WHOLE * WARP * 8, r < n);
        }
    copy_commit();               /* one group a tile, empty or not, for copy_wait() */
}

/* Wait for tile `tile` of attend_tiles(), of which tile + DEPTH - 2 have been started, or DEPTH. */
template <int DEPTH>
static __device__ __forceinline__ void wait_for_tile(int tile)
{
    if (tile == 0)
        copy_wait<DEPTH - 1>();
    else if (tile == 1)
        copy_wait<DEPTH - 2>();
    else
        copy_wait<DEPTH - 3>();
}

}
#endif
