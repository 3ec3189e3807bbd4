#ifndef KERNELS_CUDA_HOT_ROWS_CUH
#define KERNELS_CUDA_HOT_ROWS_CUH

#include "kernels/cuda/select.cuh"

/* Finding the rows of chosen tokens (hot_rows.h); shared by the kernels that do so.
 *
 * Everything here is done by all threads of a block together.  Where several blocks divide the
 * tokens of one KV head, all of them look up all its tokens and so know the same: which rows of
 * the set the step uses and how many tokens each block misses.  Hence they choose the same rows
 * to replace and each takes its part of them, without a word between them.  Only nobody may
 * write the books before everybody has read them. */

namespace hot {

using namespace sel;

/* The place of a row, as a number: below IN_SET a row of kv, counted from the head's first;
 * then a row of the set; from IN_HOST on the position of a token whose row is in the host tier
 * alone. */
static const unsigned IN_SET = 1u << 31, IN_HOST = IN_SET + HOT_MOST_ROWS + 1;

/* What one sequence and KV head have. */
struct head {
    const char *host;            /* of the head's first row in host slot 0 */
    size_t host_stride;          /* bytes */
    const int32_t *host_table;   /* [max_blocks] */
    __nv_bfloat16 *rows;         /* [n, 2 D] */
    uint16_t *row_of;            /* [P] */
    int32_t *position;           /* [n] */
    uint32_t *used;              /* [n] */
    int32_t *hand;
    unsigned step;
    int n, idle_steps;           /* rows; hot_rows.h */
    bool there;                  /* else all of the sequence is in kv */
};

template <int DIM>
static __device__ __forceinline__ head head_of(const struct hot_rows &all, int seq, int kv_head,
                                               int kv_heads, int max_blocks, int keep_tokens)
{
    int set = all.set[seq];
    size_t i = (size_t)max(set, 0) * kv_heads + kv_head, rows = i * all.rows_per_head;
    head h;

    h.host = (const char *)all.host + (size_t)kv_head * BLOCK_TOKENS * 4 * DIM;
    h.host_stride = all.host_stride;
    h.host_table = all.host_table + (size_t)seq * max_blocks;
    h.rows = (__nv_bfloat16 *)all.rows + rows * (2 * DIM);
    h.row_of = all.row_of + i * max_blocks * BLOCK_TOKENS;
    h.position = all.position + rows;
    h.used = all.used + rows;
    h.hand = all.hand + i;
    h.step = *all.step;
    h.n = all.rows_per_head;
    h.idle_steps = hot_idle_steps(h.n, keep_tokens);
    h.there = set >= 0;
    return h;
}

/* kv: the head's first row in the pool. */
template <int DIM>
static __device__ __forceinline__ const __nv_bfloat16 *row_at(const head &h,
                                                              const __nv_bfloat16 *kv,
                                                              unsigned place)
{
    if (place < IN_SET)
        return kv + (size_t)place * (2 * DIM);
    if (place < IN_HOST)
        return h.rows + (size_t)(place - IN_SET) * (2 * DIM);
    int position = (int)(place - IN_HOST);
    const char *block = h.host + (size_t)h.host_table[position / BLOCK_TOKENS] * h.host_stride;
    return (const __nv_bfloat16 *)block + position % BLOCK_TOKENS * (2 * DIM);
}

/* Whether one of a warp's n places is in the host tier alone. */
static __device__ __forceinline__ bool any_missing(const int *place, int n)
{
    int lane = threadIdx.x % WARP;

    return __any_sync(0xffffffffu, lane < n && (unsigned)place[lane] >= IN_HOST);
}

/* Bits of rows. */
static __host__ __device__ inline int words_of(int n_rows)
{
    return (n_rows + 31) / 32;
}

static __device__ __forceinline__ void clear_seen(unsigned *seen, int n_rows)
{
    for (int i = threadIdx.x; i < words_of(n_rows); i += blockDim.x)
        seen[i] = 0;
}

/* Places in the set instead of places in the host tier for those tokens that it has, whose rows
 * are marked in `seen`.  Several at once, because each takes two loads one after the other. */
static __device__ __noinline__ void find_in_set(unsigned *place, int n, const head &h,
                                                unsigned *seen)
{
    enum { AT_ONCE = 3 };

    for (int first = threadIdx.x; first < n; first += AT_ONCE * blockDim.x) {
        int position[AT_ONCE], row[AT_ONCE], there[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            int i = first + j * blockDim.x;
            position[j] = i < n && place[i] >= IN_HOST ? (int)(place[i] - IN_HOST) : -1;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            row[j] = position[j] >= 0 ? __ldcg(h.row_of + position[j]) : h.n;
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            there[j] = row[j] < h.n ? __ldcg(h.position + row[j]) : -2;
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            if (there[j] == position[j]) {
                place[first + j * blockDim.x] = IN_SET + row[j];
                atomicOr(&seen[row[j] / 32], 1u << row[j] % 32);
            }
    }
}

/* The places that are in the host tier alone, as numbers in the list, ascending; how many.
 * Synchronise before they are read. */
static __device__ __forceinline__ int list_missing(int *missing, const unsigned *place, int n,
                                                   counts *c)
{
    border b = { IN_HOST - 1, n };

    return list_chosen(missing, place, 0, n, n, b, c);
}

/* Sums over all threads, for all threads.  Synchronises the block. */
static __device__ __forceinline__ void add_up(int (&value)[3], counts *c)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;

#pragma unroll
    for (int j = 0; j < 3; j++) {
        value[j] = __reduce_add_sync(0xffffffffu, value[j]);
        if (lane == 0)
            c->warp[1][warp][j] = value[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 3; j++)
        value[j] = __reduce_add_sync(0xffffffffu, lane < n_warps ? c->warp[1][lane][j] : 0);
}

/* Rows for the `wanted` tokens that all blocks miss: hot_rows.h, rule 2.  The missing ones from
 * number `from` on are this block's n: token missing[i] of its list gets into[missing[i]].  Where
 * the hand moves.  Synchronise before, for `seen`, and after, for `into`. */
static __device__ __noinline__ int choose_rows(uint16_t *into, const int *missing, int from,
                                               int n, int wanted, const head &h,
                                               const unsigned *seen, counts *c)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    int hand = __ldcg(h.hand), chosen = 0;

#pragma unroll 1
    for (int first = 0; chosen < wanted && first < h.n; first += blockDim.x) {
        int i = first + threadIdx.x, row = hand + i;
        bool free = false;
        row -= row >= h.n ? h.n : 0;
        if (i < h.n && !(seen[row / 32] >> row % 32 & 1))
            free = __ldcg(h.position + row) < 0 ||
                   h.step - __ldcg(h.used + row) >= (unsigned)h.idle_steps;
        unsigned mask = __ballot_sync(0xffffffffu, free);
        if (lane == 0)
            c->warp[0][warp][0] = __popc(mask);
        __syncthreads();
        int part = lane < n_warps ? c->warp[0][lane][0] : 0;
        int number = chosen + __reduce_add_sync(0xffffffffu, lane < warp ? part : 0) +
                     __popc(mask & ((1u << lane) - 1));
        chosen += __reduce_add_sync(0xffffffffu, part);
        if (free && number == wanted - 1)
            c->warp[1][0][0] = row + 1 < h.n ? row + 1 : 0;
        if (free && number >= from && number < from + n)
            into[missing[number - from]] = (uint16_t)row;
        __syncthreads();
    }
    return c->warp[1][0][0];
}

/* The step uses the places of the list; the n_missing missing ones are where `into` says. */
static __device__ __forceinline__ void write_books(const unsigned *place, int n,
                                                   const int *missing, int n_missing,
                                                   const uint16_t *into, const head &h)
{
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        if (place[i] >= IN_SET && place[i] < IN_HOST)
            h.used[place[i] - IN_SET] = h.step;
#pragma unroll 1
    for (int i = threadIdx.x; i < n_missing; i += blockDim.x) {
        int row = into[missing[i]], position = (int)(place[missing[i]] - IN_HOST);
        h.row_of[position] = (uint16_t)row;
        h.position[row] = position;
        h.used[row] = h.step;
    }
}

static __device__ __forceinline__ uint64_t now_ns()
{
    uint64_t ns;

    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}

/* This thread waited so long for rows of the host tier. */
static __device__ __forceinline__ void report_stall(const struct hot_rows &all, uint64_t ns)
{
    unsigned long long value = (unsigned long long)*all.step << 32 | min(ns, (uint64_t)UINT_MAX);

    atomicMax((unsigned long long *)all.stall, value);
}

/* By one thread. */
static __device__ __forceinline__ void add_counts(const struct hot_rows &all, int hits,
                                                  int misses, int resident)
{
    unsigned long long *to = (unsigned long long *)all.counts;

    atomicAdd(to + HOT_HITS, (unsigned long long)hits);
    atomicAdd(to + HOT_MISSES, (unsigned long long)misses);
    atomicAdd(to + HOT_RESIDENT, (unsigned long long)resident);
}

}
#endif
