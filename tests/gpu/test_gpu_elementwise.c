/* embed, add_norm, silu_mul and rope_table on the GPU against the CPU back end. */

#include "engine/base/mem.h"
#include "kernels/cpu/cpu.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/gpu_compare.h"
#include "tests/support/gpu_fixture.h"

#include <check.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { SPARE = 64 };             /* elements behind each result that nobody may write */

static const int row_counts[] = { 1, 3, 64, 300 };
enum { N_ROW_COUNTS = sizeof row_counts / sizeof row_counts[0], MAX_ROWS = 300 };

static const char *type_name(enum dtype type)
{
    return type == DTYPE_F32 ? "f32" : "bf16";
}

static void finish(struct stream *stream)
{
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
}

/* act of n elements and SPARE behind them, all unwritten. */
static bf16 *unwritten_act(size_t n)
{
    return gpu_put(NULL, (n + SPARE) * sizeof(bf16));
}

/* The n elements as floats, the caller frees; the spare ones must be unwritten. */
static float *get_act(const char *shape, const bf16 *device, size_t n)
{
    bf16 *bits = mem_alloc((n + SPARE) * sizeof *bits);
    float *out = mem_alloc(n * sizeof *out);

    gpu_get(bits, device, (n + SPARE) * sizeof *bits);
    assert_unwritten(shape, bits + n, SPARE * sizeof *bits);
    for (size_t i = 0; i < n; i++)
        out[i] = bf16_to_float(bits[i]);
    mem_free(bits);
    return out;
}

/* ---- embed */

static const int embed_dims[] = { 8, 64, 576, 1000, 4096, 5120 };
enum { N_EMBED_DIMS = sizeof embed_dims / sizeof embed_dims[0], VOCAB = 301 };

static void compare_embed(int rows, int dim, enum dtype type, int skip, uint64_t seed)
{
    struct test_random r = test_random(seed);
    size_t n_table = (size_t)VOCAB * (size_t)dim, n = (size_t)rows * (size_t)dim;
    struct stream *stream = stream_create(test_backend("auto"));
    void *table = random_weights(&r, n_table, type, 1);
    float *want = mem_alloc(n * sizeof *want);
    bf16 *rounded = mem_alloc(n * sizeof *rounded), *got = mem_alloc((n + SPARE) * sizeof *got);
    int32_t ids[MAX_ROWS];
    char shape[120];
    struct embed_args a = { .out = want, .table = table, .ids = ids, .table_type = type,
                            .rows = rows, .dim = dim };

    for (int t = 0; t < rows; t++)
        ids[t] = t == 0 ? VOCAB - 1 : t == 1 ? 0 : random_below(&r, VOCAB);
    backend_ops(test_backend("auto"))->embed(stream, &a);
    finish(stream);
    a.out = unwritten_act(n);
    a.table = gpu_put_weights(table, n_table, type, skip);
    a.ids = gpu_put(ids, (size_t)rows * sizeof *ids);
    gpu_ops()->embed(gpu_stream(), &a);
    gpu_get(got, a.out, (n + SPARE) * sizeof *got);
    for (size_t i = 0; i < n; i++)
        rounded[i] = float_to_bf16(want[i]);
    snprintf(shape, sizeof shape, "embed: %d rows of %d, %s table, skip %d", rows, dim,
             type_name(type), skip);
    assert_same_bits(shape, got, rounded, (size_t)rows, (size_t)dim);
    assert_unwritten(shape, got + n, SPARE * sizeof *got);
    gpu_forget();
    mem_free(table);
    mem_free(want);
    mem_free(rounded);
    mem_free(got);
}

START_TEST(embed_is_exact)
{
    if (!gpu_backend())
        return;
    for (int i = 0; i < N_ROW_COUNTS; i++)
        for (int k = 0; k < 4; k++)
            compare_embed(row_counts[i], embed_dims[_i], k & 1 ? DTYPE_BF16 : DTYPE_F32, k / 2,
                          1 + (uint64_t)(i * 4 + k));
}
END_TEST

/* ---- add_norm */

static const int norm_dims[] = { 64, 576, 1024, 4096, 5120, 8 };
enum { N_NORM_DIMS = sizeof norm_dims / sizeof norm_dims[0] };

enum norm_kind { NORM_ADD, NORM_ALONE, NORM_GATHER, N_NORM_KINDS };

/* Of ops.h: out is rounded once.  It is made of the sum in float; made of the x that is
 * stored, which is rounded too, it would go up to 6.1e-3. */
static const double norm_tolerance = 1e-5 + ACT_ROUNDING;

struct norm_setup {
    int rows, dim;
    enum norm_kind kind;
    enum dtype type;
    int skip;
    float scale;                 /* of x and delta */
};

/* x has more rows than out where rows are gathered. */
static int rows_of_x(const struct norm_setup *s)
{
    return s->kind == NORM_GATHER ? s->rows + 13 : s->rows;
}

struct norm_problem {
    struct norm_setup s;
    float *x, *delta, *out;      /* [rows_of_x, dim] twice, [rows, dim] */
    void *weight;
    int32_t rows_of[MAX_ROWS];
    size_t n_x, n_out;
    char shape[160];
};

static void make_norm_problem(struct norm_problem *p, const struct norm_setup *s, uint64_t seed)
{
    static const char *const names[N_NORM_KINDS] = { "x + delta", "x alone", "rows of x" };
    struct test_random r = test_random(seed);

    p->s = *s;
    p->n_x = (size_t)rows_of_x(s) * (size_t)s->dim;
    p->n_out = (size_t)s->rows * (size_t)s->dim;
    p->x = random_acts(&r, p->n_x, s->scale);
    p->delta = random_acts(&r, p->n_x, s->scale / 2);
    p->out = mem_alloc(p->n_out * sizeof *p->out);
    p->weight = random_weights(&r, (size_t)s->dim, s->type, 1);
    for (int t = 0; t < s->rows; t++)
        p->rows_of[t] = t == 0 ? rows_of_x(s) - 1 : random_below(&r, rows_of_x(s));
    snprintf(p->shape, sizeof p->shape, "add_norm, %s: %d rows of %d, scale %g, %s weights, "
             "skip %d", names[s->kind], s->rows, s->dim, (double)s->scale, type_name(s->type),
             s->skip);
}

static struct add_norm_args norm_arguments(const struct norm_problem *p)
{
    return (struct add_norm_args){
        .out = p->out, .x = p->x, .delta = p->s.kind == NORM_ADD ? p->delta : NULL,
        .rows_of = p->s.kind == NORM_GATHER ? p->rows_of : NULL, .weight = p->weight,
        .weight_type = p->s.type, .rows = p->s.rows, .dim = p->s.dim, .eps = 1e-5f };
}

/* Only the sum may change x. */
static void check_x(const struct norm_problem *p, const bf16 *device, const float *before)
{
    float *x = get_act(p->shape, device, p->n_x);
    size_t dim = (size_t)p->s.dim;
    char shape[200];

    snprintf(shape, sizeof shape, "x of %s", p->shape);
    assert_rows_near(shape, &(struct row_pair){
        .got = x, .want = p->s.kind == NORM_ADD ? p->x : before, .rows = p->n_x / dim,
        .dim = dim, .tolerance = p->s.kind == NORM_ADD ? 1e-5 + ACT_ROUNDING : 0 });
    mem_free(x);
}

static bf16 *put_with_spare(const float *host, size_t n)
{
    bf16 *bits = mem_alloc((n + SPARE) * sizeof *bits);

    for (size_t i = 0; i < n; i++)
        bits[i] = float_to_bf16(host[i]);
    memset(bits + n, 0xff, SPARE * sizeof *bits);
    bf16 *device = gpu_put(bits, (n + SPARE) * sizeof *bits);
    mem_free(bits);
    return device;
}

static void compare_norm(const struct norm_setup *s, uint64_t seed)
{
    struct stream *stream = stream_create(test_backend("auto"));
    struct norm_problem p;

    make_norm_problem(&p, s, seed);
    struct add_norm_args a = norm_arguments(&p);
    a.out = unwritten_act(p.n_out);
    a.x = put_with_spare(p.x, p.n_x);
    a.delta = a.delta ? gpu_put_act(p.delta, p.n_x) : NULL;
    a.rows_of = a.rows_of ? gpu_put(p.rows_of, (size_t)s->rows * sizeof *p.rows_of) : NULL;
    a.weight = gpu_put_weights(p.weight, (size_t)s->dim, s->type, s->skip);
    gpu_ops()->add_norm(gpu_stream(), &a);
    float *before = mem_alloc(p.n_x * sizeof *before);
    memcpy(before, p.x, p.n_x * sizeof *before);
    struct add_norm_args cpu = norm_arguments(&p);
    backend_ops(test_backend("auto"))->add_norm(stream, &cpu);
    finish(stream);
    float *out = get_act(p.shape, a.out, p.n_out);
    assert_rows_near(p.shape, &(struct row_pair){
        .got = out, .want = p.out, .rows = (size_t)s->rows, .dim = (size_t)s->dim,
        .tolerance = norm_tolerance });
    check_x(&p, a.x, before);
    gpu_forget();
    mem_free(out);
    mem_free(before);
    mem_free(p.x);
    mem_free(p.delta);
    mem_free(p.out);
    mem_free(p.weight);
}

START_TEST(add_norm_equals_cpu)
{
    static const float scales[] = { 1, 30, 0.01f };

    if (!gpu_backend())
        return;
    for (int i = 0; i < N_ROW_COUNTS; i++)
        for (int kind = 0; kind < N_NORM_KINDS; kind++)
            for (int k = 0; k < 4; k++) {
                struct norm_setup s = {
                    .rows = row_counts[i], .dim = norm_dims[_i], .kind = (enum norm_kind)kind,
                    .type = k & 1 ? DTYPE_BF16 : DTYPE_F32, .skip = k / 2,
                    .scale = scales[(i + kind + k) % 3] };
                compare_norm(&s, 100 + (uint64_t)((i * N_NORM_KINDS + kind) * 4 + k));
            }
}
END_TEST

/* A row, and its sum, are the same whoever else is there. */
START_TEST(norm_rows_are_independent)
{
    enum { ROWS = 64 };
    struct norm_setup s = { .rows = ROWS, .dim = norm_dims[_i], .kind = NORM_ADD,
                            .type = DTYPE_BF16, .scale = 1 };
    struct norm_problem p;
    size_t dim = (size_t)s.dim;

    if (!gpu_backend())
        return;
    make_norm_problem(&p, &s, 200);
    struct add_norm_args a = norm_arguments(&p);
    bf16 *all = mem_alloc(2 * p.n_out * sizeof *all), *one = mem_alloc(2 * dim * sizeof *one);
    a.weight = gpu_put_weights(p.weight, dim, s.type, 0);
    a.delta = gpu_put_act(p.delta, p.n_x);
    a.x = gpu_put_act(p.x, p.n_x);
    a.out = unwritten_act(p.n_out);
    gpu_ops()->add_norm(gpu_stream(), &a);
    gpu_get(all, a.out, p.n_out * sizeof *all);
    gpu_get(all + p.n_out, a.x, p.n_out * sizeof *all);
    const bf16 *delta = a.delta;
    a.rows = 1;
    for (size_t row = 0; row < ROWS; row += 7) {
        a.x = gpu_put_act(p.x + row * dim, dim);
        a.delta = delta + row * dim;
        gpu_ops()->add_norm(gpu_stream(), &a);
        gpu_get(one, a.out, dim * sizeof *one);
        gpu_get(one + dim, a.x, dim * sizeof *one);
        assert_same_bits("a row of add_norm alone", one, all + row * dim, 1, dim);
        assert_same_bits("a row of x alone", one + dim, all + p.n_out + row * dim, 1, dim);
    }
    gpu_forget();
    mem_free(all);
    mem_free(one);
    mem_free(p.x);
    mem_free(p.delta);
    mem_free(p.out);
    mem_free(p.weight);
}
END_TEST

/* eps keeps the root of a row of zeros away from 0. */
START_TEST(zero_rows_stay_zero)
{
    struct norm_setup s = { .rows = 3, .dim = norm_dims[_i], .kind = NORM_ALONE,
                            .type = DTYPE_F32, .scale = 0 };

    if (gpu_backend())
        compare_norm(&s, 300);
}
END_TEST

/* ---- silu_mul */

static const int silu_dims[] = { 8, 64, 1536, 4864, 12288 };
enum { N_SILU_DIMS = sizeof silu_dims / sizeof silu_dims[0] };

/* Rows of gate and up side by side, of three magnitudes by turns; some zeros, and gates at
 * the ends of the range. */
static float *silu_inputs(struct test_random *r, int rows, int dim)
{
    static const float scales[] = { 1, 4, 100 };
    size_t width = 2 * (size_t)dim;
    float *both = mem_alloc((size_t)rows * width * sizeof *both);

    for (int t = 0; t < rows; t++) {
        float *row = both + (size_t)t * width, scale = scales[t % 3];
        for (size_t i = 0; i < width; i++)
            row[i] = random_below(r, 16) ? random_uniform(r) * scale : 0;
        row[0] = scale;
        row[1] = -scale;
        row[2] = -0.0f;
    }
    round_to_bf16(both, (size_t)rows * width);
    return both;
}

static void compare_silu(int rows, int dim, uint64_t seed)
{
    struct test_random r = test_random(seed);
    struct stream *stream = stream_create(test_backend("auto"));
    size_t n = (size_t)rows * (size_t)dim;
    float *both = silu_inputs(&r, rows, dim), *want = mem_alloc(n * sizeof *want);
    struct silu_mul_args a = { .out = want, .gate = both, .up = both + dim, .rows = rows,
                               .dim = dim, .in_stride = 2 * dim };
    char shape[100];

    backend_ops(test_backend("auto"))->silu_mul(stream, &a);
    finish(stream);
    snprintf(shape, sizeof shape, "silu_mul: %d rows of %d", rows, dim);
    const bf16 *device = gpu_put_act(both, 2 * n);
    a.out = unwritten_act(n);
    a.gate = device;
    a.up = device + dim;
    gpu_ops()->silu_mul(gpu_stream(), &a);
    float *got = get_act(shape, a.out, n);
    assert_rows_near(shape, &(struct row_pair){
        .got = got, .want = want, .rows = (size_t)rows, .dim = (size_t)dim,
        .tolerance = 1e-5 + ACT_ROUNDING });
    gpu_forget();
    mem_free(both);
    mem_free(want);
    mem_free(got);
}

START_TEST(silu_mul_equals_cpu)
{
    if (!gpu_backend())
        return;
    for (int i = 0; i < N_ROW_COUNTS; i++)
        compare_silu(row_counts[i], silu_dims[_i], 400 + (uint64_t)i);
}
END_TEST

/* Every gate that a bf16 can be and that is finite, beside an `up` of 1: relative error
 * of each element, no NaN where exp overflows. */
START_TEST(every_gate)
{
    enum { DIM = 4096, ROWS = 16 };
    static float both[ROWS * 2 * DIM];

    if (!gpu_backend())
        return;
    for (int i = 0; i < ROWS * DIM; i++) {
        float gate = bf16_to_float((bf16)i);
        both[i / DIM * 2 * DIM + i % DIM] = isfinite(gate) ? gate : 0;
        both[i / DIM * 2 * DIM + DIM + i % DIM] = 1;
    }
    const bf16 *device = gpu_put_act(both, ROWS * 2 * DIM);
    struct silu_mul_args a = { .out = unwritten_act(ROWS * DIM), .gate = device,
                               .up = device + DIM, .rows = ROWS, .dim = DIM,
                               .in_stride = 2 * DIM };
    gpu_ops()->silu_mul(gpu_stream(), &a);
    float *got = get_act("every gate", a.out, ROWS * DIM);
    for (int i = 0; i < ROWS * DIM; i++) {
        double g = (double)both[i / DIM * 2 * DIM + i % DIM], want = g / (1 + exp(-g));
        if (!(fabs((double)got[i] - want) <= (1e-5 + ACT_ROUNDING) * fabs(want) + 1e-36))
            ck_abort_msg("silu of %.9g is %.9g, not %.9g", g, (double)got[i], want);
    }
    gpu_forget();
    mem_free(got);
}
END_TEST

/* ---- rope_table */

struct rope_setup {
    int head_dim;
    float theta, factor;
};

static const struct rope_setup ropes[] = {
    { 64, 1e4f, 1 },   { 64, 1e6f, 1.3f },  { 128, 1e6f, 1 },
    { 128, 1e7f, 1.3f }, { 128, 1e5f, 1.3f }, { 16, 1e4f, 1 },
};
enum { N_ROPES = sizeof ropes / sizeof ropes[0] };

static int32_t rope_position(struct test_random *r, int row)
{
    static const int32_t first[] = { 262143, 0, 1, 2, 63, 64, 4095, 131071, 262142, 200003 };
    int n = sizeof first / sizeof first[0];

    return row < n ? first[row] : random_below(r, 262144);
}

static void compare_rope(const struct rope_setup *s, int rows, uint64_t seed)
{
    struct test_random r = test_random(seed);
    struct stream *stream = stream_create(test_backend("auto"));
    size_t n = (size_t)rows * (size_t)s->head_dim;
    int half = s->head_dim / 2;
    float *want = mem_alloc(n * sizeof *want), *got = mem_alloc((n + SPARE) * sizeof *got);
    float *inv_freq = mem_alloc((size_t)half * sizeof *inv_freq);
    int32_t positions[MAX_ROWS];
    struct rope_table_args a = { .cos_sin = want, .positions = positions, .inv_freq = inv_freq,
                                 .factor = s->factor, .rows = rows, .head_dim = s->head_dim };

    for (int i = 0; i < half; i++)
        inv_freq[i] = powf(s->theta, -2.0f * (float)i / (float)s->head_dim);
    for (int t = 0; t < rows; t++)
        positions[t] = rope_position(&r, t);
    backend_ops(test_backend("auto"))->rope_table(stream, &a);
    finish(stream);
    float *device = gpu_put(NULL, (n + SPARE) * sizeof *device);
    a.cos_sin = device;
    a.positions = gpu_put(positions, (size_t)rows * sizeof *positions);
    a.inv_freq = gpu_put(inv_freq, (size_t)half * sizeof *inv_freq);
    gpu_ops()->rope_table(gpu_stream(), &a);
    gpu_get(got, device, (n + SPARE) * sizeof *got);
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)got[i] - (double)want[i]) <= 2 * FLT_EPSILON * (double)s->factor)) {
            int row = (int)i / s->head_dim, column = (int)i % s->head_dim;
            ck_abort_msg("rope_table: %d rows of %d, theta %g, factor %g: row %d (position %d)"
                         ", column %d (frequency %.9g) is %.9g, not %.9g", rows, s->head_dim,
                         (double)s->theta, (double)s->factor, row, positions[row], column,
                         (double)inv_freq[column % half], (double)got[i], (double)want[i]);
        }
    assert_unwritten("rope_table", got + n, SPARE * sizeof *got);
    gpu_forget();
    mem_free(want);
    mem_free(got);
    mem_free(inv_freq);
}

START_TEST(rope_table_equals_cpu)
{
    if (!gpu_backend())
        return;
    for (int i = 0; i < N_ROW_COUNTS; i++)
        compare_rope(&ropes[_i], row_counts[i], 500 + (uint64_t)i);
}
END_TEST

TCase *gpu_elementwise_case(void)
{
    TCase *c = tcase_create("gpu_elementwise");

    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, gpu_clean, NULL);
    tcase_add_loop_test(c, embed_is_exact, 0, N_EMBED_DIMS);
    tcase_add_loop_test(c, add_norm_equals_cpu, 0, N_NORM_DIMS);
    tcase_add_loop_test(c, norm_rows_are_independent, 0, N_NORM_DIMS);
    tcase_add_loop_test(c, zero_rows_stay_zero, 0, N_NORM_DIMS);
    tcase_add_loop_test(c, silu_mul_equals_cpu, 0, N_SILU_DIMS);
    tcase_add_test(c, every_gate);
    tcase_add_loop_test(c, rope_table_equals_cpu, 0, N_ROPES);
    return c;
}
