#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/model/tokenizer.h"
#include "engine/model/tokenizer_parts.h"
#include "tests/support/random_data.h"

#include <check.h>
#include <cjson/cJSON.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DATA "tests/unit/data/tokenizer/"

static struct tokenizer *open_or_fail(const char *path)
{
    struct tokenizer *t = NULL;
    struct error err = { 0 };

    if (tokenizer_open(&t, path, &err) != ST_OK)
        ck_abort_msg("%s", err.text);
    return t;
}

static struct tokenizer *parse_or_fail(const char *json)
{
    struct tokenizer *t = NULL;
    struct error err = { 0 };

    if (tokenizer_parse(&t, json, strlen(json), "test", &err) != ST_OK)
        ck_abort_msg("%s", err.text);
    return t;
}

static void encode_or_fail(const struct tokenizer *t, struct token_list *out, const char *text,
                           int flags)
{
    ck_assert_int_eq(tokenizer_encode(t, out, text, strlen(text), flags, 0), ST_OK);
}

/* The ids of text as "1 2 3". */
static const char *ids_of(const struct tokenizer *t, const char *text, int flags)
{
    static char line[1000];
    struct token_list ids = { 0 };
    size_t at = 0;

    encode_or_fail(t, &ids, text, flags);
    line[0] = '\0';
    for (size_t i = 0; i < ids.n; i++)
        at += (size_t)snprintf(line + at, sizeof line - at, "%s%d", i ? " " : "", ids.ids[i]);
    token_list_fini(&ids);
    return line;
}

static void check_ids(const struct tokenizer *t, const char *text, int flags, const cJSON *want)
{
    struct token_list ids = { 0 };
    size_t i = 0;
    const cJSON *item;

    encode_or_fail(t, &ids, text, flags);
    cJSON_ArrayForEach(item, want) {
        if (i >= ids.n || ids.ids[i] != item->valueint)
            ck_abort_msg("\"%s\": id %zu is not %d", text, i, item->valueint);
        i++;
    }
    ck_assert_uint_eq(i, ids.n);
    token_list_fini(&ids);
}

static void check_decoded(const struct tokenizer *t, const cJSON *vector)
{
    const cJSON *ids = vector->child, *skip = ids->next, *text = skip->next, *item;
    struct detokenizer d;
    struct strbuf out = { 0 };

    detokenizer_init(&d, t, cJSON_IsTrue(skip));
    cJSON_ArrayForEach(item, ids) {
        char *room = strbuf_room(&out, detokenizer_max_bytes(&d, item->valueint));
        out.n += detokenizer_push(&d, item->valueint, room);
    }
    char *room = strbuf_room(&out, 4);
    out.n += detokenizer_flush(&d, room);
    strbuf_puts(&out, "");
    ck_assert_str_eq(out.data, text->valuestring);
    strbuf_fini(&out);
}

static char *read_text(const char *path)
{
    struct strbuf text = { 0 };
    FILE *f = fopen(path, "rb");
    size_t n;

    if (!f)
        ck_abort_msg("%s is missing: run the tests in the root of the repository", path);
    while ((n = fread(strbuf_room(&text, 65536), 1, 65536, f)) > 0)
        text.n += n;
    strbuf_puts(&text, "");
    fclose(f);
    return text.data;
}

START_TEST(recorded_vectors)
{
    char *json = read_text(DATA "vectors.json");
    cJSON *root = cJSON_Parse(json);
    const cJSON *texts = cJSON_GetObjectItem(root, "texts"), *of_one, *item;
    int n_tokenizers = 0, n_texts = 0;

    cJSON_ArrayForEach(of_one, cJSON_GetObjectItem(root, "tokenizers")) {
        struct tokenizer *t = open_or_fail(of_one->string);
        const cJSON *ids = cJSON_GetObjectItem(of_one, "ids")->child;
        int i = 0;
        cJSON_ArrayForEach(item, texts) {
            check_ids(t, item->valuestring, i++ % 2 ? TOKENIZE_ADD_SPECIAL : 0, ids);
            ids = ids->next;
            n_texts++;
        }
        cJSON_ArrayForEach(item, cJSON_GetObjectItem(of_one, "decoded"))
            check_decoded(t, item);
        tokenizer_close(t);
        n_tokenizers++;
    }
    ck_assert_int_eq(n_tokenizers, 6);
    ck_assert_int_gt(n_texts, 6 * 100);
    cJSON_Delete(root);
    mem_free(json);
}
END_TEST

/* A vocabulary small enough to reason about. */
#define PRE "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true}"
#define ADDED(id, content, rules, special)                                                   \
    "{\"id\":" #id ",\"content\":\"" content "\"," rules ",\"special\":" special "}"
#define PLAIN "\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false"
static const char small[] =
    "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,"
    "\"added_tokens\":[" ADDED(7, "<s>", PLAIN, "true") "," ADDED(8, "<t>", PLAIN, "false") "],"
    "\"normalizer\":null,\"pre_tokenizer\":" PRE ","
    "\"post_processor\":{\"type\":\"TemplateProcessing\","
    "\"single\":[{\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":0}},"
    "{\"Sequence\":{\"id\":\"A\",\"type_id\":0}},"
    "{\"SpecialToken\":{\"id\":\"end\",\"type_id\":0}}],\"pair\":[],"
    "\"special_tokens\":{\"<s>\":{\"id\":\"<s>\",\"ids\":[7],\"tokens\":[\"<s>\"]},"
    "\"end\":{\"id\":\"end\",\"ids\":[8,7],\"tokens\":[\"<t>\",\"<s>\"]}}},"
    "\"decoder\":{\"type\":\"ByteLevel\"},"
    "\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,"
    "\"continuing_subword_prefix\":null,\"end_of_word_suffix\":\"\",\"fuse_unk\":false,"
    "\"byte_fallback\":false,\"ignore_merges\":false,"
    "\"vocab\":{\"a\":0,\"b\":1,\"c\":2,\"ab\":3,\"abc\":4,\"\\u0120\":5,\"bc\":6},"
    "\"merges\":[\"b c\",[\"a\",\"b\"],\"ab c\"]}}";

START_TEST(flags_and_queries)
{
    struct tokenizer *t = parse_or_fail(small);
    size_t n;

    ck_assert_str_eq(ids_of(t, "abc ab", 0), "0 6 5 3");
    ck_assert_str_eq(ids_of(t, "ab<s>c", 0), "3 7 2");
    ck_assert_str_eq(ids_of(t, "ab<s>c", TOKENIZE_NO_ADDED), "3 2");   /* < s > are no tokens */
    ck_assert_str_eq(ids_of(t, "ab", TOKENIZE_ADD_SPECIAL), "7 3 8 7");
    ck_assert_str_eq(ids_of(t, "", TOKENIZE_ADD_SPECIAL), "7 8 7");
    ck_assert_str_eq(ids_of(t, "", 0), "");
    ck_assert_str_eq(ids_of(t, "xyz", 0), "");

    ck_assert_int_eq(tokenizer_find(t, "abc"), 4);
    ck_assert_int_eq(tokenizer_find(t, "<t>"), 8);
    ck_assert_int_eq(tokenizer_find(t, "<u>"), -1);
    ck_assert_int_eq(tokenizer_find(t, ""), -1);
    ck_assert_int_eq(tokenizer_n_ids(t), 9);
    ck_assert_mem_eq(tokenizer_bytes(t, 5, &n), " ", 1);
    ck_assert_uint_eq(n, 1);
    tokenizer_bytes(t, 9, &n);
    ck_assert_uint_eq(n, 0);
    tokenizer_bytes(t, -1, &n);
    ck_assert_uint_eq(n, 0);
    ck_assert(tokenizer_is_special(t, 7));
    ck_assert(!tokenizer_is_special(t, 8));
    tokenizer_close(t);
    tokenizer_close(NULL);
}
END_TEST

static const char *marked_ids_of(const struct tokenizer *t, const char *text,
                                 const struct token_span *marked, size_t n)
{
    static char out[200];
    struct token_list list = { 0 };
    size_t at = 0;

    out[0] = '\0';
    ck_assert_int_eq(tokenizer_encode_marked(t, &list, text, strlen(text), marked, n, 0), ST_OK);
    for (size_t i = 0; i < list.n; i++)
        at += (size_t)snprintf(out + at, sizeof out - at, "%s%d", i ? " " : "", list.ids[i]);
    token_list_fini(&list);
    return out;
}

/* Added tokens count in marked stretches alone; what lies between is one text. */
START_TEST(added_tokens_in_marked_stretches)
{
    struct tokenizer *t = parse_or_fail(small);
    const struct token_span all[] = { { 0, 8 } }, first[] = { { 0, 3 } };
    const struct token_span parts[] = { { 0, 1 }, { 2, 6 } }, half[] = { { 0, 2 } };

    ck_assert_str_eq(marked_ids_of(t, "<s>ab<s>", all, 1), "7 3 7");
    ck_assert_str_eq(marked_ids_of(t, "<s>ab<s>", first, 1), "7 3");
    ck_assert_str_eq(marked_ids_of(t, "<s>ab<s>", half, 1), "3");
    ck_assert_str_eq(marked_ids_of(t, "<s>ab<s>", NULL, 0), "3");
    /* "ab" is one token, though "a" is marked and "b" is not. */
    ck_assert_str_eq(marked_ids_of(t, "ab<s>ab", parts, 2), "3 7 3");
    struct token_list list = { 0 };
    ck_assert_int_eq(tokenizer_encode_marked(t, &list, "<s>ab<s>", 8, all, 1, 2), ST_INVALID);
    ck_assert_uint_eq(list.n, 2);
    token_list_fini(&list);
    tokenizer_close(t);
}
END_TEST

START_TEST(max_ids_is_a_limit_on_the_list)
{
    struct tokenizer *t = parse_or_fail(small);
    struct token_list ids = { 0 };

    ck_assert_int_eq(tokenizer_encode(t, &ids, "a a a", 5, 0, 5), ST_OK);
    ck_assert_uint_eq(ids.n, 5);
    ck_assert_int_eq(tokenizer_encode(t, &ids, "", 0, 0, 5), ST_OK);
    ck_assert_int_eq(tokenizer_encode(t, &ids, "a", 1, 0, 5), ST_INVALID);
    ck_assert_int_eq(tokenizer_encode(t, &ids, "a", 1, 0, 6), ST_OK);
    ck_assert_int_eq(tokenizer_encode(t, &ids, "a", 1, TOKENIZE_ADD_SPECIAL, 9), ST_INVALID);
    token_list_fini(&ids);
    tokenizer_close(t);
}
END_TEST

static char *repeated(const char *s, size_t times, size_t *n)
{
    size_t length = strlen(s);
    char *text = mem_alloc(times * length + 1);

    for (size_t i = 0; i < times; i++)
        memcpy(text + i * length, s, length);
    text[times * length] = '\0';
    *n = times * length;
    return text;
}

/* 16 MB: as sentences, as one word, and as one that only bytes can spell.  A
 * limit on ids must end the work long before the time-out. */
START_TEST(max_ids_ends_the_work_early)
{
    static const char *const texts[] = { "The sea was calm. ", "aaaaaaaaaaaaaaaa", "\u4e16" };
    struct tokenizer *t = open_or_fail(DATA "qwen.json");

    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        size_t n;
        char *text = repeated(texts[i], (16 << 20) / strlen(texts[i]), &n);
        struct token_list ids = { 0 };
        ck_assert_int_eq(tokenizer_encode(t, &ids, text, n, 0, 1000), ST_INVALID);
        ck_assert_uint_le(ids.n, 1000);
        token_list_fini(&ids);
        mem_free(text);
    }
    tokenizer_close(t);
}
END_TEST

/* Long texts are processed in blocks: the ids must be those of the sentences. */
START_TEST(blocks_do_not_show)
{
    static const char sentence[] = "Crème brûle\u0301e, isn't it? 12345 ships --\n  \u212b\t";
    struct tokenizer *t = open_or_fail(_i ? DATA "qwen.json" : DATA "smol.json");
    struct token_list one = { 0 }, all = { 0 };
    size_t n, times = 8000;
    char *text = repeated(sentence, times, &n);

    encode_or_fail(t, &one, sentence, 0);
    ck_assert_int_eq(tokenizer_encode(t, &all, text, n, 0, 0), ST_OK);
    ck_assert_uint_eq(all.n, times * one.n);
    for (size_t i = 0; i < all.n; i++)
        if (all.ids[i] != one.ids[i % one.n])
            ck_abort_msg("id %zu is %d", i, all.ids[i]);
    token_list_fini(&one);
    token_list_fini(&all);
    mem_free(text);
    tokenizer_close(t);
}
END_TEST

/* A megabyte of English takes less than a second of processor time. */
START_TEST(a_megabyte_of_english_is_quick)
{
    static const char *const words[] = {
        "the", "captain", "looked", "at", "harbour,", "where", "seventeen", "ships", "lay;",
        "nobody", "had", "thought", "of", "\"Well,\"", "she", "said,", "it's", "an",
        "extraordinary", "misunderstanding.", "In", "1843", "Mr.", "Pemberton-Smythe", "didn't",
        "unquestionably", "weather-beaten", "and", "a", "to", "ladder", "I'll", "go!\n\n",
    };
    enum { N_WORDS = sizeof words / sizeof words[0], N_BYTES = 1000000 };
    struct tokenizer *t = open_or_fail("models/asynctlsd-books-9m/tokenizer.json");
    struct test_random rng = test_random(3);
    struct token_list ids = { 0 };
    struct strbuf text = { 0 };

    while (text.n < N_BYTES) {
        strbuf_puts(&text, words[random_below(&rng, N_WORDS)]);
        strbuf_puts(&text, " ");
    }
    clock_t began = clock();
    ck_assert_int_eq(tokenizer_encode(t, &ids, text.data, text.n, 0, 0), ST_OK);
    double seconds = (double)(clock() - began) / CLOCKS_PER_SEC;
    ck_assert_uint_gt(ids.n, N_BYTES / 10);
    ck_assert_msg(seconds < 1, "%zu bytes took %.2f s", text.n, seconds);
    token_list_fini(&ids);
    strbuf_fini(&text);
    tokenizer_close(t);
}
END_TEST

struct encoding {
    pthread_t thread;
    const struct tokenizer *t;
    struct token_list ids;
};

static void *encode_many(void *arg)
{
    struct encoding *e = arg;

    for (int i = 0; i < 200; i++)
        encode_or_fail(e->t, &e->ids, "The lighthouse keeper counted e\u0301 ships, "
                       "--------------------------------------------- and slept.", 0);
    return NULL;
}

START_TEST(threads_share_a_tokenizer)
{
    enum { N = 4 };
    struct tokenizer *t = open_or_fail(DATA "qwen.json");
    struct encoding e[N];

    for (int i = 0; i < N; i++) {
        e[i] = (struct encoding){ .t = t };
        ck_assert_int_eq(pthread_create(&e[i].thread, NULL, encode_many, &e[i]), 0);
    }
    for (int i = 0; i < N; i++) {
        pthread_join(e[i].thread, NULL);
        ck_assert_uint_eq(e[i].ids.n, e[0].ids.n);
        ck_assert_mem_eq(e[i].ids.ids, e[0].ids.ids, e[0].ids.n * sizeof *e[0].ids.ids);
    }
    for (int i = 0; i < N; i++)
        token_list_fini(&e[i].ids);
    tokenizer_close(t);
}
END_TEST

/* The small file with one thing changed, and what the refusal must say. */
static const struct refusal {
    const char *find, *replace, *says;
} refusals[] = {
    { "\"1.0\"", "\"2.0\"", "version must be" },
    { "\"version\":\"1.0\",", "", "version must be" },
    { "\"truncation\":null", "\"truncation\":{}", "truncation must be null" },
    { "\"padding\":null", "\"padding\":{}", "padding must be null" },
    { "\"padding\":null", "\"pudding\":null", "unknown key \"pudding\"" },
    { "\"padding\":null", "\"truncation\":null", "\"truncation\" twice" },
    { "\"normalizer\":null", "\"normalizer\":{\"type\":\"NFKC\"}", "normalizer has type NFKC" },
    { "\"normalizer\":null", "\"normalizer\":{\"type\":\"Sequence\"}",
      "normalizer is a Sequence" },
    { "\"normalizer\":null", "\"normalizer\":7", "normalizer has type (none)" },
    { PRE, "null", "pre_tokenizer has no ByteLevel" },
    { PRE, "{\"type\":\"Metaspace\"}", "pre_tokenizer has type Metaspace" },
    { PRE, "{\"type\":\"Sequence\",\"pretokenizers\":[" PRE "," PRE "]}", "after ByteLevel" },
    { PRE, "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\","
           "\"individual_digits\":false}," PRE "]}", "Digits.individual_digits" },
    { PRE, "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":"
           "{\"Regex\":\"\\\\w+\"},\"behavior\":\"Isolated\",\"invert\":false}," PRE "]}",
      "pre_tokenizer.Split.pattern.Regex is not one" },
    { PRE, "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":"
           "{\"String\":\" \"},\"behavior\":\"Isolated\",\"invert\":false}," PRE "]}",
      "pre_tokenizer.Split.pattern must be" },
    { PRE, "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":"
           "{\"Regex\":\"x\"},\"behavior\":\"Removed\",\"invert\":false}," PRE "]}",
      "pre_tokenizer.Split.behavior" },
    { "\"add_prefix_space\":false", "\"add_prefix_space\":true", "add_prefix_space" },
    { "\"TemplateProcessing\"", "\"BertProcessing\"",
      "post_processor has type BertProcessing" },
    { "\"ids\":[7]", "\"ids\":[70]", "that is no token" },
    { "\"ids\":[7]", "\"odds\":[7]", "has no \"ids\" for \"<s>\"" },
    { "{\"Sequence\":{\"id\":\"A\"", "{\"Sequence\":{\"id\":\"B\"", "sequence A once" },
    { "{\"Sequence\":{\"id\":\"A\",\"type_id\":0}},", "", "does not have the sequence A" },
    { "\"decoder\":{\"type\":\"ByteLevel\"}", "\"decoder\":null", "decoder must be one" },
    { "\"decoder\":{\"type\":\"ByteLevel\"}", "\"decoder\":{\"type\":\"WordPiece\"}",
      "decoder has type WordPiece" },
    { "\"type\":\"BPE\"", "\"type\":\"Unigram\"", "model.type is Unigram" },
    { "\"dropout\":null", "\"dropout\":0.1", "model.dropout" },
    { "\"unk_token\":null", "\"unk_token\":\"a\"", "model.unk_token" },
    { "\"continuing_subword_prefix\":null", "\"continuing_subword_prefix\":\"##\"",
      "model.continuing_subword_prefix" },
    { "\"end_of_word_suffix\":\"\"", "\"end_of_word_suffix\":\"</w>\"", "end_of_word_suffix" },
    { "\"byte_fallback\":false", "\"byte_fallback\":true", "byte_fallback" },
    { "\"ignore_merges\":false", "\"ignore_merges\":1", "ignore_merges" },
    { "\"fuse_unk\"", "\"novelty\"", "model has the unknown key \"novelty\"" },
    { "\"vocab\":{", "\"vocab\":[],\"x\":{", "unknown key \"x\"" },
    { "\"merges\":[", "\"merges\":{},\"fuse_unk\":[", "\"fuse_unk\" twice" },
    { "\"c\":2", "\"c\":1", "gives the id 1 to \"b\" and to \"c\"" },
    { "\"c\":2", "\"b\":2", "has the token \"b\" twice" },
    { "\"c\":2", "\"c\":-2", "model.vocab has an id for \"c\"" },
    { "\"c\":2", "\"c\":2.5", "model.vocab has an id for \"c\"" },
    { "\"c\":2", "\"c\":1e300", "model.vocab has an id for \"c\"" },
    { "\"c\":2", "\"c\":2097152", "whole number from 0 to 2097151" },
    { "\"c\":2", "\"c\":\"2\"", "model.vocab has an id for \"c\"" },
    { "\"c\":2", "\"c\\u0000d\":2", "has a NUL character" },
    { "\"c\":2", "\"c\":2,\"\xFF\":9", "is not UTF-8 at byte" },
    { "\"b c\"", "\"b d\"", "model.merges has at index 0 \"d\"" },
    { "\"b c\"", "\"c b\"", "model.merges has at index 0 \"cb\"" },
    { "\"b c\"", "\"bc\"", "index 0 something other than two" },
    { "\"b c\"", "\"b c \"", "index 0 something other than two" },
    { "\"b c\"", "{}", "index 0 something other than two" },
    { "[\"a\",\"b\"]", "[\"a\"]", "index 1 something other than two" },
    { "[\"a\",\"b\"]", "[\"a\",\"b\",\"c\"]", "index 1 something other than two" },
    { "[\"a\",\"b\"]", "[\"a\",7]", "index 1 something other than two" },
    { "\"id\":8", "\"id\":9", "gives \"<t>\" the id 9, but it must be 8" },
    { "\"id\":7", "\"id\":3", "gives \"<s>\" the id 3, but it must be 7" },
    { "\"id\":8", "\"id\":null", "added_tokens has an id" },
    { "\"content\":\"<t>\"", "\"content\":\"\"", "not a string of 1 to 256 bytes" },
    { "\"content\":\"<t>\"", "\"content\":null", "not a string of 1 to 256 bytes" },
    { "\"id\":8,\"content\":\"<t>\"", "\"id\":7,\"content\":\"<s>\"", "has \"<s>\" twice" },
    { "\"special\":true", "\"special\":\"yes\"", "\"special\" to be true or false" },
    { "\"lstrip\":false", "\"lstrip\":0", "\"lstrip\" to be true or false" },
    { "\"added_tokens\":[", "\"added_tokens\":{\"x\":[", "is not JSON" },
    { "]}}", "]}} x", "is not JSON" },
    { "{\"version\"", "[{\"version\"", "is not JSON" },
};

static void replaced(struct strbuf *out, const char *text, const char *find, const char *with)
{
    const char *at = strstr(text, find);

    ck_assert_msg(at != NULL, "the small file has no %s", find);
    strbuf_add(out, text, (size_t)(at - text));
    strbuf_puts(out, with);
    strbuf_puts(out, at + strlen(find));
}

START_TEST(what_is_refused)
{
    const struct refusal *r = &refusals[_i];
    struct strbuf json = { 0 };
    struct tokenizer *t = NULL;
    struct error err = { 0 };

    replaced(&json, small, r->find, r->replace);
    enum status status = tokenizer_parse(&t, json.data, json.n, "file.json", &err);
    ck_assert_msg(status == ST_INVALID || status == ST_UNSUPPORTED, "accepted %s", r->replace);
    ck_assert_ptr_null(t);
    ck_assert_msg(strncmp(err.text, "file.json: ", 11) == 0 && strstr(err.text, r->says),
                  "\"%s\" does not say \"%s\"", err.text, r->says);
    ck_assert_int_eq(tokenizer_parse(&t, json.data, json.n, "file.json", NULL), status);
    strbuf_fini(&json);
}
END_TEST

/* Changes that are harmless and must be accepted. */
static const char *const acceptables[][2] = {
    { "\"type\":\"BPE\",", "" },
    { "\"dropout\":null", "\"dropout\":0.0" },
    { ",\"use_regex\":true", "" },
    { "\"normalizer\":null", "\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[]}" },
    { "\"normalizer\":null,", "" },
    { "\"b c\"", "\"#version: 0.2\",\"b c\"" },
    { "\"\\u0120\":5", "\"\\\\u0000\":5" },   /* a backslash and letters, no NUL */
    { "]}}", "]}}\r\n\t " },
};

START_TEST(what_is_accepted)
{
    struct strbuf json = { 0 };

    replaced(&json, small, acceptables[_i][0], acceptables[_i][1]);
    struct tokenizer *t = parse_or_fail(json.data);
    ck_assert_str_eq(ids_of(t, "abc<s>ab", 0), "0 6 7 3");
    tokenizer_close(t);
    strbuf_fini(&json);
}
END_TEST

START_TEST(files_that_cannot_be_read)
{
    struct tokenizer *t = NULL;
    struct error err = { 0 };

    ck_assert_int_eq(tokenizer_open(&t, DATA "absent.json", &err), ST_IO);
    ck_assert_ptr_nonnull(strstr(err.text, DATA "absent.json: No such file"));
    ck_assert_int_eq(tokenizer_open(&t, "tests", &err), ST_IO);
    ck_assert_ptr_nonnull(strstr(err.text, "tests: "));
    ck_assert_int_eq(tokenizer_parse(&t, small, MAX_TOKENIZER_FILE_BYTES + 1u, "big", &err),
                     ST_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "the limit is"));
    for (size_t n = 0; n < sizeof small - 1; n += 7)
        ck_assert_int_ne(tokenizer_parse(&t, small, n, "cut", &err), ST_OK);
    ck_assert_ptr_null(t);
}
END_TEST

/* Nesting far deeper than any stack. */
START_TEST(hostile_files)
{
    struct tokenizer *t = NULL;
    struct error err = { 0 };
    size_t n;
    char *deep = repeated("[", 1 << 20, &n);

    ck_assert_int_eq(tokenizer_parse(&t, deep, n, "deep", &err), ST_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "deep: is not JSON"));
    mem_free(deep);
    deep = repeated("{\"version\":", 1 << 17, &n);
    ck_assert_int_eq(tokenizer_parse(&t, deep, n, "deep", &err), ST_INVALID);
    mem_free(deep);
}
END_TEST

/* A template of few bytes that asks for very many ids. */
START_TEST(hostile_template)
{
    struct tokenizer *t = NULL;
    struct error err = { 0 };
    struct strbuf json = { 0 }, twice = { 0 };
    size_t n;
    char *many = repeated("7,", 100, &n), *again =
        repeated("{\"SpecialToken\":{\"id\":\"<s>\"}},", 100, &n);

    strbuf_printf(&twice, "\"ids\":[%s7]", many);
    replaced(&json, small, "\"ids\":[7]", twice.data);
    ck_assert_int_eq(tokenizer_parse(&t, json.data, json.n, "bomb", &err), ST_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "has more than 64 ids"));
    strbuf_clear(&twice);
    strbuf_clear(&json);
    strbuf_printf(&twice, "\"single\":[%s", again);
    replaced(&json, small, "\"single\":[", twice.data);
    ck_assert_int_eq(tokenizer_parse(&t, json.data, json.n, "bomb", &err), ST_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "array of at most 64 elements"));
    mem_free(many);
    mem_free(again);
    strbuf_fini(&json);
    strbuf_fini(&twice);
}
END_TEST

TCase *tokenizer_case(void)
{
    TCase *tc = tcase_create("tokenizer");

    tcase_set_timeout(tc, 20);
    tcase_add_test(tc, recorded_vectors);
    tcase_add_test(tc, flags_and_queries);
    tcase_add_test(tc, added_tokens_in_marked_stretches);
    tcase_add_test(tc, max_ids_is_a_limit_on_the_list);
    tcase_add_test(tc, max_ids_ends_the_work_early);
    tcase_add_loop_test(tc, blocks_do_not_show, 0, 2);
    tcase_add_test(tc, a_megabyte_of_english_is_quick);
    tcase_add_test(tc, threads_share_a_tokenizer);
    tcase_add_loop_test(tc, what_is_refused, 0, sizeof refusals / sizeof refusals[0]);
    tcase_add_loop_test(tc, what_is_accepted, 0, sizeof acceptables / sizeof acceptables[0]);
    tcase_add_test(tc, files_that_cannot_be_read);
    tcase_add_test(tc, hostile_files);
    tcase_add_test(tc, hostile_template);
    return tc;
}
