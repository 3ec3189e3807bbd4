#ifndef SERVER_DEVICES_H
#define SERVER_DEVICES_H

#include "engine/base/status.h"
#include "server/config.h"

/* The devices that the option backend lists, an engine for each.
 *
 *     auto             alone: cuda:0 where there is a GPU, else cpu
 *     cuda:all         alone: every GPU of the machine
 *     cuda:0,cuda:1    these GPUs, none twice
 *     cpu,cpu          two engines on the processor, for tests and measurements
 *
 * CPU and GPUs do not mix: requests would get answers of one or the other's speed and rounding.
 * auto stays one device: who has not named the others may have them in use. */

/* What can be said without looking at the machine. */
enum status devices_validate(const struct config_list *backends, struct error *err) MUST_USE;

/* The same with cuda:all replaced by what it stands for; out is the caller's, and empty before. */
enum status devices_expand(struct config_list *out, const struct config_list *backends,
                           struct error *err) MUST_USE;

/* The first of them. */
const char *devices_first(const struct config_list *backends);

#endif
