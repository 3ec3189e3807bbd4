#ifndef SERVER_SERVICE_H
#define SERVER_SERVICE_H

#include "engine/base/progress.h"
#include "server/api.h"
#include "server/config.h"
#include "server/fleet.h"
#include "server/http.h"
#include "server/notifier.h"

#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

struct metrics;
struct stream;

/* The life of the daemon on the loop thread.
 *
 *     LOADING --> READY --> DRAINING --> LEAVING --> the loop ends
 *        |          |                       ^
 *        |          +----> FAILED ----------+
 *        +--> (cannot load) ----------------+
 *
 *   LOADING   the port is open; a thread of the pool loads the model into every engine
 *   DRAINING  after a signal: nothing is accepted, what was accepted finishes,
 *             at the latest when drain-timeout has passed
 *   FAILED    a device failed: every request is answered with an error, those of other engines
 *             if they are not finished very soon
 *   LEAVING   what is left has been cancelled; answers get a moment to be sent */

enum service_state {
    SERVICE_LOADING, SERVICE_READY, SERVICE_DRAINING, SERVICE_FAILED, SERVICE_LEAVING
};

/* What the loop remembers of an engine between two looks at it. */
struct engine_watch {
    uint64_t seen_steps, progress_ns;    /* when it was last seen to move or idle */
    bool shrug;                          /* a stall has been logged */
    uint64_t summary_tokens;
    uint64_t watched_steps, watched_turns;   /* when the watchdog was fed last */
};

struct service {
    const struct config *cfg;
    uv_loop_t loop;
    uv_async_t wake;                 /* an engine has mail for us */
    uv_timer_t tick;
    uv_signal_t sigterm, sigint;
    uv_work_t load;
    bool loading;
    struct fleet *loaded;            /* the pool thread's while loading, like */
    enum chat_format loaded_chat;
    struct error no_chat;            /* why, if that is none */
    struct error load_error;
    struct progress load_progress;
    enum service_state state;
    uint64_t deadline_ns;            /* of DRAINING, FAILED and LEAVING */
    int exit_code;

    struct http_server *http;
    struct metrics *metrics;
    struct key_limits *key_limits;
    struct mailbox *mailbox;
    struct fleet *fleet;             /* NULL while LOADING */
    struct api_context api;          /* constant from READY on; read by pool threads */
    int64_t created;                 /* Unix seconds */
    uint64_t next_id;

    struct stream *streams;          /* all completions that are not freed */
    int n_streams, n_parsing;

    struct engine_watch watches[FLEET_MAX_ENGINES];
    uint64_t summary_ns;
    struct notifier notifier;        /* to a service manager that listens */
    uint64_t watched_ns;             /* when the watchdog was last thought of */
};

/* Runs until the end; the process's exit code.  env as main has it: where a service manager
 * listens. */
int service_run(const struct config *cfg, char **env);

/* Work is waiting for an engine and it has ended no step for stall-timeout: this one, or any. */
bool service_engine_stalled(struct service *sv, uint32_t engine);
bool service_stalled(struct service *sv);
/* Some engine's device has failed. */
bool service_device_failed(const struct service *sv);

/* Something that DRAINING or LEAVING waits for has ended. */
void service_note_end(struct service *sv);

/* A device failed; may be called again. */
void service_fail(struct service *sv, const char *why);

#endif
