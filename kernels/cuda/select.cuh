#ifndef KERNELS_CUDA_SELECT_CUH
#define KERNELS_CUDA_SELECT_CUH

#include "kernels/cuda/border.cuh"
#include "kernels/cuda/mma.cuh"

/* Exact choice of the largest by one thread block; shared by the kernels of the two levels.
 * Scores are compared as unsigned keys of the same order (keys.cuh). */

namespace sel {

/* What find_border() found. */
struct border { unsigned key; int equal; };

/* Of keys equal to the border the first are chosen.  Ties are rare, so whoever meets one
 * counts for itself. */
static __device__ __noinline__ bool wins_tie(const unsigned *keys, int i, border b)
{
    int before = 0;

    for (int j = 0; j < i; j++)
        before += keys[j] == b.key;
    return before < b.equal;
}

/* put(i, number) for the numbers of the chosen among keys[from..to), ascending, counted by i; how
 * many.  n is that of all keys; 0 is no key.  A warp takes neighbouring keys, 32 a turn, and lane
 * i remembers which of turn i are chosen until it is known how many are before.  Synchronise
 * before what was put is read. */
template <typename F>
static __device__ __forceinline__ int each_chosen(const unsigned *keys, int from, int to, int n,
                                                  border b, counts *c, const F &put)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    int listed = 0;

#pragma unroll 1
    for (int begin = from; begin < to; begin += WARP * (int)blockDim.x) {
        int turns = min((to - begin + (int)blockDim.x - 1) / (int)blockDim.x, (int)WARP);
        int first = begin + warp * turns * WARP, own = 0;
        unsigned masks = 0;

        auto take_turn = [&](int i, bool ties) {
            int at = first + i * WARP + lane;
            unsigned key = at < to ? keys[at] : 0;
            bool mine = key > 0 && key >= b.key;
            if (ties && key == b.key && mine)
                mine = wins_tie(keys, at, b);
            unsigned chosen = __ballot_sync(0xffffffffu, mine);
            masks = lane == i ? chosen : masks;
            own += __popc(chosen);
        };
        if (b.equal < n)
#pragma unroll 1
            for (int i = 0; i < turns; i++)
                take_turn(i, true);
        else
#pragma unroll 4
            for (int i = 0; i < turns; i++)
                take_turn(i, false);
        if (begin > from)
            __syncthreads();     /* all have read what is written next */
        if (lane == 0)
            c->chosen[warp] = own;
        __syncthreads();
        int part = lane < n_warps ? c->chosen[lane] : 0;
        int at = listed + __reduce_add_sync(0xffffffffu, lane < warp ? part : 0);
        listed += __reduce_add_sync(0xffffffffu, part);
#pragma unroll 4
        for (int i = 0; i < turns; i++) {
            unsigned chosen = __shfl_sync(0xffffffffu, masks, i);
            if (chosen >> lane & 1)
                put(at + __popc(chosen & ((1u << lane) - 1)), first + i * WARP + lane);
            at += __popc(chosen);
        }
    }
    return listed;
}

/* The numbers themselves into out. */
static __device__ __noinline__ int list_chosen(int *out, const unsigned *keys, int from, int to,
                                               int n, border b, counts *c)
{
    return each_chosen(keys, from, to, n, b, c, [&](int i, int number) { out[i] = number; });
}

/* Numbers of the `keep` largest keys, ascending, into out; all when there are no more.
 * Synchronises the block before, and after. */
static __device__ __forceinline__ int choose_top(int *out, const unsigned *keys, int n, int keep,
                                                 counts *c)
{
    border b;

    clear_bins(c);
    __syncthreads();
    b.key = find_border(keys, n, keep, &b.equal, c);
    int listed = list_chosen(out, keys, 0, n, n, b, c);
    __syncthreads();
    return listed;
}

/* Of a context's blocks, in shared memory. */
struct block_lists {
    int *kept, *records, *blocks;   /* [keep_blocks] numbers; ids in index and kv */
    unsigned *block_keys;           /* [max_blocks] */
    int *ids, *kv_ids;              /* [max_blocks] the tables */
};

/* Start copying the tables of a context; commit, and wait, before choose_kept(). */
template <int THREADS>
static __device__ __forceinline__ void start_tables(const block_lists &r,
                                                    const int32_t *index_table,
                                                    const int32_t *kv_table, int n_blocks)
{
#pragma unroll 1
    for (int i = threadIdx.x; i < n_blocks; i += THREADS) {
        copy_4(shared_address(r.ids + i), index_table + i);
        copy_4(shared_address(r.kv_ids + i), kv_table + i);
    }
}

/* The kept blocks from the filter's keys in global memory, ascending, with their ids; how many.
 * Bins are clear, before and after; keys and tables are not needed any more. */
template <int THREADS>
static __device__ __forceinline__ int choose_kept(const block_lists &r, const unsigned *keys,
                                                  int n_blocks, int keep, counts *c)
{
    border b = { 1, n_blocks };
    range seen;

#pragma unroll 4
    for (int i = threadIdx.x; i < n_blocks; i += THREADS) {
        unsigned key = __ldcg(keys + i);
        seen.add(key);
        r.block_keys[i] = key;
    }
    if (n_blocks > keep)
        b.key = find_border_within(r.block_keys, n_blocks, keep, &b.equal, seen, c);
    else
        __syncthreads();
    int n_kept = each_chosen(r.block_keys, 0, n_blocks, n_blocks, b, c, [&](int i, int block) {
        r.kept[i] = block;
        r.records[i] = r.ids[block];
        r.blocks[i] = r.kv_ids[block];
    });
    clear_bins(c);
    __syncthreads();
    return n_kept;
}

/* The border of the `keep` best of the tokens of kept blocks. */
static __device__ __forceinline__ border find_token_border(const unsigned *keys, int n, int keep,
                                                           counts *c)
{
    border b;

    /* No estimate of a token is much above the best of the filter's of its block, which is among
     * the largest but for the forced blocks.  Of a mean's tokens one may be: it is in the last
     * bin. */
    unsigned largest = c->largest;
    if (largest > POSITIVE)
        b.key = find_border_below(keys, n, keep, largest + BINADE, &b.equal, c);
    else
        b.key = find_border(keys, n, keep, &b.equal, c);
    return b;
}

}
#endif
