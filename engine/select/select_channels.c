#include "engine/select/select.h"

#include "engine/base/mem.h"
#include "engine/base/strbuf.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

enum { MAX_FILE_BYTES = 64 << 20 };

static enum status read_file(struct strbuf *out, const char *path, struct error *err)
{
    FILE *f = fopen(path, "rb");

    if (!f)
        return error_set(err, ST_IO, "%s: %s", path, strerror(errno));
    for (;;) {
        size_t n = fread(strbuf_room(out, 65536), 1, 65536, f);
        out->n += n;
        out->data[out->n] = '\0';
        if (n == 0 || out->n > MAX_FILE_BYTES)
            break;
    }
    bool failed = ferror(f) || out->n > MAX_FILE_BYTES;
    fclose(f);
    return failed ? error_set(err, ST_IO, "%s: cannot be read, or too large", path) : ST_OK;
}

/* The integer called key, or -1. */
static int whole_number(const cJSON *object, const char *key)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(object, key);

    return cJSON_IsNumber(v) && v->valuedouble == (double)v->valueint ? v->valueint : -1;
}

static bool read_head(int16_t *out, const cJSON *list, int head_dim)
{
    const cJSON *v;
    int n = 0, before = -1;

    if (!cJSON_IsArray(list))
        return false;
    cJSON_ArrayForEach(v, list) {
        if (n == INDEX_CHANNELS_KEPT || !cJSON_IsNumber(v) ||
            v->valuedouble != (double)v->valueint || v->valueint <= before ||
            v->valueint >= head_dim)
            return false;
        before = v->valueint;
        out[n++] = (int16_t)v->valueint;
    }
    return n == INDEX_CHANNELS_KEPT;
}

static bool read_layers(int16_t *out, const cJSON *list, int layers,
                        const struct kv_shape *shape)
{
    const cJSON *layer, *head;
    int n_layers = 0;

    if (!cJSON_IsArray(list))
        return false;
    cJSON_ArrayForEach(layer, list) {
        int n_heads = 0;
        if (n_layers == layers || !cJSON_IsArray(layer))
            return false;
        cJSON_ArrayForEach(head, layer) {
            if (n_heads == shape->kv_heads || !read_head(out, head, shape->head_dim))
                return false;
            out += INDEX_CHANNELS_KEPT;
            n_heads++;
        }
        if (n_heads != shape->kv_heads)
            return false;
        n_layers++;
    }
    return n_layers == layers;
}

enum status select_channels_read(int16_t *out, const char *path, int layers,
                                 const struct kv_shape *shape, struct error *err)
{
    struct strbuf text = { 0 };
    enum status st = read_file(&text, path, err);

    if (st != ST_OK) {
        strbuf_fini(&text);
        return st;
    }
    cJSON *root = cJSON_ParseWithLengthOpts(text.data, text.n + 1, NULL, 1);
    if (!cJSON_IsObject(root))
        st = error_set(err, ST_INVALID, "%s: not a JSON object", path);
    else if (whole_number(root, "version") != 1 || whole_number(root, "layers") != layers ||
             whole_number(root, "kv_heads") != shape->kv_heads ||
             whole_number(root, "head_dim") != shape->head_dim ||
             whole_number(root, "kept") != INDEX_CHANNELS_KEPT)
        st = error_set(err, ST_INVALID,
                       "%s: made for another model or version; calibrate again", path);
    else if (!read_layers(out, cJSON_GetObjectItemCaseSensitive(root, "channels"), layers,
                          shape))
        st = error_set(err, ST_INVALID,
                       "%s: channels is not [layers][kv_heads] lists of %d ascending channels",
                       path, (int)INDEX_CHANNELS_KEPT);
    cJSON_Delete(root);
    strbuf_fini(&text);
    return st;
}

/* In a file beside it first, so that a full disk leaves what was there. */
static enum status write_whole(const char *path, const struct strbuf *text, struct error *err)
{
    struct strbuf beside = { 0 };

    strbuf_printf(&beside, "%s.part", path);
    FILE *f = fopen(beside.data, "wb");
    bool ok = f && fwrite(text->data, 1, text->n, f) == text->n && fflush(f) == 0;
    int why = errno;
    if (f && fclose(f) != 0 && ok) {
        ok = false;
        why = errno;
    }
    if (ok && rename(beside.data, path) != 0) {
        ok = false;
        why = errno;
    }
    if (f && !ok)
        remove(beside.data);
    strbuf_fini(&beside);
    return ok ? ST_OK : error_set(err, ST_IO, "%s: %s", path, strerror(why));
}

enum status select_channels_write(const int16_t *channels, const char *path, int layers,
                                  const struct kv_shape *shape, struct error *err)
{
    struct strbuf out = { 0 };

    strbuf_printf(&out, "{\"version\":1,\"layers\":%d,\"kv_heads\":%d,\"head_dim\":%d,\"kept\":%d,"
                  "\"channels\":[", layers, shape->kv_heads, shape->head_dim,
                  (int)INDEX_CHANNELS_KEPT);
    for (int l = 0; l < layers; l++) {
        strbuf_puts(&out, l ? ",\n[" : "\n[");
        for (int g = 0; g < shape->kv_heads; g++) {
            strbuf_puts(&out, g ? ",[" : "[");
            for (int i = 0; i < INDEX_CHANNELS_KEPT; i++)
                strbuf_printf(&out, i ? ",%d" : "%d", *channels++);
            strbuf_puts(&out, "]");
        }
        strbuf_puts(&out, "]");
    }
    strbuf_puts(&out, "]}\n");
    enum status st = write_whole(path, &out, err);
    strbuf_fini(&out);
    return st;
}
