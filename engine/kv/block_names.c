#include "engine/kv/block_names.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"

#define XXH_INLINE_ALL
#include <string.h>
#include <xxhash.h>

#define NONE KV_BLOCK_NONE

struct name {
    uint64_t number;               /* 0: this block has no name */
    uint64_t parent_number;        /* 0: it is the first */
    uint64_t provenance, salt, hash;
    kv_block parent;               /* meaningful while its number is parent_number */
    kv_block next;                 /* in the bucket */
    int32_t tokens[BLOCK_TOKENS];
};

void block_names_init(struct block_names *t, uint32_t n_blocks)
{
    size_t n_buckets = 16;

    while (n_buckets < n_blocks * (size_t)2)
        n_buckets *= 2;
    t->n_blocks = n_blocks;
    t->n_given = 0;
    t->names = mem_calloc(n_blocks, sizeof *t->names);
    t->bucket_mask = (uint32_t)n_buckets - 1;
    t->buckets = mem_alloc(n_buckets * sizeof *t->buckets);
    memset(t->buckets, 0xff, n_buckets * sizeof *t->buckets);
}

void block_names_fini(struct block_names *t)
{
    mem_free(t->names);
    mem_free(t->buckets);
}

static uint64_t parent_number(const struct block_names *t, const struct block_name *name)
{
    return name->parent == NONE ? 0 : t->names[name->parent].number;
}

static uint64_t hash_name(const struct block_name *name, uint64_t parent)
{
    struct {
        uint64_t parent, provenance, salt;
    } head = { parent, name->provenance, parent ? 0 : name->salt };
    uint64_t seed = XXH3_64bits(&head, sizeof head);

    return XXH3_64bits_withSeed(name->tokens, BLOCK_TOKENS * sizeof *name->tokens, seed);
}

static bool is_same(const struct name *a, const struct block_name *name, uint64_t parent,
                    uint64_t hash)
{
    return a->hash == hash && a->parent_number == parent && a->provenance == name->provenance &&
           (parent || a->salt == name->salt) &&
           memcmp(a->tokens, name->tokens, sizeof a->tokens) == 0;
}

bool block_names_has(const struct block_names *t, kv_block b)
{
    return t->names[b].number != 0;
}

kv_block block_names_find(const struct block_names *t, const struct block_name *name)
{
    uint64_t parent = parent_number(t, name);

    if (name->parent != NONE && parent == 0)
        return NONE;
    uint64_t hash = hash_name(name, parent);
    kv_block b = t->buckets[hash & t->bucket_mask];
    while (b != NONE && !is_same(&t->names[b], name, parent, hash))
        b = t->names[b].next;
    return b;
}

void block_names_give(struct block_names *t, kv_block b, const struct block_name *name)
{
    struct name *own = &t->names[b];
    uint64_t parent = parent_number(t, name);
    uint64_t hash = hash_name(name, parent);
    kv_block *bucket = &t->buckets[hash & t->bucket_mask];

    ASSERT(own->number == 0 && (name->parent == NONE || parent != 0));
    *own = (struct name){
        .number = ++t->n_given, .parent_number = parent, .provenance = name->provenance,
        .salt = name->salt, .hash = hash, .parent = name->parent, .next = *bucket,
    };
    memcpy(own->tokens, name->tokens, sizeof own->tokens);
    *bucket = b;
}

void block_names_remove(struct block_names *t, kv_block b)
{
    struct name *own = &t->names[b];
    kv_block *at = &t->buckets[own->hash & t->bucket_mask];

    ASSERT(own->number != 0);
    while (*at != b)
        at = &t->names[*at].next;
    *at = own->next;
    own->number = 0;
}

kv_block block_names_parent(const struct block_names *t, kv_block b)
{
    const struct name *own = &t->names[b];

    ASSERT(own->number != 0);
    if (own->parent_number == 0 || t->names[own->parent].number != own->parent_number)
        return NONE;
    return own->parent;
}

void block_names_check(const struct block_names *t)
{
    uint32_t named = 0, listed = 0;

    for (kv_block b = 0; b < t->n_blocks; b++) {
        const struct name *a = &t->names[b];
        named += a->number != 0;
        ASSERT(a->number <= t->n_given);
        ASSERT(a->number == 0 || a->parent_number < a->number);
    }
    for (uint32_t i = 0; i <= t->bucket_mask; i++)
        for (kv_block b = t->buckets[i]; b != NONE; b = t->names[b].next) {
            ASSERT(b < t->n_blocks && t->names[b].number != 0);
            ASSERT((t->names[b].hash & t->bucket_mask) == i);
            ASSERT(++listed <= named);       /* or a bucket runs in circles */
        }
    ASSERT(named == listed);
}
