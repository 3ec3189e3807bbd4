#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/closeness.h"
#include "tests/support/hot_fixture.h"
#include "tests/support/kernel_reference.h"

#include <check.h>
#include <string.h>

/* Decoding with blocks off the device, step after step, held against the same steps with
 * everything in kv and against a model of the sets that does the obvious. */
enum { MAX_SEQS = 5, STEPS = 14 };

struct setup {
    struct decode_setup decode;
    int rows_per_head, away;     /* as of struct hot_fixture */
    int32_t n_tokens[MAX_SEQS];  /* at the start; 0: padding */
    bool has_set[MAX_SEQS];
};

struct history {
    struct decode_fixture d;
    struct hot_fixture hot;
    struct backend *be;
    struct stream *stream;
    float *want, *got;           /* [seqs, heads * head_dim] */
    struct selected_lists lists; /* of the step */
    void *scratch;
    uint32_t step;
    uint64_t counts[HOT_COUNTS], model_counts[HOT_COUNTS], stall, misses_before;
    struct hot_books books, model;   /* rows and row_of of the model are unused */
};

static void random_bytes(struct test_random *r, void *out, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((uint8_t *)out)[i] = (uint8_t)random_below(r, 256);
}

/* ---- a history's start */

/* row_of is garbage, and so is used, that is often a step to come. */
static void fill_books(struct history *h)
{
    random_bytes(&h->d.r, h->books.row_of, h->hot.n_positions * sizeof(uint16_t));
    for (size_t i = 0; i < h->hot.n_rows; i++)
        h->books.used[i] = h->model.used[i] = (uint32_t)random_below(&h->d.r, 2 * STEPS);
}

static void start_history(struct history *h, const struct setup *s, const char *isa, int threads,
                          uint64_t seed)
{
    struct decode_fixture *d = &h->d;
    int seqs = s->decode.seqs, max_blocks = 0;

    memset(h, 0, sizeof *h);
    h->be = open_with_threads(isa, threads);
    if (!h->be)
        return;
    h->stream = stream_create(h->be);
    for (int i = 0; i < seqs; i++) {
        int most = blocks_of(s->n_tokens[i] + STEPS * BLOCK_TOKENS / 2);
        max_blocks = most > max_blocks ? most : max_blocks;
    }
    decode_init(d, &s->decode, max_blocks, seed);
    memcpy(d->n_tokens, s->n_tokens, sizeof s->n_tokens);
    hot_init(&h->hot, d, s->rows_per_head, s->away);
    for (int i = 0; i < seqs; i++)
        h->hot.set[i] = s->has_set[i] ? seqs - 1 - i : -1;
    h->hot.host_stride = kv_block_bytes(&d->shape);
    h->hot.host = mem_alloc(d->kv_bytes);
    h->want = mem_calloc(d->n_q, sizeof *h->want);
    h->got = mem_calloc(d->n_q, sizeof *h->got);
    h->lists = decode_new_lists(d);
    h->scratch = nan_alloc(decode_scratch_bytes(d, backend_ops(h->be)));
    h->books = hot_new_books(&h->hot);
    h->model = hot_new_books(&h->hot);
    fill_books(h);
    if (d->shape.index == INDEX_CHANNELS)
        random_channels(&d->r, d->channels, &d->shape);
}

static void end_history(struct history *h)
{
    mem_free(h->hot.host);
    mem_free(h->want);
    mem_free(h->got);
    mem_free(h->scratch);
    decode_free_lists(&h->lists);
    hot_free_books(&h->books);
    hot_free_books(&h->model);
    hot_fini(&h->hot);
    decode_fini(&h->d);
    stream_destroy(h->stream);
    backend_close(h->be);
}

/* ---- what changes from step to step */

static void forget_set(struct history *h, int set)
{
    hot_forget_set(&h->hot, &h->books, set);
    hot_forget_set(&h->hot, &h->model, set);
}

static void next_queries(struct history *h)
{
    struct decode_fixture *d = &h->d;
    float *q = mem_alloc(d->n_q * sizeof *q);

    random_floats(&d->r, q, d->n_q, 1);
    if (h->step == 1)
        memcpy(d->q, q, d->n_q * sizeof *q);
    else
        decode_drift(d, q);
    mem_free(q);
}

/* Contexts grow, queries drift, and now and then sequences trade their sets, of which
 * only the positions are reset, or one starts again with another text. */
static void next_step(struct history *h)
{
    struct decode_fixture *d = &h->d;
    int traded[2];

    h->step++;
    next_queries(h);
    for (int seq = 0; seq < d->s.seqs; seq++) {
        int more = 1 + random_below(&d->r, BLOCK_TOKENS / 2 - 1), from = d->n_tokens[seq];
        bool again = h->step > 1 && random_below(&d->r, 8) == 0;
        if (from == 0)
            continue;
        if (h->step > 1)
            d->n_tokens[seq] += more;
        if (again && h->hot.set[seq] >= 0)
            forget_set(h, h->hot.set[seq]);
        decode_store(d, h->be, h->stream, seq, h->step == 1 || again ? 0 : from,
                     d->n_tokens[seq]);
    }
    if (hot_trade_sets(&h->hot, traded)) {
        forget_set(h, traded[0]);
        forget_set(h, traded[1]);
    }
    hot_place_blocks(&h->hot);
}

/* ---- a step by each of the two */

static struct attend_two_level_args arguments(const struct history *h)
{
    struct attend_two_level_args a = decode_args(&h->d);

    a.out = h->want;
    a.scratch = h->scratch;
    a.scale = 0.2f;
    return a;
}

/* What the step chooses, for the model. */
static void choose(struct history *h)
{
    struct attend_two_level_args a = arguments(h);

    decode_filter_blocks(backend_ops(h->be), h->stream, &a, &h->lists);
    decode_select_tokens(backend_ops(h->be), h->stream, &a, &h->lists);
}

static void run_both(struct history *h)
{
    struct attend_two_level_args a = arguments(h);
    struct hot_rows hot = {
        .host = (const bf16 *)(const void *)h->hot.host, .host_stride = h->hot.host_stride,
        .host_table = h->hot.host_table, .set = h->hot.set, .rows = h->books.rows,
        .row_of = h->books.row_of, .position = h->books.position, .used = h->books.used,
        .hand = h->books.hand, .step = &h->step, .counts = h->counts, .stall = &h->stall,
        .rows_per_head = h->hot.rows_per_head };

    backend_ops(h->be)->attend_two_level(h->stream, &a);
    a.out = h->got;
    a.kv = h->hot.kv;
    a.kv_table = h->hot.table;
    a.hot = &hot;
    backend_ops(h->be)->attend_two_level(h->stream, &a);
    ck_assert_int_eq(stream_sync(h->stream, NULL), ST_OK);
}

/* ---- the model of a set, one KV head of one sequence */

static int row_with(const int32_t *position, int n, int32_t p)
{
    for (int row = 0; row < n; row++)
        if (position[row] == p)
            return row;
    return -1;
}

/* The next one to replace, from the hand on: empty or idle, and not taken already. */
static int next_row(const struct history *h, int head, const bool *taken)
{
    int n = h->hot.rows_per_head, idle_steps = n / h->d.s.keep_tokens;
    const int32_t *position = h->model.position + head * n;
    const uint32_t *used = h->model.used + head * n;

    for (int i = 0; i < n; i++) {
        int row = (h->model.hand[head] + i) % n;
        if (!taken[row] && (position[row] < 0 || used[row] + (uint32_t)idle_steps <= h->step))
            return row;
    }
    return -1;
}

static void model_list(struct history *h, int seq, int g)
{
    int list = seq * h->d.s.kv_heads + g, n = h->hot.rows_per_head, n_missing = 0;
    int head = h->hot.set[seq] * h->d.s.kv_heads + g;
    int32_t *position = h->model.position + head * n;
    uint32_t *used = h->model.used + head * n;
    const int32_t *chosen = h->lists.chosen + list * h->d.s.keep_tokens;
    int32_t *missing = mem_alloc((size_t)h->d.s.keep_tokens * sizeof *missing);
    bool *taken = mem_calloc((size_t)n, sizeof *taken);    /* used by this step */
    int *replaced = mem_calloc((size_t)h->d.s.keep_tokens, sizeof *replaced);

    for (int i = 0; i < h->lists.n_chosen[list]; i++) {
        int32_t p = chosen[i];
        if (h->hot.table[seq * h->d.max_blocks + p / BLOCK_TOKENS] >= 0) {
            h->model_counts[HOT_RESIDENT]++;
            continue;
        }
        int row = row_with(position, n, p);
        if (row < 0) {
            missing[n_missing++] = p;
            continue;
        }
        taken[row] = true;
        used[row] = h->step;
        h->model_counts[HOT_HITS]++;
    }
    h->model_counts[HOT_MISSES] += (uint64_t)n_missing;
    for (int i = 0; i < n_missing; i++) {
        replaced[i] = next_row(h, head, taken);
        ck_assert_int_ge(replaced[i], 0);
        taken[replaced[i]] = true;
    }
    for (int i = 0; i < n_missing; i++) {
        position[replaced[i]] = missing[i];
        used[replaced[i]] = h->step;
        h->model.hand[head] = (replaced[i] + 1) % n;
    }
    mem_free(missing);
    mem_free(taken);
    mem_free(replaced);
}

/* ---- comparing */

static void check_step(struct history *h)
{
    size_t floats = (size_t)(h->d.heads * kv_value_dim(&h->d.shape));

    for (int seq = 0; seq < h->d.s.seqs; seq++) {
        if (h->d.n_tokens[seq] == 0)
            continue;
        ck_assert(floats_identical("hot rows", h->got + (size_t)seq * floats,
                                   h->want + (size_t)seq * floats, floats));
        for (int g = 0; h->hot.set[seq] >= 0 && g < h->d.s.kv_heads; g++) {
            model_list(h, seq, g);
            hot_check_rows(&h->hot, &h->books, h->step, seq, g);
        }
    }
    for (size_t i = 0; i < h->hot.n_rows; i++)
        if (h->books.position[i] != h->model.position[i] ||
            h->books.used[i] != h->model.used[i])
            ck_abort_msg("step %u: row %zu has position %d of step %u, not %d of step %u",
                         h->step, i, h->books.position[i], h->books.used[i],
                         h->model.position[i], h->model.used[i]);
    for (int i = 0; i < h->d.lists; i++)
        ck_assert_int_eq(h->books.hand[i], h->model.hand[i]);
    for (int i = 0; i < HOT_COUNTS; i++)
        ck_assert_msg(h->counts[i] == h->model_counts[i], "step %u: count %d is %llu, not %llu",
                      h->step, i, (unsigned long long)h->counts[i],
                      (unsigned long long)h->model_counts[i]);
    bool fetched = h->model_counts[HOT_MISSES] > h->misses_before;
    ck_assert_msg((h->stall >> 32 == h->step) == fetched, "step %u: a stall of step %llu", h->step,
                  (unsigned long long)(h->stall >> 32));
    h->misses_before = h->model_counts[HOT_MISSES];
}

static void run_history(const struct setup *s, const char *isa, int threads, uint64_t seed)
{
    struct history h;

    start_history(&h, s, isa, threads, seed);
    if (!h.be)
        return;
    for (int i = 0; i < STEPS; i++) {
        next_step(&h);
        choose(&h);
        run_both(&h);
        check_step(&h);
    }
    end_history(&h);
}

/* ---- tests */

/* Room for just the chosen, for a few more, for several times as many; latent rows at last. */
enum { N_PLAIN = 20, N_SETUPS = N_PLAIN + N_LATENT_SHAPES };

static struct setup setup_of(int i)
{
    static const int head_dims[] = { 32, 64, 16, 128, 256 };
    static const int keeps[][2] = { { 3, 70 }, { 5, 150 }, { 2, 1 }, { 8, 400 }, { 40, 2000 } };
    static const int more[] = { 0, 1, 60, 500 };
    struct setup s = {
        .decode = { .kv_heads = 1 + i % 3, .group = 1 + i % 4, .head_dim = head_dims[i % 5],
                    .kind = i % 5 == 2 ? i % 2 : i % 4, .keep_blocks = keeps[i / 2 % 5][0],
                    .keep_tokens = keeps[i / 2 % 5][1], .sinks = i % 3, .recent = i % 2 * 30,
                    .seqs = MAX_SEQS },
        .rows_per_head = keeps[i / 2 % 5][1] + more[i % 4], .away = i % 5 == 4 ? 10 : 3 + i % 7,
        .n_tokens = { 700, 130, 0, 400, 1 }, .has_set = { true, false, true, true, true },
    };

    if (i >= N_PLAIN) {
        s.decode.kv_heads = 1;
        s.decode.group = latent_shapes[i % N_LATENT_SHAPES].heads;
        s.decode.head_dim = latent_shapes[i % N_LATENT_SHAPES].head_dim;
        s.decode.kind = 4 + i % 2;
    }
    return s;
}

START_TEST(a_history_with_sets_is_one_without)
{
    struct setup s = setup_of(_i);

    for (int isa = 0; isa < TEST_ALL_ISAS; isa++)
        run_history(&s, test_all_isas[isa], 1 + (_i + isa) % 3, 100 + (uint64_t)_i);
}
END_TEST

/* One long context with all of its blocks away, and as many rows as there may be: splits
 * of a list become tasks of their own. */
START_TEST(a_large_set)
{
    struct setup s = { .decode = { .kv_heads = 1, .group = 2, .head_dim = 32, .keep_blocks = 40,
                                   .keep_tokens = 2100, .sinks = 4, .recent = 64, .seqs = 1 },
                       .rows_per_head = HOT_MOST_ROWS, .away = 10,
                       .n_tokens = { 5000 }, .has_set = { true } };

    run_history(&s, "auto", 8, 1);
}
END_TEST

/* A row that holds nothing, though row_of says it were the one. */
START_TEST(an_empty_row_is_never_a_hit)
{
    struct setup s = { .decode = { .kv_heads = 1, .group = 1, .head_dim = 16, .keep_blocks = 4,
                                   .keep_tokens = 64, .seqs = 1 },
                       .rows_per_head = 64, .away = 10, .n_tokens = { 400 }, .has_set = { true } };
    struct history h;

    start_history(&h, &s, "auto", 1, 2);
    for (int p = 0; p < h.d.max_blocks * BLOCK_TOKENS; p++)
        h.books.row_of[p] = (uint16_t)(p % s.rows_per_head);
    next_step(&h);
    choose(&h);
    run_both(&h);
    check_step(&h);
    ck_assert_uint_eq(h.counts[HOT_HITS], 0);
    end_history(&h);
}
END_TEST

TCase *hot_rows_case(void)
{
    TCase *c = tcase_create("hot_rows");

    tcase_set_timeout(c, 120);
    tcase_add_loop_test(c, a_history_with_sets_is_one_without, 0, N_SETUPS);
    tcase_add_test(c, a_large_set);
    tcase_add_test(c, an_empty_row_is_never_a_hit);
    return c;
}
