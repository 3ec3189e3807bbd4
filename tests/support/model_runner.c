#include "tests/support/model_runner.h"

#include "engine/kv/lagged_lists.h"
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

/* The index of what has left the device stays, so there is more of it than of K and V: enough for
 * runner_reclaim() to take every kv slot at once. */
static void open_pool(struct runner *r, const struct runner_options *o, int layers)
{
    uint32_t blocks = (uint32_t)(r->limits.max_blocks * o->max_seqs);
    uint32_t host_blocks = o->hot_sets ? blocks : 0;
    struct kv_pool_config cfg = { .blocks = blocks, .index_blocks = blocks + host_blocks,
                                  .host_blocks = host_blocks, .layers = layers,
                                  .staged_blocks = (uint32_t)r->limits.staged_blocks,
                                  .shape = r->shape };
    struct error err = { 0 };

    ck_assert_msg(kv_pool_create(&r->pool, r->backend, &cfg, &err) == ST_OK, "%s", err.text);
    kv_pool_host_ready(r->pool, host_blocks);
    kv_pool_poison(r->pool, r->tier.base);
}

static void open_hot_sets(struct runner *r, const struct runner_options *o, int layers)
{
    size_t slot = kv_pool_host_bytes(&r->shape, layers);
    size_t slots = (size_t)(r->limits.max_blocks * o->max_seqs);
    struct error err = { 0 };

    ck_assert_int_eq(buffer_alloc(r->backend, &r->tier, MEM_PINNED, slots * slot), ST_OK);
    struct hot_sets_config cfg = { .sets = o->hot_sets, .layers = layers,
                                   .rows_per_head = o->rows_per_head,
                                   .max_blocks = r->limits.max_blocks, .shape = r->shape,
                                   .host = r->tier.base, .host_stride = slot };
    ck_assert_msg(hot_sets_create(&r->hot, r->backend, &cfg, &err) == ST_OK, "%s", err.text);
    model_use_hot_sets(r->model, r->hot);
}

void runner_open(struct runner *r, const struct runner_options *o)
{
    struct backend *be = o->backend ? o->backend : test_backend(o->isa ? o->isa : "auto");
    struct error err = { 0 };

    ck_assert_ptr_nonnull(be);
    memset(r, 0, sizeof *r);
    r->backend = be;
    ck_assert_msg(model_open(&r->model, be, o->dir, NULL, &err) == ST_OK, "%s", err.text);
    int layers = model_config(r->model)->layers;
    r->shape = model_kv_shape(r->model, &o->select);
    ck_assert_msg(select_plan_init(&r->plan, &o->select, &r->shape, layers, o->channels, &err)
                  == ST_OK, "%s", err.text);
    r->limits = (struct model_limits){
        .max_rows = o->max_rows,
        .max_seqs = o->max_seqs,
        .max_logit_rows = o->max_logit_rows ? o->max_logit_rows : o->max_seqs,
        .max_blocks = blocks_of(o->max_tokens),
        .staged_blocks = o->hot_sets ? blocks_of(o->max_tokens) : 0,
    };
    if (o->hot_sets)
        open_hot_sets(r, o, layers);
    ck_assert_msg(model_prepare(r->model, &r->limits, &r->plan, &err) == ST_OK, "%s", err.text);
    open_pool(r, o, layers);
    r->stream = stream_create(be);
}

void runner_close(struct runner *r)
{
    stream_destroy(r->stream);
    kv_pool_destroy(r->pool);
    model_close(r->model);
    hot_sets_destroy(r->hot);
    buffer_free(r->backend, &r->tier);
}

void seq_init(struct runner *r, struct test_seq *seq, int max_tokens)
{
    *seq = (struct test_seq){ .n_blocks = blocks_of(max_tokens), .set = -1, .lagged_slot = -1 };
    seq->held = malloc((size_t)seq->n_blocks * sizeof *seq->held);
    memset(seq->held, true, (size_t)seq->n_blocks * sizeof *seq->held);
    seq->blocks = calloc((size_t)seq->n_blocks, sizeof *seq->blocks);
    ck_assert_int_eq(kv_pool_take(r->pool, (uint32_t)seq->n_blocks, seq->blocks), ST_OK);
}

void seq_fini(struct runner *r, struct test_seq *seq)
{
    for (int i = 0; i < seq->n_blocks; i++) {
        if (seq->held[i])
            kv_pool_release(r->pool, seq->blocks[i]);
        kv_pool_unpin(r->pool, seq->blocks[i]);
    }
    if (seq->set >= 0)
        hot_sets_release(r->hot, seq->set);
    if (seq->lagged_slot >= 0)
        lagged_lists_release(model_lagged_lists(r->model), seq->lagged_slot);
    free(seq->blocks);
    free(seq->held);
}

/* ---- steps */

static void pack_lagged(struct runner *r, const struct test_work *w, int s)
{
    struct lagged_lists *lists = model_lagged_lists(r->model);

    if (!lists)
        return;
    if (w->sparse && w->seq->lagged_slot < 0)
        w->seq->lagged_slot = lagged_lists_acquire(lists, r->stream);
    model_batch(r->model)->lagged_slot[s] = w->sparse ? w->seq->lagged_slot : -1;
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
    for (int i = 0; i < w->seq->n_blocks && i < r->limits.max_blocks; i++) {
        struct block_place place = kv_pool_place(r->pool, w->seq->blocks[i]);
        ck_assert(place.kv >= 0 || w->seq->set >= 0);
        kv[i] = place.kv;
        if (place.kv < 0 && !w->sparse) {
            ck_assert_int_eq(s, b->seqs - 1);
            kv[i] = -2 - b->n_staged;
            b->staged[b->n_staged++] = place.host;
        }
        index[i] = place.index;
        if (r->hot)
            b->host_table[(size_t)s * (size_t)r->limits.max_blocks + (size_t)i] = place.host;
    }
    if (r->hot)
        b->hot_set[s] = w->sparse ? w->seq->set : -1;
    pack_lagged(r, w, s);
    for (int i = 0; i < w->n; i++, b->rows++) {
        int position = w->seq->n_tokens + i;
        b->ids[b->rows] = w->ids[i];
        b->positions[b->rows] = position;
        b->kv_block[b->rows] = kv[position / BLOCK_TOKENS];
        b->index_block[b->rows] = index[position / BLOCK_TOKENS];
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

    b->rows = b->sparse_seqs = b->logit_rows = b->n_staged = 0;
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

/* ---- off the device */

bool seq_acquire_set(struct runner *r, struct test_seq *seq)
{
    ck_assert_int_eq(seq->set, -1);
    seq->set = hot_sets_acquire(r->hot, r->stream);
    return seq->set >= 0;
}

void seq_release_set(struct runner *r, struct test_seq *seq)
{
    for (int i = 0; i < seq->n_blocks; i++)
        ck_assert(seq->held[i]);
    hot_sets_release(r->hot, seq->set);
    seq->set = -1;
}

int seq_full_blocks(const struct test_seq *seq)
{
    return seq->n_tokens / BLOCK_TOKENS;
}

/* The same part of a slot in all layers, as kv_pool.h lays it out. */
static void copy_part(struct runner *r, bool to_host, const void *layer_0, const void *layer_1,
                      int32_t slot, char *host, size_t bytes)
{
    size_t stride = (size_t)((const char *)layer_1 - (const char *)layer_0);
    char *device = (char *)layer_0 + (size_t)slot * bytes;
    size_t layers = (size_t)model_config(r->model)->layers;

    if (to_host)
        stream_copy_pieces(r->stream, host, bytes, device, stride, bytes, layers);
    else
        stream_copy_pieces(r->stream, device, stride, host, bytes, bytes, layers);
}

static void copy_block(struct runner *r, bool to_host, const struct block_place *place)
{
    int layers = model_config(r->model)->layers;
    size_t kv = kv_block_bytes(&r->shape), index = index_block_bytes(&r->shape);
    char *host = (char *)r->tier.base
                 + (size_t)place->host * kv_pool_host_bytes(&r->shape, layers);

    if (place->kv >= 0)
        copy_part(r, to_host, kv_pool_kv(r->pool, 0), kv_pool_kv(r->pool, 1), place->kv, host,
                  kv);
    if (place->index >= 0)
        copy_part(r, to_host, kv_pool_index(r->pool, 0), kv_pool_index(r->pool, 1),
                  place->index, host + (size_t)layers * kv, index);
    ck_assert_int_eq(stream_sync(r->stream, NULL), ST_OK);
}

static void seal_up_to(struct runner *r, struct test_seq *seq, int block)
{
    for (; seq->n_sealed <= block; seq->n_sealed++) {
        kv_block b = seq->blocks[seq->n_sealed];
        struct block_name name = { .parent = seq->n_sealed ? seq->blocks[seq->n_sealed - 1]
                                                           : KV_BLOCK_NONE };
        ck_assert_uint_eq(kv_pool_seal(r->pool, b, &name), b);
    }
}

void seq_let_go(struct runner *r, struct test_seq *seq, int block)
{
    kv_block b = seq->blocks[block];
    struct block_place place;

    ck_assert(seq->set >= 0 && block < seq_full_blocks(seq));
    seal_up_to(r, seq, block);
    if (kv_pool_place(r->pool, b).host < 0) {
        ck_assert(kv_pool_store_begin(r->pool, b, &place));
        copy_block(r, true, &place);
        kv_pool_store_end(r->pool, b, true);
    }
    if (seq->held[block])
        kv_pool_release(r->pool, b);
    seq->held[block] = false;
}

void seq_fetch(struct runner *r, struct test_seq *seq, int block)
{
    kv_block b = seq->blocks[block];
    struct block_place place;

    if (seq->held[block])
        return;
    if (kv_pool_place(r->pool, b).kv < 0) {
        ck_assert(kv_pool_load_begin(r->pool, b, true, &place));
        copy_block(r, false, &place);
        kv_pool_load_end(r->pool, b, true);
    }
    kv_pool_hold(r->pool, b);
    seq->held[block] = true;
}

void runner_reclaim(struct runner *r)
{
    uint32_t n = kv_pool_available(r->pool);
    kv_block *all = calloc(n, sizeof *all);

    ck_assert_int_eq(kv_pool_take(r->pool, n, all), ST_OK);
    ck_assert_uint_eq(kv_pool_counts(r->pool).cached, 0);
    for (uint32_t i = 0; i < n; i++) {
        kv_pool_release(r->pool, all[i]);
        kv_pool_unpin(r->pool, all[i]);
    }
    free(all);
}

/* ---- what tests compare */

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
