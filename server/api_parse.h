#ifndef SERVER_API_PARSE_H
#define SERVER_API_PARSE_H

#include "engine/grammar/grammar.h"
#include "server/api.h"
#include "server/json_scan.h"

#include <cjson/cJSON.h>

/* What the files behind the parsers of api.h share; nobody else includes it but the test that
 * compares the fields with server/openapi.json. */

/* Whose body it is, a bit each. */
enum api_endpoint { API_TEXT = 1, API_CHAT = 2, API_TOKENIZE = 4, API_DETOKENIZE = 8 };

/* A field of the body: its tree and its text. */
struct api_value {
    const cJSON *tree; /* NULL: absent or null */
    const char *text;
    size_t text_bytes;
    bool fraction; /* see json_scan.h */
};

/* The fields as written, checked one by one but not against each other. */
struct api_fields {
    struct api_value model, prompt, stop, stop_ids, bias, stream_options, cache_salt, attention;
    struct api_value messages, tools, tool_choice, template_kwargs, enable_thinking, tokens;
    struct api_value response_format, structured_outputs, guided_json, guided_regex, guided_choice;
    int64_t max_tokens, min_tokens, n, top_k, seed;
    int64_t best_of, logprobs; /* -1: absent, like */
    int64_t top_logprobs, max_completion_tokens;
    double temperature, top_p, min_p, presence, frequency, repetition;
    bool stream, include_usage, echo, has_seed;
    bool ignore_eos, include_stop, skip_special, add_special;
    bool want_logprobs, parallel_calls, generate, return_strings;
};

enum api_field_kind {
    FIELD_INT,    /* int64_t */
    FIELD_NUMBER, /* double */
    FIELD_SEED,   /* any 64-bit integer; seed and has_seed */
    FIELD_BOOL,   /* bool */
    FIELD_STRING, /* struct api_value */
    FIELD_ANY,    /* struct api_value, read by its own function later */
    FIELD_IGNORED /* a string or an object that changes nothing */
};

/* A field that is honoured, and where it goes in struct api_fields. */
struct api_field {
    const char *name;
    enum api_field_kind kind;
    size_t offset;
    double min, max; /* inclusive */
    bool above_min;  /* min itself is out */
    unsigned where;  /* enum api_endpoint; 0: completions, text and chat */
};

struct api_parse {
    enum api_endpoint endpoint;
    const struct api_context *cx;
    struct api_error *err;
    struct api_fields fields;
    struct api_completion *out;
    /* Of a chat, once it is read: */
    bool must_call;        /* the answer is calls, */
    const char *only_tool; /* of this function, or NULL: of any */
};

/* Fill the error and return ST_INVALID.  The sentence should name the field. */
enum status api_refuse(struct api_parse *p, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Names that clients sent, cut to what a sentence can carry. */
int api_quotable_bytes(const char *s);

/* api_parse_fields.c: fill p->fields from the members of root, in one pass. */
enum status api_read_fields(struct api_parse *p, const cJSON *root,
                            const struct json_scan *scan, const char *body) MUST_USE;

const struct api_field *api_field_table(size_t *n);
bool api_field_is_of(const struct api_field *f, enum api_endpoint endpoint);

/* api_parse_prompt.c: p->out->prompts.  max_tokens must be checked before. */
enum status api_read_prompts(struct api_parse *p) MUST_USE;
/* How many choices there will be; before tokenising, which is the expensive part. */
enum status api_check_choices(struct api_parse *p, uint32_t n_prompts) MUST_USE;
/* Make list prompt number i, which must fit the model and its context. */
enum status api_keep_ids(struct api_parse *p, const struct token_list *list,
                         uint32_t i) MUST_USE;
enum status api_refuse_length(struct api_parse *p, uint64_t n_prompt, bool exact) MUST_USE;
/* Id number i of a list, of JSON number v. */
enum status api_read_id(struct api_parse *p, const char *param, const cJSON *v, size_t i,
                        int32_t *out) MUST_USE;

/* api_parse_chat.c: the conversation as out->prompts[0], and out->chat. */
enum status api_read_chat(struct api_parse *p) MUST_USE;
/* The ids of the conversation alone. */
enum status api_read_conversation(struct api_parse *p, struct token_list *list,
                                  size_t max_ids) MUST_USE;

/* api_parse.c: the body as a tree, its fields read and the model checked.  *root is to be
 * deleted whatever the result is. */
enum status api_read_body(struct api_parse *p, cJSON **root, const char *body,
                          size_t n) MUST_USE;
void api_parse_init(struct api_parse *p, enum api_endpoint endpoint,
                    const struct api_context *cx, struct api_error *err);

/* api_parse_guided.c: p->out->grammar and its template's, out of response_format,
 * structured_outputs, guided_* and tool_choice.  A chat must be read before. */
enum status api_read_guided(struct api_parse *p) MUST_USE;

/* api_parse_turn.c: what the chat's format and tools put around a structure. */
struct api_turn {
    struct grammar_turn grammar;
    cJSON *tools; /* what the calls' schemas are parts of */
};
/* *t is to be finished whatever the result is. */
enum status api_read_turn(struct api_parse *p, struct api_turn *t) MUST_USE;
void api_turn_fini(struct api_turn *t);
/* The sentence of a grammar that was not made, for the tool whose schema it is about or for the
 * field. */
enum status api_refuse_turn(struct api_parse *p, const struct api_turn *t, const char *field,
                            const struct error *err);

/* Zeroed memory of the completion; refuses the request when there is too much. */
enum status api_alloc(struct api_parse *p, void **out, size_t count, size_t bytes) MUST_USE;

#endif
