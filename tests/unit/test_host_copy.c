/* engine/kv/host_copy.h: the right bytes in the right order, and no copy from one registered piece
 * of host memory into the next. */

#include "engine/base/mem.h"
#include "engine/kv/host_copy.h"
#include "engine/kv/host_memory.h"
#include "tests/support/lazy_device.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <string.h>

#define PIECE ((size_t)HOST_MEMORY_PIECE_MB << 20)

/* Slots whose parts do not divide a piece: one of them lies across its end. */
enum { SLOT_BYTES = 96 << 10, OFFSET = 50 << 10, BYTES = 24 << 10, AROUND = 12, MOST = 64 };

static unsigned char content(int32_t slot, size_t i)
{
    return (unsigned char)((size_t)slot * 31 + i * 7 + i / 256);
}

static void check_copies(struct backend *be, const unsigned char *tier, const int32_t *slots,
                         int n)
{
    struct stream *s = stream_create(be);
    struct buffer to = { 0 };
    unsigned char *got = mem_alloc((size_t)MOST * BYTES);

    ck_assert_int_eq(buffer_alloc(be, &to, MEM_DEVICE, (size_t)MOST * BYTES), ST_OK);
    host_copy_parts(s, to.base, tier, SLOT_BYTES, OFFSET, BYTES, slots, n);
    stream_copy(s, got, to.base, (size_t)n * BYTES);
    ck_assert_int_eq(stream_sync(s, NULL), ST_OK);
    for (int i = 0; i < n; i++)
        for (size_t k = 0; k < BYTES; k++)
            ck_assert_msg(got[(size_t)i * BYTES + k] == content(slots[i], k),
                          "part %d of %d, of slot %d, differs at byte %zu", i, n, slots[i], k);
    mem_free(got);
    buffer_free(be, &to);
    stream_destroy(s);
}

START_TEST(parts_around_the_end_of_a_piece)
{
    struct backend *be = lazy_device_open((uint64_t)_i);
    struct test_random r = test_random((uint64_t)_i);
    unsigned char *tier = mem_map(PIECE + 4 * AROUND * SLOT_BYTES, 4096);
    int32_t middle = (int32_t)(PIECE / SLOT_BYTES), slots[MOST];
    int n = 0, across = 0;

    lazy_device_fence(be, tier + PIECE);
    for (int32_t slot = middle - AROUND; slot < middle + AROUND; slot++) {
        size_t from = (size_t)slot * SLOT_BYTES + OFFSET;
        across += from < PIECE && from + BYTES > PIECE;
        for (size_t k = 0; k < BYTES; k++)
            tier[from + k] = content(slot, k);
    }
    ck_assert_int_eq(across, 1);
    for (int32_t slot = middle - AROUND; slot < middle + AROUND; slot++)
        if (_i == 0 || random_below(&r, 4))          /* all, or with gaps */
            slots[n++] = slot;
    check_copies(be, tier, slots, n);
    for (int i = 0; i < n; i++)                      /* in any order, some twice */
        slots[i] = middle - AROUND + random_below(&r, 2 * AROUND);
    check_copies(be, tier, slots, n);
    mem_unmap(tier, PIECE + 4 * AROUND * SLOT_BYTES);
    backend_close(be);
}
END_TEST

TCase *host_copy_case(void)
{
    TCase *tc = tcase_create("host_copy");

    tcase_add_loop_test(tc, parts_around_the_end_of_a_piece, 0, 8);
    return tc;
}
