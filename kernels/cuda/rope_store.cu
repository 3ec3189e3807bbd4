/* Norm and rotation of queries and keys; keys, values and their index into the pools.
 *
 * A warp takes one head of one row, lane l channels l + 32 i.
 *
 * A mean needs its own keys and no others, so it is made when the last of them is stored and not
 * when the block's last key is: then a decode step has at most one to make of a sequence and KV
 * head, not 32 of them in every 64th, and a warp beside the key's makes it in the same time.  That
 * warp makes the keys itself, to the same bits, because those of this launch are written by other
 * thread blocks; of earlier launches they are in the pool. */

#include "kernels/cuda/rotate.cuh"

namespace {

enum { WARPS = 4 };

/* To the same bits in every place: nothing is left to the compiler to fuse. */
template <int PARTS>
__device__ __forceinline__ void place(float (&x)[PARTS], const float (&norm)[PARTS],
                                      bool has_norm, const float *cos_sin, float eps)
{
    enum { DIM = PARTS * WARP };
    int lane = threadIdx.x % WARP;

    if (has_norm) {
        float factor = rsqrtf(mean_square(x) + eps);
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            x[i] = x[i] * factor * norm[i];
    }
#pragma unroll
    for (int i = 0; i < PARTS / 2; i++) {
        float a = x[i], b = x[i + PARTS / 2];
        float c = cos_sin[lane + WARP * i], s = cos_sin[lane + WARP * i + DIM / 2];
        x[i] = __fmaf_rn(a, c, -__fmul_rn(b, s));
        x[i + PARTS / 2] = __fmaf_rn(b, c, __fmul_rn(a, s));
    }
}

struct record {
    uint8_t *base;
    struct index_layout layout;
    const int16_t *channels;
};

__device__ __forceinline__ unsigned fine_code(float x, float scale)
{
    float level = rintf(__fdiv_rn(x, scale));

    level = level < -7 ? -7 : level > 7 ? 7 : level;
    return (unsigned)((level == level ? (int)level : 0) + 8);
}

template <int PARTS>
__device__ __forceinline__ void add_channels_kept(const record &r, const float (&key)[PARTS],
                                                  int token)
{
    enum { KEPT = INDEX_CHANNELS_KEPT };
    static_assert(KEPT == WARP, "a kept channel a lane");
    int lane = threadIdx.x % WARP, channel = r.channels[lane];
    float x[1] = { 0 };

#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        float v = __shfl_sync(0xffffffffu, key[i], channel % WARP);
        if (channel / WARP == i)
            x[0] = v;
    }
    /* As the comparisons of the CPU's loop, fmaxf passes over what is no number. */
    float top = fmaxf(warp_max(fabsf(x[0])), 0.0f);
    __nv_bfloat16 rounded2 = scale_of(x), rounded4 = __float2bfloat16_rn(__fdiv_rn(top, 7));
    float scale2 = __bfloat162float(rounded2), scale4 = __bfloat162float(rounded4);
    unsigned code = scale2 != 0 ? (unsigned)(x[0] >= -scale2) + (x[0] >= 0) + (x[0] >= scale2)
                                : 0;
    unsigned fine = scale4 != 0 ? fine_code(x[0], scale4) : 0;
    code <<= 2 * (lane % 4);
    code |= __shfl_xor_sync(0xffffffffu, code, 1);
    code |= __shfl_xor_sync(0xffffffffu, code, 2);
    fine <<= 4 * (lane % 2);
    fine |= __shfl_xor_sync(0xffffffffu, fine, 1);
    if (lane % 4 == 0)
        r.base[r.layout.coarse + token * (KEPT / 4) + lane / 4] = (uint8_t)code;
    if (lane % 2 == 0)
        r.base[r.layout.fine + token * (KEPT / 2) + lane / 2] = (uint8_t)fine;
    if (lane == 0) {
        ((__nv_bfloat16 *)(r.base + r.layout.scale2))[token] = rounded2;
        ((__nv_bfloat16 *)(r.base + r.layout.scale4))[token] = rounded4;
    }
}

__device__ __forceinline__ __nv_bfloat16 *key_at(const struct rope_store_args &a, int row,
                                                 int kv_head, int token)
{
    return (__nv_bfloat16 *)a.kv + (size_t)a.kv_block[row] * (kv_block_bytes(&a.shape) / 2) +
           (size_t)(kv_head * BLOCK_TOKENS + token) * 2 * a.shape.head_dim;
}

__device__ __forceinline__ record record_of(const struct rope_store_args &a, int row, int kv_head)
{
    record r;

    r.layout = index_layout(&a.shape);
    r.base = a.index + (size_t)a.index_block[row] * index_block_bytes(&a.shape) +
             (size_t)kv_head * r.layout.record_bytes;
    r.channels = a.channels ? a.channels + kv_head * INDEX_CHANNELS_KEPT : NULL;
    return r;
}

/* A head of a query or key, normed and rotated. */
template <int PARTS>
__device__ __forceinline__ void load_placed(float (&x)[PARTS], const struct rope_store_args &a,
                                            int row, const __nv_bfloat16 *from,
                                            const float (&norm)[PARTS], bool has_norm)
{
#pragma unroll
    for (int i = 0; i < PARTS; i++)
        x[i] = __bfloat162float(from[threadIdx.x % WARP + WARP * i]);
    place(x, norm, has_norm, a.cos_sin + (size_t)row * PARTS * WARP, a.eps);
}

/* The key of a row as it is stored. */
template <int PARTS>
__device__ __forceinline__ void make_key(float (&x)[PARTS], const struct rope_store_args &a,
                                         int row, int kv_head, const float (&norm)[PARTS])
{
    enum { DIM = PARTS * WARP };
    const __nv_bfloat16 *k = (const __nv_bfloat16 *)a.k + (size_t)row * a.qkv_stride_k +
                             kv_head * DIM;

    load_placed(x, a, row, k, norm, a.k_norm != NULL);
#pragma unroll
    for (int i = 0; i < PARTS; i++)
        x[i] = __bfloat162float(__float2bfloat16_rn(x[i]));
}

template <int PARTS>
__device__ __forceinline__ void place_query(const struct rope_store_args &a, int row, int head,
                                            const float (&norm)[PARTS])
{
    enum { DIM = PARTS * WARP };
    int lane = threadIdx.x % WARP;
    __nv_bfloat16 *q = (__nv_bfloat16 *)a.q + (size_t)row * a.qkv_stride_q + head * DIM;
    float x[PARTS];

    load_placed(x, a, row, q, norm, a.q_norm != NULL);
#pragma unroll
    for (int i = 0; i < PARTS; i++)
        q[lane + WARP * i] = __float2bfloat16_rn(x[i]);
}

template <int PARTS>
__device__ __forceinline__ void store_key(const struct rope_store_args &a, int row, int kv_head,
                                          int token, const float (&norm)[PARTS])
{
    enum { DIM = PARTS * WARP };
    int lane = threadIdx.x % WARP;
    const __nv_bfloat16 *v = (const __nv_bfloat16 *)a.v + (size_t)row * a.qkv_stride_v +
                             kv_head * DIM;
    __nv_bfloat16 *key = key_at(a, row, kv_head, token);
    record r = record_of(a, row, kv_head);
    __nv_bfloat16 value[PARTS];
    float x[PARTS];

    /* Before anything is written, so that they are on their way together. */
#pragma unroll
    for (int i = 0; i < PARTS; i++)
        value[i] = v[lane + WARP * i];
    make_key(x, a, row, kv_head, norm);
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        key[lane + WARP * i] = __float2bfloat16_rn(x[i]);
        key[DIM + lane + WARP * i] = value[i];
    }
    if (a.shape.index == INDEX_ROTATED)
        add_planes(r.base + r.layout.sign + token * (DIM / 8),
                   r.base + r.layout.large + token * (DIM / 8),
                   (__nv_bfloat16 *)(r.base + r.layout.scale) + token, x);
    else
        add_channels_kept(r, x, token);
}

/* The mean of the key of a row and the one before it. */
template <int PARTS>
__device__ __forceinline__ void store_mean(const struct rope_store_args &a, int row, int kv_head,
                                           int token, const float (&norm)[PARTS])
{
    enum { DIM = PARTS * WARP };
    static_assert(MEAN_TOKENS == 2, "the sum");
    int lane = threadIdx.x % WARP, number = token / MEAN_TOKENS;
    record r = record_of(a, row, kv_head);
    float x[PARTS], before[PARTS];

    /* Rows of a block are neighbours. */
    if (row > 0 && a.kv_block[row - 1] == a.kv_block[row]) {
        make_key(before, a, row - 1, kv_head, norm);
    } else {
        const __nv_bfloat16 *key = key_at(a, row, kv_head, token - 1);
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            before[i] = __bfloat162float(key[lane + WARP * i]);
    }
    make_key(x, a, row, kv_head, norm);
    mean_of(x, before);
    add_planes(r.base + r.layout.mean_sign + number * (DIM / 8), NULL,
               (__nv_bfloat16 *)(r.base + r.layout.mean_scale) + number, x);
}

/* Heads of a row: those of the queries, of the keys and values, and of the keys again for their
 * means. */
__host__ __device__ inline int units_of_row(const struct rope_store_args &a)
{
    return a.heads + a.shape.kv_heads * (a.shape.filter == FILTER_MEANS ? 2 : 1);
}

template <int DIM>
__global__ void __launch_bounds__(WARPS * WARP) rope_store(struct rope_store_args a)
{
    enum { PARTS = DIM / WARP };
    int lane = threadIdx.x % WARP, units = units_of_row(a);
    int unit = blockIdx.x * WARPS + threadIdx.x / WARP, row = unit / units;
    int head = unit % units, kv_head = head - a.heads;
    bool is_mean = kv_head >= a.shape.kv_heads;
    const void *weight = kv_head < 0 ? a.q_norm : a.k_norm;
    float norm[PARTS] = {};

    if (row < a.rows && weight)
        for (int i = 0; i < PARTS; i++)
            norm[i] = weight_at(weight, lane + WARP * i, a.norm_type);
    /* From the host: no kernel writes them. */
    int token = row < a.rows ? a.positions[row] % BLOCK_TOKENS : 0;
    bool leaves = row >= a.rows || (kv_head >= 0 && a.kv_block[row] < 0) ||
                  (is_mean && token % MEAN_TOKENS != MEAN_TOKENS - 1);
    let_next_start();
    wait_for_inputs();
    if (leaves)
        return;
    if (kv_head < 0)
        place_query(a, row, head, norm);
    else if (is_mean)
        store_mean(a, row, kv_head - a.shape.kv_heads, token, norm);
    else
        store_key(a, row, kv_head, token, norm);
}

/* Bounds take all keys of a block, so a warp does a run of rows of one block and a KV
 * head, when their keys are stored. */
template <int DIM>
__global__ void __launch_bounds__(WARPS * WARP) widen_bounds(struct rope_store_args a)
{
    enum { PARTS = DIM / WARP };
    int lane = threadIdx.x % WARP, unit = blockIdx.x * WARPS + threadIdx.x / WARP;
    int row = unit / a.shape.kv_heads, kv_head = unit % a.shape.kv_heads;
    __nv_bfloat16 lo[PARTS], hi[PARTS];

    let_next_start();
    wait_for_inputs();
    if (row >= a.rows || a.kv_block[row] < 0 ||
        (row > 0 && a.index_block[row] == a.index_block[row - 1] && a.kv_block[row - 1] >= 0))
        return;
    record r = record_of(a, row, kv_head);
    __nv_bfloat16 *low = (__nv_bfloat16 *)(r.base + r.layout.lo);
    __nv_bfloat16 *high = (__nv_bfloat16 *)(r.base + r.layout.hi);
    for (int i = 0; i < PARTS; i++) {
        lo[i] = low[lane + WARP * i];
        hi[i] = high[lane + WARP * i];
    }
    int block = a.index_block[row];
    for (; row < a.rows && a.index_block[row] == block && a.kv_block[row] >= 0; row++) {
        int token = a.positions[row] % BLOCK_TOKENS;
        const __nv_bfloat16 *key = key_at(a, row, kv_head, token);
        for (int i = 0; i < PARTS; i++) {
            __nv_bfloat16 x = key[lane + WARP * i];
            if (token == 0 || __bfloat162float(x) < __bfloat162float(lo[i]))
                lo[i] = x;
            if (token == 0 || __bfloat162float(x) > __bfloat162float(hi[i]))
                hi[i] = x;
        }
    }
    for (int i = 0; i < PARTS; i++) {
        low[lane + WARP * i] = lo[i];
        high[lane + WARP * i] = hi[i];
    }
}

template <int DIM>
void launch(struct stream *s, const struct rope_store_args &a)
{
    int units = a.rows * units_of_row(a), runs = a.rows * a.shape.kv_heads;

    launch_early(s, "rope_store", rope_store<DIM>, dim3((units + WARPS - 1) / WARPS),
                 WARPS * WARP, 0, a);
    if (a.shape.filter == FILTER_BOUNDS)
        launch_early(s, "rope_store", widen_bounds<DIM>, dim3((runs + WARPS - 1) / WARPS),
                     WARPS * WARP, 0, a);
}

}

void cuda_rope_store(struct stream *s, const struct rope_store_args *a)
{
    if (a->rows <= 0)
        return;
    if (a->shape.head_dim == 128)
        launch<128>(s, *a);
    else
        launch<64>(s, *a);
}
