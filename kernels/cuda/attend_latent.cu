/* Attention to latent rows as an operation of its own: of one row of a sequence, or many, to a
 * whole context, and to chosen rows.
 *
 * One row: a thread block has all heads and a chunk of the context, of which there are as many as
 * fill the GPU; a second kernel joins the chunks' parts.  How many there are depends on a
 * sequence's own length and nothing else.  Memory is read once, and what a tile computes takes
 * less than half of the time that its bytes take.
 *
 * Many rows: the heads of as many rows as make 64 columns attend to all that the last of them
 * sees, in the absorbed form; on Hopper in attend_latent_hopper.cu.  The plain form needs half of
 * the products but keys and values of every token of the context in 20 times its memory, made anew
 * for every chunk of a prompt. */

#include "kernels/cuda/latent_tile.cuh"

namespace {

using namespace latent;

enum {
    MOST_CHUNKS = 96,
    LEAST_TOKENS = 256,          /* of a chunk */
    PART = L + 4,                /* floats: maximum, sum, two words of nothing, values */
    DECODE_COLUMNS = MOST_HEADS,
    JOIN_THREADS = L / 4,
};

struct arguments {
    __nv_bfloat16 *out;
    const __nv_bfloat16 *q, *kv;
    const int32_t *table, *n_tokens, *first_row, *n_rows;
    const int32_t *chosen, *n_chosen;    /* of attend_selected */
    const __nv_bfloat16 *const *rows;    /* [seqs, keep_tokens], or NULL */
    float *parts;                        /* [seqs, MOST_CHUNKS, heads, PART] */
    int q_stride, heads, max_blocks, keep_tokens;
    float scale;                         /* times log2(e) */
};

/* What is attended to. */
enum { CONTEXT, CHOSEN, ADDRESSED };

__host__ __device__ inline int chunks_of(int n)
{
    int chunks = (n + LEAST_TOKENS - 1) / LEAST_TOKENS;

    return chunks < MOST_CHUNKS ? chunks : MOST_CHUNKS;
}

template <int COLUMNS, int DEPTH>
constexpr int shared_bytes = sizeof(work<COLUMNS>) + DEPTH * TILE_BYTES;

/* Tiles [first, end) of the tokens below n; row(i) is where token i lies, and visible(column) how
 * many tokens it sees. */
template <int COLUMNS, int DEPTH, typename R, typename V>
__device__ __forceinline__ void attend_range(state<COLUMNS> *s, work<COLUMNS> *w, unsigned ring,
                                             int first, int end, int n, float scale, const R &row,
                                             const V &visible)
{
    auto start = [&](int tile) {
        int from = (first + tile) * TILE;
        start_tile(ring + tile % DEPTH * TILE_BYTES,
                   first + tile < end ? min(n - from, (int)TILE) : 0,
                   [&](int i) { return row(from + i); });
    };
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
        start(i);
    attend_tiles<COLUMNS, DEPTH>(s, w, ring, end - first, scale, start, [](int tile) {
        wait_for_tile<DEPTH>(tile);
        __syncthreads();
    }, [&](int tile, int column) { return visible(column) - (first + tile) * TILE; });
    copy_wait<0>();
    __syncthreads();
}

/* Grid: chunks, sequences. */
template <int DEPTH, int TOKENS>
__global__ void __launch_bounds__(THREADS, 1) attend_row(arguments a)
{
    extern __shared__ __align__(1024) unsigned char memory[];
    enum { COLUMNS = DECODE_COLUMNS };
    int seq = blockIdx.y, row = seq, chunk = blockIdx.x;

    wait_for_inputs();
    let_next_start();            /* nothing but the joining kernel, which waits for all */
    int n = TOKENS == CONTEXT ? a.n_tokens[seq] : a.n_chosen[seq], chunks = chunks_of(n);
    if (TOKENS == CONTEXT) {
        if (a.n_rows[seq] != 1)
            return;
        row = a.first_row[seq];
    }
    if (chunk >= chunks)
        return;
    int n_tiles = (n + TILE - 1) / TILE, first = n_tiles * chunk / chunks;
    int end = n_tiles * (chunk + 1) / chunks;
    unsigned ring = shared_address(memory);
    work<COLUMNS> *w = (work<COLUMNS> *)(memory + DEPTH * TILE_BYTES);
    const int32_t *table = a.table + (size_t)seq * a.max_blocks;
    state<COLUMNS> s;

    const __nv_bfloat16 *q = a.q + (size_t)row * a.q_stride;
    load_queries<COLUMNS>(&s, w, a.heads, [&](int head) { return q + (size_t)head * D; });
    clear(&s);
    auto at = [&](int i) {
        if (TOKENS == ADDRESSED)
            return a.rows[(size_t)seq * a.keep_tokens + i];
        int position = TOKENS == CHOSEN ? a.chosen[(size_t)seq * a.keep_tokens + i] : i;
        return a.kv + ((size_t)table[position / BLOCK_TOKENS] * BLOCK_TOKENS +
                       position % BLOCK_TOKENS) * D;
    };
    attend_range<COLUMNS, DEPTH>(&s, w, ring, first, end, n, a.scale, at,
                                 [&](int column) { return column < a.heads ? n : 0; });
    publish_sums<COLUMNS>(&s, w, a.scale);
    __syncthreads();
    if (chunks == 1) {
        __nv_bfloat16 *out = a.out + (size_t)row * a.heads * L;
        each_value<COLUMNS>(s, [&](int channel, int head, float v) {
            if (head < a.heads)
                out[head * L + channel] = __float2bfloat16_rn(v / w->sum[head]);
        });
        return;
    }
    float *part = a.parts + ((size_t)seq * MOST_CHUNKS + chunk) * a.heads * PART;
    each_value<COLUMNS>(s, [&](int channel, int head, float v) {
        if (head < a.heads)
            part[head * PART + 4 + channel] = v;
    });
    if ((int)threadIdx.x < a.heads)
        *(float2 *)(part + threadIdx.x * PART) = make_float2(w->shrink[threadIdx.x],
                                                             w->sum[threadIdx.x]);
}

/* Grid: heads, sequences; a thread four channels. */
template <int TOKENS>
__global__ void __launch_bounds__(JOIN_THREADS) join_chunks(arguments a)
{
    int head = blockIdx.x, seq = blockIdx.y, row = seq, lane = threadIdx.x % WARP;

    wait_for_inputs();
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
    for (int i = 0; i < chunks; i++) {
        float2 stat = __ldcg((const float2 *)(part + i * step));
        float4 v = __ldcg((const float4 *)(part + i * step + 4) + threadIdx.x);
        float f = exp2_fast(stat.x - top);
        sum += stat.y * f;
        value.x += v.x * f;
        value.y += v.y * f;
        value.z += v.z * f;
        value.w += v.w * f;
    }
    __nv_bfloat16 *out = a.out + ((size_t)row * a.heads + head) * L + 4 * threadIdx.x;
    *(uint2 *)out = make_uint2(pack_bf16(value.x / sum, value.y / sum),
                               pack_bf16(value.z / sum, value.w / sum));
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
void launch_row(struct stream *s, const char *op, const arguments &a, int seqs, int most)
{
    int chunks = chunks_of(most);

    if (chunks == 0)
        return;
    launch_early(s, op, attend_row<DEPTH, TOKENS>, dim3(chunks, seqs), THREADS,
                 shared_bytes<DECODE_COLUMNS, DEPTH>, a);
    if (chunks > 1)
        launch_early(s, op, join_chunks<TOKENS>, dim3(a.heads, seqs), JOIN_THREADS, 0, a);
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
    /* Each passes over the other's sequences. */
    if (s->be->hopper)
        launch_row<5, CONTEXT>(s, "attend_dense", a, args->seqs, args->max_n_tokens);
    else
        launch_row<3, CONTEXT>(s, "attend_dense", a, args->seqs, args->max_n_tokens);
    if (args->max_n_rows < 2 || queue_attend_rows_hopper(s, args))
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
