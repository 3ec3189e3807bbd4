#ifndef TESTS_SUPPORT_GPU_DECODE_H
#define TESTS_SUPPORT_GPU_DECODE_H

#include "tests/support/decode_fixture.h"

/* A decode_fixture.h on the GPU.  Its contexts are stored once, as long as they ever become, and
 * each step sees a part of them. */

/* decode_init() with random queries and, unless attention is latent, random channels. */
void gpu_decode_init(struct decode_fixture *d, const struct decode_setup *s, int max_blocks,
                     uint64_t seed);

/* Contexts of 1 .. most tokens, the first of most, with so many more stored behind them; every
 * seventh is padding. */
void gpu_decode_start(struct decode_fixture *d, int most, int more);

/* Queries of the next step, rounded to bf16; those of the first are there already.  Every step
 * draws alike. */
void gpu_decode_queries(struct decode_fixture *d, bool first);

/* decode_args() with copies on the GPU of all that lasts, scratch among them: without out, q,
 * n_tokens, max_n_tokens and scale.  The copies are gpu_put()'s. */
struct attend_two_level_args gpu_decode_args(const struct decode_fixture *d);

#endif
