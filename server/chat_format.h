#ifndef SERVER_CHAT_FORMAT_H
#define SERVER_CHAT_FORMAT_H

#include "engine/base/status.h"

#include <stdbool.h>
#include <stddef.h>

#define CHAT_THINK "<think>"
#define CHAT_THINK_END "</think>"
#define CHAT_TOOL_CALL "<tool_call>"
#define CHAT_TOOL_CALL_END "</tool_call>"
#define CHAT_ARG_KEY "<arg_key>"
#define CHAT_ARG_KEY_END "</arg_key>"
#define CHAT_ARG_VALUE "<arg_value>"
#define CHAT_ARG_VALUE_END "</arg_value>"

struct grammar_pairs;
struct tokenizer;

/* The ways in which models want a conversation written.
 *
 * A model's folder says it with a chat template, a program in a template language.  This
 * server does not run programs of model folders: it knows the formats of the models that it
 * serves, compares itself with their templates byte for byte in its tests, and recognises a
 * template by marks in its text.  A template that is none of these, or that has marks of two,
 * is refused for chat, because a conversation written wrongly still gets an answer, only a
 * worse one. */

enum chat_format {            /* in the order of the option's words */
                   CHAT_AUTO, /* as the folder says; never a result */
                   CHAT_NONE,
                   CHAT_PLAIN,   /* "User: text"; only when asked for */
                   CHAT_CHATML,  /* turns between <|im_start|> and <|im_end|>, nothing else */
                   CHAT_SMOLLM2, /* with a system turn of its own where there is none */
                   CHAT_QWEN25,
                   CHAT_QWEN3,                /* thinks or not, as enable_thinking says */
                   CHAT_QWEN3_THINKING,       /* always thinks: Thinking-2507 */
                   CHAT_QWEN3_INSTRUCT,       /* never does: Instruct-2507 */
                   CHAT_QWEN3_INSTRUCT_EARLY, /* its first template, which has thoughts */
                   CHAT_GLM47,
                   CHAT_LLAMA3,
                   CHAT_LLAMA31,
                   CHAT_LLAMA32, /* like 3.1, but with today's date */
                   CHAT_N_FORMATS
};
#define CHAT_FORMAT_WORDS                                                                      \
    "auto|none|plain|chatml|smollm2|qwen2.5|qwen3|qwen3-thinking|qwen3-instruct|"              \
    "qwen3-instruct-early|glm-4.7|llama-3|llama-3.1|llama-3.2"

enum { CHAT_MAX_ENDS = 4, CHAT_MAX_CONTROLS = 4 };

/* A call: head, name, middle, arguments, tail. */
struct chat_call_syntax {
    const char *head, *middle, *tail;
    const struct grammar_pairs *pairs; /* how arguments are written, or NULL: as JSON */
    const char *between; /* what separates two, or NULL: there is one a message */
    const char *marker;  /* what head begins with, or NULL */
};

/* What there is to know about a format beside how it is rendered and parsed. */
struct chat_format_facts {
    const char *name;
    bool tools, thinks;
    bool verbatim;                           /* arguments of calls are put as they were sent */
    const char *ends[CHAT_MAX_ENDS];         /* tokens that end the model's turn */
    const char *controls[CHAT_MAX_CONTROLS]; /* tokens without which it makes no sense */
    const char *stop;                        /* a string that ends its turn, or NULL */
    const struct chat_call_syntax *calls;    /* NULL: it has none */
};
const struct chat_format_facts *chat_format_facts(enum chat_format f);

/* Which format a template's text is of.  ST_UNSUPPORTED with a sentence. */
enum status chat_format_recognise(enum chat_format *out, const char *source,
                                  struct error *err) MUST_USE;

/* The format of a model's folder: its chat_template.jinja, or else chat_template in its
 * tokenizer_config.json, a string or a list of named ones.  wanted is the operator's word,
 * and wins unless it is CHAT_AUTO.  The tokenizer has to have the format's tokens.  On
 * failure *out is CHAT_NONE and the sentence says why there is no chat. */
enum status chat_format_find(enum chat_format *out, enum chat_format wanted, const char *folder,
                             const struct tokenizer *t, struct error *err) MUST_USE;

#endif
