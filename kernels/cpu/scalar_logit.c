#include "kernels/cpu/logit_loops.h"

const struct logit_leaf scalar_logit_leaf = LOGIT_LOOPS;
