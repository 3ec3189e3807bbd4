#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/closeness.h"
#include "tests/support/hot_fixture.h"
#include "tests/support/kernel_reference.h"

#include <check.h>
#include <string.h>

/* Decoding with lagged blocks, step after step, held against the operations one after the other
 * with a model between them that does the obvious; with blocks off the device against the same
 * with everything in kv; and against exact selection where both must agree. */
enum { MAX_SEQS = 5, STEPS = 70, SLOTS = MAX_SEQS + 2, ROWS = 400, MAX_BLOCKS = 14 };

struct setup {
    struct decode_setup decode;
    int32_t n_tokens[MAX_SEQS];  /* at the start; 0: padding */
    bool breaks;                 /* now and then a step is left out, or a slot emptied or traded */
    bool drops;                  /* a stored block makes room for a forced one some time */
};

struct history {
    struct setup s;
    struct decode_fixture d;
    struct backend *be;
    struct stream *stream;
    int32_t slot[MAX_SEQS];
    float *want, *got;           /* [seqs, heads * head_dim] */
    void *scratch;
    uint32_t step;
    struct selected_lists lists, selected;  /* of the step: the model's, the operation's */
    struct lagged_blocks model, plain, with_sets; /* the last two are the operation's */
    bool wants_lists;            /* of the operation, in selected */
    int n_late, n_dropped;       /* lists that counted; of those, that lost a stored block */
};

static void start_history(struct history *h, const struct setup *s, uint64_t seed)
{
    struct decode_fixture *d = &h->d;
    int seqs = s->decode.seqs;

    memset(h, 0, sizeof *h);
    h->s = *s;
    decode_init(d, &s->decode, MAX_BLOCKS, seed);
    h->be = open_with_threads("auto", 2);
    h->stream = stream_create(h->be);
    h->want = mem_calloc(d->n_q, sizeof *h->want);
    h->got = mem_calloc(d->n_q, sizeof *h->got);
    h->scratch = nan_alloc(decode_scratch_bytes(d, backend_ops(h->be)));
    h->lists = decode_new_lists(d);
    h->selected = decode_new_lists(d);
    h->model = decode_new_slots(d, SLOTS);
    h->plain = decode_new_slots(d, SLOTS);
    h->with_sets = decode_new_slots(d, SLOTS);
    random_channels(&d->r, d->channels, &d->shape);
    for (int i = 0; i < seqs; i++)               /* the last one has none */
        h->slot[i] = i < seqs - 1 || i == 0 ? SLOTS - 1 - i : -1;
    h->plain.slot = h->with_sets.slot = h->slot;
}

static void end_history(struct history *h)
{
    mem_free(h->want);
    mem_free(h->got);
    mem_free(h->scratch);
    decode_free_lists(&h->lists);
    decode_free_lists(&h->selected);
    decode_free_slots(&h->model);
    decode_free_slots(&h->plain);
    decode_free_slots(&h->with_sets);
    decode_fini(&h->d);
    stream_destroy(h->stream);
    backend_close(h->be);
}

/* ---- what changes from step to step */

static void empty_slot(struct history *h, int slot)
{
    for (int g = 0; slot >= 0 && g < h->d.s.kv_heads; g++) {
        int at = slot * h->d.s.kv_heads + g;
        h->model.n_tokens[at] = h->plain.n_tokens[at] = h->with_sets.n_tokens[at] = -1;
    }
}

static void break_something(struct history *h)
{
    int a = random_below(&h->d.r, h->d.s.seqs), b = random_below(&h->d.r, h->d.s.seqs);
    int32_t slot = h->slot[a];

    if (random_below(&h->d.r, 4))
        return;
    h->slot[a] = h->slot[b];
    h->slot[b] = slot;
    empty_slot(h, h->slot[a]);
    empty_slot(h, h->slot[b]);
}

/* Each context grows by a token, where something breaks now and then by two. */
static void next_step(struct history *h)
{
    struct decode_fixture *d = &h->d;
    float *q = mem_alloc(d->n_q * sizeof *q);

    random_floats(&d->r, q, d->n_q, 1);
    decode_drift(d, q);
    mem_free(q);
    for (int seq = 0; seq < d->s.seqs; seq++) {
        int from = d->n_tokens[seq], more = h->s.breaks && random_below(&d->r, 6) == 0 ? 2 : 1;
        if (h->s.n_tokens[seq] == 0)
            continue;
        d->n_tokens[seq] = h->step ? from + more : h->s.n_tokens[seq];
        ck_assert_int_le(d->n_tokens[seq], MAX_BLOCKS * BLOCK_TOKENS);
        decode_store(d, h->be, h->stream, seq, from, d->n_tokens[seq]);
    }
    if (h->s.breaks)
        break_something(h);
    h->step++;
}

/* ---- the model */

static bool must_keep(const struct history *h, int n_tokens, int block)
{
    for (int p = block * BLOCK_TOKENS; p < (block + 1) * BLOCK_TOKENS && p < n_tokens; p++)
        if (p < h->d.s.sinks || p > n_tokens - 1 - h->d.s.recent)
            return true;
    return false;
}

static int take(bool *taken, const bool *wanted, int n, int left)
{
    for (int i = 0; i < n && left > 0; i++)
        if (wanted[i] && !taken[i]) {
            taken[i] = true;
            left--;
        }
    return left;
}

static void list_late(struct history *h, int n_tokens, const int32_t *stored, int n_stored_blocks,
                      int list)
{
    bool forced[MAX_BLOCKS], before[MAX_BLOCKS] = { false }, taken[MAX_BLOCKS] = { false };
    int n = blocks_of(n_tokens), at = 0;
    int32_t *kept = h->lists.kept + list * h->d.s.keep_blocks;

    for (int i = 0; i < n_stored_blocks; i++)
        before[stored[i]] = true;
    for (int i = 0; i < n; i++)
        forced[i] = must_keep(h, n_tokens, i);
    take(taken, before, n, take(taken, forced, n, h->d.s.keep_blocks));
    for (int i = 0; i < n; i++)
        if (taken[i])
            kept[at++] = i;
        else if (before[i])
            h->n_dropped++;
    h->lists.n_kept[list] = at;
    h->n_late++;
    while (at < h->d.s.keep_blocks)
        kept[at++] = -1;
}

/* What the filter kept is in kept: trade it for what was stored. */
static void trade(struct history *h)
{
    size_t row = (size_t)h->d.s.keep_blocks;
    int32_t *kept = mem_alloc(row * sizeof *kept);

    for (int list = 0; list < h->d.lists; list++) {
        int seq = list / h->d.s.kv_heads, n = h->d.n_tokens[seq], slot = h->slot[seq];
        int at = slot * h->d.s.kv_heads + list % h->d.s.kv_heads, n_kept = h->lists.n_kept[list];
        if (slot < 0 || n == 0)
            continue;
        memcpy(kept, h->lists.kept + (size_t)list * row, row * sizeof *kept);
        if (h->model.n_tokens[at] == n - 1)
            list_late(h, n, h->model.kept + (size_t)at * row, h->model.n_kept[at], list);
        memcpy(h->model.kept + (size_t)at * row, kept, row * sizeof *kept);
        h->model.n_kept[at] = n_kept;
        h->model.n_tokens[at] = n;
    }
    mem_free(kept);
}

static struct attend_two_level_args arguments(const struct history *h)
{
    struct attend_two_level_args a = decode_args(&h->d);

    a.scratch = h->scratch;
    a.scale = 0.1f;
    return a;
}

static void run_model(struct history *h)
{
    const struct backend_ops *ops = backend_ops(h->be);
    struct attend_two_level_args a = arguments(h);

    decode_filter_blocks(ops, h->stream, &a, &h->lists);
    trade(h);
    decode_select_tokens(ops, h->stream, &a, &h->lists);
    ops->attend_selected(h->stream, &(struct attend_selected_args){
        .out = h->want, .q = a.q, .q_stride = a.q_stride, .kv = a.kv, .table = a.kv_table,
        .chosen = h->lists.chosen, .n_chosen = h->lists.n_chosen, .shape = a.shape,
        .seqs = a.seqs, .heads = a.heads, .max_blocks = a.max_blocks,
        .keep_tokens = a.keep_tokens, .scale = a.scale });
}

/* ---- the operation */

/* lagged NULL: exact. */
static void run_operation(struct history *h, float *out, const struct lagged_blocks *lagged,
                          const bf16 *kv, const int32_t *kv_table, const struct hot_rows *hot)
{
    struct attend_two_level_args a = arguments(h);

    a.out = out;
    a.kv = kv;
    a.kv_table = kv_table;
    a.hot = hot;
    a.lagged = lagged;
    a.lists = h->wants_lists ? &h->selected : NULL;
    backend_ops(h->be)->attend_two_level(h->stream, &a);
    ck_assert_int_eq(stream_sync(h->stream, NULL), ST_OK);
}

static void assert_outputs(const struct history *h, const char *what)
{
    size_t row = (size_t)(h->d.heads * kv_value_dim(&h->d.shape));

    for (int seq = 0; seq < h->d.s.seqs; seq++)
        if (h->d.n_tokens[seq] > 0)
            ck_assert_msg(floats_identical(what, h->got + (size_t)seq * row,
                                           h->want + (size_t)seq * row, row),
                          "%s: step %u, sequence %d of %d tokens", what, h->step, seq,
                          h->d.n_tokens[seq]);
}

static void assert_lists(const struct history *h, const struct lagged_blocks *got)
{
    size_t row = (size_t)h->d.s.keep_blocks, n = (size_t)(SLOTS * h->d.s.kv_heads);

    for (size_t at = 0; at < n; at++) {
        ck_assert_int_eq(got->n_tokens[at], h->model.n_tokens[at]);
        ck_assert_int_eq(got->n_kept[at], h->model.n_kept[at]);
        ck_assert_mem_eq(got->kept + at * row, h->model.kept + at * row, row * sizeof(int32_t));
    }
}

/* What the operation says it selected, of sequences that are no padding. */
static void assert_selected(const struct history *h)
{
    const struct selected_lists *got = &h->selected;
    size_t blocks = (size_t)h->d.s.keep_blocks, tokens = (size_t)h->d.s.keep_tokens;

    for (size_t list = 0; list < (size_t)h->d.lists; list++) {
        if (h->d.n_tokens[list / (size_t)h->d.s.kv_heads] == 0)
            continue;
        ck_assert_int_eq(got->n_kept[list], h->lists.n_kept[list]);
        ck_assert_int_eq(got->n_chosen[list], h->lists.n_chosen[list]);
        ck_assert_mem_eq(got->kept + list * blocks, h->lists.kept + list * blocks,
                         blocks * sizeof(int32_t));
        ck_assert_mem_eq(got->chosen + list * tokens, h->lists.chosen + list * tokens,
                         tokens * sizeof(int32_t));
    }
}

/* Every second block, but a context's last, in the host tier; empty sets each time. */
static void run_with_sets(struct history *h)
{
    const struct decode_fixture *d = &h->d;
    size_t block = kv_block_bytes(&d->shape);
    uint64_t counts[HOT_COUNTS] = { 0 }, stall = 0;
    uint32_t step = 1;
    struct hot_fixture hot;

    hot_init(&hot, &h->d, ROWS, 0);
    struct hot_books books = hot_new_books(&hot);
    memcpy(hot.kv, d->kv, d->kv_bytes);
    for (int i = 0; i < d->n_blocks; i++) {
        int n = blocks_of(d->n_tokens[i / MAX_BLOCKS]), number = i % MAX_BLOCKS;
        bool away = number % 2 == 0 && number < n - 1;
        hot.set[i / MAX_BLOCKS] = i / MAX_BLOCKS;
        hot.table[i] = away ? -1 : d->table[i];
        if (away)
            memset((char *)hot.kv + (size_t)d->table[i] * block, 0xff, block);
    }
    run_operation(h, h->got, &h->with_sets, hot.kv, hot.table, &(struct hot_rows){
        .host = d->kv, .host_stride = block, .host_table = d->table, .set = hot.set,
        .rows = books.rows, .row_of = books.row_of, .position = books.position,
        .used = books.used, .hand = books.hand, .step = &step, .counts = counts,
        .stall = &stall, .rows_per_head = ROWS });
    hot_free_books(&books);
    hot_fini(&hot);
}

/* ---- tests */

static const struct setup setups[] = {
    { { 2, 2, 32, 0, 4, 60, 4, 20, 5 }, { 700, 1, 0, 511, 640 }, true, true },
    { { 1, 3, 64, 1, 2, 100, 0, 1, 4 }, { 63, 64, 65, 128 }, true, true },
    { { 2, 1, 32, 2, 3, 64, 130, 64, 3 }, { 400, 127, 449 }, false, false },
    { { 1, 2, 32, 3, 6, 384, 4, 64, 4 }, { 321, 383, 384, 500 }, true, true },
    /* of the next two the forced blocks alone are more than are kept */
    { { 2, 2, 16, 0, 1, 40, 4, 64, 3 }, { 190, 191, 640 }, false, false },
    { { 1, 1, 32, 1, 2, 100, 1, 300, 2 }, { 250, 640 }, false, false },
    { { 2, 4, 128, 0, 8, 100, 4, 64, 2 }, { 640, 576 }, false, true },
    { { 1, 1, 32, 0, 7, 70, 64, 65, 2 }, { 700, 64 }, false, true },
    { { 1, 20, 64, 4, 4, 60, 4, 20, 5 }, { 700, 1, 0, 511, 640 }, true, true },
    { { 1, 5, 160, 5, 2, 100, 0, 1, 4 }, { 63, 64, 65, 128 }, true, false },
};
enum { N_SETUPS = sizeof setups / sizeof setups[0] };

START_TEST(each_step_is_the_model_s)
{
    struct history h;

    start_history(&h, &setups[_i], 900 + (uint64_t)_i);
    for (int i = 0; i < STEPS; i++) {
        next_step(&h);
        run_model(&h);
        run_operation(&h, h.got, &h.plain, h.d.kv, h.d.table, NULL);
        assert_outputs(&h, "lagged");
        assert_lists(&h, &h.plain);
        h.wants_lists = true;
        run_with_sets(&h);
        h.wants_lists = false;
        assert_outputs(&h, "lagged, with hot rows");
        assert_lists(&h, &h.with_sets);
        assert_selected(&h);
    }
    ck_assert_int_gt(h.n_late, STEPS / 2);
    ck_assert(h.n_dropped > 0 || !h.s.drops);
    end_history(&h);
}
END_TEST

/* Without a slot as well the lists are those that pass between the operations, and wanting them
 * changes nothing. */
START_TEST(lists_are_what_passes_between_the_operations)
{
    struct history h;

    start_history(&h, &setups[_i], 940 + (uint64_t)_i);
    for (int i = 0; i < h.d.s.seqs; i++)
        h.slot[i] = -1;
    h.s.breaks = false;
    for (int i = 0; i < 3; i++) {
        next_step(&h);
        run_model(&h);
        h.wants_lists = false;
        run_operation(&h, h.got, NULL, h.d.kv, h.d.table, NULL);
        assert_outputs(&h, "exact");
        h.wants_lists = true;
        run_operation(&h, h.got, NULL, h.d.kv, h.d.table, NULL);
        assert_outputs(&h, "exact, with lists");
        assert_selected(&h);
    }
    end_history(&h);
}
END_TEST

/* Every step while all blocks are kept. */
START_TEST(a_budget_above_the_context_is_exact)
{
    struct setup s = { .decode = { .kv_heads = 2, .group = 2, .head_dim = 64, .kind = _i,
                                   .keep_blocks = MAX_BLOCKS, .keep_tokens = 150, .sinks = 4,
                                   .recent = 64, .seqs = 4 },
                       .n_tokens = { 1, 63, 500, 700 }, .breaks = true };
    struct history h;

    start_history(&h, &s, 950);
    for (int i = 0; i < STEPS; i++) {
        next_step(&h);
        run_operation(&h, h.want, NULL, h.d.kv, h.d.table, NULL);
        run_operation(&h, h.got, &h.plain, h.d.kv, h.d.table, NULL);
        assert_outputs(&h, "all blocks");
    }
    end_history(&h);
}
END_TEST

START_TEST(the_first_step_is_exact_and_later_ones_are_not)
{
    struct setup s = { .decode = { .kv_heads = 2, .group = 2, .head_dim = 64, .kind = _i,
                                   .keep_blocks = 4, .keep_tokens = 100, .sinks = 4, .recent = 64,
                                   .seqs = 1 },
                       .n_tokens = { 800 } };
    struct history h;
    int differ = 0;

    start_history(&h, &s, 960);
    for (int i = 0; i < 20; i++) {
        next_step(&h);
        run_operation(&h, h.want, NULL, h.d.kv, h.d.table, NULL);
        run_operation(&h, h.got, &h.plain, h.d.kv, h.d.table, NULL);
        if (i == 0)
            assert_outputs(&h, "first");
        differ += memcmp(h.got, h.want, h.d.n_q * sizeof *h.got) != 0;
    }
    ck_assert_int_gt(differ, 5);
    end_history(&h);
}
END_TEST

/* What must be kept is two stretches, wherever these begin and end. */
START_TEST(forced_blocks_are_two_stretches)
{
    static const int tokens[] = { 0, 1, 2, 63, 64, 65, 66, 127, 128, 129, 191, 192, 193, 1000 };
    enum { N = sizeof tokens / sizeof tokens[0] };

    for (int i = 0; i < N * N * (N - 1); i++) {
        int n = tokens[1 + i / N / N], sinks = tokens[i / N % N], recent = tokens[i % N];
        struct forced_blocks f = find_forced_blocks(n, sinks, recent);
        ck_assert(f.n == blocks_of(n) && 0 <= f.sinks && f.sinks <= f.recent && f.recent <= f.n);
        for (int block = 0; block < f.n; block++)
            ck_assert_msg(always_kept(block, n, sinks, recent)
                          == (block < f.sinks || block >= f.recent),
                          "block %d of %d tokens, %d sinks, %d recent", block, n, sinks, recent);
    }
}
END_TEST

TCase *lagged_case(void)
{
    TCase *c = tcase_create("lagged");

    tcase_set_timeout(c, 120);
    tcase_add_loop_test(c, each_step_is_the_model_s, 0, N_SETUPS);
    tcase_add_loop_test(c, lists_are_what_passes_between_the_operations, 0, N_SETUPS);
    tcase_add_loop_test(c, a_budget_above_the_context_is_exact, 0, 4);
    tcase_add_loop_test(c, the_first_step_is_exact_and_later_ones_are_not, 0, 4);
    tcase_add_test(c, forced_blocks_are_two_stretches);
    return c;
}
