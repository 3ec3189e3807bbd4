#ifndef TESTS_SUPPORT_ENGINE_FIXTURE_H
#define TESTS_SUPPORT_ENGINE_FIXTURE_H

#include "engine/base/mailbox.h"
#include "engine/engine.h"
#include "engine/run/request.h"
#include "kernels/layout.h"

#include <stdint.h>

/* An engine on the CPU, one at a time; of the bundled model, unless a test says another. */

#define BUNDLED_MODEL "models/asynctlsd-books-9m"

extern struct engine *engine;
extern struct mailbox *engine_mail;

/* Two threads, invariants checked, and so small a crossover (200) and budget (4 blocks, 96
 * tokens) that short tests decode sparsely. */
struct engine_config small_config(void);
/* What a test has to know of a model. */
struct fixture_model {
    const char *dir;
    int layers;
    struct kv_shape shape;
};
extern const struct fixture_model bundled_model, latent_model;

/* What a block of 64 tokens takes, on the device with its index and in host memory; and its index
 * alone. */
uint64_t model_block_bytes(const struct fixture_model *m);
uint64_t model_index_bytes(const struct fixture_model *m);
/* Of the bundled model. */
enum { BUNDLED_BLOCK_BYTES = 64 * 8192 + 8 * 2 * 2176, BUNDLED_INDEX_BYTES = 8 * 2 * 2176 };

void start(const struct engine_config *c);
void stop(void);

/* Greedy, sparse, to max_tokens whatever it says, with the logprobs of what was chosen. */
struct request *new_request(const int32_t *prompt, uint32_t n_prompt, uint32_t max_tokens);
void free_request(struct request *r);

/* engine_submit() of one. */
enum status submit_one(struct request *r) MUST_USE;
/* Take what mail there is, after waiting for some; how many requests came home with it. */
int collect_mail(void);
/* Until n requests have come home. */
void wait_for(int n);
void run_one(struct request *r);

/* Ordinary text tokens, the same for a seed. */
void random_prompt(int32_t *ids, uint32_t n, uint64_t seed);

/* Once everybody is home: fails if what is in use does not become nothing. */
void assert_gauges_are_zero(void);

#endif
