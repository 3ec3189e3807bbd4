/* Decode steps of sequences whose K and V are in host memory, beside the same steps with
 * everything on the device, sparse and with full attention (decode_steps.h).
 *
 *   bench-gpu-offload DIR [--host-gb N] [--set-rows N] [batch:context[:overlap] ...]
 *
 * Overlap is how many percent of a step's rows that are off the device are found in the hot
 * rows; without it a case is measured at several.  It is exact: a step chooses the same tokens
 * every time, because nothing changes, and before it the first rows of every set are emptied.
 * Empty rows are filled first and in order (hot_rows.h, rule 2), so the same tokens miss every
 * time; the hand of the ring is put before them.  Emptying is over when the clock of a step starts.
 *
 * Host memory is the host tier's own, slots as in kv_pool.h, filled with random K and V.  All
 * blocks of an offloaded context but its last one are there alone.  Contexts that need more
 * than --host-gb (default 40, and three quarters of what the machine has) share host blocks,
 * and the line says so: every fetch still crosses the bus.  Where the device's pool is too
 * small for the resident contexts these share blocks there.  Sets have --set-rows times
 * (default 4) as many rows as a step chooses.
 *
 * Before anything is timed, offloaded steps are held against resident ones on the same K and V,
 * to the bit, and against other K and V, which must show.
 *
 * GB/s is of the rows fetched in the time that offloaded steps take longer, which has the search
 * in the sets in it; the floor is the time of these bytes in one plain copy. */

#include "engine/base/clock.h"
#include "engine/base/host_limits.h"
#include "engine/base/invariant.h"
#include "engine/kv/host_memory.h"
#include "engine/kv/hot_sets.h"
#include "tests/bench/decode_steps.h"
#include "tests/bench/empty_rows.h"
#include "tests/bench/memory_rate.h"
#include "tests/support/gpu_bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_CASES = 16, MAX_OVERLAPS = 6, ALL_OVERLAPS = -1, HOST_GB = 40, SET_ROWS = 4,
       CHUNK_BYTES = 64 << 20,   /* divides what is registered at a time */
       COPY_BYTES = 512 << 20, COPIES = 7, CHECK_SEQS = 2, MOST_CHECK_BLOCKS = 64 };

static const int overlaps[MAX_OVERLAPS] = { 0, 70, 80, 90, 95, 100 };

struct offload_case {
    struct decodes d;
    int overlap;                 /* percent, or ALL_OVERLAPS */
};

struct options {
    const char *dir;
    int host_gb, set_rows, n;
    struct offload_case cases[MAX_CASES];
};

struct bench {
    struct decode_bench steps;
    struct host_memory *host;
    struct hot_sets *sets;
    size_t slot_bytes;
    uint32_t host_blocks;        /* host slots in use: the first ones */
    double copy_gb_per_s;
    struct decodes d;            /* of the steps that are run */
    int empty;                   /* rows of a head that are emptied before each */
};

static void fail(const char *sentence)
{
    fprintf(stderr, "benchmark: %s\n", sentence);
    exit(1);
}

/* ---- options */

static bool parse_case(const char *text, struct offload_case *out)
{
    char end;
    int n = sscanf(text, "%d:%d:%d%c", &out->d.batch, &out->d.n_tokens, &out->overlap, &end);

    if (n == 2) {
        out->overlap = ALL_OVERLAPS;
        n = sscanf(text, "%d:%d%c", &out->d.batch, &out->d.n_tokens, &end) == 2 ? 3 : 0;
    } else if (n == 3 && (out->overlap < 0 || out->overlap > 100)) {
        n = 0;
    }
    return n == 3 && out->d.batch >= 1 && out->d.batch <= DECODE_MAX_SEQS
           && out->d.n_tokens >= 1;
}

static bool parse_options(int argc, char **argv, struct options *o)
{
    char end;

    *o = (struct options){ .host_gb = HOST_GB, .set_rows = SET_ROWS };
    for (int i = 1; i < argc; i++) {
        int *number = strcmp(argv[i], "--host-gb") == 0 ? &o->host_gb
                      : strcmp(argv[i], "--set-rows") == 0 ? &o->set_rows : NULL;
        if (number) {
            if (++i == argc || sscanf(argv[i], "%d%c", number, &end) != 1 || *number < 1)
                return false;
        } else if (!o->dir) {
            o->dir = argv[i];
        } else if (o->n == MAX_CASES || !parse_case(argv[i], &o->cases[o->n++])) {
            return false;
        }
    }
    if (o->dir && o->n == 0) {
        o->cases[o->n++] = (struct offload_case){ { 1, 98304 }, ALL_OVERLAPS };
        o->cases[o->n++] = (struct offload_case){ { 8, 98304 }, ALL_OVERLAPS };
    }
    return o->dir != NULL;
}

/* ---- host memory */

/* Slots that lie in what is registered first, and so can be copied to without a look. */
static uint32_t first_slots(const struct bench *b)
{
    uint32_t slots = (uint32_t)(((size_t)HOST_MEMORY_PIECE_MB << 20) / b->slot_bytes);

    return slots < b->host_blocks ? slots : b->host_blocks;
}

static void fill_host(const struct bench *b, size_t bytes)
{
    char *to = host_memory_base(b->host);
    const void *from = gpu_bench_random_bf16(CHUNK_BYTES / sizeof(bf16));
    struct error err;

    for (size_t at = 0; at < bytes; at += CHUNK_BYTES)
        stream_copy(gpu_bench_stream(), to + at, from,
                    bytes - at < CHUNK_BYTES ? bytes - at : CHUNK_BYTES);
    bench_check(stream_sync(gpu_bench_stream(), &err), &err);
    gpu_bench_forget();
}

static void measure_copy(struct bench *b, size_t host_bytes)
{
    size_t bytes = host_bytes < COPY_BYTES ? host_bytes : COPY_BYTES;
    void *to = gpu_bench_zero(bytes);
    struct error err;

    for (int i = 0; i < COPIES; i++) {
        uint64_t from_ns = clock_now_ns();
        stream_copy(gpu_bench_stream(), to, host_memory_base(b->host), bytes);
        bench_check(stream_sync(gpu_bench_stream(), &err), &err);
        double rate = (double)bytes / (double)(clock_now_ns() - from_ns);
        b->copy_gb_per_s = rate > b->copy_gb_per_s ? rate : b->copy_gb_per_s;
    }
    gpu_bench_forget();
}

/* For the largest case, but no more than there may be and no less than the check takes. */
static void open_host(struct bench *b, const struct options *o)
{
    size_t limit = (size_t)o->host_gb * 1000000000, can = host_memory_available() / 4 * 3;
    size_t piece = (size_t)HOST_MEMORY_PIECE_MB << 20;
    size_t wanted = 0;
    struct error err;

    b->slot_bytes = kv_pool_host_bytes(&b->steps.shape, model_config(b->steps.model)->layers);
    for (int i = 0; i < o->n; i++) {
        const struct decodes *d = &o->cases[i].d;
        size_t blocks = (size_t)d->batch * (size_t)decode_blocks(d->n_tokens) + 1;
        wanted = blocks * b->slot_bytes > wanted ? blocks * b->slot_bytes : wanted;
    }
    limit = limit < can ? limit : can;
    wanted = wanted < limit ? wanted : limit;
    wanted = wanted > piece ? wanted : piece;
    b->host_blocks = (uint32_t)(wanted / b->slot_bytes);
    size_t bytes = b->host_blocks * b->slot_bytes;
    bench_check(host_memory_create(&b->host, gpu_bench_backend(), bytes, NULL, NULL, &err), &err);
    while (host_memory_ready_bytes(b->host) < bytes) {
        bench_check(host_memory_failure(b->host, &err), &err);
        usleep(1000);
    }
    fill_host(b, bytes);
    measure_copy(b, bytes);
}

/* ---- sets */

static void open_sets(struct bench *b, const struct options *o)
{
    const struct decode_bench *s = &b->steps;
    int rows = o->set_rows * s->plan.max_keep_tokens, sets = CHECK_SEQS;
    struct error err;

    for (int i = 0; i < o->n; i++)
        sets = o->cases[i].d.batch > sets ? o->cases[i].d.batch : sets;
    struct hot_sets_config cfg = {
        .sets = sets, .layers = model_config(s->model)->layers,
        .rows_per_head = rows < HOT_MOST_ROWS ? rows : HOT_MOST_ROWS,
        .max_blocks = s->limits.max_blocks, .shape = s->shape,
        .host = host_memory_base(b->host), .host_stride = b->slot_bytes,
    };
    bench_check(hot_sets_create(&b->sets, gpu_bench_backend(), &cfg, &err), &err);
    model_use_hot_sets(s->model, b->sets);
}

static void give_sets(struct bench *b)
{
    for (int s = 0; s < b->d.batch; s++)
        hot_sets_release(b->sets, s);
}

static void empty(void *arg)
{
    const struct bench *b = arg;
    const struct hot_sets_config *cfg = hot_sets_config(b->sets);
    struct empty_rows_args a = {
        .position = hot_sets_layer(b->sets, 0).position,
        .hand = hot_sets_layer(b->sets, 0).hand, .layers = cfg->layers,
        .lists = cfg->sets * cfg->shape.kv_heads, .rows_per_head = cfg->rows_per_head,
        .n = b->empty,
    };

    if (cfg->layers > 1) {
        a.layer_stride = (size_t)(hot_sets_layer(b->sets, 1).position - a.position);
        a.hand_stride = (size_t)(hot_sets_layer(b->sets, 1).hand - a.hand);
    }
    for (int layer = 0; layer < cfg->layers; layer++)
        ASSERT(hot_sets_layer(b->sets, layer).position
               == a.position + (size_t)layer * a.layer_stride);
    if (!empty_rows(&a))
        fail("the device failed while hot rows were emptied");
}

/* Sequence s has set s, and all sets are empty, with the first row as the next. */
static void take_sets(struct bench *b)
{
    for (int s = 0; s < b->d.batch; s++)
        ASSERT(hot_sets_acquire(b->sets, gpu_bench_stream()) == s);
    b->empty = 0;
    empty(b);
}

/* Of all layers since create. */
static struct hot_counts count(const struct bench *b)
{
    struct hot_counts sum = { 0 };

    for (int layer = 0; layer < hot_sets_config(b->sets)->layers; layer++) {
        struct hot_counts c = hot_sets_counts(b->sets, layer);
        sum.hits += c.hits;
        sum.misses += c.misses;
        sum.resident += c.resident;
    }
    return sum;
}

/* ---- steps */

/* The tables of contexts that have left the device, as step.c packs them. */
static void leave_device(void *arg, struct model_batch *batch)
{
    const struct bench *b = arg;
    size_t width = (size_t)b->steps.limits.max_blocks;
    int last = decode_blocks(b->d.n_tokens) - 1;

    for (int s = 0; s < b->d.batch; s++) {
        int32_t *kv = batch->kv_table + (size_t)s * width;
        int32_t *host = batch->host_table + (size_t)s * width;
        batch->hot_set[s] = s;
        for (int i = 0; i < last; i++) {
            kv[i] = -1;
            host[i] = (int32_t)decode_scatter(b->host_blocks, &b->d, s, i);
        }
        host[last] = -1;
    }
}

/* Rows that a head chooses of a context and that are off the device: all but those of the last
 * block, which are always chosen because they are the newest. */
static int rows_away(const struct bench *b)
{
    int own = b->d.n_tokens - (decode_blocks(b->d.n_tokens) - 1) * BLOCK_TOKENS;

    return b->steps.plan.config.keep_tokens - own;
}

/* Of a step, in all layers, contexts and heads. */
static uint64_t heads_of_step(const struct bench *b)
{
    return (uint64_t)model_config(b->steps.model)->layers * (uint64_t)b->d.batch
           * (uint64_t)b->steps.shape.kv_heads;
}

/* ---- the check */

static void want_logprobs(void *arg, struct model_batch *batch)
{
    (void)arg;
    for (int s = 0; s < batch->logit_rows; s++)
        batch->sample[s].n_top = SAMPLE_MAX_TOP;
}

static void leave_and_want(void *arg, struct model_batch *batch)
{
    leave_device(arg, batch);
    want_logprobs(arg, batch);
}

static bool is_same(const struct sample_result *a, const struct sample_result *b)
{
    bool same = a->token == b->token && a->logprob == b->logprob && a->n_top == b->n_top;

    for (int i = 0; i < a->n_top && same; i++)
        same = a->top[i].id == b->top[i].id && a->top[i].logprob == b->top[i].logprob;
    return same;
}

/* One offloaded step; whether its results are the expected ones, and the misses are. */
static bool run_check(struct bench *b, int emptied, int misses, const struct sample_result *want)
{
    struct decode_work w = { .d = b->d, .sparse = true, .change = leave_and_want, .arg = b };
    uint64_t before = count(b).misses;
    bool same = true;

    b->empty = emptied;
    empty(b);
    decode_step(&b->steps, &w);
    if (count(b).misses - before != (uint64_t)misses * heads_of_step(b))
        fail("hot rows missed other tokens than they must: the figures would mean nothing");
    for (int s = 0; s < b->d.batch; s++)
        same = same && is_same(&model_batch(b->steps.model)->result[s], &want[s]);
    return same;
}

/* What the last step read on the device, into the host slots of its contexts. */
static void copy_contexts(const struct bench *b)
{
    const struct model_batch *batch = model_batch(b->steps.model);
    size_t width = (size_t)b->steps.limits.max_blocks, bytes = kv_block_bytes(&b->steps.shape);
    int layers = model_config(b->steps.model)->layers;
    struct error err;

    for (int s = 0; s < b->d.batch; s++)
        for (int i = 0; i < decode_blocks(b->d.n_tokens) - 1; i++) {
            int32_t from = batch->kv_table[(size_t)s * width + (size_t)i];
            char *to = (char *)host_memory_base(b->host)
                       + decode_scatter(b->host_blocks, &b->d, s, i) * b->slot_bytes;
            for (int layer = 0; layer < layers; layer++)
                stream_copy(gpu_bench_stream(), to + (size_t)layer * bytes,
                            (const char *)kv_pool_kv(b->steps.pool, layer) + (size_t)from * bytes,
                            bytes);
        }
    bench_check(stream_sync(gpu_bench_stream(), &err), &err);
}

static void run_resident(struct bench *b, struct sample_result *out)
{
    decode_step(&b->steps, &(struct decode_work){ .d = b->d, .sparse = true,
                                                  .change = want_logprobs });
    memcpy(out, model_batch(b->steps.model)->result, (size_t)b->d.batch * sizeof *out);
    for (int s = 0; s < b->d.batch; s++)
        if (out[s].token < 0 || !isfinite(out[s].logprob))
            fail("the model's output is not a number");
}

/* Resident and offloaded steps of small contexts must give the same results, and offloaded ones
 * on other K and V other ones. */
static void check_results(struct bench *b)
{
    struct sample_result want[CHECK_SEQS];
    uint32_t all = b->host_blocks;
    int blocks;

    b->host_blocks = first_slots(b);
    blocks = (int)(b->host_blocks - 1) / CHECK_SEQS;
    blocks = blocks < MOST_CHECK_BLOCKS ? blocks : MOST_CHECK_BLOCKS;
    b->d = (struct decodes){ CHECK_SEQS, blocks * BLOCK_TOKENS - 5 };
    int away = rows_away(b);
    if (b->d.n_tokens < b->steps.plan.config.keep_tokens + BLOCK_TOKENS
        || decode_refusal(&b->steps, &b->d) || decode_shares_blocks(&b->steps, &b->d))
        fail("there is no room for the two small contexts of the check");
    run_resident(b, want);
    take_sets(b);
    if (run_check(b, 0, away, want))
        fail("what is in host memory makes no difference");
    give_sets(b);
    run_resident(b, want);       /* for its tables; the results are the same */
    copy_contexts(b);
    take_sets(b);
    if (!run_check(b, 0, away, want) || !run_check(b, away / 2, away / 2, want)
        || !run_check(b, 0, 0, want))
        fail("offloaded steps give other results than resident ones");
    give_sets(b);
    b->host_blocks = all;
    printf("checked: %d contexts of %d tokens give the same results, to the bit, when all rows "
           "are fetched, half of them, and none\n", b->d.batch, b->d.n_tokens);
}

/* ---- measuring */

static void report_overlap(struct bench *b, int overlap, double full_ms, const char *note)
{
    struct decode_work resident = { .d = b->d, .sparse = true }, offloaded = resident;
    int steps = DECODE_WARM_UP + DECODE_STEPS;

    offloaded.before = empty;
    offloaded.change = leave_device;
    offloaded.arg = b;
    b->empty = (rows_away(b) * (100 - overlap) + 50) / 100;
    double resident_ms = decode_measure(&b->steps, &resident).ms;
    struct hot_counts before = count(b);
    double ms = decode_measure(&b->steps, &offloaded).ms;
    struct hot_counts after = count(b);
    double hits = (double)(after.hits - before.hits) / steps;
    double misses = (double)(after.misses - before.misses) / steps;
    double bytes = misses * (double)kv_row_dim(&b->steps.shape) * sizeof(bf16);
    double longer = ms - resident_ms;
    char rate[16] = "-";

    if (bytes > 0 && longer > 0)
        snprintf(rate, sizeof rate, "%.1f", bytes / longer * 1e-6);
    printf("%6d %8d %8.1f %9.3f %9.3f %6.2f %9.3f %9.0f %8.1f %6s %7.3f%s", b->d.batch,
           b->d.n_tokens, 100 * hits / (hits + misses), resident_ms, ms, ms / resident_ms,
           full_ms, misses, bytes * 1e-6, rate, bytes / b->copy_gb_per_s * 1e-6, note);
    if (after.misses - before.misses
        != (uint64_t)steps * (uint64_t)b->empty * heads_of_step(b))
        printf("  %llu misses were meant", (unsigned long long)b->empty * heads_of_step(b));
    printf("\n");
    fflush(stdout);
}

static const char *note_of(const struct bench *b)
{
    bool device = decode_shares_blocks(&b->steps, &b->d);
    bool host = (uint32_t)(b->d.batch * decode_blocks(b->d.n_tokens)) >= b->host_blocks;

    return device && host ? "  contexts share blocks on the device and on the host"
           : device ? "  contexts share blocks on the device"
           : host ? "  contexts share blocks on the host" : "";
}

static const char *refusal_of(const struct bench *b)
{
    const char *refusal = decode_refusal(&b->steps, &b->d);

    if (!refusal && b->d.n_tokens < b->steps.plan.config.keep_tokens + BLOCK_TOKENS)
        return "too short: all of it is chosen";
    return refusal;
}

static void report(struct bench *b, const struct offload_case *c)
{
    b->d = c->d;
    const char *refusal = refusal_of(b);
    if (refusal) {
        printf("%6d %8d  %s\n", b->d.batch, b->d.n_tokens, refusal);
        return;
    }
    double full_ms = decode_measure(&b->steps, &(struct decode_work){ .d = b->d }).ms;
    take_sets(b);
    decode_step(&b->steps, &(struct decode_work){ .d = b->d, .sparse = true,
                                                  .change = leave_device, .arg = b });
    for (int i = 0; i < MAX_OVERLAPS; i++)
        if (c->overlap == ALL_OVERLAPS)
            report_overlap(b, overlaps[i], full_ms, note_of(b));
    if (c->overlap != ALL_OVERLAPS)
        report_overlap(b, c->overlap, full_ms, note_of(b));
    give_sets(b);
}

static void print_head(const struct bench *b, double gb_per_s)
{
    const struct hot_sets_config *cfg = hot_sets_config(b->sets);

    printf("memory is read at %.0f GB/s, host memory copied at %.1f GB/s; %.2f GB of weights a "
           "step\n", gb_per_s, b->copy_gb_per_s, decode_weight_bytes(&b->steps, 1) * 1e-9);
    printf("%.1f GB of host memory hold %llu tokens; the pool holds %llu, and the index of %llu; "
           "%d sets of %d rows a head take %.1f GB\n",
           (double)(b->host_blocks * b->slot_bytes) * 1e-9,
           (unsigned long long)b->host_blocks * BLOCK_TOKENS,
           (unsigned long long)b->steps.blocks * BLOCK_TOKENS,
           (unsigned long long)b->steps.index_blocks * BLOCK_TOKENS, cfg->sets,
           cfg->rows_per_head, (double)hot_sets_bytes(cfg) * 1e-9);
}

int main(int argc, char **argv)
{
    struct options o;
    struct bench b = { 0 };
    uint32_t wanted = 0;

    if (!parse_options(argc, argv, &o)) {
        fprintf(stderr, "usage: bench-gpu-offload DIR [--host-gb N] [--set-rows N] "
                "[batch:context[:overlap] ...], batches up to %d\n", DECODE_MAX_SEQS);
        return 1;
    }
    if (!gpu_bench_open())
        return 1;
    double gb_per_s = memory_rate();
    decode_open(&b.steps, o.dir);
    open_host(&b, &o);
    open_sets(&b, &o);
    decode_prepare(&b.steps);
    for (int i = 0; i < o.n; i++) {
        uint32_t blocks = decode_pool_blocks(&o.cases[i].d);
        wanted = blocks > wanted ? blocks : wanted;
    }
    struct decodes least = { CHECK_SEQS, MOST_CHECK_BLOCKS * BLOCK_TOKENS };
    uint32_t of_check = decode_pool_blocks(&least);
    decode_open_pool(&b.steps, wanted > of_check ? wanted : of_check, true);
    print_head(&b, gb_per_s);
    check_results(&b);
    printf("                                        ms a step                        rows "
           "fetched\n"
           " batch   tokens  overlap  resident offloaded  ratio      full    misses       MB   "
           "GB/s   floor\n");
    for (int i = 0; i < o.n; i++)
        report(&b, &o.cases[i]);
    decode_close(&b.steps);
    hot_sets_destroy(b.sets);
    host_memory_destroy(b.host);
    return 0;
}
