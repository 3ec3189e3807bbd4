/* Causal attention of many rows of a sequence on Hopper: the chunks of a prompt.
 *
 *   out[r] = sum_p softmax_p(scale q[r] . k[p]) v[p],  p <= position of r
 *
 * A task is ROWS rows and one head.  A thread block per SM, of three groups of 128 threads,
 * goes through the tasks, the longest first.  Two groups compute 64 rows each; of 240
 * registers the queries take 32, the scores of a tile 64, its weights 32 and the sums 64.
 * The third group copies tiles, up to DEPTH ahead, and the queries of the next task, so
 * that they are there when the task begins.
 *
 * Scores are wgmma m64n128k16 with the keys as they lie as right operand, sums of values
 * m64n128k16 (m64n64k16 for 64 channels) with the values as they lie, turned by the
 * instruction.  The left operands are in registers: the result of the one product is laid
 * out as the left operand of the other.  Keys and values come by bulk tensor copies, a
 * block by 64 channels each, through one map over the pool.
 *
 * Tiles begin at multiples of TILE from position 0 on and come in ascending order, and one
 * that a row sees nothing of changes none of its bits.  So a row's result depends neither on
 * its chunk nor on its place in a task.
 *
 * Flops: 4 rows heads head_dim (tokens - rows / 2), and a byte from L2 for every ROWS of
 * them: 4.7 TB/s at 600 TFLOP/s.  The tensor cores' 989 TFLOP/s would be 243 us for 2048
 * rows at the end of 8192 tokens with 32 heads of 128.
 *
 * Measured on an H100 (SXM, 700 W), 2048 rows at the end of a context, 32 heads of 128 on 8;
 * beside it attend_prefill.cu on the same machine.  From 8192 tokens on the chip draws all
 * its power and lowers its clock from 1980 to 1500 .. 1800 MHz, so that waiting less hardly
 * shows:
 *
 *    tokens       us   TFLOP/s   attend_prefill.cu
 *      2048       71       486     126 us      273
 *      8192      395       609     791         304
 *     32768     1714       622    3490         305
 *     98304     5399       605   10679         306
 *
 * Tried and lost, TFLOP/s at 8192 and 32768 tokens, beside the other way in the same run:
 *   two tiles in shared memory      568, 578 for 576, 599; two rows at 8192: 95 us for 73
 *   groups that start their products in turn    582, 595 for 582, 591: nothing
 *   queries in shared memory        590, 604 for 586, 610; 474 for 482 at 2048 tokens
 *   two thread blocks in a cluster, heads of one KV head, each copying half of every tile
 *   to both                         426, 433 for 580, 592 */

#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace {

using namespace wgmma;

enum {
    ROLES = 3,                   /* groups: the first copies, two compute */
    THREADS = ROLES * GROUP,
    GROUP_ROWS = 64,
    ROWS = 2 * GROUP_ROWS,
    TILE = 2 * BLOCK_TOKENS,     /* tokens taken at once */
    DEPTH = 3,                   /* tiles in shared memory */
    TILE_PART = TILE * PART_BYTES,  /* bytes of a tile's K or V in one part */
    COPY_REGISTERS = 24,         /* of a thread: all start with 168 */
    COMPUTE_REGISTERS = 240,
    GROUP_BARRIER = 1,           /* and 2: named barriers of the groups that compute */
};

struct prefill {
    __nv_bfloat16 *out;
    const __nv_bfloat16 *q;
    const int32_t *table, *first_row, *n_rows, *n_tokens;
    int q_stride, heads, kv_heads, max_blocks;
    int row_tiles, tasks;        /* of a sequence and head at most; of all together */
    float scale;                 /* times log2(e) */
};

/* Every part begins at a multiple of 1024 bytes: the swizzle goes by address. */
template <int DIM>
struct __align__(1024) shared {
    unsigned char q[2][DIM / PART][GROUP_ROWS * PART_BYTES];
    unsigned char k[DEPTH][DIM / PART][TILE_PART];
    unsigned char v[DEPTH][DIM / PART][TILE_PART];
    uint64_t k_there[DEPTH], k_left[DEPTH], v_there[DEPTH], v_left[DEPTH];
    uint64_t q_there[2], q_left[2];
};

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
/* Never launched: the launcher sees that it takes too few threads. */
template <int DIM>
__global__ void __launch_bounds__(WARP)
attend(const __grid_constant__ CUtensorMap map, const __grid_constant__ prefill a)
{
    (void)map;
    (void)a;
}
#else

/* Threads of a group that computes. */
__device__ __forceinline__ void group_meet(int group)
{
    asm volatile("bar.sync %0, %1;" : : "r"(GROUP_BARRIER + group), "n"((int)GROUP) : "memory");
}

/* ---- products of a group */

/* d = a b, or d += a b: 64 rows of a by 128 rows of b, 16 channels of both. */
__device__ __forceinline__ void start_product(float (&d)[16][4], const unsigned (&a)[4],
                                              uint64_t b, bool add)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, "
                 "%40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, "
                 "%56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, p, 1, 1, 0;\n\t}"
                 : WORDS_OF(d[0]), WORDS_OF(d[1]), WORDS_OF(d[2]), WORDS_OF(d[3]),
                   WORDS_OF(d[4]), WORDS_OF(d[5]), WORDS_OF(d[6]), WORDS_OF(d[7]),
                   WORDS_OF(d[8]), WORDS_OF(d[9]), WORDS_OF(d[10]), WORDS_OF(d[11]),
                   WORDS_OF(d[12]), WORDS_OF(d[13]), WORDS_OF(d[14]), WORDS_OF(d[15])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add)
                 : "memory");
}

/* d += a b: 64 rows of a by all channels of b, 16 tokens of both. */
__device__ __forceinline__ void start_sum(float (&d)[16][4], const unsigned (&a)[4],
                                          uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, "
                 "%40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, "
                 "%56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : WORDS_OF(d[0]), WORDS_OF(d[1]), WORDS_OF(d[2]), WORDS_OF(d[3]),
                   WORDS_OF(d[4]), WORDS_OF(d[5]), WORDS_OF(d[6]), WORDS_OF(d[7]),
                   WORDS_OF(d[8]), WORDS_OF(d[9]), WORDS_OF(d[10]), WORDS_OF(d[11]),
                   WORDS_OF(d[12]), WORDS_OF(d[13]), WORDS_OF(d[14]), WORDS_OF(d[15])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) : "memory");
}

__device__ __forceinline__ void start_sum(float (&d)[8][4], const unsigned (&a)[4], uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : WORDS_OF(d[0]), WORDS_OF(d[1]), WORDS_OF(d[2]), WORDS_OF(d[3]),
                   WORDS_OF(d[4]), WORDS_OF(d[5]), WORDS_OF(d[6]), WORDS_OF(d[7])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) : "memory");
}

/* ---- tasks */

/* ROWS rows of a sequence and head. */
struct task {
    int head, seq, row, n_rows, n_tokens;
    int before;                  /* position of the sequence's first row */
    int n_blocks, n_tiles;       /* of tokens that its rows see */
};

/* Task i in the order of work: last rows first, since they take longest.  False where
 * there is nothing to do. */
__device__ __forceinline__ bool find_task(task *t, const prefill &a, int i)
{
    t->head = i % a.heads;
    t->row = (a.row_tiles - 1 - i / a.heads % a.row_tiles) * ROWS;
    t->seq = i / a.heads / a.row_tiles;
    t->n_rows = a.n_rows[t->seq];
    t->n_tokens = a.n_tokens[t->seq];
    if (t->n_rows <= 1 || t->row >= t->n_rows)
        return false;
    t->before = t->n_tokens - t->n_rows;
    int end = t->before + min(t->row + ROWS, t->n_rows);
    t->n_blocks = (end + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    t->n_tiles = (end + TILE - 1) / TILE;
    return true;
}

/* A thread block's round-th task; every other round goes backwards, which evens out that
 * tasks become shorter. */
__device__ __forceinline__ int task_of(int round)
{
    int block = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;

    return round * gridDim.x + block;
}

/* ---- the warps that copy */

template <int DIM>
__device__ __forceinline__ void copy_tile(unsigned char (&to)[DIM / PART][TILE_PART],
                                          const CUtensorMap *map, int channel, int row0,
                                          int row1, uint64_t *there)
{
    barrier_expect(there, TILE * DIM * 2);
#pragma unroll
    for (int part = 0; part < DIM / PART; part++) {
        copy_part(to[part], map, channel + part * PART, row0, there);
        copy_part(to[part] + TILE_PART / 2, map, channel + part * PART, row1, there);
    }
}

/* Number of a tile, of all that a thread block takes: its place and how often it was used. */
__device__ __forceinline__ int slot_of(int n)
{
    return n % DEPTH;
}

__device__ __forceinline__ unsigned parity_of(int n)
{
    return n / DEPTH % 2;
}

template <int DIM>
__device__ __forceinline__ void copy_tiles(shared<DIM> *sh, const CUtensorMap *map,
                                           const prefill &a)
{
    int lane = threadIdx.x % WARP, n = 0;

    for (int round = 0; round * (int)gridDim.x < a.tasks; round++) {
        task t;
        if (task_of(round) >= a.tasks || !find_task(&t, a, task_of(round)))
            continue;
        const int32_t *table = a.table + (size_t)t.seq * a.max_blocks;
        int kv_head = t.head / (a.heads / a.kv_heads), id = 0;
#pragma unroll 1
        for (int tile = 0; tile < t.n_tiles; tile++, n++) {
            int at = 2 * tile % WARP;
            /* An odd last block is taken twice: the second is masked. */
            if (at == 0)
                id = table[min(2 * tile + lane, t.n_blocks - 1)];
            int id0 = __shfl_sync(0xffffffffu, id, at);
            int id1 = __shfl_sync(0xffffffffu, id, at + 1);
            int row0 = (id0 * a.kv_heads + kv_head) * BLOCK_TOKENS;
            int row1 = (id1 * a.kv_heads + kv_head) * BLOCK_TOKENS;
            int slot = slot_of(n);
            if (lane == 0) {
                barrier_wait(&sh->k_left[slot], parity_of(n) ^ 1);
                copy_tile<DIM>(sh->k[slot], map, 0, row0, row1, &sh->k_there[slot]);
                barrier_wait(&sh->v_left[slot], parity_of(n) ^ 1);
                copy_tile<DIM>(sh->v[slot], map, DIM, row0, row1, &sh->v_there[slot]);
            }
            __syncwarp();
        }
    }
}

/* Rows of q from `first` on; those past the end become zeros. */
template <int DIM>
__device__ __forceinline__ void load_queries(unsigned to, const prefill &a, const task &t,
                                             int first)
{
    enum { PER_ROW = DIM / 8 };
    int lane = threadIdx.x % WARP, piece = lane % PER_ROW;
    const __nv_bfloat16 *q = a.q + (size_t)a.first_row[t.seq] * a.q_stride + t.head * DIM +
                             piece * 8;

#pragma unroll 4
    for (int row = lane / PER_ROW; row < GROUP_ROWS; row += WARP / PER_ROW)
        copy_16(to + place_of<GROUP_ROWS>(row, piece),
                q + (size_t)min(first + row, t.n_rows - 1) * a.q_stride,
                first + row < t.n_rows);
    copy_commit();
    copy_wait<0>();
    __syncwarp();
}

/* A warp for each group. */
template <int DIM>
__device__ __forceinline__ void copy_queries(shared<DIM> *sh, const prefill &a, int group)
{
    unsigned parity = 1;

    for (int round = 0; round * (int)gridDim.x < a.tasks; round++) {
        task t;
        if (task_of(round) >= a.tasks || !find_task(&t, a, task_of(round)))
            continue;
        int first = t.row + group * GROUP_ROWS;
        if (first >= t.n_rows)
            continue;
        barrier_wait(&sh->q_left[group], parity);
        load_queries<DIM>(shared_address(sh->q[group]), a, t, first);
        if (threadIdx.x % WARP == 0)
            barrier_arrive(&sh->q_there[group]);
        parity ^= 1;
    }
}

/* ---- the groups that compute */

/* A warp has done with what lies in a place. */
__device__ __forceinline__ void leave(uint64_t *left)
{
    if (threadIdx.x % WARP == 0)
        barrier_arrive(left);
}

/* A warp's 16 rows of q as a left operand. */
template <int DIM>
__device__ __forceinline__ void read_queries(unsigned (&query)[DIM / 16][4], unsigned q)
{
    int lane = threadIdx.x % WARP, matrix = lane / 8;
    int row = threadIdx.x % GROUP / WARP * 16 + matrix % 2 * 8 + lane % 8;

#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        int piece = 2 * step + matrix / 2;
        load_matrices(query[step], q + place_of<GROUP_ROWS>(row, piece));
    }
}

/* Scores of a group's rows with a tile. */
template <int DIM>
__device__ __forceinline__ void start_scores(float (&score)[TILE / 8][4],
                                             const unsigned (&query)[DIM / 16][4], unsigned k)
{
    uint64_t b = operand(k, 0);

    products_begin();
#pragma unroll
    for (int step = 0; step < DIM / 16; step++)
        start_product(score, query[step],
                      b + ((step / 4 * TILE_PART + step % 4 * 32) >> 4), step > 0);
    products_commit();
}

template <int DIM>
__device__ __forceinline__ void start_values(softmax<DIM> *s,
                                             const unsigned (&weight)[TILE / 16][4], unsigned v)
{
    uint64_t b = operand(v, TILE_PART);

    products_begin();
#pragma unroll
    for (int step = 0; step < TILE / 16; step++)
        start_sum(s->acc, weight[step], b + (step * 16 * PART_BYTES >> 4));
    products_commit();
}

/* Row r of the group is at position `first` + r; tokens of a tile from `token` on. */
__device__ __forceinline__ void mask_later(float (&score)[TILE / 8][4], int first, int token)
{
    int lane = threadIdx.x % WARP, row = threadIdx.x % GROUP / WARP * 16 + lane / 4;
    int ahead = token + 2 * (lane % 4) - first - row;

    if (token + TILE - 1 <= first)
        return;
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (ahead + 8 * n + i % 2 > i / 2 * 8)
                score[n][i] = -INFINITY;
}

/* Values that nobody has stored, from token `from` of a tile on, may be NaN, and zero times
 * NaN is NaN.  Both groups write the zeros, each before it uses them. */
template <int DIM>
__device__ __forceinline__ void clear_values(unsigned char (&v)[DIM / PART][TILE_PART],
                                             int from)
{
    int start = from * PART_BYTES + threadIdx.x % GROUP * 16;

    for (int part = 0; part < DIM / PART; part++)
        for (int i = start; i < TILE_PART; i += GROUP * 16)
            *(uint4 *)&v[part][i] = make_uint4(0, 0, 0, 0);
    show_writes();
}

template <int DIM>
__device__ __forceinline__ void store_rows(const prefill &a, const task &t, softmax<DIM> *s,
                                           int first)
{
    int lane = threadIdx.x % WARP;
    int row = first + threadIdx.x % GROUP / WARP * 16 + lane / 4;

    softmax_end(s, a.scale);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (row + 8 * half >= t.n_rows)
            continue;
        __nv_bfloat16 *to = a.out + ((size_t)(a.first_row[t.seq] + row + 8 * half) * a.heads +
                                     t.head) * DIM + 2 * (lane % 4);
        float factor = 1 / s->sum[half];
#pragma unroll
        for (int j = 0; j < DIM / 8; j++)
            *(unsigned *)(to + 8 * j) = pack_bf16(s->acc[j][2 * half] * factor,
                                                  s->acc[j][2 * half + 1] * factor);
    }
}

/* The values that are being summed have been, and what comes next is ready. */
template <int DIM>
__device__ __forceinline__ void join_values(softmax<DIM> *s, unsigned (&weight)[TILE / 16][4],
                                            const float (&score)[TILE / 8][4],
                                            const float (&shrink)[2])
{
    products_wait<0>();
    hold(s->acc);
    softmax_shrink(s, shrink);
    pack_weights(weight, score);
}

/* A task's rows of group `group`; n is the number of its first tile.  Products run while
 * others are made ready: the scores of a tile are started before the values of the tile
 * before it, which are summed while the scores become weights. */
template <int DIM>
__device__ __forceinline__ void attend_rows(shared<DIM> *sh, const prefill &a, const task &t,
                                            int group, int n, unsigned q_parity)
{
    int first = t.row + group * GROUP_ROWS, position = t.before + first, slot = slot_of(n);
    unsigned k = shared_address(sh->k), v = shared_address(sh->v);
    softmax<DIM> s = softmax_empty<DIM>();
    float score[TILE / 8][4], shrink[2];
    unsigned query[DIM / 16][4], weight[TILE / 16][4];

    barrier_wait(&sh->q_there[group], q_parity);
    read_queries<DIM>(query, shared_address(sh->q[group]));
    __syncwarp();
    leave(&sh->q_left[group]);
    barrier_wait(&sh->k_there[slot], parity_of(n));
    start_scores<DIM>(score, query, k + slot * DIM / PART * TILE_PART);
    products_wait<0>();
    hold(score);
    leave(&sh->k_left[slot]);
    mask_later(score, position, 0);
    softmax_weights(&s, score, shrink, a.scale);
    hold(score);
    for (int tile = 1; tile < t.n_tiles; tile++) {
        int before = slot;       /* of the tile before */
        slot = slot_of(++n);
        /* The wait stands between the weights and join_values() on purpose: the assembler
         * moves a wait for products up to the last branch. */
        barrier_wait(&sh->k_there[slot], parity_of(n));
        join_values(&s, weight, score, shrink);
        if (tile > 1)
            leave(&sh->v_left[slot_of(n - 2)]);
        start_scores<DIM>(score, query, k + slot * DIM / PART * TILE_PART);
        barrier_wait(&sh->v_there[before], parity_of(n - 1));
        start_values<DIM>(&s, weight, v + before * DIM / PART * TILE_PART);
        products_wait<1>();
        hold(score);
        leave(&sh->k_left[slot]);
        mask_later(score, position, tile * TILE);
        softmax_weights(&s, score, shrink, a.scale);
        hold(score);
    }
    barrier_wait(&sh->v_there[slot], parity_of(n));
    join_values(&s, weight, score, shrink);
    if (t.n_tiles > 1)
        leave(&sh->v_left[slot_of(n - 1)]);
    if (t.n_tokens < t.n_tiles * TILE) {
        clear_values<DIM>(sh->v[slot], t.n_tokens - (t.n_tiles - 1) * TILE);
        group_meet(group);
    }
    start_values<DIM>(&s, weight, v + slot * DIM / PART * TILE_PART);
    products_wait<0>();
    hold(s.acc);
    leave(&sh->v_left[slot]);
    store_rows<DIM>(a, t, &s, first);
}

/* Tiles of a task whose rows all belong to the other group. */
template <int DIM>
__device__ __forceinline__ void pass_tiles(shared<DIM> *sh, const task &t, int n)
{
    for (int end = n + t.n_tiles; n < end; n++) {
        barrier_wait(&sh->k_there[slot_of(n)], parity_of(n));
        leave(&sh->k_left[slot_of(n)]);
        barrier_wait(&sh->v_there[slot_of(n)], parity_of(n));
        leave(&sh->v_left[slot_of(n)]);
    }
}

template <int DIM>
__device__ __forceinline__ void attend_tasks(shared<DIM> *sh, const prefill &a, int group)
{
    unsigned q_parity = 0;
    int n = 0;

    for (int round = 0; round * (int)gridDim.x < a.tasks; round++) {
        task t;
        if (task_of(round) >= a.tasks || !find_task(&t, a, task_of(round)))
            continue;
        if (t.row + group * GROUP_ROWS < t.n_rows) {
            attend_rows<DIM>(sh, a, t, group, n, q_parity);
            q_parity ^= 1;
        } else {
            pass_tiles<DIM>(sh, t, n);
        }
        n += t.n_tiles;
    }
}

template <int DIM>
__global__ void __launch_bounds__(THREADS, 1)
attend(const __grid_constant__ CUtensorMap map, const __grid_constant__ prefill a)
{
    extern __shared__ __align__(1024) unsigned char memory[];
    shared<DIM> *sh = (shared<DIM> *)memory;
    int role = __shfl_sync(0xffffffffu, threadIdx.x / GROUP, 0);

    if (threadIdx.x == 0) {
        asm volatile("prefetch.tensormap [%0];" : : "l"(&map) : "memory");
        for (int i = 0; i < DEPTH; i++) {
            barrier_init(&sh->k_there[i], 1);
            barrier_init(&sh->v_there[i], 1);
            barrier_init(&sh->k_left[i], 2 * GROUP / WARP);
            barrier_init(&sh->v_left[i], 2 * GROUP / WARP);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(&sh->q_there[i], 1);
            barrier_init(&sh->q_left[i], GROUP / WARP);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    let_next_start();
    wait_for_inputs();
    if (role == 0) {
        give_registers<COPY_REGISTERS>();
        int warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0);
        if (warp == 0)
            copy_tiles<DIM>(sh, &map, a);
        else if (warp <= 2)
            copy_queries<DIM>(sh, a, warp - 1);
    } else {
        take_registers<COMPUTE_REGISTERS>();
        attend_tasks<DIM>(sh, a, role - 1);
    }
}
#endif

/* False where the code for this device is not that for 9.0a. */
template <int DIM>
bool launch(struct stream *s, const CUtensorMap &map, const prefill &a)
{
    cudaFuncAttributes found;

    if (!stream_enter(s))
        return true;
    stream_check(s, cudaFuncGetAttributes(&found, attend<DIM>), "attend_dense");
    if (s->failed == cudaSuccess && found.maxThreadsPerBlock < THREADS)
        return false;
    launch_early(s, "attend_dense", attend<DIM>, dim3(min(a.tasks, s->be->info.sm_count)),
                 THREADS, sizeof(shared<DIM>), map, a);
    return true;
}

}

bool attend_many_rows_hopper(struct stream *s, const struct attend_dense_args *args)
{
    prefill a = {};
    CUtensorMap map;

    if (!s->be->hopper || !describe_rows(&map, args->kv, 2 * args->shape.head_dim))
        return false;
    a.out = (__nv_bfloat16 *)args->out;
    a.q = (const __nv_bfloat16 *)args->q;
    a.table = args->table;
    a.first_row = args->first_row;
    a.n_rows = args->n_rows;
    a.n_tokens = args->n_tokens;
    a.q_stride = args->q_stride;
    a.heads = args->heads;
    a.kv_heads = args->shape.kv_heads;
    a.max_blocks = args->max_blocks;
    a.row_tiles = (args->max_n_rows + ROWS - 1) / ROWS;
    a.tasks = args->seqs * a.row_tiles * a.heads;
    a.scale = args->scale * LOG2_E;
    return args->shape.head_dim == 128 ? launch<128>(s, map, a) : launch<64>(s, map, a);
}
