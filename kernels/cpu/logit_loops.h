#ifndef KERNELS_CPU_LOGIT_LOOPS_H
#define KERNELS_CPU_LOGIT_LOOPS_H

#include "kernels/cpu/logit_leaf.h"
#include "kernels/philox.h"

/* The bodies of the logit leaves, compiled once for each instruction set: loops that
 * the compiler turns into vectors by itself, because every element stands alone or is
 * reduced by an integer operation, and floats are added by halving.  Gcc does so only
 * where nothing that could raise a floating-point exception is behind a condition.  The
 * arithmetic is the same in each, so all instruction sets sample the same tokens. */

/* e^x for x <= 0 as 2^n e^r, |r| <= 0.347: the Taylor polynomial of degree 7 is off by
 * r^8 / 8!, 5e-9.  Adding 1.5 * 2^23 rounds to an integer and leaves it in the low
 * bits.  Below -87 the result would be denormal: e^-87 there, 0 to float precision beside
 * the 1 of the maximum; the cut is made on the bits, which grow as x falls. */
static inline float exp_below_zero(float x)
{
    const float shift = 12582912.0f;
    uint32_t word = float_word(x), least = 0xc2ae0000u;         /* -87 */
    float cut = word_float(word < least ? word : least);
    float rounded = cut * 1.44269504f + shift, n = rounded - shift;
    float r = (cut - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;   /* ln 2 in two parts */
    float p = 1.0f / 5040;

    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * word_float((float_word(rounded) + 127) << 23);   /* times 2^n */
}

static inline float scaled(float l, const struct logit_scale *scale)
{
    return (l - scale->max) / scale->temperature;
}

/* Halves a block until one is left; the order of additions depends on nothing. */
static inline float block_sum(float *e)
{
    for (int i = 0; i < 128; i++)
        e[i] += e[i + 128];
    for (int i = 0; i < 64; i++)
        e[i] += e[i + 64];
    for (int i = 0; i < 32; i++)
        e[i] += e[i + 32];
    for (int i = 0; i < 16; i++)
        e[i] += e[i + 16];
    for (int i = 0; i < 8; i++)
        e[i] += e[i + 8];
    return ((e[0] + e[4]) + (e[2] + e[6])) + ((e[1] + e[5]) + (e[3] + e[7]));
}

static bool survey_loop(int32_t *block_max, const float *l, int n)
{
    uint32_t largest = 0;

    for (int from = 0; from < n; from += LOGIT_BLOCK) {
        int end = n - from < LOGIT_BLOCK ? n - from : LOGIT_BLOCK;
        int32_t max = INT32_MIN;
        for (int i = 0; i < end; i++) {
            int32_t key = order_key(l[from + i]);
            uint32_t bits;
            memcpy(&bits, &l[from + i], sizeof bits);
            bits &= INT32_MAX;
            max = key > max ? key : max;
            largest = bits > largest ? bits : largest;
        }
        block_max[from / LOGIT_BLOCK] = max;
    }
    return largest <= 0x7f800000u;             /* the bits of infinity */
}

static double mass_loop(const float *l, int n, const struct logit_scale *scale, int32_t from)
{
    struct logit_scale by = *scale;
    float e[LOGIT_BLOCK];

    for (int i = 0; i < n; i++) {
        float counts = order_key(l[i]) >= from ? 1.0f : 0.0f;
        e[i] = counts * exp_below_zero(scaled(l[i], &by));
    }
    for (int i = n; i < LOGIT_BLOCK; i++)
        e[i] = 0.0f;
    return (double)block_sum(e);
}

static double weigh_loop(float *w, const int32_t *key, int n, const struct logit_scale *scale)
{
    struct logit_scale by = *scale;
    double sum = 0;

    for (int from = 0; from < n; from += LOGIT_BLOCK) {
        int end = n - from < LOGIT_BLOCK ? n - from : LOGIT_BLOCK;
        float e[LOGIT_BLOCK];
        for (int i = 0; i < end; i++)
            e[i] = exp_below_zero(scaled(key_float(key[from + i]), &by));
        for (int i = end; i < LOGIT_BLOCK; i++)
            e[i] = 0.0f;
        memcpy(w + from, e, (size_t)end * sizeof *w);
        sum += (double)block_sum(e);
    }
    return sum;
}

static int count_loop(const float *l, int n, int32_t from)
{
    int count = 0;

    for (int i = 0; i < n; i++)
        count += order_key(l[i]) >= from;
    return count;
}

static int draw_loop(const int32_t *key, const int32_t *id, int n,
                     const struct logit_draw *draw)
{
    struct logit_draw by = *draw;
    int32_t best = INT32_MIN, score[LOGIT_BLOCK];
    int at = 0;

    for (int from = 0; from < n; from += LOGIT_BLOCK) {
        int end = n - from < LOGIT_BLOCK ? n - from : LOGIT_BLOCK;
        int32_t max = INT32_MIN;
        for (int i = 0; i < end; i++) {
            float x = scaled(key_float(key[from + i]), &by.scale);
            uint32_t bits = sample_bits(by.seed, by.index, id[from + i]);
            score[i] = order_key(x + gumbel_of(bits));
        }
        for (int i = 0; i < end; i++)
            max = score[i] > max ? score[i] : max;
        if (max <= best)
            continue;
        best = max;
        for (at = 0; score[at] != max; at++)
            ;
        at += from;
    }
    return at;
}

#define LOGIT_LOOPS                                                                        \
    {                                                                                      \
        .survey = survey_loop, .mass = mass_loop, .weigh = weigh_loop, .count = count_loop, \
        .draw = draw_loop,                                                                 \
    }

#endif
