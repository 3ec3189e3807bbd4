#ifndef KERNELS_BACKEND_OPEN_H
#define KERNELS_BACKEND_OPEN_H

#include "kernels/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How a back end plugs in behind backend.h; private to kernels.
 *
 * Each back end defines `struct backend`, `struct stream` and `struct event` as it
 * likes, under one rule that lets backend.c find its calls:
 *   the first member of struct backend is  const struct device_calls *calls;
 *   the first member of struct stream, event and graph is  struct backend *be;
 * Every entry but the graphs' is required and means what backend.h says of the function of the
 * same name. */
struct device_calls {
    void (*close)(struct backend *be);
    const struct device_info *(*info)(const struct backend *be);
    const struct backend_ops *(*ops)(const struct backend *be);

    size_t (*memory_free)(struct backend *be);

    /* bytes > 0; *out is empty on entry. */
    enum status (*buffer_alloc)(struct backend *be, struct buffer *out,
                                enum memory_kind kind, size_t bytes);
    void (*buffer_free)(struct backend *be, struct buffer *buf);  /* not an empty one */
    enum status (*host_register)(struct backend *be, void *base, size_t bytes, struct error *err);
    void (*host_unregister)(struct backend *be, void *base);

    struct stream *(*stream_create)(struct backend *be);
    void (*stream_destroy)(struct stream *s);
    enum status (*stream_sync)(struct stream *s, struct error *err);
    enum status (*stream_failure)(struct stream *s, struct error *err);
    /* Of copies and fills backend.c asks for those alone that move something. */
    void (*stream_copy)(struct stream *s, void *dst, const void *src, size_t bytes);
    void (*stream_copy_pieces)(struct stream *s, void *dst, size_t dst_stride, const void *src,
                               size_t src_stride, size_t bytes, size_t n);
    void (*stream_fill)(struct stream *s, void *dst, uint8_t value, size_t bytes);

    struct event *(*event_create)(struct backend *be);
    void (*event_destroy)(struct event *ev);
    void (*event_record)(struct event *ev, struct stream *s);
    void (*event_wait)(struct stream *s, struct event *ev);
    bool (*event_done)(const struct event *ev);

    void (*graph_begin)(struct stream *s);           /* all NULL where info.graphs is false */
    struct graph *(*graph_end)(struct stream *s);
    void (*graph_launch)(struct stream *s, struct graph *g);
    void (*graph_destroy)(struct graph *g);
};

enum status cpu_backend_open(struct backend **out, const struct backend_options *options,
                             struct error *err) MUST_USE;

/* Defined by kernels/cuda; called only in builds that have it (WITH_CUDA). */
enum status cuda_backend_open(struct backend **out, int device, struct error *err) MUST_USE;
bool cuda_device_present(void);  /* a driver that knows a GPU, or cannot say whether */
enum status cuda_count_devices(int *out, struct error *err) MUST_USE;

#ifdef __cplusplus
}
#endif
#endif
