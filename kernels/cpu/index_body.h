#ifndef KERNELS_CPU_INDEX_BODY_H
#define KERNELS_CPU_INDEX_BODY_H

/* The index leaf in plain loops, included by the file of each instruction set: the
 * compiler makes vectors of them, and because it may neither reorder nor fuse, each set
 * gives the same bits. */

#include <math.h>
#include <string.h>

/* Consumes s. */
static float halving_sum(float *s, int n)
{
    for (int half = n / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            s[i] += s[i + half];
    return s[0];
}

static float mean_square(const float *x, int n)
{
    float s[MOST_PART_DIM];

    for (int i = 0; i < n; i++)
        s[i] = x[i] * x[i];
    return halving_sum(s, n) * (1.0f / (float)n);
}

static void leaf_norm(float *x, const float *weight, int n, float eps)
{
    float factor = 1 / sqrtf(mean_square(x, n) + eps);

    for (int i = 0; i < n; i++)
        x[i] = x[i] * factor * weight[i];
}

static void leaf_turn(float *x, const float *cos_sin, int n)
{
    int half = n / 2;

    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos_sin[i] - b * cos_sin[i + half];
        x[i + half] = b * cos_sin[i] + a * cos_sin[i + half];
    }
}

static void leaf_turn_pairs(float *x, const float *cos_sin, int n)
{
    for (int i = 0; i < n / 2; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cos_sin[i] - b * cos_sin[i + n / 2];
        x[2 * i + 1] = b * cos_sin[i] + a * cos_sin[i + n / 2];
    }
}

/* One stage of the Hadamard transform; `distance` is constant where it is inlined. */
static inline __attribute__((always_inline)) void butterflies(float *x, int n,
                                                              const int distance)
{
    for (int from = 0; from < n; from += 2 * distance)
        for (int i = from; i < from + distance; i++) {
            float a = x[i], b = x[i + distance];
            x[i] = a + b;
            x[i + distance] = a - b;
        }
}

static void leaf_rotate(float *out, const float *x, int n)
{
    float factor = 1 / sqrtf((float)n);

    for (int i = 0; i < n; i++)
        out[i] = rotation_sign(i) < 0 ? -x[i] : x[i];
    butterflies(out, n, 1);
    butterflies(out, n, 2);
    butterflies(out, n, 4);
    butterflies(out, n, 8);
    for (int distance = 16; distance < n; distance *= 2)
        butterflies(out, n, distance);
    for (int i = 0; i < n; i++)
        out[i] *= factor;
}

/* key is also in x. */
static void widen_bounds(const struct index_record *r, const bf16 *key, const float *x,
                         int token)
{
    bf16 *lo = (bf16 *)(void *)(r->base + r->layout.lo);
    bf16 *hi = (bf16 *)(void *)(r->base + r->layout.hi);

    for (int i = 0; i < r->head_dim; i++) {
        if (token == 0 || x[i] < bf16_to_float(lo[i]))
            lo[i] = key[i];
        if (token == 0 || x[i] > bf16_to_float(hi[i]))
            hi[i] = key[i];
    }
}

static void put_scale(const struct index_record *r, int offset, int number, bf16 scale)
{
    memcpy(r->base + offset + 2 * number, &scale, sizeof scale);
}

static bf16 scale_of(const float *x, int n)
{
    return float_to_bf16(0.996f * sqrtf(mean_square(x, n)));
}

/* n channels x of a key, which are rotated by themselves: their scale and planes, without the
 * second where large is NULL. */
static void put_rotated(uint8_t *scale, uint8_t *sign, uint8_t *large, const float *x, int n)
{
    float y[MOST_PART_DIM];
    bf16 rounded = scale_of(x, n);
    float limit = bf16_to_float(rounded);

    memcpy(scale, &rounded, sizeof rounded);
    memset(sign, 0, (size_t)n / 8);
    if (large)
        memset(large, 0, (size_t)n / 8);
    if (limit == 0)
        return;
    leaf_rotate(y, x, n);
    for (int b = 0; b < n / 8; b++) {
        unsigned s = 0, l = 0;
        for (int i = 0; i < 8; i++) {
            s |= (unsigned)(y[8 * b + i] >= 0) << i;
            l |= (unsigned)(fabsf(y[8 * b + i]) >= limit) << i;
        }
        sign[b] = (uint8_t)s;
        if (large)
            large[b] = (uint8_t)l;
    }
}

/* The key x as number `number` of those whose scales, signs and second plane begin at these
 * offsets; large -1: it has none. */
static void add_rotated(const struct index_record *r, const float *x, int number, int scale,
                        int sign, int large)
{
    int first = r->latent_dim ? r->latent_dim : r->head_dim, parts = r->latent_dim ? 2 : 1;

    for (int part = 0; part < parts; part++) {
        int from = part * first, n = part ? r->head_dim - first : first;
        int at = (number * r->head_dim + from) / 8;
        put_rotated(r->base + scale + 2 * (number * parts + part), r->base + sign + at,
                    large < 0 ? NULL : r->base + large + at, x + from, n);
    }
}

static void leaf_add_means(const struct index_record *r, const bf16 *keys, size_t stride)
{
    _Static_assert(MEAN_TOKENS == 2, "the sum");
    for (int i = 0; i < BLOCK_MEANS; i++) {
        const bf16 *k = keys + (size_t)i * MEAN_TOKENS * stride;
        float x[MOST_HEAD_DIM];
        for (int d = 0; d < r->head_dim; d++)
            x[d] = (bf16_to_float(k[d]) + bf16_to_float(k[stride + (size_t)d])) * 0.5f;
        add_rotated(r, x, i, r->layout.mean_scale, r->layout.mean_sign, -1);
    }
}

static unsigned fine_code(float x, float scale)
{
    float level = rintf(x / scale);

    level = level < -7 ? -7 : level > 7 ? 7 : level;
    return (unsigned)((level == level ? (int)level : 0) + 8);
}

static void add_channels_kept(const struct index_record *r, const float *key, int token)
{
    enum { KEPT = INDEX_CHANNELS_KEPT };
    uint8_t *coarse = r->base + r->layout.coarse + token * (KEPT / 4);
    uint8_t *fine = r->base + r->layout.fine + token * (KEPT / 2);
    float x[KEPT], top = 0;

    for (int i = 0; i < KEPT; i++) {
        x[i] = key[r->channels[i]];
        top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    }
    bf16 rounded2 = scale_of(x, KEPT), rounded4 = float_to_bf16(top / 7);
    float scale2 = bf16_to_float(rounded2), scale4 = bf16_to_float(rounded4);
    put_scale(r, r->layout.scale2, token, rounded2);
    put_scale(r, r->layout.scale4, token, rounded4);
    memset(coarse, 0, KEPT / 4);
    memset(fine, 0, KEPT / 2);
    for (int i = 0; i < KEPT; i++) {
        unsigned code = (unsigned)(x[i] >= -scale2) + (x[i] >= 0) + (x[i] >= scale2);
        if (scale2 != 0)
            coarse[i / 4] = (uint8_t)(coarse[i / 4] | code << 2 * (i % 4));
        if (scale4 != 0)
            fine[i / 2] = (uint8_t)(fine[i / 2] | fine_code(x[i], scale4) << 4 * (i % 2));
    }
}

static void leaf_add_key(const struct index_record *r, const bf16 *key, int token)
{
    float x[MOST_HEAD_DIM];

    for (int i = 0; i < r->head_dim; i++)
        x[i] = bf16_to_float(key[i]);
    if (r->layout.lo >= 0)
        widen_bounds(r, key, x, token);
    if (r->kind == INDEX_CHANNELS)
        add_channels_kept(r, x, token);
    else
        add_rotated(r, x, token, r->layout.scale, r->layout.sign, r->layout.large);
}

static float leaf_bound(const float *q, const bf16 *lo, const bf16 *hi, int n)
{
    float s[MOST_PART_DIM];

    for (int i = 0; i < n; i++) {
        float a = q[i] * bf16_to_float(lo[i]), b = q[i] * bf16_to_float(hi[i]);
        s[i] = a > b ? a : b;
    }
    return halving_sum(s, n);
}

static float leaf_scale_scores(float *score, const bf16 *scale, int n)
{
    enum { LANES_KEPT = 16 };
    float top[LANES_KEPT], best;

    for (int t = 0; t < BLOCK_TOKENS; t++)
        score[t] *= bf16_to_float(scale[t]);
    if (n < BLOCK_TOKENS) {
        best = score[0];
        for (int t = 1; t < n; t++)
            best = score[t] > best ? score[t] : best;
        return best;
    }
    for (int i = 0; i < LANES_KEPT; i++)
        top[i] = score[i];
    for (int t = LANES_KEPT; t < BLOCK_TOKENS; t += LANES_KEPT)
        for (int i = 0; i < LANES_KEPT; i++)
            top[i] = score[t + i] > top[i] ? score[t + i] : top[i];
    best = top[0];
    for (int i = 1; i < LANES_KEPT; i++)
        best = top[i] > best ? top[i] : best;
    return best;
}

enum { MOST_CODE_WORDS = 2 * MOST_PART_DIM / 32 };

/* Codes in words, turned: [word][token], tokens into lanes.  bytes is a multiple of 4. */
static inline void turn_words(uint32_t *out, const struct index_codes *codes)
{
    for (int p = 0; p < codes->parts; p++)
        for (int w = 0; w < codes->bytes / 4; w++, out += BLOCK_TOKENS)
            for (int t = 0; t < BLOCK_TOKENS; t++)
                memcpy(&out[t], codes->part[p] + t * codes->bytes + 4 * w, 4);
}

#endif
