#ifndef MODEL_PRETOKENIZE_H
#define MODEL_PRETOKENIZE_H

#include <stdbool.h>
#include <stddef.h>

/* Splitting text into the words that BPE works on, one after the other.
 *
 * A splitter cuts a piece into words without gaps, from left to right, and
 * where it cuts depends on nothing before the cut; so "the length of the first
 * word" is all of it.  Several splitters nest: each cuts the words of the one
 * before it.
 *
 * The patterns are matched by hand and not by PCRE2: the few that exist are
 * short, hand-written matchers are linear and some ten times faster, and the
 * Unicode tables of PCRE2 are older than those that define the ids. */

enum splitter {
    SPLIT_GPT2,      /* R3: inside ByteLevel where use_regex is set */
    SPLIT_QWEN,      /* R1: each digit alone */
    SPLIT_LLAMA3,    /* R2: up to three digits together */
    SPLIT_DIGITS     /* Digits with individual_digits */
};

/* The splitter for a pattern of tokenizer.json, by equality.  False: unknown. */
bool splitter_find(enum splitter *out, const char *pattern);

/* The length in bytes of the first word of s[0..n), n > 0, valid UTF-8. */
size_t splitter_first(enum splitter kind, const char *s, size_t n);

enum { MAX_SPLITTERS = 4 };

/* The splitters of a tokenizer, outermost first.  None: text is one word. */
struct pretokenizer {
    enum splitter kinds[MAX_SPLITTERS];
    int n;
};

/* A walk over the words of one piece. */
struct words {
    const struct pretokenizer *pre;
    const char *s;
    size_t at, end[MAX_SPLITTERS + 1];
};
void words_init(struct words *w, const struct pretokenizer *pre, const char *s, size_t n);
/* The next word in *word; returns its length, 0 at the end. */
size_t words_next(struct words *w, const char **word);

/* Where s[0..n) may be cut at or after `from` such that the words of both parts
 * are the words of the whole, and so with their normal forms; n if there is no
 * such place. */
size_t pretokenize_cut(const struct pretokenizer *pre, const char *s, size_t n, size_t from);

#endif
