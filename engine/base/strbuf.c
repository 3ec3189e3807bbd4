#include "engine/base/strbuf.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

char *strbuf_room(struct strbuf *b, size_t n)
{
    if (b->capacity - b->n <= n) {
        size_t want = b->n + n + 1;
        ASSERT(want > n);
        size_t grown = b->capacity + b->capacity / 2 + 64;
        b->capacity = want > grown ? want : grown;
        b->data = mem_realloc(b->data, b->capacity, 1);
    }
    return b->data + b->n;
}

void strbuf_add(struct strbuf *b, const char *s, size_t n)
{
    char *at = strbuf_room(b, n);

    if (n)
        memcpy(at, s, n);
    b->n += n;
    b->data[b->n] = '\0';
}

void strbuf_puts(struct strbuf *b, const char *s)
{
    strbuf_add(b, s, strlen(s));
}

void strbuf_printf(struct strbuf *b, const char *fmt, ...)
{
    va_list ap, again;
    char small[256];

    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(small, sizeof small, fmt, ap);
    va_end(ap);
    if (n > 0 && (size_t)n < sizeof small)
        strbuf_add(b, small, (size_t)n);
    else if (n > 0) {
        vsnprintf(strbuf_room(b, (size_t)n), (size_t)n + 1, fmt, again);
        b->n += (size_t)n;
    }
    va_end(again);
}

void strbuf_clear(struct strbuf *b)
{
    b->n = 0;
    if (b->data)
        b->data[0] = '\0';
}

void strbuf_fini(struct strbuf *b)
{
    mem_free(b->data);
    *b = (struct strbuf){ 0 };
}
