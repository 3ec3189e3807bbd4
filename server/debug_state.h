#ifndef SERVER_DEBUG_STATE_H
#define SERVER_DEBUG_STATE_H

struct service;
struct strbuf;

/* Append the document of /debug/state: what is in hand, without any text of a client but its
 * request ids.  Loop thread; no engine is asked, its last snapshot is read. */
void debug_state_write(struct strbuf *out, struct service *sv);

#endif
