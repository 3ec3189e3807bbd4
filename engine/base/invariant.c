#include "engine/base/invariant.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

void invariant_failed(const char *file, int line, const char *expr)
{
    char thread[16] = "?";

    pthread_getname_np(pthread_self(), thread, sizeof thread);
    fprintf(stderr, "%s:%d: invariant broken in thread %s: %s\n", file, line, thread, expr);
    fflush(stderr);
    abort();
}
