#include "tests/support/gpu_compare.h"

#include "engine/base/mem.h"
#include "kernels/cpu/cpu.h"
#include "tests/support/gpu_fixture.h"

#include <check.h>
#include <math.h>
#include <string.h>

void gpu_clean(void)
{
    if (gpu_backend())
        gpu_forget();
}

/* The sum of four uniform values, the 16-bit pieces of one random number: variance 4/3. */
static float quick_normal(struct test_random *r)
{
    uint64_t bits = random_u64(r);
    int sum = 0;

    for (int i = 0; i < 4; i++)
        sum += (int)(bits >> 16 * i & 0xffff);
    return (float)(sum - 2 * 0xffff) * (0.8660254f / 0x1p15f);
}

float *random_acts(struct test_random *r, size_t n, float scale)
{
    float *out = mem_alloc((n + 1) * sizeof *out);

    for (size_t i = 0; i < n; i++)
        out[i] = bf16_to_float(float_to_bf16(quick_normal(r) * scale));
    return out;
}

void *random_weights(struct test_random *r, size_t n, enum dtype type, float scale)
{
    void *out = mem_alloc((n + 1) * dtype_bytes(type));

    for (size_t i = 0; i < n; i++) {
        float w = quick_normal(r) * scale;
        if (type == DTYPE_F32)
            ((float *)out)[i] = w;
        else
            ((bf16 *)out)[i] = float_to_bf16(w);
    }
    return out;
}

const void *gpu_put_weights(const void *host, size_t n, enum dtype type, int skip)
{
    size_t e = dtype_bytes(type), before = (size_t)skip * 16;
    char *shifted = mem_alloc(before + n * e);

    memset(shifted, 0xff, before);
    memcpy(shifted + before, host, n * e);
    const char *device = gpu_put(shifted, before + n * e);
    mem_free(shifted);
    return device + before;
}

static double largest(const float *row, size_t dim)
{
    double most = 0;

    for (size_t i = 0; i < dim; i++)
        most = fmax(most, fabs((double)row[i]));
    return most;
}

float *widened(const bf16 *x, size_t n)
{
    float *out = mem_alloc(n * sizeof *out);

    for (size_t i = 0; i < n; i++)
        out[i] = bf16_to_float(x[i]);
    return out;
}

void assert_rows_near(const char *shape, const struct row_pair *p)
{
    size_t got_stride = p->got_stride ? p->got_stride : p->dim;
    size_t want_stride = p->want_stride ? p->want_stride : p->dim;

    for (size_t row = 0; row < p->rows; row++) {
        const float *got = p->got + row * got_stride, *want = p->want + row * want_stride;
        double most = largest(want, p->dim), allowed = p->tolerance * most;
        for (size_t i = 0; i < p->dim; i++)
            if (!(fabs((double)got[i] - (double)want[i]) <= allowed))
                ck_abort_msg("%s: row %zu, column %zu is %.9g, not %.9g: off by %.3g of the "
                             "row's largest, %.3g allowed", shape, row, i, (double)got[i],
                             (double)want[i], fabs((double)got[i] - (double)want[i]) / most,
                             p->tolerance);
    }
}

float largest_difference(const float *got, const float *want, size_t n)
{
    float most = 0;

    for (size_t i = 0; i < n; i++) {
        float off = fabsf(got[i] - want[i]);
        if (isnan(off))
            return off;
        most = fmaxf(most, off);
    }
    return most;
}

static bool unwritten(const unsigned char *at, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        if (at[i] != 0xff)
            return false;
    return true;
}

void assert_unwritten(const char *shape, const void *got, size_t bytes)
{
    const unsigned char *at = got;

    for (size_t i = 0; i < bytes; i++)
        if (at[i] != 0xff)
            ck_abort_msg("%s: byte %zu of %zu that are nobody's is %02x", shape, i, bytes,
                         at[i]);
}

void assert_gaps_unwritten(const char *shape, const void *got, const struct gaps *g)
{
    const unsigned char *at = got;

    for (size_t row = 0; row < g->rows; row++) {
        size_t from = row * g->stride + g->dim;
        size_t to = row + 1 < g->rows ? (row + 1) * g->stride : g->total;
        if (!unwritten(at + from * g->element_bytes, (to - from) * g->element_bytes))
            ck_abort_msg("%s: row %zu: something behind its %zu columns was written", shape,
                         row, g->dim);
    }
}

void assert_same_bits(const char *shape, const bf16 *got, const bf16 *want, size_t rows,
                      size_t dim)
{
    for (size_t row = 0; row < rows; row++) {
        const bf16 *g = got + row * dim, *w = want + row * dim;
        if (memcmp(g, w, dim * sizeof *g) == 0)
            continue;
        for (size_t i = 0; i < dim; i++)
            if (g[i] != w[i])
                ck_abort_msg("%s: row %zu, column %zu is %.9g, not exactly %.9g", shape, row,
                             i, (double)bf16_to_float(g[i]), (double)bf16_to_float(w[i]));
    }
}
