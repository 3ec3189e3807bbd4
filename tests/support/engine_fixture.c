#include "tests/support/engine_fixture.h"

#include "engine/base/clock.h"
#include "engine/base/mem.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <semaphore.h>
#include <string.h>
#include <time.h>

struct engine *engine;
struct mailbox *engine_mail;
static sem_t mail_arrived;

const struct fixture_model bundled_model = {
    BUNDLED_MODEL, 8, { .kv_heads = 2, .head_dim = 128, .filter = FILTER_COARSE,
                        .index = INDEX_ROTATED } };
const struct fixture_model latent_model = {
    "build/models/glm4-moe-lite", 3, { .kv_heads = 1, .head_dim = 576, .latent_dim = 512,
                                       .filter = FILTER_COARSE, .index = INDEX_ROTATED } };

uint64_t model_index_bytes(const struct fixture_model *m)
{
    return (uint64_t)m->layers * index_block_bytes(&m->shape);
}

uint64_t model_block_bytes(const struct fixture_model *m)
{
    return (uint64_t)m->layers * kv_block_bytes(&m->shape) + model_index_bytes(m);
}

static void on_mail(void *arg)
{
    sem_post(arg);
}

struct engine_config small_config(void)
{
    struct engine_config c = {
        .model_dir = BUNDLED_MODEL, .backend = "cpu", .threads = 2, .max_running = 8,
        .max_waiting = 64, .max_waiting_tokens = 1 << 20, .step_tokens = 256,
        .kv_bytes = 64 << 20, .prefix_cache = true, .check_invariants = true,
        .select = select_default(),
    };

    c.select.crossover_tokens = 200;
    c.select.keep_blocks = 4;
    c.select.keep_tokens = 96;
    c.select.sink_tokens = 4;
    c.select.recent_tokens = 32;
    return c;
}

void start(const struct engine_config *c)
{
    struct error err = { 0 };

    sem_init(&mail_arrived, 0, 0);
    engine_mail = mailbox_create(on_mail, &mail_arrived);
    ck_assert_msg(engine_create(&engine, c, engine_mail, &err) == ST_OK, "%s", err.text);
}

void stop(void)
{
    engine_destroy(engine);
    for (struct mail_node *n = mailbox_drain(engine_mail); n; n = n->next)
        ;
    mailbox_destroy(engine_mail);
}

struct request *new_request(const int32_t *prompt, uint32_t n_prompt, uint32_t max_tokens)
{
    struct request *r = mem_calloc(1, sizeof *r);
    int32_t *copy = mem_alloc(n_prompt * sizeof *copy);

    memcpy(copy, prompt, n_prompt * sizeof *copy);
    r->prompt = copy;
    r->n_prompt = n_prompt;
    r->max_tokens = max_tokens;
    r->top_p = r->repetition = 1;
    r->ignore_eos = r->skip_special = r->sparse = true;
    r->output = mem_calloc(max_tokens + 1, sizeof *r->output);
    r->chosen = mem_calloc(max_tokens + 1, sizeof *r->chosen);
    return r;
}

void free_request(struct request *r)
{
    mem_free((void *)r->prompt);
    mem_free(r->output);
    mem_free(r->chosen);
    mem_free(r->top);
    mem_free(r->prompt_chosen);
    mem_free(r->prompt_top);
    mem_free(r);
}

enum status submit_one(struct request *r)
{
    return engine_submit(engine, &r, 1);
}

int collect_mail(void)
{
    int home = 0;

    sem_wait(&mail_arrived);
    for (struct mail_node *node = mailbox_drain(engine_mail), *next; node; node = next) {
        struct message *m = (struct message *)node;
        next = node->next;
        if (m->kind == MSG_DONE)
            home++;
        else
            atomic_store(&m->req->mail_pending, false);
    }
    return home;
}

void wait_for(int n)
{
    while (n > 0)
        n -= collect_mail();
    ck_assert_int_eq(n, 0);
}

void run_one(struct request *r)
{
    ck_assert_int_eq(submit_one(r), ST_OK);
    wait_for(1);
}

void random_prompt(int32_t *ids, uint32_t n, uint64_t seed)
{
    struct test_random rng = test_random(seed);

    for (uint32_t i = 0; i < n; i++)
        ids[i] = 260 + random_below(&rng, 5000);
}

void assert_gauges_are_zero(void)
{
    const struct timespec pause = { .tv_nsec = 200000 };
    const uint64_t patience_ns = 20ull * 1000 * 1000 * 1000;
    uint64_t began_ns = clock_now_ns();
    struct engine_stats s;

    while (!engine_idle(engine))
        nanosleep(&pause, NULL);
    for (;;) {
        engine_stats(engine, &s);
        if (!s.running && !s.kv_blocks_pinned && !s.host_blocks_used && !s.offloaded && !s.loading)
            break;
        ck_assert_msg(clock_now_ns() - began_ns < patience_ns,
                      "idle, but %u running, %u offloaded, %u loading, %u blocks and %u of the "
                      "host tier in use", s.running, s.offloaded, s.loading, s.kv_blocks_pinned,
                      s.host_blocks_used);
        nanosleep(&pause, NULL);
    }
    ck_assert_uint_eq(s.waiting, 0);
    ck_assert_uint_eq(s.waiting_tokens, 0);
}
