#ifndef SERVER_REQUEST_HEAD_H
#define SERVER_REQUEST_HEAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What is checked about a request before anything reads it.  libmicrohttpd
 * accepts duplicate Content-Length headers, Content-Length beside chunked, and
 * unknown transfer codings; behind a proxy each is a way to smuggle a second
 * request past it.  Pure. */

enum {
    HEAD_MAX_BYTES = 16 * 1024,     /* names and values together */
    HEAD_MAX_HEADERS = 100,
    HEAD_MAX_PATH_BYTES = 4 * 1024,
    REQUEST_ID_BYTES = 129
};

struct request_head {               /* zero-initialise */
    size_t bytes;
    uint32_t n_headers, n_hosts, n_lengths, n_codings;
    bool bad_name, bad_length, bad_coding, chunked, encoded;
    bool expects;                   /* Expect: 100-continue */
    uint64_t content_length;        /* 0 if there is none */
};

void request_head_note(struct request_head *h, const char *name, const char *value);

/* 0, or the HTTP status of the refusal with a sentence in *why. */
int request_head_check(const struct request_head *h, const char *path, const char *version,
                       const char **why);

/* The client's own id where it is short and printable, otherwise a random one. */
void request_id_choose(char out[REQUEST_ID_BYTES], const char *wanted);

/* prefix and 24 random hexadecimal digits. */
void request_id_make(char *out, size_t n, const char *prefix);

#endif
