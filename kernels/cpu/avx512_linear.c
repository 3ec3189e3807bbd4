#include "kernels/cpu/linear.h"

#include <immintrin.h>

/* Dot products sixteen lanes wide.  See linear.h for the order of additions.
 *
 * One row is read as one stream: output after output, each with a single register of
 * sums.  The hardware prefetches one stream at the full rate of the memory (24 GB/s a
 * core on Zen 4) but four or eight at half of it, and out-of-order execution works on
 * two or three outputs at once, which hides the latency of the additions.
 *
 * More rows work on tiles, 6 rows by 4 outputs at most: 24 sums, 6 of x and a weight
 * in 31 of 32 registers, 24 multiply-adds for 10 loads and 4 widenings, so that the
 * multipliers are the limit: 110 of 115 GFLOP/s a core on Zen 4, where panels of
 * widened weights, copied first, came to 105.  The four weight streams of a tile
 * starve on memory unless it prefetches what lies AHEAD_BYTES on, in the order of
 * addresses. */
enum { LANES = 16, TILE_ROWS = 6, TILE_OUTS = 4, AHEAD_BYTES = 8192,
       TURNED_ROWS = 4, TURNED_VECS = 4, TURNED_WIDE = 16 };

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
INLINE __m512 dot_one(const float *x, const void *w, enum dtype type, size_t dim)
{
    const size_t whole = dim / LANES * LANES;
    __m512 acc = _mm512_setzero_ps();

#pragma GCC unroll 2
    for (size_t k = 0; k < whole; k += LANES)
        acc = _mm512_fmadd_ps(_mm512_loadu_ps(x + k), load_weight(w, type, k), acc);
    if (whole < dim) {
        __mmask16 mask = tail_mask(dim);
        acc = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x + whole),
                              load_weight_tail(w, type, whole, mask), acc);
    }
    return acc;
}

/* Where a tile prefetches: from `from` on, `stride` bytes further each step. */
struct ahead {
    const char *from;
    size_t stride;
};

/* The sums of n_rows rows and TILE_OUTS outputs. */
INLINE void dot_tile(__m512 acc[TILE_ROWS][TILE_OUTS], const float *x,
                     size_t x_stride, const void *w, enum dtype type, size_t dim, int n_rows,
                     struct ahead ahead)
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
            rows[i] = _mm512_loadu_ps(x + (size_t)i * x_stride + k);
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
        for (int i = 0; i < n_rows; i++) {
            __m512 row = _mm512_maskz_loadu_ps(mask, x + (size_t)i * x_stride + whole);
            acc[i][j] = _mm512_fmadd_ps(row, weight, acc[i][j]);
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
    __m512 acc[TILE_ROWS][TILE_OUTS];

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
        case 3: dot_four(b, type, r, o, 3, bias, ahead); break;
        case 4: dot_four(b, type, r, o, 4, bias, ahead); break;
        case 5: dot_four(b, type, r, o, 5, bias, ahead); break;
        default: dot_four(b, type, r, o, 6, bias, ahead); break;
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
            __m512 acc = dot_one(b->x + (size_t)r * b->x_stride, w, type, dim);
            store_outs(b->out + (size_t)r * b->out_stride + o, sum_lanes(acc, acc, acc, acc),
                       b->bias ? &bias : NULL, 1);
        }
    }
}

#define vec               __m512
#define vec_zero()        _mm512_setzero_ps()
#define vec_set(x)        _mm512_set1_ps(x)
#define vec_fma(a, b, c)  _mm512_fmadd_ps(a, b, c)
#define vec_store(p, x)   _mm512_storeu_ps(p, x)

INLINE __m512 load_part(const void *w, enum dtype type, size_t i, int n)
{
    return load_weight_tail(w, type, i, tail_mask((size_t)n));
}

INLINE void store_part(float *out, __m512 x, int n)
{
    _mm512_mask_storeu_ps(out, tail_mask((size_t)n), x);
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

void avx512_dot_block(const struct dot_block *b)
{
    (b->type == DTYPE_F32 ? dot_f32 : dot_bf16)(b);
}

void avx512_turned_block(const struct dot_block *b)
{
    (b->type == DTYPE_F32 ? turned_f32 : turned_bf16)(b);
}
