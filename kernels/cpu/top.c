#include "kernels/cpu/top.h"

#include <string.h>

/* Radix selection: the digit of the keep-th largest key is found in a histogram, then
 * only keys that share it count for the next one.  11 + 11 + 10 bits. */
enum { DIGITS = 3, MOST_BINS = 1 << 11 };

static const int shift_of[DIGITS] = { 21, 10, 0 }, bits_of[DIGITS] = { 11, 11, 10 };

/* The keep-th largest key; *equal is how many of the keys equal to it are wanted. */
static uint32_t find_threshold(const uint32_t *keys, int n, int keep, int *equal)
{
    uint32_t prefix = 0, mask = 0;
    int wanted = keep;

    for (int digit = 0; digit < DIGITS; digit++) {
        int shift = shift_of[digit], bins = 1 << bits_of[digit], bin = bins - 1;
        int count[MOST_BINS];
        memset(count, 0, (size_t)bins * sizeof count[0]);
        for (int i = 0; i < n; i++)
            if ((keys[i] & mask) == prefix)
                count[keys[i] >> shift & (uint32_t)(bins - 1)]++;
        while (count[bin] < wanted)
            wanted -= count[bin--];
        prefix |= (uint32_t)bin << shift;
        mask |= (uint32_t)(bins - 1) << shift;
    }
    *equal = wanted;
    return prefix;
}

int choose_top(int32_t *out, const uint32_t *keys, int n, int keep)
{
    int n_out = 0, equal;

    if (n <= keep) {
        for (int i = 0; i < n; i++)
            out[i] = i;
        return n;
    }
    if (keep <= 0)
        return 0;
    uint32_t threshold = find_threshold(keys, n, keep, &equal);
    for (int i = 0; i < n && n_out < keep; i++)
        if (keys[i] > threshold || (keys[i] == threshold && equal-- > 0))
            out[n_out++] = i;
    return n_out;
}
