#ifndef TESTS_SUPPORT_DECODE_FIXTURE_H
#define TESTS_SUPPORT_DECODE_FIXTURE_H

#include "kernels/ops.h"
#include "tests/support/random_data.h"

#include <stddef.h>
#include <stdint.h>

/* What tests of attend_two_level decode, step after step: the contexts of some sequences in one
 * pool, whose blocks lie in random order, and the queries of the step.  All in host memory.
 *
 * How contexts grow is each test's own, and so is all that it draws besides; the fixture draws in
 * the order in which it is called, so that a seed gives a test the same history always. */

enum { DECODE_MOST_SEQS = 48, DECODE_MOST_KV_HEADS = 8 };

struct decode_setup {
    int kv_heads, group, head_dim, kind;     /* kind: as of test_kv_shape() */
    int keep_blocks, keep_tokens, sinks, recent;
    int seqs;
};

struct decode_fixture {
    struct decode_setup s;
    struct kv_shape shape;
    struct test_random r;
    int heads, max_blocks, n_blocks, lists;  /* lists: seqs * kv_heads */
    size_t kv_bytes, index_bytes, n_q;
    int16_t channels[DECODE_MOST_KV_HEADS * INDEX_CHANNELS_KEPT]; /* zeros; the test draws them */
    int32_t n_tokens[DECODE_MOST_SEQS];      /* zeros; 0: padding */
    int32_t *table;                          /* [seqs, max_blocks] all of the pool's blocks */
    bf16 *kv;                                /* [n_blocks] blocks, NaN; likewise the index */
    uint8_t *index;
    float *q;                                /* [seqs, heads * head_dim] zeros */
};

/* fini frees what init allocated. */
void decode_init(struct decode_fixture *d, const struct decode_setup *s, int max_blocks,
                 uint64_t seed);
void decode_fini(struct decode_fixture *d);

/* Random tokens at positions [from, to) of a sequence, as of store_random_tokens(). */
void decode_store(struct decode_fixture *d, struct backend *be, struct stream *s, int seq, int from,
                  int to);

/* Queries drift from step to step, so that most of what a step selects the next one selects too.
 * by: [n_q] of the same distribution. */
void decode_drift(struct decode_fixture *d, const float *by);

int decode_longest(const struct decode_fixture *d);

/* A call over the fixture's memory, exact and with everything in kv; without out, scratch and
 * scale. */
struct attend_two_level_args decode_args(const struct decode_fixture *d);
size_t decode_scratch_bytes(const struct decode_fixture *d, const struct backend_ops *ops);

/* The same by the CPU back end into out [n_q]; lagged may be NULL. */
void decode_on_cpu(const struct decode_fixture *d, const struct lagged_blocks *lagged, float scale,
                   float *out);

/* What a step selects, all -1 before, to be freed by the other; and the two operations that select
 * it, for the sequences of a call. */
struct selected_lists decode_new_lists(const struct decode_fixture *d);
void decode_free_lists(struct selected_lists *l);
void decode_filter_blocks(const struct backend_ops *ops, struct stream *s,
                          const struct attend_two_level_args *a, const struct selected_lists *l);
void decode_select_tokens(const struct backend_ops *ops, struct stream *s,
                          const struct attend_two_level_args *a, const struct selected_lists *l);

/* Lists of so many slots, in none of which anything was stored: n_tokens is -1, and kept and n_kept
 * are numbers that lead nowhere.  Without slot; to be freed by the other. */
struct lagged_blocks decode_new_slots(const struct decode_fixture *d, int slots);
void decode_free_slots(struct lagged_blocks *l);

#endif
