/* What the lanes of a warp do together, and barriers of threads. */

#include "tests/emulator/ptx_ops.h"

#include <string.h>

/* ---- what lanes do together */

enum shuffle { SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, SHUFFLE_TO };

/* read: value, lane or distance, bounds of the segments, members. */
static void shuffle(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    uint32_t v[LANES];

    for (int l = 0; l < LANES; l++)
        v[l] = w->slots[in->read[0]][l].u32;
    for (int l = 0; l < LANES; l++) {
        int b = w->slots[in->read[1]][l].s32 & 31, c = w->slots[in->read[2]][l].s32;
        int clamp = c & 31, segment = c >> 8 & 31;
        int most = (l & segment) | (clamp & ~segment), least = l & segment, from = l;
        if (!(lanes >> l & 1))
            continue;
        switch ((enum shuffle)in->way) {
        case SHUFFLE_UP: from = l - b; break;
        case SHUFFLE_DOWN: from = l + b; break;
        case SHUFFLE_XOR: from = l ^ b; break;
        case SHUFFLE_TO: from = least | (b & ~segment); break;
        }
        bool in_range = (enum shuffle)in->way == SHUFFLE_UP ? from >= most : from <= most;
        if (!in_range)
            from = l;
        if (!(lanes >> from & 1))
            ptx_fail(w, in, "lane %d reads lane %d, which does not take part", l, from);
        w->slots[in->written[0]][l].u32 = v[from];
        if (in->n_written > 1 && in->written[1] >= 0)
            w->slots[in->written[1]][l].u32 = in_range;
    }
}

bool ptx_predicate(const struct warp *w, const struct instruction *in, int i, int lane)
{
    return (w->slots[in->read[i]][lane].u32 != 0) != (in->read_not >> i & 1);
}

enum vote { VOTE_BALLOT, VOTE_ANY, VOTE_ALL };

static void vote(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    uint32_t for_it = 0;

    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1 && ptx_predicate(w, in, 0, l))
            for_it |= 1u << l;
    uint32_t v = (enum vote)in->way == VOTE_BALLOT ? for_it
                 : (enum vote)in->way == VOTE_ANY  ? for_it != 0 : for_it == lanes;
    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1)
            w->slots[in->written[0]][l].u32 = v;
}

static void meet(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    (void)w, (void)in, (void)lanes;
}

static void active_lanes(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1)
            w->slots[in->written[0]][l].u32 = lanes;
}

static void reduce(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    bool first = true;
    uint64_t v = 0;

    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1) {
            uint64_t own = ptx_extended(w->slots[in->read[0]][l].u64, in->type);
            v = first ? own : ptx_combined((enum atomic)in->way, in->type, v, own, 0);
            first = false;
        }
    for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1)
            w->slots[in->written[0]][l].u64 = v;
}

/* Lane 8 i + j says where row j of matrix i is. */
static void load_matrices(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    uint16_t m[4][8][8];
    bool turned = in->way;

    (void)lanes;
    for (int i = 0; i < in->vector; i++)
        for (int j = 0; j < 8; j++)
            memcpy(m[i][j], ptx_place_of(w, in, 8 * i + j, 16, PTX_READ), 16);
    for (int i = 0; i < in->vector; i++)
        for (int l = 0; l < LANES; l++) {
            int row = l / 4, column = l % 4 * 2;
            uint32_t low = turned ? m[i][column][row] : m[i][row][column];
            uint32_t high = turned ? m[i][column + 1][row] : m[i][row][column + 1];
            w->slots[in->written[i]][l].u32 = low | high << 16;
        }
}

/* m16n8k16; see kernels/cuda/mma.cuh for who holds what. */
static void multiply_bf16(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    float a[16][16], b[16][8];

    (void)lanes;
    for (int l = 0; l < LANES; l++) {
        int g = l / 4, c = l % 4 * 2;
        for (int i = 0; i < 4; i++) {
            uint32_t v = w->slots[in->read[i]][l].u32;
            int row = g + i % 2 * 8, column = c + i / 2 * 8;
            a[row][column] = ptx_from_bf16((uint16_t)v);
            a[row][column + 1] = ptx_from_bf16((uint16_t)(v >> 16));
        }
        for (int i = 0; i < 2; i++) {
            uint32_t v = w->slots[in->read[4 + i]][l].u32;
            b[c + i * 8][g] = ptx_from_bf16((uint16_t)v);
            b[c + i * 8 + 1][g] = ptx_from_bf16((uint16_t)(v >> 16));
        }
    }
    float sum[16][8] = { { 0 } };
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++)
                sum[i][j] += a[i][k] * b[k][j];
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < 4; i++)
            w->slots[in->written[i]][l].f32 = w->slots[in->read[6 + i]][l].f32 +
                                              sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

static int8_t byte_of(uint32_t v, int i)
{
    return (int8_t)(v >> 8 * i);
}

static void add_product(struct warp *w, const struct instruction *in, int (*sum)[8], int first)
{
    int32_t out[LANES][4];

    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < 4; i++)
            out[l][i] = (int32_t)(w->slots[in->read[first + i]][l].u32 +
                                  (uint32_t)sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < 4; i++)
            w->slots[in->written[i]][l].s32 = out[l][i];
}

/* m16n8k32 of bytes: words have four columns of the left operand, four rows of the right. */
static void multiply_bytes(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    int a[16][32], b[32][8], sum[16][8] = { { 0 } };

    (void)lanes;
    for (int l = 0; l < LANES; l++)
        for (int k = 0; k < 4; k++) {
            int g = l / 4, c = l % 4 * 4 + k;
            for (int i = 0; i < 4; i++)
                a[g + i % 2 * 8][c + i / 2 * 16] = byte_of(w->slots[in->read[i]][l].u32, k);
            for (int i = 0; i < 2; i++)
                b[c + i * 16][g] = byte_of(w->slots[in->read[4 + i]][l].u32, k);
        }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 32; k++)
            for (int j = 0; j < 8; j++)
                sum[i][j] += a[i][k] * b[k][j];
    add_product(w, in, sum, 6);
}

/* m16n8k64 of bytes, of whose left operand every four columns have two values; the metadata has two
 * bits for each, at which of the four it is.  Lane 4 g + c has those of row g, or g + 8 where c is
 * odd, in columns 0 to 31, or 32 to 63 where c is 2 or 3. */
static void multiply_sparse(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    int a[16][64] = { { 0 } }, b[64][8], sum[16][8] = { { 0 } }, kept[16][32];

    (void)lanes;
    if (w->slots[in->read[13]][0].u32 != 0)
        ptx_fail(w, in, "a sparsity selector other than 0");
    for (int l = 0; l < LANES; l++)
        for (int k = 0; k < 4; k++) {
            int g = l / 4, c = l % 4 * 4 + k;
            for (int i = 0; i < 4; i++) {
                kept[g + i % 2 * 8][c + i / 2 * 16] = byte_of(w->slots[in->read[i]][l].u32, k);
                b[c + i * 16][g] = byte_of(w->slots[in->read[4 + i]][l].u32, k);
            }
        }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 32; k++) {
            int lane = row % 8 * 4 + row / 8 + k / 16 * 2;
            uint32_t nibble = w->slots[in->read[12]][lane].u32 >> k % 16 / 2 * 4 & 15;
            int first = nibble & 3, second = nibble >> 2;
            if (first >= second)
                ptx_fail(w, in, "metadata %x of row %d is not in order", nibble, row);
            a[row][k / 2 * 4 + (k % 2 ? second : first)] = kept[row][k];
        }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 64; k++)
            if (a[i][k])
                for (int j = 0; j < 8; j++)
                    sum[i][j] += a[i][k] * b[k][j];
    add_product(w, in, sum, 8);
}

/* ---- names */

static void by_all(struct instruction *in, ptx_operation *run, int members)
{
    in->kind = PTX_TOGETHER;
    in->run = run;
    in->members = members;
}

static bool find_by_all(struct instruction *in, const struct parts *p, const char *name)
{
    static const char *const ways[] = { "up", "down", "bfly", "idx" };
    static const char *const votes[] = { "ballot", "any", "all" };
    static const char *const sums[] = { "add", "min", "max", "or", "and" };
    int way;

    if (strncmp(name, "shfl.sync.", 10) == 0) {
        way = ptx_index_of(ways, 4, p->at[2]);
        by_all(in, shuffle, 3);
        in->way = (uint8_t)way;
        return way >= 0 && in->n_read == 4 && in->n_written >= 1;
    }
    if (strncmp(name, "vote.sync.", 10) == 0) {
        way = ptx_index_of(votes, 3, p->at[2]);
        by_all(in, vote, 1);
        in->way = (uint8_t)way;
        return way >= 0 && in->n_read == 2 && in->n_written == 1;
    }
    if (strncmp(name, "redux.sync.", 11) == 0) {
        way = ptx_index_of(sums, 5, p->at[2]);
        by_all(in, reduce, 1);
        in->way = (uint8_t)way;
        in->type = ptx_type_named(p->at[3]);
        return way >= 0 && in->n_read == 2 && in->n_written == 1;
    }
    if (strcmp(name, "bar.warp.sync") == 0) {
        /* Without a result, its operand is read first. */
        by_all(in, meet, 0);
        return in->n_read == 1;
    }
    if (strncmp(name, "ldmatrix.sync.aligned.m8n8.x", 28) == 0) {
        by_all(in, load_matrices, -1);
        in->vector = (uint8_t)(name[28] - '0');
        in->bytes = 16;
        in->space = PTX_SHARED;
        in->way = ptx_has_part(p, "trans");
        return in->n_written == in->vector && in->n_read == 1;
    }
    if (strcmp(name, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == 0) {
        by_all(in, multiply_bf16, -1);
        return in->n_written == 4 && in->n_read == 10;
    }
    if (strcmp(name, "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32") == 0) {
        by_all(in, multiply_bytes, -1);
        return in->n_written == 4 && in->n_read == 10;
    }
    if (strncmp(name, "mma.sp", 6) == 0 &&
        strstr(name, ".sync.aligned.m16n8k64.row.col.s32.s8.s8.s32")) {
        by_all(in, multiply_sparse, -1);
        return in->n_written == 4 && in->n_read == 14;
    }
    return false;
}

/* read: number of the barrier, then the number of threads or a predicate. */
static bool find_barrier(struct instruction *in, const char *name)
{
    in->kind = PTX_BARRIER;
    if (strcmp(name, "bar.sync") == 0 || strcmp(name, "barrier.sync") == 0 ||
        strcmp(name, "barrier.sync.aligned") == 0)
        return in->n_written == 0 && (in->n_read == 1 || in->n_read == 2);
    in->type = strcmp(name, "bar.red.popc.u32") == 0   ? PTX_U32
               : strcmp(name, "bar.red.or.pred") == 0  ? PTX_PRED : PTX_NONE;
    return in->type != PTX_NONE && in->n_written == 1 && in->n_read == 2;
}

bool ptx_find_together(struct instruction *in, const struct parts *p, const char *name)
{
    static const struct ptx_named active[] = { { "activemask.b32", active_lanes, 1, 0 } };

    if (strncmp(name, "barrier.cluster.", 16) == 0) {
        in->kind = ptx_has_part(p, "wait") ? PTX_CLUSTER_WAIT : PTX_CLUSTER_ARRIVE;
        return true;
    }
    if (strcmp(name, "bar.warp.sync") == 0 || strcmp(name, "bar.sync") == 0 ||
        strncmp(name, "barrier.sync", 12) == 0)
        ptx_read_first(in);
    if (strncmp(name, "bar", 3) == 0 && strcmp(name, "bar.warp.sync") != 0)
        return find_barrier(in, name);
    return find_by_all(in, p, name) || ptx_find_named(in, name, active, 1);
}
