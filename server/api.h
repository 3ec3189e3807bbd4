#ifndef SERVER_API_H
#define SERVER_API_H

#include "engine/base/status.h"
#include "engine/model/tokenizer.h"
#include "engine/run/request.h"
#include "server/chat_format.h"
#include "server/chat_output.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct arena;
struct grammar;             /* engine/grammar/grammar.h */
struct grammar_cache;       /* server/grammar_cache.h */
struct model_config;
struct strbuf;              /* engine/base/strbuf.h */

/* The OpenAI wire format of /v1/completions and /v1/chat/completions: bodies to
 * native types and back; and the two small calls of /tokenize and /detokenize.
 *
 * Pure: no sockets, no engine, no clock (but for the date in Llama 3.2's
 * prompts).  What parses may run on a thread of the libuv pool; it touches only
 * what it is given.  JSON trees die inside; what a completion refers to lives
 * in its arena. */

/* A refusal, as the client will see it.  message is one sentence and names the
 * field, the value's problem and the limit. */
struct api_error {
    int http;                /* 400, 404, ... */
    const char *type;        /* "invalid_request_error", ...: static strings */
    const char *code;        /* "context_length_exceeded", ..., or NULL */
    uint32_t retry_after_s;  /* of 429 and 503; 0: a few */
    char param[64];          /* "" is null */
    char message[400];
};

struct api_limits {
    uint32_t max_model_len;  /* prompt + completion tokens */
    uint32_t max_choices;    /* prompts * max(n, best_of) */
    uint32_t max_prompts;
    uint32_t max_stops, max_stop_bytes;
    uint32_t max_bias;
    uint32_t max_logprobs;   /* <= SAMPLE_MAX_TOP */
    uint64_t max_logprob_entries; /* choices * tokens * (1 + logprobs), prompt included if echoed */
    size_t max_json_values;  /* elements in the body, all levels */
    size_t max_arena_bytes;
};

struct api_context {
    const struct tokenizer *tokenizer;
    const struct model_config *model;   /* defaults of sampling, vocab */
    const char *const *model_names;     /* accepted in "model", the first is the canonical one */
    int n_model_names;
    enum chat_format chat;   /* CHAT_NONE: chat is refused, because */
    const char *no_chat;     /* of this, half a sentence */
    struct grammar_cache *grammars;     /* or NULL: none is kept */
    struct api_limits limits;
};

struct api_prompt {
    const int32_t *ids;      /* in the arena */
    uint32_t n_ids;
    const char *text;        /* with echo, else NULL: as echo returns it; ids are detokenised,
                                special tokens included */
    size_t text_bytes;
};

struct api_completion {
    struct arena *arena;     /* owns everything below but the grammar */
    struct grammar *grammar; /* that its choices follow, or NULL; its own reference */
    struct api_prompt *prompts;
    uint32_t n_prompts;
    uint32_t n, best_of;     /* best_of >= n */
    bool stream, include_usage, echo;
    int logprobs;            /* -1: not asked for */
    bool has_seed;           /* else template.seed is to be drawn by the caller, one a choice */
    const char *model;       /* as written by the client, or the canonical name */
    /* Of the template's stops and stop ids, how many the client gave; those behind are the
     * chat format's, and no client is told of them. */
    uint32_t n_own_stops, n_own_stop_ids;
    const struct chat_output_config *chat;    /* how to read the output, or NULL: as text */
    /* Everything else of a request, the same for all: sampling, stops, biases,
     * max_tokens, min_tokens, sparse, n_top, score_prompt.  Not for submission itself. */
    struct request template;
};

/* Returns NULL and fills *err, or a completion to be freed with
 * api_completion_free(). */
struct api_completion *api_parse_completion(const char *body, size_t n,
                                            const struct api_context *cx,
                                            struct api_error *err);
struct api_completion *api_parse_chat(const char *body, size_t n, const struct api_context *cx,
                                      struct api_error *err);
void api_completion_free(struct api_completion *c);    /* NULL is fine */

/* /tokenize and /detokenize: append the answer's document to out, or fill *err. */
enum status api_tokenize(struct strbuf *out, const char *body, size_t n,
                         const struct api_context *cx, struct api_error *err) MUST_USE;
enum status api_detokenize(struct strbuf *out, const char *body, size_t n,
                           const struct api_context *cx, struct api_error *err) MUST_USE;

/* Whether a body may ask for structured output or forced calls, which take as much as seconds to
 * compile. */
bool api_mentions_guided(const char *body, size_t n);

/* One choice's part of an answer, for the writers below. */
struct api_piece {
    uint32_t index;
    const char *text;        /* valid UTF-8 */
    size_t text_bytes;
    const char *finish_reason;  /* NULL: null */
    int32_t stop_id;         /* stop_reason extension: id, */
    const char *stop_string; /* or string, or neither (-1, NULL) */
    /* Legacy logprobs: n_tokens entries, or logprobs == false. */
    bool logprobs;
    uint32_t n_tokens;
    const int32_t *ids;
    const struct token_logprob *chosen; /* [n_tokens]; id -1: null (first prompt token) */
    const struct token_logprob *top;    /* [n_tokens, n_top] or NULL */
    uint32_t n_top;
    const uint64_t *offsets; /* [n_tokens] where each begins in the text, in code points */
    /* Of a chat: what the text of a chunk is, or the whole message. */
    bool role;               /* the first chunk, which says who speaks and has no text */
    enum chat_part part;
    uint32_t call;           /* which one, and of a CHAT_CALL its id; the text is its name */
    const char *call_id;
    const struct api_message *message;
};

enum { API_CALL_ID_BYTES = 32 };

struct api_call {
    char id[API_CALL_ID_BYTES];
    struct strbuf name, arguments;
};

struct api_message {
    struct strbuf content, reasoning;
    struct api_call *calls;
    uint32_t n_calls;
};

struct api_usage {
    uint64_t prompt_tokens, completion_tokens, cached_tokens;
    bool chat;                   /* then it says as well how many of the completion's were */
    uint64_t reasoning_tokens;   /* thoughts */
};

struct api_head {            /* the same in every chunk of an answer */
    const char *id;          /* "cmpl-...", "chatcmpl-..." */
    const char *model;
    int64_t created;         /* Unix seconds */
};

/* Append a whole JSON document to out.  usage NULL: left out of a response,
 * null in a chunk when usage_null says that the client asked for usage. */
void api_write_completion(struct strbuf *out, const struct api_head *head,
                          const struct tokenizer *t, const struct api_piece *pieces,
                          uint32_t n_pieces, const struct api_usage *usage, bool usage_null);
/* Of a chat: the answer as a whole, or a chunk of it. */
void api_write_chat(struct strbuf *out, const struct api_head *head, const struct tokenizer *t,
                    const struct api_piece *pieces, uint32_t n_pieces,
                    const struct api_usage *usage);
void api_write_chat_chunk(struct strbuf *out, const struct api_head *head,
                          const struct tokenizer *t, const struct api_piece *piece,
                          const struct api_usage *usage, bool usage_null);
void api_write_error(struct strbuf *out, const struct api_error *err);
void api_write_models(struct strbuf *out, const char *const *names, int n_names,
                      int64_t created, uint32_t max_model_len, bool one);

/* Append s as a JSON string with its quotes.  Invalid UTF-8 becomes U+FFFD. */
void api_write_string(struct strbuf *out, const char *s, size_t n);

#endif
