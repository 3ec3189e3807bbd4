/* Sampling on the device; kernels/sampling.h says what is computed.
 *
 * A row's part in a call is one or two jobs: one makes its token (ARGMAX: the largest or a
 * given one; DRAW: of all; CUT: of a prefix), a REPORT its logprobs.  Every kernel runs over
 * (chunks of the row, jobs), so that one row fills the device as well as 64 do; the last
 * block of a job to finish does what needs the whole row:
 *
 *   edit      steps (2) and (3), in logit_edit.cu; but a mask of allowed ids is looked at wherever
 *             a logit is read: one bit beside it, instead of a row that is written and restored
 *   survey    the largest logit; whether there is a NaN.  ARGMAX ends here.
 *   weigh     DRAW: the best score of all; ends here.  Otherwise counts and masses of bins
 *             of equal width below the maximum.  A prefix ends in one bin, or few when the
 *             mass depends on where top_k ends: the border.
 *   resolve   What lies above the border is drawn from at once, the border is gathered.
 *             The last block finds the end of the prefix within it by radix selection, and
 *             draws from what is left.
 *   rank      logprob and rank of the token.
 *
 * Only the border has to be put in order, a few hundred logits even where top_p keeps half
 * of the vocabulary.  A border larger than the list (many ties, or nearly so beside a logit
 * far below) is read from the row again, by the last block alone: slower, as exact.
 *
 * Exactness.  A mass is an integer, e^x in units of 2^-40, and every reduction adds or
 * compares integers: no result depends on the order, hence on the number of blocks, rows
 * or on luck.  The sum of 2^18 masses fits 59 bits, and its error, 2^-41 an addend, is
 * below that of the float e^x.  The last bin holds everything from 27 temperatures below
 * the maximum on; no gumbel can lift that above the maximum's own score, so it counts for
 * masses but a prefix that ends in it needs no exact end.  The last bin of a REPORT begins
 * 108 below the maximum, where masses are 0; it can hold one of the n_top, so it is put in
 * order like any other.
 *
 * Time.  A pass over a row reads it from the L2 cache where the product left it; one row
 * of 151,936 logits is 0.6 MB, so that launches, about 3 us each, and the 8 us of the last
 * block are all of its time.  64 rows are 39 MB a pass: about 10 us a pass by bytes, and
 * for DRAW 170 instructions a logit, some 80 us.
 *
 * Ties, infinities and NaN are as in kernels/cpu/sample.c. */

#include "kernels/cuda/sampler.cuh"

#include "kernels/philox.h"

#include <math.h>

enum {
    THREADS = 512,
    N_WARPS = THREADS / WARP,
    OWN_BINS = N_BINS / THREADS, /* that a thread looks after */
    BATCH = 4,                   /* loads of a thread at a time where one block reads a row */
    ITEM_BITS = 32 + ID_BITS,    /* five digits */
    MIN_CHUNK = 1024,
};

static_assert(ITEM_BITS % DIGIT_BITS == 0, "digits fill an item");

struct pass {
    struct job *jobs;            /* job blockIdx.y */
    struct slot *slots;
    struct sample_result *out;
    float *logits;
    const char *sent;
    int vocab, chunk;
};

/* ---- keys and items */

static __device__ __forceinline__ float key_value(unsigned key)
{
    return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

/* A key and its id: the larger is what comes first, ties by lower id. */
static __device__ __forceinline__ wide item_of(unsigned key, int id)
{
    return (wide)key << ID_BITS | (unsigned)((1 << ID_BITS) - 1 - id);
}

static __device__ __forceinline__ unsigned item_key(wide item)
{
    return (unsigned)(item >> ID_BITS);
}

static __device__ __forceinline__ int item_id(wide item)
{
    return (1 << ID_BITS) - 1 - (int)(item & ((1 << ID_BITS) - 1));
}

/* ---- a row as its job sees it */

struct row {
    const float *l;
    const uint32_t *allowed;     /* NULL: all are */
    float max, temperature, bins_per_logit;
    unsigned top, from;
    bool flat;
    uint32_t index;
    uint64_t seed;
};

static __device__ __forceinline__ const uint32_t *mask_of(const struct pass &p,
                                                          const struct job *job)
{
    return job->allowed ? (const uint32_t *)(p.sent + job->allowed) : NULL;
}

static __device__ __forceinline__ bool is_allowed(const uint32_t *allowed, int i)
{
    return !allowed || (allowed[i / 32] >> i % 32 & 1);
}

static __device__ __forceinline__ struct row row_of(const struct pass &p, const struct job *job)
{
    struct row r = { p.logits + (size_t)job->row * p.vocab, mask_of(p, job), job->max,
                     job->temperature,
                     job->bins_per_logit, job->top, job->from, job->flat, job->index,
                     job->seed };

    return r;
}

/* An infinite maximum becomes 0 and all else -inf. */
static __device__ __forceinline__ float row_logit(const struct row &r, int i)
{
    float v = is_allowed(r.allowed, i) ? r.l[i] : -INFINITY;

    return !r.flat ? v : key_of(v) == r.top ? 0.0f : -INFINITY;
}

static __device__ __forceinline__ int bin_of(const struct row &r, float v)
{
    return (int)fminf((r.max - v) * r.bins_per_logit, (float)TAIL);
}

/* e^x in units of 2^-40. */
static __device__ __forceinline__ wide mass_of(const struct row &r, float v)
{
    return __float2ull_rn(expf((v - r.max) / r.temperature) * 1099511627776.0f);
}

static __device__ __forceinline__ wide score_of(const struct row &r, float v, int id)
{
    float x = (v - r.max) / r.temperature;

    return item_of(key_of(x + gumbel_of(sample_bits(r.seed, r.index, id))), id);
}

/* The mass a prefix must reach, at least one unit: never an empty prefix. */
static __device__ __forceinline__ wide fraction(float top_p, wide mass)
{
    wide want = (wide)ceil((double)top_p * (double)mass);

    return want > 0 ? want : 1;
}

/* ---- by all threads of a block */

struct shared_words {
    wide warp[N_WARPS];
    wide above;
    int bin;
    bool last;
};

static __device__ __forceinline__ wide block_sum(wide v, struct shared_words *s)
{
    for (int lane = WARP / 2; lane > 0; lane /= 2)
        v += __shfl_xor_sync(0xffffffffu, v, lane);
    if (threadIdx.x % WARP == 0)
        s->warp[threadIdx.x / WARP] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < N_WARPS; i++)
        v += s->warp[i];
    __syncthreads();
    return v;
}

static __device__ __forceinline__ wide block_max(wide v, struct shared_words *s)
{
    for (int lane = WARP / 2; lane > 0; lane /= 2)
        v = max(v, __shfl_xor_sync(0xffffffffu, v, lane));
    if (threadIdx.x % WARP == 0)
        s->warp[threadIdx.x / WARP] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < N_WARPS; i++)
        v = max(v, s->warp[i]);
    __syncthreads();
    return v;
}

/* Whether this is the last block of the job; it sees what all others have written, if it
 * reads past the first cache. */
static __device__ __forceinline__ bool is_last(struct job *job, struct shared_words *s)
{
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        s->last = atomicAdd(&job->done, 1u) == gridDim.x - 1;
        if (s->last)
            job->done = 0;
    }
    __syncthreads();
    __threadfence();
    return s->last;
}

struct found { int bin; wide above; };

/* The bin at which the weights added up from bin 0 reach want, and the weight of the bins
 * before it; TAIL if they never do.  want > 0; thread t has the weights of bins OWN_BINS t
 * and up. */
static __device__ __forceinline__ struct found find_bin(const wide weight[OWN_BINS], wide want,
                                                        struct shared_words *s)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    wide own = 0;

    for (int j = 0; j < OWN_BINS; j++)
        own += weight[j];
    wide through = own;          /* up to this thread's, inclusive */
    for (int distance = 1; distance < WARP; distance *= 2) {
        wide before = __shfl_up_sync(0xffffffffu, through, distance);
        through += lane >= distance ? before : 0;
    }
    if (lane == WARP - 1)
        s->warp[warp] = through;
    if (threadIdx.x == 0)
        s->bin = TAIL;
    __syncthreads();
    for (int i = 0; i < N_WARPS; i++)
        through += i < warp ? s->warp[i] : 0;
    wide above = through - own;
    if (above < want && want <= through) {
        int j = 0;
        for (int i = 0; i < OWN_BINS - 1; i++) {      /* unrolled: weight is in registers */
            bool before = j == i && above + weight[i] < want;
            above += before ? weight[i] : 0;
            j += before;
        }
        s->bin = (int)threadIdx.x * OWN_BINS + j;
        s->above = above;
    }
    __syncthreads();
    struct found f = { s->bin, s->above };
    __syncthreads();
    return f;
}

/* 64-bit sums in shared memory: of two words, since it adds words without a retry. */
static __device__ __forceinline__ void add_wide(unsigned *low, unsigned *high, wide weight)
{
    unsigned add = (unsigned)weight, old = atomicAdd(low, add);
    unsigned carried = (unsigned)(weight >> 32) + (old + add < old);

    if (carried)
        atomicAdd(high, carried);
}

/* The part of the row this block has. */
struct stretch { int first, end; };

static __device__ __forceinline__ struct stretch stretch_of(const struct pass &p)
{
    int first = (int)blockIdx.x * p.chunk;
    struct stretch part = { first + (int)threadIdx.x, min(first + p.chunk, p.vocab) };

    return part;
}

/* ---- survey */

static __device__ __forceinline__ void settle(const struct pass &p, struct job *job)
{
    wide best = __ldcg(&job->best);
    bool nan = __ldcg(&job->nan);
    float top = key_value(item_key(best));
    int token = job->target >= 0 ? job->target : item_id(best);

    job->top = item_key(best);
    job->flat = isinf(top);
    job->max = job->flat ? 0.0f : top;
    job->from = 0;
    /* Narrower bins where all but -inf lie in a shorter range. */
    float range = top - key_value(~__ldcg(&job->least));
    if (!job->flat && range > 1e-30f)
        job->bins_per_logit = fmaxf(job->bins_per_logit, (TAIL - 1) / range);
    if (job->below_max >= 0)
        job->from = key_of((float)((double)job->max - job->below_max));
    job->settled = nan || job->role == ARGMAX || (job->role != REPORT && top == -INFINITY);
    if (job->settled && job->role != REPORT)
        p.out[job->row].token = nan ? -1 : token;
}

static __global__ void __launch_bounds__(THREADS) survey_kernel(const struct pass p)
{
    __shared__ struct shared_words s;
    struct job *job = p.jobs + blockIdx.y;
    const float *l = p.logits + (size_t)job->row * p.vocab;
    const uint32_t *allowed = mask_of(p, job);
    struct stretch part = stretch_of(p);
    unsigned best = 0, least = 0;
    int at = 0;
    bool nan = false;

#pragma unroll 8
    for (int i = part.first; i < part.end; i += THREADS) {
        float v = l[i];
        nan |= isnan(v);
        v = is_allowed(allowed, i) ? v : -INFINITY;
        unsigned key = key_of(v);
        least = max(least, v == -INFINITY ? 0 : ~key);
        at = key > best ? i : at;
        best = max(best, key);
    }
    wide item = block_max(best ? item_of(best, at) : 0, &s);
    least = (unsigned)block_max(least, &s);
    nan = __syncthreads_or(nan);
    if (threadIdx.x == 0) {
        atomicMax(&job->best, item);
        atomicMax(&job->least, least);
        if (nan)
            atomicOr(&job->nan, 1u);
    }
    if (is_last(job, &s) && threadIdx.x == 0)
        settle(p, job);
}

/* ---- weigh */

struct weigh_smem {
    unsigned count[N_BINS], low[N_BINS], high[N_BINS];
    struct shared_words s;
};

static __device__ __forceinline__ void draw_all(const struct pass &p, struct job *job,
                                                struct shared_words *s)
{
    const struct row r = row_of(p, job);
    struct stretch part = stretch_of(p);
    wide best = 0;

    for (int i = part.first; i < part.end; i += THREADS) {
        float v = row_logit(r, i);
        if (key_of(v) >= r.from && bin_of(r, v) < TAIL)
            best = max(best, score_of(r, v, i));
    }
    best = block_max(best, s);
    if (threadIdx.x == 0 && best)
        atomicMax(&job->score, best);
    if (is_last(job, s) && threadIdx.x == 0)
        p.out[job->row].token = item_id(__ldcg(&job->score));
}

/* Counts and masses of this block's bins, as far as the job needs them, added to the job's.
 * What needs no bin of its own goes to the last: all masses of a REPORT. */
static __device__ __forceinline__ void fill_bins(const struct pass &p, const struct job *job,
                                                 struct weigh_smem *m)
{
    const struct row r = row_of(p, job);
    const bool counts = job->top_k > 0, masses = job->role == CUT && job->top_p < 1;
    const bool weighs = masses || job->role == REPORT;
    struct stretch part = stretch_of(p);
    struct slot *slot = p.slots + job->slot;
    wide rest_mass = 0, rest_count = 0;

    for (int b = threadIdx.x; b < N_BINS; b += THREADS)
        m->count[b] = m->low[b] = m->high[b] = 0;
    __syncthreads();
#pragma unroll 4
    for (int i = part.first; i < part.end; i += THREADS) {
        float v = row_logit(r, i);
        if (key_of(v) < r.from)
            continue;
        int bin = bin_of(r, v);
        wide mass = weighs ? mass_of(r, v) : 0;
        if (bin == TAIL || !counts)
            rest_count++;
        else
            atomicAdd(&m->count[bin], 1u);
        if (bin == TAIL || !masses)
            rest_mass += mass;
        else
            add_wide(&m->low[bin], &m->high[bin], mass);
    }
    rest_mass = block_sum(rest_mass, &m->s);
    rest_count = block_sum(rest_count, &m->s);
    if (threadIdx.x == 0) {
        atomicAdd(&slot->mass[TAIL], rest_mass);
        atomicAdd(&slot->count[TAIL], (unsigned)rest_count);
    }
    for (int b = threadIdx.x; b < N_BINS; b += THREADS) {
        wide mass = (wide)m->high[b] << 32 | m->low[b];
        if (m->count[b])
            atomicAdd(&slot->count[b], m->count[b]);
        if (mass)
            atomicAdd(&slot->mass[b], mass);
    }
}

/* The border of a CUT, from the bins of the whole row.  Where top_k ends inside its bin, the
 * mass that top_p refers to is known only to lie between that of the bins before and that
 * of the bin as well: top_p's border reaches from the end for the one to that for the other. */
static __device__ __forceinline__ void plan_cut(struct job *job, const wide mass[OWN_BINS],
                                                const wide count[OWN_BINS],
                                                struct shared_words *s)
{
    struct found k = { TAIL, 0 }, lo, hi;
    wide before = 0, through = 0;

    if (job->top_k > 0)
        k = find_bin(count, (wide)job->top_k, s);
    for (int j = 0; j < OWN_BINS; j++) {
        int b = (int)threadIdx.x * OWN_BINS + j;
        before += b < k.bin ? mass[j] : 0;
        through += b <= k.bin ? mass[j] : 0;
    }
    before = block_sum(before, s);
    through = block_sum(through, s);
    lo = hi = k;
    if (job->top_p < 1) {
        hi = find_bin(mass, fraction(job->top_p, through), s);
        lo = k.bin == TAIL ? hi : find_bin(mass, fraction(job->top_p, before), s);
    }
    if (threadIdx.x == 0) {
        job->lo = lo.bin;
        job->hi = hi.bin;
        job->k = k.bin;
        job->total = through;
        job->above_lo = lo.above;
        job->above_k = before;
        job->count_above_k = (int)k.above;    /* read where k < TAIL */
    }
}

/* The border of a REPORT is everything down to the last of the n_top. */
static __device__ __forceinline__ void plan_report(struct job *job, const wide mass[OWN_BINS],
                                                   const wide count[OWN_BINS],
                                                   struct shared_words *s)
{
    struct found end = { 0, 0 };
    wide total = 0;

    for (int j = 0; j < OWN_BINS; j++)
        total += mass[j];
    total = block_sum(total, s);
    if (job->top_k > 0)
        end = find_bin(count, (wide)job->top_k, s);
    if (threadIdx.x == 0) {
        job->lo = 0;
        job->hi = job->k = end.bin;
        job->total = total;
    }
}

static __global__ void __launch_bounds__(THREADS) weigh_kernel(const struct pass p)
{
    __shared__ struct weigh_smem m;
    struct job *job = p.jobs + blockIdx.y;
    wide mass[OWN_BINS], count[OWN_BINS];

    if (job->settled)
        return;
    if (job->role == DRAW) {
        draw_all(p, job, &m.s);
        return;
    }
    fill_bins(p, job, &m);
    if (!is_last(job, &m.s))
        return;
    struct slot *slot = p.slots + job->slot;
    for (int j = 0; j < OWN_BINS; j++) {
        int b = (int)threadIdx.x * OWN_BINS + j;
        mass[j] = __ldcg(&slot->mass[b]);
        count[j] = __ldcg(&slot->count[b]);
        slot->mass[b] = 0;
        slot->count[b] = 0;
    }
    if (job->role == CUT)
        plan_cut(job, mass, count, &m.s);
    else
        plan_report(job, mass, count, &m.s);
}

/* ---- resolve */

/* The border, gathered or, where that is too long, by another look at the row. */
struct border {
    struct row row;
    const wide *list;            /* NULL: the row */
    int n;
    int lo, hi, k, end;          /* end: no bin from here on has to be resolved */
};

static __device__ __forceinline__ bool in_border(const struct border &b, int bin)
{
    return bin < b.end && ((bin >= b.lo && bin <= b.hi) || bin == b.k);
}

/* Items i, i + THREADS, ...; 0 for what is not in the border. */
static __device__ __forceinline__ void load_batch(wide item[BATCH], const struct border &b,
                                                  int i)
{
    float v[BATCH];

    if (b.list) {
        for (int j = 0; j < BATCH; j++)
            item[j] = i + j * THREADS < b.n ? __ldcg(b.list + i + j * THREADS) : 0;
        return;
    }
    for (int j = 0; j < BATCH; j++)
        v[j] = i + j * THREADS < b.n ? row_logit(b.row, i + j * THREADS) : -INFINITY;
    for (int j = 0; j < BATCH; j++) {
        unsigned key = key_of(v[j]);
        bool in = key >= b.row.from && in_border(b, bin_of(b.row, v[j]));
        item[j] = in && i + j * THREADS < b.n ? item_of(key, i + j * THREADS) : 0;
    }
}

struct resolve_smem {
    unsigned low[N_BINS], high[N_BINS];
    wide top[SAMPLE_MAX_TOP];
    int n_top;
    struct shared_words s;
};

/* Which items are added up, and to how much. */
struct search {
    int first_bin, last_bin;
    bool by_mass;                /* otherwise each weighs 1 */
    wide want;                   /* > 0, at most the weight of all of them */
};

static __device__ __forceinline__ void add_item(struct resolve_smem *m, const struct border &b,
                                                const struct search &q, wide item, int shift)
{
    float v = key_value(item_key(item));
    int bin = bin_of(b.row, v), from_top = N_BINS - 1 - (int)(item >> shift & (N_BINS - 1));

    if (bin >= q.first_bin && bin <= q.last_bin)
        add_wide(&m->low[from_top], &m->high[from_top], q.by_mass ? mass_of(b.row, v) : 1);
}

/* In descending order of the items, the one at which their weights reach the wanted. */
static __device__ __forceinline__ wide find_item(const struct border &b, struct search q,
                                                 struct resolve_smem *m)
{
    wide prefix = 0;

    for (int shift = ITEM_BITS - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        for (int d = threadIdx.x; d < N_BINS; d += THREADS)
            m->low[d] = m->high[d] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < b.n; i += BATCH * THREADS) {
            wide item[BATCH];
            load_batch(item, b, i);
            for (int j = 0; j < BATCH; j++)
                if (item[j] != 0 && item[j] >> shift >> DIGIT_BITS == prefix)
                    add_item(m, b, q, item[j], shift);
        }
        __syncthreads();
        wide of_digit[OWN_BINS];
        for (int j = 0; j < OWN_BINS; j++) {
            int d = (int)threadIdx.x * OWN_BINS + j;
            of_digit[j] = (wide)m->high[d] << 32 | m->low[d];
        }
        struct found f = find_bin(of_digit, q.want, &m->s);
        q.want -= f.above;
        prefix = prefix << DIGIT_BITS | (unsigned)(N_BINS - 1 - f.bin);
    }
    return prefix;
}

/* The mass of the items of a bin from one on. */
static __device__ __forceinline__ wide mass_from(const struct border &b, int bin, wide least,
                                                 struct shared_words *s)
{
    wide mass = 0;

    for (int i = threadIdx.x; i < b.n; i += BATCH * THREADS) {
        wide item[BATCH];
        load_batch(item, b, i);
        for (int j = 0; j < BATCH; j++) {
            float v = key_value(item_key(item[j]));
            if (item[j] != 0 && item[j] >= least && bin_of(b.row, v) == bin)
                mass += mass_of(b.row, v);
        }
    }
    return block_sum(mass, s);
}

static __device__ __forceinline__ void finish_cut(const struct pass &p, const struct job *job,
                                                  const struct border &b,
                                                  struct resolve_smem *m)
{
    wide least = 0, total = job->total, best = 0;

    if (job->k < TAIL) {
        struct search q = { job->k, job->k, false, (wide)(job->top_k - job->count_above_k) };
        /* All ties of the k-th stay: an item without its id is the least of its key. */
        least = find_item(b, q, m) >> ID_BITS << ID_BITS;
        if (job->top_p < 1)
            total = job->above_k + mass_from(b, job->k, least, &m->s);
    }
    if (job->top_p < 1 && job->lo < TAIL) {
        wide want = fraction(job->top_p, total) - job->above_lo;
        struct search q = { job->lo, job->hi, true, want };
        least = find_item(b, q, m);
    }
    for (int i = threadIdx.x; i < b.n; i += BATCH * THREADS) {
        wide item[BATCH];
        load_batch(item, b, i);
        for (int j = 0; j < BATCH; j++)
            if (item[j] != 0 && item[j] >= least) {
                float v = key_value(item_key(item[j]));
                best = max(best, score_of(b.row, v, item_id(item[j])));
            }
    }
    best = max(block_max(best, &m->s), __ldcg(&job->score));
    if (threadIdx.x == 0)
        p.out[job->row].token = item_id(best);
}

static __device__ __forceinline__ double log_mass(const struct job *job)
{
    return log((double)job->total) - 40 * 0.693147180559945309417;
}

static __device__ __forceinline__ void finish_report(const struct pass &p,
                                                     const struct job *job,
                                                     const struct border &b,
                                                     struct resolve_smem *m)
{
    struct search q = { 0, TAIL, false, (wide)job->top_k };
    const wide least = find_item(b, q, m);
    struct token_logprob *top = p.out[job->row].top;

    if (threadIdx.x == 0)
        m->n_top = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < b.n; i += BATCH * THREADS) {
        wide item[BATCH];
        load_batch(item, b, i);
        for (int j = 0; j < BATCH; j++)
            if (item[j] != 0 && item[j] >= least)
                m->top[atomicAdd(&m->n_top, 1)] = item[j];
    }
    __syncthreads();
    if ((int)threadIdx.x >= job->top_k)
        return;
    wide own = m->top[threadIdx.x];
    int place = 0;
    for (int j = 0; j < job->top_k; j++)
        place += m->top[j] > own;
    double x = (double)key_value(item_key(own)) - (double)job->max;
    top[place].id = item_id(own);
    top[place].logprob = (float)(x - log_mass(job));
}

/* Lanes that happen to come together take their places with one addition. */
static __device__ __forceinline__ void append(struct job *job, wide *list, wide item)
{
    unsigned lanes = __activemask(), lane = threadIdx.x % WARP;
    int leader = __ffs(lanes) - 1, at = 0;

    if ((int)lane == leader)
        at = atomicAdd(&job->n_list, __popc(lanes));
    at = __shfl_sync(lanes, at, leader) + __popc(lanes & ((1u << lane) - 1));
    if (at < LIST)
        __stcg(list + at, item);
}

static __global__ void __launch_bounds__(THREADS, 2) resolve_kernel(const struct pass p)
{
    __shared__ struct resolve_smem m;
    struct job *job = p.jobs + blockIdx.y;

    if (job->settled || job->role == DRAW || (job->role == REPORT && job->top_k == 0))
        return;
    const bool cut = job->role == CUT;
    struct border b = { row_of(p, job), p.slots[job->slot].list, 0, job->lo, job->hi, job->k,
                        cut ? TAIL : N_BINS };
    struct stretch part = stretch_of(p);
    wide best = 0;

#pragma unroll 4
    for (int i = part.first; i < part.end; i += THREADS) {
        float v = row_logit(b.row, i);
        int bin = bin_of(b.row, v);
        unsigned key = key_of(v);
        if (key < b.row.from)
            continue;
        if (in_border(b, bin))
            append(job, p.slots[job->slot].list, item_of(key, i));
        else if (cut && bin < b.lo)
            best = max(best, score_of(b.row, v, i));
    }
    best = block_max(best, &m.s);
    if (threadIdx.x == 0 && best)
        atomicMax(&job->score, best);
    if (!is_last(job, &m.s))
        return;
    b.n = __ldcg(&job->n_list);
    if (b.n > LIST) {
        b.n = p.vocab;
        b.list = NULL;
    }
    if (cut)
        finish_cut(p, job, b, &m);
    else
        finish_report(p, job, b, &m);
}

/* ---- rank */

static __global__ void __launch_bounds__(THREADS) rank_kernel(const struct pass p)
{
    __shared__ struct shared_words s;
    const struct job *job = p.jobs + blockIdx.y;
    struct sample_result *out = p.out + job->row;
    const struct row r = row_of(p, job);
    struct stretch part = stretch_of(p);

    if (out->token < 0)
        return;
    const float own = row_logit(r, out->token);
    const unsigned key = key_of(own);
    unsigned count = 0;
#pragma unroll 8
    for (int i = part.first; i < part.end; i += THREADS)
        count += key_of(row_logit(r, i)) >= key;
    wide all = block_sum(count, &s);
    if (threadIdx.x == 0)
        atomicAdd(&out->rank, (int)all);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        out->logprob = (float)((double)own - (double)r.max - log_mass(job));
        out->n_top = job->top_k;
    }
}

/* ---- the operation */

/* Two blocks for each multiprocessor, as far as the rows can be cut. */
static dim3 grid_of(const struct stream *s, struct pass *p, int jobs)
{
    int chunks = (2 * s->be->info.sm_count + jobs - 1) / jobs;
    int most = (p->vocab + MIN_CHUNK - 1) / MIN_CHUNK;

    if (chunks > most)
        chunks = most;
    p->chunk = ((p->vocab + chunks - 1) / chunks + WARP - 1) / WARP * WARP;
    return dim3((unsigned)((p->vocab + p->chunk - 1) / p->chunk), (unsigned)jobs);
}

/* Jobs first .. first + n - 1 of all that were staged: steps (1), (4) and (5). */
static void run_jobs(struct stream *s, struct pass p, const struct job *staged, int first,
                     int n)
{
    bool weigh = false, resolve = false;

    for (int i = first; i < first + n; i++) {
        weigh |= staged[i].role != ARGMAX;
        resolve |= staged[i].role == CUT || (staged[i].role == REPORT && staged[i].top_k > 0);
    }
    p.jobs += first;
    dim3 grid = grid_of(s, &p, n);
    survey_kernel<<<grid, THREADS, 0, s->cu>>>(p);
    if (weigh)
        weigh_kernel<<<grid, THREADS, 0, s->cu>>>(p);
    if (resolve)
        resolve_kernel<<<grid, THREADS, 0, s->cu>>>(p);
    stream_note(s, "sample");
}

extern "C" void cuda_sample(struct stream *s, const struct sample_args *a)
{
    struct sampling of;

    if (!stream_enter(s) || a->rows == 0 || !sampler_send(&of, s, a))
        return;
    struct pass p = { of.jobs, of.slots, of.out, (float *)a->logits, of.sent, a->vocab, 0 };
    struct edit e = { of.jobs + of.n_report, p.logits, of.sent, of.saved, a->vocab };

    /* Reports look at the raw logits. */
    if (of.split)
        run_jobs(s, p, of.staged, 0, of.n_report);
    if (of.edits)
        edit_logits(s, &e, of.n_choose);
    if (of.split)
        run_jobs(s, p, of.staged, of.n_report, of.n_choose);
    else
        run_jobs(s, p, of.staged, 0, of.n_report + of.n_choose);
    if (of.split)
        restore_logits(s, &e, of.n_choose);
    if (of.n_report > 0) {
        dim3 grid = grid_of(s, &p, of.n_report);
        rank_kernel<<<grid, THREADS, 0, s->cu>>>(p);
    }
    stream_note(s, "sample");
    if (s->failed == cudaSuccess)
        stream_check(s, cudaMemcpyAsync(a->out, p.out, (size_t)a->rows * sizeof *a->out,
                                        cudaMemcpyDeviceToHost, s->cu), "sample");
}
