#include "server/openapi.h"

/* As server/page.c does it: a file between a label and a NUL. */
__asm__(".pushsection .rodata\n"
        "openapi_json:\n"
        ".incbin \"server/openapi.json\"\n"
        ".byte 0\n"
        ".popsection\n");
extern const char openapi_json[];

const char *openapi_text(void)
{
    return openapi_json;
}
