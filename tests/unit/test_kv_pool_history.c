/* Long random histories of engine/kv/kv_pool.h against a naive model.
 *
 * Users spell texts out of few blocks, so that they share prefixes all the time; they hold and
 * release, fork and shrink; blocks are copied to the host tier and back with memcpy, a piece
 * now and a piece later, and some copies fail.  The model knows of each block what it must
 * contain and who uses it, and says for each operation what may change: which slots a block must
 * have, what is found, what sealing returns, and how many blocks of which kind have to give up
 * a slot.  It takes no part in the choice of which. */

#include "tests/support/kv_pool_fixture.h"

#include <check.h>
#include <stdlib.h>

enum { USERS = 6, MOST = 8, TEXTS = 3, COPIES = 5, MAX_IDS = 64, RUNS = 16, OPERATIONS = 64000 };

struct known {
    bool exists, sealed, named, orphan;     /* orphan: its parent's name is gone */
    uint32_t pins, holds;
    kv_block parent;
    int text;
    uint32_t pattern;
    struct block_place place;               /* readable */
    struct block_place coming;              /* being written by a copy; else all -1 */
};

struct user {
    kv_block table[MOST];
    bool held[MOST];
    int texts[MOST];
    int n, n_sealed;
};

struct copy {
    bool active, to_host;
    kv_block block;
    struct block_place place;
    int layers_done;
};

static const struct kv_pool_config configs[] = {
    { .blocks = 12, .prefix_cache = true },
    { .blocks = 12, .index_blocks = 18, .host_blocks = 6, .prefix_cache = true },
    { .blocks = 12, .index_blocks = 12, .host_blocks = 12, .prefix_cache = true },
    { .blocks = 8, .index_blocks = 24, .host_blocks = 24, .prefix_cache = true },
    { .blocks = 10, .index_blocks = 13, .host_blocks = 30, .prefix_cache = true },
    { .blocks = 8, .index_blocks = 14, .host_blocks = 16, .prefix_cache = false },
    { .blocks = 5, .index_blocks = 9, .host_blocks = 7, .prefix_cache = true },
    { .blocks = 24, .index_blocks = 24, .host_blocks = 24, .prefix_cache = true },
};
enum { N_CONFIGS = sizeof configs / sizeof configs[0] };

static struct kv_pool_config cfg;
static struct known known[MAX_IDS];
static struct user users[USERS];
static struct copy copies[COPIES];
static uint32_t n_ids, host_ready;
static int run, operation;
/* So that a history in which nothing happens is not taken for a good one. */
static struct {
    uint32_t offloaded, stored, orphaned, failed, takeovers, unnamed;
} happened;

/* Check's own assertions write to a pipe, too slow for what is asked this often. */
#define EXPECT(cond) \
    ((cond) ? (void)0 : ck_abort_msg("run %d, operation %d: %s", run, operation, #cond))

static const struct block_place nowhere = { -1, -1, -1 };

static int pick(int n)
{
    return (int)(random() % n);
}

static bool same_place(struct block_place a, struct block_place b)
{
    return a.kv == b.kv && a.index == b.index && a.host == b.host;
}

static bool is_copied(const struct known *k)
{
    return !same_place(k->coming, nowhere);
}

static uint32_t max(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* ---- what there is to be had, by looking at every block */

struct room {
    uint32_t kv_free, index_free, host_free;
    uint32_t unpinned, offloadable;         /* blocks that may lose a kv slot */
    uint32_t clearing, clearing_pinned;     /* that may once they have been copied */
    uint32_t host_unpinned;
    bool easy[MAX_IDS], host_easy[MAX_IDS]; /* unpinned, and no child is lost with its slot */
};

static bool has_children(kv_block b)
{
    for (kv_block c = 0; c < n_ids; c++)
        if (known[c].exists && known[c].named && !known[c].orphan && known[c].parent == b)
            return true;
    return false;
}

static struct room look_for_room(void)
{
    struct room r = { .kv_free = cfg.blocks, .host_free = host_ready,
                      .index_free = cfg.index_blocks ? cfg.index_blocks : cfg.blocks };

    for (kv_block b = 0; b < n_ids; b++) {
        const struct known *k = &known[b];
        if (!k->exists)
            continue;
        r.kv_free -= (k->place.kv >= 0) + (k->coming.kv >= 0);
        r.index_free -= (k->place.index >= 0) + (k->coming.index >= 0);
        r.host_free -= (k->place.host >= 0) + (k->coming.host >= 0);
        if (is_copied(k)) {
            r.clearing += k->pins == 0 && (k->place.kv >= 0 || k->coming.kv >= 0);
            r.clearing_pinned += k->pins > 0 && k->holds == 0 && k->coming.host >= 0;
            continue;
        }
        r.host_unpinned += k->pins == 0 && k->place.host >= 0;
        r.host_easy[b] = k->pins == 0 && k->place.host >= 0 &&
                         (k->place.kv >= 0 || !has_children(b));
        if (k->place.kv < 0)
            continue;
        r.unpinned += k->pins == 0;
        r.easy[b] = k->pins == 0 && (k->place.host >= 0 || !has_children(b));
        r.offloadable += k->pins > 0 && k->holds == 0 && k->place.host >= 0;
    }
    return r;
}

static uint32_t available(const struct room *r)
{
    uint32_t kv = r->kv_free + r->unpinned + r->offloadable;
    uint32_t index = r->index_free + r->unpinned;

    return kv < index ? kv : index;
}

/* What there would be if all copies had arrived. */
static uint32_t available_later(struct room r)
{
    r.unpinned += r.clearing;
    r.offloadable += r.clearing_pinned;
    return available(&r);
}

/* ---- what changes */

static void gone(kv_block b)
{
    known[b].exists = false;
    for (kv_block c = 0; c < n_ids; c++)
        if (known[c].exists && known[c].named && known[c].parent == b)
            known[c].orphan = true;
}

/* The last user, or the last copy, may have left it. */
static void left(kv_block b)
{
    struct known *k = &known[b];

    if (k->pins > 0 || is_copied(k))
        return;
    if (!k->named)
        gone(b);
    else if (k->place.kv < 0)
        k->place.index = -1;
}

struct losses {
    uint32_t unpinned, pinned, host;
};

/* A block is not where it was: is that what becomes of one that gives up its kv slot, or its
 * host slot? */
static void lose(kv_block b, struct block_place now, struct losses *lost)
{
    struct known *k = &known[b];
    struct block_place was = k->place;

    EXPECT(!is_copied(k) && k->sealed);
    k->place = now;
    if (was.kv >= 0 && now.kv < 0) {
        EXPECT(k->holds == 0 && now.host == was.host);
        EXPECT(now.index == (k->pins > 0 ? was.index : -1));
        EXPECT(k->pins == 0 || now.host >= 0);
        lost->pinned += k->pins > 0;
        lost->unpinned += k->pins == 0;
    } else {
        EXPECT(k->pins == 0 && was.host >= 0 && now.host < 0);
        EXPECT(now.kv == was.kv && now.index == was.index);
        lost->host++;
    }
    if (same_place(now, nowhere))
        gone(b);
}

static struct losses find_losses(void)
{
    struct losses lost = { 0 };

    for (kv_block b = 0; b < n_ids; b++) {
        if (!known[b].exists)
            continue;
        struct block_place now = kv_pool_place(pool, b);
        if (!same_place(now, known[b].place))
            lose(b, now, &lost);
    }
    return lost;
}

static uint32_t n_orphans(void)
{
    uint32_t n = 0;

    for (kv_block b = 0; b < n_ids; b++)
        n += known[b].exists && known[b].orphan;
    return n;
}

/* After slots were wanted on the device: as many blocks as needed gave theirs, unpinned ones
 * first, parents only when there was nothing else. */
static void expect_device_losses(const struct room *before, const struct losses *lost,
                                 uint32_t n_kv, uint32_t n_index, uint32_t orphans,
                                 uint64_t version)
{
    uint32_t wanted = max(n_kv > before->kv_free ? n_kv - before->kv_free : 0,
                          n_index > before->index_free ? n_index - before->index_free : 0);
    uint32_t unpinned = wanted < before->unpinned ? wanted : before->unpinned;
    uint32_t pinned = n_kv > before->kv_free + unpinned ? n_kv - before->kv_free - unpinned : 0;

    EXPECT(lost->unpinned == unpinned && lost->pinned == pinned && lost->host == 0);
    EXPECT(pinned == 0 || kv_pool_version(pool) > version);
    happened.offloaded += pinned;
    if (n_orphans() <= orphans)
        return;
    happened.orphaned++;
    for (kv_block b = 0; b < n_ids; b++)
        EXPECT(!before->easy[b] || !known[b].exists || known[b].place.kv < 0 ||
               known[b].pins > 0);
}

/* ---- users */

static void use(struct user *u, kv_block b, int text, bool held)
{
    u->table[u->n] = b;
    u->texts[u->n] = text;
    u->held[u->n++] = held;
    known[b].pins++;
    known[b].holds += held;
}

static void toggle_hold(struct user *u, int i)
{
    struct known *k = &known[u->table[i]];

    if (u->held[i]) {
        kv_pool_release(pool, u->table[i]);
        k->holds--;
    } else {
        if (k->place.kv < 0)
            return;
        kv_pool_hold(pool, u->table[i]);
        k->holds++;
    }
    u->held[i] = !u->held[i];
}

static void unuse(struct user *u, int i)
{
    kv_block b = u->table[i];

    if (u->held[i])
        toggle_hold(u, i);
    known[b].pins--;
    kv_pool_unpin(pool, b);
    left(b);
}

static void shrink(struct user *u, int n)
{
    while (u->n > n)
        unuse(u, --u->n);
    u->n_sealed = u->n_sealed < n ? u->n_sealed : n;
}

/* From the start: nobody should, but nothing breaks. */
static void leave_backwards(struct user *u)
{
    for (int i = 0; i < u->n; i++)
        unuse(u, i);
    u->n = u->n_sealed = 0;
}

static kv_block expected_find(kv_block parent, int text)
{
    for (kv_block b = 0; b < n_ids; b++) {
        const struct known *k = &known[b];
        if (k->exists && k->named && !k->orphan && k->parent == parent && k->text == text)
            return b;
    }
    return KV_BLOCK_NONE;
}

static void begin(struct user *u)
{
    int want = 1 + pick(MOST);

    while (u->n < want) {
        kv_block parent = u->n ? u->table[u->n - 1] : KV_BLOCK_NONE;
        int text = pick(TEXTS);
        kv_block expected = expected_find(parent, text), b = pool_find(parent, text);
        EXPECT(b == expected);
        if (b == KV_BLOCK_NONE)
            break;
        use(u, b, text, false);
        if (pick(2))
            toggle_hold(u, u->n - 1);
    }
    u->n_sealed = u->n;
}

static void fork_from(struct user *u, const struct user *from)
{
    for (int i = 0; i < from->n_sealed; i++) {
        kv_pool_pin(pool, from->table[i]);
        use(u, from->table[i], from->texts[i], false);
        if (from->held[i])
            toggle_hold(u, i);
    }
    u->n_sealed = u->n;
}

static uint32_t pattern_of(const struct user *u, int i)
{
    uint32_t h = 17;

    for (int k = 0; k <= i; k++)
        h = h * 31 + (uint32_t)u->texts[k] + 1;
    return h;
}

static void extend(struct user *u)
{
    uint32_t n = 1 + (uint32_t)pick(u->n + 3 <= MOST ? 3 : MOST - u->n), orphans = n_orphans();
    struct room before = look_for_room();
    uint64_t version = kv_pool_version(pool);
    kv_block taken[3];
    struct losses lost = { 0 };

    enum status st = kv_pool_take(pool, n, taken);
    EXPECT(st == (n <= available(&before) ? ST_OK : ST_BUSY));
    if (st != ST_OK)
        return;
    /* An id that was somebody else's before: that one is gone. */
    for (uint32_t i = 0; i < n; i++)
        if (known[taken[i]].exists)
            lose(taken[i], nowhere, &lost);
    struct losses others = find_losses();
    lost.unpinned += others.unpinned;
    lost.pinned += others.pinned;
    lost.host += others.host;
    expect_device_losses(&before, &lost, n, n, orphans, version);
    for (uint32_t i = 0; i < n; i++) {
        struct block_place place = kv_pool_place(pool, taken[i]);
        EXPECT(place.kv >= 0 && place.index >= 0 && place.host < 0);
        EXPECT(pool_is_poisoned(&place));
        known[taken[i]] = (struct known){ .exists = true, .place = place, .coming = nowhere };
        use(u, taken[i], pick(TEXTS), true);
        known[taken[i]].pattern = pattern_of(u, u->n - 1);
        pool_write(&place, known[taken[i]].pattern);
    }
}

/* The twin goes on in b's stead. */
static void expect_twin(kv_block b, kv_block twin, uint64_t version)
{
    struct known *k = &known[b], *t = &known[twin];

    if (t->place.kv < 0) {
        EXPECT(t->pins == 0 || kv_pool_version(pool) > version);
        t->place.kv = k->place.kv;
        if (t->place.index < 0)
            t->place.index = k->place.index;
        happened.takeovers++;
    }
    t->pins += k->pins;
    t->holds += k->holds;
    gone(b);
}

static void seal(struct user *u)
{
    int i = u->n_sealed++;
    kv_block b = u->table[i], parent = i ? u->table[i - 1] : KV_BLOCK_NONE, expected = b;
    struct known *k = &known[b];
    uint64_t version = kv_pool_version(pool);

    k->sealed = true;
    k->text = u->texts[i];
    k->parent = parent;
    if (cfg.prefix_cache && (i == 0 || known[parent].named)) {
        kv_block twin = expected_find(parent, k->text);
        k->named = twin == KV_BLOCK_NONE;
        if (!k->named && (known[twin].place.kv >= 0 || !is_copied(&known[twin])))
            expected = twin;
        else
            happened.unnamed += !k->named;
    }
    u->table[i] = pool_seal(b, parent, k->text);
    EXPECT(u->table[i] == expected);
    if (expected != b)
        expect_twin(b, expected, version);
}

/* ---- copies */

static struct copy *free_copy(void)
{
    for (int i = 0; i < COPIES; i++)
        if (!copies[i].active)
            return &copies[i];
    return NULL;
}

static void start_copy(struct copy *c, bool to_host, kv_block b, struct block_place place)
{
    struct known *k = &known[b];

    k->coming = nowhere;
    if (to_host)
        k->coming.host = place.host;
    else
        k->coming = (struct block_place){ place.kv, place.index, -1 };
    EXPECT(is_copied(k) && pool_is_poisoned(&k->coming));
    *c = (struct copy){ .active = true, .to_host = to_host, .block = b, .place = place };
}

static void start_store(kv_block b)
{
    struct known *k = &known[b];
    struct copy *c = free_copy();
    struct room before = look_for_room();
    uint32_t orphans = n_orphans();
    struct block_place place;

    if (!c || !k->exists || !k->sealed)
        return;
    if (!is_copied(k) && (k->place.kv < 0 || k->place.host >= 0))
        return;
    bool expected = !is_copied(k) && before.host_free + before.host_unpinned > 0;
    EXPECT(kv_pool_store_begin(pool, b, &place) == expected);
    struct losses lost = find_losses();
    EXPECT(lost.unpinned == 0 && lost.pinned == 0);
    EXPECT(lost.host == (expected && before.host_free == 0));
    for (kv_block h = 0; h < n_ids && n_orphans() > orphans; h++)
        EXPECT(!before.host_easy[h] || !known[h].exists);
    if (!expected)
        return;
    EXPECT(place.kv == k->place.kv && place.index == k->place.index && place.host >= 0);
    start_copy(c, true, b, place);
}

static void start_load(kv_block b, bool with_kv)
{
    struct known *k = &known[b];
    struct copy *c = free_copy();
    struct room r = look_for_room();
    uint32_t orphans = n_orphans();
    uint64_t version = kv_pool_version(pool);
    struct block_place place;

    if (!c || (!is_copied(k) && k->place.host < 0))
        return;
    bool kv = with_kv && k->place.kv < 0, index = k->place.index < 0;
    bool has_room = kv <= r.kv_free + r.unpinned + r.offloadable &&
                    index <= r.index_free + r.unpinned;
    bool expected = !is_copied(k) && (kv || index) && has_room;
    EXPECT(kv_pool_load_begin(pool, b, with_kv, &place) == expected);
    struct losses lost = find_losses();
    expect_device_losses(&r, &lost, kv && expected, index && expected, orphans, version);
    if (!expected)
        return;
    EXPECT((place.kv >= 0) == kv && (place.index >= 0) == index && place.host == k->place.host);
    start_copy(c, false, b, place);
}

static void finish_copy(struct copy *c, bool arrives)
{
    struct known *k = &known[c->block];
    uint64_t version = kv_pool_version(pool);

    while (arrives && c->layers_done < POOL_LAYERS)
        pool_move(c->to_host, &c->place, c->layers_done++);
    if (arrives) {
        k->place.kv = k->coming.kv >= 0 ? k->coming.kv : k->place.kv;
        k->place.index = k->coming.index >= 0 ? k->coming.index : k->place.index;
        k->place.host = k->coming.host >= 0 ? k->coming.host : k->place.host;
    }
    k->coming = nowhere;
    c->active = false;
    if (c->to_host)
        kv_pool_store_end(pool, c->block, arrives);
    else
        kv_pool_load_end(pool, c->block, arrives);
    EXPECT(!arrives || k->pins == 0 || kv_pool_version(pool) > version);
    happened.stored += arrives && c->to_host;
    happened.failed += !arrives;
    left(c->block);
}

static void go_on_with(struct copy *c)
{
    if (!c->active)
        return;
    if (pick(3) == 0 && c->layers_done < POOL_LAYERS)
        pool_move(c->to_host, &c->place, c->layers_done++);
    else
        finish_copy(c, pick(8) != 0);
}

/* ---- histories */

static void expect_counts(void)
{
    struct room r = look_for_room();
    struct kv_pool_counts c = kv_pool_counts(pool);

    EXPECT(kv_pool_available(pool) == available(&r));
    EXPECT(kv_pool_clearing(pool) == available_later(r) - available(&r));
    EXPECT(c.free == r.kv_free && c.index_free == r.index_free && c.host_free == r.host_free);
    EXPECT(c.cached == r.unpinned + r.offloadable && c.host_cached == r.host_unpinned);
    EXPECT(c.free + c.cached + c.pinned == c.blocks && c.host_blocks == host_ready);
}

/* Nothing has moved but what the operation said, and all of it reads as it should. */
static void expect_blocks(void)
{
    uint8_t kv[MAX_IDS] = { 0 }, index[MAX_IDS] = { 0 }, host[MAX_IDS] = { 0 };

    for (kv_block b = 0; b < n_ids; b++) {
        const struct known *k = &known[b];
        if (!k->exists)
            continue;
        EXPECT(same_place(kv_pool_place(pool, b), k->place));
        EXPECT(k->pins == 0 || k->place.kv >= 0 || k->place.host >= 0);
        const struct block_place *both[] = { &k->place, &k->coming };
        for (int i = 0; i < 2; i++) {
            EXPECT(both[i]->kv < 0 || !kv[both[i]->kv]++);
            EXPECT(both[i]->index < 0 || !index[both[i]->index]++);
            EXPECT(both[i]->host < 0 || !host[both[i]->host]++);
        }
    }
    for (int i = 0; i < 3; i++) {
        const struct known *k = &known[pick((int)n_ids)];
        EXPECT(!k->exists || pool_reads(&k->place, k->pattern));
    }
}

/* One of the user's blocks for which this is not a bug of the caller, if there is any. */
static void start_any(struct user *u, bool to_host)
{
    int from = u->n_sealed ? pick(u->n_sealed) : 0;

    for (int i = 0; i < u->n_sealed; i++) {
        kv_block b = u->table[(from + i) % u->n_sealed];
        const struct block_place *at = &known[b].place;
        if (to_host && at->host < 0) {
            start_store(b);
            return;
        }
        if (!to_host && at->host >= 0 && (at->kv < 0 || pick(8) == 0)) {
            start_load(b, pick(4) != 0);
            return;
        }
    }
}

static void step(void)
{
    struct user *u = &users[pick(USERS)];
    const struct user *other = &users[pick(USERS)];

    switch (pick(26)) {
    case 0: case 1: case 24: case 25:
        shrink(u, pick(3) ? 0 : pick(MOST));
        break;
    case 2: case 3: case 4: case 5: case 6:
        if (u->n == 0 && pick(3))
            begin(u);
        else if (u->n == 0)
            fork_from(u, other);
        if (u->n < MOST)
            extend(u);
        break;
    case 7: case 8: case 9: case 10:
        if (u->n_sealed < u->n)
            seal(u);
        break;
    case 11: case 12:
        if (u->n > 0)
            toggle_hold(u, pick(u->n));
        break;
    case 13:
        start_store((kv_block)pick((int)n_ids));
        break;
    case 14: case 15: case 16:
        start_any(u, true);
        break;
    case 17: case 18:
        start_any(u, false);
        break;
    case 19:
        if (pick(20) == 0 && host_ready < cfg.host_blocks)
            kv_pool_host_ready(pool, ++host_ready);
        else if (pick(10) == 0)
            leave_backwards(u);
        break;
    default:
        go_on_with(&copies[pick(COPIES)]);
    }
}

static void expect_a_full_life(void)
{
    struct kv_pool_counts c = kv_pool_counts(pool);

    ck_assert_uint_gt(c.n_taken, 100);
    if (cfg.prefix_cache) {
        ck_assert_uint_gt(c.n_reclaimed, 100);
        ck_assert_uint_gt(c.n_duplicates, 100);
    }
    if (cfg.host_blocks == 0)
        return;
    ck_assert_uint_gt(c.n_stored, 100);
    ck_assert_uint_eq(c.n_stored, happened.stored);
    ck_assert_uint_gt(happened.failed, 30);
    if (cfg.index_blocks > cfg.blocks) {
        ck_assert_uint_gt(happened.offloaded, 50);
        ck_assert_uint_gt(c.n_loaded, 20);
    }
    if (cfg.prefix_cache) {
        ck_assert_uint_gt(happened.takeovers, 20);
        ck_assert_uint_gt(happened.unnamed, 0);
    }
}

/* Half the runs begin with all of the host tier, the others with none. */
START_TEST(random_histories_keep_the_promises)
{
    run = _i;
    cfg = configs[_i % N_CONFIGS];
    host_ready = _i < N_CONFIGS ? cfg.host_blocks : 0;
    n_ids = cfg.blocks + cfg.host_blocks;
    srandom((unsigned)_i + 1);
    pool_open(cfg, host_ready);
    kv_pool_poison(pool, pool_host);
    for (operation = 0; operation < OPERATIONS; operation++) {
        step();
        kv_pool_check(pool);
        expect_blocks();
        expect_counts();
    }
    expect_a_full_life();
    for (int i = 0; i < COPIES; i++)
        if (copies[i].active)
            finish_copy(&copies[i], true);
    for (int i = 0; i < USERS; i++)
        shrink(&users[i], 0);
    expect_blocks();
    expect_counts();
    ck_assert_uint_eq(kv_pool_available(pool), cfg.blocks);
    pool_close();
}
END_TEST

TCase *kv_pool_history_case(void)
{
    TCase *tc = tcase_create("kv_pool_history");

    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, random_histories_keep_the_promises, 0, RUNS);
    return tc;
}
