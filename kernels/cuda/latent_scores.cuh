#ifndef KERNELS_CUDA_LATENT_SCORES_CUH
#define KERNELS_CUDA_LATENT_SCORES_CUH

#include "kernels/cuda/keys.cuh"
#include "kernels/cuda/latent.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/rotate.cuh"

/* Scores of the rotated index of latent rows (kernels/latent.h) with int8 tensor cores; by a warp.
 *
 * A product has 16 tokens as rows, their bits as the left operand, and the queries' 8-bit values as
 * columns, a head each; TILES products of 8 columns have all heads.  As in two_level.cuh the order
 * of channels in a product is free: a thread takes the bits of its quarter of a token as they lie,
 * four words of the latent part and half a word of the rope part, and bit i or i + 4 of each byte
 * of a word is a step's four values, 0 and 2^i; the right operand has the values divided by that.
 * Sums are exact. */

namespace latent {

using namespace sel;

enum {
    TILES = MOST_HEADS / 8,
    WORDS = L / 128,             /* of a token's latent part that a thread has */
    OPERANDS = 8 * WORDS + 4,    /* words of a thread's right operand to a tile of columns */
    TOKEN_BYTES = D / 8,         /* of a bit plane */
    SCALE_BYTES = 4,             /* of a token: two scales */
    PLANE_BYTES = BLOCK_TOKENS * TOKEN_BYTES,
    FILTER_BYTES = BLOCK_TOKENS * (SCALE_BYTES + TOKEN_BYTES), /* of a record: scales and signs, */
    SELECT_BYTES = FILTER_BYTES + PLANE_BYTES,                 /* and what the selection reads */
};

/* The queries of a sequence. */
struct __align__(16) queries {
    unsigned right[TILES][OPERANDS][WARP];
    float unit[2][MOST_HEADS];   /* of the latent part, the rope part */
    int sum[2][MOST_HEADS];      /* of the values */
};

/* The float 3 * 2^22: added to an integer of up to 22 bits and a sign it is a float that differs
 * from it by as much. */
static const int MAGIC = 0x4b400000;

static __device__ __forceinline__ float sum_of(int d)
{
    return __int_as_float(d) - __int_as_float(MAGIC);
}

/* Where channel d of head h lies in the right operand. */
static __device__ __forceinline__ signed char *digit_at(queries *to, int h, int d)
{
    int part = d < L ? 0 : 1, e = d - part * L;
    int thread = part ? e / (P / 4) : e / (L / 4);
    int byte = part ? e % (P / 4) / 4 : e % 32 / 8;
    int word = part ? 8 * WORDS + e % 4 : e % (L / 4) / 32 * 8 + e % 8;

    return (signed char *)&to->right[h / 8][word][h % 8 * 4 + thread] + byte;
}

/* Part `part` of a query, rotated, as 8-bit values. */
template <int DIM>
static __device__ __forceinline__ void load_part(queries *to, const __nv_bfloat16 *q, int h,
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

/* Start copying those of a sequence to shared memory; commit, and wait, and synchronise before they
 * are read. */
static __device__ __forceinline__ void start_queries(queries *to, const queries *from)
{
    static_assert(sizeof *to % 16 == 0, "whole pieces");
    for (int i = threadIdx.x; i < (int)sizeof *to / 16; i += blockDim.x)
        copy_16(shared_address(to) + i * 16, (const char *)from + i * 16);
}

/* What a thread holds of the queries; columns of results are heads 8 t + 2 (lane % 4) + i.  Of
 * a sum over bits, or codes, S the share in a score is S * twice[part] - all[part], times the
 * token's scale.  For the rope part's operand there are no registers. */
struct query_side {
    unsigned right[TILES][8 * WORDS];
    float twice[2][TILES][2], all[2][TILES][2];
};

static __device__ __forceinline__ void load_query_side(query_side *q, const queries *from,
                                                       float twice, float all)
{
    int lane = threadIdx.x % WARP;

#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int i = 0; i < 8 * WORDS; i++)
            q->right[t][i] = from->right[t][i][lane];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int part = 0; part < 2; part++) {
                int head = 8 * t + lane % 4 * 2 + i;
                float unit = from->unit[part][head];
                q->twice[part][t][i] = twice * unit;
                q->all[part][t][i] = all * (float)from->sum[part][head] * unit;
            }
    }
}

/* A thread's quarter of a token's bits. */
struct quarter { unsigned word[WORDS], rope; };

static __device__ __forceinline__ quarter load_quarter(unsigned token)
{
    int c = threadIdx.x % 4;
    unsigned short rope;
    quarter q;

    static_assert(WORDS == 4, "two loads of two words");
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(q.word[0]), "=r"(q.word[1]) : "r"(token + 16 * c) : "memory");
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(q.word[2]), "=r"(q.word[3]) : "r"(token + 16 * c + 8) : "memory");
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(rope) : "r"(token + L / 8 + 2 * c) : "memory");
    unsigned v = rope;           /* each nibble starts a byte */
    q.rope = (v & 0xf) | (v & 0xf0) << 4 | (v & 0xf00) << 8 | (v & 0xf000) << 12;
    return q;
}

/* The token's two scales. */
static __device__ __forceinline__ float2 load_scales(unsigned at)
{
    unsigned v;

    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return unpack_bf16(v);
}

static __device__ __forceinline__ void mma_int8(int (&d)[4], const unsigned (&a)[4], unsigned b0,
                                                unsigned b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* The left operand of bits i and i + 1 of the lower half of each byte. */
static __device__ __forceinline__ void bits_of(unsigned (&left)[4], unsigned low, unsigned high, int i)
{
    left[0] = low & 0x01010101u << i;
    left[1] = high & 0x01010101u << i;
    left[2] = low & 0x02020202u << i;
    left[3] = high & 0x02020202u << i;
}

/* Of codes 2 sign + agree. */
static __device__ __forceinline__ unsigned code_of(unsigned sign, unsigned agree, int i)
{
    return (sign << 1 & 0x02020202u << i) | (agree & 0x01010101u << i);
}

/* One product for all heads; `at` of the right operand. */
static __device__ __forceinline__ void multiply(int (&d)[TILES][4], const unsigned (&left)[4],
                                                const query_side &q, int at)
{
#pragma unroll
    for (int t = 0; t < TILES; t++)
        mma_int8(d[t], left, q.right[t][at], q.right[t][at + 1]);
}

static __device__ __forceinline__ void multiply_rope(int (&d)[TILES][4], const unsigned (&left)[4],
                                                     const queries *q, int i)
{
    int lane = threadIdx.x % WARP;

#pragma unroll
    for (int t = 0; t < TILES; t++)
        mma_int8(d[t], left, q->right[t][8 * WORDS + i][lane], q->right[t][8 * WORDS + i + 1][lane]);
}

static __device__ __forceinline__ void start_sums(int (&d)[TILES][4])
{
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            d[t][i] = MAGIC;
}

}
#endif
