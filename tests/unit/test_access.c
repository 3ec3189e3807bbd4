#include "server/access.h"

#include <check.h>
#include <stddef.h>

static char *items[] = { "secret" };
static const struct config_list no_keys = { 0 }, keys = { items, 1 };

static bool own(const char *origin, const char *host)
{
    return access_is_own_page(&no_keys, origin, host);
}

START_TEST(own_page)
{
    ck_assert(own("http://127.0.0.1:8000", "127.0.0.1:8000"));
    ck_assert(own("http://localhost:8000", "LOCALHOST:8000"));
    ck_assert(own("https://10.1.2.3", "10.1.2.3"));
    ck_assert(own("http://[::1]:8000", "[::1]:8000"));
    ck_assert(own("http://[fe80::1]", "[fe80::1]"));
}
END_TEST

START_TEST(page_of_another)
{
    ck_assert(!own(NULL, "127.0.0.1:8000"));
    ck_assert(!own("http://127.0.0.1:8000", NULL));
    ck_assert(!own("null", "127.0.0.1:8000"));
    ck_assert(!own("", ""));
    ck_assert(!own("http://", ""));
    ck_assert(!own("http://127.0.0.1:9000", "127.0.0.1:8000"));
    ck_assert(!own("http://127.0.0.1", "127.0.0.1:8000"));
    ck_assert(!own("http://127.0.0.1:8000.evil.example", "127.0.0.1:8000"));
    ck_assert(!own("file://127.0.0.1:8000", "127.0.0.1:8000"));
    ck_assert(!own("http://localhost:8000", "127.0.0.1:8000"));
}
END_TEST

/* A name that its owner points at this machine once his page is loaded. */
START_TEST(page_whose_name_is_rebound)
{
    ck_assert(!own("http://evil.example:8000", "evil.example:8000"));
    ck_assert(!own("http://127.0.0.1.evil.example", "127.0.0.1.evil.example"));
    ck_assert(!own("http://localhost.evil.example", "localhost.evil.example"));
    ck_assert(!own("http://2130706433", "2130706433"));
    ck_assert(!own("http://[evil]", "[evil]"));
    ck_assert(!own("http://[127.0.0.1]", "[127.0.0.1]"));
    ck_assert(!own("http://[::1].evil.example", "[::1].evil.example"));
    ck_assert(!own("http://[::1", "[::1"));
    /* It would have no key. */
    ck_assert(access_is_own_page(&keys, "https://models.example", "models.example"));
    ck_assert(!access_is_own_page(&keys, "https://evil.example", "models.example"));
}
END_TEST

TCase *access_case(void)
{
    TCase *tc = tcase_create("access");

    tcase_add_test(tc, own_page);
    tcase_add_test(tc, page_of_another);
    tcase_add_test(tc, page_whose_name_is_rebound);
    return tc;
}
