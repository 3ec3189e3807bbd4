#ifndef KERNELS_CUDA_ROTATE_CUH
#define KERNELS_CUDA_ROTATE_CUH

#include "kernels/cuda/cuda.cuh"

/* Rotated keys and queries, by a warp, lane l with channels l + 32 i.  The index must come out as
 * layout.h says to the bit, so its arithmetic here is in functions that round each operation and
 * fuse none. */

/* x = R x for one head, in layout.h's order of additions and to the same bits. */
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

/* x [DIM / WARP]: the sum over a head, adding the upper half to the lower one until one
 * is left; for all lanes. */
template <int PARTS>
static __device__ __forceinline__ float halving_sum(float (&s)[PARTS])
{
#pragma unroll
    for (int half = PARTS / 2; half > 0; half /= 2)
#pragma unroll
        for (int i = 0; i < half; i++)
            s[i] = __fadd_rn(s[i], s[i + half]);
    float sum = s[0];
#pragma unroll
    for (int half = WARP / 2; half > 0; half /= 2)
        sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, half));
    return sum;
}

template <int PARTS>
static __device__ __forceinline__ float mean_square(const float (&x)[PARTS])
{
    float s[PARTS];

#pragma unroll
    for (int i = 0; i < PARTS; i++)
        s[i] = __fmul_rn(x[i], x[i]);
    return __fmul_rn(halving_sum(s), 1.0f / (float)(PARTS * WARP));
}

template <int PARTS>
static __device__ __forceinline__ __nv_bfloat16 scale_of(const float (&x)[PARTS])
{
    return __float2bfloat16_rn(__fmul_rn(0.996f, __fsqrt_rn(mean_square(x))));
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

/* x = (x + other) / 2, of keys as stored. */
template <int PARTS>
static __device__ __forceinline__ void mean_of(float (&x)[PARTS], const float (&other)[PARTS])
{
#pragma unroll
    for (int i = 0; i < PARTS; i++)
        x[i] = __fmul_rn(__fadd_rn(x[i], other[i]), 0.5f);
}

/* The two bit planes and the scale of a key as stored, x, or of a part of one; large NULL: without
 * the second. */
template <int PARTS>
static __device__ __forceinline__ void add_planes(uint8_t *sign, uint8_t *large,
                                                  __nv_bfloat16 *scale, const float (&x)[PARTS])
{
    __nv_bfloat16 rounded = scale_of(x);
    float level = __bfloat162float(rounded), y[PARTS];

#pragma unroll
    for (int i = 0; i < PARTS; i++)
        y[i] = x[i];
    rotate<PARTS * WARP>(y);
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        unsigned s = __ballot_sync(0xffffffffu, y[i] >= 0 && level != 0);
        unsigned l = __ballot_sync(0xffffffffu, fabsf(y[i]) >= level && level != 0);
        if (threadIdx.x % WARP == 0) {
            ((unsigned *)sign)[i] = s;
            if (large)
                ((unsigned *)large)[i] = l;
        }
    }
    if (threadIdx.x % WARP == 0)
        *scale = rounded;
}

#endif
