#include "engine/grammar/automaton.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/grammar/byte_kind.h"

#include <stdlib.h>
#include <string.h>

/* Stack 0 is empty: what is returned to from there is the end of the text. */
enum { EMPTY_STACK = 0, FIRST_SLOTS = 256 };

struct place { nfa_at at; uint32_t stack; };

struct stack { nfa_at back; uint32_t rest, depth; };

struct state {
    size_t first;                /* of its places */
    uint32_t n;
    bool may_end, knows_loops;
    uint8_t loops;               /* automaton_loops() */
};

/* Numbers by hash, open addressing; 0 is free: neither stack 0 nor state 0 is looked for. */
struct numbers {
    uint32_t *slots;
    size_t size, used;           /* size is a power of two */
};

struct automaton {
    const struct nfa *graph;
    struct state *states;
    int32_t *next;               /* [states, classes] */
    struct place *places;        /* of all states */
    struct stack *stacks;
    size_t n_states, n_places, n_stacks;
    size_t state_capacity, place_capacity, stack_capacity;
    struct numbers by_places, by_stack;
    /* Of the closure that is being made. */
    struct place *todo;
    struct place *found;         /* [AUTOMATON_MAX_PLACES] */
    uint32_t *seen;              /* hash table of indices in todo, + 1 */
    uint32_t n_todo, n_found;
    bool ends, overflows;
};

/* Every place that a closure passes through, and a table at most half full of them. */
enum { MAX_TODO = 4 * AUTOMATON_MAX_PLACES, SEEN_SLOTS = 2 * MAX_TODO };

static size_t mix(uint64_t a, uint64_t b)
{
    uint64_t h = (a ^ (b << 32 | b >> 32)) * UINT64_C(0x9E3779B97F4A7C15);

    return (size_t)(h ^ h >> 31);
}

static void *room_for(void *array, size_t n, size_t *capacity, size_t bytes)
{
    if (n <= *capacity)
        return array;
    while (*capacity < n)
        *capacity = *capacity ? 2 * *capacity : 64;
    return mem_realloc(array, *capacity, bytes);
}

/* ---- stacks */

static size_t stack_hash(const struct automaton *a, uint32_t i)
{
    return mix(a->stacks[i].back, a->stacks[i].rest);
}

static size_t places_hash(const struct automaton *a, uint32_t i)
{
    const struct state *s = &a->states[i];
    size_t h = s->may_end;

    for (uint32_t k = 0; k < s->n; k++) {
        const struct place *p = &a->places[s->first + k];
        h = mix(h ^ p->at, p->stack);
    }
    return h;
}

static void grow(struct automaton *a, struct numbers *t,
                 size_t (*hash)(const struct automaton *, uint32_t))
{
    struct numbers old = *t;

    t->size = old.size ? 2 * old.size : FIRST_SLOTS;
    t->slots = mem_calloc(t->size, sizeof *t->slots);
    for (size_t i = 0; i < old.size; i++) {
        if (!old.slots[i])
            continue;
        size_t at = hash(a, old.slots[i]);
        while (t->slots[at & (t->size - 1)])
            at++;
        t->slots[at & (t->size - 1)] = old.slots[i];
    }
    mem_free(old.slots);
}

/* The stack with one more on it; EMPTY_STACK where it would be too deep. */
static uint32_t push(struct automaton *a, nfa_at back, uint32_t rest)
{
    uint32_t depth = a->stacks[rest].depth + 1;
    size_t at = mix(back, rest);

    if (depth > AUTOMATON_MAX_DEPTH)
        return EMPTY_STACK;
    for (; a->by_stack.slots[at & (a->by_stack.size - 1)]; at++) {
        uint32_t i = a->by_stack.slots[at & (a->by_stack.size - 1)];
        if (a->stacks[i].back == back && a->stacks[i].rest == rest)
            return i;
    }
    uint32_t made = (uint32_t)a->n_stacks++;
    a->stacks = room_for(a->stacks, a->n_stacks, &a->stack_capacity, sizeof *a->stacks);
    a->stacks[made] = (struct stack){ back, rest, depth };
    a->by_stack.slots[at & (a->by_stack.size - 1)] = made;
    if (2 * ++a->by_stack.used > a->by_stack.size)
        grow(a, &a->by_stack, stack_hash);
    return made;
}

/* ---- closures: all places that can be reached without a byte */

static void begin_closure(struct automaton *a)
{
    a->n_todo = a->n_found = 0;
    a->ends = a->overflows = false;
}

static void visit(struct automaton *a, nfa_at at, uint32_t stack)
{
    size_t slot = mix(at, stack);

    for (;; slot++) {
        uint32_t i = a->seen[slot % SEEN_SLOTS];
        if (i == 0)
            break;
        if (a->todo[i - 1].at == at && a->todo[i - 1].stack == stack)
            return;
    }
    if (a->n_todo == MAX_TODO) {
        a->overflows = true;
        return;
    }
    a->todo[a->n_todo++] = (struct place){ at, stack };
    a->seen[slot % SEEN_SLOTS] = a->n_todo;
}

/* What is called last returns to where its caller does: no stack grows, and rules that begin
 * with themselves end here instead of never. */
static void enter(struct automaton *a, const struct nfa_node *call, uint32_t stack)
{
    nfa_at start = a->graph->rules[call->a];

    if (a->graph->nodes[call->b].kind == NFA_IS_RETURN) {
        visit(a, start, stack);
        return;
    }
    uint32_t deeper = push(a, call->b, stack);
    if (deeper != EMPTY_STACK)
        visit(a, start, deeper);
}

static void leave(struct automaton *a, uint32_t stack)
{
    if (stack == EMPTY_STACK)
        a->ends = true;
    else
        visit(a, a->stacks[stack].back, a->stacks[stack].rest);
}

static void expand(struct automaton *a, struct place p)
{
    const struct nfa_node *node = &a->graph->nodes[p.at];

    switch (node->kind) {
    case NFA_IS_BYTES:
        if (a->n_found == AUTOMATON_MAX_PLACES)
            a->overflows = true;
        else
            a->found[a->n_found++] = p;
        break;
    case NFA_IS_SPLIT:
        visit(a, node->a, p.stack);
        visit(a, node->b, p.stack);
        break;
    case NFA_IS_CALL:
        enter(a, node, p.stack);
        break;
    case NFA_IS_RETURN:
        leave(a, p.stack);
        break;
    default:
        break;
    }
}

static int compare_places(const void *a, const void *b)
{
    const struct place *x = a, *y = b;

    if (x->at != y->at)
        return x->at < y->at ? -1 : 1;
    return (x->stack > y->stack) - (x->stack < y->stack);
}

static void end_closure(struct automaton *a)
{
    for (uint32_t i = 0; i < a->n_todo && !a->overflows; i++)
        expand(a, a->todo[i]);
    for (uint32_t i = 0; i < a->n_todo; i++) {
        size_t slot = mix(a->todo[i].at, a->todo[i].stack);
        while (a->seen[slot % SEEN_SLOTS])
            a->seen[slot++ % SEEN_SLOTS] = 0;
    }
    qsort(a->found, a->n_found, sizeof *a->found, compare_places);
}

/* ---- states */

static bool is_found(const struct automaton *a, const struct state *s)
{
    return s->n == a->n_found && s->may_end == a->ends &&
           memcmp(a->places + s->first, a->found, s->n * sizeof *a->found) == 0;
}

static uint32_t append_state(struct automaton *a, const struct place *places, uint32_t n,
                             bool may_end)
{
    const uint32_t classes = a->graph->n_classes;
    size_t before = a->state_capacity;

    a->places = room_for(a->places, a->n_places + n, &a->place_capacity, sizeof *a->places);
    if (n > 0)
        memcpy(a->places + a->n_places, places, n * sizeof *places);
    a->states = room_for(a->states, a->n_states + 1, &a->state_capacity, sizeof *a->states);
    if (a->state_capacity > before)
        a->next = mem_realloc(a->next, a->state_capacity * classes, sizeof *a->next);
    for (uint32_t c = 0; c < classes; c++)
        a->next[a->n_states * classes + c] = AUTOMATON_UNKNOWN;
    a->states[a->n_states] = (struct state){ .first = a->n_places, .n = n, .may_end = may_end };
    a->n_places += n;
    return (uint32_t)a->n_states++;
}

/* The state of what was found. */
static int32_t state_of_found(struct automaton *a)
{
    size_t h = a->ends;

    if (a->overflows || (a->n_found == 0 && !a->ends))
        return AUTOMATON_DEAD;
    for (uint32_t i = 0; i < a->n_found; i++)
        h = mix(h ^ a->found[i].at, a->found[i].stack);
    for (; a->by_places.slots[h & (a->by_places.size - 1)]; h++) {
        uint32_t i = a->by_places.slots[h & (a->by_places.size - 1)];
        if (is_found(a, &a->states[i]))
            return (int32_t)i;
    }
    if (automaton_bytes(a) > AUTOMATON_HARD_BYTES)
        return AUTOMATON_FULL;
    uint32_t made = append_state(a, a->found, a->n_found, a->ends);
    a->by_places.slots[h & (a->by_places.size - 1)] = made;
    if (2 * ++a->by_places.used > a->by_places.size)
        grow(a, &a->by_places, places_hash);
    return (int32_t)made;
}

static int32_t find_next(struct automaton *a, automaton_state from, unsigned char byte)
{
    const struct state s = a->states[from];

    begin_closure(a);
    for (uint32_t i = 0; i < s.n; i++) {
        struct place p = a->places[s.first + i];
        const struct nfa_node *node = &a->graph->nodes[p.at];
        if (byte_set_has(&a->graph->sets[node->a], byte))
            visit(a, node->b, p.stack);
    }
    end_closure(a);
    return state_of_found(a);
}

int32_t automaton_next(struct automaton *a, automaton_state from, unsigned char byte)
{
    size_t at = (size_t)from * a->graph->n_classes + a->graph->byte_class[byte];

    ASSERT(from < a->n_states);
    if (a->next[at] == AUTOMATON_UNKNOWN) {
        int32_t to = find_next(a, from, byte);
        if (to == AUTOMATON_FULL)
            return to;
        a->next[at] = to;
    }
    return a->next[at];
}

struct automaton_table automaton_table(const struct automaton *a)
{
    return (struct automaton_table){ a->next, a->graph->byte_class, a->graph->n_classes };
}

uint8_t automaton_loops(struct automaton *a, automaton_state s)
{
    uint8_t leaves = 0;

    if (a->states[s].knows_loops)
        return a->states[s].loops;
    for (unsigned byte = 0; byte < 256; byte++)
        if (!(leaves & byte_kind(byte)) &&
            automaton_next(a, s, (unsigned char)byte) != (int32_t)s)
            leaves |= byte_kind(byte);
    a->states[s].loops = (uint8_t)~leaves;
    a->states[s].knows_loops = true;
    return a->states[s].loops;
}

enum status automaton_explore(struct automaton *a, size_t *places, struct error *err)
{
    for (automaton_state s = AUTOMATON_START; s < a->n_states; s++)
        for (uint32_t c = 0; c < a->graph->n_classes; c++) {
            int32_t to = automaton_next(a, s, a->graph->class_byte[c]);
            if (to == AUTOMATON_FULL || a->n_states > AUTOMATON_MAX_EXPLORED ||
                a->n_places > *places)
                return error_set(err, ST_INVALID, "is too complex: matching it takes more than %d "
                                 "states or %d places in them", AUTOMATON_MAX_EXPLORED,
                                 AUTOMATON_EXPLORED_PLACES);
        }
    *places -= a->n_places;
    return ST_OK;
}

bool automaton_may_end(const struct automaton *a, automaton_state s)
{
    ASSERT(s < a->n_states);
    return a->states[s].may_end;
}

bool automaton_goes_on(const struct automaton *a, automaton_state s)
{
    ASSERT(s < a->n_states);
    return a->states[s].n > 0;
}

uint32_t automaton_n_states(const struct automaton *a)
{
    return (uint32_t)a->n_states;
}

size_t automaton_bytes(const struct automaton *a)
{
    return a->n_states * (sizeof *a->states + a->graph->n_classes * sizeof *a->next) +
           a->n_places * sizeof *a->places + a->n_stacks * sizeof *a->stacks;
}

/* ---- from nothing */

/* The dead state, and the one from the graph's beginning. */
static void start(struct automaton *a)
{
    grow(a, &a->by_stack, stack_hash);
    grow(a, &a->by_places, places_hash);
    a->stacks = room_for(a->stacks, 1, &a->stack_capacity, sizeof *a->stacks);
    a->stacks[a->n_stacks++] = (struct stack){ NFA_NOTHING, 0, 0 };
    append_state(a, NULL, 0, false);
    begin_closure(a);
    visit(a, a->graph->rules[0], EMPTY_STACK);
    end_closure(a);
    if (state_of_found(a) == AUTOMATON_DEAD)         /* it overflows */
        append_state(a, NULL, 0, false);
    ASSERT(a->n_states == AUTOMATON_START + 1);
}

static void drop_states(struct automaton *a)
{
    mem_free(a->states);
    mem_free(a->next);
    mem_free(a->places);
    mem_free(a->stacks);
    mem_free(a->by_places.slots);
    mem_free(a->by_stack.slots);
}

struct automaton *automaton_create(const struct nfa *g)
{
    struct automaton *a = mem_calloc(1, sizeof *a);

    a->graph = g;
    a->todo = mem_calloc(MAX_TODO, sizeof *a->todo);
    a->found = mem_calloc(AUTOMATON_MAX_PLACES, sizeof *a->found);
    a->seen = mem_calloc(SEEN_SLOTS, sizeof *a->seen);
    start(a);
    return a;
}

void automaton_destroy(struct automaton *a)
{
    if (!a)
        return;
    drop_states(a);
    mem_free(a->todo);
    mem_free(a->found);
    mem_free(a->seen);
    mem_free(a);
}

/* The same stack among those of a; from its bottom up. */
static uint32_t copy_stack(struct automaton *a, const struct automaton *old, uint32_t stack)
{
    nfa_at back[AUTOMATON_MAX_DEPTH];
    uint32_t n = 0, copy = EMPTY_STACK;

    for (; stack != EMPTY_STACK; stack = old->stacks[stack].rest)
        back[n++] = old->stacks[stack].back;
    while (n-- > 0)
        copy = push(a, back[n], copy);
    return copy;
}

static automaton_state copy_state(struct automaton *a, const struct automaton *old,
                                  automaton_state from)
{
    const struct state *s = &old->states[from];

    if (from == AUTOMATON_DEAD)
        return from;
    begin_closure(a);
    for (uint32_t i = 0; i < s->n; i++) {
        struct place p = old->places[s->first + i];
        a->found[a->n_found++] = (struct place){ p.at, copy_stack(a, old, p.stack) };
    }
    a->ends = s->may_end;
    qsort(a->found, a->n_found, sizeof *a->found, compare_places);
    int32_t copy = state_of_found(a);
    ASSERT(copy >= 0);           /* so few states do not fill it */
    return (automaton_state)copy;
}

void automaton_trim(struct automaton *a, automaton_state *list, size_t n)
{
    struct automaton old = *a;

    *a = (struct automaton){ .graph = old.graph, .todo = old.todo, .found = old.found,
                             .seen = old.seen };
    start(a);
    for (size_t i = 0; i < n; i++)
        list[i] = copy_state(a, &old, list[i]);
    drop_states(&old);
}
