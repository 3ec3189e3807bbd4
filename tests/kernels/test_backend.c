#include "kernels/backend.h"

#include "kernels/cpu/cpu.h"
#include "kernels/ops.h"
#include "tests/support/backend_fixture.h"

#include <check.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static void assert_refused(const char *name, const struct backend_options *options,
                           enum status want, const char *sentence)
{
    struct backend *be = (struct backend *)&be;
    struct error err = { 0 };

    ck_assert_int_eq(backend_open(&be, name, options, &err), want);
    ck_assert_ptr_null(be);
    ck_assert_int_eq(err.code, want);
    ck_assert_msg(strstr(err.text, sentence), "'%s' lacks '%s'", err.text, sentence);
}

START_TEST(refuses_with_a_sentence)
{
    struct backend_options sse = { .isa = "sse9" }, many = { .threads = 100000 },
                           negative = { .threads = -1 };

    assert_refused("tpu", NULL, ST_INVALID, "'tpu'");
    assert_refused("", NULL, ST_INVALID, "cpu or cuda:N");
    assert_refused("cuda:", NULL, ST_INVALID, "cuda:0");
    assert_refused("cuda:-1", NULL, ST_INVALID, "cuda:0");
    assert_refused("cuda:1x", NULL, ST_INVALID, "cuda:0");
    assert_refused("cpu", &sse, ST_INVALID, "'sse9'");
    assert_refused("cpu", &many, ST_INVALID, "100000 threads");
    assert_refused("cpu", &negative, ST_INVALID, "-1 threads");
}
END_TEST

START_TEST(describes_the_cpu)
{
    struct backend_options options = { .threads = 3, .isa = "scalar" };
    struct backend *be;

    ck_assert_int_eq(backend_open(&be, "cpu", &options, NULL), ST_OK);
    const struct device_info *info = backend_info(be);
    ck_assert_str_eq(info->name, "cpu: 3 threads, scalar");
    ck_assert_uint_gt(info->mem_bytes, 1 << 20);
    ck_assert_int_eq(info->sm_count, 0);
    ck_assert(info->host_visible);
    ck_assert_int_eq(info->act, DTYPE_F32);
    backend_close(be);
    backend_close(NULL);

    ck_assert_int_eq(backend_open(&be, "cpu", NULL, NULL), ST_OK);
    ck_assert_int_ge(workers_count(be->workers), 1);
    backend_close(be);
}
END_TEST

START_TEST(has_every_operation)
{
    const struct backend_ops *ops = backend_ops(test_backend("scalar"));
    void (*entries[sizeof *ops / sizeof(void (*)(void))])(void);

    ck_assert_uint_eq(sizeof entries, sizeof *ops);
    memcpy(entries, ops, sizeof entries);
    for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++)
        ck_assert_msg(entries[i] != NULL, "entry %zu", i);
}
END_TEST

START_TEST(refuses_shapes_at_load)
{
    const struct shape_query good = {
        .dim = 576, .mlp_dim = 1536, .heads = 9, .vocab = 49152,
        .kv = { .kv_heads = 3, .head_dim = 64 },
    };
    const struct backend_ops *ops = backend_ops(test_backend("scalar"));
    struct shape_query q = good;
    struct error why = { 0 };

    ck_assert(ops->supports(&q, &why));
    ck_assert(ops->supports(&q, NULL));
    q.heads = 10;
    ck_assert(!ops->supports(&q, &why));
    ck_assert_ptr_nonnull(strstr(why.text, "10 query heads"));
    q = good;
    q.kv.head_dim = 80;
    ck_assert(!ops->supports(&q, &why));
    ck_assert_ptr_nonnull(strstr(why.text, "head dimension 80"));
    q = good;
    q.kv.head_dim = 512;
    ck_assert(!ops->supports(&q, NULL));
    q = good;
    q.vocab = 0;
    ck_assert(!ops->supports(&q, &why));
    q = good;
    q.kv = (struct kv_shape){ .kv_heads = 3, .head_dim = 16, .index = INDEX_CHANNELS };
    ck_assert(!ops->supports(&q, &why));
    q.kv = (struct kv_shape){ .kv_heads = 3, .head_dim = 64, .filter = FILTER_MEANS };
    ck_assert(ops->supports(&q, &why));
    q.kv.index = INDEX_CHANNELS;
    ck_assert(!ops->supports(&q, &why));
    ck_assert_str_eq(why.text, "filter means needs token-index rotated");
}
END_TEST

START_TEST(refuses_latent_shapes_at_load)
{
    static const struct { struct kv_shape kv; const char *sentence; } shapes[] = {
        { { .kv_heads = 1, .head_dim = 576, .latent_dim = 512 }, NULL },
        { { .kv_heads = 1, .head_dim = 32, .latent_dim = 16, .filter = FILTER_BOUNDS }, NULL },
        { { .kv_heads = 1, .head_dim = 1024, .latent_dim = 512 }, NULL },
        { { .kv_heads = 2, .head_dim = 576, .latent_dim = 512 }, "2 KV heads" },
        { { .kv_heads = 1, .head_dim = 576, .latent_dim = 512, .index = INDEX_CHANNELS },
          "token index" },
        { { .kv_heads = 1, .head_dim = 512, .latent_dim = 512 }, "512 and 0 channels" },
        { { .kv_heads = 1, .head_dim = 560, .latent_dim = 512 }, "512 and 48 channels" },
        { { .kv_heads = 1, .head_dim = 1088, .latent_dim = 1024 }, "1024 and 64 channels" },
        { { .kv_heads = 1, .head_dim = 72, .latent_dim = 8 }, "8 and 64 channels" },
    };
    struct shape_query q = { .dim = 2048, .mlp_dim = 10240, .heads = 20, .vocab = 154880 };

    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        struct error why = { 0 };
        q.kv = shapes[i].kv;
        ck_assert(backend_ops(test_backend("scalar"))->supports(&q, &why) ==
                  !shapes[i].sentence);
        ck_assert_msg(!shapes[i].sentence || strstr(why.text, shapes[i].sentence), "'%s'",
                      why.text);
    }
}
END_TEST

START_TEST(buffers_are_zeroed_and_aligned)
{
    static const size_t sizes[] = { 1, 4096, 3 << 20 };
    struct backend *be = test_backend("scalar");
    struct buffer buf;

    for (int i = 0; i < 6; i++) {
        enum memory_kind kind = i % 2 ? MEM_PINNED : MEM_DEVICE;
        size_t bytes = sizes[i / 2];
        ck_assert_int_eq(buffer_alloc(be, &buf, kind, bytes), ST_OK);
        ck_assert_uint_eq((uintptr_t)buf.base % 256, 0);
        ck_assert_uint_eq(buf.bytes, bytes);
        ck_assert_int_eq(buf.kind, kind);
        for (size_t b = 0; b < bytes; b++)
            if (((char *)buf.base)[b] != 0)
                ck_abort_msg("byte %zu is not zero", b);
        buffer_free(be, &buf);
        ck_assert_ptr_null(buf.base);
        buffer_free(be, &buf);
    }
    ck_assert_int_eq(buffer_alloc(be, &buf, MEM_DEVICE, 0), ST_OK);
    ck_assert_ptr_null(buf.base);
    ck_assert_int_eq(buffer_alloc(be, &buf, MEM_DEVICE, SIZE_MAX / 4), ST_NODEVMEM);
    ck_assert_ptr_null(buf.base);
    buffer_free(be, &buf);
}
END_TEST

START_TEST(copies_and_events_keep_order)
{
    struct backend *be = test_backend("scalar");
    struct stream *a = stream_create(be), *b = stream_create(be);
    struct event *ev = event_create(be);
    char from[] = "through two streams", between[sizeof from], to[sizeof from];
    struct error err;

    stream_copy(a, between, from, sizeof from);
    event_record(ev, a);
    event_wait(b, ev);
    stream_copy(b, to, between, sizeof from);
    stream_copy(b, NULL, NULL, 0);
    ck_assert_int_eq(stream_sync(b, &err), ST_OK);
    ck_assert(event_done(ev));
    ck_assert_str_eq(to, from);
    event_destroy(ev);
    event_destroy(NULL);
    stream_destroy(a);
    stream_destroy(b);
    stream_destroy(NULL);
}
END_TEST

START_TEST(pieces_go_where_they_belong)
{
    struct stream *s = stream_create(test_backend("scalar"));
    char to[32], from[] = "abcdefghijklmnop";

    memset(to, '.', sizeof to);
    stream_copy_pieces(s, to, 8, from, 5, 3, 3);
    ck_assert_int_eq(memcmp(to, "abc.....fgh.....klm.............", 32), 0);
    stream_fill(s, to, '-', sizeof to);
    ck_assert_int_eq(memcmp(to, "--------------------------------", 32), 0);
    stream_copy_pieces(s, to, 4, from, 4, 4, 4);         /* neighbours on both sides */
    ck_assert_int_eq(memcmp(to, "abcdefghijklmnop----------------", 32), 0);
    stream_copy_pieces(s, to, 3, from, 0, 2, 4);         /* one piece four times */
    ck_assert_int_eq(memcmp(to, "abcabfabiablmnop", 16), 0);
    stream_copy_pieces(s, NULL, 8, NULL, 8, 4, 0);
    stream_copy_pieces(s, NULL, 8, NULL, 8, 0, 4);
    stream_fill(s, NULL, 1, 0);
    ck_assert_int_eq(stream_failure(s, NULL), ST_OK);
    ck_assert_int_eq(stream_sync(s, NULL), ST_OK);
    stream_destroy(s);
}
END_TEST

START_TEST(any_page_can_be_registered)
{
    struct backend *be = test_backend("scalar");
    struct buffer buf;

    ck_assert_int_eq(buffer_alloc(be, &buf, MEM_PINNED, 3 * 4096), ST_OK);
    ck_assert_int_eq(host_register(be, (char *)buf.base + 4096, 8192, NULL), ST_OK);
    host_unregister(be, (char *)buf.base + 4096);
    buffer_free(be, &buf);
}
END_TEST

/* A stream for copies alone, on a thread of its own, beside one that computes: what is computed is
 * copied, what is copied is computed with, and nothing else is between them. */
enum { TURNS = 200, WIDTH = 256 };

struct copier {
    struct backend *be;
    struct event *computed, *copied;
    atomic_int n_computed, n_copied;
    float out[WIDTH], x[WIDTH];
};

static void *copy_beside(void *arg)
{
    struct copier *c = arg;
    struct stream *s = stream_create(c->be);
    char elsewhere[4096];

    for (int turn = 1; turn <= TURNS; turn++) {
        while (atomic_load(&c->n_computed) < turn)
            stream_fill(s, elsewhere, (uint8_t)turn, sizeof elsewhere);
        event_wait(s, c->computed);
        stream_copy_pieces(s, c->x, 2 * sizeof(float), c->out, 2 * sizeof(float), sizeof(float),
                           WIDTH / 2);
        stream_copy_pieces(s, c->x + 1, 2 * sizeof(float), c->out + 1, 2 * sizeof(float),
                           sizeof(float), WIDTH / 2);
        event_record(c->copied, s);
        atomic_store(&c->n_copied, turn);
    }
    ck_assert_int_eq(stream_sync(s, NULL), ST_OK);
    stream_destroy(s);
    return NULL;
}

START_TEST(copies_beside_a_stream_that_computes)
{
    struct backend *be = test_backend("scalar");
    struct copier c = { .be = be, .computed = event_create(be), .copied = event_create(be) };
    struct stream *s = stream_create(be);
    float *weight = calloc(WIDTH * WIDTH, sizeof *weight);
    pthread_t thread;
    struct linear_args linear = { .out = c.out, .x = c.x, .weight = weight,
                                  .weight_type = DTYPE_F32, .rows = 1, .in_dim = WIDTH,
                                  .out_dim = WIDTH, .out_stride = WIDTH };

    for (int i = 0; i < WIDTH; i++) {
        weight[i * WIDTH + (i + 1) % WIDTH] = 1;         /* turns by one place */
        c.x[i] = (float)i;
    }
    ck_assert_int_eq(pthread_create(&thread, NULL, copy_beside, &c), 0);
    for (int turn = 1; turn <= TURNS; turn++) {
        backend_ops(be)->linear(s, &linear);
        event_record(c.computed, s);
        atomic_store(&c.n_computed, turn);
        while (atomic_load(&c.n_copied) < turn)
            ;
        event_wait(s, c.copied);
    }
    pthread_join(thread, NULL);
    for (int i = 0; i < WIDTH; i++)
        ck_assert_float_eq(c.x[i], (float)((i + TURNS) % WIDTH));
    free(weight);
    stream_destroy(s);
    event_destroy(c.computed);
    event_destroy(c.copied);
}
END_TEST

/* After a failure nothing queued is executed, and the failure is reported. */
START_TEST(errors_stick)
{
    struct backend *be = test_backend("scalar");
    struct stream *s = stream_create(be);
    float out[4] = { 7, 7, 7, 7 }, x[4] = { 1, 2, 3, 4 };
    int32_t id = 0;
    struct error err = { 0 };
    struct embed_args embed = { .out = out, .table = x, .ids = &id, .table_type = DTYPE_F32,
                                .rows = 1, .dim = 4 };
    struct linear_args linear = { .out = out, .x = x, .weight = x, .weight_type = DTYPE_F32,
                                  .rows = 1, .in_dim = 4, .out_dim = 1, .out_stride = 1 };

    s->failed = ST_DEVICE;
    stream_copy(s, out, x, sizeof x);
    stream_copy_pieces(s, out, 8, x, 8, 4, 2);
    stream_fill(s, out, 0, sizeof out);
    ck_assert_int_eq(stream_failure(s, NULL), ST_DEVICE);
    backend_ops(be)->embed(s, &embed);
    backend_ops(be)->linear(s, &linear);
    for (int i = 0; i < 4; i++)
        ck_assert_float_eq(out[i], 7);
    ck_assert_int_eq(stream_sync(s, &err), ST_DEVICE);
    ck_assert_int_eq(err.code, ST_DEVICE);
    stream_destroy(s);
}
END_TEST

START_TEST(scratch_grows_and_stays)
{
    struct stream *s = stream_create(test_backend("scalar"));
    static const size_t sizes[] = { 1, 4096, 5 << 20, 64, 9 << 20 };

    for (int worker = 0; worker < 2; worker++)
        for (int i = 0; i < 5; i++) {
            char *p = cpu_scratch(s, worker, sizes[i]);
            ck_assert_uint_eq((uintptr_t)p % 64, 0);
            memset(p, 1, sizes[i]);
        }
    ck_assert_ptr_ne(cpu_scratch(s, 0, 64), cpu_scratch(s, 1, 64));
    stream_destroy(s);
}
END_TEST

TCase *backend_case(void)
{
    TCase *c = tcase_create("backend");

    tcase_add_test(c, refuses_with_a_sentence);
    tcase_add_test(c, describes_the_cpu);
    tcase_add_test(c, has_every_operation);
    tcase_add_test(c, refuses_shapes_at_load);
    tcase_add_test(c, refuses_latent_shapes_at_load);
    tcase_add_test(c, buffers_are_zeroed_and_aligned);
    tcase_add_test(c, copies_and_events_keep_order);
    tcase_add_test(c, pieces_go_where_they_belong);
    tcase_add_test(c, any_page_can_be_registered);
    tcase_add_test(c, copies_beside_a_stream_that_computes);
    tcase_add_test(c, errors_stick);
    tcase_add_test(c, scratch_grows_and_stays);
    return c;
}
