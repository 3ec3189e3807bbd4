#include "engine/base/invariant.h"
#include "engine/base/mem.h"
#include "engine/kv/host_copy.h"
#include "engine/kv/hot_sets.h"
#include "engine/kv/kv_pool.h"
#include "engine/model/model_parts.h"

/* The streamed sequence of a step (model.h).
 *
 * A layer's staged blocks are copied on a stream of their own into one of two buffers, those of the
 * next layer into the other.  A layer's attention waits for its copies, and the copies of the
 * layer after next wait for that attention.  All of it is queued at once; nobody waits for anything
 * but the step. */

enum { BUFFERS = 2 };

struct streaming {
    struct stream *copies;
    struct event *arrived[BUFFERS], *left[BUFFERS];
    struct buffer host, device;      /* int32 [layers, max_blocks] tables; the former is pinned */
};

enum status streaming_create(struct model *m, struct error *err)
{
    size_t bytes = (size_t)m->config.layers * (size_t)m->limits.max_blocks * sizeof(int32_t);

    if (m->limits.staged_blocks == 0)
        return ST_OK;
    ASSERT(m->hot);
    struct streaming *st = m->streaming = mem_calloc(1, sizeof *st);
    st->copies = stream_create(m->be);
    for (int i = 0; i < BUFFERS; i++) {
        st->arrived[i] = event_create(m->be);
        st->left[i] = event_create(m->be);
    }
    if (buffer_alloc(m->be, &st->host, MEM_PINNED, bytes) == ST_OK
        && buffer_alloc(m->be, &st->device, MEM_DEVICE, bytes) == ST_OK)
        return ST_OK;
    return error_set(err, ST_NODEVMEM, "no memory for %zu bytes of tables of a streamed sequence",
                     bytes);
}

void streaming_destroy(struct model *m)
{
    struct streaming *st = m->streaming;

    if (!st)
        return;
    for (int i = 0; i < BUFFERS; i++) {
        event_destroy(st->arrived[i]);
        event_destroy(st->left[i]);
    }
    stream_destroy(st->copies);
    buffer_free(m->be, &st->host);
    buffer_free(m->be, &st->device);
    mem_free(st);
}

/* Layers with attention for it: where nothing is sampled the last one has none. */
static int layers_of(const struct pass *p)
{
    return p->g->layers - (p->logit_rows == 0);
}

static void start_copies(struct pass *p, int layer)
{
    const struct model *m = p->m;
    const struct hot_sets_config *tier = hot_sets_config(m->hot);
    struct streaming *st = m->streaming;
    size_t bytes = kv_block_bytes(&p->shape);

    if (layer >= layers_of(p))
        return;
    host_copy_parts(st->copies, kv_pool_staged(p->pool, layer % BUFFERS), tier->host,
                    tier->host_stride, (size_t)layer * bytes, bytes, p->b->staged, p->b->n_staged);
    event_record(st->arrived[layer % BUFFERS], st->copies);
}

static void make_tables(struct pass *p)
{
    const struct model_batch *b = p->b;
    size_t width = (size_t)p->m->limits.max_blocks;
    const int32_t *table = b->kv_table + (size_t)(b->seqs - 1) * width;
    int32_t *to = p->m->streaming->host.base;
    int n = (b->n_tokens[b->seqs - 1] + BLOCK_TOKENS - 1) / BLOCK_TOKENS;

    for (int layer = 0; layer < p->g->layers; layer++, to += width)
        for (int i = 0; i < n; i++) {
            ASSERT(table[i] >= -1 - b->n_staged && table[i] != -1);
            to[i] = table[i] >= 0 ? table[i]
                                  : kv_pool_staged_id(p->pool, layer, layer % BUFFERS,
                                                      -2 - table[i]);
        }
}

void streaming_begin(struct pass *p)
{
    struct streaming *st = p->m->streaming;

    make_tables(p);
    stream_copy(p->s, st->device.base, st->host.base, st->host.bytes);
    for (int layer = 0; layer < BUFFERS; layer++)
        start_copies(p, layer);
}

const int32_t *streaming_enter(struct pass *p, int layer)
{
    struct streaming *st = p->m->streaming;

    event_wait(p->s, st->arrived[layer % BUFFERS]);
    return (const int32_t *)st->device.base + (size_t)layer * (size_t)p->m->limits.max_blocks;
}

void streaming_leave(struct pass *p, int layer)
{
    struct streaming *st = p->m->streaming;

    event_record(st->left[layer % BUFFERS], p->s);
    event_wait(st->copies, st->left[layer % BUFFERS]);
    start_copies(p, layer + BUFFERS);
}

enum status streaming_failure(const struct model *m, struct error *err)
{
    return m->streaming ? stream_failure(m->streaming->copies, err) : ST_OK;
}
