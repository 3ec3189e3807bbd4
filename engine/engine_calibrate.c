#include "engine/base/log.h"
#include "engine/base/mem.h"
#include "engine/base/utf8.h"
#include "engine/engine.h"
#include "engine/model/model.h"
#include "engine/model/tokenizer.h"
#include "kernels/backend.h"

#include <stdio.h>
#include <string.h>

enum { MAX_PATH_BYTES = 4096, CALIBRATION_TOKENS = 8192 };

static enum status read_text(char **text, size_t *n, const char *path, struct error *err)
{
    FILE *f = fopen(path, "rb");
    size_t capacity = 1 << 20;

    if (!f)
        return error_set(err, ST_IO, "%s cannot be opened", path);
    *text = mem_alloc(capacity);
    for (size_t got; (got = fread(*text + *n, 1, capacity - *n, f)) > 0;) {
        *n += got;
        if (*n == capacity)
            *text = mem_realloc(*text, capacity *= 2, 1);
    }
    bool failed = ferror(f);
    fclose(f);
    return failed ? error_set(err, ST_IO, "%s cannot be read", path) : ST_OK;
}

static enum status encode_text(struct token_list *ids, const struct tokenizer *tok,
                               const char *path, uint32_t max_tokens, struct error *err)
{
    char *text = NULL;
    size_t n = 0;
    enum status st = read_text(&text, &n, path, err);

    if (st == ST_OK && !utf8_is_valid(text, n))
        st = error_set(err, ST_INVALID, "%s is not UTF-8", path);
    /* Too long is no fault here: what was encoded until then is enough. */
    if (st == ST_OK && tokenizer_encode(tok, ids, text, n, TOKENIZE_ADD_SPECIAL,
                                        max_tokens) != ST_OK && ids->n < max_tokens)
        st = error_set(err, ST_INVALID, "%s cannot be tokenised", path);
    if (st == ST_OK && ids->n < 2 * BLOCK_TOKENS)
        st = error_set(err, ST_INVALID, "%s has %zu tokens; %d are the least, %d are good",
                       path, ids->n, 2 * BLOCK_TOKENS, (int)CALIBRATION_TOKENS);
    mem_free(text);
    return st;
}

static enum status calibrate(struct model *m, const struct tokenizer *tok,
                             const struct engine_config *cfg, const char *text_path,
                             struct error *err)
{
    struct kv_shape shape = model_kv_shape(m, &cfg->select);
    int layers = model_config(m)->layers;
    uint32_t most = CALIBRATION_TOKENS;
    struct token_list ids = { 0 };
    char path[MAX_PATH_BYTES];

    if (shape.latent_dim)
        return error_set(err, ST_UNSUPPORTED, "calibration chooses channels for token-index "
                         "channels, which latent attention does not have");
    if (shape.head_dim < INDEX_CHANNELS_KEPT)
        return error_set(err, ST_UNSUPPORTED, "head_dim %d has fewer than %d channels",
                         shape.head_dim, (int)INDEX_CHANNELS_KEPT);
    if (snprintf(path, sizeof path, "%s/asynctlsd-channels.json", cfg->model_dir) >=
        (int)sizeof path)
        return error_set(err, ST_INVALID, "%s: the path is too long", cfg->model_dir);
    if (model_config(m)->max_position < (int)most)
        most = (uint32_t)model_config(m)->max_position;
    if (cfg->max_model_len && cfg->max_model_len < most)
        most = cfg->max_model_len;
    int16_t *channels = mem_calloc((size_t)layers * (size_t)shape.kv_heads *
                                   INDEX_CHANNELS_KEPT, sizeof *channels);
    enum status st = encode_text(&ids, tok, text_path, most, err);
    if (st == ST_OK)
        st = model_calibrate(m, ids.ids, (uint32_t)(ids.n < most ? ids.n : most), channels,
                             err);
    if (st == ST_OK)
        st = select_channels_write(channels, path, layers, &shape, err);
    if (st == ST_OK)
        log_info("engine", "wrote %s, from %zu tokens of %s", path, ids.n, text_path);
    token_list_fini(&ids);
    mem_free(channels);
    return st;
}

enum status engine_calibrate(const struct engine_config *cfg, const char *text_path,
                             struct error *err)
{
    struct backend_options options = { .threads = cfg->threads, .isa = cfg->isa };
    struct backend *be = NULL;
    struct model *m = NULL;
    struct tokenizer *tok = NULL;
    char path[MAX_PATH_BYTES];
    enum status st = backend_open(&be, cfg->backend, &options, err);

    if (st == ST_OK)
        st = model_open(&m, be, cfg->model_dir, cfg->progress, err);
    if (st == ST_OK && snprintf(path, sizeof path, "%s/tokenizer.json", cfg->model_dir) >=
                           (int)sizeof path)
        st = error_set(err, ST_INVALID, "%s: the path is too long", cfg->model_dir);
    if (st == ST_OK)
        st = tokenizer_open(&tok, path, err);
    if (st == ST_OK)
        st = calibrate(m, tok, cfg, text_path, err);
    tokenizer_close(tok);
    model_close(m);
    backend_close(be);
    return st;
}
