#ifndef TESTS_SUPPORT_INDEX_REFERENCE_H
#define TESTS_SUPPORT_INDEX_REFERENCE_H

#include "kernels/layout.h"

#include <stddef.h>
#include <stdint.h>

/* The index of layout.h made one value at a time, in its arithmetic: to the bit. */

float get_bf16(const uint8_t *at);
void put_bf16(uint8_t *at, float value);

/* Into bits `at`.. of codes, which are 0. */
void set_bits(uint8_t *codes, int at, unsigned value);

/* Number `number` of the codes, each of n bits. */
int code_bits(const uint8_t *codes, int number, int n);

float rms_exactly(const float *x, int n);

/* x = R x: pairs at growing distances, each sum rounded. */
void rotate_exactly(float *x, int n);

/* The rotated index of a key, or of one part of it. */
void index_part(uint8_t *scale, uint8_t *sign, uint8_t *large, const float *key, int n);

/* The bounds of a record after token `token` of its block; none if it has no bounds. */
void widen_record(uint8_t *record, const struct kv_shape *shape, const bf16 *key, int token);

/* The means of a record whose block is full, if it has any; keys lie `stride` elements apart. */
void add_record_means(uint8_t *record, const struct kv_shape *shape, const bf16 *keys,
                      size_t stride);

#endif
