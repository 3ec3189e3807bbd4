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
 * At batch 1 all of this is latency.  Measured on an H200 behind the filter of 98,304 tokens, us:
 * choosing blocks 3.6, scoring 4.7, exchange 0.7, choosing tokens 4.3, attention 7.3, sums 4.4.
 * With 512 threads full attention with the same code is 7 % slower.  Clusters of 16, with two warps
 * to a record, lose: at 98,304 tokens and batch 1, 4 and 8 the operator takes 42.5, 60.4, 79.5 us
 * with them, and 40.2, 55.8, 74.2 with these (H100).
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
    HALF_ROW = D / 2,            /* hot_rows.cuh's DIM, which has rows of K and V */
    PIECE_STRIDE = SLICE + 4,    /* floats of a head's sums of a warp and a gap */
};

/* Tiles on their way or in use: the usual budget's share of a thread block at once.  Hot rows take
 * the room of one. */
template <bool HOT>
constexpr int depth = HOT ? 3 : 4;

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
        operands scores;
        work<COLUMNS> attend;
    };
    float2 all[MAX_CLUSTER][COLUMNS]; /* maximum and sum of each block's tokens */
    float part[MAX_CLUSTER][COLUMNS]; /* the factor of each block's sums in the result */
    uint64_t keys_arrived, sums_arrived;  /* barriers of what others send */
    counts count;
};

/* The arrays behind it. */
struct arrays : block_lists {      /* keys and tables of these: stage 1 */
    float *acc;                    /* [size - 1, WARPS / size, piece] of what this block finishes
                                      the others' sums, the next rank's first */
    unsigned *token_keys;          /* [keep_blocks, BLOCK_TOKENS] */
    unsigned *all;                 /* [keep_tokens] chosen: numbers of keys, then rows of kv or,
                                      with hot rows, places */
    unsigned *seen;                /* with hot rows: bits of rows that this step uses; */
    int *missing;                  /* of this block's share; */
    uint16_t *into;                /* the row that a missing one gets */
    unsigned char *tiles;          /* [DEPTH] of stage 3, and what is needed before: */
    unsigned char *records_ahead;  /* [WARPS] records  stage 2 */
};

/* Floats of a warp's sums. */
__host__ __device__ inline int piece_of(const two_level &a)
{
    return a.heads * PIECE_STRIDE;
}

/* Where they lie from base on; the bytes taken.  rows_per_head: of hot rows. */
template <bool HOT>
__host__ __device__ inline size_t lay_out(arrays *r, unsigned char *base, const two_level &a,
                                          int size, int rows_per_head)
{
    int slots = round_up(a.keep_blocks, 4), blocks = round_up(a.max_blocks, 4);
    int tokens = round_up(a.keep_tokens, 4), own = round_up(share_of(a.keep_tokens, size), 8);

    r->acc = (float *)base;
    r->kept = (int *)(r->acc + (WARPS - WARPS / size) * piece_of(a));
    r->records = r->kept + slots;
    r->blocks = r->records + slots;
    r->token_keys = (unsigned *)(r->blocks + slots);
    r->all = r->token_keys + slots * BLOCK_TOKENS;
    r->seen = r->all + tokens;
    r->missing = (int *)(r->seen + (HOT ? round_up(hot::words_of(rows_per_head), 4) : 0));
    r->into = (uint16_t *)(r->missing + (HOT ? own : 0));
    size_t at = (unsigned char *)(r->into + (HOT ? own : 0)) - base;
    at = (at + 127) / 128 * 128;
    r->tiles = base + at;
    r->block_keys = (unsigned *)r->tiles;
    r->ids = (int *)(r->block_keys + blocks);
    r->kv_ids = r->ids + blocks;
    r->records_ahead = r->tiles;
    size_t stage1 = 12 * (size_t)blocks, stage2 = (size_t)WARPS * SELECT_BYTES;
    size_t stage3 = (size_t)depth<HOT> * TILE_BYTES;
    size_t sums = sizeof(float) * WARPS * piece_of(a);
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

/* What does not come from the filter: queries, barriers, block ids.  Wait for the copies before
 * these are read. */
__device__ __forceinline__ void prepare(const two_level &a, shared *sh, const arrays &r, int seq,
                                        int n_blocks)
{
    start_tables<THREADS>(r, a.index_table + (size_t)seq * a.max_blocks,
                          a.kv_table + (size_t)seq * a.max_blocks, n_blocks);
    start_operands<true>(&sh->scores, a.made + seq);
    copy_commit();
    clear_bins(&sh->count);
    if (threadIdx.x == 0) {
        sh->count.largest = 0;
        barrier_init(&sh->keys_arrived);
        barrier_init(&sh->sums_arrived);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
}

/* ---- stage 2 */

/* Keys of the tokens of a record in shared memory, by a warp. */
__device__ __forceinline__ void score_record(const two_level &a, unsigned *keys, unsigned record,
                                             int position, int n, const operands *q)
{
    enum { ROW_TILES = BLOCK_TOKENS / 16 };
    int lane = threadIdx.x % WARP;
    float best[2 * ROW_TILES];

    score_rows<ROW_TILES, true, BLOCK_TOKENS>(best, record, 0, q);
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
        int at = 8 * i + lane / 4;
        best[i] = fmaxf(best[i], __shfl_xor_sync(0xffffffffu, best[i], 1));
        best[i] = fmaxf(best[i], __shfl_xor_sync(0xffffffffu, best[i], 2));
        bool forced = always_chosen(position + at, n, a.sink_tokens, a.recent_tokens);
        if (lane % 4 == 0)
            keys[at] = position + at >= n ? 0 : forced ? (unsigned)FORCED_KEY : key_of(best[i]);
    }
}

/* This block's tokens: those of kept blocks [first, end), a record a warp. */
__device__ __forceinline__ void score_tokens(const two_level &a, const shared *sh,
                                             const arrays &r, int n, int first, int end)
{
    enum { COPIES = SELECT_BYTES / 16 };
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    unsigned record = shared_address(r.records_ahead) + warp * SELECT_BYTES;

#pragma unroll 1
    for (int k = first + warp; k < end; k += WARPS) {
        const uint8_t *from = a.index + (size_t)r.records[k] * a.index_block_bytes + a.scale;
#pragma unroll 5
        for (int i = lane; i < COPIES; i += WARP)
            copy_16(record + i * 16, from + i * 16);
        copy_commit();
        copy_wait<0>();
        __syncwarp();
        score_record(a, r.token_keys + k * BLOCK_TOKENS, record, r.kept[k] * BLOCK_TOKENS, n,
                     &sh->scores);
        __syncwarp();            /* it has been read: another takes its place next */
    }
    __syncthreads();
}

/* All chosen tokens as numbers of keys, ascending, to r.all; how many. */
__device__ __forceinline__ int choose_tokens(const two_level &a, shared *sh, const arrays &r,
                                             int n_kept)
{
    int n_keys = n_kept * BLOCK_TOKENS;
    border b = find_token_border(r.token_keys, n_keys, a.keep_tokens, &sh->count);
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
    enum { DEPTH = depth<HOT> };
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
        wait_for_tile<DEPTH>(tile);
        __syncthreads();
        if (waits) {
            stalled_ns += hot::now_ns() - from_ns;
            keep_rows(r.tiles + tile % DEPTH * TILE_BYTES, list + from, r.into + from, n, h.head);
        }
    };

    for (int i = 0; i < DEPTH; i++)
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
    int to = warp / each, slot = (rank - to - 1 + size) % size * each + warp % each;
    float *piece = (float *)r.tiles + warp * piece_of(a);

    publish_sums<COLUMNS>(&s, &sh->attend, a.softmax_scale);
    each_value<COLUMNS>(s, [&](int channel, int head, float v) {
        if (head < a.heads)
            piece[head * PIECE_STRIDE + channel % SLICE] = v;
    });
    publish_to_copies();
    __syncthreads();
    if (to != rank && threadIdx.x % WARP == 0)
        send_to(to, r.acc + slot * piece_of(a), piece, piece_of(a) * sizeof(float),
                &sh->sums_arrived);
    for (int i = threadIdx.x; i < size * COLUMNS; i += THREADS) {
        int head = i % COLUMNS;
        float2 sums = make_float2(sh->attend.shrink[head], sh->attend.sum[head]);
        if (i / COLUMNS != rank)
            send_2(i / COLUMNS, &sh->all[rank][head], sums, &sh->sums_arrived);
        else
            sh->all[rank][head] = sums;
    }
}

/* This block's channels of the result, when all sums have arrived. */
__device__ __forceinline__ void finish(const two_level &a, shared *sh, const arrays &r,
                                       __nv_bfloat16 *out, int rank, int size)
{
    enum { QUADS = SLICE / 4 };  /* of channels in a piece */
    int each = WARPS / size, step = each * piece_of(a);
    const float *own = (const float *)r.tiles + rank * step;

    __syncthreads();             /* this block's */
    if (size > 1)
        barrier_wait(&sh->sums_arrived);
    if ((int)threadIdx.x < a.heads) {
        int head = threadIdx.x;
        float top = -INFINITY, total = 0;
        for (int from = 0; from < size; from++)
            top = fmaxf(top, sh->all[from][head].x);
        for (int from = 0; from < size; from++)
            total += sh->all[from][head].y * exp2_fast(sh->all[from][head].x - top);
        for (int from = 0; from < size; from++) /* 0 of a block without tokens */
            sh->part[from][head] = exp2_fast(sh->all[from][head].x - top) / total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < a.heads * each * QUADS; i += THREADS) {
        int quad = i % QUADS, piece = i / QUADS % each, head = i / QUADS / each;
        int at = piece * piece_of(a) + head * PIECE_STRIDE + 4 * quad;
        float4 value = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int k = 0; k < size; k++) { /* ranks from this one on: an order of its own */
            int from = (rank + k) % size;
            float4 v = *(const float4 *)((k == 0 ? own : r.acc + (k - 1) * step) + at);
            float f = sh->part[from][head];
            value.x += v.x * f;
            value.y += v.y * f;
            value.z += v.z * f;
            value.w += v.w * f;
        }
        *(uint2 *)(out + head * L + (rank * each + piece) * SLICE + 4 * quad) =
            make_uint2(pack_bf16(value.x, value.y), pack_bf16(value.z, value.w));
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
    lay_out<HOT>(&r, (unsigned char *)(sh + 1), a, size, hot_rows.rows_per_head);
    prepare(a, sh, r, seq, n_blocks);
    /* Nothing may be sent to a block whose barriers are not there: arrive here, wait before the
     * first is. */
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    wait_for_inputs();
    copy_wait<0>();
    int n_kept = choose_kept<THREADS>(r, a.keys + (size_t)seq * a.max_blocks, n_blocks,
                                      a.keep_blocks, &sh->count);
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
            barrier_expect(&sh->sums_arrived, (WARPS - WARPS / size) * piece_of(a) * 4 +
                                              (size - 1) * COLUMNS * 8);
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
    finish(a, sh, r, a.out + (size_t)seq * a.heads * L, rank, size);
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
template <bool HOT>
size_t shared_bytes(const two_level &a, int cluster, int rows_per_head)
{
    arrays r;
    size_t bytes = sizeof(shared) + lay_out<HOT>(&r, NULL, a, cluster, rows_per_head);

    return bytes <= MOST_SHARED ? bytes : 0;
}

/* As many thread blocks a cluster as let all clusters run at the same time; 0 where there is not
 * enough shared memory.  With hot rows the same, for the same bits. */
int choose_cluster(struct stream *s, const two_level &a, int seqs)
{
    cluster_choice *known = &s->clusters;
    const cluster_choice wanted = { D, 0, seqs, a.max_blocks, a.keep_blocks, 0 };
    struct cluster_launch launch;

    if (known->size && known->dim == D && known->units == seqs &&
        known->max_blocks == a.max_blocks && known->keep_blocks == a.keep_blocks)
        return known->size;
    *known = wanted;
    for (int size = MAX_CLUSTER; size > 0; size /= 2) {
        size_t bytes = shared_bytes<false>(a, size, 0);
        int fit = 0;
        if (bytes == 0)
            continue;
        stream_check(s, cudaFuncSetAttribute(attend_two_level,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             (int)bytes), "attend_two_level");
        configure_clusters(&launch, seqs, size, THREADS, bytes);
        stream_check(s, cudaOccupancyMaxActiveClusters(&fit, attend_two_level, &launch.config),
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
    struct cluster_launch launch;

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
    configure_clusters(&launch, args->seqs, cluster, THREADS, bytes);
    launch.config.stream = s->cu;
    stream_check(s, cudaLaunchKernelEx(&launch.config, kernel, a, p...), "attend_two_level");
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
    size_t bytes = hot ? shared_bytes<true>(a, cluster, hot->rows_per_head)
                       : shared_bytes<false>(a, cluster, 0);
    if (bytes == 0)
        return false;
    if (hot)
        launch_both(s, a, args, cluster, bytes, attend_two_level_hot, *hot);
    else
        launch_both(s, a, args, cluster, bytes, attend_two_level);
    return true;
}
