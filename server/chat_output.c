#include "server/chat_output.h"

#include "engine/base/invariant.h"
#include "server/json_dump.h"
#include "server/json_scan.h"

#include <cjson/cJSON.h>
#include <string.h>

enum state {
    START, /* may begin with <think> */
    REASONING_START,
    REASONING,
    SPACE, /* between the parts */
    CONTENT,
    CALL,       /* a marker has been read: is this a call that can be streamed? */
    CALL_WHOLE, /* no, it has to be read as a whole */
    ARGUMENTS,  /* bytes up to the brace that closes them */
    CALL_END,
    GLM_NAME,
    GLM_ARGUMENTS
};

enum {
    /* Line ends that wait for a marker which would make them a separator. */
    MAX_HELD_LINES = 64,
    /* Longer than any sensible name with the keys around it. */
    MAX_HEAD_BYTES = 512,
    MAX_VALUES = 1 << 16
};

static const char think[] = CHAT_THINK, think_end[] = CHAT_THINK_END;
static const char call_begin[] = CHAT_TOOL_CALL, call_end[] = CHAT_TOOL_CALL_END;

/* The text of one call of chat_output_next. */
struct view {
    const char *s;
    size_t n;
    bool final;
};

void chat_output_init(struct chat_output *o, const struct chat_output_config *cfg)
{
    *o = (struct chat_output){ .cfg = *cfg };
    o->state = cfg->open_thoughts ? REASONING_START : cfg->may_think ? START : SPACE;
    o->skip_blanks = cfg->format == CHAT_PLAIN;
}

void chat_output_fini(struct chat_output *o)
{
    strbuf_fini(&o->name);
    strbuf_fini(&o->scratch);
}

/* ---- looking at text */

static bool is_llama(const struct chat_output *o)
{
    return o->cfg.format == CHAT_LLAMA31 || o->cfg.format == CHAT_LLAMA32;
}

/* A Llama calls by writing nothing but the call. */
static bool may_be_bare_call(const struct chat_output *o)
{
    return is_llama(o) && o->cfg.n_tools > 0 && o->n_calls == 0;
}

/* Calls that stand between markers. */
static bool has_call_markers(const struct chat_output *o)
{
    return o->cfg.n_tools > 0 && !is_llama(o);
}

static bool is_blank(char c)
{
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

static size_t skip_blanks(const struct view *v, size_t at)
{
    while (at < v->n && is_blank(v->s[at]))
        at++;
    return at;
}

enum match { MATCH_NO, MATCH_PART, MATCH_YES };

/* Does the text go on with marker?  At its end there may only be a part of it. */
static enum match match(const struct view *v, size_t at, const char *marker)
{
    size_t k = strlen(marker), rest = v->n - at;

    if (rest >= k)
        return memcmp(v->s + at, marker, k) == 0 ? MATCH_YES : MATCH_NO;
    return memcmp(v->s + at, marker, rest) == 0 && !v->final ? MATCH_PART : MATCH_NO;
}

/* Where marker begins at or behind `from`, or v->n. */
static size_t find(const struct view *v, size_t from, const char *marker)
{
    const char *hit =
        from < v->n ? memmem(v->s + from, v->n - from, marker, strlen(marker)) : NULL;

    return hit ? (size_t)(hit - v->s) : v->n;
}

/* Where a marker that is not complete can begin at the earliest. */
static size_t tail(const struct view *v, const char *marker)
{
    size_t k = strlen(marker);

    return v->n >= k ? v->n - k + 1 : 0;
}

/* Up to where text behind `from` cannot belong to a marker that comes. */
static size_t settled(const struct view *v, size_t from, const char *marker)
{
    size_t at = tail(v, marker);

    for (at = at > from ? at : from; at < v->n; at++)
        if (match(v, at, marker) == MATCH_PART)
            return at;
    return v->n;
}

static size_t without_lines(const struct view *v, size_t from, size_t end)
{
    size_t last = end;

    while (last > from && v->s[last - 1] == '\n' && end - last < MAX_HELD_LINES)
        last--;
    return last;
}

static bool give(struct chat_delta *out, enum chat_part part, const char *s, size_t n)
{
    *out = (struct chat_delta){ .part = part, .s = s, .n = n };
    return n > 0;
}

static void go(struct chat_output *o, enum state state, size_t at)
{
    o->state = state;
    o->at = o->scan = at;
}

/* ---- thoughts and text */

/* The functions of the states: true when out is filled, otherwise *more says whether to go on
 * with the state that is then. */

static bool read_start(struct chat_output *o, const struct view *v, bool *more)
{
    size_t at = skip_blanks(v, o->at);
    bool open = o->state == REASONING_START;

    *more = at < v->n || v->final;
    if (!*more)
        return false;
    switch (match(v, at, think)) {
    case MATCH_PART:
        *more = false;
        break;
    case MATCH_YES:
        at += sizeof think - 1;
        open = true;
        /* fall through */
    case MATCH_NO:
        if (!open) {
            go(o, CONTENT, o->at);
            break;
        }
        while (at < v->n && v->s[at] == '\n')
            at++;
        *more = at < v->n || v->final;
        if (*more)
            go(o, REASONING, at);
        break;
    }
    return false;
}

static bool read_reasoning(struct chat_output *o, const struct view *v, bool *more,
                           struct chat_delta *out)
{
    size_t from = o->at, hit = find(v, from, think_end), end = hit;
    bool calls = has_call_markers(o);
    size_t call = calls ? find(v, from, call_begin) : v->n;

    o->thought = true;
    if (call < hit)
        end = hit = call;
    if (hit < v->n) {
        end = without_lines(v, from, end);
        /* A call ends the thoughts, whether the model says so or not. */
        go(o, hit == call ? CONTENT : SPACE, hit + (hit == call ? 0 : sizeof think_end - 1));
        o->thoughts_end = o->at;
    } else if (!v->final) {
        end = settled(v, from, think_end);
        call = calls ? settled(v, from, call_begin) : v->n;
        end = without_lines(v, from, call < end ? call : end);
        o->at = end;
        o->thoughts_end = v->n;
        *more = false;
    } else {
        o->at = o->thoughts_end = v->n;
        *more = false;
    }
    return give(out, CHAT_REASONING, v->s + from, end - from);
}

static bool read_space(struct chat_output *o, const struct view *v, bool *more)
{
    bool between = o->thought || o->n_calls > 0;
    size_t at = o->at;

    while (at < v->n &&
           ((between && v->s[at] == '\n') || (o->skip_blanks && is_blank(v->s[at]))))
        at++;
    size_t first = may_be_bare_call(o) ? skip_blanks(v, at) : at;
    *more = first < v->n || (v->final && at < v->n);
    go(o, *more ? CONTENT : SPACE, at);
    o->skip_blanks = o->skip_blanks && !*more;
    if (first < v->n && may_be_bare_call(o) && v->s[first] == '{') {
        go(o, CALL, at);
        o->body = first;
    }
    return false;
}

static bool read_content(struct chat_output *o, const struct view *v, bool *more,
                         struct chat_delta *out)
{
    size_t from = o->at, end = v->n;

    *more = false;
    o->at = v->n;
    if (has_call_markers(o)) {
        size_t hit = find(v, from, call_begin);
        if (hit < v->n) {
            end = without_lines(v, from, hit);
            go(o, o->cfg.format == CHAT_GLM47 ? GLM_NAME : CALL, hit);
            o->body = hit + sizeof call_begin - 1;
            *more = true;
        } else if (!v->final) {
            end = without_lines(v, from, settled(v, from, call_begin));
            o->at = end;
        }
    }
    return give(out, CHAT_CONTENT, v->s + from, end - from);
}

/* What looked like a call is text, up to `end`. */
static bool give_up(struct chat_output *o, const struct view *v, size_t end,
                    struct chat_delta *out)
{
    size_t from = o->at;

    go(o, CONTENT, end);
    return give(out, CHAT_CONTENT, v->s + from, end - from);
}

/* ---- calls in JSON */

/* The constant parts of {"name": "f", "arguments": { around the name, blanks allowed. */
static enum match match_words(const struct view *v, size_t *at, const char *const *words)
{
    for (; *words; words++) {
        *at = skip_blanks(v, *at);
        enum match m = match(v, *at, *words);
        if (m != MATCH_YES)
            return m;
        *at += strlen(*words);
    }
    return MATCH_YES;
}

/* The head of a call in the order that models are shown; leaves *at on the arguments' brace. */
static enum match match_head(const struct chat_output *o, const struct view *v, size_t *at,
                             size_t *name, size_t *name_bytes)
{
    static const char *const before[] = { "{", "\"name\"", ":", "\"", NULL };
    static const char *const qwen[] = { ",", "\"arguments\"", ":", NULL };
    static const char *const llama[] = { ",", "\"parameters\"", ":", NULL };
    enum match m = match_words(v, at, before);

    if (m != MATCH_YES)
        return m;
    *name = *at;
    while (*at < v->n && v->s[*at] != '"' && v->s[*at] != '\\' &&
           (unsigned char)v->s[*at] >= ' ')
        ++*at;
    if (*at == v->n)
        return v->final ? MATCH_NO : MATCH_PART;
    *name_bytes = *at - *name;
    if (*name_bytes == 0 || v->s[(*at)++] != '"')
        return MATCH_NO;
    m = match_words(v, at, is_llama(o) ? llama : qwen);
    if (m != MATCH_YES)
        return m;
    *at = skip_blanks(v, *at);
    return match(v, *at, "{");
}

static bool give_name(struct chat_output *o, const char *s, size_t n, struct chat_delta *out)
{
    strbuf_clear(&o->name);
    strbuf_add(&o->name, s, n);
    o->tool = NULL;
    for (uint32_t i = 0; i < o->cfg.n_tools; i++)
        if (strcmp(o->cfg.tools[i].name, o->name.data) == 0)
            o->tool = &o->cfg.tools[i];
    o->n_calls++;
    return give(out, CHAT_CALL, o->name.data, o->name.n);
}

static bool read_call(struct chat_output *o, const struct view *v, bool *more,
                      struct chat_delta *out)
{
    size_t at = o->body, name = 0, name_bytes = 0;
    enum match m = match_head(o, v, &at, &name, &name_bytes);

    if (m == MATCH_PART && v->n - o->body < MAX_HEAD_BYTES) {
        *more = false;
        return false;
    }
    if (m != MATCH_YES) {
        size_t first = skip_blanks(v, o->body);
        if (is_llama(o) || (first < v->n && v->s[first] != '{'))
            return give_up(o, v, o->body, out);
        go(o, CALL_WHOLE, o->at);
        return false;
    }
    go(o, ARGUMENTS, at);
    o->in_string = o->escaped = false;
    o->depth = 0;
    return give_name(o, v->s + name, name_bytes, out);
}

static bool read_arguments(struct chat_output *o, const struct view *v, bool *more,
                           struct chat_delta *out)
{
    size_t from = o->at, at = from;
    bool ended = false;

    for (; at < v->n && !ended; at++) {
        char c = v->s[at];
        if (o->in_string) {
            o->in_string = o->escaped || c != '"';
            o->escaped = !o->escaped && c == '\\';
        } else if (c == '"') {
            o->in_string = true;
        } else if (c == '{' || c == '[') {
            o->depth++;
        } else if (c == '}' || c == ']') {
            ended = --o->depth == 0;
        } else if (c == '<') {
            /* Not JSON: more likely the closing marker of a call that was cut short. */
            ended = true;
            break;
        }
    }
    o->at = at;
    if (ended)
        go(o, CALL_END, at);
    *more = ended;
    return give(out, CHAT_ARGUMENTS, v->s + from, at - from);
}

/* The object's brace and the marker; anything else is text that follows. */
static bool read_call_end(struct chat_output *o, const struct view *v, bool *more)
{
    size_t at = skip_blanks(v, o->at);

    if (at < v->n && v->s[at] == '}')
        at = skip_blanks(v, at + 1);
    *more = false;
    size_t rest = v->n - at;
    if (rest == 0 || (v->final && !is_llama(o) && rest < sizeof call_end - 1 &&
                      memcmp(call_end, v->s + at, rest) == 0)) {
        if (v->final)
            go(o, SPACE, v->n);
        return false;
    }
    if (is_llama(o)) {
        go(o, SPACE, at);
        *more = true;
        return false;
    }
    enum match m = match(v, at, call_end);
    if (m == MATCH_PART)
        return false;
    *more = true;
    go(o, SPACE, at + (m == MATCH_YES ? sizeof call_end - 1 : 0));
    return false;
}

/* A call whose members come in another order, or whose arguments are JSON in a string.  The
 * name goes to o->name, the arguments to o->scratch. */
static bool parse_whole(struct chat_output *o, const char *s, size_t n)
{
    struct json_scan scan;
    const cJSON *name = NULL, *arguments = NULL;
    int i = 0, which = -1;

    if (json_scan(&scan, s, n, MAX_VALUES, NULL) != ST_OK || !scan.object)
        return false;
    cJSON *root = cJSON_ParseWithLength(s, n);
    for (const cJSON *v = root ? root->child : NULL; v; v = v->next, i++) {
        if (strcmp(v->string, "name") == 0)
            name = v;
        else if (strcmp(v->string, "arguments") == 0 || strcmp(v->string, "parameters") == 0)
            arguments = v, which = i;
    }
    bool good = cJSON_IsString(name) && name->valuestring[0] &&
                (!arguments || cJSON_IsObject(arguments) || cJSON_IsNull(arguments) ||
                 cJSON_IsString(arguments));
    strbuf_clear(&o->name);
    strbuf_clear(&o->scratch);
    if (good)
        strbuf_puts(&o->name, name->valuestring);
    if (good && cJSON_IsString(arguments))
        strbuf_puts(&o->scratch, arguments->valuestring);
    else if (good && cJSON_IsObject(arguments))
        strbuf_add(&o->scratch, s + scan.members[which].value, scan.members[which].value_bytes);
    if (o->scratch.n == 0)
        strbuf_puts(&o->scratch, "{}");
    cJSON_Delete(root);
    return good;
}

static bool read_call_whole(struct chat_output *o, const struct view *v, bool *more,
                            struct chat_delta *out)
{
    size_t from = o->scan > o->body ? o->scan : o->body;
    size_t end = find(v, from, call_end);

    if (end == v->n && !v->final) {
        o->scan = tail(v, call_end);
        *more = false;
        return false;
    }
    size_t after = end < v->n ? end + sizeof call_end - 1 : end;
    if (!parse_whole(o, v->s + o->body, end - o->body))
        return give_up(o, v, after, out);
    /* The arguments are given with the next call. */
    go(o, CALL_WHOLE, after);
    o->body = SIZE_MAX;
    o->n_calls++;
    return give(out, CHAT_CALL, o->name.data, o->name.n);
}

/* ---- GLM's calls */

static bool read_glm_name(struct chat_output *o, const struct view *v, bool *more,
                          struct chat_delta *out)
{
    size_t start = skip_blanks(v, o->body), tag = start;

    while (tag < v->n && v->s[tag] != '<' && v->s[tag] != '\n')
        tag++;
    size_t end = tag, next = skip_blanks(v, tag);
    while (end > start && is_blank(v->s[end - 1]))
        end--;
    enum match key = match(v, next, CHAT_ARG_KEY), close = match(v, next, call_end);
    if (end - start > MAX_HEAD_BYTES || (next < v->n && end == start) ||
        (key == MATCH_NO && close == MATCH_NO))
        return give_up(o, v, o->body, out);
    if (key != MATCH_YES && close != MATCH_YES) {
        *more = false;
        return false;
    }
    go(o, GLM_ARGUMENTS, next);
    o->has_pair = false;
    return give_name(o, v->s + start, end - start, out);
}

/* The object of the arguments is around it, and its client sends all of it back. */
static bool is_json(const char *s, size_t n)
{
    return json_is_value(s, n, 1);
}

/* Whether the function says that values of this name are. */
static bool is_string(const struct chat_output *o)
{
    for (uint32_t i = 0; o->tool && i < o->tool->n_strings; i++)
        if (strcmp(o->tool->strings[i], o->name.data) == 0)
            return true;
    return false;
}

/* Goes on from o->scan through a value that may be JSON: where it ends, at a marker that is not in
 * a string, or v->n.  Strings are looked for only in what begins like JSON that has some, so that
 * a quote in a text hides no marker. */
static size_t end_of_json(struct chat_output *o, const struct view *v, size_t text)
{
    for (; o->scan < v->n; o->scan++) {
        char c = v->s[o->scan];
        if (o->in_string) {
            o->in_string = o->escaped || c != '"';
            o->escaped = !o->escaped && c == '\\';
        } else if (c == '"') {
            char first = v->s[skip_blanks(v, text)];
            o->in_string = o->may_be_json = first == '"' || first == '[' || first == '{';
        } else if (c == '<') {
            enum match m = match(v, o->scan, CHAT_ARG_VALUE_END);
            o->may_be_json = m != MATCH_NO;
            return m == MATCH_YES ? o->scan : v->n;
        }
        if (!o->may_be_json)
            return v->n;
    }
    o->may_be_json = !v->final;
    return v->n;
}

/* The marker that ends the value at `text`, or v->n: the first one, but JSON goes on behind those
 * that are in its strings. */
static size_t end_of_value(struct chat_output *o, const struct view *v, size_t text)
{
    size_t end;

    if (o->scan < text) {
        o->scan = text;
        o->in_string = o->escaped = false;
        o->may_be_json = !is_string(o);
    }
    if (o->may_be_json) {
        end = end_of_json(o, v, text);
        if (o->may_be_json && (end == v->n || is_json(v->s + text, end - text)))
            return end;
        o->may_be_json = false;
        o->scan = text;
    }
    end = find(v, o->scan, CHAT_ARG_VALUE_END);
    if (end == v->n && tail(v, CHAT_ARG_VALUE_END) > o->scan)
        o->scan = tail(v, CHAT_ARG_VALUE_END);
    return end;
}

static bool read_glm_pair(struct chat_output *o, const struct view *v, size_t at,
                          struct chat_delta *out)
{
    size_t key = at + strlen(CHAT_ARG_KEY), end = find(v, key, CHAT_ARG_KEY_END);

    if (end == v->n)
        return false;
    size_t open = skip_blanks(v, end + strlen(CHAT_ARG_KEY_END));
    if (match(v, open, CHAT_ARG_VALUE) != MATCH_YES)
        return false;
    size_t text = open + strlen(CHAT_ARG_VALUE);
    strbuf_clear(&o->name);
    strbuf_add(&o->name, v->s + key, end - key);
    size_t close = end_of_value(o, v, text);
    if (close == v->n)
        return false;
    strbuf_clear(&o->scratch);
    strbuf_puts(&o->scratch, o->has_pair ? ", " : "{");
    json_dump_string(&o->scratch, v->s + key, end - key);
    strbuf_puts(&o->scratch, ": ");
    /* A value is text if its function says so or if it is nothing else. */
    if (!is_string(o) && is_json(v->s + text, close - text))
        strbuf_add(&o->scratch, v->s + text, close - text);
    else
        json_dump_string(&o->scratch, v->s + text, close - text);
    o->has_pair = true;
    go(o, GLM_ARGUMENTS, close + strlen(CHAT_ARG_VALUE_END));
    return give(out, CHAT_ARGUMENTS, o->scratch.data, o->scratch.n);
}

static bool read_glm_arguments(struct chat_output *o, const struct view *v, bool *more,
                               struct chat_delta *out)
{
    size_t at = skip_blanks(v, o->at);
    enum match key = match(v, at, CHAT_ARG_KEY), close = match(v, at, call_end);
    const char *end = o->has_pair ? "}" : "{}";

    if (close == MATCH_YES) {
        go(o, SPACE, at + sizeof call_end - 1);
        return give(out, CHAT_ARGUMENTS, end, strlen(end));
    }
    if (key == MATCH_YES && read_glm_pair(o, v, at, out))
        return true;
    if (!v->final && (key != MATCH_NO || close == MATCH_PART)) {
        *more = false;
        return false;
    }
    /* Broken, or cut off: what was read are the arguments. */
    go(o, CONTENT, at);
    return give(out, CHAT_ARGUMENTS, end, strlen(end));
}

/* ---- all states */

static bool step(struct chat_output *o, const struct view *v, bool *more,
                 struct chat_delta *out)
{
    switch ((enum state)o->state) {
    case START:
    case REASONING_START:
        return read_start(o, v, more);
    case REASONING:
        return read_reasoning(o, v, more, out);
    case SPACE:
        return read_space(o, v, more);
    case CONTENT:
        return read_content(o, v, more, out);
    case CALL:
        return read_call(o, v, more, out);
    case CALL_WHOLE:
        if (o->body != SIZE_MAX)
            return read_call_whole(o, v, more, out);
        go(o, SPACE, o->at);
        return give(out, CHAT_ARGUMENTS, o->scratch.data, o->scratch.n);
    case ARGUMENTS:
        return read_arguments(o, v, more, out);
    case CALL_END:
        return read_call_end(o, v, more);
    case GLM_NAME:
        return read_glm_name(o, v, more, out);
    case GLM_ARGUMENTS:
        return read_glm_arguments(o, v, more, out);
    }
    return false;
}

bool chat_output_next(struct chat_output *o, const char *text, size_t n, bool final,
                      struct chat_delta *out)
{
    const struct view v = { text, n, final };
    bool more = true;

    ASSERT(o->at <= n);
    while (more) {
        if (!step(o, &v, &more, out))
            continue;
        bool of_call = out->part == CHAT_CALL || out->part == CHAT_ARGUMENTS;
        out->call = of_call ? o->n_calls - 1 : 0;
        if (of_call && out->call > 0 && o->cfg.one_call)
            more = true;
        else
            return true;
    }
    return false;
}
