#include "tests/support/kernel_reference.h"

#include "engine/base/mem.h"

#include <check.h>
#include <math.h>
#include <string.h>

const char *const test_all_isas[TEST_ALL_ISAS] = { "scalar", "avx2", "avx512" };

float bf16_value(bf16 v)
{
    uint32_t bits = (uint32_t)v << 16;
    float f;

    memcpy(&f, &bits, sizeof f);
    return f;
}

bf16 nearest_bf16(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof bits);
    bf16 inner = (bf16)(bits >> 16), outer = (bf16)(inner + 1);
    if (isnan(x))
        return 0x7fc0;
    if (isinf(x))
        return inner;
    double magnitude = fabs((double)x), below = fabs((double)bf16_value(inner));
    double above = isinf(bf16_value(outer)) ? 0x1p128 : fabs((double)bf16_value(outer));
    if (magnitude - below != above - magnitude)
        return magnitude - below < above - magnitude ? inner : outer;
    return inner % 2 ? outer : inner;
}

static bool odd_bits(int x)
{
    bool odd = false;

    for (; x; x &= x - 1)
        odd = !odd;
    return odd;
}

void rotate_slowly(double *out, const double *x, int head_dim)
{
    for (int row = 0; row < head_dim; row++) {
        out[row] = 0;
        for (int i = 0; i < head_dim; i++)
            out[row] += (odd_bits(row & i) ? -x[i] : x[i]) * rotation_sign(i);
        out[row] /= sqrt(head_dim);
    }
}

const struct latent_shape latent_shapes[N_LATENT_SHAPES] = {
    { 576, 20 }, { 160, 5 }, { 80, 1 }, { 64, 20 }, { 32, 7 },
};

int latent_dim_of(int head_dim)
{
    int latent = 1;

    while (2 * latent < head_dim)
        latent *= 2;
    return latent;
}

int blocks_of(int n_tokens)
{
    return (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

void *nan_alloc(size_t bytes)
{
    return memset(mem_alloc(bytes), 0xff, bytes);
}

void random_order(struct test_random *r, int32_t *out, int n)
{
    for (int i = 0; i < n; i++) {
        int j = random_below(r, i + 1);
        out[i] = out[j];
        out[j] = i;
    }
}

void random_channels(struct test_random *r, int16_t *out, const struct kv_shape *shape)
{
    int32_t order[256];

    ck_assert_int_le(shape->head_dim, 256);
    for (int g = 0; g < shape->kv_heads; g++) {
        random_order(r, order, shape->head_dim);
        for (int i = 0; i < INDEX_CHANNELS_KEPT; i++)
            *out++ = (int16_t)order[i];
    }
}

struct backend *open_with_threads(const char *isa, int threads)
{
    struct backend_options options = { .threads = threads, .isa = isa };
    struct backend *be = NULL;
    struct error err;
    enum status status = backend_open(&be, "cpu", &options, &err);

    ck_assert_msg(status == ST_OK || status == ST_UNSUPPORTED, "%s", err.text);
    return status == ST_OK ? be : NULL;
}
