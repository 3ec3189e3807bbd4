#ifndef JSON_FIELDS_H
#define JSON_FIELDS_H

#include "engine/base/status.h"

#include <stdbool.h>
#include <stddef.h>

struct cJSON;

/* Reading typed values out of the JSON files of a model folder, with one
 * sentence that names the file, the key and what was expected.
 *
 * A key that is absent and one that is null mean the same: the value keeps
 * what the caller put there.  Keys are case sensitive. */

struct json_file {
    const char *name;            /* goes into sentences; borrowed */
    struct cJSON *root;          /* an object */
};

/* Parse text into an object without duplicate keys at its top level, at most
 * max_bytes long.  fini frees the tree. */
enum status json_file_parse(struct json_file *f, const char *name, const char *text, size_t n,
                            size_t max_bytes, struct error *err) MUST_USE;
void json_file_fini(struct json_file *f);      /* a zeroed one is fine */

/* NULL when absent or null. */
const struct cJSON *json_get(const struct cJSON *object, const char *key);

/* object is f->root or an object inside it. */
enum status json_int(const struct json_file *f, const struct cJSON *object, const char *key,
                     int min, int max, int *value, struct error *err) MUST_USE;
enum status json_double(const struct json_file *f, const struct cJSON *object, const char *key,
                        double min, double max, double *value, struct error *err) MUST_USE;
enum status json_bool(const struct json_file *f, const struct cJSON *object, const char *key,
                      bool *value, struct error *err) MUST_USE;
/* *value stays borrowed from the tree. */
enum status json_string(const struct json_file *f, const struct cJSON *object, const char *key,
                        const char **value, struct error *err) MUST_USE;

/* The whole file at path, at most max_bytes, NUL-terminated; caller frees with
 * mem_free.  ST_IO with a sentence; *absent (may be NULL) tells that there is
 * no such file. */
enum status file_read(char **text, size_t *n, const char *path, size_t max_bytes,
                      bool *absent, struct error *err) MUST_USE;

#endif
