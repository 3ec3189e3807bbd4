#ifndef KERNELS_CPU_LOGIT_LEAF_H
#define KERNELS_CPU_LOGIT_LEAF_H

#include "kernels/cpu/cpu.h"

#include <string.h>

/* Leaves of sampling: passes over the logits of one row; private to kernels/cpu.
 *
 * Logits are compared as order keys, integers in the order of the floats they stand
 * for, with both zeros the same: integer maxima and counts may be taken in any order,
 * and a key falls into digits for a radix selection.  Not for NaN. */

/* Logits are surveyed, and skipped, by blocks.  Small enough that a block lies in the
 * first cache, large enough that a row of any vocabulary has about a thousand. */
enum { LOGIT_BLOCK = 256 };

/* x = (logit - max) / temperature; max is finite. */
struct logit_scale { float max, temperature; };

struct logit_draw {
    struct logit_scale scale;
    uint64_t seed;
    uint32_t index;
};

struct logit_leaf {
    /* The largest key of every block of l [n]; false if there is a NaN anywhere. */
    bool (*survey)(int32_t *block_max, const float *l, int n);
    /* The sum of e^x over those of l [n], n <= LOGIT_BLOCK, whose key is >= from. */
    double (*mass)(const float *l, int n, const struct logit_scale *scale, int32_t from);
    /* w = e^x of the logits with these keys, and the sum. */
    double (*weigh)(float *w, const int32_t *key, int n, const struct logit_scale *scale);
    /* How many of l [n] have a key >= from. */
    int (*count)(const float *l, int n, int32_t from);
    /* The i whose x + gumbel(id[i]) is the largest, the first such. */
    int (*draw)(const int32_t *key, const int32_t *id, int n, const struct logit_draw *draw);
};

extern const struct logit_leaf scalar_logit_leaf, avx2_logit_leaf, avx512_logit_leaf;

static inline const struct logit_leaf *logit_leaf_of(const struct stream *s)
{
    return s->be->isa == ISA_AVX512 ? &avx512_logit_leaf
           : s->be->isa == ISA_AVX2 ? &avx2_logit_leaf
                                    : &scalar_logit_leaf;
}

/* Negative floats order backwards as integers: all bits but the sign are turned over. */
static inline int32_t order_key(float v)
{
    int32_t bits;

    v += 0.0f;                   /* -0 becomes 0 */
    memcpy(&bits, &v, sizeof bits);
    return bits ^ ((bits >> 31) & INT32_MAX);
}

static inline float key_float(int32_t key)
{
    int32_t bits = key ^ ((key >> 31) & INT32_MAX);
    float v;

    memcpy(&v, &bits, sizeof v);
    return v;
}

#endif
