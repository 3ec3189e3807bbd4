#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/closeness.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <math.h>
#include <string.h>

/* Both orientations over shapes that fit no vector, with gaps between heads and between rows
 * of everything: what is between is NaN where it is read, and must stay where it is written. */
enum { MAX_ROWS = 60, GAP = 3, UNWRITTEN = -77 };

static const struct { int heads, in_dim, out_dim; } shapes[] = {
    { 20, 96, 192 }, { 5, 192, 256 }, { 1, 64, 64 }, { 3, 17, 33 }, { 2, 1, 130 },
    { 7, 100, 1 }, { 4, 24, 16 }, { 1, 577, 100 },
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

struct problem {
    int heads, in_dim, out_dim;
    bool turned, half;
    float *x, *out;              /* [MAX_ROWS, stride] */
    char *weight;                /* begins one element after an aligned address */
};

static int x_head_stride(const struct problem *p)
{
    return p->in_dim + GAP;
}

static int x_stride(const struct problem *p)
{
    return p->heads * x_head_stride(p) + GAP;
}

static int out_head_stride(const struct problem *p)
{
    return p->out_dim + GAP;
}

static int out_stride(const struct problem *p)
{
    return p->heads * out_head_stride(p) + GAP;
}

static size_t weight_stride(const struct problem *p)
{
    return (size_t)p->in_dim * (size_t)p->out_dim + GAP;
}

static size_t out_floats(const struct problem *p)
{
    return (size_t)MAX_ROWS * (size_t)out_stride(p);
}

static enum dtype type_of(const struct problem *p)
{
    return p->half ? DTYPE_BF16 : DTYPE_F32;
}

/* kind: a shape, then bits: turned, bf16. */
static struct problem *make_problem(int kind, uint64_t seed)
{
    struct problem *p = mem_calloc(1, sizeof *p);
    struct test_random r = test_random(seed);

    p->heads = shapes[kind % N_SHAPES].heads;
    p->in_dim = shapes[kind % N_SHAPES].in_dim;
    p->out_dim = shapes[kind % N_SHAPES].out_dim;
    p->turned = kind / N_SHAPES & 1;
    p->half = kind / N_SHAPES & 2;
    size_t n = (size_t)p->heads * weight_stride(p), bytes = dtype_bytes(type_of(p));
    p->weight = (char *)mem_alloc((n + 1) * bytes) + bytes;
    if (p->half)
        random_bf16s(&r, (bf16 *)(void *)p->weight, n, 0.3f);
    else
        random_floats(&r, (float *)(void *)p->weight, n, 0.3f);
    p->x = mem_alloc((size_t)(MAX_ROWS * x_stride(p)) * sizeof *p->x);
    random_floats(&r, p->x, (size_t)(MAX_ROWS * x_stride(p)), 1);
    for (int i = 0; i < MAX_ROWS * x_stride(p); i++)
        if (i % x_stride(p) >= p->heads * x_head_stride(p) ||
            i % x_stride(p) % x_head_stride(p) >= p->in_dim)
            p->x[i] = NAN;
    p->out = mem_alloc(out_floats(p) * sizeof *p->out);
    return p;
}

static void free_problem(struct problem *p)
{
    mem_free(p->weight - dtype_bytes(type_of(p)));
    mem_free(p->x);
    mem_free(p->out);
    mem_free(p);
}

/* Rows from..from + rows - 1. */
static void run(struct backend *be, struct problem *p, int from, int rows)
{
    struct stream *s = stream_create(be);

    backend_ops(be)->linear_heads(s, &(struct linear_heads_args){
        .out = p->out + from * out_stride(p), .x = p->x + from * x_stride(p),
        .weight = p->weight, .weight_type = type_of(p), .turned = p->turned, .rows = rows,
        .heads = p->heads, .in_dim = p->in_dim, .out_dim = p->out_dim,
        .out_stride = out_stride(p), .out_head_stride = out_head_stride(p),
        .x_stride = x_stride(p), .x_head_stride = x_head_stride(p),
        .weight_stride = weight_stride(p) });
    ck_assert_int_eq(stream_sync(s, NULL), ST_OK);
    stream_destroy(s);
}

static void clear(struct problem *p)
{
    for (size_t i = 0; i < out_floats(p); i++)
        p->out[i] = UNWRITTEN;
}

static double weight_value(const struct problem *p, int head, int out, int in)
{
    size_t at = p->turned ? (size_t)in * (size_t)p->out_dim + (size_t)out
                          : (size_t)out * (size_t)p->in_dim + (size_t)in;
    float f;
    bf16 h;

    at += (size_t)head * weight_stride(p);
    if (p->half) {
        memcpy(&h, p->weight + at * sizeof h, sizeof h);
        return (double)bf16_value(h);
    }
    memcpy(&f, p->weight + at * sizeof f, sizeof f);
    return (double)f;
}

/* Of one row; its tolerance is that of a sum of in_dim products, of which the largest output
 * may be much smaller where there are few. */
static void check_row(const struct problem *p, int row)
{
    for (int head = 0; head < p->heads; head++)
        for (int o = 0; o < p->out_dim; o++) {
            const float *x = p->x + row * x_stride(p) + head * x_head_stride(p);
            double got = (double)p->out[row * out_stride(p) + head * out_head_stride(p) + o];
            double want = 0, size = 0;
            for (int k = 0; k < p->in_dim; k++) {
                double term = (double)x[k] * weight_value(p, head, o, k);
                want += term;
                size += term * term;
            }
            if (!(fabs(got - want) <= 1e-5 * sqrt(p->in_dim) * sqrt(size)))
                ck_abort_msg("row %d, head %d, output %d: %g, not %g", row, head, o, got, want);
        }
}

static void check_gaps(const struct problem *p, int rows)
{
    for (size_t i = 0; i < out_floats(p); i++) {
        int row = (int)i / out_stride(p), at = (int)i % out_stride(p);
        bool owned = row < rows && at < p->heads * out_head_stride(p) &&
                     at % out_head_stride(p) < p->out_dim;
        if (owned != (p->out[i] != UNWRITTEN))
            ck_abort_msg("element %d of row %d is %g", at, row, (double)p->out[i]);
    }
}

START_TEST(products_are_right)
{
    for (int i = 0; i < TEST_ALL_ISAS; i++) {
        struct backend *be = test_backend(test_all_isas[i]);
        struct problem *p = make_problem(_i, 1 + (uint64_t)_i);
        int rows = i == 0 ? 3 : 53;
        if (be) {
            clear(p);
            run(be, p, 0, rows);
            for (int row = 0; row < rows; row += 13)
                check_row(p, row);
            check_row(p, rows - 1);
            check_gaps(p, rows);
        }
        free_problem(p);
    }
}
END_TEST

/* Alone, in company, and whoever computes: the same bits. */
START_TEST(company_and_threads_change_nothing)
{
    static const int pieces[] = { 1, 2, 5, 7, 48, 49, MAX_ROWS };
    static const int threads[] = { 1, 3, 8, 64 };

    for (int i = 0; i < TEST_ALL_ISAS; i++) {
        struct backend *be = test_backend(test_all_isas[i]);
        if (!be)
            continue;
        struct problem *p = make_problem(_i, 100);
        float *want = mem_alloc(out_floats(p) * sizeof *want);
        clear(p);
        run(be, p, 0, MAX_ROWS);
        memcpy(want, p->out, out_floats(p) * sizeof *want);
        for (int j = 0; j < 4; j++) {
            struct backend *other = open_with_threads(test_all_isas[i], threads[j]);
            for (int k = j; k < 7; k += 4) {
                clear(p);
                for (int from = 0; from < MAX_ROWS; from += pieces[k])
                    run(other, p, from,
                        pieces[k] < MAX_ROWS - from ? pieces[k] : MAX_ROWS - from);
                ck_assert(floats_identical("pieces", p->out, want, out_floats(p)));
            }
            backend_close(other);
        }
        mem_free(want);
        free_problem(p);
    }
}
END_TEST

TCase *linear_heads_case(void)
{
    TCase *c = tcase_create("linear_heads");

    tcase_set_timeout(c, 60);
    tcase_add_loop_test(c, products_are_right, 0, 4 * N_SHAPES);
    tcase_add_loop_test(c, company_and_threads_change_nothing, 0, 4 * N_SHAPES);
    return c;
}
