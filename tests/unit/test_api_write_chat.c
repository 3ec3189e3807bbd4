#include "engine/base/strbuf.h"
#include "engine/model/tokenizer.h"
#include "server/api.h"
#include "server/json_scan.h"
#include "tests/support/byte_tokenizer.h"

#include <check.h>
#include <string.h>

static struct tokenizer *tok;
static struct strbuf out;
static const struct api_head head = { .id = "chatcmpl-1", .model = "tiny", .created = 17 };
#define CHUNK                                                                                  \
    "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":17,"              \
    "\"model\":\"tiny\",\"choices\":["
#define WHOLE                                                                                  \
    "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":17,"                    \
    "\"model\":\"tiny\",\"choices\":["
#define USAGE                                                                                  \
    "\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":7,\"total_tokens\":12,"              \
    "\"prompt_tokens_details\":{\"cached_tokens\":4},"                                         \
    "\"completion_tokens_details\":{\"reasoning_tokens\":3}}}"

static const struct api_usage usage = { .prompt_tokens = 5,
                                        .completion_tokens = 7,
                                        .cached_tokens = 4,
                                        .chat = true,
                                        .reasoning_tokens = 3 };

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

static void check_document(const char *want)
{
    struct json_scan scan;
    struct error err;

    ck_assert_ptr_null(strchr(out.data, '\n'));
    if (json_scan(&scan, out.data, out.n, 100000, &err) != ST_OK)
        ck_abort_msg("%s\n%s", err.text, out.data);
    ck_assert_str_eq(out.data, want);
}

static const struct {
    struct api_piece piece;
    const char *delta;
} deltas[] = {
    { { .role = true }, "{\"role\":\"assistant\",\"content\":\"\"}" },
    { { .part = CHAT_REASONING, .text = "a\"b", .text_bytes = 3 },
      "{\"reasoning_content\":\"a\\\"b\"}" },
    { { .part = CHAT_CONTENT, .text = "hi\n!", .text_bytes = 3 }, "{\"content\":\"hi\\n\"}" },
    { { .part = CHAT_CALL, .text = "fn", .text_bytes = 2, .call = 1, .call_id = "call_9" },
      "{\"tool_calls\":[{\"index\":1,\"id\":\"call_9\",\"type\":\"function\",\"function\":"
      "{\"name\":\"fn\",\"arguments\":\"\"}}]}" },
    { { .part = CHAT_ARGUMENTS, .text = "{\"", .text_bytes = 2, .call = 1 },
      "{\"tool_calls\":[{\"index\":1,\"function\":{\"arguments\":\"{\\\"\"}}]}" },
    { { .part = CHAT_CONTENT }, "{}" },
};

START_TEST(chunks_have_one_delta)
{
    struct api_piece p = deltas[_i].piece;
    struct strbuf want = { 0 };

    p.index = 2;
    p.stop_id = -1;
    strbuf_printf(&want,
                  CHUNK "{\"index\":2,\"delta\":%s,\"logprobs\":null,"
                        "\"finish_reason\":null}]}",
                  deltas[_i].delta);
    api_write_chat_chunk(&out, &head, tok, &p, NULL, false);
    check_document(want.data);
    strbuf_fini(&want);
}
END_TEST

START_TEST(the_last_chunks)
{
    struct api_piece p = { .finish_reason = "tool_calls", .stop_id = -1 };

    api_write_chat_chunk(&out, &head, tok, &p, NULL, true);
    check_document(CHUNK "{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":"
                         "\"tool_calls\",\"stop_reason\":null}],\"usage\":null}");
    strbuf_clear(&out);
    api_write_chat_chunk(&out, &head, tok, NULL, &usage, false);
    check_document(CHUNK "]," USAGE);
}
END_TEST

/* Text that is nothing is null beside calls and empty without. */
START_TEST(whole_messages)
{
    struct api_call calls[2] = { { .id = "call_a" }, { .id = "call_b" } };
    struct api_message with = { .calls = calls, .n_calls = 2 }, without = { .n_calls = 0 };
    struct api_piece p[2] = {
        { .index = 0, .message = &with, .finish_reason = "tool_calls", .stop_id = -1 },
        { .index = 1, .message = &without, .finish_reason = "stop", .stop_id = 3 },
    };

    strbuf_puts(&calls[0].name, "f");
    strbuf_puts(&calls[0].arguments, "{\"a\":1}");
    strbuf_puts(&calls[1].name, "g");
    strbuf_puts(&with.reasoning, "why");
    api_write_chat(&out, &head, tok, p, 2, &usage);
    check_document(
        WHOLE
        "{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":null,\"refusal\":null,"
        "\"reasoning_content\":\"why\",\"tool_calls\":[{\"id\":\"call_a\",\"type\":"
        "\"function\","
        "\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"a\\\":1}\"}},{\"id\":\"call_b\","
        "\"type\":\"function\",\"function\":{\"name\":\"g\",\"arguments\":\"\"}}]},"
        "\"logprobs\":null,\"finish_reason\":\"tool_calls\",\"stop_reason\":null},"
        "{\"index\":1,\"message\":{\"role\":\"assistant\",\"content\":\"\",\"refusal\":null},"
        "\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":3}]," USAGE);
    strbuf_fini(&calls[0].name);
    strbuf_fini(&calls[0].arguments);
    strbuf_fini(&calls[1].name);
    strbuf_fini(&with.reasoning);
}
END_TEST

START_TEST(logprobs_have_the_chat_shape)
{
    static const int32_t ids[] = { 'H', 0xC3 };
    static const struct token_logprob chosen[] = { { 'H', -0.5f }, { 0xC3, -20000 } };
    static const struct token_logprob top[] = {
        { 'H', -0.5f }, { 'a', -1 }, { 'b', -2 }, { -1, 0 }
    };
    struct api_piece p = { .part = CHAT_CONTENT,
                           .text = "H",
                           .text_bytes = 1,
                           .stop_id = -1,
                           .logprobs = true,
                           .n_tokens = 2,
                           .ids = ids,
                           .chosen = chosen,
                           .top = top,
                           .n_top = 2 };

    api_write_chat_chunk(&out, &head, tok, &p, NULL, false);
    check_document(
        CHUNK
        "{\"index\":0,\"delta\":{\"content\":\"H\"},\"logprobs\":{\"content\":["
        "{\"token\":\"H\",\"logprob\":-0.5,\"bytes\":[72],\"top_logprobs\":["
        "{\"token\":\"H\",\"logprob\":-0.5,\"bytes\":[72]},"
        "{\"token\":\"a\",\"logprob\":-1,\"bytes\":[97]}]},"
        "{\"token\":\"bytes:\\\\xc3\",\"logprob\":-9999.0,\"bytes\":[195],\"top_logprobs\":["
        "{\"token\":\"b\",\"logprob\":-2,\"bytes\":[98]}]}],\"refusal\":null},"
        "\"finish_reason\":null}]}");
}
END_TEST

TCase *api_write_chat_case(void);
TCase *api_write_chat_case(void)
{
    TCase *tc = tcase_create("api_write_chat");

    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_loop_test(tc, chunks_have_one_delta, 0, sizeof deltas / sizeof deltas[0]);
    tcase_add_test(tc, the_last_chunks);
    tcase_add_test(tc, whole_messages);
    tcase_add_test(tc, logprobs_have_the_chat_shape);
    return tc;
}
