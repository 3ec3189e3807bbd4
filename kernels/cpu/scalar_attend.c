#include "kernels/cpu/attend.h"

#include <math.h>

static float dot(const float *q, const bf16 *k, int n)
{
    float sum = 0;

    for (int d = 0; d < n; d++)
        sum += q[d] * bf16_to_float(k[d]);
    return sum;
}

/* The first n tokens of the block into the state of query i. */
static void take_one(struct attend_tile *t, int i, const struct attend_block *b, int n)
{
    const float *q = t->q + (size_t)i * (size_t)t->head_dim;
    float *acc = t->state.acc + (size_t)i * (size_t)t->value_dim;
    float *score = t->work, max = t->state.max[i], sum = 0;

    for (int j = 0; j < n; j++) {
        score[j] = dot(q, b->row[j], t->head_dim);
        max = score[j] > max ? score[j] : max;
    }
    float shrink = expf(t->state.max[i] - max);
    for (int d = 0; d < t->value_dim; d++)
        acc[d] *= shrink;
    for (int j = 0; j < n; j++) {
        const bf16 *v = b->row[j] + t->value_at;
        float weight = expf(score[j] - max);
        sum += weight;
        for (int d = 0; d < t->value_dim; d++)
            acc[d] += weight * bf16_to_float(v[d]);
    }
    t->state.sum[i] = t->state.sum[i] * shrink + sum;
    t->state.max[i] = max;
}

static void scalar_take(struct attend_tile *t, const struct attend_block *b)
{
    for (int i = 0; i < t->n; i++) {
        int sees = t->see[i] - b->first;
        if (sees > 0)
            take_one(t, i, b, sees < b->n ? sees : b->n);
    }
}

static void scalar_finish(float *out, const float *acc, float factor, int value_dim)
{
    for (int d = 0; d < value_dim; d++)
        out[d] = acc[d] * factor;
}

const struct attend_leaf scalar_attend_leaf = {
    .take = scalar_take,
    .finish = scalar_finish,
};
