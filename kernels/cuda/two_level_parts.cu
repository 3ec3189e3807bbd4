/* Two-level attention in its three operations, where there is no fused kernel or somebody wants
 * the lists that lie between them; with hot rows
 * the tokens' rows are found, and fetched, between the last two, and with lagged blocks the
 * lists of blocks are traded between the first two. */

#include "kernels/cuda/lag.cuh"
#include "kernels/cuda/latent.cuh"

namespace {

struct parts {
    int32_t *kept, *n_kept, *from, *n_from, *chosen, *n_chosen;
    const bf16 **rows;           /* with hot rows, as the next three */
    uint32_t *place;
    int *missing;
    uint16_t *into;
    void *scratch;
    size_t bytes;
};

template <typename T>
void carve(T **part, void *base, size_t *at, size_t n)
{
    *part = base ? (T *)((char *)base + *at) : NULL;
    *at += (n * sizeof(T) + 255) / 256 * 256;
}

parts carve_parts(void *base, const struct kv_shape *shape, int seqs, int heads, int max_blocks,
                  int keep_blocks, int keep_tokens)
{
    size_t lists = (size_t)seqs * shape->kv_heads, at = 0;
    size_t filter = cuda_block_filter_scratch(shape, seqs, heads, max_blocks);
    size_t select = cuda_token_select_scratch(shape, seqs, heads, keep_blocks);
    size_t dense = cuda_attend_dense_scratch(shape, seqs, heads, max_blocks);
    parts p;

    carve(&p.kept, base, &at, lists * keep_blocks);
    carve(&p.n_kept, base, &at, lists);
    carve(&p.from, base, &at, lists * keep_blocks);
    carve(&p.n_from, base, &at, lists);
    carve(&p.chosen, base, &at, lists * keep_tokens);
    carve(&p.n_chosen, base, &at, lists);
    carve(&p.rows, base, &at, lists * keep_tokens);
    carve(&p.place, base, &at, lists * keep_tokens);
    carve(&p.missing, base, &at, lists * keep_tokens);
    carve(&p.into, base, &at, lists * keep_tokens);
    p.scratch = base ? (char *)base + at : NULL;
    p.bytes = at + max(max(filter, select), dense);
    return p;
}

/* What is wanted is written where it is wanted. */
void place_lists(parts *p, const struct attend_two_level_args *a)
{
    const struct selected_lists *lists = a->lists;

    if (!lists)
        return;
    *(a->lagged ? &p->from : &p->kept) = lists->kept;
    *(a->lagged ? &p->n_from : &p->n_kept) = lists->n_kept;
    p->chosen = lists->chosen;
    p->n_chosen = lists->n_chosen;
}

void run_parts(struct stream *s, const struct attend_two_level_args *a)
{
    parts p = carve_parts(a->scratch, &a->shape, a->seqs, a->heads, a->max_blocks,
                          a->keep_blocks, a->keep_tokens);
    struct block_filter_args filter = {};
    struct token_select_args select = {};
    struct attend_selected_args attend = {};

    place_lists(&p, a);
    filter.kept = p.kept;
    filter.n_kept = p.n_kept;
    filter.q = select.q = attend.q = a->q;
    filter.q_stride = select.q_stride = attend.q_stride = a->q_stride;
    filter.index = select.index = a->index;
    filter.table = select.table = a->index_table;
    filter.n_tokens = select.n_tokens = a->n_tokens;
    filter.channels = select.channels = a->channels;
    filter.scratch = select.scratch = p.scratch;
    filter.shape = select.shape = attend.shape = a->shape;
    filter.seqs = select.seqs = attend.seqs = a->seqs;
    filter.heads = select.heads = attend.heads = a->heads;
    filter.max_blocks = select.max_blocks = attend.max_blocks = a->max_blocks;
    filter.keep_blocks = select.keep_blocks = a->keep_blocks;
    filter.sink_tokens = select.sink_tokens = a->sink_tokens;
    filter.recent_tokens = select.recent_tokens = a->recent_tokens;
    filter.max_n_tokens = a->max_n_tokens;
    cuda_block_filter(s, &filter);
    if (a->lagged)
        queue_lag_lists(s, a, { p.kept, p.n_kept, p.from, p.n_from });
    select.chosen = p.chosen;
    select.n_chosen = p.n_chosen;
    select.kept = a->lagged ? p.from : p.kept;
    select.n_kept = a->lagged ? p.n_from : p.n_kept;
    select.keep_tokens = a->keep_tokens;
    cuda_token_select(s, &select);
    attend.out = a->out;
    attend.kv = a->kv;
    attend.table = a->kv_table;
    attend.chosen = p.chosen;
    attend.scratch = p.scratch;
    attend.n_chosen = p.n_chosen;
    attend.keep_tokens = a->keep_tokens;
    attend.scale = a->scale;
    if (!a->hot) {
        cuda_attend_selected(s, &attend);
        return;
    }
    struct resolve_args resolve = {};
    resolve.rows = p.rows;
    resolve.place = p.place;
    resolve.missing = p.missing;
    resolve.into = p.into;
    resolve.chosen = p.chosen;
    resolve.n_chosen = p.n_chosen;
    resolve.kv = a->kv;
    resolve.table = a->kv_table;
    resolve.hot = a->hot;
    resolve.shape = a->shape;
    resolve.seqs = a->seqs;
    resolve.max_blocks = a->max_blocks;
    resolve.keep_tokens = a->keep_tokens;
    cuda_resolve(s, &resolve);
    cuda_attend_rows(s, &attend, p.rows);
}

}

void cuda_attend_two_level(struct stream *s, const struct attend_two_level_args *a)
{
    if (!stream_enter(s) || a->seqs == 0)
        return;
    bool fused = !a->lists && (latent::is_latent(&a->shape) ? latent::queue_two_level(s, a)
                                                            : attend_two_level_fused(s, a));
    if (!fused)
        run_parts(s, a);
}

size_t cuda_attend_two_level_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                     int max_blocks, int keep_blocks, int keep_tokens)
{
    return carve_parts(NULL, shape, max_seqs, heads, max_blocks, keep_blocks, keep_tokens)
        .bytes;
}
