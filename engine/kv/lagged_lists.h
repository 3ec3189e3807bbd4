#ifndef LAGGED_LISTS_H
#define LAGGED_LISTS_H

#include "engine/select/select.h"
#include "kernels/lagged_blocks.h"

#include <stddef.h>

struct stream;

/* Lists of the blocks that a sequence's step before kept (kernels/lagged_blocks.h): `slots` slots
 * in every layer that selects.  A slot belongs to one sequence from acquire to release, and there
 * are as many as sequences in a step, so one is always free.
 *
 * Engine thread. */

struct lagged_lists;

/* Bytes of device memory; the same code lays it out. */
size_t lagged_lists_bytes(const struct select_plan *plan, int slots, int kv_heads);
/* base: of that size, and the caller's. */
struct lagged_lists *lagged_lists_create(void *base, const struct select_plan *plan, int slots,
                                         int kv_heads);
void lagged_lists_destroy(struct lagged_lists *l);  /* every slot released; NULL is fine */

/* An empty slot.  It is emptied by work queued on s, the stream that the steps run on. */
int lagged_lists_acquire(struct lagged_lists *l, struct stream *s);
void lagged_lists_release(struct lagged_lists *l, int slot);
int lagged_lists_free(const struct lagged_lists *l);

/* What attend_two_level takes for a layer that selects, but for slot, which the caller fills in
 * (device memory). */
struct lagged_blocks lagged_lists_layer(const struct lagged_lists *l, int layer);

#endif
