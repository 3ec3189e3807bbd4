#include "engine/run/stop.h"

#include "engine/base/mem.h"

#include <string.h>

void stop_matcher_init(struct stop_matcher *m, const char *const *stops, uint32_t n_stops,
                       bool include_stop)
{
    *m = (struct stop_matcher){ .stops = stops, .n_stops = n_stops,
                                .include_stop = include_stop };
    for (uint32_t i = 0; i < n_stops; i++)
        if (strlen(stops[i]) > m->longest)
            m->longest = strlen(stops[i]);
    m->capacity = m->longest + 256;
    if (n_stops)
        m->text = mem_alloc(m->capacity);
}

void stop_matcher_fini(struct stop_matcher *m)
{
    mem_free(m->text);
    *m = (struct stop_matcher){ 0 };
}

char *stop_matcher_room(struct stop_matcher *m, size_t n)
{
    if (m->capacity - m->n < n) {
        m->capacity = m->n + n;
        m->text = mem_realloc(m->text, m->capacity, 1);
    }
    return m->text + m->n;
}

static void keep_last(struct stop_matcher *m, size_t keep)
{
    if (m->n <= keep)
        return;
    size_t drop = m->n - keep;
    memmove(m->text, m->text + drop, keep);
    m->offset += drop;
    m->n = keep;
}

int32_t stop_matcher_push(struct stop_matcher *m, size_t n, uint64_t *cut)
{
    int32_t found = -1;
    size_t first = 0;

    m->n += n;
    for (uint32_t i = 0; i < m->n_stops && n > 0; i++) {
        size_t length = strlen(m->stops[i]);
        const char *at = memmem(m->text, m->n, m->stops[i], length);
        if (!at || (found >= 0 && (size_t)(at - m->text) >= first))
            continue;
        found = (int32_t)i;
        first = (size_t)(at - m->text);
        *cut = m->offset + first + (m->include_stop ? length : 0);
    }
    if (found < 0)
        keep_last(m, m->longest ? m->longest - 1 : 0);
    return found;
}

void stop_matcher_forget(struct stop_matcher *m)
{
    keep_last(m, 0);
}
