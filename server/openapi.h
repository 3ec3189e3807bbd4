#ifndef SERVER_OPENAPI_H
#define SERVER_OPENAPI_H

/* The description of the API that /openapi.json gives out: OpenAPI 3.1.
 *
 * server/openapi.json is part of the binary.  It is written by hand and says nothing of the model
 * that is served.  tests/unit/test_openapi.c holds it against the routes and the tables of fields,
 * tests/http/test_openapi.py against what the server does. */
const char *openapi_text(void);

#endif
