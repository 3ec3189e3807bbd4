/* config.json and generation_config.json.  What is accepted is within the limits that the
 * rest of the program relies on; what is refused has a sentence.  One input in eight also
 * goes through files, which must make no difference.
 *
 * An input is the two texts with a NUL between them; or, when its first byte is 0xff,
 * changes of a good config, three bytes each: which object, key and value. */

#include "engine/base/invariant.h"
#include "engine/base/strbuf.h"
#include "engine/model/model_config.h"
#include "engine/model/weights.h"
#include "engine/select/select.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static bool in(double v, double min, double max)
{
    return v >= min && v <= max;
}

/* What latent attention makes of the width of a head. */
static void check_latent(const struct model_config *c)
{
    const struct latent_config *l = &c->latent;

    ASSERT(in(l->dim, 1, MODEL_MAX_LATENT_DIM) && in(l->q_rank, 1, 1 << 18));
    ASSERT(in(l->nope, 1, MODEL_MAX_HEAD_DIM) && in(l->value, 1, MODEL_MAX_HEAD_DIM));
    ASSERT(in(l->rope, 2, MODEL_MAX_HEAD_DIM) && l->rope % 2 == 0);
    ASSERT(c->kv_heads == 1 && c->head_dim == l->dim + l->rope);
}

static void check(const struct model_config *c)
{
    ASSERT(in(c->layers, 1, SELECT_MAX_LAYERS) && in(c->hidden, 1, 1 << 18));
    ASSERT(in(c->mlp, 1, 1 << 20) && in(c->vocab, 1, 1 << 22));
    ASSERT(in(c->kv_heads, 1, 1024) && in(c->heads, c->kv_heads, 1024));
    ASSERT(c->heads % c->kv_heads == 0 && c->heads * c->head_dim <= 1 << 18);
    if (c->family == FAMILY_GLM4_MOE_LITE)
        check_latent(c);
    else
        ASSERT(!c->latent.dim && in(c->head_dim, 2, MODEL_MAX_HEAD_DIM) && c->head_dim % 2 == 0);
    ASSERT(in(c->max_position, 1, 1 << 24) && in(c->sliding_window, 0, 1 << 24));
    ASSERT(c->norm_eps > 0 && c->norm_eps < 1 && *c->family_name);
    ASSERT(isfinite(c->rope_factor) && c->rope_factor > 0);
    ASSERT(isfinite(c->score_scale) && c->score_scale > 0);
    for (int i = 0; i < model_rope_dim(c) / 2; i++)
        ASSERT(isfinite(c->inv_freq[i]) && in((double)c->inv_freq[i], 0, 1));
    ASSERT(in(c->bos, -1, c->vocab - 1) && in(c->pad, -1, c->vocab - 1));
    ASSERT(in(c->n_eos, 0, MODEL_MAX_EOS));
    for (int i = 0; i < c->n_eos; i++)
        ASSERT(in(c->eos[i], 0, c->vocab - 1));
    ASSERT(in((double)c->temperature, 0, 100) && in((double)c->top_p, 1e-7, 1));
    ASSERT(in((double)c->min_p, 0, 1) && in((double)c->repetition, 1e-3, 100));
    ASSERT(c->top_k >= 0);
    const struct moe_config *m = &c->moe;
    ASSERT(in(m->layers, 0, c->layers) && in(m->experts, m->layers > 0, MOST_EXPERTS));
    if (m->layers > 0)
        ASSERT(in(m->chosen, 1, m->experts) && m->chosen <= MOST_CHOSEN &&
               in(m->expert_mlp, 1, 1 << 20) && in(m->shared_mlp, 0, 1 << 20) && m->scale > 0);
    ASSERT(weights_expected_elements(c) < UINT64_C(1) << 58);
}

/* ---- the same through files */

static char folder[40];

static void path_of(char path[100], const char *name)
{
    snprintf(path, 100, "%s/%s", folder, name);
}

static void remove_folder(void)
{
    char path[100];

    path_of(path, "config.json");
    remove(path);
    path_of(path, "generation_config.json");
    remove(path);
    rmdir(folder);
}

static void put(const char *name, const char *text, size_t n)
{
    char path[100];

    path_of(path, name);
    if (!text) {
        remove(path);
        return;
    }
    FILE *out = fopen(path, "wb");
    ASSERT(out && fwrite(text, 1, n, out) == n && fclose(out) == 0);
}

static void check_files(const struct model_config *want, enum status want_status,
                        const char *config, size_t n, const char *defaults, size_t n_defaults)
{
    struct model_config c;
    struct error err = { 0 };

    if (!*folder) {
        snprintf(folder, sizeof folder, "/tmp/asynctlsd-fuzz-XXXXXX");
        ASSERT(mkdtemp(folder));
        atexit(remove_folder);
    }
    put("config.json", config, n);
    put("generation_config.json", defaults, n_defaults);
    enum status st = model_config_read(&c, folder, &err);
    ASSERT(st == want_status);
    if (st != ST_OK) {
        ASSERT(strncmp(err.text, folder, strlen(folder)) == 0);
        return;
    }
    ASSERT(c.layers == want->layers && c.hidden == want->hidden && c.vocab == want->vocab);
    ASSERT(c.n_eos == want->n_eos && c.temperature == want->temperature);
    ASSERT(memcmp(c.inv_freq, want->inv_freq, sizeof c.inv_freq) == 0);
}

/* ---- configs made from keys and values, which random bytes seldom are */

struct field { const char *key, *value; };       /* value NULL: absent */

static const struct field config_fields[] = {
    { "model_type", "\"qwen2\"" }, { "hidden_size", "64" }, { "intermediate_size", "64" },
    { "num_hidden_layers", "2" }, { "vocab_size", "300" }, { "max_position_embeddings", "512" },
    { "num_attention_heads", "4" }, { "num_key_value_heads", NULL }, { "head_dim", NULL },
    { "architectures", NULL }, { "hidden_act", NULL }, { "attention_bias", NULL },
    { "rms_norm_eps", NULL }, { "tie_word_embeddings", NULL }, { "sliding_window", NULL },
    { "use_sliding_window", NULL }, { "max_window_layers", NULL }, { "layer_types", NULL },
    { "rope_theta", NULL }, { "partial_rotary_factor", NULL }, { "bos_token_id", NULL },
    { "original_max_position_embeddings", NULL }, { "pad_token_id", NULL },
    { "eos_token_id", NULL }, { "num_experts", NULL }, { "logit_scale", NULL },
    { "q_lora_rank", NULL }, { "kv_lora_rank", NULL }, { "qk_nope_head_dim", NULL },
    { "qk_rope_head_dim", NULL }, { "v_head_dim", NULL }, { "n_routed_experts", NULL },
    { "num_experts_per_tok", NULL }, { "moe_intermediate_size", NULL },
    { "n_shared_experts", NULL }, { "first_k_dense_replace", NULL }, { "n_group", NULL },
    { "mlp_layer_types", NULL }, { "topk_method", NULL }, { "routed_scaling_factor", NULL },
};
static const struct field rope_fields[] = {
    { "rope_type", NULL }, { "type", NULL }, { "rope_theta", NULL }, { "factor", NULL },
    { "original_max_position_embeddings", NULL }, { "beta_fast", NULL }, { "beta_slow", NULL },
    { "mscale", NULL }, { "mscale_all_dim", NULL }, { "attention_factor", NULL },
    { "truncate", NULL }, { "low_freq_factor", NULL }, { "high_freq_factor", NULL },
    { "partial_rotary_factor", NULL },
};
static const struct field default_fields[] = {
    { "eos_token_id", NULL }, { "temperature", NULL }, { "top_p", NULL }, { "top_k", NULL },
    { "min_p", NULL }, { "repetition_penalty", NULL },
};
static const char *const values[] = {
    NULL, "null", "true", "false", "0", "1", "2", "3", "4", "8", "28", "64", "256", "4096",
    "16777216", "1000000", "2147483647", "4294967296", "-1", "0.5", "1.5", "0.95", "1e-6", "1e12",
    "1e300", "1e-300", "\"\"", "\"qwen3\"", "\"llama\"", "\"mistral\"", "\"glm4_moe_lite\"",
    "\"silu\"", "\"gelu\"", "\"default\"", "\"linear\"", "\"llama3\"", "\"yarn\"", "[]",
    "[1,2,3]", "[299,300]", "{}", "[\"LlamaForCausalLM\"]",
    "[\"full_attention\",\"full_attention\"]", "[\"sliding_attention\",\"sliding_attention\"]",
    "[\"dense\",\"sparse\"]",
};
enum {
    N_CONFIG = sizeof config_fields / sizeof *config_fields,
    N_ROPE = sizeof rope_fields / sizeof *rope_fields,
    N_DEFAULTS = sizeof default_fields / sizeof *default_fields,
    N_VALUES = sizeof values / sizeof *values
};

static void write_fields(struct strbuf *out, const struct field *fields, int n)
{
    const char *separator = "";

    for (int i = 0; i < n; i++)
        if (fields[i].value) {
            strbuf_printf(out, "%s\"%s\":%s", separator, fields[i].key, fields[i].value);
            separator = ",";
        }
}

static void make_texts(struct strbuf *config, struct strbuf *defaults, const uint8_t *data,
                       size_t size)
{
    struct field top[N_CONFIG], rope[N_ROPE], generation[N_DEFAULTS];
    int parameters = 0;          /* whether the rope object is the one of layout 5 */

    memcpy(top, config_fields, sizeof top);
    memcpy(rope, rope_fields, sizeof rope);
    memcpy(generation, default_fields, sizeof generation);
    for (size_t i = 0; i + 3 <= size; i += 3) {
        const char *value = values[data[i + 2] % N_VALUES];
        switch (data[i] % 4) {
        case 0: top[data[i + 1] % N_CONFIG].value = value; break;
        case 1: rope[data[i + 1] % N_ROPE].value = value; break;
        case 2: generation[data[i + 1] % N_DEFAULTS].value = value; break;
        default: parameters = data[i + 1] % 2; break;
        }
    }
    strbuf_puts(config, "{");
    write_fields(config, top, N_CONFIG);
    strbuf_printf(config, "%s\"%s\":{", config->n > 1 ? "," : "",
                  parameters ? "rope_parameters" : "rope_scaling");
    write_fields(config, rope, N_ROPE);
    strbuf_puts(config, "}}");
    strbuf_puts(defaults, "{");
    write_fields(defaults, generation, N_DEFAULTS);
    strbuf_puts(defaults, "}");
}

static void check_texts(const char *text, size_t n, const char *defaults, size_t n_defaults,
                        bool through_files)
{
    struct model_config c;
    struct error err = { 0 };

    enum status st = model_config_parse(&c, text, n, defaults, n_defaults, &err);
    if (st == ST_OK)
        check(&c);
    else
        ASSERT(err.code == st && (strncmp(err.text, "config.json: ", 13) == 0
                                  || strncmp(err.text, "generation_config.json: ", 24) == 0));
    if (through_files)
        check_files(&c, st, text, n, defaults, n_defaults);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size > 0 && data[0] == 0xff) {
        struct strbuf config = { 0 }, defaults = { 0 };
        make_texts(&config, &defaults, data + 1, size - 1);
        check_texts(config.data, config.n, defaults.data, defaults.n, size % 8 == 0);
        strbuf_fini(&config);
        strbuf_fini(&defaults);
        return 0;
    }
    const char *text = (const char *)data, *end = size ? memchr(text, 0, size) : NULL;
    size_t n = end ? (size_t)(end - text) : size;
    check_texts(text, n, end ? end + 1 : NULL, end ? size - n - 1 : 0, size % 8 == 0);
    return 0;
}
