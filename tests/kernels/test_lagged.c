#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/closeness.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/random_data.h"
#include "tests/support/token_store.h"

#include <check.h>
#include <string.h>

/* Decoding with lagged blocks, step after step, held against the operations one after the other
 * with a model between them that does the obvious; with blocks off the device against the same
 * with everything in kv; and against exact selection where both must agree. */
enum { MAX_SEQS = 5, STEPS = 70, SLOTS = MAX_SEQS + 2, ROWS = 400, MAX_BLOCKS = 14 };

struct setup {
    int kv_heads, group, head_dim, kind;
    int keep_blocks, keep_tokens, sinks, recent;
    int seqs;
    int32_t n_tokens[MAX_SEQS];  /* at the start; 0: padding */
    bool breaks;                 /* now and then a step is left out, or a slot emptied or traded */
    bool drops;                  /* a stored block makes room for a forced one some time */
};

struct lists {                   /* as of struct lagged_blocks */
    int32_t *kept, *n_kept, *n_tokens;
};

struct history {
    struct setup s;
    struct kv_shape shape;
    struct backend *be;
    struct stream *stream;
    struct test_random r;
    int heads, n_blocks, lists;
    int16_t channels[4 * INDEX_CHANNELS_KEPT];
    int32_t n_tokens[MAX_SEQS], slot[MAX_SEQS];
    int32_t *table;              /* [seqs, MAX_BLOCKS] */
    bf16 *kv;
    uint8_t *index;
    float *q, *want, *got;       /* [seqs, heads * head_dim] */
    int32_t *kept, *n_kept, *chosen, *n_chosen;
    void *scratch;
    uint32_t step;
    struct lists model, plain, with_sets; /* the last two are the operation's */
    bool wants_lists;            /* of the operation, in the next */
    struct selected_lists selected;
    int n_late, n_dropped;       /* lists that counted; of those, that lost a stored block */
};

static int blocks_of(int n_tokens)
{
    return (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

static void *nothing(size_t bytes)
{
    return memset(mem_alloc(bytes), 0xff, bytes);
}

static size_t n_stored(const struct history *h)
{
    return (size_t)(SLOTS * h->s.kv_heads);
}

/* Full of what was never stored. */
static struct lists make_lists(const struct history *h)
{
    struct lists l = {
        .kept = mem_alloc(n_stored(h) * (size_t)h->s.keep_blocks * sizeof(int32_t)),
        .n_kept = mem_alloc(n_stored(h) * sizeof(int32_t)),
        .n_tokens = nothing(n_stored(h) * sizeof(int32_t)),
    };

    memset(l.kept, 0x77, n_stored(h) * (size_t)h->s.keep_blocks * sizeof(int32_t));
    memset(l.n_kept, 0x77, n_stored(h) * sizeof(int32_t));
    return l;
}

static void free_lists(struct lists *l)
{
    mem_free(l->kept);
    mem_free(l->n_kept);
    mem_free(l->n_tokens);
}

static void start_history(struct history *h, const struct setup *s, uint64_t seed)
{
    memset(h, 0, sizeof *h);
    h->s = *s;
    h->r = test_random(seed);
    h->shape = (struct kv_shape){
        .kv_heads = s->kv_heads, .head_dim = s->head_dim,
        .latent_dim = s->kind & 4 ? latent_dim_of(s->head_dim) : 0,
        .filter = s->kind & 1 ? FILTER_BOUNDS : FILTER_COARSE,
        .index = s->kind & 2 ? INDEX_CHANNELS : INDEX_ROTATED };
    h->be = open_with_threads("auto", 2);
    h->stream = stream_create(h->be);
    h->heads = s->kv_heads * s->group;
    h->lists = s->seqs * s->kv_heads;
    h->n_blocks = s->seqs * MAX_BLOCKS;
    size_t q = (size_t)(s->seqs * h->heads * s->head_dim) * sizeof(float);
    size_t lists = (size_t)h->lists, ints = (size_t)h->n_blocks * sizeof(int32_t);
    h->table = mem_alloc(ints);
    random_order(&h->r, h->table, h->n_blocks);
    h->kv = nothing((size_t)h->n_blocks * kv_block_bytes(&h->shape));
    h->index = nothing((size_t)h->n_blocks * index_block_bytes(&h->shape));
    h->q = mem_calloc(1, q);
    h->want = mem_calloc(1, q);
    h->got = mem_calloc(1, q);
    h->kept = nothing(lists * (size_t)s->keep_blocks * sizeof(int32_t));
    h->n_kept = nothing(lists * sizeof(int32_t));
    h->chosen = nothing(lists * (size_t)s->keep_tokens * sizeof(int32_t));
    h->n_chosen = nothing(lists * sizeof(int32_t));
    h->selected = (struct selected_lists){
        .kept = nothing(lists * (size_t)s->keep_blocks * sizeof(int32_t)),
        .n_kept = nothing(lists * sizeof(int32_t)),
        .chosen = nothing(lists * (size_t)s->keep_tokens * sizeof(int32_t)),
        .n_chosen = nothing(lists * sizeof(int32_t)) };
    h->scratch = nothing(backend_ops(h->be)->attend_two_level_scratch(
        &h->shape, s->seqs, h->heads, MAX_BLOCKS, s->keep_blocks, s->keep_tokens));
    h->model = make_lists(h);
    h->plain = make_lists(h);
    h->with_sets = make_lists(h);
    random_channels(&h->r, h->channels, &h->shape);
    for (int i = 0; i < s->seqs; i++)            /* the last one has none */
        h->slot[i] = i < s->seqs - 1 || i == 0 ? SLOTS - 1 - i : -1;
}

static void end_history(struct history *h)
{
    void *all[] = { h->table, h->kv, h->index, h->q, h->want, h->got, h->kept, h->n_kept,
                    h->chosen, h->n_chosen, h->scratch, h->selected.kept, h->selected.n_kept,
                    h->selected.chosen, h->selected.n_chosen };

    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        mem_free(all[i]);
    free_lists(&h->model);
    free_lists(&h->plain);
    free_lists(&h->with_sets);
    stream_destroy(h->stream);
    backend_close(h->be);
}

/* ---- what changes from step to step */

static void empty_slot(struct history *h, int slot)
{
    for (int g = 0; slot >= 0 && g < h->s.kv_heads; g++) {
        int at = slot * h->s.kv_heads + g;
        h->model.n_tokens[at] = h->plain.n_tokens[at] = h->with_sets.n_tokens[at] = -1;
    }
}

static void break_something(struct history *h)
{
    int a = random_below(&h->r, h->s.seqs), b = random_below(&h->r, h->s.seqs);
    int32_t slot = h->slot[a];

    if (random_below(&h->r, 4))
        return;
    h->slot[a] = h->slot[b];
    h->slot[b] = slot;
    empty_slot(h, h->slot[a]);
    empty_slot(h, h->slot[b]);
}

/* Each context grows by a token, where something breaks now and then by two. */
static void next_step(struct history *h)
{
    const struct setup *s = &h->s;
    size_t n = (size_t)(s->seqs * h->heads * s->head_dim);
    float *q = mem_alloc(n * sizeof *q);

    random_floats(&h->r, q, n, 1);
    for (size_t i = 0; i < n; i++)
        h->q[i] = 0.8f * h->q[i] + 0.6f * q[i];
    mem_free(q);
    for (int seq = 0; seq < s->seqs; seq++) {
        int from = h->n_tokens[seq], more = s->breaks && random_below(&h->r, 6) == 0 ? 2 : 1;
        if (s->n_tokens[seq] == 0)
            continue;
        h->n_tokens[seq] = h->step ? from + more : s->n_tokens[seq];
        ck_assert_int_le(h->n_tokens[seq], MAX_BLOCKS * BLOCK_TOKENS);
        store_random_tokens(h->be, h->stream, &(struct token_store){
            .kv = h->kv, .index = h->index, .table = h->table + seq * MAX_BLOCKS,
            .channels = h->channels, .shape = h->shape, .heads = h->heads, .from = from,
            .n = h->n_tokens[seq] - from }, &h->r);
    }
    if (s->breaks)
        break_something(h);
    h->step++;
}

static int longest(const struct history *h)
{
    int most = 0;

    for (int i = 0; i < h->s.seqs; i++)
        most = h->n_tokens[i] > most ? h->n_tokens[i] : most;
    return most;
}

/* ---- the model */

static bool must_keep(const struct history *h, int n_tokens, int block)
{
    for (int p = block * BLOCK_TOKENS; p < (block + 1) * BLOCK_TOKENS && p < n_tokens; p++)
        if (p < h->s.sinks || p > n_tokens - 1 - h->s.recent)
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
    int32_t *kept = h->kept + list * h->s.keep_blocks;

    for (int i = 0; i < n_stored_blocks; i++)
        before[stored[i]] = true;
    for (int i = 0; i < n; i++)
        forced[i] = must_keep(h, n_tokens, i);
    take(taken, before, n, take(taken, forced, n, h->s.keep_blocks));
    for (int i = 0; i < n; i++)
        if (taken[i])
            kept[at++] = i;
        else if (before[i])
            h->n_dropped++;
    h->n_kept[list] = at;
    h->n_late++;
    while (at < h->s.keep_blocks)
        kept[at++] = -1;
}

/* What the filter kept is in kept: trade it for what was stored. */
static void trade(struct history *h)
{
    size_t row = (size_t)h->s.keep_blocks;
    int32_t *kept = mem_alloc(row * sizeof *kept);

    for (int list = 0; list < h->lists; list++) {
        int seq = list / h->s.kv_heads, n = h->n_tokens[seq], slot = h->slot[seq];
        int at = slot * h->s.kv_heads + list % h->s.kv_heads, n_kept = h->n_kept[list];
        if (slot < 0 || n == 0)
            continue;
        memcpy(kept, h->kept + (size_t)list * row, row * sizeof *kept);
        if (h->model.n_tokens[at] == n - 1)
            list_late(h, n, h->model.kept + (size_t)at * row, h->model.n_kept[at], list);
        memcpy(h->model.kept + (size_t)at * row, kept, row * sizeof *kept);
        h->model.n_kept[at] = n_kept;
        h->model.n_tokens[at] = n;
    }
    mem_free(kept);
}

static void run_model(struct history *h)
{
    const struct backend_ops *ops = backend_ops(h->be);
    const struct setup *s = &h->s;
    int q_stride = h->heads * s->head_dim;

    ops->block_filter(h->stream, &(struct block_filter_args){
        .kept = h->kept, .n_kept = h->n_kept, .q = h->q, .q_stride = q_stride, .index = h->index,
        .table = h->table, .n_tokens = h->n_tokens, .channels = h->channels,
        .scratch = h->scratch, .shape = h->shape, .seqs = s->seqs, .heads = h->heads,
        .max_blocks = MAX_BLOCKS, .keep_blocks = s->keep_blocks, .sink_tokens = s->sinks,
        .recent_tokens = s->recent, .max_n_tokens = longest(h) });
    trade(h);
    ops->token_select(h->stream, &(struct token_select_args){
        .chosen = h->chosen, .n_chosen = h->n_chosen, .kept = h->kept, .n_kept = h->n_kept,
        .q = h->q, .q_stride = q_stride, .index = h->index, .table = h->table,
        .n_tokens = h->n_tokens, .channels = h->channels, .scratch = h->scratch,
        .shape = h->shape, .seqs = s->seqs, .heads = h->heads, .max_blocks = MAX_BLOCKS,
        .keep_blocks = s->keep_blocks, .keep_tokens = s->keep_tokens, .sink_tokens = s->sinks,
        .recent_tokens = s->recent });
    ops->attend_selected(h->stream, &(struct attend_selected_args){
        .out = h->want, .q = h->q, .q_stride = q_stride, .kv = h->kv, .table = h->table,
        .chosen = h->chosen, .n_chosen = h->n_chosen, .shape = h->shape, .seqs = s->seqs,
        .heads = h->heads, .max_blocks = MAX_BLOCKS, .keep_tokens = s->keep_tokens,
        .scale = 0.1f });
}

/* ---- the operation */

/* lists NULL: exact. */
static void run_operation(struct history *h, float *out, const struct lists *lists,
                          const bf16 *kv, const int32_t *kv_table, const struct hot_rows *hot)
{
    const struct setup *s = &h->s;
    struct lagged_blocks lagged = { .slot = h->slot };

    if (lists) {
        lagged.kept = lists->kept;
        lagged.n_kept = lists->n_kept;
        lagged.n_tokens = lists->n_tokens;
    }
    backend_ops(h->be)->attend_two_level(h->stream, &(struct attend_two_level_args){
        .out = out, .q = h->q, .q_stride = h->heads * s->head_dim, .kv = kv, .index = h->index,
        .kv_table = kv_table, .index_table = h->table, .n_tokens = h->n_tokens,
        .channels = h->channels, .scratch = h->scratch, .shape = h->shape, .seqs = s->seqs,
        .heads = h->heads, .max_blocks = MAX_BLOCKS, .keep_blocks = s->keep_blocks,
        .keep_tokens = s->keep_tokens, .sink_tokens = s->sinks, .recent_tokens = s->recent,
        .max_n_tokens = longest(h), .scale = 0.1f, .hot = hot,
        .lagged = lists ? &lagged : NULL, .lists = h->wants_lists ? &h->selected : NULL });
    ck_assert_int_eq(stream_sync(h->stream, NULL), ST_OK);
}

static void assert_outputs(const struct history *h, const char *what)
{
    size_t row = (size_t)(h->heads * kv_value_dim(&h->shape));

    for (int seq = 0; seq < h->s.seqs; seq++)
        if (h->n_tokens[seq] > 0)
            ck_assert_msg(floats_identical(what, h->got + (size_t)seq * row,
                                           h->want + (size_t)seq * row, row),
                          "%s: step %u, sequence %d of %d tokens", what, h->step, seq,
                          h->n_tokens[seq]);
}

static void assert_lists(const struct history *h, const struct lists *got)
{
    size_t row = (size_t)h->s.keep_blocks;

    for (size_t at = 0; at < n_stored(h); at++) {
        ck_assert_int_eq(got->n_tokens[at], h->model.n_tokens[at]);
        ck_assert_int_eq(got->n_kept[at], h->model.n_kept[at]);
        ck_assert_mem_eq(got->kept + at * row, h->model.kept + at * row, row * sizeof(int32_t));
    }
}

/* What the operation says it selected, of sequences that are no padding. */
static void assert_selected(const struct history *h)
{
    const struct selected_lists *got = &h->selected;
    size_t blocks = (size_t)h->s.keep_blocks, tokens = (size_t)h->s.keep_tokens;

    for (size_t list = 0; list < (size_t)h->lists; list++) {
        if (h->n_tokens[list / (size_t)h->s.kv_heads] == 0)
            continue;
        ck_assert_int_eq(got->n_kept[list], h->n_kept[list]);
        ck_assert_int_eq(got->n_chosen[list], h->n_chosen[list]);
        ck_assert_mem_eq(got->kept + list * blocks, h->kept + list * blocks,
                         blocks * sizeof(int32_t));
        ck_assert_mem_eq(got->chosen + list * tokens, h->chosen + list * tokens,
                         tokens * sizeof(int32_t));
    }
}

/* Every second block, but a context's last, in the host tier; empty sets each time. */
static void run_with_sets(struct history *h)
{
    size_t rows = (size_t)(h->lists * ROWS);
    size_t positions = (size_t)h->lists * MAX_BLOCKS * BLOCK_TOKENS;
    size_t block = kv_block_bytes(&h->shape), pool = (size_t)h->n_blocks * block;
    int32_t *table = mem_alloc((size_t)h->n_blocks * sizeof *table), set[MAX_SEQS];
    char *kv = mem_alloc(pool);
    uint64_t counts[HOT_COUNTS] = { 0 }, stall = 0;
    uint32_t step = 1;
    struct hot_rows hot = {
        .host = h->kv, .host_stride = block, .host_table = h->table, .set = set,
        .rows = nothing(rows * kv_row_dim(&h->shape) * sizeof(bf16)),
        .row_of = nothing(positions * sizeof(uint16_t)),
        .position = nothing(rows * sizeof(int32_t)), .used = nothing(rows * sizeof(uint32_t)),
        .hand = mem_calloc((size_t)h->lists, sizeof(int32_t)), .step = &step, .counts = counts,
        .stall = &stall, .rows_per_head = ROWS };

    memcpy(kv, h->kv, pool);
    for (int i = 0; i < h->n_blocks; i++) {
        int n = blocks_of(h->n_tokens[i / MAX_BLOCKS]), number = i % MAX_BLOCKS;
        bool away = number % 2 == 0 && number < n - 1;
        set[i / MAX_BLOCKS] = i / MAX_BLOCKS;
        table[i] = away ? -1 : h->table[i];
        if (away)
            memset(kv + (size_t)h->table[i] * block, 0xff, block);
    }
    run_operation(h, h->got, &h->with_sets, (const bf16 *)(const void *)kv, table, &hot);
    void *all[] = { table, kv, hot.rows, hot.row_of, hot.position, hot.used, hot.hand };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        mem_free(all[i]);
}

/* ---- tests */

static const struct setup setups[] = {
    { 2, 2, 32, 0, 4, 60, 4, 20, 5, { 700, 1, 0, 511, 640 }, true, true },
    { 1, 3, 64, 1, 2, 100, 0, 1, 4, { 63, 64, 65, 128 }, true, true },
    { 2, 1, 32, 2, 3, 64, 130, 64, 3, { 400, 127, 449 }, false, false },
    { 1, 2, 32, 3, 6, 384, 4, 64, 4, { 321, 383, 384, 500 }, true, true },
    { 2, 2, 16, 0, 1, 40, 4, 64, 3, { 190, 191, 640 }, false, false }, /* forced ones alone are */
    { 1, 1, 32, 1, 2, 100, 1, 300, 2, { 250, 640 }, false, false },    /* more than are kept */
    { 2, 4, 128, 0, 8, 100, 4, 64, 2, { 640, 576 }, false, true },
    { 1, 1, 32, 0, 7, 70, 64, 65, 2, { 700, 64 }, false, true },
    { 1, 20, 64, 4, 4, 60, 4, 20, 5, { 700, 1, 0, 511, 640 }, true, true },
    { 1, 5, 160, 5, 2, 100, 0, 1, 4, { 63, 64, 65, 128 }, true, false },
};
enum { N_SETUPS = sizeof setups / sizeof setups[0] };

START_TEST(each_step_is_the_model_s)
{
    struct history h;

    start_history(&h, &setups[_i], 900 + (uint64_t)_i);
    for (int i = 0; i < STEPS; i++) {
        next_step(&h);
        run_model(&h);
        run_operation(&h, h.got, &h.plain, h.kv, h.table, NULL);
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
    for (int i = 0; i < h.s.seqs; i++)
        h.slot[i] = -1;
    h.s.breaks = false;
    for (int i = 0; i < 3; i++) {
        next_step(&h);
        run_model(&h);
        h.wants_lists = false;
        run_operation(&h, h.got, NULL, h.kv, h.table, NULL);
        assert_outputs(&h, "exact");
        h.wants_lists = true;
        run_operation(&h, h.got, NULL, h.kv, h.table, NULL);
        assert_outputs(&h, "exact, with lists");
        assert_selected(&h);
    }
    end_history(&h);
}
END_TEST

/* Every step while all blocks are kept. */
START_TEST(a_budget_above_the_context_is_exact)
{
    struct setup s = { .kv_heads = 2, .group = 2, .head_dim = 64, .kind = _i,
                       .keep_blocks = MAX_BLOCKS, .keep_tokens = 150, .sinks = 4, .recent = 64,
                       .seqs = 4, .n_tokens = { 1, 63, 500, 700 }, .breaks = true };
    struct history h;

    start_history(&h, &s, 950);
    for (int i = 0; i < STEPS; i++) {
        next_step(&h);
        run_operation(&h, h.want, NULL, h.kv, h.table, NULL);
        run_operation(&h, h.got, &h.plain, h.kv, h.table, NULL);
        assert_outputs(&h, "all blocks");
    }
    end_history(&h);
}
END_TEST

START_TEST(the_first_step_is_exact_and_later_ones_are_not)
{
    struct setup s = { .kv_heads = 2, .group = 2, .head_dim = 64, .kind = _i, .keep_blocks = 4,
                       .keep_tokens = 100, .sinks = 4, .recent = 64, .seqs = 1,
                       .n_tokens = { 800 } };
    size_t floats = (size_t)(4 * s.head_dim);
    struct history h;
    int differ = 0;

    start_history(&h, &s, 960);
    for (int i = 0; i < 20; i++) {
        next_step(&h);
        run_operation(&h, h.want, NULL, h.kv, h.table, NULL);
        run_operation(&h, h.got, &h.plain, h.kv, h.table, NULL);
        if (i == 0)
            assert_outputs(&h, "first");
        differ += memcmp(h.got, h.want, floats * sizeof *h.got) != 0;
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
