/* How much of what a decode step reads a cache of rows would have found, on a real text.
 *
 *   bench-locality MODEL TEXT [tokens [steps]]
 *
 * The text is the context, its end is decoded token by token with two-level attention.  In every
 * layer the rows that each KV head chooses are put through simulated hot rows of several sizes: as
 * hot_rows.h has them, and replacing the row used longest ago, with rows fetched ahead by several
 * rules.  Fetched ahead are rows that the head did not choose but nearly did, after the step that
 * nearly chose them.
 *
 * CPU back end.  Printed are shares of the chosen rows outside the newest block, and rows fetched
 * ahead a step and head, with the share of them that was asked for before it was replaced. */

#include "engine/kv/kv_pool.h"
#include "engine/model/model.h"
#include "engine/model/tokenizer.h"
#include "tests/support/model_runner.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_SIZES = 6, N_RULES = 7, CHUNK = 512 };

static const int sizes[N_SIZES] = { 1, 2, 4, 8, 16, 32 };    /* times the tokens kept */

/* Fetched after a step, of a head: the next `near` tokens of the kept blocks; of `blocks` more
 * blocks too.  pairs: a miss brings the neighbour with which it shares a line of two rows. */
static const struct rule {
    const char *name;
    int near, blocks;
    bool pairs, ring;
} rules[N_RULES] = {
    { "the ring of hot_rows.h", 0, 0, false, true },
    { "nothing ahead", 0, 0, false, false },
    { "128 next", 128, 0, false, false },
    { "512 next", 512, 0, false, false },
    { "512 next of 32 more blocks", 512, 32, false, false },
    { "1024 next of 64 more blocks", 1024, 64, false, false },
    { "lines of two rows", 0, 0, true, false },
};

/* Rows in order of use, the newest first: a list through arrays by position. */
struct cache {
    int capacity, n, first, last;
    int *newer, *older;          /* [positions] */
    char *state;                 /* [positions]  0: not there, 1: used, 2: fetched ahead, unused */
    /* Of the ring. */
    int hand, step;
    int *row_of;                 /* [positions] */
    int *position, *used;        /* [capacity]; position -1: empty */
};

struct tally { double asked, found, ahead, ahead_used, regions; };

static struct {
    struct runner runner;
    int n_positions;
    struct cache *cache[N_RULES][N_SIZES];   /* [layers * heads] */
    struct tally tally[N_RULES][N_SIZES];
    double again, chosen;
    char *before;                /* [layers * heads, positions] chosen by the last step */
    void *scratch;
    int32_t *kept, *n_kept, *chosen_ids, *n_chosen, *near_ids, *n_near;
} b;

static void unlink_row(struct cache *c, int p)
{
    if (c->newer[p] >= 0)
        c->older[c->newer[p]] = c->older[p];
    else
        c->first = c->older[p];
    if (c->older[p] >= 0)
        c->newer[c->older[p]] = c->newer[p];
    else
        c->last = c->newer[p];
    c->n--;
}

static void put_first(struct cache *c, int p)
{
    c->newer[p] = -1;
    c->older[p] = c->first;
    if (c->first >= 0)
        c->newer[c->first] = p;
    else
        c->last = p;
    c->first = p;
    c->n++;
}

/* Whether it was there. */
static char use(struct cache *c, int p, char state)
{
    char was = c->state[p];

    if (was)
        unlink_row(c, p);
    else if (c->n == c->capacity) {
        c->state[c->last] = 0;
        unlink_row(c, c->last);
    }
    put_first(c, p);
    c->state[p] = state;
    return was;
}

/* idle: hot_idle_steps(). */
static int next_row(struct cache *c, int idle)
{
    for (;;) {
        int row = c->hand;
        c->hand = (c->hand + 1) % c->capacity;
        if (c->position[row] < 0 || c->step - c->used[row] >= idle)
            return row;
    }
}

static void step_ring(struct cache *c, struct tally *t, const int32_t *chosen, int n, int newest,
                      int idle)
{
    int region = -1;

    c->step++;
    for (int i = 0; i < n && chosen[i] < newest; i++) {  /* hits first: they stay */
        t->asked++;
        t->found += c->state[chosen[i]] != 0;
        if (c->state[chosen[i]])
            c->used[c->row_of[chosen[i]]] = c->step;
    }
    for (int i = 0; i < n && chosen[i] < newest; i++) {
        int p = chosen[i];
        if (c->state[p])
            continue;
        t->regions += p / BLOCK_TOKENS != region;
        region = p / BLOCK_TOKENS;
        int row = next_row(c, idle);
        if (c->position[row] >= 0)
            c->state[c->position[row]] = 0;
        c->position[row] = p;
        c->used[row] = c->step;
        c->row_of[p] = row;
        c->state[p] = 1;
    }
}

static void step_cache(struct cache *c, struct tally *t, const struct rule *rule,
                       const int32_t *chosen, int n, const int32_t *near, int n_near, int newest)
{
    int region = -1;

    if (rule->ring) {
        step_ring(c, t, chosen, n, newest, c->capacity / b.runner.plan.max_keep_tokens);
        return;
    }
    for (int i = 0; i < n && chosen[i] < newest; i++) {
        char was = use(c, chosen[i], 1);
        t->asked++;
        t->found += was != 0;
        t->ahead_used += was == 2;
        if (!was && chosen[i] / BLOCK_TOKENS != region) {
            region = chosen[i] / BLOCK_TOKENS;
            t->regions++;
        }
        int neighbour = chosen[i] ^ 1;
        if (rule->pairs && !was && neighbour < newest && !c->state[neighbour]) {
            use(c, neighbour, 2);
            t->ahead++;
        }
    }
    for (int i = 0; i < n_near; i++)
        if (near[i] < newest && !c->state[near[i]]) {
            use(c, near[i], 2);
            t->ahead++;
        }
}

/* ---- what a layer chooses */

static int select_rows(int layer, const struct model_batch *batch, const void *q, int q_stride,
                       int more_blocks, int near, int32_t *chosen, int32_t *n_chosen)
{
    struct runner *r = &b.runner;
    const struct backend_ops *ops = backend_ops(r->backend);
    const struct select_config *cfg = &r->plan.config;
    int heads = model_config(r->model)->heads;
    int blocks = r->plan.layer[layer].keep_blocks + more_blocks;
    int tokens = r->plan.layer[layer].keep_tokens + near;

    ops->block_filter(r->stream, &(struct block_filter_args){
        .kept = b.kept, .n_kept = b.n_kept, .q = q, .q_stride = q_stride,
        .index = kv_pool_index(r->pool, layer), .table = batch->index_table,
        .n_tokens = batch->n_tokens, .scratch = b.scratch, .shape = r->shape, .seqs = 1,
        .heads = heads, .max_blocks = r->limits.max_blocks, .keep_blocks = blocks,
        .sink_tokens = cfg->sink_tokens, .recent_tokens = cfg->recent_tokens,
        .max_n_tokens = batch->n_tokens[0] });
    ops->token_select(r->stream, &(struct token_select_args){
        .chosen = chosen, .n_chosen = n_chosen, .kept = b.kept, .n_kept = b.n_kept, .q = q,
        .q_stride = q_stride, .index = kv_pool_index(r->pool, layer),
        .table = batch->index_table, .n_tokens = batch->n_tokens, .scratch = b.scratch,
        .shape = r->shape, .seqs = 1, .heads = heads, .max_blocks = r->limits.max_blocks,
        .keep_blocks = blocks, .keep_tokens = tokens, .sink_tokens = cfg->sink_tokens,
        .recent_tokens = cfg->recent_tokens });
    return tokens;
}

static void observe(void *arg, int layer, const struct model_batch *batch, const void *q,
                    int q_stride)
{
    int heads = b.runner.shape.kv_heads, newest = batch->n_tokens[0] - 1;
    int keep = select_rows(layer, batch, q, q_stride, 0, 0, b.chosen_ids, b.n_chosen);

    (void)arg;
    newest = newest / BLOCK_TOKENS * BLOCK_TOKENS;
    for (int rule = 0; rule < N_RULES; rule++) {
        int wide = rules[rule].near ? select_rows(layer, batch, q, q_stride, rules[rule].blocks,
                                                  rules[rule].near, b.near_ids, b.n_near) : 0;
        for (int g = 0; g < heads; g++)
            for (int s = 0; s < N_SIZES; s++)
                step_cache(&b.cache[rule][s][layer * heads + g], &b.tally[rule][s], &rules[rule],
                           b.chosen_ids + g * keep, b.n_chosen[g], b.near_ids + g * wide,
                           wide ? b.n_near[g] : 0, newest);
    }
    for (int g = 0; g < heads; g++) {
        char *before = b.before + (size_t)(layer * heads + g) * (size_t)b.n_positions;
        for (int i = 0; i < b.n_chosen[g]; i++) {
            b.again += before[b.chosen_ids[g * keep + i]];
            b.chosen++;
        }
        memset(before, 0, (size_t)b.n_positions);
        for (int i = 0; i < b.n_chosen[g]; i++)
            before[b.chosen_ids[g * keep + i]] = 1;
    }
}

/* ---- */

static void stop(const char *sentence)
{
    fprintf(stderr, "benchmark: %s\n", sentence);
    exit(1);
}

static char *read_text(const char *path)
{
    FILE *f = fopen(path, "rb");
    char *text = NULL;
    size_t n = 0;

    if (!f)
        stop("the text cannot be opened");
    fseek(f, 0, SEEK_END);
    n = (size_t)ftell(f);
    rewind(f);
    text = calloc(n + 1, 1);
    if (fread(text, 1, n, f) != n)
        stop("the text cannot be read");
    fclose(f);
    return text;
}

static struct cache new_cache(int positions, int capacity)
{
    struct cache c = { .capacity = capacity, .first = -1, .last = -1 };

    c.newer = calloc((size_t)positions, sizeof *c.newer);
    c.older = calloc((size_t)positions, sizeof *c.older);
    c.state = calloc((size_t)positions, 1);
    c.row_of = calloc((size_t)positions, sizeof *c.row_of);
    c.used = calloc((size_t)capacity, sizeof *c.used);
    c.position = malloc((size_t)capacity * sizeof *c.position);
    memset(c.position, 0xff, (size_t)capacity * sizeof *c.position);
    return c;
}

static void open_caches(int lists, int positions)
{
    for (int rule = 0; rule < N_RULES; rule++)
        for (int s = 0; s < N_SIZES; s++) {
            b.cache[rule][s] = calloc((size_t)lists, sizeof(struct cache));
            for (int i = 0; i < lists; i++)
                b.cache[rule][s][i] = new_cache(positions,
                                                sizes[s] * b.runner.plan.max_keep_tokens);
        }
    b.before = calloc((size_t)lists, (size_t)positions);
}

static int argc;
static char **argv;

/* A test, because the runner asserts as tests do. */
START_TEST(measure)
{
    struct token_list ids = { 0 };
    struct tokenizer *tok = NULL;
    struct test_seq seq;
    struct error err = { 0 };
    char path[4096];

    if (argc < 3)
        stop("usage: bench-locality MODEL TEXT [tokens [steps]]");
    int n = argc > 3 ? atoi(argv[3]) : 32768, steps = argc > 4 ? atoi(argv[4]) : 256;
    snprintf(path, sizeof path, "%s/tokenizer.json", argv[1]);
    if (tokenizer_open(&tok, path, &err) != ST_OK)
        stop(err.text);
    char *text = read_text(argv[2]);
    enum status st = tokenizer_encode(tok, &ids, text, strlen(text), TOKENIZE_ADD_SPECIAL,
                                      (size_t)n);
    (void)st;
    if (ids.n < (size_t)n)
        stop("the text is too short");
    struct runner *r = &b.runner;
    runner_open(r, &(struct runner_options){ .dir = argv[1], .select = select_default(),
                                             .max_rows = CHUNK, .max_seqs = 1, .max_tokens = n });
    const struct backend_ops *ops = backend_ops(r->backend);
    int layers = model_config(r->model)->layers, heads = model_config(r->model)->heads;
    int kept = 2 * r->plan.max_keep_blocks, tokens = 2 * r->plan.max_keep_tokens;
    size_t scratch = ops->block_filter_scratch(&r->shape, 1, heads, r->limits.max_blocks);
    size_t more = ops->token_select_scratch(&r->shape, 1, heads, kept);
    b.n_positions = n;
    b.scratch = calloc(1, (scratch > more ? scratch : more) + 1);
    b.kept = calloc((size_t)(r->shape.kv_heads * kept), sizeof(int32_t));
    b.n_kept = calloc((size_t)r->shape.kv_heads, sizeof(int32_t));
    b.chosen_ids = calloc((size_t)(r->shape.kv_heads * tokens), sizeof(int32_t));
    b.n_chosen = calloc((size_t)r->shape.kv_heads, sizeof(int32_t));
    b.near_ids = calloc((size_t)(r->shape.kv_heads * tokens), sizeof(int32_t));
    b.n_near = calloc((size_t)r->shape.kv_heads, sizeof(int32_t));
    open_caches(layers * r->shape.kv_heads, n);
    seq_init(r, &seq, n);
    (void)runner_feed(r, &seq, ids.ids, n - steps, CHUNK);
    model_observe(r->model, observe, NULL);
    for (int i = 0; i < steps; i++) {
        if (i == steps / 2) {    /* the caches are warm */
            memset(b.tally, 0, sizeof b.tally);
            b.again = b.chosen = 0;
        }
        (void)runner_decode(r, &seq, ids.ids[n - steps + i], true);
    }
    double per = (double)(steps - steps / 2) * layers * r->shape.kv_heads;
    printf("%s, %d tokens, %d steps; chosen again by the next step: %.3f\n", argv[2], n,
           steps - steps / 2, b.again / b.chosen);
    printf("\n| rows, times those kept |");
    for (int s = 0; s < N_SIZES; s++)
        printf(" %d |", sizes[s]);
    printf("\n|---|---|---|---|---|---|---|\n");
    for (int rule = 0; rule < N_RULES; rule++) {
        printf("| %s: found |", rules[rule].name);
        for (int s = 0; s < N_SIZES; s++)
            printf(" %.3f |", b.tally[rule][s].found / b.tally[rule][s].asked);
        printf("\n| regions missed a step and head |");
        for (int s = 0; s < N_SIZES; s++)
            printf(" %.1f |", b.tally[rule][s].regions / per);
        printf("\n| ahead a step and head (used) |");
        for (int s = 0; s < N_SIZES; s++)
            printf(" %.0f (%.2f) |", b.tally[rule][s].ahead / per,
                   b.tally[rule][s].ahead > 0 ? b.tally[rule][s].ahead_used / b.tally[rule][s].ahead
                                              : 0);
        printf("\n");
    }
    seq_fini(r, &seq);
    runner_close(r);
}
END_TEST

int main(int n, char **words)
{
    Suite *suite = suite_create("locality");
    TCase *tc = tcase_create("locality");

    argc = n;
    argv = words;
    tcase_add_test(tc, measure);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
