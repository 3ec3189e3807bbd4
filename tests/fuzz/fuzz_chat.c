/* Bodies of chat requests and of the tokenizer's two calls.  The first byte picks the format
 * and the call; whatever comes in, the answer is a prompt that keeps every promise of api.h, a
 * valid document, or an error that makes one. */

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"
#include "engine/model/model_config.h"
#include "server/api.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_LEN = 2000, MAX_VALUES = 500, ARENA_BYTES = 64 * 1024 };

static const char *const names[] = { "tiny" };

static struct api_context *context(void)
{
    static struct model_config model;
    static struct tokenizer *tok;
    static struct api_context cx;
    struct error err;

    if (tok)
        return &cx;
    if (tokenizer_open(&tok, "tests/unit/data/tokenizer/qwen.json", &err) != ST_OK) {
        fprintf(stderr, "%s (run this in the root of the repository)\n", err.text);
        exit(1);
    }
    model.vocab = tokenizer_n_ids(tok) - 1;
    cx = (struct api_context){
        .tokenizer = tok,
        .model = &model,
        .model_names = names,
        .n_model_names = 1,
        .no_chat = "the fuzzer says so",
        .limits = { .max_model_len = MAX_LEN,
                    .max_choices = 8,
                    .max_prompts = 4,
                    .max_stops = 3,
                    .max_stop_bytes = 10,
                    .max_bias = 5,
                    .max_logprobs = 5,
                    .max_logprob_entries = 100000,
                    .max_json_values = MAX_VALUES,
                    .max_arena_bytes = ARENA_BYTES },
    };
    return &cx;
}

/* Texts of tokens may have a NUL, which is JSON but nothing that bodies may hold. */
static void check_json(const struct strbuf *text)
{
    cJSON *root = cJSON_ParseWithLength(text->data, text->n);

    ASSERT(cJSON_IsObject(root) && utf8_is_valid(text->data, text->n));
    cJSON_Delete(root);
}

static void check_error(const struct api_error *err)
{
    struct strbuf out = { 0 };

    ASSERT(err->http == 400 || err->http == 404);
    ASSERT(err->message[0] && strlen(err->message) < sizeof err->message);
    api_write_error(&out, err);
    check_json(&out);
    strbuf_fini(&out);
}

static void check_chat(const struct api_completion *c, const struct api_context *cx)
{
    const struct api_prompt *p = c->prompts;
    const struct request *t = &c->template;

    ASSERT(c->n_prompts == 1 && c->n >= 1 && c->n == c->best_of && c->n <= 8 && !c->echo);
    ASSERT(t->max_tokens >= 1 && t->min_tokens <= t->max_tokens);
    ASSERT(p->n_ids >= 1 && p->n_ids + (uint64_t)t->max_tokens <= MAX_LEN);
    ASSERT(!t->score_prompt && c->logprobs >= -1 && c->logprobs <= 5);
    for (uint32_t k = 0; k < p->n_ids; k++)
        ASSERT(p->ids[k] >= 0 && p->ids[k] < cx->model->vocab);
    ASSERT(c->n_own_stops <= t->n_stops && c->n_own_stop_ids <= t->n_stop_ids);
    ASSERT(c->chat && c->chat->format == cx->chat);
    ASSERT(!c->chat->open_thoughts || c->chat->may_think);
    for (uint32_t i = 0; i < c->chat->n_tools; i++) {
        const struct chat_tool *tool = &c->chat->tools[i];
        ASSERT(tool->name[0] && utf8_is_valid(tool->name, strlen(tool->name)));
        for (uint32_t k = 0; k < tool->n_strings; k++)
            ASSERT(utf8_is_valid(tool->strings[k], strlen(tool->strings[k])));
    }
}

static void parse(const struct api_context *cx, int call, const char *body, size_t n)
{
    struct api_error err = { 0 };
    struct strbuf out = { 0 };

    if (call == 0) {
        struct api_completion *c = api_parse_chat(body, n, cx, &err);
        if (c)
            check_chat(c, cx);
        else
            check_error(&err);
        api_completion_free(c);
        return;
    }
    enum status status = call == 1 ? api_tokenize(&out, body, n, cx, &err)
                                   : api_detokenize(&out, body, n, cx, &err);
    if (status == ST_OK)
        check_json(&out);
    else
        check_error(&err);
    strbuf_fini(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct api_context *cx = context();

    if (size == 0)
        return 0;
    /* A copy of the exact size: the bytes behind a body are nobody's. */
    char *body = mem_alloc(size);
    memcpy(body, data + 1, size - 1);
    int pick = data[0] % (3 * (CHAT_N_FORMATS - CHAT_NONE));
    cx->chat = CHAT_NONE + pick / 3;
    parse(cx, pick % 3, body, size - 1);
    mem_free(body);
    return 0;
}
