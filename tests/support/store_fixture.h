#ifndef TESTS_SUPPORT_STORE_FIXTURE_H
#define TESTS_SUPPORT_STORE_FIXTURE_H

#include "kernels/layout.h"
#include "tests/support/random_data.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Sequences whose rows an operation stores in blocks that lie scattered in two pools full of a
 * pattern, so that afterwards every byte of the pools is accounted for. */

enum { STORE_SEQS = 5, STORE_NO_ROW = -1 };

extern const int store_lengths[STORE_SEQS];  /* rows of each sequence, one behind the other */

struct store_fixture {
    struct kv_shape shape;
    int heads, rows, pool_blocks;
    int32_t *positions, *kv_block, *index_block; /* [rows] */
};

/* What an operation leaves. */
struct stored {
    bf16 *kv;                    /* [pool_blocks] blocks; likewise the index */
    uint8_t *index;
    float *q;                    /* [rows, heads * head_dim] */
};

/* fini frees what init allocated.  Init draws nothing: rows have no places before the third, which
 * gives kv and index ids of their own. */
void store_init(struct store_fixture *f, const struct kv_shape *shape, int heads);
void store_fini(struct store_fixture *f);
void store_place_rows(struct store_fixture *f, struct test_random *r);

int store_first_row(int seq);
size_t store_q_width(const struct store_fixture *f);

/* [rows, rotated] cosines in the first half of each row, sines in the second, of angles that have
 * nothing to do with each other.  Free with mem_free(). */
float *store_angles(const struct store_fixture *f, int rotated, struct test_random *r);

/* Pools full of the pattern, all of q the same; to be freed by the other. */
struct stored store_new(const struct store_fixture *f, float q);
void store_free(struct stored *d);

/* The next call: up to chunk[seq] rows of each sequence from next[seq] on, which moves, each with
 * padding behind them.  How many went to picked; 0 where no rows are left for the chunks. */
int store_pick(int *picked, int next[STORE_SEQS], const int chunk[STORE_SEQS], int padding);

/* Picked rows of from, [n, width] each; padding is NaN, or the integer.  Free with mem_free(). */
float *store_gather(const float *from, const int *picked, int n, size_t width);
int32_t *store_gather_ints(const int32_t *from, const int *picked, int n, int32_t padding);

/* The first of n channels that is not between the roundings of the two ends of a tolerance, 1e-5
 * of the largest; -1 where all are. */
int store_channel_off(const bf16 *got, const double *want, int n);

/* End the test where a byte differs. */
void store_assert_same(const struct store_fixture *f, const struct stored *got,
                       const struct stored *want, const char *what);
void store_assert_pools(const struct store_fixture *f, const struct stored *got,
                        const struct stored *want);

#endif
