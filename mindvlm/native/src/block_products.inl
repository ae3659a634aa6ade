// Products with a matrix of blocks.

// Bytes of a block of kLanes interleaved rows: their scales, then their values.
constexpr int64_t packed_bytes(Format format) { return kLanes * block_bytes(format); }

// Sums of a group of outputs for kRows rows of x.
template <Format format, int kRows>
inline void multiply_group(const uint8_t* packed, QuantizedRows x, int64_t cols, Vec* sums) {
  const int64_t num_blocks = cols / kBlock;
  constexpr int kOffset = format == Format::q8_0 ? kOffsetQ8 : kOffsetQ4;
  for (int r = 0; r < kRows; ++r) sums[r] = Vec{};
  for (int64_t b = 0; b < num_blocks; ++b, packed += packed_bytes(format)) {
    Weights weights;
    unpack<format>(packed + 2 * kLanes, weights);
    const Vec scale = load_float16(reinterpret_cast<const uint16_t*>(packed));
    for (int r = 0; r < kRows; ++r) {
      const int64_t block = r * num_blocks + b;
      Ints products = dot(weights, x.values + r * cols + b * kBlock);
      if (kOffset) products -= kOffset * x.sums[block];
      sums[r] += __builtin_convertvector(products, Vec) * (scale * x.scales[block]);
    }
  }
}

template <Format format, int kRows>
inline void multiply_group_rows(const uint8_t* packed, QuantizedRows x, const Matrix& w, float* y, int64_t num_outputs) {
  Vec sums[kRows];
  multiply_group<format, kRows>(packed, x, w.cols, sums);
  for (int r = 0; r < kRows; ++r)
    for (int64_t c = 0; c < num_outputs; ++c) y[r * w.rows + c] = sums[r][c];
}

template <Format format>
void multiply_block_format(const Matrix& w, QuantizedRows x, int64_t num_rows, float* y, int64_t first, int64_t last) {
  const int64_t num_blocks = w.cols / kBlock;
  for (int64_t out = first; out < last; out += kLanes) {
    const uint8_t* packed = w.packed.get() + out / kLanes * num_blocks * packed_bytes(format);
    const int64_t num_outputs = std::min<int64_t>(kLanes, last - out);
    QuantizedRows rows = x;
    int64_t row = 0;
    const auto advance = [&](int64_t count) {
      rows = {rows.values + count * w.cols, rows.scales + count * num_blocks, rows.sums + count * num_blocks};
      row += count;
    };
    while (row + kGroupRows <= num_rows) {
      multiply_group_rows<format, kGroupRows>(packed, rows, w, y + row * w.rows + out, num_outputs);
      advance(kGroupRows);
    }
    while (row < num_rows) {
      multiply_group_rows<format, 1>(packed, rows, w, y + row * w.rows + out, num_outputs);
      advance(1);
    }
  }
}

void multiply_blocks(const Matrix& w, QuantizedRows x, int64_t num_rows, float* y, int64_t first, int64_t last) {
  if (w.format == Format::q8_0) multiply_block_format<Format::q8_0>(w, x, num_rows, y, first, last);
  if (w.format == Format::q4_0) multiply_block_format<Format::q4_0>(w, x, num_rows, y, first, last);
}

void quantize_row(const float* x, int64_t cols, int8_t* values, float* scales, int32_t* sums) {
  for (int64_t b = 0; b < cols / kBlock; ++b, x += kBlock, values += kBlock) {
    float largest = 0;
    for (int64_t i = 0; i < kBlock; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    int32_t total = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      values[i] = static_cast<int8_t>(std::nearbyintf(x[i] * inverse));
      total += values[i];
    }
    scales[b] = largest / 127.0f;
    sums[b] = total;
  }
}

// Interleaves ggml's blocks: four consecutive bytes of every row in turn. Missing rows have the scale 0.
void pack(Format format, const uint8_t* blocks, int64_t num_rows, int64_t cols, uint8_t* packed) {
  const int64_t num_blocks = cols / kBlock, size = block_bytes(format);
  for (int64_t b = 0; b < num_blocks; ++b, packed += packed_bytes(format)) {
    for (int64_t row = 0; row < kLanes; ++row) {
      const uint8_t* from = blocks + (row * num_blocks + b) * size;
      const uint8_t empty[2 + kBlock] = {};
      if (row >= num_rows) from = empty;
      std::memcpy(packed + 2 * row, from, 2);
      for (int64_t i = 0; i < size - 2; ++i)
        packed[2 * kLanes + i / 4 * 4 * kLanes + 4 * row + i % 4] = from[2 + i] ^ (format == Format::q8_0 ? kFlipQ8 : 0);
    }
  }
}

void read_row(const Matrix& w, int64_t index, float* to) {
  if (w.format == Format::float32) return read_float_row<Format::float32>(w, index, to);
  if (w.format == Format::bfloat16) return read_float_row<Format::bfloat16>(w, index, to);
  if (w.format == Format::float16) return read_float_row<Format::float16>(w, index, to);
  const int64_t num_blocks = w.cols / kBlock, row = index % kLanes;
  const uint8_t* packed = w.packed.get() + index / kLanes * num_blocks * packed_bytes(w.format);
  for (int64_t b = 0; b < num_blocks; ++b, packed += packed_bytes(w.format), to += kBlock) {
    uint16_t half;
    std::memcpy(&half, packed + 2 * row, 2);
    const float scale = half_to_float(half);
    for (int64_t i = 0; i < block_bytes(w.format) - 2; ++i) {
      const uint8_t byte = packed[2 * kLanes + i / 4 * 4 * kLanes + 4 * row + i % 4];
      if (w.format == Format::q8_0) {
        to[i] = scale * static_cast<int8_t>(byte ^ kFlipQ8);
      } else {
        to[i] = scale * ((byte & 15) - 8);
        to[i + kBlock / 2] = scale * ((byte >> 4) - 8);
      }
    }
  }
}

