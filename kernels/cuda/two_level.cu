/* Two-level attention of a decode step in one kernel.
 *
 * A thread-block cluster does one sequence and KV head.  What its blocks tell each other
 * goes through distributed shared memory:
 *
 *   1  each scores its share of the context's blocks and writes every key to all of them;
 *      all choose the same keep_blocks
 *   2  each scores the tokens of its share of those and writes the keys to all; all find
 *      the same border of the keep_tokens largest
 *   3  each attends to its own tokens above the border; the parts are joined, every block
 *      finishing a share of the channels
 *
 * so a layer costs one launch, and between the levels lie cluster barriers of a
 * microsecond instead of trips through memory.  Choosing is done by all blocks alike,
 * because telling them the outcome would take another barrier.
 *
 * Scores come from int8 tensor cores.  A product has 16 tokens as rows, their bits as the
 * left operand, and the queries as columns: a rotated query is split into two digits,
 * 256 high + low, the columns 2h and 2h + 1 of head h.  A sum over a plane's bits
 * is then exact, and
 *   sum x[d] (bit ? 1 : -1) = 2 sum_{bit} x[d] - sum x[d].
 * The order of channels in a product is free, so each thread takes the bits of its part
 * of the token as they lie: word & 0x01010101 << i is the left operand for bit i of each
 * byte, with values 0 and 2^i instead of 0 and 1.  The digits make up for that: they hold
 * x / 2^i, rounded, so x has 13 to 16 bits; shifting the word once by four covers the
 * other bits.
 *
 * Attention uses bf16 tensor cores with the group's heads as rows; a warp takes 16 tokens
 * at a time, whose rows of K and V it copies to shared memory. */

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/select.cuh"

#include <cooperative_groups.h>

namespace cg = cooperative_groups;

namespace {

using namespace sel;

enum {
    THREADS = 512,
    WARPS = THREADS / WARP,
    GROUPS = WARPS,              /* neighbouring blocks that go to the same thread block */
    ROWS = 8,                    /* heads of a group at most */
    MAX_CLUSTER = 8,             /* 16 would not find room in every GPC */
    TILE = 16,                   /* tokens a warp attends to at a time */
    DEPTH = 3,                   /* records a warp has on their way */
    MOST_DIGITS = 127 * 256,     /* a query value in units: two digits */
    MOST_SHARED = 227 * 1024,
};

struct two_level {
    __nv_bfloat16 *out;
    const __nv_bfloat16 *q, *kv;
    const uint8_t *index;
    const int32_t *kv_table, *index_table, *n_tokens;
    int sign, large, scale;      /* of struct index_layout */
    int kv_heads, group, q_stride, max_blocks;
    int keep_blocks, keep_tokens, sink_tokens, recent_tokens;
    unsigned index_block_bytes, record_bytes;
    float softmax_scale;         /* times log2(e) */
};

/* Shared memory of a thread block; the arrays of changing size follow it. */
template <int DIM>
struct __align__(16) shared {
    signed char digits[2 * ROWS * DIM];         /* the right operand of scores */
    __nv_bfloat16 query[ROWS][DIM + 8];         /* rows end in a gap against bank conflicts */
    uint64_t arrived[2][WARPS][DEPTH];          /* barriers of the copies of each level */
    float unit[ROWS];
    int start[ROWS];                            /* minus half the sum of a query's values */
    counts count;
    float max[WARPS][ROWS], sum[WARPS][ROWS];   /* of each warp's tokens */
    float block_max[ROWS], block_sum[ROWS];
    float acc[DIM / 4 * WARP];                  /* of the block's tokens, see channel_of() */
};

/* The arrays behind it.  Keys of blocks and of tokens lie by the thread block that makes
 * them, a part each. */
struct arrays {
    int *kept, *records, *blocks;               /* [keep_blocks] numbers; ids in index and kv */
    int *list;                                  /* [token_part] rows of K and V to attend to */
    int *ids;                                   /* [block_part] ids of this block's share */
    unsigned *block_keys, *token_keys;          /* [size, block_part], [size, token_part] */
    unsigned char *rows;                        /* [WARPS, TILE, row bytes] */
    unsigned char *ahead;                       /* [WARPS, DEPTH] records, over the rows */
    int block_part, token_part;
};

__host__ __device__ inline int round_up(int n, int to)
{
    return (n + to - 1) / to * to;
}

template <int DIM>
__host__ __device__ inline size_t row_bytes()
{
    return 4 * DIM + 16;         /* K and V of a token and a gap against bank conflicts */
}

/* Where they lie from base on; the bytes taken. */
template <int DIM>
__host__ __device__ inline size_t lay_out(arrays *r, unsigned char *base, const two_level &a,
                                          int size)
{
    int slots = round_up(a.keep_blocks, 4);
    int *at = (int *)base;

    r->block_part = round_up(round_up(a.max_blocks, GROUPS * size) / size, 4);
    r->token_part = (a.keep_blocks + size - 1) / size * BLOCK_TOKENS;
    r->kept = at;
    r->records = at + slots;
    r->blocks = at + 2 * slots;
    r->list = at + 3 * slots;
    r->ids = r->list + r->token_part;
    r->block_keys = (unsigned *)(r->ids + r->block_part);
    r->token_keys = r->block_keys + r->block_part * size;
    r->rows = r->ahead = (unsigned char *)(r->token_keys + r->token_part * size);
    size_t rows = WARPS * TILE * row_bytes<DIM>(), ahead = WARPS * DEPTH * a.record_bytes;
    return (size_t)(r->rows - base) + (rows > ahead ? rows : ahead);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
/* Older ones have no clusters; never launched there. */
template <int DIM, int TILES>
__global__ void attend_two_level(two_level a)
{
    (void)a;
}
#else

/* ---- queries */

/* Warp h loads and rotates head h and makes its digits.  The right operand of step j lies
 * in chunks 2j and 2j + 1 of 16 channels; a chunk holds 8 columns (four heads), then the
 * next 8, 16 bytes each.  Chunk b, byte 4c + m is channel 32c + 8m + b (of 64
 * channels: 16c + 4m + b): bit b of byte m of word c of a plane. */
template <int DIM, int TILES>
__device__ void load_queries(const two_level &a, shared<DIM> *sh, const __nv_bfloat16 *q)
{
    int lane = threadIdx.x % WARP, h = threadIdx.x / WARP;
    float x[DIM / WARP], top = 0;

    if (h >= 4 * TILES)
        return;
    for (int i = 0; i < DIM / WARP; i++)
        x[i] = 0;
    if (h < a.group)
        rotate_query<DIM>(x, q + h * DIM);
    for (int i = 0; i < DIM / WARP; i++) {
        int d = lane + WARP * i;
        sh->query[h][d] = h < a.group ? q[h * DIM + d] : __float2bfloat16(0);
        top = fmaxf(top, fabsf(x[i]));
    }
    top = warp_max(top);
    float unit = top > 0 ? top / MOST_DIGITS : 1;
    int sum = 0;
    for (int i = 0; i < DIM / WARP; i++) {
        int d = lane + WARP * i, c = d / (DIM / 4), m = d % (DIM / 4) / (DIM / 16);
        int bit = d % (DIM / 16), weight = 1 << bit % 4;
        int v = __float2int_rn(x[i] / unit / (float)weight), high = (v + 128) >> 8;
        signed char *to = sh->digits + bit * 128 * TILES + h / 4 * 128 + h % 4 * 32 + 4 * c + m;
        to[0] = (signed char)high;
        to[16] = (signed char)(v - 256 * high);
        sum += v * weight;
    }
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (lane == 0) {
        sh->unit[h] = unit;
        sh->start[h] = -(sum >> 1);
    }
}

/* ---- scores of a block by a warp group */

/* A thread's part of one plane: its quarter of two tokens eight apart. */
struct plane { unsigned word[2]; };

template <int DIM>
__device__ __forceinline__ plane plane_at(const unsigned char *from, int token)
{
    plane p;

    for (int i = 0; i < 2; i++) {
        int at = (token + 8 * i) * 4 + threadIdx.x % 4;
        p.word[i] = DIM == 128 ? ((const unsigned *)from)[at] : ((const unsigned short *)from)[at];
    }
    return p;
}

/* Bulk copies to shared memory, and the barrier that they arrive at. */
__device__ __forceinline__ void barrier_init(uint64_t *barrier)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t *barrier, unsigned bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 : : "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t *barrier, unsigned parity)
{
    asm volatile("{\n\t.reg .pred p;\n"
                 "wait:\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t"
                 "@p bra.uni done;\n\tbra.uni wait;\ndone:\n\t}"
                 : : "r"(shared_address(barrier)), "r"(parity) : "memory");
}

__device__ __forceinline__ void bulk_copy(void *to, const void *from, unsigned bytes,
                                          uint64_t *barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];"
                 : : "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ void mma_bits(int (&d)[4], const unsigned (&a)[4],
                                         const unsigned (&b)[2])
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* What a thread holds of the queries: heads 4t + lane % 4, but the right operand, whose
 * columns are lane / 4. */
template <int DIM, int TILES>
struct query_side {
    unsigned right[TILES][DIM / 32][2];
    int start[TILES];
    float unit[TILES];
    bool has[TILES];             /* whether the group has that head */
};

template <int DIM, int TILES>
__device__ __forceinline__ void load_query_side(query_side<DIM, TILES> *q, const two_level &a,
                                                const shared<DIM> *sh)
{
    int lane = threadIdx.x % WARP;

    for (int t = 0; t < TILES; t++) {
        int h = 4 * t + lane % 4;
        q->start[t] = sh->start[h];
        q->unit[t] = sh->unit[h];
        q->has[t] = h < a.group;
        for (int chunk = 0; chunk < DIM / 16; chunk++)
            q->right[t][chunk / 2][chunk % 2] =
                *(const unsigned *)&sh->digits[(chunk * TILES + t) * 128 + lane / 4 * 16 +
                                               lane % 4 * 4];
    }
}

/* Sums over the set bits of a plane, less half the sum over all: head 4t + lane % 4 and
 * tokens lane / 4 ([0]) and 8 further ([1]). */
template <int DIM, int TILES>
__device__ __forceinline__ void sum_plane(int (&sum)[TILES][2], const plane &p,
                                          const query_side<DIM, TILES> &q)
{
    int d[TILES][4];
    unsigned spread[2];

    for (int i = 0; i < 2; i++) {
        unsigned v = p.word[i];  /* of 64 channels 16 bits: each nibble starts a byte */
        spread[i] = DIM == 128 ? v : (v & 0xf) | (v & 0xf0) << 4 | (v & 0xf00) << 8 |
                                         (v & 0xf000) << 12;
    }
    for (int t = 0; t < TILES; t++) {
        d[t][0] = d[t][2] = 0;
        d[t][1] = d[t][3] = q.start[t];
    }
    for (int step = 0; step < DIM / 32; step++) {
        unsigned left[4];
        for (int i = 0; i < 2; i++) {
            unsigned word = step < 2 ? spread[i] : spread[i] >> 4;
            left[i] = word & 0x01010101u << 2 * (step % 2);
            left[2 + i] = word & 0x02020202u << 2 * (step % 2);
        }
        for (int t = 0; t < TILES; t++)
            mma_bits(d[t], left, q.right[t][step]);
    }
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < 2; i++)
            sum[t][i] = 256 * d[t][2 * i] + d[t][2 * i + 1];
}

/* ---- the levels
 *
 * Kept block number s belongs to block s % size of the cluster, as its number s / size. */

/* Item i of this block's share is block i / GROUPS * GROUPS * size + rank * GROUPS + i %
 * GROUPS of the context, so that the shares are equally long. */
__device__ __forceinline__ int block_of(int item, int rank, int size)
{
    return (item / GROUPS * size + rank) * GROUPS + item % GROUPS;
}

/* The best of 16 tokens from `token` - lane / 4 on for this thread's heads: times the scales
 * of tokens `token` and `token` + 8. */
template <int DIM, int TILES, bool TOKENS>
__device__ __forceinline__ void score_tile(const two_level &a, const unsigned char *record,
                                           const query_side<DIM, TILES> &q, int token,
                                           float (&score)[2])
{
    plane sign = plane_at<DIM>(record + a.sign, token);
    const __nv_bfloat16 *scales = (const __nv_bfloat16 *)(record + a.scale);
    int sum[TILES][2], agrees[TILES][2];

    sum_plane<DIM, TILES>(sum, sign, q);
    if (TOKENS) {
        plane large = plane_at<DIM>(record + a.large, token);
        plane agree = { { ~(sign.word[0] ^ large.word[0]), ~(sign.word[1] ^ large.word[1]) } };
        sum_plane<DIM, TILES>(agrees, agree, q);
    }
    for (int i = 0; i < 2; i++) {
        score[i] = -INFINITY;
        for (int t = 0; t < TILES; t++) {
            if (TOKENS)
                sum[t][i] = 2 * sum[t][i] + agrees[t][i];
            if (q.has[t])
                score[i] = fmaxf(score[i], (float)sum[t][i] * q.unit[t]);
        }
        score[i] *= __bfloat162float(scales[token + 8 * i]);
    }
}

/* A warp scores its records one after the other: of level 1 whole blocks, into a key each,
 * of level 2 halves of kept blocks, into a key a token.  Its first thread has the next ones
 * copied ahead.
 *
 * All of the kernel's time that grows with the context is spent in this loop, and it is
 * bound by the number of instructions: keep them out of it. */
template <int DIM, int TILES, bool TOKENS>
__device__ __forceinline__ void score_records(const two_level &a, shared<DIM> *sh,
                                              const arrays &r, int n_items, int kv_head, int n,
                                              int rank, int size)
{
    enum { N_TOKENS = TOKENS ? BLOCK_TOKENS / 2 : BLOCK_TOKENS, PLANE = N_TOKENS * DIM / 8 };
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int n_own = (n_items - warp + WARPS - 1) / WARPS; /* of this warp */
    const uint8_t *base = a.index + (size_t)kv_head * a.record_bytes;
    unsigned char *ahead = r.ahead + warp * DEPTH * a.record_bytes;
    uint64_t *arrived = sh->arrived[TOKENS][warp];
    query_side<DIM, TILES> q;

    load_query_side<DIM, TILES>(&q, a, sh);
    auto start_copy = [&](int k, int slot) {
        int item = warp + k * WARPS, half = TOKENS ? item % 2 : 0;
        int id = TOKENS ? r.records[rank + item / 2 * size] : r.ids[item];
        const uint8_t *record = base + (size_t)id * a.index_block_bytes;
        unsigned char *to = ahead + slot * a.record_bytes;
        barrier_expect(&arrived[slot], (TOKENS ? 2 : 1) * PLANE + 2 * N_TOKENS);
        bulk_copy(to + a.sign, record + a.sign + half * PLANE, PLANE, &arrived[slot]);
        if (TOKENS)
            bulk_copy(to + a.large, record + a.large + half * PLANE, PLANE, &arrived[slot]);
        bulk_copy(to + a.scale, record + a.scale + half * 2 * N_TOKENS, 2 * N_TOKENS,
                  &arrived[slot]);
    };
    if (lane == 0)
        for (int k = 0; k < DEPTH && k < n_own; k++)
            start_copy(k, k);
#pragma unroll 1
    for (int k = 0, slot = 0, parity = 0; k < n_own; k++) {
        int item = warp + k * WARPS;
        const unsigned char *record = ahead + slot * a.record_bytes;
        barrier_wait(&arrived[slot], parity);
        if (TOKENS) {
            int own = item / 2, first = item % 2 * N_TOKENS;
            int position = r.kept[rank + own * size] * BLOCK_TOKENS + first;
            unsigned *keys = r.token_keys + rank * r.token_part + own * BLOCK_TOKENS + first;
#pragma unroll 1
            for (int tile = 0; tile < N_TOKENS; tile += 16) {
                float score[2];
                int token = tile + lane / 4;
                score_tile<DIM, TILES, true>(a, record, q, token, score);
                for (int i = 0; i < 2; i++) {
                    score[i] = fmaxf(score[i], __shfl_xor_sync(0xffffffffu, score[i], 1));
                    score[i] = fmaxf(score[i], __shfl_xor_sync(0xffffffffu, score[i], 2));
                    int at = token + 8 * i;
                    bool forced = always_chosen(position + at, n, a.sink_tokens,
                                                a.recent_tokens);
                    if (lane % 4 == 0)
                        keys[at] = position + at >= n ? 0
                                   : forced           ? (unsigned)FORCED_KEY
                                                      : key_of(score[i]);
                }
            }
        } else {
            int left = n - block_of(item, rank, size) * BLOCK_TOKENS;
            float best = -INFINITY;
#pragma unroll
            for (int tile = 0; tile < N_TOKENS; tile += 16) {
                float score[2];
                score_tile<DIM, TILES, false>(a, record, q, tile + lane / 4, score);
                if (left < BLOCK_TOKENS) /* the context's last block */
                    for (int i = 0; i < 2; i++)
                        score[i] = tile + lane / 4 + 8 * i < left ? score[i] : -INFINITY;
                best = fmaxf(best, fmaxf(score[0], score[1]));
            }
            unsigned key = __reduce_max_sync(0xffffffffu, key_of(best));
            if (lane == 0)
                r.block_keys[rank * r.block_part + item] = key;
        }
        __syncwarp();            /* all have read the record: another may take its place */
        if (lane == 0 && k + DEPTH < n_own)
            start_copy(k + DEPTH, slot);
        if (++slot == DEPTH) {
            slot = 0;
            parity ^= 1;
        }
    }
}

/* This block's part of some keys to the others, 16 bytes at a time. */
__device__ void share_keys(unsigned *keys, int part, const cg::cluster_group &cluster)
{
    int size = (int)cluster.num_blocks(), rank = (int)cluster.block_rank(), n = part / 4;

    for (int i = threadIdx.x; i < n * (size - 1); i += THREADS) {
        int other = i / n + (i / n >= rank);
        uint4 *at = (uint4 *)(keys + rank * part) + i % n;
        *cluster.map_shared_rank(at, other) = *at;
    }
}

/* ---- attention */

/* Softmax of a warp: rows are heads (the upper eight rows are empty). */
template <int DIM>
struct softmax {
    float max, sum;              /* of head lane / 4 */
    float acc[DIM / 8][2];       /* channels 8 j + 2 (lane % 4) + i */
};

/* Rows of up to TILE tokens to shared memory; past n the last one again. */
template <int DIM>
__device__ __forceinline__ void copy_rows(unsigned to, const __nv_bfloat16 *kv,
                                          const int *list, int n)
{
    enum { PER_ROW = DIM / 4, AT_ONCE = WARP / PER_ROW }; /* lanes; rows */
    int lane = threadIdx.x % WARP;

#pragma unroll 4
    for (int i = 0; i < TILE; i += AT_ONCE) {
        int row = i + lane / PER_ROW;
        const __nv_bfloat16 *from = kv + (size_t)list[min(row, n - 1)] * (2 * DIM) +
                                    lane % PER_ROW * 8;
        copy_16(to + row * row_bytes<DIM>() + lane % PER_ROW * 16, from);
    }
    copy_commit();
    copy_wait<0>();
    __syncwarp();
}

template <int DIM>
__device__ void attend_tile(softmax<DIM> *s, const unsigned (&q)[DIM / 16][2],
                            unsigned rows, int n, float scale)
{
    int lane = threadIdx.x % WARP, c = lane % 4, matrix = lane / 8;
    unsigned row = rows + (matrix / 2 * 8 + lane % 8) * row_bytes<DIM>() + matrix % 2 * 16;
    float score[2][4] = {};

#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        unsigned b[4], left[4] = { q[step][0], 0, q[step][1], 0 };
        load_matrices(b, row + step * 32);
        mma_bf16(score[0], left, b[0], b[1]);
        mma_bf16(score[1], left, b[2], b[3]);
    }
    float top = s->max;
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            score[i][j] = 8 * i + 2 * c + j < n ? score[i][j] * scale : -INFINITY;
            top = fmaxf(top, score[i][j]);
        }
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    float shrink = exp2f(s->max - top), sum = 0;
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            score[i][j] = exp2f(score[i][j] - top);
            sum += score[i][j];
        }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    s->sum = s->sum * shrink + sum;
    s->max = top;

    unsigned p[4] = { pack_bf16(score[0][0], score[0][1]), 0,
                      pack_bf16(score[1][0], score[1][1]), 0 };
    row = rows + 2 * DIM + (matrix % 2 * 8 + lane % 8) * row_bytes<DIM>() + matrix / 2 * 16;
#pragma unroll
    for (int j = 0; j < DIM / 8; j += 2) {
        unsigned b[4];
        load_matrices_turned(b, row + j * 16);
        for (int i = 0; i < 2; i++) {
            float acc[4] = { s->acc[j + i][0] * shrink, s->acc[j + i][1] * shrink, 0, 0 };
            mma_bf16(acc, p, b[2 * i], b[2 * i + 1]);
            s->acc[j + i][0] = acc[0];
            s->acc[j + i][1] = acc[1];
        }
    }
    __syncwarp();                /* the rows are replaced next */
}

/* Sums over channels stay in the order of the accumulators: number 2j + i of lane l is
 * channel 8j + 2 (l % 4) + i of head l / 4. */
__device__ __forceinline__ int channel_of(int number, int lane)
{
    return 8 * (number / 2) + 2 * (lane % 4) + number % 2;
}

/* Attention of this block's tokens into sh: block_max, block_sum and acc. */
template <int DIM>
__device__ void attend_own(const two_level &a, shared<DIM> *sh, const arrays &r, int n,
                           int kv_head)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4;
    const __nv_bfloat16 *kv = a.kv + (size_t)kv_head * BLOCK_TOKENS * 2 * DIM;
    unsigned char *rows = r.rows + warp * TILE * row_bytes<DIM>();
    float *parts = (float *)r.rows; /* [WARPS][DIM / 4][WARP], over the rows */
    int used = min((n + TILE - 1) / TILE, (int)WARPS);
    softmax<DIM> s = { -INFINITY, 0, {} };

    if (warp < used) {
        unsigned q[DIM / 16][2];
        for (int step = 0; step < DIM / 16; step++)
            for (int half = 0; half < 2; half++)
                q[step][half] = *(const unsigned *)&sh->query[g][16 * step + 8 * half +
                                                                  2 * (lane % 4)];
        for (int from = warp * TILE; from < n; from += WARPS * TILE) {
            copy_rows<DIM>(shared_address(rows), kv, r.list + from, n - from);
            attend_tile<DIM>(&s, q, shared_address(rows), n - from, a.softmax_scale);
        }
    }
    if (lane % 4 == 0) {
        sh->max[warp][g] = s.max;
        sh->sum[warp][g] = s.sum;
    }
    __syncthreads();             /* nobody needs rows any more */
    float top = -INFINITY;
    for (int w = 0; w < used; w++)
        top = fmaxf(top, sh->max[w][g]);
    if (warp < used) {
        float shrink = exp2f(s.max - top);
        for (int j = 0; j < DIM / 8; j++)
            for (int i = 0; i < 2; i++)
                parts[(warp * (DIM / 4) + 2 * j + i) * WARP + lane] = s.acc[j][i] * shrink;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < DIM / 4 * WARP; i += THREADS) {
        float sum = 0;
#pragma unroll 4
        for (int w = 0; w < used; w++)
            sum += parts[w * (DIM / 4) * WARP + i];
        sh->acc[i] = sum;
    }
    if (warp == 0 && lane % 4 == 0) {
        float sum = 0;
        for (int w = 0; w < used; w++)
            sum += sh->sum[w][g] * exp2f(sh->max[w][g] - top);
        sh->block_max[g] = top;
        sh->block_sum[g] = sum;
    }
}

/* Each block finishes a share of the sums. */
template <int DIM>
__device__ void join_blocks(const two_level &a, shared<DIM> *sh, __nv_bfloat16 *out,
                            const cg::cluster_group &cluster)
{
    int size = (int)cluster.num_blocks(), rank = (int)cluster.block_rank();
    int all = DIM / 4 * WARP, share = round_up((all + size - 1) / size, WARP);
    int lane = threadIdx.x % WARP, g = lane / 4, end = min((rank + 1) * share, all);

    for (int i = rank * share + threadIdx.x; i < end; i += THREADS) {
        float max[MAX_CLUSTER], sum[MAX_CLUSTER], acc[MAX_CLUSTER], top = -INFINITY;
#pragma unroll
        for (int r = 0; r < MAX_CLUSTER; r++) {
            max[r] = -INFINITY;
            if (r < size) {
                max[r] = *cluster.map_shared_rank(&sh->block_max[g], r);
                sum[r] = *cluster.map_shared_rank(&sh->block_sum[g], r);
                acc[r] = *cluster.map_shared_rank(&sh->acc[i], r);
            }
            top = fmaxf(top, max[r]);
        }
        float total = 0, value = 0;
#pragma unroll
        for (int r = 0; r < MAX_CLUSTER; r++)
            if (max[r] > -INFINITY) {
                float shrink = exp2f(max[r] - top);
                total += sum[r] * shrink;
                value += acc[r] * shrink;
            }
        if (g < a.group)
            out[g * DIM + channel_of(i / WARP, lane)] = __float2bfloat16_rn(value / total);
    }
}

/* ---- */

template <int DIM, int TILES>
__global__ void __launch_bounds__(THREADS, 1) attend_two_level(two_level a)
{
    extern __shared__ __align__(16) unsigned char memory[];
    cg::cluster_group cluster = cg::this_cluster();
    int size = (int)cluster.num_blocks(), rank = (int)cluster.block_rank();
    int unit = blockIdx.x / size, seq = unit / a.kv_heads, kv_head = unit % a.kv_heads;
    shared<DIM> *sh = (shared<DIM> *)memory;
    arrays r;

    /* Nobody may write to a block that has not started: arrive here, wait before the
     * first write. */
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    int n = a.n_tokens[seq], n_blocks = (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    if (n == 0) {                /* padding: the whole cluster leaves */
        asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
        return;
    }
    lay_out<DIM>(&r, (unsigned char *)(sh + 1), a, size);
    const int32_t *index_table = a.index_table + (size_t)seq * a.max_blocks;
    for (int i = threadIdx.x; i < r.block_part; i += THREADS) {
        int block = block_of(i, rank, size);
        r.ids[i] = block < n_blocks ? index_table[block] : 0;
        r.block_keys[rank * r.block_part + i] = 0;
    }
    load_queries<DIM, TILES>(a, sh, a.q + (size_t)seq * a.q_stride +
                                        (size_t)kv_head * a.group * DIM);
    if (threadIdx.x < 2 * WARPS * DEPTH)
        barrier_init(&sh->arrived[0][0][0] + threadIdx.x);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
    int n_share = 0;             /* blocks of the context in this block's share */
    if (n_blocks > rank * GROUPS)
        n_share = (n_blocks - rank * GROUPS) / (GROUPS * size) * GROUPS +
                  min((n_blocks - rank * GROUPS) % (GROUPS * size), (int)GROUPS);
    score_records<DIM, TILES, false>(a, sh, r, n_share, kv_head, n, rank, size);
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    __syncthreads();
    for (int i = threadIdx.x; i < n_share; i += THREADS)
        if (always_kept(block_of(i, rank, size), n, a.sink_tokens, a.recent_tokens))
            r.block_keys[rank * r.block_part + i] = (unsigned)FORCED_KEY;
    __syncthreads();
    share_keys(r.block_keys, r.block_part, cluster);
    cluster.sync();

    key_order order = { key_order::BLOCKS, r.block_part, size, GROUPS, r.kept, 0 };
    int n_keys = r.block_part * size;
    border b;
    b.key = find_border(r.block_keys, n_keys, a.keep_blocks, &b.equal, &sh->count);
    int n_kept = list_chosen(r.blocks, r.block_keys, 0, n_keys, n_keys, b, order, &sh->count);
    int n_own = (n_kept - rank + size - 1) / size;
    for (int i = threadIdx.x; i < n_kept; i += THREADS) {
        int block = order.place(r.blocks[i]);
        r.kept[i] = block;
        r.records[i] = index_table[block];
        r.blocks[i] = a.kv_table[(size_t)seq * a.max_blocks + block];
    }
    for (int i = n_own * BLOCK_TOKENS + threadIdx.x; i < r.token_part; i += THREADS)
        r.token_keys[rank * r.token_part + i] = 0;
    __syncthreads();
    score_records<DIM, TILES, true>(a, sh, r, 2 * n_own, kv_head, n, rank, size);
    __syncthreads();
    share_keys(r.token_keys, r.token_part, cluster);
    cluster.sync();

    order = { key_order::TOKENS, r.token_part, size, 1, r.kept, n_kept };
    n_keys = r.token_part * size;
    b.key = find_border(r.token_keys, n_keys, a.keep_tokens, &b.equal, &sh->count);
    int n_list = list_chosen(r.list, r.token_keys, rank * r.token_part,
                             rank * r.token_part + n_own * BLOCK_TOKENS, n_keys, b, order,
                             &sh->count);
    for (int i = threadIdx.x; i < n_list; i += THREADS) {
        int own = r.list[i] - rank * r.token_part; /* to rows of K and V from the head's on */
        r.list[i] = r.blocks[rank + own / BLOCK_TOKENS * size] * a.kv_heads * BLOCK_TOKENS +
                    own % BLOCK_TOKENS;
    }
    __syncthreads();
    attend_own<DIM>(a, sh, r, n_list, kv_head);
    cluster.sync();
    join_blocks<DIM>(a, sh, a.out + ((size_t)seq * a.kv_heads + kv_head) * a.group * DIM,
                     cluster);
    cluster.sync();              /* others may still read this block's memory */
}
#endif

template <int DIM, int TILES>
size_t shared_bytes(const two_level &a, int cluster)
{
    arrays r;

    return sizeof(shared<DIM>) + lay_out<DIM>(&r, NULL, a, cluster);
}

void configure(cudaLaunchConfig_t *config, cudaLaunchAttribute *attribute, int clusters,
               int cluster, size_t bytes)
{
    *config = {};
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = cluster;
    attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
    config->gridDim = dim3(clusters * cluster);
    config->blockDim = dim3(THREADS);
    config->dynamicSmemBytes = bytes;
    config->attrs = attribute;
    config->numAttrs = 1;
}

/* As many thread blocks a cluster as let all clusters run at the same time: those of one
 * must find room in one part of the GPU, so this is less than their number says.  0 where
 * there is not enough shared memory. */
template <int DIM, int TILES>
int cluster_size(struct stream *s, const two_level &a, int units)
{
    cluster_choice *known = &s->clusters;
    const cluster_choice wanted = { DIM, TILES, units, a.max_blocks, a.keep_blocks, 0 };
    cudaLaunchConfig_t config;
    cudaLaunchAttribute attribute;

    if (known->size && known->dim == DIM && known->tiles == TILES && known->units == units &&
        known->max_blocks == a.max_blocks && known->keep_blocks == a.keep_blocks)
        return known->size;
    *known = wanted;
    for (int size = MAX_CLUSTER; size > 0; size--) {
        size_t bytes = shared_bytes<DIM, TILES>(a, size);
        int fit = 0;
        if (bytes > MOST_SHARED)
            continue;
        stream_check(s, cudaFuncSetAttribute(attend_two_level<DIM, TILES>,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             (int)bytes), "attend_two_level");
        configure(&config, &attribute, units, size, bytes);
        stream_check(s, cudaOccupancyMaxActiveClusters(&fit, attend_two_level<DIM, TILES>,
                                                       &config), "attend_two_level");
        if (fit >= units || (size == 1 && !known->size))
            return known->size = size;
    }
    return 0;
}

template <int DIM, int TILES>
bool launch(struct stream *s, const two_level &a, int units)
{
    int cluster = cluster_size<DIM, TILES>(s, a, units);
    cudaLaunchConfig_t config;
    cudaLaunchAttribute attribute;

    if (!cluster)                /* contexts of millions of tokens */
        return false;
    size_t bytes = shared_bytes<DIM, TILES>(a, cluster);
    stream_check(s, cudaFuncSetAttribute(attend_two_level<DIM, TILES>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes),
                 "attend_two_level");
    configure(&config, &attribute, units, cluster, bytes);
    config.stream = s->cu;
    stream_check(s, cudaLaunchKernelEx(&config, attend_two_level<DIM, TILES>, a),
                 "attend_two_level");
    return true;
}

}

bool attend_two_level_fused(struct stream *s, const struct attend_two_level_args *args)
{
    const struct kv_shape *shape = &args->shape;
    struct index_layout layout = index_layout(shape);
    two_level a = {};
    int group = args->heads / shape->kv_heads, units = args->seqs * shape->kv_heads;

    if (!s->be->hopper || group > ROWS || shape->filter != FILTER_COARSE ||
        shape->index != INDEX_ROTATED)
        return false;
    a.out = (__nv_bfloat16 *)args->out;
    a.q = (const __nv_bfloat16 *)args->q;
    a.kv = (const __nv_bfloat16 *)args->kv;
    a.index = args->index;
    a.kv_table = args->kv_table;
    a.index_table = args->index_table;
    a.n_tokens = args->n_tokens;
    a.sign = layout.sign;
    a.large = layout.large;
    a.scale = layout.scale;
    a.kv_heads = shape->kv_heads;
    a.group = group;
    a.q_stride = args->q_stride;
    a.max_blocks = args->max_blocks;
    a.keep_blocks = args->keep_blocks;
    a.keep_tokens = args->keep_tokens;
    a.sink_tokens = args->sink_tokens;
    a.recent_tokens = args->recent_tokens;
    a.index_block_bytes = (unsigned)index_block_bytes(shape);
    a.record_bytes = (unsigned)layout.record_bytes;
    a.softmax_scale = args->scale * 1.44269504f;
    if (shape->head_dim == 128)
        return group <= 4 ? launch<128, 1>(s, a, units) : launch<128, 2>(s, a, units);
    return group <= 4 ? launch<64, 1>(s, a, units) : launch<64, 2>(s, a, units);
}
