/* server/placement.h: the rule, what is believed, and for how long. */

#include "engine/base/mem.h"
#include "server/placement.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <string.h>

enum { BLOCK = 64, MOST_TOKENS = 4096 };

/* Texts that differ from the first token on. */
static const int32_t *tokens_of(uint64_t seed)
{
    static int32_t tokens[4][MOST_TOKENS];
    static int next;
    struct test_random rng = test_random(seed);
    int32_t *out = tokens[next++ % 4];

    for (int i = 0; i < MOST_TOKENS; i++)
        out[i] = random_below(&rng, 50000);
    return out;
}

static struct placement_text text(uint64_t seed, uint32_t n)
{
    return (struct placement_text){ .prompt = tokens_of(seed), .n_prompt = n };
}

static struct placement_order rank(const struct placement *p, struct placement_text t)
{
    struct placement_order order;

    placement_rank(p, &order, &t);
    return order;
}

static uint32_t best(const struct placement *p, struct placement_text t)
{
    return rank(p, t).engines[0];
}

static void learn(struct placement *p, uint32_t engine, struct placement_text t)
{
    placement_learn(p, engine, &t);
}

START_TEST(the_longest_ago_of_equals)
{
    struct placement *p = placement_create(3, BLOCK, 1024);

    for (uint32_t i = 0; i < 9; i++) {
        struct placement_order order = rank(p, text(1, 10));
        ck_assert_uint_eq(order.engines[0], i % 3);
        ck_assert_uint_eq(order.engines[1], (i + 1) % 3);
        ck_assert_uint_eq(order.engines[2], (i + 2) % 3);
        placement_add(p, i % 3, 1, 10);
        placement_computed(p, i % 3, 10);
        placement_ended(p, i % 3);
    }
    placement_destroy(p);
}
END_TEST

START_TEST(the_least_loaded)
{
    struct placement *p = placement_create(2, BLOCK, 1024);

    placement_add(p, 0, 1, 500);
    ck_assert_uint_eq(placement_load(p, 0), 500 + PLACEMENT_CHOICE_TOKENS);
    ck_assert_uint_eq(best(p, text(1, 10)), 1);
    placement_add(p, 1, 3, 400);             /* 592 to 564 */
    ck_assert_uint_eq(best(p, text(1, 10)), 0);
    placement_computed(p, 1, 400);
    ck_assert_uint_eq(best(p, text(1, 10)), 1);
    placement_computed(p, 0, 500);
    ck_assert_uint_eq(best(p, text(1, 10)), 0);
    for (int i = 0; i < 3; i++)
        placement_ended(p, 1);
    ck_assert_uint_eq(placement_load(p, 1), 0);
    ck_assert_uint_eq(best(p, text(1, 10)), 1);
    placement_destroy(p);
}
END_TEST

/* The margin is what the move would compute again, to the token. */
START_TEST(a_known_beginning_is_worth_its_tokens)
{
    struct placement *p = placement_create(2, BLOCK, 1024);

    learn(p, 1, text(7, 1000));
    struct placement_order order = rank(p, text(7, 1000));
    ck_assert_uint_eq(order.engines[0], 1);
    ck_assert_uint_eq(order.cached[0], 0);
    ck_assert_uint_eq(order.cached[1], 1000 / BLOCK * BLOCK);
    placement_add(p, 1, 1, order.cached[1] - PLACEMENT_CHOICE_TOKENS - 1);
    ck_assert_uint_eq(best(p, text(7, 1000)), 1);
    placement_add(p, 1, 0, 2);
    ck_assert_uint_eq(best(p, text(7, 1000)), 0);
    ck_assert_uint_eq(best(p, text(8, 1000)), 0);
    placement_destroy(p);
}
END_TEST

START_TEST(the_longest_beginning)
{
    struct placement *p = placement_create(3, BLOCK, 1024);
    struct placement_text turn = text(7, 600), other = turn;
    int32_t changed[MOST_TOKENS];

    learn(p, 0, text(7, 3 * BLOCK));
    learn(p, 2, text(7, 5 * BLOCK + 1));
    struct placement_order order = rank(p, turn);
    ck_assert_uint_eq(order.engines[0], 2);
    ck_assert_uint_eq(order.engines[1], 0);
    ck_assert_uint_eq(order.cached[0], 3 * BLOCK);
    ck_assert_uint_eq(order.cached[1], 0);
    ck_assert_uint_eq(order.cached[2], 5 * BLOCK);
    /* A block counts with all that is before it. */
    memcpy(changed, turn.prompt, sizeof changed);
    changed[2 * BLOCK]++;
    other.prompt = changed;
    ck_assert_uint_eq(rank(p, other).cached[2], 2 * BLOCK);
    /* The last token is always computed. */
    other = turn;
    other.n_prompt = 5 * BLOCK;
    ck_assert_uint_eq(rank(p, other).cached[2], 4 * BLOCK);
    other.n_prompt = 1;
    ck_assert_uint_eq(rank(p, other).cached[2], 0);
    placement_destroy(p);
}
END_TEST

/* What several have had stays known of each. */
START_TEST(a_beginning_that_several_know)
{
    struct placement *p = placement_create(3, BLOCK, 1024);

    learn(p, 0, text(7, 10 * BLOCK));
    learn(p, 2, text(7, 10 * BLOCK));
    placement_add(p, 0, 1, 0);
    ck_assert_uint_eq(best(p, text(7, 11 * BLOCK)), 2);
    placement_add(p, 2, 2, 0);
    ck_assert_uint_eq(best(p, text(7, 11 * BLOCK)), 0);
    placement_destroy(p);
}
END_TEST

START_TEST(salts_do_not_meet)
{
    struct placement *p = placement_create(2, BLOCK, 1024);
    struct placement_text mine = text(7, 600), yours = mine;

    mine.salt = 1;
    yours.salt = 2;
    learn(p, 1, mine);
    ck_assert_uint_eq(rank(p, mine).cached[1], 9 * BLOCK);
    ck_assert_uint_eq(rank(p, yours).cached[1], 0);
    placement_destroy(p);
}
END_TEST

/* The next turn of a conversation begins with the answer too, wherever prompt and output meet. */
START_TEST(outputs_are_learned)
{
    struct placement *p = placement_create(2, BLOCK, 1024);
    struct placement_text turn = text(9, 500), next = turn;

    turn.n_prompt = (uint32_t)_i;
    turn.output = turn.prompt + turn.n_prompt;
    turn.n_output = 400 - turn.n_prompt;
    learn(p, 1, turn);
    ck_assert_uint_eq(rank(p, next).cached[1], 400 / BLOCK * BLOCK);
    placement_destroy(p);
}
END_TEST

/* A table for 64 blocks: who was learned last is there, who was learned long ago is not, and what
 * is learned again and again stays. */
START_TEST(the_least_recently_used_makes_room)
{
    struct placement *p = placement_create(2, BLOCK, 64);
    uint32_t kept = 0;

    for (uint64_t seed = 100; seed < 300; seed++) {
        learn(p, 0, text(1, 2 * BLOCK + 1));
        learn(p, 1, text(seed, 4 * BLOCK + 1));
        ck_assert_uint_eq(rank(p, text(1, 2 * BLOCK + 1)).cached[0], 2 * BLOCK);
        ck_assert_uint_eq(rank(p, text(seed, 4 * BLOCK + 1)).cached[1], 4 * BLOCK);
    }
    for (uint64_t seed = 100; seed < 300; seed++)
        kept += rank(p, text(seed, 4 * BLOCK + 1)).cached[1] / BLOCK;
    ck_assert_uint_le(kept, 64);
    ck_assert_uint_ge(kept, 16);
    placement_destroy(p);
}
END_TEST

START_TEST(without_a_cache_loads_decide)
{
    struct placement *p = placement_create(2, BLOCK, 0), *one = placement_create(1, BLOCK, 1024);

    learn(p, 1, text(7, 600));
    ck_assert_uint_eq(rank(p, text(7, 600)).cached[1], 0);
    placement_add(p, 0, 1, 0);
    ck_assert_uint_eq(best(p, text(7, 600)), 1);
    placement_add(p, 1, 2, 0);
    ck_assert_uint_eq(best(p, text(7, 600)), 0);
    learn(one, 0, text(7, 600));
    placement_add(one, 0, 1, 600);
    ck_assert_uint_eq(best(one, text(7, 600)), 0);
    placement_destroy(p);
    placement_destroy(one);
}
END_TEST

/* Requests of many lengths come and go: loads come back to nothing, and no engine has all. */
START_TEST(many_requests)
{
    enum { N = 400, ENGINES = 5 };
    struct placement *p = placement_create(ENGINES, BLOCK, 1024);
    struct test_random rng = test_random(11);
    struct { uint32_t engine, tokens; } open[N];
    uint32_t given[ENGINES] = { 0 };

    for (int i = 0; i < N; i++) {
        struct placement_text t = text((uint64_t)random_below(&rng, 12),
                                       1 + (uint32_t)random_below(&rng, 2000));
        struct placement_order order = rank(p, t);
        open[i].engine = order.engines[0];
        open[i].tokens = t.n_prompt - order.cached[open[i].engine];
        placement_add(p, open[i].engine, 1, open[i].tokens);
        learn(p, open[i].engine, t);
        given[open[i].engine]++;
    }
    for (uint32_t e = 0; e < ENGINES; e++)
        ck_assert_uint_gt(given[e], N / ENGINES / 4);
    for (int i = 0; i < N; i++) {
        placement_computed(p, open[i].engine, open[i].tokens);
        placement_ended(p, open[i].engine);
    }
    for (uint32_t e = 0; e < ENGINES; e++)
        ck_assert_uint_eq(placement_load(p, e), 0);
    placement_destroy(p);
}
END_TEST

TCase *placement_case(void)
{
    TCase *tc = tcase_create("placement");

    tcase_add_test(tc, the_longest_ago_of_equals);
    tcase_add_test(tc, the_least_loaded);
    tcase_add_test(tc, a_known_beginning_is_worth_its_tokens);
    tcase_add_test(tc, the_longest_beginning);
    tcase_add_test(tc, a_beginning_that_several_know);
    tcase_add_test(tc, salts_do_not_meet);
    tcase_add_loop_test(tc, outputs_are_learned, 1, 200);
    tcase_add_test(tc, the_least_recently_used_makes_room);
    tcase_add_test(tc, without_a_cache_loads_decide);
    tcase_add_test(tc, many_requests);
    return tc;
}
