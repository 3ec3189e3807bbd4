#ifndef SERVER_REQUEST_LOG_H
#define SERVER_REQUEST_LOG_H

#include <stdbool.h>
#include <stdint.h>

/* One line of the log for each request, when it is over:
 *
 *     ... I loop   http: request request_id=req_5f.. method=POST path=/v1/completions status=200
 *     disconnected=false stream=true engine=0 choices=1 prompt_tokens=12 cached_tokens=0
 *     completion_tokens=60 finish=length queue_ms=0.1 ttft_ms=8.2 total_ms=241.0
 *
 * Of the client's text it has the id and the method, both short (request_head.h, http_parts.h).
 * Answers to probes are logged at level debug unless they are errors. */

struct request_record {
    const char *id, *method;
    const char *path;                /* a route's, never what a client made up */
    int status;                      /* 0: gone before there was an answer */
    bool disconnected;               /* gone before the answer's end */
    bool probe;
    uint32_t key;                    /* which API key, from 1; 0: there are none */
    uint64_t arrival_ns;

    bool completion;                 /* it reached the engine: */
    bool stream;
    uint32_t choices;
    int engine;                      /* of the first choice; -1: none took it */
    uint64_t prompt_tokens, cached_tokens, completion_tokens;
    const char *ending;
    uint64_t submitted_ns, admitted_ns, first_token_ns; /* of the choice that had a token first;
                                                           0: none had */
};

void request_log(const struct request_record *r);

/* What went wrong with a request inside the server. */
void request_log_error(const char *id, const char *why);

#endif
