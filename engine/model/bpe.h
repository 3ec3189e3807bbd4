#ifndef MODEL_BPE_H
#define MODEL_BPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Byte pair encoding: of all adjacent pairs in a word, merge the one of lowest
 * rank, the leftmost of several, until none is known.  The table does not
 * change after it is filled; scratch belongs to one call at a time. */

/* Pairs of ids to rank and result: open addressing, linear probing, seeded. */
struct merges {
    struct merge_slot *slots;
    size_t mask;
    int shift;
    uint64_t seed;
};

void merges_init(struct merges *m, size_t n);    /* room for n pairs */
void merges_fini(struct merges *m);
/* A pair that is there already takes the later rank. */
void merges_put(struct merges *m, int32_t left, int32_t right, int32_t rank, int32_t id);

/* Memory for long words.  Zero-initialise. */
struct bpe_scratch {
    void *memory;
    size_t bytes;
};
void bpe_scratch_fini(struct bpe_scratch *s);

/* Merge ids[0..n) in place, n < 2^31; returns how many are left.  O(n log n). */
size_t bpe_merge(const struct merges *m, struct bpe_scratch *s, int32_t *ids, size_t n);

#endif
