#ifndef SELECTION_DUMP_H
#define SELECTION_DUMP_H

#include "engine/base/status.h"
#include "engine/model/model.h"

#include <stdint.h>

struct backend;
struct hot_sets;
struct kv_pool;
struct sequence;
struct stream;

/* What sparse decode steps selected, and what it takes to judge that, in a file:
 * scripts/selection_report.py reads it.
 *
 *   selection_header
 *   selection_record, its payload        as many as there are, always whole
 *
 * A sequence's step of one layer is a record STEP, behind records ROWS with what of the context's K
 * and V is not in the file yet: all of it before the first step, later a token.  Steps that a
 * preemption has computed again are not repeated.  A step that would pass max_bytes is not begun
 * in any layer; a write that fails may leave a step that not all layers have.  Either way the dump
 * ends and says so once, and the engine goes on.
 *
 * All is in this machine's byte order; a record begins at a multiple of 8 bytes.  The file is its
 * owner's alone: K and V tell what the text was.
 *
 * Engine thread, which waits for the device and the disk in the middle of its steps. */

enum { SELECTION_DUMP_VERSION = 1 };

struct selection_header {
    char magic[8];                   /* "seldump", NUL */
    uint32_t version;
    uint32_t act;                    /* enum dtype, of queries */
    uint32_t layers, heads, kv_heads, head_dim, latent_dim, row_dim; /* as in kernels/layout.h */
    uint32_t block_tokens;
    uint32_t nth_layer;              /* layers 0, nth_layer, 2 nth_layer ... are there */
    uint32_t filter, index, selection, sink_tokens, recent_tokens;  /* of select_config */
    float scale;                     /* of scores */
};

enum { SELECTION_ROWS = 1, SELECTION_STEP = 2 };

/* ROWS  bf16 [G, n, R]               rows of positions first .. first + n - 1, of one block
 * STEP  act [H * D]                  the query of position first = n - 1, as attention has it,
 *                                    padded to 8 bytes
 *       int32 [G], [G]               how many blocks are kept, tokens chosen
 *       int32 [G, keep_blocks]       blocks that tokens were chosen among, then -1
 *       int32 [G, keep_tokens]       chosen positions, then -1
 *       uint32 [(blocks + 31) / 32]  with a set of hot rows: bit b % 32 of word b / 32: K and V of
 *                                    block b are on the device.  Padded to 8 bytes */
struct selection_record {
    uint32_t kind, layer;
    uint64_t sequence;               /* numbered as they arrived */
    uint32_t first, n;               /* STEP: the context has n tokens */
    uint32_t keep_blocks, keep_tokens; /* STEP */
    uint32_t hot_rows;               /* STEP: rows of a head in the sequence's set; 0: none */
    uint32_t step;                   /* STEP: number of the engine's step */
    uint64_t bytes;                  /* of the payload, a multiple of 8 */
};

struct selection_dump;

struct selection_dump_config {
    const char *path;                /* a file that is not there yet; borrowed for open */
    uint64_t max_bytes;
    uint32_t nth_layer;
    int max_seqs;
    const struct select_plan *plan;  /* outlives the dump */
    struct backend *be;
    struct stream *stream;           /* that the steps run on */
};

/* Creates the file and has the model watched (model_watch(): m is not prepared yet). */
enum status selection_dump_open(struct selection_dump **out, struct model *m,
                                const struct selection_dump_config *cfg,
                                struct error *err) MUST_USE;
/* A file without a step is removed.  NULL is fine. */
void selection_dump_close(struct selection_dump *d);

/* Before the first step; sets may be NULL. */
void selection_dump_use(struct selection_dump *d, struct kv_pool *pool, struct hot_sets *sets);

/* For each step: begin, then add each sparse sequence, `at` its number in the batch. */
void selection_dump_begin(struct selection_dump *d);
void selection_dump_add(struct selection_dump *d, struct sequence *q, int at);

#endif
