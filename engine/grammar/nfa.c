#include "engine/grammar/nfa.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"

#include <string.h>

enum { FIRST_NODES = 256 };

static nfa_at add_node(struct nfa *g, uint32_t kind, uint32_t a, nfa_at b)
{
    if (g->n_nodes == NFA_MAX_NODES)
        g->too_large = true;
    if (g->too_large)
        return NFA_NOTHING;
    if (g->n_nodes == g->capacity) {
        g->capacity *= 2;
        g->nodes = mem_realloc(g->nodes, g->capacity, sizeof *g->nodes);
    }
    g->nodes[g->n_nodes] = (struct nfa_node){ kind, a, b };
    return g->n_nodes++;
}

void nfa_init(struct nfa *g)
{
    *g = (struct nfa){ .capacity = FIRST_NODES, .table_size = 2 * FIRST_NODES };
    g->nodes = mem_calloc(g->capacity, sizeof *g->nodes);
    g->by_content = mem_calloc(g->table_size, sizeof *g->by_content);
    g->set_slots = mem_calloc(2 * NFA_MAX_SETS, sizeof *g->set_slots);
    add_node(g, NFA_IS_NOTHING, 0, 0);
    add_node(g, NFA_IS_RETURN, 0, 0);
    nfa_add_rule(g);
}

void nfa_fini(struct nfa *g)
{
    mem_free(g->nodes);
    mem_free(g->sets);
    mem_free(g->rules);
    mem_free(g->by_content);
    mem_free(g->set_slots);
    *g = (struct nfa){ 0 };
}

/* ---- nodes of bytes, each once */

static uint64_t mix(uint64_t h)
{
    h *= UINT64_C(0x9E3779B97F4A7C15);
    return h ^ h >> 29;
}

static uint32_t set_number(struct nfa *g, const struct byte_set *set)
{
    const uint64_t *w = set->word;
    size_t i = (size_t)mix(mix(mix(mix(w[0]) ^ w[1]) ^ w[2]) ^ w[3]);

    for (;; i++) {
        uint16_t slot = g->set_slots[i % (2 * NFA_MAX_SETS)];
        if (slot == 0)
            break;
        if (memcmp(&g->sets[slot - 1], set, sizeof *set) == 0)
            return slot - 1u;
    }
    if (g->n_sets == NFA_MAX_SETS) {
        g->too_large = true;
        return 0;
    }
    if (g->n_sets == g->set_capacity) {
        g->set_capacity = g->set_capacity ? 2 * g->set_capacity : 64;
        g->sets = mem_realloc(g->sets, g->set_capacity, sizeof *g->sets);
    }
    g->sets[g->n_sets++] = *set;
    g->set_slots[i % (2 * NFA_MAX_SETS)] = (uint16_t)g->n_sets;
    return g->n_sets - 1;
}

static size_t hash_of(uint32_t set, nfa_at next)
{
    return (size_t)mix((uint64_t)set << 32 | next);
}

/* The slot of that node, or the free one where it belongs.  0 is free: node 0 is not of bytes. */
static uint32_t *slot_of(const struct nfa *g, uint32_t set, nfa_at next)
{
    for (size_t i = hash_of(set, next);; i++) {
        uint32_t *slot = &g->by_content[i & (g->table_size - 1)];
        const struct nfa_node *node = &g->nodes[*slot];
        if (*slot == 0 || (node->a == set && node->b == next))
            return slot;
    }
}

static void grow_table(struct nfa *g)
{
    uint32_t *old = g->by_content;

    g->table_size *= 2;
    g->by_content = mem_calloc(g->table_size, sizeof *g->by_content);
    for (size_t i = 0; i < g->table_size / 2; i++)
        if (old[i])
            *slot_of(g, g->nodes[old[i]].a, g->nodes[old[i]].b) = old[i];
    mem_free(old);
}

nfa_at nfa_set(struct nfa *g, const struct byte_set *set, nfa_at next)
{
    static const struct byte_set empty;

    if (g->work++ == NFA_MAX_WORK)
        g->too_large = true;
    if (g->too_large || next == NFA_NOTHING || memcmp(set, &empty, sizeof empty) == 0)
        return NFA_NOTHING;
    uint32_t number = set_number(g, set);
    uint32_t *slot = slot_of(g, number, next);
    if (*slot == 0)
        *slot = add_node(g, NFA_IS_BYTES, number, next);
    nfa_at at = *slot;
    if (2 * (size_t)g->n_nodes > g->table_size)
        grow_table(g);
    return at;
}

nfa_at nfa_range(struct nfa *g, unsigned lo, unsigned hi, nfa_at next)
{
    struct byte_set set = { { 0 } };

    byte_set_add(&set, lo, hi);
    return nfa_set(g, &set, next);
}

nfa_at nfa_bytes(struct nfa *g, const char *bytes, size_t n, nfa_at next)
{
    while (n-- > 0)
        next = nfa_range(g, (unsigned char)bytes[n], (unsigned char)bytes[n], next);
    return next;
}

nfa_at nfa_text(struct nfa *g, const char *text, nfa_at next)
{
    return nfa_bytes(g, text, strlen(text), next);
}

nfa_at nfa_either(struct nfa *g, nfa_at a, nfa_at b)
{
    if (a == b || b == NFA_NOTHING)
        return a;
    if (a == NFA_NOTHING)
        return b;
    return add_node(g, NFA_IS_SPLIT, a, b);
}

nfa_at nfa_call(struct nfa *g, uint32_t rule, nfa_at next)
{
    ASSERT(rule < g->n_rules || g->too_large);
    return next == NFA_NOTHING ? NFA_NOTHING : add_node(g, NFA_IS_CALL, rule, next);
}

nfa_at nfa_reserve(struct nfa *g)
{
    return add_node(g, NFA_IS_SPLIT, NFA_NOTHING, NFA_NOTHING);
}

void nfa_split(struct nfa *g, nfa_at reserved, nfa_at a, nfa_at b)
{
    if (g->too_large)
        return;
    ASSERT(g->nodes[reserved].kind == NFA_IS_SPLIT);
    g->nodes[reserved].a = a;
    g->nodes[reserved].b = b;
}

uint32_t nfa_add_rule(struct nfa *g)
{
    if (g->n_rules == NFA_MAX_RULES)
        g->too_large = true;
    if (g->too_large)
        return 0;
    if (g->n_rules == g->rule_capacity) {
        g->rule_capacity = g->rule_capacity ? 2 * g->rule_capacity : 16;
        g->rules = mem_realloc(g->rules, g->rule_capacity, sizeof *g->rules);
    }
    g->rules[g->n_rules] = NFA_NOTHING;
    return g->n_rules++;
}

void nfa_set_rule(struct nfa *g, uint32_t rule, nfa_at start)
{
    ASSERT(rule < g->n_rules);
    g->rules[rule] = start;
}

/* ---- finishing */

static bool leads_on(const struct nfa *g, const bool *useful, const struct nfa_node *node)
{
    switch (node->kind) {
    case NFA_IS_RETURN: return true;
    case NFA_IS_BYTES:  return useful[node->b];
    case NFA_IS_SPLIT:  return useful[node->a] || useful[node->b];
    case NFA_IS_CALL:   return useful[node->b] && useful[g->rules[node->a]];
    default:            return false;
    }
}

/* Most nodes come after what follows them, so few passes are needed: one more for each level of
 * loops and rules that lead on only through others. */
static void prune(struct nfa *g)
{
    bool *useful = mem_calloc(g->n_nodes, sizeof *useful), changed = true;

    while (changed) {
        changed = false;
        for (uint32_t i = 0; i < g->n_nodes; i++)
            if (!useful[i] && leads_on(g, useful, &g->nodes[i]))
                changed = useful[i] = true;
    }
    for (uint32_t i = 0; i < g->n_nodes; i++)
        if (!useful[i])
            g->nodes[i] = (struct nfa_node){ NFA_IS_NOTHING, 0, 0 };
    mem_free(useful);
}

/* Classes are split by one set after the other. */
static void find_classes(struct nfa *g)
{
    memset(g->byte_class, 0, sizeof g->byte_class);
    g->n_classes = 1;
    for (uint32_t s = 0; s < g->n_sets; s++) {
        int number[2][256];
        uint32_t n = 0;
        memset(number, -1, sizeof number);
        for (unsigned b = 0; b < 256; b++) {
            int *at = &number[byte_set_has(&g->sets[s], b)][g->byte_class[b]];
            if (*at < 0)
                *at = (int)n++;
            g->byte_class[b] = (uint8_t)*at;
        }
        g->n_classes = n;
    }
    for (unsigned b = 256; b-- > 0;)
        g->class_byte[g->byte_class[b]] = (uint8_t)b;
}

enum status nfa_finish(struct nfa *g, struct error *err)
{
    mem_free(g->by_content);
    mem_free(g->set_slots);
    g->by_content = NULL;
    g->set_slots = NULL;
    if (g->too_large)
        return error_set(err, ST_INVALID,
                         "is too large: it unfolds to more than %d states; use fewer or smaller "
                         "repeats", NFA_MAX_NODES);
    prune(g);
    find_classes(g);
    if (g->nodes[g->rules[0]].kind == NFA_IS_NOTHING)
        return error_set(err, ST_INVALID, "allows no text at all");
    return ST_OK;
}
