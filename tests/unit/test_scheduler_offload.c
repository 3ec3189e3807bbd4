/* What scheduler.h says of sequences whose K and V are not all on the device, rule by rule.  The
 * sequences are only numbers here, and so is the pool. */

#include "engine/run/scheduler.h"

#include <check.h>
#include <stdint.h>

enum { MAX_RUNNING = 8, TOKENS = 2000 };

static struct scheduler *sc;
static struct request requests[MAX_RUNNING];
static struct sequence seqs[MAX_RUNNING];
static int n_seqs, n_asked;
static const struct sequence *offloaded[MAX_RUNNING], *dropped[MAX_RUNNING], *refuses;
static int n_offloaded, n_dropped;
static uint32_t pool_blocks;         /* that the pool can give */
static uint32_t clearing;            /* and when copies have ended */
static bool stores_last;             /* what is dropped is being copied */

static void setup(void)
{
    sc = scheduler_create(MAX_RUNNING);
    n_seqs = n_offloaded = n_dropped = n_asked = 0;
    refuses = NULL;
    pool_blocks = 10000;
    clearing = 0;
    stores_last = false;
}

static void teardown(void)
{
    struct sequence *q;

    scheduler_check(sc);
    while ((q = scheduler_at(sc, 0)) != NULL)
        scheduler_remove(sc, q);
    scheduler_destroy(sc);
}

static bool offload(struct step_budget *b, struct sequence *q)
{
    n_asked++;
    ck_assert(q->residency == ON_DEVICE || q->residency == RETURNING);
    if (q == refuses)
        return false;
    offloaded[n_offloaded++] = q;
    b->blocks = pool_blocks += q->n_held - 1;
    q->n_held = 1;
    q->residency = OFFLOADED;
    return true;
}

static void drop(struct step_budget *b, struct sequence *q)
{
    dropped[n_dropped++] = q;
    *(stores_last ? &clearing : &pool_blocks) += q->n_held;
    q->n_blocks = q->n_held = q->n_computed = 0;
    b->blocks = pool_blocks;
    b->clearing = clearing;
}

static struct step_plan *plan(void)
{
    struct step_budget budget = { .tokens = TOKENS, .logit_rows = TOKENS, .blocks = pool_blocks,
                                  .clearing = clearing, .drop = drop, .offload = offload };

    return scheduler_plan(sc, &budget);
}

/* One that waits: n tokens are known of which so many are computed and in blocks, all held. */
static struct sequence *waiting(uint32_t n_tokens, uint32_t n_computed, bool sparse)
{
    struct sequence *q = &seqs[n_seqs];

    requests[n_seqs] = (struct request){ .max_tokens = 100000 };
    *q = (struct sequence){
        .req = &requests[n_seqs], .order = (uint64_t)n_seqs, .n_prompt = n_tokens - 1,
        .n_tokens = n_tokens, .n_computed = n_computed, .hot_set = -1,
        .sparse_from = sparse ? n_tokens - 1 : UINT32_MAX,
    };
    n_seqs++;
    scheduler_add(sc, q);
    q->n_blocks = q->n_held = (n_computed + 63) / 64;
    return q;
}

/* One that runs and decodes: its next token needs a block of its own where n_tokens % 64 is 1. */
static struct sequence *decoding(uint32_t n_tokens, bool sparse)
{
    uint32_t had = pool_blocks;

    pool_blocks = 10000;
    struct sequence *q = waiting(n_tokens, n_tokens - 1, sparse);
    struct step_plan *p = plan();
    ck_assert_ptr_eq(scheduler_next(sc, p), q);
    ck_assert(scheduler_admit(sc, p, q));
    pool_blocks = had;
    return q;
}

static uint32_t slice_of(const struct step_plan *p, const struct sequence *q)
{
    for (uint32_t i = 0; i < p->n_slices; i++)
        if (p->slices[i].seq == q)
            return p->slices[i].n_tokens;
    return 0;
}

/* ---- running ones are short of blocks */

START_TEST(the_longest_sparse_one_leaves_before_anyone_is_preempted)
{
    struct sequence *a = decoding(640, true), *b = decoding(1280, true);
    struct sequence *c = decoding(1900, false), *d = decoding(65, false);

    pool_blocks = 0;
    struct step_plan *p = plan();                   /* d lacks one */
    ck_assert_int_eq(n_offloaded, 1);
    ck_assert_ptr_eq(offloaded[0], b);              /* c is longer, and dense */
    ck_assert_int_eq(n_dropped, 0);
    ck_assert_uint_eq(p->n_slices, 4);
    ck_assert_uint_eq(slice_of(p, b), 1);           /* it goes on */
    ck_assert_int_eq(a->residency, ON_DEVICE);
    ck_assert_int_eq(c->residency, ON_DEVICE);
    ck_assert_uint_eq(slice_of(p, d), 1);
}
END_TEST

START_TEST(one_after_the_other_leaves_until_there_is_room)
{
    struct sequence *a = decoding(129, true), *b = decoding(193, true), *c = decoding(200, false);
    struct sequence *d = waiting(300, 0, false);

    pool_blocks = 20;
    struct step_plan *p = plan();
    ck_assert(scheduler_admit(sc, p, d));
    pool_blocks = 0;                                /* a and b need one each, d's prompt five */
    p = plan();
    ck_assert_int_eq(n_offloaded, 2);
    ck_assert_ptr_eq(offloaded[0], b);              /* 3 blocks, then 2 */
    ck_assert_ptr_eq(offloaded[1], a);
    ck_assert_int_eq(n_dropped, 1);                 /* 3 came, 2 are gone: d cannot be served */
    ck_assert_ptr_eq(dropped[0], d);
    ck_assert_uint_eq(p->n_slices, 3);
    ck_assert_uint_eq(slice_of(p, c), 1);
    ck_assert_ptr_null(scheduler_next(sc, p));      /* nobody is let in after a preemption */
}
END_TEST

START_TEST(who_is_refused_is_asked_once_and_the_next_goes)
{
    struct sequence *a = decoding(640, true), *b = decoding(640, true);
    struct sequence *c = decoding(640, true);

    decoding(65, false);
    refuses = c;                                    /* of equals the youngest is asked first */
    pool_blocks = 0;
    plan();
    ck_assert_int_eq(n_asked, 2);
    ck_assert_int_eq(n_offloaded, 1);
    ck_assert_ptr_eq(offloaded[0], b);
    ck_assert_int_eq(a->residency, ON_DEVICE);
    ck_assert_int_eq(n_dropped, 0);
}
END_TEST

START_TEST(who_returns_may_have_to_leave_again)
{
    struct sequence *a = decoding(640, true), *b = decoding(65, false);

    a->residency = RETURNING;
    a->hot_set = 0;
    pool_blocks = 0;
    struct step_plan *p = plan();
    ck_assert_ptr_eq(offloaded[0], a);
    ck_assert_uint_eq(slice_of(p, b), 1);
}
END_TEST

START_TEST(without_anyone_to_offload_the_youngest_is_preempted)
{
    struct sequence *a = decoding(65, false), *b = decoding(640, false);
    struct sequence *c = decoding(640, true), *d = decoding(640, true);

    c->residency = OFFLOADED;                       /* gone already */
    c->n_held = 0;
    d->residency = LOADING;                         /* not there yet */
    pool_blocks = 0;
    struct step_plan *p = plan();
    ck_assert_int_eq(n_asked, 0);
    ck_assert_int_eq(n_dropped, 1);
    ck_assert_ptr_eq(dropped[0], d);
    ck_assert_int_eq(d->state, SEQ_WAITING);
    ck_assert_uint_eq(slice_of(p, a) + slice_of(p, b) + slice_of(p, c), 3);
}
END_TEST

/* The pool holds the longest context: what lacks is being copied. */
START_TEST(the_last_one_waits_and_is_not_preempted)
{
    struct sequence *a = decoding(65, false), *b = decoding(640, false);

    pool_blocks = 0;
    b->n_held = 0;                                  /* dropped, its blocks are not free yet */
    struct step_plan *p = plan();
    ck_assert_int_eq(n_dropped, 1);
    ck_assert_ptr_eq(dropped[0], b);
    ck_assert_uint_eq(p->n_slices, 0);
    ck_assert_int_eq(a->state, SEQ_RUNNING);
    pool_blocks = 1;
    p = plan();
    ck_assert_uint_eq(slice_of(p, a), 1);
}
END_TEST

/* What comes free is being copied still: one preemption is enough, and who lacks blocks waits. */
START_TEST(what_is_being_copied_counts_before_anyone_is_preempted)
{
    struct sequence *a = decoding(65, false), *b = decoding(100, false);
    struct sequence *c = decoding(640, false), *d = decoding(640, false);

    stores_last = true;
    pool_blocks = 0;
    struct step_plan *p = plan();                   /* a lacks one */
    ck_assert_int_eq(n_dropped, 1);
    ck_assert_ptr_eq(dropped[0], d);
    ck_assert_uint_eq(slice_of(p, a), 0);
    ck_assert_uint_eq(slice_of(p, b) + slice_of(p, c), 2);
    p = plan();                                     /* the copies take their time */
    ck_assert_int_eq(n_dropped, 1);
    ck_assert_uint_eq(slice_of(p, a), 0);
    ck_assert_ptr_null(scheduler_next(sc, p));      /* d does not come back meanwhile */
    pool_blocks = 1;
    clearing -= 1;
    ck_assert_uint_eq(slice_of(plan(), a), 1);
    ck_assert_int_eq(n_dropped, 1);
}
END_TEST

/* Nobody takes what they wait for, and what is too little is not waited for. */
START_TEST(who_waits_for_copies_is_not_passed)
{
    struct sequence *a = waiting(200, 0, false), *b = waiting(500, 0, false);

    pool_blocks = 20;
    struct step_plan *p = plan();
    ck_assert(scheduler_admit(sc, p, a));
    ck_assert(scheduler_admit(sc, p, b));
    pool_blocks = 3;
    clearing = 1;
    p = plan();                                     /* a lacks four, b eight */
    ck_assert_int_eq(n_dropped, 0);
    ck_assert_uint_eq(p->n_slices, 0);
    clearing = 0;
    stores_last = true;
    plan();
    ck_assert_int_eq(n_dropped, 1);
    ck_assert_ptr_eq(dropped[0], b);
}
END_TEST

/* ---- admission */

START_TEST(admission_offloads_and_preempts_nobody)
{
    struct sequence *a = decoding(640, true), *w = waiting(400, 0, false);

    pool_blocks = 3;                                /* w wants 7, a one more before long */
    struct step_plan *p = plan();
    p->left.offload = NULL;                         /* no tier */
    ck_assert_ptr_eq(scheduler_next(sc, p), w);
    ck_assert(!scheduler_admit(sc, p, w));
    ck_assert_int_eq(w->state, SEQ_WAITING);

    p = plan();
    ck_assert(scheduler_admit(sc, p, w));
    ck_assert_int_eq(n_offloaded, 1);
    ck_assert_ptr_eq(offloaded[0], a);
    ck_assert_uint_eq(slice_of(p, w), 400);

    struct sequence *v = waiting(4000, 0, false);
    p = plan();
    ck_assert(!scheduler_admit(sc, p, v));          /* no room, and nobody is left to leave */
    ck_assert_int_eq(n_dropped, 0);
}
END_TEST

/* Blocks to load, more blocks to compute; how many the pool must have. */
static const struct {
    enum residency residency;
    uint32_t n_tokens, n_blocks, n_held, needs;
} loads[] = {
    { LOADING, 641, 10, 0, 11 },
    { LOADING, 641, 10, 9, 2 },
    { LOADING, 700, 10, 4, 7 },
    { LOADING, 1000, 10, 10, 6 },
    { LOADING_INDEX, 641, 10, 0, 1 },
    { ON_DEVICE, 641, 10, 10, 1 },
};
enum { N_LOADS = sizeof loads / sizeof loads[0] };

START_TEST(what_is_loaded_needs_room_and_gets_no_slice)
{
    bool ready = loads[_i].residency == ON_DEVICE;

    decoding(100, false);
    struct sequence *q = waiting(loads[_i].n_tokens, 640, true);
    q->n_blocks = loads[_i].n_blocks;
    q->n_held = loads[_i].n_held;
    q->residency = loads[_i].residency;
    pool_blocks = loads[_i].needs - 1;
    struct step_plan *p = plan();
    ck_assert(!scheduler_admit(sc, p, q));
    pool_blocks++;
    p = plan();
    ck_assert(scheduler_admit(sc, p, q));
    ck_assert_int_eq(q->state, SEQ_RUNNING);
    ck_assert_int_eq(slice_of(p, q) > 0, ready);
    p = plan();
    ck_assert_int_eq(slice_of(p, q) > 0, ready);
    q->residency = ON_DEVICE;                       /* arrived */
    pool_blocks += 20;
    ck_assert_uint_gt(slice_of(plan(), q), 0);
}
END_TEST

/* Nobody else could make room for what is in the way of one that is too long. */
START_TEST(who_is_too_long_and_alone_is_admitted_and_waits)
{
    struct sequence *a = waiting(1000, 640, false);

    a->too_long = true;
    a->residency = STREAMED;
    pool_blocks = 5;                                /* it lacks six */
    struct step_plan *p = plan();
    ck_assert(scheduler_admit(sc, p, a));
    ck_assert_uint_eq(p->n_slices, 0);
    pool_blocks = 6;                                /* some of its own have left */
    ck_assert_uint_eq(slice_of(plan(), a), 360);
    ck_assert_int_eq(n_dropped, 0);
}
END_TEST

/* It is not lost on those behind it. */
START_TEST(who_waits_for_blocks_holds_nobody_up)
{
    struct sequence *a = decoding(640, true), *b = decoding(100, false);
    struct sequence *w = waiting(50, 0, false);

    a->residency = LOADING;
    struct step_plan *p = plan();
    ck_assert_uint_eq(slice_of(p, a), 0);
    ck_assert_uint_eq(slice_of(p, b), 1);
    ck_assert(scheduler_admit(sc, p, w));
    ck_assert_uint_eq(slice_of(p, w), 50);
}
END_TEST

/* ---- room to come back, and making room for loads */

START_TEST(spare_is_what_nobody_will_want_before_long)
{
    static const struct { uint32_t n_tokens, blocks, spare; } rows[] = {
        { 100, 5, 5 },                              /* a row within its block: nothing */
        { 64, 5, 4 },                               /* its next but one */
        { 65, 5, 4 },                               /* the slice takes it */
        { 128, 0, 0 },
    };

    for (int i = 0; i < (int)(sizeof rows / sizeof rows[0]); i++) {
        struct sequence *q = decoding(rows[i].n_tokens, true);
        pool_blocks = rows[i].blocks;
        struct step_plan *p = plan();
        ck_assert_uint_eq(slice_of(p, q), 1);
        ck_assert_uint_eq(scheduler_spare_blocks(sc, p), rows[i].spare);
        scheduler_remove(sc, q);
    }
    decoding(64, true);
    struct sequence *b = waiting(1000, 0, false);   /* 16 blocks in prefill, 1,000 tokens known */
    pool_blocks = 30;
    struct step_plan *p = plan();
    ck_assert(scheduler_admit(sc, p, b));
    ck_assert_uint_eq(scheduler_spare_blocks(sc, p), 30 - 16 - 1);
}
END_TEST

START_TEST(put_back_takes_the_youngest)
{
    struct sequence *a = decoding(640, true), *b = decoding(320, true), *w = waiting(10, 0, false);

    a->residency = b->residency = LOADING;
    struct step_plan *p = plan();
    ck_assert_uint_eq(p->n_slices, 0);
    scheduler_put_back(sc, p);
    ck_assert_int_eq(n_dropped, 1);
    ck_assert_ptr_eq(dropped[0], b);
    ck_assert_int_eq(b->state, SEQ_WAITING);
    ck_assert_uint_eq(scheduler_running(sc), 1);
    ck_assert_uint_eq(scheduler_waiting(sc), 2);
    ck_assert_uint_eq(p->n_preempted, 1);
    ck_assert_ptr_null(scheduler_next(sc, p));
    p = plan();
    ck_assert_ptr_eq(scheduler_next(sc, p), b);     /* in its old place, before w */
    ck_assert_ptr_ne(scheduler_next(sc, p), w);
}
END_TEST

TCase *scheduler_offload_case(void)
{
    TCase *tc = tcase_create("scheduler_offload");

    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, the_longest_sparse_one_leaves_before_anyone_is_preempted);
    tcase_add_test(tc, one_after_the_other_leaves_until_there_is_room);
    tcase_add_test(tc, who_is_refused_is_asked_once_and_the_next_goes);
    tcase_add_test(tc, who_returns_may_have_to_leave_again);
    tcase_add_test(tc, without_anyone_to_offload_the_youngest_is_preempted);
    tcase_add_test(tc, the_last_one_waits_and_is_not_preempted);
    tcase_add_test(tc, what_is_being_copied_counts_before_anyone_is_preempted);
    tcase_add_test(tc, who_waits_for_copies_is_not_passed);
    tcase_add_test(tc, admission_offloads_and_preempts_nobody);
    tcase_add_loop_test(tc, what_is_loaded_needs_room_and_gets_no_slice, 0, N_LOADS);
    tcase_add_test(tc, who_is_too_long_and_alone_is_admitted_and_waits);
    tcase_add_test(tc, who_waits_for_blocks_holds_nobody_up);
    tcase_add_test(tc, spare_is_what_nobody_will_want_before_long);
    tcase_add_test(tc, put_back_takes_the_youngest);
    return tc;
}
