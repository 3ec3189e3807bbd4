#ifndef KERNELS_CUDA_MMA_CUH
#define KERNELS_CUDA_MMA_CUH

#include "kernels/cuda/cuda.cuh"

/* Tensor-core products of a warp, and the copies that feed them.
 *
 * mma m16n8k16, with g = lane / 4 and c = lane % 4.  The left operand has rows g (words 0
 * and 2) and g + 8 (1 and 3), columns 2c, 2c + 1 (words 0 and 1) and 2c + 8, 2c + 9 (2 and
 * 3).  The right operand has column g, rows 2c, 2c + 1 (word 0) and 2c + 8, 2c + 9 (1).
 * The result has row g (0 and 1) and g + 8 (2 and 3), columns 2c and 2c + 1. */

static __device__ __forceinline__ unsigned shared_address(const void *p)
{
    return (unsigned)__cvta_generic_to_shared(p);
}

static __device__ __forceinline__ unsigned load_shared_32(unsigned at)
{
    unsigned v;

    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}

static __device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4],
                                                unsigned b0, unsigned b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Four 8 x 8 matrices of bf16; lanes 8i to 8i + 7 say where the rows of matrix i are. */
static __device__ __forceinline__ void load_matrices(unsigned (&m)[4], unsigned row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(row) : "memory");
}

static __device__ __forceinline__ void load_matrices_turned(unsigned (&m)[4], unsigned row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(row) : "memory");
}

/* 8 weights that are read once: they need no place in the first-level cache. */
static __device__ __forceinline__ uint4 load_weights(const __nv_bfloat16 *from)
{
    uint4 v;

    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

/* Bring the line of an address into the second-level cache. */
static __device__ __forceinline__ void fetch_line(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" : : "l"(p));
}

/* Copy 16 bytes to shared memory in the background, or zeros. */
static __device__ __forceinline__ void copy_16(unsigned to, const void *from, bool there = true)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 : : "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

static __device__ __forceinline__ void copy_4(unsigned to, const void *from)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(to), "l"(from) : "memory");
}

static __device__ __forceinline__ void copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* All but the last N groups have arrived (for this thread). */
template <int N>
static __device__ __forceinline__ void copy_wait()
{
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

#endif
