#ifndef ENGINE_H
#define ENGINE_H

#include "engine/base/mailbox.h"
#include "engine/base/status.h"
#include "engine/kv/hot_sets.h"
#include "engine/model/model_config.h"
#include "engine/select/select.h"

#include <stdbool.h>
#include <stdint.h>

/* What the server may know about inference.
 *
 * An engine is one device, one model, one thread.  The server hands it
 * requests and gets messages back; it never sees a tensor, a block or a
 * stream.  A process may have several; they know nothing of each other.
 *
 * A request belongs to the loop thread, then from engine_submit() to the
 * engine, and comes home in MSG_DONE.  The only field both sides may write meanwhile is the
 * cancel flag, through engine_cancel(). */

struct engine;
struct progress;            /* engine/base/progress.h */
struct request;             /* engine/run/request.h */
struct tokenizer;           /* engine/model/tokenizer.h */

/* What a step must have room for beside one token of every running sequence. */
enum { ENGINE_MIN_PREFILL_TOKENS = 64 };

/* Which sequences leave the device for the host tier: those that blocks are short for, or, to
 * measure and to test, all that can, which then read nothing of theirs on the device either. */
enum offload_policy { OFFLOAD_AUTO, OFFLOAD_ALWAYS };

struct engine_config {
    const char *model_dir;  /* borrowed for the duration of engine_create(), as all strings */
    const char *backend;    /* of backend_open() */
    uint32_t number;        /* of the engine in its process, from 0; its thread has it in its name,
                               and so have its lines of the log */
    const char *isa;        /* backend.h; NULL auto */
    int threads;            /* CPU back end, all engines that share it together; 0: one a core */
    uint32_t sharers;       /* engines on the CPU back end, this one included; 0 is 1 */
    uint32_t max_model_len; /* 0: the most that the model and the pool allow */
    uint32_t max_running;   /* sequences in a step */
    uint32_t max_waiting;   /* requests in the waiting room */
    uint64_t max_waiting_tokens; /* their prompt tokens in all; one request always fits */
    uint32_t n_shares;      /* callers that may each have a share of both and no more; request.h */
    uint32_t share_thousandths; /* how much of both; one request always fits */
    uint32_t step_tokens;   /* token budget of a step; at least max_running + that */
    uint64_t kv_bytes;      /* KV pool with index; 0: on a GPU what the next line leaves, on
                               the CPU its part of a quarter of the memory */
    uint32_t gpu_memory_thousandths; /* of the device's memory, for everything */
    uint64_t host_kv_bytes; /* host tier; 0: none */
    uint32_t offload_sequences; /* that can be without their K and V on the device at a time; 0: as
                               many of the longest contexts as the host tier holds, and half of
                               the pool's memory their hot rows and index */
    uint32_t hot_rows;      /* of such a one, a layer and KV head; 0: 4 to 16 times the tokens kept,
                               by what that leaves to the pool */
    enum offload_policy offload;
    bool prefix_cache;
    const char *selection_dump; /* file for what sparse steps select, or NULL; with the next two see
                                   engine/run/selection_dump.h */
    uint64_t selection_dump_bytes;
    uint32_t selection_dump_nth_layer;
    struct progress *progress;  /* of the weights' way to the device, or NULL; outlives the call,
                                   and adds up those of several */
    bool check_invariants;  /* scheduler_check and kv_pool_check after every step; what is free is
                               NaN (kv_pool_poison) */
    bool (*before_copy)(void *arg, uint64_t number); /* tests: copy_engine.h; or NULL */
    void *before_copy_arg;
    struct select_config select;
};

/* Loads the model, carves all memory and starts the thread; slow, and the only
 * call that can fail for lack of memory.  to_loop receives the messages. */
enum status engine_create(struct engine **out, const struct engine_config *cfg,
                          struct mailbox *to_loop, struct error *err) MUST_USE;

/* Stop accepting (ST_SHUTDOWN from then on), let what was accepted finish.
 * Any thread; returns at once.  engine_idle() tells when nothing is left. */
void engine_drain(struct engine *e);
bool engine_idle(const struct engine *e);

/* Have the engine's loop turn once, also where it has nothing to do: engine_stats.turns grows if
 * its thread lives.  Any thread; returns at once. */
void engine_poke(struct engine *e);

/* End what is left with FINISH_CANCELLED, send every request home and join the thread; again is
 * fine.  Call mailbox_drain() afterwards for the last messages: the tokenizer and the model's
 * numbers are there until engine_destroy(). */
void engine_stop(struct engine *e);
/* The same, and free.  NULL is fine. */
void engine_destroy(struct engine *e);

/* Hand over n requests, all of them or none.  Any thread; never blocks.  ST_BUSY when the waiting
 * room is full (decided now, with everything submitted so far counted), ST_QUOTA when the
 * requests' share of it is, ST_SHUTDOWN while draining, ST_DEVICE after the device failed.  On
 * failure the caller still owns them. */
enum status engine_submit(struct engine *e, struct request *const *reqs, uint32_t n) MUST_USE;
void engine_cancel(struct engine *e, struct request *req);

/* Constant after create. */
const struct model_config *engine_model(const struct engine *e);
uint32_t engine_max_model_len(const struct engine *e);
const char *engine_device_name(const struct engine *e);
const struct tokenizer *engine_tokenizer(const struct engine *e); /* of the model's folder */

/* Steps are counted by their size: entry i has those of more than 2^(i-1) and up to 2^i tokens. */
enum { STEP_SIZES = 18 };

/* Counters since create and gauges of this moment.  A consistent snapshot
 * published by the engine thread after each step; any thread. */
struct engine_stats {
    uint32_t running, waiting;       /* waiting includes what is submitted but not yet seen */
    uint64_t waiting_tokens;
    uint32_t kv_blocks, kv_blocks_pinned, kv_blocks_cached;
    uint32_t kv_block_tokens;        /* of one block */
    uint64_t steps, step_ns;         /* count and time spent in steps */
    uint64_t step_sizes[STEP_SIZES], step_rows; /* steps by size; tokens of all of them */
    uint64_t turns;                  /* of the engine's loop, with a step or without */
    /* Of the time from each step's results (or from waking up) to the next step's: what
     * was not spent waiting for the device.  All of it on the CPU back end. */
    uint64_t step_host_ns;
    uint64_t last_step_ns;           /* clock_now_ns() at the end of the last step */
    uint64_t prompt_tokens, prompt_tokens_cached, output_tokens;
    uint64_t sparse_rows, dense_rows; /* decode rows by kind */
    uint64_t prefix_queries, prefix_hits; /* in tokens */
    uint64_t preemptions, recomputed_tokens;
    bool host_tier;                  /* there is one; without, the following are 0 */
    uint32_t host_blocks, host_blocks_used, host_blocks_cached;
    uint32_t offloaded, streamed, loading; /* running sequences; the last wait for blocks */
    uint64_t n_offloads, n_returns, bytes_stored, bytes_loaded, load_wait_ns;
    struct hot_counts hot[SELECT_MAX_LAYERS]; /* rows that offloaded sequences read, by layer */
    uint64_t finished[5];            /* by enum finish */
    bool failed;                     /* the device failed; the process should end */
    bool busy;                       /* there is work; with last_step_ns, for the watchdog */
};
void engine_stats(const struct engine *e, struct engine_stats *out);

/* A sequence that runs, as of the last step. */
struct engine_sequence {
    uint64_t id;                     /* of its request */
    const char *place;               /* where its K and V are: "device", "offloaded", ... */
    uint32_t n_prompt, n_tokens, n_computed;
    uint32_t n_blocks, n_held;       /* of its context, and those that are on the device */
};
/* Those that run, oldest first, out of the same snapshot; room for cfg.max_running is needed. */
uint32_t engine_sequences(const struct engine *e, struct engine_sequence *out);

/* How many GPUs this program can use here, at least 1; or why there are none. */
enum status engine_count_gpus(int *out, struct error *err) MUST_USE;

/* Choose index channels for a model from a text (select.h) and write them into
 * its folder; cfg names the model and the device.  Tokens beyond what cfg allows
 * for a context are left out. */
enum status engine_calibrate(const struct engine_config *cfg, const char *text_path,
                             struct error *err) MUST_USE;

#endif
