#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"
#include "engine/model/tokenizer.h"
#include "server/api.h"
#include "server/json_scan.h"
#include "tests/support/byte_tokenizer.h"

#include <check.h>
#include <math.h>
#include <string.h>

static struct tokenizer *tok;
static struct strbuf out;
static const struct api_head head = { .id = "cmpl-1", .model = "tiny", .created = 1700000000 };
#define HEAD "{\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1700000000," \
             "\"model\":\"tiny\",\"choices\":["

static void setup(void)
{
    tok = byte_tokenizer_open(false);
    out = (struct strbuf){ 0 };
}

static void teardown(void)
{
    strbuf_fini(&out);
    tokenizer_close(tok);
}

/* Whatever is written is strict JSON without a line end. */
static void check_document(const char *want)
{
    struct json_scan scan;
    struct error err;

    ck_assert_uint_eq(strlen(out.data), out.n);
    ck_assert_ptr_null(strchr(out.data, '\n'));
    if (json_scan(&scan, out.data, out.n, 1000000, &err) != ST_OK)
        ck_abort_msg("%s\n%s", err.text, out.data);
    if (want)
        ck_assert_str_eq(out.data, want);
}

static void write_pieces(const struct api_piece *pieces, uint32_t n)
{
    strbuf_clear(&out);
    api_write_completion(&out, &head, tok, pieces, n, NULL, false);
}

START_TEST(strings_are_escaped)
{
    static const struct {
        const char *s;
        size_t n;
        const char *want;
    } rows[] = {
        { "", 0, "\"\"" },
        { "plain", 5, "\"plain\"" },
        { "a\"b\\c/", 6, "\"a\\\"b\\\\c/\"" },
        { "\b\t\n\f\r", 5, "\"\\b\\t\\n\\f\\r\"" },
        { "\0\x01\x1f\x7f", 4, "\"\\u0000\\u0001\\u001f\x7f\"" },
        { "\xC3\xA9\xF0\x9F\x99\x82", 6, "\"\xC3\xA9\xF0\x9F\x99\x82\"" },
        /* line separators that some clients split streams at */
        { "a\xC2\x85z\xE2\x80\xA8\xE2\x80\xA9", 10, "\"a\\u0085z\\u2028\\u2029\"" },
        { "\xC2\x84\xE2\x80\xAA", 5, "\"\xC2\x84\xE2\x80\xAA\"" },
        /* one U+FFFD for each maximal invalid prefix */
        { "a\xFF" "b", 3, "\"a\xEF\xBF\xBD" "b\"" },
        { "\xE2\x80", 2, "\"\xEF\xBF\xBD\"" },
        { "\xE2\x80" "a", 3, "\"\xEF\xBF\xBD" "a\"" },
        { "\xED\xA0\x80", 3, "\"\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\"" },
        { "\xC0\x80", 2, "\"\xEF\xBF\xBD\xEF\xBF\xBD\"" },
    };

    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        strbuf_clear(&out);
        api_write_string(&out, rows[i].s, rows[i].n);
        ck_assert_str_eq(out.data, rows[i].want);
    }
}
END_TEST

START_TEST(any_bytes_make_a_valid_string)
{
    uint32_t state = 12345;

    for (int round = 0; round < 20000; round++) {
        char s[12];
        for (size_t i = 0; i < sizeof s; i++) {
            state = state * 1664525 + 1013904223;
            s[i] = (char)(state >> 24);
        }
        strbuf_clear(&out);
        api_write_string(&out, s, sizeof s);
        ck_assert(utf8_is_valid(out.data, out.n));
        ck_assert(out.n >= 2 && out.data[0] == '"' && out.data[out.n - 1] == '"');
        for (size_t i = 0; i < out.n; i++)
            ck_assert((unsigned char)out.data[i] >= 0x20);
    }
}
END_TEST

START_TEST(a_chunk_has_one_choice)
{
    struct api_piece p = { .index = 3, .text = "he said \"no\"\n", .text_bytes = 13,
                           .stop_id = -1 };

    write_pieces(&p, 1);
    check_document(HEAD "{\"index\":3,\"text\":\"he said \\\"no\\\"\\n\",\"logprobs\":null,"
                   "\"finish_reason\":null}]}");
    strbuf_clear(&out);
    api_write_completion(&out, &head, tok, &p, 1, NULL, true);
    check_document(HEAD "{\"index\":3,\"text\":\"he said \\\"no\\\"\\n\",\"logprobs\":null,"
                   "\"finish_reason\":null}],\"usage\":null}");
}
END_TEST

START_TEST(finished_choices_say_why)
{
    struct api_piece p[3] = {
        { .index = 0, .text = "a", .text_bytes = 1, .finish_reason = "length", .stop_id = -1 },
        { .index = 1, .text = NULL, .text_bytes = 0, .finish_reason = "stop", .stop_id = 0 },
        { .index = 2, .text = "", .text_bytes = 0, .finish_reason = "stop", .stop_id = -1,
          .stop_string = "\n\n" },
    };
    struct api_usage usage = { .prompt_tokens = 5, .completion_tokens = 18446744073709551u,
                               .cached_tokens = 4 };

    api_write_completion(&out, &head, tok, p, 3, &usage, false);
    check_document(
        HEAD "{\"index\":0,\"text\":\"a\",\"logprobs\":null,\"finish_reason\":\"length\","
        "\"stop_reason\":null},{\"index\":1,\"text\":\"\",\"logprobs\":null,"
        "\"finish_reason\":\"stop\",\"stop_reason\":0},{\"index\":2,\"text\":\"\","
        "\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":\"\\n\\n\"}],"
        "\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":18446744073709551,"
        "\"total_tokens\":18446744073709556,\"prompt_tokens_details\":{\"cached_tokens\":4}}}");
}
END_TEST

START_TEST(the_usage_chunk_has_no_choices)
{
    struct api_usage usage = { .prompt_tokens = 2, .completion_tokens = 3 };

    api_write_completion(&out, &head, tok, NULL, 0, &usage, true);
    check_document(HEAD "],\"usage\":{\"prompt_tokens\":2,\"completion_tokens\":3,"
                   "\"total_tokens\":5,\"prompt_tokens_details\":{\"cached_tokens\":0}}}");
}
END_TEST

/* The first token of a prompt has no probability; a broken character is
 * written as bytes. */
START_TEST(logprobs_have_the_legacy_shape)
{
    static const int32_t ids[] = { 'H', 0xC3, 0xA9, BYTE_END, '"' };
    static const struct token_logprob chosen[] = {
        { -1, 0 }, { 0xC3, -0.5f }, { 0xA9, -INFINITY }, { BYTE_END, -1e-5f }, { '"', NAN },
    };
    static const struct token_logprob top[] = {
        { -1, 0 }, { -1, 0 }, { 'a', -0.25f }, { 0xC3, -0.5f }, { 'b', -2 }, { -1, 0 },
        { BYTE_END, -1e-5f }, { 'c', -20000 }, { 'd', -3 }, { 'e', -4 },
    };
    static const uint64_t offsets[] = { 10, 11, 11, 12, 17 };
    struct api_piece p = { .text = "H\xC3\xA9\"", .text_bytes = 4, .logprobs = true,
                           .stop_id = -1, .n_tokens = 5, .ids = ids, .chosen = chosen,
                           .top = top, .n_top = 2, .offsets = offsets };

    write_pieces(&p, 1);
    check_document(
        HEAD "{\"index\":0,\"text\":\"H\xC3\xA9\\\"\",\"logprobs\":{"
        "\"text_offset\":[10,11,11,12,17],"
        "\"token_logprobs\":[null,-0.5,-9999.0,-9.99999975e-06,-9999.0],"
        "\"tokens\":[\"H\",\"bytes:\\\\xc3\",\"bytes:\\\\xa9\",\"<end>\",\"\\\"\"],"
        "\"top_logprobs\":[null,{\"a\":-0.25,\"bytes:\\\\xc3\":-0.5},"
        "{\"b\":-2,\"bytes:\\\\xa9\":-9999.0},{\"<end>\":-9.99999975e-06,\"c\":-9999.0},"
        "{\"d\":-3,\"e\":-4,\"\\\"\":-9999.0}]},\"finish_reason\":null}]}");
}
END_TEST

/* Without top entries the object holds the chosen token alone. */
START_TEST(the_chosen_token_is_always_there)
{
    static const int32_t ids[] = { 'x' };
    static const struct token_logprob chosen[] = { { 'x', -7 } };
    static const uint64_t offsets[] = { 0 };
    struct api_piece p = { .text = "x", .text_bytes = 1, .stop_id = -1, .logprobs = true,
                           .n_tokens = 1, .ids = ids, .chosen = chosen, .offsets = offsets };

    write_pieces(&p, 1);
    check_document(HEAD "{\"index\":0,\"text\":\"x\",\"logprobs\":{\"text_offset\":[0],"
                   "\"token_logprobs\":[-7],\"tokens\":[\"x\"],\"top_logprobs\":[{\"x\":-7}]},"
                   "\"finish_reason\":null}]}");
    p.n_tokens = 0;
    write_pieces(&p, 1);
    check_document(HEAD "{\"index\":0,\"text\":\"x\",\"logprobs\":{\"text_offset\":[],"
                   "\"token_logprobs\":[],\"tokens\":[],\"top_logprobs\":[]},"
                   "\"finish_reason\":null}]}");
}
END_TEST

/* Ids without bytes all have the empty name; the better one stands for them. */
START_TEST(names_are_not_repeated)
{
    static const int32_t ids[] = { 290 };
    static const struct token_logprob chosen[] = { { 290, -3 } };
    static const struct token_logprob top[] = { { 'a', -1 }, { 291, -2 }, { 292, -2.5f } };
    static const uint64_t offsets[] = { 0 };
    struct api_piece p = { .text = "", .stop_id = -1, .logprobs = true, .n_tokens = 1,
                           .ids = ids, .chosen = chosen, .top = top, .n_top = 3,
                           .offsets = offsets };

    write_pieces(&p, 1);
    ck_assert_ptr_nonnull(strstr(out.data, "\"top_logprobs\":[{\"a\":-1,\"\":-2}]"));
    check_document(NULL);
}
END_TEST

START_TEST(errors_have_one_shape)
{
    struct api_error err = { .http = 400, .type = "invalid_request_error", .param = "n",
                             .message = "'n' is \"bad\"." };

    api_write_error(&out, &err);
    check_document("{\"error\":{\"message\":\"'n' is \\\"bad\\\".\",\"type\":"
                   "\"invalid_request_error\",\"param\":\"n\",\"code\":null}}");
    err = (struct api_error){ .http = 404, .type = "not_found_error", .code = "model_not_found",
                              .message = "no" };
    strbuf_clear(&out);
    api_write_error(&out, &err);
    check_document("{\"error\":{\"message\":\"no\",\"type\":\"not_found_error\",\"param\":null,"
                   "\"code\":\"model_not_found\"}}");
}
END_TEST

START_TEST(models_are_listed)
{
    static const char *const names[] = { "a", "b" };

    api_write_models(&out, names, 2, 5, 4096, false);
    check_document("{\"object\":\"list\",\"data\":[{\"id\":\"a\",\"object\":\"model\","
                   "\"created\":5,\"owned_by\":\"asynctlsd\",\"root\":\"a\",\"parent\":null,"
                   "\"max_model_len\":4096},{\"id\":\"b\",\"object\":\"model\",\"created\":5,"
                   "\"owned_by\":\"asynctlsd\",\"root\":\"a\",\"parent\":null,"
                   "\"max_model_len\":4096}]}");
    strbuf_clear(&out);
    api_write_models(&out, names + 1, 1, 5, 4096, true);
    check_document("{\"id\":\"b\",\"object\":\"model\",\"created\":5,\"owned_by\":\"asynctlsd\","
                   "\"root\":\"b\",\"parent\":null,\"max_model_len\":4096}");
}
END_TEST

TCase *api_write_case(void)
{
    TCase *tc = tcase_create("api_write");

    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, strings_are_escaped);
    tcase_add_test(tc, any_bytes_make_a_valid_string);
    tcase_add_test(tc, a_chunk_has_one_choice);
    tcase_add_test(tc, finished_choices_say_why);
    tcase_add_test(tc, the_usage_chunk_has_no_choices);
    tcase_add_test(tc, logprobs_have_the_legacy_shape);
    tcase_add_test(tc, the_chosen_token_is_always_there);
    tcase_add_test(tc, names_are_not_repeated);
    tcase_add_test(tc, errors_have_one_shape);
    tcase_add_test(tc, models_are_listed);
    return tc;
}
