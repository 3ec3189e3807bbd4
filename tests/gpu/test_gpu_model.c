/* The whole model on the GPU against the CPU back end, token by token. */

#include "tests/support/gpu_fixture.h"
#include "tests/support/offload_history.h"
#include "tests/support/streamed_history.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static const char *const folders[] = {
    "models/asynctlsd-books-9m", "build/models/qwen3", "build/models/qwen3-yarn-g5",
    "build/models/llama3", "build/models/llama-linear-mha", "build/models/mistral",
    "build/models/smollm2", "build/models/qwen3-moe", "build/models/qwen3-moe-128",
    "build/models/glm4-moe-lite",
};
enum {
    N_FOLDERS = sizeof folders / sizeof folders[0],
    PROMPT = 700,
    DECODES = 20,
    MAX_TOKENS = PROMPT + 64,
};

/* bf16 activations move a logprob by about this much, measured: see the printed lines. */
static const double TOLERANCE = 0.15;

static struct runner_options options_of(const char *dir, bool gpu)
{
    return (struct runner_options){
        .dir = dir, .backend = gpu ? gpu_backend() : NULL, .select = select_default(),
        .max_rows = 1024, .max_seqs = 8, .max_tokens = MAX_TOKENS };
}

START_TEST(prompt_and_decodes_equal_the_cpu)
{
    static int32_t ids[PROMPT + DECODES];
    struct runner_options on_gpu, on_cpu = options_of(folders[_i], false);
    struct runner cpu, gpu;
    struct test_seq a, b;
    double worst;
    int differ = 0;

    if (!gpu_backend())
        return;
    on_gpu = options_of(folders[_i], true);
    test_prompt(ids, PROMPT + DECODES);
    runner_open(&cpu, &on_cpu);
    runner_open(&gpu, &on_gpu);
    seq_init(&cpu, &a, MAX_TOKENS);
    seq_init(&gpu, &b, MAX_TOKENS);
    struct sample_result x = runner_feed(&cpu, &a, ids, PROMPT, 500);
    struct sample_result y = runner_feed(&gpu, &b, ids, PROMPT, 500);
    worst = logprob_difference(&x, &y);
    for (int i = 0; i < DECODES; i++) {
        x = runner_decode(&cpu, &a, ids[PROMPT + i], false);
        y = runner_decode(&gpu, &b, ids[PROMPT + i], false);
        worst = fmax(worst, logprob_difference(&x, &y));
        differ += x.token != y.token;
    }
    printf("%s: logprobs within %.4f of the CPU's, %d of %d tokens differ\n", folders[_i], worst,
           differ, DECODES);
    ck_assert_double_le(worst, TOLERANCE);
    seq_fini(&cpu, &a);
    seq_fini(&gpu, &b);
    runner_close(&cpu);
    runner_close(&gpu);
}
END_TEST

static const struct { const char *dir; enum selection selection; } batches[] = {
    { "models/asynctlsd-books-9m", SELECTION_EXACT },
    { "models/asynctlsd-books-9m", SELECTION_LAGGED },
    { "build/models/glm4-moe-lite", SELECTION_EXACT },
    { "build/models/glm4-moe-lite", SELECTION_LAGGED },
};
enum { N_BATCHES = sizeof batches / sizeof batches[0] };

/* A token's result is the same to the bit alone and among others, recorded or not, whatever
 * the number of rows is rounded up to, with sparse and dense sequences in any mix, the sparse ones
 * exact or lagged. */
START_TEST(batch_changes_nothing)
{
    enum { SEQS = 7, STEPS = 6, CONTEXT = 300 };
    static int32_t ids[SEQS][CONTEXT + STEPS];
    static struct sample_result alone[SEQS][STEPS], together[SEQS];
    struct runner_options o;
    struct test_seq seq[SEQS];
    struct test_work works[SEQS];
    struct runner r;

    if (!gpu_backend())
        return;
    o = options_of(batches[_i].dir, true);
    o.select.selection = batches[_i].selection;
    o.select.keep_blocks = 4;
    o.select.keep_tokens = 128;
    runner_open(&r, &o);
    for (int round = 0; round < 2; round++) {
        for (int s = 0; s < SEQS; s++) {
            int context = CONTEXT - 40 * s;
            test_prompt(ids[s], context + STEPS);
            seq_init(&r, &seq[s], MAX_TOKENS);
            runner_feed(&r, &seq[s], ids[s], context, MAX_TOKENS);
        }
        for (int step = 0; step < STEPS; step++)
            for (int s = 0; s < SEQS; s++) {
                works[s] = (struct test_work){
                    .seq = &seq[s], .ids = &ids[s][seq[s].n_tokens], .n = 1, .want = 1,
                    .sparse = s < 3, .result = round ? &together[s] : &alone[s][step] };
                if (round == 0)
                    runner_step(&r, &works[s], 1);
                else if (s == SEQS - 1) {
                    runner_step(&r, works, SEQS);
                    for (int i = 0; i < SEQS; i++)
                        ck_assert_msg(results_identical(&together[i], &alone[i][step]),
                                      "step %d, sequence %d: %d %.9g, alone %d %.9g", step, i,
                                      together[i].token, (double)together[i].logprob,
                                      alone[i][step].token, (double)alone[i][step].logprob);
                }
            }
        for (int s = 0; s < SEQS; s++)
            seq_fini(&r, &seq[s]);
    }
    runner_close(&r);
}
END_TEST

START_TEST(chunks_change_little)
{
    static const int chunks[] = { 1000, 500, 64, 33, 32, 7 };
    static int32_t ids[PROMPT];
    struct sample_result first = { 0 };
    struct runner_options o;
    struct runner r;
    double worst = 0;

    if (!gpu_backend())
        return;
    o = options_of(folders[0], true);
    test_prompt(ids, PROMPT);
    runner_open(&r, &o);
    for (size_t i = 0; i < sizeof chunks / sizeof chunks[0]; i++) {
        struct test_seq seq;
        seq_init(&r, &seq, MAX_TOKENS);
        struct sample_result x = runner_feed(&r, &seq, ids, PROMPT, chunks[i]);
        if (i == 0)
            first = x;
        worst = fmax(worst, logprob_difference(&x, &first));
        seq_fini(&r, &seq);
    }
    printf("chunks: logprobs within %.4f of each other\n", worst);
    ck_assert_double_le(worst, TOLERANCE);
    runner_close(&r);
}
END_TEST

static const struct { const char *dir; enum filter_kind filter; int tokens; } budgets[] = {
    { "models/asynctlsd-books-9m", FILTER_COARSE, MAX_TOKENS / 64 * 64 },
    { "models/asynctlsd-books-9m", FILTER_BOUNDS, MAX_TOKENS / 64 * 64 },
    { "models/asynctlsd-books-9m", FILTER_COARSE, 192 },
    { "models/asynctlsd-books-9m", FILTER_BOUNDS, 192 },
    { "models/asynctlsd-books-9m", FILTER_MEANS, MAX_TOKENS / 64 * 64 },
    { "models/asynctlsd-books-9m", FILTER_MEANS, 192 },
    { "build/models/glm4-moe-lite", FILTER_COARSE, MAX_TOKENS / 64 * 64 },
    { "build/models/glm4-moe-lite", FILTER_BOUNDS, MAX_TOKENS / 64 * 64 },
    { "build/models/glm4-moe-lite", FILTER_MEANS, MAX_TOKENS / 64 * 64 },
};
enum { N_BUDGETS = sizeof budgets / sizeof budgets[0] };

/* Sparse within the budget is full attention; beyond it the GPU leaves out about what the
 * CPU leaves out. */
START_TEST(sparse_equals_dense_and_the_cpu)
{
    static int32_t ids[PROMPT];
    struct runner cpu, gpu;
    struct test_seq a, b, c;
    struct runner_options on_cpu = options_of(budgets[_i].dir, false), on_gpu;

    if (!gpu_backend())
        return;
    on_cpu.select.filter = budgets[_i].filter;
    on_cpu.select.keep_tokens = budgets[_i].tokens;
    on_cpu.select.keep_blocks = budgets[_i].tokens / 64 + 1;
    on_gpu = on_cpu;
    on_gpu.backend = gpu_backend();
    test_prompt(ids, PROMPT);
    runner_open(&cpu, &on_cpu);
    runner_open(&gpu, &on_gpu);
    seq_init(&cpu, &a, MAX_TOKENS);
    seq_init(&gpu, &b, MAX_TOKENS);
    seq_init(&gpu, &c, MAX_TOKENS);
    runner_feed(&cpu, &a, ids, PROMPT - 1, 500);
    runner_feed(&gpu, &b, ids, PROMPT - 1, 500);
    runner_feed(&gpu, &c, ids, PROMPT - 1, 500);
    struct sample_result x = runner_decode(&cpu, &a, ids[PROMPT - 1], true);
    struct sample_result y = runner_decode(&gpu, &b, ids[PROMPT - 1], true);
    struct sample_result z = runner_decode(&gpu, &c, ids[PROMPT - 1], false);
    double to_cpu = logprob_difference(&x, &y), to_dense = logprob_difference(&y, &z);
    printf("%s, filter %d, %d tokens: logprobs %.4f from the CPU's, %.4f from full attention\n",
           budgets[_i].dir, (int)budgets[_i].filter, budgets[_i].tokens, to_cpu, to_dense);
    /* Beyond the budget a few tokens at the border are others: scores are close, not equal. */
    ck_assert_double_le(to_cpu, budgets[_i].tokens >= PROMPT ? TOLERANCE : 1);
    if (budgets[_i].tokens >= PROMPT)
        ck_assert_double_le(to_dense, TOLERANCE);
    seq_fini(&cpu, &a);
    seq_fini(&gpu, &b);
    seq_fini(&gpu, &c);
    runner_close(&cpu);
    runner_close(&gpu);
}
END_TEST

/* K and V of sparse sequences off the device or on it, recorded or not, in pinned memory: the same
 * to the bit.  Nine sequences are padded to ten; where a prompt is among them nothing is
 * replayed.  The fused kernel and the three operations one after the other. */
START_TEST(leaving_the_device_changes_nothing)
{
    static const struct {
        const char *dir;
        enum filter_kind filter;
        int keep_blocks, keep_tokens, rows_per_head;
        enum selection selection;
    } kinds[] = {
        { "models/asynctlsd-books-9m", FILTER_COARSE, 4, 128, 128, SELECTION_EXACT },
        { "models/asynctlsd-books-9m", FILTER_COARSE, 16, 1024, 2048, SELECTION_EXACT },
        { "models/asynctlsd-books-9m", FILTER_BOUNDS, 4, 100, 150, SELECTION_EXACT },
        { "build/models/qwen3", FILTER_COARSE, 6, 200, 201, SELECTION_EXACT },
        { "build/models/qwen3-yarn-g5", FILTER_COARSE, 4, 96, 400, SELECTION_EXACT },
        { "build/models/smollm2", FILTER_BOUNDS, 3, 64, 64, SELECTION_EXACT },
        { "models/asynctlsd-books-9m", FILTER_COARSE, 4, 128, 400, SELECTION_LAGGED },
        { "build/models/qwen3", FILTER_BOUNDS, 4, 100, 300, SELECTION_LAGGED },
        { "build/models/qwen3-moe-128", FILTER_COARSE, 4, 128, 200, SELECTION_EXACT },
        { "build/models/glm4-moe-lite", FILTER_COARSE, 4, 128, 129, SELECTION_EXACT },
        { "build/models/glm4-moe-lite", FILTER_BOUNDS, 4, 100, 300, SELECTION_EXACT },
        { "build/models/glm4-moe-lite", FILTER_COARSE, 6, 200, 400, SELECTION_LAGGED },
        { "models/asynctlsd-books-9m", FILTER_MEANS, 4, 128, 128, SELECTION_EXACT },
        { "build/models/glm4-moe-lite", FILTER_MEANS, 4, 128, 200, SELECTION_LAGGED },
    };
    struct offload_history h = {
        .dir = kinds[_i].dir, .backend = gpu_backend(), .select = select_default(), .sparse = 7,
        .dense = 2, .sets = 4, .rows_per_head = kinds[_i].rows_per_head, .max_prompt = 600,
        .min_decodes = 60, .max_decodes = 300, .steps = 400, .seed = (uint64_t)_i,
    };

    if (!gpu_backend())
        return;
    h.select.filter = kinds[_i].filter;
    h.select.keep_blocks = kinds[_i].keep_blocks;
    h.select.keep_tokens = kinds[_i].keep_tokens;
    h.select.selection = kinds[_i].selection;
    h.select.recent_tokens = 16;
    offload_history_run(&h);
}
END_TEST
enum { N_OFFLOAD_KINDS = 14 };

/* A prompt that streams through the device, by the kernels of prompts and of single rows. */
START_TEST(streaming_changes_nothing)
{
    static const struct { const char *dir; int prompt, chunk, decodes; } kinds[] = {
        { "models/asynctlsd-books-9m", 3000, 512, 30 },
        { "models/asynctlsd-books-9m", 700, 77, 70 },
        { "build/models/qwen3", 900, 64, 5 },
        { "build/models/glm4-moe-lite", 900, 100, 30 },
    };
    struct streamed_history h = { .dir = kinds[_i].dir, .backend = gpu_backend(),
                                  .prompt = kinds[_i].prompt, .chunk = kinds[_i].chunk,
                                  .decodes = kinds[_i].decodes, .seed = (uint64_t)_i };

    if (gpu_backend())
        streamed_history_run(&h);
}
END_TEST

TCase *gpu_model_case(void)
{
    TCase *tc = tcase_create("gpu_model");

    tcase_set_timeout(tc, 300);
    tcase_add_loop_test(tc, prompt_and_decodes_equal_the_cpu, 0, N_FOLDERS);
    tcase_add_loop_test(tc, batch_changes_nothing, 0, N_BATCHES);
    tcase_add_test(tc, chunks_change_little);
    tcase_add_loop_test(tc, sparse_equals_dense_and_the_cpu, 0, N_BUDGETS);
    tcase_add_loop_test(tc, leaving_the_device_changes_nothing, 0, N_OFFLOAD_KINDS);
    tcase_add_loop_test(tc, streaming_changes_nothing, 0, 4);
    return tc;
}
