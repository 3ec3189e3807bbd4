#include "server/grammar_cache.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/grammar/grammar.h"

#include <pthread.h>
#include <stdint.h>
#include <string.h>

struct entry {
    const char *field;           /* NULL: free */
    char *text;
    size_t n;
    struct grammar *grammar;
    uint64_t used;
};

struct grammar_cache {
    pthread_mutex_t lock;
    uint64_t clock;
    struct entry entries[GRAMMAR_CACHE_ENTRIES];
};

struct grammar_cache *grammar_cache_create(void)
{
    struct grammar_cache *c = mem_calloc(1, sizeof *c);

    ASSERT(pthread_mutex_init(&c->lock, NULL) == 0);
    return c;
}

static void clear(struct entry *e)
{
    mem_free(e->text);
    grammar_release(e->grammar);
    *e = (struct entry){ 0 };
}

void grammar_cache_destroy(struct grammar_cache *c)
{
    if (!c)
        return;
    for (int i = 0; i < GRAMMAR_CACHE_ENTRIES; i++)
        clear(&c->entries[i]);
    pthread_mutex_destroy(&c->lock);
    mem_free(c);
}

static struct entry *find(struct grammar_cache *c, const char *field, const char *text, size_t n)
{
    for (int i = 0; i < GRAMMAR_CACHE_ENTRIES; i++) {
        struct entry *e = &c->entries[i];
        if (e->field && e->n == n && strcmp(e->field, field) == 0 && memcmp(e->text, text, n) == 0)
            return e;
    }
    return NULL;
}

struct grammar *grammar_cache_find(struct grammar_cache *c, const char *field, const char *text,
                                   size_t n)
{
    struct grammar *found = NULL;

    pthread_mutex_lock(&c->lock);
    struct entry *e = find(c, field, text, n);
    if (e) {
        e->used = ++c->clock;
        found = grammar_acquire(e->grammar);
    }
    pthread_mutex_unlock(&c->lock);
    return found;
}

void grammar_cache_add(struct grammar_cache *c, const char *field, const char *text, size_t n,
                       struct grammar *g)
{
    struct entry *oldest = c->entries;

    if (n > GRAMMAR_CACHE_TEXT_BYTES)
        return;
    pthread_mutex_lock(&c->lock);
    /* Two threads may have compiled the same. */
    if (!find(c, field, text, n)) {
        for (int i = 1; i < GRAMMAR_CACHE_ENTRIES; i++)
            if (c->entries[i].used < oldest->used)
                oldest = &c->entries[i];
        clear(oldest);
        *oldest = (struct entry){ field, mem_strndup(text, n), n, grammar_acquire(g), ++c->clock };
    }
    pthread_mutex_unlock(&c->lock);
}
