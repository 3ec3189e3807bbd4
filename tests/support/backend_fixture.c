#include "tests/support/backend_fixture.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

static const char *const isas[] = { "avx2", "avx512", "scalar", "auto" };
enum { N_KNOWN = sizeof isas / sizeof isas[0] };

static struct backend *opened[N_KNOWN];

static void close_all(void)
{
    for (int i = 0; i < N_KNOWN; i++)
        backend_close(opened[i]);
}

struct backend *test_backend(const char *isa)
{
    static bool registered;
    struct backend_options options = { .threads = 2, .isa = isa };
    struct error err;
    int i = 0;

    while (i < N_KNOWN && strcmp(isas[i], isa) != 0)
        i++;
    ck_assert_msg(i < N_KNOWN, "no instruction set '%s'", isa);
    if (!registered)
        atexit(close_all);
    registered = true;
    if (!opened[i]) {
        enum status status = backend_open(&opened[i], "cpu", &options, &err);
        ck_assert_msg(status == ST_OK || status == ST_UNSUPPORTED, "%s", err.text);
    }
    return opened[i];
}

const char *test_isa(int i)
{
    return isas[i];
}
