#ifndef TESTS_SUPPORT_STREAMED_HISTORY_H
#define TESTS_SUPPORT_STREAMED_HISTORY_H

#include "tests/support/model_runner.h"

/* A prompt computed in chunks twice, beside a dense and a sparse decode: with all of its blocks on
 * the device, and with some or all of them in the host tier before each chunk, so that it is
 * streamed.  Then some tokens are decoded densely in the same way.  What the steps consist of is
 * the same both times, and so must be every result, to the bit. */
struct streamed_history {
    const char *dir;             /* model folder */
    struct backend *backend;     /* NULL: the CPU's */
    const char *isa;             /* as of struct runner_options */
    int prompt, chunk, decodes;
    uint64_t seed;
};

void streamed_history_run(const struct streamed_history *h);

#endif
