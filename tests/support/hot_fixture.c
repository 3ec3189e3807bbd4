#include "tests/support/hot_fixture.h"

#include "engine/base/mem.h"
#include "tests/support/kernel_reference.h"

#include <check.h>
#include <string.h>

enum { UNUSED = -7 };

void hot_init(struct hot_fixture *h, struct decode_fixture *d, int rows_per_head, int away)
{
    size_t ints = (size_t)d->n_blocks * sizeof(int32_t);

    memset(h, 0, sizeof *h);
    h->d = d;
    h->rows_per_head = rows_per_head;
    h->away = away;
    h->n_rows = (size_t)d->lists * (size_t)rows_per_head;
    h->n_positions = (size_t)d->lists * (size_t)(d->max_blocks * BLOCK_TOKENS);
    memset(h->set, 0xff, sizeof h->set);
    h->table = nan_alloc(ints);
    h->host_table = nan_alloc(ints);
    h->kv = nan_alloc(d->kv_bytes);
}

void hot_fini(struct hot_fixture *h)
{
    mem_free(h->table);
    mem_free(h->host_table);
    mem_free(h->kv);
}

struct hot_books hot_new_books(const struct hot_fixture *h)
{
    return (struct hot_books){
        .rows = nan_alloc(h->n_rows * kv_row_dim(&h->d->shape) * sizeof(bf16)),
        .row_of = nan_alloc(h->n_positions * sizeof(uint16_t)),
        .position = nan_alloc(h->n_rows * sizeof(int32_t)),
        .used = nan_alloc(h->n_rows * sizeof(uint32_t)),
        .hand = mem_calloc((size_t)h->d->lists, sizeof(int32_t)),
    };
}

void hot_free_books(struct hot_books *b)
{
    mem_free(b->rows);
    mem_free(b->row_of);
    mem_free(b->position);
    mem_free(b->used);
    mem_free(b->hand);
}

void hot_place_blocks(struct hot_fixture *h)
{
    struct decode_fixture *d = h->d;
    int32_t *kv_slots = mem_alloc((size_t)d->n_blocks * sizeof *kv_slots);
    int32_t *host_slots = mem_alloc((size_t)d->n_blocks * sizeof *host_slots);
    size_t block = kv_block_bytes(&d->shape);

    random_order(&d->r, kv_slots, d->n_blocks);
    random_order(&d->r, host_slots, d->n_blocks);
    memset(h->kv, 0xff, d->kv_bytes);
    memset(h->host, 0xff, (size_t)d->n_blocks * h->host_stride);
    for (int i = 0; i < d->n_blocks; i++) {
        int seq = i / d->max_blocks, number = i % d->max_blocks;
        int n = blocks_of(d->n_tokens[seq]);
        bool away = h->set[seq] >= 0 && number < n - 1 && random_below(&d->r, 10) < h->away;
        h->table[i] = h->host_table[i] = UNUSED;
        if (number >= n)
            continue;
        const char *from = (const char *)d->kv + (size_t)d->table[i] * block;
        if (away) {
            h->table[i] = -1;
            h->host_table[i] = host_slots[i];
            memcpy(h->host + (size_t)host_slots[i] * h->host_stride, from, block);
        } else {
            h->table[i] = kv_slots[i];
            memcpy((char *)h->kv + (size_t)kv_slots[i] * block, from, block);
        }
    }
    mem_free(kv_slots);
    mem_free(host_slots);
}

void hot_forget_set(const struct hot_fixture *h, struct hot_books *b, int set)
{
    int n = h->d->s.kv_heads * h->rows_per_head;

    for (int i = set * n; i < (set + 1) * n; i++)
        b->position[i] = -1;
}

bool hot_trade_sets(struct hot_fixture *h, int traded[2])
{
    struct decode_fixture *d = h->d;
    int a = random_below(&d->r, d->s.seqs), b = random_below(&d->r, d->s.seqs);

    traded[0] = h->set[a];
    traded[1] = h->set[b];
    if (a == b || traded[0] < 0 || traded[1] < 0)
        return false;
    h->set[a] = traded[1];
    h->set[b] = traded[0];
    return true;
}

void hot_check_rows(const struct hot_fixture *h, const struct hot_books *b, uint32_t step, int seq,
                    int kv_head)
{
    const struct decode_fixture *d = h->d;
    size_t head = (size_t)(h->set[seq] * d->s.kv_heads + kv_head);
    size_t row_bytes = kv_row_dim(&d->shape) * sizeof(bf16);
    const uint16_t *row_of = b->row_of + head * (size_t)(d->max_blocks * BLOCK_TOKENS);

    for (int i = 0; i < h->rows_per_head; i++) {
        size_t row = head * (size_t)h->rows_per_head + (size_t)i;
        int32_t p = b->position[row];
        if (p < 0)
            continue;
        int32_t id = d->table[seq * d->max_blocks + p / BLOCK_TOKENS];
        const char *want = (const char *)d->kv + (size_t)id * kv_block_bytes(&d->shape) +
                           (size_t)(kv_head * BLOCK_TOKENS + p % BLOCK_TOKENS) * row_bytes;
        ck_assert_msg(memcmp((const char *)b->rows + row * row_bytes, want, row_bytes) == 0,
                      "step %u: row %d of sequence %d, head %d is not position %d", step, i, seq,
                      kv_head, p);
        ck_assert_int_eq(row_of[p], i);
    }
}
