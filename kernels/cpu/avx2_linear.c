#include "kernels/cpu/linear.h"

#include <immintrin.h>
#include <string.h>

/* Dot products eight lanes wide, as in avx512_linear.c with half the registers of half
 * the width: 3 rows by 4 outputs is 12 sums, 3 of x and one weight in 16 registers,
 * 12 multiply-adds for 7 loads and 4 widenings: 88 GFLOP/s a core on Zen 4. */
enum { LANES = 8, TILE_ROWS = 3, TILE_OUTS = 4, AHEAD_BYTES = 8192,
       TURNED_ROWS = 4, TURNED_VECS = 2, TURNED_WIDE = 8 };

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
INLINE __m256 dot_one(const float *x, const void *w, enum dtype type, size_t dim)
{
    const size_t whole = dim / LANES * LANES;
    __m256 acc = _mm256_setzero_ps();

#pragma GCC unroll 2
    for (size_t k = 0; k < whole; k += LANES)
        acc = _mm256_fmadd_ps(_mm256_loadu_ps(x + k), load_weight(w, type, k), acc);
    if (whole < dim)
        acc = _mm256_fmadd_ps(load_weight_tail(x, DTYPE_F32, whole, dim - whole),
                              load_weight_tail(w, type, whole, dim - whole), acc);
    return acc;
}

/* Where a tile prefetches: from `from` on, `stride` bytes further each step. */
struct ahead {
    const char *from;
    size_t stride;
};

/* The sums of n_rows rows and TILE_OUTS outputs. */
INLINE void dot_tile(__m256 acc[TILE_ROWS][TILE_OUTS], const float *x,
                     size_t x_stride, const void *w, enum dtype type, size_t dim, int n_rows,
                     struct ahead ahead)
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
            rows[i] = _mm256_loadu_ps(x + (size_t)i * x_stride + k);
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
        for (int i = 0; i < n_rows; i++) {
            __m256 row = load_weight_tail(x, DTYPE_F32, (size_t)i * x_stride + whole, dim - whole);
            acc[i][j] = _mm256_fmadd_ps(row, weight, acc[i][j]);
        }
    }
}

/* n_rows rows from r on and TILE_OUTS outputs from o on. */
INLINE void dot_four(const struct dot_block *b, enum dtype type, int r, int o, int n_rows,
                     const float *bias, struct ahead ahead)
{
    const size_t dim = (size_t)b->in_dim;
    const float *x = b->x + (size_t)r * b->x_stride;
    const void *w = weight_offset(b->weight, type, (size_t)o * dim);
    __m256 acc[TILE_ROWS][TILE_OUTS];

    if (n_rows == 1) {
#pragma GCC unroll 4
        for (int j = 0; j < TILE_OUTS; j++)
            acc[0][j] = dot_one(x, weight_offset(w, type, (size_t)j * dim), type, dim);
    } else {
        dot_tile(acc, x, b->x_stride, w, type, dim, n_rows, ahead);
    }
#pragma GCC unroll 8
    for (int i = 0; i < n_rows; i++)
        store_outs(b->out + (size_t)(r + i) * b->out_stride + o,
                   sum_lanes(acc[i][0], acc[i][1], acc[i][2], acc[i][3]), bias, TILE_OUTS);
}

/* All rows of TILE_OUTS outputs, in tiles of nearly equal height: 7 rows are 4 + 3.
 * Together the tiles prefetch as much as they read. */
INLINE void dot_outs(const struct dot_block *b, enum dtype type, int o)
{
    const int n_tiles = (b->rows + TILE_ROWS - 1) / TILE_ROWS;
    const size_t dim = (size_t)b->in_dim, bytes = TILE_OUTS * dtype_bytes(type);
    const char *first = (const char *)weight_offset(b->weight, type, (size_t)o * dim) + AHEAD_BYTES;
    struct ahead ahead = { .stride = bytes * LANES / (size_t)n_tiles };
    float room[TILE_OUTS] = { 0 }, *bias = b->bias ? room : NULL;

    for (int j = 0; b->bias && j < TILE_OUTS; j++)
        room[j] = weight_at(b->bias, type, (size_t)(o + j));
    for (int tile = 0; tile < n_tiles; tile++) {
        int r = b->rows * tile / n_tiles, end = b->rows * (tile + 1) / n_tiles;
        ahead.from = first + (size_t)tile * bytes * dim / (size_t)n_tiles;
        switch (end - r) {
        case 1: dot_four(b, type, r, o, 1, bias, ahead); break;
        case 2: dot_four(b, type, r, o, 2, bias, ahead); break;
        default: dot_four(b, type, r, o, 3, bias, ahead); break;
        }
    }
}

INLINE void dot_block(const struct dot_block *b, enum dtype type)
{
    const size_t dim = (size_t)b->in_dim;
    int o = 0;

    for (; o + TILE_OUTS <= b->outs; o += TILE_OUTS)
        dot_outs(b, type, o);
    for (; o < b->outs; o++) {
        const void *w = weight_offset(b->weight, type, (size_t)o * dim);
        float bias = b->bias ? weight_at(b->bias, type, (size_t)o) : 0;
        for (int r = 0; r < b->rows; r++) {
            __m256 acc = dot_one(b->x + (size_t)r * b->x_stride, w, type, dim);
            store_outs(b->out + (size_t)r * b->out_stride + o, sum_lanes(acc, acc, acc, acc),
                       b->bias ? &bias : NULL, 1);
        }
    }
}

#define vec               __m256
#define vec_zero()        _mm256_setzero_ps()
#define vec_set(x)        _mm256_set1_ps(x)
#define vec_fma(a, b, c)  _mm256_fmadd_ps(a, b, c)
#define vec_store(p, x)   _mm256_storeu_ps(p, x)

INLINE __m256 load_part(const void *w, enum dtype type, size_t i, int n)
{
    return load_weight_tail(w, type, i, (size_t)n);
}

INLINE void store_part(float *out, __m256 x, int n)
{
    float part[LANES];

    _mm256_storeu_ps(part, x);
    memcpy(out, part, (size_t)n * sizeof *out);
}

#include "kernels/cpu/linear_turned.h"

static void dot_bf16(const struct dot_block *b)
{
    dot_block(b, DTYPE_BF16);
}

static void dot_f32(const struct dot_block *b)
{
    dot_block(b, DTYPE_F32);
}

void avx2_dot_block(const struct dot_block *b)
{
    (b->type == DTYPE_F32 ? dot_f32 : dot_bf16)(b);
}

void avx2_turned_block(const struct dot_block *b)
{
    (b->type == DTYPE_F32 ? turned_f32 : turned_bf16)(b);
}
