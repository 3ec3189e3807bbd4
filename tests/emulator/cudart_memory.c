#include "tests/emulator/cudart.h"

#include "tests/emulator/ptx.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <wchar.h>

/* Device and pinned memory is cut from one range of addresses, of which no part is used a second
 * time: what was freed stays recognisable, and the CPU faults on it. */

enum { PAGE = 4096, ALIGNED = 256 };
#define RANGE_BYTES ((size_t)1 << 42)
#define DEVICE_BYTES ((size_t)8 << 30)

enum kind { DEVICE, PINNED, REGISTERED };

struct region {
    struct region *next;
    char *base;
    size_t bytes;
    enum kind kind;
    char *pages;                 /* DEVICE, PINNED */
    size_t n_page_bytes;
};

static struct region *regions;
static char *range, *range_at;   /* all addresses; those from range_at on are unused */
static size_t device_used;       /* bytes */

static void reserve_range(void)
{
    void *p = mmap(NULL, RANGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                   0);

    if (p == MAP_FAILED)
        cudart_die("cudaMalloc", "no %zu GiB of addresses can be reserved", RANGE_BYTES >> 30);
    range = range_at = p;
}

/* As bf16, float or half a NaN, as an int a large one, as a pointer none. */
static void fill_with_garbage(char *base, size_t bytes)
{
    const wchar_t garbage = 0x7fc17fc1;

    wmemset((wchar_t *)base, garbage, bytes / sizeof garbage);
    memset(base + bytes / sizeof garbage * sizeof garbage, 0x7f, bytes % sizeof garbage);
}

static void add_region(struct region *r)
{
    r->next = regions;
    regions = r;
    ptx_memory_add(r->base, r->bytes, true);
}

/* An unused page lies behind it.  Device memory begins where it is aligned to ALIGNED bytes and no
 * more, which is all that CUDA promises. */
static void *allocate(enum kind kind, size_t bytes)
{
    size_t lead = kind == DEVICE ? ALIGNED : 0;
    size_t in_pages = (lead + bytes + PAGE - 1) / PAGE * PAGE;

    if (!range)
        reserve_range();
    if (in_pages + PAGE > (size_t)(range + RANGE_BYTES - range_at))
        cudart_die("cudaMalloc", "all addresses have been used");
    if (mprotect(range_at, in_pages, PROT_READ | PROT_WRITE) != 0)
        return NULL;
    struct region *r = cudart_new(sizeof *r);
    r->kind = kind;
    r->pages = range_at;
    r->n_page_bytes = in_pages;
    r->base = range_at + lead;
    r->bytes = bytes;
    range_at += in_pages + PAGE;
    fill_with_garbage(r->base, bytes);
    add_region(r);
    return r->base;
}

/* The region that begins at p, taken out of the list, or NULL. */
static struct region *take_region(const void *p, enum kind kind)
{
    for (struct region **at = &regions; *at; at = &(*at)->next) {
        struct region *r = *at;
        if (r->base != p || r->kind != kind)
            continue;
        *at = r->next;
        ptx_memory_remove(r->base);
        return r;
    }
    return NULL;
}

static bool in_range(const char *p)
{
    return range && p >= range && p < range + RANGE_BYTES;
}

static cudaError_t release(const char *call, void *p, enum kind kind)
{
    struct region *r;
    cudaError_t e;

    if (!p)
        return cudaSuccess;
    cudart_lock();
    e = cudart_refuse_in_capture(call);
    r = e == cudaSuccess ? take_region(p, kind) : NULL;
    if (r) {
        if (kind == DEVICE)
            device_used -= r->bytes;
        /* Gives the pages back and makes the addresses fault. */
        if (mmap(r->pages, r->n_page_bytes, PROT_NONE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
            cudart_die(call, "the addresses of %p cannot be unmapped", p);
        free(r);
    } else if (e == cudaSuccess) {
        e = cudart_refuse(cudaErrorInvalidValue, call, "%p is not the begin of an allocation%s", p,
                          in_range(p) ? " (any more)" : "");
    }
    cudart_unlock();
    return e;
}

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    cudaError_t e;

    *out = NULL;
    if (bytes == 0)
        return cudaSuccess;
    cudart_lock();
    e = cudart_refuse_in_capture("cudaMalloc");
    if (e == cudaSuccess && bytes <= DEVICE_BYTES - device_used)
        *out = allocate(DEVICE, bytes);
    if (*out)
        device_used += bytes;
    else if (e == cudaSuccess)
        e = cudart_error(cudaErrorMemoryAllocation);
    cudart_unlock();
    return e;
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags)
{
    const unsigned known = cudaHostAllocPortable | cudaHostAllocMapped;
    cudaError_t e;

    if (flags & ~known)
        cudart_die("cudaHostAlloc", "flags %#x are not emulated", flags);
    *out = NULL;
    if (bytes == 0)
        return cudaSuccess;
    cudart_lock();
    e = cudart_refuse_in_capture("cudaHostAlloc");
    if (e == cudaSuccess && bytes < RANGE_BYTES / 4)
        *out = allocate(PINNED, bytes);
    if (!*out && e == cudaSuccess)
        e = cudart_error(cudaErrorMemoryAllocation);
    cudart_unlock();
    return e;
}

cudaError_t cudaFree(void *p)
{
    return release("cudaFree", p, DEVICE);
}

cudaError_t cudaFreeHost(void *p)
{
    return release("cudaFreeHost", p, PINNED);
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    cudart_lock();
    *free_bytes = DEVICE_BYTES - device_used;
    *total = DEVICE_BYTES;
    cudart_unlock();
    return cudaSuccess;
}

/* ---- host memory of the caller's */

static bool overlaps(const struct region *r, const char *p, size_t bytes)
{
    return p < r->base + r->bytes && r->base < p + bytes;
}

static struct region *find_overlap(const void *p, size_t bytes)
{
    struct region *r = regions;

    while (r && !overlaps(r, p, bytes))
        r = r->next;
    return r;
}

cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned flags)
{
    const unsigned known = cudaHostRegisterPortable | cudaHostRegisterMapped;
    cudaError_t e;

    if (flags & ~known)
        cudart_die("cudaHostRegister", "flags %#x are not emulated", flags);
    if (!p || bytes == 0)
        return cudart_error(cudaErrorInvalidValue);
    cudart_lock();
    e = cudart_refuse_in_capture("cudaHostRegister");
    if (e == cudaSuccess && find_overlap(p, bytes)) {
        e = cudart_error(cudaErrorHostMemoryAlreadyRegistered);
    } else if (e == cudaSuccess) {
        struct region *r = cudart_new(sizeof *r);
        r->kind = REGISTERED;
        r->base = p;
        r->bytes = bytes;
        add_region(r);
    }
    cudart_unlock();
    return e;
}

cudaError_t cudaHostUnregister(void *p)
{
    cudaError_t e;

    cudart_lock();
    e = cudart_refuse_in_capture("cudaHostUnregister");
    if (e == cudaSuccess) {
        struct region *r = take_region(p, REGISTERED);
        e = r ? cudaSuccess : cudart_error(cudaErrorHostMemoryNotRegistered);
        free(r);
    }
    cudart_unlock();
    return e;
}

cudaError_t cudaHostGetDevicePointer(void **out, void *p, unsigned flags)
{
    struct region *r;

    if (flags != 0)
        return cudart_error(cudaErrorInvalidValue);
    cudart_lock();
    r = find_overlap(p, 1);
    *out = r && r->kind != DEVICE ? p : NULL;
    cudart_unlock();
    return *out ? cudaSuccess : cudart_error(cudaErrorInvalidValue);
}

/* ---- which memory a range is */

bool cudart_find_memory(enum place *out, const char *call, const void *p, size_t bytes)
{
    const char *at = p;
    const struct region *r = bytes ? find_overlap(p, bytes) : NULL;

    *out = PLACE_UNKNOWN;
    if (r && at >= r->base && bytes <= (size_t)(r->base + r->bytes - at)) {
        *out = r->kind == DEVICE ? PLACE_DEVICE : PLACE_PINNED;
        return true;
    }
    if (r) {
        cudart_refuse(cudaSuccess, call,
                      "%zu bytes at %p are not all in the %zu bytes allocated or registered at %p",
                      bytes, p, r->bytes, (void *)r->base);
        return false;
    }
    if (bytes && (in_range(at) || !p)) {
        cudart_refuse(cudaSuccess, call, "%zu bytes at %p are not allocated (any more)", bytes, p);
        return false;
    }
    return true;
}

void cudart_check_memory(const char *call, const void *p, size_t bytes)
{
    enum place place;

    if (!cudart_find_memory(&place, call, p, bytes) || (bytes && place == PLACE_UNKNOWN))
        cudart_die(call, "a kernel cannot touch %zu bytes at %p", bytes, p);
}
