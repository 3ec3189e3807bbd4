#include "kernels/cpu/linear.h"

void scalar_dot_block(const struct dot_block *b)
{
    for (int r = 0; r < b->rows; r++) {
        const float *x = b->x + (size_t)r * b->x_stride;
        float *out = b->out + (size_t)r * b->out_stride;
        for (int o = 0; o < b->outs; o++) {
            const void *w = weight_offset(b->weight, b->type, (size_t)o * (size_t)b->in_dim);
            float sum = 0;
            for (int k = 0; k < b->in_dim; k++)
                sum += x[k] * weight_at(w, b->type, (size_t)k);
            out[o] = b->bias ? sum + weight_at(b->bias, b->type, (size_t)o) : sum;
        }
    }
}

void scalar_turned_block(const struct dot_block *b)
{
    for (int r = 0; r < b->rows; r++) {
        const float *x = b->x + (size_t)r * b->x_stride;
        float *out = b->out + (size_t)r * b->out_stride;
        for (int o = 0; o < b->outs; o++)
            out[o] = 0;
        for (int k = 0; k < b->in_dim; k++)
            for (int o = 0; o < b->outs; o++)
                out[o] += x[k] * weight_at(b->weight, b->type,
                                           (size_t)k * b->weight_stride + (size_t)o);
    }
}
