// Kernels for aarch64. kernels_dotprod.cpp compiles this file again with the dot product instructions of ARMv8.2.
#include "matrix.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int kLanes = 4, kTileRows = 4, kTileOutputs = 4, kPanelRows = 12, kGroupRows = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

constexpr int kOffsetQ8 = 0, kOffsetQ4 = 8;
constexpr uint8_t kFlipQ8 = 0;

inline Vec load_bfloat16(const uint16_t* from) { return (Vec)vshll_n_u16(vld1_u16(from), 16); }

inline Vec load_float16(const uint16_t* from) { return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }

inline Ints to_nearest(Vec vec) { return (Ints)vcvtnq_s32_f32((float32x4_t)vec); }

inline void interleave(Vec& a, Vec& b) {
  const Vec low = (Vec)vzip1q_f32((float32x4_t)a, (float32x4_t)b);
  b = (Vec)vzip2q_f32((float32x4_t)a, (float32x4_t)b);
  a = low;
}

struct Weights {
  int8x16_t steps[8];
};

template <Format format>
inline void unpack(const uint8_t* packed, Weights& weights) {
  if constexpr (format == Format::q8_0) {
    for (int i = 0; i < 8; ++i) weights.steps[i] = vreinterpretq_s8_u8(vld1q_u8(packed + 16 * i));
  } else {
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t both = vld1q_u8(packed + 16 * i);
      weights.steps[i] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
      weights.steps[i + 4] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
    }
  }
}

#if defined(MINDVLM_DOTPROD)
constexpr const char* kName = "dotprod";

inline Ints dot(const Weights& weights, const int8_t* x) {
  // two sums, because the instruction takes several cycles
  int32x4_t even = vdupq_n_s32(0), odd = vdupq_n_s32(0);
  const int8x16_t first = vld1q_s8(x), second = vld1q_s8(x + 16);
  even = vdotq_laneq_s32(even, weights.steps[0], first, 0);
  odd = vdotq_laneq_s32(odd, weights.steps[1], first, 1);
  even = vdotq_laneq_s32(even, weights.steps[2], first, 2);
  odd = vdotq_laneq_s32(odd, weights.steps[3], first, 3);
  even = vdotq_laneq_s32(even, weights.steps[4], second, 0);
  odd = vdotq_laneq_s32(odd, weights.steps[5], second, 1);
  even = vdotq_laneq_s32(even, weights.steps[6], second, 2);
  odd = vdotq_laneq_s32(odd, weights.steps[7], second, 3);
  return (Ints)vaddq_s32(even, odd);
}
#else
constexpr const char* kName = "neon";

inline int8x16_t repeated(const int8_t* four) {
  int32_t bits;
  std::memcpy(&bits, four, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(bits));
}

inline Ints dot(const Weights& weights, const int8_t* x) {
  // sums of the first two rows and of the last two, two lanes a row
  int32x4_t low = vdupq_n_s32(0), high = vdupq_n_s32(0);
  for (int i = 0; i < 8; i += 2) {
    const int8x16_t even = weights.steps[i], odd = weights.steps[i + 1];
    const int8x16_t x_even = repeated(x + 4 * i), x_odd = repeated(x + 4 * i + 4);
    // two products of -128 * 127 fit into 16 bits
    low = vpadalq_s16(low, vmlal_s8(vmull_s8(vget_low_s8(even), vget_low_s8(x_even)), vget_low_s8(odd), vget_low_s8(x_odd)));
    high = vpadalq_s16(high, vmlal_high_s8(vmull_high_s8(even, x_even), odd, x_odd));
  }
  return (Ints)vpaddq_s32(low, high);
}
#endif

#include "kernels.inl"

}  // namespace

#if defined(MINDVLM_DOTPROD)
const Kernels* const kDotprod = &kKernels;
#else
const Kernels* const kNeon = &kKernels;
#endif
#elif defined(MINDVLM_DOTPROD)
const Kernels* const kDotprod = nullptr;
#else
const Kernels* const kNeon = nullptr;
#endif
