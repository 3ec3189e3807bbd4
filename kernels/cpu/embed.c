#include "kernels/cpu/cpu.h"

#include <string.h>

/* A task is a few rows: a row is one short copy. */
enum { ROWS_A_TASK = 16 };

static void embed_row(float *out, const struct embed_args *a, int32_t id)
{
    size_t from = (size_t)id * (size_t)a->dim;

    if (a->table_type == DTYPE_F32) {
        memcpy(out, (const float *)a->table + from, (size_t)a->dim * sizeof *out);
        return;
    }
    const bf16 *row = (const bf16 *)a->table + from;
    for (int i = 0; i < a->dim; i++)
        out[i] = bf16_to_float(row[i]);
}

static void embed_task(void *arg, int task, int worker)
{
    const struct embed_args *a = arg;
    int end = (task + 1) * ROWS_A_TASK;

    (void)worker;
    for (int t = task * ROWS_A_TASK; t < end && t < a->rows; t++)
        embed_row((float *)a->out + (size_t)t * (size_t)a->dim, a, a->ids[t]);
}

void cpu_embed(struct stream *s, const struct embed_args *a)
{
    struct embed_args args = *a;

    if (s->failed == ST_OK)
        workers_run(s->be->workers, (a->rows + ROWS_A_TASK - 1) / ROWS_A_TASK, embed_task,
                    &args);
}
