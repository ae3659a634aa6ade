// Kernels for x86 with AVX2, FMA and F16C.
#include "matrix.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr const char* kName = "avx2";
constexpr int kLanes = 8, kTileRows = 3, kTileOutputs = 4, kPanelRows = 6, kGroupRows = 4;
typedef float Vec __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

constexpr int kOffsetQ8 = 0, kOffsetQ4 = 8;
constexpr uint8_t kFlipQ8 = 0;

inline Vec load_bfloat16(const uint16_t* from) {
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
}

inline Vec load_float16(const uint16_t* from) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }

inline Ints to_nearest(Vec vec) { return (Ints)_mm256_cvtps_epi32((__m256)vec); }

inline void interleave(Vec& a, Vec& b) {
  const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  a = (Vec)_mm256_permute2f128_ps(low, high, 0x20);
  b = (Vec)_mm256_permute2f128_ps(low, high, 0x31);
}

struct Weights {
  __m256i steps[8];
  bool are_small;  // products of weights below 16 add up in 16 bits
};

template <Format format>
inline void unpack(const uint8_t* packed, Weights& weights) {
  weights.are_small = format == Format::q4_0;
  if constexpr (format == Format::q8_0) {
    for (int i = 0; i < 8; ++i) weights.steps[i] = _mm256_loadu_si256((const __m256i*)(packed + 32 * i));
  } else {
    const __m256i low = _mm256_set1_epi8(15);
    for (int i = 0; i < 4; ++i) {
      const __m256i both = _mm256_loadu_si256((const __m256i*)(packed + 32 * i));
      weights.steps[i] = _mm256_and_si256(both, low);
      weights.steps[i + 4] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
    }
  }
}

inline Ints dot(const Weights& weights, const int8_t* x) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i total = _mm256_setzero_si256();
  for (int i = 0; i < 8; ++i) {
    int32_t four;
    std::memcpy(&four, x + 4 * i, 4);
    const __m256i values = _mm256_set1_epi32(four), step = weights.steps[i];
    if (weights.are_small) {
      total = _mm256_add_epi16(total, _mm256_maddubs_epi16(step, values));
    } else {
      // the first factor must be unsigned: |w| * (x with the sign of w)
      const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(step), _mm256_sign_epi8(values, step));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(products, ones));
    }
  }
  return (Ints)(weights.are_small ? _mm256_madd_epi16(total, ones) : total);
}

#include "kernels.inl"

}  // namespace

const Kernels* const kAvx2 = &kKernels;
#else
const Kernels* const kAvx2 = nullptr;
#endif
