#ifndef SERVER_FLEET_H
#define SERVER_FLEET_H

#include "engine/engine.h"
#include "server/config.h"
#include "server/placement.h"

#include <stdint.h>

/* The daemon's engines, one for each device, and the way of a request to one of them.
 *
 * Each has its own copy of the weights, KV pool, host tier and waiting room, all as the options
 * say; what the options say of the CPU back end's threads, and its share of memory where none is
 * given, is divided among those that share it.  Choices of one prompt go to one engine together,
 * where one of them computes the prompt; placement.h says to which.  Where that has no room for
 * them the next best is tried.
 *
 * fleet_create() and what is constant after it (engines, length, devices): any thread.  The rest:
 * loop thread. */

struct fleet;
struct strbuf;

enum { FLEET_MAX_ENGINES = PLACEMENT_MAX_ENGINES };

/* Loads all engines at the same time, a thread for each; slow.  All or none: *err is that of the
 * first that failed.  cfg->backend, number and sharers are not read; to_loop receives the messages
 * of all. */
enum status fleet_create(struct fleet **out, const struct engine_config *cfg,
                         const struct config_list *backends, struct mailbox *to_loop,
                         struct error *err) MUST_USE;
/* engine_stop() of all: every request is sent home, and the last messages may still be read. */
void fleet_stop(struct fleet *f);
void fleet_destroy(struct fleet *f);     /* NULL is fine */

uint32_t fleet_n_engines(const struct fleet *f);
struct engine *fleet_engine(const struct fleet *f, uint32_t i);
uint32_t fleet_max_model_len(const struct fleet *f);     /* that all engines can do */
/* Append their devices, separated by semicolons. */
void fleet_write_devices(struct strbuf *out, const struct fleet *f);

/* The numbers of all, by engine; the caller frees. */
struct engine_stats *fleet_stats(const struct fleet *f);

/* All of them. */
void fleet_drain(struct fleet *f);
void fleet_poke(struct fleet *f);

/* Hand over choices of one prompt to an engine that has room for all of them: engine_submit().
 * Where none has, the answer is that of the one which would have been best. */
enum status fleet_submit(struct fleet *f, struct request *const *reqs, uint32_t n) MUST_USE;
void fleet_cancel(struct fleet *f, struct request *req);

/* Its first token of output is here, if that was not said yet. */
void fleet_note_output(struct fleet *f, struct request *req);
/* It came home. */
void fleet_note_done(struct fleet *f, struct request *req);

#endif
