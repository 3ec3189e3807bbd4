#ifndef TESTS_SUPPORT_KERNEL_REFERENCE_H
#define TESTS_SUPPORT_KERNEL_REFERENCE_H

#include "kernels/backend.h"
#include "kernels/layout.h"
#include "tests/support/random_data.h"

/* What the references of several kernel tests share.  Slow and obvious, and none of it
 * is made of the code under test. */

float bf16_value(bf16 v);

/* The bf16 nearest to x, of two equally near the even one; NaN for NaN. */
bf16 nearest_bf16(float x);

/* out = R x, the rotation of layout.h, as a product with its matrix. */
void rotate_slowly(double *out, const double *x, int head_dim);

/* Shapes of latent attention: GLM-4.7-Flash's, and small ones that are awkward. */
enum { N_LATENT_SHAPES = 5 };
extern const struct latent_shape { int head_dim, heads; } latent_shapes[N_LATENT_SHAPES];

/* The largest power of two below: of a latent key of so many channels how many are latent. */
int latent_dim_of(int head_dim);

/* Blocks that a context of so many tokens takes. */
int blocks_of(int n_tokens);

/* All bytes are 0xff, so that what was never written shows: NaN in every float type, -1 in every
 * integer.  Free with mem_free(). */
void *nan_alloc(size_t bytes);

/* 0 .. n - 1 in random order. */
void random_order(struct test_random *r, int32_t *out, int n);

/* [kv_heads, INDEX_CHANNELS_KEPT]: different channels for each head, in random order. */
void random_channels(struct test_random *r, int16_t *out, const struct kv_shape *shape);

/* All instruction sets, scalar first. */
enum { TEST_ALL_ISAS = 3 };
extern const char *const test_all_isas[TEST_ALL_ISAS];

/* A CPU back end with so many threads, the caller closes it; NULL where the processor
 * lacks the instructions. */
struct backend *open_with_threads(const char *isa, int threads);

#endif
