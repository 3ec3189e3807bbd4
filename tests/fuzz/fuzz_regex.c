/* Regular expressions.  Whatever comes in is refused with a sentence, or gives a grammar in which
 * every text that is begun can be ended, and none goes on that is over. */

#include "engine/base/invariant.h"
#include "engine/base/status.h"
#include "engine/grammar/grammar.h"

#include <stdint.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_STEPS = 200 };

/* A walk that takes bytes as the input has them, and else the first that fits. */
static void walk(struct grammar *g, const uint8_t *data, size_t size)
{
    struct grammar_matcher m;

    grammar_matcher_init(&m, g);
    for (size_t i = 0; i < MAX_STEPS && !grammar_matcher_is_complete(&m); i++) {
        char byte = (char)(size ? data[i % size] : 0);
        int tries = 0;
        while (tries < 256 && !grammar_matcher_advance(&m, &byte, 1)) {
            byte++;
            tries++;
        }
        ASSERT(tries < 256);
    }
    for (int byte = 0; byte < 256 && grammar_matcher_is_complete(&m); byte++)
        ASSERT(!grammar_matcher_advance(&m, &(char){ (char)byte }, 1));
    grammar_matcher_fini(&m);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct grammar *g = NULL;
    struct error err = { .text = "" };

    if (grammar_compile_regex(&g, (const char *)data, size, NULL, &err) == ST_OK)
        walk(g, data, size);
    else
        ASSERT(!g && err.code == ST_INVALID && strlen(err.text) > 0);
    grammar_release(g);
    return 0;
}
