#include "tests/emulator/cudart.h"

#include "kernels/cpu/cpu.h"

#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

/* D = alpha op(A) op(B) + beta C + bias in float, rounded once.  Matrices are counted by columns,
 * as cuBLASLt does: element (i, j) is at i + j * ld. */

enum {
    LANES = 16,                  /* sums that a dot product has side by side */
    SIDE = 4,                    /* dot products made together */
    ROWS = 64,                   /* of op(A), in floats at a time */
    ALGORITHM = 0x70e1,          /* marks what the heuristic gave */
};

typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));

/* What the handles point to. */
struct product_desc {
    cublasOperation_t a, b;
    cublasLtEpilogue_t epilogue;
    const void *bias;
};

struct layout {
    cudaDataType type;
    uint64_t rows, cols;
    int64_t ld;
};

/* Bytes that pointers are multiples of: A, B, C, D. */
struct preference {
    uint64_t workspace_bytes;
    uint32_t aligned[4];
};

/* In a cublasLtMatmulAlgo_t: what it was found for.  To use it for another product is an error. */
struct algorithm {
    uint32_t mark;
    uint8_t a, b, types, epilogue;
    uint32_t m, n, k, ldd;
    uint32_t workspace_bytes;
    uint16_t aligned[4];
};
_Static_assert(sizeof(struct algorithm) <= sizeof(cublasLtMatmulAlgo_t), "no room");

/* A product, as a stream is given it. */
struct product {
    const void *a, *b, *c, *bias;
    void *d;
    struct layout la, lb, lc, ld;
    bool turn_a, turn_b;
    float alpha, beta;
};

static cublasStatus_t refuse(const char *call, const char *what, int value)
{
    cudart_refuse(cudaSuccess, call, "%s %d is not emulated", what, value);
    return CUBLAS_STATUS_NOT_SUPPORTED;
}

static cublasStatus_t invalid(const char *call, const char *why)
{
    cudart_refuse(cudaSuccess, call, "%s", why);
    return CUBLAS_STATUS_INVALID_VALUE;
}

/* ---- descriptions */

cublasStatus_t cublasLtCreate(cublasLtHandle_t *out)
{
    *out = cudart_new(1);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t compute,
                                        cudaDataType scale)
{
    static const char call[] = "cublasLtMatmulDescCreate";
    struct product_desc *d;

    if (compute != CUBLAS_COMPUTE_32F)
        return refuse(call, "compute type", (int)compute);
    if (scale != CUDA_R_32F)
        return refuse(call, "scale type", (int)scale);
    d = cudart_new(sizeof *d);
    d->a = d->b = CUBLAS_OP_N;
    d->epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    *out = (cublasLtMatmulDesc_t)(void *)d;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc)
{
    free(desc);
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t set(void *to, size_t bytes, const void *from, size_t from_bytes,
                          const char *call)
{
    if (bytes != from_bytes)
        return invalid(call, "an attribute of another size");
    memcpy(to, from, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t set_operation(cublasOperation_t *to, const void *from, size_t bytes,
                                    const char *call)
{
    cublasStatus_t e = set(to, sizeof *to, from, bytes, call);

    if (e == CUBLAS_STATUS_SUCCESS && *to != CUBLAS_OP_N && *to != CUBLAS_OP_T)
        return refuse(call, "operation", (int)*to);
    return e;
}

static cublasStatus_t set_epilogue(cublasLtEpilogue_t *to, const void *from, size_t bytes,
                                   const char *call)
{
    cublasStatus_t e = set(to, sizeof *to, from, bytes, call);

    if (e == CUBLAS_STATUS_SUCCESS && *to != CUBLASLT_EPILOGUE_DEFAULT &&
        *to != CUBLASLT_EPILOGUE_BIAS)
        return refuse(call, "epilogue", (int)*to);
    return e;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t what,
                                              const void *value, size_t bytes)
{
    static const char call[] = "cublasLtMatmulDescSetAttribute";
    struct product_desc *d = (void *)desc;

    switch ((int)what) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
        return set_operation(&d->a, value, bytes, call);
    case CUBLASLT_MATMUL_DESC_TRANSB:
        return set_operation(&d->b, value, bytes, call);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        return set_epilogue(&d->epilogue, value, bytes, call);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        return set(&d->bias, sizeof d->bias, value, bytes, call);
    default:
        return refuse(call, "attribute", (int)what);
    }
}

static size_t type_bytes(cudaDataType type)
{
    return type == CUDA_R_32F ? sizeof(float) : sizeof(bf16);
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld)
{
    static const char call[] = "cublasLtMatrixLayoutCreate";
    struct layout *l;

    if (type != CUDA_R_16BF && type != CUDA_R_32F)
        return refuse(call, "type", (int)type);
    if (rows == 0 || cols == 0 || ld < (int64_t)rows)
        return invalid(call, "no elements, or columns that overlap");
    l = cudart_new(sizeof *l);
    *l = (struct layout){ type, rows, cols, ld };
    *out = (cublasLtMatrixLayout_t)(void *)l;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
    free(layout);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out)
{
    struct preference *p = cudart_new(sizeof *p);

    for (int i = 0; i < 4; i++)
        p->aligned[i] = 256;     /* cuBLASLt's default */
    *out = (cublasLtMatmulPreference_t)(void *)p;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    free(preference);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t what,
                                                    const void *value, size_t bytes)
{
    static const char call[] = "cublasLtMatmulPreferenceSetAttribute";
    struct preference *p = (void *)preference;
    uint32_t mask;

    switch ((int)what) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
        return set(&p->workspace_bytes, sizeof p->workspace_bytes, value, bytes, call);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: /* there are no partial sums here */
        return set(&mask, sizeof mask, value, bytes, call);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: {
        uint32_t *to = &p->aligned[what - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES];
        return set(to, sizeof *to, value, bytes, call);
    }
    default:
        return refuse(call, "attribute", (int)what);
    }
}

/* ---- which algorithm: there is one, that remembers what it is for */

static cublasStatus_t describe(struct algorithm *out, const struct product_desc *d,
                               const struct layout *const l[4], const char *call)
{
    uint64_t m = d->a == CUBLAS_OP_N ? l[0]->rows : l[0]->cols;
    uint64_t k = d->a == CUBLAS_OP_N ? l[0]->cols : l[0]->rows;
    uint64_t n = d->b == CUBLAS_OP_N ? l[1]->cols : l[1]->rows;
    uint64_t k_b = d->b == CUBLAS_OP_N ? l[1]->rows : l[1]->cols;

    if (k != k_b || l[2]->rows != m || l[2]->cols != n || l[3]->rows != m || l[3]->cols != n)
        return invalid(call, "shapes that do not fit each other");
    if (l[0]->type != l[1]->type || l[2]->type != l[3]->type)
        return refuse(call, "A of another type than B, or C than D:", (int)l[0]->type);
    if (l[0]->type == CUDA_R_32F && l[3]->type != CUDA_R_32F)
        return refuse(call, "rounding float products to type", (int)l[3]->type);
    if (d->epilogue == CUBLASLT_EPILOGUE_BIAS && l[0]->type != l[3]->type)
        return refuse(call, "a bias beside outputs of another type, type", (int)l[3]->type);
    *out = (struct algorithm){ .mark = ALGORITHM, .a = (uint8_t)d->a, .b = (uint8_t)d->b };
    out->types = (uint8_t)(2 * (l[0]->type == CUDA_R_32F) + (l[3]->type == CUDA_R_32F));
    out->epilogue = (uint8_t)d->epilogue;
    out->m = (uint32_t)m;
    out->n = (uint32_t)n;
    out->k = (uint32_t)k;
    out->ldd = (uint32_t)l[3]->ld;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int n_wanted,
                                              cublasLtMatmulHeuristicResult_t found[],
                                              int *n_found)
{
    const struct layout *const l[4] = { (void *)a, (void *)b, (void *)c, (void *)d };
    const struct preference *p = (void *)preference;
    struct algorithm algorithm;
    cublasStatus_t e;

    (void)handle;
    *n_found = 0;
    if (n_wanted < 1)
        return invalid("cublasLtMatmulAlgoGetHeuristic", "no room for an algorithm");
    e = describe(&algorithm, (void *)desc, l, "cublasLtMatmulAlgoGetHeuristic");
    if (e != CUBLAS_STATUS_SUCCESS)
        return e;
    for (int i = 0; i < 4; i++)
        algorithm.aligned[i] = (uint16_t)p->aligned[i];
    algorithm.workspace_bytes = (uint32_t)p->workspace_bytes;
    memset(found, 0, sizeof *found);
    memcpy(&found->algo, &algorithm, sizeof algorithm);
    found->workspaceSize = p->workspace_bytes;
    found->state = CUBLAS_STATUS_SUCCESS;
    *n_found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- products */

static float element(const void *at, cudaDataType type, size_t i)
{
    return type == CUDA_R_32F ? ((const float *)at)[i] : bf16_to_float(((const bf16 *)at)[i]);
}

/* n lines of k elements, line i from element i * line on and its elements step apart, as floats
 * in lines of k_padded, the rest zero. */
static void unpack(float *out, const void *from, cudaDataType type, size_t line, size_t step,
                   size_t n, size_t k, size_t k_padded)
{
    for (size_t i = 0; i < n; i++) {
        float *to = out + i * k_padded;
        if (step == 1 && type == CUDA_R_16BF)
            for (size_t j = 0; j < k; j++)
                to[j] = bf16_to_float(((const bf16 *)from)[i * line + j]);
        else
            for (size_t j = 0; j < k; j++)
                to[j] = element(from, type, i * line + j * step);
        memset(to + k, 0, (k_padded - k) * sizeof *to);
    }
}

/* One line with SIDE others that follow each other.  k: a multiple of LANES.  The order of
 * additions is the same for all lines and on all machines. */
__attribute__((target_clones("avx512f", "avx2", "default")))
static void dot(float out[SIDE], const float *a, const float *b, size_t k)
{
    lanes sum[SIDE] = { { 0 } };

    for (size_t i = 0; i < k; i += LANES) {
        lanes x, y;
        memcpy(&x, a + i, sizeof x);
        for (int s = 0; s < SIDE; s++) {
            memcpy(&y, b + (size_t)s * k + i, sizeof y);
            sum[s] += x * y;
        }
    }
    for (int s = 0; s < SIDE; s++) {
        for (int n = LANES / 2; n > 0; n /= 2)
            for (int lane = 0; lane < n; lane++)
                sum[s][lane] += sum[s][lane + n];
        out[s] = sum[s][0];
    }
}

static void store(const struct product *p, size_t i, size_t j, float sum)
{
    size_t at = i + j * (size_t)p->ld.ld;

    sum *= p->alpha;
    if (p->beta != 0)            /* else C may hold anything */
        sum += p->beta * element(p->c, p->lc.type, i + j * (size_t)p->lc.ld);
    if (p->bias)
        sum += element(p->bias, p->ld.type, i);
    if (p->ld.type == CUDA_R_32F)
        ((float *)p->d)[at] = sum;
    else
        ((bf16 *)p->d)[at] = float_to_bf16(sum);
}

static size_t layout_bytes(const struct layout *l)
{
    return ((l->cols - 1) * (size_t)l->ld + l->rows) * type_bytes(l->type);
}

static void check_all_memory(const struct product *p)
{
    static const char call[] = "cublasLtMatmul";

    cudart_check_memory(call, p->a, layout_bytes(&p->la));
    cudart_check_memory(call, p->b, layout_bytes(&p->lb));
    if (p->beta != 0)
        cudart_check_memory(call, p->c, layout_bytes(&p->lc));
    cudart_check_memory(call, p->d, layout_bytes(&p->ld));
    if (p->bias)
        cudart_check_memory(call, p->bias, p->ld.rows * type_bytes(p->ld.type));
}

static void run_product(const void *args)
{
    const struct product *p = args;
    size_t m = p->ld.rows, n = p->ld.cols, k = p->turn_a ? p->la.rows : p->la.cols;
    size_t k_padded = (k + LANES - 1) / LANES * LANES;
    size_t a_line = p->turn_a ? (size_t)p->la.ld : 1, a_step = p->turn_a ? 1 : (size_t)p->la.ld;
    size_t b_line = p->turn_b ? 1 : (size_t)p->lb.ld, b_step = p->turn_b ? (size_t)p->lb.ld : 1;

    check_all_memory(p);
    float *b = cudart_new((n + SIDE - 1) / SIDE * SIDE * k_padded * sizeof *b);
    float *a = cudart_new(ROWS * k_padded * sizeof *a), sum[SIDE];
    unpack(b, p->b, p->lb.type, b_line, b_step, n, k, k_padded);
    for (size_t first = 0; first < m; first += ROWS) {
        size_t rows = m - first < ROWS ? m - first : ROWS;
        unpack(a, (const char *)p->a + first * a_line * type_bytes(p->la.type), p->la.type, a_line,
               a_step, rows, k, k_padded);
        for (size_t j = 0; j < n; j += SIDE)
            for (size_t i = 0; i < rows; i++) {
                dot(sum, a + i * k_padded, b + j * k_padded, k_padded);
                for (size_t s = 0; s < SIDE && j + s < n; s++)
                    store(p, first + i, j + s, sum[s]);
            }
    }
    free(a);
    free(b);
}

/* Whether the algorithm was found for this product, with pointers aligned like these. */
static cublasStatus_t check_algorithm(const cublasLtMatmulAlgo_t *algo, struct algorithm wanted,
                                      const struct product *p, size_t workspace_bytes,
                                      const char *call)
{
    const void *const pointers[4] = { p->a, p->b, p->c, p->d };
    struct algorithm found;

    if (!algo)
        return refuse(call, "a product without an algorithm, rows", (int)wanted.m);
    memcpy(&found, algo, sizeof found);
    wanted.workspace_bytes = found.workspace_bytes;
    memcpy(wanted.aligned, found.aligned, sizeof wanted.aligned);
    if (memcmp(&found, &wanted, sizeof found) != 0)
        return invalid(call, "the algorithm was found for another product");
    if (workspace_bytes < found.workspace_bytes)
        return invalid(call, "less work space than the algorithm was found for");
    for (int i = 0; i < 4; i++)
        if (found.aligned[i] && (uintptr_t)pointers[i] % found.aligned[i] != 0)
            return invalid(call, "a pointer is less aligned than the algorithm was found for");
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t queue_product(const struct product *p, const void *workspace,
                                    size_t workspace_bytes, cudaStream_t stream)
{
    cudaError_t e;

    cudart_lock();
    cudart_check_memory("cublasLtMatmul", workspace, workspace_bytes);
    check_all_memory(p);
    e = cudart_queue(stream, "cublasLtMatmul", run_product, p, sizeof *p);
    cudart_unlock();
    return e == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                              const void *alpha, const void *a, cublasLtMatrixLayout_t la,
                              const void *b, cublasLtMatrixLayout_t lb, const void *beta,
                              const void *c, cublasLtMatrixLayout_t lc, void *d,
                              cublasLtMatrixLayout_t ld, const cublasLtMatmulAlgo_t *algo,
                              void *workspace, size_t workspace_bytes, cudaStream_t stream)
{
    static const char call[] = "cublasLtMatmul";
    const struct layout *const l[4] = { (void *)la, (void *)lb, (void *)lc, (void *)ld };
    const struct product_desc *what = (void *)desc;
    struct product p = { .a = a, .b = b, .c = c, .d = d, .la = *l[0], .lb = *l[1], .lc = *l[2],
                         .ld = *l[3] };
    struct algorithm wanted;
    cublasStatus_t e = describe(&wanted, what, l, call);

    if (!handle)
        return CUBLAS_STATUS_NOT_INITIALIZED;
    p.turn_a = what->a == CUBLAS_OP_T;
    p.turn_b = what->b == CUBLAS_OP_T;
    memcpy(&p.alpha, alpha, sizeof p.alpha);
    memcpy(&p.beta, beta, sizeof p.beta);
    if (what->epilogue == CUBLASLT_EPILOGUE_BIAS) {
        if (!what->bias)
            return invalid(call, "no bias to add");
        p.bias = what->bias;
    }
    if (e == CUBLAS_STATUS_SUCCESS)
        e = check_algorithm(algo, wanted, &p, workspace_bytes, call);
    return e == CUBLAS_STATUS_SUCCESS ? queue_product(&p, workspace, workspace_bytes, stream) : e;
}
