#include "engine/model/safetensors.h"

#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/model/json_fields.h"
#include "engine/model/safetensors_header.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_HEADER_BYTES = 100000000, MAX_INDEX_BYTES = 16 << 20, MAX_FILES = 4096 };

struct weight_file {
    char *path;
    const unsigned char *bytes;
    size_t n;
    bool mapped;                 /* false: borrowed */
};

/* The table holds tensor numbers + 1; open addressing, at most half full. */
struct safetensors {
    struct weight_file *files;
    int n_files, file_capacity;
    struct tensor_list tensors;
    uint32_t *table;
    size_t table_mask;
};

static uint64_t hash_name(const char *s)
{
    uint64_t h = 14695981039346656037ull;

    for (; *s; s++)
        h = (h ^ (unsigned char)*s) * 1099511628211ull;
    return h ^ h >> 29;
}

static size_t find_slot(const struct safetensors *st, const char *name)
{
    size_t slot = hash_name(name) & st->table_mask;

    while (st->table[slot] && strcmp(st->tensors.at[st->table[slot] - 1].name, name) != 0)
        slot = (slot + 1) & st->table_mask;
    return slot;
}

static enum status build_table(struct safetensors *st, struct error *err)
{
    size_t size = 16;

    while (size < 2 * st->tensors.n)
        size *= 2;
    st->table = mem_calloc(size, sizeof *st->table);
    st->table_mask = size - 1;
    for (size_t i = 0; i < st->tensors.n; i++) {
        const struct tensor *t = &st->tensors.at[i];
        size_t slot = find_slot(st, t->name);
        if (st->table[slot])
            return error_set(err, ST_INVALID, "%s: tensor %.120s is there twice",
                             st->files[t->file].path, t->name);
        st->table[slot] = (uint32_t)(i + 1);
    }
    return ST_OK;
}

static struct weight_file *add_file(struct safetensors *st, const char *path)
{
    if (st->n_files == st->file_capacity) {
        st->file_capacity = st->file_capacity ? 2 * st->file_capacity : 4;
        st->files = mem_realloc(st->files, (size_t)st->file_capacity, sizeof *st->files);
    }
    struct weight_file *f = &st->files[st->n_files++];
    *f = (struct weight_file){ .path = mem_strdup(path) };
    return f;
}

static uint64_t little_endian_64(const unsigned char *p)
{
    uint64_t v = 0;

    for (int i = 7; i >= 0; i--)
        v = v << 8 | p[i];
    return v;
}

/* Read the header of the last file added and place its tensors. */
static enum status read_file(struct safetensors *st, struct error *err)
{
    const struct weight_file *f = &st->files[st->n_files - 1];
    size_t first = st->tensors.n;

    if (f->n < 8)
        return error_set(err, ST_INVALID, "%s: %zu bytes are too short for a safetensors file",
                         f->path, f->n);
    uint64_t header = little_endian_64(f->bytes);
    if (header > MAX_HEADER_BYTES || header > f->n - 8)
        return error_set(err, ST_INVALID, "%s: a header of %llu bytes does not fit; the file "
                         "has %zu bytes and the limit is %d", f->path,
                         (unsigned long long)header, f->n, MAX_HEADER_BYTES);
    const unsigned char *data = f->bytes + 8 + header;
    TRY(safetensors_header_read(&st->tensors, f->path, (const char *)f->bytes + 8,
                                (size_t)header, f->n - 8 - header, st->n_files - 1, err));
    for (size_t i = first; i < st->tensors.n; i++)
        st->tensors.at[i].data = data + st->tensors.at[i].begin;
    return ST_OK;
}

static enum status map_file(struct weight_file *f, struct error *err)
{
    /* Non-blocking, so that a pipe is refused and not waited for. */
    int fd = open(f->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat s;

    if (fd < 0)
        return error_set(err, ST_IO, "%s: %s", f->path, strerror(errno));
    if (fstat(fd, &s) != 0 || !S_ISREG(s.st_mode) || s.st_size == 0) {
        close(fd);
        return error_set(err, ST_IO, "%s: not a file, or empty", f->path);
    }
    void *p = mmap(NULL, (size_t)s.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    int why = errno;
    close(fd);
    if (p == MAP_FAILED)
        return error_set(err, ST_IO, "%s: cannot be mapped: %s", f->path, strerror(why));
    f->bytes = p;
    f->n = (size_t)s.st_size;
    f->mapped = true;
    return ST_OK;
}

static enum status open_file(struct safetensors *st, const char *dir, const char *name,
                             struct error *err)
{
    struct strbuf path = { 0 };

    strbuf_printf(&path, "%s/%s", dir, name);
    struct weight_file *f = add_file(st, path.data);
    strbuf_fini(&path);
    TRY(map_file(f, err));
    return read_file(st, err);
}

/* ---- sharded folders */

static bool is_plain_name(const char *s)
{
    return *s && !strchr(s, '/') && strcmp(s, ".") != 0 && strcmp(s, "..") != 0;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The distinct shard names of the map, sorted; pointers into the tree. */
static enum status shard_names(const char ***out, int *n_out, const struct json_file *index,
                               const cJSON *map, struct error *err)
{
    const char **names = mem_calloc((size_t)cJSON_GetArraySize(map) + 1, sizeof *names);
    const cJSON *item;
    int n = 0, distinct = 0;

    *out = names;                /* the caller frees, also on failure */
    cJSON_ArrayForEach(item, map) {
        if (!cJSON_IsString(item) || !is_plain_name(item->valuestring))
            return error_set(err, ST_INVALID, "%s: the file of tensor %.120s must be a plain "
                             "file name", index->name, item->string);
        names[n++] = item->valuestring;
    }
    qsort(names, (size_t)n, sizeof *names, compare_names);
    for (int i = 0; i < n; i++)
        if (distinct == 0 || strcmp(names[i], names[distinct - 1]) != 0)
            names[distinct++] = names[i];
    if (distinct == 0 || distinct > MAX_FILES)
        return error_set(err, ST_INVALID, "%s: \"weight_map\" must name 1 to %d files",
                         index->name, MAX_FILES);
    *n_out = distinct;
    return ST_OK;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash ? slash + 1 : path;
}

/* Every tensor of the map must be in the file that the map says, and every
 * tensor of the files in the map. */
static enum status check_map(const struct safetensors *st, const struct json_file *index,
                             const cJSON *map, struct error *err)
{
    unsigned char *seen = mem_calloc(st->tensors.n + 1, 1);
    enum status result = ST_OK;
    const cJSON *item;

    cJSON_ArrayForEach(item, map) {
        const struct tensor *t = safetensors_find(st, item->string);
        const char *file = t ? base_name(st->files[t->file].path) : NULL;
        if (!t || strcmp(file, item->valuestring) != 0)
            result = error_set(err, ST_INVALID, "%s: tensor %.120s is not in %.80s, where "
                               "\"weight_map\" has it", index->name, item->string,
                               item->valuestring);
        else if (seen[t - st->tensors.at]++)
            result = error_set(err, ST_INVALID, "%s: tensor %.120s is in \"weight_map\" twice",
                               index->name, item->string);
        if (result != ST_OK)
            break;
    }
    for (size_t i = 0; result == ST_OK && i < st->tensors.n; i++)
        if (!seen[i])
            result = error_set(err, ST_INVALID, "%s: tensor %.120s of %s is not in "
                               "\"weight_map\"", index->name, st->tensors.at[i].name,
                               st->files[st->tensors.at[i].file].path);
    mem_free(seen);
    return result;
}

static enum status open_shards(struct safetensors *st, const char *dir,
                               const struct json_file *index, struct error *err)
{
    const cJSON *map = json_get(index->root, "weight_map");
    const char **names = NULL;
    int n = 0;

    if (!cJSON_IsObject(map))
        return error_set(err, ST_INVALID, "%s: \"weight_map\" must be an object", index->name);
    enum status result = shard_names(&names, &n, index, map, err);
    for (int i = 0; result == ST_OK && i < n; i++)
        result = open_file(st, dir, names[i], err);
    mem_free(names);
    TRY(result);
    TRY(build_table(st, err));
    return check_map(st, index, map, err);
}

static enum status open_folder(struct safetensors *st, const char *dir, struct error *err)
{
    struct strbuf path = { 0 };
    struct json_file index = { 0 };
    char *text = NULL;
    size_t n = 0;
    bool absent = false;

    strbuf_printf(&path, "%s/model.safetensors.index.json", dir);
    enum status result = file_read(&text, &n, path.data, MAX_INDEX_BYTES, &absent, err);
    if (absent) {
        result = open_file(st, dir, "model.safetensors", err);
        if (result == ST_OK)
            result = build_table(st, err);
    } else if (result == ST_OK) {
        result = json_file_parse(&index, path.data, text, n, MAX_INDEX_BYTES, err);
        if (result == ST_OK)
            result = open_shards(st, dir, &index, err);
        json_file_fini(&index);
    }
    mem_free(text);
    strbuf_fini(&path);
    return result;
}

enum status safetensors_open(struct safetensors **out, const char *dir, struct error *err)
{
    struct safetensors *st = mem_calloc(1, sizeof *st);
    enum status result = open_folder(st, dir, err);

    *out = NULL;
    if (result != ST_OK) {
        safetensors_close(st);
        return result;
    }
    *out = st;
    return ST_OK;
}

enum status safetensors_parse(struct safetensors **out, const char *name, const void *bytes,
                              size_t n, struct error *err)
{
    struct safetensors *st = mem_calloc(1, sizeof *st);
    struct weight_file *f = add_file(st, name);

    *out = NULL;
    f->bytes = bytes;
    f->n = n;
    enum status result = read_file(st, err);
    if (result == ST_OK)
        result = build_table(st, err);
    if (result != ST_OK) {
        safetensors_close(st);
        return result;
    }
    *out = st;
    return ST_OK;
}

void safetensors_close(struct safetensors *st)
{
    if (!st)
        return;
    for (int i = 0; i < st->n_files; i++) {
        if (st->files[i].mapped)
            munmap((void *)st->files[i].bytes, st->files[i].n);
        mem_free(st->files[i].path);
    }
    mem_free(st->files);
    tensor_list_fini(&st->tensors);
    mem_free(st->table);
    mem_free(st);
}

size_t safetensors_count(const struct safetensors *st)
{
    return st->tensors.n;
}

const struct tensor *safetensors_at(const struct safetensors *st, size_t i)
{
    return &st->tensors.at[i];
}

const struct tensor *safetensors_find(const struct safetensors *st, const char *name)
{
    uint32_t slot = st->table[find_slot(st, name)];

    return slot ? &st->tensors.at[slot - 1] : NULL;
}

const char *safetensors_file(const struct safetensors *st, const struct tensor *t)
{
    return st->files[t->file].path;
}
