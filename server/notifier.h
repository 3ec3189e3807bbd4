#ifndef SERVER_NOTIFIER_H
#define SERVER_NOTIFIER_H

#include "engine/base/status.h"

#include <stdbool.h>
#include <stdint.h>

/* What a service manager is told, as datagrams of systemd's notification
 * protocol (sd_notify(3)):
 *
 *     READY=1      requests are accepted
 *     STOPPING=1   draining has begun, or the end has
 *     WATCHDOG=1   the engine has moved
 *     STATUS=...   a line for people, with each of the others
 *
 * Who listens stands in the environment, put there by the manager and by nobody
 * else: NOTIFY_SOCKET, and WATCHDOG_USEC and WATCHDOG_PID where it wants to be
 * fed.  Without them nothing is sent.
 *
 * The manager may be slow to read.  Nothing here waits for it: the latest state
 * is kept until it has been taken, a feeding that finds no room is left out and
 * followed by the next.  Loop thread. */

enum { NOTIFIER_STATE_BYTES = 300 };

struct notifier {
    int fd;                            /* -1: nobody listens */
    uint64_t watchdog_ns;              /* 0: nobody wants to be fed */
    bool complained;
    char state[NOTIFIER_STATE_BYTES];  /* not taken yet; empty: nothing */
};

/* env as main has it.  A socket or an interval that makes no sense is refused. */
enum status notifier_open(struct notifier *out, char **env, struct error *err) MUST_USE;
void notifier_close(struct notifier *n);

/* Lines of the protocol; replaces what has not been taken. */
void notifier_set_state(struct notifier *n, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
/* Offer it again; to be called every now and then. */
void notifier_retry(struct notifier *n);
/* WATCHDOG=1 with a status line. */
void notifier_feed(struct notifier *n, const char *status);

#endif
