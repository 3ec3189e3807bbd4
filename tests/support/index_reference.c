#include "tests/support/index_reference.h"

#include "engine/base/mem.h"
#include "tests/support/kernel_reference.h"

#include <math.h>
#include <string.h>

float get_bf16(const uint8_t *at)
{
    bf16 v;

    memcpy(&v, at, sizeof v);
    return bf16_value(v);
}

void put_bf16(uint8_t *at, float value)
{
    bf16 v = nearest_bf16(value);

    memcpy(at, &v, sizeof v);
}

void set_bits(uint8_t *codes, int at, unsigned value)
{
    codes[at / 8] = (uint8_t)(codes[at / 8] | value << at % 8);
}

int code_bits(const uint8_t *codes, int number, int n)
{
    int value = 0;

    for (int i = 0; i < n; i++) {
        int at = number * n + i;
        value |= (codes[at / 8] >> at % 8 & 1) << i;
    }
    return value;
}

float rms_exactly(const float *x, int n)
{
    float *sum = mem_alloc((size_t)n * sizeof *sum);

    for (int i = 0; i < n; i++)
        sum[i] = x[i] * x[i];
    for (int left = n / 2; left > 0; left /= 2)
        for (int i = 0; i < left; i++)
            sum[i] = sum[i] + sum[i + left];
    float rms = sqrtf(sum[0] * (1 / (float)n));
    mem_free(sum);
    return rms;
}

void rotate_exactly(float *x, int n)
{
    for (int i = 0; i < n; i++)
        x[i] *= (float)rotation_sign(i);
    for (int distance = 1; distance < n; distance *= 2)
        for (int i = 0; i < n; i++)
            if (!(i & distance)) {
                float a = x[i], b = x[i | distance];
                x[i] = a + b;
                x[i | distance] = a - b;
            }
    for (int i = 0; i < n; i++)
        x[i] *= 1 / sqrtf((float)n);
}

void index_part(uint8_t *scale, uint8_t *sign, uint8_t *large, const float *key, int n)
{
    float *x = mem_alloc((size_t)n * sizeof *x);

    put_bf16(scale, 0.996f * rms_exactly(key, n));
    memcpy(x, key, (size_t)n * sizeof *x);
    rotate_exactly(x, n);
    memset(sign, 0, (size_t)n / 8);
    memset(large, 0, (size_t)n / 8);
    for (int d = 0; d < n && get_bf16(scale) != 0; d++) {
        set_bits(sign, d, x[d] >= 0);
        set_bits(large, d, fabsf(x[d]) >= get_bf16(scale));
    }
    mem_free(x);
}

void widen_record(uint8_t *record, const struct kv_shape *shape, const bf16 *key, int token)
{
    const struct index_layout l = index_layout(shape);

    for (int i = 0; i < shape->head_dim && l.lo >= 0; i++) {
        float x = bf16_value(key[i]);
        if (token == 0 || x < get_bf16(record + l.lo + 2 * i))
            memcpy(record + l.lo + 2 * i, &key[i], sizeof key[i]);
        if (token == 0 || x > get_bf16(record + l.hi + 2 * i))
            memcpy(record + l.hi + 2 * i, &key[i], sizeof key[i]);
    }
}

void add_record_means(uint8_t *record, const struct kv_shape *shape, const bf16 *keys,
                      size_t stride)
{
    const struct index_layout l = index_layout(shape);
    int dim = shape->head_dim, first = shape->latent_dim ? shape->latent_dim : dim;
    float *x = mem_alloc((size_t)dim * sizeof *x);
    uint8_t *large = mem_alloc((size_t)dim / 8);

    for (int i = 0; i < BLOCK_MEANS && l.mean_sign >= 0; i++) {
        const bf16 *k = keys + (size_t)(2 * i) * stride;
        uint8_t *scale = record + l.mean_scale + 2 * index_parts(shape) * i;
        uint8_t *sign = record + l.mean_sign + dim / 8 * i;
        for (int d = 0; d < dim; d++)
            x[d] = (bf16_value(k[d]) + bf16_value((k + stride)[d])) / 2;
        index_part(scale, sign, large, x, first);
        if (first < dim)
            index_part(scale + 2, sign + first / 8, large, x + first, dim - first);
    }
    mem_free(x);
    mem_free(large);
}
