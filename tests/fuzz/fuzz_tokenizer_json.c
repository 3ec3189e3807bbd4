/* Any bytes as a tokenizer.json: refused with a sentence, or usable. */

#include "engine/base/invariant.h"
#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"
#include "engine/model/tokenizer.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static const char text[] = "The cat's 12 <s> hats,\n\n  e\u0301 and \u4e16\u754c -- "
                           "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa <|endoftext|> ab abc\t";

static void use(const struct tokenizer *t)
{
    struct token_list ids = { 0 };
    struct strbuf out = { 0 };
    struct detokenizer d;

    ASSERT(tokenizer_encode(t, &ids, text, sizeof text - 1, TOKENIZE_ADD_SPECIAL, 0) == ST_OK);
    detokenizer_init(&d, t, false);
    for (size_t i = 0; i < ids.n; i++) {
        ASSERT(ids.ids[i] >= 0 && ids.ids[i] < tokenizer_n_ids(t));
        size_t max = detokenizer_max_bytes(&d, ids.ids[i]);
        size_t n = detokenizer_push(&d, ids.ids[i], strbuf_room(&out, max));
        ASSERT(n <= max);
        out.n += n;
    }
    strbuf_puts(&out, "");
    ASSERT(utf8_is_valid(out.data, out.n));
    strbuf_fini(&out);
    token_list_fini(&ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct tokenizer *t = NULL;
    struct error err = { 0 };

    if (tokenizer_parse(&t, (const char *)data, n, "fuzz", &err) == ST_OK)
        use(t);
    else
        ASSERT(!t && strncmp(err.text, "fuzz: ", 6) == 0);
    tokenizer_close(t);
    return 0;
}
