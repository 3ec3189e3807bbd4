/* A trie with sibling lists, walked anew at every place where a token may
 * start.  Contents are at most a few dozen bytes and few bytes start one, so
 * this is as fast as an automaton and much simpler. */

#include "engine/model/added_tokens.h"

#include "engine/base/mem.h"
#include "engine/model/unicode.h"

struct trie_node {
    int32_t child, sibling;    /* -1: none */
    int32_t id;                /* of the token that ends here, or -1 */
    unsigned char byte;
    unsigned char rules;
};

void added_tokens_init(struct added_tokens *a)
{
    *a = (struct added_tokens){ 0 };
    for (int i = 0; i < 256; i++)
        a->first[i] = -1;
}

void added_tokens_fini(struct added_tokens *a)
{
    mem_free(a->nodes);
    *a = (struct added_tokens){ 0 };
}

static int32_t trie_node_add(struct added_tokens *a, unsigned char byte, int32_t sibling)
{
    if (a->n == a->capacity) {
        a->capacity = 2 * a->capacity + 64;
        a->nodes = mem_realloc(a->nodes, a->capacity, sizeof *a->nodes);
    }
    a->nodes[a->n] = (struct trie_node){ -1, sibling, -1, byte, 0 };
    return (int32_t)a->n++;
}

static int32_t child_of(const struct added_tokens *a, int32_t node, unsigned char byte)
{
    int32_t at = a->nodes[node].child;

    while (at >= 0 && a->nodes[at].byte != byte)
        at = a->nodes[at].sibling;
    return at;
}

bool added_tokens_put(struct added_tokens *a, const char *content, size_t n, int32_t id,
                      unsigned rules)
{
    unsigned char first = (unsigned char)content[0];
    int32_t node = a->first[first];

    if (node < 0)
        node = a->first[first] = trie_node_add(a, first, -1);
    for (size_t i = 1; i < n; i++) {
        unsigned char byte = (unsigned char)content[i];
        int32_t child = child_of(a, node, byte);
        if (child < 0) {
            child = trie_node_add(a, byte, a->nodes[node].child);
            a->nodes[node].child = child;
        }
        node = child;
    }
    if (a->nodes[node].id >= 0)
        return false;
    a->nodes[node].id = id;
    a->nodes[node].rules =
        (unsigned char)(rules & (ADDED_SINGLE_WORD | ADDED_LSTRIP | ADDED_RSTRIP));
    return true;
}

/* The node of the longest token that starts at s, -1 if none; its length in *length. */
static int32_t longest_at(const struct added_tokens *a, const char *s, size_t n, size_t *length)
{
    int32_t found = -1;
    int32_t node = a->first[(unsigned char)s[0]];

    for (size_t i = 1; node >= 0; i++) {
        if (a->nodes[node].id >= 0) {
            found = node;
            *length = i;
        }
        if (i == n)
            break;
        node = child_of(a, node, (unsigned char)s[i]);
    }
    return found;
}

static bool beside_a_word(const char *s, size_t n, size_t start, size_t end)
{
    size_t length;

    if (start > 0 && unicode_is_word(unicode_decode_last(s, start, &length)))
        return true;
    return end < n && unicode_is_word(unicode_decode(s + end, &length));
}

void added_walk_init(struct added_walk *w, const struct added_tokens *a, const char *s,
                     size_t n)
{
    *w = (struct added_walk){ .tokens = a, .s = s, .n = n };
}

/* Widen the match over white space, to the left not past the last one.  A token
 * that is white space itself may match many times in one run of it, so the run
 * is measured once. */
static void widen(struct added_walk *w, struct added_match *match, unsigned rules)
{
    size_t length;

    if (rules & ADDED_LSTRIP) {
        if (match->start < w->done)
            match->start = w->done;
        while (match->start > w->done &&
               unicode_class(unicode_decode_last(w->s, match->start, &length)) == CHAR_SPACE)
            match->start -= length;
    }
    if (rules & ADDED_RSTRIP) {
        if (match->end >= w->space_end)
            for (w->space_end = match->end; w->space_end < w->n; w->space_end += length)
                if (unicode_class_at(w->s + w->space_end, &length) != CHAR_SPACE)
                    break;
        match->end = w->space_end;
    }
}

bool added_walk_next(struct added_walk *w, struct added_match *match)
{
    const struct added_tokens *a = w->tokens;
    size_t length = 0;

    while (w->at < w->n) {
        size_t start = w->at;
        if (a->first[(unsigned char)w->s[start]] < 0) {
            w->at++;
            continue;
        }
        int32_t node = longest_at(a, w->s + start, w->n - start, &length);
        if (node < 0) {
            w->at++;
            continue;
        }
        /* What is found is passed over even if the rules discard it: a shorter
         * token at the same place gets no chance. */
        w->at = start + length;
        unsigned rules = a->nodes[node].rules;
        if ((rules & ADDED_SINGLE_WORD) && beside_a_word(w->s, w->n, start, w->at))
            continue;
        *match = (struct added_match){ start, w->at, a->nodes[node].id };
        widen(w, match, rules);
        w->done = match->end;
        if (match->start < match->end)
            return true;
    }
    return false;
}
