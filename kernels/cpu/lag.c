#include "kernels/cpu/lag.h"

#include <string.h>

static int count_below(const int32_t *list, int n, int block)
{
    int below = 0;

    while (below < n && list[below] < block)
        below++;
    return below;
}

/* What is chosen from where the stored list counts; how many. */
static int merge(const struct lag_args *a, int32_t *from, int n_tokens, const int32_t *stored,
                 int n_stored)
{
    struct forced_blocks f = find_forced_blocks(n_tokens, a->sink_tokens, a->recent_tokens);
    struct lagged_merge m = merge_lagged(f, count_below(stored, n_stored, f.sinks),
                                         count_below(stored, n_stored, f.recent),
                                         a->keep_blocks);

    for (int i = 0; i < a->keep_blocks; i++)
        from[i] = i < m.n ? merged_block(m, stored, i) : -1;
    return m.n;
}

static void lag_list(const struct lag_args *a, int seq, int kv_head)
{
    const struct lagged_blocks *l = a->lagged;
    size_t list = (size_t)(seq * a->kv_heads + kv_head), keep = (size_t)a->keep_blocks;
    size_t bytes = keep * sizeof *a->from;
    const int32_t *kept = a->kept + list * keep;
    int32_t *from = a->from + list * keep;
    int slot = l->slot[seq], n_tokens = a->n_tokens[seq];

    memcpy(from, kept, bytes);
    a->n_from[list] = a->n_kept[list];
    if (slot < 0 || n_tokens == 0)
        return;
    size_t at = (size_t)(slot * a->kv_heads + kv_head);
    if (l->n_tokens[at] == n_tokens - 1)
        a->n_from[list] = merge(a, from, n_tokens, l->kept + at * keep, l->n_kept[at]);
    memcpy(l->kept + at * keep, kept, bytes);
    l->n_kept[at] = a->n_kept[list];
    l->n_tokens[at] = n_tokens;
}

void cpu_lag(struct stream *s, const struct lag_args *a)
{
    if (s->failed != ST_OK)
        return;
    for (int seq = 0; seq < a->seqs; seq++)
        for (int kv_head = 0; kv_head < a->kv_heads; kv_head++)
            lag_list(a, seq, kv_head);
}
