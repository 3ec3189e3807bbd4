#include "kernels/cpu/elementwise.h"

#include <math.h>

/* A task is a few rows, several thousand elements. */
enum { ROWS_A_TASK = 4 };

struct norm {
    struct add_norm_args args;
    const struct row_leaf *leaf;
};

static void norm_task(void *arg, int task, int worker)
{
    const struct norm *n = arg;
    const struct add_norm_args *a = &n->args;
    const size_t dim = (size_t)a->dim, stride = a->x_stride ? (size_t)a->x_stride : dim;
    int end = (task + 1) * ROWS_A_TASK;

    (void)worker;
    for (int t = task * ROWS_A_TASK; t < end && t < a->rows; t++) {
        size_t from = (size_t)(a->rows_of ? a->rows_of[t] : t) * stride;
        float *x = (float *)a->x + from;
        const float *delta = a->delta ? (const float *)a->delta + from : NULL;
        float square = n->leaf->add_square(x, delta, a->dim);
        float factor = 1 / sqrtf(square / (float)a->dim + a->eps);
        n->leaf->scale((float *)a->out + (size_t)t * dim, x, factor, a->weight,
                       a->weight_type, a->dim);
    }
}

void cpu_add_norm(struct stream *s, const struct add_norm_args *a)
{
    struct norm n = { .args = *a, .leaf = row_leaf_of(s) };

    if (s->failed == ST_OK)
        workers_run(s->be->workers, (a->rows + ROWS_A_TASK - 1) / ROWS_A_TASK, norm_task, &n);
}
