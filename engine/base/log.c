#include "engine/base/log.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static atomic_int current_level = LOG_LEVEL_INFO;

void log_set_level(enum log_level level)
{
    atomic_store_explicit(&current_level, (int)level, memory_order_relaxed);
}

enum log_level log_level(void)
{
    return (enum log_level)atomic_load_explicit(&current_level, memory_order_relaxed);
}

void log_write(enum log_level level, const char *module, const char *fmt, ...)
{
    char line[1024], thread[16] = "?";
    struct timespec ts;
    struct tm tm;
    va_list ap;

    if (level > log_level())
        return;
    clock_gettime(CLOCK_REALTIME, &ts);
    gmtime_r(&ts.tv_sec, &tm);
    pthread_getname_np(pthread_self(), thread, sizeof thread);
    size_t n = strftime(line, sizeof line, "%Y-%m-%dT%H:%M:%S", &tm);
    n += (size_t)snprintf(line + n, sizeof line - n, ".%03ldZ %c %-6s %s: ",
                          ts.tv_nsec / 1000000, "EWID"[level], thread, module);
    va_start(ap, fmt);
    int m = vsnprintf(line + n, sizeof line - n - 1, fmt, ap);
    va_end(ap);
    n += m < 0 ? 0 : (size_t)m < sizeof line - n - 1 ? (size_t)m : sizeof line - n - 2;
    /* A log line is one line, whatever the text that went into it. */
    for (char *p = line; p < line + n; p++)
        if ((unsigned char)*p < 0x20)
            *p = ' ';
    line[n++] = '\n';
    /* Nothing sensible can be done about a broken stderr. */
    if (write(STDERR_FILENO, line, n) < 0)
        return;
}
