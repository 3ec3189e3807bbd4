/* Lagged blocks on the GPU, step after step, against the CPU back end over the same pool.  Before
 * each step the CPU gets the lists that the GPU has stored, so that a list that differs because two
 * scores are nearly equal does so once. */

#include "engine/base/mem.h"
#include "tests/support/gpu_compare.h"
#include "tests/support/gpu_decode.h"
#include "tests/support/gpu_fixture.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/token_store.h"

#include <check.h>
#include <stdio.h>
#include <string.h>

enum { STEPS = 70 };

static const float scale = 1e-6f;

struct setup {
    struct decode_setup decode;
    int n_tokens, steps;         /* of the longest at the start */
};

struct history {
    struct decode_fixture d;
    int step;
    int32_t slot[DECODE_MOST_SEQS];
    float *want, *got;           /* [seqs, heads * head_dim] */
    struct lagged_blocks cpu, gpu;       /* host, after the step */
    void *q_device;
    int32_t *n_tokens_device, *slot_device;
    struct attend_two_level_args args;   /* device */
    struct lagged_blocks lagged; /* device */
    int n_late, n_lists, n_off, n_other; /* lists that counted; of all, outputs and lists that
                                            differ from the CPU's */
};

/* ---- a history's start */

static void put_device(struct history *h)
{
    const struct decode_fixture *d = &h->d;
    size_t n = (size_t)d->lists * sizeof(int32_t);

    h->args = gpu_decode_args(d);
    h->args.out = gpu_put(NULL, d->n_q * sizeof(bf16));
    h->args.scale = scale;
    h->args.q = h->q_device = gpu_put(NULL, d->n_q * sizeof(bf16));
    h->args.n_tokens = h->n_tokens_device = gpu_put(NULL, sizeof d->n_tokens);
    h->lagged = (struct lagged_blocks){
        .kept = gpu_put(NULL, n * (size_t)d->s.keep_blocks), .n_kept = gpu_put(NULL, n),
        .n_tokens = gpu_put(NULL, n) };                          /* -1: empty */
    h->lagged.slot = h->slot_device = gpu_put(NULL, sizeof h->slot);
}

/* Padding and every fifth sequence have no slot. */
static void start_history(struct history *h, const struct setup *s, uint64_t seed)
{
    struct decode_fixture *d = &h->d;
    int seqs = s->decode.seqs;

    memset(h, 0, sizeof *h);
    gpu_decode_init(d, &s->decode, blocks_of(s->n_tokens + 2 * s->steps), seed);
    gpu_decode_start(d, s->n_tokens, 2 * s->steps);
    for (int i = 0; i < seqs; i++)
        h->slot[i] = d->n_tokens[i] == 0 || i % 5 == 4 ? -1 : seqs - 1 - i;
    h->want = mem_calloc(d->n_q, sizeof *h->want);
    h->got = mem_calloc(d->n_q, sizeof *h->got);
    h->cpu = decode_new_slots(d, seqs);
    h->gpu = decode_new_slots(d, seqs);
    h->cpu.slot = h->slot;
    put_device(h);
}

static void end_history(struct history *h)
{
    mem_free(h->want);
    mem_free(h->got);
    decode_free_slots(&h->cpu);
    decode_free_slots(&h->gpu);
    decode_fini(&h->d);
    gpu_clean();
}

/* ---- steps */

/* Each context grows by a token; one in ten by two, which its list does not survive. */
static void next_step(struct history *h)
{
    struct decode_fixture *d = &h->d;

    gpu_decode_queries(d, h->step == 0);
    for (int i = 0; i < d->s.seqs; i++)
        if (d->n_tokens[i] > 0 && h->step > 0)
            d->n_tokens[i] += random_below(&d->r, 10) ? 1 : 2;
    h->step++;
}

static void get_lists(const struct history *h, struct lagged_blocks *l)
{
    size_t n = (size_t)h->d.lists * sizeof(int32_t);

    gpu_get(l->kept, h->lagged.kept, n * (size_t)h->d.s.keep_blocks);
    gpu_get(l->n_kept, h->lagged.n_kept, n);
    gpu_get(l->n_tokens, h->lagged.n_tokens, n);
}

/* lagged or exact */
static void run_gpu(struct history *h, bool lags, float *out)
{
    struct attend_two_level_args a = h->args;

    gpu_refill_act(h->q_device, h->d.q, h->d.n_q);
    gpu_refill(h->n_tokens_device, h->d.n_tokens, sizeof h->d.n_tokens);
    gpu_refill(h->slot_device, h->slot, sizeof h->slot);
    a.max_n_tokens = decode_longest(&h->d);
    a.lagged = lags ? &h->lagged : NULL;
    gpu_ops()->attend_two_level(gpu_stream(), &a);
    gpu_get_act(out, a.out, h->d.n_q);
}

/* ---- what must hold */

/* As in test_gpu_two_level.c: with next to no scale a list with one token that differs moves the
 * output by about 1 / keep_tokens, far more than rounding. */
static void compare_outputs(struct history *h, float tolerance)
{
    int width = h->d.s.group * kv_value_dim(&h->d.shape);

    for (int list = 0; list < h->d.lists; list++) {
        if (h->d.n_tokens[list / h->d.s.kv_heads] == 0)
            continue;
        float off = largest_difference(h->got + list * width, h->want + list * width,
                                       (size_t)width);
        h->n_lists++;
        h->n_off += !(off <= tolerance);
    }
}

/* What the GPU stored is a list of a context of n tokens, whatever the scores were. */
static void check_list(const struct history *h, const int32_t *kept, int n_kept, int n)
{
    int blocks = blocks_of(n), keep = h->d.s.keep_blocks, forced = 0, has = 0;

    ck_assert_int_eq(n_kept, blocks < keep ? blocks : keep);
    for (int i = 0; i < keep; i++) {
        if (i >= n_kept)
            ck_assert_int_eq(kept[i], -1);
        else
            ck_assert(kept[i] < blocks && kept[i] > (i ? kept[i - 1] : -1));
        has += i < n_kept && always_kept(kept[i], n, h->d.s.sinks, h->d.s.recent);
    }
    for (int block = 0; block < blocks; block++)
        forced += always_kept(block, n, h->d.s.sinks, h->d.s.recent);
    ck_assert_int_eq(has, forced < keep ? forced : keep);
}

/* A slot that nobody has is as it was. */
static void check_lists(struct history *h)
{
    size_t row = (size_t)h->d.s.keep_blocks;

    for (int i = 0; i < h->d.lists; i++) {
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
    for (int seq = 0; seq < h->d.s.seqs; seq++)
        if (h->slot[seq] >= 0 && h->d.n_tokens[seq] > 0)
            h->n_late += h->cpu.n_tokens[h->slot[seq] * h->d.s.kv_heads] == h->d.n_tokens[seq] - 1;
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
        decode_on_cpu(&h.d, &h.cpu, scale, h.want);
        get_lists(&h, &h.gpu);
        compare_outputs(&h, tolerance);
        check_lists(&h);
    }
    printf("%s: heads %d on %d of %d, kind %d, %d sequences: %d lists, %d late sequences, %d "
           "outputs and %d lists are not the CPU's\n", name, h.d.heads, h.d.s.kv_heads,
           h.d.s.head_dim, h.d.s.kind, h.d.s.seqs, h.n_lists, h.n_late, h.n_off, h.n_other);
    ck_assert_int_gt(h.n_late, s->steps / 2);
    if (h.n_off > 1 + h.n_lists / 6 || h.n_other > 1 + h.n_lists / 6)
        ck_abort_msg("%s: of %d lists %d outputs and %d lists are not the CPU's", name, h.n_lists,
                     h.n_off, h.n_other);
    end_history(&h);
}

/* ---- tests */

static struct setup base_setup(int group, int kv_heads, int head_dim)
{
    return (struct setup){
        .decode = { .kv_heads = kv_heads, .group = group, .head_dim = head_dim, .keep_blocks = 6,
                    .keep_tokens = 256, .sinks = 4, .recent = 64, .seqs = 5 },
        .n_tokens = 1500, .steps = STEPS };
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
        s.decode.kind = test_kinds[_i];
        run_history(&s, "kinds", 6e-3f, 20 + (uint64_t)_i);
    }
}
END_TEST

/* Latent rows, with and without a fused kernel. */
START_TEST(latent_rows)
{
    if (!gpu_backend())
        return;
    for (int kind = 0; kind < TEST_ROTATED_KINDS; kind++) {
        struct setup s = base_setup(20, 1, LATENT_ROW);
        s.decode.kind = test_rotated_kinds[kind];
        s.steps = 30;
        s.decode.seqs = 9;
        s.n_tokens = _i ? 13000 : 1500;
        s.decode.keep_blocks = _i ? 200 : 6;
        s.decode.keep_tokens = _i ? 1024 : 256;
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
    for (int kind = 0; kind < TEST_ROTATED_KINDS; kind++) {
        struct setup s = base_setup(4, 2, 128);
        s.decode.kind = test_rotated_kinds[kind];
        s.decode.keep_blocks = rows[_i].blocks;
        s.decode.keep_tokens = rows[_i].tokens;
        s.decode.sinks = rows[_i].sinks;
        s.decode.recent = rows[_i].recent;
        s.decode.seqs = rows[_i].seqs;
        s.n_tokens = rows[_i].n_tokens;
        s.steps = rows[_i].steps;
        run_history(&s, "budgets", 6e-3f, 40 + (uint64_t)_i);
    }
}
END_TEST

static void assert_same(const struct history *h, const char *what)
{
    int row = h->d.heads * kv_value_dim(&h->d.shape);

    for (int seq = 0; seq < h->d.s.seqs; seq++)
        for (int i = seq * row; h->d.n_tokens[seq] > 0 && i < (seq + 1) * row; i++)
            ck_assert_msg(h->got[i] == h->want[i], "%s: step %d, sequence %d of %d tokens: %.9g, "
                          "not %.9g", what, h->step, seq, h->d.n_tokens[seq], (double)h->got[i],
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
        s.decode.kind = test_kinds[_i];
        s.decode.keep_blocks = what == ALL_BLOCKS ? 26 : 6;
        s.steps = what == FIRST_STEP ? 1 : STEPS;
        start_history(&h, &s, 60 + (uint64_t)_i);
        for (int i = 0; what == NO_SLOTS && i < s.decode.seqs; i++)
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
    tcase_add_loop_test(c, kinds, 0, TEST_KINDS);
    tcase_add_loop_test(c, latent_rows, 0, 2);
    tcase_add_loop_test(c, budgets, 0, 7);
    tcase_add_loop_test(c, what_is_exact, 0, TEST_KINDS);
    return c;
}
