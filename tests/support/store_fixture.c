#include "tests/support/store_fixture.h"

#include "engine/base/mem.h"
#include "tests/support/closeness.h"
#include "tests/support/kernel_reference.h"

#include <check.h>
#include <math.h>
#include <string.h>

enum { PATTERN = 0xa5, SPARE_BLOCKS = 3 };

const int store_lengths[STORE_SEQS] = { 1, 64, 65, 200, 131 };

void store_init(struct store_fixture *f, const struct kv_shape *shape, int heads)
{
    *f = (struct store_fixture){ .shape = *shape, .heads = heads,
                                 .rows = store_first_row(STORE_SEQS),
                                 .pool_blocks = SPARE_BLOCKS };
    for (int i = 0; i < STORE_SEQS; i++)
        f->pool_blocks += blocks_of(store_lengths[i]);
    f->positions = mem_alloc((size_t)f->rows * sizeof *f->positions);
    f->kv_block = mem_alloc((size_t)f->rows * sizeof *f->kv_block);
    f->index_block = mem_alloc((size_t)f->rows * sizeof *f->index_block);
}

void store_fini(struct store_fixture *f)
{
    mem_free(f->positions);
    mem_free(f->kv_block);
    mem_free(f->index_block);
}

void store_place_rows(struct store_fixture *f, struct test_random *r)
{
    int32_t *kv_ids = mem_alloc((size_t)f->pool_blocks * sizeof *kv_ids);
    int32_t *index_ids = mem_alloc((size_t)f->pool_blocks * sizeof *index_ids);
    int used = 0;

    random_order(r, kv_ids, f->pool_blocks);
    random_order(r, index_ids, f->pool_blocks);
    for (int seq = 0; seq < STORE_SEQS; seq++) {
        for (int p = 0; p < store_lengths[seq]; p++) {
            int row = store_first_row(seq) + p;
            f->positions[row] = p;
            f->kv_block[row] = kv_ids[used + p / BLOCK_TOKENS];
            f->index_block[row] = index_ids[used + p / BLOCK_TOKENS];
        }
        used += blocks_of(store_lengths[seq]);
    }
    mem_free(kv_ids);
    mem_free(index_ids);
}

int store_first_row(int seq)
{
    int row = 0;

    for (int i = 0; i < seq; i++)
        row += store_lengths[i];
    return row;
}

size_t store_q_width(const struct store_fixture *f)
{
    return (size_t)(f->heads * f->shape.head_dim);
}

float *store_angles(const struct store_fixture *f, int rotated, struct test_random *r)
{
    float *cos_sin = mem_alloc((size_t)(f->rows * rotated) * sizeof *cos_sin);

    for (int i = 0; i < f->rows * rotated; i++) {
        double angle = (double)random_uniform(r) * 4;
        cos_sin[i] = (float)(i % rotated < rotated / 2 ? cos(angle) : sin(angle));
    }
    return cos_sin;
}

static size_t kv_bytes(const struct store_fixture *f)
{
    return (size_t)f->pool_blocks * kv_block_bytes(&f->shape);
}

static size_t index_bytes(const struct store_fixture *f)
{
    return (size_t)f->pool_blocks * index_block_bytes(&f->shape);
}

struct stored store_new(const struct store_fixture *f, float q)
{
    size_t n_q = (size_t)f->rows * store_q_width(f);
    struct stored d = {
        .kv = mem_alloc(kv_bytes(f)),
        .index = mem_alloc(index_bytes(f)),
        .q = mem_alloc(n_q * sizeof *d.q),
    };

    memset(d.kv, PATTERN, kv_bytes(f));
    memset(d.index, PATTERN, index_bytes(f));
    for (size_t i = 0; i < n_q; i++)
        d.q[i] = q;
    return d;
}

void store_free(struct stored *d)
{
    mem_free(d->kv);
    mem_free(d->index);
    mem_free(d->q);
}

int store_pick(int *picked, int next[STORE_SEQS], const int chunk[STORE_SEQS], int padding)
{
    int n = 0;
    bool any = false;

    for (int seq = 0; seq < STORE_SEQS; seq++) {
        for (int i = 0; i < chunk[seq] && next[seq] < store_lengths[seq]; i++) {
            picked[n++] = store_first_row(seq) + next[seq]++;
            any = true;
        }
        for (int i = 0; i < padding; i++)
            picked[n++] = STORE_NO_ROW;
    }
    return any ? n : 0;
}

float *store_gather(const float *from, const int *picked, int n, size_t width)
{
    float *to = nan_alloc((size_t)n * width * sizeof *to);

    for (int i = 0; i < n; i++)
        if (picked[i] != STORE_NO_ROW)
            memcpy(to + (size_t)i * width, from + (size_t)picked[i] * width, width * sizeof *to);
    return to;
}

int32_t *store_gather_ints(const int32_t *from, const int *picked, int n, int32_t padding)
{
    int32_t *to = mem_alloc((size_t)n * sizeof *to);

    for (int i = 0; i < n; i++)
        to[i] = picked[i] == STORE_NO_ROW ? padding : from[picked[i]];
    return to;
}

int store_channel_off(const bf16 *got, const double *want, int n)
{
    double most = 0;

    for (int i = 0; i < n; i++)
        most = fmax(most, fabs(want[i]));
    for (int i = 0; i < n; i++) {
        float low = bf16_value(nearest_bf16((float)(want[i] - 1e-5 * most)));
        float high = bf16_value(nearest_bf16((float)(want[i] + 1e-5 * most)));
        if (!(bf16_value(got[i]) >= low && bf16_value(got[i]) <= high))
            return i;
    }
    return -1;
}

void store_assert_same(const struct store_fixture *f, const struct stored *got,
                       const struct stored *want, const char *what)
{
    if (memcmp(got->kv, want->kv, kv_bytes(f)) != 0)
        ck_abort_msg("%s: stored rows differ", what);
    if (memcmp(got->index, want->index, index_bytes(f)) != 0)
        ck_abort_msg("%s: the index differs", what);
    ck_assert(floats_identical(what, got->q, want->q, (size_t)f->rows * store_q_width(f)));
}

void store_assert_pools(const struct store_fixture *f, const struct stored *got,
                        const struct stored *want)
{
    size_t record = (size_t)index_layout(&f->shape).record_bytes;

    if (memcmp(got->kv, want->kv, kv_bytes(f)) != 0)
        ck_abort_msg("head dimension %d: values, or bytes that were nobody's", f->shape.head_dim);
    for (size_t i = 0; i < index_bytes(f); i++)
        if (got->index[i] != want->index[i])
            ck_abort_msg("head dimension %d, filter %d, index %d: byte %zu of record %zu is "
                         "%02x, not %02x", f->shape.head_dim, f->shape.filter, f->shape.index,
                         i % record, i / record, got->index[i], want->index[i]);
}
