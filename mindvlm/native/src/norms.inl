// Norms and gated activation.

// to = x * w / rms(x), the square mean over the row.
void rms_norm(const float* x, const float* weight, int64_t width, float eps, float* to) {
  double square = 0;
  for (int64_t i = 0; i < width; ++i) square += static_cast<double>(x[i]) * x[i];
  const float inverse = 1.0f / std::sqrt(static_cast<float>(square / width) + eps);
  for (int64_t i = 0; i < width; ++i) to[i] = x[i] * inverse * weight[i];
}

void layer_norm(const float* x, const float* weight, const float* bias, int64_t width, float eps, float* to) {
  double total = 0, square = 0;
  for (int64_t i = 0; i < width; ++i) total += x[i];
  const float mean = static_cast<float>(total / width);
  for (int64_t i = 0; i < width; ++i) square += static_cast<double>(x[i] - mean) * (x[i] - mean);
  const float inverse = 1.0f / std::sqrt(static_cast<float>(square / width) + eps);
  for (int64_t i = 0; i < width; ++i) to[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
}

// to = silu(gate) * up
void gated_silu(const float* gate, const float* up, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec value = load(gate + i);
    store(to + i, value / (1.0f + exponential(-value)) * load(up + i));
  }
  for (; i < count; ++i) to[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}
