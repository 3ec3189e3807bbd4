#ifndef KERNELS_CPU_LINEAR_TURNED_H
#define KERNELS_CPU_LINEAR_TURNED_H

/* Products with a turned matrix over vectors of LANES floats, included by the file of each
 * instruction set after it has defined, besides what its dot products need:
 *
 *   vec, vec_zero, vec_set, vec_fma, vec_store
 *   store_part, load_part  the first n < LANES elements; memory beyond is not touched
 *   TURNED_ROWS, TURNED_VECS  sums of a tile: rows by vectors of outputs
 *   TURNED_WIDE            vectors of a tile of one row, which only wants its weights
 *
 * A row of the matrix is what one element of x adds to all outputs, so sums lie in lanes
 * and the elements of x come one after the other, whatever the tile.  A tile reads a piece of
 * each row, which the hardware does not take for a stream: it prefetches AHEAD_ROWS on, 16 KB of
 * rows of 512.  One row of x reads 12 GB/s with it and 7 without (Zen 4, both cores busy). */
enum { AHEAD_ROWS = 16 };

/* Outputs o..o + n_vecs * LANES - 1 of rows r..r + n_rows - 1; with part > 0 only `part` of
 * the one vector. */
INLINE void turned_tile(const struct dot_block *b, enum dtype type, int r, int o,
                        const int n_rows, const int n_vecs, int part)
{
    const float *x = b->x + (size_t)r * b->x_stride;
    float *out = b->out + (size_t)r * b->out_stride + o;
    vec sum[TURNED_ROWS][TURNED_WIDE];

#pragma GCC unroll 8
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 16
        for (int v = 0; v < n_vecs; v++)
            sum[i][v] = vec_zero();
    for (size_t k = 0; k < (size_t)b->in_dim; k++) {
        const size_t row = k * b->weight_stride + (size_t)o;
        const char *ahead = weight_offset(b->weight, type, row + AHEAD_ROWS * b->weight_stride);
#pragma GCC unroll 16
        for (size_t at = 0; at < (size_t)(n_vecs * LANES) * dtype_bytes(type); at += 64)
            __builtin_prefetch(ahead + at);
#pragma GCC unroll 16
        for (int v = 0; v < n_vecs; v++) {
            const size_t at = row + (size_t)(v * LANES);
            vec weight = part ? load_part(b->weight, type, at, part)
                              : load_weight(b->weight, type, at);
#pragma GCC unroll 8
            for (int i = 0; i < n_rows; i++)
                sum[i][v] = vec_fma(vec_set(x[(size_t)i * b->x_stride + k]), weight, sum[i][v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 16
        for (int v = 0; v < n_vecs; v++) {
            float *to = out + (size_t)i * b->out_stride + v * LANES;
            if (part)
                store_part(to, sum[i][v], part);
            else
                vec_store(to, sum[i][v]);
        }
}

/* All rows of n_vecs vectors of outputs. */
INLINE void turned_rows(const struct dot_block *b, enum dtype type, int o, const int n_vecs,
                        int part)
{
    int r = 0;

    for (; r + TURNED_ROWS <= b->rows; r += TURNED_ROWS)
        turned_tile(b, type, r, o, TURNED_ROWS, n_vecs, part);
    for (; r + 2 <= b->rows; r += 2)
        turned_tile(b, type, r, o, 2, n_vecs, part);
    if (r < b->rows)
        turned_tile(b, type, r, o, 1, n_vecs, part);
}

INLINE void turned_block(const struct dot_block *b, enum dtype type)
{
    int o = 0;

    for (; b->rows == 1 && o + TURNED_WIDE * LANES <= b->outs; o += TURNED_WIDE * LANES)
        turned_tile(b, type, 0, o, 1, TURNED_WIDE, 0);
    for (; o + TURNED_VECS * LANES <= b->outs; o += TURNED_VECS * LANES)
        turned_rows(b, type, o, TURNED_VECS, 0);
    for (; o + LANES <= b->outs; o += LANES)
        turned_rows(b, type, o, 1, 0);
    if (o < b->outs)
        turned_rows(b, type, o, 1, b->outs - o);
}

static void turned_bf16(const struct dot_block *b)
{
    turned_block(b, DTYPE_BF16);
}

static void turned_f32(const struct dot_block *b)
{
    turned_block(b, DTYPE_F32);
}

#endif
