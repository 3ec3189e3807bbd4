#ifndef TESTS_SUPPORT_HOT_FIXTURE_H
#define TESTS_SUPPORT_HOT_FIXTURE_H

#include "tests/support/decode_fixture.h"

/* The contexts of a decode_fixture.h again, with blocks off the device: what the call with sets
 * reads, in places that are new each step.  Whatever it must not read is NaN: kv slots of nobody,
 * host slots of blocks that are in kv, rows never filled.  All in host memory. */

struct hot_books {               /* of all sets, in the layouts of hot_rows.h */
    bf16 *rows;
    uint16_t *row_of;
    int32_t *position;
    uint32_t *used;
    int32_t *hand;
};

struct hot_fixture {
    struct decode_fixture *d;    /* borrowed */
    int rows_per_head;           /* of each set */
    int away;                    /* of ten blocks, about how many are off the device */
    size_t n_rows, n_positions;  /* of the books' position and used, and of row_of */
    int32_t set[DECODE_MOST_SEQS]; /* -1; the test gives them */
    int32_t *table, *host_table; /* [seqs, max_blocks] */
    bf16 *kv;                    /* as large as d->kv */
    char *host;                  /* [n_blocks] slots of host_stride bytes; the test's */
    size_t host_stride;
};

/* fini frees what init allocated. */
void hot_init(struct hot_fixture *h, struct decode_fixture *d, int rows_per_head, int away);
void hot_fini(struct hot_fixture *h);

/* NaN, empty and with hands of 0; to be freed by the other. */
struct hot_books hot_new_books(const struct hot_fixture *h);
void hot_free_books(struct hot_books *b);

/* Every block of the contexts anew in kv or in the host tier; of sequences without a set, and the
 * last block of each, in kv. */
void hot_place_blocks(struct hot_fixture *h);

/* Make a set empty: of its books only the positions say so. */
void hot_forget_set(const struct hot_fixture *h, struct hot_books *b, int set);

/* Two sequences by chance trade their sets.  Whether they did: then both sets are to be
 * forgotten, traded[0] and traded[1]. */
bool hot_trade_sets(struct hot_fixture *h, int traded[2]);

/* Every row of a sequence's KV head that is not empty has K and V of its position, and is found
 * by it. */
void hot_check_rows(const struct hot_fixture *h, const struct hot_books *b, uint32_t step, int seq,
                    int kv_head);

#endif
