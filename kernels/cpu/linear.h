#ifndef KERNELS_CPU_LINEAR_H
#define KERNELS_CPU_LINEAR_H

#include "kernels/cpu/cpu.h"

/* Matrix products of the CPU back end; private to kernels/cpu.
 *
 * An output element is the dot product of one row of x and one row of the weights,
 * read where they lie and widened in registers.  Its order of additions is part of
 * the leaf: lane l of a vector sums the products k = l, l + lanes, l + 2 lanes, ...
 * in that order with fused multiply-add, and a fixed tree adds the lanes; the scalar
 * leaf has one lane and no fusing.  With a turned matrix (latent.h) an element is
 * the sum over k = 0, 1, 2, ... in that order.  Tiles, blocks and threads only decide
 * when an element is worked on, never in what order, so one row gives the same bits
 * alone and among two thousand. */

/* rows x outs elements of one product. */
struct dot_block {
    float *out;                  /* [rows] x [outs], row stride out_stride */
    const float *x;              /* [rows] x [in_dim], row stride x_stride */
    const void *weight;          /* [outs, in_dim] of type; turned [in_dim] x [outs] */
    const void *bias;            /* [outs] of type, or NULL; turned NULL */
    size_t out_stride, x_stride; /* elements */
    size_t weight_stride;        /* elements from row to row of a turned matrix */
    enum dtype type;
    int rows, outs, in_dim;
};

void scalar_dot_block(const struct dot_block *b);
void avx2_dot_block(const struct dot_block *b);
void avx512_dot_block(const struct dot_block *b);

void scalar_turned_block(const struct dot_block *b);
void avx2_turned_block(const struct dot_block *b);
void avx512_turned_block(const struct dot_block *b);

static inline void (*dot_leaf_of(const struct stream *s))(const struct dot_block *b)
{
    return s->be->isa == ISA_AVX512 ? avx512_dot_block
           : s->be->isa == ISA_AVX2 ? avx2_dot_block
                                    : scalar_dot_block;
}

static inline void (*turned_leaf_of(const struct stream *s))(const struct dot_block *b)
{
    return s->be->isa == ISA_AVX512 ? avx512_turned_block
           : s->be->isa == ISA_AVX2 ? avx2_turned_block
                                    : scalar_turned_block;
}

static inline float weight_at(const void *weight, enum dtype type, size_t i)
{
    return type == DTYPE_F32 ? ((const float *)weight)[i]
                             : bf16_to_float(((const bf16 *)weight)[i]);
}

/* n weights as floats in store; NULL for NULL. */
static inline const float *weights_in(float *store, const void *weight, enum dtype type, int n)
{
    if (!weight)
        return NULL;
    for (int i = 0; i < n; i++)
        store[i] = weight_at(weight, type, (size_t)i);
    return store;
}

static inline const void *weight_offset(const void *weight, enum dtype type, size_t i)
{
    return (const char *)weight + i * dtype_bytes(type);
}

#endif
