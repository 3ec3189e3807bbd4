#ifndef SAFETENSORS_HEADER_H
#define SAFETENSORS_HEADER_H

#include "engine/model/safetensors.h"

/* The JSON header of one file; private to the safetensors reader.
 *
 * The grammar is a small part of JSON, so it is read directly: no tree is
 * built, memory is proportional to the number of tensors, and there is no
 * recursion that a hostile header could drive. */

struct tensor_list {
    struct tensor *at;           /* names are owned by the list */
    size_t n, capacity;
};

/* Append the tensors of a header to the list.  data_bytes is what follows the
 * header; file goes into the tensors, their data pointer is left NULL.  Checks
 * everything but that names differ. */
enum status safetensors_header_read(struct tensor_list *list, const char *name,
                                    const char *json, size_t n, uint64_t data_bytes, int file,
                                    struct error *err) MUST_USE;
void tensor_list_fini(struct tensor_list *list);

#endif
