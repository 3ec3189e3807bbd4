/* Words are short: up to SHORT_WORD symbols, looking for the lowest rank anew
 * after each merge beats any structure.  Longer ones (a line of dashes, text in
 * a script without blanks, an attack) use a heap of candidate pairs over a
 * linked list of symbols.
 *
 * A candidate is its rank and its left symbol's position in one number, so the
 * heap's order is the rule's order.  It is stale if the pair at that position
 * has become another one.  Symbols only grow, so a pair that was left never
 * comes back, and comparing ranks finds every stale candidate. */

#include "engine/model/bpe.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/model/vocab.h"

#include <string.h>

enum { SHORT_WORD = 32, NO_RANK = INT32_MAX };

struct merge_slot {
    int32_t left, right;    /* left -1: free */
    int32_t rank, id;
};

/* What a pair of neighbours merges to. */
struct candidate {
    int32_t rank, id;
};

void merges_init(struct merges *m, size_t n)
{
    int bits = 4;

    while (((size_t)1 << bits) < 2 * n)
        bits++;
    *m = (struct merges){ .mask = ((size_t)1 << bits) - 1, .shift = 64 - bits,
                          .seed = vocab_random_seed() };
    m->slots = mem_alloc((m->mask + 1) * sizeof *m->slots);
    for (size_t i = 0; i <= m->mask; i++)
        m->slots[i].left = -1;
}

void merges_fini(struct merges *m)
{
    mem_free(m->slots);
    *m = (struct merges){ 0 };
}

/* The slot of the pair, or the free one where it would go. */
static struct merge_slot *slot_of(const struct merges *m, int32_t left, int32_t right)
{
    uint64_t key = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) ^ m->seed;

    /* Two odd constants with a shift between: one product alone would send
     * pairs that differ in few high bits to the same place under every seed. */
    key = (key ^ key >> 32) * 0xD6E8FEB86659FD93u;
    size_t i = (size_t)(((key ^ key >> 32) * 0x9E3779B97F4A7C15u) >> m->shift);
    while (m->slots[i].left >= 0 && (m->slots[i].left != left || m->slots[i].right != right))
        i = (i + 1) & m->mask;
    return &m->slots[i];
}

void merges_put(struct merges *m, int32_t left, int32_t right, int32_t rank, int32_t id)
{
    *slot_of(m, left, right) = (struct merge_slot){ left, right, rank, id };
}

static struct candidate candidate_of(const struct merges *m, int32_t left, int32_t right)
{
    const struct merge_slot *s = slot_of(m, left, right);

    return s->left >= 0 ? (struct candidate){ s->rank, s->id }
                        : (struct candidate){ NO_RANK, -1 };
}

void bpe_scratch_fini(struct bpe_scratch *s)
{
    mem_free(s->memory);
    *s = (struct bpe_scratch){ 0 };
}

static size_t merge_short(const struct merges *m, int32_t *ids, size_t n)
{
    struct candidate pairs[SHORT_WORD];   /* pairs[i]: of ids[i] and ids[i + 1] */

    for (size_t i = 0; i + 1 < n; i++)
        pairs[i] = candidate_of(m, ids[i], ids[i + 1]);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (pairs[i].rank < pairs[best].rank)
                best = i;
        if (pairs[best].rank == NO_RANK)
            break;
        ids[best] = pairs[best].id;
        n--;
        memmove(ids + best + 1, ids + best + 2, (n - best - 1) * sizeof *ids);
        memmove(pairs + best, pairs + best + 1, (n - best - 1) * sizeof *pairs);
        if (best > 0)
            pairs[best - 1] = candidate_of(m, ids[best - 1], ids[best]);
        if (best + 1 < n)
            pairs[best] = candidate_of(m, ids[best], ids[best + 1]);
    }
    return n;
}

/* A binary heap, smallest first. */
struct heap {
    uint64_t *keys;
    size_t n;
};

static void heap_sink(struct heap *h, size_t at)
{
    uint64_t key = h->keys[at];

    for (size_t child = 2 * at + 1; child < h->n; child = 2 * at + 1) {
        if (child + 1 < h->n && h->keys[child + 1] < h->keys[child])
            child++;
        if (key <= h->keys[child])
            break;
        h->keys[at] = h->keys[child];
        at = child;
    }
    h->keys[at] = key;
}

static void heap_push(struct heap *h, uint64_t key)
{
    size_t at = h->n++;

    for (; at > 0 && key < h->keys[(at - 1) / 2]; at = (at - 1) / 2)
        h->keys[at] = h->keys[(at - 1) / 2];
    h->keys[at] = key;
}

static uint64_t heap_pop(struct heap *h)
{
    uint64_t key = h->keys[0];

    h->keys[0] = h->keys[--h->n];
    if (h->n)
        heap_sink(h, 0);
    return key;
}

/* The symbols of a long word: ids[i] with its neighbours; -1 at the ends, and
 * ids[i] is -1 once i has been merged into its left neighbour. */
struct chain {
    int32_t *ids, *previous, *next;
    struct heap heap;
};

/* Room for the heap: a candidate for each pair at first; each merge takes one
 * and adds at most two, and there are fewer merges than symbols. */
static void chain_init(struct chain *c, struct bpe_scratch *s, int32_t *ids, size_t n)
{
    size_t bytes = n * (2 * sizeof(uint64_t) + 2 * sizeof(int32_t));

    if (bytes > s->bytes) {
        mem_free(s->memory);
        s->memory = mem_alloc(bytes);
        s->bytes = bytes;
    }
    c->ids = ids;
    c->heap = (struct heap){ s->memory, 0 };
    c->previous = (int32_t *)(c->heap.keys + 2 * n);
    c->next = c->previous + n;
    for (size_t i = 0; i < n; i++) {
        c->previous[i] = (int32_t)i - 1;
        c->next[i] = i + 1 < n ? (int32_t)i + 1 : -1;
    }
}

static bool chain_candidate(const struct chain *c, const struct merges *m, int32_t at,
                            uint64_t *key)
{
    struct candidate found = candidate_of(m, c->ids[at], c->ids[c->next[at]]);

    *key = (uint64_t)found.rank << 32 | (uint32_t)at;
    return found.rank != NO_RANK;
}

/* Merge the symbol at `at` with its right neighbour and queue the two pairs that
 * this makes. */
static void chain_merge(struct chain *c, const struct merges *m, int32_t at, int32_t id)
{
    int32_t gone = c->next[at];
    uint64_t key;

    c->ids[at] = id;
    c->ids[gone] = -1;
    c->next[at] = c->next[gone];
    if (c->next[at] >= 0)
        c->previous[c->next[at]] = at;
    if (c->previous[at] >= 0 && chain_candidate(c, m, c->previous[at], &key))
        heap_push(&c->heap, key);
    if (c->next[at] >= 0 && chain_candidate(c, m, at, &key))
        heap_push(&c->heap, key);
}

static size_t merge_long(const struct merges *m, struct bpe_scratch *s, int32_t *ids, size_t n)
{
    struct chain c;
    size_t kept = 0;

    chain_init(&c, s, ids, n);
    for (size_t i = 0; i + 1 < n; i++)
        c.heap.n += chain_candidate(&c, m, (int32_t)i, &c.heap.keys[c.heap.n]);
    for (size_t i = c.heap.n / 2; i-- > 0;)
        heap_sink(&c.heap, i);
    while (c.heap.n) {
        uint64_t key = heap_pop(&c.heap);
        int32_t at = (int32_t)(key & UINT32_MAX);
        if (ids[at] < 0 || c.next[at] < 0)
            continue;
        struct candidate now = candidate_of(m, ids[at], ids[c.next[at]]);
        if ((uint64_t)now.rank == key >> 32)
            chain_merge(&c, m, at, now.id);
    }
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= 0)
            ids[kept++] = ids[i];
    return kept;
}

size_t bpe_merge(const struct merges *m, struct bpe_scratch *s, int32_t *ids, size_t n)
{
    ASSERT(n < INT32_MAX);
    return n <= SHORT_WORD ? merge_short(m, ids, n) : merge_long(m, s, ids, n);
}
