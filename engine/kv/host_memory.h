#ifndef HOST_MEMORY_H
#define HOST_MEMORY_H

#include "engine/base/status.h"

#include <stddef.h>
#include <stdint.h>

struct backend;

/* The memory of the host tier: one range of addresses, pinned piece by piece in the background.
 *
 * Pinning costs the better part of a second for each GiB, so a server must not wait for it.
 * host_memory_create() checks limits, reserves the addresses and returns; a thread of its own
 * touches each piece with several threads (pages are zeroed by all cores), registers it with the
 * back end, and then counts it as ready.  What is ready is usable while the rest is not.
 *
 * Checked at create, so that a machine that cannot do it says so at start:
 *   - bytes against the memory that the machine (or its cgroup) has available;
 *   - RLIMIT_MEMLOCK where the back end's pinning counts against it, which is found out by pinning
 *     a little more: the message names the limit and how to raise it (LimitMEMLOCK=infinity,
 *     docker --ulimit memlock=-1).
 * A piece that fails later ends the growth: what is ready stays so, host_memory_failure() says why.
 *
 * create and destroy: one thread.  The rest: any. */

struct host_memory;

enum {
    HOST_MEMORY_PIECE_MB = 1024      /* registered at a time */
};

/* A copy stays within what was registered at a time: bytes from `at`, counted from the base, to the
 * end of its piece. */
static inline size_t host_memory_left_in_piece(size_t at)
{
    const size_t piece = (size_t)HOST_MEMORY_PIECE_MB << 20;

    return piece - at % piece;
}

/* bytes > 0.  ready() is called on the background thread whenever the ready bytes have grown or
 * growth has ended; NULL is fine. */
enum status host_memory_create(struct host_memory **out, struct backend *be, size_t bytes,
                               void (*ready)(void *arg), void *arg, struct error *err) MUST_USE;
/* Ends the background thread and gives everything back.  Nothing may use it any more.  NULL is
 * fine. */
void host_memory_destroy(struct host_memory *m);

/* The same address is valid on the device. */
void *host_memory_base(const struct host_memory *m);
size_t host_memory_ready_bytes(const struct host_memory *m);
/* Fills *err and returns its code when growth ended early, else ST_OK. */
enum status host_memory_failure(const struct host_memory *m, struct error *err);

#endif
