#ifndef SERVER_CHAT_OUTPUT_H
#define SERVER_CHAT_OUTPUT_H

#include "engine/base/strbuf.h"
#include "server/chat_format.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What a chat model writes, taken apart as it comes: thoughts, text, tool calls.
 *
 *     START --> REASONING --> SPACE --> CONTENT --> CALL --> ARGUMENTS --> (SPACE)
 *
 * Rules:
 *   1. The parts do not depend on where the text was cut into tokens.
 *   2. No part ends in something that may be the beginning of a marker.
 *   3. Nothing is lost: a tool call that cannot be read is content, as it was written.  What
 *      separates the parts (markers and the line ends around them) belongs to none.
 *   4. Arguments are passed on as they come, once it is known whose they are, so those of a
 *      broken or unfinished call can be broken JSON; clients have to expect that of models.
 *
 * The text lives elsewhere and may only grow.  One thread; no clock, no sockets. */

enum chat_part { CHAT_REASONING, CHAT_CONTENT, CHAT_CALL, CHAT_ARGUMENTS };

struct chat_delta {
    enum chat_part part;
    const char *s; /* until the next call; of a CHAT_CALL the function's name */
    size_t n;
    uint32_t call; /* which one, from 0 */
};

/* Of a function what its calls need: which arguments can only be strings. */
struct chat_tool {
    const char *name;
    const char *const *strings;
    uint32_t n_strings;
};

struct chat_output_config {
    enum chat_format format;
    bool may_think;     /* otherwise markers of thoughts are text */
    bool open_thoughts; /* and the prompt has begun them */
    bool one_call;      /* leave out all but the first */
    const struct chat_tool *tools;
    uint32_t n_tools; /* 0: calls are text */
};

struct chat_output {
    struct chat_output_config cfg;
    int state;
    size_t at;               /* bytes of the text that are dealt with */
    size_t scan;             /* how far what is waited for has been looked for */
    size_t body;             /* where the call's body begins */
    uint32_t n_calls;        /* that have begun */
    bool skip_blanks;        /* at the beginning of content */
    bool in_string, escaped; /* in arguments, like */
    uint32_t depth;
    bool has_pair, may_be_json; /* the value that is being read */
    bool thought; /* there were thoughts, up to */
    size_t thoughts_end;
    struct strbuf name, scratch;
    const struct chat_tool *tool;
};

void chat_output_init(struct chat_output *o, const struct chat_output_config *cfg);
void chat_output_fini(struct chat_output *o); /* a zeroed one is fine */

/* The next part of text[0..n), or false until there is more.  final: this is all. */
bool chat_output_next(struct chat_output *o, const char *text, size_t n, bool final,
                      struct chat_delta *out);

#endif
