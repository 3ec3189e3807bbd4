#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/closeness.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/random_data.h"
#include "tests/support/token_store.h"

#include <check.h>
#include <string.h>

/* Decoding with blocks off the device, step after step, held against the same steps with
 * everything in kv and against a model of the sets that does the obvious.  Whatever must not be
 * read is NaN: kv slots of nobody, host slots of blocks that are in kv, rows never filled. */
enum { MAX_SEQS = 5, STEPS = 14, UNUSED = -7 };

struct setup {
    int kv_heads, group, head_dim, kind;
    int keep_blocks, keep_tokens, sinks, recent, rows_per_head;
    int seqs, away;              /* of ten blocks, about how many are off the device */
    int32_t n_tokens[MAX_SEQS];  /* at the start; 0: padding */
    bool has_set[MAX_SEQS];
};

struct books {                   /* as of struct hot_rows */
    uint16_t *row_of;
    int32_t *position;
    uint32_t *used;
    int32_t *hand;
};

struct history {
    struct setup s;
    struct kv_shape shape;
    struct backend *be;
    struct stream *stream;
    struct test_random r;
    int heads, max_blocks, n_blocks, lists;
    size_t block;                /* elements of K and V of a block */
    int16_t channels[4 * INDEX_CHANNELS_KEPT];
    int32_t n_tokens[MAX_SEQS], set[MAX_SEQS];
    int32_t *ids;                /* [seqs, max_blocks] of a block in truth, index and tier */
    int32_t *table, *host_table; /* [seqs, max_blocks] of the call with sets */
    bf16 *truth, *kv, *tier;     /* [n_blocks] blocks */
    uint8_t *index;
    float *q, *want, *got;       /* [seqs, heads * head_dim] */
    int32_t *kept, *n_kept, *chosen, *n_chosen;
    void *scratch;
    uint32_t step;
    uint64_t counts[HOT_COUNTS], model_counts[HOT_COUNTS], stall, misses_before;
    bf16 *rows;                  /* [seqs, kv_heads, N, kv_row_dim] */
    struct books books, model;
};

static int blocks_of(int n_tokens)
{
    return (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

static void *nothing(size_t bytes)
{
    return memset(mem_alloc(bytes), 0xff, bytes);
}

static void random_bytes(struct test_random *r, void *out, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((uint8_t *)out)[i] = (uint8_t)random_below(r, 256);
}

/* ---- a history's start */

static struct books make_books(const struct history *h)
{
    size_t heads = (size_t)(h->s.seqs * h->s.kv_heads);
    size_t rows = heads * (size_t)h->s.rows_per_head;

    return (struct books){
        .row_of = mem_alloc(heads * (size_t)(h->max_blocks * BLOCK_TOKENS) * sizeof(uint16_t)),
        .position = nothing(rows * sizeof(int32_t)),
        .used = mem_alloc(rows * sizeof(uint32_t)),
        .hand = mem_calloc(heads, sizeof(int32_t)),
    };
}

/* The model keeps no row_of of its own; used is garbage that is often a step to come. */
static void fill_books(struct history *h)
{
    size_t heads = (size_t)(h->s.seqs * h->s.kv_heads);
    size_t rows = heads * (size_t)h->s.rows_per_head;

    random_bytes(&h->r, h->books.row_of,
                 heads * (size_t)(h->max_blocks * BLOCK_TOKENS) * sizeof(uint16_t));
    for (size_t i = 0; i < rows; i++)
        h->books.used[i] = h->model.used[i] = (uint32_t)random_below(&h->r, 2 * STEPS);
}

static void start_history(struct history *h, const struct setup *s, const char *isa, int threads,
                          uint64_t seed)
{
    memset(h, 0, sizeof *h);
    h->s = *s;
    h->r = test_random(seed);
    h->shape = (struct kv_shape){
        .kv_heads = s->kv_heads, .head_dim = s->head_dim,
        .latent_dim = s->kind & 4 ? latent_dim_of(s->head_dim) : 0,
        .filter = s->kind & 1 ? FILTER_BOUNDS : FILTER_COARSE,
        .index = s->kind & 2 ? INDEX_CHANNELS : INDEX_ROTATED };
    h->be = open_with_threads(isa, threads);
    if (!h->be)
        return;
    h->stream = stream_create(h->be);
    h->heads = s->kv_heads * s->group;
    h->lists = s->seqs * s->kv_heads;
    memcpy(h->n_tokens, s->n_tokens, sizeof h->n_tokens);
    for (int i = 0; i < s->seqs; i++) {
        int most = blocks_of(s->n_tokens[i] + STEPS * BLOCK_TOKENS / 2);
        h->max_blocks = most > h->max_blocks ? most : h->max_blocks;
        h->set[i] = s->has_set[i] ? s->seqs - 1 - i : -1;
    }
    h->n_blocks = s->seqs * h->max_blocks;
    h->block = kv_block_bytes(&h->shape) / sizeof(bf16);
    size_t pool = (size_t)h->n_blocks * kv_block_bytes(&h->shape);
    size_t q = (size_t)(s->seqs * h->heads * s->head_dim) * sizeof(float);
    size_t ints = (size_t)h->n_blocks * sizeof(int32_t), lists = (size_t)h->lists;
    h->ids = mem_alloc(ints);
    random_order(&h->r, h->ids, h->n_blocks);
    h->table = nothing(ints);
    h->host_table = nothing(ints);
    h->truth = nothing(pool);
    h->kv = nothing(pool);
    h->tier = nothing(pool);
    h->index = nothing((size_t)h->n_blocks * index_block_bytes(&h->shape));
    h->q = mem_alloc(q);
    h->want = mem_calloc(1, q);
    h->got = mem_calloc(1, q);
    h->kept = nothing(lists * (size_t)s->keep_blocks * sizeof(int32_t));
    h->n_kept = nothing(lists * sizeof(int32_t));
    h->chosen = nothing(lists * (size_t)s->keep_tokens * sizeof(int32_t));
    h->n_chosen = nothing(lists * sizeof(int32_t));
    h->scratch = nothing(backend_ops(h->be)->attend_two_level_scratch(
        &h->shape, s->seqs, h->heads, h->max_blocks, s->keep_blocks, s->keep_tokens));
    h->rows = nothing(lists * (size_t)s->rows_per_head * kv_row_dim(&h->shape) * sizeof(bf16));
    h->books = make_books(h);
    h->model = make_books(h);
    fill_books(h);
    if (h->shape.index == INDEX_CHANNELS)
        random_channels(&h->r, h->channels, &h->shape);
}

static void end_history(struct history *h)
{
    void *all[] = { h->ids, h->table, h->host_table, h->truth, h->kv, h->tier, h->index, h->q,
                    h->want, h->got, h->kept, h->n_kept, h->chosen, h->n_chosen, h->scratch,
                    h->rows, h->books.row_of, h->books.position, h->books.used,
                    h->books.hand, h->model.row_of, h->model.position, h->model.used,
                    h->model.hand };

    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        mem_free(all[i]);
    stream_destroy(h->stream);
    backend_close(h->be);
}

/* ---- what changes from step to step */

/* Positions from..n - 1 of a sequence, through rope_store without rotation. */
static void store_tokens(struct history *h, int seq, int from, int n)
{
    store_random_tokens(h->be, h->stream, &(struct token_store){
        .kv = h->truth, .index = h->index, .table = h->ids + seq * h->max_blocks,
        .channels = h->channels, .shape = h->shape, .heads = h->heads, .from = from,
        .n = n - from }, &h->r);
}

static bf16 *block_at(const struct history *h, bf16 *pool, int32_t id)
{
    return pool + (size_t)id * h->block;
}

/* Every block anew in kv or in the tier, at a place that is new as well. */
static void place_blocks(struct history *h)
{
    size_t pool = (size_t)h->n_blocks * kv_block_bytes(&h->shape);
    int32_t *kv_slots = mem_alloc((size_t)h->n_blocks * sizeof *kv_slots);
    int32_t *host_slots = mem_alloc((size_t)h->n_blocks * sizeof *host_slots);

    random_order(&h->r, kv_slots, h->n_blocks);
    random_order(&h->r, host_slots, h->n_blocks);
    memset(h->kv, 0xff, pool);
    memset(h->tier, 0xff, pool);
    for (int i = 0; i < h->n_blocks; i++) {
        int seq = i / h->max_blocks, block = i % h->max_blocks, n = blocks_of(h->n_tokens[seq]);
        bool away = h->set[seq] >= 0 && block < n - 1 && random_below(&h->r, 10) < h->s.away;
        h->table[i] = h->host_table[i] = UNUSED;
        if (block >= n)
            continue;
        const bf16 *from = block_at(h, h->truth, h->ids[i]);
        if (away) {
            h->table[i] = -1;
            h->host_table[i] = host_slots[i];
            memcpy(block_at(h, h->tier, host_slots[i]), from, kv_block_bytes(&h->shape));
        } else {
            h->table[i] = kv_slots[i];
            memcpy(block_at(h, h->kv, kv_slots[i]), from, kv_block_bytes(&h->shape));
        }
    }
    mem_free(kv_slots);
    mem_free(host_slots);
}

static void forget_set(struct history *h, int set)
{
    int n = h->s.kv_heads * h->s.rows_per_head;

    for (int i = set * n; i < (set + 1) * n; i++)
        h->books.position[i] = h->model.position[i] = -1;
}

/* Contexts grow, queries drift, and now and then sequences trade their sets, of which
 * only the positions are reset, or one starts again with another text. */
static void next_step(struct history *h)
{
    const struct setup *s = &h->s;
    size_t n = (size_t)(s->seqs * h->heads * s->head_dim);
    float *q = mem_alloc(n * sizeof *q);

    h->step++;
    random_floats(&h->r, q, n, 1);
    for (size_t i = 0; i < n; i++)
        h->q[i] = h->step == 1 ? q[i] : 0.8f * h->q[i] + 0.6f * q[i];
    mem_free(q);
    for (int seq = 0; seq < s->seqs; seq++) {
        int more = 1 + random_below(&h->r, BLOCK_TOKENS / 2 - 1), from = h->n_tokens[seq];
        bool again = h->step > 1 && random_below(&h->r, 8) == 0;
        if (from == 0)
            continue;
        if (h->step > 1)
            h->n_tokens[seq] += more;
        if (again && h->set[seq] >= 0)
            forget_set(h, h->set[seq]);
        store_tokens(h, seq, h->step == 1 || again ? 0 : from, h->n_tokens[seq]);
    }
    int a = random_below(&h->r, s->seqs), b = random_below(&h->r, s->seqs);
    if (h->set[a] >= 0 && h->set[b] >= 0 && a != b) {
        int32_t other = h->set[a];
        h->set[a] = h->set[b];
        h->set[b] = other;
        forget_set(h, h->set[a]);
        forget_set(h, h->set[b]);
    }
    place_blocks(h);
}

/* ---- a step by each of the two */

static int longest(const struct history *h)
{
    int most = 0;

    for (int i = 0; i < h->s.seqs; i++)
        most = h->n_tokens[i] > most ? h->n_tokens[i] : most;
    return most;
}

static struct attend_two_level_args arguments(const struct history *h)
{
    const struct setup *s = &h->s;

    return (struct attend_two_level_args){
        .out = h->want, .q = h->q, .q_stride = h->heads * s->head_dim, .kv = h->truth,
        .index = h->index, .kv_table = h->ids, .index_table = h->ids, .n_tokens = h->n_tokens,
        .channels = h->channels, .scratch = h->scratch, .shape = h->shape, .seqs = s->seqs,
        .heads = h->heads, .max_blocks = h->max_blocks, .keep_blocks = s->keep_blocks,
        .keep_tokens = s->keep_tokens, .sink_tokens = s->sinks, .recent_tokens = s->recent,
        .max_n_tokens = longest(h), .scale = 0.2f };
}

/* What the step chooses, for the model. */
static void choose(struct history *h)
{
    struct attend_two_level_args a = arguments(h);

    backend_ops(h->be)->block_filter(h->stream, &(struct block_filter_args){
        .kept = h->kept, .n_kept = h->n_kept, .q = a.q, .q_stride = a.q_stride,
        .index = a.index, .table = a.index_table, .n_tokens = a.n_tokens,
        .channels = a.channels, .scratch = a.scratch, .shape = a.shape, .seqs = a.seqs,
        .heads = a.heads, .max_blocks = a.max_blocks, .keep_blocks = a.keep_blocks,
        .sink_tokens = a.sink_tokens, .recent_tokens = a.recent_tokens,
        .max_n_tokens = a.max_n_tokens });
    backend_ops(h->be)->token_select(h->stream, &(struct token_select_args){
        .chosen = h->chosen, .n_chosen = h->n_chosen, .kept = h->kept, .n_kept = h->n_kept,
        .q = a.q, .q_stride = a.q_stride, .index = a.index, .table = a.index_table,
        .n_tokens = a.n_tokens, .channels = a.channels, .scratch = a.scratch,
        .shape = a.shape, .seqs = a.seqs, .heads = a.heads, .max_blocks = a.max_blocks,
        .keep_blocks = a.keep_blocks, .keep_tokens = a.keep_tokens,
        .sink_tokens = a.sink_tokens, .recent_tokens = a.recent_tokens });
}

static void run_both(struct history *h)
{
    struct attend_two_level_args a = arguments(h);
    struct hot_rows hot = {
        .host = h->tier, .host_stride = kv_block_bytes(&h->shape), .host_table = h->host_table,
        .set = h->set, .rows = h->rows, .row_of = h->books.row_of,
        .position = h->books.position, .used = h->books.used, .hand = h->books.hand,
        .step = &h->step,
        .counts = h->counts, .stall = &h->stall, .rows_per_head = h->s.rows_per_head };

    backend_ops(h->be)->attend_two_level(h->stream, &a);
    a.out = h->got;
    a.kv = h->kv;
    a.kv_table = h->table;
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
    int n = h->s.rows_per_head, idle_steps = n / h->s.keep_tokens;
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
    int list = seq * h->s.kv_heads + g, n = h->s.rows_per_head, n_missing = 0;
    int head = h->set[seq] * h->s.kv_heads + g;
    int32_t *position = h->model.position + head * n;
    uint32_t *used = h->model.used + head * n;
    const int32_t *chosen = h->chosen + list * h->s.keep_tokens;
    int32_t *missing = mem_alloc((size_t)h->s.keep_tokens * sizeof *missing);
    bool *taken = mem_calloc((size_t)n, sizeof *taken);    /* used by this step */
    int *replaced = mem_calloc((size_t)h->s.keep_tokens, sizeof *replaced);

    for (int i = 0; i < h->n_chosen[list]; i++) {
        int32_t p = chosen[i];
        if (h->table[seq * h->max_blocks + p / BLOCK_TOKENS] >= 0) {
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

static void check_rows(const struct history *h, int seq, int g)
{
    int n = h->s.rows_per_head, head = h->set[seq] * h->s.kv_heads + g;
    size_t row_floats = kv_row_dim(&h->shape);

    for (int row = 0; row < n; row++) {
        int32_t p = h->books.position[head * n + row];
        if (p < 0)
            continue;
        int32_t id = h->ids[seq * h->max_blocks + p / BLOCK_TOKENS];
        const bf16 *want = block_at(h, h->truth, id) +
                           (size_t)(g * BLOCK_TOKENS + p % BLOCK_TOKENS) * row_floats;
        const bf16 *got = h->rows + (size_t)(head * n + row) * row_floats;
        ck_assert_msg(memcmp(got, want, row_floats * sizeof *got) == 0,
                      "step %u: row %d of sequence %d, head %d is not position %d", h->step, row,
                      seq, g, p);
        ck_assert_int_eq(h->books.row_of[(size_t)head * (size_t)(h->max_blocks * BLOCK_TOKENS) +
                                         (size_t)p], row);
    }
}

static void check_step(struct history *h)
{
    size_t rows = (size_t)(h->lists * h->s.rows_per_head);
    size_t floats = (size_t)(h->heads * kv_value_dim(&h->shape));

    for (int seq = 0; seq < h->s.seqs; seq++) {
        if (h->n_tokens[seq] == 0)
            continue;
        ck_assert(floats_identical("hot rows", h->got + (size_t)seq * floats,
                                   h->want + (size_t)seq * floats, floats));
        for (int g = 0; h->set[seq] >= 0 && g < h->s.kv_heads; g++) {
            model_list(h, seq, g);
            check_rows(h, seq, g);
        }
    }
    for (size_t i = 0; i < rows; i++)
        if (h->books.position[i] != h->model.position[i] ||
            h->books.used[i] != h->model.used[i])
            ck_abort_msg("step %u: row %zu has position %d of step %u, not %d of step %u",
                         h->step, i, h->books.position[i], h->books.used[i],
                         h->model.position[i], h->model.used[i]);
    for (int i = 0; i < h->lists; i++)
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
        .kv_heads = 1 + i % 3, .group = 1 + i % 4, .head_dim = head_dims[i % 5],
        .kind = i % 5 == 2 ? i % 2 : i % 4, .keep_blocks = keeps[i / 2 % 5][0],
        .keep_tokens = keeps[i / 2 % 5][1], .sinks = i % 3, .recent = i % 2 * 30,
        .seqs = MAX_SEQS, .away = i % 5 == 4 ? 10 : 3 + i % 7,
        .n_tokens = { 700, 130, 0, 400, 1 }, .has_set = { true, false, true, true, true },
    };

    s.rows_per_head = s.keep_tokens + more[i % 4];
    if (i >= N_PLAIN) {
        s.kv_heads = 1;
        s.group = latent_shapes[i % N_LATENT_SHAPES].heads;
        s.head_dim = latent_shapes[i % N_LATENT_SHAPES].head_dim;
        s.kind = 4 + i % 2;
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
    struct setup s = { .kv_heads = 1, .group = 2, .head_dim = 32, .keep_blocks = 40,
                       .keep_tokens = 2100, .sinks = 4, .recent = 64,
                       .rows_per_head = HOT_MOST_ROWS, .seqs = 1, .away = 10,
                       .n_tokens = { 5000 }, .has_set = { true } };

    run_history(&s, "auto", 8, 1);
}
END_TEST

/* A row that holds nothing, though row_of says it were the one. */
START_TEST(an_empty_row_is_never_a_hit)
{
    struct setup s = { .kv_heads = 1, .group = 1, .head_dim = 16, .keep_blocks = 4,
                       .keep_tokens = 64, .rows_per_head = 64, .seqs = 1, .away = 10,
                       .n_tokens = { 400 }, .has_set = { true } };
    struct history h;

    start_history(&h, &s, "auto", 1, 2);
    for (int p = 0; p < h.max_blocks * BLOCK_TOKENS; p++)
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
