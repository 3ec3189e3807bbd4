/* engine/run/scheduler.h and sequence.h together on a real pool, without a
 * model: tables for single rules, and long histories in which requests arrive,
 * are cancelled, preempted and finished. */

#include "engine/base/mem.h"
#include "engine/run/scheduler.h"
#include "kernels/backend.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RUNNING = 6, MAX_TOKENS = 700, VOCAB = 50 };

static struct backend *be;
static struct kv_pool *pool;
static struct scheduler *sc;
static struct select_plan select_plan;
static uint64_t next_order;
static uint32_t n_dropped;

static void setup(void)
{
    struct backend_options one_thread = { .threads = 1 };
    struct select_config cfg = select_default();
    const struct kv_pool_config pool_cfg = {
        .blocks = 30, .layers = 1, .prefix_cache = true,
        .shape = { .kv_heads = 1, .head_dim = 16, .filter = FILTER_COARSE,
                   .index = INDEX_ROTATED },
    };

    cfg.crossover_tokens = 300;
    ck_assert_int_eq(backend_open(&be, "cpu", &one_thread, NULL), ST_OK);
    ck_assert_int_eq(kv_pool_create(&pool, be, &pool_cfg, NULL), ST_OK);
    ck_assert_int_eq(select_plan_init(&select_plan, &cfg, &pool_cfg.shape, 1, NULL, NULL), ST_OK);
    sc = scheduler_create(MAX_RUNNING);
    next_order = n_dropped = 0;
}

static void teardown(void)
{
    scheduler_destroy(sc);
    kv_pool_check(pool);
    kv_pool_destroy(pool);
    backend_close(be);
}

/* A request whose prompt is one of a few texts, so that prefixes are shared. */
static struct request *new_request(int text, uint32_t n_prompt, uint32_t max_tokens)
{
    struct request *r = mem_calloc(1, sizeof *r);
    int32_t *prompt = mem_calloc(n_prompt, sizeof *prompt);

    for (uint32_t i = 0; i < n_prompt; i++)
        prompt[i] = (int32_t)((i * 7 + (uint32_t)text * 13) % VOCAB);
    r->prompt = prompt;
    r->n_prompt = n_prompt;
    r->max_tokens = max_tokens;
    r->repetition = 1;
    r->n_top = -1;
    r->sparse = text % 2;
    r->id = next_order;
    r->output = mem_calloc(max_tokens + 1, sizeof *r->output);
    return r;
}

static struct sequence *add(struct request *r)
{
    struct sequence *q = sequence_create(r, NULL, &select_plan, next_order++, VOCAB, NULL, 0);

    scheduler_add(sc, q);
    return q;
}

static struct sequence *add_new(int text, uint32_t n_prompt, uint32_t max_tokens)
{
    return add(new_request(text, n_prompt, max_tokens));
}

static void end(struct sequence *q)
{
    struct request *r = q->req;

    scheduler_remove(sc, q);
    sequence_drop_blocks(q, pool);
    sequence_destroy(q);
    mem_free((void *)r->prompt);
    mem_free(r->prompt_chosen);
    mem_free(r->output);
    mem_free(r);
}

static void drop(struct step_budget *b, struct sequence *q)
{
    n_dropped++;
    sequence_drop_blocks(q, pool);
    b->blocks = kv_pool_available(pool);
}

static struct step_plan *plan_step(uint32_t tokens)
{
    struct step_budget budget = { .tokens = tokens, .logit_rows = MAX_RUNNING + 64,
                                  .blocks = kv_pool_available(pool), .drop = drop };
    struct step_plan *plan = scheduler_plan(sc, &budget);
    struct sequence *q;

    while ((q = scheduler_next(sc, plan)) != NULL) {
        sequence_attach(q, pool, &select_plan);
        plan->left.blocks = kv_pool_available(pool);
        if (!scheduler_admit(sc, plan, q)) {
            sequence_drop_blocks(q, pool);
            break;
        }
        q->was_admitted = true;
    }
    return plan;
}

/* Do what the model would: grow, compute, append a token that depends on the
 * request and its index alone.  Returns rows computed. */
static uint32_t run_step(struct step_plan *plan)
{
    uint32_t rows = 0;

    for (uint32_t i = 0; i < plan->n_slices; i++) {
        struct step_slice *s = &plan->slices[i];
        sequence_grow(s->seq, pool, s->seq->n_computed + s->n_tokens);
    }
    for (uint32_t i = 0; i < plan->n_slices; i++) {
        struct sequence *q = plan->slices[i].seq;
        uint32_t n = plan->slices[i].n_tokens;
        bool samples = q->n_computed + n == q->n_tokens;
        rows += n;
        sequence_advance(q, pool, &select_plan, n);
        if (!samples)
            continue;
        uint32_t index = q->n_tokens - q->n_prompt;
        struct sample_result r = { .token = (int32_t)((q->req->id + index) % VOCAB) };
        sequence_append(q, &r);
        if (index + 1 == q->req->max_tokens)
            end(q);
    }
    return rows;
}

START_TEST(decodes_come_first_and_prefill_takes_the_rest)
{
    struct sequence *a = add_new(0, 10, 5), *b = add_new(2, 500, 5);

    struct step_plan *p = plan_step(100);
    ck_assert_uint_eq(p->n_slices, 2);
    ck_assert_ptr_eq(p->slices[0].seq, a);
    ck_assert_uint_eq(p->slices[0].n_tokens, 10);
    ck_assert_uint_eq(p->slices[1].n_tokens, 64);   /* 90, cut at a block */
    run_step(p);
    p = plan_step(100);
    ck_assert_ptr_eq(p->slices[0].seq, a);
    ck_assert_uint_eq(p->slices[0].n_tokens, 1);
    ck_assert_ptr_eq(p->slices[1].seq, b);
    end(a);
    end(b);
}
END_TEST

START_TEST(the_next_is_not_passed_over_for_a_smaller_one)
{
    struct sequence *a = add_new(0, 1000, 5), *b = add_new(2, 1000, 5), *c = add_new(4, 10, 5);

    run_step(plan_step(2000));                      /* 30 blocks: only a fits */
    ck_assert_int_eq(a->state, SEQ_RUNNING);
    ck_assert_int_eq(b->state, SEQ_WAITING);
    ck_assert_int_eq(c->state, SEQ_WAITING);
    end(a);
    end(b);
    end(c);
}
END_TEST

START_TEST(the_youngest_makes_room)
{
    struct sequence *a = add_new(0, 940, 900), *b = add_new(2, 890, 60);

    run_step(plan_step(2000));                      /* 15 and 14 blocks, one is left */
    ck_assert_uint_eq(scheduler_running(sc), 2);
    for (int i = 0; i < 150; i++)
        run_step(plan_step(2000));
    ck_assert_uint_ge(n_dropped, 1);
    ck_assert_int_eq(a->state, SEQ_RUNNING);
    ck_assert_uint_ge(a->n_tokens, 940 + 150);
    end(a);
    if (b->state == SEQ_WAITING || scheduler_running(sc))
        end(b);
}
END_TEST

START_TEST(a_group_prefills_once)
{
    struct request *first = new_request(0, 640, 5), *second = new_request(0, 640, 5);

    first->group = second->group = 9;
    struct sequence *a = add(first), *b = add(second), *c = add_new(2, 20, 30);
    run_step(plan_step(300));
    ck_assert_int_eq(b->state, SEQ_WAITING);        /* a is in prefill */
    ck_assert_int_eq(c->state, SEQ_RUNNING);        /* and does not hold c up */
    run_step(plan_step(300));
    run_step(plan_step(300));
    struct step_plan *p = plan_step(300);
    ck_assert_int_eq(b->state, SEQ_RUNNING);
    ck_assert_uint_eq(b->n_computed, 9 * 64);       /* one known token is left */
    run_step(p);
    end(a);
    end(b);
    end(c);
}
END_TEST

START_TEST(scoring_slices_fit_the_logit_rows)
{
    struct request *r = new_request(0, 400, 1);

    r->score_prompt = true;
    r->n_top = 0;
    r->prompt_chosen = mem_calloc(400, sizeof *r->prompt_chosen);
    mem_free(r->chosen);
    r->chosen = mem_calloc(1, sizeof *r->chosen);
    struct token_logprob *chosen = r->chosen;
    add(r);
    for (int steps = 0; scheduler_running(sc) + scheduler_waiting(sc) > 0; steps++) {
        struct step_plan *p = plan_step(500);
        ck_assert_uint_eq(p->n_slices, 1);
        ck_assert_uint_le(p->slices[0].n_tokens, MAX_RUNNING + 64);
        ck_assert_int_lt(steps, 10);
        run_step(p);
    }
    mem_free(chosen);
}
END_TEST

/* Whatever happens: the budget is kept, the plan has work while there is any,
 * the oldest running sequence is always in it, everyone finishes. */
START_TEST(random_histories_keep_the_promises)
{
    int arrivals = 0, cancelled = 0;

    srandom((unsigned)_i + 1);
    for (int step = 0; step < 6000; step++) {
        if (random() % 6 == 0 && scheduler_waiting(sc) < 12) {
            struct request *r = new_request((int)(random() % 5), 1 + (uint32_t)(random() % 900),
                                            1 + (uint32_t)(random() % MAX_TOKENS));
            r->group = (uint64_t)(random() % 3);
            add(r);
            arrivals++;
        }
        uint32_t present = scheduler_running(sc) + scheduler_waiting(sc);
        if (present && random() % 40 == 0) {
            end(scheduler_at(sc, (uint32_t)random() % present));
            cancelled++;
            present--;
        }
        if (!present)
            continue;
        uint32_t budget = MAX_RUNNING + 64 + (uint32_t)(random() % 200);
        struct step_plan *p = plan_step(budget);
        ck_assert_msg(p->n_slices > 0, "seed %d, step %d: nothing to do", _i, step);
        ck_assert_uint_le(p->n_slices, MAX_RUNNING);
        struct sequence *oldest = scheduler_at(sc, 0);
        bool planned = false;
        for (uint32_t i = 0; i < p->n_slices; i++)
            planned = planned || p->slices[i].seq == oldest;
        ck_assert_msg(planned, "seed %d, step %d: the oldest waits", _i, step);
        scheduler_check(sc);
        ck_assert_uint_le(run_step(p), budget);
        scheduler_check(sc);
        kv_pool_check(pool);
    }
    ck_assert_int_gt(arrivals, 30);
    ck_assert_int_gt(cancelled, 20);
    ck_assert_uint_gt(n_dropped, 10);
    for (int steps = 0; scheduler_running(sc) + scheduler_waiting(sc) > 0; steps++) {
        ck_assert_int_lt(steps, 100000);
        run_step(plan_step(200));
    }
}
END_TEST

TCase *scheduler_case(void)
{
    TCase *tc = tcase_create("scheduler");

    tcase_set_timeout(tc, 120);
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, decodes_come_first_and_prefill_takes_the_rest);
    tcase_add_test(tc, the_next_is_not_passed_over_for_a_smaller_one);
    tcase_add_test(tc, the_youngest_makes_room);
    tcase_add_test(tc, a_group_prefills_once);
    tcase_add_test(tc, scoring_slices_fit_the_logit_rows);
    tcase_add_loop_test(tc, random_histories_keep_the_promises, 0, 16);
    return tc;
}
