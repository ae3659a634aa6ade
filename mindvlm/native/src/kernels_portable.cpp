// Kernels in plain C++, for any processor.
#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr const char* kName = "portable";
constexpr int kLanes = 4, kTileRows = 4, kTileOutputs = 4, kPanelRows = 6, kGroupRows = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));

constexpr int kOffsetQ8 = 0, kOffsetQ4 = 0;
constexpr uint8_t kFlipQ8 = 0;

inline Bits load_halves(const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return __builtin_convertvector(halves, Bits);
}

inline Vec load_bfloat16(const uint16_t* from) { return (Vec)(load_halves(from) << 16); }

inline Vec load_float16(const uint16_t* from) {
  // shifts exponent and mantissa in place, corrects the bias of the exponent, and adds the sign
  const Bits bits = load_halves(from);
  const Vec magnitude = (Vec)((bits & 0x7fff) << 13) * 0x1p112f;
  // the exponent of infinity and NaN
  const Bits beyond = (Bits)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return (Vec)((Bits)magnitude | beyond | (bits & 0x8000) << 16);
}

inline Ints to_nearest(Vec vec) {
  Ints rounded;
  for (int i = 0; i < kLanes; ++i) rounded[i] = static_cast<int32_t>(std::nearbyintf(vec[i]));
  return rounded;
}

inline void interleave(Vec& a, Vec& b) {
  const Vec low = {a[0], b[0], a[1], b[1]}, high = {a[2], b[2], a[3], b[3]};
  a = low;
  b = high;
}

struct Weights {
  int8_t values[kBlock][kLanes];
};

template <Format format>
inline void unpack(const uint8_t* packed, Weights& weights) {
  for (int64_t i = 0; i < block_bytes(format) - 2; ++i) {
    for (int row = 0; row < kLanes; ++row) {
      const uint8_t byte = packed[i / 4 * 4 * kLanes + 4 * row + i % 4];
      if constexpr (format == Format::q8_0) {
        weights.values[i][row] = static_cast<int8_t>(byte);
      } else {
        weights.values[i][row] = static_cast<int8_t>((byte & 15) - 8);
        weights.values[i + kBlock / 2][row] = static_cast<int8_t>((byte >> 4) - 8);
      }
    }
  }
}

inline Ints dot(const Weights& weights, const int8_t* x) {
  Ints total = {};
  for (int64_t i = 0; i < kBlock; ++i)
    for (int row = 0; row < kLanes; ++row) total[row] += weights.values[i][row] * x[i];
  return total;
}

#include "kernels.inl"

}  // namespace

const Kernels* const kPortable = &kKernels;
