#ifndef KERNELS_CUDA_LATENT_TILE_CUH
#define KERNELS_CUDA_LATENT_TILE_CUH

#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/latent_rows.cuh"

/* Attention of a thread block to latent rows, TILE tokens at a time.
 *
 * The queries are the columns of all products: the heads of one row of a step, or those of some
 * rows.  A tile's rows serve as keys and, their first L values, as values, so they are read from
 * memory once:
 *
 *   scores   tokens x columns.  Of the eight warps two share the tokens and four the channels of
 *            a row, so that no warp has a long chain of products; the sums of four are a score
 *   weights  a warp has some columns, a lane a token
 *   values   channels x columns: a warp has SLICE of the L channels, and keeps their sums
 *
 * The values of a tile and the scores of the next one are made together, so that there is enough
 * to do while a product is on its way.  Few queries stay in registers.
 *
 * All threads of a block call everything here together. */

namespace latent {

enum {
    TOKEN_WARPS = TILE / 16,
    QUARTERS = WARPS / TOKEN_WARPS,
    QUARTER = D / QUARTERS,      /* channels of a score that one warp sums */
    SLICE = L / WARPS,           /* channels of values that one warp sums */
    QUERY_STRIDE = D + 8,        /* elements; rows end in a gap against bank conflicts, */
    SCORE_STRIDE = TILE + 4,     /* as these */
    WEIGHT_STRIDE = TILE + 8,
};
static_assert(QUARTER % 16 == 0 && SLICE % 16 == 0, "products take 16");

/* Whether a warp's part of the queries stays in registers. */
template <int COLUMNS>
constexpr bool few_columns = COLUMNS <= MOST_HEADS;

/* Shared memory but for the tiles; COLUMNS is a multiple of 8. */
template <int COLUMNS>
struct __align__(128) work {
    __nv_bfloat16 query[few_columns<COLUMNS> ? 1 : COLUMNS]
                       [few_columns<COLUMNS> ? 8 : QUERY_STRIDE];
    float score[QUARTERS][COLUMNS][SCORE_STRIDE];
    __nv_bfloat16 weight[COLUMNS][WEIGHT_STRIDE];
    float shrink[COLUMNS];       /* of a tile's sums so far; at the end the maximum, */
    float sum[COLUMNS];          /* and the sum of weights */
};

/* What a thread knows: its token's part of the columns of its warp, and its sums of values:
 * channels SLICE * warp + 16 i + lane / 4 (+ 8 for words 2 and 3), columns 8 j + 2 (lane % 4). */
template <int COLUMNS>
struct state {
    unsigned query[few_columns<COLUMNS> ? QUARTER / 16 : 1][COLUMNS / 8][2];
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

/* Queries of n columns: that of column i is at query(i).  The others are zeros.  Synchronise before
 * scores are made of them. */
template <int COLUMNS, typename F>
static __device__ __forceinline__ void load_queries(state<COLUMNS> *s, work<COLUMNS> *w, int n,
                                                    const F &query)
{
    if constexpr (few_columns<COLUMNS>) { /* as right operands */
        int lane = threadIdx.x % WARP, from = threadIdx.x / WARP / TOKEN_WARPS * QUARTER;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
            int column = 8 * j + lane / 4;
            const __nv_bfloat16 *q = query(min(column, n - 1)) + from + lane % 4 * 2;
#pragma unroll
            for (int step = 0; step < QUARTER / 16; step++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    s->query[step][j][half] =
                        column < n ? *(const unsigned *)(q + step * 16 + half * 8) : 0;
        }
    } else {
        for (int i = threadIdx.x; i < COLUMNS * PIECES; i += THREADS) {
            int column = i / PIECES, at = i % PIECES * 8;
            *(uint4 *)&w->query[column][at] =
                column < n ? *(const uint4 *)(query(column) + at) : make_uint4(0, 0, 0, 0);
        }
    }
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
static __device__ __forceinline__ void make_scores(const state<COLUMNS> &s, work<COLUMNS> *w,
                                                   unsigned tile)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, matrix = lane / 8;
    int token = warp % TOKEN_WARPS * 16, quarter = warp / TOKEN_WARPS;
    int row = token + lane % 8 + matrix % 2 * 8, piece = quarter * (QUARTER / 8) + matrix / 2;
    float score[COLUMNS / 8][4] = {};

#pragma unroll
    for (int step = 0; step < QUARTER / 16; step++) {
        unsigned a[4];
        load_matrices(a, tile + piece_at(row, piece + 2 * step));
        if constexpr (few_columns<COLUMNS>) {
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j++)
                mma_bf16(score[j], a, s.query[step][j][0], s.query[step][j][1]);
        } else {
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j += 2) {
                unsigned b[4];
                load_columns<COLUMNS>(b, &w->query[0][quarter * QUARTER + step * 16],
                                      QUERY_STRIDE, 8 * j);
                mma_bf16(score[j], a, b[0], b[1]);
                mma_bf16(score[j + 1], a, b[2], b[3]);
            }
        }
    }
    token += lane / 4;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            w->score[quarter][8 * j + lane % 4 * 2 + k % 2][token + k / 2 * 8] = score[j][k];
}

/* Of a warp; not for NaN. */
static __device__ __forceinline__ float largest_of(float v)
{
    int bits = __float_as_int(v);

    bits = __reduce_max_sync(0xffffffffu, bits ^ (bits >> 31 & 0x7fffffff));
    return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff));
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
        float top = fmaxf(s->max[i], largest_of(score));
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

/* Tiles 0 to n - 1 (at least one), of which start(tile) has been called for the first DEPTH: tile i
 * goes into slot i % DEPTH of the ring.  arrive(tile) waits until it has arrived and synchronises
 * the block.  visible(tile, column): how many of its tokens the column sees. */
template <int COLUMNS, int DEPTH, typename S, typename A, typename V>
static __device__ __forceinline__ void attend_tiles(state<COLUMNS> *s, work<COLUMNS> *w,
                                                    unsigned ring, int n, float scale,
                                                    const S &start, const A &arrive,
                                                    const V &visible)
{
    auto slot = [&](int tile) { return ring + tile % DEPTH * TILE_BYTES; };

    static_assert(DEPTH >= 3, "a tile whose values, one whose scores are made, one on its way");
    arrive(0);
    make_scores<COLUMNS>(*s, w, ring);
    __syncthreads();
    make_weights<COLUMNS>(s, w, scale, [&](int column) { return visible(0, column); });
    for (int tile = 0; tile < n; tile++) {
        if (tile + 1 < n)
            arrive(tile + 1);    /* and the weights of this one, and the slot before it is free */
        else
            __syncthreads();
        if (tile > 0)            /* into the slot of the one before */
            start(tile + DEPTH - 1);
        if (tile + 1 < n)
            make_scores<COLUMNS>(*s, w, slot(tile + 1));
        add_values<COLUMNS>(s, w, slot(tile));
        __syncthreads();
        if (tile + 1 < n)
            make_weights<COLUMNS>(s, w, scale,
                                  [&](int column) { return visible(tile + 1, column); });
    }
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
