#include "engine/run/sequence.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"

#include <string.h>

static uint32_t first_sparse(const struct select_plan *plan, const struct request *req)
{
    uint32_t crossover = (uint32_t)plan->config.crossover_tokens;
    uint32_t at = req->n_prompt > crossover ? req->n_prompt : crossover;

    return select_is_sparse(plan, req->sparse, req->n_prompt, at) ? at : UINT32_MAX;
}

static bool has_penalties(const struct request *r)
{
    return r->presence != 0 || r->frequency != 0 || r->repetition != 1;
}

static struct token_count *count_for(struct sequence *q, int32_t id)
{
    int32_t *slot = &q->count_of[id];

    if (!*slot) {
        q->counts[q->n_counts++] = (struct token_count){ .id = id };
        *slot = (int32_t)q->n_counts;
    }
    return &q->counts[*slot - 1];
}

static void start_counts(struct sequence *q, int vocab)
{
    const struct request *r = q->req;
    size_t most = (size_t)r->n_prompt + r->max_tokens;

    if (most > (size_t)vocab)
        most = (size_t)vocab;
    q->counts = mem_calloc(most, sizeof *q->counts);
    q->count_of = mem_calloc((size_t)vocab, sizeof *q->count_of);
    for (uint32_t i = 0; i < r->n_prompt; i++)
        count_for(q, r->prompt[i])->in_prompt = true;
}

static void start_banned(struct sequence *q, const int32_t *eos, int n_eos)
{
    const struct request *r = q->req;

    q->banned = mem_calloc((size_t)n_eos + r->n_stop_ids + 1, sizeof *q->banned);
    for (int i = 0; i < n_eos; i++)
        q->banned[q->n_banned++] = eos[i];
    for (uint32_t i = 0; i < r->n_stop_ids; i++)
        q->banned[q->n_banned++] = r->stop_ids[i];
}

struct sequence *sequence_create(struct request *req, const struct tokenizer *tok,
                                 const struct select_plan *plan, uint64_t order, int vocab,
                                 const int32_t *eos, int n_eos)
{
    struct sequence *q = mem_calloc(1, sizeof *q);
    size_t most = (size_t)req->n_prompt + req->max_tokens;

    ASSERT(req->n_prompt > 0 && (req->max_tokens > 0 || req->score_prompt));
    ASSERT(!req->score_prompt || (req->n_top >= 0 && req->prompt_chosen));
    q->req = req;
    q->order = order;
    q->group = req->group;
    q->n_prompt = q->n_tokens = req->n_prompt;
    q->sparse_from = first_sparse(plan, req);
    q->scoring = req->score_prompt;
    q->tokens = mem_alloc(most * sizeof *q->tokens);
    memcpy(q->tokens, req->prompt, req->n_prompt * sizeof *q->tokens);
    q->max_blocks = (uint32_t)((most + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
    q->table = mem_alloc(q->max_blocks * sizeof *q->table);
    q->held = mem_calloc(q->max_blocks, sizeof *q->held);
    q->hot_set = q->lagged_slot = -1;
    detokenizer_init(&q->detok, tok, req->skip_special);
    stop_matcher_init(&q->stops, req->stops, req->n_stops, req->include_stop);
    if (has_penalties(req))
        start_counts(q, vocab);
    if (req->min_tokens > 0 && !req->ignore_eos)
        start_banned(q, eos, n_eos);
    if (req->grammar) {
        grammar_matcher_init(&q->grammar, req->grammar);
        q->allowed_words = ((size_t)vocab + 31) / 32;
        q->allowed = mem_calloc(q->allowed_words, sizeof *q->allowed);
    }
    return q;
}

void sequence_destroy(struct sequence *q)
{
    if (!q)
        return;
    ASSERT(q->n_blocks == 0 && q->hot_set < 0 && q->lagged_slot < 0);
    stop_matcher_fini(&q->stops);
    grammar_matcher_fini(&q->grammar);
    mem_free(q->allowed);
    mem_free(q->tokens);
    mem_free(q->table);
    mem_free(q->held);
    mem_free(q->counts);
    mem_free(q->count_of);
    mem_free(q->banned);
    mem_free(q);
}

/* With max_tokens 0 the last prompt row would only give a token nobody wants. */
static uint32_t wanted_tokens(const struct sequence *q)
{
    return q->req->max_tokens == 0 ? q->n_prompt - 1 : q->n_tokens;
}

uint32_t sequence_next_tokens(const struct sequence *q)
{
    uint32_t wanted = wanted_tokens(q);

    if (q->n_computed >= wanted)
        return 0;
    if (q->n_computed >= q->sparse_from)
        return 1;
    return (wanted < q->sparse_from ? wanted : q->sparse_from) - q->n_computed;
}

bool sequence_is_decoding(const struct sequence *q)
{
    return q->n_computed >= q->n_prompt &&
           (q->n_computed >= q->sparse_from || q->n_computed + 1 == q->n_tokens);
}

bool sequence_is_sparse_only(const struct sequence *q)
{
    return q->n_computed >= q->sparse_from;
}

bool sequence_is_ready(const struct sequence *q)
{
    return q->residency != LOADING && q->residency != LOADING_INDEX;
}

uint32_t sequence_wants_blocks(const struct sequence *q)
{
    return q->residency == LOADING ? q->n_blocks - q->n_held : 0;
}

uint32_t sequence_lacks_blocks(const struct sequence *q, uint32_t n)
{
    uint32_t blocks = (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS;

    return blocks > q->n_blocks ? blocks - q->n_blocks : 0;
}

/* As much as a step or two takes: what is computed then makes room. */
enum { PASSING_BLOCKS = 32 };

uint32_t sequence_will_lack_blocks(const struct sequence *q)
{
    uint32_t n = sequence_lacks_blocks(q, q->n_tokens + 1);

    return q->too_long && n > PASSING_BLOCKS ? PASSING_BLOCKS : n;
}

static bool may_share(const struct sequence *q, const struct select_plan *plan, uint32_t block)
{
    return select_may_share(plan, q->req->sparse, q->n_prompt, block * BLOCK_TOKENS);
}

static struct block_name name_of(const struct sequence *q, const struct select_plan *plan,
                                 uint32_t block)
{
    return (struct block_name){
        .parent = block ? q->table[block - 1] : KV_BLOCK_NONE,
        .tokens = q->tokens + (size_t)block * BLOCK_TOKENS,
        .provenance = select_provenance(plan, q->req->sparse, q->n_prompt,
                                        block * BLOCK_TOKENS),
        .salt = q->req->cache_salt,
    };
}

void sequence_hold(struct sequence *q, struct kv_pool *pool, uint32_t i)
{
    ASSERT(i < q->n_blocks && !q->held[i]);
    kv_pool_hold(pool, q->table[i]);
    q->held[i] = true;
    q->n_held++;
}

void sequence_release(struct sequence *q, struct kv_pool *pool, uint32_t i)
{
    ASSERT(i < q->n_blocks && q->held[i]);
    kv_pool_release(pool, q->table[i]);
    q->held[i] = false;
    q->n_held--;
}

void sequence_attach(struct sequence *q, struct kv_pool *pool, const struct select_plan *plan)
{
    ASSERT(q->n_blocks == 0 && q->n_computed == 0);
    q->residency = ON_DEVICE;
    if (q->scoring)
        return;
    while ((q->n_blocks + 1) * BLOCK_TOKENS < q->n_tokens && may_share(q, plan, q->n_blocks)) {
        struct block_name name = name_of(q, plan, q->n_blocks);
        kv_block b = kv_pool_find(pool, &name);
        if (b == KV_BLOCK_NONE)
            break;
        q->table[q->n_blocks++] = b;
        if (kv_pool_place(pool, b).kv >= 0)
            sequence_hold(q, pool, q->n_blocks - 1);
        else
            q->residency = LOADING;
    }
    q->n_sealed = q->n_blocks;
    q->n_computed = q->n_blocks * BLOCK_TOKENS;
}

/* From the end: what the pool reclaims first is then the end of the chain. */
void sequence_drop_blocks(struct sequence *q, struct kv_pool *pool)
{
    for (; q->n_blocks > 0; q->n_blocks--) {
        uint32_t last = q->n_blocks - 1;
        if (q->held[last])
            sequence_release(q, pool, last);
        kv_pool_unpin(pool, q->table[last]);
    }
    q->n_sealed = q->n_stored = q->n_computed = 0;
    q->n_drops++;
}

void sequence_grow(struct sequence *q, struct kv_pool *pool, uint32_t n)
{
    uint32_t lacks = sequence_lacks_blocks(q, n);

    if (lacks == 0)
        return;
    ASSERT(q->n_blocks + lacks <= q->max_blocks);
    enum status st = kv_pool_take(pool, lacks, q->table + q->n_blocks);
    ASSERT(st == ST_OK);
    for (uint32_t i = 0; i < lacks; i++)
        q->held[q->n_blocks + i] = true;
    q->n_blocks += lacks;
    q->n_held += lacks;
}

void sequence_advance(struct sequence *q, struct kv_pool *pool, const struct select_plan *plan,
                      uint32_t n)
{
    q->n_computed += n;
    ASSERT(q->n_computed <= q->n_tokens);
    while ((q->n_sealed + 1) * BLOCK_TOKENS <= q->n_computed) {
        struct block_name name = name_of(q, plan, q->n_sealed);
        q->table[q->n_sealed] = kv_pool_seal(pool, q->table[q->n_sealed],
                                             may_share(q, plan, q->n_sealed) ? &name : NULL);
        q->n_sealed++;
    }
}

static void store_top(struct token_logprob *to, int32_t n_top, const struct sample_result *r)
{
    for (int32_t i = 0; i < n_top; i++)
        to[i] = i < r->n_top ? r->top[i] : (struct token_logprob){ .id = -1 };
}

void sequence_append(struct sequence *q, const struct sample_result *r)
{
    struct request *req = q->req;
    uint32_t i = q->n_tokens - q->n_prompt;

    ASSERT(i < req->max_tokens);
    q->tokens[q->n_tokens++] = r->token;
    req->output[i] = r->token;
    if (req->n_top >= 0)
        req->chosen[i] = (struct token_logprob){ r->token, r->logprob };
    if (req->n_top > 0)
        store_top(req->top + (size_t)i * (size_t)req->n_top, req->n_top, r);
    if (q->counts)
        count_for(q, r->token)->in_output++;
}

void sequence_sample_params(const struct sequence *q, struct sample_params *out)
{
    const struct request *r = q->req;
    uint32_t n_output = q->n_tokens - q->n_prompt;

    *out = (struct sample_params){
        .temperature = r->temperature, .top_p = r->top_p, .min_p = r->min_p,
        .presence = r->presence, .frequency = r->frequency, .repetition = r->repetition,
        .top_k = r->top_k, .seed = r->seed, .index = n_output, .target = -1,
        .n_top = r->n_top, .bias = r->bias, .n_bias = r->n_bias,
        .counts = q->counts, .n_counts = q->n_counts, .allowed = q->allowed,
    };
    if (n_output < r->min_tokens) {
        out->banned = q->banned;
        out->n_banned = q->n_banned;
    }
}

/* 1 if that changed it. */
static uint32_t set_allowed(struct sequence *q, int32_t id, bool allowed)
{
    uint32_t *word = &q->allowed[id / 32], bit = UINT32_C(1) << id % 32;
    bool was = *word & bit;

    *word = allowed ? *word | bit : *word & ~bit;
    return was != allowed;
}

/* eos is no text, whatever it is spelled like: it comes where the text may end and not before.
 * Of the request's own stop ids that goes for those that are special. */
void sequence_make_mask(struct sequence *q, const struct token_trie *trie, const int32_t *eos,
                        int n_eos)
{
    const struct request *r = q->req;
    bool too_few = q->n_tokens - q->n_prompt < r->min_tokens;
    bool may_end = !r->ignore_eos && !too_few && grammar_matcher_may_end(&q->grammar);
    uint32_t n = 0;

    q->mask_status = grammar_matcher_mask(&q->grammar, trie, q->allowed, q->allowed_words, &n);
    if (q->mask_status != ST_OK)
        return;
    for (int i = 0; i < n_eos; i++)
        n -= set_allowed(q, eos[i], false);
    for (uint32_t i = 0; too_few && i < q->n_banned; i++)
        n -= set_allowed(q, q->banned[i], false);
    for (int i = 0; may_end && i < n_eos; i++)
        n += set_allowed(q, eos[i], true);
    for (uint32_t i = 0; may_end && i < r->n_stop_ids; i++)
        if (tokenizer_is_special(q->detok.tok, r->stop_ids[i]))
            n += set_allowed(q, r->stop_ids[i], true);
    if (n == 0)
        q->mask_status = ST_INVALID;
}

void sequence_score_params(const struct sequence *q, uint32_t position,
                           struct sample_params *out)
{
    ASSERT(position + 1 < q->n_prompt);
    *out = (struct sample_params){
        .repetition = 1, .top_p = 1, .target = q->tokens[position + 1], .n_top = q->req->n_top,
    };
}

/* The row at a position foretells the token after it. */
void sequence_store_score(struct sequence *q, uint32_t position, const struct sample_result *r)
{
    struct request *req = q->req;
    size_t i = (size_t)position + 1;

    req->prompt_chosen[i] = (struct token_logprob){ r->token, r->logprob };
    if (req->n_top > 0)
        store_top(req->prompt_top + i * (size_t)req->n_top, req->n_top, r);
}
