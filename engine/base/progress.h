#ifndef PROGRESS_H
#define PROGRESS_H

#include <stdatomic.h>
#include <stdint.h>

/* How far something slow has come, in bytes.  Those who do it add, any thread reads; each adds
 * to the total first, which is 0 before.  A reader may see done a moment late, never ahead of
 * the total. */
struct progress {
    _Atomic uint64_t done_bytes, total_bytes;
};

#endif
