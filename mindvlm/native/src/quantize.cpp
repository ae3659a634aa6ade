// Rounds float32 weights to blocks in ggml's layouts q8_0 and q4_0, and to rows of q8_c.
#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"

namespace {

// Candidates of the scale of an int4 block: the largest weight becomes -8 (1 + kStep i) for i from kFirst on, and is clipped.
constexpr int kFirst = -2, kLast = 8;
constexpr float kStep = 0.05f;

// Rounds weights to multiples -127 .. 127 of a scale, which it returns.
float quantize_int8(const float* x, int64_t count, uint8_t* values) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(x[i]));
  // the inverse of a subnormal scale may be infinite
  const float scale = largest / 127.0f, inverse = scale >= 0x1p-126f ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<uint8_t>(static_cast<int8_t>(std::nearbyintf(x[i] * inverse)));
  return scale;
}

void quantize_q8(const float* x, uint8_t* block) {
  const uint16_t half = to_half(quantize_int8(x, kBlock, block + 2));
  std::memcpy(block, &half, 2);
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
  if (format == Format::q8_c) {
    const float scale = quantize_int8(row, cols, blocks + 4);
    std::memcpy(blocks, &scale, 4);
    return;
  }
  const int64_t size = block_size(format);
  for (int64_t k = 0; k < cols; k += size, blocks += block_bytes(format)) {
    const float* of_block = importance ? importance + k : nullptr;
    if (format == Format::q8_0) quantize_q8(row + k, blocks);
    if (format == Format::q4_0) quantize_q4(row + k, of_block, blocks);
    if (format == Format::q4_k) quantize_q4_k(row + k, of_block, blocks);
  }
}
