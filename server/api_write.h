#ifndef SERVER_API_WRITE_H
#define SERVER_API_WRITE_H

#include "engine/base/strbuf.h"
#include "server/api.h"

/* What the writers of api.h share; nobody else includes it. */

void api_put_text(struct strbuf *out, const char *s); /* as a JSON string */
void api_put_number(struct strbuf *out, uint64_t value);
void api_put_logprob(struct strbuf *out, float value);
/* How the token is named: its bytes where they are text, otherwise bytes:\\xe2\\x80. */
void api_put_token(struct strbuf *out, const struct tokenizer *t, int32_t id,
                   struct strbuf *scratch);

/* Up to the bracket that opens the choices, and on from the one that closes them. */
void api_put_head(struct strbuf *out, const struct api_head *head, const char *object);
void api_put_tail(struct strbuf *out, const struct api_usage *usage, bool usage_null);
/* finish_reason and what belongs to it, behind another member. */
void api_put_finish(struct strbuf *out, const struct api_piece *p);

#endif
