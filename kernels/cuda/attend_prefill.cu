/* Causal attention of many rows of a sequence: the chunks of a prompt.  On Hopper
 * attend_prefill_hopper.cu does it.
 *
 * A thread block takes ROWS rows and one head through the context, a block of keys and
 * values at a time: while one is computed with, the next is on its way.  Each warp has
 * two tiles of 16 rows, so what it loads of a block is used twice. */

#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/latent.cuh"

namespace {

enum {
    WARPS = 4,
    THREADS = WARPS * WARP,
    TILES = 2,                   /* of 16 rows, to a warp */
    WARP_ROWS = 16 * TILES,
    ROWS = WARPS * WARP_ROWS,
    DEPTH = 2,                   /* blocks in shared memory */
    SPAN = 32,                   /* tokens of a block taken at once: more need more registers */
};

struct prefill {
    __nv_bfloat16 *out;
    const __nv_bfloat16 *q, *kv;
    const int32_t *table, *first_row, *n_rows, *n_tokens;
    int q_stride, heads, kv_heads, max_blocks;
    float scale;                 /* times log2(e) */
};

/* Against bank conflicts rows of keys and values end in a gap, and of the queries piece p, of 16
 * bytes, of row i lies at p ^ i % 8: with gaps in both a thread block of compute capability 8.6
 * would have 1 KB too little. */
template <int DIM>
constexpr int kv_row = 4 * DIM + 16;
template <int DIM>
constexpr int q_row = 2 * DIM;
template <int DIM>
constexpr int shared_bytes = ROWS * q_row<DIM> + DEPTH * BLOCK_TOKENS * kv_row<DIM>;

/* Rows of q from `first` on, of `n`; those past the end become zeros. */
template <int DIM>
__device__ __forceinline__ void start_queries(unsigned to, const __nv_bfloat16 *q, int stride,
                                              int first, int n)
{
    enum { PER_ROW = DIM / 8 };

#pragma unroll
    for (int i = threadIdx.x; i < ROWS * PER_ROW; i += THREADS) {
        int row = i / PER_ROW, piece = i % PER_ROW;
        copy_16(to + row * q_row<DIM> + (piece ^ row % 8) * 16,
                q + (size_t)min(first + row, n - 1) * stride + piece * 8, first + row < n);
    }
}

/* A block's first `n` tokens; the others become zeros. */
template <int DIM>
__device__ __forceinline__ void start_block(unsigned to, const __nv_bfloat16 *from, int n)
{
    enum { PER_ROW = DIM / 4 };

#pragma unroll
    for (int i = threadIdx.x; i < BLOCK_TOKENS * PER_ROW; i += THREADS) {
        int row = i / PER_ROW, piece = i % PER_ROW;
        copy_16(to + row * kv_row<DIM> + piece * 16, from + i * 8, row < n);
    }
}

/* Scores of a warp's rows with the tokens of a span. */
template <int DIM>
__device__ __forceinline__ void score_span(float (&score)[TILES][SPAN / 8][4],
                                            unsigned queries, unsigned keys)
{
    int lane = threadIdx.x % WARP, matrix = lane / 8;
    unsigned q = queries + (matrix % 2 * 8 + lane % 8) * q_row<DIM>;
    unsigned piece = (matrix / 2 ^ lane % 8) * 16;
    unsigned k = keys + (matrix / 2 * 8 + lane % 8) * kv_row<DIM> + matrix % 2 * 16;

#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        unsigned a[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; t++)
            load_matrices(a[t], q + t * 16 * q_row<DIM> + (piece ^ step * 32));
#pragma unroll
        for (int n = 0; n < SPAN / 8; n += 2) {
            unsigned b[4];
            load_matrices(b, k + n * 8 * kv_row<DIM> + step * 32);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                mma_bf16(score[t][n], a[t], b[0], b[1]);
                mma_bf16(score[t][n + 1], a[t], b[2], b[3]);
            }
        }
    }
}

template <int DIM>
__device__ __forceinline__ void add_values(softmax<DIM> (&s)[TILES],
                                           const float (&weight)[TILES][SPAN / 8][4],
                                           unsigned values)
{
    int lane = threadIdx.x % WARP, matrix = lane / 8;
    unsigned v = values + (matrix % 2 * 8 + lane % 8) * kv_row<DIM> + matrix / 2 * 16;

#pragma unroll
    for (int step = 0; step < SPAN / 16; step++) {
        unsigned a[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[t][i] = pack_bf16(weight[t][2 * step + i / 2][i % 2 * 2],
                                    weight[t][2 * step + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int j = 0; j < DIM / 8; j += 2) {
            unsigned b[4];
            load_matrices_turned(b, v + step * 16 * kv_row<DIM> + j * 16);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                mma_bf16(s[t].acc[j], a[t], b[0], b[1]);
                mma_bf16(s[t].acc[j + 1], a[t], b[2], b[3]);
            }
        }
    }
}

/* Row r of the warp is at position `first` + r; tokens of a span from `token` on. */
__device__ __forceinline__ void mask_later(float (&score)[TILES][SPAN / 8][4], int first,
                                           int token)
{
    int lane = threadIdx.x % WARP, ahead = token + 2 * (lane % 4) - first - lane / 4;

#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int n = 0; n < SPAN / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (ahead + 8 * n + i % 2 > 16 * t + i / 2 * 8)
                    score[t][n][i] = -INFINITY;
}

/* Rows of a warp from `row` on, of `n`. */
template <int DIM>
__device__ __forceinline__ void store_rows(const prefill &a, softmax<DIM> *s, __nv_bfloat16 *out,
                                           int row, int n)
{
    int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4;

    softmax_end(s, a.scale);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (row + g + 8 * half >= n)
            continue;
        __nv_bfloat16 *to = out + (size_t)(row + g + 8 * half) * a.heads * DIM + 2 * c;
        float factor = 1 / s->sum[half];
#pragma unroll
        for (int j = 0; j < DIM / 8; j++)
            *(unsigned *)(to + 8 * j) = pack_bf16(s->acc[j][2 * half] * factor,
                                                  s->acc[j][2 * half + 1] * factor);
    }
}

/* Grid: heads, tiles of rows from the last on (it takes longest), sequences. */
template <int DIM>
__global__ void __launch_bounds__(THREADS) attend(prefill a)
{
    extern __shared__ __align__(16) unsigned char memory[];
    int head = blockIdx.x, kv_head = head / (a.heads / a.kv_heads), seq = blockIdx.z;
    int row = (gridDim.y - 1 - blockIdx.y) * ROWS;

    let_next_start();
    wait_for_inputs();
    int n_rows = a.n_rows[seq], n = a.n_tokens[seq];
    if (n_rows <= 1 || row >= n_rows)
        return;
    int before = n - n_rows;     /* position of the sequence's first row */
    int n_blocks = (before + min(row + ROWS, n_rows) + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    const int32_t *table = a.table + (size_t)seq * a.max_blocks;
    const __nv_bfloat16 *kv = a.kv + (size_t)kv_head * BLOCK_TOKENS * 2 * DIM;
    size_t block_stride = (size_t)a.kv_heads * BLOCK_TOKENS * 2 * DIM;
    size_t at = (size_t)a.first_row[seq];

    unsigned queries = shared_address(memory), blocks = queries + ROWS * q_row<DIM>;
    int warp_row = row + threadIdx.x / WARP * WARP_ROWS;
    start_queries<DIM>(queries, a.q + at * a.q_stride + head * DIM, a.q_stride, row, n_rows);
    start_block<DIM>(blocks, kv + table[0] * block_stride, n);
    copy_commit();
    int next = n_blocks > 1 ? table[1] : 0;
    queries += threadIdx.x / WARP * WARP_ROWS * q_row<DIM>;
    softmax<DIM> s[TILES] = { softmax_empty<DIM>(), softmax_empty<DIM>() };
    for (int b = 0; b < n_blocks; b++) {
        unsigned rows = blocks + b % DEPTH * BLOCK_TOKENS * kv_row<DIM>;
        int token = b * BLOCK_TOKENS;
        copy_wait<0>();
        __syncthreads();         /* the block is there, and the one before is left by all */
        if (b + 1 < n_blocks)
            start_block<DIM>(blocks + (b + 1) % DEPTH * BLOCK_TOKENS * kv_row<DIM>,
                             kv + next * block_stride, n - token - BLOCK_TOKENS);
        copy_commit();
        next = b + 2 < n_blocks ? table[b + 2] : 0;
#pragma unroll 1
        for (int i = 0; i < BLOCK_TOKENS; i += SPAN) {
            if (token + i > before + warp_row + WARP_ROWS - 1)
                break;           /* after all rows of this warp */
            float score[TILES][SPAN / 8][4] = {};
            score_span<DIM>(score, queries, rows + i * kv_row<DIM>);
            if (token + i + SPAN - 1 > before + warp_row)
                mask_later(score, before + warp_row, token + i);
#pragma unroll
            for (int t = 0; t < TILES; t++)
                softmax_step(&s[t], score[t], a.scale);
            add_values<DIM>(s, score, rows + i * kv_row<DIM> + 2 * DIM);
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
        store_rows<DIM>(a, &s[t], a.out + at * a.heads * DIM + head * DIM, warp_row + 16 * t,
                        n_rows);
}

template <int DIM>
void launch(struct stream *s, const prefill &a, int max_n_rows, int seqs)
{
    launch_early(s, "attend_dense", attend<DIM>,
                 dim3(a.heads, (max_n_rows + ROWS - 1) / ROWS, seqs), THREADS,
                 shared_bytes<DIM>, a);
}

}

void cuda_attend_many_rows(struct stream *s, const struct attend_dense_args *args)
{
    prefill a = {};

    a.out = (__nv_bfloat16 *)args->out;
    a.q = (const __nv_bfloat16 *)args->q;
    a.kv = (const __nv_bfloat16 *)args->kv;
    a.table = args->table;
    a.first_row = args->first_row;
    a.n_rows = args->n_rows;
    a.n_tokens = args->n_tokens;
    a.q_stride = args->q_stride;
    a.heads = args->heads;
    a.kv_heads = args->shape.kv_heads;
    a.max_blocks = args->max_blocks;
    a.scale = args->scale * LOG2_E;
    if (args->shape.head_dim == 128)
        launch<128>(s, a, args->max_n_rows, args->seqs);
    else
        launch<64>(s, a, args->max_n_rows, args->seqs);
}

void cuda_attend_dense(struct stream *s, const struct attend_dense_args *a)
{
    if (a->seqs == 0)
        return;
    if (latent::is_latent(&a->shape)) {
        latent::queue_attend(s, a);
        return;
    }
    /* Which sequences have one row is known on the device alone. */
    cuda_attend_one_row(s, a);
    if (a->max_n_rows > 1 && !attend_many_rows_hopper(s, a))
        cuda_attend_many_rows(s, a);
}
