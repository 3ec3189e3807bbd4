#ifndef MODEL_TOKENIZER_PARTS_H
#define MODEL_TOKENIZER_PARTS_H

#include "engine/base/status.h"
#include "engine/model/added_tokens.h"
#include "engine/model/bpe.h"
#include "engine/model/pretokenize.h"
#include "engine/model/tokenizer.h"
#include "engine/model/vocab.h"

/* What a tokenizer is made of; for the files that load and run it, and their
 * tests. */
struct tokenizer {
    struct vocab vocab;
    struct merges merges;
    struct added_tokens raw_added;       /* matched in the text as it comes */
    struct added_tokens normal_added;    /* matched in the normalized text */
    struct pretokenizer pre;
    struct token_list prefix, suffix;    /* the post-processor's ids */
    bool nfc;
    bool ignore_merges;                  /* a word that is a token is that token */
    bool has_all_bytes;                  /* then no byte of a word is ever dropped */
};

enum {
    /* Limits on what a file may ask for, far above any real one. */
    MAX_TOKENIZER_FILE_BYTES = 32 << 20,
    MAX_TOKENIZER_IDS = 1 << 21,
    MAX_ADDED_TOKENS = 1 << 16,
    MAX_ADDED_TOKEN_BYTES = 256,
    MAX_TEMPLATE_IDS = 64        /* before the text, and after it */
};

/* Fill the zeroed *t from tokenizer.json; on failure t is half-built and may be
 * closed. */
enum status tokenizer_load(struct tokenizer *t, const char *json, size_t n, const char *name,
                           struct error *err) MUST_USE;

#endif
