#ifndef SERVER_ROUTES_H
#define SERVER_ROUTES_H

#include "server/http.h"

#include <stdbool.h>
#include <stddef.h>

struct service;

/* What answers which path.
 *
 * Before anything else: the Origin of browsers, then the key for all but the
 * page at /, /health, /ready and, if so configured, /metrics; then path, method and the
 * state of the service.  All of that is decided on the head, so that a refused
 * body is not collected. */
struct http_handler routes_handler(struct service *sv);

/* Route number i, for the test that compares them with server/openapi.json; false: there is
 * none. */
struct route_facts {
    const char *path;
    bool post;               /* else GET */
    bool prefix;             /* something follows the path */
    bool is_public;          /* needs no key */
};
bool routes_facts(size_t i, struct route_facts *out);

#endif
