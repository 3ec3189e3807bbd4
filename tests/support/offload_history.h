#ifndef TESTS_SUPPORT_OFFLOAD_HISTORY_H
#define TESTS_SUPPORT_OFFLOAD_HISTORY_H

#include "tests/support/model_runner.h"

#include <stdint.h>

/* Random texts decoded twice: with everything on the device, and with blocks that leave it and
 * come back at any time.  Token for token and bit for bit both must say the same.
 *
 * In every step each of the `sparse` + `dense` sequences goes on: with a piece of its prompt or
 * with the token it chose last.  One that has reached its length ends, and another text begins in
 * its place.  What the steps consist of is the same both times.  The second time some of the
 * sparse ones have a set of hot rows: there are fewer sets than sequences, so that sets are
 * reused.  Blocks then leave and return one by one or all at once. */
struct offload_history {
    const char *dir;             /* model folder */
    struct backend *backend;     /* NULL: the CPU's */
    const char *isa;             /* as of struct runner_options */
    struct select_config select;
    int sparse, dense, sets, rows_per_head;
    int max_prompt, min_decodes, max_decodes, steps;
    uint64_t seed;
};

/* Fails the test where the two differ, where the counters are not those of what was chosen, and
 * where nothing was found in the sets, fetched or read on the device. */
void offload_history_run(const struct offload_history *h);

#endif
