/* A character that has combining class 0 and has nothing to do with what stands
 * before it starts a segment; segments do not influence each other.  A segment
 * of one character that does not decompose is in form C, and nearly all are.
 * The others are decomposed, their marks sorted by class, and composed again.
 *
 * utf8proc knows the decompositions and compositions.  Its own normalization of
 * whole strings is not used because its order of marks differs (unicode.h) and
 * because its sort is quadratic in the length of a run of marks. */

#include "engine/model/nfc.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/model/unicode.h"

#include <stdint.h>
#include <stdlib.h>
#include <utf8proc.h>

/* Below, every character is a segment and its own form C. */
#define FIRST_MARK 0x300

enum {
    HANGUL_FIRST = 0xAC00,
    HANGUL_LAST = 0xD7A3,
    /* Its composition is younger than the tables of the normalizer. */
    LATE_COMPOSITE = 0x11938
};

/* Characters of class 0 that compose with the one before them (vowel signs and
 * length marks of Indic scripts, Hangul vowels and final consonants) or
 * decompose into marks (three vowel signs of Tibetan). */
static bool joins_previous(int32_t c)
{
    static const int32_t joining[] = {
        0x09BE, 0x09D7, 0x0B3E, 0x0B56, 0x0B57, 0x0BBE, 0x0BD7, 0x0CC2, 0x0CD5, 0x0CD6,
        0x0D3E, 0x0D57, 0x0DCF, 0x0DDF, 0x0F73, 0x0F75, 0x0F81, 0x102E, 0x1B35, 0x11127,
        0x1133E, 0x11357, 0x114B0, 0x114BA, 0x114BD, 0x115AF,
    };

    if ((c >= 0x1161 && c <= 0x1175) || (c >= 0x11A8 && c <= 0x11C2))
        return true;
    for (size_t i = 0; i < sizeof joining / sizeof joining[0]; i++)
        if (c == joining[i])
            return true;
    return false;
}

/* Characters that no table need be asked about: Latin and ideographs. */
static bool is_plain(int32_t c)
{
    return c < FIRST_MARK || (c >= 0x3400 && c <= 0x9FFF);
}

static bool starts_segment(int32_t c)
{
    return is_plain(c) || (unicode_combining_class(c) == 0 && !joins_previous(c));
}

static int decompose(int32_t c, int32_t out[4])
{
    int boundary = 0;

    if (c == LATE_COMPOSITE) {
        out[0] = c;
        return 1;
    }
    utf8proc_ssize_t n = utf8proc_decompose_char(c, out, 4, UTF8PROC_DECOMPOSE, &boundary);
    ASSERT(n > 0 && n <= 4);   /* canonical decompositions have at most four */
    return (int)n;
}

/* Whether the segment that is c alone is in form C. */
static bool stands_alone(int32_t c)
{
    int32_t parts[4];

    if (is_plain(c) || (c >= HANGUL_FIRST && c <= HANGUL_LAST))
        return true;
    return decompose(c, parts) == 1 && parts[0] == c;
}

/* The length of the segment at s, n > 0; *quick if it is in form C for certain. */
static size_t segment(const char *s, size_t n, bool *quick)
{
    size_t length, step;
    int32_t c = unicode_decode(s, &length);

    *quick = starts_segment(c) && stands_alone(c);
    while (length < n) {
        c = unicode_decode(s + length, &step);
        if (starts_segment(c))
            break;
        *quick = false;
        length += step;
    }
    return length;
}

/* The length of the run of characters that no test is needed for: each starts a
 * segment, is in form C alone, and so is the next. */
static size_t plain_prefix(const char *s, size_t n)
{
    size_t at = 0;

    /* First bytes up to CB are characters below U+0300. */
    while (at < n && (unsigned char)s[at] < 0xCC)
        at++;
    if (at == n)
        return n;
    /* The last of them may take part in the segment of what follows. */
    while (at > 0 && ((unsigned char)s[--at] & 0xC0) == 0x80)
        ;
    return at;
}

bool nfc_is_quick(const char *s, size_t n)
{
    size_t at = 0;
    bool quick = true;

    while (at < n && quick) {
        at += plain_prefix(s + at, n - at);
        if (at < n)
            at += segment(s + at, n - at, &quick);
    }
    return quick;
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* A decomposed character, ordered by class and then by where it stood. */
static uint64_t sort_key(int class, size_t index, int32_t c)
{
    return (uint64_t)class << 56 | (uint64_t)index << 21 | (uint64_t)c;
}

static int32_t char_of(uint64_t key)
{
    return (int32_t)(key & 0x1FFFFF);
}

static int class_of(uint64_t key)
{
    return (int)(key >> 56);
}

/* Sort each run of characters whose class is not 0. */
static void order_marks(uint64_t *keys, size_t n)
{
    for (size_t i = 0; i < n;) {
        size_t start = i;
        bool ordered = true;
        while (i < n && class_of(keys[i]) != 0) {
            ordered = ordered && (i == start || keys[i - 1] < keys[i]);
            i++;
        }
        if (!ordered)
            qsort(keys + start, i - start, sizeof *keys, by_value);
        i += i == start;
    }
}

/* The character that first and second compose to, or 0. */
static int32_t composite(int32_t first, int32_t second)
{
    int32_t pair[3] = { first, second, 0 };   /* utf8proc wants room for one more */
    utf8proc_ssize_t n = utf8proc_normalize_utf32(pair, 2, UTF8PROC_STABLE | UTF8PROC_COMPOSE);

    return n == 1 && pair[0] != LATE_COMPOSITE ? pair[0] : 0;
}

/* Compose keys[0..n) in place; returns how many are left. */
static size_t compose(uint64_t *keys, size_t n)
{
    size_t kept = 0, starter = SIZE_MAX;

    for (size_t i = 0; i < n; i++) {
        int class = class_of(keys[i]);
        /* Whatever was kept after the starter blocks characters of its own
         * class and below, and a starter blocks everything. */
        bool blocked = starter == SIZE_MAX ||
                       (kept > starter + 1 && class_of(keys[kept - 1]) >= class);
        int32_t c = blocked ? 0 : composite(char_of(keys[starter]), char_of(keys[i]));
        if (c) {
            keys[starter] = sort_key(0, 0, c);
            continue;
        }
        if (class == 0)
            starter = kept;
        keys[kept++] = keys[i];
    }
    return kept;
}

static void append_segment(struct strbuf *out, const char *s, size_t n)
{
    uint64_t small[32];
    /* A character of k bytes decomposes into at most 2k + 1 <= 3k others. */
    uint64_t *keys = 3 * n <= 32 ? small : mem_alloc(3 * n * sizeof *keys);
    size_t count = 0, step;

    for (size_t at = 0; at < n; at += step) {
        int32_t parts[4];
        int n_parts = decompose(unicode_decode(s + at, &step), parts);
        for (int i = 0; i < n_parts; i++, count++)
            keys[count] = sort_key(unicode_combining_class(parts[i]), count, parts[i]);
    }
    order_marks(keys, count);
    count = compose(keys, count);
    for (size_t i = 0; i < count; i++) {
        utf8proc_uint8_t *room = (utf8proc_uint8_t *)strbuf_room(out, 4);
        out->n += (size_t)utf8proc_encode_char(char_of(keys[i]), room);
    }
    if (keys != small)
        mem_free(keys);
}

void nfc_append(struct strbuf *out, const char *s, size_t n)
{
    size_t at = 0, copied = 0;

    while (at < n) {
        bool quick = true;
        at += plain_prefix(s + at, n - at);
        if (at == n)
            break;
        size_t length = segment(s + at, n - at, &quick);
        if (!quick) {
            strbuf_add(out, s + copied, at - copied);
            append_segment(out, s + at, length);
            copied = at + length;
        }
        at += length;
    }
    strbuf_add(out, s + copied, n - copied);
}
