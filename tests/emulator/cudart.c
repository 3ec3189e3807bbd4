#include "tests/emulator/cudart.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The version of CUDA whose headers and nvcc this goes with. */
enum { EMULATED_VERSION = 13000 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local cudaError_t last_error;

void cudart_lock(void)
{
    pthread_mutex_lock(&mutex);
}

void cudart_unlock(void)
{
    pthread_mutex_unlock(&mutex);
}

cudaError_t cudart_error(cudaError_t e)
{
    if (e != cudaSuccess)
        last_error = e;
    return e;
}

static void say(const char *call, const char *format, va_list args)
{
    fprintf(stderr, "emulated GPU: %s: ", call);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
}

cudaError_t cudart_refuse(cudaError_t e, const char *call, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    say(call, format, args);
    va_end(args);
    return cudart_error(e);
}

void cudart_die(const char *call, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    say(call, format, args);
    va_end(args);
    abort();
}

void *cudart_new(size_t bytes)
{
    void *p = calloc(1, bytes ? bytes : 1);

    if (!p)
        cudart_die("emulator", "no memory for %zu bytes", bytes);
    return p;
}

/* ---- the device */

static int from_environment(const char *name, int otherwise)
{
    const char *value = getenv(name);
    char *end;

    if (!value || !*value)
        return otherwise;
    long n = strtol(value, &end, 10);
    if (*end || n < 1 || n > 1024)
        cudart_die(name, "%s is no number from 1 to 1024", value);
    return (int)n;
}

/* As many multiprocessors as an H100 has: what the back end divides among them, and which of its
 * kernels it takes, is then as there. */
static struct device_limits limits = { 0, 132, 228 * 1024, 227 * 1024 };

static void find_limits(void)
{
    int cc = from_environment("EMULATED_CC", 90);

    if (cc != 90 && cc != 89 && cc != 86 && cc != 80)
        cudart_die("EMULATED_CC", "%d is none of 90, 89, 86 and 80", cc);
    if (cc < 90) {
        limits.shared_sm_bytes = (cc == 80 ? 164 : 100) * 1024;
        limits.shared_block_bytes = limits.shared_sm_bytes - 1024;
    }
    limits.n_sms = from_environment("EMULATED_SMS", limits.n_sms);
    limits.cc = cc;
}

const struct device_limits *device_limits(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, find_limits);
    return &limits;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = EMULATED_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    return device == 0 ? cudaSuccess : cudart_error(cudaErrorInvalidDevice);
}

/* All that the back end could choose by. */
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *prop, int device)
{
    const struct device_limits *l = device_limits();
    size_t free_bytes;

    if (device != 0)
        return cudart_error(cudaErrorInvalidDevice);
    memset(prop, 0, sizeof *prop);
    snprintf(prop->name, sizeof prop->name, "emulated GPU");
    cudaMemGetInfo(&free_bytes, &prop->totalGlobalMem);
    prop->major = l->cc / 10;
    prop->minor = l->cc % 10;
    prop->warpSize = 32;
    prop->multiProcessorCount = l->n_sms;
    prop->maxThreadsPerBlock = 1024;
    prop->maxThreadsPerMultiProcessor = 2048;
    prop->maxBlocksPerMultiProcessor = 32;
    prop->regsPerBlock = prop->regsPerMultiprocessor = 65536;
    prop->sharedMemPerBlock = 48 * 1024;
    prop->sharedMemPerBlockOptin = l->shared_block_bytes;
    prop->sharedMemPerMultiprocessor = l->shared_sm_bytes;
    prop->reservedSharedMemPerBlock = 1024;
    prop->memPitch = 0x7fffffff;
    prop->maxGridSize[0] = 0x7fffffff;
    prop->maxGridSize[1] = prop->maxGridSize[2] = 65535;
    prop->maxThreadsDim[0] = prop->maxThreadsDim[1] = 1024;
    prop->maxThreadsDim[2] = 64;
    prop->unifiedAddressing = prop->canMapHostMemory = 1;
    prop->hostRegisterSupported = prop->canUseHostPointerForRegisteredMem = 1;
    prop->concurrentKernels = 1;
    prop->clusterLaunch = l->cc >= 90;
    return cudaSuccess;
}

/* There is no driver, and so nothing of it: who asks goes without. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **fn, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found)
{
    (void)symbol, (void)version, (void)flags;
    *fn = NULL;
    if (found)
        *found = cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

/* ---- errors */

cudaError_t cudaGetLastError(void)
{
    cudaError_t e = last_error;

    last_error = cudaSuccess;
    return e;
}

const char *cudaGetErrorString(cudaError_t e)
{
    static const struct {
        cudaError_t e;
        const char *text;
    } known[] = {
        { cudaSuccess, "no error" },
        { cudaErrorInvalidValue, "invalid argument" },
        { cudaErrorMemoryAllocation, "out of memory" },
        { cudaErrorInvalidConfiguration, "invalid configuration of a launch" },
        { cudaErrorInvalidPitchValue, "invalid pitch" },
        { cudaErrorInvalidDeviceFunction, "invalid device function" },
        { cudaErrorInvalidDevice, "invalid device ordinal" },
        { cudaErrorNoKernelImageForDevice, "no kernel for this device" },
        { cudaErrorInvalidResourceHandle, "invalid resource handle" },
        { cudaErrorNotReady, "not ready" },
        { cudaErrorNotSupported, "not supported" },
        { cudaErrorLaunchOutOfResources, "too many resources requested for a launch" },
        { cudaErrorInvalidClusterSize, "invalid size of clusters" },
        { cudaErrorHostMemoryAlreadyRegistered, "host memory is already registered" },
        { cudaErrorHostMemoryNotRegistered, "host memory is not registered" },
        { cudaErrorStreamCaptureUnsupported, "not permitted while a stream captures" },
        { cudaErrorStreamCaptureInvalidated, "the capture has failed before" },
        { cudaErrorStreamCaptureIsolation, "waits for what is outside of the capture" },
        { cudaErrorStreamCaptureWrongThread, "the capture is another thread's" },
        { cudaErrorIllegalState, "not in this state" },
        { cudaErrorCapturedEvent, "the event was recorded by a capture" },
    };

    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (known[i].e == e)
            return known[i].text;
    return "an error that the emulator has no words for";
}
