#include "engine/base/clock.h"
#include "engine/base/invariant.h"
#include "engine/kv/hot_sets.h"
#include "engine/kv/kv_pool.h"
#include "engine/kv/lagged_lists.h"
#include "engine/model/model_parts.h"

/* One step: the forward pass as a list of operations, then sampling.
 *
 *   x = embed(ids)
 *   for each layer
 *       h = norm(x += delta);  q, k, v = linear(h);  rotate, store, index
 *           latent attention: q | kv = linear(h);  q = linear(norm(q)) absorbed;  store kv
 *       attn = attention       full, or in two levels for sparse rows
 *       delta = linear(attn);  h = norm(x += delta)     latent: of each head's values of attn
 *       delta = down(silu(gate(h)) * up(h)), or the weighted sum of that of some experts, or both
 *   logits = head(norm(x += delta)) of the wanted rows; sample
 *
 * The additions to the residual stream are made by the norm that follows them.
 *
 * Past the last layer's attention a row that is not sampled has no reader any
 * more (its K and V are stored), so from there on only the wanted rows are
 * computed, and the attention of that layer only from each sequence's first
 * wanted row on.  A prompt of which nothing is sampled yet ends there. */

/* ---- the batch */

/* A dense sequence reads all of K and V on the device, and so does a dense layer; and a row that
 * were stored nowhere would be missing ever after. */
static void check_sets(const struct model *m)
{
    const struct model_batch *b = &m->batch;
    int n_sets = hot_sets_config(m->hot)->sets;

    for (int s = 0; s < b->seqs; s++) {
        int32_t set = b->hot_set[s];
        ASSERT(set >= -1 && set < n_sets);
        if (set < 0)
            continue;
        ASSERT(s < b->sparse_seqs && m->selects_everywhere && b->kv_block[s] >= 0);
        for (int other = 0; other < s; other++)
            ASSERT(b->hot_set[other] != set);
    }
}

static void check_lagged_slots(const struct model *m)
{
    const struct model_batch *b = &m->batch;

    for (int s = 0; s < b->seqs; s++) {
        ASSERT(b->lagged_slot[s] >= -1 && b->lagged_slot[s] < m->limits.max_seqs);
        ASSERT(s < b->sparse_seqs || b->lagged_slot[s] < 0);
    }
}

static void check_batch(const struct model *m)
{
    const struct model_batch *b = &m->batch;
    const struct model_limits *l = &m->limits;

    ASSERT(b->rows > 0 && b->rows <= l->max_rows && b->seqs > 0 && b->seqs <= l->max_seqs);
    ASSERT(b->sparse_seqs >= 0 && b->sparse_seqs <= b->seqs);
    ASSERT(b->logit_rows >= 0 && b->logit_rows <= l->max_logit_rows);
    ASSERT(b->n_staged >= 0 && b->n_staged <= l->staged_blocks);
    ASSERT(b->n_staged == 0 || b->sparse_seqs < b->seqs);
    for (int r = 0; r < b->rows; r++)
        ASSERT(b->ids[r] >= 0 && b->ids[r] < m->config.vocab && b->positions[r] >= 0);
    for (int s = 0, next = 0; s < b->seqs; s++) {
        ASSERT(b->first_row[s] == next && b->n_rows[s] > 0);
        ASSERT(s >= b->sparse_seqs || b->n_rows[s] == 1);
        next += b->n_rows[s];
        ASSERT(next <= b->rows && b->n_tokens[s] == b->positions[next - 1] + 1);
        ASSERT(b->n_tokens[s] <= l->max_blocks * BLOCK_TOKENS);
        ASSERT(s < b->seqs - 1 || next == b->rows);
    }
    for (int r = 0; r < b->logit_rows; r++)
        ASSERT(b->rows_of[r] >= 0 && b->rows_of[r] < b->rows);
    if (m->hot)
        check_sets(m);
    if (m->lagged)
        check_lagged_slots(m);
}

bool forward_has_sets(const struct model *m)
{
    for (int s = 0; m->hot && s < m->batch.sparse_seqs; s++)
        if (m->batch.hot_set[s] >= 0)
            return true;
    return false;
}

/* True when the wanted rows are all rows in order, as in a step of decodes. */
bool forward_wants_all_rows(const struct model_batch *b)
{
    if (b->logit_rows != b->rows)
        return false;
    for (int r = 0; r < b->rows; r++)
        if (b->rows_of[r] != r)
            return false;
    return true;
}

/* The rows of each sequence that the last layer's attention is for: from the
 * first wanted one on.  Where none is wanted one row is computed for nothing. */
static void find_last_rows(struct model *m)
{
    const struct model_batch *b = &m->batch;
    int32_t *first = m->host_arrays.last_first_row, *n = m->host_arrays.last_n_rows;

    for (int s = 0; s < b->seqs; s++)
        first[s] = b->first_row[s] + b->n_rows[s] - 1;
    for (int r = 0; r < b->logit_rows; r++) {
        int row = b->rows_of[r], low = 0, high = b->seqs - 1;
        while (low < high) {     /* the sequence of the row: the last that starts by then */
            int middle = (low + high + 1) / 2;
            if (b->first_row[middle] <= row)
                low = middle;
            else
                high = middle - 1;
        }
        first[low] = row < first[low] ? row : first[low];
    }
    for (int s = 0; s < b->seqs; s++)
        n[s] = b->first_row[s] + b->n_rows[s] - first[s];
}

static void copy_ints(struct stream *s, int32_t *to, const int32_t *from, size_t n)
{
    if (to != from && n > 0)
        stream_copy(s, to, from, n * sizeof *to);
}

static void upload_batch(struct model *m, struct stream *s, bool has_sets)
{
    const struct model_batch *b = &m->batch;
    const struct step_arrays *h = &m->host_arrays, *d = &m->arrays;
    size_t rows = (size_t)b->rows, seqs = (size_t)b->seqs;
    size_t table = seqs * (size_t)m->limits.max_blocks;

    copy_ints(s, d->ids, h->ids, rows);
    copy_ints(s, d->positions, h->positions, rows);
    copy_ints(s, d->kv_block, h->kv_block, rows);
    copy_ints(s, d->index_block, h->index_block, rows);
    copy_ints(s, d->first_row, h->first_row, seqs);
    copy_ints(s, d->n_rows, h->n_rows, seqs);
    copy_ints(s, d->n_tokens, h->n_tokens, seqs);
    copy_ints(s, d->last_first_row, h->last_first_row, seqs);
    copy_ints(s, d->last_n_rows, h->last_n_rows, seqs);
    copy_ints(s, d->kv_table, h->kv_table, table);
    copy_ints(s, d->index_table, h->index_table, table);
    copy_ints(s, d->rows_of, h->rows_of, (size_t)b->logit_rows);
    if (m->lagged)
        copy_ints(s, d->lagged_slot, h->lagged_slot, seqs);
    if (!has_sets)
        return;
    copy_ints(s, d->host_table, h->host_table, table);
    copy_ints(s, d->hot_set, h->hot_set, seqs);
    copy_ints(s, (int32_t *)d->step, (const int32_t *)h->step, 1);
}

/* ---- operations with the arguments that this pass has */

static void norm(struct pass *p, void *x, const void *delta, struct weight w, int rows)
{
    p->ops->add_norm(p->s, &(struct add_norm_args){
        .out = p->w->h, .x = x, .delta = delta, .weight = w.data, .weight_type = w.type,
        .rows = rows, .dim = p->g->hidden, .eps = p->g->norm_eps });
}

static void linear(struct pass *p, void *out, const void *x, struct weight w,
                   struct weight bias, int rows, int in_dim, int out_dim, int out_stride)
{
    p->ops->linear(p->s, &(struct linear_args){
        .out = out, .x = x, .weight = w.data, .bias = bias.data, .weight_type = w.type,
        .rows = rows, .in_dim = in_dim, .out_dim = out_dim, .out_stride = out_stride });
}

/* Elements of a row of qkv: q, k and v, or of low rank q and kv. */
static int qkv_dim(const struct model_config *g)
{
    if (g->latent.dim)
        return g->latent.q_rank + g->head_dim;
    return (g->heads + 2 * g->kv_heads) * g->head_dim;
}

/* The queries of attention and the elements from row to row of them. */
static const void *queries(const struct pass *p)
{
    return p->g->latent.dim ? p->w->absorbed : p->w->qkv;
}

static int query_stride(const struct pass *p)
{
    return p->g->latent.dim ? p->g->heads * p->g->head_dim : qkv_dim(p->g);
}

/* Where column i of an activation matrix begins. */
static void *column(const struct pass *p, void *x, int i)
{
    return (char *)x + (size_t)i * dtype_bytes(backend_info(p->m->be)->act);
}

/* Rows by number.  Embedding does this to a table; the activations are one. */
static void *gather(struct pass *p, void *out, const void *from, int dim)
{
    p->ops->embed(p->s, &(struct embed_args){
        .out = out, .table = from, .ids = p->a->rows_of,
        .table_type = backend_info(p->m->be)->act, .rows = p->logit_rows, .dim = dim });
    return out;
}

/* table: of d's first sequence and on. */
static void attend_dense(struct pass *p, int layer, const struct dense_rows *d,
                         const int32_t *table)
{
    if (d->seqs == 0)
        return;
    p->ops->attend_dense(p->s, &(struct attend_dense_args){
        .out = p->w->attn, .q = queries(p), .q_stride = query_stride(p),
        .kv = kv_pool_kv(p->pool, layer), .scratch = p->w->attention,
        .table = table,
        .first_row = d->first_row + d->from, .n_rows = d->n_rows + d->from,
        .n_tokens = d->n_tokens + d->from,
        .shape = p->shape, .seqs = d->seqs, .heads = p->g->heads,
        .max_blocks = p->m->limits.max_blocks,
        .max_n_rows = d->most_rows, .max_n_tokens = d->most_tokens,
        .only_last_is_new = p->decodes, .scale = p->g->score_scale });
}

static const int16_t *layer_channels(const struct pass *p, int layer)
{
    if (!p->w->channels)
        return NULL;
    return p->w->channels + (size_t)(layer * p->g->kv_heads) * INDEX_CHANNELS_KEPT;
}

static struct hot_rows layer_hot_rows(const struct pass *p, int layer)
{
    struct hot_rows hot = hot_sets_layer(p->m->hot, layer);

    hot.host_table = p->a->host_table;
    hot.set = p->a->hot_set;
    hot.step = p->a->step;
    return hot;
}

static struct lagged_blocks layer_lagged_blocks(const struct pass *p, int layer)
{
    struct lagged_blocks lagged = lagged_lists_layer(p->m->lagged, layer);

    lagged.slot = p->a->lagged_slot;
    return lagged;
}

/* Both levels for the first sequences, a row each.  Without sets the kernels that look for none. */
static void attend_sparse(struct pass *p, int layer)
{
    const struct select_layer *budget = &p->m->plan.layer[layer];
    const struct select_config *cfg = &p->m->plan.config;
    const bool lags = p->m->lagged != NULL;
    struct lagged_blocks lagged;
    struct hot_rows hot;

    if (p->has_sets)
        hot = layer_hot_rows(p, layer);
    if (lags)
        lagged = layer_lagged_blocks(p, layer);
    p->ops->attend_two_level(p->s, &(struct attend_two_level_args){
        .out = p->w->attn, .q = queries(p), .q_stride = query_stride(p),
        .kv = kv_pool_kv(p->pool, layer), .index = kv_pool_index(p->pool, layer),
        .kv_table = p->a->kv_table, .index_table = p->a->index_table,
        .n_tokens = p->sparse_n_tokens, .channels = layer_channels(p, layer),
        .scratch = p->w->attention, .shape = p->shape, .seqs = p->sparse_seqs,
        .heads = p->g->heads, .max_blocks = p->m->limits.max_blocks,
        .keep_blocks = budget->keep_blocks, .keep_tokens = budget->keep_tokens,
        .sink_tokens = cfg->sink_tokens, .recent_tokens = cfg->recent_tokens,
        .max_n_tokens = p->most_sparse_tokens,
        .scale = p->g->score_scale, .hot = p->has_sets ? &hot : NULL,
        .lagged = lags ? &lagged : NULL,
        .lists = p->m->watcher ? &p->w->lists : NULL });
    if (p->m->watcher)
        p->m->watcher(p->m->watcher_arg, layer, &(struct model_selection){
            .batch = p->b, .step = p->m->step, .q = queries(p), .q_stride = query_stride(p),
            .max_blocks = p->m->limits.max_blocks, .keep_blocks = budget->keep_blocks,
            .keep_tokens = budget->keep_tokens, .lists = p->w->lists });
}

/* ---- sublayers */

static const struct weight no_weight;

/* One product where the weights are joined, else one each into its columns of out. */
static void project_qkv(struct pass *p, const struct layer_weights *l, int rows)
{
    const int hidden = p->g->hidden, stride = qkv_dim(p->g);
    const int q = p->g->heads * p->g->head_dim, kv = p->g->kv_heads * p->g->head_dim;
    void *out = p->w->qkv;

    if (l->joined) {
        linear(p, out, p->w->h, l->q, l->q_bias, rows, hidden, stride, stride);
        return;
    }
    linear(p, out, p->w->h, l->q, l->q_bias, rows, hidden, q, stride);
    linear(p, column(p, out, q), p->w->h, l->k, l->k_bias, rows, hidden, kv, stride);
    linear(p, column(p, out, q + kv), p->w->h, l->v, l->v_bias, rows, hidden, kv, stride);
}

/* delta = down(silu(gate(h)) * up(h)) */
static void dense_mlp(struct pass *p, const struct layer_weights *l, int mlp, int rows)
{
    const struct step_scratch *w = p->w;
    const int hidden = p->g->hidden;

    p->ops->linear_gated(p->s, &(struct linear_gated_args){
        .out = w->mid, .x = w->h, .gate = l->gate.data, .up = l->up.data,
        .weight_type = l->gate.type, .scratch = w->gate_up, .rows = rows,
        .in_dim = hidden, .dim = mlp });
    linear(p, w->delta, w->mid, l->down, no_weight, rows, mlp, hidden, hidden);
}

/* delta = what the experts make of h, the shared one first: it is done with the scratch memory
 * when the others begin.  blocks: those of the rows, or NULL where none is padding. */
static void mixed_mlp(struct pass *p, const struct layer_weights *l, const int32_t *blocks,
                      int rows)
{
    const struct step_scratch *w = p->w;
    const struct moe_config *moe = &p->g->moe;
    const void *shared = moe->shared_mlp > 0 ? w->delta : NULL;

    if (shared)
        dense_mlp(p, l, moe->shared_mlp, rows);
    p->ops->route(p->s, &(struct route_args){
        .experts = w->chosen, .weights = w->chosen_weights, .scores = w->scores, .x = w->h,
        .router = l->router.data, .router_type = l->router.type, .bias = l->router_bias.data,
        .kv_block = blocks, .score = moe->score, .renormalise = moe->renormalise,
        .scale = moe->scale, .rows = rows, .dim = p->g->hidden, .n_experts = moe->experts,
        .n_chosen = moe->chosen });
    p->ops->experts(p->s, &(struct experts_args){
        .out = w->delta, .x = w->h, .add = shared, .experts = w->chosen,
        .weights = w->chosen_weights,
        .matrices = l->experts, .scratch = w->experts, .rows = rows, .dim = p->g->hidden,
        .expert_dim = moe->expert_mlp, .n_experts = moe->experts, .n_chosen = moe->chosen });
}

/* Products of a layer's h; K and V, rotated, into the pool. */
static void project_plain(struct pass *p, const struct layer_weights *l, int layer)
{
    const struct step_scratch *w = p->w;
    const int stride = qkv_dim(p->g);
    const int q = p->g->heads * p->g->head_dim, kv = p->g->kv_heads * p->g->head_dim;

    project_qkv(p, l, p->rows);
    p->ops->rope_store(p->s, &(struct rope_store_args){
        .q = w->qkv, .k = column(p, w->qkv, q), .v = column(p, w->qkv, q + kv),
        .qkv_stride_q = stride, .qkv_stride_k = stride, .qkv_stride_v = stride,
        .q_norm = l->q_norm.data, .k_norm = l->k_norm.data, .norm_type = l->q_norm.type,
        .cos_sin = w->cos_sin, .positions = p->a->positions,
        .kv_block = p->a->kv_block, .index_block = p->a->index_block,
        .kv = kv_pool_kv(p->pool, layer), .index = kv_pool_index(p->pool, layer),
        .channels = layer_channels(p, layer), .shape = p->shape,
        .rows = p->rows, .heads = p->g->heads, .eps = p->g->norm_eps });
}

/* Of each head, from row `from` of its part of kv_b on: out = W x, or W^T x with turned. */
static void linear_kv_b(struct pass *p, const struct layer_weights *l, int from,
                        struct linear_heads_args a)
{
    const struct latent_config *latent = &p->g->latent;
    size_t row = (size_t)latent->dim * dtype_bytes(l->kv_b.type);

    a.weight = (const char *)l->kv_b.data + (size_t)from * row;
    a.weight_type = l->kv_b.type;
    a.heads = p->g->heads;
    a.weight_stride = (size_t)(latent->nope + latent->value) * (size_t)latent->dim;
    p->ops->linear_heads(p->s, &a);
}

/* Queries and the row that is stored, both of low rank; and the queries that meet it
 * (kernels/latent.h). */
static void project_latent(struct pass *p, const struct layer_weights *l, int layer)
{
    const struct step_scratch *w = p->w;
    const struct latent_config *latent = &p->g->latent;
    const int rows = p->rows, hidden = p->g->hidden, heads = p->g->heads, dim = p->g->head_dim;
    const int rank = latent->q_rank, stride = qkv_dim(p->g), head = latent->nope + latent->rope;
    void *kv = column(p, w->qkv, rank);

    if (l->joined)
        linear(p, w->qkv, w->h, l->q_a, no_weight, rows, hidden, stride, stride);
    else {
        linear(p, w->qkv, w->h, l->q_a, no_weight, rows, hidden, rank, stride);
        linear(p, kv, w->h, l->kv_a, no_weight, rows, hidden, dim, stride);
    }
    p->ops->add_norm(p->s, &(struct add_norm_args){
        .out = w->low_rank, .x = w->qkv, .x_stride = stride, .weight = l->q_a_norm.data,
        .weight_type = l->q_a_norm.type, .rows = rows, .dim = rank, .eps = p->g->norm_eps });
    linear(p, w->by_head, w->low_rank, l->q_b, no_weight, rows, rank, heads * head, heads * head);
    linear_kv_b(p, l, 0, (struct linear_heads_args){
        .out = w->absorbed, .x = w->by_head, .turned = true, .rows = rows,
        .in_dim = latent->nope, .out_dim = latent->dim,
        .out_stride = heads * dim, .out_head_stride = dim,
        .x_stride = heads * head, .x_head_stride = head });
    p->ops->latent_store(p->s, &(struct latent_store_args){
        .q = w->absorbed, .q_rope = column(p, w->by_head, latent->nope),
        .q_rope_stride = heads * head, .q_rope_head_stride = head,
        .kv = kv, .kv_stride = stride,
        .norm = l->kv_a_norm.data, .norm_type = l->kv_a_norm.type,
        .cos_sin = w->cos_sin, .positions = p->a->positions,
        .kv_block = p->a->kv_block, .index_block = p->a->index_block,
        .pool = kv_pool_kv(p->pool, layer), .index = kv_pool_index(p->pool, layer),
        .shape = p->shape, .rows = rows, .heads = heads, .interleaved = latent->interleaved,
        .eps = p->g->norm_eps });
}

/* What the heads' values come to, out of attention's latent rows. */
static void latent_values(struct pass *p, const struct layer_weights *l, const void *attn,
                          int rows)
{
    const struct latent_config *latent = &p->g->latent;
    const int heads = p->g->heads;

    linear_kv_b(p, l, latent->nope, (struct linear_heads_args){
        .out = p->w->by_head, .x = attn, .rows = rows,
        .in_dim = latent->dim, .out_dim = latent->value,
        .out_stride = heads * latent->value, .out_head_stride = latent->value,
        .x_stride = heads * latent->dim, .x_head_stride = latent->dim });
}

/* Norm, projections, rotation; K and V into the pool. */
static void project(struct pass *p, int layer, const void *delta)
{
    const struct layer_weights *l = weights_layer(p->m->weights, layer);

    norm(p, p->w->x, delta, l->attn_norm, p->rows);
    if (p->g->latent.dim)
        project_latent(p, l, layer);
    else
        project_plain(p, l, layer);
    if (p->m->observer)
        p->m->observer(p->m->observer_arg, layer, p->b, queries(p), query_stride(p));
}

static bool selects(const struct pass *p, int layer)
{
    return p->sparse_seqs > 0 && !p->m->plan.layer[layer].dense;
}

static void attend(struct pass *p, int layer, bool last)
{
    bool select = selects(p, layer);
    const struct dense_rows *d = &p->dense[last][select];

    if (select)
        attend_sparse(p, layer);
    attend_dense(p, layer, d, p->a->kv_table + (size_t)d->from * (size_t)p->m->limits.max_blocks);
    if (p->streamed[last].seqs == 0)
        return;
    attend_dense(p, layer, &p->streamed[last], streaming_enter(p, layer));
    streaming_leave(p, layer);
}

/* Output projection and MLP over rows of attn and x, all of the pass's or those `gathered`; the
 * result is in delta. */
static void finish_layer(struct pass *p, int layer, void *x, const void *attn, bool gathered)
{
    const struct layer_weights *l = weights_layer(p->m->weights, layer);
    const struct step_scratch *w = p->w;
    const int hidden = p->g->hidden, rows = gathered ? p->logit_rows : p->rows;

    if (p->g->latent.dim) {
        latent_values(p, l, attn, rows);
        attn = w->by_head;
    }
    linear(p, w->delta, attn, l->o, no_weight, rows, model_attention_dim(p->g), hidden, hidden);
    norm(p, x, w->delta, l->mlp_norm, rows);
    if (p->g->moe.in_layer[layer])
        mixed_mlp(p, l, gathered ? NULL : p->a->kv_block, rows);
    else
        dense_mlp(p, l, p->g->mlp, rows);
}

/* The last layer's second half and the logits. */
static void finish(struct pass *p, int layer)
{
    const struct step_scratch *w = p->w;
    const struct weight head = weights_head(p->m->weights);
    const int rows = p->logit_rows;
    void *x = w->x;
    const void *attn = w->attn;

    if (p->gathers) {
        x = gather(p, w->last_x, w->x, p->g->hidden);
        attn = gather(p, w->last_attn, w->attn, p->g->heads * kv_value_dim(&p->shape));
    }
    finish_layer(p, layer, x, attn, p->gathers);
    norm(p, x, w->delta, weights_norm(p->m->weights), rows);
    p->ops->logits(p->s, &(struct logits_args){
        .out = w->logits, .x = w->h, .weight = head.data, .weight_type = head.type,
        .rows = rows, .dim = p->g->hidden, .vocab = p->g->vocab });
}

void forward_queue(struct pass *p)
{
    const struct weight embed = weights_embed(p->m->weights);
    const struct step_scratch *w = p->w;
    const int last = p->g->layers - 1, rows = p->rows;

    p->ops->embed(p->s, &(struct embed_args){
        .out = w->x, .table = embed.data, .ids = p->a->ids, .table_type = embed.type,
        .rows = rows, .dim = p->g->hidden });
    p->ops->rope_table(p->s, &(struct rope_table_args){
        .cos_sin = w->cos_sin, .positions = p->a->positions, .inv_freq = w->inv_freq,
        .factor = p->g->rope_factor, .rows = rows, .head_dim = model_rope_dim(p->g) });
    for (int layer = 0; layer < last; layer++) {
        project(p, layer, layer ? w->delta : NULL);
        attend(p, layer, false);
        finish_layer(p, layer, w->x, w->attn, false);
    }
    project(p, last, last ? w->delta : NULL);
    if (p->logit_rows == 0) {
        /* Nobody reads this attention, but which blocks it keeps is for the next step. */
        if (p->m->lagged && selects(p, last))
            attend_sparse(p, last);
        return;
    }
    attend(p, last, true);
    finish(p, last);
}

/* ---- a step */

struct pass forward_pass(struct model *m, struct stream *s, struct kv_pool *pool,
                         const struct step_arrays *a)
{
    return (struct pass){
        .m = m, .ops = m->ops, .g = &m->config, .b = &m->batch, .a = a, .w = &m->scratch,
        .s = s, .pool = pool, .shape = model_kv_shape(m, &m->plan.config),
    };
}

/* The sequences [from, end) as attend_dense takes them. */
static struct dense_rows dense_between(const struct model *m, int from, int end, bool last)
{
    const struct model_batch *b = &m->batch;
    const int32_t *host_n = last ? m->host_arrays.last_n_rows : m->host_arrays.n_rows;
    struct dense_rows d = {
        .from = from, .seqs = end - from, .n_tokens = m->arrays.n_tokens,
        .first_row = last ? m->arrays.last_first_row : m->arrays.first_row,
        .n_rows = last ? m->arrays.last_n_rows : m->arrays.n_rows,
    };

    for (int s = from; s < end; s++) {
        d.most_rows = host_n[s] > d.most_rows ? host_n[s] : d.most_rows;
        d.most_tokens = b->n_tokens[s] > d.most_tokens ? b->n_tokens[s] : d.most_tokens;
    }
    return d;
}

/* Queue the batch as it is. */
static void queue_batch(struct model *m, struct stream *s, struct kv_pool *pool, bool has_sets)
{
    const struct model_batch *b = &m->batch;
    struct pass p = forward_pass(m, s, pool, &m->arrays);

    p.rows = b->rows;
    p.logit_rows = b->logit_rows;
    p.gathers = !forward_wants_all_rows(b);
    p.decodes = b->rows == b->seqs && b->n_staged == 0;
    p.has_sets = has_sets;
    p.sparse_seqs = b->sparse_seqs;
    p.sparse_n_tokens = m->arrays.n_tokens;
    for (int i = 0; i < b->sparse_seqs; i++)
        if (b->n_tokens[i] > p.most_sparse_tokens)
            p.most_sparse_tokens = b->n_tokens[i];
    find_last_rows(m);
    int end = b->seqs - (b->n_staged > 0);
    for (int last = 0; last < 2; last++) {
        p.dense[last][false] = dense_between(m, 0, end, last);
        p.dense[last][true] = dense_between(m, b->sparse_seqs, end, last);
        p.streamed[last] = dense_between(m, end, b->seqs, last);
    }
    upload_batch(m, s, has_sets);
    if (b->n_staged > 0)
        streaming_begin(&p);
    forward_queue(&p);
}

enum status model_step(struct model *m, struct stream *s, struct kv_pool *pool,
                       struct error *err)
{
    const struct model_batch *b = &m->batch;

    ASSERT(m->prepared);
    check_batch(m);
    bool has_sets = forward_has_sets(m);
    m->step++;
    if (has_sets)
        *m->host_arrays.step = m->step;
    if (!replay_batch(m, s, pool))
        queue_batch(m, s, pool, has_sets);
    if (has_sets)
        hot_sets_fetch_counts(m->hot, s);
    if (b->before_sample)
        b->before_sample(b->before_sample_arg);
    if (b->logit_rows > 0)
        m->ops->sample(s, &(struct sample_args){
            .out = b->result, .logits = m->scratch.logits, .params = b->sample,
            .rows = b->logit_rows, .vocab = m->config.vocab });
    uint64_t from_ns = clock_now_ns();
    enum status st = stream_sync(s, err);
    m->waited_ns += clock_now_ns() - from_ns;
    if (has_sets && st == ST_OK)
        hot_sets_take_counts(m->hot);
    return st == ST_OK ? streaming_failure(m, err) : st;
}
