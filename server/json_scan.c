#include "server/json_scan.h"

#include "engine/base/utf8.h"

#include <stdint.h>
#include <string.h>

struct scanner {
    const char *s;
    size_t n, at;
    size_t n_values, max_values;
    int depth, max_depth;
    uint64_t objects; /* bit d: the container at depth d + 1 is an object */
    struct json_scan *out;
    struct error *err;
};

_Static_assert(JSON_MAX_DEPTH <= 64, "one bit a level");

static enum status broken(struct scanner *sc, const char *what)
{
    return error_set(sc->err, ST_INVALID, "The request body is not valid JSON: %s at byte %zu.",
                     what, sc->at);
}

static void skip_space(struct scanner *sc)
{
    while (sc->at < sc->n) {
        char c = sc->s[sc->at];
        if (c != ' ' && c != '\n' && c != '\r' && c != '\t')
            break;
        sc->at++;
    }
}

/* The byte ahead, or NUL at the end; a NUL in the text fits nowhere either. */
static char peek(const struct scanner *sc)
{
    return sc->at < sc->n ? sc->s[sc->at] : '\0';
}

/* Four hexadecimal digits behind \u, or -1. */
static int hex4(const struct scanner *sc, size_t at)
{
    int value = 0;

    if (sc->n < 4 || at > sc->n - 4)
        return -1;
    for (size_t i = at; i < at + 4; i++) {
        char c = sc->s[i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0)
            return -1;
        value = value * 16 + digit;
    }
    return value;
}

static bool low_surrogate_at(const struct scanner *sc, size_t at)
{
    if (sc->n < 6 || at > sc->n - 6 || sc->s[at] != '\\' || sc->s[at + 1] != 'u')
        return false;
    int code = hex4(sc, at + 2);
    return code >= 0xDC00 && code <= 0xDFFF;
}

static enum status scan_escape(struct scanner *sc)
{
    char c = sc->at + 1 < sc->n ? sc->s[sc->at + 1] : '\0';

    if (c != 'u') {
        if (c == '\0' || !strchr("\"\\/bfnrt", c))
            return broken(sc, "unknown escape");
        sc->at += 2;
        return ST_OK;
    }
    int code = hex4(sc, sc->at + 2);
    if (code < 0)
        return broken(sc, "incomplete \\u escape");
    if (code == 0)
        return error_set(sc->err, ST_INVALID,
                         "The request body has a NUL character (\\u0000) at "
                         "byte %zu, which texts cannot hold.",
                         sc->at);
    if (code >= 0xDC00 && code <= 0xDFFF)
        return broken(sc, "lone surrogate");
    if (code >= 0xD800 && code <= 0xDBFF) {
        if (!low_surrogate_at(sc, sc->at + 6))
            return broken(sc, "lone surrogate");
        sc->at += 6;
    }
    sc->at += 6;
    return ST_OK;
}

static enum status scan_string(struct scanner *sc)
{
    sc->at++;
    while (sc->at < sc->n) {
        unsigned char c = (unsigned char)sc->s[sc->at];
        if (c == '"') {
            sc->at++;
            return ST_OK;
        }
        if (c < 0x20)
            return broken(sc, c ? "control character in a string" : "NUL byte");
        if (c == '\\')
            TRY(scan_escape(sc));
        else
            sc->at++;
    }
    return broken(sc, "unfinished string");
}

static size_t scan_digits(struct scanner *sc)
{
    size_t from = sc->at;

    while (peek(sc) >= '0' && peek(sc) <= '9')
        sc->at++;
    return sc->at - from;
}

static enum status scan_number(struct scanner *sc, bool *fraction)
{
    size_t from = sc->at;

    sc->at += peek(sc) == '-';
    bool zero = peek(sc) == '0';
    size_t digits = scan_digits(sc);
    if (digits == 0 || (zero && digits > 1))
        return broken(sc, "malformed number");
    if (peek(sc) == '.') {
        *fraction = true;
        sc->at++;
        if (scan_digits(sc) == 0)
            return broken(sc, "malformed number");
    }
    if (peek(sc) == 'e' || peek(sc) == 'E') {
        *fraction = true;
        sc->at++;
        sc->at += peek(sc) == '+' || peek(sc) == '-';
        if (scan_digits(sc) == 0)
            return broken(sc, "malformed number");
    }
    return sc->at - from > JSON_MAX_NUMBER_BYTES ? broken(sc, "number of too many digits")
                                                 : ST_OK;
}

static enum status scan_word(struct scanner *sc)
{
    static const char *const words[] = { "true", "false", "null" };

    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        size_t length = strlen(words[i]);
        if (sc->n - sc->at >= length && memcmp(sc->s + sc->at, words[i], length) == 0) {
            sc->at += length;
            return ST_OK;
        }
    }
    return broken(sc, sc->at == sc->n ? "it ends early" : "unexpected character");
}

static bool in_object(const struct scanner *sc)
{
    return sc->depth > 0 && (sc->objects >> (sc->depth - 1) & 1);
}

/* The member that is being read, if the scan is inside one. */
static struct json_member *current_member(struct scanner *sc)
{
    return sc->out && sc->out->n_members ? &sc->out->members[sc->out->n_members - 1] : NULL;
}

/* "key": up to where its value starts. */
static enum status scan_key(struct scanner *sc)
{
    skip_space(sc);
    if (peek(sc) != '"')
        return broken(sc, sc->at == sc->n ? "it ends early" : "expected a key in quotes");
    TRY(scan_string(sc));
    skip_space(sc);
    if (peek(sc) != ':')
        return broken(sc, sc->at == sc->n ? "it ends early" : "expected a colon");
    sc->at++;
    if (sc->depth > 1 || !sc->out)
        return ST_OK;
    if (sc->out->n_members == JSON_MAX_MEMBERS)
        return error_set(sc->err, ST_INVALID, "The request body has more than %d fields.",
                         JSON_MAX_MEMBERS);
    skip_space(sc);
    sc->out->members[sc->out->n_members++] = (struct json_member){ .value = sc->at };
    return ST_OK;
}

static enum status open_container(struct scanner *sc)
{
    bool object = peek(sc) == '{';

    if (sc->depth == sc->max_depth)
        return error_set(sc->err, ST_INVALID,
                         "The request body is nested deeper than %d levels.", sc->max_depth);
    sc->objects &= ~(UINT64_C(1) << sc->depth);
    sc->objects |= (uint64_t)object << sc->depth;
    sc->depth++;
    sc->at++;
    return ST_OK;
}

/* One scalar, or the opening of a container; *opened tells which. */
static enum status scan_value(struct scanner *sc, bool *opened)
{
    bool fraction = false;

    skip_space(sc);
    *opened = false;
    if (sc->n_values++ >= sc->max_values)
        return error_set(sc->err, ST_INVALID, "The request body has more than %zu JSON values.",
                         sc->max_values);
    switch (peek(sc)) {
    case '{':
    case '[':
        *opened = true;
        return open_container(sc);
    case '"':
        return scan_string(sc);
    case '-':
    case '0':
    case '1':
    case '2':
    case '3':
    case '4':
    case '5':
    case '6':
    case '7':
    case '8':
    case '9':
        TRY(scan_number(sc, &fraction));
        if (fraction && current_member(sc))
            current_member(sc)->fraction = true;
        return ST_OK;
    default:
        return scan_word(sc);
    }
}

/* After a value: close what ends here.  *more: a comma followed. */
static enum status scan_after(struct scanner *sc, bool *more)
{
    *more = false;
    while (sc->depth > 0) {
        if (sc->depth == 1 && in_object(sc) && current_member(sc)) {
            struct json_member *m = current_member(sc);
            if (m->value_bytes == 0)
                m->value_bytes = sc->at - m->value;
        }
        skip_space(sc);
        char c = peek(sc);
        if (c == ',') {
            sc->at++;
            *more = true;
            return ST_OK;
        }
        if (c != (in_object(sc) ? '}' : ']'))
            return broken(sc, sc->at == sc->n ? "it ends early"
                                              : "expected a comma or a closing bracket");
        sc->at++;
        sc->depth--;
    }
    return ST_OK;
}

static enum status scan_document(struct scanner *sc)
{
    size_t valid = utf8_valid_prefix(sc->s, sc->n);
    bool opened, more = true;

    if (valid != sc->n)
        return error_set(sc->err, ST_INVALID, "The request body is not valid UTF-8 at byte %zu.",
                         valid);
    while (more) {
        if (in_object(sc))
            TRY(scan_key(sc));
        TRY(scan_value(sc, &opened));
        if (opened) {
            skip_space(sc);
            if (peek(sc) != (in_object(sc) ? '}' : ']'))
                continue;
        }
        TRY(scan_after(sc, &more));
    }
    skip_space(sc);
    return sc->at == sc->n ? ST_OK : broken(sc, "something follows the JSON value");
}

enum status json_scan(struct json_scan *out, const char *text, size_t n, size_t max_values,
                      struct error *err)
{
    struct scanner sc = { .s = text, .n = n, .max_values = max_values,
                          .max_depth = JSON_MAX_DEPTH, .out = out, .err = err };

    out->n_members = 0;
    if (n == 0)
        return error_set(err, ST_INVALID,
                         "The request body is empty; a JSON object is expected.");
    if (n >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0)
        return error_set(err, ST_INVALID,
                         "The request body begins with a byte order mark; JSON "
                         "has none.");
    skip_space(&sc);
    out->object = peek(&sc) == '{';
    return scan_document(&sc);
}

bool json_is_value(const char *text, size_t n, int around)
{
    struct scanner sc = { .s = text, .n = n, .max_values = n,
                          .max_depth = JSON_MAX_DEPTH - around };

    return scan_document(&sc) == ST_OK;
}
