#ifndef KERNELS_CUDA_TWO_LEVEL_CUH
#define KERNELS_CUDA_TWO_LEVEL_CUH

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/select.cuh"

/* Shared by the two kernels of two-level attention: their arguments, and scores of index
 * keys with int8 tensor cores.
 *
 * A product has 16 tokens as rows, their bits as the left operand, and the queries as
 * columns: a rotated query is split into two digits, 256 high + low, the columns 2h and
 * 2h + 1 of head h.  A sum over a plane's bits is then exact, and
 *   sum x[d] (bit ? 1 : -1) = 2 sum_{bit} x[d] - sum x[d].
 * The order of channels in a product is free, so each thread takes the bits of its part
 * of the token as they lie: word & 0x01010101 << i is the left operand for bit i of each
 * byte, with values 0 and 2^i instead of 0 and 1.  The digits make up for that: they hold
 * x / 2^i, rounded, so x has 13 to 16 bits; shifting the word once by four covers the
 * other bits.
 *
 * In a tile of 16 tokens row r of a product's upper half is token 2r and row r of the
 * lower half token 2r + 1, so that the scales of a thread's two tokens are one word. */

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

/* Shared memory: the right operand of scores. */
template <int DIM>
struct __align__(16) queries {
    signed char digits[2 * ROWS * DIM];
    float unit[ROWS];
    int start[ROWS];             /* MAGIC less half the sum of a query's values */
};

/* The float 3 * 2^22: added to an integer of up to 22 bits and a sign it is a float that
 * differs from it by as much, which is how sums become floats: a conversion takes longer. */
static const int MAGIC = 0x4b400000;

/* Warp h loads and rotates head h and makes its digits; of a head that the group does not
 * have it makes a copy of the first, which changes no maximum.  The right operand of step j
 * lies in chunks 2j and 2j + 1 of 16 channels; a chunk holds 8 columns (four heads), then
 * the next 8, 16 bytes each.  Chunk b, byte 4c + m is channel 32c + 8m + b (of 64 channels:
 * 16c + 4m + b): bit b of byte m of word c of a plane. */
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
    int sum = 0;
#pragma unroll
    for (int i = 0; i < DIM / WARP; i++) {
        int d = lane + WARP * i, c = d / (DIM / 4), m = d % (DIM / 4) / (DIM / 16);
        int bit = d % (DIM / 16), weight = 1 << bit % 4;
        int v = __float2int_rn(x[i] * per_unit * (1.0f / (float)weight)), high = (v + 128) >> 8;
        signed char *at = to->digits + bit * 128 * TILES + h / 4 * 128 + h % 4 * 32 + 4 * c + m;
        at[0] = (signed char)high;
        at[16] = (signed char)(v - 256 * high);
        sum += v * weight;
    }
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (lane == 0) {
        to->unit[h] = unit;
        to->start[h] = MAGIC - (sum >> 1);
    }
}

/* What a thread holds of the queries: heads 4t + lane % 4, but the right operand, whose
 * columns are lane / 4. */
template <int DIM, int TILES>
struct query_side {
    unsigned right[TILES][DIM / 32][2];
    int start[TILES];
    float unit[TILES];
};

template <int DIM, int TILES>
static __device__ __forceinline__ void load_query_side(query_side<DIM, TILES> *q,
                                                       const queries<DIM> *from)
{
    int lane = threadIdx.x % WARP;

#pragma unroll
    for (int t = 0; t < TILES; t++) {
        q->start[t] = from->start[4 * t + lane % 4];
        q->unit[t] = from->unit[4 * t + lane % 4];
#pragma unroll
        for (int chunk = 0; chunk < DIM / 16; chunk++)
            q->right[t][chunk / 2][chunk % 2] =
                *(const unsigned *)&from->digits[(chunk * TILES + t) * 128 + lane / 4 * 16 +
                                                 lane % 4 * 4];
    }
}

static __device__ __forceinline__ unsigned load_shared_32(unsigned at)
{
    unsigned v;

    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}

static __device__ __forceinline__ unsigned load_shared_16(unsigned at)
{
    unsigned short v;

    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
    return v;
}

/* A thread's part of a plane of N tokens: words 2t and 2t + 1 are its quarters of tokens
 * 2 (lane / 4) and 2 (lane / 4) + 1 of tile t. */
template <int DIM, int N>
static __device__ __forceinline__ void load_plane(unsigned (&word)[N / 8], unsigned plane)
{
    int lane = threadIdx.x % WARP;

    if (DIM == 128) {
        int row = lane / 16 * 16 + lane % 8 * 2 + lane / 8 % 2; /* that this lane points to */
        unsigned at = plane + row * 16;
#pragma unroll
        for (int i = 0; i < N / 32; i++) {
            unsigned m[4];
            load_matrices(m, at + i * 32 * 16);
#pragma unroll
            for (int j = 0; j < 4; j++)
                word[4 * i + j] = m[j];
        }
        return;
    }
    /* 16 bits of each token; each nibble starts a byte. */
    unsigned at = plane + lane / 4 * 16 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
        unsigned v = load_shared_16(at + i / 2 * 128 + i % 2 * 8);
        word[i] = (v & 0xf) | (v & 0xf0) << 4 | (v & 0xf00) << 8 | (v & 0xf000) << 12;
    }
}

static __device__ __forceinline__ void mma_bits(int (&d)[4], const unsigned (&a)[4],
                                                const unsigned (&b)[2], int c0, int c1, int c2,
                                                int c3)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c0), "r"(c1),
          "r"(c2), "r"(c3));
}

/* Sums over the set bits of a tile, less half the sum over all: head 4t + lane % 4 and the
 * tokens of `word`.  At most half the sum of all magnitudes, which is below 2^21. */
template <int DIM, int TILES>
static __device__ __forceinline__ void sum_bits(float (&sum)[TILES][2], const unsigned *word,
                                                const query_side<DIM, TILES> &q)
{
    int d[TILES][4];

#pragma unroll
    for (int step = 0; step < DIM / 32; step++) {
        unsigned left[4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            unsigned bits = step < 2 ? word[i] : word[i] >> 4;
            left[i] = bits & 0x01010101u << 2 * (step % 2);
            left[2 + i] = bits & 0x02020202u << 2 * (step % 2);
        }
#pragma unroll
        for (int t = 0; t < TILES; t++)
            if (step == 0)
                mma_bits(d[t], left, q.right[t][0], 0, q.start[t], 0, q.start[t]);
            else
                mma_bits(d[t], left, q.right[t][step], d[t][0], d[t][1], d[t][2], d[t][3]);
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

/* The first level: scores every block of every context into a.keys.  Queued as one launch,
 * with heads of `head_dim` channels. */
void queue_filter(struct stream *s, const two_level &a, int head_dim, int max_n_tokens);

}
#endif
