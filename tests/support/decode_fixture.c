#include "tests/support/decode_fixture.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/token_store.h"

#include <check.h>
#include <string.h>

void decode_init(struct decode_fixture *d, const struct decode_setup *s, int max_blocks,
                 uint64_t seed)
{
    ck_assert(s->seqs <= DECODE_MOST_SEQS && s->kv_heads <= DECODE_MOST_KV_HEADS);
    memset(d, 0, sizeof *d);
    d->s = *s;
    d->shape = test_kv_shape(s->kv_heads, s->head_dim, s->kind);
    d->r = test_random(seed);
    d->heads = s->kv_heads * s->group;
    d->max_blocks = max_blocks;
    d->n_blocks = s->seqs * max_blocks;
    d->lists = s->seqs * s->kv_heads;
    d->kv_bytes = (size_t)d->n_blocks * kv_block_bytes(&d->shape);
    d->index_bytes = (size_t)d->n_blocks * index_block_bytes(&d->shape);
    d->n_q = (size_t)(s->seqs * d->heads * s->head_dim);
    d->table = mem_alloc((size_t)d->n_blocks * sizeof *d->table);
    random_order(&d->r, d->table, d->n_blocks);
    d->kv = nan_alloc(d->kv_bytes);
    d->index = nan_alloc(d->index_bytes);
    d->q = mem_calloc(d->n_q, sizeof *d->q);
}

void decode_fini(struct decode_fixture *d)
{
    mem_free(d->table);
    mem_free(d->kv);
    mem_free(d->index);
    mem_free(d->q);
}

void decode_store(struct decode_fixture *d, struct backend *be, struct stream *s, int seq, int from,
                  int to)
{
    store_random_tokens(be, s, &(struct token_store){
        .kv = d->kv, .index = d->index, .table = d->table + seq * d->max_blocks,
        .channels = d->channels, .shape = d->shape, .heads = d->heads, .from = from,
        .n = to - from }, &d->r);
}

void decode_drift(struct decode_fixture *d, const float *by)
{
    for (size_t i = 0; i < d->n_q; i++)
        d->q[i] = 0.8f * d->q[i] + 0.6f * by[i];
}

int decode_longest(const struct decode_fixture *d)
{
    int most = 0;

    for (int i = 0; i < d->s.seqs; i++)
        most = d->n_tokens[i] > most ? d->n_tokens[i] : most;
    return most;
}

struct attend_two_level_args decode_args(const struct decode_fixture *d)
{
    const struct decode_setup *s = &d->s;

    return (struct attend_two_level_args){
        .q = d->q, .q_stride = d->heads * s->head_dim, .kv = d->kv, .index = d->index,
        .kv_table = d->table, .index_table = d->table, .n_tokens = d->n_tokens,
        .channels = d->channels, .shape = d->shape, .seqs = s->seqs, .heads = d->heads,
        .max_blocks = d->max_blocks, .keep_blocks = s->keep_blocks,
        .keep_tokens = s->keep_tokens, .sink_tokens = s->sinks, .recent_tokens = s->recent,
        .max_n_tokens = decode_longest(d) };
}

size_t decode_scratch_bytes(const struct decode_fixture *d, const struct backend_ops *ops)
{
    return ops->attend_two_level_scratch(&d->shape, d->s.seqs, d->heads, d->max_blocks,
                                         d->s.keep_blocks, d->s.keep_tokens);
}

void decode_on_cpu(const struct decode_fixture *d, const struct lagged_blocks *lagged, float scale,
                   float *out)
{
    const struct backend_ops *ops = backend_ops(test_backend("auto"));
    struct stream *stream = stream_create(test_backend("auto"));
    struct attend_two_level_args a = decode_args(d);

    a.out = out;
    a.scratch = mem_alloc(decode_scratch_bytes(d, ops));
    a.scale = scale;
    a.lagged = lagged;
    ops->attend_two_level(stream, &a);
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    mem_free(a.scratch);
}

struct selected_lists decode_new_lists(const struct decode_fixture *d)
{
    size_t n = (size_t)d->lists * sizeof(int32_t);

    return (struct selected_lists){
        .kept = nan_alloc(n * (size_t)d->s.keep_blocks), .n_kept = nan_alloc(n),
        .chosen = nan_alloc(n * (size_t)d->s.keep_tokens), .n_chosen = nan_alloc(n) };
}

void decode_free_lists(struct selected_lists *l)
{
    mem_free(l->kept);
    mem_free(l->n_kept);
    mem_free(l->chosen);
    mem_free(l->n_chosen);
}

void decode_filter_blocks(const struct backend_ops *ops, struct stream *s,
                          const struct attend_two_level_args *a, const struct selected_lists *l)
{
    ops->block_filter(s, &(struct block_filter_args){
        .kept = l->kept, .n_kept = l->n_kept, .q = a->q, .q_stride = a->q_stride,
        .index = a->index, .table = a->index_table, .n_tokens = a->n_tokens,
        .channels = a->channels, .scratch = a->scratch, .shape = a->shape, .seqs = a->seqs,
        .heads = a->heads, .max_blocks = a->max_blocks, .keep_blocks = a->keep_blocks,
        .sink_tokens = a->sink_tokens, .recent_tokens = a->recent_tokens,
        .max_n_tokens = a->max_n_tokens });
}

void decode_select_tokens(const struct backend_ops *ops, struct stream *s,
                          const struct attend_two_level_args *a, const struct selected_lists *l)
{
    ops->token_select(s, &(struct token_select_args){
        .chosen = l->chosen, .n_chosen = l->n_chosen, .kept = l->kept, .n_kept = l->n_kept,
        .q = a->q, .q_stride = a->q_stride, .index = a->index, .table = a->index_table,
        .n_tokens = a->n_tokens, .channels = a->channels, .scratch = a->scratch,
        .shape = a->shape, .seqs = a->seqs, .heads = a->heads, .max_blocks = a->max_blocks,
        .keep_blocks = a->keep_blocks, .keep_tokens = a->keep_tokens,
        .sink_tokens = a->sink_tokens, .recent_tokens = a->recent_tokens });
}

struct lagged_blocks decode_new_slots(const struct decode_fixture *d, int slots)
{
    size_t n = (size_t)(slots * d->s.kv_heads) * sizeof(int32_t);
    struct lagged_blocks l = { .kept = mem_alloc(n * (size_t)d->s.keep_blocks),
                               .n_kept = mem_alloc(n), .n_tokens = nan_alloc(n) };

    memset(l.kept, 0x77, n * (size_t)d->s.keep_blocks);
    memset(l.n_kept, 0x77, n);
    return l;
}

void decode_free_slots(struct lagged_blocks *l)
{
    mem_free(l->kept);
    mem_free(l->n_kept);
    mem_free(l->n_tokens);
}
