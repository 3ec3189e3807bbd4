#include "server/stream.h"

#include "engine/base/clock.h"
#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "server/access.h"
#include "server/choice.h"
#include "server/key_limits.h"
#include "server/metrics.h"
#include "server/reply.h"
#include "server/request_head.h"
#include "server/request_log.h"
#include "server/service.h"

#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

enum {
    /* Larger bodies are parsed off the loop: at 1 MB/s of tokenising 16 KB
     * hold up the streams for 16 ms. */
    INLINE_BODY_BYTES = 16 * 1024,
    /* What a slow reader has not taken stays with the choices beyond that,
     * where it is shorter than as JSON. */
    HIGH_WATER_BYTES = 256 * 1024
};

static const char ping[] = ": ping\n\n";

struct stream {
    enum stream_kind kind;
    struct service *sv;
    struct http_exchange *x;         /* NULL once the client is gone */
    struct stream *prev, *next;      /* sv->streams */
    uint64_t arrival_ns;
    uint32_t key;                    /* the client's, from 1; 0: there are none */

    bool parsing;                    /* with the pool: work, body, completion, error */
    uv_work_t work;
    struct strbuf body;
    struct api_completion *completion;
    struct strbuf document;          /* the answer of a small call, or empty: error */
    struct api_error error;

    struct choice *choices;          /* prompts times best_of, prompt by prompt */
    uint32_t n_choices, n_submitted, n_home;
    bool admitted;
    bool half_closed;
    bool begun;                      /* the 200 of an event stream is out */
    bool answered;                   /* nothing more will be sent */
    bool dirty;                      /* there is news from the engine */
    uint64_t last_write_ns;
    char id[40];
    int64_t created;
};

static struct choice *choice_of(const struct request *r)
{
    return (struct choice *)r;
}
_Static_assert(offsetof(struct choice, req) == 0, "a request leads back to its choice");

static bool is_stream(const struct stream *s)
{
    return s->completion && s->completion->stream;
}

/* ---- lifetime */

static void maybe_free(struct stream *s)
{
    struct service *sv = s->sv;

    if (s->x || s->parsing || s->n_home < s->n_submitted)
        return;
    if (s->prev)
        s->prev->next = s->next;
    else
        sv->streams = s->next;
    if (s->next)
        s->next->prev = s->prev;
    sv->n_streams--;
    for (uint32_t i = 0; i < s->n_choices; i++)
        choice_fini(&s->choices[i]);
    mem_free(s->choices);
    api_completion_free(s->completion);
    strbuf_fini(&s->document);
    ASSERT(!s->body.data);
    mem_free(s);
    service_note_end(sv);
}

static void cancel(struct stream *s)
{
    for (uint32_t i = 0; i < s->n_submitted; i++)
        if (!s->choices[i].home)
            fleet_cancel(s->sv->fleet, &s->choices[i].req);
}

/* ---- answers */

static void write_event(struct stream *s, const struct strbuf *json)
{
    struct strbuf event = { 0 };

    strbuf_puts(&event, "data: ");
    strbuf_add(&event, json->data, json->n);
    strbuf_puts(&event, "\n\n");
    http_stream_write(s->x, event.data, event.n);
    strbuf_fini(&event);
    s->last_write_ns = clock_now_ns();
}

static void begin(struct stream *s)
{
    if (!s->begun)
        http_stream_begin(s->x);
    s->begun = true;
}

static void write_ping(struct stream *s, uint64_t now_ns)
{
    begin(s);
    http_stream_write(s->x, ping, sizeof ping - 1);
    s->last_write_ns = now_ns;
}

static void end_events(struct stream *s)
{
    static const char done[] = "data: [DONE]\n\n";

    http_stream_write(s->x, done, sizeof done - 1);
    http_stream_end(s->x);
    s->answered = true;
}

/* The client gets a true status while that is possible, an error event and
 * the end of the stream otherwise. */
static void fail(struct stream *s, const struct api_error *err)
{
    cancel(s);
    if (!s->x || s->answered)
        return;
    if (s->begun) {
        struct strbuf json = { 0 };
        api_write_error(&json, err);
        write_event(s, &json);
        strbuf_fini(&json);
        end_events(s);
    } else {
        reply_api_error(s->x, err);
        s->answered = true;
    }
}

static void fail_with(struct stream *s, enum refusal why, const char *message)
{
    struct api_error err;

    refusal_error(&err, why, message);
    fail(s, &err);
}

/* A prompt counts once, however many choices it has; what the choice that ran
 * first found in the cache counts as cached. */
static struct api_usage usage_of(const struct stream *s)
{
    const struct api_completion *c = s->completion;
    struct api_usage u = { .chat = c->chat != NULL };

    for (uint32_t p = 0; p < c->n_prompts; p++) {
        uint32_t cached = UINT32_MAX;
        for (uint32_t i = p * c->best_of; i < (p + 1) * c->best_of && i < s->n_choices; i++) {
            const struct request *r = &s->choices[i].req;
            if (s->choices[i].home && r->n_cached < cached)
                cached = r->n_cached;
            u.completion_tokens += choice_n_output(&s->choices[i]);
            u.reasoning_tokens += choice_n_thoughts(&s->choices[i]);
        }
        u.prompt_tokens += c->prompts[p].n_ids;
        u.cached_tokens += cached == UINT32_MAX ? 0 : cached;
    }
    return u;
}

static struct api_head head_of(const struct stream *s)
{
    return (struct api_head){ .id = s->id, .model = s->completion->model,
                              .created = s->created };
}

/* Did the engine give up on one of the choices?  Then the answer is an error,
 * never a made-up finish reason. */
static bool failed(struct stream *s)
{
    for (uint32_t i = 0; i < s->n_submitted; i++) {
        const struct request *r = &s->choices[i].req;
        if (!s->choices[i].home)
            continue;
        if (r->finish == FINISH_ERROR && r->error.code == ST_INVALID) {
            fail_with(s, REFUSE_STRUCTURE, r->error.text);
            return true;
        }
        if (r->finish == FINISH_ERROR) {
            request_log_error(http_request_id(s->x), r->error.text);
            fail_with(s, r->error.code == ST_DEVICE ? REFUSE_FAILED : REFUSE_ENGINE, NULL);
            return true;
        }
        if (r->finish == FINISH_CANCELLED) {
            fail_with(s, REFUSE_DRAINING, NULL);
            return true;
        }
    }
    return false;
}

/* A chunk of one choice, or without one that of the usage. */
static void write_chunk(struct stream *s, struct strbuf *json, const struct api_piece *piece,
                        const struct api_usage *usage)
{
    const struct tokenizer *t = s->sv->api.tokenizer;
    const struct api_head head = head_of(s);
    bool usage_null = s->completion->include_usage && !usage;

    strbuf_clear(json);
    if (s->completion->chat)
        api_write_chat_chunk(json, &head, t, piece, usage, usage_null);
    else
        api_write_completion(json, &head, t, piece, piece ? 1 : 0, usage, usage_null);
    write_event(s, json);
}

static void send_events(struct stream *s)
{
    bool all_sent = true;
    struct strbuf json = { 0 };
    struct api_piece piece;

    for (uint32_t i = 0; i < s->n_choices; i++) {
        struct choice *c = &s->choices[i];
        while (http_stream_pending_bytes(s->x) < HIGH_WATER_BYTES && choice_next(c, &piece)) {
            begin(s);
            write_chunk(s, &json, &piece, NULL);
        }
        all_sent = all_sent && c->end_sent;
    }
    if (all_sent) {
        if (s->completion->include_usage) {
            struct api_usage usage = usage_of(s);
            write_chunk(s, &json, NULL, &usage);
        }
        end_events(s);
    }
    strbuf_fini(&json);
}

/* The n best of the best_of choices of a prompt, best first, to the front. */
static void rank(struct choice **list, uint32_t count, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        uint32_t best = i;
        for (uint32_t k = i + 1; k < count; k++)
            if (choice_mean_logprob(list[k]) > choice_mean_logprob(list[best]))
                best = k;
        struct choice *c = list[best];
        memmove(list + i + 1, list + i, (best - i) * sizeof *list);
        list[i] = c;
    }
}

static void send_whole(struct stream *s)
{
    const struct api_completion *c = s->completion;
    const struct tokenizer *t = s->sv->api.tokenizer;
    const struct api_head head = head_of(s);
    struct api_piece *pieces = mem_calloc((size_t)c->n_prompts * c->n, sizeof *pieces);
    struct choice **list = mem_calloc(c->best_of, sizeof *list);
    struct strbuf json = { 0 };

    for (uint32_t p = 0; p < c->n_prompts; p++) {
        for (uint32_t i = 0; i < c->best_of; i++)
            list[i] = &s->choices[p * c->best_of + i];
        if (c->best_of > c->n)
            rank(list, c->best_of, c->n);
        for (uint32_t i = 0; i < c->n; i++) {
            struct api_piece *piece = &pieces[p * c->n + i];
            choice_whole(list[i], piece);
            piece->index = p * c->n + i;
        }
    }
    /* The thoughts have been counted now. */
    const struct api_usage usage = usage_of(s);
    if (c->chat)
        api_write_chat(&json, &head, t, pieces, c->n, &usage);
    else
        api_write_completion(&json, &head, t, pieces, c->n_prompts * c->n, &usage, false);
    http_reply(s->x, 200, "application/json", &json);
    s->answered = true;
    mem_free(list);
    mem_free(pieces);
}

/* Send what can be sent. */
static void send_news(struct stream *s)
{
    if (!s->x || !s->admitted || s->answered || failed(s))
        return;
    if (is_stream(s))
        send_events(s);
    else if (s->n_home == s->n_choices)
        send_whole(s);
}

/* ---- admission */

static uint64_t mix_seed(uint64_t seed, uint32_t i)
{
    uint64_t z = seed + i * 0x9E3779B97F4A7C15u;

    if (i == 0)
        return seed;    /* one choice draws exactly from the seed that was given */
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static void make_choices(struct stream *s)
{
    struct service *sv = s->sv;
    const struct api_completion *c = s->completion;
    uint64_t seed = c->template.seed;

    if (!c->has_seed)
        ASSERT(getrandom(&seed, sizeof seed, 0) == (ssize_t)sizeof seed);
    s->n_choices = c->n_prompts * c->best_of;
    s->choices = mem_calloc(s->n_choices, sizeof *s->choices);
    for (uint32_t p = 0; p < c->n_prompts; p++) {
        uint64_t group = c->best_of > 1 ? ++sv->next_id : 0;
        /* Without a seed of the client's no two choices may agree by design. */
        uint64_t base = c->has_seed ? seed : mix_seed(seed, p);
        for (uint32_t i = 0; i < c->best_of; i++) {
            struct choice *choice = &s->choices[p * c->best_of + i];
            struct request *r = &choice->req;
            choice_init(choice, c, p, p * c->n + i, sv->api.tokenizer, sv->api.model);
            r->id = ++sv->next_id;
            r->group = group;
            r->seed = mix_seed(base, i);
            r->arrival_ns = s->arrival_ns;
            r->share = s->key;
            r->cache_salt = key_limits_salt(sv->key_limits, s->key, r->cache_salt);
            r->owner = s;
        }
    }
}

static void refuse_submit(struct stream *s, enum status status)
{
    switch (status) {
    case ST_BUSY:     fail_with(s, REFUSE_QUEUE_FULL, NULL); break;
    case ST_QUOTA:    fail_with(s, REFUSE_SHARE, NULL); break;
    case ST_SHUTDOWN: fail_with(s, REFUSE_DRAINING, NULL); break;
    case ST_DEVICE:   fail_with(s, REFUSE_FAILED, NULL); break;
    default:          fail_with(s, REFUSE_ENGINE, NULL); break;
    }
}

/* The choices of a prompt, to one engine. */
static enum status submit_prompt(struct stream *s, uint32_t prompt)
{
    const uint32_t n = s->completion->best_of;
    struct choice *choices = s->choices + (size_t)prompt * n;
    struct request **reqs = mem_calloc(n, sizeof(struct request *));

    for (uint32_t i = 0; i < n; i++) {
        choices[i].submitted_ns = clock_now_ns();
        reqs[i] = &choices[i].req;
    }
    enum status status = fleet_submit(s->sv->fleet, reqs, n);
    for (uint32_t i = 0; i < n && status == ST_OK; i++) {
        choices[i].home = false;
        s->n_submitted++;
    }
    mem_free(reqs);
    return status;
}

/* All choices are let in, or none is answered. */
static void submit(struct stream *s)
{
    const struct api_completion *c = s->completion;

    for (uint32_t p = 0; p < c->n_prompts; p++) {
        enum status status = submit_prompt(s, p);
        if (status != ST_OK) {
            refuse_submit(s, status);
            return;
        }
    }
    s->admitted = true;
    metrics_note_params(s->sv->metrics, s->choices[0].req.engine, c->n, c->template.max_tokens);
}

static void take_parsed(struct stream *s)
{
    struct service *sv = s->sv;

    http_give_body(sv->http, &s->body);
    if (!s->x)
        return;
    if (!s->completion && s->document.n == 0) {
        fail(s, &s->error);
        return;
    }
    if (sv->state != SERVICE_READY) {
        fail_with(s, sv->state == SERVICE_FAILED ? REFUSE_FAILED : REFUSE_DRAINING, NULL);
        return;
    }
    if (s->half_closed && !is_stream(s)) {
        http_drop(s->x);
        return;
    }
    if (!s->completion) {
        http_reply(s->x, 200, "application/json", &s->document);
        s->answered = true;
        return;
    }
    make_choices(s);
    submit(s);
    if (s->half_closed && !s->answered)
        write_ping(s, clock_now_ns());
}

static void parse(struct stream *s)
{
    const char *body = s->body.data ? s->body.data : "";
    const struct api_context *cx = &s->sv->api;
    enum status status = ST_OK;

    switch (s->kind) {
    case STREAM_TEXT:
        s->completion = api_parse_completion(body, s->body.n, cx, &s->error);
        break;
    case STREAM_CHAT:
        s->completion = api_parse_chat(body, s->body.n, cx, &s->error);
        break;
    case STREAM_TOKENIZE:
        status = api_tokenize(&s->document, body, s->body.n, cx, &s->error);
        break;
    case STREAM_DETOKENIZE:
        status = api_detokenize(&s->document, body, s->body.n, cx, &s->error);
        break;
    }
    if (status != ST_OK)
        strbuf_clear(&s->document);
}

static void on_parse(uv_work_t *work)
{
    parse(work->data);
}

static void on_parsed(uv_work_t *work, int status)
{
    struct stream *s = work->data;
    struct service *sv = s->sv;

    ASSERT(status == 0);    /* never cancelled */
    s->parsing = false;
    sv->n_parsing--;
    take_parsed(s);
    maybe_free(s);
}

void stream_start(struct service *sv, struct http_exchange *x, enum stream_kind kind)
{
    struct stream *s = mem_calloc(1, sizeof *s);

    s->kind = kind;
    s->sv = sv;
    s->x = x;
    s->arrival_ns = http_arrival_ns(x);
    /* The head's check let it in. */
    ASSERT(access_key_ok(&sv->cfg->api_keys, http_header(x, "Authorization"), &s->key));
    s->last_write_ns = s->arrival_ns;
    s->created = (int64_t)time(NULL);
    request_id_make(s->id, sizeof s->id, kind == STREAM_CHAT ? "chatcmpl-" : "cmpl-");
    s->next = sv->streams;
    if (s->next)
        s->next->prev = s;
    sv->streams = s;
    sv->n_streams++;
    http_set_owner(x, s);
    s->body = http_take_body(x);
    if (s->body.n <= INLINE_BODY_BYTES &&
        !api_mentions_guided(s->body.data ? s->body.data : "", s->body.n)) {
        parse(s);
        take_parsed(s);
        return;
    }
    s->parsing = true;
    sv->n_parsing++;
    s->work.data = s;
    ASSERT(uv_queue_work(&sv->loop, &s->work, on_parse, on_parsed) == 0);
}

/* ---- the engine's mail */

static void take_tokens(struct service *sv, struct choice *c)
{
    uint64_t now_ns = clock_now_ns();
    uint32_t n = choice_read(c);

    if (n == 0)
        return;
    if (c->last_seen_ns) {
        metrics_note_tokens(sv->metrics, c->req.engine, n, now_ns - c->last_seen_ns);
    } else {
        fleet_note_output(sv->fleet, &c->req);
        metrics_note_first_token(sv->metrics, c->req.engine, c->req.arrival_ns, now_ns);
        metrics_note_tokens(sv->metrics, c->req.engine, n - 1, 0);
    }
    c->last_seen_ns = now_ns;
}

void stream_take_message(struct service *sv, struct message *m)
{
    struct choice *c = choice_of(m->req);
    struct stream *s = m->req->owner;

    if (m->kind == MSG_TOKENS) {
        /* Cleared before the count is read: what comes later sends mail again. */
        atomic_store(&c->req.mail_pending, false);
        take_tokens(sv, c);
    } else {
        ASSERT(!c->home);
        c->home = true;
        s->n_home++;
        take_tokens(sv, c);
        fleet_note_done(sv->fleet, &c->req);
        metrics_note_done(sv->metrics, &c->req, c->submitted_ns);
    }
    s->dirty = true;
}

void stream_send_pending(struct service *sv)
{
    struct stream *next;

    for (struct stream *s = sv->streams; s; s = next) {
        next = s->next;
        if (!s->dirty)
            continue;
        s->dirty = false;
        send_news(s);
        maybe_free(s);
    }
}

/* ---- the transport's news */

void stream_drained(struct stream *s)
{
    send_news(s);
}

/* Some clients close their sending side as soon as they have asked.  A stream
 * finds out by writing; any other answer has nothing to write yet, so there
 * the client counts as gone. */
void stream_half_closed(struct stream *s)
{
    if (s->answered)
        return;
    s->half_closed = true;
    if (s->parsing)
        return;
    if (s->admitted && is_stream(s))
        write_ping(s, clock_now_ns());
    else
        http_drop(s->x);
}

/* How the first choice ended; the engine may still have it. */
static const char *ending_of(const struct stream *s)
{
    const struct choice *c = &s->choices[0];

    switch (c->home ? c->req.finish : FINISH_CANCELLED) {
    case FINISH_NONE:      return "refused";
    case FINISH_STOP:      return "stop";
    case FINISH_LENGTH:    return "length";
    case FINISH_CANCELLED: return "abort";
    case FINISH_ERROR:     return "error";
    }
    return "error";
}

static void describe_completion(const struct stream *s, struct request_record *out)
{
    const struct api_usage u = usage_of(s);
    const struct choice *first = NULL;

    /* The times of a choice are the loop's to read once a token of it is. */
    for (uint32_t i = 0; i < s->n_choices; i++) {
        const struct choice *c = &s->choices[i];
        if (choice_n_output(c) > 0 &&
            (!first || c->req.first_token_ns < first->req.first_token_ns))
            first = c;
    }
    out->completion = true;
    out->stream = s->completion->stream;
    out->choices = s->n_choices;
    out->engine = s->n_submitted ? (int)s->choices[0].req.engine : -1;
    out->prompt_tokens = u.prompt_tokens;
    out->cached_tokens = u.cached_tokens;
    out->completion_tokens = u.completion_tokens;
    out->ending = ending_of(s);
    if (!first)
        return;
    out->submitted_ns = first->submitted_ns;
    out->admitted_ns = first->req.admitted_ns;
    out->first_token_ns = first->req.first_token_ns;
}

static void log_end(const struct stream *s, bool whole)
{
    struct request_record record = {
        .id = http_request_id(s->x), .method = http_method(s->x), .path = http_path(s->x),
        .status = http_status(s->x), .disconnected = !whole || !s->answered,
        .arrival_ns = s->arrival_ns, .key = s->key,
    };

    if (s->n_choices)
        describe_completion(s, &record);
    request_log(&record);
}

void stream_closed(struct stream *s, bool whole)
{
    log_end(s, whole);
    s->x = NULL;
    cancel(s);
    maybe_free(s);
}

void stream_tick(struct service *sv, uint64_t now_ns)
{
    uint64_t silence_ns = sv->cfg->ping_interval_ms * 1000000u;
    struct stream *next;

    for (struct stream *s = sv->streams; s; s = next) {
        next = s->next;
        if (!s->x || !s->admitted || s->answered || !is_stream(s))
            continue;
        if (s->half_closed && http_peer_is_dead(s->x))
            http_drop(s->x);
        else if (now_ns - s->last_write_ns >= silence_ns &&
                 (!s->begun || http_stream_pending_bytes(s->x) == 0))
            write_ping(s, now_ns);
    }
}

void stream_fail_all(struct service *sv, const struct api_error *why)
{
    for (struct stream *s = sv->streams; s; s = s->next)
        if (!s->parsing)
            fail(s, why);
}

/* ---- what somebody who looks for a fault sees */

static const struct engine_sequence *find_running(const struct engine_sequence *running,
                                                  uint32_t n, uint64_t id)
{
    uint32_t from = 0;

    while (n > 0) {
        uint32_t half = n / 2;
        if (running[from + half].id < id) {
            from += half + 1;
            n -= half + 1;
        } else if (running[from + half].id > id) {
            n = half;
        } else {
            return &running[from + half];
        }
    }
    return NULL;
}

/* What the engine says is of its last step, and may lag behind what has come home. */
static void write_choice_state(struct strbuf *out, const struct choice *c,
                               const struct engine_sequence *q)
{
    uint32_t n_output = choice_n_output(c);
    const char *state = c->home ? "done" : q ? "running" : n_output ? "preempted" : "waiting";

    strbuf_printf(out, "{\"state\":\"%s\",\"engine\":%u,\"prompt_tokens\":%u,\"output_tokens\":%u,"
                  "\"max_tokens\":%u", state, c->req.engine, c->req.n_prompt, n_output,
                  c->req.max_tokens);
    if (q && !c->home)
        strbuf_printf(out, ",\"place\":\"%s\",\"computed_tokens\":%u,\"blocks\":%u,"
                      "\"blocks_on_device\":%u", q->place, q->n_computed, q->n_blocks,
                      q->n_held);
    strbuf_puts(out, "}");
}

static void write_state(struct strbuf *out, const struct stream *s, uint64_t now_ns,
                        const struct engine_sequence *running, uint32_t n_running)
{
    const char *state = s->parsing ? "parsing" : !s->x ? "leaving"
                      : s->answered ? "sending" : "working";

    strbuf_printf(out, "{\"id\":\"%s\",\"state\":\"%s\",\"age_ms\":%.1f", s->id, state,
                  (double)(now_ns - s->arrival_ns) / 1e6);
    if (s->key)
        strbuf_printf(out, ",\"key\":%u", s->key);
    if (s->x) {
        strbuf_puts(out, ",\"request_id\":");
        api_write_string(out, http_request_id(s->x), strlen(http_request_id(s->x)));
        strbuf_printf(out, ",\"path\":\"%s\",\"unsent_bytes\":%zu", http_path(s->x),
                      http_stream_pending_bytes(s->x));
    }
    /* While it is parsed it belongs to a thread of the pool. */
    if (!s->parsing && s->completion)
        strbuf_printf(out, ",\"stream\":%s", s->completion->stream ? "true" : "false");
    strbuf_puts(out, ",\"choices\":[");
    for (uint32_t i = 0; i < s->n_submitted; i++) {
        const struct choice *c = &s->choices[i];
        strbuf_puts(out, i ? "," : "");
        write_choice_state(out, c, find_running(running, n_running, c->req.id));
    }
    strbuf_puts(out, "]}");
}

void stream_write_states(struct strbuf *out, const struct service *sv,
                         const struct engine_sequence *running, uint32_t n_running)
{
    uint64_t now_ns = clock_now_ns();

    strbuf_puts(out, "[");
    for (const struct stream *s = sv->streams; s; s = s->next) {
        strbuf_puts(out, s->prev ? "," : "");
        write_state(out, s, now_ns, running, n_running);
    }
    strbuf_puts(out, "]");
}
