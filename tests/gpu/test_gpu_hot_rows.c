/* Decoding on the GPU with blocks off the device, held step after step against the same with
 * everything in kv, to the bit; the books of the sets against what hot_rows.h says of them; and
 * the answers against the CPU back end. */

#include "engine/base/mem.h"
#include "tests/support/gpu_compare.h"
#include "tests/support/gpu_decode.h"
#include "tests/support/gpu_fixture.h"
#include "tests/support/hot_fixture.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/token_store.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { STEPS = 6 };

struct setup {
    struct decode_setup decode;
    int rows_per_head, away;     /* as of struct hot_fixture */
    int n_tokens, steps;         /* of the longest at the start */
    float scale;
    bool lagged;                 /* contexts grow by a token a step, and every fifth has no slot */
};

struct history {
    struct setup s;
    struct decode_fixture d;
    struct hot_fixture hot;      /* with tier as its host memory */
    bf16 *want, *got;            /* [seqs, heads * head_dim] */
    uint32_t step;
    uint64_t counts[HOT_COUNTS], stall;
    int n_stalls;
    struct hot_books before, after;
    struct attend_two_level_args args; /* device, without sets */
    struct hot_rows sets;        /* device */
    struct lagged_blocks lagged[2];      /* device: of the call without sets, and with them */
};

/* One at a time; what a failed test leaves is freed by the next. */
static struct buffer tier;

static void clean(void)
{
    gpu_clean();
    if (gpu_backend())
        buffer_free(gpu_backend(), &tier);
    tier = (struct buffer){ 0 };
}

/* ---- a history's start */

/* Empty. */
static void put_lists(struct history *h)
{
    int seqs = h->d.s.seqs;
    size_t n = (size_t)h->d.lists * sizeof(int32_t);
    int32_t slot[DECODE_MOST_SEQS];

    for (int i = 0; i < seqs; i++)
        slot[i] = i % 5 == 4 ? -1 : seqs - 1 - i;
    for (int i = 0; i < 2 && h->s.lagged; i++)
        h->lagged[i] = (struct lagged_blocks){
            .kept = gpu_put(NULL, n * (size_t)h->d.s.keep_blocks), .n_kept = gpu_put(NULL, n),
            .n_tokens = gpu_put(NULL, n), .slot = gpu_put(slot, (size_t)seqs * sizeof *slot) };
}

static void put_device(struct history *h)
{
    struct decode_fixture *d = &h->d;
    size_t n_rows = h->hot.n_rows, n_positions = h->hot.n_positions;

    for (size_t i = 0; i < n_positions; i++)     /* garbage, of which much is a row */
        h->after.row_of[i] = (uint16_t)random_below(&d->r, 2 * h->s.rows_per_head);
    for (size_t i = 0; i < n_rows; i++)
        h->after.used[i] = (uint32_t)random_below(&d->r, 2 * h->s.steps);
    h->args = gpu_decode_args(d);
    h->args.scale = h->s.scale;
    h->sets = (struct hot_rows){
        .host = tier.base, .host_stride = h->hot.host_stride,
        .rows = gpu_put(h->after.rows, n_rows * kv_row_dim(&d->shape) * sizeof(bf16)),
        .row_of = gpu_put(h->after.row_of, n_positions * sizeof(uint16_t)),
        .position = gpu_put(h->after.position, n_rows * sizeof(int32_t)),
        .used = gpu_put(h->after.used, n_rows * sizeof(uint32_t)),
        .hand = gpu_put(h->after.hand, (size_t)d->lists * sizeof(int32_t)),
        .counts = gpu_put(h->counts, sizeof h->counts),
        .stall = gpu_put(&h->stall, sizeof h->stall), .rows_per_head = h->s.rows_per_head };
    put_lists(h);
}

/* Every third sequence has no set. */
static void start_history(struct history *h, const struct setup *s, uint64_t seed)
{
    struct decode_fixture *d = &h->d;
    int seqs = s->decode.seqs, more = s->steps * BLOCK_TOKENS / 2;

    memset(h, 0, sizeof *h);
    h->s = *s;
    gpu_decode_init(d, &s->decode, blocks_of(s->n_tokens + more), seed);
    gpu_decode_start(d, s->n_tokens, more);
    hot_init(&h->hot, d, s->rows_per_head, s->away);
    for (int i = 0; i < seqs; i++)
        h->hot.set[i] = i % 3 == 1 ? -1 : seqs - 1 - i;
    h->hot.host_stride = kv_block_bytes(&d->shape) + 16;
    ck_assert_int_eq(buffer_alloc(gpu_backend(), &tier, MEM_PINNED,
                                  (size_t)d->n_blocks * h->hot.host_stride), ST_OK);
    h->hot.host = tier.base;
    h->want = nan_alloc(d->n_q * sizeof *h->want);
    h->got = nan_alloc(d->n_q * sizeof *h->got);
    h->before = hot_new_books(&h->hot);
    h->after = hot_new_books(&h->hot);
    put_device(h);
}

static void end_history(struct history *h)
{
    mem_free(h->want);
    mem_free(h->got);
    hot_free_books(&h->before);
    hot_free_books(&h->after);
    hot_fini(&h->hot);
    decode_fini(&h->d);
    clean();
}

/* ---- what changes from step to step */

static void next_step(struct history *h)
{
    struct decode_fixture *d = &h->d;
    int traded[2];

    gpu_decode_queries(d, h->step == 0);
    for (int i = 0; i < d->s.seqs; i++)
        if (d->n_tokens[i] > 0 && h->step > 0)
            d->n_tokens[i] += h->s.lagged ? 1 : 1 + random_below(&d->r, BLOCK_TOKENS / 2 - 1);
    h->step++;
    if (hot_trade_sets(&h->hot, traded)) {
        hot_forget_set(&h->hot, &h->after, traded[0]);
        hot_forget_set(&h->hot, &h->after, traded[1]);
        h->sets.position = gpu_put(h->after.position, h->hot.n_rows * sizeof(int32_t));
    }
    hot_place_blocks(&h->hot);
}

/* ---- a step by each */

static void get_books(const struct history *h, struct hot_books *b)
{
    size_t n_rows = h->hot.n_rows;

    gpu_get(b->rows, h->sets.rows, n_rows * kv_row_dim(&h->d.shape) * sizeof(bf16));
    gpu_get(b->row_of, h->sets.row_of, h->hot.n_positions * sizeof *b->row_of);
    gpu_get(b->position, h->sets.position, n_rows * sizeof *b->position);
    gpu_get(b->used, h->sets.used, n_rows * sizeof *b->used);
    gpu_get(b->hand, h->sets.hand, (size_t)h->d.lists * sizeof *b->hand);
}

static void run_both(struct history *h)
{
    const struct decode_fixture *d = &h->d;
    size_t table = (size_t)d->n_blocks * sizeof *d->table;
    size_t seqs = (size_t)d->s.seqs * sizeof(int32_t);
    struct attend_two_level_args a = h->args;
    struct hot_rows hot = h->sets;
    void *want = gpu_put(NULL, d->n_q * sizeof(bf16)), *got = gpu_put(NULL, d->n_q * sizeof(bf16));

    get_books(h, &h->before);
    a.out = want;
    a.q = gpu_put_act(d->q, d->n_q);
    a.n_tokens = gpu_put(d->n_tokens, seqs);
    a.max_n_tokens = decode_longest(d);
    a.lagged = h->s.lagged ? &h->lagged[0] : NULL;
    gpu_ops()->attend_two_level(gpu_stream(), &a);
    hot.host_table = gpu_put(h->hot.host_table, table);
    hot.set = gpu_put(h->hot.set, seqs);
    hot.step = gpu_put(&h->step, sizeof h->step);
    a.out = got;
    a.kv = gpu_put(h->hot.kv, d->kv_bytes);
    a.kv_table = gpu_put(h->hot.table, table);
    a.hot = &hot;
    a.lagged = h->s.lagged ? &h->lagged[1] : NULL;
    gpu_ops()->attend_two_level(gpu_stream(), &a);
    gpu_get(h->want, want, d->n_q * sizeof *h->want);
    gpu_get(h->got, got, d->n_q * sizeof *h->got);
    get_books(h, &h->after);
}

/* ---- what must hold */

struct change { int hits, misses; };

/* Rows that the step replaced, as rule 2 of hot_rows.h has them one after the other. */
static struct change check_replaced(const struct history *h, int seq, int g, int n_replaced)
{
    int head = h->hot.set[seq] * h->d.s.kv_heads + g, n = h->s.rows_per_head, last = -1, hand;
    const int32_t *before = h->before.position + (size_t)head * (size_t)n;
    const int32_t *after = h->after.position + (size_t)head * (size_t)n;
    const uint32_t *used_before = h->before.used + (size_t)head * (size_t)n;
    const uint32_t *used = h->after.used + (size_t)head * (size_t)n;
    struct change c = { 0, 0 };

    hand = h->before.hand[head];
    for (int i = 0; i < n; i++) {
        int row = (h->before.hand[head] + i) % n;
        bool hit = after[row] >= 0 && after[row] == before[row] && used[row] == h->step;
        bool replaced = after[row] != before[row];
        bool idle = before[row] < 0 ||
                    h->step - used_before[row] >= (uint32_t)(n / h->d.s.keep_tokens);
        c.hits += hit;
        ck_assert_msg(hit ? !replaced : replaced == (idle && c.misses < n_replaced),
                      "step %u: sequence %d, head %d: row %d of %d was not the next", h->step, seq,
                      g, row, n);
        if (!replaced)
            continue;
        ck_assert_uint_eq(used[row], h->step);
        ck_assert_int_lt(h->hot.table[seq * h->d.max_blocks + after[row] / BLOCK_TOKENS], 0);
        ck_assert_int_gt(after[row], last);      /* both ascend */
        last = after[row];
        hand = (row + 1) % n;
        c.misses++;
    }
    ck_assert_int_eq(c.misses, n_replaced);
    ck_assert_int_eq(h->after.hand[head], hand);
    return c;
}

/* One head of a set: what is in it, and that the right rows were replaced. */
static struct change check_set(const struct history *h, int seq, int g)
{
    int n = h->s.rows_per_head, n_replaced = 0;
    size_t first = (size_t)(h->hot.set[seq] * h->d.s.kv_heads + g) * (size_t)n;

    hot_check_rows(&h->hot, &h->after, h->step, seq, g);
    for (size_t row = first; row < first + (size_t)n; row++)
        n_replaced += h->after.position[row] != h->before.position[row];
    return check_replaced(h, seq, g, n_replaced);
}

/* Tokens that a sequence chooses; the last block is always kept. */
static int chosen_of(const struct history *h, int seq)
{
    int n = h->d.n_tokens[seq], blocks = blocks_of(n);
    int kept = blocks < h->d.s.keep_blocks ? blocks : h->d.s.keep_blocks;
    int candidates = kept * BLOCK_TOKENS - (blocks * BLOCK_TOKENS - n);

    return candidates < h->d.s.keep_tokens ? candidates : h->d.s.keep_tokens;
}

static void check_step(struct history *h, const char *name)
{
    size_t row = (size_t)(h->d.heads * kv_value_dim(&h->d.shape));
    uint64_t counts[HOT_COUNTS], want[HOT_COUNTS] = { 0 };

    for (int seq = 0; seq < h->d.s.seqs; seq++) {
        if (h->d.n_tokens[seq] == 0)
            continue;
        assert_same_bits(name, h->got + (size_t)seq * row, h->want + (size_t)seq * row, 1, row);
        for (int g = 0; h->hot.set[seq] >= 0 && g < h->d.s.kv_heads; g++) {
            struct change c = check_set(h, seq, g);
            want[HOT_HITS] += (uint64_t)c.hits;
            want[HOT_MISSES] += (uint64_t)c.misses;
            want[HOT_RESIDENT] += (uint64_t)(chosen_of(h, seq) - c.hits - c.misses);
        }
    }
    gpu_get(counts, h->sets.counts, sizeof counts);
    for (int i = 0; i < HOT_COUNTS; i++) {
        ck_assert_msg(counts[i] - h->counts[i] == want[i], "%s: step %u: count %d grew by %llu, "
                      "not %llu", name, h->step, i, (unsigned long long)(counts[i] - h->counts[i]),
                      (unsigned long long)want[i]);
        h->counts[i] = counts[i];
    }
    gpu_get(&h->stall, h->sets.stall, sizeof h->stall);
    bool stalled = h->stall >> 32 == h->step && (uint32_t)h->stall > 0;
    ck_assert_msg(!stalled || want[HOT_MISSES] > 0, "%s: step %u waited for nothing", name,
                  h->step);
    h->n_stalls += stalled;      /* not every one: the clock is as coarse as a microsecond */
}

/* As in test_gpu_two_level.c: with next to no scale a list with one token that differs is far
 * off, and a few lists may be, whose border falls between two scores that are nearly equal. */
static void check_cpu(const struct history *h, const char *name)
{
    int width = h->d.s.group * kv_value_dim(&h->d.shape), n_off = 0, n_lists = 0;
    size_t n = (size_t)(h->d.lists * width);
    float *want = mem_calloc(h->d.n_q, sizeof *want), *got = widened(h->got, n), worst = 0;

    decode_on_cpu(&h->d, NULL, h->s.scale, want);
    for (int list = 0; list < h->d.lists; list++) {
        if (h->d.n_tokens[list / h->d.s.kv_heads] == 0)
            continue;
        float off = largest_difference(got + list * width, want + list * width, (size_t)width);
        n_lists++;
        n_off += !(off <= 2.5e-2f);
        if (off > worst || isnan(off))
            worst = off;
    }
    mem_free(got);
    mem_free(want);
    if (n_off > 1 + n_lists / 4 || !(worst <= 0.5f))
        ck_abort_msg("%s: %d of %d lists differ from the CPU's, by up to %g", name, n_off,
                     n_lists, (double)worst);
}

static void run_history(const struct setup *s, const char *name, uint64_t seed)
{
    struct history h;

    start_history(&h, s, seed);
    for (int i = 0; i < s->steps; i++) {
        next_step(&h);
        run_both(&h);
        check_step(&h, name);
        if (i == 0 || (i == s->steps - 1 && !s->lagged)) /* test_gpu_lagged.c has the others */
            check_cpu(&h, name);
    }
    printf("%s: heads %d on %d of %d, %d sequences, %d rows: %llu hits, %llu misses, "
           "%llu resident\n", name, h.d.heads, h.d.s.kv_heads, h.d.s.head_dim,
           h.d.s.seqs, s->rows_per_head, (unsigned long long)h.counts[HOT_HITS],
           (unsigned long long)h.counts[HOT_MISSES], (unsigned long long)h.counts[HOT_RESIDENT]);
    if (s->away > 0)
        ck_assert_uint_gt(h.counts[HOT_MISSES], 0);
    if (h.counts[HOT_MISSES] > 1000)
        ck_assert_int_gt(h.n_stalls, 0);
    end_history(&h);
}

/* ---- tests */

static struct setup base_setup(int group, int kv_heads, int head_dim)
{
    return (struct setup){
        .decode = { .kv_heads = kv_heads, .group = group, .head_dim = head_dim, .keep_blocks = 16,
                    .keep_tokens = 256, .sinks = 4, .recent = 64, .seqs = 3 },
        .rows_per_head = 600, .away = 7, .n_tokens = 3000, .steps = STEPS, .scale = 0.1f };
}

/* Every group of heads; of 16 there is no fused kernel. */
START_TEST(shapes)
{
    static const int groups[] = { 1, 2, 3, 4, 5, 7, 8, 16 };

    if (!gpu_backend())
        return;
    for (int dim = 64; dim <= 128; dim *= 2) {
        struct setup s = base_setup(groups[_i], 2, dim);
        run_history(&s, "shapes", 1 + (uint64_t)_i);
        s.scale = 1e-6f;
        run_history(&s, "uniform", 11 + (uint64_t)_i);
    }
}
END_TEST

/* Clusters from the largest to a single thread block. */
START_TEST(batches)
{
    static const int seqs[] = { 1, 2, 4, 9, 17, 33, 48 };

    if (!gpu_backend())
        return;
    struct setup s = base_setup(4, 4, _i % 2 ? 64 : 128);
    s.decode.seqs = seqs[_i];
    s.n_tokens = 1500;
    s.steps = 4;
    run_history(&s, "batches", 30 + (uint64_t)_i);
}
END_TEST

/* Every kind of filter and index, by way of the three operations where need be. */
START_TEST(kinds)
{
    if (!gpu_backend())
        return;
    for (int dim = 64; dim <= 128; dim *= 2) {
        struct setup s = base_setup(4, 2, dim);
        s.decode.kind = test_kinds[_i];
        run_history(&s, "kinds", 50 + (uint64_t)_i);
    }
}
END_TEST

/* Room for just the chosen; the smallest budgets and such above the context; no block away,
 * and all. */
START_TEST(room)
{
    static const int keep[][3] = { { 16, 256, 256 },   { 3, 1, 1 },        { 5, 100, 101 },
                                   { 64, 4096, 4096 }, { 47, 3008, 9000 }, { 2, 128, 128 } };

    if (!gpu_backend())
        return;
    for (int kind = 0; kind < TEST_ROTATED_KINDS; kind++) {
        struct setup s = base_setup(2, 2, 128);
        s.decode.kind = test_rotated_kinds[kind];
        s.decode.keep_blocks = keep[_i][0];
        s.decode.keep_tokens = keep[_i][1];
        s.rows_per_head = keep[_i][2];
        s.decode.recent = s.decode.keep_blocks < 4 ? 1 : 64;
        s.away = _i == 4 ? 0 : 10;
        s.n_tokens = 2000;
        run_history(&s, "room", 70 + (uint64_t)_i);
    }
}
END_TEST

/* The first configuration's budgets over a long context, and as many rows as there may be. */
START_TEST(long_context)
{
    if (!gpu_backend())
        return;
    struct setup s = base_setup(4, _i ? 2 : 8, 128);
    s.decode.seqs = 1;
    s.n_tokens = 33333;
    s.decode.keep_blocks = 64;
    s.decode.keep_tokens = 1024;
    s.rows_per_head = _i ? HOT_MOST_ROWS : 4096;
    s.away = 9;
    s.decode.kind = _i == 2 ? 1 : _i == 3 ? TEST_MEANS : 0;
    s.steps = 4;
    run_history(&s, "long context", 90 + (uint64_t)_i);
}
END_TEST

/* Tokens of the blocks that the step before kept, with every kind of filter and index; sequence 0
 * begins a block after a few steps. */
START_TEST(lagged)
{
    if (!gpu_backend())
        return;
    for (int dim = 64; dim <= 128; dim *= 2) {
        struct setup s = base_setup(4, 2, dim);
        s.decode.kind = test_kinds[_i];
        s.decode.seqs = 6;
        s.decode.keep_blocks = 7;
        s.steps = 20;
        s.lagged = true;
        run_history(&s, "lagged", 110 + (uint64_t)_i);
    }
}
END_TEST

/* Latent rows: every kind of filter, few sequences and many, exact and lagged, the first
 * configuration's budgets, budgets without a fused kernel. */
START_TEST(latent_rows)
{
    if (!gpu_backend())
        return;
    for (int kind = 0; kind < TEST_ROTATED_KINDS; kind++) {
        struct setup s = base_setup(_i == 1 ? 5 : 20, 1, LATENT_ROW);
        s.decode.kind = test_rotated_kinds[kind];
        s.lagged = _i == 2;
        s.steps = s.lagged ? 12 : 4;
        s.decode.seqs = _i == 3 ? 30 : _i == 4 ? 1 : 6;
        if (_i == 4) {
            s.n_tokens = 20000;
            s.decode.keep_blocks = 64;
            s.decode.keep_tokens = 1024;
            s.rows_per_head = 4096;
        }
        if (_i == 5) {
            s.decode.keep_blocks = 200;
            s.decode.keep_tokens = 2000;
            s.rows_per_head = 2500;
        }
        run_history(&s, "latent rows", 130 + (uint64_t)_i);
    }
}
END_TEST

TCase *gpu_hot_rows_case(void)
{
    TCase *c = tcase_create("gpu_hot_rows");

    tcase_set_timeout(c, 240);
    tcase_add_checked_fixture(c, clean, NULL);
    tcase_add_loop_test(c, shapes, 0, 8);
    tcase_add_loop_test(c, batches, 0, 7);
    tcase_add_loop_test(c, kinds, 0, TEST_KINDS);
    tcase_add_loop_test(c, room, 0, 6);
    tcase_add_loop_test(c, long_context, 0, 4);
    tcase_add_loop_test(c, lagged, 0, TEST_KINDS);
    tcase_add_loop_test(c, latent_rows, 0, 6);
    return c;
}
