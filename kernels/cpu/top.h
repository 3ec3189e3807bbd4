#ifndef KERNELS_CPU_TOP_H
#define KERNELS_CPU_TOP_H

#include <stdint.h>

/* Exact choice of the largest; private to kernels/cpu. */

/* Scores as keys of the same order; NaN with a clear sign is above infinity.  Adding 0
 * makes -0, the score of many a zero key, the 0 that it equals. */
static inline uint32_t top_key(float score)
{
    union { float f; uint32_t u; } x = { .f = score + 0.0f };

    return x.u & 0x80000000u ? ~x.u : x.u | 0x80000000u;
}

#define TOP_FORCED UINT32_MAX

/* The numbers of the `keep` largest keys, ascending, equal keys by lower number, into
 * out; how many: keep, or n if that is less. */
int choose_top(int32_t *out, const uint32_t *keys, int n, int keep);

#endif
