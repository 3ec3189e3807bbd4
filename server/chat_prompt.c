#include "server/chat_prompt.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/base/utf8.h"
#include "server/json_dump.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* ---- the two kinds of text */

void chat_prompt_fini(struct chat_prompt *p)
{
    strbuf_fini(&p->text);
    mem_free(p->marked);
    *p = (struct chat_prompt){ 0 };
}

/* The format's own words.  Pieces in a row are one stretch. */
static void mark(struct chat_prompt *p, const char *s)
{
    size_t start = p->text.n;

    if (!s[0])
        return;
    strbuf_puts(&p->text, s);
    if (p->n_marked > 0 && p->marked[p->n_marked - 1].end == start) {
        p->marked[p->n_marked - 1].end = p->text.n;
        return;
    }
    if (p->n_marked == p->capacity) {
        p->capacity = 2 * p->capacity + 16;
        p->marked = mem_realloc(p->marked, p->capacity, sizeof *p->marked);
    }
    p->marked[p->n_marked++] = (struct token_span){ start, p->text.n };
}

static void put(struct chat_prompt *p, const char *s)
{
    strbuf_puts(&p->text, s);
}

/* ---- stretches of strings, as Python's methods find them */

struct part {
    const char *s;
    size_t n;
};

static struct part whole(const char *s)
{
    return (struct part){ s, strlen(s) };
}

static void put_part(struct chat_prompt *p, struct part part)
{
    strbuf_add(&p->text, part.s, part.n);
}

static struct part skip_newlines(struct part p)
{
    while (p.n > 0 && p.s[0] == '\n')
        p.s++, p.n--;
    return p;
}

static struct part drop_newlines(struct part p)
{
    while (p.n > 0 && p.s[p.n - 1] == '\n')
        p.n--;
    return p;
}

/* The bytes of the white space character that s begins with, 0 if there is none. */
static size_t space_bytes(const char *s, size_t n)
{
    static const char *const wide[] = { "\xC2\x85", "\u00A0", "\u1680", "\u2000", "\u2001",
                                        "\u2002",   "\u2003", "\u2004", "\u2005", "\u2006",
                                        "\u2007",   "\u2008", "\u2009", "\u200A", "\u2028",
                                        "\u2029",   "\u202F", "\u205F", "\u3000" };

    if (n == 0)
        return 0;
    if (s[0] == ' ' || (s[0] >= '\t' && s[0] <= '\r') || (s[0] >= 0x1C && s[0] <= 0x1F))
        return 1;
    for (size_t i = 0; i < sizeof wide / sizeof wide[0]; i++) {
        size_t k = strlen(wide[i]);
        if (n >= k && memcmp(s, wide[i], k) == 0)
            return k;
    }
    return 0;
}

static struct part strip(struct part p)
{
    size_t k;

    while ((k = space_bytes(p.s, p.n)) > 0) {
        p.s += k;
        p.n -= k;
    }
    for (;;) {
        size_t last = p.n > 0 ? 1 : 0;
        while (last < p.n && last < 3 && ((unsigned char)p.s[p.n - last] & 0xC0) == 0x80)
            last++;
        if (last == 0 || space_bytes(p.s + p.n - last, last) != last)
            return p;
        p.n -= last;
    }
}

static const char *find(struct part p, const char *what)
{
    return memmem(p.s, p.n, what, strlen(what));
}

/* What lies behind the last `what`, or everything. */
static struct part after_last(struct part p, const char *what)
{
    for (const char *hit; (hit = find(p, what));) {
        const char *end = p.s + p.n;
        p.s = hit + strlen(what);
        p.n = (size_t)(end - p.s);
    }
    return p;
}

/* What an assistant thought and what it said: its own field, or else the markup that the
 * content still has. */
static void split_thoughts(const struct chat_message *m, struct part *thoughts,
                           struct part *content)
{
    struct part all = whole(m->content);
    const char *end = find(all, "</think>");

    *content = all;
    *thoughts = whole(m->reasoning ? m->reasoning : "");
    if (m->reasoning || !end)
        return;
    struct part head = { all.s, (size_t)(end - all.s) };
    *thoughts = skip_newlines(after_last(drop_newlines(head), "<think>"));
    *content = skip_newlines(after_last(all, "</think>"));
}

static bool begins_run(const struct chat *c, uint32_t i)
{
    return i == 0 || c->messages[i - 1].role != CHAT_TOOL;
}

static bool ends_run(const struct chat *c, uint32_t i)
{
    return i + 1 == c->n_messages || c->messages[i + 1].role != CHAT_TOOL;
}

static const char *role_name(enum chat_role role)
{
    static const char *const names[] = { "system", "user", "assistant", "tool" };

    return names[role];
}

/* ---- ChatML: SmolLM2, Qwen */

static void begin_turn(struct chat_prompt *p, const char *role)
{
    mark(p, "<|im_start|>");
    mark(p, role);
    mark(p, "\n");
}

static void end_turn(struct chat_prompt *p)
{
    mark(p, "<|im_end|>\n");
}

static void turn(struct chat_prompt *p, const char *role, const char *content)
{
    begin_turn(p, role);
    put(p, content);
    end_turn(p);
}

static void qwen_tools(struct chat_prompt *p, const cJSON *tools)
{
    mark(p, "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n"
            "<tools>");
    for (const cJSON *tool = tools->child; tool; tool = tool->next) {
        mark(p, "\n");
        json_dump(&p->text, tool, 0);
    }
    mark(p, "\n</tools>\n\nFor each function call, return a json object with function name and "
            "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
            "{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>");
}

/* The first turn, whether a message asks for it or not. */
static void qwen_system(struct chat_prompt *p, const struct chat *c, const char *fallback)
{
    bool given = c->messages[0].role == CHAT_SYSTEM;

    if (!given && !fallback && !c->tools)
        return;
    begin_turn(p, "system");
    if (given)
        put(p, c->messages[0].content);
    else if (fallback)
        mark(p, fallback);
    if (c->tools) {
        mark(p, given || fallback ? "\n\n" : "");
        qwen_tools(p, c->tools);
    }
    end_turn(p);
}

static void qwen_calls(struct chat_prompt *p, const struct chat_message *m, bool line_first,
                       bool verbatim)
{
    for (uint32_t i = 0; i < m->n_calls; i++) {
        const struct chat_call *call = &m->calls[i];
        mark(p, i > 0 || line_first ? "\n" : "");
        mark(p, "<tool_call>\n{\"name\": \"");
        put(p, call->name);
        mark(p, "\", \"arguments\": ");
        if (verbatim && call->spelling)
            put(p, call->spelling);
        else
            json_dump(&p->text, call->arguments, 0);
        mark(p, "}\n</tool_call>");
    }
}

static void qwen_tool_result(struct chat_prompt *p, const struct chat *c, uint32_t i)
{
    if (begins_run(c, i))
        mark(p, "<|im_start|>user");
    mark(p, "\n<tool_response>\n");
    put(p, c->messages[i].content);
    mark(p, "\n</tool_response>");
    if (ends_run(c, i))
        end_turn(p);
}

static bool is_wrapped(const char *s)
{
    static const char open[] = "<tool_response>", close[] = "</tool_response>";
    size_t n = strlen(s), k = sizeof close - 1;

    return strncmp(s, open, sizeof open - 1) == 0 && n >= k && strcmp(s + n - k, close) == 0;
}

/* The last message of the user; tool results that pretend to be one do not count. */
static uint32_t last_query(const struct chat *c)
{
    for (uint32_t i = c->n_messages; i-- > 0;)
        if (c->messages[i].role == CHAT_USER && !is_wrapped(c->messages[i].content))
            return i;
    return c->n_messages - 1;
}

static void qwen3_assistant(struct chat_prompt *p, enum chat_format f, const struct chat *c,
                            uint32_t i, uint32_t query)
{
    const struct chat_message *m = &c->messages[i];
    struct part thoughts = { 0 }, content = whole(m->content);
    bool shown = false;

    /* To the instruct models' template markers of thoughts are text like any other. */
    if (f != CHAT_QWEN3_INSTRUCT) {
        split_thoughts(m, &thoughts, &content);
        shown = i > query && (thoughts.n > 0 || i + 1 == c->n_messages);
    }
    begin_turn(p, "assistant");
    if (shown) {
        mark(p, "<think>\n");
        put_part(p, drop_newlines(skip_newlines(thoughts)));
        mark(p, "\n</think>\n\n");
    }
    put_part(p, shown ? skip_newlines(content) : content);
    qwen_calls(p, m, content.n > 0, true);
    end_turn(p);
}

static void render_qwen3(struct chat_prompt *p, enum chat_format f, const struct chat *c)
{
    uint32_t query = last_query(c);

    qwen_system(p, c, NULL);
    for (uint32_t i = 0; i < c->n_messages; i++) {
        const struct chat_message *m = &c->messages[i];
        if (m->role == CHAT_USER || (m->role == CHAT_SYSTEM && i > 0))
            turn(p, role_name(m->role), m->content);
        else if (m->role == CHAT_ASSISTANT)
            qwen3_assistant(p, f, c, i, query);
        else if (m->role == CHAT_TOOL)
            qwen_tool_result(p, c, i);
    }
    if (!c->generate)
        return;
    begin_turn(p, "assistant");
    if (f == CHAT_QWEN3_THINKING)
        mark(p, "<think>\n");
    else if (f == CHAT_QWEN3 && c->thinking == CHAT_OFF)
        mark(p, "<think>\n\n</think>\n\n");
}

static void render_qwen25(struct chat_prompt *p, const struct chat *c)
{
    qwen_system(p, c, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.");
    for (uint32_t i = 0; i < c->n_messages; i++) {
        const struct chat_message *m = &c->messages[i];
        if (m->role == CHAT_TOOL) {
            qwen_tool_result(p, c, i);
        } else if (m->n_calls > 0) {
            mark(p, "<|im_start|>assistant");
            mark(p, m->content[0] ? "\n" : "");
            put(p, m->content);
            qwen_calls(p, m, true, false);
            end_turn(p);
        } else if (m->role != CHAT_SYSTEM || i > 0) {
            turn(p, role_name(m->role), m->content);
        }
    }
    if (c->generate)
        begin_turn(p, "assistant");
}

static void render_chatml(struct chat_prompt *p, enum chat_format f, const struct chat *c)
{
    if (f == CHAT_SMOLLM2 && c->messages[0].role != CHAT_SYSTEM)
        mark(p, "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
                "Hugging Face<|im_end|>\n");
    for (uint32_t i = 0; i < c->n_messages; i++)
        turn(p, role_name(c->messages[i].role), c->messages[i].content);
    if (c->generate)
        begin_turn(p, "assistant");
}

/* ---- GLM-4.7 */

static void glm_tools(struct chat_prompt *p, const cJSON *tools)
{
    mark(p, "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user "
            "query.\n\nYou are provided with function signatures within <tools></tools> XML "
            "tags:\n<tools>\n");
    for (const cJSON *tool = tools->child; tool; tool = tool->next) {
        json_dump(&p->text, tool, 0);
        mark(p, "\n");
    }
    mark(p,
         "</tools>\n\nFor each function call, output the function name and arguments within "
         "the following XML format:\n<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key>"
         "<arg_value>{arg-value-1}</arg_value><arg_key>{arg-key-2}</arg_key>"
         "<arg_value>{arg-value-2}</arg_value>...</tool_call>");
}

static void glm_call(struct chat_prompt *p, const struct chat_call *call)
{
    mark(p, "<tool_call>");
    put(p, call->name);
    for (const cJSON *v = call->arguments->child; v; v = v->next) {
        mark(p, "<arg_key>");
        put(p, v->string);
        mark(p, "</arg_key><arg_value>");
        if (cJSON_IsString(v))
            put(p, v->valuestring);
        else
            json_dump(&p->text, v, 0);
        mark(p, "</arg_value>");
    }
    mark(p, "</tool_call>");
}

static void glm_assistant(struct chat_prompt *p, const struct chat *c, uint32_t i, bool current)
{
    const struct chat_message *m = &c->messages[i];
    struct part thoughts, content;

    split_thoughts(m, &thoughts, &content);
    mark(p, "<|assistant|>");
    if (thoughts.n > 0 && (current || c->clear_thinking == CHAT_OFF)) {
        mark(p, "<think>");
        put_part(p, strip(thoughts));
    }
    mark(p, "</think>");
    put_part(p, strip(content));
    for (uint32_t k = 0; k < m->n_calls; k++)
        glm_call(p, &m->calls[k]);
}

static void render_glm(struct chat_prompt *p, const struct chat *c)
{
    uint32_t n_before = 0; /* messages up to the user's last one */

    for (uint32_t i = 0; i < c->n_messages; i++)
        if (c->messages[i].role == CHAT_USER)
            n_before = i + 1;
    mark(p, "[gMASK]<sop>");
    if (c->tools)
        glm_tools(p, c->tools);
    for (uint32_t i = 0; i < c->n_messages; i++) {
        const struct chat_message *m = &c->messages[i];
        switch (m->role) {
        case CHAT_SYSTEM:
        case CHAT_USER:
            mark(p, m->role == CHAT_USER ? "<|user|>" : "<|system|>");
            put(p, m->content);
            break;
        case CHAT_ASSISTANT:
            glm_assistant(p, c, i, i >= n_before);
            break;
        case CHAT_TOOL:
            mark(p, begins_run(c, i) ? "<|observation|><tool_response>" : "<tool_response>");
            put(p, m->content);
            mark(p, "</tool_response>");
            break;
        }
    }
    if (c->generate)
        mark(p, c->thinking == CHAT_OFF ? "<|assistant|></think>" : "<|assistant|><think>");
}

/* ---- Llama 3 */

static void llama_header(struct chat_prompt *p, const char *role)
{
    mark(p, "<|start_header_id|>");
    mark(p, role);
    mark(p, "<|end_header_id|>\n\n");
}

static void llama_turn(struct chat_prompt *p, const char *role, const char *content)
{
    llama_header(p, role);
    put_part(p, strip(whole(content)));
    mark(p, "<|eot_id|>");
}

static void llama_date(struct chat_prompt *p, enum chat_format f, const struct chat *c)
{
    char today[32] = "26 Jul 2024";
    time_t now = time(NULL);
    struct tm tm;

    if (f == CHAT_LLAMA32 && localtime_r(&now, &tm))
        strftime(today, sizeof today, "%d %b %Y", &tm);
    mark(p, "Cutting Knowledge Date: December 2023\nToday Date: ");
    put(p, c->date ? c->date : today);
    mark(p, "\n\n");
}

/* Tools come with the first message, whoever it is from. */
static void llama_tools(struct chat_prompt *p, const cJSON *tools, const char *content)
{
    llama_header(p, "user");
    mark(p,
         "Given the following functions, please respond with a JSON for a function call with "
         "its proper arguments that best answers the given prompt.\n\nRespond in the format "
         "{\"name\": function name, \"parameters\": dictionary of argument name and its "
         "value}.Do not use variables.\n\n");
    for (const cJSON *tool = tools->child; tool; tool = tool->next) {
        json_dump(&p->text, tool, 4);
        mark(p, "\n\n");
    }
    put_part(p, strip(whole(content)));
    mark(p, "<|eot_id|>");
}

static void llama_message(struct chat_prompt *p, const struct chat_message *m)
{
    if (m->n_calls > 0) {
        llama_header(p, "assistant");
        mark(p, "{\"name\": \"");
        put(p, m->calls[0].name);
        mark(p, "\", \"parameters\": ");
        json_dump(&p->text, m->calls[0].arguments, 0);
        mark(p, "}<|eot_id|>");
    } else if (m->role == CHAT_TOOL) {
        llama_header(p, "ipython");
        json_dump_string(&p->text, m->content, strlen(m->content));
        mark(p, "<|eot_id|>");
    } else {
        llama_turn(p, role_name(m->role), m->content);
    }
}

static enum status render_llama31(struct chat_prompt *p, enum chat_format f,
                                  const struct chat *c, struct error *err)
{
    uint32_t i = c->messages[0].role == CHAT_SYSTEM ? 1 : 0;

    for (uint32_t k = 0; k < c->n_messages; k++)
        if (c->messages[k].n_calls > 1)
            return error_set(err, ST_INVALID,
                             "'messages[%u].tool_calls' has %u calls; this model's chat format "
                             "takes one a message.",
                             k, c->messages[k].n_calls);
    if (c->tools && i == c->n_messages)
        return error_set(err, ST_INVALID,
                         "'messages' has no message to put the tools into; "
                         "this model's chat format needs one beside the system's.");
    mark(p, "<|begin_of_text|>");
    llama_header(p, "system");
    mark(p, c->tools ? "Environment: ipython\n" : "");
    llama_date(p, f, c);
    put_part(p, strip(whole(i ? c->messages[0].content : "")));
    mark(p, "<|eot_id|>");
    if (c->tools)
        llama_tools(p, c->tools, c->messages[i++].content);
    for (; i < c->n_messages; i++)
        llama_message(p, &c->messages[i]);
    if (c->generate)
        llama_header(p, "assistant");
    return ST_OK;
}

static void render_llama3(struct chat_prompt *p, const struct chat *c)
{
    mark(p, "<|begin_of_text|>");
    for (uint32_t i = 0; i < c->n_messages; i++)
        llama_turn(p, role_name(c->messages[i].role), c->messages[i].content);
    if (c->generate)
        llama_header(p, "assistant");
}

/* ---- no format at all */

static void render_plain(struct chat_prompt *p, const struct chat *c)
{
    static const char *const names[] = { "System: ", "User: ", "Assistant: " };

    for (uint32_t i = 0; i < c->n_messages; i++) {
        mark(p, names[c->messages[i].role]);
        put_part(p, strip(whole(c->messages[i].content)));
        mark(p, "\n\n");
    }
    if (c->generate)
        mark(p, "Assistant:");
}

/* A format without tools has no words for them. */
static enum status check_tools(enum chat_format f, const struct chat *c, struct error *err)
{
    const char *name = chat_format_facts(f)->name;

    if (chat_format_facts(f)->tools)
        return ST_OK;
    if (c->tools)
        return error_set(err, ST_INVALID,
                         "'tools' is not supported by the chat format %s of "
                         "this model.",
                         name);
    for (uint32_t i = 0; i < c->n_messages; i++)
        if (c->messages[i].role == CHAT_TOOL || c->messages[i].n_calls > 0)
            return error_set(err, ST_INVALID,
                             "'messages[%u]' is about a tool call, which the "
                             "chat format %s of this model cannot express.",
                             i, name);
    return ST_OK;
}

enum status chat_render(struct chat_prompt *out, enum chat_format f, const struct chat *c,
                        struct error *err)
{
    ASSERT(c->n_messages > 0);
    TRY(check_tools(f, c, err));
    switch (f) {
    case CHAT_PLAIN:
        render_plain(out, c);
        return ST_OK;
    case CHAT_CHATML:
    case CHAT_SMOLLM2:
        render_chatml(out, f, c);
        return ST_OK;
    case CHAT_QWEN25:
        render_qwen25(out, c);
        return ST_OK;
    case CHAT_QWEN3:
    case CHAT_QWEN3_THINKING:
    case CHAT_QWEN3_INSTRUCT:
    case CHAT_QWEN3_INSTRUCT_EARLY:
        render_qwen3(out, f, c);
        return ST_OK;
    case CHAT_GLM47:
        render_glm(out, c);
        return ST_OK;
    case CHAT_LLAMA3:
        render_llama3(out, c);
        return ST_OK;
    case CHAT_LLAMA31:
    case CHAT_LLAMA32:
        return render_llama31(out, f, c, err);
    case CHAT_AUTO:
    case CHAT_NONE:
    case CHAT_N_FORMATS:
        break;
    }
    ASSERT(!"a format that is none");
    return ST_INVALID;
}
