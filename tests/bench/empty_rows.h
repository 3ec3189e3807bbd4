#ifndef TESTS_BENCH_EMPTY_ROWS_H
#define TESTS_BENCH_EMPTY_ROWS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Hot rows (kernels/hot_rows.h) whose first n rows become empty in every layer, set and KV head,
 * and the next ones to be replaced.
 * Sets are the same distance from each other in every layer, and layers from each other. */
struct empty_rows_args {
    int32_t *position;           /* of layer 0, device: [lists, rows_per_head] */
    int32_t *hand;               /* of layer 0, device: [lists] */
    size_t layer_stride, hand_stride; /* elements from layer to layer */
    int layers, lists;           /* lists: sets times KV heads */
    int rows_per_head, n;
};

/* Waits until it is done.  False when the device failed. */
bool empty_rows(const struct empty_rows_args *args);

#ifdef __cplusplus
}
#endif
#endif
