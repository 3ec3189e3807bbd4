/* The promises of engine/kv/lagged_lists.h. */

#include "engine/kv/lagged_lists.h"

#include "engine/base/mem.h"
#include "kernels/backend.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/lazy_device.h"

#include <check.h>
#include <signal.h>
#include <string.h>

enum { SLOTS = 3, LAYERS = 4, DENSE = 2, HEADS = 2, BLOCKS = 64, MORE_BLOCKS = 100, PARTS = 3 };

static struct select_plan plan;
static char *memory;
static size_t bytes;
static struct stream *stream;
static struct lagged_lists *lists;

static void setup(void)
{
    const struct kv_shape shape = { HEADS, 128, 0, FILTER_COARSE, INDEX_ROTATED };
    struct select_config c = select_default();

    c.selection = SELECTION_LAGGED;
    c.layers = "1:blocks=100;2:dense";
    ck_assert_int_eq(select_plan_init(&plan, &c, &shape, LAYERS, NULL, NULL), ST_OK);
    bytes = lagged_lists_bytes(&plan, SLOTS, HEADS);
    memory = mem_calloc(1, bytes);
    stream = stream_create(test_backend("scalar"));
    lists = lagged_lists_create(memory, &plan, SLOTS, HEADS);
}

static void teardown(void)
{
    lagged_lists_destroy(lists);
    stream_destroy(stream);
    mem_free(memory);
}

/* ---- memory */

struct part {
    int32_t *at;
    size_t n;
};

static void parts_of(int layer, struct part *out)
{
    struct lagged_blocks l = lagged_lists_layer(lists, layer);
    size_t n = SLOTS * HEADS;

    out[0] = (struct part){ l.kept, n * (layer == 1 ? MORE_BLOCKS : BLOCKS) };
    out[1] = (struct part){ l.n_kept, n };
    out[2] = (struct part){ l.n_tokens, n };
    ck_assert_ptr_null(l.slot);
}

static bool all_are(const struct part *p, int32_t value)
{
    for (size_t i = 0; i < p->n; i++)
        if (p->at[i] != value)
            return false;
    return true;
}

/* A layer that is dense takes none. */
START_TEST(parts_share_no_memory)
{
    struct part p[PARTS];
    size_t total = 0;

    for (int layer = 0; layer < LAYERS; layer++) {
        if (layer == DENSE)
            continue;
        parts_of(layer, p);
        for (int i = 0; i < PARTS; i++) {
            ck_assert((char *)p[i].at >= memory &&
                      (char *)(p[i].at + p[i].n) <= memory + bytes);
            for (size_t k = 0; k < p[i].n; k++)
                p[i].at[k] = layer * PARTS + i;
            total += p[i].n * sizeof(int32_t);
        }
    }
    for (int layer = 0; layer < LAYERS; layer++) {
        if (layer == DENSE)
            continue;
        parts_of(layer, p);
        for (int i = 0; i < PARTS; i++)
            ck_assert(all_are(&p[i], layer * PARTS + i));
    }
    ck_assert_uint_ge(bytes, total);
    ck_assert_uint_lt(bytes, total + (LAYERS - 1) * PARTS * 256);
}
END_TEST

/* ---- slots */

START_TEST(slots_come_and_go)
{
    bool seen[SLOTS] = { false };

    for (int i = 0; i < SLOTS; i++) {
        ck_assert_int_eq(lagged_lists_free(lists), SLOTS - i);
        int slot = lagged_lists_acquire(lists, stream);
        ck_assert(slot >= 0 && slot < SLOTS && !seen[slot]);
        seen[slot] = true;
    }
    lagged_lists_release(lists, 1);
    ck_assert_int_eq(lagged_lists_free(lists), 1);
    ck_assert_int_eq(lagged_lists_acquire(lists, stream), 1);
    for (int i = 0; i < SLOTS; i++)
        lagged_lists_release(lists, i);
    ck_assert_int_eq(lagged_lists_free(lists), SLOTS);
}
END_TEST

static void fill_n_tokens(int32_t value)
{
    for (int layer = 0; layer < LAYERS; layer++)
        for (int i = 0; layer != DENSE && i < SLOTS * HEADS; i++)
            lagged_lists_layer(lists, layer).n_tokens[i] = value;
}

static bool n_tokens_are(int slot, int32_t value)
{
    for (int layer = 0; layer < LAYERS; layer++)
        for (int i = slot * HEADS; layer != DENSE && i < (slot + 1) * HEADS; i++)
            if (lagged_lists_layer(lists, layer).n_tokens[i] != value)
                return false;
    return true;
}

START_TEST(an_acquired_slot_is_empty_in_every_layer)
{
    fill_n_tokens(300);
    int first = lagged_lists_acquire(lists, stream), second = lagged_lists_acquire(lists, stream);
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    for (int slot = 0; slot < SLOTS; slot++)
        ck_assert(n_tokens_are(slot, slot == first || slot == second ? -1 : 300));
    lagged_lists_release(lists, second);
    fill_n_tokens(301);
    ck_assert_int_eq(lagged_lists_acquire(lists, stream), second);
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    ck_assert(n_tokens_are(second, -1) && n_tokens_are(first, 301));
    lagged_lists_release(lists, first);
    lagged_lists_release(lists, second);
}
END_TEST

/* A step that is still under way may be reading what the slot's last owner had. */
START_TEST(emptying_is_queued)
{
    struct backend *lazy = lazy_device_open(1);
    struct stream *other = stream_create(lazy);

    fill_n_tokens(300);
    int slot = lagged_lists_acquire(lists, other);
    ck_assert(n_tokens_are(slot, 300));
    ck_assert_int_eq(stream_sync(other, NULL), ST_OK);
    ck_assert(n_tokens_are(slot, -1));
    lagged_lists_release(lists, slot);
    stream_destroy(other);
    backend_close(lazy);
}
END_TEST

/* ---- misuse */

START_TEST(acquiring_more_than_there_are)
{
    for (int i = 0; i <= SLOTS; i++)
        lagged_lists_acquire(lists, stream);
}
END_TEST

START_TEST(releasing_twice)
{
    int slot = lagged_lists_acquire(lists, stream);

    lagged_lists_release(lists, slot);
    lagged_lists_release(lists, slot);
}
END_TEST

START_TEST(destroying_what_is_acquired)
{
    lagged_lists_acquire(lists, stream);
    lagged_lists_destroy(lists);
}
END_TEST

TCase *lagged_lists_case(void)
{
    TCase *c = tcase_create("lagged_lists");

    tcase_add_checked_fixture(c, setup, teardown);
    tcase_add_test(c, parts_share_no_memory);
    tcase_add_test(c, slots_come_and_go);
    tcase_add_test(c, an_acquired_slot_is_empty_in_every_layer);
    tcase_add_test(c, emptying_is_queued);
    tcase_add_test_raise_signal(c, acquiring_more_than_there_are, SIGABRT);
    tcase_add_test_raise_signal(c, releasing_twice, SIGABRT);
    tcase_add_test_raise_signal(c, destroying_what_is_acquired, SIGABRT);
    return c;
}
