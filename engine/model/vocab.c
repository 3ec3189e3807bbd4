#include "engine/model/vocab.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/model/unicode.h"

#include <string.h>
#include <sys/random.h>
#include <time.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

struct id_slot {
    uint32_t hash;     /* compared before the key is */
    int32_t id;        /* -1: free */
};

uint64_t vocab_random_seed(void)
{
    uint64_t seed;

    if (getrandom(&seed, sizeof seed, GRND_NONBLOCK) != (ssize_t)sizeof seed)
        seed = (uint64_t)time(NULL) * 0x9E3779B97F4A7C15u;   /* early in the boot */
    return seed;
}

/* At most half full, so that probes are short. */
static void id_map_init(struct id_map *m, size_t n)
{
    size_t size = 16;

    while (size < 2 * n)
        size *= 2;
    m->slots = mem_alloc(size * sizeof *m->slots);
    for (size_t i = 0; i < size; i++)
        m->slots[i] = (struct id_slot){ 0, -1 };
    m->mask = size - 1;
    m->seed = vocab_random_seed();
}

static uint64_t id_map_hash(const struct id_map *m, const char *key, size_t n)
{
    return XXH3_64bits_withSeed(key, n, m->seed);
}

/* The map has a free slot (vocab_init made room for every token). */
static void id_map_put(struct id_map *m, const char *key, size_t n, int32_t id)
{
    uint64_t hash = id_map_hash(m, key, n);
    size_t i = hash & m->mask;

    while (m->slots[i].id >= 0)
        i = (i + 1) & m->mask;
    m->slots[i] = (struct id_slot){ (uint32_t)(hash >> 32), id };
}

int32_t vocab_find_spelling(const struct vocab *v, const char *spelling, size_t n)
{
    const struct id_map *m = &v->by_spelling;

    if (n > v->longest_spelling)
        return -1;
    uint64_t hash = id_map_hash(m, spelling, n);
    for (size_t i = hash & m->mask; m->slots[i].id >= 0; i = (i + 1) & m->mask) {
        const struct token *t = &v->tokens[m->slots[i].id];
        if (m->slots[i].hash == (uint32_t)(hash >> 32) && t->n_spelling == n &&
            memcmp(t->spelling, spelling, n) == 0)
            return m->slots[i].id;
    }
    return -1;
}

int32_t vocab_find_bytes(const struct vocab *v, const char *bytes, size_t n)
{
    const struct id_map *m = &v->by_bytes;

    if (n > v->longest_bytes)
        return -1;
    uint64_t hash = id_map_hash(m, bytes, n);
    for (size_t i = hash & m->mask; m->slots[i].id >= 0; i = (i + 1) & m->mask) {
        const struct token *t = &v->tokens[m->slots[i].id];
        if (m->slots[i].hash == (uint32_t)(hash >> 32) && t->n_bytes == n &&
            memcmp(t->bytes, bytes, n) == 0)
            return m->slots[i].id;
    }
    return -1;
}

/* The byte that a character of the alphabet stands for, or -1.  Printable bytes
 * stand for themselves; the other 68, in order, are U+0100 and up. */
static int byte_of(int32_t c)
{
    if ((c >= 0x21 && c <= 0x7E) || (c >= 0xA1 && c <= 0xAC) || (c >= 0xAE && c <= 0xFF))
        return c;
    if (c < 0x100 || c >= 0x100 + 68)
        return -1;
    c -= 0x100;
    if (c <= 0x20)
        return c;                        /* 00..20 */
    return c == 67 ? 0xAD : c - 0x21 + 0x7F;   /* 7F..A0, AD */
}

/* Spell t->spelling in bytes at out; false if it is not of the alphabet. */
static bool spell(struct token *t, char *out)
{
    uint32_t n = 0;
    size_t length;

    for (size_t at = 0; at < t->n_spelling; at += length) {
        int byte = byte_of(unicode_decode(t->spelling + at, &length));
        if (byte < 0)
            return false;
        out[n++] = (char)byte;
    }
    t->bytes = out;
    t->n_bytes = n;
    return true;
}

void vocab_init(struct vocab *v, int32_t n_ids, size_t n_tokens, size_t text_bytes)
{
    *v = (struct vocab){ .n_ids = n_ids };
    v->tokens = mem_calloc((size_t)n_ids, sizeof *v->tokens);
    v->text = v->text_end = mem_alloc(2 * text_bytes);   /* the bytes are no longer */
    id_map_init(&v->by_spelling, n_tokens);
    id_map_init(&v->by_bytes, n_tokens);
    for (int i = 0; i < 256; i++)
        v->byte_ids[i] = -1;
}

void vocab_fini(struct vocab *v)
{
    mem_free(v->tokens);
    mem_free(v->text);
    mem_free(v->by_spelling.slots);
    mem_free(v->by_bytes.slots);
    *v = (struct vocab){ 0 };
}

bool vocab_add(struct vocab *v, int32_t id, const char *spelling, unsigned flags)
{
    struct token *t = &v->tokens[id];
    size_t n = strlen(spelling);

    ASSERT(id >= 0 && id < v->n_ids && !(t->flags & TOKEN_EXISTS));
    if (vocab_find_spelling(v, spelling, n) >= 0)
        return false;
    memcpy(v->text_end, spelling, n + 1);
    t->spelling = t->bytes = v->text_end;
    t->n_spelling = t->n_bytes = (uint32_t)n;
    t->flags = flags | TOKEN_EXISTS;
    v->text_end += n + 1;
    if (n > v->longest_spelling)
        v->longest_spelling = n;
    id_map_put(&v->by_spelling, spelling, n, id);
    if (!spell(t, v->text_end))
        return true;
    v->text_end += t->n_bytes;
    t->flags |= TOKEN_ALPHABET;
    if (flags & TOKEN_ADDED)
        return true;   /* the model itself does not know it */
    if (t->n_bytes > v->longest_bytes)
        v->longest_bytes = t->n_bytes;
    if (t->n_bytes == 1)
        v->byte_ids[(unsigned char)t->bytes[0]] = id;
    id_map_put(&v->by_bytes, t->bytes, t->n_bytes, id);
    return true;
}
