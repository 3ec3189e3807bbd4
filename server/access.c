#include "server/access.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

/* Looks at every byte of key whatever the first difference is. */
static bool same_secret(const char *key, const char *given, size_t n_given)
{
    size_t n_key = strlen(key);
    volatile unsigned char difference = n_key != n_given;

    for (size_t i = 0; i < n_key; i++)
        difference = difference | (unsigned char)(key[i] ^ (i < n_given ? given[i] : 0));
    return difference == 0;
}

bool access_key_ok(const struct config_list *keys, const char *header, uint32_t *key)
{
    *key = 0;
    if (keys->n == 0)
        return true;
    if (!header || strncasecmp(header, "Bearer ", 7) != 0)
        return false;
    header += 7;
    while (*header == ' ')
        header++;
    size_t n = strlen(header);
    while (n > 0 && header[n - 1] == ' ')
        n--;
    for (int i = 0; i < keys->n; i++)
        if (same_secret(keys->items[i], header, n) && n > 0)
            *key = (uint32_t)i + 1;
    return *key > 0;
}

/* An address or localhost, with or without a port. */
static bool needs_no_name_server(const char *host)
{
    unsigned char address[sizeof(struct in6_addr)];
    char name[64];
    bool brackets = *host == '[';
    size_t n = strcspn(host + brackets, brackets ? "]" : ":");
    const char *rest = host + brackets + n;

    if (n >= sizeof name || (brackets && *rest++ != ']') || (*rest && *rest != ':'))
        return false;
    snprintf(name, sizeof name, "%.*s", (int)n, host + brackets);
    return strcasecmp(name, "localhost") == 0 ||
           inet_pton(brackets ? AF_INET6 : AF_INET, name, address) == 1;
}

bool access_is_own_page(const struct config_list *keys, const char *origin, const char *host)
{
    static const char *const schemes[] = { "http://", "https://" };   /* the latter: of a proxy */

    if (!origin || !host || (keys->n == 0 && !needs_no_name_server(host)))
        return false;
    for (size_t i = 0; i < sizeof schemes / sizeof schemes[0]; i++) {
        size_t n = strlen(schemes[i]);
        if (strncasecmp(origin, schemes[i], n) == 0 && strcasecmp(origin + n, host) == 0)
            return true;
    }
    return false;
}

bool access_origin_ok(const struct config_list *allowed, const char *origin)
{
    if (!origin)
        return true;
    for (int i = 0; i < allowed->n; i++)
        if (strcmp(allowed->items[i], "*") == 0 || strcasecmp(allowed->items[i], origin) == 0)
            return true;
    return false;
}
