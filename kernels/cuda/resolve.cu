/* Where the rows of chosen tokens are, for attention as an operation of its own: rows that are
 * missing are put into their set, so that all lie on the device afterwards.
 *
 * A thread block does one sequence and KV head.  What counts is the bus: 150 missing rows of
 * 512 bytes for each of 8 heads are 12 us at 50 GB/s, and 512 threads with four pieces of
 * 16 bytes on their way each have 32 KB in flight, several times what its latency holds. */

#include "kernels/cuda/hot_rows.cuh"
#include "kernels/cuda/latent.cuh"

namespace {

using namespace hot;

enum { THREADS = 512 };

struct resolution {
    const __nv_bfloat16 **rows;  /* [S, G, keep_tokens] */
    unsigned *place;             /* [S, G, keep_tokens] work space, as the next two */
    int *missing;
    uint16_t *into;
    const __nv_bfloat16 *kv;
    const int32_t *chosen, *n_chosen, *table;
    struct hot_rows hot_rows;
    int kv_heads, max_blocks, keep_tokens;
};

/* The missing rows into the set. */
template <int DIM>
__device__ __forceinline__ void fetch(const unsigned *place, const int *missing, int n,
                                      const uint16_t *into, const head &h)
{
    enum { PIECES = DIM / 4 };   /* of 16 bytes a row */

#pragma unroll 4
    for (int k = threadIdx.x; k < n * PIECES; k += THREADS) {
        int i = k / PIECES, piece = k % PIECES * 8;
        const __nv_bfloat16 *from = row_at<DIM>(h, NULL, place[missing[i]]);
        *(uint4 *)(h.rows + (size_t)into[missing[i]] * (2 * DIM) + piece) =
            __ldcg((const uint4 *)(from + piece));
    }
}

/* Grid: KV heads, sequences. */
template <int DIM>
__global__ void __launch_bounds__(THREADS) resolve(resolution a)
{
    __shared__ counts c;
    __shared__ unsigned seen[(HOT_MOST_ROWS + 31) / 32];
    int kv_head = blockIdx.x, seq = blockIdx.y;
    size_t list = (size_t)seq * a.kv_heads + kv_head;
    const int32_t *chosen = a.chosen + list * a.keep_tokens;
    const int32_t *table = a.table + (size_t)seq * a.max_blocks;
    unsigned *place = a.place + list * a.keep_tokens;
    int *missing = a.missing + list * a.keep_tokens, n = a.n_chosen[list];
    uint16_t *into = a.into + list * a.keep_tokens;
    const __nv_bfloat16 **rows = a.rows + list * a.keep_tokens;
    const __nv_bfloat16 *kv = a.kv + (size_t)kv_head * BLOCK_TOKENS * 2 * DIM;

    if (n == 0)
        return;
    head h = head_of<DIM>(a.hot_rows, seq, kv_head, a.kv_heads, a.max_blocks, a.keep_tokens);
    clear_seen(seen, h.n);
    for (int i = threadIdx.x; i < n; i += THREADS) {
        int id = table[chosen[i] / BLOCK_TOKENS];
        place[i] = id >= 0 ? (unsigned)(id * a.kv_heads * BLOCK_TOKENS + chosen[i] % BLOCK_TOKENS)
                           : IN_HOST + chosen[i];
    }
    __syncthreads();
    find_in_set(place, n, h, seen);
    __syncthreads();
    int sums[3] = { 0, 0, 0 };   /* hits, and nothing */
    for (int i = threadIdx.x; i < n; i += THREADS)
        sums[0] += place[i] >= IN_SET && place[i] < IN_HOST;
    add_up(sums, &c);
    int n_missing = list_missing(missing, place, n, &c);
    __syncthreads();
    if (n_missing > 0) {
        int hand = choose_rows(into, missing, 0, n_missing, n_missing, h, seen, &c);
        if (threadIdx.x == 0)
            *h.hand = hand;
    }
    __syncthreads();
    write_books(place, n, missing, n_missing, into, h);
    uint64_t from_ns = now_ns();
    fetch<DIM>(place, missing, n_missing, into, h);
    __syncthreads();
    if (n_missing > 0 && threadIdx.x == 0)
        report_stall(a.hot_rows, now_ns() - from_ns);
    for (int i = threadIdx.x; i < n; i += THREADS)
        rows[i] = row_at<DIM>(h, kv, place[i] < IN_HOST ? place[i] : IN_SET + into[i]);
    if (h.there && threadIdx.x == 0)
        add_counts(a.hot_rows, sums[0], n_missing, n - n_missing - sums[0]);
}

}

void cuda_resolve(struct stream *s, const struct resolve_args *args)
{
    resolution a = {};
    dim3 grid(args->shape.kv_heads, args->seqs);

    a.rows = (const __nv_bfloat16 **)args->rows;
    a.place = args->place;
    a.missing = args->missing;
    a.into = args->into;
    a.kv = (const __nv_bfloat16 *)args->kv;
    a.chosen = args->chosen;
    a.n_chosen = args->n_chosen;
    a.table = args->table;
    a.hot_rows = *args->hot;
    a.kv_heads = args->shape.kv_heads;
    a.max_blocks = args->max_blocks;
    a.keep_tokens = args->keep_tokens;
    if (latent::is_latent(&args->shape))
        resolve<latent::D / 2><<<grid, THREADS, 0, s->cu>>>(a);
    else if (args->shape.head_dim == 128)
        resolve<128><<<grid, THREADS, 0, s->cu>>>(a);
    else
        resolve<64><<<grid, THREADS, 0, s->cu>>>(a);
    stream_note(s, "attend_two_level");
}
