#include "tests/support/closeness.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static double largest(const float *row, size_t dim)
{
    double most = 0;

    for (size_t i = 0; i < dim; i++)
        if (isfinite(row[i]) && fabs((double)row[i]) > most)
            most = fabs((double)row[i]);
    return most;
}

/* In units of the row's magnitude; infinite when the values cannot be compared. */
static double distance(float got, float want, double magnitude)
{
    if (isnan(got) || isnan(want))
        return isnan(got) && isnan(want) ? 0 : INFINITY;
    if (got == want)
        return 0;
    return fabs((double)got - (double)want) / (magnitude > 0 ? magnitude : 1e-30);
}

bool rows_close(const char *name, const float *got, const float *want, size_t rows,
                size_t dim, size_t stride, double tolerance)
{
    double worst = -1;
    size_t worst_row = 0, worst_at = 0;

    for (size_t r = 0; r < rows; r++) {
        const float *g = got + r * stride, *w = want + r * stride;
        double magnitude = largest(w, dim);
        for (size_t i = 0; i < dim; i++) {
            double d = distance(g[i], w[i], magnitude);
            if (d > worst) {
                worst = d;
                worst_row = r;
                worst_at = i;
            }
        }
    }
    if (worst <= tolerance)
        return true;
    printf("%s: row %zu element %zu is %.9g, not %.9g: off by %.3g, tolerance %.3g\n", name,
           worst_row, worst_at, (double)got[worst_row * stride + worst_at],
           (double)want[worst_row * stride + worst_at], worst, tolerance);
    return false;
}

bool row_close(const char *name, const float *got, const float *want, size_t dim,
               double tolerance)
{
    return rows_close(name, got, want, 1, dim, dim, tolerance);
}

bool floats_identical(const char *name, const float *got, const float *want, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (memcmp(&got[i], &want[i], sizeof got[i]) == 0)
            continue;
        printf("%s: element %zu is %.9g, not exactly %.9g\n", name, i, (double)got[i],
               (double)want[i]);
        return false;
    }
    return true;
}
