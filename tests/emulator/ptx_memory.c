/* Memory of the emulator's own, and what memory kernels may touch: ranges in ascending order, which
 * do not overlap. */

#include "tests/emulator/ptx_code.h"

#include <stdlib.h>
#include <string.h>

void *ptx_new(size_t n, size_t bytes)
{
    void *p = calloc(n ? n : 1, bytes);

    if (!p)
        abort();
    return p;
}

void *ptx_more(void *p, size_t n, size_t bytes)
{
    void *more = realloc(p, n * bytes);

    if (!more)
        abort();
    return more;
}

struct range {
    uintptr_t from, end;
    bool writable;
};

static struct range *ranges, last;
static int n_ranges, most_ranges;

/* The first that ends behind p. */
static int find(uintptr_t p)
{
    int from = 0, n = n_ranges;

    while (from < n) {
        int middle = (from + n) / 2;
        if (ranges[middle].end <= p)
            from = middle + 1;
        else
            n = middle;
    }
    return from;
}

void ptx_memory_add(const void *p, size_t bytes, bool writable)
{
    uintptr_t from = (uintptr_t)p;

    int at = find(from);
    if (n_ranges == most_ranges) {
        most_ranges = most_ranges ? 2 * most_ranges : 64;
        ranges = ptx_more(ranges, (size_t)most_ranges, sizeof *ranges);
    }
    memmove(ranges + at + 1, ranges + at, (size_t)(n_ranges++ - at) * sizeof *ranges);
    ranges[at] = (struct range){ from, from + bytes, writable };
}

void ptx_memory_remove(const void *p)
{
    int at = find((uintptr_t)p);
    if (at == n_ranges || ranges[at].from != (uintptr_t)p)
        abort();
    memmove(ranges + at, ranges + at + 1, (size_t)(--n_ranges - at) * sizeof *ranges);
    last = (struct range){ 0, 0, false };
}

bool ptx_memory_allows(const void *p, size_t bytes, bool write)
{
    uintptr_t at = (uintptr_t)p;

    if (at < last.from || at + bytes > last.end) {
        int i = find(at);
        if (i < n_ranges && ranges[i].from <= at)
            last = ranges[i];
    }
    return at >= last.from && at + bytes <= last.end && (last.writable || !write);
}
