// A weight matrix W (rows, cols) as it is stored, and the kernels that multiply it.
#pragma once
#include <cstdint>
#include <memory>

#include "towers.h"

enum class Format : int { float32, bfloat16, float16, q8_0, q4_0, q4_k, q8_c };

// Values that share a scale, as in ggml's formats q8_0 and q4_0; those of q4_K have blocks of kParts times as many. In q8_c all
// values of a row share a float32 scale, which is before its blocks of int8.
constexpr int64_t kBlock = 32, kParts = 8;

// Of more rows of x than this, each has the same product alone and with any others.
constexpr int64_t kMostFewRows = 15;

constexpr bool is_blocked(Format format) { return format >= Format::q8_0; }
// Values and bytes of a block as it is stored, in ggml's layout: a float16 scale, then the values; in q4_K float16 units of
// scales and minima, 6 bits for the scale and the minimum of every part, and the values.
constexpr int64_t block_size(Format format) { return format == Format::q4_k ? kParts * kBlock : kBlock; }
constexpr int64_t block_bytes(Format format) {
  switch (format) {
    case Format::q8_0: return 2 + kBlock;
    case Format::q8_c: return kBlock;
    case Format::q4_0: return 2 + kBlock / 2;
    default: return 4 + 12 + kParts * kBlock / 2;
  }
}
// Bytes of a block of a row in the interleaved layout, in which scales and minima of q4_K have 8 bits.
constexpr int64_t interleaved_bytes(Format format) {
  return format == Format::q4_k ? block_bytes(format) - 12 + 2 * kParts : block_bytes(format);
}
// Bytes of the scale before the blocks of a row, and of a whole row in both layouts.
constexpr int64_t row_scale_bytes(Format format) { return format == Format::q8_c ? 4 : 0; }
constexpr int64_t row_bytes(Format format, int64_t cols) {
  return row_scale_bytes(format) + cols / block_size(format) * block_bytes(format);
}
constexpr int64_t interleaved_row_bytes(Format format, int64_t cols) {
  return row_scale_bytes(format) + cols / block_size(format) * interleaved_bytes(format);
}

// Frees pages of memory.
struct Unmap {
  int64_t size = 0;
  void operator()(uint8_t* pages) const;
};

struct Matrix {
  Format format;
  int64_t rows, cols;
  // Row-major values of a float format, owned by the caller.
  const void* values = nullptr;
  // Interleaved blocks of a blocked format, see `Kernels::pack`.
  std::unique_ptr<uint8_t, Unmap> packed;
};

// A row of activations in blocks of int8, for the products with blocked weights.
struct QuantizedRows {
  const int8_t* values;   // (rows, cols)
  const float* scales;    // (rows, cols / kBlock)
  const int32_t* sums;    // (rows, cols / kBlock), the sum of the int8 values of each block
};

// y (num_rows, rows of W) = x (num_rows, cols) W^T for a blocked W and the outputs [first, last), which are multiples of
// `Kernels::group`, or the end.
using MultiplyBlocks = void (*)(const Matrix&, QuantizedRows x, int64_t num_rows, float* y, int64_t first, int64_t last);

// The kernels of one instruction set. Ranges of outputs are independent, so that threads can share them.
struct Kernels {
  const char* name;
  // Rows of W that the blocked layout interleaves.
  int64_t group;
  // Outputs per unit of work of a float product; ranges begin at a multiple of it.
  int64_t tile;
  // y (num_rows, rows of W) = x (num_rows, cols) W^T for the outputs [first, last).
  void (*multiply_float)(const Matrix&, const float* x, int64_t num_rows, float* y, int64_t first, int64_t last);
  MultiplyBlocks multiply_blocks;
  // Quantizes a row of x to int8 blocks.
  void (*quantize_row)(const float* x, int64_t cols, int8_t* values, float* scales, int32_t* sums);
  // Packs `group` rows as they are stored (fewer at the end of W) to the interleaved layout.
  void (*pack)(Format, const uint8_t* blocks, int64_t num_rows, int64_t cols, uint8_t* packed);
  // Writes row `index` of W as float32.
  void (*read_row)(const Matrix&, int64_t index, float* row);
  // Softmax attention of queries (num_queries, head_dim), already scaled, to the keys of one head.
  void (*attend)(const float* query, int64_t num_queries, const int64_t* num_keys, const float* keys, const float* values,
                 int64_t head_dim, float* out, int64_t out_stride);
  void (*rms_norm)(const float* x, const float* weight, int64_t width, float eps, float* to);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int64_t width, float eps, float* to);
  void (*gated_silu)(const float* gate, const float* up, int64_t count, float* to);
  void (*attend_head)(const HeadAttention&);
  void (*activate)(Activation, const float* x, int64_t count, float* to);
};

// Kernels of each instruction set; null where the compiler does not target it.
extern const Kernels* const kPortable;
extern const Kernels* const kNeon;
extern const Kernels* const kDotprod;
extern const Kernels* const kAvx2;
extern const Kernels* const kAvx512;
// What AMX adds to those of AVX-512.
extern const MultiplyBlocks kMultiplyTiles;

// Those in use.
extern const Kernels* kernels;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
