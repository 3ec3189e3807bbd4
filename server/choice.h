#ifndef SERVER_CHOICE_H
#define SERVER_CHOICE_H

#include "engine/base/strbuf.h"
#include "engine/model/tokenizer.h"
#include "engine/run/request.h"
#include "server/api.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* One choice of an answer: a request, and its output as text.
 *
 * The text is the echoed prompt, if any, then what the ids decode to.  Parts
 * of it are withheld while the request runs: bytes that may still become a
 * stop string, and a last id that may be the end.  The text of a chat is taken
 * apart into thoughts, text and calls (chat_output.h) on its way out.  Loop
 * thread only; no sockets, no engine. */

struct choice {
    struct request req;
    const struct tokenizer *tokenizer;
    const struct model_config *model;
    uint32_t index;              /* in the answer */
    bool home;                   /* MSG_DONE has come; also true before submit */
    bool logprobs;               /* the client asked for them */

    struct detokenizer detok;
    struct strbuf text;
    size_t echo_bytes;           /* of text, from its start */
    uint32_t n_echo;             /* prompt tokens among the logprobs */
    uint32_t n_read;             /* output tokens in text */
    size_t newest_start;         /* where the newest token's text begins */
    bool flushed;                /* the text is final */

    size_t *starts;              /* [n_echo + max_tokens] where a token's text begins, or NULL */
    uint64_t *offsets;           /* the same in code points, of tokens that were described */
    int32_t *all_ids;            /* prompt and output in one piece, for choice_whole() */
    struct token_logprob *all_chosen, *all_top;

    size_t sent_bytes;           /* of text */
    uint32_t sent_tokens;        /* of the echoed and generated ones */
    size_t counted_bytes;        /* of text, with that many code points: */
    uint64_t counted_points;
    bool end_sent;

    bool chat;                   /* the text is taken apart: */
    bool role_sent;
    struct chat_output output;
    char call_id[API_CALL_ID_BYTES];
    struct api_message message;  /* for choice_whole() */
    uint32_t n_own_stops, n_own_stop_ids;

    uint64_t submitted_ns, last_seen_ns;
};

/* The request is ready to be submitted but for id, group and seed.  All
 * arguments are borrowed as long as the choice. */
void choice_init(struct choice *c, const struct api_completion *from, uint32_t prompt,
                 uint32_t index, const struct tokenizer *t, const struct model_config *model);
void choice_fini(struct choice *c);      /* a zeroed one is fine */

/* Take in what the engine has published; how many tokens were new. */
uint32_t choice_read(struct choice *c);

/* The next part that may be sent, or false.  What it points to lives until
 * the next call for this choice. */
bool choice_next(struct choice *c, struct api_piece *out);

/* Everything, of a choice that is home. */
void choice_whole(struct choice *c, struct api_piece *out);

uint32_t choice_n_output(const struct choice *c);
uint32_t choice_n_thoughts(const struct choice *c);   /* tokens of a chat's reasoning */
double choice_mean_logprob(const struct choice *c);   /* home, n_top >= 0 */

#endif
