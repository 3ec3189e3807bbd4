#ifndef KERNELS_CUDA_LATENT_CUH
#define KERNELS_CUDA_LATENT_CUH

#include "kernels/cuda/cuda.cuh"

/* Shared by the kernels of latent attention (kernels/latent.h), which are made for rows of one
 * width: those of DeepSeek's and GLM's models. */

namespace latent {

enum {
    L = 512,                     /* latent, and so values */
    P = 64,                      /* rope */
    D = L + P,                   /* a row */
    MOST_HEADS = 24,
};

static inline bool is_latent(const struct kv_shape *shape)
{
    return shape->latent_dim > 0;
}

/* Queries as scores of the index take them, made once for both levels: [seqs], 16-byte aligned. */
struct queries;
size_t queries_bytes(int max_seqs);
void queue_queries(struct stream *s, queries *made, const void *q, int q_stride, int heads,
                   const int32_t *n_tokens, int seqs);

/* What lies behind n words of scratch memory. */
static inline queries *queries_behind(void *scratch, size_t n)
{
    return (queries *)((char *)scratch + (n * sizeof(int32_t) + 255) / 256 * 256);
}

/* The keys of select.cuh: of the blocks of every context, [seqs, max_blocks], and of the tokens of
 * kept blocks, [seqs, keep_blocks, BLOCK_TOKENS].  Bounds take no queries that were made. */
void queue_scores(struct stream *s, const struct block_filter_args *a, const queries *made,
                  unsigned *keys);
void queue_kept_scores(struct stream *s, const struct token_select_args *a, const queries *made,
                       unsigned *keys);

/* attend_dense, and attention to chosen rows, which lie at the addresses `rows` where that is not
 * NULL. */
void queue_attend(struct stream *s, const struct attend_dense_args *a);
void queue_attend_selected(struct stream *s, const struct attend_selected_args *a,
                           const bf16 *const *rows);
size_t attend_scratch(int max_seqs, int heads);

/* Sequences of more than one row, with Hopper's kernel, or false where its code cannot run. */
bool queue_attend_rows_hopper(struct stream *s, const struct attend_dense_args *a);

/* With the kernels made for it, or false where there are none for these arguments. */
bool queue_two_level(struct stream *s, const struct attend_two_level_args *a);

}
#endif
