/* engine/select/select.h: the plan and its refusals, who is sparse, provenance, and the
 * file of calibrated channels. */

#include "engine/select/select.h"

#include "tests/support/random_data.h"
#include "tests/support/temp_folder.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LAYERS = 8, KV_HEADS = 2, HEAD_DIM = 128 };
enum { N_CHANNELS = LAYERS * KV_HEADS * INDEX_CHANNELS_KEPT };

static const struct kv_shape shape = { KV_HEADS, HEAD_DIM, 0, FILTER_COARSE, INDEX_ROTATED };
static int16_t channels[N_CHANNELS];

static void fill_channels(uint64_t seed)
{
    struct test_random r = test_random(seed);

    for (int head = 0; head < LAYERS * KV_HEADS; head++)
        for (int i = 0; i < INDEX_CHANNELS_KEPT; i++)
            channels[head * INDEX_CHANNELS_KEPT + i] = (int16_t)(4 * i + random_below(&r, 4));
}

static struct select_plan plan_of(const struct select_config *c)
{
    struct select_plan plan;
    struct error err = { 0 };

    ck_assert_msg(select_plan_init(&plan, c, &shape, LAYERS, channels, &err) == ST_OK, "%s",
                  err.text);
    return plan;
}

static struct select_plan plan_with(const char *layers)
{
    struct select_config c = select_default();

    c.layers = layers;
    return plan_of(&c);
}

/* ---- the plan */

START_TEST(defaults_are_possible)
{
    struct select_config c = select_default();
    struct select_plan plan = plan_of(&c);

    ck_assert(plan.n_layers == LAYERS && !plan.config.layers && !plan.channels);
    ck_assert(plan.max_keep_blocks == c.keep_blocks && plan.max_keep_tokens == c.keep_tokens);
    ck_assert_uint_ne(plan.fingerprint, 0);
    for (int l = 0; l < LAYERS; l++)
        ck_assert(!plan.layer[l].dense && plan.layer[l].keep_blocks == c.keep_blocks &&
                  plan.layer[l].keep_tokens == c.keep_tokens);
    c.index = INDEX_CHANNELS;
    ck_assert_ptr_eq(plan_of(&c).channels, channels);
}
END_TEST

/* One letter a layer: D dense, d the defaults, else as said below. */
static const struct {
    const char *text, *want;
    int max_blocks, max_tokens;
} exceptions[] = {
    { "", "dddddddd", 64, 1024 },
    { "0:dense", "Dddddddd", 64, 1024 },
    { "7:dense", "dddddddD", 64, 1024 },
    { "0-1:dense,6:dense", "DDddddDd", 64, 1024 },
    { "0-1:dense;6:dense", "DDddddDd", 64, 1024 },
    { "0-7:dense", "DDDDDDDD", 0, 0 },
    { "3-3:dense;", "dddDdddd", 64, 1024 },
    { "2:blocks=128", "ddbddddd", 128, 1024 },
    { "2:tokens=2048", "ddtddddd", 64, 2048 },
    { "2:blocks=128,tokens=2048", "ddxddddd", 128, 2048 },
    { "2:tokens=2048,blocks=128", "ddxddddd", 128, 2048 },
    { "0-1:dense,6:blocks=128,tokens=2048,7:dense", "DDddddxD", 64 * 2, 2048 },
    /* Of two entries for one layer the later wins; what it does not say stays. */
    { "3:tokens=2048;0-7:blocks=128", "bbbxbbbb", 128, 2048 },
    { "0:tokens=2048;0-7:blocks=128", "xbbbbbbb", 128, 2048 },
    { "0:dense;0-7:blocks=128", "bbbbbbbb", 128, 1024 },
    { "0-7:blocks=128;0:dense", "Dbbbbbbb", 128, 1024 },
    { "0-7:dense;4:tokens=2048", "DDDDtDDD", 64, 2048 },
    { "2:blocks=128;2:blocks=64", "dddddddd", 64, 1024 },
};
enum { N_EXCEPTIONS = sizeof exceptions / sizeof *exceptions };

START_TEST(exceptions_by_layer)
{
    struct select_plan plan = plan_with(exceptions[_i].text);
    char got[LAYERS + 1] = "";

    for (int l = 0; l < LAYERS; l++) {
        bool blocks = plan.layer[l].keep_blocks == 128, tokens = plan.layer[l].keep_tokens == 2048;
        got[l] = plan.layer[l].dense ? 'D' : blocks && tokens ? 'x' : blocks ? 'b'
                 : tokens ? 't' : 'd';
        ck_assert(blocks || plan.layer[l].keep_blocks == 64);
        ck_assert(tokens || plan.layer[l].keep_tokens == 1024);
    }
    ck_assert_msg(strcmp(got, exceptions[_i].want) == 0, "%s: %s, not %s", exceptions[_i].text,
                  got, exceptions[_i].want);
    ck_assert_int_eq(plan.max_keep_blocks, exceptions[_i].max_blocks);
    ck_assert_int_eq(plan.max_keep_tokens, exceptions[_i].max_tokens);
}
END_TEST

static const struct { const char *text, *word; } bad_exceptions[] = {
    { "8:dense", "0 to 7" }, { "0-8:dense", "0 to 7" }, { "5-3:dense", "5-3" },
    { "dense", "'dense'" }, { "0", "'0'" }, { "0:", "'0:'" }, { "0-:dense", "'0-" },
    { "-1:dense", "'-1" }, { " 0:dense", "' 0" }, { "0 :dense", "'0 :" }, { "0:Dense", "'0:D" },
    { "0:denser", "'0:denser'" }, { "0:dense,blocks=64", "blocks" }, { "0:blocks", "'0:b" },
    { "0:blocks=", "'0:b" }, { "0:blocks=x", "'0:b" }, { "0:blocks=-1", "'0:b" },
    { "0:blocks=64,tokens", "'0:b" }, { "0:blocks=99999999999", "'0:b" },
    { "0:tokens=4294968320", "'0:t" }, { "99999999999999999999:dense", "'9999" },
    { "0:dense,,1:dense", "',1" }, { ";0:dense", "';0" }, { "0:dense;x", "'x'" },
    { "0:keep=64", "'0:k" }, { "0:blocks=64:dense", "'0:b" },
    { "3:blocks=0", "layer 3" }, { "3:tokens=0", "layer 3" }, { "3:blocks=2", "layer 3" },
    { "3:tokens=67", "layer 3" }, { "3:tokens=4097", "layer 3" }, { "3:blocks=8", "layer 3" },
    { "3:blocks=65537", "layer 3" }, { "3:blocks=1073741824", "layer 3" },
    { "3:blocks=1073741824,tokens=1073741824", "layer 3" },
};
enum { N_BAD_EXCEPTIONS = sizeof bad_exceptions / sizeof *bad_exceptions };

START_TEST(exceptions_that_cannot_be)
{
    struct select_config c = select_default();
    struct select_plan plan;
    struct error err = { 0 };

    c.layers = bad_exceptions[_i].text;
    ck_assert_msg(select_plan_init(&plan, &c, &shape, LAYERS, NULL, &err) == ST_INVALID, "%s",
                  c.layers);
    ck_assert_msg(strstr(err.text, bad_exceptions[_i].word) && strstr(err.text, "layer"),
                  "%s: %s", c.layers, err.text);
}
END_TEST

static void refuse(const struct select_config *c, const struct kv_shape *s, int n_layers,
                   const int16_t *kept, enum status code, const char *word)
{
    struct select_plan plan;
    struct error err = { 0 };

    enum status st = select_plan_init(&plan, c, s, n_layers, kept, &err);
    ck_assert_msg(st == code && err.code == code && strstr(err.text, word), "%s: %s %s", word,
                  status_name(st), err.text);
}

START_TEST(budgets_that_cannot_be)
{
    const struct select_config good = select_default();
    const struct { struct select_config c; const char *word; } bad[] = {
        { { .keep_blocks = 0 }, "keep-blocks is 0" },
        { { .keep_blocks = -5 }, "keep-blocks is -5" },
        { { .keep_blocks = 65537 }, "keep-blocks is 65537" },
        { { .keep_tokens = 0 }, "keep-tokens is 0" },
        { { .keep_tokens = 1 << 23 }, "keep-tokens is 8388608" },
        { { .sink_tokens = -1 }, "sink-tokens is -1" },
        { { .sink_tokens = 65537 }, "sink-tokens is 65537" },
        { { .recent_tokens = 0 }, "recent-tokens is 0" },
        { { .recent_tokens = 65537 }, "recent-tokens is 65537" },
        { { .crossover_tokens = -1 }, "crossover is -1" },
    };

    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct select_config c = good;
        if (strstr(bad[i].word, "keep-b"))
            c.keep_blocks = bad[i].c.keep_blocks;
        else if (strstr(bad[i].word, "keep-t"))
            c.keep_tokens = bad[i].c.keep_tokens;
        else if (strstr(bad[i].word, "sink"))
            c.sink_tokens = bad[i].c.sink_tokens;
        else if (strstr(bad[i].word, "recent"))
            c.recent_tokens = bad[i].c.recent_tokens;
        else
            c.crossover_tokens = bad[i].c.crossover_tokens;
        refuse(&c, &shape, LAYERS, NULL, ST_INVALID, bad[i].word);
    }
}
END_TEST

/* The blocks of s sinks and r recent tokens in the worst alignment, by counting. */
static int most_forced(int s, int r)
{
    int most = 0;

    for (int n = s + r + 64; n <= s + r + 128; n++) {
        int forced = 0;
        for (int b = 0; b * BLOCK_TOKENS < n; b++)
            forced += always_kept(b, n, s, r);
        most = forced > most ? forced : most;
    }
    return most;
}

START_TEST(forced_tokens_must_fit_the_budgets)
{
    static const int sinks[] = { 0, 1, 4, 63, 64, 65, 200 };
    static const int recents[] = { 1, 2, 63, 64, 65, 66, 127, 128, 129, 130, 500 };

    for (size_t s = 0; s < sizeof sinks / sizeof *sinks; s++)
        for (size_t r = 0; r < sizeof recents / sizeof *recents; r++) {
            struct select_config c = select_default();
            int least = most_forced(sinks[s], recents[r]);
            c.sink_tokens = sinks[s];
            c.recent_tokens = recents[r];
            c.keep_tokens = sinks[s] + recents[r];
            c.keep_blocks = least;
            ck_assert_int_eq(plan_of(&c).max_keep_blocks, least);
            c.keep_tokens--;
            if (c.keep_tokens > 0)
                refuse(&c, &shape, LAYERS, NULL, ST_INVALID, "tokens kept");
            c.keep_tokens++;
            c.keep_blocks--;
            if (c.keep_blocks > 0)
                refuse(&c, &shape, LAYERS, NULL, ST_INVALID, "blocks kept");
        }
    struct select_config c = select_default();
    c.keep_tokens = c.keep_blocks * BLOCK_TOKENS;
    ck_assert_int_eq(plan_of(&c).max_keep_tokens, 4096);
    c.keep_tokens++;
    refuse(&c, &shape, LAYERS, NULL, ST_INVALID, "4097 tokens cannot be chosen");
}
END_TEST

START_TEST(shapes_of_the_model)
{
    struct select_config c = select_default();
    struct select_plan plan;
    static const int not_rotated[] = { 8, 24, 80, 96, 120 }, rotated[] = { 16, 32, 64, 256 };

    refuse(&c, &shape, 0, NULL, ST_UNSUPPORTED, "0 layers");
    refuse(&c, &shape, SELECT_MAX_LAYERS + 1, NULL, ST_UNSUPPORTED, "129 layers");
    ck_assert_int_eq(select_plan_init(&plan, &c, &shape, SELECT_MAX_LAYERS, NULL, NULL), ST_OK);
    for (size_t i = 0; i < sizeof not_rotated / sizeof *not_rotated; i++) {
        struct kv_shape s = { KV_HEADS, not_rotated[i], 0, FILTER_COARSE, INDEX_ROTATED };
        refuse(&c, &s, LAYERS, NULL, ST_UNSUPPORTED, "power of two");
    }
    for (size_t i = 0; i < sizeof rotated / sizeof *rotated; i++) {
        struct kv_shape s = { KV_HEADS, rotated[i], 0, FILTER_COARSE, INDEX_ROTATED };
        ck_assert_int_eq(select_plan_init(&plan, &c, &s, LAYERS, NULL, NULL), ST_OK);
    }
    c.index = INDEX_CHANNELS;
    refuse(&c, &shape, LAYERS, NULL, ST_INVALID, "--calibrate");
    refuse(&c, &(struct kv_shape){ KV_HEADS, 16, 0, FILTER_COARSE, INDEX_CHANNELS }, LAYERS,
           channels, ST_UNSUPPORTED, "head_dim 16");
    struct kv_shape odd = { KV_HEADS, 80, 0, FILTER_COARSE, INDEX_CHANNELS };
    ck_assert_int_eq(select_plan_init(&plan, &c, &odd, LAYERS, channels, NULL), ST_OK);
}
END_TEST

START_TEST(latent_shapes)
{
    static const struct { int latent, rope; bool good; } parts[] = {
        { 512, 64, true }, { 16, 16, true }, { 512, 512, true }, { 32, 128, true },
        { 1024, 64, false }, { 512, 1024, false }, { 500, 64, false }, { 512, 48, false },
        { 8, 64, false }, { 512, 8, false }, { 64, 0, false }, { 64, -16, false },
    };
    struct select_config c = select_default();
    struct select_plan plan;

    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        struct kv_shape s = { 1, parts[i].latent + parts[i].rope, parts[i].latent, FILTER_COARSE,
                              INDEX_ROTATED };
        if (parts[i].good)
            ck_assert_int_eq(select_plan_init(&plan, &c, &s, LAYERS, NULL, NULL), ST_OK);
        else
            refuse(&c, &s, LAYERS, NULL, ST_UNSUPPORTED, "powers of two");
    }
    struct kv_shape s = { 1, 576, 512, FILTER_COARSE, INDEX_CHANNELS };
    c.index = INDEX_CHANNELS;
    refuse(&c, &s, LAYERS, channels, ST_UNSUPPORTED, "token-index channels");
}
END_TEST

/* Where a key is divided is part of what was selected by it. */
START_TEST(fingerprint_of_latent_shapes)
{
    static const struct { int head_dim, latent_dim; } keys[] = {
        { 128, 0 }, { 128, 64 }, { 96, 32 }, { 96, 64 },
    };
    enum { N = sizeof keys / sizeof *keys };
    struct select_config c = select_default();
    uint64_t seen[N];

    for (int i = 0; i < N; i++) {
        struct kv_shape s = { 1, keys[i].head_dim, keys[i].latent_dim, FILTER_COARSE,
                              INDEX_ROTATED };
        struct select_plan plan;
        ck_assert_int_eq(select_plan_init(&plan, &c, &s, LAYERS, NULL, NULL), ST_OK);
        seen[i] = plan.fingerprint;
        for (int k = 0; k < i; k++)
            ck_assert_uint_ne(seen[i], seen[k]);
    }
}
END_TEST

/* All that changes what is selected changes the fingerprint, and nothing else does. */
START_TEST(fingerprints)
{
    struct select_config c[10];
    uint64_t seen[13];
    int n = 0;

    fill_channels(1);
    for (int i = 0; i < 10; i++)
        c[i] = select_default();
    c[1].filter = FILTER_BOUNDS;
    c[2].keep_blocks++;
    c[3].keep_tokens++;
    c[4].sink_tokens++;
    c[5].recent_tokens++;
    c[6].crossover_tokens++;
    c[7].layers = "6:dense";
    c[8].index = INDEX_CHANNELS;
    c[9].selection = SELECTION_LAGGED;
    for (int i = 0; i < 10; i++)
        seen[n++] = plan_of(&c[i]).fingerprint;
    channels[N_CHANNELS - 1] ^= 1;
    seen[n++] = plan_of(&c[8]).fingerprint;
    ck_assert_uint_eq(plan_of(&c[0]).fingerprint, seen[0]);      /* channels: not used there */
    c[7].layers = "5:dense";
    seen[n++] = plan_of(&c[7]).fingerprint;
    struct select_plan plan;
    ck_assert_int_eq(select_plan_init(&plan, &c[0], &shape, LAYERS - 1, NULL, NULL), ST_OK);
    seen[n++] = plan.fingerprint;
    for (int i = 0; i < n; i++)
        for (int k = 0; k < i; k++)
            ck_assert_uint_ne(seen[i], seen[k]);
    c[7].layers = "5-5:dense;";
    ck_assert_uint_eq(plan_of(&c[7]).fingerprint, seen[11]);
}
END_TEST

/* ---- who is sparse */

START_TEST(crossover)
{
    struct select_config c = select_default();

    c.crossover_tokens = 1000;
    struct select_plan plan = plan_of(&c);
    /* A context of position + 1 tokens is sparse above 1000. */
    ck_assert(!select_is_sparse(&plan, true, 10, 999) && select_is_sparse(&plan, true, 10, 1000));
    ck_assert(!select_is_sparse(&plan, false, 10, 1000));
    ck_assert(!select_is_sparse(&plan, false, 0, UINT32_MAX));
    ck_assert(!select_is_sparse(&plan, true, 2000, 1999));       /* rows of the prompt: dense */
    ck_assert(select_is_sparse(&plan, true, 2000, 2000));
    c.crossover_tokens = 0;
    plan = plan_of(&c);
    ck_assert(select_is_sparse(&plan, true, 0, 0) && select_is_sparse(&plan, true, 5, 5));
    ck_assert(!select_is_sparse(&plan, true, 5, 4));
    c.layers = "0-7:dense";
    plan = plan_of(&c);
    ck_assert(!select_is_sparse(&plan, true, 0, 100000));
}
END_TEST

START_TEST(provenance_tells_dense_from_sparse)
{
    struct select_config c = select_default();
    uint64_t seen[BLOCK_TOKENS];

    c.crossover_tokens = 0;
    struct select_plan plan = plan_of(&c);
    /* The block 640 .. 703, sparse from n_prompt on. */
    for (uint32_t n_prompt = 600; n_prompt < 760; n_prompt++) {
        uint64_t p = select_provenance(&plan, true, n_prompt, 640);
        ck_assert_uint_eq(select_provenance(&plan, false, n_prompt, 640), 0);
        ck_assert((p == 0) == (n_prompt >= 704));
        if (n_prompt >= 640 && n_prompt < 704)
            seen[n_prompt - 640] = p;
        else if (n_prompt < 640)
            ck_assert_uint_eq(p, select_provenance(&plan, true, 640, 640));
    }
    for (int i = 0; i < BLOCK_TOKENS; i++)
        for (int k = 0; k < i; k++)
            ck_assert_uint_ne(seen[i], seen[k]);
    /* All sparse: the same in every such block, so that equal text can be shared. */
    ck_assert_uint_eq(select_provenance(&plan, true, 100, 640),
                      select_provenance(&plan, true, 0, 6400));
    /* The crossover counts like the end of the prompt. */
    c.crossover_tokens = 650;
    struct select_plan later = plan_of(&c);
    ck_assert_uint_eq(select_provenance(&later, true, 3, 640),
                      select_provenance(&later, true, 650, 640));
    ck_assert_uint_ne(select_provenance(&later, true, 3, 640),
                      select_provenance(&later, true, 651, 640));
    ck_assert_uint_eq(select_provenance(&later, true, 3, 576), 0);
    /* Another plan selects otherwise. */
    ck_assert_uint_ne(select_provenance(&later, true, 3, 704),
                      select_provenance(&plan, true, 3, 704));
}
END_TEST

/* Lagged, what a sparse row computes depends on more than its block's name says. */
START_TEST(lagged_rows_are_not_shared)
{
    struct select_config c = select_default();

    c.crossover_tokens = 0;
    struct select_plan exact = plan_of(&c);
    c.selection = SELECTION_LAGGED;
    struct select_plan lagged = plan_of(&c);
    /* The block 640 .. 703, sparse from n_prompt on. */
    for (uint32_t n_prompt = 600; n_prompt < 760; n_prompt++) {
        ck_assert(select_may_share(&exact, true, n_prompt, 640));
        ck_assert(select_may_share(&lagged, true, n_prompt, 640) == (n_prompt >= 704));
        ck_assert(select_may_share(&lagged, false, n_prompt, 640));
    }
}
END_TEST

START_TEST(lagged_wants_a_layer_that_selects)
{
    struct select_config c = select_default();
    struct select_plan plan;
    struct error err = { 0 };

    c.selection = SELECTION_LAGGED;
    c.layers = "0-6:dense";
    ck_assert_int_eq(select_plan_init(&plan, &c, &shape, LAYERS, NULL, NULL), ST_OK);
    c.layers = "0-7:dense";
    ck_assert_int_eq(select_plan_init(&plan, &c, &shape, LAYERS, NULL, &err), ST_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "selection lagged"));
}
END_TEST

/* ---- the file of channels */

static const char *write_channels(void)
{
    const char *path = temp_path("channels.json");
    struct error err = { 0 };

    ck_assert_msg(select_channels_write(channels, path, LAYERS, &shape, &err) == ST_OK, "%s",
                  err.text);
    return path;
}

static void refuse_file(const char *path, enum status code, const char *word)
{
    int16_t out[N_CHANNELS];
    struct error err = { 0 };

    enum status st = select_channels_read(out, path, LAYERS, &shape, &err);
    ck_assert_msg(st == code && err.code == code, "%s: %s", status_name(st), err.text);
    ck_assert_msg(strncmp(err.text, path, strlen(path)) == 0 && strstr(err.text, word),
                  "%s: %s", word, err.text);
}

START_TEST(channels_round_trip)
{
    int16_t out[N_CHANNELS + 1];
    struct error err = { 0 };

    for (uint64_t seed = 1; seed <= 3; seed++) {         /* the second and third overwrite */
        fill_channels(seed);
        const char *path = write_channels();
        out[N_CHANNELS] = 12345;
        ck_assert_msg(select_channels_read(out, path, LAYERS, &shape, &err) == ST_OK, "%s",
                      err.text);
        ck_assert_int_eq(memcmp(out, channels, sizeof channels), 0);
        ck_assert_int_eq(out[N_CHANNELS], 12345);
    }
}
END_TEST

START_TEST(channels_of_another_model)
{
    const struct { int layers; struct kv_shape s; } others[] = {
        { LAYERS + 1, shape }, { LAYERS - 1, shape },
        { LAYERS, { KV_HEADS + 1, HEAD_DIM, 0, FILTER_COARSE, INDEX_CHANNELS } },
        { LAYERS, { KV_HEADS, 64, 0, FILTER_COARSE, INDEX_CHANNELS } },
    };
    int16_t out[2 * N_CHANNELS];
    struct error err = { 0 };

    fill_channels(1);
    const char *path = write_channels();
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        ck_assert_int_eq(select_channels_read(out, path, others[i].layers, &others[i].s, &err),
                         ST_INVALID);
        ck_assert_msg(strstr(err.text, "another model"), "%s", err.text);
    }
}
END_TEST

/* The file that is written, with one text in it replaced by another. */
static const struct { const char *from, *to, *word; } changes[] = {
    { "\"version\":1", "\"version\":2", "another model" },
    { "\"version\":1", "\"version\":\"1\"", "another model" },
    { "\"version\":1,", "", "another model" },
    { "\"layers\":8", "\"layers\":8.5", "another model" },
    { "\"kept\":32", "\"kept\":33", "another model" },
    { "\"channels\"", "\"Channels\"", "channels is not" },
    { "\"channels\":[", "\"channels\":[[],", "channels is not" },
    { "[0,", "[", "channels is not" },                   /* 31 of 32 */
    { "[0,", "[0,1,", "channels is not" },               /* 33 */
    { "[0,4,", "[4,0,", "channels is not" },             /* not ascending */
    { "[0,4,", "[4,4,", "channels is not" },             /* twice */
    { "[0,", "[-1,", "channels is not" },
    { "[0,", "[0.5,", "channels is not" },
    { "[0,", "[\"0\",", "channels is not" },
    { "[0,", "[null,", "channels is not" },
    { "[0,", "[[0],", "channels is not" },
    { "124]", "128]", "channels is not" },               /* head_dim is 128 */
    { "124]", "65660]", "channels is not" },             /* 124 as int16 */
    { "124]", "1e300]", "channels is not" },
    { "124],[", "124],[],[", "channels is not" },
    { "]]}", "]]", "not a JSON object" },
    { "]]}", "]]}}", "not a JSON object" },
    { "{\"version\"", "[\"version\"", "not a JSON object" },
};
enum { N_CHANGES = sizeof changes / sizeof *changes };

START_TEST(channels_that_are_wrong)
{
    static char text[1 << 16];
    const char *path;

    for (int i = 0; i < N_CHANNELS; i++)
        channels[i] = (int16_t)(4 * (i % INDEX_CHANNELS_KEPT));
    path = write_channels();
    FILE *f = fopen(path, "rb");
    text[fread(text, 1, sizeof text - 100, f)] = '\0';
    fclose(f);
    char *at = strstr(text, changes[_i].from);
    ck_assert_msg(at != NULL, "no %s", changes[_i].from);
    size_t from = strlen(changes[_i].from), to = strlen(changes[_i].to);
    memmove(at + to, at + from, strlen(at + from) + 1);
    memcpy(at, changes[_i].to, to);
    path = temp_file("changed.json", text, strlen(text));
    refuse_file(path, ST_INVALID, changes[_i].word);
}
END_TEST

START_TEST(channels_that_are_not_there)
{
    refuse_file(temp_path("none.json"), ST_IO, "No such file");
    refuse_file(temp_file("empty.json", "", 0), ST_INVALID, "not a JSON object");
    refuse_file(temp_folder(), ST_IO, "cannot be read");
}
END_TEST

/* A write that fails says so and leaves no file, or the one that was there. */
START_TEST(channels_that_cannot_be_written)
{
    struct error err = { 0 };
    char name[300];

    fill_channels(1);
    ck_assert_int_eq(select_channels_write(channels, temp_path("none/x.json"), LAYERS, &shape,
                                           &err), ST_IO);
    ck_assert_msg(strstr(err.text, "none/x.json: No such file"), "%s", err.text);
    ck_assert_int_eq(mkdir(temp_path("folder"), 0700), 0);
    ck_assert_int_eq(mkdir(temp_path("folder/in-it"), 0700), 0);
    ck_assert_int_eq(select_channels_write(channels, temp_path("folder"), LAYERS, &shape, &err),
                     ST_IO);
    ck_assert_int_eq(access(temp_path("folder.part"), F_OK), -1);
    memset(name, 'x', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    ck_assert_int_eq(select_channels_write(channels, temp_path(name), LAYERS, &shape, &err),
                     ST_IO);
}
END_TEST

TCase *select_case(void)
{
    TCase *tc = tcase_create("select");

    tcase_add_checked_fixture(tc, temp_folder_create, temp_folder_remove);
    tcase_add_test(tc, defaults_are_possible);
    tcase_add_loop_test(tc, exceptions_by_layer, 0, N_EXCEPTIONS);
    tcase_add_loop_test(tc, exceptions_that_cannot_be, 0, N_BAD_EXCEPTIONS);
    tcase_add_test(tc, budgets_that_cannot_be);
    tcase_add_test(tc, forced_tokens_must_fit_the_budgets);
    tcase_add_test(tc, shapes_of_the_model);
    tcase_add_test(tc, latent_shapes);
    tcase_add_test(tc, fingerprint_of_latent_shapes);
    tcase_add_test(tc, fingerprints);
    tcase_add_test(tc, crossover);
    tcase_add_test(tc, provenance_tells_dense_from_sparse);
    tcase_add_test(tc, lagged_rows_are_not_shared);
    tcase_add_test(tc, lagged_wants_a_layer_that_selects);
    tcase_add_test(tc, channels_round_trip);
    tcase_add_test(tc, channels_of_another_model);
    tcase_add_loop_test(tc, channels_that_are_wrong, 0, N_CHANGES);
    tcase_add_test(tc, channels_that_are_not_there);
    tcase_add_test(tc, channels_that_cannot_be_written);
    return tc;
}
