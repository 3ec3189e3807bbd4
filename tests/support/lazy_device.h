#ifndef TESTS_SUPPORT_LAZY_DEVICE_H
#define TESTS_SUPPORT_LAZY_DEVICE_H

#include "kernels/backend.h"

/* A device for tests of those who wait for copies: memory, streams and events, no operations.
 *
 * What is queued on a stream is not done at once, but a little of it whenever one asks for an
 * event that was recorded there, at random for a seed; all of it in stream_sync().  A stream is
 * run by the thread that uses it.  A failure is of all streams.  Close it with
 * backend_close(). */

struct backend *lazy_device_open(uint64_t seed);

/* The step at which the device fails, counted over all streams; 0: none does. */
void lazy_device_fail_at(struct backend *be, uint64_t step);
/* Copies into this memory wait until it is released. */
void lazy_device_hold(struct backend *be, void *base, size_t bytes);
void lazy_device_release(struct backend *be);
/* No copy may span this address. */
void lazy_device_fence(struct backend *be, const void *address);
/* The call of host_register() that is refused, the first is 1; 0: none is. */
void lazy_device_refuse(struct backend *be, int call);
/* Pieces of host memory that are registered now. */
int lazy_device_registered(const struct backend *be);

#endif
