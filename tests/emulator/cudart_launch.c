#include "tests/emulator/cudart.h"

#include "tests/emulator/ptx.h"

#include <stdlib.h>
#include <string.h>

/* nvcc makes, for every file with kernels, a constructor that registers its fat binary and a host
 * function for each kernel.  PTX is read when the first of its kernels is asked for. */

enum {
    MOST_THREADS = 1024,         /* of a block */
    MOST_SM_THREADS = 2048,
    DEFAULT_SHARED = 48 * 1024,  /* bytes of a block that has not been allowed more */
    RESERVED_SHARED = 1024,      /* bytes of every block, the system's */
    MOST_CLUSTER = 8,            /* blocks, where no kernel asks for what is not portable */
    SMS_AN_GPC = 18,             /* most of one part of the GPU, which a cluster fits into */
};

struct module {
    const void *wrapper;
    const char *text;            /* the fat binary's */
    size_t n_text;
    struct ptx_module *ptx;      /* NULL: not read yet */
};

struct kernel {
    struct kernel *next;
    const void *host;            /* the function that stands for it */
    struct module *module;
    const char *name;            /* mangled; the program's */
    struct ptx_kernel *ptx;      /* NULL: not looked up yet; also the next two */
    struct launch_bounds bounds;
    size_t shared_bytes;         /* that it declares */
    size_t most_dynamic;         /* bytes that a launch may have */
};

static struct kernel *kernels;

/* ---- called by the constructors */

void **__cudaRegisterFatBinary(void *wrapper);
void __cudaRegisterFatBinaryEnd(void **module);
void __cudaUnregisterFatBinary(void **module);
void __cudaRegisterFunction(void **module, const char *host, char *device, const char *name,
                            int thread_limit, uint3 *tid, uint3 *bid, dim3 *block, dim3 *grid,
                            int *warp);

void **__cudaRegisterFatBinary(void *wrapper)
{
    struct module *m = cudart_new(sizeof *m);

    m->wrapper = wrapper;
    return (void **)m;
}

void __cudaRegisterFatBinaryEnd(void **module)
{
    (void)module;
}

void __cudaUnregisterFatBinary(void **module)
{
    struct module *m = (struct module *)module;

    cudart_lock();
    for (struct kernel **at = &kernels; *at;) {
        struct kernel *k = *at;
        if (k->module == m) {
            *at = k->next;
            free(k);
        } else {
            at = &k->next;
        }
    }
    ptx_module_free(m->ptx);
    free(m);
    cudart_unlock();
}

void __cudaRegisterFunction(void **module, const char *host, char *device, const char *name,
                            int thread_limit, uint3 *tid, uint3 *bid, dim3 *block, dim3 *grid,
                            int *warp)
{
    struct kernel *k = cudart_new(sizeof *k);

    (void)device, (void)thread_limit, (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
    k->host = host;
    k->module = (struct module *)module;
    k->name = name;
    cudart_lock();
    k->next = kernels;
    kernels = k;
    cudart_unlock();
}

/* ---- kernels */

static cudaError_t read_module(struct module *m, const char *kernel)
{
    int cc = device_limits()->cc;

    if (m->ptx)
        return cudaSuccess;
    m->text = fatbin_ptx(m->wrapper, cc, &m->n_text);
    if (!m->text)
        return cudart_refuse(cudaErrorNoKernelImageForDevice, "fat binary",
                             "no PTX for devices of %d with %s", cc, kernel);
    m->ptx = ptx_module_read(m->text, m->n_text);
    return m->ptx ? cudaSuccess
                  : cudart_refuse(cudaErrorInvalidPtx, "fat binary", "the PTX with %s", kernel);
}

static cudaError_t look_up(struct kernel *k)
{
    cudaError_t e = k->ptx ? cudaSuccess : read_module(k->module, k->name);

    if (k->ptx || e != cudaSuccess)
        return e;
    k->ptx = ptx_kernel_find(k->module->ptx, k->name);
    if (!k->ptx)
        return cudart_refuse(cudaErrorInvalidDeviceFunction, "fat binary", "no kernel %s",
                             k->name);
    k->bounds = fatbin_launch_bounds(k->module->text, k->module->n_text, k->name);
    k->shared_bytes = ptx_kernel_shared_bytes(k->ptx);
    k->most_dynamic = k->shared_bytes < DEFAULT_SHARED ? DEFAULT_SHARED - k->shared_bytes : 0;
    return cudaSuccess;
}

/* By its host function, or by what __cudaGetKernel() gave. */
static cudaError_t find_kernel(struct kernel **out, const void *function, const char *call)
{
    for (struct kernel *k = kernels; k; k = k->next)
        if (k->host == function || k == function) {
            *out = k;
            return look_up(k);
        }
    return cudart_refuse(cudaErrorInvalidDeviceFunction, call, "%p is no kernel", function);
}

cudaError_t __cudaGetKernel(cudaKernel_t *out, const void *function);

/* Runs before main() in places, so nothing is read here. */
cudaError_t __cudaGetKernel(cudaKernel_t *out, const void *function)
{
    struct kernel *k;

    cudart_lock();
    for (k = kernels; k && k->host != function;)
        k = k->next;
    cudart_unlock();
    *out = (cudaKernel_t)k;
    return k ? cudaSuccess : cudart_error(cudaErrorInvalidDeviceFunction);
}

static int max_threads(const struct kernel *k)
{
    return k->bounds.max_threads ? k->bounds.max_threads : MOST_THREADS;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *function)
{
    struct kernel *k;
    cudaError_t e;

    memset(out, 0, sizeof *out);
    cudart_lock();
    e = find_kernel(&k, function, "cudaFuncGetAttributes");
    if (e == cudaSuccess) {
        out->maxThreadsPerBlock = max_threads(k);
        out->sharedSizeBytes = k->shared_bytes;
        out->maxDynamicSharedSizeBytes = (int)k->most_dynamic;
        out->ptxVersion = out->binaryVersion = ptx_kernel_target(k->ptx);
    }
    cudart_unlock();
    return e;
}

static cudaError_t allow_dynamic(struct kernel *k, int value, const char *call)
{
    size_t most = device_limits()->shared_block_bytes;

    if (value < 0 || (size_t)value + k->shared_bytes > most)
        return cudart_refuse(cudaErrorInvalidValue, call,
                             "%d bytes beside the %zu of %s: a block has %zu", value,
                             k->shared_bytes, k->name, most);
    k->most_dynamic = (size_t)value;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value)
{
    static const char call[] = "cudaFuncSetAttribute";
    struct kernel *k;
    cudaError_t e;

    cudart_lock();
    e = find_kernel(&k, function, call);
    if (e == cudaSuccess && attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
        e = allow_dynamic(k, value, call);
    else if (e == cudaSuccess && attribute != cudaFuncAttributePreferredSharedMemoryCarveout)
        cudart_die(call, "attribute %d is not emulated", (int)attribute);
    else if (e == cudaSuccess && (value < -1 || value > 100)) /* else a wish, without effect */
        e = cudart_refuse(cudaErrorInvalidValue, call, "a carveout of %d percent", value);
    cudart_unlock();
    return e;
}

/* ---- launches */

/* The values of the parameters follow it, each at a multiple of 8 bytes. */
struct launch {
    const struct kernel *kernel;
    unsigned grid[3], block[3], cluster[3];
    size_t shared_bytes;
    int n_params;
};

static size_t padded(size_t bytes)
{
    return (bytes + 7) / 8 * 8;
}

static size_t launch_bytes(const struct launch *l)
{
    size_t bytes = sizeof *l;

    for (int i = 0; i < l->n_params; i++)
        bytes += padded(ptx_kernel_param_bytes(l->kernel->ptx, i));
    return bytes;
}

static struct launch *copy_with_params(const struct launch *l, void **args)
{
    struct launch *copy = cudart_new(launch_bytes(l));
    char *to = (char *)(copy + 1);

    *copy = *l;
    for (int i = 0; i < l->n_params; i++) {
        size_t bytes = ptx_kernel_param_bytes(l->kernel->ptx, i);
        memcpy(to, args[i], bytes);
        to += padded(bytes);
    }
    return copy;
}

static void run_launch(const void *args)
{
    const struct launch *l = args;
    const char *at = (const char *)(l + 1);
    const void **params = cudart_new((size_t)l->n_params * sizeof *params);
    struct ptx_launch run = { .shared_bytes = l->shared_bytes, .params = params };

    memcpy(run.grid, l->grid, sizeof run.grid);
    memcpy(run.block, l->block, sizeof run.block);
    memcpy(run.cluster, l->cluster, sizeof run.cluster);
    for (int i = 0; i < l->n_params; i++) {
        params[i] = at;
        at += padded(ptx_kernel_param_bytes(l->kernel->ptx, i));
    }
    ptx_run(l->kernel->ptx, &run);
    free(params);
}

static cudaError_t check_sizes(const struct launch *l, const char *call)
{
    const unsigned *g = l->grid, *b = l->block;
    uint64_t threads = (uint64_t)b[0] * b[1] * b[2];
    const char *name = l->kernel->name;

    if (!g[0] || !g[1] || !g[2] || g[0] > 0x7fffffff || g[1] > 65535 || g[2] > 65535)
        return cudart_refuse(cudaErrorInvalidConfiguration, call, "%s: a grid of %u x %u x %u",
                             name, g[0], g[1], g[2]);
    if (threads == 0 || threads > MOST_THREADS || b[0] > 1024 || b[1] > 1024 || b[2] > 64)
        return cudart_refuse(cudaErrorInvalidConfiguration, call, "%s: blocks of %u x %u x %u",
                             name, b[0], b[1], b[2]);
    if (threads > (unsigned)max_threads(l->kernel))
        return cudart_refuse(cudaErrorLaunchOutOfResources, call,
                             "%s: blocks of %llu threads, its launch bounds say %d", name,
                             (unsigned long long)threads, max_threads(l->kernel));
    return cudaSuccess;
}

static cudaError_t check_cluster(const struct launch *l, const char *call)
{
    const unsigned *g = l->grid, *c = l->cluster;
    uint64_t blocks = (uint64_t)c[0] * c[1] * c[2];

    if (blocks == 1)
        return cudaSuccess;
    if (device_limits()->cc < 90)
        return cudart_refuse(cudaErrorNotSupported, call, "%s: clusters on a device of %d",
                             l->kernel->name, device_limits()->cc);
    if (blocks == 0 || blocks > MOST_CLUSTER || g[0] % c[0] || g[1] % c[1] || g[2] % c[2])
        return cudart_refuse(cudaErrorInvalidClusterSize, call,
                             "%s: clusters of %u x %u x %u in a grid of %u x %u x %u",
                             l->kernel->name, c[0], c[1], c[2], g[0], g[1], g[2]);
    return cudaSuccess;
}

static cudaError_t check_launch(const struct launch *l, const char *call)
{
    const struct kernel *k = l->kernel;
    cudaError_t e = check_sizes(l, call);

    if (e == cudaSuccess)
        e = check_cluster(l, call);
    if (e == cudaSuccess && l->shared_bytes > k->most_dynamic)
        e = cudart_refuse(cudaErrorInvalidValue, call,
                          "%s: %zu bytes of dynamic shared memory, allowed are %zu", k->name,
                          l->shared_bytes, k->most_dynamic);
    return e;
}

static void copy_dim(unsigned out[3], dim3 d)
{
    out[0] = d.x;
    out[1] = d.y;
    out[2] = d.z;
}

/* What the attributes say; that a kernel may start early changes nothing where the one before has
 * ended. */
static cudaError_t apply_attributes(struct launch *l, const cudaLaunchConfig_t *config,
                                    const char *call)
{
    for (unsigned i = 0; i < config->numAttrs; i++) {
        const cudaLaunchAttribute *a = &config->attrs[i];
        if (a->id == cudaLaunchAttributeClusterDimension) {
            l->cluster[0] = a->val.clusterDim.x;
            l->cluster[1] = a->val.clusterDim.y;
            l->cluster[2] = a->val.clusterDim.z;
        } else if (a->id != cudaLaunchAttributeProgrammaticStreamSerialization) {
            cudart_die(call, "attribute %d is not emulated", (int)a->id);
        } else if (device_limits()->cc < 90) {
            return cudart_refuse(cudaErrorNotSupported, call, "early starts on a device of %d",
                                 device_limits()->cc);
        }
    }
    return cudaSuccess;
}

/* A launch without parameters, checked. */
static cudaError_t describe(struct launch *out, const cudaLaunchConfig_t *config,
                            const void *function, const char *call)
{
    struct kernel *k;
    cudaError_t e = find_kernel(&k, function, call);

    if (e != cudaSuccess)
        return e;
    *out = (struct launch){ .kernel = k, .cluster = { 1, 1, 1 } };
    copy_dim(out->grid, config->gridDim);
    copy_dim(out->block, config->blockDim);
    out->shared_bytes = config->dynamicSmemBytes;
    out->n_params = ptx_kernel_params(k->ptx);
    e = apply_attributes(out, config, call);
    return e == cudaSuccess ? check_launch(out, call) : e;
}

static cudaError_t queue_launch(const cudaLaunchConfig_t *config, const void *function,
                                void **args, const char *call)
{
    struct launch l;
    cudaError_t e;

    cudart_lock();
    e = describe(&l, config, function, call);
    if (e == cudaSuccess) {
        struct launch *whole = copy_with_params(&l, args);
        e = cudart_queue(config->stream, call, run_launch, whole, launch_bytes(&l));
        free(whole);
    }
    cudart_unlock();
    return e;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function,
                                void **args)
{
    return queue_launch(config, function, args, "cudaLaunchKernelExC");
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **args,
                               size_t shared_bytes, cudaStream_t stream);

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **args,
                               size_t shared_bytes, cudaStream_t stream)
{
    const cudaLaunchConfig_t config = { grid, block, shared_bytes, stream, NULL, 0 };

    return queue_launch(&config, kernel, args, "<<<>>>");
}

/* ---- what stands between <<< and >>>, until the kernel's host function takes it */

static _Thread_local struct {
    dim3 grid, block;
    size_t shared_bytes;
    void *stream;
    bool pushed;
} configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void *stream);
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes,
                                       void *stream);

/* The arguments are made before, so launches do not nest. */
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void *stream)
{
    if (configuration.pushed)
        cudart_die("<<<>>>", "a launch inside of another's arguments is not emulated");
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared_bytes = shared_bytes;
    configuration.stream = stream;
    configuration.pushed = true;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes,
                                       void *stream)
{
    if (!configuration.pushed)
        cudart_die("<<<>>>", "a kernel's function was called without a launch");
    *grid = configuration.grid;
    *block = configuration.block;
    *shared_bytes = configuration.shared_bytes;
    *(void **)stream = configuration.stream;
    configuration.pushed = false;
    return cudaSuccess;
}

/* ---- occupancy */

static int blocks_an_sm(const struct launch *l)
{
    size_t shared = l->kernel->shared_bytes + l->shared_bytes + RESERVED_SHARED;
    int by_shared = (int)(device_limits()->shared_sm_bytes / shared);
    int by_threads = (int)(MOST_SM_THREADS / (l->block[0] * l->block[1] * l->block[2]));
    int n = by_shared < by_threads ? by_shared : by_threads;

    /* How many registers it takes is not known; bounds that say so are taken to be used up. */
    if (l->kernel->bounds.min_blocks && n > l->kernel->bounds.min_blocks)
        n = l->kernel->bounds.min_blocks;
    return n;
}

/* The multiprocessors are in parts of nearly the same size, and so are those of an H100. */
static int active_clusters(const struct launch *l)
{
    const int n_sms = device_limits()->n_sms, parts = (n_sms + SMS_AN_GPC - 1) / SMS_AN_GPC;
    const int size = (int)(l->cluster[0] * l->cluster[1] * l->cluster[2]);
    int n = 0;

    for (int i = 0; i < parts; i++)
        n += (n_sms / parts + (i < n_sms % parts)) * blocks_an_sm(l) / size;
    return n;
}

cudaError_t cudaOccupancyMaxActiveClusters(int *out, const void *function,
                                           const cudaLaunchConfig_t *config)
{
    struct launch l;
    cudaError_t e;

    *out = 0;
    cudart_lock();
    e = describe(&l, config, function, "cudaOccupancyMaxActiveClusters");
    if (e == cudaSuccess)
        *out = active_clusters(&l);
    cudart_unlock();
    return e;
}
