/* Long contexts out of host memory: the same answers to the bit as with room for all, out of pools
 * that hold a small part of one context, or one of several.  Where they are longest is a matter of
 * patience: prompts up to some thousand tokens by default, LONG_TOKENS in the environment for more
 * (`make test-long`; docs/DESIGN.md, Offload). */

#include "tests/support/engine_history.h"

#include <check.h>
#include <stdlib.h>

enum { MEDIUM_TOKENS = 3000, STEP = 512 };

/* What a step of that many tokens needs at least, so that steps are no longer where only one
 * sequence streams. */
enum { LEAST = 2 * (STEP / 64 + 2) };

static uint32_t long_tokens(void)
{
    const char *said = getenv("LONG_TOKENS");

    return said ? (uint32_t)atoi(said) : MEDIUM_TOKENS;
}

START_TEST(no_answer_changes_in_long_contexts)
{
    static struct history_answer want[HISTORY_REQUESTS];
    const uint32_t tokens = long_tokens(), one = tokens / 64 + 8;
    const struct engine_history h = {
        .seed = (uint64_t)_i + 1, .selection = (enum selection)_i, .scale = 1, .max_prompt = tokens,
        .max_len = tokens + HISTORY_MAX_OUTPUT, .keep_blocks = 16, .keep_tokens = 512,
        .n_texts = 3, .prompts_first = true, .step_tokens = STEP,
    };
    const struct history_kind kinds[] = {
        { "all leave", 2 * one, .offload = OFFLOAD_ALWAYS, .must = OFFLOADS | MISSES },
        { "one fits, cancels", one, .cancels = true, .must = OFFLOADS | MISSES },
        { "one fits, slow copies", one, .delay_us = 1000, .must = OFFLOADS | LOADS },
        { "streamed", LEAST, .must = MISSES },
        { "streamed one at a time, cancels", LEAST, .sequences = 1, .cancels = true,
          .must = MISSES },
    };

    ck_assert_uint_ge(tokens, 2 * LEAST * 64);
    history_reference(&h, want);
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
        history_hold_against(&h, &kinds[i], want);
}
END_TEST

TCase *engine_long_case(void)
{
    TCase *tc = tcase_create("engine_long");

    tcase_set_timeout(tc, getenv("LONG_TOKENS") ? 0 : 300);
    tcase_add_loop_test(tc, no_answer_changes_in_long_contexts, SELECTION_EXACT,
                        SELECTION_LAGGED + 1);
    return tc;
}
