#ifndef KERNELS_CUDA_BORDER_CUH
#define KERNELS_CUDA_BORDER_CUH

#include "kernels/cuda/keys.cuh"

/* The border of the largest of some keys, by one thread block, exactly.
 *
 * It is found with one histogram over the keys up to four binades below the largest, and an
 * exact ranking of the few keys in the bin where the border lies.  Where that does not work
 * (the border lies deeper, a bin has too many keys) an interval is narrowed by two bits a
 * round.
 *
 * All of this runs once in a kernel that is bound by latency: few instructions one after the
 * other, and no branch between loads that could be on their way together. */

namespace sel {

/* To be called, and the block synchronised, before a border is found. */
static __device__ __forceinline__ void clear_bins(counts *c)
{
    for (int i = threadIdx.x; i < BINS; i += blockDim.x)
        c->bins[i] = 0;
    if (threadIdx.x == 0)
        c->n_bin = 0;
}

/* Smallest and largest of the keys that a thread has seen, without the forced ones and 0, which
 * is no key. */
struct range {
    unsigned less = 0xffffffffu, more = 0; /* less and plus 1: 0 and the forced turn over */

    __device__ __forceinline__ void add(unsigned key)
    {
        less = min(less, key - 1);
        more = max(more, key + 1);
    }
};

/* Those of all threads; synchronises the block. */
static __device__ __forceinline__ void join_ranges(range r, unsigned *low, unsigned *high,
                                                   counts *c)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    unsigned l = __reduce_min_sync(0xffffffffu, r.less);
    unsigned h = __reduce_max_sync(0xffffffffu, r.more);

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

    s.bottom = max(max(smallest, 1u), largest > BINADES ? largest - BINADES + 1 : 0);
    static_assert(BINS == 1 << 8, "8 bits of the distance are a bin");
    s.shift = max(32 - __clz(largest - s.bottom) - 8, 0);
    return s;
}

/* Without a branch, so that several keys are on their way. */
static __device__ __forceinline__ void fill_bins(const unsigned *keys, int n, scale s, counts *c)
{
    enum { AT_ONCE = 4 };

#pragma unroll 1
    for (int from = threadIdx.x; from < n; from += AT_ONCE * (int)blockDim.x) {
        unsigned key[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int at = from + i * (int)blockDim.x;
            key[i] = keys[min(at, n - 1)];
            key[i] = at < n ? key[i] : 0;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            atomicAdd(&c->bins[key[i] >= s.bottom ? bin_of(key[i], s) : (int)BINS], 1);
    }
}

/* The keys of bin `number` to c->bin_keys, in any order.  A warp takes a few of its keys at a time,
 * which go to neighbouring places: one addition for all of them. */
static __device__ __forceinline__ void collect_bin(const unsigned *keys, int n, int number,
                                                   scale s, counts *c)
{
    enum { AT_ONCE = 4 };
    int lane = threadIdx.x % WARP;

#pragma unroll 1
    for (int from = threadIdx.x - lane; from < n; from += AT_ONCE * (int)blockDim.x) {
        unsigned key[AT_ONCE], here[AT_ONCE];
        int found = 0, to = 0;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int at = from + i * (int)blockDim.x + lane;
            key[i] = at < n ? keys[at] : 0;
            here[i] = __ballot_sync(0xffffffffu, at < n && key[i] >= s.bottom &&
                                                 bin_of(key[i], s) == number);
            found += __popc(here[i]);
        }
        if (found == 0)
            continue;
        if (lane == 0)
            to = atomicAdd(&c->n_bin, found);
        to = __shfl_sync(0xffffffffu, to, 0);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (here[i] >> lane & 1)
                c->bin_keys[to + __popc(here[i] & ((1u << lane) - 1))] = key[i];
            to += __popc(here[i]);
        }
    }
}

/* c->border and c->equal: of the n keys in c->bin_keys the wanted-th largest.  Four lanes a key. */
static __device__ __forceinline__ void rank_bin(int n, int wanted, int all, counts *c)
{
    enum { LANES = 4 };
    int lane = threadIdx.x % WARP;

#pragma unroll 1
    for (int first = (threadIdx.x - lane) / LANES; first < n; first += (int)blockDim.x / LANES) {
        int i = first + lane / LANES;
        unsigned key = i < n ? c->bin_keys[i] : 0;
        int larger = 0, same = 0;
#pragma unroll 4
        for (int j = lane % LANES; j < n; j += LANES) {
            unsigned other = c->bin_keys[j];
            larger += other > key;
            same += other == key;
        }
        int both = larger << 16 | same;
        both += __shfl_xor_sync(0xffffffffu, both, 1);
        both += __shfl_xor_sync(0xffffffffu, both, 2);
        larger = both >> 16;
        same = both & 0xffff;
        if (i < n && larger < wanted && larger + same >= wanted) { /* equal ones write the same */
            c->border = key;
            c->equal = larger + same == wanted ? all : wanted - larger;
        }
    }
}

static __device__ __noinline__ unsigned border_by_bins(const unsigned *keys, int n, int keep,
                                                       int *equal, scale s, counts *c)
{
    fill_bins(keys, n, s, c);
    __syncthreads();
    bin b = find_bin(keep, c);
    if (b.number < 0 || b.n > BIN_KEYS)
        return narrow_border(keys, n, keep, equal, c);
    collect_bin(keys, n, b.number, s, c);
    __syncthreads();
    rank_bin(b.n, keep - b.above, n, c);
    __syncthreads();
    *equal = c->equal;
    return c->border;
}

/* As below, of more than keep keys; r is the thread's part of their range. */
static __device__ __forceinline__ unsigned find_border_within(const unsigned *keys, int n,
                                                              int keep, int *equal, range r,
                                                              counts *c)
{
    unsigned low, high;

    join_ranges(r, &low, &high, c);
    if (threadIdx.x == 0)
        c->largest = high;
    return border_by_bins(keys, n, keep, equal, scale_below(high, low), c);
}

/* The border of the `keep` largest of keys[0..n), 0 < keep: chosen are the keys above it
 * and the first *equal of those equal to it; all of those when *equal is n.  Where there
 * are no more than keep, the border is 1.  c->largest becomes the largest key that is not
 * forced, and stays where nobody looked. */
static __device__ __forceinline__ unsigned find_border(const unsigned *keys, int n, int keep,
                                                       int *equal, counts *c)
{
    range r;

    *equal = n;
    if (n <= keep)
        return 1;
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        r.add(keys[i]);
    return find_border_within(keys, n, keep, equal, r, c);
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

}
#endif
