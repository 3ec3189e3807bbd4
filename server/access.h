#ifndef SERVER_ACCESS_H
#define SERVER_ACCESS_H

#include "server/config.h"

#include <stdbool.h>
#include <stdint.h>

/* Who may ask.  Pure.
 *
 * A browser sends Origin with every request that one site makes of another,
 * and with every POST.  A server on loopback is reachable from any page that
 * its owner visits, so origins that are not listed are refused; programs that
 * are not browsers send none. */

/* header: the value of Authorization, or NULL.  No keys: everybody may.  The
 * time it takes tells nothing about the keys but their number and lengths.  *key: which of them
 * it is, from 1; 0: none. */
bool access_key_ok(const struct config_list *keys, const char *header, uint32_t *key);

/* origin and host: the value of Origin and of Host.  Is it a page of this very server?  A name
 * proves nothing, because whoever owns it may point it here once his page is loaded; so Host has
 * to be an address or localhost, unless keys are asked for, which such a page does not have. */
bool access_is_own_page(const struct config_list *keys, const char *origin, const char *host);

/* origin: the value of Origin, or NULL. */
bool access_origin_ok(const struct config_list *allowed, const char *origin);

#endif
