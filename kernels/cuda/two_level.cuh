#ifndef KERNELS_CUDA_TWO_LEVEL_CUH
#define KERNELS_CUDA_TWO_LEVEL_CUH

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/select.cuh"

/* Shared by the two kernels of two-level attention: their arguments, and scores of index
 * keys with int8 tensor cores.
 *
 * A product has 16 tokens as rows and the queries as columns: a rotated query is split into
 * two digits, 256 high + low, the columns 2h and 2h + 1 of head h.
 *
 * The bits of the tokens are not operands but say where operands are.  In a sparse product the
 * left operand has two values in every four of a row, and a nibble of metadata says at which
 * places.  All values are 1 here, a channel is two places, of which the right operand has -x and
 * x, and the metadata, made of the bits by one instruction for 16 channels, picks one: a sum is
 *   sum_d (bit[d] ? x[d] : -x[d])
 * and exact.  Bits as values of an ordinary product, 0 and 2^i by masks, took 16 instructions a
 * tile where this takes 6, of a unit that does one in two cycles.
 *
 * The order of channels in a product is free, so each thread takes the bits of its half of a
 * token as they lie.  In a tile of 16 tokens row r of a product's upper half is token 2r and row
 * r of the lower half token 2r + 1, so that the scales of a thread's two tokens are one word. */

namespace two {

using namespace sel;

enum {
    ROWS = 8,                    /* heads of a group at most */
    TILE = 16,                   /* tokens */
    MOST_DIGITS = 127 * 256,     /* a query value in units: two digits */
};

struct two_level {
    __nv_bfloat16 *out;
    const __nv_bfloat16 *q, *kv;
    const uint8_t *index;
    const int32_t *kv_table, *index_table, *n_tokens;
    unsigned *keys;              /* [seqs, kv_heads, max_blocks] of the filter */
    int scale, sign, large;      /* of struct index_layout */
    int seqs, kv_heads, group, q_stride, max_blocks;
    int keep_blocks, keep_tokens, sink_tokens, recent_tokens;
    unsigned index_block_bytes, record_bytes;
    float softmax_scale;         /* times log2(e) */
};

/* Shared memory: the right operand of scores.  Lane l has four words of each step's, two of each
 * half of the token: column l / 4, and of half i / 2 nibbles 4 (i % 2) + l % 4, -x and x of both
 * channels of a nibble.  Step s takes the even bits (odd ones where s is odd) of a thread's word
 * s / 2. */
template <int DIM>
struct __align__(16) queries {
    enum { STEPS = DIM / 32 };
    unsigned right[ROWS / 4][STEPS][WARP][4];
    float unit[ROWS];            /* half of what one is worth */
    int start[4];                /* of a product: 0 and MAGIC, twice */
    unsigned upper;              /* what metadata has in every nibble */
};

/* The float 3 * 2^22: added to an integer of up to 22 bits and a sign it is a float that
 * differs from it by as much, which is how sums become floats: a conversion takes longer. */
static const int MAGIC = 0x4b400000;

/* v as two digits, a byte each. */
static __device__ __forceinline__ void split_digits(int v, unsigned *high, unsigned *low)
{
    int h = (v + 128) >> 8;

    *high = h & 0xff;
    *low = (v - 256 * h) & 0xff;
}

/* Warp h loads and rotates head h and makes its digits; of a head that the group does not
 * have it makes a copy of the first, which changes no maximum. */
template <int DIM, int TILES>
static __device__ __forceinline__ void load_digits(queries<DIM> *to, const __nv_bfloat16 *q,
                                                   int group)
{
    int lane = threadIdx.x % WARP, h = threadIdx.x / WARP;
    float x[DIM / WARP], top = 0;

    if (h >= 4 * TILES)
        return;
    rotate_query<DIM>(x, q + (h < group ? h : 0) * DIM);
#pragma unroll
    for (int i = 0; i < DIM / WARP; i++)
        top = fmaxf(top, fabsf(x[i]));
    top = warp_max(top);
    float unit = top > 0 ? top * (1.0f / MOST_DIGITS) : 1;
    float per_unit = __fdividef(1, unit);
#pragma unroll
    for (int word = 0; word < DIM / WARP; word++) { /* channel 32 word + lane */
        enum { WORDS = DIM / 64 };  /* of half a token */
        int v = __float2int_rn(x[word] * per_unit), nibble = lane / 4;
        unsigned plus[2], minus[2];
        split_digits(v, &plus[0], &plus[1]);
        split_digits(-v, &minus[0], &minus[1]);
#pragma unroll
        for (int digit = 0; digit < 2; digit++) {
            int column = h % 4 * 2 + digit;
            unsigned *at = &to->right[h / 4][word % WORDS * 2 + lane % 2]
                                     [column * 4 + nibble % 4][word / WORDS * 2 + nibble / 4];
            ((unsigned short *)at)[lane % 4 / 2] =
                (unsigned short)(minus[digit] | plus[digit] << 8);
        }
    }
    if (lane == 0)
        to->unit[h] = unit * 0.5f;
    /* Constants, out of memory: those that it knows the compiler makes again for every product. */
    if (h == 0 && lane < 4) {
        to->start[lane] = lane % 2 ? MAGIC : 0;
        to->upper = 0x88888888u;
    }
}

/* What a thread holds of the queries: heads 4t + lane % 4, but the right operand, whose
 * columns are lane / 4. */
template <int DIM, int TILES>
struct query_side {
    unsigned right[TILES][DIM / 32][4];
    float unit[TILES];
    int start[4];
    unsigned upper;
};

template <int DIM, int TILES>
static __device__ __forceinline__ void load_query_side(query_side<DIM, TILES> *q,
                                                       const queries<DIM> *from)
{
    int lane = threadIdx.x % WARP;

    q->upper = *(const volatile unsigned *)&from->upper;
#pragma unroll
    for (int i = 0; i < 4; i++)
        q->start[i] = ((const volatile int *)from->start)[i];
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        q->unit[t] = from->unit[4 * t + lane % 4];
#pragma unroll
        for (int step = 0; step < DIM / 32; step++) {
            uint4 v = *(const uint4 *)from->right[t][step][lane];
            q->right[t][step][0] = v.x;
            q->right[t][step][1] = v.y;
            q->right[t][step][2] = v.z;
            q->right[t][step][3] = v.w;
        }
    }
}

/* A thread's part of a plane of N tokens: of each tile half (lane / 2 % 2) of the bits of token
 * 2 (lane / 4) + lane % 2. */
template <int DIM, int N>
static __device__ __forceinline__ void load_plane(unsigned (&word)[N / TILE][DIM / 64],
                                                  unsigned plane)
{
    int lane = threadIdx.x % WARP, token = lane / 4 * 2 + lane % 2;
    unsigned at = plane + token * (DIM / 8) + lane / 2 % 2 * (DIM / 16);

#pragma unroll
    for (int tile = 0; tile < N / TILE; tile++)
        if constexpr (DIM == 128)
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                         : "=r"(word[tile][0]), "=r"(word[tile][1])
                         : "r"(at + tile * TILE * (DIM / 8)) : "memory");
        else
            word[tile][0] = load_shared_32(at + tile * TILE * (DIM / 8));
}

/* Of the left operand's rows lane 4g + c has the places of row g, or g + 8 where c is odd, in the
 * first half of the right operand's rows, or the second where c is 2 or 3. */
static __device__ __forceinline__ void mma_picked(int (&d)[4], unsigned places,
                                                  const unsigned (&b)[4], const int (&c)[4])
{
    const unsigned ones = 0x01010101;

    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %4, %4, %4}, {%5, %6, %7, %8}, {%9, %10, %11, %12}, %13, 0x0;"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(ones), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(c[0]), "r"(c[1]), "r"(c[2]),
          "r"(c[3]), "r"(places));
}

/* Sums over a tile: head 4t + lane % 4 and tokens 2 (lane / 4) and the next.  Below 2^22. */
template <int DIM, int TILES>
static __device__ __forceinline__ void sum_bits(float (&sum)[TILES][2],
                                                const unsigned (&word)[DIM / 64],
                                                const query_side<DIM, TILES> &q)
{
    int d[TILES][4];

#pragma unroll
    for (int step = 0; step < DIM / 32; step++) {
        unsigned places = (word[step / 2] >> step % 2 & 0x55555555u) | q.upper;
#pragma unroll
        for (int t = 0; t < TILES; t++)
            if (step == 0)
                mma_picked(d[t], places, q.right[t][0], q.start);
            else
                mma_picked(d[t], places, q.right[t][step], d[t]);
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            sum[t][i] = __int_as_float(256 * d[t][2 * i] + d[t][2 * i + 1]) -
                        __int_as_float(MAGIC);
}

/* The scales of a thread's two tokens of tile `tile`. */
static __device__ __forceinline__ float2 scales_at(unsigned scales, int tile)
{
    return unpack_bf16(load_shared_32(scales + tile * 2 * TILE + threadIdx.x % WARP / 4 * 4));
}

/* The first level: scores every block of every context into a.keys, by its tokens or means.
 * Queued as one launch. */
void queue_filter(struct stream *s, two_level a, const struct kv_shape *shape, int max_n_tokens);

}
#endif
