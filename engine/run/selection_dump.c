#include "engine/run/selection_dump.h"

#include "engine/base/invariant.h"
#include "engine/base/log.h"
#include "engine/base/mem.h"
#include "engine/kv/hot_sets.h"
#include "engine/kv/kv_pool.h"
#include "engine/run/sequence.h"
#include "kernels/backend.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

_Static_assert(sizeof(struct selection_header) == 72 && sizeof(struct selection_record) == 48,
               "the file has no gaps that a compiler chose");

/* A sequence of the step. */
struct unit {
    bool wanted;
    uint64_t sequence;
    uint32_t first, n_tokens;        /* rows [first, n_tokens) are not in the file */
    bool has_set;
};

struct selection_dump {
    char *path;
    int fd;                          /* -1: the dump has ended by an error */
    bool created, full;
    uint64_t max_bytes, planned_bytes, bytes; /* promised to steps; in the file */
    uint32_t nth_layer;
    size_t query_bytes;              /* padded */
    int heads;
    struct kv_shape shape;
    enum dtype act;
    int max_seqs;
    const struct select_plan *plan;
    struct backend *be;
    struct stream *stream;
    struct kv_pool *pool;
    struct hot_sets *sets;
    struct unit *units;              /* [max_seqs] */
    struct buffer record;            /* pinned: one with its payload, as large as any */
};

static size_t padded(size_t bytes)
{
    return (bytes + 7) / 8 * 8;
}

static uint32_t blocks_of(uint32_t tokens)
{
    return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

static size_t row_bytes(const struct selection_dump *d)
{
    return kv_row_dim(&d->shape) * sizeof(bf16);
}

/* ---- sizes */

static size_t place_words(uint32_t n_tokens, bool has_set)
{
    return has_set ? (blocks_of(n_tokens) + 31) / 32 : 0;
}

static size_t step_bytes(const struct selection_dump *d, const struct select_layer *l,
                         uint32_t n_tokens, bool has_set)
{
    size_t lists = (size_t)d->shape.kv_heads * (size_t)(2 + l->keep_blocks + l->keep_tokens);

    return d->query_bytes + padded((lists + place_words(n_tokens, has_set)) * sizeof(int32_t));
}

static bool has_layer(const struct selection_dump *d, int layer)
{
    return layer % (int)d->nth_layer == 0 && !d->plan->layer[layer].dense;
}

static uint64_t unit_bytes(const struct selection_dump *d, const struct unit *u)
{
    uint64_t rows = (uint64_t)(u->n_tokens - u->first) * (uint64_t)d->shape.kv_heads * row_bytes(d);
    uint64_t records = blocks_of(u->n_tokens) - u->first / BLOCK_TOKENS + 1, bytes = 0;

    for (int layer = 0; layer < d->plan->n_layers; layer++)
        if (has_layer(d, layer))
            bytes += records * sizeof(struct selection_record) + rows +
                     step_bytes(d, &d->plan->layer[layer], u->n_tokens, u->has_set);
    return bytes;
}

/* ---- the file */

static void end_dump(struct selection_dump *d, int why)
{
    log_error("engine", "selection-dump %s: %s; it ends after %llu bytes", d->path, strerror(why),
              (unsigned long long)d->bytes);
    /* What was written of a record goes; where it cannot, the reader leaves it out. */
    if (ftruncate(d->fd, (off_t)d->bytes) != 0)
        log_warn("engine", "selection-dump %s: its last record is cut", d->path);
    close(d->fd);
    d->fd = -1;
}

static void write_bytes(struct selection_dump *d, const void *bytes, size_t n)
{
    for (size_t at = 0; at < n;) {
        ssize_t written = write(d->fd, (const char *)bytes + at, n - at);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0) {
            end_dump(d, written < 0 ? errno : ENOSPC);
            return;
        }
        at += (size_t)written;
    }
    d->bytes += n;
}

/* Once what is queued has arrived behind the head.  A device error shows at the step's end. */
static void write_record(struct selection_dump *d, const struct selection_record *head)
{
    if (stream_sync(d->stream, NULL) != ST_OK || d->fd < 0)
        return;
    memcpy(d->record.base, head, sizeof *head);
    write_bytes(d, d->record.base, sizeof *head + head->bytes);
}

static char *payload(const struct selection_dump *d)
{
    return (char *)d->record.base + sizeof(struct selection_record);
}

/* ---- records */

/* n rows of each head, from `first` on, of the block that an entry of the tables names: queued,
 * or where they are in host memory done. */
static void take_rows(struct selection_dump *d, int layer, const struct model_batch *b,
                      size_t entry, uint32_t first, uint32_t n)
{
    const size_t bytes = n * row_bytes(d), heads = (size_t)d->shape.kv_heads;
    const size_t stride = BLOCK_TOKENS * row_bytes(d), at = first * row_bytes(d);

    if (b->kv_table[entry] >= 0) {
        const char *block = (const char *)kv_pool_kv(d->pool, layer) +
                            (size_t)b->kv_table[entry] * kv_block_bytes(&d->shape);
        stream_copy_pieces(d->stream, payload(d), bytes, block + at, stride, bytes, heads);
        return;
    }
    struct hot_rows hot = hot_sets_layer(d->sets, layer);
    const char *block = (const char *)hot.host + (size_t)b->host_table[entry] * hot.host_stride;
    for (size_t g = 0; g < heads; g++)
        memcpy(payload(d) + g * bytes, block + g * stride + at, bytes);
}

static void write_rows(struct selection_dump *d, int layer, const struct model_batch *b,
                       size_t table, const struct unit *u)
{
    for (uint32_t from = u->first; from < u->n_tokens;) {
        uint32_t block = from / BLOCK_TOKENS, end = (block + 1) * BLOCK_TOKENS;
        uint32_t n = (end < u->n_tokens ? end : u->n_tokens) - from;
        take_rows(d, layer, b, table + block, from % BLOCK_TOKENS, n);
        write_record(d, &(struct selection_record){
            .kind = SELECTION_ROWS, .layer = (uint32_t)layer, .sequence = u->sequence,
            .first = from, .n = n, .bytes = (size_t)d->shape.kv_heads * n * row_bytes(d) });
        from += n;
    }
}

/* Queue the copy of a list's part; what is behind it. */
static int32_t *copy_list(struct selection_dump *d, int32_t *to, const int32_t *lists, int at,
                          int width)
{
    size_t n = (size_t)d->shape.kv_heads * (size_t)width;

    stream_copy(d->stream, to, lists + (size_t)at * n, n * sizeof *to);
    return to + n;
}

static void write_step(struct selection_dump *d, int layer, const struct model_selection *s,
                       int at, size_t table, const struct unit *u)
{
    const struct select_layer *l = &d->plan->layer[layer];
    size_t act = dtype_bytes(d->act), bytes = step_bytes(d, l, u->n_tokens, u->has_set);
    size_t query = (size_t)(d->heads * d->shape.head_dim) * act;
    const char *q = (const char *)s->q + (size_t)at * (size_t)s->q_stride * act;
    int32_t *to = (int32_t *)(void *)(payload(d) + d->query_bytes);

    memset(payload(d), 0, bytes);
    stream_copy(d->stream, payload(d), q, query);
    to = copy_list(d, to, s->lists.n_kept, at, 1);
    to = copy_list(d, to, s->lists.n_chosen, at, 1);
    to = copy_list(d, to, s->lists.kept, at, s->keep_blocks);
    to = copy_list(d, to, s->lists.chosen, at, s->keep_tokens);
    for (uint32_t i = 0; u->has_set && i < blocks_of(u->n_tokens); i++)
        if (s->batch->kv_table[table + i] >= 0)
            to[i / 32] |= (int32_t)(UINT32_C(1) << i % 32);
    write_record(d, &(struct selection_record){
        .kind = SELECTION_STEP, .layer = (uint32_t)layer, .sequence = u->sequence,
        .first = u->n_tokens - 1, .n = u->n_tokens, .step = s->step,
        .keep_blocks = (uint32_t)l->keep_blocks, .keep_tokens = (uint32_t)l->keep_tokens,
        .hot_rows = u->has_set ? (uint32_t)hot_sets_config(d->sets)->rows_per_head : 0,
        .bytes = bytes });
}

static void on_selection(void *arg, int layer, const struct model_selection *s)
{
    struct selection_dump *d = arg;

    if (!has_layer(d, layer))
        return;
    for (int at = 0; at < s->batch->sparse_seqs && d->fd >= 0; at++) {
        const struct unit *u = &d->units[at];
        size_t table = (size_t)at * (size_t)s->max_blocks;
        if (!u->wanted)
            continue;
        write_rows(d, layer, s->batch, table, u);
        if (d->fd >= 0)
            write_step(d, layer, s, at, table, u);
    }
}

/* ---- the step's sequences */

void selection_dump_begin(struct selection_dump *d)
{
    memset(d->units, 0, (size_t)d->max_seqs * sizeof *d->units);
}

void selection_dump_add(struct selection_dump *d, struct sequence *q, int at)
{
    struct unit u = { .wanted = true, .sequence = q->order, .first = q->n_dumped,
                      .n_tokens = q->n_computed + 1, .has_set = q->hot_set >= 0 };

    ASSERT(at < d->max_seqs);
    if (d->fd < 0 || d->full || u.n_tokens <= u.first)
        return;
    uint64_t bytes = unit_bytes(d, &u);
    if (bytes > d->max_bytes - d->planned_bytes) {
        d->full = true;
        log_warn("engine", "selection-dump %s: the next step would pass the %llu bytes of "
                 "selection-dump-bytes; it ends here", d->path, (unsigned long long)d->max_bytes);
        return;
    }
    d->planned_bytes += bytes;
    d->units[at] = u;
    q->n_dumped = u.n_tokens;
}

/* ---- life */

static enum status open_file(struct selection_dump *d, struct error *err)
{
    struct statvfs fs;

    d->fd = open(d->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (d->fd < 0)
        return error_set(err, ST_IO, "selection-dump %s: %s", d->path, strerror(errno));
    d->created = true;
    if (fstatvfs(d->fd, &fs) != 0)
        return error_set(err, ST_IO, "selection-dump %s: %s", d->path, strerror(errno));
    uint64_t room = (uint64_t)fs.f_bavail * fs.f_frsize;
    if (room >= d->max_bytes)
        return ST_OK;
    return error_set(err, ST_IO, "selection-dump %s: the disk has %llu MB free; "
                     "selection-dump-bytes is %llu MB", d->path, (unsigned long long)room >> 20,
                     (unsigned long long)d->max_bytes >> 20);
}

static enum status write_header(struct selection_dump *d, const struct model_config *m,
                                struct error *err)
{
    const struct select_config *c = &d->plan->config;
    const struct selection_header h = {
        .magic = "seldump", .version = SELECTION_DUMP_VERSION, .act = d->act,
        .layers = (uint32_t)m->layers, .heads = (uint32_t)m->heads,
        .kv_heads = (uint32_t)d->shape.kv_heads, .head_dim = (uint32_t)d->shape.head_dim,
        .latent_dim = (uint32_t)d->shape.latent_dim, .row_dim = (uint32_t)kv_row_dim(&d->shape),
        .block_tokens = BLOCK_TOKENS, .nth_layer = d->nth_layer, .filter = c->filter,
        .index = c->index, .selection = c->selection, .sink_tokens = (uint32_t)c->sink_tokens,
        .recent_tokens = (uint32_t)c->recent_tokens, .scale = m->score_scale,
    };

    d->planned_bytes = sizeof h;
    write_bytes(d, &h, sizeof h);
    if (d->fd >= 0)
        return ST_OK;
    return error_set(err, ST_IO, "selection-dump %s: its header cannot be written", d->path);
}

/* Room for the largest record; contexts are at most as long as positions go. */
static enum status make_room(struct selection_dump *d, const struct model_config *m,
                             struct error *err)
{
    const struct select_layer most = { false, d->plan->max_keep_blocks, d->plan->max_keep_tokens };
    size_t step = step_bytes(d, &most, (uint32_t)m->max_position, true);
    size_t rows = kv_block_bytes(&d->shape);
    size_t bytes = sizeof(struct selection_record) + (step > rows ? step : rows);

    if (buffer_alloc(d->be, &d->record, MEM_PINNED, bytes) != ST_OK)
        return error_set(err, ST_NOMEM, "selection-dump: no memory for %zu bytes", bytes);
    return ST_OK;
}

static bool has_a_layer(const struct selection_dump *d)
{
    for (int layer = 0; layer < d->plan->n_layers; layer++)
        if (has_layer(d, layer))
            return true;
    return false;
}

static enum status start(struct selection_dump *d, const struct model_config *m,
                         struct error *err)
{
    if (!has_a_layer(d))
        return error_set(err, ST_INVALID, "selection-dump: layer-exceptions makes all layers that "
                         "it would have dense");
    TRY(make_room(d, m, err));
    TRY(open_file(d, err));
    return write_header(d, m, err);
}

enum status selection_dump_open(struct selection_dump **out, struct model *m,
                                const struct selection_dump_config *cfg, struct error *err)
{
    const struct model_config *config = model_config(m);
    struct selection_dump *d = mem_calloc(1, sizeof *d);

    *out = NULL;
    ASSERT(cfg->nth_layer > 0);
    d->path = mem_strdup(cfg->path);
    d->fd = -1;
    d->max_bytes = cfg->max_bytes;
    d->nth_layer = cfg->nth_layer;
    d->plan = cfg->plan;
    d->be = cfg->be;
    d->stream = cfg->stream;
    d->act = backend_info(cfg->be)->act;
    d->shape = model_kv_shape(m, &cfg->plan->config);
    d->heads = config->heads;
    d->query_bytes = padded((size_t)(d->heads * d->shape.head_dim) * dtype_bytes(d->act));
    d->max_seqs = cfg->max_seqs;
    d->units = mem_calloc((size_t)cfg->max_seqs, sizeof *d->units);
    enum status st = start(d, config, err);
    if (st != ST_OK) {
        selection_dump_close(d);
        return st;
    }
    model_watch(m, on_selection, d);
    *out = d;
    return ST_OK;
}

void selection_dump_close(struct selection_dump *d)
{
    if (!d)
        return;
    if (d->fd >= 0)
        close(d->fd);
    /* Without a step it would only be in the way of the next one. */
    if (d->created && d->bytes <= sizeof(struct selection_header))
        unlink(d->path);
    buffer_free(d->be, &d->record);
    mem_free(d->units);
    mem_free(d->path);
    mem_free(d);
}

void selection_dump_use(struct selection_dump *d, struct kv_pool *pool, struct hot_sets *sets)
{
    d->pool = pool;
    d->sets = sets;
}
