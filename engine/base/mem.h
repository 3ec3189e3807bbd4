#ifndef BASE_MEM_H
#define BASE_MEM_H

#include <stddef.h>

/* Host memory.  Allocation aborts the process when memory is gone: on a
 * machine with overcommit the polite answer never comes.  Sizes are products
 * checked against overflow; pass the count and the element size.  Any thread.
 *
 * A thread that must not allocate (the engine inside a step) says so with
 * mem_forbid(true); from then on an allocation by it breaks an invariant. */

#ifdef __cplusplus
extern "C" {
#endif

void *mem_alloc(size_t bytes);                     /* contents undefined; never NULL */
void *mem_calloc(size_t count, size_t bytes);      /* zeroed */
void *mem_realloc(void *p, size_t count, size_t bytes);
char *mem_strdup(const char *s);
char *mem_strndup(const char *s, size_t n);        /* copies n bytes, appends a NUL */
void mem_free(void *p);                            /* NULL is fine */

/* Aligned to align (a power of two, at most 2 MiB); zeroed lazily by the
 * kernel, so untouched pages cost nothing.  Release with mem_unmap and the
 * same size.  NULL when the kernel refuses: the one allocation that may fail,
 * for the large regions of the engine. */
void *mem_map(size_t bytes, size_t align);
void mem_unmap(void *p, size_t bytes);

/* Parts of one stretch of memory: n elements from *at on, which moves behind them to the next
 * multiple of 256 bytes.  With a NULL base the same code measures, and gives NULL. */
static inline void *mem_carve(char *base, size_t *at, size_t n, size_t element_bytes)
{
    void *part = base ? base + *at : NULL;

    *at += (n * element_bytes + 255) / 256 * 256;
    return part;
}

void mem_forbid(int forbidden);                    /* this thread only */

/* A bump allocator with an upper limit, freed as a whole.  Not thread-safe.
 * arena_alloc returns NULL when the limit would be passed: arenas hold what
 * clients send, and a client's excess is the client's error. */
struct arena;
struct arena *arena_create(size_t max_bytes);
void arena_destroy(struct arena *a);               /* NULL is fine */
void *arena_alloc(struct arena *a, size_t bytes);  /* 16-byte aligned, zeroed */
char *arena_strndup(struct arena *a, const char *s, size_t n);
size_t arena_used_bytes(const struct arena *a);

#ifdef __cplusplus
}
#endif
#endif
