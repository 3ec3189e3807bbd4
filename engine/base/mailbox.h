#ifndef BASE_MAILBOX_H
#define BASE_MAILBOX_H

/* Many senders, one receiver, no allocation, no lock.
 *
 * A message embeds a mail_node, so posting cannot fail.  Posting hands the
 * message over: the sender must not touch it again.  wake() is called only
 * when the box goes from empty to non-empty, so a burst of a thousand posts
 * costs one wake-up.  The receiver drains everything at once.
 *
 * wake() runs on the sender's thread: uv_async_send for the loop thread, an
 * eventfd write for the engine thread. */

struct mail_node {
    struct mail_node *next;
};

struct mailbox;

struct mailbox *mailbox_create(void (*wake)(void *arg), void *arg);
void mailbox_destroy(struct mailbox *box); /* must be empty; NULL is fine */

/* Any thread. */
void mailbox_post(struct mailbox *box, struct mail_node *node);

/* Receiver only.  Returns the pending messages oldest first, or NULL. */
struct mail_node *mailbox_drain(struct mailbox *box);

#endif
