#include "kernels/cpu/logit_leaf.h"

#include "engine/base/invariant.h"

#include <float.h>
#include <math.h>

/* One row is one task.  A row is surveyed in one pass, the largest key of each block
 * of LOGIT_BLOCK logits; what follows looks only into blocks that can matter:
 *
 *   the largest       is in the first block whose maximum is the row's
 *   the k-th largest  is no less than the k-th largest of the block maxima, so it is
 *                     the k-th of the few logits that reach that one
 *   top_p             mass is gathered from the top down, in steps of temperature units,
 *                     until it suffices; the end of the prefix is then found among the
 *                     gathered by radix selection, the masses of a digit added up
 *   the draw          no gumbel is above 23 and none below -4, so what lies 27 below
 *                     the maximum cannot win
 *
 * Candidates stay in ascending order of ids, so ties fall to the lower id.
 *
 * Infinite logits.  If the largest is +inf, the ids that have it share the mass equally
 * and no other has any.  If all are -inf, logprobs are uniform and the token is id 0.
 * A NaN in the logits, or made of them by bias or penalties, gives token -1. */

enum { DRAWABLE = 27 };

struct row {
    const float *l;              /* [n] */
    int32_t *block_max;          /* [blocks] keys */
    int n, blocks;
    int32_t max;                 /* key of the largest */
    bool none;                   /* all were -inf */
};

struct candidates {
    int32_t *key, *id;           /* [n] in ascending order of ids */
    float *w;                    /* [n] e^x where top_p needs it */
    int n;
};

/* What a worker has for a row; raw and edited are rows of their own. */
struct desk {
    const struct logit_leaf *leaf;
    struct row raw, edited;
    float *flat_raw, *flat_edited; /* [V] */
    struct candidates c;
};

static size_t desk_bytes(size_t vocab, size_t blocks)
{
    return 5 * vocab * sizeof(float) + 2 * blocks * sizeof(int32_t);
}

static void desk_init(struct desk *d, void *base, int vocab)
{
    const int blocks = (vocab + LOGIT_BLOCK - 1) / LOGIT_BLOCK;
    float *at = base;

    d->flat_raw = at;
    d->flat_edited = at += vocab;
    d->c.w = at += vocab;
    d->c.key = (int32_t *)(at += vocab);
    d->c.id = d->c.key + vocab;
    d->raw = d->edited = (struct row){ .n = vocab, .blocks = blocks };
    d->raw.block_max = d->c.id + vocab;
    d->edited.block_max = d->raw.block_max + blocks;
}

static void find_max(struct row *r)
{
    r->max = r->block_max[0];
    for (int b = 1; b < r->blocks; b++)
        if (r->block_max[b] > r->max)
            r->max = r->block_max[b];
}

/* Survey the row.  In one with an infinite maximum, that becomes 0 and all else -inf; flat
 * is room for it and may be the row itself.  False if there is a NaN. */
static bool survey(const struct logit_leaf *leaf, struct row *r, float *flat)
{
    if (!leaf->survey(r->block_max, r->l, r->n))
        return false;
    find_max(r);
    r->none = key_float(r->max) == -INFINITY;
    if (!isinf(key_float(r->max)))
        return true;
    for (int i = 0; i < r->n; i++)
        flat[i] = order_key(r->l[i]) == r->max ? 0 : -INFINITY;
    r->l = flat;
    leaf->survey(r->block_max, r->l, r->n);
    find_max(r);
    return true;
}

static int block_length(const struct row *r, int b)
{
    int rest = r->n - b * LOGIT_BLOCK;

    return rest < LOGIT_BLOCK ? rest : LOGIT_BLOCK;
}

static int32_t first_largest(const struct row *r)
{
    int b = 0, i;

    while (r->block_max[b] != r->max)
        b++;
    for (i = b * LOGIT_BLOCK; order_key(r->l[i]) != r->max; i++)
        ;
    return i;
}

/* All whose key is at least from. */
static void collect(const struct row *r, int32_t from, struct candidates *c)
{
    int n = 0;

    for (int b = 0; b < r->blocks; b++) {
        int first = b * LOGIT_BLOCK, end = first + block_length(r, b);
        if (r->block_max[b] < from)
            continue;
        for (int i = first; i < end; i++) {
            int32_t key = order_key(r->l[i]);
            c->key[n] = key;
            c->id[n] = i;
            n += key >= from;
        }
    }
    c->n = n;
}

static int count_from(const struct logit_leaf *leaf, const struct row *r, int32_t from)
{
    int count = 0;

    for (int b = 0; b < r->blocks; b++)
        if (r->block_max[b] >= from)
            count += leaf->count(r->l + b * LOGIT_BLOCK, block_length(r, b), from);
    return count;
}

static double mass_from(const struct logit_leaf *leaf, const struct row *r,
                        const struct logit_scale *scale, int32_t from)
{
    double mass = 0;

    for (int b = 0; b < r->blocks; b++)
        if (r->block_max[b] >= from)
            mass += leaf->mass(r->l + b * LOGIT_BLOCK, block_length(r, b), scale, from);
    return mass;
}

/* ---- the end of a prefix */

/* In descending order of keys, the key at which the weights added up reach want, or the
 * smallest key if they never do; above is the weight of all larger keys. */
struct cut {
    int32_t key;
    double above;
};

/* The digit of the cut, digits counted from the top, in histograms that are added. */
static unsigned cut_digit(double weight[4][256], double want, double *above)
{
    double of_digit = 0;
    unsigned digit = 0;
    bool any = false;

    for (int d = 255; d >= 0 && (!any || *above + of_digit < want); d--) {
        double w = weight[0][d] + weight[1][d] + weight[2][d] + weight[3][d];
        if (w == 0)
            continue;
        *above += of_digit;
        of_digit = w;
        digit = (unsigned)d;
        any = true;
    }
    return digit;
}

/* w NULL: each weighs 1.  Four histograms, so that neighbours with the same digit do not
 * wait for each other's sums. */
static struct cut find_cut(const int32_t *key, const float *w, int n, double want)
{
    uint64_t prefix = 0;
    double above = 0;

    for (int shift = 24; shift >= 0; shift -= 8) {
        double weight[4][256] = { { 0 } };
        for (int i = 0; i < n; i++) {
            uint64_t k = (uint32_t)key[i] ^ 0x80000000u;     /* in unsigned order */
            if (k >> (shift + 8) == prefix)
                weight[i & 3][k >> shift & 255] += w ? (double)w[i] : 1.0;
        }
        prefix = prefix << 8 | cut_digit(weight, want, &above);
    }
    return (struct cut){ (int32_t)((uint32_t)prefix ^ 0x80000000u), above };
}

/* Keep what is above the cut, and of its ties the first until want is reached. */
static void keep_prefix(struct candidates *c, bool weighted, const struct cut *cut, double want)
{
    double reached = cut->above;
    int n = 0;

    for (int i = 0; i < c->n; i++) {
        bool ties = c->key[i] == cut->key;
        if (c->key[i] < cut->key || (ties && reached >= want))
            continue;
        if (ties)
            reached += weighted ? (double)c->w[i] : 1.0;
        c->key[n] = c->key[i];
        c->id[n++] = c->id[i];
    }
    c->n = n;
}

/* The k-th largest key, k <= n; all that reach it are left among the candidates. */
static struct cut kth_largest(const struct row *r, int k, struct candidates *c)
{
    int32_t least = INT32_MIN;

    if (k <= r->blocks)
        least = find_cut(r->block_max, NULL, r->blocks, k).key;
    collect(r, least, c);
    return find_cut(c->key, NULL, c->n, k);
}

/* ---- steps (2) and (3) */

static bool has_penalties(const struct sample_params *p)
{
    return p->repetition != 1 || p->frequency != 0 || p->presence != 0;
}

static float penalised(float l, const struct sample_params *p, const struct token_count *c)
{
    if (c->in_prompt || c->in_output > 0)
        l = l > 0 ? l / p->repetition : l * p->repetition;
    if (c->in_output > 0) {
        l -= p->frequency * (float)c->in_output;
        l -= p->presence;
    }
    return l;
}

static void keep_allowed(float *l, const uint32_t *allowed, int vocab)
{
    for (int i = 0; i < vocab; i++)
        if (!(allowed[i / 32] >> i % 32 & 1))
            l[i] = -INFINITY;
}

/* The row to draw from; false if it has a NaN. */
static bool edit(struct desk *d, const float *logits, const struct sample_params *p)
{
    const int vocab = d->raw.n;
    float *l = d->flat_edited;

    memcpy(l, logits, (size_t)vocab * sizeof *l);
    if (p->allowed)
        keep_allowed(l, p->allowed, vocab);
    for (uint32_t i = 0; i < p->n_banned; i++) {
        ASSERT(p->banned[i] >= 0 && p->banned[i] < vocab);
        l[p->banned[i]] = -INFINITY;
    }
    for (uint32_t i = 0; i < p->n_bias; i++) {
        ASSERT(p->bias[i].id >= 0 && p->bias[i].id < vocab);
        l[p->bias[i].id] += p->bias[i].bias;
    }
    for (uint32_t i = 0; i < p->n_counts && has_penalties(p); i++) {
        const struct token_count *c = &p->counts[i];
        ASSERT(c->id >= 0 && c->id < vocab);
        l[c->id] = penalised(l[c->id], p, c);
    }
    d->edited.l = l;
    return survey(d->leaf, &d->edited, l);
}

/* ---- steps (4) and (5) */

/* The key of the logit that lies x below the maximum, x in units of temperature. */
static int32_t key_below(const struct logit_scale *scale, double x)
{
    return order_key((float)((double)scale->max - x * (double)scale->temperature));
}

static int32_t larger(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

/* The shortest prefix of the logits from a key on whose mass reaches top_p of theirs. */
static void collect_top_p(struct desk *d, const struct row *r, const struct logit_scale *scale,
                          int32_t from, float top_p)
{
    static const int reach[] = { 4, 8, 16, DRAWABLE };
    enum { N_REACH = sizeof reach / sizeof reach[0] };
    struct candidates *c = &d->c;
    double want = (double)top_p * mass_from(d->leaf, r, scale, from);

    /* Enough to be sure of it, whatever the order of the additions. */
    double sure = want * (1 + 1e-5);
    if (want < DBL_MIN)
        want = DBL_MIN;          /* the first, not none */
    for (int i = 0; i < N_REACH; i++) {
        int32_t least = larger(from, key_below(scale, reach[i]));
        collect(r, least, c);
        if (d->leaf->weigh(c->w, c->key, c->n, scale) >= sure || least == from)
            break;
    }
    struct cut cut = find_cut(c->key, c->w, c->n, want);
    keep_prefix(c, true, &cut, want);
}

static int32_t choose(struct desk *d, const struct row *r, const struct sample_params *p)
{
    const struct logit_scale scale = { key_float(r->max), p->temperature };
    int32_t from = order_key(-INFINITY);

    if (p->temperature < 1e-5f || r->none)
        return first_largest(r);
    if (p->min_p > 0)
        from = key_below(&scale, p->min_p < 1 ? -log((double)p->min_p) : 0);
    if (p->top_k > 0 && p->top_k < r->n)
        from = larger(from, kth_largest(r, p->top_k, &d->c).key);
    if (p->top_p < 1)
        collect_top_p(d, r, &scale, from, p->top_p);
    else
        collect(r, larger(from, key_below(&scale, DRAWABLE)), &d->c);

    struct logit_draw draw = { .scale = scale, .seed = p->seed, .index = p->index };
    return d->c.id[d->leaf->draw(d->c.key, d->c.id, d->c.n, &draw)];
}

/* The token, or -1. */
static int32_t sample(struct desk *d, const float *logits, const struct sample_params *p)
{
    if (p->target >= 0) {
        ASSERT(p->target < d->raw.n);
        return p->target;
    }
    if (!p->allowed && p->n_banned == 0 && p->n_bias == 0 &&
        (p->n_counts == 0 || !has_penalties(p)))
        return choose(d, &d->raw, p);
    return edit(d, logits, p) ? choose(d, &d->edited, p) : -1;
}

/* ---- step (1) */

/* The candidates are exactly n_top; their order is made by insertion. */
static void store_top(struct desk *d, struct sample_result *out, int n_top, double log_mass)
{
    const double max = (double)key_float(d->raw.max);
    struct candidates *c = &d->c;
    struct cut cut = kth_largest(&d->raw, n_top, c);

    keep_prefix(c, false, &cut, n_top);
    ASSERT(c->n == n_top);
    for (int i = 1; i < n_top; i++) {
        int32_t key = c->key[i], id = c->id[i];
        int at = i;
        for (; at > 0 && c->key[at - 1] < key; at--) {
            c->key[at] = c->key[at - 1];
            c->id[at] = c->id[at - 1];
        }
        c->key[at] = key;
        c->id[at] = id;
    }
    for (int i = 0; i < n_top; i++) {
        double x = (double)key_float(c->key[i]) - max;
        out->top[i] = (struct token_logprob){ c->id[i], (float)(x - log_mass) };
    }
    out->n_top = n_top;
}

static void report(struct desk *d, struct sample_result *out, const struct sample_params *p)
{
    const struct row *r = &d->raw;
    const struct logit_scale scale = { key_float(r->max), 1 };
    const float l = r->l[out->token];
    double log_mass = log(mass_from(d->leaf, r, &scale, order_key(-INFINITY)));

    ASSERT(p->n_top <= SAMPLE_MAX_TOP);
    out->logprob = (float)((double)l - (double)scale.max - log_mass);
    out->rank = count_from(d->leaf, r, order_key(l));
    if (p->n_top > 0)
        store_top(d, out, p->n_top < r->n ? p->n_top : r->n, log_mass);
}

struct sampling {
    struct stream *stream;
    const struct sample_args *args;
};

static void sample_task(void *arg, int task, int worker)
{
    const struct sampling *of = arg;
    const struct sample_args *a = of->args;
    const struct sample_params *p = &a->params[task];
    const float *logits = a->logits + (size_t)task * (size_t)a->vocab;
    const size_t blocks = ((size_t)a->vocab + LOGIT_BLOCK - 1) / LOGIT_BLOCK;
    struct sample_result *out = &a->out[task];
    struct desk d = { .leaf = logit_leaf_of(of->stream) };

    desk_init(&d, cpu_scratch(of->stream, worker, desk_bytes((size_t)a->vocab, blocks)),
              a->vocab);
    *out = (struct sample_result){ .token = -1 };
    d.raw.l = logits;
    if (!survey(d.leaf, &d.raw, d.flat_raw))
        return;
    out->token = sample(&d, logits, p);
    if (p->n_top >= 0 && out->token >= 0)
        report(&d, out, p);
}

void cpu_sample(struct stream *s, const struct sample_args *a)
{
    struct sampling of = { s, a };

    if (s->failed == ST_OK)
        workers_run(s->be->workers, a->rows, sample_task, &of);
}
