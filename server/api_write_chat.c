#include "server/api_write.h"

/* ---- logprobs */

static void put_bytes(struct strbuf *out, const struct tokenizer *t, int32_t id)
{
    size_t n;
    const char *bytes = tokenizer_bytes(t, id, &n);

    strbuf_puts(out, ",\"bytes\":[");
    for (size_t i = 0; i < n; i++) {
        strbuf_puts(out, i ? "," : "");
        api_put_number(out, (unsigned char)bytes[i]);
    }
    strbuf_puts(out, "]");
}

/* Without its closing brace. */
static void put_entry(struct strbuf *out, const struct tokenizer *t,
                      const struct token_logprob *entry, struct strbuf *scratch)
{
    strbuf_puts(out, "{\"token\":");
    api_put_token(out, t, entry->id, scratch);
    strbuf_puts(out, ",\"logprob\":");
    api_put_logprob(out, entry->logprob);
    put_bytes(out, t, entry->id);
}

static void put_logprobs(struct strbuf *out, const struct tokenizer *t,
                         const struct api_piece *p)
{
    struct strbuf scratch = { 0 };

    if (!p->logprobs || p->n_tokens == 0) {
        strbuf_puts(out, "null");
        return;
    }
    strbuf_puts(out, "{\"content\":[");
    for (uint32_t i = 0; i < p->n_tokens; i++) {
        strbuf_puts(out, i ? "," : "");
        put_entry(out, t, &p->chosen[i], &scratch);
        strbuf_puts(out, ",\"top_logprobs\":[");
        const struct token_logprob *top = p->n_top ? p->top + (size_t)i * p->n_top : NULL;
        for (uint32_t k = 0; k < p->n_top && top[k].id >= 0; k++) {
            strbuf_puts(out, k ? "," : "");
            put_entry(out, t, &top[k], &scratch);
            strbuf_puts(out, "}");
        }
        strbuf_puts(out, "]}");
    }
    strbuf_puts(out, "],\"refusal\":null}");
    strbuf_fini(&scratch);
}

/* ---- chunks */

static void put_delta(struct strbuf *out, const struct api_piece *p)
{
    if (p->role) {
        strbuf_puts(out, "{\"role\":\"assistant\",\"content\":\"\"}");
        return;
    }
    if (p->text_bytes == 0) {
        strbuf_puts(out, "{}");
        return;
    }
    if (p->part == CHAT_REASONING || p->part == CHAT_CONTENT) {
        strbuf_puts(out,
                    p->part == CHAT_REASONING ? "{\"reasoning_content\":" : "{\"content\":");
        api_write_string(out, p->text, p->text_bytes);
        strbuf_puts(out, "}");
        return;
    }
    strbuf_puts(out, "{\"tool_calls\":[{\"index\":");
    api_put_number(out, p->call);
    if (p->part == CHAT_CALL) {
        strbuf_puts(out, ",\"id\":");
        api_put_text(out, p->call_id);
        strbuf_puts(out, ",\"type\":\"function\",\"function\":{\"name\":");
        api_write_string(out, p->text, p->text_bytes);
        strbuf_puts(out, ",\"arguments\":\"\"");
    } else {
        strbuf_puts(out, ",\"function\":{\"arguments\":");
        api_write_string(out, p->text, p->text_bytes);
    }
    strbuf_puts(out, "}}]}");
}

void api_write_chat_chunk(struct strbuf *out, const struct api_head *head,
                          const struct tokenizer *t, const struct api_piece *piece,
                          const struct api_usage *usage, bool usage_null)
{
    api_put_head(out, head, "chat.completion.chunk");
    if (piece) {
        strbuf_puts(out, "{\"index\":");
        api_put_number(out, piece->index);
        strbuf_puts(out, ",\"delta\":");
        put_delta(out, piece);
        strbuf_puts(out, ",\"logprobs\":");
        put_logprobs(out, t, piece);
        api_put_finish(out, piece);
        strbuf_puts(out, "}");
    }
    api_put_tail(out, usage, usage_null);
}

/* ---- whole answers */

static void put_string(struct strbuf *out, const struct strbuf *s)
{
    api_write_string(out, s->data ? s->data : "", s->n);
}

static void put_message(struct strbuf *out, const struct api_message *m)
{
    strbuf_puts(out, "{\"role\":\"assistant\",\"content\":");
    if (m->n_calls > 0 && m->content.n == 0)
        strbuf_puts(out, "null");
    else
        put_string(out, &m->content);
    strbuf_puts(out, ",\"refusal\":null");
    if (m->reasoning.n > 0) {
        strbuf_puts(out, ",\"reasoning_content\":");
        put_string(out, &m->reasoning);
    }
    for (uint32_t i = 0; i < m->n_calls; i++) {
        strbuf_puts(out, i ? "," : ",\"tool_calls\":[");
        strbuf_puts(out, "{\"id\":");
        api_put_text(out, m->calls[i].id);
        strbuf_puts(out, ",\"type\":\"function\",\"function\":{\"name\":");
        put_string(out, &m->calls[i].name);
        strbuf_puts(out, ",\"arguments\":");
        put_string(out, &m->calls[i].arguments);
        strbuf_puts(out, i + 1 < m->n_calls ? "}}" : "}}]");
    }
    strbuf_puts(out, "}");
}

void api_write_chat(struct strbuf *out, const struct api_head *head, const struct tokenizer *t,
                    const struct api_piece *pieces, uint32_t n_pieces,
                    const struct api_usage *usage)
{
    api_put_head(out, head, "chat.completion");
    for (uint32_t i = 0; i < n_pieces; i++) {
        strbuf_puts(out, i ? "," : "");
        strbuf_puts(out, "{\"index\":");
        api_put_number(out, pieces[i].index);
        strbuf_puts(out, ",\"message\":");
        put_message(out, pieces[i].message);
        strbuf_puts(out, ",\"logprobs\":");
        put_logprobs(out, t, &pieces[i]);
        api_put_finish(out, &pieces[i]);
        strbuf_puts(out, "}");
    }
    api_put_tail(out, usage, false);
}
