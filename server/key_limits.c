#include "server/key_limits.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"

#define XXH_INLINE_ALL
#include <sys/random.h>
#include <xxhash.h>

static const uint64_t minute_ns = UINT64_C(60000000000), second_ns = 1000000000u;

struct key_state {
    uint64_t whole_ns;           /* when all its requests will be back */
    uint64_t secret;
};

struct key_limits {
    uint32_t n_keys;
    uint64_t interval_ns;        /* in which one request comes back; 0: no limit */
    bool salted;
    struct key_state *keys;      /* [n_keys] */
};

struct key_limits *key_limits_create(uint32_t n_keys, uint32_t requests_per_minute,
                                     bool cache_per_key)
{
    struct key_limits *l = mem_calloc(1, sizeof *l);

    l->n_keys = n_keys;
    l->interval_ns = requests_per_minute ? minute_ns / requests_per_minute : 0;
    l->salted = cache_per_key;
    l->keys = mem_calloc(n_keys, sizeof *l->keys);
    for (uint32_t i = 0; i < n_keys; i++)
        ASSERT(getrandom(&l->keys[i].secret, sizeof l->keys[i].secret, 0) ==
               (ssize_t)sizeof l->keys[i].secret);
    return l;
}

void key_limits_destroy(struct key_limits *l)
{
    if (!l)
        return;
    mem_free(l->keys);
    mem_free(l);
}

uint32_t key_limits_take_request(struct key_limits *l, uint32_t key, uint64_t now_ns)
{
    ASSERT(key <= l->n_keys);
    if (key == 0 || l->interval_ns == 0)
        return 0;
    struct key_state *k = &l->keys[key - 1];
    uint64_t whole_ns = (k->whole_ns > now_ns ? k->whole_ns : now_ns) + l->interval_ns;
    if (whole_ns - now_ns > minute_ns)
        return (uint32_t)((whole_ns - now_ns - minute_ns + second_ns - 1) / second_ns);
    k->whole_ns = whole_ns;
    return 0;
}

uint64_t key_limits_salt(const struct key_limits *l, uint32_t key, uint64_t asked)
{
    ASSERT(key <= l->n_keys);
    if (key == 0 || !l->salted)
        return asked;
    return XXH3_64bits_withSeed(&asked, sizeof asked, l->keys[key - 1].secret);
}
