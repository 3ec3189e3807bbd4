/* Interim greedy sampler. */
#include "kernels/cpu/cpu.h"

#include <math.h>

