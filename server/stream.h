#ifndef SERVER_STREAM_H
#define SERVER_STREAM_H

#include "server/api.h"
#include "server/http.h"

#include <stdbool.h>
#include <stdint.h>

/* One exchange with a body, from that to the last byte of its answer: completions, text and
 * chat; and /tokenize and /detokenize, which are answered as soon as they are parsed.
 *
 *     body --> parsed --> admitted --> sending --> answered
 *                |            |           |
 *                +------------+-----------+--> refused or failed
 *
 * Large bodies are parsed by a thread of the libuv pool.  An answer begins
 * with the first text, or with the first comment of a long silence, and by
 * then everything that can be refused has been.  The client may vanish at any
 * moment: its requests are cancelled, and the stream lives on without it until
 * the pool and the engine have given back what is theirs.
 *
 * Loop thread only. */

struct engine_sequence;
struct service;
struct strbuf;
struct stream;

enum stream_kind { STREAM_TEXT, STREAM_CHAT, STREAM_TOKENIZE, STREAM_DETOKENIZE };

/* The exchange's owner becomes the stream. */
void stream_start(struct service *sv, struct http_exchange *x, enum stream_kind kind);

/* From the engine.  The message's request belongs to a stream. */
void stream_take_message(struct service *sv, struct message *m);
/* After a batch of them: send what has arrived. */
void stream_send_pending(struct service *sv);

/* From the transport. */
void stream_drained(struct stream *s);
void stream_half_closed(struct stream *s);
void stream_closed(struct stream *s, bool whole);   /* s is dead for the caller */

/* Comments into silences; look after half-closed connections. */
void stream_tick(struct service *sv, uint64_t now_ns);

/* Append a JSON array of all of them with their choices, for /debug/state.  running: what the
 * engine says runs, by id of request. */
void stream_write_states(struct strbuf *out, const struct service *sv,
                         const struct engine_sequence *running, uint32_t n_running);

/* End all answers with an error and cancel their requests. */
void stream_fail_all(struct service *sv, const struct api_error *why);

#endif
