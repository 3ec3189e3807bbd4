#ifndef MODEL_UNICODE_H
#define MODEL_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What the tokenizer asks about characters.  The answers are those of the
 * libraries behind Hugging Face `tokenizers`, which carry Unicode tables of
 * different ages: 16 for the split patterns, 17 for Digits, 9 for
 * normalization.  utf8proc gives the bulk and unicode.c the differences.
 *
 * All text is valid UTF-8: nothing here looks past a character's first byte to
 * see whether the rest is there. */

/* The classes of the split patterns: \s, \p{L}, \p{N}, and what is left. */
enum char_class { CHAR_OTHER, CHAR_SPACE, CHAR_LETTER, CHAR_NUMBER };

extern const uint8_t unicode_ascii_class[128];
enum char_class unicode_class(int32_t c);

/* Digits of the Digits pre-tokenizer: \p{N} and a few more. */
bool unicode_is_numeric(int32_t c);

/* \w as the matching of added tokens understands it. */
bool unicode_is_word(int32_t c);

/* The canonical combining class that orders marks under normalization. */
int unicode_combining_class(int32_t c);

/* The character at s, and its length in *n. */
static inline int32_t unicode_decode(const char *s, size_t *n)
{
    const unsigned char *u = (const unsigned char *)s;

    if (u[0] < 0x80) {
        *n = 1;
        return u[0];
    }
    if (u[0] < 0xE0) {
        *n = 2;
        return (u[0] & 0x1F) << 6 | (u[1] & 0x3F);
    }
    if (u[0] < 0xF0) {
        *n = 3;
        return (u[0] & 0x0F) << 12 | (u[1] & 0x3F) << 6 | (u[2] & 0x3F);
    }
    *n = 4;
    return (u[0] & 0x07) << 18 | (u[1] & 0x3F) << 12 | (u[2] & 0x3F) << 6 | (u[3] & 0x3F);
}

/* The last character of s[0..n), n > 0; its length in *length. */
static inline int32_t unicode_decode_last(const char *s, size_t n, size_t *length)
{
    size_t at = n - 1;

    while (at > 0 && ((unsigned char)s[at] & 0xC0) == 0x80)
        at--;
    return unicode_decode(s + at, length);
}

static inline enum char_class unicode_class_at(const char *s, size_t *n)
{
    unsigned char first = (unsigned char)*s;

    if (first < 0x80) {
        *n = 1;
        return unicode_ascii_class[first];
    }
    return unicode_class(unicode_decode(s, n));
}

#endif
