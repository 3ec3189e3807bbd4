#ifndef COPY_ENGINE_H
#define COPY_ENGINE_H

#include "engine/base/mailbox.h"
#include "engine/base/status.h"
#include "engine/kv/kv_pool.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct backend;

/* Moves blocks between the device and the host tier: one thread with streams of its own, one for
 * each direction.  It knows slots, not sequences.
 *
 * A job is handed over with copy_engine_post() and comes back through the mailbox given at create,
 * once its bytes have arrived (or failed).  Of the jobs that wait, urgent ones go first, each kind
 * in the order of posting; what is under way on a stream is not overtaken.  No more than
 * COPIES_IN_FLIGHT jobs are on a stream at once, so an urgent job waits for little.
 *
 * It waits for no other stream: what a job reads is written when it is posted, and nobody reads or
 * writes the slots that it writes before it is back.
 *
 * Failures.  A failed stream is final for the device (backend.h): the job and all that follow come
 * back with arrived false, when nothing is under way any more; copy_engine_failure() has the
 * reason.
 *
 * post: engine thread.  counts, failure: any thread. */

enum { COPIES_IN_FLIGHT = 4 };

enum copy_kind { COPY_STORE, COPY_LOAD };      /* device to host, host to device */

struct copy_job {
    struct mail_node node;           /* first: the mailboxes' */
    struct copy_job *next;           /* the engine's while it has the job */
    enum copy_kind kind;
    bool urgent;
    bool arrived;                    /* set when it comes back */
    kv_block block;                  /* the caller's */
    struct block_place place;        /* kv or index -1: that part is not moved */
    uint64_t posted_ns, began_ns, ended_ns;
};

struct copy_engine_config {
    const struct kv_pool *pool;      /* for addresses alone; constant ones */
    void *host;                      /* base of the host tier */
    int layers;
    struct kv_shape shape;
    struct mailbox *done;
    /* Tests: called on the copy thread before a job is queued, with its number in the order of
     * queueing, from 0; may sleep; false is as though the stream had failed at this job. */
    bool (*before)(void *arg, uint64_t number);
    void *before_arg;
};

struct copy_counts {
    uint64_t stores, loads, bytes_stored, bytes_loaded, failed;
    uint64_t load_wait_ns;           /* between posting and arriving, of all loads */
};

struct copy_engine;

enum status copy_engine_create(struct copy_engine **out, struct backend *be,
                               const struct copy_engine_config *cfg, struct error *err) MUST_USE;
/* Finishes what is under way; what waits comes back with arrived false.  NULL is fine. */
void copy_engine_destroy(struct copy_engine *c);

void copy_engine_post(struct copy_engine *c, struct copy_job *job);

struct copy_counts copy_engine_counts(const struct copy_engine *c);
enum status copy_engine_failure(const struct copy_engine *c, struct error *err);

#endif
