#ifndef MODEL_PARTS_H
#define MODEL_PARTS_H

#include "engine/model/model.h"
#include "engine/model/weights.h"
#include "kernels/ops.h"

/* What model.c lays out and forward.c and replay.c compute with; private to these and to
 * calibrate.c. */

/* The integers of a step.  On the host they are what the caller filled in; the
 * device has a copy, or the same memory when it can see the host's. */
struct step_arrays {
    int32_t *ids, *positions, *kv_block, *index_block;     /* [max_rows] */
    int32_t *first_row, *n_rows, *n_tokens;                /* [max_seqs] */
    int32_t *last_first_row, *last_n_rows;                 /* [max_seqs]  see forward.c */
    int32_t *kv_table, *index_table;                       /* [max_seqs, max_blocks] */
    int32_t *rows_of;                                      /* [max_logit_rows] */
    int32_t *staged;                                       /* [staged_blocks]  host alone */
    /* With hot sets; else NULL. */
    int32_t *host_table;                                   /* [max_seqs, max_blocks] */
    int32_t *hot_set;                                      /* [max_seqs] */
    uint32_t *step;                                        /* [1] */
    int32_t *lagged_slot;                                  /* [max_seqs]  lagged; else NULL */
};

/* Device memory of a step.  T max_rows, R max_logit_rows, S max_seqs.  With latent attention
 * (kernels/latent.h) of L + P values, queries of rank Q, and N, P and D values of a head's query,
 * without and with rotation, and of its value. */
struct step_scratch {
    void *x;                     /* act [T, M]  residual stream */
    void *h;                     /* act [T, M]  normed */
    void *delta;                 /* act [T, M]  what the last sublayer adds */
    void *qkv;                   /* act [T, H*D + 2 G*D]  a row is q, k and v, see weights.h;
                                    latent: [T, Q + L + P] */
    void *attn;                  /* act [T, H*D]; latent: [T, H*L] */
    /* Latent attention alone.  low_rank, which is read before there is attn, lies in its memory. */
    void *low_rank;              /* act [T, Q]  normed */
    void *by_head;               /* act [T, H*(N + P)]  the queries; then [T, H*D]  the values */
    void *absorbed;              /* act [T, H*(L + P)]  the queries of attention */
    /* Of MLP and experts, which share memory with all since qkv.  I and E are 0 where no layer is
     * of that kind; I is the larger of the layers' MLP and the shared expert's. */
    void *gate_up, *mid;         /* act [T, 2 I], [T, I] */
    float *scores;               /* [T, E] */
    int32_t *chosen;             /* [T, k] */
    float *chosen_weights;       /* [T, k] */
    void *experts;               /* scratch of experts */
    void *last_x, *last_attn;    /* act [R, M] and as attn, [R, ...]  rows that are wanted */
    float *cos_sin;              /* [T, D]; latent: [T, P] */
    float *logits;               /* [R, V] */
    float *inv_freq;             /* [D / 2]; latent: [P / 2] */
    int16_t *channels;           /* [layers, G, INDEX_CHANNELS_KEPT], NULL without */
    void *attention;             /* scratch of attend_dense or attend_two_level */
    void *lagged;                /* memory of the lagged lists, NULL without */
    struct selected_lists lists; /* of S sequences, with a watcher */
};

struct replay;                   /* replay.c */
struct streaming;                /* streaming.c */

struct model {
    struct backend *be;
    const struct backend_ops *ops;
    struct model_config config;
    struct weights *weights;
    bool prepared;
    struct model_limits limits;
    struct select_plan plan;     /* channels: the caller's; the copy is in scratch */
    struct buffer host;          /* pinned: batch */
    struct buffer device;        /* scratch, and the copy of the step's integers */
    struct model_batch batch;
    struct step_arrays host_arrays, arrays;
    struct step_scratch scratch;
    struct replay *replay;       /* NULL where the back end records no graphs */
    struct streaming *streaming; /* NULL without staged blocks */
    struct hot_sets *hot;        /* borrowed; NULL: no sequence has a set */
    struct lagged_lists *lagged; /* NULL: selection is exact */
    bool selects_everywhere;     /* no layer is dense by plan */
    /* Of this step, from 1 on.  It would wrap after months of nothing but steps, and even then
     * only differences are looked at. */
    uint32_t step;
    uint64_t waited_ns;          /* in stream_sync, by model_step */
    model_observer observer;
    void *observer_arg;
    model_watcher watcher;
    void *watcher_arg;
};

/* Sequences with full attention: `from` is the first, in all arrays. */
struct dense_rows {
    const int32_t *first_row, *n_rows, *n_tokens;          /* device */
    int from, seqs;
    int most_rows, most_tokens;  /* the largest entries of n_rows and n_tokens, or more */
};

/* One forward pass. */
struct pass {
    struct model *m;
    const struct backend_ops *ops;
    const struct model_config *g;
    const struct model_batch *b;
    const struct step_arrays *a;     /* device */
    const struct step_scratch *w;
    struct stream *s;
    struct kv_pool *pool;
    struct kv_shape shape;
    int rows, logit_rows;
    bool gathers;                    /* the wanted rows are not all rows in order */
    bool decodes;                    /* a row of every sequence, none of a longer slice */
    bool has_sets;                   /* of the sparse sequences some are not all in kv */
    int sparse_seqs, most_sparse_tokens;
    const int32_t *sparse_n_tokens;  /* device */
    struct dense_rows dense[2][2];   /* [in the last layer][where the layer selects] */
    struct dense_rows streamed[2];   /* [in the last layer]  seqs 0: none */
};

/* A pass over the batch with nothing filled in that depends on its rows. */
struct pass forward_pass(struct model *m, struct stream *s, struct kv_pool *pool,
                         const struct step_arrays *a);

/* Queue everything from the embedding to the logits. */
void forward_queue(struct pass *p);

bool forward_wants_all_rows(const struct model_batch *b);
/* Whether a sequence of the batch has a set of hot rows. */
bool forward_has_sets(const struct model *m);

/* replay.c.  Call when limits are known; leaves m->replay NULL where there are no graphs. */
enum status replay_create(struct model *m, struct error *err) MUST_USE;
void replay_destroy(struct model *m);

/* Queue the batch as the replay of a recorded one; false when it cannot be. */
bool replay_batch(struct model *m, struct stream *s, struct kv_pool *pool);

/* streaming.c.  With limits; leaves m->streaming NULL where no blocks are staged. */
enum status streaming_create(struct model *m, struct error *err) MUST_USE;
void streaming_destroy(struct model *m);

/* Before the first layer of a pass with a streamed sequence: start its copies. */
void streaming_begin(struct pass *p);
/* Before its attention in a layer: the table to use, when what it names has arrived. */
const int32_t *streaming_enter(struct pass *p, int layer);
/* Behind its attention: the buffer may be filled again. */
void streaming_leave(struct pass *p, int layer);
/* After the pass's stream_sync(): the first failure of the copies. */
enum status streaming_failure(const struct model *m, struct error *err) MUST_USE;

/* Copy from any host memory to the device, and wait. */
enum status model_upload(struct model *m, void *device, const void *host, size_t bytes,
                         struct error *err) MUST_USE;

#endif
