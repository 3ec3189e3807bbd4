/* Attention of many rows of a sequence to latent rows on Hopper: the chunks of a prompt, in the
 * absorbed form (kernels/latent.h).
 *
 * A task is 64 pairs of a row and a head, neighbours in the order of `out`.  All pairs of a
 * sequence attend to the same rows, so a tile of 64 tokens, which is a block of the pool, comes
 * once for all of them: it is their keys, and its first 512 channels their values.
 *
 * A thread block an SM, of three groups of 128 threads, goes through the tasks, the longest first.
 * Two tiles lie in shared memory at a time.  Group 0 makes the weights of even tiles, m64n64k16
 * with the queries in shared memory, group 1 those of odd ones.  Both sum all values: group g
 * channels 256 g to 256 g + 255, m64n256k16, 128 registers.  A group's own weights are the left
 * operand as they lie in registers.  For the other one they are written where the tile's rope
 * was, which nobody needs once the scores are there; there is no other room, queries and two
 * tiles take 221,184 of 232,448 bytes.  The third group copies: tiles by bulk tensor copies, as
 * soon as both groups have summed the values that lie there, and the queries of the next task.
 *
 * The groups work by turns: while one makes weights of a tile, the tensor cores have the other's
 * scores and the sums of the tile before, and the tile after is on its way.
 *
 * Tiles begin at multiples of TILE from position 0 on and come in ascending order, and one that
 * a row sees nothing of changes none of its bits: a row's result depends neither on its chunk nor
 * on its place in a task.
 *
 * Flops: 2 (576 + 512) rows heads (tokens - rows / 2).  Measured on an H100 (SXM, 700 W), 20 heads,
 * TFLOP/s: 434 for 2,048 rows of 2,048 tokens, 584 of 32,768, 589 of 98,304.  Two tiles are some
 * 4,350 cycles of products and 147 KB.
 *
 * Tried and lost, TFLOP/s for 2,048 rows of 98,304 tokens:
 *   both groups together, on an even and an odd tile at a time                      487
 *   the same in clusters of two thread blocks, each copying every other tile to both   494 */

#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/latent.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace {

using namespace latent;
using namespace wgmma;

enum {
    THREADS = 3 * GROUP,         /* the first copies, two compute */
    PAIRS = 64,                  /* of a row and a head, a thread block */
    TILE = BLOCK_TOKENS,
    PARTS = D / PART,            /* of a row; the last is the rope's */
    ROPE_PART = L / PART,
    PART_SIZE = TILE * PART_BYTES,
    TILE_BYTES = PARTS * PART_SIZE,
    OWN = L / 2,                 /* channels of the values that a group sums */
    OWN_PARTS = OWN / PART,
    QUERY_WARPS = 3,             /* that copy queries, of the first group */
    COMPUTE_WARPS = 2 * GROUP / WARP,
    COPY_REGISTERS = 40,         /* of a thread: all start with 168 */
    COMPUTE_REGISTERS = 232,
    WEIGHTS_THERE = 1,           /* and 2: named barriers, of each group's weights */
    MEETING = 3,                 /* of both groups */
    GROUP_MEETING = 4,           /* and 5: of each */
};

struct prefill {
    __nv_bfloat16 *out;
    const __nv_bfloat16 *q;
    const int32_t *table, *first_row, *n_rows, *n_tokens;
    int q_stride, heads, max_blocks;
    int per_seq, tasks;          /* of a sequence at most; of all together */
    float scale;                 /* times log2(e) */
};

/* Every part begins at a multiple of 1024 bytes: the swizzle goes by address. */
struct __align__(1024) shared {
    unsigned char q[PARTS][PAIRS * PART_BYTES];
    unsigned char k[2][PARTS][PART_SIZE];
    float top[2][PAIRS];         /* maximum of all tiles up to each group's last */
    float sum[2][PAIRS];         /* of each group's tiles */
    uint64_t there[2], left[2];  /* tiles */
    uint64_t q_there, q_left;
};

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
/* Never launched: the launcher sees that it takes too few threads. */
__global__ void __launch_bounds__(WARP)
attend(const __grid_constant__ CUtensorMap map, const __grid_constant__ prefill a)
{
    (void)map;
    (void)a;
}
#else

/* ---- barriers of the groups that compute */

__device__ __forceinline__ void groups_meet()
{
    asm volatile("bar.sync %0, %1;" : : "n"((int)MEETING), "n"(2 * GROUP) : "memory");
}

/* Threads of one. */
__device__ __forceinline__ void group_meet(int group)
{
    asm volatile("bar.sync %0, %1;" : : "r"(GROUP_MEETING + group), "n"((int)GROUP) : "memory");
}

/* Group `from` has left weights for the other one, which waits for them. */
__device__ __forceinline__ void tell_weights(int from)
{
    asm volatile("bar.arrive %0, %1;" : : "r"(WEIGHTS_THERE + from), "n"(2 * GROUP) : "memory");
}

__device__ __forceinline__ void await_weights(int from)
{
    asm volatile("bar.sync %0, %1;" : : "r"(WEIGHTS_THERE + from), "n"(2 * GROUP) : "memory");
}

/* A warp has done with what lies in a place. */
__device__ __forceinline__ void leave(uint64_t *left)
{
    if (threadIdx.x % WARP == 0)
        barrier_arrive(left);
}

/* ---- products of a group */

/* d = a b, or d += a b: 64 pairs by 64 tokens, 16 channels of both. */
__device__ __forceinline__ void start_product(float (&d)[TILE / 8][4], uint64_t a, uint64_t b,
                                              bool add)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, p, 1, 1, 0, 0;\n\t}"
                 : WORDS_OF(d[0]), WORDS_OF(d[1]), WORDS_OF(d[2]), WORDS_OF(d[3]),
                   WORDS_OF(d[4]), WORDS_OF(d[5]), WORDS_OF(d[6]), WORDS_OF(d[7])
                 : "l"(a), "l"(b), "r"((int)add) : "memory");
}

/* d += a b: 64 pairs by a group's channels, 16 tokens of both; a in registers. */
__device__ __forceinline__ void start_sum(float (&d)[OWN / 8][4], const unsigned (&a)[4],
                                          uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, "
                 "%40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, "
                 "%56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, "
                 "%72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, "
                 "%88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, "
                 "%104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, "
                 "%120, %121, %122, %123, %124, %125, %126, %127}, "
                 "{%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
                 : WORDS_OF(d[0]), WORDS_OF(d[1]), WORDS_OF(d[2]), WORDS_OF(d[3]),
                   WORDS_OF(d[4]), WORDS_OF(d[5]), WORDS_OF(d[6]), WORDS_OF(d[7]),
                   WORDS_OF(d[8]), WORDS_OF(d[9]), WORDS_OF(d[10]), WORDS_OF(d[11]),
                   WORDS_OF(d[12]), WORDS_OF(d[13]), WORDS_OF(d[14]), WORDS_OF(d[15]),
                   WORDS_OF(d[16]), WORDS_OF(d[17]), WORDS_OF(d[18]), WORDS_OF(d[19]),
                   WORDS_OF(d[20]), WORDS_OF(d[21]), WORDS_OF(d[22]), WORDS_OF(d[23]),
                   WORDS_OF(d[24]), WORDS_OF(d[25]), WORDS_OF(d[26]), WORDS_OF(d[27]),
                   WORDS_OF(d[28]), WORDS_OF(d[29]), WORDS_OF(d[30]), WORDS_OF(d[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) : "memory");
}

/* The same with a in shared memory. */
__device__ __forceinline__ void start_sum(float (&d)[OWN / 8][4], uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, "
                 "%40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, "
                 "%56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, "
                 "%72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, "
                 "%88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, "
                 "%104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, "
                 "%120, %121, %122, %123, %124, %125, %126, %127}, "
                 "%128, %129, 1, 1, 1, 0, 1;"
                 : WORDS_OF(d[0]), WORDS_OF(d[1]), WORDS_OF(d[2]), WORDS_OF(d[3]),
                   WORDS_OF(d[4]), WORDS_OF(d[5]), WORDS_OF(d[6]), WORDS_OF(d[7]),
                   WORDS_OF(d[8]), WORDS_OF(d[9]), WORDS_OF(d[10]), WORDS_OF(d[11]),
                   WORDS_OF(d[12]), WORDS_OF(d[13]), WORDS_OF(d[14]), WORDS_OF(d[15]),
                   WORDS_OF(d[16]), WORDS_OF(d[17]), WORDS_OF(d[18]), WORDS_OF(d[19]),
                   WORDS_OF(d[20]), WORDS_OF(d[21]), WORDS_OF(d[22]), WORDS_OF(d[23]),
                   WORDS_OF(d[24]), WORDS_OF(d[25]), WORDS_OF(d[26]), WORDS_OF(d[27]),
                   WORDS_OF(d[28]), WORDS_OF(d[29]), WORDS_OF(d[30]), WORDS_OF(d[31])
                 : "l"(a), "l"(b) : "memory");
}

/* ---- tasks */

struct task {
    int seq, first, n_pairs;     /* the first of PAIRS; how many the sequence has */
    int n_tokens, before;        /* position of the sequence's first row */
    int n_tiles;                 /* of tokens that its pairs see */
};

/* Task i in the order of work: last rows first, since they take longest.  False where there is
 * nothing to do. */
__device__ __forceinline__ bool find_task(task *t, const prefill &a, int i)
{
    t->seq = i / a.per_seq;
    t->first = (a.per_seq - 1 - i % a.per_seq) * PAIRS;
    int n_rows = a.n_rows[t->seq];
    t->n_pairs = n_rows * a.heads;
    if (n_rows <= 1 || t->first >= t->n_pairs)
        return false;
    t->n_tokens = a.n_tokens[t->seq];
    t->before = t->n_tokens - n_rows;
    int last = min(t->first + PAIRS, t->n_pairs) - 1;
    t->n_tiles = (t->before + last / a.heads + TILE) / TILE;
    return true;
}

/* Of a pair past the end, which is computed like the last one and not stored, that one's. */
__device__ __forceinline__ int pair_of(const task &t, int i)
{
    return min(t.first + i, t.n_pairs - 1);
}

/* How many tokens pair i sees. */
__device__ __forceinline__ int seen_by(const task &t, int i, int heads)
{
    return t.before + pair_of(t, i) / heads + 1;
}

/* A thread block's next task from round *round on, or false.  Every other round goes backwards,
 * which evens out that tasks become shorter. */
__device__ __forceinline__ bool next_task(task *t, const prefill &a, int *round)
{
    while (*round * (int)gridDim.x < a.tasks) {
        int block = *round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
        int i = (*round)++ * gridDim.x + block;
        if (i < a.tasks && find_task(t, a, i))
            return true;
    }
    return false;
}

/* ---- the warps that copy */

__device__ __forceinline__ void copy_tiles(shared *sh, const CUtensorMap *map, const prefill &a)
{
    int lane = threadIdx.x % WARP, round = 0;
    unsigned uses[2] = { 0, 0 };
    task t;

    while (next_task(&t, a, &round)) {
        const int32_t *table = a.table + (size_t)t.seq * a.max_blocks;
        int id = 0;
#pragma unroll 1
        for (int tile = 0; tile < t.n_tiles; tile++) {
            int place = tile % 2;
            if (tile % WARP == 0)
                id = table[min(tile + lane, t.n_tiles - 1)];
            int row = __shfl_sync(0xffffffffu, id, tile % WARP) * TILE;
            unsigned use = place ? uses[1]++ : uses[0]++;
            if (lane == 0) {
                barrier_wait(&sh->left[place], use % 2 ^ 1);
                barrier_expect(&sh->there[place], TILE_BYTES);
                for (int part = 0; part < PARTS; part++)
                    copy_part(sh->k[place][part], map, part * PART, row, &sh->there[place]);
            }
            __syncwarp();
        }
    }
}

/* QUERY_WARPS warps. */
__device__ __forceinline__ void copy_queries(shared *sh, const prefill &a)
{
    enum { PIECES = D / 8, STEP = QUERY_WARPS * WARP };
    int thread = threadIdx.x - WARP, round = 0;
    unsigned parity = 1, to = shared_address(sh->q);
    task t;

    while (next_task(&t, a, &round)) {
        const __nv_bfloat16 *q = a.q + (size_t)a.first_row[t.seq] * a.q_stride;
        barrier_wait(&sh->q_left, parity);
#pragma unroll 4
        for (int i = thread; i < PAIRS * PIECES; i += STEP) {
            int row = i / PIECES, piece = i % PIECES, pair = pair_of(t, row);
            copy_16(to + place_of<PAIRS>(row, piece),
                    q + (size_t)(pair / a.heads) * a.q_stride + pair % a.heads * D + piece * 8);
        }
        copy_commit();
        copy_wait<0>();
        show_writes();
        __syncwarp();
        if (threadIdx.x % WARP == 0)
            barrier_arrive(&sh->q_there);
        parity ^= 1;
    }
}

/* ---- the groups that compute */

/* Scores of all pairs with a tile. */
__device__ __forceinline__ void start_scores(float (&score)[TILE / 8][4], unsigned q, unsigned k)
{
    uint64_t a = operand(q, 0), b = operand(k, 0);

    products_begin();
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        int at = (step / 4 * PART_SIZE + step % 4 * 32) >> 4;
        start_product(score, a + at, b + at, step > 0);
    }
    products_commit();
}

/* Tokens of a tile from `token` on that a thread's two pairs do not see. */
__device__ __forceinline__ void mask_later(float (&score)[TILE / 8][4], const int (&seen)[2],
                                           int token)
{
    int at = token + 2 * (threadIdx.x % 4);

#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (at + 8 * n + i % 2 >= seen[i / 2])
                score[n][i] = -INFINITY;
}

/* Of a thread's two pairs, over its quarter of the lanes. */
__device__ __forceinline__ void find_tops(float (&top)[2], const float (&score)[TILE / 8][4])
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        top[half] = -INFINITY;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
            top[half] = fmaxf(top[half], fmaxf(score[n][2 * half], score[n][2 * half + 1]));
        top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 1));
        top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 2));
    }
}

/* A thread's weights for the other group, as a left operand in shared memory. */
__device__ __forceinline__ void hand_over(unsigned char *to, const unsigned (&weight)[TILE / 16][4],
                                          int pair)
{
    int c = threadIdx.x % 4;

#pragma unroll
    for (int step = 0; step < TILE / 16; step++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            *(unsigned *)(to + place_of<PAIRS>(pair + i % 2 * 8, 2 * step + i / 2) + 4 * c) =
                weight[step][i];
}

/* Values that nobody has stored, from token `from` of a tile on, may be NaN, and zero times NaN is
 * NaN. */
__device__ __forceinline__ void clear_values(unsigned char (&k)[PARTS][PART_SIZE], int from)
{
    for (int part = 0; part < ROPE_PART; part++)
        for (int i = from * PART_BYTES + threadIdx.x % GROUP * 16; i < PART_SIZE; i += GROUP * 16)
            *(uint4 *)&k[part][i] = make_uint4(0, 0, 0, 0);
}

/* Sums over a tile of the other group's, with the weights that it has left there. */
template <int ME>
__device__ __forceinline__ void start_other_values(float (&acc)[OWN / 8][4], const shared *sh)
{
    uint64_t a = operand(shared_address(sh->k[1 - ME][ROPE_PART]), 0);
    uint64_t b = operand(shared_address(sh->k[1 - ME][ME * OWN_PARTS]), PART_SIZE);

    products_begin();
#pragma unroll
    for (int step = 0; step < TILE / 16; step++)
        start_sum(acc, a + (step * 32 >> 4), b + (step * 16 * PART_BYTES >> 4));
    products_commit();
}

/* Over one of its own. */
template <int ME>
__device__ __forceinline__ void start_own_values(float (&acc)[OWN / 8][4], const shared *sh,
                                                 const unsigned (&weight)[TILE / 16][4])
{
    uint64_t b = operand(shared_address(sh->k[ME][ME * OWN_PARTS]), PART_SIZE);

    products_begin();
#pragma unroll
    for (int step = 0; step < TILE / 16; step++)
        start_sum(acc, weight[step], b + (step * 16 * PART_BYTES >> 4));
    products_commit();
}

/* What a group has of a thread's two pairs. */
struct state {
    float acc[OWN / 8][4];       /* its channels, over all tiles */
    float top[2], sum[2];        /* maximum over all tiles, without scale; over its own tiles, this
                                    lane's part */
};

/* There is a new maximum; what s->acc is to be multiplied by. */
__device__ __forceinline__ void raise_tops(state *s, float (&shrink)[2], const float (&top)[2],
                                           float scale)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        /* 1 to the bit where the maximum stays: see softmax_weights(). */
        shrink[half] = exp2_fast((s->top[half] - top[half]) * scale);
        s->top[half] = top[half];
        s->sum[half] *= shrink[half];
    }
}

__device__ __forceinline__ void shrink_sums(state *s, const float (&shrink)[2])
{
    if (__any_sync(0xffffffffu, shrink[0] != 1 || shrink[1] != 1))
#pragma unroll
        for (int j = 0; j < OWN / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s->acc[j][i] *= shrink[i / 2];
}

/* Scores to weights under the maximum s->top. */
__device__ __forceinline__ void make_weights(state *s, float (&score)[TILE / 8][4], float scale)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float base = s->top[half] * scale;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                score[n][i] = exp2_fast(score[n][i] * scale - base);
                s->sum[half] += score[n][i];
            }
    }
}

/* A thread's two pairs, this group's channels. */
template <int ME>
__device__ __forceinline__ void store_pairs(const prefill &a, const task &t,
                                            const state &s, const float (&total)[2], int pair)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (t.first + pair + 8 * half >= t.n_pairs)
            continue;
        __nv_bfloat16 *to = a.out + ((size_t)a.first_row[t.seq] * a.heads + t.first + pair +
                                     8 * half) * L + ME * OWN + 2 * (threadIdx.x % 4);
        float factor = 1 / total[half];
#pragma unroll
        for (int j = 0; j < OWN / 8; j++)
            *(unsigned *)(to + 8 * j) = pack_bf16(s.acc[j][2 * half] * factor,
                                                  s.acc[j][2 * half + 1] * factor);
    }
}

/* The other group's tile: with its weights and under its maximum.  use: of the place. */
template <int ME>
__device__ __forceinline__ void add_other_tile(state *s, shared *sh, int pair, unsigned use,
                                               float scale)
{
    await_weights(1 - ME);
    const float top[2] = { sh->top[1 - ME][pair], sh->top[1 - ME][pair + 8] };
    float shrink[2];
    raise_tops(s, shrink, top, scale);
    shrink_sums(s, shrink);
    barrier_wait(&sh->there[1 - ME], use % 2);
    hold(s->acc);
    start_other_values<ME>(s->acc, sh);
    products_wait<0>();
    hold(s->acc);
    leave(&sh->left[1 - ME]);
}

/* A task's part of group ME.  uses: of the places, by all tasks before. */
template <int ME>
__device__ __forceinline__ void attend_task(shared *sh, const prefill &a, const task &t,
                                            unsigned (&uses)[2], unsigned q_parity)
{
    int pair = threadIdx.x % GROUP / WARP * 16 + threadIdx.x % WARP / 4; /* and pair + 8 */
    const int seen[2] = { seen_by(t, pair, a.heads), seen_by(t, pair + 8, a.heads) };
    int seen_by_all = seen_by(t, 0, a.heads);
    state s = { {}, { -INFINITY, -INFINITY }, { 0, 0 } };
    float top[2];

    barrier_wait(&sh->q_there, q_parity);
    if (ME >= t.n_tiles)
        leave(&sh->q_left);
    if (ME == 1)
        add_other_tile<ME>(&s, sh, pair, uses[0]++, a.scale);
#pragma unroll 1
    for (int tile = ME; tile < t.n_tiles; tile += 2) {
        float score[TILE / 8][4], shrink[2];
        unsigned weight[TILE / 16][4];
        int first = tile * TILE, end = first + TILE;
        barrier_wait(&sh->there[ME], uses[ME]++ % 2);
        start_scores(score, shared_address(sh->q), shared_address(sh->k[ME]));
        products_wait<0>();
        hold(score);
        if (tile + 2 >= t.n_tiles)
            leave(&sh->q_left);
        if (end > seen_by_all)
            mask_later(score, seen, first);
        find_tops(top, score);
        top[0] = fmaxf(top[0], s.top[0]);
        top[1] = fmaxf(top[1], s.top[1]);
        raise_tops(&s, shrink, top, a.scale);
        make_weights(&s, score, a.scale);
        pack_weights(weight, score);
        if (threadIdx.x % 4 == 0) {
            sh->top[ME][pair] = top[0];
            sh->top[ME][pair + 8] = top[1];
        }
        hand_over(sh->k[ME][ROPE_PART], weight, pair);
        if (end > t.n_tokens)
            clear_values(sh->k[ME], t.n_tokens - first);
        show_writes();
        tell_weights(ME);
        if (end > t.n_tokens)
            group_meet(ME);      /* all have cleared their part of the values */
        shrink_sums(&s, shrink);
        hold(s.acc);
        start_own_values<ME>(s.acc, sh, weight);
        products_wait<0>();
        hold(s.acc);
        leave(&sh->left[ME]);
        if (tile + 1 < t.n_tiles)
            add_other_tile<ME>(&s, sh, pair, uses[1 - ME]++, a.scale);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        s.sum[half] += __shfl_xor_sync(0xffffffffu, s.sum[half], 1);
        s.sum[half] += __shfl_xor_sync(0xffffffffu, s.sum[half], 2);
        if (threadIdx.x % 4 == 0)
            sh->sum[ME][pair + 8 * half] = s.sum[half];
    }
    groups_meet();
#pragma unroll
    for (int half = 0; half < 2; half++)
        top[half] = sh->sum[0][pair + 8 * half] + sh->sum[1][pair + 8 * half];
    store_pairs<ME>(a, t, s, top, pair);
}

template <int ME>
__device__ __forceinline__ void attend_tasks(shared *sh, const prefill &a)
{
    unsigned uses[2] = { 0, 0 }, q_parity = 0;
    int round = 0;
    task t;

    while (next_task(&t, a, &round)) {
        attend_task<ME>(sh, a, t, uses, q_parity);
        q_parity ^= 1;
    }
}

__global__ void __launch_bounds__(THREADS, 1)
attend(const __grid_constant__ CUtensorMap map, const __grid_constant__ prefill a)
{
    extern __shared__ __align__(1024) unsigned char memory[];
    shared *sh = (shared *)memory;
    int role = __shfl_sync(0xffffffffu, threadIdx.x / GROUP, 0);

    if (threadIdx.x == 0) {
        asm volatile("prefetch.tensormap [%0];" : : "l"(&map) : "memory");
        for (int i = 0; i < 2; i++) {
            barrier_init(&sh->there[i], 1);
            barrier_init(&sh->left[i], COMPUTE_WARPS);
        }
        barrier_init(&sh->q_there, QUERY_WARPS);
        barrier_init(&sh->q_left, COMPUTE_WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    let_next_start();
    wait_for_inputs();
    if (role == 0) {
        give_registers<COPY_REGISTERS>();
        if (__shfl_sync(0xffffffffu, threadIdx.x / WARP, 0) == 0)
            copy_tiles(sh, &map, a);
        else
            copy_queries(sh, a);
    } else {
        take_registers<COMPUTE_REGISTERS>();
        if (role == 1)
            attend_tasks<0>(sh, a);
        else
            attend_tasks<1>(sh, a);
    }
}
#endif

}

/* False where the code for this device is not that for 9.0a. */
bool latent::queue_attend_rows_hopper(struct stream *s, const struct attend_dense_args *args)
{
    cudaFuncAttributes found;
    CUtensorMap map;
    prefill a = {};

    if (!s->be->hopper || !describe_rows(&map, args->kv, D))
        return false;
    stream_check(s, cudaFuncGetAttributes(&found, attend), "attend_dense");
    if (s->failed != cudaSuccess)
        return true;
    if (found.maxThreadsPerBlock < THREADS)
        return false;
    a.out = (__nv_bfloat16 *)args->out;
    a.q = (const __nv_bfloat16 *)args->q;
    a.table = args->table;
    a.first_row = args->first_row;
    a.n_rows = args->n_rows;
    a.n_tokens = args->n_tokens;
    a.q_stride = args->q_stride;
    a.heads = args->heads;
    a.max_blocks = args->max_blocks;
    a.per_seq = (args->max_n_rows * args->heads + PAIRS - 1) / PAIRS;
    a.tasks = args->seqs * a.per_seq;
    a.scale = args->scale * LOG2_E;
    launch_early(s, "attend_dense", attend, dim3(min(a.tasks, s->be->info.sm_count)), THREADS,
                 sizeof(shared), map, a);
    return true;
}
