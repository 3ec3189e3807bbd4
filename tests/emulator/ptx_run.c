/* Kernels put together from functions, and the loop that runs their warps.
 *
 * A warp runs the lanes that are furthest behind in the text until they meet others, branch or
 * wait; nvcc lays code out so that this brings lanes together again where the hardware does.  Warps
 * take turns when one cannot go on.  Where none can, the kernel is stuck, and that is an error. */

#include "tests/emulator/ptx_code.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { TURN = 20000 };          /* instructions of a warp before others have theirs */

_Noreturn void ptx_fail(const struct warp *w, const struct instruction *in, const char *format, ...)
{
    const struct block *b = w->block;
    const struct cluster *c = b->cluster;
    va_list args;

    fprintf(stderr, "\n%s, line %d of its PTX, block rank %d, warp %d: ", c->kernel->entry->name,
            in->line, b->rank, (int)(w - b->warps));
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\n");
    abort();
}

/* ---- kernels */

struct linking {
    struct ptx_kernel *k;
    int *placed;                /* of each function: 0 not, -1 on its way, or start + 1 */
    int *param_at;
};

static void shift_slots(struct instruction *in, int by)
{
    if (in->guard >= 0)
        in->guard += by;
    for (int i = 0; i < in->n_written; i++)
        in->written[i] += in->written[i] >= 0 ? by : 0;
    for (int i = 0; i < in->n_read; i++)
        in->read[i] += by;
    if (in->kind == PTX_TOGETHER && in->members >= 0)
        in->members = in->read[in->members];
}

/* Kernels' own parameters stay apart from areas of calls. */
static void place_function(struct linking *l, int index)
{
    struct ptx_kernel *k = l->k;
    const struct ptx_function *f = k->module->functions[index];

    if (l->placed[index] < 0 || !f->defined) {
        fprintf(stderr, "%s: recursive, or not defined\n", f->name);
        abort();
    }
    if (l->placed[index] > 0)
        return;
    l->placed[index] = -1;
    for (int i = 0; i < f->n_code; i++)
        if (f->code[i].kind == PTX_CALL)
            place_function(l, f->code[i].target);
    int start = k->n_code, slots = k->n_slots, local = k->local_bytes, params = k->param_bytes;
    l->param_at[index] = params;
    k->code = ptx_more(k->code, (size_t)(k->n_code + f->n_code + 1), sizeof *k->code);
    k->symbols = ptx_more(k->symbols, (size_t)(k->n_symbols + f->n_symbols + 1),
                          sizeof *k->symbols);
    k->passed = ptx_more(k->passed, (size_t)(k->n_passed + f->n_passed + 1), sizeof *k->passed);
    for (int i = 0; i < f->n_symbols; i++) {
        struct ptx_symbol s = f->symbols[i];
        s.slot += slots;
        s.value += s.kind == PTX_LOCAL_ADDRESS  ? (uint64_t)local
                   : s.kind == PTX_CALL_PARAM ? (uint64_t)params : 0;
        k->symbols[k->n_symbols++] = s;
    }
    for (int i = 0; i < f->n_code; i++) {
        struct instruction in = f->code[i];
        shift_slots(&in, slots);
        if (in.kind == PTX_BRANCH)
            in.target += start;
        if (in.kind == PTX_CALL) {
            int callee = in.target;
            in.first_passed += k->n_passed;
            for (int j = 0; j < in.n_passed + in.n_returned; j++) {
                struct ptx_passed p = f->passed[f->code[i].first_passed + j];
                bool back = j >= in.n_passed;
                p.from += back ? l->param_at[callee] : params;
                p.to += back ? params : l->param_at[callee];
                k->passed[in.first_passed + j] = p;
            }
            in.target = l->placed[callee] - 1;
        }
        k->code[k->n_code++] = in;
    }
    k->n_passed += f->n_passed;
    k->n_slots += f->n_slots;
    k->local_bytes += (f->local_bytes + 15) / 16 * 16;
    k->param_bytes += (f->param_bytes + 15) / 16 * 16;
    l->placed[index] = start + 1;
    k->start = start;
}

/* Shared variables that the kernel uses, in the order of the text; those without a size last. */
static void place_shared(struct ptx_kernel *k)
{
    const struct ptx_module *m = k->module;
    int *at = ptx_new((size_t)m->n_shared, sizeof *at);
    bool *used = ptx_new((size_t)m->n_shared, sizeof *used);

    for (int i = 0; i < k->n_symbols; i++)
        if (k->symbols[i].kind == PTX_SHARED_ADDRESS)
            used[k->symbols[i].value] = true;
    for (int dynamic = 0; dynamic < 2; dynamic++) {
        int bytes = k->shared_bytes;
        for (int i = 0; i < m->n_shared; i++) {
            const struct ptx_shared *s = &m->shared[i];
            if (!used[i] || (s->bytes == 0) != dynamic)
                continue;
            at[i] = (k->shared_bytes + s->align - 1) / s->align * s->align;
            bytes = at[i] > bytes ? at[i] : bytes;
            if (!dynamic)
                bytes = k->shared_bytes = at[i] + s->bytes;
        }
        k->shared_bytes = bytes;
    }
    for (int i = 0; i < k->n_symbols; i++)
        if (k->symbols[i].kind == PTX_SHARED_ADDRESS)
            k->symbols[i].value = (uint64_t)at[k->symbols[i].value];
    free(at);
    free(used);
}

static void put_together(struct ptx_kernel *k, int index)
{
    size_t n = (size_t)k->module->n_functions;
    struct linking l = { .k = k, .placed = ptx_new(n, sizeof(int)),
                         .param_at = ptx_new(n, sizeof(int)) };

    place_function(&l, index);
    place_shared(k);
    free(l.placed);
    free(l.param_at);
}

struct ptx_kernel *ptx_kernel_find(struct ptx_module *m, const char *name)
{
    for (int i = 0; i < m->n_functions; i++) {
        const struct ptx_function *f = m->functions[i];
        if (!f->is_kernel || strcmp(f->name, name) != 0)
            continue;
        if (!m->kernels[i]) {
            struct ptx_kernel *k = ptx_new(1, sizeof *k);
            k->module = m;
            k->entry = f;
            put_together(k, i);
            m->kernels[i] = k;
        }
        return m->kernels[i];
    }
    return NULL;
}

int ptx_kernel_params(const struct ptx_kernel *k)
{
    return k->entry->n_params;
}

size_t ptx_kernel_param_bytes(const struct ptx_kernel *k, int i)
{
    return (size_t)k->entry->params[i].bytes;
}

size_t ptx_kernel_shared_bytes(const struct ptx_kernel *k)
{
    return (size_t)k->shared_bytes;
}

int ptx_kernel_target(const struct ptx_kernel *k)
{
    return k->module->target;
}

void ptx_module_free(struct ptx_module *m)
{
    for (int i = 0; m && i < m->n_functions; i++) {
        struct ptx_function *f = m->functions[i];
        struct ptx_kernel *k = m->kernels[i];
        if (k) {
            free(k->code);
            free(k->symbols);
            free(k->passed);
            free(k);
        }
        free(f->name);
        free(f->code);
        free(f->symbols);
        free(f->params);
        free(f->passed);
        free(f);
    }
    for (int i = 0; m && i < m->n_globals; i++) {
        ptx_memory_remove(m->globals[i]);
        free(m->globals[i]);
    }
    if (m) {
        free(m->globals);
        free(m->functions);
        free(m->shared);
        free(m->kernels);
        free(m);
    }
}

/* ---- copies in the background */

void ptx_copies_make(struct copies *c, int keep)
{
    int made = 0;

    while (made < c->n && c->all[made].group < c->group - keep) {
        const struct copy *copy = &c->all[made++];
        memcpy(copy->to, copy->from, copy->bytes);
        memset(copy->to + copy->bytes, 0, copy->zeros);
    }
    c->n -= made;
    memmove(c->all, c->all + made, (size_t)c->n * sizeof *c->all);
}

/* ---- shared memory */

unsigned char *ptx_shared_at(struct warp *w, const struct instruction *in, uint64_t address,
                             size_t bytes, bool any_block)
{
    struct cluster *c = w->block->cluster;
    uint64_t rank = address >> RANK_SHIFT, at = address & ((1u << RANK_SHIFT) - 1);

    if (rank >= (uint64_t)c->size || at < SHARED_START ||
        at - SHARED_START + bytes > (uint64_t)c->shared_bytes)
        ptx_fail(w, in, "%zu bytes at shared address %#llx are outside of the %d there are", bytes,
                 (unsigned long long)address, c->shared_bytes);
    if (!any_block && (int)rank != w->block->rank)
        ptx_fail(w, in, "shared address %#llx is another block's", (unsigned long long)address);
    return c->blocks[rank].shared + (at - SHARED_START);
}

static bool within(const void *p, size_t bytes, const void *base, size_t n)
{
    uintptr_t at = (uintptr_t)p - (uintptr_t)base;

    return at < n && bytes <= n - at;
}

static void touch_word(struct warp *w, const struct instruction *in, size_t word, uint8_t bytes,
                       enum ptx_access access)
{
    struct block *b = w->block;
    struct touch *t = &b->touched[word];
    uint8_t me = (uint8_t)(w - b->warps);
    bool written = t->written == b->stretch, read = t->read == b->stretch;
    bool after_write = written && !t->many_writers && t->writer != me && t->bytes_written & bytes;
    bool after_read = read && (t->many_readers || t->reader != me) && t->bytes_read & bytes;

    if ((after_write && !(access == PTX_ATOMIC && t->by_atomic)) ||
        (after_read && access != PTX_READ))
        ptx_fail(w, in, "a race: shared word %#zx, which this warp %s, warp %d has %s since the "
                 "last barrier", 4 * word, access == PTX_READ ? "reads" : "writes",
                 after_write ? t->writer : t->reader, after_write ? "written" : "read");
    if (access == PTX_READ) {
        t->many_readers = read && (t->many_readers || t->reader != me);
        t->bytes_read = (uint8_t)(bytes | (read ? t->bytes_read : 0));
        t->read = b->stretch;
        t->reader = me;
    } else {
        t->many_writers = written && (t->many_writers || t->writer != me);
        t->bytes_written = (uint8_t)(bytes | (written ? t->bytes_written : 0));
        t->written = b->stretch;
        t->writer = me;
        t->by_atomic = access == PTX_ATOMIC;
    }
}

void ptx_shared_touch(struct warp *w, const struct instruction *in, const void *p, size_t bytes,
                      enum ptx_access access)
{
    size_t at = (size_t)((const unsigned char *)p - w->block->shared), end = at + bytes;

    if (bytes < 4) {             /* aligned, so within a word */
        touch_word(w, in, at / 4, (uint8_t)(((1u << bytes) - 1) << at % 4), access);
        return;
    }
    for (; at < end; at += 4)
        touch_word(w, in, at / 4, 15, access);
}

void ptx_memory_check(struct warp *w, const struct instruction *in, int lane, const void *p,
                      size_t bytes, enum ptx_access access)
{
    const struct cluster *c = w->block->cluster;
    const struct ptx_kernel *k = c->kernel;
    bool write = access != PTX_READ;

    if (ptx_memory_allows(p, bytes, write))
        return;
    if (within(p, bytes, w->params + lane * k->param_bytes, (size_t)k->param_bytes) ||
        within(p, bytes, w->local + lane * k->local_bytes, (size_t)k->local_bytes))
        return;
    for (int i = 0; i < c->size; i++)
        if (within(p, bytes, c->blocks[i].shared, (size_t)c->shared_bytes)) {
            if (i == w->block->rank)
                ptx_shared_touch(w, in, p, bytes, access);
            return;
        }
    if (!write && within(p, bytes, c->param_values, (size_t)k->entry->param_bytes))
        return;
    ptx_fail(w, in, "lane %d %s %zu bytes at %p, which is no memory of this GPU", lane,
             write ? "writes" : "reads", bytes, p);
}

/* ---- the end of a lane, and barriers of the block */

static void release_barriers(struct block *b)
{
    const struct instruction *code = b->cluster->kernel->code;

    for (int id = 0; id < 16; id++) {
        if (b->arrived[id] == 0 || b->arrived[id] < (b->wanted[id] ? b->wanted[id] : b->n_alive))
            continue;
        for (int i = 0; i < b->n_warps; i++) {
            struct warp *w = &b->warps[i];
            for (int l = 0; l < LANES; l++) {
                const struct instruction *in = &code[w->at[l]];
                if (!(w->held >> l & 1) || w->slots[in->read[0]][l].s32 != id)
                    continue;
                if (in->n_written)
                    w->slots[in->written[0]][l].s32 =
                        in->type == PTX_PRED ? b->value[id] != 0 : b->value[id];
                w->held &= ~(1u << l);
                w->at[l]++;
            }
        }
        if (b->arrived[id] >= b->n_alive)
            b->stretch++;
        b->arrived[id] = b->value[id] = b->wanted[id] = 0;
    }
}

static void release_cluster(struct cluster *c)
{
    if (c->arrived > 0 && c->arrived >= c->n_alive) {
        c->arrived = 0;
        c->phase++;
        for (int i = 0; i < c->size; i++)
            c->blocks[i].stretch++;
    }
}

static void end_lanes(struct warp *w, uint32_t lanes)
{
    int n = __builtin_popcount(lanes);

    w->alive &= ~lanes;
    w->block->n_alive -= n;
    w->block->cluster->n_alive -= n;
    release_barriers(w->block);
    release_cluster(w->block->cluster);
}

static void arrive(struct warp *w, const struct instruction *in, uint32_t lanes, int at)
{
    struct block *b = w->block;

    for (int l = 0; l < LANES; l++) {
        if (!(lanes >> l & 1))
            continue;
        int id = w->slots[in->read[0]][l].s32;
        if (id < 0 || id > 15)
            ptx_fail(w, in, "no barrier %d", id);
        if (in->n_written) {
            b->value[id] += ptx_predicate(w, in, 1, l);
        } else if (in->n_read > 1) {
            b->wanted[id] = w->slots[in->read[1]][l].s32;
        }
        b->arrived[id]++;
        w->at[l] = at;
    }
    w->held |= lanes;
    release_barriers(b);
}

/* ---- calls */

static void pass(struct warp *w, const struct ptx_passed *p, int n, uint32_t lanes)
{
    int bytes = w->block->cluster->kernel->param_bytes;

    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < n && lanes >> l & 1; i++)
            memcpy(w->params + l * bytes + p[i].to, w->params + l * bytes + p[i].from,
                   (size_t)p[i].bytes);
}

static void call(struct warp *w, const struct instruction *in, uint32_t lanes, int at)
{
    pass(w, w->block->cluster->kernel->passed + in->first_passed, in->n_passed, lanes);
    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1) {
            if (w->depth[l] == MOST_DEPTH)
                ptx_fail(w, in, "calls more than %d deep", MOST_DEPTH);
            w->back[l][w->depth[l]++] = at;
            w->at[l] = in->target;
        }
}

/* Lanes may go back to different calls. */
static void go_back(struct warp *w, uint32_t lanes)
{
    const struct ptx_kernel *k = w->block->cluster->kernel;
    uint32_t ended = 0;

    for (int l = 0; l < LANES; l++) {
        if (!(lanes >> l & 1))
            continue;
        if (w->depth[l] == 0) {
            ended |= 1u << l;
            continue;
        }
        int at = w->back[l][--w->depth[l]];
        const struct instruction *in = &k->code[at];
        pass(w, k->passed + in->first_passed + in->n_passed, in->n_returned, 1u << l);
        w->at[l] = at + 1;
    }
    if (ended)
        end_lanes(w, ended);
}

/* ---- a warp */

struct group {
    uint32_t lanes;
    int at, meets;              /* the next instruction at which there are others */
};

static void place_lanes(struct warp *w, uint32_t lanes, int at)
{
    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1)
            w->at[l] = at;
}

/* The lanes furthest behind of those that can go on; false: none can. */
static bool choose_group(const struct warp *w, struct group *g)
{
    uint32_t free = w->alive & ~w->held, ready = free & ~w->parked;
    int at = -1;

    for (int l = 0; l < LANES; l++)
        if (ready >> l & 1 && (at < 0 || w->at[l] < at))
            at = w->at[l];
    if (at < 0)
        return false;
    *g = (struct group){ 0, at, -1 };
    for (int l = 0; l < LANES; l++) {
        if (!(free >> l & 1))
            continue;
        if (w->at[l] == at)
            g->lanes |= 1u << l;
        else if (w->at[l] > at && (g->meets < 0 || w->at[l] < g->meets))
            g->meets = w->at[l];
    }
    return true;
}

static uint32_t guarded(const struct warp *w, const struct instruction *in, uint32_t lanes)
{
    uint32_t out = 0;

    if (in->guard < 0)
        return lanes;
    for (int l = 0; l < LANES; l++)
        out |= (uint32_t)((w->slots[in->guard][l].u32 != 0) != in->guard_not) << l;
    return out & lanes;
}

/* Whether all that an instruction wants are among the lanes. */
static bool all_there(const struct warp *w, const struct instruction *in, uint32_t lanes)
{
    uint32_t members = ALL_LANES;

    if (in->members >= 0)
        members = w->slots[in->members][__builtin_ctz(lanes)].u32;
    return (members & w->alive & ~lanes) == 0;
}

static void cluster_arrive(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    struct cluster *c = w->block->cluster;

    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1) {
            if (w->cluster_arrived[l])
                ptx_fail(w, in, "lane %d arrives twice at the cluster's barrier", l);
            w->cluster_arrived[l] = true;
            w->cluster_phase[l] = c->phase;
        }
    c->arrived += __builtin_popcount(lanes);
    release_cluster(c);
}

static bool cluster_passed(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1) {
            if (!w->cluster_arrived[l])
                ptx_fail(w, in, "lane %d waits where it did not arrive", l);
            if (w->cluster_phase[l] == w->block->cluster->phase)
                return false;
        }
    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1)
            w->cluster_arrived[l] = false;
    return true;
}

static bool barrier_passed(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1 && !ptx_barrier_passed(w, in, l))
            return false;
    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1)
            w->slots[in->written[0]][l].u32 = 1;
    return true;
}

enum step { STEP_ON, STEP_CHOOSE, STEP_WAIT };

/* One instruction that is no plain one. */
static enum step control(struct warp *w, struct group *g, const struct instruction *in,
                         uint32_t lanes)
{
    switch (in->kind) {
    case PTX_BRANCH:
        if (!lanes)
            break;
        place_lanes(w, g->lanes & ~lanes, g->at + 1);
        place_lanes(w, lanes, in->target);
        if (lanes == g->lanes && lanes == w->alive) {
            g->at = in->target;
            return STEP_ON;
        }
        return STEP_CHOOSE;
    case PTX_CALL:
    case PTX_RETURN:
    case PTX_BARRIER:
        if (!lanes)
            break;
        place_lanes(w, g->lanes & ~lanes, g->at + 1);
        if (in->kind == PTX_CALL)
            call(w, in, lanes, g->at);
        else if (in->kind == PTX_RETURN)
            go_back(w, lanes);
        else
            arrive(w, in, lanes, g->at);
        return STEP_CHOOSE;
    case PTX_TOGETHER:
        if (lanes && !all_there(w, in, lanes)) {
            if (lanes != g->lanes)
                ptx_fail(w, in, "some lanes skip what all of them do");
            place_lanes(w, lanes, g->at);
            w->parked |= lanes;
            return STEP_CHOOSE;
        }
        w->parked &= ~g->lanes;
        if (lanes)
            in->run(w, in, lanes);
        break;
    case PTX_CLUSTER_ARRIVE:
        cluster_arrive(w, in, lanes);
        break;
    case PTX_CLUSTER_WAIT:
    case PTX_TRY_WAIT:
        if (in->kind == PTX_TRY_WAIT ? !barrier_passed(w, in, lanes)
                                     : !cluster_passed(w, in, lanes)) {
            place_lanes(w, g->lanes, g->at);
            return STEP_WAIT;
        }
        break;
    case PTX_PLAIN:
        break;
    }
    g->at++;
    return STEP_ON;
}

/* Runs until no lane can go on, or others should; whether anything was done. */
static bool run_warp(struct warp *w)
{
    const struct instruction *code = w->block->cluster->kernel->code;
    struct group g;
    int done = 0;

    while (done < TURN && choose_group(w, &g)) {
        enum step step = STEP_ON;
        while (step == STEP_ON) {
            const struct instruction *in = &code[g.at];
            uint32_t lanes = guarded(w, in, g.lanes);
            if (in->kind == PTX_PLAIN) {
                if (lanes)
                    in->run(w, in, lanes);
                g.at++;
            } else {
                step = control(w, &g, in, lanes);
            }
            done += step != STEP_WAIT;
            if (step == STEP_ON && (g.at == g.meets || done >= TURN)) {
                place_lanes(w, g.lanes, g.at);
                step = STEP_CHOOSE;
            }
        }
        if (step == STEP_WAIT)
            break;
    }
    return done > 0;
}

/* ---- blocks and clusters */

void ptx_tell_time(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1)
            w->slots[in->written[0]][l].u64 =
                (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t special_value(const struct warp *w, enum ptx_special s, int lane,
                              const unsigned block[3])
{
    const struct cluster *c = w->block->cluster;
    const unsigned *n = c->launch->block;
    unsigned thread = (unsigned)(w - w->block->warps) * LANES + (unsigned)lane;

    switch (s) {
    case PTX_TID_X: return thread % n[0];
    case PTX_TID_Y: return thread / n[0] % n[1];
    case PTX_TID_Z: return thread / n[0] / n[1];
    case PTX_NTID_X: case PTX_NTID_Y: case PTX_NTID_Z: return n[s - PTX_NTID_X];
    case PTX_CTAID_X: case PTX_CTAID_Y: case PTX_CTAID_Z: return block[s - PTX_CTAID_X];
    case PTX_NCTAID_X: case PTX_NCTAID_Y: case PTX_NCTAID_Z:
        return c->launch->grid[s - PTX_NCTAID_X];
    case PTX_LANEID: return (uint64_t)lane;
    case PTX_CLUSTER_RANK: return (uint64_t)w->block->rank;
    case PTX_CLUSTER_SIZE: return (uint64_t)c->size;
    case PTX_LANES_BELOW: return ((uint64_t)1 << lane) - 1;
    case PTX_TIME: break;
    }
    return 0;
}

/* Where the block lies is all that differs between blocks of the same rank. */
static bool is_of_block(const struct ptx_symbol *s)
{
    return s->kind == PTX_SPECIAL && s->value >= PTX_CTAID_X && s->value <= PTX_CTAID_Z;
}

static void set_symbols(struct warp *w, const unsigned block[3], bool of_block)
{
    const struct cluster *c = w->block->cluster;
    const struct ptx_kernel *k = c->kernel;

    for (int i = 0; i < k->n_symbols; i++) {
        const struct ptx_symbol *s = &k->symbols[i];
        if (is_of_block(s) != of_block)
            continue;
        for (int l = 0; l < LANES; l++) {
            uint64_t v = s->value;
            switch (s->kind) {
            case PTX_IMMEDIATE: break;
            case PTX_SHARED_ADDRESS:
                v += SHARED_START + ((uint64_t)w->block->rank << RANK_SHIFT);
                break;
            case PTX_LOCAL_ADDRESS: v += (uint64_t)(w->local + l * k->local_bytes); break;
            case PTX_GLOBAL_ADDRESS: v = (uint64_t)k->module->globals[v]; break;
            case PTX_KERNEL_PARAM: v += (uint64_t)c->param_values; break;
            case PTX_CALL_PARAM: v += (uint64_t)(w->params + l * k->param_bytes); break;
            case PTX_SPECIAL: v = special_value(w, (enum ptx_special)s->value, l, block); break;
            }
            w->slots[s->slot][l].u64 = v;
        }
    }
}

static void start_block(struct block *b, const unsigned at[3])
{
    struct cluster *c = b->cluster;
    const unsigned *n = c->launch->block;
    int threads = (int)(n[0] * n[1] * n[2]);

    b->n_alive = threads;
    b->stretch++;
    c->n_alive += threads;
    memset(b->shared, 0xa5, (size_t)c->shared_bytes);
    memset(b->arrived, 0, sizeof b->arrived);
    memset(b->value, 0, sizeof b->value);
    memset(b->wanted, 0, sizeof b->wanted);
    for (int i = 0; i < b->n_warps; i++) {
        struct warp *w = &b->warps[i];
        int lanes = threads - i * LANES < LANES ? threads - i * LANES : LANES;
        w->alive = ALL_LANES >> (LANES - lanes);
        w->parked = w->held = 0;
        for (int l = 0; l < LANES; l++) {
            w->at[l] = c->kernel->start;
            w->depth[l] = 0;
            w->cluster_arrived[l] = false;
            w->copies[l].n = w->copies[l].group = 0;
        }
        set_symbols(w, at, true);
    }
}

static bool block_ended(const struct block *b)
{
    for (int i = 0; i < b->n_warps; i++)
        if (b->warps[i].alive)
            return false;
    return true;
}

static _Noreturn void report_stuck(const struct cluster *c)
{
    for (int i = 0; i < c->size; i++)
        for (int j = 0; j < c->blocks[i].n_warps; j++) {
            const struct warp *w = &c->blocks[i].warps[j];
            for (int l = 0; l < LANES; l++)
                if (w->alive >> l & 1 && (l == 0 || w->at[l] != w->at[l - 1]))
                    fprintf(stderr, "  block rank %d, warp %d, lane %d: line %d%s\n", i, j, l,
                            c->kernel->code[w->at[l]].line,
                            w->held >> l & 1     ? ", at a barrier"
                            : w->parked >> l & 1 ? ", waits for lanes" : "");
        }
    fprintf(stderr, "%s: no thread can go on\n", c->kernel->entry->name);
    abort();
}

static void finish_copies(struct block *b)
{
    for (int i = 0; i < b->n_warps; i++)
        for (int l = 0; l < LANES; l++)
            ptx_copies_make(&b->warps[i].copies[l], -1);
}

/* Warps in turn; `order` has them begin elsewhere and go the other way round, so that what depends
 * on an order that nothing guarantees shows. */
static void run_cluster(struct cluster *c, unsigned order)
{
    int n = c->size * c->blocks[0].n_warps, per_block = c->blocks[0].n_warps;
    bool ended = false;

    while (!ended) {
        bool went = false;
        ended = true;
        for (int i = 0; i < n; i++) {
            int at = (int)(((unsigned)i + order) % (unsigned)n);
            if (order & 1)
                at = n - 1 - at;
            struct warp *w = &c->blocks[at / per_block].warps[at % per_block];
            if (w->alive)
                went |= run_warp(w);
        }
        for (int i = 0; i < c->size; i++)
            ended &= block_ended(&c->blocks[i]);
        if (!ended && !went)
            report_stuck(c);
    }
    for (int i = 0; i < c->size; i++)
        finish_copies(&c->blocks[i]);
}

static void make_block(struct cluster *c, int rank, int n_warps)
{
    struct block *b = &c->blocks[rank];
    const struct ptx_kernel *k = c->kernel;

    b->cluster = c;
    b->rank = rank;
    b->n_warps = n_warps;
    b->shared = aligned_alloc(1024, ((size_t)c->shared_bytes + 1023) / 1024 * 1024 + 1024);
    b->touched = ptx_new((size_t)c->shared_bytes / 4 + 1, sizeof *b->touched);
    b->warps = ptx_new((size_t)n_warps, sizeof *b->warps);
    if (!b->shared)
        abort();
    for (int i = 0; i < n_warps; i++) {
        struct warp *w = &b->warps[i];
        w->block = b;
        w->slots = ptx_new((size_t)k->n_slots, sizeof *w->slots);
        memset(w->slots, 0xa5, (size_t)k->n_slots * sizeof *w->slots);
        w->params = ptx_new(LANES, (size_t)k->param_bytes + 1);
        w->local = ptx_new(LANES, (size_t)k->local_bytes + 1);
        memset(w->local, 0xa5, LANES * ((size_t)k->local_bytes + 1));
        set_symbols(w, (const unsigned[3]){ 0, 0, 0 }, false);
    }
}

static void drop_block(struct block *b)
{
    for (int i = 0; i < b->n_warps; i++) {
        free(b->warps[i].slots);
        free(b->warps[i].params);
        free(b->warps[i].local);
        for (int l = 0; l < LANES; l++)
            free(b->warps[i].copies[l].all);
    }
    free(b->warps);
    free(b->touched);
    free(b->shared);
}

static void pack_params(struct cluster *c)
{
    const struct ptx_function *f = c->kernel->entry;

    c->param_values = ptx_new((size_t)f->param_bytes + 16, 1);
    for (int i = 0; i < f->n_params; i++)
        memcpy(c->param_values + f->params[i].at, c->launch->params[i],
               (size_t)f->params[i].bytes);
}

void ptx_run(const struct ptx_kernel *k, const struct ptx_launch *l)
{
    static unsigned launches;
    unsigned size = l->cluster[0] * l->cluster[1] * l->cluster[2];
    unsigned threads = l->block[0] * l->block[1] * l->block[2];
    unsigned n_blocks = l->grid[0] * l->grid[1] * l->grid[2], order = launches++;
    struct cluster c = { .kernel = k, .launch = l, .size = (int)size };

    if (l->cluster[1] != 1 || l->cluster[2] != 1 || l->grid[0] % size ||
        (k->entry->most_threads && threads > k->entry->most_threads)) {
        fprintf(stderr, "%s: %u threads in clusters of %u, %u, %u\n", k->entry->name, threads,
                l->cluster[0], l->cluster[1], l->cluster[2]);
        abort();
    }
    c.shared_bytes = k->shared_bytes + (int)l->shared_bytes;
    c.early_copies = order / 2 % 2;
    c.blocks = ptx_new(size, sizeof *c.blocks);
    pack_params(&c);
    for (unsigned i = 0; i < size; i++)
        make_block(&c, (int)i, (int)((threads + LANES - 1) / LANES));
    for (unsigned first = 0; first < n_blocks; first += size) {
        c.n_alive = c.arrived = 0;
        c.phase = 0;
        for (unsigned i = 0; i < size; i++) {
            unsigned at = first + i;
            const unsigned block[3] = { at % l->grid[0], at / l->grid[0] % l->grid[1],
                                        at / l->grid[0] / l->grid[1] };
            start_block(&c.blocks[i], block);
        }
        run_cluster(&c, order + first);
    }
    for (unsigned i = 0; i < size; i++)
        drop_block(&c.blocks[i]);
    free(c.blocks);
    free(c.param_values);
}
