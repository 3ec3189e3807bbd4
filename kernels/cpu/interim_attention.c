/* Interim scalar attention operations, so that the rest can be put together. */
#include "kernels/cpu/cpu.h"

#include "engine/base/mem.h"

#include <math.h>
#include <string.h>

static void rotate(float *x, int d)
{
    for (int i = 0; i < d; i++)
        x[i] *= (float)rotation_sign(i);
    for (int h = 1; h < d; h *= 2)
        for (int i = 0; i < d; i += 2 * h)
            for (int j = i; j < i + h; j++) {
                float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    for (int i = 0; i < d; i++)
        x[i] /= sqrtf((float)d);
}

static void head_norm_rope(float *x, const void *w, enum dtype t, const float *cs, int d, float eps)
{
    if (w) {
        float ss = 0;
        for (int i = 0; i < d; i++) ss += x[i] * x[i];
        float r = 1.0f / sqrtf(ss / (float)d + eps);
        for (int i = 0; i < d; i++)
            x[i] *= r * (t == DTYPE_F32 ? ((const float *)w)[i] : bf16_to_float(((const bf16 *)w)[i]));
    }
    for (int i = 0; i < d / 2; i++) {
        float a = x[i], b = x[i + d / 2], c = cs[i], s = cs[i + d / 2];
        x[i] = a * c - b * s;
        x[i + d / 2] = b * c + a * s;
    }
}

void cpu_rope_store(struct stream *s, const struct rope_store_args *a)
{
    (void)s;
    int d = a->shape.head_dim, g_n = a->shape.kv_heads;
    struct index_layout l = index_layout(&a->shape);
    for (int r = 0; r < a->rows; r++) {
        const float *cs = a->cos_sin + (size_t)r * d;
        float *q = (float *)a->q + (size_t)r * a->qkv_stride_q;
        for (int h = 0; h < a->heads; h++)
            head_norm_rope(q + h * d, a->q_norm, a->norm_type, cs, d, a->eps);
        int t = a->positions[r] % BLOCK_TOKENS;
        for (int g = 0; g < g_n; g++) {
            float k[256];
            memcpy(k, (const float *)a->k + (size_t)r * a->qkv_stride_k + g * d, sizeof(float) * d);
            const float *v = (const float *)a->v + (size_t)r * a->qkv_stride_v + g * d;
            head_norm_rope(k, a->k_norm, a->norm_type, cs, d, a->eps);
            bf16 *row = a->kv + (size_t)a->kv_block[r] * kv_block_bytes(&a->shape) / 2 + ((size_t)g * BLOCK_TOKENS + t) * 2 * d;
            for (int i = 0; i < d; i++) { row[i] = float_to_bf16(k[i]); row[d + i] = float_to_bf16(v[i]); k[i] = bf16_to_float(row[i]); }
            uint8_t *rec = a->index + (size_t)a->index_block[r] * index_block_bytes(&a->shape) + (size_t)g * l.record_bytes;
            if (l.lo >= 0) {
                bf16 *lo = (bf16 *)(rec + l.lo), *hi = (bf16 *)(rec + l.hi);
                for (int i = 0; i < d; i++) {
                    if (t == 0 || k[i] < bf16_to_float(lo[i])) lo[i] = row[i];
                    if (t == 0 || k[i] > bf16_to_float(hi[i])) hi[i] = row[i];
                }
            }
            if (l.sign >= 0) {
                rotate(k, d);
                float ss = 0;
                for (int i = 0; i < d; i++) ss += k[i] * k[i];
                bf16 sc = float_to_bf16(0.996f * sqrtf(ss / (float)d));
                ((bf16 *)(rec + l.scale))[t] = sc;
                uint8_t *sg = rec + l.sign + t * d / 8, *lg = rec + l.large + t * d / 8;
                memset(sg, 0, d / 8); memset(lg, 0, d / 8);
                if (bf16_to_float(sc) > 0)
                    for (int i = 0; i < d; i++) {
                        if (k[i] >= 0) sg[i / 8] |= (uint8_t)(1u << (i % 8));
                        if (fabsf(k[i]) >= bf16_to_float(sc)) lg[i / 8] |= (uint8_t)(1u << (i % 8));
                    }
            }
        }
    }
}

static const bf16 *kv_row(const bf16 *kv, const int32_t *table, const struct kv_shape *sh, int g, int p)
{
    return kv + (size_t)table[p / BLOCK_TOKENS] * kv_block_bytes(sh) / 2 + ((size_t)g * BLOCK_TOKENS + p % BLOCK_TOKENS) * 2 * sh->head_dim;
}

static void attend(float *out, const float *q, const bf16 *kv, const int32_t *table, const struct kv_shape *sh, int g, const int32_t *list, int n, float scale)
{
    int d = sh->head_dim;
    float m = -INFINITY, sum = 0;
    for (int i = 0; i < d; i++) out[i] = 0;
    for (int j = 0; j < n; j++) {
        const bf16 *row = kv_row(kv, table, sh, g, list ? list[j] : j);
        float s = 0;
        for (int i = 0; i < d; i++) s += q[i] * bf16_to_float(row[i]);
        s *= scale;
        float nm = s > m ? s : m, c = expf(m - nm), p = expf(s - nm);
        sum = sum * c + p;
        for (int i = 0; i < d; i++) out[i] = out[i] * c + p * bf16_to_float(row[d + i]);
        m = nm;
    }
    for (int i = 0; i < d; i++) out[i] /= sum;
}

static void dense_task(void *arg, int task, int worker)
{
    const struct attend_dense_args *a = arg;
    (void)worker;
    int d = a->shape.head_dim, group = a->heads / a->shape.kv_heads;
    for (int s = 0; s < a->seqs; s++)
        for (int r = 0; r < a->n_rows[s]; r++) {
            size_t row = (size_t)(a->first_row[s] + r);
            int n = a->n_tokens[s] - a->n_rows[s] + r + 1;
            attend((float *)a->out + (row * a->heads + task) * d, (const float *)a->q + row * a->q_stride + task * d, a->kv, a->table + (size_t)s * a->max_blocks, &a->shape, task / group, NULL, n, a->scale);
        }
}

void cpu_attend_dense(struct stream *s, const struct attend_dense_args *a)
{
    workers_run(s->be->workers, a->heads, dense_task, (void *)a);
}

void cpu_attend_selected(struct stream *st, const struct attend_selected_args *a)
{
    (void)st;
    int d = a->shape.head_dim, group = a->heads / a->shape.kv_heads;
    for (int s = 0; s < a->seqs; s++)
        for (int h = 0; h < a->heads; h++) {
            size_t g = (size_t)s * a->shape.kv_heads + h / group;
            attend((float *)a->out + ((size_t)s * a->heads + h) * d, (const float *)a->q + (size_t)s * a->q_stride + h * d, a->kv, a->table + (size_t)s * a->max_blocks, &a->shape, h / group, a->chosen + g * a->keep_tokens, a->n_chosen[g], a->scale);
        }
}

static int top(float *score, const uint8_t *forced, int n, int keep, int32_t *out, const int32_t *ids)
{
    int taken = 0;
    uint8_t *mark = mem_calloc((size_t)n, 1);
    for (int i = 0; i < n; i++) if (forced[i]) { mark[i] = 1; taken++; }
    while (taken < keep && taken < n) {
        int best = -1;
        for (int i = 0; i < n; i++) if (!mark[i] && (best < 0 || score[i] > score[best])) best = i;
        mark[best] = 1; taken++;
    }
    int k = 0;
    for (int i = 0; i < n; i++) if (mark[i]) out[k++] = ids ? ids[i] : i;
    for (int i = k; i < keep; i++) out[i] = -1;
    mem_free(mark);
    return k;
}

static float token_score(const uint8_t *rec, const struct index_layout *l, int t, const float *x, int d, bool fine)
{
    const uint8_t *sg = rec + l->sign + t * d / 8, *lg = rec + l->large + t * d / 8;
    float s = 0;
    for (int i = 0; i < d; i++) {
        float w = fine ? ((lg[i / 8] >> (i % 8)) & 1 ? 1.5f : 0.5f) : 1.0f;
        s += (sg[i / 8] >> (i % 8)) & 1 ? x[i] * w : -x[i] * w;
    }
    return s * bf16_to_float(((const bf16 *)(rec + l->scale))[t]);
}

void cpu_block_filter(struct stream *st, const struct block_filter_args *a)
{
    (void)st;
    int d = a->shape.head_dim, group = a->heads / a->shape.kv_heads;
    struct index_layout l = index_layout(&a->shape);
    float *score = mem_alloc(sizeof(float) * (size_t)a->max_blocks);
    uint8_t *forced = mem_alloc((size_t)a->max_blocks);
    for (int s = 0; s < a->seqs; s++)
        for (int g = 0; g < a->shape.kv_heads; g++) {
            int n = a->n_tokens[s], nb = (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
            for (int b = 0; b < nb; b++) {
                score[b] = -INFINITY;
                forced[b] = b * BLOCK_TOKENS < a->sink_tokens || (b + 1) * BLOCK_TOKENS > n - a->recent_tokens;
            }
            for (int h = g * group; h < (g + 1) * group; h++) {
                float x[256];
                memcpy(x, (const float *)a->q + (size_t)s * a->q_stride + h * d, sizeof(float) * d);
                if (a->shape.filter == FILTER_COARSE) rotate(x, d);
                for (int b = 0; b < nb; b++) {
                    const uint8_t *rec = a->index + (size_t)a->table[(size_t)s * a->max_blocks + b] * index_block_bytes(&a->shape) + (size_t)g * l.record_bytes;
                    if (a->shape.filter == FILTER_BOUNDS) {
                        const bf16 *lo = (const bf16 *)(rec + l.lo), *hi = (const bf16 *)(rec + l.hi);
                        float v = 0;
                        for (int i = 0; i < d; i++) v += fmaxf(x[i] * bf16_to_float(lo[i]), x[i] * bf16_to_float(hi[i]));
                        score[b] = fmaxf(score[b], v);
                    } else
                        for (int t = 0; t < BLOCK_TOKENS && b * BLOCK_TOKENS + t < n; t++)
                            score[b] = fmaxf(score[b], token_score(rec, &l, t, x, d, false));
                }
            }
            size_t at = (size_t)s * a->shape.kv_heads + g;
            a->n_kept[at] = top(score, forced, nb, a->keep_blocks, a->kept + at * a->keep_blocks, NULL);
        }
    mem_free(score); mem_free(forced);
}

void cpu_token_select(struct stream *st, const struct token_select_args *a)
{
    (void)st;
    int d = a->shape.head_dim, group = a->heads / a->shape.kv_heads;
    struct index_layout l = index_layout(&a->shape);
    size_t most = (size_t)a->keep_blocks * BLOCK_TOKENS;
    float *score = mem_alloc(sizeof(float) * most);
    uint8_t *forced = mem_alloc(most);
    int32_t *ids = mem_alloc(sizeof(int32_t) * most);
    for (int s = 0; s < a->seqs; s++)
        for (int g = 0; g < a->shape.kv_heads; g++) {
            size_t at = (size_t)s * a->shape.kv_heads + g;
            int n = a->n_tokens[s], m = 0;
            for (int i = 0; i < a->n_kept[at]; i++)
                for (int t = 0; t < BLOCK_TOKENS; t++) {
                    int p = a->kept[at * a->keep_blocks + i] * BLOCK_TOKENS + t;
                    if (p >= n) break;
                    ids[m] = p; forced[m] = p < a->sink_tokens || p >= n - a->recent_tokens; score[m++] = -INFINITY;
                }
            for (int h = g * group; h < (g + 1) * group; h++) {
                float x[256];
                memcpy(x, (const float *)a->q + (size_t)s * a->q_stride + h * d, sizeof(float) * d);
                rotate(x, d);
                for (int i = 0; i < m; i++) {
                    const uint8_t *rec = a->index + (size_t)a->table[(size_t)s * a->max_blocks + ids[i] / BLOCK_TOKENS] * index_block_bytes(&a->shape) + (size_t)g * l.record_bytes;
                    score[i] = fmaxf(score[i], token_score(rec, &l, ids[i] % BLOCK_TOKENS, x, d, true));
                }
            }
            a->n_chosen[at] = top(score, forced, m, a->keep_tokens, a->chosen + at * a->keep_tokens, ids);
        }
    mem_free(score); mem_free(forced); mem_free(ids);
}

void cpu_sample(struct stream *s, const struct sample_args *a)
{
    (void)s;
    for (int r = 0; r < a->rows; r++) {
        const float *l = a->logits + (size_t)r * a->vocab;
        const struct sample_params *p = &a->params[r];
        struct sample_result *o = &a->out[r];
        int best = 0;
        double sum = 0;
        for (int i = 1; i < a->vocab; i++) if (l[i] > l[best]) best = i;
        for (int i = 0; i < a->vocab; i++) sum += exp((double)l[i] - l[best]);
        *o = (struct sample_result){ .token = p->target >= 0 ? p->target : best };
        o->logprob = (float)(l[o->token] - l[best] - log(sum));
        o->rank = 1;
        for (int k = 0; k < p->n_top; k++) {
            int w = -1;
            for (int i = 0; i < a->vocab; i++) {
                bool used = false;
                for (int j = 0; j < k; j++) used = used || o->top[j].id == i;
                if (!used && (w < 0 || l[i] > l[w])) w = i;
            }
            o->top[o->n_top++] = (struct token_logprob){ w, (float)(l[w] - l[best] - log(sum)) };
        }
    }
}

size_t cpu_block_filter_scratch(const struct kv_shape *shape, int max_seqs, int heads, int max_blocks)
{
    (void)shape, (void)max_seqs, (void)heads, (void)max_blocks;
    return 256;
}

size_t cpu_token_select_scratch(const struct kv_shape *shape, int max_seqs, int heads, int keep_blocks)
{
    (void)shape, (void)max_seqs, (void)heads, (void)keep_blocks;
    return 256;
}
