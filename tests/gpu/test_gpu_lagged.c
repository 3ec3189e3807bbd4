/* Lagged blocks on the GPU, step after step, against the CPU back end over the same pool.  Before
 * each step the CPU gets the lists that the GPU has stored, so that a list that differs because two
 * scores are nearly equal does so once. */

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

enum { MAX_SEQS = 24, STEPS = 70, MAX_KV_HEADS = 8 };

struct setup {
    int kv_heads, group, head_dim, kind;
    int keep_blocks, keep_tokens, sinks, recent;
    int seqs, n_tokens, steps;   /* of the longest at the start */
};

struct lists {                   /* as of struct lagged_blocks, on the host */
    int32_t *kept, *n_kept, *n_tokens;
};

struct history {
    struct setup s;
    struct kv_shape shape;
    struct test_random r;
    int heads, max_blocks, n_blocks, lists, step;
    size_t kv_bytes, index_bytes, n_q, table_ints;
    int16_t channels[MAX_KV_HEADS * INDEX_CHANNELS_KEPT];
    int32_t n_tokens[MAX_SEQS], slot[MAX_SEQS];
    int32_t *table;              /* [seqs, max_blocks] */
    bf16 *kv;
    uint8_t *index;
    float *q, *want, *got;       /* [seqs, heads * head_dim] */
    struct lists cpu, gpu;       /* after the step */
    void *q_device;
    int32_t *n_tokens_device, *slot_device;
    struct attend_two_level_args args;   /* device */
    struct lagged_blocks lagged; /* device */
    int n_late, n_lists, n_off, n_other; /* lists that counted; of all, outputs and lists that
                                            differ from the CPU's */
};

static int blocks_of(int n_tokens)
{
    return (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

static void *nothing(size_t bytes)
{
    return memset(mem_alloc(bytes), 0xff, bytes);
}

/* ---- a history's start */

static struct lists make_lists(const struct history *h)
{
    size_t n = (size_t)h->lists;

    return (struct lists){ .kept = nothing(n * (size_t)h->s.keep_blocks * sizeof(int32_t)),
                           .n_kept = nothing(n * sizeof(int32_t)),
                           .n_tokens = nothing(n * sizeof(int32_t)) };
}

static void free_lists(struct lists *l)
{
    mem_free(l->kept);
    mem_free(l->n_kept);
    mem_free(l->n_tokens);
}

/* As long as a sequence will be; each step sees a part. */
static void store_sequence(struct history *h, int seq, int n)
{
    struct backend *cpu = test_backend("auto");
    struct stream *stream = stream_create(cpu);

    store_random_tokens(cpu, stream, &(struct token_store){
        .kv = h->kv, .index = h->index, .table = h->table + seq * h->max_blocks,
        .channels = h->channels, .shape = h->shape, .heads = h->heads, .n = n }, &h->r);
    stream_destroy(stream);
}

/* Every seventh is padding, and every fifth has no slot. */
static void start_sequences(struct history *h)
{
    for (int i = 0; i < h->s.seqs; i++) {
        h->slot[i] = i % 7 == 5 || i % 5 == 4 ? -1 : h->s.seqs - 1 - i;
        h->n_tokens[i] = i % 7 == 5 ? 0 : i == 0 ? h->s.n_tokens
                                                 : 1 + random_below(&h->r, h->s.n_tokens);
        if (h->n_tokens[i] > 0)
            store_sequence(h, i, h->n_tokens[i] + 2 * h->s.steps);
    }
}

static void put_device(struct history *h)
{
    const struct setup *s = &h->s;
    size_t scratch = gpu_ops()->attend_two_level_scratch(&h->shape, s->seqs, h->heads,
                                                         h->max_blocks, s->keep_blocks,
                                                         s->keep_tokens);
    size_t n = (size_t)h->lists * sizeof(int32_t);

    h->args = (struct attend_two_level_args){
        .q_stride = h->heads * s->head_dim, .kv = gpu_put(h->kv, h->kv_bytes),
        .index = gpu_put(h->index, h->index_bytes),
        .kv_table = gpu_put(h->table, h->table_ints * sizeof *h->table),
        .channels = gpu_put(h->channels, sizeof h->channels), .scratch = gpu_put(NULL, scratch),
        .out = gpu_put(NULL, h->n_q * sizeof(bf16)),
        .shape = h->shape, .seqs = s->seqs, .heads = h->heads, .max_blocks = h->max_blocks,
        .keep_blocks = s->keep_blocks, .keep_tokens = s->keep_tokens, .sink_tokens = s->sinks,
        .recent_tokens = s->recent, .scale = 1e-6f };
    h->args.index_table = h->args.kv_table;
    h->args.q = h->q_device = gpu_put(NULL, h->n_q * sizeof(bf16));
    h->args.n_tokens = h->n_tokens_device = gpu_put(NULL, sizeof h->n_tokens);
    h->lagged = (struct lagged_blocks){
        .kept = gpu_put(NULL, n * (size_t)s->keep_blocks), .n_kept = gpu_put(NULL, n),
        .n_tokens = gpu_put(NULL, n) };                          /* -1: empty */
    h->lagged.slot = h->slot_device = gpu_put(NULL, sizeof h->slot);
}

static void start_history(struct history *h, const struct setup *s, uint64_t seed)
{
    memset(h, 0, sizeof *h);
    h->s = *s;
    h->r = test_random(seed);
    h->shape = test_kv_shape(s->kv_heads, s->head_dim, s->kind);
    h->heads = s->kv_heads * s->group;
    h->lists = s->seqs * s->kv_heads;
    h->max_blocks = blocks_of(s->n_tokens + 2 * s->steps);
    h->n_blocks = s->seqs * h->max_blocks;
    h->table_ints = (size_t)h->n_blocks;
    h->kv_bytes = (size_t)h->n_blocks * kv_block_bytes(&h->shape);
    h->index_bytes = (size_t)h->n_blocks * index_block_bytes(&h->shape);
    h->n_q = (size_t)(s->seqs * h->heads * s->head_dim);
    h->table = mem_alloc(h->table_ints * sizeof *h->table);
    random_order(&h->r, h->table, h->n_blocks);
    h->kv = nothing(h->kv_bytes);
    h->index = nothing(h->index_bytes);
    h->q = random_acts(&h->r, h->n_q, 1);
    h->want = mem_calloc(h->n_q, sizeof *h->want);
    h->got = mem_calloc(h->n_q, sizeof *h->got);
    h->cpu = make_lists(h);
    h->gpu = make_lists(h);
    if (!h->shape.latent_dim)
        random_channels(&h->r, h->channels, &h->shape);
    start_sequences(h);
    put_device(h);
}

static void end_history(struct history *h)
{
    void *all[] = { h->table, h->kv, h->index, h->q, h->want, h->got };

    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        mem_free(all[i]);
    free_lists(&h->cpu);
    free_lists(&h->gpu);
    gpu_clean();
}

/* ---- steps */

/* Each context grows by a token; one in ten by two, which its list does not survive. */
static void next_step(struct history *h)
{
    float *q = random_acts(&h->r, h->n_q, 1);

    for (size_t i = 0; i < h->n_q && h->step > 0; i++)
        h->q[i] = 0.8f * h->q[i] + 0.6f * q[i];
    round_to_bf16(h->q, h->n_q);
    mem_free(q);
    for (int i = 0; i < h->s.seqs; i++)
        if (h->n_tokens[i] > 0 && h->step > 0)
            h->n_tokens[i] += random_below(&h->r, 10) ? 1 : 2;
    h->step++;
}

static int longest(const struct history *h)
{
    int most = 0;

    for (int i = 0; i < h->s.seqs; i++)
        most = h->n_tokens[i] > most ? h->n_tokens[i] : most;
    return most;
}

static void get_lists(const struct history *h, struct lists *l)
{
    size_t n = (size_t)h->lists * sizeof(int32_t);

    gpu_get(l->kept, h->lagged.kept, n * (size_t)h->s.keep_blocks);
    gpu_get(l->n_kept, h->lagged.n_kept, n);
    gpu_get(l->n_tokens, h->lagged.n_tokens, n);
}

/* lagged or exact */
static void run_gpu(struct history *h, bool lags, float *out)
{
    struct attend_two_level_args a = h->args;

    gpu_refill_act(h->q_device, h->q, h->n_q);
    gpu_refill(h->n_tokens_device, h->n_tokens, sizeof h->n_tokens);
    gpu_refill(h->slot_device, h->slot, sizeof h->slot);
    a.max_n_tokens = longest(h);
    a.lagged = lags ? &h->lagged : NULL;
    gpu_ops()->attend_two_level(gpu_stream(), &a);
    gpu_get_act(out, a.out, h->n_q);
}

/* With the lists in h->cpu. */
static void run_cpu(struct history *h)
{
    const struct backend_ops *ops = backend_ops(test_backend("auto"));
    struct stream *stream = stream_create(test_backend("auto"));
    struct attend_two_level_args a = h->args;
    struct lagged_blocks lagged = { h->cpu.kept, h->cpu.n_kept, h->cpu.n_tokens, h->slot };
    void *scratch = mem_alloc(ops->attend_two_level_scratch(
        &h->shape, h->s.seqs, h->heads, h->max_blocks, h->s.keep_blocks, h->s.keep_tokens));

    a.out = h->want;
    a.q = h->q;
    a.kv = h->kv;
    a.index = h->index;
    a.kv_table = a.index_table = h->table;
    a.n_tokens = h->n_tokens;
    a.channels = h->channels;
    a.scratch = scratch;
    a.max_n_tokens = longest(h);
    a.lagged = &lagged;
    ops->attend_two_level(stream, &a);
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    mem_free(scratch);
}

/* ---- what must hold */

/* As in test_gpu_two_level.c: with next to no scale a list with one token that differs moves the
 * output by about 1 / keep_tokens, far more than rounding. */
static void compare_outputs(struct history *h, float tolerance)
{
    int width = h->s.group * kv_value_dim(&h->shape);

    for (int list = 0; list < h->lists; list++) {
        float most = 0;
        if (h->n_tokens[list / h->s.kv_heads] == 0)
            continue;
        for (int i = list * width; i < (list + 1) * width; i++) {
            float off = fabsf(h->got[i] - h->want[i]);
            if (!(off <= most))
                most = off;
        }
        h->n_lists++;
        h->n_off += !(most <= tolerance);
    }
}

/* What the GPU stored is a list of a context of n tokens, whatever the scores were. */
static void check_list(const struct history *h, const int32_t *kept, int n_kept, int n)
{
    int blocks = blocks_of(n), keep = h->s.keep_blocks, forced = 0, has = 0;

    ck_assert_int_eq(n_kept, blocks < keep ? blocks : keep);
    for (int i = 0; i < keep; i++) {
        if (i >= n_kept)
            ck_assert_int_eq(kept[i], -1);
        else
            ck_assert(kept[i] < blocks && kept[i] > (i ? kept[i - 1] : -1));
        has += i < n_kept && always_kept(kept[i], n, h->s.sinks, h->s.recent);
    }
    for (int block = 0; block < blocks; block++)
        forced += always_kept(block, n, h->s.sinks, h->s.recent);
    ck_assert_int_eq(has, forced < keep ? forced : keep);
}

/* A slot that nobody has is as it was. */
static void check_lists(struct history *h)
{
    size_t row = (size_t)h->s.keep_blocks;

    for (int i = 0; i < h->lists; i++) {
        const int32_t *gpu = h->gpu.kept + (size_t)i * row, *cpu = h->cpu.kept + (size_t)i * row;
        ck_assert_int_eq(h->gpu.n_tokens[i], h->cpu.n_tokens[i]);
        ck_assert_int_eq(h->gpu.n_kept[i], h->cpu.n_kept[i]);
        h->n_other += memcmp(gpu, cpu, row * sizeof *gpu) != 0;
        if (h->gpu.n_tokens[i] >= 0)
            check_list(h, gpu, h->gpu.n_kept[i], h->gpu.n_tokens[i]);
    }
}

static void count_late(struct history *h)
{
    for (int seq = 0; seq < h->s.seqs; seq++)
        if (h->slot[seq] >= 0 && h->n_tokens[seq] > 0)
            h->n_late += h->cpu.n_tokens[h->slot[seq] * h->s.kv_heads] == h->n_tokens[seq] - 1;
}

static void run_history(const struct setup *s, const char *name, float tolerance, uint64_t seed)
{
    struct history h;

    start_history(&h, s, seed);
    for (int i = 0; i < s->steps; i++) {
        next_step(&h);
        get_lists(&h, &h.cpu);
        count_late(&h);
        run_gpu(&h, true, h.got);
        run_cpu(&h);
        get_lists(&h, &h.gpu);
        compare_outputs(&h, tolerance);
        check_lists(&h);
    }
    printf("%s: heads %d on %d of %d, kind %d, %d sequences: %d lists, %d late sequences, %d "
           "outputs and %d lists are not the CPU's\n", name, h.heads, s->kv_heads, s->head_dim,
           s->kind, s->seqs, h.n_lists, h.n_late, h.n_off, h.n_other);
    ck_assert_int_gt(h.n_late, s->steps / 2);
    if (h.n_off > 1 + h.n_lists / 6 || h.n_other > 1 + h.n_lists / 6)
        ck_abort_msg("%s: of %d lists %d outputs and %d lists are not the CPU's", name, h.n_lists,
                     h.n_off, h.n_other);
    end_history(&h);
}

/* ---- tests */

static struct setup base_setup(int group, int kv_heads, int head_dim)
{
    return (struct setup){ .kv_heads = kv_heads, .group = group, .head_dim = head_dim,
                           .keep_blocks = 6, .keep_tokens = 256, .sinks = 4, .recent = 64,
                           .seqs = 5, .n_tokens = 1500, .steps = STEPS };
}

/* Every group of heads; of 16 there is no fused kernel. */
START_TEST(shapes)
{
    static const int groups[] = { 1, 2, 3, 4, 5, 7, 8, 16 };

    if (!gpu_backend())
        return;
    for (int dim = 64; dim <= 128; dim *= 2) {
        struct setup s = base_setup(groups[_i], 2, dim);
        run_history(&s, "shapes", 6e-3f, 1 + (uint64_t)_i);
    }
}
END_TEST

/* Every kind of filter and index. */
START_TEST(kinds)
{
    if (!gpu_backend())
        return;
    for (int dim = 64; dim <= 128; dim *= 2) {
        struct setup s = base_setup(4, 2, dim);
        s.kind = _i;
        run_history(&s, "kinds", 6e-3f, 20 + (uint64_t)_i);
    }
}
END_TEST

/* Latent rows, with and without a fused kernel. */
START_TEST(latent_rows)
{
    if (!gpu_backend())
        return;
    for (int kind = 0; kind < 2; kind++) {
        struct setup s = base_setup(20, 1, LATENT_ROW);
        s.kind = kind;
        s.steps = 30;
        s.seqs = 9;
        s.n_tokens = _i ? 13000 : 1500;
        s.keep_blocks = _i ? 200 : 6;
        s.keep_tokens = _i ? 1024 : 256;
        run_history(&s, "latent rows", 6e-3f, 80 + (uint64_t)_i);
    }
}
END_TEST

/* Forced blocks alone, and more of them than are kept; no sinks and one recent token; more blocks
 * than a thread block has threads, and than fit a bin of keys; a batch. */
START_TEST(budgets)
{
    static const struct { int blocks, tokens, sinks, recent, seqs, n_tokens, steps; } rows[] = {
        { 3, 192, 4, 64, 5, 1500, STEPS }, { 2, 128, 100, 300, 5, 1500, STEPS },
        { 5, 256, 0, 1, 5, 1500, STEPS }, { 7, 256, 130, 65, 5, 1500, STEPS },
        { 64, 1024, 4, 64, 1, 33333, 8 }, { 300, 1024, 4, 64, 1, 33333, 8 },
        { 6, 256, 4, 64, 24, 900, 20 },
    };

    if (!gpu_backend())
        return;
    for (int kind = 0; kind < 2; kind++) {
        struct setup s = base_setup(4, 2, 128);
        s.kind = kind;
        s.keep_blocks = rows[_i].blocks;
        s.keep_tokens = rows[_i].tokens;
        s.sinks = rows[_i].sinks;
        s.recent = rows[_i].recent;
        s.seqs = rows[_i].seqs;
        s.n_tokens = rows[_i].n_tokens;
        s.steps = rows[_i].steps;
        run_history(&s, "budgets", 6e-3f, 40 + (uint64_t)_i);
    }
}
END_TEST

static void assert_same(const struct history *h, const char *what)
{
    int row = h->heads * kv_value_dim(&h->shape);

    for (int seq = 0; seq < h->s.seqs; seq++)
        for (int i = seq * row; h->n_tokens[seq] > 0 && i < (seq + 1) * row; i++)
            ck_assert_msg(h->got[i] == h->want[i], "%s: step %d, sequence %d of %d tokens: %.9g, "
                          "not %.9g", what, h->step, seq, h->n_tokens[seq], (double)h->got[i],
                          (double)h->want[i]);
}

/* To the bit: every step while all blocks are kept; the first step; and every step of sequences
 * without a slot. */
START_TEST(what_is_exact)
{
    enum { ALL_BLOCKS, FIRST_STEP, NO_SLOTS };
    static const char *const names[] = { "all blocks", "first step", "no slots" };

    if (!gpu_backend())
        return;
    for (int what = ALL_BLOCKS; what <= NO_SLOTS; what++) {
        struct setup s = base_setup(4, 2, 128);
        struct history h;
        s.kind = _i;
        s.keep_blocks = what == ALL_BLOCKS ? 26 : 6;
        s.steps = what == FIRST_STEP ? 1 : STEPS;
        start_history(&h, &s, 60 + (uint64_t)_i);
        for (int i = 0; what == NO_SLOTS && i < s.seqs; i++)
            h.slot[i] = -1;
        for (int i = 0; i < s.steps; i++) {
            next_step(&h);
            run_gpu(&h, false, h.want);
            run_gpu(&h, true, h.got);
            assert_same(&h, names[what]);
        }
        end_history(&h);
    }
}
END_TEST

TCase *gpu_lagged_case(void)
{
    TCase *c = tcase_create("gpu_lagged");

    tcase_set_timeout(c, 240);
    tcase_add_checked_fixture(c, gpu_clean, NULL);
    tcase_add_loop_test(c, shapes, 0, 8);
    tcase_add_loop_test(c, kinds, 0, 4);
    tcase_add_loop_test(c, latent_rows, 0, 2);
    tcase_add_loop_test(c, budgets, 0, 7);
    tcase_add_loop_test(c, what_is_exact, 0, 4);
    return c;
}
