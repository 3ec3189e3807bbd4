/* Matrix products.
 *
 * A step of decodes has few rows and is bound by reading the weights; multiply_few() does
 * nothing but stream them through the tensor cores.  Products of many rows go to cuBLASLt.
 * Weights in float32, which the tensor cores cannot multiply with bf16, have a plain
 * kernel.
 *
 * Tried for few rows and lost: a ring of bulk copies in 100 KB of shared memory, filled
 * before the kernel waits for its inputs.  On an H100 it reads as fast (copies of 2 KB;
 * those of 512 bytes reach 1,850 GB/s), but a step of Qwen3-8B at batch 1 takes 6.1 to 6.3
 * ms instead of 5.9: the small operations between the products then wait for a memory that
 * is busy, a norm 3.3 us instead of 1.3, and that costs as much as the early start gains. */

#include "kernels/cuda/mma.cuh"

#include "engine/base/mem.h"

#include <string.h>

namespace {

enum {
    FEW_ROWS = 16,
    THREADS = 256,
    WARPS = THREADS / WARP,
    HALF = 8,                    /* outputs in half of the left operand's rows */
    STEP = 64,                   /* inputs a warp takes at a time */
    STEP_LOADS = STEP / 32,      /* 16-byte loads of each thread in it, from one row */
    COLUMNS = 8,                 /* rows of x to a product: columns of the right operand */
};

struct product {
    void *out;                   /* [rows, out_stride] */
    const __nv_bfloat16 *x, *weight, *bias;
    const __nv_bfloat16 *up;     /* of linear_gated, whose gate is weight */
    int rows, in_dim, out_dim, out_stride;
};

__device__ __forceinline__ void store(float *to, float v)
{
    *to = v;
}

__device__ __forceinline__ void store(__nv_bfloat16 *to, float v)
{
    *to = __float2bfloat16_rn(v);
}

/* out = x W^T + bias for up to COLUMN_TILES * COLUMNS rows of x.
 *
 * A thread block makes TILES * HALVES * HALF outputs of every row; its warps take every
 * WARPS-th step of the inputs, and their sums are added in the order of the warps, so a result
 * does not depend on the number of rows.  The order of inputs inside a product is free, and so
 * each thread loads 16 bytes in a row of both operands, which are two products' worth.
 *
 * GATED: of its two tiles the one is the gate's and the other the same rows' of up, and out is
 * what silu_mul() makes of them. */
template <int COLUMN_TILES, int TILES, int HALVES, bool GATED, typename T>
__global__ void __launch_bounds__(THREADS, 2) multiply_few(product p)
{
    enum { TILE = HALVES * HALF };
    __shared__ float part[WARPS][COLUMN_TILES * COLUMNS][TILE];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, c = lane % 4;
    int first = blockIdx.x * (GATED ? TILE : TILES * TILE);
    float acc[TILES][COLUMN_TILES][4] = {};
    uint4 w[TILES][HALVES][STEP_LOADS];

    auto load = [&](int from) {
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                int row = first + (GATED ? 0 : t * TILE) + half * HALF + g;
                const __nv_bfloat16 *base = (GATED && t > 0 ? p.up : p.weight) +
                                            (size_t)min(row, p.out_dim - 1) * p.in_dim;
#pragma unroll
                for (int i = 0; i < STEP_LOADS; i++) {
                    int at = from + i * 32 + c * 8;
                    w[t][half][i] = at < p.in_dim ? load_weights(base + at)
                                                  : make_uint4(0, 0, 0, 0);
                }
            }
    };
    load(warp * STEP);           /* while earlier kernels finish */
    let_next_start();
    wait_for_inputs();
    for (int from = warp * STEP; from < p.in_dim; from += WARPS * STEP) {
        uint4 x[COLUMN_TILES][STEP_LOADS];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int i = 0; i < STEP_LOADS; i++) {
                int row = n * COLUMNS + g, at = from + i * 32 + c * 8;
                bool there = row < p.rows && at < p.in_dim;
                x[n][i] = there ? *(const uint4 *)(p.x + (size_t)row * p.in_dim + at)
                                : make_uint4(0, 0, 0, 0);
            }
        uint4 now[TILES][HALVES][STEP_LOADS];
        memcpy(now, w, sizeof now);
        load(from + WARPS * STEP);
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < STEP_LOADS; i++) {
                const uint4 low = now[t][0][i];
                const uint4 high = HALVES > 1 ? now[t][HALVES - 1][i] : make_uint4(0, 0, 0, 0);
                unsigned a[4] = { low.x, high.x, low.y, high.y };
                unsigned b[4] = { low.z, high.z, low.w, high.w };
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; n++) {
                    mma_bf16(acc[t][n], a, x[n][i].x, x[n][i].y);
                    mma_bf16(acc[t][n], b, x[n][i].z, x[n][i].w);
                }
            }
    }
    float gate = 0;              /* of GATED: a thread has one output at most */
    static_assert(!GATED || (TILES == 2 && COLUMN_TILES * COLUMNS * TILE <= THREADS), "");
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        if (t > 0)
            __syncthreads();
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int i = 0; i < 2 * HALVES; i++)
                part[warp][n * COLUMNS + 2 * c + i % 2][g + i / 2 * HALF] = acc[t][n][i];
        __syncthreads();
        for (int i = threadIdx.x; i < COLUMN_TILES * COLUMNS * TILE; i += THREADS) {
            int row = i / TILE, at = first + (GATED ? 0 : t * TILE) + i % TILE;
            float sum = 0;
            for (int k = 0; k < WARPS; k++)
                sum += part[k][row][i % TILE];
            if (row >= p.rows || at >= p.out_dim)
                continue;
            if (GATED) {
                sum = __bfloat162float(__float2bfloat16_rn(sum));
                if (t == 0)
                    gate = sum;
                else
                    store((T *)p.out + (size_t)row * p.out_stride + at, silu_mul(gate, sum));
                continue;
            }
            if (p.bias)
                sum += __bfloat162float(p.bias[at]);
            store((T *)p.out + (size_t)row * p.out_stride + at, sum);
        }
    }
}

template <int TILES, int HALVES, typename T>
void launch_tiles(struct stream *s, const product &p)
{
    const int per_block = TILES * HALVES * HALF;
    dim3 grid((p.out_dim + per_block - 1) / per_block);

    launch_early(s, "linear",
                 p.rows <= COLUMNS ? multiply_few<1, TILES, HALVES, false, T>
                                   : multiply_few<2, TILES, HALVES, false, T>,
                 grid, THREADS, 0, p);
}

/* Where there are many outputs x is read half as often; where there are few, twice as many
 * multiprocessors take part. */
template <typename T>
void launch_few(struct stream *s, const product &p)
{
    int sms = s->be->info.sm_count;

    if (p.out_dim >= 8 * 2 * HALF * sms)
        launch_tiles<2, 2, T>(s, p);
    else if (p.out_dim > HALF * sms)
        launch_tiles<1, 2, T>(s, p);
    else
        launch_tiles<1, 1, T>(s, p);
}

template <int HALVES>
void launch_gated(struct stream *s, const product &p)
{
    const int per_block = HALVES * HALF;
    dim3 grid((p.out_dim + per_block - 1) / per_block);

    launch_early(s, "linear_gated",
                 p.rows <= COLUMNS ? multiply_few<1, 2, HALVES, true, __nv_bfloat16>
                                   : multiply_few<2, 2, HALVES, true, __nv_bfloat16>,
                 grid, THREADS, 0, p);
}

/* Any number of rows, FEW_ROWS at a time. */
template <typename T>
void launch_slices(struct stream *s, const product &p)
{
    for (int first = 0; first < p.rows; first += FEW_ROWS) {
        product part = p;
        part.rows = p.rows - first < FEW_ROWS ? p.rows - first : FEW_ROWS;
        part.x += (size_t)first * p.in_dim;
        part.out = (T *)p.out + (size_t)first * p.out_stride;
        launch_few<T>(s, part);
    }
}

/* ---- float32 weights */

enum { FLOAT_ROWS = 8 };         /* of x, to a warp */

/* A warp makes one output of FLOAT_ROWS rows. */
template <typename T>
__global__ void __launch_bounds__(THREADS) multiply_float(product p)
{
    const float *weight = (const float *)p.weight, *bias = (const float *)p.bias;
    int lane = threadIdx.x % WARP, at = blockIdx.x * WARPS + threadIdx.x / WARP;
    int first = blockIdx.y * FLOAT_ROWS;
    float sum[FLOAT_ROWS] = {};

    let_next_start();
    wait_for_inputs();
    if (at >= p.out_dim)
        return;
    for (int i = lane; i < p.in_dim; i += WARP) {
        float w = weight[(size_t)at * p.in_dim + i];
        for (int r = 0; r < FLOAT_ROWS; r++)
            if (first + r < p.rows)
                sum[r] += w * __bfloat162float(p.x[(size_t)(first + r) * p.in_dim + i]);
    }
    for (int r = 0; r < FLOAT_ROWS; r++) {
        float total = warp_sum(sum[r]);
        if (lane == 0 && first + r < p.rows)
            store((T *)p.out + (size_t)(first + r) * p.out_stride + at,
                  total + (bias ? bias[at] : 0));
    }
}

template <typename T>
void launch_float(struct stream *s, const product &p)
{
    dim3 grid((p.out_dim + WARPS - 1) / WARPS, (p.rows + FLOAT_ROWS - 1) / FLOAT_ROWS);

    launch_early(s, "linear", multiply_float<T>, grid, THREADS, 0, p);
}

/* ---- many rows */

enum { PLANS = 1024, WORKSPACE_BYTES = 32 << 20 };

/* What decides on the algorithm. */
struct plan_key {
    int rows, in_dim, out_dim, out_stride;
    bool to_float, bias, aligned;
};

struct plan {
    plan_key key;                /* rows 0: empty */
    cublasLtMatmulAlgo_t algo;
};

/* Descriptions of one product for cuBLASLt, which counts matrices by columns: it makes
 * out^T [out_dim, rows] = W^T' x^T. */
struct description {
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t weight, x, out;
};

}

struct linear_plans {
    cublasLtHandle_t handle;
    void *workspace;
    plan plans[PLANS];           /* each at the place of its key's hash: a later one replaces it */
};

cudaError_t linear_plans_create(struct linear_plans **out)
{
    struct linear_plans *p = (struct linear_plans *)mem_calloc(1, sizeof *p);

    *out = p;
    cudaError_t e = cudaMalloc(&p->workspace, WORKSPACE_BYTES);
    if (e == cudaSuccess && cublasLtCreate(&p->handle) != CUBLAS_STATUS_SUCCESS)
        e = cudaErrorInitializationError;
    return e;
}

void linear_plans_destroy(struct linear_plans *p)
{
    if (!p)
        return;
    if (p->handle)
        cublasLtDestroy(p->handle);
    cudaFree(p->workspace);
    mem_free(p);
}

namespace {

cublasStatus_t describe(description *d, const product &p, const plan_key &key)
{
    cublasOperation_t turned = CUBLAS_OP_T;
    cublasLtEpilogue_t with_bias = CUBLASLT_EPILOGUE_BIAS;
    cublasStatus_t e = cublasLtMatmulDescCreate(&d->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);

    if (e == CUBLAS_STATUS_SUCCESS)
        e = cublasLtMatmulDescSetAttribute(d->product, CUBLASLT_MATMUL_DESC_TRANSA, &turned,
                                           sizeof turned);
    if (e == CUBLAS_STATUS_SUCCESS && key.bias)
        e = cublasLtMatmulDescSetAttribute(d->product, CUBLASLT_MATMUL_DESC_EPILOGUE, &with_bias,
                                           sizeof with_bias);
    if (e == CUBLAS_STATUS_SUCCESS && key.bias)
        e = cublasLtMatmulDescSetAttribute(d->product, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                           &p.bias, sizeof p.bias);
    if (e == CUBLAS_STATUS_SUCCESS)
        e = cublasLtMatrixLayoutCreate(&d->weight, CUDA_R_16BF, key.in_dim, key.out_dim,
                                       key.in_dim);
    if (e == CUBLAS_STATUS_SUCCESS)
        e = cublasLtMatrixLayoutCreate(&d->x, CUDA_R_16BF, key.in_dim, key.rows, key.in_dim);
    if (e == CUBLAS_STATUS_SUCCESS)
        e = cublasLtMatrixLayoutCreate(&d->out, key.to_float ? CUDA_R_32F : CUDA_R_16BF,
                                       key.out_dim, key.rows, key.out_stride);
    return e;
}

void forget(description *d)
{
    if (d->out)
        cublasLtMatrixLayoutDestroy(d->out);
    if (d->x)
        cublasLtMatrixLayoutDestroy(d->x);
    if (d->weight)
        cublasLtMatrixLayoutDestroy(d->weight);
    if (d->product)
        cublasLtMatmulDescDestroy(d->product);
}

cublasStatus_t choose_algorithm(struct linear_plans *plans, plan *out, const description *d,
                                const plan_key &key)
{
    cublasLtMatmulPreference_t wish = NULL;
    cublasLtMatmulHeuristicResult_t found = {};
    size_t workspace = WORKSPACE_BYTES;
    /* Partial sums are not to be rounded to bf16, as those added in place are. */
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    uint32_t aligned = 16, element = key.to_float ? 4 : 2;
    int n = 0;

    cublasStatus_t e = cublasLtMatmulPreferenceCreate(&wish);
    if (e == CUBLAS_STATUS_SUCCESS)
        e = cublasLtMatmulPreferenceSetAttribute(
            wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    if (e == CUBLAS_STATUS_SUCCESS)
        e = cublasLtMatmulPreferenceSetAttribute(
            wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions);
    const cublasLtMatmulPreferenceAttributes_t inputs[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES };
    for (int i = 0; i < 2 && e == CUBLAS_STATUS_SUCCESS; i++)
        e = cublasLtMatmulPreferenceSetAttribute(wish, inputs[i], &aligned, sizeof aligned);
    const cublasLtMatmulPreferenceAttributes_t outputs[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES };
    for (int i = 0; i < 2 && e == CUBLAS_STATUS_SUCCESS; i++)
        e = cublasLtMatmulPreferenceSetAttribute(wish, outputs[i],
                                                 key.aligned ? &aligned : &element,
                                                 sizeof aligned);
    if (e == CUBLAS_STATUS_SUCCESS)
        e = cublasLtMatmulAlgoGetHeuristic(plans->handle, d->product, d->weight, d->x, d->out,
                                           d->out, wish, 1, &found, &n);
    if (e == CUBLAS_STATUS_SUCCESS && n == 0)
        e = CUBLAS_STATUS_NOT_SUPPORTED;
    if (e == CUBLAS_STATUS_SUCCESS) {
        out->key = key;
        out->algo = found.algo;
    }
    if (wish)
        cublasLtMatmulPreferenceDestroy(wish);
    return e;
}

plan *plan_place(struct linear_plans *plans, const plan_key &key)
{
    uint64_t hash = 0xcbf29ce484222325u;
    const int parts[] = { key.rows, key.in_dim, key.out_dim, key.out_stride,
                          key.to_float * 4 + key.bias * 2 + key.aligned };

    for (int part : parts)
        hash = (hash ^ (uint64_t)part) * 0x100000001b3u;
    return &plans->plans[(hash >> 20) % PLANS];
}

bool same_key(const plan_key &a, const plan_key &b)
{
    return a.rows == b.rows && a.in_dim == b.in_dim && a.out_dim == b.out_dim &&
           a.out_stride == b.out_stride && a.to_float == b.to_float && a.bias == b.bias &&
           a.aligned == b.aligned;
}

void multiply_many(struct stream *s, const product &p, bool to_float)
{
    plan_key key = { p.rows, p.in_dim, p.out_dim, p.out_stride, to_float, p.bias != NULL,
                     (uintptr_t)p.out % 16 == 0 };
    struct linear_plans *plans = s->plans;
    plan *place = plan_place(plans, key);
    description d = {};
    const float one = 1, zero = 0;

    cublasStatus_t e = describe(&d, p, key);
    if (e == CUBLAS_STATUS_SUCCESS && !same_key(place->key, key))
        e = choose_algorithm(plans, place, &d, key);
    if (e == CUBLAS_STATUS_SUCCESS)
        e = cublasLtMatmul(plans->handle, d.product, &one, p.weight, d.weight, p.x, d.x, &zero,
                           p.out, d.out, p.out, d.out, &place->algo, plans->workspace,
                           WORKSPACE_BYTES, s->cu);
    forget(&d);
    if (e != CUBLAS_STATUS_SUCCESS)
        stream_check(s, e == CUBLAS_STATUS_EXECUTION_FAILED ? cudaErrorLaunchFailure
                                                            : cudaErrorNotSupported, "linear");
}

/* cuBLASLt adds a bias before it rounds, but for outputs whose rows do not begin at
 * multiples of 16 bytes seems to round first: tests found it.  No model has such. */
bool rounds_once(const product &p)
{
    return !p.bias || (p.out_dim % 8 == 0 && p.out_stride % 8 == 0 && (uintptr_t)p.out % 16 == 0);
}

void multiply(struct stream *s, const product &p, enum dtype weight_type, bool to_float)
{
    if (!stream_enter(s) || p.rows == 0)
        return;
    if (weight_type == DTYPE_F32)
        to_float ? launch_float<float>(s, p) : launch_float<__nv_bfloat16>(s, p);
    else if (p.rows > FEW_ROWS && rounds_once(p))
        multiply_many(s, p, to_float);
    else
        to_float ? launch_slices<float>(s, p) : launch_slices<__nv_bfloat16>(s, p);
}

}

void cuda_linear(struct stream *s, const struct linear_args *a)
{
    product p = { a->out, (const __nv_bfloat16 *)a->x, (const __nv_bfloat16 *)a->weight,
                  (const __nv_bfloat16 *)a->bias, NULL, a->rows, a->in_dim, a->out_dim,
                  a->out_stride };

    multiply(s, p, a->weight_type, false);
}

void cuda_logits(struct stream *s, const struct logits_args *a)
{
    product p = { a->out, (const __nv_bfloat16 *)a->x, (const __nv_bfloat16 *)a->weight, NULL,
                  NULL, a->rows, a->dim, a->vocab, a->vocab };

    multiply(s, p, a->weight_type, true);
}

/* Both products one after the other, in one where up follows gate in memory. */
static void gate_in_parts(struct stream *s, const struct linear_gated_args *a)
{
    __nv_bfloat16 *gate = (__nv_bfloat16 *)a->scratch, *up = gate + a->dim;
    size_t bytes = (size_t)a->dim * a->in_dim * dtype_bytes(a->weight_type);
    bool joined = (const char *)a->gate + bytes == a->up;
    struct linear_args product = {};
    struct silu_mul_args last = {};

    product.out = gate;
    product.x = a->x;
    product.weight = a->gate;
    product.weight_type = a->weight_type;
    product.rows = a->rows;
    product.in_dim = a->in_dim;
    product.out_dim = joined ? 2 * a->dim : a->dim;
    product.out_stride = 2 * a->dim;
    cuda_linear(s, &product);
    if (!joined) {
        product.out = up;
        product.weight = a->up;
        cuda_linear(s, &product);
    }
    last.out = a->out;
    last.gate = gate;
    last.up = up;
    last.rows = a->rows;
    last.dim = a->dim;
    last.in_stride = 2 * a->dim;
    cuda_silu_mul(s, &last);
}

void cuda_linear_gated(struct stream *s, const struct linear_gated_args *a)
{
    product p = { a->out, (const __nv_bfloat16 *)a->x, (const __nv_bfloat16 *)a->gate, NULL,
                  (const __nv_bfloat16 *)a->up, a->rows, a->in_dim, a->dim, a->dim };

    if (!stream_enter(s) || p.rows == 0)
        return;
    if (p.rows > FEW_ROWS || a->weight_type == DTYPE_F32)
        gate_in_parts(s, a);
    else if (p.out_dim > 2 * 2 * HALF * s->be->info.sm_count)
        launch_gated<2>(s, p);
    else
        launch_gated<1>(s, p);
}
