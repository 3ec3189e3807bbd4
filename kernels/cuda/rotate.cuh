#ifndef KERNELS_CUDA_ROTATE_CUH
#define KERNELS_CUDA_ROTATE_CUH

#include "kernels/cuda/cuda.cuh"

/* x = R x for one head by one warp, lane l with channels l + 32 i, in layout.h's order of
 * additions and to the same bits. */
template <int DIM>
static __device__ __forceinline__ void rotate(float *x)
{
    int lane = threadIdx.x % WARP;

#pragma unroll
    for (int i = 0; i < DIM / WARP; i++)
        x[i] = rotation_sign(lane + WARP * i) < 0 ? -x[i] : x[i];
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2)
#pragma unroll
        for (int i = 0; i < DIM / WARP; i++) {
            float other = __shfl_xor_sync(0xffffffffu, x[i], distance);
            x[i] = lane & distance ? other - x[i] : x[i] + other;
        }
#pragma unroll
    for (int distance = 1; distance < DIM / WARP; distance *= 2)
#pragma unroll
        for (int i = 0; i < DIM / WARP; i++)
            if (!(i & distance)) {
                float a = x[i], b = x[i + distance];
                x[i] = a + b;
                x[i + distance] = a - b;
            }
#pragma unroll
    for (int i = 0; i < DIM / WARP; i++)
        x[i] = __fmul_rn(x[i], __fdiv_rn(1, __fsqrt_rn((float)DIM)));
}

/* x = R q of a stored query. */
template <int DIM>
static __device__ __forceinline__ void rotate_query(float *x, const __nv_bfloat16 *q)
{
#pragma unroll
    for (int i = 0; i < DIM / WARP; i++)
        x[i] = __bfloat162float(q[threadIdx.x % WARP + WARP * i]);
    rotate<DIM>(x);
}

#endif
