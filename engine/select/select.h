#ifndef SELECT_H
#define SELECT_H

#include "engine/base/status.h"
#include "kernels/layout.h"

#include <stdbool.h>
#include <stdint.h>

/* Policy of two-level attention: which filter and index, how much is kept in
 * which layer, and from which length on.  kernels/ops.h defines the stages,
 * kernels/layout.h the bytes; docs/ATTENTION.md has the evidence for the
 * defaults.
 *
 * A decode row of a context of n tokens (itself included) is sparse if the
 * request asks for sparse attention and n > crossover_tokens; every prompt row
 * is dense.  So whether a token's K and V were computed dense or sparse is a
 * function of its position alone, see select_provenance().
 *
 * Lagged, a sparse row chooses its tokens among the blocks that the row before kept
 * (kernels/lagged_blocks.h); the first sparse row of a sequence has none before it and is exact.
 * So what it computes follows from all sparse rows before it, back to the first one: their tokens
 * and that they were computed one after the other.  A block's name does not say that much, so
 * blocks with such rows have none, see select_may_share(): a sequence that was preempted computes
 * its sparse rows again from the first one on, and gets what it had to the last bit. */

enum { SELECT_MAX_LAYERS = 128 };

enum selection { SELECTION_EXACT, SELECTION_LAGGED };

struct select_config {
    enum filter_kind filter;
    enum index_kind index;
    enum selection selection;
    int keep_blocks, keep_tokens;    /* per KV head, forced ones included */
    int sink_tokens, recent_tokens;  /* always kept */
    int crossover_tokens;            /* contexts up to here are dense */
    const char *layers;              /* exceptions: "0-1:dense,6:blocks=128,tokens=2048"; NULL none.
                                        Entries are separated by ';' or by ',' before a digit;
                                        of two for one layer the later wins. */
};

struct select_layer {
    bool dense;
    int keep_blocks, keep_tokens;
};

struct select_plan {
    struct select_config config;     /* layers is NULL here */
    int n_layers;
    struct select_layer layer[SELECT_MAX_LAYERS];
    int max_keep_blocks, max_keep_tokens; /* over the layers */
    /* INDEX_CHANNELS: [n_layers][kv_heads][INDEX_CHANNELS_KEPT], caller's storage; else NULL */
    const int16_t *channels;
    uint64_t fingerprint;            /* of all that changes what is selected; never 0 */
};

/* The defaults of configs/asynctlsd.conf; crossover_tokens 0 stands there for the device's,
 * which whoever knows the device puts in its place. */
struct select_config select_default(void);

/* Check cfg against the shape and spread it over the layers.  A sentence for
 * the operator when impossible: budgets below the forced tokens, a kept-token
 * budget above keep_blocks * BLOCK_TOKENS, a bad exception, head_dim not a
 * power of two for INDEX_ROTATED, channels missing for INDEX_CHANNELS, latent keys with parts that
 * are not powers of two or with INDEX_CHANNELS, lagged without a layer that selects. */
enum status select_plan_init(struct select_plan *plan, const struct select_config *cfg,
                             const struct kv_shape *shape, int n_layers,
                             const int16_t *channels, struct error *err) MUST_USE;

/* No layer is dense by plan: K and V of a sparse row are only read where they are chosen. */
bool select_is_everywhere(const struct select_plan *plan);

/* Whether the block that holds positions first .. first + BLOCK_TOKENS - 1 may be found again, by
 * another sequence or the same: all, but lagged those with sparse rows. */
bool select_may_share(const struct select_plan *plan, bool sparse_allowed, uint32_t n_prompt,
                      uint32_t first);

/* Provenance (kv_pool.h) of the block that holds positions first ..
 * first + BLOCK_TOKENS - 1 of a sequence whose prompt has n_prompt tokens: 0 when all
 * were computed dense; otherwise a value that two sequences share only if each
 * of these tokens was computed dense in both or sparse in both, with the same
 * fingerprint. */
uint64_t select_provenance(const struct select_plan *plan, bool sparse_allowed,
                           uint32_t n_prompt, uint32_t first);

/* True if the decode row at this position (context position + 1) is sparse. */
bool select_is_sparse(const struct select_plan *plan, bool sparse_allowed,
                      uint32_t n_prompt, uint32_t position);

/* Calibrated channels beside the model: DIR/asynctlsd-channels.json,
 * {"version":1,"layers":L,"kv_heads":G,"head_dim":D,"kept":32,"channels":[[[...]]]}.
 * Read into out [layers][kv_heads][INDEX_CHANNELS_KEPT]; ST_IO when absent. */
enum status select_channels_read(int16_t *out, const char *path, int layers,
                                 const struct kv_shape *shape, struct error *err) MUST_USE;
enum status select_channels_write(const int16_t *channels, const char *path, int layers,
                                  const struct kv_shape *shape, struct error *err) MUST_USE;

#endif
