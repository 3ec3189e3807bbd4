/* engine/model/weights.h: which folders bind, where the tensors end up, and that each
 * thing that does not fit is refused with a sentence that names the file and the tensor. */

#include "engine/model/weights.h"

#include "engine/base/log.h"
#include "engine/base/strbuf.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/temp_folder.h"
#include "tests/support/weight_files.h"

#include <check.h>
#include <stdio.h>
#include <string.h>

/* A model small enough to write its tensors out. */
enum { HIDDEN = 6, MLP = 10, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 4, VOCAB = 5, LAYERS = 2 };
enum { Q = HEADS * HEAD_DIM, KV = KV_HEADS * HEAD_DIM, MAX_ENTRIES = 64 };
enum { EXPERTS = 3, EXPERT_MLP = 7 };
enum { Q_RANK = 9, LATENT = 8, NOPE = 3, ROPE = 2, VALUE = 5, SHARED_MLP = 2 * EXPERT_MLP };
enum { KV_B = HEADS * (NOPE + VALUE) };

struct entry {
    char name[100];
    const char *dtype;
    int rank;
    long long shape[3];
};

struct listing {
    struct entry at[MAX_ENTRIES];
    int n;
};

static struct listing folder;

static struct model_config config_of(enum model_family family, bool tied)
{
    return (struct model_config){
        .family = family, .layers = LAYERS, .hidden = HIDDEN, .mlp = MLP, .heads = HEADS,
        .kv_heads = KV_HEADS, .head_dim = HEAD_DIM, .vocab = VOCAB, .tied = tied,
        .family_name = "a-family",
        .qkv_bias = family == FAMILY_QWEN2, .qk_norm = family == FAMILY_QWEN3,
    };
}

/* With experts in the last layer alone. */
static struct model_config config_with_experts(void)
{
    struct model_config c = config_of(FAMILY_QWEN3, false);

    c.family = FAMILY_QWEN3_MOE;
    c.moe = (struct moe_config){ .layers = 1, .experts = EXPERTS, .chosen = 2,
                                 .expert_mlp = EXPERT_MLP };
    c.moe.in_layer[1] = true;
    return c;
}

/* Latent attention in both layers; a router with a bias and a shared expert in the last. */
static struct model_config config_with_latent(void)
{
    struct model_config c = config_with_experts();

    c.family = FAMILY_GLM4_MOE_LITE;
    c.qk_norm = false;
    c.latent = (struct latent_config){ .dim = LATENT, .q_rank = Q_RANK, .nope = NOPE, .rope = ROPE,
                                       .value = VALUE };
    c.kv_heads = 1;
    c.head_dim = LATENT + ROPE;
    c.moe.score = ROUTER_SIGMOID;
    c.moe.shared_mlp = SHARED_MLP;
    return c;
}

static struct entry *add(const char *name, int rows, int cols)
{
    ck_assert_int_lt(folder.n, MAX_ENTRIES);
    struct entry *e = &folder.at[folder.n++];
    *e = (struct entry){ .dtype = "BF16", .rank = cols ? 2 : 1, .shape = { rows, cols } };
    snprintf(e->name, sizeof e->name, "%s", name);
    return e;
}

static void add_to_layer(int layer, const char *name, int rows, int cols)
{
    char full[100];

    snprintf(full, sizeof full, "model.layers.%d.%s", layer, name);
    add(full, rows, cols);
}

static void list_experts(int layer)
{
    char name[60];

    add_to_layer(layer, "mlp.gate.weight", EXPERTS, HIDDEN);
    for (int e = 0; e < EXPERTS; e++)
        for (int i = 0; i < 3; i++) {
            static const char *const parts[] = { "down", "gate", "up" };
            snprintf(name, sizeof name, "mlp.experts.%d.%s_proj.weight", e, parts[i]);
            add_to_layer(layer, name, i == 0 ? HIDDEN : EXPERT_MLP, i == 0 ? EXPERT_MLP : HIDDEN);
        }
}

/* kv_a behind q_a, so that they can be joined where they are mapped. */
static void list_latent(int layer)
{
    add_to_layer(layer, "self_attn.q_a_proj.weight", Q_RANK, HIDDEN);
    add_to_layer(layer, "self_attn.kv_a_proj_with_mqa.weight", LATENT + ROPE, HIDDEN);
    add_to_layer(layer, "self_attn.kv_a_layernorm.weight", LATENT, 0);
    add_to_layer(layer, "self_attn.kv_b_proj.weight", KV_B, LATENT);
    add_to_layer(layer, "self_attn.o_proj.weight", HIDDEN, HEADS * VALUE);
    add_to_layer(layer, "self_attn.q_a_layernorm.weight", Q_RANK, 0);
    add_to_layer(layer, "self_attn.q_b_proj.weight", HEADS * (NOPE + ROPE), Q_RANK);
}

static void list_shared(int layer)
{
    char name[100];

    add_to_layer(layer, "mlp.shared_experts.down_proj.weight", HIDDEN, SHARED_MLP);
    add_to_layer(layer, "mlp.shared_experts.gate_proj.weight", SHARED_MLP, HIDDEN);
    add_to_layer(layer, "mlp.shared_experts.up_proj.weight", SHARED_MLP, HIDDEN);
    snprintf(name, sizeof name, "model.layers.%d.mlp.gate.e_score_correction_bias", layer);
    add(name, EXPERTS, 0)->dtype = "F32";
}

static void list_plain(const struct model_config *c, int layer)
{
    add_to_layer(layer, "self_attn.q_proj.weight", Q, HIDDEN);
    add_to_layer(layer, "self_attn.k_proj.weight", KV, HIDDEN);
    add_to_layer(layer, "self_attn.v_proj.weight", KV, HIDDEN);
    add_to_layer(layer, "self_attn.o_proj.weight", HIDDEN, Q);
    if (c->qkv_bias) {
        add_to_layer(layer, "self_attn.q_proj.bias", Q, 0);
        add_to_layer(layer, "self_attn.k_proj.bias", KV, 0);
        add_to_layer(layer, "self_attn.v_proj.bias", KV, 0);
    }
    if (c->qk_norm) {
        add_to_layer(layer, "self_attn.q_norm.weight", HEAD_DIM, 0);
        add_to_layer(layer, "self_attn.k_norm.weight", HEAD_DIM, 0);
    }
}

static void list_layer(const struct model_config *c, int layer)
{
    add_to_layer(layer, "input_layernorm.weight", HIDDEN, 0);
    if (c->latent.dim)
        list_latent(layer);
    else
        list_plain(c, layer);
    add_to_layer(layer, "post_attention_layernorm.weight", HIDDEN, 0);
    if (c->moe.in_layer[layer]) {
        list_experts(layer);
        if (c->moe.shared_mlp)
            list_shared(layer);
        return;
    }
    add_to_layer(layer, "mlp.gate_proj.weight", MLP, HIDDEN);
    add_to_layer(layer, "mlp.up_proj.weight", MLP, HIDDEN);
    add_to_layer(layer, "mlp.down_proj.weight", HIDDEN, MLP);
}

/* Exactly what the config implies. */
static void list_model(const struct model_config *c)
{
    folder.n = 0;
    add("model.embed_tokens.weight", VOCAB, HIDDEN);
    for (int l = 0; l < LAYERS; l++)
        list_layer(c, l);
    add("model.norm.weight", HIDDEN, 0);
    if (!c->tied)
        add("lm_head.weight", VOCAB, HIDDEN);
}

static struct entry *entry(const char *name)
{
    for (int i = 0; i < folder.n; i++)
        if (strcmp(folder.at[i].name, name) == 0)
            return &folder.at[i];
    ck_abort_msg("%s is not listed", name);
    return NULL;
}

static size_t entry_bytes(const struct entry *e)
{
    size_t n = strcmp(e->dtype, "F32") == 0 ? 4 : strcmp(e->dtype, "I8") == 0 ? 1 : 2;

    for (int i = 0; i < e->rank; i++)
        n *= (size_t)e->shape[i];
    return n;
}

/* The entries from .. below to as one file.  With an odd pad the data is misaligned. */
static void write_file(const char *name, int from, int to, int pad)
{
    static unsigned char bytes[WEIGHT_FILE_MAX];
    struct strbuf header = { 0 };
    size_t at = 0;

    strbuf_puts(&header, "{");
    for (int i = from; i < to; i++) {
        const struct entry *e = &folder.at[i];
        strbuf_printf(&header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", i > from ? "," : "",
                      e->name, e->dtype);
        for (int d = 0; d < e->rank; d++)
            strbuf_printf(&header, d ? ",%lld" : "%lld", e->shape[d]);
        strbuf_printf(&header, "],\"data_offsets\":[%zu,%zu]}", at, at + entry_bytes(e));
        at += entry_bytes(e);
    }
    strbuf_puts(&header, "}");
    while (header.n % 2 != (size_t)pad)
        strbuf_puts(&header, " ");
    temp_file(name, bytes, weight_file(bytes, header.data, at));
    strbuf_fini(&header);
}

static struct weights *open_folder(const struct model_config *c)
{
    struct weights *w = NULL;
    struct error err = { 0 };

    ck_assert_msg(weights_open(&w, test_backend("auto"), c, temp_folder(), NULL, &err) == ST_OK,
                  "%s", err.text);
    return w;
}

/* word2 may be NULL. */
static void refuse(const struct model_config *c, enum status code, const char *word,
                   const char *word2)
{
    struct weights *w = (struct weights *)&folder;
    struct error err = { 0 };

    write_file("model.safetensors", 0, folder.n, 0);
    enum status got = weights_open(&w, test_backend("auto"), c, temp_folder(), NULL, &err);
    ck_assert_msg(got == code && err.code == code, "%s: %s", status_name(got), err.text);
    ck_assert_ptr_null(w);
    ck_assert_msg(strncmp(err.text, temp_folder(), strlen(temp_folder())) == 0, "%s", err.text);
    ck_assert_msg(strstr(err.text, word) && (!word2 || strstr(err.text, word2)),
                  "%s, %s: %s", word, word2 ? word2 : "", err.text);
}

/* ---- what binds */

static const enum model_family families[] = { FAMILY_QWEN3, FAMILY_QWEN2, FAMILY_LLAMA,
                                              FAMILY_MISTRAL };

START_TEST(every_family_binds)
{
    for (int tied = 0; tied < 2; tied++) {
        struct model_config c = config_of(families[_i], tied);
        size_t bytes = 0;
        list_model(&c);
        write_file("model.safetensors", 0, folder.n, 0);
        struct weights *w = open_folder(&c);
        for (int i = 0; i < folder.n; i++)
            bytes += entry_bytes(&folder.at[i]);
        ck_assert_uint_eq(weights_bytes(w), bytes);
        ck_assert_uint_eq(weights_elements(w), bytes / 2);
        ck_assert_uint_eq(weights_expected_elements(&c), bytes / 2);
        ck_assert((weights_head(w).data == weights_embed(w).data) == (tied == 1));
        for (int l = 0; l < LAYERS; l++) {
            const struct layer_weights *layer = weights_layer(w, l);
            ck_assert((layer->q_bias.data && layer->k_bias.data && layer->v_bias.data)
                      == c.qkv_bias);
            ck_assert((layer->q_norm.data && layer->k_norm.data) == c.qk_norm);
            ck_assert(layer->attn_norm.data && layer->q.data && layer->o.data &&
                      layer->mlp_norm.data && layer->gate.data && layer->down.data);
        }
        weights_close(w);
    }
}
END_TEST

/* Element counts of published models. */
START_TEST(published_element_counts)
{
    static struct {
        struct model_config config;
        uint64_t elements;
    } models[] = {
        { { .layers = 28, .hidden = 1024, .mlp = 3072, .heads = 16, .kv_heads = 8,
            .head_dim = 128, .vocab = 151936, .tied = true, .qk_norm = true }, 596049920 },
        { { .layers = 36, .hidden = 4096, .mlp = 12288, .heads = 32, .kv_heads = 8,
            .head_dim = 128, .vocab = 151936, .qk_norm = true }, UINT64_C(8190735360) },
        { { .layers = 64, .hidden = 5120, .mlp = 25600, .heads = 64, .kv_heads = 8,
            .head_dim = 128, .vocab = 151936, .qk_norm = true }, UINT64_C(32762123264) },
        { { .layers = 32, .hidden = 4096, .mlp = 14336, .heads = 32, .kv_heads = 8,
            .head_dim = 128, .vocab = 128256 }, UINT64_C(8030261248) },
        { { .layers = 28, .hidden = 3584, .mlp = 18944, .heads = 28, .kv_heads = 4,
            .head_dim = 128, .vocab = 152064, .qkv_bias = true }, UINT64_C(7615616512) },
        { { .layers = 30, .hidden = 576, .mlp = 1536, .heads = 9, .kv_heads = 3, .head_dim = 64,
            .vocab = 49152, .tied = true }, 134515008 },
        { { .layers = 48, .hidden = 2048, .mlp = 6144, .heads = 32, .kv_heads = 4,
            .head_dim = 128, .vocab = 151936, .qk_norm = true,
            .moe = { .layers = 48, .in_layer = { true }, .experts = 128, .chosen = 8,
                     .expert_mlp = 768 } }, UINT64_C(30532122624) },
        { { .layers = 47, .hidden = 2048, .mlp = 10240, .heads = 20, .kv_heads = 1,
            .head_dim = 576, .vocab = 154880,
            .latent = { .dim = 512, .q_rank = 768, .nope = 192, .rope = 64, .value = 256 },
            .moe = { .layers = 46, .experts = 64, .chosen = 4, .expert_mlp = 1536,
                     .shared_mlp = 1536, .score = ROUTER_SIGMOID } }, UINT64_C(29943393920) },
    };

    memset(models[6].config.moe.in_layer, true, 48);
    memset(models[7].config.moe.in_layer + 1, true, 46);

    for (size_t i = 0; i < sizeof models / sizeof *models; i++)
        ck_assert_uint_eq(weights_expected_elements(&models[i].config), models[i].elements);
}
END_TEST

/* Where each tensor of the mapping went, by its bytes: those of weight_file() count up
 * from the first of the file. */
static void check_bytes(struct weight w, const char *name)
{
    const unsigned char *data = w.data;
    size_t at = 0;

    for (int i = 0; strcmp(folder.at[i].name, name) != 0; i++)
        at += entry_bytes(&folder.at[i]);
    for (size_t i = 0; i < entry_bytes(entry(name)); i++)
        ck_assert_int_eq(data[i], (unsigned char)(at + i));
}

START_TEST(tensors_go_to_their_places)
{
    struct model_config c = config_of(FAMILY_QWEN2, false);

    list_model(&c);
    write_file("model.safetensors", 0, folder.n, _i);
    struct weights *w = open_folder(&c);
    const struct layer_weights *l = weights_layer(w, 1);
    check_bytes(weights_embed(w), "model.embed_tokens.weight");
    check_bytes(weights_norm(w), "model.norm.weight");
    check_bytes(weights_head(w), "lm_head.weight");
    check_bytes(weights_layer(w, 0)->attn_norm, "model.layers.0.input_layernorm.weight");
    check_bytes(l->attn_norm, "model.layers.1.input_layernorm.weight");
    check_bytes(l->q, "model.layers.1.self_attn.q_proj.weight");
    check_bytes(l->k, "model.layers.1.self_attn.k_proj.weight");
    check_bytes(l->v, "model.layers.1.self_attn.v_proj.weight");
    check_bytes(l->o, "model.layers.1.self_attn.o_proj.weight");
    check_bytes(l->q_bias, "model.layers.1.self_attn.q_proj.bias");
    check_bytes(l->k_bias, "model.layers.1.self_attn.k_proj.bias");
    check_bytes(l->v_bias, "model.layers.1.self_attn.v_proj.bias");
    check_bytes(l->mlp_norm, "model.layers.1.post_attention_layernorm.weight");
    check_bytes(l->gate, "model.layers.1.mlp.gate_proj.weight");
    check_bytes(l->up, "model.layers.1.mlp.up_proj.weight");
    check_bytes(l->down, "model.layers.1.mlp.down_proj.weight");
    /* In this order of the file they lie behind each other, mapped or copied. */
    ck_assert(l->joined);
    ck_assert_uint_eq((uintptr_t)l->q.data % 2, 0);      /* misaligned ones were copied */
    weights_close(w);
}
END_TEST

/* Mapped or copied (a misaligned file), the tables lead to each expert's matrices. */
START_TEST(experts_go_to_their_tables)
{
    struct model_config c = config_with_experts();
    static const char *const parts[] = { "gate", "up", "down" };
    char name[100];

    list_model(&c);
    write_file("model.safetensors", 0, folder.n, _i);
    struct weights *w = open_folder(&c);
    const struct layer_weights *l = weights_layer(w, 1), *dense = weights_layer(w, 0);
    ck_assert(dense->gate.data && !dense->router.data && !l->gate.data && !l->down.data);
    ck_assert_uint_eq(weights_elements(w), weights_expected_elements(&c));
    check_bytes(l->router, "model.layers.1.mlp.gate.weight");
    ck_assert_int_eq(l->experts.type, DTYPE_BF16);
    for (int i = 0; i < 3 * EXPERTS; i++) {
        const void *const *tables[] = { l->experts.gate, l->experts.up, l->experts.down };
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.%s_proj.weight", i / 3,
                 parts[i % 3]);
        const char *data = tables[i % 3][i / 3];
        check_bytes((struct weight){ data, DTYPE_BF16 }, name);
        if (_i)                  /* copied: one behind the other */
            ck_assert_ptr_eq(data, (const char *)l->experts.gate[0]
                                   + (size_t)i * HIDDEN * EXPERT_MLP * 2);
    }
    weights_close(w);
}
END_TEST

START_TEST(latent_tensors_go_to_their_places)
{
    struct model_config c = config_with_latent();

    list_model(&c);
    write_file("model.safetensors", 0, folder.n, _i);
    struct weights *w = open_folder(&c);
    const struct layer_weights *l = weights_layer(w, 1), *dense = weights_layer(w, 0);
    ck_assert_uint_eq(weights_elements(w), weights_expected_elements(&c));
    check_bytes(l->q_a, "model.layers.1.self_attn.q_a_proj.weight");
    check_bytes(l->q_a_norm, "model.layers.1.self_attn.q_a_layernorm.weight");
    check_bytes(l->q_b, "model.layers.1.self_attn.q_b_proj.weight");
    check_bytes(l->kv_a, "model.layers.1.self_attn.kv_a_proj_with_mqa.weight");
    check_bytes(l->kv_a_norm, "model.layers.1.self_attn.kv_a_layernorm.weight");
    check_bytes(l->kv_b, "model.layers.1.self_attn.kv_b_proj.weight");
    check_bytes(l->o, "model.layers.1.self_attn.o_proj.weight");
    check_bytes(l->router, "model.layers.1.mlp.gate.weight");
    check_bytes(l->router_bias, "model.layers.1.mlp.gate.e_score_correction_bias");
    check_bytes(l->gate, "model.layers.1.mlp.shared_experts.gate_proj.weight");
    check_bytes(l->up, "model.layers.1.mlp.shared_experts.up_proj.weight");
    check_bytes(l->down, "model.layers.1.mlp.shared_experts.down_proj.weight");
    check_bytes(dense->gate, "model.layers.0.mlp.gate_proj.weight");
    check_bytes(dense->kv_b, "model.layers.0.self_attn.kv_b_proj.weight");
    ck_assert(l->joined && dense->joined);
    ck_assert(!l->q.data && !l->k.data && !l->v.data && !l->q_norm.data && !l->q_bias.data);
    ck_assert(!dense->router.data && !dense->router_bias.data);
    ck_assert_uint_eq((uintptr_t)l->router_bias.data % 4, 0);
    weights_close(w);
}
END_TEST

START_TEST(latent_tensors_that_do_not_fit)
{
    static const char *const names[] = {
        "self_attn.q_a_proj.weight", "self_attn.q_b_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_b_proj.weight",
        "self_attn.q_a_layernorm.weight", "self_attn.kv_a_layernorm.weight",
        "self_attn.o_proj.weight", "mlp.gate.e_score_correction_bias",
        "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight",
        "mlp.shared_experts.down_proj.weight",
    };
    struct model_config c = config_with_latent();
    char name[100];

    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(name, sizeof name, "model.layers.1.%s", names[i]);
        list_model(&c);
        entry(name)->shape[0]++;
        refuse(&c, ST_INVALID, "has the shape [", name);
        list_model(&c);
        snprintf(entry(name)->name, sizeof name, "model.layers.2.x");
        refuse(&c, ST_INVALID, "missing tensors: 1", name);
    }
    list_model(&c);
    entry("model.layers.1.mlp.gate.e_score_correction_bias")->dtype = "BF16";
    refuse(&c, ST_UNSUPPORTED, "e_score_correction_bias of layer 1 is not F32", NULL);
    list_model(&c);
    add("model.layers.0.self_attn.q_proj.weight", Q, HIDDEN);
    refuse(&c, ST_UNSUPPORTED, "without a place", "q_proj.weight");
    list_model(&c);
    add("model.layers.0.mlp.shared_experts.up_proj.weight", SHARED_MLP, HIDDEN);
    refuse(&c, ST_UNSUPPORTED, "without a place", "layers.0.mlp.shared_experts");
}
END_TEST

/* k of another type than q and v: nothing is joined. */
START_TEST(types_can_differ)
{
    struct model_config c = config_of(FAMILY_LLAMA, true);

    list_model(&c);
    entry("model.layers.0.self_attn.k_proj.weight")->dtype = "F32";
    entry("model.norm.weight")->dtype = "F32";
    for (int pad = 0; pad < 2; pad++) {
        write_file("model.safetensors", 0, folder.n, pad);
        struct weights *w = open_folder(&c);
        const struct layer_weights *l = weights_layer(w, 0);
        ck_assert(!l->joined && weights_layer(w, 1)->joined);
        ck_assert(l->q.type == DTYPE_BF16 && l->k.type == DTYPE_F32);
        ck_assert(weights_norm(w).type == DTYPE_F32);
        check_bytes(l->k, "model.layers.0.self_attn.k_proj.weight");
        check_bytes(l->v, "model.layers.0.self_attn.v_proj.weight");
        ck_assert_uint_eq((uintptr_t)l->k.data % 4, 0);
        weights_close(w);
    }
}
END_TEST

/* Tensors in another order of the file: found, but k does not follow q. */
START_TEST(order_of_the_file_does_not_matter)
{
    struct model_config c = config_of(FAMILY_QWEN3, false);

    list_model(&c);
    for (int i = 0; i < folder.n / 2; i++) {
        struct entry e = folder.at[i];
        folder.at[i] = folder.at[folder.n - 1 - i];
        folder.at[folder.n - 1 - i] = e;
    }
    write_file("model.safetensors", 0, folder.n, 0);
    struct weights *w = open_folder(&c);
    const struct layer_weights *l = weights_layer(w, 0);
    check_bytes(l->q, "model.layers.0.self_attn.q_proj.weight");
    check_bytes(l->k, "model.layers.0.self_attn.k_proj.weight");
    ck_assert(!l->joined);
    weights_close(w);
}
END_TEST

START_TEST(what_every_reader_skips)
{
    struct model_config c = config_of(FAMILY_LLAMA, true);

    list_model(&c);
    uint64_t elements = weights_expected_elements(&c);
    add("lm_head.weight", 7, 9);                          /* of a tied model: any shape */
    add("model.layers.2.mlp.down_proj.weight", 3, 3);     /* behind the last layer */
    add("model.layers.99999999999999999999.x", 1, 0)->dtype = "I8";
    add("model.layers.0.self_attn.rotary_emb.inv_freq", 2, 0)->dtype = "F32";
    write_file("model.safetensors", 0, folder.n, 0);
    struct weights *w = open_folder(&c);
    ck_assert_uint_eq(weights_elements(w), elements);
    ck_assert_ptr_eq(weights_head(w).data, weights_embed(w).data);
    weights_close(w);
}
END_TEST

static void write_index(int split, const char *leave_out, const char *also)
{
    struct strbuf index = { 0 };

    strbuf_puts(&index, "{\"weight_map\":{");
    for (int i = 0, n = 0; i < folder.n; i++)
        if (!leave_out || strcmp(folder.at[i].name, leave_out) != 0)
            strbuf_printf(&index, "%s\"%s\":\"%s.safetensors\"", n++ ? "," : "",
                          folder.at[i].name, i < split ? "x" : "y");
    strbuf_printf(&index, "%s}}", also);
    temp_file("model.safetensors.index.json", index.data, index.n);
    strbuf_fini(&index);
}

START_TEST(shards_bind_like_one_file)
{
    struct model_config c = config_of(FAMILY_QWEN3, false);
    struct weights *w;
    struct error err = { 0 };

    list_model(&c);
    write_file("x.safetensors", 0, 5, 1);
    write_file("y.safetensors", 5, folder.n, 0);
    write_index(5, NULL, "");
    w = open_folder(&c);
    ck_assert_uint_eq(weights_elements(w), weights_expected_elements(&c));
    weights_close(w);
    write_index(5, "lm_head.weight", "");
    ck_assert_int_eq(weights_open(&w, test_backend("auto"), &c, temp_folder(), NULL, &err),
                     ST_INVALID);
    ck_assert_msg(strstr(err.text, "lm_head.weight") && strstr(err.text, "index.json"), "%s",
                  err.text);
    write_index(5, NULL, ",\"extra\":\"y.safetensors\"");
    ck_assert_int_eq(weights_open(&w, test_backend("auto"), &c, temp_folder(), NULL, &err),
                     ST_INVALID);
    ck_assert_msg(strstr(err.text, "tensor extra") && strstr(err.text, "index.json"), "%s",
                  err.text);
    ck_assert_int_eq(remove(temp_path("y.safetensors")), 0);
    write_index(5, NULL, "");
    ck_assert_int_eq(weights_open(&w, test_backend("auto"), &c, temp_folder(), NULL, &err), ST_IO);
    ck_assert_msg(strstr(err.text, "/y.safetensors"), "%s", err.text);
}
END_TEST

/* ---- what is refused */

static const char *const names[] = {
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    "model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight",
    "model.layers.1.self_attn.o_proj.weight", "model.layers.0.self_attn.q_proj.bias",
    "model.layers.1.self_attn.k_proj.bias", "model.layers.1.self_attn.v_proj.bias",
    "model.layers.1.post_attention_layernorm.weight", "model.layers.0.mlp.gate_proj.weight",
    "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight",
};
enum { N_NAMES = sizeof names / sizeof *names };

START_TEST(missing_tensors)
{
    struct model_config c = config_of(FAMILY_QWEN2, false);

    list_model(&c);
    *entry(names[_i]) = folder.at[folder.n - 1];
    folder.n--;
    refuse(&c, ST_INVALID, "missing tensors: 1", names[_i]);
}
END_TEST

/* An untied model without a head is not a tied one. */
START_TEST(missing_tensors_are_counted)
{
    struct model_config c = config_of(FAMILY_QWEN3, true);

    list_model(&c);
    c.tied = false;
    refuse(&c, ST_INVALID, "missing tensors: 1", "lm_head.weight");
    c.layers = 3;
    refuse(&c, ST_INVALID, "missing tensors: 12", "model.layers.2.input_layernorm.weight");
}
END_TEST

START_TEST(wrong_shapes)
{
    struct model_config c = config_of(FAMILY_QWEN2, false);

    list_model(&c);
    struct entry *e = entry(names[_i]), right = *e;
    e->shape[0]++;
    refuse(&c, ST_INVALID, "/model.safetensors: tensor ", names[_i]);
    *e = right;
    e->rank = 3;                                          /* one more, of length 1 */
    e->shape[e->shape[1] ? 2 : 1] = 1;
    e->shape[2] = 1;
    refuse(&c, ST_INVALID, "has the shape [", names[_i]);
    *e = right;
    if (e->rank == 2) {
        e->shape[0] = right.shape[1];
        e->shape[1] = right.shape[0];
        refuse(&c, ST_INVALID, "config.json implies [", names[_i]);
        *e = right;
        e->rank = 1;
        e->shape[0] *= e->shape[1];
        refuse(&c, ST_INVALID, "config.json implies [", names[_i]);
    }
    *e = right;
    e->shape[0] = 0;
    refuse(&c, ST_INVALID, "has the shape [0", names[_i]);
    *e = right;
    e->rank = 0;
    refuse(&c, ST_INVALID, "has the shape []", names[_i]);
}
END_TEST

START_TEST(wrong_types)
{
    static const char *const types[] = { "F16", "I8" };
    struct model_config c = config_of(FAMILY_QWEN2, false);

    for (int i = 0; i < 2; i++) {
        list_model(&c);
        entry(names[_i])->dtype = types[i];
        refuse(&c, ST_UNSUPPORTED, types[i], names[_i]);
    }
}
END_TEST

START_TEST(pairs_of_two_types)
{
    static const struct { enum model_family family; const char *name, *word; } pairs[] = {
        { FAMILY_QWEN2, "model.layers.1.self_attn.q_proj.bias", "q_proj.bias of layer 1" },
        { FAMILY_QWEN2, "model.layers.0.self_attn.k_proj.bias", "k_proj.bias of layer 0" },
        { FAMILY_QWEN2, "model.layers.1.self_attn.v_proj.weight", "v_proj.bias of layer 1" },
        { FAMILY_QWEN3, "model.layers.1.self_attn.k_norm.weight", "k_norm.weight of layer 1" },
        { FAMILY_LLAMA, "model.layers.0.mlp.up_proj.weight", "up_proj.weight of layer 0" },
    };

    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        struct model_config c = config_of(pairs[i].family, false);
        list_model(&c);
        entry(pairs[i].name)->dtype = "F32";
        refuse(&c, ST_UNSUPPORTED, "two types", pairs[i].word);
    }
}
END_TEST

/* A tensor nobody would use changes the answer in the program that wrote it. */
START_TEST(tensors_without_a_place)
{
    static const char *const extra[] = {
        "model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.o_proj.bias",
        "model.layers.0.self_attn.q_norm.weight", "model.layers.1.mlp.gate.weight",
        "model.layers.0.self_attn.q_proj.weight_scale", "model.layers.x.weight",
        "model.layers.1", "model.layers.-5.x", "something", "",
    };
    struct model_config c = config_of(FAMILY_LLAMA, false);

    for (size_t i = 0; i < sizeof extra / sizeof *extra; i++) {
        list_model(&c);
        add(extra[i], 4, 0);
        refuse(&c, ST_UNSUPPORTED, "without a place in a a-family model: 1", extra[i]);
        refuse(&c, ST_UNSUPPORTED, "/model.safetensors: ", NULL);
    }
    list_model(&c);
    add("zebra", 1, 0);
    add("ant", 1, 0);
    refuse(&c, ST_UNSUPPORTED, "model: 2, the first is ant", NULL);
}
END_TEST

START_TEST(experts_that_do_not_fit)
{
    struct model_config c = config_with_experts();

    list_model(&c);
    *entry("model.layers.1.mlp.experts.2.up_proj.weight") = folder.at[folder.n - 1];
    folder.n--;                  /* also takes lm_head.weight to where the expert was */
    refuse(&c, ST_INVALID, "missing tensors: 1", "model.layers.1.mlp.experts.2.up_proj.weight");
    list_model(&c);
    *entry("model.layers.1.mlp.gate.weight") = folder.at[folder.n - 1];
    folder.n--;
    refuse(&c, ST_INVALID, "missing tensors: 1", "model.layers.1.mlp.gate.weight");
    list_model(&c);
    add("model.layers.1.mlp.experts.3.up_proj.weight", EXPERT_MLP, HIDDEN);
    refuse(&c, ST_UNSUPPORTED, "without a place", "model.layers.1.mlp.experts.3.up_proj.weight");
    list_model(&c);
    add("model.layers.1.mlp.shared_experts.up_proj.weight", EXPERT_MLP, HIDDEN);
    refuse(&c, ST_UNSUPPORTED, "without a place", "shared_experts");
    list_model(&c);
    add("model.layers.1.mlp.gate_proj.weight", MLP, HIDDEN);
    refuse(&c, ST_UNSUPPORTED, "without a place", "model.layers.1.mlp.gate_proj.weight");
    list_model(&c);
    entry("model.layers.1.mlp.experts.0.down_proj.weight")->shape[0] = EXPERT_MLP;
    entry("model.layers.1.mlp.experts.0.down_proj.weight")->shape[1] = HIDDEN;
    refuse(&c, ST_INVALID, "experts.0.down_proj.weight has the shape [7, 6]", "implies [6, 7]");
    list_model(&c);
    entry("model.layers.1.mlp.gate.weight")->shape[0] = EXPERTS + 1;
    refuse(&c, ST_INVALID, "mlp.gate.weight has the shape [4, 6]", NULL);
    list_model(&c);
    entry("model.layers.1.mlp.experts.1.up_proj.weight")->dtype = "F32";
    refuse(&c, ST_UNSUPPORTED, "experts of layer 1 are of two types", NULL);
    /* Fused: said before what is missing. */
    list_model(&c);
    folder.n -= 3 * EXPERTS + 2;
    add("model.layers.1.mlp.experts.gate_up_proj", EXPERTS * 2 * EXPERT_MLP, HIDDEN);
    refuse(&c, ST_UNSUPPORTED, "experts.gate_up_proj holds all experts of a layer", NULL);
}
END_TEST

START_TEST(no_folder)
{
    struct model_config c = config_of(FAMILY_LLAMA, false);
    struct weights *w;
    struct error err = { 0 };

    ck_assert_int_eq(weights_open(&w, test_backend("auto"), &c, "/nonexistent", NULL, &err), ST_IO);
    ck_assert_msg(strstr(err.text, "/nonexistent/model.safetensors"), "%s", err.text);
    weights_close(NULL);
}
END_TEST

static void set_up(void)
{
    log_set_level(LOG_LEVEL_WARN);
    temp_folder_create();
}

TCase *weights_case(void)
{
    TCase *tc = tcase_create("weights");

    tcase_add_checked_fixture(tc, set_up, temp_folder_remove);
    tcase_add_loop_test(tc, every_family_binds, 0, 4);
    tcase_add_test(tc, published_element_counts);
    tcase_add_loop_test(tc, tensors_go_to_their_places, 0, 2);
    tcase_add_loop_test(tc, experts_go_to_their_tables, 0, 2);
    tcase_add_loop_test(tc, latent_tensors_go_to_their_places, 0, 2);
    tcase_add_test(tc, latent_tensors_that_do_not_fit);
    tcase_add_test(tc, types_can_differ);
    tcase_add_test(tc, order_of_the_file_does_not_matter);
    tcase_add_test(tc, what_every_reader_skips);
    tcase_add_test(tc, shards_bind_like_one_file);
    tcase_add_loop_test(tc, missing_tensors, 0, N_NAMES);
    tcase_add_test(tc, missing_tensors_are_counted);
    tcase_add_loop_test(tc, wrong_shapes, 0, N_NAMES);
    tcase_add_loop_test(tc, wrong_types, 0, N_NAMES);
    tcase_add_test(tc, pairs_of_two_types);
    tcase_add_test(tc, tensors_without_a_place);
    tcase_add_test(tc, experts_that_do_not_fit);
    tcase_add_test(tc, no_folder);
    return tc;
}
