/* The promises of engine/kv/kv_pool.h: each rule, and a long random history
 * against a naive model of what may be found. */

#include "engine/kv/kv_pool.h"
#include "kernels/backend.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCKS = 24 };

static struct backend *be;
static struct kv_pool *pool;

static void open_pool(uint32_t blocks, bool prefix_cache)
{
    const struct kv_pool_config cfg = {
        .blocks = blocks, .layers = 2, .prefix_cache = prefix_cache,
        .shape = { .kv_heads = 1, .head_dim = 16, .filter = FILTER_COARSE,
                   .index = INDEX_ROTATED },
    };
    ck_assert_int_eq(kv_pool_create(&pool, be, &cfg, NULL), ST_OK);
}

static void setup(void)
{
    struct backend_options one_thread = { .threads = 1 };

    ck_assert_int_eq(backend_open(&be, "cpu", &one_thread, NULL), ST_OK);
    open_pool(BLOCKS, true);
}

static void teardown(void)
{
    kv_pool_check(pool);
    kv_pool_destroy(pool);
    backend_close(be);
}

static const int32_t *tokens_of(int text)
{
    static int32_t tokens[BLOCK_TOKENS];

    for (int i = 0; i < BLOCK_TOKENS; i++)
        tokens[i] = text * 1000 + i;
    return tokens;
}

static struct block_name named(kv_block parent, int text, uint64_t provenance)
{
    return (struct block_name){ .parent = parent, .tokens = tokens_of(text),
                                .provenance = provenance };
}

static kv_block take_one(void)
{
    kv_block b;

    ck_assert_int_eq(kv_pool_take(pool, 1, &b), ST_OK);
    return b;
}

static kv_block seal_new(kv_block parent, int text)
{
    struct block_name name = named(parent, text, 0);

    return kv_pool_seal(pool, take_one(), &name);
}

static kv_block find(kv_block parent, int text, uint64_t provenance)
{
    struct block_name name = named(parent, text, provenance);

    return kv_pool_find(pool, &name);
}

START_TEST(take_is_all_or_nothing)
{
    kv_block b[BLOCKS];

    ck_assert_int_eq(kv_pool_take(pool, BLOCKS - 2, b), ST_OK);
    ck_assert_int_eq(kv_pool_take(pool, 3, b + BLOCKS - 2), ST_BUSY);
    ck_assert_uint_eq(kv_pool_counts(pool).free, 2);
    for (int i = 0; i < BLOCKS - 2; i++)
        kv_pool_unpin(pool, b[i]);
}
END_TEST

START_TEST(sealed_blocks_are_found_after_their_sequence)
{
    kv_block a = seal_new(KV_BLOCK_NONE, 1), b = seal_new(a, 2);

    kv_pool_unpin(pool, b);
    kv_pool_unpin(pool, a);
    ck_assert_uint_eq(kv_pool_counts(pool).cached, 2);
    ck_assert_uint_eq(find(KV_BLOCK_NONE, 1, 0), a);
    ck_assert_uint_eq(find(a, 2, 0), b);
    kv_pool_unpin(pool, b);
    kv_pool_unpin(pool, a);
}
END_TEST

START_TEST(names_differ_in_parent_tokens_provenance_and_salt)
{
    kv_block a = seal_new(KV_BLOCK_NONE, 1);
    struct block_name salted = named(KV_BLOCK_NONE, 1, 0);

    salted.salt = 7;
    ck_assert_uint_eq(find(KV_BLOCK_NONE, 2, 0), KV_BLOCK_NONE);
    ck_assert_uint_eq(find(KV_BLOCK_NONE, 1, 5), KV_BLOCK_NONE);
    ck_assert_uint_eq(find(a, 1, 0), KV_BLOCK_NONE);
    ck_assert_uint_eq(kv_pool_find(pool, &salted), KV_BLOCK_NONE);
    kv_pool_unpin(pool, a);
}
END_TEST

START_TEST(sealing_a_twin_gives_the_first)
{
    kv_block a = seal_new(KV_BLOCK_NONE, 1);
    kv_block b = seal_new(KV_BLOCK_NONE, 1);

    ck_assert_uint_eq(a, b);
    ck_assert_uint_eq(kv_pool_counts(pool).pinned, 1);
    kv_pool_unpin(pool, a);
    kv_pool_unpin(pool, b);
}
END_TEST

START_TEST(leaves_go_before_their_parents)
{
    kv_block a = seal_new(KV_BLOCK_NONE, 1), b = seal_new(a, 2), c = seal_new(b, 3);
    kv_block rest[BLOCKS];

    kv_pool_unpin(pool, c);
    kv_pool_unpin(pool, b);
    kv_pool_unpin(pool, a);
    ck_assert_int_eq(kv_pool_take(pool, BLOCKS - 2, rest), ST_OK);
    ck_assert_uint_eq(find(KV_BLOCK_NONE, 1, 0), a);
    ck_assert_uint_eq(find(a, 2, 0), b);
    ck_assert_uint_eq(find(b, 3, 0), KV_BLOCK_NONE);
    kv_pool_unpin(pool, b);
    kv_pool_unpin(pool, a);
    for (int i = 0; i < BLOCKS - 2; i++)
        kv_pool_unpin(pool, rest[i]);
}
END_TEST

START_TEST(without_prefix_cache_nothing_is_found)
{
    kv_pool_destroy(pool);
    open_pool(4, false);
    kv_block a = seal_new(KV_BLOCK_NONE, 1);
    kv_block b = seal_new(a, 2);

    kv_pool_unpin(pool, b);
    kv_pool_unpin(pool, a);
    ck_assert_uint_eq(find(KV_BLOCK_NONE, 1, 0), KV_BLOCK_NONE);
    ck_assert_uint_eq(kv_pool_counts(pool).free, 4);
}
END_TEST

START_TEST(freed_blocks_are_poisoned)
{
    kv_pool_poison(pool, true, NULL);
    kv_block b = take_one();
    bf16 *row = kv_pool_kv(pool, 1) + b * (size_t)BLOCK_TOKENS * 2 * 16;

    ck_assert_uint_eq(row[5], 0xffff);
    row[5] = 0x3f80;
    kv_pool_unpin(pool, b);
    ck_assert_uint_eq(row[5], 0xffff);
}
END_TEST

/* Sequences that each spell a text out of few block texts, so that they share
 * prefixes all the time.  The pool's memory of block b is its text number, so
 * a stale find shows as a wrong number in the block's own bytes. */
enum { SEQS = 6, MOST = 8, TEXTS = 3 };

struct reader {
    kv_block table[MOST];
    int texts[MOST];
    int n, n_sealed;
};

static uint8_t *mark_of(kv_block b)
{
    const struct kv_shape shape = { .kv_heads = 1, .head_dim = 16, .filter = FILTER_COARSE,
                                    .index = INDEX_ROTATED };
    return kv_pool_index(pool, 1) + b * index_block_bytes(&shape);
}

/* What a block of this chain must contain: a hash of all texts up to it. */
static uint8_t content(const struct reader *r, int i)
{
    unsigned h = 17;

    for (int k = 0; k <= i; k++)
        h = h * 31 + (unsigned)r->texts[k] + 1;
    return (uint8_t)(h ^ h >> 8);
}

static void begin(struct reader *r)
{
    int want = 1 + (int)(random() % MOST);

    for (int i = 0; i < want; i++)
        r->texts[i] = (int)(random() % TEXTS);
    r->n = r->n_sealed = 0;
    while (r->n < want) {
        struct block_name name = named(r->n ? r->table[r->n - 1] : KV_BLOCK_NONE,
                                       r->texts[r->n], 0);
        kv_block b = kv_pool_find(pool, &name);
        if (b == KV_BLOCK_NONE)
            break;
        r->table[r->n] = b;
        ck_assert_uint_eq(*mark_of(b), content(r, r->n));
        r->n++;
    }
    r->n_sealed = r->n;
}

static void extend(struct reader *r)
{
    if (r->n == MOST || kv_pool_take(pool, 1, &r->table[r->n]) != ST_OK)
        return;
    r->texts[r->n] = (int)(random() % TEXTS);
    *mark_of(r->table[r->n]) = content(r, r->n);
    r->n++;
}

static void seal(struct reader *r)
{
    if (r->n_sealed == r->n)
        return;
    int i = r->n_sealed++;
    struct block_name name = named(i ? r->table[i - 1] : KV_BLOCK_NONE, r->texts[i], 0);
    r->table[i] = kv_pool_seal(pool, r->table[i], &name);
    ck_assert_uint_eq(*mark_of(r->table[i]), content(r, i));
}

static void end(struct reader *r)
{
    while (r->n > 0)
        kv_pool_unpin(pool, r->table[--r->n]);
    r->n_sealed = 0;
}

START_TEST(random_histories_keep_the_invariants)
{
    struct reader readers[SEQS] = { 0 };

    srandom((unsigned)_i + 1);
    for (int op = 0; op < 25000; op++) {
        struct reader *r = &readers[random() % SEQS];
        switch (random() % 8) {
        case 0:
            end(r);
            break;
        case 1:
            if (r->n == 0)
                begin(r);
            break;
        case 2: case 3: case 4:
            extend(r);
            break;
        default:
            seal(r);
        }
        kv_pool_check(pool);
        for (int i = 0; i < r->n; i++)
            ck_assert_uint_eq(*mark_of(r->table[i]), content(r, i));
    }
    ck_assert_uint_gt(kv_pool_counts(pool).n_reclaimed, 100);
    ck_assert_uint_gt(kv_pool_counts(pool).n_duplicates, 100);
    for (int s = 0; s < SEQS; s++)
        end(&readers[s]);
}
END_TEST

TCase *kv_pool_case(void)
{
    TCase *tc = tcase_create("kv_pool");

    tcase_set_timeout(tc, 60);
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, take_is_all_or_nothing);
    tcase_add_test(tc, sealed_blocks_are_found_after_their_sequence);
    tcase_add_test(tc, names_differ_in_parent_tokens_provenance_and_salt);
    tcase_add_test(tc, sealing_a_twin_gives_the_first);
    tcase_add_test(tc, leaves_go_before_their_parents);
    tcase_add_test(tc, without_prefix_cache_nothing_is_found);
    tcase_add_test(tc, freed_blocks_are_poisoned);
    tcase_add_loop_test(tc, random_histories_keep_the_invariants, 0, 8);
    return tc;
}
