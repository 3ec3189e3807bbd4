#ifndef TESTS_BENCH_DECODE_STEPS_H
#define TESTS_BENCH_DECODE_STEPS_H

#include "engine/kv/kv_pool.h"
#include "engine/model/model.h"

/* Whole decode steps of a model on the GPU, as the engine runs them: forward pass and
 * sampling by model_step(), replayed, with the one wait.
 *
 * Nothing is prefilled: the pool holds random keys, values and index records, and every
 * step appends the same token at the same place.  Limits are the server's defaults.  Where
 * the pool cannot hold all contexts they share blocks, each in an order of its own: bytes are
 * still read as often and from as many places, unless two contexts happen to read a block
 * within a moment of each other.
 *
 * After gpu_bench_open(); failures end the process with a line. */

enum { DECODE_MAX_SEQS = 64, DECODE_WARM_UP = 5, DECODE_STEPS = 61 };

struct decodes {
    int batch, n_tokens;         /* of each context, the step's own token included */
};

struct decode_bench {
    struct model *model;
    struct kv_pool *pool;
    struct select_plan plan;
    struct model_limits limits;
    struct kv_shape shape;
    /* Slots of the pool.  The first DECODE_MAX_SEQS of both hold the contexts' ends. */
    uint32_t blocks, index_blocks;
};

/* What is measured.  before is not in the time, and change is: it alters what was packed. */
struct decode_work {
    struct decodes d;
    bool sparse;
    void (*before)(void *arg);                              /* or NULL */
    void (*change)(void *arg, struct model_batch *batch);   /* or NULL */
    void *arg;
};

struct decode_timing {
    double ms, host_ms;          /* a step; of it not waiting for the device: medians */
};

void bench_check(enum status st, const struct error *err);

/* In this order; hot sets, where there are any, between the first two. */
void decode_open(struct decode_bench *b, const char *dir);
void decode_prepare(struct decode_bench *b);
/* Slots for the wanted number of blocks, or as many as fit: of the index, or, with whole_index,
 * of K and V alone beside an index of all.  0 blocks and no pool where nothing fits. */
void decode_open_pool(struct decode_bench *b, uint32_t wanted, bool whole_index);
void decode_close(struct decode_bench *b);

int decode_blocks(int n_tokens);                            /* of a context */
uint32_t decode_pool_blocks(const struct decodes *d);       /* that it takes for none to share */
/* Of `slots` slots that of a context's block: scattered, each slot as often as any other. */
uint32_t decode_scatter(uint32_t slots, const struct decodes *d, int seq, int block);
bool decode_shares_blocks(const struct decode_bench *b, const struct decodes *d);
/* NULL, or why there can be no such steps. */
const char *decode_refusal(const struct decode_bench *b, const struct decodes *d);

/* One step; the results are in model_batch(). */
void decode_step(struct decode_bench *b, const struct decode_work *w);
struct decode_timing decode_measure(struct decode_bench *b, const struct decode_work *w);

/* Bytes that a step must read: of weights, of all contexts, and the time of both.  With experts
 * those that `batch` rows choose on average if they choose at random. */
double decode_weight_bytes(const struct decode_bench *b, int batch);
double decode_context_bytes(const struct decode_bench *b, const struct decodes *d, bool sparse);
double decode_floor_ms(const struct decode_bench *b, const struct decodes *d, bool sparse,
                       double gb_per_s);

#endif
