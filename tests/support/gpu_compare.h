#ifndef TESTS_SUPPORT_GPU_COMPARE_H
#define TESTS_SUPPORT_GPU_COMPARE_H

#include "kernels/backend.h"
#include "kernels/layout.h"
#include "tests/support/random_data.h"

#include <stddef.h>

/* Inputs that both back ends read alike, and the measure of ops.h between a result of
 * the GPU and the CPU's.  What differs ends the test. */

/* What ops.h allows more where the result is bf16. */
#define ACT_ROUNDING 0x1p-8

/* Free what a failed test left on the GPU: the set-up of each test of a case. */
void gpu_clean(void);

/* n values of about normal distribution (mean 0, variance 1, |x| < 3.5) times scale,
 * rounded to bf16.  Faster than random_floats().  Free with mem_free(). */
float *random_acts(struct test_random *r, size_t n, float scale);

/* The same as n weights of a type; f32 ones are not rounded to bf16. */
void *random_weights(struct test_random *r, size_t n, enum dtype type, float scale);

/* Weights on the GPU that begin `skip` times 16 bytes, the least alignment there, after
 * the start of a buffer. */
const void *gpu_put_weights(const void *host, size_t n, enum dtype type, int skip);

/* As floats; free with mem_free(). */
float *widened(const bf16 *x, size_t n);

struct row_pair {
    const float *got, *want;     /* [rows, dim] */
    size_t rows, dim;
    size_t got_stride, want_stride; /* elements; 0: dim */
    double tolerance;            /* of the largest magnitude of want's row */
};

/* End the test, saying `shape`, where an element is further off than allowed. */
void assert_rows_near(const char *shape, const struct row_pair *p);

/* The largest difference of two elements; NaN where one is NaN, so compare with !(... <= limit). */
float largest_difference(const float *got, const float *want, size_t n);

/* End the test where one of the bytes is not 0xff: what gpu_put(NULL, ...) gave and
 * nothing may write. */
void assert_unwritten(const char *shape, const void *got, size_t bytes);

/* The same of what lies behind the dim columns of each row: up to the next row, and from
 * the last one to the end. */
struct gaps {
    size_t element_bytes, rows, dim, stride;
    size_t total;                /* elements in all, >= rows * stride */
};
void assert_gaps_unwritten(const char *shape, const void *got, const struct gaps *g);

/* End the test where rows of bf16 are not equal to the bit. */
void assert_same_bits(const char *shape, const bf16 *got, const bf16 *want, size_t rows,
                      size_t dim);

#endif
