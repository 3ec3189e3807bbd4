#include "engine/base/mailbox.h"

#include "engine/base/invariant.h"
#include "engine/base/mem.h"

#include <stdatomic.h>

/* A stack of pending messages; drain takes it whole and reverses it.  Only
 * the receiver pops, and it pops everything, so there is no ABA. */
struct mailbox {
    _Atomic(struct mail_node *) top;
    void (*wake)(void *arg);
    void *arg;
};

struct mailbox *mailbox_create(void (*wake)(void *arg), void *arg)
{
    struct mailbox *box = mem_calloc(1, sizeof *box);

    atomic_init(&box->top, NULL);
    box->wake = wake;
    box->arg = arg;
    return box;
}

void mailbox_destroy(struct mailbox *box)
{
    if (!box)
        return;
    ASSERT(!atomic_load(&box->top));
    mem_free(box);
}

void mailbox_post(struct mailbox *box, struct mail_node *node)
{
    struct mail_node *top = atomic_load_explicit(&box->top, memory_order_relaxed);

    do
        node->next = top;
    while (!atomic_compare_exchange_weak_explicit(&box->top, &top, node, memory_order_release,
                                                  memory_order_relaxed));
    if (!top && box->wake)
        box->wake(box->arg);
}

struct mail_node *mailbox_drain(struct mailbox *box)
{
    struct mail_node *node = atomic_exchange_explicit(&box->top, NULL, memory_order_acquire);
    struct mail_node *first = NULL;

    while (node) {
        struct mail_node *next = node->next;
        node->next = first;
        first = node;
        node = next;
    }
    return first;
}
