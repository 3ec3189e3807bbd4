#include "server/request_log.h"

#include "engine/base/clock.h"
#include "engine/base/log.h"

#include <stddef.h>

enum { MAX_FIELDS = 16 };

struct fields {
    struct log_field items[MAX_FIELDS];
    size_t n;
};

static void add_text(struct fields *f, const char *name, const char *text)
{
    f->items[f->n++] = (struct log_field){ .name = name, .kind = LOG_FIELD_TEXT, .text = text };
}

static void add_number(struct fields *f, const char *name, double number)
{
    f->items[f->n++] = (struct log_field){ .name = name, .kind = LOG_FIELD_NUMBER,
                                           .number = number };
}

static void add_bool(struct fields *f, const char *name, bool yes)
{
    f->items[f->n++] = (struct log_field){ .name = name, .kind = LOG_FIELD_BOOL, .yes = yes };
}

static void add_ms(struct fields *f, const char *name, uint64_t from_ns, uint64_t to_ns)
{
    f->items[f->n++] = (struct log_field){
        .name = name, .kind = LOG_FIELD_NUMBER, .decimals = 1,
        .number = to_ns > from_ns ? (double)(to_ns - from_ns) / 1e6 : 0,
    };
}

static void add_completion(struct fields *f, const struct request_record *r)
{
    add_bool(f, "stream", r->stream);
    if (r->engine >= 0)
        add_number(f, "engine", r->engine);
    add_number(f, "choices", r->choices);
    add_number(f, "prompt_tokens", (double)r->prompt_tokens);
    add_number(f, "cached_tokens", (double)r->cached_tokens);
    add_number(f, "completion_tokens", (double)r->completion_tokens);
    add_text(f, "finish", r->ending);
    if (r->first_token_ns) {
        add_ms(f, "queue_ms", r->submitted_ns, r->admitted_ns);
        add_ms(f, "ttft_ms", r->arrival_ns, r->first_token_ns);
    }
}

void request_log(const struct request_record *r)
{
    struct fields f = { .n = 0 };

    add_text(&f, "request_id", r->id);
    add_text(&f, "method", r->method);
    add_text(&f, "path", r->path);
    add_number(&f, "status", r->status);
    add_bool(&f, "disconnected", r->disconnected);
    if (r->key)
        add_number(&f, "key", r->key);
    if (r->completion)
        add_completion(&f, r);
    add_ms(&f, "total_ms", r->arrival_ns, clock_now_ns());
    log_event(r->probe && r->status < 400 ? LOG_LEVEL_DEBUG : LOG_LEVEL_INFO, "http", "request",
              f.items, f.n);
}

void request_log_error(const char *id, const char *why)
{
    struct fields f = { .n = 0 };

    add_text(&f, "request_id", id);
    log_event(LOG_LEVEL_ERROR, "stream", why, f.items, f.n);
}
