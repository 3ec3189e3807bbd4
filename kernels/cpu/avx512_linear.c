#include "kernels/cpu/linear.h"

#include <immintrin.h>

/* Dot products sixteen lanes wide.  See linear.h for the order of additions.
 *
 * Direct: a group of 8 outputs (4 from four rows on) is one pass over k with all its
 * sums in registers.  At one row that is 8 streams through memory, which the
 * hardware prefetcher follows only inside a page; each step therefore asks for the
 * line the next group will want.
 *
 * Packed: 6 rows by 4 outputs is 24 sums, 4 weights and one x in 29 of 32 registers:
 * 24 multiply-adds for 10 loads, so the multipliers and not the load ports are the
 * limit. */
enum { LANES = 16, TILE_ROWS = 6, TILE_OUTS = 4, AHEAD_BYTES = 8192 };

#define INLINE static inline __attribute__((always_inline))

INLINE __m512 widen(__m256i halves)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

INLINE __m512 load_weight(const void *w, enum dtype type, size_t i)
{
    if (type == DTYPE_F32)
        return _mm512_loadu_ps((const float *)w + i);
    return widen(_mm256_loadu_si256((const __m256i_u *)(const void *)((const bf16 *)w + i)));
}

/* The lanes of mask, zero elsewhere; memory outside the mask is not touched. */
INLINE __m512 load_weight_tail(const void *w, enum dtype type, size_t i, __mmask16 mask)
{
    if (type == DTYPE_F32)
        return _mm512_maskz_loadu_ps(mask, (const float *)w + i);
    return widen(_mm256_maskz_loadu_epi16(mask, (const bf16 *)w + i));
}

INLINE __mmask16 tail_mask(size_t n)
{
    return (__mmask16)((1u << (n % LANES)) - 1);
}

INLINE __m256 fold(__m512 v)
{
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

/* The tree: lane l + lane l + 8, then pairs two apart, one apart, four apart.  Four
 * vectors at once, sum i in lane i. */
INLINE __m128 sum_lanes(__m512 v0, __m512 v1, __m512 v2, __m512 v3)
{
    __m256 a = fold(v0), b = fold(v1), c = fold(v2), d = fold(v3);
    __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)),
                                _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2)));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

/* Four outputs, or the first n of four, from their sums. */
INLINE void store_outs(float *out, __m128 sums, const float *bias, int n)
{
    __mmask8 mask = (__mmask8)((1u << n) - 1);

    if (bias)
        sums = _mm_add_ps(sums, _mm_maskz_loadu_ps(mask, bias));
    _mm_mask_storeu_ps(out, mask, sums);
}

/* The sums of one row and one output. */
INLINE __m512 direct_sum(const float *x, const void *w, enum dtype type, size_t dim)
{
    const size_t whole = dim / LANES * LANES;
    __m512 acc = _mm512_setzero_ps();

#pragma GCC unroll 2
    for (size_t k = 0; k < whole; k += LANES)
        acc = _mm512_fmadd_ps(_mm512_loadu_ps(x + k), load_weight(w, type, k), acc);
    if (whole < dim) {
        __mmask16 mask = tail_mask(dim);
        const size_t i = 0;
        acc = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x + (size_t)i * dim + whole), load_weight_tail(w, type, whole, mask), acc);
    }
    return acc;
}

/* Where a tile prefetches: from `from` on, `stride` bytes further each step. */
struct ahead {
    const char *from;
    size_t stride;
};

/* The sums of n_rows rows and TILE_OUTS outputs. */
INLINE void direct_tile(__m512 acc[TILE_ROWS][TILE_OUTS], const float *x, const void *w,
                        enum dtype type, size_t dim, int n_rows, struct ahead ahead)
{
    const size_t whole = dim / LANES * LANES;

#pragma GCC unroll 8
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < TILE_OUTS; j++)
            acc[i][j] = _mm512_setzero_ps();
    for (size_t k = 0; k < whole; k += LANES) {
        __m512 rows[TILE_ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < n_rows; i++)
            rows[i] = _mm512_loadu_ps(x + (size_t)i * dim + k);
#pragma GCC unroll 8
        for (int j = 0; j < TILE_OUTS; j++) {
            __m512 weight = load_weight(w, type, (size_t)j * dim + k);
#pragma GCC unroll 8
            for (int i = 0; i < n_rows; i++)
                acc[i][j] = _mm512_fmadd_ps(rows[i], weight, acc[i][j]);
        }
        _mm_prefetch(ahead.from, _MM_HINT_T0);
        _mm_prefetch(ahead.from + ahead.stride / 2, _MM_HINT_T0);
        ahead.from += ahead.stride;
    }
    if (whole == dim)
        return;
    __mmask16 mask = tail_mask(dim);
#pragma GCC unroll 8
    for (int j = 0; j < TILE_OUTS; j++) {
        __m512 weight = load_weight_tail(w, type, (size_t)j * dim + whole, mask);
#pragma GCC unroll 8
        for (int i = 0; i < n_rows; i++)
            acc[i][j] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x + (size_t)i * dim + whole), weight,
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
    __m512 acc[TILE_ROWS][TILE_OUTS];

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
        case 3: direct_four(b, type, r, o, 3, bias, ahead); break;
        case 4: direct_four(b, type, r, o, 4, bias, ahead); break;
        case 5: direct_four(b, type, r, o, 5, bias, ahead); break;
        default: direct_four(b, type, r, o, 6, bias, ahead); break;
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
            __m512 acc = direct_sum(b->x + (size_t)r * dim, w, type, dim);
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

static void avx512_direct(const struct dot_block *b)
{
    (b->type == DTYPE_F32 ? direct_f32 : direct_bf16)(b);
}

/* k .. k + LANES of the row at w, zero from `end` on. */
INLINE __m512 load_padded(const void *w, enum dtype type, size_t k, size_t end)
{
    if (k + LANES <= end)
        return load_weight(w, type, k);
    return load_weight_tail(w, type, k, tail_mask(end - k));
}

/* Groups of TILE_OUTS outputs, each group one stream; missing outputs are zero. */
static void avx512_pack_weight(float *packed, const void *weight, enum dtype type, int outs,
                               int in_dim, int k0, int n_k)
{
    size_t n_steps = ((size_t)n_k + LANES - 1) / LANES, end = (size_t)k0 + (size_t)n_k;

    for (int o = 0; o < outs; o += TILE_OUTS) {
        for (int j = 0; j < TILE_OUTS; j++) {
            const void *w = weight_offset(weight, type, (size_t)(o + j) * (size_t)in_dim);
            float *to = packed + (size_t)j * LANES;
            for (size_t step = 0; step < n_steps; step++, to += TILE_OUTS * LANES)
                _mm512_storeu_ps(to, o + j < outs ? load_padded(w, type, (size_t)k0 + step * LANES, end)
                                                 : _mm512_setzero_ps());
        }
        packed += n_steps * TILE_OUTS * LANES;
    }
}

static void avx512_pack_rows(float *packed, const float *x, int rows, int in_dim, int k0,
                             int n_k)
{
    size_t n_steps = ((size_t)n_k + LANES - 1) / LANES, end = (size_t)k0 + (size_t)n_k;

    for (int i = 0; i < rows; i++) {
        const float *row = x + (size_t)i * (size_t)in_dim;
        float *to = packed + (size_t)i * LANES;
        for (size_t step = 0; step < n_steps; step++, to += rows * LANES)
            _mm512_storeu_ps(to, load_padded(row, DTYPE_F32, (size_t)k0 + step * LANES, end));
    }
}

INLINE void packed_tile(const struct dot_tile *t, int n_rows)
{
    const float *x = t->x, *w = t->weight;
    __m512 acc[TILE_ROWS][TILE_OUTS];

#pragma GCC unroll 8
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < TILE_OUTS; j++)
            acc[i][j] = t->first ? _mm512_setzero_ps()
                                 : _mm512_loadu_ps(t->acc + (i * TILE_OUTS + j) * LANES);
    for (int step = 0; step < t->n_steps; step++) {
        __m512 weight[TILE_OUTS];
#pragma GCC unroll 8
        for (int j = 0; j < TILE_OUTS; j++)
            weight[j] = _mm512_loadu_ps(w + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < n_rows; i++) {
            __m512 row = _mm512_loadu_ps(x + i * LANES);
#pragma GCC unroll 8
            for (int j = 0; j < TILE_OUTS; j++)
                acc[i][j] = _mm512_fmadd_ps(row, weight[j], acc[i][j]);
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
            _mm512_storeu_ps(t->acc + (i * TILE_OUTS + j) * LANES, acc[i][j]);
    }
}

static void avx512_tile(const struct dot_tile *t)
{
    switch (t->rows) {
    case 1: packed_tile(t, 1); break;
    case 2: packed_tile(t, 2); break;
    case 3: packed_tile(t, 3); break;
    case 4: packed_tile(t, 4); break;
    case 5: packed_tile(t, 5); break;
    default: packed_tile(t, 6); break;
    }
}

const struct linear_leaf avx512_linear_leaf = {
    .lanes = LANES,
    .tile_rows = TILE_ROWS,
    .tile_outs = TILE_OUTS,
    .direct_rows = 15,
    .direct = avx512_direct,
    .pack_weight = avx512_pack_weight,
    .pack_rows = avx512_pack_rows,
    .tile = avx512_tile,
};
