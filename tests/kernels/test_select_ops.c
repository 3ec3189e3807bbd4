#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/closeness.h"
#include "tests/support/index_reference.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <math.h>
#include <string.h>

/* Both levels of the selection over an index of random codes and scales.  What is past
 * the end of a context, and blocks of nobody, are bytes of 0xff, whose scales and bounds
 * are NaN, or of 0x7f, for which they are larger than any other. */
enum { MAX_SEQS = 12, MAX_DIM = 576, MAX_GROUP = 20, Q_GAP = 3, UNWRITTEN = -77 };

/* A kind of index is a sum of these; latent rows and means have no channels. */
enum { BOUNDS = 1, CHANNELS = 2, LATENT = 4, MEANS = 8 };
static const int kinds[] = { 0, BOUNDS, CHANNELS, BOUNDS | CHANNELS, LATENT, LATENT | BOUNDS, MEANS,
                             LATENT | MEANS };
enum { N_KINDS = sizeof kinds / sizeof kinds[0] };

struct setup {
    int kv_heads, group, head_dim, kind;
    int keep_blocks, keep_tokens, sinks, recent;
    int alike;                   /* how many different tokens there are; 0: no limit */
    int seqs;
    int32_t n_tokens[MAX_SEQS];
    int shared;                  /* blocks that a context repeats; 0: each has its own */
};

struct problem {
    struct setup s;
    struct kv_shape shape;
    struct index_layout layout;
    int heads, max_blocks, lists, n_blocks;
    float *q;                    /* [seqs, heads * head_dim + Q_GAP] */
    uint8_t *index;
    int32_t *table;
    int16_t *channels;
    int32_t *kept, *n_kept, *chosen, *n_chosen;
    double *score;               /* of the items of one list */
    bool *forced, *taken;
};

static struct kv_shape shape_of(const struct setup *s)
{
    return (struct kv_shape){
        .kv_heads = s->kv_heads,
        .head_dim = s->head_dim,
        .latent_dim = s->kind & LATENT ? latent_dim_of(s->head_dim) : 0,
        .filter = s->kind & BOUNDS ? FILTER_BOUNDS
                  : s->kind & MEANS ? FILTER_MEANS : FILTER_COARSE,
        .index = s->kind & CHANNELS && s->head_dim >= INDEX_CHANNELS_KEPT ? INDEX_CHANNELS
                                                                          : INDEX_ROTATED,
    };
}

static void set_kind(struct setup *s, int kind)
{
    s->kind = kind;
    if (kind & LATENT)
        s->kv_heads = 1;
}

static uint8_t *record_at(const struct problem *p, int seq, int kv_head, int block)
{
    size_t id = (size_t)p->table[seq * p->max_blocks + block];

    return p->index + (id * (size_t)p->shape.kv_heads + (size_t)kv_head) *
                          (size_t)p->layout.record_bytes;
}

/* ---- making an index */

static void random_bytes(struct test_random *r, uint8_t *out, int n)
{
    for (int i = 0; i < n; i++)
        out[i] = (uint8_t)random_below(r, 256);
}

/* One part in eight of a latent token is zeros. */
static void fill_latent_token(const struct problem *p, uint8_t *record, int token,
                              struct test_random *r)
{
    const struct index_layout *l = &p->layout;
    int bytes[2] = { p->shape.latent_dim / 8, (p->shape.head_dim - p->shape.latent_dim) / 8 };
    int at = token * p->shape.head_dim / 8;

    for (int part = 0; part < 2; at += bytes[part++]) {
        float scale = random_below(r, 8) ? 0.2f + fabsf(random_normal(r)) : 0;
        put_bf16(record + l->scale + 2 * (2 * token + part), scale);
        random_bytes(r, record + l->sign + at, bytes[part]);
        random_bytes(r, record + l->large + at, bytes[part]);
        if (scale == 0) {
            memset(record + l->sign + at, 0, (size_t)bytes[part]);
            memset(record + l->large + at, 0, (size_t)bytes[part]);
        }
    }
}

/* One token in eight is a zero key: no scale, no codes. */
static void fill_token(const struct problem *p, uint8_t *record, int token,
                       struct test_random *r)
{
    const struct index_layout *l = &p->layout;
    float scale = random_below(r, 8) ? 0.2f + fabsf(random_normal(r)) : 0;
    bool rotated = p->shape.index == INDEX_ROTATED;
    int bytes[2] = { rotated ? p->shape.head_dim / 8 : INDEX_CHANNELS_KEPT / 4,
                     rotated ? p->shape.head_dim / 8 : INDEX_CHANNELS_KEPT / 2 };
    uint8_t *codes[2] = { record + (rotated ? l->sign : l->coarse) + token * bytes[0],
                          record + (rotated ? l->large : l->fine) + token * bytes[1] };

    for (int i = 0; i < 2; i++) {
        random_bytes(r, codes[i], bytes[i]);
        if (scale == 0)
            memset(codes[i], 0, (size_t)bytes[i]);
    }
    put_bf16(record + (rotated ? l->scale : l->scale2) + 2 * token, scale);
    if (!rotated)
        put_bf16(record + l->scale4 + 2 * token, scale / 3);
}

/* Means of a full block, one part in eight zeros. */
static void fill_means(const struct problem *p, uint8_t *record, struct test_random *r)
{
    int latent = p->shape.latent_dim ? p->shape.latent_dim : p->shape.head_dim;
    int parts = index_parts(&p->shape), at = p->layout.mean_sign;

    for (int i = 0; i < BLOCK_MEANS * parts; i++) {
        int bytes = (i % parts ? p->shape.head_dim - latent : latent) / 8;
        float scale = random_below(r, 8) ? 0.2f + fabsf(random_normal(r)) : 0;
        put_bf16(record + p->layout.mean_scale + 2 * i, scale);
        random_bytes(r, record + at, bytes);
        if (scale == 0)
            memset(record + at, 0, (size_t)bytes);
        at += bytes;
    }
}

static void fill_bounds(const struct problem *p, uint8_t *record, struct test_random *r)
{
    for (int d = 0; d < p->shape.head_dim; d++) {
        float a = random_normal(r), b = random_normal(r);
        put_bf16(record + p->layout.lo + 2 * d, fminf(a, b));
        put_bf16(record + p->layout.hi + 2 * d, fmaxf(a, b));
    }
}

/* With `alike` set tokens and bounds are drawn from so many. */
static struct test_random draw(const struct problem *p, struct test_random *r)
{
    if (!p->s.alike)
        return test_random(random_u64(r));
    return test_random(1000 + (uint64_t)random_below(r, p->s.alike));
}

static void fill_index(struct problem *p, struct test_random *r)
{
    for (int seq = 0; seq < p->s.seqs; seq++)
        for (int g = 0; g < p->shape.kv_heads; g++)
            for (int token = 0; token < p->s.n_tokens[seq]; token++) {
                if (p->s.shared && token / BLOCK_TOKENS >= p->s.shared)
                    break;
                uint8_t *record = record_at(p, seq, g, token / BLOCK_TOKENS);
                struct test_random own = draw(p, r);
                (p->shape.latent_dim ? fill_latent_token : fill_token)(
                    p, record, token % BLOCK_TOKENS, &own);
                if (p->layout.lo >= 0 && token % BLOCK_TOKENS == 0)
                    fill_bounds(p, record, &own);
                if (p->layout.mean_sign >= 0 && token % BLOCK_TOKENS == BLOCK_TOKENS - 1)
                    fill_means(p, record, &own);
            }
}

static int32_t *ints(int n)
{
    int32_t *out = mem_alloc((size_t)n * sizeof *out);

    for (int i = 0; i < n; i++)
        out[i] = UNWRITTEN;
    return out;
}

static void place_blocks(struct problem *p, struct test_random *r)
{
    int32_t *ids = ints(p->n_blocks);
    int used = 0;

    random_order(r, ids, p->n_blocks);
    for (int seq = 0; seq < p->s.seqs; seq++)
        for (int b = 0; b < p->max_blocks; b++)
            p->table[seq * p->max_blocks + b] =
                b >= blocks_of(p->s.n_tokens[seq]) ? -1
                : p->s.shared                      ? ids[b % p->s.shared]
                                                   : ids[used++];
    mem_free(ids);
}

static struct problem *make_problem(const struct setup *s, uint64_t seed)
{
    struct problem *p = mem_calloc(1, sizeof *p);
    struct test_random r = test_random(seed);
    int q_floats = s->seqs * (s->kv_heads * s->group * s->head_dim + Q_GAP);

    p->s = *s;
    p->shape = shape_of(s);
    p->layout = index_layout(&p->shape);
    p->heads = s->kv_heads * s->group;
    p->lists = s->seqs * s->kv_heads;
    p->n_blocks = 1;
    for (int i = 0; i < s->seqs; i++) {
        p->n_blocks += blocks_of(s->n_tokens[i]);
        if (p->max_blocks < blocks_of(s->n_tokens[i]))
            p->max_blocks = blocks_of(s->n_tokens[i]);
    }
    p->table = ints(s->seqs * p->max_blocks);
    place_blocks(p, &r);
    size_t index_bytes = (size_t)p->n_blocks * index_block_bytes(&p->shape);
    p->index = mem_alloc(index_bytes);
    memset(p->index, seed / 2 % 2 ? 0xff : 0x7f, index_bytes);
    fill_index(p, &r);
    p->q = mem_alloc((size_t)q_floats * sizeof *p->q);
    random_floats(&r, p->q, (size_t)q_floats, 1);
    if (p->shape.index == INDEX_CHANNELS) {
        p->channels = mem_alloc((size_t)s->kv_heads * INDEX_CHANNELS_KEPT * sizeof(int16_t));
        random_channels(&r, p->channels, &p->shape);
    }
    p->kept = ints(p->lists * s->keep_blocks);
    p->n_kept = ints(p->lists);
    p->chosen = ints(p->lists * s->keep_tokens);
    p->n_chosen = ints(p->lists);
    size_t items = (size_t)p->max_blocks * BLOCK_TOKENS;
    p->score = mem_alloc(items * sizeof *p->score);
    p->forced = mem_alloc(items * sizeof *p->forced);
    p->taken = mem_alloc(items * sizeof *p->taken);
    return p;
}

static void free_problem(struct problem *p)
{
    mem_free(p->q);
    mem_free(p->index);
    mem_free(p->table);
    mem_free(p->channels);
    mem_free(p->kept);
    mem_free(p->n_kept);
    mem_free(p->chosen);
    mem_free(p->n_chosen);
    mem_free(p->score);
    mem_free(p->forced);
    mem_free(p->taken);
    mem_free(p);
}

/* ---- the operations, for sequences first..first + n - 1 */

static int q_stride(const struct problem *p)
{
    return p->heads * p->shape.head_dim + Q_GAP;
}

static int longest(const struct problem *p, int first, int n)
{
    int most = 0;

    for (int i = first; i < first + n; i++)
        most = p->s.n_tokens[i] > most ? p->s.n_tokens[i] : most;
    return most;
}

static void filter(struct backend *be, struct problem *p, int first, int n)
{
    const struct backend_ops *ops = backend_ops(be);
    struct stream *stream = stream_create(be);
    int list = first * p->shape.kv_heads;
    void *scratch = mem_alloc(ops->block_filter_scratch(&p->shape, n, p->heads, p->max_blocks));

    ops->block_filter(stream, &(struct block_filter_args){
        .kept = p->kept + list * p->s.keep_blocks,
        .n_kept = p->n_kept + list,
        .q = p->q + first * q_stride(p),
        .q_stride = q_stride(p),
        .index = p->index,
        .table = p->table + first * p->max_blocks,
        .n_tokens = p->s.n_tokens + first,
        .channels = p->channels,
        .scratch = scratch,
        .shape = p->shape,
        .seqs = n,
        .heads = p->heads,
        .max_blocks = p->max_blocks,
        .keep_blocks = p->s.keep_blocks,
        .sink_tokens = p->s.sinks,
        .recent_tokens = p->s.recent,
        .max_n_tokens = longest(p, first, n) });
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    mem_free(scratch);
}

static void select_tokens(struct backend *be, struct problem *p, int first, int n)
{
    const struct backend_ops *ops = backend_ops(be);
    struct stream *stream = stream_create(be);
    int list = first * p->shape.kv_heads;
    void *scratch = mem_alloc(ops->token_select_scratch(&p->shape, n, p->heads,
                                                        p->s.keep_blocks));

    ops->token_select(stream, &(struct token_select_args){
        .chosen = p->chosen + list * p->s.keep_tokens,
        .n_chosen = p->n_chosen + list,
        .kept = p->kept + list * p->s.keep_blocks,
        .n_kept = p->n_kept + list,
        .q = p->q + first * q_stride(p),
        .q_stride = q_stride(p),
        .index = p->index,
        .table = p->table + first * p->max_blocks,
        .n_tokens = p->s.n_tokens + first,
        .channels = p->channels,
        .scratch = scratch,
        .shape = p->shape,
        .seqs = n,
        .heads = p->heads,
        .max_blocks = p->max_blocks,
        .keep_blocks = p->s.keep_blocks,
        .keep_tokens = p->s.keep_tokens,
        .sink_tokens = p->s.sinks,
        .recent_tokens = p->s.recent });
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    stream_destroy(stream);
    mem_free(scratch);
}

/* A first level of another kind: random ascending blocks, as many as there may be in
 * the first list, fewer in the others. */
static void keep_any_blocks(struct problem *p, struct test_random *r)
{
    for (int list = 0; list < p->lists; list++) {
        int n = blocks_of(p->s.n_tokens[list / p->shape.kv_heads]);
        int most = n < p->s.keep_blocks ? n : p->s.keep_blocks;
        int want = list % 3 == 0 || most == 0 ? most : 1 + random_below(r, most), n_kept = 0;
        int32_t *out = p->kept + list * p->s.keep_blocks;
        for (int block = 0; block < n && n_kept < want; block++)
            if (random_below(r, n - block) < want - n_kept)
                out[n_kept++] = block;
        p->n_kept[list] = n_kept;
        while (n_kept < p->s.keep_blocks)
            out[n_kept++] = -1;
    }
}

/* ---- the reference */

/* What is scored of a record: its tokens, by one plane or both, or its means. */
enum level { COARSE, FINE, MEAN };

static double rotated_score(const struct problem *p, const uint8_t *record, int number,
                            const double *x, enum level level)
{
    const struct index_layout *l = &p->layout;
    int bytes = p->shape.head_dim / 8;
    const uint8_t *signs = record + (level == MEAN ? l->mean_sign : l->sign) + number * bytes;
    double sum = 0;

    for (int d = 0; d < p->shape.head_dim; d++) {
        int large = code_bits(record + l->large + number * bytes, d, 1);
        sum += x[d] * (code_bits(signs, d, 1) ? 1 : -1) * (level != FINE ? 1 : large ? 1.5 : 0.5);
    }
    return sum * (double)get_bf16(record + (level == MEAN ? l->mean_scale : l->scale) + 2 * number);
}

/* latent.h, from a query's whole numbers and their units. */
static double latent_score(const struct problem *p, const uint8_t *record, int number,
                           const int *n, const double *unit, enum level level)
{
    const struct index_layout *l = &p->layout;
    int bytes = p->shape.head_dim / 8, sum[2] = { 0 };
    const uint8_t *signs = record + (level == MEAN ? l->mean_sign : l->sign) + number * bytes;
    const uint8_t *scales = record + (level == MEAN ? l->mean_scale : l->scale) + 4 * number;
    double score = 0;

    for (int d = 0; d < p->shape.head_dim; d++) {
        int large = code_bits(record + l->large + number * bytes, d, 1);
        sum[d >= p->shape.latent_dim] += n[d] * (code_bits(signs, d, 1) ? 1 : -1) *
                                         (level == FINE && large ? 3 : 1);
    }
    for (int part = 0; part < 2; part++)
        score += (double)get_bf16(scales + 2 * part) * unit[part] *
                 (level == FINE ? 0.5 : 1) * sum[part];
    return score;
}

static double channels_score(const struct problem *p, const uint8_t *record, int token,
                             const int16_t *channels, const double *q, enum level level)
{
    bool fine = level == FINE;
    enum { KEPT = INDEX_CHANNELS_KEPT };
    const struct index_layout *l = &p->layout;
    double sum = 0;

    for (int i = 0; i < KEPT; i++)
        sum += q[channels[i]] *
               (fine ? code_bits(record + l->fine + token * KEPT / 2, i, 4) - 8
                     : code_bits(record + l->coarse + token * KEPT / 4, i, 2) - 1.5);
    return sum * (double)get_bf16(record + (fine ? l->scale4 : l->scale2) + 2 * token);
}

static double bounds_score(const struct problem *p, const uint8_t *record, const double *q)
{
    double sum = 0;

    for (int d = 0; d < p->shape.head_dim; d++)
        sum += fmax(q[d] * (double)get_bf16(record + p->layout.lo + 2 * d),
                    q[d] * (double)get_bf16(record + p->layout.hi + 2 * d));
    return sum;
}

/* Queries of a KV head as doubles, rotated for a rotated index; those of latent rows rounded. */
struct queries {
    double of[MAX_GROUP][MAX_DIM], rotated[MAX_GROUP][MAX_DIM], unit[MAX_GROUP][2];
    int whole[MAX_GROUP][MAX_DIM];
};

static void round_part(const float *from, int n, int *whole, double *unit)
{
    float x[MAX_DIM], most = 0;

    memcpy(x, from, (size_t)n * sizeof *x);
    rotate_exactly(x, n);
    for (int d = 0; d < n; d++)
        most = fmaxf(most, fabsf(x[d]));
    float factor = 127 / most;
    for (int d = 0; d < n; d++) {
        float multiple = (float)(1 << d % 4), limit = floorf(127 / multiple);
        float m = most > 0 ? nearbyintf(x[d] * factor / multiple) : 0;
        whole[d] = (int)(fmaxf(-limit, fminf(limit, m)) * multiple);
    }
    *unit = (double)(most / 127);
}

static struct queries *make_queries(const struct problem *p, int seq, int g)
{
    struct queries *q = mem_alloc(sizeof *q);
    int dim = p->shape.head_dim;

    int latent = p->shape.latent_dim;

    ck_assert_int_le(p->s.group, MAX_GROUP);
    for (int i = 0; i < p->s.group; i++) {
        const float *from = p->q + seq * q_stride(p) + (g * p->s.group + i) * dim;
        for (int d = 0; d < dim; d++)
            q->of[i][d] = (double)from[d];
        if (latent) {
            round_part(from, latent, q->whole[i], &q->unit[i][0]);
            round_part(from + latent, dim - latent, q->whole[i] + latent, &q->unit[i][1]);
        } else {
            rotate_slowly(q->rotated[i], q->of[i], dim);
        }
    }
    return q;
}

/* Of token, or mean, `number`. */
static double score_of(const struct problem *p, const struct queries *q, const uint8_t *record,
                       int g, int number, enum level level)
{
    double best = -INFINITY;

    for (int i = 0; i < p->s.group; i++)
        best = fmax(best, p->shape.latent_dim
                              ? latent_score(p, record, number, q->whole[i], q->unit[i], level)
                          : p->shape.index == INDEX_ROTATED
                              ? rotated_score(p, record, number, q->rotated[i], level)
                              : channels_score(p, record, number,
                                               p->channels + g * INDEX_CHANNELS_KEPT,
                                               q->of[i], level));
    return best;
}

static double token_score(const struct problem *p, const struct queries *q, int seq, int g,
                          int position, enum level level)
{
    return score_of(p, q, record_at(p, seq, g, position / BLOCK_TOKENS), g,
                    position % BLOCK_TOKENS, level);
}

static double block_score(const struct problem *p, const struct queries *q, int seq, int g,
                          int block)
{
    double best = -INFINITY;

    if (p->shape.filter == FILTER_BOUNDS) {
        for (int i = 0; i < p->s.group; i++)
            best = fmax(best, bounds_score(p, record_at(p, seq, g, block), q->of[i]));
        return best;
    }
    if (p->shape.filter == FILTER_MEANS) {
        if ((block + 1) * BLOCK_TOKENS > p->s.n_tokens[seq])
            return INFINITY;     /* it has none, and is kept */
        for (int i = 0; i < BLOCK_MEANS; i++)
            best = fmax(best, score_of(p, q, record_at(p, seq, g, block), g, i, MEAN));
        return best;
    }
    for (int i = 0; i < BLOCK_TOKENS; i++)
        if (block * BLOCK_TOKENS + i < p->s.n_tokens[seq])
            best = fmax(best, token_score(p, q, seq, g, block * BLOCK_TOKENS + i, COARSE));
    return best;
}

static bool token_is_forced(const struct problem *p, int seq, int position)
{
    return position < p->s.sinks || position > p->s.n_tokens[seq] - 1 - p->s.recent;
}

static bool block_is_forced(const struct problem *p, int seq, int block)
{
    if (p->shape.filter == FILTER_MEANS && (block + 1) * BLOCK_TOKENS > p->s.n_tokens[seq])
        return true;
    for (int i = 0; i < BLOCK_TOKENS; i++)
        if (block * BLOCK_TOKENS + i < p->s.n_tokens[seq] &&
            token_is_forced(p, seq, block * BLOCK_TOKENS + i))
            return true;
    return false;
}

/* What makes a choice of n_out of n items right.  Items are the places in score and
 * forced; place[] is ascending, what the items are called in out. */
static void check_choice(struct problem *p, const int32_t *out, int n_out, int keep,
                         const int32_t *place, int n, const char *what)
{
    double least = INFINITY, most = -INFINITY, magnitude = 0;
    int at = 0, n_forced = 0, forced_taken = 0, want = n < keep ? n : keep;

    ck_assert_msg(n_out == want, "%s: %d, not %d", what, n_out, want);
    for (int i = 0; i < n; i++) {
        p->taken[i] = at < n_out && out[at] == place[i];
        at += p->taken[i];
        n_forced += p->forced[i];
        forced_taken += p->forced[i] && p->taken[i];
        if (p->taken[i] && !p->forced[i])
            least = fmin(least, p->score[i]);
        if (!p->taken[i] && !p->forced[i])
            most = fmax(most, p->score[i]);
        magnitude = fmax(magnitude, fabs(p->score[i]));
    }
    ck_assert_msg(at == n_out, "%s: %d is not in order or not to be had", what, out[at]);
    for (int i = n_out; i < keep; i++)
        if (out[i] != -1)
            ck_abort_msg("%s: %d behind the last", what, out[i]);
    if (n_forced > keep)
        n_forced = keep;
    ck_assert_msg(forced_taken == n_forced, "%s: %d of %d forced", what, forced_taken,
                  n_forced);
    ck_assert_msg(least >= most - 2e-5 * magnitude, "%s: took %.9g, left %.9g", what, least,
                  most);
    for (int i = 0, dropped = -1; i < n; i++) {
        if (!p->forced[i] && !p->taken[i] && p->score[i] == most && dropped < 0)
            dropped = i;
        if (!p->forced[i] && p->taken[i] && p->score[i] == most && dropped >= 0)
            ck_abort_msg("%s: took %d, not %d, which is equal", what, place[i],
                         place[dropped]);
    }
}

static void check_filter(struct problem *p)
{
    int32_t *place = ints(p->max_blocks);

    for (int list = 0; list < p->lists; list++) {
        int seq = list / p->shape.kv_heads, g = list % p->shape.kv_heads;
        int n = blocks_of(p->s.n_tokens[seq]);
        struct queries *q = make_queries(p, seq, g);
        for (int block = 0; block < n; block++) {
            place[block] = block;
            p->forced[block] = block_is_forced(p, seq, block);
            p->score[block] = block_score(p, q, seq, g, block);
        }
        mem_free(q);
        if (n > 0)
            check_choice(p, p->kept + list * p->s.keep_blocks, p->n_kept[list],
                         p->s.keep_blocks, place, n, "blocks");
    }
    mem_free(place);
}

static void check_select(struct problem *p)
{
    int32_t *place = ints(p->max_blocks * BLOCK_TOKENS);

    for (int list = 0; list < p->lists; list++) {
        int seq = list / p->shape.kv_heads, g = list % p->shape.kv_heads, n = 0;
        struct queries *q = make_queries(p, seq, g);
        for (int i = 0; i < p->n_kept[list] * BLOCK_TOKENS; i++) {
            int block = p->kept[list * p->s.keep_blocks + i / BLOCK_TOKENS];
            int position = block * BLOCK_TOKENS + i % BLOCK_TOKENS;
            if (position >= p->s.n_tokens[seq])
                continue;
            place[n] = position;
            p->forced[n] = token_is_forced(p, seq, position);
            p->score[n++] = token_score(p, q, seq, g, position, FINE);
        }
        mem_free(q);
        if (p->s.n_tokens[seq] > 0)
            check_choice(p, p->chosen + list * p->s.keep_tokens, p->n_chosen[list],
                         p->s.keep_tokens, place, n, "tokens");
    }
    mem_free(place);
}

/* ---- tests */

/* kind, group, head_dim and budgets; every kind meets every head dimension, and every shape
 * of latent rows all filters. */
enum { N_PLAIN = 50, N_SETUPS = N_PLAIN + 3 * N_LATENT_SHAPES };

static struct setup setup_of(int i)
{
    static const int head_dims[] = { 16, 32, 64, 128, 256 };
    static const int groups[] = { 1, 2, 3, 5, 7, 8, 16 };
    static const int keeps[][2] = { { 1, 1 }, { 3, 20 }, { 12, 100 }, { 40, 1000 },
                                    { 47, 3000 }, { 46, 2999 }, { 64, 5000 } };
    struct setup s = {
        .kv_heads = 1 + i % 3, .group = groups[i % 7], .head_dim = head_dims[i % 5],
        .kind = i < 40 ? i / 5 % 4 : MEANS, .keep_blocks = keeps[i / 3 % 7][0],
        .keep_tokens = keeps[i / 3 % 7][1], .sinks = i % 4 * 2, .recent = i % 2 * 50,
        .seqs = 8, .n_tokens = { 3000, 1, 63, 0, 64, 65, 128, 1111 },
    };

    if (i >= N_PLAIN) {
        s.head_dim = latent_shapes[i % N_LATENT_SHAPES].head_dim;
        s.group = latent_shapes[i % N_LATENT_SHAPES].heads;
        static const int latent[] = { LATENT, LATENT | BOUNDS, LATENT | MEANS };
        set_kind(&s, latent[(i - N_PLAIN) / N_LATENT_SHAPES]);
    }
    return s;
}

static void compare_ints(const int32_t *got, const int32_t *want, int n, const char *what)
{
    for (int i = 0; i < n; i++)
        if (got[i] != want[i])
            ck_abort_msg("%s: number %d is %d, not %d", what, i, got[i], want[i]);
}

/* What the two levels chose. */
static int32_t *copy_results(const struct problem *p, int *n)
{
    int n_kept = p->lists * p->s.keep_blocks, n_chosen = p->lists * p->s.keep_tokens;
    int32_t *all = ints(n_kept + n_chosen + 2 * p->lists);

    memcpy(all, p->kept, (size_t)n_kept * sizeof *all);
    memcpy(all + n_kept, p->chosen, (size_t)n_chosen * sizeof *all);
    memcpy(all + n_kept + n_chosen, p->n_kept, (size_t)p->lists * sizeof *all);
    memcpy(all + n_kept + n_chosen + p->lists, p->n_chosen, (size_t)p->lists * sizeof *all);
    *n = n_kept + n_chosen + 2 * p->lists;
    return all;
}

START_TEST(choices_are_right)
{
    struct setup s = setup_of(_i);
    struct problem *p = make_problem(&s, 1 + _i);
    struct test_random r = test_random(100 + _i);
    struct backend *scalar = test_backend("scalar");
    int n;

    filter(scalar, p, 0, s.seqs);
    check_filter(p);
    select_tokens(scalar, p, 0, s.seqs);
    check_select(p);
    int32_t *want = copy_results(p, &n);
    for (int i = 0; i < TEST_N_ISAS; i++) {
        if (!test_backend(test_isa(i)))
            continue;
        filter(test_backend(test_isa(i)), p, 0, s.seqs);
        select_tokens(test_backend(test_isa(i)), p, 0, s.seqs);
        int32_t *got = copy_results(p, &n);
        compare_ints(got, want, n, test_isa(i));
        mem_free(got);
    }
    keep_any_blocks(p, &r);
    select_tokens(test_backend("auto"), p, 0, s.seqs);
    check_select(p);
    mem_free(want);
    free_problem(p);
}
END_TEST

/* Tokens and blocks of which many are equal, down to all: the earlier ones are chosen. */
START_TEST(ties_go_to_the_earlier)
{
    static const int alike[] = { 1, 2, 5, 30 };
    struct setup s = setup_of(15);

    for (int i = 0; i < 4; i++) {
        s.alike = alike[i];
        set_kind(&s, kinds[_i]);
        s.head_dim = 64;
        s.keep_blocks = 17;
        s.keep_tokens = 333;
        struct problem *p = make_problem(&s, 200 + _i);
        if (i == 0) /* a query of zeros: no score differs */
            memset(p->q, 0, (size_t)(s.seqs * q_stride(p)) * sizeof *p->q);
        filter(test_backend("auto"), p, 0, s.seqs);
        check_filter(p);
        select_tokens(test_backend("auto"), p, 0, s.seqs);
        check_select(p);
        free_problem(p);
    }
}
END_TEST

/* 0 is 0 with either sign: a zero key, whose sum may be negative, and a key at right
 * angles to the query are equal. */
START_TEST(zeros_are_equal)
{
    struct setup s = { .kv_heads = 1, .group = 1, .head_dim = 32, .kind = 3, .keep_blocks = 2,
                       .keep_tokens = 40, .seqs = 1, .n_tokens = { 256 } };
    struct problem *p = make_problem(&s, 300);

    for (int d = 0; d < 32; d++)
        p->q[d] = d == p->channels[0];
    for (int token = 0; token < 256; token++) {
        uint8_t *record = record_at(p, 0, 0, token / BLOCK_TOKENS);
        uint8_t *fine = record + p->layout.fine + token % BLOCK_TOKENS * 16;
        memset(fine, token % 2 ? 0x88 : 0, 16); /* at right angles, or a zero key */
        put_bf16(record + p->layout.scale4 + 2 * (token % BLOCK_TOKENS), token % 2 ? 1.0f : 0);
    }
    for (int block = 0; block < 4; block++)
        for (int d = 0; d < 32; d++) { /* 0 from -q * 0, then from -q * -0 */
            float zero = block % 2 ? -0.0f : 0.0f;
            put_bf16(record_at(p, 0, 0, block) + p->layout.lo + 2 * d, zero);
            put_bf16(record_at(p, 0, 0, block) + p->layout.hi + 2 * d, zero);
        }
    p->n_kept[0] = 2;
    p->kept[0] = 0;
    p->kept[1] = 1;
    select_tokens(test_backend("auto"), p, 0, 1);
    check_select(p);
    for (int i = 0; i < 40; i++)
        ck_assert_int_eq(p->chosen[i], i);
    for (int d = 0; d < 32; d++)
        p->q[d] = -1;
    filter(test_backend("auto"), p, 0, 1);
    check_filter(p);
    ck_assert_int_eq(p->kept[0], 0);
    ck_assert_int_eq(p->kept[1], 1);
    free_problem(p);
}
END_TEST

/* Alone or in company, whoever computes: the same choice. */
START_TEST(company_and_threads_change_nothing)
{
    static const int threads[] = { 1, 2, 3, 8 };
    struct setup s = setup_of(3 * 3);
    int n;

    set_kind(&s, kinds[_i]);
    s.n_tokens[0] = 9000;        /* several pieces */
    struct problem *p = make_problem(&s, 400);
    filter(test_backend("auto"), p, 0, s.seqs);
    select_tokens(test_backend("auto"), p, 0, s.seqs);
    check_filter(p);
    int32_t *want = copy_results(p, &n);
    for (int i = 0; i < 4; i++) {
        struct backend *be = open_with_threads("auto", threads[i]);
        for (int seqs = 1; seqs <= s.seqs; seqs += s.seqs - 1) {
            for (int j = 0; j < p->lists * s.keep_tokens; j++)
                p->chosen[j] = UNWRITTEN;
            for (int first = 0; first < s.seqs; first += seqs) {
                if (longest(p, first, seqs) == 0) {
                    memcpy(p->chosen + first * s.kv_heads * s.keep_tokens,
                           want + p->lists * s.keep_blocks +
                               first * s.kv_heads * s.keep_tokens,
                           (size_t)(s.kv_heads * s.keep_tokens) * sizeof *want);
                    continue;
                }
                filter(be, p, first, seqs);
                select_tokens(be, p, first, seqs);
            }
            int32_t *got = copy_results(p, &n);
            compare_ints(got, want, n, "company");
            mem_free(got);
        }
        backend_close(be);
    }
    mem_free(want);
    free_problem(p);
}
END_TEST

/* Sinks and recents at every edge of a block and of the context. */
START_TEST(sinks_and_recents)
{
    static const int edges[] = { 0, 1, 63, 64, 65, 71, 72, 73, 128, 199, 200, 201, 1000 };
    enum { N = sizeof edges / sizeof edges[0] };
    struct setup s = { .kv_heads = 2, .group = 2, .head_dim = 32, .seqs = 3,
                       .n_tokens = { 200, 192, 1 } };

    set_kind(&s, kinds[_i]);
    for (int i = 0; i < N * N; i++) {
        s.sinks = edges[i / N];
        s.recent = edges[i % N];
        s.keep_blocks = 1 + i % 4;
        s.keep_tokens = 150;
        struct problem *p = make_problem(&s, 500 + i);
        filter(test_backend("auto"), p, 0, s.seqs);
        check_filter(p);
        select_tokens(test_backend("auto"), p, 0, s.seqs);
        check_select(p);
        free_problem(p);
    }
}
END_TEST

/* A context of a million tokens that repeats a thousand blocks, so ties everywhere. */
START_TEST(a_million_tokens)
{
    struct setup s = { .kv_heads = 1, .group = 1, .head_dim = 32, .kind = kinds[_i],
                       .keep_blocks = 5000, .keep_tokens = 4096, .sinks = 4, .recent = 64,
                       .seqs = 1, .n_tokens = { 1 << 20 }, .shared = 1001 };
    struct problem *p = make_problem(&s, 450);

    filter(test_backend("auto"), p, 0, 1);
    check_filter(p);
    select_tokens(test_backend("auto"), p, 0, 1);
    check_select(p);
    free_problem(p);
}
END_TEST

/* The three operations one after the other, to the bit. */
START_TEST(two_levels_are_the_three_operations)
{
    struct setup s = setup_of(9);
    struct backend *be = test_backend("auto");
    const struct backend_ops *ops = backend_ops(be);
    struct stream *stream = stream_create(be);
    struct test_random r = test_random(600);

    set_kind(&s, kinds[_i]);
    struct problem *p = make_problem(&s, 600);
    size_t pool = (size_t)p->n_blocks * kv_block_bytes(&p->shape);
    size_t row = (size_t)(p->heads * kv_value_dim(&p->shape)), floats = (size_t)s.seqs * row;
    bf16 *kv = mem_alloc(pool);
    float *want = mem_calloc(floats, sizeof *want), *got = mem_calloc(floats, sizeof *got);
    void *scratch = mem_alloc(ops->attend_two_level_scratch(
        &p->shape, s.seqs, p->heads, p->max_blocks, s.keep_blocks, s.keep_tokens));
    random_bf16s(&r, kv, pool / sizeof *kv, 1);
    filter(be, p, 0, s.seqs);
    select_tokens(be, p, 0, s.seqs);
    ops->attend_selected(stream, &(struct attend_selected_args){
        .out = want, .q = p->q, .q_stride = q_stride(p), .kv = kv, .table = p->table,
        .chosen = p->chosen, .n_chosen = p->n_chosen, .shape = p->shape, .seqs = s.seqs,
        .heads = p->heads, .max_blocks = p->max_blocks, .keep_tokens = s.keep_tokens,
        .scale = 0.1f });
    ops->attend_two_level(stream, &(struct attend_two_level_args){
        .out = got, .q = p->q, .q_stride = q_stride(p), .kv = kv, .index = p->index,
        .kv_table = p->table, .index_table = p->table, .n_tokens = p->s.n_tokens,
        .channels = p->channels, .scratch = scratch, .shape = p->shape, .seqs = s.seqs,
        .heads = p->heads, .max_blocks = p->max_blocks, .keep_blocks = s.keep_blocks,
        .keep_tokens = s.keep_tokens, .sink_tokens = s.sinks, .recent_tokens = s.recent,
        .max_n_tokens = longest(p, 0, s.seqs), .scale = 0.1f });
    ck_assert_int_eq(stream_sync(stream, NULL), ST_OK);
    for (int seq = 0; seq < s.seqs; seq++)
        ck_assert(s.n_tokens[seq] == 0 ||
                  floats_identical("two levels", got + (size_t)seq * row,
                                   want + (size_t)seq * row, row));
    stream_destroy(stream);
    mem_free(kv);
    mem_free(want);
    mem_free(got);
    mem_free(scratch);
    free_problem(p);
}
END_TEST

TCase *select_ops_case(void)
{
    TCase *c = tcase_create("select_ops");

    tcase_set_timeout(c, 120);
    tcase_add_loop_test(c, choices_are_right, 0, N_SETUPS);
    tcase_add_loop_test(c, ties_go_to_the_earlier, 0, N_KINDS);
    tcase_add_test(c, zeros_are_equal);
    tcase_add_loop_test(c, company_and_threads_change_nothing, 0, N_KINDS);
    tcase_add_loop_test(c, a_million_tokens, 0, N_KINDS);
    tcase_add_loop_test(c, sinks_and_recents, 0, N_KINDS);
    tcase_add_loop_test(c, two_levels_are_the_three_operations, 0, N_KINDS);
    return c;
}
