#ifndef SERVER_PAGE_H
#define SERVER_PAGE_H

struct http_exchange;

/* The page at /: the model's state, live gauges, a prompt to try.
 *
 * server/page.html is part of the binary.  It talks to the public API like any
 * client, with the key that its user types in, and loads nothing from anywhere
 * else.  Its policy lets no script or style run but its own two, which carry a
 * number drawn for each answer.  Loop thread. */
void page_reply(struct http_exchange *x);

#endif
