#ifndef WEIGHTS_H
#define WEIGHTS_H

#include "engine/base/status.h"
#include "engine/model/model_config.h"
#include "kernels/experts.h"

#include <stdbool.h>
#include <stdint.h>

/* The tensors of a model folder, bound by name to their place in the forward
 * pass, with exactly the shapes that config.json implies.
 *
 * Every tensor of the folder is either bound or on the short list of those
 * that every reader skips: lm_head.weight of a tied model, the layers behind
 * the last one (multi-token prediction) and stored rotary frequencies.
 * Anything else is refused: a bias nobody adds would be a wrong answer.
 *
 * On a back end whose memory the host can see the weights stay where the file
 * is mapped; elsewhere they are copied to the device once, and so is a tensor
 * that lies misaligned in its file.
 *
 * Matrices with the same input are joined where they are copied and of one type: q, k
 * and v, or q_a and kv_a, and gate and up, then lie behind each other as the rows of one
 * matrix, and so do their biases.  One large product keeps a GPU busier than three.  The experts
 * of a layer, where they are copied, are one stretch of memory too: gate, up and down of each.
 * Kernels find them through tables (kernels/experts.h), which are made here. */

struct weight {
    const void *data;            /* device; [out, in] row-major.  NULL: the family has none */
    enum dtype type;
};

struct layer_weights {
    struct weight attn_norm, q, k, v, o;
    struct weight q_bias, k_bias, v_bias;   /* of the type of q, k and v */
    struct weight q_norm, k_norm;           /* of one type */
    /* Latent attention has these and o; a head's rows of kv_b are those of its keys, then those of
     * its values. */
    struct weight q_a, q_a_norm, q_b, kv_a, kv_a_norm, kv_b;
    struct weight mlp_norm;
    struct weight gate, up, down;           /* gate and up of one type; with experts of the shared
                                               one, NULL if there is none */
    struct weight router;                   /* [experts, hidden]; NULL without experts */
    struct weight router_bias;              /* [experts], F32; NULL if the choice has none */
    struct expert_weights experts;          /* undefined without */
    bool joined;                            /* q, k and v are one matrix, or q_a and kv_a */
};

struct weights;
struct progress;

/* progress: of the copies to the device; may be NULL. */
enum status weights_open(struct weights **out, struct backend *be,
                         const struct model_config *config, const char *dir,
                         struct progress *progress, struct error *err) MUST_USE;
void weights_close(struct weights *w);      /* NULL is fine */

struct weight weights_embed(const struct weights *w);  /* [vocab, hidden] */
struct weight weights_norm(const struct weights *w);   /* [hidden], the last one */
struct weight weights_head(const struct weights *w);   /* [vocab, hidden]; embed when tied */
const struct layer_weights *weights_layer(const struct weights *w, int layer);

/* Bytes and elements bound, each tensor once. */
uint64_t weights_bytes(const struct weights *w);
uint64_t weights_elements(const struct weights *w);

/* The number of elements that a folder with this config must have. */
uint64_t weights_expected_elements(const struct model_config *config);

#endif
