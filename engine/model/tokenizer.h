#ifndef TOKENIZER_H
#define TOKENIZER_H

#include "engine/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Text to token ids and back, exactly as Hugging Face `tokenizers` does it for
 * byte-level BPE files (Qwen2 to Qwen3, Llama 3, GLM-4, SmolLM2, GPT-2 style):
 *
 *   added tokens -> NFC where the file asks for it -> split by a regular
 *   expression -> bytes -> BPE merges by rank -> ids -> post-processor
 *
 * Anything else in tokenizer.json is refused by tokenizer_open with the key's name.
 *
 * A tokenizer is immutable after open: every function may be called from any
 * thread at once.  All text is UTF-8; input is validated by the caller
 * (utf8.h), invalid bytes are an ASSERT in encode. */

struct tokenizer;

/* path: a tokenizer.json. */
enum status tokenizer_open(struct tokenizer **out, const char *path,
                           struct error *err) MUST_USE;
/* The same from memory; name stands for the path in sentences. */
enum status tokenizer_parse(struct tokenizer **out, const char *json, size_t n,
                            const char *name, struct error *err) MUST_USE;
void tokenizer_close(struct tokenizer *t);   /* NULL is fine */

enum tokenize_flags {
    TOKENIZE_ADD_SPECIAL = 1,   /* run the post-processor (Llama 3 puts bos in front) */
    TOKENIZE_NO_ADDED = 2       /* do not match added tokens in the text */
};

/* A growing list of ids; zero-initialise, free with token_list_fini. */
struct token_list {
    int32_t *ids;
    size_t n, capacity;
};
void token_list_push(struct token_list *list, int32_t id);
void token_list_fini(struct token_list *list);

/* Append the ids of text[0..n) to *out.  Stops with ST_INVALID as soon as
 * out->n would exceed max_ids (0: no limit). */
enum status tokenizer_encode(const struct tokenizer *t, struct token_list *out,
                             const char *text, size_t n, int flags, size_t max_ids) MUST_USE;

/* The same for a text of which only some stretches may hold added tokens: what a program
 * wrote, as against what it was given.  Between the tokens found there the text is split
 * and merged as a whole, so without added tokens elsewhere the ids are those of
 * tokenizer_encode().  marked: in order, not overlapping; n_marked may be 0. */
struct token_span {
    size_t start, end;
};
enum status tokenizer_encode_marked(const struct tokenizer *t, struct token_list *out,
                                    const char *text, size_t n, const struct token_span *marked,
                                    size_t n_marked, size_t max_ids) MUST_USE;

/* One more than the largest id.  Models may have more rows than this. */
int32_t tokenizer_n_ids(const struct tokenizer *t);

/* The id of an added or ordinary token by its exact content, or -1. */
int32_t tokenizer_find(const struct tokenizer *t, const char *content);

/* The bytes a token contributes to a text; *n = 0 for ids without one.  Not
 * NUL-terminated, valid as long as t. */
const char *tokenizer_bytes(const struct tokenizer *t, int32_t id, size_t *n);
bool tokenizer_is_special(const struct tokenizer *t, int32_t id);

/* Ids to text one at a time.  Bytes that may still become a character are held
 * back (at most 3); bytes that cannot are replaced by U+FFFD, one for each
 * maximal invalid prefix, so what comes out is always whole, valid UTF-8, and
 * the pieces joined are what decoding all ids at once gives. */
struct detokenizer {
    const struct tokenizer *tok;
    bool skip_special;
    unsigned char held[4];
    int n_held;
};
void detokenizer_init(struct detokenizer *d, const struct tokenizer *t, bool skip_special);

/* A bound on what one push of this id may append, for sizing buffers. */
size_t detokenizer_max_bytes(const struct detokenizer *d, int32_t id);
/* Append the text of id to out (room for detokenizer_max_bytes); returns bytes written. */
size_t detokenizer_push(struct detokenizer *d, int32_t id, char *out);
/* At the end: a held incomplete tail becomes one U+FFFD; at most 3 bytes. */
size_t detokenizer_flush(struct detokenizer *d, char *out);

#endif
