// Float16 numbers by their bits: not every compiler has a type for them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The bits of the nearest float16.
inline uint16_t to_half(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000, magnitude = bits_of(value) & 0x7fffffff;
  if (magnitude >= bits_of(65520.0f)) return sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00);
  // adding a power of two, whose last bit is worth as much as that of the float16, rounds as the processor does
  const uint32_t exponent = std::max(magnitude >> 23, bits_of(0x1p-14f) >> 23), power = (exponent + 13) << 23;
  const uint32_t steps = bits_of(float_of(magnitude) + float_of(power)) - power;
  return sign | (((exponent - (bits_of(0x1p-14f) >> 23)) << 10) + steps);
}

inline float rounded_to_half(float value) {
  const uint32_t half = to_half(value);
  // shifts exponent and mantissa in place and corrects the bias of the exponent
  return std::copysign(float_of((half & 0x7fff) << 13) * 0x1p112f, value);
}
