/* Scores of latent rows: of every block of a context, which is the first level, and as an
 * operation of its own of the tokens of kept blocks.
 *
 * The coarse filter reads 76 bytes a token, 7.5 MB a sequence of 98,304: 1.6 us at 4.6 TB/s.  All
 * warps share the blocks of all contexts evenly; each copies its next record to shared memory
 * while it scores one.  With 12 warps and all 64 tokens of a block at a time 8 sequences of 131,072
 * tokens took 24 us more than copies without a score (H100): some 1,200 instructions a block, a
 * fifth of them products, which wait for each other.  16 warps with half as many tokens, as now,
 * are no more than 1 us ahead of that at 98,304 (H200).  With means (ITEMS of a block: its tokens,
 * or its means) it is half of the bytes. */

#include "kernels/cuda/latent_scores.cuh"

namespace {

using namespace latent;

enum { MOST_WARPS = 16, ROW_TILES = 2, SCORE_WARPS = 4 };

/* Records that a warp has on their way or in use. */
template <int ITEMS>
constexpr int depth = 2 * BLOCK_TOKENS / ITEMS;

struct filter {
    const __nv_bfloat16 *q;
    const queries *made;         /* [seqs] of q */
    const uint8_t *index;
    const int32_t *table, *n_tokens;
    unsigned *keys;              /* [seqs, max_blocks] */
    struct index_layout layout;
    int q_stride, heads, max_blocks, sink_tokens, recent_tokens;
    size_t block_bytes;
};

/* A warp a head; of a head that there is not, a copy of the first, which changes no maximum.
 * Grid: tiles of heads, sequences. */
__global__ void __launch_bounds__(8 * WARP) make_queries(queries *made, const __nv_bfloat16 *q,
                                                         int q_stride, int heads,
                                                         const int32_t *n_tokens)
{
    int seq = blockIdx.y, head = blockIdx.x * 8 + threadIdx.x / WARP;
    bool padding = n_tokens[seq] == 0;

    let_next_start();
    wait_for_inputs();
    if (padding)
        return;
    q += (size_t)seq * q_stride + (size_t)(head < heads ? head : 0) * D;
    make_part<L>(&made[seq], q, head, 0);
    make_part<P>(&made[seq], q, head, 1);
}

template <int ITEMS>
struct memory {
    operands q;
    __align__(16) unsigned char ring[MOST_WARPS][depth<ITEMS>][ITEMS * ITEM_BYTES];
};

/* A thread block has fewer warps where it cannot have all of it: 15 of compute capability 8.0. */
template <int ITEMS>
int warps_within(size_t bytes)
{
    size_t warps = (bytes - offsetof(memory<ITEMS>, ring)) / sizeof memory<ITEMS>{}.ring[0];

    return warps < MOST_WARPS ? (int)warps : (int)MOST_WARPS;
}

/* Of the index block `id`, where there is one, by a warp. */
template <int ITEMS>
__device__ __forceinline__ void start_record(const filter &a, int id, unsigned to, bool there)
{
    enum { COPIES = ITEMS * ITEM_BYTES / 16 };
    int lane = threadIdx.x % WARP;

    if (there) {
        const uint8_t *from = a.index + (size_t)id * a.block_bytes + lane * 16 +
                              (ITEMS == BLOCK_MEANS ? a.layout.mean_scale : a.layout.scale);
        to += lane * 16;
#pragma unroll
        for (int i = 0; i < COPIES; i += WARP)
            if (i + WARP <= COPIES || lane < COPIES % WARP)
                copy_16(to + i * 16, from + i * 16);
    }
    copy_commit();               /* one group a record, empty or not, for copy_wait() */
}

/* The key of the best of a block's tokens or means; those from `left` on are not there. */
template <int ITEMS>
__device__ __forceinline__ unsigned score_record(unsigned record, int left, const operands *q)
{
    float top = -INFINITY;

#pragma unroll 1
    for (int first = 0; first < ITEMS; first += 16 * ROW_TILES) {
        float best[2 * ROW_TILES];
        score_rows<ROW_TILES, false, ITEMS>(best, record, first, q);
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++)
            top = fmaxf(top, first + 8 * i + (int)threadIdx.x % WARP / 4 < left ? best[i]
                                                                               : -INFINITY);
    }
    return __reduce_max_sync(0xffffffffu, key_of(top));
}

/* Grid: parts of a context, sequences. */
template <int ITEMS>
__global__ void __launch_bounds__(MOST_WARPS * WARP, 1) score_blocks(filter a)
{
    enum { DEPTH = depth<ITEMS>, RECORD = ITEMS * ITEM_BYTES };
    constexpr bool MEANS = ITEMS == BLOCK_MEANS;
    extern __shared__ __align__(128) unsigned char shared[];
    memory<ITEMS> *m = (memory<ITEMS> *)shared;
    int warp = threadIdx.x / WARP, seq = blockIdx.y;

    /* Lengths and tables come from the host, and of the index this step writes only each
     * context's last block: all else is read while the kernel before this one ends. */
    int n_tokens = a.n_tokens[seq], n_blocks = (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    int warps = blockDim.x / WARP, parts = gridDim.x * warps, part = blockIdx.x * warps + warp;
    int first = (int)((int64_t)n_blocks * part / parts);
    int n = (int)((int64_t)n_blocks * (part + 1) / parts) - first;
    const int32_t *table = a.table + (size_t)seq * a.max_blocks + first;
    unsigned ring = shared_address(m->ring[warp]);
    bool has_last = first + n == n_blocks;
    auto id_of = [&](int k) { return k < n ? table[k] : 0; };
    if (!has_last)
#pragma unroll 1
        for (int k = 0; k < DEPTH - 1; k++)
            start_record<ITEMS>(a, id_of(k), ring + k * RECORD, k < n);
    wait_for_inputs();
    /* After that wait, so that the next kernel may read the queries without its own. */
    let_next_start();
    if (n_tokens == 0)
        return;
    start_operands<false>(&m->q, a.made + seq);
    if (has_last)                /* the queries are part of the first record's group */
#pragma unroll 1
        for (int k = 0; k < DEPTH - 1; k++)
            start_record<ITEMS>(a, id_of(k), ring + k * RECORD, k < n);
    copy_commit();
    int next_id = id_of(DEPTH - 1);  /* is there before it is wanted */
    copy_wait<0>();
    __syncthreads();
    unsigned at = ring, free = ring + (DEPTH - 1) * RECORD;
    unsigned *keys = a.keys + (size_t)seq * a.max_blocks + first;
#pragma unroll 1
    for (int k = 0; k < n; k++) {
        start_record<ITEMS>(a, next_id, free, k + DEPTH - 1 < n);
        next_id = id_of(k + DEPTH);
        copy_wait<DEPTH - 1>();
        __syncwarp();            /* the record is there */
        /* What lies in the place of the means of a block that is not full does not matter. */
        int left = MEANS ? (int)BLOCK_MEANS : n_tokens - (first + k) * BLOCK_TOKENS;
        unsigned key = score_record<ITEMS>(at, left, &m->q);
        if (threadIdx.x % WARP == 0)
            keys[k] = filter_must_keep(MEANS ? FILTER_MEANS : FILTER_COARSE, first + k, n_tokens,
                                       a.sink_tokens, a.recent_tokens)
                          ? (unsigned)FORCED_KEY : key;
        __syncwarp();            /* all have read it: another takes its place next */
        free = at;
        at = at == ring + (DEPTH - 1) * RECORD ? ring : at + RECORD;
    }
}

/* Bounds: a warp a block of the context. */
__global__ void __launch_bounds__(SCORE_WARPS * WARP) score_bounds(filter a)
{
    extern __shared__ __align__(16) float x[]; /* [heads, D] */
    int lane = threadIdx.x % WARP, block = blockIdx.x * SCORE_WARPS + threadIdx.x / WARP;
    int seq = blockIdx.y, n = a.n_tokens[seq];

    wait_for_inputs();
    let_next_start();
    if (blockIdx.x * SCORE_WARPS * BLOCK_TOKENS >= n)
        return;
    for (int i = threadIdx.x; i < a.heads * D; i += blockDim.x)
        x[i] = __bfloat162float(a.q[(size_t)seq * a.q_stride + i]);
    __syncthreads();
    if (block * BLOCK_TOKENS >= n)
        return;
    const uint8_t *record = a.index + (size_t)a.table[(size_t)seq * a.max_blocks + block] *
                                          a.block_bytes;
    const __nv_bfloat16 *low = (const __nv_bfloat16 *)(record + a.layout.lo);
    const __nv_bfloat16 *high = (const __nv_bfloat16 *)(record + a.layout.hi);
    float lo[D / WARP], hi[D / WARP], best = -INFINITY;
    for (int i = 0; i < D / WARP; i++) {
        lo[i] = __bfloat162float(low[lane + WARP * i]);
        hi[i] = __bfloat162float(high[lane + WARP * i]);
    }
    for (int h = 0; h < a.heads; h++) {
        float sum = 0;
        for (int i = 0; i < D / WARP; i++) {
            float v = x[h * D + lane + WARP * i];
            sum += fmaxf(v * lo[i], v * hi[i]);
        }
        best = fmaxf(best, warp_sum(sum));
    }
    if (lane == 0)
        a.keys[(size_t)seq * a.max_blocks + block] =
            always_kept(block, n, a.sink_tokens, a.recent_tokens) ? (unsigned)FORCED_KEY
                                                                  : key_of(best);
}

/* Start copying those of a sequence to shared memory; commit, and wait, and synchronise before they
 * are read. */
__device__ __forceinline__ void start_queries(queries *to, const queries *from)
{
    static_assert(sizeof *to % 16 == 0, "whole pieces");
    for (int i = threadIdx.x; i < (int)sizeof *to / 16; i += blockDim.x)
        copy_16(shared_address(to) + i * 16, (const char *)from + i * 16);
}

/* Tokens of kept blocks: a thread block a block, a thread a token. */
__global__ void __launch_bounds__(BLOCK_TOKENS) score_kept(filter a, const int32_t *kept,
                                                           const int32_t *n_kept, int keep_blocks)
{
    extern __shared__ __align__(128) unsigned char shared[];
    queries *q = (queries *)shared;
    int seq = blockIdx.y, n = a.n_tokens[seq], token = threadIdx.x;

    wait_for_inputs();
    let_next_start();
    if (n == 0 || (int)blockIdx.x >= n_kept[seq])
        return;
    start_queries(q, a.made + seq);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    int block = kept[(size_t)seq * keep_blocks + blockIdx.x];
    const uint8_t *record = a.index + (size_t)a.table[(size_t)seq * a.max_blocks + block] *
                                          a.block_bytes;
    const uint8_t *sign = record + a.layout.sign + token * TOKEN_BYTES;
    const uint8_t *large = record + a.layout.large + token * TOKEN_BYTES;
    const __nv_bfloat16 *scale = (const __nv_bfloat16 *)(record + a.layout.scale) + 2 * token;
    float best = -INFINITY;
    for (int h = 0; h < a.heads; h++) {
        int sum[2] = { 0, 0 };
        for (int d = 0; d < D; d++) {
            int v = *digit_at(q, h, d) * (1 << d % 4) * (large[d / 8] >> d % 8 & 1 ? 3 : 1);
            sum[d >= L] += sign[d / 8] >> d % 8 & 1 ? v : -v;
        }
        best = fmaxf(best, __bfloat162float(scale[0]) * q->unit[0][h] * 0.5f * (float)sum[0] +
                           __bfloat162float(scale[1]) * q->unit[1][h] * 0.5f * (float)sum[1]);
    }
    int position = block * BLOCK_TOKENS + token;
    a.keys[((size_t)seq * keep_blocks + blockIdx.x) * BLOCK_TOKENS + token] =
        position >= n ? 0
        : always_chosen(position, n, a.sink_tokens, a.recent_tokens) ? (unsigned)FORCED_KEY
                                                                     : key_of(best);
}

filter filter_of(const struct kv_shape *shape, const void *q, int q_stride, int heads,
                 const uint8_t *index, const int32_t *table, const int32_t *n_tokens,
                 int max_blocks)
{
    filter a = {};

    a.q = (const __nv_bfloat16 *)q;
    a.q_stride = q_stride;
    a.heads = heads;
    a.index = index;
    a.table = table;
    a.n_tokens = n_tokens;
    a.max_blocks = max_blocks;
    a.layout = index_layout(shape);
    a.block_bytes = index_block_bytes(shape);
    return a;
}

}

size_t latent::queries_bytes(int max_seqs)
{
    return (size_t)max_seqs * sizeof(queries);
}

void latent::queue_queries(struct stream *s, queries *made, const void *q, int q_stride, int heads,
                           const int32_t *n_tokens, int seqs)
{
    launch_early(s, "block_filter", make_queries, dim3(MOST_HEADS / 8, seqs), 8 * WARP, 0, made,
                 (const __nv_bfloat16 *)q, q_stride, heads, n_tokens);
}

template <int ITEMS>
static void launch_blocks(struct stream *s, const filter &a, int parts, int seqs)
{
    int warps = warps_within<ITEMS>(s->be->most_shared);

    launch_early(s, "block_filter", score_blocks<ITEMS>, dim3(parts, seqs), warps * WARP,
                 offsetof(memory<ITEMS>, ring) + warps * sizeof(memory<ITEMS>{}.ring[0]), a);
}

void latent::queue_scores(struct stream *s, const struct block_filter_args *args,
                          const queries *made, unsigned *keys)
{
    filter a = filter_of(&args->shape, args->q, args->q_stride, args->heads, args->index,
                         args->table, args->n_tokens, args->max_blocks);
    int blocks = (args->max_n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;

    a.keys = keys;
    a.sink_tokens = args->sink_tokens;
    a.recent_tokens = args->recent_tokens;
    if (blocks == 0)
        return;
    if (args->shape.filter == FILTER_BOUNDS) {
        launch_early(s, "block_filter", score_bounds,
                     dim3((blocks + SCORE_WARPS - 1) / SCORE_WARPS, args->seqs),
                     SCORE_WARPS * WARP, (size_t)args->heads * D * sizeof(float), a);
        return;
    }
    a.made = made;
    int parts = s->be->info.sm_count / args->seqs;
    parts = parts < 1 ? 1 : parts < blocks ? parts : blocks;
    if (args->shape.filter == FILTER_MEANS)
        launch_blocks<BLOCK_MEANS>(s, a, parts, args->seqs);
    else
        launch_blocks<BLOCK_TOKENS>(s, a, parts, args->seqs);
}

void latent::queue_kept_scores(struct stream *s, const struct token_select_args *args,
                               const queries *made, unsigned *keys)
{
    filter a = filter_of(&args->shape, args->q, args->q_stride, args->heads, args->index,
                         args->table, args->n_tokens, args->max_blocks);

    a.keys = keys;
    a.sink_tokens = args->sink_tokens;
    a.recent_tokens = args->recent_tokens;
    a.made = made;
    launch_early(s, "token_select", score_kept, dim3(args->keep_blocks, args->seqs), BLOCK_TOKENS,
                 sizeof(queries), a, args->kept, args->n_kept, args->keep_blocks);
}
