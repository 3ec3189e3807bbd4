#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/linear.h"

#include "engine/base/invariant.h"

#include <string.h>

/* The experts of a mixture.
 *
 * Pairs of a row and one of its experts are sorted by expert, so that the weights of an expert are
 * read once for all of its rows.  Then four regions of tasks: copy each pair's row of x; gate, up
 * and activation; down; and the sums of each row.  A task is some outputs of some rows of one
 * expert, and a leaf's result depends on neither cut (linear.h). */
enum {
    SLICE_ROWS = 512,            /* rows at a time: what bounds the scratch memory */
    TASK_ROWS = 48,              /* their x stays in the second-level cache while weights pass */
    TASK_WEIGHT_BYTES = 64 << 10,
    OUT_UNIT = 16,               /* outputs of a task: whole vectors for the activation */
};

/* One expert's pairs, sorted: [first, first + n). */
struct group {
    int expert, first, n;
    int gated_task, down_task;   /* the first of its tasks in either region */
};

struct mixture {
    struct experts_args a;
    void (*dot)(const struct dot_block *b);
    const struct row_leaf *leaf;
    float *x;                    /* [pairs, M] sorted; afterwards what down makes of them */
    float *gate, *up;            /* [pairs, I] sorted; the activation goes into gate */
    int32_t *row_of;             /* [pairs] the row of a sorted pair */
    int32_t *place;              /* [T, k] where a pair is, -1: nowhere */
    struct group *groups;        /* [n_groups + 1] the last: ends */
    int n_groups, n_pairs;
    int gated_outs, down_outs;   /* of a task */
};

/* ---- scratch */

static int slice_of(int rows)
{
    return rows < SLICE_ROWS ? rows : SLICE_ROWS;
}

/* With a NULL base the same code measures. */
struct carver {
    char *base;
    size_t at;
};

static void *carve(struct carver *c, size_t n, size_t bytes)
{
    void *p = c->base ? c->base + c->at : NULL;

    c->at += (n * bytes + 63) / 64 * 64;
    return p;
}

static size_t lay_out(struct mixture *m, void *base, const struct experts_shape *shape)
{
    size_t pairs = (size_t)slice_of(shape->max_rows) * (size_t)shape->n_chosen;
    struct carver c = { base, 0 };

    m->x = carve(&c, pairs * (size_t)shape->dim, sizeof(float));
    m->gate = carve(&c, pairs * (size_t)shape->expert_dim, sizeof(float));
    m->up = carve(&c, pairs * (size_t)shape->expert_dim, sizeof(float));
    m->row_of = carve(&c, pairs, sizeof *m->row_of);
    m->place = carve(&c, pairs, sizeof *m->place);
    m->groups = carve(&c, (size_t)shape->n_experts + 1, sizeof *m->groups);
    return c.at;
}

size_t cpu_experts_scratch(const struct experts_shape *shape)
{
    struct mixture m;

    return lay_out(&m, NULL, shape);
}

/* ---- sorting */

static int round_up(int n, int to)
{
    return (n + to - 1) / to * to;
}

static int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

/* Outputs of a task: some 64 KB of weights. */
static int outs_of(int in_dim, enum dtype type)
{
    int outs = (int)(TASK_WEIGHT_BYTES / ((size_t)in_dim * dtype_bytes(type)));

    return round_up(outs > 0 ? outs : 1, OUT_UNIT);
}

static int tasks_of(const struct group *g, int out_dim, int outs)
{
    return ceil_div(g->n, TASK_ROWS) * ceil_div(out_dim, outs);
}

static void make_groups(struct mixture *m, const int *count)
{
    struct group next = { 0 };

    m->n_groups = 0;
    for (int e = 0; e < m->a.n_experts; e++) {
        if (count[e] == 0)
            continue;
        next.expert = e;
        next.n = count[e];
        m->groups[m->n_groups++] = next;
        next.first += next.n;
        next.gated_task += tasks_of(&next, m->a.expert_dim, m->gated_outs);
        next.down_task += tasks_of(&next, m->a.dim, m->down_outs);
    }
    m->n_pairs = next.first;
    m->groups[m->n_groups] = next;
}

static void sort_pairs(struct mixture *m)
{
    const struct experts_args *a = &m->a;
    int count[MOST_EXPERTS] = { 0 }, next[MOST_EXPERTS];

    for (int p = 0; p < a->rows * a->n_chosen; p++) {
        ASSERT(a->experts[p] >= -1 && a->experts[p] < a->n_experts);
        if (a->experts[p] >= 0)
            count[a->experts[p]]++;
    }
    make_groups(m, count);
    for (int g = 0; g < m->n_groups; g++)
        next[m->groups[g].expert] = m->groups[g].first;
    for (int p = 0; p < a->rows * a->n_chosen; p++) {
        m->place[p] = -1;
        if (a->experts[p] < 0)
            continue;
        m->place[p] = next[a->experts[p]]++;
        m->row_of[m->place[p]] = p / a->n_chosen;
    }
}

/* ---- tasks */

static void copy_task(void *arg, int pair, int worker)
{
    const struct mixture *m = arg;
    size_t dim = (size_t)m->a.dim;

    (void)worker;
    memcpy(m->x + (size_t)pair * dim, (const float *)m->a.x + (size_t)m->row_of[pair] * dim,
           dim * sizeof *m->x);
}

/* The group of a task: the last that begins by then. */
static const struct group *group_of(const struct mixture *m, int task, bool down)
{
    int low = 0, high = m->n_groups - 1;

    while (low < high) {
        int middle = (low + high + 1) / 2;
        const struct group *g = &m->groups[middle];
        if ((down ? g->down_task : g->gated_task) <= task)
            low = middle;
        else
            high = middle - 1;
    }
    return &m->groups[low];
}

/* Rows and outputs of a task as sorted pairs [first, first + rows) and [from, from + outs).  Tasks
 * with the same outputs follow each other: they find the weights in a cache. */
struct cut {
    size_t first, from;
    int rows, outs;
};

static struct cut cut_of(const struct group *g, int task, int out_dim, int outs)
{
    int chunks = ceil_div(g->n, TASK_ROWS);
    int row = task % chunks * TASK_ROWS, from = task / chunks * outs;

    return (struct cut){
        .first = (size_t)(g->first + row), .from = (size_t)from,
        .rows = g->n - row < TASK_ROWS ? g->n - row : TASK_ROWS,
        .outs = out_dim - from < outs ? out_dim - from : outs,
    };
}

static void dot(const struct mixture *m, const struct cut *c, float *out, const float *x,
                const void *weight, int in_dim, int out_dim)
{
    enum dtype type = m->a.matrices.type;

    m->dot(&(struct dot_block){
        .out = out + c->first * (size_t)out_dim + c->from, .x = x + c->first * (size_t)in_dim,
        .weight = weight_offset(weight, type, c->from * (size_t)in_dim),
        .out_stride = (size_t)out_dim, .x_stride = (size_t)in_dim, .type = type,
        .rows = c->rows, .outs = c->outs, .in_dim = in_dim });
}

static void gated_task(void *arg, int task, int worker)
{
    const struct mixture *m = arg;
    const struct group *g = group_of(m, task, false);
    const int dim = m->a.dim, mid = m->a.expert_dim;
    struct cut c = cut_of(g, task - g->gated_task, mid, m->gated_outs);

    (void)worker;
    dot(m, &c, m->gate, m->x, m->a.matrices.gate[g->expert], dim, mid);
    dot(m, &c, m->up, m->x, m->a.matrices.up[g->expert], dim, mid);
    for (size_t r = c.first; r < c.first + (size_t)c.rows; r++) {
        float *gate = m->gate + r * (size_t)mid + c.from;
        m->leaf->silu_mul(gate, gate, m->up + r * (size_t)mid + c.from, c.outs);
    }
}

static void down_task(void *arg, int task, int worker)
{
    const struct mixture *m = arg;
    const struct group *g = group_of(m, task, true);
    struct cut c = cut_of(g, task - g->down_task, m->a.dim, m->down_outs);

    (void)worker;
    dot(m, &c, m->x, m->gate, m->a.matrices.down[g->expert], m->a.expert_dim, m->a.dim);
}

static void sum_task(void *arg, int row, int worker)
{
    const struct mixture *m = arg;
    const struct experts_args *a = &m->a;
    const size_t dim = (size_t)a->dim, k = (size_t)a->n_chosen, at = (size_t)row * dim;
    float *out = (float *)a->out + at;

    (void)worker;
    if (!a->add)
        memset(out, 0, dim * sizeof *out);
    else if (a->add != a->out)
        memcpy(out, (const float *)a->add + at, dim * sizeof *out);
    for (size_t p = (size_t)row * k; p < (size_t)(row + 1) * k; p++) {
        if (m->place[p] < 0)
            continue;
        const float *term = m->x + (size_t)m->place[p] * dim, weight = a->weights[p];
        for (size_t i = 0; i < dim; i++)
            out[i] += weight * term[i];
    }
}

static void run_slice(struct stream *s, struct mixture *m)
{
    struct workers *w = s->be->workers;

    sort_pairs(m);
    const struct group *end = &m->groups[m->n_groups];
    workers_run(w, m->n_pairs, copy_task, m);
    workers_run(w, end->gated_task, gated_task, m);
    workers_run(w, end->down_task, down_task, m);
    workers_run(w, m->a.rows, sum_task, m);
}

void cpu_experts(struct stream *s, const struct experts_args *a)
{
    const struct experts_shape shape = { a->rows, a->dim, a->expert_dim, a->n_experts,
                                         a->n_chosen };
    const size_t dim = (size_t)a->dim, k = (size_t)a->n_chosen;
    struct mixture m = { .a = *a, .dot = dot_leaf_of(s), .leaf = row_leaf_of(s) };

    ASSERT(a->n_experts <= MOST_EXPERTS && a->n_chosen <= MOST_CHOSEN);
    if (s->failed != ST_OK)
        return;
    lay_out(&m, a->scratch, &shape);
    m.gated_outs = outs_of(a->dim, a->matrices.type);
    m.down_outs = outs_of(a->expert_dim, a->matrices.type);
    for (int first = 0; first < a->rows; first += SLICE_ROWS) {
        m.a.rows = slice_of(a->rows - first);
        m.a.out = (float *)a->out + (size_t)first * dim;
        m.a.x = (const float *)a->x + (size_t)first * dim;
        m.a.add = a->add ? (const float *)a->add + (size_t)first * dim : NULL;
        m.a.experts = a->experts + (size_t)first * k;
        m.a.weights = a->weights + (size_t)first * k;
        run_slice(s, &m);
    }
}
