#include "kernels/cpu/index.h"

#include "kernels/cpu/index_body.h"

/* Tables of 16 floats are two registers each here: indexed loads are as fast. */
const struct index_leaf avx2_index_leaf = {
    .place = leaf_place,
    .add_key = leaf_add_key,
    .rotate = leaf_rotate,
    .bound = leaf_bound,
    .look_up = scalar_look_up,
};
