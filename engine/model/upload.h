#ifndef UPLOAD_H
#define UPLOAD_H

#include "engine/base/status.h"

#include <stddef.h>

struct backend;
struct progress;

/* Copying a model's tensors to the device.
 *
 * The files are mapped, which is not memory that a device can read, so the bytes go
 * through pinned buffers.  Several readers do it at once, in the order of the list: one
 * alone would leave disk, page cache and link waiting for each other. */

struct upload {
    const void *from;            /* host */
    void *to;                    /* device */
    size_t bytes;
};

/* Returns when all is there.  Progress goes to the log, and is added to *progress unless NULL. */
enum status upload_all(struct backend *be, const struct upload *list, size_t n,
                       struct progress *progress, struct error *err) MUST_USE;

#endif
