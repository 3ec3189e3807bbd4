#ifndef PROGRESS_H
#define PROGRESS_H

#include <stdatomic.h>
#include <stdint.h>

/* How far something slow has come, in bytes.  Those who do it add, any thread reads; the
 * total is set first, and is 0 before.  A reader may see done a moment late, never ahead of
 * the total. */
struct progress {
    _Atomic uint64_t done_bytes, total_bytes;
};

#endif
