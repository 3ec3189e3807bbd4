#ifndef KERNELS_CPU_SCRATCH_H
#define KERNELS_CPU_SCRATCH_H

/* The storage behind cpu_scratch(): one region a worker. */

struct cpu_scratch;

struct cpu_scratch *scratch_create(int n_workers);
void scratch_destroy(struct cpu_scratch *all, int n_workers);   /* NULL is fine */

#endif
