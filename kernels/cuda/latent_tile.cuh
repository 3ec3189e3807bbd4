#ifndef KERNELS_CUDA_LATENT_TILE_CUH
#define KERNELS_CUDA_LATENT_TILE_CUH

#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/latent.cuh"

/* Attention of a thread block to latent rows, TILE tokens at a time.
 *
 * The queries are the columns of all products: the heads of one row of a step, or those of some
 * rows.  A tile's rows serve as keys and, their first L values, as values, so they are read from
 * memory once:
 *
 *   scores   tokens x columns.  Of the eight warps two share the tokens and four the channels of
 *            a row, so that no warp has a long chain of products; the sums of four are a score
 *   softmax  a warp has some columns, a lane a token
 *   values   channels x columns: a warp has SLICE of the L channels, and keeps their sums
 *
 * All threads of a block call everything here together. */

namespace latent {

enum {
    WARPS = 8,
    THREADS = WARPS * WARP,
    TILE = 32,                   /* tokens: a lane each */
    ROW_BYTES = 2 * D,
    PIECES = ROW_BYTES / 16,     /* of 16 bytes a row */
    TOKEN_WARPS = TILE / 16,
    QUARTERS = WARPS / TOKEN_WARPS,
    QUARTER = D / QUARTERS,      /* channels of a score that one warp sums */
    SLICE = L / WARPS,           /* channels of values that one warp sums */
    TILE_BYTES = TILE * ROW_BYTES,
    QUERY_STRIDE = D + 8,        /* elements; rows end in a gap against bank conflicts, */
    SCORE_STRIDE = TILE + 4,     /* as these */
    WEIGHT_STRIDE = TILE + 8,
};
static_assert(QUARTER % 16 == 0 && SLICE % 16 == 0, "products take 16");

/* Shared memory but for the tiles; COLUMNS is a multiple of 8. */
template <int COLUMNS>
struct __align__(128) work {
    __nv_bfloat16 query[COLUMNS][QUERY_STRIDE];
    float score[QUARTERS][COLUMNS][SCORE_STRIDE];
    __nv_bfloat16 weight[COLUMNS][WEIGHT_STRIDE];
    float shrink[COLUMNS];       /* of a tile's sums so far; at the end the maximum, */
    float sum[COLUMNS];          /* and the sum of weights */
};

/* What a thread knows: its token's part of the columns of its warp, and its sums of values:
 * channels SLICE * warp + 16 i + lane / 4 (+ 8 for words 2 and 3), columns 8 j + 2 (lane % 4). */
template <int COLUMNS>
struct state {
    float max[COLUMNS / WARPS], sum[COLUMNS / WARPS];
    float acc[SLICE / 16][COLUMNS / 8][4];
};

template <int COLUMNS>
static __device__ __forceinline__ void clear(state<COLUMNS> *s)
{
#pragma unroll
    for (int i = 0; i < COLUMNS / WARPS; i++) {
        s->max[i] = -INFINITY;
        s->sum[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < SLICE / 16; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                s->acc[i][j][k] = 0;
}

/* Queries of n columns, one behind the other, zeros for the others. */
template <int COLUMNS>
static __device__ __forceinline__ void load_queries(work<COLUMNS> *w, const __nv_bfloat16 *q, int n)
{
    for (int i = threadIdx.x; i < COLUMNS * PIECES; i += THREADS) {
        int column = i / PIECES, at = i % PIECES * 8;
        *(uint4 *)&w->query[column][at] =
            column < n ? *(const uint4 *)(q + (size_t)column * D + at) : make_uint4(0, 0, 0, 0);
    }
}

/* In a tile piece p of row i lies at p ^ i % 8: equal pieces of rows in different banks, and no
 * line of 128 bytes torn. */
static __device__ __forceinline__ unsigned piece_at(int row, int piece)
{
    return (unsigned)(row * ROW_BYTES + (piece ^ (row & 7)) * 16);
}

/* Start copying a tile: row i is at row(i), for i below n; others become zeros. */
template <typename F>
static __device__ __forceinline__ void start_tile(unsigned tile, int n, const F &row)
{
    static_assert(TILE * PIECES % THREADS == 0, "all threads have the same number");
    if (n > 0)
#pragma unroll
        for (int k = 0; k < TILE * PIECES / THREADS; k++) {
            int i = k * THREADS + threadIdx.x, r = i / PIECES, piece = i % PIECES;
            copy_16(tile + piece_at(r, piece), row(min(r, n - 1)) + piece * 8, r < n);
        }
    copy_commit();               /* one group a tile, empty or not, for copy_wait() */
}

/* The right operand of two products side by side, 16 columns; of the last eight where there are
 * no more, twice. */
template <int COLUMNS>
static __device__ __forceinline__ void load_columns(unsigned (&b)[4], const __nv_bfloat16 *from,
                                                    int stride, int first)
{
    int lane = threadIdx.x % WARP, matrix = lane / 8;
    int column = first + lane % 8 + (first + 8 < COLUMNS ? matrix / 2 * 8 : 0);

    load_matrices(b, shared_address(from + column * stride + matrix % 2 * 8));
}

template <int COLUMNS>
static __device__ __forceinline__ void make_scores(work<COLUMNS> *w, unsigned tile)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, matrix = lane / 8;
    int token = warp % TOKEN_WARPS * 16, quarter = warp / TOKEN_WARPS;
    int row = token + lane % 8 + matrix % 2 * 8, piece = quarter * (QUARTER / 8) + matrix / 2;
    float score[COLUMNS / 8][4] = {};

#pragma unroll
    for (int step = 0; step < QUARTER / 16; step++) {
        unsigned a[4], b[4];
        load_matrices(a, tile + piece_at(row, piece + 2 * step));
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j += 2) {
            load_columns<COLUMNS>(b, &w->query[0][quarter * QUARTER + step * 16], QUERY_STRIDE,
                                  8 * j);
            mma_bf16(score[j], a, b[0], b[1]);
            if (j + 1 < COLUMNS / 8)
                mma_bf16(score[j + 1], a, b[2], b[3]);
        }
    }
    token += lane / 4;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            w->score[quarter][8 * j + lane % 4 * 2 + k % 2][token + k / 2 * 8] = score[j][k];
}

/* Scores to weights.  visible(column): how many of this tile's tokens it sees.  A weight is 2 to
 * the score times scale, which has LOG2_E in it. */
template <int COLUMNS, typename F>
static __device__ __forceinline__ void make_weights(state<COLUMNS> *s, work<COLUMNS> *w,
                                                    float scale, const F &visible)
{
    int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * (COLUMNS / WARPS);

#pragma unroll
    for (int i = 0; i < COLUMNS / WARPS; i++) {
        int column = first + i;
        float score = 0;
#pragma unroll
        for (int quarter = 0; quarter < QUARTERS; quarter++)
            score += w->score[quarter][column][lane];
        score = lane < visible(column) ? score : -INFINITY;
        float top = fmaxf(s->max[i], warp_max(score));
        /* As softmax_weights(): where the maximum stays the factor is 1 to the bit. */
        float known = top == -INFINITY ? 0 : top;
        float shrink = exp2_fast((s->max[i] - known) * scale);
        float weight = exp2_fast(score * scale - known * scale);
        s->max[i] = top;
        s->sum[i] = s->sum[i] * shrink + weight;
        w->weight[column][lane] = __float2bfloat16_rn(weight);
        if (lane == 0)
            w->shrink[column] = shrink;
    }
}

template <int COLUMNS>
static __device__ __forceinline__ void add_values(state<COLUMNS> *s, const work<COLUMNS> *w,
                                                  unsigned tile)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, matrix = lane / 8;
    float2 shrink[COLUMNS / 8];
    bool moved = false;

#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
        shrink[j] = *(const float2 *)&w->shrink[8 * j + lane % 4 * 2];
        moved |= shrink[j].x != 1 || shrink[j].y != 1;
    }
    if (__any_sync(0xffffffffu, moved))
#pragma unroll
        for (int i = 0; i < SLICE / 16; i++)
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    s->acc[i][j][k] *= k % 2 ? shrink[j].y : shrink[j].x;
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
        unsigned b[(COLUMNS / 8 + 1) / 2][4];
        int row = step * 16 + matrix / 2 * 8 + lane % 8;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j += 2)
            load_columns<COLUMNS>(b[j / 2], &w->weight[0][step * 16], WEIGHT_STRIDE, 8 * j);
#pragma unroll
        for (int i = 0; i < SLICE / 16; i++) {
            unsigned a[4];
            load_matrices_turned(a, tile + piece_at(row, warp * (SLICE / 8) + 2 * i + matrix % 2));
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j++)
                mma_bf16(s->acc[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
}

/* A tile that all threads have seen arrive. */
template <int COLUMNS, typename F>
static __device__ __forceinline__ void attend_tile(state<COLUMNS> *s, work<COLUMNS> *w,
                                                   unsigned tile, float scale, const F &visible)
{
    make_scores<COLUMNS>(w, tile);
    __syncthreads();
    make_weights<COLUMNS>(s, w, scale, visible);
    __syncthreads();
    add_values<COLUMNS>(s, w, tile);
}

/* The columns' maxima (times scale) and sums of weights to w->shrink and w->sum; synchronise
 * before, and before they are read. */
template <int COLUMNS>
static __device__ __forceinline__ void publish_sums(const state<COLUMNS> *s, work<COLUMNS> *w,
                                                    float scale)
{
    int first = threadIdx.x / WARP * (COLUMNS / WARPS);

#pragma unroll
    for (int i = 0; i < COLUMNS / WARPS; i++) {
        float sum = warp_sum(s->sum[i]);
        if (threadIdx.x % WARP == 0) {
            w->shrink[first + i] = s->max[i] * scale;
            w->sum[first + i] = sum;
        }
    }
}

/* to(channel, column, value) for each of this thread's sums of values. */
template <int COLUMNS, typename F>
static __device__ __forceinline__ void each_value(const state<COLUMNS> &s, const F &to)
{
    int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * SLICE + lane / 4;

#pragma unroll
    for (int i = 0; i < SLICE / 16; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                to(first + 16 * i + k / 2 * 8, 8 * j + lane % 4 * 2 + k % 2, s.acc[i][j][k]);
}

}
#endif
