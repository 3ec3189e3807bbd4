#include "engine/model/safetensors_header.h"

#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_NAME_BYTES = 4096, MAX_TENSORS = 2000000 };

static const struct { const char *name; int bits; } types[N_TENSOR_TYPES] = {
    [TENSOR_BOOL] = { "BOOL", 8 },
    [TENSOR_F4] = { "F4", 4 },
    [TENSOR_F6_E2M3] = { "F6_E2M3", 6 },
    [TENSOR_F6_E3M2] = { "F6_E3M2", 6 },
    [TENSOR_U8] = { "U8", 8 },
    [TENSOR_I8] = { "I8", 8 },
    [TENSOR_F8_E5M2] = { "F8_E5M2", 8 },
    [TENSOR_F8_E4M3] = { "F8_E4M3", 8 },
    [TENSOR_F8_E8M0] = { "F8_E8M0", 8 },
    [TENSOR_F8_E4M3FNUZ] = { "F8_E4M3FNUZ", 8 },
    [TENSOR_F8_E5M2FNUZ] = { "F8_E5M2FNUZ", 8 },
    [TENSOR_I16] = { "I16", 16 },
    [TENSOR_U16] = { "U16", 16 },
    [TENSOR_F16] = { "F16", 16 },
    [TENSOR_BF16] = { "BF16", 16 },
    [TENSOR_I32] = { "I32", 32 },
    [TENSOR_U32] = { "U32", 32 },
    [TENSOR_F32] = { "F32", 32 },
    [TENSOR_I64] = { "I64", 64 },
    [TENSOR_U64] = { "U64", 64 },
    [TENSOR_F64] = { "F64", 64 },
    [TENSOR_C64] = { "C64", 64 },
};

const char *tensor_type_name(enum tensor_type type)
{
    return types[type].name;
}

/* A cursor over the header.  Reading functions return a status; on failure
 * the sentence is in err. */
struct header {
    const char *file, *tensor;   /* for sentences; tensor NULL between tensors */
    const char *start, *p, *end;
    struct strbuf text;          /* of the last string read */
    struct error *err;
};

static enum status fail(const struct header *h, const char *what)
{
    size_t at = (size_t)(h->p - h->start);

    if (h->tensor)
        return error_set(h->err, ST_INVALID, "%s: tensor %.120s: header, byte %zu: %s", h->file,
                         h->tensor, at, what);
    return error_set(h->err, ST_INVALID, "%s: header, byte %zu: %s", h->file, at, what);
}

static void skip_blank(struct header *h)
{
    while (h->p < h->end && (*h->p == ' ' || *h->p == '\t' || *h->p == '\n' || *h->p == '\r'))
        h->p++;
}

/* Take c, blanks before it skipped, if it is next. */
static bool take(struct header *h, char c)
{
    skip_blank(h);
    if (h->p == h->end || *h->p != c)
        return false;
    h->p++;
    return true;
}

static enum status expect(struct header *h, char c, const char *what)
{
    return take(h, c) ? ST_OK : fail(h, what);
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* The four digits of \uXXXX, or -1. */
static int32_t read_hex4(struct header *h)
{
    int32_t v = 0;

    if (h->end - h->p < 4)
        return -1;
    for (int i = 0; i < 4; i++) {
        int d = hex_digit(h->p[i]);
        if (d < 0)
            return -1;
        v = v * 16 + d;
    }
    h->p += 4;
    return v;
}

static void add_utf8(struct strbuf *b, int32_t c)
{
    char s[4];
    size_t n = 0;

    if (c < 0x80) {
        s[n++] = (char)c;
    } else if (c < 0x800) {
        s[n++] = (char)(0xc0 | c >> 6);
        s[n++] = (char)(0x80 | (c & 63));
    } else if (c < 0x10000) {
        s[n++] = (char)(0xe0 | c >> 12);
        s[n++] = (char)(0x80 | (c >> 6 & 63));
        s[n++] = (char)(0x80 | (c & 63));
    } else {
        s[n++] = (char)(0xf0 | c >> 18);
        s[n++] = (char)(0x80 | (c >> 12 & 63));
        s[n++] = (char)(0x80 | (c >> 6 & 63));
        s[n++] = (char)(0x80 | (c & 63));
    }
    strbuf_add(b, s, n);
}

static enum status read_unicode_escape(struct header *h)
{
    int32_t c = read_hex4(h);

    if (c >= 0xd800 && c < 0xdc00) {
        int32_t low = -1;
        if (h->end - h->p >= 2 && h->p[0] == '\\' && h->p[1] == 'u') {
            h->p += 2;
            low = read_hex4(h);
        }
        if (low < 0xdc00 || low > 0xdfff)
            return fail(h, "half a surrogate pair");
        c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
    } else if (c <= 0 || (c >= 0xdc00 && c <= 0xdfff)) {
        return fail(h, "a bad \\u escape");
    }
    add_utf8(&h->text, c);
    return ST_OK;
}

static enum status read_escape(struct header *h)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";

    if (h->p == h->end)
        return fail(h, "a string does not end");
    char c = *h->p++;
    if (c == 'u')
        return read_unicode_escape(h);
    const char *at = c ? strchr(from, c) : NULL;
    if (!at)
        return fail(h, "an unknown escape");
    strbuf_add(&h->text, &to[at - from], 1);
    return ST_OK;
}

/* A string into h->text. */
static enum status read_string(struct header *h)
{
    TRY(expect(h, '"', "a string was expected"));
    strbuf_clear(&h->text);
    strbuf_add(&h->text, "", 0);
    while (h->p < h->end && *h->p != '"') {
        const char *run = h->p;
        while (h->p < h->end && *h->p != '"' && *h->p != '\\' && (unsigned char)*h->p >= 0x20)
            h->p++;
        strbuf_add(&h->text, run, (size_t)(h->p - run));
        if (h->p < h->end && *h->p == '\\') {
            h->p++;
            TRY(read_escape(h));
        } else if (h->p < h->end && *h->p != '"') {
            return fail(h, "a control character in a string");
        }
    }
    return expect(h, '"', "a string does not end");
}

static enum status read_number(struct header *h, uint64_t *out)
{
    uint64_t v = 0;
    const char *first;

    skip_blank(h);
    for (first = h->p; h->p < h->end && *h->p >= '0' && *h->p <= '9'; h->p++)
        if (__builtin_mul_overflow(v, 10, &v)
            || __builtin_add_overflow(v, (uint64_t)(*h->p - '0'), &v))
            return fail(h, "a number is too large");
    if (h->p == first || (*first == '0' && h->p - first > 1)
        || (h->p < h->end && (*h->p == '.' || *h->p == 'e' || *h->p == 'E')))
        return fail(h, "a whole number was expected");
    *out = v;
    return ST_OK;
}

/* A list of at most max numbers. */
static enum status read_numbers(struct header *h, uint64_t *out, int max, int *n)
{
    *n = 0;
    TRY(expect(h, '[', "a list was expected"));
    if (take(h, ']'))
        return ST_OK;
    do {
        if (*n == max)
            return fail(h, "a list is too long");
        TRY(read_number(h, &out[(*n)++]));
    } while (take(h, ','));
    return expect(h, ']', "a list does not end");
}

static enum status skip_metadata(struct header *h)
{
    TRY(expect(h, '{', "__metadata__ must be an object"));
    if (take(h, '}'))
        return ST_OK;
    do {
        TRY(read_string(h));
        TRY(expect(h, ':', "':' was expected"));
        TRY(read_string(h));
    } while (take(h, ','));
    return expect(h, '}', "__metadata__ does not end");
}

static enum status read_type(struct header *h, struct tensor *t)
{
    TRY(read_string(h));
    for (int i = 0; i < N_TENSOR_TYPES; i++)
        if (strcmp(h->text.data, types[i].name) == 0) {
            t->type = (enum tensor_type)i;
            return ST_OK;
        }
    return error_set(h->err, ST_INVALID, "%s: tensor %.120s has the unknown type \"%.20s\"",
                     h->file, t->name, h->text.data);
}

static enum status read_offsets(struct header *h, struct tensor *t)
{
    uint64_t offsets[2];
    int n;

    TRY(read_numbers(h, offsets, 2, &n));
    if (n != 2 || offsets[1] < offsets[0])
        return error_set(h->err, ST_INVALID, "%s: tensor %.120s: \"data_offsets\" must be "
                         "[begin, end]", h->file, t->name);
    t->begin = offsets[0];
    t->bytes = offsets[1] - offsets[0];
    return ST_OK;
}

static enum status check_size(const struct header *h, const struct tensor *t)
{
    uint64_t bits = (uint64_t)types[t->type].bits;

    for (int i = 0; i < t->rank; i++)
        if (__builtin_mul_overflow(bits, t->shape[i], &bits))
            return error_set(h->err, ST_INVALID, "%s: the shape of tensor %.120s overflows",
                             h->file, t->name);
    if (bits % 8 != 0 || bits / 8 != t->bytes)
        return error_set(h->err, ST_INVALID, "%s: tensor %.120s has %llu bytes, its shape and "
                         "type say %llu bits", h->file, t->name, (unsigned long long)t->bytes,
                         (unsigned long long)bits);
    return ST_OK;
}

/* {"dtype": .., "shape": .., "data_offsets": ..} in any order. */
static enum status read_tensor(struct header *h, struct tensor *t)
{
    enum { DTYPE = 1, SHAPE = 2, OFFSETS = 4 };
    int seen = 0;

    h->tensor = t->name;
    TRY(expect(h, '{', "a tensor must be an object"));
    do {
        TRY(read_string(h));
        TRY(expect(h, ':', "':' was expected"));
        int key = strcmp(h->text.data, "dtype") == 0 ? DTYPE
                  : strcmp(h->text.data, "shape") == 0 ? SHAPE
                  : strcmp(h->text.data, "data_offsets") == 0 ? OFFSETS : 0;
        if (key == 0 || (seen & key))
            return error_set(h->err, ST_INVALID, "%s: tensor %.120s has the %s key \"%.40s\"",
                             h->file, t->name, key ? "repeated" : "unknown", h->text.data);
        seen |= key;
        if (key == DTYPE)
            TRY(read_type(h, t));
        else if (key == SHAPE)
            TRY(read_numbers(h, t->shape, TENSOR_MAX_RANK, &t->rank));
        else
            TRY(read_offsets(h, t));
    } while (take(h, ','));
    TRY(expect(h, '}', "a tensor does not end"));
    if (seen != (DTYPE | SHAPE | OFFSETS))
        return error_set(h->err, ST_INVALID, "%s: tensor %.120s lacks \"%s\"", h->file, t->name,
                         !(seen & DTYPE) ? "dtype" : !(seen & SHAPE) ? "shape" : "data_offsets");
    h->tensor = NULL;
    return check_size(h, t);
}

static struct tensor *list_add(struct tensor_list *list, const char *name, int file)
{
    if (list->n == list->capacity) {
        list->capacity = list->capacity ? 2 * list->capacity : 64;
        list->at = mem_realloc(list->at, list->capacity, sizeof *list->at);
    }
    struct tensor *t = &list->at[list->n++];
    *t = (struct tensor){ .name = mem_strdup(name), .file = file };
    return t;
}

void tensor_list_fini(struct tensor_list *list)
{
    for (size_t i = 0; i < list->n; i++)
        mem_free((char *)list->at[i].name);
    mem_free(list->at);
    *list = (struct tensor_list){ 0 };
}

static enum status read_entry(struct header *h, struct tensor_list *list, int file,
                              bool *metadata)
{
    TRY(read_string(h));
    TRY(expect(h, ':', "':' was expected"));
    if (strcmp(h->text.data, "__metadata__") == 0) {
        if (*metadata)
            return fail(h, "__metadata__ is there twice");
        *metadata = true;
        return skip_metadata(h);
    }
    if (h->text.n > MAX_NAME_BYTES || list->n >= MAX_TENSORS)
        return fail(h, "a name is too long, or there are too many tensors");
    return read_tensor(h, list_add(list, h->text.data, file));
}

static enum status read_entries(struct header *h, struct tensor_list *list, int file)
{
    bool metadata = false;

    if (h->p == h->end || *h->p != '{')
        return fail(h, "'{' was expected");
    h->p++;
    if (!take(h, '}')) {
        do
            TRY(read_entry(h, list, file, &metadata));
        while (take(h, ','));
        TRY(expect(h, '}', "the header does not end"));
    }
    while (h->p < h->end && *h->p == ' ')
        h->p++;
    return h->p == h->end ? ST_OK : fail(h, "only spaces may follow the header");
}

static int by_begin(const void *a, const void *b)
{
    const struct tensor *x = a, *y = b;

    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;   /* empty ones first */
}

/* In order of their offsets the tensors must follow each other without gap. */
static enum status check_cover(const struct header *h, struct tensor *t, size_t n,
                               uint64_t data_bytes)
{
    uint64_t at = 0;

    if (n > 1)
        qsort(t, n, sizeof *t, by_begin);
    for (size_t i = 0; i < n; i++) {
        if (t[i].begin != at)
            return error_set(h->err, ST_INVALID, "%s: tensor %.120s begins at %llu, but %llu is "
                             "where the one before it ends", h->file, t[i].name,
                             (unsigned long long)t[i].begin, (unsigned long long)at);
        at += t[i].bytes;        /* begin + bytes did not overflow: it was an end */
    }
    if (at != data_bytes)
        return error_set(h->err, ST_INVALID, "%s: the tensors take %llu bytes, the file has %llu "
                         "of data", h->file, (unsigned long long)at,
                         (unsigned long long)data_bytes);
    return ST_OK;
}

enum status safetensors_header_read(struct tensor_list *list, const char *name,
                                    const char *json, size_t n, uint64_t data_bytes, int file,
                                    struct error *err)
{
    struct header h = { .file = name, .start = json, .p = json, .end = json + n, .err = err };
    size_t first = list->n, valid = utf8_valid_prefix(json, n);

    h.p = json + valid;
    if (valid != n)
        return fail(&h, "not valid UTF-8");
    h.p = json;
    enum status st = read_entries(&h, list, file);
    strbuf_fini(&h.text);
    if (st == ST_OK && list->n > first)
        st = check_cover(&h, list->at + first, list->n - first, data_bytes);
    else if (st == ST_OK && data_bytes != 0)
        st = error_set(err, ST_INVALID, "%s: no tensors, but %llu bytes of data", name,
                       (unsigned long long)data_bytes);
    return st;
}
