#include "engine/model/pretokenize.h"

#include "engine/base/invariant.h"
#include "engine/model/unicode.h"

#include <stdint.h>
#include <string.h>

static const struct {
    enum splitter kind;
    const char *pattern;
} patterns[] = {
    { SPLIT_GPT2, "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|"
                  "\\s+(?!\\S)|\\s+" },
    { SPLIT_QWEN, "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
                  " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+" },
    { SPLIT_LLAMA3, "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
                    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+" },
};

bool splitter_find(enum splitter *out, const char *pattern)
{
    for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++)
        if (strcmp(pattern, patterns[i].pattern) == 0) {
            *out = patterns[i].kind;
            return true;
        }
    return false;
}

/* The end of the run of characters of one class that starts at `at`; at most
 * `limit` of them. */
static size_t run_end(const char *s, size_t n, size_t at, enum char_class class, size_t limit)
{
    size_t length;

    while (at < n && limit-- && unicode_class_at(s + at, &length) == class)
        at += length;
    return at;
}

static size_t newlines_end(const char *s, size_t n, size_t at)
{
    while (at < n && (s[at] == '\r' || s[at] == '\n'))
        at++;
    return at;
}

/* 's 't 're 've 'm 'll 'd at the start: its length, or 0.  Without regard to
 * case the long s is an s too; no other letter outside ASCII folds into these. */
static size_t contraction(const char *s, size_t n, bool any_case)
{
    static const char suffixes[][3] = { "s", "t", "re", "ve", "m", "ll", "d" };
    char fold = any_case ? 0x20 : 0;

    if (n < 2 || s[0] != '\'')
        return 0;
    for (size_t i = 0; i < sizeof suffixes / sizeof suffixes[0]; i++) {
        size_t length = strlen(suffixes[i]), k = 0;
        while (k < length && 1 + k < n && (s[1 + k] | fold) == suffixes[i][k])
            k++;
        if (k == length)
            return 1 + length;
    }
    if (any_case && n >= 3 && memcmp(s + 1, "\xC5\xBF", 2) == 0)
        return 3;
    return 0;
}

/* A run of white space at the start, by `\s+(?!\S)|\s+`: all of it if nothing
 * follows, otherwise all but its last character if it has two. */
static size_t space_word(const char *s, size_t n)
{
    size_t end = 0, last = 0, length;

    while (end < n && unicode_class_at(s + end, &length) == CHAR_SPACE) {
        last = end;
        end += length;
    }
    return end == n || last == 0 ? end : last;
}

/* R3: contractions, then a run of letters, of numbers or of others, each with
 * one blank in front if there is one, then white space. */
static size_t gpt2_word(const char *s, size_t n)
{
    size_t length = contraction(s, n, false), blank = s[0] == ' ' && n > 1;

    if (length)
        return length;
    enum char_class class = unicode_class_at(s + blank, &length);
    if (class == CHAR_SPACE)
        return space_word(s, n);
    return run_end(s, n, blank + length, class, SIZE_MAX);
}

/* R1 and R2, which differ in how many digits go together. */
static size_t qwen_word(const char *s, size_t n, size_t max_digits)
{
    size_t length = contraction(s, n, true), next, end;

    if (length)
        return length;
    enum char_class class = unicode_class_at(s, &length);

    /* [^\r\n\p{L}\p{N}]?\p{L}+ */
    if (class == CHAR_LETTER)
        return run_end(s, n, length, CHAR_LETTER, SIZE_MAX);
    if (class == CHAR_NUMBER)
        return run_end(s, n, length, CHAR_NUMBER, max_digits - 1);
    if (s[0] != '\r' && s[0] != '\n' && length < n &&
        unicode_class_at(s + length, &next) == CHAR_LETTER)
        return run_end(s, n, length + next, CHAR_LETTER, SIZE_MAX);

    /*  ?[^\s\p{L}\p{N}]+[\r\n]* */
    size_t blank = s[0] == ' ';
    end = run_end(s, n, blank, CHAR_OTHER, SIZE_MAX);
    if (end > blank)
        return newlines_end(s, n, end);

    /* \s*[\r\n]+: through the last newline of the white space. */
    size_t last_newline = 0;
    for (end = 0; end < n && unicode_class_at(s + end, &length) == CHAR_SPACE; end += length)
        if (s[end] == '\r' || s[end] == '\n')
            last_newline = end + 1;
    return last_newline ? last_newline : space_word(s, n);
}

/* One numeric character, or everything up to the next. */
static size_t digits_word(const char *s, size_t n)
{
    size_t length, at;

    if (unicode_is_numeric(unicode_decode(s, &length)))
        return length;
    for (at = length; at < n; at += length)
        if (unicode_is_numeric(unicode_decode(s + at, &length)))
            break;
    return at;
}

size_t splitter_first(enum splitter kind, const char *s, size_t n)
{
    ASSERT(n > 0);
    switch (kind) {
    case SPLIT_GPT2:
        return gpt2_word(s, n);
    case SPLIT_QWEN:
        return qwen_word(s, n, 1);
    case SPLIT_LLAMA3:
        return qwen_word(s, n, 3);
    case SPLIT_DIGITS:
        break;
    }
    return digits_word(s, n);
}

void words_init(struct words *w, const struct pretokenizer *pre, const char *s, size_t n)
{
    *w = (struct words){ .pre = pre, .s = s };
    w->end[0] = n;
}

/* end[i + 1] is the end of the word of splitter i that `at` lies in; a word that
 * is used up, equal to `at`, is followed by the next one. */
size_t words_next(struct words *w, const char **word)
{
    size_t start = w->at;
    int n = w->pre->n;

    if (start == w->end[0])
        return 0;
    for (int i = 0; i < n; i++)
        if (w->end[i + 1] == start)
            w->end[i + 1] += splitter_first(w->pre->kinds[i], w->s + start, w->end[i] - start);
    *word = w->s + start;
    w->at = w->end[n];
    return w->at - start;
}

/* Letters that are letters in normal form too.  (Others may decompose into a
 * letter and a mark, and then what follows may belong to the mark.) */
static bool is_plain_letter(int32_t c)
{
    if (c < 0x80)
        return unicode_ascii_class[c] == CHAR_LETTER;
    return (c >= 0x0400 && c <= 0x0481) || (c >= 0x3041 && c <= 0x3096) ||   /* Cyrillic, kana */
           (c >= 0x30A1 && c <= 0x30FA) || (c >= 0x3400 && c <= 0x4DBF) ||
           (c >= 0x4E00 && c <= 0x9FFC) || (c >= 0xAC00 && c <= 0xD7A3);     /* Hangul */
}

/* Characters that are no letters and never compose with what is before them. */
static bool is_plain_break(const char *s, size_t n)
{
    unsigned char first = (unsigned char)*s;

    if (first < 0x80)
        return unicode_ascii_class[first] != CHAR_LETTER;
    return n >= 3 && (memcmp(s, "\u3001", 3) == 0 || memcmp(s, "\u3002", 3) == 0 ||
                      memcmp(s, "\uFF0C", 3) == 0);
}

/* Between a letter and what is none: every alternative of a pattern that takes a
 * letter stops there at the latest, the look-aheads only see white space, and
 * nothing composes across the cut. */
size_t pretokenize_cut(const struct pretokenizer *pre, const char *s, size_t n, size_t from)
{
    bool has_pattern = false;
    size_t length;

    for (int i = 0; i < pre->n; i++)
        has_pattern = has_pattern || pre->kinds[i] != SPLIT_DIGITS;
    if (!has_pattern)
        return n;
    for (size_t at = from ? from : 1; at < n; at++)
        if (is_plain_break(s + at, n - at) &&
            is_plain_letter(unicode_decode_last(s, at, &length)))
            return at;
    return n;
}
