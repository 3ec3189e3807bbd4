/* Which experts a row takes, and with what weights.
 *
 * The scores are a product like others (linear.cu): 512 KB of weights for 128 experts of 2,048
 * inputs.  Then a warp chooses for a row, in k rounds: each lane offers the best that is left of
 * its experts, and the warp takes the best of these. */

#include "kernels/cuda/cuda.cuh"

namespace {

enum {
    WARPS = 4,                   /* rows of a thread block */
    THREADS = WARPS * WARP,
    PARTS = MOST_EXPERTS / WARP, /* experts of a lane: lane, lane + WARP, ... */
    TAKEN = 0,                   /* less than the key of any number */
};
const unsigned ALL = 0xffffffffu;

/* s of a lane's experts out of their scores. */
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

/* s and what is chosen by, of a lane's experts. */
__device__ __forceinline__ void prepare(float (&s)[PARTS], unsigned (&key)[PARTS],
                                        const struct route_args &a, const float *scores, int lane)
{
    bool soft = a.score == ROUTER_SOFTMAX;

#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        int e = lane + j * WARP;
        bool there = e < a.n_experts;
        s[j] = there ? scores[e] : 0;
        if (!soft)
            s[j] = 1 / (1 + expf(-s[j]));
        float choice = there && a.bias ? s[j] + a.bias[e] : s[j];
        key[j] = !there ? (unsigned)TAKEN : key_of(isnan(choice) ? -INFINITY : choice);
    }
    if (soft)
        softmax(s, lane, a.n_experts);
}

__global__ void __launch_bounds__(THREADS) choose(struct route_args a)
{
    int lane = threadIdx.x % WARP, row = blockIdx.x * WARPS + threadIdx.x / WARP;
    float s[PARTS], weight = 0, sum = 0;
    unsigned key[PARTS];
    int expert = -1;             /* the one that this lane writes: choice number `lane` */

    let_next_start();
    wait_for_inputs();
    if (row >= a.rows)
        return;
    if (!a.kv_block || a.kv_block[row] >= 0) {
        prepare(s, key, a, a.scores + (size_t)row * a.n_experts, lane);
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

}

void cuda_route(struct stream *s, const struct route_args *a)
{
    struct logits_args product = {};

    if (a->rows == 0)
        return;
    product.out = a->scores;
    product.x = a->x;
    product.weight = a->router;
    product.weight_type = a->router_type;
    product.rows = a->rows;
    product.dim = a->dim;
    product.vocab = a->n_experts;
    cuda_logits(s, &product);
    launch_early(s, "route", choose, dim3((a->rows + WARPS - 1) / WARPS), THREADS, 0, *a);
}
