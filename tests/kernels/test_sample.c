#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "kernels/philox.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const isas[] = { "scalar", "avx2", "avx512" };
enum { N_ISAS = sizeof isas / sizeof isas[0] };

/* ---- the reference: everything sorted, sums in double */

struct entry {
    int32_t id;
    float l;                     /* edited logit; raw where that is asked for */
    double x, p;                 /* l / temperature, probability */
};

static int by_logit(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;

    if (x->l != y->l)
        return x->l > y->l ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static struct entry *sorted(const float *l, int vocab)
{
    struct entry *e = mem_calloc((size_t)vocab, sizeof *e);

    for (int i = 0; i < vocab; i++)
        e[i] = (struct entry){ .id = i, .l = l[i] };
    qsort(e, (size_t)vocab, sizeof *e, by_logit);
    return e;
}

/* x and p of sorted entries. */
static void reference_softmax(struct entry *e, int n, double temperature)
{
    double sum = 0;

    for (int i = 0; i < n; i++) {
        double below = e[i].l == e[0].l ? 0 : (double)e[i].l - (double)e[0].l;
        e[i].x = below / temperature;
        sum += exp(e[i].x);
    }
    for (int i = 0; i < n; i++)
        e[i].p = exp(e[i].x) / sum;
}

/* Steps (2) and (3), in float as the specification's logits are. */
static float *reference_edit(const float *logits, int vocab, const struct sample_params *p)
{
    float *l = mem_alloc((size_t)vocab * sizeof *l);

    memcpy(l, logits, (size_t)vocab * sizeof *l);
    for (int i = 0; i < vocab && p->allowed; i++)
        if (!(p->allowed[i / 32] >> i % 32 & 1))
            l[i] = -INFINITY;
    for (uint32_t i = 0; i < p->n_banned; i++)
        l[p->banned[i]] = -INFINITY;
    for (uint32_t i = 0; i < p->n_bias; i++)
        l[p->bias[i].id] += p->bias[i].bias;
    for (uint32_t i = 0; i < p->n_counts; i++) {
        const struct token_count *c = &p->counts[i];
        float *at = &l[c->id];
        if (c->in_prompt || c->in_output)
            *at = *at > 0 ? *at / p->repetition : *at * p->repetition;
        *at -= p->frequency * (float)c->in_output;
        if (c->in_output)
            *at -= p->presence;
    }
    return l;
}

/* How many of the sorted entries step (4) keeps; slack moves the limits of min_p and
 * top_p, where sums in another order may fall on the other side. */
static int reference_kept(struct entry *e, int vocab, const struct sample_params *p,
                          double slack)
{
    int n = 0, keep = 0;
    double mass = 0, want;

    while (n < vocab && e[n].p >= (double)p->min_p * e[0].p * (1 + slack))
        n++;
    if (n == 0)
        n = 1;
    if (p->top_k > 0 && p->top_k < n)
        for (n = p->top_k; n < vocab && e[n].l == e[p->top_k - 1].l; n++)
            ;
    if (p->top_p >= 1)
        return n;
    for (int i = 0; i < n; i++)
        mass += e[i].p;
    want = mass * (double)p->top_p * (1 + slack);
    for (mass = 0; keep < n && (keep == 0 || mass < want); keep++)
        mass += e[keep].p;
    return keep;
}

static double reference_score(const struct entry *e, const struct sample_params *p)
{
    double u = (sample_bits(p->seed, p->index, e->id) + 0.5) * 0x1p-32;

    return e->x - log(-log(u));
}

/* Whether token is what steps (2) to (5) give; scores closer than 1e-5 may be either. */
static bool reference_token(const float *logits, int vocab, const struct sample_params *p,
                            double slack, int32_t token)
{
    float *l = reference_edit(logits, vocab, p);
    struct entry *e = sorted(l, vocab);
    double best = -INFINITY, own = -INFINITY;
    bool right;

    if (p->temperature < 1e-5f || e[0].l == -INFINITY) {
        right = token == e[0].id;
    } else {
        reference_softmax(e, vocab, (double)p->temperature);
        int n = reference_kept(e, vocab, p, slack);
        for (int i = 0; i < n; i++) {
            double score = reference_score(&e[i], p);
            best = score > best ? score : best;
            own = e[i].id == token ? score : own;
        }
        right = own > best - 1e-5;
    }
    mem_free(e);
    mem_free(l);
    return right;
}

/* Well within the 1e-5 of ops.h, and the rounding of the result. */
static bool near(float got, double want)
{
    return fabs((double)got - want) <= 2e-6 + 1e-7 * fabs(want) ||
           (isinf(want) && got == (float)want);
}

static void check_report(const float *logits, int vocab, const struct sample_params *p,
                         const struct sample_result *got)
{
    struct entry *e = sorted(logits, vocab);
    int n_top = p->n_top < vocab ? p->n_top : vocab, rank = 0;

    reference_softmax(e, vocab, 1);
    for (int i = 0; i < vocab; i++)
        rank += logits[i] >= logits[got->token];
    ck_assert_int_eq(got->rank, rank);
    ck_assert_int_eq(got->n_top, n_top);
    for (int i = 0; i < n_top; i++) {
        ck_assert_int_eq(got->top[i].id, e[i].id);
        ck_assert_msg(near(got->top[i].logprob, log(e[i].p)), "top %d: %g, not %g", i,
                      (double)got->top[i].logprob, log(e[i].p));
    }
    for (int i = 0; i < vocab; i++)
        if (e[i].id == got->token)
            ck_assert_msg(near(got->logprob, log(e[i].p)), "logprob %g, not %g",
                          (double)got->logprob, log(e[i].p));
    mem_free(e);
}

/* Whether the result is right but for sums of step (4) in another order. */
static void check_result(const float *logits, int vocab, const struct sample_params *p,
                         const struct sample_result *got, int *n_borderline)
{
    ck_assert_int_ge(got->token, 0);
    ck_assert_int_lt(got->token, vocab);
    if (p->target >= 0) {
        ck_assert_int_eq(got->token, p->target);
    } else if (!reference_token(logits, vocab, p, 0, got->token)) {
        ck_assert_msg(reference_token(logits, vocab, p, 2e-6, got->token) ||
                          reference_token(logits, vocab, p, -2e-6, got->token),
                      "token %d: vocab %d temperature %g top_p %g top_k %d min_p %g seed %llu",
                      got->token, vocab, (double)p->temperature, (double)p->top_p, p->top_k,
                      (double)p->min_p, (unsigned long long)p->seed);
        ++*n_borderline;
    }
    if (p->n_top >= 0) {
        check_report(logits, vocab, p, got);
    } else {
        ck_assert_int_eq(got->n_top, 0);
        ck_assert_int_eq(got->rank, 0);
        ck_assert_float_eq(got->logprob, 0);
    }
}

/* ---- running */

static const struct sample_params plain = {
    .temperature = 1, .top_p = 1, .repetition = 1, .target = -1, .n_top = -1,
};

static void run(struct backend *be, struct sample_result *out, const float *logits,
                const struct sample_params *p, int rows, int vocab)
{
    struct stream *s = stream_create(be);
    struct sample_args a = { .out = out, .logits = logits, .params = p, .rows = rows,
                             .vocab = vocab };
    struct error err;

    memset(out, 0x5a, (size_t)rows * sizeof *out);
    backend_ops(be)->sample(s, &a);
    ck_assert_int_eq(stream_sync(s, &err), ST_OK);
    stream_destroy(s);
}

static struct sample_result run_one(struct backend *be, const float *logits,
                                    const struct sample_params *p, int vocab)
{
    struct sample_result out;

    run(be, &out, logits, p, 1, vocab);
    return out;
}

/* The fields, whatever the padding. */
static bool same_result(const struct sample_result *a, const struct sample_result *b)
{
    bool same = a->token == b->token && a->rank == b->rank && a->n_top == b->n_top &&
                memcmp(&a->logprob, &b->logprob, sizeof a->logprob) == 0;

    return same && memcmp(a->top, b->top, (size_t)a->n_top * sizeof *a->top) == 0;
}

/* ---- random rows and wishes */

enum { MAX_VOCAB = 3000, MAX_LIST = 40 };

struct wish {
    struct sample_params p;
    struct logit_bias bias[MAX_LIST];
    struct token_count counts[MAX_LIST];
    int32_t banned[MAX_LIST];
    uint32_t allowed[(MAX_VOCAB + 31) / 32];
};

static void random_logits(struct test_random *r, float *l, int vocab)
{
    static const float scales[] = { 0, 0.01f, 1, 3, 10, 100 };
    int kind = random_below(r, 6);

    random_floats(r, l, (size_t)vocab, scales[random_below(r, 6)]);
    for (int i = 0; i < vocab; i++) {
        if (kind == 0)
            l[i] = rintf(l[i]);                        /* ties, zeros of both signs */
        if (kind == 1 && random_below(r, 3))
            l[i] = -INFINITY;
        if (kind == 2)
            l[i] = 4.25f;
        if (kind == 3)
            l[i] = -INFINITY;
        if (kind == 4)
            l[i] += 50;
    }
    if (kind == 3)
        l[random_below(r, vocab)] = random_normal(r);
}

/* From one id or none to all of them. */
static void random_mask(struct test_random *r, uint32_t *allowed, int vocab)
{
    int one_in = 1 << random_below(r, 12);

    memset(allowed, 0, (size_t)(vocab + 31) / 32 * sizeof *allowed);
    for (int i = 0; i < vocab; i++)
        allowed[i / 32] |= (uint32_t)(random_below(r, one_in) == 0) << i % 32;
}

static void random_lists(struct test_random *r, struct wish *w, int vocab)
{
    struct sample_params *p = &w->p;
    int most = vocab < MAX_LIST ? vocab : MAX_LIST;

    p->bias = w->bias;
    p->banned = w->banned;
    p->counts = w->counts;
    p->n_bias = random_below(r, 2) ? random_below(r, most + 1) : 0;
    p->n_banned = random_below(r, 3) == 0 ? random_below(r, most + 1) : 0;
    for (uint32_t i = 0; i < p->n_bias; i++)
        w->bias[i] = (struct logit_bias){ random_below(r, vocab), 10 * random_uniform(r) };
    for (uint32_t i = 0; i < p->n_banned; i++)
        w->banned[i] = random_below(r, vocab);
    if (random_below(r, 3) == 0) {
        random_mask(r, w->allowed, vocab);
        p->allowed = w->allowed;
    }
    if (random_below(r, 2))
        return;
    p->repetition = 1 + 0.4f * random_uniform(r);
    p->frequency = random_below(r, 2) ? random_uniform(r) : 0;
    p->presence = random_below(r, 2) ? 2 * random_uniform(r) : 0;
    p->n_counts = random_below(r, most + 1);
    for (uint32_t i = 0; i < p->n_counts; i++)         /* each id once */
        w->counts[i] = (struct token_count){ (int32_t)i * (vocab / most), random_below(r, 4),
                                             random_below(r, 2) };
}

static void random_wish(struct test_random *r, struct wish *w, int vocab)
{
    static const float temperatures[] = { 0, 1e-6f, 2e-5f, 0.3f, 0.7f, 1, 2, 100 };
    static const float top_ps[] = { 0, 1e-4f, 0.3f, 0.9f, 0.99f, 0.99999f, 1, 1, 1 };
    static const float min_ps[] = { 0, 0, 0, 0, 1e-6f, 0.05f, 0.5f, 1 };
    static const int top_ks[] = { 0, 0, 1, 2, 10, 40, 200, 2999, 3000, 100000 };

    *w = (struct wish){ .p = plain };
    w->p.temperature = temperatures[random_below(r, 8)];
    w->p.top_p = top_ps[random_below(r, 9)];
    w->p.min_p = min_ps[random_below(r, 8)];
    w->p.top_k = top_ks[random_below(r, 10)];
    w->p.seed = random_u64(r);
    w->p.index = (uint32_t)random_below(r, 1000);
    w->p.target = random_below(r, 6) ? -1 : random_below(r, vocab);
    w->p.n_top = random_below(r, SAMPLE_MAX_TOP + 2) - 1;
    random_lists(r, w, vocab);
}

/* ---- tests */

START_TEST(random_rows_equal_reference)
{
    static const int vocabs[] = { 1, 2, 7, 100, 255, 256, 257, 1000, 2999, MAX_VOCAB };
    struct backend *be = test_backend(isas[_i]);
    struct test_random r = test_random(11);
    float *l = mem_alloc(MAX_VOCAB * sizeof *l), *kept = mem_alloc(MAX_VOCAB * sizeof *l);
    int n_borderline = 0;

    for (int k = 0; be && k < 3000; k++) {
        int vocab = vocabs[random_below(&r, 10)];
        struct wish w;
        random_logits(&r, l, vocab);
        random_wish(&r, &w, vocab);
        memcpy(kept, l, (size_t)vocab * sizeof *l);
        struct sample_result got = run_one(be, l, &w.p, vocab);
        check_result(kept, vocab, &w.p, &got, &n_borderline);
    }
    ck_assert_int_le(n_borderline, 3);
    mem_free(l);
    mem_free(kept);
}
END_TEST

/* Large enough that steps of top_p widen and that k exceeds the number of blocks. */
START_TEST(large_vocabularies_equal_reference)
{
    enum { VOCAB = 70001 };
    static const struct { float scale, temperature, top_p, min_p; int top_k; } rows[] = {
        { 3, 1, 1, 0, 0 },        { 3, 1, 0.95f, 0, 0 },      { 3, 0.7f, 0.95f, 0, 50 },
        { 0.01f, 1, 1, 0, 0 },    { 0.01f, 1, 0.9f, 0, 0 },   { 0.5f, 1, 0.999f, 0, 5000 },
        { 3, 2, 0.999f, 0, 0 },   { 6, 1, 0.9999f, 1e-4f, 0 }, { 0, 1, 0.5f, 0, 0 },
        { 0, 1, 1, 0, 3 },        { 30, 5, 0.99f, 0, 0 },     { 3, 100, 0.5f, 0.99f, 40000 },
    };
    struct backend *be = test_backend(isas[_i]);
    struct test_random r = test_random(12);
    float *l = mem_alloc(VOCAB * sizeof *l), *kept = mem_alloc(VOCAB * sizeof *l);
    int n_borderline = 0;

    for (size_t k = 0; be && k < sizeof rows / sizeof rows[0]; k++) {
        struct sample_params p = plain;
        p.temperature = rows[k].temperature;
        p.top_p = rows[k].top_p;
        p.min_p = rows[k].min_p;
        p.top_k = rows[k].top_k;
        p.seed = random_u64(&r);
        p.n_top = (int32_t)k;
        random_floats(&r, l, VOCAB, rows[k].scale);
        memcpy(kept, l, VOCAB * sizeof *l);
        struct sample_result got = run_one(be, l, &p, VOCAB);
        check_result(kept, VOCAB, &p, &got, &n_borderline);
    }
    mem_free(l);
    mem_free(kept);
}
END_TEST

/* One batch against the same rows alone, on two workers and on one, and against another
 * instruction set, whose tokens are the same. */
START_TEST(batches_change_nothing)
{
    enum { ROWS = 64, VOCAB = 1500 };
    struct backend_options one_thread = { .threads = 1, .isa = isas[_i] };
    struct backend *be = test_backend(isas[_i]), *lone = NULL;
    struct test_random r = test_random(13);
    struct wish *w = mem_calloc(ROWS, sizeof *w);
    struct sample_params p[ROWS];
    struct sample_result all[ROWS], scalar[ROWS];
    float *l = mem_alloc(ROWS * VOCAB * sizeof *l);
    float *fresh = mem_alloc(ROWS * VOCAB * sizeof *l);

    for (int i = 0; i < ROWS; i++) {
        random_logits(&r, fresh + i * VOCAB, VOCAB);
        random_wish(&r, &w[i], VOCAB);
        p[i] = w[i].p;
    }
    memcpy(l, fresh, ROWS * VOCAB * sizeof *l);
    run(test_backend("scalar"), scalar, l, p, ROWS, VOCAB);
    if (be) {
        ck_assert_int_eq(backend_open(&lone, "cpu", &one_thread, NULL), ST_OK);
        memcpy(l, fresh, ROWS * VOCAB * sizeof *l);
        run(be, all, l, p, ROWS, VOCAB);
    }
    for (int i = 0; be && i < ROWS; i++) {
        memcpy(l, fresh, ROWS * VOCAB * sizeof *l);
        struct sample_result own = run_one(lone, l + i * VOCAB, &p[i], VOCAB);
        ck_assert_msg(same_result(&own, &all[i]), "row %d", i);
        ck_assert_int_eq(scalar[i].token, all[i].token);
    }
    backend_close(lone);
    mem_free(w);
    mem_free(l);
    mem_free(fresh);
}
END_TEST

/* A draw depends on seed and index, and repeats. */
START_TEST(draws_repeat)
{
    enum { VOCAB = 1000, N = 200 };
    struct backend *be = test_backend("auto");
    float l[VOCAB] = { 0 };
    int same_index = 0, same_seed = 0;

    for (int i = 0; i < N; i++) {
        struct sample_params p = plain, index = plain, seed = plain;
        p.seed = index.seed = 0x123456789abcdef0 + (uint64_t)i;
        p.index = seed.index = (uint32_t)i;
        index.index = (uint32_t)i + 1;
        seed.seed = p.seed ^ 1ull << 40;               /* the upper half of the key */
        int32_t token = run_one(be, l, &p, VOCAB).token;
        ck_assert_int_eq(run_one(be, l, &p, VOCAB).token, token);
        same_index += run_one(be, l, &index, VOCAB).token == token;
        same_seed += run_one(be, l, &seed, VOCAB).token == token;
    }
    ck_assert_int_le(same_index, 4);                   /* 0.2 expected */
    ck_assert_int_le(same_seed, 4);
}
END_TEST

/* Pearson's statistic of drawn counts; cells of few expected draws are thrown together. */
static double chi_square(const int *count, const double *p, int n, int draws, int *freedom)
{
    double sum = 0, rest_p = 0;
    int rest = 0, cells = 0;

    for (int i = 0; i < n; i++) {
        double want = p[i] * draws;
        if (want < 10) {
            ck_assert(p[i] > 0 || count[i] == 0);
            rest += count[i];
            rest_p += p[i];
            continue;
        }
        sum += (count[i] - want) * (count[i] - want) / want;
        cells++;
    }
    if (rest_p * draws >= 1) {
        sum += (rest - rest_p * draws) * (rest - rest_p * draws) / (rest_p * draws);
        cells++;
    }
    *freedom = cells - 1;
    return sum;
}

static void count_draws(int *count, const float *l, const struct sample_params *base, int vocab,
                        int draws)
{
    enum { ROWS = 500 };
    float *logits = mem_alloc((size_t)(ROWS * vocab) * sizeof *logits);
    struct sample_params p[ROWS];
    struct sample_result out[ROWS];

    for (int done = 0; done < draws; done += ROWS) {
        for (int i = 0; i < ROWS; i++) {
            memcpy(logits + i * vocab, l, (size_t)vocab * sizeof *l);
            p[i] = *base;
            p[i].index = (uint32_t)(done + i);
        }
        run(test_backend("auto"), out, logits, p, ROWS, vocab);
        for (int i = 0; i < ROWS; i++)
            count[out[i].token]++;
    }
    mem_free(logits);
}

/* Fixed seeds, so the outcome is fixed; the limit is 4 standard deviations. */
START_TEST(draws_follow_the_softmax)
{
    static const struct {
        int vocab;
        float scale, temperature, top_p, min_p;
        int top_k;
    } t[] = {
        { 2, 1, 1, 1, 0, 0 },      { 40, 1, 1, 1, 0, 0 },     { 300, 2, 0.8f, 1, 0, 0 },
        { 300, 2, 1, 0.8f, 0, 0 }, { 300, 1, 1.5f, 1, 0, 20 }, { 300, 2, 1, 1, 0.1f, 0 },
        { 600, 0, 1, 1, 0, 0 },    { 40, 2, 1, 0.9f, 0.02f, 30 },
    };
    enum { DRAWS = 40000 };
    const int vocab = t[_i].vocab;
    struct test_random r = test_random((uint64_t)_i + 100);
    struct sample_params p = plain;
    float l[600];
    double want[600] = { 0 }, kept = 0;
    int count[600] = { 0 }, freedom;

    p.temperature = t[_i].temperature;
    p.top_p = t[_i].top_p;
    p.min_p = t[_i].min_p;
    p.top_k = t[_i].top_k;
    p.seed = random_u64(&r);
    random_floats(&r, l, (size_t)vocab, t[_i].scale);
    struct entry *e = sorted(l, vocab);
    reference_softmax(e, vocab, (double)p.temperature);
    int n = reference_kept(e, vocab, &p, 0);
    for (int i = 0; i < n; i++)
        kept += e[i].p;
    for (int i = 0; i < n; i++)
        want[e[i].id] = e[i].p / kept;
    count_draws(count, l, &p, vocab, DRAWS);
    double chi = chi_square(count, want, vocab, DRAWS, &freedom);
    ck_assert_msg(chi < freedom + 4 * sqrt(2.0 * freedom), "chi-square %g, %d degrees", chi,
                  freedom);
    mem_free(e);
}
END_TEST

/* Ten thousand ids of a hundred-millionth each are drawn once in ten thousand times
 * together: the draw has more than 24 bits. */
START_TEST(rare_ids_are_drawn)
{
    enum { VOCAB = 10001, DRAWS = 30000 };
    float *l = mem_alloc(VOCAB * sizeof *l);
    int *count = mem_calloc(VOCAB, sizeof *count);
    struct sample_params p = plain;

    for (int i = 0; i < VOCAB; i++)
        l[i] = i == 5000 ? 0 : -18.42068f;
    p.seed = 77;
    count_draws(count, l, &p, VOCAB, DRAWS);
    ck_assert_int_ge(DRAWS - count[5000], 1);
    ck_assert_int_le(DRAWS - count[5000], 9);          /* 3 expected */
    mem_free(l);
    mem_free(count);
}
END_TEST

START_TEST(nan_gives_no_token)
{
    struct backend *be = test_backend(isas[_i]);
    enum { VOCAB = 600 };
    static const int at[] = { 0, 15, 16, 255, 256, 598, 599 };

    for (size_t k = 0; be && k < sizeof at / sizeof at[0]; k++)
        for (int how = 0; how < 4; how++) {
            float l[VOCAB];
            int32_t banned = at[k];
            struct sample_params p = plain;
            for (int i = 0; i < VOCAB; i++)
                l[i] = (float)i;
            l[at[k]] = how & 1 ? -NAN : NAN;
            p.temperature = how < 2 ? 0 : 1;
            p.n_top = 3;
            p.target = how == 3 ? 5 : -1;
            p.banned = &banned;
            p.n_banned = 1;                            /* hidden, but not from us */
            struct sample_result got = run_one(be, l, &p, VOCAB);
            ck_assert_int_eq(got.token, -1);
            ck_assert_int_eq(got.n_top, 0);
            ck_assert_int_eq(got.rank, 0);
        }
}
END_TEST

/* A NaN that the edits make. */
START_TEST(infinity_less_infinity_gives_no_token)
{
    float l[3] = { 0, INFINITY, 1 };
    struct logit_bias bias = { 1, -INFINITY };
    struct sample_params p = plain;

    p.bias = &bias;
    p.n_bias = 1;
    ck_assert_int_eq(run_one(test_backend("auto"), l, &p, 3).token, -1);
}
END_TEST

START_TEST(infinite_logits_share_the_mass)
{
    enum { VOCAB = 300 };
    struct backend *be = test_backend(isas[_i]);
    struct sample_params p = plain;
    int32_t first = 100, seen[2] = { 0, 0 };

    p.n_top = 3;
    for (int k = 0; be && k < 200; k++) {
        float l[VOCAB] = { [100] = INFINITY, [299] = INFINITY, [7] = -INFINITY };
        p.index = (uint32_t)k;
        p.temperature = k == 0 ? 0 : 1;
        p.top_p = k & 1 ? 1 : 0.9f;
        struct sample_result got = run_one(be, l, &p, VOCAB);
        ck_assert(got.token == 100 || got.token == 299);
        seen[got.token == 299]++;
        ck_assert(near(got.logprob, log(0.5)));
        ck_assert_int_eq(got.rank, 2);
        ck_assert_int_eq(got.top[0].id, 100);
        ck_assert_int_eq(got.top[1].id, 299);
        ck_assert_int_eq(got.top[2].id, 0);
        ck_assert(isinf(got.top[2].logprob) && got.top[2].logprob < 0);
    }
    ck_assert(!be || (seen[0] > 60 && seen[1] > 60));
    p.banned = &first;
    p.n_banned = 1;
    for (int k = 0; be && k < 20; k++) {
        float l[VOCAB] = { [100] = INFINITY, [299] = INFINITY };
        p.index = (uint32_t)k;
        ck_assert_int_eq(run_one(be, l, &p, VOCAB).token, 299);
    }
}
END_TEST

/* All banned, none allowed, or all -inf to begin with: id 0, however it is asked for. */
START_TEST(nothing_left_gives_the_lowest_id)
{
    enum { VOCAB = 270 };
    static const uint32_t none[(VOCAB + 31) / 32];
    int32_t banned[VOCAB];

    for (int i = 0; i < VOCAB; i++)
        banned[i] = i;
    for (uint32_t k = 0; k < 32; k++) {
        float l[VOCAB];
        struct sample_params p = plain;
        for (int i = 0; i < VOCAB; i++)
            l[i] = k & 1 ? -INFINITY : (float)(i % 9);
        p.temperature = k & 2 ? 0 : 1;
        p.top_k = k & 4 ? 5 : 0;
        p.top_p = k & 8 ? 0.5f : 1;
        p.index = k;
        p.n_top = 2;
        p.banned = banned;
        p.n_banned = k & 16 ? 0 : VOCAB;
        p.allowed = k & 16 && !(k & 1) ? none : NULL;
        struct sample_result got = run_one(test_backend("auto"), l, &p, VOCAB);
        ck_assert_int_eq(got.token, 0);
        ck_assert_int_eq(got.n_top, 2);
        ck_assert(near(got.top[1].logprob,
                       k & 1 ? -log(VOCAB) : (double)got.top[0].logprob));
    }
}
END_TEST

/* Ties at the ends of the prefixes: top_k keeps them, top_p takes the lower ids. */
START_TEST(ties_are_kept_by_top_k_and_cut_by_top_p)
{
    enum { VOCAB = 1000, DRAWS = 2000 };
    float l[VOCAB];
    int drawn[VOCAB] = { 0 }, n_drawn = 0;
    struct sample_params p = plain;

    for (int i = 0; i < VOCAB; i++)
        l[i] = i % 100 == 3 ? 2 : i % 100 == 4 ? 1 : -20;
    p.top_k = 12;                                      /* 10 twos, then 10 tied ones */
    count_draws(drawn, l, &p, VOCAB, DRAWS);
    for (int i = 0; i < VOCAB; i++) {
        ck_assert(drawn[i] == 0 || l[i] > 0);
        n_drawn += drawn[i] > 0;
    }
    ck_assert_int_eq(n_drawn, 20);

    memset(drawn, 0, sizeof drawn);
    p.top_k = 0;
    p.top_p = 0.35f;                /* each two has 0.0731: the first five of them */
    count_draws(drawn, l, &p, VOCAB, DRAWS);
    for (int i = 0; i < VOCAB; i++)
        ck_assert_int_eq(drawn[i] > 0, i % 100 == 3 && i < 500);
}
END_TEST

TCase *sample_case(void)
{
    TCase *c = tcase_create("sample");

    tcase_set_timeout(c, 60);
    tcase_add_loop_test(c, random_rows_equal_reference, 0, N_ISAS);
    tcase_add_loop_test(c, large_vocabularies_equal_reference, 0, N_ISAS);
    tcase_add_loop_test(c, batches_change_nothing, 0, N_ISAS);
    tcase_add_test(c, draws_repeat);
    tcase_add_loop_test(c, draws_follow_the_softmax, 0, 8);
    tcase_add_test(c, rare_ids_are_drawn);
    tcase_add_loop_test(c, nan_gives_no_token, 0, N_ISAS);
    tcase_add_test(c, infinity_less_infinity_gives_no_token);
    tcase_add_loop_test(c, infinite_logits_share_the_mass, 0, N_ISAS);
    tcase_add_test(c, nothing_left_gives_the_lowest_id);
    tcase_add_test(c, ties_are_kept_by_top_k_and_cut_by_top_p);
    return c;
}
