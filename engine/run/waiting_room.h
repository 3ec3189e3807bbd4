#ifndef WAITING_ROOM_H
#define WAITING_ROOM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* What is submitted and not yet admitted, in requests and prompt tokens, in
 * one word: entering is decided at once, with everybody counted, on any thread.
 * A burst is not let in whole because the engine has not looked yet. */

struct waiting_room {
    _Atomic uint64_t state;      /* requests << 40 | tokens */
    uint32_t max_requests;
    uint64_t max_tokens;         /* one request may always enter an empty room */
};

static inline uint32_t waiting_requests(const struct waiting_room *w)
{
    return (uint32_t)(atomic_load_explicit(&w->state, memory_order_relaxed) >> 40);
}

static inline uint64_t waiting_tokens(const struct waiting_room *w)
{
    return atomic_load_explicit(&w->state, memory_order_relaxed) & ((1ull << 40) - 1);
}

static inline bool waiting_enter(struct waiting_room *w, uint32_t tokens)
{
    uint64_t state = atomic_load_explicit(&w->state, memory_order_relaxed), next;

    do {
        uint64_t requests = state >> 40, held = state & ((1ull << 40) - 1);
        if (requests >= w->max_requests || (requests > 0 && held + tokens > w->max_tokens))
            return false;
        next = state + (1ull << 40) + tokens;
    } while (!atomic_compare_exchange_weak_explicit(&w->state, &state, next,
                                                    memory_order_relaxed,
                                                    memory_order_relaxed));
    return true;
}

static inline void waiting_leave(struct waiting_room *w, uint32_t tokens)
{
    atomic_fetch_sub_explicit(&w->state, (1ull << 40) + tokens, memory_order_relaxed);
}

#endif
