#include "tests/support/random_data.h"

#include <string.h>

struct test_random test_random(uint64_t seed)
{
    return (struct test_random){ .state = seed * 0x9e3779b97f4a7c15u + 1 };
}

/* SplitMix64: a counter through a strong mixing function. */
uint64_t random_u64(struct test_random *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

int random_below(struct test_random *r, int n)
{
    return (int)((random_u64(r) >> 33) % (uint64_t)n);
}

float random_uniform(struct test_random *r)
{
    return (float)(random_u64(r) >> 40) * (1.0f / (1 << 23)) - 1;
}

/* The sum of twelve uniform values has variance 4 and is normal enough. */
float random_normal(struct test_random *r)
{
    float sum = 0;

    for (int i = 0; i < 12; i++)
        sum += random_uniform(r);
    return sum / 2;
}

void random_floats(struct test_random *r, float *out, size_t n, float scale)
{
    for (size_t i = 0; i < n; i++)
        out[i] = random_normal(r) * scale;
}

void random_bf16s(struct test_random *r, bf16 *out, size_t n, float scale)
{
    for (size_t i = 0; i < n; i++) {
        float f = random_normal(r) * scale;
        uint32_t u;
        memcpy(&u, &f, sizeof u);
        out[i] = (bf16)(u >> 16);
    }
}
