/* route and experts on the GPU against the CPU back end. */

#include "engine/base/mem.h"
#include "kernels/cpu/cpu.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/gpu_compare.h"
#include "tests/support/gpu_fixture.h"
#include "tests/support/kernel_reference.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- route */

static const struct routing {
    int rows, dim, n_experts, n_chosen;
    enum router_score score;
    bool bias, renormalise, pads;
    enum dtype type;
} routings[] = {
    { 1, 2048, 128, 8, ROUTER_SOFTMAX, false, true, false, DTYPE_BF16 },
    { 7, 64, 8, 2, ROUTER_SOFTMAX, false, false, true, DTYPE_BF16 },
    { 16, 2048, 64, 4, ROUTER_SIGMOID, true, true, false, DTYPE_BF16 },
    { 33, 96, 33, 5, ROUTER_SIGMOID, false, true, true, DTYPE_F32 },
    { 300, 2048, 128, 8, ROUTER_SOFTMAX, false, true, true, DTYPE_BF16 },
    { 70, 256, 512, 16, ROUTER_SIGMOID, true, false, false, DTYPE_BF16 },
    { 5, 64, 1, 1, ROUTER_SOFTMAX, false, true, false, DTYPE_BF16 },
    { 130, 72, 16, 16, ROUTER_SOFTMAX, false, true, false, DTYPE_BF16 },
    { 1, 2048, 64, 4, ROUTER_SIGMOID, true, true, false, DTYPE_BF16 },
    { 16, 4104, 128, 8, ROUTER_SOFTMAX, false, true, true, DTYPE_BF16 },
    { 9, 2560, 512, 10, ROUTER_SIGMOID, true, true, true, DTYPE_BF16 },
    { 8, 584, 65, 3, ROUTER_SOFTMAX, false, false, false, DTYPE_BF16 },
    { 12, 1000, 60, 4, ROUTER_SIGMOID, false, true, false, DTYPE_BF16 },
};
enum { N_ROUTINGS = sizeof routings / sizeof *routings };

struct routed {
    int32_t *experts;            /* [T, k] */
    float *weights, *scores;     /* [T, k], [T, E] */
};

static struct route_args route_args_of(const struct routing *c)
{
    return (struct route_args){
        .router_type = c->type, .score = c->score, .renormalise = c->renormalise, .scale = 1.8f,
        .rows = c->rows, .dim = c->dim, .n_experts = c->n_experts, .n_chosen = c->n_chosen };
}

/* What the CPU chooses by these very scores: a router that is a unit matrix gives them. */
static void choose_by(const struct routing *c, struct routed *r, const float *bias,
                      const int32_t *blocks)
{
    struct backend *be = test_backend("auto");
    struct stream *s = stream_create(be);
    size_t n = (size_t)c->n_experts, k = (size_t)c->n_chosen, rows = (size_t)c->rows;
    float *unit = mem_calloc(n * n, sizeof *unit), *copy = mem_alloc(rows * n * sizeof *copy);
    struct route_args a = route_args_of(c);

    r->experts = mem_alloc(rows * k * sizeof *r->experts);
    r->weights = mem_alloc(rows * k * sizeof *r->weights);
    for (size_t e = 0; e < n; e++)
        unit[e * n + e] = 1;
    a.experts = r->experts;
    a.weights = r->weights;
    a.scores = copy;
    a.x = r->scores;
    a.router = unit;
    a.router_type = DTYPE_F32;
    a.bias = bias;
    a.kv_block = blocks;
    a.dim = c->n_experts;
    backend_ops(be)->route(s, &a);
    ck_assert_int_eq(memcmp(copy, r->scores, rows * n * sizeof *copy), 0);
    stream_destroy(s);
    mem_free(unit);
    mem_free(copy);
}

/* A choice may differ from the CPU's by the same scores only where two are equal but for the
 * rounding of the sigmoid. */
static void compare_choices(const char *text, const struct routing *c, const struct routed *got,
                            const struct routed *want)
{
    for (int i = 0; i < c->rows * c->n_chosen; i++) {
        if (got->experts[i] != want->experts[i] && c->score == ROUTER_SOFTMAX)
            ck_abort_msg("%s: choice %d is %d, not %d", text, i, got->experts[i],
                         want->experts[i]);
        if (!(fabsf(got->weights[i] - want->weights[i]) <= 2e-5f))
            ck_abort_msg("%s: weight %d is %g, not %g", text, i, (double)got->weights[i],
                         (double)want->weights[i]);
    }
}

START_TEST(route_equals_cpu)
{
    const struct routing *c = &routings[_i];
    size_t rows = (size_t)c->rows, dim = (size_t)c->dim, n = (size_t)c->n_experts;
    size_t k = (size_t)c->n_chosen;
    struct test_random r = test_random(200 + (uint64_t)_i);
    struct route_args a = route_args_of(c);
    struct routed got, want;
    float bias[512];
    char text[60];

    if (!gpu_backend())
        return;
    snprintf(text, sizeof text, "route, case %d", _i);
    float *x = random_acts(&r, rows * dim, 1);
    void *router = random_weights(&r, n * dim, c->type, 2 / sqrtf((float)c->dim));
    int32_t *blocks = mem_alloc(rows * sizeof *blocks);
    for (size_t i = 0; i < rows; i++)
        blocks[i] = c->pads && i % 3 == 1 ? -1 : (int32_t)i;
    random_floats(&r, bias, n, 0.3f);
    a.x = gpu_put_act(x, rows * dim);
    a.router = gpu_put_weights(router, n * dim, c->type, 1);
    a.bias = c->bias ? gpu_put(bias, n * sizeof *bias) : NULL;
    a.kv_block = c->pads ? gpu_put(blocks, rows * sizeof *blocks) : NULL;
    a.experts = gpu_put(NULL, rows * k * sizeof *got.experts);
    a.weights = gpu_put(NULL, rows * k * sizeof *got.weights);
    a.scores = gpu_put(NULL, rows * n * sizeof *got.scores);
    gpu_ops()->route(gpu_stream(), &a);
    got.experts = mem_alloc(rows * k * sizeof *got.experts);
    got.weights = mem_alloc(rows * k * sizeof *got.weights);
    got.scores = want.scores = mem_alloc(rows * n * sizeof *got.scores);
    gpu_get(got.experts, a.experts, rows * k * sizeof *got.experts);
    gpu_get(got.weights, a.weights, rows * k * sizeof *got.weights);
    gpu_get(got.scores, a.scores, rows * n * sizeof *got.scores);

    choose_by(c, &want, c->bias ? bias : NULL, c->pads ? blocks : NULL);
    compare_choices(text, c, &got, &want);
    /* The scores themselves. */
    float *scores = mem_alloc(rows * n * sizeof *scores);
    struct stream *s = stream_create(test_backend("auto"));
    backend_ops(test_backend("auto"))->logits(s, &(struct logits_args){
        .out = scores, .x = x, .weight = router, .weight_type = c->type, .rows = c->rows,
        .dim = c->dim, .vocab = c->n_experts });
    stream_destroy(s);
    assert_rows_near(text, &(struct row_pair){
        .got = got.scores, .want = scores, .rows = rows, .dim = n,
        .tolerance = n > 1 ? 1e-5 * sqrt(c->dim) : 1e-3 });
    mem_free(scores);
    mem_free(x);
    mem_free(router);
    mem_free(blocks);
    mem_free(got.experts);
    mem_free(got.weights);
    mem_free(got.scores);
    mem_free(want.experts);
    mem_free(want.weights);
    gpu_forget();
}
END_TEST

/* Equal scores and NaN: as the CPU. */
START_TEST(odd_scores_equal_cpu)
{
    enum { ROWS = 6, N = 128, K = 8, DIM = 8 };
    struct routing c = { ROWS, DIM, N, K, ROUTER_SOFTMAX, false, true, false, DTYPE_BF16 };
    struct route_args a = route_args_of(&c);
    struct routed want = { 0 };
    float x[ROWS * DIM] = { 0 }, router[N * DIM] = { 0 };
    bf16 weights[N * DIM];

    if (!gpu_backend())
        return;
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < DIM; i++)
            x[row * DIM + i] = row == 0 ? 0 : row == 1 ? NAN : (float)(i % row);
    for (int e = 0; e < N; e++)
        for (int i = 0; i < DIM; i++)
            router[e * DIM + i] = (float)(e * 7 % 5 + (i == e % DIM));
    for (int i = 0; i < N * DIM; i++)
        weights[i] = float_to_bf16(router[i]);
    a.x = gpu_put_act(x, ROWS * DIM);
    a.router = gpu_put(weights, sizeof weights);
    a.experts = gpu_put(NULL, ROWS * K * 4);
    a.weights = gpu_put(NULL, ROWS * K * 4);
    a.scores = gpu_put(NULL, ROWS * N * 4);
    gpu_ops()->route(gpu_stream(), &a);
    int32_t experts[ROWS * K];
    float scores[ROWS * N], chosen_weights[ROWS * K];
    gpu_get(experts, a.experts, sizeof experts);
    gpu_get(scores, a.scores, sizeof scores);
    gpu_get(chosen_weights, a.weights, sizeof chosen_weights);
    for (int i = 0; i < K; i++) {
        ck_assert_int_eq(experts[i], i);             /* all are 0 */
        ck_assert_int_eq(experts[K + i], i);         /* all are NaN */
        ck_assert(isnan(chosen_weights[K + i]));
    }
    for (int e = 0; e < N; e++)
        scores[N + e] = 0;       /* a product with NaN is NaN: choose_by() could not compare it */
    want.scores = scores;
    choose_by(&c, &want, NULL, NULL);
    for (int i = 0; i < ROWS * K; i++)
        ck_assert_int_eq(experts[i], want.experts[i]);
    mem_free(want.experts);
    mem_free(want.weights);
    gpu_forget();
}
END_TEST

/* One kernel scores and chooses for up to 16 rows, and what it counts thread blocks with is as it
 * was when it ends: the same rows come to the same bits in calls of any size. */
START_TEST(few_rows_are_routed_alike)
{
    enum { ROWS = 16 };
    const struct routing *c = &routings[_i];
    size_t dim = (size_t)c->dim, n = (size_t)c->n_experts, k = (size_t)c->n_chosen;
    struct test_random r = test_random(300 + (uint64_t)_i);
    struct route_args a = route_args_of(c);
    struct routed made[2];       /* of all rows, and of fewer */
    float bias[512];

    if (!gpu_backend() || c->type != DTYPE_BF16)
        return;
    float *x = random_acts(&r, ROWS * dim, 1);
    void *router = random_weights(&r, n * dim, c->type, 2 / sqrtf((float)c->dim));
    random_floats(&r, bias, n, 0.3f);
    a.x = gpu_put_act(x, ROWS * dim);
    a.router = gpu_put_weights(router, n * dim, c->type, 1);
    a.bias = c->bias ? gpu_put(bias, n * sizeof *bias) : NULL;
    for (int i = 0; i < 2; i++)
        made[i] = (struct routed){ .experts = mem_alloc(ROWS * k * sizeof(int32_t)),
                                   .weights = mem_alloc(ROWS * k * sizeof(float)),
                                   .scores = mem_alloc(ROWS * n * sizeof(float)) };
    for (int rows = ROWS; rows > 0; rows--) {
        struct routed *to = &made[rows < ROWS];
        size_t chosen = (size_t)rows * k * sizeof(float), all = (size_t)rows * n * sizeof(float);
        a.rows = rows;
        a.experts = gpu_put(NULL, chosen);
        a.weights = gpu_put(NULL, chosen);
        a.scores = gpu_put(NULL, all);
        gpu_ops()->route(gpu_stream(), &a);
        gpu_get(to->experts, a.experts, chosen);
        gpu_get(to->weights, a.weights, chosen);
        gpu_get(to->scores, a.scores, all);
        ck_assert_mem_eq(to->experts, made[0].experts, chosen);
        ck_assert_mem_eq(to->weights, made[0].weights, chosen);
        ck_assert_mem_eq(to->scores, made[0].scores, all);
    }
    for (int i = 0; i < 2; i++) {
        mem_free(made[i].experts);
        mem_free(made[i].weights);
        mem_free(made[i].scores);
    }
    mem_free(x);
    mem_free(router);
    gpu_forget();
}
END_TEST

/* ---- experts */

static const struct shape {
    int n_experts, n_chosen, dim, expert_dim;
    enum dtype type;
    bool add, pads;
    int favourites;              /* experts that most rows choose among; 0: all alike */
} shapes[] = {
    { 8, 2, 96, 80, DTYPE_BF16, false, false, 0 },
    { 128, 8, 64, 24, DTYPE_BF16, false, true, 0 },
    { 128, 8, 2048, 768, DTYPE_BF16, false, false, 0 },
    { 64, 4, 2048, 1536, DTYPE_BF16, true, true, 0 },
    { 1, 1, 64, 8, DTYPE_BF16, false, false, 0 },
    { 5, 3, 72, 264, DTYPE_BF16, true, true, 0 },
    { 40, 7, 136, 200, DTYPE_BF16, false, false, 0 },
    { 32, 16, 200, 136, DTYPE_BF16, true, false, 0 },
    { 512, 10, 128, 64, DTYPE_BF16, false, false, 0 },
    { 128, 8, 256, 128, DTYPE_BF16, false, true, 9 },
    { 2, 1, 520, 72, DTYPE_BF16, true, false, 0 },
    { 8, 2, 64, 40, DTYPE_F32, true, true, 0 },
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes, MAX_ROWS = 700 };
static const int row_counts[] = { 1, 2, 5, 7, 8, 9, 13, 16, 17, 33, 64, 100, 130, 300, MAX_ROWS };
enum { N_ROW_COUNTS = sizeof row_counts / sizeof *row_counts };

struct problem {
    struct shape s;
    float *x, *add, *weights, *want;
    int32_t *experts;
    void *matrices;              /* [E][gate | up | down] */
    const void **tables;         /* [3, E] of the CPU */
    const void *gpu_x, *gpu_add, *gpu_weights, *gpu_experts;
    const void *const *gpu_tables;
    size_t scratch_bytes;
    void *scratch;
};

/* Different experts for a row, most of them favourites. */
static void choose_experts(struct test_random *r, const struct shape *s, int32_t *out)
{
    int32_t order[512], few[512];

    random_order(r, order, s->n_experts);
    if (s->favourites > 0 && random_below(r, 4) > 0) {
        random_order(r, few, s->favourites);
        memcpy(order, few, (size_t)s->favourites * sizeof *few);
    }
    memcpy(out, order, (size_t)s->n_chosen * sizeof *out);
}

static void make_matrices(struct problem *p, struct test_random *r)
{
    const struct shape *s = &p->s;
    size_t matrix = (size_t)s->dim * (size_t)s->expert_dim, n = 3 * (size_t)s->n_experts;
    size_t bytes = matrix * dtype_bytes(s->type);
    const void **tables = mem_alloc(n * sizeof *tables);

    p->matrices = random_weights(r, n * matrix, s->type, 1 / sqrtf((float)s->dim));
    p->tables = mem_alloc(n * sizeof *p->tables);
    const char *device = gpu_put_weights(p->matrices, n * matrix, s->type, 1);
    for (size_t i = 0; i < n; i++) {
        size_t to = i % 3 * (size_t)s->n_experts + i / 3;
        p->tables[to] = (const char *)p->matrices + i * bytes;
        tables[to] = device + i * bytes;
    }
    p->gpu_tables = gpu_put(tables, n * sizeof *tables);
    mem_free(tables);
}

static void make_problem(struct problem *p, const struct shape *s, uint64_t seed)
{
    struct test_random r = test_random(seed);
    size_t n = (size_t)MAX_ROWS * (size_t)s->dim, k = (size_t)s->n_chosen;
    struct experts_shape most = { MAX_ROWS, s->dim, s->expert_dim, s->n_experts, s->n_chosen };

    memset(p, 0, sizeof *p);
    p->s = *s;
    p->x = random_acts(&r, n, 1);
    p->add = random_acts(&r, n, 1);
    p->weights = mem_alloc(MAX_ROWS * k * sizeof *p->weights);
    p->experts = mem_alloc(MAX_ROWS * k * sizeof *p->experts);
    random_floats(&r, p->weights, MAX_ROWS * k, 1);
    for (size_t row = 0; row < MAX_ROWS; row++) {
        choose_experts(&r, s, p->experts + row * k);
        for (size_t i = 0; i < k && s->pads && row % 5 == 1; i++)
            p->experts[row * k + i] = -1;
    }
    make_matrices(p, &r);
    p->gpu_x = gpu_put_act(p->x, n);
    p->gpu_add = s->add ? gpu_put_act(p->add, n) : NULL;
    p->gpu_weights = gpu_put(p->weights, MAX_ROWS * k * sizeof *p->weights);
    p->gpu_experts = gpu_put(p->experts, MAX_ROWS * k * sizeof *p->experts);
    p->scratch_bytes = gpu_ops()->experts_scratch(&most);
    p->scratch = gpu_put(NULL, p->scratch_bytes);
}

static void free_problem(struct problem *p)
{
    mem_free(p->x);
    mem_free(p->add);
    mem_free(p->weights);
    mem_free(p->want);
    mem_free(p->experts);
    mem_free(p->matrices);
    mem_free(p->tables);
    gpu_forget();
}

static struct experts_args args_of(const struct problem *p, int rows)
{
    const struct shape *s = &p->s;

    return (struct experts_args){ .rows = rows, .dim = s->dim, .expert_dim = s->expert_dim,
                                  .n_experts = s->n_experts, .n_chosen = s->n_chosen };
}

static struct expert_weights matrices_of(const void *const *tables, const struct shape *s)
{
    return (struct expert_weights){ tables, tables + s->n_experts, tables + 2 * s->n_experts,
                                    s->type };
}

/* All rows: on the CPU a row's result is the same in any batch. */
static void run_cpu(struct problem *p)
{
    struct backend *be = test_backend("auto");
    struct stream *stream = stream_create(be);
    struct experts_args a = args_of(p, MAX_ROWS);
    struct experts_shape shape = { MAX_ROWS, a.dim, a.expert_dim, a.n_experts, a.n_chosen };

    p->want = mem_alloc((size_t)MAX_ROWS * (size_t)p->s.dim * sizeof *p->want);
    a.out = p->want;
    a.x = p->x;
    a.add = p->s.add ? p->add : NULL;
    a.experts = p->experts;
    a.weights = p->weights;
    a.matrices = matrices_of(p->tables, &p->s);
    a.scratch = mem_alloc(backend_ops(be)->experts_scratch(&shape));
    backend_ops(be)->experts(stream, &a);
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    mem_free(a.scratch);
    stream_destroy(stream);
}

/* The rows from `from` on, with a spare one behind them: [rows + 1, dim], the caller frees. */
static bf16 *run_gpu(const struct problem *p, int from, int rows)
{
    struct experts_args a = args_of(p, rows);
    size_t dim = (size_t)p->s.dim, n = (size_t)(rows + 1) * dim, at = (size_t)from * dim;
    size_t pair = (size_t)from * (size_t)p->s.n_chosen;
    bf16 *out = mem_alloc(n * sizeof *out);

    a.out = gpu_put(NULL, n * sizeof *out);
    a.x = (const bf16 *)p->gpu_x + at;
    a.add = p->gpu_add ? (const bf16 *)p->gpu_add + at : NULL;
    a.experts = (const int32_t *)p->gpu_experts + pair;
    a.weights = (const float *)p->gpu_weights + pair;
    a.matrices = matrices_of(p->gpu_tables, &p->s);
    a.scratch = p->scratch;
    gpu_ops()->experts(gpu_stream(), &a);
    gpu_get(out, a.out, n * sizeof *out);
    return out;
}

static void describe(char *text, size_t n, const struct problem *p, int rows)
{
    snprintf(text, n, "experts: %d rows of %d, %d of %d of width %d, %s", rows, p->s.dim,
             p->s.n_chosen, p->s.n_experts, p->s.expert_dim,
             p->s.type == DTYPE_F32 ? "f32" : "bf16");
}

START_TEST(experts_equal_cpu)
{
    struct problem p;
    char text[120];

    if (!gpu_backend())
        return;
    make_problem(&p, &shapes[_i], 300 + (uint64_t)_i);
    run_cpu(&p);
    for (int i = 0; i < N_ROW_COUNTS; i++) {
        size_t rows = (size_t)row_counts[i], dim = (size_t)p.s.dim;
        bf16 *out = run_gpu(&p, 0, row_counts[i]);
        float *got = widened(out, rows * dim);
        describe(text, sizeof text, &p, row_counts[i]);
        assert_rows_near(text, &(struct row_pair){
            .got = got, .want = p.want, .rows = rows, .dim = dim,
            .tolerance = 1e-5 * sqrt(p.s.dim) + 3 * ACT_ROUNDING });
        assert_unwritten(text, out + rows * dim, dim * sizeof *out);
        mem_free(got);
        mem_free(out);
    }
    free_problem(&p);
}
END_TEST

/* Up to 16 rows each is the same to the bit in any number of them, and alone. */
START_TEST(few_rows_are_independent)
{
    struct problem p;
    char text[120];
    int most = 16;

    if (!gpu_backend())
        return;
    make_problem(&p, &shapes[_i], 330 + (uint64_t)_i);
    bf16 *all = run_gpu(&p, 0, most);
    for (int rows = 1; rows < most; rows++) {
        bf16 *some = run_gpu(&p, 0, rows);
        describe(text, sizeof text, &p, rows);
        assert_same_bits(text, some, all, (size_t)rows, (size_t)p.s.dim);
        mem_free(some);
    }
    for (int row = 0; row < most; row++) {
        bf16 *alone = run_gpu(&p, row, 1);
        describe(text, sizeof text, &p, 1);
        assert_same_bits(text, alone, all + (size_t)row * (size_t)p.s.dim, 1, (size_t)p.s.dim);
        mem_free(alone);
    }
    mem_free(all);
    free_problem(&p);
}
END_TEST

/* More rows: the same to the bit among themselves too, which is more than ops.h promises, and
 * again and again. */
START_TEST(many_rows_repeat)
{
    static const int counts[] = { 17, 100, MAX_ROWS };
    struct problem p;
    char text[120];

    if (!gpu_backend())
        return;
    make_problem(&p, &shapes[_i], 360 + (uint64_t)_i);
    bf16 *all = run_gpu(&p, 0, MAX_ROWS);
    for (int again = 0; again < 3; again++)
        for (int i = 0; i < 3; i++) {
            bf16 *some = run_gpu(&p, 0, counts[i]);
            describe(text, sizeof text, &p, counts[i]);
            assert_same_bits(text, some, all, (size_t)counts[i], (size_t)p.s.dim);
            mem_free(some);
        }
    mem_free(all);
    free_problem(&p);
}
END_TEST

/* Recorded with one choice of experts and replayed with others. */
START_TEST(graphs_follow_the_experts)
{
    static const int counts[] = { 3, 16, 40 };
    struct problem p;
    char text[120];

    if (!gpu_backend())
        return;
    make_problem(&p, &shapes[1], 390);
    for (int i = 0; i < 3; i++) {
        int rows = counts[i];
        size_t dim = (size_t)p.s.dim, k = (size_t)p.s.n_chosen, n = (size_t)rows * dim;
        struct experts_args a = args_of(&p, rows);
        bf16 *got = mem_alloc(n * sizeof *got);
        void *x = gpu_put(NULL, n * 2), *experts = gpu_put(NULL, (size_t)rows * k * 4);
        void *weights = gpu_put(NULL, (size_t)rows * k * 4);
        a.out = gpu_put(NULL, n * sizeof *got);
        a.x = x;
        a.experts = experts;
        a.weights = weights;
        a.matrices = matrices_of(p.gpu_tables, &p.s);
        a.scratch = p.scratch;
        mem_free(run_gpu(&p, 0, rows));              /* once unrecorded: kernels are loaded */
        graph_begin(gpu_stream());
        gpu_ops()->experts(gpu_stream(), &a);
        gpu_ops()->experts(gpu_stream(), &a);
        struct graph *graph = graph_end(gpu_stream());
        ck_assert_ptr_nonnull(graph);
        for (int from = 0; from < 200; from += 50) {
            bf16 *want = run_gpu(&p, from, rows);
            size_t pair = (size_t)from * k;
            stream_copy(gpu_stream(), x, (const bf16 *)p.gpu_x + (size_t)from * dim, n * 2);
            stream_copy(gpu_stream(), experts, (const int32_t *)p.gpu_experts + pair,
                        (size_t)rows * k * 4);
            stream_copy(gpu_stream(), weights, (const float *)p.gpu_weights + pair,
                        (size_t)rows * k * 4);
            graph_launch(gpu_stream(), graph);
            gpu_get(got, a.out, n * sizeof *got);
            describe(text, sizeof text, &p, rows);
            assert_same_bits(text, got, want, (size_t)rows, dim);
            mem_free(want);
        }
        graph_destroy(graph);
        mem_free(got);
    }
    free_problem(&p);
}
END_TEST

/* A row of NaN stays so and spoils no other. */
START_TEST(nan_rows_spoil_no_other)
{
    static const int counts[] = { 2, 9, 16, 33, 130 };
    struct problem p;

    if (!gpu_backend())
        return;
    make_problem(&p, &shapes[0], 400);
    size_t dim = (size_t)p.s.dim;
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        size_t rows = (size_t)counts[i], broken = rows / 2;
        bf16 *want = run_gpu(&p, 0, counts[i]);
        float *x = mem_alloc(rows * dim * sizeof *x);
        memcpy(x, p.x, rows * dim * sizeof *x);
        for (size_t m = 0; m < dim; m++)
            x[broken * dim + m] = NAN;
        const void *all = p.gpu_x;
        p.gpu_x = gpu_put_act(x, rows * dim);
        bf16 *got = run_gpu(&p, 0, counts[i]);
        p.gpu_x = all;
        for (size_t m = 0; m < dim; m++)
            ck_assert(isnan(bf16_to_float(got[broken * dim + m])));
        memcpy(got + broken * dim, want + broken * dim, dim * sizeof *got);
        assert_same_bits("experts with a row of NaN", got, want, rows, dim);
        mem_free(x);
        mem_free(got);
        mem_free(want);
    }
    free_problem(&p);
}
END_TEST

TCase *gpu_experts_case(void)
{
    TCase *c = tcase_create("gpu_experts");

    tcase_set_timeout(c, 180);
    tcase_add_checked_fixture(c, gpu_clean, NULL);
    tcase_add_loop_test(c, route_equals_cpu, 0, N_ROUTINGS);
    tcase_add_test(c, odd_scores_equal_cpu);
    tcase_add_loop_test(c, few_rows_are_routed_alike, 0, N_ROUTINGS);
    tcase_add_loop_test(c, experts_equal_cpu, 0, N_SHAPES);
    tcase_add_loop_test(c, few_rows_are_independent, 0, N_SHAPES);
    tcase_add_loop_test(c, many_rows_repeat, 0, N_SHAPES - 1);
    tcase_add_test(c, graphs_follow_the_experts);
    tcase_add_test(c, nan_rows_spoil_no_other);
    return c;
}
