// Products of many rows with a matrix of blocks by the tiles of AMX. The other kernels of its set are those of AVX-512, whose
// layout of blocks is that of a tile: 8 steps of 4 values of 16 outputs.
//
// Results have the bits of the products in block_products.inl, because the integers are exact and the floats are added in the
// same order: a row does not depend on the rows beside it.
#include "matrix.h"

// older clang++ has the second name
#if (defined(__AMX_INT8__) || defined(__AMXINT8__)) && defined(__AVX512BW__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

constexpr int kLanes = 16, kTileRows = 16;
constexpr int64_t kTileBytes = kBlock * kLanes;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

#include "vectors.inl"

inline Vec load_float16(const uint8_t* from) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

constexpr TileConfig tiles_of_a_block() {
  TileConfig config;
  // sums of products, x and weights
  config.rows[0] = kTileRows, config.row_bytes[0] = 4 * kLanes;
  config.rows[1] = kTileRows, config.row_bytes[1] = kBlock;
  config.rows[2] = kBlock / 4, config.row_bytes[2] = 4 * kLanes;
  return config;
}

constexpr TileConfig kTiles = tiles_of_a_block();

// The sums of products of a block for kTileRows rows of x, which are `cols` apart.
inline void multiply_tile(const int8_t* weights, const int8_t* x, int64_t cols, Ints* products) {
  _tile_zero(0);
  _tile_loadd(1, x, cols);
  _tile_loadd(2, weights, 4 * kLanes);
  _tile_dpbssd(0, 1, 2);
  _tile_stored(0, products, sizeof *products);
}

// A block of a group of outputs, which all rows of x share: its weights as a tile of signed values, which need no correction of
// their products, and what these are multiplied by.
struct Block {
  alignas(64) int8_t weights[kTileBytes];
  Vec scale, minimum;
};

// Unpacks the weights of a block, and returns the end of them.
template <Format format>
inline const uint8_t* unpack(const uint8_t* packed, int8_t* weights) {
  if constexpr (format == Format::q8_0 || format == Format::q8_c) {
    for (int64_t at = 0; at < kTileBytes; at += 64)
      _mm512_store_si512(weights + at, _mm512_xor_si512(_mm512_loadu_si512(packed + at), _mm512_set1_epi8(-128)));
    return packed + kTileBytes;
  } else {
    const __m512i low = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(format == Format::q4_0 ? 8 : 0);
    for (int64_t at = 0; at < kTileBytes / 2; at += 64) {
      const __m512i both = _mm512_loadu_si512(packed + at), high = _mm512_srli_epi16(both, 4);
      _mm512_store_si512(weights + at, _mm512_sub_epi8(_mm512_and_si512(both, low), offset));
      _mm512_store_si512(weights + kTileBytes / 2 + at, _mm512_sub_epi8(_mm512_and_si512(high, low), offset));
    }
    return packed + kTileBytes / 2;
  }
}

template <Format format>
void unpack_group(const uint8_t* packed, int64_t num_blocks, Block* blocks) {
  Vec scale_unit = {}, minimum_unit = {};
  packed += kLanes * row_scale_bytes(format);
  for (int64_t b = 0; b < num_blocks; ++b) {
    Block& block = blocks[b];
    if (format == Format::q4_k && b % kParts == 0) {
      scale_unit = load_float16(packed);
      minimum_unit = load_float16(packed + 2 * kLanes);
      packed += 4 * kLanes;
    }
    if constexpr (format == Format::q4_k) {
      block.scale = scale_unit * load_bytes(packed);
      block.minimum = minimum_unit * load_bytes(packed + kLanes);
    } else if constexpr (format != Format::q8_c) {
      block.scale = load_float16(packed);
    }
    if constexpr (format != Format::q8_c) packed += 2 * kLanes;
    packed = unpack<format>(packed, block.weights);
  }
  // GCC does not know that tiles are loaded from memory
  asm volatile("" ::: "memory");
}

// Sums of a group of outputs for kTileRows rows of x.
template <Format format>
inline void multiply_group(const Block* blocks, QuantizedRows x, int64_t cols, Vec* sums) {
  const int64_t num_blocks = cols / kBlock;
  // two buffers: the products of the next block are computed while these are added
  Ints products[2][kTileRows];
  multiply_tile(blocks[0].weights, x.values, cols, products[0]);
  for (int64_t b = 0; b < num_blocks; ++b) {
    if (b + 1 < num_blocks)
      multiply_tile(blocks[b + 1].weights, x.values + (b + 1) * kBlock, cols, products[(b + 1) % 2]);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t at = r * num_blocks + b;
      const Vec exact = __builtin_convertvector(products[b % 2][r], Vec);
      if (format == Format::q8_c) {
        sums[r] += exact * x.scales[at];
      } else {
        sums[r] += exact * (blocks[b].scale * x.scales[at]);
      }
      if (format == Format::q4_k) sums[r] -= blocks[b].minimum * (x.scales[at] * static_cast<float>(x.sums[at]));
    }
  }
}

// The rows after the first `count`.
inline QuantizedRows skip(QuantizedRows x, int64_t count, int64_t cols) {
  const int64_t num_blocks = count * (cols / kBlock);
  return {x.values + count * cols, x.scales + num_blocks, x.sums + num_blocks};
}

// y = x W^T for a multiple of kTileRows rows. `blocks` has room for a group.
template <Format format>
void multiply_format(const Matrix& w, QuantizedRows x, int64_t num_rows, float* y, int64_t first, int64_t last,
                     Block* blocks) {
  for (int64_t out = first; out < last; out += kLanes) {
    const uint8_t* packed = w.packed.get() + out * interleaved_row_bytes(format, w.cols);
    unpack_group<format>(packed, w.cols / kBlock, blocks);
    for (int64_t row = 0; row < num_rows; row += kTileRows) {
      Vec sums[kTileRows] = {};
      multiply_group<format>(blocks, skip(x, row, w.cols), w.cols, sums);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const Vec outputs = format == Format::q8_c ? sums[r] * load(reinterpret_cast<const float*>(packed)) : sums[r];
        std::memcpy(y + (row + r) * w.rows + out, &outputs, std::min<int64_t>(kLanes, last - out) * sizeof(float));
      }
    }
  }
}

void multiply_blocks(const Matrix& w, QuantizedRows x, int64_t num_rows, float* y, int64_t first, int64_t last) {
  const int64_t rest = num_rows % kTileRows, count = num_rows - rest;
  if (count) {
    thread_local std::vector<Block> of_thread;
    of_thread.resize(std::max<size_t>(of_thread.size(), w.cols / kBlock));
    Block* blocks = of_thread.data();
    _tile_loadconfig(&kTiles);
    if (w.format == Format::q8_0) multiply_format<Format::q8_0>(w, x, count, y, first, last, blocks);
    if (w.format == Format::q8_c) multiply_format<Format::q8_c>(w, x, count, y, first, last, blocks);
    if (w.format == Format::q4_0) multiply_format<Format::q4_0>(w, x, count, y, first, last, blocks);
    if (w.format == Format::q4_k) multiply_format<Format::q4_k>(w, x, count, y, first, last, blocks);
    _tile_release();
  }
  if (rest) kAvx512->multiply_blocks(w, skip(x, count, w.cols), rest, y + count * w.rows, first, last);
}

}  // namespace

const MultiplyBlocks kMultiplyTiles = multiply_blocks;
#else
const MultiplyBlocks kMultiplyTiles = nullptr;
#endif
