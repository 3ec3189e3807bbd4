#include "engine/kv/host_copy.h"

#include "engine/kv/host_memory.h"
#include "kernels/backend.h"

struct parts {
    const char *tier;
    size_t slot_bytes, offset, bytes;
};

static size_t start_of(const struct parts *p, int32_t slot)
{
    return (size_t)slot * p->slot_bytes + p->offset;
}

/* The part of a slot ends in the piece that it begins in. */
static bool is_in_one_piece(const struct parts *p, int32_t slot)
{
    return p->bytes <= host_memory_left_in_piece(start_of(p, slot));
}

/* How many slots from the first on can go in one copy. */
static int run_of(const struct parts *p, const int32_t *slots, int n)
{
    size_t first = start_of(p, slots[0]), left = host_memory_left_in_piece(first);
    int run = 1;

    while (run < n && slots[run] == slots[0] + run &&
           start_of(p, slots[run]) + p->bytes <= first + left)
        run++;
    return run;
}

static void copy_across(struct stream *s, char *to, const struct parts *p, int32_t slot)
{
    size_t from = start_of(p, slot), n = host_memory_left_in_piece(from);

    stream_copy(s, to, p->tier + from, n);
    stream_copy(s, to + n, p->tier + from + n, p->bytes - n);
}

void host_copy_parts(struct stream *s, void *to, const void *tier, size_t slot_bytes,
                     size_t offset, size_t bytes, const int32_t *slots, int n)
{
    const struct parts p = { tier, slot_bytes, offset, bytes };
    char *at = to;

    for (int i = 0, run; i < n; i += run, at += (size_t)run * bytes) {
        run = 1;
        if (!is_in_one_piece(&p, slots[i])) {
            copy_across(s, at, &p, slots[i]);
            continue;
        }
        run = run_of(&p, slots + i, n - i);
        stream_copy_pieces(s, at, bytes, p.tier + start_of(&p, slots[i]), slot_bytes, bytes,
                           (size_t)run);
    }
}
