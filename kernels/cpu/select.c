#include "kernels/cpu/index.h"
#include "kernels/cpu/top.h"

#include "engine/base/invariant.h"

#include <string.h>

/* Both levels of the selection: score pieces of a list into keys, then choose.
 *
 * A token's score is a sum over its code's nibbles, each a place in a table of the
 * query's 16 possible contributions: four signs of the rotated key, two coarse channels
 * or one fine channel.  Both planes of a rotated key make a code of two parts:
 *
 *   sum x[d] * (sign ? 1 : -1) * (large ? 1.5 : 0.5)
 *     = sum x[d] * (sign ? 1 : -1) + sum x[d] / 2 * (sign == large ? 1 : -1)
 *
 * so the second part is where the planes agree, and its tables are halved.  Latent keys are
 * scored by whole numbers instead (latent_scores_body.h). */
enum {
    PIECE_BLOCKS = 32,           /* scored by a task: 2,048 tokens, as long as the tables take */
};

struct selection {
    struct stream *s;
    const struct index_leaf *leaf;
    const float *q;
    const uint8_t *index;
    const int32_t *table, *n_tokens;
    const int16_t *channels;
    const int32_t *kept, *n_kept; /* of the first level; NULL while it is this one */
    int32_t *out, *n_out;         /* [seqs, kv_heads, keep], [seqs, kv_heads] */
    uint32_t *keys;               /* [seqs, kv_heads, most_items] */
    struct kv_shape shape;
    struct index_layout layout;
    size_t q_stride;
    int seqs, group, max_blocks, keep_blocks, keep;
    int sink_tokens, recent_tokens;
    int most_blocks, most_items, pieces, code_bytes;
};

/* One sequence and KV head. */
struct target {
    int seq, kv_head, n_tokens;
    const int32_t *kept;
    int n_blocks;                /* to score: of the context, or kept */
    int index;
};

static struct target target_at(const struct selection *a, int index)
{
    struct target t = {
        .seq = index / a->shape.kv_heads,
        .kv_head = index % a->shape.kv_heads,
        .index = index,
    };

    t.n_tokens = a->n_tokens[t.seq];
    t.n_blocks = (t.n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    if (a->kept) {
        t.kept = a->kept + (size_t)index * (size_t)a->keep_blocks;
        t.n_blocks = a->n_kept[index];
    }
    return t;
}

static const float *query_at(const struct selection *a, const struct target *t, int i)
{
    int head = t->kv_head * a->group + i;

    return a->q + (size_t)t->seq * a->q_stride + (size_t)head * (size_t)a->shape.head_dim;
}

static const uint8_t *record_at(const struct selection *a, const struct target *t, int block)
{
    size_t id = (size_t)a->table[(size_t)t->seq * (size_t)a->max_blocks + (size_t)block];

    return a->index + id * index_block_bytes(&a->shape) +
           (size_t)t->kv_head * (size_t)a->layout.record_bytes;
}

/* ---- tables: what each nibble of a code adds to the score of one query */

static void sign_tables(float *table, const float *x, int head_dim, float weight)
{
    for (int d = 0; d < head_dim; d += 4)
        for (int nibble = 0; nibble < 16; nibble++) {
            float sum = 0;
            for (int i = 0; i < 4; i++)
                sum += nibble >> i & 1 ? weight * x[d + i] : -(weight * x[d + i]);
            *table++ = sum;
        }
}

static void coarse_tables(float *table, const float *q, const int16_t *channels)
{
    for (int i = 0; i < INDEX_CHANNELS_KEPT; i += 2)
        for (int nibble = 0; nibble < 16; nibble++)
            *table++ = q[channels[i]] * ((float)(nibble & 3) - 1.5f) +
                       q[channels[i + 1]] * ((float)(nibble >> 2) - 1.5f);
}

static void fine_tables(float *table, const float *q, const int16_t *channels)
{
    for (int i = 0; i < INDEX_CHANNELS_KEPT; i++)
        for (int nibble = 0; nibble < 16; nibble++)
            *table++ = q[channels[i]] * ((float)nibble - 8);
}

/* Floats of the tables of one query. */
static int table_floats(const struct selection *a)
{
    int parts = a->shape.index == INDEX_ROTATED && a->kept ? 2 : 1;

    return parts * a->code_bytes * 2 * 16;
}

/* [group, nibbles, 16] */
static void make_tables(const struct selection *a, const struct target *t, float *tables)
{
    const int16_t *channels = a->channels ? a->channels + t->kv_head * INDEX_CHANNELS_KEPT
                                          : NULL;
    int head_dim = a->shape.head_dim;
    float x[MOST_PART_DIM];

    for (int i = 0; i < a->group; i++, tables += table_floats(a)) {
        const float *q = query_at(a, t, i);
        if (a->shape.index == INDEX_ROTATED) {
            a->leaf->rotate(x, q, head_dim);
            sign_tables(tables, x, head_dim, 1);
            if (a->kept)
                sign_tables(tables + head_dim / 4 * 16, x, head_dim, 0.5f);
        } else if (a->kept) {
            fine_tables(tables, q, channels);
        } else {
            coarse_tables(tables, q, channels);
        }
    }
}

/* ---- queries as they are scored: tables, or whole numbers for latent keys */

static int tiles_of(const struct selection *a)
{
    return (a->group + SCORE_QUERIES - 1) / SCORE_QUERIES;
}

static void round_queries(const struct selection *a, const struct target *t,
                          struct latent_queries *tiles)
{
    int latent = a->shape.latent_dim, rope = a->shape.head_dim - latent;
    float x[MOST_PART_DIM];

    memset(tiles, 0, (size_t)tiles_of(a) * sizeof *tiles);
    for (int i = 0; i < a->group; i++) {
        struct latent_queries *to = &tiles[i / SCORE_QUERIES];
        const float *q = query_at(a, t, i);
        a->leaf->rotate(x, q, latent);
        a->leaf->round_query(to, i % SCORE_QUERIES, x, 0, latent, 0);
        a->leaf->rotate(x, q + latent, rope);
        a->leaf->round_query(to, i % SCORE_QUERIES, x, latent, rope, 1);
    }
}

/* What a task makes of its queries: tables, or of latent keys the other two. */
struct prepared {
    const float *tables;             /* [group, table_floats] */
    const struct latent_queries *tiles; /* [tiles_of] */
    uint32_t *work;                  /* [head_dim / 4, BLOCK_TOKENS] */
};

static struct prepared prepare(const struct selection *a, const struct target *t, int worker)
{
    struct prepared p = { 0 };

    if (a->shape.latent_dim) {
        size_t bytes = (size_t)tiles_of(a) * sizeof *p.tiles;
        size_t words = (size_t)a->shape.head_dim / 4 * BLOCK_TOKENS;
        struct latent_queries *tiles =
            cpu_scratch(a->s, worker, bytes + words * sizeof *p.work);
        round_queries(a, t, tiles);
        p.tiles = tiles;
        p.work = (uint32_t *)(void *)(tiles + tiles_of(a));
    } else {
        float *tables = cpu_scratch(a->s, worker, (size_t)(a->group * table_floats(a)) *
                                                      sizeof *tables);
        make_tables(a, t, tables);
        p.tables = tables;
    }
    return p;
}

/* ---- scores */

/* Where the planes of a rotated key agree. */
static void agreement(uint64_t *out, const uint8_t *sign, const uint8_t *large, int bytes)
{
    for (int i = 0; i < BLOCK_TOKENS * bytes / 8; i++) {
        uint64_t s, l;
        memcpy(&s, sign + 8 * i, sizeof s);
        memcpy(&l, large + 8 * i, sizeof l);
        out[i] = ~(s ^ l);
    }
}

static float largest(const float *score, int n)
{
    float best = score[0];

    for (int i = 1; i < n; i++)
        best = score[i] > best ? score[i] : best;
    return best;
}

/* Rotated keys, BLOCK_TOKENS of them. */
struct planes {
    const bf16 *scale;
    const uint8_t *sign, *large; /* large NULL: only the signs count */
};

/* Scores of all of them, and the largest of the first n. */
static float score_planes(const struct selection *a, const struct planes *keys,
                          const struct prepared *p, float *score, int n)
{
    uint64_t agree[BLOCK_TOKENS * MOST_PART_DIM / 64];
    struct index_codes codes = { .part = { keys->sign }, .parts = 1, .bytes = a->code_bytes };

    if (p->tiles) {
        a->leaf->score_latent(score, &(struct latent_codes){
            .scale = keys->scale, .sign = keys->sign, .large = keys->large,
            .latent_dim = a->shape.latent_dim, .head_dim = a->shape.head_dim, .work = p->work },
            p->tiles, a->group);
        return largest(score, n);
    }
    if (keys->large) {
        agreement(agree, keys->sign, keys->large, a->code_bytes);
        codes.part[1] = (const uint8_t *)agree;
        codes.parts = 2;
    }
    a->leaf->look_up(score, &codes, p->tables, a->group);
    return a->leaf->scale_scores(score, keys->scale, n);
}

/* Scores of all BLOCK_TOKENS tokens of a block, and the largest of the first n; those
 * past the context mean nothing. */
static float score_tokens(const struct selection *a, const uint8_t *record,
                          const struct prepared *p, float *score, int n)
{
    const struct index_layout *l = &a->layout;

    if (a->shape.index == INDEX_ROTATED)
        return score_planes(a, &(struct planes){
            .scale = (const bf16 *)(const void *)(record + l->scale), .sign = record + l->sign,
            .large = a->kept ? record + l->large : NULL }, p, score, n);
    a->leaf->look_up(score, &(struct index_codes){
        .part = { record + (a->kept ? l->fine : l->coarse) }, .parts = 1,
        .bytes = a->code_bytes }, p->tables, a->group);
    return a->leaf->scale_scores(
        score, (const bf16 *)(const void *)(record + (a->kept ? l->scale4 : l->scale2)), n);
}

static float bounds_score(const struct selection *a, const struct target *t,
                          const uint8_t *record)
{
    const bf16 *lo = (const bf16 *)(const void *)(record + a->layout.lo);
    const bf16 *hi = (const bf16 *)(const void *)(record + a->layout.hi);
    int latent = a->shape.latent_dim, rest = a->shape.head_dim - latent;
    float best = 0;

    for (int i = 0; i < a->group; i++) {
        const float *q = query_at(a, t, i);
        float score = a->leaf->bound(q + latent, lo + latent, hi + latent, rest);
        if (latent)
            score += a->leaf->bound(q, lo, hi, latent);
        if (i == 0 || score > best)
            best = score;
    }
    return best;
}

static void score_block(const struct selection *a, const struct target *t, int block,
                        const struct prepared *p, uint32_t *key)
{
    int left = t->n_tokens - block * BLOCK_TOKENS;
    float score[BLOCK_TOKENS];

    if (always_kept(block, t->n_tokens, a->sink_tokens, a->recent_tokens))
        *key = TOP_FORCED;
    else if (a->shape.filter == FILTER_BOUNDS)
        *key = top_key(bounds_score(a, t, record_at(a, t, block)));
    else
        *key = top_key(score_tokens(a, record_at(a, t, block), p, score,
                                    left < BLOCK_TOKENS ? left : BLOCK_TOKENS));
}

/* Blocks [first, end), of which the means fill the room of one block's tokens. */
static void score_means(const struct selection *a, const struct target *t, int first, int end,
                        const struct prepared *p, uint32_t *keys)
{
    const struct index_layout *l = &a->layout;
    size_t bytes = (size_t)BLOCK_MEANS * (size_t)a->shape.head_dim / 8;
    size_t scales = (size_t)(BLOCK_MEANS * index_parts(&a->shape));
    uint64_t sign[BLOCK_TOKENS * MOST_HEAD_DIM / 64] = { 0 };
    bf16 scale[2 * BLOCK_TOKENS] = { 0 };
    bool forced[MEAN_TOKENS];
    float score[BLOCK_TOKENS];

    for (int i = 0; i < end - first; i++) {
        int block = first + i;
        forced[i] = filter_must_keep(FILTER_MEANS, block, t->n_tokens, a->sink_tokens,
                                     a->recent_tokens);
        if (forced[i])
            continue;
        const uint8_t *record = record_at(a, t, block);
        memcpy((uint8_t *)sign + (size_t)i * bytes, record + l->mean_sign, bytes);
        memcpy(scale + (size_t)i * scales, record + l->mean_scale, scales * sizeof *scale);
    }
    score_planes(a, &(struct planes){ .scale = scale, .sign = (const uint8_t *)sign }, p, score,
                 BLOCK_TOKENS);
    for (int i = 0; i < end - first; i++)
        keys[i] = forced[i] ? TOP_FORCED : top_key(largest(score + i * BLOCK_MEANS, BLOCK_MEANS));
}

static void score_kept_block(const struct selection *a, const struct target *t, int block,
                             const struct prepared *p, uint32_t *keys)
{
    float score[BLOCK_TOKENS];

    score_tokens(a, record_at(a, t, block), p, score, BLOCK_TOKENS);
    for (int i = 0; i < BLOCK_TOKENS; i++)
        keys[i] = always_chosen(block * BLOCK_TOKENS + i, t->n_tokens, a->sink_tokens,
                                a->recent_tokens)
                      ? TOP_FORCED
                      : top_key(score[i]);
}

static void score_task(void *arg, int task, int worker)
{
    const struct selection *a = arg;
    struct target t = target_at(a, task / a->pieces);
    int from = task % a->pieces * PIECE_BLOCKS, to = from + PIECE_BLOCKS;
    uint32_t *keys = a->keys + (size_t)t.index * (size_t)a->most_items;
    struct prepared p = { 0 };

    if (to > t.n_blocks)
        to = t.n_blocks;
    if (from >= to)
        return;
    if (a->kept || a->shape.filter != FILTER_BOUNDS)
        p = prepare(a, &t, worker);
    if (!t.kept && a->shape.filter == FILTER_MEANS) {
        for (int i = from; i < to; i += MEAN_TOKENS)
            score_means(a, &t, i, to - i < MEAN_TOKENS ? to : i + MEAN_TOKENS, &p, keys + i);
        return;
    }
    for (int i = from; i < to; i++) {
        if (t.kept)
            score_kept_block(a, &t, t.kept[i], &p, keys + i * BLOCK_TOKENS);
        else
            score_block(a, &t, i, &p, keys + i);
    }
}

/* ---- choice */

static void choose_task(void *arg, int task, int worker)
{
    const struct selection *a = arg;
    struct target t = target_at(a, task);
    const uint32_t *keys = a->keys + (size_t)task * (size_t)a->most_items;
    int32_t *out = a->out + (size_t)task * (size_t)a->keep;
    int n = t.n_blocks;

    (void)worker;
    if (t.kept) {
        int end = n > 0 ? (t.kept[n - 1] + 1) * BLOCK_TOKENS : 0;
        n = n * BLOCK_TOKENS - (end > t.n_tokens ? end - t.n_tokens : 0);
    }
    int n_out = choose_top(out, keys, n, a->keep);
    for (int i = 0; t.kept && i < n_out; i++)
        out[i] = t.kept[out[i] / BLOCK_TOKENS] * BLOCK_TOKENS + out[i] % BLOCK_TOKENS;
    for (int i = n_out; i < a->keep; i++)
        out[i] = -1;
    a->n_out[task] = n_out;
}

/* Of one part of a token's code. */
static int code_bytes(const struct kv_shape *shape, bool fine)
{
    if (shape->index == INDEX_ROTATED)
        return shape->head_dim / 8;
    return INDEX_CHANNELS_KEPT / (fine ? 2 : 4);
}

static void select_items(struct selection *a, int heads)
{
    int targets = a->seqs * a->shape.kv_heads;

    ASSERT(heads % a->shape.kv_heads == 0 && a->keep > 0);
    ASSERT(a->shape.head_dim - a->shape.latent_dim <= MOST_PART_DIM);
    ASSERT(a->shape.latent_dim <= MOST_PART_DIM);
    ASSERT(a->shape.latent_dim == 0 || a->shape.index == INDEX_ROTATED);
    ASSERT(a->shape.index != INDEX_CHANNELS || a->channels);
    a->leaf = index_leaf_of(a->s);
    a->layout = index_layout(&a->shape);
    a->group = heads / a->shape.kv_heads;
    a->code_bytes = code_bytes(&a->shape, a->kept != NULL);
    a->pieces = (a->most_blocks + PIECE_BLOCKS - 1) / PIECE_BLOCKS;
    workers_run(a->s->be->workers, targets * a->pieces, score_task, a);
    workers_run(a->s->be->workers, targets, choose_task, a);
}

void cpu_block_filter(struct stream *s, const struct block_filter_args *args)
{
    struct selection a = {
        .s = s,
        .q = args->q,
        .index = args->index,
        .table = args->table,
        .n_tokens = args->n_tokens,
        .channels = args->channels,
        .out = args->kept,
        .n_out = args->n_kept,
        .keys = args->scratch,
        .shape = args->shape,
        .q_stride = (size_t)args->q_stride,
        .seqs = args->seqs,
        .max_blocks = args->max_blocks,
        .keep = args->keep_blocks,
        .sink_tokens = args->sink_tokens,
        .recent_tokens = args->recent_tokens,
        .most_blocks = (args->max_n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS,
        .most_items = args->max_blocks,
    };

    if (s->failed == ST_OK && args->seqs > 0)
        select_items(&a, args->heads);
}

void cpu_token_select(struct stream *s, const struct token_select_args *args)
{
    struct selection a = {
        .s = s,
        .q = args->q,
        .index = args->index,
        .table = args->table,
        .n_tokens = args->n_tokens,
        .channels = args->channels,
        .kept = args->kept,
        .n_kept = args->n_kept,
        .out = args->chosen,
        .n_out = args->n_chosen,
        .keys = args->scratch,
        .shape = args->shape,
        .q_stride = (size_t)args->q_stride,
        .seqs = args->seqs,
        .max_blocks = args->max_blocks,
        .keep_blocks = args->keep_blocks,
        .keep = args->keep_tokens,
        .sink_tokens = args->sink_tokens,
        .recent_tokens = args->recent_tokens,
        .most_blocks = args->keep_blocks,
        .most_items = args->keep_blocks * BLOCK_TOKENS,
    };

    if (s->failed == ST_OK && args->seqs > 0)
        select_items(&a, args->heads);
}

/* A key for each block, or for each token of the kept blocks. */
size_t cpu_block_filter_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                int max_blocks)
{
    (void)heads;
    return (size_t)max_seqs * (size_t)shape->kv_heads * (size_t)max_blocks * sizeof(uint32_t);
}

size_t cpu_token_select_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                int keep_blocks)
{
    (void)heads;
    return (size_t)max_seqs * (size_t)shape->kv_heads * (size_t)keep_blocks * BLOCK_TOKENS *
           sizeof(uint32_t);
}
