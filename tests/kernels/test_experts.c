/* route and experts of the CPU back end against plain sums in double precision, and to the bit
 * against themselves: rows alone, other instruction sets within tolerance. */

#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/closeness.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- route */

/* Scores come out exactly as given: each row of the router is a unit vector. */
static void route_scores(const struct backend *be, const float *scores, int rows,
                         struct route_args *a)
{
    struct stream *s = stream_create((struct backend *)be);
    int n = a->n_experts;
    float *unit = mem_calloc((size_t)n * (size_t)n, sizeof *unit);

    for (int e = 0; e < n; e++)
        unit[e * n + e] = 1;
    a->x = scores;
    a->router = unit;
    a->router_type = DTYPE_F32;
    a->rows = rows;
    a->dim = n;
    backend_ops(be)->route(s, a);
    ck_assert_int_eq(stream_sync(s, NULL), ST_OK);
    ck_assert(floats_identical("scores", a->scores, scores, (size_t)(rows * n)));
    stream_destroy(s);
    mem_free(unit);
}

START_TEST(golden_softmax)
{
    const float logits[6] = { 0, 1, 2, -1, 0.5f, 3 };
    int32_t experts[2];
    float weights[2], scores[6];
    struct route_args a = { .experts = experts, .weights = weights, .scores = scores,
                            .score = ROUTER_SOFTMAX, .renormalise = true, .scale = 1,
                            .n_experts = 6, .n_chosen = 2 };

    route_scores(test_backend("auto"), logits, 1, &a);
    ck_assert(experts[0] == 5 && experts[1] == 2);
    ck_assert_float_eq_tol(weights[0], 0.7310585786f, 1e-6f);
    ck_assert_float_eq_tol(weights[1], 0.2689414214f, 1e-6f);
    /* Without renormalising the weights are parts of all six. */
    a.renormalise = false;
    route_scores(test_backend("auto"), logits, 1, &a);
    double all = exp(0) + exp(1) + exp(2) + exp(-1) + exp(0.5) + exp(3);
    ck_assert_float_eq_tol(weights[0], (float)(exp(3) / all), 1e-6f);
    ck_assert_float_eq_tol(weights[1], (float)(exp(2) / all), 1e-6f);
}
END_TEST

START_TEST(golden_sigmoid)
{
    const float logits[6] = { 0, 1, 2, -1, 0.5f, 3 }, bias[6] = { 0.5f, 0, 0, 1, 0, -0.9f };
    int32_t experts[2];
    float weights[2], scores[6];
    struct route_args a = { .experts = experts, .weights = weights, .scores = scores,
                            .bias = bias, .score = ROUTER_SIGMOID, .renormalise = true,
                            .scale = 1.8f, .n_experts = 6, .n_chosen = 2 };

    route_scores(test_backend("auto"), logits, 1, &a);
    ck_assert(experts[0] == 3 && experts[1] == 0);
    ck_assert_float_eq_tol(weights[0], 0.629559736f, 1e-6f);
    ck_assert_float_eq_tol(weights[1], 1.170440264f, 1e-6f);
}
END_TEST

START_TEST(ties_take_the_lower_number)
{
    enum { N = 128, K = 8 };
    float logits[N] = { 0 }, scores[N], weights[K], bias[N] = { 0 };
    int32_t experts[K];
    struct route_args a = { .experts = experts, .weights = weights, .scores = scores,
                            .renormalise = true, .scale = 1, .n_experts = N, .n_chosen = K };

    for (int sigmoid = 0; sigmoid < 2; sigmoid++) {
        a.score = sigmoid ? ROUTER_SIGMOID : ROUTER_SOFTMAX;
        a.bias = sigmoid ? bias : NULL;
        memset(logits, 0, sizeof logits);
        route_scores(test_backend("auto"), logits, 1, &a);
        for (int i = 0; i < K; i++) {
            ck_assert_int_eq(experts[i], i);
            ck_assert_float_eq_tol(weights[i], 1.0f / K, 1e-6f);
        }
        logits[100] = logits[40] = 1;
        logits[0] = -1;
        route_scores(test_backend("auto"), logits, 1, &a);
        ck_assert(experts[0] == 40 && experts[1] == 100 && experts[2] == 1 && experts[7] == 6);
    }
}
END_TEST

/* Whatever the scores are, what is chosen can be used as a number of an expert. */
START_TEST(odd_scores_choose_experts)
{
    enum { N = 5, K = 3 };
    /* A router of one input: its weights are the scores. */
    static const float logits[4][N] = {
        { NAN, 1, NAN, 2, 0 }, { NAN, NAN, NAN, NAN, NAN },
        { INFINITY, 1, -INFINITY, 2, 0 }, { -INFINITY, -INFINITY, -INFINITY, -INFINITY, -1 },
    };
    static const int want[4][K] = { { 3, 1, 4 }, { 0, 1, 2 }, { 0, 3, 1 }, { 4, 0, 1 } };
    const float one = 1;
    int32_t experts[K];
    float weights[K], scores[N];

    for (int row = 0; row < 4; row++) {
        struct stream *s = stream_create(test_backend("auto"));
        backend_ops(test_backend("auto"))->route(s, &(struct route_args){
            .experts = experts, .weights = weights, .scores = scores, .x = &one,
            .router = logits[row], .router_type = DTYPE_F32, .score = ROUTER_SOFTMAX, .scale = 1,
            .rows = 1, .dim = 1, .n_experts = N, .n_chosen = K });
        stream_destroy(s);
        for (int i = 0; i < K; i++)
            ck_assert_int_eq(experts[i], want[row][i]);
    }
}
END_TEST

START_TEST(padded_rows_get_no_experts)
{
    const float logits[3][4] = { { 1, 2, 3, 4 }, { 4, 3, 2, 1 }, { 1, 4, 2, 3 } };
    const int32_t blocks[3] = { 7, -1, 0 };
    int32_t experts[6];
    float weights[6], scores[12];
    struct route_args a = { .experts = experts, .weights = weights, .scores = scores,
                            .kv_block = blocks, .score = ROUTER_SOFTMAX, .scale = 1,
                            .n_experts = 4, .n_chosen = 2 };

    route_scores(test_backend("auto"), logits[0], 3, &a);
    ck_assert(experts[0] == 3 && experts[1] == 2 && experts[4] == 1 && experts[5] == 3);
    ck_assert(experts[2] == -1 && experts[3] == -1 && weights[2] == 0 && weights[3] == 0);
}
END_TEST

/* ---- experts */

static const struct shape {
    int n_experts, n_chosen, rows, dim, expert_dim;
    enum dtype type;
    bool add, pads;
} shapes[] = {
    { 1, 1, 1, 1, 1, DTYPE_F32, false, false },     { 1, 1, 7, 17, 5, DTYPE_BF16, true, false },
    { 2, 2, 3, 16, 16, DTYPE_BF16, false, false },  { 8, 2, 1, 96, 80, DTYPE_BF16, false, false },
    { 8, 2, 70, 96, 80, DTYPE_BF16, true, true },   { 8, 3, 50, 33, 19, DTYPE_F32, false, true },
    { 16, 8, 6, 64, 48, DTYPE_BF16, false, false }, { 128, 8, 1, 64, 24, DTYPE_BF16, true, false },
    { 128, 8, 70, 64, 24, DTYPE_BF16, false, true }, { 3, 1, 64, 65, 130, DTYPE_BF16, true, false },
    { 5, 4, 70, 40, 33, DTYPE_F32, true, false },   { 4, 2, 5, 577, 100, DTYPE_BF16, false, true },
    { 2, 1, 600, 16, 24, DTYPE_BF16, true, true },
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

struct problem {
    struct shape s;
    float *x, *add, *weights, *out;
    int32_t *experts;
    void *matrices;              /* [E][gate | up | down] */
    const void **tables;         /* [3, E] */
};

static double element(const void *m, enum dtype type, size_t i)
{
    return type == DTYPE_F32 ? (double)((const float *)m)[i]
                             : (double)bf16_value(((const bf16 *)m)[i]);
}

static void make_problem(struct problem *p, const struct shape *s, uint64_t seed)
{
    struct test_random r = test_random(seed);
    size_t matrix = (size_t)s->dim * (size_t)s->expert_dim, n = matrix * 3 * (size_t)s->n_experts;
    size_t rows = (size_t)s->rows, dim = (size_t)s->dim, k = (size_t)s->n_chosen;
    int32_t order[128];

    p->s = *s;
    p->x = mem_alloc(rows * dim * sizeof(float));
    p->add = mem_alloc(rows * dim * sizeof(float));
    p->out = mem_alloc(rows * dim * sizeof(float));
    p->weights = mem_alloc(rows * k * sizeof(float));
    p->experts = mem_alloc(rows * k * sizeof *p->experts);
    p->matrices = mem_alloc(n * dtype_bytes(s->type));
    p->tables = mem_alloc(3 * (size_t)s->n_experts * sizeof *p->tables);
    random_floats(&r, p->x, rows * dim, 1);
    random_floats(&r, p->add, rows * dim, 1);
    random_floats(&r, p->weights, rows * k, 1);
    if (s->type == DTYPE_F32)
        random_floats(&r, p->matrices, n, 0.2f);
    else
        random_bf16s(&r, p->matrices, n, 0.2f);
    for (int i = 0; i < 3 * s->n_experts; i++)
        p->tables[i % 3 * s->n_experts + i / 3] =
            (const char *)p->matrices + (size_t)i * matrix * dtype_bytes(s->type);
    for (int row = 0; row < s->rows; row++) {
        random_order(&r, order, s->n_experts);
        for (int i = 0; i < s->n_chosen; i++)
            p->experts[row * s->n_chosen + i] = s->pads && row % 4 == 1 ? -1 : order[i];
    }
}

static void free_problem(struct problem *p)
{
    mem_free(p->x);
    mem_free(p->add);
    mem_free(p->out);
    mem_free(p->weights);
    mem_free(p->experts);
    mem_free(p->matrices);
    mem_free(p->tables);
}

/* `rows` rows from `from` on, to out. */
static void run(struct backend *be, const struct problem *p, float *out, int from, int rows)
{
    const struct shape *s = &p->s;
    struct experts_shape shape = { rows, s->dim, s->expert_dim, s->n_experts, s->n_chosen };
    struct stream *stream = stream_create(be);
    size_t bytes = backend_ops(be)->experts_scratch(&shape), at = (size_t)(from * s->dim);
    unsigned char *scratch = mem_map(bytes + 8, 64);
    const void *const *tables = p->tables;

    memset(scratch, 0xff, bytes);
    memset(scratch + bytes, 0x5a, 8);
    backend_ops(be)->experts(stream, &(struct experts_args){
        .out = out, .x = p->x + at, .add = s->add ? p->add + at : NULL,
        .experts = p->experts + from * s->n_chosen, .weights = p->weights + from * s->n_chosen,
        .matrices = { tables, tables + s->n_experts, tables + 2 * s->n_experts, s->type },
        .scratch = scratch, .rows = rows, .dim = s->dim, .expert_dim = s->expert_dim,
        .n_experts = s->n_experts, .n_chosen = s->n_chosen });
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    for (int i = 0; i < 8; i++)
        ck_assert_int_eq(scratch[bytes + (size_t)i], 0x5a);
    mem_unmap(scratch, bytes + 8);
    stream_destroy(stream);
}

/* One row by the definition; *most is the largest magnitude of a term. */
static void plain_row(const struct problem *p, int row, double *out, double *most)
{
    const struct shape *s = &p->s;
    double h[256];

    *most = 0;
    for (int m = 0; m < s->dim; m++) {
        out[m] = s->add ? (double)p->add[row * s->dim + m] : 0;
        *most = fmax(*most, fabs(out[m]));
    }
    for (int i = 0; i < s->n_chosen; i++) {
        int e = p->experts[row * s->n_chosen + i];
        double weight = (double)p->weights[row * s->n_chosen + i];
        const void *w[3];
        if (e < 0)
            continue;
        for (int j = 0; j < 3; j++)
            w[j] = p->tables[j * s->n_experts + e];
        for (int o = 0; o < s->expert_dim; o++) {
            double gate = 0, up = 0;
            for (int m = 0; m < s->dim; m++) {
                double x = (double)p->x[row * s->dim + m];
                gate += x * element(w[0], s->type, (size_t)(o * s->dim + m));
                up += x * element(w[1], s->type, (size_t)(o * s->dim + m));
            }
            h[o] = gate / (1 + exp(-gate)) * up;
        }
        for (int m = 0; m < s->dim; m++) {
            double sum = 0;
            for (int o = 0; o < s->expert_dim; o++)
                sum += h[o] * element(w[2], s->type, (size_t)(m * s->expert_dim + o));
            out[m] += weight * sum;
            *most = fmax(*most, fabs(weight * sum));
        }
    }
}

static void compare(struct backend *be, const struct problem *p)
{
    const struct shape *s = &p->s;
    double want[600], most;

    run(be, p, p->out, 0, s->rows);
    for (int row = 0; row < s->rows; row++) {
        plain_row(p, row, want, &most);
        for (int m = 0; m < s->dim; m++) {
            double off = fabs((double)p->out[row * s->dim + m] - want[m]);
            if (!(off <= 1e-5 * sqrt(s->dim) * most))
                ck_abort_msg("row %d, element %d is %g, not %g", row, m,
                             (double)p->out[row * s->dim + m], want[m]);
        }
    }
}

START_TEST(experts_are_right)
{
    struct problem p;

    make_problem(&p, &shapes[_i], 40 + (uint64_t)_i);
    for (int isa = 0; isa < TEST_ALL_ISAS; isa++)
        if (test_backend(test_all_isas[isa]))
            compare(test_backend(test_all_isas[isa]), &p);
    free_problem(&p);
}
END_TEST

START_TEST(rows_are_independent)
{
    struct problem p;
    float alone[600];

    make_problem(&p, &shapes[_i], 70 + (uint64_t)_i);
    for (int isa = 0; isa < TEST_ALL_ISAS; isa++) {
        struct backend *be = test_backend(test_all_isas[isa]);
        size_t dim = (size_t)p.s.dim;
        if (!be)
            continue;
        run(be, &p, p.out, 0, p.s.rows);
        for (int row = 0; row < p.s.rows; row++) {
            run(be, &p, alone, row, 1);
            ck_assert(floats_identical("alone", p.out + (size_t)row * dim, alone, dim));
        }
    }
    free_problem(&p);
}
END_TEST

START_TEST(threads_do_not_change_a_bit)
{
    struct backend *one = open_with_threads("auto", 1), *five = open_with_threads("auto", 5);
    struct problem p;

    make_problem(&p, &shapes[8], 3);
    size_t n = (size_t)p.s.rows * (size_t)p.s.dim;
    float *out = mem_alloc(n * sizeof *out);
    run(one, &p, out, 0, p.s.rows);
    run(five, &p, p.out, 0, p.s.rows);
    ck_assert(floats_identical("threads", p.out, out, n));
    mem_free(out);
    free_problem(&p);
    backend_close(one);
    backend_close(five);
}
END_TEST

/* Adding in place. */
START_TEST(out_may_be_what_is_added)
{
    struct problem p;

    make_problem(&p, &shapes[4], 9);
    size_t n = (size_t)p.s.rows * (size_t)p.s.dim;
    run(test_backend("auto"), &p, p.out, 0, p.s.rows);
    run(test_backend("auto"), &p, p.add, 0, p.s.rows);
    ck_assert(floats_identical("in place", p.add, p.out, n));
    free_problem(&p);
}
END_TEST

TCase *experts_case(void)
{
    TCase *c = tcase_create("experts");

    tcase_set_timeout(c, 120);
    tcase_add_test(c, golden_softmax);
    tcase_add_test(c, golden_sigmoid);
    tcase_add_test(c, ties_take_the_lower_number);
    tcase_add_test(c, odd_scores_choose_experts);
    tcase_add_test(c, padded_rows_get_no_experts);
    tcase_add_loop_test(c, experts_are_right, 0, N_SHAPES);
    tcase_add_loop_test(c, rows_are_independent, 0, N_SHAPES);
    tcase_add_test(c, threads_do_not_change_a_bit);
    tcase_add_test(c, out_may_be_what_is_added);
    return c;
}
