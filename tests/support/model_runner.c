#include "tests/support/model_runner.h"

#include "tests/support/backend_fixture.h"

#include <check.h>
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int blocks_of(int tokens)
{
    return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

void runner_open(struct runner *r, const struct runner_options *o)
{
    struct backend *be = o->backend ? o->backend : test_backend(o->isa ? o->isa : "auto");
    struct error err = { 0 };

    ck_assert_ptr_nonnull(be);
    memset(r, 0, sizeof *r);
    ck_assert_msg(model_open(&r->model, be, o->dir, NULL, &err) == ST_OK, "%s", err.text);
    int layers = model_config(r->model)->layers;
    struct kv_shape shape = model_kv_shape(r->model, &o->select);
    ck_assert_msg(select_plan_init(&r->plan, &o->select, &shape, layers, o->channels, &err)
                  == ST_OK, "%s", err.text);
    r->limits = (struct model_limits){
        .max_rows = o->max_rows,
        .max_seqs = o->max_seqs,
        .max_logit_rows = o->max_logit_rows ? o->max_logit_rows : o->max_seqs,
        .max_blocks = blocks_of(o->max_tokens),
    };
    ck_assert_msg(model_prepare(r->model, &r->limits, &r->plan, &err) == ST_OK, "%s", err.text);
    struct kv_pool_config pool = {
        .blocks = (uint32_t)(r->limits.max_blocks * o->max_seqs),
        .layers = layers,
        .shape = shape,
    };
    ck_assert_msg(kv_pool_create(&r->pool, be, &pool, &err) == ST_OK, "%s", err.text);
    if (backend_info(be)->host_visible)
        kv_pool_poison(r->pool, true, NULL);
    r->stream = stream_create(be);
}

void runner_close(struct runner *r)
{
    stream_destroy(r->stream);
    kv_pool_destroy(r->pool);
    model_close(r->model);
}

void seq_init(struct runner *r, struct test_seq *seq, int max_tokens)
{
    seq->n_tokens = 0;
    seq->n_blocks = blocks_of(max_tokens);
    seq->blocks = calloc((size_t)seq->n_blocks, sizeof *seq->blocks);
    ck_assert_int_eq(kv_pool_take(r->pool, (uint32_t)seq->n_blocks, seq->blocks), ST_OK);
}

void seq_fini(struct runner *r, struct test_seq *seq)
{
    for (int i = 0; i < seq->n_blocks; i++)
        kv_pool_unpin(r->pool, seq->blocks[i]);
    free(seq->blocks);
}

static void pack(struct runner *r, const struct test_work *w, int s)
{
    struct model_batch *b = model_batch(r->model);
    int32_t *kv = b->kv_table + (size_t)s * (size_t)r->limits.max_blocks;
    int32_t *index = b->index_table + (size_t)s * (size_t)r->limits.max_blocks;

    ck_assert(!w->sparse || (w->n == 1 && b->sparse_seqs == s));
    b->sparse_seqs += w->sparse;
    b->first_row[s] = b->rows;
    b->n_rows[s] = w->n;
    b->n_tokens[s] = w->seq->n_tokens + w->n;
    ck_assert_int_le(b->n_tokens[s], w->seq->n_blocks * BLOCK_TOKENS);
    for (int i = 0; i < w->seq->n_blocks && i < r->limits.max_blocks; i++)
        kv[i] = index[i] = (int32_t)w->seq->blocks[i];
    for (int i = 0; i < w->n; i++, b->rows++) {
        int position = w->seq->n_tokens + i;
        b->ids[b->rows] = w->ids[i];
        b->positions[b->rows] = position;
        b->kv_block[b->rows] = b->index_block[b->rows] = kv[position / BLOCK_TOKENS];
        if (i >= w->n - w->want) {
            b->rows_of[b->logit_rows] = b->rows;
            b->sample[b->logit_rows++] = (struct sample_params){
                .repetition = 1, .top_p = 1, .target = -1, .n_top = SAMPLE_MAX_TOP };
        }
    }
}

void runner_step(struct runner *r, struct test_work *works, int n_works)
{
    struct model_batch *b = model_batch(r->model);
    struct error err = { 0 };

    b->rows = b->sparse_seqs = b->logit_rows = 0;
    b->seqs = n_works;
    for (int s = 0; s < n_works; s++)
        pack(r, &works[s], s);
    ck_assert_int_le(b->rows, r->limits.max_rows);
    ck_assert_int_le(b->logit_rows, r->limits.max_logit_rows);
    ck_assert_msg(model_step(r->model, r->stream, r->pool, &err) == ST_OK, "%s", err.text);
    for (int s = 0, at = 0; s < n_works; s++) {
        works[s].seq->n_tokens += works[s].n;
        for (int i = 0; i < works[s].want; i++)
            works[s].result[i] = b->result[at++];
    }
}

struct sample_result runner_feed(struct runner *r, struct test_seq *seq, const int32_t *ids,
                                 int n, int chunk)
{
    struct sample_result result = { 0 };

    for (int at = 0; at < n; at += chunk) {
        int k = n - at < chunk ? n - at : chunk;
        struct test_work w = { .seq = seq, .ids = ids + at, .n = k, .want = at + k == n,
                               .result = &result };
        runner_step(r, &w, 1);
    }
    return result;
}

struct sample_result runner_decode(struct runner *r, struct test_seq *seq, int32_t id,
                                   bool sparse)
{
    struct sample_result result;
    struct test_work w = { .seq = seq, .ids = &id, .n = 1, .want = 1, .sparse = sparse,
                           .result = &result };

    runner_step(r, &w, 1);
    return result;
}

void test_prompt(int32_t *ids, int n)
{
    for (int i = 0; i < n; i++) {
        uint64_t z = (((uint64_t)n << 32) + (uint64_t)i + 1) * 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        ids[i] = (int32_t)((z ^ z >> 31) % 6141);
    }
}

double logprob_difference(const struct sample_result *a, const struct sample_result *b)
{
    double worst = 0;
    int common = 0;

    for (int i = 0; i < a->n_top; i++)
        for (int j = 0; j < b->n_top; j++)
            if (a->top[i].id == b->top[j].id) {
                worst = fmax(worst, fabs((double)a->top[i].logprob - (double)b->top[j].logprob));
                common++;
            }
    return common * 2 > a->n_top ? worst : 1000;
}

bool results_identical(const struct sample_result *a, const struct sample_result *b)
{
    if (a->token != b->token || a->logprob != b->logprob || a->n_top != b->n_top)
        return false;
    for (int i = 0; i < a->n_top; i++)
        if (a->top[i].id != b->top[i].id || a->top[i].logprob != b->top[i].logprob)
            return false;
    return true;
}

static uint64_t file_sum(const char *path)
{
    FILE *in = fopen(path, "rb");
    uint64_t word = 0, odd = 1, sum = 0;

    ck_assert_ptr_nonnull(in);
    while (fread(&word, 1, sizeof word, in) > 0) {
        sum += word * odd;
        odd += 2;
        word = 0;
    }
    fclose(in);
    return sum;
}

uint64_t folder_weights_sum(const char *dir)
{
    static const char suffix[] = ".safetensors";
    DIR *d = opendir(dir);
    uint64_t sum = 0;

    ck_assert_msg(d != NULL, "%s is missing: make the test models first", dir);
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        size_t n = strlen(e->d_name), k = sizeof suffix - 1;
        char path[1024];
        if (n < k || strcmp(e->d_name + n - k, suffix) != 0)
            continue;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        sum += file_sum(path);
    }
    closedir(d);
    return sum;
}
