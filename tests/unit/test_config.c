#include "engine/base/strbuf.h"
#include "engine/select/select.h"
#include "server/config.h"
#include "server/config_table.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct config c;
static struct error err;
static char *no_env[] = { NULL };

static void setup(void)
{
    config_init(&c);
    err = (struct error){ 0 };
}

static void teardown(void)
{
    config_fini(&c);
}

static enum status parse(const char *text)
{
    return config_parse_text(&c, text, strlen(text), "my.conf", &err);
}

/* Words of a command line, split at spaces; a value cannot have one. */
static enum status read_line(const char *line, char **env)
{
    static char words[1000];
    static char *argv[40];
    int argc = 0;

    snprintf(words, sizeof words, "asynctlsd %s", line);
    for (char *w = words; *w;) {
        argv[argc++] = w;
        w += strcspn(w, " ");
        if (*w)
            *w++ = '\0';
    }
    argv[argc] = NULL;
    config_fini(&c);
    return config_read(&c, argc, argv, env, &err);
}

static void write_file(char path[64], const char *text)
{
    snprintf(path, 64, "/tmp/asynctlsd-test-XXXXXX");
    int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
}

/* ---- the table */

START_TEST(options_are_sound)
{
    for (size_t i = 0; i < config_n_options(); i++) {
        const struct option *o = config_option(i);
        struct strbuf text = { 0 };

        ck_assert_ptr_eq(config_find(o->key, strlen(o->key)), o);
        ck_assert_msg(strspn(o->key, "abcdefghijklmnopqrstuvwxyz0123456789-") == strlen(o->key),
                      "%s", o->key);
        ck_assert_msg(o->help && o->help[strlen(o->help) - 1] == '.', "%s: help is a sentence",
                      o->key);
        ck_assert_msg(o->min <= o->max, "%s", o->key);
        ck_assert_msg((o->choices != NULL) ==
                      (o->type == OPTION_CHOICE || o->type == OPTION_WORD), "%s", o->key);
        /* A default prints as it is written, so all ways to see it agree. */
        option_print(o, &c, &text);
        if (!o->secret)
            ck_assert_str_eq(text.data, o->initial);
        strbuf_fini(&text);
    }
    ck_assert_ptr_nonnull(config_option(0)->group);
}
END_TEST

START_TEST(attention_defaults_are_those_of_select)
{
    struct select_config want = select_default();
    const struct select_config *got = &c.engine.select;

    ck_assert_int_eq(got->filter, want.filter);
    ck_assert_int_eq(got->index, want.index);
    ck_assert_int_eq(got->selection, want.selection);
    ck_assert_int_eq(got->keep_blocks, want.keep_blocks);
    ck_assert_int_eq(got->keep_tokens, want.keep_tokens);
    ck_assert_int_eq(got->sink_tokens, want.sink_tokens);
    ck_assert_int_eq(got->recent_tokens, want.recent_tokens);
    ck_assert_int_eq(got->crossover_tokens, want.crossover_tokens);
    ck_assert_ptr_eq(got->layers, want.layers);
}
END_TEST

/* The file that is shipped names every option once, with its default and its help. */
START_TEST(the_shipped_file_documents_every_option)
{
    struct strbuf text = { 0 }, flat = { 0 };
    FILE *f = fopen("configs/asynctlsd.conf", "r");
    char line[300];

    ck_assert_msg(f != NULL, "run the tests in the root of the repository");
    strbuf_puts(&text, "\n");
    while (fgets(line, sizeof line, f)) {
        strbuf_puts(&text, line);
        /* Comments as running text, to find help sentences in. */
        line[strcspn(line, "\n")] = '\0';
        if (line[0] == '#')
            strbuf_puts(&flat, line + 1);
    }
    fclose(f);
    ck_assert_msg(config_parse_text(&c, text.data, text.n, "configs/asynctlsd.conf", &err) ==
                  ST_OK, "%s", err.text);
    for (size_t i = 0; i < config_n_options(); i++) {
        const struct option *o = config_option(i);
        snprintf(line, sizeof line, "\n%s %s\n", o->key, o->initial);
        ck_assert_msg(strstr(text.data, line) != NULL, "no line '%s %s'", o->key, o->initial);
        ck_assert_msg(strstr(flat.data, o->help) != NULL, "%s is not explained as in --help",
                      o->key);
    }
    strbuf_fini(&text);
    strbuf_fini(&flat);
}
END_TEST

START_TEST(help_lists_every_option)
{
    struct strbuf help = { 0 };

    config_help(&help);
    for (size_t i = 0; i < config_n_options(); i++) {
        char want[100];
        snprintf(want, sizeof want, "\n  --%s ", config_option(i)->key);
        ck_assert_ptr_nonnull(strstr(help.data, want));
    }
    for (const char *line = help.data; *line;) {
        size_t n = strcspn(line, "\n");
        ck_assert_uint_le(n, 80);
        line += n + (line[n] == '\n');
    }
    strbuf_fini(&help);
}
END_TEST

/* ---- values */

START_TEST(values_of_every_type_arrive)
{
    ck_assert_msg(parse("# a comment\n"
                        "\n"
                        "  port\t 9001   # behind a blank\r\n"
                        "kv-cache-bytes 16gb\n"
                        "max-body-bytes 1536kb\n"
                        "max-bodies-bytes 33554432\n"
                        "max-json-values 5000\n"
                        "ping-interval 500ms\n"
                        "drain-timeout 2m\n"
                        "stall-timeout 0\n"
                        "prefix-cache no\n"
                        "metrics-public yes\n"
                        "filter bounds\n"
                        "token-index channels\n"
                        "cpu-isa avx2\n"
                        "log-level debug\n"
                        "keep-blocks 128\n"
                        "layer-exceptions 0-1:dense;6:blocks=128,tokens=2048\n"
                        "served-model-name a , b,c\n"
                        "api-key one#two,three\n"
                        "model /models/with space") == ST_OK, "%s", err.text);
    ck_assert_uint_eq(c.port, 9001);
    ck_assert_uint_eq(c.engine.kv_bytes, 16ull << 30);
    ck_assert_uint_eq(c.max_body_bytes, 1536 << 10);
    ck_assert_uint_eq(c.max_bodies_bytes, 32 << 20);
    ck_assert_uint_eq(c.limits.max_json_values, 5000);
    ck_assert_uint_eq(c.ping_interval_ms, 500);
    ck_assert_uint_eq(c.drain_timeout_ms, 120000);
    ck_assert_uint_eq(c.stall_timeout_ms, 0);
    ck_assert(!c.engine.prefix_cache && c.metrics_public);
    ck_assert_int_eq(c.engine.select.filter, FILTER_BOUNDS);
    ck_assert_int_eq(c.engine.select.index, INDEX_CHANNELS);
    ck_assert_str_eq(c.engine.isa, "avx2");
    ck_assert_int_eq(c.log_level, LOG_LEVEL_DEBUG);
    ck_assert_int_eq(c.engine.select.keep_blocks, 128);
    ck_assert_str_eq(c.engine.select.layers, "0-1:dense;6:blocks=128,tokens=2048");
    ck_assert_int_eq(c.model_names.n, 3);
    ck_assert_str_eq(c.model_names.items[0], "a");
    ck_assert_str_eq(c.model_names.items[1], "b");
    ck_assert_str_eq(c.model_names.items[2], "c");
    ck_assert_int_eq(c.api_keys.n, 2);
    ck_assert_str_eq(c.api_keys.items[0], "one#two");
    ck_assert_str_eq(c.engine.model_dir, "/models/with space");
}
END_TEST

START_TEST(none_is_empty)
{
    ck_assert_int_eq(parse("api-key one\nmodel /m\nallowed-origins *"), ST_OK);
    ck_assert_int_eq(parse("api-key none\nmodel none\nallowed-origins none"), ST_OK);
    ck_assert_int_eq(c.api_keys.n, 0);
    ck_assert_int_eq(c.allowed_origins.n, 0);
    ck_assert_ptr_null(c.engine.model_dir);
}
END_TEST

static const struct {
    const char *text, *sentence;
} bad_files[] = {
    { "prot 5", "my.conf:1: there is no option 'prot'" },
    { "# x\n\nPort 5", "my.conf:3: there is no option 'Port'" },
    { "port=5", "my.conf:1: there is no option 'port=5'" },
    { "port 1\nhost a\nport 2", "my.conf:3: port is set a second time" },
    { "port", "my.conf:1: port has no value" },
    { "port # 5", "my.conf:1: port has no value" },
    { "port x", "my.conf:1: port is 'x', which is not a whole number" },
    { "port -1", "my.conf:1: port is '-1', which is not a whole number" },
    { "port 1.5", "my.conf:1: port is '1.5', which is not a whole number" },
    { "port 1 2", "my.conf:1: port is '1 2', which is not a whole number" },
    { "port 65536", "my.conf:1: port is '65536', which is not between 0 and 65535" },
    { "port 99999999999999999999999",
      "my.conf:1: port is '99999999999999999999999', which is not a whole number" },
    { "max-running 0", "my.conf:1: max-running is '0', which is not between 1 and 4096" },
    { "kv-cache-bytes 5g",
      "my.conf:1: kv-cache-bytes is '5g', which is not a size such as 16gb, 512mb or 4096" },
    { "kv-cache-bytes 5GB",
      "my.conf:1: kv-cache-bytes is '5GB', which is not a size such as 16gb, 512mb or 4096" },
    { "kv-cache-bytes 99999999999tb", "my.conf:1: kv-cache-bytes is '99999999999tb', which is "
      "not a size such as 16gb, 512mb or 4096" },
    { "kv-cache-bytes 65tb",
      "my.conf:1: kv-cache-bytes is '65tb', which is not between 0 and 64tb" },
    { "max-body-bytes 1023",
      "my.conf:1: max-body-bytes is '1023', which is not between 1kb and 1gb" },
    { "gpu-memory-fraction .9",
      "my.conf:1: gpu-memory-fraction is '.9', which is not a share such as 0.9" },
    { "gpu-memory-fraction 0.9x",
      "my.conf:1: gpu-memory-fraction is '0.9x', which is not a share such as 0.9" },
    { "gpu-memory-fraction 0.9001",
      "my.conf:1: gpu-memory-fraction is '0.9001', which is not a share such as 0.9" },
    { "gpu-memory-fraction 1.001",
      "my.conf:1: gpu-memory-fraction is '1.001', which is not between 0.05 and 1.0" },
    { "gpu-memory-fraction 0.04",
      "my.conf:1: gpu-memory-fraction is '0.04', which is not between 0.05 and 1.0" },
    { "drain-timeout 5",
      "my.conf:1: drain-timeout is '5', which is not a time such as 30s, 500ms or 5m" },
    { "ping-interval 0", "my.conf:1: ping-interval is '0', which is not between 100ms and 3600s" },
    { "prefix-cache true", "my.conf:1: prefix-cache is 'true', which is neither yes nor no" },
    { "filter best", "my.conf:1: filter is 'best', which is not one of "
      "bounds|coarse|means" },
    { "filter bounds|coarse",
      "my.conf:1: filter is 'bounds|coarse', which is not one of "
      "bounds|coarse|means" },
    { "cpu-isa sse", "my.conf:1: cpu-isa is 'sse', which is not one of "
      "auto|scalar|avx2|avx512" },
    { "served-model-name a,,b", "my.conf:1: served-model-name has an entry that is empty" },
    { "api-key a,b c", "my.conf:1: api-key has an entry that is not made of printable "
      "characters" },
    { "host a\x01", "my.conf:1: the value of host has a control character" },
    { "host \xFF", "my.conf:1: the value of host is not valid UTF-8" },
};

START_TEST(bad_files_are_refused_by_line)
{
    ck_assert_int_eq(parse(bad_files[_i].text), ST_INVALID);
    ck_assert_str_eq(err.text, bad_files[_i].sentence);
}
END_TEST

START_TEST(a_nul_byte_in_a_file_is_refused)
{
    static const char text[] = "port 1\nhost a\0b\n";

    ck_assert_int_eq(config_parse_text(&c, text, sizeof text - 1, "my.conf", &err), ST_INVALID);
    ck_assert_str_eq(err.text, "my.conf:2: the line has a NUL byte");
}
END_TEST

/* A value that is refused leaves what was there. */
START_TEST(refused_values_change_nothing)
{
    ck_assert_int_eq(parse("api-key a,b\ncpu-isa avx2"), ST_OK);
    ck_assert_int_eq(parse("api-key c,,d"), ST_INVALID);
    ck_assert_int_eq(parse("cpu-isa x"), ST_INVALID);
    ck_assert_int_eq(parse("port x"), ST_INVALID);
    ck_assert_int_eq(c.api_keys.n, 2);
    ck_assert_str_eq(c.engine.isa, "avx2");
    ck_assert_uint_eq(c.port, 8000);
}
END_TEST

/* ---- sources */

START_TEST(later_sources_win)
{
    char path[64], line[200];
    char *env[] = { "HOME=/", "ASYNCTLSD=/bin/asynctlsd", "ASYNCTLSD_MAX_RUNNING=3",
                    "ASYNCTLSD_MAX_WAITING=200", NULL };

    write_file(path, "max-running 2\nmax-waiting 100\nport 81\nmodel /m\n");
    snprintf(line, sizeof line, "--max-waiting=300 --config %s", path);
    ck_assert_msg(read_line(line, env) == ST_OK, "%s", err.text);
    ck_assert_uint_eq(c.port, 81);
    ck_assert_uint_eq(c.engine.max_running, 3);
    ck_assert_uint_eq(c.engine.max_waiting, 300);
    ck_assert_int_eq(c.action, CONFIG_SERVE);

    char variable[100];
    char *by_env[] = { variable, NULL };
    snprintf(variable, sizeof variable, "ASYNCTLSD_CONFIG=%s", path);
    ck_assert_msg(read_line("--port 82 --port 83", by_env) == ST_OK, "%s", err.text);
    ck_assert_uint_eq(c.port, 83);
    ck_assert_uint_eq(c.engine.max_running, 2);
    unlink(path);
    ck_assert_int_eq(read_line("", by_env), ST_IO);
    ck_assert_ptr_nonnull(strstr(err.text, "cannot open"));
}
END_TEST

static const struct {
    const char *line, *env, *sentence;
} bad_lines[] = {
    { "", NULL, "no model is given: use --model DIR" },
    { "--model /m --frobnicate 5", NULL,
      "there is no option --frobnicate; --help lists them" },
    { "--model", NULL, "--model needs a value" },
    { "--model --port 5", NULL, "--model needs a value" },
    { "--config", NULL, "--config needs a value" },
    { "--calibrate", NULL, "--calibrate needs a value" },
    { "--model=", NULL, "--model: model has no value" },
    { "--model /m --port x", NULL, "--port: port is 'x', which is not a whole number" },
    { "/m", NULL, "'/m' is not an option; options begin with --" },
    { "-p 5", NULL, "'-p' is not an option; options begin with --" },
    { "--", NULL, "'--' is not an option; options begin with --" },
    { "--model /m --check-config=yes", NULL, "--check-config takes no value" },
    { "--model /m --check-config --calibrate t", NULL,
      "--check-config and --calibrate exclude each other" },
    { "--model /m", "ASYNCTLSD_PROT=5", "environment: no option belongs to ASYNCTLSD_PROT" },
    { "--model /m", "ASYNCTLSD_port=5", "environment: no option belongs to ASYNCTLSD_port" },
    { "--model /m", "ASYNCTLSD_=5", "environment: no option belongs to ASYNCTLSD_" },
    { "--model /m", "ASYNCTLSD_PORT=tcp://10.0.0.1:8000",
      "environment variable ASYNCTLSD_PORT: port is 'tcp://10.0.0.1:8000', which is not a "
      "whole number" },
    { "--model /m", "ASYNCTLSD_API_KEY=",
      "environment variable ASYNCTLSD_API_KEY: api-key has no value" },
    { "--model /m --step-tokens 10", NULL,
      "step-tokens (10) is less than max-running (64) plus 64: every running sequence takes a "
      "token of each step, and prompts need some too" },
    { "--model /m --max-bodies-bytes 1mb", NULL,
      "max-bodies-bytes is less than max-body-bytes" },
    { "--model /m --host none", NULL, "host cannot be none" },
    { "--model /m --backend none", NULL, "backend cannot be none" },
    { "--model /m --host 0.0.0.0", NULL,
      "host 0.0.0.0 is reachable from other machines: set api-key or api-key-file, or say "
      "insecure-no-key yes" },
    { "--model /m --host ::", NULL,
      "host :: is reachable from other machines: set api-key or api-key-file, or say "
      "insecure-no-key yes" },
    { "--model /m --api-key-file /nonexistent", NULL,
      "api-key-file: cannot open /nonexistent: No such file or directory" },
    { "--model /m --config /", NULL, "--config: cannot read /: Is a directory" },
};

START_TEST(bad_lines_are_refused)
{
    char *env[] = { NULL, NULL };
    char variable[100];

    if (bad_lines[_i].env) {
        snprintf(variable, sizeof variable, "%s", bad_lines[_i].env);
        env[0] = variable;
    }
    ck_assert_msg(read_line(bad_lines[_i].line, env) != ST_OK, "%s", bad_lines[_i].line);
    ck_assert_str_eq(err.text, bad_lines[_i].sentence);
}
END_TEST

START_TEST(help_and_version_read_nothing_else)
{
    char *env[] = { "ASYNCTLSD_NONSENSE=1", NULL };

    ck_assert_int_eq(read_line("--port x --help", env), ST_OK);
    ck_assert_int_eq(c.action, CONFIG_HELP);
    ck_assert_int_eq(read_line("nonsense --version --config /nonexistent", env), ST_OK);
    ck_assert_int_eq(c.action, CONFIG_VERSION);
    ck_assert_str_ne(config_version(), "");
}
END_TEST

START_TEST(commands_are_read)
{
    ck_assert_int_eq(read_line("--check-config --model /m", no_env), ST_OK);
    ck_assert_int_eq(c.action, CONFIG_CHECK);
    ck_assert_int_eq(read_line("--calibrate a.txt --model /m --calibrate=b.txt", no_env), ST_OK);
    ck_assert_int_eq(c.action, CONFIG_CALIBRATE);
    ck_assert_str_eq(c.calibrate_text, "b.txt");
}
END_TEST

START_TEST(a_key_opens_the_host)
{
    ck_assert_int_eq(read_line("--model /m --host 0.0.0.0 --api-key k", no_env), ST_OK);
    ck_assert_int_eq(read_line("--model /m --host 0.0.0.0 --insecure-no-key yes", no_env), ST_OK);
    ck_assert_int_eq(read_line("--model /m --host 127.0.0.2", no_env), ST_OK);
    ck_assert_int_eq(read_line("--model /m --host ::1", no_env), ST_OK);
}
END_TEST

START_TEST(key_files_add_keys)
{
    char path[64], line[200];

    write_file(path, "# a comment\nsecret-1\n\n  secret-2  \r\n");
    snprintf(line, sizeof line, "--model /m --host 0.0.0.0 --api-key k --api-key-file %s", path);
    ck_assert_msg(read_line(line, no_env) == ST_OK, "%s", err.text);
    ck_assert_int_eq(c.api_keys.n, 3);
    ck_assert_str_eq(c.api_keys.items[0], "k");
    ck_assert_str_eq(c.api_keys.items[1], "secret-1");
    ck_assert_str_eq(c.api_keys.items[2], "secret-2");
    unlink(path);

    write_file(path, "good\ntwo words\n");
    snprintf(line, sizeof line, "--model /m --api-key-file %s", path);
    ck_assert_int_eq(read_line(line, no_env), ST_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, ":2: a key is made of printable characters"));
    ck_assert_ptr_null(strstr(err.text, "two words"));
    unlink(path);

    write_file(path, "# nothing\n");
    snprintf(line, sizeof line, "--model /m --api-key-file %s", path);
    ck_assert_int_eq(read_line(line, no_env), ST_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, " has no key"));
    unlink(path);
}
END_TEST

START_TEST(the_folder_names_the_model)
{
    static const struct {
        const char *line, *name;
    } rows[] = {
        { "--model /no/such/Qwen3-0.6B", "Qwen3-0.6B" },
        { "--model /no/such/Qwen3-0.6B//", "Qwen3-0.6B" },
        { "--model no-such", "no-such" },
        { "--model configs/../configs/.", "configs" },
        { "--model /", "model" },
        { "--model /m --served-model-name x,y", "x" },
    };

    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        ck_assert_int_eq(read_line(rows[i].line, no_env), ST_OK);
        ck_assert_str_eq(c.model_names.items[0], rows[i].name);
    }
}
END_TEST

START_TEST(choices_fit_in_the_waiting_room)
{
    ck_assert_int_eq(read_line("--model /m --max-waiting 5", no_env), ST_OK);
    ck_assert_uint_eq(c.limits.max_choices, 5);
    ck_assert_int_eq(read_line("--model /m --max-waiting 500", no_env), ST_OK);
    ck_assert_uint_eq(c.limits.max_choices, 128);
    ck_assert_int_eq(read_line("--model /m --max-waiting 50 --api-key a,b --key-waiting-share 0.1",
                               no_env), ST_OK);
    ck_assert_uint_eq(c.limits.max_choices, 5);
    ck_assert_uint_eq(c.engine.n_shares, 2);
    ck_assert_int_eq(read_line("--model /m --max-waiting 5 --api-key a --key-waiting-share 0.1",
                               no_env), ST_OK);
    ck_assert_uint_eq(c.limits.max_choices, 1);
    ck_assert_int_eq(read_line("--model /m --api-key a", no_env), ST_OK);
    ck_assert_uint_eq(c.engine.n_shares, 0);
}
END_TEST

START_TEST(limits_of_keys_need_keys)
{
    ck_assert_int_eq(read_line("--model /m --key-requests-per-minute 5", no_env), ST_INVALID);
    ck_assert_str_eq(err.text, "key-requests-per-minute needs an api-key");
    ck_assert_int_eq(read_line("--model /m --key-waiting-share 0.5", no_env), ST_INVALID);
    ck_assert_str_eq(err.text, "key-waiting-share needs an api-key");
}
END_TEST

/* What is printed reads back to the same, without the keys. */
START_TEST(print_and_parse_are_inverse)
{
    struct strbuf first = { 0 }, second = { 0 };

    ck_assert_int_eq(read_line("--model /m --api-key hush,hush2 --kv-cache-bytes 1536mb "
                               "--idle-timeout 1500ms --filter bounds --allowed-origins a,b "
                               "--layer-exceptions 0:dense --log-level warn", no_env), ST_OK);
    config_print(&first, &c);
    ck_assert_ptr_null(strstr(first.data, "hush"));
    ck_assert_ptr_nonnull(strstr(first.data, "# api-key: 2 set, not shown\n"));
    ck_assert_ptr_nonnull(strstr(first.data, "\nkv-cache-bytes 1536mb\n"));
    ck_assert_ptr_nonnull(strstr(first.data, "\nidle-timeout 1500ms\n"));
    config_fini(&c);
    config_init(&c);
    ck_assert_msg(parse(first.data) == ST_OK, "%s", err.text);
    ck_assert_int_eq(parse("api-key x,y"), ST_OK);
    config_print(&second, &c);
    ck_assert_str_eq(first.data, second.data);
    strbuf_fini(&first);
    strbuf_fini(&second);
}
END_TEST

/* No sentence repeats a key, however wrong it is. */
START_TEST(secrets_stay_out_of_sentences)
{
    ck_assert_int_eq(parse("api-key hush hush"), ST_INVALID);
    ck_assert_ptr_null(strstr(err.text, "hush"));
    ck_assert_int_eq(parse("api-key hush\xFF"), ST_INVALID);
    ck_assert_ptr_null(strstr(err.text, "hush"));
}
END_TEST

TCase *config_case(void)
{
    TCase *tc = tcase_create("config");

    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, options_are_sound);
    tcase_add_test(tc, attention_defaults_are_those_of_select);
    tcase_add_test(tc, the_shipped_file_documents_every_option);
    tcase_add_test(tc, help_lists_every_option);
    tcase_add_test(tc, values_of_every_type_arrive);
    tcase_add_test(tc, none_is_empty);
    tcase_add_loop_test(tc, bad_files_are_refused_by_line, 0,
                        (int)(sizeof bad_files / sizeof bad_files[0]));
    tcase_add_test(tc, a_nul_byte_in_a_file_is_refused);
    tcase_add_test(tc, refused_values_change_nothing);
    tcase_add_test(tc, later_sources_win);
    tcase_add_loop_test(tc, bad_lines_are_refused, 0,
                        (int)(sizeof bad_lines / sizeof bad_lines[0]));
    tcase_add_test(tc, help_and_version_read_nothing_else);
    tcase_add_test(tc, commands_are_read);
    tcase_add_test(tc, a_key_opens_the_host);
    tcase_add_test(tc, key_files_add_keys);
    tcase_add_test(tc, the_folder_names_the_model);
    tcase_add_test(tc, choices_fit_in_the_waiting_room);
    tcase_add_test(tc, limits_of_keys_need_keys);
    tcase_add_test(tc, print_and_parse_are_inverse);
    tcase_add_test(tc, secrets_stay_out_of_sentences);
    return tc;
}
