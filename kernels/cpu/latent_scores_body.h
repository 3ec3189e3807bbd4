#ifndef KERNELS_CPU_LATENT_SCORES_BODY_H
#define KERNELS_CPU_LATENT_SCORES_BODY_H

/* Scores of the rotated index of latent keys (latent.h), included by the file of each
 * instruction set as index_body.h is.
 *
 * A key's channels are codes 0..1 (its signs) or 0..3 (both planes), and a score is made of
 * sums of codes times queries of 8 bits:
 *
 *   filter      sum n[d] * (sign ? 1 : -1)                   = 2 sum n[d] sign[d] - sum n[d]
 *   selection   sum n[d] * (sign ? 1 : -1) * (large ? 3 : 1) = 2 sum n[d] code[d] - 3 sum n[d]
 *
 * with code = 2 sign + (sign == large): 0, 1, 2, 3 for -3, -1, 1, 3.  All heads read the same
 * keys, so the codes of a block are widened to bytes once, four channels of a token to a word,
 * and each word is multiplied by the words of SCORE_QUERIES queries at a time.  The sums are
 * whole numbers: their order does not matter.
 *
 * The file has defined
 *
 *   dot_codes(sum, codes, n, quads)
 *     sum[query][token] = sum over i < quads and the four bytes b of a word of
 *     codes[i][token] byte b * n[i][query][b]; sum [SCORE_QUERIES, BLOCK_TOKENS]
 */

/* Part `part` of query i, n channels of the key from channel `from` on, rotated in x. */
static void leaf_round_query(struct latent_queries *to, int i, const float *x, int from, int n,
                             int part)
{
    float top = 0;
    int32_t total = 0;

    for (int d = 0; d < n; d++)
        top = fabsf(x[d]) > top ? fabsf(x[d]) : top;
    float factor = top > 0 ? 127 / top : 0;
    for (int d = 0; d < n; d++) {
        int power = d % 4, most = 127 >> power;
        float level = rintf(x[d] * factor * (1.0f / (float)(1 << power)));
        level = level < (float)-most ? (float)-most : level > (float)most ? (float)most : level;
        int8_t whole = (int8_t)((level == level ? (int)level : 0) * (1 << power));
        to->n[(from + d) / 4][i][(from + d) % 4] = whole;
        total += whole;
    }
    to->unit[part][i] = top / 127;
    to->total[part][i] = total;
}

/* Bits 0..3 into the lowest bits of four bytes: each bit has one copy where a byte begins. */
static inline uint32_t spread_bits(uint32_t bits)
{
    return (bits & 15) * 0x204081u & 0x01010101u;
}

/* Words of 32 channels of each token; zeros past the end. */
static inline void load_words(uint32_t *out, const uint8_t *plane, int word, int bytes)
{
    int left = bytes - 4 * word;

    for (int t = 0; t < BLOCK_TOKENS; t++) {
        const uint8_t *from = plane + t * bytes + 4 * word;
        if (left >= 4)
            memcpy(&out[t], from, 4);
        else
            out[t] = (uint32_t)from[0] | (left > 1 ? (uint32_t)from[1] << 8 : 0) |
                     (left > 2 ? (uint32_t)from[2] << 16 : 0);
    }
}

static void widen_codes(const struct latent_codes *c)
{
    uint32_t sign[BLOCK_TOKENS], agree[BLOCK_TOKENS];
    int bytes = c->head_dim / 8;

    for (int quad = 0; quad < c->head_dim / 4; quad++) {
        uint32_t *out = c->work + quad * BLOCK_TOKENS;
        int shift = quad % 8 * 4;
        if (shift == 0)
            load_words(sign, c->sign, quad / 8, bytes);
        if (shift == 0 && c->large) {
            load_words(agree, c->large, quad / 8, bytes);
            for (int t = 0; t < BLOCK_TOKENS; t++)
                agree[t] = ~(agree[t] ^ sign[t]);
        }
        if (c->large)
            for (int t = 0; t < BLOCK_TOKENS; t++)
                out[t] = 2 * spread_bits(sign[t] >> shift) + spread_bits(agree[t] >> shift);
        else
            for (int t = 0; t < BLOCK_TOKENS; t++)
                out[t] = spread_bits(sign[t] >> shift);
    }
}

/* best[t] = the maximum over the queries, of which `queries` are there. */
static void leaf_score_latent(float *best, const struct latent_codes *c,
                              const struct latent_queries *tiles, int queries)
{
    int32_t sum[2][SCORE_QUERIES * BLOCK_TOKENS];
    float scale[2][BLOCK_TOKENS], half = c->large ? 0.5f : 1;
    int32_t base = c->large ? 3 : 1, latent_quads = c->latent_dim / 4;

    for (int t = 0; t < BLOCK_TOKENS; t++) {
        scale[0][t] = bf16_to_float(c->scale[2 * t]);
        scale[1][t] = bf16_to_float(c->scale[2 * t + 1]);
    }
    widen_codes(c);
    for (int q = 0; q < queries; q++) {
        const struct latent_queries *tile = &tiles[q / SCORE_QUERIES];
        int i = q % SCORE_QUERIES;
        if (i == 0) {
            dot_codes(sum[0], c->work, tile->n, latent_quads);
            dot_codes(sum[1], c->work + latent_quads * BLOCK_TOKENS, tile->n + latent_quads,
                      c->head_dim / 4 - latent_quads);
        }
        const int32_t *latent = sum[0] + i * BLOCK_TOKENS, *rope = sum[1] + i * BLOCK_TOKENS;
        for (int t = 0; t < BLOCK_TOKENS; t++) {
            float a = (float)(2 * latent[t] - base * tile->total[0][i]);
            float b = (float)(2 * rope[t] - base * tile->total[1][i]);
            float score = scale[0][t] * tile->unit[0][i] * half * a +
                          scale[1][t] * tile->unit[1][i] * half * b;
            best[t] = q == 0 || score > best[t] ? score : best[t];
        }
    }
}

#endif
