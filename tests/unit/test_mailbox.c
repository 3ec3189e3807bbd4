/* engine/base/mailbox.h: order, completeness and wake-ups, alone and with several
 * senders at once.  Run it with SAN=thread as well. */

#include "engine/base/mailbox.h"

#include <check.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

struct letter {
    struct mail_node node;               /* first, so a node is its letter */
    int sender, number;
};

static void count(void *arg)
{
    ++*(int *)arg;
}

START_TEST(oldest_first)
{
    enum { N = 100 };
    struct mailbox *box = mailbox_create(NULL, NULL);
    struct letter letters[N];

    ck_assert_ptr_null(mailbox_drain(box));
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < N; i++) {
            letters[i].number = i;
            mailbox_post(box, &letters[i].node);
        }
        int i = 0;
        for (struct mail_node *n = mailbox_drain(box); n; n = n->next)
            ck_assert_int_eq(((struct letter *)n)->number, i++);
        ck_assert_int_eq(i, N);
        ck_assert_ptr_null(mailbox_drain(box));
    }
    mailbox_destroy(box);
    mailbox_destroy(NULL);
}
END_TEST

START_TEST(one_wake_up_a_burst)
{
    int wakes = 0;
    struct mailbox *box = mailbox_create(count, &wakes);
    struct letter letters[10];

    for (int burst = 1; burst <= 3; burst++) {
        for (int i = 0; i < 10; i++)
            mailbox_post(box, &letters[i].node);
        ck_assert_int_eq(wakes, burst);
        ck_assert_ptr_nonnull(mailbox_drain(box));
        ck_assert_int_eq(wakes, burst);
    }
    mailbox_destroy(box);
}
END_TEST

START_TEST(destroying_what_is_not_empty_aborts)
{
    struct mailbox *box = mailbox_create(NULL, NULL);
    struct letter letter;

    mailbox_post(box, &letter.node);
    mailbox_destroy(box);
}
END_TEST

/* ---- several senders */

enum { SENDERS = 4, LETTERS = 20000 };

struct office {
    struct mailbox *box;
    sem_t bell;
    atomic_int wakes;
};

struct sender {
    struct office *office;
    struct letter *letters;              /* [LETTERS] */
    pthread_t thread;
};

static void ring(void *arg)
{
    struct office *o = arg;

    atomic_fetch_add(&o->wakes, 1);
    sem_post(&o->bell);
}

static void *send_all(void *arg)
{
    struct sender *s = arg;

    for (int i = 0; i < LETTERS; i++)
        mailbox_post(s->office->box, &s->letters[i].node);
    return NULL;
}

/* The receiver sleeps until rung: were a wake-up lost, it would never wake. */
static int receive_all(struct office *o, int next[SENDERS])
{
    int left = SENDERS * LETTERS, most = 0;

    while (left > 0) {
        sem_wait(&o->bell);
        int n = 0;
        for (struct mail_node *at = mailbox_drain(o->box), *after; at; at = after, n++) {
            struct letter *l = (struct letter *)at;
            after = at->next;
            if (l->number != next[l->sender])
                ck_abort_msg("sender %d: letter %d came as number %d", l->sender, l->number,
                             next[l->sender]);
            next[l->sender]++;
            l->number = -1;              /* the receiver's now */
        }
        left -= n;
        most = n > most ? n : most;
    }
    return most;
}

START_TEST(every_letter_arrives_in_the_order_of_its_sender)
{
    struct office o = { 0 };
    struct sender senders[SENDERS];
    int next[SENDERS] = { 0 };

    ck_assert_int_eq(sem_init(&o.bell, 0, 0), 0);
    o.box = mailbox_create(ring, &o);
    for (int s = 0; s < SENDERS; s++) {
        senders[s] = (struct sender){ &o, calloc(LETTERS, sizeof(struct letter)), 0 };
        for (int i = 0; i < LETTERS; i++) {
            senders[s].letters[i].sender = s;
            senders[s].letters[i].number = i;
        }
    }
    for (int s = 0; s < SENDERS; s++)
        ck_assert_int_eq(pthread_create(&senders[s].thread, NULL, send_all, &senders[s]), 0);
    int most = receive_all(&o, next);
    for (int s = 0; s < SENDERS; s++) {
        pthread_join(senders[s].thread, NULL);
        ck_assert_int_eq(next[s], LETTERS);
        free(senders[s].letters);
    }
    ck_assert(atomic_load(&o.wakes) >= 1 && atomic_load(&o.wakes) <= SENDERS * LETTERS);
    ck_assert(most >= 1 && most <= SENDERS * LETTERS);
    ck_assert_ptr_null(mailbox_drain(o.box));
    mailbox_destroy(o.box);
    sem_destroy(&o.bell);
}
END_TEST

TCase *mailbox_case(void)
{
    TCase *tc = tcase_create("mailbox");

    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, oldest_first);
    tcase_add_test(tc, one_wake_up_a_burst);
    tcase_add_test_raise_signal(tc, destroying_what_is_not_empty_aborts, SIGABRT);
    tcase_add_loop_test(tc, every_letter_arrives_in_the_order_of_its_sender, 0, 3);
    return tc;
}
