#include "kernels/cpu/cpu.h"

#include <math.h>

/* Angles reach hundreds of thousands of radians, where one unit in the last place of
 * a float is a hundredth of a radian.  The model was trained with the angle rounded
 * to float, so the rounding is part of the definition; what follows it is exact to
 * an ulp.  cosf and sinf reduce such arguments without loss. */

enum { ROWS_A_TASK = 8 };

static void rope_table_task(void *arg, int task, int worker)
{
    const struct rope_table_args *a = arg;
    int half = a->head_dim / 2, end = (task + 1) * ROWS_A_TASK;

    (void)worker;
    for (int t = task * ROWS_A_TASK; t < end && t < a->rows; t++) {
        float *row = a->cos_sin + (size_t)t * (size_t)a->head_dim;
        float position = (float)a->positions[t];
        for (int i = 0; i < half; i++) {
            float angle = position * a->inv_freq[i];
            row[i] = cosf(angle) * a->factor;
            row[half + i] = sinf(angle) * a->factor;
        }
    }
}

void cpu_rope_table(struct stream *s, const struct rope_table_args *a)
{
    struct rope_table_args args = *a;

    if (s->failed == ST_OK)
        workers_run(s->be->workers, (a->rows + ROWS_A_TASK - 1) / ROWS_A_TASK,
                    rope_table_task, &args);
}
