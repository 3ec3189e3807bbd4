#include "server/placement.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"

#include <stdbool.h>
#include <stddef.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

/* A table of sets: an entry may stand in any place of the set that its hash names, so the oldest of
 * a few makes room and no list has to be kept. */
enum { WAYS = PLACEMENT_WAYS, MAX_BLOCK_TOKENS = 256 };

struct entry {
    uint64_t hash;                   /* of the text up to a block's end; 0: nobody's */
    uint32_t used;                   /* the clock when it was learned last */
    uint32_t engines;                /* a bit for each */
};

struct engine_load {
    uint64_t tokens, choices;
    uint32_t given;                  /* the clock when it was given something */
};

struct placement {
    uint32_t n_engines, block_tokens;
    uint32_t clock;                  /* goes on with each text; may wrap */
    struct engine_load loads[PLACEMENT_MAX_ENGINES];
    uint64_t set_mask;
    struct entry *entries;           /* [set_mask + 1][WAYS], or NULL: nothing is believed */
};

struct placement *placement_create(uint32_t n_engines, uint32_t block_tokens, uint32_t n_entries)
{
    struct placement *p = mem_calloc(1, sizeof *p);

    ASSERT(n_engines >= 1 && n_engines <= PLACEMENT_MAX_ENGINES);
    ASSERT(block_tokens >= 1 && block_tokens <= MAX_BLOCK_TOKENS);
    p->n_engines = n_engines;
    p->block_tokens = block_tokens;
    if (n_engines == 1 || n_entries == 0)
        return p;
    ASSERT(n_entries >= WAYS && (n_entries & (n_entries - 1)) == 0);
    p->set_mask = n_entries / WAYS - 1;
    p->entries = mem_calloc(n_entries, sizeof *p->entries);
    return p;
}

void placement_destroy(struct placement *p)
{
    if (!p)
        return;
    mem_free(p->entries);
    mem_free(p);
}

/* ---- texts */

/* The hash of the text up to the end of block i, from that of the blocks before it. */
static uint64_t hash_block(const struct placement *p, const struct placement_text *t, uint32_t i,
                           uint64_t before)
{
    int32_t tokens[MAX_BLOCK_TOKENS];
    const uint32_t first = i * p->block_tokens;

    for (uint32_t k = 0; k < p->block_tokens; k++)
        tokens[k] = first + k < t->n_prompt ? t->prompt[first + k]
                                            : t->output[first + k - t->n_prompt];
    uint64_t hash = XXH3_64bits_withSeed(tokens, p->block_tokens * sizeof *tokens, before);
    return hash ? hash : 1;
}

static struct entry *set_of(const struct placement *p, uint64_t hash)
{
    return p->entries + (hash & p->set_mask) * WAYS;
}

static struct entry *find(const struct placement *p, uint64_t hash)
{
    struct entry *set = set_of(p, hash);

    for (int i = 0; i < WAYS; i++)
        if (set[i].hash == hash)
            return &set[i];
    return NULL;
}

/* The entry of a hash, in place of the least recently used of its set if there was none. */
static struct entry *take(struct placement *p, uint64_t hash)
{
    struct entry *set = set_of(p, hash), *oldest = set, *e = find(p, hash);

    if (e)
        return e;
    for (int i = 0; i < WAYS && oldest->hash; i++)
        if (!set[i].hash || p->clock - set[i].used > p->clock - oldest->used)
            oldest = &set[i];
    *oldest = (struct entry){ .hash = hash };
    return oldest;
}

void placement_learn(struct placement *p, uint32_t engine, const struct placement_text *text)
{
    uint64_t hash = text->salt;

    ASSERT(engine < p->n_engines);
    if (!p->entries)
        return;
    p->clock++;
    for (uint32_t i = 0; i < (text->n_prompt + text->n_output) / p->block_tokens; i++) {
        hash = hash_block(p, text, i, hash);
        struct entry *e = take(p, hash);
        e->used = p->clock;
        e->engines |= UINT32_C(1) << engine;
    }
}

/* How much of a prompt each engine has: the last token is always computed. */
static void find_cached(const struct placement *p, uint32_t cached[],
                        const struct placement_text *prompt)
{
    uint32_t having = (UINT32_C(1) << p->n_engines) - 1;
    uint64_t hash = prompt->salt;

    for (uint32_t i = 0; having && i < (prompt->n_prompt - 1) / p->block_tokens; i++) {
        hash = hash_block(p, prompt, i, hash);
        const struct entry *e = find(p, hash);
        having &= e ? e->engines : 0;
        for (uint32_t k = 0; k < p->n_engines; k++)
            cached[k] += having >> k & 1 ? p->block_tokens : 0;
    }
}

/* ---- loads */

uint64_t placement_load(const struct placement *p, uint32_t engine)
{
    const struct engine_load *l = &p->loads[engine];

    return l->tokens + l->choices * PLACEMENT_CHOICE_TOKENS;
}

void placement_add(struct placement *p, uint32_t engine, uint32_t n_choices, uint32_t tokens)
{
    ASSERT(engine < p->n_engines);
    p->loads[engine].tokens += tokens;
    p->loads[engine].choices += n_choices;
    p->loads[engine].given = ++p->clock;
}

void placement_computed(struct placement *p, uint32_t engine, uint32_t tokens)
{
    ASSERT(engine < p->n_engines && tokens <= p->loads[engine].tokens);
    p->loads[engine].tokens -= tokens;
}

void placement_ended(struct placement *p, uint32_t engine)
{
    ASSERT(engine < p->n_engines && p->loads[engine].choices > 0);
    p->loads[engine].choices--;
}

/* ---- the rule */

/* Without the tokens of the prompt, which are the same for all: a sum and no difference. */
static bool is_better(const struct placement *p, const struct placement_order *order, uint32_t a,
                      uint32_t b)
{
    uint64_t cost_a = placement_load(p, a) + order->cached[b];
    uint64_t cost_b = placement_load(p, b) + order->cached[a];

    if (cost_a != cost_b)
        return cost_a < cost_b;
    return p->clock - p->loads[a].given > p->clock - p->loads[b].given;
}

void placement_rank(const struct placement *p, struct placement_order *out,
                    const struct placement_text *prompt)
{
    ASSERT(prompt->n_prompt > 0 && prompt->n_output == 0);
    *out = (struct placement_order){ .engines = { 0 } };
    if (p->entries)
        find_cached(p, out->cached, prompt);
    for (uint32_t i = 0; i < p->n_engines; i++) {
        uint32_t at = i;
        while (at > 0 && is_better(p, out, i, out->engines[at - 1])) {
            out->engines[at] = out->engines[at - 1];
            at--;
        }
        out->engines[at] = i;
    }
}
