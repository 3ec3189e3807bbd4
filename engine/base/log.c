#include "engine/base/log.h"

#include "engine/base/utf8.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    /* A pipe takes that many bytes in one piece. */
    LINE_BYTES = 4096,
    MESSAGE_BYTES = 960,
    /* For the end of the line. */
    TAIL_BYTES = 4
};

static atomic_int current_level = LOG_LEVEL_INFO;
static atomic_int current_format = LOG_FORMAT_TEXT;

void log_set_level(enum log_level level)
{
    atomic_store_explicit(&current_level, (int)level, memory_order_relaxed);
}

void log_set_format(enum log_format format)
{
    atomic_store_explicit(&current_format, (int)format, memory_order_relaxed);
}

enum log_level log_level(void)
{
    return (enum log_level)atomic_load_explicit(&current_level, memory_order_relaxed);
}

struct line {
    char text[LINE_BYTES];
    size_t n;
    bool full;                   /* something did not fit */
};

static void add(struct line *l, const char *s, size_t n)
{
    if (n > LINE_BYTES - TAIL_BYTES - l->n) {
        l->full = true;
        return;
    }
    memcpy(l->text + l->n, s, n);
    l->n += n;
}

static void add_text(struct line *l, const char *s)
{
    add(l, s, strlen(s));
}

/* A log line is one line, whatever the text that went into it. */
static void add_plain(struct line *l, const char *s)
{
    for (; *s; s++)
        add(l, (unsigned char)*s < 0x20 ? " " : s, 1);
}

static void add_json_string(struct line *l, const char *s)
{
    size_t left = strlen(s);

    add_text(l, "\"");
    while (left > 0) {
        int n = utf8_classify(s, left);
        size_t bytes = n > 0 ? (size_t)n : n < 0 ? (size_t)-n : left;
        if (n <= 0)
            add_text(l, "\xef\xbf\xbd");
        else if ((unsigned char)*s < 0x20)
            add_text(l, " ");
        else if (*s == '"' || *s == '\\')
            add(l, (const char[]){ '\\', *s }, 2);
        else
            add(l, s, bytes);
        s += bytes;
        left -= bytes;
    }
    add_text(l, "\"");
}

static void add_value(struct line *l, const struct log_field *f, bool json)
{
    char number[64];

    switch (f->kind) {
    case LOG_FIELD_TEXT:
        if (json)
            add_json_string(l, f->text);
        else
            add_plain(l, f->text);
        break;
    case LOG_FIELD_NUMBER:
        snprintf(number, sizeof number, "%.*f", f->decimals, f->number);
        add_text(l, number);
        break;
    case LOG_FIELD_BOOL:
        add_text(l, f->yes ? "true" : "false");
        break;
    }
}

/* The whole field or nothing of it. */
static void add_field(struct line *l, const struct log_field *f, bool json)
{
    size_t before = l->n;

    l->full = false;
    add_text(l, json ? (before == 1 ? "\"" : ",\"") : " ");
    add_text(l, f->name);
    add_text(l, json ? "\":" : "=");
    add_value(l, f, json);
    if (l->full)
        l->n = before;
}

static void add_json_word(struct line *l, const char *name, const char *text)
{
    add_field(l, &(struct log_field){ .name = name, .text = text }, true);
}

static void add_head(struct line *l, enum log_level level, const char *module, bool json)
{
    static const char *const names[] = { "error", "warn", "info", "debug" };
    char time[40], thread[16] = "?", head[96];
    struct timespec ts;
    struct tm tm;

    clock_gettime(CLOCK_REALTIME, &ts);
    gmtime_r(&ts.tv_sec, &tm);
    pthread_getname_np(pthread_self(), thread, sizeof thread);
    size_t n = strftime(time, sizeof time, "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(time + n, sizeof time - n, ".%03ldZ", ts.tv_nsec / 1000000);
    if (json) {
        add_text(l, "{");
        add_json_word(l, "time", time);
        add_json_word(l, "level", names[level]);
        add_json_word(l, "thread", thread);
        add_json_word(l, "module", module);
    } else {
        snprintf(head, sizeof head, "%s %c %-6s %s: ", time, "EWID"[level], thread, module);
        add_text(l, head);
    }
}

void log_event(enum log_level level, const char *module, const char *message,
               const struct log_field *fields, size_t n_fields)
{
    bool json = atomic_load_explicit(&current_format, memory_order_relaxed) == LOG_FORMAT_JSON;
    struct line l = { .n = 0 };

    if (level > log_level())
        return;
    add_head(&l, level, module, json);
    if (json)
        add_json_word(&l, "message", message);
    else
        add_plain(&l, message);
    for (size_t i = 0; i < n_fields; i++)
        add_field(&l, &fields[i], json);
    const char *end = json ? "}\n" : "\n";
    memcpy(l.text + l.n, end, strlen(end));
    l.n += strlen(end);
    /* Nothing sensible can be done about a broken stderr. */
    if (write(STDERR_FILENO, l.text, l.n) < 0)
        return;
}

void log_write(enum log_level level, const char *module, const char *fmt, ...)
{
    char message[MESSAGE_BYTES];
    va_list ap;

    if (level > log_level())
        return;
    va_start(ap, fmt);
    vsnprintf(message, sizeof message, fmt, ap);
    va_end(ap);
    log_event(level, module, message, NULL, 0);
}
