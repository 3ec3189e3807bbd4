/* The engine on the GPU with a host tier: contexts that leave the device, come back, are found in
 * host memory or stream through, with all that is free and all that is under way full of NaN.  What
 * is compared how, and why the bits can be, is in tests/support/engine_history.h. */

#include "tests/support/engine_history.h"
#include "tests/support/gpu_fixture.h"

#include <check.h>

enum { LONG_PROMPT = 100000 };

static const struct {
    const char *dir;
    enum selection selection;
} kinds[] = {
    { BUNDLED_MODEL, SELECTION_EXACT }, { BUNDLED_MODEL, SELECTION_LAGGED },
    { "build/models/qwen3", SELECTION_EXACT }, { "build/models/qwen3-yarn-g5", SELECTION_LAGGED },
    { "build/models/smollm2", SELECTION_EXACT }, { "build/models/qwen3-moe-128", SELECTION_EXACT },
    { "build/models/glm4-moe-lite", SELECTION_EXACT },
};
enum {
    N_KINDS = sizeof kinds / sizeof kinds[0],
    N_MIXED = N_KINDS - 2,           /* rounding may choose other experts: not close at all */
};

START_TEST(no_bit_changes_once_prompts_are_computed)
{
    if (!gpu_backend())
        return;
    history_play_long(&(struct engine_history){
        .dir = kinds[_i].dir, .backend = "cuda:0", .seed = (uint64_t)_i + 21,
        .selection = kinds[_i].selection, .scale = 1, .max_prompt = 1100,
        .max_len = 1100 + HISTORY_MAX_OUTPUT, .keep_blocks = 4, .keep_tokens = 96, .n_texts = 3,
        .prompts_first = true, .step_tokens = 128,
    });
}
END_TEST

START_TEST(no_bit_changes_in_long_contexts)
{
    if (!gpu_backend())
        return;
    history_play_long(&(struct engine_history){
        .backend = "cuda:0", .seed = 1, .scale = 1, .max_prompt = LONG_PROMPT,
        .max_len = LONG_PROMPT + HISTORY_MAX_OUTPUT, .keep_blocks = 64, .keep_tokens = 1024,
        .n_texts = 3, .prompts_first = true, .step_tokens = 2048,
    });
}
END_TEST

/* Prompts beside decodes, in other steps each time.  The tolerance is what rounding of activations
 * moves a logprob by, as in test_gpu_model.c. */
START_TEST(nothing_is_read_that_is_not_there)
{
    struct engine_history h = small_history((uint64_t)_i + 1, 1, kinds[_i].selection);

    if (!gpu_backend())
        return;
    h.dir = kinds[_i].dir;
    h.backend = "cuda:0";
    h.tolerance = 0.15;
    int happened = history_play_mixed(&h);
    ck_assert_int_eq(happened & (OFFLOADS | LOADS | MISSES), OFFLOADS | LOADS | MISSES);
}
END_TEST

TCase *gpu_engine_case(void)
{
    TCase *tc = tcase_create("gpu_engine");

    tcase_set_timeout(tc, 600);
    tcase_add_loop_test(tc, no_bit_changes_once_prompts_are_computed, 0, N_KINDS);
    tcase_add_test(tc, no_bit_changes_in_long_contexts);
    tcase_add_loop_test(tc, nothing_is_read_that_is_not_there, 0, N_MIXED);
    return tc;
}
