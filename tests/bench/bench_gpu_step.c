/* Whole decode steps of a model on the GPU (decode_steps.h), sparse and with full attention.
 *
 *   bench-gpu-step DIR [batch:context ...]       1:1024 and 8:98304 without any
 *
 * Where the pool cannot hold all contexts of a line they share blocks, and the line says so.
 *
 * The floor is the time of the bytes at the memory's rate: weights once, and K and V of the
 * contexts, or what the two levels read of index, K and V. */

#include "tests/bench/decode_steps.h"
#include "tests/bench/memory_rate.h"
#include "tests/support/gpu_bench.h"

#include <stdio.h>

enum { MAX_CASES = 16 };

static bool parse_case(const char *text, struct decodes *out)
{
    char end;

    return sscanf(text, "%d:%d%c", &out->batch, &out->n_tokens, &end) == 2
           && out->batch >= 1 && out->batch <= DECODE_MAX_SEQS && out->n_tokens >= 1;
}

static void report(struct decode_bench *b, const struct decodes *d, double gb_per_s)
{
    const char *refusal = decode_refusal(b, d);

    if (refusal) {
        printf("%6d %8d  %s\n", d->batch, d->n_tokens, refusal);
        return;
    }
    struct decode_timing sparse =
        decode_measure(b, &(struct decode_work){ .d = *d, .sparse = true });
    struct decode_timing full = decode_measure(b, &(struct decode_work){ .d = *d });
    printf("%6d %8d %8.3f %8.3f %8.3f %9.3f %8.3f %8.3f%s\n", d->batch, d->n_tokens,
           sparse.ms, decode_floor_ms(b, d, true, gb_per_s), sparse.host_ms,
           full.ms, decode_floor_ms(b, d, false, gb_per_s), full.host_ms,
           decode_shares_blocks(b, d) ? "  contexts share blocks: the pool is too small" : "");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    struct decodes cases[MAX_CASES] = { { 1, 1024 }, { 8, 98304 } };
    int n = argc > 2 ? argc - 2 : 2;
    uint32_t wanted = 0;
    struct decode_bench b = { 0 };

    bool usable = argc > 1 && n <= MAX_CASES;
    for (int i = 0; i < argc - 2 && usable; i++)
        usable = parse_case(argv[i + 2], &cases[i]);
    if (!usable) {
        fprintf(stderr, "usage: bench-gpu-step DIR [batch:context ...], batches up to %d\n",
                DECODE_MAX_SEQS);
        return 1;
    }
    if (!gpu_bench_open())
        return 1;
    double gb_per_s = memory_rate();
    decode_open(&b, argv[1]);
    decode_prepare(&b);
    for (int i = 0; i < n; i++) {
        uint32_t blocks = decode_pool_blocks(&cases[i]);
        wanted = blocks > wanted ? blocks : wanted;
    }
    decode_open_pool(&b, wanted, false);
    printf("memory is read at %.0f GB/s; %.2f GB of weights a step; the pool holds %llu tokens\n"
           "                 sparse                       full\n"
           " batch   tokens       ms    floor     host        ms    floor     host\n",
           gb_per_s, decode_weight_bytes(&b, 1) * 1e-9,
           (unsigned long long)b.blocks * BLOCK_TOKENS);
    for (int i = 0; i < n; i++)
        report(&b, &cases[i], gb_per_s);
    decode_close(&b);
    return 0;
}
