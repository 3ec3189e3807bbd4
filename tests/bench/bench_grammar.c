/* What masks of grammars cost, over a vocabulary of the size of Qwen3's: made for the first time in
 * each place of a text, and found again.
 *
 *   bench-grammar [TOKENIZER.JSON]
 *
 * Without a file the vocabulary is made up: all bytes, and words of 1 to 12 letters, half of them
 * with a space in front, a fifth in other scripts. */

#include "engine/base/clock.h"
#include "engine/base/mem.h"
#include "engine/base/strbuf.h"
#include "engine/grammar/grammar.h"
#include "engine/grammar/token_trie.h"
#include "engine/model/tokenizer.h"
#include "tests/support/random_data.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MADE_UP_IDS = 151643, MAX_MASKS = 2000 };

static void check(enum status st, const struct error *err)
{
    if (st == ST_OK)
        return;
    fprintf(stderr, "bench-grammar: %s\n", err->text);
    exit(1);
}

/* ---- the vocabulary */

/* As byte-level vocabularies spell bytes. */
static void add_byte(struct strbuf *out, int byte)
{
    int n_moved = 0;

    for (int b = 0; b < byte; b++)
        n_moved += b <= 0x20 || (b >= 0x7F && b <= 0xA0) || b == 0xAD;
    bool moved = byte <= 0x20 || (byte >= 0x7F && byte <= 0xA0) || byte == 0xAD;
    strbuf_printf(out, "\\u%04x", (unsigned)(moved ? 0x100 + n_moved : byte));
}

/* The number in base 26 makes each word another. */
static void add_word(struct strbuf *out, struct test_random *r, int number)
{
    if (random_below(r, 2))
        add_byte(out, ' ');
    if (random_below(r, 5) == 0)
        for (int n = 1 + random_below(r, 3); n > 0; n--) {
            add_byte(out, 0xD0);
            add_byte(out, 0x80 + random_below(r, 64));
        }
    for (int n = random_below(r, 8); n > 0; n--)
        add_byte(out, 'a' + random_below(r, 26));
    for (; number > 0; number /= 26)
        add_byte(out, 'a' + number % 26);
}

static struct tokenizer *made_up(void)
{
    struct test_random r = test_random(1);
    struct tokenizer *t = NULL;
    struct strbuf json = { 0 };
    struct error err;

    strbuf_puts(&json, "{\"version\":\"1.0\",\"added_tokens\":[],\"pre_tokenizer\":{\"type\":"
                "\"ByteLevel\",\"add_prefix_space\":false},\"decoder\":{\"type\":\"ByteLevel\"},"
                "\"model\":{\"type\":\"BPE\",\"merges\":[],\"vocab\":{");
    for (int id = 0; id < MADE_UP_IDS; id++) {
        strbuf_puts(&json, id ? ",\"" : "\"");
        if (id < 256)
            add_byte(&json, id);
        else
            add_word(&json, &r, id + 26 * 26 * 26);
        strbuf_printf(&json, "\":%d", id);
    }
    strbuf_puts(&json, "}}}");
    check(tokenizer_parse(&t, json.data, json.n, "made up", &err), &err);
    strbuf_fini(&json);
    return t;
}

/* ---- measuring */

static int compare_times(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

struct times {
    double us[MAX_MASKS];
    int n;
};

static void print_times(const char *what, struct times *t)
{
    qsort(t->us, (size_t)t->n, sizeof *t->us, compare_times);
    printf("  %-12s %5d masks: median %8.1f us, 90 %% %8.1f us, most %8.1f us\n", what, t->n,
           t->us[t->n / 2], t->us[t->n * 9 / 10], t->us[t->n - 1]);
}

/* A text byte by byte: at each a mask. */
static void follow(struct grammar *g, const struct token_trie *trie, const char *text,
                   struct times *out)
{
    size_t words = (size_t)trie->n_ids / 32 + 1;
    uint32_t *mask = mem_calloc(words, sizeof *mask), n;
    struct grammar_matcher m;

    out->n = 0;
    grammar_matcher_init(&m, g);
    for (const char *at = text; *at && out->n < MAX_MASKS; at++) {
        uint64_t from_ns = clock_now_ns();
        if (grammar_matcher_mask(&m, trie, mask, words, &n) != ST_OK ||
            !grammar_matcher_advance(&m, at, 1)) {
            fprintf(stderr, "bench-grammar: the text does not follow its grammar at \"%s\"\n", at);
            exit(1);
        }
        out->us[out->n++] = (double)(clock_now_ns() - from_ns) / 1e3;
    }
    grammar_matcher_fini(&m);
    mem_free(mask);
}

static void measure(const char *name, struct grammar *g, const struct token_trie *trie,
                    const char *text)
{
    static struct times t;

    printf("%s\n", name);
    follow(g, trie, text, &t);
    print_times("first text", &t);
    follow(g, trie, text, &t);
    print_times("same again", &t);
    printf("  %llu masks made in all\n", (unsigned long long)grammar_counts(g).made);
    grammar_release(g);
}

static const char schema[] =
    "{\"type\":\"object\",\"properties\":{\"name\":{\"type\":\"string\"},\"age\":{\"type\":"
    "\"integer\",\"minimum\":0,\"maximum\":130},\"address\":{\"type\":\"object\",\"properties\":{"
    "\"street\":{\"type\":\"string\",\"maxLength\":60},\"city\":{\"type\":\"string\"}},"
    "\"required\":[\"street\",\"city\"]},\"tags\":{\"type\":\"array\",\"items\":{\"type\":"
    "\"string\"}},\"kind\":{\"enum\":[\"person\",\"company\",\"other\"]}},\"required\":[\"name\","
    "\"age\",\"address\",\"tags\",\"kind\"]}";
static const char text[] =
    "{\"name\": \"Ada Lovelace\", \"age\": 36, \"address\": {\"street\": \"12 St James's Square\", "
    "\"city\": \"London\"}, \"tags\": [\"mathematics\", \"engines\"], \"kind\": \"person\"}";

int main(int argc, char **argv)
{
    static const char pattern[] = "[A-Z][a-z]+( [A-Z][a-z]+){1,3}, \\d{1,4} [^\"\\n]{3,200}";
    struct tokenizer *t = NULL;
    struct grammar *g;
    struct error err;

    if (argc > 1)
        check(tokenizer_open(&t, argv[1], &err), &err);
    else
        t = made_up();
    uint64_t from_ns = clock_now_ns();
    struct token_trie *trie = token_trie_create(t);
    printf("%d tokens, a tree of %u nodes made in %.0f ms\n", trie->n_ids, trie->n_nodes,
           (double)(clock_now_ns() - from_ns) / 1e6);

    cJSON *tree = cJSON_Parse(schema);
    from_ns = clock_now_ns();
    check(grammar_compile_schema(&g, tree, NULL, &err), &err);
    printf("schema compiled in %.2f ms\n", (double)(clock_now_ns() - from_ns) / 1e6);
    measure("JSON schema", g, trie, text);
    cJSON_Delete(tree);
    check(grammar_compile_json_object(&g, NULL, &err), &err);
    measure("any JSON object", g, trie, text);
    check(grammar_compile_regex(&g, pattern, strlen(pattern), NULL, &err), &err);
    measure("regular expression", g, trie, "Ada Lovelace, 12 St James's Square, London");
    token_trie_destroy(trie);
    tokenizer_close(t);
    return 0;
}
