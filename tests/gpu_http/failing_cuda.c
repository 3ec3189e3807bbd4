/* A device that breaks: preloaded into the daemon (LD_PRELOAD), these take the place of the
 * CUDA runtime's functions of the same names.  While the file that FAILING_CUDA names does
 * not exist they pass calls on; from then on they report what an illegal access by a kernel
 * would, and do nothing: after one a context is lost for all later calls. */

#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <unistd.h>

enum { ILLEGAL_ADDRESS = 700 };  /* cudaErrorIllegalAddress */

static bool is_broken(void)
{
    const char *path = getenv("FAILING_CUDA");

    return path && access(path, F_OK) == 0;
}

/* The function as the CUDA runtime has it. */
static void find(void *out, const char *name)
{
    *(void **)out = dlsym(RTLD_NEXT, name);
    if (!*(void **)out)
        abort();
}

int cudaStreamSynchronize(void *stream);
int cudaGraphLaunch(void *graph, void *stream);
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream);

int cudaStreamSynchronize(void *stream)
{
    int (*next)(void *);

    if (is_broken())
        return ILLEGAL_ADDRESS;
    find(&next, "cudaStreamSynchronize");
    return next(stream);
}

int cudaGraphLaunch(void *graph, void *stream)
{
    int (*next)(void *, void *);

    if (is_broken())
        return ILLEGAL_ADDRESS;
    find(&next, "cudaGraphLaunch");
    return next(graph, stream);
}

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream)
{
    int (*next)(void *, const void *, size_t, int, void *);

    if (is_broken())
        return ILLEGAL_ADDRESS;
    find(&next, "cudaMemcpyAsync");
    return next(to, from, bytes, kind, stream);
}
