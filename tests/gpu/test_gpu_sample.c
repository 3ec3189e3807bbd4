#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "kernels/philox.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/gpu_fixture.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static const struct sample_params plain = {
    .temperature = 1, .top_p = 1, .repetition = 1, .target = -1, .n_top = -1,
};

/* ---- running */

static void run_cpu(struct sample_result *out, const float *logits,
                    const struct sample_params *p, int rows, int vocab)
{
    struct backend *be = test_backend("scalar");
    struct stream *s = stream_create(be);
    size_t bytes = (size_t)rows * (size_t)vocab * sizeof *logits;
    float *own = mem_alloc(bytes);             /* the call may change them */

    memcpy(own, logits, bytes);
    backend_ops(be)->sample(s, &(struct sample_args){
        .out = out, .logits = own, .params = p, .rows = rows, .vocab = vocab });
    ck_assert_int_eq(stream_sync(s, NULL), ST_OK);
    stream_destroy(s);
    mem_free(own);
}

/* Queue a call on logits of the device; the results come with the next synchronisation. */
static void queue_gpu(struct sample_result *out, const float *device,
                      const struct sample_params *p, int rows, int vocab)
{
    memset(out, 0x5a, (size_t)rows * sizeof *out);
    gpu_ops()->sample(gpu_stream(), &(struct sample_args){
        .out = out, .logits = device, .params = p, .rows = rows, .vocab = vocab });
}

static void run_gpu(struct sample_result *out, const float *logits,
                    const struct sample_params *p, int rows, int vocab)
{
    const float *own = gpu_put(logits, (size_t)rows * (size_t)vocab * sizeof *logits);

    queue_gpu(out, own, p, rows, vocab);
    gpu_forget();
}

static bool same_result(const struct sample_result *a, const struct sample_result *b)
{
    bool same = a->token == b->token && a->rank == b->rank && a->n_top == b->n_top &&
                memcmp(&a->logprob, &b->logprob, sizeof a->logprob) == 0;

    return same && memcmp(a->top, b->top, (size_t)a->n_top * sizeof *a->top) == 0;
}

/* ---- comparing */

static float edited(const float *l, const struct sample_params *p, int32_t id)
{
    float v = p->allowed && !(p->allowed[id / 32] >> id % 32 & 1) ? -INFINITY : l[id];

    for (uint32_t i = 0; i < p->n_banned; i++)
        v = p->banned[i] == id ? -INFINITY : v;
    for (uint32_t i = 0; i < p->n_bias; i++)
        v = p->bias[i].id == id ? v + p->bias[i].bias : v;
    for (uint32_t i = 0; i < p->n_counts; i++) {
        const struct token_count *c = &p->counts[i];
        if (c->id != id)
            continue;
        if (c->in_prompt || c->in_output)
            v = v > 0 ? v / p->repetition : v * p->repetition;
        v -= p->frequency * (float)c->in_output;
        v -= c->in_output ? p->presence : 0;
    }
    return v;
}

/* Step (5), but for what is the same for all ids. */
static double score(const float *l, const struct sample_params *p, int32_t id)
{
    double u = (sample_bits(p->seed, p->index, id) + 0.5) * 0x1p-32;

    return (double)edited(l, p, id) / (double)p->temperature - log(-log(u));
}

/* Whether another token than the CPU's is allowed: scores closer than 1e-5, or an end of
 * top_p so close that sums in another order move it. */
static bool borderline(const float *l, int vocab, const struct sample_params *p, int32_t cpu,
                       int32_t gpu)
{
    struct sample_params near = *p;
    struct sample_result r;

    if (p->target >= 0 || p->temperature < 1e-5f || cpu < 0 || gpu < 0 || gpu >= vocab)
        return false;
    if (fabs(score(l, p, cpu) - score(l, p, gpu)) < 1e-5)
        return true;
    for (int side = -1; side <= 1; side += 2) {
        near.top_p = p->top_p * (1 + (float)side * 2e-6f);
        run_cpu(&r, l, &near, 1, vocab);
        if (r.token == gpu)
            return true;
    }
    return false;
}

static bool near(float got, float want)
{
    return got == want || fabs((double)got - (double)want) <= 1e-5 + 2e-7 * fabs((double)want);
}

static void describe(const char *what, int row, int vocab, const struct sample_params *p)
{
    printf("sample row %d: %s\n  vocab %d temperature %.9g top_p %.9g top_k %d min_p %.9g "
           "target %d n_top %d seed %llu index %u lists %u %u %u%s penalties %g %g %g\n",
           row, what, vocab, (double)p->temperature, (double)p->top_p, p->top_k,
           (double)p->min_p, p->target, p->n_top, (unsigned long long)p->seed, p->index,
           p->n_banned, p->n_bias, p->n_counts, p->allowed ? " and a mask" : "",
           (double)p->repetition, (double)p->frequency,
           (double)p->presence);
}

/* False, and says why, where the logprobs are not the CPU's; of the top only if the token
 * differs too. */
static bool same_report(const struct sample_result *cpu, const struct sample_result *gpu,
                        bool same_token)
{
    bool right = gpu->n_top == cpu->n_top;

    if (same_token && (gpu->rank != cpu->rank || !near(gpu->logprob, cpu->logprob))) {
        printf("rank %d, not %d; logprob %.9g, not %.9g\n", gpu->rank, cpu->rank,
               (double)gpu->logprob, (double)cpu->logprob);
        right = false;
    }
    for (int i = 0; i < cpu->n_top && right; i++)
        if (gpu->top[i].id != cpu->top[i].id ||
            !near(gpu->top[i].logprob, cpu->top[i].logprob)) {
            printf("top %d: id %d logprob %.9g, not id %d logprob %.9g\n", i, gpu->top[i].id,
                   (double)gpu->top[i].logprob, cpu->top[i].id, (double)cpu->top[i].logprob);
            right = false;
        }
    return right;
}

/* Run the rows on both; how many tokens were borderline. */
static int compare_rows(const float *l, const struct sample_params *p, int rows, int vocab)
{
    struct sample_result *cpu = mem_calloc((size_t)rows, sizeof *cpu);
    struct sample_result *gpu = mem_calloc((size_t)rows, sizeof *gpu);
    int n_wrong = 0, n_borderline = 0;

    run_cpu(cpu, l, p, rows, vocab);
    run_gpu(gpu, l, p, rows, vocab);
    for (int i = 0; i < rows; i++) {
        const float *row = l + (size_t)i * (size_t)vocab;
        bool same = cpu[i].token == gpu[i].token;
        bool allowed = same || borderline(row, vocab, &p[i], cpu[i].token, gpu[i].token);
        n_borderline += !same && allowed;
        if (!allowed)
            printf("token %d, not %d\n", gpu[i].token, cpu[i].token);
        if (!same_report(&cpu[i], &gpu[i], same) || !allowed) {
            describe("differs from the CPU", i, vocab, &p[i]);
            n_wrong++;
        }
    }
    ck_assert_msg(n_wrong == 0, "%d of %d rows of %d logits are wrong", n_wrong, rows, vocab);
    mem_free(cpu);
    mem_free(gpu);
    return n_borderline;
}

/* ---- random rows and wishes */

enum { MAX_LIST = 40, MAX_VOCAB = 3000 };

struct wish {
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
    if (random_below(r, 40) == 0)
        l[random_below(r, vocab)] = INFINITY;
    if (random_below(r, 40) == 0)
        l[random_below(r, vocab)] = NAN;
    if (random_below(r, 40) == 0)
        l[random_below(r, vocab)] = -3e38f;
}

/* From one id or none to all of them. */
static void random_mask(struct test_random *r, uint32_t *allowed, int vocab)
{
    int one_in = 1 << random_below(r, 12);

    memset(allowed, 0, (size_t)(vocab + 31) / 32 * sizeof *allowed);
    for (int i = 0; i < vocab; i++)
        allowed[i / 32] |= (uint32_t)(random_below(r, one_in) == 0) << i % 32;
}

static void random_lists(struct test_random *r, struct sample_params *p, struct wish *w,
                         int vocab)
{
    int most = vocab < MAX_LIST ? vocab : MAX_LIST;

    p->bias = w->bias;
    p->banned = w->banned;
    p->counts = w->counts;
    p->n_bias = random_below(r, 2) ? (uint32_t)random_below(r, most + 1) : 0;
    p->n_banned = random_below(r, 3) == 0 ? (uint32_t)random_below(r, most + 1) : 0;
    for (uint32_t i = 0; i < p->n_bias; i++)           /* an id may come twice */
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
    p->n_counts = (uint32_t)random_below(r, most + 1);
    for (uint32_t i = 0; i < p->n_counts; i++)         /* each id once */
        w->counts[i] = (struct token_count){ (int32_t)i * (vocab / most),
                                             (uint32_t)random_below(r, 4),
                                             random_below(r, 2) };
}

static void random_params(struct test_random *r, struct sample_params *p, struct wish *w,
                          int vocab)
{
    static const float temperatures[] = { 0, 1e-6f, 2e-5f, 0.3f, 0.7f, 1, 2, 100 };
    static const float top_ps[] = { 0, 1e-4f, 0.3f, 0.9f, 0.99f, 0.99999f, 1, 1, 1 };
    static const float min_ps[] = { 0, 0, 0, 0, 1e-6f, 0.05f, 0.5f, 1 };
    static const int top_ks[] = { 0, 0, 1, 2, 10, 40, 200, 2999, 3000, 100000 };

    *p = plain;
    p->temperature = temperatures[random_below(r, 8)];
    p->top_p = top_ps[random_below(r, 9)];
    p->min_p = min_ps[random_below(r, 8)];
    p->top_k = top_ks[random_below(r, 10)];
    p->seed = random_u64(r);
    p->index = (uint32_t)random_below(r, 1000);
    p->target = random_below(r, 6) ? -1 : random_below(r, vocab);
    p->n_top = random_below(r, 3) ? random_below(r, SAMPLE_MAX_TOP + 2) - 1 : -1;
    if (random_below(r, 2))
        random_lists(r, p, w, vocab);
}

/* ---- against the CPU */

START_TEST(random_rows_equal_cpu)
{
    static const int vocabs[] = { 1, 2, 7, 100, 255, 256, 257, 1000, 1023, 1025, 2999, 3000 };
    enum { ROWS = 64 };
    struct test_random r = test_random(21);
    struct wish *w = mem_calloc(ROWS, sizeof *w);
    struct sample_params p[ROWS];
    float *l = mem_alloc(ROWS * 3000 * sizeof *l);
    int n_borderline = 0, n_rows = 0;

    for (int k = 0; gpu_backend() && k < 72; k++) {
        int vocab = vocabs[k % 12], rows = k % 3 ? 1 + random_below(&r, ROWS) : ROWS;
        for (int i = 0; i < rows; i++) {
            random_logits(&r, l + i * vocab, vocab);
            random_params(&r, &p[i], &w[i], vocab);
        }
        n_borderline += compare_rows(l, p, rows, vocab);
        n_rows += rows;
    }
    ck_assert_msg(n_borderline <= 3, "%d of %d rows are borderline", n_borderline, n_rows);
    mem_free(w);
    mem_free(l);
}
END_TEST

static const int large_vocabs[] = { 70001, 151936, 262144 };

/* Long prefixes, borders longer than any list, and the settings that people use. */
START_TEST(large_vocabularies_equal_cpu)
{
    static const struct {
        float scale, temperature, top_p, min_p;
        int top_k, n_top;
    } t[] = {
        { 3, 0, 1, 0, 0, -1 },          { 3, 1, 1, 0, 0, 5 },
        { 3, 1, 0.95f, 0, 0, -1 },      { 3, 0.7f, 0.95f, 0, 50, 20 },
        { 0.01f, 1, 1, 0, 0, -1 },      { 0.01f, 1, 0.9f, 0, 0, 7 },
        { 0.5f, 1, 0.999f, 0, 5000, -1 }, { 3, 2, 0.999f, 0, 0, 0 },
        { 6, 1, 0.9999f, 1e-4f, 0, -1 }, { 0, 1, 0.5f, 0, 0, 20 },
        { 0, 1, 1, 0, 3, -1 },          { 30, 5, 0.99f, 0, 0, 20 },
        { 3, 100, 0.5f, 0.99f, 40000, -1 }, { 3, 100, 0.9f, 0, 30000, 1 },
        { 9, 1, 0.9f, 0, 40, 20 },      { 3, 0.05f, 0.9f, 0, 1000, 2 },
    };
    enum { ROWS = sizeof t / sizeof t[0] };
    const int vocab = large_vocabs[_i];
    struct test_random r = test_random((uint64_t)_i + 22);
    struct sample_params p[ROWS];
    float *l = mem_alloc((size_t)ROWS * (size_t)vocab * sizeof *l);

    for (int i = 0; i < ROWS; i++) {
        p[i] = plain;
        p[i].temperature = t[i].temperature;
        p[i].top_p = t[i].top_p;
        p[i].min_p = t[i].min_p;
        p[i].top_k = t[i].top_k;
        p[i].n_top = t[i].n_top;
        p[i].seed = random_u64(&r);
        random_floats(&r, l + (size_t)i * (size_t)vocab, (size_t)vocab, t[i].scale);
    }
    if (gpu_backend()) {
        ck_assert_int_le(compare_rows(l, p, ROWS, vocab), 1);
        for (int i = 0; i < ROWS; i++)                 /* cut into other chunks */
            compare_rows(l + (size_t)i * (size_t)vocab, p + i, 1, vocab);
    }
    mem_free(l);
}
END_TEST

/* As many counts as a long context has, biases and bans that meet, with and without
 * logprobs, which are of the logits before all that. */
START_TEST(long_lists_equal_cpu)
{
    enum { VOCAB = 151936, ROWS = 6, N_COUNTS = 20000, N_BIAS = 1000, N_BANNED = 300 };
    struct test_random r = test_random(23);
    float *l = mem_alloc(ROWS * VOCAB * sizeof *l);
    struct logit_bias *bias = mem_calloc(ROWS * N_BIAS, sizeof *bias);
    struct token_count *counts = mem_calloc(ROWS * N_COUNTS, sizeof *counts);
    int32_t *banned = mem_calloc(ROWS * N_BANNED, sizeof *banned);
    struct sample_params p[ROWS];

    random_floats(&r, l, ROWS * VOCAB, 3);
    for (int i = 0; i < ROWS * N_BIAS; i++)
        bias[i] = (struct logit_bias){ random_below(&r, 500), random_uniform(&r) };
    for (int i = 0; i < ROWS * N_BANNED; i++)
        banned[i] = random_below(&r, 1000);
    for (int i = 0; i < ROWS * N_COUNTS; i++)
        counts[i] = (struct token_count){ i % N_COUNTS * 7, (uint32_t)random_below(&r, 5),
                                          random_below(&r, 2) };
    for (int i = 0; i < ROWS; i++) {
        p[i] = plain;
        p[i].temperature = (float)i / 4;
        p[i].top_k = i & 1 ? 100 : 0;
        p[i].seed = random_u64(&r);
        p[i].n_top = i < 3 ? -1 : i;
        p[i].repetition = 1.1f;
        p[i].presence = 0.5f;
        p[i].frequency = 0.25f;
        p[i].bias = bias + i * N_BIAS;
        p[i].banned = banned + i * N_BANNED;
        p[i].counts = counts + i * N_COUNTS;
        p[i].n_bias = N_BIAS;
        p[i].n_banned = N_BANNED;
        p[i].n_counts = N_COUNTS;
    }
    if (gpu_backend())
        ck_assert_int_le(compare_rows(l, p, ROWS, VOCAB), 1);
    mem_free(l);
    mem_free(bias);
    mem_free(counts);
    mem_free(banned);
}
END_TEST

/* ---- calls */

/* A row's result is the same in every bit alone, in a batch and in another order. */
START_TEST(batches_change_nothing)
{
    static const int vocabs[] = { 1500, 40000 };
    enum { ROWS = 96 };
    const int vocab = vocabs[_i];
    struct test_random r = test_random(24);
    struct wish *w = mem_calloc(ROWS, sizeof *w);
    struct sample_params p[ROWS], turned[ROWS];
    struct sample_result all[ROWS], other[ROWS], own;
    size_t row = (size_t)vocab;
    float *l = mem_alloc(ROWS * row * sizeof *l), *back = mem_alloc(ROWS * row * sizeof *l);

    for (int i = 0; i < ROWS; i++) {
        random_logits(&r, l + (size_t)i * row, vocab);
        random_params(&r, &p[i], &w[i], vocab);
        turned[ROWS - 1 - i] = p[i];
        memcpy(back + (size_t)(ROWS - 1 - i) * row, l + (size_t)i * row, row * sizeof *l);
    }
    if (gpu_backend()) {
        run_gpu(all, l, p, ROWS, vocab);
        run_gpu(other, back, turned, ROWS, vocab);
    }
    for (int i = 0; gpu_backend() && i < ROWS; i++) {
        run_gpu(&own, l + (size_t)i * row, &p[i], 1, vocab);
        if (!same_result(&own, &all[i]) || !same_result(&own, &other[ROWS - 1 - i])) {
            describe("depends on the batch", i, vocab, &p[i]);
            ck_abort_msg("row %d: token %d alone, %d and %d with others", i, own.token,
                         all[i].token, other[ROWS - 1 - i].token);
        }
    }
    mem_free(w);
    mem_free(l);
    mem_free(back);
}
END_TEST

/* Calls that need more and more of everything, and little again, on one stream. */
START_TEST(calls_grow_and_shrink)
{
    static const int rows[] = { 1, 3, 1, 20, 2, 64, 64, 1, 256, 5 };
    static const int vocabs[] = { 10, 3000, 500, 3000, 20000, 2000, 100, 40000, 700, 3 };
    struct test_random r = test_random(25);
    struct wish *w = mem_calloc(256, sizeof *w);
    struct sample_params *p = mem_calloc(256, sizeof *p);
    int n_borderline = 0;

    for (int k = 0; gpu_backend() && k < 10; k++) {
        float *l = mem_alloc((size_t)rows[k] * (size_t)vocabs[k] * sizeof *l);
        for (int i = 0; i < rows[k]; i++) {
            random_logits(&r, l + (size_t)i * (size_t)vocabs[k], vocabs[k]);
            random_params(&r, &p[i], &w[i], vocabs[k]);
        }
        n_borderline += compare_rows(l, p, rows[k], vocabs[k]);
        mem_free(l);
    }
    ck_assert_int_le(n_borderline, 1);
    mem_free(w);
    mem_free(p);
}
END_TEST

/* Calls queued behind each other do not disturb each other's parameters, and repeat. */
START_TEST(calls_may_queue)
{
    enum { CALLS = 12, ROWS = 16, VOCAB = 5000 };
    struct test_random r = test_random(26);
    struct wish *w = mem_calloc(ROWS, sizeof *w);
    struct sample_params p[ROWS];
    struct sample_result first[ROWS];
    float *l = mem_alloc(ROWS * VOCAB * sizeof *l);
    struct buffer pinned = { 0 };
    const float *own[CALLS];

    for (int i = 0; i < ROWS; i++) {
        random_logits(&r, l + i * VOCAB, VOCAB);
        random_params(&r, &p[i], &w[i], VOCAB);
    }
    if (gpu_backend()) {
        run_gpu(first, l, p, ROWS, VOCAB);
        ck_assert_int_eq(buffer_alloc(gpu_backend(), &pinned, MEM_PINNED,
                                      CALLS * ROWS * sizeof *first), ST_OK);
    }
    struct sample_result *out = pinned.base;
    for (int k = 0; out && k < CALLS; k++)             /* call k has rows k .. */
        own[k] = gpu_put(l + k * VOCAB, (size_t)((ROWS - k) * VOCAB) * sizeof *l);
    for (int k = 0; out && k < CALLS; k++)
        queue_gpu(out + k * ROWS, own[k], p + k, ROWS - k, VOCAB);
    if (out)
        gpu_forget();
    for (int k = 0; out && k < CALLS; k++)
        for (int i = k; i < ROWS; i++)
            if (!same_result(&out[k * ROWS + i - k], &first[i])) {
                describe("changes when calls queue", i, VOCAB, &p[i]);
                ck_abort_msg("call %d row %d", k, i);
            }
    if (out)
        buffer_free(gpu_backend(), &pinned);
    mem_free(w);
    mem_free(l);
}
END_TEST

/* ---- edges */

START_TEST(nan_gives_no_token)
{
    static const int at[] = { 0, 15, 16, 255, 256, 1500, 1598, 1599 };
    enum { VOCAB = 1600 };

    for (size_t k = 0; gpu_backend() && k < sizeof at / sizeof at[0]; k++)
        for (int how = 0; how < 5; how++) {
            float l[VOCAB];
            int32_t banned = at[k];
            struct sample_params p = plain;
            struct sample_result got;
            for (int i = 0; i < VOCAB; i++)
                l[i] = (float)i;
            l[at[k]] = how & 1 ? -NAN : NAN;
            p.temperature = how < 2 ? 0 : 1;
            p.n_top = how == 4 ? -1 : 3;
            p.target = how == 3 ? 5 : -1;
            p.banned = &banned;
            p.n_banned = 1;                            /* hidden, but not from us */
            run_gpu(&got, l, &p, 1, VOCAB);
            ck_assert_msg(got.token == -1 && got.n_top == 0 && got.rank == 0,
                          "NaN at %d, way %d: token %d n_top %d rank %d", at[k], how,
                          got.token, got.n_top, got.rank);
        }
}
END_TEST

/* Infinite maxima, everything banned, a NaN of the edits' making: all ways to ask. */
START_TEST(infinities_equal_cpu)
{
    enum { VOCAB = 1300, ROWS = 128 };
    float *l = mem_calloc(ROWS * VOCAB, sizeof *l);
    int32_t *every = mem_calloc(VOCAB, sizeof *every);
    struct logit_bias down = { 100, -INFINITY };
    struct sample_params p[ROWS];

    for (int i = 0; i < VOCAB; i++)
        every[i] = i;
    for (int k = 0; k < ROWS; k++) {
        float *row = l + k * VOCAB;
        int kind = k & 3;
        for (int i = 0; i < VOCAB; i++)
            row[i] = kind == 3 ? -INFINITY : (float)(i % 9);
        if (kind == 0 || kind == 1)
            row[100] = row[1299] = INFINITY;
        p[k] = plain;
        p[k].temperature = k & 4 ? 0 : 1;
        p[k].top_k = k & 8 ? 5 : 0;
        p[k].top_p = k & 16 ? 0.5f : 1;
        p[k].n_top = k & 32 ? 3 : -1;
        p[k].min_p = k & 64 ? 0.1f : 0;
        p[k].index = (uint32_t)k;
        p[k].bias = &down;
        p[k].n_bias = kind == 1;
        p[k].banned = every;
        p[k].n_banned = kind == 2 ? VOCAB : 0;
    }
    if (gpu_backend())
        ck_assert_int_eq(compare_rows(l, p, ROWS, VOCAB), 0);
    mem_free(l);
    mem_free(every);
}
END_TEST

/* Ties at the ends of the prefixes: top_k keeps them, top_p takes the lower ids. */
START_TEST(ties_equal_cpu)
{
    enum { VOCAB = 3000, ROWS = 400 };
    float *l = mem_alloc(ROWS * VOCAB * sizeof *l);
    struct sample_params *p = mem_calloc(ROWS, sizeof *p);

    for (int k = 0; k < ROWS; k++) {
        for (int i = 0; i < VOCAB; i++)
            l[k * VOCAB + i] = i % 100 == 3 ? 2 : i % 100 == 4 ? 1 : -20;
        p[k] = plain;
        p[k].index = (uint32_t)k;
        p[k].top_k = k & 1 ? 32 : 0;                   /* 30 twos, then 30 tied ones */
        p[k].top_p = k & 2 ? 0.35f : 1;
        p[k].n_top = k % 21;
    }
    if (gpu_backend())
        ck_assert_int_eq(compare_rows(l, p, ROWS, VOCAB), 0);
    mem_free(l);
    mem_free(p);
}
END_TEST

TCase *gpu_sample_case(void)
{
    TCase *c = tcase_create("gpu_sample");

    tcase_set_timeout(c, 120);
    tcase_add_test(c, random_rows_equal_cpu);
    tcase_add_loop_test(c, large_vocabularies_equal_cpu, 0, 3);
    tcase_add_test(c, long_lists_equal_cpu);
    tcase_add_loop_test(c, batches_change_nothing, 0, 2);
    tcase_add_test(c, calls_grow_and_shrink);
    tcase_add_test(c, calls_may_queue);
    tcase_add_test(c, nan_gives_no_token);
    tcase_add_test(c, infinities_equal_cpu);
    tcase_add_test(c, ties_equal_cpu);
    return c;
}
