#include "engine/base/invariant.h"
#include "engine/base/utf8.h"
#include "engine/model/tokenizer.h"

#include <string.h>

static const char replacement[3] = { '\xEF', '\xBF', '\xBD' };   /* U+FFFD */

void detokenizer_init(struct detokenizer *d, const struct tokenizer *t, bool skip_special)
{
    *d = (struct detokenizer){ .tok = t, .skip_special = skip_special };
}

static const char *contribution(const struct detokenizer *d, int32_t id, size_t *n)
{
    const char *bytes = tokenizer_bytes(d->tok, id, n);

    if (d->skip_special && tokenizer_is_special(d->tok, id))
        *n = 0;
    return bytes;
}

/* Each byte, held or pushed, becomes itself or at worst a U+FFFD of its own. */
size_t detokenizer_max_bytes(const struct detokenizer *d, int32_t id)
{
    size_t n;

    contribution(d, id, &n);
    return n ? sizeof replacement * ((size_t)d->n_held + n) : 0;
}

/* Complete or refute the held character with bytes of s[0..n); how many of them
 * were used is added to *used, what is decided is appended at out. */
static size_t settle_held(struct detokenizer *d, const char *s, size_t n, size_t *used,
                          char *out)
{
    while (d->n_held > 0) {
        int length = utf8_classify((const char *)d->held, (size_t)d->n_held);
        if (length > 0) {
            memcpy(out, d->held, (size_t)length);
            d->n_held = 0;
            return (size_t)length;
        }
        if (length < 0) {
            /* Only the byte that came last can refute what was possible
             * before; it may start a character itself, so it is not used. */
            ASSERT(-length == d->n_held - 1 && *used > 0);
            memcpy(out, replacement, sizeof replacement);
            d->n_held = 0;
            --*used;
            return sizeof replacement;
        }
        if (*used == n)
            return 0;
        d->held[d->n_held++] = (unsigned char)s[(*used)++];
    }
    return 0;
}

size_t detokenizer_push(struct detokenizer *d, int32_t id, char *out)
{
    size_t n, at = 0;
    const char *s = contribution(d, id, &n);
    size_t written = settle_held(d, s, n, &at, out);

    while (at < n) {
        size_t whole = utf8_valid_prefix(s + at, n - at);
        memcpy(out + written, s + at, whole);
        written += whole;
        at += whole;
        if (at == n)
            break;
        int length = utf8_classify(s + at, n - at);
        if (length == 0) {
            d->n_held = (int)(n - at);
            memcpy(d->held, s + at, n - at);
            break;
        }
        memcpy(out + written, replacement, sizeof replacement);
        written += sizeof replacement;
        at += (size_t)-length;
    }
    return written;
}

size_t detokenizer_flush(struct detokenizer *d, char *out)
{
    size_t n = d->n_held ? sizeof replacement : 0;

    memcpy(out, replacement, n);
    d->n_held = 0;
    return n;
}
