/* Weight files and folders.  What is accepted covers its data exactly and is found by
 * name; what is refused has a sentence.  The first byte picks one of
 *
 *   RAW      the rest is a file
 *   HEADER   one byte of data length, the rest is a header; the file is made from them
 *   FOLDER   two bytes of data lengths, then an index and the headers of a.safetensors
 *            and b.safetensors with a byte 1 between them: files in a folder, mapped */

#include "engine/base/invariant.h"
#include "engine/model/safetensors.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RAW, HEADER, FOLDER, N_MODES };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile unsigned char sink;

static void check(const struct safetensors *st, uint64_t data_bytes)
{
    uint64_t covered = 0;

    for (size_t i = 0; i < safetensors_count(st); i++) {
        const struct tensor *t = safetensors_at(st, i);
        uint64_t elements = 1;
        ASSERT(t->rank >= 0 && t->rank <= TENSOR_MAX_RANK && t->bytes <= data_bytes);
        ASSERT(t->begin <= data_bytes - t->bytes);
        for (int d = 0; d < t->rank; d++)
            elements *= t->shape[d];
        ASSERT((elements == 0) == (t->bytes == 0));
        ASSERT(safetensors_find(st, t->name) == t);
        ASSERT(tensor_type_name(t->type) && *safetensors_file(st, t));
        for (uint64_t b = 0; b < t->bytes; b++)      /* all of it can be read */
            sink = ((const unsigned char *)t->data)[b];
        covered += t->bytes;
    }
    ASSERT(covered == data_bytes);
}

static void parse(const uint8_t *file, size_t n)
{
    struct safetensors *st = NULL;
    struct error err = { 0 };

    if (safetensors_parse(&st, "fuzz", file, n, &err) == ST_OK) {
        uint64_t header = 0;
        for (int i = 7; i >= 0; i--)
            header = header << 8 | file[i];
        check(st, n - 8 - header);
    } else {
        ASSERT(!st && strncmp(err.text, "fuzz: ", 6) == 0);
    }
    safetensors_close(st);
}

static uint8_t *make_file(const uint8_t *header, size_t n, size_t n_data)
{
    uint8_t *file = calloc(8 + n + n_data, 1);

    ASSERT(file);
    for (int i = 0; i < 8; i++)
        file[i] = (uint8_t)((uint64_t)n >> 8 * i);
    if (n)
        memcpy(file + 8, header, n);
    return file;
}

/* ---- folders */

static char folder[40];

static void remove_folder(void)
{
    static const char *const names[] = { "a.safetensors", "b.safetensors",
                                         "model.safetensors.index.json" };
    char path[100];

    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        remove(path);
    }
    rmdir(folder);
}

static void open_folder(void)
{
    if (*folder)
        return;
    snprintf(folder, sizeof folder, "/tmp/asynctlsd-fuzz-XXXXXX");
    ASSERT(mkdtemp(folder));
    atexit(remove_folder);
}

static void put(const char *name, const void *bytes, size_t n)
{
    char path[100];

    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *out = fopen(path, "wb");
    ASSERT(out && fwrite(bytes, 1, n, out) == n && fclose(out) == 0);
}

static void put_weights(const char *name, const uint8_t *header, size_t n, size_t n_data)
{
    uint8_t *file = make_file(header, n, n_data);

    put(name, file, 8 + n + n_data);
    free(file);
}

/* The bytes up to the next 1, or all. */
static size_t part(const uint8_t *p, size_t n)
{
    const uint8_t *end = n ? memchr(p, 1, n) : NULL;

    return end ? (size_t)(end - p) : n;
}

static void try_folder(const uint8_t *p, size_t n)
{
    struct safetensors *st = NULL;
    struct error err = { 0 };

    if (n < 2)
        return;
    size_t n_a = p[0], n_b = p[1];
    p += 2, n -= 2;
    size_t index = part(p, n), a_at = index + (index < n), a = part(p + a_at, n - a_at);
    size_t b_at = a_at + a + (a_at + a < n), b = part(p + b_at, n - b_at);
    open_folder();
    put("model.safetensors.index.json", p, index);
    put_weights("a.safetensors", p + a_at, a, n_a);
    put_weights("b.safetensors", p + b_at, b, n_b);
    if (safetensors_open(&st, folder, &err) == ST_OK) {
        uint64_t used[2] = { 0, 0 };
        for (size_t i = 0; i < safetensors_count(st); i++) {
            const char *file = safetensors_file(st, safetensors_at(st, i));
            used[strcmp(strrchr(file, '/'), "/b.safetensors") == 0] = 1;
        }
        check(st, used[0] * n_a + used[1] * n_b);
    } else {
        ASSERT(!st && strncmp(err.text, folder, strlen(folder)) == 0);
    }
    safetensors_close(st);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    if (data[0] % N_MODES == RAW) {
        parse(data + 1, size - 1);
    } else if (data[0] % N_MODES == HEADER) {
        uint8_t *file = make_file(data + 2, size - 2, data[1]);
        parse(file, 8 + size - 2 + data[1]);
        free(file);
    } else {
        try_folder(data + 1, size - 1);
    }
    return 0;
}
