#ifndef TESTS_SUPPORT_RANDOM_DATA_H
#define TESTS_SUPPORT_RANDOM_DATA_H

#include "kernels/layout.h"

#include <stddef.h>
#include <stdint.h>

/* Reproducible data: the same seed gives the same numbers everywhere. */

struct test_random { uint64_t state; };

struct test_random test_random(uint64_t seed);
uint64_t random_u64(struct test_random *r);
int random_below(struct test_random *r, int n);          /* [0, n) */
float random_uniform(struct test_random *r);             /* [-1, 1) */
float random_normal(struct test_random *r);              /* mean 0, variance 1, |x| <= 6 */

/* Normal values times scale. */
void random_floats(struct test_random *r, float *out, size_t n, float scale);
void random_bf16s(struct test_random *r, bf16 *out, size_t n, float scale);

#endif
