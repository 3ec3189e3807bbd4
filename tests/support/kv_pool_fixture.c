#include "tests/support/kv_pool_fixture.h"

#include "kernels/backend.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

static const struct kv_shape shape = { .kv_heads = 1, .head_dim = 8, .filter = FILTER_COARSE,
                                       .index = INDEX_ROTATED };
static struct backend *be;
struct kv_pool *pool;
char *pool_host;

void pool_open(struct kv_pool_config cfg, uint32_t ready)
{
    struct backend_options one_thread = { .threads = 1 };

    cfg.layers = POOL_LAYERS;
    cfg.shape = shape;
    ck_assert_int_eq(backend_open(&be, "cpu", &one_thread, NULL), ST_OK);
    ck_assert_int_eq(kv_pool_create(&pool, be, &cfg, NULL), ST_OK);
    if (cfg.host_blocks)
        pool_host = calloc(cfg.host_blocks, kv_pool_host_bytes(&shape, POOL_LAYERS));
    kv_pool_host_ready(pool, ready);
}

void pool_close(void)
{
    kv_pool_check(pool);
    kv_pool_destroy(pool);
    backend_close(be);
    free(pool_host);
    pool_host = NULL;
}

const int32_t *pool_tokens(int text)
{
    static int32_t tokens[BLOCK_TOKENS];

    for (int i = 0; i < BLOCK_TOKENS; i++)
        tokens[i] = text * 1000 + i;
    return tokens;
}

struct block_name pool_name(kv_block parent, int text, uint64_t provenance)
{
    return (struct block_name){ .parent = parent, .tokens = pool_tokens(text),
                                .provenance = provenance };
}

kv_block pool_take(void)
{
    kv_block b;

    ck_assert_int_eq(kv_pool_take(pool, 1, &b), ST_OK);
    return b;
}

kv_block pool_seal(kv_block b, kv_block parent, int text)
{
    struct block_name name = pool_name(parent, text, 0);

    return kv_pool_seal(pool, b, &name);
}

kv_block pool_new(kv_block parent, int text)
{
    return pool_seal(pool_take(), parent, text);
}

kv_block pool_find(kv_block parent, int text)
{
    struct block_name name = pool_name(parent, text, 0);

    return kv_pool_find(pool, &name);
}

void pool_give(kv_block b)
{
    kv_pool_release(pool, b);
    kv_pool_unpin(pool, b);
}

/* ---- bytes */

size_t pool_kv_bytes(void)
{
    return kv_block_bytes(&shape);
}

size_t pool_index_bytes(void)
{
    return index_block_bytes(&shape);
}

char *pool_kv_at(int layer, int32_t slot)
{
    return (char *)kv_pool_kv(pool, layer) + (size_t)slot * pool_kv_bytes();
}

char *pool_index_at(int layer, int32_t slot)
{
    return (char *)kv_pool_index(pool, layer) + (size_t)slot * pool_index_bytes();
}

/* kv_pool.h: a host slot is [layer] K and V, then [layer] index. */
char *pool_host_kv_at(int layer, int32_t slot)
{
    return pool_host + (size_t)slot * kv_pool_host_bytes(&shape, POOL_LAYERS) +
           (size_t)layer * pool_kv_bytes();
}

char *pool_host_index_at(int layer, int32_t slot)
{
    return pool_host_kv_at(POOL_LAYERS, slot) + (size_t)layer * pool_index_bytes();
}

void pool_move(bool to_host, const struct block_place *place, int layer)
{
    char *host_kv = pool_host_kv_at(layer, place->host);
    char *host_index = pool_host_index_at(layer, place->host);

    if (place->kv >= 0) {
        char *kv = pool_kv_at(layer, place->kv);
        memcpy(to_host ? host_kv : kv, to_host ? kv : host_kv, pool_kv_bytes());
    }
    if (place->index >= 0) {
        char *index = pool_index_at(layer, place->index);
        memcpy(to_host ? host_index : index, to_host ? index : host_index, pool_index_bytes());
    }
}

void pool_store(kv_block b)
{
    struct block_place place;

    ck_assert(kv_pool_store_begin(pool, b, &place));
    for (int layer = 0; layer < POOL_LAYERS; layer++)
        pool_move(true, &place, layer);
    kv_pool_store_end(pool, b, true);
}

void pool_load(kv_block b, bool with_kv)
{
    struct block_place place;

    ck_assert(kv_pool_load_begin(pool, b, with_kv, &place));
    for (int layer = 0; layer < POOL_LAYERS; layer++)
        pool_move(false, &place, layer);
    kv_pool_load_end(pool, b, true);
}

/* ---- patterns */

/* The first word tells block, layer and kind apart, the others follow from it. */
static uint32_t first_word(uint32_t pattern, int layer, bool index)
{
    return pattern * 2654435761u + (uint32_t)layer * 77777u + index * 3333333u;
}

static void write_part(char *at, size_t bytes, uint32_t word)
{
    for (size_t i = 0; i < bytes; i += sizeof word, word += 101)
        memcpy(at + i, &word, sizeof word);
}

static bool reads_part(const char *at, size_t bytes, uint32_t word)
{
    uint32_t wrong = 0, found;

    for (size_t i = 0; i < bytes; i += sizeof word, word += 101) {
        memcpy(&found, at + i, sizeof found);
        wrong |= found ^ word;
    }
    return wrong == 0;
}

void pool_write(const struct block_place *place, uint32_t pattern)
{
    for (int layer = 0; layer < POOL_LAYERS; layer++) {
        write_part(pool_kv_at(layer, place->kv), pool_kv_bytes(),
                   first_word(pattern, layer, false));
        write_part(pool_index_at(layer, place->index), pool_index_bytes(),
                   first_word(pattern, layer, true));
    }
}

bool pool_reads(const struct block_place *place, uint32_t pattern)
{
    const size_t kv = pool_kv_bytes(), index = pool_index_bytes();
    bool right = true;

    for (int layer = 0; layer < POOL_LAYERS && right; layer++) {
        uint32_t k = first_word(pattern, layer, false), x = first_word(pattern, layer, true);
        if (place->kv >= 0)
            right = right && reads_part(pool_kv_at(layer, place->kv), kv, k);
        if (place->index >= 0)
            right = right && reads_part(pool_index_at(layer, place->index), index, x);
        if (place->host >= 0)
            right = right && reads_part(pool_host_kv_at(layer, place->host), kv, k) &&
                    reads_part(pool_host_index_at(layer, place->host), index, x);
    }
    return right;
}

static bool is_filled(const char *at, size_t bytes)
{
    return at[0] == (char)0xff && memcmp(at, at + 1, bytes - 1) == 0;
}

bool pool_is_poisoned(const struct block_place *place)
{
    bool poisoned = true;

    for (int layer = 0; layer < POOL_LAYERS && poisoned; layer++) {
        if (place->kv >= 0)
            poisoned = poisoned && is_filled(pool_kv_at(layer, place->kv), pool_kv_bytes());
        if (place->index >= 0)
            poisoned = poisoned &&
                       is_filled(pool_index_at(layer, place->index), pool_index_bytes());
        if (place->host >= 0)
            poisoned = poisoned &&
                       is_filled(pool_host_kv_at(layer, place->host), pool_kv_bytes()) &&
                       is_filled(pool_host_index_at(layer, place->host), pool_index_bytes());
    }
    return poisoned;
}
