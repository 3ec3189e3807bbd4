#ifndef KERNELS_CUDA_SAMPLER_CUH
#define KERNELS_CUDA_SAMPLER_CUH

#include "kernels/cuda/cuda.cuh"

/* What the host sends to the kernels of sampling; private to sample.cu, which says what
 * jobs are, sampler.cu, which makes and sends them, and logit_edit.cu. */

typedef unsigned long long wide;

enum {
    DIGIT_BITS = 11,
    N_BINS = 1 << DIGIT_BITS,    /* of a job, and of a digit of radix selection */
    TAIL = N_BINS - 1,
    LIST = 2048,                 /* items of a border; tens to hundreds are common */
    DRAWABLE = 27,
    REPORTABLE = 108,
    ID_BITS = 23,
};

enum role { ARGMAX, DRAW, CUT, REPORT };

/* The ids a row changes, in device memory one behind the other. */
struct edits {
    size_t lists;                /* banned, bias, counts: bytes from the start of sent */
    size_t saved;                /* where the raw logits of all these ids are kept */
    int n_banned, n_bias, n_counts;
    float repetition, frequency, presence;
};

/* Sent by the host, with the state zero. */
struct job {
    enum role role;
    int row, slot;
    int target;                  /* ARGMAX: the token where >= 0 */
    float temperature, top_p;
    int top_k;                   /* 0: off; REPORT: n_top */
    float bins_per_logit;        /* made larger by survey */
    double below_max;            /* min_p as a distance of logits; negative: off */
    uint64_t seed;
    uint32_t index;
    size_t allowed;              /* the mask: bytes from the start of sent; 0: none */
    struct edits edits;

    /* Of survey. */
    wide best;                   /* item of the largest */
    unsigned least;              /* complement of the key of the least above -inf */
    unsigned nan, done;          /* done: blocks that have finished, zero between kernels */
    bool settled;                /* nothing is left to do */
    bool flat;                   /* the largest is infinite, see row_logit() */
    unsigned top, from;          /* keys of the largest and of the least that min_p keeps */
    float max;

    /* Of weigh. */
    wide score;                  /* the best so far; in resolve too */
    int lo, hi, k;               /* the border: bins lo..hi and bin k */
    wide total;                  /* mass of all that min_p keeps */
    wide above_lo, above_k;      /* mass of the bins before them */
    int count_above_k;

    /* Of resolve. */
    int n_list;
};

/* Zero between calls, but for the list. */
struct slot {
    wide mass[N_BINS];
    wide list[LIST];
    unsigned count[N_BINS];
};

/* A call, sent. */
struct sampling {
    const struct job *staged;    /* the jobs as they were sent; host */
    struct job *jobs;            /* reports, then one of each row in order */
    struct slot *slots;
    struct sample_result *out;
    const char *sent;            /* where edits.lists and allowed count from */
    float *saved;
    int n_report, n_choose;
    bool edits, split;           /* some row is edited; one of these is reported too */
};

/* False if that failed; the stream then has the error. */
bool sampler_send(struct sampling *out, struct stream *s, const struct sample_args *a);

/* Jobs whose rows are edited, or do not want it. */
struct edit {
    struct job *jobs;
    float *logits;
    const char *sent;
    float *saved;
    int vocab;
};

void edit_logits(struct stream *s, const struct edit *e, int jobs);
void restore_logits(struct stream *s, const struct edit *e, int jobs);

#endif
