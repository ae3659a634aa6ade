// Rounds float32 weights to blocks in ggml's layout q4_K: value = scale * (0 .. 15) - minimum, where scale and minimum of a part
// of 32 values are multiples of float16 units of the block.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "quantize.h"

namespace {

// Candidates of the scale of a part: its range has (15 + kStep i) steps for i from kFirst to kLast.
constexpr int kFirst = -10, kLast = 5;
constexpr float kStep = 0.2f, kLargestFactor = 63.0f;

struct Fit {
  float scale = 0, minimum = 0;
};

void round_part(const float* x, float inverse, float minimum, float* values) {
  for (int i = 0; i < kBlock; ++i) values[i] = std::clamp(std::nearbyintf((x[i] + minimum) * inverse), 0.0f, 15.0f);
}

// The scale and minimum of the least squared error for some values; the minimum is not negative.
Fit least_squares(const float* x, const float* weight, const float* values) {
  float one = 0, value = 0, square = 0, total = 0, product = 0;
  for (int i = 0; i < kBlock; ++i) {
    one += weight[i];
    value += weight[i] * values[i];
    square += weight[i] * values[i] * values[i];
    total += weight[i] * x[i];
    product += weight[i] * values[i] * x[i];
  }
  const float determinant = one * square - value * value;
  if (determinant > 0) {
    const Fit fit = {(one * product - value * total) / determinant, (value * product - square * total) / determinant};
    if (fit.minimum >= 0) return fit;
  }
  return {square > 0 ? product / square : 0.0f, 0.0f};
}

float error_of(const float* x, const float* weight, const float* values, const Fit& fit) {
  float total = 0;
  for (int i = 0; i < kBlock; ++i) {
    const float difference = fit.scale * values[i] - fit.minimum - x[i];
    total += weight[i] * difference * difference;
  }
  return total;
}

// Of several roundings, the one whose least-squares fit leaves the smallest error.
Fit fit_part(const float* x, const float* weight) {
  const float low = std::min(0.0f, *std::min_element(x, x + kBlock)), high = *std::max_element(x, x + kBlock);
  Fit best;
  float best_error = INFINITY, values[kBlock];
  if (high <= low) return {0.0f, -low};
  for (int step = kFirst; step <= kLast; ++step) {
    round_part(x, (15.0f + kStep * step) / (high - low), -low, values);
    const Fit fit = least_squares(x, weight, values);
    const float error = error_of(x, weight, values, fit);
    if (error < best_error && fit.scale >= 0) {
      best_error = error;
      best = fit;
    }
  }
  return best;
}

uint8_t factor(float value, float unit) {
  return unit > 0 ? static_cast<uint8_t>(std::clamp(std::nearbyintf(value / unit), 0.0f, kLargestFactor)) : 0;
}

}  // namespace

void quantize_q4_k(const float* x, const float* importance, uint8_t* block) {
  float equal[kBlock];
  std::fill_n(equal, kBlock, 1.0f);
  Fit fits[kParts];
  Fit largest;
  for (int part = 0; part < kParts; ++part) {
    fits[part] = fit_part(x + part * kBlock, importance ? importance + part * kBlock : equal);
    largest.scale = std::max(largest.scale, fits[part].scale);
    largest.minimum = std::max(largest.minimum, fits[part].minimum);
  }
  const float scale_unit = rounded_to_half(largest.scale / kLargestFactor);
  const float minimum_unit = rounded_to_half(largest.minimum / kLargestFactor);
  std::memset(block, 0, block_bytes(Format::q4_k));
  const uint16_t units[2] = {to_half(scale_unit), to_half(minimum_unit)};
  std::memcpy(block, units, 4);
  for (int part = 0; part < kParts; ++part) {
    const uint8_t scale = factor(fits[part].scale, scale_unit), minimum = factor(fits[part].minimum, minimum_unit);
    uint8_t* factors = block + 4;
    if (part < 4) {
      factors[part] |= scale;
      factors[part + 4] |= minimum;
    } else {
      factors[part + 4] |= (scale & 15) | (minimum & 15) << 4;
      factors[part - 4] |= scale >> 4 << 6;
      factors[part] |= minimum >> 4 << 6;
    }
    float values[kBlock];
    round_part(x + part * kBlock, scale ? 1.0f / (scale_unit * scale) : 0.0f, minimum_unit * minimum, values);
    // two parts share their bytes
    uint8_t* to = block + 16 + part / 2 * kBlock;
    for (int i = 0; i < kBlock; ++i) to[i] |= static_cast<uint8_t>(values[i]) << (part % 2 ? 4 : 0);
  }
}
