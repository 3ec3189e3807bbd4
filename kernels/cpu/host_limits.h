#ifndef KERNELS_CPU_HOST_LIMITS_H
#define KERNELS_CPU_HOST_LIMITS_H

#include <stddef.h>

/* What this process may use of the machine, which in a container is less than what
 * the machine has. */

/* Cores: the scheduler's affinity mask and the cgroup's CPU quota, rounded up; >= 1. */
int host_core_limit(void);

/* Bytes of memory: physical, or the cgroup's limit where that is lower. */
size_t host_memory_limit(void);

#endif
