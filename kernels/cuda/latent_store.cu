/* Rows of latent attention: the norm of their latent part, the rotation of their rope part and of
 * the queries', their index.
 *
 * A warp takes the rope part of one head's query, or the whole row of a token, or makes a mean of
 * the row and the one before it, as in rope_store.cu. */

#include "kernels/cuda/latent.cuh"
#include "kernels/cuda/rotate.cuh"

namespace {

using namespace latent;

enum { WARPS = 4, PARTS = L / WARP };

/* Rope parts: lane l has channels l and l + 32.  To the same bits in every place: nothing is left
 * to the compiler to fuse. */
__device__ __forceinline__ void turn(float (&x)[2], const float *cos_sin, bool interleaved)
{
    int lane = threadIdx.x % WARP;

    if (!interleaved) {
        float c = cos_sin[lane], s = cos_sin[lane + P / 2], a = x[0], b = x[1];
        x[0] = __fmaf_rn(a, c, -__fmul_rn(b, s));
        x[1] = __fmaf_rn(b, c, __fmul_rn(a, s));
        return;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int pair = (lane + WARP * i) / 2;
        float c = cos_sin[pair], s = cos_sin[pair + P / 2];
        float other = __shfl_xor_sync(0xffffffffu, x[i], 1);
        x[i] = __fmaf_rn(x[i], c, __fmul_rn(other, lane % 2 ? s : -s));
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

/* A row, lane l channels l + 32 i of either part. */
struct parts { float latent[PARTS], rope[P / WARP]; };

__device__ __forceinline__ void load_parts(parts *x, const __nv_bfloat16 *row)
{
    int lane = threadIdx.x % WARP;

#pragma unroll
    for (int i = 0; i < PARTS; i++)
        x->latent[i] = __bfloat162float(row[lane + WARP * i]);
#pragma unroll
    for (int i = 0; i < P / WARP; i++)
        x->rope[i] = __bfloat162float(row[L + lane + WARP * i]);
}

/* A row as it is stored. */
__device__ __forceinline__ void make_row(parts *x, const struct latent_store_args &a, int row,
                                         const float (&norm)[PARTS])
{
    load_parts(x, (const __nv_bfloat16 *)a.kv + (size_t)row * a.kv_stride);
    float factor = rsqrtf(mean_square(x->latent) + a.eps);
#pragma unroll
    for (int i = 0; i < PARTS; i++)
        x->latent[i] = __bfloat162float(__float2bfloat16_rn(x->latent[i] * factor * norm[i]));
    turn(x->rope, a.cos_sin + (size_t)row * P, a.interleaved);
#pragma unroll
    for (int i = 0; i < P / WARP; i++)
        x->rope[i] = __bfloat162float(__float2bfloat16_rn(x->rope[i]));
}

/* As number `number` of those whose scales, signs and second plane begin there; large NULL:
 * without. */
__device__ __forceinline__ void add_parts(uint8_t *scales, uint8_t *signs, uint8_t *larges,
                                          const parts &x, int number)
{
    __nv_bfloat16 *scale = (__nv_bfloat16 *)scales + 2 * number;
    uint8_t *sign = signs + number * (D / 8), *large = larges ? larges + number * (D / 8) : NULL;

    add_planes(sign, large, scale, x.latent);
    add_planes(sign + L / 8, large ? large + L / 8 : NULL, scale + 1, x.rope);
}

__device__ __forceinline__ void store_row(const struct latent_store_args &a, int row, int token,
                                          const float (&norm)[PARTS])
{
    int lane = threadIdx.x % WARP;
    __nv_bfloat16 *to = row_at(a, row);
    uint8_t *record = record_at(a, row);
    struct index_layout layout = index_layout(&a.shape);
    parts x;

    make_row(&x, a, row, norm);
#pragma unroll
    for (int i = 0; i < PARTS; i++)
        to[lane + WARP * i] = __float2bfloat16_rn(x.latent[i]);
#pragma unroll
    for (int i = 0; i < P / WARP; i++)
        to[L + lane + WARP * i] = __float2bfloat16_rn(x.rope[i]);
    add_parts(record + layout.scale, record + layout.sign, record + layout.large, x, token);
}

/* The mean of a row and the one before it. */
__device__ __forceinline__ void store_mean(const struct latent_store_args &a, int row, int token,
                                           const float (&norm)[PARTS])
{
    static_assert(MEAN_TOKENS == 2, "the sum");
    uint8_t *record = record_at(a, row);
    struct index_layout layout = index_layout(&a.shape);
    parts x, before;

    /* Rows of a block are neighbours. */
    if (row > 0 && a.kv_block[row - 1] == a.kv_block[row])
        make_row(&before, a, row - 1, norm);
    else
        load_parts(&before, row_at(a, row) - D);
    make_row(&x, a, row, norm);
    mean_of(x.latent, before.latent);
    mean_of(x.rope, before.rope);
    add_parts(record + layout.mean_scale, record + layout.mean_sign, NULL, x,
              token / MEAN_TOKENS);
}

/* Heads of the queries, the row itself, and the row again for a mean. */
__host__ __device__ inline int units_of_row(const struct latent_store_args &a)
{
    return a.heads + (a.shape.filter == FILTER_MEANS ? 2 : 1);
}

__global__ void __launch_bounds__(WARPS * WARP) latent_store(struct latent_store_args a)
{
    int lane = threadIdx.x % WARP, unit = blockIdx.x * WARPS + threadIdx.x / WARP;
    int units = units_of_row(a), row = unit / units, head = unit % units;
    bool is_query = head < a.heads, is_mean = head > a.heads;
    float norm[PARTS] = {}, x[P / WARP];

    if (row < a.rows && !is_query)
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            norm[i] = weight_at(a.norm, lane + WARP * i, a.norm_type);
    /* From the host: no kernel writes them. */
    int token = row < a.rows ? a.positions[row] % BLOCK_TOKENS : 0;
    bool leaves = row >= a.rows || (!is_query && a.kv_block[row] < 0) ||
                  (is_mean && token % MEAN_TOKENS != MEAN_TOKENS - 1);
    let_next_start();
    wait_for_inputs();
    if (leaves)
        return;
    if (!is_query) {
        if (is_mean)
            store_mean(a, row, token, norm);
        else
            store_row(a, row, token, norm);
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
    launch_early(s, "latent_store", latent_store, dim3(blocks_for(a->rows * units_of_row(*a))),
                 WARPS * WARP, 0, *a);
    if (a->shape.filter == FILTER_BOUNDS)
        launch_early(s, "latent_store", widen_bounds,
                     dim3(blocks_for(a->rows * (D / (2 * WARP)))), WARPS * WARP, 0, *a);
}
