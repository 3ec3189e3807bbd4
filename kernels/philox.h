#ifndef KERNELS_PHILOX_H
#define KERNELS_PHILOX_H

#include <stdint.h>
#include <string.h>

/* The random numbers of sampling, for C and CUDA C++.
 *
 * Philox4x32-10 is the counter-based generator of J. K. Salmon, M. A. Moraes, R. O.
 * Dror and D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: a
 * keyed bijection of 128-bit counters.  Nothing is carried from draw to draw, so a
 * draw is a function of (seed, index of the output token, token id) and any part of
 * it can be computed anywhere, in any order.
 *
 *   key      (low half of seed, high half of seed)
 *   counter  (index, id, 0, 0)
 *   bits     word 0 of the result
 *   u        (bits + 0.5) / 2^32, in (0, 1) and symmetric: 1 - u is the same of ~bits
 *   e        -log(u), an exponential variate, from 2^-33 to 33 log 2
 *   gumbel   -log(e), what step (5) of sample adds to a logit
 *
 * All 32 bits count: the largest gumbel, 22.9, is what lets ids of probability 1e-9
 * be drawn as often as they should.  Near u = 1 a float cannot hold u but can hold
 * 1 - u, so e is made of the one that is exact enough; gumbel is float arithmetic
 * within 3e-6 of the real value, most of that one rounding of a number up to 22.9.
 * There is no branch and no call, so that compilers turn loops over ids into vectors. */

#ifdef __CUDACC__
#define PHILOX_FN static __host__ __device__ inline
#else
#define PHILOX_FN static inline
#endif

struct philox_words { uint32_t a, b, c, d; };

/* Round n, from 0.  The key grows by the golden ratio and by sqrt(3) - 1. */
PHILOX_FN struct philox_words philox_round(struct philox_words x, uint64_t key, uint32_t n)
{
    uint32_t low = (uint32_t)key + n * 0x9e3779b9u;
    uint32_t high = (uint32_t)(key >> 32) + n * 0xbb67ae85u;
    uint64_t p = (uint64_t)0xd2511f53u * x.a, q = (uint64_t)0xcd9e8d57u * x.c;
    struct philox_words y = { (uint32_t)(q >> 32) ^ x.b ^ low, (uint32_t)q,
                              (uint32_t)(p >> 32) ^ x.d ^ high, (uint32_t)p };

    return y;
}

/* Written out, because a loop in here keeps gcc from making vectors of the caller's. */
PHILOX_FN struct philox_words philox4x32(struct philox_words x, uint64_t key)
{
    x = philox_round(philox_round(x, key, 0), key, 1);
    x = philox_round(philox_round(x, key, 2), key, 3);
    x = philox_round(philox_round(x, key, 4), key, 5);
    x = philox_round(philox_round(x, key, 6), key, 7);
    return philox_round(philox_round(x, key, 8), key, 9);
}

PHILOX_FN uint32_t sample_bits(uint64_t seed, uint32_t index, int32_t id)
{
    struct philox_words counter = { index, (uint32_t)id, 0, 0 };

    return philox4x32(counter, seed).a;
}

/* log((1 + f) 2^k) for 1 + f from sqrt(1/2) to sqrt(2): with s = f / (2 + f) the
 * logarithm of 1 + f is 2 atanh(s) = 2 (s + s^3/3 + ...), |s| <= 0.172; the first
 * term left out, 2 s^11 / 11, is 2e-9 of the sum. */
PHILOX_FN float log_scaled(float f, float k)
{
    float s = f / (2.0f + f), z = s * s;
    float series = 1.0f + z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9))));

    return k * 0.693147181f + 2.0f * s * series;
}

PHILOX_FN uint32_t float_word(float v)
{
    uint32_t word;

    memcpy(&word, &v, sizeof word);
    return word;
}

PHILOX_FN float word_float(uint32_t word)
{
    float v;

    memcpy(&v, &word, sizeof v);
    return v;
}

/* v = (1 + f) 2^k as log_scaled() wants it; v is normal and positive. */
PHILOX_FN float split_scale(float v, float *k)
{
    const uint32_t half_root = 0x3f3504f3u;    /* sqrt(1/2) as a float */
    int32_t exponent = (int32_t)(float_word(v) - half_root) >> 23;

    *k = (float)exponent;
    return word_float(float_word(v) - ((uint32_t)exponent << 23)) - 1.0f;
}

PHILOX_FN float gumbel_of(uint32_t bits)
{
    const float unit = 1.0f / 4294967296.0f;   /* 2^-32 */
    float u = ((float)bits + 0.5f) * unit, left = ((float)~bits + 0.5f) * unit;
    float k, f = split_scale(u, &k);

    /* From u = sqrt(1/2) on, where k is 0, f is -(1 - u) without the rounding of u.
     * Chosen by mask: gcc makes a branch of a condition here. */
    uint32_t near_one = 0u - (uint32_t)(bits >= 0xb504f334u);
    f = word_float((float_word(-left) & near_one) | (float_word(f) & ~near_one));
    float e = -log_scaled(f, k);
    f = split_scale(e, &k);
    return -log_scaled(f, k);
}

#endif
