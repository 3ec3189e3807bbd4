#include "kernels/cpu/linear.h"

#include "engine/base/invariant.h"

/* Cutting products into tasks.  The sizes were tried with bench_cpu on a two-core Zen 4
 * (1 MiB second-level cache); half and double of each measure the same within 5 %. */
enum {
    /* A task's rows of x stay in the second-level cache while its weights pass by. */
    TASK_X_BYTES = 512 << 10,
    /* Few rows: a task reads at most this much weight, 5 us, and at least what takes
     * longer to read than a task takes to claim. */
    TASK_WEIGHT_BYTES = 64 << 10,
    TASK_LEAST_BYTES = 4 << 10,
    TASK_OUTS = 64,              /* many rows: at most this many outputs */
    TASKS_A_WORKER = 2,          /* wanted, for balance */
    MANY_ROWS = 24,
    ROW_TILE = 6,                /* the tallest tile of a leaf; a multiple of the others */
    OUT_TILE = 4,
};

struct product {
    struct dot_block all;
    void (*leaf)(const struct dot_block *b);
    int task_rows, task_outs, n_out_tasks;
};

static int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

static int round_up(int n, int to)
{
    return ceil_div(n, to) * to;
}

static int min_int(int a, int b)
{
    return a < b ? a : b;
}

/* Tasks with the same rows follow each other: a worker finds them in its cache. */
static void product_task(void *arg, int task, int worker)
{
    const struct product *p = arg;
    int r = task / p->n_out_tasks * p->task_rows, o = task % p->n_out_tasks * p->task_outs;
    struct dot_block b = p->all;

    (void)worker;
    b.rows = min_int(p->task_rows, b.rows - r);
    b.outs = min_int(p->task_outs, b.outs - o);
    b.x += (size_t)r * b.x_stride;
    b.out += (size_t)r * b.out_stride + (size_t)o;
    b.weight = weight_offset(b.weight, b.type, (size_t)o * (size_t)b.in_dim);
    if (b.bias)
        b.bias = weight_offset(b.bias, b.type, (size_t)o);
    p->leaf(&b);
}

static int max_int(int a, int b)
{
    return a > b ? a : b;
}

/* Choose the size of the tasks; their number. */
static int cut(struct product *p, int n_workers)
{
    const struct dot_block *all = &p->all;
    size_t x_row_bytes = (size_t)all->in_dim * sizeof(float);
    size_t weight_row_bytes = (size_t)all->in_dim * dtype_bytes(all->type);
    int most_rows = (int)(TASK_X_BYTES / x_row_bytes) / ROW_TILE * ROW_TILE;
    int n_row_tasks = ceil_div(all->rows, max_int(most_rows, MANY_ROWS));
    int most_outs = (int)(TASK_WEIGHT_BYTES / weight_row_bytes);
    int least_outs = (int)(TASK_LEAST_BYTES / weight_row_bytes);
    int balanced = all->outs / ceil_div(TASKS_A_WORKER * n_workers, n_row_tasks);

    if (all->rows > MANY_ROWS)
        most_outs = min_int(most_outs, TASK_OUTS);
    p->task_rows = round_up(ceil_div(all->rows, n_row_tasks), ROW_TILE);
    p->task_outs = max_int(min_int(most_outs, balanced), max_int(least_outs, 1));
    p->task_outs = round_up(p->task_outs, OUT_TILE);
    p->n_out_tasks = ceil_div(all->outs, p->task_outs);
    return ceil_div(all->rows, p->task_rows) * p->n_out_tasks;
}

static void run_product(struct stream *s, const struct dot_block *all)
{
    struct product p = { .all = *all };

    if (s->failed != ST_OK || all->rows <= 0)
        return;
    ASSERT(all->in_dim > 0 && all->outs > 0);
    p.leaf = dot_leaf_of(s);
    int n_tasks = cut(&p, workers_count(s->be->workers));
    workers_run(s->be->workers, n_tasks, product_task, &p);
}

void cpu_linear(struct stream *s, const struct linear_args *a)
{
    struct dot_block all = {
        .out = a->out,
        .x = a->x,
        .weight = a->weight,
        .bias = a->bias,
        .out_stride = (size_t)a->out_stride,
        .x_stride = (size_t)a->in_dim,
        .type = a->weight_type,
        .rows = a->rows,
        .outs = a->out_dim,
        .in_dim = a->in_dim,
    };

    ASSERT(a->out_stride >= a->out_dim);
    run_product(s, &all);
}

void cpu_logits(struct stream *s, const struct logits_args *a)
{
    struct dot_block all = {
        .out = a->out,
        .x = a->x,
        .weight = a->weight,
        .out_stride = (size_t)a->vocab,
        .x_stride = (size_t)a->dim,
        .type = a->weight_type,
        .rows = a->rows,
        .outs = a->vocab,
        .in_dim = a->dim,
    };

    run_product(s, &all);
}
