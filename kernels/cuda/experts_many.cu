/* The experts of a mixture for prompts, and for float32 weights.
 *
 * Pairs of a row and one of its experts are sorted by expert on the device, and cut into tiles of
 * one expert's rows.  Then gate, up and activation of each tile, down of each tile, and the sum of
 * each row's pairs.  The grid of the products is for as many tiles as there can be, and those that
 * are not there end at once: nothing depends on the host, so that a step of many decodes can be
 * recorded.
 *
 * A product is bound by the tensor cores from some 100 rows an expert on, and below by reading all
 * experts once.  A thread block of 8 warps makes 128 outputs (64 of gate and the same 64 of up) of
 * a tile of 32, 64 or 128 rows, in steps of 64 inputs that come through STAGES buffers in shared
 * memory.  A row's result does not depend on its tile, nor on the size of the tiles. */

#include "kernels/cuda/experts.cuh"
#include "kernels/cuda/mma.cuh"

namespace {

enum {
    THREADS = 256,
    WARPS = THREADS / WARP,
    STAGES = 3,
    STEP = 64,                   /* inputs of a stage */
    CHUNK = 8,                   /* bf16 in a copy of 16 bytes */
    CHUNKS = STEP / CHUNK,       /* of a row in a stage */
    OUTS = 128,                  /* outputs of a tile, gate's and up's together */
    WARPS_ACROSS = 4,            /* warps for the outputs; two for the rows */
    WARP_OUTS = OUTS / WARPS_ACROSS,
    MMA_ROWS = 16,
    MMA_OUTS = 8,
    VECTOR = 8,
};
const unsigned ALL = 0xffffffffu;

/* ---- sorting.  Grid: experts */

struct sorting {
    const int *experts;          /* [pairs], -1: of a padded row */
    int *order;
    struct expert_tile *tiles;
    int *n_tiles;
    int pairs, n_experts, tile_rows;
};

/* How many pairs each expert has. */
__device__ __forceinline__ void count_pairs(int (&count)[MOST_EXPERTS], const sorting &a)
{
    for (int e = threadIdx.x; e < a.n_experts; e += THREADS)
        count[e] = 0;
    __syncthreads();
    for (int pair = threadIdx.x; pair < a.pairs; pair += THREADS) {
        int e = a.experts[pair];
        if (e >= 0)
            atomicAdd(&count[e], 1);
    }
    __syncthreads();
}

/* Write the numbers of this expert's pairs, ascending, from `to` on. */
__device__ __forceinline__ void place_pairs(const sorting &a, int expert, int *to)
{
    __shared__ int of_warp[2][WARPS];    /* of alternate rounds: one barrier for each */
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, round = 0;

    for (int from = 0; from < a.pairs; from += THREADS, round ^= 1) {
        int pair = from + threadIdx.x, before = 0, all = 0;
        bool own = pair < a.pairs && a.experts[pair] == expert;
        unsigned mask = __ballot_sync(ALL, own);
        if (lane == 0)
            of_warp[round][warp] = __popc(mask);
        __syncthreads();
        for (int i = 0; i < WARPS; i++) {
            before += i < warp ? of_warp[round][i] : 0;
            all += of_warp[round][i];
        }
        if (own)
            to[before + __popc(mask & ((1u << lane) - 1))] = pair;
        to += all;
    }
}

/* A thread block for each expert: all count, so that none waits for another. */
__global__ void __launch_bounds__(THREADS) sort_pairs(sorting a)
{
    __shared__ int count[MOST_EXPERTS];
    __shared__ int first, first_tile, all_tiles;
    int own = blockIdx.x;

    let_next_start();
    wait_for_inputs();
    if (threadIdx.x == 0)
        first = first_tile = all_tiles = 0;
    count_pairs(count, a);
    for (int e = threadIdx.x; e < a.n_experts; e += THREADS) {
        int tiles = (count[e] + a.tile_rows - 1) / a.tile_rows;
        atomicAdd(&all_tiles, tiles);
        if (e < own) {
            atomicAdd(&first, count[e]);
            atomicAdd(&first_tile, tiles);
        }
    }
    __syncthreads();
    if (own == 0 && threadIdx.x == 0)
        *a.n_tiles = all_tiles;
    for (int i = threadIdx.x * a.tile_rows; i < count[own]; i += THREADS * a.tile_rows) {
        struct expert_tile t = { own, first + i, min(count[own] - i, a.tile_rows) };
        a.tiles[first_tile + i / a.tile_rows] = t;
    }
    if (count[own] > 0)
        place_pairs(a, own, a.order + first);
}

/* ---- products of tiles.  Grid: outputs / (OUTS or half of it), tiles */

struct grouped {
    const __nv_bfloat16 *x;      /* gated: [T, in_dim]; else [pairs, in_dim] sorted */
    __nv_bfloat16 *out;          /* gated: [pairs, out_dim] sorted; else [pairs, out_dim] */
    const void *const *weight;   /* [E] of [out_dim, in_dim] */
    const void *const *up;       /* gated: the same of up */
    const int *order;            /* [pairs] */
    const struct expert_tile *tiles;
    const int *n_tiles;
    int in_dim, out_dim, n_chosen;
};

/* A row of shared memory has STEP inputs; its 16-byte chunks are exchanged so that eight rows'
 * equal chunks lie in different banks. */
__device__ __forceinline__ unsigned chunk_address(unsigned base, int row, int chunk)
{
    return base + (unsigned)(row * STEP * 2 + (chunk ^ row % CHUNKS) * 16);
}

/* Where one thread copies from: the same chunk of every THREADS / CHUNKS-th row. */
template <int ROWS>
struct copies {
    enum { N = ROWS * CHUNKS / THREADS };
    const __nv_bfloat16 *from[N];/* its row, from the chunk on; NULL: zeros */
};

template <int ROWS>
__device__ __forceinline__ void start_copies(unsigned to, const copies<ROWS> &c, int from,
                                             int in_dim, const __nv_bfloat16 *anything)
{
    int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
    bool inside = from + chunk * CHUNK < in_dim;

#pragma unroll
    for (int i = 0; i < copies<ROWS>::N; i++) {
        bool there = inside && c.from[i];
        copy_16(chunk_address(to, row + i * (THREADS / CHUNKS), chunk),
                there ? c.from[i] + from : anything, there);
    }
}

/* The row of weights that is row i of a tile's right operand.  GATED: of each warp's rows the
 * first half is the gate's and the second the same rows of up.  NULL: there is none. */
template <bool GATED>
__device__ __forceinline__ const __nv_bfloat16 *weight_row(const grouped &a, int expert, int i)
{
    enum { HALF = WARP_OUTS / 2 };
    bool up = GATED && i % WARP_OUTS >= HALF;
    int row = GATED ? blockIdx.x * (OUTS / 2) + i / WARP_OUTS * HALF + i % HALF
                    : blockIdx.x * OUTS + i;
    const void *matrix = up ? a.up[expert] : a.weight[expert];

    return row < a.out_dim ? (const __nv_bfloat16 *)matrix + (size_t)row * a.in_dim : NULL;
}

/* One stage's products of a warp: MT * 16 rows by WARP_OUTS outputs. */
template <int MT>
__device__ __forceinline__ void multiply_stage(float (&acc)[MT][WARP_OUTS / MMA_OUTS][4],
                                               unsigned x, unsigned w, int first_row,
                                               int first_out)
{
    int lane = threadIdx.x % WARP;

#pragma unroll
    for (int k = 0; k < STEP / 16; k++) {
        unsigned left[MT][4], right[WARP_OUTS / 16][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
            load_matrices(left[m], chunk_address(x, first_row + m * MMA_ROWS + lane % 16,
                                                 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < WARP_OUTS / 16; n++)
            load_matrices(right[n],
                          chunk_address(w, first_out + n * 16 + lane % 8 + lane / 16 * 8,
                                        2 * k + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < WARP_OUTS / MMA_OUTS; n++)
                mma_bf16(acc[m][n], left[m], right[n / 2][n % 2 * 2], right[n / 2][n % 2 * 2 + 1]);
    }
}

/* A row's results of a warp: with GATED the first half of them are the gate's. */
template <bool GATED, int MT>
__device__ __forceinline__ void store_row(const grouped &a, size_t to, int warp_across,
                                          const float (&acc)[WARP_OUTS / MMA_OUTS][4], int half)
{
    enum { N = WARP_OUTS / MMA_OUTS };
    int c = threadIdx.x % 4;

#pragma unroll
    for (int n = 0; n < (GATED ? N / 2 : N); n++) {
        int out = (GATED ? blockIdx.x * (OUTS / 2) + warp_across * (WARP_OUTS / 2)
                         : blockIdx.x * OUTS + warp_across * WARP_OUTS) + n * MMA_OUTS + 2 * c;
        if (out >= a.out_dim)
            continue;
        float2 v = make_float2(acc[n][2 * half], acc[n][2 * half + 1]);
        if (GATED) {
            v.x = silu_mul(v.x, acc[n + N / 2][2 * half]);
            v.y = silu_mul(v.y, acc[n + N / 2][2 * half + 1]);
        }
        *(unsigned *)(a.out + to * a.out_dim + out) = pack_bf16(v.x, v.y);
    }
}

/* MT: tiles of 16 rows to a warp, and 2 * MT * 16 rows to the thread block. */
template <int MT, bool GATED>
__global__ void __launch_bounds__(THREADS, 2) multiply_tiles(grouped a)
{
    enum { ROWS = 2 * MT * MMA_ROWS, X_BYTES = ROWS * STEP * 2, BYTES = X_BYTES + OUTS * STEP * 2 };
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ int pairs[ROWS];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, across = warp % WARPS_ACROSS;
    int first_row = warp / WARPS_ACROSS * MT * MMA_ROWS;
    int chunk = threadIdx.x % CHUNKS * CHUNK;
    unsigned base = shared_address(memory);
    copies<ROWS> x;
    copies<OUTS> w;
    float acc[MT][WARP_OUTS / MMA_OUTS][4] = {};

    let_next_start();
    wait_for_inputs();
    if (blockIdx.y >= *a.n_tiles)
        return;
    struct expert_tile t = a.tiles[blockIdx.y];
    for (int r = threadIdx.x; r < ROWS; r += THREADS)
        pairs[r] = r < t.n ? a.order[t.first + r] : -1;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < copies<ROWS>::N; i++) {
        int r = threadIdx.x / CHUNKS + i * (THREADS / CHUNKS);
        size_t row = GATED ? pairs[r] / a.n_chosen : t.first + r;
        x.from[i] = r < t.n ? a.x + row * a.in_dim + chunk : NULL;
    }
#pragma unroll
    for (int i = 0; i < copies<OUTS>::N; i++) {
        w.from[i] = weight_row<GATED>(a, t.expert,
                                      threadIdx.x / CHUNKS + i * (THREADS / CHUNKS));
        w.from[i] = w.from[i] ? w.from[i] + chunk : NULL;
    }

    int n_steps = (a.in_dim + STEP - 1) / STEP;
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < n_steps) {
            start_copies(base + step * BYTES, x, step * STEP, a.in_dim, a.x);
            start_copies(base + step * BYTES + X_BYTES, w, step * STEP, a.in_dim, a.x);
        }
        copy_commit();
    }
    for (int step = 0; step < n_steps; step++) {
        int next = step + STAGES - 1;
        copy_wait<STAGES - 2>();
        __syncthreads();         /* all see the step, and are done with the one before it */
        if (next < n_steps) {
            unsigned to = base + next % STAGES * BYTES;
            start_copies(to, x, next * STEP, a.in_dim, a.x);
            start_copies(to + X_BYTES, w, next * STEP, a.in_dim, a.x);
        }
        copy_commit();
        unsigned stage = base + step % STAGES * BYTES;
        multiply_stage<MT>(acc, stage, stage + X_BYTES, first_row, across * WARP_OUTS);
    }
#pragma unroll
    for (int m = 0; m < MT; m++)
        for (int half = 0; half < 2; half++) {
            int r = first_row + m * MMA_ROWS + half * 8 + lane / 4;
            if (r < t.n)
                store_row<GATED, MT>(a, GATED ? t.first + r : pairs[r], across, acc[m], half);
        }
}

template <int MT, bool GATED>
void launch_tiles(struct stream *s, const grouped &a, int most_tiles)
{
    enum { ROWS = 2 * MT * MMA_ROWS, PER_BLOCK = GATED ? OUTS / 2 : OUTS };

    launch_early(s, "experts", multiply_tiles<MT, GATED>,
                 dim3((a.out_dim + PER_BLOCK - 1) / PER_BLOCK, most_tiles), THREADS,
                 (size_t)STAGES * (ROWS + OUTS) * STEP * 2, a);
}

template <bool GATED>
void multiply_grouped(struct stream *s, const grouped &a, int tile_rows, int most_tiles)
{
    if (tile_rows == 128)
        launch_tiles<4, GATED>(s, a, most_tiles);
    else if (tile_rows == 64)
        launch_tiles<2, GATED>(s, a, most_tiles);
    else
        launch_tiles<1, GATED>(s, a, most_tiles);
}

/* ---- the sum */

struct summing {
    struct experts_args a;
    const __nv_bfloat16 *terms;  /* [pairs, M] */
};

__device__ __forceinline__ void unpack(float (&v)[VECTOR], const __nv_bfloat16 *from)
{
    uint4 u = *(const uint4 *)from;
    const unsigned words[4] = { u.x, u.y, u.z, u.w };

#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 f = unpack_bf16(words[i]);
        v[2 * i] = f.x;
        v[2 * i + 1] = f.y;
    }
}

/* A thread makes VECTOR elements of a row. */
__global__ void __launch_bounds__(THREADS) add_terms(summing f)
{
    const struct experts_args &a = f.a;
    size_t at = ((size_t)blockIdx.x * THREADS + threadIdx.x) * VECTOR;
    float sum[VECTOR] = {}, term[VECTOR];

    let_next_start();
    wait_for_inputs();
    if (at >= (size_t)a.rows * a.dim)
        return;
    size_t row = at / a.dim, column = at % a.dim;
    if (a.add)
        unpack(sum, (const __nv_bfloat16 *)a.add + at);
    for (size_t pair = row * a.n_chosen; pair < (row + 1) * a.n_chosen; pair++) {
        if (a.experts[pair] < 0)
            continue;
        float weight = a.weights[pair];
        unpack(term, f.terms + pair * a.dim + column);
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
            sum[i] += weight * term[i];
    }
    *(uint4 *)((__nv_bfloat16 *)a.out + at) =
        make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]),
                   pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7]));
}

void launch_sum(struct stream *s, const struct experts_args *a, const __nv_bfloat16 *terms)
{
    summing f = { *a, terms };
    size_t vectors = (size_t)a->rows * a->dim / VECTOR;

    launch_early(s, "experts", add_terms, dim3((unsigned)((vectors + THREADS - 1) / THREADS)),
                 THREADS, 0, f);
}

struct experts_memory memory_of(const struct experts_args *a)
{
    struct experts_shape shape = { a->rows, a->dim, a->expert_dim, a->n_experts, a->n_chosen };

    return experts_memory_of(a->scratch, &shape);
}

/* ---- float32 weights: a warp for each output of each pair.  Grid: pairs, outputs / WARPS */

struct plain {
    const __nv_bfloat16 *x;      /* gated: [T, in_dim]; else [pairs, in_dim] */
    __nv_bfloat16 *out;          /* [pairs, out_dim] */
    const int *experts;          /* [pairs] */
    const void *const *weight, *const *up; /* [E]; up is NULL where there is no gate */
    int in_dim, out_dim, n_chosen;
};

__global__ void __launch_bounds__(THREADS) multiply_float(plain a)
{
    int pair = blockIdx.x, out = blockIdx.y * WARPS + threadIdx.x / WARP;
    float gate = 0, up = 0;

    let_next_start();
    wait_for_inputs();
    int expert = a.experts[pair];
    if (expert < 0 || out >= a.out_dim)
        return;
    const __nv_bfloat16 *x = a.x + (size_t)(a.up ? pair / a.n_chosen : pair) * a.in_dim;
    const float *w = (const float *)a.weight[expert] + (size_t)out * a.in_dim;
    const float *u = a.up ? (const float *)a.up[expert] + (size_t)out * a.in_dim : NULL;
    for (int i = threadIdx.x % WARP; i < a.in_dim; i += WARP) {
        float v = __bfloat162float(x[i]);
        gate += w[i] * v;
        if (u)
            up += u[i] * v;
    }
    gate = warp_sum(gate);
    up = warp_sum(up);
    if (threadIdx.x % WARP == 0)
        a.out[(size_t)pair * a.out_dim + out] =
            __float2bfloat16_rn(u ? silu_mul(gate, up) : gate);
}

}

void cuda_experts_many(struct stream *s, const struct experts_args *a)
{
    const int pairs = a->rows * a->n_chosen, tile_rows = experts_tile_rows(pairs, a->n_experts);
    const int most_tiles = experts_most_tiles(pairs, a->n_experts, tile_rows);
    struct experts_memory m = memory_of(a);
    sorting sort = { a->experts, m.order, m.tiles, m.n_tiles, pairs, a->n_experts, tile_rows };
    grouped product = {};

    launch_early(s, "experts", sort_pairs, dim3(a->n_experts), THREADS, 0, sort);
    product.order = m.order;
    product.tiles = m.tiles;
    product.n_tiles = m.n_tiles;
    product.n_chosen = a->n_chosen;
    product.x = (const __nv_bfloat16 *)a->x;
    product.out = m.mid;
    product.weight = a->matrices.gate;
    product.up = a->matrices.up;
    product.in_dim = a->dim;
    product.out_dim = a->expert_dim;
    multiply_grouped<true>(s, product, tile_rows, most_tiles);
    product.x = m.mid;
    product.out = m.terms;
    product.weight = a->matrices.down;
    product.up = NULL;
    product.in_dim = a->expert_dim;
    product.out_dim = a->dim;
    multiply_grouped<false>(s, product, tile_rows, most_tiles);
    launch_sum(s, a, m.terms);
}

void cuda_experts_float(struct stream *s, const struct experts_args *a)
{
    const int pairs = a->rows * a->n_chosen;
    struct experts_memory m = memory_of(a);
    plain gated = { (const __nv_bfloat16 *)a->x, m.mid, a->experts, a->matrices.gate,
                    a->matrices.up, a->dim, a->expert_dim, a->n_chosen };
    plain down = { m.mid, m.terms, a->experts, a->matrices.down, NULL, a->expert_dim, a->dim,
                   a->n_chosen };

    launch_early(s, "experts", multiply_float,
                 dim3(pairs, (gated.out_dim + WARPS - 1) / WARPS), THREADS, 0, gated);
    launch_early(s, "experts", multiply_float,
                 dim3(pairs, (down.out_dim + WARPS - 1) / WARPS), THREADS, 0, down);
    launch_sum(s, a, m.terms);
}
