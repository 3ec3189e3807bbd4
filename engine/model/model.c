#include "engine/model/model.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/kv/hot_sets.h"
#include "engine/kv/lagged_lists.h"
#include "engine/model/model_parts.h"

#include <string.h>

enum { ALIGN_BYTES = 256 };

enum status model_open(struct model **out, struct backend *be, const char *dir,
                       struct progress *progress, struct error *err)
{
    struct model *m = mem_calloc(1, sizeof *m);

    *out = NULL;
    m->be = be;
    m->ops = backend_ops(be);
    enum status st = model_config_read(&m->config, dir, err);
    if (st == ST_OK)
        st = weights_open(&m->weights, be, &m->config, dir, progress, err);
    if (st != ST_OK) {
        model_close(m);
        return st;
    }
    *out = m;
    return ST_OK;
}

void model_close(struct model *m)
{
    if (!m)
        return;
    replay_destroy(m);
    streaming_destroy(m);
    lagged_lists_destroy(m->lagged);
    buffer_free(m->be, &m->device);
    buffer_free(m->be, &m->host);
    weights_close(m->weights);
    mem_free(m);
}

const struct model_config *model_config(const struct model *m)
{
    return &m->config;
}

struct kv_shape model_kv_shape(const struct model *m, const struct select_config *cfg)
{
    return (struct kv_shape){
        .kv_heads = m->config.kv_heads,
        .head_dim = m->config.head_dim,
        .latent_dim = m->config.latent.dim,
        .filter = cfg->filter,
        .index = cfg->index,
    };
}

size_t model_weight_bytes(const struct model *m)
{
    return weights_bytes(m->weights);
}

/* ---- carving.  With a NULL base the same code measures. */

struct carver {
    char *base;
    size_t at;
};

static void *carve(struct carver *c, size_t rows, size_t columns, size_t element_bytes)
{
    size_t bytes = 0;

    ASSERT(!__builtin_mul_overflow(rows, columns, &bytes)
           && !__builtin_mul_overflow(bytes, element_bytes, &bytes)
           && bytes < SIZE_MAX / 4 - c->at);
    void *p = c->base ? c->base + c->at : NULL;
    c->at += (bytes + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
    return p;
}

static int32_t *carve_ints(struct carver *c, int rows, int columns)
{
    return carve(c, (size_t)rows, (size_t)columns, sizeof(int32_t));
}

/* What not every model's steps have. */
struct extras { bool sets, lists; };

static struct extras extras_of(const struct model *m, const struct select_plan *plan)
{
    return (struct extras){ .sets = m->hot != NULL,
                            .lists = plan->config.selection == SELECTION_LAGGED };
}

static void carve_arrays(struct step_arrays *a, struct carver *c, const struct model_limits *l,
                         struct extras with)
{
    a->ids = carve_ints(c, l->max_rows, 1);
    a->positions = carve_ints(c, l->max_rows, 1);
    a->kv_block = carve_ints(c, l->max_rows, 1);
    a->index_block = carve_ints(c, l->max_rows, 1);
    a->first_row = carve_ints(c, l->max_seqs, 1);
    a->n_rows = carve_ints(c, l->max_seqs, 1);
    a->n_tokens = carve_ints(c, l->max_seqs, 1);
    a->last_first_row = carve_ints(c, l->max_seqs, 1);
    a->last_n_rows = carve_ints(c, l->max_seqs, 1);
    a->kv_table = carve_ints(c, l->max_seqs, l->max_blocks);
    a->index_table = carve_ints(c, l->max_seqs, l->max_blocks);
    a->rows_of = carve_ints(c, l->max_logit_rows, 1);
    a->host_table = with.sets ? carve_ints(c, l->max_seqs, l->max_blocks) : NULL;
    a->hot_set = with.sets ? carve_ints(c, l->max_seqs, 1) : NULL;
    a->step = with.sets ? carve(c, 1, 1, sizeof *a->step) : NULL;
    a->lagged_slot = with.lists ? carve_ints(c, l->max_seqs, 1) : NULL;
}

/* Host memory: what the caller fills and reads. */
static size_t carve_host(struct model_batch *b, struct step_arrays *a, void *base,
                         const struct model_limits *l, struct extras with)
{
    struct carver c = { base, 0 };

    carve_arrays(a, &c, l, with);
    *b = (struct model_batch){
        .ids = a->ids, .positions = a->positions,
        .kv_block = a->kv_block, .index_block = a->index_block,
        .first_row = a->first_row, .n_rows = a->n_rows, .n_tokens = a->n_tokens,
        .kv_table = a->kv_table, .index_table = a->index_table, .rows_of = a->rows_of,
        .host_table = a->host_table, .hot_set = a->hot_set, .lagged_slot = a->lagged_slot,
    };
    b->staged = a->staged = l->staged_blocks ? carve_ints(&c, l->staged_blocks, 1) : NULL;
    b->sample = carve(&c, (size_t)l->max_logit_rows, 1, sizeof *b->sample);
    b->result = carve(&c, (size_t)l->max_logit_rows, 1, sizeof *b->result);
    return c.at;
}

static void carve_experts(struct step_scratch *s, struct carver *c, const struct model *m,
                          size_t rows)
{
    const struct moe_config *moe = &m->config.moe;
    size_t chosen = (size_t)moe->chosen;

    if (moe->layers == 0)
        return;
    s->scores = carve(c, rows, (size_t)moe->experts, sizeof *s->scores);
    s->chosen = carve(c, rows, chosen, sizeof *s->chosen);
    s->chosen_weights = carve(c, rows, chosen, sizeof *s->chosen_weights);
    s->experts = carve(c, m->ops->experts_scratch(&(struct experts_shape){
        .max_rows = (int)rows, .dim = m->config.hidden, .expert_dim = moe->expert_mlp,
        .n_experts = moe->experts, .n_chosen = moe->chosen }), 1, 1);
}

static int larger(int a, int b)
{
    return a > b ? a : b;
}

static void carve_attn(struct step_scratch *s, struct carver *c, const struct model_config *g,
                       size_t rows, size_t act)
{
    const struct latent_config *l = &g->latent;

    if (!l->dim) {
        s->qkv = carve(c, rows, (size_t)((g->heads + 2 * g->kv_heads) * g->head_dim), act);
        s->attn = carve(c, rows, (size_t)(g->heads * g->head_dim), act);
        return;
    }
    s->qkv = carve(c, rows, (size_t)(l->q_rank + g->head_dim), act);
    s->absorbed = carve(c, rows, (size_t)(g->heads * g->head_dim), act);
    s->by_head = carve(c, rows, (size_t)(g->heads * larger(l->nope + l->rope, l->value)), act);
    s->attn = carve(c, rows, (size_t)larger(g->heads * l->dim, l->q_rank), act);
    s->low_rank = s->attn;
}

/* Attention and MLP of a layer never need their intermediates at the same
 * time, so these share one stretch. */
static void carve_sublayers(struct step_scratch *s, struct carver *c, const struct model *m,
                            size_t rows, size_t act)
{
    const struct model_config *g = &m->config;
    const size_t dense = (size_t)larger(g->moe.layers < g->layers ? g->mlp : 0, g->moe.shared_mlp);
    struct carver mlp = *c, moe = *c;

    carve_attn(s, c, g, rows, act);
    s->gate_up = carve(&mlp, rows, 2 * dense, act);
    s->mid = carve(&mlp, rows, dense, act);
    if (mlp.at > c->at)
        c->at = mlp.at;
    carve_experts(s, &moe, m, rows);
    if (moe.at > c->at)
        c->at = moe.at;
}

/* Full and two-level attention of a step follow each other in one scratch. */
static void carve_attention(struct step_scratch *s, struct carver *c, const struct model *m,
                            const struct model_limits *l, const struct select_plan *plan)
{
    const struct kv_shape shape = model_kv_shape(m, &plan->config);
    const int heads = m->config.heads;
    size_t dense = m->ops->attend_dense_scratch(&shape, l->max_seqs, heads, l->max_blocks);
    size_t sparse = 0;

    if (plan->max_keep_blocks > 0)  /* else all layers are dense */
        sparse = m->ops->attend_two_level_scratch(&shape, l->max_seqs, heads, l->max_blocks,
                                                  plan->max_keep_blocks,
                                                  plan->max_keep_tokens);
    s->attention = carve(c, dense > sparse ? dense : sparse, 1, 1);
}

static void carve_lists(struct step_scratch *s, struct carver *c, const struct model *m,
                        const struct model_limits *l, const struct select_plan *plan)
{
    int n = l->max_seqs * m->config.kv_heads;

    if (!m->watcher)
        return;
    s->lists = (struct selected_lists){
        .kept = carve_ints(c, n, plan->max_keep_blocks), .n_kept = carve_ints(c, n, 1),
        .chosen = carve_ints(c, n, plan->max_keep_tokens), .n_chosen = carve_ints(c, n, 1),
    };
}

static size_t carve_device(struct step_scratch *s, struct step_arrays *a, void *base,
                           const struct model *m, const struct model_limits *l,
                           const struct select_plan *plan)
{
    const struct model_config *g = &m->config;
    const struct device_info *info = backend_info(m->be);
    const struct extras with = extras_of(m, plan);
    size_t wanted = (size_t)l->max_logit_rows;
    /* A row may be wanted more than once, so there may be more of these. */
    size_t rows = l->max_rows > l->max_logit_rows ? (size_t)l->max_rows : wanted;
    size_t hidden = (size_t)g->hidden, rope = (size_t)model_rope_dim(g);
    const struct kv_shape shape = model_kv_shape(m, &plan->config);
    size_t act = dtype_bytes(info->act);
    struct carver c = { base, 0 };

    s->x = carve(&c, rows, hidden, act);
    s->h = carve(&c, rows, hidden, act);
    s->delta = carve(&c, rows, hidden, act);
    carve_sublayers(s, &c, m, rows, act);
    s->last_x = carve(&c, wanted, hidden, act);
    s->last_attn = carve(&c, wanted, (size_t)(g->heads * kv_value_dim(&shape)), act);
    s->cos_sin = carve(&c, rows, rope, sizeof(float));
    s->logits = carve(&c, wanted, (size_t)g->vocab, sizeof(float));
    s->inv_freq = carve(&c, rope / 2, 1, sizeof(float));
    s->channels = NULL;
    if (plan->channels)
        s->channels = carve(&c, (size_t)(g->layers * g->kv_heads), INDEX_CHANNELS_KEPT,
                            sizeof(int16_t));
    carve_attention(s, &c, m, l, plan);
    s->lagged = NULL;
    if (with.lists)
        s->lagged = carve(&c, lagged_lists_bytes(plan, l->max_seqs, g->kv_heads), 1, 1);
    carve_lists(s, &c, m, l, plan);
    if (!info->host_visible)
        carve_arrays(a, &c, l, with);
    return c.at;
}

size_t model_scratch_bytes(const struct model *m, const struct model_limits *limits,
                           const struct select_plan *plan)
{
    struct model_batch batch;
    struct step_arrays arrays;
    struct step_scratch scratch;

    return carve_host(&batch, &arrays, NULL, limits, extras_of(m, plan))
           + carve_device(&scratch, &arrays, NULL, m, limits, plan);
}

/* ---- preparing */

void model_use_hot_sets(struct model *m, struct hot_sets *h)
{
    ASSERT(!m->prepared);
    m->hot = h;
}

/* The kernels find a set's parts by the sizes of the model's calls. */
static void check_hot_sets(const struct model *m, const struct model_limits *limits,
                           const struct select_plan *plan)
{
    const struct hot_sets_config *cfg = hot_sets_config(m->hot);

    ASSERT(cfg->layers == m->config.layers && cfg->max_blocks == limits->max_blocks);
    ASSERT(cfg->shape.kv_heads == m->config.kv_heads);
    ASSERT(cfg->shape.head_dim == m->config.head_dim);
    ASSERT(cfg->shape.latent_dim == m->config.latent.dim);
    ASSERT(cfg->rows_per_head >= plan->max_keep_tokens);
}

enum status model_upload(struct model *m, void *device, const void *host, size_t bytes,
                         struct error *err)
{
    struct buffer pinned = { 0 };

    if (buffer_alloc(m->be, &pinned, MEM_PINNED, bytes) != ST_OK)
        return error_set(err, ST_NODEVMEM, "no memory for a copy of %zu bytes", bytes);
    memcpy(pinned.base, host, bytes);
    struct stream *s = stream_create(m->be);
    stream_copy(s, device, pinned.base, bytes);
    enum status st = stream_sync(s, err);
    stream_destroy(s);
    buffer_free(m->be, &pinned);
    return st;
}

static enum status check_supported(const struct model *m, const struct select_plan *plan,
                                   struct error *err)
{
    const struct shape_query q = {
        .dim = m->config.hidden,
        .mlp_dim = m->config.mlp,
        .heads = m->config.heads,
        .vocab = m->config.vocab,
        .n_experts = m->config.moe.experts,
        .n_chosen = m->config.moe.chosen,
        .expert_dim = m->config.moe.expert_mlp,
        .latent_widths = { m->config.latent.q_rank, m->config.latent.nope,
                           m->config.latent.value },
        .kv = model_kv_shape(m, &plan->config),
    };
    struct error why = { .code = ST_UNSUPPORTED };

    if (m->ops->supports(&q, &why))
        return ST_OK;
    return error_set(err, ST_UNSUPPORTED, "%s cannot run this model: %s",
                     backend_info(m->be)->name, why.text);
}

static enum status upload_constants(struct model *m, const struct select_plan *plan,
                                    struct error *err)
{
    const struct model_config *g = &m->config;

    TRY(model_upload(m, m->scratch.inv_freq, g->inv_freq,
                     (size_t)(model_rope_dim(g) / 2) * sizeof(float), err));
    if (!plan->channels)
        return ST_OK;
    return model_upload(m, m->scratch.channels, plan->channels,
                        (size_t)(g->layers * g->kv_heads) * INDEX_CHANNELS_KEPT
                        * sizeof(int16_t), err);
}

enum status model_prepare(struct model *m, const struct model_limits *limits,
                          const struct select_plan *plan, struct error *err)
{
    const struct extras with = extras_of(m, plan);
    size_t host = carve_host(&m->batch, &m->host_arrays, NULL, limits, with);
    size_t device = carve_device(&m->scratch, &m->arrays, NULL, m, limits, plan);

    ASSERT(!m->prepared && plan->n_layers == m->config.layers);
    ASSERT(limits->max_rows > 0 && limits->max_seqs > 0 && limits->max_blocks > 0);
    ASSERT(limits->max_logit_rows >= limits->max_seqs);
    if (with.sets)
        check_hot_sets(m, limits, plan);
    TRY(check_supported(m, plan, err));
    if (buffer_alloc(m->be, &m->host, MEM_PINNED, host) != ST_OK
        || buffer_alloc(m->be, &m->device, MEM_DEVICE, device) != ST_OK)
        return error_set(err, ST_NODEVMEM, "no memory for %zu bytes of scratch",
                         host + device);
    m->limits = *limits;
    m->plan = *plan;
    m->selects_everywhere = select_is_everywhere(plan);
    carve_host(&m->batch, &m->host_arrays, m->host.base, limits, with);
    if (backend_info(m->be)->host_visible)
        m->arrays = m->host_arrays;
    carve_device(&m->scratch, &m->arrays, m->device.base, m, limits, plan);
    if (with.lists)
        m->lagged = lagged_lists_create(m->scratch.lagged, plan, limits->max_seqs,
                                        m->config.kv_heads);
    m->prepared = true;
    TRY(replay_create(m, err));
    TRY(streaming_create(m, err));
    return upload_constants(m, plan, err);
}

struct model_batch *model_batch(struct model *m)
{
    ASSERT(m->prepared);
    return &m->batch;
}

struct lagged_lists *model_lagged_lists(const struct model *m)
{
    return m->lagged;
}

uint64_t model_waited_ns(const struct model *m)
{
    return m->waited_ns;
}

void model_watch(struct model *m, model_watcher fn, void *arg)
{
    ASSERT(!m->prepared);
    m->watcher = fn;
    m->watcher_arg = arg;
}

void model_observe(struct model *m, model_observer fn, void *arg)
{
    m->observer = fn;
    m->observer_arg = arg;
}
