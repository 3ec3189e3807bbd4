#ifndef MODEL_CONFIG_H
#define MODEL_CONFIG_H

#include "engine/base/status.h"
#include "engine/select/select.h"
#include "kernels/experts.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* config.json and generation_config.json of a Hugging Face folder, checked.
 *
 * Both layouts are read (rope_theta and rope_scaling of transformers v4,
 * rope_parameters of v5).  What this program does not implement is refused
 * with one sentence that names the file and the key: an unknown key that
 * changes the forward pass is never ignored. */

enum model_family {
    FAMILY_QWEN3, FAMILY_QWEN2, FAMILY_LLAMA, FAMILY_MISTRAL, /* SmolLM2 is a llama */
    FAMILY_QWEN3_MOE,
    FAMILY_GLM4_MOE_LITE         /* GLM-4.7-Flash */
};

enum { MODEL_MAX_EOS = 16, MODEL_MAX_HEAD_DIM = 256, MODEL_MAX_LATENT_DIM = 2048 };

/* Latent attention (kernels/latent.h): of low rank are the queries, and keys and values together.
 * The norms of both use the model's norm_eps, as in vLLM; transformers has 1e-6 there, whatever
 * config.json says. */
struct latent_config {
    int dim;                         /* of what is kept of keys and values; 0: another attention,
                                        and nothing below is set */
    int q_rank;
    int nope, rope, value;           /* of a head: its query without and with rotation, its value */
    bool interleaved;                /* pairs that are rotated are neighbours */
};

/* The mixture of experts that takes the place of the MLP in some layers. */
struct moe_config {
    int layers;                      /* that have experts; 0: none, and nothing below is set */
    bool in_layer[SELECT_MAX_LAYERS];
    int experts, chosen;             /* in all, for each token */
    int expert_mlp;                  /* an expert's width */
    bool renormalise;                /* the weights of the chosen sum up to 1 */
    enum router_score score;         /* with sigmoid each layer has a bias for the choice */
    float scale;                     /* of the weights */
    int shared_mlp;                  /* width of the MLP beside the experts; 0: none */
};

struct model_config {
    enum model_family family;
    char family_name[32];            /* model_type as written */
    int layers, hidden, heads, vocab;
    int kv_heads, head_dim;          /* with latent attention 1, of latent.dim + latent.rope */
    struct latent_config latent;
    int mlp;                         /* of layers without experts */
    int max_position;                /* tokens, from max_position_embeddings */
    int sliding_window;              /* 0: none.  Contexts must not exceed it */
    float norm_eps;
    bool tied, qkv_bias, qk_norm;
    float score_scale;               /* multiplies the products of queries and keys */
    float rope_factor;               /* multiplies cos and sin */
    float inv_freq[MODEL_MAX_HEAD_DIM / 2]; /* [model_rope_dim / 2], scaling applied */
    struct moe_config moe;
    int32_t bos, pad;                /* -1: none */
    int32_t eos[MODEL_MAX_EOS];      /* generation_config first, else config */
    int n_eos;
    /* Defaults for requests, from generation_config.json; see has_*. */
    bool has_temperature, has_top_p, has_top_k, has_min_p, has_repetition;
    float temperature, top_p, min_p, repetition;
    int top_k;
};

/* Width of what is rotated of a query or key. */
static inline int model_rope_dim(const struct model_config *c)
{
    return c->latent.dim ? c->latent.rope : c->head_dim;
}

/* Width of what all heads together hand to the output projection. */
static inline int model_attention_dim(const struct model_config *c)
{
    return c->heads * (c->latent.dim ? c->latent.value : c->head_dim);
}

/* dir is the model folder. */
enum status model_config_read(struct model_config *out, const char *dir,
                              struct error *err) MUST_USE;

/* The same from texts; generation may be NULL.  name_* go into sentences. */
enum status model_config_parse(struct model_config *out, const char *json, size_t n,
                               const char *generation, size_t n_generation,
                               struct error *err) MUST_USE;

#endif
