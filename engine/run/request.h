#ifndef REQUEST_H
#define REQUEST_H

#include "engine/base/mailbox.h"
#include "engine/base/status.h"
#include "kernels/ops.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* One sequence that a client asked for, in native types: no JSON, no sockets.
 * A completion with n choices is n requests that share their prompt.
 *
 * Fields are grouped by who may touch them and when.  A request is created on
 * the loop thread, travels to one engine and comes home with MSG_DONE; see
 * engine.h.
 *
 * Output.  The engine appends to the arrays below and then publishes the
 * count; the loop reads n_output (acquire) and may read every entry below it.
 * The arrays hold max_tokens entries from the start, so a slow client never
 * stalls a step. */

enum finish {
    FINISH_NONE,
    FINISH_STOP,      /* eos, a stop id or a stop string, or the grammar allows no more */
    FINISH_LENGTH,    /* max_tokens or the context's end */
    FINISH_CANCELLED,
    FINISH_ERROR
};

struct grammar;
struct request;

enum message_kind {
    MSG_TOKENS,       /* more output is published */
    MSG_DONE          /* the request is the loop's again; read its outcome */
};

/* One of the two letters a request carries.  For one request MSG_DONE is
 * always drained after MSG_TOKENS, and exactly once. */
struct message {
    struct mail_node node;  /* must be first */
    enum message_kind kind;
    struct request *req;
};

struct request {
    /* Set before submit, read-only from then on. */
    uint64_t id;              /* unique in the process */
    uint64_t group;           /* requests with the same prompt, sent together, share it; 0:
                                 alone.  The scheduler prefills one of a group first; the
                                 others find its blocks */
    const int32_t *prompt;    /* [n_prompt], n_prompt >= 1; the sender's storage */
    uint32_t n_prompt;
    uint32_t max_tokens;      /* >= 1, or 0 with score_prompt; n_prompt + max_tokens <=
                                 max_model_len */
    uint32_t min_tokens;      /* eos and stop ids are banned before that many */
    float temperature, top_p, min_p, presence, frequency, repetition;
    int32_t top_k;
    uint64_t seed;
    int32_t n_top;            /* logprobs a token: -1 none, 0 its own, up to SAMPLE_MAX_TOP */
    const struct logit_bias *bias;
    uint32_t n_bias;
    struct grammar *grammar;  /* the output follows it (engine/grammar/grammar.h), or NULL; outlives
                                 the request */
    const int32_t *stop_ids;  /* besides the model's eos */
    uint32_t n_stop_ids;
    const char *const *stops; /* stop strings, UTF-8, none empty */
    uint32_t n_stops;
    bool include_stop;        /* keep the stop string in the text */
    bool ignore_eos;          /* neither eos nor stop ids end the output */
    bool skip_special;        /* how the loop turns ids to text; stops are searched in that */
    bool sparse;              /* false: full attention */
    bool score_prompt;        /* logprobs of the prompt too, n_top wide: n_top >= 0 */
    uint32_t share;           /* whose share of the waiting room it takes, from 1; 0: nobody's */
    uint64_t cache_salt;      /* requests with different salts share no cached blocks */
    uint64_t arrival_ns;      /* when the request's first byte was read */

    /* Written by the engine thread.  Entries below n_output are the loop's to
     * read as they are published; the rest after MSG_DONE. */
    int32_t *output;               /* [max_tokens] */
    struct token_logprob *chosen;  /* [max_tokens] if n_top >= 0, else NULL */
    struct token_logprob *top;     /* [max_tokens, n_top] if n_top > 0; padded with id -1 */
    struct token_logprob *prompt_chosen; /* [n_prompt] if score_prompt: entry 0 is unused */
    struct token_logprob *prompt_top;    /* [n_prompt, n_top] if score_prompt and n_top > 0 */
    enum finish finish;
    struct error error;            /* FINISH_ERROR */
    int32_t stopped_by_id;         /* the id that ended it, or -1; it is the last of output */
    int32_t stopped_by_string;     /* index in stops, or -1 */
    uint64_t text_bytes;           /* with stopped_by_string: where the text is cut */
    uint32_t n_cached;             /* prompt tokens found in the prefix cache */
    uint32_t n_preempted;
    uint64_t admitted_ns, first_token_ns, last_token_ns;

    /* Engine thread only. */
    void *sequence;

    /* Loop thread only. */
    void *owner;                   /* the HTTP exchange this answers */
    uint32_t engine;               /* which one has it, of several */
    uint32_t load_tokens;          /* of its prompt, as long as they count as that engine's load */

    /* Both. */
    atomic_uint n_output;          /* engine publishes */
    atomic_bool cancelled;         /* loop sets, engine reads once a step */
    atomic_bool mail_pending;      /* MSG_TOKENS is on its way; the loop clears it, then reads */
    struct message tokens_mail, done_mail;
};

#endif
