#include "engine/model/tokenizer_json.h"

#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"
#include "engine/model/nfc.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum status loader_refuse(const struct loader *l, enum status code, const char *where,
                          const char *fmt, ...)
{
    char sentence[256];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(sentence, sizeof sentence, fmt, ap);
    va_end(ap);
    return error_set(l->err, code, "%s: %s%s%s", l->name, where, *where ? " " : "", sentence);
}

/* The index of key among the blank-separated keys, -1 if it is not there. */
static int key_index(const char *keys, const char *key)
{
    size_t n = strlen(key);

    for (int i = 0; *keys; i++) {
        size_t length = strcspn(keys, " ");
        if (length == n && memcmp(keys, key, n) == 0)
            return i;
        keys += length + (keys[length] == ' ');
    }
    return -1;
}

enum status loader_check_keys(const struct loader *l, const cJSON *o, const char *where,
                              const char *keys)
{
    const cJSON *item;
    unsigned seen = 0;

    if (!cJSON_IsObject(o))
        return loader_refuse(l, ST_INVALID, where, "must be an object");
    cJSON_ArrayForEach(item, o) {
        int i = key_index(keys, item->string);
        if (i < 0)
            return loader_refuse(l, ST_UNSUPPORTED, where, "has the unknown key \"%.60s\"",
                                 item->string);
        if (seen & 1u << i)
            return loader_refuse(l, ST_INVALID, where, "has the key \"%.60s\" twice",
                                 item->string);
        seen |= 1u << i;
    }
    return ST_OK;
}

const char *step_type(const cJSON *o)
{
    const char *type = cJSON_GetStringValue(json_get(o, "type"));

    return type ? type : "(none)";
}

bool step_has_type(const cJSON *o, const char *type)
{
    return strcmp(step_type(o), type) == 0;
}

enum status loader_flag(const struct loader *l, const cJSON *o, const char *where,
                        const char *key, bool *out)
{
    const cJSON *value = json_get(o, key);

    if (!cJSON_IsBool(value))
        return loader_refuse(l, ST_INVALID, where, "needs \"%s\" to be true or false", key);
    *out = cJSON_IsTrue(value);
    return ST_OK;
}

enum status loader_flag_is(const struct loader *l, const cJSON *o, const char *where,
                           const char *key, bool want)
{
    bool value = want;

    if (json_get(o, key))
        TRY(loader_flag(l, o, where, key, &value));
    return value == want ? ST_OK
                         : loader_refuse(l, ST_UNSUPPORTED, where,
                                         "has \"%s\": %s, which is not supported",
                                         key, value ? "true" : "false");
}

bool loader_id(const cJSON *value, int32_t *out)
{
    if (!cJSON_IsNumber(value) || !(value->valuedouble >= 0) ||
        !(value->valuedouble < MAX_TOKENIZER_IDS))
        return false;
    *out = (int32_t)value->valuedouble;
    return value->valuedouble == *out;
}

#define BAD_ID "has an id for \"%.60s\" that is not a whole number from 0 to %d"

/* What the vocabulary needs to be allocated. */
struct sizes {
    size_t n_tokens, text_bytes;
    int32_t n_ids;
};

static size_t n_children(const cJSON *o)
{
    size_t n = 0;
    const cJSON *item;

    cJSON_ArrayForEach(item, o)
        n++;
    return n;
}

static void count_token(struct sizes *sizes, const char *spelling, int32_t id)
{
    sizes->n_tokens++;
    sizes->text_bytes += strlen(spelling) + 1;
    if (id >= sizes->n_ids)
        sizes->n_ids = id + 1;
}

static enum status measure_tokens(const struct loader *l, const cJSON *vocab,
                                  const cJSON *added, struct sizes *sizes)
{
    const cJSON *item;
    int32_t id;

    if (n_children(added) > MAX_ADDED_TOKENS)
        return loader_refuse(l, ST_INVALID, "added_tokens", "has more than %d tokens",
                             MAX_ADDED_TOKENS);
    cJSON_ArrayForEach(item, vocab) {
        if (!loader_id(item, &id))
            return loader_refuse(l, ST_INVALID, "model.vocab",
                                 BAD_ID, item->string, MAX_TOKENIZER_IDS - 1);
        count_token(sizes, item->string, id);
    }
    cJSON_ArrayForEach(item, added) {
        const char *content = cJSON_GetStringValue(json_get(item, "content"));
        size_t n = content ? strlen(content) : 0;
        if (n == 0 || n > MAX_ADDED_TOKEN_BYTES)
            return loader_refuse(l, ST_INVALID, "added_tokens",
                                 "has a \"content\" that is not a string of 1 to %d bytes",
                                 MAX_ADDED_TOKEN_BYTES);
        if (!loader_id(json_get(item, "id"), &id))
            return loader_refuse(l, ST_INVALID, "added_tokens",
                                 BAD_ID, content, MAX_TOKENIZER_IDS - 1);
        count_token(sizes, content, id);
    }
    return ST_OK;
}

static enum status load_vocab(const struct loader *l, const cJSON *vocab)
{
    static const char where[] = "model.vocab";
    struct vocab *v = &l->t->vocab;
    const cJSON *item;

    cJSON_ArrayForEach(item, vocab) {
        int32_t id = (int32_t)item->valuedouble;
        if (vocab_has(v, id))
            return loader_refuse(l, ST_INVALID, where,
                                 "gives the id %d to \"%.60s\" and to \"%.60s\"", id,
                                 v->tokens[id].spelling, item->string);
        if (!vocab_add(v, id, item->string, 0))
            return loader_refuse(l, ST_INVALID, where, "has the token \"%.60s\" twice",
                                 item->string);
    }
    l->t->has_all_bytes = true;
    for (int i = 0; i < 256; i++)
        l->t->has_all_bytes = l->t->has_all_bytes && v->byte_ids[i] >= 0;
    return ST_OK;
}

/* The two parts of an entry of model.merges: "left right" or ["left", "right"].
 * False if it is neither. */
static bool merge_parts(const cJSON *item, const char **left, size_t *n_left,
                        const char **right)
{
    if (cJSON_IsArray(item)) {
        const cJSON *first = item->child, *second = first ? first->next : NULL;
        *left = cJSON_GetStringValue(first);
        *right = cJSON_GetStringValue(second);
        if (!*left || !*right || second->next)
            return false;
        *n_left = strlen(*left);
        return true;
    }
    *left = cJSON_GetStringValue(item);
    const char *blank = *left ? strchr(*left, ' ') : NULL;
    if (!blank || strchr(blank + 1, ' '))
        return false;
    *n_left = (size_t)(blank - *left);
    *right = blank + 1;
    return true;
}

static enum status load_merge(const struct loader *l, const cJSON *item, int32_t rank,
                              struct strbuf *joined)
{
    static const char where[] = "model.merges";
    struct vocab *v = &l->t->vocab;
    const char *left, *right;
    size_t n_left;

    if (!merge_parts(item, &left, &n_left, &right))
        return loader_refuse(l, ST_INVALID, where,
                             "has at index %d something other than two tokens", rank);
    size_t n_right = strlen(right);
    int32_t left_id = vocab_find_spelling(v, left, n_left);
    int32_t right_id = vocab_find_spelling(v, right, n_right);
    strbuf_clear(joined);
    strbuf_add(joined, left, n_left);
    strbuf_add(joined, right, n_right);
    int32_t id = vocab_find_spelling(v, joined->data, joined->n);
    if (left_id < 0 || right_id < 0 || id < 0)
        return loader_refuse(l, ST_INVALID, where,
                             "has at index %d \"%.40s\", which model.vocab lacks", rank,
                             left_id < 0 ? left : right_id < 0 ? right : joined->data);
    merges_put(&l->t->merges, left_id, right_id, rank, id);
    return ST_OK;
}

static enum status load_merges(const struct loader *l, const cJSON *merges)
{
    struct strbuf joined = { 0 };
    enum status status = ST_OK;
    const cJSON *item = merges->child;

    merges_init(&l->t->merges, n_children(merges));
    for (int32_t rank = 0; item && status == ST_OK; item = item->next) {
        /* The first line of a merges.txt that was taken over. */
        if (cJSON_IsString(item) && strncmp(item->valuestring, "#version", 8) == 0)
            continue;
        status = load_merge(l, item, rank++, &joined);
    }
    strbuf_fini(&joined);
    return status;
}

/* The id that a token gets is not the file's to choose: the one the vocabulary
 * has for it, or the next one. */
static enum status add_token_id(const struct loader *l, const char *content, int32_t id,
                                unsigned flags, int32_t *next)
{
    struct vocab *v = &l->t->vocab;
    int32_t expected = vocab_find_spelling(v, content, strlen(content));

    if (expected < 0)
        expected = *next;
    if (id != expected)
        return loader_refuse(l, ST_INVALID, "added_tokens",
                             "gives \"%.60s\" the id %d, but it must be %d",
                             content, id, expected);
    if (vocab_has(v, id)) {
        if (strcmp(v->tokens[id].spelling, content) != 0)
            return loader_refuse(l, ST_INVALID, "added_tokens",
                                 "gives \"%.60s\" the id %d of \"%.60s\"", content, id,
                                 v->tokens[id].spelling);
        if (v->tokens[id].flags & TOKEN_ADDED)
            return loader_refuse(l, ST_INVALID, "added_tokens", "has \"%.60s\" twice", content);
        v->tokens[id].flags |= flags;
    } else if (!vocab_add(v, id, content, flags)) {
        return loader_refuse(l, ST_INVALID, "added_tokens", "has \"%.60s\" twice", content);
    }
    if (id >= *next)
        *next = id + 1;
    return ST_OK;
}

enum { NORMALIZED = 1 << 8, SPECIAL = 1 << 9 };   /* beside enum added_rules */

static enum status load_added_token(const struct loader *l, const cJSON *item, int32_t *next)
{
    static const char where[] = "added_tokens";
    static const struct {
        const char *key;
        unsigned bit;
    } flags[] = {
        { "single_word", ADDED_SINGLE_WORD }, { "lstrip", ADDED_LSTRIP },
        { "rstrip", ADDED_RSTRIP }, { "normalized", NORMALIZED }, { "special", SPECIAL },
    };
    const char *content = cJSON_GetStringValue(json_get(item, "content"));
    unsigned set = 0;
    int32_t id;

    TRY(loader_check_keys(l, item, where,
                          "id content single_word lstrip rstrip normalized special"));
    for (size_t i = 0; i < sizeof flags / sizeof flags[0]; i++) {
        bool value = false;
        TRY(loader_flag(l, item, where, flags[i].key, &value));
        set |= value ? flags[i].bit : 0;
    }
    if (!loader_id(json_get(item, "id"), &id))
        return loader_refuse(l, ST_INVALID, where, "has a token without an id");
    TRY(add_token_id(l, content, id, TOKEN_ADDED | (set & SPECIAL ? TOKEN_SPECIAL : 0u), next));

    struct strbuf normal = { 0 };
    if ((set & NORMALIZED) && l->t->nfc)
        nfc_append(&normal, content, strlen(content));
    else
        strbuf_puts(&normal, content);
    bool fresh = added_tokens_put(set & NORMALIZED ? &l->t->normal_added : &l->t->raw_added,
                                  normal.data, normal.n, id, set);
    strbuf_fini(&normal);
    return fresh ? ST_OK
                 : loader_refuse(l, ST_INVALID, where,
                                 "has another token that is \"%.60s\" in its normal form",
                                 content);
}

/* Null, absent or the empty string. */
static bool is_empty(const cJSON *value)
{
    const char *s = cJSON_GetStringValue(value);

    return !value || (s && !*s);
}

static enum status load_model(const struct loader *l, const cJSON *model, const cJSON *added)
{
    static const char where[] = "model";
    const cJSON *vocab = json_get(model, "vocab"), *merges = json_get(model, "merges");
    const cJSON *dropout = json_get(model, "dropout");
    struct sizes sizes = { 0 };

    /* Files of the first years do not say which model it is. */
    if (cJSON_IsObject(model) && json_get(model, "type") && !step_has_type(model, "BPE"))
        return loader_refuse(l, ST_UNSUPPORTED, "model.type", "is %.60s, only BPE is supported",
                             step_type(model));
    TRY(loader_check_keys(l, model, where,
                          "type dropout unk_token continuing_subword_prefix end_of_word_suffix "
                          "fuse_unk byte_fallback ignore_merges vocab merges"));
    if (dropout && !(cJSON_IsNumber(dropout) && dropout->valuedouble == 0))
        return loader_refuse(l, ST_UNSUPPORTED, "model.dropout", "must be null");
    if (!is_empty(json_get(model, "continuing_subword_prefix")))
        return loader_refuse(l, ST_UNSUPPORTED, "model.continuing_subword_prefix",
                             "must be null");
    if (!is_empty(json_get(model, "end_of_word_suffix")))
        return loader_refuse(l, ST_UNSUPPORTED, "model.end_of_word_suffix", "must be null");
    if (json_get(model, "ignore_merges"))
        TRY(loader_flag(l, model, where, "ignore_merges", &l->t->ignore_merges));
    if (!cJSON_IsObject(vocab))
        return loader_refuse(l, ST_INVALID, "model.vocab", "must be an object");
    if (!cJSON_IsArray(merges))
        return loader_refuse(l, ST_INVALID, "model.merges", "must be an array");

    TRY(measure_tokens(l, vocab, added, &sizes));
    vocab_init(&l->t->vocab, sizes.n_ids, sizes.n_tokens, sizes.text_bytes);
    TRY(load_vocab(l, vocab));
    /* With a token for every byte nothing is ever unknown; otherwise these two
     * say what becomes of a byte without one. */
    if (!l->t->has_all_bytes) {
        TRY(loader_flag_is(l, model, where, "byte_fallback", false));
        if (json_get(model, "unk_token"))
            return loader_refuse(l, ST_UNSUPPORTED, "model.unk_token",
                                 "must be null where model.vocab lacks a byte");
    }
    return load_merges(l, merges);
}

static enum status load_added_tokens(const struct loader *l, const cJSON *added, size_t n_vocab)
{
    int32_t next = (int32_t)n_vocab;
    const cJSON *item;

    cJSON_ArrayForEach(item, added)
        TRY(load_added_token(l, item, &next));
    return ST_OK;
}

static enum status load_root(const struct loader *l, const cJSON *root)
{
    const cJSON *added = json_get(root, "added_tokens"), *model = json_get(root, "model");
    const char *version = cJSON_GetStringValue(json_get(root, "version"));

    TRY(loader_check_keys(l, root, "",
                          "version truncation padding added_tokens normalizer pre_tokenizer "
                          "post_processor decoder model"));
    if (!version || strcmp(version, "1.0") != 0)
        return loader_refuse(l, ST_UNSUPPORTED, "version", "must be \"1.0\"");
    if (json_get(root, "truncation"))
        return loader_refuse(l, ST_UNSUPPORTED, "truncation", "must be null");
    if (json_get(root, "padding"))
        return loader_refuse(l, ST_UNSUPPORTED, "padding", "must be null");
    if (added && !cJSON_IsArray(added))
        return loader_refuse(l, ST_INVALID, "added_tokens", "must be an array");
    if (!cJSON_IsObject(model))
        return loader_refuse(l, ST_INVALID, "model", "must be an object");
    TRY(loader_normalizer(l, json_get(root, "normalizer")));
    TRY(loader_pre_tokenizer(l, json_get(root, "pre_tokenizer")));
    TRY(loader_decoder(l, json_get(root, "decoder")));
    TRY(load_model(l, model, added));
    TRY(load_added_tokens(l, added, n_children(json_get(model, "vocab"))));
    return loader_post_processor(l, json_get(root, "post_processor"));
}

/* The JSON library ends strings at a NUL and would read two tokens as one. */
static bool has_nul(const char *json, size_t n)
{
    static const char escape[] = "\\u0000";
    const char *end = json + n, *at = json;

    if (memchr(json, 0, n))
        return true;
    while ((at = memmem(at, (size_t)(end - at), escape, sizeof escape - 1))) {
        const char *back = at;
        while (back > json && back[-1] == '\\')
            back--;
        if ((at - back) % 2 == 0)   /* else the backslash is itself escaped */
            return true;
        at++;
    }
    return false;
}

static bool is_blank(const char *s, const char *end)
{
    while (s < end && (*s == ' ' || *s == '\t' || *s == '\r' || *s == '\n'))
        s++;
    return s == end;
}

enum status tokenizer_load(struct tokenizer *t, const char *json, size_t n, const char *name,
                           struct error *err)
{
    struct loader l = { .t = t, .name = name, .err = err };
    const char *end = NULL;

    added_tokens_init(&t->raw_added);
    added_tokens_init(&t->normal_added);
    if (n > MAX_TOKENIZER_FILE_BYTES)
        return loader_refuse(&l, ST_INVALID, "", "has %zu bytes, the limit is %d", n,
                             MAX_TOKENIZER_FILE_BYTES);
    size_t valid = utf8_valid_prefix(json, n);
    if (valid != n)
        return loader_refuse(&l, ST_INVALID, "", "is not UTF-8 at byte %zu", valid);
    if (has_nul(json, n))
        return loader_refuse(&l, ST_INVALID, "", "has a NUL character");
    cJSON *root = cJSON_ParseWithLengthOpts(json, n, &end, 0);
    if (!root || !is_blank(end, json + n)) {
        size_t where = end ? (size_t)(end - json) : 0;
        cJSON_Delete(root);
        return loader_refuse(&l, ST_INVALID, "", "is not JSON at byte %zu", where);
    }
    enum status status = load_root(&l, root);
    cJSON_Delete(root);
    return status;
}
