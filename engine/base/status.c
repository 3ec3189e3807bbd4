#include "engine/base/status.h"

#include <stdarg.h>
#include <stdio.h>

enum status error_set(struct error *err, enum status code, const char *fmt, ...)
{
    if (err) {
        va_list ap;
        va_start(ap, fmt);
        err->code = code;
        vsnprintf(err->text, sizeof err->text, fmt, ap);
        va_end(ap);
    }
    return code;
}

const char *status_name(enum status code)
{
    switch (code) {
    case ST_OK:
        return "OK";
#define X(name, value, text) \
    case ST_##name:          \
        return #name;
        STATUS_MAP(X)
#undef X
    }
    return "UNKNOWN";
}
