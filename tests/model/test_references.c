/* Families against recorded outputs of the reference implementation, in
 * float32: top-8 logprobs at the last position within 0.02, and greedy tokens,
 * the recorded ones fed, equal unless the reference's margin is below 0.02.
 * K and V are rounded to bf16 here and not there. */

#include "tests/support/model_runner.h"

#include <check.h>
#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const char *const names[] = {
    "qwen3", "qwen3-yarn-g5", "qwen2-g7", "llama3", "llama-linear-mha", "mistral", "smollm2",
    "qwen3-moe", "qwen3-moe-128", "glm4-moe-lite", "glm4-moe-lite-small",
};
enum { N_NAMES = sizeof names / sizeof *names, MAX_PROMPT = 6000, N_TOP = 8 };

#define TOLERANCE 0.02
/* Against logprobs recorded with K and V rounded as here: what remains is the order of
 * additions, and keys so close to a rounding border that it decides their side. */
#define SAME_ROUNDING_TOLERANCE 0.001

static cJSON *read_json(const char *path)
{
    static char text[1 << 17];
    FILE *in = fopen(path, "rb");

    ck_assert_msg(in != NULL, "%s is missing", path);
    size_t n = fread(text, 1, sizeof text - 1, in);
    fclose(in);
    cJSON *json = cJSON_ParseWithLength(text, n);
    ck_assert_msg(json != NULL, "%s is not JSON", path);
    return json;
}

static double number(const cJSON *object, const char *key, int i)
{
    const cJSON *item = cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(object, key), i);

    ck_assert_msg(cJSON_IsNumber(item), "no number %d in \"%s\"", i, key);
    return item->valuedouble;
}

/* The logprob of id among the largest; it fails the test by its size when absent. */
static double logprob_of(const struct sample_result *r, int id)
{
    for (int i = 0; i < r->n_top; i++)
        if (r->top[i].id == id)
            return (double)r->top[i].logprob;
    return -1000;
}

/* The top logprobs of result against those recorded; the largest difference. */
static double top_difference(const struct sample_result *result, const cJSON *ids,
                             const cJSON *logprobs)
{
    double worst = 0;

    ck_assert_int_eq(cJSON_GetArraySize(ids), N_TOP);
    for (int i = 0; i < N_TOP; i++) {
        double want = cJSON_GetArrayItem(logprobs, i)->valuedouble;
        int id = (int)cJSON_GetArrayItem(ids, i)->valuedouble;
        worst = fmax(worst, fabs(want - logprob_of(result, id)));
    }
    return worst;
}

static double check_prompt(struct runner *r, const cJSON *prompt, const int32_t *ids, int n,
                           const char *margins, const char *top_ids, const char *top_logprobs)
{
    const cJSON *greedy = cJSON_GetObjectItemCaseSensitive(prompt, "greedy_ids");
    int n_greedy = cJSON_GetArraySize(greedy);
    struct test_seq seq;

    ck_assert_int_ge(n_greedy, 16);
    seq_init(r, &seq, n + n_greedy);
    struct sample_result result = runner_feed(r, &seq, ids, n, 500);
    const cJSON *rounded = cJSON_GetObjectItemCaseSensitive(prompt, "top_logprobs_bf16_kv");
    const cJSON *best_ids = cJSON_GetObjectItemCaseSensitive(prompt, top_ids);
    double worst = top_difference(&result, best_ids,
                                  cJSON_GetObjectItemCaseSensitive(prompt, top_logprobs));
    if (rounded) {
        double left = top_difference(&result, best_ids, rounded);
        ck_assert_msg(left <= SAME_ROUNDING_TOLERANCE,
                      "prompt of %d: %g from the reference with bf16 K and V", n, left);
        printf("prompt of %d: logprobs within %.5f of the reference with bf16 K and V\n", n,
               left);
    }
    for (int i = 0; i < n_greedy; i++) {
        int want = (int)cJSON_GetArrayItem(greedy, i)->valuedouble;
        if (number(prompt, margins, i) >= TOLERANCE)
            ck_assert_msg(result.token == want, "prompt of %d, greedy token %d: %d, not %d", n,
                          i, result.token, want);
        result = runner_decode(r, &seq, want, false);
    }
    seq_fini(r, &seq);
    return worst;
}

static void check_sum(const char *dir, const cJSON *golden)
{
    const cJSON *sum = cJSON_GetObjectItemCaseSensitive(golden, "weights_sum");

    ck_assert(cJSON_IsString(sum));
    ck_assert_msg(strtoull(sum->valuestring, NULL, 16) == folder_weights_sum(dir),
                  "%s has other weights than the recorded outputs", dir);
}

START_TEST(family_matches_reference)
{
    static int32_t ids[MAX_PROMPT];
    char dir[128], path[128];
    struct runner r;
    double worst = 0;

    snprintf(dir, sizeof dir, "build/models/%s", names[_i]);
    snprintf(path, sizeof path, "tests/model/golden/%s.json", names[_i]);
    cJSON *golden = read_json(path);
    check_sum(dir, golden);
    runner_open(&r, &(struct runner_options){ .dir = dir, .select = select_default(),
                                              .max_rows = 500, .max_seqs = 1,
                                              .max_tokens = MAX_PROMPT + 16 });
    const cJSON *prompt;
    int n_prompts = 0;
    cJSON_ArrayForEach(prompt, cJSON_GetObjectItemCaseSensitive(golden, "prompts")) {
        int n = (int)cJSON_GetObjectItemCaseSensitive(prompt, "n_tokens")->valuedouble;
        ck_assert_int_le(n, MAX_PROMPT);
        test_prompt(ids, n);
        worst = fmax(worst, check_prompt(&r, prompt, ids, n, "greedy_margins", "top_ids",
                                         "top_logprobs"));
        n_prompts++;
    }
    ck_assert_int_eq(n_prompts, 4);
    printf("%s: logprobs within %.4f of the reference\n", names[_i], worst);
    ck_assert_double_le(worst, TOLERANCE);
    runner_close(&r);
    cJSON_Delete(golden);
}
END_TEST

START_TEST(bundled_model_matches_reference)
{
    cJSON *golden = read_json("tests/model/golden/bundled.json");
    static int32_t ids[MAX_PROMPT];
    const cJSON *prompt, *id;
    struct runner r;
    double worst = 0;
    int n_prompts = 0;

    runner_open(&r, &(struct runner_options){ .dir = "models/asynctlsd-books-9m",
                                              .select = select_default(), .max_rows = 500,
                                              .max_seqs = 1, .max_tokens = MAX_PROMPT });
    cJSON_ArrayForEach(prompt, cJSON_GetObjectItemCaseSensitive(golden, "prompts")) {
        int n = 0;
        cJSON_ArrayForEach(id, cJSON_GetObjectItemCaseSensitive(prompt, "ids"))
            ids[n++] = (int32_t)id->valuedouble;
        worst = fmax(worst, check_prompt(&r, prompt, ids, n, "greedy_top2_logit_gap", "top8_ids",
                                         "top8_logprobs"));
        n_prompts++;
    }
    ck_assert_int_eq(n_prompts, 3);
    printf("bundled model: logprobs within %.4f of the reference\n", worst);
    ck_assert_double_le(worst, TOLERANCE);
    runner_close(&r);
    cJSON_Delete(golden);
}
END_TEST

TCase *references_case(void)
{
    TCase *tc = tcase_create("references");

    tcase_set_timeout(tc, 300);
    tcase_add_loop_test(tc, family_matches_reference, 0, N_NAMES);
    tcase_add_test(tc, bundled_model_matches_reference);
    return tc;
}
