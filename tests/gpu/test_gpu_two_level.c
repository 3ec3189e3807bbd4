/* Both levels on the GPU against the CPU back end, over the same pool. */

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/gpu_compare.h"
#include "tests/support/gpu_fixture.h"
#include "tests/support/kernel_reference.h"
#include "tests/support/random_data.h"
#include "tests/support/token_store.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_SEQS = 8 };

struct setup {
    struct kv_shape shape;
    int heads, seqs, max_blocks, pool_blocks;
    int keep_blocks, keep_tokens, sinks, recent;
    float scale;
    int32_t n_tokens[MAX_SEQS];
};

struct problem {
    struct setup s;
    float *q, *out;              /* [seqs, heads * head_dim] */
    bf16 *kv;
    uint8_t *index;
    int32_t *table;
    int16_t *channels;
    void *scratch;
    size_t q_floats, kv_bytes, index_bytes, table_ints, scratch_bytes;
};

/* Keys and values of one sequence through the CPU's rope_store, without rotation. */
static void store_sequence(struct problem *p, int seq, struct test_random *r)
{
    const struct setup *s = &p->s;
    struct backend *cpu = test_backend("auto");
    struct stream *stream = stream_create(cpu);

    store_random_tokens(cpu, stream, &(struct token_store){
        .kv = p->kv, .index = p->index, .table = p->table + seq * s->max_blocks,
        .channels = p->channels, .shape = s->shape, .heads = s->heads,
        .n = s->n_tokens[seq] }, r);
    stream_destroy(stream);
}

/* Blocks lie scattered, from both ends of the pool by turns. */
static void scatter_blocks(struct problem *p)
{
    const struct setup *s = &p->s;
    int used = 0;

    for (int i = 0; i < s->seqs; i++)
        for (int b = 0; b < s->max_blocks; b++) {
            int32_t *entry = &p->table[i * s->max_blocks + b];
            *entry = 0;
            if (b < blocks_of(s->n_tokens[i])) {
                *entry = used % 2 ? s->pool_blocks - 1 - used / 2 : used / 2;
                used++;
            }
        }
    ck_assert_int_le(used, s->pool_blocks);
}

static size_t scratch_of(const struct backend_ops *ops, const struct setup *s)
{
    return ops->attend_two_level_scratch(&s->shape, s->seqs, s->heads, s->max_blocks,
                                         s->keep_blocks, s->keep_tokens);
}

static void make_problem(struct problem *p, const struct setup *s, uint64_t seed)
{
    struct test_random r = test_random(seed);
    int dim = s->shape.head_dim, n_channels = s->shape.kv_heads * INDEX_CHANNELS_KEPT;

    memset(p, 0, sizeof *p);
    p->s = *s;
    p->q_floats = (size_t)(s->seqs * s->heads * dim);
    p->q = mem_alloc(p->q_floats * sizeof *p->q);
    p->out = mem_alloc(p->q_floats * sizeof *p->out);
    random_floats(&r, p->q, p->q_floats, 1);
    round_to_bf16(p->q, p->q_floats);
    p->kv_bytes = (size_t)s->pool_blocks * kv_block_bytes(&s->shape);
    p->index_bytes = (size_t)s->pool_blocks * index_block_bytes(&s->shape);
    p->kv = mem_alloc(p->kv_bytes);
    p->index = mem_alloc(p->index_bytes);
    memset(p->kv, 0xff, p->kv_bytes);        /* stale memory: NaN everywhere */
    memset(p->index, 0xff, p->index_bytes);
    p->table_ints = (size_t)(s->seqs * s->max_blocks);
    p->table = mem_alloc(p->table_ints * sizeof *p->table);
    scatter_blocks(p);
    p->channels = mem_alloc((size_t)n_channels * sizeof *p->channels);
    for (int i = 0; i < n_channels; i++)
        p->channels[i] = (int16_t)(i % INDEX_CHANNELS_KEPT * (dim / INDEX_CHANNELS_KEPT));
    for (int i = 0; i < s->seqs; i++)
        if (s->n_tokens[i] > 0)
            store_sequence(p, i, &r);
    size_t cpu = scratch_of(backend_ops(test_backend("auto")), s);
    size_t gpu = scratch_of(gpu_ops(), s);
    p->scratch_bytes = cpu > gpu ? cpu : gpu;
    p->scratch = mem_alloc(p->scratch_bytes);
}

static void free_problem(struct problem *p)
{
    mem_free(p->q);
    mem_free(p->out);
    mem_free(p->kv);
    mem_free(p->index);
    mem_free(p->table);
    mem_free(p->channels);
    mem_free(p->scratch);
}

static struct attend_two_level_args arguments(const struct problem *p)
{
    const struct setup *s = &p->s;
    int longest = 1;

    for (int i = 0; i < s->seqs; i++)
        longest = s->n_tokens[i] > longest ? s->n_tokens[i] : longest;
    return (struct attend_two_level_args){
        .out = p->out, .q = p->q, .q_stride = s->heads * s->shape.head_dim, .kv = p->kv,
        .index = p->index, .kv_table = p->table, .index_table = p->table,
        .n_tokens = p->s.n_tokens, .channels = p->channels, .scratch = p->scratch,
        .shape = s->shape, .seqs = s->seqs, .heads = s->heads, .max_blocks = s->max_blocks,
        .keep_blocks = s->keep_blocks, .keep_tokens = s->keep_tokens, .sink_tokens = s->sinks,
        .recent_tokens = s->recent, .max_n_tokens = longest,
        .scale = s->scale > 0 ? s->scale : 1e-6f };
}

/* lists: wanted, or NULL. */
static void run_cpu(struct problem *p, const struct selected_lists *lists)
{
    struct attend_two_level_args a = arguments(p);
    struct stream *stream = stream_create(test_backend("auto"));

    a.lists = lists;
    backend_ops(test_backend("auto"))->attend_two_level(stream, &a);
    stream_destroy(stream);
}

/* Parts of lists, in the order of the struct's. */
enum { LIST_PARTS = 4 };

static int32_t **list_part(struct selected_lists *l, int part)
{
    int32_t **parts[LIST_PARTS] = { &l->kept, &l->n_kept, &l->chosen, &l->n_chosen };

    return parts[part];
}

static size_t list_part_bytes(const struct setup *s, int part)
{
    const int widths[LIST_PARTS] = { s->keep_blocks, 1, s->keep_tokens, 1 };

    return (size_t)(s->seqs * s->shape.kv_heads * widths[part]) * sizeof(int32_t);
}

/* lists: in host memory, wanted, or NULL. */
static void run_gpu(struct problem *p, float *out, struct selected_lists *lists)
{
    const struct setup *s = &p->s;
    struct attend_two_level_args a = arguments(p);
    size_t n_channels = (size_t)(s->shape.kv_heads * INDEX_CHANNELS_KEPT);
    struct selected_lists device;

    for (int i = 0; lists && i < LIST_PARTS; i++)
        *list_part(&device, i) = gpu_put(NULL, list_part_bytes(s, i));
    a.lists = lists ? &device : NULL;

    a.out = gpu_put(NULL, p->q_floats * sizeof(bf16));
    a.q = gpu_put_act(p->q, p->q_floats);
    a.kv = gpu_put(p->kv, p->kv_bytes);
    a.index = gpu_put(p->index, p->index_bytes);
    a.kv_table = a.index_table = gpu_put(p->table, p->table_ints * sizeof *p->table);
    a.n_tokens = gpu_put(s->n_tokens, (size_t)s->seqs * sizeof *s->n_tokens);
    a.channels = gpu_put(p->channels, n_channels * sizeof *p->channels);
    a.scratch = gpu_put(NULL, p->scratch_bytes);
    gpu_ops()->attend_two_level(gpu_stream(), &a);
    gpu_get_act(out, a.out, p->q_floats);
    for (int i = 0; lists && i < LIST_PARTS; i++)
        gpu_get(*list_part(lists, i), *list_part(&device, i), list_part_bytes(s, i));
    gpu_forget();
}

/* The largest difference of a KV head's outputs in one sequence. */
static float difference(const struct setup *s, const float *got, const float *want, int list)
{
    int n = s->heads / s->shape.kv_heads * kv_value_dim(&s->shape);

    return largest_difference(got + list * n, want + list * n, (size_t)n);
}

/* With next to no scale the output is the mean of the values chosen: one token that differs moves
 * it by about 1 / keep_tokens, far more than rounding, so this shows exactly which lists
 * agree.  Scores are equal within 1e-4 only, so now and then the border falls between two
 * scores that are closer, and a token or a block of them is another one: a list may differ, by no
 * more than that.  tolerance is absolute. */
static void compare(const char *name, const struct setup *s, float tolerance, uint64_t seed)
{
    struct problem p;
    int n_lists = 0, n_off = 0;
    float worst = 0;

    make_problem(&p, s, seed);
    float *got = mem_alloc(p.q_floats * sizeof *got);
    run_cpu(&p, NULL);
    run_gpu(&p, got, NULL);
    for (int list = 0; list < s->seqs * s->shape.kv_heads; list++) {
        if (s->n_tokens[list / s->shape.kv_heads] == 0)
            continue;
        float off = difference(s, got, p.out, list);
        n_lists++;
        n_off += !(off <= tolerance);
        if (off > worst || isnan(off))
            worst = off;
        if (!(off <= tolerance))
            printf("  sequence %d of %d tokens, KV head %d: %g off\n", list / s->shape.kv_heads,
                   s->n_tokens[list / s->shape.kv_heads], list % s->shape.kv_heads,
                   (double)off);
    }
    printf("%s: heads %d on %d of %d, %d sequences: %g off, %d of %d lists\n", name, s->heads,
           s->shape.kv_heads, s->shape.head_dim, s->seqs, (double)worst, n_off, n_lists);
    if (n_off > 1 + n_lists / 32 || !(worst <= 0.1f))
        ck_abort_msg("%s: heads %d on %d of %d, %d sequences: %d of %d lists differ, by up to %g",
                     name, s->heads, s->shape.kv_heads, s->shape.head_dim, s->seqs, n_off,
                     n_lists, (double)worst);
    mem_free(got);
    free_problem(&p);
}

static const int groups[] = { 1, 2, 3, 4, 5, 7, 8, 16 };
enum { N_GROUPS = sizeof groups / sizeof groups[0] };

/* What there are fused kernels for. */
static const int fused_kinds[] = { 0, TEST_MEANS };
enum { N_FUSED_KINDS = sizeof fused_kinds / sizeof fused_kinds[0] };

static struct setup base_setup(int group, int kv_heads, int head_dim, int kind)
{
    return (struct setup){
        .shape = test_kv_shape(kv_heads, head_dim, kind),
        .heads = kv_heads * group, .keep_blocks = 16, .keep_tokens = 256, .sinks = 4,
        .recent = 64,
    };
}

START_TEST(shapes)
{
    if (!gpu_backend())
        return;
    for (int dim = 64; dim <= 128; dim *= 2)
        for (int i = 0; i < 2 * N_FUSED_KINDS; i++) {
            struct setup s = base_setup(groups[_i], 2, dim, fused_kinds[i / 2]);
            bool uniform = i % 2;
            s.seqs = 2;
            s.n_tokens[0] = 3000;
            s.n_tokens[1] = 1111;
            s.max_blocks = 50;
            s.pool_blocks = 80;
            s.scale = uniform ? 1e-6f : 1 / sqrtf((float)dim);
            compare(uniform ? "uniform" : "softmax", &s, uniform ? 6e-4f : 8e-3f, 1);
        }
}
END_TEST

/* Lengths around every border, in one batch with padding. */
START_TEST(lengths)
{
    static const int32_t tables[][MAX_SEQS] = {
        { 1, 2, 63, 64, 65, 0, 127, 128 },
        { 255, 256, 257, 300, 0, 1023, 1024, 1025 },
        { 0, 0, 5000, 0, 1, 70, 0, 4096 },
    };

    if (!gpu_backend())
        return;
    for (int kind = 0; kind < N_FUSED_KINDS; kind++) {
        struct setup s = base_setup(4, 2, 128, fused_kinds[kind]);
        s.seqs = MAX_SEQS;
        memcpy(s.n_tokens, tables[_i], sizeof s.n_tokens);
        s.max_blocks = 80;
        s.pool_blocks = 200;
        compare("uniform", &s, 6e-3f, 2); /* short lists: bf16 rounds outputs near 1 */
        s.scale = 0.09f;
        compare("softmax", &s, 1.5e-2f, 3);
    }
}
END_TEST

/* One long context, as large as the cluster gets; budgets of the first configuration. */
START_TEST(long_context)
{
    if (!gpu_backend())
        return;
    struct setup s = base_setup(4, _i == 1 ? 8 : 2, 128, _i == 2 ? TEST_MEANS : 0);
    s.seqs = 1;
    s.n_tokens[0] = 33333;
    s.max_blocks = 1024;
    s.pool_blocks = 600;
    s.keep_blocks = 64;
    s.keep_tokens = 1024;
    compare("uniform", &s, 3e-4f, 4);
    s.scale = 0.3f;
    compare("softmax", &s, 3e-2f, 5);
}
END_TEST

/* Every kind of filter and index, by way of the three operations where need be. */
START_TEST(kinds)
{
    if (!gpu_backend())
        return;
    for (int dim = 64; dim <= 128; dim *= 2) {
        struct setup s = base_setup(4, 2, dim, test_kinds[_i]);
        s.seqs = 2;
        s.n_tokens[0] = 2500;
        s.n_tokens[1] = 700;
        s.max_blocks = 41;
        s.pool_blocks = 60;
        compare("uniform", &s, 6e-4f, 6);
    }
}
END_TEST

/* No token is recent: of the newest block it is its means that decide, and one that is not full is
 * kept because it has none.  Of 16 heads on one there is no fused kernel. */
START_TEST(nothing_is_recent)
{
    static const struct { int group, kv_heads, dim; } heads[] = {
        { 4, 2, 64 }, { 7, 2, 128 }, { 16, 1, 128 }, { 20, 1, LATENT_ROW },
    };
    static const int32_t n_tokens[MAX_SEQS] = { 1, 63, 64, 65, 0, 1000, 1023, 1024 };

    if (!gpu_backend())
        return;
    for (int kind = 0; kind < N_FUSED_KINDS; kind++) {
        struct setup s = base_setup(heads[_i].group, heads[_i].kv_heads, heads[_i].dim,
                                    fused_kinds[kind]);
        s.seqs = MAX_SEQS;
        memcpy(s.n_tokens, n_tokens, sizeof s.n_tokens);
        s.max_blocks = 20;
        s.pool_blocks = 60;
        s.keep_blocks = 3;
        s.keep_tokens = 150;
        s.sinks = s.recent = 0;
        compare("nothing is recent", &s, 6e-3f, 30 + (uint64_t)_i);
    }
}
END_TEST

/* The smallest budgets, and such at and above the context. */
START_TEST(budgets)
{
    static const int keep[][2] = { { 1, 64 }, { 3, 100 }, { 47, 3008 }, { 64, 4096 } };

    if (!gpu_backend())
        return;
    for (int kind = 0; kind < N_FUSED_KINDS; kind++) {
        struct setup s = base_setup(2, 2, 128, fused_kinds[kind]);
        s.seqs = 1;
        s.n_tokens[0] = 3000;
        s.max_blocks = 47;
        s.pool_blocks = 60;
        s.keep_blocks = keep[_i][0];
        s.keep_tokens = keep[_i][1];
        s.sinks = _i ? 4 : 0;
        s.recent = _i ? 64 : 1;
        compare("uniform", &s, 3e-3f, 7);
    }
}
END_TEST

/* Latent rows: numbers of heads; every kind of filter; lengths; the first configuration's budgets;
 * more sequences than there is room for large clusters. */
START_TEST(latent_rows)
{
    static const int heads[] = { 20, 1, 5, 24, 8, 20, 20 };
    static const int32_t n_tokens[][MAX_SEQS] = {
        { 3000, 1111 }, { 3000, 1111 }, { 1, 2, 63, 64, 65, 0, 127, 128 },
        { 255, 256, 257, 300, 0, 1023, 1024, 1025 }, { 33333 }, { 33333, 5000, 0, 20000 },
        { 2500, 700 },
    };

    if (!gpu_backend())
        return;
    for (int kind = 0; kind < TEST_ROTATED_KINDS; kind++) {
        struct setup s = base_setup(heads[_i], 1, LATENT_ROW, test_rotated_kinds[kind]);
        memcpy(s.n_tokens, n_tokens[_i], sizeof s.n_tokens);
        for (int i = 0; i < MAX_SEQS; i++) {
            s.seqs = s.n_tokens[i] > 0 ? i + 1 : s.seqs;
            s.pool_blocks += blocks_of(s.n_tokens[i]);
            if (s.max_blocks < blocks_of(s.n_tokens[i]) + 2)
                s.max_blocks = blocks_of(s.n_tokens[i]) + 2;
        }
        if (_i == 4 || _i == 5) {
            s.keep_blocks = 64;
            s.keep_tokens = 1024;
        }
        if (_i == 6) {           /* budgets for which there is no fused kernel */
            s.keep_blocks = 128;
            s.keep_tokens = 6000;
        }
        compare("uniform", &s, 6e-3f, 40 + (uint64_t)_i);
        s.scale = 1 / 16.0f;
        compare("softmax", &s, 3e-2f, 50 + (uint64_t)_i);
    }
}
END_TEST

static int common(const int32_t *a, int n_a, const int32_t *b, int n_b)
{
    int n = 0;

    for (int i = 0, j = 0; i < n_a && j < n_b;) {
        n += a[i] == b[j];
        int step_a = a[i] <= b[j], step_b = b[j] <= a[i];
        i += step_a;
        j += step_b;
    }
    return n;
}

/* Also where kernels are fused there are lists for whoever wants them: the CPU's, but for what
 * lies at borders, as above, and as many. */
START_TEST(lists_are_given)
{
    struct problem p;
    struct selected_lists want, got;
    int n_common = 0, n_all = 0;

    if (!gpu_backend())
        return;
    int shape = _i % 3;
    struct setup s = base_setup(shape == 2 ? 20 : 4, shape == 2 ? 1 : 2,
                                shape == 2 ? LATENT_ROW : 64 << shape, fused_kinds[_i / 3]);
    s.seqs = 2;
    s.n_tokens[0] = 3000;
    s.n_tokens[1] = 1111;
    s.max_blocks = 50;
    s.pool_blocks = 80;
    s.scale = 0.09f;
    make_problem(&p, &s, 60);
    float *out = mem_alloc(p.q_floats * sizeof *out);
    for (int i = 0; i < LIST_PARTS; i++) {
        *list_part(&want, i) = mem_alloc(list_part_bytes(&s, i));
        *list_part(&got, i) = mem_alloc(list_part_bytes(&s, i));
    }
    run_cpu(&p, &want);
    run_gpu(&p, out, &got);
    for (int list = 0; list < s.seqs * s.shape.kv_heads; list++) {
        ck_assert_int_eq(got.n_kept[list], want.n_kept[list]);
        ck_assert_int_eq(got.n_chosen[list], want.n_chosen[list]);
        n_common += common(got.kept + list * s.keep_blocks, got.n_kept[list],
                           want.kept + list * s.keep_blocks, want.n_kept[list]);
        n_common += common(got.chosen + list * s.keep_tokens, got.n_chosen[list],
                           want.chosen + list * s.keep_tokens, want.n_chosen[list]);
        n_all += want.n_kept[list] + want.n_chosen[list];
        ck_assert_float_le(difference(&s, out, p.out, list), 3e-2f);
    }
    printf("lists: %d of %d as on the CPU\n", n_common, n_all);
    ck_assert_int_ge(n_common, n_all - n_all / 50);
    for (int i = 0; i < LIST_PARTS; i++) {
        mem_free(*list_part(&want, i));
        mem_free(*list_part(&got, i));
    }
    mem_free(out);
    free_problem(&p);
}
END_TEST

START_TEST(means_need_the_rotated_index)
{
    struct error why = { 0 };

    if (!gpu_backend())
        return;
    for (int dim = 64; dim <= LATENT_ROW; dim += LATENT_ROW - 64) {
        struct shape_query q = { .dim = 1024, .mlp_dim = 2048, .heads = 4, .vocab = 1000 };
        q.kv = test_kv_shape(1, dim, TEST_MEANS);
        ck_assert_msg(gpu_ops()->supports(&q, &why), "%s", why.text);
        q.kv.index = INDEX_CHANNELS;
        ck_assert(!gpu_ops()->supports(&q, &why));
        ck_assert_str_eq(why.text, "filter means needs token-index rotated");
    }
}
END_TEST

TCase *gpu_two_level_case(void)
{
    TCase *c = tcase_create("gpu_two_level");

    tcase_set_timeout(c, 120);
    tcase_add_loop_test(c, shapes, 0, N_GROUPS);
    tcase_add_loop_test(c, lengths, 0, 3);
    tcase_add_loop_test(c, long_context, 0, 3);
    tcase_add_loop_test(c, kinds, 0, TEST_KINDS);
    tcase_add_loop_test(c, nothing_is_recent, 0, 4);
    tcase_add_loop_test(c, budgets, 0, 4);
    tcase_add_loop_test(c, latent_rows, 0, 7);
    tcase_add_loop_test(c, lists_are_given, 0, 3 * N_FUSED_KINDS);
    tcase_add_test(c, means_need_the_rotated_index);
    return c;
}
