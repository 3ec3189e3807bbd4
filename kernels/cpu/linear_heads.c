#include "kernels/cpu/linear.h"

#include "engine/base/invariant.h"

/* A task is some outputs of some rows of one head: as many outputs as there are, while there
 * are tasks enough without cutting them. */
enum {
    TASK_ROWS = 48,              /* their x stays in the second-level cache while weights pass */
    TASKS_A_WORKER = 2,          /* wanted, for balance */
    OUT_UNIT = 64,               /* outputs of a task: whole tiles */
};

struct head_products {
    struct linear_heads_args args;
    void (*leaf)(const struct dot_block *b);
    int row_tasks, out_tasks, task_outs;
};

static int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

/* Tasks with the same weights follow each other: a worker finds them in its cache. */
static void heads_task(void *arg, int task, int worker)
{
    const struct head_products *p = arg;
    const struct linear_heads_args *a = &p->args;
    int row = task % p->row_tasks * TASK_ROWS, part = task / p->row_tasks;
    int out = part % p->out_tasks * p->task_outs, head = part / p->out_tasks;
    size_t at = (size_t)head * a->weight_stride +
                (size_t)out * (a->turned ? 1 : (size_t)a->in_dim);

    (void)worker;
    p->leaf(&(struct dot_block){
        .out = (float *)a->out + (size_t)row * (size_t)a->out_stride +
               (size_t)head * (size_t)a->out_head_stride + out,
        .x = (const float *)a->x + (size_t)row * (size_t)a->x_stride +
             (size_t)head * (size_t)a->x_head_stride,
        .weight = weight_offset(a->weight, a->weight_type, at),
        .out_stride = (size_t)a->out_stride,
        .x_stride = (size_t)a->x_stride,
        .weight_stride = (size_t)(a->turned ? a->out_dim : a->in_dim),
        .type = a->weight_type,
        .rows = a->rows - row < TASK_ROWS ? a->rows - row : TASK_ROWS,
        .outs = a->out_dim - out < p->task_outs ? a->out_dim - out : p->task_outs,
        .in_dim = a->in_dim });
}

void cpu_linear_heads(struct stream *s, const struct linear_heads_args *a)
{
    struct head_products p = {
        .args = *a,
        .leaf = a->turned ? turned_leaf_of(s) : dot_leaf_of(s),
        .row_tasks = ceil_div(a->rows, TASK_ROWS),
    };

    if (s->failed != ST_OK || a->rows <= 0)
        return;
    ASSERT(a->heads > 0 && a->in_dim > 0 && a->out_dim > 0);
    int wanted = TASKS_A_WORKER * workers_count(s->be->workers);
    int parts = ceil_div(wanted, a->heads * p.row_tasks);
    p.task_outs = ceil_div(ceil_div(a->out_dim, parts), OUT_UNIT) * OUT_UNIT;
    p.out_tasks = ceil_div(a->out_dim, p.task_outs);
    workers_run(s->be->workers, a->heads * p.row_tasks * p.out_tasks, heads_task, &p);
}
