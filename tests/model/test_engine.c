/* engine/engine.h with the bundled model: the recorded reference, and the
 * promise that nothing else in the machine changes an answer. */

#include "engine/base/mem.h"
#include "engine/grammar/grammar.h"
#include "engine/model/tokenizer.h"
#include "tests/support/engine_fixture.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <cjson/cJSON.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* ---- the recorded reference */

START_TEST(greedy_tokens_are_the_reference_s)
{
    FILE *f = fopen("tests/model/golden/bundled.json", "rb");
    static char text[200000];
    struct engine_config c = small_config();

    ck_assert_ptr_nonnull(f);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    c.select = select_default();
    start(&c);
    cJSON *root = cJSON_Parse(text), *prompt, *id;
    cJSON_ArrayForEach(prompt, cJSON_GetObjectItem(root, "prompts")) {
        cJSON *ids = cJSON_GetObjectItem(prompt, "ids");
        cJSON *want = cJSON_GetObjectItem(prompt, "greedy_ids");
        cJSON *logprob = cJSON_GetObjectItem(prompt, "greedy_logprobs")->child;
        int32_t *copy = mem_calloc((size_t)cJSON_GetArraySize(ids), sizeof *copy);
        uint32_t n = 0, i = 0;
        cJSON_ArrayForEach(id, ids)
            copy[n++] = id->valueint;
        struct request *r = new_request(copy, n, (uint32_t)cJSON_GetArraySize(want));
        run_one(r);
        ck_assert_int_eq(r->finish, FINISH_LENGTH);
        cJSON_ArrayForEach(id, want) {
            ck_assert_int_eq(r->output[i], id->valueint);
            ck_assert_float_eq_tol(r->chosen[i].logprob, (float)logprob->valuedouble, 0.02f);
            logprob = logprob->next;
            i++;
        }
        free_request(r);
        mem_free(copy);
    }
    cJSON_Delete(root);
    assert_gauges_are_zero();
    stop();
}
END_TEST

/* ---- nothing changes an answer */

enum { N_REQUESTS = 10 };

struct answer {
    int32_t ids[80];
    float logprobs[80];
    uint32_t n;
};

static struct request *request_of(int i)
{
    static const uint32_t lengths[N_REQUESTS] = { 1, 63, 64, 65, 128, 199, 200, 201, 330, 150 };
    int32_t prompt[400];

    random_prompt(prompt, lengths[i], 7);           /* prefixes of one text */
    struct request *r = new_request(prompt, lengths[i], 30 + (uint32_t)i * 5);
    r->temperature = i % 3 ? 0.8f : 0;
    r->seed = 100 + (uint64_t)i;
    r->sparse = i != 9;
    r->presence = i == 4 ? 0.5f : 0;
    return r;
}

/* All requests at once under a configuration, in an order given by a seed. */
static void answers_under(const struct engine_config *c, uint64_t seed, struct answer *out)
{
    struct request *r[N_REQUESTS];
    struct test_random rng = test_random(seed);
    int order[N_REQUESTS];

    start(c);
    for (int i = 0; i < N_REQUESTS; i++) {
        int k = random_below(&rng, i + 1);
        order[i] = order[k];
        order[k] = i;
    }
    for (int i = 0; i < N_REQUESTS; i++) {
        r[order[i]] = request_of(order[i]);
        ck_assert_int_eq(submit_one(r[order[i]]), ST_OK);
    }
    wait_for(N_REQUESTS);
    for (int i = 0; i < N_REQUESTS; i++) {
        ck_assert_int_eq(r[i]->finish, FINISH_LENGTH);
        out[i].n = atomic_load(&r[i]->n_output);
        ck_assert_uint_eq(out[i].n, r[i]->max_tokens);
        memcpy(out[i].ids, r[i]->output, out[i].n * sizeof *r[i]->output);
        for (uint32_t k = 0; k < out[i].n; k++)
            out[i].logprobs[k] = r[i]->chosen[k].logprob;
        free_request(r[i]);
    }
    assert_gauges_are_zero();
}

static void assert_same(const struct answer *a, const struct answer *b, const char *what)
{
    for (int i = 0; i < N_REQUESTS; i++)
        for (uint32_t k = 0; k < a[i].n; k++) {
            ck_assert_msg(a[i].ids[k] == b[i].ids[k], "%s: request %d differs at token %u", what,
                          i, k);
            ck_assert_msg(a[i].logprobs[k] == b[i].logprobs[k],
                          "%s: request %d, token %u: logprobs %.9g and %.9g", what, i, k,
                          (double)a[i].logprobs[k], (double)b[i].logprobs[k]);
        }
}

static const struct {
    const struct fixture_model *model;
    enum selection selection;
} variants[] = {
    { &bundled_model, SELECTION_EXACT }, { &bundled_model, SELECTION_LAGGED },
    { &latent_model, SELECTION_EXACT }, { &latent_model, SELECTION_LAGGED },
};
enum { N_VARIANTS = sizeof variants / sizeof variants[0] };

static struct engine_config variant_config(int variant)
{
    struct engine_config c = small_config();

    c.model_dir = variants[variant].model->dir;
    c.select.selection = variants[variant].selection;
    return c;
}

/* With lagged selection who was preempted computes its sparse rows again, all of them. */
START_TEST(batch_chunks_cache_and_preemption_change_nothing)
{
    static struct answer alone[N_REQUESTS], other[N_REQUESTS];
    struct engine_config c = variant_config(_i);
    struct engine_stats s;

    /* One at a time, without a cache: the reference. */
    c.max_running = 1;
    c.step_tokens = 2048;
    c.prefix_cache = false;
    answers_under(&c, 0, alone);
    engine_stats(engine, &s);
    ck_assert_uint_gt(s.sparse_rows, 100);
    stop();

    c = variant_config(_i);
    answers_under(&c, 1, other);
    engine_stats(engine, &s);
    ck_assert_uint_gt(s.prefix_hits, 64);
    stop();
    assert_same(alone, other, "batch of 8 with prefix cache");

    c.max_running = 5;
    c.step_tokens = 69;
    answers_under(&c, 2, other);
    stop();
    assert_same(alone, other, "chunks of 64");

    /* 9 blocks: the longest request alone needs 7. */
    c.max_running = 8;
    c.step_tokens = 200;
    c.max_model_len = 420;
    c.kv_bytes = 9 * model_block_bytes(variants[_i].model);
    for (uint64_t seed = 3; seed < 6; seed++) {
        answers_under(&c, seed, other);
        engine_stats(engine, &s);
        ck_assert_uint_lt(s.kv_blocks, 12);
        ck_assert_uint_gt(s.preemptions, 0);
        stop();
        assert_same(alone, other, "preemption");
    }
}
END_TEST

/* Two texts that outgrow the pool: the younger yields, most of its blocks stay in the cache, and
 * when it is alone it goes on from there.  What it computes again is not sampled, but has a say in
 * what is. */
START_TEST(who_yields_goes_on_as_if_it_had_not)
{
    enum { PROMPT = 70, OUTPUT = 500 };
    struct engine_config c = variant_config(_i);
    struct request *r[2], *alone[2];
    int32_t prompt[PROMPT];
    struct engine_stats s;

    c.select.crossover_tokens = 100;
    for (int small = 0; small < 2; small++) {
        struct request **here = small ? r : alone;
        if (small)
            c.kv_bytes = 16 * model_block_bytes(variants[_i].model);  /* of which one takes 9 */
        start(&c);
        for (int i = 0; i < 2; i++) {
            random_prompt(prompt, PROMPT, (uint64_t)i);
            here[i] = new_request(prompt, PROMPT, OUTPUT);
            ck_assert_int_eq(submit_one(here[i]), ST_OK);
        }
        wait_for(2);
        engine_stats(engine, &s);
        ck_assert((s.preemptions > 0) == small);
        stop();
    }
    ck_assert_uint_gt(r[1]->n_preempted, 0);
    for (int i = 0; i < 2; i++) {
        for (int k = 0; k < OUTPUT; k++)
            ck_assert_msg(r[i]->output[k] == alone[i]->output[k] &&
                          r[i]->chosen[k].logprob == alone[i]->chosen[k].logprob,
                          "request %d differs at token %d", i, k);
        free_request(r[i]);
        free_request(alone[i]);
    }
}
END_TEST

/* Lagged selection with room for all blocks, and with room for few, against exact selection. */
START_TEST(lagged_is_exact_while_all_blocks_are_kept)
{
    static struct answer exact[N_REQUESTS], lagged[N_REQUESTS];

    for (int few = 0; few < 2; few++) {
        struct engine_config c = small_config();
        int n_differ = 0;
        c.select.keep_blocks = few ? 3 : 64;
        c.select.keep_tokens = 70;
        answers_under(&c, 1, exact);
        stop();
        c.select.selection = SELECTION_LAGGED;
        answers_under(&c, 1, lagged);
        stop();
        for (int i = 0; i < N_REQUESTS; i++)
            n_differ += memcmp(&exact[i], &lagged[i], sizeof exact[i]) != 0;
        if (few)
            ck_assert_int_gt(n_differ, 0);
        else
            assert_same(exact, lagged, "all blocks");
    }
}
END_TEST

START_TEST(a_budget_above_the_context_is_full_attention)
{
    struct engine_config c = variant_config(_i);
    int32_t prompt[300];

    random_prompt(prompt, 300, 11);
    c.select.keep_blocks = 64;
    c.select.keep_tokens = 1024;
    start(&c);
    struct request *sparse = new_request(prompt, 300, 40), *full = new_request(prompt, 300, 40);
    full->sparse = false;
    run_one(sparse);
    run_one(full);
    for (int i = 0; i < 40; i++) {
        ck_assert_int_eq(sparse->output[i], full->output[i]);
        ck_assert_float_eq_tol(sparse->chosen[i].logprob, full->chosen[i].logprob, 1e-3f);
    }
    struct engine_stats s;
    engine_stats(engine, &s);
    ck_assert_uint_eq(s.sparse_rows, 39);
    free_request(sparse);
    free_request(full);
    stop();
}
END_TEST

/* ---- stops, scoring, limits, cancelling */

START_TEST(a_stop_string_cuts_the_text)
{
    static const char *const stops[] = { "ZZZZ", "snake" };
    const int32_t prompt[] = { 361, 276, 783, 2482, 4830, 11, 1377, 530 };
    struct engine_config c = small_config();

    start(&c);
    struct request *r = new_request(prompt, 8, 24);
    r->stops = stops;
    r->n_stops = 2;
    run_one(r);                                     /* ", snake, snake, ..." */
    ck_assert_int_eq(r->finish, FINISH_STOP);
    ck_assert_int_eq(r->stopped_by_string, 1);
    ck_assert_uint_eq(r->text_bytes, 2);
    ck_assert_uint_eq(atomic_load(&r->n_output), 3);
    free_request(r);

    r = new_request(prompt, 8, 24);
    r->stops = stops;
    r->n_stops = 2;
    r->min_tokens = 4;                              /* the first "snake" is text */
    run_one(r);
    ck_assert_int_eq(r->finish, FINISH_STOP);
    ck_assert_uint_eq(r->text_bytes, 9);
    free_request(r);

    const int32_t stop_id = 530;
    r = new_request(prompt, 8, 24);
    r->ignore_eos = false;
    r->stop_ids = &stop_id;
    r->n_stop_ids = 1;
    run_one(r);
    ck_assert_int_eq(r->finish, FINISH_STOP);
    ck_assert_int_eq(r->stopped_by_id, 530);
    ck_assert_uint_eq(atomic_load(&r->n_output), 3);
    free_request(r);
    stop();
}
END_TEST

START_TEST(scores_of_a_prompt_are_those_of_decoding_it)
{
    struct engine_config c = small_config();
    int32_t prompt[190];

    random_prompt(prompt, 150, 5);
    start(&c);
    struct request *r = new_request(prompt, 150, 40);
    run_one(r);
    memcpy(prompt + 150, r->output, 40 * sizeof *prompt);
    struct request *scored = new_request(prompt, 190, 0);
    scored->score_prompt = true;
    scored->n_top = 1;
    scored->prompt_chosen = mem_calloc(190, sizeof *scored->prompt_chosen);
    scored->prompt_top = mem_calloc(190, sizeof *scored->prompt_top);
    run_one(scored);
    ck_assert_int_eq(scored->finish, FINISH_LENGTH);
    for (int i = 0; i < 40; i++) {
        ck_assert_int_eq(scored->prompt_chosen[150 + i].id, r->output[i]);
        ck_assert_float_eq_tol(scored->prompt_chosen[150 + i].logprob, r->chosen[i].logprob, 1e-4f);
        ck_assert_int_eq(scored->prompt_top[150 + i].id, r->output[i]);   /* it was greedy */
    }
    free_request(r);
    free_request(scored);
    r = new_request(prompt, 1, 0);
    r->score_prompt = true;
    r->prompt_chosen = mem_calloc(1, sizeof *r->prompt_chosen);
    run_one(r);
    ck_assert_int_eq(r->finish, FINISH_LENGTH);
    free_request(r);
    stop();
}
END_TEST

START_TEST(the_waiting_room_is_bounded_at_once)
{
    struct engine_config c = small_config();
    struct request *r[40];
    int32_t prompt[300];
    int accepted = 0;

    random_prompt(prompt, 300, 3);
    c.max_running = 1;
    c.max_waiting = 5;
    start(&c);
    for (int i = 0; i < 40; i++) {
        r[i] = new_request(prompt, 300, 100);
        if (submit_one(r[i]) == ST_OK)
            accepted++;
    }
    ck_assert_int_le(accepted, 7);
    ck_assert_int_ge(accepted, 5);
    for (int i = 0; i < 40; i++)
        engine_cancel(engine, r[i]);
    wait_for(accepted);
    assert_gauges_are_zero();
    engine_drain(engine);
    ck_assert_int_eq(submit_one(r[0]), ST_SHUTDOWN);
    for (int i = 0; i < 40; i++)
        free_request(r[i]);
    stop();
}
END_TEST

/* Requests that are handed over together are let in together, and what they tried to take is free
 * again where they are not. */
START_TEST(all_of_them_or_none)
{
    struct engine_config c = small_config();
    struct request *r[8];
    struct engine_stats s;
    int32_t prompt[300];

    random_prompt(prompt, 300, 3);
    c.max_running = 1;
    c.max_waiting = 6;
    c.max_waiting_tokens = 2000;
    c.n_shares = 2;
    c.share_thousandths = 500;
    start(&c);
    for (int i = 0; i < 8; i++) {
        r[i] = new_request(prompt, 300, 1);
        r[i]->share = 1;
    }
    ck_assert_int_eq(engine_submit(engine, r, 4), ST_QUOTA);
    for (int i = 0; i < 8; i++)
        r[i]->share = i < 4 ? 1 : 2;
    ck_assert_int_eq(engine_submit(engine, r, 8), ST_QUOTA);    /* the fourth */
    for (int i = 0; i < 8; i++)
        r[i]->share = 0;
    ck_assert_int_eq(engine_submit(engine, r, 7), ST_BUSY);
    engine_stats(engine, &s);
    ck_assert_uint_eq(s.waiting, 0);
    ck_assert_uint_eq(s.waiting_tokens, 0);
    ck_assert(engine_idle(engine));
    ck_assert_int_eq(engine_submit(engine, r, 6), ST_OK);
    wait_for(6);
    for (int i = 0; i < 8; i++) {
        ck_assert_int_eq(r[i]->finish, i < 6 ? FINISH_LENGTH : FINISH_NONE);
        free_request(r[i]);
    }
    assert_gauges_are_zero();
    stop();
}
END_TEST

/* Two of a process share the processor: each has its part of the threads and of the memory. */
START_TEST(engines_that_share_the_processor)
{
    struct engine_config c = small_config();
    struct error err;
    struct engine *other;
    struct engine_stats alone, shared;
    int32_t prompt[300];

    random_prompt(prompt, 300, 3);
    c.threads = 5;
    c.kv_bytes = 0;
    c.check_invariants = false;      /* which would write to all of the pool */
    start(&c);
    engine_stats(engine, &alone);
    ck_assert_ptr_nonnull(strstr(engine_device_name(engine), "5 threads"));
    stop();
    c.sharers = 2;
    start(&c);
    c.number = 1;
    ck_assert_msg(engine_create(&other, &c, engine_mail, &err) == ST_OK, "%s", err.text);
    engine_stats(other, &shared);
    ck_assert_ptr_nonnull(strstr(engine_device_name(other), "2 threads"));
    ck_assert_uint_le(shared.kv_blocks, alone.kv_blocks / 2 + 1);
    ck_assert_uint_ge(shared.kv_blocks, alone.kv_blocks / 2 - 1);
    struct request *r[2] = { new_request(prompt, 300, 20), new_request(prompt, 300, 20) };
    ck_assert_int_eq(submit_one(r[0]), ST_OK);
    ck_assert_int_eq(engine_submit(other, &r[1], 1), ST_OK);
    wait_for(2);
    for (uint32_t i = 0; i < 20; i++)
        ck_assert_int_eq(r[0]->output[i], r[1]->output[i]);
    free_request(r[0]);
    free_request(r[1]);
    engine_destroy(other);
    stop();
}
END_TEST

/* One caller fills its share and no more; others find room, and who leaves makes some. */
START_TEST(nobody_takes_more_than_a_share)
{
    struct engine_config c = small_config();
    struct request *r[12], *other;
    int32_t prompt[300];
    int accepted = 0;

    random_prompt(prompt, 300, 3);
    c.max_running = 1;
    c.max_waiting = 8;
    c.n_shares = 2;
    c.share_thousandths = 500;
    start(&c);
    for (int i = 0; i < 12; i++) {
        r[i] = new_request(prompt, 300, 200);
        r[i]->share = 1;
        enum status st = submit_one(r[i]);
        ck_assert(st == ST_OK || st == ST_QUOTA);
        accepted += st == ST_OK;
    }
    ck_assert_int_ge(accepted, 4);
    ck_assert_int_le(accepted, 6);
    other = new_request(prompt, 300, 1);
    other->share = 2;
    ck_assert_int_eq(submit_one(other), ST_OK);
    for (int i = 0; i < 12; i++)
        engine_cancel(engine, r[i]);
    wait_for(accepted + 1);
    assert_gauges_are_zero();
    for (int i = 0; i < 12; i++)
        free_request(r[i]);
    for (int i = 0; i < 6; i++) {       /* all that was taken has been given back */
        r[i] = new_request(prompt, 20, 1);
        r[i]->share = 1;
        run_one(r[i]);
        ck_assert_int_eq(r[i]->finish, FINISH_LENGTH);
        free_request(r[i]);
    }
    free_request(other);
    stop();
}
END_TEST

/* Cancels at random moments: everyone comes home once, the others unharmed.  That nobody keeps a
 * slot of lagged selection is checked as the engine is destroyed. */
START_TEST(cancelling_at_any_time_harms_nobody)
{
    struct engine_config c = small_config();
    struct test_random rng = test_random(9);
    enum { N = 60 };
    struct request *r[N];
    int32_t prompt[300];

    c.select.selection = (enum selection)_i;
    c.kv_bytes = 20 * BUNDLED_BLOCK_BYTES;
    c.max_model_len = 600;
    start(&c);
    for (int i = 0; i < N; i++) {
        uint32_t n = 1 + (uint32_t)random_below(&rng, 290);
        random_prompt(prompt, n, (uint64_t)(i % 4));
        r[i] = new_request(prompt, n, 1 + (uint32_t)random_below(&rng, 60));
        ck_assert_int_eq(submit_one(r[i]), ST_OK);
        if (i > 4 && random_below(&rng, 2)) {
            struct timespec pause = { .tv_nsec = 1000000L * random_below(&rng, 8) };
            nanosleep(&pause, NULL);
            engine_cancel(engine, r[i - random_below(&rng, 4)]);
        }
    }
    wait_for(N);
    for (int i = 0; i < N; i++) {
        ck_assert(r[i]->finish == FINISH_LENGTH || atomic_load(&r[i]->cancelled));
        if (r[i]->finish == FINISH_LENGTH)
            ck_assert_uint_eq(atomic_load(&r[i]->n_output), r[i]->max_tokens);
        free_request(r[i]);
    }
    assert_gauges_are_zero();
    stop();
}
END_TEST

START_TEST(destroying_sends_everybody_home)
{
    struct engine_config c = small_config();
    struct request *r[12];
    int32_t prompt[300];
    int home = 0;

    random_prompt(prompt, 300, 3);
    start(&c);
    for (int i = 0; i < 12; i++) {
        r[i] = new_request(prompt, 300, 200);
        ck_assert_int_eq(submit_one(r[i]), ST_OK);
    }
    engine_destroy(engine);
    for (struct mail_node *n = mailbox_drain(engine_mail); n; n = n->next)
        home += ((struct message *)n)->kind == MSG_DONE;
    ck_assert_int_eq(home, 12);
    mailbox_destroy(engine_mail);
    for (int i = 0; i < 12; i++)
        free_request(r[i]);
}
END_TEST

START_TEST(impossible_configurations_are_refused_with_numbers)
{
    struct engine_config c = small_config();
    struct error err;

    c.max_model_len = 200000;
    ck_assert_int_eq(engine_create(&engine, &c, NULL, &err), ST_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "131072"));
    c = small_config();
    c.max_model_len = 100000;
    ck_assert_int_eq(engine_create(&engine, &c, NULL, &err), ST_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "kv-cache-bytes"));
    c = small_config();
    c.step_tokens = 71;
    ck_assert_int_eq(engine_create(&engine, &c, NULL, &err), ST_INVALID);
    c = small_config();
    c.model_dir = "models/none";
    ck_assert_int_ne(engine_create(&engine, &c, NULL, &err), ST_OK);
    ck_assert_ptr_nonnull(strstr(err.text, "models/none"));
    c = small_config();
    c.select.index = INDEX_CHANNELS;
    ck_assert_int_eq(engine_create(&engine, &c, NULL, &err), ST_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "--calibrate"));
    c.model_dir = latent_model.dir;
    ck_assert_int_eq(engine_create(&engine, &c, NULL, &err), ST_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err.text, "latent attention"));
    ck_assert_int_eq(engine_calibrate(&c, "README.md", &err), ST_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err.text, "latent attention"));
    c = small_config();
    c.select.selection = SELECTION_LAGGED;
    c.select.layers = "0-7:dense";
    ck_assert_int_eq(engine_create(&engine, &c, NULL, &err), ST_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "selection lagged"));
    c = small_config();
    c.host_kv_bytes = 64 << 20;
    c.offload = OFFLOAD_ALWAYS;
    c.select.layers = "3-4:dense";
    ck_assert_int_eq(engine_create(&engine, &c, NULL, &err), ST_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "makes layer 3 dense"));
}
END_TEST

/* ---- grammars */

static struct grammar *grammar_of(const char *regex)
{
    struct grammar *g = NULL;
    struct error err = { .text = "" };

    ck_assert_msg(grammar_compile_regex(&g, regex, strlen(regex), NULL, &err) == ST_OK, "%s",
                  err.text);
    return g;
}

/* The output follows the grammar, and where it says so ends where that allows it. */
static void assert_follows(const struct request *r)
{
    struct grammar_matcher m;
    size_t length;

    grammar_matcher_init(&m, r->grammar);
    for (uint32_t i = 0; i < atomic_load(&r->n_output); i++) {
        if (r->output[i] == r->stopped_by_id)
            continue;
        const char *bytes = tokenizer_bytes(engine_tokenizer(engine), r->output[i], &length);
        ck_assert_msg(length > 0 && grammar_matcher_advance(&m, bytes, length), "token %u", i);
    }
    ck_assert(r->finish != FINISH_STOP || grammar_matcher_may_end(&m));
    grammar_matcher_fini(&m);
}

/* Two that outgrow the pool, as above: who is preempted goes on in its grammar where it was. */
START_TEST(a_grammar_outlives_a_preemption)
{
    enum { PROMPT = 70, OUTPUT = 500 };
    struct engine_config c = small_config();
    struct grammar *g = grammar_of("([a-z]{1,5}[,;]? |[A-Z][a-z]{3}\\. )*");
    struct request *r[2], *alone[2];
    int32_t prompt[PROMPT];
    struct engine_stats s;

    for (int small = 0; small < 2; small++) {
        struct request **here = small ? r : alone;
        if (small)
            c.kv_bytes = 16 * BUNDLED_BLOCK_BYTES;
        start(&c);
        for (int i = 0; i < 2; i++) {
            random_prompt(prompt, PROMPT, (uint64_t)i);
            here[i] = new_request(prompt, PROMPT, OUTPUT);
            here[i]->grammar = g;
            here[i]->temperature = (float)i;
            ck_assert_int_eq(submit_one(here[i]), ST_OK);
        }
        wait_for(2);
        engine_stats(engine, &s);
        ck_assert((s.preemptions > 0) == small);
        for (int i = 0; i < 2; i++) {
            assert_follows(here[i]);
            ck_assert_int_eq(here[i]->finish, FINISH_LENGTH);
        }
        stop();
    }
    ck_assert_uint_gt(r[1]->n_preempted, 0);
    for (int i = 0; i < 2; i++) {
        ck_assert(memcmp(r[i]->output, alone[i]->output, OUTPUT * sizeof(int32_t)) == 0);
        free_request(r[i]);
        free_request(alone[i]);
    }
    grammar_release(g);
}
END_TEST

/* Where nothing more is allowed the text ends, whatever min_tokens and ignore_eos say; eos comes
 * only where it may end; and bans that leave nothing are an error with a sentence. */
START_TEST(a_grammar_decides_about_the_end)
{
    struct engine_config c = small_config();
    struct grammar *word = grammar_of("(yes|no)"), *many = grammar_of("(yes )+");
    int32_t prompt[20], a = -1;

    start(&c);
    random_prompt(prompt, 20, 3);
    for (int i = 0; i < 8; i++) {
        struct request *r = new_request(prompt, 20, 40);
        r->grammar = i & 4 ? many : word;
        r->ignore_eos = i & 1;
        r->min_tokens = i & 2 ? 30 : 0;
        r->temperature = 1;
        run_one(r);
        assert_follows(r);
        ck_assert_int_eq(r->finish, i & 4 && i & 1 ? FINISH_LENGTH : r->finish);
        ck_assert(i & 4 || (r->finish == FINISH_STOP && r->stopped_by_id < 0));
        ck_assert(!(i & 4 && i & 2) || atomic_load(&r->n_output) > 30);
        free_request(r);
    }
    grammar_release(word);
    word = grammar_of("a");
    a = tokenizer_find(engine_tokenizer(engine), "a");
    struct request *r = new_request(prompt, 20, 40);
    r->grammar = word;
    r->ignore_eos = false;
    r->min_tokens = 5;
    r->stop_ids = &a;
    r->n_stop_ids = 1;
    run_one(r);
    ck_assert_int_eq(r->finish, FINISH_ERROR);
    ck_assert_int_eq(r->error.code, ST_INVALID);
    ck_assert_msg(strstr(r->error.text, "no token is left"), "%s", r->error.text);
    ck_assert_uint_eq(atomic_load(&r->n_output), 0);
    free_request(r);
    stop();
    grammar_release(word);
    grammar_release(many);
}
END_TEST

TCase *engine_case(void)
{
    TCase *tc = tcase_create("engine");

    tcase_add_test(tc, greedy_tokens_are_the_reference_s);
    tcase_add_loop_test(tc, batch_chunks_cache_and_preemption_change_nothing, 0, N_VARIANTS);
    tcase_add_loop_test(tc, who_yields_goes_on_as_if_it_had_not, 0, N_VARIANTS);
    tcase_add_test(tc, lagged_is_exact_while_all_blocks_are_kept);
    tcase_add_loop_test(tc, a_budget_above_the_context_is_full_attention, 0, N_VARIANTS);
    tcase_add_test(tc, a_stop_string_cuts_the_text);
    tcase_add_test(tc, scores_of_a_prompt_are_those_of_decoding_it);
    tcase_add_test(tc, the_waiting_room_is_bounded_at_once);
    tcase_add_test(tc, all_of_them_or_none);
    tcase_add_test(tc, engines_that_share_the_processor);
    tcase_add_test(tc, nobody_takes_more_than_a_share);
    tcase_add_loop_test(tc, cancelling_at_any_time_harms_nobody, SELECTION_EXACT,
                        SELECTION_LAGGED + 1);
    tcase_add_test(tc, a_grammar_outlives_a_preemption);
    tcase_add_test(tc, a_grammar_decides_about_the_end);
    tcase_add_test(tc, destroying_sends_everybody_home);
    tcase_add_test(tc, impossible_configurations_are_refused_with_numbers);
    return tc;
}
