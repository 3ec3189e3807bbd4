#ifndef KERNELS_CPU_LAG_H
#define KERNELS_CPU_LAG_H

#include "kernels/cpu/cpu.h"

/* Between block_filter and token_select: trades what the filter kept for what lagged_blocks.h
 * says; private to kernels/cpu. */
struct lag_args {
    int32_t *from, *n_from;      /* [S, G, keep_blocks], [S, G] to choose tokens from */
    const int32_t *kept, *n_kept; /* likewise, of block_filter */
    const int32_t *n_tokens;     /* [S] */
    const struct lagged_blocks *lagged;
    int seqs, kv_heads;
    int keep_blocks, sink_tokens, recent_tokens;
};

void cpu_lag(struct stream *s, const struct lag_args *a);

#endif
