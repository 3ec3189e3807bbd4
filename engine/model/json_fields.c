#include "engine/model/json_fields.h"

#include "engine/base/mem.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_TOP_KEYS = 2000 };

static bool is_blank(const char *p, const char *end)
{
    for (; p < end; p++)
        if (*p != ' ' && *p != '\t' && *p != '\r' && *p != '\n')
            return false;
    return true;
}

/* Readers differ in which of two equal keys counts, so neither may. */
static enum status check_keys(const struct json_file *f, struct error *err)
{
    int n = 0;

    for (const cJSON *a = f->root->child; a; a = a->next) {
        if (++n > MAX_TOP_KEYS)
            return error_set(err, ST_INVALID, "%s: more than %d keys", f->name, MAX_TOP_KEYS);
        for (const cJSON *b = f->root->child; b != a; b = b->next)
            if (strcmp(a->string, b->string) == 0)
                return error_set(err, ST_INVALID, "%s: \"%.80s\" is there twice", f->name,
                                 a->string);
    }
    return ST_OK;
}

enum status json_file_parse(struct json_file *f, const char *name, const char *text, size_t n,
                            size_t max_bytes, struct error *err)
{
    const char *end = NULL;

    f->name = name;
    f->root = NULL;
    if (n > max_bytes)
        return error_set(err, ST_INVALID, "%s: %zu bytes, the limit is %zu", name, n, max_bytes);
    f->root = cJSON_ParseWithLengthOpts(text, n, &end, 0);
    if (!f->root || !is_blank(end, text + n)) {
        size_t at = end ? (size_t)(end - text) : 0;
        json_file_fini(f);
        return error_set(err, ST_INVALID, "%s: not valid JSON near byte %zu", name, at);
    }
    if (!cJSON_IsObject(f->root)) {
        json_file_fini(f);
        return error_set(err, ST_INVALID, "%s: not a JSON object", name);
    }
    return check_keys(f, err);
}

void json_file_fini(struct json_file *f)
{
    cJSON_Delete(f->root);
    f->root = NULL;
}

const struct cJSON *json_get(const struct cJSON *object, const char *key)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);

    return item && !cJSON_IsNull(item) ? item : NULL;
}

enum status json_int(const struct json_file *f, const struct cJSON *object, const char *key,
                     int min, int max, int *value, struct error *err)
{
    const cJSON *item = json_get(object, key);

    if (!item)
        return ST_OK;
    double v = cJSON_IsNumber(item) ? item->valuedouble : NAN;
    if (!(v >= min && v <= max) || v != floor(v))
        return error_set(err, ST_INVALID, "%s: \"%s\" must be a whole number from %d to %d",
                         f->name, key, min, max);
    *value = (int)v;
    return ST_OK;
}

enum status json_double(const struct json_file *f, const struct cJSON *object, const char *key,
                        double min, double max, double *value, struct error *err)
{
    const cJSON *item = json_get(object, key);

    if (!item)
        return ST_OK;
    double v = cJSON_IsNumber(item) ? item->valuedouble : NAN;
    if (!(v >= min && v <= max))
        return error_set(err, ST_INVALID, "%s: \"%s\" must be a number from %g to %g", f->name,
                         key, min, max);
    *value = v;
    return ST_OK;
}

enum status json_bool(const struct json_file *f, const struct cJSON *object, const char *key,
                      bool *value, struct error *err)
{
    const cJSON *item = json_get(object, key);

    if (!item)
        return ST_OK;
    if (!cJSON_IsBool(item))
        return error_set(err, ST_INVALID, "%s: \"%s\" must be true or false", f->name, key);
    *value = cJSON_IsTrue(item);
    return ST_OK;
}

enum status json_string(const struct json_file *f, const struct cJSON *object, const char *key,
                        const char **value, struct error *err)
{
    const cJSON *item = json_get(object, key);

    if (!item)
        return ST_OK;
    if (!cJSON_IsString(item))
        return error_set(err, ST_INVALID, "%s: \"%s\" must be a string", f->name, key);
    *value = item->valuestring;
    return ST_OK;
}

static enum status file_take(FILE *in, char **text, size_t *n, const char *path,
                             size_t max_bytes, struct error *err)
{
    struct stat st;

    if (fstat(fileno(in), &st) != 0 || !S_ISREG(st.st_mode))
        return error_set(err, ST_IO, "%s: not a file", path);
    if (st.st_size < 0 || (uint64_t)st.st_size > max_bytes)
        return error_set(err, ST_INVALID, "%s: %lld bytes, the limit is %zu", path,
                         (long long)st.st_size, max_bytes);
    *text = mem_alloc((size_t)st.st_size + 1);
    *n = fread(*text, 1, (size_t)st.st_size, in);
    (*text)[*n] = '\0';
    if (*n == (size_t)st.st_size)
        return ST_OK;
    mem_free(*text);
    *text = NULL;
    return error_set(err, ST_IO, "%s: could only read %zu of %lld bytes", path, *n,
                     (long long)st.st_size);
}

enum status file_read(char **text, size_t *n, const char *path, size_t max_bytes,
                      bool *absent, struct error *err)
{
    /* Non-blocking, so that a pipe is refused and not waited for. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    FILE *in = fd < 0 ? NULL : fdopen(fd, "rb");

    if (absent)
        *absent = fd < 0 && (errno == ENOENT || errno == ENOTDIR);
    if (!in) {
        enum status st = error_set(err, ST_IO, "%s: %s", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return st;
    }
    enum status st = file_take(in, text, n, path, max_bytes, err);
    fclose(in);
    return st;
}
