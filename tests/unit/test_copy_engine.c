/* engine/kv/copy_engine.h: what is moved, in which order, and how every job comes back once.  On
 * the CPU back end, where a copy is done when it is queued, and on a device where it is not
 * (tests/support/lazy_device.h).  Run it with SAN=thread as well. */

#include "engine/kv/copy_engine.h"

#include "engine/base/clock.h"
#include "engine/base/mem.h"
#include "engine/kv/host_memory.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/lazy_device.h"

#include <check.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { LAYERS = 3, BLOCKS = 8, HOST_SLOTS = 24, MOST_JOBS = 32 };

static const struct kv_shape shape = { .kv_heads = 1, .head_dim = 16, .filter = FILTER_COARSE };

/* A pool, a host tier and a copy engine between them. */
struct setup {
    struct backend *be;
    bool lazy;
    struct kv_pool *pool;
    struct mailbox *done;
    struct copy_engine *engine;
    size_t kv_bytes, index_bytes, slot_bytes, host_bytes;
    unsigned char *host;
    struct copy_job jobs[MOST_JOBS];
};

static void open_setup(struct setup *s, bool lazy, uint64_t seed, size_t host_slots,
                       bool (*before)(void *arg, uint64_t number), void *arg)
{
    struct kv_pool_config pool = { .blocks = BLOCKS, .layers = LAYERS, .shape = shape };
    struct error err;

    memset(s, 0, sizeof *s);
    s->lazy = lazy;
    s->be = lazy ? lazy_device_open(seed) : test_backend("scalar");
    s->kv_bytes = kv_block_bytes(&shape);
    s->index_bytes = index_block_bytes(&shape);
    s->slot_bytes = LAYERS * (s->kv_bytes + s->index_bytes);
    s->host_bytes = host_slots * s->slot_bytes;
    s->host = mem_map(s->host_bytes, 4096);
    s->done = mailbox_create(NULL, NULL);
    ck_assert_int_eq(kv_pool_create(&s->pool, s->be, &pool, NULL), ST_OK);
    struct copy_engine_config cfg = { .pool = s->pool, .host = s->host, .layers = LAYERS,
                                      .shape = shape, .done = s->done, .before = before,
                                      .before_arg = arg };
    ck_assert_msg(copy_engine_create(&s->engine, s->be, &cfg, &err) == ST_OK, "%s", err.text);
}

static void close_setup(struct setup *s)
{
    copy_engine_destroy(s->engine);
    ck_assert_ptr_null(mailbox_drain(s->done));
    mailbox_destroy(s->done);
    kv_pool_destroy(s->pool);
    mem_unmap(s->host, s->host_bytes);
    if (s->lazy)
        backend_close(s->be);
}

static unsigned char *kv_at(const struct setup *s, int layer, int slot)
{
    return (unsigned char *)kv_pool_kv(s->pool, layer) + (size_t)slot * s->kv_bytes;
}

static unsigned char *index_at(const struct setup *s, int layer, int slot)
{
    return kv_pool_index(s->pool, layer) + (size_t)slot * s->index_bytes;
}

static unsigned char *host_kv_at(const struct setup *s, int layer, int slot)
{
    return s->host + (size_t)slot * s->slot_bytes + (size_t)layer * s->kv_bytes;
}

static unsigned char *host_index_at(const struct setup *s, int layer, int slot)
{
    return s->host + (size_t)slot * s->slot_bytes + LAYERS * s->kv_bytes +
           (size_t)layer * s->index_bytes;
}

/* Both parts of a content have bytes of their own in each layer. */
static unsigned char kv_value(unsigned content, int layer)
{
    return (unsigned char)(content * 7 + (unsigned)layer * 50 + 1);
}

static unsigned char index_value(unsigned content, int layer)
{
    return (unsigned char)(content * 11 + (unsigned)layer * 60 + 30);
}

static bool all_are(const unsigned char *p, size_t n, unsigned char value)
{
    return n == 0 || (p[0] == value && memcmp(p, p + 1, n - 1) == 0);
}

static void fill_device(struct setup *s, int kv, int index, unsigned content)
{
    for (int l = 0; l < LAYERS; l++) {
        memset(kv_at(s, l, kv), kv_value(content, l), s->kv_bytes);
        memset(index_at(s, l, index), index_value(content, l), s->index_bytes);
    }
}

static bool kv_is(const struct setup *s, int kv, unsigned content)
{
    bool yes = true;

    for (int l = 0; l < LAYERS; l++)
        yes = yes && all_are(kv_at(s, l, kv), s->kv_bytes, kv_value(content, l));
    return yes;
}

static bool index_is(const struct setup *s, int index, unsigned content)
{
    bool yes = true;

    for (int l = 0; l < LAYERS; l++)
        yes = yes && all_are(index_at(s, l, index), s->index_bytes, index_value(content, l));
    return yes;
}

static bool host_is(const struct setup *s, int slot, unsigned content)
{
    bool yes = true;

    for (int l = 0; l < LAYERS; l++)
        yes = yes && all_are(host_kv_at(s, l, slot), s->kv_bytes, kv_value(content, l)) &&
              all_are(host_index_at(s, l, slot), s->index_bytes, index_value(content, l));
    return yes;
}

/* Job i, which has number i as its block. */
static struct copy_job *post(struct setup *s, int i, enum copy_kind kind, bool urgent, int kv,
                             int index, int host)
{
    struct copy_job *job = &s->jobs[i];

    *job = (struct copy_job){ .kind = kind, .urgent = urgent, .block = (kv_block)i,
                              .place = { kv, index, host } };
    copy_engine_post(s->engine, job);
    return job;
}

/* The numbers of the next n jobs that come back. */
static void collect(struct setup *s, int n, int *numbers)
{
    const struct timespec moment = { 0, 100000 };
    const uint64_t until = clock_now_ns() + 20000000000u;

    for (int i = 0; i < n;) {
        struct mail_node *at = mailbox_drain(s->done);
        if (!at) {
            ck_assert_msg(clock_now_ns() < until, "%d of %d jobs came back", i, n);
            nanosleep(&moment, NULL);
        }
        for (; at; at = at->next) {
            ck_assert_int_lt(i, n);
            numbers[i++] = (int)((struct copy_job *)at)->block;
        }
    }
}

static void assert_order(const int *numbers, const int *want, int n)
{
    for (int i = 0; i < n; i++)
        ck_assert_msg(numbers[i] == want[i], "job %d came as %d., not job %d", numbers[i], i,
                      want[i]);
}

/* ---- contents; _i: whether on the lazy device */

START_TEST(every_layer_of_both_parts_is_moved)
{
    struct setup s;
    int numbers[2];

    open_setup(&s, _i, 1, HOST_SLOTS, NULL, NULL);
    fill_device(&s, 2, 5, 9);
    struct copy_job *store = post(&s, 0, COPY_STORE, false, 2, 5, 3);
    collect(&s, 1, numbers);
    ck_assert(store->arrived);
    ck_assert(store->posted_ns <= store->began_ns && store->began_ns <= store->ended_ns);
    ck_assert(host_is(&s, 3, 9));
    ck_assert(all_are(s.host, 3 * s.slot_bytes, 0));
    ck_assert(all_are(s.host + 4 * s.slot_bytes, s.host_bytes - 4 * s.slot_bytes, 0));

    struct copy_job *load = post(&s, 1, COPY_LOAD, true, 7, 0, 3);
    collect(&s, 1, numbers);
    ck_assert(load->arrived);
    ck_assert(kv_is(&s, 7, 9) && index_is(&s, 0, 9) && host_is(&s, 3, 9));
    ck_assert(kv_is(&s, 2, 9) && index_is(&s, 5, 9));
    for (int l = 0; l < LAYERS; l++)
        ck_assert(all_are(kv_at(&s, l, 6), s.kv_bytes, 0) &&
                  all_are(index_at(&s, l, 1), s.index_bytes, 0));
    struct copy_counts n = copy_engine_counts(s.engine);
    ck_assert(n.stores == 1 && n.loads == 1 && n.failed == 0);
    ck_assert(n.bytes_stored == s.slot_bytes && n.bytes_loaded == s.slot_bytes);
    ck_assert_uint_eq(n.load_wait_ns, load->ended_ns - load->posted_ns);
    ck_assert_int_eq(copy_engine_failure(s.engine, NULL), ST_OK);
    close_setup(&s);
}
END_TEST

START_TEST(a_part_without_a_place_is_not_moved)
{
    struct setup s;
    int numbers[3];

    open_setup(&s, _i, 1, HOST_SLOTS, NULL, NULL);
    fill_device(&s, 0, 0, 4);
    post(&s, 0, COPY_STORE, false, 0, 0, 0);
    collect(&s, 1, numbers);
    post(&s, 1, COPY_LOAD, false, -1, 3, 0);
    post(&s, 2, COPY_LOAD, false, 3, -1, 0);
    collect(&s, 2, numbers);
    ck_assert(kv_is(&s, 3, 4) && index_is(&s, 3, 4));
    ck_assert_uint_eq(copy_engine_counts(s.engine).bytes_loaded, s.slot_bytes);
    post(&s, 0, COPY_LOAD, false, -1, -1, 0);
    collect(&s, 1, numbers);
    ck_assert(s.jobs[0].arrived);
    ck_assert_uint_eq(copy_engine_counts(s.engine).bytes_loaded, s.slot_bytes);
    close_setup(&s);
}
END_TEST

/* The slot that begins in one piece of the tier and ends in the next; its memory alone is used. */
START_TEST(a_slot_across_two_pieces_is_whole)
{
    const size_t piece = (size_t)HOST_MEMORY_PIECE_MB << 20;
    struct setup s;
    int numbers[2];

    size_t slot_bytes = LAYERS * (kv_block_bytes(&shape) + index_block_bytes(&shape));
    int slot = (int)(piece / slot_bytes);
    open_setup(&s, _i, 1, (size_t)slot + 2, NULL, NULL);
    ck_assert((size_t)slot * s.slot_bytes < piece && (size_t)(slot + 1) * s.slot_bytes > piece);
    if (_i)
        lazy_device_fence(s.be, s.host + piece);
    fill_device(&s, 1, 1, 6);
    post(&s, 0, COPY_STORE, false, 1, 1, slot);
    collect(&s, 1, numbers);
    ck_assert(host_is(&s, slot, 6));
    post(&s, 1, COPY_LOAD, false, 2, 2, slot);
    collect(&s, 1, numbers);
    ck_assert(kv_is(&s, 2, 6) && index_is(&s, 2, 6));
    close_setup(&s);
}
END_TEST

/* ---- order */

/* Holds back the first job until the gate is opened. */
struct gate {
    sem_t reached, open;
};

static bool wait_at_gate(void *arg, uint64_t number)
{
    struct gate *g = arg;

    if (number == 0) {
        sem_post(&g->reached);
        sem_wait(&g->open);
    }
    return true;
}

static void open_with_gate(struct setup *s, struct gate *g)
{
    sem_init(&g->reached, 0, 0);
    sem_init(&g->open, 0, 0);
    open_setup(s, false, 0, HOST_SLOTS, wait_at_gate, g);
    post(s, 0, COPY_STORE, false, 0, 0, 0);
    sem_wait(&g->reached);
}

START_TEST(urgent_jobs_first_then_in_order_of_posting)
{
    static const int want[] = { 0, 3, 5, 6, 1, 2, 4, 7 };
    struct setup s;
    struct gate g;
    int numbers[8];

    open_with_gate(&s, &g);
    post(&s, 1, COPY_STORE, false, 1, 1, 1);
    post(&s, 2, COPY_LOAD, false, 2, 2, 2);
    post(&s, 3, COPY_LOAD, true, 3, 3, 3);
    post(&s, 4, COPY_STORE, false, 4, 4, 4);
    post(&s, 5, COPY_STORE, true, 5, 5, 5);
    post(&s, 6, COPY_LOAD, true, 6, 6, 6);
    post(&s, 7, COPY_LOAD, false, 7, 7, 7);
    sem_post(&g.open);
    collect(&s, 8, numbers);
    assert_order(numbers, want, 8);
    close_setup(&s);
}
END_TEST

/* Stores that are under way do not keep loads from beginning, and no more than COPIES_IN_FLIGHT of
 * them are before an urgent one. */
START_TEST(what_takes_long_holds_up_its_own_stream_alone)
{
    enum { STORES = COPIES_IN_FLIGHT + 3 };
    struct setup s;
    int numbers[STORES + 2];
    const struct timespec moment = { 0, 20000000 };

    open_setup(&s, true, 5, HOST_SLOTS, NULL, NULL);
    fill_device(&s, 0, 0, 3);
    lazy_device_hold(s.be, s.host, s.host_bytes);
    for (int i = 0; i < STORES; i++)
        post(&s, i, COPY_STORE, false, 0, 0, i);
    nanosleep(&moment, NULL);
    post(&s, STORES, COPY_LOAD, false, 1, 1, HOST_SLOTS - 1);
    collect(&s, 1, numbers);
    ck_assert_int_eq(numbers[0], STORES);
    post(&s, STORES + 1, COPY_STORE, true, 2, 2, STORES + 1);
    nanosleep(&moment, NULL);
    ck_assert_ptr_null(mailbox_drain(s.done));
    lazy_device_release(s.be);
    collect(&s, STORES + 1, numbers);
    ck_assert_int_eq(numbers[COPIES_IN_FLIGHT], STORES + 1);
    for (int i = 0; i < STORES; i++)
        ck_assert(host_is(&s, i, 3));
    close_setup(&s);
}
END_TEST

/* ---- what does not arrive */

static bool fail_the_third(void *arg, uint64_t number)
{
    (void)arg;
    return number != 2;
}

START_TEST(after_a_failure_nothing_arrives)
{
    struct setup s;
    struct error err = { 0 };
    int numbers[6];

    open_setup(&s, false, 0, HOST_SLOTS, fail_the_third, NULL);
    for (int i = 0; i < 5; i++)
        post(&s, i, i % 2 ? COPY_LOAD : COPY_STORE, false, i, i, i);
    collect(&s, 5, numbers);
    for (int i = 0; i < 5; i++)
        ck_assert(s.jobs[i].arrived == (i < 2));
    ck_assert_int_eq(copy_engine_failure(s.engine, &err), ST_DEVICE);
    ck_assert_int_eq(err.code, ST_DEVICE);
    ck_assert_ptr_nonnull(strstr(err.text, "copy 2 "));
    post(&s, 5, COPY_LOAD, true, 5, 5, 5);
    collect(&s, 1, numbers);
    ck_assert(!s.jobs[5].arrived);
    ck_assert_uint_eq(copy_engine_counts(s.engine).failed, 4);
    close_setup(&s);
}
END_TEST

/* A stream that fails in any step of three jobs, each of two copies and an event. */
START_TEST(a_failed_stream_is_final)
{
    struct setup s;
    struct error err = { 0 };
    int numbers[6], n_arrived = 0;

    open_setup(&s, true, (uint64_t)_i, HOST_SLOTS, NULL, NULL);
    lazy_device_fail_at(s.be, (uint64_t)_i + 1);
    for (int i = 0; i < 6; i++)
        post(&s, i, COPY_LOAD, false, i, i, i);
    collect(&s, 6, numbers);
    for (int i = 0; i < 6; i++) {
        ck_assert_int_eq(numbers[i], i);
        ck_assert(i == 0 || s.jobs[i - 1].arrived || !s.jobs[i].arrived);
        n_arrived += s.jobs[i].arrived;
    }
    ck_assert_int_le(n_arrived, _i / 3);
    ck_assert_int_eq(copy_engine_failure(s.engine, &err), ST_DEVICE);
    ck_assert_str_eq(err.text, "the lazy device failed");
    close_setup(&s);
}
END_TEST

/* ---- the end */

struct ending {
    sem_t begun;
    atomic_bool ends;
};

/* The first job begins, and lasts until destroy is called and has had time to say so. */
static bool last_until_the_end(void *arg, uint64_t number)
{
    const struct timespec moment = { 0, 1000000 }, long_enough = { 0, 300000000 };
    struct ending *e = arg;

    if (number == 0) {
        sem_post(&e->begun);
        while (!atomic_load(&e->ends))
            nanosleep(&moment, NULL);
        nanosleep(&long_enough, NULL);
    }
    return true;
}

START_TEST(destroy_finishes_what_is_under_way)
{
    struct setup s;
    struct ending e = { .ends = false };
    int numbers[6];

    sem_init(&e.begun, 0, 0);
    open_setup(&s, _i, 2, HOST_SLOTS, last_until_the_end, &e);
    fill_device(&s, 0, 0, 8);
    post(&s, 0, COPY_STORE, false, 0, 0, 0);
    sem_wait(&e.begun);
    for (int i = 1; i < 6; i++)
        post(&s, i, COPY_LOAD, i % 2, i, i, i);
    atomic_store(&e.ends, true);
    copy_engine_destroy(s.engine);
    s.engine = NULL;
    collect(&s, 6, numbers);
    ck_assert_int_eq(numbers[0], 0);
    ck_assert(s.jobs[0].arrived && host_is(&s, 0, 8));
    for (int i = 1; i < 6; i++)
        ck_assert(!s.jobs[i].arrived && s.jobs[i].began_ns == 0);
    close_setup(&s);
}
END_TEST

/* ---- histories
 *
 * Blocks are written by the device, stored, loaded elsewhere and compared.  A slot is in one job at
 * a time, and what it should contain is known.  Jobs of one direction and urgency come back in the
 * order in which they were posted. */

enum { HISTORY_JOBS = 3000 };

struct history {
    struct setup *s;
    unsigned random;
    unsigned device[BLOCKS], host[HOST_SLOTS];       /* contents */
    bool device_busy[BLOCKS], host_busy[HOST_SLOTS];
    struct stream *compute;
    bool job_busy[MOST_JOBS];
    int posted[MOST_JOBS], last[2][2];               /* [kind][urgent] */
    int n_posted, n_back, n_failed;
    unsigned n_contents;
    bool failed;
};

static unsigned draw(unsigned *random, unsigned n)
{
    *random = *random * 1664525u + 1013904223u;
    return (*random >> 8) % n;
}

static bool delay(void *arg, uint64_t number)
{
    unsigned *random = arg;
    struct timespec t = { 0, draw(random, 100000) };

    (void)number;
    if (draw(random, 4) == 0)
        nanosleep(&t, NULL);
    return true;
}

/* The device writes a block anew; where it has failed nobody will compare. */
static void write_block(struct history *h, int slot)
{
    const struct setup *s = h->s;

    h->device[slot] = ++h->n_contents;
    for (int l = 0; l < LAYERS; l++) {
        stream_fill(h->compute, kv_at(s, l, slot), kv_value(h->n_contents, l), s->kv_bytes);
        stream_fill(h->compute, index_at(s, l, slot), index_value(h->n_contents, l),
                    s->index_bytes);
    }
    h->failed = stream_sync(h->compute, NULL) != ST_OK;
}

static void post_some(struct history *h)
{
    struct setup *s = h->s;
    const int i = (int)draw(&h->random, MOST_JOBS), device = (int)draw(&h->random, BLOCKS),
              host = (int)draw(&h->random, HOST_SLOTS);
    const enum copy_kind kind = draw(&h->random, 2) ? COPY_STORE : COPY_LOAD;

    if (h->job_busy[i] || h->device_busy[device] || h->host_busy[host] ||
        (kind == COPY_LOAD && h->host[host] == 0))
        return;
    h->job_busy[i] = h->device_busy[device] = h->host_busy[host] = true;
    h->posted[i] = h->n_posted++;
    s->jobs[i] = (struct copy_job){ .kind = kind, .urgent = draw(&h->random, 3) == 0,
                                    .block = (kv_block)i, .place = { device, device, host } };
    if (kind == COPY_STORE)
        write_block(h, device);
    copy_engine_post(s->engine, &s->jobs[i]);
}

static void take_back(struct history *h, const struct copy_job *job)
{
    const struct setup *s = h->s;
    const int i = (int)job->block, device = job->place.kv, host = job->place.host;
    int *last = &h->last[job->kind][job->urgent];

    ck_assert(h->job_busy[i]);
    h->n_back++;
    h->job_busy[i] = h->device_busy[device] = h->host_busy[host] = false;
    const bool began = job->began_ns > 0;            /* else it waited until the end */
    h->n_failed += began && !job->arrived;
    if (began) {
        ck_assert_int_lt(*last, h->posted[i]);
        *last = h->posted[i];
    }
    ck_assert(!job->arrived || h->n_failed == 0);
    if (!job->arrived) {                 /* nobody knows what is there */
        if (job->kind == COPY_STORE)
            h->host[host] = began ? 0 : h->host[host];
        return;
    }
    if (job->kind == COPY_STORE)
        h->host[host] = h->device[device];
    else
        h->device[device] = h->host[host];
    ck_assert(host_is(s, host, h->host[host]));
    if (job->kind == COPY_LOAD)
        ck_assert(kv_is(s, device, h->host[host]) && index_is(s, device, h->host[host]));
}

static void reap_history(struct history *h)
{
    for (struct mail_node *at = mailbox_drain(h->s->done), *next; at; at = next) {
        next = at->next;
        take_back(h, (struct copy_job *)at);
    }
}

static void run_history(bool lazy, unsigned seed, uint64_t fail_at)
{
    const struct timespec moment = { 0, 50000 };
    struct setup s;
    struct history h = { .s = &s, .random = seed, .last = { { -1, -1 }, { -1, -1 } } };
    unsigned delays = seed + 1;

    open_setup(&s, lazy, seed, HOST_SLOTS, delay, &delays);
    if (lazy)
        lazy_device_fail_at(s.be, fail_at);
    h.compute = stream_create(s.be);
    while (h.n_posted < HISTORY_JOBS) {
        for (unsigned n = draw(&h.random, 20); n > 0; n--)
            post_some(&h);
        if (h.failed)
            break;
        reap_history(&h);
        if (draw(&h.random, 2))
            nanosleep(&moment, NULL);
    }
    copy_engine_destroy(s.engine);
    s.engine = NULL;
    reap_history(&h);
    ck_assert_msg(h.n_back == h.n_posted, "seed %u: %d of %d jobs came back", seed, h.n_back,
                  h.n_posted);
    if (fail_at == 0)
        ck_assert_int_eq(h.n_failed, 0);
    stream_destroy(h.compute);
    close_setup(&s);
}

START_TEST(histories_on_the_cpu)
{
    run_history(false, (unsigned)_i + 1, 0);
}
END_TEST

START_TEST(histories_on_a_device_that_takes_its_time)
{
    run_history(true, (unsigned)_i + 100, 0);
}
END_TEST

START_TEST(histories_with_a_failure)
{
    run_history(true, (unsigned)_i + 200, (uint64_t)(_i + 1) * 777);
}
END_TEST

TCase *copy_engine_case(void)
{
    TCase *tc = tcase_create("copy_engine");

    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, every_layer_of_both_parts_is_moved, 0, 2);
    tcase_add_loop_test(tc, a_part_without_a_place_is_not_moved, 0, 2);
    tcase_add_loop_test(tc, a_slot_across_two_pieces_is_whole, 0, 2);
    tcase_add_test(tc, urgent_jobs_first_then_in_order_of_posting);
    tcase_add_test(tc, what_takes_long_holds_up_its_own_stream_alone);
    tcase_add_test(tc, after_a_failure_nothing_arrives);
    tcase_add_loop_test(tc, a_failed_stream_is_final, 0, 9);
    tcase_add_loop_test(tc, destroy_finishes_what_is_under_way, 0, 2);
    tcase_add_loop_test(tc, histories_on_the_cpu, 0, 2);
    tcase_add_loop_test(tc, histories_on_a_device_that_takes_its_time, 0, 2);
    tcase_add_loop_test(tc, histories_with_a_failure, 0, 4);
    return tc;
}
