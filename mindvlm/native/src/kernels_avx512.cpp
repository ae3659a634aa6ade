// Kernels for x86 with AVX-512 and VNNI.
#include "matrix.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr const char* kName = "avx512";
constexpr int kLanes = 16, kTileRows = 4, kTileOutputs = 6, kPanelRows = 14, kGroupRows = 8;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

// VNNI multiplies unsigned by signed bytes, so int8 weights get an offset of 128.
constexpr int kOffsetQ8 = 128, kOffsetQ4 = 8;
constexpr uint8_t kFlipQ8 = 0x80;

inline Vec load_bfloat16(const uint16_t* from) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
}

inline Vec load_float16(const uint16_t* from) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }

inline Ints to_nearest(Vec vec) { return (Ints)_mm512_cvtps_epi32((__m512)vec); }

inline void interleave(Vec& a, Vec& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const Vec first = (Vec)_mm512_permutex2var_ps((__m512)a, low, (__m512)b);
  b = (Vec)_mm512_permutex2var_ps((__m512)a, high, (__m512)b);
  a = first;
}

struct Weights {
  __m512i steps[8];
};

template <Format format>
inline void unpack(const uint8_t* packed, Weights& weights) {
  if constexpr (format == Format::q8_0) {
    for (int i = 0; i < 8; ++i) weights.steps[i] = _mm512_loadu_si512(packed + 64 * i);
  } else {
    const __m512i low = _mm512_set1_epi8(15);
    for (int i = 0; i < 4; ++i) {
      const __m512i both = _mm512_loadu_si512(packed + 64 * i);
      weights.steps[i] = _mm512_and_si512(both, low);
      weights.steps[i + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
  }
}

inline Ints dot(const Weights& weights, const int8_t* x) {
  // two sums, because the instruction takes several cycles
  __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
  for (int i = 0; i < 8; i += 2) {
    int32_t first, second;
    std::memcpy(&first, x + 4 * i, 4);
    std::memcpy(&second, x + 4 * i + 4, 4);
    even = _mm512_dpbusd_epi32(even, weights.steps[i], _mm512_set1_epi32(first));
    odd = _mm512_dpbusd_epi32(odd, weights.steps[i + 1], _mm512_set1_epi32(second));
  }
  return (Ints)_mm512_add_epi32(even, odd);
}

#include "kernels.inl"

}  // namespace

const Kernels* const kAvx512 = &kKernels;
#else
const Kernels* const kAvx512 = nullptr;
#endif
