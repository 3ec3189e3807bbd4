#ifndef SERVER_GRAMMAR_CACHE_H
#define SERVER_GRAMMAR_CACHE_H

#include <stddef.h>

struct grammar;

/* Grammars that were asked for lately, by the field that asked and a text that says all of the rest
 * that they follow from.
 *
 * Programs ask for the same structure again and again.  With the grammar they find its states and
 * masks, which cost more than compiling it.  The least recently used makes room; what is not here
 * any more lives as long as its last request.  Any thread. */

struct grammar_cache;

enum { GRAMMAR_CACHE_ENTRIES = 16, GRAMMAR_CACHE_TEXT_BYTES = 256 << 10 };

struct grammar_cache *grammar_cache_create(void);
void grammar_cache_destroy(struct grammar_cache *c);     /* NULL is fine */

/* NULL, or one to be released by the caller. */
struct grammar *grammar_cache_find(struct grammar_cache *c, const char *field, const char *text,
                                   size_t n);
/* field is a literal; text is copied, and the grammar acquired.  Too long a text is not kept. */
void grammar_cache_add(struct grammar_cache *c, const char *field, const char *text, size_t n,
                       struct grammar *g);

#endif
