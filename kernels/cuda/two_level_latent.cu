/* Two-level attention to latent rows of a decode step, behind its filter (latent_filter.cu):
 * chooses the blocks, scores their tokens, chooses tokens and attends to them.
 *
 * As two_level.cu, whose steps these are, with one choice for all heads of a sequence: a
 * thread-block cluster does a sequence.
 *
 *   1  all choose the same keep_blocks from the filter's keys
 *   2  each scores the tokens of its share of those and sends the keys to all; all list the same
 *      chosen tokens
 *   3  each attends to an equal share of the list, all heads at once (latent_tile.cuh), and sends
 *      each block the sums of some channels, which that block finishes
 *
 * With hot rows (HOT) every block looks up all chosen tokens, so that all know the same, and
 * fetches and keeps the missing rows of its own share. */

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/hot_rows.cuh"
#include "kernels/cuda/lag.cuh"
#include "kernels/cuda/latent_scores.cuh"
#include "kernels/cuda/latent_tile.cuh"
#include "kernels/cuda/select.cuh"

namespace {

using namespace latent;

enum {
    COLUMNS = MOST_HEADS,
    MAX_CLUSTER = 8,
    MOST_SHARED = 227 * 1024,
    DEPTH = 3,                   /* tiles on their way or in use */
    HALF_ROW = D / 2,            /* hot_rows.cuh's DIM, which has rows of K and V */
    PIECE_STRIDE = SLICE + 4,    /* floats of a head's sums of a warp and a gap */
    PIECE = COLUMNS * PIECE_STRIDE,
};

struct two_level {
    __nv_bfloat16 *out;
    const __nv_bfloat16 *q, *kv;
    const uint8_t *index;
    const int32_t *kv_table, *index_table, *n_tokens;
    const unsigned *keys;        /* [seqs, max_blocks] of the filter */
    const queries *made;         /* [seqs] */
    int scale;                   /* of struct index_layout; signs and the rest lie behind it */
    int heads, q_stride, max_blocks;
    int keep_blocks, keep_tokens, sink_tokens, recent_tokens;
    size_t index_block_bytes;
    float softmax_scale;         /* times log2(e) */
};

struct __align__(128) shared {
    union {                      /* one after the other */
        queries made;
        work<COLUMNS> attend;
    };
    float acc[WARPS][PIECE];     /* what this block finishes: pieces of all blocks */
    float2 all[MAX_CLUSTER][COLUMNS]; /* maximum and sum of each block's tokens */
    uint64_t keys_arrived, sums_arrived;  /* barriers of what others send */
    counts count;
};

/* The arrays behind it. */
struct arrays {
    int *kept, *records, *blocks;  /* [keep_blocks] numbers; ids in index and kv */
    unsigned *token_keys;          /* [keep_blocks, BLOCK_TOKENS] */
    unsigned *all;                 /* [keep_tokens] chosen: numbers of keys, then rows of kv or,
                                      with hot rows, places */
    unsigned *seen;                /* with hot rows: bits of rows that this step uses; */
    int *missing;                  /* of this block's share; */
    uint16_t *into;                /* the row that a missing one gets */
    unsigned char *tiles;          /* [DEPTH] of stage 3, and what is needed before: */
    unsigned *block_keys;          /* [max_blocks]  stage 1 */
    int *ids, *kv_ids;             /* [max_blocks]  stage 1: the tables */
    unsigned char *records_ahead;  /* [WARPS] records  stage 2 */
};

__host__ __device__ inline int round_up(int n, int to)
{
    return (n + to - 1) / to * to;
}

__host__ __device__ inline int share_of(int n, int size)
{
    return (n + size - 1) / size;
}

/* Where they lie from base on; the bytes taken.  rows_per_head: 0 without hot rows. */
__host__ __device__ inline size_t lay_out(arrays *r, unsigned char *base, const two_level &a,
                                          int size, int rows_per_head)
{
    int slots = round_up(a.keep_blocks, 4), blocks = round_up(a.max_blocks, 4);
    int tokens = round_up(a.keep_tokens, 4), own = round_up(share_of(a.keep_tokens, size), 8);

    r->kept = (int *)base;
    r->records = r->kept + slots;
    r->blocks = r->records + slots;
    r->token_keys = (unsigned *)(r->blocks + slots);
    r->all = r->token_keys + slots * BLOCK_TOKENS;
    r->seen = r->all + tokens;
    r->missing = (int *)(r->seen + (rows_per_head ? round_up(hot::words_of(rows_per_head), 4) : 0));
    r->into = (uint16_t *)(r->missing + (rows_per_head ? own : 0));
    size_t at = (unsigned char *)(r->into + (rows_per_head ? own : 0)) - base;
    at = (at + 127) / 128 * 128;
    r->tiles = base + at;
    r->block_keys = (unsigned *)r->tiles;
    r->ids = (int *)(r->block_keys + blocks);
    r->kv_ids = r->ids + blocks;
    r->records_ahead = r->tiles;
    size_t stage1 = 12 * (size_t)blocks, stage2 = (size_t)WARPS * SELECT_BYTES;
    size_t stage3 = (size_t)DEPTH * TILE_BYTES, sums = sizeof(float) * WARPS * PIECE;
    size_t most = stage1 > stage2 ? stage1 : stage2;
    most = most > stage3 ? most : stage3;
    return at + (most > sums ? most : sums);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
/* Older ones have no clusters; never launched there. */
__global__ void attend_two_level(two_level a)
{
    (void)a;
}

__global__ void attend_two_level_hot(two_level a, struct hot_rows hot)
{
    (void)a, (void)hot;
}
#else

/* ---- stage 1 */

/* What does not come from the filter: queries, barriers, block ids. */
__device__ __forceinline__ void prepare(const two_level &a, shared *sh, const arrays &r, int seq,
                                        int n_blocks)
{
#pragma unroll 4
    for (int i = threadIdx.x; i < n_blocks; i += THREADS) {
        r.ids[i] = a.index_table[(size_t)seq * a.max_blocks + i];
        r.kv_ids[i] = a.kv_table[(size_t)seq * a.max_blocks + i];
    }
    start_queries(&sh->made, a.made + seq);
    copy_commit();
    clear_bins(&sh->count);
    if (threadIdx.x == 0) {
        sh->count.largest = 0;
        barrier_init(&sh->keys_arrived);
        barrier_init(&sh->sums_arrived);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
}

/* The kept blocks, ascending, with their ids; how many. */
__device__ __forceinline__ int choose_blocks(const two_level &a, shared *sh, const arrays &r,
                                             const unsigned *keys, int n_blocks)
{
    border b;

#pragma unroll 4
    for (int i = threadIdx.x; i < n_blocks; i += THREADS)
        r.block_keys[i] = __ldcg(keys + i);
    copy_wait<0>();              /* the queries, for the next stage */
    __syncthreads();
    b.key = find_border(r.block_keys, n_blocks, a.keep_blocks, &b.equal, &sh->count);
    int n_kept = list_chosen(r.kept, r.block_keys, 0, n_blocks, n_blocks, b, &sh->count);
    __syncthreads();
    for (int i = threadIdx.x; i < n_kept; i += THREADS) {
        r.records[i] = r.ids[r.kept[i]];
        r.blocks[i] = r.kv_ids[r.kept[i]];
    }
    clear_bins(&sh->count);
    __syncthreads();             /* the keys and ids are not needed any more */
    return n_kept;
}

/* ---- stage 2 */

/* Keys of a tile of 16 tokens of a record in shared memory. */
__device__ __forceinline__ void score_tile(const two_level &a, unsigned *keys, unsigned record,
                                           int tile, int position, int n, const query_side &q)
{
    int lane = threadIdx.x % WARP, token = tile * 16 + lane / 4;
    unsigned signs = record + BLOCK_TOKENS * SCALE_BYTES + token * TOKEN_BYTES;
    float best[2] = { -INFINITY, -INFINITY };
    float latent_score[TILES][4];
    quarter sign[2], agree[2];
    float2 scale[2];
    int d[TILES][4] = {};

#pragma unroll
    for (int i = 0; i < 2; i++) {
        sign[i] = load_quarter(signs + 8 * i * TOKEN_BYTES);
        agree[i] = load_quarter(signs + 8 * i * TOKEN_BYTES + PLANE_BYTES);
        scale[i] = load_scales(record + (token + 8 * i) * SCALE_BYTES);
#pragma unroll
        for (int w = 0; w < WORDS; w++)
            agree[i].word[w] = ~(sign[i].word[w] ^ agree[i].word[w]);
        agree[i].rope = ~(sign[i].rope ^ agree[i].rope);
    }
    /* A value is 2 sign + agree, which stands for -3, -1, 1, 3. */
#pragma unroll
    for (int w = 0; w < WORDS; w++)
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            unsigned left[4];
#pragma unroll
            for (int k = 0; k < 4; k++)
                left[k] = twos(sign[k % 2].word[w], i + k / 2) |
                          ones(agree[k % 2].word[w], i + k / 2);
#pragma unroll
            for (int t = 0; t < TILES; t++)
                mma_int8(d[t], left, q.right[t][8 * w + i], q.right[t][8 * w + i + 1]);
        }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int sum = 2 * d[t][k] - 3 * q.sum[0][t][k % 2];
            latent_score[t][k] = scale[k / 2].x * q.unit[0][t][k % 2] * 0.5f * (float)sum;
            d[t][k] = 0;
        }
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        unsigned left[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            left[k] = twos(sign[k % 2].rope, i + k / 2) | ones(agree[k % 2].rope, i + k / 2);
#pragma unroll
        for (int t = 0; t < TILES; t++)
            mma_int8(d[t], left, q.right[t][8 * WORDS + i], q.right[t][8 * WORDS + i + 1]);
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int sum = 2 * d[t][k] - 3 * q.sum[1][t][k % 2];
            best[k / 2] = fmaxf(best[k / 2], latent_score[t][k] + scale[k / 2].y *
                                                 q.unit[1][t][k % 2] * 0.5f * (float)sum);
        }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        best[i] = fmaxf(best[i], __shfl_xor_sync(0xffffffffu, best[i], 1));
        best[i] = fmaxf(best[i], __shfl_xor_sync(0xffffffffu, best[i], 2));
        int at = position + token + 8 * i;
        if (lane % 4 == 0)
            keys[token + 8 * i] =
                at >= n ? 0
                : always_chosen(at, n, a.sink_tokens, a.recent_tokens) ? (unsigned)FORCED_KEY
                                                                       : key_of(best[i]);
    }
}

/* This block's tokens: those of kept blocks [first, end), a block a warp. */
__device__ __forceinline__ void score_tokens(const two_level &a, const shared *sh,
                                             const arrays &r, int n, int first, int end)
{
    enum { COPIES = SELECT_BYTES / 16 };
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    unsigned at = shared_address(r.records_ahead) + warp * SELECT_BYTES;
    query_side q;

    for (int k = first + warp; k < end; k += WARPS) {
        const uint8_t *from = a.index + (size_t)r.records[k] * a.index_block_bytes + a.scale;
#pragma unroll
        for (int i = 0; i < COPIES; i += WARP)
            if (i + WARP <= COPIES || lane < COPIES % WARP)
                copy_16(at + (i + lane) * 16, from + (i + lane) * 16);
        copy_commit();
        if (k == first + warp)
            load_query_side(&q, &sh->made);
        copy_wait<0>();
        __syncwarp();
#pragma unroll 1
        for (int tile = 0; tile < BLOCK_TOKENS / 16; tile++)
            score_tile(a, r.token_keys + k * BLOCK_TOKENS, at, tile, r.kept[k] * BLOCK_TOKENS, n,
                       q);
        __syncwarp();            /* all have read it: another takes its place next */
    }
}

/* All chosen tokens as numbers of keys, ascending, to r.all; how many. */
__device__ __forceinline__ int choose_tokens(const two_level &a, shared *sh, const arrays &r,
                                             int n_kept)
{
    int n_keys = n_kept * BLOCK_TOKENS;
    border b;

    /* No estimate of a token is much above the best of the filter's of its block, which is among
     * the largest but for the forced blocks. */
    unsigned largest = sh->count.largest;
    if (largest > POSITIVE)
        b.key = find_border_below(r.token_keys, n_keys, a.keep_tokens, largest + BINADE, &b.equal,
                                  &sh->count);
    else
        b.key = find_border(r.token_keys, n_keys, a.keep_tokens, &b.equal, &sh->count);
    int n = list_chosen((int *)r.all, r.token_keys, 0, n_keys, n_keys, b, &sh->count);
    __syncthreads();
    return n;
}

/* What a thread block has of the list, and of hot rows. */
struct share {
    int first, n;                /* of the list */
    hot::head head;
    int n_missing, before, own;  /* tokens that all blocks miss, the lower ranks, this one */
};

/* Numbers of keys to rows of kv or, with hot rows, places. */
template <bool HOT>
__device__ __forceinline__ void resolve(shared *sh, const arrays &r, int n_all, share *h,
                                        const struct hot_rows &hot_rows)
{
    if (HOT)
        hot::clear_seen(r.seen, h->head.n);
    for (int i = threadIdx.x; i < n_all; i += THREADS) {
        int block = r.all[i] / BLOCK_TOKENS, token = r.all[i] % BLOCK_TOKENS;
        r.all[i] = !HOT || r.blocks[block] >= 0
                       ? (unsigned)(r.blocks[block] * BLOCK_TOKENS + token)
                       : hot::IN_HOST + r.kept[block] * BLOCK_TOKENS + token;
    }
    if (!HOT) {
        __syncthreads();
        return;
    }
    __syncthreads();             /* nothing is marked before all is clear */
    hot::find_in_set(r.all, n_all, h->head, r.seen);
    __syncthreads();
    int sums[3] = { 0, 0, 0 };   /* missing tokens, those of lower ranks, own hits */
    for (int i = threadIdx.x; i < n_all; i += THREADS) {
        unsigned place = r.all[i];
        sums[0] += place >= hot::IN_HOST;
        sums[1] += place >= hot::IN_HOST && i < h->first;
        sums[2] += i >= h->first && i < h->first + h->n && place >= hot::IN_SET &&
                   place < hot::IN_HOST;
    }
    hot::add_up(sums, &sh->count);
    h->n_missing = sums[0];
    h->before = sums[1];
    h->own = sums[0] > 0 ? hot::list_missing(r.missing, r.all + h->first, h->n, &sh->count) : 0;
    if (h->head.there && threadIdx.x == 0)
        hot::add_counts(hot_rows, sums[2], h->own, h->n - h->own - sums[2]);
    __syncthreads();
}

/* While the first rows are on their way: which rows of the set the missing ones get, and the
 * books of the set. */
__device__ __forceinline__ void settle(shared *sh, const arrays &r, const share &h, int rank,
                                       int size)
{
    if (h.n_missing > 0) {       /* so it is in all blocks of the cluster */
        int hand = hot::choose_rows(r.into, r.missing, h.before, h.own, h.n_missing, h.head,
                                    r.seen, &sh->count);
        if (size > 1)
            cluster_barrier();   /* all have read the books */
        else
            __syncthreads();
        if (rank == 0 && threadIdx.x == 0)
            *h.head.hand = hand;
    }
    hot::write_books(r.all + h.first, h.n, r.missing, h.own, r.into, h.head);
}

/* ---- stage 3 */

/* Rows of a tile that came out of host memory to their rows of the set. */
__device__ __forceinline__ void keep_rows(const unsigned char *tile, const unsigned *place,
                                          const uint16_t *into, int n, const hot::head &h)
{
    for (int i = threadIdx.x; i < n * PIECES; i += THREADS) {
        int row = i / PIECES, piece = i % PIECES;
        if (place[row] >= hot::IN_HOST)
            ((uint4 *)(h.rows + (size_t)into[row] * D))[piece] =
                *(const uint4 *)(tile + piece_at(row, piece));
    }
}

template <bool HOT>
__device__ __forceinline__ void attend_share(const two_level &a, shared *sh, const arrays &r,
                                             const share &h, state<COLUMNS> *s, int seq, int rank,
                                             int size, const struct hot_rows &hot_rows)
{
    const unsigned *list = r.all + h.first;
    const __nv_bfloat16 *q = a.q + (size_t)seq * a.q_stride;
    unsigned ring = shared_address(r.tiles);
    int n_tiles = (h.n + TILE - 1) / TILE;
    uint64_t stalled_ns = 0;
    auto start = [&](int tile) {
        const unsigned *from = list + tile * TILE;
        start_tile(ring + tile % DEPTH * TILE_BYTES,
                   tile < n_tiles ? min(h.n - tile * TILE, (int)TILE) : 0, [&](int i) {
            return HOT ? hot::row_at<HALF_ROW>(h.head, a.kv, from[i]) : a.kv + (size_t)from[i] * D;
        });
    };
    auto arrive = [&](int tile) {
        int from = tile * TILE, n = min(h.n - from, (int)TILE);
        bool waits = HOT && hot::any_missing((const int *)list + from, n);
        uint64_t from_ns = waits ? hot::now_ns() : 0;
        copy_wait<DEPTH - 3>();
        __syncthreads();
        if (waits) {
            stalled_ns += hot::now_ns() - from_ns;
            keep_rows(r.tiles + tile % DEPTH * TILE_BYTES, list + from, r.into + from, n, h.head);
        }
    };

    for (int i = 0; i < DEPTH - 1; i++)
        start(i);
    load_queries<COLUMNS>(s, &sh->attend, a.heads,
                          [&](int head) { return q + (size_t)head * D; });
    clear(s);
    if (HOT)
        settle(sh, r, h, rank, size);
    if (n_tiles > 0)
        attend_tiles<COLUMNS, DEPTH>(s, &sh->attend, ring, n_tiles, a.softmax_scale, start, arrive,
                                     [&](int tile, int column) {
            return column < a.heads ? h.n - tile * TILE : 0;
        });
    if (HOT && stalled_ns > 0 && threadIdx.x == 0)
        hot::report_stall(hot_rows, stalled_ns);
    copy_wait<0>();
    __syncthreads();             /* nobody needs the tiles any more */
}

/* The sums of a warp's channels, a piece, to the block that finishes these. */
__device__ __forceinline__ void send_sums(const two_level &a, shared *sh, const arrays &r,
                                          const state<COLUMNS> &s, int rank, int size)
{
    int warp = threadIdx.x / WARP, each = WARPS / size; /* pieces that a block finishes */
    float *piece = size > 1 ? (float *)r.tiles + warp * PIECE : sh->acc[warp];

    publish_sums<COLUMNS>(&s, &sh->attend, a.softmax_scale);
    each_value<COLUMNS>(s, [&](int channel, int head, float v) {
        piece[head * PIECE_STRIDE + channel % SLICE] = v;
    });
    publish_to_copies();
    __syncthreads();
    if (size > 1 && threadIdx.x % WARP == 0)
        send_to(warp / each, sh->acc[rank * each + warp % each], piece, PIECE * sizeof(float),
                &sh->sums_arrived);
    for (int i = threadIdx.x; i < size * COLUMNS; i += THREADS) {
        int head = i % COLUMNS;
        float2 own = make_float2(sh->attend.shrink[head], sh->attend.sum[head]);
        if (size > 1)
            send_2(i / COLUMNS, &sh->all[rank][head], own, &sh->sums_arrived);
        else
            sh->all[0][head] = own;
    }
}

/* This block's channels of the result, when all sums have arrived. */
__device__ __forceinline__ void finish(const two_level &a, shared *sh, __nv_bfloat16 *out,
                                       int rank, int size)
{
    int each = WARPS / size, channels = each * SLICE;

    if (size > 1)
        barrier_wait(&sh->sums_arrived);
    else                         /* a cluster of one sends nothing */
        __syncthreads();
    for (int i = threadIdx.x; i < a.heads * channels; i += THREADS) {
        int head = i / channels, channel = i % channels;
        const float *at = sh->acc[channel / SLICE] + head * PIECE_STRIDE + channel % SLICE;
        float top = -INFINITY, total = 0, value = 0;
        for (int from = 0; from < size; from++)
            top = fmaxf(top, sh->all[from][head].x);
        for (int from = 0; from < size; from++) {
            /* 0 for a block without tokens. */
            float shrink = exp2_fast(sh->all[from][head].x - top);
            total += sh->all[from][head].y * shrink;
            value += at[from * each * PIECE] * shrink;
        }
        out[head * L + rank * channels + channel] = __float2bfloat16_rn(value / total);
    }
}

/* Grid: clusters in a row.  May read what the filter's predecessors wrote before it waits for the
 * filter, which starts this kernel only after its own wait. */
template <bool HOT>
__device__ __forceinline__ void attend_sequence(const two_level &a,
                                                const struct hot_rows &hot_rows)
{
    extern __shared__ __align__(1024) unsigned char memory[];
    int size = cluster_size(), rank = cluster_rank(), seq = blockIdx.x / size;
    shared *sh = (shared *)memory;
    arrays r;
    share h;

    int n = a.n_tokens[seq], n_blocks = (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    if (n == 0) {                /* padding: the whole cluster leaves */
        wait_for_inputs();
        return;
    }
    lay_out(&r, (unsigned char *)(sh + 1), a, size, HOT ? hot_rows.rows_per_head : 0);
    prepare(a, sh, r, seq, n_blocks);
    /* Nothing may be sent to a block whose barriers are not there: arrive here, wait before the
     * first is. */
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    wait_for_inputs();
    int n_kept = choose_blocks(a, sh, r, a.keys + (size_t)seq * a.max_blocks, n_blocks);
    int each = share_of(n_kept, size), first = min(rank * each, n_kept);
    int end = min(first + each, n_kept);
    score_tokens(a, sh, r, n, first, end);
    publish_to_copies();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    __syncthreads();
    if ((int)threadIdx.x < size && (int)threadIdx.x != rank && end > first)
        send_bytes(threadIdx.x, r.token_keys + first * BLOCK_TOKENS,
                   (end - first) * BLOCK_TOKENS * 4, &sh->keys_arrived);
    if (threadIdx.x == 0) {
        barrier_expect(&sh->keys_arrived, (n_kept - (end - first)) * BLOCK_TOKENS * 4);
        if (size > 1)
            barrier_expect(&sh->sums_arrived, WARPS * PIECE * 4 + size * COLUMNS * 8);
    }
    if (HOT)
        h.head = hot::head_of<HALF_ROW>(hot_rows, seq, 0, 1, a.max_blocks, a.keep_tokens);
    barrier_wait(&sh->keys_arrived);
    int n_all = choose_tokens(a, sh, r, n_kept);
    h.first = n_all * rank / size;
    h.n = n_all * (rank + 1) / size - h.first;
    resolve<HOT>(sh, r, n_all, &h, hot_rows);
    state<COLUMNS> s;
    attend_share<HOT>(a, sh, r, h, &s, seq, rank, size, hot_rows);
    send_sums(a, sh, r, s, rank, size);
    finish(a, sh, a.out + (size_t)seq * a.heads * L, rank, size);
    if (size > 1)
        cluster_barrier();       /* what this block has sent was read here */
}

__global__ void __launch_bounds__(THREADS, 1) attend_two_level(two_level a)
{
    attend_sequence<false>(a, {});
}

__global__ void __launch_bounds__(THREADS, 1) attend_two_level_hot(two_level a,
                                                                   struct hot_rows hot)
{
    attend_sequence<true>(a, hot);
}
#endif

/* 0 where there is not enough. */
size_t shared_bytes(const two_level &a, int cluster, int rows_per_head)
{
    arrays r;
    size_t bytes = sizeof(shared) + lay_out(&r, NULL, a, cluster, rows_per_head);

    return bytes <= MOST_SHARED ? bytes : 0;
}

/* Room for two attributes. */
void configure(cudaLaunchConfig_t *config, cudaLaunchAttribute *attributes, int clusters,
               int cluster, size_t bytes)
{
    *config = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = cluster;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config->gridDim = dim3(clusters * cluster);
    config->blockDim = dim3(THREADS);
    config->dynamicSmemBytes = bytes;
    config->attrs = attributes;
    config->numAttrs = 2;
}

/* As many thread blocks a cluster as let all clusters run at the same time; 0 where there is not
 * enough shared memory.  With hot rows the same, for the same bits. */
int choose_cluster(struct stream *s, const two_level &a, int seqs)
{
    cluster_choice *known = &s->clusters;
    const cluster_choice wanted = { D, 0, seqs, a.max_blocks, a.keep_blocks, 0 };
    cudaLaunchConfig_t config;
    cudaLaunchAttribute attributes[2];

    if (known->size && known->dim == D && known->units == seqs &&
        known->max_blocks == a.max_blocks && known->keep_blocks == a.keep_blocks)
        return known->size;
    *known = wanted;
    for (int size = MAX_CLUSTER; size > 0; size /= 2) {
        size_t bytes = shared_bytes(a, size, 0);
        int fit = 0;
        if (bytes == 0)
            continue;
        stream_check(s, cudaFuncSetAttribute(attend_two_level,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             (int)bytes), "attend_two_level");
        configure(&config, attributes, seqs, size, bytes);
        stream_check(s, cudaOccupancyMaxActiveClusters(&fit, attend_two_level, &config),
                     "attend_two_level");
        if (fit >= seqs || size == 1)
            return known->size = size;
    }
    return 0;
}

/* Of scratch memory, in words: where what follows the keys begins, lists of kept blocks and then
 * the queries.  The operations one after the other need more (two_level_parts.cu). */
size_t after_keys(const struct attend_two_level_args *args)
{
    return ((size_t)args->seqs * args->max_blocks + 63) / 64 * 64;
}

queries *queries_of(const struct attend_two_level_args *args)
{
    return queries_behind(args->scratch, after_keys(args) +
                                         (size_t)args->seqs * args->keep_blocks);
}

/* Queue both kernels, the second with its arguments. */
template <typename... P>
void launch_both(struct stream *s, const two_level &a, const struct attend_two_level_args *args,
                 int cluster, size_t bytes, void (*kernel)(two_level, P...), P... p)
{
    struct block_filter_args filter = {};
    cudaLaunchConfig_t config;
    cudaLaunchAttribute attributes[2];

    filter.q = args->q;
    filter.q_stride = args->q_stride;
    filter.index = args->index;
    filter.table = args->index_table;
    filter.n_tokens = args->n_tokens;
    filter.shape = args->shape;
    filter.seqs = args->seqs;
    filter.heads = args->heads;
    filter.max_blocks = args->max_blocks;
    filter.sink_tokens = args->sink_tokens;
    filter.recent_tokens = args->recent_tokens;
    filter.max_n_tokens = args->max_n_tokens;
    queue_queries(s, queries_of(args), args->q, args->q_stride, args->heads, args->n_tokens,
                  args->seqs);
    queue_scores(s, &filter, a.made, (unsigned *)args->scratch);
    if (args->lagged)
        queue_lag_keys(s, args, (unsigned *)args->scratch,
                       (int32_t *)args->scratch + after_keys(args));
    stream_check(s, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         (int)bytes), "attend_two_level");
    configure(&config, attributes, args->seqs, cluster, bytes);
    config.stream = s->cu;
    stream_check(s, cudaLaunchKernelEx(&config, kernel, a, p...), "attend_two_level");
}

}

bool latent::queue_two_level(struct stream *s, const struct attend_two_level_args *args)
{
    const struct kv_shape *shape = &args->shape;
    const struct hot_rows *hot = args->hot;
    two_level a = {};

    if (!s->be->hopper)
        return false;
    a.out = (__nv_bfloat16 *)args->out;
    a.q = (const __nv_bfloat16 *)args->q;
    a.kv = (const __nv_bfloat16 *)args->kv;
    a.index = args->index;
    a.kv_table = args->kv_table;
    a.index_table = args->index_table;
    a.n_tokens = args->n_tokens;
    a.keys = (const unsigned *)args->scratch;
    a.made = queries_of(args);
    a.scale = index_layout(shape).scale;
    a.heads = args->heads;
    a.q_stride = args->q_stride;
    a.max_blocks = args->max_blocks;
    a.keep_blocks = args->keep_blocks;
    a.keep_tokens = args->keep_tokens;
    a.sink_tokens = args->sink_tokens;
    a.recent_tokens = args->recent_tokens;
    a.index_block_bytes = index_block_bytes(shape);
    a.softmax_scale = args->scale * LOG2_E;
    int cluster = choose_cluster(s, a, args->seqs);
    if (!cluster)                /* very large budgets */
        return false;
    size_t bytes = shared_bytes(a, cluster, hot ? hot->rows_per_head : 0);
    if (bytes == 0)
        return false;
    if (hot)
        launch_both(s, a, args, cluster, bytes, attend_two_level_hot, *hot);
    else
        launch_both(s, a, args, cluster, bytes, attend_two_level);
    return true;
}
