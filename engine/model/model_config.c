#include "engine/model/model_config.h"

#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/model/model_config_parts.h"
#include "engine/select/select.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
    MAX_FILE_BYTES = 4 << 20,
    MAX_WIDTH = 1 << 18,         /* hidden, heads * head_dim */
    MAX_HEADS = 1024,
    MAX_VOCAB = 1 << 22,
    QWEN3_HEAD_DIM = 128,        /* class defaults of the reference implementation */
    MISTRAL_WINDOW = 4096,
    QWEN_FULL_LAYERS = 28
};

struct family_facts {
    const char *model_type, *architecture;
    enum model_family family;
    bool qkv_bias, qk_norm;
};

static const struct family_facts families[] = {
    { "qwen3", "Qwen3ForCausalLM", FAMILY_QWEN3, false, true },
    { "qwen2", "Qwen2ForCausalLM", FAMILY_QWEN2, true, false },
    { "llama", "LlamaForCausalLM", FAMILY_LLAMA, false, false },
    { "mistral", "MistralForCausalLM", FAMILY_MISTRAL, false, false },
    { "qwen3_moe", "Qwen3MoeForCausalLM", FAMILY_QWEN3_MOE, false, true },
    { "glm4_moe_lite", "Glm4MoeLiteForCausalLM", FAMILY_GLM4_MOE_LITE, false, false },
};

/* Keys of other architectures that some folders carry under one of our
 * model_types.  Any other key that is not read here is one the reference
 * implementations of our families do not read either. */
enum neutral { NEVER, FALSE_OR_ZERO, ONE };
enum { QWEN3_MOE = 1u << FAMILY_QWEN3_MOE, GLM = 1u << FAMILY_GLM4_MOE_LITE };

static const struct refused_key {
    const char *key;
    enum neutral neutral;        /* the value with which the key says nothing */
    const char *what;
    unsigned readers;            /* families that read it: bits by number */
} refused_keys[] = {
    { "quantization_config", NEVER, "quantised weights", 0 },
    { "compression_config", NEVER, "compressed weights", 0 },
    { "num_experts", FALSE_OR_ZERO, "mixture of experts", QWEN3_MOE },
    { "num_local_experts", FALSE_OR_ZERO, "mixture of experts", QWEN3_MOE | GLM },
    { "moe_intermediate_size", FALSE_OR_ZERO, "mixture of experts", QWEN3_MOE | GLM },
    { "n_routed_experts", FALSE_OR_ZERO, "mixture of experts of another family", GLM },
    { "n_shared_experts", FALSE_OR_ZERO, "shared experts", GLM },
    { "shared_expert_intermediate_size", FALSE_OR_ZERO, "shared experts", 0 },
    { "kv_lora_rank", FALSE_OR_ZERO, "multi-head latent attention", GLM },
    { "q_lora_rank", FALSE_OR_ZERO, "multi-head latent attention", GLM },
    { "qk_rope_head_dim", FALSE_OR_ZERO, "multi-head latent attention", GLM },
    { "v_head_dim", FALSE_OR_ZERO, "values of another width than keys", GLM },
    { "mlp_bias", FALSE_OR_ZERO, "a bias in the MLP", 0 },
    { "qk_layernorm", FALSE_OR_ZERO, "another norm of queries and keys", 0 },
    { "use_qk_norm", FALSE_OR_ZERO, "another norm of queries and keys", 0 },
    { "rope_interleaved", FALSE_OR_ZERO, "interleaved rotary embedding", 0 },
    { "rope_local_base_freq", NEVER, "a second rotary base", 0 },
    { "no_rope_layers", NEVER, "layers without rotary embedding", 0 },
    { "no_rope_layer_interval", NEVER, "layers without rotary embedding", 0 },
    { "alibi", FALSE_OR_ZERO, "ALiBi", 0 },
    { "attention_chunk_size", FALSE_OR_ZERO, "chunked attention", 0 },
    { "attn_temperature_tuning", FALSE_OR_ZERO, "attention temperature", 0 },
    { "dual_chunk_attention_config", NEVER, "dual chunk attention", 0 },
    { "sliding_window_pattern", NEVER, "alternating sliding windows", 0 },
    { "query_pre_attn_scalar", NEVER, "another attention scale", 0 },
    { "attn_logit_softcapping", FALSE_OR_ZERO, "soft-capped attention", 0 },
    { "final_logit_softcapping", FALSE_OR_ZERO, "soft-capped logits", 0 },
    { "clip_qkv", FALSE_OR_ZERO, "clipped queries and keys", 0 },
    { "logit_scale", ONE, "scaled logits", 0 },
    { "logits_scaling", ONE, "scaled logits", 0 },
    { "embedding_multiplier", ONE, "scaled embeddings", 0 },
    { "attention_multiplier", ONE, "another attention scale", 0 },
    { "residual_multiplier", ONE, "a scaled residual stream", 0 },
    { "scale_emb", ONE, "scaled embeddings", 0 },
    { "scale_depth", ONE, "a scaled residual stream", 0 },
    { "is_encoder_decoder", FALSE_OR_ZERO, "an encoder", 0 },
    { "add_cross_attention", FALSE_OR_ZERO, "cross attention", 0 },
    { "text_config", NEVER, "a multimodal model", 0 },
    { "vision_config", NEVER, "a multimodal model", 0 },
    { "audio_config", NEVER, "a multimodal model", 0 },
    { "auto_map", NEVER, "code that comes with the model", 0 },
};

static bool is_neutral(const cJSON *item, enum neutral neutral)
{
    switch (neutral) {
    case FALSE_OR_ZERO:
        return cJSON_IsFalse(item) || (cJSON_IsNumber(item) && item->valuedouble == 0);
    case ONE:
        return cJSON_IsNumber(item) && item->valuedouble == 1;
    case NEVER:
        break;
    }
    return false;
}

static enum status check_refused(const struct model_config *c, const struct json_file *f,
                                 struct error *err)
{
    for (size_t i = 0; i < sizeof refused_keys / sizeof *refused_keys; i++) {
        const struct refused_key *r = &refused_keys[i];
        const cJSON *item = json_get(f->root, r->key);
        if (!(r->readers & 1u << c->family) && item && !is_neutral(item, r->neutral))
            return error_set(err, ST_UNSUPPORTED, "%s: \"%s\" asks for %s, which is not "
                             "implemented for %s", f->name, r->key, r->what, c->family_name);
    }
    return ST_OK;
}

static enum status read_family(struct model_config *c, const struct json_file *f,
                               struct error *err)
{
    const char *type = NULL, *act = "silu";
    const struct family_facts *facts = NULL;
    const cJSON *architectures = json_get(f->root, "architectures");
    const cJSON *architecture = cJSON_GetArrayItem(architectures, 0);

    TRY(json_string(f, f->root, "model_type", &type, err));
    if (!type)
        return error_set(err, ST_INVALID, "%s: \"model_type\" is missing", f->name);
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        if (strcmp(families[i].model_type, type) == 0)
            facts = &families[i];
    if (!facts)
        return error_set(err, ST_UNSUPPORTED, "%s: \"model_type\" is \"%.60s\"; qwen3, "
                         "qwen3_moe, qwen2, llama, mistral and glm4_moe_lite are implemented",
                         f->name, type);
    if ((architectures && !cJSON_IsArray(architectures))
        || (architecture && (!cJSON_IsString(architecture)
                             || strcmp(architecture->valuestring, facts->architecture) != 0)))
        return error_set(err, ST_UNSUPPORTED, "%s: \"architectures\" does not say %s, the one "
                         "implemented for \"model_type\" %s", f->name, facts->architecture, type);
    TRY(json_string(f, f->root, "hidden_act", &act, err));
    if (strcmp(act, "silu") != 0 && strcmp(act, "swish") != 0)
        return error_set(err, ST_UNSUPPORTED, "%s: \"hidden_act\" is \"%.60s\"; only silu is "
                         "implemented", f->name, act);
    c->family = facts->family;
    c->qkv_bias = facts->qkv_bias;
    c->qk_norm = facts->qk_norm;
    snprintf(c->family_name, sizeof c->family_name, "%s", type);
    return ST_OK;
}

/* Qwen2 has its biases without a key; the others would also get one behind the
 * attention. */
static enum status check_attention_bias(const struct model_config *c, const struct json_file *f,
                                        struct error *err)
{
    bool bias = false;

    TRY(json_bool(f, f->root, "attention_bias", &bias, err));
    if (bias && c->family != FAMILY_QWEN2)
        return error_set(err, ST_UNSUPPORTED, "%s: \"attention_bias\" is true, which is not "
                         "implemented for %s", f->name, c->family_name);
    return ST_OK;
}

enum status config_required(const struct json_file *f, const char *key, int max, int *value,
                            struct error *err)
{
    *value = 0;
    TRY(json_int(f, f->root, key, 1, max, value, err));
    if (*value == 0)
        return error_set(err, ST_INVALID, "%s: \"%s\" is missing", f->name, key);
    return ST_OK;
}

/* Transformers knows a form without q_lora_rank, whose queries are one product. */
static enum status read_latent(struct model_config *c, const struct json_file *f,
                               struct error *err)
{
    struct latent_config *l = &c->latent;
    const struct { const char *key; int max, *value; } widths[] = {
        { "q_lora_rank", MAX_WIDTH, &l->q_rank },
        { "kv_lora_rank", MODEL_MAX_LATENT_DIM, &l->dim },
        { "qk_nope_head_dim", MODEL_MAX_HEAD_DIM, &l->nope },
        { "qk_rope_head_dim", MODEL_MAX_HEAD_DIM, &l->rope },
        { "v_head_dim", MODEL_MAX_HEAD_DIM, &l->value },
    };

    if (cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(f->root, "q_lora_rank")))
        return error_set(err, ST_UNSUPPORTED, "%s: \"q_lora_rank\" is null: queries without a "
                         "low rank are not implemented", f->name);
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
        TRY(config_required(f, widths[i].key, widths[i].max, widths[i].value, err));
    if (l->rope % 2 != 0)
        return error_set(err, ST_INVALID, "%s: \"qk_rope_head_dim\" is %d; it must be even",
                         f->name, l->rope);
    l->interleaved = true;
    TRY(json_bool(f, f->root, "rope_interleave", &l->interleaved, err));
    c->kv_heads = 1;             /* whatever num_key_value_heads says */
    c->head_dim = l->dim + l->rope;
    return ST_OK;
}

static enum status read_plain_heads(struct model_config *c, const struct json_file *f,
                                    struct error *err)
{
    c->kv_heads = c->heads;
    TRY(json_int(f, f->root, "num_key_value_heads", 1, c->heads, &c->kv_heads, err));
    if (c->heads % c->kv_heads != 0)
        return error_set(err, ST_INVALID, "%s: \"num_attention_heads\" %d is not a multiple of "
                         "\"num_key_value_heads\" %d", f->name, c->heads, c->kv_heads);
    c->head_dim = c->family == FAMILY_QWEN3 ? QWEN3_HEAD_DIM : 0;
    TRY(json_int(f, f->root, "head_dim", 1, MODEL_MAX_HEAD_DIM, &c->head_dim, err));
    if (c->head_dim == 0) {
        if (c->hidden % c->heads != 0)
            return error_set(err, ST_INVALID, "%s: \"hidden_size\" %d is not a multiple of "
                             "\"num_attention_heads\" %d and there is no \"head_dim\"", f->name,
                             c->hidden, c->heads);
        c->head_dim = c->hidden / c->heads;
    }
    if (c->head_dim % 2 != 0 || c->head_dim > MODEL_MAX_HEAD_DIM)
        return error_set(err, ST_UNSUPPORTED, "%s: a \"head_dim\" of %d is not implemented; it "
                         "must be even and at most %d", f->name, c->head_dim,
                         MODEL_MAX_HEAD_DIM);
    return ST_OK;
}

static enum status read_heads(struct model_config *c, const struct json_file *f,
                              struct error *err)
{
    TRY(config_required(f, "num_attention_heads", MAX_HEADS, &c->heads, err));
    if (c->family == FAMILY_GLM4_MOE_LITE)
        TRY(read_latent(c, f, err));
    else
        TRY(read_plain_heads(c, f, err));
    if (c->heads * c->head_dim > MAX_WIDTH)
        return error_set(err, ST_UNSUPPORTED, "%s: \"num_attention_heads\" %d, of %d values "
                         "each, are together more than %d", f->name, c->heads, c->head_dim,
                         MAX_WIDTH);
    return ST_OK;
}

static enum status read_shape(struct model_config *c, const struct json_file *f,
                              struct error *err)
{
    double eps = c->family == FAMILY_GLM4_MOE_LITE ? 1e-5 : 1e-6;

    TRY(config_required(f, "hidden_size", MAX_WIDTH, &c->hidden, err));
    TRY(config_required(f, "intermediate_size", MAX_MLP, &c->mlp, err));
    TRY(config_required(f, "num_hidden_layers", SELECT_MAX_LAYERS, &c->layers, err));
    TRY(config_required(f, "vocab_size", MAX_VOCAB, &c->vocab, err));
    TRY(config_required(f, "max_position_embeddings", MAX_POSITION, &c->max_position, err));
    TRY(read_heads(c, f, err));
    TRY(json_double(f, f->root, "rms_norm_eps", 1e-12, 0.1, &eps, err));
    c->norm_eps = (float)eps;
    return json_bool(f, f->root, "tie_word_embeddings", &c->tied, err);
}

/* ---- sliding windows */

/* How many layers slide: from layer_types if there, else by the family's rule. */
static enum status count_sliding(int *sliding, const struct model_config *c,
                                 const struct json_file *f, int by_rule, struct error *err)
{
    const cJSON *types = json_get(f->root, "layer_types"), *t;

    *sliding = by_rule;
    if (!types)
        return ST_OK;
    if (!cJSON_IsArray(types) || cJSON_GetArraySize(types) != c->layers)
        return error_set(err, ST_INVALID, "%s: \"layer_types\" must be a list of %d names",
                         f->name, c->layers);
    *sliding = 0;
    cJSON_ArrayForEach(t, types) {
        bool slides = cJSON_IsString(t) && strcmp(t->valuestring, "sliding_attention") == 0;
        if (!slides && (!cJSON_IsString(t) || strcmp(t->valuestring, "full_attention") != 0))
            return error_set(err, ST_UNSUPPORTED, "%s: \"layer_types\" has \"%.60s\", which is "
                             "not implemented", f->name,
                             cJSON_IsString(t) ? t->valuestring : "no name");
        *sliding += slides;
    }
    return ST_OK;
}

/* A window that all layers share is the same as full attention up to its own
 * length, so it becomes a limit of the context.  Windows in some layers would
 * need two kinds of attention. */
static enum status read_window(struct model_config *c, const struct json_file *f,
                               struct error *err)
{
    bool moe = c->family == FAMILY_QWEN3_MOE, use = false;
    bool qwen = c->family == FAMILY_QWEN2 || c->family == FAMILY_QWEN3 || moe;
    int window = 0, full_layers = QWEN_FULL_LAYERS, sliding;

    if (c->family == FAMILY_MISTRAL && !cJSON_GetObjectItemCaseSensitive(f->root,
                                                                         "sliding_window"))
        window = MISTRAL_WINDOW;
    TRY(json_int(f, f->root, "sliding_window", 1, MAX_POSITION, &window, err));
    TRY(json_bool(f, f->root, "use_sliding_window", &use, err));
    TRY(json_int(f, f->root, "max_window_layers", 0, MAX_POSITION, &full_layers, err));
    int by_rule = c->layers;
    if (qwen && !moe)            /* the latter's windows, if any, are in all layers */
        by_rule = full_layers < c->layers ? c->layers - full_layers : 0;
    if (window == 0 || (qwen && !use))
        window = by_rule = 0;
    TRY(count_sliding(&sliding, c, f, by_rule, err));
    if (c->family == FAMILY_MISTRAL && sliding == 0)
        sliding = by_rule;       /* Mistral's windows do not ask layer_types */
    if (sliding == 0)
        return ST_OK;
    if ((!qwen && c->family != FAMILY_MISTRAL) || window == 0)
        return error_set(err, ST_UNSUPPORTED, "%s: \"%s\" asks for sliding windows, which are "
                         "not implemented for %s", f->name,
                         window ? "sliding_window" : "layer_types", c->family_name);
    if (sliding != c->layers)
        return error_set(err, ST_UNSUPPORTED, "%s: \"%s\" asks for sliding windows in %d of %d "
                         "layers, which is not implemented", f->name,
                         json_get(f->root, "layer_types") ? "layer_types" : "max_window_layers",
                         sliding, c->layers);
    c->sliding_window = window;
    return ST_OK;
}

/* ---- special tokens and defaults of requests */

static enum status add_eos(struct model_config *c, const struct json_file *f, const cJSON *item,
                           struct error *err)
{
    double v = cJSON_IsNumber(item) ? item->valuedouble : NAN;

    if (!(v >= 0 && v < c->vocab) || v != floor(v))
        return error_set(err, ST_INVALID, "%s: \"eos_token_id\" must be token ids from 0 to %d",
                         f->name, c->vocab - 1);
    for (int i = 0; i < c->n_eos; i++)
        if (c->eos[i] == (int32_t)v)
            return ST_OK;
    if (c->n_eos == MODEL_MAX_EOS)
        return error_set(err, ST_UNSUPPORTED, "%s: \"eos_token_id\" has more than %d ids",
                         f->name, MODEL_MAX_EOS);
    c->eos[c->n_eos++] = (int32_t)v;
    return ST_OK;
}

static enum status read_eos(struct model_config *c, const struct json_file *f,
                            struct error *err)
{
    const cJSON *eos = json_get(f->root, "eos_token_id"), *item;

    if (!eos)
        return ST_OK;
    if (!cJSON_IsArray(eos))
        return add_eos(c, f, eos, err);
    cJSON_ArrayForEach(item, eos)
        TRY(add_eos(c, f, item, err));
    return ST_OK;
}

static enum status read_tokens(struct model_config *c, const struct json_file *f,
                               struct error *err)
{
    c->bos = c->pad = -1;
    TRY(json_int(f, f->root, "bos_token_id", -1, c->vocab - 1, &c->bos, err));
    return json_int(f, f->root, "pad_token_id", -1, c->vocab - 1, &c->pad, err);
}

static enum status read_default(const struct json_file *f, const char *key, double min,
                                double max, bool *has, float *value, struct error *err)
{
    double v = *value;

    *has = json_get(f->root, key) != NULL;
    TRY(json_double(f, f->root, key, min, max, &v, err));
    *value = (float)v;
    return ST_OK;
}

static enum status read_generation(struct model_config *c, const struct json_file *f,
                                   struct error *err)
{
    c->temperature = c->top_p = c->repetition = 1;
    TRY(read_eos(c, f, err));
    TRY(read_default(f, "temperature", 0, 100, &c->has_temperature, &c->temperature, err));
    TRY(read_default(f, "top_p", 1e-6, 1, &c->has_top_p, &c->top_p, err));
    TRY(read_default(f, "min_p", 0, 1, &c->has_min_p, &c->min_p, err));
    TRY(read_default(f, "repetition_penalty", 1e-2, 100, &c->has_repetition, &c->repetition,
                     err));
    c->has_top_k = json_get(f->root, "top_k") != NULL;
    TRY(json_int(f, f->root, "top_k", -1, MAX_VOCAB, &c->top_k, err));
    c->top_k = c->top_k < 0 ? 0 : c->top_k;
    return ST_OK;
}

static enum status read_config(struct model_config *c, const struct json_file *f,
                               struct error *err)
{
    TRY(read_family(c, f, err));
    TRY(check_refused(c, f, err));
    TRY(check_attention_bias(c, f, err));
    TRY(read_shape(c, f, err));
    TRY(config_read_moe(c, f, err));
    TRY(read_window(c, f, err));
    TRY(config_read_rope(c, f, err));
    return read_tokens(c, f, err);
}

/* ---- texts and files */

struct named_text {
    const char *name, *text;     /* text NULL: absent */
    size_t n;
};

static enum status parse_named(struct model_config *out, const struct named_text *config,
                               const struct named_text *generation, struct error *err)
{
    struct json_file f = { 0 }, g = { 0 };
    enum status st;

    *out = (struct model_config){ .temperature = 1, .top_p = 1, .repetition = 1 };
    st = json_file_parse(&f, config->name, config->text, config->n, MAX_FILE_BYTES, err);
    if (st == ST_OK)
        st = read_config(out, &f, err);
    if (st == ST_OK && generation->text) {
        st = json_file_parse(&g, generation->name, generation->text, generation->n,
                             MAX_FILE_BYTES, err);
        if (st == ST_OK)
            st = read_generation(out, &g, err);
    }
    if (st == ST_OK && out->n_eos == 0)
        st = read_eos(out, &f, err);
    json_file_fini(&g);
    json_file_fini(&f);
    return st;
}

enum status model_config_parse(struct model_config *out, const char *json, size_t n,
                               const char *generation, size_t n_generation, struct error *err)
{
    struct named_text config = { "config.json", json, n };
    struct named_text defaults = { "generation_config.json", generation, n_generation };

    return parse_named(out, &config, &defaults, err);
}

enum status model_config_read(struct model_config *out, const char *dir, struct error *err)
{
    struct strbuf config_path = { 0 }, defaults_path = { 0 };
    char *config = NULL, *defaults = NULL;
    size_t n = 0, n_defaults = 0;
    bool absent = false;

    strbuf_printf(&config_path, "%s/config.json", dir);
    strbuf_printf(&defaults_path, "%s/generation_config.json", dir);
    enum status st = file_read(&config, &n, config_path.data, MAX_FILE_BYTES, NULL, err);
    if (st == ST_OK) {
        st = file_read(&defaults, &n_defaults, defaults_path.data, MAX_FILE_BYTES, &absent, err);
        if (absent)
            st = ST_OK;
    }
    if (st == ST_OK)
        st = parse_named(out, &(struct named_text){ config_path.data, config, n },
                         &(struct named_text){ defaults_path.data, defaults, n_defaults }, err);
    mem_free(config);
    mem_free(defaults);
    strbuf_fini(&config_path);
    strbuf_fini(&defaults_path);
    return st;
}
