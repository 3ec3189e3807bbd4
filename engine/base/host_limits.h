#ifndef BASE_HOST_LIMITS_H
#define BASE_HOST_LIMITS_H

#include <stddef.h>

/* What this process may use of the machine, which in a container is less than what
 * the machine has.  Any thread. */

/* Cores: the scheduler's affinity mask and the cgroup's CPU quota, rounded up; >= 1. */
int host_core_limit(void);

/* Bytes of memory: physical, or the cgroup's limit where that is lower. */
size_t host_memory_limit(void);

/* Of these, what could be had now without taking it from a process: free, or holding file
 * contents that can be read again. */
size_t host_memory_available(void);

#endif
