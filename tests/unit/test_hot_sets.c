/* The promises of engine/kv/hot_sets.h, on the CPU back end, where memory can be looked at, and on
 * a device where queued work is not done at once. */

#include "engine/kv/hot_sets.h"

#include "tests/support/backend_fixture.h"
#include "tests/support/lazy_device.h"

#include <check.h>
#include <signal.h>
#include <string.h>

enum { SETS = 3, LAYERS = 4, ROWS = 37, MAX_BLOCKS = 5, POSITIONS = MAX_BLOCKS * BLOCK_TOKENS };

static const struct kv_shape shapes[] = {
    { .kv_heads = 2, .head_dim = 16, .filter = FILTER_COARSE },
    { .kv_heads = 1, .head_dim = 48, .latent_dim = 32, .filter = FILTER_COARSE },
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

static struct kv_shape shape;
static struct backend *be;
static struct stream *stream;
static struct hot_sets *sets;
static _Alignas(16) char tier[16];       /* of which only the address counts */

static struct hot_sets_config config(void)
{
    return (struct hot_sets_config){ .sets = SETS, .layers = LAYERS, .rows_per_head = ROWS,
                                     .max_blocks = MAX_BLOCKS, .shape = shape, .host = tier,
                                     .host_stride = 1 << 20 };
}

static void open_on(struct backend *device)
{
    struct hot_sets_config cfg = config();

    be = device;
    stream = stream_create(be);
    ck_assert_int_eq(hot_sets_create(&sets, be, &cfg, NULL), ST_OK);
}

static void setup(void)
{
    shape = shapes[0];
    open_on(test_backend("scalar"));
}

static void teardown(void)
{
    hot_sets_destroy(sets);
    stream_destroy(stream);
}

static void finish(void)
{
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
}

static void reopen_with(const struct kv_shape *other)
{
    teardown();
    shape = *other;
    open_on(test_backend("scalar"));
}

/* ---- a layer's memory */

struct part {
    char *at;
    size_t bytes;
};
enum { PARTS = 7 };

static void parts_of(int layer, struct part *out)
{
    struct hot_rows r = hot_sets_layer(sets, layer);
    size_t heads = SETS * (size_t)shape.kv_heads;

    out[0] = (struct part){ (char *)r.rows, heads * ROWS * kv_row_dim(&shape) * sizeof(bf16) };
    out[1] = (struct part){ (char *)r.row_of, heads * POSITIONS * sizeof *r.row_of };
    out[2] = (struct part){ (char *)r.position, heads * ROWS * sizeof *r.position };
    out[3] = (struct part){ (char *)r.used, heads * ROWS * sizeof *r.used };
    out[4] = (struct part){ (char *)r.counts, HOT_COUNTS * sizeof *r.counts };
    out[5] = (struct part){ (char *)r.stall, sizeof *r.stall };
    out[6] = (struct part){ (char *)r.hand, heads * sizeof *r.hand };
}

static bool all_are(const struct part *p, uint8_t value)
{
    return (uint8_t)p->at[0] == value && memcmp(p->at, p->at + 1, p->bytes - 1) == 0;
}

/* Of position of a layer, what belongs to a set. */
static struct part positions_of(int layer, int set)
{
    size_t n = (size_t)shape.kv_heads * ROWS;
    int32_t *position = hot_sets_layer(sets, layer).position + (size_t)set * n;

    return (struct part){ (char *)position, n * sizeof *position };
}

static void fill_positions(uint8_t value)
{
    for (int layer = 0; layer < LAYERS; layer++)
        for (int set = 0; set < SETS; set++) {
            struct part p = positions_of(layer, set);
            memset(p.at, value, p.bytes);
        }
}

static bool positions_are(int set, uint8_t value)
{
    for (int layer = 0; layer < LAYERS; layer++) {
        struct part p = positions_of(layer, set);
        if (!all_are(&p, value))
            return false;
    }
    return true;
}

START_TEST(parts_share_no_memory)
{
    size_t total = 0;
    struct part p[PARTS];

    reopen_with(&shapes[_i]);
    struct hot_sets_config cfg = config();
    for (int layer = 0; layer < LAYERS; layer++) {
        parts_of(layer, p);
        for (int i = 0; i < PARTS; i++) {
            memset(p[i].at, layer * PARTS + i + 1, p[i].bytes);
            total += p[i].bytes;
        }
        ck_assert_uint_eq((uintptr_t)p[0].at % 16, 0);
    }
    for (int layer = 0; layer < LAYERS; layer++) {
        parts_of(layer, p);
        for (int i = 0; i < PARTS; i++)
            ck_assert(all_are(&p[i], (uint8_t)(layer * PARTS + i + 1)));
    }
    ck_assert_uint_ge(hot_sets_bytes(&cfg), total);
    ck_assert_uint_lt(hot_sets_bytes(&cfg), total + (LAYERS * PARTS + 1) * 256);
    ck_assert_uint_ge(total, (size_t)(LAYERS * SETS) *
                                 (hot_rows_bytes(&shape, ROWS) +
                                  hot_books_bytes(&shape, ROWS, MAX_BLOCKS)));
}
END_TEST

START_TEST(a_layer_has_its_part_of_a_host_slot)
{
    for (int layer = 0; layer < LAYERS; layer++) {
        struct hot_rows r = hot_sets_layer(sets, layer);
        ck_assert_uint_eq((uintptr_t)r.host,
                          (uintptr_t)tier + (size_t)layer * kv_block_bytes(&shape));
        ck_assert_uint_eq(r.host_stride, 1 << 20);
        ck_assert_int_eq(r.rows_per_head, ROWS);
        ck_assert(!r.host_table && !r.set && !r.step);
    }
}
END_TEST

/* ---- sets */

START_TEST(sets_come_and_go)
{
    bool seen[SETS] = { false };

    for (int i = 0; i < SETS; i++) {
        ck_assert_int_eq(hot_sets_free(sets), SETS - i);
        int set = hot_sets_acquire(sets, stream);
        ck_assert(set >= 0 && set < SETS && !seen[set]);
        seen[set] = true;
    }
    ck_assert_int_eq(hot_sets_acquire(sets, stream), -1);
    ck_assert_int_eq(hot_sets_free(sets), 0);
    hot_sets_release(sets, 1);
    ck_assert_int_eq(hot_sets_free(sets), 1);
    ck_assert_int_eq(hot_sets_acquire(sets, stream), 1);
    for (int i = 0; i < SETS; i++)
        hot_sets_release(sets, i);
    ck_assert_int_eq(hot_sets_free(sets), SETS);
}
END_TEST

START_TEST(an_acquired_set_is_empty_in_every_layer)
{
    fill_positions(3);
    int a = hot_sets_acquire(sets, stream);
    finish();
    for (int set = 0; set < SETS; set++)
        ck_assert(positions_are(set, set == a ? 0xff : 3));
    fill_positions(4);
    hot_sets_release(sets, a);
    a = hot_sets_acquire(sets, stream);
    finish();
    ck_assert(positions_are(a, 0xff));
    hot_sets_release(sets, a);
}
END_TEST

/* ---- counters */

static void add_counts(uint64_t n)
{
    for (int layer = 0; layer < LAYERS; layer++) {
        uint64_t *counts = hot_sets_layer(sets, layer).counts;
        counts[HOT_HITS] += n + (uint64_t)layer;
        counts[HOT_MISSES] += 2 * n;
        counts[HOT_RESIDENT] += 3 * n;
    }
}

static bool counts_are(uint64_t times, uint64_t n)
{
    for (int layer = 0; layer < LAYERS; layer++) {
        struct hot_counts c = hot_sets_counts(sets, layer);
        if (c.hits != n + times * (uint64_t)layer || c.misses != 2 * n || c.resident != 3 * n)
            return false;
    }
    return true;
}

START_TEST(counts_are_those_of_the_last_fetch)
{
    ck_assert(counts_are(0, 0));
    add_counts(10);
    ck_assert(counts_are(0, 0));
    hot_sets_fetch_counts(sets, stream);
    finish();
    hot_sets_take_counts(sets);
    ck_assert(counts_are(1, 10));
    add_counts(1ull << 40);
    ck_assert(counts_are(1, 10));
    hot_sets_fetch_counts(sets, stream);
    finish();
    hot_sets_take_counts(sets);
    ck_assert(counts_are(2, (1ull << 40) + 10));
}
END_TEST

/* What a step leaves is there until another fetches, and is added once. */
START_TEST(stalls_are_added_step_by_step)
{
    static const struct { uint64_t step, ns, sum; } stalls[] = {
        { 7, 100, 100 }, { 7, 100, 100 }, { 8, 100, 200 }, { 11, UINT32_MAX, 200ull + UINT32_MAX },
    };

    for (size_t i = 0; i < sizeof stalls / sizeof stalls[0]; i++) {
        *hot_sets_layer(sets, 1).stall = stalls[i].step << 32 | stalls[i].ns;
        hot_sets_fetch_counts(sets, stream);
        finish();
        hot_sets_take_counts(sets);
        ck_assert_uint_eq(hot_sets_counts(sets, 0).stalled_ns, 0);
        ck_assert_uint_eq(hot_sets_counts(sets, 1).stalled_ns, stalls[i].sum);
    }
}
END_TEST

/* ---- a device that takes its time */

START_TEST(emptying_and_fetching_are_queued)
{
    struct backend *lazy = lazy_device_open(1);

    teardown();
    open_on(lazy);
    fill_positions(3);
    add_counts(7);
    int a = hot_sets_acquire(sets, stream);
    hot_sets_fetch_counts(sets, stream);
    ck_assert(positions_are(a, 3) && counts_are(0, 0));
    finish();
    ck_assert(counts_are(0, 0));
    hot_sets_take_counts(sets);
    ck_assert(positions_are(a, 0xff) && counts_are(1, 7));
    hot_sets_release(sets, a);
    teardown();
    backend_close(lazy);
    setup();
}
END_TEST

/* ---- misuse */

START_TEST(releasing_twice)
{
    int a = hot_sets_acquire(sets, stream);

    hot_sets_release(sets, a);
    hot_sets_release(sets, a);
}
END_TEST

START_TEST(releasing_what_was_never_acquired)
{
    hot_sets_release(sets, 0);
}
END_TEST

START_TEST(destroying_what_is_acquired)
{
    hot_sets_acquire(sets, stream);
    hot_sets_destroy(sets);
}
END_TEST

TCase *hot_sets_case(void)
{
    TCase *c = tcase_create("hot_sets");

    tcase_add_checked_fixture(c, setup, teardown);
    tcase_add_loop_test(c, parts_share_no_memory, 0, N_SHAPES);
    tcase_add_test(c, a_layer_has_its_part_of_a_host_slot);
    tcase_add_test(c, sets_come_and_go);
    tcase_add_test(c, an_acquired_set_is_empty_in_every_layer);
    tcase_add_test(c, counts_are_those_of_the_last_fetch);
    tcase_add_test(c, stalls_are_added_step_by_step);
    tcase_add_test(c, emptying_and_fetching_are_queued);
    tcase_add_test_raise_signal(c, releasing_twice, SIGABRT);
    tcase_add_test_raise_signal(c, releasing_what_was_never_acquired, SIGABRT);
    tcase_add_test_raise_signal(c, destroying_what_is_acquired, SIGABRT);
    return c;
}
