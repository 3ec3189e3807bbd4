/* Blocks kept one step late (lagged_blocks.h): trades what the filter kept for what it kept in the
 * step before.
 *
 * A thread block does one sequence and KV head, and is small: it reads and writes two lists of
 * keep_blocks numbers.  The list to choose from is three stretches one after the other, so each of
 * its entries is computed by itself.
 *
 * The fused kernels choose blocks by the filter's keys.  Here they find keys that leave them no
 * choice: the largest for each block of the list, and 0, which is no key, for all others.  Without
 * a list that counts the keys stay as they are, and so does every bit of the result.  That costs a
 * launch and one more choice of blocks a layer, which could be saved by choosing the next step's
 * blocks while this one's tokens are scored; but then the fused kernels would need variants of
 * their own, and lagging is there to be measured. */

#include "kernels/cuda/lag.cuh"
#include "kernels/cuda/select.cuh"

namespace {

using namespace sel;

enum { THREADS = 256 };

struct lag {
    struct lagged_blocks lagged;
    const int32_t *n_tokens;
    int kv_heads, keep_blocks, sink_tokens, recent_tokens;
};

/* One sequence and KV head. */
struct unit {
    size_t list;                 /* number in [S, G] */
    int n_tokens;
    bool stores, counts;         /* it has a slot; the list in it counts */
    int32_t *stored;             /* in the slot, as the next two */
    int32_t *n_stored, *stored_for;
};

__device__ unit find_unit(const lag &a)
{
    int kv_head = blockIdx.x, seq = blockIdx.y, slot = a.lagged.slot[seq];
    unit u = {};

    u.list = (size_t)seq * a.kv_heads + kv_head;
    u.n_tokens = a.n_tokens[seq];
    u.stores = slot >= 0 && u.n_tokens > 0;
    if (!u.stores)
        return u;
    size_t at = (size_t)slot * a.kv_heads + kv_head;
    u.stored = a.lagged.kept + at * a.keep_blocks;
    u.n_stored = a.lagged.n_kept + at;
    u.stored_for = a.lagged.n_tokens + at;
    u.counts = *u.stored_for == u.n_tokens - 1;
    return u;
}

/* By all threads, of a list that counts. */
__device__ lagged_merge merge(const lag &a, const unit &u)
{
    struct forced_blocks f = find_forced_blocks(u.n_tokens, a.sink_tokens, a.recent_tokens);
    int n = *u.n_stored, below_sinks = 0, below_recent = 0;

    for (int from = 0; from < n; from += THREADS) {
        int i = from + threadIdx.x, block = i < n ? u.stored[i] : f.n;
        below_sinks += __syncthreads_count(block < f.sinks);
        below_recent += __syncthreads_count(block < f.recent);
    }
    return merge_lagged(f, below_sinks, below_recent, a.keep_blocks);
}

/* When all threads have read what is stored. */
__device__ void store(const lag &a, const unit &u, const int32_t *kept, int n_kept)
{
    for (int i = threadIdx.x; i < a.keep_blocks; i += THREADS)
        u.stored[i] = i < n_kept ? kept[i] : -1;
    if (threadIdx.x == 0) {
        *u.n_stored = n_kept;
        *u.stored_for = u.n_tokens;
    }
}

/* Grid: KV heads, sequences, as of the next. */
__global__ void __launch_bounds__(THREADS) swap_lists(lag a, lag_lists lists)
{
    unit u = find_unit(a);
    const int32_t *kept = lists.kept + u.list * a.keep_blocks;
    int32_t *from = lists.from + u.list * a.keep_blocks;
    int n_kept = u.n_tokens > 0 ? lists.n_kept[u.list] : 0, n = n_kept;

    if (u.counts) {
        lagged_merge m = merge(a, u);
        n = m.n;
        for (int i = threadIdx.x; i < n; i += THREADS)
            from[i] = merged_block(m, u.stored, i);
    } else {
        for (int i = threadIdx.x; i < n; i += THREADS)
            from[i] = kept[i];
    }
    for (int i = n + threadIdx.x; i < a.keep_blocks; i += THREADS)
        from[i] = -1;
    if (threadIdx.x == 0)
        lists.n_from[u.list] = n;
    __syncthreads();             /* all have read what is stored */
    if (u.stores)
        store(a, u, kept, n_kept);
}

/* The filter's keys are read when the filter has ended; and the kernel after this one, which reads
 * what came before the filter, starts only then. */
__global__ void __launch_bounds__(THREADS) swap_keys(lag a, unsigned *keys, int32_t *kept,
                                                     int max_blocks)
{
    __shared__ counts c;

    wait_for_inputs();
    let_next_start();
    unit u = find_unit(a);
    if (!u.stores)
        return;
    int n_blocks = (u.n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    keys += u.list * max_blocks;
    kept += u.list * a.keep_blocks;
    int n_kept = choose_top(kept, keys, n_blocks, a.keep_blocks, &c);
    if (u.counts) {
        lagged_merge m = merge(a, u);
        for (int i = threadIdx.x; i < n_blocks; i += THREADS)
            keys[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < m.n; i += THREADS)
            keys[merged_block(m, u.stored, i)] = (unsigned)FORCED_KEY;
    }
    __syncthreads();             /* all have read what is stored */
    store(a, u, kept, n_kept);
}

lag arguments(const struct attend_two_level_args *args)
{
    lag a = {};

    a.lagged = *args->lagged;
    a.n_tokens = args->n_tokens;
    a.kv_heads = args->shape.kv_heads;
    a.keep_blocks = args->keep_blocks;
    a.sink_tokens = args->sink_tokens;
    a.recent_tokens = args->recent_tokens;
    return a;
}

}

void queue_lag_lists(struct stream *s, const struct attend_two_level_args *a,
                     const struct lag_lists &lists)
{
    swap_lists<<<dim3(a->shape.kv_heads, a->seqs), THREADS, 0, s->cu>>>(arguments(a), lists);
    stream_note(s, "attend_two_level");
}

void queue_lag_keys(struct stream *s, const struct attend_two_level_args *a, unsigned *keys,
                    int32_t *kept)
{
    launch_early(s, "attend_two_level", swap_keys, dim3(a->shape.kv_heads, a->seqs), THREADS, 0,
                 arguments(a), keys, kept, a->max_blocks);
}
