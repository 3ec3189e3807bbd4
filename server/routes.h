#ifndef SERVER_ROUTES_H
#define SERVER_ROUTES_H

#include "server/http.h"

struct service;

/* What answers which path.
 *
 * Before anything else: the Origin of browsers, then the key for all but the
 * page at /, /health, /ready and, if so configured, /metrics; then path, method and the
 * state of the service.  All of that is decided on the head, so that a refused
 * body is not collected. */
struct http_handler routes_handler(struct service *sv);

#endif
