#include "engine/model/upload.h"

#include "engine/base/invariant.h"
#include "engine/base/log.h"
#include "engine/base/mem.h"
#include "engine/base/progress.h"
#include "kernels/backend.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

/* While one buffer is on its way the reader fills the other. */
enum { READERS = 4, BUFFERS = 2, PIECE_BYTES = 8 << 20, REPORTS = 10,
       MIN_REPORTED_BYTES = 256 << 20 };

struct work {
    struct backend *be;
    const struct upload *list;
    size_t *first_piece;         /* [n + 1] number of the first piece of each entry */
    size_t n;
    struct progress own;
    struct progress *told;       /* the caller's, where others may add too; or NULL */
    _Atomic size_t next_piece;
    _Atomic bool failed;
};

struct reader {
    struct work *work;
    pthread_t thread;
    struct buffer buffer[BUFFERS];
    struct stream *stream[BUFFERS];
    enum status st;
    struct error err;
};

static size_t pieces_of(size_t bytes)
{
    return (bytes + PIECE_BYTES - 1) / PIECE_BYTES;
}

/* The entry that holds the piece: the last that starts by then. */
static size_t entry_of(const struct work *w, size_t piece)
{
    size_t low = 0, high = w->n - 1;

    while (low < high) {
        size_t middle = (low + high + 1) / 2;
        if (w->first_piece[middle] <= piece)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

static void report(struct work *w, size_t bytes)
{
    uint64_t total = atomic_load(&w->own.total_bytes);
    uint64_t before = atomic_fetch_add(&w->own.done_bytes, bytes), after = before + bytes;

    if (w->told)
        atomic_fetch_add(&w->told->done_bytes, bytes);
    if (total >= MIN_REPORTED_BYTES && after * REPORTS / total != before * REPORTS / total)
        log_info("model", "weights: %llu of %llu MB on the device",
                 (unsigned long long)(after >> 20), (unsigned long long)(total >> 20));
}

static enum status copy_piece(struct reader *r, int slot, size_t piece)
{
    struct work *w = r->work;
    const struct upload *u = &w->list[entry_of(w, piece)];
    size_t at = (piece - w->first_piece[u - w->list]) * PIECE_BYTES;
    size_t n = u->bytes - at < PIECE_BYTES ? u->bytes - at : PIECE_BYTES;

    TRY(stream_sync(r->stream[slot], &r->err)); /* what the buffer held has left */
    memcpy(r->buffer[slot].base, (const char *)u->from + at, n);
    stream_copy(r->stream[slot], (char *)u->to + at, r->buffer[slot].base, n);
    report(w, n);
    return ST_OK;
}

static void *read_pieces(void *arg)
{
    struct reader *r = arg;
    struct work *w = r->work;
    size_t n_pieces = w->first_piece[w->n];

    for (int slot = 0; r->st == ST_OK && !atomic_load(&w->failed); slot = (slot + 1) % BUFFERS) {
        size_t piece = atomic_fetch_add(&w->next_piece, 1);
        if (piece >= n_pieces)
            break;
        r->st = copy_piece(r, slot, piece);
    }
    for (int slot = 0; slot < BUFFERS && r->st == ST_OK; slot++)
        r->st = stream_sync(r->stream[slot], &r->err);
    if (r->st != ST_OK)
        atomic_store(&w->failed, true);
    return NULL;
}

static enum status open_reader(struct reader *r, struct work *w)
{
    r->work = w;
    for (int slot = 0; slot < BUFFERS; slot++) {
        if (buffer_alloc(w->be, &r->buffer[slot], MEM_PINNED, PIECE_BYTES) != ST_OK)
            return error_set(&r->err, ST_NOMEM, "no memory for %d pinned bytes", PIECE_BYTES);
        r->stream[slot] = stream_create(w->be);
    }
    return ST_OK;
}

static void close_reader(struct work *w, struct reader *r)
{
    for (int slot = 0; slot < BUFFERS; slot++) {
        stream_destroy(r->stream[slot]);
        buffer_free(w->be, &r->buffer[slot]);
    }
}

static enum status run_readers(struct work *w, struct error *err)
{
    struct reader readers[READERS] = { 0 };
    enum status st = ST_OK;
    int n_started = 0;

    for (int i = 0; i < READERS && st == ST_OK; i++) {
        st = readers[i].st = open_reader(&readers[i], w);
        if (st == ST_OK && pthread_create(&readers[i].thread, NULL, read_pieces, &readers[i])) {
            st = error_set(&readers[i].err, ST_NOMEM, "a reader thread does not start");
            readers[i].st = st;
        }
        n_started += st == ST_OK;
    }
    if (st != ST_OK)
        atomic_store(&w->failed, true);
    for (int i = 0; i < n_started; i++)
        pthread_join(readers[i].thread, NULL);
    for (int i = 0; i < READERS; i++) {
        if (readers[i].st != ST_OK) {
            st = readers[i].st;
            if (err)
                *err = readers[i].err;
        }
        close_reader(w, &readers[i]);
    }
    return st;
}

enum status upload_all(struct backend *be, const struct upload *list, size_t n,
                       struct progress *progress, struct error *err)
{
    struct work w = { .be = be, .list = list, .n = n, .told = progress };
    uint64_t total = 0;

    if (n == 0)
        return ST_OK;
    w.first_piece = mem_calloc(n + 1, sizeof *w.first_piece);
    for (size_t i = 0; i < n; i++) {
        ASSERT(list[i].bytes > 0);
        w.first_piece[i + 1] = w.first_piece[i] + pieces_of(list[i].bytes);
        total += list[i].bytes;
    }
    atomic_store(&w.own.total_bytes, total);
    if (progress)
        atomic_fetch_add(&progress->total_bytes, total);
    enum status st = run_readers(&w, err);
    mem_free(w.first_piece);
    return st;
}
