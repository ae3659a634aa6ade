// A row of a float matrix.
template <Format format>
struct Row {
  using Value = std::conditional_t<format == Format::float32, float, uint16_t>;
  const Value* values;

  Row(const Matrix& w, int64_t index) : values(static_cast<const Value*>(w.values) + index * w.cols) {}
  explicit Row(const Value* values = nullptr) : values(values) {}

  Vec vec(int64_t col) const {
    if constexpr (format == Format::float32) return load(values + col);
    if constexpr (format == Format::bfloat16) return load_bfloat16(values + col);
    if constexpr (format == Format::float16) return load_float16(values + col);
  }

  float value(int64_t col) const {
    if constexpr (format == Format::float32) return values[col];
    if constexpr (format == Format::bfloat16) return to_float(uint32_t(values[col]) << 16);
    if constexpr (format == Format::float16) return half_to_float(values[col]);
  }
};

template <Format format>
void read_float_row(const Matrix& w, int64_t index, float* to) {
  const Row<format> row(w, index);
  for (int64_t k = 0; k < w.cols; ++k) to[k] = row.value(k);
}
