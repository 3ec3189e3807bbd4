#ifndef TESTS_BENCH_MEMORY_RATE_H
#define TESTS_BENCH_MEMORY_RATE_H

#ifdef __cplusplus
extern "C" {
#endif

/* GB/s at which a kernel that does nothing else reads the current device's memory: the
 * ceiling that figures are held against.  Takes 4 GiB, or half of what is free, meanwhile;
 * 0 when it cannot be measured. */
double memory_rate(void);

#ifdef __cplusplus
}
#endif
#endif
