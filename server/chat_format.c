#include "server/chat_format.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/grammar/grammar.h"
#include "engine/model/json_fields.h"
#include "engine/model/tokenizer.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <string.h>

enum { MAX_TEMPLATE_BYTES = 1 << 20, MAX_CONFIG_BYTES = 8 << 20, PATH_BYTES = 4096 };

#define IM "<|im_start|>", "<|im_end|>"
#define HEADERS "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"

static const struct grammar_pairs glm_pairs = { .key = CHAT_ARG_KEY,
                                                .key_end = CHAT_ARG_KEY_END,
                                                .value = CHAT_ARG_VALUE,
                                                .value_end = CHAT_ARG_VALUE_END };

static const struct chat_call_syntax
    qwen_calls = { .head = CHAT_TOOL_CALL "\n{\"name\": \"",
                   .middle = "\", \"arguments\": ",
                   .tail = "}\n" CHAT_TOOL_CALL_END,
                   .between = "\n",
                   .marker = CHAT_TOOL_CALL },
    glm_calls = { .head = CHAT_TOOL_CALL,
                  .middle = "",
                  .pairs = &glm_pairs,
                  .tail = CHAT_TOOL_CALL_END,
                  .between = "",
                  .marker = CHAT_TOOL_CALL },
    llama_calls = { .head = "{\"name\": \"", .middle = "\", \"parameters\": ", .tail = "}" };

static const struct chat_format_facts facts[CHAT_N_FORMATS] = {
    [CHAT_NONE] = { .name = "none" },
    [CHAT_PLAIN] = { .name = "plain", .stop = "\nUser:" },
    [CHAT_CHATML] = { .name = "chatml", .ends = { "<|im_end|>" }, .controls = { IM } },
    [CHAT_SMOLLM2] = { .name = "smollm2", .ends = { "<|im_end|>" }, .controls = { IM } },
    [CHAT_QWEN25] = { .name = "qwen2.5",
                      .tools = true,
                      .calls = &qwen_calls,
                      .ends = { "<|im_end|>" },
                      .controls = { IM } },
    [CHAT_QWEN3] = { .name = "qwen3",
                     .tools = true,
                     .calls = &qwen_calls,
                     .thinks = true,
                     .verbatim = true,
                     .ends = { "<|im_end|>" },
                     .controls = { IM } },
    [CHAT_QWEN3_THINKING] = { .name = "qwen3-thinking",
                              .tools = true,
                              .calls = &qwen_calls,
                              .thinks = true,
                              .verbatim = true,
                              .ends = { "<|im_end|>" },
                              .controls = { IM } },
    [CHAT_QWEN3_INSTRUCT] = { .name = "qwen3-instruct",
                              .tools = true,
                              .calls = &qwen_calls,
                              .verbatim = true,
                              .ends = { "<|im_end|>" },
                              .controls = { IM } },
    [CHAT_QWEN3_INSTRUCT_EARLY] = { .name = "qwen3-instruct-early",
                                    .tools = true,
                                    .calls = &qwen_calls,
                                    .verbatim = true,
                                    .ends = { "<|im_end|>" },
                                    .controls = { IM } },
    [CHAT_GLM47] = { .name = "glm-4.7",
                     .tools = true,
                     .calls = &glm_calls,
                     .thinks = true,
                     .ends = { "<|endoftext|>", "<|user|>", "<|observation|>" },
                     .controls = { "<|user|>", "<|assistant|>", "<|observation|>", "<sop>" } },
    [CHAT_LLAMA3] = { .name = "llama-3", .ends = { "<|eot_id|>" }, .controls = { HEADERS } },
    [CHAT_LLAMA31] = { .name = "llama-3.1",
                       .tools = true,
                       .calls = &llama_calls,
                       .ends = { "<|eot_id|>", "<|eom_id|>" },
                       .controls = { HEADERS } },
    [CHAT_LLAMA32] = { .name = "llama-3.2",
                       .tools = true,
                       .calls = &llama_calls,
                       .ends = { "<|eot_id|>", "<|eom_id|>" },
                       .controls = { HEADERS } },
};

const struct chat_format_facts *chat_format_facts(enum chat_format f)
{
    ASSERT(f > CHAT_AUTO && f < CHAT_N_FORMATS);
    return &facts[f];
}

/* ---- recognising a template */

#define QWEN_TOOLS                                                                             \
    "You may call one or more functions to assist with the user query.", "<tools>",            \
        "<tool_response>", "{\"name\": <function-name>"
/* How Qwen3 finds the turns whose thoughts it shows, and when it shows them. */
#define QWEN3_THOUGHTS "last_query_index", "loop.last or (not loop.last and reasoning_content)"
/* Templates that grew out of these and differ: images, other ways to call functions. */
#define NOT_QWEN                                                                               \
    "<function=", "<|vision_start|>", "<arg_key>", "[gMASK]", "bos_token", "raise_exception",  \
        "reasoning_effort", "preserve_thinking"
#define LLAMA_TOOLS                                                                            \
    "Cutting Knowledge Date: December 2023", "26 Jul 2024", "tools_in_user_message",           \
        "Environment: ipython", "<|start_header_id|>ipython<|end_header_id|>"
#define NOT_LLAMA "<|image|>", "<|python_start|>", "<|im_start|>", "[gMASK]", "<think>"

/* Texts that a template of a format has, and texts that it has not; see unescape(). */
static const struct marks {
    enum chat_format format;
    const char *has[10], *lacks[16];
} marks[] = {
    { CHAT_CHATML,
      { "<|im_start|>", "<|im_end|>", "add_generation_prompt", "assistant\n" },
      { "system", "tool", "think", "trim", "strip", "eos_token", "[0]", "loop", NOT_QWEN } },
    { CHAT_SMOLLM2,
      { "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n",
        "add_generation_prompt", "<|im_start|>assistant\n" },
      { "tool", "think", "trim", NOT_QWEN } },
    { CHAT_QWEN25,
      { QWEN_TOOLS, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        "<|im_start|>assistant\n" },
      { "think", NOT_QWEN } },
    { CHAT_QWEN3,
      { QWEN_TOOLS, QWEN3_THOUGHTS, "<think>\n\n</think>\n\n", "enable_thinking is false",
        "<|im_start|>assistant\n" },
      { "You are Qwen", "<|im_start|>assistant\n<think>", NOT_QWEN } },
    { CHAT_QWEN3_THINKING,
      { QWEN_TOOLS, QWEN3_THOUGHTS, "'<|im_start|>assistant\n<think>\n'" },
      { "You are Qwen", "enable_thinking", NOT_QWEN } },
    { CHAT_QWEN3_INSTRUCT,
      { QWEN_TOOLS, "messages[0].content + '\n\n'", "<|im_start|>assistant\n" },
      { "You are Qwen", "You are a ", "think", "reasoning", NOT_QWEN } },
    { CHAT_QWEN3_INSTRUCT_EARLY,
      { QWEN_TOOLS, QWEN3_THOUGHTS, "messages[0].content + '\n\n'", "<|im_start|>assistant\n" },
      { "You are Qwen", "enable_thinking", "<|im_start|>assistant\n<think>", NOT_QWEN } },
    { CHAT_GLM47,
      { "[gMASK]<sop>", "<|system|>\n# Tools\n", "<arg_key>{arg-key-1}</arg_key>",
        "clear_thinking is defined and not clear_thinking", "<|observation|>",
        "'</think>' if (enable_thinking is defined and not enable_thinking) else '<think>'" },
      { "/nothink", "<|begin_of_image|>", "<|im_start|>", "<|start_header_id|>" } },
    { CHAT_LLAMA3,
      { "'<|start_header_id|>' + message['role'] + '<|end_header_id|>", "bos_token",
        "message['content'] | trim + '<|eot_id|>'", "<|start_header_id|>assistant" },
      { "tool", "Cutting Knowledge", "system", NOT_LLAMA } },
    { CHAT_LLAMA31, { LLAMA_TOOLS, "builtin_tools" }, { "strftime_now", NOT_LLAMA } },
    { CHAT_LLAMA32,
      { LLAMA_TOOLS, "strftime_now(\"%d %b %Y\")" },
      { "builtin_tools", NOT_LLAMA } },
};

/* Some templates have line ends and quotes in their strings as they are, others escaped. */
static char *unescape(const char *source)
{
    char *text = mem_strdup(source), *to = text;

    for (const char *from = source; *from; from++) {
        bool escape = from[0] == '\\' && (from[1] == 'n' || from[1] == '"');
        from += escape;
        *to++ = escape && *from == 'n' ? '\n' : *from;
    }
    *to = '\0';
    return text;
}

static bool fits(const struct marks *m, const char *source)
{
    for (size_t i = 0; i < sizeof m->has / sizeof m->has[0] && m->has[i]; i++)
        if (!strstr(source, m->has[i]))
            return false;
    for (size_t i = 0; i < sizeof m->lacks / sizeof m->lacks[0] && m->lacks[i]; i++)
        if (strstr(source, m->lacks[i]))
            return false;
    return true;
}

static enum status recognise(enum chat_format *out, const char *text, struct error *err)
{
    *out = CHAT_NONE;
    for (size_t i = 0; i < sizeof marks / sizeof marks[0]; i++) {
        if (!fits(&marks[i], text))
            continue;
        if (*out != CHAT_NONE)
            return error_set(err, ST_UNSUPPORTED,
                             "its chat template has marks of both %s and %s", facts[*out].name,
                             facts[marks[i].format].name);
        *out = marks[i].format;
    }
    return *out != CHAT_NONE ? ST_OK
                             : error_set(err, ST_UNSUPPORTED,
                                         "its chat template is none of those that are known");
}

enum status chat_format_recognise(enum chat_format *out, const char *source, struct error *err)
{
    char *text = unescape(source);
    enum status status = recognise(out, text, err);

    mem_free(text);
    if (status != ST_OK)
        *out = CHAT_NONE;
    return status;
}

/* ---- the folder */

/* Of several templates the one for tools is asked: where it differs from the default it is
 * the longer one, and the formats that are known have one template for both. */
static const char *named_template(const cJSON *list)
{
    const char *fallback = NULL;

    for (const cJSON *v = list->child; v; v = v->next) {
        const char *name = cJSON_GetStringValue(json_get(v, "name"));
        const char *source = cJSON_GetStringValue(json_get(v, "template"));
        if (name && source && strcmp(name, "tool_use") == 0)
            return source;
        if (name && source && strcmp(name, "default") == 0)
            fallback = source;
    }
    return fallback;
}

static enum status recognise_config(enum chat_format *out, const char *path, struct error *err)
{
    struct json_file file = { 0 };
    char *text = NULL;
    bool absent;
    size_t n;

    if (file_read(&text, &n, path, MAX_CONFIG_BYTES, &absent, err) != ST_OK)
        return absent ? error_set(err, ST_UNSUPPORTED, "its folder has no chat template")
                      : ST_IO;
    enum status status = json_file_parse(&file, path, text, n, MAX_CONFIG_BYTES, err);
    if (status == ST_OK) {
        const cJSON *v = json_get(file.root, "chat_template");
        const char *source = cJSON_IsArray(v) ? named_template(v) : cJSON_GetStringValue(v);
        status = source ? chat_format_recognise(out, source, err)
                        : error_set(err, ST_UNSUPPORTED, "its folder has no chat template");
    }
    json_file_fini(&file);
    mem_free(text);
    return status;
}

static enum status recognise_folder(enum chat_format *out, const char *folder,
                                    struct error *err)
{
    char path[PATH_BYTES];
    char *text = NULL;
    bool absent = false;
    size_t n;

    snprintf(path, sizeof path, "%s/chat_template.jinja", folder);
    enum status status = file_read(&text, &n, path, MAX_TEMPLATE_BYTES, &absent, err);
    if (status == ST_OK) {
        status = chat_format_recognise(out, text, err);
        mem_free(text);
        return status;
    }
    if (!absent)
        return status;
    snprintf(path, sizeof path, "%s/tokenizer_config.json", folder);
    return recognise_config(out, path, err);
}

/* A control token that is no token would be spelled out, and mean nothing. */
static enum status check_controls(enum chat_format f, const struct tokenizer *t,
                                  struct error *err)
{
    const struct chat_format_facts *k = &facts[f];

    for (int i = 0; i < CHAT_MAX_CONTROLS && k->controls[i]; i++) {
        int32_t id = tokenizer_find(t, k->controls[i]);
        if (id < 0 || !tokenizer_is_special(t, id))
            return error_set(err, ST_UNSUPPORTED,
                             "its tokenizer has no special token %s, which the format %s needs",
                             k->controls[i], k->name);
    }
    return ST_OK;
}

enum status chat_format_find(enum chat_format *out, enum chat_format wanted, const char *folder,
                             const struct tokenizer *t, struct error *err)
{
    enum status status = ST_OK;

    *out = wanted;
    if (wanted == CHAT_NONE)
        return error_set(err, ST_UNSUPPORTED, "chat-format is none");
    if (wanted == CHAT_AUTO)
        status = recognise_folder(out, folder, err);
    if (status == ST_OK)
        status = check_controls(*out, t, err);
    if (status != ST_OK)
        *out = CHAT_NONE;
    return status;
}
