/* engine/run/selection_dump.h: what the engine writes is what the operations select, and K, V and
 * queries to the bit, for which the same tokens are computed once more, by hand; and what becomes
 * of a dump that is too large. */

#include "engine/base/mem.h"
#include "engine/run/selection_dump.h"
#include "tests/support/engine_fixture.h"
#include "tests/support/engine_history.h"
#include "tests/support/model_runner.h"
#include "tests/support/temp_folder.h"

#include <check.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PROMPT = 500, OUTPUT = 40, SPARSE_STEPS = OUTPUT - 1, MAX_TOKENS = 640 };

/* ---- the file */

struct file {
    char *bytes;
    size_t n, at;
    const struct selection_header *header;
};

static struct file read_dump(const char *path)
{
    FILE *in = fopen(path, "rb");
    struct file f = { 0 };
    struct stat st;

    ck_assert_msg(in != NULL, "%s", path);
    ck_assert_int_eq(fstat(fileno(in), &st), 0);
    ck_assert_int_eq(st.st_mode & 0777, 0600);
    f.n = (size_t)st.st_size;
    f.bytes = mem_alloc(f.n + 1);
    ck_assert_uint_eq(fread(f.bytes, 1, f.n, in), f.n);
    fclose(in);
    ck_assert_uint_ge(f.n, sizeof *f.header);
    f.header = (const struct selection_header *)(const void *)f.bytes;
    f.at = sizeof *f.header;
    ck_assert_str_eq(f.header->magic, "seldump");
    ck_assert_uint_eq(f.header->version, SELECTION_DUMP_VERSION);
    return f;
}

/* NULL at the end; records are whole. */
static const struct selection_record *next_record(struct file *f)
{
    const struct selection_record *r = (const void *)(f->bytes + f->at);

    if (f->at == f->n)
        return NULL;
    ck_assert_uint_le(f->at + sizeof *r, f->n);
    ck_assert_uint_eq(r->bytes % 8, 0);
    f->at += sizeof *r + r->bytes;
    ck_assert_uint_le(f->at, f->n);
    return r;
}

/* ---- the same computed by hand, with no part of the dump */

static struct {
    struct runner runner;
    struct test_seq seq;
    struct file file;
    uint64_t sequence;               /* whose records are compared */
    const struct select_plan *plan;
    int n_steps;                     /* compared, of all layers */
    int32_t *kept, *n_kept, *chosen, *n_chosen; /* of the operations */
    int32_t *before[SELECT_MAX_LAYERS];         /* kept by the filter in the step before */
    int n_before[SELECT_MAX_LAYERS][4];
    void *scratch;
} b;

static const struct selection_record *find_step(int layer, int n_tokens)
{
    const struct selection_record *r;

    b.file.at = sizeof *b.file.header;
    while ((r = next_record(&b.file)))
        if (r->kind == SELECTION_STEP && r->sequence == b.sequence && r->layer == (uint32_t)layer &&
            r->n == (uint32_t)n_tokens)
            return r;
    return NULL;
}

/* From what the filter keeps to what a lagged step chooses among. */
static void lag(int layer, int n_tokens, int keep)
{
    const struct select_config *c = &b.plan->config;

    for (int g = 0; g < b.runner.shape.kv_heads; g++) {
        int32_t *kept = b.kept + g * keep, *stored = b.before[layer] + g * keep, now[64];
        int n = b.n_before[layer][g], n_now = b.n_kept[g], below_sinks = 0, below_recent = 0;
        struct forced_blocks f = find_forced_blocks(n_tokens, c->sink_tokens, c->recent_tokens);
        memcpy(now, kept, (size_t)keep * sizeof *now);
        for (int i = 0; i < n; i++) {
            below_sinks += stored[i] < f.sinks;
            below_recent += stored[i] < f.recent;
        }
        if (n > 0) {
            struct lagged_merge m = merge_lagged(f, below_sinks, below_recent, keep);
            for (int i = 0; i < keep; i++)
                kept[i] = i < m.n ? merged_block(m, stored, i) : -1;
            b.n_kept[g] = m.n;
        }
        memcpy(stored, now, (size_t)keep * sizeof *now);
        b.n_before[layer][g] = n_now;
    }
}

static void select_by_hand(int layer, const struct model_batch *batch, const void *q, int q_stride)
{
    struct runner *r = &b.runner;
    const struct backend_ops *ops = backend_ops(r->backend);
    const struct select_config *c = &b.plan->config;
    const struct select_layer *l = &b.plan->layer[layer];
    int heads = model_config(r->model)->heads;

    ops->block_filter(r->stream, &(struct block_filter_args){
        .kept = b.kept, .n_kept = b.n_kept, .q = q, .q_stride = q_stride,
        .index = kv_pool_index(r->pool, layer), .table = batch->index_table,
        .n_tokens = batch->n_tokens, .scratch = b.scratch, .shape = r->shape, .seqs = 1,
        .heads = heads, .max_blocks = r->limits.max_blocks, .keep_blocks = l->keep_blocks,
        .sink_tokens = c->sink_tokens, .recent_tokens = c->recent_tokens,
        .max_n_tokens = batch->n_tokens[0] });
    if (c->selection == SELECTION_LAGGED)
        lag(layer, batch->n_tokens[0], l->keep_blocks);
    ops->token_select(r->stream, &(struct token_select_args){
        .chosen = b.chosen, .n_chosen = b.n_chosen, .kept = b.kept, .n_kept = b.n_kept, .q = q,
        .q_stride = q_stride, .index = kv_pool_index(r->pool, layer),
        .table = batch->index_table, .n_tokens = batch->n_tokens, .scratch = b.scratch,
        .shape = r->shape, .seqs = 1, .heads = heads, .max_blocks = r->limits.max_blocks,
        .keep_blocks = l->keep_blocks, .keep_tokens = l->keep_tokens,
        .sink_tokens = c->sink_tokens, .recent_tokens = c->recent_tokens });
}

/* Where K and V of some blocks are not on the device: the newest is. */
static void check_places(const struct selection_record *r, const uint32_t *words, bool expected)
{
    uint32_t blocks = (r->n + BLOCK_TOKENS - 1) / BLOCK_TOKENS, newest = blocks - 1;

    ck_assert(expected || r->hot_rows == 0);
    if (r->hot_rows > 0)
        ck_assert(words[newest / 32] >> newest % 32 & 1);
}

static void observe(void *arg, int layer, const struct model_batch *batch, const void *q,
                    int q_stride)
{
    const bool *may_be_away = arg;
    const int g = b.runner.shape.kv_heads, nth = (int)b.file.header->nth_layer;
    const struct selection_record *r = find_step(layer, batch->n_tokens[0]);
    const struct select_layer *l = &b.plan->layer[layer];
    size_t query = (size_t)(model_config(b.runner.model)->heads * b.runner.shape.head_dim) * 4;

    if (layer % nth || l->dense) {
        ck_assert_ptr_null(r);
        return;
    }
    ck_assert_msg(r != NULL, "layer %d, %d tokens", layer, batch->n_tokens[0]);
    select_by_hand(layer, batch, q, q_stride);
    ck_assert_uint_eq(r->first, r->n - 1);
    ck_assert_uint_eq(r->keep_blocks, (uint32_t)l->keep_blocks);
    ck_assert_uint_eq(r->keep_tokens, (uint32_t)l->keep_tokens);
    const char *at = (const char *)(r + 1);
    ck_assert_mem_eq(at, q, query);
    at += query;
    const int32_t *sections[] = { b.n_kept, b.n_chosen, b.kept, b.chosen };
    const int widths[] = { 1, 1, l->keep_blocks, l->keep_tokens };
    for (int i = 0; i < 4; i++) {
        size_t bytes = (size_t)(g * widths[i]) * sizeof(int32_t);
        ck_assert_mem_eq(at, sections[i], bytes);
        at += bytes;
    }
    check_places(r, (const uint32_t *)(const void *)at, *may_be_away);
    b.n_steps++;
}

/* Records ROWS of a sequence in a layer are its tokens one after the other, once. */
static void compare_rows(int layer)
{
    const struct kv_shape *shape = &b.runner.shape;
    const struct selection_record *r;
    size_t row = kv_row_dim(shape) * sizeof(bf16);
    uint32_t next = 0;

    b.file.at = sizeof *b.file.header;
    while ((r = next_record(&b.file))) {
        if (r->kind != SELECTION_ROWS || r->layer != (uint32_t)layer || r->sequence != b.sequence)
            continue;
        ck_assert_uint_eq(r->first, next);
        next = r->first + r->n;
        ck_assert_uint_eq((next - 1) / BLOCK_TOKENS, r->first / BLOCK_TOKENS);
        ck_assert_uint_eq(r->bytes, (size_t)shape->kv_heads * r->n * row);
        struct block_place place = kv_pool_place(b.runner.pool,
                                                 b.seq.blocks[r->first / BLOCK_TOKENS]);
        const char *block = (const char *)kv_pool_kv(b.runner.pool, layer) +
                            (size_t)place.kv * kv_block_bytes(shape);
        for (size_t g = 0; g < (size_t)shape->kv_heads; g++)
            ck_assert_mem_eq((const char *)(r + 1) + g * r->n * row,
                             block + (g * BLOCK_TOKENS + r->first % BLOCK_TOKENS) * row,
                             r->n * row);
    }
    bool there = layer % (int)b.file.header->nth_layer == 0 && !b.plan->layer[layer].dense;
    ck_assert_uint_eq(next, there ? PROMPT + SPARSE_STEPS : 0);
}

static void open_runner(const struct engine_config *c)
{
    struct runner *r = &b.runner;

    memset(&b, 0, sizeof b);
    runner_open(r, &(struct runner_options){ .dir = c->model_dir, .select = c->select,
                                             .max_rows = 256, .max_seqs = 1,
                                             .max_tokens = MAX_TOKENS });
    const struct backend_ops *ops = backend_ops(r->backend);
    int heads = model_config(r->model)->heads, g = r->shape.kv_heads;
    int keep = r->plan.max_keep_blocks, tokens = r->plan.max_keep_tokens;
    size_t filter = ops->block_filter_scratch(&r->shape, 1, heads, r->limits.max_blocks);
    size_t select = ops->token_select_scratch(&r->shape, 1, heads, keep);

    b.plan = &r->plan;
    b.scratch = mem_calloc(1, filter > select ? filter : select);
    b.kept = mem_calloc((size_t)(g * keep), sizeof(int32_t));
    b.n_kept = mem_calloc((size_t)g, sizeof(int32_t));
    b.chosen = mem_calloc((size_t)(g * tokens), sizeof(int32_t));
    b.n_chosen = mem_calloc((size_t)g, sizeof(int32_t));
    for (int layer = 0; layer < r->plan.n_layers; layer++)
        b.before[layer] = mem_calloc((size_t)(g * keep), sizeof(int32_t));
    seq_init(r, &b.seq, MAX_TOKENS);
}

static void close_runner(void)
{
    for (int layer = 0; layer < b.plan->n_layers; layer++)
        mem_free(b.before[layer]);
    void *all[] = { b.scratch, b.kept, b.n_kept, b.chosen, b.n_chosen, b.file.bytes };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        mem_free(all[i]);
    seq_fini(&b.runner, &b.seq);
    runner_close(&b.runner);
}

/* The request's tokens through the runner, step by step beside the file. */
static void compare(const struct engine_config *c, const struct request *done, uint64_t sequence,
                    bool may_be_away)
{
    open_runner(c);
    b.file = read_dump(c->selection_dump);
    b.sequence = sequence;
    runner_feed(&b.runner, &b.seq, done->prompt, PROMPT, 256);
    model_observe(b.runner.model, observe, &may_be_away);
    for (int i = 0; i < SPARSE_STEPS; i++)
        runner_decode(&b.runner, &b.seq, done->output[i], true);
    int layers = 0;
    for (int layer = 0; layer < b.plan->n_layers; layer++) {
        layers += layer % (int)c->selection_dump_nth_layer == 0 && !b.plan->layer[layer].dense;
        compare_rows(layer);
    }
    ck_assert_int_eq(b.n_steps, SPARSE_STEPS * layers);
    close_runner();
}

static struct engine_config dump_config(void)
{
    struct engine_config c = small_config();

    c.selection_dump = temp_path("steps.dump");
    c.selection_dump_bytes = 512 << 20;
    c.selection_dump_nth_layer = 1;
    return c;
}

static struct request *text_request(uint64_t seed, uint32_t n_prompt, uint32_t max_tokens)
{
    int32_t ids[PROMPT];

    random_prompt(ids, n_prompt, seed);
    return new_request(ids, n_prompt, max_tokens);
}

/* ---- what is in it */

static const struct {
    const char *dir, *layers;
    uint32_t nth;
    enum selection selection;
} kinds[] = {
    { BUNDLED_MODEL, NULL, 1, SELECTION_EXACT },
    { BUNDLED_MODEL, "0:dense;6:blocks=5,tokens=130", 3, SELECTION_EXACT },
    { BUNDLED_MODEL, NULL, 1, SELECTION_LAGGED },
    { "build/models/glm4-moe-lite", NULL, 1, SELECTION_EXACT },
    { "build/models/glm4-moe-lite", NULL, 2, SELECTION_LAGGED },
};
enum { N_KINDS = sizeof kinds / sizeof kinds[0] };

START_TEST(records_are_what_was_computed)
{
    struct engine_config c = dump_config();

    c.model_dir = kinds[_i].dir;
    c.select.layers = kinds[_i].layers;
    c.select.selection = kinds[_i].selection;
    c.selection_dump_nth_layer = kinds[_i].nth;
    start(&c);
    struct request *r = text_request(1, PROMPT, OUTPUT);
    run_one(r);
    stop();
    struct file f = read_dump(c.selection_dump);
    const struct selection_record *first = next_record(&f);
    ck_assert_ptr_nonnull(first);
    uint64_t sequence = first->sequence;
    mem_free(f.bytes);
    compare(&c, r, sequence, false);
    free_request(r);
}
END_TEST

/* All of a prompt that is found in host memory, and what is sealed of an answer, is read there. */
START_TEST(rows_come_out_of_the_host_tier)
{
    struct engine_config c = dump_config();
    const struct selection_record *r;
    uint64_t sequences[2] = { 0, 0 };
    int away = 0;

    c.host_kv_bytes = 100 * BUNDLED_BLOCK_BYTES;
    c.offload = OFFLOAD_ALWAYS;
    c.max_model_len = MAX_TOKENS;
    c.offload_sequences = 2;
    start(&c);
    wait_for_host_memory(100);
    struct request *one = text_request(1, PROMPT, OUTPUT), *two = text_request(1, PROMPT, OUTPUT);
    run_one(one);
    run_one(two);
    stop();
    ck_assert_uint_gt(two->n_cached, 0);
    struct file f = read_dump(c.selection_dump);
    sequences[0] = next_record(&f)->sequence;
    while ((r = next_record(&f))) {
        if (r->sequence == sequences[0])
            continue;
        sequences[1] = r->sequence;
        if (r->kind != SELECTION_STEP || r->hot_rows == 0)
            continue;
        const char *places = (const char *)(r + 1) + r->bytes - 8;  /* a word and padding, or not */
        away += !(places[0] & 1) && !(places[4] & 1);
    }
    mem_free(f.bytes);
    ck_assert_int_gt(away, 0);
    for (int i = 0; i < 2; i++)
        compare(&c, i ? two : one, sequences[i], true);
    free_request(one);
    free_request(two);
}
END_TEST

/* Two that outgrow the pool: the one that is preempted computes again what is in the file. */
START_TEST(what_is_computed_again_is_not_repeated)
{
    struct engine_config c = dump_config();
    struct request *r[2];
    uint32_t next[2][8] = { { 0 } }, steps[2] = { 0 };
    const struct selection_record *record;

    c.kv_bytes = 14 * BUNDLED_BLOCK_BYTES;
    c.max_model_len = 13 * 64;
    c.select.selection = SELECTION_LAGGED;       /* whose preempted compute all of it again */
    start(&c);
    for (int i = 0; i < 2; i++) {
        r[i] = text_request(1 + (uint64_t)i, 350, 200);
        ck_assert_int_eq(submit_one(r[i]), ST_OK);
    }
    wait_for(2);
    stop();
    ck_assert_uint_gt(r[1]->n_preempted, 0);
    struct file f = read_dump(c.selection_dump);
    uint64_t first = next_record(&f)->sequence;
    f.at = sizeof *f.header;
    while ((record = next_record(&f))) {
        uint32_t *n = &next[record->sequence != first][record->layer];
        if (record->kind == SELECTION_ROWS) {
            ck_assert_uint_eq(record->first, *n);
            *n += record->n;
            continue;
        }
        ck_assert_uint_eq(record->n, *n);
        steps[record->sequence != first] += record->layer == 7;
    }
    mem_free(f.bytes);
    for (int i = 0; i < 2; i++) {
        ck_assert_uint_eq(steps[i], 199);
        free_request(r[i]);
    }
}
END_TEST

/* ---- its size */

/* The answer of an engine, with a dump or without. */
static struct request *answer(const struct engine_config *c)
{
    start(c);
    struct request *r = text_request(1, PROMPT, OUTPUT);
    run_one(r);
    stop();
    return r;
}

static void assert_same_answer(const struct request *a, const struct request *want)
{
    ck_assert_int_eq(a->finish, FINISH_LENGTH);
    for (int i = 0; i < OUTPUT; i++) {
        ck_assert_int_eq(a->output[i], want->output[i]);
        ck_assert(a->chosen[i].logprob == want->chosen[i].logprob);
    }
}

/* Steps of each layer; of layers that are there the same number, or with a cut one fewer. */
static int count_steps(const char *path, size_t most_bytes, bool cut)
{
    struct file f = read_dump(path);
    const struct selection_record *r;
    int steps[8] = { 0 };

    ck_assert_uint_le(f.n, most_bytes);
    while ((r = next_record(&f)))
        steps[r->layer] += r->kind == SELECTION_STEP;
    for (int layer = 1; layer < 8; layer++)
        ck_assert(steps[layer] == steps[0] || (cut && steps[layer] == steps[0] - 1));
    mem_free(f.bytes);
    return steps[0];
}

START_TEST(a_full_dump_ends_and_the_engine_goes_on)
{
    struct engine_config c = dump_config();
    uint64_t rows = 8 * 2 * 2 * 128 * 2, step = 8 * (4 * 128 * 4 + 4 * 2 * (2 + 4 + 96));

    c.selection_dump = NULL;
    struct request *want = answer(&c);
    c.selection_dump = temp_path("full.dump");
    /* Room for the context and ten steps, not eleven. */
    c.selection_dump_bytes = sizeof(struct selection_header) +
                             (PROMPT + 10) * rows + 8 * 7 * sizeof(struct selection_record) +
                             10 * (step + 8 * 2 * sizeof(struct selection_record));
    struct request *r = answer(&c);
    assert_same_answer(r, want);
    ck_assert_int_eq(count_steps(c.selection_dump, c.selection_dump_bytes, false), 10);
    free_request(r);
    c.selection_dump = temp_path("empty.dump");
    c.selection_dump_bytes = 4096;               /* not one step: nothing is left behind */
    r = answer(&c);
    assert_same_answer(r, want);
    ck_assert_int_ne(access(c.selection_dump, F_OK), 0);
    free_request(r);
    free_request(want);
}
END_TEST

/* As on a disk that others have filled. */
START_TEST(a_failed_write_ends_the_dump_and_not_the_engine)
{
    struct engine_config c = dump_config();
    struct rlimit was, limit;
    size_t most = 2 << 20;                       /* less than the context takes */

    c.selection_dump = NULL;
    struct request *want = answer(&c);
    c.selection_dump = temp_path("cut.dump");
    ck_assert_int_eq(getrlimit(RLIMIT_FSIZE, &was), 0);
    limit = was;
    limit.rlim_cur = most;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    struct request *r = answer(&c);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &was), 0);
    signal(SIGXFSZ, handler);
    assert_same_answer(r, want);
    count_steps(c.selection_dump, most, true);
    free_request(r);
    free_request(want);
}
END_TEST

static void assert_refused(const struct engine_config *c, const char *sentence)
{
    struct error err = { 0 };

    ck_assert_int_ne(engine_create(&engine, c, NULL, &err), ST_OK);
    ck_assert_msg(strstr(err.text, sentence) != NULL, "%s", err.text);
}

START_TEST(what_cannot_be_written_is_refused_at_the_start)
{
    struct engine_config c = dump_config();
    struct stat st;

    c.selection_dump = temp_path("none/steps.dump");
    assert_refused(&c, "none/steps.dump: No such file or directory");
    c.selection_dump = temp_file("there", "text", 4);
    assert_refused(&c, "there: File exists");
    ck_assert_int_eq(stat(c.selection_dump, &st), 0);
    ck_assert_int_eq(st.st_size, 4);
    c.selection_dump = temp_path("large.dump");
    c.selection_dump_bytes = UINT64_C(1) << 60;
    assert_refused(&c, "selection-dump-bytes is 1099511627776 MB");
    ck_assert_int_ne(access(c.selection_dump, F_OK), 0);
    c = dump_config();
    c.select.layers = "0:dense;7:dense";
    c.selection_dump_nth_layer = 7;
    assert_refused(&c, "layer-exceptions");
    c = dump_config();
    c.max_model_len = 200000;                    /* refused for something else */
    assert_refused(&c, "131072");
    ck_assert_int_ne(access(c.selection_dump, F_OK), 0);
}
END_TEST

TCase *selection_dump_case(void)
{
    TCase *tc = tcase_create("selection_dump");

    tcase_set_timeout(tc, 120);
    tcase_add_checked_fixture(tc, temp_folder_create, temp_folder_remove);
    tcase_add_loop_test(tc, records_are_what_was_computed, 0, N_KINDS);
    tcase_add_test(tc, rows_come_out_of_the_host_tier);
    tcase_add_test(tc, what_is_computed_again_is_not_repeated);
    tcase_add_test(tc, a_full_dump_ends_and_the_engine_goes_on);
    tcase_add_test(tc, a_failed_write_ends_the_dump_and_not_the_engine);
    tcase_add_test(tc, what_cannot_be_written_is_refused_at_the_start);
    return tc;
}
