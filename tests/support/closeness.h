#ifndef TESTS_SUPPORT_CLOSENESS_H
#define TESTS_SUPPORT_CLOSENESS_H

#include <stdbool.h>
#include <stddef.h>

/* Whether every row of got [rows, dim] equals want within tolerance times the largest
 * magnitude of want's row, the measure of ops.h; stride elements from row to row.
 * NaN equals only NaN and an infinity only itself.  If not, prints one line with the
 * name and the worst element. */
bool rows_close(const char *name, const float *got, const float *want, size_t rows,
                size_t dim, size_t stride, double tolerance);

/* rows_close() of one row. */
bool row_close(const char *name, const float *got, const float *want, size_t dim,
               double tolerance);

/* Whether all bytes are equal; if not, prints the first float that differs. */
bool floats_identical(const char *name, const float *got, const float *want, size_t n);

#endif
