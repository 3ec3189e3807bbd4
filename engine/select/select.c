#include "engine/select/select.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

enum { MAX_KEEP_BLOCKS = 1 << 16, MAX_FORCED_TOKENS = 1 << 16, MOST_LATENT_PART = 512 };

struct select_config select_default(void)
{
    /* 64 blocks and 1,024 tokens lose no needle with the coarse filter
     * (docs/ATTENTION.md).  Where sparse attention begins is the device's
     * business (engine_create.c). */
    return (struct select_config){
        .filter = FILTER_COARSE,
        .index = INDEX_ROTATED,
        .selection = SELECTION_EXACT,
        .keep_blocks = 64,
        .keep_tokens = 1024,
        .sink_tokens = 4,
        .recent_tokens = 64,
        .crossover_tokens = 0,
    };
}

/* ---- exceptions per layer */

/* A decimal number at *s, past which *s is moved; false if there is none. */
static bool take_number(const char **s, int *out)
{
    char *end;

    if (!isdigit((unsigned char)**s))
        return false;
    errno = 0;
    long v = strtol(*s, &end, 10);
    if (errno || v > 1 << 30)
        return false;
    *s = end;
    *out = (int)v;
    return true;
}

static bool take_word(const char **s, const char *word)
{
    size_t n = strlen(word);

    if (strncmp(*s, word, n) != 0)
        return false;
    *s += n;
    return true;
}

/* What one entry says; the budgets are NOT_SAID where it is silent. */
enum { NOT_SAID = -1 };

/* What stands behind the colon: dense, or blocks=N and tokens=N in any order. */
static bool take_setting(const char **s, struct select_layer *said)
{
    *said = (struct select_layer){ false, NOT_SAID, NOT_SAID };
    if (take_word(s, "dense")) {
        said->dense = true;
        return true;
    }
    for (;;) {
        if (take_word(s, "blocks=")) {
            if (!take_number(s, &said->keep_blocks))
                return false;
        } else if (take_word(s, "tokens=")) {
            if (!take_number(s, &said->keep_tokens))
                return false;
        } else
            return false;
        if ((*s)[0] != ',' || !isalpha((unsigned char)(*s)[1]))
            return true;
        ++*s;
    }
}

/* A later entry wins over an earlier one, and a budget makes a layer sparse again. */
static void apply_setting(struct select_layer *layer, const struct select_layer *said)
{
    layer->dense = said->dense;
    if (said->keep_blocks != NOT_SAID)
        layer->keep_blocks = said->keep_blocks;
    if (said->keep_tokens != NOT_SAID)
        layer->keep_tokens = said->keep_tokens;
}

static enum status parse_layers(struct select_plan *plan, const char *text, struct error *err)
{
    const char *s = text;

    while (*s) {
        const char *entry = s;
        int first, last;
        if (!take_number(&s, &first))
            goto malformed;
        last = first;
        if (*s == '-' && (++s, !take_number(&s, &last)))
            goto malformed;
        if (first > last || last >= plan->n_layers)
            return error_set(err, ST_INVALID,
                             "layer exceptions: layers %d-%d in '%s'; the model has 0 to %d",
                             first, last, text, plan->n_layers - 1);
        struct select_layer said;
        if (*s != ':' || (++s, !take_setting(&s, &said)))
            goto malformed;
        for (int l = first; l <= last; l++)
            apply_setting(&plan->layer[l], &said);
        if (*s == ',' || *s == ';')
            s++;
        else if (*s)
            goto malformed;
        continue;
    malformed:
        return error_set(err, ST_INVALID,
                         "layer exceptions: '%s' is not LAYER[-LAYER]:dense or "
                         "LAYER[-LAYER]:blocks=N,tokens=N", entry);
    }
    return ST_OK;
}

/* ---- the plan */

/* Blocks that the filter cannot drop, in the worst alignment. */
static int forced_blocks(const struct select_config *c)
{
    int sinks = (c->sink_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    int recents = (c->recent_tokens + BLOCK_TOKENS - 2) / BLOCK_TOKENS + 1;

    return sinks + recents;
}

static enum status validate_layer(const struct select_config *c, const struct select_layer *l,
                                  int layer, struct error *err)
{
    if (l->dense)
        return ST_OK;
    if (l->keep_blocks > MAX_KEEP_BLOCKS)
        return error_set(err, ST_INVALID, "layer %d: %d blocks kept; %d is the limit", layer,
                         l->keep_blocks, (int)MAX_KEEP_BLOCKS);
    if (l->keep_blocks < forced_blocks(c))
        return error_set(err, ST_INVALID,
                         "layer %d: %d blocks kept, but sinks and recent tokens can need %d",
                         layer, l->keep_blocks, forced_blocks(c));
    if (l->keep_tokens < c->sink_tokens + c->recent_tokens)
        return error_set(err, ST_INVALID,
                         "layer %d: %d tokens kept, but %d sinks and %d recent ones always are",
                         layer, l->keep_tokens, c->sink_tokens, c->recent_tokens);
    if (l->keep_tokens > l->keep_blocks * BLOCK_TOKENS)
        return error_set(err, ST_INVALID,
                         "layer %d: %d tokens cannot be chosen from %d blocks of %d", layer,
                         l->keep_tokens, l->keep_blocks, (int)BLOCK_TOKENS);
    return ST_OK;
}

static bool can_rotate(int dim)
{
    return dim >= 16 && (dim & (dim - 1)) == 0;
}

/* Both parts of a latent key are rotated, each by itself. */
static enum status validate_latent(const struct select_config *c, const struct kv_shape *shape,
                                   struct error *err)
{
    int latent = shape->latent_dim, rope = shape->head_dim - latent;

    if (c->index == INDEX_CHANNELS)
        return error_set(err, ST_UNSUPPORTED,
                         "token-index channels: latent attention has token-index rotated alone");
    if (!can_rotate(latent) || !can_rotate(rope) || latent > MOST_LATENT_PART ||
        rope > MOST_LATENT_PART)
        return error_set(err, ST_UNSUPPORTED,
                         "latent keys of %d and %d channels: the rotated index needs two powers "
                         "of two from 16 to %d", latent, rope, (int)MOST_LATENT_PART);
    return ST_OK;
}

static enum status validate_config(const struct select_config *c, const struct kv_shape *shape,
                                   const int16_t *channels, struct error *err)
{
    int d = shape->head_dim;
    const struct { const char *key; int value, min, max; } ranges[] = {
        { "keep-blocks", c->keep_blocks, 1, MAX_KEEP_BLOCKS },
        { "keep-tokens", c->keep_tokens, 1, MAX_KEEP_BLOCKS * BLOCK_TOKENS },
        { "sink-tokens", c->sink_tokens, 0, MAX_FORCED_TOKENS },
        { "recent-tokens", c->recent_tokens, 1, MAX_FORCED_TOKENS },
        { "crossover", c->crossover_tokens, 0, INT32_MAX },
    };

    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (ranges[i].value < ranges[i].min || ranges[i].value > ranges[i].max)
            return error_set(err, ST_INVALID, "%s is %d; %d to %d can be", ranges[i].key,
                             ranges[i].value, ranges[i].min, ranges[i].max);
    if (shape->latent_dim)
        return validate_latent(c, shape, err);
    if (c->index == INDEX_ROTATED && !can_rotate(d))
        return error_set(err, ST_UNSUPPORTED,
                         "head_dim %d: the rotated index needs a power of two from 16 up; "
                         "use token-index channels", d);
    if (c->index == INDEX_CHANNELS && d < INDEX_CHANNELS_KEPT)
        return error_set(err, ST_UNSUPPORTED, "head_dim %d: the channel index keeps %d channels",
                         d, (int)INDEX_CHANNELS_KEPT);
    if (c->index == INDEX_CHANNELS && !channels)
        return error_set(err, ST_INVALID,
                         "token-index channels needs a calibration: run asynctlsd --calibrate "
                         "TEXTFILE once for this model");
    return ST_OK;
}

static uint64_t fingerprint(const struct select_plan *p, const struct kv_shape *shape)
{
    const struct select_config *c = &p->config;
    int32_t head[] = { c->filter, c->index, c->selection, c->sink_tokens, c->recent_tokens,
                       c->crossover_tokens, shape->head_dim, shape->latent_dim,
                       shape->kv_heads, p->n_layers };
    uint64_t h = XXH3_64bits(head, sizeof head);

    for (int l = 0; l < p->n_layers; l++) {
        const struct select_layer *s = &p->layer[l];
        int32_t layer[] = { s->dense, s->keep_blocks, s->keep_tokens };
        h = XXH3_64bits_withSeed(layer, sizeof layer, h);
    }
    if (p->channels)
        h = XXH3_64bits_withSeed(p->channels, sizeof *p->channels * (size_t)p->n_layers *
                                 (size_t)shape->kv_heads * INDEX_CHANNELS_KEPT, h);
    return h ? h : 1;
}

enum status select_plan_init(struct select_plan *plan, const struct select_config *cfg,
                             const struct kv_shape *shape, int n_layers,
                             const int16_t *channels, struct error *err)
{
    *plan = (struct select_plan){ .config = *cfg, .n_layers = n_layers };
    plan->config.layers = NULL;
    if (n_layers < 1 || n_layers > SELECT_MAX_LAYERS)
        return error_set(err, ST_UNSUPPORTED, "%d layers; this program has room for %d",
                         n_layers, (int)SELECT_MAX_LAYERS);
    TRY(validate_config(cfg, shape, channels, err));
    plan->channels = cfg->index == INDEX_CHANNELS ? channels : NULL;
    for (int l = 0; l < n_layers; l++)
        plan->layer[l] = (struct select_layer){ false, cfg->keep_blocks, cfg->keep_tokens };
    if (cfg->layers)
        TRY(parse_layers(plan, cfg->layers, err));
    for (int l = 0; l < n_layers; l++) {
        const struct select_layer *s = &plan->layer[l];
        TRY(validate_layer(cfg, s, l, err));
        if (s->dense)
            continue;
        if (s->keep_blocks > plan->max_keep_blocks)
            plan->max_keep_blocks = s->keep_blocks;
        if (s->keep_tokens > plan->max_keep_tokens)
            plan->max_keep_tokens = s->keep_tokens;
    }
    if (cfg->selection == SELECTION_LAGGED && plan->max_keep_blocks == 0)
        return error_set(err, ST_INVALID,
                         "selection lagged: layer-exceptions makes all layers dense, and nothing "
                         "is selected in these");
    plan->fingerprint = fingerprint(plan, shape);
    return ST_OK;
}

/* ---- who is sparse */

bool select_is_sparse(const struct select_plan *plan, bool sparse_allowed, uint32_t n_prompt,
                      uint32_t position)
{
    return sparse_allowed && position >= n_prompt &&
           position >= (uint32_t)plan->config.crossover_tokens && plan->max_keep_tokens > 0;
}

bool select_is_everywhere(const struct select_plan *plan)
{
    for (int i = 0; i < plan->n_layers; i++)
        if (plan->layer[i].dense)
            return false;
    return true;
}

bool select_may_share(const struct select_plan *plan, bool sparse_allowed, uint32_t n_prompt,
                      uint32_t first)
{
    return plan->config.selection == SELECTION_EXACT ||
           select_provenance(plan, sparse_allowed, n_prompt, first) == 0;
}

/* Sparse positions of a sequence are all those from one on, so the offset of
 * the first in the block tells dense from sparse for each of its tokens. */
uint64_t select_provenance(const struct select_plan *plan, bool sparse_allowed,
                           uint32_t n_prompt, uint32_t first)
{
    for (uint32_t i = 0; i < BLOCK_TOKENS; i++)
        if (select_is_sparse(plan, sparse_allowed, n_prompt, first + i)) {
            uint64_t h = XXH3_64bits_withSeed(&i, sizeof i, plan->fingerprint);
            return h ? h : 1;
        }
    return 0;
}
