#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include "engine/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Weight files in the safetensors format, mapped read-only.
 *
 * A file is 8 bytes of little-endian header length N, N bytes of JSON and the
 * data.  A strict reader: what the format forbids is refused with a sentence
 * that names the file and the tensor, so data pointers of an opened folder
 * are good for as long as it is open.
 *
 *  1. The header fits the file, is at most 100 MB of valid UTF-8, starts with
 *     '{' and is followed by nothing but spaces.
 *  2. No name occurs twice, in a file or in a folder.
 *  3. The tensors cover the data exactly: no hole, no overlap, no trailing byte.
 *  4. A tensor's bytes are the product of its shape and its type, checked
 *     against overflow.
 *
 * A folder holds model.safetensors, or model.safetensors.index.json with the
 * shards it names.  All types of the format are understood here; which of
 * them are weights is for weights.h to say.
 *
 * Nothing promises that a tensor is aligned, not even to its element.
 * Any thread while open; open and close by one. */

enum tensor_type {
    TENSOR_BOOL, TENSOR_F4, TENSOR_F6_E2M3, TENSOR_F6_E3M2, TENSOR_U8, TENSOR_I8,
    TENSOR_F8_E5M2, TENSOR_F8_E4M3, TENSOR_F8_E8M0, TENSOR_F8_E4M3FNUZ, TENSOR_F8_E5M2FNUZ,
    TENSOR_I16, TENSOR_U16, TENSOR_F16, TENSOR_BF16, TENSOR_I32, TENSOR_U32, TENSOR_F32,
    TENSOR_I64, TENSOR_U64, TENSOR_F64, TENSOR_C64, N_TENSOR_TYPES
};

enum { TENSOR_MAX_RANK = 8 };

struct tensor {
    const char *name;            /* NUL-terminated */
    enum tensor_type type;
    int rank;
    uint64_t shape[TENSOR_MAX_RANK];
    const void *data;
    uint64_t bytes;
    uint64_t begin;              /* offset in the data of its file */
    int file;
};

struct safetensors;

/* dir is a model folder. */
enum status safetensors_open(struct safetensors **out, const char *dir,
                             struct error *err) MUST_USE;

/* One file that is in memory already: borrowed until close.  name goes into
 * sentences. */
enum status safetensors_parse(struct safetensors **out, const char *name, const void *bytes,
                              size_t n, struct error *err) MUST_USE;
void safetensors_close(struct safetensors *st);    /* NULL is fine */

/* All tensors, in no particular order. */
size_t safetensors_count(const struct safetensors *st);
const struct tensor *safetensors_at(const struct safetensors *st, size_t i);
const struct tensor *safetensors_find(const struct safetensors *st, const char *name);

/* Path of a tensor's file, for sentences. */
const char *safetensors_file(const struct safetensors *st, const struct tensor *t);

const char *tensor_type_name(enum tensor_type type);

#endif
