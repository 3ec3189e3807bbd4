#ifndef BASE_LOG_H
#define BASE_LOG_H

/* The log: one line to stderr per event, one write(2) per line, so lines of
 * different threads never mix.
 *
 *     2026-05-04T12:00:00.123Z I loop  http: listening on 127.0.0.1:8000
 *
 * Levels: error (someone must act), warn, info (start, summaries, end of a
 * request), debug.  Never in a step unless debug.  Any thread. */

enum log_level { LOG_LEVEL_ERROR, LOG_LEVEL_WARN, LOG_LEVEL_INFO, LOG_LEVEL_DEBUG };

void log_set_level(enum log_level level);
enum log_level log_level(void);

void log_write(enum log_level level, const char *module, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

#define log_error(module, ...) log_write(LOG_LEVEL_ERROR, module, __VA_ARGS__)
#define log_warn(module, ...)  log_write(LOG_LEVEL_WARN, module, __VA_ARGS__)
#define log_info(module, ...)  log_write(LOG_LEVEL_INFO, module, __VA_ARGS__)
#define log_debug(module, ...) log_write(LOG_LEVEL_DEBUG, module, __VA_ARGS__)

#endif
