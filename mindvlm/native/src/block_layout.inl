// The interleaved layout of blocks.

// Where byte i of the values of a row is: four consecutive bytes of every row follow each other.
inline int64_t place(int64_t i, int64_t row) { return i / 4 * 4 * kLanes + 4 * row + i % 4; }

// The scale and the minimum of part i of a block of q4_K, 6 bits each.
inline void read_part(const uint8_t* packed, int i, uint8_t& scale, uint8_t& minimum) {
  if (i < 4) {
    scale = packed[i] & 63;
    minimum = packed[i + 4] & 63;
  } else {
    scale = (packed[i + 4] & 15) | (packed[i - 4] >> 6 << 4);
    minimum = (packed[i + 4] >> 4) | (packed[i] >> 6 << 4);
  }
}

// Interleaves a block of q4_K of a row; its parts become blocks of q4_0 with 8 bits for scale and minimum.
inline void pack_parts(const uint8_t* block, int64_t row, uint8_t* packed) {
  std::memcpy(packed + 2 * row, block, 2);
  std::memcpy(packed + 2 * kLanes + 2 * row, block + 2, 2);
  uint8_t* part = packed + 4 * kLanes;
  for (int i = 0; i < kParts; ++i, part += (2 + kBlock / 2) * kLanes) {
    read_part(block + 4, i, part[row], part[kLanes + row]);
    // two parts share their bytes
    const uint8_t* values = block + 16 + i / 2 * kBlock;
    for (int64_t k = 0; k < kBlock / 2; ++k) {
      const uint8_t low = i % 2 ? values[k] >> 4 : values[k] & 15;
      const uint8_t high = i % 2 ? values[k + kBlock / 2] >> 4 : values[k + kBlock / 2] & 15;
      part[2 * kLanes + place(k, row)] = low | high << 4;
    }
  }
}

// Interleaves stored rows. Missing rows have the scale 0.
void pack(Format format, const uint8_t* blocks, int64_t num_rows, int64_t cols, uint8_t* packed) {
  const int64_t num_blocks = cols / block_size(format), size = block_bytes(format), row_size = row_bytes(format, cols);
  const int64_t row_scale = row_scale_bytes(format), block_scale = row_scale ? 0 : 2;
  for (int64_t row = 0; row < num_rows; ++row) std::memcpy(packed + row_scale * row, blocks + row * row_size, row_scale);
  packed += row_scale * kLanes;
  for (int64_t b = 0; b < num_blocks; ++b, packed += packed_bytes(format)) {
    for (int64_t row = 0; row < kLanes; ++row) {
      const uint8_t* from = blocks + row * row_size + row_scale + b * size;
      const uint8_t empty[block_bytes(Format::q4_k)] = {};
      if (row >= num_rows) from = empty;
      if (format == Format::q4_k) {
        pack_parts(from, row, packed);
        continue;
      }
      std::memcpy(packed + block_scale * row, from, block_scale);
      const uint8_t flip = format == Format::q8_0 || format == Format::q8_c ? kFlipQ8 : 0;
      for (int64_t i = 0; i < size - block_scale; ++i)
        packed[block_scale * kLanes + place(i, row)] = from[block_scale + i] ^ flip;
    }
  }
}

inline float read_half(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, 2);
  return half_to_float(half);
}

void read_q8_row(const uint8_t* packed, int64_t row, int64_t num_blocks, float* to) {
  for (int64_t b = 0; b < num_blocks; ++b, packed += packed_bytes(Format::q8_0), to += kBlock) {
    const float scale = read_half(packed + 2 * row);
    for (int64_t i = 0; i < kBlock; ++i)
      to[i] = scale * static_cast<int8_t>(packed[2 * kLanes + place(i, row)] ^ kFlipQ8);
  }
}

void read_q8_c_row(const uint8_t* packed, int64_t row, int64_t cols, float* to) {
  float scale;
  std::memcpy(&scale, packed + 4 * row, 4);
  for (int64_t i = 0; i < cols; ++i) to[i] = scale * static_cast<int8_t>(packed[4 * kLanes + place(i, row)] ^ kFlipQ8);
}

void read_q4_row(const uint8_t* packed, int64_t row, int64_t num_blocks, float* to) {
  for (int64_t b = 0; b < num_blocks; ++b, packed += packed_bytes(Format::q4_0), to += kBlock) {
    const float scale = read_half(packed + 2 * row);
    for (int64_t i = 0; i < kBlock / 2; ++i) {
      const uint8_t byte = packed[2 * kLanes + place(i, row)];
      to[i] = scale * ((byte & 15) - 8);
      to[i + kBlock / 2] = scale * ((byte >> 4) - 8);
    }
  }
}

void read_q4_k_row(const uint8_t* packed, int64_t row, int64_t num_blocks, float* to) {
  for (int64_t b = 0; b < num_blocks; ++b) {
    const float scale_unit = read_half(packed + 2 * row), minimum_unit = read_half(packed + 2 * kLanes + 2 * row);
    packed += 4 * kLanes;
    for (int part = 0; part < kParts; ++part, packed += (2 + kBlock / 2) * kLanes, to += kBlock) {
      const float scale = scale_unit * packed[row], minimum = minimum_unit * packed[kLanes + row];
      for (int64_t i = 0; i < kBlock / 2; ++i) {
        const uint8_t byte = packed[2 * kLanes + place(i, row)];
        to[i] = scale * (byte & 15) - minimum;
        to[i + kBlock / 2] = scale * (byte >> 4) - minimum;
      }
    }
  }
}

void read_row(const Matrix& w, int64_t index, float* to) {
  if (w.format == Format::float32) return read_float_row<Format::float32>(w, index, to);
  if (w.format == Format::bfloat16) return read_float_row<Format::bfloat16>(w, index, to);
  if (w.format == Format::float16) return read_float_row<Format::float16>(w, index, to);
  const int64_t num_blocks = w.cols / block_size(w.format), row = index % kLanes;
  const uint8_t* packed = w.packed.get() + (index - row) * interleaved_row_bytes(w.format, w.cols);
  if (w.format == Format::q8_0) read_q8_row(packed, row, num_blocks, to);
  if (w.format == Format::q8_c) read_q8_c_row(packed, row, w.cols, to);
  if (w.format == Format::q4_0) read_q4_row(packed, row, num_blocks, to);
  if (w.format == Format::q4_k) read_q4_k_row(packed, row, num_blocks, to);
}
