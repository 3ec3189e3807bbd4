#include "engine/model/weights.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/model/safetensors.h"
#include "engine/model/upload.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_NAME = 160, PER_LAYER_MAX = 25, ALIGN_BYTES = 256 };

/* The matrices of an expert, in the order in which they lie where they are copied. */
enum { GATE, UP, DOWN, PER_EXPERT };
static const char *const expert_names[PER_EXPERT] = { "gate_proj", "up_proj", "down_proj" };

/* A tensor that has its place, and where that is. */
struct binding {
    struct weight *weight;
    const struct tensor *tensor;
    bool joins;
};

struct weights {
    struct backend *be;
    struct safetensors *files;   /* NULL once everything is copied */
    struct buffer copied;        /* tensors that are not used in the mapping */
    struct weight embed, norm, head;
    struct layer_weights *layers;
    int n_layers;
    struct weight *experts;      /* [moe layers, experts, PER_EXPERT], NULL without */
    const void **host_tables;    /* [moe layers, PER_EXPERT, experts] where each lies */
    struct buffer tables;        /* their copy, where the device cannot see the host's */
    uint64_t bytes, elements;
};

/* What config.json implies for one tensor.  cols 0: a vector. */
struct expected {
    const char *name;            /* behind model.layers.N. */
    size_t offset;               /* in struct layer_weights */
    int rows, cols;
    bool joins;                  /* lies behind the one before, see weights.h */
    bool absent;                 /* the layer has none */
};

static void layer_expects(struct expected e[PER_LAYER_MAX], const struct model_config *c,
                          int layer)
{
    const struct latent_config *l = &c->latent;
    const struct moe_config *m = &c->moe;
    const bool moe = m->in_layer[layer], latent = l->dim > 0;
    const bool qkv_bias = !latent && c->qkv_bias, qk_norm = !latent && c->qk_norm;
    const bool shared = moe && m->shared_mlp > 0, biased = moe && m->score == ROUTER_SIGMOID;
    const int q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    const int hidden = c->hidden, mlp = c->mlp, latent_q = c->heads * (l->nope + l->rope);
#define AT(member) .offset = offsetof(struct layer_weights, member)
    const struct expected all[PER_LAYER_MAX] = {
        { "input_layernorm.weight", AT(attn_norm), hidden },
        { "self_attn.q_proj.weight", AT(q), q, hidden, .absent = latent },
        { "self_attn.k_proj.weight", AT(k), kv, hidden, .joins = true, .absent = latent },
        { "self_attn.v_proj.weight", AT(v), kv, hidden, .joins = true, .absent = latent },
        { "self_attn.q_proj.bias", AT(q_bias), q, .absent = !qkv_bias },
        { "self_attn.k_proj.bias", AT(k_bias), kv, .joins = true, .absent = !qkv_bias },
        { "self_attn.v_proj.bias", AT(v_bias), kv, .joins = true, .absent = !qkv_bias },
        { "self_attn.q_norm.weight", AT(q_norm), c->head_dim, .absent = !qk_norm },
        { "self_attn.k_norm.weight", AT(k_norm), c->head_dim, .absent = !qk_norm },
        { "self_attn.q_a_proj.weight", AT(q_a), l->q_rank, hidden, .absent = !latent },
        { "self_attn.kv_a_proj_with_mqa.weight", AT(kv_a), l->dim + l->rope, hidden,
          .joins = true, .absent = !latent },
        { "self_attn.q_a_layernorm.weight", AT(q_a_norm), l->q_rank, .absent = !latent },
        { "self_attn.kv_a_layernorm.weight", AT(kv_a_norm), l->dim, .absent = !latent },
        { "self_attn.q_b_proj.weight", AT(q_b), latent_q, l->q_rank, .absent = !latent },
        { "self_attn.kv_b_proj.weight", AT(kv_b), c->heads * (l->nope + l->value), l->dim,
          .absent = !latent },
        { "self_attn.o_proj.weight", AT(o), hidden, model_attention_dim(c) },
        { "post_attention_layernorm.weight", AT(mlp_norm), hidden },
        { "mlp.gate_proj.weight", AT(gate), mlp, hidden, .absent = moe },
        { "mlp.up_proj.weight", AT(up), mlp, hidden, .joins = true, .absent = moe },
        { "mlp.down_proj.weight", AT(down), hidden, mlp, .absent = moe },
        { "mlp.gate.weight", AT(router), m->experts, hidden, .absent = !moe },
        { "mlp.gate.e_score_correction_bias", AT(router_bias), m->experts, .absent = !biased },
        { "mlp.shared_experts.gate_proj.weight", AT(gate), m->shared_mlp, hidden,
          .absent = !shared },
        { "mlp.shared_experts.up_proj.weight", AT(up), m->shared_mlp, hidden, .joins = true,
          .absent = !shared },
        { "mlp.shared_experts.down_proj.weight", AT(down), hidden, m->shared_mlp,
          .absent = !shared },
    };
#undef AT
    memcpy(e, all, sizeof all);
}

static uint64_t elements_of(int rows, int cols)
{
    return (uint64_t)rows * (uint64_t)(cols ? cols : 1);
}

uint64_t weights_expected_elements(const struct model_config *c)
{
    struct expected e[PER_LAYER_MAX];
    uint64_t n = elements_of(c->hidden, 0) + elements_of(c->vocab, c->hidden) * (c->tied ? 1 : 2);

    for (int layer = 0; layer < c->layers; layer++) {
        layer_expects(e, c, layer);
        for (int i = 0; i < PER_LAYER_MAX; i++)
            n += e[i].absent ? 0 : elements_of(e[i].rows, e[i].cols);
    }
    return n + (uint64_t)c->moe.layers * (uint64_t)c->moe.experts * PER_EXPERT
                   * elements_of(c->moe.expert_mlp, c->hidden);
}

/* ---- binding */

struct binder {
    struct weights *w;
    const struct model_config *config;
    const char *dir;
    struct progress *progress;
    struct error *err;
    struct binding *bindings;
    size_t n;
    bool *used;                  /* [tensors of the folder] */
    size_t n_missing;
    char first_missing[MAX_NAME];
};

static void shape_text(char *out, size_t n, const struct tensor *t)
{
    size_t at = (size_t)snprintf(out, n, "[");

    for (int i = 0; i < t->rank && at < n; i++)
        at += (size_t)snprintf(out + at, n - at, i ? ", %llu" : "%llu",
                               (unsigned long long)t->shape[i]);
    if (at < n)
        snprintf(out + at, n - at, "]");
}

static enum status check_tensor(const struct binder *b, const struct tensor *t, int rows,
                                int cols)
{
    const char *file = safetensors_file(b->w->files, t);
    char is[96], want[48];

    if (t->type != TENSOR_BF16 && t->type != TENSOR_F32)
        return error_set(b->err, ST_UNSUPPORTED, "%s: tensor %s has the type %s; BF16 and F32 "
                         "are implemented", file, t->name, tensor_type_name(t->type));
    bool fits = t->rank == (cols ? 2 : 1) && t->shape[0] == (uint64_t)rows
                && (!cols || t->shape[1] == (uint64_t)cols);
    if (fits)
        return ST_OK;
    shape_text(is, sizeof is, t);
    snprintf(want, sizeof want, cols ? "[%d, %d]" : "[%d]", rows, cols);
    return error_set(b->err, ST_INVALID, "%s: tensor %s has the shape %s, config.json implies "
                     "%s", file, t->name, is, want);
}

static enum status bind(struct binder *b, struct weight *slot, const char *name, int rows,
                        int cols, bool joins)
{
    const struct tensor *t = safetensors_find(b->w->files, name);

    if (!t) {
        if (b->n_missing++ == 0)
            snprintf(b->first_missing, sizeof b->first_missing, "%s", name);
        return ST_OK;
    }
    TRY(check_tensor(b, t, rows, cols));
    *slot = (struct weight){ t->data, t->type == TENSOR_F32 ? DTYPE_F32 : DTYPE_BF16 };
    b->bindings[b->n++] = (struct binding){ slot, t, joins };
    b->used[t - safetensors_at(b->w->files, 0)] = true;
    b->w->bytes += t->bytes;
    b->w->elements += elements_of(rows, cols);
    return ST_OK;
}

/* A linear layer reads weight and bias as one type, the rotary step both norms, and a gated one
 * both of its matrices. */
static enum status check_pair(const struct binder *b, int layer, const struct weight *x,
                              const struct weight *y, const char *names)
{
    if (!x->data || !y->data || x->type == y->type)
        return ST_OK;
    return error_set(b->err, ST_UNSUPPORTED, "%s: %s of layer %d are of two types", b->dir,
                     names, layer);
}

static enum status bind_layer(struct binder *b, int layer)
{
    struct layer_weights *l = &b->w->layers[layer];
    struct expected e[PER_LAYER_MAX];
    char name[MAX_NAME];

    layer_expects(e, b->config, layer);
    for (int i = 0; i < PER_LAYER_MAX; i++) {
        if (e[i].absent)
            continue;
        snprintf(name, sizeof name, "model.layers.%d.%s", layer, e[i].name);
        TRY(bind(b, (struct weight *)((char *)l + e[i].offset), name, e[i].rows, e[i].cols,
                 e[i].joins));
    }
    if (l->router_bias.data && l->router_bias.type != DTYPE_F32)
        return error_set(b->err, ST_UNSUPPORTED, "%s: e_score_correction_bias of layer %d is not "
                         "F32", b->dir, layer);
    TRY(check_pair(b, layer, &l->q, &l->q_bias, "q_proj.weight and q_proj.bias"));
    TRY(check_pair(b, layer, &l->k, &l->k_bias, "k_proj.weight and k_proj.bias"));
    TRY(check_pair(b, layer, &l->v, &l->v_bias, "v_proj.weight and v_proj.bias"));
    TRY(check_pair(b, layer, &l->gate, &l->up, "gate_proj.weight and up_proj.weight"));
    return check_pair(b, layer, &l->q_norm, &l->k_norm, "q_norm.weight and k_norm.weight");
}

/* ---- experts */

/* Which of the layers with experts it is. */
static int moe_index(const struct model_config *c, int layer)
{
    int n = 0;

    for (int l = 0; l < layer; l++)
        n += c->moe.in_layer[l];
    return n;
}

static struct weight *layer_experts(const struct weights *w, const struct model_config *c,
                                    int layer)
{
    return w->experts + (size_t)moe_index(c, layer) * (size_t)c->moe.experts * PER_EXPERT;
}

/* Some programs store all experts of a layer as one tensor of three dimensions. */
static enum status check_fused(const struct binder *b, int layer)
{
    static const char *const names[] = { "gate_up_proj", "down_proj" };
    char name[MAX_NAME];

    for (int i = 0; i < 2; i++)
        for (int suffix = 0; suffix < 2; suffix++) {
            snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%s%s", layer, names[i],
                     suffix ? ".weight" : "");
            const struct tensor *t = safetensors_find(b->w->files, name);
            if (t)
                return error_set(b->err, ST_UNSUPPORTED, "%s: tensor %s holds all experts of a "
                                 "layer; only folders with tensors of their own for each expert, "
                                 "as transformers saves them, are implemented",
                                 safetensors_file(b->w->files, t), name);
        }
    return ST_OK;
}

static enum status bind_experts(struct binder *b, int layer)
{
    const struct model_config *c = b->config;
    struct weight *slots = layer_experts(b->w, c, layer);
    char name[MAX_NAME];

    TRY(check_fused(b, layer));
    for (int i = 0; i < c->moe.experts * PER_EXPERT; i++) {
        int part = i % PER_EXPERT;
        snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%d.%s.weight", layer,
                 i / PER_EXPERT, expert_names[part]);
        TRY(bind(b, &slots[i], name, part == DOWN ? c->hidden : c->moe.expert_mlp,
                 part == DOWN ? c->moe.expert_mlp : c->hidden, i > 0));
        if (slots[i].data && slots[0].data && slots[i].type != slots[0].type)
            return error_set(b->err, ST_UNSUPPORTED, "%s: the experts of layer %d are of two "
                             "types", b->dir, layer);
    }
    return ST_OK;
}

/* Once everything has its place. */
static void fill_tables(struct weights *w, const struct model_config *c)
{
    const size_t n = (size_t)c->moe.experts;
    const void *const *device = w->tables.base ? w->tables.base : w->host_tables;

    for (int layer = 0; layer < c->layers; layer++) {
        if (!c->moe.in_layer[layer])
            continue;
        const struct weight *slots = layer_experts(w, c, layer);
        size_t at = (size_t)moe_index(c, layer) * n * PER_EXPERT;
        for (size_t i = 0; i < n * PER_EXPERT; i++)
            w->host_tables[at + i % PER_EXPERT * n + i / PER_EXPERT] = slots[i].data;
        w->layers[layer].experts = (struct expert_weights){
            .gate = device + at + GATE * n, .up = device + at + UP * n,
            .down = device + at + DOWN * n, .type = slots[0].type };
    }
}

static enum status make_tables(struct binder *b)
{
    struct weights *w = b->w;
    const struct model_config *c = b->config;
    size_t bytes = (size_t)c->moe.layers * (size_t)c->moe.experts * PER_EXPERT * sizeof(void *);

    if (bytes == 0)
        return ST_OK;
    w->host_tables = mem_alloc(bytes);
    if (!backend_info(w->be)->host_visible
        && buffer_alloc(w->be, &w->tables, MEM_DEVICE, bytes) != ST_OK)
        return error_set(b->err, ST_NODEVMEM, "%s: no memory for %zu bytes of tables", b->dir,
                         bytes);
    fill_tables(w, c);
    if (!w->tables.base)
        return ST_OK;
    return upload_all(w->be, &(struct upload){ w->host_tables, w->tables.base, bytes }, 1, NULL,
                      b->err);
}

/* ---- what has no place */

/* Tensors that every reader of these families skips. */
static bool may_skip(const struct model_config *c, const char *name)
{
    static const char prefix[] = "model.layers.", rotary[] = "rotary_emb.inv_freq";
    size_t n = strlen(name), n_rotary = sizeof rotary - 1;
    char *end;

    if (c->tied && strcmp(name, "lm_head.weight") == 0)
        return true;
    if (n >= n_rotary && strcmp(name + n - n_rotary, rotary) == 0)
        return true;
    if (strncmp(name, prefix, sizeof prefix - 1) != 0)
        return false;
    const char *number = name + sizeof prefix - 1;
    if (*number < '0' || *number > '9')
        return false;
    unsigned long layer = strtoul(number, &end, 10);
    return *end == '.' && layer >= (unsigned long)c->layers;
}

static enum status check_leftovers(const struct binder *b)
{
    const struct tensor *first = NULL;
    size_t n = 0;

    if (b->n_missing)
        return error_set(b->err, ST_INVALID, "%s: missing tensors: %zu, the first is %s", b->dir,
                         b->n_missing, b->first_missing);
    for (size_t i = 0; i < safetensors_count(b->w->files); i++) {
        const struct tensor *t = safetensors_at(b->w->files, i);
        if (b->used[i] || may_skip(b->config, t->name))
            continue;
        if (!first || strcmp(t->name, first->name) < 0)
            first = t;
        n++;
    }
    if (first)
        return error_set(b->err, ST_UNSUPPORTED, "%s: tensors without a place in a %s model: %zu, "
                         "the first is %.120s", safetensors_file(b->w->files, first),
                         b->config->family_name, n, first->name);
    return ST_OK;
}

static enum status bind_all(struct binder *b)
{
    struct weights *w = b->w;
    const struct model_config *c = b->config;

    TRY(bind(b, &w->embed, "model.embed_tokens.weight", c->vocab, c->hidden, false));
    for (int l = 0; l < c->layers; l++) {
        TRY(bind_layer(b, l));
        if (c->moe.in_layer[l])
            TRY(bind_experts(b, l));
    }
    TRY(bind(b, &w->norm, "model.norm.weight", c->hidden, 0, false));
    if (!c->tied)
        TRY(bind(b, &w->head, "lm_head.weight", c->vocab, c->hidden, false));
    TRY(check_leftovers(b));
    ASSERT(w->elements == weights_expected_elements(c));
    return ST_OK;
}

/* ---- placing */

static bool used_in_place(const struct weights *w, const struct binding *b)
{
    return backend_info(w->be)->host_visible
           && (uintptr_t)b->tensor->data % dtype_bytes(b->weight->type) == 0;
}

/* Give every tensor that is copied its place behind the ones before, in the order of
 * binding; the bytes taken. */
static size_t lay_out(const struct binder *b, size_t *offset)
{
    const struct binding *last = NULL;
    size_t at = 0;

    for (size_t i = 0; i < b->n; last = &b->bindings[i++]) {
        const struct binding *x = &b->bindings[i];
        if (used_in_place(b->w, x))
            continue;
        if (!x->joins || used_in_place(b->w, last) || x->weight->type != last->weight->type)
            at = (at + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
        offset[i] = at;
        at += x->tensor->bytes;
    }
    return at;
}

static int by_address(const void *a, const void *b)
{
    uintptr_t p = (uintptr_t)((const struct upload *)a)->from;
    uintptr_t q = (uintptr_t)((const struct upload *)b)->from;

    return p < q ? -1 : p > q;
}

/* In the order of the file, so that a cold disk is read forwards. */
static enum status copy_all(struct binder *b, const size_t *offset)
{
    struct upload *list = mem_calloc(b->n, sizeof *list);
    size_t n = 0;

    for (size_t i = 0; i < b->n; i++) {
        const struct binding *x = &b->bindings[i];
        if (used_in_place(b->w, x))
            continue;
        char *to = (char *)b->w->copied.base + offset[i];
        list[n++] = (struct upload){ x->tensor->data, to, x->tensor->bytes };
        x->weight->data = to;
    }
    qsort(list, n, sizeof *list, by_address);
    enum status st = upload_all(b->w->be, list, n, b->progress, b->err);
    mem_free(list);
    return st;
}

static enum status place(struct binder *b)
{
    struct weights *w = b->w;
    size_t *offset = mem_calloc(b->n, sizeof *offset), total = lay_out(b, offset);
    enum status st = ST_OK;

    if (total > 0 && buffer_alloc(w->be, &w->copied, MEM_DEVICE, total) != ST_OK)
        st = error_set(b->err, ST_NODEVMEM, "%s: no memory for %zu bytes of weights", b->dir,
                       total);
    if (st == ST_OK && total > 0)
        st = copy_all(b, offset);
    mem_free(offset);
    return st;
}

/* Whether b lies right behind a [rows, cols], and is of its type; two biases that the
 * model does not have (cols 0) do. */
static bool follows(struct weight a, struct weight b, int rows, int cols)
{
    size_t bytes = elements_of(rows, cols) * dtype_bytes(a.type);

    return a.type == b.type && (!a.data ? !b.data : b.data == (const char *)a.data + bytes);
}

static void find_joined(struct weights *w, const struct model_config *c)
{
    const int q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;

    for (int i = 0; i < w->n_layers; i++) {
        struct layer_weights *l = &w->layers[i];
        if (c->latent.dim)
            l->joined = follows(l->q_a, l->kv_a, c->latent.q_rank, c->hidden);
        else
            l->joined = follows(l->q, l->k, q, c->hidden) && follows(l->k, l->v, kv, c->hidden) &&
                        follows(l->q_bias, l->k_bias, q, 0) &&
                        follows(l->k_bias, l->v_bias, kv, 0);
    }
}

static enum status bind_and_place(struct weights *w, const struct model_config *c,
                                  const char *dir, struct progress *progress,
                                  struct error *err)
{
    struct binder b = { .w = w, .config = c, .dir = dir, .progress = progress, .err = err };

    size_t experts = (size_t)c->moe.layers * (size_t)c->moe.experts * PER_EXPERT;

    if (experts > 0)
        w->experts = mem_calloc(experts, sizeof *w->experts);
    b.bindings = mem_calloc((size_t)c->layers * PER_LAYER_MAX + experts + 3, sizeof *b.bindings);
    b.used = mem_calloc(safetensors_count(w->files) + 1, sizeof *b.used);
    enum status st = bind_all(&b);
    if (st == ST_OK)
        st = place(&b);
    if (st == ST_OK)
        st = make_tables(&b);
    find_joined(w, c);
    if (c->tied)
        w->head = w->embed;
    mem_free(b.bindings);
    mem_free(b.used);
    return st;
}

enum status weights_open(struct weights **out, struct backend *be,
                         const struct model_config *config, const char *dir,
                         struct progress *progress, struct error *err)
{
    struct weights *w = mem_calloc(1, sizeof *w);

    *out = NULL;
    w->be = be;
    w->n_layers = config->layers;
    w->layers = mem_calloc((size_t)config->layers, sizeof *w->layers);
    enum status st = safetensors_open(&w->files, dir, err);
    if (st == ST_OK)
        st = bind_and_place(w, config, dir, progress, err);
    if (st != ST_OK) {
        weights_close(w);
        return st;
    }
    if (!backend_info(be)->host_visible) {
        safetensors_close(w->files);
        w->files = NULL;
    }
    *out = w;
    return ST_OK;
}

void weights_close(struct weights *w)
{
    if (!w)
        return;
    buffer_free(w->be, &w->copied);
    buffer_free(w->be, &w->tables);
    safetensors_close(w->files);
    mem_free(w->layers);
    mem_free(w->experts);
    mem_free(w->host_tables);
    mem_free(w);
}

struct weight weights_embed(const struct weights *w)
{
    return w->embed;
}

struct weight weights_norm(const struct weights *w)
{
    return w->norm;
}

struct weight weights_head(const struct weights *w)
{
    return w->head;
}

const struct layer_weights *weights_layer(const struct weights *w, int layer)
{
    ASSERT(layer >= 0 && layer < w->n_layers);
    return &w->layers[layer];
}

uint64_t weights_bytes(const struct weights *w)
{
    return w->bytes;
}

uint64_t weights_elements(const struct weights *w)
{
    return w->elements;
}
