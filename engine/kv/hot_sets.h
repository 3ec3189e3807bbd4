#ifndef HOT_SETS_H
#define HOT_SETS_H

#include "engine/base/status.h"
#include "kernels/hot_rows.h"

#include <stdint.h>

struct backend;
struct stream;

/* Device memory for the rows of sequences that are not all on the device: `sets` sets of hot
 * rows (kernels/hot_rows.h) in every layer, and their counters.  A set belongs to one sequence from
 * acquire to release; nothing is allocated in between.
 *
 * Engine thread. */

struct hot_sets;

struct hot_sets_config {
    int sets, layers, rows_per_head, max_blocks;
    struct kv_shape shape;
    const void *host;            /* host tier: slot s at s * host_stride bytes, layer l of its */
    size_t host_stride;          /* K and V at l * kv_block_bytes() */
};

/* Of one layer since create: rows, and the time for which its attention waited for missing ones. */
struct hot_counts {
    uint64_t hits, misses, resident;
    uint64_t stalled_ns;
};

/* Bytes of device memory that hot_sets_create() takes; the same code lays it out. */
size_t hot_sets_bytes(const struct hot_sets_config *cfg);
enum status hot_sets_create(struct hot_sets **out, struct backend *be,
                            const struct hot_sets_config *cfg, struct error *err) MUST_USE;
void hot_sets_destroy(struct hot_sets *h);      /* every set released; NULL is fine */
const struct hot_sets_config *hot_sets_config(const struct hot_sets *h);

/* An empty set, or -1 when none is free.  It is emptied by work queued on s, the stream that the
 * steps run on. */
int hot_sets_acquire(struct hot_sets *h, struct stream *s);
void hot_sets_release(struct hot_sets *h, int set);
int hot_sets_free(const struct hot_sets *h);

/* What attend_two_level takes for a layer, but for host_table, set and step, which the caller
 * fills in (device memory). */
struct hot_rows hot_sets_layer(const struct hot_sets *h, int layer);

/* Queue the copy of all layers' counters to the host, behind a step; hot_sets_take_counts() after
 * the next stream_sync(): from then on they are what hot_sets_counts() gives. */
void hot_sets_fetch_counts(struct hot_sets *h, struct stream *s);
void hot_sets_take_counts(struct hot_sets *h);
struct hot_counts hot_sets_counts(const struct hot_sets *h, int layer);

#endif
