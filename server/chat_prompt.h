#ifndef SERVER_CHAT_PROMPT_H
#define SERVER_CHAT_PROMPT_H

#include "engine/base/status.h"
#include "engine/base/strbuf.h"
#include "engine/model/tokenizer.h"
#include "server/chat_format.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct cJSON;

/* A conversation, and how a model wants to read it.
 *
 * The text that a renderer writes is what the model's own template would write, byte for
 * byte.  Beside it stands who wrote which part: the format's own pieces are marked, and only
 * in those are control tokens tokens.  What clients send is text and nothing else, so a
 * message that quotes <|im_start|> cannot begin a turn.
 *
 * Pure, and only reads what it is given. */

enum chat_role { CHAT_SYSTEM, CHAT_USER, CHAT_ASSISTANT, CHAT_TOOL };
enum chat_switch { CHAT_UNSET, CHAT_OFF, CHAT_ON };

struct chat_call {
    const char *name;
    const char *spelling;          /* arguments as the client wrote them, or NULL */
    const struct cJSON *arguments; /* an object, prepared by json_dump_prepare() */
};

struct chat_message {
    enum chat_role role;
    const char *content;   /* never NULL */
    const char *reasoning; /* NULL: not given */
    const struct chat_call *calls;
    uint32_t n_calls;
};

struct chat {
    const struct chat_message *messages;
    uint32_t n_messages;             /* at least one */
    const struct cJSON *tools;       /* a non-empty array, prepared, or NULL */
    bool generate;                   /* end with the beginning of an assistant's turn */
    enum chat_switch thinking;       /* enable_thinking */
    enum chat_switch clear_thinking; /* GLM: off keeps the reasoning of earlier turns */
    const char *date;                /* "26 Jul 2024", or NULL: the format's own */
};

struct chat_prompt { /* zero-initialise */
    struct strbuf text;
    struct token_span *marked;
    size_t n_marked, capacity;
};
void chat_prompt_fini(struct chat_prompt *p);

/* Append c to the empty *out.  ST_INVALID with a sentence for what a format cannot say: tools
 * where it has none, several calls in a message where it takes one. */
enum status chat_render(struct chat_prompt *out, enum chat_format f, const struct chat *c,
                        struct error *err) MUST_USE;

#endif
