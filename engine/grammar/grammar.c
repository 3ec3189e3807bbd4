#include "engine/grammar/grammar.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/grammar/automaton.h"
#include "engine/grammar/json_schema.h"
#include "engine/grammar/regex.h"
#include "engine/grammar/token_trie.h"
#include "engine/grammar/turn.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

enum {
    MASK_BYTES = 8 << 20,        /* of all masks of a grammar, */
    MAX_MASKS = 1024,            /* and as many as can be looked through */
    CHOICES_MAX_BYTES = 64 << 10,
};

/* A mask that was made, and for which state; the least recently used one makes room. */
struct mask {
    uint32_t *words;
    automaton_state state;
    uint32_t n_allowed;
    uint64_t used;
};

struct grammar {
    struct nfa graph;
    atomic_uint users;
    pthread_mutex_t lock;        /* of everything below */
    struct automaton *automaton;
    struct grammar_matcher *matchers;
    uint32_t n_matchers;
    struct mask *masks;
    size_t n_masks, mask_capacity, mask_words;
    uint64_t clock, fingerprint;
    struct grammar_counts counts;
    automaton_state *walk;       /* [longest token + 1] */
};

/* ---- compiling */

static struct grammar *make(void)
{
    struct grammar *g = mem_calloc(1, sizeof *g);

    nfa_init(&g->graph);
    atomic_init(&g->users, 1);
    ASSERT(pthread_mutex_init(&g->lock, NULL) == 0);
    return g;
}

struct grammar *grammar_acquire(struct grammar *g)
{
    atomic_fetch_add(&g->users, 1);
    return g;
}

void grammar_release(struct grammar *g)
{
    if (!g || atomic_fetch_sub(&g->users, 1) > 1)
        return;
    ASSERT(!g->matchers);
    automaton_destroy(g->automaton);
    nfa_fini(&g->graph);
    for (size_t i = 0; i < g->n_masks; i++)
        mem_free(g->masks[i].words);
    mem_free(g->masks);
    mem_free(g->walk);
    pthread_mutex_destroy(&g->lock);
    mem_free(g);
}

/* A graph under way: st is what building it gave, and text where it begins. */
struct building {
    struct grammar *g;
    enum status st;
    nfa_at text;
    size_t places;               /* that its patterns may still take (automaton.h) */
};

static struct building begin(void)
{
    return (struct building){ .g = make(), .places = AUTOMATON_EXPLORED_PLACES };
}

static enum status finish(struct grammar **out, struct building *b,
                          const struct grammar_turn *turn, struct error *err)
{
    struct nfa *graph = &b->g->graph;

    if (b->st == ST_OK && turn)
        b->st = turn_emit(graph, turn, b->text, &b->text, &b->places, err);
    nfa_set_rule(graph, 0, b->text);
    if (b->st == ST_OK)
        b->st = nfa_finish(graph, err);
    if (b->st == ST_OK) {
        b->g->automaton = automaton_create(graph);
        if (!automaton_goes_on(b->g->automaton, AUTOMATON_START))
            b->st = error_set(err, ST_INVALID, "%s",
                              automaton_may_end(b->g->automaton, AUTOMATON_START)
                                  ? "allows the empty text alone"
                                  : "is too ambiguous");
    }
    if (b->st == ST_OK)
        *out = b->g;
    else
        grammar_release(b->g);
    return b->st;
}

static enum status compile_pattern(struct grammar **out, const char *pattern, size_t n,
                                   const struct grammar_turn *turn, struct error *err)
{
    struct building b = begin();

    b.st = regex_emit(&b.g->graph, pattern, n, REGEX_WHOLE_TEXT, NFA_RETURN, &b.text, err);
    return finish(out, &b, turn, err);
}

/* An expression is explored by itself: calls beside it may have no end of states. */
enum status grammar_compile_regex(struct grammar **out, const char *pattern, size_t n,
                                  const struct grammar_turn *turn, struct error *err)
{
    size_t places = AUTOMATON_EXPLORED_PLACES;
    struct grammar *alone;

    TRY(compile_pattern(&alone, pattern, n, NULL, err));
    enum status st = automaton_explore(alone->automaton, &places, err);
    if (st == ST_OK && !turn) {
        *out = alone;
        return ST_OK;
    }
    grammar_release(alone);
    return st == ST_OK ? compile_pattern(out, pattern, n, turn, err) : st;
}

enum status grammar_compile_choice(struct grammar **out, const char *const *choices, size_t n,
                                   const struct grammar_turn *turn, struct error *err)
{
    struct building b = begin();
    struct nfa *graph = &b.g->graph;
    size_t bytes = 0;

    for (size_t i = n; i-- > 0 && b.st == ST_OK;) {
        size_t length = strlen(choices[i]);
        bytes += length;
        if (length == 0)
            b.st = error_set(err, ST_INVALID, "must not have an empty string");
        else if (bytes > CHOICES_MAX_BYTES)
            b.st = error_set(err, ST_INVALID, "has more than %d bytes of choices",
                             CHOICES_MAX_BYTES);
        b.text = nfa_either(graph, nfa_bytes(graph, choices[i], length, NFA_RETURN), b.text);
    }
    return finish(out, &b, turn, err);
}

enum status grammar_compile_schema(struct grammar **out, const struct cJSON *schema,
                                   const struct grammar_turn *turn, struct error *err)
{
    struct grammar *alone;

    /* Calls beside it would hide that it has no text. */
    if (turn && turn->n_calls > 0) {
        TRY(grammar_compile_schema(&alone, schema, NULL, err));
        grammar_release(alone);
    }
    struct building b = begin();
    b.st = json_schema_emit(&b.g->graph, schema, NFA_RETURN, &b.text, &b.places, err);
    return finish(out, &b, turn, err);
}

enum status grammar_compile_json_object(struct grammar **out, const struct grammar_turn *turn,
                                        struct error *err)
{
    struct building b = begin();

    b.text = json_object_emit(&b.g->graph, NFA_RETURN);
    return finish(out, &b, turn, err);
}

enum status grammar_compile_calls(struct grammar **out, const struct grammar_turn *turn,
                                  struct error *err)
{
    struct building b = begin();

    ASSERT(turn->n_calls > 0);
    return finish(out, &b, turn, err);
}

/* ---- matchers */

void grammar_matcher_init(struct grammar_matcher *m, struct grammar *g)
{
    *m = (struct grammar_matcher){ .grammar = g, .state = AUTOMATON_START };
    pthread_mutex_lock(&g->lock);
    m->older = g->matchers;
    if (m->older)
        m->older->younger = m;
    g->matchers = m;
    g->n_matchers++;
    pthread_mutex_unlock(&g->lock);
}

void grammar_matcher_fini(struct grammar_matcher *m)
{
    struct grammar *g = m->grammar;

    if (!g)
        return;
    pthread_mutex_lock(&g->lock);
    if (m->younger)
        m->younger->older = m->older;
    else
        g->matchers = m->older;
    if (m->older)
        m->older->younger = m->younger;
    g->n_matchers--;
    pthread_mutex_unlock(&g->lock);
    *m = (struct grammar_matcher){ 0 };
}

/* States are numbered anew, so masks, which go by number, are forgotten too. */
static void trim(struct grammar *g)
{
    automaton_state *states = mem_calloc(g->n_matchers + 1, sizeof *states);
    size_t i = 0;

    for (struct grammar_matcher *m = g->matchers; m; m = m->older)
        states[i++] = m->state;
    automaton_trim(g->automaton, states, i);
    i = 0;
    for (struct grammar_matcher *m = g->matchers; m; m = m->older)
        m->state = states[i++];
    for (i = 0; i < g->n_masks; i++) {
        g->masks[i].state = AUTOMATON_DEAD;      /* nobody's */
        g->masks[i].used = 0;
    }
    mem_free(states);
}

static void trim_if_large(struct grammar *g)
{
    if (automaton_bytes(g->automaton) > AUTOMATON_SOFT_BYTES)
        trim(g);
}

bool grammar_matcher_advance(struct grammar_matcher *m, const char *bytes, size_t n)
{
    struct grammar *g = m->grammar;

    pthread_mutex_lock(&g->lock);
    trim_if_large(g);
    int32_t at = (int32_t)m->state;
    for (size_t i = 0; i < n && at > AUTOMATON_DEAD; i++)
        at = automaton_next(g->automaton, (automaton_state)at, (unsigned char)bytes[i]);
    if (at > AUTOMATON_DEAD)
        m->state = (automaton_state)at;
    pthread_mutex_unlock(&g->lock);
    return at > AUTOMATON_DEAD;
}

bool grammar_matcher_may_end(const struct grammar_matcher *m)
{
    pthread_mutex_lock(&m->grammar->lock);
    bool may = automaton_may_end(m->grammar->automaton, m->state);
    pthread_mutex_unlock(&m->grammar->lock);
    return may;
}

bool grammar_matcher_is_complete(const struct grammar_matcher *m)
{
    pthread_mutex_lock(&m->grammar->lock);
    bool is = automaton_may_end(m->grammar->automaton, m->state) &&
              !automaton_goes_on(m->grammar->automaton, m->state);
    pthread_mutex_unlock(&m->grammar->lock);
    return is;
}

/* ---- masks */

static void allow(struct mask *out, int32_t id)
{
    out->words[id / 32] |= UINT32_C(1) << id % 32;
    out->n_allowed++;
}

/* Below that many nodes it is not worth a look whether all of a subtree loops. */
enum { FEW_NODES = 8 };

/* Everything from a node's first child on to its last, where all bytes lead from its state back to
 * it. */
static bool allow_subtree(struct grammar *g, const struct token_trie *trie, uint32_t child,
                          const struct trie_node *node, automaton_state state, struct mask *out)
{
    if (node->kinds_below & ~automaton_loops(g->automaton, state))
        return false;
    for (uint32_t i = trie->n_ids_before[child]; i < trie->n_ids_before[node->end]; i++)
        allow(out, trie->ids[i]);
    return true;
}

/* The tree from its first node to its last: what cannot go on is skipped with all below it. */
static enum status walk(struct grammar *g, const struct token_trie *trie, struct mask *out)
{
    struct automaton_table table = automaton_table(g->automaton);
    automaton_state *at = g->walk;

    memset(out->words, 0, g->mask_words * sizeof *out->words);
    out->n_allowed = 0;
    at[0] = out->state;
    for (uint32_t i = 0; i < trie->n_nodes;) {
        const struct trie_node *node = &trie->nodes[i];
        int32_t next = automaton_look(&table, at[node->depth], node->byte);
        if (next == AUTOMATON_UNKNOWN) {
            next = automaton_next(g->automaton, at[node->depth], node->byte);
            table = automaton_table(g->automaton);
        }
        if (next == AUTOMATON_FULL)
            return ST_NOMEM;
        if (next == AUTOMATON_DEAD) {
            i = node->end;
            continue;
        }
        if (node->id != TRIE_NO_TOKEN)
            allow(out, node->id);
        at[node->depth + 1] = (automaton_state)next;
        i++;
        if (node->end - i < FEW_NODES)
            continue;
        if (allow_subtree(g, trie, i, node, (automaton_state)next, out))
            i = node->end;
        table = automaton_table(g->automaton);
    }
    return ST_OK;
}

/* With the first trie it is known how large a mask is. */
static void meet(struct grammar *g, const struct token_trie *trie)
{
    if (g->walk) {
        ASSERT(g->fingerprint == trie->fingerprint);
        return;
    }
    g->fingerprint = trie->fingerprint;
    g->mask_words = ((size_t)trie->n_ids + 31) / 32;
    g->walk = mem_calloc((size_t)trie->longest + 1, sizeof *g->walk);
    g->mask_capacity = MASK_BYTES / (g->mask_words * sizeof(uint32_t)) + 1;
    if (g->mask_capacity > MAX_MASKS)
        g->mask_capacity = MAX_MASKS;
}

static struct mask *find_mask(struct grammar *g, automaton_state state)
{
    for (size_t i = 0; i < g->n_masks; i++)
        if (g->masks[i].state == state)
            return &g->masks[i];
    return NULL;
}

static struct mask *room_for_mask(struct grammar *g)
{
    struct mask *oldest = g->masks;

    if (g->n_masks < g->mask_capacity) {
        g->masks = mem_realloc(g->masks, g->n_masks + 1, sizeof *g->masks);
        g->masks[g->n_masks] = (struct mask){ .words = mem_alloc(g->mask_words *
                                                                 sizeof(uint32_t)) };
        return &g->masks[g->n_masks++];
    }
    for (size_t i = 1; i < g->n_masks; i++)
        if (g->masks[i].used < oldest->used)
            oldest = &g->masks[i];
    return oldest;
}

static enum status mask_of(struct grammar *g, const struct grammar_matcher *m,
                           const struct token_trie *trie, struct mask **out)
{
    struct mask *found = *out = find_mask(g, m->state);

    if (found) {
        g->counts.found++;
        found->used = ++g->clock;
        return ST_OK;
    }
    trim_if_large(g);
    *out = room_for_mask(g);
    (*out)->state = m->state;
    (*out)->used = ++g->clock;
    g->counts.made++;
    enum status st = walk(g, trie, *out);
    if (st != ST_OK)
        trim(g);                 /* nor is this one whole */
    return st;
}

enum status grammar_matcher_mask(struct grammar_matcher *m, const struct token_trie *trie,
                                 uint32_t *mask, size_t n_words, uint32_t *n_allowed)
{
    struct grammar *g = m->grammar;
    struct mask *made;

    pthread_mutex_lock(&g->lock);
    meet(g, trie);
    ASSERT(n_words >= g->mask_words);
    enum status st = mask_of(g, m, trie, &made);
    if (st == ST_OK) {
        memcpy(mask, made->words, g->mask_words * sizeof *mask);
        memset(mask + g->mask_words, 0, (n_words - g->mask_words) * sizeof *mask);
        *n_allowed = made->n_allowed;
    }
    pthread_mutex_unlock(&g->lock);
    return st;
}

struct grammar_counts grammar_counts(const struct grammar *g)
{
    return g->counts;
}
