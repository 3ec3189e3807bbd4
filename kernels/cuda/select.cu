/* Both levels of the selection as operations of their own, for every kind of filter and
 * index: what a layer needs whose keys and values must be fetched before they are
 * attended to, and the kinds that two_level.cu has no fused kernel for. */

#include "kernels/cuda/latent.cuh"
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/select.cuh"

namespace {

using namespace sel;

enum { MAX_GROUP = 16, MAX_DIM = 128, SCORE_WARPS = 4, CHOOSE_THREADS = 512 };

struct selection {
    const __nv_bfloat16 *q;
    const uint8_t *index;
    const int32_t *table, *n_tokens;
    const int16_t *channels;
    const int32_t *kept, *n_kept;  /* of the first level; NULL while it is this one */
    int32_t *out, *n_out;
    unsigned *keys;                /* [seqs, kv_heads, most_items] */
    struct index_layout layout;    /* scale and sign: of what this level scores */
    int kv_heads, head_dim, group, q_stride, max_blocks, keep_blocks, keep;
    int sink_tokens, recent_tokens, most_items;
    size_t block_bytes;
    enum filter_kind filter;
    bool channels_kept;
};

__device__ bool by_bounds(const selection &a)
{
    return a.filter == FILTER_BOUNDS && !a.kept;
}

/* The group's queries as the scores want them: rotated, or the kept channels, or as they
 * are.  x [group, head_dim]. */
__device__ void load_queries(const selection &a, int seq, int kv_head, float *x)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;

    for (int h = warp; h < a.group; h += n_warps) {
        const __nv_bfloat16 *q = a.q + (size_t)seq * a.q_stride +
                                 (size_t)(kv_head * a.group + h) * a.head_dim;
        float *out = x + h * a.head_dim, part[MAX_DIM / WARP];
        if (a.channels_kept && !by_bounds(a)) {
            out[lane] = __bfloat162float(q[a.channels[kv_head * INDEX_CHANNELS_KEPT + lane]]);
            continue;
        }
        if (by_bounds(a)) {
            for (int d = lane; d < a.head_dim; d += WARP)
                out[d] = __bfloat162float(q[d]);
            continue;
        }
        if (a.head_dim == 128)
            rotate_query<128>(part, q);
        else
            rotate_query<64>(part, q);
        for (int i = 0; i < a.head_dim / WARP; i++)
            out[lane + WARP * i] = part[i];
    }
    __syncthreads();
}

__device__ const uint8_t *record_at(const selection &a, int seq, int kv_head, int block)
{
    size_t id = (size_t)a.table[(size_t)seq * a.max_blocks + block];

    return a.index + id * a.block_bytes + (size_t)kv_head * a.layout.record_bytes;
}

__device__ float bf16_at(const uint8_t *p, int i)
{
    return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}

/* Products of the low-precision key of a token, or of a mean, with one query, times its scale. */
__device__ float rotated_score(const selection &a, const uint8_t *record, int token,
                               const float *x)
{
    const unsigned *sign = (const unsigned *)(record + a.layout.sign) +
                           token * (a.head_dim / 32);
    const unsigned *large = (const unsigned *)(record + a.layout.large) +
                            token * (a.head_dim / 32);
    float sum = 0;

    for (int w = 0; w < a.head_dim / 32; w++) {
        unsigned s = sign[w], agree = a.kept ? ~(s ^ large[w]) : 0;
        for (int i = 0; i < 32; i++) {
            float v = x[32 * w + i];
            sum += s >> i & 1 ? v : -v;
            if (a.kept)
                sum += agree >> i & 1 ? 0.5f * v : -0.5f * v;
        }
    }
    return sum * bf16_at(record + a.layout.scale, token);
}

__device__ float channels_score(const selection &a, const uint8_t *record, int token,
                                const float *x)
{
    int bytes = a.kept ? INDEX_CHANNELS_KEPT / 2 : INDEX_CHANNELS_KEPT / 4;
    const uint8_t *code = record + (a.kept ? a.layout.fine : a.layout.coarse) + token * bytes;
    float sum = 0;

    for (int i = 0; i < INDEX_CHANNELS_KEPT; i++) {
        if (a.kept)
            sum += x[i] * ((float)(code[i / 2] >> 4 * (i % 2) & 15) - 8);
        else
            sum += x[i] * ((float)(code[i / 4] >> 2 * (i % 4) & 3) - 1.5f);
    }
    return sum * bf16_at(record + (a.kept ? a.layout.scale4 : a.layout.scale2), token);
}

/* The best of the group's queries. */
__device__ float token_score(const selection &a, const uint8_t *record, int token,
                             const float *x)
{
    float best = -INFINITY;

    for (int h = 0; h < a.group; h++) {
        float score = a.channels_kept ? channels_score(a, record, token, x + h * a.head_dim)
                                      : rotated_score(a, record, token, x + h * a.head_dim);
        best = fmaxf(best, score);
    }
    return best;
}

/* By the whole warp. */
__device__ float bounds_score(const selection &a, const uint8_t *record, const float *x)
{
    int lane = threadIdx.x % WARP;
    float best = -INFINITY;

    for (int h = 0; h < a.group; h++) {
        float sum = 0;
        for (int d = lane; d < a.head_dim; d += WARP) {
            float v = x[h * a.head_dim + d];
            sum += fmaxf(v * bf16_at(record + a.layout.lo, d),
                         v * bf16_at(record + a.layout.hi, d));
        }
        best = fmaxf(best, warp_sum(sum));
    }
    return best;
}

/* A warp a block of the context. */
__global__ void __launch_bounds__(SCORE_WARPS * WARP) score_blocks(selection a)
{
    __shared__ float x[MAX_GROUP * MAX_DIM];
    int lane = threadIdx.x % WARP, block = blockIdx.x * SCORE_WARPS + threadIdx.x / WARP;
    int kv_head = blockIdx.y, seq = blockIdx.z, n = a.n_tokens[seq];

    if (blockIdx.x * SCORE_WARPS * BLOCK_TOKENS >= n)
        return;
    load_queries(a, seq, kv_head, x);
    if (block * BLOCK_TOKENS >= n)
        return;
    const uint8_t *record = record_at(a, seq, kv_head, block);
    int items = a.filter == FILTER_MEANS ? BLOCK_MEANS
                                         : min((int)BLOCK_TOKENS, n - block * BLOCK_TOKENS);
    float best = -INFINITY;
    if (by_bounds(a))
        best = bounds_score(a, record, x);
    else
        for (int t = lane; t < items; t += WARP)
            best = fmaxf(best, token_score(a, record, t, x));
    best = warp_max(best);
    if (lane == 0)
        a.keys[((size_t)seq * a.kv_heads + kv_head) * a.most_items + block] =
            filter_must_keep(a.filter, block, n, a.sink_tokens, a.recent_tokens)
                ? (unsigned)FORCED_KEY : key_of(best);
}

/* A thread block a kept block. */
__global__ void __launch_bounds__(BLOCK_TOKENS) score_kept(selection a)
{
    __shared__ float x[MAX_GROUP * MAX_DIM];
    int kv_head = blockIdx.y, seq = blockIdx.z, n = a.n_tokens[seq];
    size_t list = (size_t)seq * a.kv_heads + kv_head;

    if (n == 0 || blockIdx.x >= a.n_kept[list])
        return;
    load_queries(a, seq, kv_head, x);
    int block = a.kept[list * a.keep_blocks + blockIdx.x];
    int position = block * BLOCK_TOKENS + threadIdx.x;
    unsigned key = 0;
    if (position < n)
        key = always_chosen(position, n, a.sink_tokens, a.recent_tokens)
                  ? (unsigned)FORCED_KEY
                  : key_of(token_score(a, record_at(a, seq, kv_head, block), threadIdx.x, x));
    a.keys[list * a.most_items + blockIdx.x * BLOCK_TOKENS + threadIdx.x] = key;
}

__global__ void __launch_bounds__(CHOOSE_THREADS) choose(selection a)
{
    __shared__ counts c;
    int kv_head = blockIdx.x, seq = blockIdx.y, n_tokens = a.n_tokens[seq];
    size_t list = (size_t)seq * a.kv_heads + kv_head;
    const int32_t *kept = a.kept ? a.kept + list * a.keep_blocks : NULL;
    int32_t *out = a.out + list * a.keep;

    int n = (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    if (kept && n_tokens > 0) {
        n = a.n_kept[list];
        int end = n > 0 ? (kept[n - 1] + 1) * BLOCK_TOKENS : 0;
        n = n * BLOCK_TOKENS - (end > n_tokens ? end - n_tokens : 0);
    }
    int n_out = choose_top(out, a.keys + list * a.most_items, n, a.keep, &c);
    for (int i = threadIdx.x; i < a.keep; i += blockDim.x) {
        if (i >= n_out)
            out[i] = -1;
        else if (kept)
            out[i] = kept[out[i] / BLOCK_TOKENS] * BLOCK_TOKENS + out[i] % BLOCK_TOKENS;
    }
    if (threadIdx.x == 0)
        a.n_out[list] = n_out;
}

void fill_shape(selection *a, const struct kv_shape *shape, int heads)
{
    a->layout = index_layout(shape);
    a->block_bytes = index_block_bytes(shape);
    a->kv_heads = shape->kv_heads;
    a->head_dim = shape->head_dim;
    a->group = heads / shape->kv_heads;
    a->filter = shape->filter;
    a->channels_kept = shape->index == INDEX_CHANNELS;
}

/* The queries behind the keys. */
void score_latent_blocks(struct stream *s, const struct block_filter_args *args, unsigned *keys)
{
    latent::queries *made = latent::queries_behind(keys, (size_t)args->seqs * args->max_blocks);

    if (args->shape.filter != FILTER_BOUNDS)
        latent::queue_queries(s, made, args->q, args->q_stride, args->heads, args->n_tokens,
                              args->seqs);
    latent::queue_scores(s, args, made, keys);
}

void score_latent_kept(struct stream *s, const struct token_select_args *args, unsigned *keys)
{
    latent::queries *made = latent::queries_behind(
        keys, (size_t)args->seqs * args->keep_blocks * BLOCK_TOKENS);

    latent::queue_queries(s, made, args->q, args->q_stride, args->heads, args->n_tokens,
                          args->seqs);
    latent::queue_kept_scores(s, args, made, keys);
}

/* For n keys. */
size_t scratch_bytes(const struct kv_shape *shape, int max_seqs, size_t n)
{
    size_t bytes = n * sizeof(unsigned);

    return latent::is_latent(shape) ? bytes + 256 + latent::queries_bytes(max_seqs) : bytes;
}

}

void cuda_block_filter(struct stream *s, const struct block_filter_args *args)
{
    selection a = {};

    if (!stream_enter(s) || args->seqs == 0)
        return;
    fill_shape(&a, &args->shape, args->heads);
    if (a.filter == FILTER_MEANS) {
        a.layout.scale = a.layout.mean_scale;
        a.layout.sign = a.layout.mean_sign;
    }
    a.q = (const __nv_bfloat16 *)args->q;
    a.index = args->index;
    a.table = args->table;
    a.n_tokens = args->n_tokens;
    a.channels = args->channels;
    a.out = args->kept;
    a.n_out = args->n_kept;
    a.keys = (unsigned *)args->scratch;
    a.q_stride = args->q_stride;
    a.max_blocks = args->max_blocks;
    a.keep = args->keep_blocks;
    a.sink_tokens = args->sink_tokens;
    a.recent_tokens = args->recent_tokens;
    a.most_items = args->max_blocks;
    int blocks = (args->max_n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    dim3 grid((blocks + SCORE_WARPS - 1) / SCORE_WARPS, a.kv_heads, args->seqs);
    if (latent::is_latent(&args->shape))
        score_latent_blocks(s, args, a.keys);
    else
        score_blocks<<<grid, SCORE_WARPS * WARP, 0, s->cu>>>(a);
    choose<<<dim3(a.kv_heads, args->seqs), CHOOSE_THREADS, 0, s->cu>>>(a);
    stream_note(s, "block_filter");
}

void cuda_token_select(struct stream *s, const struct token_select_args *args)
{
    selection a = {};

    if (!stream_enter(s) || args->seqs == 0)
        return;
    fill_shape(&a, &args->shape, args->heads);
    a.q = (const __nv_bfloat16 *)args->q;
    a.index = args->index;
    a.table = args->table;
    a.n_tokens = args->n_tokens;
    a.channels = args->channels;
    a.kept = args->kept;
    a.n_kept = args->n_kept;
    a.out = args->chosen;
    a.n_out = args->n_chosen;
    a.keys = (unsigned *)args->scratch;
    a.q_stride = args->q_stride;
    a.max_blocks = args->max_blocks;
    a.keep_blocks = args->keep_blocks;
    a.keep = args->keep_tokens;
    a.sink_tokens = args->sink_tokens;
    a.recent_tokens = args->recent_tokens;
    a.most_items = args->keep_blocks * BLOCK_TOKENS;
    dim3 grid(args->keep_blocks, a.kv_heads, args->seqs);
    if (latent::is_latent(&args->shape))
        score_latent_kept(s, args, a.keys);
    else
        score_kept<<<grid, BLOCK_TOKENS, 0, s->cu>>>(a);
    choose<<<dim3(a.kv_heads, args->seqs), CHOOSE_THREADS, 0, s->cu>>>(a);
    stream_note(s, "token_select");
}

/* A key for each block, or for each token of the kept blocks. */
size_t cuda_block_filter_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                 int max_blocks)
{
    (void)heads;
    return scratch_bytes(shape, max_seqs, (size_t)max_seqs * shape->kv_heads * max_blocks);
}

size_t cuda_token_select_scratch(const struct kv_shape *shape, int max_seqs, int heads,
                                 int keep_blocks)
{
    (void)heads;
    return scratch_bytes(shape, max_seqs,
                         (size_t)max_seqs * shape->kv_heads * keep_blocks * BLOCK_TOKENS);
}
