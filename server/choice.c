#include "server/choice.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/base/utf8.h"
#include "engine/model/model_config.h"
#include "server/request_head.h"

#include <string.h>

static size_t min_size(size_t a, size_t b)
{
    return a < b ? a : b;
}

static size_t max_size(size_t a, size_t b)
{
    return a > b ? a : b;
}

static void alloc_output(struct request *r)
{
    size_t n_top = r->n_top > 0 ? (size_t)r->n_top : 0;

    r->output = mem_calloc(max_size(r->max_tokens, 1), sizeof *r->output);
    if (r->n_top >= 0)
        r->chosen = mem_calloc(max_size(r->max_tokens, 1), sizeof *r->chosen);
    if (n_top)
        r->top = mem_calloc(max_size(r->max_tokens, 1) * n_top, sizeof *r->top);
    if (!r->score_prompt)
        return;
    /* The first prompt token has no probability; -1 is written as null. */
    r->prompt_chosen = mem_calloc(r->n_prompt, sizeof *r->prompt_chosen);
    r->prompt_chosen[0].id = -1;
    if (n_top) {
        r->prompt_top = mem_calloc((size_t)r->n_prompt * n_top, sizeof *r->prompt_top);
        for (size_t i = 0; i < n_top; i++)
            r->prompt_top[i].id = -1;
    }
}

/* Where a token's text begins that was decoded at byte `at`, n bytes.  Bytes
 * that wait for the rest of a character come out with a later token; in front
 * of one that is whole by itself they are not its text. */
static size_t start_of(const struct tokenizer *t, int32_t id, size_t at, size_t n)
{
    size_t own;
    const char *bytes = tokenizer_bytes(t, id, &own);

    return n > own && utf8_is_valid(bytes, own) ? at + n - own : at;
}

/* Where the text of each prompt token begins.  A bos that the tokenizer put
 * in front is not in the text. */
static void locate_prompt(struct choice *c, const struct api_prompt *prompt)
{
    struct detokenizer d;
    struct strbuf piece = { 0 };
    size_t at = 0, n_first;
    const char *first = tokenizer_bytes(c->tokenizer, prompt->ids[0], &n_first);
    bool hidden = tokenizer_is_special(c->tokenizer, prompt->ids[0]) &&
                  (n_first > prompt->text_bytes || memcmp(prompt->text, first, n_first) != 0);

    detokenizer_init(&d, c->tokenizer, false);
    for (uint32_t i = 0; i < prompt->n_ids; i++) {
        int32_t id = prompt->ids[i];
        size_t n = detokenizer_push(&d, id, strbuf_room(&piece, detokenizer_max_bytes(&d, id)));
        c->starts[i] = min_size(start_of(c->tokenizer, id, at, n), c->echo_bytes);
        at += i == 0 && hidden ? 0 : n;
    }
    strbuf_fini(&piece);
}

void choice_init(struct choice *c, const struct api_completion *from, uint32_t prompt,
                 uint32_t index, const struct tokenizer *t, const struct model_config *model)
{
    const struct api_prompt *p = &from->prompts[prompt];
    struct request *r = &c->req;

    *c = (struct choice){ .req = from->template, .tokenizer = t, .model = model,
                          .index = index, .home = true, .logprobs = from->logprobs >= 0,
                          .n_own_stops = from->n_own_stops,
                          .n_own_stop_ids = from->n_own_stop_ids };
    r->prompt = p->ids;
    r->n_prompt = p->n_ids;
    r->stopped_by_id = r->stopped_by_string = -1;
    if (from->best_of > from->n && r->n_top < 0)
        r->n_top = 0;
    alloc_output(r);
    detokenizer_init(&c->detok, t, r->skip_special);
    if (from->echo) {
        strbuf_add(&c->text, p->text, p->text_bytes);
        c->echo_bytes = p->text_bytes;
        c->n_echo = c->logprobs && r->score_prompt ? p->n_ids : 0;
    }
    c->newest_start = c->echo_bytes;
    if (from->chat) {
        c->chat = true;
        chat_output_init(&c->output, from->chat);
    }
    if (c->logprobs || (c->chat && from->chat->may_think))
        c->starts = mem_calloc((size_t)c->n_echo + r->max_tokens + 1, sizeof *c->starts);
    if (c->logprobs)
        c->offsets = mem_calloc((size_t)c->n_echo + r->max_tokens + 1, sizeof *c->offsets);
    if (c->n_echo)
        locate_prompt(c, p);
}

static void fini_message(struct api_message *m)
{
    strbuf_fini(&m->content);
    strbuf_fini(&m->reasoning);
    for (uint32_t i = 0; i < m->n_calls; i++) {
        strbuf_fini(&m->calls[i].name);
        strbuf_fini(&m->calls[i].arguments);
    }
    mem_free(m->calls);
}

void choice_fini(struct choice *c)
{
    mem_free(c->req.output);
    mem_free(c->req.chosen);
    mem_free(c->req.top);
    mem_free(c->req.prompt_chosen);
    mem_free(c->req.prompt_top);
    mem_free(c->starts);
    mem_free(c->offsets);
    mem_free(c->all_ids);
    mem_free(c->all_chosen);
    mem_free(c->all_top);
    strbuf_fini(&c->text);
    chat_output_fini(&c->output);
    fini_message(&c->message);
    *c = (struct choice){ 0 };
}

uint32_t choice_n_output(const struct choice *c)
{
    return atomic_load_explicit(&c->req.n_output, memory_order_acquire);
}

/* May this id end the output?  Then its text is not for the client. */
static bool is_end(const struct choice *c, int32_t id)
{
    const struct request *r = &c->req;

    if (r->ignore_eos)
        return false;
    for (int i = 0; i < c->model->n_eos; i++)
        if (c->model->eos[i] == id)
            return true;
    for (uint32_t i = 0; i < r->n_stop_ids; i++)
        if (r->stop_ids[i] == id)
            return true;
    return false;
}

static void append(struct choice *c, int32_t id, bool with_text)
{
    size_t n = 0;

    c->newest_start = c->text.n;
    if (with_text)
        n = detokenizer_push(&c->detok, id,
                             strbuf_room(&c->text, detokenizer_max_bytes(&c->detok, id)));
    if (c->starts)
        c->starts[c->n_echo + c->n_read] = start_of(c->tokenizer, id, c->text.n, n);
    c->text.n += n;
    c->n_read++;
}

static void finish_text(struct choice *c)
{
    const struct request *r = &c->req;

    c->text.n += detokenizer_flush(&c->detok, strbuf_room(&c->text, 4));
    if (r->stopped_by_string >= 0) {
        ASSERT(r->text_bytes <= c->text.n - c->echo_bytes);
        c->text.n = c->echo_bytes + r->text_bytes;
    }
    ASSERT(c->sent_bytes <= c->text.n);
    c->flushed = true;
}

uint32_t choice_read(struct choice *c)
{
    const struct request *r = &c->req;
    uint32_t n = choice_n_output(c), before = c->n_read;

    while (c->n_read < n) {
        int32_t id = r->output[c->n_read];
        bool last = c->n_read + 1 == n;
        if (last && !c->home && is_end(c, id))
            break;
        bool ended = last && c->home && r->finish == FINISH_STOP && r->stopped_by_id == id;
        append(c, id, !ended || r->include_stop);
    }
    if (c->home && !c->flushed)
        finish_text(c);
    return c->n_read - before;
}

/* How much of the text no stop string can take back.  The engine looks for
 * them after every token, so only the newest one can have completed a match
 * that we have not been told of. */
static size_t visible_bytes(const struct choice *c)
{
    const struct request *r = &c->req;
    const char *text = c->text.data;
    size_t n = c->text.n, limit = n, from = max_size(c->sent_bytes, c->echo_bytes);

    if (c->flushed || r->n_stops == 0 || from >= n)
        return n;
    for (uint32_t i = 0; i < r->n_stops; i++) {
        size_t length = strlen(r->stops[i]);
        size_t p = max_size(from, c->newest_start >= length ? c->newest_start - length + 1 : 0);
        const char *hit = p < n ? memmem(text + p, n - p, r->stops[i], length) : NULL;
        if (hit)
            limit = min_size(limit, (size_t)(hit - text));
        for (p = max_size(from, n >= length ? n - length + 1 : 0); p < n; p++)
            if (memcmp(text + p, r->stops[i], n - p) == 0) {
                limit = min_size(limit, p);
                break;
            }
    }
    return limit;
}

static void describe_end(const struct choice *c, struct api_piece *out)
{
    const struct request *r = &c->req;

    out->finish_reason = r->finish != FINISH_STOP ? "length"
                         : c->output.n_calls > 0  ? "tool_calls"
                                                  : "stop";
    if (r->finish != FINISH_STOP)
        return;
    if (r->stopped_by_string >= 0 && (uint32_t)r->stopped_by_string < c->n_own_stops)
        out->stop_string = r->stops[r->stopped_by_string];
    for (uint32_t i = 0; i < c->n_own_stop_ids; i++)
        if (r->stop_ids[i] == r->stopped_by_id)
            out->stop_id = r->stopped_by_id;
}

/* Code points before byte `at`; bytes only move forward. */
static uint64_t count_points(struct choice *c, size_t at)
{
    for (; c->counted_bytes < at; c->counted_bytes++)
        c->counted_points += ((unsigned char)c->text.data[c->counted_bytes] & 0xC0) != 0x80;
    return c->counted_points;
}

/* One past the last token whose text begins before `end`; with the text final
 * and not cut, all of them. */
static uint32_t tokens_before(const struct choice *c, uint32_t from, size_t end)
{
    uint32_t n = c->n_echo + c->n_read;

    if (c->flushed && c->req.stopped_by_string < 0)
        return n;
    while (from < n && c->starts[from] < end)
        from++;
    return from;
}

static void describe_tokens(struct choice *c, struct api_piece *out, uint32_t from, uint32_t to)
{
    const struct request *r = &c->req;
    size_t n_top = r->n_top > 0 ? (size_t)r->n_top : 0;
    bool in_prompt = from < c->n_echo;
    size_t at = in_prompt ? from : from - c->n_echo;

    out->logprobs = true;
    out->n_tokens = to - from;
    out->n_top = (uint32_t)n_top;
    out->ids = (in_prompt ? r->prompt : r->output) + at;
    out->chosen = (in_prompt ? r->prompt_chosen : r->chosen) + at;
    out->top = n_top ? (in_prompt ? r->prompt_top : r->top) + at * n_top : NULL;
    for (uint32_t i = from; i < to; i++)
        c->offsets[i] = count_points(c, c->starts[i]);
    out->offsets = c->offsets + from;
}

/* The next part of the text that no stop string can take back. */
static bool next_part(struct choice *c, struct chat_delta *out)
{
    bool some = chat_output_next(&c->output, c->text.data ? c->text.data : "", visible_bytes(c),
                                 c->flushed, out);

    c->sent_bytes = c->output.at;
    return some;
}

static bool next_of_chat(struct choice *c, struct api_piece *out)
{
    struct chat_delta delta;

    *out = (struct api_piece){ .index = c->index, .stop_id = -1, .role = !c->role_sent };
    if (!c->role_sent) {
        c->role_sent = true;
        return true;
    }
    if (next_part(c, &delta)) {
        out->part = delta.part;
        out->text = delta.s;
        out->text_bytes = delta.n;
        out->call = delta.call;
        if (delta.part == CHAT_CALL)
            request_id_make(c->call_id, sizeof c->call_id, "call_");
        out->call_id = c->call_id;
    } else if (c->flushed) {
        describe_end(c, out);
        c->end_sent = true;
    } else {
        return false;
    }
    if (c->logprobs) {
        uint32_t to = tokens_before(c, c->sent_tokens, c->sent_bytes);
        describe_tokens(c, out, c->sent_tokens, to);
        c->sent_tokens = to;
    }
    return true;
}

bool choice_next(struct choice *c, struct api_piece *out)
{
    if (c->end_sent || (choice_n_output(c) == 0 && !c->home))
        return false;
    if (c->chat)
        return next_of_chat(c, out);
    size_t end = visible_bytes(c);
    bool last = c->flushed;

    /* Prompt and output have their logprobs in different arrays. */
    if (c->logprobs && c->sent_tokens < c->n_echo && c->req.max_tokens > 0) {
        end = c->echo_bytes;
        last = false;
    }
    if (end <= c->sent_bytes && !last && !(c->sent_tokens < c->n_echo))
        return false;
    *out = (struct api_piece){ .index = c->index, .stop_id = -1,
                               .text = c->text.data ? c->text.data + c->sent_bytes : "",
                               .text_bytes = end - c->sent_bytes };
    if (c->logprobs) {
        uint32_t to = c->sent_tokens < c->n_echo ? c->n_echo
                                                 : tokens_before(c, c->sent_tokens, end);
        describe_tokens(c, out, c->sent_tokens, to);
        c->sent_tokens = to;
    }
    if (last) {
        describe_end(c, out);
        c->end_sent = true;
    }
    c->sent_bytes = end;
    return true;
}

/* Prompt and output side by side. */
static void join_logprobs(struct choice *c)
{
    const struct request *r = &c->req;
    size_t n_top = r->n_top > 0 ? (size_t)r->n_top : 0;
    size_t a = c->n_echo, b = c->n_read;

    if (c->all_ids)
        return;
    c->all_ids = mem_calloc(a + b, sizeof *c->all_ids);
    c->all_chosen = mem_calloc(a + b, sizeof *c->all_chosen);
    memcpy(c->all_ids, r->prompt, a * sizeof *c->all_ids);
    memcpy(c->all_ids + a, r->output, b * sizeof *c->all_ids);
    memcpy(c->all_chosen, r->prompt_chosen, a * sizeof *c->all_chosen);
    memcpy(c->all_chosen + a, r->chosen, b * sizeof *c->all_chosen);
    if (n_top) {
        c->all_top = mem_calloc((a + b) * n_top, sizeof *c->all_top);
        memcpy(c->all_top, r->prompt_top, a * n_top * sizeof *c->all_top);
        memcpy(c->all_top + a * n_top, r->top, b * n_top * sizeof *c->all_top);
    }
}

static void add_part(struct api_message *m, const struct chat_delta *d)
{
    if (d->part == CHAT_REASONING || d->part == CHAT_CONTENT) {
        strbuf_add(d->part == CHAT_CONTENT ? &m->content : &m->reasoning, d->s, d->n);
        return;
    }
    if (d->part == CHAT_CALL) {
        m->calls = mem_realloc(m->calls, m->n_calls + 1, sizeof *m->calls);
        struct api_call *call = &m->calls[m->n_calls++];
        *call = (struct api_call){ .id = "" };
        request_id_make(call->id, sizeof call->id, "call_");
        strbuf_add(&call->name, d->s, d->n);
        return;
    }
    ASSERT(m->n_calls > 0);
    strbuf_add(&m->calls[m->n_calls - 1].arguments, d->s, d->n);
}

static void whole_chat(struct choice *c, struct api_piece *out)
{
    struct chat_delta delta;

    while (next_part(c, &delta))
        add_part(&c->message, &delta);
    *out = (struct api_piece){ .index = c->index, .stop_id = -1, .message = &c->message };
    describe_end(c, out);
    if (c->logprobs)
        describe_tokens(c, out, 0, tokens_before(c, 0, c->text.n));
}

void choice_whole(struct choice *c, struct api_piece *out)
{
    ASSERT(c->home && c->flushed);
    if (c->chat) {
        whole_chat(c, out);
        return;
    }
    *out = (struct api_piece){ .index = c->index, .stop_id = -1,
                               .text = c->text.data ? c->text.data : "",
                               .text_bytes = c->text.n };
    describe_end(c, out);
    if (!c->logprobs)
        return;
    uint32_t n = tokens_before(c, 0, c->text.n);
    if (c->n_echo == 0 || n <= c->n_echo) {
        describe_tokens(c, out, 0, n);
        return;
    }
    join_logprobs(c);
    describe_tokens(c, out, 0, n);
    out->ids = c->all_ids;
    out->chosen = c->all_chosen;
    out->top = c->all_top;
}

uint32_t choice_n_thoughts(const struct choice *c)
{
    uint32_t n = 0;

    if (!c->output.thought)
        return 0;
    while (n < c->n_read && c->starts[n] < c->output.thoughts_end)
        n++;
    return n;
}

double choice_mean_logprob(const struct choice *c)
{
    uint32_t n = choice_n_output(c);
    double sum = 0;

    for (uint32_t i = 0; i < n; i++)
        sum += (double)c->req.chosen[i].logprob;
    return n ? sum / n : 0;
}
