#ifndef BASE_UTF8_H
#define BASE_UTF8_H

#include <stdbool.h>
#include <stddef.h>

/* UTF-8 as Unicode defines it: no overlong forms, no surrogates, at most
 * U+10FFFF. */

/* Length of the longest valid prefix of s[0..n). */
size_t utf8_valid_prefix(const char *s, size_t n);

static inline bool utf8_is_valid(const char *s, size_t n)
{
    return utf8_valid_prefix(s, n) == n;
}

/* What stands at s[0..n), n > 0:
 *   > 0   a whole character of that many bytes
 *   0     the start of a character that more bytes may complete
 *   < 0   -k: a maximal invalid prefix of k bytes, to be replaced by U+FFFD */
int utf8_classify(const char *s, size_t n);

#endif
