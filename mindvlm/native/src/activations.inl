// Activations of feed-forward blocks.

// x * (1 + erf(x / sqrt 2)) / 2. With q = erfc(|x| / sqrt 2) / 2, it is x q for a negative x and x - x q else. erfc(z) is
// e^(-z^2) times a polynomial of 1 / (1 + 0.565 z), fitted with an error of 2e-8 of the result.
inline Vec gelu(Vec x) {
  const Vec size = x < 0 ? -x : x;
  const Vec t = 1.0f / (1.0f + 0.39951533f * size);
  Vec value = Vec{} + 0.0562859620781649f;
  value = value * t - 0.25489593165917707f;
  value = value * t + 0.34132112427319283f;
  value = value * t + 0.011947114343803439f;
  value = value * t + 0.1888703332775821f;
  value = value * t + 0.15647144582084926f;
  const Vec product = x * (value * t * exponential(-0.5f * x * x));
  return x < 0 ? product : x - product;
}

inline Vec times_sigmoid(Vec x, Vec exponent) { return x / (1.0f + exponential(-exponent)); }

// See `mindvlm/nn/mlp.py` for the formulas.
template <Activation kind>
inline Vec activated(Vec x) {
  if constexpr (kind == Activation::gelu) return gelu(x);
  if constexpr (kind == Activation::tanh_gelu) return times_sigmoid(x, 1.5957691216057308f * (x + 0.044715f * x * x * x));
  if constexpr (kind == Activation::quick_gelu) return times_sigmoid(x, 1.702f * x);
  if constexpr (kind == Activation::silu) return times_sigmoid(x, x);
  if constexpr (kind == Activation::relu) return x < 0 ? Vec{} : x;
}

template <Activation kind>
void activate_all(const float* x, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, activated<kind>(load(x + i)));
  if (i == count) return;
  float rest[kLanes] = {};
  std::memcpy(rest, x + i, (count - i) * sizeof(float));
  store(rest, activated<kind>(load(rest)));
  std::memcpy(to + i, rest, (count - i) * sizeof(float));
}

void activate(Activation kind, const float* x, int64_t count, float* to) {
  if (kind == Activation::gelu) activate_all<Activation::gelu>(x, count, to);
  if (kind == Activation::tanh_gelu) activate_all<Activation::tanh_gelu>(x, count, to);
  if (kind == Activation::quick_gelu) activate_all<Activation::quick_gelu>(x, count, to);
  if (kind == Activation::silu) activate_all<Activation::silu>(x, count, to);
  if (kind == Activation::relu) activate_all<Activation::relu>(x, count, to);
}
