#include "kernels/cpu/attend.h"

#include "engine/base/invariant.h"

#include <math.h>

/* Cutting attention into tasks.  A unit is what walks over one list with one K and V
 * head: some rows of a sequence times the query heads of the KV head.  Many rows a unit
 * save reading and turning the keys again; units are made smaller while there are too
 * few for the workers, and when even that does not help, the splits of a unit become
 * tasks of their own, whose states are joined afterwards.  One row with one split has only
 * its heads to divide, of which a latent key has all.  No cut changes a result. */
enum {
    UNIT_QUERIES = 96,           /* q and acc, 100 KB of 128 channels and 400 KB of latent
                                    keys, stay in the second-level cache */
    LEAST_QUERIES = 12,
    UNITS_A_WORKER = 4,          /* wanted, for balance */
    SPLIT_BLOCKS = SPLIT_TOKENS / BLOCK_TOKENS,
    MOST_STATE_BYTES = 64 << 20, /* beyond it few and large units are good enough */
};

struct attention {
    const struct attend_leaf *leaf;
    struct stream *s;
    float *out;                  /* [rows, heads, value_dim] */
    const float *q;
    const bf16 *kv;
    const int32_t *table;        /* [seqs, max_blocks] */
    const int32_t *first_row, *n_rows, *n_tokens; /* the whole context, or */
    const int32_t *chosen, *n_chosen;             /* chosen positions: one row a sequence */
    const bf16 *const *rows;     /* of chosen positions, or NULL: by table */
    struct kv_shape shape;
    size_t q_stride;
    float scale;
    int seqs, heads, group, max_blocks, keep_tokens;
    int unit_rows, unit_heads;   /* at most in a unit */
    int head_parts, units_a_head; /* units of one row and KV head, and of all rows */
    int splits;                  /* of the longest list, when they are tasks; else 0 */
    float *states;               /* [units, splits] states */
    size_t states_bytes;
};

struct unit {
    int seq, kv_head, row, rows; /* rows of the batch from row on */
    int head, heads;             /* query heads from head on */
    int index;
};

static size_t at(int row, int width)
{
    return (size_t)row * (size_t)width;
}

static size_t state_floats(const struct attention *a)
{
    return at(a->unit_rows * a->unit_heads, kv_value_dim(&a->shape) + 2);
}

static struct attend_state state_at(const struct attention *a, float *base)
{
    int n = a->unit_rows * a->unit_heads;

    return (struct attend_state){ .max = base, .sum = base + n, .acc = base + 2 * n };
}

/* The rows of unit `index`; false when it has none, or its sequence is padding. */
static bool find_unit(const struct attention *a, int index, struct unit *u)
{
    int part = index % a->units_a_head, list = index / a->units_a_head;

    u->index = index;
    u->kv_head = list % a->shape.kv_heads;
    u->seq = list / a->shape.kv_heads;
    int rows = a->chosen ? 1 : a->n_rows[u->seq];
    int from = part / a->head_parts * a->unit_rows;
    if (from >= rows || (a->chosen ? a->n_chosen[list] : a->n_tokens[u->seq]) == 0)
        return false;
    int first_head = part % a->head_parts * a->unit_heads;
    u->head = u->kv_head * a->group + first_head;
    u->heads = a->group - first_head < a->unit_heads ? a->group - first_head : a->unit_heads;
    u->row = (a->chosen ? u->seq : a->first_row[u->seq]) + from;
    u->rows = rows - from < a->unit_rows ? rows - from : a->unit_rows;
    return true;
}

/* How many tokens of its list the row sees. */
static int row_sees(const struct attention *a, const struct unit *u, int row)
{
    if (a->chosen)
        return a->n_chosen[u->seq * a->shape.kv_heads + u->kv_head];
    return a->n_tokens[u->seq] - a->n_rows[u->seq] + row - a->first_row[u->seq] + 1;
}

static const bf16 *row_at(const struct attention *a, const struct unit *u, int position)
{
    const int32_t *table = a->table + at(u->seq, a->max_blocks);
    size_t block = (size_t)table[position / BLOCK_TOKENS];
    size_t token = at(u->kv_head, BLOCK_TOKENS) + (size_t)(position % BLOCK_TOKENS);

    return a->kv + block * (kv_block_bytes(&a->shape) / sizeof(bf16)) +
           token * kv_row_dim(&a->shape);
}

/* Tokens first..end - 1 of the list, at most a block of them. */
static void find_rows(const struct attention *a, const struct unit *u, int first, int end,
                      struct attend_block *b)
{
    size_t list = at(u->seq * a->shape.kv_heads + u->kv_head, a->keep_tokens);
    const int32_t *chosen = a->chosen ? a->chosen + list : NULL;

    b->first = first;
    b->n = end - first < BLOCK_TOKENS ? end - first : BLOCK_TOKENS;
    for (int j = 0; j < BLOCK_TOKENS; j++) {
        int token = first + (j < b->n ? j : b->n - 1);
        b->row[j] = a->rows ? a->rows[list + (size_t)token]
                            : row_at(a, u, chosen ? chosen[token] : token);
    }
}

/* ---- one task */

struct workspace {
    struct attend_tile tile;
    struct attend_state total, part;
};

static size_t workspace_floats(const struct attention *a)
{
    size_t queries = (size_t)(a->unit_rows * a->unit_heads);
    size_t head_dim = (size_t)a->shape.head_dim;

    return queries * head_dim + 2 * state_floats(a) + ATTEND_QUERIES * BLOCK_TOKENS +
           head_dim / 2 * BLOCK_TOKENS + queries + 5 * 16;
}

/* Parts begin on a cache line. */
static float *carve(float **free, size_t n)
{
    float *part = *free;

    *free += (n + 15) / 16 * 16;
    return part;
}

/* The states of split tasks lie in the scratch of worker 0, who calls, before its own
 * workspace. */
static void open_workspace(const struct attention *a, int worker, struct workspace *w)
{
    size_t before = worker == 0 ? a->states_bytes : 0;
    char *base = cpu_scratch(a->s, worker, before + workspace_floats(a) * sizeof(float));
    float *free = (float *)(void *)(base + before);
    size_t queries = (size_t)(a->unit_rows * a->unit_heads);
    size_t head_dim = (size_t)a->shape.head_dim;

    w->tile = (struct attend_tile){
        .head_dim = a->shape.head_dim,
        .value_dim = kv_value_dim(&a->shape),
        .value_at = a->shape.latent_dim ? 0 : a->shape.head_dim,
    };
    w->tile.q = carve(&free, queries * head_dim);
    w->total = state_at(a, carve(&free, state_floats(a)));
    w->part = state_at(a, carve(&free, state_floats(a)));
    w->tile.work = carve(&free, ATTEND_QUERIES * BLOCK_TOKENS);
    w->tile.keys = (uint32_t *)(void *)carve(&free, head_dim / 2 * BLOCK_TOKENS);
    w->tile.see = (int32_t *)(void *)carve(&free, queries);
}

static void load_queries(const struct attention *a, const struct unit *u,
                         struct attend_tile *t)
{
    int head_dim = a->shape.head_dim;

    t->n = u->rows * u->heads;
    for (int i = 0; i < t->n; i++) {
        int row = u->row + i / u->heads, head = u->head + i % u->heads;
        const float *from = a->q + (size_t)row * a->q_stride + at(head, head_dim);
        float *to = t->q + at(i, head_dim);
        for (int d = 0; d < head_dim; d++)
            to[d] = from[d] * a->scale;
        t->see[i] = row_sees(a, u, row);
    }
}

static void walk_split(const struct attention *a, const struct unit *u, int split,
                       struct attend_tile *t)
{
    int last = t->see[t->n - 1]; /* the last row sees the most */
    struct attend_block b;

    for (int i = 0; i < t->n; i++) {
        t->state.max[i] = -INFINITY;
        t->state.sum[i] = 0;
    }
    for (size_t d = 0; d < at(t->n, t->value_dim); d++)
        t->state.acc[d] = 0;
    for (int block = split * SPLIT_BLOCKS; block < (split + 1) * SPLIT_BLOCKS; block++) {
        if (block * BLOCK_TOKENS >= last)
            break;
        find_rows(a, u, block * BLOCK_TOKENS, last, &b);
        a->leaf->take(t, &b);
    }
}

/* Join the state of query i of a later split to the total. */
static void join(struct attend_state *total, const struct attend_state *part, int i,
                 int value_dim)
{
    float max = total->max[i] > part->max[i] ? total->max[i] : part->max[i];
    float keep = expf(total->max[i] - max), take = expf(part->max[i] - max);
    float *acc = total->acc + at(i, value_dim);
    const float *more = part->acc + at(i, value_dim);

    total->sum[i] = total->sum[i] * keep + part->sum[i] * take;
    total->max[i] = max;
    for (int d = 0; d < value_dim; d++)
        acc[d] = acc[d] * keep + more[d] * take;
}

static void write_out(const struct attention *a, const struct unit *u,
                      const struct attend_state *total)
{
    int value_dim = kv_value_dim(&a->shape);

    for (int i = 0; i < u->rows * u->heads; i++) {
        int row = u->row + i / u->heads, head = u->head + i % u->heads;
        a->leaf->finish(a->out + at(row, a->heads * value_dim) + at(head, value_dim),
                        total->acc + at(i, value_dim), 1 / total->sum[i], value_dim);
    }
}

static void unit_task(void *arg, int task, int worker)
{
    const struct attention *a = arg;
    struct workspace w;
    struct unit u;

    if (!find_unit(a, task, &u))
        return;
    open_workspace(a, worker, &w);
    load_queries(a, &u, &w.tile);
    for (int split = 0; split * SPLIT_TOKENS < w.tile.see[w.tile.n - 1]; split++) {
        w.tile.state = split == 0 ? w.total : w.part;
        walk_split(a, &u, split, &w.tile);
        for (int i = 0; split > 0 && i < w.tile.n; i++)
            if (w.tile.see[i] > split * SPLIT_TOKENS)
                join(&w.total, &w.part, i, kv_value_dim(&a->shape));
    }
    write_out(a, &u, &w.total);
}

/* ---- a split a task */

static struct attend_state split_state(const struct attention *a, int unit, int split)
{
    return state_at(a, a->states + (at(unit, a->splits) + (size_t)split) * state_floats(a));
}

static void split_task(void *arg, int task, int worker)
{
    const struct attention *a = arg;
    int split = task % a->splits;
    struct workspace w;
    struct unit u;

    if (!find_unit(a, task / a->splits, &u))
        return;
    if (split * SPLIT_TOKENS >= row_sees(a, &u, u.row + u.rows - 1))
        return;
    open_workspace(a, worker, &w);
    load_queries(a, &u, &w.tile);
    w.tile.state = split_state(a, u.index, split);
    walk_split(a, &u, split, &w.tile);
}

static void join_task(void *arg, int task, int worker)
{
    const struct attention *a = arg;
    struct unit u;

    (void)worker;
    if (!find_unit(a, task, &u))
        return;
    struct attend_state total = split_state(a, task, 0);
    for (int split = 1; split < a->splits; split++) {
        struct attend_state part = split_state(a, task, split);
        for (int i = 0; i < u.rows * u.heads; i++)
            if (row_sees(a, &u, u.row + i / u.heads) > split * SPLIT_TOKENS)
                join(&total, &part, i, kv_value_dim(&a->shape));
    }
    write_out(a, &u, &total);
}

/* ---- operations */

static int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

static const struct attend_leaf *leaf_of(const struct attention *a)
{
    bool whole = a->shape.head_dim % 32 == 0 && kv_value_dim(&a->shape) % 32 == 0;

    return a->s->be->isa == ISA_SCALAR            ? &scalar_attend_leaf
           : a->s->be->isa == ISA_AVX512 && whole ? &avx512_attend_leaf
                                                  : &avx2_attend_leaf;
}

static int count_units(const struct attention *a)
{
    return a->seqs * a->shape.kv_heads * a->units_a_head;
}

/* Sets unit_rows, unit_heads and what follows from them. */
static void cut_units(struct attention *a, int most_rows, int splits)
{
    int wanted = UNITS_A_WORKER * workers_count(a->s->be->workers);

    a->unit_heads = a->group;
    a->head_parts = 1;
    a->unit_rows = UNIT_QUERIES / a->group > 1 ? UNIT_QUERIES / a->group : 1;
    if (a->unit_rows > most_rows)
        a->unit_rows = most_rows;
    a->units_a_head = ceil_div(most_rows, a->unit_rows);
    while (count_units(a) < wanted && a->unit_rows / 2 * a->group >= LEAST_QUERIES) {
        a->unit_rows /= 2;
        a->units_a_head = ceil_div(most_rows, a->unit_rows);
    }
    while (most_rows == 1 && count_units(a) * splits < wanted &&
           a->unit_heads > ATTEND_QUERIES) {
        a->unit_heads = ceil_div(a->unit_heads, 2);
        a->units_a_head = a->head_parts = ceil_div(a->group, a->unit_heads);
    }
}

static void attend(struct attention *a, int most_rows, int most_tokens)
{
    int workers = workers_count(a->s->be->workers);

    ASSERT(a->heads % a->shape.kv_heads == 0 && most_rows > 0 && most_tokens >= 0);
    if (most_tokens == 0)        /* nothing but padding */
        return;
    a->group = a->heads / a->shape.kv_heads;
    a->leaf = leaf_of(a);
    int splits = ceil_div(most_tokens, SPLIT_TOKENS);
    cut_units(a, most_rows, splits);
    int units = count_units(a);
    size_t bytes = at(units, splits) * state_floats(a) * sizeof(float);
    if (splits == 1 || workers == 1 || units >= UNITS_A_WORKER * workers ||
        bytes > MOST_STATE_BYTES) {
        workers_run(a->s->be->workers, units, unit_task, a);
        return;
    }
    a->splits = splits;
    a->states_bytes = (bytes + 63) / 64 * 64;
    a->states = cpu_scratch(a->s, 0, a->states_bytes + workspace_floats(a) * sizeof(float));
    workers_run(a->s->be->workers, units * splits, split_task, a);
    workers_run(a->s->be->workers, units, join_task, a);
}

void cpu_attend_dense(struct stream *s, const struct attend_dense_args *args)
{
    struct attention a = {
        .s = s,
        .out = args->out,
        .q = args->q,
        .kv = args->kv,
        .table = args->table,
        .first_row = args->first_row,
        .n_rows = args->n_rows,
        .n_tokens = args->n_tokens,
        .shape = args->shape,
        .q_stride = (size_t)args->q_stride,
        .scale = args->scale,
        .seqs = args->seqs,
        .heads = args->heads,
        .max_blocks = args->max_blocks,
    };

    if (s->failed == ST_OK && args->seqs > 0)
        attend(&a, args->max_n_rows, args->max_n_tokens);
}

/* Its scratch is the workers' own. */
size_t cpu_attend_dense_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                int max_blocks)
{
    (void)shape, (void)max_seqs, (void)heads, (void)max_blocks;
    return 0;
}

void cpu_attend_rows(struct stream *s, const struct attend_selected_args *args,
                     const bf16 *const *rows)
{
    struct attention a = {
        .s = s,
        .out = args->out,
        .q = args->q,
        .kv = args->kv,
        .table = args->table,
        .chosen = args->chosen,
        .n_chosen = args->n_chosen,
        .rows = rows,
        .shape = args->shape,
        .q_stride = (size_t)args->q_stride,
        .scale = args->scale,
        .seqs = args->seqs,
        .heads = args->heads,
        .max_blocks = args->max_blocks,
        .keep_tokens = args->keep_tokens,
    };

    if (s->failed == ST_OK && args->seqs > 0)
        attend(&a, 1, args->keep_tokens);
}

void cpu_attend_selected(struct stream *s, const struct attend_selected_args *args)
{
    cpu_attend_rows(s, args, NULL);
}
