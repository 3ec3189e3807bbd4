#ifndef HOST_COPY_H
#define HOST_COPY_H

#include <stddef.h>
#include <stdint.h>

struct stream;

/* Queue the copies of the same part of n host slots into device memory, one behind the other:
 * `bytes` at `offset` of slots[i] become bytes i * bytes and on of `to`.  Slots that follow each
 * other in ascending order go in one copy; none goes from one registered piece of the tier
 * (host_memory.h) into the next. */
void host_copy_parts(struct stream *s, void *to, const void *tier, size_t slot_bytes,
                     size_t offset, size_t bytes, const int32_t *slots, int n);

#endif
