#include "server/api_parse.h"

#include <math.h>
#include <string.h>

/* ---- fields that are honoured */

#define AT(member) .offset = offsetof(struct api_fields, member)

/* clang-format off */
/* Bounds that depend on each other or on a limit are checked in api_parse.c. */
static const struct api_field fields[] = {
    { .name = "model", .kind = FIELD_STRING, AT(model),
      .where = API_TEXT | API_CHAT | API_TOKENIZE | API_DETOKENIZE },
    { .name = "prompt", .kind = FIELD_ANY, AT(prompt), .where = API_TEXT | API_TOKENIZE },
    { .name = "max_tokens", .kind = FIELD_INT, AT(max_tokens), .max = UINT32_MAX },
    { .name = "max_completion_tokens", .kind = FIELD_INT, AT(max_completion_tokens),
      .max = UINT32_MAX, .where = API_CHAT },
    { .name = "min_tokens", .kind = FIELD_INT, AT(min_tokens), .max = UINT32_MAX },
    { .name = "n", .kind = FIELD_INT, AT(n), .min = 1, .max = 128 },
    { .name = "best_of", .kind = FIELD_INT, AT(best_of), .min = 1, .max = 128,
      .where = API_TEXT },
    { .name = "logprobs", .kind = FIELD_INT, AT(logprobs), .max = SAMPLE_MAX_TOP,
      .where = API_TEXT },
    { .name = "logprobs", .kind = FIELD_BOOL, AT(want_logprobs), .where = API_CHAT },
    { .name = "top_logprobs", .kind = FIELD_INT, AT(top_logprobs), .max = SAMPLE_MAX_TOP,
      .where = API_CHAT },
    { .name = "temperature", .kind = FIELD_NUMBER, AT(temperature), .max = 2 },
    { .name = "top_p", .kind = FIELD_NUMBER, AT(top_p), .max = 1, .above_min = true },
    { .name = "top_k", .kind = FIELD_INT, AT(top_k), .min = -1, .max = INT32_MAX },
    { .name = "min_p", .kind = FIELD_NUMBER, AT(min_p), .max = 1 },
    { .name = "presence_penalty", .kind = FIELD_NUMBER, AT(presence), .min = -2, .max = 2 },
    { .name = "frequency_penalty", .kind = FIELD_NUMBER, AT(frequency), .min = -2, .max = 2 },
    { .name = "repetition_penalty", .kind = FIELD_NUMBER, AT(repetition), .max = 10,
      .above_min = true },
    { .name = "seed", .kind = FIELD_SEED },
    { .name = "logit_bias", .kind = FIELD_ANY, AT(bias) },
    { .name = "stop", .kind = FIELD_ANY, AT(stop) },
    { .name = "stop_token_ids", .kind = FIELD_ANY, AT(stop_ids) },
    { .name = "ignore_eos", .kind = FIELD_BOOL, AT(ignore_eos) },
    { .name = "include_stop_str_in_output", .kind = FIELD_BOOL, AT(include_stop) },
    { .name = "skip_special_tokens", .kind = FIELD_BOOL, AT(skip_special) },
    { .name = "add_special_tokens", .kind = FIELD_BOOL, AT(add_special),
      .where = API_TEXT | API_TOKENIZE },
    { .name = "echo", .kind = FIELD_BOOL, AT(echo), .where = API_TEXT },
    { .name = "stream", .kind = FIELD_BOOL, AT(stream) },
    { .name = "stream_options", .kind = FIELD_ANY, AT(stream_options) },
    { .name = "attention", .kind = FIELD_STRING, AT(attention) },
    { .name = "cache_salt", .kind = FIELD_STRING, AT(cache_salt) },
    { .name = "response_format", .kind = FIELD_ANY, AT(response_format) },
    { .name = "structured_outputs", .kind = FIELD_ANY, AT(structured_outputs) },
    { .name = "guided_json", .kind = FIELD_ANY, AT(guided_json) },
    { .name = "guided_regex", .kind = FIELD_STRING, AT(guided_regex) },
    { .name = "guided_choice", .kind = FIELD_ANY, AT(guided_choice) },
    { .name = "user", .kind = FIELD_IGNORED },
    { .name = "metadata", .kind = FIELD_IGNORED },
    { .name = "prompt_cache_key", .kind = FIELD_IGNORED, .where = API_CHAT },
    { .name = "safety_identifier", .kind = FIELD_IGNORED, .where = API_CHAT },
    { .name = "messages", .kind = FIELD_ANY, AT(messages), .where = API_CHAT | API_TOKENIZE },
    { .name = "tools", .kind = FIELD_ANY, AT(tools), .where = API_CHAT | API_TOKENIZE },
    { .name = "tool_choice", .kind = FIELD_ANY, AT(tool_choice), .where = API_CHAT },
    { .name = "parallel_tool_calls", .kind = FIELD_BOOL, AT(parallel_calls),
      .where = API_CHAT },
    { .name = "chat_template_kwargs", .kind = FIELD_ANY, AT(template_kwargs),
      .where = API_CHAT | API_TOKENIZE },
    { .name = "enable_thinking", .kind = FIELD_ANY, AT(enable_thinking),
      .where = API_CHAT | API_TOKENIZE },
    { .name = "add_generation_prompt", .kind = FIELD_BOOL, AT(generate),
      .where = API_CHAT | API_TOKENIZE },
    { .name = "return_token_strs", .kind = FIELD_BOOL, AT(return_strings),
      .where = API_TOKENIZE },
    { .name = "tokens", .kind = FIELD_ANY, AT(tokens), .where = API_DETOKENIZE },
};
/* clang-format on */

/* ---- fields that clients of other servers send and this one does not have.
 * A value that asks for nothing is let through: clients fill in defaults. */

enum harmless {
    HARMLESS_NOTHING,
    HARMLESS_FALSE,
    HARMLESS_TRUE,
    HARMLESS_EMPTY,
    HARMLESS_ZERO,
    HARMLESS_ONE
};

struct missing {
    const char *name;
    enum harmless harmless;
    const char *advice; /* NULL: none */
};

static const struct missing missing_in_text[] = {
    { "messages", HARMLESS_NOTHING, "it belongs to chat completions; send 'prompt'" },
    { "max_completion_tokens", HARMLESS_NOTHING, "use 'max_tokens'" },
    { "top_logprobs", HARMLESS_NOTHING, "use 'logprobs'" },
    { "tools", HARMLESS_EMPTY, NULL },
    { "tool_choice", HARMLESS_NOTHING, NULL },
};

static const struct missing missing_in_chat[] = {
    { "prompt", HARMLESS_NOTHING, "it belongs to text completions; send 'messages'" },
    { "echo", HARMLESS_FALSE, NULL },
    { "best_of", HARMLESS_ONE, "use 'n'" },
    { "add_special_tokens", HARMLESS_FALSE, "the chat format has its own" },
    { "continue_final_message", HARMLESS_FALSE, NULL },
    { "chat_template", HARMLESS_NOTHING, "only the model's own" },
    { "documents", HARMLESS_EMPTY, NULL },
    { "modalities", HARMLESS_NOTHING, "answers are text" },
    { "audio", HARMLESS_NOTHING, NULL },
    { "prediction", HARMLESS_NOTHING, NULL },
    { "verbosity", HARMLESS_NOTHING, NULL },
    { "web_search_options", HARMLESS_NOTHING, NULL },
    { "include_reasoning", HARMLESS_TRUE, NULL },
    { "separate_reasoning", HARMLESS_TRUE, NULL },
    { "mm_processor_kwargs", HARMLESS_EMPTY, NULL },
};

static const struct missing missing[] = {
    { "suffix", HARMLESS_NOTHING, NULL },
    { "functions", HARMLESS_EMPTY, NULL },
    { "function_call", HARMLESS_NOTHING, NULL },
    { "reasoning_effort", HARMLESS_NOTHING, NULL },
    { "service_tier", HARMLESS_NOTHING, NULL },
    { "store", HARMLESS_FALSE, NULL },
    { "use_beam_search", HARMLESS_FALSE, NULL },
    { "early_stopping", HARMLESS_FALSE, NULL },
    { "length_penalty", HARMLESS_ONE, NULL },
    { "spaces_between_special_tokens", HARMLESS_TRUE, NULL },
    { "truncate_prompt_tokens", HARMLESS_NOTHING, "prompts are never cut" },
    { "prompt_logprobs", HARMLESS_NOTHING, "use 'echo' with 'logprobs'" },
    { "prompt_embeds", HARMLESS_NOTHING, NULL },
    { "allowed_token_ids", HARMLESS_NOTHING, NULL },
    { "bad_words", HARMLESS_EMPTY, NULL },
    { "guided_grammar", HARMLESS_NOTHING, NULL },
    { "guided_decoding_backend", HARMLESS_NOTHING, NULL },
    { "guided_whitespace_pattern", HARMLESS_NOTHING, NULL },
    { "structural_tag", HARMLESS_NOTHING, NULL },
    { "json_schema", HARMLESS_NOTHING, "use 'response_format'" },
    { "regex", HARMLESS_NOTHING, "use 'guided_regex'" },
    { "ebnf", HARMLESS_NOTHING, NULL },
    { "logits_processors", HARMLESS_EMPTY, NULL },
    { "custom_logit_processor", HARMLESS_NOTHING, NULL },
    { "lora_path", HARMLESS_NOTHING, NULL },
    { "priority", HARMLESS_ZERO, NULL },
    { "return_token_ids", HARMLESS_FALSE, NULL },
    { "return_tokens_as_token_ids", HARMLESS_FALSE, NULL },
    { "return_hidden_states", HARMLESS_FALSE, NULL },
    { "kv_transfer_params", HARMLESS_NOTHING, NULL },
    { "vllm_xargs", HARMLESS_EMPTY, NULL },
};

static const struct missing *find_in(const struct missing *rows, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(name, rows[i].name) == 0)
            return &rows[i];
    return NULL;
}

#define FIND_IN(rows, name) find_in(rows, sizeof(rows) / sizeof(rows)[0], name)

static const struct missing *find_missing(const struct api_parse *p, const char *name)
{
    const struct missing *m = p->endpoint == API_TEXT   ? FIND_IN(missing_in_text, name)
                              : p->endpoint == API_CHAT ? FIND_IN(missing_in_chat, name)
                                                        : NULL;

    if (m || !(p->endpoint & (API_TEXT | API_CHAT)))
        return m;
    return FIND_IN(missing, name);
}

bool api_field_is_of(const struct api_field *f, enum api_endpoint endpoint)
{
    return endpoint & (f->where ? f->where : API_TEXT | API_CHAT);
}

const struct api_field *api_field_table(size_t *n)
{
    *n = sizeof fields / sizeof fields[0];
    return fields;
}

static bool has_nothing(const cJSON *v)
{
    if (cJSON_IsString(v))
        return v->valuestring[0] == '\0';
    return (cJSON_IsArray(v) || cJSON_IsObject(v)) && v->child == NULL;
}

static bool asks_for_nothing(const cJSON *v, enum harmless harmless)
{
    switch (harmless) {
    case HARMLESS_NOTHING:
        return false;
    case HARMLESS_FALSE:
        return cJSON_IsFalse(v);
    case HARMLESS_TRUE:
        return cJSON_IsTrue(v);
    case HARMLESS_EMPTY:
        return has_nothing(v);
    case HARMLESS_ZERO:
        return cJSON_IsNumber(v) && v->valuedouble == 0.0;
    case HARMLESS_ONE:
        return cJSON_IsNumber(v) && v->valuedouble == 1.0;
    }
    return false;
}

static enum status check_missing(struct api_parse *p, const struct missing *m, const cJSON *v)
{
    if (cJSON_IsNull(v) || asks_for_nothing(v, m->harmless))
        return ST_OK;
    return api_refuse(p, m->name, "'%s' is not supported by this server%s%s.", m->name,
                      m->advice ? ": " : "", m->advice ? m->advice : "");
}

/* ---- reading */

static enum status refuse_range(struct api_parse *p, const struct api_field *f,
                                const struct api_value *v)
{
    int shown = v->text_bytes < 40 ? (int)v->text_bytes : 40;

    if (f->above_min)
        return api_refuse(p, f->name,
                          "'%s' must be greater than %.10g and at most %.10g, not %.*s.",
                          f->name, f->min, f->max, shown, v->text);
    return api_refuse(p, f->name, "'%s' must be between %.10g and %.10g, not %.*s.", f->name,
                      f->min, f->max, shown, v->text);
}

/* Digits to a 64-bit integer, exactly: doubles lose the low bits of seeds. */
static bool exact_integer(int64_t *out, const struct api_value *v)
{
    bool negative = v->text[0] == '-';
    int64_t value = 0;

    for (size_t i = negative; i < v->text_bytes; i++) {
        int digit = v->text[i] - '0';
        if (__builtin_mul_overflow(value, 10, &value) ||
            __builtin_add_overflow(value, negative ? -digit : digit, &value))
            return false;
    }
    *out = value;
    return true;
}

static enum status read_int(struct api_parse *p, const struct api_field *f,
                            const struct api_value *v, int64_t *out)
{
    int64_t value;

    if (!cJSON_IsNumber(v->tree) || v->fraction)
        return api_refuse(p, f->name, "'%s' must be an integer.", f->name);
    if (!exact_integer(&value, v) || (double)value < f->min || (double)value > f->max)
        return refuse_range(p, f, v);
    *out = value;
    return ST_OK;
}

static enum status read_number(struct api_parse *p, const struct api_field *f,
                               const struct api_value *v, double *out)
{
    double value = v->tree->valuedouble;

    if (!cJSON_IsNumber(v->tree))
        return api_refuse(p, f->name, "'%s' must be a number.", f->name);
    if (!isfinite(value) || value < f->min || value > f->max ||
        (f->above_min && value <= f->min))
        return refuse_range(p, f, v);
    /* What is too small for a float would turn into the bound that is out. */
    if (f->above_min && (float)value <= (float)f->min)
        value = (double)nextafterf((float)f->min, INFINITY);
    *out = value;
    return ST_OK;
}

static enum status read_seed(struct api_parse *p, const struct api_value *v)
{
    if (!cJSON_IsNumber(v->tree) || v->fraction)
        return api_refuse(p, "seed", "'seed' must be an integer.");
    if (!exact_integer(&p->fields.seed, v))
        return api_refuse(p, "seed", "'seed' must fit in 64 bits, with its sign.");
    p->fields.has_seed = true;
    return ST_OK;
}

static enum status read_field(struct api_parse *p, const struct api_field *f,
                              const struct api_value *v)
{
    void *at = (char *)&p->fields + f->offset;

    switch (f->kind) {
    case FIELD_INT:
        return read_int(p, f, v, at);
    case FIELD_NUMBER:
        return read_number(p, f, v, at);
    case FIELD_SEED:
        return read_seed(p, v);
    case FIELD_BOOL:
        if (!cJSON_IsBool(v->tree))
            return api_refuse(p, f->name, "'%s' must be true or false.", f->name);
        *(bool *)at = cJSON_IsTrue(v->tree);
        return ST_OK;
    case FIELD_STRING:
        if (!cJSON_IsString(v->tree))
            return api_refuse(p, f->name, "'%s' must be a string.", f->name);
        *(struct api_value *)at = *v;
        return ST_OK;
    case FIELD_ANY:
        *(struct api_value *)at = *v;
        return ST_OK;
    case FIELD_IGNORED:
        if (!cJSON_IsString(v->tree) && !cJSON_IsObject(v->tree))
            return api_refuse(p, f->name, "'%s' must be a string or an object.", f->name);
        return ST_OK;
    }
    return ST_INVALID;
}

static enum status read_member(struct api_parse *p, const struct api_value *v)
{
    const char *name = v->tree->string;

    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++)
        if (strcmp(name, fields[i].name) == 0 && api_field_is_of(&fields[i], p->endpoint))
            return cJSON_IsNull(v->tree) ? ST_OK : read_field(p, &fields[i], v);
    const struct missing *m = find_missing(p, name);
    if (m)
        return check_missing(p, m, v->tree);
    return api_refuse(p, name, "Unrecognized request argument supplied: %.*s",
                      api_quotable_bytes(name), name);
}

static enum status check_twice(struct api_parse *p, const cJSON *root)
{
    for (const cJSON *a = root->child; a; a = a->next)
        for (const cJSON *b = a->next; b; b = b->next)
            if (strcmp(a->string, b->string) == 0)
                return api_refuse(p, a->string, "'%.*s' appears twice in the request body.",
                                  api_quotable_bytes(a->string), a->string);
    return ST_OK;
}

enum status api_read_fields(struct api_parse *p, const cJSON *root,
                            const struct json_scan *scan, const char *body)
{
    int i = 0;

    TRY(check_twice(p, root));
    for (const cJSON *child = root->child; child; child = child->next, i++) {
        const struct json_member *m = &scan->members[i];
        struct api_value v = { child, body + m->value, m->value_bytes, m->fraction };

        TRY(read_member(p, &v));
    }
    return ST_OK;
}
