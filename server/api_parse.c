#include "server/api_parse.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/base/utf8.h"
#include "engine/grammar/grammar.h"
#include "engine/model/model_config.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { QUOTABLE_BYTES = 60, DEFAULT_MAX_TOKENS = 16 };

int api_quotable_bytes(const char *s)
{
    return (int)utf8_valid_prefix(s, strnlen(s, QUOTABLE_BYTES));
}

enum status api_refuse(struct api_parse *p, const char *param, const char *fmt, ...)
{
    struct api_error *e = p->err;
    va_list ap;

    *e = (struct api_error){ .http = 400, .type = "invalid_request_error" };
    snprintf(e->param, sizeof e->param, "%.*s", api_quotable_bytes(param), param);
    va_start(ap, fmt);
    vsnprintf(e->message, sizeof e->message, fmt, ap);
    va_end(ap);
    return ST_INVALID;
}

enum status api_alloc(struct api_parse *p, void **out, size_t count, size_t bytes)
{
    size_t total;

    *out =
        __builtin_mul_overflow(count, bytes, &total) ? NULL : arena_alloc(p->out->arena, total);
    if (*out)
        return ST_OK;
    return api_refuse(p, "prompt", "The request needs more than %zu bytes of memory.",
                      p->cx->limits.max_arena_bytes);
}

static enum status copy_string(struct api_parse *p, const char **out, const char *s)
{
    size_t n = strlen(s);
    void *copy;

    TRY(api_alloc(p, &copy, n + 1, 1));
    memcpy(copy, s, n);
    *out = copy;
    return ST_OK;
}

static struct api_fields defaults(const struct model_config *m)
{
    return (struct api_fields){
        .max_tokens = DEFAULT_MAX_TOKENS,
        .n = 1,
        .best_of = -1,
        .logprobs = -1,
        .top_k = m->has_top_k ? m->top_k : 0,
        .temperature = m->has_temperature ? (double)m->temperature : 1.0,
        .top_p = m->has_top_p ? (double)m->top_p : 1.0,
        .min_p = m->has_min_p ? (double)m->min_p : 0.0,
        .repetition = m->has_repetition ? (double)m->repetition : 1.0,
        .skip_special = true,
        .add_special = true,
        .top_logprobs = -1,
        .max_completion_tokens = -1,
        .parallel_calls = true,
        .generate = true,
    };
}

static enum status read_model(struct api_parse *p)
{
    const struct api_context *cx = p->cx;
    const cJSON *v = p->fields.model.tree;
    const char *name = v ? v->valuestring : cx->model_names[0];

    for (int i = 0; i < cx->n_model_names; i++)
        if (strcmp(name, cx->model_names[i]) == 0)
            return copy_string(p, &p->out->model, name);
    enum status status = api_refuse(p, "model", "The model `%.*s` does not exist.",
                                    api_quotable_bytes(name), name);
    p->err->http = 404;
    p->err->type = "not_found_error";
    p->err->code = "model_not_found";
    return status;
}

static enum status read_stream_options(struct api_parse *p)
{
    const cJSON *options = p->fields.stream_options.tree;

    if (!options)
        return ST_OK;
    if (!cJSON_IsObject(options))
        return api_refuse(p, "stream_options", "'stream_options' must be an object.");
    if (!p->fields.stream)
        return api_refuse(p, "stream_options",
                          "'stream_options' is only allowed when 'stream' is "
                          "true.");
    for (const cJSON *v = options->child; v; v = v->next) {
        bool usage = strcmp(v->string, "include_usage") == 0;

        if (cJSON_IsNull(v) || (!usage && cJSON_IsFalse(v)))
            continue;
        if (!usage)
            return api_refuse(p, "stream_options",
                              "'stream_options' has '%.*s', which is not "
                              "supported by this server.",
                              api_quotable_bytes(v->string), v->string);
        if (!cJSON_IsBool(v))
            return api_refuse(p, "stream_options.include_usage",
                              "'stream_options.include_usage' "
                              "must be true or false.");
        p->fields.include_usage = cJSON_IsTrue(v);
    }
    return ST_OK;
}

/* Fields against each other and against the limits. */
static enum status check_counts(struct api_parse *p)
{
    struct api_fields *f = &p->fields;

    if (f->best_of < 0)
        f->best_of = f->n;
    if (f->best_of < f->n)
        return api_refuse(p, "best_of", "'best_of' (%lld) must not be less than 'n' (%lld).",
                          (long long)f->best_of, (long long)f->n);
    if (f->stream && f->best_of > f->n)
        return api_refuse(p, "best_of", "'best_of' greater than 'n' cannot be streamed.");
    if (f->logprobs > (int64_t)p->cx->limits.max_logprobs)
        return api_refuse(p, "logprobs", "'logprobs' must be between 0 and %u, not %lld.",
                          p->cx->limits.max_logprobs, (long long)f->logprobs);
    if (f->max_tokens == 0 && !f->echo)
        return api_refuse(p, "max_tokens",
                          "'max_tokens' must be at least 1 unless 'echo' is true.");
    if (f->min_tokens > f->max_tokens)
        return api_refuse(p, "min_tokens",
                          "'min_tokens' (%lld) must not be greater than "
                          "'max_tokens' (%lld).",
                          (long long)f->min_tokens, (long long)f->max_tokens);
    return ST_OK;
}

static enum status read_stop(struct api_parse *p, const cJSON *v, const char **out)
{
    uint32_t max = p->cx->limits.max_stop_bytes;

    if (!cJSON_IsString(v))
        return api_refuse(p, "stop", "'stop' must be a string or a list of strings.");
    if (v->valuestring[0] == '\0')
        return api_refuse(p, "stop", "'stop' must not have an empty string.");
    if (strlen(v->valuestring) > max)
        return api_refuse(p, "stop", "'stop' has a string longer than %u bytes.", max);
    return copy_string(p, out, v->valuestring);
}

/* The entries of a list, at most max. */
static enum status count_entries(struct api_parse *p, const char *param, const cJSON *list,
                                 uint32_t max, uint32_t *n)
{
    *n = 0;
    for (const cJSON *v = list->child; v; v = v->next)
        if (++*n > max)
            return api_refuse(p, param, "'%s' has more than %u entries.", param, max);
    return ST_OK;
}

static enum status read_stops(struct api_parse *p)
{
    const cJSON *v = p->fields.stop.tree;
    struct request *t = &p->out->template;
    uint32_t n = 1;
    void *stops;

    if (!v)
        return ST_OK;
    bool list = cJSON_IsArray(v);
    if (list)
        TRY(count_entries(p, "stop", v, p->cx->limits.max_stops, &n));
    else if (p->cx->limits.max_stops == 0)
        return api_refuse(p, "stop", "'stop' has more than 0 entries.");
    TRY(api_alloc(p, &stops, n, sizeof(char *)));
    const cJSON *item = list ? v->child : v;
    for (uint32_t i = 0; i < n; i++, item = item->next)
        TRY(read_stop(p, item, (const char **)stops + i));
    t->stops = stops;
    t->n_stops = n;
    return ST_OK;
}

static enum status read_stop_ids(struct api_parse *p)
{
    const cJSON *list = p->fields.stop_ids.tree;
    struct request *t = &p->out->template;
    uint32_t n;
    size_t i = 0;
    void *ids;

    if (!list)
        return ST_OK;
    if (!cJSON_IsArray(list) || p->fields.stop_ids.fraction)
        return api_refuse(p, "stop_token_ids", "'stop_token_ids' must be a list of integers.");
    TRY(count_entries(p, "stop_token_ids", list, p->cx->limits.max_stops, &n));
    TRY(api_alloc(p, &ids, n, sizeof(int32_t)));
    for (const cJSON *v = list->child; v; v = v->next, i++)
        TRY(api_read_id(p, "stop_token_ids", v, i, (int32_t *)ids + i));
    t->stop_ids = ids;
    t->n_stop_ids = n;
    return ST_OK;
}

/* One way to write an id, so that no two keys mean the same. */
static bool bias_id(const char *key, int vocab, int32_t *id)
{
    int64_t value = 0;

    if (key[0] == '\0' || (key[0] == '0' && key[1] != '\0'))
        return false;
    for (const char *c = key; *c; c++) {
        if (*c < '0' || *c > '9' || value >= vocab)
            return false;
        value = value * 10 + (*c - '0');
    }
    *id = (int32_t)value;
    return value < vocab;
}

static int bias_order(const void *a, const void *b)
{
    const struct logit_bias *x = a, *y = b;

    return (x->id > y->id) - (x->id < y->id);
}

static enum status read_bias(struct api_parse *p)
{
    const cJSON *map = p->fields.bias.tree;
    struct request *t = &p->out->template;
    struct logit_bias *bias;
    uint32_t n, i = 0;
    void *memory;

    if (!map)
        return ST_OK;
    if (!cJSON_IsObject(map))
        return api_refuse(p, "logit_bias",
                          "'logit_bias' must be an object of token ids and "
                          "numbers.");
    TRY(count_entries(p, "logit_bias", map, p->cx->limits.max_bias, &n));
    TRY(api_alloc(p, &memory, n, sizeof *bias));
    bias = memory;
    for (const cJSON *v = map->child; v; v = v->next, i++) {
        if (!bias_id(v->string, p->cx->model->vocab, &bias[i].id))
            return api_refuse(p, "logit_bias",
                              "'logit_bias' has the key '%.*s', which is not a "
                              "token id between 0 and %d.",
                              api_quotable_bytes(v->string), v->string,
                              p->cx->model->vocab - 1);
        if (!cJSON_IsNumber(v) || v->valuedouble < -100 || v->valuedouble > 100)
            return api_refuse(p, "logit_bias",
                              "'logit_bias' of token %d must be a number between "
                              "-100 and 100.",
                              bias[i].id);
        bias[i].bias = (float)v->valuedouble;
    }
    if (n > 1)
        qsort(bias, n, sizeof *bias, bias_order);
    for (i = 1; i < n; i++)
        if (bias[i].id == bias[i - 1].id)
            return api_refuse(p, "logit_bias", "'logit_bias' has token %d twice.", bias[i].id);
    t->bias = bias;
    t->n_bias = n;
    return ST_OK;
}

static enum status read_salt(struct api_parse *p)
{
    const cJSON *v = p->fields.cache_salt.tree;

    if (!v)
        return ST_OK;
    size_t n = strlen(v->valuestring);
    if (n == 0)
        return api_refuse(p, "cache_salt", "'cache_salt' must not be empty.");
    /* 0 is the salt of requests without one. */
    uint64_t hash = XXH3_64bits(v->valuestring, n);
    p->out->template.cache_salt = hash ? hash : 1;
    return ST_OK;
}

static enum status read_attention(struct api_parse *p)
{
    const cJSON *v = p->fields.attention.tree;
    bool full = v && strcmp(v->valuestring, "full") == 0;

    if (v && !full && strcmp(v->valuestring, "sparse") != 0)
        return api_refuse(p, "attention", "'attention' must be \"sparse\" or \"full\".");
    p->out->template.sparse = !full;
    return ST_OK;
}

static void fill(struct api_parse *p)
{
    const struct api_fields *f = &p->fields;
    struct api_completion *c = p->out;
    struct request *t = &c->template;

    c->n = (uint32_t)f->n;
    c->best_of = (uint32_t)f->best_of;
    c->stream = f->stream;
    c->include_usage = f->include_usage;
    c->echo = f->echo;
    c->logprobs = (int)f->logprobs;
    c->has_seed = f->has_seed;
    t->max_tokens = (uint32_t)f->max_tokens;
    t->min_tokens = (uint32_t)f->min_tokens;
    t->temperature = (float)f->temperature;
    t->top_p = (float)f->top_p;
    t->min_p = (float)f->min_p;
    t->presence = (float)f->presence;
    t->frequency = (float)f->frequency;
    t->repetition = (float)f->repetition;
    t->top_k = f->top_k > 0 ? (int32_t)f->top_k : 0;
    t->seed = (uint64_t)f->seed;
    t->include_stop = f->include_stop;
    t->ignore_eos = f->ignore_eos;
    t->skip_special = f->skip_special;
    /* Without output there is only scoring, and choosing the best of several
     * takes their probabilities. */
    t->score_prompt = (f->echo && f->logprobs >= 0) || f->max_tokens == 0;
    t->n_top = (int32_t)f->logprobs;
    if (t->n_top < 0 && (t->score_prompt || f->best_of > f->n))
        t->n_top = 0;
}

/* Log-probabilities multiply with everything else. */
static enum status check_logprob_entries(struct api_parse *p)
{
    const struct api_limits *limits = &p->cx->limits;
    const struct api_completion *c = p->out;
    const struct request *t = &c->template;
    uint64_t entries = 0;

    if (t->n_top < 0)
        return ST_OK;
    for (uint32_t i = 0; i < c->n_prompts; i++)
        entries += c->best_of * (1 + (uint64_t)t->n_top) *
                   (t->max_tokens + (t->score_prompt ? (uint64_t)c->prompts[i].n_ids : 0));
    if (entries > limits->max_logprob_entries)
        return api_refuse(p, "logprobs",
                          "The request asks for %llu log-probabilities (choices "
                          "times tokens times 1 + 'logprobs'); the limit is %llu.",
                          (unsigned long long)entries,
                          (unsigned long long)limits->max_logprob_entries);
    return ST_OK;
}

static enum status build(struct api_parse *p)
{
    TRY(read_stream_options(p));
    /* Of a chat max_tokens follows from the conversation; it is checked there. */
    if (p->endpoint == API_TEXT)
        TRY(check_counts(p));
    TRY(read_attention(p));
    TRY(read_salt(p));
    TRY(read_stops(p));
    TRY(read_stop_ids(p));
    TRY(read_bias(p));
    p->out->n_own_stops = p->out->template.n_stops;
    p->out->n_own_stop_ids = p->out->template.n_stop_ids;
    if (p->endpoint == API_CHAT) {
        TRY(api_read_chat(p));
        TRY(check_counts(p));
    }
    fill(p);
    TRY(api_read_guided(p));
    if (p->endpoint == API_TEXT)
        TRY(api_read_prompts(p));
    return check_logprob_entries(p);
}

/* The body as a tree; the scan has refused whatever cJSON would misread. */
static enum status parse_tree(struct api_parse *p, cJSON **out, struct json_scan *scan,
                              const char *body, size_t n)
{
    struct error err;

    if (json_scan(scan, body, n, p->cx->limits.max_json_values, &err) != ST_OK)
        return api_refuse(p, "", "%s", err.text);
    if (!scan->object)
        return api_refuse(p, "", "The request body must be a JSON object.");
    *out = cJSON_ParseWithLength(body, n);
    if (!*out)
        return api_refuse(p, "", "The request body is not valid JSON.");
    return ST_OK;
}

void api_parse_init(struct api_parse *p, enum api_endpoint endpoint,
                    const struct api_context *cx, struct api_error *err)
{
    ASSERT(cx->n_model_names > 0 && cx->limits.max_model_len > 0);
    *p = (struct api_parse){
        .endpoint = endpoint, .cx = cx, .err = err, .fields = defaults(cx->model)
    };
    p->out = mem_calloc(1, sizeof *p->out);
    p->out->arena = arena_create(cx->limits.max_arena_bytes);
}

enum status api_read_body(struct api_parse *p, cJSON **root, const char *body, size_t n)
{
    struct json_scan scan;

    *root = NULL;
    TRY(parse_tree(p, root, &scan, body, n));
    TRY(api_read_fields(p, *root, &scan, body));
    return read_model(p);
}

static struct api_completion *parse(enum api_endpoint endpoint, const char *body, size_t n,
                                    const struct api_context *cx, struct api_error *err)
{
    struct api_parse p;
    cJSON *root;

    api_parse_init(&p, endpoint, cx, err);
    if (endpoint == API_CHAT)
        p.fields.max_tokens = -1;
    enum status status = api_read_body(&p, &root, body, n);
    if (status == ST_OK)
        status = build(&p);
    cJSON_Delete(root);
    if (status == ST_OK)
        return p.out;
    api_completion_free(p.out);
    return NULL;
}

struct api_completion *api_parse_completion(const char *body, size_t n,
                                            const struct api_context *cx, struct api_error *err)
{
    return parse(API_TEXT, body, n, cx, err);
}

struct api_completion *api_parse_chat(const char *body, size_t n, const struct api_context *cx,
                                      struct api_error *err)
{
    return parse(API_CHAT, body, n, cx, err);
}

void api_completion_free(struct api_completion *c)
{
    if (!c)
        return;
    grammar_release(c->grammar);
    arena_destroy(c->arena);
    mem_free(c);
}
