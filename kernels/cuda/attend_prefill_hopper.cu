/* Causal attention of many rows of a sequence on Hopper: the chunks of a prompt.
 *
 * @HEADER@ */

#include "kernels/cuda/attend.cuh"

#include <cudaTypedefs.h>

namespace {

enum {
    GROUP = 128,                 /* threads that issue a product together */
    ROLES = 3,                   /* groups: the first copies, two compute */
    THREADS = ROLES * GROUP,
    GROUP_ROWS = 64,
    ROWS = 2 * GROUP_ROWS,
    TILE = 2 * BLOCK_TOKENS,     /* tokens taken at once */
    DEPTH = 2,                   /* tiles in shared memory */
    PART = 64,                   /* channels of a row of shared memory, PART_BYTES */
    PART_BYTES = 128,            /* that the copies swizzle: 16 bytes of row r go to place ^ r % 8 */
    COPY_REGISTERS = 24,         /* of each thread: the kernel starts with 168 */
    COMPUTE_REGISTERS = 240,
    TURN_BARRIER = 1,            /* barriers by number: 1 and 2 of turns, 3 and 4 of a group */
    GROUP_BARRIER = 3,
    TILE_PARTS = TILE * PART_BYTES,
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
    unsigned char k[DEPTH][DIM / PART][TILE_PARTS];
    unsigned char v[DEPTH][DIM / PART][TILE_PARTS];
    uint64_t k_there[DEPTH], k_left[DEPTH], v_there[DEPTH], v_left[DEPTH];
};

/* The kernel runs where its file was compiled for 9.0a, and is launched nowhere else. */
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int DIM>
__global__ void attend(const __grid_constant__ CUtensorMap map, const __grid_constant__ prefill a)
{
    __trap();
}
#else

/* ---- barriers and copies */

__device__ __forceinline__ void barrier_init(uint64_t *barrier, unsigned arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 : : "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t *barrier, unsigned bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 : : "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
                 : : "r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t *barrier, unsigned parity)
{
    asm volatile("{\n\t.reg .pred p;\n"
                 "wait:\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t"
                 "@p bra.uni done;\n\tbra.uni wait;\ndone:\n\t}"
                 : : "r"(shared_address(barrier)), "r"(parity) : "memory");
}

/* Barriers by number, of whole warps. */
__device__ __forceinline__ void threads_meet(int barrier, int threads)
{
    asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void threads_arrive(int barrier, int threads)
{
    asm volatile("bar.arrive %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

/* PART channels from `channel` on of BLOCK_TOKENS rows of the pool. */
__device__ __forceinline__ void copy_part(void *to, const CUtensorMap *map, int channel, int row,
                                          uint64_t *barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];"
                 : : "r"(shared_address(to)), "l"(map), "r"(channel), "r"(row),
                     "r"(shared_address(barrier)) : "memory");
}

/* What this thread wrote to shared memory can be seen by products and copies. */
__device__ __forceinline__ void show_writes()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int N>
__device__ __forceinline__ void give_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(N));
}

template <int N>
__device__ __forceinline__ void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(N));
}

/* ---- products of a group */

#define WORDS_OF(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])

/* Where an operand lies: rows of PART_BYTES, swizzled.  `next` is the distance of the next PART channels
 * of an operand whose rows are the inner dimension of the product, and unused otherwise. */
__device__ __forceinline__ uint64_t operand(unsigned address, unsigned next)
{
    return (uint64_t)1 << 62 | (uint64_t)(8 * PART_BYTES >> 4) << 32 | (uint64_t)(next >> 4) << 16 |
           address >> 4;
}

/* Registers were written by others than products, or shared memory was. */
__device__ __forceinline__ void products_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* All products but the last N groups of them have ended. */
template <int N>
__device__ __forceinline__ void products_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(N) : "memory");
}

/* Nothing that uses these words moves across: to the compiler a product has ended as soon
 * as it has begun. */
template <int N>
__device__ __forceinline__ void hold(float (&words)[N][4])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : WORDS_OF(words[i]) : : "memory");
}

/* d (+)= a b: 64 rows of a by 128 rows of b, 16 columns of both. */
__device__ __forceinline__ void start_product(float (&d)[16][4], uint64_t a, uint64_t b, bool add)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, "
                 "%40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, "
                 "%56, %57, %58, %59, %60, %61, %62, %63}, "
                 "%64, %65, p, 1, 1, 0, 0;\n\t}"
                 : WORDS_OF(d[0]), WORDS_OF(d[1]), WORDS_OF(d[2]), WORDS_OF(d[3]),
                   WORDS_OF(d[4]), WORDS_OF(d[5]), WORDS_OF(d[6]), WORDS_OF(d[7]),
                   WORDS_OF(d[8]), WORDS_OF(d[9]), WORDS_OF(d[10]), WORDS_OF(d[11]),
                   WORDS_OF(d[12]), WORDS_OF(d[13]), WORDS_OF(d[14]), WORDS_OF(d[15])
                 : "l"(a), "l"(b), "r"((int)add) : "memory");
}

/* d += a b: 64 rows of a by all channels of b, 16 tokens of both. */
__device__ __forceinline__ void start_sum(float (&d)[16][4], const unsigned (&a)[4], uint64_t b)
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

#undef WORDS_OF

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
    if (t->n_rows <= 1 || t->row >= t->n_rows)
        return false;
    t->n_tokens = a.n_tokens[t->seq];
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

/* ---- the warp that copies */

template <int DIM>
__device__ __forceinline__ void copy_tile(unsigned char (&to)[DIM / PART][TILE_PARTS],
                                          const CUtensorMap *map, int channel, int row0, int row1,
                                          uint64_t *there)
{
    barrier_expect(there, TILE * DIM * 2);
#pragma unroll
    for (int part = 0; part < DIM / PART; part++) {
        copy_part(to[part], map, channel + part * PART, row0, there);
        copy_part(to[part] + TILE_PARTS / 2, map, channel + part * PART, row1, there);
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
        for (int tile = 0; tile < t.n_tiles; tile++, n++) {
            int at = 2 * tile % WARP;
            /* An odd last block is taken twice: the second is masked. */
            if (at == 0)
                id = table[min(2 * tile + lane, t.n_blocks - 1)];
            int row0 = (__shfl_sync(0xffffffffu, id, at) * a.kv_heads + kv_head) * BLOCK_TOKENS;
            int row1 = (__shfl_sync(0xffffffffu, id, at + 1) * a.kv_heads + kv_head) * BLOCK_TOKENS;
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

/* ---- the groups that compute */

/* A warp has done with what lies in a place. */
__device__ __forceinline__ void leave(uint64_t *left)
{
    if (threadIdx.x % WARP == 0)
        barrier_arrive(left);
}

/* Rows of q from `first` on; those past the end become zeros. */
template <int DIM>
__device__ __forceinline__ void load_queries(unsigned to, const prefill &a, const task &t,
                                             int first)
{
    enum { PER_ROW = DIM / 8 };
    const __nv_bfloat16 *q = a.q + (size_t)a.first_row[t.seq] * a.q_stride + t.head * DIM;

#pragma unroll
    for (int i = threadIdx.x % GROUP; i < GROUP_ROWS * PER_ROW; i += GROUP) {
        int row = i / PER_ROW, piece = i % PER_ROW, part = piece / 8;
        copy_16(to + part * GROUP_ROWS * PART_BYTES + row * PART_BYTES +
                (piece % 8 ^ row % 8) * 16,
                q + (size_t)min(first + row, t.n_rows - 1) * a.q_stride + piece * 8,
                first + row < t.n_rows);
    }
    copy_commit();
    copy_wait<0>();
    show_writes();
}

/* Scores of a group's rows with a tile. */
template <int DIM>
__device__ __forceinline__ void start_scores(float (&score)[TILE / 8][4], unsigned q, unsigned k)
{
    uint64_t a = operand(q, 0), b = operand(k, 0);

    products_begin();
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        int part = step / 4, within = step % 4 * 32;
        start_product(score, a + ((part * GROUP_ROWS * PART_BYTES + within) >> 4),
                      b + ((part * TILE_PARTS + within) >> 4), step > 0);
    }
    products_commit();
}

template <int DIM>
__device__ __forceinline__ void start_values(softmax<DIM> *s,
                                             const unsigned (&weight)[TILE / 16][4], unsigned v)
{
    uint64_t b = operand(v, TILE_PARTS);

    products_begin();
#pragma unroll
    for (int step = 0; step < TILE / 16; step++)
        start_sum(s->acc, weight[step], b + (step * 16 * PART_BYTES >> 4));
    products_commit();
}

/* Weights as a left operand. */
__device__ __forceinline__ void pack_weights(unsigned (&weight)[TILE / 16][4],
                                             const float (&score)[TILE / 8][4])
{
#pragma unroll
    for (int step = 0; step < TILE / 16; step++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            weight[step][i] = pack_bf16(score[2 * step + i / 2][i % 2 * 2],
                                        score[2 * step + i / 2][i % 2 * 2 + 1]);
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
__device__ __forceinline__ void clear_values(unsigned char (&v)[DIM / PART][TILE_PARTS], int from)
{
    for (int part = 0; part < DIM / PART; part++)
        for (int i = from * PART_BYTES + threadIdx.x % GROUP * 16; i < TILE_PARTS; i += GROUP * 16)
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

/* A task's rows of group `group`; n is the number of its first tile.  While the scores of
 * a tile become weights, the values of the tile before are summed, and with `both` the
 * other group's products run: the groups start theirs in turn. */
template <int DIM>
__device__ __forceinline__ void attend_rows(shared<DIM> *sh, const prefill &a, const task &t,
                                            int group, int n, bool both)
{
    int first = t.row + group * GROUP_ROWS, position = t.before + first;
    unsigned q = shared_address(sh->q[group]), k = shared_address(sh->k),
             v = shared_address(sh->v);
    softmax<DIM> s = softmax_empty<DIM>();
    float score[TILE / 8][4], shrink[2];
    unsigned weight[TILE / 16][4];
    int slot = slot_of(n), last = n + t.n_tiles - 1;

    load_queries<DIM>(q, a, t, first);
    threads_meet(GROUP_BARRIER + group, GROUP);
    barrier_wait(&sh->k_there[slot], parity_of(n));
    start_scores<DIM>(score, q, k + slot * DIM / PART * TILE_PARTS);
    if (both && group == 1 && t.n_tiles > 1)
        threads_arrive(TURN_BARRIER, 2 * GROUP);
    products_wait<0>();
    hold(score);
    leave(&sh->k_left[slot]);
    mask_later(score, position, 0);
    softmax_weights(&s, score, shrink, a.scale);
    pack_weights(weight, score);
    for (int tile = 1; tile < t.n_tiles; tile++) {
        int before = slot;       /* of the tile before */
        unsigned before_parity = parity_of(n);
        slot = slot_of(++n);
        barrier_wait(&sh->k_there[slot], parity_of(n));
        if (both)
            threads_meet(TURN_BARRIER + group, 2 * GROUP);
        start_scores<DIM>(score, q, k + slot * DIM / PART * TILE_PARTS);
        barrier_wait(&sh->v_there[before], before_parity);
        start_values<DIM>(&s, weight, v + before * DIM / PART * TILE_PARTS);
        if (both && (group == 0 || tile < t.n_tiles - 1))
            threads_arrive(TURN_BARRIER + 1 - group, 2 * GROUP);
        products_wait<1>();
        hold(score);
        leave(&sh->k_left[slot]);
        mask_later(score, position, tile * TILE);
        softmax_weights(&s, score, shrink, a.scale);
        products_wait<0>();
        hold(s.acc);
        hold(score);
        leave(&sh->v_left[before]);
        softmax_shrink(&s, shrink);
        pack_weights(weight, score);
    }
    barrier_wait(&sh->v_there[slot], parity_of(last));
    if (t.n_tokens < t.n_tiles * TILE) {
        clear_values<DIM>(sh->v[slot], t.n_tokens - (t.n_tiles - 1) * TILE);
        threads_meet(GROUP_BARRIER + group, GROUP);
    }
    start_values<DIM>(&s, weight, v + slot * DIM / PART * TILE_PARTS);
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
    int n = 0;

    for (int round = 0; round * (int)gridDim.x < a.tasks; round++) {
        task t;
        if (task_of(round) >= a.tasks || !find_task(&t, a, task_of(round)))
            continue;
        bool both = t.row + GROUP_ROWS < t.n_rows;
        if (group == 0 || both)
            attend_rows<DIM>(sh, a, t, group, n, both);
        else
            pass_tiles<DIM>(sh, t, n);
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

    if (threadIdx.x < DEPTH) {
        barrier_init(&sh->k_there[threadIdx.x], 1);
        barrier_init(&sh->v_there[threadIdx.x], 1);
        barrier_init(&sh->k_left[threadIdx.x], 2 * GROUP / WARP);
        barrier_init(&sh->v_left[threadIdx.x], 2 * GROUP / WARP);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    let_next_start();
    wait_for_inputs();
    if (role == 0) {
        give_registers<COPY_REGISTERS>();
        if (threadIdx.x < WARP)
            copy_tiles<DIM>(sh, &map, a);
    } else {
        take_registers<COMPUTE_REGISTERS>();
        attend_tasks<DIM>(sh, a, role - 1);
    }
}
#endif

/* cuTensorMapEncodeTiled() of the driver, which the program is not linked with. */
PFN_cuTensorMapEncodeTiled_v12000 find_encoder()
{
    void *fn = NULL;
    cudaDriverEntryPointQueryResult found;

    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000, cudaEnableDefault,
                                         &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
        return NULL;
    return (PFN_cuTensorMapEncodeTiled_v12000)fn;
}

/* The pool as rows of K and V, in boxes of a block by PART channels.  How many blocks it has
 * is not known here: the map has all that fit an int. */
bool describe_pool(CUtensorMap *map, const bf16 *kv, int dim)
{
    static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encoder();
    const cuuint64_t size[] = { (cuuint64_t)(2 * dim), 0x7fffffff };
    const cuuint64_t stride[] = { (cuuint64_t)(4 * dim) };
    const cuuint32_t box[] = { PART, BLOCK_TOKENS }, step[] = { 1, 1 };

    return encode && encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)kv, size, stride, box,
                            step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int DIM>
void launch(struct stream *s, const CUtensorMap &map, const prefill &a)
{
    launch_early(s, "attend_dense", attend<DIM>, dim3(min(a.tasks, s->be->info.sm_count)), THREADS,
                 sizeof(shared<DIM>), map, a);
}

}

bool attend_many_rows_hopper(struct stream *s, const struct attend_dense_args *args)
{
    prefill a = {};
    CUtensorMap map;

    if (!s->be->hopper || !describe_pool(&map, args->kv, args->shape.head_dim))
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
    if (args->shape.head_dim == 128)
        launch<128>(s, map, a);
    else
        launch<64>(s, map, a);
    return true;
}
