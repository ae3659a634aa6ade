// Norms and gated activation.

// Calls run(first, vector) for the vectors of x, the last one filled up with `rest`.
template <class Run>
inline void each_vector(const float* x, int64_t width, float rest, const Run& run) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) run(i, load(x + i));
  if (i == width) return;
  float last[kLanes];
  std::fill(last, last + kLanes, rest);
  std::memcpy(last, x + i, (width - i) * sizeof(float));
  run(i, load(last));
}

// to = x * w / rms(x), the square mean over the row.
void rms_norm(const float* x, const float* weight, int64_t width, float eps, float* to) {
  Vec squares = {};
  each_vector(x, width, 0.0f, [&](int64_t, Vec value) { squares += value * value; });
  const float inverse = 1.0f / std::sqrt(sum(squares) / width + eps);
  for (int64_t i = 0; i < width; ++i) to[i] = x[i] * inverse * weight[i];
}

void layer_norm(const float* x, const float* weight, const float* bias, int64_t width, float eps, float* to) {
  Vec total = {}, squares = {};
  each_vector(x, width, 0.0f, [&](int64_t, Vec value) { total += value; });
  const float mean = sum(total) / width;
  each_vector(x, width, mean, [&](int64_t, Vec value) { squares += (value - mean) * (value - mean); });
  const float inverse = 1.0f / std::sqrt(sum(squares) / width + eps);
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
