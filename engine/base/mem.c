#include "engine/base/mem.h"

#include "engine/base/invariant.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static _Thread_local int forbidden_here;

static void *or_die(void *p, size_t bytes)
{
    if (!p) {
        fprintf(stderr, "out of memory: %zu bytes\n", bytes);
        abort();
    }
    return p;
}

static size_t product(size_t count, size_t bytes)
{
    size_t total;

    if (__builtin_mul_overflow(count, bytes, &total))
        or_die(NULL, SIZE_MAX);
    return total;
}

void *mem_alloc(size_t bytes)
{
    ASSERT(!forbidden_here);
    return or_die(malloc(bytes ? bytes : 1), bytes);
}

void *mem_calloc(size_t count, size_t bytes)
{
    ASSERT(!forbidden_here);
    size_t total = product(count, bytes);
    return or_die(calloc(total ? total : 1, 1), total);
}

void *mem_realloc(void *p, size_t count, size_t bytes)
{
    ASSERT(!forbidden_here);
    size_t total = product(count, bytes);
    return or_die(realloc(p, total ? total : 1), total);
}

char *mem_strndup(const char *s, size_t n)
{
    ASSERT(n < SIZE_MAX);
    char *copy = mem_alloc(n + 1);

    memcpy(copy, s, n);
    copy[n] = '\0';
    return copy;
}

char *mem_strdup(const char *s)
{
    return mem_strndup(s, strlen(s));
}

void mem_free(void *p)
{
    free(p);
}

/* mmap aligns to pages; for more, map too much and trim both ends. */
void *mem_map(size_t bytes, size_t align)
{
    const size_t page = 4096;
    size_t want = (bytes + page - 1) & ~(page - 1);
    size_t slack = align > page ? align : 0;

    ASSERT(align && (align & (align - 1)) == 0 && align <= (2u << 20));
    if (bytes == 0 || want < bytes || want > SIZE_MAX - slack)
        return NULL;
    char *p = mmap(NULL, want + slack, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    if (slack) {
        size_t head = (align - ((uintptr_t)p & (align - 1))) & (align - 1);
        if (head)
            munmap(p, head);
        if (slack - head)
            munmap(p + head + want, slack - head);
        p += head;
    }
    return p;
}

void mem_unmap(void *p, size_t bytes)
{
    if (p)
        munmap(p, (bytes + 4095) & ~(size_t)4095);
}

void mem_forbid(int forbidden)
{
    forbidden_here = forbidden;
}

/* Chunks grow with the arena, so n bytes cost O(log n) allocations. */
struct arena_chunk {
    struct arena_chunk *next;
    size_t size, used;
    _Alignas(16) unsigned char bytes[];
};

struct arena {
    struct arena_chunk *head;
    size_t used, max;
};

struct arena *arena_create(size_t max_bytes)
{
    struct arena *a = mem_calloc(1, sizeof *a);

    a->max = max_bytes;
    return a;
}

void arena_destroy(struct arena *a)
{
    if (!a)
        return;
    for (struct arena_chunk *c = a->head, *next; c; c = next) {
        next = c->next;
        mem_free(c);
    }
    mem_free(a);
}

void *arena_alloc(struct arena *a, size_t bytes)
{
    if (bytes > a->max || a->used > a->max - bytes || bytes > SIZE_MAX / 2)
        return NULL;
    size_t want = (bytes + 15) & ~(size_t)15;
    if (!a->head || a->head->size - a->head->used < want) {
        size_t size = a->used < 1024 ? 4096 : a->used;
        if (size < want)
            size = want;
        struct arena_chunk *c = mem_calloc(1, sizeof *c + size);
        c->size = size;
        c->next = a->head;
        a->head = c;
    }
    void *p = a->head->bytes + a->head->used;
    a->head->used += want;
    a->used += want;
    return p;
}

char *arena_strndup(struct arena *a, const char *s, size_t n)
{
    if (n == SIZE_MAX)
        return NULL;
    char *copy = arena_alloc(a, n + 1);

    if (copy)
        memcpy(copy, s, n);
    return copy;
}

size_t arena_used_bytes(const struct arena *a)
{
    return a->used;
}
