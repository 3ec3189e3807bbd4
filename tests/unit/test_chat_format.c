#include "engine/model/tokenizer.h"
#include "server/chat_format.h"
#include "tests/support/byte_tokenizer.h"
#include "tests/support/temp_folder.h"

#include <check.h>
#include <stdio.h>
#include <string.h>

/* Templates in short: what is theirs and nobody else's, in the order in which they have it. */
#define TOOLS                                                                                  \
    "{{- \"# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n"  \
    "\\nYou are provided with function signatures within <tools></tools> XML "                 \
    "tags:\\n<tools>\" "                                                                       \
    "}}{{- tool | tojson }}{{- \"\\n</tools>\\n\\n<tool_call>\\n{\\\"name\\\": "               \
    "<function-name>, "                                                                        \
    "\\\"arguments\\\": <args-json-object>}\\n</tool_call><|im_end|>\\n\" }}"                  \
    "{{- '\\n<tool_response>\\n' }}"
#define FIRST "{{- messages[0].content + '\\n\\n' }}"
#define QUERY                                                                                  \
    "{%- set ns = namespace(last_query_index=messages|length - 1) %}"                          \
    "{%- if loop.last or (not loop.last and reasoning_content) %}"
#define GENERATE "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
#define SWITCH                                                                                 \
    "{%- if enable_thinking is defined and enable_thinking is false %}"                        \
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
#define TURNS                                                                                  \
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + "            \
    "'<|im_end|>' + '\\n'}}{% endfor %}"
#define LLAMA3                                                                                 \
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>"            \
    "\n\n'+ message['content'] | trim + '<|eot_id|>' %}{{ bos_token + content }}"              \
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
#define LLAMA31                                                                                \
    "{%- if not tools_in_user_message is defined %}{%- set date_string = "                     \
    "\"26 Jul 2024\" %}{{- \"Environment: ipython\\n\" }}{{- \"Cutting Knowledge "             \
    "Date: December 2023\\n\" }}{{- \"<|start_header_id|>ipython<|end_header_id|>\\n"          \
    "\\n\" }}"
#define GLM                                                                                    \
    "[gMASK]<sop>\n<|system|>\n# Tools\n\n<arg_key>{arg-key-1}</arg_key>"                      \
    "{%- if ((clear_thinking is defined and not clear_thinking) or x) %}<|observation|>"       \
    "<|assistant|>{{- '</think>' if (enable_thinking is defined and not "                      \
    "enable_thinking) else '<think>' -}}"

static const struct {
    enum chat_format want;
    const char *source;
} templates[] = {
    { CHAT_CHATML, TURNS GENERATE },
    { CHAT_SMOLLM2,
      "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
      "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
      "' }}" TURNS GENERATE },
    { CHAT_QWEN25,
      TOOLS "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are "
            "a helpful assistant.<|im_end|>\\n' }}" GENERATE },
    { CHAT_QWEN3, TOOLS FIRST QUERY GENERATE SWITCH },
    { CHAT_QWEN3_THINKING, TOOLS FIRST QUERY
      "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}" },
    { CHAT_QWEN3_INSTRUCT, TOOLS FIRST GENERATE },
    { CHAT_QWEN3_INSTRUCT_EARLY, TOOLS FIRST QUERY GENERATE },
    { CHAT_GLM47, GLM },
    { CHAT_LLAMA3, LLAMA3 },
    { CHAT_LLAMA31, LLAMA31 "{%- if builtin_tools is defined %}" },
    { CHAT_LLAMA32, LLAMA31 "{%- set date_string = strftime_now(\"%d %b %Y\") %}" },
    /* relatives, and others */
    { CHAT_NONE, "" },
    { CHAT_NONE, "{{ messages }}" },
    { CHAT_NONE, TURNS "{{ eos_token }}" GENERATE },
    { CHAT_NONE, TURNS "{% if message.content | trim %}" GENERATE },
    { CHAT_NONE, TOOLS FIRST "{%- if last_query_index and reasoning_content %}" GENERATE },
    { CHAT_NONE, TOOLS FIRST QUERY GENERATE SWITCH "<function=" },
    { CHAT_NONE, TOOLS FIRST QUERY GENERATE SWITCH "<|vision_start|>" },
    { CHAT_NONE, TOOLS "{{- 'You are a helpful assistant.' }}" GENERATE },
    { CHAT_NONE, TOOLS FIRST "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>' }}" },
    { CHAT_NONE, GLM "/nothink" },
    { CHAT_NONE, LLAMA31 "<|image|>{%- if builtin_tools is defined %}" },
    { CHAT_NONE, LLAMA31 },
    { CHAT_NONE, "[INST] {{ message }} [/INST]" },
};

START_TEST(templates_are_told_apart)
{
    enum chat_format got;
    struct error err;
    enum status status = chat_format_recognise(&got, templates[_i].source, &err);

    ck_assert_int_eq(got, templates[_i].want);
    ck_assert_int_eq(status == ST_OK, got != CHAT_NONE);
    if (got == CHAT_NONE)
        ck_assert_str_eq(err.text, "its chat template is none of those that are known");
}
END_TEST

START_TEST(marks_of_two_formats_are_none)
{
    enum chat_format got;
    struct error err;

    ck_assert_int_ne(chat_format_recognise(&got, LLAMA3 GLM, &err), ST_OK);
    ck_assert_int_eq(got, CHAT_NONE);
    ck_assert_int_ne(chat_format_recognise(&got,
                                           TOOLS FIRST QUERY
                                           "'<|im_start|>assistant\n<think>\n'"
                                           "You are Qwen, created by Alibaba Cloud. You are a "
                                           "helpful assistant.",
                                           &err),
                     ST_OK);
    ck_assert_int_eq(got, CHAT_NONE);
}
END_TEST

/* ---- folders */

static struct tokenizer *qwen, *bytes;

static void setup(void)
{
    struct error err;

    temp_folder_create();
    ck_assert_int_eq(tokenizer_open(&qwen, "tests/unit/data/tokenizer/qwen.json", &err), ST_OK);
    bytes = byte_tokenizer_open(false);
}

static void teardown(void)
{
    tokenizer_close(qwen);
    tokenizer_close(bytes);
    temp_folder_remove();
}

static void write_file(const char *name, const char *text)
{
    temp_file(name, text, strlen(text));
}

static void check_found(enum chat_format wanted, const struct tokenizer *t,
                        enum chat_format want, const char *message)
{
    enum chat_format got;
    struct error err;
    enum status status = chat_format_find(&got, wanted, temp_folder(), t, &err);

    ck_assert_int_eq(got, want);
    ck_assert_int_eq(status == ST_OK, message == NULL);
    if (message)
        ck_assert_ptr_nonnull(strstr(err.text, message));
}

#define CHATML                                                                                 \
    "{% for m in messages %}<|im_start|>{{ m }}<|im_end|>{% endfor %}"                         \
    "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"

START_TEST(folders_say_their_format)
{
    check_found(CHAT_AUTO, qwen, CHAT_NONE, "its folder has no chat template");
    write_file("tokenizer_config.json", "{\"bos_token\":null}");
    check_found(CHAT_AUTO, qwen, CHAT_NONE, "its folder has no chat template");
    write_file("tokenizer_config.json", "{\"chat_template\":\"" CHATML "\"}");
    check_found(CHAT_AUTO, qwen, CHAT_CHATML, NULL);
    write_file("tokenizer_config.json",
               "{\"chat_template\":[{\"name\":\"default\",\"template\":\"" CHATML "\"},"
               "{\"name\":\"rag\",\"template\":\"x\"}]}");
    check_found(CHAT_AUTO, qwen, CHAT_CHATML, NULL);
    write_file("tokenizer_config.json",
               "{\"chat_template\":[{\"name\":\"default\",\"template\":\"" CHATML "\"},"
               "{\"name\":\"tool_use\",\"template\":\"x\"}]}");
    check_found(CHAT_AUTO, qwen, CHAT_NONE, "none of those that are known");
    write_file("tokenizer_config.json", "{\"chat_template\":[]}");
    check_found(CHAT_AUTO, qwen, CHAT_NONE, "its folder has no chat template");
    write_file("tokenizer_config.json", "{");
    check_found(CHAT_AUTO, qwen, CHAT_NONE, "tokenizer_config.json");
    /* The file of its own comes first. */
    write_file("chat_template.jinja", TOOLS FIRST QUERY GENERATE SWITCH);
    check_found(CHAT_AUTO, qwen, CHAT_QWEN3, NULL);
    write_file("chat_template.jinja", "x");
    check_found(CHAT_AUTO, qwen, CHAT_NONE, "none of those that are known");
}
END_TEST

START_TEST(the_operator_decides)
{
    write_file("chat_template.jinja", TOOLS FIRST QUERY GENERATE SWITCH);
    check_found(CHAT_NONE, qwen, CHAT_NONE, "chat-format is none");
    check_found(CHAT_QWEN25, qwen, CHAT_QWEN25, NULL);
    check_found(CHAT_PLAIN, bytes, CHAT_PLAIN, NULL);
    /* A format without its tokens would be spelled out. */
    check_found(CHAT_AUTO, bytes, CHAT_NONE, "no special token <|im_start|>");
    check_found(CHAT_LLAMA3, qwen, CHAT_NONE, "no special token <|start_header_id|>");
}
END_TEST

START_TEST(words_are_the_formats)
{
    char words[400] = "auto";

    for (int f = CHAT_NONE; f < CHAT_N_FORMATS; f++) {
        strcat(words, "|");
        strcat(words, chat_format_facts(f)->name);
    }
    ck_assert_str_eq(words, CHAT_FORMAT_WORDS);
}
END_TEST

TCase *chat_format_case(void);
TCase *chat_format_case(void)
{
    TCase *tc = tcase_create("chat_format");

    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_loop_test(tc, templates_are_told_apart, 0,
                        sizeof templates / sizeof templates[0]);
    tcase_add_test(tc, marks_of_two_formats_are_none);
    tcase_add_test(tc, folders_say_their_format);
    tcase_add_test(tc, the_operator_decides);
    tcase_add_test(tc, words_are_the_formats);
    return tc;
}
