#include "server/api_parse.h"

#include "engine/base/invariant.h"

#include <string.h>

/* The structure is asked of the answer.  Thoughts come before it, and where there are tools the
 * answer may as well be calls; both are spelled as chat_output.c reads them. */

static const char *text_of(const cJSON *object, const char *key)
{
    return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, key));
}

static enum status join(struct api_parse *p, const char **out, const char *a, const char *b,
                        const char *c)
{
    void *memory;

    TRY(api_alloc(p, &memory, strlen(a) + strlen(b) + strlen(c) + 1, 1));
    stpcpy(stpcpy(stpcpy(memory, a), b), c);
    *out = memory;
    return ST_OK;
}

/* The arguments of tool i: valid by its parameters, unless it has none or does not want that. */
static enum status read_arguments(struct api_parse *p, const cJSON *function, int i,
                                  const cJSON **out)
{
    const cJSON *parameters = cJSON_GetObjectItemCaseSensitive(function, "parameters");
    const char *type = text_of(parameters, "type");

    *out = NULL;
    if (cJSON_IsFalse(cJSON_GetObjectItemCaseSensitive(function, "strict")) ||
        !cJSON_IsObject(parameters) || !parameters->child)
        return ST_OK;
    if (!type || strcmp(type, "object") != 0)
        return api_refuse(p, "tools", "'tools[%d].function.parameters' must have the 'type' "
                          "\"object\" for calls to follow it.", i);
    *out = parameters;
    return ST_OK;
}

/* A pair means what its function's schema says, and the function is known by its name. */
static enum status check_name(struct api_parse *p, const struct grammar_turn *turn,
                              const struct chat_call_syntax *syntax, int i)
{
    for (size_t k = 0; syntax->pairs && k + 1 < turn->n_calls; k++)
        if (strcmp(turn->calls[k].head, turn->calls[turn->n_calls - 1].head) == 0)
            return api_refuse(p, "tools", "'tools[%d].function.name' is that of another tool; this "
                              "model's calls could not be told apart.", i);
    return ST_OK;
}

static enum status read_calls(struct api_parse *p, struct grammar_turn *turn, const cJSON *tools,
                              const struct chat_call_syntax *syntax)
{
    int i = 0;
    void *memory;

    TRY(api_alloc(p, &memory, (size_t)cJSON_GetArraySize(tools), sizeof *turn->calls));
    turn->calls = memory;
    for (const cJSON *tool = tools->child; tool; tool = tool->next, i++) {
        const cJSON *function = cJSON_GetObjectItemCaseSensitive(tool, "function");
        const char *name = text_of(function, "name");
        struct grammar_call *call = &turn->calls[turn->n_calls];
        if (p->only_tool && strcmp(name, p->only_tool) != 0)
            continue;
        TRY(read_arguments(p, function, i, &call->schema));
        TRY(join(p, &call->head, syntax->head, name, syntax->middle));
        call->tail = syntax->tail;
        turn->n_calls++;
        TRY(check_name(p, turn, syntax, i));
    }
    turn->pairs = syntax->pairs;
    turn->never = syntax->marker;
    turn->between = p->fields.parallel_calls && !p->only_tool ? syntax->between : NULL;
    return ST_OK;
}

enum status api_read_turn(struct api_parse *p, struct api_turn *t)
{
    const struct chat_output_config *chat = p->out->chat;
    const struct chat_format_facts *facts = chat_format_facts(chat->format);
    const struct api_value *tools = &p->fields.tools;

    t->grammar.thoughts = chat->open_thoughts ? GRAMMAR_THINKING
                          : chat->may_think   ? GRAMMAR_MAY_THINK
                                              : GRAMMAR_NO_THOUGHTS;
    t->grammar.think = CHAT_THINK;
    t->grammar.think_end = CHAT_THINK_END;
    if (chat->n_tools == 0)
        return ST_OK;
    ASSERT(facts->calls);        /* other formats refuse tools */
    /* The request's own tree has been prepared for printing: its numbers are text. */
    t->tools = cJSON_ParseWithLength(tools->text, tools->text_bytes);
    if (!t->tools)
        return api_refuse(p, "tools", "'tools' is not valid JSON.");
    return read_calls(p, &t->grammar, t->tools, facts->calls);
}

void api_turn_fini(struct api_turn *t)
{
    cJSON_Delete(t->tools);
    *t = (struct api_turn){ 0 };
}

/* The number of the tool with these parameters. */
static int number_of(const cJSON *tools, const cJSON *parameters)
{
    int i = 0;

    for (const cJSON *tool = tools->child; tool; tool = tool->next, i++) {
        const cJSON *function = cJSON_GetObjectItemCaseSensitive(tool, "function");
        if (cJSON_GetObjectItemCaseSensitive(function, "parameters") == parameters)
            break;
    }
    return i;
}

enum status api_refuse_turn(struct api_parse *p, const struct api_turn *t, const char *field,
                            const struct error *err)
{
    for (size_t i = 0; t && i < t->grammar.n_calls; i++)
        if (t->grammar.calls[i].refused)
            return api_refuse(p, "tools", "'tools[%d].function.parameters' %s; with 'strict' "
                              "false calls need not follow it.",
                              number_of(t->tools, t->grammar.calls[i].schema), err->text);
    return api_refuse(p, field, "'%s' %s.", field, err->text);
}
