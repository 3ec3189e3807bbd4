/* Attention to latent rows as an operation of its own: of one row of a sequence, or many, to a
 * whole context, and to chosen rows.
 *
 * One row: a thread block has all heads and a chunk of the context; a second kernel joins the
 * chunks' parts.  How many there are depends on a sequence's own length and nothing else: of a
 * long one as many as an H100 has multiprocessors, so that all of these have as much to do whatever
 * the number of sequences.  Memory is read once, and what a tile computes takes less than half of
 * the time that its bytes take.  There is room for one thread block on a multiprocessor, which
 * goes from chunk to chunk with its ring of tiles always full: the next chunk's first tiles are on
 * their way while the last ones of this chunk are attended to and its part is written.
 *
 * Many rows: the heads of as many rows as make 64 columns attend to all that the last of them
 * sees, in the absorbed form.  The plain form needs half of the products but keys and values of
 * every token of the context in 20 times its memory, made anew for every chunk of a prompt. */

#include "kernels/cuda/latent_tile.cuh"

namespace {

using namespace latent;

enum {
    MOST_CHUNKS = 132,
    LEAST_TOKENS = 256,          /* of a chunk */
    PART = L + 4,                /* floats: maximum, sum, two words of nothing, values */
    DECODE_COLUMNS = MOST_HEADS,
    JOIN_GROUPS = 4,             /* chunks that are read at a time */
    JOIN_THREADS = L / 4,        /* of a group */
};

struct arguments {
    __nv_bfloat16 *out;
    const __nv_bfloat16 *q, *kv;
    const int32_t *table, *n_tokens, *first_row, *n_rows;
    const int32_t *chosen, *n_chosen;    /* of attend_selected */
    const __nv_bfloat16 *const *rows;    /* [seqs, keep_tokens], or NULL */
    float *parts;                        /* [seqs, MOST_CHUNKS, heads, PART] */
    int q_stride, heads, max_blocks, keep_tokens;
    int seqs;
    bool only_last_is_new;               /* of attend_dense */
    float scale;                         /* times log2(e) */
};

const unsigned ALL = 0xffffffffu;

/* What is attended to. */
enum { CONTEXT, CHOSEN, ADDRESSED };

__host__ __device__ inline int chunks_of(int n)
{
    int chunks = (n + LEAST_TOKENS - 1) / LEAST_TOKENS;

    return chunks < MOST_CHUNKS ? chunks : MOST_CHUNKS;
}

template <int COLUMNS, int DEPTH>
constexpr int shared_bytes = sizeof(work<COLUMNS>) + DEPTH * TILE_BYTES;

/* Tiles [first, end) of a sequence with n tokens. */
struct chunk {
    int item, seq, number, chunks, n, first, end; /* end 0: there is none */
};

/* Chunk `item` of all that there are, counted through the sequences; a lane looks at one of these.
 * By whole warps. */
template <int TOKENS>
__device__ __forceinline__ chunk find_chunk(const arguments &a, int item)
{
    int lane = threadIdx.x % WARP, before = 0;

    for (int group = 0; group < a.seqs; group += WARP) {
        int seq = group + lane, n = 0;
        if (seq < a.seqs && (TOKENS != CONTEXT || a.n_rows[seq] == 1))
            n = TOKENS == CONTEXT ? a.n_tokens[seq] : a.n_chosen[seq];
        int chunks = chunks_of(n), end = chunks;
        for (int step = 1; step < WARP; step *= 2) {
            int more = __shfl_up_sync(ALL, end, step);
            end += lane >= step ? more : 0;
        }
        end += before;
        unsigned behind = __ballot_sync(ALL, item < end);
        if (behind) {
            int at = __ffs(behind) - 1;
            n = __shfl_sync(ALL, n, at);
            chunks = __shfl_sync(ALL, chunks, at);
            int number = item - (__shfl_sync(ALL, end, at) - chunks);
            int n_tiles = (n + TILE - 1) / TILE;
            return { item, group + at, number, chunks, n, n_tiles * number / chunks,
                     n_tiles * (number + 1) / chunks };
        }
        before = __shfl_sync(ALL, end, WARP - 1);
    }
    return {};
}

/* Where token i of those that a sequence attends to lies. */
template <int TOKENS>
__device__ __forceinline__ const __nv_bfloat16 *row_of(const arguments &a, int seq, int i)
{
    const int32_t *table = a.table + (size_t)seq * a.max_blocks;

    if (TOKENS == ADDRESSED)
        return a.rows[(size_t)seq * a.keep_tokens + i];
    int position = TOKENS == CHOSEN ? a.chosen[(size_t)seq * a.keep_tokens + i] : i;
    return a.kv + ((size_t)table[position / BLOCK_TOKENS] * BLOCK_TOKENS +
                   position % BLOCK_TOKENS) * D;
}

/* What a chunk came to: the result where it is the only one, else its part. */
__device__ __forceinline__ void write_chunk(const arguments &a, const work<DECODE_COLUMNS> *w,
                                            const state<DECODE_COLUMNS> &s, const chunk &k, int row)
{
    if (k.chunks == 1) {
        __nv_bfloat16 *out = a.out + (size_t)row * a.heads * L;
        each_value<DECODE_COLUMNS>(s, [&](int channel, int head, float v) {
            if (head < a.heads)
                out[head * L + channel] = __float2bfloat16_rn(v / w->sum[head]);
        });
        return;
    }
    float *part = a.parts + ((size_t)k.seq * MOST_CHUNKS + k.number) * a.heads * PART;
    each_value<DECODE_COLUMNS>(s, [&](int channel, int head, float v) {
        if (head < a.heads)
            part[head * PART + 4 + channel] = v;
    });
    if ((int)threadIdx.x < a.heads)
        *(float2 *)(part + threadIdx.x * PART) = make_float2(w->shrink[threadIdx.x],
                                                             w->sum[threadIdx.x]);
}

/* Grid: as many thread blocks as run at the same time, each with every gridDim.x-th chunk. */
template <int DEPTH, int TOKENS>
__global__ void __launch_bounds__(THREADS, 1) attend_row(arguments a)
{
    extern __shared__ __align__(1024) unsigned char memory[];
    enum { COLUMNS = DECODE_COLUMNS };
    unsigned ring = shared_address(memory);
    work<COLUMNS> *w = (work<COLUMNS> *)(memory + DEPTH * TILE_BYTES);
    state<COLUMNS> s;

    /* Lengths and tables of contexts come from the host: they can be read, and the tiles of rows
     * that lie there since earlier steps started, while the kernels before this one end. */
    bool waited = TOKENS != CONTEXT || !a.only_last_is_new;
    if (waited)
        wait_for_inputs();
    /* `ahead` has the tile that is started next, DEPTH tiles before the one that is attended to. */
    chunk k = find_chunk<TOKENS>(a, blockIdx.x), ahead = k;
    int ahead_tile = ahead.first, ahead_slot = 0, first_slot = 0;
    auto start_next = [&] {
        int from = ahead_tile * TILE, seq = ahead.seq;
        start_tile(ring + ahead_slot * TILE_BYTES,
                   ahead_tile < ahead.end ? min(ahead.n - from, (int)TILE) : 0,
                   [&](int i) { return row_of<TOKENS>(a, seq, from + i); });
        ahead_slot = ahead_slot == DEPTH - 1 ? 0 : ahead_slot + 1;
        ahead_tile++;
        if (ahead_tile == ahead.end) {
            ahead = find_chunk<TOKENS>(a, ahead.item + gridDim.x);
            ahead_tile = ahead.first;
        }
    };
    for (int i = 0; i < DEPTH; i++) {
        if (!waited && (ahead_tile + 1) * TILE >= ahead.n) { /* the new row, or no tile */
            wait_for_inputs();
            waited = true;
        }
        start_next();
    }
    if (!waited)
        wait_for_inputs();
    let_next_start();            /* nothing but the joining kernel, which waits for all */
    while (k.end > 0) {
        int row = TOKENS == CONTEXT ? a.first_row[k.seq] : k.seq, n_tiles = k.end - k.first;
        const __nv_bfloat16 *q = a.q + (size_t)row * a.q_stride;

        load_queries<COLUMNS>(&s, w, a.heads, [&](int head) { return q + (size_t)head * D; });
        clear(&s);
        attend_tiles<COLUMNS, DEPTH>(&s, w, n_tiles, a.scale, [&](int tile) {
            return ring + (first_slot + tile) % DEPTH * TILE_BYTES;
        }, [&](int) { start_next(); }, [](int tile) {
            wait_for_tile<DEPTH>(tile);
            __syncthreads();
        }, [&](int tile, int column) {
            return column < a.heads ? k.n - (k.first + tile) * TILE : 0;
        });
        start_next();            /* into the slot of the last one */
        first_slot = (first_slot + n_tiles) % DEPTH;
        publish_sums<COLUMNS>(&s, w, a.scale);
        __syncthreads();
        write_chunk(a, w, s, k, row);
        k = find_chunk<TOKENS>(a, k.item + gridDim.x);
    }
}

/* Grid: heads, sequences; a thread four channels of every JOIN_GROUPS-th chunk. */
template <int TOKENS>
__global__ void __launch_bounds__(JOIN_GROUPS * JOIN_THREADS) join_chunks(arguments a)
{
    __shared__ float4 values[JOIN_GROUPS][JOIN_THREADS];
    __shared__ float sums[JOIN_GROUPS];
    int head = blockIdx.x, seq = blockIdx.y, row = seq, lane = threadIdx.x % WARP;
    int group = threadIdx.x / JOIN_THREADS, thread = threadIdx.x % JOIN_THREADS;

    wait_for_inputs();
    let_next_start();            /* now that no multiprocessor attends any more */
    int chunks = chunks_of(TOKENS == CONTEXT ? a.n_tokens[seq] : a.n_chosen[seq]);
    if (TOKENS == CONTEXT) {
        if (a.n_rows[seq] != 1)
            return;
        row = a.first_row[seq];
    }
    if (chunks < 2)
        return;
    const size_t step = (size_t)a.heads * PART;
    const float *part = a.parts + (size_t)seq * MOST_CHUNKS * step + head * PART;
    float top = -INFINITY, sum = 0;
    float4 value = make_float4(0, 0, 0, 0);
    for (int i = lane; i < chunks; i += WARP)
        top = fmaxf(top, __ldcg(part + i * step));
    top = warp_max(top);
#pragma unroll 8
    for (int i = group; i < chunks; i += JOIN_GROUPS) {
        float2 stat = __ldcg((const float2 *)(part + i * step));
        float4 v = __ldcg((const float4 *)(part + i * step + 4) + thread);
        float f = exp2_fast(stat.x - top);
        sum += stat.y * f;
        value.x += v.x * f;
        value.y += v.y * f;
        value.z += v.z * f;
        value.w += v.w * f;
    }
    values[group][thread] = value;
    sums[group] = sum;           /* all threads of a group have the same */
    __syncthreads();
    if (group > 0)
        return;
    for (int i = 1; i < JOIN_GROUPS; i++) {
        float4 v = values[i][thread];
        sum += sums[i];
        value.x += v.x;
        value.y += v.y;
        value.z += v.z;
        value.w += v.w;
    }
    __nv_bfloat16 *out = a.out + ((size_t)row * a.heads + head) * L + 4 * thread;
    *(uint2 *)out = make_uint2(pack_bf16(value.x / sum, value.y / sum),
                               pack_bf16(value.z / sum, value.w / sum));
}

/* Tiles [first, end) of the tokens below n; row(i) is where token i lies, and visible(column) how
 * many tokens it sees. */
template <int COLUMNS, int DEPTH, typename R, typename V>
__device__ __forceinline__ void attend_range(state<COLUMNS> *s, work<COLUMNS> *w, unsigned ring,
                                             int first, int end, int n, float scale, const R &row,
                                             const V &visible)
{
    auto slot = [&](int tile) { return ring + tile % DEPTH * TILE_BYTES; };
    auto start = [&](int tile) {
        int from = (first + tile) * TILE;
        start_tile(slot(tile), first + tile < end ? min(n - from, (int)TILE) : 0,
                   [&](int i) { return row(from + i); });
    };
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
        start(i);
    attend_tiles<COLUMNS, DEPTH>(s, w, end - first, scale, slot, start, [](int tile) {
        wait_for_tile<DEPTH>(tile);
        __syncthreads();
    }, [&](int tile, int column) { return visible(column) - (first + tile) * TILE; });
    copy_wait<0>();
    __syncthreads();
}

/* Grid: groups of rows, the last ones, which see most, first; sequences. */
template <int COLUMNS, int DEPTH>
__global__ void __launch_bounds__(THREADS, 1) attend_rows(arguments a)
{
    extern __shared__ __align__(1024) unsigned char memory[];
    int seq = blockIdx.y, group = gridDim.x - 1 - blockIdx.x;

    let_next_start();
    wait_for_inputs();
    int n_rows = a.n_rows[seq], rows_each = COLUMNS / a.heads, from = group * rows_each;
    if (n_rows < 2 || from >= n_rows)
        return;
    int rows = min(rows_each, n_rows - from), columns = rows * a.heads;
    int row = a.first_row[seq] + from;
    int sees = a.n_tokens[seq] - n_rows + from + 1; /* the first row */
    int n = sees + rows - 1;
    unsigned ring = shared_address(memory);
    work<COLUMNS> *w = (work<COLUMNS> *)(memory + DEPTH * TILE_BYTES);
    const int32_t *table = a.table + (size_t)seq * a.max_blocks;
    state<COLUMNS> s;

    load_queries<COLUMNS>(&s, w, columns, [&](int column) {
        return a.q + (size_t)(row + column / a.heads) * a.q_stride + (size_t)(column % a.heads) * D;
    });
    clear(&s);
    auto at = [&](int i) {
        return a.kv + ((size_t)table[i / BLOCK_TOKENS] * BLOCK_TOKENS + i % BLOCK_TOKENS) * D;
    };
    attend_range<COLUMNS, DEPTH>(&s, w, ring, 0, (n + TILE - 1) / TILE, n, a.scale, at,
                                 [&](int column) {
        return column < columns ? sees + column / a.heads : 0;
    });
    publish_sums<COLUMNS>(&s, w, a.scale);
    __syncthreads();
    __nv_bfloat16 *out = a.out + (size_t)row * a.heads * L;
    each_value<COLUMNS>(s, [&](int channel, int column, float v) {
        if (column < columns)
            out[(size_t)column * L + channel] = __float2bfloat16_rn(v / w->sum[column]);
    });
}

template <int DEPTH, int TOKENS>
void launch_row(struct stream *s, const char *op, arguments a, int seqs, int most)
{
    int chunks = chunks_of(most), all = seqs * chunks, sms = s->be->info.sm_count;

    if (all == 0)
        return;
    a.seqs = seqs;
    launch_early(s, op, attend_row<DEPTH, TOKENS>, dim3(all < sms ? all : sms), THREADS,
                 shared_bytes<DECODE_COLUMNS, DEPTH>, a);
    if (chunks > 1)
        launch_early(s, op, join_chunks<TOKENS>, dim3(a.heads, seqs),
                     JOIN_GROUPS * JOIN_THREADS, 0, a);
}

template <int COLUMNS, int DEPTH>
void launch_rows(struct stream *s, const arguments &a, int seqs, int most_rows)
{
    int each = COLUMNS / a.heads;

    launch_early(s, "attend_dense", attend_rows<COLUMNS, DEPTH>,
                 dim3((most_rows + each - 1) / each, seqs), THREADS, shared_bytes<COLUMNS, DEPTH>,
                 a);
}

/* What both operations have. */
template <typename T>
arguments arguments_of(const T *args)
{
    arguments a = {};

    a.out = (__nv_bfloat16 *)args->out;
    a.q = (const __nv_bfloat16 *)args->q;
    a.kv = (const __nv_bfloat16 *)args->kv;
    a.table = args->table;
    a.parts = (float *)args->scratch;
    a.q_stride = args->q_stride;
    a.heads = args->heads;
    a.max_blocks = args->max_blocks;
    a.scale = args->scale * LOG2_E;
    return a;
}

}

void latent::queue_attend(struct stream *s, const struct attend_dense_args *args)
{
    arguments a = arguments_of(args);

    if (!stream_enter(s) || args->seqs == 0)
        return;
    a.n_tokens = args->n_tokens;
    a.first_row = args->first_row;
    a.n_rows = args->n_rows;
    a.only_last_is_new = args->only_last_is_new;
    /* Each passes over the other's sequences. */
    if (s->be->hopper)
        launch_row<5, CONTEXT>(s, "attend_dense", a, args->seqs, args->max_n_tokens);
    else
        launch_row<3, CONTEXT>(s, "attend_dense", a, args->seqs, args->max_n_tokens);
    if (args->max_n_rows < 2)
        return;
    if (s->be->hopper)
        launch_rows<64, 3>(s, a, args->seqs, args->max_n_rows);
    else
        launch_rows<DECODE_COLUMNS, 3>(s, a, args->seqs, args->max_n_rows);
}

void latent::queue_attend_selected(struct stream *s, const struct attend_selected_args *args,
                                   const bf16 *const *rows)
{
    arguments a = arguments_of(args);

    if (!stream_enter(s) || args->seqs == 0)
        return;
    a.chosen = args->chosen;
    a.n_chosen = args->n_chosen;
    a.rows = (const __nv_bfloat16 *const *)rows;
    a.keep_tokens = args->keep_tokens;
    if (rows)
        launch_row<3, ADDRESSED>(s, "attend_two_level", a, args->seqs, args->keep_tokens);
    else
        launch_row<3, CHOSEN>(s, "attend_selected", a, args->seqs, args->keep_tokens);
}

size_t latent::attend_scratch(int max_seqs, int heads)
{
    return (size_t)max_seqs * MOST_CHUNKS * heads * PART * sizeof(float);
}
