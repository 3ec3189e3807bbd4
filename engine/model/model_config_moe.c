#include "engine/model/model_config_parts.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <string.h>

enum {
    QWEN3_MOE_EXPERTS = 128,     /* class defaults of the reference implementation */
    QWEN3_MOE_CHOSEN = 8,
    QWEN3_MOE_EXPERT_MLP = 768,
    GLM_DENSE_LAYERS = 1,
    GLM_SHARED = 1
};
static const double GLM_ROUTER_SCALE = 1.8;

/* The number of experts; a saved v5 folder may say num_local_experts. */
static enum status read_count(struct moe_config *m, const struct json_file *f, const char *key,
                              struct error *err)
{
    int local = -1;

    m->experts = -1;
    TRY(json_int(f, f->root, key, 0, MOST_EXPERTS, &m->experts, err));
    TRY(json_int(f, f->root, "num_local_experts", 0, MOST_EXPERTS, &local, err));
    if (m->experts >= 0 && local >= 0 && m->experts != local)
        return error_set(err, ST_INVALID, "%s: \"%s\" is %d and \"num_local_experts\" %d",
                         f->name, key, m->experts, local);
    if (m->experts < 0)
        m->experts = local;
    return ST_OK;
}

/* What is left out keeps the value that *m has. */
static enum status read_choice(struct moe_config *m, const struct json_file *f,
                               struct error *err)
{
    TRY(json_int(f, f->root, "num_experts_per_tok", 1, MOST_CHOSEN, &m->chosen, err));
    TRY(json_int(f, f->root, "moe_intermediate_size", 1, MAX_MLP, &m->expert_mlp, err));
    if (m->experts > 0 && m->chosen > m->experts)
        return error_set(err, ST_INVALID, "%s: \"num_experts_per_tok\" %d is more than the %d "
                         "experts", f->name, m->chosen, m->experts);
    return json_bool(f, f->root, "norm_topk_prob", &m->renormalise, err);
}

/* ---- Qwen3 */

/* Layers without experts: those that mlp_only_layers names, and where decoder_sparse_step is n all
 * but each n-th. */
static enum status read_qwen_layers(struct model_config *c, const struct json_file *f,
                                    struct error *err)
{
    const cJSON *only = json_get(f->root, "mlp_only_layers"), *item;
    struct moe_config *m = &c->moe;
    int step = 1;

    TRY(json_int(f, f->root, "decoder_sparse_step", 1, MAX_POSITION, &step, err));
    for (int l = 0; l < c->layers; l++)
        m->in_layer[l] = m->experts > 0 && (l + 1) % step == 0;
    if (only && !cJSON_IsArray(only))
        return error_set(err, ST_INVALID, "%s: \"mlp_only_layers\" must be a list of layers",
                         f->name);
    cJSON_ArrayForEach(item, only) {
        double v = cJSON_IsNumber(item) ? item->valuedouble : NAN;
        if (!(v >= 0 && v < c->layers) || v != floor(v))
            return error_set(err, ST_INVALID, "%s: \"mlp_only_layers\" must be layers from 0 to "
                             "%d", f->name, c->layers - 1);
        m->in_layer[(int)v] = false;
    }
    return ST_OK;
}

static enum status read_qwen(struct model_config *c, const struct json_file *f,
                             struct error *err)
{
    struct moe_config *m = &c->moe;

    m->score = ROUTER_SOFTMAX;
    m->scale = 1;
    m->chosen = QWEN3_MOE_CHOSEN;
    m->expert_mlp = QWEN3_MOE_EXPERT_MLP;
    TRY(read_count(m, f, "num_experts", err));
    if (m->experts < 0)
        m->experts = QWEN3_MOE_EXPERTS;
    TRY(read_choice(m, f, err));
    return read_qwen_layers(c, f, err);
}

/* ---- GLM-4 */

/* A saved v5 folder names the kind of each layer; before there was a number of dense ones. */
static enum status read_glm_layers(struct model_config *c, const struct json_file *f,
                                   struct error *err)
{
    const cJSON *types = json_get(f->root, "mlp_layer_types"), *t;
    int dense = GLM_DENSE_LAYERS, layer = 0;

    TRY(json_int(f, f->root, "first_k_dense_replace", 0, MAX_POSITION, &dense, err));
    for (int l = 0; l < c->layers; l++)
        c->moe.in_layer[l] = l >= dense;
    if (!types)
        return ST_OK;
    if (!cJSON_IsArray(types) || cJSON_GetArraySize(types) != c->layers)
        return error_set(err, ST_INVALID, "%s: \"mlp_layer_types\" must be a list of %d names",
                         f->name, c->layers);
    cJSON_ArrayForEach(t, types) {
        bool sparse = cJSON_IsString(t) && strcmp(t->valuestring, "sparse") == 0;
        if (!sparse && (!cJSON_IsString(t) || strcmp(t->valuestring, "dense") != 0))
            return error_set(err, ST_INVALID, "%s: \"mlp_layer_types\" must be \"dense\" or "
                             "\"sparse\" for each layer", f->name);
        c->moe.in_layer[layer++] = sparse;
    }
    return ST_OK;
}

/* Keys of this router's relatives, with the only value that is implemented. */
static enum status check_glm_router(const struct json_file *f, struct error *err)
{
    static const struct { const char *key, *value; } words[] = {
        { "topk_method", "noaux_tc" }, { "scoring_func", "sigmoid" },
    };
    static const char *const ones[] = { "n_group", "topk_group", "moe_layer_freq" };

    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        const char *value = words[i].value;
        TRY(json_string(f, f->root, words[i].key, &value, err));
        if (strcmp(value, words[i].value) != 0)
            return error_set(err, ST_UNSUPPORTED, "%s: \"%s\" is \"%.60s\"; only %s is "
                             "implemented", f->name, words[i].key, value, words[i].value);
    }
    for (size_t i = 0; i < sizeof ones / sizeof *ones; i++) {
        int value = 1;
        TRY(json_int(f, f->root, ones[i], 1, MAX_POSITION, &value, err));
        if (value != 1)
            return error_set(err, ST_UNSUPPORTED, "%s: \"%s\" is %d; only 1 is implemented",
                             f->name, ones[i], value);
    }
    return ST_OK;
}

static enum status read_glm(struct model_config *c, const struct json_file *f,
                            struct error *err)
{
    struct moe_config *m = &c->moe;
    double scale = GLM_ROUTER_SCALE;
    int shared = GLM_SHARED;

    m->score = ROUTER_SIGMOID;
    m->renormalise = true;
    TRY(check_glm_router(f, err));
    TRY(read_count(m, f, "n_routed_experts", err));
    if (m->experts < 1)
        return error_set(err, ST_INVALID, "%s: \"n_routed_experts\" must be there, from 1 on",
                         f->name);
    TRY(config_required(f, "num_experts_per_tok", MOST_CHOSEN, &m->chosen, err));
    TRY(config_required(f, "moe_intermediate_size", MAX_MLP, &m->expert_mlp, err));
    TRY(read_choice(m, f, err));
    TRY(json_double(f, f->root, "routed_scaling_factor", 1e-6, 1e6, &scale, err));
    TRY(json_int(f, f->root, "n_shared_experts", 0, MAX_MLP / m->expert_mlp, &shared, err));
    m->scale = (float)scale;
    m->shared_mlp = shared * m->expert_mlp;
    return read_glm_layers(c, f, err);
}

enum status config_read_moe(struct model_config *c, const struct json_file *f,
                            struct error *err)
{
    if (c->family == FAMILY_QWEN3_MOE)
        TRY(read_qwen(c, f, err));
    else if (c->family == FAMILY_GLM4_MOE_LITE)
        TRY(read_glm(c, f, err));
    for (int l = 0; l < c->layers; l++)
        c->moe.layers += c->moe.in_layer[l];
    if (c->moe.layers == 0)
        c->moe = (struct moe_config){ 0 };
    return ST_OK;
}
