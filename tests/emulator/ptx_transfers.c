/* Loads and stores, copies in the background, and the barriers at which these arrive. */

#include "tests/emulator/ptx_ops.h"

#include <string.h>

/* ---- memory */

unsigned char *ptx_place_of(struct warp *w, const struct instruction *in, int lane, size_t bytes,
                            enum ptx_access access)
{
    union value v = w->slots[in->read[0]][lane];
    uint64_t at = (in->wide_address ? v.u64 : v.u32) + (uint64_t)(int64_t)in->offset;

    if (in->space == PTX_SHARED) {
        if (at % bytes)
            ptx_fail(w, in, "lane %d, shared address %#llx is not aligned", lane,
                     (unsigned long long)at);
        unsigned char *shared = ptx_shared_at(w, in, at, bytes, false);
        if (access != PTX_UNTOUCHED)
            ptx_shared_touch(w, in, shared, bytes, access);
        return shared;
    }
    if (at % bytes)
        ptx_fail(w, in, "lane %d, address %#llx is not aligned", lane, (unsigned long long)at);
    unsigned char *p = (unsigned char *)(uintptr_t)at; // NOLINT
    ptx_memory_check(w, in, lane, p, bytes, access);
    return p;
}

static uint64_t fetched(const unsigned char *p, int bytes)
{
    uint64_t v = 0;

    memcpy(&v, p, (size_t)bytes);
    return v;
}

static void load(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    size_t bytes = (size_t)in->bytes * in->vector;
    uint64_t v[4];

    for (int l = 0; l < LANES; l++) {
        if (!(lanes >> l & 1))
            continue;
        const unsigned char *p = ptx_place_of(w, in, l, bytes, PTX_READ);
        for (int i = 0; i < in->vector; i++)
            v[i] = ptx_extended(fetched(p + i * in->bytes, in->bytes), in->type);
        for (int i = 0; i < in->vector; i++)
            if (in->written[i] >= 0)
                w->slots[in->written[i]][l].u64 = v[i];
    }
}

static void store(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    size_t bytes = (size_t)in->bytes * in->vector;
    bool shared = in->space == PTX_SHARED;
    unsigned char v[4 * sizeof(union value)];

    for (int l = 0; l < LANES; l++) {
        if (!(lanes >> l & 1))
            continue;
        unsigned char *p = ptx_place_of(w, in, l, bytes, shared ? PTX_UNTOUCHED : PTX_WRITE);
        for (int i = 0; i < in->vector; i++)
            memcpy(v + i * in->bytes, &w->slots[in->read[1 + i]][l], in->bytes);
        if (shared && memcmp(p, v, bytes) != 0)
            ptx_shared_touch(w, in, p, bytes, PTX_WRITE);
        memcpy(p, v, bytes);
    }
}

/* In ascending order of the lanes. */
static void atomic(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    for (int l = 0; l < LANES; l++) {
        if (!(lanes >> l & 1))
            continue;
        unsigned char *p = ptx_place_of(w, in, l, in->bytes, PTX_ATOMIC);
        uint64_t old = ptx_extended(fetched(p, in->bytes), in->type);
        uint64_t v = ptx_extended(w->slots[in->read[1]][l].u64, in->type);
        uint64_t other = in->n_read > 2 ? ptx_extended(w->slots[in->read[2]][l].u64, in->type) : 0;
        uint64_t now = ptx_combined((enum atomic)in->way, in->type, old, v, other);
        memcpy(p, &now, in->bytes);
        if (in->n_written && in->written[0] >= 0)
            w->slots[in->written[0]][l].u64 = old;
    }
}

/* A generic pointer to shared memory is a pointer to where it is kept. */
OPERATION(generic_of_shared, d[l].u64 = (uint64_t)(uintptr_t)ptx_shared_at(w, in, a[l].u32, 0,
                                                                           true))

static void shared_of_generic(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    const struct block *b = w->block;

    for (int l = 0; l < LANES; l++) {
        uint64_t at = w->slots[in->read[0]][l].u64 - (uint64_t)(uintptr_t)b->shared;
        if (!(lanes >> l & 1))
            continue;
        if (at > (uint64_t)b->cluster->shared_bytes)
            ptx_fail(w, in, "lane %d, no address of this block's shared memory", l);
        w->slots[in->written[0]][l].u64 =
            at + SHARED_START + ((uint64_t)b->rank << RANK_SHIFT);
    }
}

/* The same place in another block of the cluster. */
static void map_to_block(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    for (int l = 0; l < LANES; l++) {
        uint32_t at = w->slots[in->read[0]][l].u32, rank = w->slots[in->read[1]][l].u32;
        if (!(lanes >> l & 1))
            continue;
        if ((int)rank < 0 || (int)rank >= w->block->cluster->size)
            ptx_fail(w, in, "lane %d, no block %u in the cluster", l, rank);
        w->slots[in->written[0]][l].u32 = (at & ((1u << RANK_SHIFT) - 1)) | rank << RANK_SHIFT;
    }
}

/* ---- copies in the background */

static void copy_async(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    for (int l = 0; l < LANES; l++) {
        if (!(lanes >> l & 1))
            continue;
        uint32_t bytes = w->slots[in->read[2]][l].u32;
        unsigned char *to = ptx_place_of(w, in, l, bytes, PTX_WRITE);
        const unsigned char *from =
            (const unsigned char *)(uintptr_t)w->slots[in->read[1]][l].u64; // NOLINT
        uint32_t there = in->n_read > 3 ? w->slots[in->read[3]][l].u32 : bytes;
        struct copies *c = &w->copies[l];
        if (there > bytes)
            ptx_fail(w, in, "lane %d copies %u bytes of %u", l, there, bytes);
        if ((uintptr_t)from % bytes && there > 0)
            ptx_fail(w, in, "lane %d copies from %p, which is not aligned", l, (const void *)from);
        if (there > 0)
            ptx_memory_check(w, in, l, from, there, PTX_READ);
        if (c->n == c->most) {
            c->most = c->most ? 2 * c->most : 16;
            c->all = ptx_more(c->all, (size_t)c->most, sizeof *c->all);
        }
        c->all[c->n++] = (struct copy){ to, from, c->group, (uint8_t)there,
                                           (uint8_t)(bytes - there) };
        if (w->block->cluster->early_copies)
            ptx_copies_make(c, -1);
    }
}

static void copies_commit(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    (void)in;
    for (int l = 0; l < LANES; l++)
        w->copies[l].group += (int)(lanes >> l & 1);
}

static void copies_wait(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1)
            ptx_copies_make(&w->copies[l], w->slots[in->read[0]][l].s32);
}

/* ---- barriers in shared memory: the phase ends when nobody is awaited and no bytes are */

struct phase_barrier {
    int32_t bytes;              /* awaited; below zero: came before they were */
    uint16_t awaited;
    uint8_t count, phase;
};

static struct phase_barrier *barrier_at(struct warp *w, const struct instruction *in,
                                        uint64_t address, bool any_block)
{
    if (address % sizeof(struct phase_barrier))
        ptx_fail(w, in, "a barrier at %#llx, which is not aligned", (unsigned long long)address);
    return (void *)ptx_shared_at(w, in, address, sizeof(struct phase_barrier), any_block);
}

static void settle(struct phase_barrier *b)
{
    if (b->awaited == 0 && b->bytes == 0) {
        b->phase ^= 1;
        b->awaited = b->count;
    }
}

static void barrier_init(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1) {
            uint8_t n = w->slots[in->read[1]][l].u8;
            *barrier_at(w, in, w->slots[in->read[0]][l].u32, false) =
                (struct phase_barrier){ .awaited = n, .count = n };
        }
}

static void barrier_expect(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1) {
            struct phase_barrier *b = barrier_at(w, in, w->slots[in->read[0]][l].u32, false);
            if (b->awaited == 0)
                ptx_fail(w, in, "lane %d arrives at a barrier that awaits nobody", l);
            b->awaited--;
            b->bytes += w->slots[in->read[1]][l].s32;
            settle(b);
        }
}

bool ptx_barrier_passed(struct warp *w, const struct instruction *in, int lane)
{
    const struct phase_barrier *b = barrier_at(w, in, w->slots[in->read[0]][lane].u32, false);

    return b->phase != (w->slots[in->read[1]][lane].u32 & 1);
}

static void arrive_with(struct warp *w, const struct instruction *in, uint64_t barrier,
                        int32_t bytes)
{
    struct phase_barrier *b = barrier_at(w, in, barrier, true);

    b->bytes -= bytes;
    settle(b);
}

/* Shared memory of this block to shared memory of any in the cluster. */
static void copy_bulk(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    for (int l = 0; l < LANES; l++) {
        if (!(lanes >> l & 1))
            continue;
        uint32_t to = w->slots[in->read[0]][l].u32, from = w->slots[in->read[1]][l].u32;
        uint32_t bytes = w->slots[in->read[2]][l].u32;
        if (to % 16 || from % 16 || bytes % 16)
            ptx_fail(w, in, "lane %d copies %u bytes from %#x to %#x: no multiples of 16", l, bytes,
                     from, to);
        memcpy(ptx_shared_at(w, in, to, bytes, true), ptx_shared_at(w, in, from, bytes, false),
               bytes);
        arrive_with(w, in, w->slots[in->read[3]][l].u32, (int32_t)bytes);
    }
}

static void store_async(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    int bytes = 4 * in->vector;

    for (int l = 0; l < LANES; l++) {
        if (!(lanes >> l & 1))
            continue;
        uint32_t to = w->slots[in->read[0]][l].u32;
        if (to % (uint32_t)bytes)
            ptx_fail(w, in, "lane %d stores %d bytes at %#x", l, bytes, to);
        unsigned char *p = ptx_shared_at(w, in, to, (size_t)bytes, true);
        for (int i = 0; i < in->vector; i++)
            memcpy(p + 4 * i, &w->slots[in->read[1 + i]][l], 4);
        arrive_with(w, in, w->slots[in->read[1 + in->vector]][l].u32, bytes);
    }
}

/* ---- names */

/* Stores are seen at once, and one kernel runs after the other. */
OPERATION(nothing, (void)d)

static const struct ptx_named plain[] = {
    { "cvta.shared.u64", generic_of_shared, 1, 1 },
    { "cvta.to.shared.u64", shared_of_generic, 1, 1 },
    { "mapa.shared::cluster.u32", map_to_block, 1, 2 },
    { "cp.async.commit_group", copies_commit, 0, 0 }, { "cp.async.wait_group", copies_wait, 0, -1 },
    { "mbarrier.init.shared::cta.b64", barrier_init, 0, 2 },
    { "mbarrier.arrive.expect_tx.shared::cta.b64", barrier_expect, 1, 2 },
    { "membar.gl", nothing, 0, 0 }, { "membar.cta", nothing, 0, 0 },
    { "membar.sys", nothing, 0, 0 }, { "fence.proxy.async.shared::cta", nothing, 0, 0 },
    { "fence.mbarrier_init.release.cluster", nothing, 0, 0 },
    { "griddepcontrol.wait", nothing, 0, 0 }, { "griddepcontrol.launch_dependents", nothing, 0, 0 },
    { "prefetch.global.L2", nothing, 0, 1 },
};

static bool find_memory(struct instruction *in, const struct parts *p, bool is_load)
{
    static const char *const allowed[] = { "param", "shared", "shared::cta", "global", "local",
                                           "const", "nc", "cg", "ca", "cs", "volatile", "relaxed",
                                           "gpu", "cta", "sys", "v2", "v4", "acquire", "release",
                                           "L1::no_allocate", "L2::128B" };

    for (int i = 1; i < p->n - 1; i++)
        if (ptx_index_of(allowed, sizeof allowed / sizeof allowed[0], p->at[i]) < 0)
            return false;
    in->type = ptx_type_named(p->at[p->n - 1]);
    in->bytes = (uint8_t)(ptx_type_bits(in->type) / 8);
    if (in->type == PTX_F32 || in->type == PTX_F64)
        in->type = in->type == PTX_F32 ? PTX_U32 : PTX_U64;
    in->vector = ptx_has_part(p, "v4") ? 4 : ptx_has_part(p, "v2") ? 2 : 1;
    if (ptx_has_part(p, "shared") || ptx_has_part(p, "shared::cta"))
        in->space = PTX_SHARED;
    in->run = is_load ? load : store;
    return in->type != PTX_NONE && (is_load ? in->n_written == in->vector && in->n_read == 1
                                            : in->n_written == 0 && in->n_read == 1 + in->vector);
}

static bool find_atomic(struct instruction *in, const struct parts *p)
{
    static const char *const names[] = { "add", "min", "max", "or", "and", "exch", "cas" };
    int op = ptx_index_of(names, 7, p->at[p->n - 2]);

    in->type = ptx_type_named(p->at[p->n - 1]);
    in->bytes = (uint8_t)(ptx_type_bits(in->type) / 8);
    in->way = (uint8_t)(op < 0 ? 0 : op);
    in->space = ptx_has_part(p, "shared") ? PTX_SHARED : PTX_GENERIC;
    in->run = atomic;
    return op >= 0 && in->type != PTX_NONE &&
           in->n_read == ((enum atomic)op == ATOMIC_COMPARE ? 3 : 2);
}

bool ptx_find_transfer(struct instruction *in, const struct parts *p, const char *name)
{
    if (strcmp(p->at[0], "ld") == 0 || (strcmp(p->at[0], "st") == 0 && !ptx_has_part(p, "async")))
        return find_memory(in, p, strcmp(p->at[0], "ld") == 0);
    if (strcmp(p->at[0], "atom") == 0)
        return find_atomic(in, p);
    if (strncmp(name, "st.async.weak.shared::cluster.", 30) == 0) {
        in->vector = ptx_has_part(p, "v4") ? 4 : 2;
        in->run = store_async;
        return in->n_read == 2 + in->vector;
    }
    if (strncmp(name, "cp.async.bulk.shared::cluster.shared::cta.mbarrier", 50) == 0) {
        in->run = copy_bulk;
        return in->n_read == 4;
    }
    if (strncmp(name, "cp.async.c", 10) == 0 && (ptx_has_part(p, "cg") || ptx_has_part(p, "ca"))) {
        in->run = copy_async;
        in->space = PTX_SHARED;
        /* read: to, from, bytes, and how many of those are there. */
        return in->n_read == 3 || in->n_read == 4;
    }
    if (strncmp(name, "mbarrier.try_wait.parity.", 25) == 0) {
        in->kind = PTX_TRY_WAIT;
        return in->n_written == 1 && in->n_read == 2;
    }
    return ptx_find_named(in, name, plain, sizeof plain / sizeof plain[0]);
}
