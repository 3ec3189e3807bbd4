#ifndef KERNELS_CUDA_LATENT_SCORES_CUH
#define KERNELS_CUDA_LATENT_SCORES_CUH

#include "kernels/cuda/keys.cuh"
#include "kernels/cuda/latent.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/rotate.cuh"

#include <type_traits>

/* Scores of the rotated index of latent rows (kernels/latent.h) with int8 tensor cores, by four
 * neighbouring warps, a group, together: a block's 64 tokens at a time, 16 of them each warp's.
 *
 * A product has the tokens as rows, their bits as the left operand, and the queries' 8-bit values
 * as columns, a head each.  As in two_level.cuh the order of channels in a product is free: a
 * thread takes the bits of its quarter of a token as they lie, four words of the latent part and
 * half a word of the rope part, and bits i and i + 1, or those four further, of each byte of a
 * word are a step's values, 0 and 2^i; the right operand has the values divided by that.  Sums are
 * exact.
 *
 * Hopper's own products take the queries from shared memory.  With mma.sync, the queries in
 * registers and 8 or 12 warps, 8 sequences of 131,072 tokens took 94 us instead of 89, both
 * kernels. */

namespace latent {

using namespace sel;

enum {
    TILES = MOST_HEADS / 8,
    WORDS = L / 128,             /* of a token's latent part that a thread has */
    OPERANDS = 8 * WORDS + 4,    /* words of a thread's right operand to a tile of columns, two a */
    STEPS = OPERANDS / 2,        /* step, */
    LATENT_STEPS = 8 * WORDS / 2,    /* these of the latent part */
    GROUP = 4 * WARP,            /* threads */
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
 * token's scale. */
struct query_side {
    float twice[2][TILES][2], all[2][TILES][2];
};

static __device__ __forceinline__ void load_query_side(query_side *q, const queries *from,
                                                       float twice, float all)
{
    int lane = threadIdx.x % WARP;

#pragma unroll
    for (int t = 0; t < TILES; t++)
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

/* The word that a step's bits are in, shifted so that these are in the lower half of each byte. */
static __device__ __forceinline__ unsigned word_of(const quarter &q, int step)
{
    if (step >= LATENT_STEPS)
        return q.rope;
    return step % 4 < 2 ? q.word[step / 4] : q.word[step / 4] >> 4;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
/* Where a step's right operand lies: matrices of 8 heads by 16 values, 128 bytes apart along the
 * values and OPERANDS of them along the heads. */
static __device__ __forceinline__ uint64_t right_of(const queries *q, int step)
{
    enum { MATRIX = 8 * 16 };
    uint64_t at = shared_address(q->right) + step * 2 * MATRIX;

    return (at & 0x3ffff) >> 4 | (uint64_t)(MATRIX >> 4) << 16 |
           (uint64_t)(OPERANDS * MATRIX >> 4) << 32;
}

static __device__ __forceinline__ void multiply(int (&d)[TILES][4], const unsigned (&a)[4],
                                                uint64_t right)
{
    static_assert(TILES == 3, "the instruction's 24 columns");
    asm volatile("{\n\t.reg .pred p;\n\tsetp.eq.u32 p, 0, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n24k32.s32.s8.s8 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11}, {%12, %13, %14, %15}, %16, "
                 "p;\n\t}"
                 : "+r"(d[0][0]), "+r"(d[0][1]), "+r"(d[0][2]), "+r"(d[0][3]), "+r"(d[1][0]),
                   "+r"(d[1][1]), "+r"(d[1][2]), "+r"(d[1][3]), "+r"(d[2][0]), "+r"(d[2][1]),
                   "+r"(d[2][2]), "+r"(d[2][3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right));
}

template <typename T>
static __device__ __forceinline__ void pin(T &v)
{
    if constexpr (std::is_array<T>::value)
#pragma unroll
        for (auto &part : v)
            pin(part);
    else
        asm volatile("" : "+r"(v) : : "memory");
}
#else
static __device__ __forceinline__ void mma_int8(int (&d)[4], const unsigned (&a)[4], unsigned b0,
                                                unsigned b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

/* Sums over a group's tokens for all heads, of the latent part and of the rope part.
 * part(half, step, i): bits i of the half-bytes of a step's word, of token lane / 4 or the eighth
 * after it; the values of a step are those of two i.  Half of the steps at a time: their words take
 * registers until the products are done. */
template <typename F>
static __device__ __forceinline__ void sum_bits(int (&d)[2][TILES][4], const queries *q,
                                                const F &part)
{
    enum { AT_ONCE = STEPS / 2 };
    unsigned left[AT_ONCE][4];

#pragma unroll
    for (int p = 0; p < 2; p++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                d[p][t][i] = MAGIC;
#pragma unroll
    for (int first = 0; first < STEPS; first += AT_ONCE) {
#pragma unroll
        for (int k = 0; k < 4 * AT_ONCE; k++)
            left[k / 4][k % 4] = part(k % 2, first + k / 4, (first + k / 4) % 2 * 2 + k % 4 / 2);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        pin(d);                  /* what products take is in its registers before the fence */
        pin(left);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            multiply(d[first + i >= LATENT_STEPS], left[i], right_of(q, first + i));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#else
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int t = 0; t < TILES; t++)
                mma_int8(d[first + i >= LATENT_STEPS][t], left[i],
                         q->right[t][2 * (first + i)][threadIdx.x % WARP],
                         q->right[t][2 * (first + i) + 1][threadIdx.x % WARP]);
#endif
    }
}

/* The best score over the heads that a thread has of its token `half`, 0 or 1. */
static __device__ __forceinline__ float best_of(const int (&d)[2][TILES][4], int half,
                                                float2 scale, const query_side &q)
{
    float best = -INFINITY;

#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float x = sum_of(d[0][t][2 * half + i]) * q.twice[0][t][i] - q.all[0][t][i];
            float y = sum_of(d[1][t][2 * half + i]) * q.twice[1][t][i] - q.all[1][t][i];
            best = fmaxf(best, x * scale.x + y * scale.y);
        }
    return best;
}

/* This thread's group, in a way that shows the compiler that its warps go the same way. */
static __device__ __forceinline__ int group_number()
{
    return __shfl_sync(0xffffffffu, threadIdx.x / GROUP, 0);
}

/* The threads of a group have come here; what they wrote before is seen by all, copies to shared
 * memory that they waited for included. */
static __device__ __forceinline__ void group_barrier()
{
    static_assert(GROUP == 128, "as the barrier has it");
    asm volatile("bar.sync %0, 128;" : : "r"(group_number() + 1) : "memory");
}

/* What ordinary stores and copies by threads have written to shared memory may be read by
 * products after the next barrier. */
static __device__ __forceinline__ void publish_to_products()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}
#endif
