#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <string.h>

enum { VOCAB = 50, DIM = 33, ROWS = 40 };

static float widened(bf16 v)
{
    uint32_t u = (uint32_t)v << 16;
    float f;

    memcpy(&f, &u, sizeof f);
    return f;
}

/* Exact, for both types, first and last id among them, and nothing past the end. */
START_TEST(copies_the_rows_of_ids)
{
    static float table[VOCAB * DIM], out[ROWS * DIM + 1];
    static bf16 halves[VOCAB * DIM];
    struct test_random r = test_random(9);
    struct backend *be = test_backend("auto");
    struct stream *s = stream_create(be);
    int32_t ids[ROWS];

    random_floats(&r, table, VOCAB * DIM, 1);
    random_bf16s(&r, halves, VOCAB * DIM, 1);
    for (int t = 0; t < ROWS; t++)
        ids[t] = t == 0 ? VOCAB - 1 : t == 1 ? 0 : random_below(&r, VOCAB);
    for (int half = 0; half < 2; half++) {
        struct embed_args a = { .out = out, .table = half ? (void *)halves : (void *)table,
                                .ids = ids, .table_type = half ? DTYPE_BF16 : DTYPE_F32,
                                .rows = ROWS, .dim = DIM };
        out[ROWS * DIM] = 5;
        backend_ops(be)->embed(s, &a);
        for (int t = 0; t < ROWS; t++)
            for (int i = 0; i < DIM; i++) {
                int at = ids[t] * DIM + i;
                ck_assert(out[t * DIM + i] == (half ? widened(halves[at]) : table[at]));
            }
        ck_assert_float_eq(out[ROWS * DIM], 5);
    }
    stream_destroy(s);
}
END_TEST

TCase *embed_case(void)
{
    TCase *c = tcase_create("embed");

    tcase_add_test(c, copies_the_rows_of_ids);
    return c;
}
