#include "engine/run/step.h"

#include "engine/base/invariant.h"
#include "engine/kv/lagged_lists.h"
#include "engine/run/selection_dump.h"

#include <stdlib.h>

static bool slice_is_sparse(const struct step_slice *s)
{
    return s->seq->n_computed >= s->seq->sparse_from;
}

/* The first row of the slice that is scored, and how many are. */
static uint32_t scored_rows(const struct step_slice *s, uint32_t *first)
{
    const struct sequence *q = s->seq;
    uint32_t end = q->n_computed + s->n_tokens;

    *first = q->n_computed > q->n_scored ? q->n_computed : q->n_scored;
    if (end > q->n_prompt - 1)
        end = q->n_prompt - 1;
    return q->scoring && end > *first ? end - *first : 0;
}

static bool slice_samples(const struct step_slice *s)
{
    return s->seq->n_computed + s->n_tokens == s->seq->n_tokens &&
           s->seq->n_tokens - s->seq->n_prompt < s->seq->req->max_tokens;
}

/* kv, index: the tables of the sequence. */
static void pack_rows(struct model_batch *b, const struct step_slice *s, const int32_t *kv,
                      const int32_t *index)
{
    const struct sequence *q = s->seq;
    int row = b->rows;

    for (uint32_t i = 0; i < s->n_tokens; i++, row++) {
        uint32_t position = q->n_computed + i;
        b->ids[row] = q->tokens[position];
        b->positions[row] = (int32_t)position;
        b->kv_block[row] = kv[position / BLOCK_TOKENS];
        b->index_block[row] = index[position / BLOCK_TOKENS];
    }
    b->rows = row;
}

static void pack_logits(struct model_batch *b, const struct step_slice *s, int first_row)
{
    const struct sequence *q = s->seq;
    uint32_t first, n = scored_rows(s, &first);

    for (uint32_t p = first; p < first + n; p++) {
        b->rows_of[b->logit_rows] = first_row + (int32_t)(p - q->n_computed);
        sequence_score_params(q, p, &b->sample[b->logit_rows++]);
    }
    if (slice_samples(s)) {
        b->rows_of[b->logit_rows] = first_row + (int32_t)s->n_tokens - 1;
        sequence_sample_params(q, &b->sample[b->logit_rows++]);
    }
}

static int compare_ints(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;

    return (x > y) - (x < y);
}

/* The blocks that the table says -1 of pass through: in the order of their host slots, so that
 * neighbours are copied together. */
static void pack_staged(const struct step_context *cx, struct model_batch *b,
                        const struct sequence *q, int32_t *kv)
{
    for (uint32_t i = 0; i < q->n_blocks; i++)
        if (kv[i] < 0)
            b->staged[b->n_staged++] = kv_pool_place(cx->pool, q->table[i]).host;
    qsort(b->staged, (size_t)b->n_staged, sizeof *b->staged, compare_ints);
    for (uint32_t i = 0; i < q->n_blocks; i++) {
        if (kv[i] >= 0)
            continue;
        int32_t slot = kv_pool_place(cx->pool, q->table[i]).host;
        const int32_t *at = bsearch(&slot, b->staged, (size_t)b->n_staged, sizeof slot,
                                    compare_ints);
        kv[i] = -2 - (int32_t)(at - b->staged);
    }
}

/* Leading blocks whose places the batch's tables have.  Asking the pool for each block of long
 * contexts takes longer than all else that the host does in a step. */
static uint32_t packed_before(const struct step_context *cx, const struct sequence *q, int at)
{
    const struct packed_table *p = &cx->packed[at];
    bool known = p->n > 0 && p->order == q->order && p->n_drops == q->n_drops &&
                 p->version == kv_pool_version(cx->pool) && p->with_host == (q->hot_set >= 0);

    return known ? p->n : 0;
}

/* What is sealed stays the same block.  Where a block is read also depends on whether it is held
 * with only_held, and what streams has other numbers in its table. */
static void remember_packed(const struct step_context *cx, const struct sequence *q, int at)
{
    bool stays = !cx->only_held && q->residency != STREAMED;

    cx->packed[at] = (struct packed_table){
        .order = q->order, .version = kv_pool_version(cx->pool), .n_drops = q->n_drops,
        .n = stays ? q->n_sealed : 0, .with_host = q->hot_set >= 0,
    };
}

static void pack_tables(const struct step_context *cx, struct model_batch *b,
                        const struct sequence *q, int at)
{
    size_t table = (size_t)at * cx->max_blocks;

    if (b->hot_set)
        b->hot_set[at] = q->residency == STREAMED ? -1 : q->hot_set;
    for (uint32_t i = packed_before(cx, q, at); i < q->n_blocks; i++) {
        struct block_place place = kv_pool_place(cx->pool, q->table[i]);
        bool there = q->held[i] || (place.kv >= 0 && !(cx->only_held && place.host >= 0));
        ASSERT(there || (q->hot_set >= 0 && place.host >= 0));
        b->kv_table[table + i] = there ? place.kv : -1;
        b->index_table[table + i] = place.index;
        if (q->hot_set >= 0)
            b->host_table[table + i] = place.host;
    }
    remember_packed(cx, q, at);
    if (q->residency == STREAMED)
        pack_staged(cx, b, q, b->kv_table + table);
}

/* The sequence's blocks of the step before; in its first sparse step a slot that has none. */
static void pack_lagged(const struct step_context *cx, struct model_batch *b, struct step_slice *s,
                        int at)
{
    struct lagged_lists *lists = model_lagged_lists(cx->model);
    struct sequence *q = s->seq;

    if (!lists)
        return;
    if (slice_is_sparse(s) && q->lagged_slot < 0)
        q->lagged_slot = lagged_lists_acquire(lists, cx->stream);
    b->lagged_slot[at] = q->lagged_slot;
}

void step_release(const struct step_context *cx, struct sequence *q)
{
    if (q->lagged_slot >= 0)
        lagged_lists_release(model_lagged_lists(cx->model), q->lagged_slot);
    q->lagged_slot = -1;
}

static void pack_slice(const struct step_context *cx, struct model_batch *b,
                       struct step_slice *s)
{
    const struct sequence *q = s->seq;
    int at = b->seqs++, first_row = b->rows;
    size_t table = (size_t)at * cx->max_blocks;

    b->first_row[at] = first_row;
    b->n_rows[at] = (int32_t)s->n_tokens;
    b->n_tokens[at] = (int32_t)(q->n_computed + s->n_tokens);
    pack_tables(cx, b, q, at);
    pack_lagged(cx, b, s, at);
    if (cx->dump && slice_is_sparse(s))
        selection_dump_add(cx->dump, s->seq, at);
    s->first_result = b->logit_rows;
    pack_rows(b, s, b->kv_table + table, b->index_table + table);
    pack_logits(b, s, first_row);
}

/* In the order in which a batch has them (model.h). */
enum { SPARSE_SLICE, DENSE_SLICE, STREAMED_SLICE, SLICE_KINDS };

static int kind_of(const struct step_slice *s)
{
    if (slice_is_sparse(s))
        return SPARSE_SLICE;
    return s->seq->residency == STREAMED ? STREAMED_SLICE : DENSE_SLICE;
}

/* ---- masks of grammars */

struct masks {
    const struct step_context *cx;
    const struct step_plan *plan;
};

static bool wants_mask(const struct step_slice *s)
{
    return s->seq->req->grammar && slice_samples(s);
}

/* Which tokens can come next is known when the token before is, and takes as much as milliseconds
 * to find out.  So it is done when the forward pass is under way: a GPU computes meanwhile. */
static void make_masks(void *arg)
{
    const struct masks *m = arg;

    for (uint32_t i = 0; i < m->plan->n_slices; i++)
        if (wants_mask(&m->plan->slices[i]))
            sequence_make_mask(m->plan->slices[i].seq, m->cx->trie, m->cx->eos, m->cx->n_eos);
}

enum status step_run(const struct step_context *cx, struct step_plan *plan, struct error *err)
{
    struct model_batch *b = model_batch(cx->model);
    struct masks masks = { cx, plan };

    b->rows = b->seqs = b->sparse_seqs = b->logit_rows = b->n_staged = 0;
    for (uint32_t i = 0; i < plan->n_slices; i++) {
        const struct step_slice *s = &plan->slices[i];
        sequence_grow(s->seq, cx->pool, s->seq->n_computed + s->n_tokens);
        if (wants_mask(s))
            b->before_sample = make_masks;
    }
    b->before_sample_arg = &masks;
    if (cx->dump)
        selection_dump_begin(cx->dump);
    for (int kind = 0; kind < SLICE_KINDS; kind++) {
        for (uint32_t i = 0; i < plan->n_slices; i++)
            if (kind_of(&plan->slices[i]) == kind)
                pack_slice(cx, b, &plan->slices[i]);
        if (kind == SPARSE_SLICE)
            b->sparse_seqs = b->seqs;
    }
    enum status st = model_step(cx->model, cx->stream, cx->pool, err);
    b->before_sample = NULL;     /* its argument ends here */
    return st;
}

/* ---- results */

static bool is_stop_id(const struct step_context *cx, const struct request *r, int32_t id)
{
    if (r->ignore_eos)
        return false;
    for (int i = 0; i < cx->n_eos; i++)
        if (cx->eos[i] == id)
            return true;
    for (uint32_t i = 0; i < r->n_stop_ids; i++)
        if (r->stop_ids[i] == id)
            return true;
    return false;
}

/* Whether the text of the new token completes a stop string. */
static bool stops_by_string(struct sequence *q, int32_t id)
{
    struct request *r = q->req;

    if (r->n_stops == 0)
        return false;
    char *room = stop_matcher_room(&q->stops, detokenizer_max_bytes(&q->detok, id));
    size_t n = detokenizer_push(&q->detok, id, room);
    r->stopped_by_string = stop_matcher_push(&q->stops, n, &r->text_bytes);
    if (r->stopped_by_string < 0)
        return false;
    if (q->n_tokens - q->n_prompt > r->min_tokens)
        return true;
    /* A stop string before min_tokens is text like any other. */
    r->stopped_by_string = -1;
    r->text_bytes = 0;
    stop_matcher_forget(&q->stops);
    return false;
}

static bool finish(struct request *r, enum finish how)
{
    r->finish = how;
    return true;
}

/* Before the token is taken in: whether there is one.  Where the text may end and nothing else is
 * left, as for a model without an eos, it ends. */
static bool fail_mask(struct sequence *q, const struct sample_result *result)
{
    struct request *r = q->req;
    int32_t id = result->token;

    if (!r->grammar)
        return false;
    if (q->mask_status == ST_INVALID && grammar_matcher_may_end(&q->grammar))
        return finish(r, FINISH_STOP);
    if (q->mask_status == ST_NOMEM)
        error_set(&r->error, ST_INVALID, "The structure that was asked for is too complex: it has "
                  "too many states after %u tokens.", q->n_tokens - q->n_prompt);
    else if (q->mask_status != ST_OK || !(q->allowed[id / 32] >> id % 32 & 1))
        error_set(&r->error, ST_INVALID, "After %u tokens no token is left: those that the "
                  "structure allows are banned, or the model has none.",
                  q->n_tokens - q->n_prompt);
    else
        return false;
    return finish(r, FINISH_ERROR);
}

/* Follow the text through its grammar.  False where that fails, which the mask should not let
 * happen: the walk that made it took the same way. */
static bool follow_grammar(struct sequence *q, int32_t id)
{
    size_t n;
    const char *bytes = tokenizer_bytes(q->detok.tok, id, &n);

    return !q->req->grammar || grammar_matcher_advance(&q->grammar, bytes, n);
}

static bool absorb_token(const struct step_context *cx, struct sequence *q,
                         const struct sample_result *result, uint64_t now_ns)
{
    struct request *r = q->req;
    uint32_t n_output = q->n_tokens - q->n_prompt;

    if (result->token < 0) {
        error_set(&r->error, ST_DEVICE, "the model's output at token %u is not a number",
                  n_output);
        return finish(r, FINISH_ERROR);
    }
    if (fail_mask(q, result))
        return true;
    sequence_append(q, result);
    if (n_output == 0)
        r->first_token_ns = now_ns;
    r->last_token_ns = now_ns;
    if (is_stop_id(cx, r, result->token)) {
        r->stopped_by_id = result->token;
        return finish(r, FINISH_STOP);
    }
    if (!follow_grammar(q, result->token)) {
        error_set(&r->error, ST_INVALID, "The structure that was asked for is too complex.");
        return finish(r, FINISH_ERROR);
    }
    if (stops_by_string(q, result->token))
        return finish(r, FINISH_STOP);
    if (r->grammar && grammar_matcher_is_complete(&q->grammar))
        return finish(r, FINISH_STOP);
    if (n_output + 1 == r->max_tokens)
        return finish(r, FINISH_LENGTH);
    return false;
}

static void count_rows(const struct step_slice *s, struct step_counts *counts)
{
    const struct sequence *q = s->seq;
    uint32_t end = q->n_computed + s->n_tokens;
    uint32_t of_prompt = q->n_computed >= q->n_prompt ? 0
                         : (end < q->n_prompt ? end : q->n_prompt) - q->n_computed;

    counts->prompt_tokens += of_prompt;
    if (slice_is_sparse(s))
        counts->sparse_rows++;
    else
        counts->dense_rows += s->n_tokens - of_prompt;
}

bool step_absorb(const struct step_context *cx, const struct step_slice *s,
                 struct step_counts *counts, uint64_t now_ns)
{
    const struct sample_result *result = model_batch(cx->model)->result + s->first_result;
    struct sequence *q = s->seq;
    bool samples = slice_samples(s);
    uint32_t first, n_scored = scored_rows(s, &first);

    count_rows(s, counts);
    for (uint32_t i = 0; i < n_scored; i++)
        sequence_store_score(q, first + i, result++);
    if (n_scored)
        q->n_scored = first + n_scored;
    sequence_advance(q, cx->pool, cx->select, s->n_tokens);
    if (!samples)
        return sequence_next_tokens(q) == 0 && finish(q->req, FINISH_LENGTH);
    uint32_t known = q->n_tokens;
    bool finished = absorb_token(cx, q, result, now_ns);
    counts->output_tokens += q->n_tokens - known;
    return finished;
}
