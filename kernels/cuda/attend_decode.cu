/* Attention of one query row a sequence: over a whole context, or over chosen positions.
 *
 * A thread block takes a chunk of one sequence's tokens and one KV head, all heads of its
 * group at once.  Each of its warps streams tiles of TILE tokens through a ring in shared
 * memory of its own and keeps a softmax of its own, so nothing is waited for but memory;
 * at the end the warps' parts are joined.  The parts of the chunks are joined by a second,
 * small kernel.  Where chunks begin depends on a sequence's own length and nothing else. */

#include "kernels/cuda/attend.cuh"

namespace {

enum {
    WARPS = 4,
    THREADS = WARPS * WARP,
    TILE = 16,                   /* tokens */
    DEPTH = 3,                   /* tiles of a warp on their way or in use */
    HEADS = 16,                  /* rows of a product: the heads of a group, at most */
    LEAST_CHUNK = 256,           /* tokens */
};

/* Thread blocks to a sequence and KV head: of a long one as many as give every
 * multiprocessor of a large GPU two. */
int most_chunks(int kv_heads)
{
    int chunks = 256 / kv_heads;

    return chunks < 16 ? 16 : chunks;
}

/* Tokens of a chunk; shorter ones take longer to start than to run. */
__host__ __device__ inline int chunk_tokens(int n_tokens, int chunks)
{
    int share = (n_tokens + chunks - 1) / chunks;

    share = (share + BLOCK_TOKENS - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
    return share > LEAST_CHUNK ? share : LEAST_CHUNK;
}

struct decode {
    __nv_bfloat16 *out;
    const __nv_bfloat16 *q, *kv;
    const int32_t *table;
    const int32_t *n_tokens, *first_row, *n_rows;   /* of attend_dense */
    const int32_t *chosen, *n_chosen;               /* of attend_selected */
    float *parts;                /* [seqs, heads, chunks, PART] */
    int q_stride, heads, kv_heads, max_blocks, keep_tokens, chunks;
    float scale;                 /* times log2(e) */
};

/* A part: maximum, sum, two words of nothing and the weighted sum of values. */
__host__ __device__ inline int part_floats(int head_dim)
{
    return head_dim + 4;
}

template <int DIM>
constexpr int row_bytes = 4 * DIM + 16; /* K and V, and a gap against bank conflicts */

template <int DIM>
constexpr int ring_bytes = WARPS * DEPTH * TILE * row_bytes<DIM>;

/* What a chunk is of. */
struct chunk {
    int row, n, first, end;      /* row of q; tokens (or chosen); of them this chunk's */
};

template <bool SELECTED>
__device__ __forceinline__ chunk chunk_of(const decode &a, int seq, int kv_head, int number)
{
    chunk c = { seq, 0, 0, 0 };

    if (SELECTED)
        c.n = a.n_chosen[(size_t)seq * a.kv_heads + kv_head];
    else if (a.n_rows[seq] == 1) {
        c.n = a.n_tokens[seq];
        c.row = a.first_row[seq];
    }
    int size = chunk_tokens(c.n, a.chunks);
    c.first = number * size;
    c.end = min(c.first + size, c.n);
    return c;
}

/* Where the row of K and V at a position is. */
template <int DIM>
__device__ __forceinline__ const __nv_bfloat16 *row_at(const decode &a, const int32_t *table,
                                                       int kv_head, int position)
{
    size_t block = (size_t)table[position / BLOCK_TOKENS] * a.kv_heads + kv_head;

    return a.kv + (block * BLOCK_TOKENS + position % BLOCK_TOKENS) * (2 * DIM);
}

/* Start copying the tile from token `from` on; tokens past the end become zeros.  The
 * tokens of a tile of a whole context are neighbours in one block. */
template <int DIM, bool SELECTED>
__device__ __forceinline__ void start_tile(const decode &a, const int32_t *table,
                                           const int32_t *chosen, int kv_head, unsigned to,
                                           int from, int end)
{
    enum { PER_ROW = DIM / 4, AT_ONCE = WARP / PER_ROW }; /* 16-byte pieces */
    int first = threadIdx.x % WARP / PER_ROW, piece = threadIdx.x % PER_ROW;

    if (from < end) {
        const __nv_bfloat16 *tile = SELECTED ? NULL : row_at<DIM>(a, table, kv_head, from);
        to += first * row_bytes<DIM> + piece * 16;
#pragma unroll
        for (int i = 0; i < TILE; i += AT_ONCE) {
            const __nv_bfloat16 *row =
                SELECTED ? row_at<DIM>(a, table, kv_head, chosen[min(from + first + i, end - 1)])
                         : tile + (first + i) * (2 * DIM);
            copy_16(to + i * row_bytes<DIM>, row + piece * 8, from + first + i < end);
        }
    }
    copy_commit();               /* one group a tile, empty or not, for copy_wait() */
}

/* The group's queries as left operand. */
template <int DIM>
__device__ __forceinline__ void load_queries(unsigned (&q)[DIM / 16][4], const __nv_bfloat16 *from,
                                             int group)
{
    int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4;

#pragma unroll
    for (int step = 0; step < DIM / 16; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int head = g + i % 2 * 8, d = step * 16 + 2 * c + i / 2 * 8;
            q[step][i] = head < group ? *(const unsigned *)(from + head * DIM + d) : 0;
        }
}

template <int DIM>
__device__ __forceinline__ void attend_tile(softmax<DIM> *s, const unsigned (&q)[DIM / 16][4],
                                            unsigned rows, int n, float scale)
{
    int lane = threadIdx.x % WARP, c = lane % 4, matrix = lane / 8;
    unsigned row = rows + (matrix / 2 * 8 + lane % 8) * row_bytes<DIM> + matrix % 2 * 16;
    float score[TILE / 8][4] = {};

#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        unsigned b[4];
        load_matrices(b, row + step * 32);
        mma_bf16(score[0], q[step], b[0], b[1]);
        mma_bf16(score[1], q[step], b[2], b[3]);
    }
#pragma unroll
    for (int i = 0; i < TILE / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            score[i][j] = 8 * i + 2 * c + j % 2 < n ? score[i][j] : -INFINITY;
    softmax_step(s, score, scale);
    unsigned p[4] = { pack_bf16(score[0][0], score[0][1]), pack_bf16(score[0][2], score[0][3]),
                      pack_bf16(score[1][0], score[1][1]), pack_bf16(score[1][2], score[1][3]) };
    row = rows + 2 * DIM + (matrix % 2 * 8 + lane % 8) * row_bytes<DIM> + matrix / 2 * 16;
#pragma unroll
    for (int j = 0; j < DIM / 8; j += 2) {
        unsigned b[4];
        load_matrices_turned(b, row + j * 16);
        mma_bf16(s->acc[j], p, b[0], b[1]);
        mma_bf16(s->acc[j + 1], p, b[2], b[3]);
    }
}

/* The warps' softmaxes as one, into out (a whole row) or a part; memory takes
 * WARPS * HEADS * (DIM + 2) floats. */
template <int DIM>
__device__ void join_warps(const decode &a, softmax<DIM> *s, float *memory, const chunk &k,
                           int seq, int kv_head, int number, bool whole)
{
    float *values = memory, *most = values + WARPS * HEADS * DIM, *sums = most + WARPS * HEADS;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, c = lane % 4;
    int group = a.heads / a.kv_heads;

    softmax_end(s, a.scale);
    __syncthreads();             /* the rings are not needed any more */
    for (int half = 0; half < 2; half++) {
        int head = warp * HEADS + g + 8 * half;
        for (int j = 0; j < DIM / 8; j++) {
            values[head * DIM + 8 * j + 2 * c] = s->acc[j][2 * half];
            values[head * DIM + 8 * j + 2 * c + 1] = s->acc[j][2 * half + 1];
        }
        if (c == 0) {
            most[head] = s->max[half];
            sums[head] = s->sum[half];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group * DIM; i += THREADS) {
        int head = i / DIM, d = i % DIM;
        float top = -INFINITY, sum = 0, value = 0;
        for (int w = 0; w < WARPS; w++)
            top = fmaxf(top, most[w * HEADS + head]);
        for (int w = 0; w < WARPS; w++) {
            /* 0 for a warp without tokens. */
            float shrink = exp2_fast(most[w * HEADS + head] - top);
            sum += sums[w * HEADS + head] * shrink;
            value += values[(w * HEADS + head) * DIM + d] * shrink;
        }
        int of_all = kv_head * group + head;
        if (whole) {
            a.out[((size_t)k.row * a.heads + of_all) * DIM + d] =
                __float2bfloat16_rn(value / sum);
            continue;
        }
        float *part = a.parts + (((size_t)seq * a.heads + of_all) * a.chunks + number) *
                                    part_floats(DIM);
        part[4 + d] = value;
        if (d == 0) {
            part[0] = top;
            part[1] = sum;
        }
    }
}

/* Grid: chunks, KV heads, sequences. */
template <int DIM, bool SELECTED>
__global__ void __launch_bounds__(THREADS) attend(decode a)
{
    extern __shared__ __align__(16) unsigned char memory[];
    int warp = threadIdx.x / WARP, kv_head = blockIdx.y, seq = blockIdx.z;
    int group = a.heads / a.kv_heads;

    let_next_start();
    wait_for_inputs();
    chunk k = chunk_of<SELECTED>(a, seq, kv_head, blockIdx.x);
    if (k.first >= k.end)
        return;
    const int32_t *table = a.table + (size_t)seq * a.max_blocks;
    const int32_t *chosen =
        SELECTED ? a.chosen + ((size_t)seq * a.kv_heads + kv_head) * a.keep_tokens : NULL;
    unsigned ring = shared_address(memory) + warp * DEPTH * TILE * row_bytes<DIM>;
    int from = k.first + warp * TILE;
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++)
        start_tile<DIM, SELECTED>(a, table, chosen, kv_head, ring + i * TILE * row_bytes<DIM>,
                                  from + i * WARPS * TILE, k.end);
    unsigned q[DIM / 16][4];
    load_queries<DIM>(q, a.q + (size_t)k.row * a.q_stride + kv_head * group * DIM, group);
    softmax<DIM> s = softmax_empty<DIM>();
    for (int slot = 0; from < k.end; from += WARPS * TILE) {
        copy_wait<DEPTH - 2>();
        __syncwarp();
        /* Into the slot of the tile before, which all lanes have left. */
        int free = slot == 0 ? DEPTH - 1 : slot - 1;
        start_tile<DIM, SELECTED>(a, table, chosen, kv_head, ring + free * TILE * row_bytes<DIM>,
                                  from + (DEPTH - 1) * WARPS * TILE, k.end);
        attend_tile<DIM>(&s, q, ring + slot * TILE * row_bytes<DIM>, k.end - from, a.scale);
        slot = slot == DEPTH - 1 ? 0 : slot + 1;
    }
    join_warps<DIM>(a, &s, (float *)memory, k, seq, kv_head, blockIdx.x, k.end - k.first == k.n);
}

/* Joins the parts of a sequence's chunks; a thread block a sequence and head. */
template <int DIM, bool SELECTED>
__global__ void __launch_bounds__(DIM) join_chunks(decode a)
{
    int head = blockIdx.x, seq = blockIdx.y, d = threadIdx.x;

    let_next_start();
    wait_for_inputs();
    chunk k = chunk_of<SELECTED>(a, seq, head / (a.heads / a.kv_heads), 0);
    if (k.end == k.n)            /* one chunk wrote the row itself, or there is none */
        return;
    int n = (k.n + k.end - 1) / k.end;
    const float *part = a.parts + ((size_t)seq * a.heads + head) * a.chunks * part_floats(DIM);
    float top = -INFINITY, sum = 0, value = 0;
    for (int i = 0; i < n; i++)
        top = fmaxf(top, part[i * part_floats(DIM)]);
#pragma unroll 4
    for (int i = 0; i < n; i++) {
        const float *p = part + i * part_floats(DIM);
        float shrink = exp2_fast(p[0] - top);
        sum += p[1] * shrink;
        value += p[4 + d] * shrink;
    }
    a.out[((size_t)k.row * a.heads + head) * DIM + d] = __float2bfloat16_rn(value / sum);
}

template <int DIM, bool SELECTED>
void launch_dim(struct stream *s, const decode &a, const char *op, int chunks, int seqs)
{
    enum { JOIN_BYTES = WARPS * HEADS * (DIM + 2) * 4 };
    int bytes = ring_bytes<DIM> > JOIN_BYTES ? ring_bytes<DIM> : JOIN_BYTES;

    launch_early(s, op, attend<DIM, SELECTED>, dim3(chunks, a.kv_heads, seqs), THREADS, bytes, a);
    if (chunks > 1)
        launch_early(s, op, join_chunks<DIM, SELECTED>, dim3(a.heads, seqs), DIM, 0, a);
}

/* most: of the tokens of a sequence. */
template <bool SELECTED>
void launch(struct stream *s, decode &a, const char *op, int head_dim, int most, int seqs)
{
    a.chunks = most_chunks(a.kv_heads);
    int chunks = (most + LEAST_CHUNK - 1) / LEAST_CHUNK;
    chunks = chunks < a.chunks ? chunks : a.chunks;
    if (head_dim == 128)
        launch_dim<128, SELECTED>(s, a, op, chunks, seqs);
    else
        launch_dim<64, SELECTED>(s, a, op, chunks, seqs);
}

}

void cuda_attend_one_row(struct stream *s, const struct attend_dense_args *args)
{
    decode a = {};

    a.out = (__nv_bfloat16 *)args->out;
    a.q = (const __nv_bfloat16 *)args->q;
    a.kv = (const __nv_bfloat16 *)args->kv;
    a.table = args->table;
    a.n_tokens = args->n_tokens;
    a.first_row = args->first_row;
    a.n_rows = args->n_rows;
    a.parts = (float *)args->scratch;
    a.q_stride = args->q_stride;
    a.heads = args->heads;
    a.kv_heads = args->shape.kv_heads;
    a.max_blocks = args->max_blocks;
    a.scale = args->scale * LOG2_E;
    launch<false>(s, a, "attend_dense", args->shape.head_dim, args->max_n_tokens, args->seqs);
}

void cuda_attend_selected(struct stream *s, const struct attend_selected_args *args)
{
    decode a = {};

    if (args->seqs == 0)
        return;
    a.out = (__nv_bfloat16 *)args->out;
    a.q = (const __nv_bfloat16 *)args->q;
    a.kv = (const __nv_bfloat16 *)args->kv;
    a.table = args->table;
    a.chosen = args->chosen;
    a.n_chosen = args->n_chosen;
    a.parts = (float *)args->scratch;
    a.q_stride = args->q_stride;
    a.heads = args->heads;
    a.kv_heads = args->shape.kv_heads;
    a.max_blocks = args->max_blocks;
    a.keep_tokens = args->keep_tokens;
    a.scale = args->scale * LOG2_E;
    launch<true>(s, a, "attend_selected", args->shape.head_dim, args->keep_tokens, args->seqs);
}

size_t cuda_attend_dense_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                 int max_blocks)
{
    (void)max_blocks;
    return (size_t)max_seqs * heads * most_chunks(shape->kv_heads) *
           part_floats(shape->head_dim) * sizeof(float);
}
