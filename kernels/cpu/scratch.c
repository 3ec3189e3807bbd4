#include "kernels/cpu/cpu.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"

#include "kernels/cpu/scratch.h"

/* Starts at a size that most operations fit, in pages that cost nothing until they
 * are touched, so that growing, which waits for the kernel, is rare. */
enum { FIRST_BYTES = 4 << 20 };

struct cpu_scratch {
    _Alignas(64) void *base;     /* a line each: workers grow theirs at the same time */
    size_t bytes;
};

struct cpu_scratch *scratch_create(int n_workers)
{
    struct cpu_scratch *all = mem_map((size_t)n_workers * sizeof *all, 64);

    ASSERT(all);
    return all;
}

void scratch_destroy(struct cpu_scratch *all, int n_workers)
{
    if (!all)
        return;
    for (int i = 0; i < n_workers; i++)
        mem_unmap(all[i].base, all[i].bytes);
    mem_unmap(all, (size_t)n_workers * sizeof *all);
}

void *cpu_scratch(struct stream *s, int worker, size_t bytes)
{
    struct cpu_scratch *own = &s->be->scratch[worker];

    ASSERT(worker >= 0 && worker < workers_count(s->be->workers));
    if (bytes > own->bytes || !own->base) {
        size_t want = own->bytes ? own->bytes : FIRST_BYTES;
        while (want < bytes) {
            ASSERT(want <= SIZE_MAX / 2);
            want *= 2;
        }
        mem_unmap(own->base, own->bytes);
        own->base = mem_map(want, 64);
        ASSERT(own->base);
        own->bytes = want;
    }
    return own->base;
}
