#ifndef SERVER_CONFIG_H
#define SERVER_CONFIG_H

#include "engine/base/log.h"
#include "engine/base/status.h"
#include "engine/engine.h"
#include "server/api.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct strbuf;

/* The options of the daemon.
 *
 * One table in config.c holds every option's name, type, bounds, default and
 * help sentence.  Four sources set them, a later one overriding an earlier:
 *
 *     default < file (`key value`) < environment (ASYNCTLSD_KEY) < command line (--key value)
 *
 * What no option knows, and every value that does not fit, is refused with a
 * sentence that names the place.  Values are checked one by one as they are
 * read and against each other at the end.  Used at start, by the main thread;
 * read-only afterwards. */

enum config_action {
    CONFIG_SERVE,
    CONFIG_CHECK,    /* --check-config: print and end */
    CONFIG_HELP,     /* --help */
    CONFIG_VERSION,  /* --version */
    CONFIG_CALIBRATE /* --calibrate TEXTFILE: write channels beside the model */
};

struct config_list {
    char **items;
    int n;
};

struct config {
    enum config_action action;
    char *calibrate_text; /* path given to --calibrate */

    /* Ready for fleet_create, which sets the device of each.  Its strings belong to this struct
     * too. */
    struct engine_config engine;
    struct config_list backends;    /* devices.h */
    struct config_list model_names; /* served-model-name; never empty once complete */

    enum chat_format chat_format;

    char *host;
    uint32_t port;               /* 0: any free one */
    struct config_list api_keys; /* api-key and the lines of api-key-file */
    char *api_key_file;
    uint32_t key_requests_per_minute;   /* of each key; 0: any number */
    bool cache_per_key;
    bool insecure_no_key;               /* allowed to listen beyond loopback without a key */
    bool metrics_public;                /* /metrics without a key */
    struct config_list allowed_origins; /* of pages in browsers; another gets 403; "*" all */

    uint64_t max_body_bytes, max_bodies_bytes;
    uint32_t max_connections;
    uint64_t idle_timeout_ms, body_timeout_ms; /* at least one second */
    uint64_t ping_interval_ms;                 /* silence before a stream gets a comment */
    uint64_t drain_timeout_ms;                 /* SIGTERM: then what is left is cancelled */
    uint64_t stall_timeout_ms; /* work but no step so long: /health is 503; 0 never */

    struct api_limits limits; /* all but max_model_len: engine_max_model_len() */
    enum log_level log_level;
    enum log_format log_format;
};

/* argv and environ as main has them.  HELP and VERSION win over everything
 * else and read nothing else.  *out is to be finished with config_fini()
 * whatever the result is. */
enum status config_read(struct config *out, int argc, char **argv, char **env,
                        struct error *err) MUST_USE;
void config_fini(struct config *c); /* a zeroed one is fine */

/* The pieces of config_read, for tests: defaults; then the lines of a file,
 * name going into sentences. */
void config_init(struct config *out);
enum status config_parse_text(struct config *c, const char *text, size_t n, const char *name,
                              struct error *err) MUST_USE;

/* The effective configuration as a file that config_parse_text would read;
 * keys are masked. */
void config_print(struct strbuf *out, const struct config *c);
void config_help(struct strbuf *out);
const char *config_version(void); /* "0.1.0" */

#endif
