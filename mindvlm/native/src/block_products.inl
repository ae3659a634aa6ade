// Products with a matrix of blocks.

// Bytes of a block of kLanes interleaved rows: their scales, then their values.
constexpr int64_t packed_bytes(Format format) { return kLanes * interleaved_bytes(format); }

// Sums of a group of outputs for kRows rows of x.
template <Format format, int kRows>
inline void multiply_group(const uint8_t* packed, QuantizedRows x, int64_t cols, Vec* sums) {
  const int64_t num_blocks = cols / kBlock;
  constexpr bool has_row_scale = format == Format::q8_c;
  constexpr int kOffset = format == Format::q4_0 ? kOffsetQ4 : kOffsetQ8;
  Vec scale = {}, row_scale = {};
  if (has_row_scale) {
    std::memcpy(&row_scale, packed, sizeof row_scale);
    packed += sizeof row_scale;
  }
  for (int64_t b = 0; b < num_blocks; ++b, packed += packed_bytes(format)) {
    Weights weights;
    prefetch_after<packed_bytes(format)>(packed);
    unpack<has_row_scale ? Format::q8_0 : format>(packed + (has_row_scale ? 0 : 2 * kLanes), weights);
    if (!has_row_scale) scale = load_float16(reinterpret_cast<const uint16_t*>(packed));
    for (int r = 0; r < kRows; ++r) {
      const int64_t block = r * num_blocks + b;
      Ints products = dot(weights, x.values + r * cols + b * kBlock);
      if (kOffset) products -= kOffset * x.sums[block];
      const Vec factor = has_row_scale ? Vec{} + x.scales[block] : scale * x.scales[block];
      sums[r] += __builtin_convertvector(products, Vec) * factor;
    }
  }
  if (has_row_scale)
    for (int r = 0; r < kRows; ++r) sums[r] *= row_scale;
}

// The same for q4_K, whose parts are stored as blocks of q4_0 with another scale and a minimum.
template <int kRows>
inline void multiply_parts(const uint8_t* packed, QuantizedRows x, int64_t cols, Vec* sums) {
  const int64_t num_blocks = cols / kBlock;
  for (int64_t b = 0; b < num_blocks;) {
    const Vec scale_unit = load_float16(reinterpret_cast<const uint16_t*>(packed));
    const Vec minimum_unit = load_float16(reinterpret_cast<const uint16_t*>(packed) + kLanes);
    packed += 4 * kLanes;
    for (int i = 0; i < kParts; ++i, ++b, packed += (2 + kBlock / 2) * kLanes) {
      Weights weights;
      prefetch_after<(2 + kBlock / 2) * kLanes>(packed);
      unpack<Format::q4_0>(packed + 2 * kLanes, weights);
      const Vec scale = scale_unit * load_bytes(packed), minimum = minimum_unit * load_bytes(packed + kLanes);
      for (int r = 0; r < kRows; ++r) {
        const int64_t block = r * num_blocks + b;
        Ints products = dot(weights, x.values + r * cols + b * kBlock);
        if (kOffsetQ4 != 8) products += (8 - kOffsetQ4) * x.sums[block];
        sums[r] += __builtin_convertvector(products, Vec) * (scale * x.scales[block]);
        sums[r] -= minimum * (x.scales[block] * static_cast<float>(x.sums[block]));
      }
    }
  }
}

// The outputs of a group for `num_rows` rows of x: kRows at a time, and the rest with fewer.
template <Format format, int kRows>
inline void multiply_group_rows(const uint8_t* packed, QuantizedRows x, const Matrix& w, int64_t num_rows, float* y,
                                int64_t num_outputs) {
  for (; num_rows >= kRows; num_rows -= kRows, y += kRows * w.rows) {
    Vec sums[kRows] = {};
    if constexpr (format == Format::q4_k) {
      multiply_parts<kRows>(packed, x, w.cols, sums);
    } else {
      multiply_group<format, kRows>(packed, x, w.cols, sums);
    }
    for (int r = 0; r < kRows; ++r) std::memcpy(y + r * w.rows, &sums[r], num_outputs * sizeof(float));
    const int64_t num_blocks = kRows * w.cols / kBlock;
    x = {x.values + kRows * w.cols, x.scales + num_blocks, x.sums + num_blocks};
  }
  if constexpr (kRows > 1) multiply_group_rows<format, kRows / 2>(packed, x, w, num_rows, y, num_outputs);
}

template <Format format>
void multiply_block_format(const Matrix& w, QuantizedRows x, int64_t num_rows, float* y, int64_t first, int64_t last) {
  const int64_t group_bytes = kLanes * interleaved_row_bytes(format, w.cols);
  for (int64_t out = first; out < last; out += kLanes)
    multiply_group_rows<format, kGroupRows>(w.packed.get() + out / kLanes * group_bytes, x, w, num_rows, y + out,
                                            std::min<int64_t>(kLanes, last - out));
}

void multiply_blocks(const Matrix& w, QuantizedRows x, int64_t num_rows, float* y, int64_t first, int64_t last) {
  if (w.format == Format::q8_0) multiply_block_format<Format::q8_0>(w, x, num_rows, y, first, last);
  if (w.format == Format::q8_c) multiply_block_format<Format::q8_c>(w, x, num_rows, y, first, last);
  if (w.format == Format::q4_0) multiply_block_format<Format::q4_0>(w, x, num_rows, y, first, last);
  if (w.format == Format::q4_k) multiply_block_format<Format::q4_k>(w, x, num_rows, y, first, last);
}

void quantize_row(const float* x, int64_t cols, int8_t* values, float* scales, int32_t* sums) {
  constexpr int kVecs = kBlock / kLanes;
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  Vec zeros = {};
  for (int64_t b = 0; b < cols / kBlock; ++b, x += kBlock, values += kBlock) {
    Vec parts[kVecs], largest = {};
    for (int i = 0; i < kVecs; ++i) {
      parts[i] = load(x + i * kLanes);
      const Vec size = parts[i] < 0 ? -parts[i] : parts[i];
      largest = size > largest ? size : largest;
    }
    float top = 0;
    for (int i = 0; i < kLanes; ++i) top = std::max(top, largest[i]);
    // the inverse of a tiny number may be infinite
    const float inverse = top >= 0x1p-119f ? 127.0f / top : 0.0f;
    Ints total = {};
    for (int i = 0; i < kVecs; ++i) {
      const Vec scaled = parts[i] * inverse;
      // NaN too, which has no integer
      const Ints rounded = to_nearest(scaled <= 127.0f ? scaled : Vec{} + 127.0f);
      const Bytes bytes = __builtin_convertvector(rounded, Bytes);
      std::memcpy(values + i * kLanes, &bytes, sizeof bytes);
      total += rounded;
      zeros += parts[i] * 0.0f;
    }
    scales[b] = top / 127.0f;
    sums[b] = 0;
    for (int i = 0; i < kLanes; ++i) sums[b] += total[i];
  }
  // an integer cannot be NaN: outputs become NaN by a scale
  if (std::isnan(sum(zeros))) scales[0] = NAN;
}
