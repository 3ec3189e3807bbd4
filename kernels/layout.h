#ifndef KERNELS_LAYOUT_H
#define KERNELS_LAYOUT_H

#include "kernels/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How keys, values and their indexes lie in memory.  Read by C and CUDA C++.
 *
 * A block is BLOCK_TOKENS consecutive tokens of one sequence.  One block id
 * names the same block in every layer: layer l of the pool is an array
 * [pool_blocks] of blocks, so one table a sequence serves all layers.
 *
 *   keys and values   [kv_head][token][K: head_dim | V: head_dim]  bf16
 *
 * K and V of one token and head are neighbours: one row is one fetch.
 *
 * Latent attention (MLA; latent_dim > 0) has one KV head, and V is the first latent_dim values
 * of K, the other head_dim - latent_dim being what the rotation of positions works on:
 *
 *   keys and values   [token][latent: latent_dim | rope: head_dim - latent_dim]  bf16
 *
 * The index of a block, in a pool of its own with ids of its own (an offloaded
 * sequence keeps its index on the device while its K and V are elsewhere), is
 * [kv_head] records.  A record has up to two parts, in this order:
 *
 *   bounds      (filter FILTER_BOUNDS only)
 *     lo, hi    bf16 [head_dim] each: channel-wise minimum and maximum of the
 *               block's keys as stored (after rope, rounded to bf16)
 *
 *   means       (filter FILTER_MEANS only, which needs INDEX_ROTATED)
 *     mean_scale, mean_sign: scale and sign as below of the means of
 *               MEAN_TOKENS neighbouring keys as stored, (k0 + k1) / 2 not
 *               rounded to bf16; [BLOCK_MEANS].  All of them are there when the
 *               block's last key is stored: a block that is not full has none
 *               to be read
 *
 *   token index (always: the token selection reads it; FILTER_COARSE too)
 *     INDEX_ROTATED, a 2-bit key in two bit planes.  With x = R k, R the
 *     rotation below, and scale = 0.996 * rms(k) rounded to bf16:
 *       scale   bf16 [token]  (latent: [token][2])
 *       sign    u8 [token][head_dim / 8]  bit d%8 of byte d/8: x[d] >= 0
 *       large   u8 [token][head_dim / 8]  the same bit: |x[d]| >= scale
 *     The levels are +-0.5 and +-1.5 times scale.  The filter reads scale and
 *     sign, which are neighbours; the selection all three.
 *     Of a latent key the latent part and the rope part are rotated each by itself and have
 *     a scale each, scale[token][2]: the one is normed and the other is not.
 *     INDEX_CHANNELS, INDEX_CHANNELS_KEPT channels c[] of the key, x[i] = k[c[i]],
 *     chosen by calibration for each layer and KV head:
 *       coarse  u8 [token][kept / 4]  2-bit codes, channel i in bits 2(i%4) of
 *               byte i/4: (x >= -scale2) + (x >= 0) + (x >= scale2);
 *               value (code - 1.5) * scale2, scale2 = 0.996 * rms(x)
 *       fine    u8 [token][kept / 2]  4-bit codes, even channel in the low
 *               nibble: 8 + x / scale4, rounded to even and kept in 1..15;
 *               value (code - 8) * scale4, scale4 = max |x| / 7
 *       scale2, scale4  bf16 [token] each
 *     The filter reads coarse, the selection fine.
 *   Where scale is 0 (a zero key), so are the codes.
 *
 * The rotation R = H diag(s) / sqrt(head_dim): s a fixed vector of +-1
 * (rotation_sign), H the Hadamard matrix in natural order; head_dim is a power
 * of two.  R is orthogonal, so (R q).(R k) = q.k.  The same for every layer.
 *
 * An index is the same to the bit wherever it is made, because its arithmetic is
 * fixed: float, every operation rounded once, nothing fused.  H is applied in
 * stages, distance 1, 2, 4, ..., each replacing (a, b) by (a + b, a - b); then
 * x = that * (1 / sqrt(head_dim)).  rms is sqrt(sum * (1 / n)), where the sum of
 * the n squares adds the upper half to the lower one until one is left:
 * s[i] += s[i + n/2], s[i] += s[i + n/4], ... */

typedef uint16_t bf16;  /* storage only; arithmetic is float */

#ifdef __CUDACC__
#define LAYOUT_FN static inline __host__ __device__
#else
#define LAYOUT_FN static inline
#endif

enum { BLOCK_TOKENS = 64, INDEX_CHANNELS_KEPT = 32, MEAN_TOKENS = 2,
       BLOCK_MEANS = BLOCK_TOKENS / MEAN_TOKENS };

enum filter_kind { FILTER_BOUNDS, FILTER_COARSE, FILTER_MEANS };
enum index_kind { INDEX_ROTATED, INDEX_CHANNELS };

struct kv_shape {
    int kv_heads, head_dim;     /* of this device: local heads; width of a key */
    int latent_dim;             /* 0: K and V are apart; else kv_heads is 1 and index rotated */
    enum filter_kind filter;
    enum index_kind index;
};

/* Byte offsets inside an index record; -1 where the part is absent. */
struct index_layout {
    int lo, hi;                          /* FILTER_BOUNDS */
    int mean_scale, mean_sign;           /* FILTER_MEANS */
    int scale, sign, large;              /* INDEX_ROTATED */
    int coarse, fine, scale2, scale4;    /* INDEX_CHANNELS */
    int record_bytes;                    /* multiple of 16 */
};

/* Elements of a row: what is kept of a token for one KV head. */
LAYOUT_FN size_t kv_row_dim(const struct kv_shape *s)
{
    return (size_t)(s->latent_dim ? s->head_dim : 2 * s->head_dim);
}

/* Width of a value, and so of what attention gives for a head. */
LAYOUT_FN int kv_value_dim(const struct kv_shape *s)
{
    return s->latent_dim ? s->latent_dim : s->head_dim;
}

/* Bytes of one block of one layer. */
LAYOUT_FN size_t kv_block_bytes(const struct kv_shape *s)
{
    return (size_t)s->kv_heads * BLOCK_TOKENS * kv_row_dim(s) * sizeof(bf16);
}

/* Parts of a key that are rotated by themselves, for the rotated index. */
LAYOUT_FN int index_parts(const struct kv_shape *s)
{
    return s->latent_dim ? 2 : 1;
}

LAYOUT_FN struct index_layout index_layout(const struct kv_shape *s)
{
    struct index_layout l = { -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0 };
    int at = 0;

    if (s->filter == FILTER_BOUNDS) {
        l.lo = at;
        l.hi = at + 2 * s->head_dim;
        at += 4 * s->head_dim;
    }
    if (s->filter == FILTER_MEANS) {
        l.mean_scale = at;
        l.mean_sign = l.mean_scale + BLOCK_MEANS * 2 * index_parts(s);
        at = l.mean_sign + BLOCK_MEANS * s->head_dim / 8;
    }
    if (s->index == INDEX_ROTATED) {
        l.scale = at;
        l.sign = l.scale + BLOCK_TOKENS * 2 * index_parts(s);
        l.large = l.sign + BLOCK_TOKENS * s->head_dim / 8;
        at = l.large + BLOCK_TOKENS * s->head_dim / 8;
    } else {
        l.coarse = at;
        l.fine = l.coarse + BLOCK_TOKENS * INDEX_CHANNELS_KEPT / 4;
        l.scale2 = l.fine + BLOCK_TOKENS * INDEX_CHANNELS_KEPT / 2;
        l.scale4 = l.scale2 + BLOCK_TOKENS * 2;
        at = l.scale4 + BLOCK_TOKENS * 2;
    }
    l.record_bytes = (at + 15) / 16 * 16;
    return l;
}

/* Bytes of the index of one block of one layer. */
LAYOUT_FN size_t index_block_bytes(const struct kv_shape *s)
{
    return (size_t)s->kv_heads * (size_t)index_layout(s).record_bytes;
}

/* The sign of channel d in the rotation: bit d of a fixed 256-bit string (the
 * fractional part of pi, so that nobody chose it). */
LAYOUT_FN int rotation_sign(int d)
{
    const uint32_t pi[8] = { 0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u,
                             0xa4093822u, 0x299f31d0u, 0x082efa98u, 0xec4e6c89u };
    return (pi[(d >> 5) & 7] >> (d & 31)) & 1 ? -1 : 1;
}

/* What is attended to whatever its score: the first sink_tokens and the last
 * recent_tokens of a context, and the blocks that hold them. */
LAYOUT_FN bool always_chosen(int position, int n_tokens, int sink_tokens,
                                 int recent_tokens)
{
    return position < sink_tokens || position >= n_tokens - recent_tokens;
}

LAYOUT_FN bool always_kept(int block, int n_tokens, int sink_tokens, int recent_tokens)
{
    int first = block * BLOCK_TOKENS, last = first + BLOCK_TOKENS - 1;

    return always_chosen(first, n_tokens, sink_tokens, recent_tokens) ||
           always_chosen(last < n_tokens ? last : n_tokens - 1, n_tokens, sink_tokens,
                         recent_tokens);
}

/* What the block filter keeps whatever its score: of FILTER_MEANS also a block that is not full,
 * which has none and is the newest. */
LAYOUT_FN bool filter_must_keep(enum filter_kind filter, int block, int n_tokens, int sink_tokens,
                                int recent_tokens)
{
    return (filter == FILTER_MEANS && (block + 1) * BLOCK_TOKENS > n_tokens) ||
           always_kept(block, n_tokens, sink_tokens, recent_tokens);
}

#ifdef __cplusplus
}
#endif
#endif
