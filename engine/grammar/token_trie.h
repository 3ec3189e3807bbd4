#ifndef GRAMMAR_TOKEN_TRIE_H
#define GRAMMAR_TOKEN_TRIE_H

#include <stddef.h>
#include <stdint.h>

struct tokenizer;

/* The tokens of a vocabulary by their bytes, as a tree in one array, in the order in which one
 * walks it: what a prefix excludes is skipped in one step, and the rest is read front to back.
 *
 * Special tokens and those without bytes are not in it.  Of several tokens with the same bytes each
 * has a node, those behind the first without children.  Immutable. */

enum { TRIE_NO_TOKEN = -1 };

struct trie_node {
    uint32_t end;                /* the node behind this one's subtree */
    int32_t id;                  /* the token that ends here, or TRIE_NO_TOKEN */
    uint16_t depth;              /* bytes in front of its own */
    uint8_t byte;
    uint8_t kinds_below;         /* of the bytes below it (byte_kind.h) */
};

struct token_trie {
    struct trie_node *nodes;
    uint32_t n_nodes;
    int32_t *ids;                /* all tokens, in the order of the nodes */
    uint32_t *n_ids_before;      /* [n_nodes + 1] of the tokens in front of a node */
    int32_t n_ids;               /* of the tokenizer */
    uint32_t longest;            /* bytes of a token; 0: the tree is empty */
    uint64_t fingerprint;        /* of ids and bytes: equal for the same vocabulary */
};

struct token_trie *token_trie_create(const struct tokenizer *t);
void token_trie_destroy(struct token_trie *trie);    /* NULL is fine */

#endif
