#include "server/config.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "server/config_table.h"
#include "server/devices.h"
#include "server/listen.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FILE_BYTES = 1 << 20, MAX_OPTIONS = 128, MAX_KEY_BYTES = 64 };
enum { HELP_COLUMNS = 80, MAX_CHOICES_COLUMNS = 40 };

static const char env_prefix[] = "ASYNCTLSD_";

const char *config_version(void)
{
    return "0.1.0";
}

void config_init(struct config *out)
{
    struct error err;

    *out = (struct config){ 0 };
    for (size_t i = 0; i < config_n_options(); i++) {
        const struct option *o = config_option(i);
        ASSERT(option_set(o, out, o->initial, "default", &err) == ST_OK);
    }
}

void config_fini(struct config *c)
{
    for (size_t i = 0; i < config_n_options(); i++)
        option_fini(config_option(i), c);
    mem_free(c->calibrate_text);
    *c = (struct config){ 0 };
}

/* ---- files */

static enum status file_load(struct strbuf *out, const char *path, const char *place,
                             struct error *err)
{
    FILE *f = fopen(path, "rb");
    size_t n = 1;

    if (!f)
        return error_set(err, ST_IO, "%s: cannot open %s: %s", place, path, strerror(errno));
    strbuf_puts(out, "");
    while (n > 0 && out->n <= MAX_FILE_BYTES) {
        n = fread(strbuf_room(out, 65536), 1, 65536, f);
        out->n += n;
        out->data[out->n] = '\0';
    }
    int why = ferror(f) ? errno : 0;
    fclose(f);
    if (why)
        return error_set(err, ST_IO, "%s: cannot read %s: %s", place, path, strerror(why));
    if (out->n > MAX_FILE_BYTES)
        return error_set(err, ST_INVALID, "%s: %s is longer than %d bytes", place, path,
                         MAX_FILE_BYTES);
    return ST_OK;
}

static bool blank_char(char c)
{
    return c == ' ' || c == '\t' || c == '\r';
}

/* Cut white space at both ends, and a comment: a # at the start or after a blank. */
static void line_trim(const char **line, size_t *n)
{
    for (size_t i = 0; i < *n; i++)
        if ((*line)[i] == '#' && (i == 0 || blank_char((*line)[i - 1])))
            *n = i;
    while (*n && blank_char((*line)[*n - 1]))
        --*n;
    while (*n && blank_char(**line)) {
        ++*line;
        --*n;
    }
}

static enum status line_set(struct config *c, const char *line, size_t n, bool *seen,
                            const char *place, struct error *err)
{
    size_t key_bytes = 0;

    while (key_bytes < n && !blank_char(line[key_bytes]))
        key_bytes++;
    const struct option *o = config_find(line, key_bytes);
    if (!o)
        return error_set(err, ST_INVALID, "%s: there is no option '%.*s'", place,
                         (int)(key_bytes < MAX_KEY_BYTES ? key_bytes : MAX_KEY_BYTES), line);
    bool *again = &seen[o - config_option(0)];
    if (*again)
        return error_set(err, ST_INVALID, "%s: %s is set a second time", place, o->key);
    *again = true;
    while (key_bytes < n && blank_char(line[key_bytes]))
        key_bytes++;
    char *value = mem_strndup(line + key_bytes, n - key_bytes);
    enum status status = option_set(o, c, value, place, err);
    mem_free(value);
    return status;
}

enum status config_parse_text(struct config *c, const char *text, size_t n, const char *name,
                              struct error *err)
{
    bool seen[MAX_OPTIONS] = { false };
    char place[256];
    size_t at = 0;

    ASSERT(config_n_options() <= MAX_OPTIONS);
    for (int number = 1; at < n; number++) {
        const char *line = text + at, *end = memchr(line, '\n', n - at);
        size_t length = end ? (size_t)(end - line) : n - at;

        at += length + 1;
        snprintf(place, sizeof place, "%.200s:%d", name, number);
        if (memchr(line, '\0', length))
            return error_set(err, ST_INVALID, "%s: the line has a NUL byte", place);
        line_trim(&line, &length);
        if (length)
            TRY(line_set(c, line, length, seen, place, err));
    }
    return ST_OK;
}

static enum status read_config_file(struct config *c, const char *path, struct error *err)
{
    struct strbuf text = { 0 };
    enum status status = file_load(&text, path, "--config", err);

    if (status == ST_OK)
        status = config_parse_text(c, text.data, text.n, path, err);
    strbuf_fini(&text);
    return status;
}

static enum status read_key_file(struct config *c, struct error *err)
{
    struct strbuf text = { 0 };
    enum status status = file_load(&text, c->api_key_file, "api-key-file", err);
    size_t at = 0;

    for (int number = 1; status == ST_OK && at < text.n; number++) {
        const char *line = text.data + at;
        size_t length = strcspn(line, "\n");
        bool sound = memchr(line, '\0', text.n - at) == NULL;

        at += length + 1;
        line_trim(&line, &length);
        for (size_t i = 0; i < length; i++)
            sound = sound && line[i] > ' ' && line[i] <= '~';
        if (!sound)
            status = error_set(err, ST_INVALID,
                               "%s:%d: a key is made of printable characters "
                               "without spaces",
                               c->api_key_file, number);
        else if (length)
            config_list_add(&c->api_keys, line, length);
    }
    strbuf_fini(&text);
    return status;
}

/* ---- environment */

/* KV_CACHE_BYTES to kv-cache-bytes; false if it cannot be the name of an option. */
static bool env_key(char out[MAX_KEY_BYTES], const char *name, size_t n)
{
    if (n >= MAX_KEY_BYTES)
        return false;
    for (size_t i = 0; i < n; i++) {
        if (name[i] >= 'A' && name[i] <= 'Z')
            out[i] = (char)(name[i] - 'A' + 'a');
        else if (name[i] == '_')
            out[i] = '-';
        else
            return false;
    }
    out[n] = '\0';
    return true;
}

/* Calls for every ASYNCTLSD_ variable; ASYNCTLSD_CONFIG is the file's path. */
static enum status read_env(struct config *c, char **env, struct error *err)
{
    for (; *env; env++) {
        char key[MAX_KEY_BYTES], place[MAX_KEY_BYTES + 64];
        size_t n = strcspn(*env, "="), skip = sizeof env_prefix - 1;

        if (strncmp(*env, env_prefix, skip) != 0 || (*env)[n] != '=')
            continue;
        bool sound = env_key(key, *env + skip, n - skip);
        if (sound && strcmp(key, "config") == 0)
            continue;
        const struct option *o = sound ? config_find(key, strlen(key)) : NULL;
        if (!o)
            return error_set(err, ST_INVALID, "environment: no option belongs to %.*s",
                             (int)(n < 100 ? n : 100), *env);
        snprintf(place, sizeof place, "environment variable %.*s", (int)n, *env);
        TRY(option_set(o, c, *env + n + 1, place, err));
    }
    return ST_OK;
}

static const char *env_config_path(char **env)
{
    static const char name[] = "ASYNCTLSD_CONFIG=";

    for (; *env; env++)
        if (strncmp(*env, name, sizeof name - 1) == 0)
            return *env + sizeof name - 1;
    return NULL;
}

/* ---- command line */

/* What stands at argv[*i]: --key=value, --key value, or --flag.  *i moves past it. */
struct argument {
    const char *key; /* without the dashes */
    size_t key_bytes;
    const char *value; /* NULL: none was given */
};

static bool key_is(const struct argument *a, const char *key)
{
    return a->key_bytes == strlen(key) && memcmp(a->key, key, a->key_bytes) == 0;
}

static bool takes_no_value(const struct argument *a)
{
    return key_is(a, "help") || key_is(a, "version") || key_is(a, "check-config");
}

static enum status argument_read(struct argument *out, int *i, int argc, char **argv,
                                 struct error *err)
{
    const char *word = argv[(*i)++];

    if (strncmp(word, "--", 2) != 0 || word[2] == '\0')
        return error_set(err, ST_INVALID, "'%.80s' is not an option; options begin with --",
                         word);
    out->key = word + 2;
    out->key_bytes = strcspn(out->key, "=");
    out->value = out->key[out->key_bytes] == '=' ? out->key + out->key_bytes + 1 : NULL;
    if (takes_no_value(out))
        return out->value ? error_set(err, ST_INVALID, "--%.*s takes no value",
                                      (int)out->key_bytes, out->key)
                          : ST_OK;
    if (!out->value && *i < argc && strncmp(argv[*i], "--", 2) != 0)
        out->value = argv[(*i)++];
    return ST_OK;
}

static enum status flag_set(struct config *c, const struct argument *a, struct error *err)
{
    enum config_action action = key_is(a, "check-config") ? CONFIG_CHECK : CONFIG_CALIBRATE;

    if (c->action != CONFIG_SERVE && c->action != action)
        return error_set(err, ST_INVALID, "--check-config and --calibrate exclude each other");
    c->action = action;
    if (action == CONFIG_CALIBRATE) {
        mem_free(c->calibrate_text);
        c->calibrate_text = mem_strdup(a->value);
    }
    return ST_OK;
}

static enum status argument_set(struct config *c, const struct argument *a, struct error *err)
{
    const struct option *o = config_find(a->key, a->key_bytes);
    char place[MAX_KEY_BYTES + 16];

    if (key_is(a, "check-config"))
        return flag_set(c, a, err);
    if (!o && !key_is(a, "config") && !key_is(a, "calibrate"))
        return error_set(err, ST_INVALID, "there is no option --%.*s; --help lists them",
                         (int)(a->key_bytes < 80 ? a->key_bytes : 80), a->key);
    if (!a->value)
        return error_set(err, ST_INVALID, "--%.*s needs a value", (int)a->key_bytes, a->key);
    if (key_is(a, "calibrate"))
        return flag_set(c, a, err);
    if (!o)
        return ST_OK; /* --config: read before everything else */
    snprintf(place, sizeof place, "--%s", o->key);
    return option_set(o, c, a->value, place, err);
}

/* --help and --version anywhere, else the path of the last --config. */
static const char *scan_arguments(struct config *c, int argc, char **argv)
{
    const char *path = NULL;

    for (int i = 1; i < argc && c->action == CONFIG_SERVE;) {
        struct argument a;
        bool sound = argument_read(&a, &i, argc, argv, NULL) == ST_OK;

        if (!sound)
            continue; /* refused with its sentence later, unless help is asked for */
        if (key_is(&a, "config"))
            path = a.value;
        else if (key_is(&a, "help"))
            c->action = CONFIG_HELP;
        else if (key_is(&a, "version"))
            c->action = CONFIG_VERSION;
    }
    return path;
}

static enum status read_arguments(struct config *c, int argc, char **argv, struct error *err)
{
    for (int i = 1; i < argc;) {
        struct argument a;

        TRY(argument_read(&a, &i, argc, argv, err));
        TRY(argument_set(c, &a, err));
    }
    return ST_OK;
}

/* ---- the whole */

/* The model's folder names it: the last part of its path. */
static void name_after_folder(struct config *c)
{
    char *real = realpath(c->engine.model_dir, NULL);
    const char *path = real ? real : c->engine.model_dir;
    size_t end = strlen(path), start;

    while (end > 1 && path[end - 1] == '/')
        end--;
    for (start = end; start > 0 && path[start - 1] != '/'; start--)
        ;
    if (start == end)
        config_list_add(&c->model_names, "model", strlen("model"));
    else
        config_list_add(&c->model_names, path + start, end - start);
    free(real);
}

/* Limits of each key.  A request's choices enter the waiting room together, so more than a share
 * holds could never be let in. */
static enum status complete_shares(struct config *c, struct error *err)
{
    struct engine_config *e = &c->engine;
    uint64_t room = e->max_waiting;

    if (c->api_keys.n == 0 && (c->key_requests_per_minute || e->share_thousandths < 1000))
        return error_set(err, ST_INVALID, "%s needs an api-key",
                         c->key_requests_per_minute ? "key-requests-per-minute"
                                                    : "key-waiting-share");
    if (e->share_thousandths < 1000) {
        e->n_shares = (uint32_t)c->api_keys.n;
        room = room * e->share_thousandths / 1000;
    }
    if (c->limits.max_choices > room)
        c->limits.max_choices = room ? (uint32_t)room : 1;
    return ST_OK;
}

/* What can only be judged with everything read. */
static enum status complete(struct config *c, struct error *err)
{
    const struct engine_config *e = &c->engine;

    if (!e->model_dir)
        return error_set(err, ST_INVALID, "no model is given: use --model DIR");
    if (!c->host)
        return error_set(err, ST_INVALID, "host cannot be none");
    TRY(devices_validate(&c->backends, err));
    if (e->step_tokens < e->max_running + ENGINE_MIN_PREFILL_TOKENS)
        return error_set(err, ST_INVALID,
                         "step-tokens (%u) is less than max-running (%u) plus %d: every running "
                         "sequence takes a token of each step, and prompts need some too",
                         e->step_tokens, e->max_running, ENGINE_MIN_PREFILL_TOKENS);
    if (c->max_bodies_bytes < c->max_body_bytes)
        return error_set(err, ST_INVALID, "max-bodies-bytes is less than max-body-bytes");
    if (c->api_key_file)
        TRY(read_key_file(c, err));
    if (c->api_keys.n == 0 && c->api_key_file)
        return error_set(err, ST_INVALID, "%s has no key", c->api_key_file);
    if (c->api_keys.n == 0 && !c->insecure_no_key && !listen_is_loopback(c->host))
        return error_set(err, ST_INVALID,
                         "host %s is reachable from other machines: set api-key "
                         "or api-key-file, or say insecure-no-key yes",
                         c->host);
    if (c->model_names.n == 0)
        name_after_folder(c);
    return complete_shares(c, err);
}

enum status config_read(struct config *out, int argc, char **argv, char **env,
                        struct error *err)
{
    config_init(out);
    const char *path = scan_arguments(out, argc, argv);
    if (out->action != CONFIG_SERVE)
        return ST_OK;
    if (!path)
        path = env_config_path(env);
    if (path)
        TRY(read_config_file(out, path, err));
    TRY(read_env(out, env, err));
    TRY(read_arguments(out, argc, argv, err));
    return complete(out, err);
}

void config_print(struct strbuf *out, const struct config *c)
{
    for (size_t i = 0; i < config_n_options(); i++) {
        const struct option *o = config_option(i);
        if (o->group)
            strbuf_printf(out, "%s# %s\n", i ? "\n" : "", o->group);
        if (o->secret) {
            strbuf_printf(out, "# %s: %d set, not shown\n", o->key, c->api_keys.n);
            continue;
        }
        strbuf_printf(out, "%s ", o->key);
        option_print(o, c, out);
        strbuf_puts(out, "\n");
    }
}

/* Words of text from column `indent` on, in lines of HELP_COLUMNS. */
static void wrap(struct strbuf *out, const char *text, size_t indent)
{
    size_t column = 0;

    while (*text) {
        size_t n = strcspn(text, " ");
        if (column == 0 || column + 1 + n > HELP_COLUMNS) {
            strbuf_printf(out, "%s%*s", column ? "\n" : "", (int)indent, "");
            column = indent;
        } else {
            strbuf_puts(out, " ");
            column++;
        }
        strbuf_add(out, text, n);
        column += n;
        text += n + (text[n] == ' ');
    }
    strbuf_puts(out, "\n");
}

static const char *value_word(const struct option *o)
{
    switch (o->type) {
    case OPTION_BYTES:
        return "SIZE";
    case OPTION_MS:
        return "TIME";
    case OPTION_SHARE:
        return "SHARE";
    case OPTION_BOOL:
        return "yes|no";
    case OPTION_CHOICE:
    case OPTION_WORD:
        return strlen(o->choices) <= MAX_CHOICES_COLUMNS ? o->choices : "WORD";
    case OPTION_TEXT:
    case OPTION_LIST:
        return "VALUE";
    default:
        return "N";
    }
}

void config_help(struct strbuf *out)
{
    strbuf_puts(out,
                "usage: asynctlsd --model DIR [--key value ...]\n\n"
                "Serves a language model over the OpenAI HTTP API.  Every option may stand in\n"
                "a file as `key value`, in the environment as ASYNCTLSD_KEY, and here; the\n"
                "later wins.\n\n"
                "  --config FILE         read options from FILE\n"
                "  --check-config        print the effective options and end\n"
                "  --calibrate TEXTFILE  choose the channels of `token-index channels` from a\n"
                "                        text, store them beside the model and end\n"
                "  --version, --help\n");
    for (size_t i = 0; i < config_n_options(); i++) {
        const struct option *o = config_option(i);
        if (o->group)
            strbuf_printf(out, "\n%s\n", o->group);
        strbuf_printf(out, "  --%s %s  [%s]\n", o->key, value_word(o), o->initial);
        wrap(out, o->help, 6);
    }
}
