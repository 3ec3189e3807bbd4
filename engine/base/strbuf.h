#ifndef BASE_STRBUF_H
#define BASE_STRBUF_H

#include <stddef.h>

/* A growing string.  Zero-initialise; data is NULL until something is added,
 * and NUL-terminated afterwards.  Free with strbuf_fini.  One thread. */
struct strbuf {
    char *data;
    size_t n, capacity;
};

void strbuf_add(struct strbuf *b, const char *s, size_t n);
void strbuf_puts(struct strbuf *b, const char *s);
void strbuf_printf(struct strbuf *b, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
char *strbuf_room(struct strbuf *b, size_t n);    /* room for n more; then add to b->n */
void strbuf_clear(struct strbuf *b);              /* keeps the memory */
void strbuf_fini(struct strbuf *b);

#endif
