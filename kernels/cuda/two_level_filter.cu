/* The first level of two-level attention: a score for every block of a context.
 *
 * The best of a block's 64 tokens, each scored from the signs of its key:
 *   scale * sum_d (sign[d] ? x[d] : -x[d]),  x = R q,
 * the largest over the group's heads.  It reads (DIM / 8 + 2) bytes a token and KV head,
 * 14 MB a sequence of 98,304 tokens and 8 KV heads of 128: 3.1 us at 4.6 TB/s.  All warps
 * of the GPU share the blocks of all contexts evenly; each copies its next DEPTH records
 * to shared memory while it scores one.  With means (ITEMS of a block: its tokens, or its means)
 * it is half of the bytes, and twice as many records are on their way.
 *
 * With more than a few sequences time is the memory's: on an H100 it takes no longer than
 * copies without any score do, 2.5 TB/s of 3.1 with 8 sequences of 98,304 tokens.  Neither bulk
 * copies nor all KV heads of a block in one thread block make these faster.  A score is some 160
 * instructions a block.  Lost: a word a load instead of two, scales and heads that are asked
 * about token by token, and fewer than three thread blocks a multiprocessor (both kernels, 8
 * sequences of 98,304 tokens: 84 us with two instead of 72). */

#include "kernels/cuda/two_level.cuh"

namespace {

using namespace two;

enum { WARPS = 8, THREADS = WARPS * WARP };

/* Thread blocks a multiprocessor runs, by the registers that a tile of heads needs. */
template <int TILES>
constexpr int blocks_an_sm = TILES == 1 ? 3 : 2;

/* Scales and signs of a block, neighbours in its record. */
template <int DIM, int ITEMS>
constexpr int record_part = ITEMS * (2 + DIM / 8);

/* Records that a warp has on their way or in use. */
template <int ITEMS>
constexpr int depth = 4 * BLOCK_TOKENS / ITEMS;

/* Copies of a warp's records, in order, through a ring. */
struct source {
    const uint8_t *base;         /* of the KV head */
    const int32_t *table;        /* from this warp's first block on */
    int n, next_ids;             /* blocks; index ids of the turn after this one, a lane each */
    int ids;
};

__device__ __forceinline__ int ids_from(const source &s, int first)
{
    int i = first + (int)threadIdx.x % WARP;

    return i < s.n ? s.table[i] : 0;
}

/* Of the planes 16 bytes a lane at a time, of the scales 4. */
template <int DIM, int ITEMS>
__device__ __forceinline__ void start_record(source *s, unsigned index_block_bytes, unsigned to,
                                             int k)
{
    enum { SCALES = 2 * ITEMS, PLANE = ITEMS * DIM / 8, AT_ONCE = WARP * 16 };
    int lane = threadIdx.x % WARP;

    if (k < s->n) {
        if (k % WARP == 0 && k > 0) {
            s->ids = s->next_ids;
            s->next_ids = ids_from(*s, k + WARP);
        }
        unsigned id = (unsigned)__shfl_sync(0xffffffffu, s->ids, k % WARP);
        const uint8_t *from = s->base + (size_t)id * index_block_bytes;
        if (lane < SCALES / 4)
            copy_4(to + lane * 4, from + lane * 4);
        to += SCALES + lane * 16;
        from += SCALES + lane * 16;
#pragma unroll
        for (int i = 0; i < PLANE; i += AT_ONCE)
            if (lane < (PLANE - i) / 16)
                copy_16(to + i, from + i);
    }
    copy_commit();               /* one group a record, empty or not, for copy_wait() */
}

/* As many as fit the ring but one. */
template <int DIM, int ITEMS>
__device__ __forceinline__ void start_first(source *s, unsigned index_block_bytes, unsigned slots)
{
#pragma unroll 1
    for (int k = 0; k < depth<ITEMS> - 1; k++)
        start_record<DIM, ITEMS>(s, index_block_bytes, slots + k * record_part<DIM, ITEMS>, k);
}

/* The key of a record's block; in a PARTIAL one the tokens from `left` on are not there. */
template <int DIM, int TILES, int ITEMS, bool PARTIAL>
__device__ __forceinline__ unsigned score_record(unsigned record, int left,
                                                 const query_side<DIM, TILES> &q)
{
    unsigned word[ITEMS / TILE][DIM / 64];
    float best[TILES];

    load_plane<DIM, ITEMS>(word, record + 2 * ITEMS);
#pragma unroll
    for (int tile = 0; tile < ITEMS / TILE; tile++) {
        float2 scale = scales_at(record, tile);
        float sum[TILES][2];
        sum_bits<DIM, TILES>(sum, word[tile], q);
        int token = tile * TILE + threadIdx.x % WARP / 4 * 2;
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            float x = sum[t][0] * scale.x, y = sum[t][1] * scale.y;
            if (PARTIAL) {
                x = token < left ? x : -INFINITY;
                y = token + 1 < left ? y : -INFINITY;
            }
            best[t] = tile == 0 ? fmaxf(x, y) : fmaxf(best[t], fmaxf(x, y));
        }
    }
    float score = best[0] * q.unit[0];
#pragma unroll
    for (int t = 1; t < TILES; t++)
        score = fmaxf(score, best[t] * q.unit[t]);
    return __reduce_max_sync(0xffffffffu, key_of(score));
}

/* Keys of up to WARP blocks, the last of them `k`, from their lanes. */
template <enum filter_kind FILTER>
__device__ __noinline__ void store_keys(const two_level &a, unsigned *keys, unsigned own,
                                        int first, int k, int n_tokens)
{
    int block = k / WARP * WARP + threadIdx.x % WARP;

    if (block <= k)
        keys[block] = filter_must_keep(FILTER, first + block, n_tokens, a.sink_tokens,
                                       a.recent_tokens) ? (unsigned)FORCED_KEY : own;
}

/* Grid: parts of a context, KV heads, sequences. */
template <int DIM, int TILES, int ITEMS>
__global__ void __launch_bounds__(THREADS, blocks_an_sm<TILES>) score_blocks(two_level a)
{
    enum { DEPTH = depth<ITEMS>, PART = record_part<DIM, ITEMS> };
    constexpr bool MEANS = ITEMS == BLOCK_MEANS;
    __shared__ queries<DIM> sh;
    __shared__ __align__(128) unsigned char ring[WARPS][DEPTH][PART];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int kv_head = blockIdx.y, seq = blockIdx.z;

    /* Lengths and tables come from the host, and of the index this step writes only each
     * context's last block: all else is read while the kernel before this one ends. */
    int n_tokens = a.n_tokens[seq], n_blocks = (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    int parts = gridDim.x * WARPS, part = blockIdx.x * WARPS + warp;
    int first = (int)((int64_t)n_blocks * part / parts);
    source s = { a.index + (size_t)kv_head * a.record_bytes + a.scale,
                 a.index_table + (size_t)seq * a.max_blocks + first,
                 (int)((int64_t)n_blocks * (part + 1) / parts) - first, 0, 0 };
    bool has_last = first + s.n == n_blocks;
    unsigned slots = shared_address(ring[warp]);
    s.ids = ids_from(s, 0);
    s.next_ids = ids_from(s, WARP);
    if (!has_last)
        start_first<DIM, ITEMS>(&s, a.index_block_bytes, slots);
    wait_for_inputs();
    /* After that wait, so that the next kernel may read the queries without its own. */
    let_next_start();
    if (n_tokens == 0)
        return;
    if (has_last)
        start_first<DIM, ITEMS>(&s, a.index_block_bytes, slots);
    load_digits<DIM, TILES>(&sh, a.q + (size_t)seq * a.q_stride + kv_head * a.group * DIM,
                            a.group);
    __syncthreads();
    query_side<DIM, TILES> q;
    load_query_side<DIM, TILES>(&q, &sh);
    unsigned *keys = a.keys + ((size_t)seq * a.kv_heads + kv_head) * a.max_blocks + first;
    unsigned own = 0;            /* key of block k / WARP * WARP + lane */
    int n_whole = min(s.n, n_tokens / BLOCK_TOKENS - first); /* all but the context's last */
    unsigned at = slots, free = slots + (DEPTH - 1) * PART;
#pragma unroll 1
    for (int k = 0; k < s.n; k++) {
        start_record<DIM, ITEMS>(&s, a.index_block_bytes, free, k + DEPTH - 1);
        copy_wait<DEPTH - 1>();
        __syncwarp();
        /* What lies in the place of the means of a block that is not full does not matter. */
        unsigned key = MEANS || k < n_whole
                           ? score_record<DIM, TILES, ITEMS, false>(at, 0, q)
                           : score_record<DIM, TILES, ITEMS, true>(at, n_tokens % BLOCK_TOKENS, q);
        own = lane == k % WARP ? key : own;
        if (k % WARP == WARP - 1 || k == s.n - 1)
            store_keys<MEANS ? FILTER_MEANS : FILTER_COARSE>(a, keys, own, first, k, n_tokens);
        free = at;
        at = at == slots + (DEPTH - 1) * PART ? slots : at + PART;
    }
}

template <int DIM, int TILES, int ITEMS>
void launch(struct stream *s, const two_level &a, int max_n_tokens)
{
    int units = a.kv_heads * a.seqs, n_blocks = (max_n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    int most = (n_blocks + WARPS - 1) / WARPS;
    int parts = blocks_an_sm<TILES> * s->be->info.sm_count / units;

    parts = parts < most ? parts : most;
    /* As the next kernel has it, so that a multiprocessor can run both. */
    stream_check(s, cudaFuncSetAttribute(score_blocks<DIM, TILES, ITEMS>,
                                         cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared), "attend_two_level");
    launch_early(s, "attend_two_level", score_blocks<DIM, TILES, ITEMS>,
                 dim3(parts > 0 ? parts : 1, a.kv_heads, a.seqs), THREADS, 0, a);
}

template <int DIM, int ITEMS>
void launch_heads(struct stream *s, const two_level &a, int max_n_tokens)
{
    if (a.group <= 4)
        launch<DIM, 1, ITEMS>(s, a, max_n_tokens);
    else
        launch<DIM, 2, ITEMS>(s, a, max_n_tokens);
}

}

void two::queue_filter(struct stream *s, two_level a, const struct kv_shape *shape,
                       int max_n_tokens)
{
    bool means = shape->filter == FILTER_MEANS;

    if (means)
        a.scale = index_layout(shape).mean_scale;
    if (shape->head_dim == 128)
        means ? launch_heads<128, BLOCK_MEANS>(s, a, max_n_tokens)
              : launch_heads<128, BLOCK_TOKENS>(s, a, max_n_tokens);
    else
        means ? launch_heads<64, BLOCK_MEANS>(s, a, max_n_tokens)
              : launch_heads<64, BLOCK_TOKENS>(s, a, max_n_tokens);
}
