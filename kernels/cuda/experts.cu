/* The experts of a mixture, up to 16 rows, and the choice between the ways to compute them.
 *
 * A step of decodes reads the weights of the experts that any of its rows chose, each once: at
 * batch 1 of Qwen3-30B-A3B 8 experts of 128, 75 MB of a layer's 1.2 GB, 23 us at 3.3 TB/s.  Two
 * kernels.
 *
 *   gated   a thread block for 8 outputs of gate and up of one pair's expert; of the pairs that
 *           share an expert the first does it, for all of their rows.  At batch 1 those are 768
 *           thread blocks that read 64 KB each.
 *   down    a thread block for 8 outputs of all experts, whose products are added in it in the
 *           order of each row's choices.  So every expert is read once, and no result passes
 *           through memory that another thread block must wait for.  A warp takes one expert (or
 *           a fixed part of its inputs where a row has fewer experts than there are warps).
 *
 * Rows are columns of the tensor-core products as in linear.cu, zero where a row did not choose the
 * expert: a column's result depends on no other, nor on how many rows there are. */

#include "kernels/cuda/experts.cuh"
#include "kernels/cuda/mma.cuh"

namespace {

enum {
    THREADS = 256,
    WARPS = THREADS / WARP,
    HALF = 8,                    /* outputs of a thread block */
    COLUMNS = 8,                 /* rows of x to a product: columns of the right operand */
    STEP = 64,                   /* inputs a warp takes at a time */
    STEP_LOADS = STEP / 32,      /* 16-byte loads of each thread in it, from one row */
    POINTERS_A_LINE = 128 / sizeof(void *),
};
static_assert(FEW_EXPERT_ROWS * MOST_CHOSEN <= THREADS, "a thread for each pair");
const unsigned ALL = 0xffffffffu;

struct few {
    struct experts_args a;
    __nv_bfloat16 *mid;          /* [T * k, I] */
};

/* Weights stream through the second-level cache and leave no table there: ask for it in time. */
__device__ __forceinline__ void fetch_table(const void *const *table, int n)
{
    int at = threadIdx.x * POINTERS_A_LINE;

    if (at < n)
        fetch_line(table + at);
}

__device__ __forceinline__ uint4 load_if(bool there, const __nv_bfloat16 *from)
{
    return there ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ uint4 load_weights_if(bool there, const __nv_bfloat16 *from)
{
    return there ? load_weights(from) : make_uint4(0, 0, 0, 0);
}

/* One load of 16 bytes of each operand is two products: the order of inputs is free.  `low` is of
 * the row g of the left operand, `high` of g + HALF. */
__device__ __forceinline__ void multiply(float (&acc)[4], const uint4 &low, const uint4 &high,
                                         const uint4 &x)
{
    const unsigned a[4] = { low.x, high.x, low.y, high.y };
    const unsigned b[4] = { low.z, high.z, low.w, high.w };

    mma_bf16(acc, a, x.x, x.y);
    mma_bf16(acc, b, x.z, x.w);
}

/* ---- gate, up and activation.  Grid: I / HALF, pairs */

/* Whether no earlier pair has this pair's expert; then pair_of says which pair of each row does, or
 * -1.  To be called by all threads. */
__device__ __forceinline__ bool own_expert(int (&pair_of)[FEW_EXPERT_ROWS],
                                           const struct experts_args &a, int pair, int expert)
{
    int thread = threadIdx.x, pairs = a.rows * a.n_chosen;
    int own = thread < pairs ? a.experts[thread] : -1;

    if (thread < FEW_EXPERT_ROWS)
        pair_of[thread] = -1;
    if (__syncthreads_or(expert < 0 || (thread < pair && own == expert)))
        return false;
    if (own == expert)
        pair_of[thread / a.n_chosen] = thread;
    __syncthreads();
    return true;
}

/* The left operand's rows 0 to 7 are the gate's, 8 to 15 the same of up. */
template <int COLUMN_TILES>
__global__ void __launch_bounds__(THREADS, 3) gated(few f)
{
    __shared__ float part[WARPS][COLUMN_TILES * COLUMNS][2 * HALF];
    __shared__ int pair_of[FEW_EXPERT_ROWS];
    const struct experts_args &a = f.a;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, c = lane % 4;
    int first = blockIdx.x * HALF, pair = blockIdx.y;

    fetch_table(a.matrices.gate, a.n_experts);
    fetch_table(a.matrices.up, a.n_experts);
    /* In this order: down() counts on what lies before this kernel to have ended when it starts. */
    wait_for_inputs();
    let_next_start();
    int expert = a.experts[pair];
    if (!own_expert(pair_of, a, pair, expert))
        return;
    size_t at_row = (size_t)(first + g) * a.dim;
    const __nv_bfloat16 *gate = (const __nv_bfloat16 *)a.matrices.gate[expert] + at_row;
    const __nv_bfloat16 *up = (const __nv_bfloat16 *)a.matrices.up[expert] + at_row;
    float acc[COLUMN_TILES][4] = {};
    uint4 low[STEP_LOADS], high[STEP_LOADS];
    bool chosen[COLUMN_TILES];
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
        chosen[n] = pair_of[n * COLUMNS + g] >= 0;
#pragma unroll
    for (int i = 0; i < STEP_LOADS; i++) {
        int at = warp * STEP + i * 32 + c * 8;
        low[i] = load_weights_if(at < a.dim, gate + at);
        high[i] = load_weights_if(at < a.dim, up + at);
    }
    for (int from = warp * STEP; from < a.dim; from += WARPS * STEP) {
        uint4 x[COLUMN_TILES][STEP_LOADS], now_low[STEP_LOADS], now_high[STEP_LOADS];
#pragma unroll
        for (int i = 0; i < STEP_LOADS; i++) {
            int at = from + i * 32 + c * 8, next = at + WARPS * STEP;
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++)
                x[n][i] = load_if(chosen[n] && at < a.dim, (const __nv_bfloat16 *)a.x +
                                  (size_t)(n * COLUMNS + g) * a.dim + at);
            now_low[i] = low[i];
            now_high[i] = high[i];
            low[i] = load_weights_if(next < a.dim, gate + next);
            high[i] = load_weights_if(next < a.dim, up + next);
        }
#pragma unroll
        for (int i = 0; i < STEP_LOADS; i++)
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++)
                multiply(acc[n], now_low[i], now_high[i], x[n][i]);
    }
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            part[warp][n * COLUMNS + 2 * c + i % 2][g + i / 2 * HALF] = acc[n][i];
    __syncthreads();
    int column = threadIdx.x / HALF, out = threadIdx.x % HALF;
    if (column >= COLUMN_TILES * COLUMNS || pair_of[column] < 0)
        return;
    float sum[2] = {};           /* in the order of the warps */
    for (int k = 0; k < WARPS; k++) {
        sum[0] += part[k][column][out];
        sum[1] += part[k][column][HALF + out];
    }
    f.mid[(size_t)pair_of[column] * a.expert_dim + first + out] =
        __float2bfloat16_rn(silu_mul(sum[0], sum[1]));
}

/* ---- down and the weighted sum.  Grid: M / HALF */

struct down_smem {
    float terms[THREADS][HALF];  /* [pair * slices + slice] */
    int ids[THREADS];            /* [pairs] experts */
    int first_pair[MOST_EXPERTS];
    int experts[THREADS];        /* each that was chosen, once */
    int n_of_warp[WARPS];
};

/* Parts that the inputs of an expert are cut into, so that a row alone keeps all warps busy. */
__device__ __forceinline__ int slices_of(int n_chosen)
{
    return n_chosen >= 8 ? 1 : n_chosen >= 4 ? 2 : n_chosen >= 2 ? 4 : 8;
}

/* Fill ids and experts; the number of the latter. */
__device__ __forceinline__ int list_experts(struct down_smem *sh, const struct experts_args &a)
{
    int thread = threadIdx.x, warp = thread / WARP, pairs = a.rows * a.n_chosen, before = 0, n = 0;
    int own = thread < pairs ? __ldcg(a.experts + thread) : -1;

    sh->ids[thread] = own;
    for (int e = thread; e < a.n_experts; e += THREADS)
        sh->first_pair[e] = THREADS;
    __syncthreads();
    if (own >= 0)
        atomicMin(&sh->first_pair[own], thread);
    __syncthreads();
    bool first = own >= 0 && sh->first_pair[own] == thread;
    unsigned mask = __ballot_sync(ALL, first);
    if (thread % WARP == 0)
        sh->n_of_warp[warp] = __popc(mask);
    __syncthreads();
    for (int i = 0; i < WARPS; i++) {
        before += i < warp ? sh->n_of_warp[i] : 0;
        n += sh->n_of_warp[i];
    }
    if (first)
        sh->experts[before + __popc(mask & ((1u << thread % WARP) - 1))] = own;
    __syncthreads();
    return n;
}

/* Lane `row` returns the pair of that row which has the expert, or -1. */
__device__ __forceinline__ int find_pair(const struct down_smem *sh, const struct experts_args &a,
                                         int expert, int lane)
{
    int found = -1;

    if (lane < a.rows)
        for (int i = 0; i < a.n_chosen; i++)
            if (sh->ids[lane * a.n_chosen + i] == expert)
                found = lane * a.n_chosen + i;
    return found;
}

/* out of a row from the terms of its pairs. */
__device__ __forceinline__ void add_terms(const struct down_smem *sh, const struct experts_args &a,
                                          int row, int out, int at, int slices)
{
    size_t to = (size_t)row * a.dim + at;
    float sum = a.add ? __bfloat162float(((const __nv_bfloat16 *)a.add)[to]) : 0;

    for (int pair = row * a.n_chosen; pair < (row + 1) * a.n_chosen; pair++) {
        if (sh->ids[pair] < 0)
            continue;
        float term = 0;
        for (int slice = 0; slice < slices; slice++)
            term += sh->terms[pair * slices + slice][out];
        sum += a.weights[pair] * term;
    }
    ((__nv_bfloat16 *)a.out)[to] = __float2bfloat16_rn(sum);
}

/* STEPS: taken at a time; their weights are on the way together. */
template <int COLUMN_TILES, int STEPS>
__global__ void __launch_bounds__(THREADS, 2) down(few f)
{
    enum { LOADS = STEPS * STEP_LOADS, CHUNK = STEPS * STEP };
    __shared__ struct down_smem sh;
    const struct experts_args &a = f.a;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, c = lane % 4;
    int first = blockIdx.x * HALF, slices = slices_of(a.n_chosen);
    int slice_dim = (a.expert_dim + slices * STEP - 1) / (slices * STEP) * STEP;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    bool waited = false;

    fetch_table(a.matrices.down, a.n_experts);
    /* What was chosen was there before gated() started: weights can come while that ends. */
    int n_units = list_experts(&sh, a) * slices;
    for (int unit = warp; unit < n_units; unit += WARPS) {
        int expert = sh.experts[unit / slices], slice = unit % slices;
        int end = min(a.expert_dim, (slice + 1) * slice_dim);
        const __nv_bfloat16 *weight = (const __nv_bfloat16 *)a.matrices.down[expert] +
                                      (size_t)(first + g) * a.expert_dim;
        int found = find_pair(&sh, a, expert, lane);
        float acc[COLUMN_TILES][4] = {};
        for (int from = slice * slice_dim; from < end; from += CHUNK) {
            uint4 w[LOADS], x[COLUMN_TILES][LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                int at = from + i * 32 + c * 8;
                w[i] = load_weights_if(at < end, weight + at);
            }
            if (!waited)
                wait_for_inputs();
            waited = true;
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
                int pair = __shfl_sync(ALL, found, n * COLUMNS + g);
#pragma unroll
                for (int i = 0; i < LOADS; i++) {
                    int at = from + i * 32 + c * 8;
                    x[n][i] = load_if(pair >= 0 && at < end,
                                      f.mid + (size_t)max(pair, 0) * a.expert_dim + at);
                }
            }
#pragma unroll
            for (int i = 0; i < LOADS; i++)
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; n++)
                    multiply(acc[n], w[i], zero, x[n][i]);
        }
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int pair = __shfl_sync(ALL, found, n * COLUMNS + 2 * c + i);
                if (pair >= 0)
                    sh.terms[pair * slices + slice][g] = acc[n][i];
            }
    }
    if (!waited)
        wait_for_inputs();
    let_next_start();
    __syncthreads();
    int row = threadIdx.x / HALF, out = threadIdx.x % HALF;
    if (row < a.rows)
        add_terms(&sh, a, row, out, first + out, slices);
}

template <int COLUMN_TILES, int STEPS>
void launch(struct stream *s, const few &f)
{
    const struct experts_args &a = f.a;

    launch_early(s, "experts", gated<COLUMN_TILES>,
                 dim3(a.expert_dim / HALF, a.rows * a.n_chosen), THREADS, 0, f);
    launch_early(s, "experts", down<COLUMN_TILES, STEPS>, dim3(a.dim / HALF), THREADS, 0, f);
}

/* ---- memory */

struct carver {
    char *base;
    size_t at;
};

void *carve(carver *c, size_t n, size_t bytes)
{
    void *p = c->base ? c->base + c->at : NULL;

    c->at += (n * bytes + 255) / 256 * 256;
    return p;
}

}

struct experts_memory experts_memory_of(void *base, const struct experts_shape *shape)
{
    size_t pairs = (size_t)shape->max_rows * shape->n_chosen;
    /* Fewer rows may have smaller tiles, but no more of them than this. */
    size_t tiles = pairs / 32 + shape->n_experts;
    carver c = { (char *)base, 0 };
    struct experts_memory m = {};

    m.mid = (__nv_bfloat16 *)carve(&c, pairs * shape->expert_dim, sizeof *m.mid);
    m.terms = (__nv_bfloat16 *)carve(&c, pairs * shape->dim, sizeof *m.terms);
    m.order = (int *)carve(&c, pairs, sizeof *m.order);
    m.tiles = (struct expert_tile *)carve(&c, tiles, sizeof *m.tiles);
    m.n_tiles = (int *)carve(&c, 1, sizeof *m.n_tiles);
    m.bytes = c.at;
    return m;
}

size_t cuda_experts_scratch(const struct experts_shape *shape)
{
    return experts_memory_of(NULL, shape).bytes;
}

void cuda_experts_few(struct stream *s, const struct experts_args *a)
{
    few f = { *a, (__nv_bfloat16 *)a->scratch };

    if (a->rows <= COLUMNS)
        launch<1, 4>(s, f);
    else
        launch<2, 2>(s, f);
}

void cuda_experts(struct stream *s, const struct experts_args *a)
{
    if (a->rows == 0)
        return;
    if (a->matrices.type == DTYPE_F32)
        cuda_experts_float(s, a);
    else if (a->rows <= FEW_EXPERT_ROWS)
        cuda_experts_few(s, a);
    else
        cuda_experts_many(s, a);
}
