#ifndef GRAMMAR_BYTE_KIND_H
#define GRAMMAR_BYTE_KIND_H

#include <stdint.h>

/* Bytes in few kinds.  Inside of a string or a word most bytes lead back to the same state; with
 * the kinds that do, as bits, it is one look whether that goes for all bytes of many tokens. */

enum byte_kind {
    KIND_LOWER = 1, KIND_UPPER = 2, KIND_DIGIT = 4, KIND_SPACE = 8,
    KIND_MARK = 16,              /* of ASCII, but for the next two */
    KIND_QUOTE = 32,             /* " and \ */
    KIND_CONTROL = 64, KIND_HIGH = 128,
};

static inline uint8_t byte_kind(unsigned byte)
{
    if (byte >= 0x80)
        return KIND_HIGH;
    if (byte < 0x20 || byte == 0x7F)
        return KIND_CONTROL;
    if (byte == ' ')
        return KIND_SPACE;
    if (byte >= 'a' && byte <= 'z')
        return KIND_LOWER;
    if (byte >= 'A' && byte <= 'Z')
        return KIND_UPPER;
    if (byte >= '0' && byte <= '9')
        return KIND_DIGIT;
    return byte == '"' || byte == '\\' ? KIND_QUOTE : KIND_MARK;
}

#endif
