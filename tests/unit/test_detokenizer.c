#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"
#include "engine/model/tokenizer.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A tokenizer with all bytes and tokens that break characters at every place:
 * id b is byte b, id 256 + i is tokens[i], then three added tokens. */
static const struct {
    const char *bytes;
    size_t n;
} tokens[] = {
    { "ab", 2 }, { "\xC3\xA9", 2 }, { "a\xC3", 2 }, { "\xA9z", 2 }, { "\xE4\xB8", 2 },
    { "\x96\xE7\x95", 3 }, { "\xF0\x9F\x99", 3 }, { "\x82\x82", 2 }, { "\xF0\x9F", 2 },
    { "\xC3\xC3", 2 }, { "\xED\xA0\x80", 3 }, { "\xF0\x80", 2 }, { "\xFF\xFF", 2 },
    { " \xE2", 2 },
};
enum { N_TOKENS = sizeof tokens / sizeof tokens[0], SPECIAL = 256 + N_TOKENS, PLAIN, SPACED,
       N_IDS };

static void add_byte(struct strbuf *json, unsigned char byte)
{
    int c = byte, n_moved = 0;

    for (int b = 0; b < byte; b++)
        n_moved += b <= 0x20 || (b >= 0x7F && b <= 0xA0) || b == 0xAD;
    if (byte <= 0x20 || (byte >= 0x7F && byte <= 0xA0) || byte == 0xAD)
        c = 0x100 + n_moved;
    strbuf_printf(json, "\\u%04x", c);
}

static struct tokenizer *make_tokenizer(void)
{
    struct strbuf json = { 0 };
    struct tokenizer *t = NULL;
    struct error err = { 0 };

    strbuf_puts(&json, "{\"version\":\"1.0\",\"added_tokens\":[");
    for (int id = SPECIAL; id < N_IDS; id++)
        strbuf_printf(&json, "%s{\"id\":%d,\"content\":\"%s\",\"single_word\":false,"
                      "\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":%s}",
                      id == SPECIAL ? "" : ",", id,
                      id == SPECIAL ? "<end>" : id == PLAIN ? "<think>" : "a \u00e9",
                      id == SPECIAL ? "true" : "false");
    strbuf_puts(&json, "],\"pre_tokenizer\":{\"type\":\"ByteLevel\","
                "\"add_prefix_space\":false},\"decoder\":{\"type\":\"ByteLevel\"},"
                "\"model\":{\"type\":\"BPE\",\"merges\":[],\"vocab\":{");
    for (int id = 0; id < SPECIAL; id++) {
        strbuf_puts(&json, id ? ",\"" : "\"");
        if (id < 256)
            add_byte(&json, (unsigned char)id);
        else
            for (size_t k = 0; k < tokens[id - 256].n; k++)
                add_byte(&json, (unsigned char)tokens[id - 256].bytes[k]);
        strbuf_printf(&json, "\":%d", id);
    }
    strbuf_puts(&json, "}}}");
    if (tokenizer_parse(&t, json.data, json.n, "test", &err) != ST_OK)
        ck_abort_msg("%s", err.text);
    strbuf_fini(&json);
    return t;
}

/* Decode everything at once: the bytes of all tokens, then U+FFFD for each
 * longest run of bytes that begins a character and is not one. */
static void decode_whole(const struct tokenizer *t, const int32_t *ids, size_t n,
                         bool skip_special, struct strbuf *out)
{
    struct strbuf bytes = { 0 };

    strbuf_puts(out, "");
    for (size_t i = 0; i < n; i++) {
        size_t n_bytes;
        const char *s = tokenizer_bytes(t, ids[i], &n_bytes);
        if (!skip_special || !tokenizer_is_special(t, ids[i]))
            strbuf_add(&bytes, s, n_bytes);
    }
    for (size_t at = 0; at < bytes.n;) {
        int length = utf8_classify(bytes.data + at, bytes.n - at);
        if (length > 0)
            strbuf_add(out, bytes.data + at, (size_t)length);
        else
            strbuf_puts(out, "\uFFFD");
        at += length > 0 ? (size_t)length : length < 0 ? (size_t)-length : bytes.n - at;
    }
    strbuf_fini(&bytes);
}

static void decode_stream(const struct tokenizer *t, const int32_t *ids, size_t n,
                          bool skip_special, struct strbuf *out)
{
    struct detokenizer d;
    char tail[3];

    strbuf_puts(out, "");
    detokenizer_init(&d, t, skip_special);
    for (size_t i = 0; i < n; i++) {
        size_t max = detokenizer_max_bytes(&d, ids[i]);
        char *room = malloc(max ? max : 1);   /* exact, for the sanitizer */
        size_t written = detokenizer_push(&d, ids[i], room);
        if (written > max || !utf8_is_valid(room, written) || d.n_held > 3)
            ck_abort_msg("id %d: %zu bytes of at most %zu, %d held", ids[i], written, max,
                         d.n_held);
        strbuf_add(out, room, written);
        free(room);
    }
    size_t written = detokenizer_flush(&d, tail);
    if (written != 0 && (written != 3 || memcmp(tail, "\uFFFD", 3) != 0))
        ck_abort_msg("the flush wrote %zu bytes", written);
    strbuf_add(out, tail, written);
    if (detokenizer_flush(&d, tail) != 0)
        ck_abort_msg("a second flush wrote something");
}

START_TEST(pieces_joined_are_the_whole)
{
    struct tokenizer *t = make_tokenizer();

    srand((unsigned)_i);
    for (int round = 0; round < 4000; round++) {
        int32_t ids[24];
        size_t n = (size_t)(rand() % 25);
        bool skip = rand() % 2;
        struct strbuf whole = { 0 }, pieces = { 0 };
        for (size_t i = 0; i < n; i++)   /* mostly the tokens that break, some outside */
            ids[i] = rand() % 4 ? 256 + rand() % (N_IDS - 256 + 2) : rand() % 256 - rand() % 2;
        decode_whole(t, ids, n, skip, &whole);
        decode_stream(t, ids, n, skip, &pieces);
        if (pieces.n != whole.n || memcmp(pieces.data, whole.data, whole.n) != 0)
            ck_abort_msg("round %d: %s is not %s", round, pieces.data, whole.data);
        strbuf_fini(&whole);
        strbuf_fini(&pieces);
    }
    tokenizer_close(t);
}
END_TEST

/* What each push returns, with bars between; the flush comes last. */
static void pushes(const struct tokenizer *t, bool skip, const int32_t *ids, size_t n,
                   char *out)
{
    struct detokenizer d;

    detokenizer_init(&d, t, skip);
    for (size_t i = 0; i < n; i++) {
        out += detokenizer_push(&d, ids[i], out);
        *out++ = '|';
    }
    out += detokenizer_flush(&d, out);
    *out = '\0';
}

#define PUSHES(skip, want, ...)                                                  \
    do {                                                                         \
        const int32_t ids_[] = { __VA_ARGS__ };                                  \
        char out_[256];                                                          \
        pushes(t, skip, ids_, sizeof ids_ / sizeof ids_[0], out_);               \
        ck_assert_str_eq(out_, want);                                            \
    } while (0)

START_TEST(bytes_are_held_until_decided)
{
    struct tokenizer *t = make_tokenizer();

    PUSHES(false, "a|\u00e9|", 'a', 257);
    PUSHES(false, "a|\u00e9z|", 258, 259);                  /* a C3, A9 z */
    PUSHES(false, "|\u4e16|\u754c|", 260, 261, 0x8C);       /* E4 B8, 96 E7 95, 8C */
    PUSHES(false, "||||\U0001f642|", 0xF0, 0x9F, 0x99, PLAIN + 1000, 0x82);
    PUSHES(false, "|\uFFFDa|", 0xC3, 'a');
    PUSHES(false, "|\uFFFD|\uFFFD", 0xC3, 0xC3);
    PUSHES(false, "|\uFFFD|\u00e9|", 0xE4, 0xC3, 0xA9);     /* refuted by another start */
    PUSHES(false, "\uFFFD\uFFFD\uFFFD|", 266);              /* ED A0 80: a surrogate */
    PUSHES(false, "\uFFFD\uFFFD|", 267);                    /* F0 80: overlong */
    PUSHES(false, "|\uFFFDa|ab|", 0xF0, 'a', 256);
    tokenizer_close(t);
}
END_TEST

START_TEST(special_and_absent_ids)
{
    struct tokenizer *t = make_tokenizer();

    PUSHES(false, "a|<end>|<think>|b|", 'a', SPECIAL, PLAIN, 'b');
    PUSHES(true, "a||<think>|b|", 'a', SPECIAL, PLAIN, 'b');
    PUSHES(true, "||\u00e9|", 0xC3, SPECIAL, 0xA9);         /* a hole does not break it */
    PUSHES(false, "|||", -1, N_IDS, INT32_MAX);
    PUSHES(false, "a \u00e9|", SPACED);                     /* a blank: not of the alphabet */
    ck_assert(tokenizer_is_special(t, SPECIAL));
    ck_assert(!tokenizer_is_special(t, PLAIN));
    ck_assert(!tokenizer_is_special(t, -5));
    ck_assert_int_eq(tokenizer_n_ids(t), N_IDS);
    tokenizer_close(t);
}
END_TEST

TCase *detokenizer_case(void)
{
    TCase *tc = tcase_create("detokenizer");

    tcase_add_loop_test(tc, pieces_joined_are_the_whole, 0, 4);
    tcase_add_test(tc, bytes_are_held_until_decided);
    tcase_add_test(tc, special_and_absent_ids);
    return tc;
}
