#include "kernels/cpu/cpu.h"

#include "engine/base/invariant.h"

#include <math.h>

/* What experts are chosen by: a NaN behind all others. */
static float choice_of(const struct route_args *a, float s, int expert)
{
    float choice = a->bias ? s + a->bias[expert] : s;

    return isnan(choice) ? -INFINITY : choice;
}

static float sigmoid(float x)
{
    return 1 / (1 + expf(-x));
}

/* The k largest of choice, largest first. */
static void choose(int32_t *chosen, const float *choice, int n, int k)
{
    bool taken[MOST_EXPERTS] = { false };

    for (int i = 0; i < k; i++) {
        int best = -1;
        for (int e = 0; e < n; e++)
            if (!taken[e] && (best < 0 || choice[e] > choice[best]))
                best = e;
        taken[best] = true;
        chosen[i] = best;
    }
}

/* s of every expert.  A maximum that is subtracted keeps exp() in range. */
static void softmax(float *s, const float *scores, int n)
{
    float most = scores[0], sum = 0;

    for (int e = 1; e < n; e++)
        most = scores[e] > most ? scores[e] : most;
    for (int e = 0; e < n; e++) {
        s[e] = expf(scores[e] - most);
        sum += s[e];
    }
    for (int e = 0; e < n; e++)
        s[e] /= sum;
}

static void weigh(const struct route_args *a, float *weights, const int32_t *chosen,
                  const float *s)
{
    float sum = 0;

    for (int i = 0; i < a->n_chosen; i++)
        sum += s[chosen[i]];
    for (int i = 0; i < a->n_chosen; i++) {
        float w = s[chosen[i]];
        weights[i] = (a->renormalise ? w / (sum + 1e-20f) : w) * a->scale;
    }
}

static void route_row(void *arg, int row, int worker)
{
    const struct route_args *a = arg;
    const float *scores = a->scores + (size_t)row * (size_t)a->n_experts;
    int32_t *chosen = a->experts + (size_t)row * (size_t)a->n_chosen;
    float *weights = a->weights + (size_t)row * (size_t)a->n_chosen;
    float s[MOST_EXPERTS], choice[MOST_EXPERTS];
    bool soft = a->score == ROUTER_SOFTMAX;

    (void)worker;
    if (a->kv_block && a->kv_block[row] < 0) {
        for (int i = 0; i < a->n_chosen; i++) {
            chosen[i] = -1;
            weights[i] = 0;
        }
        return;
    }
    if (soft)
        softmax(s, scores, a->n_experts);
    for (int e = 0; e < a->n_experts; e++) {
        s[e] = soft ? s[e] : sigmoid(scores[e]);
        choice[e] = choice_of(a, soft ? scores[e] : s[e], e);
    }
    choose(chosen, choice, a->n_experts, a->n_chosen);
    weigh(a, weights, chosen, s);
}

void cpu_route(struct stream *s, const struct route_args *a)
{
    struct route_args copy = *a;

    ASSERT(a->n_experts <= MOST_EXPERTS && a->n_chosen <= MOST_CHOSEN);
    ASSERT(a->n_chosen > 0 && a->n_chosen <= a->n_experts);
    ASSERT(!a->bias || a->score == ROUTER_SIGMOID);
    cpu_logits(s, &(struct logits_args){
        .out = a->scores, .x = a->x, .weight = a->router, .weight_type = a->router_type,
        .rows = a->rows, .dim = a->dim, .vocab = a->n_experts });
    if (s->failed == ST_OK)
        workers_run(s->be->workers, a->rows, route_row, &copy);
}
