#include "tests/support/offload_history.h"

#include "tests/support/random_data.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_SEQS = 16, MOST_CHUNK = 160, MOST_LAYERS = 64, MOST_HEADS = 8 };

/* One of the places where texts follow each other. */
struct place {
    struct test_seq seq;
    bool sparse, open;
    int n_prompt, ends;          /* tokens */
    int32_t *prompt;             /* [max_prompt] */
    int32_t next;                /* the token chosen last */
};

struct round {
    const struct offload_history *h;
    struct runner r;
    struct test_random steps, moves; /* what the steps are; what leaves and returns */
    struct place places[MOST_SEQS];
    int n_places;
    uint64_t rows;               /* chosen by sequences with a set, all layers and heads */
};

static bool decodes(const struct place *p)
{
    return p->seq.n_tokens >= p->n_prompt;
}

/* ---- texts */

static void begin_text(struct round *d, struct place *p)
{
    const struct offload_history *h = d->h;

    seq_init(&d->r, &p->seq, h->max_prompt + h->max_decodes);
    p->open = true;
    p->n_prompt = 1 + random_below(&d->steps, h->max_prompt);
    p->ends = p->n_prompt + h->min_decodes
              + random_below(&d->steps, h->max_decodes - h->min_decodes + 1);
    for (int i = 0; i < p->n_prompt; i++)
        p->prompt[i] = random_below(&d->steps, model_config(d->r.model)->vocab);
}

static void end_text(struct round *d, struct place *p)
{
    if (p->open)
        seq_fini(&d->r, &p->seq);
    p->open = false;
}

/* ---- leaving and returning */

/* Of the full blocks about so many in four. */
static void let_go(struct round *d, struct place *p, int quarters)
{
    for (int i = 0; i < seq_full_blocks(&p->seq); i++)
        if (random_below(&d->moves, 4) < quarters)
            seq_let_go(&d->r, &p->seq, i);
}

static void fetch(struct round *d, struct place *p, int quarters)
{
    for (int i = 0; i < seq_full_blocks(&p->seq); i++)
        if (random_below(&d->moves, 4) < quarters)
            seq_fetch(&d->r, &p->seq, i);
}

static void move_blocks(struct round *d, struct place *p)
{
    if (!p->sparse || !p->open || !decodes(p))
        return;
    if (p->seq.set < 0) {
        if (random_below(&d->moves, 4) == 0 && seq_acquire_set(&d->r, &p->seq))
            let_go(d, p, 1 + random_below(&d->moves, 4));
        return;
    }
    switch (random_below(&d->moves, 12)) {
    case 0:
        let_go(d, p, 4);
        break;
    case 1:
        let_go(d, p, 2);
        break;
    case 2:
        fetch(d, p, 2);
        break;
    case 3:
        fetch(d, p, 4);
        seq_release_set(&d->r, &p->seq);
        break;
    default:                     /* the longer nothing moves the more is found in the set */
        break;
    }
}

/* ---- steps */

/* What a place does in the step; its result is at `result` if there is one. */
static struct test_work work_of(struct round *d, struct place *p, struct sample_result *result)
{
    struct test_work w = { .seq = &p->seq, .ids = &p->next, .n = 1, .want = 1,
                           .sparse = p->sparse, .result = result };

    if (decodes(p))
        return w;
    int left = p->n_prompt - p->seq.n_tokens, chunk = 1 + random_below(&d->steps, MOST_CHUNK);
    w.ids = p->prompt + p->seq.n_tokens;
    w.n = left < chunk ? left : chunk;
    w.want = w.n == left;
    w.sparse = false;
    return w;
}

static void count_rows(struct round *d, const struct test_work *w)
{
    const struct model_config *g = model_config(d->r.model);
    int n = w->seq->n_tokens + 1, keep = d->h->select.keep_tokens;

    if (w->seq->set >= 0)
        d->rows += (uint64_t)(g->layers * g->kv_heads) * (uint64_t)(n < keep ? n : keep);
}

/* results[i] is of place i, zeros where it has none. */
static void run_step(struct round *d, struct sample_result *results)
{
    struct test_work works[MOST_SEQS];
    int n = 0;

    for (int i = 0; i < d->n_places; i++)
        if (!d->places[i].open)
            begin_text(d, &d->places[i]);
    for (int sparse = 1; sparse >= 0; sparse--)
        for (int i = 0; i < d->n_places; i++) {
            struct place *p = &d->places[i];
            if ((p->sparse && decodes(p)) != sparse)
                continue;
            works[n] = work_of(d, p, &results[i]);
            count_rows(d, &works[n++]);
        }
    runner_step(&d->r, works, n);
    for (int i = 0; i < d->n_places; i++) {
        struct place *p = &d->places[i];
        p->next = results[i].token;
        if (p->seq.n_tokens == p->ends)
            end_text(d, p);
    }
}

/* ---- a round */

static void open_round(struct round *d, const struct offload_history *h, bool offload)
{
    static int16_t channels[MOST_LAYERS * MOST_HEADS * INDEX_CHANNELS_KEPT];

    for (size_t i = 0; i < sizeof channels / sizeof channels[0]; i++)
        channels[i] = (int16_t)(i % INDEX_CHANNELS_KEPT);
    memset(d, 0, sizeof *d);
    d->h = h;
    d->n_places = h->sparse + h->dense;
    ck_assert_int_le(d->n_places, MOST_SEQS);
    runner_open(&d->r, &(struct runner_options){
        .dir = h->dir, .backend = h->backend, .isa = h->isa, .select = h->select,
        .channels = h->select.index == INDEX_CHANNELS ? channels : NULL,
        .max_rows = d->n_places * MOST_CHUNK, .max_seqs = d->n_places + 2,
        .max_tokens = h->max_prompt + h->max_decodes,
        .hot_sets = offload ? h->sets : 0, .rows_per_head = h->rows_per_head });
    d->steps = test_random(h->seed);
    d->moves = test_random(h->seed + 1000000);
    for (int i = 0; i < d->n_places; i++) {
        d->places[i].sparse = i < h->sparse;
        d->places[i].prompt = calloc((size_t)h->max_prompt, sizeof(int32_t));
    }
}

static void close_round(struct round *d)
{
    for (int i = 0; i < d->n_places; i++) {
        end_text(d, &d->places[i]);
        free(d->places[i].prompt);
    }
    kv_pool_check(d->r.pool);
    runner_close(&d->r);
}

static void check_counts(const struct round *d)
{
    struct hot_counts sum = { 0 };

    for (int layer = 0; layer < model_config(d->r.model)->layers; layer++) {
        struct hot_counts c = hot_sets_counts(d->r.hot, layer);
        sum.hits += c.hits;
        sum.misses += c.misses;
        sum.resident += c.resident;
    }
    ck_assert_uint_eq(sum.hits + sum.misses + sum.resident, d->rows);
}

static void check_all_happened(const struct round *d)
{
    for (int layer = 0; layer < model_config(d->r.model)->layers; layer++) {
        struct hot_counts c = hot_sets_counts(d->r.hot, layer);
        ck_assert_msg(c.hits > 0 && c.misses > 0 && c.resident > 0,
                      "layer %d: %llu hits, %llu misses, %llu on the device", layer,
                      (unsigned long long)c.hits, (unsigned long long)c.misses,
                      (unsigned long long)c.resident);
    }
}

static void compare(const struct round *d, int step, const struct sample_result *got,
                    const struct sample_result *want)
{
    for (int i = 0; i < d->n_places; i++)
        ck_assert_msg(results_identical(&got[i], &want[i]),
                      "%s, seed %llu, step %d: sequence %d with set %d chose %d with %.9g, not %d "
                      "with %.9g", d->h->dir, (unsigned long long)d->h->seed, step, i,
                      d->places[i].seq.set, got[i].token, (double)got[i].logprob, want[i].token,
                      (double)want[i].logprob);
}

void offload_history_run(const struct offload_history *h)
{
    struct round d;
    size_t seqs = (size_t)(h->sparse + h->dense);
    struct sample_result *want = calloc((size_t)h->steps * seqs, sizeof *want);
    struct sample_result *got = calloc(seqs, sizeof *got);

    open_round(&d, h, false);
    for (int step = 0; step < h->steps; step++)
        run_step(&d, want + (size_t)step * seqs);
    close_round(&d);
    open_round(&d, h, true);
    for (int step = 0; step < h->steps; step++) {
        for (int i = 0; i < d.n_places; i++)
            move_blocks(&d, &d.places[i]);
        if (random_below(&d.moves, 2) == 0)
            runner_reclaim(&d.r);
        memset(got, 0, seqs * sizeof *got);
        run_step(&d, got);
        compare(&d, step, got, want + (size_t)step * seqs);
        check_counts(&d);
    }
    check_all_happened(&d);
    close_round(&d);
    free(want);
    free(got);
}
