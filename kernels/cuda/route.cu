/* Which experts a row takes, and with what weights.
 *
 * The scores are a product of few outputs: 512 KB of weights for 128 experts of 2,048 inputs, which
 * memory has in less than a microsecond.  What takes time is waiting, for a launch, for the first
 * weights, for one load after another.  So a decode step's rows have one kernel: a thread block
 * makes the scores of OUTPUTS experts with all of its loads on the way at the same time, those of
 * the weights before the kernel waits for its inputs, and the last block to end chooses.  Its sums
 * are made in the order of linear.cu.  More rows, and weights in float32, have that file's product
 * and then a kernel that chooses.
 *
 * A warp chooses for a row, in k rounds: each lane offers the best that is left of its experts, and
 * the warp takes the best of these.  The kernels are made for several numbers of experts to a lane:
 * 15 that are not there cost as much as 15 that are. */

#include "kernels/cuda/mma.cuh"

namespace {

enum {
    WARPS = 8,                   /* rows of a thread block that chooses */
    THREADS = WARPS * WARP,
    MOST_PARTS = MOST_EXPERTS / WARP, /* experts of a lane: lane, lane + WARP, ... */
    TAKEN = 0,                   /* less than the key of any number */
    OUTPUTS = 8,                 /* scores of a row that a thread block makes */
    COLUMNS = 8,                 /* rows of x to a product: columns of the right operand */
    FEW_ROWS = 2 * COLUMNS,
    STEP = 64,                   /* inputs a warp takes at a time */
    STEP_LOADS = STEP / 32,      /* 16-byte loads of each thread in it, from one row */
    MOST_ROUNDS = 4,             /* steps of a warp that are on the way together, of few rows */
};
const unsigned ALL = 0xffffffffu;

/* ---- the choice */

/* s of a lane's experts out of their scores. */
template <int PARTS>
__device__ __forceinline__ void softmax(float (&s)[PARTS], int lane, int n)
{
    float most = -INFINITY, sum = 0;

#pragma unroll
    for (int j = 0; j < PARTS; j++)
        if (lane + j * WARP < n)
            most = fmaxf(most, s[j]);
    most = warp_max(most);
#pragma unroll
    for (int j = 0; j < PARTS; j++)
        if (lane + j * WARP < n) {
            s[j] = expf(s[j] - most);
            sum += s[j];
        }
    sum = warp_sum(sum);
#pragma unroll
    for (int j = 0; j < PARTS; j++)
        s[j] /= sum;
}

/* Of a lane's experts. */
template <int PARTS>
__device__ __forceinline__ void load_bias(float (&bias)[PARTS], const struct route_args &a,
                                          int lane)
{
#pragma unroll
    for (int j = 0; j < PARTS; j++)
        bias[j] = a.bias && lane + j * WARP < a.n_experts ? a.bias[lane + j * WARP] : 0;
}

/* Whether nobody's.  Blocks come from the host, and so this is known before a kernel's inputs. */
__device__ __forceinline__ bool is_padding(const struct route_args &a, int row)
{
    return a.kv_block && row < a.rows && a.kv_block[row] < 0;
}

/* s and what is chosen by, of a lane's experts. */
template <int PARTS>
__device__ __forceinline__ void prepare(float (&s)[PARTS], unsigned (&key)[PARTS],
                                        const struct route_args &a, const float (&bias)[PARTS],
                                        const float *scores, int lane)
{
    bool soft = a.score == ROUTER_SOFTMAX;

#pragma unroll
    for (int j = 0; j < PARTS; j++)
        s[j] = lane + j * WARP < a.n_experts ? __ldcg(scores + lane + j * WARP) : 0;
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        bool there = lane + j * WARP < a.n_experts;
        if (!soft)
            s[j] = 1 / (1 + expf(-s[j]));
        float choice = a.bias ? s[j] + bias[j] : s[j];
        key[j] = !there ? (unsigned)TAKEN : key_of(isnan(choice) ? -INFINITY : choice);
    }
    if (soft)
        softmax(s, lane, a.n_experts);
}

/* By a warp. */
template <int PARTS>
__device__ __forceinline__ void choose_row(const struct route_args &a,
                                           const float (&bias)[PARTS], bool padding, int row,
                                           int lane)
{
    float s[PARTS], weight = 0, sum = 0;
    unsigned key[PARTS];
    int expert = -1;             /* the one that this lane writes: choice number `lane` */

    if (!padding) {
        prepare(s, key, a, bias, a.scores + (size_t)row * a.n_experts, lane);
        for (int i = 0; i < a.n_chosen; i++) {
            unsigned best = TAKEN, at = 0;
            float best_s = 0;
#pragma unroll
            for (int j = 0; j < PARTS; j++)
                if (key[j] > best) {
                    best = key[j];
                    at = lane + j * WARP;
                    best_s = s[j];
                }
            unsigned most = __reduce_max_sync(ALL, best);
            unsigned winner = __reduce_min_sync(ALL, best == most ? at : ALL);
            float winner_s = __shfl_sync(ALL, best_s, winner % WARP);
#pragma unroll
            for (int j = 0; j < PARTS; j++)
                if (winner == lane + j * WARP)
                    key[j] = TAKEN;
            sum += winner_s;
            if (lane == i) {
                expert = winner;
                weight = winner_s;
            }
        }
        weight = (a.renormalise ? weight / (sum + 1e-20f) : weight) * a.scale;
    }
    if (lane < a.n_chosen) {
        a.experts[(size_t)row * a.n_chosen + lane] = expert;
        a.weights[(size_t)row * a.n_chosen + lane] = expert < 0 ? 0 : weight;
    }
}

template <int PARTS>
__global__ void __launch_bounds__(THREADS) choose(struct route_args a)
{
    int lane = threadIdx.x % WARP, row = blockIdx.x * WARPS + threadIdx.x / WARP;
    float bias[PARTS];

    load_bias(bias, a, lane);
    bool padding = is_padding(a, row);
    let_next_start();
    wait_for_inputs();
    if (row < a.rows)
        choose_row(a, bias, padding, row, lane);
}

/* ---- few rows: product and choice */

/* Grid: experts / OUTPUTS.  Warps take every WARPS-th step of the inputs, and their sums are added
 * in the order of the warps: a score does not depend on the number of rows.  Without the second
 * launch bound the compiler saves registers, and each load waits for the product before it. */
template <int COLUMN_TILES, int PARTS>
__global__ void __launch_bounds__(THREADS, 1) route_few(struct route_args a, unsigned *arrived)
{
    enum { ROUNDS = MOST_ROUNDS / COLUMN_TILES };
    __shared__ float part[WARPS][COLUMN_TILES * COLUMNS][OUTPUTS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, c = lane % 4;
    int first = blockIdx.x * OUTPUTS;
    const __nv_bfloat16 *x = (const __nv_bfloat16 *)a.x;
    const __nv_bfloat16 *router = (const __nv_bfloat16 *)a.router +
                                  (size_t)min(first + g, a.n_experts - 1) * a.dim;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    uint4 w[ROUNDS][STEP_LOADS];
    float acc[COLUMN_TILES][4] = {}, bias[PARTS];
    bool padding[COLUMN_TILES];

    static_assert(WARPS == COLUMNS, "a warp chooses for a row of each tile");
    auto load = [&](int from) {
#pragma unroll
        for (int round = 0; round < ROUNDS; round++)
#pragma unroll
            for (int i = 0; i < STEP_LOADS; i++) {
                int at = from + round * WARPS * STEP + i * 32 + c * 8;
                w[round][i] = at < a.dim ? load_weights(router + at) : zero;
            }
    };
    load(warp * STEP);           /* while earlier kernels finish */
    load_bias(bias, a, lane);
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
        padding[n] = is_padding(a, n * COLUMNS + warp);
    let_next_start();
    wait_for_inputs();
    for (int from = warp * STEP; from < a.dim; from += ROUNDS * WARPS * STEP) {
        uint4 in[COLUMN_TILES][ROUNDS][STEP_LOADS];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int round = 0; round < ROUNDS; round++)
#pragma unroll
                for (int i = 0; i < STEP_LOADS; i++) {
                    int row = n * COLUMNS + g, at = from + round * WARPS * STEP + i * 32 + c * 8;
                    bool there = row < a.rows && at < a.dim;
                    in[n][round][i] = there ? *(const uint4 *)(x + (size_t)row * a.dim + at)
                                            : zero;
                }
#pragma unroll
        for (int round = 0; round < ROUNDS; round++)
#pragma unroll
            for (int i = 0; i < STEP_LOADS; i++) {
                const uint4 v = w[round][i];
                const unsigned low[4] = { v.x, 0, v.y, 0 }, high[4] = { v.z, 0, v.w, 0 };
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; n++) {
                    mma_bf16(acc[n], low, in[n][round][i].x, in[n][round][i].y);
                    mma_bf16(acc[n], high, in[n][round][i].z, in[n][round][i].w);
                }
            }
        load(from + ROUNDS * WARPS * STEP);
    }
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            part[warp][n * COLUMNS + 2 * c + i][g] = acc[n][i];
    __syncthreads();
    int row = threadIdx.x / OUTPUTS, out = threadIdx.x % OUTPUTS;
    if (row < a.rows && first + out < a.n_experts) {
        float sum = 0;
        for (int i = 0; i < WARPS; i++)
            sum += part[i][row][out];
        a.scores[(size_t)row * a.n_experts + first + out] = sum;
    }
    if (!last_to_arrive(arrived, gridDim.x))
        return;
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
        if (n * COLUMNS + warp < a.rows)
            choose_row(a, bias, padding[n], n * COLUMNS + warp, lane);
}

template <int PARTS>
void launch(struct stream *s, const struct route_args &a)
{
    struct logits_args product = {};

    if (a.rows <= FEW_ROWS && a.router_type == DTYPE_BF16) {
        launch_early(s, "route", a.rows <= COLUMNS ? route_few<1, PARTS> : route_few<2, PARTS>,
                     dim3((a.n_experts + OUTPUTS - 1) / OUTPUTS), THREADS, 0, a, s->arrived);
        return;
    }
    product.out = a.scores;
    product.x = a.x;
    product.weight = a.router;
    product.weight_type = a.router_type;
    product.rows = a.rows;
    product.dim = a.dim;
    product.vocab = a.n_experts;
    cuda_logits(s, &product);
    launch_early(s, "route", choose<PARTS>, dim3((a.rows + WARPS - 1) / WARPS), THREADS, 0, a);
}

}

void cuda_route(struct stream *s, const struct route_args *a)
{
    if (a->rows == 0)
        return;
    if (a->n_experts <= 2 * WARP)
        launch<2>(s, *a);
    else if (a->n_experts <= 4 * WARP)
        launch<4>(s, *a);
    else
        launch<MOST_PARTS>(s, *a);
}
