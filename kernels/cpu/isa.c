#include "kernels/cpu/isa.h"

#include <cpuid.h>
#include <string.h>

static const char *const names[] = { "scalar", "avx2", "avx512" };

const char *isa_name(enum cpu_isa isa)
{
    return names[isa];
}

/* The compilers' own test does not know f16c everywhere: leaf 1, ecx bit 29. */
static bool has_f16c(void)
{
    unsigned a, b, c, d;

    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bf16");
}

bool isa_available(enum cpu_isa isa)
{
    return isa == ISA_SCALAR || (isa == ISA_AVX2 && has_avx2()) ||
           (isa == ISA_AVX512 && has_avx512());
}

enum status isa_choose(enum cpu_isa *out, const char *name, struct error *err)
{
    if (!name || strcmp(name, "auto") == 0) {
        *out = has_avx512() ? ISA_AVX512 : has_avx2() ? ISA_AVX2 : ISA_SCALAR;
        return ST_OK;
    }
    for (int isa = ISA_SCALAR; isa <= ISA_AVX512; isa++) {
        if (strcmp(name, names[isa]) != 0)
            continue;
        *out = (enum cpu_isa)isa;
        if (!isa_available(*out))
            return error_set(err, ST_UNSUPPORTED,
                             "this processor lacks instructions of the '%s' class", name);
        return ST_OK;
    }
    return error_set(err, ST_INVALID,
                     "no instruction set is called '%s': write auto, scalar, avx2 or avx512",
                     name);
}
