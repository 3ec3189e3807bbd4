#include "engine/base/mem.h"
#include "engine/model/bpe.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Random merges over a small alphabet.  As in a real vocabulary, every id
 * stands for one string, so two pairs have the same result only if they spell
 * the same. */
enum { N_LETTERS = 3, MAX_MERGES = 120 };

struct random_merges {
    struct merges table;
    char spelling[N_LETTERS + MAX_MERGES][64];
    int n_ids;
    int left[MAX_MERGES], right[MAX_MERGES], id[MAX_MERGES];
    int n;
};

static int find_spelling(const struct random_merges *m, const char *s)
{
    for (int i = 0; i < m->n_ids; i++)
        if (strcmp(m->spelling[i], s) == 0)
            return i;
    return -1;
}

static void random_merges_init(struct random_merges *m)
{
    *m = (struct random_merges){ .n_ids = N_LETTERS };
    for (int i = 0; i < N_LETTERS; i++)
        m->spelling[i][0] = (char)('a' + i);
    merges_init(&m->table, MAX_MERGES);
    while (m->n < MAX_MERGES) {
        char joined[128];
        int left = rand() % m->n_ids, right = rand() % m->n_ids, rank = m->n;
        snprintf(joined, sizeof joined, "%s%s", m->spelling[left], m->spelling[right]);
        if (strlen(joined) > 60)
            continue;
        int id = find_spelling(m, joined);
        if (id < 0) {
            id = m->n_ids++;
            memcpy(m->spelling[id], joined, strlen(joined) + 1);
        }
        m->left[rank] = left;
        m->right[rank] = right;
        m->id[rank] = id;
        m->n++;
        merges_put(&m->table, left, right, rank, id);
    }
}

/* The rule, word for word: of all pairs the one of lowest rank, the leftmost. */
static size_t merge_by_the_rule(const struct random_merges *m, int32_t *ids, size_t n)
{
    for (;;) {
        int best = -1;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++)
            for (int rank = m->n - 1; rank >= 0; rank--)
                if (m->left[rank] == ids[i] && m->right[rank] == ids[i + 1]) {
                    if (best < 0 || rank < best) {
                        best = rank;
                        at = i;
                    }
                    break;   /* of equal pairs the last one counts */
                }
        if (best < 0)
            return n;
        ids[at] = m->id[best];
        memmove(ids + at + 1, ids + at + 2, (n - at - 2) * sizeof *ids);
        n--;
    }
}

START_TEST(merges_follow_the_rule)
{
    enum { LONGEST = 150 };
    struct random_merges m;
    struct bpe_scratch scratch = { 0 };

    srand((unsigned)_i);
    random_merges_init(&m);
    for (int round = 0; round < 150; round++) {
        int32_t ids[LONGEST], want[LONGEST];
        /* Around the length where the method changes, and far above it. */
        size_t n = (size_t)(round % 3 ? rand() % 40 : rand() % (LONGEST + 1));
        for (size_t i = 0; i < n; i++)
            ids[i] = want[i] = rand() % (1 + rand() % N_LETTERS);
        size_t n_want = merge_by_the_rule(&m, want, n);
        ck_assert_uint_eq(bpe_merge(&m.table, &scratch, ids, n), n_want);
        ck_assert_mem_eq(ids, want, n_want * sizeof *ids);
    }
    bpe_scratch_fini(&scratch);
    merges_fini(&m.table);
}
END_TEST

START_TEST(overlapping_pairs_merge_from_the_left)
{
    struct merges m;
    struct bpe_scratch scratch = { 0 };
    int32_t ids[] = { 0, 0, 0, 0, 0 };

    merges_init(&m, 1);
    merges_put(&m, 0, 0, 0, 1);
    ck_assert_uint_eq(bpe_merge(&m, &scratch, ids, 5), 3);
    ck_assert_int_eq(ids[0], 1);
    ck_assert_int_eq(ids[1], 1);
    ck_assert_int_eq(ids[2], 0);
    ck_assert_uint_eq(bpe_merge(&m, &scratch, ids, 0), 0);
    ck_assert_uint_eq(bpe_merge(&m, &scratch, ids, 1), 1);
    merges_fini(&m);
    bpe_scratch_fini(&scratch);
}
END_TEST

START_TEST(later_rank_wins)
{
    struct merges m;
    struct bpe_scratch scratch = { 0 };
    int32_t ids[] = { 0, 1, 2 };

    merges_init(&m, 3);
    merges_put(&m, 0, 1, 0, 10);
    merges_put(&m, 1, 2, 1, 11);
    merges_put(&m, 0, 1, 2, 10);
    ck_assert_uint_eq(bpe_merge(&m, &scratch, ids, 3), 2);
    ck_assert_int_eq(ids[0], 0);
    ck_assert_int_eq(ids[1], 11);
    merges_fini(&m);
    bpe_scratch_fini(&scratch);
}
END_TEST

/* Half a million symbols: quadratic work would take minutes, the test has seconds. */
START_TEST(long_words_are_not_quadratic)
{
    enum { N = 500000 };
    struct merges m;
    struct bpe_scratch scratch = { 0 };
    int32_t *ids = mem_calloc(N, sizeof *ids);

    merges_init(&m, 4);
    for (int32_t i = 0; i < 4; i++)   /* a a -> aa, aa aa -> aaaa, ... */
        merges_put(&m, i, i, i, i + 1);
    ck_assert_uint_eq(bpe_merge(&m, &scratch, ids, N), N / 16);
    for (int i = 0; i < N / 16; i++)
        if (ids[i] != 4)
            ck_abort_msg("id %d is %d", i, ids[i]);
    merges_fini(&m);
    bpe_scratch_fini(&scratch);
    mem_free(ids);
}
END_TEST

TCase *bpe_case(void)
{
    TCase *tc = tcase_create("bpe");

    tcase_set_timeout(tc, 20);
    tcase_add_loop_test(tc, merges_follow_the_rule, 0, 8);
    tcase_add_test(tc, overlapping_pairs_merge_from_the_left);
    tcase_add_test(tc, later_rank_wins);
    tcase_add_test(tc, long_words_are_not_quadratic);
    return tc;
}
