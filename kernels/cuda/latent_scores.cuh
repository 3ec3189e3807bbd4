#ifndef KERNELS_CUDA_LATENT_SCORES_CUH
#define KERNELS_CUDA_LATENT_SCORES_CUH

#include "kernels/cuda/keys.cuh"
#include "kernels/cuda/latent.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/rotate.cuh"

/* Scores of the rotated index of latent rows (kernels/latent.h) with int8 tensor cores, by a
 * warp, some tiles of 16 tokens at a time: an operand of the queries is loaded once for all.
 *
 * A product has 16 tokens as rows, their bits or two-bit codes as the left operand, and the
 * queries' 8-bit values as columns, a head each.  The order of channels in a product is free: a
 * thread takes the bits of its quarter of a token as they lie, four words of the latent part and
 * half a word of the rope part, and bits i and i + 1, or those four further, of each byte of a
 * word are a step's values, 0 and 2^i; the right operand has the values divided by that.  Sums
 * are exact.
 *
 * Hopper's own products, of four warps together with the queries in shared memory, were no
 * faster in the filter and slower for kept blocks (12,000 cycles instead of 9,400 for the eight
 * of a thread block): their 24 columns seem to take as long as 64 would.  Bits that say where
 * operands are, as in two_level.cuh, are no gain with three tiles of columns to a left operand. */

namespace latent {

using namespace sel;

enum {
    TILES = MOST_HEADS / 8,
    WORDS = L / 128,             /* of a token's latent part that a thread has */
    OPERANDS = 8 * WORDS + 4,    /* words of a thread's right operand to a tile of columns, two a */
    STEPS = OPERANDS / 2,        /* step, */
    LATENT_STEPS = 8 * WORDS / 2,    /* these of the latent part */
    TOKEN_BYTES = D / 8,         /* of a bit plane */
    SCALE_BYTES = 4,             /* of a token: two scales */
    PLANE_BYTES = BLOCK_TOKENS * TOKEN_BYTES,
    ITEM_BYTES = SCALE_BYTES + TOKEN_BYTES,    /* scales and signs of a token or a mean */
    SELECT_BYTES = BLOCK_TOKENS * ITEM_BYTES + PLANE_BYTES, /* what the selection reads */
};

/* The queries of a sequence; a lane's right operands of two steps are one load. */
struct __align__(16) queries {
    unsigned right[TILES][STEPS / 2][WARP][4];
    float unit[2][MOST_HEADS];   /* of the latent part, the rope part */
    int sum[2][MOST_HEADS];      /* of the values */
};

/* The float 3 * 2^22: added to an integer of up to 22 bits and a sign it is a float that differs
 * from it by as much. */
static const int MAGIC = 0x4b400000;

/* Where channel d of head h lies in the right operand. */
static __device__ __forceinline__ signed char *digit_at(queries *to, int h, int d)
{
    int part = d < L ? 0 : 1, e = d - part * L;
    int thread = part ? e / (P / 4) : e / (L / 4);
    int byte = part ? e % (P / 4) / 4 : e % 32 / 8;
    int word = part ? 8 * WORDS + e % 4 : e % (L / 4) / 32 * 8 + e % 8;

    return (signed char *)&to->right[h / 8][word / 4][h % 8 * 4 + thread][word % 4] + byte;
}

/* Part `part` of a query, rotated, as 8-bit values; by a warp. */
template <int DIM>
static __device__ __forceinline__ void make_part(queries *to, const __nv_bfloat16 *q, int h,
                                                 int part)
{
    int lane = threadIdx.x % WARP, sum = 0;
    float x[DIM / WARP], top = 0;

    rotate_query<DIM>(x, q + part * L);
#pragma unroll
    for (int i = 0; i < DIM / WARP; i++)
        top = fmaxf(top, fabsf(x[i]));
    top = warp_max(top);
    float per_unit = top > 0 ? __fdiv_rn(127, top) : 0;
#pragma unroll
    for (int i = 0; i < DIM / WARP; i++) {
        int power = lane % 4;    /* of the channel, as bits lie in a byte's halves */
        float level = rintf(__fmul_rn(x[i], per_unit) * (1.0f / (float)(1 << power)));
        int v = max(min((int)level, 127 >> power), -(127 >> power));
        *digit_at(to, h, part * L + lane + WARP * i) = (signed char)v;
        sum += v * (1 << power);
    }
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (lane == 0) {
        to->unit[part][h] = __fdiv_rn(top, 127);
        to->sum[part][h] = sum;
    }
}

/* The queries as scores take them, in shared memory. */
struct __align__(16) operands {
    unsigned right[TILES][STEPS / 2][WARP][4];
    float unit[2][MOST_HEADS];   /* what one of a sum is worth, and */
    float offset[2][MOST_HEADS]; /* what is added to a sum's worth */
    int start[4];                /* of sums: MAGIC; out of memory, because the compiler makes a
                                    constant again for every product */
};

/* Start copying; commit, and wait, and synchronise before they are read.  CODES: for codes. */
template <bool CODES>
static __device__ __forceinline__ void start_operands(operands *to, const queries *from)
{
#pragma unroll 2
    for (int i = threadIdx.x; i < (int)sizeof to->right / 16; i += blockDim.x)
        copy_16(shared_address(to->right) + i * 16, (const char *)from->right + i * 16);
    if (threadIdx.x < 4)
        to->start[threadIdx.x] = MAGIC;
    int part = threadIdx.x / MOST_HEADS, h = threadIdx.x % MOST_HEADS;
    if (part < 2) {              /* of bits 2 sum - all, of codes half of 2 sum - 3 all */
        float unit = from->unit[part][h];
        to->unit[part][h] = (CODES ? 1.0f : 2.0f) * unit;
        to->offset[part][h] = (CODES ? -1.5f : -1.0f) * (float)from->sum[part][h] * unit;
    }
}

/* A sum's worth. */
static __device__ __forceinline__ float worth(int sum, float unit, float offset)
{
    return (__int_as_float(sum) - __int_as_float(MAGIC)) * unit + offset;
}

/* A word of each of a thread's tokens: 16 m + lane / 4 of tile m of M, and the eighth after. */
template <int M, bool CODES>
struct words {
    unsigned sign[M][2], agree[CODES ? M : 1][2];

    /* Of bits i of the lower (upper) half of each byte, of a thread's token of tile m. */
    __device__ __forceinline__ unsigned left(int m, int half, int upper, int i) const
    {
        unsigned v = sign[m][half];

        if constexpr (CODES) {
            unsigned w = agree[m][half]; /* a code is 2 sign + agree: of -3, -1, 1, 3 */
            return ((upper ? v >> 3 : v << 1) & 0x02020202u << i) |
                   ((upper ? w >> 4 : w) & 0x01010101u << i);
        }
        return (upper ? v >> 4 : v) & 0x01010101u << i;
    }
};

static __device__ __forceinline__ unsigned load_rope(unsigned token)
{
    unsigned short rope;

    asm volatile("ld.shared.u16 %0, [%1];"
                 : "=h"(rope) : "r"(token + L / 8 + 2 * (threadIdx.x % 4)) : "memory");
    unsigned v = rope;           /* each nibble starts a byte */
    return (v & 0xf) | (v & 0xf0) << 4 | (v & 0xf00) << 8 | (v & 0xf000) << 12;
}

/* Words w, of the latent part, or WORDS, the rope part, of tokens whose signs are at `signs`. */
template <int M, bool CODES>
static __device__ __forceinline__ void load_words(words<M, CODES> *to, unsigned signs, int w)
{
    auto load = [&](unsigned token) {
        return w == WORDS ? load_rope(token)
                          : load_shared_32(token + 4 * (WORDS * (threadIdx.x % 4) + w));
    };

#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        unsigned token = signs + 8 * i * TOKEN_BYTES;
        to->sign[i / 2][i % 2] = load(token);
        if constexpr (CODES)
            to->agree[i / 2][i % 2] = ~(to->sign[i / 2][i % 2] ^ load(token + PLANE_BYTES));
    }
}

static __device__ __forceinline__ void mma_int8(int (&d)[4], const unsigned (&a)[4], unsigned b0,
                                                unsigned b1, const int (&c)[4])
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]),
          "r"(c[2]), "r"(c[3]));
}

/* The products of steps first to first + N, which a word of each token is good for.  FIRST: of a
 * part, whose sums begin with start. */
template <int N, bool FIRST, int M, bool CODES>
static __device__ __forceinline__ void add_words(int (&d)[M][TILES][4],
                                                 const words<M, CODES> &w, const operands *q,
                                                 int first, const int (&start)[4])
{
    int lane = threadIdx.x % WARP;

#pragma unroll
    for (int pair = 0; pair < N / 2; pair++) {
        uint4 b[TILES];
#pragma unroll
        for (int t = 0; t < TILES; t++)
            b[t] = *(const uint4 *)q->right[t][first / 2 + pair][lane];
#pragma unroll
        for (int step = 0; step < 2; step++)
#pragma unroll
            for (int m = 0; m < M; m++) {
                unsigned left[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    left[i] = w.left(m, i % 2, pair, step * 2 + i / 2);
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    unsigned b0 = step ? b[t].z : b[t].x, b1 = step ? b[t].w : b[t].y;
                    if (FIRST && pair == 0 && step == 0)
                        mma_int8(d[m][t], left, b0, b1, start);
                    else
                        mma_int8(d[m][t], left, b0, b1, d[m][t]);
                }
            }
    }
}

/* Scores of 16 M tokens of a record of ITEMS in shared memory, from token `first` on: best[i] is
 * the largest over the heads of lane % 4 of token first + 8 i + lane / 4. */
template <int M, bool CODES, int ITEMS>
static __device__ __forceinline__ void score_rows(float (&best)[2 * M], unsigned record, int first,
                                                  const operands *q)
{
    int lane = threadIdx.x % WARP, c = lane % 4;
    unsigned scales = record + (first + lane / 4) * SCALE_BYTES;
    unsigned signs = record + ITEMS * SCALE_BYTES + (first + lane / 4) * TOKEN_BYTES;
    int d[M][TILES][4];
    float rope[M][TILES][4];
    words<M, CODES> w;
    int start[4];

    static_assert(!CODES || ITEMS == BLOCK_TOKENS, "means have no second plane");
#pragma unroll
    for (int i = 0; i < 4; i++)
        start[i] = ((const volatile int *)q->start)[i];
    static_assert(LATENT_STEPS == 4 * WORDS && STEPS - LATENT_STEPS == 2, "steps of a word");
    load_words(&w, signs, WORDS);
    add_words<2, true>(d, w, q, LATENT_STEPS, start);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        float2 unit = *(const float2 *)&q->unit[1][8 * t + 2 * c];
        float2 offset = *(const float2 *)&q->offset[1][8 * t + 2 * c];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                rope[m][t][i] = worth(d[m][t][i], i % 2 ? unit.y : unit.x,
                                      i % 2 ? offset.y : offset.x);
    }
    load_words(&w, signs, 0);
    add_words<4, true>(d, w, q, 0, start);
#pragma unroll 1
    for (int i = 1; i < WORDS; i++) {
        load_words(&w, signs, i);
        add_words<4, false>(d, w, q, 4 * i, start);
    }
    float2 scale[2 * M];
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        scale[i] = unpack_bf16(load_shared_32(scales + 8 * i * SCALE_BYTES));
        best[i] = -INFINITY;
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        float2 unit = *(const float2 *)&q->unit[0][8 * t + 2 * c];
        float2 offset = *(const float2 *)&q->offset[0][8 * t + 2 * c];
#pragma unroll
        for (int i = 0; i < 4 * M; i++) { /* head i % 2 of token i / 2 */
            float x = worth(d[i / 4][t][i % 4], i % 2 ? unit.y : unit.x,
                            i % 2 ? offset.y : offset.x);
            best[i / 2] = fmaxf(best[i / 2], x * scale[i / 2].x +
                                             rope[i / 4][t][i % 4] * scale[i / 2].y);
        }
    }
}

}
#endif
