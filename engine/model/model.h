#ifndef MODEL_H
#define MODEL_H

#include "engine/base/status.h"
#include "engine/model/model_config.h"
#include "engine/select/select.h"
#include "kernels/ops.h"

#include <stddef.h>
#include <stdint.h>

struct backend;
struct hot_sets;
struct lagged_lists;
struct stream;
struct kv_pool;
struct progress;

/* A model on a device: weights, scratch memory and the forward pass.
 *
 * Life: model_open() maps and checks the folder; model_prepare() carves the
 * scratch memory, which needs limits that depend on how much memory the
 * weights left; then model_batch() is filled and model_step() called, for
 * ever.  Engine thread, except open.
 *
 * Off the device.  With hot sets (model_use_hot_sets()) the table of a sparse decode that has a
 * set may have kv slot -1: K and V of that block are then read through the set, out of the host
 * slot in host_table (kernels/hot_rows.h).  The block of the row itself is on the device, and so
 * are all blocks of dense sequences and of those without a set: that their tables have no -1 is
 * the caller's promise, because looking costs as much as making the tables.  Layers that are dense
 * by plan read all of K and V on the device, so with such layers no sequence may have a set.
 *
 * Lagged.  With a plan of lagged selection a sparse decode may have a slot of
 * model_lagged_lists(), its own as long as it decodes.
 *
 * Streamed.  The last sequence of a batch may be a dense one that the pool cannot hold: block i
 * of its table is then in the pool, or the table says -2 - j and it is staged[j], a host slot.  In
 * each layer the staged blocks pass through one of the pool's two buffers, while the layer before
 * is being computed from the other.  It needs hot sets, which know where the host tier is. */

struct model;

struct model_limits {
    int max_rows;        /* query tokens a step */
    int max_seqs;        /* sequences a step */
    int max_logit_rows;  /* rows sampled or scored a step, >= max_seqs */
    int max_blocks;      /* width of the block tables: blocks of the longest context */
    int staged_blocks;   /* of the streamed sequence at most; the pool's staged_blocks.  0: none */
};

/* One step's work, packed by the caller in host memory owned by the model.
 *
 * Sequences 0 .. sparse_seqs - 1 are sparse decodes and have one row each, row
 * s for sequence s; the others are dense, with the rows first_row ..
 * first_row + n_rows - 1.  Rows of a sequence are consecutive and ascending. */
struct model_batch {
    int rows, seqs, sparse_seqs, logit_rows;
    int n_staged;            /* > 0: the last sequence is streamed, see above */
    int32_t *ids;            /* [max_rows] */
    int32_t *positions;      /* [max_rows] */
    int32_t *kv_block;       /* [max_rows]  where each row's K and V go */
    int32_t *index_block;    /* [max_rows] */
    int32_t *first_row;      /* [max_seqs] */
    int32_t *n_rows;         /* [max_seqs] */
    int32_t *n_tokens;       /* [max_seqs]  context length after the step */
    int32_t *kv_table;       /* [max_seqs, max_blocks] */
    int32_t *index_table;    /* [max_seqs, max_blocks] */
    int32_t *host_table;     /* [max_seqs, max_blocks]  host slots, of sequences with a set; read
                                where kv_table has -1; NULL without hot sets, like the next */
    int32_t *hot_set;        /* [max_seqs]  the sequence's own, or -1: everything is in kv */
    int32_t *lagged_slot;    /* [max_seqs]  the sequence's own, or -1; NULL unless lagged */
    int32_t *staged;         /* [staged_blocks]  host slots of the streamed sequence's */
    int32_t *rows_of;        /* [max_logit_rows]  rows whose logits are wanted */
    struct sample_params *sample;   /* [max_logit_rows] */
    struct sample_result *result;   /* [max_logit_rows], filled by model_step */
    /* Or NULL: called when everything in front of the sampling is under way, for what `sample`
     * points to and takes time to make. */
    void (*before_sample)(void *arg);
    void *before_sample_arg;
};

/* progress: of the weights on their way to the device; may be NULL. */
enum status model_open(struct model **out, struct backend *be, const char *dir,
                       struct progress *progress, struct error *err) MUST_USE;
void model_close(struct model *m);      /* NULL is fine */

const struct model_config *model_config(const struct model *m);
struct kv_shape model_kv_shape(const struct model *m, const struct select_config *cfg);
size_t model_weight_bytes(const struct model *m);

/* Before model_scratch_bytes() and model_prepare(), which count and lay out what steps with hot
 * sets need in addition; never called: no sequence has a set.  Borrowed until model_close(), and of
 * max_blocks as in the limits and enough rows for the plan.  After a step in which a sequence has a
 * set hot_sets_counts() is up to date. */
void model_use_hot_sets(struct model *m, struct hot_sets *h);

/* Bytes of scratch that model_prepare() will take; the same code lays it out. */
size_t model_scratch_bytes(const struct model *m, const struct model_limits *limits,
                           const struct select_plan *plan);
enum status model_prepare(struct model *m, const struct model_limits *limits,
                          const struct select_plan *plan, struct error *err) MUST_USE;

struct model_batch *model_batch(struct model *m);

/* After model_prepare(): a slot for each sequence of a step, in the scratch memory.  NULL unless
 * the plan's selection is lagged. */
struct lagged_lists *model_lagged_lists(const struct model *m);

/* Run the batch: forward pass, logits of rows_of, sampling.  K and V go into
 * pool.  When it returns ST_OK the results are valid and the batch may be
 * refilled. */
enum status model_step(struct model *m, struct stream *s, struct kv_pool *pool,
                       struct error *err) MUST_USE;

/* Time since open that model_step() spent waiting for the device. */
uint64_t model_waited_ns(const struct model *m);

/* Called in each layer once q is rotated and K stored, for calibration and
 * measurement; NULL turns it off.  q is what attention reads, act [rows, heads * head_dim of
 * model_kv_shape()] with row stride q_stride, device memory. */
typedef void (*model_observer)(void *arg, int layer, const struct model_batch *batch,
                               const void *q, int q_stride);
void model_observe(struct model *m, model_observer fn, void *arg);

/* What a layer selected for the sparse sequences of a batch, a row each.  Device memory, there
 * when what is queued on the step's stream is done. */
struct model_selection {
    const struct model_batch *batch;
    uint32_t step;                   /* as hot rows count them (kernels/hot_rows.h) */
    const void *q;                   /* as model_observer's */
    int q_stride;
    int max_blocks;                  /* width of the batch's tables */
    int keep_blocks, keep_tokens;    /* of the layer; widths of the lists */
    struct selected_lists lists;
};

/* Have fn called in each layer that selects, behind its attention; it may wait for the stream.
 * Before model_scratch_bytes() and model_prepare(), which count and lay out the lists.  From then
 * on no step is replayed and the levels run one after the other (attend_two_level_args.lists),
 * which is slower, and on a GPU scores may differ by rounding from those of fused kernels. */
typedef void (*model_watcher)(void *arg, int layer, const struct model_selection *selection);
void model_watch(struct model *m, model_watcher fn, void *arg);

/* Choose index channels: for each layer and KV head the INDEX_CHANNELS_KEPT
 * channels with the largest mean |q| * mean |k| over the tokens given (one
 * context, prefilled dense in a pool of its own).  out is
 * [layers][kv_heads][INDEX_CHANNELS_KEPT], ascending channels.  The model must not be
 * prepared yet, and not have latent attention; afterwards it must be closed. */
enum status model_calibrate(struct model *m, const int32_t *ids, uint32_t n_ids,
                            int16_t *out, struct error *err) MUST_USE;

#endif
