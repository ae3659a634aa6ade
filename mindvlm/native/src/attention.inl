// Softmax attention.

inline float largest(const float* x, int64_t count) {
  float found = x[0];
  for (int64_t i = 1; i < count; ++i) found = std::max(found, x[i]);
  return found;
}

// Replaces x by its softmax. The buffer has room for a whole number of vectors.
inline void softmax(float* x, int64_t count) {
  const float top = largest(x, count);
  for (int64_t i = count; i % kLanes; ++i) x[i] = -INFINITY;
  Vec total = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec value = exponential(load(x + i) - top);
    store(x + i, value);
    total += value;
  }
  const float inverse = 1.0f / sum(total);
  for (int64_t i = 0; i < count; ++i) x[i] *= inverse;
}

// out (kRows, width) = p (kRows, count) v (count, width); rows of p are `stride` apart, rows of out `out_stride`.
template <int kRows>
inline void weigh_rows(const float* p, int64_t stride, const float* v, int64_t count, int64_t width, float* out,
                       int64_t out_stride) {
  constexpr int kVecs = 4;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= width; d += kVecs * kLanes) {
    Vec sums[kRows][kVecs] = {};
    for (int64_t s = 0; s < count; ++s)
      for (int i = 0; i < kVecs; ++i) {
        const Vec value = load(v + s * width + d + i * kLanes);
        for (int r = 0; r < kRows; ++r) sums[r][i] += p[r * stride + s] * value;
      }
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kVecs; ++i) store(out + r * out_stride + d + i * kLanes, sums[r][i]);
  }
  for (; d + kLanes <= width; d += kLanes) {
    Vec sums[kRows] = {};
    for (int64_t s = 0; s < count; ++s)
      for (int r = 0; r < kRows; ++r) sums[r] += p[r * stride + s] * load(v + s * width + d);
    for (int r = 0; r < kRows; ++r) store(out + r * out_stride + d, sums[r]);
  }
  for (; d < width; ++d)
    for (int r = 0; r < kRows; ++r) {
      float total = 0;
      for (int64_t s = 0; s < count; ++s) total += p[r * stride + s] * v[s * width + d];
      out[r * out_stride + d] = total;
    }
}

// Attention of some queries to the first keys of one head. Query i sees num_keys[i] keys.
void attend(const float* query, int64_t num_queries, const int64_t* num_keys, const float* keys, const float* values,
            int64_t head_dim, float* out, int64_t out_stride) {
  thread_local std::vector<float> scores;
  for (int64_t first = 0; first < num_queries; first += kTileRows) {
    const int64_t count = std::min<int64_t>(kTileRows, num_queries - first);
    const int64_t seen = *std::max_element(num_keys + first, num_keys + first + count);
    const int64_t stride = round_up(seen, kLanes) + kLanes;
    scores.resize(kTileRows * stride);
    int64_t key = 0;
    Row<Format::float32> rows[kTileOutputs];
    for (; key + kTileOutputs <= seen; key += kTileOutputs) {
      for (int i = 0; i < kTileOutputs; ++i) rows[i].values = keys + (key + i) * head_dim;
      multiply_tiles<kTileOutputs>(query + first * head_dim, count, head_dim, rows, scores.data() + key, stride);
    }
    for (; key < seen; ++key) {
      rows[0].values = keys + key * head_dim;
      multiply_tiles<1>(query + first * head_dim, count, head_dim, rows, scores.data() + key, stride);
    }
    for (int64_t r = 0; r < count; ++r) {
      float* row = scores.data() + r * stride;
      softmax(row, num_keys[first + r]);
      std::fill(row + num_keys[first + r], row + seen, 0.0f);
    }
    float* to = out + first * out_stride;
    if (count == kTileRows) {
      weigh_rows<kTileRows>(scores.data(), stride, values, seen, head_dim, to, out_stride);
    } else {
      for (int64_t r = 0; r < count; ++r)
        weigh_rows<1>(scores.data() + r * stride, stride, values, seen, head_dim, to + r * out_stride, out_stride);
    }
  }
}
