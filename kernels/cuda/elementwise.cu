/* Embedding, norm, rotation table and activation: what is bound by its launch in a decode
 * step and by memory in a prompt.  Each thread takes VECTOR neighbouring elements at a
 * time, so every row must be a multiple of that. */

#include "kernels/cuda/cuda.cuh"

namespace {

enum {
    VECTOR = 8,                  /* bf16 in 16 bytes */
    MOST_THREADS = 1024,
    MOST_PARTS = MOST_ROW / VECTOR / MOST_THREADS, /* of a row to a thread */
};

struct vector { float v[VECTOR]; };

__device__ __forceinline__ vector load_vector(const __nv_bfloat16 *from)
{
    uint4 u = *(const uint4 *)from;
    const unsigned words[4] = { u.x, u.y, u.z, u.w };
    vector x;

    for (int i = 0; i < 4; i++) {
        float2 f = unpack_bf16(words[i]);
        x.v[2 * i] = f.x;
        x.v[2 * i + 1] = f.y;
    }
    return x;
}

/* Weights of either type; those in float32 may lie at any float. */
__device__ __forceinline__ vector load_weights(const void *from, size_t at, enum dtype type)
{
    vector x;

    if (type == DTYPE_BF16)
        return load_vector((const __nv_bfloat16 *)from + at);
    for (int i = 0; i < VECTOR; i++)
        x.v[i] = ((const float *)from)[at + i];
    return x;
}

__device__ __forceinline__ uint4 round_vector(const vector &x)
{
    return make_uint4(pack_bf16(x.v[0], x.v[1]), pack_bf16(x.v[2], x.v[3]),
                      pack_bf16(x.v[4], x.v[5]), pack_bf16(x.v[6], x.v[7]));
}

__device__ __forceinline__ void store_vector(__nv_bfloat16 *to, const vector &x)
{
    *(uint4 *)to = round_vector(x);
}

/* As many threads as there are vectors in a row. */
int threads_of(int dim)
{
    int threads = (dim / VECTOR + WARP - 1) / WARP * WARP;

    return threads < MOST_THREADS ? threads : MOST_THREADS;
}

__global__ void embed(struct embed_args a)
{
    let_next_start();
    wait_for_inputs();
    size_t from = (size_t)a.ids[blockIdx.x] * a.dim, to = (size_t)blockIdx.x * a.dim;
    for (int i = threadIdx.x * VECTOR; i < a.dim; i += blockDim.x * VECTOR)
        store_vector((__nv_bfloat16 *)a.out + to + i,
                     load_weights(a.table, from + i, a.table_type));
}

/* Sum over the thread block, in a fixed order. */
__device__ float block_sum(float v)
{
    __shared__ float part[MOST_THREADS / WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

    v = warp_sum(v);
    if (lane == 0)
        part[warp] = v;
    __syncthreads();
    return warp_sum(lane < blockDim.x / WARP ? part[lane] : 0);
}

/* A thread block a row. */
__global__ void add_norm(struct add_norm_args a)
{
    int row = blockIdx.x;
    vector x[MOST_PARTS], weight = {};
    float square = 0;

    if (threadIdx.x * VECTOR < a.dim)
        weight = load_weights(a.weight, threadIdx.x * VECTOR, a.weight_type);
    let_next_start();
    wait_for_inputs();
    size_t stride = a.x_stride ? a.x_stride : a.dim;
    size_t from = (size_t)(a.rows_of ? a.rows_of[row] : row) * stride;
#pragma unroll
    for (int p = 0; p < MOST_PARTS; p++) {
        int i = (threadIdx.x + p * blockDim.x) * VECTOR;
        if (i >= a.dim)
            break;
        x[p] = load_vector((__nv_bfloat16 *)a.x + from + i);
        if (a.delta) {
            vector delta = load_vector((const __nv_bfloat16 *)a.delta + from + i);
            for (int j = 0; j < VECTOR; j++)
                x[p].v[j] += delta.v[j];
            store_vector((__nv_bfloat16 *)a.x + from + i, x[p]);
        }
        for (int j = 0; j < VECTOR; j++)
            square += x[p].v[j] * x[p].v[j];
    }
    float factor = rsqrtf(block_sum(square) / (float)a.dim + a.eps);
#pragma unroll
    for (int p = 0; p < MOST_PARTS; p++) {
        int i = (threadIdx.x + p * blockDim.x) * VECTOR;
        if (i >= a.dim)
            break;
        if (p > 0)
            weight = load_weights(a.weight, i, a.weight_type);
        for (int j = 0; j < VECTOR; j++)
            x[p].v[j] *= factor * weight.v[j];
        store_vector((__nv_bfloat16 *)a.out + (size_t)row * a.dim + i, x[p]);
    }
}

__global__ void rope_table(struct rope_table_args a)
{
    int half = a.head_dim / 2, i = blockIdx.x * blockDim.x + threadIdx.x;

    let_next_start();
    wait_for_inputs();
    if (i >= a.rows * half)
        return;
    int row = i / half, d = i % half;
    float angle = __fmul_rn((float)a.positions[row], a.inv_freq[d]), s, c;
    sincosf(angle, &s, &c);
    float *out = a.cos_sin + (size_t)row * a.head_dim + d;
    out[0] = c * a.factor;
    out[half] = s * a.factor;
}

__global__ void silu_mul_rows(struct silu_mul_args a)
{
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;

    let_next_start();
    wait_for_inputs();
    if (i >= (size_t)a.rows * a.dim)
        return;
    size_t at = i / a.dim * a.in_stride + i % a.dim;
    vector gate = load_vector((const __nv_bfloat16 *)a.gate + at);
    vector up = load_vector((const __nv_bfloat16 *)a.up + at);
    for (int j = 0; j < VECTOR; j++)
        gate.v[j] = silu_mul(gate.v[j], up.v[j]);
    store_vector((__nv_bfloat16 *)a.out + i, gate);
}

dim3 blocks_of(size_t n, int threads)
{
    return dim3((unsigned)((n + threads - 1) / threads));
}

}

void cuda_embed(struct stream *s, const struct embed_args *a)
{
    if (a->rows > 0)
        launch_early(s, "embed", embed, dim3(a->rows), threads_of(a->dim), 0, *a);
}

void cuda_add_norm(struct stream *s, const struct add_norm_args *a)
{
    if (a->rows > 0)
        launch_early(s, "add_norm", add_norm, dim3(a->rows), threads_of(a->dim), 0, *a);
}

void cuda_rope_table(struct stream *s, const struct rope_table_args *a)
{
    enum { THREADS = 128 };

    if (a->rows > 0)
        launch_early(s, "rope_table", rope_table,
                     blocks_of((size_t)a->rows * a->head_dim / 2, THREADS), THREADS, 0, *a);
}

void cuda_silu_mul(struct stream *s, const struct silu_mul_args *a)
{
    enum { THREADS = 128 };

    if (a->rows > 0)
        launch_early(s, "silu_mul", silu_mul_rows,
                     blocks_of((size_t)a->rows * a->dim / VECTOR, THREADS), THREADS, 0, *a);
}
