#include "engine/model/rope.h"

#include <math.h>

static const double pi = 3.14159265358979323846;

/* theta^(2i/d): exponent and power in float. */
static float wavelength_over_2pi(double theta, int i, int head_dim)
{
    float exponent = (float)(2 * i) / (float)head_dim;

    return (float)pow((double)(float)theta, (double)exponent);
}

/* Short waves are kept, waves longer than the original context are stretched,
 * and between the two the frequency is blended. */
static float llama3_scaled(float f, const struct rope_params *p)
{
    float wave = (float)(2 * pi) / f;
    float low = (float)(p->original / p->low_freq_factor);
    float high = (float)(p->original / p->high_freq_factor);

    if (wave > low)
        return f / (float)p->factor;
    if (wave < high)
        return f;
    float smooth = ((float)p->original / wave - (float)p->low_freq_factor)
                   / (float)(p->high_freq_factor - p->low_freq_factor);
    return (1.0f - smooth) * f / (float)p->factor + smooth * f;
}

/* The channel pair that turns this often within the original context. */
static double yarn_pair(double rotations, const struct rope_params *p, int head_dim)
{
    return head_dim * log(p->original / (rotations * 2 * pi)) / (2 * log(p->theta));
}

double rope_mscale(double factor, double mscale)
{
    return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1;
}

static double yarn_attention(const struct rope_params *p)
{
    if (p->attention_factor > 0)
        return p->attention_factor;
    if (p->mscale > 0 && p->mscale_all_dim > 0)
        return rope_mscale(p->factor, p->mscale) / rope_mscale(p->factor, p->mscale_all_dim);
    return rope_mscale(p->factor, 1);
}

static void yarn_frequencies(float *inv_freq, const struct rope_params *p, int head_dim)
{
    double low = yarn_pair(p->beta_fast, p, head_dim);
    double high = yarn_pair(p->beta_slow, p, head_dim);

    if (p->truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0);
    high = fmin(high, head_dim - 1);
    if (low == high)
        high += 0.001;
    for (int i = 0; i < head_dim / 2; i++) {
        float base = wavelength_over_2pi(p->theta, i, head_dim);
        float kept = 1.0f / base;
        float stretched = 1.0f / ((float)p->factor * base);
        float ramp = ((float)i - (float)low) / (float)(high - low);
        ramp = fminf(fmaxf(ramp, 0.0f), 1.0f);
        float keep = 1.0f - ramp;
        inv_freq[i] = stretched * (1.0f - keep) + kept * keep;
    }
}

void rope_frequencies(float *inv_freq, float *factor, const struct rope_params *p,
                      int head_dim)
{
    *factor = 1.0f;
    if (p->kind == ROPE_YARN) {
        *factor = (float)yarn_attention(p);
        yarn_frequencies(inv_freq, p, head_dim);
        return;
    }
    for (int i = 0; i < head_dim / 2; i++) {
        float f = 1.0f / wavelength_over_2pi(p->theta, i, head_dim);
        if (p->kind == ROPE_LINEAR)
            f /= (float)p->factor;
        else if (p->kind == ROPE_LLAMA3)
            f = llama3_scaled(f, p);
        inv_freq[i] = f;
    }
}
