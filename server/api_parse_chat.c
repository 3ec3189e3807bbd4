#include "server/api_parse.h"

#include "engine/base/mem.h"
#include "engine/model/model_config.h"
#include "server/chat_prompt.h"
#include "server/json_dump.h"

#include <stdio.h>
#include <string.h>

/* The conversation of a chat request.  Strings are borrowed from the body's tree: the prompt
 * is rendered and tokenised while that lives. */

enum {
    MAX_DATE_BYTES = 64,
    MAX_NAME_BYTES = 128,
    PATH_BYTES = 64,
    /* Far more than any set of tools has (a guess).  Some formats print each on a line of its
     * own, with blanks for its depth in front. */
    MAX_TOOL_VALUES = 1 << 16,
    /* Of a function that are looked at; calls of one that has more cannot be constrained. */
    MAX_PROPERTIES = 1000
};

struct conversation {
    struct api_parse *p;
    const struct chat_format_facts *facts;
    struct chat chat;
    cJSON **trees; /* of arguments that came as strings */
    uint32_t n_trees, capacity;
    size_t values_left; /* of those trees */
};

static void drop_trees(struct conversation *c)
{
    for (uint32_t i = 0; i < c->n_trees; i++)
        cJSON_Delete(c->trees[i]);
    mem_free(c->trees);
}

static void keep_tree(struct conversation *c, cJSON *tree)
{
    if (c->n_trees == c->capacity) {
        c->capacity = 2 * c->capacity + 8;
        c->trees = mem_realloc(c->trees, c->capacity, sizeof *c->trees);
    }
    c->trees[c->n_trees++] = tree;
}

static const cJSON *member(const cJSON *object, const char *key)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(object, key);

    return v && !cJSON_IsNull(v) ? v : NULL;
}

static bool is_text(const cJSON *v)
{
    return cJSON_IsString(v) && v->valuestring[0];
}

/* ---- messages */

static enum status read_role(struct conversation *c, const cJSON *message, uint32_t i,
                             enum chat_role *out)
{
    static const struct {
        const char *name;
        enum chat_role role;
    } roles[] = { { "system", CHAT_SYSTEM },
                  { "developer", CHAT_SYSTEM },
                  { "user", CHAT_USER },
                  { "assistant", CHAT_ASSISTANT },
                  { "tool", CHAT_TOOL } };
    const cJSON *v = member(message, "role");

    for (size_t k = 0; k < sizeof roles / sizeof roles[0]; k++)
        if (cJSON_IsString(v) && strcmp(v->valuestring, roles[k].name) == 0) {
            *out = roles[k].role;
            return ST_OK;
        }
    return api_refuse(c->p, "messages",
                      "'messages[%u].role' must be \"system\", \"developer\", "
                      "\"user\", \"assistant\" or \"tool\".",
                      i);
}

static enum status part_text(struct conversation *c, const cJSON *part, uint32_t i, size_t k,
                             const char **out)
{
    const cJSON *type = member(part, "type"), *text = member(part, "text");

    *out = NULL;
    if (cJSON_IsString(part))
        *out = part->valuestring;
    else if (cJSON_IsString(type) && strcmp(type->valuestring, "text") != 0)
        return api_refuse(c->p, "messages",
                          "'messages[%u].content[%zu]' is of type '%.*s'; this "
                          "server reads text only.",
                          i, k, api_quotable_bytes(type->valuestring), type->valuestring);
    else if (cJSON_IsString(type) && cJSON_IsString(text))
        *out = text->valuestring;
    return *out ? ST_OK
                : api_refuse(c->p, "messages",
                             "'messages[%u].content[%zu]' must be "
                             "{\"type\": \"text\", \"text\": \"...\"}.",
                             i, k);
}

/* Parts are joined without anything between them. */
static enum status join_parts(struct conversation *c, const cJSON *list, uint32_t i,
                              const char **out)
{
    size_t n = 0, k = 0;
    const char *text;
    void *memory;

    for (const cJSON *v = list->child; v; v = v->next, k++) {
        TRY(part_text(c, v, i, k, &text));
        n += strlen(text);
    }
    TRY(api_alloc(c->p, &memory, n + 1, 1));
    char *at = memory;
    k = 0;
    for (const cJSON *v = list->child; v; v = v->next, k++) {
        TRY(part_text(c, v, i, k, &text));
        at = stpcpy(at, text);
    }
    *out = memory;
    return ST_OK;
}

/* null is "": an assistant that only calls tools says nothing. */
static enum status read_content(struct conversation *c, const cJSON *message, uint32_t i,
                                struct chat_message *m)
{
    const cJSON *v = member(message, "content");

    m->content = "";
    if (cJSON_IsString(v))
        m->content = v->valuestring;
    else if (cJSON_IsArray(v))
        return join_parts(c, v, i, &m->content);
    else if (v)
        return api_refuse(c->p, "messages",
                          "'messages[%u].content' must be a string or a list of text parts.",
                          i);
    else if (m->role != CHAT_ASSISTANT)
        return api_refuse(c->p, "messages", "'messages[%u].content' is missing.", i);
    return ST_OK;
}

/* Upper bound of the values in a JSON text: what stands in front of each but the first. */
static size_t count_values(const char *s, size_t n)
{
    size_t values = 1;

    for (size_t i = 0; i < n; i++)
        values += s[i] == ',' || s[i] == ':' || s[i] == '[' || s[i] == '{';
    return values;
}

/* Arguments in a string.  Where the format puts them as they are written, no tree is made. */
static enum status parse_arguments(struct conversation *c, struct chat_call *call,
                                   const char *path)
{
    const char *text = call->spelling;
    size_t n = strlen(text), values = count_values(text, n);
    struct json_scan scan;
    struct error err;

    if (values > c->values_left)
        return api_refuse(c->p, "messages",
                          "'messages' has more than %zu values in the "
                          "arguments of its tool calls.",
                          c->p->cx->limits.max_json_values);
    c->values_left -= values;
    if (json_scan(&scan, text, n, values, NULL) != ST_OK || !scan.object)
        return api_refuse(c->p, "messages", "'%s' must be a JSON object, written as a string.",
                          path);
    if (c->facts->verbatim)
        return ST_OK;
    cJSON *tree = cJSON_ParseWithLength(text, n);
    if (!tree)
        return api_refuse(c->p, "messages", "'%s' is not valid JSON.", path);
    keep_tree(c, tree);
    if (json_dump_prepare(tree, text, n, &err) != ST_OK)
        return api_refuse(c->p, "messages", "'%s' %s", path, err.text);
    call->arguments = tree;
    return ST_OK;
}

static enum status read_call(struct conversation *c, const cJSON *v, uint32_t i, uint32_t k,
                             struct chat_call *call)
{
    const cJSON *function = member(v, "function"), *type = member(v, "type");
    const cJSON *name = member(function, "name"), *arguments = member(function, "arguments");
    char path[PATH_BYTES];

    snprintf(path, sizeof path, "messages[%u].tool_calls[%u]", i, k);
    if (type && (!cJSON_IsString(type) || strcmp(type->valuestring, "function") != 0))
        return api_refuse(c->p, "messages", "'%s.type' must be \"function\".", path);
    if (!is_text(name))
        return api_refuse(c->p, "messages", "'%s.function.name' must be a string.", path);
    call->name = name->valuestring;
    snprintf(path, sizeof path, "messages[%u].tool_calls[%u].function.arguments", i, k);
    if (arguments && !cJSON_IsString(arguments) && !cJSON_IsObject(arguments))
        return api_refuse(c->p, "messages", "'%s' must be a string or an object.", path);
    if (cJSON_IsObject(arguments)) {
        call->arguments = arguments;
        return ST_OK;
    }
    call->spelling = is_text(arguments) ? arguments->valuestring : "{}";
    return parse_arguments(c, call, path);
}

static enum status read_calls(struct conversation *c, const cJSON *list, uint32_t i,
                              struct chat_message *m)
{
    struct chat_call *calls;
    uint32_t n = 0, k = 0;
    void *memory;

    if (!cJSON_IsArray(list))
        return api_refuse(c->p, "messages", "'messages[%u].tool_calls' must be a list.", i);
    if (m->role != CHAT_ASSISTANT && list->child)
        return api_refuse(c->p, "messages",
                          "'messages[%u].tool_calls' belongs to messages of the assistant.", i);
    for (const cJSON *v = list->child; v; v = v->next)
        n++;
    TRY(api_alloc(c->p, &memory, n, sizeof *calls));
    calls = memory;
    for (const cJSON *v = list->child; v; v = v->next, k++)
        TRY(read_call(c, v, i, k, &calls[k]));
    m->calls = calls;
    m->n_calls = n;
    return ST_OK;
}

/* Members that SDKs send along when they give an answer back. */
static bool says_nothing(const cJSON *v)
{
    return cJSON_IsNull(v) || ((cJSON_IsArray(v) || cJSON_IsObject(v)) && !v->child) ||
           (cJSON_IsString(v) && !v->valuestring[0]);
}

static enum status read_member(struct conversation *c, const cJSON *v, uint32_t i,
                               struct chat_message *m)
{
    static const char *const strings[] = { "name", "tool_call_id" };
    static const char *const empty[] = { "refusal", "annotations", "audio", "function_call" };
    const char *key = v->string;

    if (strcmp(key, "role") == 0 || strcmp(key, "content") == 0)
        return ST_OK;
    if (strcmp(key, "tool_calls") == 0)
        return cJSON_IsNull(v) ? ST_OK : read_calls(c, v, i, m);
    if (strcmp(key, "reasoning_content") == 0 || strcmp(key, "reasoning") == 0) {
        if (cJSON_IsString(v))
            m->reasoning = v->valuestring;
        else if (!cJSON_IsNull(v))
            return api_refuse(c->p, "messages", "'messages[%u].%s' must be a string.", i, key);
        return ST_OK;
    }
    for (size_t k = 0; k < sizeof strings / sizeof strings[0]; k++)
        if (strcmp(key, strings[k]) == 0)
            return cJSON_IsString(v) || cJSON_IsNull(v)
                       ? ST_OK
                       : api_refuse(c->p, "messages", "'messages[%u].%s' must be a string.", i,
                                    key);
    for (size_t k = 0; k < sizeof empty / sizeof empty[0]; k++)
        if (strcmp(key, empty[k]) == 0 && says_nothing(v))
            return ST_OK;
    return api_refuse(c->p, "messages",
                      "'messages[%u]' has '%.*s', which is not supported by this server.", i,
                      api_quotable_bytes(key), key);
}

static enum status read_message(struct conversation *c, const cJSON *v, uint32_t i,
                                struct chat_message *m)
{
    if (!cJSON_IsObject(v))
        return api_refuse(c->p, "messages", "'messages[%u]' must be an object.", i);
    TRY(read_role(c, v, i, &m->role));
    TRY(read_content(c, v, i, m));
    for (const cJSON *child = v->child; child; child = child->next)
        TRY(read_member(c, child, i, m));
    return ST_OK;
}

/* A field whose numbers keep their spelling, and whose objects have each key once. */
static enum status prepare(struct api_parse *p, const char *name, const struct api_value *v)
{
    struct error err;

    /* The tree is ours: api_parse.c made it, and deletes it. */
    if (json_dump_prepare((cJSON *)v->tree, v->text, v->text_bytes, &err) != ST_OK)
        return api_refuse(p, name, "'%s' %s", name, err.text);
    return ST_OK;
}

static enum status read_messages(struct conversation *c)
{
    const struct api_value *v = &c->p->fields.messages;
    struct chat_message *messages;
    uint32_t n = 0, i = 0;
    void *memory;

    if (!v->tree)
        return api_refuse(c->p, "messages", "You must provide 'messages'.");
    if (!cJSON_IsArray(v->tree) || !v->tree->child)
        return api_refuse(c->p, "messages",
                          "'messages' must be a list of at least one message.");
    TRY(prepare(c->p, "messages", v));
    for (const cJSON *m = v->tree->child; m; m = m->next)
        n++;
    TRY(api_alloc(c->p, &memory, n, sizeof *messages));
    messages = memory;
    for (const cJSON *m = v->tree->child; m; m = m->next, i++)
        TRY(read_message(c, m, i, &messages[i]));
    c->chat.messages = messages;
    c->chat.n_messages = n;
    return ST_OK;
}

/* ---- tools */

/* A name goes into prompts and comes back out of them, so it may not look like their syntax. */
static bool is_name(const cJSON *v)
{
    return is_text(v) && strlen(v->valuestring) <= MAX_NAME_BYTES &&
           !strpbrk(v->valuestring, "\"\\<>{} \n\r\t");
}

static enum status check_tool(struct conversation *c, const cJSON *tool, uint32_t i)
{
    const cJSON *type = member(tool, "type"), *function = member(tool, "function");
    const cJSON *parameters = member(function, "parameters");

    if (!cJSON_IsString(type) || strcmp(type->valuestring, "function") != 0)
        return api_refuse(c->p, "tools", "'tools[%u].type' must be \"function\".", i);
    if (!is_name(member(function, "name")))
        return api_refuse(c->p, "tools",
                          "'tools[%u].function.name' must be a string of 1 to %d "
                          "bytes without blanks, quotes, backslashes, braces and angle "
                          "brackets.",
                          i, MAX_NAME_BYTES);
    if (parameters && !cJSON_IsObject(parameters))
        return api_refuse(c->p, "tools", "'tools[%u].function.parameters' must be an object.",
                          i);
    return ST_OK;
}

static bool has_tool(const cJSON *tools, const char *name)
{
    for (const cJSON *tool = tools ? tools->child : NULL; tool; tool = tool->next)
        if (strcmp(member(member(tool, "function"), "name")->valuestring, name) == 0)
            return true;
    return false;
}

/* {"type": "function", "function": {"name": ...}} */
static enum status read_chosen_tool(struct conversation *c, const cJSON *v)
{
    const cJSON *type = member(v, "type"), *name = member(member(v, "function"), "name");

    if (!cJSON_IsString(type) || strcmp(type->valuestring, "function") != 0 || !is_text(name))
        return api_refuse(c->p, "tool_choice",
                          "'tool_choice' must be \"auto\", \"none\", \"required\" or "
                          "{\"type\": \"function\", \"function\": {\"name\": \"...\"}}.");
    if (!has_tool(c->chat.tools, name->valuestring))
        return api_refuse(c->p, "tool_choice",
                          "'tool_choice' names the function '%.*s', which is not among 'tools'.",
                          api_quotable_bytes(name->valuestring), name->valuestring);
    c->p->only_tool = name->valuestring;
    return ST_OK;
}

static enum status read_tool_choice(struct conversation *c)
{
    const cJSON *v = c->p->fields.tool_choice.tree;
    const char *word = cJSON_IsString(v) ? v->valuestring : "";

    if (strcmp(word, "none") == 0)
        c->chat.tools = NULL;
    if (!v || strcmp(word, "none") == 0 || strcmp(word, "auto") == 0)
        return ST_OK;
    c->p->must_call = true;
    if (strcmp(word, "required") != 0)
        TRY(read_chosen_tool(c, v));
    if (!c->chat.tools)
        return api_refuse(c->p, "tool_choice",
                          "'tool_choice' asks for a call, but there are no 'tools'.");
    return ST_OK;
}

static enum status read_tools(struct conversation *c)
{
    const struct api_value *v = &c->p->fields.tools;
    uint32_t i = 0;

    if (v->tree && !cJSON_IsArray(v->tree))
        return api_refuse(c->p, "tools", "'tools' must be a list.");
    if (v->tree && v->tree->child) {
        if (count_values(v->text, v->text_bytes) > MAX_TOOL_VALUES)
            return api_refuse(c->p, "tools", "'tools' has more than %d values.",
                              MAX_TOOL_VALUES);
        TRY(prepare(c->p, "tools", v));
        for (const cJSON *tool = v->tree->child; tool; tool = tool->next, i++)
            TRY(check_tool(c, tool, i));
        c->chat.tools = v->tree;
    }
    return read_tool_choice(c);
}

/* ---- switches */

static enum status read_switch(struct conversation *c, const char *name, const cJSON *v,
                               enum chat_switch *out)
{
    if (!v || cJSON_IsNull(v))
        return ST_OK;
    if (!cJSON_IsBool(v))
        return api_refuse(c->p, name, "'%s' must be true or false.", name);
    enum chat_switch value = cJSON_IsTrue(v) ? CHAT_ON : CHAT_OFF;
    if (*out != CHAT_UNSET && *out != value)
        return api_refuse(c->p, name, "'%s' is given twice, with different values.", name);
    *out = value;
    return ST_OK;
}

static enum status read_date(struct conversation *c, const cJSON *v)
{
    if (cJSON_IsNull(v))
        return ST_OK;
    if (!is_text(v) || strlen(v->valuestring) > MAX_DATE_BYTES)
        return api_refuse(c->p, "chat_template_kwargs",
                          "'date_string' must be a string of 1 to "
                          "%d bytes.",
                          MAX_DATE_BYTES);
    c->chat.date = v->valuestring;
    return ST_OK;
}

static enum status read_kwargs(struct conversation *c)
{
    const cJSON *kwargs = c->p->fields.template_kwargs.tree;
    struct chat *chat = &c->chat;

    TRY(read_switch(c, "enable_thinking", c->p->fields.enable_thinking.tree, &chat->thinking));
    if (kwargs && !cJSON_IsObject(kwargs))
        return api_refuse(c->p, "chat_template_kwargs",
                          "'chat_template_kwargs' must be an object.");
    for (const cJSON *v = kwargs ? kwargs->child : NULL; v; v = v->next) {
        if (strcmp(v->string, "enable_thinking") == 0)
            TRY(read_switch(c, "enable_thinking", v, &chat->thinking));
        else if (strcmp(v->string, "clear_thinking") == 0)
            TRY(read_switch(c, "clear_thinking", v, &chat->clear_thinking));
        else if (strcmp(v->string, "date_string") == 0)
            TRY(read_date(c, v));
        else
            return api_refuse(c->p, "chat_template_kwargs",
                              "'chat_template_kwargs' has '%.*s', "
                              "which the chat formats of this server do not know.",
                              api_quotable_bytes(v->string), v->string);
    }
    return ST_OK;
}

/* What a template would ignore is refused: the client wants something that will not be. */
static enum status check_switches(struct conversation *c)
{
    enum chat_format f = c->p->cx->chat;
    const char *name = c->facts->name;

    if (c->chat.thinking == CHAT_ON && !c->facts->thinks)
        return api_refuse(c->p, "enable_thinking",
                          "'enable_thinking' is true, but models of the "
                          "chat format %s do not think.",
                          name);
    if (c->chat.thinking == CHAT_OFF && f == CHAT_QWEN3_THINKING)
        return api_refuse(c->p, "enable_thinking",
                          "'enable_thinking' is false, but models of "
                          "the chat format %s always think.",
                          name);
    if (c->chat.clear_thinking == CHAT_OFF && f != CHAT_GLM47)
        return api_refuse(c->p, "chat_template_kwargs",
                          "'clear_thinking' is false, but the chat "
                          "format %s always leaves out earlier thoughts.",
                          name);
    if (c->chat.date && f != CHAT_LLAMA31 && f != CHAT_LLAMA32)
        return api_refuse(c->p, "chat_template_kwargs",
                          "'date_string' has no place in the chat "
                          "format %s.",
                          name);
    return ST_OK;
}

/* ---- how to read the answer */

static enum status keep_string(struct api_parse *p, const char **out, const char *s)
{
    void *copy;

    TRY(api_alloc(p, &copy, strlen(s) + 1, 1));
    memcpy(copy, s, strlen(s) + 1);
    *out = copy;
    return ST_OK;
}

static enum status keep_tool(struct conversation *c, const cJSON *tool, struct chat_tool *out)
{
    const cJSON *function = member(tool, "function");
    const cJSON *parameters = member(function, "parameters");
    const cJSON *properties = member(parameters, "properties");
    const struct chat_call_syntax *syntax = c->facts->calls;
    const cJSON *v = syntax && syntax->pairs && properties ? properties->child : NULL;
    size_t n = (size_t)cJSON_GetArraySize(properties);
    const char **strings;
    void *memory;

    TRY(keep_string(c->p, &out->name, member(function, "name")->valuestring));
    if (!v)
        return ST_OK;
    n = n < MAX_PROPERTIES ? n : MAX_PROPERTIES;
    TRY(api_alloc(c->p, &memory, n, sizeof *strings));
    out->strings = strings = memory;
    for (; v && n > 0; v = v->next, n--)
        if (v->string && grammar_schema_is_string(parameters, v))
            TRY(keep_string(c->p, &strings[out->n_strings++], v->string));
    return ST_OK;
}

static enum status keep_output(struct conversation *c)
{
    enum chat_format f = c->p->cx->chat;
    const struct chat *chat = &c->chat;
    struct chat_output_config *out;
    struct chat_tool *tools;
    uint32_t n = 0, i = 0;
    void *memory;

    TRY(api_alloc(c->p, &memory, 1, sizeof *out));
    out = memory;
    c->p->out->chat = out;
    bool open = f == CHAT_QWEN3_THINKING || (f == CHAT_GLM47 && chat->thinking != CHAT_OFF);
    *out = (struct chat_output_config){ .format = f,
                                        .open_thoughts = open && chat->generate,
                                        .may_think =
                                            c->facts->thinks && chat->thinking != CHAT_OFF,
                                        .one_call = !c->p->fields.parallel_calls };
    for (const cJSON *tool = chat->tools ? chat->tools->child : NULL; tool; tool = tool->next)
        n++;
    TRY(api_alloc(c->p, &memory, n, sizeof *tools));
    out->tools = tools = memory;
    out->n_tools = n;
    for (const cJSON *tool = chat->tools ? chat->tools->child : NULL; tool; tool = tool->next)
        TRY(keep_tool(c, tool, &tools[i++]));
    return ST_OK;
}

/* ---- the format's own ends */

static bool is_eos(const struct model_config *m, int32_t id)
{
    for (int i = 0; i < m->n_eos; i++)
        if (m->eos[i] == id)
            return true;
    return false;
}

/* Folders do not always list the end of a turn among the ends of a text. */
static enum status add_ends(struct conversation *c)
{
    const struct api_context *cx = c->p->cx;
    struct request *t = &c->p->out->template;
    int32_t *ids;
    void *memory;

    TRY(api_alloc(c->p, &memory, t->n_stop_ids + CHAT_MAX_ENDS, sizeof *ids));
    ids = memory;
    if (t->n_stop_ids)
        memcpy(ids, t->stop_ids, t->n_stop_ids * sizeof *ids);
    t->stop_ids = ids;
    for (int i = 0; i < CHAT_MAX_ENDS && c->facts->ends[i]; i++) {
        int32_t id = tokenizer_find(cx->tokenizer, c->facts->ends[i]);
        if (id >= 0 && id < cx->model->vocab && !is_eos(cx->model, id))
            ids[t->n_stop_ids++] = id;
    }
    if (!c->facts->stop)
        return ST_OK;
    TRY(api_alloc(c->p, &memory, t->n_stops + 1, sizeof *t->stops));
    const char **stops = memory;
    if (t->n_stops)
        memcpy(stops, t->stops, t->n_stops * sizeof *stops);
    stops[t->n_stops++] = c->facts->stop;
    t->stops = stops;
    return ST_OK;
}

/* ---- all of it */

static enum status refuse_chat(struct api_parse *p)
{
    enum status status = api_refuse(p, "messages",
                                    "This model is not served for chat: %s. Text "
                                    "completions work.",
                                    p->cx->no_chat);

    p->err->code = "chat_not_available";
    return status;
}

static enum status render(struct conversation *c, struct token_list *list, size_t max_ids)
{
    struct chat_prompt prompt = { 0 };
    struct error err;
    enum status status = chat_render(&prompt, c->p->cx->chat, &c->chat, &err);

    if (status != ST_OK)
        status = api_refuse(c->p, c->chat.tools && !c->facts->tools ? "tools" : "messages",
                            "%s", err.text);
    else if (tokenizer_encode_marked(c->p->cx->tokenizer, list, prompt.text.data, prompt.text.n,
                                     prompt.marked, prompt.n_marked, max_ids) != ST_OK)
        status = c->p->endpoint == API_CHAT
                     ? api_refuse_length(c->p, max_ids + 1, false)
                     : api_refuse(c->p, "messages",
                                  "The conversation has more than %zu tokens.", max_ids);
    chat_prompt_fini(&prompt);
    return status;
}

static enum status read_conversation(struct conversation *c, struct token_list *list,
                                     size_t max_ids)
{
    TRY(read_tools(c));
    TRY(read_kwargs(c));
    TRY(check_switches(c));
    TRY(read_messages(c));
    if (c->p->endpoint == API_CHAT) {
        TRY(keep_output(c));
        TRY(add_ends(c));
    }
    return render(c, list, max_ids);
}

enum status api_read_conversation(struct api_parse *p, struct token_list *list, size_t max_ids)
{
    struct conversation c = { .p = p, .values_left = p->cx->limits.max_json_values };

    if (p->cx->chat == CHAT_NONE)
        return refuse_chat(p);
    c.facts = chat_format_facts(p->cx->chat);
    c.chat.generate = p->fields.generate;
    enum status status = read_conversation(&c, list, max_ids);
    drop_trees(&c);
    return status;
}

/* Of the two names of the limit either may be used. */
static enum status choose_max_tokens(struct api_parse *p)
{
    struct api_fields *f = &p->fields;

    if (f->max_completion_tokens >= 0 && f->max_tokens >= 0 &&
        f->max_completion_tokens != f->max_tokens)
        return api_refuse(p, "max_completion_tokens",
                          "'max_tokens' and 'max_completion_tokens' differ; send one of them.");
    if (f->max_completion_tokens >= 0)
        f->max_tokens = f->max_completion_tokens;
    if (f->max_tokens == 0)
        return api_refuse(
            p, f->max_completion_tokens == 0 ? "max_completion_tokens" : "max_tokens",
            "A chat needs 'max_tokens' or 'max_completion_tokens' of at least 1.");
    return ST_OK;
}

static enum status choose_logprobs(struct api_parse *p)
{
    struct api_fields *f = &p->fields;

    if (f->top_logprobs >= 0 && !f->want_logprobs)
        return f->top_logprobs == 0 ? ST_OK
                                    : api_refuse(p, "top_logprobs",
                                                 "'top_logprobs' is only allowed when "
                                                 "'logprobs' is true.");
    if (f->top_logprobs > (int64_t)p->cx->limits.max_logprobs)
        return api_refuse(p, "top_logprobs",
                          "'top_logprobs' must be between 0 and %u, not %lld.",
                          p->cx->limits.max_logprobs, (long long)f->top_logprobs);
    if (f->want_logprobs)
        f->logprobs = f->top_logprobs > 0 ? f->top_logprobs : 0;
    return ST_OK;
}

enum status api_read_chat(struct api_parse *p)
{
    struct api_fields *f = &p->fields;
    uint32_t limit = p->cx->limits.max_model_len;
    struct token_list list = { 0 };
    void *prompts;

    f->best_of = f->n;
    TRY(choose_max_tokens(p));
    TRY(choose_logprobs(p));
    TRY(api_check_choices(p, 1));
    TRY(api_alloc(p, &prompts, 1, sizeof(struct api_prompt)));
    p->out->prompts = prompts;
    p->out->n_prompts = 1;
    /* Without a limit the answer may fill what is left of the context, at least a token. */
    bool limited = f->max_tokens >= 0;
    f->max_tokens = limited ? f->max_tokens : 1;
    enum status status = api_read_conversation(p, &list, limit);
    if (status == ST_OK)
        status = api_keep_ids(p, &list, 0);
    token_list_fini(&list);
    if (status == ST_OK && !limited)
        f->max_tokens = (int64_t)limit - p->out->prompts[0].n_ids;
    return status;
}
