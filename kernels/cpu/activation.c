#include "kernels/cpu/elementwise.h"

/* A task is part of one row: a decode step has one long row, prefill has many.  The
 * pieces are whole vectors, so that cutting moves no element to a tail. */
enum { PIECE = 2048 };

struct activation {
    struct silu_mul_args args;
    const struct row_leaf *leaf;
    int pieces_a_row;
};

static void silu_task(void *arg, int task, int worker)
{
    const struct activation *act = arg;
    const struct silu_mul_args *a = &act->args;
    size_t row = (size_t)(task / act->pieces_a_row);
    int from = task % act->pieces_a_row * PIECE;
    int n = a->dim - from < PIECE ? a->dim - from : PIECE;
    size_t in = row * (size_t)a->in_stride + (size_t)from;

    (void)worker;
    act->leaf->silu_mul((float *)a->out + row * (size_t)a->dim + from,
                        (const float *)a->gate + in, (const float *)a->up + in, n);
}

void cpu_silu_mul(struct stream *s, const struct silu_mul_args *a)
{
    struct activation act = {
        .args = *a,
        .leaf = row_leaf_of(s),
        .pieces_a_row = (a->dim + PIECE - 1) / PIECE,
    };

    if (s->failed == ST_OK)
        workers_run(s->be->workers, a->rows * act.pieces_a_row, silu_task, &act);
}

void cpu_linear_gated(struct stream *s, const struct linear_gated_args *a)
{
    float *gate = a->scratch, *up = gate + a->dim;
    struct linear_args product = {
        .out = gate, .x = a->x, .weight = a->gate, .weight_type = a->weight_type,
        .rows = a->rows, .in_dim = a->in_dim, .out_dim = a->dim, .out_stride = 2 * a->dim };

    cpu_linear(s, &product);
    product.out = up;
    product.weight = a->up;
    cpu_linear(s, &product);
    cpu_silu_mul(s, &(struct silu_mul_args){ .out = a->out, .gate = gate, .up = up,
                                             .rows = a->rows, .dim = a->dim,
                                             .in_stride = 2 * a->dim });
}
