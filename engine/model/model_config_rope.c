#include "engine/model/model_config_parts.h"
#include "engine/model/rope.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <string.h>

static const char *const rope_keys[] = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate",
    "low_freq_factor", "high_freq_factor", "partial_rotary_factor", "finetuned",
};

static enum status check_rope_keys(const struct json_file *f, const cJSON *p, const char *where,
                                   struct error *err)
{
    for (const cJSON *k = p->child; k; k = k->next) {
        bool known = false;
        for (size_t i = 0; i < sizeof rope_keys / sizeof *rope_keys; i++)
            known = known || strcmp(k->string, rope_keys[i]) == 0;
        if (known && cJSON_GetObjectItemCaseSensitive(p, k->string) != k)
            return error_set(err, ST_INVALID, "%s: \"%.60s\" is in \"%s\" twice", f->name,
                             k->string, where);
        if (!known && !cJSON_IsNull(k))
            return error_set(err, ST_UNSUPPORTED, "%s: \"%.60s\" in \"%s\" is not implemented",
                             f->name, k->string, where);
    }
    return ST_OK;
}

/* The object that holds the scaling, an empty one when there is none. */
static enum status find_rope(const cJSON **out, const char **where, const struct json_file *f,
                             const cJSON *empty, struct error *err)
{
    const char *const keys[] = { "rope_parameters", "rope_scaling" };

    *out = empty;
    *where = keys[1];
    for (int i = 0; i < 2; i++) {
        const cJSON *p = json_get(f->root, keys[i]);
        if (!p)
            continue;
        if (!cJSON_IsObject(p))
            return error_set(err, ST_INVALID, "%s: \"%s\" must be an object", f->name, keys[i]);
        if (!p->child)
            continue;
        if (*out != empty)
            return error_set(err, ST_INVALID, "%s: has both \"rope_parameters\" and "
                             "\"rope_scaling\"; one must go", f->name);
        *out = p;
        *where = keys[i];
    }
    return check_rope_keys(f, *out, *where, err);
}

static enum status rope_kind(enum rope_kind *out, const struct json_file *f, const cJSON *p,
                             const char *where, struct error *err)
{
    static const struct { const char *name; enum rope_kind kind; } kinds[] = {
        { "default", ROPE_DEFAULT }, { "linear", ROPE_LINEAR },
        { "llama3", ROPE_LLAMA3 },   { "yarn", ROPE_YARN },
    };
    const char *type = "default";

    TRY(json_string(f, p, "type", &type, err));
    TRY(json_string(f, p, "rope_type", &type, err));
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strcmp(type, kinds[i].name) == 0) {
            *out = kinds[i].kind;
            return ST_OK;
        }
    return error_set(err, ST_UNSUPPORTED, "%s: \"rope_type\" in \"%s\" is \"%.60s\"; default, "
                     "linear, llama3 and yarn are implemented", f->name, where, type);
}

static enum status read_llama3(struct rope_params *r, const struct json_file *f, const cJSON *p,
                               struct error *err)
{
    TRY(json_double(f, p, "low_freq_factor", 1e-3, 1e6, &r->low_freq_factor, err));
    TRY(json_double(f, p, "high_freq_factor", 1e-3, 1e6, &r->high_freq_factor, err));
    if (r->low_freq_factor == 0 || r->high_freq_factor <= r->low_freq_factor)
        return error_set(err, ST_INVALID, "%s: rope_type llama3 needs \"low_freq_factor\" and "
                         "a larger \"high_freq_factor\"", f->name);
    return ST_OK;
}

static enum status read_yarn(struct rope_params *r, const struct json_file *f, const cJSON *p,
                             struct error *err)
{
    TRY(json_double(f, p, "beta_fast", 1e-3, 1e6, &r->beta_fast, err));
    TRY(json_double(f, p, "beta_slow", 1e-3, 1e6, &r->beta_slow, err));
    TRY(json_double(f, p, "mscale", 0, 1e3, &r->mscale, err));
    TRY(json_double(f, p, "mscale_all_dim", 0, 1e3, &r->mscale_all_dim, err));
    TRY(json_double(f, p, "attention_factor", 1e-3, 1e3, &r->attention_factor, err));
    TRY(json_bool(f, p, "truncate", &r->truncate, err));
    if (r->beta_fast <= r->beta_slow)
        return error_set(err, ST_INVALID, "%s: \"beta_fast\" must be larger than \"beta_slow\"",
                         f->name);
    return ST_OK;
}

/* original_max_position_embeddings also occurs at the top level, where it
 * wins; without it the context is taken as it is. */
static enum status read_scaling(struct rope_params *r, const struct json_file *f,
                                const cJSON *p, int max_position, struct error *err)
{
    const char *key = "original_max_position_embeddings";

    r->original = max_position;
    TRY(json_double(f, p, key, 1, MAX_POSITION, &r->original, err));
    TRY(json_double(f, f->root, key, 1, MAX_POSITION, &r->original, err));
    TRY(json_double(f, p, "factor", 1, 1e6, &r->factor, err));
    if (r->factor == 0 && r->kind == ROPE_YARN)
        r->factor = max_position / r->original;
    if (r->factor < 1)
        return error_set(err, ST_INVALID, "%s: the rotary scaling needs a \"factor\" of at "
                         "least 1", f->name);
    if (r->kind == ROPE_LLAMA3)
        return read_llama3(r, f, p, err);
    return r->kind == ROPE_YARN ? read_yarn(r, f, p, err) : ST_OK;
}

/* Latent attention makes up in its scores for what YaRN's mscale_all_dim takes from cos and sin. */
static enum status read_score_scale(struct model_config *c, const struct rope_params *r,
                                    const struct json_file *f, const cJSON *p, struct error *err)
{
    int width = c->latent.dim ? c->latent.nope + c->latent.rope : c->head_dim;
    double all_dim = 0;

    c->score_scale = 1.0f / sqrtf((float)width);
    if (!c->latent.dim || r->kind == ROPE_DEFAULT)
        return ST_OK;
    TRY(json_double(f, p, "mscale_all_dim", 0, 1e3, &all_dim, err));
    double m = all_dim > 0 ? rope_mscale(r->factor, all_dim) : 1;
    c->score_scale = (float)(m * m / sqrt(width));
    return ST_OK;
}

enum status config_read_rope(struct model_config *c, const struct json_file *f,
                             struct error *err)
{
    const cJSON empty = { .type = cJSON_Object }, *p;
    struct rope_params r = { .theta = 10000, .beta_fast = 32, .beta_slow = 1, .truncate = true };
    double partial = 1;
    const char *where;

    TRY(find_rope(&p, &where, f, &empty, err));
    TRY(rope_kind(&r.kind, f, p, where, err));
    TRY(json_double(f, f->root, "rope_theta", 2, 1e12, &r.theta, err));
    TRY(json_double(f, p, "rope_theta", 2, 1e12, &r.theta, err));
    TRY(json_double(f, f->root, "partial_rotary_factor", 0, 1, &partial, err));
    TRY(json_double(f, p, "partial_rotary_factor", 0, 1, &partial, err));
    if (partial != 1)
        return error_set(err, ST_UNSUPPORTED, "%s: a \"partial_rotary_factor\" other than 1 is "
                         "not implemented", f->name);
    if (r.kind != ROPE_DEFAULT)
        TRY(read_scaling(&r, f, p, c->max_position, err));
    rope_frequencies(c->inv_freq, &c->rope_factor, &r, model_rope_dim(c));
    return read_score_scale(c, &r, f, p, err);
}
