#ifndef KERNELS_CPU_ISA_H
#define KERNELS_CPU_ISA_H

#include "kernels/cpu/cpu.h"

/* Instruction sets as classes: avx2 is AVX2 with FMA and F16C, avx512 is AVX-512
 * F/BW/DQ/VL with VNNI and BF16 (Zen 4, Sapphire Rapids and later).  A class counts
 * only when the processor and the operating system have all of it, because its
 * files are compiled with all of it. */

const char *isa_name(enum cpu_isa isa);
bool isa_available(enum cpu_isa isa);

/* name as in backend_options.isa; NULL and "auto" choose the best there is. */
enum status isa_choose(enum cpu_isa *out, const char *name, struct error *err) MUST_USE;

#endif
