/* Configuration files.  A file that is accepted prints as one that reads back
 * to the same; a refused one has a sentence. */

#include "engine/base/invariant.h"
#include "engine/base/strbuf.h"
#include "server/config.h"

#include <stdint.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The part of the print that another read can give. */
static void print(struct strbuf *out, const struct config *c)
{
    struct config shown = *c;

    shown.api_keys.n = 0;
    config_print(out, &shown);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct strbuf first = { 0 }, second = { 0 };
    struct config c, again;
    struct error err = { 0 };

    config_init(&c);
    if (config_parse_text(&c, (const char *)data, size, "fuzz.conf", &err) == ST_OK) {
        print(&first, &c);
        config_init(&again);
        ASSERT(config_parse_text(&again, first.data, first.n, "again.conf", &err) == ST_OK);
        print(&second, &again);
        ASSERT(strcmp(first.data, second.data) == 0);
        config_fini(&again);
    } else {
        ASSERT(strncmp(err.text, "fuzz.conf:", 10) == 0);
    }
    config_fini(&c);
    strbuf_fini(&first);
    strbuf_fini(&second);
    return 0;
}
