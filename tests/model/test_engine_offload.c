/* engine/engine.h with a host tier: whatever leaves the device, comes back or is found in host
 * memory, and whenever, no answer changes by a bit.
 *
 * A history is a number of random requests, played against an engine with room for all of them
 * and no host tier, and then against others.  OFFLOAD_SEEDS=n in the environment plays
 * 10 n small and 2 n large ones more. */

#include "engine/base/clock.h"
#include "engine/base/mem.h"
#include "engine/kv/hot_sets.h"
#include "engine/model/tokenizer.h"
#include "tests/support/engine_fixture.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A history comes in two sizes: all lengths and pools are so many times these. */
enum { SMALL = 1, LARGE = 4 };
enum { KEPT = 96 };              /* tokens: small_config() */
enum {
    N_REQUESTS = 15, MOST_INSIDE = 13,
    MAX_PROMPT = 430, MAX_OUTPUT = 210, MAX_LEN = 640, MAX_BLOCKS = MAX_LEN / 64,
};

struct history {
    uint64_t seed;
    uint32_t scale;
    enum selection selection;
    const struct fixture_model *model;
};

struct answer {
    int32_t ids[MAX_OUTPUT];
    float logprobs[MAX_OUTPUT];
};

/* ---- texts */

static int32_t *prose;
static size_t n_prose;

static void append_file(struct token_list *ids, const struct tokenizer *tok, const char *path)
{
    static char text[200000];
    FILE *f = fopen(path, "rb");

    ck_assert_msg(f != NULL, "%s", path);
    size_t n = fread(text, 1, sizeof text, f);
    fclose(f);
    ck_assert_int_eq(tokenizer_encode(tok, ids, text, n, TOKENIZE_NO_ADDED, 0), ST_OK);
}

static void read_prose(void)
{
    struct token_list ids = { 0 };
    struct tokenizer *tok;

    if (prose)
        return;
    ck_assert_int_eq(tokenizer_open(&tok, BUNDLED_MODEL "/tokenizer.json", NULL), ST_OK);
    append_file(&ids, tok, "README.md");
    append_file(&ids, tok, "docs/DESIGN.md");
    append_file(&ids, tok, "docs/OPERATIONS.md");
    tokenizer_close(tok);
    prose = ids.ids;
    n_prose = ids.n;
    ck_assert_uint_gt(n_prose, LARGE * MAX_PROMPT + 1400);
}

/* Few texts, so that prefixes are shared: prose from several places, and noise. */
static void text_of(int32_t *ids, uint32_t n, int text)
{
    if (text < 3)
        memcpy(ids, prose + text * 700, n * sizeof *ids);
    else
        random_prompt(ids, n, (uint64_t)text);
}

/* ---- requests */

static uint32_t random_length(struct test_random *rng)
{
    static const int most[] = { 3, 130, 130, 200, 200, 300, MAX_PROMPT };

    return 1 + (uint32_t)random_below(rng, most[random_below(rng, 7)] - 1);
}

/* Request i of a history; some have the prompt of the one before and share its group. */
static struct request *request_of(const struct history *h, int i)
{
    bool grouped = i % 6 == 4 || i % 6 == 5;
    struct test_random rng = test_random(h->seed * 1000 + (uint64_t)i);
    struct test_random text = test_random(h->seed * 1000 + 500 + (grouped ? 4 + i / 6 * 6 : i));
    static int32_t prompt[LARGE * MAX_PROMPT];
    uint32_t n = h->scale * random_length(&text);

    text_of(prompt, n, random_below(&text, 5));
    struct request *r = new_request(prompt, n, 1 + (uint32_t)random_below(&rng, MAX_OUTPUT - 1));
    r->group = grouped ? (uint64_t)(i / 6 + 1) : 0;
    r->sparse = random_below(&rng, 6) > 0;
    r->temperature = random_below(&rng, 2) ? 0.8f : 0;
    r->seed = random_u64(&rng);
    r->presence = random_below(&rng, 8) ? 0 : 0.5f;
    r->cache_salt = random_below(&rng, 8) ? 0 : 5;
    return r;
}

static void pause_us(int us)
{
    struct timespec pause = { .tv_nsec = 1000L * us };

    nanosleep(&pause, NULL);
}

/* Submit all, no more than MOST_INSIDE at a time, and wait.  With cancels some are, whenever. */
static void play(const struct history *h, bool cancels, struct request *r[N_REQUESTS])
{
    struct test_random rng = test_random(h->seed + 77);
    int inside = 0;

    for (int i = 0; i < N_REQUESTS; i++)
        r[i] = request_of(h, i);
    for (int i = 0; i < N_REQUESTS; i++) {
        ck_assert_int_eq(engine_submit(engine, r[i]), ST_OK);
        for (inside++; inside >= MOST_INSIDE;)
            inside -= collect_mail();
        if (random_below(&rng, 3) == 0)
            pause_us(random_below(&rng, 20000));
        if (cancels && random_below(&rng, 3) == 0)
            engine_cancel(engine, r[i - random_below(&rng, i < 8 ? i + 1 : 8)]);
    }
    wait_for(inside);
}

static void check_answer(const struct request *r, const struct answer *want, const char *name,
                         uint64_t seed, int i)
{
    uint32_t n = atomic_load(&r->n_output);

    ck_assert_msg(r->finish == FINISH_LENGTH ||
                  (r->finish == FINISH_CANCELLED && atomic_load(&r->cancelled)),
                  "%s, seed %d: request %d ended with %d: %s", name, (int)seed, i, r->finish,
                  r->error.text);
    if (r->finish == FINISH_LENGTH)
        ck_assert_uint_eq(n, r->max_tokens);
    for (uint32_t k = 0; k < n; k++)
        ck_assert_msg(r->output[k] == want->ids[k] && r->chosen[k].logprob == want->logprobs[k],
                      "%s, seed %d: request %d of %u tokens differs at token %u: %d %.9g, not %d "
                      "%.9g", name, (int)seed, i, r->n_prompt, k, r->output[k],
                      (double)r->chosen[k].logprob, want->ids[k], (double)want->logprobs[k]);
}

static struct engine_config history_config(const struct history *h)
{
    struct engine_config c = small_config();

    c.model_dir = h->model->dir;
    c.max_model_len = h->scale * MAX_LEN;
    c.select.selection = h->selection;
    c.select.crossover_tokens = 100;
    c.max_running = 12;
    return c;
}

static void reference(const struct history *h, struct answer out[N_REQUESTS])
{
    struct engine_config c = history_config(h);
    struct request *r[N_REQUESTS];
    struct engine_stats s;

    c.kv_bytes = 150 * h->scale * model_block_bytes(h->model);
    c.step_tokens = 1024;
    start(&c);
    play(h, false, r);
    assert_gauges_are_zero();
    engine_stats(engine, &s);
    ck_assert_uint_eq(s.preemptions, 0);
    ck_assert_uint_gt(s.sparse_rows, 300);
    ck_assert(!s.host_tier);
    for (int i = 0; i < N_REQUESTS; i++) {
        ck_assert_int_eq(r[i]->finish, FINISH_LENGTH);
        for (uint32_t k = 0; k < r[i]->max_tokens; k++) {
            out[i].ids[k] = r[i]->output[k];
            out[i].logprobs[k] = r[i]->chosen[k].logprob;
        }
        free_request(r[i]);
    }
    stop();
}

/* ---- what is played */

/* Things that happen. */
enum { OFFLOADS = 1, RETURNS = 2, LOADS = 4, PREEMPTIONS = 8, MISSES = 16 };

static const struct kind {
    const char *name;
    uint32_t blocks, host_blocks;    /* MAX_BLOCKS are the longest context */
    enum offload_policy offload;
    uint32_t sequences, hot_rows;
    bool no_prefix_cache, cancels;
    int delay_us;                    /* the most a copy is held up */
    uint32_t step_tokens;            /* 0: as in small_config() */
    int must;                        /* happen, however the threads run */
} kinds[] = {
    { "always", 100, 120, OFFLOAD_ALWAYS, .must = OFFLOADS | MISSES },
    { "always, cancels", 14, 100, OFFLOAD_ALWAYS, .cancels = true, .must = OFFLOADS | MISSES },
    { "ample", 120, 120, OFFLOAD_AUTO, .must = 0 },
    { "medium", 20, 120, OFFLOAD_AUTO, .must = 0 },
    { "small", 13, 120, OFFLOAD_AUTO, .must = OFFLOADS | MISSES },
    { "smallest, cancels", 10, 100, OFFLOAD_AUTO, .cancels = true, .must = OFFLOADS },
    { "small tier", 12, 8, OFFLOAD_AUTO, .sequences = 4, .must = OFFLOADS },
    { "one at a time", 12, 120, OFFLOAD_AUTO, .sequences = 1, .must = OFFLOADS },
    { "few hot rows", 12, 120, OFFLOAD_AUTO, .hot_rows = 96, .must = OFFLOADS | MISSES },
    { "no prefix cache", 12, 120, OFFLOAD_AUTO, .no_prefix_cache = true, .must = OFFLOADS },
    { "slow copies", 14, 120, OFFLOAD_AUTO, .delay_us = 3000, .must = OFFLOADS },
    { "slow copies, cancels, no prefix cache", 11, 80, OFFLOAD_AUTO, .no_prefix_cache = true,
      .delay_us = 6000, .cancels = true, .must = 0 },
    /* Pools that the longest do not fit. */
    { "streamed", 7, 120, OFFLOAD_AUTO, .step_tokens = 80, .must = MISSES },
    { "streamed, slow copies, cancels", 6, 100, OFFLOAD_AUTO, .step_tokens = 80,
      .delay_us = 3000, .cancels = true, .must = MISSES },
    { "streamed, one at a time, no prefix cache", 6, 120, OFFLOAD_AUTO, .sequences = 1,
      .no_prefix_cache = true, .step_tokens = 80, .must = MISSES },
    { "streamed, always", 7, 120, OFFLOAD_ALWAYS, .step_tokens = 80, .must = MISSES },
};
enum { N_KINDS = sizeof kinds / sizeof kinds[0] };

/* On the copy thread alone. */
struct delay {
    struct test_random rng;
    int most_us;
};

static bool hold_up(void *arg, uint64_t number)
{
    struct delay *d = arg;

    (void)number;
    if (random_below(&d->rng, 2))
        pause_us(random_below(&d->rng, d->most_us));
    return true;
}

static uint32_t at_most(uint32_t n, uint32_t most)
{
    return n < most ? n : most;
}

/* The engine divides kv_bytes; this is that it divides into so many blocks. */
static struct engine_config config_of(const struct history *h, const struct kind *k)
{
    struct engine_config c = history_config(h);
    const uint32_t blocks = k->blocks * h->scale, host_blocks = k->host_blocks * h->scale;
    const uint32_t longest = MAX_BLOCKS * h->scale, contexts = host_blocks / longest;
    uint32_t sets = at_most(k->sequences ? k->sequences : contexts ? contexts : 1, c.max_running);
    struct hot_sets_config hot = {
        .sets = (int)sets, .layers = h->model->layers,
        .rows_per_head = (int)(k->hot_rows ? k->hot_rows : 4 * KEPT),
        .max_blocks = (int)longest, .shape = h->model->shape,
    };

    c.kv_bytes = blocks * model_block_bytes(h->model) + hot_sets_bytes(&hot) +
                 at_most(sets * longest, host_blocks) * model_index_bytes(h->model);
    if (blocks < longest)            /* the two buffers of what is streamed */
        c.kv_bytes += 2 * (uint64_t)longest * kv_block_bytes(&hot.shape);
    c.host_kv_bytes = host_blocks * model_block_bytes(h->model);
    c.step_tokens = k->step_tokens ? k->step_tokens * h->scale : c.step_tokens;
    c.offload = k->offload;
    c.offload_sequences = sets;
    c.hot_rows = (uint32_t)hot.rows_per_head;
    c.prefix_cache = !k->no_prefix_cache;
    return c;
}

/* Two buffers of one layer each: where there are few layers they would hold most of what the pool
 * lacks, and no context has to stream. */
static bool can_be_played(const struct history *h, const struct kind *k)
{
    uint64_t buffers = 2 * MAX_BLOCKS * kv_block_bytes(&h->model->shape);
    uint64_t block = model_block_bytes(h->model);

    return k->blocks >= MAX_BLOCKS || k->blocks * block + buffers < MAX_BLOCKS * block;
}

static int what_happened(const struct engine_stats *s)
{
    uint64_t misses = 0;

    for (int i = 0; i < SELECT_MAX_LAYERS; i++)
        misses += s->hot[i].misses;
    return (s->n_offloads ? OFFLOADS : 0) | (s->n_returns ? RETURNS : 0) |
           (s->bytes_loaded ? LOADS : 0) | (s->preemptions ? PREEMPTIONS : 0) |
           (misses ? MISSES : 0);
}

/* Play one history under one configuration and hold it against the reference.  What happened. */
static int hold_against(const struct history *h, const struct kind *k, const struct answer *want)
{
    const uint64_t seed = h->seed;
    struct delay delay = { test_random(seed), k->delay_us };
    struct engine_config c = config_of(h, k);
    struct request *r[N_REQUESTS];
    struct engine_stats s;

    if (k->delay_us) {
        c.before_copy = hold_up;
        c.before_copy_arg = &delay;
    }
    start(&c);
    play(h, k->cancels, r);
    for (int i = 0; i < N_REQUESTS; i++) {
        check_answer(r[i], &want[i], k->name, seed, i);
        free_request(r[i]);
    }
    assert_gauges_are_zero();
    engine_stats(engine, &s);
    ck_assert_uint_eq(s.kv_blocks, k->blocks * h->scale);
    ck_assert_uint_eq(s.host_blocks, k->host_blocks * h->scale);
    ck_assert_msg(h->scale != SMALL || (what_happened(&s) & k->must) == k->must,
                  "%s, seed %d: of %d only %d happened", k->name, (int)seed, k->must,
                  what_happened(&s));
    stop();
    return what_happened(&s);
}

static void no_answer_changes(const struct history *h)
{
    static struct answer want[N_REQUESTS];
    int happened = 0;

    read_prose();
    reference(h, want);
    for (int i = 0; i < N_KINDS; i++)
        if (can_be_played(h, &kinds[i]))
            happened |= hold_against(h, &kinds[i], want);
    if (h->seed == 1 && h->scale == SMALL)          /* others may be tame */
        ck_assert_int_eq(happened | RETURNS, OFFLOADS | RETURNS | LOADS | PREEMPTIONS | MISSES);
}

START_TEST(no_answer_changes_in_small_histories)
{
    no_answer_changes(&(struct history){ (uint64_t)_i, SMALL, SELECTION_EXACT, &bundled_model });
}
END_TEST

START_TEST(no_answer_of_latent_attention_changes)
{
    no_answer_changes(&(struct history){ (uint64_t)_i, SMALL, SELECTION_EXACT, &latent_model });
}
END_TEST

START_TEST(no_answer_of_lagged_latent_attention_changes)
{
    no_answer_changes(&(struct history){ (uint64_t)_i, SMALL, SELECTION_LAGGED, &latent_model });
}
END_TEST

/* Which blocks a step chooses from is known a step before, wherever these are. */
START_TEST(no_answer_changes_in_lagged_histories)
{
    no_answer_changes(&(struct history){ (uint64_t)_i, SMALL, SELECTION_LAGGED, &bundled_model });
}
END_TEST

START_TEST(no_answer_changes_in_large_histories)
{
    no_answer_changes(&(struct history){ (uint64_t)_i, LARGE, SELECTION_EXACT, &bundled_model });
}
END_TEST

/* ---- one thing at a time */

enum { PREFIX = 600 };

/* A pool of 14 blocks and a tier of 100, contexts of up to 10. */
static struct engine_config small_tier_config(void)
{
    static const struct history h = { 0, SMALL, SELECTION_EXACT, &bundled_model };
    static const struct kind k = { .name = "single", .blocks = 14, .host_blocks = 100 };

    return config_of(&h, &k);
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

    start(&c);
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

    start(&c);
    struct request *alone = noise(400, 1, 200), *a = noise(400, 1, 200), *b = noise(500, 2, 3);
    a->cache_salt = 1;                              /* nothing of it is known */
    b->sparse = false;
    run_one(alone);
    ck_assert_int_eq(engine_submit(engine, a), ST_OK);
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

/* Copies go on when nobody is left; what they held is free once they have ended. */
START_TEST(an_idle_engine_takes_in_what_arrives)
{
    struct engine_config c = small_tier_config();
    struct delay delay = { test_random(1), 8000 };
    struct engine_stats s;

    c.before_copy = hold_up;
    c.before_copy_arg = &delay;
    start(&c);
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
    start(&c);
    run_noise(PREFIX, 1, 2);
    assert_gauges_are_zero();                       /* all of it is stored */
    evict();
    struct request *a = noise(PREFIX, 1, 30), *b = noise(PREFIX, 1, 30);
    ck_assert_int_eq(engine_submit(engine, a), ST_OK);
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
    start(&c);
    run_noise(PREFIX, 1, 2);
    assert_gauges_are_zero();
    evict();
    struct request *r[2] = { noise(PREFIX, 1, 30), noise(200, 7, 30) };
    for (int i = 0; i < 2; i++)
        ck_assert_int_eq(engine_submit(engine, r[i]), ST_OK);
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
    static const struct history h = { 3, SMALL, SELECTION_EXACT, &bundled_model };
    struct engine_config c = small_tier_config();
    struct request *r[N_REQUESTS];
    uint64_t number = at[_i];
    int accepted = 0, failed = 0;

    c.before_copy = fail_at;
    c.before_copy_arg = &number;
    read_prose();
    start(&c);
    for (int i = 0; i < N_REQUESTS; i++) {
        r[i] = request_of(&h, i);
        enum status st = engine_submit(engine, r[i]);
        ck_assert(st == ST_OK || st == ST_DEVICE);
        accepted += st == ST_OK;
    }
    wait_for(accepted);
    wait_until(has_failed, "the engine does not fail");
    for (int i = 0; i < N_REQUESTS; i++) {
        if (r[i]->finish == FINISH_ERROR) {
            ck_assert_int_eq(r[i]->error.code, ST_DEVICE);
            ck_assert_ptr_nonnull(strstr(r[i]->error.text, "copy"));
            failed++;
        } else
            ck_assert(r[i]->finish == FINISH_LENGTH || r[i]->finish == FINISH_NONE);
    }
    ck_assert_int_gt(failed, 0);
    ck_assert_int_eq(engine_submit(engine, r[0]), ST_DEVICE);
    for (int i = 0; i < N_REQUESTS; i++)
        free_request(r[i]);
    stop();
}
END_TEST

static bool has_host_memory(const struct engine_stats *s)
{
    return s->host_blocks > PREFIX / 64;
}

/* Nobody is there to be told; the process must end all the same.  What fills before there is host
 * memory is not copied, and then the copy that shall fail is never made. */
START_TEST(a_failed_copy_is_noticed_by_an_idle_engine)
{
    struct engine_config c = small_tier_config();
    uint64_t number = PREFIX / 64 - 1;

    c.before_copy = fail_at;
    c.before_copy_arg = &number;
    start(&c);
    wait_until(has_host_memory, "there is no host memory");
    struct request *r = noise(PREFIX, 1, 1);
    run_one(r);
    wait_until(has_failed, "the engine does not fail");
    ck_assert_int_eq(engine_submit(engine, r), ST_DEVICE);
    free_request(r);
    stop();
}
END_TEST

/* Where hot rows are not asked for, they and the index take half of the memory, unless that is less
 * than 4 times the kept tokens or more than 16 times. */
START_TEST(hot_rows_grow_into_half_of_the_memory)
{
    const struct history h = { .scale = SMALL, .model = &bundled_model };
    const struct kind few = { "few", 30, 120, OFFLOAD_AUTO, .sequences = 2, .hot_rows = 4 * KEPT };
    const struct kind many = { "many", 30, 120, OFFLOAD_AUTO, .sequences = 2,
                               .hot_rows = 16 * KEPT };
    const uint64_t block = BUNDLED_BLOCK_BYTES, of_pool = few.blocks * block;
    const uint64_t least = config_of(&h, &few).kv_bytes - of_pool;
    const uint64_t most = config_of(&h, &many).kv_bytes - of_pool, unit = (most - least) / 12;
    const struct { uint64_t bytes, aside; } cases[] = {
        { 2 * least + unit, least }, { 2 * (least + 5 * unit), least + 5 * unit },
        { 2 * (least + 5 * unit) + unit, least + 5 * unit }, { 3 * most, most },
    };

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct engine_config c = config_of(&h, &few);
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
    tcase_add_test(tc, an_idle_engine_takes_in_what_arrives);
    tcase_add_test(tc, who_waits_for_blocks_can_be_cancelled);
    tcase_add_test(tc, destroying_does_not_wait_for_copies);
    tcase_add_loop_test(tc, a_failed_copy_ends_all, 0, 6);
    tcase_add_test(tc, a_failed_copy_is_noticed_by_an_idle_engine);
    tcase_add_test(tc, hot_rows_grow_into_half_of_the_memory);
    tcase_add_loop_test(tc, no_answer_changes_in_small_histories, 1, 2 + 10 * more);
    tcase_add_loop_test(tc, no_answer_changes_in_lagged_histories, 1, 2 + 10 * more);
    tcase_add_loop_test(tc, no_answer_of_latent_attention_changes, 1, 2 + 10 * more);
    tcase_add_loop_test(tc, no_answer_of_lagged_latent_attention_changes, 1, 2 + 10 * more);
    tcase_add_loop_test(tc, no_answer_changes_in_large_histories, 1, 1 + 2 * more);
    return tc;
}
