#include "engine/model/tokenizer.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"
#include "engine/model/json_fields.h"
#include "engine/model/nfc.h"
#include "engine/model/tokenizer_parts.h"

#include <string.h>

/* Text is normalized and split in blocks of about this size, so that a limit on
 * ids ends the work early and the normal form of a huge text is never whole in
 * memory. */
enum { BLOCK_BYTES = 64 << 10 };

void token_list_push(struct token_list *list, int32_t id)
{
    if (list->n == list->capacity) {
        list->capacity = list->capacity + list->capacity / 2 + 16;
        list->ids = mem_realloc(list->ids, list->capacity, sizeof *list->ids);
    }
    list->ids[list->n++] = id;
}

void token_list_fini(struct token_list *list)
{
    mem_free(list->ids);
    *list = (struct token_list){ 0 };
}

/* One word's bytes as the ids BPE starts from; bytes without one are dropped. */
static size_t first_ids(const struct vocab *v, const char *s, size_t n, int32_t *ids)
{
    size_t kept = 0;

    for (size_t i = 0; i < n; i++) {
        int32_t id = v->byte_ids[(unsigned char)s[i]];
        if (id >= 0)
            ids[kept++] = id;
    }
    return kept;
}

/* Mark the tokens that BPE makes of their own bytes.  Nearly every word of a
 * text is such a token, and is then found without merging anything. */
static void find_direct_tokens(struct tokenizer *t)
{
    struct bpe_scratch scratch = { 0 };
    int32_t *ids = mem_alloc((t->vocab.longest_bytes + 1) * sizeof *ids);

    for (int32_t id = 0; id < t->vocab.n_ids; id++) {
        struct token *token = &t->vocab.tokens[id];
        if (!(token->flags & TOKEN_ALPHABET) ||
            vocab_find_bytes(&t->vocab, token->bytes, token->n_bytes) != id)
            continue;
        size_t n = first_ids(&t->vocab, token->bytes, token->n_bytes, ids);
        if (t->ignore_merges || (bpe_merge(&t->merges, &scratch, ids, n) == 1 && ids[0] == id))
            token->flags |= TOKEN_DIRECT;
    }
    mem_free(ids);
    bpe_scratch_fini(&scratch);
}

enum status tokenizer_parse(struct tokenizer **out, const char *json, size_t n,
                            const char *name, struct error *err)
{
    struct tokenizer *t = mem_calloc(1, sizeof *t);
    enum status status = tokenizer_load(t, json, n, name, err);

    if (status != ST_OK) {
        tokenizer_close(t);
        return status;
    }
    find_direct_tokens(t);
    *out = t;
    return ST_OK;
}

enum status tokenizer_open(struct tokenizer **out, const char *path, struct error *err)
{
    char *json;
    size_t n;

    TRY(file_read(&json, &n, path, MAX_TOKENIZER_FILE_BYTES, NULL, err));
    enum status status = tokenizer_parse(out, json, n, path, err);
    mem_free(json);
    return status;
}

void tokenizer_close(struct tokenizer *t)
{
    if (!t)
        return;
    vocab_fini(&t->vocab);
    merges_fini(&t->merges);
    added_tokens_fini(&t->raw_added);
    added_tokens_fini(&t->normal_added);
    token_list_fini(&t->prefix);
    token_list_fini(&t->suffix);
    mem_free(t);
}

/* One call of tokenizer_encode. */
struct encoder {
    const struct tokenizer *t;
    struct token_list *out;
    size_t max_ids;
    bool match_added;
    struct strbuf normal;       /* a block in normal form */
    int32_t *symbols;           /* a word on its way through BPE */
    size_t n_symbols;
    struct bpe_scratch scratch;
};

static void encoder_fini(struct encoder *e)
{
    strbuf_fini(&e->normal);
    mem_free(e->symbols);
    bpe_scratch_fini(&e->scratch);
}

static enum status emit(struct encoder *e, int32_t id)
{
    if (e->max_ids && e->out->n >= e->max_ids)
        return ST_INVALID;
    token_list_push(e->out, id);
    return ST_OK;
}

static enum status emit_all(struct encoder *e, const int32_t *ids, size_t n)
{
    for (size_t i = 0; i < n; i++)
        TRY(emit(e, ids[i]));
    return ST_OK;
}

static enum status encode_word(struct encoder *e, const char *s, size_t n)
{
    const struct vocab *v = &e->t->vocab;
    int32_t id = vocab_find_bytes(v, s, n);

    if (id >= 0 && (v->tokens[id].flags & TOKEN_DIRECT))
        return emit(e, id);
    /* A word that cannot fit is not worth merging: it may be the whole text. */
    if (e->max_ids && e->t->has_all_bytes &&
        (e->out->n >= e->max_ids || n / v->longest_bytes > e->max_ids - e->out->n))
        return ST_INVALID;
    if (n > e->n_symbols) {
        e->n_symbols = n + n / 2 + 64;
        mem_free(e->symbols);
        e->symbols = mem_alloc(e->n_symbols * sizeof *e->symbols);
    }
    n = first_ids(v, s, n, e->symbols);
    n = bpe_merge(&e->t->merges, &e->scratch, e->symbols, n);
    return emit_all(e, e->symbols, n);
}

static enum status encode_words(struct encoder *e, const char *s, size_t n)
{
    struct words words;
    const char *word;

    words_init(&words, &e->t->pre, s, n);
    while ((n = words_next(&words, &word)) > 0)
        TRY(encode_word(e, word, n));
    return ST_OK;
}

/* Emit the added tokens found in s[0..n) and give what lies between to rest. */
static enum status split_added(struct encoder *e, const struct added_tokens *added,
                               const char *s, size_t n,
                               enum status (*rest)(struct encoder *, const char *, size_t))
{
    struct added_walk walk;
    struct added_match match;
    size_t done = 0;

    added_walk_init(&walk, added, s, n);
    while (added_walk_next(&walk, &match)) {
        if (match.start > done)
            TRY(rest(e, s + done, match.start - done));
        TRY(emit(e, match.id));
        done = match.end;
    }
    return done < n ? rest(e, s + done, n - done) : ST_OK;
}

/* Text between the added tokens that are matched before normalization.  It is
 * cut into blocks unless a token matched in the normal form might be cut. */
static enum status encode_piece(struct encoder *e, const char *s, size_t n)
{
    const struct tokenizer *t = e->t;
    bool match_normal = e->match_added && t->normal_added.n > 0;
    size_t length;

    for (size_t at = 0; at < n; at += length) {
        const char *block = s + at;
        size_t rest = n - at;
        length = match_normal ? rest : pretokenize_cut(&t->pre, block, rest, BLOCK_BYTES);
        size_t n_block = length;
        if (t->nfc && !nfc_is_quick(block, n_block)) {
            strbuf_clear(&e->normal);
            nfc_append(&e->normal, block, n_block);
            block = e->normal.data;
            n_block = e->normal.n;
        }
        if (match_normal)
            TRY(split_added(e, &t->normal_added, block, n_block, encode_words));
        else
            TRY(encode_words(e, block, n_block));
    }
    return ST_OK;
}

static enum status encode_text(struct encoder *e, const char *text, size_t n)
{
    if (n == 0)
        return ST_OK;
    return e->match_added ? split_added(e, &e->t->raw_added, text, n, encode_piece)
                          : encode_piece(e, text, n);
}

enum status tokenizer_encode(const struct tokenizer *t, struct token_list *out,
                             const char *text, size_t n, int flags, size_t max_ids)
{
    struct encoder e = {
        .t = t, .out = out, .max_ids = max_ids,
        .match_added = !(flags & TOKENIZE_NO_ADDED),
    };
    bool wrap = flags & TOKENIZE_ADD_SPECIAL;
    enum status status = ST_OK;

    if (n >= INT32_MAX)   /* positions in a word are 32 bits */
        return ST_INVALID;
    ASSERT(utf8_is_valid(text, n));
    if (wrap)
        status = emit_all(&e, t->prefix.ids, t->prefix.n);
    if (status == ST_OK)
        status = encode_text(&e, text, n);
    if (status == ST_OK && wrap)
        status = emit_all(&e, t->suffix.ids, t->suffix.n);
    encoder_fini(&e);
    return status;
}

static enum status encode_marked(struct encoder *e, const char *text, size_t n,
                                 const struct token_span *marked, size_t n_marked)
{
    struct added_walk walk;
    struct added_match match;
    size_t done = 0;

    for (size_t i = 0; i < n_marked; i++) {
        size_t start = marked[i].start;
        ASSERT(start <= marked[i].end && marked[i].end <= n);
        added_walk_init(&walk, &e->t->raw_added, text + start, marked[i].end - start);
        while (added_walk_next(&walk, &match)) {
            if (start + match.start > done)
                TRY(encode_piece(e, text + done, start + match.start - done));
            TRY(emit(e, match.id));
            done = start + match.end;
        }
    }
    return done < n ? encode_piece(e, text + done, n - done) : ST_OK;
}

enum status tokenizer_encode_marked(const struct tokenizer *t, struct token_list *out,
                                    const char *text, size_t n, const struct token_span *marked,
                                    size_t n_marked, size_t max_ids)
{
    /* Between the tokens nothing is matched any more. */
    struct encoder e = { .t = t, .out = out, .max_ids = max_ids, .match_added = false };

    if (n >= INT32_MAX)
        return ST_INVALID;
    ASSERT(utf8_is_valid(text, n));
    enum status status = encode_marked(&e, text, n, marked, n_marked);
    encoder_fini(&e);
    return status;
}

int32_t tokenizer_n_ids(const struct tokenizer *t)
{
    return t->vocab.n_ids;
}

int32_t tokenizer_find(const struct tokenizer *t, const char *content)
{
    return vocab_find_spelling(&t->vocab, content, strlen(content));
}

const char *tokenizer_bytes(const struct tokenizer *t, int32_t id, size_t *n)
{
    bool exists = vocab_has(&t->vocab, id);

    *n = exists ? t->vocab.tokens[id].n_bytes : 0;
    return exists ? t->vocab.tokens[id].bytes : "";
}

bool tokenizer_is_special(const struct tokenizer *t, int32_t id)
{
    return vocab_has(&t->vocab, id) && (t->vocab.tokens[id].flags & TOKEN_SPECIAL);
}
