/* Request bodies.  Whatever comes in, the answer is either a completion that
 * keeps every promise of api.h, or an error that makes a valid document. */

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"
#include "engine/model/model_config.h"
#include "server/api.h"
#include "server/json_scan.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_LEN = 200, MAX_VALUES = 500, ARENA_BYTES = 16 * 1024 };

static const char *const names[] = { "tiny", "alias" };

static const struct api_context *context(void)
{
    static struct model_config model;
    static struct tokenizer *tok;
    static struct api_context cx;
    struct error err;

    if (tok)
        return &cx;
    if (tokenizer_open(&tok, "tests/unit/data/tokenizer/llama.json", &err) != ST_OK) {
        fprintf(stderr, "%s (run this in the root of the repository)\n", err.text);
        exit(1);
    }
    model.vocab = tokenizer_n_ids(tok) - 1;
    cx = (struct api_context){
        .tokenizer = tok, .model = &model, .model_names = names, .n_model_names = 2,
        .limits = { .max_model_len = MAX_LEN, .max_choices = 8, .max_prompts = 4, .max_stops = 3,
                    .max_stop_bytes = 10, .max_bias = 5, .max_logprobs = 5,
                    .max_logprob_entries = 1000, .max_json_values = MAX_VALUES,
                    .max_arena_bytes = ARENA_BYTES },
    };
    return &cx;
}

static void check_floats(const struct request *t)
{
    ASSERT(t->temperature >= 0 && t->temperature <= 2);
    ASSERT(t->top_p > 0 && t->top_p <= 1 && t->min_p >= 0 && t->min_p <= 1);
    ASSERT(fabsf(t->presence) <= 2 && fabsf(t->frequency) <= 2);
    ASSERT(t->repetition > 0 && t->repetition <= 10 && t->top_k >= 0);
}

static void check_request(const struct api_completion *c, const struct api_context *cx)
{
    const struct request *t = &c->template;
    int vocab = cx->model->vocab;

    check_floats(t);
    ASSERT(t->max_tokens >= 1 || (t->score_prompt && c->echo));
    ASSERT(t->min_tokens <= t->max_tokens);
    ASSERT(t->n_top >= -1 && t->n_top <= 5 && (!t->score_prompt || t->n_top >= 0));
    ASSERT(c->logprobs >= -1 && c->logprobs <= t->n_top);
    ASSERT(t->n_bias <= 5 && t->n_stops <= 3 && t->n_stop_ids <= 3);
    for (uint32_t i = 0; i < t->n_bias; i++) {
        ASSERT(t->bias[i].id >= 0 && t->bias[i].id < vocab && fabsf(t->bias[i].bias) <= 100);
        ASSERT(i == 0 || t->bias[i - 1].id < t->bias[i].id);
    }
    for (uint32_t i = 0; i < t->n_stop_ids; i++)
        ASSERT(t->stop_ids[i] >= 0 && t->stop_ids[i] < vocab);
    for (uint32_t i = 0; i < t->n_stops; i++) {
        size_t n = strlen(t->stops[i]);
        ASSERT(n >= 1 && n <= 10 && utf8_is_valid(t->stops[i], n));
    }
}

static void check_completion(const struct api_completion *c, const struct api_context *cx)
{
    ASSERT(c->n_prompts >= 1 && c->n_prompts <= 4);
    ASSERT(c->n >= 1 && c->best_of >= c->n && c->n_prompts * c->best_of <= 8);
    ASSERT(!c->stream || c->best_of == c->n);
    ASSERT(!c->include_usage || c->stream);
    ASSERT(strcmp(c->model, names[0]) == 0 || strcmp(c->model, names[1]) == 0);
    ASSERT(arena_used_bytes(c->arena) <= ARENA_BYTES + 16);
    check_request(c, cx);
    for (uint32_t i = 0; i < c->n_prompts; i++) {
        const struct api_prompt *p = &c->prompts[i];
        ASSERT(p->n_ids >= 1 && p->n_ids + (uint64_t)c->template.max_tokens <= MAX_LEN);
        for (uint32_t k = 0; k < p->n_ids; k++)
            ASSERT(p->ids[k] >= 0 && p->ids[k] < cx->model->vocab);
        ASSERT((p->text != NULL) == c->echo);
        ASSERT(!p->text || utf8_is_valid(p->text, p->text_bytes));
    }
}

static void check_error(const struct api_error *err)
{
    struct strbuf out = { 0 };
    struct json_scan scan;

    ASSERT(err->http == 400 || err->http == 404);
    ASSERT(err->message[0] && strlen(err->message) < sizeof err->message);
    api_write_error(&out, err);
    ASSERT(json_scan(&scan, out.data, out.n, 100, NULL) == ST_OK);
    strbuf_fini(&out);
}

/* What the scan lets through, cJSON reads, with the same members. */
static void check_scan(const char *text, size_t n)
{
    struct json_scan scan;

    if (json_scan(&scan, text, n, MAX_VALUES, NULL) != ST_OK)
        return;
    cJSON *root = cJSON_ParseWithLength(text, n);
    ASSERT(root && scan.object == cJSON_IsObject(root));
    if (scan.object)
        ASSERT(cJSON_GetArraySize(root) == scan.n_members);
    for (int i = 0; i < scan.n_members; i++) {
        const struct json_member *m = &scan.members[i];
        ASSERT(m->value_bytes > 0 && m->value + m->value_bytes <= n);
        cJSON *value = cJSON_ParseWithLength(text + m->value, m->value_bytes);
        ASSERT(cJSON_Compare(value, cJSON_GetArrayItem(root, i), true) ||
               (cJSON_IsNumber(value) && !isfinite(value->valuedouble)) ||
               cJSON_IsObject(value) || cJSON_IsArray(value));
        cJSON_Delete(value);
    }
    cJSON_Delete(root);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const struct api_context *cx = context();
    struct api_error err = { 0 };
    /* A copy of the exact size: the bytes behind a body are nobody's. */
    char *body = mem_alloc(size);

    memcpy(body, data, size);
    check_scan(body, size);
    struct api_completion *c = api_parse_completion(body, size, cx, &err);
    if (c)
        check_completion(c, cx);
    else
        check_error(&err);
    api_completion_free(c);
    mem_free(body);
    return 0;
}
