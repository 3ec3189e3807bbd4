#include "tests/support/byte_tokenizer.h"

#include "engine/base/strbuf.h"
#include "engine/model/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>

/* The printable character that byte-level vocabularies write for a byte. */
static int spelling_of(int byte)
{
    int n_moved = 0;

    for (int b = 0; b <= byte; b++) {
        bool moved = b <= 0x20 || (b >= 0x7F && b <= 0xA0) || b == 0xAD;
        if (b == byte)
            return moved ? 0x100 + n_moved : byte;
        n_moved += moved;
    }
    return -1;
}

static void add_special(struct strbuf *json, int id, const char *content)
{
    strbuf_printf(json, "%s{\"id\":%d,\"content\":\"%s\",\"single_word\":false,\"lstrip\":false,"
                  "\"rstrip\":false,\"normalized\":false,\"special\":true}",
                  id == BYTE_BOS ? "" : ",", id, content);
}

struct tokenizer *byte_tokenizer_open(bool bos)
{
    struct tokenizer *t = NULL;
    struct strbuf json = { 0 };
    struct error err;

    strbuf_puts(&json, "{\"version\":\"1.0\",\"added_tokens\":[");
    add_special(&json, BYTE_BOS, "<bos>");
    add_special(&json, BYTE_END, "<end>");
    strbuf_puts(&json, "],\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false},");
    if (bos)
        strbuf_printf(&json, "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":["
                      "{\"SpecialToken\":{\"id\":\"<bos>\",\"type_id\":0}},"
                      "{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],\"pair\":[],"
                      "\"special_tokens\":{\"<bos>\":{\"id\":\"<bos>\",\"ids\":[%d],"
                      "\"tokens\":[\"<bos>\"]}}},", BYTE_BOS);
    strbuf_puts(&json, "\"decoder\":{\"type\":\"ByteLevel\"},"
                "\"model\":{\"type\":\"BPE\",\"merges\":[],\"vocab\":{");
    for (int b = 0; b < BYTE_BOS; b++)
        strbuf_printf(&json, "%s\"\\u%04x\":%d", b ? "," : "", (unsigned)spelling_of(b), b);
    strbuf_puts(&json, "}}}");
    if (tokenizer_parse(&t, json.data, json.n, "byte tokenizer", &err) != ST_OK) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
    strbuf_fini(&json);
    return t;
}
