#include "engine/engine_parts.h"

#include "engine/base/clock.h"
#include "engine/base/invariant.h"
#include "engine/base/log.h"
#include "engine/base/mem.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

/* ---- any thread */

static void wake(struct engine *e)
{
    uint64_t one = 1;

    /* A full counter wakes as well. */
    if (write(e->wake_fd, &one, sizeof one) < 0)
        ASSERT(errno == EAGAIN);
}

/* The request's share of the waiting room, or NULL. */
static struct waiting_room *share_of(struct engine *e, const struct request *req)
{
    return req->share && e->n_shares ? &e->shares[req->share - 1] : NULL;
}

static enum status enter_room(struct engine *e, const struct request *req)
{
    struct waiting_room *share = share_of(e, req);

    if (share && !waiting_enter(share, req->n_prompt))
        return ST_QUOTA;
    if (waiting_enter(&e->waiting, req->n_prompt))
        return ST_OK;
    if (share)
        waiting_leave(share, req->n_prompt);
    return ST_BUSY;
}

static void leave_room(struct engine *e, const struct request *req)
{
    struct waiting_room *share = share_of(e, req);

    if (share)
        waiting_leave(share, req->n_prompt);
    waiting_leave(&e->waiting, req->n_prompt);
}

/* All or none. */
static enum status enter_together(struct engine *e, struct request *const *reqs, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        enum status st = enter_room(e, reqs[i]);
        if (st == ST_OK)
            continue;
        while (i > 0)
            leave_room(e, reqs[--i]);
        return st;
    }
    return ST_OK;
}

static void send_in(struct engine *e, struct request *req)
{
    req->tokens_mail.kind = MSG_TOKENS;
    req->done_mail.kind = MSG_DONE;
    req->tokens_mail.req = req->done_mail.req = req;
    req->finish = FINISH_NONE;
    req->stopped_by_id = req->stopped_by_string = -1;
    atomic_fetch_add(&e->n_inside, 1);
    /* The letter that will bring it home takes it here as well. */
    mailbox_post(e->inbox, &req->done_mail.node);
}

enum status engine_submit(struct engine *e, struct request *const *reqs, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        ASSERT(!e->n_shares || reqs[i]->share <= e->n_shares);
        ASSERT(reqs[i]->n_prompt > 0 &&
               (uint64_t)reqs[i]->n_prompt + reqs[i]->max_tokens <= e->max_model_len);
    }
    if (atomic_load(&e->failed))
        return ST_DEVICE;
    if (atomic_load(&e->draining))
        return ST_SHUTDOWN;
    TRY(enter_together(e, reqs, n));
    for (uint32_t i = 0; i < n; i++)
        send_in(e, reqs[i]);
    return ST_OK;
}

void engine_cancel(struct engine *e, struct request *req)
{
    atomic_store(&req->cancelled, true);
    atomic_fetch_add(&e->n_cancels, 1);
    wake(e);
}

void engine_drain(struct engine *e)
{
    atomic_store(&e->draining, true);
    wake(e);
}

void engine_poke(struct engine *e)
{
    wake(e);
}

bool engine_idle(const struct engine *e)
{
    return atomic_load(&e->n_inside) == 0;
}

static void load_words(uint64_t *to, const _Atomic uint64_t *from, size_t n)
{
    for (size_t i = 0; i < n; i++)
        to[i] = atomic_load_explicit(&from[i], memory_order_relaxed);
}

static uint32_t begin_reading(const struct published_stats *p)
{
    return atomic_load_explicit(&p->version, memory_order_acquire);
}

/* What was read since then belongs together. */
static bool ended_well(const struct published_stats *p, uint32_t version)
{
    atomic_thread_fence(memory_order_acquire);
    return !(version & 1) && atomic_load_explicit(&p->version, memory_order_relaxed) == version;
}

void engine_stats(const struct engine *e, struct engine_stats *out)
{
    const struct published_stats *p = &e->published;
    uint64_t words[(sizeof *out + 7) / 8];
    uint32_t version;

    do {
        version = begin_reading(p);
        load_words(words, p->words, sizeof words / sizeof words[0]);
    } while (!ended_well(p, version));
    memcpy(out, words, sizeof *out);
    /* The room is counted where one enters it. */
    out->waiting += waiting_requests(&e->waiting);
    out->waiting_tokens = waiting_tokens(&e->waiting);
    out->busy = atomic_load(&e->n_inside) > 0;
}

uint32_t engine_sequences(const struct engine *e, struct engine_sequence *out)
{
    const struct published_stats *p = &e->published;
    uint64_t row[SEQUENCE_WORDS];
    uint32_t version, n;

    do {
        version = begin_reading(p);
        n = atomic_load_explicit(&p->n_rows, memory_order_relaxed);
        for (uint32_t i = 0; i < n; i++) {
            load_words(row, p->rows + (size_t)i * SEQUENCE_WORDS, SEQUENCE_WORDS);
            memcpy(&out[i], row, sizeof out[i]);
        }
    } while (!ended_well(p, version));
    return n;
}

/* ---- engine thread */

static void count_residency(struct engine *e)
{
    e->stats.offloaded = e->stats.streamed = e->stats.loading = 0;
    for (const struct sequence *q = scheduler_oldest(e->scheduler); q; q = q->younger) {
        e->stats.offloaded += q->residency == OFFLOADED || q->residency == RETURNING;
        e->stats.streamed += q->residency == STREAMED;
        e->stats.loading += !sequence_is_ready(q);
    }
}

static void publish_offload(struct engine *e)
{
    const struct residency_context *r = &e->residency;
    struct engine_stats *s = &e->stats;

    s->host_tier = r->tier != NULL;
    if (!r->tier)
        return;
    count_residency(e);
    s->n_offloads = r->n_offloads;
    s->n_returns = r->n_returns;
    struct copy_counts copies = host_tier_counts(r->tier);
    s->bytes_stored = copies.bytes_stored;
    s->bytes_loaded = copies.bytes_loaded;
    s->load_wait_ns = copies.load_wait_ns;
    for (int layer = 0; r->sets && layer < model_config(e->model)->layers; layer++)
        s->hot[layer] = hot_sets_counts(r->sets, layer);
}

static void store_words(_Atomic uint64_t *to, const uint64_t *from, size_t n)
{
    for (size_t i = 0; i < n; i++)
        atomic_store_explicit(&to[i], from[i], memory_order_relaxed);
}

static const char *place_of(const struct sequence *q)
{
    static const char *const names[] = {
        [ON_DEVICE] = "device", [LOADING] = "loading", [LOADING_INDEX] = "loading index",
        [STREAMED] = "streamed", [OFFLOADED] = "offloaded", [RETURNING] = "returning",
    };

    return names[q->residency];
}

/* Five words for each, which a step that computes a row for each does not notice. */
static void publish_sequences(struct engine *e)
{
    struct published_stats *p = &e->published;
    uint64_t row[SEQUENCE_WORDS] = { 0 };
    uint32_t n = 0;

    for (const struct sequence *q = scheduler_oldest(e->scheduler); q; q = q->younger, n++) {
        const struct engine_sequence s = {
            .id = q->req->id, .place = place_of(q), .n_prompt = q->n_prompt,
            .n_tokens = q->n_tokens, .n_computed = q->n_computed, .n_blocks = q->n_blocks,
            .n_held = q->n_held,
        };
        ASSERT(n < p->max_rows);
        memcpy(row, &s, sizeof s);
        store_words(p->rows + (size_t)n * SEQUENCE_WORDS, row, SEQUENCE_WORDS);
    }
    atomic_store_explicit(&p->n_rows, n, memory_order_relaxed);
}

void engine_publish(struct engine *e)
{
    struct engine_stats *s = &e->stats;
    struct kv_pool_counts kv = kv_pool_counts(e->pool);
    struct published_stats *p = &e->published;
    uint64_t words[(sizeof *s + 7) / 8] = { 0 };

    s->running = scheduler_running(e->scheduler);
    s->waiting = e->n_put_back;
    s->kv_blocks = kv.blocks;
    s->kv_block_tokens = BLOCK_TOKENS;
    s->kv_blocks_pinned = kv.pinned;
    s->kv_blocks_cached = kv.cached;
    s->host_blocks = kv.host_blocks;
    s->host_blocks_cached = kv.host_cached;
    s->host_blocks_used = kv.host_blocks - kv.host_free - kv.host_cached;
    publish_offload(e);
    s->failed = atomic_load(&e->failed);
    memcpy(words, s, sizeof *s);
    uint32_t version = atomic_load_explicit(&p->version, memory_order_relaxed);
    atomic_store_explicit(&p->version, version + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    store_words(p->words, words, sizeof words / sizeof words[0]);
    publish_sequences(e);
    atomic_store_explicit(&p->version, version + 2, memory_order_release);
}

/* The request's last moment here: nothing of it may be touched afterwards. */
static void send_home(struct engine *e, struct request *req)
{
    e->stats.finished[req->finish]++;
    atomic_fetch_sub(&e->n_inside, 1);
    mailbox_post(e->to_loop, &req->done_mail.node);
}

static void end_sequence(struct engine *e, struct sequence *q)
{
    struct request *req = q->req;

    if (!q->was_admitted)
        leave_room(e, req);
    else if (q->state == SEQ_WAITING)
        e->n_put_back--;
    scheduler_remove(e->scheduler, q);
    step_release(&e->step, q);
    residency_end(&e->residency, q);
    sequence_drop_blocks(q, e->pool);
    sequence_destroy(q);
    send_home(e, req);
}

static void publish_output(struct engine *e, const struct sequence *q)
{
    struct request *req = q->req;

    atomic_store_explicit(&req->n_output, q->n_tokens - q->n_prompt, memory_order_release);
    if (!atomic_exchange(&req->mail_pending, true))
        mailbox_post(e->to_loop, &req->tokens_mail.node);
}

static void accept_requests(struct engine *e)
{
    const struct model_config *m = model_config(e->model);

    for (struct mail_node *node = mailbox_drain(e->inbox), *next; node; node = next) {
        struct request *req = ((struct message *)node)->req;
        next = node->next;
        struct sequence *q = sequence_create(req, e->tok, &e->select, e->next_order++,
                                             m->vocab, m->eos, m->n_eos);
        q->too_long = q->max_blocks > kv_pool_counts(e->pool).blocks;
        scheduler_add(e->scheduler, q);
        if (sequence_next_tokens(q) == 0) {  /* one token to score: nothing foretells it */
            req->finish = FINISH_LENGTH;
            end_sequence(e, q);
        }
    }
}

static void drop_cancelled(struct engine *e, bool all)
{
    uint32_t cancels = atomic_load(&e->n_cancels);
    struct sequence *q;

    if (cancels == e->seen_cancels && !all)
        return;
    e->seen_cancels = cancels;
    for (uint32_t i = 0; (q = scheduler_at(e->scheduler, i)) != NULL;) {
        if (all || atomic_load(&q->req->cancelled)) {
            q->req->finish = FINISH_CANCELLED;
            end_sequence(e, q);
        } else
            i++;
    }
}

static void see_room(const struct engine *e, struct step_budget *b)
{
    b->blocks = kv_pool_available(e->pool);
    b->clearing = kv_pool_clearing(e->pool);
}

static void drop_preempted(struct step_budget *b, struct sequence *q)
{
    struct engine *e = b->arg;

    e->stats.preemptions++;
    e->n_put_back++;
    e->stats.recomputed_tokens += q->n_computed;
    q->req->n_preempted++;
    step_release(&e->step, q);
    residency_end(&e->residency, q);
    sequence_drop_blocks(q, e->pool);
    see_room(e, b);
}

static bool offload(struct step_budget *b, struct sequence *q)
{
    struct engine *e = b->arg;

    if (!residency_offload(&e->residency, q))
        return false;
    see_room(e, b);
    return true;
}

static void note_admission(struct engine *e, struct sequence *q, uint64_t now_ns)
{
    uint32_t cached = q->n_computed;

    if (q->was_admitted) {
        e->n_put_back--;
        return;
    }
    q->was_admitted = true;
    leave_room(e, q->req);
    q->req->admitted_ns = now_ns;
    q->req->n_cached = cached;
    e->stats.prefix_queries += q->n_prompt;
    e->stats.prefix_hits += cached;
    e->stats.prompt_tokens_cached += cached;
}

static bool admit_early(struct engine *e, struct step_plan *plan, struct sequence *q)
{
    if (!residency_leave_early(&e->residency, q))
        return false;
    see_room(e, &plan->left);
    return scheduler_admit(e->scheduler, plan, q);
}

/* As a whole, or where there is no room for that without its K and V. */
static bool admit_one(struct engine *e, struct step_plan *plan, struct sequence *q)
{
    if (q->too_long)
        return admit_early(e, plan, q);
    if (scheduler_admit(e->scheduler, plan, q))
        return true;
    return q->residency == LOADING && sequence_is_sparse_only(q) && admit_early(e, plan, q);
}

static void admit(struct engine *e, struct step_plan *plan)
{
    struct sequence *q;

    while ((q = scheduler_next(e->scheduler, plan)) != NULL) {
        sequence_attach(q, e->pool, &e->select);
        see_room(e, &plan->left);
        if (!admit_one(e, plan, q)) {
            residency_end(&e->residency, q);
            sequence_drop_blocks(q, e->pool);
            return;
        }
        note_admission(e, q, clock_now_ns());
        if (q->residency != ON_DEVICE)
            residency_start(&e->residency, q);
        see_room(e, &plan->left);
    }
}

/* The oldest that is offloaded comes back when nobody waits for what it needs. */
static void bring_back(struct engine *e, struct step_plan *plan)
{
    if (!e->residency.sets || e->residency.always || scheduler_waiting(e->scheduler) > 0)
        return;
    uint32_t running = scheduler_running(e->scheduler);
    uint32_t spare = scheduler_spare_blocks(e->scheduler, plan);
    for (struct sequence *q = scheduler_oldest(e->scheduler); q; q = q->younger) {
        uint32_t headroom = 2 * running + q->n_blocks / 16;
        if (q->residency != OFFLOADED || q->too_long)
            continue;
        if (q->n_blocks - q->n_held + headroom <= spare)
            residency_return(&e->residency, q);
        return;
    }
}

/* The device is lost: everybody learns it, nobody is let in any more. */
static void fail_all(struct engine *e, const struct error *why)
{
    struct sequence *q;

    log_error("engine", "%s; failing %u requests", why->text, atomic_load(&e->n_inside));
    atomic_store(&e->failed, true);
    accept_requests(e);
    while ((q = scheduler_at(e->scheduler, 0)) != NULL) {
        q->req->finish = FINISH_ERROR;
        q->req->error = *why;
        end_sequence(e, q);
    }
}

static bool has_work(const struct engine *e)
{
    return scheduler_running(e->scheduler) + scheduler_waiting(e->scheduler) > 0;
}

/* What the copy engine has brought since the last time.  Without work as well: until it is taken
 * in, a block that was copied is in use, and a lost device nobody's concern. */
static void take_in_copies(struct engine *e)
{
    struct residency_context *r = &e->residency;
    struct sequence *oldest = scheduler_oldest(e->scheduler);
    struct error err;

    if (!r->tier)
        return;
    host_tier_collect(r->tier);
    if (host_tier_failure(r->tier, &err) != ST_OK) {
        if (has_work(e) || !atomic_load(&e->failed))
            fail_all(e, &err);
        return;
    }
    for (struct sequence *q = oldest; q; q = q->younger)
        residency_hold_arrived(r, q);
    for (struct sequence *q = oldest; q; q = q->younger)
        residency_load_rest(r, q);
    /* What streams may be waiting for room that its own blocks take. */
    for (struct sequence *q = oldest; q; q = q->younger)
        if (q->residency == STREAMED)
            residency_store(r, q);
}

static void absorb(struct engine *e, const struct step_plan *plan, uint64_t now_ns)
{
    struct step_counts counts = { 0 };

    for (uint32_t i = 0; i < plan->n_slices; i++) {
        struct sequence *q = plan->slices[i].seq;
        uint32_t known = q->n_tokens;
        bool finished = step_absorb(&e->step, &plan->slices[i], &counts, now_ns);
        residency_store(&e->residency, q);
        if (q->n_tokens > known)
            publish_output(e, q);
        if (finished)
            end_sequence(e, q);
    }
    e->stats.prompt_tokens += counts.prompt_tokens;
    e->stats.output_tokens += counts.output_tokens;
    e->stats.sparse_rows += counts.sparse_rows;
    e->stats.dense_rows += counts.dense_rows;
}

static void count_size(struct engine_stats *s, const struct step_plan *plan)
{
    uint32_t rows = 0;
    int size = 0;

    for (uint32_t i = 0; i < plan->n_slices; i++)
        rows += plan->slices[i].n_tokens;
    while (size < STEP_SIZES - 1 && rows > UINT32_C(1) << size)
        size++;
    s->step_sizes[size]++;
    s->step_rows += rows;
}

static void sleep_until_woken(struct engine *e)
{
    uint64_t count;

    while (read(e->wake_fd, &count, sizeof count) < 0)
        ASSERT(errno == EINTR);
    /* The watchdog measures from here on, not from before the sleep. */
    e->stats.last_step_ns = e->host_from_ns = clock_now_ns();
}

/* The host tier has no room for a sequence that streams, and nobody else takes any of it. */
static void fail_for_room(struct engine *e, struct sequence *q)
{
    error_set(&q->req->error, ST_BUSY, "the host tier has no room for a context of %u tokens",
              q->n_tokens);
    q->req->finish = FINISH_ERROR;
    end_sequence(e, q);
}

/* Everybody waits for blocks that are being copied.  Where some could not be begun, because a slot
 * went to somebody else, the youngest makes room; so does who was preempted for this step. */
static void wait_for_blocks(struct engine *e, struct step_plan *plan)
{
    if (plan->n_preempted > 0)
        return;
    ASSERT(e->residency.tier);
    if (host_tier_under_way(e->residency.tier) > 0 || host_tier_grows(e->residency.tier)) {
        engine_publish(e);           /* who looks meanwhile sees that they wait */
        sleep_until_woken(e);
        return;
    }
    ASSERT(scheduler_running(e->scheduler) > 0);
    if (scheduler_running(e->scheduler) > 1)
        scheduler_put_back(e->scheduler, plan);
    else
        fail_for_room(e, scheduler_oldest(e->scheduler));
}

/* Only one sequence runs, and streams. */
static bool streams_alone(const struct engine *e)
{
    const struct sequence *q = scheduler_oldest(e->scheduler);

    return q && !q->younger && q->residency == STREAMED;
}

static void step(struct engine *e)
{
    struct step_budget budget = {
        .tokens = streams_alone(e) ? e->alone_tokens : e->step_tokens,
        .logit_rows = e->max_logit_rows, .drop = drop_preempted,
        .offload = e->residency.sets ? offload : NULL, .arg = e,
    };
    uint64_t began_ns = clock_now_ns(), waited_ns = model_waited_ns(e->model);
    struct error err;

    see_room(e, &budget);
    struct step_plan *plan = scheduler_plan(e->scheduler, &budget);
    admit(e, plan);
    bring_back(e, plan);
    if (plan->n_slices == 0) {
        wait_for_blocks(e, plan);
        return;
    }
    if (step_run(&e->step, plan, &err) != ST_OK) {
        fail_all(e, &err);
        return;
    }
    uint64_t now_ns = clock_now_ns();
    absorb(e, plan, now_ns);
    count_size(&e->stats, plan);
    e->stats.steps++;
    e->stats.step_ns += now_ns - began_ns;
    e->stats.step_host_ns += now_ns - e->host_from_ns - (model_waited_ns(e->model) - waited_ns);
    e->host_from_ns = now_ns;
    e->stats.last_step_ns = now_ns;
    if (e->check_invariants) {
        scheduler_check(e->scheduler);
        kv_pool_check(e->pool);
    }
}

void *engine_thread(void *arg)
{
    struct engine *e = arg;

    e->host_from_ns = clock_now_ns();
    while (!atomic_load(&e->stopping)) {
        accept_requests(e);
        drop_cancelled(e, false);
        take_in_copies(e);
        if (has_work(e))
            step(e);
        e->stats.turns++;
        engine_publish(e);
        if (!has_work(e)) {
            sleep_until_woken(e);
            engine_publish(e);
        }
    }
    accept_requests(e);
    drop_cancelled(e, true);
    engine_publish(e);
    return NULL;
}
