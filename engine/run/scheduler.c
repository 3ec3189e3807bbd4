#include "engine/run/scheduler.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"

/* Two lists, both by order of arrival, oldest first.  A newcomer belongs at
 * the end and a preempted sequence near the front of the waiting ones, so
 * inserting walks from the young end or the old end and is short. */
struct queue {
    struct sequence *oldest, *youngest;
    uint32_t n;
};

struct scheduler {
    uint32_t max_running;
    struct queue running, waiting;
    struct step_slice *slices;      /* [max_running] */
    struct step_plan plan;
};

static void queue_insert(struct queue *q, struct sequence *seq)
{
    struct sequence *before = q->youngest;

    while (before && before->order > seq->order)
        before = before->older;
    seq->older = before;
    seq->younger = before ? before->younger : q->oldest;
    if (seq->younger)
        seq->younger->older = seq;
    else
        q->youngest = seq;
    if (before)
        before->younger = seq;
    else
        q->oldest = seq;
    q->n++;
}

static void queue_remove(struct queue *q, struct sequence *seq)
{
    if (seq->older)
        seq->older->younger = seq->younger;
    else
        q->oldest = seq->younger;
    if (seq->younger)
        seq->younger->older = seq->older;
    else
        q->youngest = seq->older;
    seq->older = seq->younger = NULL;
    ASSERT(q->n > 0);
    q->n--;
}

struct scheduler *scheduler_create(uint32_t max_running)
{
    struct scheduler *sc = mem_calloc(1, sizeof *sc);

    ASSERT(max_running > 0);
    sc->max_running = max_running;
    sc->slices = mem_calloc(max_running, sizeof *sc->slices);
    return sc;
}

void scheduler_destroy(struct scheduler *sc)
{
    if (!sc)
        return;
    ASSERT(sc->running.n == 0 && sc->waiting.n == 0);
    mem_free(sc->slices);
    mem_free(sc);
}

void scheduler_add(struct scheduler *sc, struct sequence *seq)
{
    seq->state = SEQ_WAITING;
    queue_insert(&sc->waiting, seq);
}

void scheduler_remove(struct scheduler *sc, struct sequence *seq)
{
    queue_remove(seq->state == SEQ_RUNNING ? &sc->running : &sc->waiting, seq);
}

/* ---- one slice */

/* Logit rows of a slice: its last row if that reaches the last known token, and
 * for scoring all rows of the prompt that have a successor in it. */
static uint32_t logit_rows(const struct sequence *q, uint32_t n)
{
    uint32_t end = q->n_computed + n, rows = end == q->n_tokens;

    if (q->scoring && q->n_computed + 1 < q->n_prompt)
        rows += (end < q->n_prompt ? end : q->n_prompt - 1) - q->n_computed;
    return rows;
}

/* The largest slice of at most limit tokens that the budget allows. */
static uint32_t slice_tokens(const struct sequence *q, const struct step_budget *left)
{
    uint32_t want = sequence_next_tokens(q), n = want < left->tokens ? want : left->tokens;

    if (q->scoring && n + 1 > left->logit_rows)
        n = left->logit_rows > 0 ? left->logit_rows - 1 : 0;
    if (n < want) {
        /* Cut at a block, unless not even one would be finished. */
        uint32_t over = (q->n_computed + n) % BLOCK_TOKENS;
        if (n > over)
            n -= over;
    }
    return logit_rows(q, n) <= left->logit_rows ? n : 0;
}

/* Blocks that no slice has claimed. */
static uint32_t unclaimed(const struct step_plan *p)
{
    return p->left.blocks > p->planned_blocks ? p->left.blocks - p->planned_blocks : 0;
}

static void add_slice(struct scheduler *sc, struct sequence *seq, uint32_t n)
{
    struct step_plan *p = &sc->plan;
    uint32_t blocks = sequence_lacks_blocks(seq, seq->n_computed + n);

    ASSERT(n <= p->left.tokens && blocks <= unclaimed(p) && p->n_slices < sc->max_running);
    p->left.tokens -= n;
    p->planned_blocks += blocks;
    p->left.logit_rows -= logit_rows(seq, n);
    p->slices[p->n_slices++] = (struct step_slice){ .seq = seq, .n_tokens = n };
}

/* ---- running sequences */

/* Take back the slice of a sequence, if it has one. */
static void unplan(struct scheduler *sc, const struct sequence *seq)
{
    struct step_plan *p = &sc->plan;

    for (uint32_t i = 0; i < p->n_slices; i++) {
        if (p->slices[i].seq != seq)
            continue;
        uint32_t n = p->slices[i].n_tokens;
        p->left.tokens += n;
        p->left.logit_rows += logit_rows(seq, n);
        p->planned_blocks -= sequence_lacks_blocks(seq, seq->n_computed + n);
        p->slices[i] = p->slices[--p->n_slices];
        return;
    }
}

static void preempt(struct scheduler *sc, struct sequence *seq)
{
    struct step_plan *p = &sc->plan;

    unplan(sc, seq);
    queue_remove(&sc->running, seq);
    seq->state = SEQ_WAITING;
    queue_insert(&sc->waiting, seq);
    p->left.drop(&p->left, seq);
    p->n_preempted++;
}

/* Of two that can leave the device the one with more to give; of equals the younger. */
static bool goes_before(const struct sequence *a, const struct sequence *b)
{
    return a->n_held != b->n_held ? a->n_held > b->n_held : a->order > b->order;
}

/* Let the longest sequence leave the device that can. */
static bool offload_one(struct scheduler *sc)
{
    struct step_plan *p = &sc->plan;
    const struct sequence *refused = NULL;

    while (p->left.offload) {
        struct sequence *longest = NULL;
        for (struct sequence *s = sc->running.oldest; s; s = s->younger)
            if ((s->residency == ON_DEVICE || s->residency == RETURNING) &&
                sequence_is_sparse_only(s) && (!refused || goes_before(refused, s)) &&
                (!longest || goes_before(s, longest)))
                longest = s;
        if (!longest)
            return false;
        if (p->left.offload(&p->left, longest))
            return true;
        refused = longest;
    }
    return false;
}

/* Make room for n tokens more of seq by offloading, then by preempting the youngest.  False
 * when that was seq itself, or when it waits for blocks that others left and that are being
 * copied: preempting more would free what nobody needs.  Alone it has room for all it may become,
 * but for such blocks. */
static bool make_room(struct scheduler *sc, struct sequence *seq, uint32_t n)
{
    struct step_plan *p = &sc->plan;
    uint32_t lacks = sequence_lacks_blocks(seq, seq->n_computed + n);

    if (p->waits && lacks > 0)
        return false;            /* what there is is for who waits already */
    while (lacks > unclaimed(p)) {
        if (offload_one(sc))
            continue;
        p->waits = lacks <= unclaimed(p) + p->left.clearing;
        if (p->waits)
            return false;
        struct sequence *victim = sc->running.youngest;
        if (victim == sc->running.oldest || (victim == seq && seq->too_long))
            return false;        /* its own blocks are on their way to the host */
        preempt(sc, victim);
        if (victim == seq)
            return false;
    }
    return true;
}

static void plan_running(struct scheduler *sc, bool decoding)
{
    for (struct sequence *seq = sc->running.oldest, *younger; seq; seq = younger) {
        if (!sequence_is_ready(seq) || sequence_is_decoding(seq) != decoding) {
            younger = seq->younger;
            continue;
        }
        uint32_t n = slice_tokens(seq, &sc->plan.left);
        /* Making room may preempt anyone younger; what follows seq is read after. */
        bool kept = n == 0 || make_room(sc, seq, n);
        if (kept && n > 0)
            add_slice(sc, seq, n);
        younger = seq->state == SEQ_RUNNING ? seq->younger : NULL;
    }
}

void scheduler_put_back(struct scheduler *sc, struct step_plan *plan)
{
    ASSERT(plan == &sc->plan && sc->running.n > 0);
    preempt(sc, sc->running.youngest);
}

struct step_plan *scheduler_plan(struct scheduler *sc, const struct step_budget *budget)
{
    sc->plan = (struct step_plan){ .slices = sc->slices, .left = *budget };
    plan_running(sc, true);
    plan_running(sc, false);
    return &sc->plan;
}

/* ---- admission */

static bool group_is_in_prefill(const struct scheduler *sc, uint64_t group)
{
    for (const struct sequence *s = sc->running.youngest; s && group; s = s->older)
        if (s->group == group && s->n_computed < s->n_prompt)
            return true;
    return false;
}

struct sequence *scheduler_next(const struct scheduler *sc, const struct step_plan *plan)
{
    if (sc->running.n >= sc->max_running || plan->left.tokens == 0 || plan->n_preempted > 0 ||
        plan->waits)
        return NULL;
    struct sequence *s = sc->waiting.oldest;
    while (s && group_is_in_prefill(sc, s->group))
        s = s->younger;
    return s;
}

/* Blocks that running sequences lack for what they know already, and one each
 * to go on with, beyond what this step's slices take. */
static uint32_t promised_blocks(const struct scheduler *sc, const struct step_plan *p)
{
    uint32_t promised = 0;

    for (const struct sequence *s = sc->running.oldest; s; s = s->younger)
        promised += sequence_will_lack_blocks(s);
    for (uint32_t i = 0; i < p->n_slices; i++) {
        const struct sequence *s = p->slices[i].seq;
        uint32_t taken = sequence_lacks_blocks(s, s->n_computed + p->slices[i].n_tokens);
        promised -= taken < promised ? taken : promised;
    }
    return promised;
}

uint32_t scheduler_spare_blocks(const struct scheduler *sc, const struct step_plan *p)
{
    uint32_t promised = promised_blocks(sc, p), free = unclaimed(p);

    return free > promised ? free - promised : 0;
}

/* Whether the pool can hold all known tokens and one more block of it, beside what was promised,
 * and what its first slice of n tokens takes.  Alone it may have all there is: the pool holds the
 * longest context, and of one that is longer what is in the way is its own and leaves when it runs.
 */
static bool has_room(const struct scheduler *sc, const struct step_plan *p,
                     const struct sequence *seq, uint32_t n)
{
    uint32_t loads = sequence_wants_blocks(seq);

    if (sc->running.n == 0 && seq->too_long)
        return true;
    if (sc->running.n > 0 && loads + sequence_will_lack_blocks(seq) +
                                 promised_blocks(sc, p) > unclaimed(p))
        return false;
    return loads + sequence_lacks_blocks(seq, seq->n_computed + n) <= unclaimed(p);
}

/* A step can stream one sequence. */
static bool streams(const struct scheduler *sc)
{
    for (const struct sequence *s = sc->running.oldest; s; s = s->younger)
        if (s->too_long && !sequence_is_sparse_only(s))
            return true;
    return false;
}

bool scheduler_admit(struct scheduler *sc, struct step_plan *plan, struct sequence *seq)
{
    uint32_t n = slice_tokens(seq, &plan->left);

    if (n == 0 || (seq->too_long && streams(sc)))
        return false;
    while (!has_room(sc, plan, seq, n))
        if (!offload_one(sc))
            return false;
    queue_remove(&sc->waiting, seq);
    seq->state = SEQ_RUNNING;
    queue_insert(&sc->running, seq);
    if (sequence_is_ready(seq) &&
        sequence_lacks_blocks(seq, seq->n_computed + n) <= unclaimed(plan))
        add_slice(sc, seq, n);
    return true;
}

/* ---- looking */

struct sequence *scheduler_at(const struct scheduler *sc, uint32_t i)
{
    struct sequence *s = i < sc->running.n ? sc->running.oldest : sc->waiting.oldest;

    if (i >= sc->running.n)
        i -= sc->running.n;
    while (s && i-- > 0)
        s = s->younger;
    return s;
}

struct sequence *scheduler_oldest(const struct scheduler *sc)
{
    return sc->running.oldest;
}

uint32_t scheduler_running(const struct scheduler *sc)
{
    return sc->running.n;
}

uint32_t scheduler_waiting(const struct scheduler *sc)
{
    return sc->waiting.n;
}

static void check_queue(const struct queue *q, enum sequence_state state)
{
    const struct sequence *before = NULL;
    uint32_t n = 0;

    for (const struct sequence *s = q->oldest; s; before = s, s = s->younger, n++) {
        ASSERT(s->state == state && s->older == before);
        ASSERT(!before || before->order < s->order);
        ASSERT(state == SEQ_RUNNING || s->n_blocks == 0);
        ASSERT(s->n_computed <= s->n_blocks * BLOCK_TOKENS);
        ASSERT(s->n_computed <= s->n_tokens);
    }
    ASSERT(q->youngest == before && q->n == n);
}

void scheduler_check(const struct scheduler *sc)
{
    check_queue(&sc->running, SEQ_RUNNING);
    check_queue(&sc->waiting, SEQ_WAITING);
    ASSERT(sc->running.n <= sc->max_running);
}
