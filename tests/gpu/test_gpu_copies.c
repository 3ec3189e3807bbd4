/* What moves blocks on a GPU: copies in pieces, fills, registered host memory, and the copy engine
 * on top of them. */

#include "engine/base/clock.h"
#include "engine/base/host_limits.h"
#include "engine/base/mem.h"
#include "engine/kv/copy_engine.h"
#include "engine/kv/host_memory.h"
#include "tests/support/gpu_fixture.h"

#include <check.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static struct backend *be;

static const size_t piece = (size_t)HOST_MEMORY_PIECE_MB << 20;

static void put(void *device, const void *host, size_t bytes)
{
    struct error err;

    stream_copy(gpu_stream(), device, host, bytes);
    ck_assert_msg(stream_sync(gpu_stream(), &err) == ST_OK, "%s", err.text);
}

START_TEST(pieces_and_fills)
{
    char from[64], to[64];
    char *device = gpu_put(NULL, 64);

    for (int i = 0; i < 64; i++)
        from[i] = (char)i;
    stream_fill(gpu_stream(), device, 0x55, 60);
    stream_copy_pieces(gpu_stream(), device, 12, from, 16, 5, 4);
    gpu_get(to, device, 64);
    for (int i = 0; i < 64; i++)
        ck_assert_int_eq(to[i], i >= 60 ? -1 : i / 12 < 4 && i % 12 < 5 ? i / 12 * 16 + i % 12
                                                                        : 0x55);
    /* One piece many times is no copy of rows. */
    stream_copy_pieces(gpu_stream(), device, 4, from + 7, 0, 4, 16);
    gpu_get(to, device, 64);
    for (int i = 0; i < 64; i++)
        ck_assert_int_eq(to[i], 7 + i % 4);
    gpu_forget();
}
END_TEST

/* Further apart than the pitch of a copy may be. */
START_TEST(pieces_far_apart)
{
    const size_t stride = ((size_t)5 << 29) + 4096;
    struct buffer far;
    int from[3] = { 1, 2, 3 }, to[3];

    if (backend_memory_free(be) < 3 * stride) {
        printf("skip: pieces far apart want %zu MB of the device\n", 3 * stride >> 20);
        return;
    }
    ck_assert_int_eq(buffer_alloc(be, &far, MEM_DEVICE, 2 * stride + 4096), ST_OK);
    stream_copy_pieces(gpu_stream(), far.base, stride, from, 4, 4, 3);
    stream_copy_pieces(gpu_stream(), to, 4, far.base, stride, 4, 3);
    ck_assert_int_eq(stream_sync(gpu_stream(), NULL), ST_OK);
    ck_assert_int_eq(memcmp(to, from, sizeof to), 0);
    buffer_free(be, &far);
}
END_TEST

START_TEST(registered_memory_has_one_address)
{
    const size_t bytes = 8 << 20;
    struct error err;
    char *host = mem_map(bytes, 2 << 20), *device = gpu_put(NULL, 4096);

    memset(host, 3, bytes);
    ck_assert_msg(host_register(be, host, bytes, &err) == ST_OK, "%s", err.text);
    ck_assert_int_ne(host_register(be, host, bytes, &err), ST_OK);   /* twice */
    ck_assert_ptr_nonnull(strstr(err.text, "cannot be pinned"));
    stream_fill(gpu_stream(), host + 4096, 9, 4096);
    stream_copy(gpu_stream(), device, host + 4096, 4096);
    ck_assert_msg(stream_sync(gpu_stream(), &err) == ST_OK, "%s", err.text);
    ck_assert(host[4095] == 3 && host[4096] == 9 && host[8191] == 9 && host[8192] == 3);
    host_unregister(be, host);
    mem_unmap(host, bytes);
    gpu_forget();
}
END_TEST

/* ---- the copy engine, with the tier that it is made for */

enum { LAYERS = 36, BLOCKS = 12, FIRST_SLOTS = 6 };

static const struct kv_shape shape = { .kv_heads = 8, .head_dim = 128, .filter = FILTER_COARSE };

static void ring(void *bell)
{
    sem_post(bell);
}

static struct host_memory *tier_of(size_t bytes)
{
    struct host_memory *tier;
    struct error err;
    sem_t bell;

    sem_init(&bell, 0, 0);
    uint64_t began = clock_now_ns();
    ck_assert_msg(host_memory_create(&tier, be, bytes, ring, &bell, &err) == ST_OK, "%s",
                  err.text);
    while (host_memory_ready_bytes(tier) < bytes) {
        sem_wait(&bell);
        ck_assert_msg(host_memory_failure(tier, &err) == ST_OK, "%s", err.text);
    }
    printf("host tier: %zu MB in %.2f s\n", bytes >> 20, (double)(clock_now_ns() - began) * 1e-9);
    sem_destroy(&bell);
    return tier;
}

static uint64_t collect(struct mailbox *done, int n)
{
    const struct timespec moment = { 0, 20000 };

    for (int back = 0; back < n;) {
        struct mail_node *at = mailbox_drain(done);
        if (!at)
            nanosleep(&moment, NULL);
        for (; at; at = at->next, back++)
            ck_assert(((struct copy_job *)at)->arrived);
    }
    return clock_now_ns();
}

/* A block in memory of the host, in the order of a slot: no two words are the same. */
static void spell(uint64_t *slot, size_t bytes, uint64_t block)
{
    for (size_t i = 0; i < bytes / 8; i++)
        slot[i] = (block << 40) + i;
}

static void write_block(const struct kv_pool *pool, uint32_t b, const char *slot)
{
    const size_t kv = kv_block_bytes(&shape), index = index_block_bytes(&shape);

    for (int l = 0; l < LAYERS; l++) {
        put((char *)kv_pool_kv(pool, l) + b * kv, slot + (size_t)l * kv, kv);
        put(kv_pool_index(pool, l) + b * index, slot + LAYERS * kv + (size_t)l * index, index);
    }
}

/* Blocks of an 8B model to the tier, the last of them into the slot that lies in two pieces, and
 * back to other places on the device and from there to other slots. */
START_TEST(blocks_cross_and_come_back)
{
    const size_t slot_bytes = LAYERS * (kv_block_bytes(&shape) + index_block_bytes(&shape));
    const int across = (int)(piece / slot_bytes), half = BLOCKS / 2;
    const size_t tier_bytes = (size_t)(across + FIRST_SLOTS) * slot_bytes;
    struct kv_pool_config pool_config = { .blocks = BLOCKS, .layers = LAYERS, .shape = shape };
    struct copy_job jobs[BLOCKS];
    struct copy_engine *engine;
    struct kv_pool *pool;
    struct error err;

    if (host_memory_available() < 2 * tier_bytes) {
        printf("skip: the test of the copy engine wants %zu MB of memory\n", tier_bytes >> 20);
        return;
    }
    struct host_memory *tier = tier_of(tier_bytes);
    char *host = host_memory_base(tier);
    struct mailbox *done = mailbox_create(NULL, NULL);
    uint64_t *text = mem_alloc(slot_bytes);
    ck_assert_msg(kv_pool_create(&pool, be, &pool_config, &err) == ST_OK, "%s", err.text);
    struct copy_engine_config cfg = { .pool = pool, .host = host, .layers = LAYERS,
                                      .shape = shape, .done = done };
    ck_assert_msg(copy_engine_create(&engine, be, &cfg, &err) == ST_OK, "%s", err.text);
    for (int i = 0; i < half; i++) {
        spell(text, slot_bytes, (uint64_t)i);
        write_block(pool, (uint32_t)i, (const char *)text);
    }
    for (int round = 0; round < 2; round++) {
        uint64_t began = clock_now_ns();
        for (int i = 0; i < half; i++) {
            jobs[i] = (struct copy_job){ .kind = COPY_STORE,
                                         .place = { i + round * half, i + round * half,
                                                    across - half / 2 + i - round } };
            copy_engine_post(engine, &jobs[i]);
        }
        double store_s = (double)(collect(done, half) - began) * 1e-9;
        for (int i = 0; i < half; i++) {
            spell(text, slot_bytes, (uint64_t)i);
            ck_assert_int_eq(memcmp(host + (size_t)jobs[i].place.host * slot_bytes, text,
                                    slot_bytes), 0);
        }
        began = clock_now_ns();
        for (int i = 0; i < half; i++) {
            jobs[i].kind = COPY_LOAD;
            jobs[i].place.kv = jobs[i].place.index = i + (1 - round) * half;
            copy_engine_post(engine, &jobs[i]);
        }
        double load_s = (double)(collect(done, half) - began) * 1e-9;
        double gigabytes = half * (double)slot_bytes * 1e-9;
        printf("%d blocks of %zu KB: stored at %.1f GB/s, loaded at %.1f GB/s\n", half,
               slot_bytes >> 10, gigabytes / store_s, gigabytes / load_s);
    }
    copy_engine_destroy(engine);
    mailbox_destroy(done);
    kv_pool_destroy(pool);
    host_memory_destroy(tier);
    mem_free(text);
}
END_TEST

TCase *gpu_copies_case(void)
{
    TCase *tc = tcase_create("gpu_copies");

    be = gpu_backend();
    if (!be)
        return tc;
    tcase_add_test(tc, pieces_and_fills);
    tcase_add_test(tc, pieces_far_apart);
    tcase_add_test(tc, registered_memory_has_one_address);
    tcase_add_test(tc, blocks_cross_and_come_back);
    return tc;
}
