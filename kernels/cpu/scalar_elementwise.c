#include "kernels/cpu/elementwise.h"

#include "kernels/cpu/linear.h"

#include <math.h>

static float scalar_add_square(float *x, const float *delta, int n)
{
    float sum = 0;

    for (int i = 0; i < n; i++) {
        if (delta)
            x[i] += delta[i];
        sum += x[i] * x[i];
    }
    return sum;
}

static void scalar_scale(float *out, const float *x, float factor, const void *weight,
                         enum dtype weight_type, int n)
{
    for (int i = 0; i < n; i++)
        out[i] = x[i] * factor * weight_at(weight, weight_type, (size_t)i);
}

static void scalar_silu_mul(float *out, const float *gate, const float *up, int n)
{
    for (int i = 0; i < n; i++)
        out[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
}

const struct row_leaf scalar_row_leaf = {
    .add_square = scalar_add_square,
    .scale = scalar_scale,
    .silu_mul = scalar_silu_mul,
};
