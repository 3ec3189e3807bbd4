/* Interim greedy sampler. */
#include "kernels/cpu/cpu.h"

#include <math.h>

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
