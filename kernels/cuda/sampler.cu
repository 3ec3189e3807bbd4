#include "kernels/cuda/sampler.cuh"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"

#include <math.h>
#include <string.h>

/* sent holds jobs, results (zero, so that what no kernel writes is zero) and lists, laid
 * out alike on both sides.  Everything grows with the largest call and stays. */
struct sampler {
    struct backend *be;          /* set with the first buffer */
    struct buffer staged;        /* pinned */
    struct buffer sent, saved, slots;
    cudaEvent_t copied;          /* the last copy has left staged */
};

struct sampler *sampler_create(void)
{
    return (struct sampler *)mem_calloc(1, sizeof(struct sampler));
}

void sampler_destroy(struct sampler *sampler)
{
    if (!sampler)
        return;
    struct buffer *const all[] = { &sampler->staged, &sampler->sent, &sampler->saved,
                                   &sampler->slots };

    for (struct buffer *b : all)
        if (b->base)
            buffer_free(sampler->be, b);
    if (sampler->copied)
        cudaEventDestroy(sampler->copied);
    mem_free(sampler);
}

/* Room for at least bytes.  buffer_alloc() may zero on a stream of its own, and the old
 * buffer may still be in use: both are waited for. */
static void grow(struct stream *s, struct buffer *b, enum memory_kind kind, size_t bytes)
{
    if (!stream_enter(s) || b->bytes >= bytes)
        return;
    size_t want = 4096;
    while (want < bytes)
        want *= 2;
    stream_check(s, cudaStreamSynchronize(s->cu), "sample");
    s->sampler->be = s->be;
    buffer_free(s->be, b);
    enum status st = buffer_alloc(s->be, b, kind, want);
    if (st != ST_OK) {
        b->base = NULL;
        b->bytes = 0;
        stream_check(s, st == ST_NODEVMEM ? cudaErrorMemoryAllocation : cudaErrorUnknown,
                     "sample");
    }
    stream_check(s, cudaStreamSynchronize(cudaStreamLegacy), "sample");
}

/* What a call sends, first counted and then written, by the same functions. */
struct layout {
    int n_report, n_choose, n_slots;
    size_t lists, saved;         /* bytes of lists; edited ids */
    bool edits, split;           /* some row is edited; one of these is reported too */
};

static bool has_penalties(const struct sample_params *p)
{
    return p->repetition != 1 || p->frequency != 0 || p->presence != 0;
}

static struct edits wanted_edits(const struct sample_params *p)
{
    struct edits e = { 0, 0, 0, 0, 0, p->repetition, p->frequency, p->presence };

    if (p->target >= 0)
        return e;
    e.n_banned = (int)p->n_banned;
    e.n_bias = (int)p->n_bias;
    e.n_counts = has_penalties(p) ? (int)p->n_counts : 0;
    return e;
}

static size_t list_bytes(const struct edits *e)
{
    return e->n_banned * sizeof(int32_t) + e->n_bias * sizeof(struct logit_bias) +
           e->n_counts * sizeof(struct token_count);
}

/* Of the words that say which ids are allowed.  They follow the row's lists, whose entries are
 * whole words too. */
static size_t mask_bytes(const struct sample_params *p, int vocab)
{
    return p->allowed && p->target < 0 ? (size_t)(vocab + 31) / 32 * sizeof *p->allowed : 0;
}

static enum role role_of(const struct sample_params *p, int vocab)
{
    if (p->target >= 0 || p->temperature < 1e-5f)
        return ARGMAX;
    return p->top_p < 1 || (p->top_k > 0 && p->top_k < vocab) ? CUT : DRAW;
}

static struct layout measure(const struct sample_args *a)
{
    struct layout l = { 0, a->rows, 0, 0, 0, false, false };

    ASSERT(a->vocab > 0 && a->vocab <= 1 << ID_BITS);
    for (int r = 0; r < a->rows; r++) {
        const struct sample_params *p = &a->params[r];
        const struct edits e = wanted_edits(p);
        const bool edits = list_bytes(&e) > 0, reports = p->n_top >= 0;
        ASSERT(p->n_top <= SAMPLE_MAX_TOP && p->target < a->vocab);
        l.n_report += reports;
        l.n_slots += reports + (role_of(p, a->vocab) == CUT);
        l.lists += list_bytes(&e) + mask_bytes(p, a->vocab);
        l.saved += (size_t)(e.n_banned + e.n_bias + e.n_counts);
        l.edits |= edits;
        l.split |= edits && reports;
    }
    return l;
}

static size_t jobs_bytes(const struct layout *l)
{
    return (size_t)(l->n_report + l->n_choose) * sizeof(struct job);
}

static size_t lists_at(const struct layout *l)
{
    return jobs_bytes(l) + (size_t)l->n_choose * sizeof(struct sample_result);
}

static struct job report_job(const struct sample_params *p, int row, int vocab)
{
    struct job j;

    memset(&j, 0, sizeof j);
    j.role = REPORT;
    j.row = row;
    j.target = -1;
    j.temperature = j.top_p = 1;
    j.top_k = p->n_top < vocab ? p->n_top : vocab;
    j.bins_per_logit = (float)TAIL / REPORTABLE;
    j.below_max = -1;
    return j;
}

static struct job choose_job(const struct sample_params *p, int row, int vocab)
{
    struct job j;

    memset(&j, 0, sizeof j);
    j.role = role_of(p, vocab);
    j.row = row;
    j.target = p->target;
    j.temperature = p->temperature;
    j.top_p = p->top_p;
    j.top_k = p->top_k > 0 && p->top_k < vocab ? p->top_k : 0;
    j.bins_per_logit = (float)(TAIL / (DRAWABLE * (double)p->temperature));
    j.below_max = -1;
    if (p->min_p > 0)
        j.below_max = (p->min_p < 1 ? -log((double)p->min_p) : 0) * (double)p->temperature;
    j.seed = p->seed;
    j.index = p->index;
    j.edits = wanted_edits(p);
    return j;
}

static void *put_list(void *to, const void *list, int n, size_t bytes)
{
    if (n > 0)
        memcpy(to, list, (size_t)n * bytes);
    return (char *)to + (size_t)n * bytes;
}

static void check_ids(const struct edits *e, const struct sample_params *p, int vocab)
{
    for (int i = 0; i < e->n_banned; i++)
        ASSERT(p->banned[i] >= 0 && p->banned[i] < vocab);
    for (int i = 0; i < e->n_bias; i++)
        ASSERT(p->bias[i].id >= 0 && p->bias[i].id < vocab);
    for (int i = 0; i < e->n_counts; i++)
        ASSERT(p->counts[i].id >= 0 && p->counts[i].id < vocab);
}

/* Reports come first, then the rows in their order. */
static void stage(char *base, const struct layout *l, const struct sample_args *a)
{
    struct job *report = (struct job *)base, *choose = report + l->n_report;
    size_t list = lists_at(l), saved = 0;
    int slot = 0;

    memset(base + jobs_bytes(l), 0, lists_at(l) - jobs_bytes(l));
    for (int r = 0; r < a->rows; r++) {
        const struct sample_params *p = &a->params[r];
        struct job *j = choose++;
        if (p->n_top >= 0) {
            *report = report_job(p, r, a->vocab);
            report++->slot = slot++;
        }
        *j = choose_job(p, r, a->vocab);
        if (j->role == CUT)
            j->slot = slot++;
        check_ids(&j->edits, p, a->vocab);
        j->edits.lists = list;
        j->edits.saved = saved;
        void *to = put_list(base + list, p->banned, j->edits.n_banned, sizeof *p->banned);
        to = put_list(to, p->bias, j->edits.n_bias, sizeof *p->bias);
        put_list(to, p->counts, j->edits.n_counts, sizeof *p->counts);
        list += list_bytes(&j->edits);
        if (mask_bytes(p, a->vocab) > 0) {
            memcpy(base + list, p->allowed, mask_bytes(p, a->vocab));
            j->allowed = list;
            list += mask_bytes(p, a->vocab);
        }
        saved += (size_t)(j->edits.n_banned + j->edits.n_bias + j->edits.n_counts);
    }
}

bool sampler_send(struct sampling *out, struct stream *s, const struct sample_args *a)
{
    struct sampler *own = s->sampler;
    const struct layout l = measure(a);
    const size_t bytes = lists_at(&l) + l.lists;

    grow(s, &own->staged, MEM_PINNED, bytes);
    grow(s, &own->sent, MEM_DEVICE, bytes);
    grow(s, &own->saved, MEM_DEVICE, l.saved * sizeof(float));
    grow(s, &own->slots, MEM_DEVICE, (size_t)l.n_slots * sizeof(struct slot));
    if (s->failed == cudaSuccess && !own->copied)
        stream_check(s, cudaEventCreateWithFlags(&own->copied, cudaEventDisableTiming),
                     "sample");
    else if (s->failed == cudaSuccess)
        stream_check(s, cudaEventSynchronize(own->copied), "sample");
    if (!stream_enter(s))
        return false;
    char *staged = (char *)own->staged.base, *sent = (char *)own->sent.base;
    stage(staged, &l, a);
    stream_check(s, cudaMemcpyAsync(sent, staged, bytes, cudaMemcpyHostToDevice, s->cu),
                 "sample");
    stream_check(s, cudaEventRecord(own->copied, s->cu), "sample");
    out->staged = (const struct job *)staged;
    out->jobs = (struct job *)sent;
    out->slots = (struct slot *)own->slots.base;
    out->out = (struct sample_result *)(sent + jobs_bytes(&l));
    out->sent = sent;
    out->saved = (float *)own->saved.base;
    out->n_report = l.n_report;
    out->n_choose = a->rows;
    out->edits = l.edits;
    out->split = l.split;
    return s->failed == cudaSuccess;
}
