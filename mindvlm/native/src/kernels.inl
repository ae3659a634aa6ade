// The kernels of one instruction set, written once. The file of a set includes this one inside an anonymous namespace,
// after it has defined
//   kLanes                          floats of a vector, and rows of W that the blocked layout interleaves
//   kTileRows, kTileOutputs         rows of x and outputs of a tile of dot products, whose sums are kept in registers
//   kPanelRows                      rows of x of a tile of outer products, whose outputs are two vectors
//   kGroupRows                      rows of x that share the unpacked weights of a block
//   Vec, Ints                       vectors of float and int32
//   load_bfloat16, load_float16     (const uint16_t*) -> Vec
//   to_nearest(Vec) -> Ints         rounded to the nearest integers, halves to even ones
//   interleave(Vec& a, Vec& b)      a0 a1 .. and b0 b1 .. become a0 b0 a1 b1 ..
//   unpack<format>(packed, Weights&), dot(const Weights&, const int8_t* x) -> Ints
//                                   the weights of a block, and their sums of products with a block of x
//   kOffsetQ8, kOffsetQ4            what `unpack` adds to every value of a weight

#include "vectors.inl"

#include "float_rows.inl"
#include "few_rows.inl"
#include "many_rows.inl"

#include "block_products.inl"
#include "block_layout.inl"

#include "attention.inl"

#include "norms.inl"

#include "head_attention.inl"

#include "activations.inl"

const Kernels kKernels = {kName, kLanes,   kTileOutputs, multiply_float, multiply_blocks, quantize_row,
                          pack,  read_row, attend,       rms_norm,       layer_norm,      gated_silu,
                          attend_head, activate};
