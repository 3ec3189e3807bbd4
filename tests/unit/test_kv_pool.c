/* The promises of engine/kv/kv_pool.h for a pool without a host tier; see test_kv_pool_tiers.c
 * and test_kv_pool_history.c. */

#include "tests/support/kv_pool_fixture.h"

#include <check.h>
#include <signal.h>

enum { BLOCKS = 24 };

static void setup(void)
{
    pool_open((struct kv_pool_config){ .blocks = BLOCKS, .prefix_cache = true }, 0);
}

static kv_block find_from(kv_block parent, int text, uint64_t provenance)
{
    struct block_name name = pool_name(parent, text, provenance);

    return kv_pool_find(pool, &name);
}

START_TEST(take_is_all_or_nothing)
{
    kv_block b[BLOCKS];

    ck_assert_int_eq(kv_pool_take(pool, BLOCKS - 2, b), ST_OK);
    ck_assert_int_eq(kv_pool_take(pool, 3, b + BLOCKS - 2), ST_BUSY);
    ck_assert_uint_eq(kv_pool_counts(pool).free, 2);
    ck_assert_uint_eq(kv_pool_available(pool), 2);
    ck_assert_int_eq(kv_pool_take(pool, 0, b + BLOCKS - 2), ST_OK);
    for (int i = 0; i < BLOCKS - 2; i++)
        pool_give(b[i]);
    ck_assert_uint_eq(kv_pool_available(pool), BLOCKS);
}
END_TEST

START_TEST(sealed_blocks_are_found_after_their_sequence)
{
    kv_block a = pool_new(KV_BLOCK_NONE, 1), b = pool_new(a, 2);

    pool_give(b);
    pool_give(a);
    ck_assert_uint_eq(kv_pool_counts(pool).cached, 2);
    ck_assert_uint_eq(kv_pool_available(pool), BLOCKS);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), a);
    ck_assert_uint_eq(pool_find(a, 2), b);
    kv_pool_unpin(pool, b);
    kv_pool_unpin(pool, a);
}
END_TEST

START_TEST(names_differ_in_parent_tokens_provenance_and_salt)
{
    kv_block a = pool_new(KV_BLOCK_NONE, 1);
    struct block_name salted = pool_name(KV_BLOCK_NONE, 1, 0);

    salted.salt = 7;
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 2), KV_BLOCK_NONE);
    ck_assert_uint_eq(find_from(KV_BLOCK_NONE, 1, 5), KV_BLOCK_NONE);
    ck_assert_uint_eq(pool_find(a, 1), KV_BLOCK_NONE);
    ck_assert_uint_eq(kv_pool_find(pool, &salted), KV_BLOCK_NONE);
    pool_give(a);
}
END_TEST

START_TEST(sealing_a_twin_gives_the_first)
{
    kv_block a = pool_new(KV_BLOCK_NONE, 1);
    kv_block b = pool_new(KV_BLOCK_NONE, 1);

    ck_assert_uint_eq(a, b);
    ck_assert_uint_eq(kv_pool_counts(pool).pinned, 1);
    pool_give(a);
    ck_assert_uint_eq(kv_pool_counts(pool).pinned, 1);   /* the other's pin and hold */
    pool_give(b);
}
END_TEST

START_TEST(leaves_go_before_their_parents)
{
    kv_block a = pool_new(KV_BLOCK_NONE, 1), b = pool_new(a, 2), c = pool_new(b, 3);
    kv_block rest[BLOCKS];

    pool_give(c);
    pool_give(b);
    pool_give(a);
    ck_assert_int_eq(kv_pool_take(pool, BLOCKS - 2, rest), ST_OK);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), a);
    ck_assert_uint_eq(pool_find(a, 2), b);
    ck_assert_uint_eq(pool_find(b, 3), KV_BLOCK_NONE);
    kv_pool_unpin(pool, b);
    kv_pool_unpin(pool, a);
    for (int i = 0; i < BLOCKS - 2; i++)
        pool_give(rest[i]);
}
END_TEST

START_TEST(the_oldest_chain_is_eaten_up_before_the_next)
{
    kv_block a = pool_new(KV_BLOCK_NONE, 1), b = pool_new(a, 2);
    kv_block x = pool_new(KV_BLOCK_NONE, 3), y = pool_new(x, 4);
    kv_block rest[BLOCKS];

    pool_give(b);
    pool_give(a);
    pool_give(y);
    pool_give(x);
    ck_assert_int_eq(kv_pool_take(pool, BLOCKS - 2, rest), ST_OK);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), KV_BLOCK_NONE);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 3), x);
    ck_assert_uint_eq(pool_find(x, 4), y);
    kv_pool_unpin(pool, y);
    kv_pool_unpin(pool, x);
    for (int i = 0; i < BLOCKS - 2; i++)
        pool_give(rest[i]);
}
END_TEST

START_TEST(an_unsealed_block_is_gone_with_its_pin)
{
    kv_block b = pool_take();

    ck_assert_uint_eq(kv_pool_counts(pool).free, BLOCKS - 1);
    pool_give(b);
    ck_assert_uint_eq(kv_pool_counts(pool).free, BLOCKS);
}
END_TEST

START_TEST(without_prefix_cache_nothing_is_found)
{
    pool_close();
    pool_open((struct kv_pool_config){ .blocks = 4 }, 0);
    kv_block a = pool_new(KV_BLOCK_NONE, 1);
    kv_block b = pool_new(a, 2);

    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), KV_BLOCK_NONE);
    ck_assert_uint_eq(pool_find(a, 2), KV_BLOCK_NONE);
    pool_give(b);
    pool_give(a);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), KV_BLOCK_NONE);
    ck_assert_uint_eq(kv_pool_counts(pool).free, 4);
}
END_TEST

/* Nor are those that follow it, nor does it replace its twin. */
START_TEST(a_block_without_a_name_is_gone_with_its_pin)
{
    kv_block a = pool_new(KV_BLOCK_NONE, 1), b;

    ck_assert_int_eq(kv_pool_take(pool, 1, &b), ST_OK);
    ck_assert_uint_eq(kv_pool_seal(pool, b, NULL), b);
    kv_block c = pool_new(b, 2);
    ck_assert_uint_eq(pool_find(b, 2), KV_BLOCK_NONE);
    pool_give(c);
    pool_give(b);
    ck_assert_uint_eq(kv_pool_counts(pool).cached, 0);
    pool_give(a);
    ck_assert_uint_eq(kv_pool_counts(pool).cached, 1);
}
END_TEST

START_TEST(freed_blocks_are_poisoned)
{
    kv_pool_poison(pool, NULL);
    kv_block b = pool_take();
    struct block_place place = kv_pool_place(pool, b);

    ck_assert(pool_is_poisoned(&place));
    pool_write(&place, 5);
    ck_assert(pool_reads(&place, 5));
    pool_give(b);
    ck_assert(pool_is_poisoned(&place));
}
END_TEST

START_TEST(a_block_has_a_place_and_keeps_it)
{
    kv_block a = pool_take(), b = pool_take();
    struct block_place of_a = kv_pool_place(pool, a), of_b = kv_pool_place(pool, b);
    uint64_t version = kv_pool_version(pool);

    ck_assert_int_ge(of_a.kv, 0);
    ck_assert_int_ge(of_a.index, 0);
    ck_assert_int_eq(of_a.host, -1);
    ck_assert_int_ne(of_a.kv, of_b.kv);
    ck_assert_int_ne(of_a.index, of_b.index);
    ck_assert_uint_eq(pool_seal(a, KV_BLOCK_NONE, 1), a);
    pool_give(b);
    ck_assert_int_eq(kv_pool_place(pool, a).kv, of_a.kv);
    ck_assert_int_eq(kv_pool_place(pool, a).index, of_a.index);
    ck_assert_uint_eq(kv_pool_version(pool), version);
    pool_give(a);
}
END_TEST

START_TEST(nothing_is_stored_without_a_host_tier)
{
    kv_block a = pool_new(KV_BLOCK_NONE, 1);
    struct block_place place;

    ck_assert(!kv_pool_store_begin(pool, a, &place));
    pool_give(a);
}
END_TEST

/* ---- bugs of the caller */

START_TEST(unpinning_what_is_held)
{
    kv_pool_unpin(pool, pool_take());
}
END_TEST

START_TEST(pinning_what_is_gone)
{
    kv_block b = pool_take();

    pool_give(b);
    kv_pool_pin(pool, b);
}
END_TEST

START_TEST(sealing_twice)
{
    kv_block a = pool_new(KV_BLOCK_NONE, 1);

    pool_seal(a, KV_BLOCK_NONE, 1);
}
END_TEST

START_TEST(destroying_with_pins)
{
    pool_take();
    kv_pool_destroy(pool);
}
END_TEST

TCase *kv_pool_case(void)
{
    TCase *tc = tcase_create("kv_pool");

    tcase_add_checked_fixture(tc, setup, pool_close);
    tcase_add_test(tc, take_is_all_or_nothing);
    tcase_add_test(tc, sealed_blocks_are_found_after_their_sequence);
    tcase_add_test(tc, names_differ_in_parent_tokens_provenance_and_salt);
    tcase_add_test(tc, sealing_a_twin_gives_the_first);
    tcase_add_test(tc, leaves_go_before_their_parents);
    tcase_add_test(tc, the_oldest_chain_is_eaten_up_before_the_next);
    tcase_add_test(tc, an_unsealed_block_is_gone_with_its_pin);
    tcase_add_test(tc, without_prefix_cache_nothing_is_found);
    tcase_add_test(tc, a_block_without_a_name_is_gone_with_its_pin);
    tcase_add_test(tc, freed_blocks_are_poisoned);
    tcase_add_test(tc, a_block_has_a_place_and_keeps_it);
    tcase_add_test(tc, nothing_is_stored_without_a_host_tier);
    tcase_add_test_raise_signal(tc, unpinning_what_is_held, SIGABRT);
    tcase_add_test_raise_signal(tc, pinning_what_is_gone, SIGABRT);
    tcase_add_test_raise_signal(tc, sealing_twice, SIGABRT);
    tcase_add_test_raise_signal(tc, destroying_with_pins, SIGABRT);
    return tc;
}
