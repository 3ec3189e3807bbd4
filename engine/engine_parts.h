#ifndef ENGINE_PARTS_H
#define ENGINE_PARTS_H

#include "engine/base/mailbox.h"
#include "engine/engine.h"
#include "engine/kv/kv_pool.h"
#include "engine/model/model.h"
#include "engine/model/tokenizer.h"
#include "engine/run/residency.h"
#include "engine/run/scheduler.h"
#include "engine/run/step.h"
#include "engine/run/waiting_room.h"

#include <pthread.h>
#include <stdatomic.h>

/* The engine's inside, shared by engine.c (the thread) and engine_create.c
 * (loading).  Private to these two. */

enum { SEQUENCE_WORDS = (sizeof(struct engine_sequence) + 7) / 8 };

/* A snapshot that one thread writes and any may read without a lock: an odd
 * version means that a write is under way. */
struct published_stats {
    _Atomic uint32_t version;
    _Atomic uint64_t words[(sizeof(struct engine_stats) + 7) / 8];
    uint32_t max_rows;
    _Atomic uint32_t n_rows;
    _Atomic uint64_t *rows;              /* [max_rows][SEQUENCE_WORDS], running sequences */
};

struct engine {
    /* Constant after create. */
    struct backend *be;
    struct model *model;
    struct tokenizer *tok;
    struct token_trie *trie;             /* of its tokens, for grammars */
    struct select_plan select;
    int16_t *channels;
    uint32_t max_model_len, step_tokens, max_logit_rows;
    uint32_t alone_tokens;               /* budget of a step that streams and disturbs nobody */
    bool check_invariants;
    struct mailbox *to_loop;

    /* Any thread. */
    struct mailbox *inbox;               /* requests, by their done_mail */
    int wake_fd;                         /* eventfd */
    struct waiting_room waiting;
    struct waiting_room *shares;         /* [n_shares] of it */
    uint32_t n_shares;
    atomic_uint n_inside;                /* accepted and not yet sent home */
    atomic_uint n_cancels;               /* engine_cancel() calls */
    atomic_bool draining, stopping, failed;
    struct published_stats published;

    /* Engine thread. */
    pthread_t thread;
    bool started;
    struct stream *stream;
    struct kv_pool *pool;
    struct residency_context residency;  /* owns its tier and sets */
    struct scheduler *scheduler;
    struct step_context step;
    uint64_t next_order;
    uint32_t seen_cancels;
    uint32_t n_put_back;                 /* preempted and waiting */
    uint64_t host_from_ns;               /* the last step's results, or waking up */
    struct engine_stats stats;
};

void *engine_thread(void *engine);

/* Make e->stats readable for all.  Engine thread, or before there is one. */
void engine_publish(struct engine *e);

#endif
