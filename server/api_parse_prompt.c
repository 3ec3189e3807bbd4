#include "server/api_parse.h"

#include "engine/base/strbuf.h"
#include "engine/model/model_config.h"

#include <stdio.h>
#include <string.h>

enum { WHERE_BYTES = 48 };

/* Which prompt, for sentences. */
static const char *where(char out[WHERE_BYTES], const struct api_parse *p, uint32_t i)
{
    if (p->out->n_prompts == 1)
        snprintf(out, WHERE_BYTES, "'prompt'");
    else
        snprintf(out, WHERE_BYTES, "'prompt', entry %u,", i);
    return out;
}

/* What the prompt is made of. */
static const char *field_of(const struct api_parse *p)
{
    return p->endpoint == API_CHAT ? "messages" : "prompt";
}

/* exact: n_prompt is all there is; otherwise counting stopped there. */
enum status api_refuse_length(struct api_parse *p, uint64_t n_prompt, bool exact)
{
    uint64_t n_completion = (uint64_t)p->fields.max_tokens;
    uint32_t limit = p->cx->limits.max_model_len;
    const char *least = exact ? "" : "at least ";
    enum status status =
        api_refuse(p, n_prompt > limit ? field_of(p) : "max_tokens",
                   "This model's maximum context length is %u tokens. However, you requested "
                   "%s%llu tokens (%s%llu in the %s, %llu in the completion).",
                   limit, least, (unsigned long long)(n_prompt + n_completion), least,
                   (unsigned long long)n_prompt, field_of(p), (unsigned long long)n_completion);

    p->err->code = "context_length_exceeded";
    return status;
}

static enum status check_length(struct api_parse *p, uint64_t n_prompt)
{
    uint64_t n_completion = (uint64_t)p->fields.max_tokens;

    return n_prompt + n_completion > p->cx->limits.max_model_len
               ? api_refuse_length(p, n_prompt, true)
               : ST_OK;
}

enum status api_read_id(struct api_parse *p, const char *param, const cJSON *v, size_t i,
                        int32_t *out)
{
    int vocab = p->cx->model->vocab;

    if (!cJSON_IsNumber(v))
        return api_refuse(p, param,
                          "'%s' must be made of token ids, but entry %zu is not an "
                          "integer.",
                          param, i);
    if (v->valuedouble < 0 || v->valuedouble >= vocab)
        return api_refuse(p, param,
                          "'%s' has the token id %.10g at entry %zu; ids are between 0 "
                          "and %d.",
                          param, v->valuedouble, i, vocab - 1);
    *out = (int32_t)v->valuedouble;
    return ST_OK;
}

/* Echo gives the prompt back as text, special tokens included. */
static enum status write_text(struct api_parse *p, struct api_prompt *prompt)
{
    struct detokenizer d;
    struct strbuf text = { 0 };

    detokenizer_init(&d, p->cx->tokenizer, false);
    for (uint32_t i = 0; i < prompt->n_ids; i++) {
        char *at = strbuf_room(&text, detokenizer_max_bytes(&d, prompt->ids[i]));
        text.n += detokenizer_push(&d, prompt->ids[i], at);
    }
    text.n += detokenizer_flush(&d, strbuf_room(&text, 4));
    void *copy;
    enum status status = api_alloc(p, &copy, text.n + 1, 1);
    if (status == ST_OK) {
        memcpy(copy, text.data, text.n);
        prompt->text = copy;
        prompt->text_bytes = text.n;
    }
    strbuf_fini(&text);
    return status;
}

static enum status read_ids(struct api_parse *p, const cJSON *list, struct api_prompt *prompt)
{
    size_t n = 0, i = 0;
    void *ids;

    for (const cJSON *v = list->child; v; v = v->next)
        n++;
    TRY(check_length(p, n));
    TRY(api_alloc(p, &ids, n, sizeof(int32_t)));
    for (const cJSON *v = list->child; v; v = v->next, i++)
        TRY(api_read_id(p, "prompt", v, i, (int32_t *)ids + i));
    prompt->ids = ids;
    prompt->n_ids = (uint32_t)n;
    return p->fields.echo ? write_text(p, prompt) : ST_OK;
}

/* A tokenizer file and a model may disagree; no text may name a row that is not there. */
static enum status check_rows(struct api_parse *p, const struct token_list *list)
{
    for (size_t i = 0; i < list->n; i++)
        if (list->ids[i] >= p->cx->model->vocab)
            return api_refuse(p, field_of(p),
                              "'%s' has the token %d, which the model does not know.",
                              field_of(p), list->ids[i]);
    return ST_OK;
}

enum status api_keep_ids(struct api_parse *p, const struct token_list *list, uint32_t i)
{
    struct api_prompt *prompt = &p->out->prompts[i];
    char name[WHERE_BYTES];
    void *ids;

    if (list->n == 0)
        return api_refuse(p, "prompt", "%s is empty: it has no tokens.", where(name, p, i));
    TRY(check_length(p, list->n));
    TRY(check_rows(p, list));
    TRY(api_alloc(p, &ids, list->n, sizeof(int32_t)));
    memcpy(ids, list->ids, list->n * sizeof(int32_t));
    prompt->ids = ids;
    prompt->n_ids = (uint32_t)list->n;
    return ST_OK;
}

static enum status read_text(struct api_parse *p, const char *text, uint32_t i)
{
    struct api_prompt *prompt = &p->out->prompts[i];
    struct token_list list = { 0 };
    size_t n = strlen(text), limit = p->cx->limits.max_model_len;
    int flags = p->fields.add_special ? TOKENIZE_ADD_SPECIAL : 0;
    enum status status;

    /* Counting ends at the limit: a body of megabytes costs no more than a context. */
    if (tokenizer_encode(p->cx->tokenizer, &list, text, n, flags, limit) == ST_OK)
        status = api_keep_ids(p, &list, i);
    else
        status = api_refuse_length(p, limit + 1, false);
    token_list_fini(&list);
    if (status == ST_OK && p->fields.echo) {
        void *copy;
        TRY(api_alloc(p, &copy, n + 1, 1));
        memcpy(copy, text, n);
        prompt->text = copy;
        prompt->text_bytes = n;
    }
    return status;
}

static enum status read_one(struct api_parse *p, const cJSON *v, uint32_t i)
{
    char name[WHERE_BYTES];

    if (cJSON_IsString(v))
        return read_text(p, v->valuestring, i);
    if (!v->child)
        return api_refuse(p, "prompt", "%s is empty: it has no tokens.", where(name, p, i));
    return read_ids(p, v, &p->out->prompts[i]);
}

/* A list of strings or of lists, all of one kind. */
static enum status count_prompts(struct api_parse *p, const cJSON *list, uint32_t *n)
{
    const cJSON *first = list->child;

    if (!cJSON_IsArray(list) || (!cJSON_IsString(first) && !cJSON_IsArray(first)))
        return api_refuse(p, "prompt",
                          "'prompt' must be a string, a list of strings, a list of "
                          "token ids, or a list of lists of token ids.");
    *n = 0;
    for (const cJSON *v = first; v; v = v->next) {
        if ((v->type & 0xFF) != (first->type & 0xFF))
            return api_refuse(p, "prompt",
                              "'prompt' mixes kinds: entry %u is not %s as the first "
                              "is.",
                              *n, cJSON_IsString(first) ? "a string" : "a list");
        if (++*n > p->cx->limits.max_prompts)
            return api_refuse(p, "prompt", "'prompt' has more than %u prompts.",
                              p->cx->limits.max_prompts);
    }
    return ST_OK;
}

enum status api_check_choices(struct api_parse *p, uint32_t n_prompts)
{
    const struct api_fields *f = &p->fields;
    uint64_t choices = (uint64_t)n_prompts * (uint64_t)f->best_of;

    if (choices <= p->cx->limits.max_choices)
        return ST_OK;
    return api_refuse(
        p,
        f->best_of == 1     ? "prompt"
        : f->best_of > f->n ? "best_of"
                            : "n",
        "The request asks for %llu choices (%u prompts, %lld each); the limit is %u.",
        (unsigned long long)choices, n_prompts, (long long)f->best_of,
        p->cx->limits.max_choices);
}

enum status api_read_prompts(struct api_parse *p)
{
    const struct api_value *v = &p->fields.prompt;
    const cJSON *list = v->tree;
    uint32_t n = 1;
    void *prompts;

    if (!list)
        return api_refuse(p, "prompt", "You must provide a 'prompt'.");
    if (cJSON_IsArray(list) && !list->child)
        return api_refuse(p, "prompt", "'prompt' is an empty list.");
    bool one = cJSON_IsString(list) || (cJSON_IsArray(list) && cJSON_IsNumber(list->child));
    if (!one)
        TRY(count_prompts(p, list, &n));
    if (v->fraction)
        return api_refuse(p, "prompt", "'prompt' has a token id that is not an integer.");
    TRY(api_check_choices(p, n));
    TRY(api_alloc(p, &prompts, n, sizeof(struct api_prompt)));
    p->out->prompts = prompts;
    p->out->n_prompts = n;
    if (one)
        return read_one(p, list, 0);
    const cJSON *item = list->child;
    for (uint32_t i = 0; i < n; i++, item = item->next)
        TRY(read_one(p, item, i));
    return ST_OK;
}
