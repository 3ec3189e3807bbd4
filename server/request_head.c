#include "server/request_head.h"

#include "engine/base/invariant.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>

static bool is_alnum(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

/* A token as RFC 9110 has it.  "Host :" is the classic that is not. */
static bool is_token(const char *s)
{
    if (!*s)
        return false;
    for (; *s; s++)
        if (!is_alnum(*s) && !strchr("!#$%&'*+-.^_`|~", *s))
            return false;
    return true;
}

static bool parse_length(const char *s, uint64_t *out)
{
    uint64_t n = 0;

    if (!*s)
        return false;
    for (; *s; s++) {
        if (*s < '0' || *s > '9' || n > (UINT64_MAX - 9) / 10)
            return false;
        n = n * 10 + (uint64_t)(*s - '0');
    }
    *out = n;
    return true;
}

void request_head_note(struct request_head *h, const char *name, const char *value)
{
    if (!value)
        value = "";
    h->n_headers++;
    h->bytes += strlen(name) + strlen(value) + 4;
    h->bad_name = h->bad_name || !is_token(name);
    if (strcasecmp(name, "Host") == 0) {
        h->n_hosts++;
    } else if (strcasecmp(name, "Content-Length") == 0) {
        h->n_lengths++;
        h->bad_length = h->bad_length || !parse_length(value, &h->content_length);
    } else if (strcasecmp(name, "Transfer-Encoding") == 0) {
        h->n_codings++;
        h->chunked = strcasecmp(value, "chunked") == 0;
        h->bad_coding = h->bad_coding || !h->chunked;
    } else if (strcasecmp(name, "Content-Encoding") == 0) {
        h->encoded = h->encoded || strcasecmp(value, "identity") != 0;
    } else if (strcasecmp(name, "Expect") == 0) {
        h->expects = strcasecmp(value, "100-continue") == 0;
    }
}

int request_head_check(const struct request_head *h, const char *path, const char *version,
                       const char **why)
{
    bool old = strcmp(version, "HTTP/1.0") == 0;
    const struct { bool bad; int status; const char *why; } rules[] = {
        { h->n_headers > HEAD_MAX_HEADERS || h->bytes > HEAD_MAX_BYTES, 431,
          "The request headers are larger than this server accepts." },
        { strlen(path) > HEAD_MAX_PATH_BYTES, 414,
          "The request path is longer than this server accepts." },
        { h->bad_name, 400, "A header name has a character that is not allowed in it." },
        { path[0] != '/', 400, "The request target must be a path that starts with '/'." },
        { strstr(path, "%00") != NULL, 400, "The request path has an encoded NUL." },
        { h->n_hosts > 1 || (h->n_hosts == 0 && !old), 400,
          "The request needs exactly one Host header." },
        { h->n_lengths > 1, 400, "The request has more than one Content-Length header." },
        { h->bad_length, 400, "The Content-Length header is not a number." },
        { h->n_lengths && h->n_codings, 400,
          "The request has both Content-Length and Transfer-Encoding." },
        { h->n_codings && old, 400, "HTTP/1.0 has no Transfer-Encoding." },
        { h->n_codings > 1 || h->bad_coding, 400,
          "The only transfer coding this server understands is chunked." },
        { h->encoded, 415, "The request body must not be compressed (Content-Encoding)." },
    };

    for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++)
        if (rules[i].bad) {
            *why = rules[i].why;
            return rules[i].status;
        }
    return 0;
}

void request_id_make(char *out, size_t n, const char *prefix)
{
    unsigned char raw[12];
    size_t at = (size_t)snprintf(out, n, "%s", prefix);

    ASSERT(at + 2 * sizeof raw < n);
    ASSERT(getrandom(raw, sizeof raw, 0) == (ssize_t)sizeof raw);
    for (size_t i = 0; i < sizeof raw; i++)
        at += (size_t)snprintf(out + at, n - at, "%02x", raw[i]);
}

void request_id_choose(char out[REQUEST_ID_BYTES], const char *wanted)
{
    size_t n = wanted ? strlen(wanted) : 0;
    bool sane = n > 0 && n < REQUEST_ID_BYTES;

    for (size_t i = 0; sane && i < n; i++)
        sane = is_alnum(wanted[i]) || strchr("-_.:/+=", wanted[i]);
    if (sane)
        snprintf(out, REQUEST_ID_BYTES, "%s", wanted);
    else
        request_id_make(out, REQUEST_ID_BYTES, "req_");
}
