#ifndef KERNELS_CPU_LINEAR_H
#define KERNELS_CPU_LINEAR_H

#include "kernels/cpu/cpu.h"

/* Matrix products of the CPU back end; private to kernels/cpu.
 *
 * An output element is the dot product of one row of x and one row of the weights.
 * Its order of additions is part of the leaf: lane l of a vector sums the products
 * k = l, l + lanes, l + 2 lanes, ... in that order with fused multiply-add, and a
 * fixed tree adds the lanes; the scalar leaf has one lane and no fusing.  Tiles,
 * blocks and threads only decide when an element is worked on, never in what order,
 * so one row gives the same bits alone and among two thousand.
 *
 * Two ways through a product:
 *   direct  weights are read where they lie and widened in registers.  For few
 *           rows, when time is the time to read the weights.
 *   packed  a panel of weights is widened once into a contiguous stream, rows of x
 *           likewise, and tiles of accumulators run over both.  For many rows. */

/* rows x outs elements of one product. */
struct dot_block {
    float *out;                  /* [rows] x [outs], row stride out_stride */
    const float *x;              /* [rows, in_dim] */
    const void *weight;          /* [outs, in_dim] of type */
    const void *bias;            /* [outs] of type, or NULL */
    size_t out_stride;           /* elements */
    enum dtype type;
    int rows, outs, in_dim;
};

/* One tile over n_steps vectors of k.  Packed operands hold, step by step, the
 * vectors of the tile's rows (x) and of TILE_OUTS outputs (weight).  Sums start at
 * zero, or at acc when not first; they end in acc, or when last in out. */
struct dot_tile {
    const float *x;              /* [n_steps][rows][lanes] */
    const float *weight;         /* [n_steps][tile_outs][lanes] */
    float *acc;                  /* [rows][tile_outs][lanes]; NULL if first and last */
    float *out;
    const float *bias;           /* [tile_outs] or NULL */
    size_t out_stride;
    int n_steps, rows, outs;     /* rows <= tile_rows, outs <= tile_outs */
    bool first, last;
};

struct linear_leaf {
    int lanes;                   /* floats in a vector */
    int tile_rows, tile_outs;
    int direct_rows;             /* up to this many rows the direct way is faster */

    void (*direct)(const struct dot_block *b);

    /* These three are absent, and direct_rows without bound, in the scalar leaf. */
    void (*pack_weight)(float *packed, const void *weight, enum dtype type, int outs,
                        int in_dim, int k0, int k);
    void (*pack_rows)(float *packed, const float *x, int rows, int in_dim, int k0, int k);
    void (*tile)(const struct dot_tile *t);
};

extern const struct linear_leaf scalar_linear_leaf, avx2_linear_leaf, avx512_linear_leaf;

static inline float weight_at(const void *weight, enum dtype type, size_t i)
{
    return type == DTYPE_F32 ? ((const float *)weight)[i]
                             : bf16_to_float(((const bf16 *)weight)[i]);
}

static inline const void *weight_offset(const void *weight, enum dtype type, size_t i)
{
    return (const char *)weight + i * dtype_bytes(type);
}

#endif
