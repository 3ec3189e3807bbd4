#ifndef BASE_LOG_H
#define BASE_LOG_H

#include <stdbool.h>
#include <stddef.h>

/* The log: one line to stderr per event, one write(2) per line, so lines of
 * different threads never mix.
 *
 *     2026-05-04T12:00:00.123Z I loop  http: listening on 127.0.0.1:8000
 *
 * or, with log_set_format(), as one JSON object, for programs that collect logs:
 *
 *     {"time":"2026-05-04T12:00:00.123Z","level":"info","thread":"loop","module":"http",
 *      "message":"listening on 127.0.0.1:8000"}
 *
 * An event may have fields besides its message: name=value behind it, or members of the object.
 * A JSON line is always a whole object in valid UTF-8: what is too long of it is left out.
 *
 * Levels: error (someone must act), warn, info (start, summaries, end of a
 * request), debug.  Never in a step unless debug.  Any thread. */

enum log_level { LOG_LEVEL_ERROR, LOG_LEVEL_WARN, LOG_LEVEL_INFO, LOG_LEVEL_DEBUG };
enum log_format { LOG_FORMAT_TEXT, LOG_FORMAT_JSON };

void log_set_level(enum log_level level);
void log_set_format(enum log_format format);
enum log_level log_level(void);

void log_write(enum log_level level, const char *module, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

enum log_field_kind { LOG_FIELD_TEXT, LOG_FIELD_NUMBER, LOG_FIELD_BOOL };

struct log_field {
    const char *name;            /* a word of small letters and underscores */
    enum log_field_kind kind;
    const char *text;            /* one word, as far as the text format is to be split again */
    double number;
    int decimals;
    bool yes;
};

/* As log_write(), with fields; message is not a format. */
void log_event(enum log_level level, const char *module, const char *message,
               const struct log_field *fields, size_t n_fields);

#define log_error(module, ...) log_write(LOG_LEVEL_ERROR, module, __VA_ARGS__)
#define log_warn(module, ...)  log_write(LOG_LEVEL_WARN, module, __VA_ARGS__)
#define log_info(module, ...)  log_write(LOG_LEVEL_INFO, module, __VA_ARGS__)
#define log_debug(module, ...) log_write(LOG_LEVEL_DEBUG, module, __VA_ARGS__)

#endif
