/* Sequences with K and V off the device answer as though all of it were there, to the last bit. */

#include "tests/support/backend_fixture.h"
#include "tests/support/offload_history.h"

#include <check.h>

static struct select_config budget(int keep_blocks, int keep_tokens)
{
    struct select_config select = select_default();

    select.keep_blocks = keep_blocks;
    select.keep_tokens = keep_tokens;
    select.recent_tokens = 16;   /* few, so that the scores have a say */
    return select;
}

/* Rows in a set: just the chosen, a few more, several times as many. */
static const struct {
    const char *dir, *isa;
    enum filter_kind filter;
    enum index_kind index;
    int keep_blocks, keep_tokens, rows_per_head;
    enum selection selection;
} kinds[] = {
    { "models/asynctlsd-books-9m", "auto", FILTER_COARSE, INDEX_ROTATED, 4, 100, 100,
      SELECTION_EXACT },
    { "models/asynctlsd-books-9m", "auto", FILTER_BOUNDS, INDEX_ROTATED, 3, 64, 200,
      SELECTION_EXACT },
    { "models/asynctlsd-books-9m", "auto", FILTER_MEANS, INDEX_ROTATED, 4, 100, 100,
      SELECTION_EXACT },
    { "build/models/qwen3", "scalar", FILTER_COARSE, INDEX_ROTATED, 4, 96, 97, SELECTION_EXACT },
    { "build/models/smollm2", "avx2", FILTER_COARSE, INDEX_ROTATED, 6, 150, 150,
      SELECTION_EXACT },
    { "build/models/llama3", "auto", FILTER_COARSE, INDEX_CHANNELS, 4, 80, 80, SELECTION_EXACT },
    { "build/models/qwen3-yarn-g5", "auto", FILTER_BOUNDS, INDEX_CHANNELS, 5, 128, 500,
      SELECTION_EXACT },
    { "models/asynctlsd-books-9m", "auto", FILTER_COARSE, INDEX_ROTATED, 4, 100, 200,
      SELECTION_LAGGED },
    { "build/models/qwen3", "auto", FILTER_BOUNDS, INDEX_ROTATED, 4, 96, 300, SELECTION_LAGGED },
    { "build/models/qwen3-moe", "auto", FILTER_COARSE, INDEX_ROTATED, 4, 96, 150,
      SELECTION_EXACT },
    { "build/models/glm4-moe-lite", "auto", FILTER_COARSE, INDEX_ROTATED, 4, 96, 97,
      SELECTION_EXACT },
    { "build/models/glm4-moe-lite", "avx2", FILTER_BOUNDS, INDEX_ROTATED, 4, 96, 300,
      SELECTION_LAGGED },
    { "build/models/glm4-moe-lite", "auto", FILTER_MEANS, INDEX_ROTATED, 4, 96, 300,
      SELECTION_LAGGED },
    { "build/models/glm4-moe-lite-small", "auto", FILTER_BOUNDS, INDEX_ROTATED, 5, 128, 500,
      SELECTION_EXACT },
    { "build/models/glm4-moe-lite-small", "scalar", FILTER_COARSE, INDEX_ROTATED, 3, 64, 64,
      SELECTION_EXACT },
};
enum { N_KINDS = sizeof kinds / sizeof kinds[0], SEEDS = 2 };

START_TEST(leaving_the_device_changes_nothing)
{
    int kind = _i / SEEDS;
    struct offload_history h = {
        .dir = kinds[kind].dir, .isa = kinds[kind].isa,
        .select = budget(kinds[kind].keep_blocks, kinds[kind].keep_tokens),
        .sparse = 4, .dense = 1, .sets = 2, .rows_per_head = kinds[kind].rows_per_head,
        .max_prompt = 400, .min_decodes = 20, .max_decodes = 150, .steps = 160,
        .seed = (uint64_t)_i,
    };

    if (!test_backend(kinds[kind].isa))
        return;
    h.select.filter = kinds[kind].filter;
    h.select.index = kinds[kind].index;
    h.select.selection = kinds[kind].selection;
    offload_history_run(&h);
}
END_TEST

/* One after the other, each with the only set, over many block borders. */
START_TEST(long_contexts)
{
    struct offload_history h = {
        .dir = "build/models/qwen3", .select = budget(16, 256), .sparse = 2, .sets = 1,
        .rows_per_head = 256, .max_prompt = 2500, .min_decodes = 300, .max_decodes = 400,
        .steps = 800, .seed = 1,
    };

    offload_history_run(&h);
}
END_TEST

/* What steps with sets need is there with sets alone, and counted. */
START_TEST(without_sets_there_is_no_table_for_them)
{
    struct runner_options o = {
        .dir = "build/models/qwen3", .select = budget(4, 100), .max_rows = 16, .max_seqs = 8,
        .max_tokens = 4096, .rows_per_head = 100,
    };
    size_t scratch[2], table = 8 * 4096 / BLOCK_TOKENS * sizeof(int32_t);
    struct runner r;

    for (int hot = 0; hot < 2; hot++) {
        o.hot_sets = hot;
        runner_open(&r, &o);
        scratch[hot] = model_scratch_bytes(r.model, &r.limits, &r.plan);
        ck_assert((model_batch(r.model)->host_table != NULL) == hot);
        ck_assert((model_batch(r.model)->hot_set != NULL) == hot);
        runner_close(&r);
    }
    ck_assert_uint_ge(scratch[1], scratch[0] + table);
}
END_TEST

TCase *model_offload_case(void)
{
    TCase *tc = tcase_create("model_offload");

    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, leaving_the_device_changes_nothing, 0, N_KINDS * SEEDS);
    tcase_add_test(tc, long_contexts);
    tcase_add_test(tc, without_sets_there_is_no_table_for_them);
    return tc;
}
