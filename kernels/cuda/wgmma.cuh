#ifndef KERNELS_CUDA_WGMMA_CUH
#define KERNELS_CUDA_WGMMA_CUH

#include "kernels/cuda/cluster.cuh"

#include <cudaTypedefs.h>

/* What kernels with Hopper's products of 128 threads (wgmma) share: barriers of shared memory,
 * bulk tensor copies of rows to it, descriptions of operands that lie there.  For code for 9.0a. */

namespace wgmma {

enum {
    GROUP = 128,                 /* threads that issue a product together */
    PART = 64,                   /* channels of a row that lie together in shared memory */
    PART_BYTES = 2 * PART,       /* swizzled: 16 bytes number i of row r lie at i ^ r % 8 */
};

/* Where the 16 bytes number `piece` of a row lie, in parts of N rows. */
template <int N>
static __device__ __forceinline__ unsigned place_of(int row, int piece)
{
    return piece / 8 * N * PART_BYTES + row * PART_BYTES + (piece % 8 ^ row % 8) * 16;
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* ---- barriers and copies */

static __device__ __forceinline__ void barrier_init(uint64_t *barrier, unsigned arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 : : "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

static __device__ __forceinline__ void barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
                 : : "r"(shared_address(barrier)) : "memory");
}

static __device__ __forceinline__ void barrier_wait(uint64_t *barrier, unsigned parity)
{
    asm volatile("{\n\t.reg .pred p;\n"
                 "wait:\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t"
                 "@p bra.uni done;\n\tbra.uni wait;\ndone:\n\t}"
                 : : "r"(shared_address(barrier)), "r"(parity) : "memory");
}

/* PART channels from `channel` on of BLOCK_TOKENS rows of the pool. */
static __device__ __forceinline__ void copy_part(void *to, const CUtensorMap *map, int channel,
                                                 int row, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];"
                 : : "r"(shared_address(to)), "l"(map), "r"(channel), "r"(row),
                     "r"(shared_address(barrier)) : "memory");
}

/* What this thread wrote to shared memory can be seen by products and copies. */
static __device__ __forceinline__ void show_writes()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int N>
static __device__ __forceinline__ void give_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(N));
}

template <int N>
static __device__ __forceinline__ void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(N));
}

/* ---- products */

#define WORDS_OF(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])

/* An operand in shared memory: rows of PART_BYTES, swizzled.  Where the rows are the inner
 * dimension of the product, `next` is the distance to the next PART channels. */
static __device__ __forceinline__ uint64_t operand(unsigned address, unsigned next)
{
    return (uint64_t)1 << 62 | (uint64_t)(8 * PART_BYTES >> 4) << 32 |
           (uint64_t)(next >> 4) << 16 | address >> 4;
}

/* Registers were written by others than products, or shared memory was. */
static __device__ __forceinline__ void products_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void products_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* All products but the last N groups of them have ended. */
template <int N>
static __device__ __forceinline__ void products_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(N) : "memory");
}

/* Nothing that uses these words moves across: to the compiler a product has ended as soon
 * as it has begun. */
template <int N>
static __device__ __forceinline__ void hold(float (&words)[N][4])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : WORDS_OF(words[i]) : : "memory");
}

/* Weights, as a product gave their scores, as the left operand of another. */
template <int N>
static __device__ __forceinline__ void pack_weights(unsigned (&weight)[N][4],
                                                    const float (&score)[2 * N][4])
{
#pragma unroll
    for (int step = 0; step < N; step++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            weight[step][i] = pack_bf16(score[2 * step + i / 2][i % 2 * 2],
                                        score[2 * step + i / 2][i % 2 * 2 + 1]);
}

#endif

/* ---- on the host */

/* cuTensorMapEncodeTiled() of the driver, which the program is not linked with. */
static inline PFN_cuTensorMapEncodeTiled_v12000 find_encoder()
{
    void *fn = NULL;
    cudaDriverEntryPointQueryResult found;

    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
        return NULL;
    return (PFN_cuTensorMapEncodeTiled_v12000)fn;
}

/* The pool as rows of `channels`, in boxes of a block by PART channels.  How many blocks it has
 * is not known here: the map has all that fit an int. */
static inline bool describe_rows(CUtensorMap *map, const bf16 *kv, int channels)
{
    static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encoder();
    const cuuint64_t size[] = { (cuuint64_t)channels, 0x7fffffff };
    const cuuint64_t stride[] = { (cuuint64_t)(2 * channels) };
    const cuuint32_t box[] = { PART, BLOCK_TOKENS }, step[] = { 1, 1 };

    return encode &&
           encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)kv, size, stride, box, step,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}
#endif
