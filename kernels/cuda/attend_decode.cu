/* Attention of one query row a sequence: over a whole context, or over chosen positions, whose
 * rows may be given by address.
 *
 * A thread block takes a chunk of one sequence's tokens and one KV head, all heads of its
 * group at once.  Each of its warps streams tiles of TILE tokens through a ring in shared
 * memory of its own and keeps a softmax of its own, so nothing is waited for but memory;
 * at the end the warps' parts are joined.  The chunks' parts are joined by the thread block
 * that is the last of its sequence and KV head to end, in the chunks' order.  How many
 * chunks there are, and of which blocks, depends on a sequence's own length and nothing
 * else.
 *
 * K and V are read once, 4 KB a token of Qwen3-8B, and that is what a long context costs:
 * 1,398 us of 131,072 tokens at batch 8 on an H100 are 3,072 GB/s, where a kernel that
 * does nothing but read has 3,080.
 *
 * Tried there and lost, us at 131,072 tokens unless it says else:
 *   gaps of 16 bytes between rows in shared memory, instead of pieces that change places:
 *   1,472 for 1,397 at batch 8.  128 bytes of memory then lie across two lines of shared
 *   memory, and with bulk copies the same 5 % are lost
 *   bulk copies without gaps: 3,080 to 3,100 GB/s when merely reading, no more than
 *   cp.async reaches, and rows of 512 bytes leave bank conflicts
 *   a second kernel to join the chunks: 1 us more at 1,024 tokens and batch 1, 3 to 4 from
 *   16,384 on; only at 1,024 tokens and batch 4 and 8 0.5 less
 *   66 chunks: 187 for 180 at batch 1, 1,409 for 1,397 at batch 8; 17: 190 and 1,396; 33,
 *   which fill 132 multiprocessors twice: 2 to 3 % more at 16,384 tokens and batch 1 and 4
 *   chunks of neighbouring blocks: the same within 1 %, as with a table in ascending order
 *   chunks of 128 tokens at least: 10 % more at 4,096 tokens, batch 4 and 8; only up to
 *   2,048 tokens: steps of Qwen3-8B as long at batch 1 and 2 to 6 % longer at batch 64
 *   eight warps or rings of 4 and 6 tiles, so one thread block a multiprocessor: mostly
 *   more, up to 24 % at 4,096 tokens; rings of 2 tiles: 204 for 180 at batch 1
 *   a hint that K and V are not needed again: nothing, when merely reading */

#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/latent.cuh"

namespace {

enum {
    WARPS = 4,
    THREADS = WARPS * WARP,
    TILE = 16,                   /* tokens */
    DEPTH = 3,                   /* tiles of a warp on their way or in use */
    HEADS = 16,                  /* rows of a product: the heads of a group, at most */
    LEAST_BLOCKS = 4,            /* of a chunk: shorter ones take longer to start than to run */
};

/* What is attended to. */
enum { CONTEXT, CHOSEN, ADDRESSED };

/* Thread blocks to a sequence and KV head: of a long one as many as give every
 * multiprocessor of a large GPU two. */
int most_chunks(int kv_heads)
{
    int chunks = 256 / kv_heads;

    return chunks < 16 ? 16 : chunks;
}

struct decode {
    __nv_bfloat16 *out;
    const __nv_bfloat16 *q, *kv;
    const int32_t *table;
    const int32_t *n_tokens, *first_row, *n_rows;   /* of attend_dense */
    const int32_t *chosen, *n_chosen;               /* of attend_selected */
    float *parts;                /* [seqs, heads, chunks, PART] */
    unsigned *arrived;           /* [seqs, kv_heads] of struct stream */
    int q_stride, heads, kv_heads, max_blocks, keep_tokens, chunks;
    bool only_last_is_new;       /* of attend_dense */
    float scale;                 /* times log2(e) */
    const __nv_bfloat16 *const *rows; /* [seqs, kv_heads, keep_tokens] of ADDRESSED tokens */
};
/* With more than these 128 bytes the compiler makes other code of all that reads them. */
static_assert(sizeof(decode) == 128, "as it was measured");

/* A part: maximum, sum, two words of nothing and the weighted sum of values. */
__host__ __device__ inline int part_floats(int head_dim)
{
    return head_dim + 4;
}

/* K and V of a token. */
template <int DIM>
constexpr int row_bytes = 4 * DIM;

template <int DIM>
constexpr int ring_bytes = WARPS * DEPTH * TILE * row_bytes<DIM>;

/* Where a row in shared memory has its pieces of 16 bytes: they change places within 128
 * bytes, so that equal pieces of 8 rows lie in different banks. */
__device__ __forceinline__ unsigned piece_at(int row, int piece)
{
    return (unsigned)((piece ^ (row & 7)) * 16);
}

/* Of n tokens (or chosen ones) of row `row` of q those in the blocks number, number +
 * chunks, ... below `blocks`. */
struct chunk {
    int row, n, number, chunks, blocks;
};

template <int TOKENS>
__device__ __forceinline__ chunk chunk_of(const decode &a, int seq, int kv_head, int number)
{
    chunk c = { seq, 0, number, 0, 0 };

    if (TOKENS != CONTEXT)
        c.n = a.n_chosen[(size_t)seq * a.kv_heads + kv_head];
    else {
        int rows = a.n_rows[seq], n = a.n_tokens[seq];
        c.row = a.first_row[seq];
        c.n = rows == 1 ? n : 0;
    }
    c.blocks = (c.n + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    c.chunks = min((c.blocks + LEAST_BLOCKS - 1) / LEAST_BLOCKS, a.chunks);
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

/* Start copying the tile from token `from` on; tokens from n on become zeros.  block: the id
 * of the one it lies in; chosen tokens lie anywhere. */
template <int DIM, int TOKENS>
__device__ __forceinline__ void start_tile(const decode &a, const int32_t *table,
                                           const int32_t *chosen,
                                           const __nv_bfloat16 *const *rows, int kv_head,
                                           unsigned to, int block, int from, int n)
{
    enum { PER_ROW = DIM / 4, AT_ONCE = WARP / PER_ROW }; /* 16-byte pieces */
    int first = threadIdx.x % WARP / PER_ROW, piece = threadIdx.x % PER_ROW;

    if (from < n) {
        const __nv_bfloat16 *tile =
            TOKENS != CONTEXT ? NULL
                              : a.kv + (((size_t)block * a.kv_heads + kv_head) * BLOCK_TOKENS +
                                        from % BLOCK_TOKENS) * (2 * DIM);
#pragma unroll
        for (int i = 0; i < TILE; i += AT_ONCE) {
            int t = first + i;
            const __nv_bfloat16 *row =
                TOKENS == ADDRESSED ? rows[min(from + t, n - 1)]
                : TOKENS == CHOSEN
                    ? row_at<DIM>(a, table, kv_head, chosen[min(from + t, n - 1)])
                    : tile + t * (2 * DIM);
            copy_16(to + t * row_bytes<DIM> + piece_at(t, piece), row + piece * 8,
                    from + t < n);
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
    unsigned row = rows + (matrix / 2 * 8 + lane % 8) * row_bytes<DIM> +
                   piece_at(lane, matrix % 2);
    float score[TILE / 8][4] = {};

#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        unsigned b[4];
        load_matrices(b, row ^ (step * 32));
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
    row = rows + (matrix % 2 * 8 + lane % 8) * row_bytes<DIM> + piece_at(lane, matrix / 2);
#pragma unroll
    for (int j = 0; j < DIM / 8; j += 2) {
        unsigned b[4];
        load_matrices_turned(b, row ^ (2 * DIM + j * 16));
        mma_bf16(s->acc[j], p, b[0], b[1]);
        mma_bf16(s->acc[j + 1], p, b[2], b[3]);
    }
}

/* The warps' softmaxes as one, into out (a whole row) or a part; memory takes
 * WARPS * HEADS * (DIM + 2) floats. */
template <int DIM>
__device__ void join_warps(const decode &a, softmax<DIM> *s, float *memory, const chunk &k,
                           int seq, int kv_head)
{
    float *values = memory, *most = values + WARPS * HEADS * DIM, *sums = most + WARPS * HEADS;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, c = lane % 4;
    int group = a.heads / a.kv_heads;

    softmax_end(s, a.scale);
    __syncthreads();             /* the rings are not needed any more */
    for (int half = 0; half < 2; half++) {
        int head = warp * HEADS + g + 8 * half;
        if (g + 8 * half >= group)
            continue;
        for (int j = 0; j < DIM / 8; j++)
            *(float2 *)&values[head * DIM + 8 * j + 2 * c] =
                make_float2(s->acc[j][2 * half], s->acc[j][2 * half + 1]);
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
        if (k.chunks == 1) {
            a.out[((size_t)k.row * a.heads + of_all) * DIM + d] =
                __float2bfloat16_rn(value / sum);
            continue;
        }
        float *part = a.parts + (((size_t)seq * a.heads + of_all) * a.chunks + k.number) *
                                    part_floats(DIM);
        part[4 + d] = value;
        if (d == 0) {
            part[0] = top;
            part[1] = sum;
        }
    }
}

/* The parts of a sequence's chunks as one: a warp a head. */
template <int DIM>
__device__ void join_chunks(const decode &a, const chunk &k, int seq, int kv_head)
{
    enum { AT_ONCE = 16, WIDE = DIM / WARP }; /* parts; channels of a lane */
    int lane = threadIdx.x % WARP, group = a.heads / a.kv_heads;

    for (int head = threadIdx.x / WARP; head < group; head += WARPS) {
        int of_all = kv_head * group + head;
        const float *part = a.parts + ((size_t)seq * a.heads + of_all) * a.chunks *
                                          part_floats(DIM);
        float top = -INFINITY, sum = 0, value[WIDE] = {};
        for (int i = lane; i < k.chunks; i += WARP)
            top = fmaxf(top, __ldcg(part + i * part_floats(DIM)));
        top = warp_max(top);
        for (int from = 0; from < k.chunks; from += AT_ONCE) {
            float got[AT_ONCE][WIDE];
            int own = from + lane % AT_ONCE;
            float2 stat = __ldcg((const float2 *)(part + min(own, k.chunks - 1) *
                                                             part_floats(DIM)));
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const float *p = part + min(from + i, k.chunks - 1) * part_floats(DIM) + 4;
                if (WIDE == 4)
                    *(float4 *)got[i] = __ldcg((const float4 *)p + lane);
                else
                    *(float2 *)got[i] = __ldcg((const float2 *)p + lane);
            }
            float shrink = own < k.chunks ? exp2_fast(stat.x - top) : 0;
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                float f = __shfl_sync(0xffffffffu, shrink, i);
                sum += f * __shfl_sync(0xffffffffu, stat.y, i);
                for (int j = 0; j < WIDE; j++)
                    value[j] += got[i][j] * f;
            }
        }
        __nv_bfloat16 *out = a.out + ((size_t)k.row * a.heads + of_all) * DIM + WIDE * lane;
        for (int j = 0; j < WIDE; j += 2)
            *(unsigned *)(out + j) = pack_bf16(value[j] / sum, value[j + 1] / sum);
    }
}

/* Grid: chunks, KV heads, sequences. */
template <int DIM, int TOKENS>
__global__ void __launch_bounds__(THREADS, 2) attend(decode a)
{
    extern __shared__ __align__(1024) unsigned char memory[];
    enum { SLOT = TILE * row_bytes<DIM> };
    static_assert(WARPS * TILE == BLOCK_TOKENS, "a warp takes the same tile of every block");
    int warp = threadIdx.x / WARP, kv_head = blockIdx.y, seq = blockIdx.z;
    int group = a.heads / a.kv_heads;

    /* The next kernel does not start before this one ends: with the output projection beside it a
     * step of Qwen3-8B at batch 1 and 1,024 tokens takes 4.49 ms on an H200 instead of 4.19. */

    /* Lengths and tables come from the host: they can be read, and the tiles of rows that lie
     * there since earlier steps started, while the kernels before this one end. */
    bool waited = TOKENS != CONTEXT || !a.only_last_is_new;
    if (waited)
        wait_for_inputs();
    chunk k = chunk_of<TOKENS>(a, seq, kv_head, blockIdx.x);
    if (k.number >= k.chunks) {
        /* Not before: the kernels behind this one count on all before it to have ended. */
        if (!waited)
            wait_for_inputs();
        return;
    }
    const int32_t *table = a.table + (size_t)seq * a.max_blocks;
    size_t list = TOKENS == CONTEXT ? 0 : ((size_t)seq * a.kv_heads + kv_head) * a.keep_tokens;
    const int32_t *chosen = TOKENS == CHOSEN ? a.chosen + list : NULL;
    const __nv_bfloat16 *const *rows = TOKENS == ADDRESSED ? a.rows + list : NULL;
    unsigned ring = shared_address(memory) + warp * DEPTH * SLOT;
    int from = k.number * BLOCK_TOKENS + warp * TILE, step = k.chunks * BLOCK_TOKENS;
    int ahead = k.number;        /* block of the next tile to start */
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++, ahead += k.chunks) {
        if (!waited && ahead >= k.blocks - 1) {
            wait_for_inputs();
            waited = true;
        }
        start_tile<DIM, TOKENS>(a, table, chosen, rows, kv_head, ring + i * SLOT,
                                TOKENS == CONTEXT && ahead < k.blocks ? table[ahead] : 0,
                                ahead * BLOCK_TOKENS + warp * TILE, k.n);
    }
    if (!waited)
        wait_for_inputs();
    /* Its id is there before it is wanted. */
    int block = TOKENS != CONTEXT ? 0 : table[min(ahead, k.blocks - 1)];
    unsigned q[DIM / 16][4];
    load_queries<DIM>(q, a.q + (size_t)k.row * a.q_stride + kv_head * group * DIM, group);
    softmax<DIM> s = softmax_empty<DIM>();
    for (int slot = 0; from < k.n; from += step) {
        copy_wait<DEPTH - 2>();
        __syncwarp();
        /* Into the slot of the tile before, which all lanes have left. */
        int free = slot == 0 ? DEPTH - 1 : slot - 1;
        start_tile<DIM, TOKENS>(a, table, chosen, rows, kv_head, ring + free * SLOT, block,
                                ahead * BLOCK_TOKENS + warp * TILE, k.n);
        ahead += k.chunks;
        if (TOKENS == CONTEXT)
            block = table[min(ahead, k.blocks - 1)];
        attend_tile<DIM>(&s, q, ring + slot * SLOT, k.n - from, a.scale);
        slot = slot == DEPTH - 1 ? 0 : slot + 1;
    }
    join_warps<DIM>(a, &s, (float *)memory, k, seq, kv_head);
    if (k.chunks > 1 &&
        last_to_arrive(a.arrived + (size_t)seq * a.kv_heads + kv_head, k.chunks))
        join_chunks<DIM>(a, k, seq, kv_head);
}

template <int DIM, int TOKENS>
void launch_dim(struct stream *s, const decode &a, const char *op, int chunks, int seqs)
{
    enum { JOIN_BYTES = WARPS * HEADS * (DIM + 2) * 4 };
    int bytes = ring_bytes<DIM> > JOIN_BYTES ? ring_bytes<DIM> : JOIN_BYTES;

    launch_early(s, op, attend<DIM, TOKENS>, dim3(chunks, a.kv_heads, seqs), THREADS, bytes, a);
}

/* most: of the tokens of a sequence. */
template <int TOKENS>
void launch(struct stream *s, decode &a, const char *op, int head_dim, int most, int seqs)
{
    const int least = LEAST_BLOCKS * BLOCK_TOKENS;

    if (seqs > MOST_ARRIVED / a.kv_heads) {
        stream_check(s, cudaErrorInvalidValue, op);
        return;
    }
    a.arrived = s->arrived;
    a.chunks = most_chunks(a.kv_heads);
    int chunks = (most + least - 1) / least;
    chunks = chunks < a.chunks ? chunks : a.chunks;
    if (head_dim == 128)
        launch_dim<128, TOKENS>(s, a, op, chunks, seqs);
    else
        launch_dim<64, TOKENS>(s, a, op, chunks, seqs);
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
    a.only_last_is_new = args->only_last_is_new;
    a.scale = args->scale * LOG2_E;
    launch<CONTEXT>(s, a, "attend_dense", args->shape.head_dim, args->max_n_tokens, args->seqs);
}

void cuda_attend_selected(struct stream *s, const struct attend_selected_args *args)
{
    cuda_attend_rows(s, args, NULL);
}

void cuda_attend_rows(struct stream *s, const struct attend_selected_args *args,
                      const bf16 *const *rows)
{
    decode a = {};
    int head_dim = args->shape.head_dim, most = args->keep_tokens;

    if (latent::is_latent(&args->shape)) {
        latent::queue_attend_selected(s, args, rows);
        return;
    }
    if (args->seqs == 0)
        return;
    a.out = (__nv_bfloat16 *)args->out;
    a.q = (const __nv_bfloat16 *)args->q;
    a.kv = (const __nv_bfloat16 *)args->kv;
    a.table = args->table;
    a.chosen = args->chosen;
    a.n_chosen = args->n_chosen;
    a.rows = (const __nv_bfloat16 *const *)rows;
    a.parts = (float *)args->scratch;
    a.q_stride = args->q_stride;
    a.heads = args->heads;
    a.kv_heads = args->shape.kv_heads;
    a.max_blocks = args->max_blocks;
    a.keep_tokens = args->keep_tokens;
    a.scale = args->scale * LOG2_E;
    if (rows)
        launch<ADDRESSED>(s, a, "attend_two_level", head_dim, most, args->seqs);
    else
        launch<CHOSEN>(s, a, "attend_selected", head_dim, most, args->seqs);
}

size_t cuda_attend_dense_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                 int max_blocks)
{
    (void)max_blocks;
    if (latent::is_latent(shape))
        return latent::attend_scratch(max_seqs, heads);
    return (size_t)max_seqs * heads * most_chunks(shape->kv_heads) *
           part_floats(shape->head_dim) * sizeof(float);
}
