#ifndef KERNELS_CUDA_ATTEND_CUH
#define KERNELS_CUDA_ATTEND_CUH

#include "kernels/cuda/mma.cuh"

/* The softmax of a warp over tiles of tokens, shared by the attention kernels.
 *
 * Scores come in the order of an mma's result, 16 rows by TOKENS columns: of row lane / 4
 * words 0 and 1 and of row lane / 4 + 8 words 2 and 3 of each 8 columns.  A weight is 2 to
 * the score times `scale`, which has LOG2_E in it. */

static const float LOG2_E = 1.4426950408889634f;

static __device__ __forceinline__ float exp2_fast(float x)
{
    float y;

    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <int DIM>
struct softmax {
    float max[2], sum[2];        /* of rows lane / 4 and lane / 4 + 8; until softmax_end() max
                                    is without scale and sum is this lane's part */
    float acc[DIM / 8][4];       /* weighted sums of values, as an mma's result */
};

template <int DIM>
static __device__ __forceinline__ softmax<DIM> softmax_empty()
{
    softmax<DIM> s = { { -INFINITY, -INFINITY }, { 0, 0 }, {} };

    return s;
}

/* Scores to weights.  What was summed so far is to be multiplied by `shrink`, which is done
 * here but for acc. */
template <int DIM, int TILES>
static __device__ __forceinline__ void softmax_weights(softmax<DIM> *s, float (&score)[TILES][4],
                                                       float (&shrink)[2], float scale)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = s->max[half];
#pragma unroll
        for (int i = 0; i < TILES; i++)
            top = fmaxf(top, fmaxf(score[i][2 * half], score[i][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        /* A row that sees nothing yet has no maximum.  Where the maximum stays, the factor
         * must be 1 to the bit: whether a tile that is masked for a row is taken depends on
         * the other rows.  So the difference comes before the product. */
        float known = top == -INFINITY ? 0 : top, base = known * scale;
        shrink[half] = exp2_fast((s->max[half] - known) * scale);
        s->max[half] = top;
        s->sum[half] *= shrink[half];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 2 * half; j < 2 * half + 2; j++) {
                score[i][j] = exp2_fast(score[i][j] * scale - base);
                s->sum[half] += score[i][j];
            }
    }
}

template <int DIM>
static __device__ __forceinline__ void softmax_shrink(softmax<DIM> *s, const float (&shrink)[2])
{
#pragma unroll
    for (int i = 0; i < DIM / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            s->acc[i][j] *= shrink[j / 2];
}

/* Scores to weights, and what was summed so far to the new maximum. */
template <int DIM, int TILES>
static __device__ __forceinline__ void softmax_step(softmax<DIM> *s, float (&score)[TILES][4],
                                                    float scale)
{
    float shrink[2];

    softmax_weights(s, score, shrink, scale);
    softmax_shrink(s, shrink);
}

template <int DIM>
static __device__ __forceinline__ void softmax_end(softmax<DIM> *s, float scale)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        s->sum[half] += __shfl_xor_sync(0xffffffffu, s->sum[half], 1);
        s->sum[half] += __shfl_xor_sync(0xffffffffu, s->sum[half], 2);
        s->max[half] *= scale;
    }
}

#endif
