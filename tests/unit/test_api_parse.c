#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/model/model_config.h"
#include "server/api.h"
#include "server/grammar_cache.h"
#include "tests/support/byte_tokenizer.h"

#include <check.h>
#include <stdio.h>
#include <string.h>

/* One token a byte, contexts of 100 tokens, a vocabulary with rows behind the
 * tokenizer's last id. */
enum { MAX_LEN = 100, VOCAB = 300 };

static struct tokenizer *tok;
static struct model_config model;
static struct api_context cx;
static const char *const names[] = { "tiny", "alias" };

static void setup(void)
{
    tok = byte_tokenizer_open(false);
    model = (struct model_config){ .vocab = VOCAB };
    cx = (struct api_context){
        .tokenizer = tok, .model = &model, .model_names = names, .n_model_names = 2,
        .limits = { .max_model_len = MAX_LEN, .max_choices = 8, .max_prompts = 4, .max_stops = 3,
                    .max_stop_bytes = 10, .max_bias = 3, .max_logprobs = 5,
                    .max_logprob_entries = 1000, .max_json_values = 200,
                    .max_arena_bytes = 64 * 1024 },
    };
}

static void teardown(void)
{
    tokenizer_close(tok);
}

static struct api_completion *parse(const char *body, struct api_error *err)
{
    return api_parse_completion(body, strlen(body), &cx, err);
}

static struct api_completion *accept(const char *body)
{
    struct api_error err;
    struct api_completion *c = parse(body, &err);

    if (!c)
        ck_abort_msg("%s\nrefused: %s", body, err.message);
    return c;
}

/* ---- refusals */

struct refusal {
    const char *body;
    const char *param;       /* "" is null */
    const char *message;     /* whole, or its beginning if it ends in an asterisk */
};

#define P "{\"prompt\":\"hi\","

static const struct refusal refusals[] = {
    /* the text */
    { "", "", "The request body is empty; a JSON object is expected." },
    { "   ", "", "The request body is not valid JSON: it ends early at byte 3." },
    { "[]", "", "The request body must be a JSON object." },
    { "\"prompt\"", "", "The request body must be a JSON object." },
    { "\xEF\xBB\xBF{}", "", "The request body begins with a byte order mark; JSON has none." },
    { "{\"prompt\":\"\xFF\xFE\"}", "", "The request body is not valid UTF-8 at byte 11." },
    { "{\"prompt\":\"\xC0\x80\"}", "", "The request body is not valid UTF-8 at byte 11." },
    { "{\"prompt\":\"\xED\xA0\x80\"}", "", "The request body is not valid UTF-8 at byte 11." },
    { "{\"prompt\":\"x\\u0000y\"}", "",
      "The request body has a NUL character (\\u0000) at byte 12, which texts cannot hold." },
    { "{\"prompt\":\"\\ud800\"}", "",
      "The request body is not valid JSON: lone surrogate at byte 11." },
    { "{\"prompt\":\"\\ud800x\"}", "", "*lone surrogate*" },
    { "{\"prompt\":\"\\ud800\\u0041\"}", "", "*lone surrogate*" },
    { "{\"prompt\":\"\\udc00\"}", "", "*lone surrogate*" },
    { "{\"prompt\":\"\\ud83d\\ud83d\"}", "", "*lone surrogate*" },
    { "{\"prompt\":\"a\nb\"}", "", "*control character in a string at byte 12*" },
    { "{\"prompt\":\"\\x41\"}", "", "*unknown escape*" },
    { "{\"prompt\":\"\\u12g4\"}", "", "*incomplete \\u escape*" },
    { "{\"prompt\":\"hi\"}xyz", "", "*something follows the JSON value at byte 15*" },
    { "{\"prompt\":\"hi\"}{}", "", "*something follows the JSON value*" },
    { "{\"prompt\":\"hi\",}", "", "*expected a key in quotes*" },
    { "{\"prompt\" \"hi\"}", "", "*expected a colon*" },
    { "{prompt:\"hi\"}", "", "*expected a key in quotes*" },
    { "{\"prompt\":'hi'}", "", "*unexpected character*" },
    { "{\"prompt\":\"hi\"", "", "*it ends early*" },
    { "{\"prompt\":\"hi", "", "*unfinished string*" },
    { "{\"prompt\":[1,2}", "", "*expected a comma or a closing bracket*" },
    { "{\"prompt\":[1,]}", "", "*unexpected character*" },
    { "{\"prompt\":[1 2]}", "", "*expected a comma or a closing bracket*" },
    { P "\"n\":01}", "", "*malformed number*" },
    { P "\"n\":1.}", "", "*malformed number*" },
    { P "\"n\":.5}", "", "*unexpected character*" },
    { P "\"n\":+1}", "", "*unexpected character*" },
    { P "\"n\":-}", "", "*malformed number*" },
    { P "\"n\":1e}", "", "*malformed number*" },
    { P "\"n\":NaN}", "", "*unexpected character*" },
    { P "\"n\":Infinity}", "", "*unexpected character*" },
    { P "\"n\":nul}", "", "*unexpected character*" },
    { P "\"n\":1111111111111111111111111111111111111111111111111111111111111}", "",
      "*number of too many digits*" },
    { P "\"n\":1,\"n\":2}", "n", "'n' appears twice in the request body." },
    { P "\"n\":1,\"\\u006e\":2}", "n", "'n' appears twice in the request body." },
    { P "\"prompt\":\"x\"}", "prompt", "'prompt' appears twice in the request body." },

    /* names */
    { P "\"frobnicate\":1}", "frobnicate",
      "Unrecognized request argument supplied: frobnicate" },
    { P "\"frobnicate\":null}", "frobnicate",
      "Unrecognized request argument supplied: frobnicate" },
    { P "\"Temperature\":1}", "Temperature",
      "Unrecognized request argument supplied: Temperature" },
    { P "\"suffix\":\"x\"}", "suffix", "'suffix' is not supported by this server." },
    { P "\"suffix\":\"\"}", "suffix", "'suffix' is not supported by this server." },
    { P "\"messages\":[]}", "messages",
      "'messages' is not supported by this server: it belongs to chat completions; send "
      "'prompt'." },
    { P "\"max_completion_tokens\":5}", "max_completion_tokens",
      "'max_completion_tokens' is not supported by this server: use 'max_tokens'." },
    { P "\"guided_grammar\":\"x\"}", "guided_grammar",
      "'guided_grammar' is not supported by this server." },
    { P "\"guided_json\":{\"not\":{}}}", "guided_json",
      "'guided_json' has a 'not' that is not supported." },
    { P "\"guided_json\":\"{\"}", "guided_json",
      "'guided_json' must be a JSON schema or a string with one." },
    { P "\"guided_regex\":\"a\\\\b\"}", "guided_regex",
      "'guided_regex' has a word boundary at byte 2, which is not supported." },
    { P "\"guided_choice\":[\"a\",1]}", "guided_choice",
      "'guided_choice' must be a list of strings." },
    { P "\"guided_choice\":[\"a\"],\"guided_regex\":\"a\"}", "guided_choice",
      "'guided_regex' and 'guided_choice' cannot be used together." },
    { P "\"structured_outputs\":{\"regex\":\"a\",\"choice\":[\"a\"]}}", "structured_outputs",
      "'structured_outputs' asks for more than one structure." },
    { P "\"response_format\":{\"type\":\"json_schema\",\"type\":\"text\"}}", "response_format",
      "'response_format' has 'type' twice." },
    { P "\"response_format\":{\"type\":\"text\",\"json_schema\":{}}}", "response_format",
      "'response_format' has a 'json_schema', which goes with the type*" },
    { P "\"logits_processors\":[\"x\"]}", "logits_processors",
      "'logits_processors' is not supported by this server." },
    { P "\"response_format\":{\"type\":\"grammar\"}}", "response_format",
      "'response_format.type' must be \"text\", \"json_object\" or \"json_schema\"." },
    { P "\"use_beam_search\":true}", "use_beam_search",
      "'use_beam_search' is not supported by this server." },
    { P "\"prompt_logprobs\":-1}", "prompt_logprobs",
      "'prompt_logprobs' is not supported by this server: use 'echo' with 'logprobs'." },
    { P "\"truncate_prompt_tokens\":5}", "truncate_prompt_tokens",
      "'truncate_prompt_tokens' is not supported by this server: prompts are never cut." },
    { P "\"length_penalty\":0.5}", "length_penalty",
      "'length_penalty' is not supported by this server." },
    { P "\"tools\":[{}]}", "tools", "'tools' is not supported by this server." },
    { P "\"priority\":1}", "priority", "'priority' is not supported by this server." },
    { P "\"user\":5}", "user", "'user' must be a string or an object." },

    /* prompt */
    { "{}", "prompt", "You must provide a 'prompt'." },
    { "{\"prompt\":null}", "prompt", "You must provide a 'prompt'." },
    { "{\"prompt\":\"\"}", "prompt", "'prompt' is empty: it has no tokens." },
    { "{\"prompt\":[]}", "prompt", "'prompt' is an empty list." },
    { "{\"prompt\":[[]]}", "prompt", "'prompt' is empty: it has no tokens." },
    { "{\"prompt\":[\"a\",\"\"]}", "prompt",
      "'prompt', entry 1, is empty: it has no tokens." },
    { "{\"prompt\":[[1],[]]}", "prompt", "'prompt', entry 1, is empty: it has no tokens." },
    { "{\"prompt\":5}", "prompt", "'prompt' must be a string, a list of strings, a list of token "
      "ids, or a list of lists of token ids." },
    { "{\"prompt\":true}", "prompt", "'prompt' must be a string, a list*" },
    { "{\"prompt\":{\"a\":\"x\"}}", "prompt", "'prompt' must be a string, a list*" },
    { "{\"prompt\":[null]}", "prompt", "'prompt' must be a string, a list*" },
    { "{\"prompt\":[true]}", "prompt", "'prompt' must be a string, a list*" },
    { "{\"prompt\":[\"a\",1]}", "prompt",
      "'prompt' mixes kinds: entry 1 is not a string as the first is." },
    { "{\"prompt\":[[1],\"a\"]}", "prompt",
      "'prompt' mixes kinds: entry 1 is not a list as the first is." },
    { "{\"prompt\":[1,\"a\"]}", "prompt",
      "'prompt' must be made of token ids, but entry 1 is not an integer." },
    { "{\"prompt\":[1,[2]]}", "prompt",
      "'prompt' must be made of token ids, but entry 1 is not an integer." },
    { "{\"prompt\":[[1,[2]]]}", "prompt",
      "'prompt' must be made of token ids, but entry 1 is not an integer." },
    { "{\"prompt\":[1.0]}", "prompt", "'prompt' has a token id that is not an integer." },
    { "{\"prompt\":[1e1]}", "prompt", "'prompt' has a token id that is not an integer." },
    { "{\"prompt\":[5,300]}", "prompt",
      "'prompt' has the token id 300 at entry 1; ids are between 0 and 299." },
    { "{\"prompt\":[-1]}", "prompt",
      "'prompt' has the token id -1 at entry 0; ids are between 0 and 299." },
    { "{\"prompt\":[4294967297]}", "prompt",
      "'prompt' has the token id 4294967297 at entry 0; ids are between 0 and 299." },
    { "{\"prompt\":[\"a\",\"b\",\"c\",\"d\",\"e\"]}", "prompt",
      "'prompt' has more than 4 prompts." },

    /* integers */
    { P "\"max_tokens\":\"5\"}", "max_tokens", "'max_tokens' must be an integer." },
    { P "\"max_tokens\":1.0}", "max_tokens", "'max_tokens' must be an integer." },
    { P "\"max_tokens\":1e1}", "max_tokens", "'max_tokens' must be an integer." },
    { P "\"max_tokens\":true}", "max_tokens", "'max_tokens' must be an integer." },
    { P "\"max_tokens\":-1}", "max_tokens",
      "'max_tokens' must be between 0 and 4294967295, not -1." },
    { P "\"max_tokens\":99999999999999999999}", "max_tokens",
      "'max_tokens' must be between 0 and 4294967295, not 99999999999999999999." },
    { P "\"max_tokens\":0}", "max_tokens",
      "'max_tokens' must be at least 1 unless 'echo' is true." },
    { P "\"min_tokens\":17}", "min_tokens",
      "'min_tokens' (17) must not be greater than 'max_tokens' (16)." },
    { P "\"n\":0}", "n", "'n' must be between 1 and 128, not 0." },
    { P "\"n\":129}", "n", "'n' must be between 1 and 128, not 129." },
    { P "\"n\":9}", "n", "The request asks for 9 choices (1 prompts, 9 each); the limit is 8." },
    { P "\"best_of\":9}", "best_of",
      "The request asks for 9 choices (1 prompts, 9 each); the limit is 8." },
    { "{\"prompt\":[\"a\",\"b\",\"c\"],\"n\":3}", "n",
      "The request asks for 9 choices (3 prompts, 3 each); the limit is 8." },
    { P "\"n\":3,\"best_of\":2}", "best_of", "'best_of' (2) must not be less than 'n' (3)." },
    { P "\"best_of\":2,\"stream\":true}", "best_of",
      "'best_of' greater than 'n' cannot be streamed." },
    { P "\"logprobs\":6}", "logprobs", "'logprobs' must be between 0 and 5, not 6." },
    { P "\"logprobs\":-1}", "logprobs", "'logprobs' must be between 0 and 20, not -1." },
    { P "\"logprobs\":true}", "logprobs", "'logprobs' must be an integer." },
    { P "\"logprobs\":\"1\"}", "logprobs", "'logprobs' must be an integer." },
    { P "\"logprobs\":4,\"max_tokens\":60,\"n\":4}", "logprobs",
      "The request asks for 1200 log-probabilities (choices times tokens times 1 + 'logprobs'); "
      "the limit is 1000." },
    { P "\"top_k\":-2}", "top_k", "'top_k' must be between -1 and 2147483647, not -2." },
    { P "\"top_k\":0.5}", "top_k", "'top_k' must be an integer." },
    { P "\"seed\":9223372036854775808}", "seed", "'seed' must fit in 64 bits, with its sign." },
    { P "\"seed\":-9223372036854775809}", "seed", "'seed' must fit in 64 bits, with its sign." },
    { P "\"seed\":1.5}", "seed", "'seed' must be an integer." },
    { P "\"seed\":\"1\"}", "seed", "'seed' must be an integer." },

    /* numbers */
    { P "\"temperature\":2.1}", "temperature", "'temperature' must be between 0 and 2, not 2.1." },
    { P "\"temperature\":-0.1}", "temperature",
      "'temperature' must be between 0 and 2, not -0.1." },
    { P "\"temperature\":1e400}", "temperature",
      "'temperature' must be between 0 and 2, not 1e400." },
    { P "\"temperature\":\"1\"}", "temperature", "'temperature' must be a number." },
    { P "\"top_p\":0}", "top_p", "'top_p' must be greater than 0 and at most 1, not 0." },
    { P "\"top_p\":1.01}", "top_p", "'top_p' must be greater than 0 and at most 1, not 1.01." },
    { P "\"min_p\":1.5}", "min_p", "'min_p' must be between 0 and 1, not 1.5." },
    { P "\"min_p\":-0.5}", "min_p", "'min_p' must be between 0 and 1, not -0.5." },
    { P "\"presence_penalty\":2.5}", "presence_penalty",
      "'presence_penalty' must be between -2 and 2, not 2.5." },
    { P "\"frequency_penalty\":-2.5}", "frequency_penalty",
      "'frequency_penalty' must be between -2 and 2, not -2.5." },
    { P "\"repetition_penalty\":0}", "repetition_penalty",
      "'repetition_penalty' must be greater than 0 and at most 10, not 0." },
    { P "\"repetition_penalty\":10.5}", "repetition_penalty",
      "'repetition_penalty' must be greater than 0 and at most 10, not 10.5." },

    /* booleans, words */
    { P "\"stream\":1}", "stream", "'stream' must be true or false." },
    { P "\"stream\":\"true\"}", "stream", "'stream' must be true or false." },
    { P "\"echo\":0}", "echo", "'echo' must be true or false." },
    { P "\"ignore_eos\":\"no\"}", "ignore_eos", "'ignore_eos' must be true or false." },
    { P "\"attention\":\"dense\"}", "attention",
      "'attention' must be \"sparse\" or \"full\"." },
    { P "\"attention\":true}", "attention", "'attention' must be a string." },
    { P "\"cache_salt\":\"\"}", "cache_salt", "'cache_salt' must not be empty." },
    { P "\"cache_salt\":1}", "cache_salt", "'cache_salt' must be a string." },
    { P "\"model\":1}", "model", "'model' must be a string." },

    /* stream_options */
    { P "\"stream_options\":{\"include_usage\":true}}", "stream_options",
      "'stream_options' is only allowed when 'stream' is true." },
    { P "\"stream\":true,\"stream_options\":1}", "stream_options",
      "'stream_options' must be an object." },
    { P "\"stream\":true,\"stream_options\":{\"include_usage\":1}}",
      "stream_options.include_usage", "'stream_options.include_usage' must be true or false." },
    { P "\"stream\":true,\"stream_options\":{\"include_obfuscation\":true}}", "stream_options",
      "'stream_options' has 'include_obfuscation', which is not supported by this server." },

    /* stops */
    { P "\"stop\":\"\"}", "stop", "'stop' must not have an empty string." },
    { P "\"stop\":[\"a\",\"\"]}", "stop", "'stop' must not have an empty string." },
    { P "\"stop\":[\"a\",null]}", "stop", "'stop' must be a string or a list of strings." },
    { P "\"stop\":5}", "stop", "'stop' must be a string or a list of strings." },
    { P "\"stop\":{\"a\":\"b\"}}", "stop", "'stop' must be a string or a list of strings." },
    { P "\"stop\":[\"a\",\"b\",\"c\",\"d\"]}", "stop", "'stop' has more than 3 entries." },
    { P "\"stop\":\"12345678901\"}", "stop", "'stop' has a string longer than 10 bytes." },
    { P "\"stop_token_ids\":5}", "stop_token_ids",
      "'stop_token_ids' must be a list of integers." },
    { P "\"stop_token_ids\":[1.5]}", "stop_token_ids",
      "'stop_token_ids' must be a list of integers." },
    { P "\"stop_token_ids\":[300]}", "stop_token_ids",
      "'stop_token_ids' has the token id 300 at entry 0; ids are between 0 and 299." },
    { P "\"stop_token_ids\":[\"a\"]}", "stop_token_ids",
      "'stop_token_ids' must be made of token ids, but entry 0 is not an integer." },
    { P "\"stop_token_ids\":[1,2,3,4]}", "stop_token_ids",
      "'stop_token_ids' has more than 3 entries." },

    /* logit_bias */
    { P "\"logit_bias\":[1]}", "logit_bias",
      "'logit_bias' must be an object of token ids and numbers." },
    { P "\"logit_bias\":{\"300\":1}}", "logit_bias",
      "'logit_bias' has the key '300', which is not a token id between 0 and 299." },
    { P "\"logit_bias\":{\"-1\":1}}", "logit_bias", "'logit_bias' has the key '-1',*" },
    { P "\"logit_bias\":{\"05\":1}}", "logit_bias", "'logit_bias' has the key '05',*" },
    { P "\"logit_bias\":{\"\":1}}", "logit_bias", "'logit_bias' has the key '',*" },
    { P "\"logit_bias\":{\"a\":1}}", "logit_bias", "'logit_bias' has the key 'a',*" },
    { P "\"logit_bias\":{\"99999999999999999999\":1}}", "logit_bias",
      "'logit_bias' has the key '99999999999999999999',*" },
    { P "\"logit_bias\":{\"5\":101}}", "logit_bias",
      "'logit_bias' of token 5 must be a number between -100 and 100." },
    { P "\"logit_bias\":{\"5\":null}}", "logit_bias",
      "'logit_bias' of token 5 must be a number between -100 and 100." },
    { P "\"logit_bias\":{\"5\":1,\"7\":0,\"5\":2}}", "logit_bias",
      "'logit_bias' has token 5 twice." },
    { P "\"logit_bias\":{\"1\":1,\"2\":1,\"3\":1,\"4\":1}}", "logit_bias",
      "'logit_bias' has more than 3 entries." },
};
enum { N_REFUSALS = sizeof refusals / sizeof refusals[0] };

/* want may begin and end with an asterisk. */
static bool message_fits(const char *got, const char *want)
{
    size_t n = strlen(want);
    char middle[400];

    if (n == 0 || want[n - 1] != '*')
        return strcmp(got, want) == 0;
    if (want[0] != '*')
        return strncmp(got, want, n - 1) == 0;
    snprintf(middle, sizeof middle, "%.*s", (int)(n - 2), want + 1);
    return strstr(got, middle) != NULL;
}

START_TEST(bad_bodies_are_refused_by_name)
{
    const struct refusal *r = &refusals[_i];
    struct api_error err;
    struct api_completion *c = parse(r->body, &err);

    ck_assert_msg(c == NULL, "accepted: %s", r->body);
    ck_assert_int_eq(err.http, 400);
    ck_assert_str_eq(err.type, "invalid_request_error");
    ck_assert_ptr_null(err.code);
    if (strcmp(err.param, r->param) != 0 || !message_fits(err.message, r->message))
        ck_abort_msg("%s\nparam '%s', message: %s\nwanted '%s': %s", r->body, err.param,
                     err.message, r->param, r->message);
}
END_TEST

START_TEST(a_nul_byte_in_the_body_is_refused)
{
    static const char in_text[] = "{\"prompt\":\"a\0b\"}", outside[] = "{\"prompt\":\"a\"\0}";
    struct api_error err;

    ck_assert_ptr_null(api_parse_completion(in_text, sizeof in_text - 1, &cx, &err));
    ck_assert_str_eq(err.message, "The request body is not valid JSON: NUL byte at byte 12.");
    ck_assert_ptr_null(api_parse_completion(outside, sizeof outside - 1, &cx, &err));
    ck_assert_str_eq(err.message, "The request body is not valid JSON: expected a comma or a "
                     "closing bracket at byte 13.");
}
END_TEST

START_TEST(depth_values_and_fields_are_bounded)
{
    struct strbuf s = { 0 };
    struct api_error err;

    strbuf_puts(&s, "{\"metadata\":{\"a\":");
    for (int i = 0; i < 62; i++)
        strbuf_puts(&s, "[");
    strbuf_puts(&s, "[");
    ck_assert_ptr_null(parse(s.data, &err));
    ck_assert_str_eq(err.message, "The request body is nested deeper than 64 levels.");
    /* One level less is fine: 62 lists in two objects. */
    s.n--;
    for (int i = 0; i < 62; i++)
        strbuf_puts(&s, "]");
    strbuf_puts(&s, "},\"prompt\":\"x\"}");
    api_completion_free(accept(s.data));

    strbuf_clear(&s);
    strbuf_puts(&s, "{\"prompt\":[0");
    for (int i = 1; i < 199; i++)
        strbuf_puts(&s, ",0");
    strbuf_puts(&s, "]}");
    ck_assert_ptr_null(parse(s.data, &err));
    ck_assert_str_eq(err.message, "The request body has more than 200 JSON values.");

    strbuf_clear(&s);
    strbuf_puts(&s, "{");
    for (int i = 0; i < 129; i++)
        strbuf_printf(&s, "%s\"f%d\":0", i ? "," : "", i);
    ck_assert_ptr_null(parse(s.data, &err));
    ck_assert_str_eq(err.message, "The request body has more than 128 fields.");
    strbuf_fini(&s);
}
END_TEST

START_TEST(memory_of_a_request_is_bounded)
{
    struct api_error err;

    cx.limits.max_arena_bytes = 100;
    ck_assert_ptr_null(parse("{\"prompt\":\"0123456789012345678901234567890123456789\"}", &err));
    ck_assert_int_eq(err.http, 400);
    ck_assert_str_eq(err.message, "The request needs more than 100 bytes of memory.");
}
END_TEST

START_TEST(names_from_outside_are_cut)
{
    struct strbuf s = { 0 };
    struct api_error err;

    /* Two bytes a letter and one in front: the cut would fall inside a letter. */
    strbuf_puts(&s, P "\"x");
    for (int i = 0; i < 200; i++)
        strbuf_puts(&s, "\xC3\xA9");
    strbuf_puts(&s, "\":1}");
    ck_assert_ptr_null(parse(s.data, &err));
    ck_assert_uint_eq(strlen(err.param), 59);
    ck_assert_uint_eq(strlen(err.message), strlen("Unrecognized request argument supplied: ") + 59);
    strbuf_fini(&s);
}
END_TEST

START_TEST(unknown_models_are_not_found)
{
    struct api_error err;

    ck_assert_ptr_null(parse(P "\"model\":\"gpt-4\"}", &err));
    ck_assert_int_eq(err.http, 404);
    ck_assert_str_eq(err.type, "not_found_error");
    ck_assert_str_eq(err.code, "model_not_found");
    ck_assert_str_eq(err.param, "model");
    ck_assert_str_eq(err.message, "The model `gpt-4` does not exist.");
}
END_TEST

/* ---- context length */

/* A prompt of n bytes as a string, and of n ids. */
static struct api_completion *with_length(int n, const char *rest, bool ids, struct api_error *err)
{
    struct strbuf s = { 0 };

    strbuf_puts(&s, ids ? "{\"prompt\":[" : "{\"prompt\":\"");
    for (int i = 0; i < n; i++)
        strbuf_puts(&s, ids ? i ? ",65" : "65" : "A");
    strbuf_printf(&s, "%s%s}", ids ? "]" : "\"", rest);
    struct api_completion *c = api_parse_completion(s.data, s.n, &cx, err);
    strbuf_fini(&s);
    return c;
}

START_TEST(contexts_that_do_not_fit_are_refused_with_counts)
{
    static const struct {
        int n_prompt;
        const char *rest, *message, *param;
    } rows[] = {
        { 84, "", NULL, NULL },
        { 85, "", "However, you requested 101 tokens (85 in the prompt, 16 in the completion).",
          "max_tokens" },
        { 99, ",\"max_tokens\":1", NULL, NULL },
        { 100, ",\"max_tokens\":1",
          "However, you requested 101 tokens (100 in the prompt, 1 in the completion).",
          "max_tokens" },
        { 100, ",\"max_tokens\":0,\"echo\":true", NULL, NULL },
        { 101, ",\"max_tokens\":0,\"echo\":true", "", "prompt" },
        { 1, ",\"max_tokens\":99", NULL, NULL },
        { 1, ",\"max_tokens\":100",
          "However, you requested 101 tokens (1 in the prompt, 100 in the completion).",
          "max_tokens" },
        { 1, ",\"max_tokens\":4294967295",
          "However, you requested 4294967296 tokens (1 in the prompt, 4294967295 in the "
          "completion).", "max_tokens" },
    };

    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        for (int ids = 0; ids < 2; ids++) {
            struct api_error err;
            struct api_completion *c = with_length(rows[i].n_prompt, rows[i].rest, ids, &err);
            if (!rows[i].message) {
                ck_assert_ptr_nonnull(c);
                ck_assert_uint_eq(c->prompts[0].n_ids, rows[i].n_prompt);
                api_completion_free(c);
                continue;
            }
            ck_assert_ptr_null(c);
            ck_assert_int_eq(err.http, 400);
            ck_assert_str_eq(err.code, "context_length_exceeded");
            ck_assert_str_eq(err.param, rows[i].param);
            ck_assert(strncmp(err.message, "This model's maximum context length is 100 tokens. ",
                              51) == 0);
            ck_assert_msg(strstr(err.message, rows[i].message) != NULL, "%s", err.message);
        }
}
END_TEST

START_TEST(long_texts_are_counted_only_so_far)
{
    struct api_error err;

    ck_assert_ptr_null(with_length(5000, "", false, &err));
    ck_assert_str_eq(err.message,
                     "This model's maximum context length is 100 tokens. However, you requested at "
                     "least 117 tokens (at least 101 in the prompt, 16 in the completion).");
    ck_assert_ptr_null(with_length(150, "", true, &err));
    ck_assert_str_eq(err.message,
                     "This model's maximum context length is 100 tokens. However, you requested "
                     "166 tokens (150 in the prompt, 16 in the completion).");
}
END_TEST

/* ---- what is accepted */

START_TEST(defaults_are_those_of_the_protocol)
{
    struct api_completion *c = accept("{\"prompt\":\"hi\"}");
    const struct request *t = &c->template;

    ck_assert_uint_eq(c->n_prompts, 1);
    ck_assert_uint_eq(c->prompts[0].n_ids, 2);
    ck_assert_int_eq(c->prompts[0].ids[0], 'h');
    ck_assert_int_eq(c->prompts[0].ids[1], 'i');
    ck_assert_ptr_null(c->prompts[0].text);
    ck_assert_uint_eq(c->n, 1);
    ck_assert_uint_eq(c->best_of, 1);
    ck_assert(!c->stream && !c->include_usage && !c->echo && !c->has_seed);
    ck_assert_int_eq(c->logprobs, -1);
    ck_assert_str_eq(c->model, "tiny");
    ck_assert_uint_eq(t->max_tokens, 16);
    ck_assert_uint_eq(t->min_tokens, 0);
    ck_assert(t->temperature == 1.0f && t->top_p == 1.0f && t->min_p == 0.0f);
    ck_assert(t->presence == 0.0f && t->frequency == 0.0f && t->repetition == 1.0f);
    ck_assert_int_eq(t->top_k, 0);
    ck_assert_int_eq(t->n_top, -1);
    ck_assert_uint_eq(t->n_bias + t->n_stop_ids + t->n_stops, 0);
    ck_assert(!t->include_stop && !t->ignore_eos && t->skip_special && t->sparse);
    ck_assert(!t->score_prompt);
    ck_assert_uint_eq(t->cache_salt, 0);
    api_completion_free(c);
}
END_TEST

START_TEST(the_model_has_defaults_of_its_own)
{
    model.has_temperature = model.has_top_p = model.has_top_k = model.has_min_p = true;
    model.has_repetition = true;
    model.temperature = 0.5f;
    model.top_p = 0.25f;
    model.top_k = 20;
    model.min_p = 0.125f;
    model.repetition = 1.5f;
    struct api_completion *c = accept("{\"prompt\":\"hi\",\"temperature\":null}");
    const struct request *t = &c->template;
    ck_assert(t->temperature == 0.5f && t->top_p == 0.25f && t->min_p == 0.125f);
    ck_assert(t->repetition == 1.5f && t->top_k == 20);
    api_completion_free(c);

    c = accept("{\"prompt\":\"hi\",\"temperature\":0,\"top_p\":1,\"top_k\":-1,\"min_p\":0,"
               "\"repetition_penalty\":1}");
    t = &c->template;
    ck_assert(t->temperature == 0.0f && t->top_p == 1.0f && t->min_p == 0.0f);
    ck_assert(t->repetition == 1.0f && t->top_k == 0);
    api_completion_free(c);
}
END_TEST

START_TEST(null_is_absent)
{
    static const char *const all[] = {
        "model", "max_tokens", "min_tokens", "n", "best_of", "logprobs", "temperature", "top_p",
        "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
        "logit_bias", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output",
        "skip_special_tokens", "add_special_tokens", "echo", "stream", "stream_options",
        "attention", "cache_salt", "user", "metadata", "seed", "suffix", "guided_json", "tools",
        "guided_regex", "guided_choice", "response_format", "structured_outputs",
    };
    struct strbuf s = { 0 };

    strbuf_puts(&s, "{\"prompt\":\"hi\"");
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        strbuf_printf(&s, ",\"%s\":null", all[i]);
    strbuf_puts(&s, "}");
    struct api_completion *c = accept(s.data);
    ck_assert_uint_eq(c->template.max_tokens, 16);
    ck_assert_int_eq(c->logprobs, -1);
    ck_assert(!c->has_seed && c->template.sparse && c->template.skip_special);
    api_completion_free(c);
    strbuf_fini(&s);
}
END_TEST

START_TEST(every_field_arrives)
{
    struct api_completion *c = accept(
        "{\"model\":\"alias\",\"prompt\":[[72,105],[299]],\"max_tokens\":7,\"min_tokens\":3,"
        "\"n\":2,"
        "\"best_of\":3,\"logprobs\":2,\"temperature\":0.5,\"top_p\":0.75,\"top_k\":5,"
        "\"min_p\":0.25,\"presence_penalty\":-1.5,\"frequency_penalty\":1.5,"
        "\"repetition_penalty\":1.25,\"logit_bias\":{\"7\":-100,\"5\":1.5},"
        "\"stop\":[\"ab\",\"\\u00e9\"],\"stop_token_ids\":[9,0],\"ignore_eos\":true,"
        "\"include_stop_str_in_output\":true,\"skip_special_tokens\":false,\"echo\":true,"
        "\"attention\":\"full\",\"cache_salt\":\"s\",\"user\":\"u\",\"seed\":-5}");
    const struct request *t = &c->template;

    ck_assert_str_eq(c->model, "alias");
    ck_assert_uint_eq(c->n_prompts, 2);
    ck_assert_uint_eq(c->prompts[0].n_ids, 2);
    ck_assert_uint_eq(c->prompts[0].text_bytes, 2);
    ck_assert_mem_eq(c->prompts[0].text, "Hi", 2);
    ck_assert_uint_eq(c->prompts[1].n_ids, 1);
    ck_assert_int_eq(c->prompts[1].ids[0], 299);
    ck_assert_uint_eq(c->prompts[1].text_bytes, 0);
    ck_assert_uint_eq(c->n, 2);
    ck_assert_uint_eq(c->best_of, 3);
    ck_assert_int_eq(c->logprobs, 2);
    ck_assert(c->echo && c->has_seed && !c->stream);
    ck_assert_uint_eq(t->seed, (uint64_t)-5);
    ck_assert_uint_eq(t->max_tokens, 7);
    ck_assert_uint_eq(t->min_tokens, 3);
    ck_assert(t->temperature == 0.5f && t->top_p == 0.75f && t->min_p == 0.25f);
    ck_assert(t->presence == -1.5f && t->frequency == 1.5f && t->repetition == 1.25f);
    ck_assert_int_eq(t->top_k, 5);
    ck_assert_int_eq(t->n_top, 2);
    ck_assert_uint_eq(t->n_bias, 2);
    ck_assert(t->bias[0].id == 5 && t->bias[0].bias == 1.5f);
    ck_assert(t->bias[1].id == 7 && t->bias[1].bias == -100.0f);
    ck_assert_uint_eq(t->n_stops, 2);
    ck_assert_str_eq(t->stops[0], "ab");
    ck_assert_str_eq(t->stops[1], "\xC3\xA9");
    ck_assert_uint_eq(t->n_stop_ids, 2);
    ck_assert(t->stop_ids[0] == 9 && t->stop_ids[1] == 0);
    ck_assert(t->ignore_eos && t->include_stop && !t->skip_special && !t->sparse);
    ck_assert(t->score_prompt);
    ck_assert_uint_ne(t->cache_salt, 0);
    api_completion_free(c);
}
END_TEST

/* They are above zero, so they may not become it. */
START_TEST(numbers_too_small_for_a_float)
{
    struct api_completion *c = accept(P "\"top_p\":1e-60,\"repetition_penalty\":5e-324}");

    ck_assert(c->template.top_p > 0 && c->template.top_p < 1e-44f);
    ck_assert(c->template.repetition > 0 && c->template.repetition < 1e-44f);
    api_completion_free(c);
}
END_TEST

START_TEST(streams_may_ask_for_usage)
{
    struct api_completion *c = accept(
        P "\"stream\":true,\"stream_options\":{\"include_usage\":true,"
        "\"include_obfuscation\":false,\"continuous_usage_stats\":null}}");

    ck_assert(c->stream && c->include_usage);
    api_completion_free(c);
    c = accept(P "\"stream\":true,\"stream_options\":{}}");
    ck_assert(c->stream && !c->include_usage);
    api_completion_free(c);
}
END_TEST

START_TEST(seeds_keep_all_their_bits)
{
    static const struct {
        const char *body;
        uint64_t seed;
    } rows[] = {
        { P "\"seed\":0}", 0 },
        { P "\"seed\":9007199254740993}", 9007199254740993u },
        { P "\"seed\":9223372036854775807}", INT64_MAX },
        { P "\"seed\":-9223372036854775808}", (uint64_t)INT64_MIN },
        { P "\"seed\":-1}", UINT64_MAX },
    };

    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct api_completion *c = accept(rows[i].body);
        ck_assert(c->has_seed);
        ck_assert_uint_eq(c->template.seed, rows[i].seed);
        api_completion_free(c);
    }
}
END_TEST

/* Default values of what is missing ask for nothing. */
START_TEST(harmless_values_are_let_through)
{
    api_completion_free(accept(
        P "\"use_beam_search\":false,\"length_penalty\":1.0,\"early_stopping\":false,"
        "\"spaces_between_special_tokens\":true,\"response_format\":{\"type\":\"text\"},"
        "\"bad_words\":[],\"priority\":0,\"return_token_ids\":false,\"tools\":[],"
        "\"logits_processors\":[],\"store\":false,\"vllm_xargs\":{},\"user\":\"me\","
        "\"metadata\":{\"a\":[1]}}"));
}
END_TEST

START_TEST(prompts_come_in_four_shapes)
{
    struct api_completion *c = accept("{\"prompt\":[\"a\",\"bc\"]}");
    ck_assert_uint_eq(c->n_prompts, 2);
    ck_assert_uint_eq(c->prompts[1].n_ids, 2);
    api_completion_free(c);

    c = accept("{\"prompt\":[65,0,299]}");
    ck_assert_uint_eq(c->n_prompts, 1);
    ck_assert_uint_eq(c->prompts[0].n_ids, 3);
    ck_assert_int_eq(c->prompts[0].ids[2], 299);
    api_completion_free(c);

    c = accept("{\"prompt\":[\"one\"]}");
    ck_assert_uint_eq(c->n_prompts, 1);
    api_completion_free(c);

    /* Escapes become the text they stand for. */
    c = accept("{\"prompt\":\"\\ud83d\\ude42\\n\\\"\\u00e9\",\"echo\":true}");
    ck_assert_uint_eq(c->prompts[0].n_ids, 8);
    ck_assert_mem_eq(c->prompts[0].text, "\xF0\x9F\x99\x82\n\"\xC3\xA9", 8);
    api_completion_free(c);
}
END_TEST

START_TEST(special_tokens_can_be_left_out)
{
    struct tokenizer *with_bos = byte_tokenizer_open(true);

    cx.tokenizer = with_bos;
    struct api_completion *c = accept("{\"prompt\":\"a\"}");
    ck_assert_uint_eq(c->prompts[0].n_ids, 2);
    ck_assert_int_eq(c->prompts[0].ids[0], BYTE_BOS);
    api_completion_free(c);
    c = accept("{\"prompt\":\"\"}");
    ck_assert_uint_eq(c->prompts[0].n_ids, 1);
    api_completion_free(c);
    c = accept("{\"prompt\":\"a<end>\",\"add_special_tokens\":false}");
    ck_assert_uint_eq(c->prompts[0].n_ids, 2);
    ck_assert_int_eq(c->prompts[0].ids[1], BYTE_END);
    api_completion_free(c);
    c = accept("{\"prompt\":[256,97,257],\"echo\":true}");
    ck_assert_uint_eq(c->prompts[0].n_ids, 3);
    ck_assert_str_eq(c->prompts[0].text, "<bos>a<end>");
    api_completion_free(c);
    tokenizer_close(with_bos);
}
END_TEST

START_TEST(a_token_without_a_row_is_refused)
{
    struct api_error err;

    model.vocab = 257;
    ck_assert_ptr_null(parse("{\"prompt\":\"a<end>\"}", &err));
    ck_assert_str_eq(err.message, "'prompt' has the token 257, which the model does not know.");
}
END_TEST

/* What the engine has to compute for each way of asking. */
START_TEST(scoring_follows_from_echo_logprobs_and_best_of)
{
    static const struct {
        const char *body;
        bool score_prompt;
        int n_top, logprobs;
    } rows[] = {
        { P "\"echo\":true}", false, -1, -1 },
        { P "\"echo\":true,\"logprobs\":0}", true, 0, 0 },
        { P "\"echo\":true,\"logprobs\":3,\"max_tokens\":0}", true, 3, 3 },
        { P "\"echo\":true,\"max_tokens\":0}", true, 0, -1 },
        { P "\"logprobs\":3}", false, 3, 3 },
        { P "\"best_of\":2}", false, 0, -1 },
        { P "\"best_of\":2,\"logprobs\":1}", false, 1, 1 },
        { P "\"n\":2,\"best_of\":2}", false, -1, -1 },
    };

    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct api_completion *c = accept(rows[i].body);
        ck_assert_int_eq(c->template.score_prompt, rows[i].score_prompt);
        ck_assert_int_eq(c->template.n_top, rows[i].n_top);
        ck_assert_int_eq(c->logprobs, rows[i].logprobs);
        api_completion_free(c);
    }
}
END_TEST

START_TEST(salts_differ_and_repeat)
{
    struct api_completion *a = accept(P "\"cache_salt\":\"one\"}");
    struct api_completion *b = accept(P "\"cache_salt\":\"two\"}");
    struct api_completion *c = accept(P "\"cache_salt\":\"one\"}");

    ck_assert_uint_ne(a->template.cache_salt, b->template.cache_salt);
    ck_assert_uint_eq(a->template.cache_salt, c->template.cache_salt);
    api_completion_free(a);
    api_completion_free(b);
    api_completion_free(c);
}
END_TEST

START_TEST(stops_may_be_one_string)
{
    struct api_completion *c = accept(P "\"stop\":\"END\"}");

    ck_assert_uint_eq(c->template.n_stops, 1);
    ck_assert_str_eq(c->template.stops[0], "END");
    api_completion_free(c);
    c = accept(P "\"stop\":[],\"logit_bias\":{},\"stop_token_ids\":[]}");
    ck_assert_uint_eq(c->template.n_stops + c->template.n_bias + c->template.n_stop_ids, 0);
    api_completion_free(c);
}
END_TEST

/* Every prefix of a good body is refused, whatever it cuts. */
START_TEST(truncated_bodies_are_refused)
{
    static const char body[] =
        "{\"prompt\":[\"\\ud83d\\ude42\\n\"],\"logit_bias\":{\"5\":-1.5e0},\"echo\":true,"
        "\"n\":12}";
    struct api_error err;

    for (size_t n = 0; n < sizeof body - 1; n++) {
        char *copy = mem_strndup(body, n);
        ck_assert_ptr_null(api_parse_completion(copy, n, &cx, &err));
        ck_assert_int_eq(err.http, 400);
        mem_free(copy);
    }
}
END_TEST

/* The same text of the same field gives the same grammar, as long as it is kept; another field
 * means something else by it. */
START_TEST(grammars_are_kept)
{
    static const char regex[] = P "\"guided_regex\":\"ab\"}";
    struct api_completion *first, *again, *other, *later;
    char body[100];

    cx.grammars = grammar_cache_create();
    first = accept(regex);
    again = accept(regex);
    other = accept(P "\"guided_json\":{\"const\":\"ab\"}}");
    ck_assert_ptr_nonnull(first->grammar);
    ck_assert_ptr_eq(first->template.grammar, first->grammar);
    ck_assert_ptr_eq(first->grammar, again->grammar);
    ck_assert_ptr_ne(first->grammar, other->grammar);
    for (int i = 0; i < GRAMMAR_CACHE_ENTRIES; i++) {
        snprintf(body, sizeof body, P "\"guided_choice\":[\"c%d\"]}", i);
        api_completion_free(accept(body));
    }
    later = accept(regex);
    ck_assert_ptr_ne(later->grammar, first->grammar);
    grammar_cache_destroy(cx.grammars);
    cx.grammars = NULL;
    api_completion_free(first);
    api_completion_free(again);
    api_completion_free(other);
    api_completion_free(later);
}
END_TEST

TCase *api_parse_case(void)
{
    TCase *tc = tcase_create("api_parse");

    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_loop_test(tc, bad_bodies_are_refused_by_name, 0, N_REFUSALS);
    tcase_add_test(tc, grammars_are_kept);
    tcase_add_test(tc, a_nul_byte_in_the_body_is_refused);
    tcase_add_test(tc, depth_values_and_fields_are_bounded);
    tcase_add_test(tc, memory_of_a_request_is_bounded);
    tcase_add_test(tc, names_from_outside_are_cut);
    tcase_add_test(tc, unknown_models_are_not_found);
    tcase_add_test(tc, contexts_that_do_not_fit_are_refused_with_counts);
    tcase_add_test(tc, long_texts_are_counted_only_so_far);
    tcase_add_test(tc, defaults_are_those_of_the_protocol);
    tcase_add_test(tc, the_model_has_defaults_of_its_own);
    tcase_add_test(tc, null_is_absent);
    tcase_add_test(tc, every_field_arrives);
    tcase_add_test(tc, numbers_too_small_for_a_float);
    tcase_add_test(tc, streams_may_ask_for_usage);
    tcase_add_test(tc, seeds_keep_all_their_bits);
    tcase_add_test(tc, harmless_values_are_let_through);
    tcase_add_test(tc, prompts_come_in_four_shapes);
    tcase_add_test(tc, special_tokens_can_be_left_out);
    tcase_add_test(tc, a_token_without_a_row_is_refused);
    tcase_add_test(tc, scoring_follows_from_echo_logprobs_and_best_of);
    tcase_add_test(tc, salts_differ_and_repeat);
    tcase_add_test(tc, stops_may_be_one_string);
    tcase_add_test(tc, truncated_bodies_are_refused);
    return tc;
}
