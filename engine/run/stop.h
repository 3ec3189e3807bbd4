#ifndef STOP_H
#define STOP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Looks for stop strings in a text that arrives in pieces.
 *
 * A match may span any number of pieces.  Among the matches that a piece
 * completes, the one that starts first wins, then the first in the list.  Only
 * as much of the text is kept as a match may still need.
 *
 * The pieces are whole UTF-8 characters, so offsets are cut points of valid
 * text. */
struct stop_matcher {
    const char *const *stops;
    uint32_t n_stops;
    bool include_stop;
    size_t longest;              /* bytes of the longest stop string */
    char *text;                  /* the last bytes, at most longest - 1 between pieces */
    size_t n, capacity;
    uint64_t offset;             /* of text[0] in the whole text */
};

/* stops: borrowed as long as the matcher, none empty. */
void stop_matcher_init(struct stop_matcher *m, const char *const *stops, uint32_t n_stops,
                       bool include_stop);
void stop_matcher_fini(struct stop_matcher *m);

/* Room for a piece of at most n bytes; write it there, then push how much of
 * it was used. */
char *stop_matcher_room(struct stop_matcher *m, size_t n);

/* The index of the stop string found, with *cut the offset in the whole text
 * where it ends for the client; or -1. */
int32_t stop_matcher_push(struct stop_matcher *m, size_t n, uint64_t *cut);

/* What was pushed so far cannot be part of a match any more. */
void stop_matcher_forget(struct stop_matcher *m);

#endif
