// Vectors of floats.

inline Vec load(const float* from) {
  Vec vec;
  __builtin_memcpy(&vec, from, sizeof vec);
  return vec;
}

inline void store(float* to, Vec vec) { __builtin_memcpy(to, &vec, sizeof vec); }

// Fetches kBytes bytes that are two pages after `from`; the processor's own prefetching ends at a page.
template <int64_t kBytes>
inline void prefetch_after(const void* from) {
  for (int64_t at = 0; at < kBytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + 8192 + at);
}

// Bytes as floats.
inline Vec load_bytes(const uint8_t* from) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Vec);
}

inline float sum(Vec vec) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += vec[i];
  return total;
}

inline float to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline float half_to_float(uint16_t half) {
  // shifts exponent and mantissa in place and corrects the bias of the exponent, subnormal numbers included
  float magnitude = to_float((half & 0x7fffu) << 13) * 0x1p112f;
  if ((half & 0x7c00) == 0x7c00) magnitude = half & 0x3ff ? __builtin_nanf("") : __builtin_inff();
  return half & 0x8000 ? -magnitude : magnitude;
}

// e^x with a relative error of 2e-7, for x between -87 and 88, to which it is clipped: 2^n times a polynomial of the rest
// of x / ln 2. NaN stays NaN.
inline Vec exponential(Vec x) {
  x = x > 88.0f ? Vec{} + 88.0f : x;
  x = x < -87.0f ? Vec{} - 87.0f : x;
  // adding 1.5 * 2^23 rounds to an integer, which is then in the low bits
  const Vec shifted = x * 1.44269504f + 0x1.8p23f;
  const Vec n = shifted - 0x1.8p23f;
  const Vec rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec value = Vec{} + 1.9875691500e-4f;
  value = value * rest + 1.3981999507e-3f;
  value = value * rest + 8.3334519073e-3f;
  value = value * rest + 4.1665795894e-2f;
  value = value * rest + 1.6666665459e-1f;
  value = value * rest + 5.0000001201e-1f;
  value = value * rest * rest + rest + 1.0f;
  return (Vec)((Ints)value + ((Ints)shifted << 23));
}
