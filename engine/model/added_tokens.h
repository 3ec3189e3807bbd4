#ifndef MODEL_ADDED_TOKENS_H
#define MODEL_ADDED_TOKENS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Finding added tokens in text: at the leftmost place where one matches, the
 * longest that does; then on behind it.  Filled at load, then constant. */

enum added_rules {
    ADDED_SINGLE_WORD = 1,   /* not beside a word character */
    ADDED_LSTRIP = 2,        /* takes the white space before it along */
    ADDED_RSTRIP = 4         /* and after it */
};

struct added_tokens {
    struct trie_node *nodes;
    size_t n, capacity;
    int32_t first[256];      /* the node of a first byte, -1 if no token starts so */
};

void added_tokens_init(struct added_tokens *a);
void added_tokens_fini(struct added_tokens *a);
/* False, and nothing done, if the content is there already. */
bool added_tokens_put(struct added_tokens *a, const char *content, size_t n, int32_t id,
                      unsigned rules);

struct added_match {
    size_t start, end;     /* in s, white space included */
    int32_t id;
};

/* A walk over the matches in s[0..n). */
struct added_walk {
    const struct added_tokens *tokens;
    const char *s;
    size_t n, at, done;    /* where to look next; the end of the last match */
    size_t space_end;      /* of the white space that was last taken along */
};
void added_walk_init(struct added_walk *w, const struct added_tokens *a, const char *s,
                     size_t n);
/* False: no more.  A match may start before the last one's end when that one
 * took the white space that this one begins with; it counts all the same,
 * unless it takes white space itself and nothing is left for it. */
bool added_walk_next(struct added_walk *w, struct added_match *match);

#endif
