/* Two-level attention in the whole model: equal to full attention while its budgets hold
 * the context, and around every border. */

#include "tests/support/backend_fixture.h"
#include "tests/support/model_runner.h"

#include <check.h>
#include <math.h>
#include <stdio.h>

enum { MAX_TOKENS = 1400, BUDGET_BLOCKS = 16, BUDGET_TOKENS = 1024 };

static const struct { const char *dir; enum filter_kind filter; const char *isa; } kinds[] = {
    { "models/asynctlsd-books-9m", FILTER_COARSE, "auto" },
    { "models/asynctlsd-books-9m", FILTER_BOUNDS, "auto" },
    { "models/asynctlsd-books-9m", FILTER_MEANS, "auto" },
    { "models/asynctlsd-books-9m", FILTER_COARSE, "avx2" },
    { "models/asynctlsd-books-9m", FILTER_COARSE, "scalar" },
    { "build/models/glm4-moe-lite", FILTER_COARSE, "auto" },
    { "build/models/glm4-moe-lite", FILTER_BOUNDS, "avx2" },
    { "build/models/glm4-moe-lite", FILTER_MEANS, "avx2" },
    { "build/models/glm4-moe-lite-small", FILTER_BOUNDS, "auto" },
    { "build/models/glm4-moe-lite-small", FILTER_COARSE, "scalar" },
};
enum { N_KINDS = sizeof kinds / sizeof kinds[0] };
/* Of the last model, random and small, differences choose other experts and grow: it is not held to
 * be close. */
enum { N_CLOSE = N_KINDS - 2 };

static void open_model(struct runner *r, int kind, int keep_blocks, int keep_tokens)
{
    struct select_config select = select_default();

    select.filter = kinds[kind].filter;
    select.keep_blocks = keep_blocks;
    select.keep_tokens = keep_tokens;
    runner_open(r, &(struct runner_options){
        .dir = kinds[kind].dir, .isa = kinds[kind].isa, .select = select,
        .max_rows = 512, .max_seqs = 2, .max_tokens = MAX_TOKENS });
}

/* The same context of n tokens twice, the last token decoded sparse and dense; how far
 * apart the logprobs are. */
static double sparse_against_dense(struct runner *r, const int32_t *ids, int n)
{
    struct test_seq sparse, dense;

    seq_init(r, &sparse, MAX_TOKENS);
    seq_init(r, &dense, MAX_TOKENS);
    if (n > 1) {
        runner_feed(r, &sparse, ids, n - 1, 512);
        runner_feed(r, &dense, ids, n - 1, 512);
    }
    struct sample_result a = runner_decode(r, &sparse, ids[n - 1], true);
    struct sample_result b = runner_decode(r, &dense, ids[n - 1], false);
    seq_fini(r, &sparse);
    seq_fini(r, &dense);
    return logprob_difference(&a, &b);
}

/* Lengths around blocks and the budget: up to the budget everything is chosen. */
START_TEST(within_budget_equals_full)
{
    static const int lengths[] = { 1, 2, 63, 64, 65, 127, 128, 129, BUDGET_TOKENS - 1,
                                   BUDGET_TOKENS };
    static int32_t ids[MAX_TOKENS];
    double worst = 0;
    struct runner r;

    if (!test_backend(kinds[_i].isa))
        return;
    test_prompt(ids, MAX_TOKENS);
    open_model(&r, _i, BUDGET_BLOCKS, BUDGET_TOKENS);
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++)
        worst = fmax(worst, sparse_against_dense(&r, ids, lengths[i]));
    printf("two levels within their budget: logprobs within %.6f of full attention\n", worst);
    ck_assert_double_le(worst, 1e-3);
    runner_close(&r);
}
END_TEST

/* One token more than the budget, and many more: something is left out, and the answer
 * stays close.  That something is left out shows, so that the test above tests something. */
START_TEST(beyond_budget_is_close)
{
    static const int lengths[] = { BUDGET_TOKENS + 1, MAX_TOKENS };
    static int32_t ids[MAX_TOKENS];
    struct runner r;

    if (!test_backend(kinds[_i].isa))
        return;
    test_prompt(ids, MAX_TOKENS);
    open_model(&r, _i, BUDGET_BLOCKS, BUDGET_TOKENS);
    double one = sparse_against_dense(&r, ids, lengths[0]);
    double many = sparse_against_dense(&r, ids, lengths[1]);
    printf("two levels beyond their budget: logprobs %.4f and %.4f from full attention\n", one,
           many);
    ck_assert_double_gt(many, 1e-6);
    ck_assert_double_le(one, 0.5);
    ck_assert_double_le(many, 2);
    runner_close(&r);
}
END_TEST

/* A row that nobody samples leaves the same behind for the next one as a row that is sampled, in
 * all layers; and what a list is worth is not lost on it: exact selection gives another answer. */
START_TEST(lagged_rows_need_not_be_sampled)
{
    enum { PROMPT = 900, DECODES = 9 };
    static int32_t ids[PROMPT + DECODES];
    struct sample_result last[3];
    struct runner r;

    test_prompt(ids, PROMPT + DECODES);
    for (int round = 0; round < 3; round++) {
        struct select_config select = select_default();
        struct test_seq seq;
        select.selection = round < 2 ? SELECTION_LAGGED : SELECTION_EXACT;
        select.keep_blocks = 4;
        select.keep_tokens = 100;
        runner_open(&r, &(struct runner_options){
            .dir = "models/asynctlsd-books-9m", .select = select, .max_rows = 512, .max_seqs = 1,
            .max_tokens = MAX_TOKENS });
        seq_init(&r, &seq, MAX_TOKENS);
        runner_feed(&r, &seq, ids, PROMPT, 512);
        for (int i = 0; i < DECODES; i++) {
            struct test_work w = { .seq = &seq, .ids = &ids[PROMPT + i], .n = 1, .sparse = true,
                                   .want = round != 1 || i == DECODES - 1,
                                   .result = &last[round] };
            runner_step(&r, &w, 1);
        }
        seq_fini(&r, &seq);
        runner_close(&r);
    }
    ck_assert(results_identical(&last[0], &last[1]));
    ck_assert(!results_identical(&last[0], &last[2]));
}
END_TEST

TCase *two_level_case(void)
{
    TCase *tc = tcase_create("two_level");

    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, within_budget_equals_full, 0, N_KINDS);
    tcase_add_loop_test(tc, beyond_budget_is_close, 0, N_CLOSE);
    tcase_add_test(tc, lagged_rows_need_not_be_sampled);
    return tc;
}
