#include "kernels/cpu/linear.h"

#include "engine/base/invariant.h"

/* Cutting products into tasks.  The numbers below were chosen by measurement on a
 * two-core Zen 4 (AVX-512) with bench_cpu; all are far from sharp. */
enum {
    /* Direct: a task is this much weight, enough to hide taking it (below 1 us). */
    DIRECT_TASK_BYTES = 64 << 10,
    DIRECT_GROUP = 8,            /* outputs a leaf works on together */

    /* Packed: a panel of widened weights stays in the second-level cache while the
     * rows pass by; a tile of x stays in the first level while the panel does. */
    PANEL_OUTS = 64,
    BLOCK_K = 768,
    BLOCK_ROWS = 192,            /* with k in one block */
    BLOCK_ROWS_SPLIT = 48,       /* with sums kept in memory between blocks of k */
    TASKS_A_WORKER = 4,
};

struct product {
    struct dot_block all;
    const struct linear_leaf *leaf;
    struct stream *s;
    int task_rows, task_outs, n_out_tasks;
};

static int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

static int min_int(int a, int b)
{
    return a < b ? a : b;
}

/* The part of the product that is task's. */
static struct dot_block block_of(const struct product *p, int task)
{
    int r = task / p->n_out_tasks * p->task_rows, o = task % p->n_out_tasks * p->task_outs;
    struct dot_block b = p->all;

    b.rows = min_int(p->task_rows, b.rows - r);
    b.outs = min_int(p->task_outs, b.outs - o);
    b.x += (size_t)r * (size_t)b.in_dim;
    b.out += (size_t)r * b.out_stride + (size_t)o;
    b.weight = weight_offset(b.weight, b.type, (size_t)o * (size_t)b.in_dim);
    if (b.bias)
        b.bias = weight_offset(b.bias, b.type, (size_t)o);
    return b;
}

static void direct_task(void *arg, int task, int worker)
{
    const struct product *p = arg;
    struct dot_block b = block_of(p, task);

    (void)worker;
    p->leaf->direct(&b);
}

/* Scratch of a packed task, in floats. */
struct panel {
    float *weight;               /* [outs, k] widened, in the leaf's order */
    float *x;                    /* one tile of rows */
    float *acc;                  /* [row tiles][out tiles][tile_rows][tile_outs][lanes] */
    float bias[PANEL_OUTS];
};

static size_t round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

static size_t place_panel(struct panel *panel, float *base, const struct linear_leaf *leaf,
                          int block_k, bool split)
{
    size_t k = round_up((size_t)block_k, (size_t)leaf->lanes);
    size_t weight = PANEL_OUTS * k, x = (size_t)leaf->tile_rows * k;
    size_t tiles = (size_t)ceil_div(BLOCK_ROWS_SPLIT, leaf->tile_rows);
    size_t acc = split ? tiles * (size_t)leaf->tile_rows * PANEL_OUTS * (size_t)leaf->lanes : 0;

    if (panel) {
        panel->weight = base;
        panel->x = base + weight;
        panel->acc = split ? base + weight + x : NULL;
    }
    return (weight + x + acc) * sizeof(float);
}

/* Rows of one tile against the whole panel, over k0 .. k0 + k. */
static void tile_against_panel(const struct dot_block *b, const struct linear_leaf *leaf,
                               const struct panel *panel, int r, int k0, int k)
{
    int rows = min_int(leaf->tile_rows, b->rows - r);
    size_t tile_floats = (size_t)(leaf->tile_rows * leaf->tile_outs * leaf->lanes);
    size_t out_tiles = (size_t)ceil_div(b->outs, leaf->tile_outs);
    struct dot_tile t = {
        .x = panel->x,
        .weight = panel->weight,
        .acc = panel->acc,
        .out_stride = b->out_stride,
        .n_steps = ceil_div(k, leaf->lanes),
        .rows = rows,
        .first = k0 == 0,
        .last = k0 + k == b->in_dim,
    };

    leaf->pack_rows(panel->x, b->x + (size_t)r * (size_t)b->in_dim, rows, b->in_dim, k0, k);
    if (t.acc)
        t.acc += (size_t)(r / leaf->tile_rows) * out_tiles * tile_floats;
    for (int o = 0; o < b->outs; o += leaf->tile_outs) {
        t.outs = min_int(leaf->tile_outs, b->outs - o);
        t.out = b->out + (size_t)r * b->out_stride + (size_t)o;
        t.bias = b->bias ? panel->bias + o : NULL;
        leaf->tile(&t);
        t.weight += t.n_steps * leaf->tile_outs * leaf->lanes;
        if (t.acc)
            t.acc += tile_floats;
    }
}

static void packed_task(void *arg, int task, int worker)
{
    const struct product *p = arg;
    const struct linear_leaf *leaf = p->leaf;
    struct dot_block b = block_of(p, task);
    int n_blocks = ceil_div(b.in_dim, BLOCK_K);
    int block_k = (int)round_up((size_t)ceil_div(b.in_dim, n_blocks), (size_t)leaf->lanes);
    bool split = n_blocks > 1;
    struct panel panel;

    float *base = cpu_scratch(p->s, worker, place_panel(NULL, NULL, leaf, block_k, split));
    place_panel(&panel, base, leaf, block_k, split);
    for (int o = 0; b.bias && o < b.outs; o++)
        panel.bias[o] = weight_at(b.bias, b.type, (size_t)o);
    for (int k0 = 0; k0 < b.in_dim; k0 += block_k) {
        int k = min_int(block_k, b.in_dim - k0);
        leaf->pack_weight(panel.weight, b.weight, b.type, b.outs, b.in_dim, k0, k);
        for (int r = 0; r < b.rows; r += leaf->tile_rows)
            tile_against_panel(&b, leaf, &panel, r, k0, k);
    }
}

/* Tasks small enough to balance, large enough to be worth taking. */
static void cut_direct(struct product *p)
{
    size_t row_bytes = (size_t)p->all.in_dim * dtype_bytes(p->all.type);
    size_t outs = DIRECT_TASK_BYTES / row_bytes;

    p->task_rows = p->all.rows;
    p->task_outs = (int)round_up(outs ? outs : 1, DIRECT_GROUP);
    p->n_out_tasks = ceil_div(p->all.outs, p->task_outs);
}

/* Rows first: a task that sees more rows packs less.  Few rows are cut by outputs. */
static void cut_packed(struct product *p, int n_workers)
{
    int most_rows = p->all.in_dim > BLOCK_K ? BLOCK_ROWS_SPLIT : BLOCK_ROWS;
    int n_row_tasks = ceil_div(p->all.rows, most_rows);

    p->task_rows = (int)round_up((size_t)ceil_div(p->all.rows, n_row_tasks),
                                 (size_t)p->leaf->tile_rows);
    p->task_rows = min_int(p->task_rows, most_rows);
    n_row_tasks = ceil_div(p->all.rows, p->task_rows);
    p->task_outs = PANEL_OUTS;
    while (p->task_outs > 16 && n_row_tasks * ceil_div(p->all.outs, p->task_outs) <
                                    TASKS_A_WORKER * n_workers)
        p->task_outs /= 2;
    p->n_out_tasks = ceil_div(p->all.outs, p->task_outs);
}

static void run_product(struct stream *s, const struct dot_block *all)
{
    static const struct linear_leaf *const leaves[] = { &scalar_linear_leaf, &avx2_linear_leaf,
                                                        &avx512_linear_leaf };
    struct product p = { .all = *all, .leaf = leaves[s->be->isa], .s = s };

    if (s->failed != ST_OK || all->rows <= 0)
        return;
    ASSERT(all->in_dim > 0 && all->outs > 0);
    bool direct = all->rows <= p.leaf->direct_rows;
    if (direct)
        cut_direct(&p);
    else
        cut_packed(&p, workers_count(s->be->workers));
    workers_run(s->be->workers, ceil_div(all->rows, p.task_rows) * p.n_out_tasks,
                direct ? direct_task : packed_task, &p);
}

void cpu_linear(struct stream *s, const struct linear_args *a)
{
    struct dot_block all = {
        .out = a->out,
        .x = a->x,
        .weight = a->weight,
        .bias = a->bias,
        .out_stride = (size_t)a->out_stride,
        .type = a->weight_type,
        .rows = a->rows,
        .outs = a->out_dim,
        .in_dim = a->in_dim,
    };

    run_product(s, &all);
}

void cpu_logits(struct stream *s, const struct logits_args *a)
{
    struct dot_block all = {
        .out = a->out,
        .x = a->x,
        .weight = a->weight,
        .out_stride = (size_t)a->vocab,
        .type = a->weight_type,
        .rows = a->rows,
        .outs = a->vocab,
        .in_dim = a->dim,
    };

    run_product(s, &all);
}
