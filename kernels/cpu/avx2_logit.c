#include "kernels/cpu/logit_loops.h"

const struct logit_leaf avx2_logit_leaf = LOGIT_LOOPS;
