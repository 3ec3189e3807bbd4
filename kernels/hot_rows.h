#ifndef KERNELS_HOT_ROWS_H
#define KERNELS_HOT_ROWS_H

#include "kernels/layout.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Rows of K and V that are not on the device, and the cache of those that lately were.
 *
 * A sequence whose blocks have (partly) left the device has a set: for each layer and KV head
 * `rows_per_head` rows of device memory.  Where kv_table has no slot for a block, its rows come
 * out of the set, and what the set lacks is read out of the host tier and put into it, in place
 * of a row that was not used for some time.  A row is an exact copy, so the cache changes the time
 * of an answer and never the answer.
 *
 * What a set holds is checked at use: row_of[p] may be anything, and means "position p is
 * in that row" only where position[that row] == p.  So a set is made empty by setting all its
 * positions to -1, and no more.
 *
 * Rules.
 * 1 A step never replaces a row that it uses itself.  Hits and misses of a step are together at
 *   most keep_tokens <= rows_per_head, so the rows that are no hits suffice for the misses
 *   however the hits lie.  That holds for a set as a whole and for no part of it: whoever
 *   divides the work of one KV head must choose among all its rows.
 * 2 The rows of a head are a ring.  Replaced are, from its hand on, those that are empty or were
 *   last used hot_idle_steps() ago or before: of I such steps I - 1 and this one have used at most
 *   I * keep_tokens <= rows_per_head rows, so there are enough.  Missing tokens in ascending order
 *   get these rows in that order, and the hand moves behind the last.  This keeps nearly what
 *   replacing the row used longest ago does (docs/PERFORMANCE.md) and looks at few rows.
 * 3 A row whose block is in kv is read there, counted as resident, and neither looked up nor
 *   put into the set.  What the set still has of it stays and ages: K and V of a position must
 *   not change while a set that is not reset names it.
 * 4 No two sequences of a call have the same set, and a set is used once a step in a layer.
 *
 * Of this layer, with C sets, P = max_blocks * BLOCK_TOKENS positions, N = rows_per_head and R
 * kv_row_dim(): */
struct hot_rows {
    const bf16 *host;           /* K and V of host slot 0, this layer; readable by the device,
                                   aligned to 16 bytes */
    size_t host_stride;         /* bytes from host slot to host slot, a multiple of 16 */
    const int32_t *host_table;  /* [S, max_blocks] host slots; read where kv_table has -1 */
    const int32_t *set;         /* [S] in [0, C), or -1: all of the sequence is in kv */
    bf16 *rows;                 /* [C, G, N, R] */
    uint16_t *row_of;           /* [C, G, P] */
    int32_t *position;          /* [C, G, N] -1: the row is empty */
    uint32_t *used;             /* [C, G, N] step that last used the row; empty: anything */
    int32_t *hand;              /* [C, G] in [0, N) */
    const uint32_t *step;       /* [1] of this step; ascends from 1 */
    uint64_t *counts;           /* [HOT_COUNTS] added to, for sequences with a set */
    uint64_t *stall;            /* [1] of the last step that fetched: its number in the upper 32
                                   bits, and the ns for which whoever waited longest in it waited
                                   for rows of the host tier */
    int rows_per_head;          /* >= keep_tokens, at most HOT_MOST_ROWS */
};

enum { HOT_HITS, HOT_MISSES, HOT_RESIDENT, HOT_COUNTS }; /* rows: in the set, fetched, in kv */
enum { HOT_MOST_ROWS = 65535 };

/* A row that so many steps did not use is replaced before others. */
LAYOUT_FN int hot_idle_steps(int rows_per_head, int keep_tokens)
{
    return rows_per_head / keep_tokens;
}

/* Bytes of device memory of one set in one layer, by part. */
LAYOUT_FN size_t hot_rows_bytes(const struct kv_shape *s, int rows_per_head)
{
    return (size_t)s->kv_heads * (size_t)rows_per_head * kv_row_dim(s) * sizeof(bf16);
}

LAYOUT_FN size_t hot_books_bytes(const struct kv_shape *s, int rows_per_head, int max_blocks)
{
    return (size_t)s->kv_heads * ((size_t)rows_per_head * (sizeof(int32_t) + sizeof(uint32_t)) +
                                  (size_t)max_blocks * BLOCK_TOKENS * sizeof(uint16_t) +
                                  sizeof(int32_t));
}

#ifdef __cplusplus
}
#endif
#endif
