#include "tests/support/engine_history.h"

#include "engine/base/clock.h"
#include "engine/base/mem.h"
#include "engine/kv/hot_sets.h"
#include "engine/kv/kv_pool.h"
#include "engine/model/model_config.h"
#include "engine/model/tokenizer.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <glob.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum {
    MOST_INSIDE = 13,                /* of the engine at a time */
    PROSE_STEP = 700,                /* tokens between the beginnings of two texts of prose */
    KEPT_BLOCKS = 4, KEPT_TOKENS = 96,
};

struct answer {
    int32_t ids[HISTORY_MAX_OUTPUT];
    float logprobs[HISTORY_MAX_OUTPUT];
};

struct engine_history small_history(uint64_t seed, uint32_t scale, enum selection selection)
{
    return (struct engine_history){
        .seed = seed, .selection = selection, .scale = scale, .max_prompt = 430 * scale,
        .max_len = 640 * scale, .keep_blocks = KEPT_BLOCKS, .keep_tokens = KEPT_TOKENS,
        .n_texts = 5,
    };
}

static const char *dir_of(const struct engine_history *h)
{
    return h->dir ? h->dir : BUNDLED_MODEL;
}

void pause_us(int us)
{
    struct timespec pause = { .tv_nsec = 1000L * us };

    nanosleep(&pause, NULL);
}

/* ---- texts */

/* This program's own documentation, then what its headers say, then its code: English prose of
 * technical kind, ever more mixed with C, and the longest text there is here. */
static const char *const pages[] = {
    "README.md", "docs/*.md", "engine/*.h", "kernels/*.h", "engine/*/*.h", "engine/*/*.c",
    "kernels/cpu/*.c", "server/*.c",
};
enum { N_PAGES = sizeof pages / sizeof pages[0] };

static struct {
    const char *dir;                 /* whose tokens these are */
    struct token_list ids;
} prose;

static void append_file(const struct tokenizer *tok, const char *path)
{
    FILE *f = fopen(path, "rb");

    ck_assert_msg(f != NULL, "%s", path);
    ck_assert_int_eq(fseek(f, 0, SEEK_END), 0);
    size_t n = (size_t)ftell(f);
    char *text = mem_alloc(n + 1);
    rewind(f);
    ck_assert_uint_eq(fread(text, 1, n, f), n);
    fclose(f);
    ck_assert_int_eq(tokenizer_encode(tok, &prose.ids, text, n, TOKENIZE_NO_ADDED, 0), ST_OK);
    mem_free(text);
}

/* At least so many tokens of the model's. */
static void read_prose(const struct engine_history *h, size_t n)
{
    struct tokenizer *tok;
    char path[1024];

    if (prose.dir == dir_of(h) && prose.ids.n >= n)
        return;
    prose.dir = dir_of(h);
    prose.ids.n = 0;
    snprintf(path, sizeof path, "%s/tokenizer.json", prose.dir);
    ck_assert_int_eq(tokenizer_open(&tok, path, NULL), ST_OK);
    for (int i = 0; i < N_PAGES && prose.ids.n < n; i++) {
        glob_t found;
        ck_assert_msg(glob(pages[i], 0, NULL, &found) == 0, "no %s here", pages[i]);
        for (size_t k = 0; k < found.gl_pathc && prose.ids.n < n; k++)
            append_file(tok, found.gl_pathv[k]);
        globfree(&found);
    }
    tokenizer_close(tok);
    ck_assert_uint_ge(prose.ids.n, n);
}

/* Few texts, so that prefixes are shared: prose from several places, and noise between. */
static void text_of(const struct engine_history *h, int32_t *ids, uint32_t n, int text)
{
    size_t from = (size_t)(text / 2) * PROSE_STEP;

    if (text % 2)
        random_prompt(ids, n, (uint64_t)text);
    else {
        read_prose(h, from + n);
        memcpy(ids, prose.ids.ids + from, n * sizeof *ids);
    }
}

/* ---- requests */

static uint32_t random_length(const struct engine_history *h, struct test_random *rng)
{
    static const int percent[] = { 1, 30, 30, 47, 47, 70, 100 };
    const int most = (int)h->max_prompt * percent[random_below(rng, 7)] / 100;

    return 1 + (uint32_t)random_below(rng, most > 1 ? most : 1);
}

/* With prompts_first: 2 to 4 tokens more than whole blocks, and long, as each is computed once. */
static uint32_t long_length(const struct engine_history *h, struct test_random *rng, bool longest)
{
    static const int percent[] = { 10, 60, 100 };
    const int most = (int)h->max_prompt * percent[longest ? 2 : random_below(rng, 3)] / 100;
    const int tokens = longest ? most : most / 2 + random_below(rng, most / 2);
    const int blocks = tokens > 3 * BLOCK_TOKENS ? tokens / BLOCK_TOKENS : 3;

    return (uint32_t)((blocks - 1) * BLOCK_TOKENS + 2 + random_below(rng, 3));
}

/* Some have the prompt of the one before and share its group. */
struct request *history_request(const struct engine_history *h, int i)
{
    bool grouped = i % 6 == 4 || i % 6 == 5;
    struct test_random rng = test_random(h->seed * 1000 + (uint64_t)i);
    struct test_random text = test_random(h->seed * 1000 + 500 + (grouped ? 4 + i / 6 * 6 : i));
    uint32_t n = h->prompts_first ? long_length(h, &text, i == 0) : random_length(h, &text);
    int32_t *prompt = mem_alloc(n * sizeof *prompt);

    text_of(h, prompt, n, random_below(&text, h->n_texts));
    struct request *r = new_request(prompt, n,
                                    1 + (uint32_t)random_below(&rng, HISTORY_MAX_OUTPUT - 1));
    mem_free(prompt);
    r->group = grouped ? (uint64_t)(i / 6 + 1) : 0;
    r->sparse = random_below(&rng, 6) > 0 || h->prompts_first;
    r->temperature = random_below(&rng, 2) ? 0.8f : 0;
    r->seed = random_u64(&rng);
    r->presence = random_below(&rng, 8) ? 0 : 0.5f;
    r->cache_salt = random_below(&rng, 8) || h->prompts_first ? 0 : 5;
    return r;
}

/* Each prompt once, and the next when all of it is stored: else a slice of the next one is as short
 * as there is room beside what is still being copied. */
static void compute_prompts(const struct engine_history *h)
{
    for (int i = 0; i < HISTORY_REQUESTS; i++) {
        struct request *r = history_request(h, i);
        r->max_tokens = 1;
        r->group = 0;
        run_one(r);
        ck_assert_msg(r->finish == FINISH_LENGTH, "prompt %d ended with %d: %s", i, r->finish,
                      r->error.text);
        free_request(r);
        assert_gauges_are_zero();
    }
}

/* Submit all, no more than MOST_INSIDE at a time, and wait.  With cancels some are, whenever. */
static void play(const struct engine_history *h, bool cancels, struct request *r[])
{
    struct test_random rng = test_random(h->seed + 77);
    int inside = 0;

    for (int i = 0; i < HISTORY_REQUESTS; i++)
        r[i] = history_request(h, i);
    if (h->prompts_first)
        compute_prompts(h);
    for (int i = 0; i < HISTORY_REQUESTS; i++) {
        ck_assert_int_eq(submit_one(r[i]), ST_OK);
        for (inside++; inside >= MOST_INSIDE;)
            inside -= collect_mail();
        if (random_below(&rng, 3) == 0)
            pause_us(random_below(&rng, 20000));
        if (cancels && random_below(&rng, 3) == 0)
            engine_cancel(engine, r[i - random_below(&rng, i < 8 ? i + 1 : 8)]);
    }
    wait_for(inside);
}

/* ---- engines */

/* Blocks of all that a history with prompts_first ever computes: texts, one longest each, and what
 * is written to them, prompts' ends included. */
static uint32_t blocks_of_all(const struct engine_history *h)
{
    return (uint32_t)h->n_texts * (h->max_prompt / BLOCK_TOKENS + 1) +
           HISTORY_REQUESTS * (HISTORY_MAX_OUTPUT / BLOCK_TOKENS + 2);
}

static uint32_t longest_blocks(const struct engine_history *h)
{
    return (h->max_len + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

static struct engine_config config_of(const struct engine_history *h)
{
    struct engine_config c = small_config();

    c.model_dir = dir_of(h);
    c.backend = h->backend ? h->backend : c.backend;
    c.max_model_len = h->max_len;
    c.select.selection = h->selection;
    c.select.keep_blocks = (int)h->keep_blocks;
    c.select.keep_tokens = (int)h->keep_tokens;
    c.select.crossover_tokens = 100;
    c.max_running = h->prompts_first ? HISTORY_FIRST_RUNNING : 12;
    if (h->prompts_first)
        c.step_tokens = h->step_tokens;
    return c;
}

static uint32_t at_most(uint32_t n, uint32_t most)
{
    return n < most ? n : most;
}

static uint32_t host_blocks_of(const struct engine_history *h, const struct history_kind *k)
{
    return k->host_blocks ? k->host_blocks * h->scale : blocks_of_all(h);
}

static struct model_config model_of(const struct engine_history *h)
{
    struct model_config m;

    ck_assert_msg(model_config_read(&m, dir_of(h), NULL) == ST_OK, "%s", dir_of(h));
    return m;
}

/* With the formats of small_config(). */
static struct kv_shape shape_of(const struct model_config *m)
{
    struct kv_shape shape = { .kv_heads = m->kv_heads, .head_dim = m->head_dim,
                              .filter = FILTER_COARSE, .index = INDEX_ROTATED };

    if (m->latent.dim) {
        shape.kv_heads = 1;
        shape.head_dim = m->latent.dim + m->latent.rope;
        shape.latent_dim = m->latent.dim;
    }
    return shape;
}

/* The engine divides kv_bytes; this is that it divides into so many blocks. */
struct engine_config history_config(const struct engine_history *h, const struct history_kind *k)
{
    struct engine_config c = config_of(h);
    const struct model_config m = model_of(h);
    const uint32_t blocks = k->blocks * h->scale, host_blocks = host_blocks_of(h, k);
    const uint32_t longest = longest_blocks(h), contexts = host_blocks / longest;
    uint32_t sets = at_most(k->sequences ? k->sequences : contexts ? contexts : 1, c.max_running);
    struct hot_sets_config hot = {
        .sets = (int)sets, .layers = m.layers,
        .rows_per_head = (int)(k->hot_rows ? k->hot_rows : 4 * h->keep_tokens),
        .max_blocks = (int)longest, .shape = shape_of(&m),
    };
    const size_t block = kv_pool_bytes_per_block(&hot.shape, m.layers);

    c.kv_bytes = (uint64_t)blocks * block + hot_sets_bytes(&hot) +
                 (uint64_t)at_most(sets * longest, host_blocks) * (uint64_t)m.layers *
                     index_block_bytes(&hot.shape);
    if (blocks < longest)            /* the two buffers of what is streamed */
        c.kv_bytes += 2 * (uint64_t)longest * kv_block_bytes(&hot.shape);
    c.host_kv_bytes = (uint64_t)host_blocks * block;
    if (k->step_tokens && !h->prompts_first)
        c.step_tokens = k->step_tokens * h->scale;
    c.offload = k->offload;
    c.offload_sequences = sets;
    c.hot_rows = (uint32_t)hot.rows_per_head;
    c.prefix_cache = !k->no_prefix_cache;
    return c;
}

/* A model of few layers does not stream: two buffers of a layer take as much as the context. */
static bool is_possible(const struct engine_history *h, const struct history_kind *k)
{
    const uint32_t layers = (uint32_t)model_of(h).layers, blocks = k->blocks * h->scale;
    const uint32_t longest = longest_blocks(h);

    return blocks >= longest || blocks * layers + 2 * longest < longest * layers;
}

static struct engine_config reference_config(const struct engine_history *h)
{
    struct engine_config c = config_of(h);
    const struct model_config m = model_of(h);
    const struct kv_shape shape = shape_of(&m);

    if (!h->prompts_first)
        c.step_tokens = 1024;
    c.kv_bytes = (h->prompts_first ? blocks_of_all(h) : 15ull * longest_blocks(h)) *
                 kv_pool_bytes_per_block(&shape, m.layers);
    return c;
}

bool copy_delay(void *delay, uint64_t number)
{
    struct copy_delay *d = delay;
    struct test_random rng = { d->random };

    (void)number;
    if (random_below(&rng, 2))
        pause_us(random_below(&rng, d->most_us));
    d->random = rng.state;
    return true;
}

/* ---- what is compared */

static int what_happened(const struct engine_stats *s)
{
    uint64_t misses = 0;

    for (int i = 0; i < SELECT_MAX_LAYERS; i++)
        misses += s->hot[i].misses;
    return (s->n_offloads ? OFFLOADS : 0) | (s->n_returns ? RETURNS : 0) |
           (s->bytes_loaded ? LOADS : 0) | (s->preemptions ? PREEMPTIONS : 0) |
           (misses ? MISSES : 0);
}

/* That what makes bits comparable has been so (engine_history.h, 2). */
static void check_prompt_was_found(const struct request *r, const char *name, int i)
{
    if (r->finish == FINISH_LENGTH)
        ck_assert_msg(r->n_cached == r->n_prompt / BLOCK_TOKENS * BLOCK_TOKENS,
                      "%s: of the %u tokens of prompt %d only %u were found", name, r->n_prompt, i,
                      r->n_cached);
}

/* The largest logprob moves no more than any, whichever token has it. */
static void check_is_close(const struct request *r, const struct answer *want,
                           double tolerance, const char *name, int i)
{
    if (r->temperature > 0 || atomic_load(&r->n_output) == 0)
        return;
    ck_assert_msg(fabs((double)r->chosen[0].logprob - (double)want->logprobs[0]) <= tolerance,
                  "%s: the first token of request %d has logprob %.5f, not %.5f", name, i,
                  (double)r->chosen[0].logprob, (double)want->logprobs[0]);
}

static void check_bits(const struct request *r, const struct answer *want,
                       const char *name, uint64_t seed, int i)
{
    for (uint32_t k = 0; k < atomic_load(&r->n_output); k++)
        ck_assert_msg(r->output[k] == want->ids[k] && r->chosen[k].logprob == want->logprobs[k],
                      "%s, seed %d: request %d of %u tokens differs at token %u: %d %.9g, not %d "
                      "%.9g", name, (int)seed, i, r->n_prompt, k, r->output[k],
                      (double)r->chosen[k].logprob, want->ids[k], (double)want->logprobs[k]);
}

static void check_answer(const struct engine_history *h, const struct request *r,
                         const struct answer *want, const char *name, int i)
{
    ck_assert_msg(r->finish == FINISH_LENGTH ||
                  (r->finish == FINISH_CANCELLED && atomic_load(&r->cancelled)),
                  "%s, seed %d: request %d ended with %d: %s", name, (int)h->seed, i, r->finish,
                  r->error.text);
    if (r->finish == FINISH_LENGTH)
        ck_assert_uint_eq(atomic_load(&r->n_output), r->max_tokens);
    if (h->prompts_first)
        check_prompt_was_found(r, name, i);
    if (h->tolerance > 0)
        check_is_close(r, want, h->tolerance, name, i);
    else
        check_bits(r, want, name, h->seed, i);
}

void wait_for_host_memory(uint32_t blocks)
{
    const uint64_t began_ns = clock_now_ns();
    struct engine_stats s;

    for (engine_stats(engine, &s); s.host_blocks < blocks; engine_stats(engine, &s)) {
        ck_assert_msg(clock_now_ns() - began_ns < 120ull * 1000 * 1000 * 1000,
                      "%u of %u host blocks", s.host_blocks, blocks);
        pause_us(1000);
    }
}

/* The answers of the engine with room for all. */
static void reference(const struct engine_history *h, struct answer out[HISTORY_REQUESTS])
{
    struct engine_config c = reference_config(h);
    struct request *r[HISTORY_REQUESTS];
    struct engine_stats s;

    start(&c);
    play(h, false, r);
    assert_gauges_are_zero();
    engine_stats(engine, &s);
    ck_assert_uint_eq(s.preemptions, 0);
    ck_assert_uint_gt(s.sparse_rows, 300);
    ck_assert(!s.host_tier);
    for (int i = 0; i < HISTORY_REQUESTS; i++) {
        ck_assert_int_eq(r[i]->finish, FINISH_LENGTH);
        if (h->prompts_first)
            check_prompt_was_found(r[i], "reference", i);
        for (uint32_t k = 0; k < r[i]->max_tokens; k++) {
            out[i].ids[k] = r[i]->output[k];
            out[i].logprobs[k] = r[i]->chosen[k].logprob;
        }
        free_request(r[i]);
    }
    stop();
}

/* Play it against another one and compare.  What happened. */
static int hold_against(const struct engine_history *h, const struct history_kind *k,
                        const struct answer want[HISTORY_REQUESTS])
{
    struct copy_delay delay = { h->seed, k->delay_us };
    struct engine_config c = history_config(h, k);
    struct request *r[HISTORY_REQUESTS];
    struct engine_stats s;

    if (k->delay_us) {
        c.before_copy = copy_delay;
        c.before_copy_arg = &delay;
    }
    start(&c);
    wait_for_host_memory(host_blocks_of(h, k));
    play(h, k->cancels, r);
    for (int i = 0; i < HISTORY_REQUESTS; i++) {
        check_answer(h, r[i], &want[i], k->name, i);
        free_request(r[i]);
    }
    assert_gauges_are_zero();
    engine_stats(engine, &s);
    ck_assert_uint_eq(s.kv_blocks, k->blocks * h->scale);
    ck_assert_uint_eq(s.host_blocks, host_blocks_of(h, k));
    ck_assert_msg(h->tolerance > 0 || (what_happened(&s) & k->must) == k->must,
                  "%s, seed %d: of %d only %d happened", k->name, (int)h->seed, k->must,
                  what_happened(&s));
    stop();
    return what_happened(&s);
}

/* ---- what is played */

static const struct history_kind mixed[] = {
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
enum { N_MIXED = sizeof mixed / sizeof mixed[0] };

int history_play_mixed(const struct engine_history *h)
{
    static struct answer want[HISTORY_REQUESTS];
    int happened = 0;

    reference(h, want);
    for (int i = 0; i < N_MIXED; i++)
        if (is_possible(h, &mixed[i]))
            happened |= hold_against(h, &mixed[i], want);
    return happened;
}

void history_play_long(const struct engine_history *h)
{
    static struct answer want[HISTORY_REQUESTS];
    /* The longest and a little; what a step that streams needs, with which alone_tokens() is none
     * but step_tokens. */
    const uint32_t one = longest_blocks(h) + 4, least = 2 * (h->step_tokens / BLOCK_TOKENS + 2);
    const struct history_kind kinds[] = {
        { "all leave", 2 * one, .offload = OFFLOAD_ALWAYS, .must = OFFLOADS | MISSES },
        { "one fits, cancels", one, .cancels = true, .must = LOADS },
        { "one fits, slow copies", one, .delay_us = 1000, .must = LOADS },
        { "streamed", least, .must = MISSES },
        { "streamed one at a time, cancels", least, .sequences = 1, .cancels = true,
          .must = MISSES },
    };

    ck_assert(h->prompts_first && h->scale == 1);
    ck_assert_uint_ge(h->max_prompt, 2 * least * BLOCK_TOKENS);
    reference(h, want);
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
        if (is_possible(h, &kinds[i]))
            hold_against(h, &kinds[i], want);
}
