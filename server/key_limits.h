#ifndef SERVER_KEY_LIMITS_H
#define SERVER_KEY_LIMITS_H

#include <stdbool.h>
#include <stdint.h>

/* What the server keeps for each API key: how many requests it has left, and the salt that keeps
 * its part of the prefix cache apart.  Keys are numbers from 1, as access.h finds them; number 0,
 * where there are no keys, has no limits and no salt.  (The share of the waiting room is the
 * engine's, which knows who waits.)
 *
 * Requests.  A minute's worth may come at once; each that was taken comes back after a minute
 * divided by that number.  Kept as one time for each key, when all of them will be back.
 *
 * Loop thread only. */

struct key_limits;

/* requests_per_minute 0: any number. */
struct key_limits *key_limits_create(uint32_t n_keys, uint32_t requests_per_minute,
                                     bool cache_per_key);
void key_limits_destroy(struct key_limits *l);    /* NULL is fine */

/* Take one request of the key's: 0, or how many seconds later there is one again. */
uint32_t key_limits_take_request(struct key_limits *l, uint32_t key, uint64_t now_ns);

/* The salt for the cache (request.h) of a key whose request asks for this one; nobody outside of
 * the process can know it. */
uint64_t key_limits_salt(const struct key_limits *l, uint32_t key, uint64_t asked);

#endif
