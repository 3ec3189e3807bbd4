/* Rows of latent attention: the norm of their latent part, the rotation of their rope part and of
 * the queries', their index.
 *
 * A warp takes the rope part of one head's query, or the whole row of a token. */

#include "kernels/cuda/latent.cuh"
#include "kernels/cuda/rotate.cuh"

namespace {

using namespace latent;

enum { WARPS = 4, PARTS = L / WARP };

/* Rope parts: lane l has channels l and l + 32. */
__device__ __forceinline__ void turn(float (&x)[2], const float *cos_sin, bool interleaved)
{
    int lane = threadIdx.x % WARP;

    if (!interleaved) {
        float c = cos_sin[lane], s = cos_sin[lane + P / 2], a = x[0], b = x[1];
        x[0] = a * c - b * s;
        x[1] = b * c + a * s;
        return;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int pair = (lane + WARP * i) / 2;
        float c = cos_sin[pair], s = cos_sin[pair + P / 2];
        float other = __shfl_xor_sync(0xffffffffu, x[i], 1);
        x[i] = lane % 2 ? x[i] * c + other * s : x[i] * c - other * s;
    }
}

__device__ __forceinline__ __nv_bfloat16 *row_at(const struct latent_store_args &a, int row)
{
    return (__nv_bfloat16 *)a.pool +
           ((size_t)a.kv_block[row] * BLOCK_TOKENS + a.positions[row] % BLOCK_TOKENS) * D;
}

__device__ __forceinline__ uint8_t *record_at(const struct latent_store_args &a, int row)
{
    return a.index + (size_t)a.index_block[row] * index_block_bytes(&a.shape);
}

__device__ __forceinline__ void store_row(const struct latent_store_args &a, int row,
                                          const float (&norm)[PARTS])
{
    int lane = threadIdx.x % WARP, token = a.positions[row] % BLOCK_TOKENS;
    const __nv_bfloat16 *from = (const __nv_bfloat16 *)a.kv + (size_t)row * a.kv_stride;
    __nv_bfloat16 *to = row_at(a, row);
    uint8_t *record = record_at(a, row);
    struct index_layout layout = index_layout(&a.shape);
    float x[PARTS], rope[P / WARP];

#pragma unroll
    for (int i = 0; i < PARTS; i++)
        x[i] = __bfloat162float(from[lane + WARP * i]);
#pragma unroll
    for (int i = 0; i < P / WARP; i++)
        rope[i] = __bfloat162float(from[L + lane + WARP * i]);
    float factor = rsqrtf(mean_square(x) + a.eps);
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        __nv_bfloat16 stored = __float2bfloat16_rn(x[i] * factor * norm[i]);
        to[lane + WARP * i] = stored;
        x[i] = __bfloat162float(stored);
    }
    turn(rope, a.cos_sin + (size_t)row * P, a.interleaved);
#pragma unroll
    for (int i = 0; i < P / WARP; i++) {
        __nv_bfloat16 stored = __float2bfloat16_rn(rope[i]);
        to[L + lane + WARP * i] = stored;
        rope[i] = __bfloat162float(stored);
    }
    uint8_t *sign = record + layout.sign + token * (D / 8);
    uint8_t *large = record + layout.large + token * (D / 8);
    __nv_bfloat16 *scale = (__nv_bfloat16 *)(record + layout.scale) + 2 * token;
    add_planes(sign, large, scale, x);
    add_planes(sign + L / 8, large + L / 8, scale + 1, rope);
}

/* Unit u of a row is head u of the queries, then the row itself. */
__global__ void __launch_bounds__(WARPS * WARP) latent_store(struct latent_store_args a)
{
    int lane = threadIdx.x % WARP, unit = blockIdx.x * WARPS + threadIdx.x / WARP;
    int row = unit / (a.heads + 1), head = unit % (a.heads + 1);
    bool stores = head == a.heads;
    float norm[PARTS] = {}, x[P / WARP];

    if (row < a.rows && stores)
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            norm[i] = weight_at(a.norm, lane + WARP * i, a.norm_type);
    /* From the host: no kernel writes them. */
    bool leaves = row >= a.rows || (stores && a.kv_block[row] < 0);
    let_next_start();
    wait_for_inputs();
    if (leaves)
        return;
    if (stores) {
        store_row(a, row, norm);
        return;
    }
    const __nv_bfloat16 *from = (const __nv_bfloat16 *)a.q_rope +
                                (size_t)row * a.q_rope_stride + head * a.q_rope_head_stride;
    __nv_bfloat16 *to = (__nv_bfloat16 *)a.q + ((size_t)row * a.heads + head) * D + L;
#pragma unroll
    for (int i = 0; i < P / WARP; i++)
        x[i] = __bfloat162float(from[lane + WARP * i]);
    turn(x, a.cos_sin + (size_t)row * P, a.interleaved);
#pragma unroll
    for (int i = 0; i < P / WARP; i++)
        to[lane + WARP * i] = __float2bfloat16_rn(x[i]);
}

/* Bounds take all rows of a block, so a warp does a run of rows of one block, when they are
 * stored; a warp's channels are those of one of PIECES pieces of the row. */
__global__ void __launch_bounds__(WARPS * WARP) widen_bounds(struct latent_store_args a)
{
    enum { PIECES = D / (2 * WARP), SHORT = 2 };
    int unit = blockIdx.x * WARPS + threadIdx.x / WARP, row = unit / PIECES;
    int channel = unit % PIECES * (2 * WARP) + threadIdx.x % WARP * 2;

    let_next_start();
    wait_for_inputs();
    if (row >= a.rows || a.kv_block[row] < 0 ||
        (row > 0 && a.index_block[row] == a.index_block[row - 1] && a.kv_block[row - 1] >= 0))
        return;
    struct index_layout layout = index_layout(&a.shape);
    uint8_t *record = record_at(a, row);
    __nv_bfloat16 *low = (__nv_bfloat16 *)(record + layout.lo) + channel;
    __nv_bfloat16 *high = (__nv_bfloat16 *)(record + layout.hi) + channel;
    __nv_bfloat16 lo[SHORT] = { low[0], low[1] }, hi[SHORT] = { high[0], high[1] };
    int block = a.index_block[row];
    for (; row < a.rows && a.index_block[row] == block && a.kv_block[row] >= 0; row++) {
        const __nv_bfloat16 *key = row_at(a, row) + channel;
        bool first = a.positions[row] % BLOCK_TOKENS == 0;
        for (int i = 0; i < SHORT; i++) {
            if (first || __bfloat162float(key[i]) < __bfloat162float(lo[i]))
                lo[i] = key[i];
            if (first || __bfloat162float(key[i]) > __bfloat162float(hi[i]))
                hi[i] = key[i];
        }
    }
    for (int i = 0; i < SHORT; i++) {
        low[i] = lo[i];
        high[i] = hi[i];
    }
}

int blocks_for(int units)
{
    return (units + WARPS - 1) / WARPS;
}

}

void cuda_latent_store(struct stream *s, const struct latent_store_args *a)
{
    if (a->rows <= 0)
        return;
    launch_early(s, "latent_store", latent_store, dim3(blocks_for(a->rows * (a->heads + 1))),
                 WARPS * WARP, 0, *a);
    if (a->shape.filter == FILTER_BOUNDS)
        launch_early(s, "latent_store", widen_bounds,
                     dim3(blocks_for(a->rows * (D / (2 * WARP)))), WARPS * WARP, 0, *a);
}
