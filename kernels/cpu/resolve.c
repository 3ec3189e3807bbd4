#include "kernels/cpu/resolve.h"

#include "engine/base/clock.h"
#include "engine/base/invariant.h"

#include <string.h>

/* The part of a set that belongs to one KV head, and the sequence that has it. */
struct hot_head {
    bf16 *rows;                  /* [N, kv_row_dim] */
    uint16_t *row_of;            /* [P] */
    int32_t *position;           /* [N] */
    uint32_t *used;              /* [N] */
    int32_t *hand;
    int n;                       /* rows */
    uint32_t idle_steps;
    const int32_t *host_table;   /* [max_blocks] */
    uint32_t step;
};

struct resolution {
    const struct resolve_args *a;
    struct stream *s;
    size_t row;                  /* elements of K and V of a token */
};

static struct hot_head hot_head_of(const struct resolve_args *a, int seq, int kv_head)
{
    const struct hot_rows *hot = a->hot;
    size_t head = (size_t)(hot->set[seq] * a->shape.kv_heads + kv_head);
    size_t rows = head * (size_t)hot->rows_per_head;
    size_t positions = head * (size_t)a->max_blocks * BLOCK_TOKENS;

    return (struct hot_head){
        .rows = hot->rows + rows * kv_row_dim(&a->shape),
        .row_of = hot->row_of + positions,
        .position = hot->position + rows,
        .used = hot->used + rows,
        .hand = hot->hand + head,
        .n = hot->rows_per_head,
        .idle_steps = (uint32_t)hot_idle_steps(hot->rows_per_head, a->keep_tokens),
        .host_table = hot->host_table + (size_t)seq * (size_t)a->max_blocks,
        .step = *hot->step,
    };
}

/* Elements from the start of a block to the row of a token in it. */
static size_t row_in_block(const struct resolution *r, int kv_head, int position)
{
    return ((size_t)kv_head * BLOCK_TOKENS + (size_t)(position % BLOCK_TOKENS)) * r->row;
}

static const bf16 *host_row(const struct resolution *r, const struct hot_head *h, int kv_head,
                            int position)
{
    const struct hot_rows *hot = r->a->hot;
    int32_t slot = h->host_table[position / BLOCK_TOKENS];

    ASSERT(slot >= 0);
    return (const bf16 *)(const void *)((const char *)hot->host +
                                        (size_t)slot * hot->host_stride) +
           row_in_block(r, kv_head, position);
}

/* Rows for n > 0 missing tokens: hot_rows.h, rule 2. */
static void choose_rows(const struct hot_head *h, int32_t *chosen, int n)
{
    int n_chosen = 0;

    for (int i = 0; i < h->n && n_chosen < n; i++) {
        int row = (*h->hand + i) % h->n;
        if (h->position[row] < 0 || h->step - h->used[row] >= h->idle_steps)
            chosen[n_chosen++] = row;
    }
    ASSERT(n_chosen == n);
    *h->hand = (chosen[n - 1] + 1) % h->n;
}

/* Put the missing tokens, given by their place in the list, into the set. */
static void fetch(const struct resolution *r, const struct hot_head *h, int kv_head,
                  const int32_t *chosen, const bf16 **rows, const int32_t *missing, int n,
                  int32_t *into)
{
    choose_rows(h, into, n);
    for (int i = 0; i < n; i++) {
        int position = chosen[missing[i]], row = into[i];
        bf16 *to = h->rows + (size_t)row * r->row;
        memcpy(to, host_row(r, h, kv_head, position), r->row * sizeof *to);
        h->row_of[position] = (uint16_t)row;
        h->position[row] = position;
        h->used[row] = h->step;
        rows[missing[i]] = to;
    }
}

/* One sequence and KV head: nobody else touches its part of the set. */
static void resolve_task(void *arg, int task, int worker)
{
    const struct resolution *r = arg;
    const struct resolve_args *a = r->a;
    int seq = task / a->shape.kv_heads, kv_head = task % a->shape.kv_heads, n_missing = 0;
    const int32_t *table = a->table + (size_t)seq * (size_t)a->max_blocks;
    const int32_t *chosen = a->chosen + (size_t)task * (size_t)a->keep_tokens;
    const bf16 **rows = a->rows + (size_t)task * (size_t)a->keep_tokens;
    int32_t *counts = a->counts + task * HOT_COUNTS;
    bool has_set = a->n_chosen[task] > 0 && a->hot->set[seq] >= 0;
    struct hot_head h = { 0 };

    memset(counts, 0, HOT_COUNTS * sizeof *counts);
    a->stalled_ns[task] = 0;
    if (has_set)
        h = hot_head_of(a, seq, kv_head);
    int32_t *into = cpu_scratch(r->s, worker, 2 * (size_t)a->keep_tokens * sizeof *into);
    int32_t *missing = into + a->keep_tokens;
    for (int i = 0; i < a->n_chosen[task]; i++) {
        int position = chosen[i];
        int32_t slot = table[position / BLOCK_TOKENS];
        if (slot >= 0) {
            rows[i] = a->kv + (size_t)slot * (kv_block_bytes(&a->shape) / sizeof(bf16)) +
                      row_in_block(r, kv_head, position);
            counts[HOT_RESIDENT] += has_set;
            continue;
        }
        ASSERT(has_set);
        int row = h.row_of[position];
        if (row < a->hot->rows_per_head && h.position[row] == position) {
            rows[i] = h.rows + (size_t)row * r->row;
            h.used[row] = h.step;
            counts[HOT_HITS]++;
        } else {
            missing[n_missing++] = i;
        }
    }
    counts[HOT_MISSES] = n_missing;
    if (n_missing == 0)
        return;
    uint64_t from_ns = clock_now_ns();
    fetch(r, &h, kv_head, chosen, rows, missing, n_missing, into);
    a->stalled_ns[task] = clock_now_ns() - from_ns;
}

static void report_stall(const struct resolve_args *a, int lists)
{
    uint64_t longest = 0;

    for (int i = 0; i < lists; i++)
        longest = a->stalled_ns[i] > longest ? a->stalled_ns[i] : longest;
    if (longest > 0)
        *a->hot->stall = (uint64_t)*a->hot->step << 32 |
                         (longest < UINT32_MAX ? longest : UINT32_MAX);
}

void cpu_resolve(struct stream *s, const struct resolve_args *a)
{
    struct resolution r = { .a = a, .s = s, .row = kv_row_dim(&a->shape) };
    int lists = a->seqs * a->shape.kv_heads;

    if (s->failed != ST_OK || a->seqs == 0)
        return;
    ASSERT(a->hot->rows_per_head >= a->keep_tokens && a->hot->rows_per_head <= HOT_MOST_ROWS);
    workers_run(s->be->workers, lists, resolve_task, &r);
    for (int i = 0; i < lists * HOT_COUNTS; i++)
        a->hot->counts[i % HOT_COUNTS] += (uint64_t)a->counts[i];
    report_stall(a, lists);
}
