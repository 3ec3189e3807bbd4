/* Two-level attention of a decode step, behind its filter (two_level_filter.cu): chooses
 * the blocks, scores their tokens, chooses tokens and attends to them.
 *
 * A thread-block cluster does one sequence and KV head.  What its blocks tell each other
 * goes through distributed shared memory, by asynchronous stores that arrive at a barrier
 * of the receiver, so that nobody waits for more than what it needs:
 *
 *   1  all choose the same keep_blocks from the filter's keys
 *   2  each scores the tokens of its share of those and sends the keys to all; all find
 *      the same border of the keep_tokens largest
 *   3  each attends to its own tokens above the border and sends each block its share of
 *      the sums, which that block finishes
 *
 * so a layer costs two launches, the second of which starts while the first ends.  Choosing
 * is done by all blocks alike: telling the outcome would take longer.  With lagged blocks a small
 * kernel between the two rewrites the keys (lag.cu), and neither knows of it.
 *
 * Attention uses bf16 tensor cores with the group's heads as rows; a warp takes 16 tokens
 * at a time, whose rows of K and V it copies to shared memory.
 *
 * With hot rows (HOT, a variant of its own) each block of the cluster finds the rows of all
 * chosen tokens.  It starts copying those of its first tiles, the missing ones out of host
 * memory, and meanwhile chooses the rows of the set that the missing ones replace; attention
 * writes them there from shared memory.  Each warp waits for its own 16 rows alone, so what is
 * there is attended to while others still come.  Tokens go to blocks, warps and tiles as
 * without, hence the same bits; for that the cluster has the size that it would have without.
 *
 * At batch 1 all of this is latency: some 2,400 instructions a warp one after the other,
 * three trips to memory and two to the other blocks.  Measured on an H200 behind the filter
 * of 98,304 tokens, us: choosing blocks 2.5, scoring 1.9, exchange 0.6, choosing tokens 2.7,
 * attention 3.3 (4 MB of rows at random places), sums 1.2.  At batch 8 attention, 9.5, reads
 * memory at its rate.
 *
 * Tried on an H100, us at 98,304 tokens and batch 1, 4 and 8, where this one took 25, 44, 72:
 *   all in one kernel with cluster barriers   35, 64, 90   clusters of eight leave half of
 *                                                          the GPU idle at batch 1
 *   two launches, everything unrolled         31, 60, 98
 *   512 threads, two filter blocks an SM      27, 53, 85   this one with two: 26, 51, 84
 *   256 threads, two blocks an SM             27, 47, 77
 *   256 threads beside the filter's, two      27, 56, 89
 *   tiles of rows on their way */

#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/hot_rows.cuh"
#include "kernels/cuda/lag.cuh"
#include "kernels/cuda/two_level.cuh"

namespace {

using namespace two;

enum {
    THREADS = 384,
    WARPS = THREADS / WARP,
    MAX_CLUSTER = 8,             /* 16 would not find room in every GPC, and 9, of which 8 do on an
                                    H100, gain nothing */
    HALF = BLOCK_TOKENS / 2,     /* tokens of a record that a warp scores at a time */
    DEPTH = 3,                   /* of those halves a warp has on their way or in use */
    LINE = 128,                  /* bytes that are asked of memory at once */
};

/* Shared memory of a thread block; the arrays of changing size follow it. */
template <int DIM>
struct __align__(LINE) shared {
    queries<DIM> index;                         /* for scores of keys */
    __nv_bfloat16 query[ROWS][DIM + 8];         /* rows end in a gap against bank conflicts */
    uint64_t keys_arrived, sums_arrived;        /* barriers of what others send */
    counts count;
    float max[WARPS][ROWS], sum[WARPS][ROWS];   /* of each warp's tokens */
    float2 all[MAX_CLUSTER][ROWS];              /* maximum and sum of each block's tokens */
    float acc[ROWS * DIM + MAX_CLUSTER * 4];    /* [size, share], of this block's share */
};

/* The arrays behind it.  What the stages after one another need lies in the same place. */
struct arrays : block_lists {                   /* keys and tables of these: stage 1 */
    int *list;                                  /* [token_part] rows of K and V to attend to */
    unsigned *token_keys;                       /* [keep_blocks, BLOCK_TOKENS] */
    unsigned char *ahead;                       /* [WARPS, DEPTH] halves of records  stage 2 */
    unsigned char *rows;                        /* [WARPS, TILE] rows of K and V  stage 3 */
    /* With hot rows. */
    unsigned *seen;                             /* bits of rows that this step uses */
    int *missing;                               /* numbers in list; */
    uint16_t *into;                             /* of list: the row that a missing one gets */
    unsigned *all;                              /* [chosen] of all blocks, before stage 3 */
};

template <int DIM>
constexpr int row_bytes = 4 * DIM;              /* K and V of a token */
template <int DIM>
constexpr int half_bytes = HALF * (2 + DIM / 4);

/* Chosen tokens of so many kept blocks at most. */
__host__ __device__ inline int most_chosen(const two_level &a, int n_blocks)
{
    return a.keep_tokens < n_blocks * BLOCK_TOKENS ? a.keep_tokens : n_blocks * BLOCK_TOKENS;
}

/* Where they lie from base on; the bytes taken.  rows_per_head: with hot rows. */
template <int DIM, bool HOT>
__host__ __device__ inline size_t lay_out(arrays *r, unsigned char *base, const two_level &a,
                                          int size, int rows_per_head)
{
    int slots = round_up(a.keep_blocks, 4), blocks = round_up(a.max_blocks, 4);

    r->kept = (int *)base;
    r->records = r->kept + slots;
    r->blocks = r->records + slots;
    r->list = r->blocks + slots;
    r->token_keys = (unsigned *)(r->list + share_of(a.keep_blocks, size) * BLOCK_TOKENS);
    r->rows = (unsigned char *)(r->token_keys + slots * BLOCK_TOKENS);
    if (HOT) {
        int own = round_up(most_chosen(a, share_of(a.keep_blocks, size)), 8);
        r->seen = (unsigned *)r->rows;
        r->missing = (int *)(r->seen + round_up(hot::words_of(rows_per_head), 4));
        r->into = (uint16_t *)(r->missing + own);
        r->rows = (unsigned char *)(r->into + own);
    }
    r->rows = base + round_up((int)(r->rows - base), LINE);
    r->all = (unsigned *)r->rows;
    r->ahead = r->rows;
    r->block_keys = (unsigned *)r->rows;
    r->ids = (int *)(r->block_keys + blocks);
    r->kv_ids = r->ids + blocks;
    size_t stage1 = 12 * (size_t)blocks, stage2 = WARPS * DEPTH * half_bytes<DIM>;
    size_t stage3 = WARPS * TILE * row_bytes<DIM>;
    size_t most = stage1 > stage2 ? stage1 : stage2;
    if (HOT && most < 4 * (size_t)most_chosen(a, a.keep_blocks))
        most = 4 * (size_t)most_chosen(a, a.keep_blocks);
    return (size_t)(r->rows - base) + (most > stage3 ? most : stage3);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
/* Older ones have no clusters; never launched there. */
template <int DIM, int TILES>
__global__ void attend_two_level(two_level a)
{
    (void)a;
}

template <int DIM, int TILES>
__global__ void attend_two_level_hot(two_level a, struct hot_rows hot)
{
    (void)a, (void)hot;
}
#else

/* ---- scores of tokens */

template <int DIM>
__device__ __forceinline__ void start_half(const two_level &a, const arrays &r, unsigned to,
                                           const uint8_t *base, int half, int end)
{
    enum { PLANE = HALF * DIM / 8 };
    int lane = threadIdx.x % WARP, from = half % 2 * HALF;

    if (half < end) {
        const uint8_t *record = base + (size_t)r.records[half / 2] * a.index_block_bytes;
        if (lane < 2 * HALF / 16)
            copy_16(to + lane * 16, record + a.scale + 2 * from + lane * 16);
        if (lane < PLANE / 16) {
            copy_16(to + 2 * HALF + lane * 16, record + a.sign + from * DIM / 8 + lane * 16);
            copy_16(to + 2 * HALF + PLANE + lane * 16,
                    record + a.large + from * DIM / 8 + lane * 16);
        }
    }
    copy_commit();               /* one group a half, empty or not, for copy_wait() */
}

/* Keys of the tokens of half `half` of the kept blocks. */
template <int DIM, int TILES>
__device__ __forceinline__ void score_half(const two_level &a, const arrays &r,
                                           unsigned at, int half, int n,
                                           const query_side<DIM, TILES> &q)
{
    int lane = threadIdx.x % WARP;
    int position = r.kept[half / 2] * BLOCK_TOKENS + half % 2 * HALF + lane / 4 * 2;
    uint2 *keys = (uint2 *)(r.token_keys + half * HALF) + lane / 4;
    unsigned sign[HALF / TILE][DIM / 64], agree[HALF / TILE][DIM / 64];

    load_plane<DIM, HALF>(sign, at + 2 * HALF);
    load_plane<DIM, HALF>(agree, at + 2 * HALF + HALF * DIM / 8);
#pragma unroll
    for (int tile = 0; tile < HALF / TILE; tile++)
#pragma unroll
        for (int i = 0; i < DIM / 64; i++)
            agree[tile][i] = ~(sign[tile][i] ^ agree[tile][i]);
#pragma unroll
    for (int tile = 0; tile < HALF / TILE; tile++) {
        float2 scale = scales_at(at, tile);
        float sum[TILES][2], agrees[TILES][2];
        float score[2] = { -INFINITY, -INFINITY };
        unsigned key[2];
        sum_bits<DIM, TILES>(sum, sign[tile], q);
        sum_bits<DIM, TILES>(agrees, agree[tile], q);
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int t = 0; t < TILES; t++)
                score[i] = fmaxf(score[i], (2 * sum[t][i] + agrees[t][i]) * q.unit[t]);
            score[i] *= i ? scale.y : scale.x;
            score[i] = fmaxf(score[i], __shfl_xor_sync(0xffffffffu, score[i], 1));
            score[i] = fmaxf(score[i], __shfl_xor_sync(0xffffffffu, score[i], 2));
            int token = position + tile * TILE + i;
            key[i] = token >= n ? 0
                     : always_chosen(token, n, a.sink_tokens, a.recent_tokens)
                         ? (unsigned)FORCED_KEY : key_of(score[i]);
        }
        if (lane % 4 == 0)
            keys[tile * (TILE / 2)] = make_uint2(key[0], key[1]);
    }
}

/* This block's tokens: those of kept blocks [first, end). */
template <int DIM, int TILES>
__device__ __forceinline__ void score_tokens(const two_level &a, const shared<DIM> *sh,
                                             const arrays &r, int kv_head, int n, int first,
                                             int end)
{
    int warp = threadIdx.x / WARP;
    const uint8_t *base = a.index + (size_t)kv_head * a.record_bytes;
    unsigned ring = shared_address(r.ahead + warp * DEPTH * half_bytes<DIM>);
    unsigned at = ring, free = ring;
    query_side<DIM, TILES> q;

    load_query_side<DIM, TILES>(&q, &sh->index);
#pragma unroll 1
    for (int half = 2 * first + warp - (DEPTH - 1) * WARPS; half < 2 * end; half += WARPS) {
        start_half<DIM>(a, r, free, base, half + (DEPTH - 1) * WARPS, 2 * end);
        free = free == ring + (DEPTH - 1) * half_bytes<DIM> ? ring : free + half_bytes<DIM>;
        if (half < 2 * first)    /* the ring is being filled */
            continue;
        copy_wait<DEPTH - 1>();
        __syncwarp();
        score_half<DIM, TILES>(a, r, at, half, n, q);
        __syncwarp();            /* all have read it: another takes its place next */
        at = at == ring + (DEPTH - 1) * half_bytes<DIM> ? ring : at + half_bytes<DIM>;
    }
    copy_wait<0>();
}

/* ---- attention */

/* Softmax of a warp: rows are heads (the upper eight rows are empty). */
template <int DIM>
struct heads_softmax {
    float max, sum;              /* of head lane / 4 */
    float acc[DIM / 8][2];       /* channels 8 j + 2 (lane % 4) + i */
};

/* What a thread block knows of hot rows. */
struct hot_share {
    hot::head head;
    int n_missing, before, own;  /* tokens that all blocks miss, the lower ranks, this one */
};

/* A tile in shared memory: piece p, of 16 bytes, of row i lies at p ^ i % 8 of the row.  So rows
 * meet other banks at the same piece, and yet no line is torn: where rows ended in a gap of 16
 * bytes, those of host memory came at 21 GB/s instead of 48 (H100, bench-gpu-offload). */
static __device__ __forceinline__ int swizzled(int row, int piece)
{
    return (piece ^ row % 8) * 16;
}

/* Start copying rows of up to TILE tokens to shared memory.  What is past n is the last one
 * again, but with hot rows, where that may cost a way over the bus, zeros: it has no weight. */
template <int DIM, bool HOT>
__device__ __forceinline__ void start_rows(unsigned to, const __nv_bfloat16 *kv,
                                           const int *list, int n, const hot::head &h)
{
    enum { PER_ROW = DIM / 4, AT_ONCE = WARP / PER_ROW }; /* lanes; rows */
    int lane = threadIdx.x % WARP, piece = lane % PER_ROW;

    if (!HOT)
        kv += piece * 8;
    if (n > 0)
#pragma unroll 8
        for (int i = 0; i < TILE; i += AT_ONCE) {
            int at = i + lane / PER_ROW;
            unsigned into = to + at * row_bytes<DIM> + swizzled(at, piece);
            if (HOT)
                copy_16(into, at < n ? hot::row_at<DIM>(h, kv, (unsigned)list[at]) + piece * 8 : kv,
                        at < n);
            else
                copy_16(into, kv + (size_t)list[min(at, n - 1)] * (2 * DIM));
        }
    copy_commit();               /* one group a tile, empty or not, for copy_wait() */
}

/* Those of a tile that came out of host memory to their rows of the set. */
template <int DIM>
__device__ __forceinline__ void keep_rows(const unsigned char *rows, const int *list,
                                          const uint16_t *into, int n, const hot::head &h)
{
    enum { PER_ROW = DIM / 4, AT_ONCE = WARP / PER_ROW };
    int lane = threadIdx.x % WARP, piece = lane % PER_ROW;

#pragma unroll 1
    for (int i = lane / PER_ROW; i < min(n, (int)TILE); i += AT_ONCE)
        if ((unsigned)list[i] >= hot::IN_HOST)
            ((uint4 *)(h.rows + (size_t)into[i] * (2 * DIM)))[piece] =
                *(const uint4 *)(rows + i * row_bytes<DIM> + swizzled(i, piece));
}

/* While the first rows are on their way: which rows of the set the missing ones get, and the
 * books of the set. */
__device__ __forceinline__ void settle(const arrays &r, const hot_share &h, int n, int rank,
                                       counts *c)
{
    if (h.n_missing > 0) {       /* so it is in all blocks of the cluster */
        int hand = hot::choose_rows(r.into, r.missing, h.before, h.own, h.n_missing, h.head,
                                    r.seen, c);
        cluster_barrier();       /* all have read the books */
        if (rank == 0 && threadIdx.x == 0)
            *h.head.hand = hand;
    }
    hot::write_books((const unsigned *)r.list, n, r.missing, h.own, r.into, h.head);
}

template <int DIM>
__device__ void attend_tile(heads_softmax<DIM> *s, const unsigned (&q)[DIM / 16][2],
                            unsigned rows, int n, float scale)
{
    int lane = threadIdx.x % WARP, c = lane % 4, matrix = lane / 8;
    int from = matrix / 2 * 8 + lane % 8;   /* the row, of K, that this lane gives the address of */
    unsigned row = rows + from * row_bytes<DIM>;
    float score[2][4] = {};

#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        unsigned b[4], left[4] = { q[step][0], 0, q[step][1], 0 };
        load_matrices(b, row + swizzled(from, 2 * step + matrix % 2));
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
    float shrink = exp2_fast(s->max - top), sum = 0;
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            score[i][j] = exp2_fast(score[i][j] - top);
            sum += score[i][j];
        }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    s->sum = s->sum * shrink + sum;
    s->max = top;

    unsigned p[4] = { pack_bf16(score[0][0], score[0][1]), 0,
                      pack_bf16(score[1][0], score[1][1]), 0 };
    from = matrix % 2 * 8 + lane % 8;       /* of V */
    row = rows + from * row_bytes<DIM>;
#pragma unroll
    for (int j = 0; j < DIM / 8; j += 2) {
        unsigned b[4];
        load_matrices_turned(b, row + swizzled(from, DIM / 8 + j + matrix / 2));
        for (int i = 0; i < 2; i++) {
            float acc[4] = { s->acc[j + i][0] * shrink, s->acc[j + i][1] * shrink, 0, 0 };
            mma_bf16(acc, p, b[2 * i], b[2 * i + 1]);
            s->acc[j + i][0] = acc[0];
            s->acc[j + i][1] = acc[1];
        }
    }
    __syncwarp();                /* the rows are replaced next */
}

/* Values of a group's result that thread block `rank` of `size` finishes: its share, a
 * multiple of four. */
struct result_share { int first, n, most; };

template <int DIM>
__device__ __forceinline__ result_share result_share_of(int group, int rank, int size)
{
    result_share p;

    p.most = round_up((group * DIM + size - 1) / size, 4);
    p.first = rank * p.most;
    p.n = max(min(p.most, group * DIM - p.first), 0);
    return p;
}

template <int DIM>
constexpr int part_row = DIM + 8; /* floats of a head's sums and a gap */

/* Each warp's sums as this thread block's, each share to the block that finishes it. */
template <int DIM>
__device__ void send_sums(const two_level &a, shared<DIM> *sh, const float *parts, int used,
                          int rank, int size)
{
    int most = result_share_of<DIM>(a.group, rank, size).most;

    for (int at = 4 * threadIdx.x; at < a.group * DIM; at += 4 * THREADS) {
        const float *from = parts + at / DIM * part_row<DIM> + at % DIM;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int w = 0; w < used; w++) {
            float4 v = *(const float4 *)(from + w * ROWS * part_row<DIM>);
            sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
        }
        float *to = &sh->acc[rank * most + at % most];
        if (size > 1)
            send_4(at / most, to, sum, &sh->sums_arrived);
        else
            *(float4 *)to = sum;
    }
    if ((int)threadIdx.x < size * ROWS && (int)threadIdx.x % ROWS < a.group) {
        int g = threadIdx.x % ROWS, to = threadIdx.x / ROWS;
        float top = -INFINITY, sum = 0;
#pragma unroll 1
        for (int w = 0; w < used; w++)
            top = fmaxf(top, sh->max[w][g]);
#pragma unroll 1
        for (int w = 0; w < used; w++)
            sum += sh->sum[w][g] * exp2_fast(sh->max[w][g] - top);
        if (size > 1)
            send_2(to, &sh->all[rank][g], make_float2(top, sum), &sh->sums_arrived);
        else
            sh->all[0][g] = make_float2(top, sum);
    }
}

/* Attention of this block's n tokens of the list. */
template <int DIM, bool HOT>
__device__ void attend_own(const two_level &a, shared<DIM> *sh, const arrays &r, int n,
                           int kv_head, int rank, int size, const hot_share &h,
                           const struct hot_rows &hot_rows)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4;
    const __nv_bfloat16 *kv = a.kv + (size_t)kv_head * BLOCK_TOKENS * 2 * DIM;
    unsigned rows = shared_address(r.rows) + warp * TILE * row_bytes<DIM>;
    float *parts = (float *)r.rows; /* [WARPS][ROWS][part_row], over the rows */
    int used = min((n + TILE - 1) / TILE, (int)WARPS);
    heads_softmax<DIM> s = { -INFINITY, 0, {} };
    uint64_t stalled_ns = 0;

    if (HOT) {
        start_rows<DIM, HOT>(rows, kv, r.list + warp * TILE, n - warp * TILE, h.head);
        settle(r, h, n, rank, &sh->count);
    }
    if (warp < used) {
        unsigned q[DIM / 16][2];
        for (int step = 0; step < DIM / 16; step++)
            for (int half = 0; half < 2; half++)
                q[step][half] = *(const unsigned *)&sh->query[g][16 * step + 8 * half +
                                                                  2 * (lane % 4)];
        int from = warp * TILE;
        if (!HOT)
            start_rows<DIM, HOT>(rows, kv, r.list + from, n - from, h.head);
#pragma unroll 1
        for (; from < n; from += WARPS * TILE) {
            int next = from + WARPS * TILE;
            bool waits = HOT && hot::any_missing(r.list + from, min(n - from, (int)TILE));
            uint64_t from_ns = waits ? hot::now_ns() : 0;
            copy_wait<0>();
            __syncwarp();
            if (waits)
                stalled_ns += hot::now_ns() - from_ns;
            if (waits)
                keep_rows<DIM>(r.rows + warp * TILE * row_bytes<DIM>, r.list + from,
                               r.into + from, n - from, h.head);
            attend_tile<DIM>(&s, q, rows, n - from, a.softmax_scale);
            start_rows<DIM, HOT>(rows, kv, r.list + next, n - next, h.head);
        }
        if (lane % 4 == 0) {
            sh->max[warp][g] = s.max;
            sh->sum[warp][g] = s.sum;
        }
        if (HOT && stalled_ns > 0 && lane == 0)
            hot::report_stall(hot_rows, stalled_ns);
    }
    __syncthreads();             /* nobody needs rows any more */
    if (warp < used) {
        float top = -INFINITY;
#pragma unroll 1
        for (int w = 0; w < used; w++)
            top = fmaxf(top, sh->max[w][g]);
        float shrink = exp2_fast(s.max - top);
        float *to = parts + (warp * ROWS + g) * part_row<DIM> + 2 * (lane % 4);
        for (int j = 0; j < DIM / 8; j++)
            *(float2 *)(to + 8 * j) = make_float2(s.acc[j][0] * shrink, s.acc[j][1] * shrink);
    }
    __syncthreads();
    send_sums<DIM>(a, sh, parts, used, rank, size);
}

/* This block's share of the result, when all sums have arrived. */
template <int DIM>
__device__ void finish(const two_level &a, shared<DIM> *sh, __nv_bfloat16 *out, int rank,
                       int size)
{
    result_share p = result_share_of<DIM>(a.group, rank, size);

    if (size > 1)
        barrier_wait(&sh->sums_arrived);
    else                         /* a cluster of one sends nothing */
        __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < p.n; i += THREADS) {
        int g = (p.first + i) / DIM;
        float top = -INFINITY, total = 0, value = 0;
#pragma unroll 1
        for (int from = 0; from < size; from++)
            top = fmaxf(top, sh->all[from][g].x);
#pragma unroll 1
        for (int from = 0; from < size; from++) {
            /* 0 for a block without tokens. */
            float shrink = exp2_fast(sh->all[from][g].x - top);
            total += sh->all[from][g].y * shrink;
            value += sh->acc[from * p.most + i] * shrink;
        }
        out[p.first + i] = __float2bfloat16_rn(value / total);
    }
}

/* ---- */

/* What does not come from the filter: queries, barriers, block ids.  Wait for the copies before
 * these are read. */
template <int DIM, int TILES>
__device__ __forceinline__ void prepare(const two_level &a, shared<DIM> *sh, const arrays &r,
                                        const __nv_bfloat16 *q, const int32_t *index_table,
                                        const int32_t *kv_table, int n_blocks)
{
    start_tables<THREADS>(r, index_table, kv_table, n_blocks);
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * DIM / 2; i += THREADS) {
        int head = i / (DIM / 2), d = i % (DIM / 2) * 2;
        unsigned *to = (unsigned *)&sh->query[head][d];
        if (head < a.group)
            copy_4(shared_address(to), q + head * DIM + d);
        else
            *to = 0;
    }
    copy_commit();
    load_digits<DIM, TILES>(&sh->index, q, a.group);
    clear_bins(&sh->count);
    if (threadIdx.x == 0) {
        sh->count.largest = 0;
        barrier_init(&sh->keys_arrived);
        barrier_init(&sh->sums_arrived);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
}

/* The tokens of this block's kept blocks [first, end) that are among the keep_tokens best of
 * all; how many.  r.list gets their rows of K and V, counted from the head's first row. */
template <int DIM>
__device__ __forceinline__ int choose_tokens(const two_level &a, shared<DIM> *sh,
                                             const arrays &r, int n_kept, int first, int end)
{
    int n_keys = n_kept * BLOCK_TOKENS;
    border b = find_token_border(r.token_keys, n_keys, a.keep_tokens, &sh->count);

    int n = each_chosen(r.token_keys, first * BLOCK_TOKENS, end * BLOCK_TOKENS, n_keys, b,
                        &sh->count, [&](int i, int key) {
        r.list[i] = r.blocks[key / BLOCK_TOKENS] * a.kv_heads * BLOCK_TOKENS + key % BLOCK_TOKENS;
    });
    __syncthreads();
    return n;
}

/* How many numbers of an ascending list are below the limit. */
__device__ __forceinline__ int count_below(const unsigned *list, int n, unsigned limit)
{
    int from = 0;

    while (from < n) {
        int middle = (from + n) / 2;
        if (list[middle] < limit)
            from = middle + 1;
        else
            n = middle;
    }
    return from;
}

/* The same with hot rows; r.list gets places. */
template <int DIM>
__device__ __forceinline__ int resolve_tokens(const two_level &a, shared<DIM> *sh,
                                              const arrays &r, int n_kept, int first, int end,
                                              const struct hot_rows &hot_rows, hot_share *h)
{
    int n_keys = n_kept * BLOCK_TOKENS;
    border b = find_token_border(r.token_keys, n_keys, a.keep_tokens, &sh->count);

    hot::clear_seen(r.seen, h->head.n);
    int n_all = list_chosen((int *)r.all, r.token_keys, 0, n_keys, n_keys, b, &sh->count);
    __syncthreads();
    int own_first = count_below(r.all, n_all, first * BLOCK_TOKENS);
    int n = count_below(r.all, n_all, end * BLOCK_TOKENS) - own_first;
    __syncthreads();             /* numbers of keys become places */
#pragma unroll 1
    for (int i = threadIdx.x; i < n_all; i += THREADS) {
        int block = r.all[i] / BLOCK_TOKENS, token = r.all[i] % BLOCK_TOKENS;
        r.all[i] = r.blocks[block] >= 0
                       ? (unsigned)(r.blocks[block] * a.kv_heads * BLOCK_TOKENS + token)
                       : hot::IN_HOST + r.kept[block] * BLOCK_TOKENS + token;
    }
    hot::find_in_set(r.all, n_all, h->head, r.seen);
    __syncthreads();
    int sums[3] = { 0, 0, 0 };   /* missing tokens, those of lower ranks, own hits */
#pragma unroll 1
    for (int i = threadIdx.x; i < n_all; i += THREADS) {
        unsigned place = r.all[i];
        sums[0] += place >= hot::IN_HOST;
        sums[1] += place >= hot::IN_HOST && i < own_first;
        if (i >= own_first && i < own_first + n) {
            r.list[i - own_first] = (int)place;
            sums[2] += place >= hot::IN_SET && place < hot::IN_HOST;
        }
    }
    hot::add_up(sums, &sh->count);
    h->n_missing = sums[0];
    h->before = sums[1];
    h->own = sums[0] > 0 ? hot::list_missing(r.missing, (unsigned *)r.list, n, &sh->count) : 0;
    if (h->head.there && threadIdx.x == 0)
        hot::add_counts(hot_rows, sums[2], h->own, n - h->own - sums[2]);
    __syncthreads();             /* nobody needs `all` any more, whose place rows take */
    return n;
}

/* Grid: clusters in a row.  May read what the filter's predecessors wrote before it waits
 * for the filter, which starts this kernel only after its own wait. */
template <int DIM, int TILES, bool HOT>
__device__ __forceinline__ void attend_unit(const two_level &a, const struct hot_rows &hot_rows)
{
    extern __shared__ __align__(LINE) unsigned char memory[];
    int size = cluster_size(), rank = cluster_rank();
    int unit = blockIdx.x / size, seq = unit / a.kv_heads, kv_head = unit % a.kv_heads;
    shared<DIM> *sh = (shared<DIM> *)memory;
    arrays r;

    /* The next kernel does not start before this one ends, not even beside its last sums, which
     * would make the operator alone 2 us shorter.  Thread blocks of the output projection all go to
     * the multiprocessors that have room and stay there: a step of Qwen3-8B, 98,304 tokens, took 30
     * us a layer longer at batch 1 and 40 at batch 8. */
    int n = a.n_tokens[seq], n_blocks = (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    if (n == 0) {                /* padding: the whole cluster leaves */
        wait_for_inputs();
        return;
    }
    lay_out<DIM, HOT>(&r, (unsigned char *)(sh + 1), a, size, hot_rows.rows_per_head);
    prepare<DIM, TILES>(a, sh, r, a.q + (size_t)seq * a.q_stride + kv_head * a.group * DIM,
                        a.index_table + (size_t)seq * a.max_blocks,
                        a.kv_table + (size_t)seq * a.max_blocks, n_blocks);
    /* Nothing may be sent to a block whose barriers are not there: arrive here, wait
     * before the first is. */
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    wait_for_inputs();
    copy_wait<0>();
    int n_kept = choose_kept<THREADS>(r, a.keys + (size_t)unit * a.max_blocks, n_blocks,
                                      a.keep_blocks, &sh->count);
    int share = share_of(n_kept, size), first = min(rank * share, n_kept);
    int end = min(first + share, n_kept);
    score_tokens<DIM, TILES>(a, sh, r, kv_head, n, first, end);
    publish_to_copies();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    __syncthreads();
    if ((int)threadIdx.x < size && (int)threadIdx.x != rank && end > first)
        send_bytes(threadIdx.x, r.token_keys + first * BLOCK_TOKENS,
                   (end - first) * BLOCK_TOKENS * 4, &sh->keys_arrived);
    if (threadIdx.x == 0) {
        barrier_expect(&sh->keys_arrived, (n_kept - (end - first)) * BLOCK_TOKENS * 4);
        int own = result_share_of<DIM>(a.group, rank, size).n;
        if (size > 1)
            barrier_expect(&sh->sums_arrived, size * 4 * (own + 2 * a.group));
    }
    hot_share h;
    if (HOT)
        h.head = hot::head_of<DIM>(hot_rows, seq, kv_head, a.kv_heads, a.max_blocks,
                                   a.keep_tokens);
    barrier_wait(&sh->keys_arrived);
    int n_list = HOT ? resolve_tokens<DIM>(a, sh, r, n_kept, first, end, hot_rows, &h)
                     : choose_tokens<DIM>(a, sh, r, n_kept, first, end);
    attend_own<DIM, HOT>(a, sh, r, n_list, kv_head, rank, size, h, hot_rows);
    finish<DIM>(a, sh, a.out + (size_t)unit * a.group * DIM, rank, size);
}

template <int DIM, int TILES>
__global__ void __launch_bounds__(THREADS, 1) attend_two_level(two_level a)
{
    attend_unit<DIM, TILES, false>(a, {});
}

/* A kernel of its own: with arguments of more than 128 bytes the other one would be other code. */
template <int DIM, int TILES>
__global__ void __launch_bounds__(THREADS, 1) attend_two_level_hot(two_level a,
                                                                   struct hot_rows hot)
{
    attend_unit<DIM, TILES, true>(a, hot);
}
#endif

template <int DIM, bool HOT>
size_t shared_bytes(const two_level &a, int cluster, int rows_per_head)
{
    arrays r;

    return sizeof(shared<DIM>) + lay_out<DIM, HOT>(&r, NULL, a, cluster, rows_per_head);
}

/* As many thread blocks a cluster as let all clusters run at the same time: those of one
 * must find room in one part of the GPU, so this is less than their number says.  0 where
 * there is not enough shared memory. */
template <int DIM, int TILES>
int choose_cluster(struct stream *s, const two_level &a, int units)
{
    cluster_choice *known = &s->clusters;
    const cluster_choice wanted = { DIM, TILES, units, a.max_blocks, a.keep_blocks, 0 };
    struct cluster_launch launch;

    if (known->size && known->dim == DIM && known->tiles == TILES && known->units == units &&
        known->max_blocks == a.max_blocks && known->keep_blocks == a.keep_blocks)
        return known->size;
    *known = wanted;
    for (int size = MAX_CLUSTER; size > 0; size--) {
        size_t bytes = shared_bytes<DIM, false>(a, size, 0);
        int fit = 0;
        if (bytes > MOST_SHARED)
            continue;
        stream_check(s, cudaFuncSetAttribute(attend_two_level<DIM, TILES>,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             (int)bytes), "attend_two_level");
        configure_clusters(&launch, units, size, THREADS, bytes);
        stream_check(s, cudaOccupancyMaxActiveClusters(&fit, attend_two_level<DIM, TILES>,
                                                       &launch.config), "attend_two_level");
        if (fit >= units || (size == 1 && !known->size))
            return known->size = size;
    }
    return 0;
}

/* Work space behind the keys: the operations one after the other need more (two_level_parts.cu). */
int32_t *after_keys(const two_level &a)
{
    size_t n = (size_t)a.seqs * a.kv_heads * a.max_blocks;

    return (int32_t *)a.keys + (n + 63) / 64 * 64;
}

/* Queue both kernels, the second with its arguments. */
template <typename... P>
void launch_both(struct stream *s, const two_level &a, const struct attend_two_level_args *args,
                 int clusters, int cluster, size_t bytes, void (*kernel)(two_level, P...), P... p)
{
    struct cluster_launch launch;

    queue_filter(s, a, &args->shape, args->max_n_tokens);
    if (args->lagged)
        queue_lag_keys(s, args, a.keys, after_keys(a));
    stream_check(s, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         (int)bytes), "attend_two_level");
    configure_clusters(&launch, clusters, cluster, THREADS, bytes);
    launch.config.stream = s->cu;
    stream_check(s, cudaLaunchKernelEx(&launch.config, kernel, a, p...), "attend_two_level");
}

template <int DIM, int TILES>
bool launch(struct stream *s, const two_level &a, const struct attend_two_level_args *args)
{
    const struct hot_rows *hot = args->hot;
    int units = a.seqs * a.kv_heads, cluster = choose_cluster<DIM, TILES>(s, a, units);

    if (!cluster)                /* contexts of a million tokens */
        return false;
    if (!hot) {
        launch_both(s, a, args, units, cluster, shared_bytes<DIM, false>(a, cluster, 0),
                    attend_two_level<DIM, TILES>);
        return true;
    }
    size_t bytes = shared_bytes<DIM, true>(a, cluster, hot->rows_per_head);
    /* From 125 kept blocks on where all their tokens are chosen, from 188 on with 16 of each;
     * without hot rows from 224 on.  In between the bits are those of another kernel. */
    if (bytes > MOST_SHARED)
        return false;
    launch_both(s, a, args, units, cluster, bytes, attend_two_level_hot<DIM, TILES>, *hot);
    return true;
}

}

bool attend_two_level_fused(struct stream *s, const struct attend_two_level_args *args)
{
    const struct kv_shape *shape = &args->shape;
    struct index_layout layout = index_layout(shape);
    two_level a = {};
    int group = args->heads / shape->kv_heads;

    if (!s->be->hopper || group > ROWS || shape->filter == FILTER_BOUNDS ||
        shape->index != INDEX_ROTATED)
        return false;
    a.out = (__nv_bfloat16 *)args->out;
    a.q = (const __nv_bfloat16 *)args->q;
    a.kv = (const __nv_bfloat16 *)args->kv;
    a.index = args->index;
    a.kv_table = args->kv_table;
    a.index_table = args->index_table;
    a.n_tokens = args->n_tokens;
    a.keys = (unsigned *)args->scratch;
    a.seqs = args->seqs;
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
    a.softmax_scale = args->scale * LOG2_E;
    if (shape->head_dim == 128)
        return group <= 4 ? launch<128, 1>(s, a, args) : launch<128, 2>(s, a, args);
    return group <= 4 ? launch<64, 1>(s, a, args) : launch<64, 2>(s, a, args);
}
