#ifndef KERNELS_CUDA_SELECT_CUH
#define KERNELS_CUDA_SELECT_CUH

#include "kernels/cuda/cuda.cuh"

/* Exact choice of the largest by one thread block; shared by the kernels of the two levels.
 *
 * Scores are compared as unsigned keys of the same order.  The border of the keep largest
 * is found with one histogram, its bins linear between the smallest and the largest
 * score because scores share their leading bits, and an exact ranking of the few keys in
 * the bin where the border lies.  Where that does not work (scores that are infinite or
 * all alike, a bin with too many keys) an interval is narrowed by two bits a round. */

namespace sel {

enum { FORCED_KEY = -1 };        /* as unsigned: above every score */

static __device__ __forceinline__ unsigned key_of(float score)
{
    unsigned u = __float_as_uint(score + 0.0f); /* -0 is 0 */

    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

static __device__ __forceinline__ float score_of(unsigned key)
{
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

enum { BINS = 1024, BIN_KEYS = 256, MAX_WARPS = 16 };

/* Per-block memory of the functions below. */
struct counts {
    int warp[2][MAX_WARPS][3];   /* two sets by turns save a barrier a round */
    unsigned low[MAX_WARPS], high[MAX_WARPS], border;
    int forced[MAX_WARPS], above[MAX_WARPS];
    int bin, bin_above, n_bin, equal;
    int bins[BINS];
    unsigned bin_keys[BIN_KEYS];
};

/* Smallest and largest key, without the forced ones and 0, which is no key; how many are
 * forced, and keys at all.  Clears the bins. */
static __device__ __forceinline__ void find_range(const unsigned *keys, int n, unsigned *low,
                                                  unsigned *high, int *n_forced, int *n_keys,
                                                  counts *c)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    unsigned l = 0xffffffffu, h = 0;
    int forced = 0, some = 0;

    for (int i = threadIdx.x; i < BINS; i += blockDim.x)
        c->bins[i] = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        unsigned key = keys[i];
        bool is_forced = key == (unsigned)FORCED_KEY;
        some += key > 0;
        forced += is_forced;
        l = min(l, key > 0 && !is_forced ? key : 0xffffffffu);
        h = max(h, is_forced ? 0 : key);
    }
    l = __reduce_min_sync(0xffffffffu, l);
    h = __reduce_max_sync(0xffffffffu, h);
    forced = __reduce_add_sync(0xffffffffu, forced);
    some = __reduce_add_sync(0xffffffffu, some);
    if (lane == 0) {
        c->low[warp] = l;
        c->high[warp] = h;
        c->forced[warp] = forced;
        c->above[warp] = some;
        c->n_bin = 0;
    }
    __syncthreads();
    *low = __reduce_min_sync(0xffffffffu, lane < n_warps ? c->low[lane] : 0xffffffffu);
    *high = __reduce_max_sync(0xffffffffu, lane < n_warps ? c->high[lane] : 0u);
    *n_forced = __reduce_add_sync(0xffffffffu, lane < n_warps ? c->forced[lane] : 0);
    *n_keys = __reduce_add_sync(0xffffffffu, lane < n_warps ? c->above[lane] : 0);
}

/* The bin that holds the border: that of the wanted-th largest. */
static __device__ __forceinline__ void find_bin(int wanted, counts *c)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    int per_thread = BINS / (n_warps * WARP), own = 0;
    int first = threadIdx.x * per_thread; /* bins of a thread, warp: neighbours */

    for (int i = 0; i < per_thread; i++)
        own += c->bins[first + i];
    int above = own;             /* of this thread's bins and the following lanes' */
    for (int step = 1; step < WARP; step *= 2) {
        int other = __shfl_down_sync(0xffffffffu, above, step);
        above += lane + step < WARP ? other : 0;
    }
    if (lane == 0)
        c->above[warp] = above;
    __syncthreads();
    above += __reduce_add_sync(0xffffffffu,
                               lane > warp && lane < n_warps ? c->above[lane] : 0);
    above -= own;
    for (int i = per_thread - 1; i >= 0; i--) {
        int count = c->bins[first + i];
        if (above < wanted && above + count >= wanted) {
            c->bin = first + i;
            c->bin_above = above;
        }
        above += count;
    }
    __syncthreads();
}

/* How many of keys[0..n) are >= each border; for all threads. */
static __device__ __forceinline__ void count_above(const unsigned *keys, int n,
                                                   const unsigned border[3], int total[3],
                                                   counts *c, int turn)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    int own[3] = { 0, 0, 0 };

    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        unsigned key = keys[i];
        own[0] += key >= border[0];
        own[1] += key >= border[1];
        own[2] += key >= border[2];
    }
    for (int j = 0; j < 3; j++) {
        own[j] = __reduce_add_sync(0xffffffffu, own[j]);
        if (lane == 0)
            c->warp[turn][warp][j] = own[j];
    }
    __syncthreads();
    for (int j = 0; j < 3; j++) {
        int part = lane < n_warps ? c->warp[turn][lane][j] : 0;
        total[j] = __reduce_add_sync(0xffffffffu, part);
    }
}

static __device__ __noinline__ unsigned narrow_border(const unsigned *keys, int n, int keep,
                                                      int *equal, counts *c)
{
    unsigned low = 0, size = 1u << 30; /* the border is in [low, low + 4 size) */
    int above = 0;                     /* keys >= low + 4 size */

    for (int round = 0;; round++, size >>= 2) {
        unsigned border[3] = { low + size, low + 2 * size, low + 3 * size };
        int total[3];
        count_above(keys, n, border, total, c, round & 1);
        int j = total[2] >= keep ? 3 : total[1] >= keep ? 2 : total[0] >= keep ? 1 : 0;
        if (j < 3)
            above = total[j];
        if (j > 0) {
            low = border[j - 1];
            if (total[j - 1] == keep) {
                *equal = n;
                return low;
            }
        }
        if (size == 1) {
            *equal = keep - above;
            return low;
        }
    }
}

static __device__ __forceinline__ int bin_of(unsigned key, float bottom, float per_width)
{
    return min((int)((score_of(key) - bottom) * per_width), BINS - 1);
}

/* The border of the `keep` largest of keys[0..n), 0 < keep: chosen are the keys above it
 * and the first *equal of those equal to it; all of those when *equal is n.  Where there
 * are no more than keep, the border is 1. */
static __device__ __noinline__ unsigned find_border(const unsigned *keys, int n, int keep,
                                                       int *equal, counts *c)
{
    unsigned low, high;
    int n_forced, n_keys;

    find_range(keys, n, &low, &high, &n_forced, &n_keys, c);
    *equal = n;
    if (n_keys <= keep)
        return 1;
    int wanted = keep - n_forced;
    float bottom = score_of(low), per_width = BINS / (score_of(high) - bottom);
    if (wanted <= 0 || !(per_width > 0) || !(per_width < INFINITY))
        return narrow_border(keys, n, keep, equal, c);
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        unsigned key = keys[i];
        if (key > 0 && key != (unsigned)FORCED_KEY)
            atomicAdd(&c->bins[bin_of(key, bottom, per_width)], 1);
    }
    __syncthreads();
    find_bin(wanted, c);
    int bin = c->bin, in_bin = c->bins[bin], rest = wanted - c->bin_above;
    if (in_bin > BIN_KEYS)
        return narrow_border(keys, n, keep, equal, c);
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        unsigned key = keys[i];
        if (key > 0 && key != (unsigned)FORCED_KEY && bin_of(key, bottom, per_width) == bin)
            c->bin_keys[atomicAdd(&c->n_bin, 1)] = key;
    }
    __syncthreads();
    if (threadIdx.x < in_bin) {
        unsigned key = c->bin_keys[threadIdx.x];
        int larger = 0, same = 0;
        for (int j = 0; j < in_bin; j++) {
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

/* Where keys stand for: their own number, or, in parts by the thread blocks of a cluster,
 * blocks of the context or tokens of kept blocks (two_level.cu). */
struct key_order {
    enum { PLAIN, BLOCKS, TOKENS } kind;
    int part, size;              /* keys of a thread block; thread blocks */
    int together;                /* blocks that go to the same thread block in a row */
    const int *kept;             /* [n_kept] blocks, for TOKENS */
    int n_kept;

    __device__ int place(int key) const
    {
        int own = key % part, rank = key / part;

        if (kind == PLAIN)
            return key;
        if (kind == BLOCKS)
            return (own / together * size + rank) * together + own % together;
        int slot = own / BLOCK_TOKENS * size + rank;
        return slot < n_kept ? kept[slot] * BLOCK_TOKENS + own % BLOCK_TOKENS : INT32_MAX;
    }
};

/* What find_border() found. */
struct border { unsigned key; int equal; };

/* Of keys equal to the border the first in the order of places are chosen.  Ties are rare,
 * so whoever meets one counts for itself. */
static __device__ __noinline__ bool wins_tie(const unsigned *keys, int i, int n, border b,
                                             const key_order &order)
{
    int before = 0;

    for (int j = 0; j < n; j++)
        before += keys[j] == b.key && order.place(j) < order.place(i);
    return before < b.equal;
}

/* Numbers of the chosen among keys[from..to), ascending, into out; how many.  n is that of
 * all keys; 0 is no key.  Synchronises the block before and after. */
static __device__ __noinline__ int list_chosen(int *out, const unsigned *keys, int from, int to,
                                               int n, border b, const key_order &order,
                                               counts *c)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    int stretch = (to - from + (int)blockDim.x - 1) / (int)blockDim.x * WARP;
    int first = from + warp * stretch, end = min(first + stretch, to), own = 0;

    for (int pass = 0, at = 0, total = 0;; pass++) {
#pragma unroll 1
        for (int i = first; i < end; i += WARP) {
            unsigned key = i + lane < end ? keys[i + lane] : 0;
            bool mine = key > b.key || (key == b.key && key > 0 && b.equal >= n);
            if (key == b.key && key > 0 && b.equal < n)
                mine = wins_tie(keys, i + lane, n, b, order);
            unsigned chosen = __ballot_sync(0xffffffffu, mine);
            if (pass == 1 && mine)
                out[at + __popc(chosen & ((1u << lane) - 1))] = i + lane;
            own += __popc(chosen);
            at += __popc(chosen);
        }
        __syncthreads();
        if (pass == 1)
            return total;
        if (lane == 0)
            c->above[warp] = own;
        __syncthreads();
        int part = lane < n_warps ? c->above[lane] : 0;
        at = __reduce_add_sync(0xffffffffu, lane < warp ? part : 0);
        total = __reduce_add_sync(0xffffffffu, part);
    }
}

/* Numbers of the `keep` largest keys, ascending, into out; all when there are no more. */
static __device__ __forceinline__ int choose_top(int *out, const unsigned *keys, int n, int keep,
                                                 counts *c)
{
    key_order order = {};
    border b;

    __syncthreads();
    order.part = order.size = 1;
    b.key = find_border(keys, n, keep, &b.equal, c);
    return list_chosen(out, keys, 0, n, n, b, order, c);
}

}
#endif
