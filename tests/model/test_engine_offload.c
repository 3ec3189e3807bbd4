/* engine/engine.h with a host tier: whatever leaves the device, comes back or is found in host
 * memory, and whenever, no answer changes by a bit (tests/support/engine_history.h).
 * OFFLOAD_SEEDS=n in the environment plays 10 n small histories and 2 n large ones more. */

#include "engine/base/clock.h"
#include "engine/kv/hot_sets.h"
#include "tests/support/engine_history.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

enum { SMALL = 1, LARGE = 4 };   /* scales */
enum { KEPT = 96 };              /* tokens: small_history() */

/* ---- histories */

/* dir: NULL, the bundled model. */
static void no_answer_changes(const char *dir, uint64_t seed, uint32_t scale,
                              enum selection selection)
{
    struct engine_history h = small_history(seed, scale, selection);

    h.dir = dir;
    int happened = history_play_mixed(&h);
    if (seed == 1 && scale == SMALL)                /* others may be tame */
        ck_assert_int_eq(happened | RETURNS, OFFLOADS | RETURNS | LOADS | PREEMPTIONS | MISSES);
}

START_TEST(no_answer_changes_in_small_histories)
{
    no_answer_changes(NULL, (uint64_t)_i, SMALL, SELECTION_EXACT);
}
END_TEST

/* Which blocks a step chooses from is known a step before, wherever these are. */
START_TEST(no_answer_changes_in_lagged_histories)
{
    no_answer_changes(NULL, (uint64_t)_i, SMALL, SELECTION_LAGGED);
}
END_TEST

START_TEST(no_answer_changes_in_large_histories)
{
    no_answer_changes(NULL, (uint64_t)_i, LARGE, SELECTION_EXACT);
}
END_TEST

/* Latent attention, exact and lagged. */
START_TEST(no_answer_changes_of_latent_attention)
{
    no_answer_changes(latent_model.dir, 1, SMALL, (enum selection)_i);
}
END_TEST

/* ---- one thing at a time */

enum { PREFIX = 600, TIER_BLOCKS = 100 };

/* A pool of 14 blocks and a tier of 100, contexts of up to 10. */
static struct engine_config small_tier_config(void)
{
    static const struct history_kind k = { .name = "single", .blocks = 14,
                                           .host_blocks = TIER_BLOCKS };
    const struct engine_history h = small_history(0, SMALL, SELECTION_EXACT);

    return history_config(&h, &k);
}

static void start_tier(const struct engine_config *c)
{
    start(c);
    wait_for_host_memory(TIER_BLOCKS);
}

static struct request *noise(uint32_t n, uint64_t seed, uint32_t max_tokens)
{
    int32_t ids[PREFIX];

    random_prompt(ids, n, seed);
    return new_request(ids, n, max_tokens);
}

static void run_noise(uint32_t n, uint64_t seed, uint32_t max_tokens)
{
    struct request *r = noise(n, seed, max_tokens);

    run_one(r);
    ck_assert_int_eq(r->finish, FINISH_LENGTH);
    free_request(r);
}

/* Two other contexts, and nothing of the first is on the device any more. */
static void evict(void)
{
    run_noise(PREFIX, 1001, 2);
    run_noise(PREFIX, 1002, 2);
}

START_TEST(a_prefix_is_found_in_the_host_tier)
{
    struct engine_config c = small_tier_config();
    struct engine_stats before, after;

    start_tier(&c);
    struct request *first = noise(PREFIX, 1, 30), *again = noise(PREFIX, 1, 30);
    run_one(first);
    evict();
    engine_stats(engine, &before);
    run_one(again);
    engine_stats(engine, &after);
    ck_assert_uint_eq(again->n_cached, PREFIX / 64 * 64);
    ck_assert_uint_eq(after.bytes_loaded - before.bytes_loaded,
                      (uint64_t)(PREFIX / 64) * BUNDLED_BLOCK_BYTES);
    ck_assert_uint_eq(after.prefix_hits - before.prefix_hits, again->n_cached);
    for (uint32_t k = 0; k < 30; k++) {
        ck_assert_int_eq(again->output[k], first->output[k]);
        ck_assert(again->chosen[k].logprob == first->chosen[k].logprob);
    }
    free_request(first);
    free_request(again);
    assert_gauges_are_zero();
    stop();
}
END_TEST

/* A prompt pushes a longer text off the device, and when it is gone the other comes back. */
START_TEST(who_left_comes_back)
{
    struct engine_config c = small_tier_config();
    struct engine_stats s;

    start_tier(&c);
    struct request *alone = noise(400, 1, 200), *a = noise(400, 1, 200), *b = noise(500, 2, 3);
    a->cache_salt = 1;                              /* nothing of it is known */
    b->sparse = false;
    run_one(alone);
    ck_assert_int_eq(submit_one(a), ST_OK);
    while (atomic_load(&a->n_output) < 5)
        pause_us(100);
    run_one(b);
    ck_assert_uint_lt(atomic_load(&a->n_output), 190);
    wait_for(1);
    assert_gauges_are_zero();
    engine_stats(engine, &s);
    ck_assert_uint_eq(s.n_offloads, 1);
    ck_assert_uint_eq(s.n_returns, 1);
    ck_assert_uint_gt(s.bytes_loaded, 0);
    ck_assert_uint_eq(s.preemptions, 0);
    ck_assert_int_eq(memcmp(a->output, alone->output, 200 * sizeof *a->output), 0);
    for (int k = 0; k < 200; k++)
        ck_assert(a->chosen[k].logprob == alone->chosen[k].logprob);
    free_request(alone);
    free_request(a);
    free_request(b);
    stop();
}
END_TEST

static struct request *two_tokens(const int32_t *prompt, uint32_t n)
{
    struct request *r = new_request(prompt, n, 2);

    run_one(r);
    ck_assert_msg(r->finish == FINISH_LENGTH, "%s", r->error.text);
    return r;
}

/* A text that streams goes on where a shorter one ended, whose blocks fill the pool: they are no
 * more held than those of anybody who streams. */
START_TEST(what_streams_finds_what_streamed_before)
{
    enum { FIRST = 1000, ALL = 1900 };
    const struct engine_history h = { .scale = 1, .max_len = 2048, .keep_blocks = 4,
                                      .keep_tokens = KEPT };
    const struct history_kind k = { "streams on", 14, 64, OFFLOAD_AUTO, .step_tokens = 320 };
    struct engine_config c = history_config(&h, &k);
    int32_t prompt[ALL];
    struct engine_stats s;

    random_prompt(prompt, ALL, 1);
    start(&c);
    free_request(two_tokens(prompt, FIRST));
    assert_gauges_are_zero();
    struct request *again = two_tokens(prompt, ALL);
    ck_assert_uint_eq(again->n_cached, FIRST / 64 * 64);
    assert_gauges_are_zero();
    engine_stats(engine, &s);
    ck_assert_uint_eq(s.kv_blocks, k.blocks);
    stop();
    start(&c);
    struct request *alone = two_tokens(prompt, ALL);
    ck_assert_int_eq(memcmp(again->output, alone->output, 2 * sizeof *again->output), 0);
    ck_assert(again->chosen[1].logprob == alone->chosen[1].logprob);
    free_request(again);
    free_request(alone);
    stop();
}
END_TEST

/* Copies go on when nobody is left; what they held is free once they have ended. */
START_TEST(an_idle_engine_takes_in_what_arrives)
{
    struct engine_config c = small_tier_config();
    struct copy_delay delay = { 1, 8000 };
    struct engine_stats s;

    c.before_copy = copy_delay;
    c.before_copy_arg = &delay;
    start_tier(&c);
    run_noise(PREFIX, 1, 1);
    assert_gauges_are_zero();
    engine_stats(engine, &s);
    ck_assert_uint_eq(s.bytes_stored, (uint64_t)(PREFIX / 64) * BUNDLED_BLOCK_BYTES);
    ck_assert_uint_eq(s.host_blocks_cached, PREFIX / 64);
    stop();
}
END_TEST

/* Until what is looked for shows. */
static void wait_until(bool (*seen)(const struct engine_stats *s), const char *what)
{
    uint64_t began_ns = clock_now_ns();
    struct engine_stats s;

    do {
        ck_assert_msg(clock_now_ns() - began_ns < 20ull * 1000 * 1000 * 1000, "%s", what);
        pause_us(100);
        engine_stats(engine, &s);
    } while (!seen(&s));
}

static bool is_loading(const struct engine_stats *s)
{
    return s->loading > 0;
}

static bool has_failed(const struct engine_stats *s)
{
    return s->failed;
}

static bool crawl(void *arg, uint64_t number)
{
    (void)arg;
    (void)number;
    pause_us(10000);
    return true;
}

START_TEST(who_waits_for_blocks_can_be_cancelled)
{
    struct engine_config c = small_tier_config();

    c.before_copy = crawl;
    start_tier(&c);
    run_noise(PREFIX, 1, 2);
    assert_gauges_are_zero();                       /* all of it is stored */
    evict();
    struct request *a = noise(PREFIX, 1, 30), *b = noise(PREFIX, 1, 30);
    ck_assert_int_eq(submit_one(a), ST_OK);
    wait_until(is_loading, "nobody waits for blocks");
    engine_cancel(engine, a);
    wait_for(1);
    ck_assert_int_eq(a->finish, FINISH_CANCELLED);
    ck_assert_uint_eq(atomic_load(&a->n_output), 0);
    run_one(b);                                     /* while loads for a are under way */
    ck_assert_int_eq(b->finish, FINISH_LENGTH);
    ck_assert_uint_gt(b->n_cached, 0);
    free_request(a);
    free_request(b);
    assert_gauges_are_zero();
    stop();
}
END_TEST

/* With stores and loads under way, and somebody who waits for the latter. */
START_TEST(destroying_does_not_wait_for_copies)
{
    struct engine_config c = small_tier_config();
    int home = 0;

    c.before_copy = crawl;
    start_tier(&c);
    run_noise(PREFIX, 1, 2);
    assert_gauges_are_zero();
    evict();
    struct request *r[2] = { noise(PREFIX, 1, 30), noise(200, 7, 30) };
    for (int i = 0; i < 2; i++)
        ck_assert_int_eq(submit_one(r[i]), ST_OK);
    wait_until(is_loading, "nobody waits for blocks");
    engine_destroy(engine);
    for (struct mail_node *n = mailbox_drain(engine_mail); n; n = n->next)
        home += ((struct message *)n)->kind == MSG_DONE;
    ck_assert_int_eq(home, 2);
    mailbox_destroy(engine_mail);
    free_request(r[0]);
    free_request(r[1]);
}
END_TEST

/* ---- copies that fail */

static bool fail_at(void *arg, uint64_t number)
{
    return number < *(const uint64_t *)arg;
}

/* Everybody learns that the device is lost, those who wait for blocks and those in the queue. */
START_TEST(a_failed_copy_ends_all)
{
    static const uint64_t at[] = { 0, 1, 4, 9, 14, 20 };
    const struct engine_history h = small_history(3, SMALL, SELECTION_EXACT);
    struct engine_config c = small_tier_config();
    struct request *r[HISTORY_REQUESTS];
    uint64_t number = at[_i];
    int accepted = 0, failed = 0;

    c.before_copy = fail_at;
    c.before_copy_arg = &number;
    start_tier(&c);
    for (int i = 0; i < HISTORY_REQUESTS; i++) {
        r[i] = history_request(&h, i);
        enum status st = submit_one(r[i]);
        ck_assert(st == ST_OK || st == ST_DEVICE);
        accepted += st == ST_OK;
    }
    wait_for(accepted);
    wait_until(has_failed, "the engine does not fail");
    for (int i = 0; i < HISTORY_REQUESTS; i++) {
        if (r[i]->finish == FINISH_ERROR) {
            ck_assert_int_eq(r[i]->error.code, ST_DEVICE);
            ck_assert_ptr_nonnull(strstr(r[i]->error.text, "copy"));
            failed++;
        } else
            ck_assert(r[i]->finish == FINISH_LENGTH || r[i]->finish == FINISH_NONE);
    }
    ck_assert_int_gt(failed, 0);
    ck_assert_int_eq(submit_one(r[0]), ST_DEVICE);
    for (int i = 0; i < HISTORY_REQUESTS; i++)
        free_request(r[i]);
    stop();
}
END_TEST

/* Nobody is there to be told; the process must end all the same. */
START_TEST(a_failed_copy_is_noticed_by_an_idle_engine)
{
    struct engine_config c = small_tier_config();
    uint64_t number = PREFIX / 64 - 1;

    c.before_copy = fail_at;
    c.before_copy_arg = &number;
    start_tier(&c);
    struct request *r = noise(PREFIX, 1, 1);
    run_one(r);
    wait_until(has_failed, "the engine does not fail");
    ck_assert_int_eq(submit_one(r), ST_DEVICE);
    free_request(r);
    stop();
}
END_TEST

/* Where hot rows are not asked for, they and the index take half of the memory, unless that is less
 * than 4 times the kept tokens or more than 16 times. */
START_TEST(hot_rows_grow_into_half_of_the_memory)
{
    const struct engine_history h = small_history(0, SMALL, SELECTION_EXACT);
    const struct history_kind few = { "few", 30, 120, OFFLOAD_AUTO, .sequences = 2,
                                      .hot_rows = 4 * KEPT };
    const struct history_kind many = { "many", 30, 120, OFFLOAD_AUTO, .sequences = 2,
                                       .hot_rows = 16 * KEPT };
    const uint64_t block = BUNDLED_BLOCK_BYTES, of_pool = few.blocks * block;
    const uint64_t least = history_config(&h, &few).kv_bytes - of_pool;
    const uint64_t most = history_config(&h, &many).kv_bytes - of_pool, unit = (most - least) / 12;
    const struct { uint64_t bytes, aside; } cases[] = {
        { 2 * least + unit, least }, { 2 * (least + 5 * unit), least + 5 * unit },
        { 2 * (least + 5 * unit) + unit, least + 5 * unit }, { 3 * most, most },
    };

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct engine_config c = history_config(&h, &few);
        struct engine_stats s;
        c.kv_bytes = cases[i].bytes;
        c.hot_rows = 0;
        start(&c);
        engine_stats(engine, &s);
        ck_assert_uint_eq(s.kv_blocks, (cases[i].bytes - cases[i].aside) / block);
        stop();
    }
}
END_TEST

TCase *engine_offload_case(void)
{
    const char *seeds = getenv("OFFLOAD_SEEDS");
    const int more = seeds ? atoi(seeds) : 0;
    TCase *tc = tcase_create("engine_offload");

    tcase_set_timeout(tc, 300);
    tcase_add_test(tc, a_prefix_is_found_in_the_host_tier);
    tcase_add_test(tc, who_left_comes_back);
    tcase_add_test(tc, what_streams_finds_what_streamed_before);
    tcase_add_test(tc, an_idle_engine_takes_in_what_arrives);
    tcase_add_test(tc, who_waits_for_blocks_can_be_cancelled);
    tcase_add_test(tc, destroying_does_not_wait_for_copies);
    tcase_add_loop_test(tc, a_failed_copy_ends_all, 0, 6);
    tcase_add_test(tc, a_failed_copy_is_noticed_by_an_idle_engine);
    tcase_add_test(tc, hot_rows_grow_into_half_of_the_memory);
    tcase_add_loop_test(tc, no_answer_changes_in_small_histories, 1, 2 + 10 * more);
    tcase_add_loop_test(tc, no_answer_changes_in_lagged_histories, 1, 2 + 10 * more);
    tcase_add_loop_test(tc, no_answer_changes_of_latent_attention, SELECTION_EXACT,
                        SELECTION_LAGGED + 1);
    tcase_add_loop_test(tc, no_answer_changes_in_large_histories, 1, 1 + 2 * more);
    return tc;
}
