// Rounds float32 weights to blocks in ggml's layouts q8_0 and q4_0.
#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

// Candidates of the scale of an int4 block: the largest weight becomes -8 (1 + kStep i) for i from kFirst on, and is clipped.
constexpr int kFirst = -2, kLast = 8;
constexpr float kStep = 0.05f;

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The bits of the nearest float16. Not every compiler has a type for it.
uint16_t to_half(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000, magnitude = bits_of(value) & 0x7fffffff;
  if (magnitude >= bits_of(65520.0f)) return sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00);
  // adding a power of two, whose last bit is worth as much as that of the float16, rounds as the processor does
  const uint32_t exponent = std::max(magnitude >> 23, bits_of(0x1p-14f) >> 23), power = (exponent + 13) << 23;
  const uint32_t steps = bits_of(float_of(magnitude) + float_of(power)) - power;
  return sign | (((exponent - (bits_of(0x1p-14f) >> 23)) << 10) + steps);
}

float rounded_to_half(float value) {
  const uint32_t half = to_half(value);
  // shifts exponent and mantissa in place and corrects the bias of the exponent
  return std::copysign(float_of((half & 0x7fff) << 13) * 0x1p112f, value);
}

void quantize_q8(const float* x, uint8_t* block) {
  float largest = 0;
  for (int i = 0; i < kBlock; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float scale = largest / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
  const uint16_t half = to_half(scale);
  std::memcpy(block, &half, 2);
  for (int i = 0; i < kBlock; ++i) block[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(std::nearbyintf(x[i] * inverse)));
}

// Values -8 .. 7 of a block for one scale.
void round_to_q4(const float* x, float inverse, float* values) {
  for (int i = 0; i < kBlock; ++i) values[i] = std::clamp(std::nearbyintf(x[i] * inverse), -8.0f, 7.0f);
}

// The weighted error that a scale leaves.
float error_of(const float* x, const float* values, const float* importance, float scale) {
  float total = 0;
  for (int i = 0; i < kBlock; ++i) {
    const float difference = x[i] - scale * values[i];
    total += difference * difference * (importance ? importance[i] : 1.0f);
  }
  return total;
}

// Clips: a smaller scale rounds most weights better and a few large ones worse. Of several roundings, keeps the one whose
// least-squares scale leaves the smallest error.
void quantize_q4(const float* x, const float* importance, uint8_t* block) {
  float largest = 0;
  for (int i = 0; i < kBlock; ++i)
    if (std::fabs(x[i]) > std::fabs(largest)) largest = x[i];
  float best[kBlock] = {}, best_scale = 0, best_error = INFINITY;
  for (int step = kFirst; step <= kLast && largest != 0; ++step) {
    float values[kBlock], product = 0, square = 0;
    round_to_q4(x, -8.0f / largest * (1.0f + kStep * step), values);
    for (int i = 0; i < kBlock; ++i) {
      const float weighted = values[i] * (importance ? importance[i] : 1.0f);
      product += weighted * x[i];
      square += weighted * values[i];
    }
    if (square == 0) continue;
    const float scale = rounded_to_half(product / square);
    const float error = error_of(x, values, importance, scale);
    if (error < best_error) {
      best_error = error;
      best_scale = scale;
      std::memcpy(best, values, sizeof best);
    }
  }
  const uint16_t half = to_half(best_scale);
  std::memcpy(block, &half, 2);
  for (int i = 0; i < kBlock / 2; ++i) {
    const int low = static_cast<int>(best[i]) + 8, high = static_cast<int>(best[i + kBlock / 2]) + 8;
    block[2 + i] = static_cast<uint8_t>(low | high << 4);
  }
}

}  // namespace

void quantize_weights(Format format, const float* row, int64_t cols, const float* importance, uint8_t* blocks) {
  for (int64_t k = 0; k < cols; k += kBlock, blocks += block_bytes(format)) {
    if (format == Format::q8_0) {
      quantize_q8(row + k, blocks);
    } else {
      quantize_q4(row + k, importance ? importance + k : nullptr, blocks);
    }
  }
}
