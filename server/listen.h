#ifndef SERVER_LISTEN_H
#define SERVER_LISTEN_H

#include "engine/base/status.h"

#include <stdbool.h>
#include <stdint.h>

/* A listening TCP socket, non-blocking, on the first address of host that can
 * be bound.  port 0: any free one; *port is the one in use. */
enum status listen_open(int *fd, uint16_t *bound_port, const char *host, uint16_t port,
                        struct error *err) MUST_USE;

/* Is every address of host a loopback address?  False when it has none. */
bool listen_is_loopback(const char *host);

/* Raise the limit of open descriptors to its maximum and return it. */
uint32_t listen_raise_descriptors(void);

#endif
