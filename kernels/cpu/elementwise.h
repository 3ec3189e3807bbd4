#ifndef KERNELS_CPU_ELEMENTWISE_H
#define KERNELS_CPU_ELEMENTWISE_H

#include "kernels/cpu/cpu.h"

/* Leaves of the operations that pass once over a row; private to kernels/cpu.
 * Each returns or writes what depends on its row alone. */
struct row_leaf {
    /* x += delta (unless NULL) and the sum of x^2, over n elements. */
    float (*add_square)(float *x, const float *delta, int n);
    /* out = x * factor * weight */
    void (*scale)(float *out, const float *x, float factor, const void *weight,
                  enum dtype weight_type, int n);
    /* out = silu(gate) * up */
    void (*silu_mul)(float *out, const float *gate, const float *up, int n);
};

extern const struct row_leaf scalar_row_leaf, avx2_row_leaf, avx512_row_leaf;

static inline const struct row_leaf *row_leaf_of(const struct stream *s)
{
    return s->be->isa == ISA_AVX512 ? &avx512_row_leaf
           : s->be->isa == ISA_AVX2 ? &avx2_row_leaf
                                    : &scalar_row_leaf;
}

#endif
