#ifndef MODEL_VOCAB_H
#define MODEL_VOCAB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The tokens of a byte-level vocabulary, by id, by their spelling in the file
 * and by their bytes.
 *
 * The file spells each byte as a printable character (0x20 as U+0120, ...).  A
 * spelling made of such characters alone has bytes, and BPE may produce it; any
 * other spelling stands for its own UTF-8 and is matched as an added token or
 * not at all. */

enum token_flags {
    TOKEN_EXISTS = 1,
    TOKEN_ADDED = 2,      /* matched in text before anything else */
    TOKEN_SPECIAL = 4,    /* left out of text on request */
    TOKEN_ALPHABET = 8,   /* spelled in the byte alphabet */
    TOKEN_DIRECT = 16     /* BPE of its bytes yields this token and nothing else */
};

struct token {
    const char *spelling;   /* as in the file, NUL-terminated */
    const char *bytes;      /* what it contributes to a text */
    uint32_t n_spelling, n_bytes;
    unsigned flags;
};

/* Ids by bytes: open addressing with linear probing, seeded so that nobody can
 * write a file of collisions.  The length of the key is in the token. */
struct id_map {
    struct id_slot *slots;
    size_t mask;
    uint64_t seed;
};

struct vocab {
    struct token *tokens;       /* [n_ids], holes have no TOKEN_EXISTS */
    int32_t n_ids;
    struct id_map by_spelling, by_bytes;
    int32_t byte_ids[256];      /* the tokens BPE starts from, -1 if missing */
    size_t longest_bytes;       /* of the tokens with TOKEN_ALPHABET */
    size_t longest_spelling;
    char *text, *text_end;      /* where spellings and bytes lie; end of what is used */
};

/* Room for ids below n_ids, n_tokens of them, with spellings of text_bytes in
 * all, each counted with its NUL. */
void vocab_init(struct vocab *v, int32_t n_ids, size_t n_tokens, size_t text_bytes);
void vocab_fini(struct vocab *v);

/* Give id its spelling.  False if another token has it; the id must be free. */
bool vocab_add(struct vocab *v, int32_t id, const char *spelling, unsigned flags);

/* -1 if there is none. */
int32_t vocab_find_spelling(const struct vocab *v, const char *spelling, size_t n);
int32_t vocab_find_bytes(const struct vocab *v, const char *bytes, size_t n);

static inline bool vocab_has(const struct vocab *v, int32_t id)
{
    return id >= 0 && id < v->n_ids && (v->tokens[id].flags & TOKEN_EXISTS);
}

/* A number that differs from run to run, for seeding hash tables. */
uint64_t vocab_random_seed(void);

#endif
