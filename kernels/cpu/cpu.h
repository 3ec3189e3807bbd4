#ifndef KERNELS_CPU_CPU_H
#define KERNELS_CPU_CPU_H

#include "kernels/backend_open.h"
#include "kernels/ops.h"

/* Shared by the files of the CPU back end; private to kernels/cpu.
 *
 * Every operation is one function cpu_x: it cuts the work into tasks that
 * write disjoint results, and runs them on the workers.  The arithmetic of a
 * task is a leaf function out of a table per instruction set (scalar_*,
 * avx2_*, avx512_*), chosen once in backend_open().  The scalar leaf is the
 * specification.  How the work is cut must not change a result: a leaf's
 * order of additions depends on the shape of its row alone. */

enum cpu_isa { ISA_SCALAR, ISA_AVX2, ISA_AVX512 };

struct workers;

/* n threads in all; the caller of workers_run() is one of them. */
struct workers *workers_create(int n);
void workers_destroy(struct workers *w);
int workers_count(const struct workers *w);

/* Run fn(arg, task, worker) for every task in [0, n_tasks), each exactly once,
 * and return when all are done.  worker is in [0, workers_count). */
void workers_run(struct workers *w, int n_tasks,
                 void (*fn)(void *arg, int task, int worker), void *arg);

struct cpu_scratch;

struct backend {
    const struct device_calls *calls; /* first, see backend_open.h */
    struct backend_ops ops;
    struct device_info info;
    struct workers *workers;
    struct cpu_scratch *scratch;      /* [workers_count] */
    enum cpu_isa isa;
};

struct stream {
    struct backend *be;
    enum status failed;          /* ST_OK on the CPU, but for tests */
};

/* Per-worker scratch of at least bytes, 64-byte aligned, kept and grown by the back
 * end; contents undefined. */
void *cpu_scratch(struct stream *s, int worker, size_t bytes);

void cpu_embed(struct stream *s, const struct embed_args *a);
void cpu_add_norm(struct stream *s, const struct add_norm_args *a);
void cpu_linear(struct stream *s, const struct linear_args *a);
void cpu_logits(struct stream *s, const struct logits_args *a);
void cpu_rope_table(struct stream *s, const struct rope_table_args *a);
void cpu_rope_store(struct stream *s, const struct rope_store_args *a);
void cpu_linear_heads(struct stream *s, const struct linear_heads_args *a);
void cpu_latent_store(struct stream *s, const struct latent_store_args *a);
void cpu_attend_dense(struct stream *s, const struct attend_dense_args *a);
void cpu_block_filter(struct stream *s, const struct block_filter_args *a);
void cpu_token_select(struct stream *s, const struct token_select_args *a);
void cpu_attend_selected(struct stream *s, const struct attend_selected_args *a);
void cpu_attend_two_level(struct stream *s, const struct attend_two_level_args *a);
void cpu_silu_mul(struct stream *s, const struct silu_mul_args *a);
void cpu_linear_gated(struct stream *s, const struct linear_gated_args *a);
void cpu_route(struct stream *s, const struct route_args *a);
void cpu_experts(struct stream *s, const struct experts_args *a);
void cpu_sample(struct stream *s, const struct sample_args *a);
size_t cpu_block_filter_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                int max_blocks);
size_t cpu_token_select_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                int keep_blocks);
size_t cpu_attend_dense_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                int max_blocks);
size_t cpu_attend_two_level_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                    int max_blocks, int keep_blocks, int keep_tokens);
size_t cpu_experts_scratch(const struct experts_shape *shape);

static inline float bf16_to_float(bf16 v)
{
    union { uint32_t u; float f; } x = { .u = (uint32_t)v << 16 };
    return x.f;
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline bf16 float_to_bf16(float f)
{
    union { float f; uint32_t u; } x = { .f = f };
    if (f != f)
        return (bf16)((x.u >> 16) | 0x40);
    return (bf16)((x.u + 0x7fff + ((x.u >> 16) & 1)) >> 16);
}

#endif
