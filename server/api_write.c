#include "server/api_write.h"

#include "engine/base/invariant.h"
#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"

#include <math.h>
#include <string.h>

/* Written by hand: an answer is a chunk for every token, and a tree for each
 * would cost more than the rest of the loop's work. */

void api_put_number(struct strbuf *out, uint64_t value)
{
    char digits[20];
    size_t at = sizeof digits;

    do
        digits[--at] = (char)('0' + value % 10);
    while (value /= 10);
    strbuf_add(out, digits + at, sizeof digits - at);
}

static void put_integer(struct strbuf *out, int64_t value)
{
    if (value < 0)
        strbuf_add(out, "-", 1);
    api_put_number(out, value < 0 ? -(uint64_t)value : (uint64_t)value);
}

/* JSON has no infinity; clients of the legacy shape know this floor. */
void api_put_logprob(struct strbuf *out, float value)
{
    if (!(value > -9999.0f))
        strbuf_puts(out, "-9999.0");
    else
        strbuf_printf(out, "%.9g", isinf(value) ? 0.0 : (double)value);
}

static void add_control(struct strbuf *out, unsigned code)
{
    static const char hex[] = "0123456789abcdef";
    static const char names[] = "\b\t\n\f\r", letters[] = "btnfr";
    const char *short_name = code ? strchr(names, (int)code) : NULL;

    if (short_name) {
        const char pair[2] = { '\\', letters[short_name - names] };
        strbuf_add(out, pair, 2);
    } else {
        const char escape[6] = {
            '\\',          'u', hex[code >> 12 & 15], hex[code >> 8 & 15], hex[code >> 4 & 15],
            hex[code & 15]
        };
        strbuf_add(out, escape, 6);
    }
}

/* Line separators of Unicode are legal in JSON, but some clients split event
 * streams at them: NEL, LS and PS travel escaped. */
static unsigned line_separator(const char *s, int n)
{
    if (n == 2 && memcmp(s, "\xC2\x85", 2) == 0)
        return 0x85;
    if (n == 3 && memcmp(s, "\xE2\x80\xA8", 3) == 0)
        return 0x2028;
    if (n == 3 && memcmp(s, "\xE2\x80\xA9", 3) == 0)
        return 0x2029;
    return 0;
}

void api_write_string(struct strbuf *out, const char *s, size_t n)
{
    size_t at = 0, run = 0; /* s[run..at) is copied as it is */

    strbuf_add(out, "\"", 1);
    while (at < n) {
        unsigned char c = (unsigned char)s[at];
        if (c >= 0x20 && c < 0x80 && c != '"' && c != '\\') {
            at++;
            continue;
        }
        int length = utf8_classify(s + at, n - at);
        unsigned separator = line_separator(s + at, length);
        if (length > 1 && !separator) {
            at += (size_t)length;
            continue;
        }
        strbuf_add(out, s + run, at - run);
        if (separator)
            add_control(out, separator);
        else if (length <= 0)
            strbuf_add(out, "\xEF\xBF\xBD", 3);
        else if (c < 0x20)
            add_control(out, c);
        else
            strbuf_add(out, c == '"' ? "\\\"" : "\\\\", 2);
        at += length > 0 ? (size_t)length : length < 0 ? (size_t)-length : n - at;
        run = at;
    }
    strbuf_add(out, s + run, at - run);
    strbuf_add(out, "\"", 1);
}

void api_put_text(struct strbuf *out, const char *s)
{
    api_write_string(out, s, strlen(s));
}

/* ---- legacy logprobs */

/* How a token is written in tokens and top_logprobs: its own bytes where they
 * are text, otherwise bytes:\xe2\x80. */
static void add_token_name(struct strbuf *out, const struct tokenizer *t, int32_t id)
{
    size_t n;
    const char *bytes = tokenizer_bytes(t, id, &n);

    if (utf8_is_valid(bytes, n)) {
        strbuf_add(out, bytes, n);
        return;
    }
    strbuf_puts(out, "bytes:");
    for (size_t i = 0; i < n; i++)
        strbuf_printf(out, "\\x%02x", (unsigned char)bytes[i]);
}

void api_put_token(struct strbuf *out, const struct tokenizer *t, int32_t id,
                      struct strbuf *scratch)
{
    strbuf_clear(scratch);
    add_token_name(scratch, t, id);
    api_write_string(out, scratch->data ? scratch->data : "", scratch->n);
}

/* The chosen token and the top ones in one object.  Ids may share a name; an
 * object may not repeat one, and the better probability stands for it. */
static void add_top(struct strbuf *out, const struct tokenizer *t,
                    const struct token_logprob *chosen, const struct token_logprob *top,
                    uint32_t n_top, struct strbuf *names)
{
    enum { MAX = SAMPLE_MAX_TOP + 1 };
    size_t start[MAX + 1];
    float value[MAX];
    uint32_t n = 0;

    ASSERT(n_top <= SAMPLE_MAX_TOP);
    strbuf_clear(names);
    start[0] = 0;
    for (uint32_t i = 0; i <= n_top; i++) {
        const struct token_logprob *entry = i < n_top ? &top[i] : chosen;
        uint32_t k = 0;
        if (entry->id < 0)
            continue;
        add_token_name(names, t, entry->id);
        size_t length = names->n - start[n];
        while (k < n && (start[k + 1] - start[k] != length ||
                         (length &&
                          memcmp(names->data + start[k], names->data + start[n], length) != 0)))
            k++;
        if (k == n) {
            value[n] = entry->logprob;
            start[++n] = names->n;
        } else {
            value[k] = entry->logprob > value[k] ? entry->logprob : value[k];
            names->n = start[n];
        }
    }
    strbuf_puts(out, "{");
    for (uint32_t k = 0; k < n; k++) {
        strbuf_puts(out, k ? "," : "");
        api_write_string(out, names->data ? names->data + start[k] : "",
                         start[k + 1] - start[k]);
        strbuf_puts(out, ":");
        api_put_logprob(out, value[k]);
    }
    strbuf_puts(out, "}");
}

static void add_logprobs(struct strbuf *out, const struct tokenizer *t,
                         const struct api_piece *p, struct strbuf *scratch)
{
    strbuf_puts(out, "{\"text_offset\":[");
    for (uint32_t i = 0; i < p->n_tokens; i++) {
        strbuf_puts(out, i ? "," : "");
        api_put_number(out, p->offsets[i]);
    }
    strbuf_puts(out, "],\"token_logprobs\":[");
    for (uint32_t i = 0; i < p->n_tokens; i++) {
        strbuf_puts(out, i ? "," : "");
        if (p->chosen[i].id < 0)
            strbuf_puts(out, "null");
        else
            api_put_logprob(out, p->chosen[i].logprob);
    }
    strbuf_puts(out, "],\"tokens\":[");
    for (uint32_t i = 0; i < p->n_tokens; i++) {
        strbuf_puts(out, i ? "," : "");
        api_put_token(out, t, p->ids[i], scratch);
    }
    strbuf_puts(out, "],\"top_logprobs\":[");
    for (uint32_t i = 0; i < p->n_tokens; i++) {
        uint32_t n_top = p->top ? p->n_top : 0;
        strbuf_puts(out, i ? "," : "");
        if (p->chosen[i].id < 0)
            strbuf_puts(out, "null");
        else
            add_top(out, t, &p->chosen[i], n_top ? p->top + (size_t)i * n_top : NULL, n_top,
                    scratch);
    }
    strbuf_puts(out, "]}");
}

/* ---- documents */

void api_put_finish(struct strbuf *out, const struct api_piece *p)
{
    strbuf_puts(out, ",\"finish_reason\":");
    if (!p->finish_reason) {
        strbuf_puts(out, "null");
        return;
    }
    api_put_text(out, p->finish_reason);
    strbuf_puts(out, ",\"stop_reason\":");
    if (p->stop_string)
        api_put_text(out, p->stop_string);
    else if (p->stop_id >= 0)
        api_put_number(out, (uint64_t)p->stop_id);
    else
        strbuf_puts(out, "null");
}

static void add_choice(struct strbuf *out, const struct tokenizer *t, const struct api_piece *p,
                       struct strbuf *scratch)
{
    strbuf_puts(out, "{\"index\":");
    api_put_number(out, p->index);
    strbuf_puts(out, ",\"text\":");
    api_write_string(out, p->text_bytes ? p->text : "", p->text_bytes);
    strbuf_puts(out, ",\"logprobs\":");
    if (p->logprobs)
        add_logprobs(out, t, p, scratch);
    else
        strbuf_puts(out, "null");
    api_put_finish(out, p);
    strbuf_puts(out, "}");
}

static void put_usage(struct strbuf *out, const struct api_usage *u)
{
    strbuf_puts(out, "{\"prompt_tokens\":");
    api_put_number(out, u->prompt_tokens);
    strbuf_puts(out, ",\"completion_tokens\":");
    api_put_number(out, u->completion_tokens);
    strbuf_puts(out, ",\"total_tokens\":");
    api_put_number(out, u->prompt_tokens + u->completion_tokens);
    strbuf_puts(out, ",\"prompt_tokens_details\":{\"cached_tokens\":");
    api_put_number(out, u->cached_tokens);
    if (u->chat) {
        strbuf_puts(out, "},\"completion_tokens_details\":{\"reasoning_tokens\":");
        api_put_number(out, u->reasoning_tokens);
    }
    strbuf_puts(out, "}}");
}

void api_put_head(struct strbuf *out, const struct api_head *head, const char *object)
{
    strbuf_puts(out, "{\"id\":");
    api_put_text(out, head->id);
    strbuf_puts(out, ",\"object\":");
    api_put_text(out, object);
    strbuf_puts(out, ",\"created\":");
    put_integer(out, head->created);
    strbuf_puts(out, ",\"model\":");
    api_put_text(out, head->model);
    strbuf_puts(out, ",\"choices\":[");
}

void api_put_tail(struct strbuf *out, const struct api_usage *usage, bool usage_null)
{
    strbuf_puts(out, "]");
    if (usage || usage_null)
        strbuf_puts(out, ",\"usage\":");
    if (usage)
        put_usage(out, usage);
    else if (usage_null)
        strbuf_puts(out, "null");
    strbuf_puts(out, "}");
}

void api_write_completion(struct strbuf *out, const struct api_head *head,
                          const struct tokenizer *t, const struct api_piece *pieces,
                          uint32_t n_pieces, const struct api_usage *usage, bool usage_null)
{
    struct strbuf scratch = { 0 };

    api_put_head(out, head, "text_completion");
    for (uint32_t i = 0; i < n_pieces; i++) {
        strbuf_puts(out, i ? "," : "");
        add_choice(out, t, &pieces[i], &scratch);
    }
    api_put_tail(out, usage, usage_null);
    strbuf_fini(&scratch);
}

static void add_text_or_null(struct strbuf *out, const char *s)
{
    if (s && s[0])
        api_put_text(out, s);
    else
        strbuf_puts(out, "null");
}

void api_write_error(struct strbuf *out, const struct api_error *err)
{
    strbuf_puts(out, "{\"error\":{\"message\":");
    api_put_text(out, err->message);
    strbuf_puts(out, ",\"type\":");
    add_text_or_null(out, err->type);
    strbuf_puts(out, ",\"param\":");
    add_text_or_null(out, err->param);
    strbuf_puts(out, ",\"code\":");
    add_text_or_null(out, err->code);
    strbuf_puts(out, "}}");
}

static void add_model(struct strbuf *out, const char *name, const char *root, int64_t created,
                      uint32_t max_model_len)
{
    strbuf_puts(out, "{\"id\":");
    api_put_text(out, name);
    strbuf_puts(out, ",\"object\":\"model\",\"created\":");
    put_integer(out, created);
    strbuf_puts(out, ",\"owned_by\":\"asynctlsd\",\"root\":");
    api_put_text(out, root);
    strbuf_puts(out, ",\"parent\":null,\"max_model_len\":");
    api_put_number(out, max_model_len);
    strbuf_puts(out, "}");
}

void api_write_models(struct strbuf *out, const char *const *names, int n_names,
                      int64_t created, uint32_t max_model_len, bool one)
{
    ASSERT(n_names > 0);
    if (one) {
        add_model(out, names[0], names[0], created, max_model_len);
        return;
    }
    strbuf_puts(out, "{\"object\":\"list\",\"data\":[");
    for (int i = 0; i < n_names; i++) {
        strbuf_puts(out, i ? "," : "");
        add_model(out, names[i], names[0], created, max_model_len);
    }
    strbuf_puts(out, "]}");
}
