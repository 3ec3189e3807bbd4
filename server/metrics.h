#ifndef SERVER_METRICS_H
#define SERVER_METRICS_H

#include "server/fleet.h"

#include <stdbool.h>
#include <stdint.h>

struct strbuf;
struct request;

/* What /metrics shows, in Prometheus' text format.
 *
 * Names and intervals are those that dashboards for other servers of this kind
 * use, under our own prefix:
 *
 *   time to first token   arrival of the request .. its first token
 *   queue                 submitted .. admitted by the scheduler
 *   prefill               admitted .. first token
 *   decode                first token .. last token
 *   inference             admitted .. last token
 *   end to end            arrival .. last token
 *   time per token        decode, by the tokens after the first
 *
 * What belongs to a choice or to an engine has the label engine, its number, also where there is
 * one alone.
 *
 * Loop thread only.  Counters of an engine come from its own snapshot. */

struct metrics;

struct metrics *metrics_create(void);
void metrics_destroy(struct metrics *m);       /* NULL is fine */

/* One HTTP exchange has ended, seconds after its headers.  route: a static string. */
void metrics_count_http(struct metrics *m, const char *route, int code, double seconds);

/* The first token of a choice is here; observed at once, not at the end. */
void metrics_note_first_token(struct metrics *m, uint32_t engine, uint64_t arrival_ns,
                              uint64_t now_ns);

/* tokens came together, interval_ns after the ones before. */
void metrics_note_tokens(struct metrics *m, uint32_t engine, uint32_t tokens,
                         uint64_t interval_ns);

/* A choice is home; r->finish and its times are read. */
void metrics_note_done(struct metrics *m, const struct request *r, uint64_t submitted_ns);
/* A request was let in; engine: of its first choice. */
void metrics_note_params(struct metrics *m, uint32_t engine, uint32_t n, uint32_t max_tokens);

struct metrics_view {
    const char *model_name;
    uint32_t n_engines;                        /* 0: none yet */
    const struct engine_stats *stats;          /* [n_engines] */
    const char *const *devices;                /* [n_engines] */
    int layers;                                /* of their model */
    bool prefix_cache;                         /* is on */
    uint32_t parsing;                          /* requests on their way to the engine */
    int streams;                               /* completions that are not finished */
    const char *version;
};
void metrics_print(const struct metrics *m, struct strbuf *out, const struct metrics_view *v);

#endif
