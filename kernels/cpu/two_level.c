#include "kernels/cpu/attend.h"
#include "kernels/cpu/lag.h"
#include "kernels/cpu/resolve.h"

/* The three operations one after the other, with lagged blocks a fourth between the first two and
 * with hot rows one between the last two; what passes between them is carved from the scratch. */
struct parts {
    int32_t *kept, *n_kept, *from, *n_from, *chosen, *n_chosen, *counts;
    uint64_t *stalled_ns;
    const bf16 **rows;
    void *scratch;
    size_t bytes;
};

static void *carve(char *base, size_t *at, size_t bytes)
{
    void *part = base ? base + *at : NULL;

    *at += (bytes + 63) / 64 * 64;
    return part;
}

static struct parts carve_parts(void *base, const struct kv_shape *shape, int seqs, int heads,
                                int max_blocks, int keep_blocks, int keep_tokens)
{
    size_t lists = (size_t)seqs * (size_t)shape->kv_heads, at = 0;
    size_t filter = cpu_block_filter_scratch(shape, seqs, heads, max_blocks);
    size_t select = cpu_token_select_scratch(shape, seqs, heads, keep_blocks);
    struct parts p;

    p.kept = carve(base, &at, lists * (size_t)keep_blocks * sizeof *p.kept);
    p.n_kept = carve(base, &at, lists * sizeof *p.n_kept);
    p.from = carve(base, &at, lists * (size_t)keep_blocks * sizeof *p.from);
    p.n_from = carve(base, &at, lists * sizeof *p.n_from);
    p.chosen = carve(base, &at, lists * (size_t)keep_tokens * sizeof *p.chosen);
    p.n_chosen = carve(base, &at, lists * sizeof *p.n_chosen);
    p.counts = carve(base, &at, lists * HOT_COUNTS * sizeof *p.counts);
    p.stalled_ns = carve(base, &at, lists * sizeof *p.stalled_ns);
    p.rows = carve(base, &at, lists * (size_t)keep_tokens * sizeof *p.rows);
    p.scratch = carve(base, &at, filter > select ? filter : select);
    p.bytes = at;
    return p;
}

size_t cpu_attend_two_level_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                    int max_blocks, int keep_blocks, int keep_tokens)
{
    return carve_parts(NULL, shape, max_seqs, heads, max_blocks, keep_blocks, keep_tokens)
        .bytes;
}

/* What is wanted is written where it is wanted. */
static void place_lists(struct parts *p, const struct attend_two_level_args *a)
{
    const struct selected_lists *lists = a->lists;

    if (!lists)
        return;
    *(a->lagged ? &p->from : &p->kept) = lists->kept;
    *(a->lagged ? &p->n_from : &p->n_kept) = lists->n_kept;
    p->chosen = lists->chosen;
    p->n_chosen = lists->n_chosen;
}

void cpu_attend_two_level(struct stream *s, const struct attend_two_level_args *a)
{
    struct parts p = carve_parts(a->scratch, &a->shape, a->seqs, a->heads, a->max_blocks,
                                 a->keep_blocks, a->keep_tokens);

    place_lists(&p, a);
    cpu_block_filter(s, &(struct block_filter_args){
        .kept = p.kept, .n_kept = p.n_kept, .q = a->q, .q_stride = a->q_stride,
        .index = a->index, .table = a->index_table, .n_tokens = a->n_tokens,
        .channels = a->channels, .scratch = p.scratch, .shape = a->shape, .seqs = a->seqs,
        .heads = a->heads, .max_blocks = a->max_blocks, .keep_blocks = a->keep_blocks,
        .sink_tokens = a->sink_tokens, .recent_tokens = a->recent_tokens,
        .max_n_tokens = a->max_n_tokens });
    if (a->lagged)
        cpu_lag(s, &(struct lag_args){
            .from = p.from, .n_from = p.n_from, .kept = p.kept, .n_kept = p.n_kept,
            .n_tokens = a->n_tokens, .lagged = a->lagged, .seqs = a->seqs,
            .kv_heads = a->shape.kv_heads, .keep_blocks = a->keep_blocks,
            .sink_tokens = a->sink_tokens, .recent_tokens = a->recent_tokens });
    cpu_token_select(s, &(struct token_select_args){
        .chosen = p.chosen, .n_chosen = p.n_chosen, .kept = a->lagged ? p.from : p.kept,
        .n_kept = a->lagged ? p.n_from : p.n_kept,
        .q = a->q, .q_stride = a->q_stride, .index = a->index, .table = a->index_table,
        .n_tokens = a->n_tokens, .channels = a->channels, .scratch = p.scratch,
        .shape = a->shape, .seqs = a->seqs, .heads = a->heads, .max_blocks = a->max_blocks,
        .keep_blocks = a->keep_blocks, .keep_tokens = a->keep_tokens,
        .sink_tokens = a->sink_tokens, .recent_tokens = a->recent_tokens });
    if (a->hot)
        cpu_resolve(s, &(struct resolve_args){
            .rows = p.rows, .counts = p.counts, .stalled_ns = p.stalled_ns, .chosen = p.chosen,
            .n_chosen = p.n_chosen, .kv = a->kv, .table = a->kv_table, .hot = a->hot,
            .shape = a->shape, .seqs = a->seqs, .max_blocks = a->max_blocks,
            .keep_tokens = a->keep_tokens });
    cpu_attend_rows(s, &(struct attend_selected_args){
        .out = a->out, .q = a->q, .q_stride = a->q_stride, .kv = a->kv, .table = a->kv_table,
        .chosen = p.chosen, .n_chosen = p.n_chosen, .shape = a->shape, .seqs = a->seqs,
        .heads = a->heads, .max_blocks = a->max_blocks, .keep_tokens = a->keep_tokens,
        .scale = a->scale }, a->hot ? p.rows : NULL);
}
