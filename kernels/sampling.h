#ifndef KERNELS_SAMPLING_H
#define KERNELS_SAMPLING_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The sampler: what a row asks for, what it gets, and how a token is drawn. */

enum { SAMPLE_MAX_TOP = 20 };

struct logit_bias { int32_t id; float bias; };
struct token_count { int32_t id; uint32_t in_output; bool in_prompt; };
struct token_logprob { int32_t id; float logprob; };

/* What one row asks of the sampler; host memory.
 *
 * Order: (1) logprobs of the raw logits; (2) ids that are not allowed, and banned ones, to -inf,
 * then logit_bias added; (3) repetition (ids in prompt or output: l > 0 ? l / r :
 * l * r), frequency (l -= f * in_output), presence (l -= p if in_output > 0);
 * (4) temperature < 1e-5: the largest, lowest id on ties; else l /=
 * temperature, min_p (drop p < min_p * p_max), top_k (keep l >= the k-th
 * largest, ties stay), top_p (in descending order keep the shortest prefix
 * whose mass reaches top_p, at least one; ties with its last member by lower
 * id); (5) of what is left the largest
 * l - log(e), e = -log(u(id)) an exponential variate from Philox4x32-10 with
 * key seed and counter (index, id): the draw depends on nothing else in the
 * batch.  Sums are made in a fixed order. */
struct sample_params {
    float temperature, top_p, min_p;
    float presence, frequency, repetition; /* 0, 0 and 1 are off */
    int32_t top_k;              /* 0: off */
    uint64_t seed;
    uint32_t index;             /* of the output token, from 0 */
    int32_t target;             /* >= 0: no draw, report this id (prompt scoring) */
    int32_t n_top;              /* 0..SAMPLE_MAX_TOP; -1: no logprobs wanted */
    const struct logit_bias *bias;
    const int32_t *banned;      /* ids that may not be drawn (min_tokens) */
    const struct token_count *counts; /* each id once; only read with penalties */
    uint32_t n_bias, n_banned, n_counts;
    /* NULL: all; else [(vocab + 31) / 32] words, bit id % 32 of word id / 32 for each id that may
     * be drawn.  If nothing is left of a row, its token is id 0, allowed or not. */
    const uint32_t *allowed;
};

struct sample_result {
    int32_t token;
    float logprob;              /* of token, raw; 0 when n_top is -1 */
    int32_t n_top;
    int32_t rank;               /* ids with logprob >= its own; 1 is best; 0: n_top is -1 */
    struct token_logprob top[SAMPLE_MAX_TOP]; /* descending, ties by lower id */
};

/* The results are host memory, valid after stream_sync.  tolerance: logprobs
 * 1e-5 absolute given equal logits; the token exact, unless two scores of step (5) are
 * closer than 1e-5. */
struct sample_args {
    struct sample_result *out;          /* host [R] */
    const float *logits;                /* [R, V]; contents undefined after the call */
    const struct sample_params *params; /* host [R] */
    int rows, vocab;
};

#ifdef __cplusplus
}
#endif
#endif
