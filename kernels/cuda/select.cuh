#ifndef KERNELS_CUDA_SELECT_CUH
#define KERNELS_CUDA_SELECT_CUH

#include "kernels/cuda/keys.cuh"

/* Exact choice of the largest by one thread block; shared by the kernels of the two levels.
 *
 * Scores are compared as unsigned keys of the same order.  The border of the keep largest
 * is found with one histogram over the keys up to four binades below the largest, and an
 * exact ranking of the few keys in the bin where the border lies.  Where that does not work
 * (the border lies deeper, a bin has too many keys) an interval is narrowed by two bits a
 * round.
 *
 * All of this runs once in a kernel that is bound by latency, so it is as few instructions
 * as can be, executed and in memory: what is not unrolled is not so on purpose. */

namespace sel {

/* To be called, and the block synchronised, before a border is found. */
static __device__ __forceinline__ void clear_bins(counts *c)
{
    for (int i = threadIdx.x; i < BINS; i += blockDim.x)
        c->bins[i] = 0;
    if (threadIdx.x == 0)
        c->n_bin = 0;
}

/* Smallest and largest key, without the forced ones and 0, which is no key. */
static __device__ __forceinline__ void find_range(const unsigned *keys, int n, unsigned *low,
                                                  unsigned *high, counts *c)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    unsigned l = 0xffffffffu, h = 0; /* less and plus 1: 0 and the forced turn over */

#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        unsigned key = keys[i];
        l = min(l, key - 1);
        h = max(h, key + 1);
    }
    l = __reduce_min_sync(0xffffffffu, l);
    h = __reduce_max_sync(0xffffffffu, h);
    if (lane == 0) {
        c->low[warp] = l;
        c->high[warp] = h;
    }
    __syncthreads();
    *low = 1 + __reduce_min_sync(0xffffffffu, lane < n_warps ? c->low[lane] : 0xffffffffu);
    *high = __reduce_max_sync(0xffffffffu, lane < n_warps ? c->high[lane] : 0u) - 1;
}

/* The bin that holds the wanted-th largest, how many keys are in it and how many above;
 * number -1 where the bins have not so many.  Every warp finds it for itself: that is faster
 * than telling it. */
struct bin { int number, n, above; };

static __device__ __forceinline__ bin find_bin(int wanted, const counts *c)
{
    int lane = threadIdx.x % WARP, count[LANE_BINS], own = 0;
    bin b = { -1, 0, 0 };

    static_assert(LANE_BINS == 8, "two loads of four");
    *(int4 *)&count[0] = *(const int4 *)&c->bins[lane * LANE_BINS];
    *(int4 *)&count[4] = *(const int4 *)&c->bins[lane * LANE_BINS + 4];
#pragma unroll
    for (int i = 0; i < LANE_BINS; i++)
        own += count[i];
    int above = own;             /* of this lane's bins and the following lanes' */
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        int other = __shfl_down_sync(0xffffffffu, above, step);
        above += lane + step < WARP ? other : 0;
    }
    bool here = above >= wanted && above - own < wanted;
    above -= own;
#pragma unroll
    for (int i = LANE_BINS - 1; i >= 0; i--) {
        if (above < wanted && above + count[i] >= wanted) {
            b.number = lane * LANE_BINS + i;
            b.n = count[i];
            b.above = above;
        }
        above += count[i];
    }
    int from = __ffs(__ballot_sync(0xffffffffu, here)) - 1;
    if (from < 0)
        return b;
    b.number = __shfl_sync(0xffffffffu, b.number, from);
    b.n = __shfl_sync(0xffffffffu, b.n, from);
    b.above = __shfl_sync(0xffffffffu, b.above, from);
    return b;
}

/* Numbers of bins: of a key's distance from bottom the upper bits.  What is above all bins,
 * the forced keys at least, is in the last. */
struct scale { unsigned bottom; int shift; };

static __device__ __forceinline__ int bin_of(unsigned key, scale s)
{
    return min((key - s.bottom) >> s.shift, (unsigned)BINS - 1);
}

/* A scale for keys about `largest`, four binades. */
static __device__ __forceinline__ scale scale_below(unsigned largest, unsigned smallest)
{
    scale s;

    s.bottom = max(smallest, largest > BINADES ? largest - BINADES + 1 : 0);
    static_assert(BINS == 1 << 8, "8 bits of the distance are a bin");
    s.shift = max(32 - __clz(largest - s.bottom) - 8, 0);
    return s;
}

static __device__ __noinline__ unsigned border_by_bins(const unsigned *keys, int n, int keep,
                                                       int *equal, scale s, counts *c)
{
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        unsigned key = keys[i];
        if (key >= s.bottom)
            atomicAdd(&c->bins[bin_of(key, s)], 1);
    }
    __syncthreads();
    bin b = find_bin(keep, c);
    int rest = keep - b.above;
    if (b.number < 0 || b.n > BIN_KEYS)
        return narrow_border(keys, n, keep, equal, c);
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        unsigned key = keys[i];
        if (key >= s.bottom && bin_of(key, s) == b.number)
            c->bin_keys[atomicAdd(&c->n_bin, 1)] = key;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < b.n; i += blockDim.x) {
        unsigned key = c->bin_keys[i];
        int larger = 0, same = 0;
        for (int j = 0; j < b.n; j++) {
            larger += c->bin_keys[j] > key;
            same += c->bin_keys[j] == key;
        }
        if (larger < rest && larger + same >= rest) { /* equal ones write the same */
            c->border = key;
            c->equal = larger + same == rest ? n : rest - larger;
        }
    }
    __syncthreads();
    *equal = c->equal;
    return c->border;
}

/* The border of the `keep` largest of keys[0..n), 0 < keep: chosen are the keys above it
 * and the first *equal of those equal to it; all of those when *equal is n.  Where there
 * are no more than keep, the border is 1.  c->largest becomes the largest key that is not
 * forced, and stays where nobody looked. */
static __device__ __forceinline__ unsigned find_border(const unsigned *keys, int n, int keep,
                                                       int *equal, counts *c)
{
    unsigned low, high;

    *equal = n;
    if (n <= keep)
        return 1;
    find_range(keys, n, &low, &high, c);
    if (threadIdx.x == 0)
        c->largest = high;
    return border_by_bins(keys, n, keep, equal, scale_below(high, low), c);
}

/* The same where the largest key is about `largest` or below: saves a look at the keys. */
static __device__ __forceinline__ unsigned find_border_below(const unsigned *keys, int n,
                                                             int keep, unsigned largest,
                                                             int *equal, counts *c)
{
    *equal = n;
    if (n <= keep)
        return 1;
    return border_by_bins(keys, n, keep, equal, scale_below(largest, 1), c);
}

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

/* Numbers of the chosen among keys[from..to), ascending, into out; how many.  n is that of
 * all keys; 0 is no key.  A warp takes neighbouring keys, 32 a turn, and lane i remembers
 * which of turn i are chosen until it is known how many are before.  Synchronise before out
 * is read. */
static __device__ __noinline__ int list_chosen(int *out, const unsigned *keys, int from, int to,
                                               int n, border b, counts *c)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    int listed = 0;

    for (int begin = from; begin < to; begin += WARP * (int)blockDim.x) {
        int turns = min((to - begin + (int)blockDim.x - 1) / (int)blockDim.x, (int)WARP);
        int first = begin + warp * turns * WARP, own = 0;
        unsigned masks = 0;

#pragma unroll 1
        for (int i = 0; i < turns; i++) {
            int at = first + i * WARP + lane;
            unsigned key = at < to ? keys[at] : 0;
            bool mine = key > b.key || (key == b.key && key > 0);
            if (key == b.key && key > 0 && b.equal < n)
                mine = wins_tie(keys, at, b);
            unsigned chosen = __ballot_sync(0xffffffffu, mine);
            masks = lane == i ? chosen : masks;
            own += __popc(chosen);
        }
        if (begin > from)
            __syncthreads();     /* all have read what is written next */
        if (lane == 0)
            c->chosen[warp] = own;
        __syncthreads();
        int part = lane < n_warps ? c->chosen[lane] : 0;
        int at = listed + __reduce_add_sync(0xffffffffu, lane < warp ? part : 0);
        listed += __reduce_add_sync(0xffffffffu, part);
#pragma unroll 1
        for (int i = 0; i < turns; i++) {
            unsigned chosen = __shfl_sync(0xffffffffu, masks, i);
            if (chosen >> lane & 1)
                out[at + __popc(chosen & ((1u << lane) - 1))] = first + i * WARP + lane;
            at += __popc(chosen);
        }
    }
    return listed;
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

/* The kept blocks from the filter's keys in global memory, ascending, with their ids; how many.
 * Bins are clear, before and after; keys and tables are not needed any more. */
template <int THREADS>
static __device__ __forceinline__ int choose_kept(const block_lists &r, const unsigned *keys,
                                                  int n_blocks, int keep, counts *c)
{
    border b;

#pragma unroll 4
    for (int i = threadIdx.x; i < n_blocks; i += THREADS)
        r.block_keys[i] = __ldcg(keys + i);
    __syncthreads();
    b.key = find_border(r.block_keys, n_blocks, keep, &b.equal, c);
    int n_kept = list_chosen(r.kept, r.block_keys, 0, n_blocks, n_blocks, b, c);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < n_kept; i += THREADS) {
        r.records[i] = r.ids[r.kept[i]];
        r.blocks[i] = r.kv_ids[r.kept[i]];
    }
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
     * the largest but for the forced blocks. */
    unsigned largest = c->largest;
    if (largest > POSITIVE)
        b.key = find_border_below(keys, n, keep, largest + BINADE, &b.equal, c);
    else
        b.key = find_border(keys, n, keep, &b.equal, c);
    return b;
}

}
#endif
