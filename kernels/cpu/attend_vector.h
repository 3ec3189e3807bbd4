#ifndef KERNELS_CPU_ATTEND_VECTOR_H
#define KERNELS_CPU_ATTEND_VECTOR_H

/* The attention leaf over vectors of LANES floats, included by the file of each
 * instruction set after it has defined, for its types vec (floats) and ivec (32-bit
 * integers):
 *
 *   LANES, TOKEN_VECS  lanes of a vector; vectors of scores held at a time
 *   PAIR_VECS          vectors of channel pairs held at a time
 *   vec_zero, vec_set, vec_load, vec_store, vec_mul, vec_add, vec_sub, vec_max, vec_fma
 *   vec_top, vec_total maximum and sum of the lanes
 *   vec_exp            e^x, 0 from -104 on
 *   vec_below(x, n)    x in the lanes below n, -inf in the others
 *   pair_load, pair_even, pair_odd  channels 2i and 2i + 1 of a word as floats
 *   transpose_keys     keys[pair][token] = pairs of the K of each row
 *
 * A 32-bit word holds two channels in bf16, the even one in the low half: a shift or a
 * mask widens it.  So keys are turned, tokens into lanes, at half the cost, and acc
 * keeps even and odd channels apart: LANES of the even ones, then LANES odd ones. */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* work: weights of ATTEND_QUERIES queries, row by row. */
INLINE void score_queries(float *work, const float *q, const uint32_t *keys, int head_dim,
                          const int n)
{
    for (int token = 0; token < BLOCK_TOKENS; token += TOKEN_VECS * LANES) {
        vec sum[ATTEND_QUERIES][TOKEN_VECS], k[TOKEN_VECS];
        UNROLL for (int i = 0; i < n; i++)
            UNROLL for (int v = 0; v < TOKEN_VECS; v++)
                sum[i][v] = vec_zero();
        for (int pair = 0; pair < head_dim / 2; pair++) {
            const uint32_t *at = keys + pair * BLOCK_TOKENS + token;
            UNROLL for (int v = 0; v < TOKEN_VECS; v++)
                k[v] = pair_even(pair_load(at + v * LANES));
            UNROLL for (int i = 0; i < n; i++)
                UNROLL for (int v = 0; v < TOKEN_VECS; v++)
                    sum[i][v] = vec_fma(vec_set(q[i * head_dim + 2 * pair]), k[v], sum[i][v]);
            UNROLL for (int v = 0; v < TOKEN_VECS; v++)
                k[v] = pair_odd(pair_load(at + v * LANES));
            UNROLL for (int i = 0; i < n; i++)
                UNROLL for (int v = 0; v < TOKEN_VECS; v++)
                    sum[i][v] = vec_fma(vec_set(q[i * head_dim + 2 * pair + 1]), k[v],
                                        sum[i][v]);
        }
        UNROLL for (int i = 0; i < n; i++)
            UNROLL for (int v = 0; v < TOKEN_VECS; v++)
                vec_store(work + i * BLOCK_TOKENS + token + v * LANES, sum[i][v]);
    }
}

/* Scores of query i become weights; what its sums shrink by is returned. */
INLINE float weigh(struct attend_tile *t, int i, float *work, int sees)
{
    vec top = vec_set(t->state.max[i]), sum = vec_zero();

    for (int j = 0; j < BLOCK_TOKENS; j += LANES) {
        vec score = vec_below(vec_load(work + j), sees - j);
        vec_store(work + j, score);
        top = vec_max(score, top);
    }
    float max = vec_top(top);
    for (int j = 0; j < BLOCK_TOKENS; j += LANES) {
        vec weight = vec_exp(vec_sub(vec_load(work + j), vec_set(max)));
        vec_store(work + j, weight);
        sum = vec_add(sum, weight);
    }
    float shrink = max > t->state.max[i] ? expf(t->state.max[i] - max) : 1;
    t->state.sum[i] = t->state.sum[i] * shrink + vec_total(sum);
    t->state.max[i] = max;
    return shrink;
}

/* acc = acc * shrink + the weighted values of the first n_tokens rows, for the channel
 * pairs of `vecs` vectors from `pair` on. */
INLINE void add_channels(const struct attend_tile *t, float *acc, const float *shrink,
                         const struct attend_block *b, int n_tokens, int pair,
                         const int vecs, const int n)
{
    const int value_dim = t->value_dim, value_at = t->value_at;
    const float *work = t->work;
    vec sum[ATTEND_QUERIES][2 * PAIR_VECS];

    acc += 2 * pair;
    UNROLL for (int i = 0; i < n; i++)
        UNROLL for (int v = 0; v < 2 * vecs; v++)
            sum[i][v] = vec_mul(vec_set(shrink[i]), vec_load(acc + i * value_dim + v * LANES));
    for (int j = 0; j < n_tokens; j++) {
        const bf16 *value = b->row[j] + value_at + 2 * pair;
        UNROLL for (int v = 0; v < vecs; v++) {
            ivec words = pair_load(value + 2 * v * LANES);
            vec even = pair_even(words), odd = pair_odd(words);
            UNROLL for (int i = 0; i < n; i++) {
                vec weight = vec_set(work[i * BLOCK_TOKENS + j]);
                sum[i][2 * v] = vec_fma(weight, even, sum[i][2 * v]);
                sum[i][2 * v + 1] = vec_fma(weight, odd, sum[i][2 * v + 1]);
            }
        }
    }
    UNROLL for (int i = 0; i < n; i++)
        UNROLL for (int v = 0; v < 2 * vecs; v++)
            vec_store(acc + i * value_dim + v * LANES, sum[i][v]);
}

INLINE void add_values(const struct attend_tile *t, float *acc, const float *shrink,
                       const struct attend_block *b, int n_tokens, const int n)
{
    int pair = 0, pairs = t->value_dim / 2;

    for (; pair + PAIR_VECS * LANES <= pairs; pair += PAIR_VECS * LANES)
        add_channels(t, acc, shrink, b, n_tokens, pair, PAIR_VECS, n);
    for (; pair < pairs; pair += LANES)
        add_channels(t, acc, shrink, b, n_tokens, pair, 1, n);
}

/* Queries from..from + n - 1 of the tile.  One that sees nothing of the block keeps its
 * state: its weights are 0 and it shrinks by 1. */
INLINE void take_queries(struct attend_tile *t, const struct attend_block *b, int from,
                         const int n)
{
    float shrink[ATTEND_QUERIES];
    float *acc = t->state.acc + (size_t)from * (size_t)t->value_dim;
    int head_dim = t->head_dim, most = 0;

    for (int i = 0; i < n; i++)
        if (t->see[from + i] - b->first > most)
            most = t->see[from + i] - b->first;
    most = most < b->n ? most : b->n;
    if (most == 0)
        return;
    score_queries(t->work, t->q + (size_t)from * (size_t)head_dim, t->keys, head_dim, n);
    for (int i = 0; i < n; i++) {
        float *work = t->work + i * BLOCK_TOKENS;
        int sees = t->see[from + i] - b->first;
        if (sees > 0) {
            shrink[i] = weigh(t, from + i, work, sees < b->n ? sees : b->n);
        } else {
            shrink[i] = 1;
            for (int j = 0; j < BLOCK_TOKENS; j += LANES)
                vec_store(work + j, vec_zero());
        }
    }
    add_values(t, acc, shrink, b, most, n);
}

/* A function each, so that the compiler allocates registers for each count alone. */
static __attribute__((noinline)) void take_1(struct attend_tile *t,
                                             const struct attend_block *b, int from)
{
    take_queries(t, b, from, 1);
}

static __attribute__((noinline)) void take_2(struct attend_tile *t,
                                             const struct attend_block *b, int from)
{
    take_queries(t, b, from, 2);
}

static __attribute__((noinline)) void take_3(struct attend_tile *t,
                                             const struct attend_block *b, int from)
{
    take_queries(t, b, from, 3);
}

static __attribute__((noinline)) void take_4(struct attend_tile *t,
                                             const struct attend_block *b, int from)
{
    take_queries(t, b, from, 4);
}

static __attribute__((noinline)) void take_5(struct attend_tile *t,
                                             const struct attend_block *b, int from)
{
    take_queries(t, b, from, 5);
}

static __attribute__((noinline)) void take_6(struct attend_tile *t,
                                             const struct attend_block *b, int from)
{
    take_queries(t, b, from, 6);
}

static void vector_take(struct attend_tile *t, const struct attend_block *b)
{
    static void (*const take[ATTEND_QUERIES])(struct attend_tile *, const struct attend_block *,
                                              int) = { take_1, take_2, take_3,
                                                       take_4, take_5, take_6 };
    int groups = (t->n + ATTEND_QUERIES - 1) / ATTEND_QUERIES;

    transpose_keys(t->keys, b->row, t->head_dim);
    for (int g = 0, from = 0; g < groups; g++) { /* as even as possible */
        int n = (t->n - from + groups - g - 1) / (groups - g);
        take[n - 1](t, b, from);
        from += n;
    }
}

static void vector_finish(float *out, const float *acc, float factor, int value_dim)
{
    for (int from = 0; from < value_dim; from += 2 * LANES)
        for (int i = 0; i < LANES; i++) {
            out[from + 2 * i] = acc[from + i] * factor;
            out[from + 2 * i + 1] = acc[from + LANES + i] * factor;
        }
}

#endif
