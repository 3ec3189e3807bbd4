#ifndef KERNELS_CUDA_CLUSTER_CUH
#define KERNELS_CUDA_CLUSTER_CUH

#include "kernels/cuda/mma.cuh"

/* Thread-block clusters: where a block is in its own, barriers of shared memory, and stores to
 * the shared memory of other blocks that arrive at those.  From compute capability 9.0 on. */

enum { MOST_SHARED = 227 * 1024 }; /* bytes of a thread block, of compute capability 9.0 */

static __host__ __device__ inline int round_up(int n, int to)
{
    return (n + to - 1) / to * to;
}

/* Of n things each thread block of a cluster has so many, the last ones fewer. */
static __host__ __device__ inline int share_of(int n, int size)
{
    return (n + size - 1) / size;
}

/* A launch of clusters in a row, which may start early (launch_early() in cuda.cuh); the attributes
 * are pointed to, so it stays where it is. */
struct cluster_launch {
    cudaLaunchConfig_t config;
    cudaLaunchAttribute attributes[2];
};

static inline void configure_clusters(struct cluster_launch *l, int clusters, int cluster,
                                      int threads, size_t shared_bytes)
{
    *l = {};
    l->attributes[0].id = cudaLaunchAttributeClusterDimension;
    l->attributes[0].val.clusterDim.x = cluster;
    l->attributes[0].val.clusterDim.y = l->attributes[0].val.clusterDim.z = 1;
    l->attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    l->attributes[1].val.programmaticStreamSerializationAllowed = 1;
    l->config.gridDim = dim3(clusters * cluster);
    l->config.blockDim = dim3(threads);
    l->config.dynamicSmemBytes = shared_bytes;
    l->config.attrs = l->attributes;
    l->config.numAttrs = 2;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

static __device__ __forceinline__ int cluster_rank()
{
    int rank;

    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

static __device__ __forceinline__ int cluster_size()
{
    int size;

    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

/* All threads of all blocks have come here; what they wrote before is seen by all. */
static __device__ __forceinline__ void cluster_barrier()
{
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

/* Where thread block `rank` has what this one has at p. */
static __device__ __forceinline__ unsigned address_in(int rank, const void *p)
{
    unsigned at;

    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
    return at;
}

static __device__ __forceinline__ void barrier_init(uint64_t *barrier)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(shared_address(barrier))
                 : "memory");
}

/* Its phase ends when as many bytes have arrived, before or after this. */
static __device__ __forceinline__ void barrier_expect(uint64_t *barrier, unsigned bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 : : "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void barrier_wait(uint64_t *barrier)
{
    asm volatile("{\n\t.reg .pred p;\n"
                 "wait:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0;\n\t"
                 "@p bra.uni done;\n\tbra.uni wait;\ndone:\n\t}"
                 : : "r"(shared_address(barrier)) : "memory");
}

/* Shared memory of this block at p to what block `rank` has as `place`. */
static __device__ __forceinline__ void send_to(int rank, const void *place, const void *p,
                                               unsigned bytes, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];"
                 : : "r"(address_in(rank, place)), "r"(shared_address(p)), "r"(bytes),
                     "r"(address_in(rank, barrier)) : "memory");
}

/* To the same place in block `rank`. */
static __device__ __forceinline__ void send_bytes(int rank, const void *p, unsigned bytes,
                                                  uint64_t *barrier)
{
    send_to(rank, p, p, bytes, barrier);
}

/* To the place in block `rank` that this block has as `place`.  As large pieces as can be:
 * the receiver's barrier takes them one by one. */
static __device__ __forceinline__ void send_4(int rank, const float *place, float4 v,
                                              uint64_t *barrier)
{
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], "
                 "{%1, %2, %3, %4}, [%5];"
                 : : "r"(address_in(rank, place)), "r"(__float_as_uint(v.x)),
                     "r"(__float_as_uint(v.y)), "r"(__float_as_uint(v.z)),
                     "r"(__float_as_uint(v.w)), "r"(address_in(rank, barrier)) : "memory");
}

static __device__ __forceinline__ void send_2(int rank, const float2 *place, float2 v,
                                              uint64_t *barrier)
{
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], "
                 "{%1, %2}, [%3];"
                 : : "r"(address_in(rank, place)), "r"(__float_as_uint(v.x)),
                     "r"(__float_as_uint(v.y)), "r"(address_in(rank, barrier)) : "memory");
}

/* What ordinary stores have written may be read by copies that start after the next
 * __syncthreads(). */
static __device__ __forceinline__ void publish_to_copies()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif
#endif
