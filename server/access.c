#include "server/access.h"

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

bool access_origin_ok(const struct config_list *allowed, const char *origin)
{
    if (!origin)
        return true;
    for (int i = 0; i < allowed->n; i++)
        if (strcmp(allowed->items[i], "*") == 0 || strcasecmp(allowed->items[i], origin) == 0)
            return true;
    return false;
}
