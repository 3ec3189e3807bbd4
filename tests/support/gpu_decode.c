#include "tests/support/gpu_decode.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/gpu_compare.h"
#include "tests/support/gpu_fixture.h"
#include "tests/support/kernel_reference.h"

void gpu_decode_init(struct decode_fixture *d, const struct decode_setup *s, int max_blocks,
                     uint64_t seed)
{
    decode_init(d, s, max_blocks, seed);
    mem_free(d->q);
    d->q = random_acts(&d->r, d->n_q, 1);
    if (!d->shape.latent_dim)
        random_channels(&d->r, d->channels, &d->shape);
}

void gpu_decode_start(struct decode_fixture *d, int most, int more)
{
    struct backend *cpu = test_backend("auto");
    struct stream *stream = stream_create(cpu);

    for (int i = 0; i < d->s.seqs; i++) {
        d->n_tokens[i] = i % 7 == 5 ? 0 : i == 0 ? most : 1 + random_below(&d->r, most);
        if (d->n_tokens[i] > 0)
            decode_store(d, cpu, stream, i, 0, d->n_tokens[i] + more);
    }
    stream_destroy(stream);
}

void gpu_decode_queries(struct decode_fixture *d, bool first)
{
    float *by = random_acts(&d->r, d->n_q, 1);

    if (!first)
        decode_drift(d, by);
    round_to_bf16(d->q, d->n_q);
    mem_free(by);
}

struct attend_two_level_args gpu_decode_args(const struct decode_fixture *d)
{
    struct attend_two_level_args a = decode_args(d);

    a.q = NULL;
    a.n_tokens = NULL;
    a.max_n_tokens = 0;
    a.kv = gpu_put(d->kv, d->kv_bytes);
    a.index = gpu_put(d->index, d->index_bytes);
    a.kv_table = a.index_table = gpu_put(d->table, (size_t)d->n_blocks * sizeof *d->table);
    a.channels = gpu_put(d->channels, sizeof d->channels);
    a.scratch = gpu_put(NULL, decode_scratch_bytes(d, gpu_ops()));
    return a;
}
