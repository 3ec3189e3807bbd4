#include "tests/emulator/cudart.h"

#include <stdlib.h>
#include <string.h>

/* nvcc's wrapper points to one blob: a header, and behind it entries of which each has a header
 * and then its payload.  Offsets are those that nvcc 13.0 writes; a header says its size, so
 * fields behind those read here do not matter. */

enum {
    WRAPPER_MAGIC = 0x466243b1,
    WRAPPER_VERSION = 1,         /* 2: parts that are still to be linked */
    KIND_PTX = 1,
};
#define BLOB_MAGIC 0xba55ed50u
#define FLAGS_COMPRESSED 0xe000u /* one bit for each of the compressions */

struct wrapper {
    int magic, version;
    const void *blob;
    const void *file;
};

struct blob_header {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;              /* of all entries */
};

struct entry_header {
    uint16_t kind, version;
    uint32_t header_bytes;
    uint64_t bytes;              /* of the payload, padding included */
    uint32_t compressed_bytes;   /* 0: not compressed */
    uint32_t options_at;
    uint16_t minor, major;       /* of the PTX or ELF */
    uint32_t arch;               /* 90 of compute_90 */
    uint32_t name_at, name_bytes;
    uint64_t flags;
};

static const char *payload_of(const char *at, const struct entry_header *e, size_t *n)
{
    const char *text = at + e->header_bytes;

    if (e->compressed_bytes != 0 || (e->flags & FLAGS_COMPRESSED) != 0)
        cudart_die("fat binary", "the PTX for %u is compressed; nvcc needs --no-compress",
                   e->arch);
    *n = strnlen(text, e->bytes); /* padded with zeros */
    if (!memmem(text, *n, ".version", 8) || !memmem(text, *n, ".target", 7))
        cudart_die("fat binary", "what should be PTX for %u is not text of it", e->arch);
    return text;
}

static const struct blob_header *blob_of(const struct wrapper *w)
{
    const struct blob_header *b = w->blob;

    if (w->magic != WRAPPER_MAGIC || w->version != WRAPPER_VERSION)
        cudart_die("fat binary", "a wrapper of magic %#x and version %d is not known",
                   (unsigned)w->magic, w->version);
    if (b->magic != BLOB_MAGIC || b->header_bytes < sizeof *b)
        cudart_die("fat binary", "a header of magic %#x and %u bytes is not known", b->magic,
                   b->header_bytes);
    return b;
}

const char *fatbin_ptx(const void *wrapper, int cc, size_t *n)
{
    const struct blob_header *b = blob_of(wrapper);
    const char *at = (const char *)b + b->header_bytes, *end = at + b->bytes, *found = NULL;
    unsigned best = 0;

    *n = 0;
    while (at < end) {
        struct entry_header e;
        size_t left = (size_t)(end - at);
        if (left < sizeof e)
            cudart_die("fat binary", "its last entry is cut off");
        memcpy(&e, at, sizeof e);
        if (e.header_bytes < sizeof e || e.header_bytes > left ||
            e.bytes > left - e.header_bytes)
            cudart_die("fat binary", "an entry of %u + %llu bytes in the last %zu", e.header_bytes,
                       (unsigned long long)e.bytes, left);
        if (e.kind == KIND_PTX && e.arch <= (unsigned)cc && e.arch > best) {
            found = payload_of(at, &e, n);
            best = e.arch;
        }
        at += e.header_bytes + e.bytes;
    }
    return found;
}

/* The first number behind a directive between p and end, or 0. */
static int number_behind(const char *p, const char *end, const char *directive)
{
    const char *at = memmem(p, (size_t)(end - p), directive, strlen(directive));

    return at ? (int)strtol(at + strlen(directive), NULL, 10) : 0;
}

/* From the kernel's name to its body, or NULL; *end: of that. */
static const char *head_of(const char *ptx, size_t n, const char *kernel, const char **end)
{
    static const char entry[] = ".entry ";
    const size_t length = strlen(kernel), before = sizeof entry - 1;
    const char *at = ptx, *stop = ptx + n;

    while ((at = memmem(at, (size_t)(stop - at), kernel, length)) != NULL) {
        const char *behind = at + length;
        if ((size_t)(at - ptx) >= before && memcmp(at - before, entry, before) == 0 &&
            behind < stop && (*behind == '(' || *behind == '\n' || *behind == ' ')) {
            *end = memchr(behind, '{', (size_t)(stop - behind));
            return *end ? behind : NULL;
        }
        at = behind;
    }
    return NULL;
}

struct launch_bounds fatbin_launch_bounds(const char *ptx, size_t n, const char *kernel)
{
    struct launch_bounds b = { 0, 0 };
    const char *end, *at = head_of(ptx, n, kernel, &end);

    if (!at)
        return b;
    b.max_threads = number_behind(at, end, ".maxntid");
    if (b.max_threads == 0)
        b.max_threads = number_behind(at, end, ".reqntid");
    b.min_blocks = number_behind(at, end, ".minnctapersm");
    return b;
}
