#include "kernels/cpu/logit_loops.h"

const struct logit_leaf avx512_logit_leaf = LOGIT_LOOPS;
