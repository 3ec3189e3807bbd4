#ifndef TESTS_SUPPORT_TOKEN_STORE_H
#define TESTS_SUPPORT_TOKEN_STORE_H

#include "kernels/ops.h"
#include "tests/support/random_data.h"

/* Random keys and values of one sequence's positions [from, from + n), through rope_store or
 * latent_store without rotation or weights of a norm, on a back end whose memory the host sees. */
struct token_store {
    bf16 *kv;
    uint8_t *index;
    const int32_t *table;        /* the sequence's blocks, in kv and in index */
    const int16_t *channels;
    struct kv_shape shape;
    int heads, from, n;
};

/* kind: bit 0 is FILTER_BOUNDS, bit 1 INDEX_CHANNELS, bit 2 latent attention, of whose row
 * latent_dim_of() are latent, bit 3 FILTER_MEANS.  A head_dim of LATENT_ROW is one of latent
 * attention anyhow, of 512 + 64 values. */
enum { LATENT_ROW = 576, TEST_MEANS = 8 };
struct kv_shape test_kv_shape(int kv_heads, int head_dim, int kind);

/* Every kind of filter and index, and those of them with a rotated index, which alone latent
 * attention has. */
enum { TEST_KINDS = 5, TEST_ROTATED_KINDS = 3 };
extern const int test_kinds[TEST_KINDS], test_rotated_kinds[TEST_ROTATED_KINDS];

void store_random_tokens(struct backend *be, struct stream *s, const struct token_store *t,
                         struct test_random *r);

#endif
