#include "server/api_parse.h"

#include "engine/base/mem.h"
#include "engine/base/utf8.h"
#include "server/api_write.h"

#include <string.h>

/* An answer has no more values than a body may have. */
static enum status refuse_size(struct api_parse *p, const char *param)
{
    return api_refuse(p, param, "The text has more than %zu tokens, the limit of an answer.",
                      p->cx->limits.max_json_values);
}

/* What only says how a conversation is written. */
static enum status refuse_chat_fields(struct api_parse *p)
{
    const struct api_fields *f = &p->fields;
    const char *name = f->messages.tree          ? "messages"
                       : f->tools.tree           ? "tools"
                       : f->template_kwargs.tree ? "chat_template_kwargs"
                       : f->enable_thinking.tree ? "enable_thinking"
                                                 : NULL;

    return name ? api_refuse(p, name, "'prompt' and '%s' exclude each other.", name) : ST_OK;
}

static enum status encode(struct api_parse *p, struct token_list *list)
{
    const cJSON *prompt = p->fields.prompt.tree;
    size_t limit = p->cx->limits.max_json_values;
    int flags = p->fields.add_special ? TOKENIZE_ADD_SPECIAL : 0;

    if (prompt)
        TRY(refuse_chat_fields(p));
    if (p->fields.messages.tree)
        return api_read_conversation(p, list, limit);
    if (!cJSON_IsString(prompt))
        return api_refuse(p, "prompt", "You must provide 'prompt', a string, or 'messages'.");
    const char *text = prompt->valuestring;
    return tokenizer_encode(p->cx->tokenizer, list, text, strlen(text), flags, limit) == ST_OK
               ? ST_OK
               : refuse_size(p, "prompt");
}

static void write_tokens(struct strbuf *out, const struct api_parse *p,
                         const struct token_list *list)
{
    struct strbuf scratch = { 0 };

    strbuf_puts(out, "{\"count\":");
    api_put_number(out, list->n);
    strbuf_puts(out, ",\"max_model_len\":");
    api_put_number(out, p->cx->limits.max_model_len);
    strbuf_puts(out, ",\"tokens\":[");
    for (size_t i = 0; i < list->n; i++) {
        strbuf_puts(out, i ? "," : "");
        api_put_number(out, (uint64_t)list->ids[i]);
    }
    strbuf_puts(out,
                p->fields.return_strings ? "],\"token_strs\":[" : "],\"token_strs\":null}");
    for (size_t i = 0; p->fields.return_strings && i < list->n; i++) {
        strbuf_puts(out, i ? "," : "");
        api_put_token(out, p->cx->tokenizer, list->ids[i], &scratch);
    }
    strbuf_puts(out, p->fields.return_strings ? "]}" : "");
    strbuf_fini(&scratch);
}

enum status api_tokenize(struct strbuf *out, const char *body, size_t n,
                         const struct api_context *cx, struct api_error *err)
{
    struct token_list list = { 0 };
    struct api_parse p;
    cJSON *root;

    api_parse_init(&p, API_TOKENIZE, cx, err);
    enum status status = api_read_body(&p, &root, body, n);
    if (status == ST_OK)
        status = encode(&p, &list);
    if (status == ST_OK)
        write_tokens(out, &p, &list);
    token_list_fini(&list);
    cJSON_Delete(root);
    api_completion_free(p.out);
    return status;
}

/* Special tokens are written as they are spelled, as in an echo. */
static enum status decode(struct api_parse *p, struct strbuf *text)
{
    const struct api_value *v = &p->fields.tokens;
    struct detokenizer d;
    size_t i = 0;
    int32_t id;

    if (!cJSON_IsArray(v->tree) || v->fraction)
        return api_refuse(p, "tokens", "You must provide 'tokens', a list of token ids.");
    detokenizer_init(&d, p->cx->tokenizer, false);
    for (const cJSON *item = v->tree->child; item; item = item->next, i++) {
        TRY(api_read_id(p, "tokens", item, i, &id));
        if (text->n > p->cx->limits.max_arena_bytes)
            return api_refuse(p, "tokens", "The text of the tokens is longer than %zu bytes.",
                              p->cx->limits.max_arena_bytes);
        text->n += detokenizer_push(&d, id, strbuf_room(text, detokenizer_max_bytes(&d, id)));
    }
    text->n += detokenizer_flush(&d, strbuf_room(text, 4));
    return ST_OK;
}

enum status api_detokenize(struct strbuf *out, const char *body, size_t n,
                           const struct api_context *cx, struct api_error *err)
{
    struct strbuf text = { 0 };
    struct api_parse p;
    cJSON *root;

    api_parse_init(&p, API_DETOKENIZE, cx, err);
    enum status status = api_read_body(&p, &root, body, n);
    if (status == ST_OK)
        status = decode(&p, &text);
    if (status == ST_OK) {
        strbuf_puts(out, "{\"prompt\":");
        api_write_string(out, text.data, text.n);
        strbuf_puts(out, "}");
    }
    strbuf_fini(&text);
    cJSON_Delete(root);
    api_completion_free(p.out);
    return status;
}
