#include "engine/model/model_config.h"

#include <check.h>
#include <cjson/cJSON.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The configs of published models, with what matters for the forward pass. */
static const char qwen3_06b[] =
    "{\"architectures\":[\"Qwen3ForCausalLM\"],\"attention_bias\":false,\"attention_dropout\":0.0,"
    "\"bos_token_id\":151643,\"eos_token_id\":151645,\"head_dim\":128,\"hidden_act\":\"silu\","
    "\"hidden_size\":1024,\"initializer_range\":0.02,\"intermediate_size\":3072,"
    "\"max_position_embeddings\":40960,\"max_window_layers\":28,\"model_type\":\"qwen3\","
    "\"num_attention_heads\":16,\"num_hidden_layers\":28,\"num_key_value_heads\":8,"
    "\"rms_norm_eps\":1e-06,\"rope_scaling\":null,\"rope_theta\":1000000,\"sliding_window\":null,"
    "\"tie_word_embeddings\":true,\"torch_dtype\":\"bfloat16\",\"use_cache\":true,"
    "\"use_sliding_window\":false,\"vocab_size\":151936}";
static const char llama31_8b[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"attention_bias\":false,\"bos_token_id\":128000,"
    "\"eos_token_id\":[128001,128008,128009],\"hidden_act\":\"silu\",\"hidden_size\":4096,"
    "\"intermediate_size\":14336,\"max_position_embeddings\":131072,\"mlp_bias\":false,"
    "\"model_type\":\"llama\",\"num_attention_heads\":32,\"num_hidden_layers\":32,"
    "\"num_key_value_heads\":8,\"pretraining_tp\":1,\"rms_norm_eps\":1e-05,\"rope_scaling\":"
    "{\"factor\":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
    "\"original_max_position_embeddings\":8192,\"rope_type\":\"llama3\"},\"rope_theta\":500000.0,"
    "\"tie_word_embeddings\":false,\"vocab_size\":128256}";
static const char qwen25_7b[] =
    "{\"architectures\":[\"Qwen2ForCausalLM\"],\"bos_token_id\":151643,\"eos_token_id\":151645,"
    "\"hidden_act\":\"silu\",\"hidden_size\":3584,\"intermediate_size\":18944,"
    "\"max_position_embeddings\":32768,\"max_window_layers\":28,\"model_type\":\"qwen2\","
    "\"num_attention_heads\":28,\"num_hidden_layers\":28,\"num_key_value_heads\":4,"
    "\"rms_norm_eps\":1e-06,\"rope_theta\":1000000.0,\"sliding_window\":131072,"
    "\"tie_word_embeddings\":false,\"use_sliding_window\":false,\"vocab_size\":152064}";
static const char mistral_nemo[] =
    "{\"architectures\":[\"MistralForCausalLM\"],\"bos_token_id\":1,\"eos_token_id\":2,"
    "\"head_dim\":128,\"hidden_act\":\"silu\",\"hidden_size\":5120,\"intermediate_size\":14336,"
    "\"max_position_embeddings\":128000,\"model_type\":\"mistral\",\"num_attention_heads\":32,"
    "\"num_hidden_layers\":40,\"num_key_value_heads\":8,\"rms_norm_eps\":1e-05,"
    "\"rope_theta\":1000000.0,\"sliding_window\":null,\"tie_word_embeddings\":false,"
    "\"vocab_size\":131072}";
static const char smollm2_135m[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"bos_token_id\":0,\"eos_token_id\":0,"
    "\"hidden_act\":\"silu\",\"hidden_size\":576,\"intermediate_size\":1536,"
    "\"is_llama_config\":true,\"max_position_embeddings\":8192,\"model_type\":\"llama\","
    "\"num_attention_heads\":9,\"num_hidden_layers\":30,\"num_key_value_heads\":3,"
    "\"rms_norm_eps\":1e-05,\"rope_interleaved\":false,\"rope_scaling\":null,"
    "\"rope_theta\":100000,\"tie_word_embeddings\":true,\"vocab_size\":49152}";
static const char qwen3_30b_a3b[] =
    "{\"architectures\":[\"Qwen3MoeForCausalLM\"],\"attention_bias\":false,"
    "\"attention_dropout\":0.0,\"bos_token_id\":151643,\"decoder_sparse_step\":1,"
    "\"eos_token_id\":151645,\"head_dim\":128,\"hidden_act\":\"silu\",\"hidden_size\":2048,"
    "\"initializer_range\":0.02,\"intermediate_size\":6144,\"max_position_embeddings\":40960,"
    "\"max_window_layers\":48,\"mlp_only_layers\":[],\"model_type\":\"qwen3_moe\","
    "\"moe_intermediate_size\":768,\"norm_topk_prob\":true,\"num_attention_heads\":32,"
    "\"num_experts\":128,\"num_experts_per_tok\":8,\"num_hidden_layers\":48,"
    "\"num_key_value_heads\":4,\"output_router_logits\":false,\"rms_norm_eps\":1e-06,"
    "\"rope_scaling\":null,\"rope_theta\":1000000.0,\"router_aux_loss_coef\":0.001,"
    "\"sliding_window\":null,\"tie_word_embeddings\":false,\"torch_dtype\":\"bfloat16\","
    "\"use_sliding_window\":false,\"vocab_size\":151936}";
static const char glm47_flash[] =
    "{\"architectures\":[\"Glm4MoeLiteForCausalLM\"],\"attention_bias\":false,"
    "\"attention_dropout\":0.0,\"pad_token_id\":154820,\"eos_token_id\":[154820,154827,154829],"
    "\"hidden_act\":\"silu\",\"hidden_size\":2048,\"intermediate_size\":10240,"
    "\"max_position_embeddings\":202752,\"model_type\":\"glm4_moe_lite\","
    "\"moe_intermediate_size\":1536,\"topk_method\":\"noaux_tc\",\"norm_topk_prob\":true,"
    "\"num_attention_heads\":20,\"n_group\":1,\"topk_group\":1,\"n_routed_experts\":64,"
    "\"n_shared_experts\":1,\"routed_scaling_factor\":1.8,\"num_experts_per_tok\":4,"
    "\"first_k_dense_replace\":1,\"num_hidden_layers\":47,\"num_key_value_heads\":20,"
    "\"num_nextn_predict_layers\":1,\"partial_rotary_factor\":1.0,\"rms_norm_eps\":1e-05,"
    "\"rope_scaling\":null,\"rope_theta\":1000000,\"tie_word_embeddings\":false,"
    "\"dtype\":\"bfloat16\",\"q_lora_rank\":768,\"kv_lora_rank\":512,"
    "\"qk_nope_head_dim\":192,\"qk_rope_head_dim\":64,\"v_head_dim\":256,"
    "\"vocab_size\":154880}";

static enum status parse(struct model_config *c, const char *json, const char *generation,
                         struct error *err)
{
    return model_config_parse(c, json, strlen(json), generation,
                              generation ? strlen(generation) : 0, err);
}

/* base with the keys of patch put in their place; a patch value of "-" takes
 * the key out.  *c is what comes of it. */
static enum status parse_patched(struct model_config *c, const char *base, const char *patch,
                                 struct error *err)
{
    cJSON *json = cJSON_Parse(base), *changes = cJSON_Parse(patch), *k;

    ck_assert(json && changes);
    cJSON_ArrayForEach(k, changes) {
        cJSON_DeleteItemFromObjectCaseSensitive(json, k->string);
        if (!cJSON_IsString(k) || strcmp(k->valuestring, "-") != 0)
            cJSON_AddItemToObject(json, k->string, cJSON_Duplicate(k, 1));
    }
    char *text = cJSON_PrintUnformatted(json);
    enum status st = parse(c, text, NULL, err);
    free(text);
    cJSON_Delete(json);
    cJSON_Delete(changes);
    return st;
}

static void accept(struct model_config *c, const char *base, const char *patch)
{
    struct error err = { 0 };

    ck_assert_msg(parse_patched(c, base, patch, &err) == ST_OK, "%s", err.text);
}

START_TEST(published_configs)
{
    struct model_config c;

    accept(&c, qwen3_06b, "{}");
    ck_assert(c.family == FAMILY_QWEN3 && c.tied && c.qk_norm && !c.qkv_bias);
    ck_assert(c.layers == 28 && c.hidden == 1024 && c.mlp == 3072 && c.vocab == 151936);
    ck_assert(c.heads == 16 && c.kv_heads == 8 && c.head_dim == 128);
    ck_assert(c.max_position == 40960 && c.sliding_window == 0 && c.norm_eps == 1e-6f);
    ck_assert(c.bos == 151643 && c.pad == -1 && c.n_eos == 1 && c.eos[0] == 151645);
    ck_assert_str_eq(c.family_name, "qwen3");
    accept(&c, llama31_8b, "{}");
    ck_assert(c.family == FAMILY_LLAMA && !c.tied && !c.qk_norm && !c.qkv_bias);
    ck_assert(c.head_dim == 128 && c.n_eos == 3 && c.eos[2] == 128009 && c.rope_factor == 1);
    accept(&c, qwen25_7b, "{}");
    ck_assert(c.family == FAMILY_QWEN2 && c.qkv_bias && c.head_dim == 128);
    ck_assert(c.sliding_window == 0);
    accept(&c, mistral_nemo, "{}");
    ck_assert(c.family == FAMILY_MISTRAL && c.head_dim == 128 && c.heads * c.head_dim == 4096);
    accept(&c, smollm2_135m, "{}");
    ck_assert(c.head_dim == 64 && c.kv_heads == 3 && c.tied && c.norm_eps == 1e-5f);
}
END_TEST

START_TEST(experts)
{
    struct model_config c;

    accept(&c, qwen3_06b, "{}");
    ck_assert(c.moe.layers == 0 && c.moe.experts == 0 && !c.moe.in_layer[0]);
    accept(&c, qwen3_30b_a3b, "{}");
    ck_assert(c.family == FAMILY_QWEN3_MOE && c.qk_norm && !c.qkv_bias && !c.tied);
    ck_assert(c.hidden == 2048 && c.head_dim == 128 && c.kv_heads == 4 && c.mlp == 6144);
    ck_assert(c.moe.layers == 48 && c.moe.experts == 128 && c.moe.chosen == 8);
    ck_assert(c.moe.expert_mlp == 768 && c.moe.renormalise);
    ck_assert(c.moe.in_layer[0] && c.moe.in_layer[47]);
    /* As transformers 5 saves it. */
    accept(&c, qwen3_30b_a3b, "{\"num_experts\":\"-\",\"num_local_experts\":64}");
    ck_assert(c.moe.experts == 64);
    accept(&c, qwen3_30b_a3b, "{\"num_local_experts\":128}");
    accept(&c, qwen3_30b_a3b, "{\"num_experts\":\"-\",\"num_experts_per_tok\":\"-\","
           "\"moe_intermediate_size\":\"-\",\"norm_topk_prob\":\"-\",\"head_dim\":\"-\","
           "\"decoder_sparse_step\":\"-\",\"mlp_only_layers\":null}");
    ck_assert(c.moe.experts == 128 && c.moe.chosen == 8 && c.moe.expert_mlp == 768);
    ck_assert(!c.moe.renormalise && c.moe.layers == 48 && c.head_dim == 64);
    /* All layers slide, or none. */
    accept(&c, qwen3_30b_a3b, "{\"use_sliding_window\":true,\"sliding_window\":4096}");
    ck_assert_int_eq(c.sliding_window, 4096);
}
END_TEST

START_TEST(layers_without_experts)
{
    struct model_config c;

    accept(&c, qwen3_30b_a3b, "{\"mlp_only_layers\":[0,5,5]}");
    ck_assert(c.moe.layers == 46 && !c.moe.in_layer[0] && !c.moe.in_layer[5]);
    ck_assert(c.moe.in_layer[1]);
    accept(&c, qwen3_30b_a3b, "{\"decoder_sparse_step\":3,\"mlp_only_layers\":[2]}");
    ck_assert(c.moe.layers == 15 && !c.moe.in_layer[0] && !c.moe.in_layer[2]);
    ck_assert(c.moe.in_layer[5] && c.moe.in_layer[47]);
    accept(&c, qwen3_30b_a3b, "{\"num_experts\":0}");
    ck_assert(c.moe.layers == 0 && c.moe.experts == 0);
    accept(&c, qwen3_30b_a3b, "{\"decoder_sparse_step\":49}");
    ck_assert(c.moe.layers == 0 && c.moe.experts == 0);
}
END_TEST

START_TEST(absent_keys_have_the_class_defaults)
{
    struct model_config c;

    accept(&c, qwen3_06b, "{\"head_dim\":\"-\",\"num_key_value_heads\":\"-\",\"hidden_act\":\"-\","
           "\"rms_norm_eps\":\"-\",\"tie_word_embeddings\":\"-\",\"rope_theta\":\"-\","
           "\"bos_token_id\":\"-\",\"eos_token_id\":\"-\",\"architectures\":\"-\"}");
    ck_assert(c.head_dim == 128 && c.kv_heads == 16 && !c.tied && c.norm_eps == 1e-6f);
    ck_assert(c.bos == -1 && c.n_eos == 0);
    ck_assert_float_eq_tol(c.inv_freq[32], 0.01f, 1e-8f);      /* 10000^(-64/128) */
}
END_TEST

/* ---- rotary frequencies, golden values computed from the definitions */

static void close_to(float got, double want)
{
    ck_assert_msg(fabs((double)got - want) <= 5e-7 * want, "%.10g, not %.10g", (double)got, want);
}

static void bits_are(float got, uint32_t want)
{
    uint32_t bits;

    memcpy(&bits, &got, 4);
    ck_assert_msg(bits - want + 1 <= 2, "%08x, not %08x", bits, want);  /* one ulp of powf */
}

START_TEST(rope_default)
{
    struct model_config c;

    accept(&c, qwen3_06b, "{}");
    bits_are(c.inv_freq[0], 0x3f800000);
    bits_are(c.inv_freq[1], 0x3f4e4bad);
    bits_are(c.inv_freq[2], 0x3f263de0);
    bits_are(c.inv_freq[16], 0x3d0186e3);
    bits_are(c.inv_freq[32], 0x3a83126f);
    bits_are(c.inv_freq[63], 0x35a68e4c);
    ck_assert(c.rope_factor == 1);
    accept(&c, qwen3_06b, "{\"rope_theta\":10000000}");
    bits_are(c.inv_freq[1], 0x3f470165);
    bits_are(c.inv_freq[63], 0x340a2036);
    accept(&c, qwen3_06b, "{\"rope_theta\":5000000}");
    bits_are(c.inv_freq[1], 0x3f492c28);
    accept(&c, qwen3_06b, "{\"head_dim\":64}");
    bits_are(c.inv_freq[2], 0x3ed7e89b);
    bits_are(c.inv_freq[31], 0x35ceaf79);
    accept(&c, smollm2_135m, "{}");
    bits_are(c.inv_freq[1], 0x3f32a506);
}
END_TEST

START_TEST(rope_linear)
{
    struct model_config plain, c;

    accept(&plain, smollm2_135m, "{}");
    accept(&c, smollm2_135m, "{\"rope_scaling\":{\"type\":\"linear\",\"factor\":4}}");
    for (int i = 0; i < 32; i++)
        ck_assert(c.inv_freq[i] == plain.inv_freq[i] / 4);
}
END_TEST

START_TEST(rope_llama3)
{
    struct model_config plain, c;

    accept(&plain, llama31_8b, "{\"rope_scaling\":null}");
    accept(&c, llama31_8b, "{}");
    for (int i = 0; i <= 28; i++)
        ck_assert(c.inv_freq[i] == plain.inv_freq[i]);
    close_to(c.inv_freq[28], 0.003211445994752591);
    close_to(c.inv_freq[29], 0.002166570763503359);
    close_to(c.inv_freq[30], 0.0013718935677611381);
    close_to(c.inv_freq[33], 0.00031269375038406517);
    close_to(c.inv_freq[34], 0.0001785078127679964);
    close_to(c.inv_freq[35], 9.556212353964683e-05);
    close_to(c.inv_freq[63], 3.068925988914511e-07);
    for (int i = 35; i < 64; i++)
        ck_assert(c.inv_freq[i] == plain.inv_freq[i] / 8);
}
END_TEST

static void check_yarn(const struct model_config *c)
{
    struct model_config plain;

    accept(&plain, qwen3_06b, "{}");
    for (int i = 0; i <= 23; i++)
        ck_assert(c->inv_freq[i] == plain.inv_freq[i]);
    close_to(c->inv_freq[23], 6.978305848598663e-03);
    close_to(c->inv_freq[24], 5.375321490790102e-03);
    close_to(c->inv_freq[30], 1.0643609812470017e-03);
    close_to(c->inv_freq[31], 8.029597275452302e-04);
    close_to(c->inv_freq[35], 2.462584069089387e-04);
    close_to(c->inv_freq[39], 6.490394320837028e-05);
    close_to(c->inv_freq[40], 4.445698525097307e-05);
    close_to(c->inv_freq[63], 3.102344401879299e-07);
}

#define YARN "\"rope_type\":\"yarn\",\"original_max_position_embeddings\":32768"

START_TEST(rope_yarn)
{
    struct model_config c;

    accept(&c, qwen3_06b, "{\"rope_scaling\":{" YARN ",\"factor\":4.0}}");
    check_yarn(&c);
    close_to(c.rope_factor, 1.138629436111989);
    /* The explicit factor counts, whatever max_position_embeddings says; without
     * it their quotient does. */
    accept(&c, qwen3_06b, "{\"max_position_embeddings\":131072,\"rope_scaling\":{" YARN
           ",\"factor\":null}}");
    check_yarn(&c);
    accept(&c, qwen3_06b, "{\"rope_scaling\":{" YARN ",\"factor\":4,\"attention_factor\":1.5}}");
    close_to(c.rope_factor, 1.5);
    accept(&c, qwen3_06b, "{\"rope_scaling\":{" YARN ",\"factor\":40,\"mscale\":1.0,"
           "\"mscale_all_dim\":1.0}}");
    close_to(c.rope_factor, 1.0);
    accept(&c, qwen3_06b, "{\"rope_scaling\":{" YARN ",\"factor\":40,\"mscale\":0.7,"
           "\"mscale_all_dim\":1.0}}");
    close_to(c.rope_factor, (0.07 * log(40) + 1) / (0.1 * log(40) + 1));
    /* Ends of the ramp that are not rounded move it. */
    accept(&c, qwen3_06b, "{\"rope_scaling\":{" YARN ",\"factor\":4.0,\"truncate\":false}}");
    double ramp = (24 - 23.5959) / (39.6509 - 23.5959), f = pow(1e6, -48.0 / 128);
    ck_assert_double_eq_tol(c.inv_freq[24], f * (1 - ramp) + f / 4 * ramp, 1e-7);
}
END_TEST

START_TEST(latent_attention)
{
    struct model_config c, b;

    accept(&c, glm47_flash, "{}");
    ck_assert(c.family == FAMILY_GLM4_MOE_LITE && !c.qkv_bias && !c.qk_norm && !c.tied);
    ck_assert(c.layers == 47 && c.heads == 20 && c.mlp == 10240 && c.norm_eps == 1e-5f);
    ck_assert(c.latent.dim == 512 && c.latent.q_rank == 768 && c.latent.nope == 192);
    ck_assert(c.latent.rope == 64 && c.latent.value == 256 && c.latent.interleaved);
    ck_assert(c.kv_heads == 1 && c.head_dim == 576 && c.score_scale == 0.0625f);
    ck_assert(model_rope_dim(&c) == 64 && model_attention_dim(&c) == 5120);
    ck_assert(c.n_eos == 3 && c.eos[0] == 154820 && c.eos[2] == 154829 && c.pad == 154820);
    ck_assert(c.bos == -1 && c.sliding_window == 0 && c.max_position == 202752);
    bits_are(c.inv_freq[1], 0x3f263de0);
    bits_are(c.inv_freq[31], 0x35ceaf79);
    /* As transformers 5 saves it. */
    accept(&b, glm47_flash, "{\"rope_scaling\":\"-\",\"rope_theta\":\"-\",\"rope_interleave\":true,"
           "\"partial_rotary_factor\":\"-\",\"topk_method\":\"-\",\"rope_parameters\":{"
           "\"partial_rotary_factor\":1.0,\"rope_theta\":1000000,\"rope_type\":\"default\"}}");
    ck_assert_int_eq(memcmp(&b, &c, sizeof c), 0);
    accept(&c, glm47_flash, "{\"rope_interleave\":false,\"num_key_value_heads\":\"-\"}");
    ck_assert(!c.latent.interleaved && c.kv_heads == 1);
    accept(&c, qwen3_06b, "{}");
    ck_assert(c.latent.dim == 0 && model_rope_dim(&c) == 128 && model_attention_dim(&c) == 2048);
    close_to(c.score_scale, pow(128, -0.5));
}
END_TEST

/* Of a longer context YaRN makes cos and sin larger in other families; in this one what
 * mscale_all_dim says of it goes into the scores as a whole. */
START_TEST(latent_scores_with_yarn)
{
    struct model_config c;
    double m = 0.1 * log(4) + 1;

    accept(&c, glm47_flash, "{\"rope_scaling\":{" YARN ",\"factor\":4.0}}");
    close_to(c.score_scale, 0.0625);
    close_to(c.rope_factor, m);
    accept(&c, glm47_flash, "{\"rope_scaling\":{" YARN ",\"factor\":4.0,\"mscale\":1.0,"
           "\"mscale_all_dim\":1.0}}");
    close_to(c.score_scale, 0.0625 * m * m);
    close_to(c.rope_factor, 1);
    accept(&c, qwen3_06b, "{\"rope_scaling\":{" YARN ",\"factor\":4.0,\"mscale\":1.0,"
           "\"mscale_all_dim\":1.0}}");
    close_to(c.score_scale, pow(128, -0.5));
}
END_TEST

START_TEST(experts_beside_a_shared_one)
{
    struct model_config c;
    char types[2000] = "{\"mlp_layer_types\":[\"dense\",\"sparse\",\"dense\"";

    accept(&c, glm47_flash, "{}");
    ck_assert(c.moe.layers == 46 && !c.moe.in_layer[0] && c.moe.in_layer[1] && c.moe.in_layer[46]);
    ck_assert(c.moe.experts == 64 && c.moe.chosen == 4 && c.moe.expert_mlp == 1536);
    ck_assert(c.moe.score == ROUTER_SIGMOID && c.moe.renormalise && c.moe.scale == 1.8f);
    ck_assert(c.moe.shared_mlp == 1536);
    accept(&c, glm47_flash, "{\"n_shared_experts\":2,\"norm_topk_prob\":false,"
           "\"routed_scaling_factor\":2.5,\"first_k_dense_replace\":3,\"n_routed_experts\":\"-\","
           "\"num_local_experts\":32}");
    ck_assert(c.moe.layers == 44 && c.moe.shared_mlp == 3072 && !c.moe.renormalise);
    ck_assert(c.moe.scale == 2.5f && c.moe.experts == 32);
    accept(&c, glm47_flash, "{\"n_shared_experts\":\"-\",\"norm_topk_prob\":\"-\","
           "\"routed_scaling_factor\":\"-\",\"first_k_dense_replace\":\"-\",\"n_group\":\"-\","
           "\"topk_group\":\"-\",\"rms_norm_eps\":\"-\"}");
    ck_assert(c.moe.layers == 46 && c.moe.shared_mlp == 1536 && c.moe.renormalise);
    ck_assert(c.moe.scale == 1.8f && c.norm_eps == 1e-5f);
    accept(&c, glm47_flash, "{\"n_shared_experts\":0}");
    ck_assert(c.moe.shared_mlp == 0 && c.moe.layers == 46);
    accept(&c, glm47_flash, "{\"first_k_dense_replace\":47}");
    ck_assert(c.moe.layers == 0 && c.moe.shared_mlp == 0 && c.moe.experts == 0);
    for (int l = 3; l < 47; l++)
        strcat(types, ",\"sparse\"");
    strcat(types, "]}");
    accept(&c, glm47_flash, types);
    ck_assert(c.moe.layers == 45 && c.moe.in_layer[1] && !c.moe.in_layer[2]);
    accept(&c, qwen3_30b_a3b, "{}");
    ck_assert(c.moe.score == ROUTER_SOFTMAX && c.moe.scale == 1 && c.moe.shared_mlp == 0);
}
END_TEST

START_TEST(both_layouts_are_the_same)
{
    struct model_config a, b;

    accept(&a, qwen3_06b, "{\"rope_scaling\":{" YARN ",\"factor\":4.0},\"rope_theta\":500000}");
    accept(&b, qwen3_06b, "{\"rope_scaling\":\"-\",\"rope_theta\":\"-\",\"torch_dtype\":\"-\","
           "\"dtype\":\"bfloat16\",\"pad_token_id\":null,"
           "\"rope_parameters\":{" YARN ",\"factor\":4.0,\"rope_theta\":500000}}");
    ck_assert_int_eq(memcmp(a.inv_freq, b.inv_freq, sizeof a.inv_freq), 0);
    ck_assert(a.rope_factor == b.rope_factor && a.head_dim == b.head_dim);
    /* The theta in rope_parameters wins over one left at the top. */
    accept(&b, qwen3_06b, "{\"rope_scaling\":null,\"rope_theta\":12345,"
           "\"rope_parameters\":{" YARN ",\"factor\":4.0,\"rope_theta\":500000}}");
    ck_assert_int_eq(memcmp(a.inv_freq, b.inv_freq, sizeof a.inv_freq), 0);
    accept(&a, llama31_8b, "{}");
    accept(&b, llama31_8b, "{\"rope_scaling\":\"-\",\"rope_theta\":\"-\",\"rope_parameters\":"
           "{\"factor\":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,\"rope_theta\":5e5,"
           "\"original_max_position_embeddings\":8192,\"rope_type\":\"llama3\"}}");
    ck_assert_int_eq(memcmp(a.inv_freq, b.inv_freq, sizeof a.inv_freq), 0);
}
END_TEST

START_TEST(sliding_windows)
{
    struct model_config c;

    accept(&c, mistral_nemo, "{\"sliding_window\":4096}");
    ck_assert_int_eq(c.sliding_window, 4096);
    accept(&c, mistral_nemo, "{\"sliding_window\":\"-\"}");    /* the class default */
    ck_assert_int_eq(c.sliding_window, 4096);
    accept(&c, qwen25_7b, "{\"use_sliding_window\":true,\"sliding_window\":512,"
           "\"max_window_layers\":0}");
    ck_assert_int_eq(c.sliding_window, 512);
    accept(&c, qwen25_7b, "{\"use_sliding_window\":true,\"sliding_window\":512}");
    ck_assert_int_eq(c.sliding_window, 0);                      /* layers from 28 on: none */
}
END_TEST

/* ---- refusals: every sentence names the file and the key */

static const struct refusal {
    const char *base, *patch, *key;
    enum status status;
} refusals[] = {
    { qwen3_06b, "{\"model_type\":\"qwen3_moe\"}", "architectures", ST_UNSUPPORTED },
    { qwen3_30b_a3b, "{\"num_experts_per_tok\":17}", "num_experts_per_tok", ST_INVALID },
    { qwen3_30b_a3b, "{\"num_experts\":4}", "num_experts_per_tok", ST_INVALID },
    { qwen3_30b_a3b, "{\"num_experts\":513}", "num_experts", ST_INVALID },
    { qwen3_30b_a3b, "{\"num_experts\":-1}", "num_experts", ST_INVALID },
    { qwen3_30b_a3b, "{\"num_local_experts\":64}", "num_local_experts", ST_INVALID },
    { qwen3_30b_a3b, "{\"moe_intermediate_size\":0}", "moe_intermediate_size", ST_INVALID },
    { qwen3_30b_a3b, "{\"norm_topk_prob\":1}", "norm_topk_prob", ST_INVALID },
    { qwen3_30b_a3b, "{\"decoder_sparse_step\":0}", "decoder_sparse_step", ST_INVALID },
    { qwen3_30b_a3b, "{\"mlp_only_layers\":[48]}", "mlp_only_layers", ST_INVALID },
    { qwen3_30b_a3b, "{\"mlp_only_layers\":[0.5]}", "mlp_only_layers", ST_INVALID },
    { qwen3_30b_a3b, "{\"mlp_only_layers\":3}", "mlp_only_layers", ST_INVALID },
    { qwen3_30b_a3b, "{\"n_shared_experts\":1}", "n_shared_experts", ST_UNSUPPORTED },
    { qwen3_30b_a3b, "{\"shared_expert_intermediate_size\":512}",
      "shared_expert_intermediate_size", ST_UNSUPPORTED },
    { qwen3_30b_a3b, "{\"attention_bias\":true}", "attention_bias", ST_UNSUPPORTED },
    { qwen3_06b, "{\"moe_intermediate_size\":768}", "moe_intermediate_size", ST_UNSUPPORTED },
    { qwen3_06b, "{\"model_type\":\"glm4_moe\"}", "model_type", ST_UNSUPPORTED },
    { qwen3_06b, "{\"model_type\":\"glm4_moe_lite\"}", "architectures", ST_UNSUPPORTED },
    { glm47_flash, "{\"q_lora_rank\":null}", "q_lora_rank", ST_UNSUPPORTED },
    { glm47_flash, "{\"q_lora_rank\":\"-\"}", "q_lora_rank", ST_INVALID },
    { glm47_flash, "{\"q_lora_rank\":0}", "q_lora_rank", ST_INVALID },
    { glm47_flash, "{\"kv_lora_rank\":\"-\"}", "kv_lora_rank", ST_INVALID },
    { glm47_flash, "{\"kv_lora_rank\":4096}", "kv_lora_rank", ST_INVALID },
    { glm47_flash, "{\"qk_nope_head_dim\":0}", "qk_nope_head_dim", ST_INVALID },
    { glm47_flash, "{\"qk_rope_head_dim\":63}", "qk_rope_head_dim", ST_INVALID },
    { glm47_flash, "{\"qk_rope_head_dim\":512}", "qk_rope_head_dim", ST_INVALID },
    { glm47_flash, "{\"v_head_dim\":\"256\"}", "v_head_dim", ST_INVALID },
    { glm47_flash, "{\"num_attention_heads\":512}", "num_attention_heads", ST_UNSUPPORTED },
    { glm47_flash, "{\"rope_interleave\":1}", "rope_interleave", ST_INVALID },
    { glm47_flash, "{\"partial_rotary_factor\":0.5}", "partial_rotary_factor", ST_UNSUPPORTED },
    { glm47_flash, "{\"attention_bias\":true}", "attention_bias", ST_UNSUPPORTED },
    { glm47_flash, "{\"sliding_window\":4096}", "sliding_window", ST_UNSUPPORTED },
    { glm47_flash, "{\"n_group\":8}", "n_group", ST_UNSUPPORTED },
    { glm47_flash, "{\"topk_group\":4}", "topk_group", ST_UNSUPPORTED },
    { glm47_flash, "{\"moe_layer_freq\":2}", "moe_layer_freq", ST_UNSUPPORTED },
    { glm47_flash, "{\"topk_method\":\"greedy\"}", "topk_method", ST_UNSUPPORTED },
    { glm47_flash, "{\"scoring_func\":\"softmax\"}", "scoring_func", ST_UNSUPPORTED },
    { glm47_flash, "{\"n_routed_experts\":\"-\"}", "n_routed_experts", ST_INVALID },
    { glm47_flash, "{\"n_routed_experts\":3}", "num_experts_per_tok", ST_INVALID },
    { glm47_flash, "{\"num_local_experts\":32}", "num_local_experts", ST_INVALID },
    { glm47_flash, "{\"num_experts_per_tok\":\"-\"}", "num_experts_per_tok", ST_INVALID },
    { glm47_flash, "{\"moe_intermediate_size\":\"-\"}", "moe_intermediate_size", ST_INVALID },
    { glm47_flash, "{\"n_shared_experts\":1000}", "n_shared_experts", ST_INVALID },
    { glm47_flash, "{\"routed_scaling_factor\":0}", "routed_scaling_factor", ST_INVALID },
    { glm47_flash, "{\"first_k_dense_replace\":-1}", "first_k_dense_replace", ST_INVALID },
    { glm47_flash, "{\"mlp_layer_types\":[\"dense\"]}", "mlp_layer_types", ST_INVALID },
    { glm47_flash, "{\"mlp_layer_types\":\"sparse\"}", "mlp_layer_types", ST_INVALID },
    { glm47_flash, "{\"num_hidden_layers\":1,\"mlp_layer_types\":[\"mixed\"]}",
      "mlp_layer_types", ST_INVALID },
    { glm47_flash, "{\"num_experts\":64}", "num_experts", ST_UNSUPPORTED },
    { qwen3_06b, "{\"model_type\":\"-\"}", "model_type", ST_INVALID },
    { qwen3_06b, "{\"model_type\":7}", "model_type", ST_INVALID },
    { qwen3_06b, "{\"architectures\":[\"Qwen3ForSequenceClassification\"]}", "architectures",
      ST_UNSUPPORTED },
    { qwen3_06b, "{\"architectures\":[3]}", "architectures", ST_UNSUPPORTED },
    { qwen3_06b, "{\"hidden_act\":\"gelu\"}", "hidden_act", ST_UNSUPPORTED },
    { qwen3_06b, "{\"attention_bias\":true}", "attention_bias", ST_UNSUPPORTED },
    { llama31_8b, "{\"attention_bias\":true}", "attention_bias", ST_UNSUPPORTED },
    { llama31_8b, "{\"mlp_bias\":true}", "mlp_bias", ST_UNSUPPORTED },
    { llama31_8b, "{\"rope_interleaved\":true}", "rope_interleaved", ST_UNSUPPORTED },
    { llama31_8b, "{\"sliding_window\":4096}", "sliding_window", ST_UNSUPPORTED },
    { llama31_8b, "{\"no_rope_layers\":[1,0]}", "no_rope_layers", ST_UNSUPPORTED },
    { qwen3_06b, "{\"quantization_config\":{\"quant_method\":\"fp8\"}}", "quantization_config",
      ST_UNSUPPORTED },
    { qwen3_06b, "{\"num_experts\":128}", "num_experts", ST_UNSUPPORTED },
    { qwen3_06b, "{\"num_local_experts\":8}", "num_local_experts", ST_UNSUPPORTED },
    { qwen3_06b, "{\"kv_lora_rank\":512}", "kv_lora_rank", ST_UNSUPPORTED },
    { qwen3_06b, "{\"partial_rotary_factor\":0.5}", "partial_rotary_factor", ST_UNSUPPORTED },
    { qwen3_06b, "{\"rope_scaling\":{\"rope_type\":\"default\",\"partial_rotary_factor\":0.5}}",
      "partial_rotary_factor", ST_UNSUPPORTED },
    { qwen3_06b, "{\"rope_scaling\":{\"rope_type\":\"dynamic\",\"factor\":2}}", "rope_type",
      ST_UNSUPPORTED },
    { qwen3_06b, "{\"rope_scaling\":{\"rope_type\":\"longrope\",\"factor\":2}}", "rope_type",
      ST_UNSUPPORTED },
    { qwen3_06b, "{\"rope_scaling\":{\"type\":\"linear\"}}", "factor", ST_INVALID },
    { qwen3_06b, "{\"rope_scaling\":{\"type\":\"linear\",\"factor\":-4}}", "factor", ST_INVALID },
    { qwen3_06b, "{\"rope_scaling\":{\"type\":\"linear\",\"factor\":\"4\"}}", "factor",
      ST_INVALID },
    { qwen3_06b, "{\"rope_scaling\":{\"type\":\"default\",\"mrope_section\":[16,24,24]}}",
      "mrope_section", ST_UNSUPPORTED },
    { qwen3_06b, "{\"rope_scaling\":[4]}", "rope_scaling", ST_INVALID },
    { qwen3_06b, "{\"rope_scaling\":{\"type\":\"linear\",\"factor\":4},"
      "\"rope_parameters\":{\"rope_type\":\"default\"}}", "rope_parameters", ST_INVALID },
    { qwen3_06b, "{\"rope_parameters\":{\"full_attention\":{\"rope_type\":\"default\"}}}",
      "full_attention", ST_UNSUPPORTED },
    { llama31_8b, "{\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8}}",
      "low_freq_factor", ST_INVALID },
    { llama31_8b, "{\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,"
      "\"low_freq_factor\":4,\"high_freq_factor\":4}}", "high_freq_factor", ST_INVALID },
    { qwen3_06b, "{\"rope_scaling\":{" YARN ",\"factor\":4,\"beta_fast\":1}}", "beta_fast",
      ST_INVALID },
    { qwen25_7b, "{\"use_sliding_window\":true,\"sliding_window\":512,\"max_window_layers\":14}",
      "max_window_layers", ST_UNSUPPORTED },
    { qwen25_7b, "{\"num_hidden_layers\":2,\"use_sliding_window\":true,\"sliding_window\":512,"
      "\"layer_types\":[\"full_attention\",\"sliding_attention\"]}", "layer_types",
      ST_UNSUPPORTED },
    { qwen25_7b, "{\"num_hidden_layers\":2,\"layer_types\":[\"full_attention\","
      "\"linear_attention\"]}", "layer_types", ST_UNSUPPORTED },
    { qwen25_7b, "{\"layer_types\":[\"full_attention\"]}", "layer_types", ST_INVALID },
    { qwen25_7b, "{\"dual_chunk_attention_config\":{\"chunk_size\":262144}}",
      "dual_chunk_attention_config", ST_UNSUPPORTED },
    { qwen3_06b, "{\"auto_map\":{\"AutoModel\":\"x.Y\"}}", "auto_map", ST_UNSUPPORTED },
    { qwen3_06b, "{\"final_logit_softcapping\":30.0}", "final_logit_softcapping",
      ST_UNSUPPORTED },
    { qwen3_06b, "{\"hidden_size\":\"-\"}", "hidden_size", ST_INVALID },
    { qwen3_06b, "{\"hidden_size\":0}", "hidden_size", ST_INVALID },
    { qwen3_06b, "{\"hidden_size\":-1024}", "hidden_size", ST_INVALID },
    { qwen3_06b, "{\"hidden_size\":1024.5}", "hidden_size", ST_INVALID },
    { qwen3_06b, "{\"hidden_size\":\"1024\"}", "hidden_size", ST_INVALID },
    { qwen3_06b, "{\"hidden_size\":1e300}", "hidden_size", ST_INVALID },
    { qwen3_06b, "{\"intermediate_size\":4294967296}", "intermediate_size", ST_INVALID },
    { qwen3_06b, "{\"num_hidden_layers\":100000}", "num_hidden_layers", ST_INVALID },
    { qwen3_06b, "{\"vocab_size\":true}", "vocab_size", ST_INVALID },
    { qwen3_06b, "{\"max_position_embeddings\":\"-\"}", "max_position_embeddings", ST_INVALID },
    { qwen3_06b, "{\"max_position_embeddings\":1000000000}", "max_position_embeddings",
      ST_INVALID },
    { qwen3_06b, "{\"num_key_value_heads\":3}", "num_key_value_heads", ST_INVALID },
    { qwen3_06b, "{\"num_key_value_heads\":32}", "num_key_value_heads", ST_INVALID },
    { qwen3_06b, "{\"head_dim\":127}", "head_dim", ST_UNSUPPORTED },
    { qwen3_06b, "{\"head_dim\":512}", "head_dim", ST_INVALID },
    { llama31_8b, "{\"num_attention_heads\":24,\"num_key_value_heads\":24}",
      "num_attention_heads", ST_INVALID },
    { llama31_8b, "{\"num_attention_heads\":2,\"num_key_value_heads\":2}", "head_dim",
      ST_UNSUPPORTED },
    { qwen3_06b, "{\"rms_norm_eps\":0}", "rms_norm_eps", ST_INVALID },
    { qwen3_06b, "{\"rms_norm_eps\":-1e-6}", "rms_norm_eps", ST_INVALID },
    { qwen3_06b, "{\"rope_theta\":1}", "rope_theta", ST_INVALID },
    { qwen3_06b, "{\"tie_word_embeddings\":1}", "tie_word_embeddings", ST_INVALID },
    { qwen3_06b, "{\"bos_token_id\":151936}", "bos_token_id", ST_INVALID },
    { qwen3_06b, "{\"eos_token_id\":-2}", "eos_token_id", ST_INVALID },
    { qwen3_06b, "{\"eos_token_id\":[1,151936]}", "eos_token_id", ST_INVALID },
    { qwen3_06b, "{\"eos_token_id\":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}",
      "eos_token_id", ST_UNSUPPORTED },
};
enum { N_REFUSALS = sizeof refusals / sizeof *refusals };

START_TEST(refused_with_a_sentence)
{
    const struct refusal *r = &refusals[_i];
    struct error err = { 0 };
    struct model_config c;

    enum status st = parse_patched(&c, r->base, r->patch, &err);
    ck_assert_msg(st == r->status && err.code == st, "%s: %s: %s", r->patch, status_name(st),
                  err.text);
    ck_assert_msg(strstr(err.text, r->key) && strncmp(err.text, "config.json: ", 13) == 0,
                  "%s: %s", r->patch, err.text);
    ck_assert_ptr_null(strchr(err.text, '\n'));
}
END_TEST

START_TEST(not_json)
{
    static const char *const texts[] = {
        "", " ", "[]", "7", "null", "{", "{}{}", "{\"a\":1,\"a\":2}", "{\"a\":1}x", "\xff",
    };
    struct model_config c;
    struct error err;

    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        err.text[0] = '\0';
        ck_assert_int_eq(parse(&c, texts[i], NULL, &err), ST_INVALID);
        ck_assert_msg(strncmp(err.text, "config.json: ", 13) == 0, "%s", err.text);
    }
    ck_assert_int_eq(parse(&c, qwen3_06b, "[]", &err), ST_INVALID);
    ck_assert_msg(strncmp(err.text, "generation_config.json: ", 24) == 0, "%s", err.text);
    ck_assert_int_eq(parse(&c, qwen3_06b, "{\"temperature\":-1}", NULL), ST_INVALID);
}
END_TEST

START_TEST(generation_defaults)
{
    struct model_config c;
    struct error err;

    ck_assert_int_eq(parse(&c, qwen3_06b, "{\"do_sample\":true,\"eos_token_id\":[151645,151643],"
                           "\"temperature\":0.6,\"top_k\":20,\"top_p\":0.95}", &err), ST_OK);
    ck_assert(c.n_eos == 2 && c.eos[0] == 151645 && c.eos[1] == 151643);
    ck_assert(c.has_temperature && c.temperature == 0.6f && c.has_top_k && c.top_k == 20);
    ck_assert(c.has_top_p && c.top_p == 0.95f && !c.has_min_p && !c.has_repetition);
    ck_assert_int_eq(parse(&c, qwen3_06b, "{\"eos_token_id\":7,\"min_p\":0.1,\"top_k\":-1,"
                           "\"repetition_penalty\":1.1}", &err), ST_OK);
    ck_assert(c.n_eos == 1 && c.eos[0] == 7 && c.top_k == 0 && c.has_min_p && c.has_repetition);
    ck_assert(c.min_p == 0.1f && c.repetition == 1.1f && !c.has_temperature);
    ck_assert_int_eq(parse(&c, qwen3_06b, "{\"temperature\":null}", &err), ST_OK);
    ck_assert(c.n_eos == 1 && c.eos[0] == 151645 && !c.has_temperature);
    ck_assert(c.temperature == 1 && c.top_p == 1 && c.repetition == 1);
    static const char *const odd[] = {
        "{\"top_p\":0}", "{\"top_p\":1.5}", "{\"top_k\":2.5}", "{\"temperature\":\"1\"}",
        "{\"min_p\":-0.1}", "{\"repetition_penalty\":0}", "{\"eos_token_id\":151936}",
    };
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++)
        ck_assert_msg(parse(&c, qwen3_06b, odd[i], &err) == ST_INVALID, "%s", odd[i]);
}
END_TEST

START_TEST(reads_a_folder)
{
    struct model_config c;
    struct error err;

    ck_assert_int_eq(model_config_read(&c, "models/asynctlsd-books-9m", &err), ST_OK);
    ck_assert(c.layers == 8 && c.hidden == 256 && c.n_eos == 2 && c.has_top_k && c.top_k == 40);
    ck_assert_int_eq(model_config_read(&c, "models/none", &err), ST_IO);
    ck_assert_msg(strstr(err.text, "models/none/config.json"), "%s", err.text);
}
END_TEST

TCase *model_config_case(void)
{
    TCase *tc = tcase_create("model_config");

    tcase_add_test(tc, published_configs);
    tcase_add_test(tc, experts);
    tcase_add_test(tc, layers_without_experts);
    tcase_add_test(tc, experts_beside_a_shared_one);
    tcase_add_test(tc, latent_attention);
    tcase_add_test(tc, latent_scores_with_yarn);
    tcase_add_test(tc, absent_keys_have_the_class_defaults);
    tcase_add_test(tc, rope_default);
    tcase_add_test(tc, rope_linear);
    tcase_add_test(tc, rope_llama3);
    tcase_add_test(tc, rope_yarn);
    tcase_add_test(tc, both_layouts_are_the_same);
    tcase_add_test(tc, sliding_windows);
    tcase_add_loop_test(tc, refused_with_a_sentence, 0, N_REFUSALS);
    tcase_add_test(tc, not_json);
    tcase_add_test(tc, generation_defaults);
    tcase_add_test(tc, reads_a_folder);
    return tc;
}
