#ifndef ROPE_H
#define ROPE_H

#include <stdbool.h>

/* Rotary frequencies with the scalings that are implemented.  All of them are
 * static: a position's angle never depends on the length of the context. */

enum rope_kind { ROPE_DEFAULT, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN };

struct rope_params {
    enum rope_kind kind;
    double theta;
    double factor;               /* linear, llama3, yarn: > 0 */
    double original;             /* llama3, yarn: positions before scaling */
    double low_freq_factor, high_freq_factor; /* llama3 */
    double beta_fast, beta_slow; /* yarn, rotations */
    double mscale, mscale_all_dim;            /* yarn; 0: not given */
    double attention_factor;     /* yarn; 0: derived */
    bool truncate;               /* yarn: round the ramp's ends outwards */
};

/* inv_freq [head_dim / 2]; *factor multiplies cos and sin.  The order of
 * roundings is the reference implementation's, since one ulp of a
 * frequency is 0.008 rad at position 200,000. */
void rope_frequencies(float *inv_freq, float *factor, const struct rope_params *p,
                      int head_dim);

/* By how much YaRN makes scores sharper for a context stretched by factor. */
double rope_mscale(double factor, double mscale);

#endif
