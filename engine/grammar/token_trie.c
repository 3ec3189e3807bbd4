#include "engine/grammar/token_trie.h"

#include "engine/base/mem.h"
#include "engine/grammar/byte_kind.h"
#include "engine/model/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

struct token { const char *bytes; size_t n; int32_t id; };

/* Longer than any in use; what is longer is not needed, for its parts are tokens as well. */
enum { MAX_BYTES = 4096 };

static int compare_tokens(const void *a, const void *b)
{
    const struct token *x = a, *y = b;
    int order = memcmp(x->bytes, y->bytes, x->n < y->n ? x->n : y->n);

    if (order != 0)
        return order;
    if (x->n != y->n)
        return x->n < y->n ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

static size_t collect(const struct tokenizer *t, struct token *out)
{
    size_t count = 0, n;

    for (int32_t id = 0; id < tokenizer_n_ids(t); id++) {
        const char *bytes = tokenizer_bytes(t, id, &n);
        if (n > 0 && n <= MAX_BYTES && !tokenizer_is_special(t, id))
            out[count++] = (struct token){ bytes, n, id };
    }
    qsort(out, count, sizeof *out, compare_tokens);
    return count;
}

static size_t shared_bytes(const struct token *a, const struct token *b)
{
    size_t n = 0;

    while (n < a->n && n < b->n && a->bytes[n] == b->bytes[n])
        n++;
    return n;
}

/* Subtrees that reach down to depth end here.  open[d]: the last node of that depth. */
static void close_from(struct token_trie *t, const uint32_t *open, size_t depth, size_t *n_open)
{
    while (*n_open > depth)
        t->nodes[open[--*n_open]].end = t->n_nodes;
}

static void add_token(struct token_trie *t, const struct token *token, uint32_t *open,
                      size_t *n_open)
{
    for (size_t d = *n_open; d < token->n; d++) {
        t->nodes[t->n_nodes] = (struct trie_node){ .id = TRIE_NO_TOKEN, .depth = (uint16_t)d,
                                                   .byte = (uint8_t)token->bytes[d] };
        open[(*n_open)++] = t->n_nodes++;
    }
    t->nodes[t->n_nodes - 1].id = token->id;
    if (token->n > t->longest)
        t->longest = (uint32_t)token->n;
}

/* Backwards: a node's subtree is known before the node. */
static void find_kinds(struct token_trie *t)
{
    for (uint32_t i = t->n_nodes; i-- > 0;)
        for (uint32_t child = i + 1; child < t->nodes[i].end; child = t->nodes[child].end)
            t->nodes[i].kinds_below |= t->nodes[child].kinds_below |
                                       byte_kind(t->nodes[child].byte);
}

static void list_ids(struct token_trie *t, size_t n_tokens)
{
    uint32_t n = 0;

    t->ids = mem_calloc(n_tokens + 1, sizeof *t->ids);
    t->n_ids_before = mem_calloc((size_t)t->n_nodes + 1, sizeof *t->n_ids_before);
    for (uint32_t i = 0; i < t->n_nodes; i++) {
        t->n_ids_before[i] = n;
        if (t->nodes[i].id != TRIE_NO_TOKEN)
            t->ids[n++] = t->nodes[i].id;
    }
    t->n_ids_before[t->n_nodes] = n;
}

struct token_trie *token_trie_create(const struct tokenizer *tok)
{
    struct token_trie *t = mem_calloc(1, sizeof *t);
    struct token *tokens = mem_calloc((size_t)tokenizer_n_ids(tok) + 1, sizeof *tokens);
    uint32_t open[MAX_BYTES];
    size_t n = collect(tok, tokens), bytes = 1, n_open = 0;

    for (size_t i = 0; i < n; i++)
        bytes += tokens[i].n;
    t->n_ids = tokenizer_n_ids(tok);
    t->nodes = mem_alloc(bytes * sizeof *t->nodes);
    for (size_t i = 0; i < n; i++) {
        size_t shared = i > 0 ? shared_bytes(&tokens[i - 1], &tokens[i]) : 0;
        if (i > 0 && shared == tokens[i].n)
            shared--;            /* the same bytes again: its last node is one of its own */
        close_from(t, open, shared, &n_open);
        add_token(t, &tokens[i], open, &n_open);
        t->fingerprint = XXH3_64bits_withSeed(tokens[i].bytes, tokens[i].n,
                                              t->fingerprint ^ (uint64_t)(uint32_t)tokens[i].id);
    }
    close_from(t, open, 0, &n_open);
    t->nodes = mem_realloc(t->nodes, (size_t)t->n_nodes + 1, sizeof *t->nodes);
    find_kinds(t);
    list_ids(t, n);
    mem_free(tokens);
    return t;
}

void token_trie_destroy(struct token_trie *t)
{
    if (!t)
        return;
    mem_free(t->nodes);
    mem_free(t->ids);
    mem_free(t->n_ids_before);
    mem_free(t);
}
