/* Any text through the small tokenizers.  The first byte picks one and the
 * flags; run in the root of the repository. */

#include "engine/base/invariant.h"
#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"
#include "engine/model/nfc.h"
#include "engine/model/tokenizer.h"

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SMOL, LLAMA, QWEN, RULES, GPT2, N_TOKENIZERS };

static const char *const names[N_TOKENIZERS] = { "smol", "llama", "qwen", "rules", "gpt2" };

static const struct tokenizer *tokenizer_number(int i)
{
    static struct tokenizer *opened[N_TOKENIZERS];
    char path[100];
    struct error err = { 0 };

    snprintf(path, sizeof path, "tests/unit/data/tokenizer/%s.json", names[i]);
    if (!opened[i] && tokenizer_open(&opened[i], path, &err) != ST_OK) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
    return opened[i];
}

static void decode(const struct tokenizer *t, const struct token_list *ids, struct strbuf *out)
{
    struct detokenizer d;

    detokenizer_init(&d, t, false);
    for (size_t i = 0; i < ids->n; i++) {
        char *room = strbuf_room(out, detokenizer_max_bytes(&d, ids->ids[i]));
        out->n += detokenizer_push(&d, ids->ids[i], room);
    }
    char *room = strbuf_room(out, 3);
    out->n += detokenizer_flush(&d, room);
    strbuf_puts(out, "");
}

/* What decoding must give back, as far as that is known: without rules that
 * take white space along and with all bytes, the text in its normal form. */
static void check_round_trip(int which, int flags, const char *s, size_t n,
                             const struct strbuf *decoded)
{
    struct strbuf want = { 0 };

    if (which == GPT2 || which == RULES || (which == QWEN && !(flags & TOKENIZE_NO_ADDED)))
        return;
    if (which == QWEN)
        nfc_append(&want, s, n);
    else
        strbuf_add(&want, s, n);
    ASSERT(decoded->n == want.n && memcmp(decoded->data, want.data, want.n) == 0);
    strbuf_fini(&want);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct token_list ids = { 0 }, fewer = { 0 };
    struct strbuf decoded = { 0 };

    if (n < 1)
        return 0;
    int which = data[0] % N_TOKENIZERS, flags = data[0] & 0x80 ? TOKENIZE_NO_ADDED : 0;
    const struct tokenizer *t = tokenizer_number(which);
    const char *s = (const char *)data + 1;
    n = utf8_valid_prefix(s, n - 1);

    ASSERT(tokenizer_encode(t, &ids, s, n, flags, 0) == ST_OK);
    decode(t, &ids, &decoded);
    check_round_trip(which, flags, s, n, &decoded);
    ASSERT(ids.n == 0 || tokenizer_encode(t, &fewer, s, n, flags, ids.n) == ST_OK);
    ASSERT(fewer.n == ids.n);
    fewer.n = 0;
    ASSERT(ids.n < 2 || tokenizer_encode(t, &fewer, s, n, flags, ids.n - 1) == ST_INVALID);
    token_list_fini(&ids);
    token_list_fini(&fewer);
    strbuf_fini(&decoded);
    return 0;
}
