#ifndef KERNELS_LAGGED_BLOCKS_H
#define KERNELS_LAGGED_BLOCKS_H

#include "kernels/layout.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Blocks kept one step late.
 *
 * A sequence with a slot chooses its tokens among the blocks that the block filter kept in its
 * step before, so these are known before the step begins; what the filter keeps in this step is
 * stored for the next.  Of a context of n tokens, for each KV head:
 *
 * 1 The stored list counts if it was stored by the step of n - 1 tokens.  If it does not, the step
 *   chooses among what the filter keeps in it, as without a slot.
 * 2 If it counts, the blocks are those that must be kept at n tokens (always_kept()) and the
 *   stored ones, each once, ascending.  Are they more than keep_blocks, the former go first, and of
 *   either kind the earlier ones.  So a block that the context has just begun takes the place of
 *   the last stored one that need not be kept.
 * 3 Then what the filter kept is stored, as of n tokens.
 *
 * So a slot is made empty by setting all its n_tokens to -1, and no more; and a step that was
 * left out, or a slot that another sequence had, shows.
 *
 * No two sequences of a call have the same slot, and a slot is used once a step in a layer.  Of
 * this layer, with C slots: */
struct lagged_blocks {
    int32_t *kept;              /* [C, G, keep_blocks] ascending */
    int32_t *n_kept;            /* [C, G] */
    int32_t *n_tokens;          /* [C, G] of the context that the list was stored for; -1: none */
    const int32_t *slot;        /* [S] in [0, C), or -1: as without, and nothing is stored */
};

/* What must be kept of a context are its blocks [0, sinks) and [recent, n): the blocks that
 * always_kept() names. */
struct forced_blocks { int sinks, recent, n; };

LAYOUT_FN struct forced_blocks find_forced_blocks(int n_tokens, int sink_tokens,
                                                  int recent_tokens)
{
    struct forced_blocks f;

    f.n = (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    f.sinks = (sink_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    f.sinks = f.sinks < f.n ? f.sinks : f.n;
    f.recent = recent_tokens <= 0 ? f.n : recent_tokens >= n_tokens
                                              ? 0 : (n_tokens - recent_tokens) / BLOCK_TOKENS;
    f.recent = f.recent > f.sinks ? f.recent : f.sinks;
    return f;
}

/* The blocks of rule 2 in order: the first `sinks`, `stored` of the stored list from number
 * `first` on, and those from block `recent` on; n in all. */
struct lagged_merge { int sinks, first, stored, recent, n; };

/* below_sinks, below_recent: how many of the stored list are below f.sinks and below f.recent. */
LAYOUT_FN struct lagged_merge merge_lagged(struct forced_blocks f, int below_sinks,
                                           int below_recent, int keep_blocks)
{
    struct lagged_merge m;
    int forced = f.sinks + f.n - f.recent, left = keep_blocks > forced ? keep_blocks - forced : 0;
    int stored = below_recent - below_sinks;

    m.sinks = f.sinks < keep_blocks ? f.sinks : keep_blocks;
    m.first = below_sinks;
    m.stored = stored < left ? stored : left;
    m.recent = f.recent;
    m.n = (forced < keep_blocks ? forced : keep_blocks) + m.stored;
    return m;
}

/* Number i of them. */
LAYOUT_FN int merged_block(struct lagged_merge m, const int32_t *stored, int i)
{
    if (i < m.sinks)
        return i;
    i -= m.sinks;
    return i < m.stored ? stored[m.first + i] : m.recent + i - m.stored;
}

#ifdef __cplusplus
}
#endif
#endif
