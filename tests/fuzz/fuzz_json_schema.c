/* JSON schemas.  What the scan of bodies lets through is refused with a sentence, or gives a
 * grammar whose texts are JSON as far as they go: a walk that the input steers ends in a valid
 * one. */

#include "engine/base/invariant.h"
#include "engine/base/status.h"
#include "engine/base/strbuf.h"
#include "engine/grammar/grammar.h"
#include "server/json_scan.h"

#include <cjson/cJSON.h>
#include <stdint.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_VALUES = 500, MAX_STEPS = 400, STEERED = 60 };

/* Of the bytes that fit, first the input's, then those that bring an end near. */
static bool step(struct grammar_matcher *m, struct strbuf *text, int wish)
{
    static const char near[] = "}]\",:0ntfab.-";
    char byte = (char)wish;

    bool went = wish >= 0 && grammar_matcher_advance(m, &byte, 1);
    for (size_t i = 0; i < sizeof near - 1 && !went; i++) {
        byte = near[i];
        went = grammar_matcher_advance(m, &byte, 1);
    }
    for (int b = 0; b < 256 && !went; b++) {
        byte = (char)b;
        went = grammar_matcher_advance(m, &byte, 1);
    }
    if (went)
        strbuf_add(text, &byte, 1);
    return went;
}

static void walk(struct grammar *g, const uint8_t *data, size_t size)
{
    struct grammar_matcher m;
    struct strbuf text = { 0 };
    struct json_scan scan;
    struct error err;

    grammar_matcher_init(&m, g);
    for (size_t i = 0; i < MAX_STEPS && !grammar_matcher_is_complete(&m); i++) {
        bool over = i >= STEERED && grammar_matcher_may_end(&m);
        if (over || !step(&m, &text, i < STEERED ? data[(7 * i) % size] : -1))
            break;
    }
    strbuf_add(&text, "", 1);
    if (grammar_matcher_may_end(&m) && !strstr(text.data, "\\u0000"))
        ASSERT(json_scan(&scan, text.data, text.n - 1, 10000, &err) == ST_OK);
    grammar_matcher_fini(&m);
    strbuf_fini(&text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct grammar *g = NULL;
    struct error err = { .text = "" };
    struct json_scan scan;

    if (json_scan(&scan, (const char *)data, size, MAX_VALUES, NULL) != ST_OK)
        return 0;
    cJSON *schema = cJSON_ParseWithLength((const char *)data, size);
    ASSERT(schema);
    if (grammar_compile_schema(&g, schema, NULL, &err) == ST_OK)
        walk(g, data, size);
    else
        ASSERT(!g && err.code == ST_INVALID && strlen(err.text) > 0);
    grammar_release(g);
    cJSON_Delete(schema);
    return 0;
}
