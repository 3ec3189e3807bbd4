/* A product of its own for each head.
 *
 * A thread block makes COLUMNS outputs of one head for a tile of rows.  All of the head's inputs
 * lie in shared memory at once, weights first: those are copied, and rows that are not there
 * cleared, while the kernels before this one end, which is what a decode step's few rows are bound
 * by.  Every output is one chain of products in the order of the inputs, so a result depends
 * neither on the number of rows nor on the tile.
 * Weights in float32 have a plain kernel. */

#include "kernels/cuda/mma.cuh"

namespace {

enum {
    WARPS = 4,
    THREADS = WARPS * WARP,
    FEW_ROWS = 16,
    MANY_ROWS = 64,
    GAP = 8,                     /* elements behind a row, against bank conflicts */
};

/* Outputs of a thread block.  Turned weights have few inputs (a query's), the others many. */
template <bool TURNED>
constexpr int columns = TURNED ? 64 : 32;

struct heads_product {
    __nv_bfloat16 *out;
    const __nv_bfloat16 *x;
    const void *weight;
    int rows, in_dim, out_dim, out_stride, out_head_stride, x_stride, x_head_stride;
    size_t weight_stride;
};

/* Inputs as products take them. */
__host__ __device__ inline int padded(int in_dim)
{
    return (in_dim + 15) / 16 * 16;
}

/* Rows of 8-element pieces into shared memory; zeros for what is not there. */
__device__ __forceinline__ void copy_matrix(__nv_bfloat16 *to, int to_rows, int to_cols,
                                            const __nv_bfloat16 *from, size_t stride, int rows,
                                            int cols)
{
    int pieces = to_cols / 8;

    for (int i = threadIdx.x; i < to_rows * pieces; i += THREADS) {
        int row = i / pieces, col = i % pieces * 8;
        bool there = row < rows && col < cols;
        copy_16(shared_address(to + row * (to_cols + GAP) + col),
                there ? from + row * stride + col : from, there);
    }
}

/* Grid: tiles of outputs, heads, tiles of rows. */
template <int ROWS, bool TURNED>
__global__ void __launch_bounds__(THREADS) multiply_heads(heads_product p)
{
    extern __shared__ __align__(128) __nv_bfloat16 memory[];
    enum {
        COLUMNS = columns<TURNED>,
        ROW_WARPS = ROWS / 16,   /* warps side by side have the same rows */
        WARP_COLUMNS = COLUMNS / (WARPS / ROW_WARPS),
        TILES = WARP_COLUMNS / 8,
    };
    static_assert(TILES >= 1, "a product makes 8 columns");
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, matrix = lane / 8;
    int depth = padded(p.in_dim), head = blockIdx.y, first = blockIdx.x * COLUMNS;
    int first_row = blockIdx.z * ROWS, n_rows = min(p.rows - first_row, (int)ROWS);
    int w_rows = TURNED ? depth : COLUMNS, w_cols = TURNED ? COLUMNS : depth;
    __nv_bfloat16 *w = memory, *x = w + w_rows * (w_cols + GAP);
    const __nv_bfloat16 *weight = (const __nv_bfloat16 *)p.weight + head * p.weight_stride;

    if (TURNED)
        copy_matrix(w, w_rows, w_cols, weight + first, p.out_dim, p.in_dim, p.out_dim - first);
    else
        copy_matrix(w, w_rows, w_cols, weight + (size_t)first * p.in_dim, p.in_dim,
                    p.out_dim - first, p.in_dim);
    copy_matrix(x + n_rows * (depth + GAP), ROWS - n_rows, depth, p.x, 0, 0, 0); /* zeros */
    let_next_start();
    wait_for_inputs();
    copy_matrix(x, n_rows, depth, p.x + (size_t)first_row * p.x_stride + head * p.x_head_stride,
                p.x_stride, n_rows, p.in_dim);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    int row = warp % ROW_WARPS * 16, column = warp / ROW_WARPS * WARP_COLUMNS;
    /* Of the left operand matrices 1 and 3 are the lower rows, 2 and 3 the right columns. */
    unsigned left = shared_address(x + (row + lane % 8 + matrix % 2 * 8) * (depth + GAP) +
                                   matrix / 2 * 8);
    /* Of the right one matrices are the upper and the lower half of a step's inputs. */
    unsigned right = TURNED
        ? shared_address(w + (lane % 8 + matrix % 2 * 8) * (w_cols + GAP) + column)
        : shared_address(w + (column + lane % 8) * (w_cols + GAP) + matrix % 2 * 8);
    float acc[TILES][4] = {};
#pragma unroll 4
    for (int step = 0; step < depth; step += 16) {
        unsigned a[4];
        load_matrices(a, left + step * 2);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            unsigned b[4];       /* two of them twice */
            if (TURNED)
                load_matrices_turned(b, right + step * (w_cols + GAP) * 2 + t * 16);
            else
                load_matrices(b, right + t * 8 * (w_cols + GAP) * 2 + step * 2);
            mma_bf16(acc[t], a, b[0], b[1]);
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = row + lane / 4 + 8 * half, c = first + column + t * 8 + lane % 4 * 2;
            if (r < n_rows && c < p.out_dim)
                *(unsigned *)(p.out + (size_t)(first_row + r) * p.out_stride +
                              head * p.out_head_stride + c) =
                    pack_bf16(acc[t][2 * half], acc[t][2 * half + 1]);
        }
}

/* A thread an output. */
__global__ void multiply_heads_float(heads_product p, bool turned)
{
    int column = blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y, row = blockIdx.z;

    let_next_start();
    wait_for_inputs();
    if (column >= p.out_dim)
        return;
    const float *w = (const float *)p.weight + head * p.weight_stride +
                     (turned ? column : (size_t)column * p.in_dim);
    const __nv_bfloat16 *x = p.x + (size_t)row * p.x_stride + head * p.x_head_stride;
    size_t step = turned ? p.out_dim : 1;
    float sum = 0;
    for (int i = 0; i < p.in_dim; i++)
        sum += __bfloat162float(x[i]) * w[i * step];
    p.out[(size_t)row * p.out_stride + head * p.out_head_stride + column] =
        __float2bfloat16_rn(sum);
}

template <int ROWS, bool TURNED>
void launch(struct stream *s, const heads_product &p, int heads)
{
    enum { COLUMNS = columns<TURNED> };
    int depth = padded(p.in_dim);
    size_t w = TURNED ? (size_t)depth * (COLUMNS + GAP) : (size_t)COLUMNS * (depth + GAP);

    launch_early(s, "linear_heads", multiply_heads<ROWS, TURNED>,
                 dim3((p.out_dim + COLUMNS - 1) / COLUMNS, heads, (p.rows + ROWS - 1) / ROWS),
                 THREADS, (w + (size_t)ROWS * (depth + GAP)) * sizeof(__nv_bfloat16), p);
}

}

void cuda_linear_heads(struct stream *s, const struct linear_heads_args *a)
{
    enum { FLOAT_THREADS = 128 };
    heads_product p = {};
    bool few = a->rows <= FEW_ROWS;

    if (a->rows <= 0)
        return;
    p.out = (__nv_bfloat16 *)a->out;
    p.x = (const __nv_bfloat16 *)a->x;
    p.weight = a->weight;
    p.rows = a->rows;
    p.in_dim = a->in_dim;
    p.out_dim = a->out_dim;
    p.out_stride = a->out_stride;
    p.out_head_stride = a->out_head_stride;
    p.x_stride = a->x_stride;
    p.x_head_stride = a->x_head_stride;
    p.weight_stride = a->weight_stride;
    if (a->weight_type == DTYPE_F32)
        launch_early(s, "linear_heads", multiply_heads_float,
                     dim3((a->out_dim + FLOAT_THREADS - 1) / FLOAT_THREADS, a->heads, a->rows),
                     FLOAT_THREADS, 0, p, a->turned);
    else if (a->turned)
        few ? launch<FEW_ROWS, true>(s, p, a->heads) : launch<MANY_ROWS, true>(s, p, a->heads);
    else
        few ? launch<FEW_ROWS, false>(s, p, a->heads) : launch<MANY_ROWS, false>(s, p, a->heads);
}
