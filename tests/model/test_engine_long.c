/* Long contexts out of host memory: the same answers to the bit as with room for all, from pools
 * that hold a small part of one context, one, or two.  How long is a matter of patience: prompts of
 * some thousand tokens by default, up to LONG_TOKENS of the environment with `make test-long`. */

#include "tests/support/engine_history.h"

#include <check.h>
#include <stdlib.h>

enum { MEDIUM_TOKENS = 3000 };

static uint32_t long_tokens(void)
{
    const char *said = getenv("LONG_TOKENS");

    return said ? (uint32_t)atoi(said) : MEDIUM_TOKENS;
}

/* _i: enum selection */
START_TEST(no_answer_changes_in_long_contexts)
{
    const uint32_t tokens = long_tokens();

    history_play_long(&(struct engine_history){
        .seed = (uint64_t)_i + 1, .selection = (enum selection)_i, .scale = 1,
        .max_prompt = tokens, .max_len = tokens + HISTORY_MAX_OUTPUT, .keep_blocks = 16,
        .keep_tokens = 512, .n_texts = 3, .prompts_first = true, .step_tokens = 512,
    });
}
END_TEST

START_TEST(nor_in_other_models)
{
    static const char *const dirs[] = { "build/models/qwen3-moe", "build/models/smollm2",
                                        "build/models/qwen3-yarn-g5" };

    history_play_long(&(struct engine_history){
        .dir = dirs[_i], .seed = (uint64_t)_i + 11, .scale = 1, .max_prompt = 1100,
        .max_len = 1100 + HISTORY_MAX_OUTPUT, .keep_blocks = 4, .keep_tokens = 96, .n_texts = 3,
        .prompts_first = true, .step_tokens = 128,
    });
}
END_TEST

TCase *engine_long_case(void)
{
    TCase *tc = tcase_create("engine_long");

    tcase_set_timeout(tc, 300);
    tcase_add_loop_test(tc, no_answer_changes_in_long_contexts, SELECTION_EXACT,
                        SELECTION_LAGGED + 1);
    tcase_add_loop_test(tc, nor_in_other_models, 0, 3);
    return tc;
}
