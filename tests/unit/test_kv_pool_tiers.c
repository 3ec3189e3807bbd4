/* The promises of engine/kv/kv_pool.h about a host tier, one by one. */

#include "tests/support/kv_pool_fixture.h"

#include <check.h>
#include <signal.h>

enum { BLOCKS = 4, INDEX_BLOCKS = 6, HOST_BLOCKS = 8 };

static kv_block rest[HOST_BLOCKS];
static uint32_t n_rest;

static void setup(void)
{
    pool_open((struct kv_pool_config){ .blocks = BLOCKS, .index_blocks = INDEX_BLOCKS,
                                       .host_blocks = HOST_BLOCKS, .prefix_cache = true },
              HOST_BLOCKS);
    n_rest = 0;
}

static void open_again(struct kv_pool_config cfg, uint32_t ready)
{
    pool_close();
    pool_open(cfg, ready);
}

/* Take n blocks more, to be given back by give_rest(). */
static void take_rest(uint32_t n)
{
    ck_assert_int_eq(kv_pool_take(pool, n, rest + n_rest), ST_OK);
    n_rest += n;
}

static void give_rest(void)
{
    while (n_rest > 0)
        pool_give(rest[--n_rest]);
}

static bool is_resident(kv_block b)
{
    struct block_place p = kv_pool_place(pool, b);

    return p.kv >= 0 && p.index >= 0;
}

static bool is_offloaded(kv_block b)
{
    struct block_place p = kv_pool_place(pool, b);

    return p.kv < 0 && p.index >= 0 && p.host >= 0;
}

static bool is_stored(kv_block b)
{
    struct block_place p = kv_pool_place(pool, b);

    return p.kv < 0 && p.index < 0 && p.host >= 0;
}

/* A sealed block with contents of its own, pinned and held. */
static kv_block new_written(kv_block parent, int text)
{
    kv_block b = pool_take();
    struct block_place place = kv_pool_place(pool, b);

    pool_write(&place, (uint32_t)text);
    return pool_seal(b, parent, text);
}

static kv_block new_stored(kv_block parent, int text)
{
    kv_block b = new_written(parent, text);

    pool_store(b);
    return b;
}

/* Pinned, without a kv slot: all others are taken meanwhile. */
static kv_block new_offloaded(kv_block parent, int text)
{
    kv_block b = new_stored(parent, text);

    kv_pool_release(pool, b);
    take_rest(kv_pool_available(pool));
    give_rest();
    ck_assert(is_offloaded(b));
    return b;
}

static bool reads(kv_block b, int text)
{
    struct block_place place = kv_pool_place(pool, b);

    return pool_reads(&place, (uint32_t)text);
}

/* ---- places */

START_TEST(a_stored_block_outlives_its_kv_slot)
{
    kv_block a = new_stored(KV_BLOCK_NONE, 1);

    ck_assert(is_resident(a));
    ck_assert_int_ge(kv_pool_place(pool, a).host, 0);
    pool_give(a);
    take_rest(BLOCKS);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), a);
    ck_assert(is_stored(a) && reads(a, 1));
    give_rest();
    pool_load(a, true);
    ck_assert(is_resident(a) && reads(a, 1));
    kv_pool_hold(pool, a);
    take_rest(BLOCKS - 1);
    ck_assert(is_resident(a));
    give_rest();
    pool_give(a);
    ck_assert_uint_eq(kv_pool_counts(pool).n_stored, 1);
    ck_assert_uint_eq(kv_pool_counts(pool).n_loaded, 1);
}
END_TEST

START_TEST(a_held_block_keeps_its_kv_slot)
{
    kv_block a = new_stored(KV_BLOCK_NONE, 1), b = new_stored(a, 2);

    kv_pool_release(pool, b);
    ck_assert_uint_eq(kv_pool_available(pool), BLOCKS - 1);
    take_rest(BLOCKS - 1);
    ck_assert(is_resident(a) && is_offloaded(b));
    ck_assert_int_eq(kv_pool_take(pool, 1, rest + n_rest), ST_BUSY);
    give_rest();
    kv_pool_unpin(pool, b);
    pool_give(a);
}
END_TEST

START_TEST(a_pinned_block_without_a_copy_keeps_its_kv_slot)
{
    kv_block a = new_written(KV_BLOCK_NONE, 1);

    kv_pool_release(pool, a);
    ck_assert_uint_eq(kv_pool_available(pool), BLOCKS - 1);
    kv_pool_hold(pool, a);
    pool_give(a);
}
END_TEST

START_TEST(unpinned_blocks_go_before_pinned_ones)
{
    kv_block a = new_stored(KV_BLOCK_NONE, 1), b = new_written(KV_BLOCK_NONE, 2);

    kv_pool_release(pool, a);
    pool_give(b);
    take_rest(BLOCKS - 1);
    ck_assert(is_resident(a));
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 2), KV_BLOCK_NONE);
    take_rest(1);
    ck_assert(is_offloaded(a) && reads(a, 1));
    give_rest();
    kv_pool_unpin(pool, a);
}
END_TEST

START_TEST(the_least_recently_released_is_offloaded_first)
{
    kv_block a = new_stored(KV_BLOCK_NONE, 1), b = new_stored(KV_BLOCK_NONE, 2);

    kv_pool_release(pool, a);
    kv_pool_release(pool, b);
    kv_pool_hold(pool, a);
    kv_pool_release(pool, a);
    take_rest(BLOCKS - 1);
    ck_assert(is_resident(a) && is_offloaded(b));
    give_rest();
    kv_pool_unpin(pool, a);
    kv_pool_unpin(pool, b);
}
END_TEST

START_TEST(an_offloaded_block_gives_its_index_with_the_last_pin)
{
    kv_block a = new_offloaded(KV_BLOCK_NONE, 1);

    kv_pool_pin(pool, a);
    kv_pool_unpin(pool, a);
    ck_assert(is_offloaded(a));
    ck_assert_uint_eq(kv_pool_counts(pool).index_free, INDEX_BLOCKS - 1);
    kv_pool_unpin(pool, a);
    ck_assert(is_stored(a));
    ck_assert_uint_eq(kv_pool_counts(pool).index_free, INDEX_BLOCKS);
    ck_assert_uint_eq(kv_pool_counts(pool).host_cached, 1);
}
END_TEST

START_TEST(index_slots_limit_what_is_taken)
{
    kv_block a, b, c;

    open_again((struct kv_pool_config){ .blocks = 3, .host_blocks = 3, .prefix_cache = true }, 3);
    a = new_stored(KV_BLOCK_NONE, 1);
    b = new_stored(KV_BLOCK_NONE, 2);
    pool_give(a);
    pool_give(b);
    take_rest(3);
    give_rest();
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), a);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 2), b);
    pool_load(a, false);
    pool_load(b, false);
    c = new_written(KV_BLOCK_NONE, 3);
    ck_assert_uint_eq(kv_pool_counts(pool).free, 2);
    ck_assert_uint_eq(kv_pool_counts(pool).index_free, 0);
    ck_assert_uint_eq(kv_pool_available(pool), 0);
    ck_assert_int_eq(kv_pool_take(pool, 1, rest), ST_BUSY);
    pool_give(c);
    ck_assert_uint_eq(kv_pool_available(pool), 1);       /* with the index of c */
    take_rest(1);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 3), KV_BLOCK_NONE);
    ck_assert(is_offloaded(a) && is_offloaded(b));
    give_rest();
    kv_pool_unpin(pool, a);
    ck_assert_uint_eq(kv_pool_available(pool), 2);
    kv_pool_unpin(pool, b);
}
END_TEST

START_TEST(the_version_grows_with_every_move)
{
    kv_block a = new_written(KV_BLOCK_NONE, 1);
    uint64_t v = kv_pool_version(pool);

    pool_store(a);
    ck_assert_uint_gt(kv_pool_version(pool), v);
    kv_pool_release(pool, a);
    v = kv_pool_version(pool);
    take_rest(BLOCKS - 1);
    ck_assert_uint_eq(kv_pool_version(pool), v);         /* a is where it was */
    take_rest(1);
    ck_assert_uint_gt(kv_pool_version(pool), v);
    give_rest();
    v = kv_pool_version(pool);
    pool_load(a, true);
    ck_assert_uint_gt(kv_pool_version(pool), v);
    kv_pool_unpin(pool, a);
}
END_TEST

/* ---- transfers */

START_TEST(a_block_in_a_transfer_keeps_everything)
{
    kv_block a = new_written(KV_BLOCK_NONE, 1);
    struct block_place place, again;

    ck_assert(kv_pool_store_begin(pool, a, &place));
    ck_assert_int_eq(kv_pool_place(pool, a).host, -1);   /* not readable yet */
    ck_assert(is_resident(a));
    ck_assert(!kv_pool_store_begin(pool, a, &again));
    ck_assert(!kv_pool_load_begin(pool, a, true, &again));
    pool_give(a);
    ck_assert_uint_eq(kv_pool_available(pool), BLOCKS - 1);
    ck_assert_uint_eq(kv_pool_counts(pool).cached, 0);
    kv_pool_check(pool);
    kv_pool_store_end(pool, a, true);
    ck_assert_uint_eq(kv_pool_available(pool), BLOCKS);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), a);
    ck_assert_int_eq(kv_pool_place(pool, a).host, place.host);
    kv_pool_unpin(pool, a);
}
END_TEST

START_TEST(a_block_is_pinned_and_held_while_it_is_stored)
{
    kv_block a = new_written(KV_BLOCK_NONE, 1);
    struct block_place place;

    pool_give(a);
    ck_assert(kv_pool_store_begin(pool, a, &place));     /* wants no pin */
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), a);
    kv_pool_hold(pool, a);
    kv_pool_store_end(pool, a, true);
    ck_assert_uint_eq(kv_pool_available(pool), BLOCKS - 1);
    pool_give(a);
}
END_TEST

START_TEST(a_failed_store_leaves_no_trace)
{
    kv_block a = new_written(KV_BLOCK_NONE, 1);
    struct block_place place;
    uint64_t v = kv_pool_version(pool);

    ck_assert(kv_pool_store_begin(pool, a, &place));
    ck_assert_uint_eq(kv_pool_counts(pool).host_free, HOST_BLOCKS - 1);
    kv_pool_store_end(pool, a, false);
    ck_assert_uint_eq(kv_pool_counts(pool).host_free, HOST_BLOCKS);
    ck_assert_int_eq(kv_pool_place(pool, a).host, -1);
    ck_assert_uint_eq(kv_pool_version(pool), v);
    ck_assert_uint_eq(kv_pool_counts(pool).n_stored, 0);
    pool_store(a);
    pool_give(a);
}
END_TEST

START_TEST(a_failed_load_gives_back_what_it_had_reserved)
{
    kv_block a = new_offloaded(KV_BLOCK_NONE, 1);
    struct block_place place;

    ck_assert(kv_pool_load_begin(pool, a, true, &place));
    ck_assert_int_eq(place.index, -1);                   /* there already */
    ck_assert_int_ge(place.kv, 0);
    ck_assert_int_eq(place.host, kv_pool_place(pool, a).host);
    ck_assert(is_offloaded(a));
    kv_pool_load_end(pool, a, false);
    ck_assert(is_offloaded(a));
    ck_assert_uint_eq(kv_pool_counts(pool).free, BLOCKS);
    ck_assert(kv_pool_load_begin(pool, a, true, &place));
    kv_pool_unpin(pool, a);                              /* the transfer keeps kv and index */
    kv_pool_load_end(pool, a, false);
    ck_assert(is_stored(a));
}
END_TEST

START_TEST(a_load_nobody_waits_for_leaves_a_cached_block)
{
    kv_block a = new_offloaded(KV_BLOCK_NONE, 1);
    struct block_place place;

    ck_assert(kv_pool_load_begin(pool, a, true, &place));
    kv_pool_unpin(pool, a);
    for (int layer = 0; layer < POOL_LAYERS; layer++)
        pool_move(false, &place, layer);
    kv_pool_load_end(pool, a, true);
    ck_assert(is_resident(a) && reads(a, 1));
    ck_assert_uint_eq(kv_pool_available(pool), BLOCKS);
}
END_TEST

START_TEST(the_index_is_loaded_alone)
{
    kv_block a = new_stored(KV_BLOCK_NONE, 1);
    struct block_place place;

    pool_give(a);
    take_rest(BLOCKS);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), a);
    ck_assert(!kv_pool_load_begin(pool, a, true, &place));   /* no kv slot to be had */
    ck_assert_uint_eq(kv_pool_counts(pool).index_free, INDEX_BLOCKS - BLOCKS);
    pool_load(a, false);
    ck_assert(is_offloaded(a) && reads(a, 1));
    ck_assert(!kv_pool_load_begin(pool, a, false, &place));  /* nothing to move */
    give_rest();
    pool_load(a, true);
    ck_assert(is_resident(a) && reads(a, 1));
    ck_assert(!kv_pool_load_begin(pool, a, true, &place));
    kv_pool_unpin(pool, a);
}
END_TEST

START_TEST(a_load_takes_slots_like_a_take)
{
    kv_block a = new_offloaded(KV_BLOCK_NONE, 1), b = new_stored(KV_BLOCK_NONE, 2);

    take_rest(BLOCKS - 1);
    kv_pool_release(pool, b);
    pool_load(a, true);
    ck_assert(is_resident(a) && is_offloaded(b));
    kv_pool_hold(pool, a);
    give_rest();
    pool_give(a);
    kv_pool_unpin(pool, b);
}
END_TEST

/* ---- the host's slots */

START_TEST(host_slots_exist_once_they_are_ready)
{
    struct block_place place;

    open_again((struct kv_pool_config){ .blocks = 4, .host_blocks = 2, .prefix_cache = true }, 0);
    kv_block a = new_written(KV_BLOCK_NONE, 1), b = new_written(a, 2);
    ck_assert(!kv_pool_store_begin(pool, a, &place));
    ck_assert_uint_eq(kv_pool_counts(pool).host_blocks, 0);
    kv_pool_host_ready(pool, 1);
    pool_store(a);
    ck_assert_int_eq(kv_pool_place(pool, a).host, 0);
    ck_assert(!kv_pool_store_begin(pool, b, &place));    /* a is pinned */
    kv_pool_host_ready(pool, 2);
    pool_store(b);
    ck_assert_uint_eq(kv_pool_counts(pool).host_blocks, 2);
    ck_assert_uint_eq(kv_pool_counts(pool).host_free, 0);
    pool_give(b);
    pool_give(a);
    ck_assert_uint_eq(kv_pool_counts(pool).host_cached, 2);
}
END_TEST

START_TEST(the_least_recently_used_host_slot_goes)
{
    open_again((struct kv_pool_config){ .blocks = 4, .host_blocks = 2, .prefix_cache = true }, 2);
    kv_block a = new_stored(KV_BLOCK_NONE, 1), b = new_stored(KV_BLOCK_NONE, 2);
    pool_give(a);
    pool_give(b);
    take_rest(4);                                        /* both STORED */
    give_rest();
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), a);
    kv_pool_unpin(pool, a);                              /* used after b */
    kv_block c = new_stored(KV_BLOCK_NONE, 3);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 2), KV_BLOCK_NONE);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), a);
    ck_assert(is_stored(a) && reads(a, 1));
    kv_pool_unpin(pool, a);
    pool_give(c);
}
END_TEST

START_TEST(a_resident_block_can_lose_its_copy)
{
    open_again((struct kv_pool_config){ .blocks = 4, .host_blocks = 1, .prefix_cache = true }, 1);
    kv_block a = new_stored(KV_BLOCK_NONE, 1);
    pool_give(a);
    kv_block b = new_stored(KV_BLOCK_NONE, 2);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), a);
    ck_assert(is_resident(a) && reads(a, 1));
    ck_assert_int_eq(kv_pool_place(pool, a).host, -1);
    kv_pool_unpin(pool, a);
    pool_give(b);
}
END_TEST

START_TEST(stored_leaves_go_before_their_parents)
{
    open_again((struct kv_pool_config){ .blocks = 4, .host_blocks = 3, .prefix_cache = true }, 3);
    kv_block a = new_stored(KV_BLOCK_NONE, 1), b = new_stored(a, 2), c = new_stored(b, 3);
    pool_give(a);                                        /* a is the least recently used */
    pool_give(b);
    pool_give(c);
    take_rest(4);
    give_rest();
    kv_block x = new_stored(KV_BLOCK_NONE, 4), y = new_stored(x, 5);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), a);
    ck_assert_uint_eq(pool_find(a, 2), KV_BLOCK_NONE);
    kv_pool_unpin(pool, a);
    pool_give(y);
    pool_give(x);
}
END_TEST

/* A parent on the device whose child is on the host alone is the last to go, but it goes. */
START_TEST(a_parent_whose_children_are_elsewhere_goes_last)
{
    open_again((struct kv_pool_config){ .blocks = 4, .host_blocks = 2, .prefix_cache = true }, 2);
    kv_block a = new_written(KV_BLOCK_NONE, 1), b = new_stored(a, 2);
    kv_block x = new_written(KV_BLOCK_NONE, 3);
    pool_give(b);
    pool_give(a);
    pool_give(x);
    ck_assert_uint_eq(kv_pool_available(pool), 4);
    take_rest(3);                                        /* a free one, b's and x's */
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), a);
    ck_assert_uint_eq(pool_find(a, 2), b);
    ck_assert(is_resident(a) && is_stored(b));
    kv_pool_unpin(pool, b);
    kv_pool_unpin(pool, a);
    take_rest(1);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), KV_BLOCK_NONE);
    give_rest();
    kv_block again = new_written(KV_BLOCK_NONE, 1);
    ck_assert_uint_eq(pool_find(again, 2), KV_BLOCK_NONE);   /* b was the other's child */
    ck_assert_uint_eq(kv_pool_counts(pool).host_cached, 1);
    pool_give(again);
}
END_TEST

START_TEST(a_parent_whose_child_is_being_copied_goes_without_it)
{
    kv_block a = new_written(KV_BLOCK_NONE, 1), b = new_written(a, 2);
    struct block_place place;

    ck_assert(kv_pool_store_begin(pool, b, &place));
    pool_give(b);
    pool_give(a);
    ck_assert_uint_eq(kv_pool_available(pool), BLOCKS - 1);
    take_rest(BLOCKS - 1);
    kv_pool_check(pool);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), KV_BLOCK_NONE);
    kv_pool_store_end(pool, b, true);
    give_rest();
    ck_assert_uint_eq(kv_pool_available(pool), BLOCKS);
}
END_TEST

/* ---- twins */

START_TEST(a_twin_that_is_being_stored_is_as_good_as_any)
{
    kv_block a = new_written(KV_BLOCK_NONE, 1), b = pool_take();
    struct block_place place;

    ck_assert(kv_pool_store_begin(pool, a, &place));
    ck_assert_uint_eq(pool_seal(b, KV_BLOCK_NONE, 1), a);
    kv_pool_store_end(pool, a, true);
    pool_give(a);
    pool_give(a);
}
END_TEST

START_TEST(an_offloaded_twin_takes_over_kv)
{
    kv_block a = new_offloaded(KV_BLOCK_NONE, 1), b = pool_take();
    struct block_place before = kv_pool_place(pool, a), place = kv_pool_place(pool, b);
    uint64_t v = kv_pool_version(pool);

    pool_write(&place, 1);
    ck_assert_uint_eq(pool_seal(b, KV_BLOCK_NONE, 1), a);
    ck_assert_int_eq(kv_pool_place(pool, a).kv, place.kv);
    ck_assert_int_eq(kv_pool_place(pool, a).index, before.index);
    ck_assert_int_eq(kv_pool_place(pool, a).host, before.host);
    ck_assert(reads(a, 1));
    ck_assert_uint_gt(kv_pool_version(pool), v);
    ck_assert_uint_eq(kv_pool_counts(pool).index_free, INDEX_BLOCKS - 1);
    ck_assert_uint_eq(kv_pool_available(pool), BLOCKS - 1);     /* held in b's stead */
    pool_give(a);
    kv_pool_unpin(pool, a);
}
END_TEST

START_TEST(a_stored_twin_takes_over_kv_and_index)
{
    kv_block a = new_offloaded(KV_BLOCK_NONE, 1);

    kv_pool_unpin(pool, a);
    ck_assert(is_stored(a));
    kv_block b = pool_take();
    struct block_place place = kv_pool_place(pool, b);
    pool_write(&place, 1);
    ck_assert_uint_eq(pool_seal(b, KV_BLOCK_NONE, 1), a);
    ck_assert_int_eq(kv_pool_place(pool, a).kv, place.kv);
    ck_assert_int_eq(kv_pool_place(pool, a).index, place.index);
    ck_assert(reads(a, 1));
    pool_give(a);
}
END_TEST

START_TEST(a_twin_that_is_being_loaded_leaves_a_block_without_a_name)
{
    kv_block a = new_offloaded(KV_BLOCK_NONE, 1);
    struct block_place place;

    ck_assert(kv_pool_load_begin(pool, a, true, &place));
    kv_block b = pool_new(KV_BLOCK_NONE, 1), c = pool_new(b, 2);
    ck_assert_uint_ne(a, b);
    ck_assert_uint_eq(pool_find(KV_BLOCK_NONE, 1), a);
    ck_assert_uint_eq(pool_find(b, 2), KV_BLOCK_NONE);   /* nor has what follows it */
    kv_pool_load_end(pool, a, true);
    kv_pool_unpin(pool, a);
    kv_block d = new_written(a, 2);
    ck_assert_uint_ne(c, d);
    ck_assert_uint_eq(pool_find(a, 2), d);
    kv_pool_unpin(pool, d);
    pool_give(c);
    pool_give(b);
    ck_assert_uint_eq(kv_pool_counts(pool).free, BLOCKS - 2);   /* those two are gone */
    pool_give(d);
    kv_pool_unpin(pool, a);
}
END_TEST

/* ---- without names */

START_TEST(without_prefix_cache_an_unpinned_block_is_gone_everywhere)
{
    struct block_place place;

    open_again((struct kv_pool_config){ .blocks = 4, .index_blocks = 5, .host_blocks = 4 }, 4);
    kv_block a = new_stored(KV_BLOCK_NONE, 1), b = new_written(a, 2);
    kv_pool_release(pool, a);
    take_rest(3);
    ck_assert(is_offloaded(a) && reads(a, 1));
    give_rest();
    pool_load(a, true);
    ck_assert(is_resident(a) && reads(a, 1));
    ck_assert(kv_pool_store_begin(pool, b, &place));
    pool_give(b);
    kv_pool_unpin(pool, a);
    ck_assert_uint_eq(kv_pool_counts(pool).free, 3);     /* b until it is copied */
    kv_pool_check(pool);
    kv_pool_store_end(pool, b, true);
    ck_assert_uint_eq(kv_pool_counts(pool).free, 4);
    ck_assert_uint_eq(kv_pool_counts(pool).index_free, 5);
    ck_assert_uint_eq(kv_pool_counts(pool).host_free, 4);
}
END_TEST

/* ---- poison */

START_TEST(what_is_not_readable_is_poisoned)
{
    struct block_place place, all = { .kv = -1, .index = -1 };

    open_again((struct kv_pool_config){ .blocks = 2, .index_blocks = 3, .host_blocks = 2,
                                        .prefix_cache = true }, 1);
    kv_pool_poison(pool, pool_host);
    ck_assert(pool_is_poisoned(&all));
    kv_pool_host_ready(pool, 2);
    all.host = 1;
    ck_assert(pool_is_poisoned(&all));
    kv_block a = new_written(KV_BLOCK_NONE, 1);
    ck_assert(kv_pool_store_begin(pool, a, &place));
    struct block_place to_host = { .kv = -1, .index = -1, .host = place.host };
    ck_assert(pool_is_poisoned(&to_host));
    pool_move(true, &place, 0);                          /* and then it fails */
    ck_assert(!pool_is_poisoned(&to_host));
    kv_pool_store_end(pool, a, false);
    ck_assert(pool_is_poisoned(&to_host));
    pool_store(a);
    kv_pool_release(pool, a);
    take_rest(2);
    give_rest();
    ck_assert(kv_pool_load_begin(pool, a, true, &place));
    struct block_place to_device = { .kv = place.kv, .index = place.index, .host = -1 };
    ck_assert(pool_is_poisoned(&to_device));
    kv_pool_load_end(pool, a, false);
    struct block_place whole = kv_pool_place(pool, a);
    kv_pool_unpin(pool, a);
    ck_assert(pool_reads(&(struct block_place){ .kv = -1, .index = -1, .host = whole.host }, 1));
    ck_assert(pool_is_poisoned(&(struct block_place){ .kv = -1, .index = whole.index,
                                                      .host = -1 }));
}
END_TEST

/* ---- bugs of the caller */

START_TEST(holding_what_is_elsewhere)
{
    kv_pool_hold(pool, new_offloaded(KV_BLOCK_NONE, 1));
}
END_TEST

START_TEST(storing_what_may_be_written)
{
    struct block_place place;

    kv_pool_store_begin(pool, pool_take(), &place);
}
END_TEST

START_TEST(ending_what_has_not_begun)
{
    kv_pool_load_end(pool, new_stored(KV_BLOCK_NONE, 1), true);
}
END_TEST

START_TEST(destroying_during_a_transfer)
{
    kv_block a = new_written(KV_BLOCK_NONE, 1);
    struct block_place place;

    if (kv_pool_store_begin(pool, a, &place))
        pool_give(a);
    kv_pool_destroy(pool);
}
END_TEST

TCase *kv_pool_tiers_case(void)
{
    TCase *tc = tcase_create("kv_pool_tiers");

    tcase_add_checked_fixture(tc, setup, pool_close);
    tcase_add_test(tc, a_stored_block_outlives_its_kv_slot);
    tcase_add_test(tc, a_held_block_keeps_its_kv_slot);
    tcase_add_test(tc, a_pinned_block_without_a_copy_keeps_its_kv_slot);
    tcase_add_test(tc, unpinned_blocks_go_before_pinned_ones);
    tcase_add_test(tc, the_least_recently_released_is_offloaded_first);
    tcase_add_test(tc, an_offloaded_block_gives_its_index_with_the_last_pin);
    tcase_add_test(tc, index_slots_limit_what_is_taken);
    tcase_add_test(tc, the_version_grows_with_every_move);
    tcase_add_test(tc, a_block_in_a_transfer_keeps_everything);
    tcase_add_test(tc, a_block_is_pinned_and_held_while_it_is_stored);
    tcase_add_test(tc, a_failed_store_leaves_no_trace);
    tcase_add_test(tc, a_failed_load_gives_back_what_it_had_reserved);
    tcase_add_test(tc, a_load_nobody_waits_for_leaves_a_cached_block);
    tcase_add_test(tc, the_index_is_loaded_alone);
    tcase_add_test(tc, a_load_takes_slots_like_a_take);
    tcase_add_test(tc, host_slots_exist_once_they_are_ready);
    tcase_add_test(tc, the_least_recently_used_host_slot_goes);
    tcase_add_test(tc, a_resident_block_can_lose_its_copy);
    tcase_add_test(tc, stored_leaves_go_before_their_parents);
    tcase_add_test(tc, a_parent_whose_children_are_elsewhere_goes_last);
    tcase_add_test(tc, a_parent_whose_child_is_being_copied_goes_without_it);
    tcase_add_test(tc, a_twin_that_is_being_stored_is_as_good_as_any);
    tcase_add_test(tc, an_offloaded_twin_takes_over_kv);
    tcase_add_test(tc, a_stored_twin_takes_over_kv_and_index);
    tcase_add_test(tc, a_twin_that_is_being_loaded_leaves_a_block_without_a_name);
    tcase_add_test(tc, without_prefix_cache_an_unpinned_block_is_gone_everywhere);
    tcase_add_test(tc, what_is_not_readable_is_poisoned);
    tcase_add_test_raise_signal(tc, holding_what_is_elsewhere, SIGABRT);
    tcase_add_test_raise_signal(tc, storing_what_may_be_written, SIGABRT);
    tcase_add_test_raise_signal(tc, ending_what_has_not_begun, SIGABRT);
    tcase_add_test_raise_signal(tc, destroying_during_a_transfer, SIGABRT);
    return tc;
}
