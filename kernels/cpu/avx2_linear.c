#include "kernels/cpu/linear.h"

#include <immintrin.h>
#include <string.h>

/* Dot products eight lanes wide; the plan is that of avx512_linear.c with half the
 * registers of half the width: 3 rows by 4 outputs is 12 sums, 3 of x and one weight
 * in 16 registers, 12 multiply-adds for 7 loads. */
enum { LANES = 8, TILE_ROWS = 3, TILE_OUTS = 4, AHEAD_BYTES = 8192 };

#define INLINE static inline __attribute__((always_inline))

INLINE __m256 widen(__m128i halves)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

INLINE __m256 load_weight(const void *w, enum dtype type, size_t i)
{
    if (type == DTYPE_F32)
        return _mm256_loadu_ps((const float *)w + i);
    return widen(_mm_loadu_si128((const __m128i_u *)(const void *)((const bf16 *)w + i)));
}

/* n < LANES elements, zero beyond; memory beyond is not touched. */
INLINE __m256 load_weight_tail(const void *w, enum dtype type, size_t i, size_t n)
{
    if (type == DTYPE_F32) {
        float part[LANES] = { 0 };
        memcpy(part, (const float *)w + i, n * sizeof part[0]);
        return _mm256_loadu_ps(part);
    }
    bf16 part[LANES] = { 0 };
    memcpy(part, (const bf16 *)w + i, n * sizeof part[0]);
    return widen(_mm_loadu_si128((const __m128i_u *)(const void *)part));
}

/* The tree: pairs two apart, one apart, four apart.  Four vectors at once, sum i in
 * lane i. */
INLINE __m128 sum_lanes(__m256 a, __m256 b, __m256 c, __m256 d)
{
    __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)),
                                _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2)));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

/* Four outputs, or the first n of four, from their sums. */
INLINE void store_outs(float *out, __m128 sums, const float *bias, int n)
{
    float part[4];

    if (n == 4) {
        _mm_storeu_ps(out, bias ? _mm_add_ps(sums, _mm_loadu_ps(bias)) : sums);
        return;
    }
    _mm_storeu_ps(part, sums);
    for (int i = 0; i < n; i++)
        out[i] = bias ? part[i] + bias[i] : part[i];
}

/* The sums of one row and one output. */
INLINE __m256 direct_sum(const float *x, const void *w, enum dtype type, size_t dim)
{
    const size_t whole = dim / LANES * LANES;
    __m256 acc = _mm256_setzero_ps();

#pragma GCC unroll 2
    for (size_t k = 0; k < whole; k += LANES)
        acc = _mm256_fmadd_ps(_mm256_loadu_ps(x + k), load_weight(w, type, k), acc);
    if (whole < dim) {
            const size_t i = 0;
        acc = _mm256_fmadd_ps(load_weight_tail(x, DTYPE_F32, (size_t)i * dim + whole, dim - whole), load_weight_tail(w, type, whole, dim - whole), acc);
    }
    return acc;
}

/* Where a tile prefetches: from `from` on, `stride` bytes further each step. */
struct ahead {
    const char *from;
    size_t stride;
};

/* The sums of n_rows rows and TILE_OUTS outputs. */
INLINE void direct_tile(__m256 acc[TILE_ROWS][TILE_OUTS], const float *x, const void *w,
                        enum dtype type, size_t dim, int n_rows, struct ahead ahead)
{
    const size_t whole = dim / LANES * LANES;

#pragma GCC unroll 8
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < TILE_OUTS; j++)
            acc[i][j] = _mm256_setzero_ps();
    for (size_t k = 0; k < whole; k += LANES) {
        __m256 rows[TILE_ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < n_rows; i++)
            rows[i] = _mm256_loadu_ps(x + (size_t)i * dim + k);
#pragma GCC unroll 8
        for (int j = 0; j < TILE_OUTS; j++) {
            __m256 weight = load_weight(w, type, (size_t)j * dim + k);
#pragma GCC unroll 8
            for (int i = 0; i < n_rows; i++)
                acc[i][j] = _mm256_fmadd_ps(rows[i], weight, acc[i][j]);
        }
        _mm_prefetch(ahead.from, _MM_HINT_T0);
        ahead.from += ahead.stride;
    }
    if (whole == dim)
        return;
#pragma GCC unroll 8
    for (int j = 0; j < TILE_OUTS; j++) {
        __m256 weight = load_weight_tail(w, type, (size_t)j * dim + whole, dim - whole);
#pragma GCC unroll 8
        for (int i = 0; i < n_rows; i++)
            acc[i][j] = _mm256_fmadd_ps(load_weight_tail(x, DTYPE_F32, (size_t)i * dim + whole, dim - whole), weight,
                                         acc[i][j]);
    }
}

/* n_rows rows from r on and TILE_OUTS outputs from o on. */
INLINE void direct_four(const struct dot_block *b, enum dtype type, int r, int o, int n_rows,
                        const float *bias, struct ahead ahead)
{
    const size_t dim = (size_t)b->in_dim;
    const float *x = b->x + (size_t)r * dim;
    const void *w = weight_offset(b->weight, type, (size_t)o * dim);
    __m256 acc[TILE_ROWS][TILE_OUTS];

    if (n_rows == 1) {
#pragma GCC unroll 4
        for (int j = 0; j < TILE_OUTS; j++)
            acc[0][j] = direct_sum(x, weight_offset(w, type, (size_t)j * dim), type, dim);
    } else {
        direct_tile(acc, x, w, type, dim, n_rows, ahead);
    }
#pragma GCC unroll 8
    for (int i = 0; i < n_rows; i++)
        store_outs(b->out + (size_t)(r + i) * b->out_stride + o,
                   sum_lanes(acc[i][0], acc[i][1], acc[i][2], acc[i][3]), bias, TILE_OUTS);
}

/* All rows of TILE_OUTS outputs, in tiles of nearly equal height: 7 rows are 4 + 3.
 * Together the tiles prefetch as much as they read. */
INLINE void direct_outs(const struct dot_block *b, enum dtype type, int o)
{
    const int n_tiles = (b->rows + TILE_ROWS - 1) / TILE_ROWS;
    const size_t dim = (size_t)b->in_dim, bytes = TILE_OUTS * dtype_bytes(type);
    struct ahead ahead = { .stride = bytes * LANES / (size_t)n_tiles };
    float room[TILE_OUTS] = { 0 }, *bias = b->bias ? room : NULL;

    for (int j = 0; b->bias && j < TILE_OUTS; j++)
        room[j] = weight_at(b->bias, type, (size_t)(o + j));
    for (int tile = 0; tile < n_tiles; tile++) {
        int r = b->rows * tile / n_tiles, end = b->rows * (tile + 1) / n_tiles;
        ahead.from = (const char *)b->weight + (size_t)o * dim * dtype_bytes(type) + AHEAD_BYTES +
                     (size_t)tile * bytes * dim / (size_t)n_tiles;
        switch (end - r) {
        case 1: direct_four(b, type, r, o, 1, bias, ahead); break;
        case 2: direct_four(b, type, r, o, 2, bias, ahead); break;
        default: direct_four(b, type, r, o, 3, bias, ahead); break;
        }
    }
}

INLINE void direct(const struct dot_block *b, enum dtype type)
{
    const size_t dim = (size_t)b->in_dim;
    int o = 0;

    for (; o + TILE_OUTS <= b->outs; o += TILE_OUTS)
        direct_outs(b, type, o);
    for (; o < b->outs; o++) {
        const void *w = weight_offset(b->weight, type, (size_t)o * dim);
        float bias = b->bias ? weight_at(b->bias, type, (size_t)o) : 0;
        for (int r = 0; r < b->rows; r++) {
            __m256 acc = direct_sum(b->x + (size_t)r * dim, w, type, dim);
            store_outs(b->out + (size_t)r * b->out_stride + o, sum_lanes(acc, acc, acc, acc),
                       b->bias ? &bias : NULL, 1);
        }
    }
}

static void direct_bf16(const struct dot_block *b)
{
    direct(b, DTYPE_BF16);
}

static void direct_f32(const struct dot_block *b)
{
    direct(b, DTYPE_F32);
}

static void avx2_direct(const struct dot_block *b)
{
    (b->type == DTYPE_F32 ? direct_f32 : direct_bf16)(b);
}

/* k .. k + LANES of the row at w, zero from `end` on. */
INLINE __m256 load_padded(const void *w, enum dtype type, size_t k, size_t end)
{
    if (k + LANES <= end)
        return load_weight(w, type, k);
    return load_weight_tail(w, type, k, end - k);
}

/* Groups of TILE_OUTS outputs, each group one stream; missing outputs are zero. */
static void avx2_pack_weight(float *packed, const void *weight, enum dtype type, int outs,
                             int in_dim, int k0, int n_k)
{
    size_t n_steps = ((size_t)n_k + LANES - 1) / LANES, end = (size_t)k0 + (size_t)n_k;

    for (int o = 0; o < outs; o += TILE_OUTS) {
        for (int j = 0; j < TILE_OUTS; j++) {
            const void *w = weight_offset(weight, type, (size_t)(o + j) * (size_t)in_dim);
            float *to = packed + (size_t)j * LANES;
            for (size_t step = 0; step < n_steps; step++, to += TILE_OUTS * LANES) {
                __m256 v = _mm256_setzero_ps();
                if (o + j < outs)
                    v = load_padded(w, type, (size_t)k0 + step * LANES, end);
                _mm256_storeu_ps(to, v);
            }
        }
        packed += n_steps * TILE_OUTS * LANES;
    }
}

static void avx2_pack_rows(float *packed, const float *x, int rows, int in_dim, int k0,
                           int n_k)
{
    size_t n_steps = ((size_t)n_k + LANES - 1) / LANES, end = (size_t)k0 + (size_t)n_k;

    for (int i = 0; i < rows; i++) {
        const float *row = x + (size_t)i * (size_t)in_dim;
        float *to = packed + (size_t)i * LANES;
        for (size_t step = 0; step < n_steps; step++, to += rows * LANES)
            _mm256_storeu_ps(to, load_padded(row, DTYPE_F32, (size_t)k0 + step * LANES, end));
    }
}

INLINE void packed_tile(const struct dot_tile *t, int n_rows)
{
    const float *x = t->x, *w = t->weight;
    __m256 acc[TILE_ROWS][TILE_OUTS], rows[TILE_ROWS];

#pragma GCC unroll 8
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < TILE_OUTS; j++)
            acc[i][j] = t->first ? _mm256_setzero_ps()
                                 : _mm256_loadu_ps(t->acc + (i * TILE_OUTS + j) * LANES);
    for (int step = 0; step < t->n_steps; step++) {
#pragma GCC unroll 8
        for (int i = 0; i < n_rows; i++)
            rows[i] = _mm256_loadu_ps(x + i * LANES);
#pragma GCC unroll 8
        for (int j = 0; j < TILE_OUTS; j++) {
            __m256 weight = _mm256_loadu_ps(w + j * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < n_rows; i++)
                acc[i][j] = _mm256_fmadd_ps(rows[i], weight, acc[i][j]);
        }
        x += n_rows * LANES;
        w += TILE_OUTS * LANES;
    }
#pragma GCC unroll 8
    for (int i = 0; i < n_rows; i++) {
        if (t->last) {
            store_outs(t->out + (size_t)i * t->out_stride,
                       sum_lanes(acc[i][0], acc[i][1], acc[i][2], acc[i][3]), t->bias, t->outs);
            continue;
        }
#pragma GCC unroll 8
        for (int j = 0; j < TILE_OUTS; j++)
            _mm256_storeu_ps(t->acc + (i * TILE_OUTS + j) * LANES, acc[i][j]);
    }
}

static void avx2_tile(const struct dot_tile *t)
{
    switch (t->rows) {
    case 1: packed_tile(t, 1); break;
    case 2: packed_tile(t, 2); break;
    default: packed_tile(t, 3); break;
    }
}

const struct linear_leaf avx2_linear_leaf = {
    .lanes = LANES,
    .tile_rows = TILE_ROWS,
    .tile_outs = TILE_OUTS,
    .direct_rows = 15,
    .direct = avx2_direct,
    .pack_weight = avx2_pack_weight,
    .pack_rows = avx2_pack_rows,
    .tile = avx2_tile,
};
