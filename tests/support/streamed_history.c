#include "tests/support/streamed_history.h"

#include "tests/support/random_data.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

enum { BESIDE = 300 };           /* tokens of the two other sequences when the prompt begins */

struct side {
    struct runner r;
    struct test_seq streamed, dense, sparse;
    struct sample_result *results;   /* three a step */
    int n_results;
};

static void open_side(struct side *s, const struct streamed_history *h, bool off_device)
{
    struct runner_options o = {
        .dir = h->dir, .backend = h->backend, .isa = h->isa, .select = select_default(),
        .max_rows = h->chunk > BESIDE ? h->chunk + 2 : BESIDE + 2, .max_seqs = 3,
        .max_tokens = h->prompt + h->decodes + BESIDE, .hot_sets = off_device,
    };
    int steps = h->prompt / h->chunk + 1 + h->decodes;

    o.select.keep_blocks = 3;
    o.select.keep_tokens = o.rows_per_head = 100;
    o.select.recent_tokens = 16;
    runner_open(&s->r, &o);
    s->results = calloc((size_t)(3 * steps), sizeof *s->results);
    seq_init(&s->r, &s->streamed, h->prompt + h->decodes);
    seq_init(&s->r, &s->dense, BESIDE + steps + 1);
    seq_init(&s->r, &s->sparse, BESIDE + steps + 1);
    if (off_device)
        ck_assert(seq_acquire_set(&s->r, &s->streamed));
}

static void close_side(struct side *s)
{
    seq_fini(&s->r, &s->streamed);
    seq_fini(&s->r, &s->dense);
    seq_fini(&s->r, &s->sparse);
    runner_close(&s->r);
    free(s->results);
}

/* A token of the two others, and n of the prompt. */
static void step(struct side *s, const int32_t *ids, int n)
{
    struct sample_result *to = s->results + s->n_results;
    int32_t token = 100 + s->n_results;
    struct test_work works[3] = {
        { .seq = &s->sparse, .ids = &token, .n = 1, .want = 1, .sparse = true, .result = to },
        { .seq = &s->dense, .ids = &token, .n = 1, .want = 1, .result = to + 1 },
        { .seq = &s->streamed, .ids = ids, .n = n, .want = 1, .result = to + 2 },
    };

    runner_step(&s->r, works, 3);
    s->n_results += 3;
}

/* All of the full blocks, or each with one chance in two. */
static void leave_device(struct side *s, struct test_random *rng)
{
    bool all = random_below(rng, 3) == 0;

    for (int i = 0; i < seq_full_blocks(&s->streamed); i++)
        if (all || random_below(rng, 2))
            seq_let_go(&s->r, &s->streamed, i);
        else
            seq_fetch(&s->r, &s->streamed, i);
    runner_reclaim(&s->r);
}

static void run_side(struct side *s, const struct streamed_history *h, const int32_t *ids,
                     bool off_device)
{
    struct test_random rng = test_random(h->seed);

    open_side(s, h, off_device);
    runner_feed(&s->r, &s->dense, ids, BESIDE, BESIDE);
    runner_feed(&s->r, &s->sparse, ids + 7, BESIDE, BESIDE);
    for (int at = 0, n; at < h->prompt + h->decodes; at += n) {
        n = at >= h->prompt ? 1 : h->prompt - at < h->chunk ? h->prompt - at : h->chunk;
        if (off_device)
            leave_device(s, &rng);
        step(s, ids + at, n);
    }
}

void streamed_history_run(const struct streamed_history *h)
{
    int n = h->prompt + h->decodes + BESIDE + 7;
    int32_t *ids = malloc((size_t)n * sizeof *ids);
    struct side on = { 0 }, off = { 0 };

    test_prompt(ids, n);
    run_side(&on, h, ids, false);
    run_side(&off, h, ids, true);
    ck_assert_int_eq(on.n_results, off.n_results);
    for (int i = 0; i < on.n_results; i++)
        ck_assert_msg(results_identical(&on.results[i], &off.results[i]),
                      "%s, chunks of %d: result %d of step %d differs", h->dir, h->chunk, i % 3,
                      i / 3);
    close_side(&on);
    close_side(&off);
    free(ids);
}
