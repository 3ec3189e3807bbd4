#include "engine/base/utf8.h"

#include <stdint.h>
#include <string.h>

/* What a first byte promises: how many bytes follow it, and the range of the
 * second.  The range alone keeps out overlong forms, surrogates and everything
 * above U+10FFFF; the bytes after the second are always 80..BF. */
struct promise {
    int n_more;
    unsigned char low, high;
};

static struct promise promise_of(unsigned char first)
{
    if (first >= 0xC2 && first <= 0xDF)
        return (struct promise){ 1, 0x80, 0xBF };
    if (first >= 0xE0 && first <= 0xEF)
        return (struct promise){ 2, first == 0xE0 ? 0xA0 : 0x80, first == 0xED ? 0x9F : 0xBF };
    if (first >= 0xF0 && first <= 0xF4)
        return (struct promise){ 3, first == 0xF0 ? 0x90 : 0x80, first == 0xF4 ? 0x8F : 0xBF };
    return (struct promise){ 0, 0, 0 };
}

int utf8_classify(const char *s, size_t n)
{
    unsigned char first = (unsigned char)s[0];
    struct promise p;

    if (first < 0x80)
        return 1;
    p = promise_of(first);
    if (p.n_more == 0)
        return -1;
    for (int i = 1; i <= p.n_more; i++) {
        if ((size_t)i == n)
            return 0;
        unsigned char c = (unsigned char)s[i];
        if (c < (i == 1 ? p.low : 0x80) || c > (i == 1 ? p.high : 0xBF))
            return -i;
    }
    return p.n_more + 1;
}

size_t utf8_valid_prefix(const char *s, size_t n)
{
    size_t at = 0;

    while (at < n) {
        /* Most text is ASCII: take it 32 bytes at a time. */
        while (n - at >= 32) {
            uint64_t w[4];
            memcpy(w, s + at, sizeof w);
            if ((w[0] | w[1] | w[2] | w[3]) & 0x8080808080808080u)
                break;
            at += 32;
        }
        if (at == n)
            break;
        int length = utf8_classify(s + at, n - at);
        if (length <= 0)
            break;
        at += (size_t)length;
    }
    return at;
}
