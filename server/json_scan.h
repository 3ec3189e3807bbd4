#ifndef SERVER_JSON_SCAN_H
#define SERVER_JSON_SCAN_H

#include "engine/base/status.h"

#include <stdbool.h>
#include <stddef.h>

/* A first look at a JSON text, before a tree is made of it: is it strictly
 * RFC 8259, how deep, how many values, and where are the members of its
 * outermost object?
 *
 * cJSON alone accepts more than JSON (leading zeros, control characters,
 * broken UTF-8), cuts strings at \u0000, rounds large integers, and spends
 * forty bytes a byte on `1,1,1,`.  The scan uses no memory, does not recurse
 * and reads each byte once. */

enum {
    JSON_MAX_DEPTH = 64,
    JSON_MAX_MEMBERS = 128,    /* of the outermost object */
    JSON_MAX_NUMBER_BYTES = 60 /* cJSON reads at most 63 */
};

struct json_member {
    size_t value, value_bytes; /* the span of the value in the text */
    bool fraction;             /* some number in it has a point or an exponent */
};

struct json_scan {
    bool object; /* the outermost value is an object */
    int n_members;
    struct json_member members[JSON_MAX_MEMBERS]; /* in the order of the text */
};

/* The sentence in err is meant for the client. */
enum status json_scan(struct json_scan *out, const char *text, size_t n, size_t max_values,
                      struct error *err) MUST_USE;

/* Whether a text is one value that may stand inside of so many containers. */
bool json_is_value(const char *text, size_t n, int around);

#endif
