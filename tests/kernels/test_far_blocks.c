#include "kernels/ops.h"

#include "engine/base/mem.h"
#include "tests/support/backend_fixture.h"
#include "tests/support/closeness.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <string.h>

/* Pools of more than 10 GB, of which only the blocks in use are ever touched: places
 * beyond 32 bits, in bytes and in elements, are like any others. */
enum {
    HEADS = 16,
    KV_HEADS = 8,
    HEAD_DIM = 128,
    ROWS = 300,
    BLOCKS = (ROWS + BLOCK_TOKENS - 1) / BLOCK_TOKENS,
    KEEP_BLOCKS = 3,
    KEEP_TOKENS = 100,
    Q_DIM = HEADS * HEAD_DIM,
    KV_DIM = KV_HEADS * HEAD_DIM,
};

static const int32_t near_blocks[BLOCKS] = { 0, 1, 2, 3, 4 };
static const int32_t far_kv_blocks[BLOCKS] = { 40000, 7, 20001, 39999, 8193 };
static const int32_t far_index_blocks[BLOCKS] = { 600000, 123, 250001, 599999, 130001 };

struct run {
    struct kv_shape shape;
    size_t kv_bytes, index_bytes;
    bf16 *kv;
    uint8_t *index;
    float *q, *k, *v, *cos_sin, *dense, *sparse;
    int16_t channels[KV_HEADS * INDEX_CHANNELS_KEPT];
};

static void store(struct backend *be, struct stream *s, struct run *run,
                  const int32_t *kv_table, const int32_t *index_table)
{
    int32_t positions[ROWS], kv_block[ROWS], index_block[ROWS];

    for (int i = 0; i < ROWS; i++) {
        positions[i] = i;
        kv_block[i] = kv_table[i / BLOCK_TOKENS];
        index_block[i] = index_table[i / BLOCK_TOKENS];
        for (int d = 0; d < HEAD_DIM; d++)
            run->cos_sin[i * HEAD_DIM + d] = d < HEAD_DIM / 2;
    }
    backend_ops(be)->rope_store(s, &(struct rope_store_args){
        .q = run->q, .k = run->k, .v = run->v, .qkv_stride_q = Q_DIM, .qkv_stride_k = KV_DIM,
        .qkv_stride_v = KV_DIM, .cos_sin = run->cos_sin, .positions = positions,
        .kv_block = kv_block, .index_block = index_block, .kv = run->kv, .index = run->index,
        .channels = run->channels, .shape = run->shape, .rows = ROWS, .heads = HEADS });
}

/* Every row densely, and the last one by two levels. */
static void attend(struct backend *be, struct stream *s, struct run *run,
                   const int32_t *kv_table, const int32_t *index_table)
{
    const struct backend_ops *ops = backend_ops(be);
    int32_t first = 0, n = ROWS;
    size_t bytes = ops->attend_dense_scratch(&run->shape, 1, HEADS, BLOCKS);
    size_t more = ops->attend_two_level_scratch(&run->shape, 1, HEADS, BLOCKS, KEEP_BLOCKS,
                                                KEEP_TOKENS);
    void *scratch = mem_alloc(bytes > more ? bytes : more);

    ops->attend_dense(s, &(struct attend_dense_args){
        .out = run->dense, .q = run->q, .q_stride = Q_DIM, .kv = run->kv, .table = kv_table,
        .first_row = &first, .n_rows = &n, .n_tokens = &n, .scratch = scratch,
        .shape = run->shape, .seqs = 1, .heads = HEADS, .max_blocks = BLOCKS,
        .max_n_rows = n, .max_n_tokens = n, .scale = 0.1f });
    ops->attend_two_level(s, &(struct attend_two_level_args){
        .out = run->sparse, .q = run->q + (ROWS - 1) * Q_DIM, .q_stride = Q_DIM,
        .kv = run->kv, .index = run->index, .kv_table = kv_table, .index_table = index_table,
        .n_tokens = &n, .channels = run->channels, .scratch = scratch, .shape = run->shape,
        .seqs = 1, .heads = HEADS, .max_blocks = BLOCKS, .keep_blocks = KEEP_BLOCKS,
        .keep_tokens = KEEP_TOKENS, .sink_tokens = 4, .recent_tokens = 64,
        .max_n_tokens = n, .scale = 0.1f });
    mem_free(scratch);
}

static bool open_run(struct run *run, struct kv_shape shape, const int32_t *last_blocks)
{
    struct test_random r = test_random(1);

    *run = (struct run){ .shape = shape };
    run->kv_bytes = (size_t)(last_blocks[0] + BLOCKS) * kv_block_bytes(&shape);
    run->index_bytes = (size_t)(last_blocks[1] + BLOCKS) * index_block_bytes(&shape);
    run->kv = mem_map(run->kv_bytes, 64);
    run->index = mem_map(run->index_bytes, 64);
    run->q = mem_alloc(ROWS * Q_DIM * sizeof(float));
    run->k = mem_alloc(ROWS * KV_DIM * sizeof(float));
    run->v = mem_alloc(ROWS * KV_DIM * sizeof(float));
    run->cos_sin = mem_alloc(ROWS * HEAD_DIM * sizeof(float));
    run->dense = mem_calloc(ROWS * Q_DIM, sizeof(float));
    run->sparse = mem_calloc(Q_DIM, sizeof(float));
    random_floats(&r, run->q, ROWS * Q_DIM, 1);
    random_floats(&r, run->k, ROWS * KV_DIM, 1);
    random_floats(&r, run->v, ROWS * KV_DIM, 1);
    for (int i = 0; i < KV_HEADS * INDEX_CHANNELS_KEPT; i++)
        run->channels[i] = (int16_t)(i * 5 % HEAD_DIM);
    return run->kv && run->index;
}

static void close_run(struct run *run)
{
    if (run->kv)
        mem_unmap(run->kv, run->kv_bytes);
    if (run->index)
        mem_unmap(run->index, run->index_bytes);
    mem_free(run->q);
    mem_free(run->k);
    mem_free(run->v);
    mem_free(run->cos_sin);
    mem_free(run->dense);
    mem_free(run->sparse);
}

/* A machine that refuses such a mapping has nothing to show. */
START_TEST(far_blocks_are_like_near_ones)
{
    static const int32_t near_last[2] = { 4, 4 }, far_last[2] = { 40000, 600000 };
    struct backend *be = test_backend(_i & 1 ? "scalar" : "auto");
    struct stream *s = stream_create(be);
    struct kv_shape shape = { .kv_heads = KV_HEADS, .head_dim = HEAD_DIM,
                              .filter = _i & 2 ? FILTER_BOUNDS : FILTER_COARSE,
                              .index = _i & 2 ? INDEX_CHANNELS : INDEX_ROTATED };
    struct run near, far;

    bool mapped = open_run(&far, shape, far_last);
    ck_assert(open_run(&near, shape, near_last));
    if (mapped) {
        store(be, s, &near, near_blocks, near_blocks);
        store(be, s, &far, far_kv_blocks, far_index_blocks);
        for (int b = 0; b < BLOCKS; b++) {
            size_t kv = kv_block_bytes(&shape), index = index_block_bytes(&shape);
            ck_assert(memcmp((char *)near.kv + (size_t)b * kv,
                             (char *)far.kv + (size_t)far_kv_blocks[b] * kv, kv) == 0);
            ck_assert(memcmp(near.index + (size_t)b * index,
                             far.index + (size_t)far_index_blocks[b] * index, index) == 0);
        }
        attend(be, s, &near, near_blocks, near_blocks);
        attend(be, s, &far, far_kv_blocks, far_index_blocks);
        ck_assert(floats_identical("dense", far.dense, near.dense, ROWS * Q_DIM));
        ck_assert(floats_identical("two levels", far.sparse, near.sparse, Q_DIM));
    }
    close_run(&near);
    close_run(&far);
    stream_destroy(s);
}
END_TEST

TCase *far_blocks_case(void)
{
    TCase *c = tcase_create("far_blocks");

    tcase_set_timeout(c, 60);
    tcase_add_loop_test(c, far_blocks_are_like_near_ones, 0, 4);
    return c;
}
