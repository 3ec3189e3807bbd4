#ifndef TESTS_EMULATOR_PTX_H
#define TESTS_EMULATOR_PTX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Runs the kernels of the CUDA back end on the CPU, so that machines without a GPU test them:
 * what nvcc made of them as PTX is read and interpreted.
 *
 *   read      a module's text becomes decoded instructions (ptx_read.c)
 *   run       warps of 32 lanes, all blocks of a cluster at the same time, one cluster after the
 *             other (ptx_run.c), and what each operation does (ptx_ops.h)
 *   runtime   the calls of the CUDA runtime that the back end makes, on host memory (cudart.c),
 *             and cuBLASLt's products (cublaslt.c)
 *
 * Global memory is host memory: a pointer means the same to kernels and to tests.  What memory
 * a kernel may touch is what ptx_memory_add() was told of; anything else ends the process with
 * the kernel's name, the line of PTX and the address.  So does everything that is not understood,
 * misaligned, or waits for what cannot come.
 *
 * Nothing here is thread-safe: callers hold a lock (cudart.c has one). */

struct ptx_module;
struct ptx_kernel;

/* text: of a .ptx file; not kept. */
struct ptx_module *ptx_module_read(const char *text, size_t n);
void ptx_module_free(struct ptx_module *m);

/* By mangled name, or NULL; the module owns it. */
struct ptx_kernel *ptx_kernel_find(struct ptx_module *m, const char *name);
/* Number of parameters, and the bytes of parameter i. */
int ptx_kernel_params(const struct ptx_kernel *k);
size_t ptx_kernel_param_bytes(const struct ptx_kernel *k, int i);
/* Bytes of shared memory that the kernel declares with a size. */
size_t ptx_kernel_shared_bytes(const struct ptx_kernel *k);
/* The text's .target, 80 or 90. */
int ptx_kernel_target(const struct ptx_kernel *k);

struct ptx_launch {
    unsigned grid[3], block[3], cluster[3]; /* cluster: 1, 1, 1 without */
    size_t shared_bytes;                    /* dynamic */
    const void *const *params;              /* a pointer to the value of each */
};

/* Returns when the kernel has ended. */
void ptx_run(const struct ptx_kernel *k, const struct ptx_launch *l);

/* Memory that kernels may touch, from p on; writable: also write. */
void ptx_memory_add(const void *p, size_t bytes, bool writable);
void ptx_memory_remove(const void *p);

#endif
