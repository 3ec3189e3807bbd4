/* Steps (2) and (3) of sampling: bans, biases and penalties, on the logits themselves.
 *
 * One block a job; the lists are a few ids, or with penalties the thousands of different
 * ids of a long context.  What an entry changes is kept first, so that the raw logits can
 * be had again for the logprobs.  Time: a launch, and 1 us for each EDIT_THREADS ids.
 *
 * Every operation is rounded like the CPU's, or ties would fall apart. */

#include "kernels/cuda/sampler.cuh"

#include <math.h>

enum { EDIT_THREADS = 512 };

struct edit_lists {
    const int32_t *banned;
    const struct logit_bias *bias;
    const struct token_count *counts;
    int n;                       /* entries in all */
};

static __device__ __forceinline__ struct edit_lists lists_of(const struct edit &e,
                                                             const struct edits &of)
{
    struct edit_lists l;

    l.banned = (const int32_t *)(e.sent + of.lists);
    l.bias = (const struct logit_bias *)(l.banned + of.n_banned);
    l.counts = (const struct token_count *)(l.bias + of.n_bias);
    l.n = of.n_banned + of.n_bias + of.n_counts;
    return l;
}

static __device__ __forceinline__ int edited_id(const struct edit_lists &l,
                                                const struct edits &of, int i)
{
    if (i < of.n_banned)
        return l.banned[i];
    i -= of.n_banned;
    return i < of.n_bias ? l.bias[i].id : l.counts[i - of.n_bias].id;
}

static __device__ __forceinline__ float penalised(float l, const struct edits &of,
                                                  const struct token_count &c)
{
    if (c.in_prompt || c.in_output > 0)
        l = l > 0 ? __fdiv_rn(l, of.repetition) : __fmul_rn(l, of.repetition);
    if (c.in_output > 0) {
        l = __fsub_rn(l, __fmul_rn(of.frequency, (float)c.in_output));
        l = __fsub_rn(l, of.presence);
    }
    return l;
}

/* All biases of one id are added by whoever has the first of them, in their order. */
static __device__ __forceinline__ void add_bias(float *l, const struct logit_bias *bias, int n)
{
    for (int i = threadIdx.x; i < n; i += EDIT_THREADS) {
        int id = bias[i].id, earlier = 0;
        for (int j = 0; j < i; j++)
            earlier += bias[j].id == id;
        if (earlier)
            continue;
        float v = l[id];
        for (int j = i; j < n; j++)
            if (bias[j].id == id)
                v += bias[j].bias;
        l[id] = v;
    }
}

/* One block a job, on the row itself; what was there is kept. */
static __global__ void __launch_bounds__(EDIT_THREADS) edit_kernel(const struct edit e)
{
    struct job *job = e.jobs + blockIdx.x;
    const struct edits of = job->edits;
    const struct edit_lists lists = lists_of(e, of);
    float *l = e.logits + (size_t)job->row * e.vocab, *saved = e.saved + of.saved;

    for (int i = threadIdx.x; i < lists.n; i += EDIT_THREADS) {
        float v = l[edited_id(lists, of, i)];
        saved[i] = v;
        if (isnan(v))
            job->nan = 1;        /* a ban would hide it */
    }
    __syncthreads();
    for (int i = threadIdx.x; i < of.n_banned; i += EDIT_THREADS)
        l[lists.banned[i]] = -INFINITY;
    __syncthreads();
    add_bias(l, lists.bias, of.n_bias);
    __syncthreads();
    for (int i = threadIdx.x; i < of.n_counts; i += EDIT_THREADS) {
        float *at = l + lists.counts[i].id;
        *at = penalised(*at, of, lists.counts[i]);
    }
}

/* The raw logits again. */
static __global__ void __launch_bounds__(EDIT_THREADS) restore_kernel(const struct edit e)
{
    const struct job *job = e.jobs + blockIdx.x;
    const struct edits of = job->edits;
    const struct edit_lists lists = lists_of(e, of);
    float *l = e.logits + (size_t)job->row * e.vocab;

    for (int i = threadIdx.x; i < lists.n; i += EDIT_THREADS)
        l[edited_id(lists, of, i)] = e.saved[of.saved + i];
}

void edit_logits(struct stream *s, const struct edit *e, int jobs)
{
    edit_kernel<<<jobs, EDIT_THREADS, 0, s->cu>>>(*e);
    stream_note(s, "sample");
}

void restore_logits(struct stream *s, const struct edit *e, int jobs)
{
    restore_kernel<<<jobs, EDIT_THREADS, 0, s->cu>>>(*e);
    stream_note(s, "sample");
}
