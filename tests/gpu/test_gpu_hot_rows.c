/* Decoding on the GPU with blocks off the device, held step after step against the same with
 * everything in kv, to the bit; the books of the sets against what hot_rows.h says of them; and
 * the answers against the CPU back end.  Whatever must not be read is NaN. */

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/gpu_compare.h"
#include "tests/support/gpu_fixture.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/token_store.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_SEQS = 48, STEPS = 6, UNUSED = -7 };

struct setup {
    int kv_heads, group, head_dim, kind;
    int keep_blocks, keep_tokens, sinks, recent, rows_per_head;
    int seqs, away;              /* of ten blocks, about how many are off the device */
    int n_tokens, steps;         /* of the longest at the start */
    float scale;
    bool lagged;                 /* contexts grow by a token a step, and every fifth has no slot */
};

struct books {                   /* of all sets, on the host */
    bf16 *rows;
    uint16_t *row_of;
    int32_t *position;
    uint32_t *used;
    int32_t *hand;
};

struct history {
    struct setup s;
    struct kv_shape shape;
    struct test_random r;
    int heads, max_blocks, n_blocks, lists;
    size_t block_bytes, index_bytes, n_q, n_rows, n_positions;
    int16_t channels[8 * INDEX_CHANNELS_KEPT];
    int32_t n_tokens[MAX_SEQS], set[MAX_SEQS];
    int32_t *ids;                /* [seqs, max_blocks] of a block in truth and index */
    int32_t *table, *host_table; /* [seqs, max_blocks] of the call with sets */
    bf16 *truth, *kv, *want, *got;
    uint8_t *index;
    float *q;
    uint32_t step;
    uint64_t counts[HOT_COUNTS], stall;
    int n_stalls;
    struct books before, after;
    struct attend_two_level_args args; /* device, without sets */
    struct hot_rows hot;         /* device */
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

static int blocks_of(int n_tokens)
{
    return (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

static void *nothing(size_t bytes)
{
    return memset(mem_alloc(bytes), 0xff, bytes);
}

/* ---- a history's start */

/* The longest contexts that a sequence will have, through the CPU's rope_store without
 * rotation; each step sees a part of them. */
static void store_sequence(struct history *h, int seq, int n)
{
    struct backend *cpu = test_backend("auto");
    struct stream *stream = stream_create(cpu);

    store_random_tokens(cpu, stream, &(struct token_store){
        .kv = h->truth, .index = h->index, .table = h->ids + seq * h->max_blocks,
        .channels = h->channels, .shape = h->shape, .heads = h->heads, .n = n }, &h->r);
    stream_destroy(stream);
}

static struct books make_books(const struct history *h)
{
    return (struct books){
        .rows = nothing(h->n_rows * kv_row_dim(&h->shape) * sizeof(bf16)),
        .row_of = nothing(h->n_positions * sizeof(uint16_t)),
        .position = nothing(h->n_rows * sizeof(int32_t)),
        .used = nothing(h->n_rows * sizeof(uint32_t)),
        .hand = mem_calloc((size_t)h->lists, sizeof(int32_t)),
    };
}

static void free_books(struct books *b)
{
    mem_free(b->rows);
    mem_free(b->row_of);
    mem_free(b->position);
    mem_free(b->used);
    mem_free(b->hand);
}

/* Every third sequence has no set, every seventh is padding. */
static void start_sequences(struct history *h)
{
    for (int i = 0; i < h->s.seqs; i++) {
        h->set[i] = i % 3 == 1 ? -1 : h->s.seqs - 1 - i;
        h->n_tokens[i] = i % 7 == 5 ? 0 : i == 0 ? h->s.n_tokens
                                                 : 1 + random_below(&h->r, h->s.n_tokens);
        if (h->n_tokens[i] > 0)
            store_sequence(h, i, h->n_tokens[i] + h->s.steps * BLOCK_TOKENS / 2);
    }
}

/* Empty. */
static void put_lists(struct history *h)
{
    size_t n = (size_t)h->lists * sizeof(int32_t);
    int32_t slot[MAX_SEQS];

    for (int i = 0; i < h->s.seqs; i++)
        slot[i] = i % 5 == 4 ? -1 : h->s.seqs - 1 - i;
    for (int i = 0; i < 2 && h->s.lagged; i++)
        h->lagged[i] = (struct lagged_blocks){
            .kept = gpu_put(NULL, n * (size_t)h->s.keep_blocks), .n_kept = gpu_put(NULL, n),
            .n_tokens = gpu_put(NULL, n),
            .slot = gpu_put(slot, (size_t)h->s.seqs * sizeof *slot) };
}

static void put_device(struct history *h)
{
    const struct setup *s = &h->s;
    size_t scratch = gpu_ops()->attend_two_level_scratch(&h->shape, s->seqs, h->heads,
                                                         h->max_blocks, s->keep_blocks,
                                                         s->keep_tokens);

    for (size_t i = 0; i < h->n_positions; i++) /* garbage, of which much is a row */
        h->after.row_of[i] = (uint16_t)random_below(&h->r, 2 * s->rows_per_head);
    for (size_t i = 0; i < h->n_rows; i++)
        h->after.used[i] = (uint32_t)random_below(&h->r, 2 * s->steps);
    h->args = (struct attend_two_level_args){
        .q_stride = h->heads * s->head_dim, .kv = gpu_put(h->truth, h->block_bytes),
        .index = gpu_put(h->index, h->index_bytes),
        .kv_table = gpu_put(h->ids, (size_t)h->n_blocks * sizeof *h->ids),
        .channels = gpu_put(h->channels, sizeof h->channels), .scratch = gpu_put(NULL, scratch),
        .shape = h->shape, .seqs = s->seqs, .heads = h->heads, .max_blocks = h->max_blocks,
        .keep_blocks = s->keep_blocks, .keep_tokens = s->keep_tokens, .sink_tokens = s->sinks,
        .recent_tokens = s->recent, .scale = s->scale };
    h->args.index_table = h->args.kv_table;
    h->hot = (struct hot_rows){
        .host = tier.base, .host_stride = kv_block_bytes(&h->shape) + 16,
        .rows = gpu_put(h->after.rows, h->n_rows * kv_row_dim(&h->shape) * sizeof(bf16)),
        .row_of = gpu_put(h->after.row_of, h->n_positions * sizeof(uint16_t)),
        .position = gpu_put(h->after.position, h->n_rows * sizeof(int32_t)),
        .used = gpu_put(h->after.used, h->n_rows * sizeof(uint32_t)),
        .hand = gpu_put(h->after.hand, (size_t)h->lists * sizeof(int32_t)),
        .counts = gpu_put(h->counts, sizeof h->counts),
        .stall = gpu_put(&h->stall, sizeof h->stall), .rows_per_head = s->rows_per_head };
    put_lists(h);
}

static void start_history(struct history *h, const struct setup *s, uint64_t seed)
{
    memset(h, 0, sizeof *h);
    h->s = *s;
    h->r = test_random(seed);
    h->shape = test_kv_shape(s->kv_heads, s->head_dim, s->kind);
    h->heads = s->kv_heads * s->group;
    h->lists = s->seqs * s->kv_heads;
    h->max_blocks = blocks_of(s->n_tokens + s->steps * BLOCK_TOKENS / 2);
    h->n_blocks = s->seqs * h->max_blocks;
    h->block_bytes = (size_t)h->n_blocks * kv_block_bytes(&h->shape);
    h->index_bytes = (size_t)h->n_blocks * index_block_bytes(&h->shape);
    h->n_q = (size_t)(s->seqs * h->heads * s->head_dim);
    h->n_rows = (size_t)h->lists * (size_t)s->rows_per_head;
    h->n_positions = (size_t)h->lists * (size_t)(h->max_blocks * BLOCK_TOKENS);
    h->ids = mem_alloc((size_t)h->n_blocks * sizeof *h->ids);
    random_order(&h->r, h->ids, h->n_blocks);
    h->table = nothing((size_t)h->n_blocks * sizeof *h->table);
    h->host_table = nothing((size_t)h->n_blocks * sizeof *h->host_table);
    h->truth = nothing(h->block_bytes);
    h->kv = nothing(h->block_bytes);
    h->index = nothing(h->index_bytes);
    h->want = nothing(h->n_q * sizeof *h->want);
    h->got = nothing(h->n_q * sizeof *h->got);
    h->q = random_acts(&h->r, h->n_q, 1);
    h->before = make_books(h);
    h->after = make_books(h);
    if (!h->shape.latent_dim)
        random_channels(&h->r, h->channels, &h->shape);
    start_sequences(h);
    size_t bytes = (size_t)h->n_blocks * (kv_block_bytes(&h->shape) + 16);
    ck_assert_int_eq(buffer_alloc(gpu_backend(), &tier, MEM_PINNED, bytes), ST_OK);
    put_device(h);
}

static void end_history(struct history *h)
{
    void *all[] = { h->ids, h->table, h->host_table, h->truth, h->kv, h->index, h->want,
                    h->got, h->q };

    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        mem_free(all[i]);
    free_books(&h->before);
    free_books(&h->after);
    clean();
}

/* ---- what changes from step to step */

/* Every block anew in kv or in the tier, at a place that is new as well. */
static void place_blocks(struct history *h)
{
    int32_t *kv_slots = mem_alloc((size_t)h->n_blocks * sizeof *kv_slots);
    int32_t *host_slots = mem_alloc((size_t)h->n_blocks * sizeof *host_slots);
    size_t block = kv_block_bytes(&h->shape);

    random_order(&h->r, kv_slots, h->n_blocks);
    random_order(&h->r, host_slots, h->n_blocks);
    memset(h->kv, 0xff, h->block_bytes);
    memset(tier.base, 0xff, tier.bytes);
    for (int i = 0; i < h->n_blocks; i++) {
        int seq = i / h->max_blocks, number = i % h->max_blocks;
        int n = blocks_of(h->n_tokens[seq]);
        bool away = h->set[seq] >= 0 && number < n - 1 && random_below(&h->r, 10) < h->s.away;
        h->table[i] = h->host_table[i] = UNUSED;
        if (number >= n)
            continue;
        const char *from = (const char *)h->truth + (size_t)h->ids[i] * block;
        if (away) {
            h->table[i] = -1;
            h->host_table[i] = host_slots[i];
            memcpy((char *)tier.base + (size_t)host_slots[i] * h->hot.host_stride, from, block);
        } else {
            h->table[i] = kv_slots[i];
            memcpy((char *)h->kv + (size_t)kv_slots[i] * block, from, block);
        }
    }
    mem_free(kv_slots);
    mem_free(host_slots);
}

/* Two sequences trade their sets, of which only the positions are reset. */
static void trade_sets(struct history *h)
{
    int a = random_below(&h->r, h->s.seqs), b = random_below(&h->r, h->s.seqs);
    int n = h->s.kv_heads * h->s.rows_per_head;
    int32_t sets[2] = { h->set[a], h->set[b] };

    if (a == b || sets[0] < 0 || sets[1] < 0)
        return;
    h->set[a] = sets[1];
    h->set[b] = sets[0];
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < n; j++)
            h->after.position[sets[i] * n + j] = -1;
    h->hot.position = gpu_put(h->after.position, h->n_rows * sizeof(int32_t));
}

static void next_step(struct history *h)
{
    float *q = random_acts(&h->r, h->n_q, 1);

    for (size_t i = 0; i < h->n_q && h->step > 0; i++)
        h->q[i] = 0.8f * h->q[i] + 0.6f * q[i];
    round_to_bf16(h->q, h->n_q);
    mem_free(q);
    for (int i = 0; i < h->s.seqs; i++)
        if (h->n_tokens[i] > 0 && h->step > 0)
            h->n_tokens[i] += h->s.lagged ? 1 : 1 + random_below(&h->r, BLOCK_TOKENS / 2 - 1);
    h->step++;
    trade_sets(h);
    place_blocks(h);
}

/* ---- a step by each */

static int longest(const struct history *h)
{
    int most = 0;

    for (int i = 0; i < h->s.seqs; i++)
        most = h->n_tokens[i] > most ? h->n_tokens[i] : most;
    return most;
}

static void get_books(const struct history *h, struct books *b)
{
    gpu_get(b->rows, h->hot.rows, h->n_rows * kv_row_dim(&h->shape) * sizeof(bf16));
    gpu_get(b->row_of, h->hot.row_of, h->n_positions * sizeof *b->row_of);
    gpu_get(b->position, h->hot.position, h->n_rows * sizeof *b->position);
    gpu_get(b->used, h->hot.used, h->n_rows * sizeof *b->used);
    gpu_get(b->hand, h->hot.hand, (size_t)h->lists * sizeof *b->hand);
}

static void run_both(struct history *h)
{
    size_t table = (size_t)h->n_blocks * sizeof *h->table;
    size_t seqs = (size_t)h->s.seqs * sizeof(int32_t);
    struct attend_two_level_args a = h->args;
    struct hot_rows hot = h->hot;
    void *want = gpu_put(NULL, h->n_q * sizeof(bf16)), *got = gpu_put(NULL, h->n_q * sizeof(bf16));

    get_books(h, &h->before);
    a.out = want;
    a.q = gpu_put_act(h->q, h->n_q);
    a.n_tokens = gpu_put(h->n_tokens, seqs);
    a.max_n_tokens = longest(h);
    a.lagged = h->s.lagged ? &h->lagged[0] : NULL;
    gpu_ops()->attend_two_level(gpu_stream(), &a);
    hot.host_table = gpu_put(h->host_table, table);
    hot.set = gpu_put(h->set, seqs);
    hot.step = gpu_put(&h->step, sizeof h->step);
    a.out = got;
    a.kv = gpu_put(h->kv, h->block_bytes);
    a.kv_table = gpu_put(h->table, table);
    a.hot = &hot;
    a.lagged = h->s.lagged ? &h->lagged[1] : NULL;
    gpu_ops()->attend_two_level(gpu_stream(), &a);
    gpu_get(h->want, want, h->n_q * sizeof *h->want);
    gpu_get(h->got, got, h->n_q * sizeof *h->got);
    get_books(h, &h->after);
}

static float *run_cpu(const struct history *h)
{
    const struct backend_ops *ops = backend_ops(test_backend("auto"));
    struct stream *stream = stream_create(test_backend("auto"));
    struct attend_two_level_args a = h->args;
    float *out = mem_calloc(h->n_q, sizeof *out);
    void *scratch = mem_alloc(ops->attend_two_level_scratch(
        &h->shape, h->s.seqs, h->heads, h->max_blocks, h->s.keep_blocks, h->s.keep_tokens));

    a.out = out;
    a.q = h->q;
    a.kv = h->truth;
    a.index = h->index;
    a.kv_table = a.index_table = h->ids;
    a.n_tokens = h->n_tokens;
    a.channels = h->channels;
    a.scratch = scratch;
    a.max_n_tokens = longest(h);
    ops->attend_two_level(stream, &a);
    stream_destroy(stream);
    mem_free(scratch);
    return out;
}

/* ---- what must hold */

struct change { int hits, misses; };

/* One row that is not empty: K and V of its position, and found by it. */
static void check_row(const struct history *h, int seq, int g, int i)
{
    int head = h->set[seq] * h->s.kv_heads + g;
    size_t row = (size_t)head * (size_t)h->s.rows_per_head + (size_t)i;
    size_t row_bytes = kv_row_dim(&h->shape) * sizeof(bf16);
    size_t positions = (size_t)head * (size_t)(h->max_blocks * BLOCK_TOKENS);
    int32_t p = h->after.position[row];
    int32_t id = h->ids[seq * h->max_blocks + p / BLOCK_TOKENS];
    const char *want = (const char *)h->truth + (size_t)id * kv_block_bytes(&h->shape) +
                       (size_t)(g * BLOCK_TOKENS + p % BLOCK_TOKENS) * row_bytes;

    ck_assert_msg(memcmp((const char *)h->after.rows + row * row_bytes, want, row_bytes) == 0,
                  "step %u: row %d of sequence %d, head %d is not position %d", h->step, i, seq, g,
                  p);
    ck_assert_int_eq(h->after.row_of[positions + (size_t)p], i);
}

/* Rows that the step replaced, as rule 2 of hot_rows.h has them one after the other. */
static struct change check_replaced(const struct history *h, int seq, int g, int n_replaced)
{
    int head = h->set[seq] * h->s.kv_heads + g, n = h->s.rows_per_head, last = -1, hand;
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
                    h->step - used_before[row] >= (uint32_t)(n / h->s.keep_tokens);
        c.hits += hit;
        ck_assert_msg(hit ? !replaced : replaced == (idle && c.misses < n_replaced),
                      "step %u: sequence %d, head %d: row %d of %d was not the next", h->step, seq,
                      g, row, n);
        if (!replaced)
            continue;
        ck_assert_uint_eq(used[row], h->step);
        ck_assert_int_lt(h->table[seq * h->max_blocks + after[row] / BLOCK_TOKENS], 0);
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
    size_t first = (size_t)(h->set[seq] * h->s.kv_heads + g) * (size_t)n;

    for (int i = 0; i < n; i++) {
        if (h->after.position[first + (size_t)i] >= 0)
            check_row(h, seq, g, i);
        n_replaced += h->after.position[first + (size_t)i] != h->before.position[first + (size_t)i];
    }
    return check_replaced(h, seq, g, n_replaced);
}

/* Tokens that a sequence chooses; the last block is always kept. */
static int chosen_of(const struct history *h, int seq)
{
    int n = h->n_tokens[seq], blocks = blocks_of(n);
    int kept = blocks < h->s.keep_blocks ? blocks : h->s.keep_blocks;
    int candidates = kept * BLOCK_TOKENS - (blocks * BLOCK_TOKENS - n);

    return candidates < h->s.keep_tokens ? candidates : h->s.keep_tokens;
}

static void check_step(struct history *h, const char *name)
{
    size_t row = (size_t)(h->heads * kv_value_dim(&h->shape));
    uint64_t counts[HOT_COUNTS], want[HOT_COUNTS] = { 0 };

    for (int seq = 0; seq < h->s.seqs; seq++) {
        if (h->n_tokens[seq] == 0)
            continue;
        assert_same_bits(name, h->got + (size_t)seq * row, h->want + (size_t)seq * row, 1, row);
        for (int g = 0; h->set[seq] >= 0 && g < h->s.kv_heads; g++) {
            struct change c = check_set(h, seq, g);
            want[HOT_HITS] += (uint64_t)c.hits;
            want[HOT_MISSES] += (uint64_t)c.misses;
            want[HOT_RESIDENT] += (uint64_t)(chosen_of(h, seq) - c.hits - c.misses);
        }
    }
    gpu_get(counts, h->hot.counts, sizeof counts);
    for (int i = 0; i < HOT_COUNTS; i++) {
        ck_assert_msg(counts[i] - h->counts[i] == want[i], "%s: step %u: count %d grew by %llu, "
                      "not %llu", name, h->step, i, (unsigned long long)(counts[i] - h->counts[i]),
                      (unsigned long long)want[i]);
        h->counts[i] = counts[i];
    }
    gpu_get(&h->stall, h->hot.stall, sizeof h->stall);
    bool stalled = h->stall >> 32 == h->step && (uint32_t)h->stall > 0;
    ck_assert_msg(!stalled || want[HOT_MISSES] > 0, "%s: step %u waited for nothing", name,
                  h->step);
    h->n_stalls += stalled;      /* not every one: the clock is as coarse as a microsecond */
}

/* As in test_gpu_two_level.c: with next to no scale a list with one token that differs is far
 * off, and a few lists may be, whose border falls between two scores that are nearly equal. */
static void check_cpu(const struct history *h, const char *name)
{
    int width = h->s.group * kv_value_dim(&h->shape), n_off = 0, n_lists = 0;
    float *want = run_cpu(h), worst = 0;

    for (int list = 0; list < h->lists; list++) {
        float most = 0;
        if (h->n_tokens[list / h->s.kv_heads] == 0)
            continue;
        float *got = widened(h->got + (size_t)list * (size_t)width, (size_t)width);
        for (int i = 0; i < width; i++) {
            float off = fabsf(got[i] - want[list * width + i]);
            most = off <= most ? most : off;
        }
        mem_free(got);
        n_lists++;
        n_off += !(most <= 2.5e-2f);
        worst = most <= worst ? worst : most;
    }
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
           "%llu resident\n", name, h.heads, s->kv_heads, s->head_dim, s->seqs,
           s->rows_per_head, (unsigned long long)h.counts[HOT_HITS],
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
    return (struct setup){ .kv_heads = kv_heads, .group = group, .head_dim = head_dim,
                           .keep_blocks = 16, .keep_tokens = 256, .sinks = 4, .recent = 64,
                           .rows_per_head = 600, .seqs = 3, .away = 7, .n_tokens = 3000,
                           .steps = STEPS, .scale = 0.1f };
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
    s.seqs = seqs[_i];
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
        s.kind = _i;
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
    for (int kind = 0; kind < 2; kind++) {
        struct setup s = base_setup(2, 2, 128);
        s.kind = kind;
        s.keep_blocks = keep[_i][0];
        s.keep_tokens = keep[_i][1];
        s.rows_per_head = keep[_i][2];
        s.recent = s.keep_blocks < 4 ? 1 : 64;
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
    s.seqs = 1;
    s.n_tokens = 33333;
    s.keep_blocks = 64;
    s.keep_tokens = 1024;
    s.rows_per_head = _i ? HOT_MOST_ROWS : 4096;
    s.away = 9;
    s.kind = _i == 2 ? 1 : 0;
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
        s.kind = _i;
        s.seqs = 6;
        s.keep_blocks = 7;
        s.steps = 20;
        s.lagged = true;
        run_history(&s, "lagged", 110 + (uint64_t)_i);
    }
}
END_TEST

/* Latent rows: coarse and bounds, few sequences and many, exact and lagged, the first
 * configuration's budgets, budgets without a fused kernel. */
START_TEST(latent_rows)
{
    if (!gpu_backend())
        return;
    for (int kind = 0; kind < 2; kind++) {
        struct setup s = base_setup(_i == 1 ? 5 : 20, 1, LATENT_ROW);
        s.kind = kind;
        s.lagged = _i == 2;
        s.steps = s.lagged ? 12 : 4;
        s.seqs = _i == 3 ? 30 : _i == 4 ? 1 : 6;
        if (_i == 4) {
            s.n_tokens = 20000;
            s.keep_blocks = 64;
            s.keep_tokens = 1024;
            s.rows_per_head = 4096;
        }
        if (_i == 5) {
            s.keep_blocks = 200;
            s.keep_tokens = 2000;
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
    tcase_add_loop_test(c, kinds, 0, 4);
    tcase_add_loop_test(c, room, 0, 6);
    tcase_add_loop_test(c, long_context, 0, 3);
    tcase_add_loop_test(c, lagged, 0, 4);
    tcase_add_loop_test(c, latent_rows, 0, 6);
    return c;
}
