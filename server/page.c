#include "server/page.h"

#include "engine/base/strbuf.h"
#include "server/http.h"
#include "server/request_head.h"

#include <stdio.h>
#include <string.h>

/* The assembler puts the file between two labels; a NUL ends it. */
__asm__(".pushsection .rodata\n"
        "page_html:\n"
        ".incbin \"server/page.html\"\n"
        ".byte 0\n"
        ".popsection\n");
extern const char page_html[];

static const char mark[] = "NONCE";

static void fill_in(struct strbuf *out, const char *nonce)
{
    const char *at = page_html;

    for (const char *found; (found = strstr(at, mark)) != NULL; at = found + sizeof mark - 1) {
        strbuf_add(out, at, (size_t)(found - at));
        strbuf_puts(out, nonce);
    }
    strbuf_puts(out, at);
}

void page_reply(struct http_exchange *x)
{
    struct strbuf body = { 0 };
    char nonce[REQUEST_ID_BYTES], policy[512];

    request_id_make(nonce, sizeof nonce, "");
    fill_in(&body, nonce);
    snprintf(policy, sizeof policy,
             "default-src 'none'; script-src 'nonce-%s'; style-src 'nonce-%s'; img-src data:; "
             "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
             nonce, nonce);
    http_add_header(x, "Content-Security-Policy", policy);
    http_add_header(x, "X-Content-Type-Options", "nosniff");
    http_add_header(x, "Referrer-Policy", "no-referrer");
    http_add_header(x, "Cache-Control", "no-store");
    http_reply(x, 200, "text/html; charset=utf-8", &body);
}
