#ifndef KERNELS_CPU_RESOLVE_H
#define KERNELS_CPU_RESOLVE_H

#include "kernels/cpu/cpu.h"

/* Where the rows of chosen tokens are, after the missing ones have been put into their hot
 * row sets (hot_rows.h); private to kernels/cpu. */
struct resolve_args {
    const bf16 **rows;           /* [S, G, keep_tokens] */
    int32_t *counts;             /* [S, G, HOT_COUNTS] work space, as the next */
    uint64_t *stalled_ns;        /* [S, G] */
    const int32_t *chosen;       /* [S, G, keep_tokens] */
    const int32_t *n_chosen;     /* [S, G] */
    const bf16 *kv;
    const int32_t *table;        /* [S, max_blocks] block ids in kv, or -1 */
    const struct hot_rows *hot;
    struct kv_shape shape;
    int seqs, max_blocks, keep_tokens;
};

void cpu_resolve(struct stream *s, const struct resolve_args *a);

#endif
