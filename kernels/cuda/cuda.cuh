#ifndef KERNELS_CUDA_CUDA_CUH
#define KERNELS_CUDA_CUDA_CUH

#include "kernels/backend_open.h"
#include "kernels/ops.h"

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

/* Shared by the files of the CUDA back end; private to kernels/cuda.
 *
 * Every operation is one extern "C" launcher cuda_x that queues one or a few
 * kernels on the stream and calls stream_note(): the first failure sticks, and
 * what is queued after it is skipped. */

enum {
    WARP = 32,
    MOST_ROW = 32768,            /* elements, of any activation that is normalised */
    MOST_KV_HEADS = 64,
    MOST_ARRIVED = 4096 * MOST_KV_HEADS, /* of as many sequences as an engine can have */
};

struct linear_plans;            /* linear.cu: cuBLASLt and its plans by shape */
struct sampler;                 /* sample.cu: staging of the sampler's parameters */

struct backend {
    const struct device_calls *calls;
    struct device_info info;
    struct backend_ops ops;
    int device;
    bool hopper;                 /* compute capability 9.0: clusters, early launches, wgmma */
    size_t most_shared;          /* bytes of shared memory that a thread block can have */
    size_t most_pitch;           /* bytes from row to row of a copy in two dimensions */
};

/* The size of the thread-block clusters of two_level.cu, and what it was chosen for. */
struct cluster_choice {
    int dim, tiles, units, max_blocks, keep_blocks, size; /* size 0: not chosen yet */
};

struct stream {
    struct backend *be;
    cudaStream_t cu;
    cudaError_t failed;          /* first failure, or cudaSuccess */
    const char *failed_op;
    struct linear_plans *plans;
    struct sampler *sampler;
    struct cluster_choice clusters;
    unsigned *arrived;           /* [MOST_ARRIVED] on the device: thread blocks that have
                                    ended; zero before and after every kernel that counts */
};

struct graph {
    struct backend *be;
    cudaGraphExec_t cu;
};

struct event {
    struct backend *be;
    cudaEvent_t cu;
};

/* Remember the first failure. */
static inline void stream_check(struct stream *s, cudaError_t e, const char *op)
{
    if (e != cudaSuccess && s->failed == cudaSuccess) {
        s->failed = e;
        s->failed_op = op;
    }
}

/* To be called before anything is queued: the calling thread may have used another device.
 * False where the stream has failed. */
static inline bool stream_enter(struct stream *s)
{
    if (s->failed == cudaSuccess)
        stream_check(s, cudaSetDevice(s->be->device), "stream_enter");
    return s->failed == cudaSuccess;
}

/* Called behind every launch. */
static inline void stream_note(struct stream *s, const char *op)
{
    stream_check(s, cudaGetLastError(), op);
}

cudaError_t linear_plans_create(struct linear_plans **out);
void linear_plans_destroy(struct linear_plans *p);
struct sampler *sampler_create(void);          /* allocates on the device when first used */
void sampler_destroy(struct sampler *sampler);

/* Queue a kernel that may start before those queued earlier have ended: it must call
 * wait_for_inputs() in every block before it reads what they wrote, and before it writes
 * anything.  What it reads earlier (weights) is fetched while they finish. */
template <typename... P, typename... A>
static inline void launch_early(struct stream *s, const char *op, void (*kernel)(P...),
                                dim3 grid, int threads, size_t shared_bytes, A... args)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute early[1];

    if (!stream_enter(s))
        return;
    if (shared_bytes > 48 * 1024)
        stream_check(s, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             (int)shared_bytes), op);
    early[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early[0].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = s->cu;
    config.attrs = early;
    config.numAttrs = s->be->hopper ? 1 : 0;
    stream_check(s, cudaLaunchKernelEx(&config, kernel, P(args)...), op);
}

/* All that was queued before this kernel has ended, and what it wrote can be seen. */
static __device__ __forceinline__ void wait_for_inputs()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* The next kernel may start, as far as there is room. */
static __device__ __forceinline__ void let_next_start()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* Whether this thread block is the last of n to come here, and so sees what all of them wrote
 * before.  They count with a word of the stream's `arrived`, and wait for their inputs before;
 * all threads of a block call it together. */
static __device__ __forceinline__ bool last_to_arrive(unsigned *arrived, int n)
{
    bool last = false;

    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(arrived, 1) == (unsigned)n - 1;
        if (last)
            *arrived = 0;        /* as the next kernel wants it */
        __threadfence();
    }
    return __syncthreads_or(last);
}

extern "C" {
void cuda_embed(struct stream *s, const struct embed_args *a);
void cuda_add_norm(struct stream *s, const struct add_norm_args *a);
void cuda_linear(struct stream *s, const struct linear_args *a);
void cuda_logits(struct stream *s, const struct logits_args *a);
void cuda_rope_table(struct stream *s, const struct rope_table_args *a);
void cuda_rope_store(struct stream *s, const struct rope_store_args *a);
void cuda_linear_heads(struct stream *s, const struct linear_heads_args *a);
void cuda_latent_store(struct stream *s, const struct latent_store_args *a);
void cuda_attend_dense(struct stream *s, const struct attend_dense_args *a);
void cuda_block_filter(struct stream *s, const struct block_filter_args *a);
void cuda_token_select(struct stream *s, const struct token_select_args *a);
void cuda_attend_selected(struct stream *s, const struct attend_selected_args *a);
void cuda_attend_two_level(struct stream *s, const struct attend_two_level_args *a);
void cuda_silu_mul(struct stream *s, const struct silu_mul_args *a);
void cuda_linear_gated(struct stream *s, const struct linear_gated_args *a);
void cuda_route(struct stream *s, const struct route_args *a);
void cuda_experts(struct stream *s, const struct experts_args *a);
/* The latter by the number of rows and the type of the weights. */
void cuda_experts_few(struct stream *s, const struct experts_args *a);
void cuda_experts_many(struct stream *s, const struct experts_args *a);
void cuda_experts_float(struct stream *s, const struct experts_args *a);
void cuda_sample(struct stream *s, const struct sample_args *a);
/* The sequences of attend_dense with one row, and those with more. */
void cuda_attend_one_row(struct stream *s, const struct attend_dense_args *a);
void cuda_attend_many_rows(struct stream *s, const struct attend_dense_args *a);
/* The latter with the instructions of Hopper, or false on other devices. */
bool attend_many_rows_hopper(struct stream *s, const struct attend_dense_args *a);
/* Where the rows of chosen tokens are, after the missing ones have been put into their sets. */
struct resolve_args {
    const bf16 **rows;          /* [S, G, keep_tokens] */
    uint32_t *place;            /* [S, G, keep_tokens] work space, as the next two */
    int *missing;
    uint16_t *into;
    const int32_t *chosen;      /* [S, G, keep_tokens] */
    const int32_t *n_chosen;    /* [S, G] */
    const bf16 *kv;
    const int32_t *table;       /* [S, max_blocks] block ids in kv, or -1 */
    const struct hot_rows *hot; /* host */
    struct kv_shape shape;
    int seqs, max_blocks, keep_tokens;
};
void cuda_resolve(struct stream *s, const struct resolve_args *a);
/* attend_selected of tokens whose rows are at given addresses, in place of kv and table, or
 * NULL. */
void cuda_attend_rows(struct stream *s, const struct attend_selected_args *a,
                      const bf16 *const *rows);
/* With the kernels made for it, or false where there are none for these arguments. */
bool attend_two_level_fused(struct stream *s, const struct attend_two_level_args *a);
size_t cuda_block_filter_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                 int max_blocks);
size_t cuda_token_select_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                 int keep_blocks);
size_t cuda_attend_dense_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                 int max_blocks);
size_t cuda_attend_two_level_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                     int max_blocks, int keep_blocks, int keep_tokens);
size_t cuda_experts_scratch(const struct experts_shape *shape);
}

static __device__ __forceinline__ float warp_sum(float v)
{
    for (int lane = WARP / 2; lane > 0; lane /= 2)
        v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

/* Unsigned integers in the order of the floats, both zeros the same; never 0.  Not for NaN. */
static __device__ __forceinline__ unsigned key_of(float v)
{
    unsigned bits = __float_as_uint(v + 0.0f); /* -0 is 0 */

    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ float warp_max(float v)
{
    for (int lane = WARP / 2; lane > 0; lane /= 2)
        v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
    return v;
}

/* Two bf16 in a word to two floats. */
static __device__ __forceinline__ float2 unpack_bf16(unsigned w)
{
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
}

static __device__ __forceinline__ unsigned pack_bf16(float low, float high)
{
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);

    return *(unsigned *)&v;
}

static __device__ __forceinline__ float silu_mul(float gate, float up)
{
    return gate / (1 + __expf(-gate)) * up;
}

/* A weight of either stored type. */
static __device__ __forceinline__ float weight_at(const void *w, size_t i, enum dtype t)
{
    return t == DTYPE_F32 ? ((const float *)w)[i] : __bfloat162float(((const __nv_bfloat16 *)w)[i]);
}

#endif
