/* What models write.  The first byte picks the format, the second the size of the steps in
 * which the text comes: the parts must be the same as of the text as a whole. */

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"
#include "server/chat_output.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char *const strings[] = { "city" };
static const struct chat_tool tools[] = { { .name = "f", .strings = strings, .n_strings = 1 } };

/* The parts one behind the other; a change of kind or call is written down. */
static void read_all(struct strbuf *out, const struct chat_output_config *cfg, const char *text,
                     size_t n, size_t step)
{
    struct chat_output o;
    struct chat_delta d;
    int part = -1;
    size_t at = 0, rounds = 0;

    strbuf_puts(out, "");
    chat_output_init(&o, cfg);
    do {
        at = at + step < n ? at + step : n;
        while (chat_output_next(&o, text, at, at == n, &d)) {
            ASSERT(d.n > 0 && ++rounds <= 4 * n + 16);
            ASSERT(d.part != CHAT_ARGUMENTS || d.call < o.n_calls);
            if (part != (int)d.part || d.part == CHAT_CALL)
                strbuf_printf(out, "|%d.%u|", (int)d.part, d.call);
            part = (int)d.part;
            strbuf_add(out, d.s, d.n);
        }
        ASSERT(o.at <= at);
    } while (at < n);
    ASSERT(o.at == n);
    chat_output_fini(&o);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct strbuf whole = { 0 }, steps = { 0 };

    if (size < 2 || !utf8_is_valid((const char *)data + 2, size - 2))
        return 0;
    struct chat_output_config cfg = {
        .format = CHAT_PLAIN + data[0] % (CHAT_N_FORMATS - CHAT_PLAIN),
        .may_think = data[1] & 1,
        .open_thoughts = (data[1] & 3) == 3,
        .one_call = data[1] & 4,
        .tools = tools,
        .n_tools = data[1] & 8 ? 0 : 1,
    };
    size_t n = size - 2;
    char *text = mem_alloc(n + 1); /* and one more, so that NULL is never passed */
    memcpy(text, data + 2, n);
    read_all(&whole, &cfg, text, n, n + 1);
    read_all(&steps, &cfg, text, n, 1 + data[1] / 16);
    ASSERT(whole.n == steps.n && memcmp(whole.data, steps.data, whole.n) == 0);
    mem_free(text);
    strbuf_fini(&whole);
    strbuf_fini(&steps);
    return 0;
}
