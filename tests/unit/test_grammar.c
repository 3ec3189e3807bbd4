/* engine/grammar/grammar.h: masks against every token tried by itself, over the vocabularies of
 * several families; matchers that share a grammar, and what it forgets. */

#include "engine/grammar/grammar.h"

#include "engine/base/mem.h"
#include "engine/grammar/token_trie.h"
#include "engine/model/tokenizer.h"
#include "tests/support/random_data.h"

#include <cjson/cJSON.h>
#include <check.h>
#include <stdio.h>
#include <string.h>

static const char *const families[] = { "smol", "llama", "qwen", "rules", "gpt2" };
enum { N_FAMILIES = 5, SPARE_WORDS = 2 };

static struct tokenizer *open_family(int i)
{
    struct tokenizer *t = NULL;
    struct error err;
    char path[100];

    snprintf(path, sizeof path, "tests/unit/data/tokenizer/%s.json", families[i]);
    ck_assert_msg(tokenizer_open(&t, path, &err) == ST_OK, "%s", err.text);
    return t;
}

static struct grammar *compile(int kind)
{
    static const char *const regexes[] = { "(the |of |\xC3\xA9|[a-z ]{2,9}\\.)+",
                                          "\\d+(,\\d{3})*" };
    static const char *const choices[] = { "yes", "yesterday", "no", "\xE2\x82\xAC 5" };
    static const char schema[] = "{\"type\":\"object\",\"properties\":{\"the name\":{\"type\":"
        "\"string\"},\"n\":{\"type\":\"array\",\"items\":{\"type\":\"integer\"}}},"
        "\"required\":[\"n\"]}";
    struct grammar *g = NULL;
    struct error err = { .text = "" };
    enum status st = ST_OK;

    if (kind < 2)
        st = grammar_compile_regex(&g, regexes[kind], strlen(regexes[kind]), NULL, &err);
    else if (kind == 2)
        st = grammar_compile_choice(&g, choices, 4, NULL, &err);
    else if (kind == 3)
        st = grammar_compile_json_object(&g, NULL, &err);
    else {
        const struct grammar_turn turn = { .thoughts = GRAMMAR_MAY_THINK, .think = "<think>",
                                           .think_end = "</think>" };
        cJSON *tree = cJSON_Parse(schema);
        st = grammar_compile_schema(&g, tree, kind == 5 ? &turn : NULL, &err);
        cJSON_Delete(tree);
    }
    ck_assert_msg(st == ST_OK, "%s", err.text);
    return g;
}
enum { N_GRAMMARS = 6 };

/* Whether the token can follow the text; with a matcher of its own. */
static bool can_follow(struct grammar *g, const struct tokenizer *t, const int32_t *text, int n,
                       int32_t id)
{
    struct grammar_matcher m;
    size_t length;
    bool can = true;

    grammar_matcher_init(&m, g);
    for (int i = 0; i <= n && can; i++) {
        int32_t token = i < n ? text[i] : id;
        const char *bytes = tokenizer_bytes(t, token, &length);
        can = length > 0 && !tokenizer_is_special(t, token) &&
              grammar_matcher_advance(&m, bytes, length);
    }
    grammar_matcher_fini(&m);
    return can;
}

/* Small vocabularies lack some, and then a text can get stuck. */
static bool has_all_bytes(const struct token_trie *trie)
{
    int n = 0;

    for (uint32_t i = 0; i < trie->n_nodes; i = trie->nodes[i].end)
        n += trie->nodes[i].id != TRIE_NO_TOKEN;
    return n == 256;
}

START_TEST(masks_are_what_trying_each_token_gives)
{
    enum { MOST = 24 };
    struct test_random r = test_random(500 + (uint64_t)_i);
    struct tokenizer *t = open_family(_i / N_GRAMMARS);
    struct token_trie *trie = token_trie_create(t);
    struct grammar *g = compile(_i % N_GRAMMARS);
    size_t words = (size_t)trie->n_ids / 32 + 1 + SPARE_WORDS, length;
    uint32_t *mask = mem_calloc(words, sizeof *mask), n_allowed;
    struct grammar_matcher m;
    int32_t text[MOST], allowed = -1;

    grammar_matcher_init(&m, g);
    for (int n = 0; n < MOST; n++) {
        uint32_t n_tried = 0;
        memset(mask, 0xFF, words * sizeof *mask);
        ck_assert_int_eq(grammar_matcher_mask(&m, trie, mask, words, &n_allowed), ST_OK);
        for (int32_t id = 0; id < (int32_t)words * 32; id++) {
            bool in_mask = mask[id / 32] >> id % 32 & 1;
            ck_assert_msg(in_mask == can_follow(g, t, text, n, id), "token %d after %d", id, n);
            n_tried += in_mask;
            if (in_mask && random_below(&r, (int)n_tried) == 0)
                allowed = id;
        }
        ck_assert_uint_eq(n_tried, n_allowed);
        if (n_allowed == 0)
            break;
        text[n] = allowed;
        const char *bytes = tokenizer_bytes(t, allowed, &length);
        ck_assert(grammar_matcher_advance(&m, bytes, length));
    }
    ck_assert(n_allowed > 0 || grammar_matcher_is_complete(&m) || !has_all_bytes(trie));
    grammar_matcher_fini(&m);
    grammar_release(g);
    mem_free(mask);
    token_trie_destroy(trie);
    tokenizer_close(t);
}
END_TEST

START_TEST(what_does_not_fit_changes_nothing)
{
    struct grammar_matcher a, b;
    struct grammar *g = compile(2);

    grammar_matcher_init(&a, g);
    grammar_matcher_init(&b, g);
    ck_assert(!grammar_matcher_advance(&a, "yo", 2));
    ck_assert(grammar_matcher_advance(&a, "yes", 3));
    ck_assert(grammar_matcher_may_end(&a) && !grammar_matcher_is_complete(&a));
    ck_assert(!grammar_matcher_may_end(&b));
    ck_assert(!grammar_matcher_advance(&a, "terdaz", 6));
    ck_assert(grammar_matcher_advance(&a, "terday", 6));
    ck_assert(grammar_matcher_is_complete(&a));
    ck_assert(!grammar_matcher_advance(&a, "x", 1));
    grammar_matcher_fini(&b);
    grammar_matcher_fini(&a);
    grammar_release(grammar_acquire(g));
    grammar_release(g);
}
END_TEST

START_TEST(masks_are_found_again)
{
    struct tokenizer *t = open_family(0);
    struct token_trie *trie = token_trie_create(t);
    size_t words = (size_t)trie->n_ids / 32 + 1;
    uint32_t *mask = mem_calloc(words, sizeof *mask), n;
    struct grammar *g = compile(3);
    struct grammar_matcher m;

    for (int i = 0; i < 3; i++) {
        grammar_matcher_init(&m, g);
        /* Behind the brace, the quote and a letter; the last two are the same state. */
        ck_assert(grammar_matcher_advance(&m, "{\"abc", 1 + (size_t)i));
        ck_assert_int_eq(grammar_matcher_mask(&m, trie, mask, words, &n), ST_OK);
        grammar_matcher_fini(&m);
    }
    ck_assert_uint_eq(grammar_counts(g).made, 2);
    ck_assert_uint_eq(grammar_counts(g).found, 1);
    grammar_release(g);
    mem_free(mask);
    token_trie_destroy(trie);
    tokenizer_close(t);
}
END_TEST

/* More states than are kept: they are forgotten on the way, and nobody's place is lost. */
START_TEST(forgotten_states_are_found_out_again)
{
    enum { CHOICES = 2000, LENGTH = 30 };
    struct test_random r = test_random(77);
    char (*text)[LENGTH + 1] = mem_calloc(CHOICES, sizeof *text);
    const char **choices = mem_calloc(CHOICES, sizeof *choices);
    struct tokenizer *t = open_family(0);
    struct token_trie *trie = token_trie_create(t);
    size_t words = (size_t)trie->n_ids / 32 + 1;
    uint32_t *mask = mem_calloc(words, sizeof *mask), n;
    struct grammar_matcher waiting, m;
    struct grammar *g = NULL;
    struct error err;

    for (int i = 0; i < CHOICES; i++) {
        for (int k = 0; k < LENGTH; k++)
            text[i][k] = (char)(0x20 + random_below(&r, 0x5F));
        choices[i] = text[i];
    }
    ck_assert_int_eq(grammar_compile_choice(&g, choices, CHOICES, NULL, &err), ST_OK);
    grammar_matcher_init(&waiting, g);
    ck_assert(grammar_matcher_advance(&waiting, text[7], 12));
    ck_assert_int_eq(grammar_matcher_mask(&waiting, trie, mask, words, &n), ST_OK);
    for (int i = 0; i < CHOICES; i++) {
        grammar_matcher_init(&m, g);
        ck_assert(grammar_matcher_advance(&m, text[i], LENGTH));
        ck_assert(grammar_matcher_is_complete(&m));
        grammar_matcher_fini(&m);
    }
    ck_assert_int_eq(grammar_matcher_mask(&waiting, trie, mask, words, &n), ST_OK);
    ck_assert_uint_eq(grammar_counts(g).found, 0);       /* the first was forgotten */
    ck_assert(!grammar_matcher_advance(&waiting, "\n", 1));
    ck_assert(grammar_matcher_advance(&waiting, text[7] + 12, LENGTH - 12));
    ck_assert(grammar_matcher_is_complete(&waiting));
    grammar_matcher_fini(&waiting);
    grammar_release(g);
    mem_free(mask);
    mem_free(text);
    mem_free(choices);
    token_trie_destroy(trie);
    tokenizer_close(t);
}
END_TEST

TCase *grammar_case(void);
TCase *grammar_case(void)
{
    TCase *tc = tcase_create("grammar");

    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, masks_are_what_trying_each_token_gives, 0, N_FAMILIES * N_GRAMMARS);
    tcase_add_test(tc, what_does_not_fit_changes_nothing);
    tcase_add_test(tc, masks_are_found_again);
    tcase_add_test(tc, forgotten_states_are_found_out_again);
    return tc;
}
